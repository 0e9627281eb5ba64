"""One-step generators in the plane, each field over decades of its hyperparameter (the note, Figures 2 to 5).

    python -m benchmarks.drifting                          # every field, twenty seeds; resumes where it stopped
    python -m benchmarks.drifting --fields "DA2, unmasked" # these only, beside what the record has of the others
    python -m benchmarks.drifting --fields samples         # only what the page draws of the data sets but the moons
    python -m benchmarks.drifting --report …               # the record of what has been done so far

Every piece of work (a field on a data set, all values of its hyperparameter, five seeds: one stack of networks) is a
file under _build/drifting, written when it is finished, with the commit and the settings that it belongs to: a run that
is stopped does its last piece again. The record that the book shows, book/results/drifting.json, is written at the end;
fields that were not run keep their rows, and each group of rows says which run it is from.

The same for all: a residual network of two blocks of width 64 from two-dimensional normal noise, standardised to the
data; Adam at 5e-3, a half cosine down, 400 steps; 128 samples and 128 data points in each. Sinkhorn stops at a marginal
error of 0.03, or, at the smallest ε, of 0.1, which takes about the hundred iterations of the note. Critics, which no
stack can hold, are trained one generator at a time, with one step of theirs for each of the generator's. Judged on 512
samples and 512 fresh data points of their own for each seed: exact W_2, and MMD² with the Gaussian kernel whose
bandwidth is the median distance between fresh points of the data set, one number for all fields. (The usual median
heuristic takes the median over data and samples together, which differs from one generator to the next.)
"""

import argparse
import itertools
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
from torch import Generator, Tensor
from tqdm import tqdm

import nsgf_lite as nl
from benchmarks.pieces import everything, keep
from benchmarks.provenance import ROOT, provenance, read_record, writable, write_record
from benchmarks.table1 import SETS as TABLE

RECORD = ROOT / "book" / "results" / "drifting.json"
WORK = ROOT / "_build" / "drifting"
SETS = {name: law for name, (_, law) in TABLE.items() if name != "8gaussians-moons"} | {"spiral": nl.toy.Spiral()}
BLOCK, STEPS, BATCH, WIDTH, RATE, POINTS = 5, 400, 128, 64, 5e-3, 512
WIDTHS = (0.02, 0.054, 0.14, 0.39, 1.0, 2.8, 7.5, 20.0)  # in units of length; the data sets are four to eight across
RIDGES = (1e-4, 3.7e-4, 1.4e-3, 5e-3, 0.02, 0.07, 0.27, 1.0)
FEW = (0.02, 0.39, 1.0, 20.0)
CRITIC = (0.1,)
DRAWN = "moons"  # whose samples the page draws from the judged generators; of the other sets others are trained
RENAMED = {"DA2, published code": "DA2, floored"}  # fields that an earlier record calls otherwise


@dataclass(frozen=True)
class Adaptive:
    """MMD with a bandwidth of so many median distances between the points of each minibatch, samples and data."""

    share: float

    def __call__(self, x: Tensor, y: Tensor, generator: Generator | None = None) -> Tensor:
        widths = (self.share * nl.fields.base.median_distance(x, y)).flatten().tolist()
        return torch.stack([nl.fields.MMD(h)(*pair) for h, *pair in zip(widths, x, y, strict=True)])


@dataclass(frozen=True)
class Row:
    """A field, made from the value of its hyperparameter, and how many seeds it is worth."""

    name: str
    make: Callable[[float], nl.fields.Field]
    values: tuple[float, ...] = WIDTHS
    seeds: int = 1_000_000
    learns: bool = False

    @property
    def shown(self) -> tuple[float, ...]:
        """The values whose samples the page draws."""
        return self.values[::2] if len(self.values) > 5 else self.values


def critic(divergence: str) -> Callable[[float], nl.fields.Critic]:
    """A critic that takes three steps for each of the generator's, by the λ of its gradient penalty."""
    three = nl.Training(steps=3, batch=BATCH, rate=2e-3, decay=0, warmup=0, ema=0.0)
    return lambda lam: nl.fields.Critic(divergence, penalty=lam, training=three)


def several(h: float) -> tuple[float, ...]:
    return tuple(h * share for share in (0.25, 0.5, 1.0, 2.0, 4.0))


FIELDS = {
    "KL, smoothed scores": Row("h", lambda h: nl.fields.ScoreDifference(h)),
    "MMD": Row("h", lambda h: nl.fields.MMD(h)),
    "MMD, five bandwidths": Row("h", lambda h: nl.fields.MMD(several(h)), (0.054, 0.39), 2),
    "MMD, adaptive": Row("h / median", Adaptive, (0.22, 1.0), 2),
    "Sinkhorn": Row("√ε", lambda h: nl.fields.Sinkhorn(h * h, tol=0.1 if h < 0.03 else 0.03)),
    "Sinkhorn proxy": Row("√ε", lambda h: nl.fields.SinkhornProxy(h * h)),
    "DA2": Row("√ε", lambda h: nl.fields.Drift((h * h,), distance="squared")),
    "DA2, unmasked": Row("√ε", lambda h: nl.fields.Drift((h * h,), "squared", ignore_self=False), FEW, 5),
    "DA2, separate rows": Row("√ε", lambda h: nl.fields.Drift((h * h,), "squared", True, "separate"), FEW, 5),
    "DA2, floored": Row("τ", lambda h: nl.fields.Drift((h,), floor=1e-3)),
    "KL of smoothed laws": Row("h", lambda h: nl.fields.SmoothedKL(h, draws=4)),
    "sliced": Row(
        "directions", lambda k: nl.fields.SlicedWasserstein(int(k)), (1.0, 3.0, 7.0, 19.0, 52.0, 139.0, 373.0, 1000.0)
    ),
    "DrMMD": Row("λ", lambda lam: nl.fields.DrMMD(lam), RIDGES, 5),
    "KALE": Row("λ", lambda lam: nl.fields.KALE(lam, tol=1e-6), RIDGES, 5),
    "critic, KL": Row("λ", critic("kl"), CRITIC, 2, learns=True),
    "critic, JS": Row("λ", critic("js"), CRITIC, 2, learns=True),
}


NOTE = ("KL, smoothed scores", "MMD", "Sinkhorn", "Sinkhorn proxy", "DA2", "sliced")  # the six of the note


def part(*names: object) -> Path:
    return WORK.joinpath(*map(str, names)).with_suffix(".json")


def bandwidth(name: str) -> float:
    """Median distance between fresh points of the data set."""
    z = SETS[name].sample(2048, torch.Generator().manual_seed(50_000))
    return float(torch.pdist(z).median())


def rounded(points: Tensor) -> list:
    return [[round(c, 2) for c in point] for point in points[:300].tolist()]


def trained(fields: list, name: str, seed: int, chance: Generator) -> tuple[Tensor, float, list[str]]:
    """Samples (s, n, 2) of one generator for each field, the seconds of their training, and what it warned of."""
    law, nets = SETS[name], []
    first = law.sample(POINTS, chance)
    for _ in fields:
        nets.append(nl.networks.seeded(lambda: nl.networks.Residual(2, 2, WIDTH), chance))
        nets[-1].standardise(first)
    training = nl.Training(steps=STEPS, batch=BATCH, rate=RATE, warmup=20, ema=0.0)
    start = time.perf_counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if hasattr(fields[0], "fit"):
            for k, (net, field) in enumerate(zip(nets, fields, strict=True)):
                nl.drifting.train(net, field, law, training, seed=len(fields) * seed + k, progress=False)
            samples = torch.stack([nl.drifting.sample(net, POINTS, chance=chance) for net in nets])
        else:
            stack = nl.networks.Stack(nets)
            nl.drifting.train(stack, fields, law, training, seed=seed, progress=False)
            samples = nl.drifting.sample(stack, POINTS, chance=chance)
    told = sorted({type(warning.message).__name__ for warning in caught})
    return samples, time.perf_counter() - start, told


def run(field: str, name: str, block: int, of: dict) -> None:
    """Train and judge up to five seeds of all values of the hyperparameter."""
    torch.set_num_threads(1)
    start = time.perf_counter()
    row, law, h = FIELDS[field], SETS[name], bandwidth(name)
    chance, each = torch.Generator().manual_seed(1000 + block), min(BLOCK, row.seeds)
    fields = [row.make(value) for value in row.values for _ in range(each)]
    samples, seconds, told = trained(fields, name, block, chance)
    results = []
    for k, x in enumerate(samples):
        y = law.sample(POINTS, chance)
        value = row.values[k // each]
        entry = {"value": value, "w2": nl.metrics.w2(x, y), "mmd2": nl.metrics.mmd2(x, y, h)}
        if (name == DRAWN or row.learns) and block == 0 and k % each == 0 and value in row.shown:
            entry["points"] = rounded(x)
        results.append(entry)
    total = time.perf_counter() - start
    keep(part(field, name, block), {"of": of, "members": results, "seconds": seconds, "total": total, "warnings": told})


def draw(name: str, of: dict) -> None:
    """Train one generator of each of the note's fields at the values that are drawn, for the page's histograms."""
    torch.set_num_threads(1)
    start, chance = time.perf_counter(), torch.Generator().manual_seed(80_000)
    made = [(field, value) for field in NOTE for value in FIELDS[field].shown]
    samples, _, _ = trained([FIELDS[field].make(value) for field, value in made], name, 80_000, chance)
    out: dict = {"data": {"": rounded(SETS[name].sample(300, torch.Generator().manual_seed(70_000)))}}
    for (field, value), x in zip(made, samples, strict=True):
        out.setdefault(field, {})[f"{value:g}"] = rounded(x)
    keep(part("samples", name), {"of": of, "samples": out, "total": time.perf_counter() - start})


def finished(file: Path, of: dict) -> dict:
    """A piece, if it is of this commit and these settings."""
    piece = json.loads(file.read_text(encoding="utf-8"))
    if piece["of"] != of:
        raise ValueError(f"{file} is a piece of another run, {piece['of']}: remove {WORK}")
    return piece


def ground() -> dict:
    """Floors, medians and settings: what is the same for all fields, and has to be for rows to stand side by side."""
    out: dict = {"floor": {}}
    for name, law in SETS.items():
        h, chance = bandwidth(name), torch.Generator().manual_seed(60_000)
        pairs = [(law.sample(POINTS, chance), law.sample(POINTS, chance)) for _ in range(20)]
        w2, mmd2 = [nl.metrics.w2(*pair) for pair in pairs], [nl.metrics.mmd2(*pair, h) for pair in pairs]
        out["floor"][name] = {"w2": statistics.fmean(w2), "mmd2": statistics.fmean(mmd2), "bandwidth": h}
    out["settings"] = {"steps": STEPS, "batch": BATCH, "width": WIDTH, "rate": RATE, "points": POINTS}
    return out


def earlier(fields: list[str]) -> dict:
    """The record as it stands, under the present names, without the fields that were run anew."""
    new = ground()
    old = read_record(RECORD) if RECORD.exists() and set(fields) != {*FIELDS, "samples"} else {}
    for name, floor in new["floor"].items() if old else ():
        assert all(abs(old["floor"][name][key] / floor[key] - 1) < 1e-4 for key in floor), f"other floors on {name}"
    assert not old or new["settings"].items() <= old["settings"].items(), "the record has other settings"
    out = new | {key: old.get(key, {}) for key in ("samples", "seconds", "warnings")}
    out["rows"] = [row | {"field": RENAMED.get(row["field"], row["field"])} for row in old.get("rows", [])]
    for table in (out["seconds"], out["warnings"], *out["samples"].values()):
        for before, after in RENAMED.items():
            if before in table:
                table[after] = table.pop(before)
    out["rows"] = [row for row in out["rows"] if row["field"] not in fields]
    for table, field in itertools.product((out["seconds"], out["warnings"]), fields):
        table.pop(field, None)
    groups = [{**group, "fields": [f for f in group["fields"] if f not in fields]} for group in old.get("added", [])]
    out["added"] = [group for group in groups if group["fields"]]
    out["provenance"] = old.get("provenance")
    return out


def record(blocks: int, fields: list[str], of: dict) -> dict:
    """Collect the files of the pieces into the record; a piece that is missing is left out."""
    out, total = earlier(fields), 0.0
    for field, name in itertools.product([field for field in FIELDS if field in fields], SETS):
        row, files = FIELDS[field], [part(field, name, block) for block in range(blocks)]
        done = [finished(file, of) for file in files if file.exists()]
        members = [member for piece in done for member in piece["members"]]
        for value in row.values if members else ():
            mine = [member for member in members if member["value"] == value]
            scores = {key: [float(f"{member[key]:.4g}") for member in mine] for key in ("mmd2", "w2")}
            out["rows"].append({"field": field, "set": name, "value": value, "name": row.name, **scores})
            for points in [member["points"] for member in mine if "points" in member]:
                out["samples"].setdefault(name, {}).setdefault(field, {})[f"{value:g}"] = points
        out["seconds"][field] = out["seconds"].get(field, 0.0) + sum(piece["seconds"] for piece in done)
        told = {w for piece in done for w in piece["warnings"]} | set(out["warnings"].get(field, []))
        out["warnings"][field] = sorted(told)
        total += sum(piece["total"] for piece in done)
    for name in SETS if "samples" in fields else ():
        if part("samples", name).exists():
            piece = finished(part("samples", name), of)
            out["samples"][name] = piece["samples"] | out["samples"].get(name, {})
            total += piece["total"]
    truth = SETS[DRAWN].sample(300, torch.Generator().manual_seed(70_000))
    out["samples"].setdefault(DRAWN, {})["data"] = {"": rounded(truth)}
    order = list(FIELDS)
    out["rows"].sort(key=lambda row: order.index(row["field"]))
    out["settings"]["seeds"] = {field: len(scores) for field in order if (scores := out_of(out, field))}
    source = provenance("python -m benchmarks.drifting", total, ["nsgf-lite", "torch", "POT"])
    if out["provenance"] is None or set(fields) == {*FIELDS, "samples"}:
        out["provenance"] = source
    else:
        out["added"].append({"fields": fields, "provenance": source})
    write_record(RECORD, out, json.dumps(out))
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
    parser.add_argument("--fields", nargs="+", choices=[*FIELDS, "samples"], default=[*FIELDS, "samples"])
    parser.add_argument("--report", action="store_true", help="only write and show the record of what has been done")
    given = parser.parse_args()
    blocks = -(-given.seeds // BLOCK)
    here = provenance("", 0, [])
    of = {"commit": here["commit"], "changed": here["uncommitted changes"], "steps": STEPS, "batch": BATCH}
    jobs = [
        (part(field, name, block), run, field, name, block, of)
        for block in range(blocks)
        for field, row in FIELDS.items()
        if field in given.fields and block * BLOCK < row.seeds
        for name in SETS
    ]
    drawn = [name for name in SETS if name != DRAWN and "samples" in given.fields]
    jobs += [(part("samples", name), draw, name, of) for name in drawn]
    for file in [job[0] for job in jobs if job[0].exists()]:
        finished(file, of)
    writable(RECORD)
    if not given.report:
        with tqdm(total=len(jobs), desc="drifting", unit="piece", smoothing=0) as bar:
            everything(jobs, given.workers, bar)
    show(record(blocks, given.fields, of))


if __name__ == "__main__":
    main()
