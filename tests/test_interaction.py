"""The field of an interaction: loops over pairs with slopes by hand, batches, blocks, places shared, and refusals."""

import math

import pytest
import torch
from test_bad_input import refused
from torch import Generator

import nsgf_lite as nl
from nsgf_lite.fields import interaction

Interaction = nl.fields.Interaction


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=Generator().manual_seed(seed), dtype=torch.float64)


def simplex(*shape, seed=0):
    a = torch.rand(*shape, generator=Generator().manual_seed(seed), dtype=torch.float64) + 0.1
    return a / a.sum(-1, keepdim=True)


# potentials, and their slopes by hand as functions of lists of coordinates
CASES = {
    "spring": (lambda z: (z**2).sum(-1) / 2, lambda z: z),
    "ring": (
        lambda z: (z**2).sum(-1) ** 2 / 4 - (z**2).sum(-1) / 2,
        lambda z: [(sum(q * q for q in z) - 1) * p for p in z],
    ),
    "gas": (
        lambda z: (z**2).sum(-1) / 2 - (z**2).sum(-1).log() / 2,
        lambda z: [p - p / sum(q * q for q in z) for p in z],
    ),
    "bell": (
        lambda z: -torch.exp(-(z**2).sum(-1)) / math.pi,
        lambda z: [2 * p * math.exp(-sum(q * q for q in z)) / math.pi for p in z],
    ),
}


def loops(slope, points, x, a):
    out = []
    for z in points.tolist():
        v = [0.0] * len(z)
        for u, mass in zip(x.tolist(), a.tolist(), strict=True):
            if u != z:
                gap = [p - q for p, q in zip(z, u, strict=True)]
                v = [s - mass * t for s, t in zip(v, slope(gap), strict=True)]
        out.append(v)
    return torch.tensor(out, dtype=torch.float64)


@pytest.mark.parametrize("d", [1, 2, 5])
@pytest.mark.parametrize("name", CASES)
def test_loops_over_pairs(name, d):
    W, slope = CASES[name]
    x, at, a = normal(6, d), normal(4, d, seed=1), simplex(6)
    field, uniform = Interaction(W), torch.full((6,), 1 / 6, dtype=torch.float64)
    assert (field(x) - loops(slope, x, x, uniform)).abs().max() < 1e-12
    assert (field(x, a=a) - loops(slope, x, x, a)).abs().max() < 1e-12
    assert (field(x, at=at, a=a) - loops(slope, at, x, a)).abs().max() < 1e-12
    assert field(x.float()).dtype == torch.float32
    y = normal(3, d, seed=2)  # data may be handed over, as follow does, and change nothing
    assert torch.equal(field(x, y, at=at, a=a, b=simplex(3)), field(x, at=at, a=a))
    assert torch.equal(nl.follow(field, x, x, 0.1, 1, a=a)[-1], x + 0.1 * field(x, a=a))


def test_batches_and_blocks(monkeypatch):
    W, _ = CASES["gas"]
    x, at, a = normal(3, 6, 2), normal(3, 5, 2, seed=1), simplex(3, 6)
    field = Interaction(W)
    whole = field(x, at=at, a=a)
    for k in range(3):
        assert (whole[k] - field(x[k], at=at[k], a=a[k])).abs().max() < 1e-14
    for block in (1, 40, 80):
        monkeypatch.setattr(interaction, "_BLOCK", block)
        assert (field(x, at=at, a=a) - whole).abs().max() < 1e-15
        assert field(x[0]).shape == (6, 2)


def test_blocks_bound_what_is_held(monkeypatch):
    held = []

    def W(z):
        held.append(z.numel())
        return (z**2).sum(-1)

    monkeypatch.setattr(interaction, "_BLOCK", 1000)
    Interaction(W)(normal(100, 2))
    assert max(held) <= 1000 and sum(held) == 100 * 100 * 2


def test_with_and_without_gradients():
    W, _ = CASES["gas"]
    x, at = normal(4, 2).requires_grad_(), normal(3, 2, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, at: Interaction(W)(x, at=at), (x, at))
    plain = Interaction(W)(x.detach())
    assert not plain.requires_grad
    with torch.no_grad():
        assert torch.equal(Interaction(W)(x), plain)
    with torch.inference_mode():
        assert torch.equal(Interaction(W)(x.detach().clone()), plain)


def test_points_at_one_place_exert_no_force():
    """A particle does not feel itself, nor a twin, nor one of weight zero; a point on a particle does not feel that."""
    W, slope = CASES["gas"]
    x, a = normal(5, 2), simplex(5)
    field = Interaction(W)
    assert torch.equal(field(x, a=a), field(x, at=x, a=a))
    twins, halves = torch.cat([x, x[:1]]), torch.cat([a[:1] / 2, a[1:], a[:1] / 2])
    assert (field(twins, a=halves)[:5] - field(x, a=a)).abs().max() < 1e-14
    for place in (x[:1], x[:1] + 5, torch.full((1, 2), 1e6, dtype=torch.float64)):
        idle = field(torch.cat([x, place]), a=torch.cat([a, a.new_zeros(1)]))
        assert (idle[:5] - field(x, a=a)).abs().max() < 1e-14
        seen = field(x, at=place, a=a)
        assert (idle[5:] - seen).abs().max() < 1e-9 * (1 + float(seen.abs().max()))


def test_refusals():
    x = normal(4, 2)
    refused(lambda: Interaction(3), "W must be a function", "3")
    refused(lambda: Interaction(lambda z: z)(x), r"W must take displacements \(4, 4, 2\) to a tensor \(4, 4\)")
    refused(lambda: Interaction(lambda z: 1.0)(x), "that torch can differentiate", "got float")
    refused(lambda: Interaction(lambda z: z.detach().sum(-1))(x), "that torch can differentiate")
    spring = Interaction(CASES["spring"][0])
    refused(lambda: spring(x, normal(4, 3)), "y must agree|agree in batch and dimension")
    refused(lambda: spring(x, x, b=torch.ones(4, dtype=torch.float64)), "b must sum to one")
    refused(lambda: spring(x, a=torch.ones(4, dtype=torch.float64)), "a must sum to one")
    refused(lambda: spring(x, generator=3), "generator must be")
    near = torch.tensor([[0.0], [1e-310]], dtype=torch.float64)
    with pytest.raises(FloatingPointError, match="too large"):
        Interaction(CASES["gas"][0])(near)
