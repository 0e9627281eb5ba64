"""The trajectory pool: seconds for a million triples (x, t, v) and the error of the velocity, beside the authors' way.

    python -m benchmarks.pool            # the table on the screen
    python -m benchmarks.pool --record   # and in book/results/pool_benchmark.json, which the book shows
    python -m benchmarks.pool --quality --record     # size and renewal of the pool, and size of OT-CFM's matchings

Theirs: for each minibatch and step two calls of GeomLoss's ``SamplesLoss(potentials=True)`` at scaling 0.8 (the paper's
Appendix E.2 has 0.85, 0.95 and, for MNIST, 0.75) and automatic differentiation of the potentials' sums. Ours:
``nl.trajectories``, minibatches together, warm from step to step. Two problems, each followed for 20 steps of 0.2: A,
256 points in the plane, and C, 128 points in 784 dimensions, both at eps = 0.25 (benchmarks/problems.py). The rounds
take turns; seconds are medians. The error is ``|v - v*| / |v*|`` over all steps of one trajectory, at the same
positions for all: those of the reference in float64.

With --quality: what does a pool's size buy? NSGF from a Gaussian to two moons (width 64, 2,000 optimiser steps,
minibatches of 256), from pools of 1 to 64 minibatches, fixed, or with one renewed every 20 steps; and OT-CFM with
16,384 pairs matched in minibatches of 16 to 1024. W_2 with ten steps over the floor, and processor seconds of the
training, pool or matching included; mean and standard deviation over three seeds, on the same draws for all.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable

# One core for everybody: set before any library reads it.
os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")

import geomloss
import torch
from torch import Tensor
from tqdm import tqdm

import nsgf_lite as nl
from benchmarks.problems import problem
from benchmarks.provenance import ROOT, provenance, writable, write_record

RECORD = ROOT / "book" / "results" / "pool_benchmark.json"
STEP, STEPS, TOGETHER = 0.2, 20, 8
Build = Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]]


def by_geomloss(scaling: float) -> Callable[[float], Callable[..., Tensor]]:
    """The authors' velocity: gradients of two potentials, each by GeomLoss; its blur squared is our eps."""

    def field(eps: float) -> Callable[..., Tensor]:
        solve = geomloss.SamplesLoss("sinkhorn", p=2, blur=eps**0.5, scaling=scaling, debias=False, potentials=True)

        def velocity(x: Tensor, y: Tensor, warm: object = None) -> Tensor:
            with torch.enable_grad():
                z = x.detach().clone().requires_grad_()
                away, towards = solve(z, x.detach())[0], solve(z, y)[0]
                return torch.autograd.grad(away.sum() - towards.sum(), z)[0]

        return velocity

    return field


def one_by_one(field: Callable[[float], Callable[..., Tensor]]) -> Build:
    """Follow minibatch after minibatch, as the authors do."""

    def build(x: Tensor, y: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        velocity = field(eps)
        pairs = []
        for z, w in zip(x, y, strict=True):
            flow = nl.trajectories(lambda a, b, warm: velocity(a[0], b[0])[None], z[None], w[None], STEP, STEPS)
            pairs.append(flow)
        positions, velocities = (torch.cat(column, 1) for column in zip(*pairs, strict=True))
        return positions, velocities

    return build


def ours(tol: float, together: int) -> Build:
    def build(x: Tensor, y: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        field = nl.fields.Sinkhorn(eps, tol)
        blocks = zip(x.split(together), y.split(together), strict=True)
        pairs = [nl.trajectories(field, z, w, STEP, STEPS) for z, w in blocks]
        positions, velocities = (torch.cat(column, 1) for column in zip(*pairs, strict=True))
        return positions, velocities

    return build


def errors(field: Callable[..., Tensor], reference: tuple[Tensor, Tensor], y: Tensor) -> float:
    """Relative error of a field's velocity along the reference trajectory, warm where the field can be."""
    warm: dict = {}
    wrong = total = 0.0
    for x, v in zip(reference[0][:, 0], reference[1][:, 0], strict=True):
        wrong += float((field(x.float(), y.float(), warm=warm).double() - v).square().sum())
        total += float(v.square().sum())
    return (wrong / total) ** 0.5


METHODS: dict[str, tuple[Build, Callable[[float], Callable[..., Tensor]]]] = {
    "GeomLoss, scaling 0.8, one by one": (one_by_one(by_geomloss(0.8)), by_geomloss(0.8)),
} | {
    f"nsgf_lite, tol {tol:g}, {'one by one' if many == 1 else f'{many} together'}": (
        ours(tol, many),
        lambda eps, tol=tol: nl.fields.Sinkhorn(eps, tol),
    )
    for tol in (1e-3, 3e-4, 1e-4)
    for many in (1, TOGETHER)
}


DRAWS, SEEDS, TOTAL = 4, 3, 16_384
HABITS = nl.Training(steps=2_000, rate=3e-3, warmup=100, ema=0.99)


def narrow(dimension: int, classes: int) -> nl.networks.MLP:
    return nl.networks.MLP(dimension, width=64, classes=classes)


def quality() -> list[dict]:
    """Rows of size, W_2 over the floor and seconds, for pools of NSGF and matchings of OT-CFM."""
    source, target, chance = nl.toy.Gaussian(), nl.toy.Moons(0.1, 2.0, -1.0), torch.Generator().manual_seed(1)
    draws = [(source.sample(1024, chance), *(target.sample(1024, chance) for _ in "ab")) for _ in range(DRAWS)]
    base = sum(nl.metrics.w2(twin, test) for _, test, twin in draws)
    makers: list[tuple[dict, Callable[[], nl.Flow]]] = []
    for size in (1, 4, 16, 64):
        for renew in (0, 20):
            seen = size + (HABITS.steps - 1) // renew if renew else size
            about = {"method": "NSGF", "minibatches": size, "renewed every": renew, "seen": seen}

            def pool(size: int = size, renew: int = renew) -> nl.Flow:
                return nl.NSGF(0.02, 0.4, 10, narrow, minibatch=256, pool=size, renew=renew, together=1)

            makers.append((about, pool))
    for n in (16, 64, 256, 1024):
        makers.append(
            ({"method": "OT-CFM", "minibatch": n, "seen": TOTAL // n}, lambda n=n: nl.OTCFM(narrow, 0, n, TOTAL // n))
        )
    rows = []
    for about, make in tqdm(makers):
        ratios, seconds = [], []
        for seed in range(SEEDS):
            begin, model = time.process_time(), make()
            model.fit(source, target, HABITS, seed=seed, progress=False)
            seconds.append(time.process_time() - begin)
            ratios.append(sum(nl.metrics.w2(model.sample(1024, 10, start=x), y) for x, y, _ in draws) / base)
        mean, spread = statistics.fmean(ratios), statistics.stdev(ratios)
        rows.append({**about, "ratio": mean, "sd": spread, "seconds": statistics.median(seconds)})
        print(rows[-1], flush=True)
    return rows


def write(part: dict) -> None:
    """Put this part into the record; the other part stays."""
    old = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {}
    old.pop("checksum", None)
    write_record(RECORD, {**old, **part})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true", help=f"write {RECORD.relative_to(ROOT)}")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quality", action="store_true", help="measure samplers instead of pools alone")
    given = parser.parse_args()
    if given.record:
        writable(RECORD)
    torch.set_num_threads(1)
    start, rows = time.perf_counter(), []
    libraries = ["nsgf-lite", "geomloss", "torch"]
    if given.quality:
        rows = quality()
        if given.record:
            come = provenance("python -m benchmarks.pool", time.perf_counter() - start, libraries)
            write({"quality": {"provenance": come, "steps": HABITS.steps, "seeds": SEEDS, "rows": rows}})
        return
    for name in ("A", "C"):
        clouds = [problem(name, seed) for seed in range(TOGETHER)]
        x, y = (torch.stack([cloud[k] for cloud in clouds]) for k in (0, 1))
        eps = clouds[0][2]
        reference = nl.trajectories(nl.fields.Sinkhorn(eps, 1e-10), x[:1], y[:1], STEP, STEPS)
        seconds: dict[str, list[float]] = {method: [] for method in METHODS}
        for _ in tqdm(range(given.rounds), desc=f"problem {name}"):
            for method, (build, _) in METHODS.items():
                begin = time.perf_counter()
                positions, _ = build(x.float(), y.float(), eps)
                seconds[method].append((time.perf_counter() - begin) / (positions[..., 0].numel() / 1e6))
        for method, (_, field) in METHODS.items():
            error = errors(field(eps), reference, y[0])
            rows.append(
                {"problem": name, "method": method, "seconds": statistics.median(seconds[method]), "error": error}
            )
            print(f"{name}  {method:40} {rows[-1]['seconds']:8.1f} s a million   error {error:.1e}")
    if given.record:
        come = provenance("python -m benchmarks.pool", time.perf_counter() - start, libraries)
        write({"provenance": come, "step": STEP, "steps": STEPS, "together": TOGETHER, "rows": rows})


if __name__ == "__main__":
    main()
