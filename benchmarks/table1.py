"""The plane: every method on five data sets, with 10 and 100 steps, against the floor (Zhu et al. 2024, Table 1).

    python -m benchmarks.table1                      # all of it: tuning, three seeds, curves; resumes where it stopped
    python -m benchmarks.table1 --seeds 5 --steps 10000 --workers 8
    python -m benchmarks.table1 --report             # the table of what has been done so far

Every piece of work is a file under _build/table1, so a run that was stopped goes on; the record that the book shows,
book/results/table1.json, is written from them at the end (and by --report).

Same for all: network (three hidden layers of 256), batch (256), optimiser (Adam, warm-up, cosine, clipping, averaged
weights), number of optimiser steps, tuning (two rates times two decays of the average, on two data sets at 2,000 steps,
judged with 10 steps on draws that the table never uses), and, in the table, the same 20 draws of 1024 starting points
and 1024 test points, against which W_2 is exact. Deviations: NSGF and EPT are trained once for each number of steps;
NSGF's Sinkhorn problems see 2048 points at once, and OT-CFM's matching sees as many, as often; EPT keeps one network
for each step, averages no weights, lets the rate fall once for each step, and is tuned in its step instead of the
average; 2-RF and 3-RF take 1-RF's tuning. A method is one entry of METHODS.

Twenty draws are few: the mean of a perfect generator's twenty scores is uncertain by a tenth on some sets. All methods
share the draws, so that their order is not; the first method's ratio to the floor is measured again on sixty others.
"""

import argparse
import json
import math
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

# One core for each worker: set before any library reads it.
os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")

import torch
from scipy.stats import t as student
from torch import Tensor
from tqdm import tqdm

import nsgf_lite as nl
from benchmarks.pieces import everything, keep
from benchmarks.provenance import ROOT, provenance

RECORD = ROOT / "book" / "results" / "table1.json"
WORK = ROOT / "_build" / "table1"

# FFJORD's scales, and torchcfm's for the letter S.
_ROUND, _EIGHT, _MOONS = nl.toy.Gaussian(), nl.toy.EightGaussians(8**0.5, 8**-0.5), nl.toy.Moons(0.1, 2.0, -1.0)
SETS = {
    "8gaussians": (_ROUND, _EIGHT),
    "8gaussians-moons": (_EIGHT, _MOONS),
    "moons": (_ROUND, _MOONS),
    "scurve": (_ROUND, nl.toy.SCurve(noise=0.05, scale=1.5)),
    "checkerboard": (_ROUND, nl.toy.Checkerboard(side=8.0)),
}
STEPS = (10, 100)
RATES = (1e-3, 3e-3)
TUNING_SETS, TUNING_STEPS = ("8gaussians-moons", "scurve"), 2_000
POINTS, DRAWS, MORE_DRAWS, VALIDATION, TWINS = 1024, 20, 60, 5, 10
EVALUATIONS = (4, 8, 20, 40, 100)  # of the network, for the curves


@dataclass(frozen=True)
class Method:
    """One row of the table: how to make the model from the number of steps, its teacher and its knob."""

    make: Callable[[int, nl.Flow | None, float], nl.Flow]
    knob: str = "ema"
    values: tuple[float, ...] = (0.99, 0.999)
    per_steps: bool = False  # trained once for each number of steps
    teacher: str | None = None  # trained on another method's samples, with that one's tuning


def _nsgf(steps: int, *_: object) -> nl.Flow:
    step, minibatches = (0.4, 16) if steps == 10 else (0.05, 6)
    return nl.NSGF(eps=0.02, step=step, steps=steps, minibatch=2048, pool=minibatches, together=1)


METHODS = {
    "NSGF": Method(_nsgf, per_steps=True),
    "EPT": Method(
        lambda steps, _, value: nl.EPT(step=value * 10 / steps, steps=steps), "10 x step", (0.2, 0.5), per_steps=True
    ),
    "OT-CFM": Method(lambda *_: nl.OTCFM(minibatch=2048, matched=16)),
    "1-RF": Method(lambda *_: nl.RectifiedFlow()),
    "2-RF": Method(lambda _, teacher, __: nl.RectifiedFlow(teacher=teacher), teacher="1-RF"),
    "3-RF": Method(lambda _, teacher, __: nl.RectifiedFlow(teacher=teacher), teacher="2-RF"),
    "SI": Method(lambda *_: nl.StochasticInterpolant()),
    "FM": Method(lambda *_: nl.FlowMatching(smallest=1e-4)),
}


def draws(name: str, count: int, first: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Starting points, test points and a second test sample (for the floor): the same for every method."""
    source, target = SETS[name]
    out = []
    for k in range(first, first + count):
        g = torch.Generator().manual_seed(k)
        out.append((source.sample(POINTS, g), target.sample(POINTS, g), target.sample(POINTS, g)))
    return out


TEST, VALID, AGAIN = 10_000, 20_000, 40_000  # seeds of the first draw


def scores(model: nl.Flow, name: str, steps: int, count: int, first: int, solver: str = "euler") -> list[float]:
    return [nl.metrics.w2(model.sample(POINTS, steps, solver, start=x), y) for x, y, _ in draws(name, count, first)]


def floor(name: str, count: int, first: int) -> list[float]:
    return [nl.metrics.w2(z, y) for _, y, z in draws(name, count, first)]


# --- pieces of work: each writes one file -----------------------------------------------------------------------------


def part(*names: object) -> Path:
    return WORK.joinpath(*map(str, names)).with_suffix(".json")


def training(method: str, choice: dict, steps: int) -> nl.Training:
    ema = choice["value"] if METHODS[method].knob == "ema" else 0.999
    return nl.Training(steps=steps, rate=choice["rate"], ema=ema)


def tune(method: str, rate: float, value: float, name: str) -> None:
    torch.set_num_threads(1)
    choice = {"rate": rate, "value": value}
    model = METHODS[method].make(10, None, value)
    start = time.perf_counter()
    model.fit(*SETS[name], training(method, choice, TUNING_STEPS), seed=99, progress=False)
    seconds = time.perf_counter() - start
    ratio = sum(scores(model, name, 10, VALIDATION, VALID)) / sum(floor(name, VALIDATION, VALID))
    keep(part("tune", method, rate, value, name), {**choice, "ratio": ratio, "seconds": seconds})


def chosen(method: str) -> dict:
    """The choice of rate and knob with the least mean ratio over the tuning sets, from the files of :func:`tune`."""
    root = METHODS[method].teacher
    if root:
        return chosen(root)
    grid = [(rate, value) for rate in RATES for value in METHODS[method].values]
    results = [[json.loads(part("tune", method, *p, s).read_text(encoding="utf-8")) for s in TUNING_SETS] for p in grid]
    tried = [
        {"rate": rate, "value": value, "ratio": statistics.fmean(r["ratio"] for r in each)}
        for (rate, value), each in zip(grid, results, strict=True)
    ]
    return min(tried, key=lambda choice: choice["ratio"]) | {"tried": tried}


def trained(method: str, name: str, seed: int, steps: int, budget: int) -> tuple[nl.Flow, float]:
    """The fitted model, read from its file if there is one, and the seconds of its training, teachers included."""
    entry, choice = METHODS[method], chosen(method)
    teacher, before = trained(entry.teacher, name, seed, steps, budget) if entry.teacher else (None, 0.0)
    model = entry.make(steps, teacher, choice["value"])
    file = WORK / str(budget) / name / f"{method}-{steps if entry.per_steps else 'all'}-{seed}.safetensors"
    clock = file.with_suffix(".seconds")
    if clock.exists():
        model.load(file)
        return model, before + float(clock.read_text(encoding="utf-8"))
    file.parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    model.fit(*SETS[name], training(method, choice, budget), seed=seed, progress=False)
    seconds = time.perf_counter() - start
    model.save(file)
    clock.write_text(f"{seconds:.2f}", encoding="utf-8")
    return model, before + seconds


def run(method: str, name: str, seed: int, budget: int) -> None:
    torch.set_num_threads(1)
    result: dict = {}
    for steps in STEPS:
        model, seconds = trained(method, name, seed, steps, budget)
        result[str(steps)] = {"w2": scores(model, name, steps, DRAWS, TEST), "seconds": seconds}
    keep(part(budget, "run", method, name, seed), result)


def again(name: str, seeds: int, budget: int) -> None:
    """The first method's scores on other draws, the mean over seeds for each draw, and the floor on the same draws."""
    torch.set_num_threads(1)
    method, count = next(iter(METHODS)), MORE_DRAWS
    result: dict = {"method": method, "floor": floor(name, count, AGAIN)}
    for steps in STEPS:
        models = [trained(method, name, seed, steps, budget)[0] for seed in range(seeds)]
        each = [scores(model, name, steps, count, AGAIN) for model in models]
        result[str(steps)] = [statistics.fmean(draw) for draw in zip(*each, strict=True)]
    keep(part(budget, "again", name, seeds), result)


def curves(method: str, name: str, budget: int) -> None:
    """W_2 against evaluations of the network for each solver, and along the path; paths of a few particles (seed 0)."""
    torch.set_num_threads(1)
    stages = {"euler": 1, "heun": 2, "rk4": 4}
    result: dict = {"solvers": {}}
    for solver, cost in stages.items():
        line = {}
        for evaluations in EVALUATIONS:
            if METHODS[method].per_steps:  # trained for 10 or for 100 steps: the nearer one; EPT has its own steps only
                own = 10 if evaluations <= 30 else 100
            else:
                own = 10
            model, _ = trained(method, name, 0, own, budget)
            steps = evaluations // cost
            if method == "EPT":
                if solver != "euler" or own == line.get("own"):
                    continue
                steps, line["own"] = own, own
            line[str(steps * cost)] = statistics.fmean(scores(model, name, steps, 2, TEST, solver))
        line.pop("own", None)
        result["solvers"][solver] = line
    model, _ = trained(method, name, 0, 10, budget)
    (x, y, _), *_ = draws(name, 1, TEST)
    path = model.path(POINTS, 10, start=x)
    result["along"] = [nl.metrics.w2(z, y) for z in path]
    result["paths"] = [[[round(c, 3) for c in p] for p in row] for row in path[:, :60].tolist()]
    keep(part(budget, "curves", method, name), result)


def floors(name: str) -> None:
    """The floor on the table's test points: each against ten fresh samples, since one pair tells little."""
    torch.set_num_threads(1)
    chance, target = torch.Generator().manual_seed(30_000), SETS[name][1]
    tests = [y for _, y, _ in draws(name, DRAWS, TEST)]
    twins = [[nl.metrics.w2(target.sample(POINTS, chance), y) for _ in range(TWINS)] for y in tests]
    keep(part("floor", name, TWINS), {"w2": sum(twins, [])})


# --- the record -------------------------------------------------------------------------------------------------------


def interval(values: list[float]) -> tuple[float, float | None]:
    """Mean, and half the length of its 95 % t-interval; a single value has none."""
    n = len(values)
    if n < 2:
        return values[0], None
    return statistics.fmean(values), float(student.ppf(0.975, n - 1)) * statistics.stdev(values) / math.sqrt(n)


def record(budget: int, seeds: int, seconds: float, workers: int) -> dict:
    """Collect the files of all pieces into one record; a piece that is missing is left out, and counted."""
    out: dict = {"sets": {}, "tuning": {}, "curves": {}}
    out["budget"] = {"steps": budget, "seeds": seeds, "draws": DRAWS, "points": POINTS, "workers": workers}
    for method, entry in METHODS.items():
        choice = chosen(method)
        out["tuning"][method] = {"knob": entry.knob, "as": entry.teacher, **choice}
    for name in SETS:
        base = json.loads(part("floor", name, TWINS).read_text(encoding="utf-8"))["w2"]
        rows = {}
        for method in METHODS:
            files = [part(budget, "run", method, name, seed) for seed in range(seeds)]
            done = [json.loads(file.read_text(encoding="utf-8")) for file in files if file.exists()]
            if not done:
                continue
            rows[method] = {}
            for steps in map(str, STEPS):
                means = [statistics.fmean(one[steps]["w2"]) for one in done]
                mean, half = interval(means)
                rows[method][steps] = {
                    "w2": mean,
                    "interval": half,
                    "ratio": mean / statistics.fmean(base),
                    "by_seed": means,
                    "seconds": statistics.median(one[steps]["seconds"] for one in done),
                }
        out["sets"][name] = {"floor": statistics.fmean(base), "floor_sd": statistics.stdev(base), "methods": rows}
        file = part(budget, "again", name, seeds)
        if file.exists():
            out["sets"][name]["again"] = json.loads(file.read_text(encoding="utf-8"))
        lines = {m: part(budget, "curves", m, name) for m in METHODS}
        out["curves"][name] = {
            m: json.loads(file.read_text(encoding="utf-8")) for m, file in lines.items() if file.exists()
        }
    for name, lines in out["curves"].items():
        if name not in ("8gaussians", "moons"):  # the page draws the paths of these two
            for line in lines.values():
                line.pop("paths")
    out["provenance"] = provenance("python -m benchmarks.table1", seconds, ["nsgf-lite", "torch", "POT", "scipy"])
    RECORD.parent.mkdir(exist_ok=True)
    RECORD.write_text(json.dumps(out, indent=None, separators=(",", ":")) + "\n", encoding="utf-8")
    return out


def show(out: dict) -> None:
    for steps in map(str, STEPS):
        print(f"\nW_2 / floor with {steps} steps")
        print(f"{'':8}" + "".join(f"{name:>20}" for name in out["sets"]))
        for method in METHODS:
            cells = [out["sets"][name]["methods"].get(method, {}).get(steps) for name in out["sets"]]
            print(f"{method:8}" + "".join(f"{c['w2']:10.3f} ({c['ratio']:.2f})   " if c else f"{'':20}" for c in cells))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5_000, help="optimiser steps of each training")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--report", action="store_true", help="only write and show the record of what has been done")
    given = parser.parse_args()
    budget, clock = given.steps, WORK / str(given.steps) / "seconds"
    own = [m for m, entry in METHODS.items() if not entry.teacher]
    tuning = [
        (part("tune", m, rate, value, name), tune, m, rate, value, name)
        for m in own
        for rate in RATES
        for value in METHODS[m].values
        for name in TUNING_SETS
    ]
    floor_jobs = [(part("floor", name, TWINS), floors, name) for name in SETS]
    # a round is a seed of everything; within it teachers come before those that learn from them
    waves = [own, *[[m] for m in METHODS if METHODS[m].teacher]]
    rounds = [
        [(part(budget, "run", m, name, seed), run, m, name, seed, budget) for m in wave for name in SETS]
        for seed in range(given.seeds)
        for wave in waves
    ]
    lines = [(part(budget, "curves", m, name), curves, m, name, budget) for m in METHODS for name in SETS]
    more = [(part(budget, "again", name, given.seeds), again, name, given.seeds, budget) for name in SETS]
    stages = [tuning + floor_jobs, *rounds, lines + more]
    if not given.report:
        start, before = time.perf_counter(), float(clock.read_text(encoding="utf-8")) if clock.exists() else 0.0
        with tqdm(total=sum(map(len, stages)), desc="table 1", unit="piece", smoothing=0) as bar:
            for stage in stages:
                everything(stage, given.workers, bar)
                clock.parent.mkdir(parents=True, exist_ok=True)
                clock.write_text(f"{before + time.perf_counter() - start:.1f}", encoding="utf-8")
    show(
        record(budget, given.seeds, float(clock.read_text(encoding="utf-8")) if clock.exists() else 0.0, given.workers)
    )


if __name__ == "__main__":
    main()
