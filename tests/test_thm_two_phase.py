"""One test for each theorem of the chapter book/two_phase.md.

Stricter than the chapter's cells: several seeds, covariances that do not commute, float64, and references that share no
code with the library (joint Gaussians, densities on a grid, SciPy's quadrature).
"""

import math

import pytest
import torch
from scipy.integrate import quad

import nsgf_lite as nl
from nsgf_lite.closed_forms import (
    gaussian_flow,
    gaussian_map,
    gaussian_ot,
    gaussian_w2,
    handover_constant,
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
    assert (half - (torch.eye(2, dtype=F64) + L) / 2).abs().max() > 1e-2
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
    for s in (0.5, 2.0):
        r = min(1, s * s) / (1 + s * s)
        assert clock_error(d, s)[1] > 2 * r**3 / 3
    if d == 3:
        series = [clock_error(k, 2.0)[1] for k in (1, 8, 128)]
        assert series[0] > series[1] > series[2] and series[2] < 0.016
        assert abs(clock_error(512, 2.0, draws=100)[1] - 2 * 0.2**3 / 3) < 0.004
        assert abs(clock_error(64, 1.0)[1] - 1 / 12) < 0.01


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
    # 2: no pair of points is stretched by more than H for a mixture in the unit disc, and a good part of H is used.
    centres = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]], dtype=F64)
    w = (1 - tau) ** 2 + tau**2 * sigma**2
    z = tau * centres[torch.arange(60) % 3] + w**0.5 * torch.randn(60, 2, generator=generator, dtype=F64)
    other = 1.2 * z + 0.3
    ends = [follow(lambda t: mixture(t, centres, sigma), q, tau, steps=60) for q in (z, other)]
    H = handover_constant(tau, sigma, 1.0)
    ratio = torch.pdist(torch.cat(ends)) / torch.pdist(torch.cat([z, other]))
    assert 0.25 * H < ratio.max() < H
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
    assert worst[0] > 0.2 and worst[1] < 0.1


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
    # 3: matched pairs at 1 - exp(-t): second order in eps.
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
