"""The four problems on which Sinkhorn solvers are compared: two in the plane, two as images would be.

A: 256 points, eight Gaussians to moons, eps = 0.25.  B: 1024 of them.
C: 128 points in 784 dimensions, noise to bimodal pixels on a smooth 12-dimensional sheet, eps = 0.25, which is
4e-4 of the mean cost.  D: 128 in 3072 dimensions, eps = 4.
"""

import numpy as np
import torch
from sklearn.datasets import make_moons
from torch import Tensor

PROBLEMS = ("A", "B", "C", "D")


def _eight_gaussians(n: int, random: np.random.Generator) -> np.ndarray:
    angle = random.integers(0, 8, n) * np.pi / 4
    centres = 5 * np.stack([np.cos(angle), np.sin(angle)], 1)
    return centres + np.sqrt(0.1) * random.standard_normal((n, 2))


def _sheet(n: int, d: int, random: np.random.Generator) -> np.ndarray:
    """Points ``tanh(1.5 (1.5 z W / sqrt(12) + b))``, z normal in 12 dimensions; W and b are always the same."""
    fixed = np.random.default_rng(12345)
    W, b = fixed.standard_normal((12, d)), fixed.standard_normal(d)
    return np.tanh(1.5 * (1.5 * random.standard_normal((n, 12)) @ W / np.sqrt(12) + b))


def problem(name: str, seed: int = 0, size: int | None = None) -> tuple[Tensor, Tensor, float]:
    """Clouds x, y in float64 and the temperature eps of problem A, B, C or D, of its own size or another."""
    random = np.random.default_rng(seed)
    if name in ("A", "B"):
        n, eps = size or (256 if name == "A" else 1024), 0.25
        x = _eight_gaussians(n, random)
        y = make_moons(n, noise=0.2, random_state=seed)[0] * 3 - 1
    elif name in ("C", "D"):
        n, d, eps = (128, 784, 0.25) if name == "C" else (128, 3072, 4.0)
        n = size or n
        x, y = random.standard_normal((n, d)), _sheet(n, d, random)
    else:
        raise ValueError(f"name must be one of {', '.join(PROBLEMS)}, got {name!r}")
    return torch.from_numpy(x), torch.from_numpy(y), eps
