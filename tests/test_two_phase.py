"""Unit tests of NSGFPlusPlus and of the closed forms on segments, and what the chapter says of the recorded run."""

import json
import math
from pathlib import Path

import pytest
import torch

import nsgf_lite as nl
from nsgf_lite.closed_forms import gaussian_w2, handover_constant, segment_law, segment_time, segment_velocity

RECORD = Path(__file__).resolve().parent.parent / "book" / "results" / "two_phase.json"
ROUND, FAR = nl.toy.Gaussian(), nl.toy.Gaussian((3.0, 1.0), ((0.5, 0.0), (0.0, 0.5)))
SHORT = nl.Training(steps=30, batch=64, every=10, warmup=5)


def network(d, classes):
    return nl.networks.MLP(d, width=16, depth=1, classes=classes)


def clock(d, classes):
    return nl.networks.MLP(d, out=1, width=16, depth=1, classes=classes)


def plusplus(**options):
    given = {"eps": 0.5, "minibatch": 32, "pool": 3, "network": network, "predictor": clock} | options
    return nl.NSGFPlusPlus(**given)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def fitted():
    return plusplus().fit(ROUND, FAR, SHORT, seed=3, progress=False)


def test_path_is_sinkhorn_steps_then_straight_ones_from_each_particles_time(fitted):
    start = ROUND.sample(20, generator())
    path = fitted.path(20, 4, start=start)
    assert path.shape == (5 + 4 + 1, 20, 2)
    assert torch.equal(path[0], start)
    assert torch.allclose(path[:6], fitted.sinkhorn.path(20, 5, start=start), atol=1e-6)
    begin = fitted.time(path[5])
    assert begin.shape == (20,) and bool(((begin > 0) & (begin < 1)).all())
    x, h = path[5], (1 - begin)[:, None] / 4
    with torch.no_grad():
        for k in range(4):
            x = x + h * fitted.straight.velocity(x, begin + k * h[:, 0])
    assert torch.allclose(path[-1], x, atol=1e-5)
    assert torch.equal(fitted.sample(20, 4, start=start), path[-1])


@pytest.mark.parametrize(("solver", "stages"), [("euler", 1), ("heun", 2), ("rk4", 4)])
def test_evaluations_count_every_call_of_a_network(fitted, solver, stages):
    calls = []
    hooks = [net.register_forward_hook(lambda *_: calls.append(1)) for net in fitted.networks().values()]
    fitted.sample(8, 3, solver, start=ROUND.sample(8, generator()))
    for hook in hooks:
        hook.remove()
    assert len(calls) == fitted.evaluations(3, solver) == 5 + 1 + 3 * stages
    assert fitted.sinkhorn.evaluations(3, solver) == 3 * stages


def test_an_unknown_solver_is_refused(fitted):
    for ask in (fitted.evaluations, fitted.straight.evaluations):
        with pytest.raises(ValueError, match="^solver must be one of euler, heun, rk4, got 'midpoint'"):
            ask(3, "midpoint")


def test_its_second_phase_is_rectified_flow_of_the_same_seed(fitted):
    alone = nl.RectifiedFlow(network).fit(ROUND, FAR, SHORT, seed=3, progress=False)
    for name, value in fitted.straight.velocity.state_dict().items():
        assert torch.equal(value, alone.velocity.state_dict()[name]), name


def test_the_clock_learns_the_best_guess():
    model = plusplus(minibatch=16, pool=1, network=lambda d, c: nl.networks.MLP(d, width=2, depth=1))
    model.predictor = lambda d, c: nl.networks.MLP(d, out=1, width=32, depth=2)
    far = nl.toy.Gaussian((6.0, 0.0))
    model.fit(ROUND, far, nl.Training(steps=500, rate=1e-2, batch=256, ema=0.98), progress=False)
    points = torch.tensor([[0.5, 0.0], [3.0, 0.0], [5.0, 1.0]])
    best, _ = segment_time(points, (0.0, 0.0), torch.eye(2), far.mean, far.covariance)
    assert (model.time(points) - best).abs().max() < 0.06


def test_clock_is_standardised_whatever_the_networks_are():
    class Plain(torch.nn.Module):
        def __init__(self, d, out):
            super().__init__()
            self.line = torch.nn.Linear(d + 1, out)

        def forward(self, x, t):
            return self.line(torch.cat([x, t[:, None]], 1))

    shifted = nl.toy.Gaussian((50.0, 0.0))
    model = plusplus(network=lambda d, _: Plain(d, d)).fit(shifted, shifted, SHORT, progress=False)
    assert abs(float(model.clock.centre[0]) - 50) < 1
    model = plusplus(predictor=lambda d, _: Plain(d, 1)).fit(ROUND, FAR, SHORT, progress=False)
    assert model.sample(5, 2).shape == (5, 2)


def test_save_and_load(fitted, tmp_path):
    fitted.save(tmp_path / "model")
    again = plusplus().load(tmp_path / "model")
    start = ROUND.sample(20, generator(1))
    assert torch.equal(again.sample(20, 3, start=start), fitted.sample(20, 3, start=start))
    assert torch.equal(again.time(start), fitted.time(start)) and again.losses == fitted.losses
    with pytest.raises(ValueError, match="give the points to start from"):
        again.sample(20, 3)
    with pytest.raises(ValueError, match="holds a model with"):
        plusplus(step=0.1).load(tmp_path / "model")
    with pytest.raises(ValueError, match="another shape"):
        plusplus(network=lambda d, c: nl.networks.MLP(d, width=8, depth=1)).load(tmp_path / "model")


class Stopped(Exception):
    pass


@pytest.mark.parametrize("stop", [25, 55, 85])
@pytest.mark.parametrize("kind", ["tensor", "loader"])
def test_a_run_that_was_stopped_goes_on_to_the_bit(tmp_path, monkeypatch, stop, kind):
    """Killed in the first, the second and the third training."""

    def data():
        points = FAR.sample(300, generator(5))
        if kind == "tensor":
            return points
        return torch.utils.data.DataLoader(
            torch.utils.data.TensorDataset(points), batch_size=50, shuffle=True, generator=generator(6)
        )

    straight_through = plusplus(renew=10).fit(ROUND, data(), SHORT, seed=2, progress=False)
    done, step = [0], torch.optim.Adam.step

    def counted(self, *arguments, **options):
        done[0] += 1
        if done[0] > stop:
            raise Stopped
        return step(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.Adam, "step", counted)
        with pytest.raises(Stopped):
            plusplus(renew=10).fit(ROUND, data(), SHORT, seed=2, checkpoint=tmp_path / "run", progress=False)
    resumed = plusplus(renew=10).fit(ROUND, data(), SHORT, seed=2, checkpoint=tmp_path / "run", progress=False)
    assert resumed.losses == straight_through.losses
    for name, net in straight_through.networks().items():
        for key, value in net.state_dict().items():
            assert torch.equal(value, resumed.networks()[name].state_dict()[key]), (name, key)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run.clock", "run.sinkhorn", "run.straight"]
    with pytest.raises(ValueError, match="under other hyperparameters"):
        plusplus(renew=10).fit(ROUND, data(), SHORT, seed=9, checkpoint=tmp_path / "run", progress=False)


def test_classes():
    left, right = nl.toy.Gaussian((-4.0, 0.0)), nl.toy.Gaussian((4.0, 0.0))
    training = nl.Training(steps=250, batch=128, rate=1e-2, ema=0.9)
    model = plusplus(minibatch=64, pool=4).fit(ROUND, [left, right], training, progress=False)
    for label, side in ((0, -1), (1, 1)):
        x = model.sample(100, 5, label=label)
        assert float((side * x[:, 0] > 0).float().mean()) > 0.9
    both = model.sample(200, 5)[:, 0]
    assert 0.3 < float((both > 0).float().mean()) < 0.7
    # The clock knows the class: a point far on the right is late for one and early for none.
    right_of_all = torch.tensor([[4.0, 0.0], [4.0, 0.0]])
    late, other = model.time(right_of_all, torch.tensor([1, 0])).tolist()
    assert late > other + 0.2
    with pytest.raises(ValueError, match="label is missing"):
        model.time(right_of_all)


def test_two_runs_of_one_seed_agree_and_the_global_state_is_left_alone():
    torch.manual_seed(11)
    before = torch.get_rng_state()
    one, two = (plusplus().fit(ROUND, FAR, SHORT, seed=4, progress=False) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one.sample(10, 2), two.sample(10, 2))


def test_what_is_refused(fitted):
    for steps in (6, 0, 2.5, "5"):
        with pytest.raises(ValueError, match="^steps must be"):
            nl.NSGFPlusPlus(steps=steps)
    with pytest.raises(ValueError, match="not been fitted"):
        plusplus().time(torch.zeros(3, 2))
    with pytest.raises(ValueError, match="not been fitted"):
        plusplus().sample(3, 2)
    with pytest.raises(ValueError, match=r"^x must have shape \(n, 2\), got \(3, 4\)"):
        fitted.time(torch.zeros(3, 4))
    with pytest.raises(ValueError, match="^x must be finite"):
        fitted.time(torch.full((3, 2), math.nan))
    with pytest.raises(ValueError, match="call its fit"):
        nl.fit_together([plusplus(), plusplus()], [ROUND] * 2, [FAR] * 2, SHORT, seeds=[0, 1])


def test_time_takes_both_precisions(fitted):
    x = ROUND.sample(5, generator())
    assert torch.equal(fitted.time(x), fitted.time(x.double()))


# the closed forms -------------------------------------------------------------------------------------------------


def test_what_the_closed_forms_refuse():
    plane = ((0.0, 0.0), torch.eye(2), (1.0, 0.0), torch.eye(2))
    for t in (-0.1, 1.1, math.nan, "1", True):
        with pytest.raises(ValueError, match="^t must be a number from 0 to 1"):
            segment_law(t, *plane)
        with pytest.raises(ValueError, match="^t must be a number from 0 to 1"):
            segment_velocity(t, *plane)
    with pytest.raises(ValueError, match="^S and target_covariance must have one size"):
        segment_law(0.5, 0.0, 1.0, (1.0, 0.0), torch.eye(2))
    with pytest.raises(ValueError, match="^A and B must have one size"):
        gaussian_w2(0.0, 1.0, (1.0, 0.0), torch.eye(2))
    with pytest.raises(ValueError, match=r"^x must have shape \(k, 2\)"):
        segment_time(torch.zeros(3, 1), *plane)
    for options, need in (((1.5, 1.0, 1.0), "^t must"), ((0.5, 0.0, 1.0), "^sigma"), ((0.5, 1.0, -1.0), "^radius")):
        with pytest.raises(ValueError, match=need):
            handover_constant(*options)


def test_closed_forms_take_single_precision_points():
    plane = ((0.0, 0.0), torch.eye(2), (1.0, 0.0), torch.eye(2))
    x = torch.zeros(3, 2)
    assert segment_velocity(0.5, *plane)(x).dtype == torch.float32
    assert segment_time(x, *plane)[0].dtype == torch.float64


# the recorded run -------------------------------------------------------------------------------------------------


def test_the_recorded_run_says_what_the_chapter_says():
    """However many trainings it holds: rows of draws, one for each."""
    run, rows = json.loads(RECORD.read_text(encoding="utf-8")), {}
    for r in run["rows"]:
        rows.setdefault((r["set"], r["evaluations"], r["method"]), []).append(r["w2"])
    w2 = {key: torch.tensor(each) for key, each in rows.items()}
    worse_than_flow = 0
    for name in run["floor"]:
        for spent in (8, 12, 20, 40):
            two, one, flow, shared, mended, pairs = (
                w2[name, spent, method]
                for method in ("NSGF++", "NSGF", "FM", "NSGF++, one time for all", "NSGF, then OT-CFM", "OT-CFM")
            )
            assert bool((two > one).all()) and 1.2 < two.mean() / one.mean() < 2.1
            worse_than_flow += bool(two.mean() > flow.mean())
            gain = float(shared.mean() / two.mean())
            assert abs(gain - 1) < 0.04 if "moons" in name else 0.85 < gain < 0.95
            assert abs(mended.mean() / pairs.mean() - 1) < 0.08
        rising = [float(w2[name, spent, "NSGF++"].mean()) for spent in (8, 12, 20, 40)]
        assert rising == sorted(rising)
        times = torch.tensor(list(run["handover"].values())).reshape(-1, 3)
        assert bool(((times[:, 1] > 0.11) & (times[:, 1] < 0.2) & ((times[:, 2] - 0.6723).abs() < 1e-6)).all())
    assert worse_than_flow == 19
