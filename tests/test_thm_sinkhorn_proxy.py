"""One test for each theorem of the chapter book/sinkhorn_proxy.md.

The pseudo-plans are written out here as matrices, with loops for the iterations, so that they share no code with the
library; populations are put on Gauss-Hermite nodes and compared with closed forms.
"""

import math

import pytest
import torch
from numpy.polynomial.hermite_e import hermegauss

import nsgf_lite as nl
from nsgf_lite.closed_forms import two_atom_velocity

F64 = torch.float64
pytestmark = pytest.mark.filterwarnings(
    "error::nsgf_lite.ConvergenceWarning", "error::nsgf_lite.fields.UnderflowWarning"
)


def problem(seed, n=7, m=11, d=2):
    """Two weighted clouds of different sizes; nothing uniform."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=generator, dtype=F64)
    y = 0.8 * torch.randn(m, d, generator=generator, dtype=F64) + 0.5
    a = torch.rand(n, generator=generator, dtype=F64) + 0.2
    b = torch.rand(m, generator=generator, dtype=F64) + 0.2
    return x, y, a / a.sum(), b / b.sum(), generator


def kernel(x, y, eps):
    return torch.exp(-(x[:, None] - y).square().sum(-1) / (2 * eps))


def pseudo_plan(x, y, eps, a, b, times=1):
    A = kernel(x, y, eps)
    for _ in range(times):
        row, column = (A * b).sum(1, keepdim=True), (a[:, None] * A).sum(0, keepdim=True)
        A = A / (row * column).sqrt()
    return A


def halves(x, y, eps, a, b, times=1):
    """Row masses and means of both pseudo-plans."""
    A, B = pseudo_plan(x, y, eps, a, b, times), pseudo_plan(x, x, eps, a, a, times)
    r, s = (A @ b)[:, None], (B @ a)[:, None]
    return r, s, (A * b) @ y / r, (B * a) @ x / s


def hermite(n):
    z, w = map(torch.from_numpy, hermegauss(n))
    return z[:, None], w / w.sum()


# thm-cross-weighting --------------------------------------------------------------------


@pytest.mark.parametrize("eps", [0.1, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_thm_cross_weighting(seed, eps):
    x, y, a, b, generator = problem(seed)
    field = nl.fields.SinkhornProxy(eps)
    V = field(x, y, a=a, b=b)
    r, s, towards, away = halves(x, y, eps, a, b)
    # V = r s (T_A - T_B); other weights than (s, r) feel a shift of the origin, these do not.
    assert (V - r * s * (towards - away)).abs().max() < 1e-12
    t = torch.tensor([2.0, -7.0], dtype=F64)
    assert (field(x + t, y + t, a=a, b=b) - V).abs().max() < 1e-11
    p, q = torch.rand(2, 1, 1, generator=generator, dtype=F64) + 0.5
    change = p * r * (towards + t) - q * s * (away + t) - (p * r * towards - q * s * away)
    assert (change - (p * r - q * s) * t).abs().max() < 1e-12
    # The direction: means under the columns' normalisation alone; the mean does not depend on the rows'.
    K, H = kernel(x, y, eps), kernel(x, x, eps)
    crowd_y, crowd_x = a @ K, a @ H
    K, H = K * b / crowd_y.sqrt(), H * a / crowd_x.sqrt()
    direction = K @ y / K.sum(1, keepdim=True) - H @ x / H.sum(1, keepdim=True)
    assert (torch.nn.functional.cosine_similarity(V, direction) - 1).abs().max() < 1e-12
    # Masses.
    assert a @ r[:, 0] ** 2 <= 1 + 1e-14 and a @ s[:, 0] ** 2 <= 1 + 1e-14
    reach = torch.cdist(torch.cat([x, y]), torch.cat([x, y])).max()
    assert a @ V.norm(dim=1) <= reach
    # Mass one: regular polygons; there one shot is the converged field.
    turn = 2 * math.pi * torch.arange(5, dtype=F64) / 5
    u, w = (
        radius * torch.stack([(turn + phase).cos(), (turn + phase).sin()], 1) for radius, phase in ((1, 0), (1.5, 0.4))
    )
    even = torch.full((5,), 0.2, dtype=F64)
    assert abs(even @ pseudo_plan(u, w, eps, even, even) @ even - 1) < 1e-12
    assert (field(u, w) - nl.fields.Sinkhorn(eps, tol=1e-12)(u, w)).abs().max() < 1e-9
    assert a @ r[:, 0] < 0.999


# thm-proxy-population -------------------------------------------------------------------


@pytest.mark.parametrize(("seed", "eps", "d"), [(0, 0.2, 1), (1, 0.7, 2), (2, 3.0, 5)])
def test_thm_proxy_population(seed, eps, d):
    x, y, a, b, generator = problem(seed, d=d)
    z = torch.randn(9, d, generator=generator, dtype=F64).requires_grad_()
    # Exact for clouds, by automatic differentiation of the logarithms.
    p_mod, q_mod = b / (a @ kernel(x, y, eps)).sqrt(), a / (a @ kernel(x, x, eps)).sqrt()
    P, Q = kernel(z, y, eps) @ p_mod, kernel(z, x, eps) @ q_mod
    C = eps * P * Q / ((kernel(z, y, eps) @ b) * (kernel(z, x, eps) @ a)).sqrt()
    (psi,) = torch.autograd.grad((P.log() - Q.log()).sum(), z)
    V = nl.fields.SinkhornProxy(eps)(x, y, at=z.detach(), a=a, b=b)
    assert (V - C.detach()[:, None] * psi).abs().max() < 1e-12
    # At the particles as anywhere.
    assert torch.allclose(
        nl.fields.SinkhornProxy(eps)(x, y, at=x, a=a, b=b), nl.fields.SinkhornProxy(eps)(x, y, a=a, b=b), atol=1e-13
    )
    # Populations: Gaussians on the line, the discounted target of infinite mass among them.
    nodes, w = hermite(70)
    line = torch.linspace(-2, 2, 9, dtype=F64)[:, None]
    S = 0.3
    for goal in (0.2, 1.0, 4.0):
        form = gaussian_one_shot(line, S, goal, 0.3)
        V = nl.fields.SinkhornProxy(0.3)(S**0.5 * nodes, goal**0.5 * nodes, at=line, a=w, b=w)
        assert (V - form).abs().max() < 1e-3 * form.abs().max()
    # Samples converge to it.
    errors = [1.0, 0.0] if seed else []
    for n in () if seed else (30, 480):
        u, t = torch.randn(2, 10, n, 1, generator=generator, dtype=F64)
        V = nl.fields.SinkhornProxy(0.3)(S**0.5 * u, 2 * t, at=line[2:-2].expand(10, -1, 1))
        errors.append((V - form[2:-2]).square().mean().sqrt())
    assert errors[1] < 0.6 * errors[0]


def gaussian_one_shot(x, S, goal, eps):
    """The field from N(0, S) to N(0, goal) on the line, integrals done by hand."""
    A = S + eps
    t = [1 / v - 1 / (2 * A) for v in (goal, S)]
    size = [(A / eps) ** 0.25 * (v * (u + 1 / eps)) ** -0.5 for v, u in zip((goal, S), t, strict=True)]
    P, Q = (c * torch.exp(-(x**2) * u / (2 + 2 * eps * u)) for c, u in zip(size, t, strict=True))
    blurred = [(eps / (v + eps)) ** 0.5 * torch.exp(-(x**2) / (2 * (v + eps))) for v in (goal, S)]
    slope = t[1] / (1 + eps * t[1]) - t[0] / (1 + eps * t[0])
    return eps * P * Q / (blurred[0] * blurred[1]).sqrt() * slope * x


# thm-proxy-consistency ------------------------------------------------------------------


@pytest.mark.parametrize("eps", [0.1, 0.5, 2.0])
@pytest.mark.parametrize("seed", range(3))
def test_thm_proxy_consistency(seed, eps):
    x, y, a, b, generator = problem(seed)
    field = nl.fields.SinkhornProxy(eps)
    z = torch.randn(40, 2, generator=generator, dtype=F64)
    # p = q, as measures: shuffled, and with an atom split in two.
    order = torch.randperm(7, generator=generator)
    split, mass = torch.cat([x[order], x[:1]]), torch.cat([a[order], a[:1] / 3])
    mass[(order == 0).nonzero()[0, 0]] = 2 * a[0] / 3
    assert field(x, split, at=z, a=a, b=mass).abs().max() < 1e-13
    assert field(x, split, a=a, b=mass).abs().max() < 1e-13
    # Not equal: a weight changed, an atom moved; the field is not zero on open sets.
    other = a.clone()
    other[:2] = a[:2].flip(0) + torch.tensor([0.05, -0.05], dtype=F64)
    for V in (field(x, x, at=z, a=a, b=other), field(x, torch.cat([x[1:], x[:1] + 0.1]), at=z)):
        assert V.norm(dim=1).max() > 1e-4 and V.norm(dim=1).median() > 1e-10
    # But on the support alone it may be: one particle between two data.
    middle, pair = torch.zeros(1, 1, dtype=F64), torch.tensor([[-1.0], [1.0]], dtype=F64)
    assert field(middle, pair).abs().max() < 1e-14
    assert abs(float(field(middle, pair, at=middle + 0.2))) > 1e-6
    # Gaussians: the sign, for finite and infinite mass; the target's nodes are those of its own law.
    nodes, w = hermite(60)
    line = torch.linspace(0.2, 1.2, 5, dtype=F64)[:, None]
    S = 0.4
    for goal in (0.15, 0.3, 0.5, 1.0, 3.0):
        V = nl.fields.SinkhornProxy(eps)(S**0.5 * nodes, goal**0.5 * nodes, at=line, a=w, b=w)
        form = gaussian_one_shot(line, S, goal, eps)
        assert (torch.sign(form) == math.copysign(1, goal - S)).all()
        if eps >= 0.5:
            assert (torch.sign(V) == torch.sign(form)).all()
            assert (V - form).abs().max() < 1e-3 * form.abs().max()
        finite = goal < 2 * (S + eps)
        assert finite == (1 / goal - 1 / (2 * (S + eps)) > 0)


# thm-hub-suppression --------------------------------------------------------------------


@pytest.mark.parametrize("eps", [0.15, 0.8])
@pytest.mark.parametrize("seed", range(3))
def test_thm_hub_suppression(seed, eps):
    x, y, a, b, _ = problem(seed)
    K = kernel(x, y, eps)
    # Odds: one factor for all particles; the library's field has these weights.
    A = pseudo_plan(x, y, eps, a, b)
    shot, shift = A * b, K * b
    crowd = a @ K
    for j, k in ((0, 1), (2, 5)):
        factor = (crowd[k] / crowd[j]).sqrt()
        assert ((shot[:, j] / shot[:, k]) / (shift[:, j] / shift[:, k]) / factor - 1).abs().max() < 1e-11
    V = nl.fields.SinkhornProxy(eps)(x, y, a=a, b=b)
    r, s, _, away = halves(x, y, eps, a, b)
    weights = b * K / crowd.sqrt()
    assert (V / (r * s) + away - weights @ y / weights.sum(1, keepdim=True)).abs().max() < 1e-9
    # What a datum receives.
    N = a @ (K / (K @ b)[:, None])
    column = a @ A
    assert abs(b @ N - 1) < 1e-12
    assert (column <= N.sqrt() + 1e-13).all() and b @ column**2 <= 1 + 1e-13
    # A collapsed model: twice the temperature for each normalisation.
    z = x[:1]
    for times in (1, 2, 4):
        V = nl.fields.SinkhornProxy(eps, iterations=times)(z, y, b=b)
        warm = nl.fields.ScoreDifference((2**times * eps) ** 0.5)(z, y, b=b)
        assert abs(torch.nn.functional.cosine_similarity(V, warm) - 1).max() < 1e-12
        assert V.norm() <= warm.norm() + 1e-12
    near = kernel(z, y, eps)
    form = near.sqrt() @ (b[:, None] * (y - z)) / (near @ b).sqrt()
    assert (nl.fields.SinkhornProxy(eps)(z, y, b=b) - form).abs().max() < 1e-12
    final = nl.fields.SinkhornProxy(eps, iterations=60)(z, y, b=b)
    assert (final - (b @ y - z)).abs().max() < 1e-9
    assert (final - nl.fields.Sinkhorn(eps)(z, y, b=b)).abs().max() < 1e-9


# thm-drift-is-proxy ---------------------------------------------------------------------


@pytest.mark.parametrize(("n", "m"), [(7, 11), (12, 5), (8, 8)])
@pytest.mark.parametrize("eps", [0.05, 0.6])
def test_thm_drift_is_proxy(n, m, eps):
    x, y, a, b, generator = problem(n, n=n, m=m)
    z = torch.randn(6, 2, generator=generator, dtype=F64)
    V = nl.fields.SinkhornProxy(eps)
    settings = {"distance": "squared", "ignore_self": False}
    together = nl.fields.Drift((eps,), **settings)
    separate = nl.fields.Drift((eps,), normalisation="separate", **settings)
    for given in ({"a": a, "b": b}, {}):
        p, q = given.get("b", torch.full((m,), 1 / m, dtype=F64)), given.get("a", torch.full((n,), 1 / n, dtype=F64))
        for at in (None, z):
            spots = x if at is None else at
            kp, kq = kernel(spots, y, eps) @ p, kernel(spots, x, eps) @ q
            omega = m * (kp * kq).sqrt() / (m * kp + n * kq)
            sech = 0.5 * (m / n) ** 0.5 / torch.cosh(0.5 * torch.log(m * kp / (n * kq)))
            assert (omega - sech).abs().max() < 1e-12 and omega.max() <= 0.5 * (m / n) ** 0.5 + 1e-15
            proxy = V(x, y, at=at, **given)
            assert (together(x, y, at=at, **given) - omega[:, None] * proxy).abs().max() < 1e-12
            assert (separate(x, y, at=at, **given) - (m / n) ** 0.5 * proxy).abs().max() < 1e-12
    # Literally, with loops and equal weights: the algorithm as it is written down.
    logits = torch.cat([kernel(x, y, eps), kernel(x, x, eps)], 1)
    A = (logits / logits.sum(1, keepdim=True) * logits / logits.sum(0, keepdim=True)).sqrt()
    to_y, to_x = A[:, :m], A[:, m:]
    W = to_x.sum(1, keepdim=True) * (to_y @ y) - to_y.sum(1, keepdim=True) * (to_x @ x)
    assert (W - together(x, y)).abs().max() < 1e-12
    # With the mask, identical clouds are not at rest.
    assert together(x, x).abs().max() < 1e-13
    assert nl.fields.Drift((eps,), distance="squared")(x, x).abs().max() > 1e-3


# thm-symmetric-normalisation ------------------------------------------------------------


@pytest.mark.parametrize("eps", [0.5, 2.0])
@pytest.mark.parametrize("seed", range(2))
def test_thm_symmetric_normalisation(seed, eps):
    x, y, a, b, _ = problem(seed)
    both = torch.cat([x, y])
    centre = (both.max(0).values + both.min(0).values) / 2
    R = (both - centre).norm(dim=1).max()
    contraction = (1 + math.tanh(R**2 / eps)) / 2
    plans, potentials = {}, {}
    for name, z, c in (("cross", y, b), ("own", x, a)):
        plans[name] = nl.plan(x, z, eps, a, c, tol=1e-13) / torch.outer(a, c)
        potentials[name] = nl.potentials(x, z, eps, a, c, tol=1e-13)
    v = nl.fields.Sinkhorn(eps, tol=1e-13)(x, y, a=a, b=b)

    def osc(t):
        return float(t.max() - t.min())

    E, logs, errors, gaps, gaps_own, steps = [], [], [], [], [], 70
    state = {
        name: (torch.zeros(7, dtype=F64), torch.zeros(len(z), dtype=F64)) for name, z in (("cross", y), ("own", x))
    }
    for _ in range(steps):
        worst = 0.0
        for name, z, c in (("cross", y, b), ("own", x, a)):
            f, g = state[name]
            pot = potentials[name]
            worst = max(worst, osc(f - pot.f), osc(g - pot.g))
            log_A = (f[:, None] + g) / eps + kernel(x, z, eps).log()
            if name == "cross":
                logs.append((log_A - plans[name].log()).abs().max())
                d, e = (f - pot.f, g - pot.g)
                shift = (a @ d - b @ e) / 2
                gaps.append((a @ (d - shift) ** 2 + b @ (e + shift) ** 2).sqrt())
            else:
                gaps_own.append((log_A - plans[name].log()).abs().max())
            A = log_A.exp()
            state[name] = (f - eps / 2 * (A @ c).log(), g - eps / 2 * (a @ A).log())
        E.append(worst)
    # The library's field, its error, and the bound.
    last = max(j for j in range(steps) if gaps[j] > 1e-8)
    for j in (1, 2, 5, 20, last - 1, last):
        V = nl.fields.SinkhornProxy(eps, iterations=j)(x, y, a=a, b=b)
        r, s, towards, away = halves(x, y, eps, a, b, j)
        assert (V - r * s * (towards - away)).abs().max() < 1e-10
        errors.append((V - v).norm(dim=1).max())
        assert errors[-1] <= 2 * R * (math.exp(min(700, 2 * E[j - 1] / eps)) - 1) + R * E[j] / eps + 1e-9
    # Globally.
    assert E[0] <= 2 * R**2 + 1e-9
    for j in range(steps - 1):
        assert E[j + 1] <= contraction * E[j] + 1e-10
        assert logs[j + 1] <= E[j] / eps + 1e-9
    # In the end, and four times Sinkhorn's steps.
    root = torch.outer(a, b).sqrt()
    sigma = float(torch.linalg.svdvals(plans["cross"] * root)[1])
    assert float(gaps[last] / gaps[last - 1]) == pytest.approx((1 + sigma) / 2, abs=2e-3)
    assert float(errors[-1] / errors[-2]) == pytest.approx((1 + sigma) / 2, abs=5e-3)
    assert gaps_own[11] / gaps_own[10] < 0.51
    assert math.log(sigma**2) / math.log((1 + sigma) / 2) >= 4
    assert errors[-1] < 0.05 * errors[0]


# thm-far-mode ---------------------------------------------------------------------------


@pytest.mark.parametrize(("alpha", "beta"), [(0.7, 0.4), (0.3, 0.6), (0.5, 0.5), (0.9, 0.2)])
def test_thm_far_mode(alpha, beta):
    D = 2.0
    places = torch.tensor([[-1.0], [1.0]], dtype=F64)
    a, b = (torch.tensor([mass, 1 - mass], dtype=F64) for mass in (beta, alpha))
    theta = alpha * (1 - beta) / ((1 - alpha) * beta)

    def right(j, h):
        return float(nl.fields.SinkhornProxy(h**2, iterations=j)(places, places, a=a, b=b)[1])

    def predicted(j, kappa):
        pull = alpha / (1 - alpha) * ((1 - beta) / beta) ** 0.5 * theta ** ((j - 1) / 4)
        return -D * kappa * ((1 - alpha) / (1 - beta)) ** 0.5 * (pull - (beta / (1 - beta)) ** 0.5)

    for j in (1, 2, 3, 7):
        off = []
        for h in (0.5, 0.45, 0.42):
            kappa = math.exp(-(D**2) / (2 * h**2))
            off.append((right(j, h) - predicted(j, kappa)) / kappa**2)
        if alpha == beta:
            assert abs(right(j, 0.4)) < 1e-14
        else:
            assert off[2] == pytest.approx(off[1], rel=0.1, abs=0.01)  # the remainder is of second order, exactly
    kappa = math.exp(-(D**2) / (2 * 0.3**2))
    if alpha != beta:
        assert predicted(1, kappa) == pytest.approx(two_atom_velocity("proxy", alpha, beta, D, 0.3, order=1), rel=1e-12)
    if alpha > beta:
        awake = 1 + 4 * math.log(1 / kappa) / math.log(theta)
        limit = two_atom_velocity("sinkhorn", alpha, beta, D, 0.3)
        early, late = right(round(0.8 * awake), 0.3) / limit, right(round(1.2 * awake) + 4, 0.3) / limit
        assert early < 0.3 and late > 0.7
        assert right(int(4 * awake), 0.3) == pytest.approx(limit, rel=1e-6)
