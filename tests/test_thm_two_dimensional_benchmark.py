"""Theorems of the chapter on the benchmark in the plane: the floor, the shrunk generator, geometric approach."""

import pytest
import torch

import nsgf_lite as nl


def scores(made, test):
    """Root mean square over tries of W_2 between clouds (tries, n, d), by the library."""
    return torch.tensor([nl.metrics.w2(x, y) for x, y in zip(made, test, strict=True)]).square().mean().sqrt()


def normal(seed, tries, n, d):
    return torch.randn(tries, n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("d", "shift", "scale"), [(1, 0.5, 1.0), (2, 0.0, 1.6), (3, 0.7, 0.5)])
def test_thm_floor(d, shift, scale):
    n, tries = 12, 150
    y, twin, z = normal(0, tries, n, d), normal(1, tries, n, d), normal(2, tries, n, d)
    floor, score = scores(twin, y), scores(scale * z + shift, y)
    true = (d * shift**2 + d * (scale - 1) ** 2) ** 0.5
    assert score > true
    assert score < true + floor
    # on one and the same draw the pairing of the proof costs exactly W_2, and the triangle inequality holds every time
    for one, other in zip(z[:20], y[:20], strict=True):
        paired = nl.metrics.w2(scale * one + shift, one)
        assert nl.metrics.w2(scale * one + shift, other) <= paired + nl.metrics.w2(one, other) + 1e-9


@pytest.mark.parametrize("s", [0.0, 0.4, 0.9, 1.3])
@pytest.mark.parametrize("d", [1, 2])
def test_thm_shrinking_pays(d, s):
    """The identity holds outcome by outcome, before means are taken; so there is no noise in this test."""
    for x, y in zip(normal(3, 20, 9, d), normal(4, 20, 9, d), strict=True):
        squares = x.square().sum(1).mean(), y.square().sum(1).mean()
        c = (squares[0] + squares[1] - nl.metrics.w2(x, y) ** 2) / 2
        claim = s**2 * squares[0] + squares[1] - 2 * s * c
        assert nl.metrics.w2(s * x, y) ** 2 == pytest.approx(float(claim), abs=1e-12)
    # and the means: with M the second moment, (1-s)^2 M + s f^2
    x, y = normal(5, 400, 9, d), normal(6, 400, 9, d)
    f2 = scores(x, y) ** 2
    assert float(scores(s * x, y) ** 2 / ((1 - s) ** 2 * d + s * f2)) == pytest.approx(1, abs=0.05)
    best = 1 - f2 / (2 * d)
    if 0.5 < best < 1:
        assert scores(best * x, y) < scores(x, y)


@pytest.mark.parametrize("eta", [0.1, 0.4, 1.0])
def test_thm_geometric_approach(eta):
    for seed in range(3):
        x, y = normal(10 + seed, 1, 25, 2)[0], normal(20 + seed, 1, 25, 2)[0] * 2 + 1
        path = nl.follow(nl.fields.Wasserstein(), x, y, step=eta, steps=5)
        start = nl.metrics.w2(x, y)
        for k, cloud in enumerate(path):
            assert nl.metrics.w2(cloud, y) == pytest.approx((1 - eta) ** k * start, rel=1e-9, abs=1e-9)
        partner = nl.fields.exact_plan(x, y).argmax(1)
        torch.testing.assert_close(path[-1], y[partner] + (1 - eta) ** 5 * (x - y[partner]), rtol=0, atol=1e-9)
