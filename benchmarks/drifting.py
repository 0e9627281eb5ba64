"""One-step generators in the plane, each field over three decades of its hyperparameter (the note, Figures 2 and 3).

    python -m benchmarks.drifting                # twenty seeds (five of KALE and DrMMD); resumes where it stopped
    python -m benchmarks.drifting --seeds 40 --workers 8
    python -m benchmarks.drifting --report       # the record of what has been done so far

Every piece of work (a field on a data set, all values of its hyperparameter, five seeds: one stack of forty networks)
is a file under _build/drifting; the record that the book shows, book/results/drifting.json, is written at the end.

The same for all: a residual network of two blocks of width 64 from two-dimensional normal noise, standardised to the
data; Adam at 5e-3, a half cosine down, 400 steps; 128 samples and 128 data points in each. Sinkhorn stops at a marginal
error of 0.03, or, at the smallest ε, of 0.1, which takes about the hundred iterations of the note. Judged on 512
samples and 512 fresh data points of their own for each seed: exact W_2, and MMD² with the Gaussian kernel whose
bandwidth is the median distance between fresh points of the data set, one number for all fields.
"""

import argparse
import json
import os
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

# One core for each worker: set before any library reads it.
os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")

import torch
from tqdm import tqdm

import nsgf_lite as nl
from benchmarks.pieces import everything, keep
from benchmarks.provenance import ROOT, provenance
from benchmarks.table1 import SETS as TABLE

RECORD = ROOT / "book" / "results" / "drifting.json"
WORK = ROOT / "_build" / "drifting"
SETS = {name: law for name, (_, law) in TABLE.items() if name != "8gaussians-moons"} | {"spiral": nl.toy.Spiral()}
BLOCK, STEPS, BATCH, WIDTH, RATE, POINTS = 5, 400, 128, 64, 5e-3, 512
WIDTHS = (0.02, 0.054, 0.14, 0.39, 1.0, 2.8, 7.5, 20.0)  # in units of length; the data sets are four to eight across
RIDGES = (1e-4, 3.7e-4, 1.4e-3, 5e-3, 0.02, 0.07, 0.27, 1.0)
SHOWN = ("moons", (0, 2, 4, 6))  # whose samples the page draws


@dataclass(frozen=True)
class Row:
    """A field, made from the value of its hyperparameter, and how many seeds it is worth."""

    name: str
    make: Callable[[float], nl.fields.Field]
    values: tuple[float, ...] = WIDTHS
    seeds: int = 1_000_000


FIELDS = {
    "KL, smoothed scores": Row("h", lambda h: nl.fields.ScoreDifference(h)),
    "MMD": Row("h", lambda h: nl.fields.MMD(h)),
    "Sinkhorn": Row("√ε", lambda h: nl.fields.Sinkhorn(h * h, tol=0.1 if h < 0.03 else 0.03)),
    "Sinkhorn proxy": Row("√ε", lambda h: nl.fields.SinkhornProxy(h * h)),
    "DA2": Row("√ε", lambda h: nl.fields.Drift((h * h,), distance="squared")),
    "DA2, published code": Row("τ", lambda h: nl.fields.Drift((h,), floor=1e-3)),
    "KL of smoothed laws": Row("h", lambda h: nl.fields.SmoothedKL(h, draws=4)),
    "sliced": Row(
        "directions", lambda k: nl.fields.SlicedWasserstein(int(k)), (1.0, 3.0, 7.0, 19.0, 52.0, 139.0, 373.0, 1000.0)
    ),
    "DrMMD": Row("λ", lambda lam: nl.fields.DrMMD(lam), RIDGES, 5),
    "KALE": Row("λ", lambda lam: nl.fields.KALE(lam, tol=1e-6), RIDGES, 5),
}


def part(*names: object) -> Path:
    return WORK.joinpath(*map(str, names)).with_suffix(".json")


def bandwidth(name: str) -> float:
    """Median distance between fresh points of the data set."""
    z = SETS[name].sample(2048, torch.Generator().manual_seed(50_000))
    return float(torch.pdist(z).median())


def run(field: str, name: str, block: int) -> None:
    """Train and judge five seeds of all values of the hyperparameter."""
    torch.set_num_threads(1)
    row, law, h = FIELDS[field], SETS[name], bandwidth(name)
    chance = torch.Generator().manual_seed(1000 + block)
    first = law.sample(POINTS, chance)
    nets = []
    for _ in row.values:
        for _ in range(BLOCK):
            nets.append(nl.networks.seeded(lambda: nl.networks.Residual(2, 2, WIDTH), chance))
            nets[-1].standardise(first)
    stack = nl.networks.Stack(nets)
    fields = [field for value in row.values for field in [row.make(value)] * BLOCK]
    start = time.perf_counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        nl.drifting.train(
            stack,
            fields,
            law,
            nl.Training(steps=STEPS, batch=BATCH, rate=RATE, warmup=20, ema=0.0),
            seed=block,
            checkpoint=part(field, name, block).with_suffix(".safetensors"),
            progress=False,
        )
        told = {type(warning.message).__name__ for warning in caught}
    seconds = time.perf_counter() - start
    samples = nl.drifting.sample(stack, POINTS, chance=chance)
    results = []
    for k, x in enumerate(samples):
        y = law.sample(POINTS, chance)
        entry = {"value": row.values[k // BLOCK], "w2": nl.metrics.w2(x, y), "mmd2": nl.metrics.mmd2(x, y, h)}
        if name == SHOWN[0] and block == 0 and k % BLOCK == 0 and k // BLOCK in SHOWN[1]:
            entry["points"] = [[round(c, 2) for c in point] for point in x[:300].tolist()]
        results.append(entry)
    keep(part(field, name, block), {"members": results, "seconds": seconds, "warnings": sorted(told)})
    part(field, name, block).with_suffix(".safetensors").unlink()


def record(blocks: int, seconds: float, workers: int) -> dict:
    """Collect the files of all pieces into one record; a piece that is missing is left out."""
    out: dict = {"floor": {}, "rows": [], "samples": {}, "seconds": {}, "warnings": {}}
    for name, law in SETS.items():
        h, chance = bandwidth(name), torch.Generator().manual_seed(60_000)
        pairs = [(law.sample(POINTS, chance), law.sample(POINTS, chance)) for _ in range(20)]
        w2, mmd2 = [nl.metrics.w2(*pair) for pair in pairs], [nl.metrics.mmd2(*pair, h) for pair in pairs]
        out["floor"][name] = {"w2": statistics.fmean(w2), "mmd2": statistics.fmean(mmd2), "bandwidth": h}
    for field, row in FIELDS.items():
        for name in SETS:
            files = [part(field, name, block) for block in range(blocks)]
            done = [json.loads(file.read_text(encoding="utf-8")) for file in files if file.exists()]
            members = [member for piece in done for member in piece["members"]]
            for value in row.values if members else ():
                mine = [member for member in members if member["value"] == value]
                scores = {key: [float(f"{member[key]:.4g}") for member in mine] for key in ("mmd2", "w2")}
                out["rows"].append({"field": field, "set": name, "value": value, "name": row.name, **scores})
                points = [member["points"] for member in mine if "points" in member]
                if points:
                    out["samples"].setdefault(name, {}).setdefault(field, {})[f"{value:g}"] = points[0]
            out["seconds"][field] = out["seconds"].get(field, 0.0) + sum(piece["seconds"] for piece in done)
            told = out["warnings"].get(field, []) + [w for piece in done for w in piece["warnings"]]
            out["warnings"][field] = sorted(set(told))
    truth = SETS[SHOWN[0]].sample(300, torch.Generator().manual_seed(70_000))
    out["samples"].setdefault(SHOWN[0], {})["data"] = {"": [[round(c, 2) for c in p] for p in truth.tolist()]}
    out["settings"] = {
        "steps": STEPS,
        "batch": BATCH,
        "width": WIDTH,
        "rate": RATE,
        "points": POINTS,
        "seeds": {field: len(out_of(out, field)) for field in FIELDS},
        "workers": workers,
    }
    out["provenance"] = provenance("python -m benchmarks.drifting", seconds, ["nsgf-lite", "torch", "POT"])
    RECORD.write_text(json.dumps(out, indent=None, separators=(",", ":")) + "\n", encoding="utf-8")
    return out


def out_of(out: dict, field: str) -> list[float]:
    """Scores of the seeds of a field, on the set and at the value that has fewest."""
    return min((row["w2"] for row in out["rows"] if row["field"] == field), key=len, default=[])


def show(out: dict) -> None:
    for name in SETS:
        floor = out["floor"][name]
        print(f"\n{name}: mean W_2 / floor ({floor['w2']:.3f}) at each value, smallest first")
        for field in FIELDS:
            rows = [row for row in out["rows"] if row["field"] == field and row["set"] == name]
            print(f"{field:22}" + "".join(f"{statistics.fmean(row['w2']) / floor['w2']:7.2f}" for row in rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20, help="a multiple of five")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--report", action="store_true", help="only write and show the record of what has been done")
    given = parser.parse_args()
    blocks, clock = -(-given.seeds // BLOCK), WORK / "seconds"
    jobs = [
        (part(field, name, block), run, field, name, block)
        for block in range(blocks)
        for field, row in FIELDS.items()
        if block * BLOCK < row.seeds
        for name in SETS
    ]
    before = float(clock.read_text(encoding="utf-8")) if clock.exists() else 0.0
    if not given.report:
        start = time.perf_counter()
        with tqdm(total=len(jobs), desc="drifting", unit="piece", smoothing=0) as bar:
            for block in range(blocks):
                everything([job for job in jobs if job[-1] == block], given.workers, bar)
                clock.parent.mkdir(parents=True, exist_ok=True)
                clock.write_text(f"{before + time.perf_counter() - start:.1f}", encoding="utf-8")
    show(record(blocks, float(clock.read_text(encoding="utf-8")) if clock.exists() else 0.0, given.workers))


if __name__ == "__main__":
    main()
