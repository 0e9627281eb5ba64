"""NSGF++ against its parts and against flow matching in the plane, at equal numbers of network evaluations.

    python -m benchmarks.two_phase            # writes book/results/two_phase.json; ten minutes on one core, resumes

Same for all: data, network (three hidden layers of 64), batch, optimiser, 2,000 optimiser steps for each network, three
training seeds, and the same draws of 1024 starting points and 1024 test points, against which W_2 is exact. NSGF++
trains three networks, the others one.

The two last rows change one thing each in the fitted NSGF++: all particles get the mean predicted time; the second
phase is OT-CFM, from the time 1 - (1-h)^K that the flow of the mean dictates, without a predictor.

Each data set and seed is a file under _build/two_phase, in a folder named after the code that it came from; the record
is written from them at the end, all at once.
"""

import copy
import hashlib
import json
import math
import os
import time
from pathlib import Path

os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")

from torch import Generator, Tensor, nn

import nsgf_lite as nl
from benchmarks.pieces import keep
from benchmarks.provenance import ROOT, provenance, writable, write_record

RECORD = ROOT / "book" / "results" / "two_phase.json"
# FFJORD's scales, and torchcfm's for the letter S.
_ROUND, _EIGHT, _MOONS = nl.toy.Gaussian(), nl.toy.EightGaussians(2.8284, 0.3536), nl.toy.Moons(0.1, 2.0, -1.0)
SETS = {
    "8gaussians": (_ROUND, _EIGHT),
    "8gaussians-moons": (_EIGHT, _MOONS),
    "moons": (_ROUND, _MOONS),
    "scurve": (_ROUND, nl.toy.SCurve()),
    "checkerboard": (_ROUND, nl.toy.Checkerboard(8.0)),
}
EVALUATIONS, POINTS, DRAWS, SEEDS = (8, 12, 20, 40), 1024, 6, 3
TRAINING = nl.Training(steps=2_000, rate=3e-3, ema=0.995)


class Fixed(nn.Module):
    """A clock that shows one time to all."""

    def __init__(self, t: float) -> None:
        super().__init__()
        self.logit = math.log(t / (1 - t))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return x.new_full((len(x), 1), self.logit)


def network(d: int, classes: int) -> nn.Module:
    return nl.networks.MLP(d, width=64, classes=classes)


def clock(d: int, classes: int) -> nn.Module:
    return nl.networks.MLP(d, out=1, width=64, classes=classes)


def fitted(source: nl.toy.Law, target: nl.toy.Law, seed: int) -> tuple[dict[str, tuple[nl.Flow, int]], list[float]]:
    """Models with the evaluations that they spend before their last phase, and the predicted times at the handover."""
    pool = {"eps": 0.02, "minibatch": POINTS, "pool": 20, "together": 1, "network": network}
    single = {
        "NSGF": nl.NSGF(step=0.4, steps=10, **pool),
        "OT-CFM": nl.OTCFM(network, minibatch=POINTS, matched=20),
        "FM": nl.FlowMatching(network),
        "NSGF++": nl.NSGFPlusPlus(step=0.2, steps=5, predictor=clock, **pool),
    }
    for model in single.values():
        model.fit(source, target, TRAINING, seed=seed, progress=False)
    two = single["NSGF++"]
    times = two.time(two.sinkhorn.sample(4 * POINTS, two.steps, generator=Generator().manual_seed(1)))
    shared, matched = copy.copy(two), copy.copy(two)
    shared.clock = Fixed(float(times.mean()))
    matched.clock, matched.straight = Fixed(1 - (1 - two.step) ** two.steps), single["OT-CFM"]
    models = {name: (model, 0) for name, model in single.items()}
    models |= {
        "NSGF++": (two, two.steps + 1),
        "NSGF++, one time for all": (shared, two.steps + 1),
        "NSGF, then OT-CFM": (matched, two.steps),
    }
    return models, [round(float(f), 4) for f in (times.mean(), times.std(), 1 - (1 - two.step) ** two.steps)]


def draws(source: nl.toy.Law, target: nl.toy.Law) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Starting points, test points and a second test sample (for the floor): the same for every method and seed."""
    chances = [Generator().manual_seed(1_000 + k) for k in range(DRAWS)]
    return [(source.sample(POINTS, g), target.sample(POINTS, g), target.sample(POINTS, g)) for g in chances]


def piece(name: str, seed: int) -> dict:
    """All models of one training seed on one data set."""
    begin, rows, laws = time.perf_counter(), [], SETS[name]
    models, handover = fitted(*laws, seed)
    for label, (model, before) in models.items():
        for spent in EVALUATIONS:
            made = [(model.sample(POINTS, spent - before, start=start), test) for start, _, test in draws(*laws)]
            values = [round(nl.metrics.w2(x, test), 4) for x, test in made]
            rows.append({"set": name, "method": label, "seed": seed, "evaluations": spent, "w2": values})
    return {"rows": rows, "handover": handover, "seconds": time.perf_counter() - begin}


def folder() -> Path:
    """Where the pieces of this version of the code are."""
    files = sorted([*(ROOT / "nsgf_lite").rglob("*.py"), Path(__file__)])
    return ROOT / "_build" / "two_phase" / hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()[:12]


def main() -> None:
    writable(RECORD)
    pieces = {(name, seed): folder() / f"{name}-{seed}.json" for name in SETS for seed in range(SEEDS)}
    for (name, seed), file in pieces.items():
        if not file.exists():
            keep(file, piece(name, seed))
        print(name, seed, f"{json.loads(file.read_text(encoding='utf-8'))['seconds']:.0f} s", flush=True)
    done = {key: json.loads(file.read_text(encoding="utf-8")) for key, file in pieces.items()}
    seconds = sum(one["seconds"] for one in done.values())
    libraries = ["nsgf-lite", "torch", "numpy", "scipy", "pot"]
    record = {
        "provenance": provenance("python -m benchmarks.two_phase", seconds, libraries),
        "handover": {name: [done[name, seed]["handover"] for seed in range(SEEDS)] for name in SETS},
        "floor": {k: [round(nl.metrics.w2(again, test), 4) for _, again, test in draws(*v)] for k, v in SETS.items()},
        "rows": [row for one in done.values() for row in one["rows"]],
    }
    write_record(RECORD, record, json.dumps(record))


if __name__ == "__main__":
    main()
