"""The plane: every method on five data sets, with 10 and 100 steps, against the floor (Zhu et al. 2024, Table 1).

    python -m benchmarks.table1                      # floors, tuning, seeds, curves; resumes where it stopped
    python -m benchmarks.table1 --workers 8 --work /somewhere/table1
    python -m benchmarks.table1 --report             # the record and the table of what has been done so far

Every piece of work is a file in the work folder (--work, or the variable NSGF_TABLE1_WORK; else _build/table1), so a
run that was stopped goes on. A piece carries the identity of the code that made it (the library, and this file down to
the order of work, without comments and docstrings) and is refused by any other. The record that the book shows,
book/results/table1.json, is written from the pieces at the end and by --report.

The protocol, written down before the run
-----------------------------------------
*Question.* Is NSGF as good as OT-CFM? Asked for each of the five sets with 10 and with 100 steps: ten cells.

*Seeds.* Ten for NSGF and for OT-CFM, three for the others. A seed decides everything about a training. All trainings
are scored on the same 20 draws of 1024 starting points and 1024 test points, against which W_2 is exact.

*Difference.* d[s, k] = W_2 of NSGF minus W_2 of OT-CFM, for seed s and draw k. Its mean is the answer of the cell. Both
seeds and draws are samples, so the variance of the mean is taken as var(means over draws)/seeds + var(means over
seeds)/draws, which counts the remainder twice and errs on the safe side; its 90 % interval has Student's quantile with
min(seeds, draws) - 1 degrees of freedom.

*Margin.* 3 % of the law's floor: less than what another twenty draws would move either mean by (one standard error: 4
to 7 % of the floor).

*What is said of a cell.* "equivalent" if the interval lies within plus or minus the margin (two one-sided tests at
5 %), even where it leaves out zero; else "better" or "worse" (NSGF) if it leaves out zero; else "undecided". With fewer
than ten seeds a cell is "undecided", whatever its interval. Of ten cells without any true difference one would be
called better or worse by chance.

*Points that leave the numbers.* A sample of which a point ends at infinity scores infinity. (This rule was added when
it first happened, in the last ten of the pair's hundred trainings: of 20,480 points of one NSGF, one did, begun at
five deviations from the centre.) A method with such a sample in a cell is "worse" there than one without, whatever the
rest; if both have one it is "undecided". Means and intervals are then of the scores that are finite, the seed
concerned is left out of the pair's test, and how many samples left is recorded beside them.

*What is said of the method.* "NSGF and OT-CFM are equivalent in the plane" only if all ten cells are equivalent (which
needs no correction for ten tests). If cells are worse and none is better, NSGF is "behind, in these cells"; if cells
are better and none is worse, "ahead, in these"; otherwise the cells are listed, and nothing is said of the method.

*Tuning.* Before any seed is run, each method's knobs are searched, one after the other, on the grid of KNOBS: of the
present value and its two neighbours the best stays, and so on until every knob lies between two neighbours that are
no better (it is bracketed; at the end of a grid, one neighbour), or TRIALS trials have been made, the same number for
all; the first round brackets each knob with the others as they then stand. A trial trains on both sets of TUNING_SETS
for two fifths of the budget and is judged by W_2 over the floor with *ten* steps, on five draws that the table never
uses; a hundred steps take the same choice. Learning rate and decay of the weights' average are searched for all. NSGF's
own knobs are eps, step, size of its minibatches and number of starting points in its pool; OT-CFM's are size of its
minibatches and number of pairs in its table; EPT's its step; JKO-Flow's the time of the whole flow and the critic's
steps for one of the map (these two average no weights). 2-RF and 3-RF take 1-RF's choice. The trace of each search is
in the record. One training is a noisy judge: neighbours that differ by little may be the wrong way round.

*Same for all.* Network (three hidden layers of 256), batch (256), Adam with a rise of 200 steps, one half cosine down,
clipping at 1, and 5,000 optimiser steps. Averaged weights, warm-up, cosine and clipping are ours, not the paper's.
Seconds are processor seconds.

*The paper's budget.* NSGF and OT-CFM once more on two sets, with the paper's 20,000 steps and batch of 256, which is
also the number of points that a Sinkhorn problem or a matching sees, and without average, warm-up, decay and clipping;
the rate is Adam's 1e-3, since the paper names none for the plane. One seed: a look, not a test.

*Why.* (Added when the pair's cells were known: NSGF is behind in all five with 100 steps.) Its pool then starts from a
quarter of the points, so that it is two and a half times as large and not ten; on two sets and three seeds it is
trained once more from as many points as for ten steps.

*Deviations between methods.* NSGF and EPT are trained once for each number of steps. For 100 steps NSGF's step leaves
as much of the way as ten steps do, and its pool has a quarter of the starting points, ten times the steps. EPT keeps
one network for each step, lets the rate fall once for each, and clips a move at half the spread of the data. JKO-Flow
(added when the others' pieces were there; nothing of theirs was changed) descends JSD, which is what its paper takes
for data, keeps one map for each step, and shares the optimiser steps between map and critic, each of the table's size.

*The floor* of a law is the mean W_2 of 400 pairs of samples of 1024 points, with its 95 % interval: one number for a
law. The twenty draws have chance of their own, so that a perfect generator's mean over them is uncertain by more than
that; NSGF's ratio to the floor is measured again on sixty other draws, for the first three seeds.
"""

import argparse
import ast
import fcntl
import hashlib
import json
import math
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field, replace
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path

# One core for each worker: set before any library reads it.
os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")

import torch
from scipy.stats import t as student
from torch import Tensor

import nsgf_lite as nl
from benchmarks import pieces
from benchmarks.provenance import ROOT, provenance, writable, write_record

RECORD = ROOT / "book" / "results" / "table1.json"

# FFJORD's scales, and torchcfm's for the letter S.
_ROUND, _EIGHT, _MOONS = nl.toy.Gaussian(), nl.toy.EightGaussians(8**0.5, 8**-0.5), nl.toy.Moons(0.1, 2.0, -1.0)
LAWS = {
    "8gaussians": _EIGHT,
    "moons": _MOONS,
    "scurve": nl.toy.SCurve(noise=0.05, scale=1.5),
    "checkerboard": nl.toy.Checkerboard(side=8.0),
}
LAW_OF = {"8gaussians-moons": "moons"} | {name: name for name in LAWS}
_ORDER = ("8gaussians", "8gaussians-moons", "moons", "scurve", "checkerboard")
SETS = {name: (_EIGHT if name == "8gaussians-moons" else _ROUND, LAWS[LAW_OF[name]]) for name in _ORDER}
STEPS = (10, 100)
PAIR, MARGIN, LEVEL = ("NSGF", "OT-CFM"), 0.03, 0.90
PAIR_SEEDS, SEEDS = 10, 3
TUNING_SETS, TRIALS = ("8gaussians-moons", "scurve"), 20
KNOBS: dict[str, tuple[float, ...]] = {
    "rate": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
    "ema": (0.9, 0.97, 0.99, 0.997, 0.999),
    "eps": (0.005, 0.01, 0.02, 0.04, 0.08, 0.16),
    "step": (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8),
    "minibatch": (128, 256, 512, 1024, 2048),
    "points": (4096, 16384, 65536),
    "ten steps": (0.05, 0.1, 0.2, 0.5, 1.0, 2.0),
    "time": (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0),
    "ascents": (1, 2, 3, 5, 8),
}
CROWD = 16_384  # particles of a JKO flow, as many as NSGF's pool starts from with ten steps
POINTS, DRAWS, MORE_DRAWS, VALIDATION, FLOOR_PAIRS = 1024, 20, 60, 5, 400
EVALUATIONS = (4, 8, 20, 40, 100)  # of the network, for the curves
PAPER_SETS, PAPER_BATCH, PAPER_RATE = ("8gaussians", "moons"), 256, 1e-3
FULL_SETS = PAPER_SETS

Choice = dict[str, float]


@dataclass(frozen=True)
class Method:
    """One row of the table: how to make the model, where the search of its knobs starts, and its teacher."""

    make: "Callable[[int, nl.Flow | None, Choice, nl.toy.Law], nl.Flow | Jko]"
    own: Choice = field(default_factory=dict)  # knobs beside rate and average, with the values to start from
    averaged: bool = True
    per_steps: bool = False  # trained once for each number of steps
    own_steps: bool = False  # has no field that a solver could follow
    teacher: str | None = None  # trained on another method's samples, with that one's choice

    @property
    def start(self) -> Choice:
        """Where the search starts, in the order in which it goes through the knobs."""
        return {"rate": 3e-3, **self.own, **({"ema": 0.99} if self.averaged else {})}


class Jko:
    """A JKO flow down JSD to the target, called as the others are; its map and its critic share the optimiser steps."""

    def __init__(self, steps: int, _: object, choice: Choice, target: nl.toy.Law) -> None:
        self.ascents = int(choice["ascents"])
        self.flow = nl.JKOFlow(
            nl.functionals.JSD(target),
            choice["time"] / steps,
            steps,
            ascents=self.ascents,
            particles=CROWD,
            transport=partial(nl.networks.ResidualMap, width=256, depth=3),
            critic=partial(nl.networks.LogRatio, width=256, depth=3),
        )

    def fit(self, source: nl.toy.Law, _: object, training: nl.Training, *, seed: int, progress: bool) -> None:
        share = replace(training, steps=training.steps // (1 + self.ascents))
        self.flow.fit(source, share, seed=seed, progress=progress)

    def sample(self, n: int, steps: int, solver: str, *, start: Tensor) -> Tensor:
        return self.path(n, steps, start=start)[-1]

    def path(self, n: int, steps: int, *, start: Tensor) -> Tensor:
        if steps != self.flow.steps:
            raise ValueError(f"steps must be those of the training, {self.flow.steps}, got {steps}")
        return self.flow.path(n, start=start)

    def save(self, file: Path) -> None:
        self.flow.save(file)

    def load(self, file: Path) -> "Jko":
        self.flow.load(file)
        return self


def _nsgf(steps: int, _: object, choice: Choice, __: object) -> nl.Flow:
    n, late = int(choice["minibatch"]), steps > STEPS[0]
    step = 1 - (1 - choice["step"]) ** (STEPS[0] / steps)
    minibatches = max(1, int(choice["points"]) // (4 * n if late else n))
    together = max(1, min(2048 // n, minibatches))
    return nl.NSGF(eps=choice["eps"], step=step, steps=steps, minibatch=n, pool=minibatches, together=together)


def _otcfm(_: int, __: object, choice: Choice, ___: object) -> nl.Flow:
    n = int(choice["minibatch"])
    return nl.OTCFM(minibatch=n, matched=int(choice["points"]) // n)


METHODS = {
    "NSGF": Method(_nsgf, {"eps": 0.02, "step": 0.4, "minibatch": 512, "points": 16384}, per_steps=True),
    "EPT": Method(
        lambda steps, _, choice, __: nl.EPT(step=choice["ten steps"] / steps, steps=steps),
        {"ten steps": 0.2},
        averaged=False,
        per_steps=True,
        own_steps=True,
    ),
    "OT-CFM": Method(_otcfm, {"minibatch": 512, "points": 16384}),
    "1-RF": Method(lambda *_: nl.RectifiedFlow()),
    "2-RF": Method(lambda _, teacher, *__: nl.RectifiedFlow(teacher=teacher), teacher="1-RF"),
    "3-RF": Method(lambda _, teacher, *__: nl.RectifiedFlow(teacher=teacher), teacher="2-RF"),
    "SI": Method(lambda *_: nl.StochasticInterpolant()),
    "FM": Method(lambda *_: nl.FlowMatching(smallest=1e-4)),
    "JKO-Flow": Method(Jko, {"time": 4.0, "ascents": 3}, averaged=False, per_steps=True, own_steps=True),
}


def draws(name: str, count: int, first: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Starting points, test points and a second test sample (for a floor): the same for every method."""
    source, target = SETS[name]
    out = []
    for k in range(first, first + count):
        g = torch.Generator().manual_seed(k)
        out.append((source.sample(POINTS, g), target.sample(POINTS, g), target.sample(POINTS, g)))
    return out


TEST, VALID, AGAIN, FLOOR = 10_000, 20_000, 40_000, 30_000  # seeds of the first draw


def scores(model: nl.Flow | Jko, name: str, steps: int, count: int, first: int, solver: str = "euler") -> list[float]:
    """W_2 to each of the draws; infinity if a point of the sample is not finite."""
    out = []
    for x, y, _ in draws(name, count, first):
        z = model.sample(POINTS, steps, solver, start=x)
        out.append(nl.metrics.w2(z, y) if bool(torch.isfinite(z).all()) else math.inf)
    return out


def mean(values: list[float]) -> float:
    """Of those that are finite; infinity if none is."""
    finite = [value for value in values if math.isfinite(value)]
    return statistics.fmean(finite) if finite else math.inf


def left(values: list[float]) -> int:
    """Number of those that are not finite."""
    return sum(not math.isfinite(value) for value in values)


def floor(name: str, count: int, first: int) -> list[float]:
    return [nl.metrics.w2(z, y) for _, y, z in draws(name, count, first)]


# --- pieces of work: each writes one file, with the identity of the code that made it ---------------------------------


def part(*names: object) -> Path:
    work = os.environ.get("NSGF_TABLE1_WORK", str(ROOT / "_build" / "table1"))
    file = Path(work).joinpath(*map(str, names))
    return file.with_name(file.name + ".json")


# Pieces of this code are equal to those of today's, to the bit: what came after only takes infinity for a score, adds
# pieces of another kind, and JKO-Flow. Checked by making pieces of both methods of the pair once more.
ALIKE = {"02aefaa43ca622c6", "77039123203492e7", "ec380ade6f2f956a"}


@cache
def identity() -> str:
    """Hash of the library and of this file down to the order of work, as parsed, without comments and docstrings."""
    digest = hashlib.sha256()
    for file in sorted([*(ROOT / "nsgf_lite").rglob("*.py"), Path(__file__)]):
        tree = ast.parse(file.read_text(encoding="utf-8").split("\n# --- the order of work")[0])
        for node in ast.walk(tree):
            body = getattr(node, "body", None)
            first = body[0] if isinstance(body, list) and body else None
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                first.value = ast.Constant(None)
        digest.update(f"{file.name} {ast.dump(tree)}".encode())
    return digest.hexdigest()[:16]


def keep(file: Path, result: dict, start: float) -> None:
    """Write a piece with its identity and its processor seconds, atomically."""
    pieces.keep(file, {"identity": identity(), "seconds of the piece": time.process_time() - start, **result})


def read(file: Path) -> dict:
    """A piece; ValueError if other code made it, or the file is none."""
    try:
        piece = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is damaged ({error}): delete it, and it is made again") from None
    if piece.get("identity") not in {identity(), *ALIKE}:
        raise ValueError(
            f"{file} was made by other code ({piece.get('identity')}, this is {identity()}): "
            "run the commit that made it, or take another work folder (--work)"
        )
    return piece


def training(choice: Choice, steps: int) -> nl.Training:
    return nl.Training(steps=steps, rate=choice["rate"], ema=choice.get("ema", 0.0))


def label(choice: Choice) -> str:
    return "-".join(f"{value:g}" for value in choice.values())


def floors(law: str) -> None:
    start, target, values = time.process_time(), LAWS[law], []
    for k in range(FLOOR, FLOOR + FLOOR_PAIRS):
        g = torch.Generator().manual_seed(k)
        values.append(nl.metrics.w2(target.sample(POINTS, g), target.sample(POINTS, g)))
    keep(part("floor", law), {"w2": values}, start)


def trial(method: str, choice: Choice, name: str, budget: int) -> None:
    """Train with two fifths of the budget, and judge with ten steps on draws that the table never uses."""
    start = time.process_time()
    model = METHODS[method].make(STEPS[0], None, choice, SETS[name][1])
    model.fit(*SETS[name], training(choice, 2 * budget // 5), seed=99, progress=False)
    ratio = sum(scores(model, name, STEPS[0], VALIDATION, VALID)) / sum(floor(name, VALIDATION, VALID))
    keep(part(budget, "tune", method, label(choice), name), {"choice": choice, "ratio": ratio}, start)


def neighbours(choice: Choice, knob: str) -> list[Choice]:
    """The choices with this knob one place down and one place up on its grid."""
    grid = KNOBS[knob]
    at = grid.index(choice[knob])
    near = [{**choice, knob: grid[k]} for k in (at - 1, at + 1) if 0 <= k < len(grid)]
    return [one for one in near if one.get("points", math.inf) >= one.get("minibatch", 0)]


def search(start: Choice, look: Callable[[Choice], float | None]) -> tuple[Choice, list[Choice], list[Choice]]:
    """Best choice so far, all trials in their order, and the choices to try next: none when the search has ended.

    `look` gives a choice's ratio, or None if it has not been tried.
    """
    best, trace, quiet, turn = start, [start], 0, 0
    if look(start) is None:
        return best, [], [start]
    knobs = list(start)
    while quiet < len(knobs) and len(trace) < TRIALS - 1:
        near = neighbours(best, knobs[turn % len(knobs)])
        unknown = [choice for choice in near if look(choice) is None]
        if unknown:
            return best, trace, unknown
        trace += [choice for choice in near if choice not in trace]
        better = min([best, *near], key=lambda choice: float(look(choice) or 0))
        quiet, turn = (quiet + 1, turn + 1) if better == best else (0, turn)
        best = better
    return best, trace, []


def _look(method: str, budget: int) -> Callable[[Choice], float | None]:
    def look(choice: Choice) -> float | None:
        files = [part(budget, "tune", method, label(choice), name) for name in TUNING_SETS]
        if not all(file.exists() for file in files):
            return None
        return statistics.fmean(_ratio(file) for file in files)

    return look


@cache
def _ratio(file: Path) -> float:
    return read(file)["ratio"]


def tuned(method: str, budget: int) -> dict | None:
    """What the search has chosen, for the record, with its trace; None while it has not ended."""
    teacher = METHODS[method].teacher
    if teacher:
        return tuned(teacher, budget)
    look = _look(method, budget)
    best, trace, wanted = search(METHODS[method].start, look)
    if wanted:
        return None
    tried = [{**choice, "ratio": look(choice)} for choice in trace]
    return {"choice": best, "ratio": look(best), "tried": tried}


def trained(method: str, name: str, seed: int, steps: int, budget: int) -> tuple[nl.Flow | Jko, float]:
    """The fitted model, from its file if there is one, and the processor seconds of its training, teachers included."""
    entry, outcome = METHODS[method], tuned(method, budget)
    if outcome is None:
        raise ValueError(f"{method} has not been tuned yet")
    choice = outcome["choice"]
    teacher, before = trained(entry.teacher, name, seed, steps, budget) if entry.teacher else (None, 0.0)
    model = entry.make(steps, teacher, choice, SETS[name][1])
    clock = part(budget, "model", name, f"{method}-{steps if entry.per_steps else 'all'}-{seed}")
    file = clock.with_suffix(".safetensors")
    if clock.exists():
        seconds = read(clock)["seconds"]
        return model.load(file), before + seconds
    start = time.process_time()
    model.fit(*SETS[name], training(choice, budget), seed=seed, progress=False)
    seconds = time.process_time() - start
    file.parent.mkdir(parents=True, exist_ok=True)
    model.save(file)
    keep(clock, {"seconds": seconds}, start)
    return model, before + seconds


def run(method: str, name: str, seed: int, budget: int) -> None:
    start, result = time.process_time(), {}
    for steps in STEPS:
        model, seconds = trained(method, name, seed, steps, budget)
        result[str(steps)] = {"w2": scores(model, name, steps, DRAWS, TEST), "seconds": seconds}
    keep(part(budget, "run", method, name, seed), result, start)


def paper(method: str, name: str, budget: int) -> None:
    """Four times the budget, at the paper's batch for everything, and without the habits that are ours."""
    start, result = time.process_time(), {}
    outcome = tuned(method, budget)
    assert outcome is not None
    choice = {**outcome["choice"], "minibatch": PAPER_BATCH}
    if method == "OT-CFM":  # a point and its partner for every row of every batch would be fresh pairs: as near as that
        choice["points"] = 2**17
    habits = nl.Training(4 * budget, PAPER_BATCH, PAPER_RATE, decay=0, warmup=0, clip=1e9, ema=0.0)
    for steps in STEPS:
        if steps == STEPS[0] or METHODS[method].per_steps:
            model = METHODS[method].make(steps, None, choice, SETS[name][1])
            model.fit(*SETS[name], habits, seed=0, progress=False)
        result[str(steps)] = {"w2": scores(model, name, steps, DRAWS, TEST)}
    keep(part(budget, "paper", method, name), {**result, "choice": choice}, start)


def full(name: str, seed: int, budget: int) -> None:
    """NSGF with a hundred steps, from as many starting points as with ten."""
    start, outcome = time.process_time(), tuned("NSGF", budget)
    assert outcome is not None
    choice = {**outcome["choice"], "points": 4 * outcome["choice"]["points"]}
    model = METHODS["NSGF"].make(STEPS[1], None, choice, SETS[name][1])
    model.fit(*SETS[name], training(choice, budget), seed=seed, progress=False)
    keep(part(budget, "full", name, seed), {"w2": scores(model, name, STEPS[1], DRAWS, TEST)}, start)


def again(name: str, budget: int) -> None:
    """The first method's scores on other draws, the mean over seeds for each draw, and the floor on the same draws."""
    start, method, count = time.process_time(), PAIR[0], MORE_DRAWS
    result: dict = {"method": method, "floor": floor(name, count, AGAIN)}
    for steps in STEPS:
        models = [trained(method, name, seed, steps, budget)[0] for seed in range(SEEDS)]
        each = [scores(model, name, steps, count, AGAIN) for model in models]
        result[str(steps)] = [mean(list(draw)) for draw in zip(*each, strict=True)]
    keep(part(budget, "again", name), result, start)


def curves(method: str, name: str, budget: int) -> None:
    """W_2 against evaluations of the network for each solver, and along the path; paths of a few particles (seed 0)."""
    start, stages = time.process_time(), {"euler": 1, "heun": 2, "rk4": 4}
    result: dict = {"solvers": {}}
    for solver, cost in stages.items():
        line = {}
        for evaluations in EVALUATIONS:
            if METHODS[method].per_steps:  # trained for 10 or for 100 steps: the nearer one
                own = 10 if evaluations <= 30 else 100
            else:
                own = 10
            model, _ = trained(method, name, 0, own, budget)
            steps = evaluations // cost
            if METHODS[method].own_steps:
                if solver != "euler" or own == line.get("own"):
                    continue
                steps, line["own"] = own, own
            line[str(steps * cost)] = mean(scores(model, name, steps, 2, TEST, solver))
        line.pop("own", None)
        result["solvers"][solver] = line
    model, _ = trained(method, name, 0, 10, budget)
    (x, y, _), *_ = draws(name, 1, TEST)
    path = model.path(POINTS, 10, start=x)
    result["along"] = [nl.metrics.w2(z, y) for z in path]
    result["paths"] = [[[round(c, 2) for c in p] for p in row] for row in path[:, :150].tolist()]
    keep(part(budget, "curves", method, name), result, start)


# --- the order of work ------------------------------------------------------------------------------------------------


def todo(budget: int) -> Iterator[tuple[Path, Callable[..., None], tuple]]:
    """The pieces that are still missing and can be done now, most urgent first."""

    def missing(file: Path, do: Callable[..., None], *given: object) -> Iterator:
        if not file.exists():
            yield file, do, given

    def trials(method: str) -> Iterator:
        for choice in search(METHODS[method].start, _look(method, budget))[2]:
            for name in TUNING_SETS:
                file = part(budget, "tune", method, label(choice), name)
                yield from missing(file, trial, method, choice, name, budget)

    def runs(method: str, seed: int) -> Iterator:
        teacher = METHODS[method].teacher
        for name in SETS:
            if tuned(method, budget) and (not teacher or part(budget, "run", teacher, name, seed).exists()):
                yield from missing(part(budget, "run", method, name, seed), run, method, name, seed, budget)

    for law in LAWS:
        yield from missing(part("floor", law), floors, law)
    for method in PAIR:
        yield from trials(method)
    for seed in range(PAIR_SEEDS):
        for method in PAIR:
            yield from runs(method, seed)
    for method in PAIR:
        if tuned(method, budget):
            for name in PAPER_SETS:
                yield from missing(part(budget, "paper", method, name), paper, method, name, budget)
    if tuned("NSGF", budget):
        for seed in range(SEEDS):
            for name in FULL_SETS:
                yield from missing(part(budget, "full", name, seed), full, name, seed, budget)
    rest = [method for method in METHODS if method not in PAIR]
    for method in rest:
        if not METHODS[method].teacher:
            yield from trials(method)
    for seed in range(SEEDS):
        for method in rest:
            yield from runs(method, seed)
    for name in SETS:
        if all(part(budget, "run", PAIR[0], name, seed).exists() for seed in range(SEEDS)):
            yield from missing(part(budget, "again", name), again, name, budget)
        for method in METHODS:
            if part(budget, "run", method, name, 0).exists():
                yield from missing(part(budget, "curves", method, name), curves, method, name, budget)


def with_parent(parent: int) -> None:
    """Let a worker end when the run that started it has ended, however it ended."""
    torch.set_num_threads(1)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def work(budget: int, workers: int) -> None:
    """Do all that is missing, `workers` pieces at a time in processes of their own; 0 does them one by one in this."""
    flying: dict[Future, Path] = {}
    said = f"{time.strftime('%H:%M:%S')} identity {identity()}"
    print(said, flush=True)
    if not workers:
        while job := next(todo(budget), None):
            job[1](*job[2])
        return
    with ProcessPoolExecutor(workers, get_context("spawn"), with_parent, (os.getpid(),)) as pool:
        while True:
            for file, do, given in todo(budget):
                if len(flying) >= workers:
                    break
                if file not in flying.values():
                    flying[pool.submit(do, *given)] = file
            if not flying:
                return
            for future in wait(flying, return_when=FIRST_COMPLETED).done:
                future.result()
                file = flying.pop(future)
                print(time.strftime("%H:%M:%S"), *file.parts[-3:], flush=True)


# --- the record -------------------------------------------------------------------------------------------------------


def half_width(values: list[float], level: float = 0.95) -> float | None:
    """Half the length of the t-interval of a mean; a single value has none."""
    n = len(values)
    if n < 2:
        return None
    return float(student.ppf((1 + level) / 2, n - 1)) * statistics.stdev(values) / math.sqrt(n)


def compared(differences: list[list[float]], floor_of_law: float) -> dict:
    """The protocol's test on differences (seeds, draws), NSGF minus OT-CFM, and its verdict."""
    by_seed = [statistics.fmean(row) for row in differences]
    by_draw = [statistics.fmean(column) for column in zip(*differences, strict=True)]
    gap, margin, seeds, count = statistics.fmean(by_seed), MARGIN * floor_of_law, len(by_seed), len(by_draw)
    half, verdict = None, "undecided"
    if seeds > 1:
        spread = math.sqrt(statistics.variance(by_seed) / seeds + statistics.variance(by_draw) / count)
        half = float(student.ppf((1 + LEVEL) / 2, min(seeds, count) - 1)) * spread
    if half is not None and seeds >= PAIR_SEEDS:
        if abs(gap) + half < margin:
            verdict = "equivalent"
        elif abs(gap) > half:
            verdict = "worse" if gap > 0 else "better"
    return {"gap": gap, "half": half, "margin": margin, "by_seed": by_seed, "by_draw": by_draw, "verdict": verdict}


def overall(verdicts: list[str]) -> str:
    """What the protocol says of the method, from what it says of its cells."""
    if len(verdicts) == len(SETS) * len(STEPS) and set(verdicts) == {"equivalent"}:
        return "equivalent"
    seen = {"better", "worse"} & set(verdicts)
    if seen == {"worse"}:
        return "behind"
    return "ahead" if seen == {"better"} else "undecided"


def bracketed(tried: list[dict], best: Choice) -> dict[str, bool]:
    """Whether each knob's value was seen between two that are no better, the others as they stood at some time."""

    def plain(one: dict) -> Choice:
        return {knob: value for knob, value in one.items() if knob != "ratio"}

    ratio = {label(plain(one)): one["ratio"] for one in tried}
    out = dict.fromkeys(best, False)
    for knob in best:
        for one in tried:
            near = neighbours(plain(one), knob)
            known = [ratio[label(choice)] for choice in near if label(choice) in ratio]
            if one[knob] == best[knob] and len(known) == 2 and min(known) >= one["ratio"]:
                out[knob] = True
    return out


def row(method: str, name: str, steps: str, budget: int, base: float) -> dict | None:
    """One entry of the table, from the seeds that have been run."""
    files = [part(budget, "run", method, name, seed) for seed in range(PAIR_SEEDS if method in PAIR else SEEDS)]
    done = [read(file)[steps] for file in files if file.exists()]
    if not done:
        return None
    means = [mean(one["w2"]) for one in done]
    value = statistics.fmean(means)
    out = {"w2": value, "interval": half_width(means), "ratio": value / base, "by_seed": means}
    out["seconds"] = statistics.median(one["seconds"] for one in done)
    return out | {"left": sum(left(one["w2"]) for one in done)}


def pair(name: str, steps: str, budget: int, base: float) -> dict | None:
    """The test of one cell, on the seeds that both methods have."""
    differences, gone = [], [0, 0]
    for seed in range(PAIR_SEEDS):
        files = [part(budget, "run", method, name, seed) for method in PAIR]
        if all(file.exists() for file in files):
            mine, rival = (read(file)[steps]["w2"] for file in files)
            gone = [gone[0] + left(mine), gone[1] + left(rival)]
            if not left(mine + rival):
                differences.append([a - b for a, b in zip(mine, rival, strict=True)])
    if not differences:
        return None
    out = compared(differences, base) | {"left": gone}
    if gone[0] and gone[1]:
        out["verdict"] = "undecided"
    elif gone[0] or gone[1]:
        out["verdict"] = "worse" if gone[0] else "better"
    return out


def record(budget: int) -> dict:
    """Collect the files of all pieces into one record; a piece that is missing is left out."""
    out: dict = {"protocol": {}, "tuning": {}, "sets": {}, "paper": {}, "curves": {}}
    for method, entry in METHODS.items():
        outcome = tuned(method, budget)
        if outcome:
            seen = bracketed(outcome["tried"], outcome["choice"])
            out["tuning"][method] = {"as": entry.teacher, **outcome, "bracketed": seen}
    verdicts = []
    for name in SETS:
        file = part("floor", LAW_OF[name])
        if not file.exists():
            continue
        base = read(file)["w2"]
        middle = statistics.fmean(base)
        here: dict = {"floor": middle, "floor_sd": statistics.stdev(base), "floor_interval": half_width(base)}
        rows = {m: {str(k): row(m, name, str(k), budget, middle) for k in STEPS} for m in METHODS}
        here["methods"] = {m: v for m, v in rows.items() if all(v.values())}
        here["pair"] = {str(k): p for k in STEPS if (p := pair(name, str(k), budget, middle))}
        verdicts += [p["verdict"] for p in here["pair"].values()]
        if (file := part(budget, "again", name)).exists():
            here["again"] = {k: v for k, v in read(file).items() if k in ("method", "floor", "10", "100")}
        out["sets"][name] = here
        lines = {m: part(budget, "curves", m, name) for m in METHODS}
        found = {m: read(file) for m, file in lines.items() if file.exists()}
        out["curves"][name] = {
            m: {k: v for k, v in line.items() if k in ("solvers", "along", "paths")} for m, line in found.items()
        }
        if name not in ("8gaussians", "moons"):  # the page draws the paths of these two
            for line in out["curves"][name].values():
                line.pop("paths")
        for method in PAIR:
            if name in PAPER_SETS and (file := part(budget, "paper", method, name)).exists():
                piece = read(file)
                short = {str(k): mean(piece[str(k)]["w2"]) for k in STEPS}
                gone = {str(k): left(piece[str(k)]["w2"]) for k in STEPS}
                out["paper"].setdefault(name, {})[method] = {**short, "left": gone, "choice": piece["choice"]}
    for name in FULL_SETS:
        files = [part(budget, "full", name, seed) for seed in range(SEEDS)]
        each = [read(file)["w2"] for file in files if file.exists()]
        if each:
            out.setdefault("full", {})[name] = {"by_seed": [mean(one) for one in each], "left": sum(map(left, each))}
    out["protocol"] = {
        "pair": PAIR,
        "margin": MARGIN,
        "level": LEVEL,
        "seeds": {"pair": PAIR_SEEDS, "others": SEEDS},
        "verdict": overall(verdicts),
        "complete": not any(todo(budget)),
    }
    sizes = {"steps": budget, "draws": DRAWS, "points": POINTS, "floor pairs": FLOOR_PAIRS, "trials": TRIALS}
    out["budget"] = {**sizes, "tuning steps": 2 * budget // 5, "paper steps": 4 * budget}
    top = [part("floor"), part(budget)]
    seconds = [
        read(f)["seconds of the piece"]
        for t in top
        for f in t.with_suffix("").rglob("*.json")
        if "model" not in f.parts
    ]
    out["provenance"] = provenance("python -m benchmarks.table1", sum(seconds), ["nsgf-lite", "torch", "POT", "scipy"])
    write_record(RECORD, out, json.dumps(out, separators=(",", ":")))
    return out


def show(out: dict) -> None:
    for steps in map(str, STEPS):
        print(f"\nW_2 / floor with {steps} steps")
        print(f"{'':8}" + "".join(f"{name:>20}" for name in out["sets"]))
        for method in METHODS:
            cells = [here["methods"].get(method, {}).get(steps) for here in out["sets"].values()]
            print(f"{method:8}" + "".join(f"{c['w2']:10.3f} ({c['ratio']:.2f})   " if c else f"{'':20}" for c in cells))
        for name, here in out["sets"].items():
            if cell := here["pair"].get(steps):
                width = math.nan if cell["half"] is None else cell["half"]
                print(
                    f"{name:20} {len(cell['by_seed'])} seeds, gap {100 * cell['gap'] / here['floor']:5.1f} % "
                    f"+- {100 * width / here['floor']:.1f} % of the floor: {cell['verdict']}"
                )
    print(f"\n{' and '.join(PAIR)}: {out['protocol']['verdict']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5_000, help="optimiser steps of each training")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--work", help="folder of the pieces, in place of _build/table1")
    parser.add_argument("--report", action="store_true", help="only write and show the record of what has been done")
    given = parser.parse_args()
    if given.work:
        os.environ["NSGF_TABLE1_WORK"] = given.work
    writable(RECORD)
    folder = part("lock").parent
    folder.mkdir(parents=True, exist_ok=True)
    for file in folder.rglob("*.json"):
        read(file)  # so that what other code made is refused before the work
    if not given.report:
        with open(folder / "lock", "w", encoding="utf-8") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise SystemExit(f"another run works in {folder}") from None
            work(given.steps, given.workers)
    show(record(given.steps))


if __name__ == "__main__":
    main()
