"""Bayesian logistic regression on Rätsch's sets: the posterior by long chains of NUTS, and what JKO flows, SVGD and
Langevin make of it, on the same splits.

    python -m benchmarks.posteriors               # writes book/results/posteriors.json; resumes
    python -m benchmarks.posteriors --try         # banana and diabetis, short chains, nothing is written
    python -m benchmarks.posteriors --sets german --seeds 1 --workers 1

Needs blackjax: pip install 'nsgf-lite[records]'. The data and the splits are those of benchmarks/binary.py; covertype
is done only if it is named. The prior is alpha ~ Gamma(1, rate 0.01), w | alpha ~ N(0, I/alpha), without an intercept.

**The posterior.** Four chains of blackjax's NUTS in float64, each with 1000 steps of window adaptation (dense mass
matrix) and 2000 draws, from starting points of their own. Its log density is written here once more, in jax; both are
compared at draws of the prior. Recorded: the largest rank-normalised split R-hat and the smallest effective sample
size (Vehtari et al. 2021) of all coordinates, divergences, accuracy and mean log likelihood of the test cases by all
draws, and their Monte Carlo errors by the means of five blocks of each chain. On each set's first split also with
``rate=100``, the other reading of Gamma(1, 0.01). In banana's three dimensions the precision is integrated out by hand
and the rest by a grid: the row `quadrature` is exact, and shares with NUTS only the data.

**JKO**, float32, from N(0, I) as in Fan et al. (2022): ten steps of 0.1 down KL, with a reference that follows the
particles, each of 100 minibatches of 256; a crowd of 10,000, map and critic of two layers of 32. 4096 samples, the
paper's number. Its knob is the rate, of which 0.001, 0.003 and 0.01 are tried.

**The rivals**, float32, 512 particles that begin as draws of the prior, 1000 steps with all cases. SVGD: the velocity
of nl.fields.Stein with its own bandwidth, and the authors' optimiser, each coordinate divided by the root of a running
mean of its squares (0.9 old, 0.1 new) plus 1e-6; steps 0.003, 0.01, 0.03, 0.1, 0.3. Langevin: nl.langevin; its step
times L: 0.1, 0.3, 1, 2, 4, where L is a quarter of the largest eigenvalue of X'X, which bounds the likelihood's
curvature.

The values of a knob are tried on a fifth of the first split's learning part, after learning from the rest; the one of
the best mean log likelihood serves all splits. A run that leaves the numbers counts as the worst. A best value at an
end of its row is shown as such.

Each piece, a method on a split, is a file under _build/posteriors, in a folder named after the code and the settings.
"""

import argparse
import itertools
import json
import math
import os
from functools import partial
from pathlib import Path

os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")
os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"

import torch
from scipy.special import polygamma, psi
from torch import Generator, Tensor

import nsgf_lite as nl
from benchmarks.binary import DATA, SETS, read, split
from benchmarks.pieces import digits, home, results
from benchmarks.provenance import ROOT, provenance, writable, write_record
from nsgf_lite.networks import LogRatio, ResidualMap

RECORD = ROOT / "book" / "results" / "posteriors.json"
RATE, OTHER_RATE = 0.01, 100.0
CHAINS, WARMUP, DRAWS, BLOCKS = 4, 1000, 2000, 5
PARTICLES, STEPS = 512, 1000
GRID = {
    "JKO": (0.001, 0.003, 0.01),
    "SVGD": (0.003, 0.01, 0.03, 0.1, 0.3),
    "Langevin": (0.1, 0.3, 1.0, 2.0, 4.0),
}
LENGTH, STEPS_JKO, MINIBATCHES, SAMPLES = 0.1, 10, 100, 4096
Cases = tuple[Tensor, Tensor]


def moments(x: Tensor) -> dict:
    """Mean and standard deviation of each coordinate, and the covariance's largest and smallest eigenvalue."""
    x = x.double()
    spectrum = torch.linalg.eigvalsh(torch.cov(x.T))
    return {"mean": x.mean(0).tolist(), "sd": x.std(0).tolist(), "eigenvalues": spectrum[[-1, 0]].tolist()}


# --- the posterior ----------------------------------------------------------------------------------------------------


def nuts(learn: Cases, rate: float, seed: int, warmup: int, draws: int) -> tuple[Tensor, dict]:
    """Draws (chains, draws, q + 1), and what the diagnostics say of them."""
    import blackjax
    import jax
    from jax import numpy as jnp

    jax.config.update("jax_enable_x64", True)
    X, t = learn
    signed, q = jnp.asarray((X * t.unsqueeze(1)).numpy()), X.shape[1]

    def log_density(x: jax.Array) -> jax.Array:
        w, u = x[:-1], x[-1]
        prior = (q / 2 + 1) * u - jnp.exp(u) * (w @ w / 2 + rate) + math.log(rate) - q / 2 * math.log(2 * math.pi)
        return prior - jnp.logaddexp(0.0, -(signed @ w)).sum()

    law = nl.logistic.LogisticPosterior(X, t, rate=rate)
    points = law.prior(5, Generator().manual_seed(seed), torch.float64)
    both = zip(law.log_density(points).tolist(), map(log_density, jnp.asarray(points.numpy())), strict=True)
    assert all(abs(one - float(two)) < 1e-9 * (1 + abs(one)) for one, two in both), "two densities for one posterior"

    @jax.jit
    def chain(key: jax.Array) -> tuple:
        begin, adapt, go = jax.random.split(key, 3)
        adaptation = blackjax.window_adaptation(blackjax.nuts, log_density, is_mass_matrix_diagonal=False)
        (state, parameters), _ = adaptation.run(adapt, jax.random.normal(begin, (q + 1,)) / 2, warmup)
        step = blackjax.nuts(log_density, **parameters).step

        def one(state: tuple, key: jax.Array) -> tuple:
            state, info = step(key, state)
            return state, (state.position, info.is_divergent, info.num_integration_steps)

        return jax.lax.scan(one, state, jax.random.split(go, draws))[1]

    runs = [chain(key) for key in jax.random.split(jax.random.key(seed), CHAINS)]
    x, divergent, leaps = (jnp.stack(part) for part in zip(*runs, strict=True))
    told = {
        "rhat": float(blackjax.diagnostics.rhat(x).max()),
        "ess": float(blackjax.diagnostics.ess_bulk(x).min()),
        "divergent": int(divergent.sum()),
        "gradients": int(leaps.sum()),
    }
    return torch.tensor(jax.device_get(x)), told


def posterior(name: str, seed: int, rate: float, folder: Path, warmup: int, draws: int) -> dict:
    learn, test = split(*read(name, folder), seed)
    x, told = nuts(learn, rate, seed, warmup, draws)
    accuracy, value = nl.logistic.predictive(x.flatten(0, 1), *test)
    blocks = [nl.logistic.predictive(block, *test) for chain in x for block in chain.chunk(BLOCKS)]
    errors = torch.tensor(blocks, dtype=torch.float64).std(0) / math.sqrt(len(blocks))
    row = {"method": "NUTS" if rate == RATE else f"NUTS, rate {rate:g}", "set": name, "seed": seed}
    row |= {"accuracy": accuracy, "log likelihood": value, "errors": errors.tolist(), **told}
    row |= moments(x.flatten(0, 1))
    return row


def quadrature(name: str, seed: int, folder: Path) -> dict:
    """Two weights: the precision integrated by hand, ``(rate + |w|^2/2)^{-2}``, the weights on a grid."""
    (X, t), test = split(*read(name, folder), seed)
    signed = X * t.unsqueeze(1)

    def log_law(w: Tensor) -> Tensor:
        each = [torch.nn.functional.logsigmoid(part @ signed.T).sum(1) for part in w.split(2000)]
        return torch.cat(each) - 2 * torch.log(RATE + w.square().sum(1) / 2)

    w = torch.zeros(1, 2, dtype=torch.float64)
    for _ in range(50):  # Newton's steps to the likelihood's mode
        p = torch.sigmoid(-(signed @ w[0]))
        curvature = (signed * (p * (1 - p)).unsqueeze(1)).T @ signed
        w = w + torch.linalg.solve(curvature, p @ signed)
    ticks = torch.linspace(-8, 8, 161, dtype=torch.float64)
    grid = w + torch.cartesian_prod(ticks, ticks) @ torch.linalg.cholesky(torch.linalg.inv(curvature)).T
    mass = torch.softmax(log_law(grid), 0)
    level = float(psi(2.0)) - torch.log(RATE + grid.square().sum(1) / 2)
    means = torch.cat([mass @ grid, (mass @ level).unsqueeze(0)])
    spread = (mass @ (grid - means[:2]).square()).sqrt().tolist()
    spread.append(math.sqrt(float(polygamma(1, 2.0)) + float(mass @ (level - means[2]).square())))
    probability = torch.cat([mass @ torch.sigmoid(grid @ part.T) for part in (test[0] * test[1][:, None]).split(200)])
    row = {"method": "quadrature", "set": name, "seed": seed, "accuracy": float((probability > 0.5).double().mean())}
    row |= {"log likelihood": float(probability.log().mean()), "mean": means.tolist(), "sd": spread}
    return row


# --- JKO and its rivals -----------------------------------------------------------------------------------------------


def jko(law: nl.logistic.LogisticPosterior, rate: float, seed: int, minibatches: int) -> Tensor:
    source = nl.targets.GaussianMixture(torch.zeros(1, law.X.shape[1] + 1, dtype=torch.float64))
    model = nl.JKOFlow(
        nl.functionals.KL(law.log_density, follow=0.1),
        LENGTH,
        STEPS_JKO,
        particles=10_000,
        transport=partial(ResidualMap, width=32, depth=2),
        critic=partial(LogRatio, width=32, depth=2),
    )
    model.fit(source, nl.Training(minibatches * STEPS_JKO, 256, rate), seed=seed, progress=False)
    return model.sample(SAMPLES, generator=Generator().manual_seed(1000 + seed))


def sampled(method: str, learn: Cases, knob: float, seed: int, steps: int) -> Tensor:
    """Samples (n, q + 1) after the method's steps; ValueError or FloatingPointError where they leave the numbers."""
    X, t = learn
    law, chance = nl.logistic.LogisticPosterior(X.float(), t.float(), rate=RATE), Generator().manual_seed(1000 + seed)
    if method == "JKO":
        return jko(law, knob, seed, steps * MINIBATCHES // STEPS)
    x = law.prior(PARTICLES, chance)
    if method == "Langevin":
        curvature = float(torch.linalg.eigvalsh(X.T @ X)[-1]) / 4
        return nl.langevin(law.log_density, x, knob / curvature, steps, generator=chance)
    field, squares = nl.fields.Stein(law.log_density), torch.zeros(())
    for k in range(steps):
        v = field(x)
        squares = v.square() if k == 0 else 0.9 * squares + 0.1 * v.square()
        x = x + knob * v / (1e-6 + squares.sqrt())
    return x


def scored(method: str, learn: Cases, test: Cases, knob: float, seed: int, steps: int) -> tuple[Tensor | None, dict]:
    try:
        x = sampled(method, learn, knob, seed, steps)
        accuracy, value = nl.logistic.predictive(x, *test)
    except (ValueError, FloatingPointError) as error:
        return None, {"accuracy": None, "log likelihood": None, "left": str(error)}
    return x, {"accuracy": accuracy, "log likelihood": value}


def tune(name: str, method: str, knob: float, folder: Path, steps: int) -> dict:
    """One value of the knob, on a fifth of the first split's learning part."""
    (X, t), _ = split(*read(name, folder), 0)
    learn, held = split(X, t, 1)
    return {"method": method, "set": name, "knob": knob} | scored(method, learn, held, knob, 0, steps)[1]


def best(tried: list[dict]) -> float:
    """The knob of the largest log likelihood; the smallest one if all have left the numbers."""
    return max(tried, key=lambda row: -math.inf if row["log likelihood"] is None else row["log likelihood"])["knob"]


def run(name: str, method: str, seed: int, knob: float, folder: Path, steps: int) -> dict:
    learn, test = split(*read(name, folder), seed)
    x, told = scored(method, learn, test, knob, seed, steps)
    return {"method": method, "set": name, "seed": seed, "knob": knob} | told | ({} if x is None else moments(x))


# --- pieces and record ------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the sets")
    parser.add_argument("--sets", nargs="+", choices=[*SETS, "covertype"], default=None)
    parser.add_argument("--seeds", type=int, default=3, help="number of splits")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--try", dest="short", action="store_true", help="short chains, nothing is recorded")
    given = parser.parse_args()
    names = given.sets or (["banana", "diabetis"] if given.short else list(SETS))
    seeds, lengths = (
        range(1 if given.short else given.seeds),
        (300, 250, 40) if given.short else (WARMUP, DRAWS, STEPS),
    )
    warmup, draws, steps = lengths
    code = ["benchmarks/posteriors.py", "benchmarks/binary.py"]
    folder = home("posteriors", [*lengths, str(given.data)], code)
    if not given.short:
        writable(RECORD)
    sizes = {name: list(read(name, given.data)[0].shape) for name in names}

    def do(jobs: dict[str, tuple], label: str) -> list[dict]:
        return results(folder, jobs, given.workers, label)

    exact: dict[str, tuple] = {}
    for name, seed in itertools.product(names, seeds):
        exact[f"{name}-{seed}-nuts"] = (posterior, name, seed, RATE, given.data, warmup, draws)
        if seed == 0:
            exact[f"{name}-{seed}-rate"] = (posterior, name, seed, OTHER_RATE, given.data, warmup, draws)
        if name == "banana":
            exact[f"{name}-{seed}-grid"] = (quadrature, name, seed, given.data)
    tries = {
        f"{name}-{method}-{knob:g}": (tune, name, method, knob, given.data, steps)
        for name in names
        for method, knobs in GRID.items()
        for knob in knobs
    }
    done = do(exact, "posteriors")
    tried = do(tries, "knobs")
    rows = [piece["row"] for piece in tried]
    chosen = {
        (name, method): best([row for row in rows if (row["set"], row["method"]) == (name, method)])
        for name, method in itertools.product(names, GRID)
    }
    runs = {
        f"{name}-{seed}-{method}": (run, name, method, seed, knob, given.data, steps)
        for (name, method), knob in chosen.items()
        for seed in seeds
    }
    every = [*done, *tried, *do(runs, "flows")]
    out = [piece["row"] for piece in every if "seed" in piece["row"]]
    show(out)
    spent = {name: round(sum(p["processor"] for p in every if p["row"]["set"] == name), 1) for name in names}
    print("processor seconds:", spent)
    if given.short:
        return
    settings = {
        "rate": RATE,
        "chains": CHAINS,
        "warmup": warmup,
        "draws": draws,
        "particles": PARTICLES,
        "steps": steps,
        "jko": {"length": LENGTH, "steps": STEPS_JKO, "minibatches": MINIBATCHES, "samples": SAMPLES},
    }
    settings |= {"splits": len(seeds), "sets": sizes, "processor seconds": spent}
    libraries = ["nsgf-lite", "torch", "scipy", "jax", "blackjax"]
    source = provenance("python -m benchmarks.posteriors", sum(piece["seconds"] for piece in every), libraries)
    record = {"provenance": source, "settings": settings, "knobs": digits(rows), "rows": digits(out)}
    write_record(RECORD, record, json.dumps(record).replace('{"method"', '\n{"method"'))


def show(rows: list[dict]) -> None:
    """Mean accuracy and log likelihood over the splits, and how far moments are from NUTS's."""
    nuts_rows = {(row["set"], row["seed"]): row for row in rows if row["method"] == "NUTS"}
    for name, method in dict.fromkeys((row["set"], row["method"]) for row in rows):
        mine = [row for row in rows if (row["set"], row["method"]) == (name, method) and "mean" in row]
        if not mine:
            print(f"{name:10}{method:16} left the numbers")
            continue
        means = [sum(row[key] for row in mine) / len(mine) for key in ("accuracy", "log likelihood")]
        off, wide = 0.0, 0.0
        for row in mine:
            truth = nuts_rows[name, row["seed"]]
            parts = list(zip(row["mean"], truth["mean"], row["sd"], truth["sd"], strict=True))
            off = max(off, max(abs(m - n) / s for m, n, _, s in parts))
            wide += sum(r * r / (s * s) for _, _, r, s in parts) / len(parts) / len(mine)
        told = ""
        if "rhat" in mine[0]:
            told = f"R-hat {max(row['rhat'] for row in mine):.4f}, ESS {min(row['ess'] for row in mine):.0f}"
        elif method in GRID:
            knob, ends = mine[0]["knob"], (GRID[method][0], GRID[method][-1])
            told = f"knob {knob:g}, {'at an end' if knob in ends else 'between others'}"
        print(
            f"{name:10}{method:16} accuracy {means[0]:.4f}, log likelihood {means[1]:.4f}, means off by {off:.2f} sd, "
            f"variances {wide:.2f} {told}"
        )


if __name__ == "__main__":
    main()
