"""One test for each theorem of the chapter book/two_phase.md.

Stricter than the chapter's cells: several seeds, covariances that do not commute, float64, and references that share no
code with the library (joint Gaussians, densities on a grid, SciPy's quadrature).
"""

import math

import pytest
import torch
from conftest import damaged, sharp
from scipy.integrate import quad
from scipy.linalg import solve_sylvester, sqrtm

import nsgf_lite as nl
from nsgf_lite.closed_forms import (
    gaussian_flow,
    gaussian_map,
    gaussian_ot,
    gaussian_w2,
    handover_constant,
    ou_moments,
    segment_law,
    segment_time,
    segment_velocity,
)
from nsgf_lite.particles import advance

F64 = torch.float64


def covariance(generator, d=2):
    A = torch.randn(d, d, generator=generator, dtype=F64)
    return A @ A.T / d + 0.3 * torch.eye(d, dtype=F64)


def two_laws(seed, d=2):
    generator = torch.Generator().manual_seed(seed)
    m, goal = torch.randn(2, d, generator=generator, dtype=F64)
    return (m, covariance(generator, d)), (goal, covariance(generator, d)), generator


def joint(t, start, end):
    """Moments of (x_t, x1 - x0), from those of the pair: mean (2d,) and covariance (2d, 2d)."""
    (m, S), (goal, B) = start, end
    d = len(m)
    I, zero = torch.eye(d, dtype=F64), torch.zeros(d, d, dtype=F64)
    L = torch.cat([torch.cat([(1 - t) * I, t * I], 1), torch.cat([-I, I], 1)])
    both = torch.cat([torch.cat([S, zero], 1), torch.cat([zero, B], 1)])
    return L @ torch.cat([m, goal]), L @ both @ L.T


def follow(velocity, x, begin, steps=120, end=1.0):
    h = (end - begin) / steps
    for k in range(steps):
        x, _ = advance(lambda z, t: velocity(t)(z), x, begin + k * h, h, "rk4")
    return x


def affine(velocity, m, begin, **options):
    """Image of m and the matrix of an affine flow, in row form."""
    frame = follow(velocity, torch.cat([m[None], m + torch.eye(len(m), dtype=F64)]), begin, **options)
    return frame[0], frame[1:] - frame[0]


# thm-straight-flow ----------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(2))
def test_thm_straight_flow(seed):
    """Conditional means of joint Gaussians, the flow by Runge and Kutta, V by quadrature, regression by sampling.

    Checked by: definition, quadrature, simulation.
    """
    start, end, generator = two_laws(seed)
    (m, S), (goal, B) = start, end
    x = torch.randn(5, 2, generator=generator, dtype=F64)

    def velocity(t):
        return segment_velocity(t, *start, *end)

    # 5: the conditional mean of a joint Gaussian.
    for t in (0.0, 0.2, 0.5, 0.9, 1.0):
        mean, C = joint(t, start, end)
        reference = mean[2:] + (x - mean[:2]) @ torch.linalg.solve(C[:2, :2], C[:2, 2:])
        assert (velocity(t)(x) - reference).abs().max() < 1e-11
    # 2 and 3: its flow carries the law of x_t, up to the target.
    for t in (0.35, 0.8, 1.0):
        end_mean, L = affine(velocity, m, 0.0, end=t)
        reference = joint(t, start, end)
        assert (end_mean - reference[0][:2]).abs().max() < 1e-6
        assert (L.T @ S @ L - reference[1][:2, :2]).abs().max() < 1e-6
        assert gaussian_w2(end_mean, L.T @ S @ L, *segment_law(t, *start, *end)) < 1e-3
    # 4: what the flow costs, and that it is not straight.
    V = quad(lambda t: float(_conditional(*joint(t, start, end)).trace()), 0, 1)[0]
    cost = (goal - m).square().sum() + S.trace() + B.trace()
    bend = (L - torch.eye(2, dtype=F64)).T
    spent = (end_mean - m).square().sum() + (bend @ S @ bend.T).trace()
    assert V > 0.1 and spent < cost - V - 1e-4
    middle, half = affine(velocity, m, 0.0, end=0.5)
    damaged("the flow of independent pairs is straight", (half - (torch.eye(2, dtype=F64) + L) / 2).abs().max() < 1e-2)
    damaged("u with the sum of both covariances for their difference", _sum_field(velocity, 0.4, start, end, x) < 1e-2)
    # 4 is nearly an equality between a wide law and a narrow one, and with 2 V for V it would be false.
    one = (
        (torch.zeros(1, dtype=F64), torch.eye(1, dtype=F64)),
        (torch.zeros(1, dtype=F64), 0.01 * torch.eye(1, dtype=F64)),
    )
    V = quad(lambda t: float(_conditional(*joint(t, *one))), 0, 1)[0]
    _, slope = affine(lambda t: segment_velocity(t, *one[0], *one[1]), one[0][0], 0.0, steps=400)
    sharp((float(slope) - 1) ** 2, 1.01 - V, at_least=0.9)
    damaged("4 with 2 V", (float(slope) - 1) ** 2 <= 1.01 - 2 * V)
    # Matched optimally the segments do not cross: V = 0, and the flow of u is straight.
    T = gaussian_map(S, B, 1e-9)
    assert (T @ S @ T - B).abs().max() < 1e-6
    # 5: V for commuting covariances.
    diagonal = (
        (m, torch.diag(torch.tensor([1.7, 0.2], dtype=F64))),
        (goal, torch.diag(torch.tensor([0.4, 2.0], dtype=F64))),
    )
    V = quad(lambda t: float(_conditional(*joint(t, *diagonal)).trace()), 0, 1)[0]
    assert abs(V - math.pi / 2 * (math.sqrt(1.7 * 0.4) + math.sqrt(0.2 * 2.0))) < 1e-9
    # 1: what the library's straight models regress on has u as its conditional mean: residuals see nothing of x.
    laws = [nl.toy.Gaussian(tuple(a.tolist()), tuple(map(tuple, A.tolist()))) for a, A in (start, end)]
    model = nl.RectifiedFlow(network=lambda d, classes: nl.networks.MLP(d, width=2, depth=1))
    chance = torch.Generator().manual_seed(seed)
    model.prepare(*laws, nl.Training(batch=256), chance)
    n = 40_000
    xt, t, v, _ = model._batch(n, 0, chance)
    order = t.argsort()
    xt, t, v = xt[order].double(), t[order].double(), v[order].double()
    blocks = zip(xt.chunk(40), t.chunk(40), v.chunk(40), strict=True)
    residual = torch.cat([b - velocity(float(s.mean()))(a) for a, s, b in blocks])
    features = torch.cat([torch.ones(n, 1, dtype=F64), xt - m, (t[:, None] - 0.5) * (xt - m)], 1)
    sees = (features.T @ residual / n).abs() / (features.square().mean(0)[:, None] * residual.square().mean(0)).sqrt()
    assert sees.max() < 5 / math.sqrt(n)
    assert (
        abs(
            float(residual.square().sum(1).mean())
            - quad(lambda t: float(_conditional(*joint(t, start, end)).trace()), 0, 1)[0]
        )
        < 0.05
    )


def _sum_field(velocity, t, start, end, x):
    """How far u is from the field with tB + (1-t)S in place of tB - (1-t)S."""
    mean, C = joint(t, start, end)
    wrong = mean[2:] + (x - mean[:2]) @ torch.linalg.solve(C[:2, :2], t * end[1] + (1 - t) * start[1])
    return (velocity(t)(x) - wrong).abs().max()


def _conditional(mean, C):
    """Covariance of the second half of a joint Gaussian given the first."""
    d = len(mean) // 2
    return C[d:, d:] - C[d:, :d] @ torch.linalg.solve(C[:d, :d], C[:d, d:])


# thm-time-predictor ---------------------------------------------------------------------


def clock_error(d, s, D=0.0, draws=300, seed=0):
    """Mean over x_t of Var(t | x_t), with t on a grid, from N(0, I) to N(D e_1, s^2 I)."""
    I, m = torch.eye(d, dtype=F64), torch.zeros(d, dtype=F64)
    m[0] = D
    t = (torch.arange(draws, dtype=F64)[:, None] + 0.5) / draws
    z = torch.randn(draws, d, generator=torch.Generator().manual_seed(seed), dtype=F64)
    x = t * m + ((1 - t) ** 2 + t**2 * s**2).sqrt() * z
    guess, spread = segment_time(x, 0 * m, I, m, s**2 * I, nodes=150)
    squared = float((guess - t[:, 0]).square().mean())
    return squared, float(spread.mean())


@pytest.mark.parametrize("d", [1, 2, 3])
def test_thm_time_predictor(d):
    """Bayes' rule with the densities on a grid of times; the bounds by averages over x.

    Checked by: quadrature, simulation.
    """
    # 1: against the densities on a grid.
    start, end, generator = two_laws(d, d)
    x = torch.randn(6, d, generator=generator, dtype=F64)
    times = (torch.arange(2_000, dtype=F64) + 0.5) / 2_000
    means = (1 - times)[:, None] * start[0] + times[:, None] * end[0]
    C = (1 - times)[:, None, None] ** 2 * start[1] + times[:, None, None] ** 2 * end[1]
    density = torch.distributions.MultivariateNormal(means, C).log_prob(x[:, None]).exp()
    density = density / density.sum(1, keepdim=True)
    guess, spread = segment_time(x, *start, *end)
    assert (guess - density @ times).abs().max() < 1e-6
    assert (spread - (density @ times**2 - (density @ times) ** 2)).abs().max() < 1e-6
    # 2: blind when the laws are equal; on the line its error is 1/12 by quadrature over x.
    assert (segment_time(x, *start, *start)[0] - 0.5).abs().max() < 1e-12
    if d == 1:
        grid = torch.linspace(-9, 9, 1_201, dtype=F64)[:, None]
        width = ((1 - times) ** 2 + times**2).sqrt()
        p = (torch.exp(-((grid / width) ** 2) / 2) / width).mean(1) / math.sqrt(2 * math.pi)
        assert abs(float(p @ segment_time(grid, 0.0, 1.0, 0.0, 1.0)[1]) * 0.015 - 1 / 12) < 1e-5
    # 3 and 4: the two bounds, and the limit.
    squared, spread = clock_error(d, 1.0, 8.0)
    assert squared < 2 / (3 * 64) and spread < 2 / (3 * 64)
    sharp(spread, 2 / (3 * 64), at_least=0.7)
    damaged("3 with a third of the bound", spread <= 2 / (9 * 64))
    for s in (0.5, 2.0):
        r = min(1, s * s) / (1 + s * s)
        assert clock_error(d, s)[1] > 2 * r**3 / 3
    # 4 is attained at s = 1, where the bound is 1/12; with twice the constant it is false there.
    blind = clock_error(d, 1.0)[0]
    sharp(1 / 12, blind * (1 + 1e-4), at_least=0.999)
    damaged("4 with twice the constant", blind >= 2 / 12)
    damaged("the clock sees in any case", blind < 0.08)
    damaged("without the determinant", _bare_gap() < 0.01)
    if d == 3:
        series = [clock_error(k, 2.0)[1] for k in (1, 8, 128)]
        assert series[0] > series[1] > series[2] and series[2] < 0.016
        assert abs(clock_error(512, 2.0, draws=100)[1] - 2 * 0.2**3 / 3) < 0.004
        assert abs(clock_error(64, 1.0)[1] - 1 / 12) < 0.01


def _bare_gap(s=0.5, x=0.2):
    """Distance of the best guess at x from the one that leaves the width out of the density."""
    t = (torch.arange(4_000, dtype=F64) + 0.5) / 4_000
    w = (1 - t) ** 2 + t**2 * s**2
    bare = torch.exp(-(x**2) / (2 * w))
    return abs(
        float((bare * t).sum() / bare.sum() - segment_time(torch.tensor([[x]], dtype=F64), 0.0, 1.0, 0.0, s**2)[0])
    )


# thm-handover ---------------------------------------------------------------------------


def mixture(t, centres, sigma):
    """E[x1 - x0 | x_t = x] from N(0, I) to an equal mixture, through the mean of x1 (through that of x0 at t = 1)."""
    w = (1 - t) ** 2 + t**2 * sigma**2

    def velocity(x):
        p = torch.softmax(-(torch.cdist(x, t * centres) ** 2) / (2 * w), -1)
        gap = x[:, None] - t * centres
        x1 = (p[..., None] * (centres + t * sigma**2 / w * gap)).sum(1)
        return x1 - (p[..., None] * ((1 - t) / w * gap)).sum(1)

    return velocity


@pytest.mark.parametrize(("tau", "sigma"), [(0.2, 0.8), (0.5, 0.5)])
def test_thm_handover(tau, sigma):
    """The constant by quadrature of the largest slope; flows of mixtures and Gaussians by Runge and Kutta.

    Checked by: quadrature, simulation.
    """
    generator = torch.Generator().manual_seed(7)

    def rate(t, R):
        w, slope = (1 - t) ** 2 + t**2 * sigma**2, t * sigma**2 - (1 - t)
        return slope / w + t * (1 - t) * R**2 / w**2

    # The constant is the exponential of the integral of the largest slope.
    for R in (0.0, 0.7, 1.5):
        reference = math.exp(quad(rate, tau, 1, args=(R,), epsabs=1e-12)[0])
        assert abs(handover_constant(tau, sigma, R) / reference - 1) < 1e-9
    # 2: sharp for a Gaussian target; 1: exact if the laws meet.
    zero, I, goal = torch.zeros(2, dtype=F64), torch.eye(2, dtype=F64), torch.tensor([2.0, -1.0], dtype=F64)
    laws = (zero, I), (goal, sigma**2 * I)
    m, L = affine(lambda t: segment_velocity(t, *laws[0], *laws[1]), zero, tau)
    mean, C = segment_law(tau, *laws[0], *laws[1])
    assert gaussian_w2(m + mean @ L, L.T @ C @ L, *laws[1]) < 1e-6
    rho = mean + 0.4, covariance(generator)
    found = gaussian_w2(m + rho[0] @ L, L.T @ rho[1] @ L, *laws[1])
    assert abs(found / gaussian_w2(*rho, mean, C) / handover_constant(tau, sigma, 0.0) - 1) < 1e-5
    sharp(found * (1 - 1e-5), handover_constant(tau, sigma, 0.0) * gaussian_w2(*rho, mean, C), at_least=0.999)
    damaged(
        "the stretching of another time",
        abs(found / gaussian_w2(*rho, mean, C) / handover_constant(0.9, sigma, 0.0) - 1) < 1e-2,
    )
    # 3, for a Gaussian target and a field that is off by a constant: attained.
    push = torch.tensor([0.3, 0.1], dtype=F64)
    spoiled, _ = affine(lambda t: lambda x: segment_velocity(t, *laws[0], *laws[1])(x) + push, mean, tau)
    budget = quad(lambda t: handover_constant(t, sigma, 0.0), tau, 1)[0] * float(push.norm())
    sharp((spoiled - goal).norm() * (1 - 1e-6), budget, at_least=0.999)
    damaged("3 without H", (spoiled - goal).norm() <= (1 - tau) * float(push.norm()))
    # 4, for a Gaussian target and laws that are displaced so that both end displaced by the same vector: attained.
    times, away = (tau, 0.9), torch.tensor([0.0, 0.7], dtype=F64)
    ends = []
    for t in times:
        own_mean, _ = segment_law(t, *laws[0], *laws[1])
        moved, _ = affine(
            lambda r: segment_velocity(r, *laws[0], *laws[1]), own_mean + away / handover_constant(t, sigma, 0.0), t
        )
        ends.append(moved)
    assert (ends[0] - ends[1]).abs().max() < 1e-6
    sharp((ends[0] - goal).norm() * (1 - 1e-6), away.norm(), at_least=0.999)
    # 2: no pair of points is stretched by more than H for a mixture in the unit disc, and a good part of H is used.
    centres = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]], dtype=F64)
    w = (1 - tau) ** 2 + tau**2 * sigma**2
    z = tau * centres[torch.arange(60) % 3] + w**0.5 * torch.randn(60, 2, generator=generator, dtype=F64)
    other = 1.2 * z + 0.3
    ends = [follow(lambda t: mixture(t, centres, sigma), q, tau, steps=60) for q in (z, other)]
    H = handover_constant(tau, sigma, 1.0)
    ratio = torch.pdist(torch.cat(ends)) / torch.pdist(torch.cat([z, other]))
    assert 0.25 * H < ratio.max() < H
    if sigma == 0.5:
        damaged("the Gaussian's H for the mixture's", ratio.max() < handover_constant(tau, sigma, 0.0))
    assert nl.metrics.w2(*ends) < H * nl.metrics.w2(z, other)
    # 3: a field that is off by a constant vector.
    off = torch.tensor([0.3, 0.1], dtype=F64)
    astray = follow(lambda t: lambda q: mixture(t, centres, sigma)(q) + off, z, tau, steps=60)
    budget = quad(lambda t: handover_constant(t, sigma, 1.0), tau, 1)[0] * float(off.norm())
    assert 0.1 * budget < (astray - ends[0]).square().sum(1).mean().sqrt() < budget
    # 4: right law, right fields, the best guess for each particle: wrong; one time for all: right.
    x = (w**0.5) * torch.randn(4_000, 2, generator=generator, dtype=F64) + tau * goal
    own, _ = segment_time(x, zero, I, goal, sigma**2 * I, nodes=100)
    worst = []
    for T in (own, torch.full_like(own, tau)):
        wT = ((1 - T) ** 2 + T**2 * sigma**2).sqrt()[:, None]
        y = goal + sigma / wT * (x - T[:, None] * goal)
        worst.append(float((y.T.cov() / sigma**2 - I).abs().max()))
    damaged("the best guess for each particle gives the right law", worst[0] < 0.2)
    assert worst[1] < 0.1


# thm-two-curves -------------------------------------------------------------------------


class Exact(torch.nn.Module):
    """A network that knows: a function of points and times, which are all equal."""

    def __init__(self, value):
        super().__init__()
        self.value, self.unused = value, torch.nn.Parameter(torch.zeros(()))

    def forward(self, x, t):
        return self.value(x, float(t[0]))


@pytest.mark.parametrize("seed", range(2))
def test_thm_two_curves(seed):
    """The closed flow against Gaussian laws of the segments; the sampler with networks that know.

    Checked by: closed form, simulation.
    """
    (m, S), (goal, B), generator = two_laws(10 + seed)
    D, times = goal - m, [0.3, 1.0, 2.0]
    # W_2 of Gaussians is the limit of the entropic cost, without its one half.
    assert abs(gaussian_w2(m, S, goal, B) ** 2 - 2 * gaussian_ot(m, S, goal, B, 1e-10)) < 1e-7
    # 1: means and shapes add up.
    means, covariances = gaussian_flow(m, S, goal, B, 0.2, times)
    zero = torch.zeros(2, dtype=F64)
    for t, mean, Sigma in zip(times, means, covariances, strict=True):
        for tau in (0.2, 0.7):
            C = (1 - tau) ** 2 * S + tau**2 * B
            claim = (tau - 1 + math.exp(-t)) ** 2 * D.square().sum() + gaussian_w2(zero, Sigma, zero, C) ** 2
            assert abs(gaussian_w2(mean, Sigma, *segment_law(tau, m, S, goal, B)) ** 2 - claim) < 1e-9
    # 2: equal shapes, for two temperatures; the curves do not meet.
    for eps in (0.1, 2.0):
        means, covariances = gaussian_flow(m, S, goal, S, eps, times)
        assert (covariances - S).abs().max() < 1e-9
        for t, mean, Sigma in zip(times, means, covariances, strict=True):
            near = []
            for tau in torch.linspace(0, 1, 21).tolist() + [1 - math.exp(-t)]:
                shrink = 1 - math.sqrt((1 - tau) ** 2 + tau**2)
                claim = (tau - 1 + math.exp(-t)) ** 2 * D.square().sum() + shrink**2 * S.trace()
                near.append(gaussian_w2(mean, Sigma, *segment_law(tau, m, S, goal, S)) ** 2)
                assert abs(near[-1] - claim) < 1e-9
            assert 0 < min(near) < (1 - 0.5**0.5) ** 2 * S.trace()
            assert min(near) <= (min(math.exp(-t), 1 - math.exp(-t)) * D.norm()) ** 2 + 1e-9
    # The bound on the least is attained at t = log 2 and far centres; the mismatch at 1 - exp(-t) grows with the
    # dimension, that of the nearest law does not.
    grid = torch.linspace(0, 1, 201, dtype=F64)
    far = torch.tensor([1e3, 0.0], dtype=F64)
    best = min(gaussian_w2(far / 2, S, *segment_law(float(t), 0 * far, S, far, S)) ** 2 for t in grid)
    sharp(best, (1 - 0.5**0.5) ** 2 * S.trace(), at_least=0.99)
    damaged("half of it", best <= 0.5 * (1 - 0.5**0.5) ** 2 * S.trace())
    by_dimension = []
    for d in (2, 200):
        I, one = torch.eye(d, dtype=F64), torch.eye(d, dtype=F64)[0]
        gaps = [float(gaussian_w2(one / 2, I, *segment_law(float(t), 0 * one, I, one, I))) for t in grid[::10]]
        by_dimension.append((gaps[10], min(gaps)))
    assert by_dimension[1][0] / by_dimension[0][0] == pytest.approx(10, rel=1e-9)
    damaged("the nearest law's mismatch grows like the root of d", by_dimension[1][1] > 5 * by_dimension[0][1])
    assert by_dimension[1][1] <= 0.5 + 1e-12
    # 3: matched pairs at 1 - exp(-t): second order in eps.
    damaged("the curves meet on the way", min(near) < 1e-6)
    T, I = gaussian_map(S, B, 1e-10), torch.eye(2, dtype=F64)
    gaps = []
    for eps in (0.04, 0.02):
        means, covariances = gaussian_flow(m, S, goal, B, eps, times)
        slopes = [math.exp(-t) * I + (1 - math.exp(-t)) * T for t in times]
        gaps.append(max((Sigma - L @ S @ L).norm() for L, Sigma in zip(slopes, covariances, strict=True)))
        assert max((mean - (m + (1 - math.exp(-t)) * D)).norm() for t, mean in zip(times, means, strict=True)) < 1e-9
    assert 3.3 < gaps[0] / gaps[1] < 4.7
    # The sampler with exact networks: equal shapes, matched pairs, the time of K Euler steps. All particles move by D.
    model = nl.NSGFPlusPlus(step=0.2, steps=4)
    model.dimension = 2
    model._make(torch.Generator().manual_seed(0))
    shift, tau = D.float(), 1 - 0.8**4
    model.sinkhorn.velocity = Exact(lambda x, t: (0.8 * 0.8 ** round(4 * t) * shift).expand_as(x))
    model.straight.velocity = Exact(lambda x, t: shift.expand_as(x))
    model.clock = Exact(lambda x, t: x.new_full((len(x), 1), math.log(tau / (1 - tau))))
    start = torch.randn(9, 2, generator=generator)
    assert (model.sample(9, 3, start=start) - start - shift).abs().max() < 1e-5
    # With independent pairs the end is too wide by the factor that the theorem on the handover says.
    model.straight.velocity = Exact(lambda x, t: segment_velocity(t, [0.0, 0.0], I, D, I)(x.double()).float())
    end = model.sample(9, 100, "rk4", start=start)
    assert (end - shift - start * handover_constant(tau, 1.0, 0.0)).abs().max() < 1e-3
    assert handover_constant(tau, 1.0, 0.0) > 1.2


# thm-flow-matching-gaussians ------------------------------------------------------------


def descent(F, mean, C, h=1e-4):
    """Drift and slope of minus the Wasserstein gradient of F at N(mean, C), by differences."""
    d = len(mean)
    I = torch.eye(d, dtype=F64)
    drift = torch.stack([-(F(mean + h * e, C) - F(mean - h * e, C)) / (2 * h) for e in I])
    slope = torch.zeros(d, d, dtype=F64)
    for i in range(d):
        for j in range(d):
            E = (torch.outer(I[i], I[j]) + torch.outer(I[j], I[i])) / 2
            slope[i, j] = -2 * (F(mean, C + h * E) - F(mean, C - h * E)) / (2 * h)
    return drift, slope


def half_square(goal, B):
    """W_2^2 / 2 to N(goal, B), by SciPy's matrix root."""
    R = torch.from_numpy(sqrtm(B.numpy()).real)

    def F(mean, C):
        cross = torch.linalg.eigvalsh(R @ C @ R).sqrt().sum()
        return ((mean - goal).square().sum() + C.trace() + B.trace()) / 2 - cross

    return F


def field(t, start, end, mean):
    """Drift and slope of the library's straight velocity at the mean."""
    u, I = segment_velocity(t, *start, *end), torch.eye(len(mean), dtype=F64)
    drift = u(mean[None])[0]
    return drift, (u(mean + I) - drift).T


@pytest.mark.parametrize("seed", range(2))
def test_thm_flow_matching_gaussians(seed):
    """Gradients of functionals by differences, matrix roots and Lyapunov's equation by SciPy, against the segments.

    Checked by: finite differences, another library, definition.
    """
    start, end, generator = two_laws(20 + seed)
    (m, S), (goal, B) = start, end
    D, I = goal - m, torch.eye(2, dtype=F64)
    # 1: matched pairs, from two sources, one functional. The velocity by differences of the positions in the clock.
    root, F = torch.from_numpy(sqrtm(S.numpy()).real), half_square(goal, B)
    inverse = torch.linalg.inv(root)
    T = inverse @ torch.from_numpy(sqrtm((root @ B @ root).numpy()).real) @ inverse
    for t in (0.2, 1.0):

        def L(t):
            return math.exp(-t) * I + (1 - math.exp(-t)) * T

        h = 1e-4
        rate = (L(t + h) - L(t - h)) / (2 * h) @ torch.linalg.inv(L(t))
        mean = goal - math.exp(-t) * D
        drift, slope = descent(F, mean, L(t) @ S @ L(t))
        assert (drift - (goal - mean)).abs().max() < 1e-7 and (slope - rate).abs().max() < 1e-6
    # 2: independent pairs. The field is symmetric only if the covariances commute; another one traces the same path.
    turn = torch.linalg.eigh(S).eigenvectors
    commuting = turn @ torch.diag(torch.tensor([0.4, 1.9], dtype=F64)) @ turn.T
    for tau in (0.2, 0.7):
        mean, C = joint(tau, start, end)
        C, rate = C[:2, :2], 2 * (tau * B - (1 - tau) * S)
        drift, U = field(tau, start, end, mean[:2])
        assert (drift - D).abs().max() < 1e-12 and (U @ C + C @ U.T - rate).abs().max() < 1e-12
        A = torch.from_numpy(solve_sylvester(C.numpy(), C.numpy(), rate.numpy()))
        spent = [float((X @ C @ X.T).trace()) for X in (U, A, U - A)]
        assert spent[0] == pytest.approx(spent[1] + spent[2], rel=1e-10) and (A - A.T).abs().max() < 1e-12
        damaged("the field of independent pairs is a gradient", abs(U[0, 1] - U[1, 0]) < 1e-3)
        damaged("it spends no more than the path needs", spent[2] < 1e-6)
        assert (C @ (U.T - U) @ C + tau * (1 - tau) * (S @ B - B @ S)).abs().max() < 1e-12
        V = field(tau, start, (goal, (commuting + commuting.T) / 2), mean[:2])[1]
        assert (V - V.T).abs().max() < 1e-12
        # 3: the functional made to measure has the path's velocity for its descent.
        made = made_to_measure(start, end)
        drift, slope = descent(made, mean[:2], C, h=1e-3)
        assert (drift - D).abs().max() < 1e-4 and (slope - A).abs().max() < 1e-5
        damaged("W_2^2 / 2 serves independent pairs", _angle(descent(F, mean[:2], C), (D, A)) < 1e-2)
        # 5: on a circle.
        b, theta = 0.8, 0.5 * math.pi * tau
        law = ou_moments(-b * math.log(math.cos(theta)), I / b, goal, m, S)
        assert (law[0] - goal + math.cos(theta) * D).abs().max() < 1e-12
        assert (law[1] - math.cos(theta) ** 2 * S - math.sin(theta) ** 2 * b * I).abs().max() < 1e-12
        straight = segment_law(1 - math.cos(theta), m, S, goal, b * I)[1]
        damaged("on the chord as on the circle", (law[1] - straight).abs().max() < 1e-2)
    # 3: with no distance to go and proportional covariances each law is met twice.
    lam = 0.5 + seed
    c = 1 / (1 + lam)
    laws = [segment_law(c + shift, m, S, m, lam * S)[1] for shift in (-0.2, 0.2)]
    assert (laws[0] - laws[1]).abs().max() < 1e-12 and (
        laws[0] - segment_law(c, m, S, m, lam * S)[1]
    ).abs().max() > 1e-2
    # 4: one law, many directions.
    here, directions = goal - 1.5 * D, []
    for tau in (0.0, 0.25, 0.5):
        source = (here - tau * goal) / (1 - tau), (1 + tau) / (1 - tau) * B
        mean, C = joint(tau, source, end)
        assert (mean[:2] - here).abs().max() < 1e-12 and (C[:2, :2] - B).abs().max() < 1e-12
        directions.append(field(tau, source, end, here))
        assert (directions[-1][1] + I).abs().max() < 1e-12
        assert (directions[-1][0] - (goal - here) / (1 - tau)).abs().max() < 1e-12
    damaged("one functional for all sources", _angle(directions[0], directions[2]) < 0.1)


def _angle(one, other):
    """Angle between two affine fields, each a drift and a slope, as vectors of numbers."""
    u, v = (torch.cat([drift, slope.flatten()]) for drift, slope in (one, other))
    return float(torch.acos((u @ v / u.norm() / v.norm()).clamp(-1, 1)))


def made_to_measure(start, end):
    """The functional of part 3, with its integral by quadrature."""
    (m, S), (goal, B) = start, end
    D = goal - m

    def tangent(tau):
        C, rate = (1 - tau) ** 2 * S + tau**2 * B, 2 * (tau * B - (1 - tau) * S)
        A = torch.from_numpy(solve_sylvester(C.numpy(), C.numpy(), rate.numpy()))
        return C, A, float(D @ D + (A @ C @ A).trace())

    def F(mean, Sigma):
        tau = float((mean - m) @ D / (D @ D))
        C, A, _ = tangent(tau)
        return -quad(lambda r: tangent(r)[2], 0, tau)[0] - (A @ (Sigma - C)).trace() / 2

    return F
