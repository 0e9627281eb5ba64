"""Theorems of the chapter on the neural Sinkhorn flow: book/neural_sinkhorn_flow.md."""

import math

import pytest
import torch
from conftest import damaged, sharp
from torch import nn

import nsgf_lite as nl

F64 = torch.float64
STEP, STEPS = 0.4, 10


def gaussian(generator, *shape):
    return torch.randn(*shape, generator=generator, dtype=F64)


def lone(a, b, eta=STEP, steps=STEPS):
    """Minibatches of one, N(0, a) to N(0, b) on the line: slopes, conditional variances and variances of the pool."""
    q = (1 - eta) ** torch.arange(steps + 1, dtype=F64)
    variance = q**2 * a + (1 - q) ** 2 * b
    slope = q * ((1 - q) * b - q * a) / variance
    return slope[:-1], (q**2 * a * b / variance)[:-1], variance


class Line(nn.Module):
    """A network of exact slopes: the velocity ``scale * slope_k x + shift_k`` at the time k / steps."""

    def __init__(self, slopes, shifts=None):
        super().__init__()
        self.slopes = nn.Parameter(slopes.clone())
        self.shifts = nn.Parameter(torch.zeros_like(slopes) if shifts is None else shifts.clone())

    def forward(self, x, t):
        k = (t * len(self.slopes) + 1e-3).long().clamp(max=len(self.slopes) - 1)
        return self.slopes[k][:, None].to(x) * x + self.shifts[k][:, None].to(x)


def model_of(network, d, steps=STEPS, eta=STEP, **options):
    """A fitted NSGF with a network of our own."""
    model = nl.NSGF(step=eta, steps=steps, network=lambda *_: network, **options)
    model.dimension, model.velocity = d, network
    return model


def lone_model(a, b, generator, minibatches=4096):
    """An NSGF whose pool holds lone Gaussian trajectories."""
    laws = [nl.toy.Gaussian((0.0,), ((v,),)) for v in (a, b)]
    model = nl.NSGF(eps=1.0, step=STEP, steps=STEPS, minibatch=1, pool=minibatches, together=minibatches)
    model.prepare(*laws, nl.Training(), generator)
    model._begin(generator)
    return model


# thm-velocity-matching ------------------------------------------------------------------


def check_pythagoras(seed):
    """A discrete law of triples, some of which share their place and time: everything is a finite sum."""
    generator = torch.Generator().manual_seed(seed)
    x, y = gaussian(generator, 5, 4, 2), 1 + gaussian(generator, 5, 6, 2)
    x[:, 0] = x[0, 0]  # one particle in all five minibatches
    x, v = nl.trajectories(nl.fields.Sinkhorn(0.5, 1e-10), x, y, STEP, 1)
    mean = v.clone()
    mean[:, :, 0] = v[:, :, 0].mean(1, keepdim=True)
    w = mean + gaussian(generator, 1, 1, 4, 2)
    w[:, :, 1:] += gaussian(generator, 1, 5, 3, 2)

    def squared(z):
        return z.square().sum(-1).mean()

    price = squared(v - mean)
    assert price > 1e-4
    assert abs(squared(w - v) - price - squared(w - mean)) < 1e-12
    assert price < squared(w - v)
    sharp(price, squared(mean - v), at_least=0.999)
    damaged("the loss is the distance", abs(squared(w - v) - squared(w - mean)) < 1e-6)
    damaged("the mean loses half the price", squared(mean - v) <= price / 2)
    # Twins: two draws of the shared particle's velocity, over all ordered pairs.
    mine, guess = v[0, :, 0], w[0, 0, 0]
    pairs = (mine[:, None] - mine).square().sum(-1).mean() / 2
    assert abs(pairs - (mine - mine.mean(0)).square().sum(-1).mean()) < 1e-12
    product = ((guess - mine)[:, None] * (guess - mine)).sum(-1).mean()
    assert abs(product - (guess - mine.mean(0)).square().sum()) < 1e-12
    damaged("without the half", abs(2 * pairs - (mine - mine.mean(0)).square().sum(-1).mean()) < 1e-6)
    alike = (guess - mine).square().sum(-1).mean()  # U' = U: not independent given (X, S)
    damaged("dependent twins", abs(alike - (guess - mine.mean(0)).square().sum()) < 1e-6)
    # The gradient does not see the price.
    theta = gaussian(generator, 3, 2).requires_grad_()
    inputs = torch.cat([x, torch.ones_like(x[..., :1])], -1)
    slopes = [torch.autograd.grad(squared(inputs @ theta - target), theta)[0] for target in (v, mean)]
    assert (slopes[0] - slopes[1]).abs().max() < 1e-12


def check_lone_pool(seed):
    """What the library's pool holds: its conditional mean and its price, in the network's time."""
    a, b = 1.0, 0.6
    generator = torch.Generator().manual_seed(seed)
    model = lone_model(a, b, generator)
    x, t, u, _ = model._batch(80_000, 1, generator)
    slope, price, variance = lone(a, b)
    for k in range(STEPS):
        here = (t * STEPS - k).abs() < 1e-4
        assert here.sum() > 7000
        X, U = x[here, 0].double(), u[here, 0].double() / (STEP * STEPS)
        fitted = (X @ U) / (X @ X)
        # The scatter is that of the pool's 4096 trajectories.
        scatter = (price[k] / variance[k] / 4096).sqrt()
        assert abs(fitted - slope[k]) < 5 * scatter + 2e-3
        assert abs((U - fitted * X).square().mean() / price[k] - 1) < 0.12
        assert abs(X.square().mean() / variance[k] - 1) < 0.12


@pytest.mark.parametrize(
    ("claim", "setting"),
    [(check_pythagoras, (seed,)) for seed in range(3)] + [(check_lone_pool, (seed,)) for seed in range(2)],
)
def test_thm_velocity_matching(claim, setting):
    """Both sides as sums over a discrete law of triples, and the library's pool against the formula for lone particles.

    Checked by: definition, closed form.
    """
    claim(*setting)


# thm-marginals --------------------------------------------------------------------------


def check_weak_form(seed):
    """The continuity equation of the pool's own path, step by step, against a quadrature within the steps."""
    generator = torch.Generator().manual_seed(seed)
    x, y = gaussian(generator, 6, 5, 2), 2 + 0.5 * gaussian(generator, 6, 7, 2)
    x, v = nl.trajectories(nl.fields.Sinkhorn(0.5, 1e-8), x, y, STEP, 5)
    node = torch.tensor([-math.sqrt(0.6), 0.0, math.sqrt(0.6)], dtype=F64) / 2 + 0.5
    weight = torch.tensor([5.0, 8.0, 5.0], dtype=F64) / 18

    def phi(x):
        return torch.sin(x[..., 0] + 0.5 * x[..., 1]).mean((-1, -2))

    rate = torch.zeros(5, dtype=F64)
    for theta, w in zip(node, weight, strict=True):
        here = x + theta * STEP * v
        slope = torch.cos(here[..., 0] + 0.5 * here[..., 1])
        rate += w * STEP * (slope * (v[..., 0] + 0.5 * v[..., 1])).mean((-1, -2))
    change = phi(x)[1:] - phi(x)[:-1]
    assert (change - rate[:-1]).abs().max() < 1e-3
    assert change.abs().max() > 0.1
    damaged("another sign in the continuity equation", (change + rate[:-1]).abs().max() < 1e-3)
    # The energy inequality, for the mean over minibatches of a shared particle.
    v[:, :, 0] = v[:, :1, 0] + 0.3 * (v[:, :, 0] - v[:, :1, 0])
    sharp(v[:, :, 0].mean(1).square().sum(), v[:, :, 0].square().sum(-1).mean(1).sum())
    damaged("the mean spends more", v.mean(1).square().sum() > v.square().mean(1).sum())


def check_flow_of_the_mean(solver, allowed):
    """Lone trajectories of short steps: the flow of their conditional mean has their law throughout."""
    a, b, steps = 1.0, 0.6, 160
    eta = 4 / steps
    generator = torch.Generator().manual_seed(1)
    x, y = gaussian(generator, 2, 200, 1, 1)
    x, y = (z / z.square().mean().sqrt() for z in (x, y))
    y = y - x * (x * y).mean()  # uncorrelated in the sample as well
    y = b**0.5 * y / y.square().mean().sqrt()
    X, V = nl.trajectories(nl.fields.Sinkhorn(1.0, 1e-6), x, y, eta, steps)
    slope = (X * V).mean((1, 2, 3)) / X.square().mean((1, 2, 3))
    assert (slope - lone(a, b, eta, steps)[0]).abs().max() < 1e-9
    model = model_of(Line(4 * slope), 1, steps, eta)
    path = model.path(1, steps, solver, start=torch.ones(1, 1))[:, 0, 0].double()
    own = X.square().mean((1, 2, 3))
    assert (path[:-1].square() / own - 1).abs().max() < allowed
    assert own.max() / own.min() > 1.5
    # Ten long steps are not a continuous time, and single particles do not go where the recorded ones went.
    long = lone(a, b, 0.4, 10)
    damaged("with long steps", abs((1 + 0.4 * long[0]).prod() ** 2 / long[2][-1] - 1) < 0.1)
    ends = (X[-1] + eta * V[-1]).flatten()
    damaged("the same particles", (ends - path[-1] * X[0].flatten()).square().mean() < 0.1 * ends.square().mean())


def check_crossing(noise):
    """Two particles that change places, blurred or not: the law arrives if the mean is smooth, and not if it is not."""
    bell = math.sqrt(2) * torch.erfinv((torch.arange(400) + 0.5) / 200 - 1)[:, None]
    start = torch.cat([side + noise * bell for side in (-1.0, 1.0)])

    def mean(x, s):
        if noise:
            return -2 * torch.tanh((1 - 2 * s) * x / noise**2)
        return -2 * x.sign() if s < 0.5 else 2 * x.sign()

    x, steps = start.clone(), 64
    for k in range(steps):
        x, _ = nl.particles.advance(mean, x, k / steps, 1 / steps, "rk4" if noise else "euler")
    arrived = nl.metrics.w2(x, -start.flip(0))
    if noise:
        assert arrived < 0.05
        damaged("particles keep their own ends", (x + start).abs().mean() < 1)
    else:
        damaged("for any mean velocity", arrived < 0.5)


@pytest.mark.parametrize(
    ("claim", "setting"),
    [(check_weak_form, (seed,)) for seed in range(2)]
    + [(check_flow_of_the_mean, ("euler", 0.05))]
    + [(check_crossing, (noise,)) for noise in (0.0, 0.3)],
)
def test_thm_marginals(claim, setting):
    """The continuity equation by Gauss' rule within the steps; the flow of the means against the closed form.

    Checked by: quadrature, closed form.
    """
    claim(*setting)


# thm-euler-blur -------------------------------------------------------------------------


def check_variance_lost(a, b, eta, steps):
    """Lone particles: each step of the mean loses the squared length times the price, and nothing else."""
    slope, price, variance = lone(a, b, eta, steps)
    assert ((variance[1:] - (1 + eta * slope) ** 2 * variance[:-1]) / (eta**2 * price) - 1).abs().max() < 1e-9
    # The library's sampler, with the exact field, and the library's trajectories.
    model = model_of(Line(eta * steps * slope), 1, steps, eta)
    path = model.path(1, steps, start=torch.ones(1, 1))[:, 0, 0].double()
    expected = a * torch.cumprod(torch.cat([torch.ones(1, dtype=F64), (1 + eta * slope) ** 2]), 0)
    assert (a * path.square() / expected - 1).abs().max() < 1e-4
    generator = torch.Generator().manual_seed(0)
    x, y = gaussian(generator, 2, 4000, 1, 1)
    X, V = nl.trajectories(nl.fields.Sinkhorn(0.3, 1e-6), a**0.5 * x, b**0.5 * y, eta, steps)
    own = (X[-1] + eta * V[-1]).square().mean()
    assert abs(own / variance[-1] - 1) < 0.1
    # The bound of part 2 for the second moment: H = 2, M = 0; linear fields, so G plays no part.
    L = eta * steps * slope.abs().max()
    h = 1 / steps
    s = h * torch.arange(1, steps + 1, dtype=F64)
    allowed = h**2 / 2 * (torch.exp(2 * L * (1 - s)) * 2 * (eta * steps) ** 2 * price).sum()
    assert 0 < variance[-1] - expected[-1] < allowed
    damaged("nothing is lost", abs(variance[-1] / expected[-1] - 1) < 0.01)
    damaged(
        "a step loses h times its price",
        ((variance[1:] - (1 + eta * slope) ** 2 * variance[:-1]) < 0.9 * eta**2 * price).any(),
    )


def check_linear(rate, steps):
    """X moves by h (rate X + noise) with fresh noise: the mean is the line, and part 2 bites, nearly for many steps."""
    h, noise = 1 / steps, 0.7
    true = mean = torch.ones((), dtype=F64)
    for _ in range(steps):
        true, mean = (1 + h * rate) ** 2 * true + h**2 * noise**2, (1 + h * rate) ** 2 * mean
    later = 1 - h * torch.arange(1, steps + 1, dtype=F64)
    bound = h**2 / 2 * (torch.exp(2 * rate * later) * 2 * noise**2).sum()
    sharp(true - mean, bound, at_least=0.8)
    sharp(true - mean, h / 2 * math.exp(2 * rate) * 2 * noise**2)
    damaged("half the constant", true - mean <= bound / 2)
    damaged("h squared in all", steps > 1 and true - mean <= h**2 / 2 * math.exp(2 * rate) * 2 * noise**2)
    damaged("no stretch", rate > 0.4 and steps > 8 and true - mean <= h**2 / 2 * steps * 2 * noise**2)
    # The same by the library's sampler.
    path = model_of(Line(torch.full((1,), rate, dtype=F64)), 1).sample(1, steps, start=torch.ones(1, 1))
    assert abs(float(path) ** 2 / mean - 1) < 1e-4


def check_minibatch_bound(k, n):
    """Part 3 at step k, for two data and particles in a tiny ball, against the price that twins measure."""
    eps, R, eta, steps = 4.0, 0.5, 0.2, 3
    generator = torch.Generator().manual_seed(n)
    trials = 400
    x, y = ((2 * torch.rand(2, trials, n, 1, generator=generator, dtype=F64) - 1) * R for _ in "xy")
    x[1, :, 0] = x[0, :, 0]
    X, V = (z[k] for z in nl.trajectories(nl.fields.Sinkhorn(eps, 1e-8), x.flatten(0, 1), y.flatten(0, 1), eta, steps))
    if k:  # no longer at the same place: regress on it instead, which can only raise the price
        place, speed = X[:, 0, 0], V[:, 0, 0]
        design = torch.stack([place**p for p in range(4)], 1)
        price = (speed - design @ torch.linalg.lstsq(design, speed).solution).square().mean()
    else:
        first, second = V.view(2, trials, n, 1)[:, :, 0, 0]
        price = (first - second).square().mean() / 2
    radius = max(R, 2 * R * (1 + eta) ** steps - R)
    s = radius**2 / eps
    grow = max(2, 8 * s)
    C1 = radius / 2 * math.exp(4 * s) * (grow * (1 + math.exp(2 * s) + 2 * math.cosh(s) ** 2) + 16)
    C2 = radius / 2 * math.exp(4 * s) * (grow * math.sinh(2 * s) + 16)
    L2 = math.exp(4 * s) * (1 + 5 * s + s * math.exp(2 * s) + 2 * s * math.cosh(s) ** 2)
    bound = 2 * (1 + eta * (s + L2)) ** (2 * k) * (C1**2 + C2**2) / n
    assert 0 < price < bound
    return float(price)


def check_minibatch_rate():
    """Four times the minibatch, a quarter of the price, at every step: the powers of part 3 are right."""
    for k in (0, 2):
        fall = check_minibatch_bound(k, 32) / check_minibatch_bound(k, 8)
        assert 0.15 < fall < 0.4
        damaged("1 / n squared", fall < 1 / 12)


def check_one_step(seed, n):
    """Any pool: the law of total covariance, and Jensen's inequality, with a particle shared by all minibatches."""
    generator = torch.Generator().manual_seed(seed)
    x, y = gaussian(generator, 40, n, 2), 1 + gaussian(generator, 40, n + 2, 2)
    x[:, 0] = x[0, 0]
    X, V = nl.trajectories(nl.fields.Sinkhorn(0.5, 1e-8), x, y, STEP, 2)
    mine, mean = X[1, :, 0], X[0, 0, 0] + STEP * V[0, :, 0].mean(0)
    assert (mine.mean(0) - mean).abs().max() < 1e-9
    spread = (mine - mean).square().sum(-1).mean()
    assert abs(spread - STEP**2 * (V[0, :, 0] - V[0, :, 0].mean(0)).square().sum(-1).mean()) < 1e-9
    assert spread > 1e-3
    assert mine.norm(dim=1).mean() > mean.norm()
    damaged(
        "the step without its square",
        abs(spread / STEP - (V[0, :, 0] - V[0, :, 0].mean(0)).square().sum(-1).mean()) < 1e-9,
    )
    damaged("Jensen turned around", mine.square().sum(1).mean() <= mean.square().sum())
    return spread


def check_minibatch():
    """The blur of a step falls about like 1 / n, and in proportion to the square of the step."""
    spreads = [sum(check_one_step(seed, n) for seed in range(4)) for n in (4, 16, 64)]
    assert spreads[1] / spreads[0] < 0.5
    assert spreads[2] / spreads[1] < 0.45
    # Halved steps: half of what is lost by the end.
    lost = []
    for steps in (40, 80, 160):
        slope, _, variance = lone(1.0, 0.6, 4 / steps, steps)
        lost.append(float(variance[-1] - (1 + 4 / steps * slope).prod() ** 2))
    assert abs(lost[1] / lost[0] - 0.5) < 0.05
    assert abs(lost[2] / lost[1] - 0.5) < 0.03


@pytest.mark.parametrize(
    ("claim", "setting"),
    [(check_variance_lost, (1.0, 0.6, 0.4, 10)), (check_variance_lost, (0.5, 2.0, 0.2, 10))]
    + [(check_one_step, (seed, 5)) for seed in (10, 11)]
    + [(check_linear, setting) for setting in ((0.5, 1), (0.5, 20), (0.1, 20))]
    + [(check_minibatch_rate, ())]
    + [(check_minibatch, ())],
)
def test_thm_euler_blur(claim, setting):
    """Variances of lone Gaussian particles and of linear flows, exactly; minibatches by twins.

    Checked by: closed form, simulation.
    """
    claim(*setting)


# thm-network-error ----------------------------------------------------------------------


def check_equality(seed):
    """One datum: the pool is a function of the place, and constant errors attain the bound of Euler's steps."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.full((20, 1, 1), 1.5, dtype=F64)
    x, v = nl.trajectories(nl.fields.Sinkhorn(0.7, 1e-8), gaussian(generator, 20, 1, 1), y, STEP, STEPS)
    arrived = (x[-1] + STEP * v[-1]).flatten(0, 1)
    T, h = STEP * STEPS, 1 / STEPS
    errors = torch.rand(STEPS, generator=generator, dtype=F64)  # of one sign
    network = Line(torch.full((STEPS,), -T, dtype=F64), 1.5 * T + errors)
    model = model_of(network, 1)
    ends = model.sample(20, STEPS, start=x[0].flatten(0, 1)).double()
    losses = [
        (model._at(p.flatten(0, 1).float(), k / STEPS, None).double() - T * q.flatten(0, 1)).square().mean().detach()
        for k, (p, q) in enumerate(zip(x, v, strict=True))
    ]
    bound = torch.zeros((), dtype=F64)
    for loss in losses:
        bound = (1 - h * T) * bound + h * loss.sqrt()
    apart = nl.metrics.w2(ends, arrived)
    assert abs(apart / bound - 1) < 1e-4
    sharp(apart, bound * 1.0001, at_least=0.999)
    assert bound > 0.02
    damaged("the bound less a hundredth", apart <= 0.99 * bound)
    damaged("equality without the contraction", abs(apart / sum(h * loss.sqrt() for loss in losses) - 1) < 0.1)


def check_bound(seed):
    """A rough affine network on a pool of many particles: the samples are as near as the loss says."""
    generator = torch.Generator().manual_seed(seed)
    x, y = gaussian(generator, 8, 16, 1), 1 + 0.5 * gaussian(generator, 8, 16, 1)
    x, v = nl.trajectories(nl.fields.Sinkhorn(0.5, 1e-6), x, y, STEP, STEPS)
    T, h = STEP * STEPS, 1 / STEPS
    slopes = -2.0 + 4 * torch.rand(STEPS, generator=generator, dtype=F64)
    shifts = 2 * torch.rand(STEPS, generator=generator, dtype=F64)
    model = model_of(Line(slopes, shifts), 1)
    ends = model.sample(128, STEPS, start=x[0].flatten(0, 1)).double()
    bound = 0.0
    for k in range(STEPS):
        loss = (slopes[k] * x[k] + shifts[k] - T * v[k]).square().mean()
        bound = abs(1 + h * slopes[k]) * bound + h * loss.sqrt()
    distance = nl.metrics.w2(ends, (x[-1] + STEP * v[-1]).flatten(0, 1))
    assert 0.02 * bound < distance < bound


def check_gronwall(rate):
    """In continuous time: fields of constant slope, whose difference is a constant vector, attain the bound."""
    steps, error = 50, 0.3
    generator = torch.Generator().manual_seed(4)
    start = gaussian(generator, 30, 1).float()
    ends = []
    for shift in (1.0, 1.0 + error):
        network = Line(torch.full((1,), rate, dtype=F64), torch.full((1,), shift, dtype=F64))
        ends.append(model_of(network, 1).sample(30, steps, "rk4", start=start))
    bound = error * math.expm1(rate) / rate
    assert abs(nl.metrics.w2(*ends) / bound - 1) < 1e-4
    sharp(nl.metrics.w2(*ends), bound * 1.0001, at_least=0.999)
    damaged("errors only add up", abs(nl.metrics.w2(*ends) / error - 1) < 0.1)
    if rate > 0:
        damaged("without the stretch", nl.metrics.w2(*ends) <= error)
    # A field that is not Lipschitz: no error at all, one start, and two solutions of W' = 2 sqrt|W|, 0 and s^2.
    grid = torch.linspace(0, 1, 50, dtype=F64)
    assert (2 * grid - 2 * (grid**2).sqrt()).abs().max() < 1e-12
    damaged("not Lipschitz", abs(grid[-1] ** 2 - 0) <= 0)
    away = model_of(network, 1).sample(30, steps, "rk4", start=start + 0.1)
    assert abs(nl.metrics.w2(away, ends[1]) / (0.1 * math.exp(rate)) - 1) < 1e-4


@pytest.mark.parametrize(
    ("claim", "setting"),
    [(check_equality, (seed,)) for seed in range(2)]
    + [(check_bound, (seed,)) for seed in range(3)]
    + [(check_gronwall, (rate,)) for rate in (-2.0, 1.5)],
)
def test_thm_network_error(claim, setting):
    """Networks of exact lines, whose ends and losses are known; the library samples.

    Checked by: closed form, simulation.
    """
    claim(*setting)
