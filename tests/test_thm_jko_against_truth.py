"""One test for each theorem of the chapter book/jko_against_truth.md.

Steps are minimised here by SciPy among maps of a kind, moments are drawn here; closed forms and laws are the library.
"""

import math

import numpy as np
import pytest
import torch
from conftest import damaged, sharp
from scipy.integrate import quad
from scipy.optimize import minimize
from scipy.special import betainc
from scipy.stats import chi2

import nsgf_lite as nl
from nsgf_lite.closed_forms import barenblatt, barenblatt_radius, jko_barenblatt
from nsgf_lite.metrics import sampled_kl, symmetric_kl, symmetric_kl_floor
from nsgf_lite.targets import Barenblatt

F64 = torch.float64


# thm-symmetric-floor --------------------------------------------------------------------


def scores(n, d, runs, m, root, b, B, chance):
    """Symmetric divergence of the moments of samples of N(m, root root^T) from N(b, B), one for each run."""
    x = m + torch.randn(runs, n, d, generator=chance, dtype=F64) @ root.T
    mean = x.mean(1)
    S = (x - mean[:, None]).transpose(1, 2) @ (x - mean[:, None]) / (n - 1)
    inverse, precision, delta = torch.linalg.inv(S), torch.linalg.inv(B), (mean - b)[:, :, None]
    traces = (precision @ S + inverse @ B).diagonal(dim1=1, dim2=2).sum(1) - 2 * d
    values = (traces + (delta.transpose(1, 2) @ (precision + inverse) @ delta)[:, 0, 0]) / 2
    for k in range(5):
        assert abs(symmetric_kl(mean[k], S[k], b, B) - float(values[k])) < 1e-9 * (1 + float(values[k]))
    return values


@pytest.mark.parametrize(("n", "d"), [(7, 1), (40, 1), (11, 2), (12, 3)])
def test_thm_symmetric_floor(n, d):
    """Many samples of one law, drawn and compared; on the line the mean of one over chi squared.

    Checked by: simulation, quadrature.
    """
    chance, runs = torch.Generator().manual_seed(10 * n + d), 40_000
    root = torch.randn(d, d, generator=chance, dtype=F64) + 2 * torch.eye(d, dtype=F64)
    b, B = torch.arange(d, dtype=F64), root @ root.T
    values = scores(n, d, runs, b, root, b, B, chance)
    claim, mean, error = symmetric_kl_floor(n, d), float(values.mean()), float(values.std()) / runs**0.5
    assert abs(mean - claim) < 4 * error < 0.05 * claim
    sharp(mean, claim + 4 * error, at_least=0.9)
    damaged("without the mean's part", abs(mean - claim * (d + 1) / (d + 3)) < 4 * error)
    if n < 20:
        damaged("only the limit of many points", abs(mean - d * (d + 3) / (2 * n)) < 4 * error)
    if d == 1:
        # the sample's variance is chi squared over its freedoms, and independent of the mean
        inverse = quad(lambda u: (n - 1) / u * chi2.pdf(u, n - 1), 0, np.inf)[0]
        assert abs((1 + inverse - 2 + (1 + inverse) / n) / 2 - claim) < 1e-9
    # an imperfect law scores more than its distance, by nearly the floor
    m, S = b + root.sum(1) / d**0.5, 1.5 * B
    off = scores(n, d, runs, m, math.sqrt(1.5) * root, b, B, chance)
    c, precision, delta = (n - 1) / (n - d - 2), torch.linalg.inv(S), m - b
    more = (c - 1) * float((precision @ B).trace() + delta @ precision @ delta)
    more = (more + float((torch.linalg.inv(B) @ S).trace()) / n + c * d / n) / 2
    excess, error = float(off.mean()) - symmetric_kl(m, S, b, B), float(off.std()) / runs**0.5
    assert abs(excess - more) < 4 * error
    damaged("the shift adds nothing", abs(excess - more + (c - 1) * float(delta @ precision @ delta) / 2) < 4 * error)
    damaged("as much as a perfect law", abs(excess - claim) < 4 * error)
    if d == 1:
        # the least number of points, and infinite below: the mean of the inverse grows without bound near zero
        inverse = quad(lambda u: 3 / u * chi2.pdf(u, 3), 0, np.inf)[0]
        assert abs((1 + inverse - 2 + (1 + inverse) / 4) / 2 - symmetric_kl_floor(4, 1)) < 1e-9
        for freedoms in (1, 2):
            near = [quad(lambda u: chi2.pdf(u, freedoms) / u, cut, 1)[0] for cut in (1e-2, 1e-4, 1e-6)]  # noqa: B023
            assert near[2] - near[1] > 0.99 * (near[1] - near[0]) > 1
    for few in (d + 2, 1):
        with pytest.raises(ValueError, match="n must be at least d"):
            symmetric_kl_floor(few, d)


# thm-jko-barenblatt ---------------------------------------------------------------------


def profile_radius(t, d, m):
    """Of a profile of mass one that spreads by the equation, from its height: both by quadrature."""
    alpha = d / (d * (m - 1) + 2)
    sphere = 2 * math.pi ** (d / 2) / math.gamma(d / 2)
    beta = (m - 1) * alpha / (2 * m * d)
    mass = sphere * quad(lambda r: r ** (d - 1) * max(1 - beta * r * r, 0) ** (1 / (m - 1)), 0, beta**-0.5)[0]
    C = mass ** (-1 / (1 / (m - 1) + d / 2))
    return math.sqrt(C / beta) * t ** (alpha / d)


def radial_step(t, a, d, m, cells=400):
    """A JKO step of a radial law by minimising over the radii of its shells, which may go anywhere in their order.

    Returns the radius of the outermost shell over its old one, and the spread of that ratio among the shells.
    """
    R, sphere = profile_radius(t, d, m), math.pi ** (d / 2) / math.gamma(d / 2 + 1)
    edges = np.linspace(0, R, cells + 1)[1:]
    inner = np.concatenate([[0.0], edges[:-1]])
    top = float(barenblatt(t, torch.zeros(1, d, dtype=F64), m))
    density = [
        quad(lambda r: d * r ** (d - 1) * top * max(1 - (r / R) ** 2, 0) ** (1 / (m - 1)), i, e)[0]
        for i, e in zip(inner, edges, strict=True)
    ]
    mass = np.array(density) * sphere
    middle = (inner + edges) / 2

    def objective(gaps):
        """Logarithms of the gaps between the shells' edges: transport of the middles, and the energy of the shells."""
        width = np.exp(gaps)
        new = np.cumsum(width)
        low = np.concatenate([[0.0], new[:-1]])
        move = (low + new) / 2 - middle
        volume = sphere * (new**d - low**d)
        energy = mass**m * volume ** (1 - m) / (m - 1)
        value = (mass @ move**2) / (2 * a) + energy.sum()
        by_volume = -(mass**m) * volume**-m
        by_new = mass * move / (2 * a) + by_volume * sphere * d * new ** (d - 1)
        by_low = mass * move / (2 * a) - by_volume * sphere * d * low ** (d - 1)
        edge = by_new.copy()
        edge[:-1] += by_low[1:]
        return value, np.cumsum(edge[::-1])[::-1] * width

    start = np.log(np.diff(np.concatenate([[0.0], edges])))
    options = {"maxiter": 20_000, "maxfun": 40_000, "ftol": 1e-15, "gtol": 1e-12}
    found = minimize(objective, start, jac=True, method="L-BFGS-B", options=options)
    ratio = np.cumsum(np.exp(found.x)) / edges
    core = ratio[cells // 10 : -cells // 10]
    return float(np.median(core)), float(core.max() - core.min())


def w2_to_point(t, d, m):
    """Root of the second moment, by quadrature of the density."""
    R = profile_radius(t, d, m)
    sphere = 2 * math.pi ** (d / 2) / math.gamma(d / 2)
    top = float(barenblatt(t, torch.zeros(1, d, dtype=F64), m))
    square = quad(lambda r: sphere * r ** (d + 1) * top * max(1 - (r / R) ** 2, 0) ** (1 / (m - 1)), 0, R)[0]
    return math.sqrt(square)


@pytest.mark.parametrize(("d", "m"), [(1, 2.0), (1, 3.0), (2, 2.0), (3, 1.5)])
def test_thm_jko_barenblatt(d, m):
    """A step among all maps that keep the order of the radii, by quasi-Newton; ages added up; masses by quadrature.

    Checked by: brute force, quadrature, finite differences.
    """
    gamma = 1 / (d * (m - 1) + 2)
    for t, a in ((1.0, 0.5), (0.3, 2.0)):
        s = jko_barenblatt(t, a, d, m)
        ratio, spread = radial_step(t, a, d, m)
        assert abs(ratio / (s / t) ** gamma - 1) < 2e-3 and spread < 5e-3
        explicit = 1 + a * gamma / t
        damaged("an explicit step of the radius", abs(ratio / explicit - 1) < 2e-3)
        damaged("the flow itself", abs(ratio / ((t + a) / t) ** gamma - 1) < 2e-3)
        # optimality, by differences: the energy of a ball's profile against the square of the way
        M = w2_to_point(s, d, m) ** 2
        assert abs(bend(s, t, a, d, m)) < 1e-4 * M / a
        damaged("a hundredth older", abs(bend(1.01 * s, t, a, d, m)) < 1e-4 * M / a)
    # the delay
    for t, a in ((1e-3, 5e-4), (1.0, 1e-3), (0.01, 0.3)):
        age, steps = t, 50
        for k in range(1, steps + 1):
            before, age = age, jko_barenblatt(age, a, d, m)
            assert before < age < before + a
            late, most = t + k * a - age, (1 - gamma) * a / 2 * math.log(age / t)
            assert 0 < late <= most
        if a < 0.01 * t:
            sharp(late, most, at_least=0.98)
            damaged("half of it", late <= most / 2)
        if age > 3 * t:
            damaged("without the logarithm", late <= (1 - gamma) * a / 2)
    # the distance in W_2, and the mass that the older law has outside of the younger one's ball
    s, t = 0.8, 1.0
    inner, outer = barenblatt_radius(s, d, m), barenblatt_radius(t, d, m)
    law, chance = Barenblatt(d, t, m), torch.Generator().manual_seed(d)
    x = law.sample(200_000, chance, F64)
    share = (s / t) ** gamma
    assert abs(inner / outer - share) < 1e-12
    sphere, top = 2 * math.pi ** (d / 2) / math.gamma(d / 2), float(barenblatt(t, torch.zeros(1, d, dtype=F64), m))
    rim = quad(lambda r: r ** (d - 1) * max(1 - (r / outer) ** 2, 0) ** (1 / (m - 1)), inner, outer)[0]
    assert abs(1 - betainc(d / 2, m / (m - 1), share**2) - sphere * top * rim) < 1e-9
    damaged("the radii's ratio for its square", abs(1 - betainc(d / 2, m / (m - 1), share) - sphere * top * rim) < 1e-3)
    back = sampled_kl(law.log_density(x), Barenblatt(d, s, m).log_density(x))[0]
    assert back == math.inf
    y = x[:2000]
    assert abs(nl.metrics.w2(y, share * y) - (1 - share) * float(y.square().sum(1).mean().sqrt())) < 1e-6
    gap = w2_to_point(t, d, m) - w2_to_point(s, d, m)
    assert abs(gap - (t**gamma - s**gamma) * w2_to_point(1.0, d, m)) < 1e-7


def bend(s, t, a, d, m):
    """Slope in log s of the JKO step's objective among the profiles, by a central difference."""

    def objective(age):
        return barenblatt_energy(age, d, m) + (w2_to_point(age, d, m) - w2_to_point(t, d, m)) ** 2 / (2 * a)

    return (objective(s * (1 + 1e-5)) - objective(s * (1 - 1e-5))) / 2e-5


def barenblatt_energy(t, d, m):
    R = profile_radius(t, d, m)
    sphere = 2 * math.pi ** (d / 2) / math.gamma(d / 2)
    top = float(barenblatt(t, torch.zeros(1, d, dtype=F64), m))
    power = m / (m - 1)
    return sphere * top**m / (m - 1) * quad(lambda r: r ** (d - 1) * max(1 - (r / R) ** 2, 0) ** power, 0, R)[0]
