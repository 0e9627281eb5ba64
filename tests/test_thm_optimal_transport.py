"""One test for each theorem of the chapter book/optimal_transport.md.

Stricter than the chapter's cells: several seeds, unequal weights, clouds
of different sizes, float64.  The oracles (cost, soft transform, primal and
dual values) are written out here, so that they share no code with the
library.
"""

import math

import ot
import pytest
import torch

import nsgf_lite as nl
from nsgf_lite.closed_forms import gaussian_map, gaussian_ot, two_atom_mass

F64 = torch.float64


def problem(seed, n=7, m=11, d=2, spread=1.0):
    """Two weighted clouds of different sizes; nothing uniform."""
    generator = torch.Generator().manual_seed(seed)
    x = spread * torch.randn(n, d, generator=generator, dtype=F64)
    y = spread * torch.randn(m, d, generator=generator, dtype=F64) + 0.5
    a = torch.rand(n, generator=generator, dtype=F64) + 0.2
    b = torch.rand(m, generator=generator, dtype=F64) + 0.2
    return x, y, a / a.sum(), b / b.sum(), generator


def cost(x, y):
    return 0.5 * ((x[:, None, :] - y[None, :, :]) ** 2).sum(-1)


def transform(g, b, c, eps):
    """The soft c-transform: -eps log sum_j b_j exp((g_j - c_ij)/eps)."""
    return -eps * torch.logsumexp((g - c) / eps + b.log(), dim=-1)


def primal(pi, c, a, b, eps):
    return ((pi * c).sum() + eps * torch.xlogy(pi, pi / (a[:, None] * b)).sum()).item()


def dual(f, g, c, a, b, eps):
    mass = (a[:, None] * b * torch.exp((f[:, None] + g - c) / eps)).sum()
    return (a @ f + b @ g - eps * (mass - 1)).item()


def oscillation(h):
    return (h.max() - h.min()).item()


def entropy(a):
    return -torch.xlogy(a, a).sum().item()


@pytest.mark.parametrize("eps", [0.3, 2.0])
@pytest.mark.parametrize("seed", range(3))
def test_thm_entropic_duality(seed, eps):
    x, y, a, b, generator = problem(seed)
    c = cost(x, y)
    f, g = nl.potentials(x, y, eps, a, b, tol=1e-11)
    pi = nl.plan(x, y, eps, a, b, tol=1e-11)
    value = nl.entropic_cost(x, y, eps, a, b, tol=1e-11).item()

    # strong duality, and the form of the optimal plan
    assert abs(primal(pi, c, a, b, eps) - value) < 1e-8
    assert abs(dual(f, g, c, a, b, eps) - value) < 1e-8
    density = torch.exp((f[:, None] + g - c) / eps)
    assert (pi - a[:, None] * b * density).abs().max() < 1e-9
    assert (pi.sum(1) - a).abs().sum() < 1e-9
    assert (pi.sum(0) - b).abs().sum() < 1e-9

    # an independent solver finds the same plan
    other = ot.bregman.sinkhorn_log(a, b, c, eps, numItermax=20000, stopThr=1e-11)
    assert (pi - other).abs().max() < 1e-8

    # every other coupling costs more, every other pair is worth less, and
    # the gap is the integral of the defect in Young's inequality
    best = primal(pi, c, a, b, eps)
    for _ in range(5):
        i, k = torch.randperm(len(a), generator=generator)[:2]
        j, ell = torch.randperm(len(b), generator=generator)[:2]
        shift = torch.zeros_like(pi)
        amount = 0.7 * torch.minimum(pi[i, j], pi[k, ell])
        shift[i, j] = shift[k, ell] = -amount
        shift[i, ell] = shift[k, j] = amount
        costlier = primal(pi + shift, c, a, b, eps)
        assert costlier > best + 1e-8

        f1 = f + 0.2 * torch.randn(len(f), generator=generator, dtype=F64)
        g1 = g + 0.2 * torch.randn(len(g), generator=generator, dtype=F64)
        poorer = dual(f1, g1, c, a, b, eps)
        assert poorer < value - 1e-8

        r = (pi + shift) / (a[:, None] * b)
        phi = (f1[:, None] + g1 - c) / eps
        defect = torch.xlogy(r, r) - r - r * phi + phi.exp()
        gap = eps * (a[:, None] * b * defect).sum().item()
        assert defect.min() > -1e-12
        assert abs(costlier - poorer - gap) < 1e-9


@pytest.mark.parametrize("eps", [0.25, 1.5])
@pytest.mark.parametrize("seed", range(3))
def test_thm_sinkhorn_equations(seed, eps):
    x, y, a, b, generator = problem(seed)
    c = cost(x, y)
    f, g = nl.potentials(x, y, eps, a, b, tol=1e-11)
    assert (f - transform(g, b, c, eps)).abs().max() < 1e-8
    assert (g - transform(f, a, c.T, eps)).abs().max() < 1e-8

    # the exponential term has mass one, so the value is <mu,f> + <nu,g>
    value = nl.entropic_cost(x, y, eps, a, b, tol=1e-11).item()
    assert abs((a @ f + b @ g).item() - value) < 1e-8

    # uniqueness up to a constant: solve from elsewhere
    start = torch.randn(len(a), generator=generator, dtype=F64)
    f1, g1 = start, None
    for _ in range(3000):
        g1 = transform(f1, a, c.T, eps)
        f1 = transform(g1, b, c, eps)
    assert oscillation(f1 - f) < 1e-8
    assert oscillation(g1 - g) < 1e-8
    assert abs((f1 - f).mean() + (g1 - g).mean()) < 1e-8

    # the extension obeys the equation at points far from the cloud too
    T = nl.barycentric_map(x, y, eps, a, b, tol=1e-11)
    points = 3 * torch.randn(9, 2, generator=generator, dtype=F64)
    extended = T.potential(points)
    g2 = T.solution.g
    assert (extended - transform(g2, b, cost(points, y), eps)).abs().max() < 1e-9
    assert (T.potential(x) - T.solution.f).abs().max() < 1e-8

    # one half step raises the dual by eps <mu, e^s - 1 - s>
    f0, g0 = f + 0.3 * start, g
    better = transform(g0, b, c, eps)
    s = (f0 - better) / eps
    rise = eps * (a @ (s.exp() - 1 - s)).item()
    gain = dual(better, g0, c, a, b, eps) - dual(f0, g0, c, a, b, eps)
    assert rise > 0 and abs(gain - rise) < 1e-9


@pytest.mark.parametrize("eps", [0.3, 1.0])
@pytest.mark.parametrize("d", [1, 2, 3])
def test_thm_potential_gradient(d, eps):
    x, y, a, b, generator = problem(10 + d, n=6, m=9, d=d)
    T = nl.barycentric_map(x, y, eps, a, b, tol=1e-11)
    g = T.solution.g
    points = torch.cat([x, 2 * torch.randn(4, d, generator=generator, dtype=F64)])

    def at(step):
        return T.potential(points + step), T(points + step)

    h = 1e-4
    gradient = torch.empty_like(points)
    jacobian = torch.empty(len(points), d, d, dtype=F64)
    for k in range(d):
        step = h * torch.eye(d, dtype=F64)[k]
        (f_up, t_up), (f_down, t_down) = at(step), at(-step)
        gradient[:, k] = (f_up - f_down) / (2 * h)
        jacobian[:, :, k] = (t_up - t_down) / (2 * h)

    assert (gradient - (points - T(points))).abs().max() < 1e-6
    weight = torch.softmax((g - cost(points, y)) / eps + b.log(), dim=1)
    mean = weight @ y
    assert (T(points) - mean).abs().max() < 1e-9
    offset = y[None] - mean[:, None]
    covariance = torch.einsum("pj,pjk,pjl->pkl", weight, offset, offset)
    assert (jacobian - covariance / eps).abs().max() < 1e-5
    assert (jacobian - jacobian.mT).abs().max() < 1e-5
    eigenvalues = torch.linalg.eigvalsh((jacobian + jacobian.mT) / 2)
    centre = (y.max(0).values + y.min(0).values) / 2
    radius = (y - centre).norm(dim=1).max().item()
    assert eigenvalues.min() > -1e-6
    assert eigenvalues.max() <= radius**2 / eps + 1e-6


def test_potential_gradient_bound_is_reached():
    """Two opposite pairs: T(x) = tanh(<x,y>/eps) y, with slope R^2/eps at 0."""
    y = torch.tensor([[0.6, 0.8], [-0.6, -0.8]], dtype=F64)
    x = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=F64)
    for eps in (0.2, 1.0):
        T = nl.barycentric_map(x, y, eps, tol=1e-12)
        points = torch.tensor([[0.3, 0.1], [-0.4, 0.7]], dtype=F64)
        exact = torch.tanh(points @ y[0] / eps)[:, None] * y[0]
        assert (T(points) - exact).abs().max() < 1e-9
        step = 1e-5 * y[:1]
        slope = ((T(step) - T(-step)) / 2e-5 @ y[0]).item()
        assert abs(slope - 1 / eps) < 1e-6


def ball(n, d, radius, generator):
    direction = torch.randn(n, d, generator=generator, dtype=F64)
    length = torch.rand(n, 1, generator=generator, dtype=F64) ** (1 / d)
    return radius * length * direction / direction.norm(dim=1, keepdim=True)


@pytest.mark.parametrize("eps", [0.7, 1.5, 4.0])
@pytest.mark.parametrize("seed", range(3))
def test_thm_birkhoff(seed, eps):
    generator = torch.Generator().manual_seed(seed)
    radius, n, m = 1.0, 9, 13
    x = ball(n, 2, radius, generator)
    y = ball(m, 2, radius, generator) + torch.tensor([5.0, -2.0], dtype=F64)
    a = torch.rand(n, generator=generator, dtype=F64) + 0.1
    b = torch.rand(m, generator=generator, dtype=F64) + 0.1
    a, b = a / a.sum(), b / b.sum()
    c, kappa = cost(x, y), math.tanh(radius**2 / eps)

    # (a) one transform contracts, whatever the two functions are
    for size in (1e-3, 1.0, 30.0):
        f0 = size * torch.randn(n, generator=generator, dtype=F64)
        f1 = size * torch.randn(n, generator=generator, dtype=F64)
        change = transform(f1, a, c.T, eps) - transform(f0, a, c.T, eps)
        assert oscillation(change) <= kappa * oscillation(f1 - f0) + 1e-12

    # (b) the iteration runs to the library's potentials at that rate
    f, g = nl.potentials(x, y, eps, a, b, tol=1e-13)
    fk = torch.randn(n, generator=generator, dtype=F64)
    start, errors = oscillation(fk - f), []
    for k in range(1, 60):
        gk = transform(fk, a, c.T, eps)
        before, fk = fk, transform(gk, b, c, eps)
        errors.append(oscillation(fk - f))
        assert errors[-1] <= kappa ** (2 * k) * start + 2e-10
        assert oscillation(gk - g) <= kappa ** (2 * k - 1) * start + 2e-10
        # (c) the marginal error is bounded by the change of the potential
        row = (b * torch.exp((before[:, None] + gk - c) / eps)).sum(1)
        bound = math.expm1(oscillation(before - fk) / eps)
        assert (a @ (row - 1).abs()).item() <= bound + 1e-12
    assert errors[-1] < 2e-10

    # the local rate is the second singular value of the plan, squared
    pi = nl.plan(x, y, eps, a, b, tol=1e-12)
    sigma = torch.linalg.svdvals(pi / (a[:, None] * b).sqrt())
    assert abs(sigma[0] - 1) < 1e-9 and sigma[1] <= kappa
    late = [e for e in errors if e > 1e-9]
    if len(late) > 3:
        assert abs(late[-1] / late[-2] - sigma[1] ** 2) < 0.15 * sigma[1] ** 2


@pytest.mark.parametrize("eps", [0.4, 1.0, 3.0])
def test_birkhoff_is_sharp(eps):
    """Two atoms at distance 2R: the constant tanh(R^2/eps) is reached."""
    x = torch.tensor([[-1.0], [1.0]], dtype=F64)
    half, c = torch.full((2,), 0.5, dtype=F64), cost(x, x)
    h = 1e-5 * torch.tensor([1.0, -1.0], dtype=F64)
    change = transform(h, half, c, eps) - transform(-h, half, c, eps)
    ratio = oscillation(change) / oscillation(2 * h)
    assert abs(ratio - math.tanh(1 / eps)) < 1e-8
    # and the second singular value of the library's plan is the same number
    pi = nl.plan(x, x.clone(), eps, tol=1e-12)
    assert abs(torch.linalg.svdvals(2 * pi)[1].item() - math.tanh(1 / eps)) < 1e-9


@pytest.mark.parametrize("alpha", [0.1, 0.5, 0.7])
@pytest.mark.parametrize("beta", [0.2, 0.4, 0.7])
def test_thm_two_atoms(alpha, beta):
    for distance, eps in ((2.0, 0.5), (1.0, 2.0), (3.0, 0.9)):
        ends = torch.tensor([[-distance / 2], [distance / 2]], dtype=F64)
        have = torch.tensor([beta, 1 - beta], dtype=F64)
        need = torch.tensor([alpha, 1 - alpha], dtype=F64)
        pi = nl.plan(ends, ends.clone(), eps, have, need, tol=1e-13)
        t = two_atom_mass(alpha, beta, distance, eps)
        t = float(t)
        assert max(0.0, alpha - beta) < t < min(alpha, 1 - beta)
        assert abs(pi[1, 0].item() - t) < 1e-10
        kappa2 = math.exp(-(distance**2) / eps)
        residual = (
            (1 - kappa2) * t**2 + ((beta - alpha) + kappa2 * (alpha + 1 - beta)) * t - kappa2 * alpha * (1 - beta)
        )
        assert abs(residual) < 1e-14
        T = nl.barycentric_map(ends, ends.clone(), eps, have, need, tol=1e-13)
        right = T(ends[1:]).item()
        assert abs(right - (distance / 2 - distance * t / (1 - beta))) < 1e-9


def gaussian_grid(mean, covariance, points, width):
    """Nodes and weights of the trapezoidal rule, spectrally accurate here."""
    d = len(mean)
    axes = [
        m + torch.linspace(-width, width, points, dtype=F64) * v.sqrt()
        for m, v in zip(mean, covariance.diagonal(), strict=True)
    ]
    nodes = torch.cartesian_prod(*axes).reshape(-1, d)
    z = nodes - mean
    log_density = -0.5 * (z @ torch.linalg.inv(covariance) * z).sum(1)
    weights = torch.softmax(log_density, 0)
    keep = weights > 1e-13
    weights = weights[keep]
    return nodes[keep], weights / weights.sum()


def matrix(rows):
    return torch.tensor(rows, dtype=F64)


@pytest.mark.parametrize("eps", [0.5, 2.0])
@pytest.mark.parametrize(
    ("a", "A", "b", "B"),
    [
        ([0.3], [[1.0]], [-0.5], [[0.25]]),
        ([0.0], [[0.5]], [2.0], [[2.0]]),
    ],
)
def test_thm_gaussian_plan(a, A, b, B, eps):
    a, A, b, B = matrix(a), matrix(A), matrix(b), matrix(B)
    x, wx = gaussian_grid(a, A, 161, 8.0)
    y, wy = gaussian_grid(b, B, 151, 8.0)
    value = nl.entropic_cost(x, y, eps, wx, wy, tol=1e-10).item()
    assert abs(value - float(gaussian_ot(a, A, b, B, eps))) < 1e-7
    M = gaussian_map(A, B, eps)
    assert abs(M.item() - (math.sqrt(4 * A * B + eps**2) - eps) / (2 * A.item())) < 1e-12
    T = nl.barycentric_map(x, y, eps, wx, wy, tol=1e-10)
    points = a + torch.linspace(-2, 2, 9, dtype=F64)[:, None]
    assert (T(points) - (b + (points - a) @ M)).abs().max() < 1e-6


def test_gaussian_plan_plane():
    """Covariances that do not commute: the slope is M, not C A^{-1}."""
    a, b, eps = matrix([0.2, -0.1]), matrix([-0.4, 0.6]), 1.0
    A, B = matrix([[1.0, 0.6], [0.6, 0.8]]), matrix([[0.6, -0.3], [-0.3, 1.2]])
    x, wx = gaussian_grid(a, A, 25, 5.0)
    y, wy = gaussian_grid(b, B, 23, 5.0)
    T = nl.barycentric_map(x, y, eps, wx, wy, tol=1e-8)
    M = gaussian_map(A, B, eps)
    points = a + matrix([[1.0, 0.0], [0.0, 1.0], [-0.7, 0.9], [0.0, 0.0]])
    assert (T(points) - (b + (points - a) @ M)).abs().max() < 1e-4
    trap = A @ M @ torch.linalg.inv(A)  # C A^{-1}, with C = A M
    assert (T(points) - (b + (points - a) @ trap.T)).abs().max() > 1e-2
    value = (wx @ T.solution.f + wy @ T.solution.g).item()
    assert abs(value - float(gaussian_ot(a, A, b, B, eps))) < 1e-4


@pytest.mark.parametrize("eps", [0.05, 1.0, 10.0])
@pytest.mark.parametrize("d", [1, 2, 3, 5])
def test_gaussian_plan_algebra(d, eps):
    generator = torch.Generator().manual_seed(d)
    root = torch.randn(2, d, d, generator=generator, dtype=F64)
    A, B = root @ root.mT + 0.3 * torch.eye(d, dtype=F64)
    M = gaussian_map(A, B, eps)
    assert (M - M.T).abs().max() < 1e-10
    assert (eps * M + M @ A @ M - B).abs().max() < 1e-8 * B.abs().max()
    assert torch.linalg.eigvalsh(M).min() > 0
    # the value from its pieces: transport cost plus mutual information
    zero = torch.zeros(d, dtype=F64)
    transport = 0.5 * (A.trace() + B.trace()) - (A @ M).trace()
    information = 0.5 * (torch.logdet(B) - torch.logdet(eps * M))
    value = float(gaussian_ot(zero, A, zero, B, eps))
    assert abs(value - (transport + eps * information).item()) < 1e-8 * max(1, abs(value))
    # a shift of the means adds half its square
    shift = torch.randn(d, generator=generator, dtype=F64)
    moved = float(gaussian_ot(shift, A, zero, B, eps))
    assert abs(moved - value - 0.5 * (shift @ shift).item()) < 1e-8 * max(1, abs(value))
    # the trap differs from the map as soon as covariances do not commute
    if d > 1:
        assert (A @ M @ torch.linalg.inv(A) - M).abs().max() > 1e-3


@pytest.mark.parametrize("seed", range(4))
def test_thm_entropic_gap(seed):
    x, y, a, b, _ = problem(seed, n=6, m=9)
    c = cost(x, y)
    sharp = ot.emd2(a.numpy(), b.numpy(), c.numpy())
    room = min(entropy(a), entropy(b))
    assert room <= math.log(6)
    last = sharp
    for eps in (0.1, 0.3, 1.0, 5.0, 50.0):
        value = nl.entropic_cost(x, y, eps, a, b, tol=1e-9).item()
        pi = nl.plan(x, y, eps, a, b, tol=1e-9)
        assert last - 1e-8 <= value <= sharp + eps * room + 1e-8
        assert sharp - 1e-8 <= (pi * c).sum().item() <= sharp + eps * room + 1e-8
        last = value
    # from above: no coupling is cheaper for large eps than the product
    assert last <= (a @ c @ b).item() + 1e-8


def test_entropic_gap_is_reached():
    """n distant pairs: the gap is eps log n up to an exponentially small term."""
    n, eps = 8, 0.05
    x = 2 * torch.arange(n, dtype=F64)[:, None]
    y = x + 0.3
    value = nl.entropic_cost(x, y, eps, tol=1e-10).item()
    assert abs(value - (0.5 * 0.3**2 + eps * math.log(n))) < 1e-8


@pytest.mark.parametrize("eps", [0.02, 0.1, 0.5, 2.0])
@pytest.mark.parametrize("seed", range(2))
def test_thm_self_averaging(seed, eps):
    generator = torch.Generator().manual_seed(100 + seed)
    n = 24
    x = torch.rand(n, 1 + seed, generator=generator, dtype=F64)
    a = torch.rand(n, generator=generator, dtype=F64) + 0.2
    a, c = a / a.sum(), cost(x, x)
    solved = nl.potentials(x, x, eps, a, a, tol=1e-11)
    f = solved.f
    assert (solved.f - solved.g).abs().max() < 1e-10
    assert (f - transform(f, a, c, eps)).abs().max() < 1e-9
    # some forty halvings of the error at most, however small eps
    assert solved.converged and solved.iterations <= 80

    # P is self-adjoint in L2(mu), between 0 and the identity
    pi = nl.plan(x, x, eps, a, a, tol=1e-11)
    assert (pi - pi.T).abs().max() < 1e-11
    assert (pi.sum(1) - a).abs().max() < 1e-10
    root = a.sqrt()
    eigenvalues = torch.linalg.eigvalsh(pi / (root[:, None] * root))
    assert eigenvalues.min() > -1e-10 and abs(eigenvalues.max() - 1) < 1e-9
    second = eigenvalues[-2].item()

    # its second eigenvalue tends to one: the bound of the theorem
    variance = torch.linalg.eigvalsh(torch.cov(x.T, correction=0, aweights=a).reshape(x.shape[1], -1))
    assert 1 - second <= eps * entropy(a) / variance.max().item() + 1e-10

    # the averaged iteration halves the error, the alternating one does not
    h = torch.randn(n, generator=generator, dtype=F64)
    averaged = f + 1e-3 * h
    norms = []
    for _ in range(25):
        averaged = 0.5 * (averaged + transform(averaged, a, c, eps))
        norms.append((a @ (averaged - f) ** 2).sqrt().item())
    ratios = [v / u for u, v in zip(norms, norms[1:], strict=False) if v > 1e-9]
    assert all(ratio <= 0.5 + 2e-3 for ratio in ratios)

    alternating, sizes = f + 1e-3 * h, []
    for _ in range(40):
        alternating = transform(transform(alternating, a, c, eps), a, c, eps)
        sizes.append(oscillation(alternating - f))
    late = [v / u for u, v in zip(sizes, sizes[1:], strict=False) if v > 1e-9]
    assert len(late) < 3 or late[-1] < 1.1 * second**2
    if eps <= 0.02:
        assert late[-1] > 0.6


@pytest.mark.parametrize("eps", [0.003, 0.03, 0.3])
def test_self_averaging_counts(eps):
    """The self problem takes about as many steps as halvings, at every temperature."""
    x, _, a, _, _ = problem(5, n=40)
    own = nl.potentials(x, x, eps, a, a, tol=1e-10)
    assert own.converged and own.iterations <= 50
    assert oscillation(own.f - transform(own.f, a, cost(x, x), eps)) < 1e-9
