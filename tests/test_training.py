"""Networks and the training loop: the recursions by hand, and what a kill leaves intact."""

import math
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from test_bad_input import refused
from test_streams import FAR, LABELS, POINTS, chance, loader, normal
from torch import nn

import nsgf_lite as nl
from nsgf_lite import training
from nsgf_lite.networks import MLP, Stack, seeded
from nsgf_lite.training import checkpoints

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
if machine().is_main_process:
    os.remove("run.1")
machine().wait_for_everyone()
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
            text=True,
        )
        for variables in each
    ]
    try:
        said = [process.communicate(timeout=120)[0] for process in pair]
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
