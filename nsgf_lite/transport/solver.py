"""The iterations of Sinkhorn's algorithm, fast and to a tolerance; :mod:`nsgf_lite.sinkhorn` is their public face.

The dual potentials f, g make ``P_ij = a_i exp((f_i + g_j - c_ij) / eps) b_j`` a coupling. Each half step mends one
marginal. Five ideas make this fast, and let it reach any tolerance that the arithmetic allows:

* *kernel domain*: exponentiate once, ``K = exp((f + g - c) / eps)``, then iterate on scalings u, v by products with K,
  ten times cheaper than a pass of exponentials; absorb ``eps log u, eps log v`` into f, g when the scalings grow;
* *annealing*: a few half steps at large temperatures first, eight times smaller each time;
* *over-relaxation*: ``u <- u^(1-w) (1 / K b v)^w`` with w from the observed rate, lowered when the error stops falling;
* *averaging* for the self problem, ``f <- (f + A f) / 2``, whose rate is one half or better at every temperature;
* *Newton's method* on the dual when the plan is so nearly a permutation that the iteration crawls.

Everything here is batched: H (b, n, m), f and a (b, n), g and b (b, m). Used in: optimal_transport, speed.
"""

import math

import torch
from torch import Tensor

PLANE = 8  # up to this dimension the cost is summed by coordinates; above, inner products are more accurate
CHECK = 8  # iterations between two looks at the error
NEWTON_AFTER = 600  # iterations after which Newton's method takes over, where a dense linear solve is affordable
NEWTON_SIZE = 2**22
NEWTON_STEPS = 400
_SMALL = 2**12  # entries of a matrix below which many are summed at once instead of one after the other

# The problem in the form the iterations want --------------------------------------------------------------------------


def affinity(x: Tensor, y: Tensor, plane: int = PLANE) -> tuple[Tensor, Tensor, Tensor]:
    """H (b,n,m), p (b,n), q (b,m), with cost ``|x_i - y_j|^2 / 2 = p_i + q_j - H_ij``.

    In the plane H is minus the cost. In high dimension it is the inner product: ``|x|^2/2 + |y|^2/2 - <x, y>`` cancels
    badly in float32, so the norms are absorbed into the potentials, where they cancel by themselves.
    """
    if x.shape[-1] > plane:
        return x @ y.mT, (x * x).sum(-1) / 2, (y * y).sum(-1) / 2
    H = x.new_zeros(())
    for k in range(x.shape[-1]):
        gap = x[..., :, None, k] - y[..., None, :, k]
        H = (gap * gap).mul_(-0.5) if k == 0 else H.addcmul_(gap, gap, value=-0.5)
    return H, x.new_zeros(x.shape[:-1]), y.new_zeros(y.shape[:-1])


def gathered(x: Tensor, a: Tensor) -> Tensor:
    """The cloud with its points of weight zero put on the heaviest one: however far they were, nothing sees them."""
    heaviest = a.argmax(-1)[..., None, None].expand(*x.shape[:-2], 1, x.shape[-1])
    return torch.where((a > 0).unsqueeze(-1), x, x.gather(-2, heaviest))


def centre(y: Tensor) -> Tensor:
    """Mean of the bulk of each cloud, shape (…, 1, d): costs do not depend on it, the rounding of what is made of the
    points does. Points more than twice as far from the mean as the median point are left out."""
    y = y.detach()
    mean = y.mean(-2, keepdim=True)
    far = (y - mean).square().sum(-1)
    bulk = far <= 4 * far.median(-1, keepdim=True).values
    if bool(bulk.all()):
        return mean
    return torch.where(bulk.unsqueeze(-1), y, 0).sum(-2, keepdim=True) / bulk.sum(-1)[..., None, None]


def _times(K: Tensor, w: Tensor) -> Tensor:
    """Matrix times vector over a batch, (b,n,m) and (b,m) to (b,n): on a CPU, faster than ``bmm``."""
    if K.is_cuda:
        return torch.bmm(K, w.unsqueeze(-1)).squeeze(-1)
    if len(K) > 1 and K[0].numel() <= _SMALL:
        return (K * w.unsqueeze(-2)).sum(-1)
    return torch.stack([torch.mv(matrix, vector) for matrix, vector in zip(K, w, strict=True)])


def _exp_(S: Tensor) -> Tensor:
    """Exponential in place, of exponents of at most moderate size. Results that would be denormal numbers, a hundred
    times slower on every processor, are raised to one that is as negligible."""
    return S.clamp_min_(0.85 * math.log(torch.finfo(S.dtype).tiny)).exp_()


def softmax(S: Tensor) -> Tensor:
    """Softmax over the last axis, in place of S unless it has a gradient."""
    if S.requires_grad:
        return torch.softmax(S, -1)
    K = _exp_(S.sub_(S.amax(-1, keepdim=True)))
    return K.div_(K.sum(-1, keepdim=True))


def _l1(weights: Tensor, ratio: Tensor) -> float:
    """Largest L1 error in the batch of marginals that are ``weights * ratio``."""
    return float((weights * (ratio - 1)).abs().sum(-1).max())


def _spread(*scalings: Tensor) -> float:
    return max(float((u.amax(-1) / u.amin(-1)).max()) for u in scalings)


# The iterations: each returns f, g, the number of steps, and the L1 marginal error reached --------------------------

Solution = tuple[Tensor, Tensor, int, float]


def alternate(
    H: Tensor, a: Tensor, b: Tensor, eps: float, g: Tensor, temperature: float, tol: float, max_iter: int
) -> Solution:
    """Alternate half steps from g, annealing from the given temperature down to eps; ends on a row step."""
    small, steps, w, error, K, history = torch.finfo(H.dtype).tiny ** 0.5, 0, 1.0, math.inf, None, list[float]()
    patience = NEWTON_AFTER if H[0].numel() <= NEWTON_SIZE else max_iter
    temperature = eps if max_iter == 1 else temperature
    while True:
        # A row step in the log domain: the largest entry of each row becomes one, so that no row underflows.
        K = torch.add(H, g.unsqueeze(-2), out=K).div_(temperature)
        top = K.amax(-1)
        _exp_(K.sub_(top.unsqueeze(-1)))
        f, u, v = -temperature * top, 1 / _times(K, b), torch.ones_like(b)
        for step in range(1, max_iter + 1):
            v = (v * (v * _times(K.mT, a * u)).clamp_min_(small) ** -w).clamp_max_(1 / small)
            row = _times(K, b * v).clamp_min_(small)
            steps += 1
            if temperature > eps and (step == 4 or steps >= max_iter - 1):
                break
            if temperature <= eps and (step % CHECK == 0 or steps >= max_iter):
                error = _l1(b, v * _times(K.mT, a / row))
                if error <= tol or steps >= min(max_iter, patience) or _spread(row, v) > small**-0.5:
                    break
                w, history = relaxation(w, [*history, error])
            u = (u * (u * row) ** -w).clamp_max_(1 / small)
        f, g = f - temperature * row.log(), g + temperature * v.log()
        if temperature <= eps and (error <= tol or steps >= max_iter):
            return f, g, steps, error
        if temperature <= eps and steps >= patience:
            return newton(H, a, b, eps, g, steps, tol, max_iter)
        temperature = max(eps, temperature / 8) if steps < max_iter - 1 else eps


def relaxation(w: float, history: list[float]) -> tuple[float, list[float]]:
    """Over-relaxation exponent for the next steps, and the errors seen under it so far.

    Two looks reveal the rate r of the iteration, and Young's equation the rate of the plain one behind it,
    ``(r + w - 1)^2 / (w^2 r)``; for that the optimum is ``2 / (1 + sqrt(1 - plain))``. It is taken when it is larger.
    The guard: four looks without progress bring w back towards one, the plain iteration, which converges from anywhere.
    """
    if len(history) > (1 if w == 1 else 2) and history[-1] < history[-2]:
        rate = (history[-1] / history[-2]) ** (1 / CHECK)
        plain = (rate + w - 1) ** 2 / (w * w * rate) if rate > w - 1 else 0.0
        best = min(1.95, 2 / (1 + math.sqrt(max(0.0, 1 - plain))))
        if best > w + 0.02:
            return best, history[-1:]
    if w > 1 and len(history) > 4 and min(history[-4:]) >= min(history[:-4]):
        return 1 + 0.7 * (w - 1), history[-1:]
    return w, history


def newton(H: Tensor, a: Tensor, b: Tensor, eps: float, g: Tensor, steps: int, tol: float, max_iter: int) -> Solution:
    """Damped Newton ascent of the concave semi-dual ``g -> <a, A g> + <b, g>``, in float64; f is an exact row step."""
    given = H.dtype
    H, a, b, g = (t.double() for t in (H, a, b, g))
    last = min(max_iter, steps + NEWTON_STEPS)

    def row_step(g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        S = torch.add(H, g.unsqueeze(-2)).div_(eps).add_(b.log().unsqueeze(-2))
        f = -eps * torch.logsumexp(S, -1)
        return S, f, (a * f).sum(-1) + (b * g).sum(-1)

    S, f, dual = row_step(g)
    reach = torch.full_like(b[..., :1], 3)
    while True:
        rows = softmax(S)
        P = rows * a.unsqueeze(-1)
        columns = P.sum(-2)
        error = float((columns - b).abs().sum(-1).max())
        if error <= tol or steps >= last:
            extended = -eps * torch.logsumexp((H + f.unsqueeze(-1)) / eps + a.log().unsqueeze(-1), -2)
            return f.to(given), torch.where(b > 0, g, extended).to(given), steps, error
        # The Hessian is singular along constants, and where a weight is zero: a rank-one term and a diagonal mend it.
        level = columns.mean(-1, keepdim=True)
        A = torch.diag_embed(columns + 1e-15 * level + (b == 0)) - rows.mT @ P
        A += (level / b.shape[-1]).unsqueeze(-1)
        factor, failed = torch.linalg.cholesky_ex(A)
        if bool(failed.any()):
            factor, _ = torch.linalg.cholesky_ex(A + torch.diag_embed((1e-11 * level).expand(b.shape)))
        ascent = torch.cholesky_solve((b - columns).unsqueeze(-1), factor).squeeze(-1)
        # A step must not lower the dual; its length, three units of eps at first, may double after each that did not.
        size, reach = (reach / ascent.abs().amax(-1, keepdim=True)).clamp_max(1), 2 * reach
        for _ in range(40):
            S, f, value = row_step(g + eps * size * ascent)
            lower = value < dual - 1e-14 * dual.abs()
            if not bool(lower.any()):
                break
            size = torch.where(lower.unsqueeze(-1), size / 2, size)
            reach = torch.where(lower.unsqueeze(-1), (reach / 2).clamp_min(3), reach)
        g, dual, steps = g + eps * size * ascent, value, steps + 1


def averaged(H: Tensor, a: Tensor, eps: float, f: Tensor, tol: float, max_iter: int) -> Solution:
    """Symmetric potential of the self problem: the fixed point of f <- (f + A f) / 2, from f."""
    small, steps, K = torch.finfo(H.dtype).tiny ** 0.5, 0, None
    while True:
        K = _exp_(torch.add(H, f.unsqueeze(-2), out=K).add_(f.unsqueeze(-1)).div_(eps))
        u = torch.ones_like(f)
        error, spread = math.inf, 1.0
        while error > tol and steps < max_iter and spread < small**-0.5:
            row = _times(K, a * u).clamp_min_(small)
            error, spread = _l1(a, u * row), _spread(u)
            u = (u / row).sqrt_()
            steps += 1
        f = f + eps * u.log()
        if error <= tol or steps >= max_iter:
            return f, f, steps, error


def hot(H: Tensor, a: Tensor, b: Tensor, eps: float, g: Tensor, tol: float, max_iter: int) -> Solution:
    """Half steps from g at temperatures far above the costs: there ``log sum b exp(S)`` loses S beside one, and eps
    times what is lost may exceed the costs. By ``log1p`` and ``expm1`` f and g keep the accuracy of the costs."""
    # Beyond this temperature nothing changes that the arithmetic could tell, and eps itself may overflow.
    widest = H.abs().amax((-2, -1)).clamp_min(torch.finfo(H.dtype).tiny)
    temperature = (widest / torch.finfo(H.dtype).eps).clamp_max(eps).unsqueeze(-1)
    goal = tol * widest / temperature[:, 0]  # the error of f and g is to be tol of the costs, not of eps
    steps = 0
    while True:
        S = torch.add(H, g.unsqueeze(-2)).div_(temperature.unsqueeze(-1))
        f = -temperature * torch.log1p(_times(S.expm1_(), b))
        S = torch.add(H, f.unsqueeze(-1)).div_(temperature.unsqueeze(-1))
        back = -temperature * torch.log1p(_times(S.expm1_().mT, a))
        error = (b * torch.expm1((g - back) / temperature)).abs().sum(-1)
        steps += 1
        if bool((error <= goal).all()) or steps >= max_iter:
            return f, g, steps, float(error.max())
        g = back
