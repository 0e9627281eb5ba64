"""The rooms around the solver: closed forms, toy laws, metrics, fields, particles, plots, checks."""

import base64
import dataclasses
import io
import math
import re

import numpy as np
import ot
import pytest
import torch
from scipy.stats import kstest
from sklearn import datasets
from torch import Generator

import nsgf_lite as nl
from nsgf_lite import closed_forms, metrics, toy

F64 = torch.float64
DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
    ),
]


def seeded(seed):
    return Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed), dtype=F64)


def covariance(d, seed):
    root = normal(d, d, seed=seed)
    return root @ root.T + 0.1 * torch.eye(d, dtype=F64)


# Closed forms -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eps", [1e-6, 0.3, 50.0])
@pytest.mark.parametrize("d", [1, 2, 5])
def test_gaussian_map_solves_its_equation(d, eps):
    """M is symmetric, and eps M + M A M = B; the cross-covariance A M is a coupling's: the joint one is positive."""
    A, B = covariance(d, 1), covariance(d, 2)
    M = closed_forms.gaussian_map(A, B, eps)
    assert M.dtype == F64 and torch.equal(M, M.T)
    assert (eps * M + M @ A @ M - B).abs().max() < 1e-12 * (1 + float(B.norm() ** 2))
    joint = torch.cat([torch.cat([A, A @ M], 1), torch.cat([M @ A, B], 1)])
    assert torch.linalg.eigvalsh(joint)[0] > -1e-10


def test_gaussian_map_in_one_dimension():
    for A, B, eps in ((16.0, 4.0, 4.0), (1.0, 0.25, 0.5), (2.0, 3.0, 1e-9)):
        slope = (math.sqrt(4 * A * B + eps**2) - eps) / (2 * A)
        assert abs(float(closed_forms.gaussian_map(A, B, eps)) - slope) < 1e-12
    # eps -> 0: the optimal map, whose square is B / A
    assert abs(float(closed_forms.gaussian_map(4.0, 9.0, 1e-12)) - 1.5) < 1e-9


def test_gaussian_cost_in_one_dimension():
    """The formula written out for numbers, and its limits: exact transport, and the mean cost."""
    for a, A, b, B, eps in ((0.0, 1.0, 1.0, 0.25, 0.5), (-2.0, 16.0, 3.0, 4.0, 4.0)):
        D = math.sqrt(4 * A * B + eps**2)
        twice = (a - b) ** 2 + A + B - D + eps * (1 - math.log(2 * eps)) + eps * math.log(D + eps)
        assert abs(float(closed_forms.gaussian_ot(a, A, b, B, eps)) - twice / 2) < 1e-13
        exact = ((a - b) ** 2 + (math.sqrt(A) - math.sqrt(B)) ** 2) / 2
        assert abs(float(closed_forms.gaussian_ot(a, A, b, B, 1e-9)) - exact) < 1e-7
        mean_cost = ((a - b) ** 2 + A + B) / 2
        assert abs(float(closed_forms.gaussian_ot(a, A, b, B, 1e9)) - mean_cost) < 1e-6
        assert abs(float(closed_forms.gaussian_divergence(a, A, b, B, 1e9)) - (a - b) ** 2 / 2) < 1e-6


def test_gaussian_cost_is_additive_and_does_not_see_rotations():
    A, B, eps = covariance(3, 3), covariance(3, 4), 0.7
    a, b = normal(3, seed=5), normal(3, seed=6)
    U = torch.linalg.qr(normal(3, 3, seed=7))[0]
    turned = closed_forms.gaussian_ot(a @ U.T, U @ A @ U.T, b @ U.T, U @ B @ U.T, eps)
    assert abs(float(turned - closed_forms.gaussian_ot(a, A, b, B, eps))) < 1e-11
    flat = closed_forms.gaussian_ot([0, 1], [[1, 0], [0, 4]], [2, 3], [[9, 0], [0, 16]], eps)
    parts = closed_forms.gaussian_ot(0, 1, 2, 9, eps) + closed_forms.gaussian_ot(1, 4, 3, 16, eps)
    assert abs(float(flat - parts)) < 1e-12


def test_three_gaussians_break_the_triangle_inequality():
    def root(A, B):
        return math.sqrt(float(closed_forms.gaussian_divergence(0, A, 0, B, 4.0)))

    outer, first, second = root(16, 1), root(16, 4), root(4, 1)
    assert [round(v, 6) for v in (outer, first, second)] == [2.025405, 1.393255, 0.602972]
    assert outer > first + second


def test_gaussian_velocity_is_a_difference_of_maps():
    a, A, b, B, eps = normal(2, seed=1), covariance(2, 1), normal(2, seed=2), covariance(2, 2), 0.6
    v = closed_forms.gaussian_velocity(a, A, b, B, eps)
    x = normal(5, 2, seed=3)
    towards = b + (x - a) @ closed_forms.gaussian_map(A, B, eps)
    away = a + (x - a) @ closed_forms.gaussian_map(A, A, eps)
    assert (v(x) - (towards - away)).abs().max() < 1e-13
    assert v(x.float()).dtype == torch.float32 and (v(x.float()) - v(x)).abs().max() < 1e-5
    still = closed_forms.gaussian_velocity(a, A, a, A, eps)
    assert still(x).abs().max() < 1e-13


@pytest.mark.parametrize(("d", "eps"), [(1, 0.05), (2, 1.0), (4, 30.0)])
def test_gaussian_flow_against_small_steps(d, eps):
    """Two hundred classical Runge-Kutta steps of the closed equation, written out here, end where the flow does."""
    m, S, b, B = normal(d, seed=1), covariance(d, 1), normal(d, seed=2), covariance(d, 2)
    means, covariances = closed_forms.gaussian_flow(m, S, b, B, eps, [0.0, 0.4, 2.0])
    assert means.shape == (3, d) and covariances.shape == (3, d, d)
    assert means.dtype == covariances.dtype == F64
    assert (means[0] - m).abs().max() < 1e-15 and (covariances[0] - S).abs().max() < 1e-14
    assert torch.equal(covariances, covariances.mT)

    def rate(S):
        K = closed_forms.gaussian_map(S, B, eps) - closed_forms.gaussian_map(S, S, eps)
        return K @ S + S @ K

    h, now = 0.01, S
    for k in range(1, 201):
        one = rate(now)
        two = rate(now + h / 2 * one)
        three = rate(now + h / 2 * two)
        now = now + h / 6 * (one + 2 * two + 2 * three + rate(now + h * three))
        now = (now + now.T) / 2
        if k in (40, 200):
            assert (now - covariances[1 if k == 40 else 2]).abs().max() < 1e-7
    assert (means[2] - b - math.exp(-2) * (m - b)).abs().max() < 1e-14


def test_gaussian_flow_reads_numbers_lists_and_tensors():
    """Numbers stand for one dimension, single precision is read, and the times may begin late."""
    _, path = closed_forms.gaussian_flow(0.0, 4.0, 1.0, 0.25, 0.5, torch.linspace(0, 3, 7))
    _, late = closed_forms.gaussian_flow([0.0], [[4.0]], torch.ones(1), torch.full((1, 1), 0.25), 0.5, [1.5, 3.0])
    assert (path[[3, 6]] - late).abs().max() < 1e-11
    assert (torch.diff(path[:, 0, 0]) < 0).all() and path[-1] > 0.25
    _, fast = closed_forms.gaussian_flow(0.0, 4.0, 1.0, 0.25, 1e-9, [1.5])
    assert abs(float(fast) - (0.5 + 1.5 * math.exp(-1.5)) ** 2) < 1e-9
    still = closed_forms.gaussian_flow(
        [1.0, 2.0], [[2.0, 1.0], [1.0, 1.0]], [1.0, 2.0], [[2.0, 1.0], [1.0, 1.0]], 1, [9]
    )
    assert (still[1][0] - torch.tensor([[2.0, 1.0], [1.0, 1.0]], dtype=F64)).abs().max() < 1e-12


def test_the_slope_needs_no_inverse():
    """From an almost singular law, and at tiny and huge temperatures, M still solves its equation."""
    B = covariance(2, 2)
    for tiny in (1e-12, 1e-6):
        A = torch.diag(torch.tensor([tiny, 1.0], dtype=F64))
        for eps in (1e-3, 1.0, 1e6):
            M = closed_forms.gaussian_map(A, B, eps)
            assert (eps * M + M @ A @ M - B).abs().max() < 1e-9


@pytest.mark.parametrize(
    ("alpha", "beta", "distance", "eps"),
    [(0.7, 0.4, 2.0, 0.5), (0.4, 0.7, 2.0, 0.5), (0.3, 0.3, 1.0, 3.0), (0.9, 0.2, 2.0, 0.1), (0.2, 0.9, 2.0, 0.1)],
)
def test_two_atoms_against_the_solver(alpha, beta, distance, eps):
    """The mass that goes from the right to the left atom, with unequal weights on both sides."""
    atoms = torch.tensor([[-distance / 2], [distance / 2]], dtype=F64)
    a, b = (torch.tensor([w, 1 - w], dtype=F64) for w in (beta, alpha))
    t = closed_forms.two_atom_mass(alpha, beta, distance, eps)
    assert abs(float(t - nl.plan(atoms, atoms.clone(), eps, a, b, tol=1e-14)[1, 0])) < 1e-12
    assert max(0, alpha - beta) <= t <= min(alpha, 1 - beta)
    if (alpha, beta, distance, eps) == (0.7, 0.4, 2.0, 0.5):
        assert abs(float(t) - 0.3001340202959117) < 1e-15, "the root, by forty-digit arithmetic"


def test_two_atoms_at_both_ends_of_the_temperature():
    """eps -> 0: only the surplus moves; eps -> infinity: the product plan. Masses keep their relative accuracy."""
    assert abs(float(closed_forms.two_atom_mass(0.7, 0.4, 2.0, 1e-3)) - 0.3) < 1e-15
    assert abs(float(closed_forms.two_atom_mass(0.7, 0.4, 2.0, 1e9)) - 0.6 * 0.7) < 1e-8
    kappa2 = math.exp(-4 / 0.1)  # t is about kappa^2 alpha (1 - beta) / (beta - alpha) where alpha < beta
    t = float(closed_forms.two_atom_mass(0.4, 0.7, 2.0, 0.1))
    assert abs(t / (kappa2 * 0.4 * 0.3 / 0.3) - 1) < 1e-10


def test_ou_moments_solve_their_equations():
    """The mean falls towards b at the rate A, the covariance obeys the Lyapunov equation, and t = 0 is the start."""
    A, b, m0, S0 = covariance(3, 1), normal(3, seed=2), normal(3, seed=3), covariance(3, 4)
    (m, S), h = closed_forms.ou_moments(0.4, A, b, m0, S0), 1e-5
    (m1, S1), (m2, S2) = (closed_forms.ou_moments(0.4 + s * h, A, b, m0, S0) for s in (-1, 1))
    assert ((m2 - m1) / (2 * h) - A @ (b - m)).abs().max() < 1e-8
    assert ((S2 - S1) / (2 * h) - (2 * torch.eye(3) - A @ S - S @ A)).abs().max() < 1e-8
    m, S = closed_forms.ou_moments(0, A, b, m0, S0)
    assert (m - m0).abs().max() < 1e-14 and (S - S0).abs().max() < 1e-13
    m, S = closed_forms.ou_moments(1e4, A, b, m0, S0)
    assert (m - b).abs().max() < 1e-12 and (S @ A - torch.eye(3)).abs().max() < 1e-11


def test_ou_moments_start_at_the_standard_gaussian_and_form_a_semigroup():
    given = closed_forms.ou_moments(0.7, 2.0, 1.0, 0.0, 1.0)
    default = closed_forms.ou_moments(0.7, 2.0, 1.0)
    assert all(torch.equal(one, other) for one, other in zip(given, default, strict=True))
    assert abs(float(default[0]) - (1 - math.exp(-1.4))) < 1e-15
    assert abs(float(default[1]) - (0.5 + 0.5 * math.exp(-2.8))) < 1e-15
    A, b = covariance(2, 5), normal(2, seed=6)
    once = closed_forms.ou_moments(0.8, A, b)
    twice = closed_forms.ou_moments(0.5, A, b, *closed_forms.ou_moments(0.3, A, b))
    assert all((one - two).abs().max() < 1e-13 for one, two in zip(once, twice, strict=True))


@pytest.mark.parametrize("m", [1.2, 2.0, 4.0])
@pytest.mark.parametrize("d", [1, 2, 3])
def test_barenblatt_has_unit_mass_and_spreads_by_scaling(d, m):
    alpha = d / (d * (m - 1) + 2)
    sphere = {1: 2.0, 2: 2 * math.pi, 3: 4 * math.pi}[d]
    for t in (0.1, 5.0):
        r = 12 * t ** (alpha / d) * (torch.arange(40_000, dtype=F64) + 0.5) / 40_000
        x = torch.cat([r[:, None], torch.zeros(len(r), d - 1, dtype=F64)], 1)
        shell = closed_forms.barenblatt(t, x, m) * sphere * r ** (d - 1)
        assert abs(float(shell.sum() * (r[1] - r[0])) - 1) < 1e-4
        assert float(shell[-1]) == 0
    x = normal(9, d, seed=1)
    stretched = closed_forms.barenblatt(32.0, x * 32.0 ** (alpha / d), m)
    assert (stretched * 32.0**alpha - closed_forms.barenblatt(1.0, x, m)).abs().max() < 1e-13
    single = closed_forms.barenblatt(1.0, x.float(), m)
    assert single.dtype == torch.float32 and (single - closed_forms.barenblatt(1.0, x, m)).abs().max() < 1e-5
    assert closed_forms.barenblatt(1.0, x.reshape(3, 3, d), m).shape == (3, 3)


def test_barenblatt_tends_to_the_heat_kernel():
    x = torch.linspace(-4, 4, 17, dtype=F64)[:, None]
    kernel = torch.exp(-(x[:, 0] ** 2) / 2) / math.sqrt(2 * math.pi)
    gaps = [float((closed_forms.barenblatt(0.5, x, m) - kernel).abs().max()) for m in (1.01, 1.001)]
    assert gaps[0] < 1e-2 and gaps[1] < 0.11 * gaps[0]


# Toy laws -----------------------------------------------------------------------------------------------------------

LAWS = {
    "EightGaussians": toy.EightGaussians(),
    "Moons": toy.Moons(),
    "SCurve": toy.SCurve(),
    "Checkerboard": toy.Checkerboard(),
    "Circles": toy.Circles(),
    "Spiral": toy.Spiral(),
    "Gaussian": toy.Gaussian((1.0, -2.0), ((2.0, 0.5), (0.5, 1.0))),
}


@pytest.mark.parametrize("name", LAWS)
def test_laws_are_deterministic_and_leave_the_global_generator_alone(name):
    law = LAWS[name]
    state = torch.random.get_rng_state()
    one, two, three = (law.sample(100, seeded(seed)) for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(one, two) and not torch.equal(one, three)
    assert one.shape == (100, 2) and one.dtype == torch.float32
    g = seeded(0)
    assert law.sample(100, g, dtype=F64).dtype == F64
    assert not torch.equal(law.sample(100, g), law.sample(100, g)), "a second draw is another sample"
    assert law == dataclasses.replace(law) and hash(law) == hash(dataclasses.replace(law))
    with pytest.raises(dataclasses.FrozenInstanceError):
        law.noise = 0


def same_law(ours, theirs):
    """Two samples agree in mean, covariance and in the distribution of several projections."""
    n = min(len(ours), len(theirs))
    assert np.abs(ours.mean(0) - theirs.mean(0)).max() < 6 * theirs.std() / math.sqrt(n)
    assert np.abs(np.cov(ours.T) - np.cov(theirs.T)).max() < 12 * theirs.var() / math.sqrt(n)
    for angle in np.linspace(0, np.pi, 7)[:-1]:
        way = np.array([np.cos(angle), np.sin(angle)])
        assert kstest(ours @ way, theirs @ way).pvalue > 1e-4


SKLEARN = {
    "Moons": (toy.Moons(), lambda n: 3 * datasets.make_moons(n, noise=0.2, random_state=0)[0] - 1),
    "small Moons": (
        toy.Moons(noise=0.1, scale=2, shift=0),
        lambda n: 2 * datasets.make_moons(n, noise=0.1, random_state=0)[0],
    ),
    "SCurve": (toy.SCurve(), lambda n: 1.5 * datasets.make_s_curve(n, noise=0.05, random_state=0)[0][:, [0, 2]]),
    "Circles": (
        toy.Circles(ratio=0.4, noise=0.1),
        lambda n: 3 * datasets.make_circles(n, noise=0.1, factor=0.4, random_state=0)[0],
    ),
}


@pytest.mark.parametrize("name", SKLEARN)
def test_laws_of_scikit_learn(name):
    """The very laws of make_moons, make_s_curve and make_circles, at the scales that the docstrings state."""
    law, theirs = SKLEARN[name]
    same_law(law.sample(40_000, seeded(1), dtype=F64).numpy(), theirs(40_000))


def test_same_law_can_tell_laws_apart():
    """The test above would see a shift of the moons by .1, or noise of .25 instead of .2."""
    theirs = SKLEARN["Moons"][1](40_000)
    for wrong in (toy.Moons(shift=-0.9), toy.Moons(noise=0.25), toy.Moons(scale=3.1)):
        with pytest.raises(AssertionError):
            same_law(wrong.sample(40_000, seeded(1), dtype=F64).numpy(), theirs)


def test_eight_gaussians():
    """torchcfm's: radius 5, covariance sqrt(.1) I, which is a standard deviation of .562; eight modes of equal mass."""
    n = 80_000
    x = toy.EightGaussians().sample(n, seeded(2), dtype=F64)
    mode = torch.round(torch.atan2(x[:, 1], x[:, 0]) / (math.pi / 4)) % 8
    counts = torch.stack([(mode == k).sum() for k in range(8)])
    assert (counts - n / 8).abs().max() < 6 * math.sqrt(n / 8)
    centres = 5 * torch.stack([torch.cos(mode * math.pi / 4), torch.sin(mode * math.pi / 4)], 1)
    # cutting at the sectors' borders takes a little off the tangential spread: hence not sharper than one per cent
    assert abs(float((x - centres).std()) - 0.5623) < 0.006
    assert abs(float(x.square().sum(1).mean()) - (25 + 2 * math.sqrt(0.1))) < 0.1
    small = toy.EightGaussians(radius=2.8284, sigma=0.3536).sample(n, seeded(2), dtype=F64)
    assert abs(float(small.square().sum(1).mean()) - (8 + 2 * 0.125)) < 0.05


def test_checkerboard():
    """Uniform on the dark squares of a 4 by 4 board on [-2, 2]^2."""
    n = 80_000
    x = toy.Checkerboard().sample(n, seeded(3), dtype=F64)
    assert x.abs().max() <= 2
    square = torch.floor(x + 2)
    assert bool(((square.sum(1) % 2) == 0).all())
    counts = torch.bincount((4 * square[:, 0] + square[:, 1]).long(), minlength=16)
    dark = counts[counts > 0]
    assert len(dark) == 8 and (dark - n / 8).abs().max() < 6 * math.sqrt(n / 8)
    for k in (0, 1):
        assert kstest((x[:, k] - torch.floor(x[:, k])).numpy(), "uniform").pvalue > 1e-4
    wide = toy.Checkerboard(side=8).sample(1000, seeded(3), dtype=F64)
    assert torch.allclose(wide, 2 * x[:0].new_tensor(toy.Checkerboard().sample(1000, seeded(3), dtype=F64).tolist()))


def test_spiral():
    """Without noise every point lies on one of two opposite arms, r = scale * angle / (2 pi turns), r^2 uniform."""
    law = toy.Spiral(turns=1.5, noise=0.0, scale=4.0)
    x = law.sample(20_000, seeded(4), dtype=F64)
    r = x.norm(dim=1)
    assert r.max() <= 4
    assert kstest((r.square() / 16).numpy(), "uniform").pvalue > 1e-4
    angle = 2 * math.pi * 1.5 * r / 4
    arm = r.unsqueeze(1) * torch.stack([angle.cos(), angle.sin()], 1)
    first = (x - arm).norm(dim=1) < 1e-9
    assert bool((first | ((x + arm).norm(dim=1) < 1e-9)).all())
    assert abs(float(first.double().mean()) - 0.5) < 6 * 0.5 / math.sqrt(len(x))
    noisy = toy.Spiral().sample(20_000, seeded(4), dtype=F64)
    same = toy.Spiral(noise=0.0).sample(20_000, seeded(4), dtype=F64)
    assert abs(float((noisy - same).std()) - 0.1) < 0.003


def test_gaussian_law():
    law = toy.Gaussian((1.0, -2.0, 0.0), ((2.0, 0.5, 0.0), (0.5, 1.0, -0.3), (0.0, -0.3, 0.5)))
    x = law.sample(100_000, seeded(5), dtype=F64)
    assert x.shape == (100_000, 3)
    assert (x.mean(0) - torch.tensor(law.mean, dtype=F64)).abs().max() < 0.03
    assert (torch.cov(x.T) - torch.tensor(law.covariance, dtype=F64)).abs().max() < 0.04
    standard = toy.Gaussian().sample(20_000, seeded(6), dtype=F64)
    assert kstest(standard.flatten().numpy(), "norm").pvalue > 1e-4


@pytest.mark.parametrize("device", DEVICES)
def test_laws_sample_where_their_generator_lives(device):
    for law in LAWS.values():
        x = law.sample(10, Generator(device).manual_seed(0), dtype=F64)
        assert x.device.type == device and x.dtype == F64


# Metrics ------------------------------------------------------------------------------------------------------------


def test_w2_on_the_line():
    """Sorted differences; and, with weights, the L2 distance of quantile functions."""
    x, y = normal(50, 1, seed=1), 2 * normal(50, 1, seed=2) + 1
    sorted_distance = math.sqrt(float((x.sort(0)[0] - y.sort(0)[0]).square().mean()))
    assert abs(metrics.w2(x, y) - sorted_distance) < 1e-12
    # weights 1/4, 3/4 at 0, 1 against 1/2, 1/2 at 0, 2: quantiles differ by 0, 1 and 1 on quarters and halves
    x, y = (torch.tensor(t, dtype=F64)[:, None] for t in ([0, 1], [0, 2]))
    a = torch.tensor([0.25, 0.75], dtype=F64)
    assert abs(metrics.w2(x, y, a) - math.sqrt(0.25 * 1 + 0.5 * 1)) < 1e-14
    assert abs(metrics.w2(y, x, None, a) - math.sqrt(0.75)) < 1e-14


def test_w2_of_translations_and_scalings():
    """A shift moves every point by itself; a centred cloud scaled by s is |s - 1| times its radius away."""
    x, shift = normal(80, 3, seed=3), torch.tensor([1.0, -2.0, 0.5], dtype=F64)
    assert abs(metrics.w2(x, x + shift) - float(shift.norm())) < 1e-12
    assert abs(metrics.w2(x, 3 * x) - 2 * math.sqrt(float(x.square().sum(1).mean()))) < 1e-12
    assert metrics.w2(x, x.flip(0)) < 1e-12
    assert abs(metrics.w2(x[:30], x) - metrics.w2(x, x[:30])) < 1e-12
    far = 1e6
    assert abs(metrics.w2(x + far, 2 * x + far) - metrics.w2(x, 2 * x)) < 1e-8, "accurate far from the origin"
    assert abs(metrics.w2(x.float(), x.float() + 1) - math.sqrt(3)) < 1e-6
    twice = torch.cat([x, x])
    assert metrics.w2(twice, x) < 1e-7


def test_w2_of_gaussians_converges_to_the_closed_form():
    A, B = covariance(2, 1), covariance(2, 2)
    exact = math.sqrt(2 * float(closed_forms.gaussian_ot([0, 0], A, [3, 0], B, 1e-10)))
    x = toy.Gaussian((0.0, 0.0), tuple(map(tuple, A.tolist()))).sample(700, seeded(1), F64)
    y = toy.Gaussian((3.0, 0.0), tuple(map(tuple, B.tolist()))).sample(700, seeded(2), F64)
    assert abs(metrics.w2(x, y) - exact) < 0.15


def test_mmd2_is_the_double_sum():
    x, y, h = normal(7, 2, seed=1), normal(5, 2, seed=2) + 0.3, 0.8

    def mean(u, v):
        return sum(math.exp(-float((p - q).square().sum()) / (2 * h * h)) for p in u for q in v) / (len(u) * len(v))

    assert abs(metrics.mmd2(x, y, h) - (mean(x, x) - 2 * mean(x, y) + mean(y, y))) < 1e-15
    z = torch.cat([x, y])
    distances = torch.tensor([float((z[i] - z[j]).norm()) for i in range(12) for j in range(12) if i != j])
    default = metrics.mmd2(x, y, float(distances.double().median()))
    assert abs(metrics.mmd2(x, y) - default) < 1e-6
    assert metrics.mmd2(x, x.flip(0)) < 1e-15
    assert metrics.mmd2(x[:1], x[:1]) == 0
    assert abs(metrics.mmd2(x.float(), y.float(), h) - metrics.mmd2(x, y, h)) < 1e-6
    assert 0 <= metrics.mmd2(x, x + 1e-9)


def test_mmd2_by_blocks(monkeypatch):
    """The same number and the same median, however little of the matrix is held at once."""
    x, y = normal(40, 2, seed=1), normal(30, 2, seed=2) + 0.3
    y[:3] = x[:3]
    whole = [metrics.mmd2(x, y), metrics.mmd2(x, y, 0.5)]
    for block in (500, 70, 1):
        monkeypatch.setattr(metrics, "_BLOCK", block)
        assert metrics._median_distance(torch.cat([x, y])) == float(nl.fields.base.median_distance(x, y))
        assert [metrics.mmd2(x, y), metrics.mmd2(x, y, 0.5)] == pytest.approx(whole, abs=1e-16)
    assert metrics._median_distance(torch.zeros(5, 2, dtype=F64)) == 1


@pytest.mark.parametrize("unit", [1e-50, 1e-8, 1.0, 1e50])
def test_w2_in_any_unit(unit):
    """On the line, where it is the distance of the sorted points; and with an outlier that both clouds share."""
    x, y = normal(60, 1, seed=1), normal(60, 1, seed=2) * 0.5 + 1
    exact = float((x.sort(0)[0] - y.sort(0)[0]).square().mean().sqrt())
    assert metrics.w2(unit * x, unit * y) == pytest.approx(unit * exact, rel=1e-12)
    x[-1] = y[-1] = 1e8
    exact = float((x.sort(0)[0] - y.sort(0)[0]).square().mean().sqrt())
    assert metrics.w2(unit * x, unit * y) == pytest.approx(unit * exact, rel=1e-7)


def test_floor_is_what_it_says():
    """Mean and deviation of the metric between pairs drawn one after the other, in this order."""
    g = seeded(1)
    values = [metrics.w2(toy.Moons().sample(40, g), toy.Moons().sample(40, g)) for _ in range(5)]
    mean, deviation = metrics.floor(toy.Moons(), 40, seeded(1), pairs=5)
    assert abs(mean - np.mean(values)) < 1e-6 and abs(deviation - np.std(values, ddof=1)) < 1e-6
    mean, _ = metrics.floor(toy.Moons(), 40, seeded(1), metric=lambda x, y: 7.0, pairs=2)
    assert mean == 7


@dataclasses.dataclass(frozen=True)
class StratifiedMoons:
    """scikit-learn's sampler, which puts exactly half of the points on each half circle."""

    noise: float
    scale: float
    shift: float

    def sample(self, n, generator, dtype=torch.float32):
        seed = int(torch.randint(2**31, (), generator=generator))
        points, _ = datasets.make_moons(n, noise=self.noise, random_state=seed)
        return torch.from_numpy(self.scale * points + self.shift).to(dtype)


@pytest.mark.parametrize(
    ("law", "recorded", "slack"),
    [
        (StratifiedMoons(0.2, 3, -1), 0.247, 0.02),
        (StratifiedMoons(0.1, 2, 0), 0.110, 0.01),
        (StratifiedMoons(0.05, 2, 0), 0.071, 0.01),
        (toy.EightGaussians(radius=2.8284, sigma=0.3536), 0.329, 0.15),
        (toy.SCurve(), 0.237, 0.15),
        (toy.Checkerboard(), 0.187, 0.06),
        (toy.Checkerboard(side=8), 0.353, 0.12),
    ],
)
def test_floor_near_the_recorded_figures(law, recorded, slack):
    """W_2 between independent samples of 1024, recorded over eight pairs when the library was designed; here three."""
    mean, deviation = metrics.floor(law, 1024, seeded(0), pairs=3)
    print(f"{law}: {mean:.3f} ± {deviation:.3f}, recorded {recorded}")
    assert abs(mean - recorded) < slack


def test_independent_moons_have_a_higher_floor_than_stratified_ones():
    """Our law draws each point independently: the numbers on the two half circles differ, and W_2 pays for it."""
    ours, _ = metrics.floor(toy.Moons(noise=0.1, scale=2, shift=0), 1024, seeded(0), pairs=4)
    theirs, _ = metrics.floor(StratifiedMoons(0.1, 2, 0), 1024, seeded(0), pairs=4)
    print(f"floor of moons: independent {ours:.3f}, stratified {theirs:.3f}")
    assert theirs + 0.01 < ours < 0.25


# Fields -------------------------------------------------------------------------------------------------------------


def test_sinkhorn_field_on_gaussians():
    """The velocity between two Gaussians on a weighted grid, at the particles and elsewhere."""
    z = torch.linspace(-8, 8, 161, dtype=F64)[:, None]
    w = torch.exp(-z[:, 0].square() / 2)
    w = w / w.sum()
    exact = closed_forms.gaussian_velocity(0.0, 1.0, 1.5, 0.25, 0.4)
    v = nl.fields.Sinkhorn(0.4, tol=1e-12)
    inner = z[60:101] / 3 + 0.01
    assert (v(z, 1.5 + z / 2, at=inner, a=w, b=w) - exact(inner)).abs().max() < 1e-10
    assert (v(z, 1.5 + z / 2, a=w, b=w)[60:101] - exact(z[60:101])).abs().max() < 1e-10


def test_sinkhorn_field_is_towards_less_away():
    x, y, at = normal(8, 2, seed=1), normal(11, 2, seed=2), normal(5, 2, seed=3)
    v = nl.fields.Sinkhorn(0.5, tol=1e-12)
    away = nl.barycentric_map(x, x, 0.5, tol=1e-12)
    towards = nl.barycentric_map(x, y, 0.5, tol=1e-12)
    assert (v(x, y, at) - (towards(at) - away(at))).abs().max() < 1e-12
    assert (v(x, y) - (towards(x) - away(x))).abs().max() < 1e-11
    assert v(x, x.clone()).abs().max() < 1e-10
    # S_eps tends to the energy of the means as eps grows, and its velocity to their difference
    wide = nl.fields.Sinkhorn(1e6, tol=1e-12)(x, y)
    assert (wide - (y.mean(0) - x.mean(0))).abs().max() < 1e-5


def test_fields_are_frozen_hyperparameters():
    v = nl.fields.Sinkhorn(eps=0.1)
    assert v == nl.fields.Sinkhorn(0.1, 1e-4) and v != nl.fields.Sinkhorn(0.2)
    assert hash(v) == hash(nl.fields.Sinkhorn(0.1))
    with pytest.raises(dataclasses.FrozenInstanceError):
        v.eps = 1.0


def test_warm_dict_keeps_the_potentials():
    x, y = normal(20, 2, seed=1), normal(20, 2, seed=2)
    v, warm = nl.fields.Sinkhorn(0.05, tol=1e-9), {}
    first = v(x, y, warm=warm)
    assert set(warm) == {"towards", "away"}
    cold = warm["towards"].iterations
    assert torch.allclose(v(x, y, warm=warm), first, atol=1e-7)
    assert warm["towards"].iterations < cold


def test_wasserstein_field():
    """On the line the exact plan is monotone; with uneven weights a particle aims at the mean of what it sends."""
    x, y = normal(30, 1, seed=1), normal(30, 1, seed=2)
    v = nl.fields.Wasserstein()(x, y)
    order = x[:, 0].argsort()
    assert (v[order] - (y.sort(0)[0] - x[order])).abs().max() < 1e-12
    x = torch.tensor([[0.0], [10.0], [5.0]], dtype=F64)
    y = torch.tensor([[0.0], [2.0], [20.0]], dtype=F64)
    a, b = torch.tensor([0.5, 0.5, 0.0], dtype=F64), torch.tensor([0.3, 0.2, 0.5], dtype=F64)
    v = nl.fields.Wasserstein()(x, y, a=a, b=b)
    assert (v - torch.tensor([[0.4 * 2.0], [10.0], [0.0]], dtype=F64)).abs().max() < 1e-12, "weight zero rests"
    assert nl.fields.Wasserstein()(x.float(), y.float()).dtype == torch.float32


def test_sinkhorn_field_at_small_eps_is_the_wasserstein_field():
    x, y = normal(12, 2, seed=3), normal(12, 2, seed=4)
    sharp = nl.fields.Sinkhorn(1e-4, tol=1e-10)(x, y)
    assert (sharp - nl.fields.Wasserstein()(x, y)).abs().max() < 1e-6


# Particles ----------------------------------------------------------------------------------------------------------


def cosine(x, y):
    """dx/dt = cos^2 x, whose flow is atan(tan x + t)."""
    return torch.cos(x) ** 2


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("heun", 2), ("rk4", 4)])
def test_order_of_accuracy(method, order):
    x = torch.linspace(-1, 1, 5, dtype=F64)[:, None]
    exact = torch.atan(torch.tan(x) + 2)
    errors = []
    for steps in (20, 40, 80):
        path = nl.follow(cosine, x, x, step=2 / steps, steps=steps, method=method)
        assert path.shape == (steps + 1, 5, 1) and torch.equal(path[0], x)
        errors.append(float((path[-1] - exact).abs().max()))
    slopes = [math.log2(errors[k] / errors[k + 1]) for k in (0, 1)]
    print(f"{method}: errors {', '.join(f'{e:.1e}' for e in errors)}, slopes {slopes[0]:.2f}, {slopes[1]:.2f}")
    assert all(abs(slope - order) < 0.1 for slope in slopes)


def test_one_step_of_each_method():
    """Euler, Heun and the classical Runge-Kutta step, written out."""
    x, h = torch.tensor([[0.9]], dtype=F64), 0.3

    def f(z):
        return torch.cos(z) ** 2

    k1 = f(x)
    k2 = f(x + h / 2 * k1)
    k3 = f(x + h / 2 * k2)
    k4 = f(x + h * k3)
    expected = {
        "euler": x + h * k1,
        "heun": x + h / 2 * (k1 + f(x + h * k1)),
        "rk4": x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4),
    }
    for method, end in expected.items():
        assert (nl.follow(cosine, x, x, h, 1, method=method)[1] - end).abs().max() < 1e-15


def test_follow_calls_the_field_with_the_data_the_weights_and_the_generator():
    calls = []

    def field(x, y, a=None, b=None, generator=None):
        calls.append((x.clone(), y, a, b, generator))
        return torch.ones_like(x)

    x, y, g = torch.zeros(3, 2), torch.ones(4, 2), seeded(0)
    a, b = torch.full((3,), 1 / 3), torch.full((4,), 0.25)
    path = nl.follow(field, x, y, 0.5, 3, a=a, b=b, generator=g)
    assert torch.equal(path, torch.arange(4)[:, None, None] * 0.5 * torch.ones(4, 3, 2))
    assert len(calls) == 3
    assert all(c[1] is y and c[2] is a and c[3] is b and c[4] is g for c in calls)
    assert torch.equal(calls[2][0], torch.full((3, 2), 1.0))
    assert not x.any(), "the start is left alone"


def test_stop_below():
    """The path ends at the first position whose root mean square speed is below the bound."""
    y = torch.zeros(1, 2, dtype=F64)
    x = normal(6, 2, seed=1)

    def field(x, y):
        return y - x

    path = nl.follow(field, x, y, 0.5, 100, stop_below=1e-3)
    speeds = [float((y - p).square().sum(-1).mean().sqrt()) for p in path]
    assert 5 < len(path) < 30
    assert speeds[-1] < 1e-3 and all(s >= 1e-3 for s in speeds[:-1])
    assert torch.equal(path, nl.follow(field, x, y, 0.5, len(path) - 1))
    assert len(nl.follow(field, x, y, 0.5, 4, stop_below=100.0)) == 1


def test_speed_is_the_length_of_the_velocity():
    """Of one unit in each of nine coordinates: three, not one."""
    x = torch.zeros(4, 9, dtype=F64)
    for bound, length in ((2.999, 4), (3.001, 1)):
        assert len(nl.follow(lambda x, y: torch.ones_like(x), x, x, 0.1, 3, stop_below=bound)) == length


def test_divergence_names_the_step():
    x = torch.full((2, 1), 1e3)

    def field(x, y):
        return 1e4 * x

    with pytest.raises(FloatingPointError, match=r"at step 3 of 10; a smaller step than 1\?"):
        nl.follow(field, x, x, 1.0, 10)


def test_progress_is_off_unless_asked_for(capsys):
    x = torch.ones(2, 1)
    nl.follow(cosine, x, x, 0.1, 3)
    out, err = capsys.readouterr()
    assert out == err == ""
    nl.follow(cosine, x, x, 0.1, 3, progress=True)
    assert "follow" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["euler", "heun", "rk4"])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_flow_is_deterministic_and_arrives(method, dtype, recwarn):
    """Moons from eight Gaussians, twice, bit for bit; the divergence falls; no gradients, no warnings."""
    x = toy.EightGaussians().sample(60, seeded(0), dtype)
    y = toy.Moons().sample(60, seeded(1), dtype).requires_grad_()
    v = nl.fields.Sinkhorn(0.5)
    one, two = (nl.follow(v, x, y, 0.5, 12, method=method) for _ in range(2))
    assert torch.equal(one, two) and one.dtype == dtype and not one.requires_grad
    start, end = (float(nl.sinkhorn_divergence(p, y.detach(), 0.5)) for p in (one[0], one[-1]))
    assert end < 0.02 * start
    assert not recwarn.list


def test_flow_of_a_batch_is_the_flows_of_its_clouds():
    x, y = normal(2, 15, 2, seed=1), normal(2, 18, 2, seed=2) + 1
    v = nl.fields.Sinkhorn(0.5, tol=1e-12)
    together = nl.follow(v, x, y, 0.5, 5, method="heun")
    for k in (0, 1):
        assert (together[:, k] - nl.follow(v, x[k], y[k], 0.5, 5, method="heun")).abs().max() < 1e-9


def test_warm_starts_along_a_path_do_not_change_it():
    """`follow` lends the field a memory; with a field that cannot use one, the path is the same."""
    x, y = normal(30, 2, seed=1), normal(30, 2, seed=2) + 1
    v = nl.fields.Sinkhorn(0.1, tol=1e-11)
    warm, cold = nl.follow(v, x, y, 0.5, 8), nl.follow(lambda x, y: v(x, y), x, y, 0.5, 8)
    assert (warm - cold).abs().max() < 1e-8


def test_flow_of_gaussians():
    """A quantile grid follows the Sinkhorn flow between Gaussians as the closed form, integrated likewise, says."""
    eps, h, steps = 0.5, 0.25, 8
    z = torch.linspace(-7, 7, 141, dtype=F64)[:, None]
    w = torch.exp(-z[:, 0].square() / 2)
    w = w / w.sum()
    path = nl.follow(nl.fields.Sinkhorn(eps, tol=1e-12), z, 1 + z / 2, h, steps, a=w, b=w)
    mean, deviation = 0.0, 1.0
    for _ in range(steps):
        slope = closed_forms.gaussian_map(deviation**2, 0.25, eps) - closed_forms.gaussian_map(
            deviation**2, deviation**2, eps
        )
        mean, deviation = mean + h * (1 - mean), deviation * (1 + h * float(slope))
    assert abs(float(w @ path[-1, :, 0]) - mean) < 1e-9
    assert abs(math.sqrt(float(w @ (path[-1, :, 0] - mean).square())) - deviation) < 1e-9


@pytest.mark.parametrize("device", DEVICES)
def test_flow_on_a_device(device):
    x = toy.Moons().sample(40, seeded(0))
    y = toy.Circles().sample(50, seeded(1))
    there = nl.follow(nl.fields.Sinkhorn(0.5, tol=1e-6), x.to(device), y.to(device), 0.5, 5, method="heun")
    here = nl.follow(nl.fields.Sinkhorn(0.5, tol=1e-10), x.double(), y.double(), 0.5, 5, method="heun")
    assert there.device.type == device and (there.cpu() - here).abs().max() < 1e-3
    exact = nl.fields.Wasserstein()(x.to(device), y.to(device))
    assert exact.device.type == device
    assert abs(metrics.w2(x.to(device), y.to(device)) - metrics.w2(x, y)) < 1e-6
    assert abs(metrics.mmd2(x.to(device), y.to(device), 1.0) - metrics.mmd2(x, y, 1.0)) < 1e-6


def test_exact_plan_against_pot_with_weights():
    x, y = normal(6, 2, seed=1), normal(9, 2, seed=2)
    a, b = torch.rand(6, generator=seeded(3), dtype=F64), torch.rand(9, generator=seeded(4), dtype=F64)
    a, b = a / a.sum(), b / b.sum()
    P = nl.fields.exact_plan(x, y, a, b)
    assert (P.sum(1) - a).abs().max() < 1e-14 and (P.sum(0) - b).abs().max() < 1e-14
    cost = (x[:, None] - y).square().sum(-1)
    assert abs(float((P * cost).sum()) - ot.emd2(a.numpy(), b.numpy(), cost.numpy())) < 1e-12
    assert abs(metrics.w2(x, y, a, b) ** 2 - float((P * cost).sum())) < 1e-12


# Plots --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def plt():
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        yield plt
        plt.close("all")


def test_style(plt):
    from matplotlib.colors import to_hex

    nl.plots.use()
    colours = [nl.plots.BLUE, nl.plots.ORANGE, nl.plots.GREEN, nl.plots.PURPLE, nl.plots.GREY]
    assert plt.rcParams["axes.prop_cycle"].by_key()["color"] == colours
    assert len({to_hex(c) for c in colours}) == 5
    assert plt.rcParams["figure.constrained_layout.use"] and plt.rcParams["svg.hashsalt"] == "nsgf-lite"


def test_cloud_and_arrows_draw_what_they_are_given(plt):
    from matplotlib.colors import to_hex

    figure, ax = plt.subplots()
    x, v = normal(7, 2, seed=1).requires_grad_(), normal(7, 2, seed=2)
    nl.plots.cloud(ax, x, color=nl.plots.ORANGE, label="data")
    (points,) = ax.collections
    assert np.array_equal(points.get_offsets(), x.detach().numpy())
    assert to_hex(points.get_facecolor()[0]) == nl.plots.ORANGE.lower() and points.get_label() == "data"
    assert ax.get_aspect() == 1
    nl.plots.arrows(ax, x, v)
    quiver = ax.collections[1]
    assert np.array_equal(quiver.get_offsets(), x.detach().numpy())
    assert np.array_equal(np.stack([quiver.U, quiver.V], 1), v.numpy())
    assert (quiver.angles, quiver.scale_units, quiver.scale) == ("xy", "xy", 1), "in the units of the axes"


def test_frames(plt):
    """A slider linked in the browser to a stack of pictures, each with its own alt text, none left open."""
    from ipywidgets import IntSlider, Stack
    from ipywidgets.widgets.widget import _instances
    from PIL import Image

    drawn = []

    def draw(value):
        drawn.append(value)
        figure, ax = plt.subplots(figsize=(2, 1))
        ax.bar([0], [value])
        return figure

    box = nl.plots.frames(draw, [0.1, 1.0, 10.0], name="ε", alt='at "ε" = {value:g} < 11')
    slider, stack = box.children
    assert isinstance(slider, IntSlider) and isinstance(stack, Stack)
    assert drawn == [0.1, 1.0, 10.0] and not plt.get_fignums()
    assert (slider.min, slider.max, slider.value, slider.description) == (0, 2, 0, "ε")
    assert stack.selected_index == 0 and len(stack.children) == 3
    links = [w for w in _instances.values() if getattr(w, "source", None) == (slider, "value")]
    assert [w.target for w in links] == [(stack, "selected_index")], "linked in the page, without a kernel"
    pictures = []
    for value, picture in zip(("0.1", "1", "10"), stack.children, strict=True):
        alt, data = re.fullmatch(
            r'<img alt="([^"]*)" src="data:image/png;base64,([^"]*)" style="[^"]*">', picture.value
        ).groups()
        assert alt == f"at &quot;ε&quot; = {value} &lt; 11"
        pictures.append(base64.b64decode(data))
        assert Image.open(io.BytesIO(pictures[-1])).format == "PNG"
    assert len(set(pictures)) == 3
    again = nl.plots.frames(draw, [0.1, 1.0], name="ε", alt="{value}")
    assert again.children[1].children[0].value.split("base64,")[1] == stack.children[0].value.split("base64,")[1]


# Checks -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0.123456, torch.tensor(0.123456), torch.tensor([0.123456]), np.float32(0.123456)])
def test_check_prints_the_claim_and_no_number(value, capsys):
    nl.check("the plan has the right marginals", value, below=0.2, above=0.1)
    out, err = capsys.readouterr()
    assert out == "holds: the plan has the right marginals\n" and err == ""
    assert not re.search(r"\d", out)


@pytest.mark.parametrize(
    ("value", "bounds", "needed"),
    [
        (0.3, {"below": 0.2}, "got 0.3, needed below 0.2"),
        (0.3, {"above": 0.4}, "got 0.3, needed above 0.4"),
        (0.3, {"below": 0.2, "above": 0.1}, "got 0.3, needed above 0.1, below 0.2"),
        (0.2, {"below": 0.2}, "got 0.2, needed below 0.2"),  # bounds are strict
        (0.2, {"above": 0.2}, "got 0.2, needed above 0.2"),
        (float("nan"), {"below": 1.0}, "got nan, needed below 1"),
        (float("nan"), {"above": 1.0}, "got nan, needed above 1"),
        (float("inf"), {"above": 1.0}, "got inf, needed above 1"),
        (-float("inf"), {"below": 1.0}, "got -inf, needed below 1"),
        (torch.tensor(5.0), {"below": 1.0}, "got 5, needed below 1"),
    ],
)
def test_check_raises(value, bounds, needed, capsys):
    with pytest.raises(AssertionError, match=f"^broken: a claim: {re.escape(needed)}$"):
        nl.check("a claim", value, **bounds)
    assert capsys.readouterr().out == ""


def test_scale(monkeypatch):
    monkeypatch.delenv("NSGF_SCALE", raising=False)
    assert nl.scale(10, 1000) == 10
    monkeypatch.setenv("NSGF_SCALE", "full")
    assert nl.scale(10, 1000) == 1000
    monkeypatch.setenv("NSGF_SCALE", "fast")
    assert nl.scale(10, 1000) == 10


def test_public_names():
    assert sorted(nl.__all__) == list(nl.__all__)
    assert all(hasattr(nl, name) for name in nl.__all__)
    assert all(getattr(nl, name).__doc__ for name in nl.__all__)
