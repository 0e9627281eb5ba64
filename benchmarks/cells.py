"""Populations of cells in time: a neural Sinkhorn flow from each time point to the next, scored on held-out cells.

    python -m benchmarks.cells                      # the table on the screen
    python -m benchmarks.cells --record             # and in book/results/cells.json, which the book shows
    python -m benchmarks.cells --data FOLDER        # where mouse_hematopoiesis.csv and emt.csv are

The files have a column `samples`, the time point, and one column for each coordinate. A fifth of each time point is
held out. The model sees the rest of one time point as its source and of the next as its target; then it moves the
held-out cells of the first, and W_2 is measured to the held-out cells of the next. Beside it stand, against the same
cells: as many cells of the next time point from the training part (the floor: no generator can be expected to do
better), the held-out cells of the first time point left where they are, and these cells moved as one block, mean onto
mean.
"""

import argparse
import csv
import json
import os
import statistics
import time
from pathlib import Path

# One core: set before any library reads it.
os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")

import torch
from torch import Generator, Tensor
from tqdm import tqdm

import nsgf_lite as nl
from benchmarks.provenance import ROOT, provenance, writable, write_record

RECORD = ROOT / "book" / "results" / "cells.json"
DATA = ROOT.parent / "shared" / "data" / "cells"
SETS = {"mouse hematopoiesis": "mouse_hematopoiesis.csv", "EMT": "emt.csv"}
SPLITS, HELD_OUT = 3, 0.2
TEMPERATURE = 0.02  # of the mean cost between the two populations
STEP, STEPS, MINIBATCH, POOL = 0.4, 10, 256, 16
TRAINING = nl.Training(steps=1200, rate=3e-3, warmup=100, ema=0.99)
WIDTH = 96
CELLS = 14  # of the histogram, along each side


def network(dimension: int, classes: int) -> nl.networks.MLP:
    return nl.networks.MLP(dimension, width=WIDTH, classes=classes)


def read(path: Path) -> list[Tensor]:
    """Points (n, d) of each time point, in order of time; ValueError if there is no such table of numbers."""
    if not path.is_file():
        raise SystemExit(
            f"there is no file {path}\n"
            "This benchmark needs two tables of cells that are not part of the repository. Put mouse_hematopoiesis.csv "
            "and emt.csv into a folder and name it: python -m benchmarks.cells --data FOLDER"
        )
    with open(path, newline="", encoding="utf-8") as file:
        head, *rows = csv.reader(file)
    if not head or head[0] != "samples" or not rows:
        raise ValueError(f"{path} must have a column 'samples' first, then the coordinates, got {head}")
    table = torch.tensor([[float(value) for value in row] for row in rows], dtype=torch.float64)
    return [table[table[:, 0] == t, 1:].float() for t in table[:, 0].unique().tolist()]


def split(points: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
    """The part to train on and the held-out fifth."""
    order = torch.randperm(len(points), generator=generator)
    held = round(HELD_OUT * len(points))
    return points[order[held:]], points[order[:held]]


def transition(now: Tensor, later: Tensor, seed: int) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Train on one split, and measure the four distances; also the clouds that the picture is made of."""
    chance = torch.Generator().manual_seed(seed)
    (source, start), (target, goal) = split(now, chance), split(later, chance)
    eps = TEMPERATURE * float(torch.cdist(source[:1000], target[:1000]).square().mean()) / 2
    begin = time.perf_counter()
    model = nl.NSGF(eps, STEP, STEPS, network, minibatch=MINIBATCH, pool=POOL, together=1)
    model.fit(source, target, TRAINING, seed=seed, progress=False)
    seconds = time.perf_counter() - begin
    moved = model.sample(len(start), STEPS, start=start)
    others = target[torch.randperm(len(target), generator=chance)[: len(start)]]
    scores = {
        "generated": nl.metrics.w2(moved, goal),
        "floor": nl.metrics.w2(others, goal),
        "left in place": nl.metrics.w2(start, goal),
        "moved as a block": nl.metrics.w2(start + target.mean(0) - source.mean(0), goal),
        "seconds": seconds,
        "eps": eps,
    }
    return scores, {"before": start, "generated": moved, "after": goal}


def histogram(clouds: dict[str, Tensor]) -> dict[str, object]:
    """Per mille of each cloud in the cells of a coarse grid, rows by the second coordinate, and the grid's corners."""
    every = torch.cat(list(clouds.values()))
    low, high = every.amin(0), every.amax(0)
    low, high = low - 0.02 * (high - low), high + 0.02 * (high - low)
    counts = {}
    for name, cloud in clouds.items():
        column, row = ((cloud - low) / (high - low) * CELLS).long().T
        grid = torch.bincount(row * CELLS + column, minlength=CELLS**2).view(CELLS, CELLS)
        counts[name] = (1000 * grid / len(cloud)).round().int().tolist()
    corners = [[round(v, 2) for v in corner.tolist()] for corner in (low, high)]
    return {"corners": corners, "per mille": counts}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the two tables")
    parser.add_argument("--record", action="store_true", help=f"write {RECORD.relative_to(ROOT)}")
    options = parser.parse_args()
    if options.record:
        writable(RECORD)
    begin = time.perf_counter()
    populations = {name: read(options.data / file) for name, file in SETS.items()}
    rows: list[dict] = []
    picture = {}
    for name, times in populations.items():
        for k, (now, later) in enumerate(zip(times, times[1:], strict=False)):
            runs = []
            for seed in tqdm(range(SPLITS), desc=f"{name} {k} to {k + 1}", leave=False):
                scores, clouds = transition(now, later, seed)
                runs.append(scores)
                if name == next(iter(SETS)) and not seed:
                    picture[f"{k} to {k + 1}"] = histogram(clouds)
            row: dict = {"data": name, "dimension": now.shape[1], "from": k, "to": k + 1}
            row |= {"cells": [len(now), len(later)], "splits": SPLITS}
            for key in runs[0]:
                values = [run[key] for run in runs]
                row[key] = {"mean": round(statistics.mean(values), 4), "sd": round(statistics.stdev(values), 4)}
            rows.append(row)
            shown = ", ".join(f"{key} {row[key]['mean']:.3f}" for key in runs[0])
            print(f"{name} {k} to {k + 1}: {shown}", flush=True)
    if options.record:
        settings: dict[str, float] = {
            "step": STEP,
            "steps": STEPS,
            "minibatch": MINIBATCH,
            "pool": POOL,
            "width": WIDTH,
        }
        settings |= {"eps / mean cost": TEMPERATURE, "optimiser steps": TRAINING.steps}
        settings["processor seconds"] = round(time.process_time(), 1)
        source = provenance("python -m benchmarks.cells", time.perf_counter() - begin, ["torch", "pot"])
        record = {"provenance": source, "settings": settings, "rows": rows, "histograms": picture}
        write_record(RECORD, record, json.dumps(record, ensure_ascii=False).replace('{"data"', '\n{"data"'))


if __name__ == "__main__":
    main()
