"""Interaction energies by networks: a ring, a logarithmic gas, and four pulses, each with two classes of maps.

    python -m benchmarks.aggregation              # writes book/results/aggregation.json; resumes where it stopped
    python -m benchmarks.aggregation --try        # a tenth of the minibatches, nothing is written

The three problems of Fan et al. (2022), Appendices C.2 to C.4. Each is run with residual maps and with gradients of
convex networks, so that the schemes can be compared within one class of maps; three seeds, but one of the pulses. A
JKO step has BUDGET minibatches of the map, of 500 points. What is measured is of fresh points that go through all maps.

*Ring.* W = |z|⁴/4 - |z|²/2 in the plane, from N(0, I/4), 120 steps of 0.05: after each the mean distance
from the mean, the energy above its least value (by moments), and how far the mean has gone. 100,000 points.
*Logarithmic gas.* W = z²/2 - log|z| on the line, from N(0, 1), steps of 0.05, 60 of them: the variance, and W_2 to
the semicircle's quantiles, of 10,000 points in order.
*Four pulses.* W = -exp(-|z|²)/π and a tenth of the energy of the porous medium with m = 3, from the uniform law on
[-3, 3]², 60 steps of 0.5: forward-backward, and both energies at once. Crowd and fresh points are 5000, and the law of
the explicit step 10,000 points made of the crowd. Mean distances from the two axes after each step, and at SHOWN the
counts in cells of 0.24, folded into one quarter.

The residual map and the critic have three layers of 32, the convex network two of 64.
"""

import argparse
import math
import os
from functools import partial

os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")

import torch
from torch import Generator, Tensor, nn

import nsgf_lite as nl
from benchmarks.pieces import ROOT, digits, home, results
from benchmarks.provenance import provenance, writable, write_record
from nsgf_lite.functionals import Entropy, Interaction
from nsgf_lite.networks import ICNN, LogRatio, ResidualMap

RECORD = ROOT / "book" / "results" / "aggregation.json"
MAPS = ("residual", "convex")
SEEDS = {"forward-backward": 1, "at once": 1, "ring": 3, "gas": 3}
STEPS = {"ring": 120, "gas": 60, "forward-backward": 60, "at once": 60}
BUDGET = {"ring": 30, "gas": 60, "forward-backward": 80, "at once": 80}
BATCH, RATE = 500, 3e-3
SHOWN = (24, 36, 60)
SIDE, CELL, CELLS = 3.0, 0.24, 15  # half the square; cells of a quarter
CROWD = {"ring": 100_000, "gas": 10_000, "forward-backward": 5_000, "at once": 5_000}


def ring(z: Tensor) -> Tensor:
    square = z.square().sum(-1)
    return square.square() / 4 - square / 2


def gas(z: Tensor) -> Tensor:
    return z.square().sum(-1) / 2 - z.abs().sum(-1).log()


def pulse(z: Tensor) -> Tensor:
    return -torch.exp(-z.square().sum(-1)) / math.pi


def source(problem: str, n: int, chance: Generator) -> Tensor:
    if problem == "ring":
        return torch.randn(n, 2, generator=chance) / 2
    if problem == "gas":
        return torch.randn(n, 1, generator=chance)
    return SIDE * (2 * torch.rand(n, 2, generator=chance) - 1)


def flow(problem: str, maps: str) -> nl.JKOFlow:
    """The flow that is to be trained."""
    steps = STEPS[problem]
    transport: dict[str, partial[nn.Module]] = {
        "residual": partial(ResidualMap, width=32, depth=3),
        "convex": partial(ICNN, width=64, depth=2),
    }
    if problem in ("ring", "gas"):
        energy = Interaction(ring if problem == "ring" else gas)
        return nl.JKOFlow(energy, 0.05, steps, transport=transport[maps])
    critic, pressure, attraction = partial(LogRatio, width=32, depth=3), 0.1 * Entropy(3.0), Interaction(pulse)
    if problem == "at once":
        both = pressure + attraction
        return nl.JKOFlow(both, 0.5, steps, particles=CROWD[problem], transport=transport[maps], critic=critic)
    return nl.JKOFlow(
        pressure, 0.5, steps, explicit=attraction, particles=CROWD[problem], transport=transport[maps], critic=critic
    )


def semicircle(n: int) -> Tensor:
    """Quantiles (n,) of the law of density sqrt(2 - x²)/π at the middles of n levels."""
    turn = torch.linspace(0, math.pi, 200_001, dtype=torch.float64)
    mass = (turn - (2 * turn).sin() / 2) / math.pi
    levels = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    return -math.sqrt(2) * turn[torch.searchsorted(mass, levels)].cos()


def measured(problem: str, x: Tensor) -> dict[str, float]:
    """Of the points (n, d) after a step."""
    x = x.double()
    if problem == "gas":
        order = x[:, 0].sort().values
        return {"variance": float(order.var()), "w2": float((order - semicircle(len(x))).square().mean().sqrt())}
    if problem == "ring":
        y = x - x.mean(0)
        square = y.square().sum(1)
        s, M = square.mean(), y.T @ y / len(y)
        off = M - s / 2 * torch.eye(2, dtype=torch.float64)
        excess = 1.5 * (s - 1 / 3) ** 2 + off.square().sum() + (square - s).square().mean() / 2
        return {"radius": float(square.sqrt().mean()), "excess": float(excess), "gone": float(x.mean(0).norm())}
    return {"x": float(x[:, 0].abs().mean()), "y": float(x[:, 1].abs().mean())}


def counts(x: Tensor) -> list[list[int]]:
    """Points in the cells of a quarter, those beyond it in its last cells."""
    at = (x.abs() / CELL).long().clamp_max(CELLS - 1)
    return torch.bincount(at[:, 0] * CELLS + at[:, 1], minlength=CELLS**2).reshape(CELLS, CELLS).tolist()


def run(problem: str, maps: str, seed: int, share: int) -> dict:
    """One training, and what its fresh points do."""
    law = source(problem, 100_000, Generator().manual_seed(seed))
    model = flow(problem, maps)
    budget = max(1, BUDGET[problem] // share)
    model.fit(law, nl.Training(budget * STEPS[problem], BATCH, RATE), seed=seed, progress=False)
    x = source(problem, CROWD[problem], Generator().manual_seed(10_000 + seed))
    row: dict = {"problem": problem, "maps": maps, "seed": seed, "F": model.values, "start": measured(problem, x)}
    row |= {"along": [], "counts": {}}
    for k, step in enumerate(model.kept, 1):
        with torch.no_grad():
            x = torch.cat([step(part) for part in x.split(10_000)])
        row["along"].append(measured(problem, x))
        if k in SHOWN and problem not in ("ring", "gas"):
            row["counts"][str(k)] = counts(x)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--try", dest="short", action="store_true", help="a short run, nothing is recorded")
    given = parser.parse_args()
    share = 10 if given.short else 1
    jobs: dict[str, tuple] = {
        f"{problem}-{maps}-{seed}": (run, problem, maps, seed, share)
        for problem, seeds in SEEDS.items()
        for maps in MAPS
        for seed in range(1 if given.short else seeds)
    }
    writable(RECORD)
    folder = home("aggregation", [], ["benchmarks/aggregation.py"])
    done = results(folder / ("short" if given.short else "whole"), jobs, given.workers, "energies")
    rows = [{**piece["row"], "processor": piece["processor"]} for piece in done]
    for row in rows:
        last = ", ".join(f"{name} {value:.4g}" for name, value in row["along"][-1].items())
        print(f"{row['problem']:17} {row['maps']:9} seed {row['seed']}: {last}; {row['processor']:.0f} s")
    if given.short:
        return
    settings = {"steps": STEPS, "budget": BUDGET, "batch": BATCH, "rate": RATE, "shown": SHOWN, "cell": CELL}
    settings |= {"crowd": CROWD, "seeds": SEEDS}
    spent = sum(piece["seconds"] for piece in done)
    source_of = provenance("python -m benchmarks.aggregation", spent, ["nsgf-lite", "torch"])
    write_record(RECORD, {"provenance": source_of, "settings": settings, "rows": digits(rows)})


if __name__ == "__main__":
    main()
