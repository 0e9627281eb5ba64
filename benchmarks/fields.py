"""Every velocity field against the literal transcription of its formula: milliseconds, memory and difference.

    python -m benchmarks.fields            # the tables on the screen
    python -m benchmarks.fields --record   # and in book/results/fields_benchmark.json, which the book shows

n = m = 256 and 2048 points in the plane (8gaussians to moons) and in 784 dimensions (problems A and C of
benchmarks/problems.py), float32, one thread; bandwidth half the median distance, eps its square. The transcriptions say
what the papers' formulas say, in a few lines of torch and nothing clever: kernels and softmaxes over matrices of
pairwise differences or distances, a hundred Sinkhorn-Knopp iterations in the log domain (the note's), automatic
differentiation of MMD², of the log densities, of the sliced distance; for KALE gradient steps of SciPy's L-BFGS. The
rounds take turns, times are medians. Memory is the peak of the process over its state before the call (Linux).
The last column is |ours - literal| / |ours|; Sinkhorn's is the error of a hundred iterations, not ours.

Then an ensemble of twenty one-step generators as one stack against a loop of twenty single runs, whole training steps.
"""

import argparse
import ctypes
import itertools
import math
import os
import statistics
import time
from collections.abc import Callable
from functools import partial

# One core for everybody: set before any library reads it.
os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")

import ot
import torch
from scipy.optimize import minimize
from torch import Tensor
from tqdm import tqdm

import nsgf_lite as nl
from benchmarks.problems import problem
from benchmarks.provenance import ROOT, provenance, writable, write_record

RECORD = ROOT / "book" / "results" / "fields_benchmark.json"
MEMBERS, BATCHES, WIDTHS, STEPS, DRAWS, DIRECTIONS, LAM = 20, (64, 128), (32, 64, 128), 20, 16, 64, 0.1
Velocity = Callable[[Tensor, Tensor, float], Tensor]


def chance() -> torch.Generator:
    return torch.Generator().manual_seed(0)


# --- the formulas, word for word --------------------------------------------------------------------------------------


def kernel(x: Tensor, y: Tensor, h: float) -> Tensor:
    return torch.exp(-torch.cdist(x, y).square() / (2 * h**2))


def scores(x: Tensor, y: Tensor, h: float) -> Tensor:
    K, L = kernel(x, y, h), kernel(x, x, h)
    return K @ y / K.sum(1, keepdim=True) - L @ x / L.sum(1, keepdim=True)


def smoothed(x: Tensor, y: Tensor, h: float) -> Tensor:
    """Automatic differentiation of log p_h - log q_h at perturbed points."""
    total = torch.zeros_like(x)
    for noise in torch.randn(DRAWS, x.shape[1], generator=chance()):
        z = (x + h * noise).requires_grad_()
        ratio = torch.logsumexp(-torch.cdist(z, y).square() / (2 * h**2), 1)
        ratio = ratio - torch.logsumexp(-torch.cdist(z, x).square() / (2 * h**2), 1)
        total += torch.autograd.grad(ratio.sum(), z)[0] / DRAWS
    return total


def sinkhorn_knopp(x: Tensor, y: Tensor, eps: float) -> Tensor:
    C = torch.cdist(x, y).square() / 2
    f, g, n, m = x.new_zeros(len(x)), x.new_zeros(len(y)), math.log(len(x)), math.log(len(y))
    for _ in range(100):
        f = -eps * (torch.logsumexp((g - C) / eps, 1) - m)
        g = -eps * (torch.logsumexp((f[:, None] - C) / eps, 0) - n)
    return torch.softmax((g - C) / eps, 1) @ y


def sinkhorn(x: Tensor, y: Tensor, h: float) -> Tensor:
    return sinkhorn_knopp(x, y, h * h) - sinkhorn_knopp(x, x, h * h)


def one_shot(x: Tensor, y: Tensor, h: float) -> Tensor:
    def plan(z: Tensor) -> Tensor:
        logits = -torch.cdist(x, z).square() / (2 * h**2)
        return (torch.softmax(logits, 1) * torch.softmax(logits, 0)).sqrt()

    A, B = plan(y), plan(x)
    return B.sum(1, keepdim=True) * (A @ y) - A.sum(1, keepdim=True) * (B @ x)


def algorithm_2(x: Tensor, y: Tensor, h: float) -> Tensor:
    own = torch.cdist(x, x) + 1e6 * torch.eye(len(x))
    logits = -torch.cat([torch.cdist(x, y), own], 1) / h
    A, B = (torch.softmax(logits, 1) * torch.softmax(logits, 0)).sqrt().split([len(y), len(x)], 1)
    return B.sum(1, keepdim=True) * (A @ y) - A.sum(1, keepdim=True) * (B @ x)


def mmd(x: Tensor, y: Tensor, h: float) -> Tensor:
    z = x.clone().requires_grad_()
    value = kernel(z, z, h).mean() - 2 * kernel(z, y, h).mean()
    return -len(x) * torch.autograd.grad(value, z)[0]


def sliced(x: Tensor, y: Tensor, h: float) -> Tensor:
    z, value = x.clone().requires_grad_(), torch.zeros(())
    theta = torch.randn(DIRECTIONS, x.shape[1], generator=chance())
    for direction in theta / theta.norm(dim=1, keepdim=True):
        value = value + ((z @ direction).sort().values - (y @ direction).sort().values).square().mean()
    return -len(x) / 2 * torch.autograd.grad(value / DIRECTIONS, z)[0]


def exact(x: Tensor, y: Tensor, h: float) -> Tensor:
    a, b = torch.full((len(x),), 1 / len(x)).double(), torch.full((len(y),), 1 / len(y)).double()
    cost = (x[:, None] - y[None]).square().sum(-1) if x.shape[1] < 9 else torch.cdist(x, y).square()
    P = ot.emd(a.numpy(), b.numpy(), cost.double().numpy(), numItermax=10_000_000)
    return len(x) * torch.from_numpy(P).float() @ y - x


def descend(x: Tensor, y: Tensor, h: float, c: Tensor, scale: float) -> Tensor:
    z = x.clone().requires_grad_()
    witness = kernel(z, x, h).mean(1) - kernel(z, y, h) @ c.float()
    return -scale * torch.autograd.grad(witness.sum(), z)[0]


def chi_squared(x: Tensor, y: Tensor, h: float) -> Tensor:
    K, f = kernel(y, y, h).double(), (kernel(y, x, h).mean(1) - kernel(y, y, h).mean(1)).double()
    g = torch.linalg.solve(LAM * torch.eye(len(y)).double() + K / len(y), f)
    return descend(x, y, h, (1 + g) / len(y), 2 * (1 + LAM) / LAM)


def kale(x: Tensor, y: Tensor, h: float) -> Tensor:
    """The dual of Glaser et al., Proposition 2, in the logarithm of its positive variable."""
    K, c, m = kernel(y, y, h).double(), kernel(y, x, h).mean(1).double(), len(y)

    def dual(w: object) -> tuple[float, object]:
        u = torch.tensor(w).exp() / m
        pull = (K @ u - c) / LAM
        value = (u * (torch.tensor(w) - 1)).sum() + (u @ K @ u / 2 - u @ c) / LAM
        return float(value), (u * (torch.tensor(w) + pull)).numpy()

    found = minimize(dual, torch.zeros(m).double().numpy(), jac=True, method="L-BFGS-B", options={"maxiter": 2000})
    return descend(x, y, h, torch.from_numpy(found.x).exp() / m, (1 + LAM) / LAM)


F = nl.fields
PAIRS: dict[str, tuple[Velocity, Velocity]] = {
    "ScoreDifference": (lambda x, y, h: F.ScoreDifference(h)(x, y), scores),
    "SmoothedKL": (lambda x, y, h: F.SmoothedKL(h, draws=DRAWS)(x, y, generator=chance()), smoothed),
    "Sinkhorn": (lambda x, y, h: F.Sinkhorn(h * h, tol=1e-3)(x, y), sinkhorn),
    "SinkhornProxy": (lambda x, y, h: F.SinkhornProxy(h * h)(x, y), one_shot),
    "Drift": (lambda x, y, h: F.Drift((h,))(x, y), algorithm_2),
    "MMD": (lambda x, y, h: F.MMD(h)(x, y), mmd),
    "SlicedWasserstein": (lambda x, y, h: F.SlicedWasserstein(DIRECTIONS)(x, y, generator=chance()), sliced),
    "Wasserstein": (lambda x, y, h: F.Wasserstein()(x, y), exact),
    "DrMMD": (lambda x, y, h: F.DrMMD(LAM, h)(x, y), chi_squared),
    "KALE": (lambda x, y, h: F.KALE(LAM, h)(x, y), kale),
}


# --- measuring --------------------------------------------------------------------------------------------------------


def memory(name: str) -> int:
    """A line of the process's status, in bytes; 0 where there is none."""
    try:
        return next(
            int(line.split()[1]) << 10 for line in open("/proc/self/status", encoding="utf-8") if line.startswith(name)
        )
    except (OSError, StopIteration):
        return 0


def peak(call: Callable[[], Tensor]) -> int:
    """Bytes that the call needs beyond what the process holds before it."""
    if not memory("VmRSS"):
        return 0
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w", encoding="utf-8") as file:
        file.write("5")  # the high-water mark falls to the present size
    before = memory("VmRSS")
    call()
    return memory("VmHWM") - before


def clouds(n: int, d: int) -> tuple[Tensor, Tensor, float]:
    x, y, _ = problem("A" if d == 2 else "C", size=n)
    return x.float(), y.float(), float(F.base.median_distance(x, y)) / 2


def compare(rounds: int) -> list[dict]:
    rows = []
    for n, d in ((256, 2), (256, 784), (2048, 2), (2048, 784)):
        x, y, h = clouds(n, d)
        for name, pair in tqdm(PAIRS.items(), desc=f"n = {n}, d = {d}"):
            ours, literal = (call(x, y, h) for call in pair)
            times: tuple[list[float], list[float]] = ([], [])
            spent = 0.0
            while len(times[0]) < 3 or (spent < 1.0 and len(times[0]) < rounds):
                for call, spans in zip(pair, times, strict=True):
                    start = time.perf_counter()
                    call(x, y, h)
                    spans.append(1e3 * (time.perf_counter() - start))
                    spent += spans[-1] / 1e3
            rows.append(
                {
                    "field": name,
                    "n": n,
                    "d": d,
                    "ms": [statistics.median(spans) for spans in times],
                    "bytes": [peak(partial(call, x, y, h)) for call in pair],
                    "difference": float((ours - literal).norm() / ours.norm()),
                }
            )
            row = rows[-1]
            tqdm.write(
                f"{name:18} {row['ms'][0]:9.1f} ms, literal {row['ms'][1]:9.1f}; {row['bytes'][0] / 2**20:7.1f} MiB, "
                f"literal {row['bytes'][1] / 2**20:7.1f} MiB; difference {row['difference']:.1e}"
            )
    return rows


def ensembles(rounds: int) -> list[dict]:
    """Milliseconds of a training step for each member, alone and stacked, by batch and width; the field is DA2."""
    rows, field, law = [], F.Drift(), nl.toy.Moons(0.1, 2.0, -1.0)
    for batch, width in itertools.product(BATCHES, WIDTHS):
        training = nl.Training(steps=STEPS, batch=batch, warmup=0, ema=0.0)
        nets = [nl.networks.seeded(partial(nl.networks.Residual, 2, 2, width), chance()) for _ in range(MEMBERS)]
        stack = nl.networks.Stack(nets)
        times: dict[str, list[float]] = {"loop": [], "stack": []}
        for _ in tqdm(range(rounds), desc=f"batch {batch}, width {width}"):
            start = time.perf_counter()
            for net in nets:
                nl.drifting.train(net, field, law, training, progress=False)
            middle = time.perf_counter()
            nl.drifting.train(stack, field, law, training, progress=False)
            times["loop"].append(1e3 * (middle - start) / MEMBERS / STEPS)
            times["stack"].append(1e3 * (time.perf_counter() - middle) / MEMBERS / STEPS)
        row = {"batch": batch, "width": width, **{name: statistics.median(values) for name, values in times.items()}}
        rows.append(row)
        print(
            f"batch {batch}, width {width:3d}: loop {row['loop']:.2f} ms, stack {row['stack']:.2f} ms a member and step"
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true", help=f"write {RECORD.relative_to(ROOT)}")
    parser.add_argument("--rounds", type=int, default=20)
    given = parser.parse_args()
    if given.record:
        writable(RECORD)
    torch.set_num_threads(1)
    begin = time.perf_counter()
    out = {"members": MEMBERS, "ensembles": ensembles(max(3, given.rounds // 4))}
    out["rows"] = compare(given.rounds)
    if given.record:
        libraries = ["nsgf-lite", "torch", "POT", "scipy"]
        source = provenance("python -m benchmarks.fields", time.perf_counter() - begin, libraries)
        write_record(RECORD, {"provenance": source, **out})


if __name__ == "__main__":
    main()
