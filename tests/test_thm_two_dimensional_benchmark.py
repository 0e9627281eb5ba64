"""Theorems of the chapter on the benchmark in the plane: the floor, the shrunk generator, geometric approach."""

import itertools
import math

import pytest
import torch
from conftest import damaged, sharp

import nsgf_lite as nl

F64 = torch.float64


def scores(made, test):
    """Root mean square over tries of W_2 between clouds (tries, n, d), by the library."""
    return torch.tensor([nl.metrics.w2(x, y) for x, y in zip(made, test, strict=True)]).square().mean().sqrt()


def normal(seed, tries, n, d):
    return torch.randn(tries, n, d, generator=torch.Generator().manual_seed(seed), dtype=F64)


def matched(x, y):
    """Squared W_2 of two clouds (n, d), over all permutations."""
    n = len(x)
    return min(float((x - y[list(p)]).square().sum()) / n for p in itertools.permutations(range(n)))


def every_sample(law, n):
    """All samples of n points of a law with equally likely atoms (k, d), each as likely as any other."""
    return [law[list(pick)] for pick in itertools.product(range(len(law)), repeat=n)]


def mean_square(one, other):
    """Mean squared W_2 over all pairs of two lists of equally likely samples."""
    return sum(matched(x, y) for x in one for y in other) / (len(one) * len(other))


# thm-floor ------------------------------------------------------------------------------


def check_gaussians(d, shift, scale):
    """Scores of Gaussian samples against the closed form of the distance of their laws."""
    n, tries = 12, 150
    y, twin, z = normal(0, tries, n, d), normal(1, tries, n, d), normal(2, tries, n, d)
    floor, score = scores(twin, y), scores(scale * z + shift, y)
    true = (d * shift**2 + d * (scale - 1) ** 2) ** 0.5
    assert score > true
    sharp(score, true + floor)
    # on one and the same draw the pairing of the proof costs exactly W_2, and the triangle inequality holds every time
    for one, other in zip(z[:20], y[:20], strict=True):
        paired = nl.metrics.w2(scale * one + shift, one)
        assert nl.metrics.w2(scale * one + shift, other) <= paired + nl.metrics.w2(one, other) + 1e-9
    damaged("no floor on the right", score <= true)
    damaged("half the floor on the right", true == 0 and score <= true + floor / 2)
    # The left side bites where the distance is long: a far shift scores hardly more than its length.
    sharp(4.0 * d**0.5, scores(z + 4.0, y), at_least=0.9)


def check_two_points():
    """Two-point laws, where every sample can be listed; and what fails without independence."""
    law, other = torch.tensor([[-1.0], [1.0]], dtype=F64), torch.tensor([[-1.0], [2.0]], dtype=F64)
    for n in (1, 2, 3):
        test, made, twin = every_sample(law, n), every_sample(other, n), every_sample(law, n)
        score, floor = mean_square(made, test) ** 0.5, mean_square(twin, test) ** 0.5
        true = matched(other, law) ** 0.5
        sharp(true, score)
        sharp(score, true + floor)
        # the library scores the same clouds alike
        assert nl.metrics.w2(made[1], test[-1]) ** 2 == pytest.approx(matched(made[1], test[-1]))
    # One point, and the generated one is minus the test point: each has the right law, but they are not independent.
    floor = mean_square(every_sample(law, 1), every_sample(law, 1)) ** 0.5
    against = (sum(matched(-y, y) for y in every_sample(law, 1)) / 2) ** 0.5
    damaged("samples may depend on one another", against <= 0 + floor)


@pytest.mark.parametrize(
    ("claim", "setting"),
    [(check_gaussians, setting) for setting in ((1, 0.5, 1.0), (2, 0.0, 1.6), (3, 0.7, 0.5), (2, 0.0, 1.0))]
    + [(check_two_points, ())],
)
def test_thm_floor(claim, setting):
    """Gaussian samples against the distance of their laws; two-point laws with all samples and all permutations.

    Checked by: closed form, brute force.
    """
    claim(*setting)


# thm-shrinking-pays ---------------------------------------------------------------------


@pytest.mark.parametrize("s", [0.0, 0.4, 0.9, 1.3])
@pytest.mark.parametrize("d", [1, 2])
def test_thm_shrinking_pays(d, s):
    """The formula on laws of three atoms, every sample listed and matched by trying all permutations.

    Checked by: brute force, simulation.
    """
    law = normal(7 + d, 1, 3, d)[0]
    law = law - law.mean(0)
    M = float(law.square().sum(1).mean())
    for n in (1, 2):
        plain = every_sample(law, n)
        f2, score2 = mean_square(plain, plain), mean_square([s * x for x in plain], plain)
        assert score2 == pytest.approx((1 - s) ** 2 * M + s * f2, abs=1e-12)
        sharp(f2, 2 * M)
        best = 1 - f2 / (2 * M)
        least = mean_square([best * x for x in plain], plain)
        assert least == pytest.approx(f2 * (1 - f2 / (4 * M)), abs=1e-12)
        assert least < f2
        if s not in (0.0, 1.0):
            damaged("without the factor s", abs(score2 - (1 - s) ** 2 * M - f2) < 1e-3)
            damaged("the factor squared", abs(score2 - (1 - s) ** 2 * M - s**2 * f2) < 1e-3)
        damaged("f^2 at most M", n == 1 and f2 <= M)
        damaged("none scores less than the right law", least >= f2)
    # the library's distance obeys it outcome by outcome, before means are taken
    for x, y in zip(normal(3, 20, 9, d), normal(4, 20, 9, d), strict=True):
        squares = x.square().sum(1).mean(), y.square().sum(1).mean()
        c = (squares[0] + squares[1] - nl.metrics.w2(x, y) ** 2) / 2
        claim = s**2 * squares[0] + squares[1] - 2 * s * c
        assert nl.metrics.w2(s * x, y) ** 2 == pytest.approx(float(claim), abs=1e-12)
        turned = nl.metrics.w2(-x, y) ** 2
        damaged("also for s < 0", abs(turned - float(squares[0] + squares[1] + 2 * c)) < 1e-6)


# thm-geometric-approach -----------------------------------------------------------------


def check_approach(eta):
    """Particles that follow the library's exact field, measured by trying all permutations."""
    for seed in range(3):
        x, y = normal(10 + seed, 1, 6, 2)[0], normal(20 + seed, 1, 6, 2)[0] * 2 + 1
        path = nl.follow(nl.fields.Wasserstein(), x, y, step=eta, steps=4)
        start = matched(x, y) ** 0.5
        for k, cloud in enumerate(path):
            assert matched(cloud, y) ** 0.5 == pytest.approx((1 - eta) ** k * start, rel=1e-9, abs=1e-7)
        partner = min(itertools.permutations(range(6)), key=lambda p: float((x - y[list(p)]).square().sum()))
        goal = y[list(partner)]
        torch.testing.assert_close(path[-1], goal + (1 - eta) ** 4 * (x - goal), rtol=0, atol=1e-9)
        if eta < 1:
            damaged("e^(-eta) a step", abs(matched(path[1], y) ** 0.5 / start - math.exp(-eta)) < 1e-3)
        # a matching that is not optimal is not kept
        wrong = goal.roll(1, 0)
        left = matched(x + eta * (wrong - x), y) ** 0.5
        if eta < 1:
            damaged("from any matching", abs(left / ((1 - eta) * float((x - wrong).norm()) / 6**0.5) - 1) < 1e-3)
    # one point against one: no matching to keep
    x, y = normal(1, 1, 1, 2)[0], normal(2, 1, 1, 2)[0]
    last = nl.follow(nl.fields.Wasserstein(), x, y, step=eta, steps=3)[-1]
    torch.testing.assert_close(last - y, (1 - eta) ** 3 * (x - y), rtol=0, atol=1e-12)


def check_needs():
    """A step beyond one, and clouds of different sizes."""
    x, y = torch.tensor([[0.0], [4.0]], dtype=F64), torch.tensor([[1.9], [2.1]], dtype=F64)
    leap = nl.follow(nl.fields.Wasserstein(), x, y, step=1.6, steps=1)[-1]
    damaged("beyond a step of one", abs(matched(leap, y) ** 0.5 - 0.6 * matched(x, y) ** 0.5) < 0.1)
    # one particle, two data: its velocity leads to their mean, and the distance stays half of theirs
    alone = nl.follow(nl.fields.Wasserstein(), x[:1], y, step=0.5, steps=40)[-1]
    assert float(alone) == pytest.approx(2.0, abs=1e-9)
    damaged("clouds of different sizes", float((alone - y).square().mean()) ** 0.5 < 0.09)


@pytest.mark.parametrize(
    ("claim", "setting"), [(check_approach, (eta,)) for eta in (0.1, 0.4, 1.0)] + [(check_needs, ())]
)
def test_thm_geometric_approach(claim, setting):
    """Particles that follow the library's exact field, measured by trying all permutations.

    Checked by: brute force.
    """
    claim(*setting)
