"""Maps, functionals and JKO flows: each against another route, and under what a reader may do to them."""

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from scipy import integrate
from test_bad_input import refused
from torch import Generator, Tensor
from torch.utils.data import DataLoader, TensorDataset

import nsgf_lite as nl
from nsgf_lite.functionals import JSD, KL, Ball, Entropy, FreeEnergy, Interaction, KLSamples, Moments, Move, Potential
from nsgf_lite.models.jko import SCHEMES
from nsgf_lite.networks import ICNN, LogRatio, ResidualMap, seeded

F64 = torch.float64


def chance(seed=0):
    return Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=chance(seed), dtype=F64)


def convex(d, seed=0, **options):
    """A network far from its beginning."""
    net = seeded(lambda: ICNN(d, width=8, **options), chance(seed)).double()
    net.standardise(2 * normal(100, d) + 1)
    with torch.no_grad():
        for p in net.parameters():
            p += 0.2 * torch.randn(p.shape, generator=chance(seed + 1), dtype=F64)
        net.root *= 0.1  # so that its convexity is not the quadratic form's
        net.last += 4
        net.affine[1].bias += 20  # its last units add what they get
    return net


# --- maps -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [ResidualMap, ICNN, lambda d: ResidualMap(d, depth=0)])
def test_maps_begin_at_the_identity(make):
    net, x = seeded(lambda: make(3), chance()).double(), 3 * normal(50, 3) + 5
    net.standardise(x)
    assert float((net(x) - x).detach().abs().max()) < (1e-12 if isinstance(net, ResidualMap) else 0.05)
    assert float(seeded(lambda: LogRatio(3), chance())(normal(5, 3).float()).detach().abs().max()) == 0


@pytest.mark.parametrize("d", [1, 2, 5])
def test_a_convex_network_is_the_gradient_of_a_convex_function(d):
    net, x = convex(d), 2 * normal(40, d, seed=5)
    z = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(net.potential(z).sum(), z)
    assert torch.allclose(net(x), slope, atol=1e-12)
    step, e = 1e-5, torch.eye(d, dtype=F64)
    differences = torch.stack([(net(x + step * e[k]) - net(x - step * e[k])) / (2 * step) for k in range(d)], -1)
    hessian = net.hessian(x).detach()
    assert float((differences - hessian).detach().abs().max()) < 1e-8
    assert float((differences - differences.mT).detach().abs().max()) < 1e-8
    assert float(torch.linalg.eigvalsh(hessian).min()) > net.strong
    assert torch.allclose(net.log_det(x), torch.logdet(differences), atol=1e-6)
    twin = ICNN(d, width=8, strong=0.55).double()
    twin.load_state_dict(net.state_dict())
    half = (twin.potential(x) - net.potential(x)) / (x - net.centre).square().sum(1)
    assert torch.allclose(half, torch.full_like(half, 0.25))
    y = normal(40, d, seed=6)
    middle = net.potential((x + y) / 2)
    gap = (net.potential(x) + net.potential(y)) / 2 - middle
    assert bool((gap >= net.strong / 8 * (x - y).square().sum(1) - 1e-12).all())


def test_the_sampled_determinant_has_the_exact_one_s_gradient_on_average():
    net, x = convex(3), normal(30, 3, seed=2)
    exact = torch.autograd.grad(net.log_det(x).mean(), list(net.parameters()), allow_unused=True)
    draws, g = 400, chance(3)
    found = [torch.zeros_like(p) for p in net.parameters()]
    squares = [torch.zeros_like(p) for p in net.parameters()]
    for _ in range(draws):
        one = torch.autograd.grad(net.log_det_surrogate(x, g).mean(), list(net.parameters()), allow_unused=True)
        for total, square, grad in zip(found, squares, one, strict=True):
            total += 0 if grad is None else grad / draws
            square += 0 if grad is None else grad.square() / draws
    off = sum(float((a - (0 if b is None else b)).square().sum()) for a, b in zip(found, exact, strict=True))
    noise = sum(float((s - a.square()).sum()) for a, s in zip(found, squares, strict=True)) / draws
    size = sum(float(b.square().sum()) for b in exact if b is not None)
    assert off < 4 * noise < 0.01 * size
    (short,) = torch.autograd.grad(net.log_det_surrogate(x, chance(3), 1).mean(), net.affine[0].weight)
    (enough,) = torch.autograd.grad(net.log_det_surrogate(x, chance(3)).mean(), net.affine[0].weight)
    assert float((short - enough).norm() / enough.norm()) > 1e-3  # one conjugate gradient is not three


@pytest.mark.parametrize("d", [1, 4])
def test_inverse(d):
    net, x = convex(d), 2 * normal(60, d, seed=4)
    assert float((net.inverse(net(x).detach(), tol=1e-7) - x).abs().max()) < 1e-5
    with pytest.warns(RuntimeWarning, match="stopped after 1 iterations with images off by"):
        net.inverse(net(x).detach() + 3, max_iter=1)


def test_wrong_maps():
    refused(lambda: ICNN(2, strong=1.0), "strong must be below 1")
    refused(lambda: ICNN(0), "dimension")
    refused(lambda: LogRatio(2, depth=0), "depth")
    refused(lambda: ResidualMap(2, width=0), "width")
    steep = seeded(lambda: LogRatio(2, spectral=True), chance())
    for _ in range(100):  # of the power method
        steep(normal(5, 2).float())
    sizes = [float(torch.linalg.matrix_norm(f.weight.detach(), 2)) for f in steep.layers if hasattr(f, "weight")]
    assert sizes[:-1] == pytest.approx([1.0, 1.0], abs=0.02)


# --- functionals: at the best critic the value, and below it at any other ---------------------------------------------


def gap(functional, reference, x, z, s):
    """Mean and standard error of the critic's value, the critic a function of points."""
    here = functional.on_particles(s(x), x, reference, Move(x, None, chance()))
    there = functional.on_reference(s(z), reference)
    error = math.sqrt(float(here.var() / len(here) + there.var() / len(there)))
    unit = functional.unit(reference)
    return unit * float(here.mean() - there.mean()), unit * error


@pytest.mark.parametrize("other", [0.0, 0.3])
def test_kl(other):
    """Between Gaussians, up to the logarithm of the mass that the density lacks."""
    P = torch.distributions.MultivariateNormal(
        torch.tensor([1.0, -0.5], dtype=F64), torch.diag(torch.tensor([0.8, 1.5], dtype=F64))
    )
    Q = torch.distributions.MultivariateNormal(torch.zeros(2, dtype=F64), 2 * torch.eye(2, dtype=F64))
    torch.manual_seed(0)
    x = P.mean + normal(400_000, 2, seed=1) * P.variance.sqrt()
    functional = KL(lambda x: Q.log_prob(x) + 7.0)
    reference = functional.reference()
    crowd = 0.5 + 1.3 * normal(10_000, 2, seed=2)
    reference.renew(crowd)
    assert isinstance(reference, Moments)
    assert torch.allclose(reference.mean, crowd.mean(0))
    assert torch.allclose(reference.factor @ reference.factor.T, torch.cov(crowd.T))
    own = torch.distributions.MultivariateNormal(reference.mean, scale_tril=reference.factor)
    assert torch.allclose(reference.log_density(x[:9]), own.log_prob(x[:9]))
    z = reference.draw(400_000, chance(3)).double()
    best = lambda x: P.log_prob(x) - own.log_prob(x)  # noqa: E731
    value, error = gap(functional, reference, x, z, lambda x: best(x) + other * torch.tanh(x[:, 0]))
    truth = float(torch.distributions.kl_divergence(P, Q)) - 7.0
    if other:
        assert value < truth - 5 * error
    else:
        assert abs(value - truth) < 4 * error < 0.02


def test_a_reference_follows_as_a_mixture_does():
    """A quarter of new particles in it: the moments of three copies of the old beside one of the new, all as laws."""
    old, new = 0.5 + 1.3 * normal(4000, 2, seed=2), 3 + 0.2 * normal(4000, 2, seed=3)
    reference = KL(lambda x: x, follow=0.25).reference()
    reference.renew(old)
    reference.follow(new)
    both = torch.cat([old, old, old, new])
    assert torch.allclose(reference.mean, both.mean(0))
    assert torch.allclose(reference.factor @ reference.factor.T, torch.cov(both.T), rtol=1e-3)
    still = KL(lambda x: x).reference()
    still.renew(old)
    still.follow(new)
    assert torch.equal(still.mean, old.mean(0))
    all_of_it = KL(lambda x: x, follow=1).reference()
    all_of_it.renew(old)
    all_of_it.follow(new)
    assert torch.allclose(all_of_it.factor @ all_of_it.factor.T, torch.cov(new.T))
    refused(lambda: all_of_it.follow(new[:2]), "covariance of 2 particles in dimension 2")
    with pytest.raises(FloatingPointError, match="some are not finite: the map diverged"):
        all_of_it.follow(new * math.inf)
    for share in (-0.1, 1.5, math.nan, True, "1"):
        refused(lambda share=share: KL(lambda x: x, follow=share), "follow must be")


def test_a_law_sixty_times_narrower_needs_a_reference_that_follows():
    """The exact step is known; beside a reference of the step's beginning the critic says nothing true."""
    precision, law = 4000.0, (torch.tensor(v, dtype=F64) for v in (0, 1, 1, 1 / 4000))
    mean, variance = (float(part) for part in nl.closed_forms.jko_gaussian(*law, 0.1))
    level = -1 - math.log(2 * math.pi * variance) + precision * (variance + (mean - 1) ** 2)  # of both coordinates

    def trained(follow):
        functional = KL(lambda x: -precision / 2 * (x - 1).square().sum(1), follow)
        model = nl.JKOFlow(functional, 0.1, 1, particles=5000, transport=lambda d: ResidualMap(d, depth=0))
        model.fit(ROUND, nl.Training(steps=400, batch=256, rate=0.02), progress=False)
        x = model.sample(4000).double()
        return float((x.mean(0) - mean).abs().max()), float((x.var(0) / variance - 1).abs().max()), model.values[0]

    off, wide, value = trained(0.1)
    assert off < 0.01 and wide < 0.1 and abs(value - level) < 0.1
    off, wide, value = trained(0.0)
    assert wide > 0.5 and abs(value - level) > 100


@dataclass(frozen=True)
class Whole(KL):
    """KL that a critic's every ascent evaluates whole."""

    def on_particles(self, s, x, reference, move):
        return super().on_particles(s, x, reference, Move(x, None, chance()))


def test_only_the_last_ascent_of_a_turn_asks_for_the_density():
    """The others need the critic's gradient alone, and the maps are the same to the bit."""
    asked = []

    def log_density(x):
        asked.append(len(x))
        return -(x - 1).square().sum(1)

    def trained(functional):
        asked.clear()
        model = nl.JKOFlow(functional, 0.1, 2, particles=500, ascents=3, transport=lambda d: ResidualMap(d, depth=0))
        model.fit(ROUND, nl.Training(steps=12, batch=64, rate=0.02), progress=False)
        return model.sample(50), len(asked)

    (lean, few), (whole, many) = trained(KL(log_density)), trained(Whole(log_density))
    assert torch.equal(lean, whole)
    assert (few, many) == (2 * 12 + 2, 4 * 12 + 2)  # ascents and map, and a value for each of two steps


def test_kl_of_samples_and_jensen_shannon():
    """By quadrature on the line; Jensen and Shannon's is the sum of both divergences to the middle, not their mean."""
    P, Q = torch.distributions.Normal(0.0, 1.0), torch.distributions.Normal(1.0, 1.5)
    p, q = (lambda t, law=law: math.exp(float(law.log_prob(torch.tensor(t)))) for law in (P, Q))
    x, z = normal(400_000, 1, seed=1), 1 + 1.5 * normal(400_000, 1, seed=2)
    ratio = lambda x: (P.log_prob(x) - Q.log_prob(x))[:, 0]  # noqa: E731
    kl = integrate.quad(lambda t: p(t) * math.log(p(t) / q(t)), -9, 9)[0]
    middle = lambda t: (p(t) + q(t)) / 2  # noqa: E731
    both = integrate.quad(lambda t: p(t) * math.log(p(t) / middle(t)) + q(t) * math.log(q(t) / middle(t)), -9, 9)[0]
    for functional, truth, best in [(KLSamples(z), kl, ratio), (JSD(z), both, lambda x: -ratio(x))]:
        value, error = gap(functional, None, x, z, best)
        assert abs(value - truth) < 4 * error < 0.05 * truth
        less, error = gap(functional, None, x, z, lambda x, best=best: best(x) + 0.5 * torch.sin(x[:, 0]))
        assert less < truth - 4 * error
    assert KLSamples(z.float()).reference().draw(5, chance()).shape == (5, 1)


@pytest.mark.parametrize("m", [1.5, 2.0, 3.0])
def test_entropy(m):
    """Of the law 3/4 (1 - x²) on [-1, 1], by quadrature, whatever the ball; h = ΩP, and softplus(s) = h."""
    law = lambda t: 0.75 * (1 - t * t)  # noqa: E731
    truth = integrate.quad(lambda t: law(t) ** m, -1, 1)[0] / (m - 1)
    u = torch.linspace(0, 1, 200_001, dtype=F64)[1:-1]
    grid = torch.linspace(-1, 1, 20_001, dtype=F64)
    cumulative = (grid - grid**3 / 3 + 2 / 3) * 0.75
    x = torch.tensor(np.interp(u, cumulative, grid)).unsqueeze(1)
    functional = Entropy(m, margin=0.5)
    reference = functional.reference()
    reference.renew(x)
    assert isinstance(reference, Ball) and reference.radius == pytest.approx(1.5, rel=5e-3)
    z = torch.linspace(-reference.radius, reference.radius, 200_001, dtype=F64).unsqueeze(1)

    def critic(shift):
        def s(x):
            h = math.exp(reference.log_volume) * (law(x[:, 0]).clamp_min(1e-9) + shift)
            return h + torch.log(-torch.expm1(-h))  # the inverse of softplus

        return s

    assert gap(functional, reference, x, z, critic(0.0))[0] == pytest.approx(truth, rel=1e-3)
    assert gap(functional, reference, x, z, critic(0.1))[0] < truth * 0.995
    refused(lambda: reference.check(x * 2), "outside of the reference ball")
    assert float(reference.draw(1000, chance()).norm(dim=1).max()) <= reference.radius


def test_the_uniform_law_on_the_ball():
    """Its radius has the power law of the dimension, and its volume is the ball's."""
    ball = Ball(0.0, torch.zeros(3), 2.0)
    x = ball.draw(100_000, chance())
    assert float((x.norm(dim=1) < 1).double().mean()) == pytest.approx(1 / 8, abs=0.004)
    assert math.exp(ball.log_volume) == pytest.approx(4 / 3 * math.pi * 8)


def test_free_energy_is_the_change_of_variables():
    """With a linear map between Gaussians: KL, but for the entropy of the law it began with."""
    net = seeded(lambda: ICNN(2, width=4), chance()).double()
    with torch.no_grad():
        net.last.fill_(-40.0)  # the quadratic form alone
        net.root.copy_(torch.tensor([[1.2, 0.3], [0.1, 0.7]]))
        net.slope.copy_(torch.tensor([0.5, -1.0]))
    x = normal(20_000, 2)
    S = net.root.detach().T @ net.root.detach() + net.strong * torch.eye(2, dtype=F64)
    P = torch.distributions.MultivariateNormal(net.slope.detach(), S @ S)
    Q = torch.distributions.MultivariateNormal(torch.zeros(2, dtype=F64), torch.eye(2, dtype=F64))
    move = Move(x, net, chance())
    for determinant in ("exact", "sampled"):
        term = FreeEnergy(Q.log_prob, determinant)
        found = term.on_particles(None, net(x).detach(), None, Move(x, net, chance(), exact=True)).mean().detach()
        entropy = -float(
            torch.distributions.MultivariateNormal(torch.zeros(2, dtype=F64), torch.eye(2, dtype=F64)).entropy()
        )
        assert float(found) + entropy == pytest.approx(float(torch.distributions.kl_divergence(P, Q)), abs=0.06)
    refused(lambda: FreeEnergy(Q.log_prob, "rough"), "determinant")
    other = Move(x, ResidualMap(2), chance())
    refused(
        lambda: FreeEnergy(Q.log_prob).on_particles(None, x, None, other), "transport must make an ICNN", "ResidualMap"
    )
    assert move.exact is False


def test_energies_without_a_critic():
    """By double loops; the explicit step's slope is the particle gradient of the energy times their number."""
    W = lambda z: z.square().sum(-1).square() / 4 - z.square().sum(-1) / 2  # noqa: E731
    x = normal(7, 2)
    energy = sum(float(W(x[i] - x[j])) for i in range(7) for j in range(7) if i != j) / (2 * 7 * 6)
    found = Interaction(W).on_particles(None, x, None, Move(x, None, chance())).mean()
    assert float(found) == pytest.approx(energy)
    z = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(Interaction(W).on_particles(None, z, None, Move(z, None, chance())).mean() * 7, z)
    assert torch.allclose(
        Interaction(W).slope(x, x), slope * 6 / 7
    )  # where each is of the crowd, without a force on itself
    many = normal(1003, 2)
    for k in (2, 1001):  # of more than a thousand particles the first thousand are the law
        apart = many[k] - torch.cat([many[:k], many[k + 1 : 1000]] if k < 1000 else [many[:1000]])
        found = Interaction(W).on_particles(None, many, None, Move(many, None, chance()))[k]
        assert float(found) == pytest.approx(float(W(apart).mean()) / 2)
    other = normal(4, 2, seed=3)
    mean = torch.stack([sum((d.square().sum() - 1) * d for d in z - other) / 4 for z in x])
    assert torch.allclose(Interaction(W).slope(x, other), mean)
    log = Interaction(lambda z: -z.square().sum(-1).log() / 2)  # singular where a particle meets itself
    assert bool(torch.isfinite(log.slope(x, x)).all())
    V = Potential(lambda x: x.square().sum(1))
    assert torch.allclose(V.slope(x, x), 2 * x)
    both = 2 * Interaction(W) + 0.5 * V
    assert torch.allclose(both.slope(x, other), 2 * mean + x)
    assert [factor for factor, _ in (3 * both).terms()] == [6.0, 1.5]
    refused(lambda: Interaction(W).on_particles(None, x[:1], None, Move(x, None, chance())), "two particles")
    refused(lambda: KL(lambda x: x).slope(x, x), "no explicit step")


@pytest.mark.parametrize("factor", [0, -1, math.nan, "2", True])
def test_wrong_factors(factor):
    refused(lambda: factor * Entropy(2) if not isinstance(factor, str) else Entropy(2).__rmul__(factor), "factor")


def test_wrong_functionals():
    refused(lambda: Entropy(1.0), "m must be greater than 1")
    refused(lambda: Entropy(2, margin=0), "margin")
    for make, name in ((KL, "log_density"), (FreeEnergy, "log_density"), (Potential, "V"), (Interaction, "W")):
        refused(lambda make=make: make(3), f"{name} must be a function of points, got 3")
    refused(lambda: FreeEnergy(lambda x: x, iterations=0), "iterations")
    refused(
        lambda: KL(lambda x: x).reference().renew(normal(3, 3)), "covariance of 3 particles in dimension 3", "too few"
    )
    refused(lambda: Moments().renew(normal(50, 1) * torch.ones(1, 2, dtype=F64)), "singular")


# --- flows ------------------------------------------------------------------------------------------------------------

FEW = nl.Training(steps=24, batch=32, rate=3e-3, every=5)
ROUND = nl.toy.Gaussian()
AWAY = KL(lambda x: -(x - 1).square().sum(1) / 2)


def tiny(functional=AWAY, **options):
    nets = {
        "transport": lambda d: ResidualMap(d, width=8, depth=1),
        "critic": lambda d: LogRatio(d, width=8, depth=1),
    }
    return nl.JKOFlow(functional, 0.2, 3, **{"particles": 500, **nets, **options})


KINDS = {
    "particles": {},
    "follow": {"functional": KL(AWAY.log_density, follow=0.3)},
    "fresh": {"particles": None},
    "trapezoid": {"scheme": "trapezoid"},
    "whole": {"whole": True},
    "whole, fresh": {"whole": True, "particles": None},
    "turns": {"ascents": 2, "descents": 2},
    "explicit": {"explicit": Interaction(lambda z: z.square().sum(-1))},
    "crank-nicolson": {"scheme": "crank-nicolson"},
    "dropout": {"critic": lambda d: torch.nn.Sequential(LogRatio(d, width=8, depth=1), torch.nn.Dropout(0.3))},
    "spectral": {"critic": lambda d: LogRatio(d, width=8, depth=1, spectral=True)},
    "data": {"functional": JSD(nl.toy.Moons())},
    "loader": {"functional": JSD(DataLoader(TensorDataset(normal(90, 2).float()), 16))},
    "data, trapezoid": {"functional": KLSamples(normal(90, 2)), "scheme": "trapezoid"},
    "sum": {"functional": 0.5 * Entropy(2, margin=2.0) + Interaction(lambda z: z.square().sum(-1))},
    "sampled": {
        "functional": FreeEnergy(lambda x: -(x - 1).square().sum(1) / 2, "sampled"),
        "transport": lambda d: ICNN(d, width=4, depth=1),
    },
    "convex": {
        "functional": FreeEnergy(lambda x: -(x - 1).square().sum(1) / 2),
        "transport": lambda d: ICNN(d, width=4, depth=1),
    },
}


@pytest.mark.parametrize(("every", "kind"), [(5, kind) for kind in KINDS] + [(8, kind) for kind in list(KINDS)[:5]])
def test_an_interrupted_flow_goes_on_to_the_bit(every, kind, tmp_path):
    """Stopped in every JKO step, also where a checkpoint ends one; the global generator has no part in it."""
    budget, file = replace(FEW, every=every), tmp_path / "run"
    torch.manual_seed(1)
    whole = tiny(**KINDS[kind]).fit(ROUND, budget, progress=False)
    torch.manual_seed(2)
    for stop in (9, 17) if every == 8 else (7, 11, 19):
        _stop_after(tiny(**KINDS[kind]), stop, file, budget)
    for _ in range(2):  # the second has nothing left to do
        last = tiny(**KINDS[kind]).fit(ROUND, budget, checkpoint=file, progress=False)
    assert last.losses == whole.losses and last.values == whole.values and len(last.values) == 3
    start = normal(20, 2).float()
    assert torch.equal(last.path(20, start=start), whole.path(20, start=start))


class Stopped(Exception):
    pass


def _stop_after(model, step, file, budget):
    """Fit until the loss of this step is asked for, as a kill would end it."""
    from nsgf_lite.models import turns

    plain = turns.Run.loss

    def loss(run, network, at):
        if at == step:
            raise Stopped
        return plain(run, network, at)

    turns.Run.loss = loss
    try:
        with pytest.raises(Stopped):
            model.fit(ROUND, budget, checkpoint=file, progress=False)
    finally:
        turns.Run.loss = plain


@pytest.mark.parametrize("kind", KINDS)
def test_files(kind, tmp_path):
    model = tiny(**KINDS[kind]).fit(ROUND, FEW, progress=False)
    model.save(tmp_path / "model")
    twin = tiny(**KINDS[kind]).load(tmp_path / "model")
    start = normal(20, 2).float()
    assert torch.equal(twin.path(20, start=start), model.path(20, start=start))
    refused(lambda: twin.sample(20), "a loaded model has no source")
    refused(lambda: tiny(**{**KINDS[kind], "ascents": 5}).load(tmp_path / "model"), "ascents")


def test_paths():
    model = tiny().fit(ROUND, FEW, progress=False)
    path = model.path(50, generator=chance(4))
    assert path.shape == (4, 50, 2)
    assert torch.equal(model.sample(50, upto=2, generator=chance(4)), path[2])
    assert torch.equal(model.sample(50, upto=0, generator=chance(4)), ROUND.sample(50, chance(4)))
    assert torch.equal(model.sample(50), model.sample(50))
    whole = tiny(whole=True).fit(ROUND, FEW, progress=False)
    path = whole.path(50, generator=chance(4))
    assert torch.equal(path[3], whole.kept[2](path[0]).detach())


def gaussian(mean, scale):
    """Log-density of a Gaussian law, not normalised."""
    return lambda x: -((x - mean) / scale).square().sum(1) / 2


@pytest.mark.parametrize("kind", ["crowd", "fresh", "whole"])
def test_a_step_of_kl_between_gaussians(kind):
    """Against the closed form, whose mean is 2/3 and then 10/9."""
    options = {"fresh": {"particles": None}, "whole": {"whole": True}, "crowd": {}}[kind]
    model = nl.JKOFlow(
        KL(lambda x: -(x - 2).square().sum(1) / 2 - math.log(2 * math.pi)),
        0.5,
        2,
        transport=lambda d: ResidualMap(d, depth=0),
        critic=lambda d: LogRatio(d, width=8, depth=1),
        ascents=2,
        **options,
    )
    law = nl.toy.Gaussian((0.0, 0.0), ((4.0, 0.0), (0.0, 4.0)))
    model.fit(law, nl.Training(steps=400, batch=500, rate=0.02), progress=False)
    step, law, goal = nl.closed_forms.jko_gaussian, (0.0, 4.0), (2.0, 1.0)
    start = 2 * torch.randn(20_000, 2, generator=chance(5))
    for row, value in zip(model.path(20_000, start=start)[1:], model.values, strict=True):
        law = step(*law, *goal, 0.5)
        mean, sigma = float(law[0]), math.sqrt(float(law[1]))
        assert float((row.mean(0) - mean).abs().max()) < 0.06
        assert float((row.std(0) / sigma - 1).abs().max()) < 0.06
        truth = 2 * ((mean - 2) ** 2 + sigma**2 - 1 - 2 * math.log(sigma)) / 2
        assert value == pytest.approx(truth, abs=0.15)


@pytest.mark.parametrize("scheme", ["jko", "trapezoid", "crank-nicolson"])
def test_schemes_are_told_apart(scheme):
    """The second step of a flow is nearer to its scheme's closed form than the others are to one another."""
    model = nl.JKOFlow(
        KL(lambda x: -(x - 2).square().sum(1) / 2),
        2.0,
        2,
        scheme=scheme,
        transport=lambda d: ResidualMap(d, depth=0),
        critic=lambda d: LogRatio(d, width=8, depth=1),
        ascents=2,
    )
    law = nl.toy.Gaussian((0.0, 0.0), ((4.0, 0.0), (0.0, 4.0)))
    model.fit(law, nl.Training(steps=1000, batch=1000, rate=0.02), progress=False)
    first = nl.closed_forms.jko_gaussian(0.0, 4.0, 2.0, 1.0, 2.0)
    ends = {kind: nl.closed_forms.jko_gaussian(*first, 2.0, 1.0, 2.0, kind) for kind in SCHEMES}
    x = model.sample(20_000, start=2 * torch.randn(20_000, 2, generator=chance(5)))

    def off(kind):
        return max(float((x.mean(0) - ends[kind][0]).abs().max()), float((x.std(0) - ends[kind][1].sqrt()).abs().max()))

    others = [kind for kind in SCHEMES if kind != scheme]
    assert off(scheme) < 0.06 and off(scheme) < 0.7 * min(off(kind) for kind in others)


def test_density():
    """Against the density of the law that the maps make of a Gaussian: its mass, and its mean, on a grid."""
    model = tiny(FreeEnergy(gaussian(1.0, 0.5)), transport=lambda d: ICNN(d, width=8))
    model.fit(ROUND, nl.Training(steps=90, batch=64, rate=0.01), progress=False)
    side = torch.linspace(-5, 5, 101, dtype=F64)
    grid = torch.cartesian_prod(side, side)
    start = lambda x: -x.square().sum(1) / 2 - math.log(2 * math.pi)  # noqa: E731
    for upto in (0, 1, 3):
        p = model.log_density(grid, start=start, upto=upto).exp() * 0.01
        assert float(p.sum()) == pytest.approx(1, abs=1e-3)
        x = model.sample(200_000, upto=upto, generator=chance(1)).double()
        assert float((p @ grid - x.mean(0)).abs().max()) < 0.01
        assert float((p @ grid.square() - x.square().mean(0)).abs().max()) < 0.02
    refused(
        lambda: tiny().fit(ROUND, FEW, progress=False).log_density(grid, start=start), "transport must make an ICNN"
    )
    pushed = tiny(**KINDS["explicit"]).fit(ROUND, FEW, progress=False)
    refused(lambda: pushed.log_density(grid, start=start), "explicit")
    refused(lambda: model.log_density(grid[:, :1], start=start), r"x must have shape \(n, 2\)")
    # a source without a density far out: nor has its image there, and the same within
    cut = lambda x: torch.where(x.norm(dim=1) < 2, start(x), -math.inf)  # noqa: E731
    inside = model.log_density(grid, start=cut).isfinite()
    assert 0 < int(inside.sum()) < len(grid)
    assert torch.equal(model.log_density(grid, start=cut)[inside], model.log_density(grid, start=start)[inside])
    for wrong in (math.nan, math.inf):
        with pytest.raises(FloatingPointError, match=f"start is {wrong} at {len(grid)}"):
            model.log_density(grid, start=lambda x, wrong=wrong: torch.full_like(x[:, 0], wrong))


def test_the_bar_shows_step_and_value(capsys):
    tiny().fit(ROUND, nl.Training(steps=300, batch=8))
    said = capsys.readouterr().err
    assert "JKOFlow" in said and "step=3/3" in said and "F=" in said and "loss=" in said


# --- what is refused --------------------------------------------------------------------------------------------------


def bad_density(value, at=1):
    """A log-density that turns bad in the second JKO step, or later."""

    def log_density(x):
        out = -x.square().sum(1) / 2
        return torch.where(x[:, 0] > at, torch.full_like(out, value), out)

    return log_density


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_bad_density_is_named_with_its_step(value):
    with pytest.raises(
        FloatingPointError, match=r"in JKO step 1 of 3: log_density is (nan|-?inf) at \d+ of 32 particles"
    ):
        tiny(KL(bad_density(value))).fit(ROUND, FEW, progress=False)


def test_values_that_turn_bad_later_are_named_with_their_step():
    looks = []

    def late(x):
        looks.extend([len(x)] if len(x) == 500 else [])  # at all particles, as a step ends
        return -x.square().sum(1) / 2 - (math.inf if len(looks) == 2 else 0)

    with pytest.raises(FloatingPointError, match="in JKO step 2 of 3: log_density is -inf at 500 of 500"):
        tiny(KL(late)).fit(ROUND, FEW, progress=False)
    with pytest.raises(FloatingPointError, match="in JKO step 1 of 3: V is nan"):
        tiny(explicit=Potential(lambda x: x[:, 0] * math.nan)).fit(ROUND, FEW, progress=False)
    with pytest.raises(FloatingPointError, match="in JKO step 1 of 3: V is inf"):
        tiny(Potential(lambda x: x[:, 0] + math.inf)).fit(ROUND, FEW, progress=False)


def test_a_critic_learns_in_every_unit():
    """In ten dimensions Ω^{1-m} is 1e-9: the critic's gain is not in that unit."""
    moved = []
    for d in (2, 10):
        law = nl.toy.Gaussian((0.0,) * d, tuple(tuple(float(i == j) for i in range(d)) for j in range(d)))
        nets = []
        model = tiny(Entropy(2), critic=lambda d, nets=nets: nets.append(LogRatio(d, width=8, depth=1)) or nets[-1])
        model.fit(law, FEW, progress=False)
        moved.append(float(nets[0].layers[-1].weight.detach().abs().max()))
    assert moved[1] > 0.2 * moved[0] > 1e-3


def test_particles_at_one_place_have_no_force_on_each_other():
    log = Interaction(lambda z: -z.square().sum(-1).log() / 2)
    x = normal(5, 2)
    twice = torch.cat([x, x[:1]])
    value = log.on_particles(None, twice, None, Move(twice, None, chance()))
    assert bool(torch.isfinite(value).all())
    tiny(log, particles=20).fit(ROUND, nl.Training(steps=6, batch=32), progress=False)  # rows come twice


def test_what_a_flow_refuses():
    fit = lambda model, law=ROUND, budget=FEW: model.fit(law, budget, progress=False)  # noqa: E731
    refused(lambda: fit(tiny(KL(lambda x: x))), "in JKO step 1 of 3", r"shape \(32,\)", r"got \(32, 2\)")
    refused(lambda: fit(tiny(particles=2)), "in JKO step 1 of 3", "covariance of 2 particles")
    refused(
        lambda: fit(tiny(Entropy(2, margin=1e-6))), "in JKO step [12] of 3", "outside of the reference ball", "margin"
    )
    refused(lambda: fit(tiny(), budget=nl.Training(steps=2)), "at least 3 steps")
    refused(lambda: fit(tiny(), [ROUND, ROUND]), "classes")
    refused(lambda: fit(tiny(transport=lambda d: torch.nn.Linear(d, 1))), "must return a tensor of shape")
    refused(lambda: fit(tiny(critic=lambda d: torch.nn.Linear(d, d))), "must return a tensor of shape")
    refused(lambda: tiny().sample(3), "has not been fitted")
    refused(lambda: tiny().save("nowhere"), "has not been fitted")
    model = fit(tiny())
    refused(lambda: model.sample(3, upto=4), "upto must be None or an integer from 0 to 3")
    refused(lambda: model.sample(3, start=normal(3, 5)), r"start must have shape \(3, 2\)")
    for wrong in (
        {"step": 0},
        {"steps": 0},
        {"ascents": 0},
        {"descents": -1},
        {"particles": 0},
        {"scheme": "explicit"},
        {"whole": 1},
        {"explicit": 3},
        {"functional": lambda x: x},
    ):
        options = {"functional": AWAY, "step": 0.1, "steps": 2, **wrong}
        refused(lambda options=options: nl.JKOFlow(**options), *wrong)
    refused(lambda: nl.JKOFlow(AWAY, 0.1, 2, explicit=Potential(lambda x: x), whole=True), "explicit must be None")
    refused(lambda: nl.JKOFlow(AWAY + Potential(lambda x: x), 0.1, 2, scheme="trapezoid"), "without a critic")
    refused(lambda: tiny(explicit=Potential(lambda x: x), scheme="trapezoid"), "beside explicit steps")
    refused(lambda: fit(tiny(JSD([ROUND, ROUND]))), "samples must have no classes")
    refused(lambda: fit(tiny(JSD(normal(90, 3)))), "samples must have dimension 2", "got 3")
    refused(lambda: fit(tiny(Entropy(2)), torch.zeros(40, 2)), "at one place")
    with pytest.raises(TypeError):
        AWAY + 3


def test_a_critic_that_diverges_is_named_with_its_step():
    class Steep(torch.nn.Module):
        def __init__(self, d):
            super().__init__()
            self.w = torch.nn.Parameter(torch.ones(d, 1))

        def forward(self, x: Tensor) -> Tensor:
            return 1e3 * x @ self.w

    with pytest.raises(FloatingPointError, match="in JKO step 1 of 3: the critic diverged"):
        tiny(critic=Steep).fit(ROUND, FEW, progress=False)
