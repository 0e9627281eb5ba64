"""One-step generators: the loss and its gradient by hand, stacks against their members, resumed runs, and refusals."""

import math
from dataclasses import dataclass

import pytest
import torch
from test_bad_input import refused
from test_streams import POINTS, chance, loader, normal
from test_training import Fuse, same
from torch import nn

import nsgf_lite as nl
from nsgf_lite.models import drifting
from nsgf_lite.networks import Residual, Stack, seeded
from nsgf_lite.training import checkpoints

F = nl.fields
MOONS = nl.toy.Moons()
SHORT = nl.Training(steps=30, batch=16, rate=5e-3, warmup=5, ema=0.9, every=10)


def network(seed=0, out=2, inputs=2):
    return seeded(lambda: Residual(inputs, out, width=16, depth=1), chance(seed))


def train(net, field, target=MOONS, training=SHORT, **options):
    return drifting.train(net, field, target, training, progress=False, **options)


def once(**options):
    """One step that changes next to nothing and cuts no gradient."""
    return nl.Training(
        **{"steps": 1, "batch": 16, "rate": 1e-12, "warmup": 0, "decay": 0, "ema": 0.0, "clip": 1e9} | options
    )


# --- the loss ---------------------------------------------------------------------------------------------------------


def draws(seed, n=16, m=16, target=MOONS):
    """What the first step of a run draws: noise, then data."""
    g = chance(seed)
    return nl.toy.Gaussian().sample(n, g), target.sample(m, g)


@pytest.mark.parametrize(("step", "m"), [(1.0, 16), (0.3, 16), (2.0, 9)])
def test_the_loss_and_its_gradient(step, m):
    """step² E|V|², and minus twice the step times the mean of V df/dtheta, as if V were a constant."""
    net, field = network(), F.ScoreDifference(0.8)
    z, y = draws(3, m=m)
    x = net(z)
    v = field(x.detach(), y).detach()
    expected = torch.autograd.grad(-2 * step * (v * x).sum() / 16, list(net.parameters()))
    losses = train(net, field, training=once(), data=m, step=step, seed=3)
    assert losses == [pytest.approx(step**2 * float(v.square().sum()) / 16, rel=1e-4)]
    for p, grad in zip(net.parameters(), expected, strict=True):
        assert float((p.grad - grad).abs().max()) < 1e-4 * max(1.0, float(grad.abs().max()))


def test_the_gradient_is_the_functionals():
    """Twice the step times the gradient of MMD² through the generator; and not without the stop."""
    net, field = network(1), F.MMD(1.0)
    z, y = draws(0)

    def mmd2(x):
        k = lambda u, w: torch.exp(-(u[:, None] - w[None]).square().sum(-1) / 2).mean()  # noqa: E731
        return k(x, x) - 2 * k(x, y) + k(y, y)

    parameters = list(net.parameters())
    expected = torch.autograd.grad(mmd2(net(z)), parameters)
    x = net(z)
    unstopped = torch.autograd.grad(field(x, y).square().sum(-1).mean(), parameters)
    train(net, field, training=once(), step=0.5)
    grads = [p.grad for p in parameters]
    assert max(float((g - e).abs().max()) for g, e in zip(grads, expected, strict=True)) < 1e-6
    assert max(float((g - e).abs().max()) for g, e in zip(grads, unstopped, strict=True)) > 1e-2


@pytest.mark.parametrize(
    "field",
    [F.Sinkhorn(0.05, 1e-2), F.Drift((0.5,), "squared"), F.SlicedWasserstein(16)],
    ids=lambda field: type(field).__name__,
)
def test_training_brings_the_law_near(field):
    law, net = nl.toy.EightGaussians(2.0, 0.2), network(2)
    budget = nl.Training(steps=150, batch=64, rate=1e-2, warmup=10, ema=0.0)
    distance = lambda: nl.metrics.w2(drifting.sample(net, 200), law.sample(200, chance(1)))  # noqa: E731
    before = distance()
    losses = train(net, field, law, budget)
    assert len(losses) == 2 and losses[1] < losses[0]
    assert distance() < 0.45 * before


def test_the_critic_as_a_field():
    """Fitted on from where it stands in every step, it draws the generator to the data."""
    law, net = nl.toy.Gaussian((1.5, -1.0), ((0.3, 0.0), (0.0, 0.3))), network(3)
    fits = nl.Training(steps=4, batch=64, rate=2e-2, decay=0, warmup=0, ema=0.0)
    critic = F.Critic("kl", 0.1, make=lambda d: Residual(d, 1, width=8, depth=1), training=fits)
    distance = lambda: nl.metrics.w2(drifting.sample(net, 100), law.sample(100, chance(1)))  # noqa: E731
    before = distance()
    train(net, critic, law, nl.Training(steps=40, batch=64, rate=1e-2, warmup=0, decay=0, ema=0.0), step=0.3)
    assert critic.network is not None and len(critic.losses) == 1
    assert distance() < 0.7 * before


def test_a_field_that_learns_is_fitted_to_the_minibatch_by_the_chance_of_the_run():
    told = []

    class Learner:
        def fit(self, x, y, *, generator):
            told.append((x, y, generator))

        def __call__(self, x, y, at=None, a=None, b=None, generator=None, warm=None):
            told.append((x, y, generator))
            return y - x

    train(network(), Learner())
    assert len(told) == 60 and isinstance(told[0][2], torch.Generator)
    for fit, called in zip(told[::2], told[1::2], strict=True):
        assert fit[0] is called[0] and fit[1] is called[1] and fit[2] is called[2] is told[0][2]
        assert not fit[0].requires_grad


# --- stacks -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Same:
    """A law without chance: every sample repeats the same rows, so that each member of a stack draws the same."""

    seed: int
    rows: int = 16

    def sample(self, n, generator, dtype=torch.float32):
        return normal(self.rows, 2, seed=self.seed)[torch.arange(n) % self.rows]


MEMBERS = [F.ScoreDifference(0.5), F.ScoreDifference(0.5), F.MMD(), F.Drift((0.3, 1.0), floor=1e-3)]


def test_a_stack_is_its_members_one_by_one():
    """Warm-up, clipping, averages and all."""
    budget = nl.Training(steps=25, batch=16, rate=5e-3, warmup=5, ema=0.8, clip=0.05)
    nets = [network(k) for k in range(4)]
    stack = Stack(nets)
    together = train(stack, MEMBERS, Same(9), budget, noise=Same(8))
    after = [network() for _ in range(4)]
    stack.unstack(after)
    alone = [train(net, field, Same(9), budget, noise=Same(8)) for net, field in zip(nets, MEMBERS, strict=True)]
    assert together == [pytest.approx(sum(losses[0] for losses in alone), rel=1e-4)]
    for net, member in zip(nets, after, strict=True):
        for p, q in zip(net.parameters(), member.parameters(), strict=True):
            assert float((p - q).detach().abs().max()) < 2e-4


def test_gradients_of_a_stack_with_draws_of_its_own():
    """Each member has noise and data of its own, and a tensor is drawn from without replacement for each."""
    for target in (MOONS, POINTS[:20]):
        nets = [network(k) for k in range(3)]
        stack, field = Stack(nets), F.SinkhornProxy(0.5)
        z = nl.toy.Gaussian().sample(48, g := chance(4)).split(16)
        if isinstance(target, torch.Tensor):
            y = [target[torch.randperm(20, generator=g)[:16]].float() for _ in range(3)]
        else:
            y = target.sample(48, g).split(16)
        train(stack, field, target, once(), seed=4)
        for k, net in enumerate(nets):
            x = net(z[k])
            (-2 * (field(x.detach(), y[k]) * x).sum() / 16).backward()
            for name, p in net.named_parameters():
                assert float((stack.stacked[name.replace(".", "/")].grad[k] - p.grad).abs().max()) < 1e-5


def test_equal_neighbours_are_called_as_a_batch():
    called = []

    class Spy(F.ScoreDifference):
        def __call__(self, x, y, at=None, a=None, b=None, generator=None, warm=None):
            called.append((self.h, len(x)))
            return super().__call__(x, y, at, a, b, generator)

    x, y = normal(5, 6, 2), normal(5, 7, 2, seed=1)
    fields = [Spy(0.5), Spy(0.5), Spy(0.7), Spy(0.5), Spy(0.5)]
    v = drifting.velocity(fields, x, y, chance())
    assert called == [(0.5, 2), (0.7, 1), (0.5, 2)]
    for k, field in enumerate(fields):
        assert torch.allclose(v[k], field(x[k], y[k]), atol=1e-6)
    for field in (F.Sinkhorn(0.5, 1e-6), F.KALE(0.1), F.DrMMD(0.1), F.SlicedWasserstein(5), F.SmoothedKL(0.5, draws=3)):
        v = drifting.velocity([field] * 5, x, y, chance(2))
        for k in range(5):
            assert torch.allclose(v[k], field(x[k], y[k], generator=chance(2)), atol=1e-4), field
    refused(lambda: drifting.velocity(fields[:4], x, y, chance()), "one for each of the 5 members, got 4")


# --- the same run twice, and resumed ----------------------------------------------------------------------------------


def test_the_same_run_twice():
    before = torch.random.get_rng_state()
    runs = {}
    for name, seed in (("one", 0), ("two", 0), ("other", 1)):
        net = network()
        losses = train(net, F.SlicedWasserstein(7), seed=seed)
        runs[name] = {**net.state_dict(), "losses": torch.tensor(losses), "sample": drifting.sample(net, 9)}
    same(runs["one"], runs["two"])
    assert not torch.equal(runs["one"]["sample"], runs["other"]["sample"])
    assert torch.equal(torch.random.get_rng_state(), before)


class Fused(Residual):
    """A generator that fails after so many calls."""

    left = math.inf

    def forward(self, z):
        Fused.left -= 1
        if Fused.left < 0:
            raise Fuse
        return super().forward(z)


def fused(seed=0):
    return seeded(lambda: Fused(2, 2, width=8, depth=1), chance(seed))


FITS = nl.Training(steps=2, batch=12, rate=1e-2, decay=0, warmup=0, ema=0.0)
RUNS = {
    "field": lambda: (fused(), F.ScoreDifference(0.7), MOONS, {}),
    "chance": lambda: (fused(), F.SlicedWasserstein(5), POINTS, {"noise": nl.toy.Moons()}),
    "loader": lambda: (fused(), F.MMD(), loader(7), {"data": 11}),
    "stack": lambda: (Stack([fused(k) for k in range(3)]), F.Drift((0.5,)), MOONS, {}),
    "stack of fields": lambda: (
        Stack([fused(k) for k in range(2)]),
        [F.KALE(0.1, 1.0), F.SmoothedKL(0.5, draws=2)],
        POINTS,
        {"data": 9},
    ),
    "critic": lambda: (
        fused(),
        F.Critic("js", make=lambda d: Residual(d, 1, width=8, depth=1), training=FITS),
        MOONS,
        {},
    ),
}


@pytest.mark.parametrize("name", RUNS)
def test_an_interrupted_run_goes_on_to_the_bit(name, tmp_path):
    def run(file=None):
        net, field, target, options = RUNS[name]()
        losses = train(net, field, target, checkpoint=file, **options)
        return {**net.state_dict(), "losses": torch.tensor(losses, dtype=torch.float64)}

    Fused.left, steps = math.inf, []
    whole = run()
    for calls in (14, 12):  # it fails between steps 10 and 20, is taken up at 10, and fails again between 20 and 30
        Fused.left = calls
        with pytest.raises(Fuse):
            run(tmp_path / "run")
        Fused.left = math.inf
        steps.append(checkpoints.read(tmp_path / "run")[1]["step"])
    assert steps == [10, 20]
    same(run(tmp_path / "run"), whole)
    same(run(tmp_path / "run"), whole)  # nothing is left to do


def test_other_checkpoints_are_refused(tmp_path):
    file = tmp_path / "run"

    def go(net=None, field=None, target=MOONS, training=SHORT, **options):
        train(net or network(), field or F.MMD(0.5), target, training, checkpoint=file, **options)

    go()
    go()
    other = nl.Training(**vars(SHORT) | {"rate": 1e-3})
    refused(lambda: go(field=F.MMD(0.6)), r"other hyperparameters: field.0.0 was .MMD\(h=0.5.* and is .MMD\(h=0.6")
    refused(lambda: go(target=nl.toy.Spiral()), "data.1 was 'Moons")
    refused(lambda: go(noise=MOONS), "data.0 was 'Gaussian")
    refused(lambda: go(data=12), "data.2 was 16 and is 12")
    refused(lambda: go(step=0.5), "step was 1.0 and is 0.5")
    refused(lambda: go(seed=1), "seed was 0 and is 1")
    refused(lambda: go(training=other), "training.rate was 0.005 and is 0.001")
    refused(lambda: go(net=seeded(lambda: Residual(2, 2, width=8), chance())), "generator was 'Residual")
    refused(lambda: go(net=Stack([network(), network(1)])), "generator was 'Residual")
    file.write_bytes(file.read_bytes()[:-3])
    refused(go, "run is damaged")
    file.unlink()
    two, three = F.MMD(0.5), F.MMD(0.6)
    go(Stack([network(k) for k in range(3)]), [two, two, three])
    refused(lambda: go(Stack([network(k) for k in range(3)]), [two, three, three]), "field.0.1 was 2 and is 1")


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_what_does_not_fit():
    field, stack = F.ScoreDifference(0.5), Stack([network(), network(1)])
    refused(lambda: train(network(out=3), field), r"generator must make points of shape \(16, 2\)", r"got \(16, 3\)")
    flat = nn.Sequential(network(), nn.Flatten(0))
    refused(lambda: train(flat, field), r"points of shape \(16, 2\)", r"got \(32,\)")
    refused(lambda: train(network(), field, noise=3), r"generator must take noise of shape \(16, 3\)")
    refused(lambda: train(stack, field, noise=3), r"generator must take noise of shape \(2, 16, 3\)")
    refused(lambda: train(stack, [field]), "one for each of the 2 members, got 1")
    refused(lambda: train(network(), [field, field]), "one for each of the 1 members, got 2")
    refused(lambda: train(stack, F.Critic()), "must not learn where a stack is trained", "Critic")
    refused(lambda: train(stack, F.Wasserstein()), "x must have shape", "one cloud")
    refused(lambda: train(network(), F.Drift(), training=once(batch=1)), "at least two particles")


def test_data_that_does_not_fit():
    field, stack = F.ScoreDifference(0.5), Stack([network(), network(1)])
    for target in ((POINTS, torch.zeros(len(POINTS), dtype=torch.int64)), [MOONS, MOONS]):
        refused(lambda target=target: train(network(), field, target), "of one class", "no labels")
    refused(lambda: train(network(), field, noise=[MOONS, MOONS]), "of one class")
    for net in (network(), stack):
        refused(lambda net=net: train(net, field, POINTS[:9]), "target has 9 points, fewer than a minibatch of 16")
    refused(lambda: train(network(), field, "moons"), "target must be a law", "got str")
    refused(lambda: train(network(), field, torch.full((30, 2), math.nan)), "target must be finite")
    for bad in (0, -1, 2.5, True):
        refused(lambda bad=bad: train(network(), field, data=bad), "data must be a positive integer", f"got {bad}")
    for bad in (0.0, -1.0, math.nan, math.inf, "long", True):
        refused(lambda bad=bad: train(network(), field, step=bad), "step must be a positive", "got")
    for bad in (0, -2):
        refused(lambda bad=bad: train(network(), field, noise=bad), "noise must be a positive integer")
        refused(lambda bad=bad: drifting.sample(network(), bad), "n must be a positive integer")
    for bad in (True, None, 2.0):
        refused(lambda bad=bad: train(network(), field, noise=bad), "noise must be a law")


def test_a_generator_that_diverges_says_at_which_step():
    for net in (network(), Stack([network(), network(1)])):
        with pytest.raises(FloatingPointError, match=r"drifting diverged: the loss is nan at step [2-9] of 30"):
            train(net, F.SlicedWasserstein(3), training=nl.Training(steps=30, batch=16, rate=1e30, warmup=0, ema=0.0))
    wild = nl.Training(steps=30, batch=16, rate=1e4, warmup=0, ema=0.0)
    where = r"stopped at step \d of 30, its points up to .*e\+\d\d: x must lie within ±1e\+14"
    with pytest.raises(FloatingPointError, match=where):
        train(network(), F.ScoreDifference(1e-10), training=wild)


def test_a_field_that_refuses_from_the_start_says_so_itself():
    with pytest.raises(ValueError, match="overflows"):
        train(network(), F.MMD(1e-30))
    with pytest.raises(FloatingPointError, match=r"^critic diverged: .* at step \d of 9"):
        train(network(), F.Critic(training=nl.Training(steps=9, rate=1e30, warmup=0, decay=0, ema=0.0)))


# --- samples ----------------------------------------------------------------------------------------------------------


def test_samples():
    net, stack = network(), Stack([network(), network(1)])
    x = drifting.sample(net, 7, chance=chance(3))
    assert torch.equal(x, net(nl.toy.Gaussian().sample(7, chance(3)))) and not x.requires_grad
    both = drifting.sample(stack, 7, chance=chance(3))
    assert both.shape == (2, 7, 2) and torch.allclose(both[0], x, atol=1e-6)
    assert torch.equal(drifting.sample(net, 7), drifting.sample(net, 7, chance=chance(0)))
    law = drifting.sample(net, 7, MOONS, chance=chance(3))
    assert torch.equal(law, net(MOONS.sample(7, chance(3))))
    few = drifting.sample(net, 40, POINTS[:30], chance=chance(3))  # in more than one pass
    assert few.shape == (40, 2)
