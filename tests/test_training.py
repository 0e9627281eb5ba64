"""Networks and the training loop: the recursions by hand, and what a kill leaves intact."""

import math
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from test_bad_input import refused
from test_streams import FAR, LABELS, POINTS, Hidden, chance, loader, normal
from torch import nn

import nsgf_lite as nl
from nsgf_lite import training
from nsgf_lite.models import two_phase
from nsgf_lite.networks import MLP, Stack, seeded
from nsgf_lite.training import checkpoints, train
from nsgf_lite.training.machines import Machine

ROUND = nl.toy.Gaussian()

# --- the loop ---------------------------------------------------------------------------------------------------------

SHORT = nl.Training(steps=60, batch=32, warmup=10, ema=0.9, every=20)


def narrow(d, classes):
    return MLP(d, width=16, depth=2, classes=classes)


def small(kind, **options):
    return kind(network=narrow, **options)


def line(steps=30, seed=0, loss=None, **options):
    """Train a small network on a small regression; the network, its weights before each step, the losses."""
    network, seen, g = seeded(lambda: nn.Linear(3, 1), chance(seed)), [], chance(seed)
    x, y = normal(50, 3), normal(50, 1, seed=1)

    def regress(net, step):
        seen.append([p.detach().clone() for p in network.parameters()])
        row = torch.randint(50, (10,), generator=g)
        return (net(x[row]) - y[row]).square().mean()

    budget = nl.Training(**{"steps": steps, "batch": 10, "warmup": 5, "ema": 0.0, **options})
    losses = training.train(network, loss or regress, budget, g, progress=False)
    return network, seen, losses


def test_the_average_is_the_recursion():
    raw, seen, _ = line()
    averaged, same, _ = line(ema=0.7)
    assert all(torch.equal(a, b) for one, two in zip(seen, same, strict=True) for a, b in zip(one, two, strict=True))
    weights = [*seen[1:], [p.detach() for p in raw.parameters()]]  # after each step
    for k, p in enumerate(averaged.parameters()):
        mean = weights[0][k].double()
        for step in weights[1:]:
            mean = 0.7 * mean + 0.3 * step[k]
        assert (mean - p).abs().max() < 1e-6


def test_rates():
    budget = nl.Training(steps=50, rate=0.1, warmup=10)
    assert [budget.rate_at(k) for k in (0, 4, 9, 10, 30)] == pytest.approx([0.01, 0.05, 0.1, 0.1, 0.05])
    assert 0 < budget.rate_at(49) < 1e-3
    waves = nl.Training(steps=50, rate=0.1, warmup=0, decay=5)
    assert [waves.rate_at(k) for k in (0, 5, 10, 25, 40)] == pytest.approx([0.1, 0.05, 0.1, 0.05, 0.1])
    flat = nl.Training(steps=50, rate=0.1, warmup=0, decay=0)
    assert flat.rate_at(0) == flat.rate_at(49) == 0.1
    _, seen, _ = line(rate=0.02, warmup=4, steps=3, decay=0)
    moves = [(b[0] - a[0]).abs().max() for a, b in zip(seen, seen[1:], strict=False)]
    assert float(moves[0]) == pytest.approx(0.02 / 4, rel=1e-3)  # Adam's first step is the rate itself


def test_long_gradients_are_shortened_and_short_ones_are_not():
    def steep(slope):
        network, *_ = line(steps=1, clip=0.5, loss=lambda net, step: slope * net(torch.ones(1, 3)).sum())
        return math.sqrt(sum(float(p.grad.square().sum()) for p in network.parameters()))

    assert steep(100.0) == pytest.approx(0.5, rel=1e-4) and steep(0.1) == pytest.approx(0.2)


def test_losses_are_means_over_a_hundred_steps():
    values = [float(k % 7) for k in range(250)]
    loss = lambda net, step: net(torch.ones(1, 3)).sum() * 0 + values[step]  # noqa: E731
    assert line(steps=250, loss=loss)[2] == pytest.approx(
        [sum(values[k : k + 100]) / min(100, 250 - k) for k in (0, 100, 200)]
    )


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_divergence_names_the_step(value):
    loss = lambda net, step: net(torch.ones(1, 3)).sum() * (value if step == 3 else 1)  # noqa: E731
    with pytest.raises(FloatingPointError, match=r"train diverged: the loss is (nan|-?inf) at step 4 of 30"):
        line(loss=loss)


@pytest.mark.parametrize(
    "bad",
    [
        {"steps": 0},
        {"batch": 2.5},
        {"every": -1},
        {"rate": 0.0},
        {"clip": math.inf},
        {"warmup": -1},
        {"decay": 0.5},
        {"ema": 1.0},
        {"ema": "0.9"},
    ],
)
def test_bad_budgets(bad):
    refused(lambda: nl.Training(**bad), *bad)


def test_a_checkpoint_of_another_run_is_refused_and_the_difference_named(tmp_path):
    file = tmp_path / "run"

    def fit(model, budget=SHORT, target=FAR, seed=0):
        return model.fit(ROUND, target, budget, seed=seed, checkpoint=file, progress=False)

    first = fit(small(nl.FlowMatching))
    finished = fit(small(nl.FlowMatching))  # nothing is left to do
    assert finished.losses == first.losses and torch.equal(finished.sample(9, 5), first.sample(9, 5))
    refused(lambda: fit(small(nl.FlowMatching, smallest=0.1)), "models.0.smallest was 0.01 and is 0.1$")
    other = nl.Training(**{**vars(SHORT), "rate": 2e-3})
    refused(lambda: fit(small(nl.FlowMatching), other), "training.rate was 0.001 and is 0.002$")
    refused(lambda: fit(small(nl.FlowMatching), seed=3), "seeds.0 was 0 and is 3$")
    refused(lambda: fit(small(nl.FlowMatching), target=ROUND), "data.0.1 was 'Gaussian")
    refused(lambda: fit(nl.FlowMatching(network=lambda d, c: MLP(d, width=8))), "network was 'MLP")
    refused(lambda: fit(small(nl.StochasticInterpolant)), "models.0.model was 'FlowMatching'")
    file.write_bytes(file.read_bytes()[:-3])
    refused(lambda: fit(small(nl.FlowMatching)), "run is damaged")


def test_a_checkpoint_of_another_shape_is_refused(tmp_path):
    def train(wide):
        loss = lambda net, step: net(torch.ones(1, wide)).sum()  # noqa: E731
        budget = nl.Training(steps=3, batch=1)
        training.train(nn.Linear(wide, 1), loss, budget, chance(), checkpoint=tmp_path / "run", progress=False)

    train(3)
    refused(lambda: train(4), "run holds another network")


# --- killed and taken up again ----------------------------------------------------------------------------------------


class Fuse(Exception):
    pass


class Fused(MLP):
    """A network that fails after so many calls of all its kind."""

    left = math.inf

    def forward(self, *inputs):
        Fused.left -= 1
        if Fused.left < 0:
            raise Fuse
        return super().forward(*inputs)


def fused(d, classes):
    return Fused(d, width=16, depth=2, classes=classes)


def fused_ratio(d, classes):
    return Fused(d, out=1, width=16, depth=2, classes=classes)


def teacher():
    return small(nl.RectifiedFlow).fit(ROUND, FAR, SHORT, progress=False)


FEW = {"eps": 0.5, "minibatch": 16, "pool": 6, "steps": 3, "step": 0.6, "together": 2}
CLASSES = [FAR, POINTS[LABELS == 1]], [ROUND, POINTS]
RUNS = {
    "FM": lambda f: (nl.FlowMatching(fused), ROUND, FAR),
    "SI": lambda f: (nl.StochasticInterpolant(fused), *CLASSES),
    "OT-CFM": lambda f: (nl.OTCFM(fused, minibatch=32), ROUND, POINTS),
    "OT-CFM matched": lambda f: (nl.OTCFM(fused, minibatch=16, matched=5), ROUND, FAR),
    "2-RF": lambda f: (nl.RectifiedFlow(fused, teacher=teacher(), pairs=100, teacher_steps=3), POINTS, FAR),
    "EPT": lambda f: (nl.EPT(steps=9, particles=50, network=fused_ratio), ROUND, FAR),
    "NSGF": lambda f: (nl.NSGF(network=fused, renew=7, **FEW), ROUND, FAR),
    "NSGF on policy": lambda f: (nl.NSGF(network=fused, renew=7, on_policy=True, half=True, **FEW), *CLASSES),
    "NSGF on disk": lambda f: (nl.NSGF(network=fused, renew=7, folder=f / "pool", **FEW), loader(), FAR),
    "loader": lambda f: (nl.FlowMatching(fused, labels=3), loader(7, labels=True), loader(11, labels=True)),
}


def outcome(model, source=None, target=None, **options):
    if source is not None:
        model.fit(source, target, options.pop("training", SHORT), progress=False, **options)
    state = {f"{a}/{b}": t for a, network in model.networks().items() for b, t in network.state_dict().items()}
    start = model.sample(20, model.steps if hasattr(model, "steps") else 4, start=normal(20, 2))
    return state | {"sample": start, "losses": torch.tensor(model.losses, dtype=torch.float64)}


def same(one, two):
    assert one.keys() == two.keys()
    for name in one:
        assert torch.equal(one[name], two[name]), name


@pytest.mark.parametrize("name", RUNS)
def test_an_interrupted_run_goes_on_to_the_bit(name, tmp_path):
    Fused.left, steps = math.inf, []
    make = RUNS[name]
    whole = outcome(*make(tmp_path / "whole"))
    before = torch.random.get_rng_state()
    for calls in (28, 32):  # it fails between step 20 and 40, is taken up at 20, and fails again between 40 and 60
        Fused.left = calls
        with pytest.raises(Fuse):
            outcome(*make(tmp_path), checkpoint=tmp_path / "run")
        Fused.left = math.inf
        steps.append(checkpoints.read(tmp_path / "run")[1]["step"])
    assert steps == [20, 40]
    same(outcome(*make(tmp_path), checkpoint=tmp_path / "run"), whole)
    assert torch.equal(torch.random.get_rng_state(), before)


LONG = nl.Training(steps=120, batch=32, warmup=10, ema=0.9, every=10)


def killable(kind, folder):
    """Model, source and target of the runs that are killed."""
    home = Path(folder) / "pool" if kind == "disk" else None
    return nl.NSGF(network=narrow, renew=7, on_policy=kind == "disk", folder=home, **FEW), loader(), FAR


def child(kind, folder):
    """What the process that is killed does: the run, slowed down, so that the blow falls somewhere within it."""
    torch.set_num_threads(1)
    model, source, target = killable(kind, folder)
    batch = model._batch
    model._batch = lambda *given: (time.sleep(0.02), batch(*given))[1]
    model.fit(source, target, LONG, checkpoint=Path(folder) / "run", progress=False)


@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_a_killed_process_is_taken_up_to_the_bit(kind, tmp_path):
    """SIGKILL, at some moment after the first checkpoint."""
    moment = random.Random(kind)
    code = "import sys; sys.path.insert(0, sys.argv[1]); import test_training; test_training.child(*sys.argv[2:])"
    file = tmp_path / "run"
    process = subprocess.Popen([sys.executable, "-c", code, Path(__file__).parent, kind, tmp_path], cwd=tmp_path)
    try:
        deadline = time.monotonic() + 120
        while not file.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(moment.uniform(0, 1))
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert process.returncode == -signal.SIGKILL, "it came to its end before the blow, or failed"
    assert 0 < checkpoints.read(file)[1]["step"] < LONG.steps
    resumed = outcome(*killable(kind, tmp_path), training=LONG, checkpoint=file)
    same(resumed, outcome(*killable(kind, tmp_path / "whole"), training=LONG))
    if kind == "disk":
        assert len(list((tmp_path / "pool").iterdir())) == FEW["pool"]


def test_models_fitted_together_go_on_to_the_bit(tmp_path):
    """Each from its own chance, whose state is in the file."""

    def fit(**options):
        models = [nl.FlowMatching(fused), nl.FlowMatching(fused)]
        nl.fit_together(models, [ROUND] * 2, [FAR, POINTS], SHORT, seeds=[3, 4], progress=False, **options)
        return [outcome(model) for model in models]

    Fused.left = math.inf
    whole = fit()
    Fused.left = 30
    with pytest.raises(Fuse):
        fit(checkpoint=tmp_path / "run")
    Fused.left = math.inf
    assert checkpoints.read(tmp_path / "run")[1]["step"] == 20
    for one, two in zip(fit(checkpoint=tmp_path / "run"), whole, strict=True):
        same(one, two)


def test_the_same_run_writes_the_same_bytes(tmp_path):
    for name in "ab":
        small(nl.NSGF, **FEW).fit(ROUND, FAR, SHORT, checkpoint=tmp_path / name, progress=False)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_the_number_of_threads_is_part_of_a_run():
    """Equal bits with equal numbers; with another, sums are taken in another order, and rounded otherwise."""

    def fit(threads):
        torch.set_num_threads(threads)
        try:
            budget = nl.Training(steps=4, batch=256, warmup=2)
            return outcome(nl.FlowMatching(lambda d, c: MLP(d, width=128)), ROUND, FAR, training=budget)
        finally:
            torch.set_num_threads(1)

    one, two, again = fit(1), fit(2), fit(2)
    same(two, again)
    for name in one:
        assert torch.allclose(one[name], two[name], rtol=1e-3, atol=1e-4), name


# --- whose a file is --------------------------------------------------------------------------------------------------


def test_a_checkpoint_of_other_data_is_refused(tmp_path):
    """Of equal shape and mean; of a law that does not show its points; of a loader; of a teacher with other weights."""

    def go(name, target, model=None):
        (model or small(nl.FlowMatching)).fit(ROUND, target, SHORT, checkpoint=tmp_path / name, progress=False)

    other = POINTS.clone()
    other[:2] = POINTS[:2].flip(0) + torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    assert torch.allclose(other.mean(0), POINTS.mean(0))
    kinds = {"tensor": lambda x: x, "law": Hidden, "loader": lambda x: torch.utils.data.DataLoader(x, 8)}
    for name, made in kinds.items():
        go(name, made(POINTS))
        go(name, made(POINTS.clone()))
        refused(lambda name=name, made=made: go(name, made(other)), r"data\.0\.1 was .* hash")
    one, two = (small(nl.RectifiedFlow).fit(ROUND, FAR, SHORT, seed=k, progress=False) for k in range(2))
    go("taught", FAR, small(nl.RectifiedFlow, teacher=one, pairs=50))
    refused(lambda: go("taught", FAR, small(nl.RectifiedFlow, teacher=two, pairs=50)), r"data\.0\.2 was 'velocity")


def test_a_checkpoint_of_other_code_is_refused(tmp_path, monkeypatch):
    def go():
        small(nl.FlowMatching).fit(ROUND, FAR, SHORT, checkpoint=tmp_path / "run", progress=False)

    go()
    monkeypatch.setattr(checkpoints, "code", lambda: "another")
    refused(go, "run was made under other hyperparameters: code was '[0-9a-f]{16}' and is 'another'$")


def test_code_is_what_runs(tmp_path):
    """Comments, docstrings and layout are none; a number is; the file's name counts."""
    file, marks = tmp_path / "a.py", []
    for text in (
        'def f(x):\n    """Doc."""\n    return x + 1\n',
        '"""Of the file."""\n\ndef f(x):  # a remark\n    """Another."""\n\n    return (x + 1)\n',
        "def f(x):\n    return x + 2\n",
    ):
        file.write_text(text, encoding="utf-8")
        marks.append(checkpoints.code_of([file]))
    assert marks[0] == marks[1] != marks[2]
    file.rename(tmp_path / "b.py")
    assert checkpoints.code_of([tmp_path / "b.py"]) != marks[2]
    assert checkpoints.code() == checkpoints.code() and len(checkpoints.code()) == 16


HOLDER = """
import sys, time
from nsgf_lite.training import checkpoints
with checkpoints.held(sys.argv[1], folder=sys.argv[2] == "folder"):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("what", ["file", "folder"])
def test_two_runs_on_one_path(what, tmp_path):
    """The second is told, and nothing of the first is touched; when the first is killed, the path is free."""
    path = tmp_path / "run"
    if what == "folder":
        path.mkdir()
    draft = tmp_path / ".run.1.part"
    first = subprocess.Popen([sys.executable, "-c", HOLDER, path, what], stdout=subprocess.PIPE, encoding="utf-8")
    try:
        assert first.stdout.readline() == "held\n"
        draft.write_bytes(b"the first's")
        options = {"folder": path} if what == "folder" else {}
        model = small(nl.NSGF, **FEW, **options)
        given = {} if what == "folder" else {"checkpoint": path}
        with pytest.raises(OSError, match="another run is at work here") as told:
            model.fit(ROUND, FAR, SHORT, progress=False, **given)
        assert told.value.filename == str(path) and draft.exists() and not model.trajectories.added
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()
    model.fit(ROUND, FAR, SHORT, progress=False, **given)
    left = [p.name for p in tmp_path.iterdir()]
    assert left == ["run"] if what == "file" else ".lock" not in [p.name for p in path.iterdir()]


@pytest.mark.parametrize("name", ["run", "[a]run"])
def test_a_run_clears_its_own_drafts_only(name, tmp_path):
    """Another process of the same run writes run.1, whose drafts begin like those of run, and not its to delete."""
    path, others = tmp_path / name, [f".{name}.1.77.part", f".{name}.a.part", f".{name}1.77.part", ".arun.77.part"]
    for draft in [*others, f".{name}.77.part"]:
        (tmp_path / draft).touch()
    with checkpoints.held(path):
        left = sorted(p.name for p in tmp_path.iterdir())
    assert left == sorted([*others, f".{name}.lock"])


def test_two_threads_on_one_path(tmp_path):
    inside, done, told = threading.Event(), threading.Event(), []

    def first():
        with checkpoints.held(tmp_path / "run"):
            inside.set()
            done.wait(60)

    thread = threading.Thread(target=first)
    thread.start()
    inside.wait(60)
    for path in (tmp_path / "run", tmp_path / "other"):
        try:
            with checkpoints.held(path):
                told.append("")
        except OSError as error:
            told.append(error.strerror)
    done.set()
    thread.join()
    assert told == ["another run is at work here; each needs a path of its own", ""]
    with checkpoints.held(tmp_path / "run"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_that_cannot_be_written_is_noticed_before_the_work(tmp_path):
    (tmp_path / "text").write_text("a file", encoding="utf-8")
    begun = []

    class Spy(nl.NSGF):
        def _begin(self, generator):
            begun.append(self)

    for path in (tmp_path / ("long" * 99), tmp_path / ("a" * 248), tmp_path / "text" / "run"):
        with pytest.raises(OSError, match="could not write here") as told:
            Spy(**FEW).fit(ROUND, FAR, SHORT, checkpoint=path, progress=False)
        assert told.value.filename == str(path)
    refused(lambda: Spy(**FEW).fit(ROUND, FAR, SHORT, checkpoint=tmp_path), "a file is needed, and .* is a folder")
    refused(lambda: Spy(**FEW, folder=tmp_path / "text").fit(ROUND, FAR, SHORT), "text is a file")
    (tmp_path / "run.clock").mkdir()
    plus = nl.NSGFPlusPlus(network=narrow, **FEW)
    refused(lambda: plus.fit(ROUND, FAR, SHORT, checkpoint=tmp_path / "run"), r"run\.clock is a folder")
    assert not begun and not (tmp_path / "run.sinkhorn").exists()


# --- what a training leaves alone -------------------------------------------------------------------------------------

ACCELERATED = """
import torch
from accelerate import Accelerator
torch.set_num_threads(1)
import nsgf_lite as nl

def losses():
    model = nl.FlowMatching(network=lambda d, c: nl.networks.MLP(d, width=16, depth=2))
    return model.fit(nl.toy.Gaussian(), nl.toy.Moons(), nl.Training(steps=10, batch=32), progress=False).losses

before = losses()
theirs = Accelerator(gradient_accumulation_steps=4, mixed_precision="bf16", cpu=True)
print(losses() == before, theirs.gradient_accumulation_steps, theirs.mixed_precision, theirs.sync_gradients)
"""


def test_a_readers_accelerator_and_ours_leave_one_another_alone():
    """Theirs may come after ours, and keeps its accumulation and its precision; ours takes over neither."""
    done = subprocess.run([sys.executable, "-c", ACCELERATED], capture_output=True, encoding="utf-8")
    assert done.stdout == "True 4 bf16 True\n", done.stderr


class Noisy(nn.Module):
    """A network with dropout and running statistics."""

    def __init__(self, d, out=None):
        super().__init__()
        layers = nn.Linear(d + 1, 32), nn.BatchNorm1d(32), nn.SiLU(), nn.Dropout(0.5), nn.Linear(32, out or d)
        self.layers = nn.Sequential(*layers)

    def forward(self, x, t):
        return self.layers(torch.cat([x, t.unsqueeze(-1)], -1))


NOISY = {
    "FM": lambda: nl.FlowMatching(lambda d, c: Noisy(d)),
    "on policy": lambda: nl.NSGF(network=lambda d, c: Noisy(d), renew=7, on_policy=True, **FEW),
    "NSGF++": lambda: nl.NSGFPlusPlus(network=lambda d, c: Noisy(d), predictor=lambda d, c: Noisy(d, 1), **FEW),
    "EPT": lambda: nl.EPT(steps=6, particles=50, network=lambda d, c: Noisy(d, 1)),
}


@pytest.mark.parametrize("name", NOISY)
@pytest.mark.parametrize("mode", [False, True])
def test_samples_are_drawn_in_evaluation_mode(name, mode):
    """Twice the same, running statistics untouched, and each part left in the mode it was in."""
    model = NOISY[name]().fit(ROUND, FAR, SHORT, progress=False)
    networks, start = model.networks().values(), normal(20, 2)
    for network in networks:
        network.train(mode)
        network.layers[3].eval()
    before = [{k: t.clone() for k, t in network.state_dict().items()} for network in networks]
    state = torch.random.get_rng_state()
    one, two = (model.sample(20, getattr(model, "steps", 4), start=start) for _ in range(2))
    assert torch.equal(one, two) and torch.equal(torch.random.get_rng_state(), state)
    for network, was in zip(networks, before, strict=True):
        same(network.state_dict(), was)
        assert network.training is mode and network.layers[1].training is mode and not network.layers[3].training


@pytest.mark.parametrize("name", ["FM", "on policy"])
def test_dropout_is_the_seeds_and_goes_on_to_the_bit(name, tmp_path, monkeypatch):
    """Whatever torch's global generator is at, which is left alone; and it does drop, in training."""
    whole = outcome(NOISY[name](), ROUND, FAR)
    torch.manual_seed(11)
    before, advance, left = torch.random.get_rng_state(), training.loop._Run.advance, [30]

    def fails(self, value, name):
        left[0] -= 1
        if left[0] < 0:
            raise Fuse
        advance(self, value, name)

    with monkeypatch.context() as patch:
        patch.setattr(training.loop._Run, "advance", fails)
        with pytest.raises(Fuse):
            outcome(NOISY[name](), ROUND, FAR, checkpoint=tmp_path / "run")
    same(outcome(NOISY[name](), ROUND, FAR, checkpoint=tmp_path / "run"), whole)
    assert torch.equal(torch.random.get_rng_state(), before)
    plain = NOISY[name]()
    make = plain.network
    plain.network = lambda d, c: (net := make(d, c), setattr(net.layers[3], "p", 0.0))[0]
    assert plain.fit(ROUND, FAR, SHORT, progress=False).losses != whole["losses"].tolist()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_models_are_fitted_and_sampled_in_every_mode(mode, tmp_path):
    """The same to the bit, inside no_grad and inference_mode; a model loaded there too."""
    ratio = lambda d, c: MLP(d, out=1, width=16, depth=2)  # noqa: E731
    for make in (lambda: small(nl.FlowMatching), lambda: nl.EPT(steps=6, particles=50, network=ratio)):
        whole = outcome(make(), POINTS, FAR)
        with mode():
            same(outcome(make(), POINTS.clone(), FAR), whole)
        model = make().fit(POINTS, FAR, SHORT, progress=False)
        with mode():
            same(outcome(model), whole)
            model.save(tmp_path / "model")
            same(outcome(make().load(tmp_path / "model")), whole)


# --- two processes ----------------------------------------------------------------------------------------------------

SCRIPT = """
import os
import torch
torch.set_num_threads(1)
import nsgf_lite as nl
from nsgf_lite.training import machine
narrow = lambda d, c: nl.networks.MLP(d, width=16, depth=2, classes=c)
ratio = lambda d, c: nl.networks.MLP(d, out=1, width=16, depth=2)
laws = nl.toy.Gaussian(), nl.toy.Gaussian((4.0, 0.0))
budget = nl.Training(steps=10, batch=32, ema=0.9, every=5)
for time in range(2):  # the second takes up what the first has done
    few = {"eps": 0.5, "minibatch": 16, "pool": 4, "steps": 3, "step": 0.6, "renew": 4, "on_policy": True}
    model = nl.NSGF(network=narrow, folder="pool", **few)
    model.fit(*laws, budget, checkpoint="run", progress=False)
    model.save(f"model{time}{machine().process_index}")
nl.EPT(steps=4, particles=50, network=ratio).fit(*laws, budget, progress=False)
plus = nl.NSGFPlusPlus(network=narrow, predictor=ratio, folder="plus", **few)
plus.fit(*laws, budget, checkpoint="two", progress=False).save(f"plus{machine().process_index}")
if machine().process_index == 0:
    os.remove("run.1")
torch.distributed.barrier()
try:
    model.fit(*laws, budget, checkpoint="run", progress=False)
except ValueError as error:
    print(error)
"""


def test_two_processes_train_one_network(tmp_path):
    """As torchrun and Accelerate start them: weights are equal, minibatches are not, and each has files of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    each = [{"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"} for rank in "01"]
    pair = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT],
            env={**os.environ, **variables, "MASTER_PORT": port, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
        )
        for variables in each
    ]
    try:
        said = [process.communicate(timeout=300)[0] for process in pair]
    finally:
        for process in pair:
            process.kill()
    assert [process.returncode for process in pair] == [0, 0], said
    assert all("the processes' checkpoints run, run.1, … are of different steps, [10, 0]" in text for text in said), (
        said
    )
    models = []
    for name in ("model00", "model01", "model10", "model11"):
        model = small(nl.NSGF, eps=0.5, minibatch=16, pool=4, steps=3, step=0.6, renew=4, on_policy=True)
        models.append(model.load(tmp_path / name).velocity.state_dict())
    for model in models[1:]:
        same(model, models[0])
    pools = [sorted((tmp_path / name).iterdir()) for name in ("pool", "pool.1")]
    assert len(pools[0]) == len(pools[1]) == 4
    assert all(a.read_bytes() != b.read_bytes() for a, b in zip(*pools, strict=True))
    plus = [checkpoints.read(tmp_path / f"plus{rank}")[0] for rank in (0, 1)]
    same(*plus)
    assert {f"two.{part}{rank}" for part in ("sinkhorn", "straight", "clock") for rank in ("", ".1")} <= {
        path.name for path in tmp_path.iterdir()
    }


def test_a_process_does_not_stand_in_the_way_of_another(tmp_path, monkeypatch):
    """The second process looks whether it can write its own three files, while the first is at work on the others."""
    begun = []
    monkeypatch.setattr(two_phase, "machine", lambda: Machine(torch.device("cpu"), 1, 2))
    monkeypatch.setattr(nl.NSGF, "fit", lambda *given, **named: begun.append(named["checkpoint"]) or 1 / 0)
    plus = nl.NSGFPlusPlus(network=narrow, **FEW)
    with checkpoints.held(tmp_path / "run.sinkhorn"), pytest.raises(ZeroDivisionError):
        plus.fit(ROUND, FAR, SHORT, checkpoint=tmp_path / "run")
    assert begun == [f"{tmp_path / 'run'}.sinkhorn"]
    with checkpoints.held(tmp_path / "run.clock.1"), pytest.raises(OSError, match="another run is at work here"):
        plus.fit(ROUND, FAR, SHORT, checkpoint=tmp_path / "run")


def test_processes_replace_their_checkpoints_together(tmp_path):
    """When they wait for one another each has written all of the new one, and none has lost the old one."""
    file, seen = tmp_path / "run", []

    class Meeting(Machine):
        def all_of(self, number):
            drafts = [path for path in tmp_path.glob(".run.*.part") if path.stat().st_size]
            old = checkpoints.read(file)[1]["step"] if file.exists() else None
            new = [checkpoints.read(path)[1]["step"] for path in drafts]
            seen.append((number, old, new))
            return [number]

    network, where = nn.Linear(2, 1), Meeting(torch.device("cpu"), 0, 1)
    budget = nl.Training(steps=4, every=2, batch=4, warmup=0)
    train(
        network,
        lambda net, step: net(torch.ones(4, 2)).square().mean(),
        budget,
        chance(),
        checkpoint=file,
        where=where,
        progress=False,
    )
    assert seen == [(0, None, []), (2, None, [2]), (4, 2, [4])]


def test_a_run_leaves_the_lock_of_the_next_one(tmp_path):
    """Whose folder was deleted under it, and made anew by another run."""
    lock = tmp_path / ".run.lock"
    with checkpoints.held(tmp_path / "run"):
        lock.rename(tmp_path / "gone")
        lock.touch()
    assert lock.exists()


@pytest.mark.parametrize("path", ["pool", "pool/", "a/pool"])
def test_a_process_adds_its_number_to_the_name(path):
    first, second = (Machine(torch.device("cpu"), rank, 2).own(path) for rank in (0, 1))
    assert first == Path(path) and second == Path(path.rstrip("/") + ".1")


# --- networks ---------------------------------------------------------------------------------------------------------


def test_the_network_does_not_mind_the_unit_of_length():
    x, t = normal(50, 2) * 3 + 5, torch.linspace(0, 1, 50)
    one, ten = (seeded(lambda: MLP(2, width=16), chance()) for _ in range(2))
    one.standardise(x)
    ten.standardise(10 * x)
    assert torch.allclose(one.centre, x.mean(0)) and float(one.spread) == pytest.approx(
        float(x.var(0, correction=0).mean().sqrt())
    )
    assert torch.allclose(10 * one(x, t), ten(10 * x, t), rtol=1e-4, atol=1e-4)
    assert MLP(3, out=1)(normal(5, 3), torch.zeros(5)).shape == (5, 1)


def test_the_code_of_time():
    """t, cos(πkt) and sin(πkt) for k = 1, 2, 3, one by one by the library of C, beside the points and the label."""
    net = MLP(2, out=9, frequencies=3, classes=2)
    net.layers = nn.Identity()
    x, t, label = normal(4, 2), torch.tensor([0.0, 0.25, 0.7, 1.0]), torch.tensor([0, 1, 1, 0])
    for row, z, s, c in zip(net(x, t, label).tolist(), x.tolist(), t.tolist(), label.tolist(), strict=True):
        code = [f(math.pi * k * s) for f in (math.cos, math.sin) for k in (1, 2, 3)]
        assert row == pytest.approx([*z, s, *code, float(c == 0), float(c == 1)], abs=1e-6)


def test_weights_are_the_generators_also_from_two_threads():
    """Not those of torch's global state, which is left alone; and each thread gets its own."""

    def made(seed):
        return seeded(lambda: nn.Linear(50, 50), chance(seed)).weight

    torch.manual_seed(1)
    before, alone = torch.random.get_rng_state(), [made(seed) for seed in range(200)]
    assert torch.equal(torch.random.get_rng_state(), before)
    assert len({float(weight.detach().sum()) for weight in alone}) == 200
    torch.manual_seed(2)
    together, interval = {}, sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        halves = [range(k, 200, 2) for k in range(2)]
        work = [
            threading.Thread(target=lambda half=half: together.update({k: made(k) for k in half})) for half in halves
        ]
        for thread in work:
            thread.start()
        for thread in work:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert all(torch.equal(together[k], weight) for k, weight in enumerate(alone))


@pytest.mark.parametrize("label", [[0, 3, 1], [0, -1, 1], [0.0, 0.5, 1.0], [0.0, 1.0, 1.0], [True, False, True]])
def test_labels_that_are_none(label):
    net, x, t, label = MLP(2, width=4, classes=3), normal(3, 2), torch.zeros(3), torch.tensor(label)
    part = "from 0 to 2" if label.dtype == torch.int64 else "integers, got torch"
    refused(lambda: net(x, t, label), f"label must be {part}")
    stack = Stack([MLP(2, width=4, classes=3) for _ in range(2)])
    refused(lambda: stack(x.expand(2, 3, 2), t.expand(2, 3), label.expand(2, 3)), f"label must be {part}")
    net(x, t, torch.tensor([0, 2, 1], dtype=torch.uint8))


def test_networks_refuse():
    for bad in ({"dimension": 0}, {"width": 0}, {"depth": 2.5}, {"out": 0}, {"classes": -1}, {"frequencies": -1}):
        refused(lambda bad=bad: MLP(**{"dimension": 2, **bad}), next(iter(bad)))
    x, t = normal(5, 2), torch.zeros(5)
    refused(lambda: MLP(2, classes=3)(x, t), "label is missing: classes = 3")
    refused(lambda: MLP(2)(x, t, torch.zeros(5)), "label is not wanted: classes = 0")
    refused(lambda: Stack([MLP(2), MLP(3)]), "one kind and shape")
    refused(lambda: Stack([]), "one kind and shape")


def test_a_stack_is_its_members():
    nets = [seeded(lambda: MLP(2, width=16, classes=2), chance(k)) for k in range(3)]
    for k, net in enumerate(nets):
        net.standardise(normal(9, 2, seed=k) * (k + 1))
    x, t, label = normal(3, 5, 2), torch.rand(3, 5, generator=chance()), torch.tensor([[0, 1, 1, 0, 1]] * 3)
    stack = Stack(nets)
    each = torch.stack([net(*inputs) for net, *inputs in zip(nets, x, t, label, strict=True)])
    assert torch.allclose(stack(x, t, label), each, atol=1e-6)
    others = [MLP(2, width=16, classes=2) for _ in range(3)]
    stack.unstack(others)
    for net, other in zip(nets, others, strict=True):
        same(net.state_dict(), other.state_dict())
