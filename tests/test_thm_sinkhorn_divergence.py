"""One test for each theorem of the chapter book/sinkhorn_divergence.md.

Stricter than the chapter's cells: several seeds, unequal weights, clouds
of different sizes, float64.  A plain log-domain Sinkhorn iteration is
written out here as an oracle that shares no code with the library.
"""

import math

import ot
import pytest
import torch
from conftest import damaged, sharp

import nsgf_lite as nl
from nsgf_lite.closed_forms import gaussian_divergence, gaussian_map, gaussian_ot

F64 = torch.float64


def random(seed):
    return torch.Generator().manual_seed(seed)


def weights(n, generator):
    w = 0.2 + torch.rand(n, generator=generator, dtype=F64)
    return w / w.sum()


def problem(seed, n=7, m=11, d=2):
    """Two weighted clouds of different sizes; nothing uniform."""
    generator = random(seed)
    x = torch.randn(n, d, generator=generator, dtype=F64)
    y = 0.7 * torch.randn(m, d, generator=generator, dtype=F64) + 0.4
    return x, weights(n, generator), y, weights(m, generator)


def cost(x, y):
    return 0.5 * ((x[:, None, :] - y[None, :, :]) ** 2).sum(-1)


def plain_cost(x, y, eps, a, b, sweeps=3000):
    """OT_eps by alternating log-domain updates, nothing else."""
    c, g = cost(x, y), torch.zeros(len(y), dtype=F64)
    for _ in range(sweeps):
        f = -eps * torch.logsumexp((g - c) / eps + b.log(), 1)
        new = -eps * torch.logsumexp((f[:, None] - c) / eps + a.log()[:, None], 0)
        done = (new - g).abs().max() < 1e-13
        g = new
        if done:
            break
    return (a @ f + b @ g).item()


def plain_divergence(x, y, eps, a, b):
    own = plain_cost(x, x, eps, a, a) + plain_cost(y, y, eps, b, b)
    return plain_cost(x, y, eps, a, b) - own / 2


def primal(x, y, eps, a, b):
    """<plan, c> + eps KL of the library's plan: no dual value in it."""
    pi = nl.plan(x, y, eps, a, b, tol=1e-12)
    return ((pi * cost(x, y)).sum() + eps * torch.xlogy(pi, pi / (a[:, None] * b)).sum()).item()


def dirac(*place):
    return torch.tensor([place], dtype=F64), torch.ones(1, dtype=F64)


def divergence(x, y, eps, a=None, b=None):
    return nl.sinkhorn_divergence(x, y, eps, a, b, tol=1e-12).item()


def entropic(x, y, eps, a=None, b=None):
    return nl.entropic_cost(x, y, eps, a, b, tol=1e-12).item()


def tilted(x, a, eps):
    """The measure U = exp(f_aa / eps) a of the positivity theorem."""
    return a * (nl.potentials(x, x, eps, a, a, tol=1e-12).f / eps).exp()


def inner(x, u, y, v, eps):
    return (u @ torch.exp(-cost(x, y) / eps) @ v).item()


def entropy(a):
    return -torch.xlogy(a, a).sum().item()


def on_grid(mean, covariance, n):
    """A Gaussian as weighted points, six deviations to each side."""
    mean = torch.as_tensor(mean, dtype=F64)
    line = torch.linspace(-6, 6, n, dtype=F64)
    z = torch.cartesian_prod(*[line] * len(mean)).reshape(-1, len(mean))
    w = torch.exp(-z.square().sum(1) / 2)
    root = torch.linalg.cholesky(torch.as_tensor(covariance, dtype=F64))
    return z @ root.T + mean, w / w.sum()


@pytest.mark.parametrize("seed", range(2))
def test_thm_entropic_bias(seed):
    """Rivals beat neither the measure before the blur nor, at high temperature, the point; KL by sums on a grid.

    Checked by: quadrature, primal value, closed form.
    """
    generator = random(seed)

    # 1. A blurred measure is best reached from the measure before the blur.
    eps = 0.4
    atoms, heights = torch.tensor([[-1.5], [0.2], [1.0]], dtype=F64), weights(3, generator)
    line = torch.linspace(-7, 7, 141, dtype=F64)[:, None]

    def blurred(points, w):
        return torch.exp(-cost(points, line) / eps).T @ w

    nu = blurred(atoms, heights)
    nu = nu / nu.sum()
    least = entropic(atoms, line, eps, heights, nu)
    assert abs(least + eps * (nu @ blurred(atoms, heights).log()).item()) < 1e-8
    assert abs(primal(atoms, line, eps, heights, nu) - least) < 1e-9
    f = nl.potentials(atoms, line, eps, heights, nu, tol=1e-12).f
    assert f.max() - f.min() < 1e-6  # f = 0 up to a constant
    for _ in range(3):
        rival = torch.randn(5, 1, generator=generator, dtype=F64)
        w = weights(5, generator)
        kl = (nu @ (blurred(atoms, heights) / blurred(rival, w)).log()).item()
        assert kl > 1e-3
        assert entropic(rival, line, eps, w, nu) - least > eps * kl - 1e-9
    point, one = dirac(0.3)  # a point mass: equality
    kl = (nu @ (blurred(atoms, heights) / blurred(point, one)).log()).item()
    sharp(eps * kl, primal(point, line, eps, one, nu) - least, at_least=1 - 1e-6)
    damaged("twice the KL", primal(point, line, eps, one, nu) - least >= 2 * eps * kl)
    assert entropic(line, line, eps, nu, nu) > least + 0.01  # not even itself

    # 2. Above the squared radius one point wins, below the spread it loses.
    y = torch.randn(9, 2, generator=generator, dtype=F64)
    b = weights(9, generator)
    m = (b @ y)[None]
    radius2 = (y - m).square().sum(1).max().item()
    half_trace = (b @ cost(y, m)).item()
    assert abs(entropic(m, y, radius2, None, b) - half_trace) < 1e-10
    places = m + 2 * torch.randn(200, 2, generator=generator, dtype=F64)

    def certificate(eps, places):
        f = nl.barycentric_map(m, y, eps, None, b, tol=1e-12).potential
        return f(places) - f(m)

    expected = 0.5 * (places - m).square().sum(1) - radius2 * torch.logsumexp(
        (places - m) @ (y - m).T / radius2 + b.log(), 1
    )
    assert (certificate(radius2, places) - expected).abs().max() < 1e-9
    assert certificate(radius2, places).min() > 0
    for _ in range(3):
        rival = m + torch.randn(4, 2, generator=generator, dtype=F64)
        assert entropic(rival, y, radius2, weights(4, generator), b) > half_trace

    covariance = (b[:, None] * (y - m)).T @ (y - m)
    values, vectors = torch.linalg.eigh(covariance)
    cold = 0.5 * values[1].item()
    better = m + torch.stack([-vectors[:, 1], vectors[:, 1]]) * values[1].sqrt() / 2
    assert certificate(cold, better).max() < 0
    assert entropic(better, y, cold, None, b) < half_trace - 1e-3

    # the squared radius is sharp: two points at +-R, where the certificate is R^2/eps u^2/2 - log cosh u
    ends = torch.tensor([[-1.5], [1.5]], dtype=F64)
    zero, one = dirac(0.0)
    near = torch.linspace(-0.2, 0.2, 9, dtype=F64)[:, None]
    f = nl.barycentric_map(zero, ends, 1.5**2, tol=1e-12).potential(near)
    assert (f - f[4]).min() >= 0
    for share in (0.99, 0.5):
        f = nl.barycentric_map(zero, ends, share * 1.5**2, tol=1e-12).potential(near)
        damaged(f"a point is best from {share} R^2 on", (f - f[4]).min() >= 0)

    # 3. Gaussians: variance b - eps, where the map's slope is one.
    for target, eps in ((1.0, 0.3), (2.5, 1.9), (0.2, 0.05)):
        best = target - eps
        assert abs(gaussian_map(best, target, eps).item() - 1) < 1e-12
        least = gaussian_ot(0.0, best, 0.0, target, eps).item()
        assert abs(least - eps / 2 * (1 + math.log(target / eps))) < 1e-12
        for factor in (0.9, 0.99, 1.01, 1.1):
            assert gaussian_ot(0.0, best * factor, 0.0, target, eps).item() > least
    for eps in (1.0, 1.2):  # eps >= b, with equality or not: the smaller the better
        for variance in (0.01, 0.1, 1.0):
            assert gaussian_ot(0.0, variance, 0.0, 1.0, eps).item() > 0.5
    damaged(
        "the data's own variance is best", gaussian_ot(0.0, 1.0, 0.0, 1.0, 0.3) <= gaussian_ot(0.0, 0.7, 0.0, 1.0, 0.3)
    )


@pytest.mark.parametrize("eps", [0.3, 3.0])
@pytest.mark.parametrize("seed", range(3))
def test_thm_positivity(seed, eps):
    """The divergence from the plans' costs and from a plain iteration, the bound from its definition.

    Checked by: primal value, definition.
    """
    x, a, y, b = problem(seed)
    S = divergence(x, y, eps, a, b)
    assert abs(S - plain_divergence(x, y, eps, a, b)) < 1e-8
    assert abs(S - divergence(y, x, eps, b, a)) < 1e-9
    own = primal(x, x, eps, a, a) + primal(y, y, eps, b, b)
    assert abs(S - (primal(x, y, eps, a, b) - own / 2)) < 1e-10

    # the quantitative bound, from below by a norm of the tilted measures
    u, v = tilted(x, a, eps), tilted(y, b, eps)
    assert abs(inner(x, u, x, u, eps) - 1) < 1e-9
    assert abs(inner(y, v, y, v, eps) - 1) < 1e-9
    bound = eps * (1 - inner(x, u, y, v, eps))
    assert bound > 1e-3
    assert S > bound

    # the measure can be read off its tilt
    assert (torch.exp(-cost(x, x) / eps) @ u * u - a).abs().max() < 1e-9

    # zero at equality, positive nearby, in positions and in weights
    assert abs(divergence(x, x.clone(), eps, a, a.clone())) < 1e-9
    moved = x + 0.05 * torch.randn(x.shape, generator=random(seed + 50), dtype=F64)
    assert divergence(x, moved, eps, a, a) > 1e-6
    assert divergence(x, x, eps, a, weights(len(a), random(seed + 60))) > 1e-6

    # without the self terms, or without their half, it is no such thing
    own = entropic(x, x, eps, a, a)
    assert own > 1e-2
    damaged("no half", entropic(x, moved, eps, a, a) - own - entropic(moved, moved, eps, a, a) >= 0)
    damaged("no self terms: zero at equality", own < 1e-3)

    # two near points: the constant is the best
    (p, one), (q, _) = dirac(0.0, 0.0), dirac(0.3 * eps**0.5, 0.0)
    S, bound = divergence(p, q, eps), eps * (1 - inner(p, one, q, one, eps))
    assert abs(S - 0.045 * eps) < 1e-12
    sharp(bound, S, at_least=0.95)
    damaged("eps for eps / 2", 2 * bound <= S)

    # a kernel that is not positive definite, |x-y|^4: the plans of two and of one point, costs 16 apart
    far = torch.tensor([[-(8.0**0.5)], [8.0**0.5]], dtype=F64)
    half = torch.full((2,), 0.5, dtype=F64)
    damaged("positive for every cost", 1 - primal(far, far, 1000 * eps, half, half) / 2 >= 0)


def sag(function, start, end, t):
    """How far a function lies below its chord."""
    return (1 - t) * function(start) + t * function(end) - function((1 - t) * start + t * end)


@pytest.mark.parametrize("seed", range(2))
def test_thm_convexity(seed):
    """Chords of the divergence against its values, and against the norm of the tilted measures.

    Checked by: definition, brute force.
    """
    x, a, y, b = problem(seed)
    generator = random(seed + 10)
    for eps in (0.3, 3.0):
        start, end = a, weights(len(a), generator)
        u = tilted(x, start, eps) - tilted(x, end, eps)
        for t in (0.5, 0.9):
            margin = eps / 2 * t * (1 - t) * inner(x, u, x, u, eps)
            assert margin > 1e-6
            first = sag(lambda w, eps=eps: divergence(x, y, eps, w, b), start, end, t)
            second = sag(lambda w, eps=eps: divergence(y, x, eps, b, w), start, end, t)
            assert first > margin - 1e-10
            assert abs(first - second) < 1e-9
            # the self term alone has at least that much
            own = sag(lambda w, eps=eps: -entropic(x, x, eps, w, w) / 2, start, end, t)
            assert own > margin - 1e-10
            assert first > own - 1e-10

        # the variational form of the self term, at any admissible U
        def variational(w, u, eps=eps):
            return eps * (w @ (w / u).log()).item() + eps / 2 * (inner(x, u, x, u, eps) - 1)

        least = -entropic(x, x, eps, a, a) / 2
        assert abs(variational(a, tilted(x, a, eps)) - least) < 1e-9
        assert variational(a, tilted(x, a, eps) * (1 + 0.1 * a)) > least + 1e-7

    # the wrong sign of the self term: concave at high temperature
    def flipped(w):
        return entropic(x, y, 50.0, w, b) + entropic(x, x, 50.0, w, w) / 2

    damaged("convex with the self term's sign turned", sag(flipped, a, weights(len(a), generator), 0.5) >= 0)

    # two near points against any measure: the constant is the best
    eps = 2.0
    pair, start, end = torch.tensor([[0.0], [0.3]], dtype=F64), *torch.eye(2, dtype=F64)
    goal, one = dirac(1.0)  # its mixed cost is affine
    u = tilted(pair, start, eps) - tilted(pair, end, eps)
    dip = sag(lambda w: divergence(pair, goal, eps, w, one), start, end, 0.25)
    sharp(eps / 2 * 0.25 * 0.75 * inner(pair, u, pair, u, eps), dip, at_least=0.9)
    damaged("eps for eps / 2", eps * 0.25 * 0.75 * inner(pair, u, pair, u, eps) <= dip)

    # not along positions, not in the pair
    goal = torch.tensor([[0.0, 1.0], [0.0, -1.0]], dtype=F64)
    ends, middle = (torch.tensor([[1.0, s], [-1.0, -s]], dtype=F64) for s in (0.5, 0.0))
    damaged("convex along motions", divergence(middle, goal, 0.2) <= divergence(ends, goal, 0.2) + 0.2)
    points = torch.tensor([[0.0], [1.0], [-0.6]], dtype=F64)
    one, two, same = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.0, 0.0, 1.0]], dtype=F64)
    mixed = divergence(points, points, 0.2, (one + same) / 2, (two + same) / 2)
    damaged("convex in the pair", mixed <= divergence(points, points, 0.2, one, two) / 2 + 5e-3)


@pytest.mark.parametrize("seed", [7, 8, 9])
def test_thm_small_eps(seed):
    """The divergence against the linear program's value and its plan.

    Checked by: linear program, closed form.
    """
    x, a, y, b = problem(seed)
    x, y = 4 * x, 4 * y
    exact = ot.emd2(a.numpy(), b.numpy(), cost(x, y).numpy())
    plan = torch.as_tensor(ot.emd(a.numpy(), b.numpy(), cost(x, y).numpy()))
    assert abs(nl.metrics.w2(x, y, a, b) ** 2 / 2 - exact) < 1e-9
    information = torch.xlogy(plan, plan / (a[:, None] * b)).sum().item()
    lower = -(entropy(a) + entropy(b)) / 2
    assert information < min(entropy(a), entropy(b)) + 1e-12
    for eps in (10.0, 1.0, 0.1, 0.01):
        rate = (divergence(x, y, eps, a, b) - exact) / eps
        assert lower < rate < information
        assert abs(rate) < math.log(len(y))
        assert 0 < (entropic(x, y, eps, a, b) - exact) / eps < information + 1e-9
        assert 0 < entropic(x, x, eps, a, a) / eps < entropy(a) + 1e-9
    rate = (divergence(x, y, 0.004, a, b) - exact) / 0.004
    assert abs(rate - information - lower) < 1e-3
    assert information + lower < -0.1
    damaged(
        "no self terms: the same rate", abs((entropic(x, y, 0.004, a, b) - exact) / 0.004 - information - lower) < 0.1
    )

    # a point against a cloud: the lower bound is the rate; against m equal ones, half of log max(n, m)
    for w in (b, torch.full_like(b, 1 / len(b))):
        middle, one = (w @ y)[None], torch.ones(1, dtype=F64)
        W = ot.emd2([1.0], w.numpy(), cost(middle, y).numpy())
        fall = (W - divergence(middle, y, 0.004, one, w)) / 0.004
        sharp(fall, entropy(w) / 2, at_least=0.99)
        damaged("a third of the entropies", fall <= entropy(w) / 3)
    sharp(fall, math.log(len(y)), at_least=0.49)
    # +-1 against +-2: the rate may be positive, and is well below the upper bound
    near = torch.tensor([[-1.0], [1.0]], dtype=F64)
    sharp((divergence(near, 2 * near, 1.5) - 0.5) / 1.5, math.log(2), at_least=0.07)
    damaged("never above the limit", divergence(near, 2 * near, 1.5) <= 0.5)

    # points that coincide: two copies of one point are one point
    twice = torch.cat([y[:1], y[:1]])
    assert abs(entropic(twice, twice, 0.1)) < 1e-12
    damaged(
        "the slope with the entropy of unmerged points",
        abs(divergence(twice, y[:1], 0.1) / 0.1 + math.log(2) / 2) < 0.1,
    )

    # equal weights, as many points: the first-order rate vanishes
    x = torch.tensor([[0.0, 0.0], [1.0, 0.2], [0.1, 1.1]], dtype=F64)
    y = x + torch.tensor([0.3, -0.1], dtype=F64)
    assert abs(divergence(x, y, 0.02) - nl.metrics.w2(x, y) ** 2 / 2) < 1e-6


@pytest.mark.parametrize("d", [1, 3])
@pytest.mark.parametrize("seed", range(2))
def test_thm_large_eps(seed, d):
    """Values against moments; two long tails in opposite directions come nearest to the bound.

    Checked by: primal value, closed form.
    """
    x, a, y, b = problem(seed, d=d)
    mean_x, mean_y = a @ x, b @ y
    means = 0.5 * (mean_x - mean_y).square().sum().item()

    # the means split off exactly, at every temperature
    for eps in (0.3, 3.0):
        centred = divergence(x - mean_x, y - mean_y, eps, a, b)
        assert abs(divergence(x, y, eps, a, b) - means - centred) < 1e-9

    x, y = x - mean_x, y - mean_y
    radius2 = max(x.square().sum(1).max(), y.square().sum(1).max()).item()
    A, B = (a[:, None] * x).T @ x, (b[:, None] * y).T @ y
    gap = (A - B).square().sum().item()
    size = (A.square().sum() + B.square().sum()).item()
    x, y = x + mean_x, y + mean_y
    for factor in (1, 3, 30, 300):
        eps = factor * radius2
        rest = divergence(x, y, eps, a, b) - means
        assert abs(rest - gap / (4 * eps)) < radius2 * size / (2 * eps**2)
        mixed = entropic(x, y, eps, a, b) - means - (A.trace() + B.trace()).item() / 2
        product = (A * B).sum().item()
        assert abs(mixed + product / (2 * eps)) < radius2 * product / (2 * eps**2)
    assert abs(eps * rest / (gap / 4) - 1) < 0.05
    damaged("one half for one quarter", abs(rest - gap / (2 * eps)) < radius2 * size / (2 * eps**2))
    damaged("the gap of the standard deviations", abs(eps * rest / (A - B).abs().sum().item() * 4 - 1) < 0.05)

    # opposite skewness at eps = R^2: a third of the bound, and what the third moments say beyond
    p = 0.001
    tail = torch.tensor([[math.sqrt((1 - p) / p)], [-math.sqrt(p / (1 - p))]], dtype=F64)
    w, R2 = torch.tensor([p, 1 - p], dtype=F64), (1 - p) / p

    def J(x, y, eps):  # the mixed value without the traces, from the plan
        return primal(x, y, eps, w, w) - 1

    S = J(tail, -tail, R2) - J(tail, tail.clone(), R2) / 2 - J(-tail, -tail.clone(), R2) / 2
    assert abs(S - divergence(tail, -tail, R2, w, w)) < 1e-9
    sharp(S, R2 / (2 * R2**2) * 2)
    damaged("a third of the bound", S <= R2 / (2 * R2**2) * 2 / 3)
    skewness = (1 - 2 * p) / math.sqrt(p * (1 - p))
    eps = 100 * R2
    assert abs(12 * eps**2 * divergence(tail, -tail, eps, w, w) / (2 * skewness) ** 2 - 1) < 0.02


def random_covariance(d, generator):
    root = torch.randn(d, d, generator=generator, dtype=F64)
    return 0.3 * root @ root.T + 0.3 * torch.eye(d, dtype=F64)


def formula(a, A, b, B, eps):
    """The theorem's right side, with square roots by eigenvalues."""

    def root(matrix):
        values, vectors = torch.linalg.eigh(matrix)
        return vectors @ torch.diag(values.sqrt()) @ vectors.T

    def F(A, B):
        one = torch.eye(len(A), dtype=F64)
        D = root(4 * root(A) @ B @ root(A) + eps**2 * one)
        return (-D.trace() + eps * torch.logdet(D + eps * one)) / 2

    return (0.5 * (a - b).square().sum() + F(A, B) - (F(A, A) + F(B, B)) / 2).item()


def test_thm_gaussian_divergence():
    """The solver on grids, whose sums are exact to many digits, against the formula.

    Checked by: quadrature, primal value.
    """
    assert abs(gaussian_divergence(0.0, 1.0, 1.0, 0.25, 0.5).item() - 0.6123458543179471) < 1e-12
    generator = random(5)
    for d, n, eps in ((1, 61, 0.2), (1, 41, 2.0), (2, 19, 1.0)):
        a, b = torch.randn(2, d, generator=generator, dtype=F64)
        A, B = random_covariance(d, generator), random_covariance(d, generator)
        exact = gaussian_divergence(a, A, b, B, eps).item()
        assert abs(exact - formula(a, A, b, B, eps)) < 1e-11
        (x, p), (y, q) = on_grid(a, A, n), on_grid(b, B, n)
        S = nl.sinkhorn_divergence(x, y, eps, p, q, tol=1e-10).item()
        assert abs(S - exact) < 1e-7
        costs = [primal(*z, eps, *w) for z, w in (((x, y), (p, q)), ((x, x), (p, p)), ((y, y), (q, q)))]
        assert abs(costs[0] - (costs[1] + costs[2]) / 2 - exact) < 1e-7
        damaged("2 eps for eps", abs(S - gaussian_divergence(a, A, b, B, 2 * eps).item()) < 1e-5)
        damaged("a cost without its half", abs(S - 2 * gaussian_divergence(a, A, b, B, eps / 2).item()) < 1e-5)

    # higher dimension, matrices that do not commute
    for d in (3, 6):
        a, b = torch.randn(2, d, generator=generator, dtype=F64)
        A, B = random_covariance(d, generator), random_covariance(d, generator)
        for eps in (0.05, 1.0, 20.0):
            assert abs(gaussian_divergence(a, A, b, B, eps).item() - formula(a, A, b, B, eps)) < 1e-10
        assert abs(gaussian_divergence(a, A, b, A, 1.0).item() - 0.5 * (a - b).square().sum().item()) < 1e-11
        # a singular covariance is a limit: a point against B, as the exercise has it
        zero = 1e-11 * torch.eye(d, dtype=F64)
        point = (0.5 * (a - b).square().sum() + B.trace() / 2 - gaussian_ot(b, B, b, B, 1.0) / 2).item()
        assert abs(gaussian_divergence(a, zero, b, B, 1.0).item() - point) < 1e-8


def test_thm_not_a_metric():
    """Roots by the formula and by the solver on grids; the two asymptotes of the defect.

    Checked by: quadrature, closed form, brute force.
    """

    def root(a, b, eps):
        return gaussian_divergence(0.0, a, 0.0, b, eps).sqrt().item()

    def on_grids(a, b, eps):
        (x, p), (y, q) = on_grid([0.0], [[a]], 49), on_grid([0.0], [[b]], 49)
        return math.sqrt(divergence(x, y, eps, p, q))

    for s in (root, on_grids):
        assert abs(s(16.0, 1.0, 4.0) - 2.025405) < 1e-6
        assert abs(s(16.0, 4.0, 4.0) - 1.393255) < 1e-6
        assert abs(s(4.0, 1.0, 4.0) - 0.602972) < 1e-6

    def defect(a, b, c, eps):
        return root(a, c, eps) - root(a, b, eps) - root(b, c, eps)

    damaged("the root is a metric", on_grids(16.0, 1.0, 4.0) <= on_grids(16.0, 4.0, 4.0) + on_grids(4.0, 1.0, 4.0))
    damaged(
        "the detour is shorter whichever is in the middle",
        root(16.0, 4.0, 4.0) > root(16.0, 1.0, 4.0) + root(1.0, 4.0, 4.0),
    )
    for shift in (1.0, 3.0):  # equal covariances: a metric
        means = [gaussian_divergence(0.0, 2.0, m, 2.0, 4.0).sqrt().item() for m in (shift, shift / 4, 3 * shift / 4)]
        assert abs(means[0] - means[1] - means[2]) < 1e-9

    # every temperature, every triple; and the two asymptotes
    for eps in (0.1, 1.0, 4.0, 20.0, 200.0):
        assert defect(16.0, 4.0, 1.0, eps) > 1e-5
    generator = random(0)
    for _ in range(60):
        steps = 0.3 + torch.rand(3, generator=generator, dtype=F64)
        c, b, a = (steps.cumsum(0) - 1.5).exp().tolist()
        eps = 10 ** (2 * torch.rand((), generator=generator).item() - 1)
        assert defect(a, b, c, eps) > 1e-8
    assert abs(defect(16.0, 4.0, 1.0, 0.05) / (0.09375 * 0.05**2 / (16 * math.sqrt(2))) - 1) < 2e-3
    assert abs(defect(16.0, 4.0, 1.0, 500.0) / (540 / (8 * 500**2.5)) - 1) < 2e-2

    # without the root it is worse, and Diracs are enough
    at = [torch.tensor([[t]], dtype=F64) for t in (0.0, 1.0, 2.0)]
    for eps in (0.1, 10.0):
        S = [divergence(at[i], at[j], eps) for i, j in ((0, 2), (0, 1), (1, 2))]
        assert abs(S[0] - S[1] - S[2] - 1) < 1e-10


@pytest.mark.parametrize("eps", [0.05, 1.0, 20.0])
@pytest.mark.parametrize("seed", range(2))
def test_thm_weak_convergence(seed, eps):
    """The divergence against W_1 by a linear program; sequences that converge, that do not, and that run off.

    Checked by: linear program, primal value.
    """

    def W1(x, y, a, b):
        return ot.emd2(a.numpy(), b.numpy(), torch.cdist(x, y).numpy())

    # 1 and 2. the two bounds in a ball of radius one, and their best constants
    generator = random(seed)
    for _ in range(4):
        x, y, z = (p / p.norm(dim=1, keepdim=True) for p in torch.randn(3, 5, 2, generator=generator, dtype=F64))
        a, b, c = (weights(5, generator) for _ in range(3))
        S, T = divergence(x, y, eps, a, b), divergence(z, y, eps, c, b)
        assert abs(S - (primal(x, y, eps, a, b) - (primal(x, x, eps, a, a) + primal(y, y, eps, b, b)) / 2)) < 1e-9
        assert 0 < S <= W1(x, y, a, b)
        assert abs(S - T) <= 2 * W1(x, z, a, c)
    (left, one), (right, _), (step, _) = dirac(-0.6, 0.8), dirac(0.6, -0.8), dirac(-0.54, 0.72)
    sharp(divergence(left, right, eps), W1(left, right, one, one), at_least=1 - 1e-9)
    change = divergence(left, right, eps) - divergence(step, right, eps)
    sharp(change, 2 * W1(left, step, one, one), at_least=0.97)
    damaged("half the radius in part 1", divergence(left, right, eps) <= W1(left, right, one, one) / 2)
    damaged("R for 2 R in part 2", change <= W1(left, step, one, one))

    # 3. densities that oscillate tend to the uniform law weakly, not in total variation, and S tends to zero
    line = torch.linspace(0, 1, 201, dtype=F64)[:, None]
    flat = torch.full((201,), 1 / 201, dtype=F64)
    sizes = []
    for n in (1, 3, 10):
        w = 1 + torch.cos(2 * math.pi * n * line[:, 0])
        w = w / w.sum()
        sizes.append(divergence(line, line, eps, w, flat))
        assert sizes[-1] <= 0.5 * W1(line, line, w, flat)
    assert sizes[0] > 5 * sizes[1] > 10 * sizes[2] > 0
    damaged("S bounds the total variation", (w - flat).abs().sum().item() < 1e3 * sizes[2])
    # a sequence without a limit stays away from each law, as does one whose W_1 stays away
    tilt = [flat * (1 + 0.9 * sign * torch.sign(line[:, 0] - 0.5)) for sign in (1, -1)]
    tilt = [w / w.sum() for w in tilt]
    assert max(divergence(line, line, eps, w, tilt[0]) for w in tilt) > 0.05
    assert min(divergence(line, line, eps, w, flat) for w in tilt) > 0.02

    # without compactness: a little mass runs off, weakly and in W_1 nothing is left, and S stays
    zero, one = dirac(0.0)
    for n in (1000, 100000):
        far = torch.tensor([[0.0], [math.sqrt(2 * n)]], dtype=F64)
        light = torch.tensor([1 - 1 / n, 1 / n], dtype=F64)
        left_over = divergence(far, zero, eps, light, one)
        own = primal(far, far, eps, light, light)
        assert abs(left_over - (1 - own / 2)) < 1e-6 and own < 0.01 * max(1, eps)
        assert W1(far, zero, light, one) < 0.05
    damaged("weak convergence is enough on the whole line", left_over < 0.5)
