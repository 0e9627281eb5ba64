"""The trajectory pool: seconds for a million triples (x, t, v) and the error of the velocity, beside the authors' way.

    python -m benchmarks.pool            # the table on the screen
    python -m benchmarks.pool --record   # and in book/results/pool_benchmark.json, which the book shows

Theirs: for each minibatch and step two calls of GeomLoss's ``SamplesLoss(potentials=True)`` at scaling 0.8 and
automatic differentiation of the potentials' sums. Ours: ``nl.trajectories``, minibatches together, warm from step to
step. Two problems, each followed for 20 steps of 0.2: A, 256 points in the plane, and C, 128 points in 784 dimensions,
both at eps = 0.25 (benchmarks/problems.py). The rounds take turns; seconds are medians. The error is
``|v - v*| / |v*|`` over all steps of one trajectory, at the same positions for all: those of the reference in float64.
"""

import argparse
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true", help=f"write {RECORD.relative_to(ROOT)}")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    if given.record:
        writable(RECORD)
    torch.set_num_threads(1)
    start, rows = time.perf_counter(), []
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
        source = provenance(
            "python -m benchmarks.pool", time.perf_counter() - start, ["nsgf-lite", "geomloss", "torch"]
        )
        record = {"provenance": source, "step": STEP, "steps": STEPS, "together": TOGETHER, "rows": rows}
        write_record(RECORD, record)


if __name__ == "__main__":
    main()
