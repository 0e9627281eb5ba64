"""The models: what they learn, what they say no to, and that seeds, files and stacks change nothing."""

import math

import ot
import pytest
import torch
from test_bad_input import refused
from test_streams import FAR, POINTS, chance, loader, normal
from test_training import ROUND, SHORT, outcome, same, small
from torch import nn

import nsgf_lite as nl
from nsgf_lite import metrics
from nsgf_lite.models import straight
from nsgf_lite.networks import MLP
from nsgf_lite.particles import METHODS, advance

FEW = {"eps": 0.5, "minibatch": 32, "pool": 8, "steps": 5, "step": 0.6}
LEFT = nl.toy.Gaussian((-4.0, 0.0), ((0.5, 0.0), (0.0, 0.5)))


def ratio(d, classes):
    return MLP(d, out=1, width=16, depth=2)


def kinds(batch):
    """Every model, small."""
    return {
        "NSGF": lambda: small(nl.NSGF, **FEW),
        "NSGF on policy": lambda: small(nl.NSGF, renew=20, on_policy=True, **FEW),
        "FM": lambda: small(nl.FlowMatching),
        "SI": lambda: small(nl.StochasticInterpolant),
        "OT-CFM": lambda: small(nl.OTCFM, minibatch=batch),
        "OT-CFM matched": lambda: small(nl.OTCFM, minibatch=32, matched=6),
        "1-RF": lambda: small(nl.RectifiedFlow),
        "EPT": lambda: nl.EPT(steps=20, step=0.3, particles=500, network=ratio),
    }


MODELS = kinds(SHORT.batch)
ALONE = [name for name in MODELS if name != "EPT"]


def steps_of(model):
    return getattr(model, "steps", 10)


def fitted(name, source=ROUND, target=FAR, budget=SHORT, **options):
    return MODELS[name]().fit(source, target, budget, progress=False, **options)


# --- what they learn --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_every_model_brings_the_source_to_the_target(name):
    budget = nl.Training(steps=400, batch=64, rate=5e-3, warmup=20, ema=0.97)
    before = torch.random.get_rng_state()
    model = kinds(64)[name]().fit(ROUND, FAR, budget, progress=False)
    x, y = ROUND.sample(300, chance(1)), FAR.sample(300, chance(2))
    z = model.sample(300, steps_of(model), start=x)
    assert metrics.w2(x, y) > 3.8 and metrics.w2(z, y) < 0.8
    assert (z.mean(0) - y.mean(0)).norm() < 0.4
    assert len(model.losses) == 4 and all(map(math.isfinite, model.losses))
    assert torch.equal(model.sample(300, steps_of(model)), model.sample(300, steps_of(model)))
    assert not torch.equal(model.sample(300, steps_of(model), generator=chance(7)), model.sample(300, steps_of(model)))
    path = model.path(9, steps_of(model), generator=chance(3))
    assert path.shape == (steps_of(model) + 1, 9, 2) and torch.equal(path[0], ROUND.sample(9, chance(3)))
    assert torch.equal(path[-1], model.sample(9, steps_of(model), generator=chance(3)))
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("name", ["NSGF", "FM", "OT-CFM matched"])
@pytest.mark.parametrize("source", ["one", "by class"])
def test_a_label_chooses_the_class(name, source):
    budget = nl.Training(steps=300, batch=64, rate=5e-3, warmup=20, ema=0.97)
    model = kinds(64)[name]().fit(
        [ROUND, ROUND] if source == "by class" else ROUND, [LEFT, FAR], budget, progress=False
    )
    assert (model.velocity.centre[0].abs() < 0.5) and float(model.velocity.spread) > 1.5  # of all classes, not of one
    for label, side in ((0, -4.0), (1, 4.0)):
        assert (model.sample(100, 5, label=label).mean(0) - torch.tensor([side, 0.0])).norm() < 0.8
    both = model.sample(200, 5)[:, 0]
    assert 60 < (both > 0).sum() < 140 and (both.abs() > 1).double().mean() > 0.95


def test_an_nsgf_learns_the_velocities_of_its_pool():
    """At the pool's points and times the network says step x steps times the recorded velocity."""
    model = small(nl.NSGF, **FEW).fit(ROUND, FAR, nl.Training(steps=800, batch=64, rate=1e-2, ema=0.97), progress=False)
    x, k, v, _ = model.trajectories.sample(500, chance())
    said = model._at(x, (k / 5).unsqueeze(1), None)
    assert (said - 3.0 * v).square().mean() < 0.1 * (3.0 * v).square().mean()


class Constant(MLP):
    """A network that says one velocity everywhere."""

    def forward(self, x, t, label=None):
        return torch.tensor([3.0, -6.0]).expand(x.shape) + 0 * super().forward(x, t, label)


def test_renewed_minibatches_are_moved_by_the_network():
    """By its velocity over the number of steps, and not by the flow's own step; the first ones follow the flow."""
    for on_policy in (True, False):
        model = nl.NSGF(
            network=lambda d, c: Constant(d, width=4), renew=4, on_policy=on_policy, together=2, **FEW | {"steps": 3}
        )
        model.prepare(ROUND, FAR, SHORT, chance())
        model._begin(chance())
        for step in (1, 4):
            model._batch(8, step, chance())
        x, v = model.trajectories._x, model.trajectories._v
        assert model.trajectories.added == 10 and len(x) == 8
        moves, said = x[:, 1:] - x[:, :-1], torch.tensor([1.0, -2.0])
        renewed = moves[:2] - (said if on_policy else 0.6 * v[:2, :-1])
        assert renewed.abs().max() < 1e-5 and torch.allclose(moves[2:], 0.6 * v[2:, :-1], atol=1e-5)


def test_minibatches_take_turns_at_the_classes():
    """Over the blocks that are solved together, and over renewals."""
    model = small(nl.NSGF, **FEW | {"pool": 7, "together": 2}, renew=1)
    model.prepare(ROUND, [LEFT, FAR, ROUND], SHORT, chance())
    model._begin(chance())
    assert model.trajectories._label.tolist() == [0, 1, 2, 0, 1, 2, 0]
    model._batch(8, 1, chance())
    assert model.trajectories._label.tolist() == [1, 2, 2, 0, 1, 2, 0] and model.trajectories.added == 9
    sides = model.trajectories._x[:, -1, :, 0].mean(1)  # where they arrive
    assert sides[0] > 2 and sides[1:3].abs().max() < 1.5 and sides[3] < -2


def test_a_class_starts_from_its_own_source():
    model = fitted("FM", source=[LEFT, FAR], target=[FAR, LEFT])
    for label, side in ((0, -4.0), (1, 4.0)):
        assert (model.path(100, 2, label=label)[0].mean(0) - torch.tensor([side, 0.0])).norm() < 0.5
    both = model.path(100, 2)[0][:, 0]
    assert 20 < (both > 0).sum() < 80 and both.abs().min() > 1


@pytest.mark.parametrize("unit", [1.0, 1e-3, 1e3])
def test_the_loss_is_the_squared_distance_of_velocities_in_units_of_the_data(unit):
    """By hand, at the first step: the sum over coordinates, the mean over points; the sum over models."""
    budget, sources, targets = (
        nl.Training(steps=1, batch=32),
        [unit * POINTS, unit * POINTS],
        [unit * POINTS + unit] * 2,
    )
    expected, alone = [], []
    for seed in (3, 4):
        model, g = small(nl.FlowMatching), chance(seed)
        network = model.prepare(sources[0], targets[0], budget, g)
        x, t, v, _ = model._batch(32, 0, g)
        assert float(network.spread) == pytest.approx(float(torch.cat([sources[0], targets[0]]).std()), rel=0.2)
        expected.append(float((network(x, t) - v).detach().div(network.spread).square().sum()) / 32)
        alone += small(nl.FlowMatching).fit(sources[0], targets[0], budget, seed=seed, progress=False).losses
    assert alone == pytest.approx(expected, rel=1e-5)
    pair = [small(nl.FlowMatching) for _ in range(2)]
    nl.fit_together(pair, sources, targets, budget, seeds=[3, 4], progress=False)
    assert pair[0].losses == pytest.approx([sum(alone)], rel=1e-4)


def test_a_network_is_standardised_to_source_and_target():
    model = small(nl.FlowMatching)
    model.prepare(LEFT, FAR, nl.Training(batch=1000), chance())
    assert abs(float(model.velocity.centre[0])) < 0.2 and 2.5 < float(model.velocity.spread) < 3.2


@pytest.mark.parametrize("unit", [1.0, 10.0])
def test_no_particle_of_an_ept_leaps(unit):
    """A move is `longest` spreads of the data at most, whatever the slope, and against the slope."""
    model = nl.EPT(steps=2, step=1e6, longest=0.5, particles=50, network=ratio)
    model.fit(unit * POINTS, unit * (POINTS + 3), nl.Training(steps=20, batch=32), progress=False)
    network, x = model.kept[1], unit * POINTS
    assert float(network.spread) == pytest.approx(unit * 1.8, rel=0.2)
    moved = model._displacement(x, 1)
    assert torch.allclose(moved.norm(dim=1), 0.5 * network.spread.expand(60), rtol=1e-4)
    ahead, behind = (network(x + s * moved, torch.zeros(60)) for s in (1e-3, -1e-3))
    assert (ahead < behind).all()


# --- interpolations ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "first", "last"),
    [
        (straight.Interpolant(), (1.0, 0.0), (0.0, 1.0)),
        (nl.RectifiedFlow(), (1.0, 0.0), (0.0, 1.0)),
        (nl.OTCFM(), (1.0, 0.0), (0.0, 1.0)),
        (nl.FlowMatching(smallest=0.1), (1.0, 0.0), (0.1, 1.0)),
        (nl.StochasticInterpolant(), (1.0, 0.0), (0.0, 1.0)),
    ],
)
def test_a_velocity_is_the_derivative_of_its_path(model, first, last):
    x0, x1, h = normal(40, 3).double(), normal(40, 3, seed=1).double(), 1e-5
    for time, (a, b) in ((0.0, first), (1.0, last)):
        assert torch.allclose(model._between(x0, x1, torch.full((40, 1), time).double())[0], a * x0 + b * x1)
    t = torch.linspace(0.1, 0.9, 40).double().unsqueeze(1)
    ahead, behind = (model._between(x0, x1, t + s)[0] for s in (h, -h))
    assert ((ahead - behind) / (2 * h) - model._between(x0, x1, t)[1]).abs().max() < 1e-8


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_pairs_are_optimal(offset):
    """The cost is that of POT's exact plan, also far from the origin, where a product of matrices loses it."""
    model = small(nl.OTCFM, minibatch=64)
    x, y = (torch.randn(64, 2, generator=chance(k)) + offset for k in (1, 2))
    model.prepare(x, y, nl.Training(batch=64), chance())
    x0, x1 = model._pairs(64, 0, chance())
    cost = ot.dist(x.double().numpy(), y.double().numpy())
    best = ot.emd2([1 / 64] * 64, [1 / 64] * 64, cost)
    assert float((x1.double() - x0.double()).square().sum(1).mean()) == pytest.approx(best, rel=1e-9)
    assert sorted(x1.tolist()) == sorted(y.tolist())


def test_straight_batches_pair_points_of_one_class():
    model = small(nl.RectifiedFlow)
    model.prepare([LEFT, FAR], [FAR, LEFT], SHORT, chance())
    x, t, v, labels = model._batch(33, 1, chance())
    assert torch.bincount(labels).tolist() == [16, 17]
    assert ((v[:, 0] > 0) == (labels == 0)).all() and (x[:, 0].abs() < 8).all() and t.shape == (33,)


def bend(model):
    """Mean square of what the velocity along a path differs from the straight line's, over the line's."""
    path = model.path(200, 50)
    line = path[-1] - path[0]
    return float(((path[1:] - path[:-1]) * 50 - line).square().sum(-1).mean() / line.square().sum(-1).mean())


def test_the_second_rectified_flow_is_straighter():
    budget = nl.Training(steps=400, batch=128, rate=5e-3, warmup=20, ema=0.97)
    ring = nl.toy.EightGaussians(3.0, 0.2)
    one = nl.RectifiedFlow(network=lambda d, c: MLP(d, width=32)).fit(ROUND, ring, budget, progress=False)
    two = nl.RectifiedFlow(one.network, teacher=one, pairs=2000, teacher_steps=30).fit(
        ROUND, ring, budget, progress=False
    )
    assert bend(two) < 0.5 * bend(one)
    assert metrics.w2(two.sample(300, 1), ring.sample(300, chance())) < metrics.w2(
        one.sample(300, 1), ring.sample(300, chance())
    )


# --- solvers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("heun", 2), ("rk4", 4)])
def test_solvers_have_their_order_also_in_time(method, order):
    """x' = x cos(3t) + t^2 - x^3 / 9 to t = 1, each particle with its own step, against very many steps."""

    def solve(method, steps):
        x, start = normal(20, 1).double(), torch.linspace(0, 0.5, 20).double().unsqueeze(1)
        for k in range(steps):
            h = (1 - start) / steps
            x, v = advance(lambda z, t: z * (3 * t).cos() + t**2 - z**3 / 9, x, start + k * h, h, method)
        return x

    exact = solve("rk4", 1000)
    coarse, fine = ((solve(method, steps) - exact).norm() for steps in (20, 40))
    assert abs(math.log2(coarse / fine) - order) < 0.2


def test_a_models_solvers_agree_and_are_counted():
    model = fitted("FM")
    calls = 0

    def count(*_):
        nonlocal calls
        calls += 1

    model.velocity.register_forward_hook(count)
    x = ROUND.sample(50, chance())
    exact = model.sample(50, 100, "rk4", start=x)
    for solver, error in (("euler", 0.1), ("heun", 0.01), ("rk4", 1e-4)):
        calls = 0
        assert (model.sample(50, 10, solver, start=x) - exact).abs().max() < error
        assert calls == model.evaluations(10, solver) == 10 * {"euler": 1, "heun": 2, "rk4": 4}[solver]
    assert set(METHODS) == {"euler", "heun", "rk4"}


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "part"),
    [
        (lambda: nl.NSGF(eps=0.0), "eps must be"),
        (lambda: nl.NSGF(step=2.0), "step must be below 2"),
        (lambda: nl.NSGF(steps=0), "steps must be"),
        (lambda: nl.NSGF(pool=2.5), "pool must be"),
        (lambda: nl.NSGF(renew=-1), "renew must be"),
        (lambda: nl.NSGF(on_policy="no"), "on_policy must be True or False, got 'no'"),
        (lambda: nl.NSGF(half=1), "half must be True or False, got 1"),
        (lambda: nl.NSGFPlusPlus(on_policy=0), "on_policy must be True or False, got 0"),
        (lambda: nl.OTCFM(minibatch=0), "minibatch must be"),
        (lambda: nl.OTCFM(matched=-1), "matched must be"),
        (lambda: nl.FlowMatching(smallest=1.0), "smallest must be"),
        (lambda: nl.RectifiedFlow(pairs=0), "pairs must be"),
        (lambda: nl.EPT(step=-0.1), "step must be"),
        (lambda: nl.EPT(longest=math.inf), "longest must be"),
        (lambda: nl.NSGF(network=MLP(2)), r"network must be None or a function network\(d, classes\), got MLP"),
        (lambda: nl.NSGF(folder=3), "folder must be None or a path, got 3"),
        (lambda: nl.NSGFPlusPlus(predictor="clock"), "predictor must be None or a function"),
        (lambda: nl.RectifiedFlow(teacher="model"), "teacher must be None or a fitted model, got 'model'"),
        (lambda: nl.FlowMatching().fit(ROUND, FAR, 100), "training must be None or a Training, got 100"),
        (lambda: nl.FlowMatching().fit(ROUND, FAR, seed=0.5), "seed must be an integer .*, got 0.5"),
        (lambda: nl.FlowMatching(lambda d, c: 3).fit(ROUND, FAR), "network must make a torch.nn.Module, got int"),
        (lambda: nl.drifting.train(ratio, nl.fields.MMD(), FAR), "generator must be a network"),
        (lambda: nl.drifting.train(nn.Linear(2, 2), "drift", FAR), "field must be one"),
    ],
)
def test_hyperparameters_out_of_range(make, part):
    refused(make, part)


@pytest.mark.parametrize(
    ("name", "source", "target", "part"),
    [
        ("FM", nl.toy.Gaussian((0.0,), ((1.0,),)), FAR, "source has dimension 1 and target 2"),
        ("FM", ROUND, [normal(40, 3), FAR], "target has dimension 3 and target 2"),
        ("FM", [ROUND, ROUND], FAR, "source has 2 classes and target 0"),
        ("FM", [ROUND, ROUND], [FAR] * 3, "source has 2 classes and target 3"),
        ("FM", POINTS[:31], FAR, "source has 31 points, fewer than a minibatch of 32"),
        ("NSGF", ROUND, POINTS[:31], "target has 31 points, fewer"),
        ("NSGF", ROUND, [FAR] * 9, "pool must hold a minibatch of each class, 9, got 8"),
        ("OT-CFM matched", ROUND, [FAR] * 7, "matched must be at least the number of classes, 7, got 6"),
        ("EPT", ROUND, [FAR, FAR], "EPT here is unconditional"),
        ("FM", "a file", FAR, "source must be a law"),
    ],
)
def test_data_that_do_not_fit(name, source, target, part):
    refused(lambda: fitted(name, source, target), part)


class Fixed(nn.Module):
    """A network of so many outputs, or one that returns no tensor."""

    def __init__(self, out):
        super().__init__()
        self.layer, self.out = nn.Linear(2, out or 1), out

    def forward(self, x, t=None):
        return self.layer(x) if self.out else [self.layer(x)]


@pytest.mark.parametrize("out", [1, 2, 3, None])
def test_networks_of_the_wrong_number_of_outputs(out):
    """One output would be added to both coordinates, a second one dropped: neither passes in silence."""
    make = lambda d, c: Fixed(out)  # noqa: E731
    got = "list" if out is None else rf"\({{n}}, {out}\)"
    wanted = r"the network must return a tensor of shape \({n}, {d}\) at points of \({n}, 2\), got " + got
    cases = {
        "velocity": (lambda: nl.FlowMatching(make), 2, 32),
        "ratio": (lambda: nl.EPT(steps=3, particles=50, network=make), 1, 64),
        "clock": (lambda: nl.NSGFPlusPlus(network=small(nl.NSGF).network, predictor=make, **FEW), 1, 32),
    }
    for model, need, n in cases.values():
        if out != need:
            text = wanted.replace("{n}", str(n)).replace("{d}", str(need))
            refused(lambda model=model: model().fit(ROUND, FAR, SHORT, progress=False), text)
    fields = nl.fields.Critic(make=lambda d: Fixed(out))
    if out != 1:
        refused(lambda: fields.fit(POINTS, POINTS + 1), r"must return a tensor of shape \(60, 1\)")


def test_fits_that_cannot_be():
    refused(lambda: small(nl.OTCFM, minibatch=64).fit(ROUND, FAR, SHORT), "minibatch must be the training's batch, 32")
    refused(
        lambda: small(nl.RectifiedFlow, teacher=small(nl.FlowMatching)).fit(ROUND, FAR, SHORT), "has not been fitted"
    )
    refused(lambda: nl.EPT(steps=61).fit(ROUND, FAR, SHORT), "at least 61 steps, one a move, got 60")
    refused(lambda: small(nl.FlowMatching, labels=-1).fit(ROUND, loader(), SHORT), "non-negative integer, got -1")


def test_a_diverging_fit_names_its_step():
    wild = nl.Training(steps=60, batch=32, rate=1e30, warmup=0, clip=1e30)
    with pytest.raises(FloatingPointError, match=r"FlowMatching diverged: the loss is .* at step \d+ of 60"):
        small(nl.FlowMatching).fit(ROUND, FAR, wild, progress=False)


@pytest.mark.parametrize("name", ["FM", "NSGF", "EPT"])
def test_samples_that_cannot_be(name, tmp_path):
    unfitted = MODELS[name]()
    for call in (lambda: unfitted.sample(5, 20), lambda: unfitted.path(5, 20), lambda: unfitted.save(tmp_path / "m")):
        refused(call, "the model has not been fitted")
    model = fitted(name)
    steps = steps_of(model)
    for n in (0, 2.5, None):
        refused(lambda n=n: model.sample(n, steps), "n must be a positive integer")
    refused(lambda: model.sample(5, steps, start=normal(4, 2)), r"start must have shape \(5, 2\), got \(4, 2\)")
    refused(lambda: model.sample(5, steps, start=normal(5, 3)), r"got \(5, 3\)")
    refused(lambda: model.sample(5, steps, start=torch.full((5, 2), math.nan)), "start must be finite")
    refused(lambda: model.sample(5, steps, start=[[0.0, 1.0]]), "start must be a float32 or float64 tensor")
    refused(lambda: model.sample(5, steps, label=0), "label must be None or an integer below the classes, 0, got 0")
    if name == "EPT":
        refused(lambda: model.sample(5, 19), "EPT samples by its own 20 Euler steps, got 19 of 'euler'")
        refused(lambda: model.sample(5, 20, "heun"), "EPT samples by its own 20 Euler steps, got 20 of 'heun'")
    else:
        refused(lambda: model.sample(5, 0), "steps must be a positive integer")
        refused(lambda: model.sample(5, 5, "midpoint"), "solver must be one of euler, heun, rk4, got 'midpoint'")
        refused(lambda: model.evaluations(5, "midpoint"), "solver must be one of")
        for bad in ("a", 0, 2.5, None):
            refused(lambda bad=bad: model.evaluations(bad), "steps must be a positive integer")
    assert torch.equal(model.sample(5, steps, start=normal(5, 2).double()), model.sample(5, steps, start=normal(5, 2)))


@pytest.mark.parametrize("label", [-1, 2, 0.5, True, "one"])
def test_labels_that_are_none(label):
    model = fitted("FM", target=[LEFT, FAR])
    refused(
        lambda: model.sample(5, 5, label=label), "label must be None or an integer below the classes, 2", str(label)
    )


# --- seeds, files, stacks ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_a_seed_decides_everything_and_a_second_fit_begins_afresh(name):
    model = MODELS[name]()
    first = outcome(model, ROUND, FAR, seed=3)
    model.fit(FAR, ROUND, SHORT, seed=1, progress=False)
    same(outcome(model, ROUND, FAR, seed=3), first)
    assert not torch.equal(outcome(MODELS[name](), ROUND, FAR, seed=4)["sample"], first["sample"])


def test_tensors_may_be_shorter_than_what_is_made_of_them():
    model = small(nl.RectifiedFlow, teacher=fitted("1-RF"), pairs=150, teacher_steps=2)
    model.fit(POINTS, FAR, SHORT, progress=False)
    assert len(model.table.x0) == 150 and len(model.table.x0.unique(dim=0)) == 60
    nl.EPT(steps=3, particles=150, network=ratio).fit(POINTS, POINTS[:40], SHORT, progress=False)
    budget = nl.Training(steps=3, batch=100)  # from the pool, which needs but 32 points at once
    small(nl.NSGF, **FEW).fit(POINTS, FAR, budget, progress=False)


@pytest.mark.parametrize("name", [*MODELS, "NSGF++", "JKO"])
def test_points_that_leave_the_numbers_are_told_of(name):
    """One weight made enormous: the points that it moves end nowhere, and the sample says how many."""
    if name == "NSGF++":
        model = nl.NSGFPlusPlus(network=small(nl.NSGF).network, **FEW).fit(ROUND, FAR, SHORT, progress=False)
    elif name == "JKO":
        model = nl.JKOFlow(nl.functionals.JSD(FAR), 0.5, 2).fit(ROUND, SHORT, progress=False)
    else:
        model = fitted(name)
    given = {} if name == "JKO" else {"steps": steps_of(model)}
    # of the two phases the second: the predictor of the time between them refuses such points
    networks = [model.velocity] if name == "NSGF++" else model.networks().values()
    for weight in (weight for network in networks for weight in network.parameters()):
        weight.data.mul_(1e30)
    for sample in (model.sample, model.path):
        with pytest.warns(RuntimeWarning, match=r"\d+ of 9 points ended at no finite place"):
            x = sample(9, **given)
    assert not torch.isfinite(x[-1]).all()


@pytest.mark.parametrize("name", MODELS)
def test_a_saved_model_samples_the_same(name, tmp_path):
    model = fitted(name, target=FAR if name == "EPT" else [LEFT, FAR])
    model.save(tmp_path / "model")
    loaded = MODELS[name]().load(tmp_path / "model")
    same(outcome(loaded), outcome(model))
    steps = steps_of(model)
    refused(lambda: loaded.sample(5, steps), "a loaded model has no source: give the points to start from as start=")
    assert loaded.classes == model.classes and loaded.dimension == 2
    other = MODELS["SI" if name == "FM" else "FM"]()
    refused(lambda: other.load(tmp_path / "model"), f"model holds a model with .*{type(model).__name__}")
    wide = MODELS[name]()
    wide.network = lambda d, c: MLP(d, out=1, width=8)
    refused(lambda: wide.load(tmp_path / "model"), "model holds a network of another shape")
    (tmp_path / "model").write_bytes((tmp_path / "model").read_bytes()[:-1])
    refused(lambda: loaded.load(tmp_path / "model"), "model is damaged")
    with pytest.raises(FileNotFoundError, match="none"):
        loaded.load(tmp_path / "none")


STACKED = {
    "FM": lambda: small(nl.FlowMatching),
    "OT-CFM matched": lambda: small(nl.OTCFM, minibatch=16, matched=4),
    "NSGF": lambda: small(nl.NSGF, **FEW),
    "NSGF on policy": lambda: small(nl.NSGF, renew=15, on_policy=True, **FEW),
}


@pytest.mark.parametrize("name", STACKED)
@pytest.mark.parametrize("clip", [0.05, 1e3])
def test_models_fitted_together_are_those_fitted_alone(name, clip, tmp_path):
    """Each with its seed and data, clipped by its own gradient; a checkpoint holds all of them."""
    budget = nl.Training(steps=40, batch=32, warmup=10, ema=0.9, every=20, clip=clip)
    targets = [FAR, FAR, nl.toy.Gaussian((40.0, 0.0), ((9.0, 0.0), (0.0, 1.0)))]
    seeds = [3, 4, 5]
    together, again = ([STACKED[name]() for _ in seeds] for _ in range(2))
    nl.fit_together(together, [ROUND] * 3, targets, budget, seeds=seeds, progress=False, checkpoint=tmp_path / "run")
    nl.fit_together(again, [ROUND] * 3, targets, budget, seeds=seeds, progress=False, checkpoint=tmp_path / "run")
    total = 0.0
    for model, twin, target, seed in zip(together, again, targets, seeds, strict=True):
        alone = STACKED[name]().fit(ROUND, target, budget, seed=seed, progress=False)
        total += alone.losses[0]
        for p, q, r in zip(
            alone.velocity.parameters(), model.velocity.parameters(), twin.velocity.parameters(), strict=True
        ):
            assert (p - q).abs().max() < 1e-4 and torch.equal(q, r)
        x = ROUND.sample(20, chance())
        error = (alone.sample(20, 5, start=x) - model.sample(20, 5, start=x)).abs().max()
        assert error < 1e-3 * float(alone.velocity.spread)
    assert together[0].losses == pytest.approx([total], rel=1e-4)


def test_a_conditional_stack():
    pair = [small(nl.FlowMatching) for _ in range(2)]
    nl.fit_together(pair, [ROUND] * 2, [[LEFT, FAR], [FAR, LEFT]], SHORT, seeds=[0, 1], progress=False)
    alone = fitted("FM", target=[FAR, LEFT], seed=1)
    assert (pair[1].sample(20, 5, label=1) - alone.sample(20, 5, label=1)).abs().max() < 1e-3


def test_what_cannot_be_stacked(tmp_path):
    def together(*models, targets=(FAR, FAR)):
        return nl.fit_together(models, [ROUND] * 2, targets, SHORT, seeds=[0, 1], progress=False)

    refused(lambda: together(MODELS["EPT"](), MODELS["EPT"]()), "EPT cannot be fitted together with others")
    wide = nl.FlowMatching(lambda d, c: MLP(d, width=8))
    refused(lambda: together(small(nl.FlowMatching), wide), "networks must be of one kind and shape")
    refused(
        lambda: together(*(small(nl.FlowMatching) for _ in "ab"), targets=(FAR, normal(50, 3))),
        "source has dimension 2",
    )
    on_disk = [small(nl.NSGF, folder=tmp_path, **FEW) for _ in "ab"]
    refused(lambda: together(*on_disk), "each model needs a folder of its own")
    refused(
        lambda: nl.fit_together([small(nl.FlowMatching)], [ROUND], [FAR], SHORT, seeds=[0, 1]),
        "seeds must be one for each model, 1, and at least one, got 2",
    )
    refused(lambda: nl.fit_together([], [], [], SHORT, seeds=[]), "at least one, got 0")
    twice = small(nl.FlowMatching)
    refused(lambda: together(twice, twice), "models must be different objects")
    shared = MLP(2, width=4)
    refused(lambda: together(*(nl.FlowMatching(lambda d, c: shared) for _ in "ab")), "network must make a new network")


# --- a network of the reader's own ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_networks_are_in_single_precision(dtype):
    """Also where the default is another; one that its maker has put into another dtype is refused, by its name."""
    torch.set_default_dtype(torch.float64)
    try:
        own = nl.FlowMatching(lambda d, c: Plain(d)).fit(ROUND, FAR, SHORT, progress=False)
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert {p.dtype for p in own.velocity.parameters()} == {own.sample(3, 2).dtype} == {torch.float32}
    same(outcome(own), outcome(nl.FlowMatching(lambda d, c: Plain(d)).fit(ROUND, FAR, SHORT, progress=False)))
    other = lambda d, c: Plain(d).to(dtype)  # noqa: E731
    refused(lambda: nl.FlowMatching(other).fit(ROUND, FAR, SHORT), f"network must make a network in float32.*{dtype}")
    plus = nl.NSGFPlusPlus(network=lambda d, c: Plain(d), predictor=other, **FEW)
    refused(lambda: plus.fit(ROUND, FAR, SHORT, progress=False), f"predictor must make a network in float32.*{dtype}")


class Plain(nn.Module):
    """A reader's own network, without time features, standardisation or labels."""

    def __init__(self, d):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(d + 1, 16), nn.Tanh(), nn.Linear(16, d))

    def forward(self, x, t):
        return self.layers(torch.cat([x, t.unsqueeze(-1)], -1))


def test_a_network_of_ones_own(tmp_path):
    def make():
        return nl.NSGF(network=lambda d, classes: Plain(d), **FEW)

    model = make().fit(ROUND, FAR, nl.Training(steps=400, batch=64, rate=1e-2, warmup=20, ema=0.97), progress=False)
    assert (model.sample(200, 5).mean(0) - torch.tensor([4.0, 0.0])).norm() < 0.6
    model.save(tmp_path / "model")
    same(outcome(make().load(tmp_path / "model")), outcome(model))
