"""The solver and the flow on recorded data: handwritten digits (784 dimensions) and a population of cells in time."""

import gzip
import math

import numpy as np
import pytest
import torch

import nsgf_lite as nl


@pytest.fixture(scope="module")
def digits(data):
    """256 MNIST images as points in [-1, 1]^784, float64."""
    with gzip.open(data / "mnist" / "t10k-images-idx3-ubyte.gz") as file:
        assert int.from_bytes(file.read(16)[4:8], "big") == 10_000
        pixels = np.frombuffer(file.read(256 * 784), np.uint8)
    return torch.from_numpy(pixels.reshape(256, 784) / 127.5 - 1)


@pytest.fixture(scope="module")
def cells(data):
    """Mouse haematopoiesis: up to 300 cells (n, 2) at each of three times."""
    rows = torch.from_numpy(np.loadtxt(data / "cells" / "mouse_hematopoiesis.csv", delimiter=",", skiprows=1))
    chance = torch.Generator().manual_seed(0)
    clouds = [rows[rows[:, 0] == t, 1:] for t in rows[:, 0].unique()]
    return [cloud[torch.randperm(len(cloud), generator=chance)[:300]] for cloud in clouds]


@pytest.mark.parametrize("ratio", [0.05, 3e-3, 3e-4])
def test_float32_sees_the_velocity_of_noise_towards_digits(digits, ratio):
    noise = torch.randn(128, 784, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    eps = ratio * float(torch.cdist(noise, digits).square().mean()) / 2
    exact = nl.fields.Sinkhorn(eps, tol=1e-9)(noise, digits)
    seen = nl.fields.Sinkhorn(eps, tol=1e-5)(noise.float(), digits.float())
    error = float((seen - exact).norm() / exact.norm())
    print(f"eps at {ratio:g} of the mean cost: error {error:.1e}")
    assert error < 1e-4


def test_the_flow_turns_noise_into_digits(digits):
    """In the limit every particle lies in the digits' convex hull, near some digit for small eps."""
    noise = torch.randn(64, 784, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    path = nl.follow(nl.fields.Sinkhorn(eps=2.0), noise, digits, step=0.5, steps=20)
    divergence = [float(nl.sinkhorn_divergence(p, digits, eps=2.0)) for p in path[::5]]
    assert divergence == sorted(divergence, reverse=True)
    near = torch.cdist(path[-1], digits).amin(1)
    between = torch.cdist(digits, digits).fill_diagonal_(math.inf).amin(1)
    assert near.median() < between.median()


def test_cells_flow_from_one_time_to_the_next(cells):
    for now, later in zip(cells, cells[1:], strict=False):
        path = nl.follow(nl.fields.Sinkhorn(eps=0.02), now, later, step=0.5, steps=30, method="heun")
        left = nl.metrics.w2(path[-1], later) / nl.metrics.w2(now, later)
        assert left < 0.2
        assert float(path.abs().max()) < 2 * float(torch.cat([now, later]).abs().max())
