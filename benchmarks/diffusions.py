"""JKO flows whose laws are known at every time: Ornstein and Uhlenbeck's, and the porous medium's.

    python -m benchmarks.diffusions               # writes book/results/diffusions.json; resumes
    python -m benchmarks.diffusions --try         # two dimensions each, a tenth of the budget, nothing is written

**Ornstein–Uhlenbeck.** KL to N(b, A^{-1}) from N(0, I), a = 0.05, 18 steps, to t = 0.9. The paper's text leaves A and b
open: here A has eigenvalues whose logarithms are uniform between those of 1/2 and 2, in random directions, and b is
standard normal; both are the seed's. As in the paper the map is affine, the critic has two layers of 64, the rate is
0.005 and a minibatch 1000. The paper gives each JKO step 500 minibatches of the map; here it is BUDGET["ou"].

500,000 points of the source are carried along; after each JKO step the symmetric divergence of the Gaussian law with
their moments is taken from the flow's law at that time, and from that of *exact* JKO steps (of the scheme): the
network's own share. The exact steps' from the flow is the step's share. The critic's value of F stands beside the true
KL of the Gaussian law with these moments, and that of the flow. Every minibatch is of fresh points: a crowd of N
particles that is used again and again leaves an error of its own, about ``(1 - e^{-2t}) d (d + 3) / 2N``, which for
N = 100,000 and d = 32 is larger than the target that this run is to meet.

Rivals, on the first seed: the same flow by maps that are gradients of convex networks, with the exact determinant up to
dimension 16, and with the sampled one (at most ten conjugate gradients), without a critic. Width 64, depth 2, rate
0.005, BUDGET["rival"] minibatches a step, which take longer than the game's.

**Porous medium.** The entropy of power 2 from Barenblatt's law at t = 0.001, a = 0.0005, 50 steps, dimensions 1 to 6.
The map is the gradient of a convex network of width 64, depth 2, rank 1, the critic has four layers of 16, minibatches
of 1024 from a crowd of 100,000. BUDGET["porous"] minibatches in a step at the rate 0.003, where the paper has 1000 at
0.001. After 10, 20, 30, 40 and 50 steps: log densities of both laws at 2000 points of the flow, where the change of
variables goes forward, and at points of Barenblatt's law, where the maps are inverted: 2000 in the inner 99 % of its
mass and 1000 in the outer hundredth, their radii stratified, so that a share outside of the flow's support is seen down
to a hundred thousandth. From them KL in both directions, with standard errors (which ignore the strata) and 1e-45 where
one law has no density; Jensen and Shannon's divergence, which needs no such number; the energy of the flow, by its own
density and by the critic, beside the true one; and W_2 beside its floor.
"""

import argparse
import copy
import math
import os
from functools import partial

os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")

import torch
from scipy.special import betaincinv
from torch import Generator, Tensor

import nsgf_lite as nl
from benchmarks.pieces import ROOT, digits, home, results
from benchmarks.provenance import provenance, writable, write_record
from nsgf_lite import closed_forms, functionals, metrics
from nsgf_lite.networks import ICNN, LogRatio, ResidualMap
from nsgf_lite.targets import Barenblatt, GaussianMixture

RECORD = ROOT / "book" / "results" / "diffusions.json"
DIMENSIONS = {"ou": (2, 4, 8, 16, 32, 64), "porous": (1, 2, 3, 4, 5, 6)}
SEEDS = {"jko": 3, "trapezoid": 3, "exact": 1, "sampled": 1}
BUDGET = {"ou": 150, "rival": 20, "porous": 100}  # minibatches of the map in each JKO step
LENGTH, STEPS, SAMPLES = 0.05, 18, 500_000
START, STRIDE, MOVES, SHOWN, POINTS = 1e-3, 5e-4, 50, 10, 2000
RIM, ZERO = 0.99, 1e-45  # share of the inner mass; what is written for a density of zero
f64 = torch.float64


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.double().mean(0), torch.cov(x.double().T)


# --- Ornstein and Uhlenbeck -------------------------------------------------------------------------------------------


def problem(d: int, seed: int) -> tuple[Tensor, Tensor]:
    """A (d, d) and b (d,)."""
    chance = Generator().manual_seed(seed)
    way, _ = torch.linalg.qr(torch.randn(d, d, generator=chance, dtype=f64))
    size = 2 ** (2 * torch.rand(d, generator=chance, dtype=f64) - 1)
    return way @ torch.diag(size) @ way.T, torch.randn(d, generator=chance, dtype=f64)


def log_density(A: Tensor, b: Tensor, x: Tensor) -> Tensor:
    """Of N(b, A^{-1})."""
    y, A = x - b.to(x), A.to(x)
    return -((y @ A) * y).sum(1) / 2 + torch.logdet(A / (2 * torch.pi)) / 2


def ornstein(d: int, seed: int, method: str, budget: int) -> dict:
    A, b = problem(d, seed)
    density = partial(log_density, A, b)
    if method in ("exact", "sampled"):
        energy = functionals.FreeEnergy(density, method)
        model = nl.JKOFlow(energy, LENGTH, STEPS, particles=None, transport=ICNN)
    else:
        transport, critic = partial(ResidualMap, depth=0), partial(LogRatio, width=64, depth=2)
        kl = functionals.KL(density)
        model = nl.JKOFlow(kl, LENGTH, STEPS, scheme=method, particles=None, transport=transport, critic=critic)
    source = GaussianMixture(torch.zeros(1, d, dtype=f64))
    model.fit(source, nl.Training(budget * STEPS, 1000, 5e-3), seed=seed, progress=False)
    x = source.sample(SAMPLES, Generator().manual_seed(10_000 + seed))
    covariance, scheme = torch.linalg.inv(A), "trapezoid" if method == "trapezoid" else "jko"
    exact = torch.zeros(d, dtype=f64), torch.eye(d, dtype=f64)
    out: dict = {"flow": [], "own": [], "steps": [], "F": [], "true F": [], "flow's F": []}
    for k, step in enumerate(model.kept, 1):
        with torch.no_grad():
            x = torch.cat([step(part) for part in x.split(50_000)])
        now, flow = moments(x), closed_forms.ou_moments(k * LENGTH, A, b)
        exact = closed_forms.jko_gaussian(*exact, b, covariance, LENGTH, scheme if k > 1 else "jko")
        out["flow"].append(metrics.symmetric_kl(*now, *flow))
        out["own"].append(metrics.symmetric_kl(*now, *exact))
        out["steps"].append(metrics.symmetric_kl(*exact, *flow))
        out["true F"].append(float(closed_forms.gaussian_kl(*now, b, covariance)))
        out["flow's F"].append(float(closed_forms.gaussian_kl(*flow, b, covariance)))
    out["F"] = model.values if method in ("jko", "trapezoid") else []  # the others know it up to a constant
    return {"flow of": "ou", "method": method, "d": d, "seed": seed, "budget": budget, **out}


# --- the porous medium ------------------------------------------------------------------------------------------------


def carried(model: nl.JKOFlow, law: Barenblatt, x: Tensor, upto: int) -> tuple[Tensor, Tensor]:
    """Points (n, d) of the source after some steps, and the logarithm of the flow's density (n,) there: no inverse."""
    value = law.log_density(x)
    for step in model.kept[:upto]:
        wide = copy.deepcopy(step.map).double()
        assert isinstance(wide, ICNN)
        with torch.no_grad():
            value, x = value - wide.log_det(x), wide(x)
    return x, value


def porous(d: int, seed: int, budget: int) -> dict:
    law = Barenblatt(d, START)
    transport = partial(ICNN, width=64, depth=2, rank=1)
    critic = partial(LogRatio, width=16, depth=4)
    model = nl.JKOFlow(functionals.Entropy(2.0), STRIDE, MOVES, transport=transport, critic=critic)
    model.fit(law, nl.Training(budget * MOVES, 1024, 3e-3), seed=seed, progress=False)
    chance, out = Generator().manual_seed(10_000 + seed), []
    for k in range(SHOWN, MOVES + 1, SHOWN):
        truth = Barenblatt(d, START + k * STRIDE)
        x, at_x = carried(model, law, law.sample(POINTS, chance, f64), k)
        true_x = truth.log_density(x)
        forward = metrics.sampled_kl(at_x, true_x, ZERO)
        row = {"k": k, "forward": forward, "back": [0.0, 0.0], "js": [0.0, 0.0], "void": 0.0}
        for low, high, count in ((0.0, RIM, POINTS), (RIM, 1.0, POINTS // 2)):
            y = shell(truth, low, high, count, chance)
            at_y, true_y = model.log_density(y, start=law.log_density, upto=k), truth.log_density(y)
            back, js = metrics.sampled_kl(true_y, at_y, ZERO), metrics.sampled_js(at_x, true_x, at_y, true_y)
            share = high - low
            row["void"] += share * float(torch.isinf(at_y).double().mean())
            for name, (value, error) in (("back", back), ("js", js)):
                row[name] = [row[name][0] + share * value, math.hypot(row[name][1], share * error)]
        y, z = (truth.sample(POINTS, chance, f64) for _ in "yz")
        row |= {"outside": float(torch.isinf(true_x).double().mean()), "own F": float(at_x.exp().mean())}
        row |= {"F": model.values[k - 1], "true F": energy(truth)}
        row |= {"w2": metrics.w2(x, y), "floor": metrics.w2(z, y)}
        out.append(row)
    return {"flow of": "porous", "d": d, "seed": seed, "budget": budget, "at": out}


def shell(law: Barenblatt, low: float, high: float, n: int, chance: Generator) -> Tensor:
    """Points (n, d) of the law between two shares of its mass, from the centre, one in each of n equal parts."""
    u = low + (high - low) * (torch.arange(n) + torch.rand(n, generator=chance, dtype=f64)) / n
    way = torch.randn(n, law.d, generator=chance, dtype=f64)
    length = law.radius * torch.from_numpy(betaincinv(law.d / 2, 2.0, u.numpy())).sqrt()
    return length[:, None] * way / way.norm(dim=1, keepdim=True)


def energy(law: Barenblatt) -> float:
    """∫P² for m = 2: P is top (1 - s²), s = |x| over the radius, s² a Beta variable of parameters d/2 and 2."""
    top = float(closed_forms.barenblatt(law.t, torch.zeros(1, law.d, dtype=f64), 2.0))
    return top * 2 / (law.d / 2 + 2)


# --- pieces and record ------------------------------------------------------------------------------------------------


def show(rows: list[dict]) -> None:
    for row in rows:
        if row["flow of"] == "ou":
            ends = [torch.tensor(row[name][-1]).log10().item() for name in ("flow", "own", "steps")]
            value = row["F"][-1] if row["F"] else float("nan")
            print(
                f"OU d = {row['d']:2} {row['method']:9} seed {row['seed']}: log10 of the symmetric KL, to the flow "
                f"{ends[0]:.2f}, to exact steps {ends[1]:.2f}, exact steps to the flow {ends[2]:.2f}; F {value:.4f} of "
                f"{row['true F'][-1]:.4f}; {row['processor']:.0f} s"
            )
        else:
            last = row["at"][-1]
            print(
                f"porous d = {row['d']}: KL {last['forward'][0]:.4f} + {last['back'][0]:.4f}, JS {last['js'][0]:.5f}, "
                f"void {last['void']:.1e}, F {last['F']:.4g} of {last['true F']:.4g}; {row['processor']:.0f} s"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", choices=["ou", "porous"], help="one of the two, nothing is recorded")
    parser.add_argument("--try", dest="short", action="store_true", help="a short run, nothing is recorded")
    given = parser.parse_args()
    share = 10 if given.short else 1
    budget = {name: count // share for name, count in BUDGET.items()}
    jobs: dict[str, tuple] = {}
    for d in DIMENSIONS["ou"][:2] if given.short else DIMENSIONS["ou"]:
        for method, seeds in SEEDS.items():
            if method == "exact" and d > 16:  # of order d³: the paper, too, stops early
                continue
            minibatches = budget["rival" if method in ("exact", "sampled") else "ou"]
            for seed in range(seeds):
                jobs[f"ou-{d}-{method}-{seed}"] = (ornstein, d, seed, method, minibatches)
    for d in DIMENSIONS["porous"][:2] if given.short else DIMENSIONS["porous"]:
        jobs[f"porous-{d}"] = (porous, d, 0, budget["porous"])
    jobs = {name: job for name, job in jobs.items() if given.only is None or name.startswith(given.only)}
    writable(RECORD)
    folder = home("diffusions", [], ["benchmarks/diffusions.py"])
    done = results(folder / ("short" if given.short else "whole"), jobs, given.workers, "flows")
    rows = [{**piece["row"], "processor": piece["processor"]} for piece in done]
    show(rows)
    if given.short or given.only:
        return
    settings = {"budget": BUDGET, "length": LENGTH, "steps": STEPS, "samples": SAMPLES, "start": START}
    settings |= {"stride": STRIDE, "moves": MOVES, "points": POINTS, "seeds": SEEDS}
    source = provenance(
        "python -m benchmarks.diffusions", sum(piece["seconds"] for piece in done), ["nsgf-lite", "torch", "POT"]
    )
    text = {"provenance": source, "settings": settings, "rows": digits(rows)}
    write_record(RECORD, text)


if __name__ == "__main__":
    main()
