"""One test for each theorem of the chapter book/sinkhorn_first_variation.md.

Stricter than the chapter's cells: several seeds and temperatures, unequal weights, clouds of different sizes, float64.
The library's derivatives of the divergence *are* the theorems, coded; so nothing here differentiates it.  Values are
primal, from plans that a plain loop below writes out; derivatives are differences of these values.
"""

import math

import numpy as np
import ot
import pytest
import torch
from conftest import damaged, sharp
from numpy.polynomial.hermite_e import hermegauss

import nsgf_lite as nl

F64 = torch.float64
TOL = 1e-13
ONE = torch.ones(1, dtype=F64)
# A solve that does not converge is a failure here, at once.
pytestmark = pytest.mark.filterwarnings("error::nsgf_lite.ConvergenceWarning")


def points(generator, n, d=2):
    """Points of the open unit ball (R = 1 in every bound below)."""
    z = torch.randn(n, d, generator=generator, dtype=F64)
    return z / (0.3 + z.norm(dim=1, keepdim=True))


def weights(generator, n):
    w = torch.rand(n, generator=generator, dtype=F64) + 0.1
    return w / w.sum()


def problem(seed, n=8, m=11, d=2):
    generator = torch.Generator().manual_seed(seed)
    x, y = points(generator, n, d), points(generator, m, d)
    return x, y, weights(generator, n), weights(generator, m), generator


def on_line(*places):
    return torch.tensor(places, dtype=F64)[:, None]


def two_atoms():
    """The data of the extremal instances: half the mass at each end of the ball."""
    return on_line(-1.0, 1.0), torch.tensor([0.5, 0.5], dtype=F64)


def cost(x, y):
    return 0.5 * ((x[:, None, :] - y[None, :, :]) ** 2).sum(-1)


def transform(g, b, c, eps):
    """The soft c-transform: -eps log sum_j b_j exp((g_j - c_ij)/eps)."""
    return -eps * torch.logsumexp((g - c) / eps + b.log(), dim=-1)


def reference(x, y, eps, a, b, sweeps=150):
    """Potentials (f, g) by plain alternation."""
    c, g = cost(x, y), torch.zeros(len(y), dtype=F64)
    for _ in range(sweeps):
        f = transform(g, b, c, eps)
        g = transform(f, a, c.T, eps)
    return transform(g, b, c, eps), g


def reference_self(x, eps, a, sweeps=60):
    c, f = cost(x, x), torch.zeros(len(x), dtype=F64)
    for _ in range(sweeps):
        f = 0.5 * (f + transform(f, a, c, eps))
    return f


def primal(x, y, eps, a, b):
    """The value <P, c> + eps KL(P | a x b) of the plan, written out."""
    f, g = reference(x, y, eps, a, b)
    density = torch.exp((f[:, None] + g - cost(x, y)) / eps)
    P = a[:, None] * density * b
    return (P * cost(x, y)).sum() + eps * torch.special.xlogy(P, density).sum()


def value(x, y, eps, a, b):
    return primal(x, y, eps, a, b) - (primal(x, x, eps, a, a) + primal(y, y, eps, b, b)) / 2


def derivative(F, h=1e-3):
    """dF/dt at zero by central differences, extrapolated once: off by O(h^4)."""
    once, twice = ((F(s) - F(-s)) / (2 * s) for s in (h, 2 * h))
    return (4 * once - twice) / 3


def osc(h):
    return (h.max() - h.min()).item()


def divergence(x, y, eps, a, b):
    return nl.sinkhorn_divergence(x, y, eps, a=a, b=b, tol=TOL)


def both_potentials(z, x, y, eps, a, b):
    """The same two from the library."""
    cross = nl.barycentric_map(x, y, eps, a=a, b=b, tol=TOL)
    own = nl.barycentric_map(x, x, eps, a=a, b=a, tol=TOL)
    return cross.potential(z), own.potential(z)


def velocity(x, y, eps, a=None, b=None, at=None):
    return nl.fields.Sinkhorn(eps=eps, tol=TOL)(x, y, at=at, a=a, b=b)


def order(errors, steps):
    e = torch.tensor([float(e) for e in errors]).log()
    s = torch.tensor(steps).log()
    s = s - s.mean()
    return float((s @ e) / (s @ s))


# thm-potential-continuity ---------------------------------------------------------------


def solved(ball, x, y, eps, a, b):
    """Potentials f, g, h of the theorem and the two maps, on the ball, and f on x; that they are these is checked."""
    towards = nl.barycentric_map(x, y, eps, a=a, b=b, tol=TOL)
    back = nl.barycentric_map(y, x, eps, a=b, b=a, tol=TOL)
    own = nl.barycentric_map(x, x, eps, a=a, b=a, tol=TOL)
    f, g = nl.potentials(x, y, eps, a=a, b=b, tol=TOL)
    assert osc(transform(f, a, cost(ball, x), eps) - back.potential(ball)) < 1e-10
    assert osc(transform(back.potential(y), b, cost(x, y), eps) - f) < 1e-10
    h = own.potential(x)
    assert (transform(h, a, cost(ball, x), eps) - own.potential(ball)).abs().max() < 1e-10
    return [p.potential(ball) for p in (towards, back, own)], [towards(ball), own(ball)], g


def ratios(ball, old, new, y, eps, b, tv, w1):
    """How much of each bound is used: one half step, the three potentials, the two maps."""
    kappa, M = math.tanh(1 / eps), math.exp(4 / eps)
    delta = min(eps * (M - 1) * tv, 2 * M * w1)
    (f0, g0, h0), (T0, U0), g = solved(ball, *old[:1], y, eps, old[1], b)
    (f1, g1, h1), (T1, U1), _ = solved(ball, *new[:1], y, eps, new[1], b)
    f_old, f_new = (transform(g, b, cost(x, y), eps) for x in (old[0], new[0]))  # one function, at both clouds
    half = transform(f_new, new[1], cost(ball, new[0]), eps) - transform(f_old, old[1], cost(ball, old[0]), eps)
    moved = [osc(f1 - f0), osc(g1 - g0), osc(h1 - h0)]
    self_bound = moved[2] / (2 * eps) + M * (1 + 4 / eps) * w1
    used = {
        "half": float(half.abs().max()) / delta,
        "f": moved[0] / (2 * kappa / (1 - kappa**2) * delta),
        "g": moved[1] / (2 / (1 - kappa**2) * delta),
        "self": moved[2] / (2 / (1 - kappa) * delta),
        "map": float((T1 - T0).norm(dim=1).max()) / (moved[1] / (2 * eps)),
        "self map": float((U1 - U0).norm(dim=1).max()) / self_bound,
    }
    return used, moved, self_bound


def check_bounds(seed, eps):
    x, y, a, b, generator = problem(seed)
    ball = torch.cat([points(generator, 60), x, y])
    # Mass is moved: total variation; the change is linear in t.
    other, moves = weights(generator, len(x)), {}
    for t in (0.1, 0.05):
        mixed = (1 - t) * a + t * other
        tv = 0.5 * (mixed - a).abs().sum().item()
        used, moves[t], _ = ratios(ball, (x, a), (x, mixed), y, eps, b, tv, 2 * tv)  # W_1 <= the diameter times TV
        assert max(used.values()) <= 1
    for big, small in zip(moves[0.1], moves[0.05], strict=True):
        assert small / big == pytest.approx(0.5, abs=0.05)
    # Points are moved: TV is one however small the step, W_1 is not.
    shift = 0.01 * points(generator, len(x))
    used, moved, _ = ratios(ball, (x, a), (x + shift, a), y, eps, b, 1.0, (a @ shift.norm(dim=1)).item())
    assert max(used.values()) <= 1
    damaged("after one half step f rests", moved[0] < 1e-6)


def check_extremal(eps):
    """One atom, moved from end to end or a little: the constants cannot be a third of what they are."""
    ball, (pm, half) = torch.linspace(-1, 1, 41, dtype=F64)[:, None], two_atoms()
    across, w1, tv = ((on_line(-1.0), ONE), (on_line(1.0), ONE)), 2.0, 1.0
    used, _, _ = ratios(ball, *across, pm, eps, half, tv, w1)
    for name in ("f", "g", "self", "self map"):
        sharp(used[name], 1)
    near = ((on_line(0.0), ONE), (on_line(0.01), ONE))
    used, moved, self_bound = ratios(ball, *near, pm, eps, half, 1.0, 0.01)
    for name in ("f", "g", "map"):
        sharp(used[name], 1, at_least=1 / 3 if name != "map" else 0.99)
    damaged("the self map moves with its potential only", self_bound * used["self map"] <= moved[2] / (2 * eps))
    for pair, tv, w1 in ((across, 1.0, 2.0), (near, 1.0, 0.01)):  # all data at one end: both forms of Delta are reached
        used, _, _ = ratios(ball, *pair, on_line(1.0), eps, ONE, tv, w1)
        sharp(used["half"], 1, at_least=0.6)


@pytest.mark.parametrize(
    ("claim", "setting"),
    [(check_bounds, (s, eps)) for s in range(2) for eps in (0.8, 3.0)] + [(check_extremal, (eps,)) for eps in (20, 50)],
)
def test_thm_potential_continuity(claim, setting):
    """Potentials of both problems, seen to solve the equations written out, and what they moved by.

    Checked by: definition.
    """
    claim(*setting)


# thm-first-variation --------------------------------------------------------------------


def check_quotients(seed, eps):
    x, y, a, b, generator = problem(seed, n=9, m=7)
    # The first three points have no mass under mu, and get some.
    a = torch.cat([torch.zeros(3, dtype=F64), weights(generator, 6)])
    chi = weights(generator, 9) - a
    tv = 0.5 * chi.abs().sum()
    cross, own = both_potentials(x, x, y, eps, a, b)
    base = value(x, y, eps, a, b)
    assert abs(base - divergence(x, y, eps, a, b)) < 1e-10
    slope = chi @ (cross - own)

    steps = [2.0**-k for k in range(4, 9)]
    rises = [value(x, y, eps, a + t * chi, b) - base for t in steps]
    errors = [r / t - slope for r, t in zip(rises, steps, strict=True)]
    assert abs(order(errors, steps) - 1) < 0.1
    extrapolated = 2 * rises[-1] / steps[-1] - rises[-2] / steps[-2]
    assert abs(extrapolated - slope) < 5e-2 * errors[-1] + 1e-9
    # The remainder has a sign, and a bound.
    bound = eps * (math.exp(6 / eps) - math.exp(2 / eps)) * tv**2
    assert all(0 < e <= bound * t for e, t in zip(errors, steps, strict=True))
    # Mass exchanged between two of the points that have some: two-sided differences, to many digits; and autograd.
    mass = a.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(divergence(x, y, eps, mass, b), mass)
    for j in (4, 8):
        swap = torch.zeros(9, dtype=F64)
        swap[3], swap[j] = 1.0, -1.0
        slope_j = derivative(lambda t, swap=swap: value(x, y, eps, a + t * swap, b), 2e-3)
        assert abs(slope_j - swap @ (cross - own)) < 1e-6
        assert abs(slope_j - swap @ gradient) < 1e-6
    # The sandwich of the cross term, at large steps.
    for t in (1.0, 0.3):
        now = a + t * chi
        rise = primal(x, y, eps, now, b) - primal(x, y, eps, a, b)
        later = both_potentials(x, x, y, eps, now, b)
        assert t * (chi @ cross) < rise < t * (chi @ later[0])
        # The self term's, where both marginals move.
        rise = primal(x, x, eps, now, now) - primal(x, x, eps, a, a)
        E, E_t = (torch.exp((h[:, None] + h - cost(x, x)) / eps) for h in (own, later[1]))
        low = 2 * t * (chi @ own) - eps * t**2 * (chi @ E @ chi)
        high = 2 * t * (chi @ later[1]) + eps * t**2 * (chi @ E_t @ chi)
        assert low < rise < high
    for name, wrong in (("half a self term", chi @ (cross - 0.5 * own)), ("no self term", chi @ cross)):
        damaged(name, abs(extrapolated - wrong) < 20 * abs(extrapolated - slope))
    damaged("the other potential's slope", abs(extrapolated + slope) < 0.1 * abs(slope))


def check_extremal_masses(eps):
    """All mass from one end to the other: at large eps the remainder is half of the bound."""
    ends = on_line(-1.0, 1.0)
    b, data, t = ONE, on_line(0.3), 0.5

    def masses(s):
        return torch.tensor([1 - s, s], dtype=F64)

    cross, own = both_potentials(ends, on_line(-1.0), data, eps, ONE, b)
    slope = (cross - own)[1] - (cross - own)[0]
    rest = value(ends, data, eps, masses(t), b) - value(on_line(-1.0), data, eps, ONE, b) - t * slope
    sharp(rest, eps * (math.exp(6 / eps) - math.exp(2 / eps)) * t**2)
    damaged("F is concave in the mass", rest <= 0)


@pytest.mark.parametrize(
    ("claim", "setting"),
    [(check_quotients, (s, eps)) for s in range(2) for eps in (0.3, 1.0, 4.0)] + [(check_extremal_masses, (30,))],
)
def test_thm_first_variation(claim, setting):
    """Differences of the primal value in the masses, against the library's potentials.

    Checked by: finite differences, primal value.
    """
    claim(*setting)


# thm-sinkhorn-velocity ------------------------------------------------------------------


def check_clouds(d, eps):
    x, y, a, b, generator = problem(d, n=8, m=11, d=d)
    away = torch.cat([points(generator, 5, d), 100 * points(generator, 5, d)])
    v, off = velocity(x, y, eps, a, b), velocity(x, y, eps, a, b, at=away)

    # On samples: minus the derivative of the primal value, divided by the weight; two particles may share a place.
    def along(field, x, a, i):
        u = torch.zeros_like(x)
        u[i] = points(generator, 1, d)[0]
        slope = derivative(lambda t: value(x + t * u, y, eps, a, b))
        return -slope / a[i], field[i] @ u[i]

    moving = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(divergence(moving, y, eps, a, b), moving)
    for i in (0, 2, 5):
        for field in (v, -gradient / a[:, None]):  # the library's field, and its derivative of the divergence
            measured, claimed = along(field, x, a, i)
            assert abs(measured - claimed) < 1e-8
    double, twice = x.clone(), torch.full((8,), 1 / 8, dtype=F64)
    double[1] = double[0]
    measured, claimed = along(velocity(double, y, eps, twice, b), double, twice, 1)
    assert abs(measured - claimed) < 1e-8
    # The test has teeth: the field of potentials cut off after one step has not this slope.
    with pytest.warns(nl.ConvergenceWarning):
        cut = (
            nl.barycentric_map(x, y, eps, a, b, tol=TOL, max_iter=1)()
            - nl.barycentric_map(x, x, eps, a, a, tol=TOL, max_iter=1)()
        )
    worst = max(abs(float(m - c)) for m, c in (along(cut, x, a, i) for i in (0, 2, 5)))
    damaged("the solver may stop after one step", worst < 1e-4)
    # Anywhere: minus the gradient of the first variation that the plain loop gives.
    g, own = reference(x, y, eps, a, b)[1], reference_self(x, eps, a)

    def first_variation(z):
        return transform(g, b, cost(z, y), eps) - transform(own, a, cost(z, x), eps)

    for k, e in enumerate(torch.eye(d, dtype=F64)):
        slopes = derivative(lambda t, e=e: first_variation(away[:5] + t * e))
        assert (slopes + off[:5, k]).abs().max() < 1e-8
    # Never faster than 2R, however far; the mean.
    assert torch.cat([v, off]).norm(dim=1).max() <= 2
    assert (a @ v - (b @ y - a @ x)).norm() < 1e-10
    # The Jacobian, by differences of the field: symmetric, and between its bounds.
    h = 1e-4
    J = torch.stack([(velocity(x, y, eps, a, b, at=away[:1] + h * e) - velocity(x, y, eps, a, b, at=away[:1] - h * e))
                     [0] / (2 * h) for e in torch.eye(d, dtype=F64)])  # fmt: skip
    assert (J - J.T).abs().max() < 1e-6
    assert torch.linalg.eigvalsh((J + J.T) / 2).abs().max() <= 1 / eps
    # At the target nothing moves; without its self term it would.
    assert velocity(y, y.clone(), eps, b, b).abs().max() < 1e-9
    damaged("no self term", (nl.barycentric_map(y, y, eps, b, b, tol=TOL)() - y).norm() < 0.01)
    measured, claimed = along(v, x, a, 2)
    damaged("-n dS/dx for unequal weights", abs(8 * a[2] * measured - claimed) < 1e-3 * abs(claimed))


def check_another_library(eps):
    """The same differences, with POT's plan."""
    x, y, a, b, generator = problem(3)

    def cost_of(x, y, a, b):
        C = ot.dist(x.numpy(), y.numpy()) / 2
        P = ot.sinkhorn(a.numpy(), b.numpy(), C, reg=eps, stopThr=1e-14, numItermax=20_000)
        return (P * C).sum() + eps * (P * np.log(P / np.outer(a, b))).sum()

    u = points(generator, len(x))
    slope = derivative(lambda t: cost_of(x + t * u, y, a, b) - cost_of(x + t * u, x + t * u, a, a) / 2)
    assert abs(slope + a @ (velocity(x, y, eps, a, b) * u).sum(1)) < 1e-8


def check_gaussians(d):
    """A density instead of a cloud: the closed form, on Gauss-Hermite nodes."""
    nodes, w = map(torch.from_numpy, hermegauss(24 if d == 1 else 9))
    w = w / w.sum()
    axes = torch.cartesian_prod(*[nodes] * d).reshape(-1, d)
    mass = torch.cartesian_prod(*[w] * d).reshape(-1, d).prod(1)
    generator = torch.Generator().manual_seed(d)
    roots = [0.5 * torch.eye(d, dtype=F64) + 0.1 * torch.randn(d, d, generator=generator, dtype=F64) for _ in range(2)]
    A, B = (r @ r.T for r in roots)
    A, B = (A + A.T) / 2, (B + B.T) / 2
    shift = torch.full((d,), 0.3, dtype=F64)
    x, y = axes @ roots[0].T, axes @ roots[1].T + shift
    closed = nl.closed_forms.gaussian_velocity([0.0] * d, A, shift, B, eps=2.0)
    z = 0.5 * torch.randn(4, d, generator=generator, dtype=F64)
    assert (velocity(x, y, 2.0, mass, mass.clone(), at=z) - closed(z)).abs().max() < 1e-5


def check_extremal_speed(eps):
    """One particle at each end has the speed 2R; two atoms seen from the middle have the slope R^2/eps."""
    sharp(velocity(on_line(1.0), on_line(-1.0), eps).norm(), 2, at_least=0.999)
    pm, half = two_atoms()
    slope = derivative(lambda t: velocity(on_line(0.0), pm, eps, ONE, half, at=on_line(t))[0, 0])
    sharp(slope, 1 / eps, at_least=0.999)


@pytest.mark.parametrize(
    ("claim", "setting"),
    [(check_clouds, (d, eps)) for d in (1, 2, 5) for eps in (0.3, 2.0)]
    + [(check_gaussians, (1,)), (check_gaussians, (3,))]
    + [(f, (eps,)) for f in (check_another_library, check_extremal_speed) for eps in (0.5, 2.0)],
)
def test_thm_sinkhorn_velocity(claim, setting):
    """Differences of primal values, by a plain loop and by POT's plans; for Gaussians the closed form.

    Checked by: finite differences, primal value, another library, closed form.
    """
    claim(*setting)


# thm-frechet-derivative -----------------------------------------------------------------


def frechet_bounds(eps):
    """The constants below and above, for R = 1."""
    s = 1 / eps
    return (3 + 17 * s) / 2 * math.exp(6 * s), (1 + 9 * s) / 2 * math.exp(6 * s)


def check_displacements(seed, eps):
    x, y, a, b, generator = problem(seed)
    x, y = x / 2, y / 2  # room for the displacements within the ball
    x[1] = x[0]  # two particles at one place, which part: Phi is no function of X
    phi = points(generator, len(x)) / 2
    slope = -(a @ (velocity(x, y, eps, a, b) * phi).sum(1))

    def F(t):
        return value(x + t * phi, y, eps, a, b)

    assert abs(derivative(F) - slope) < 1e-9
    steps = [2.0**-k for k in range(3, 8)]
    rests = [F(t) - F(0.0) - t * slope for t in steps]
    assert abs(order([abs(r) / t for r, t in zip(rests, steps, strict=True)], steps) - 1) < 0.15
    central = [abs((F(t) - F(-t)) / (2 * t) - slope) for t in steps]
    assert abs(order(central, steps) - 2) < 0.15
    below, above = (C * phi.norm(dim=1).max() ** 2 for C in frechet_bounds(eps))
    assert all(-below * t**2 <= r <= above * t**2 for r, t in zip(rests, steps, strict=True))
    damaged("the derivative is that of the cost alone",
            abs(derivative(lambda t: primal(x + t * phi, y, eps, a, b)) - slope) < 1e-3)  # fmt: skip


def check_remainders(eps):
    """A translation has the remainder one half of its square; two particles that part, a negative one."""
    shifted, (pm, half) = on_line(0.5), two_atoms()
    for t in (0.5, 0.01):
        rest = value(shifted + t, on_line(0.0), eps, ONE, ONE) - value(shifted, on_line(0.0), eps, ONE, ONE) - t * 0.5
        assert rest == pytest.approx(t**2 / 2, rel=1e-6)
        sharp(rest, frechet_bounds(eps)[1] * t**2)
    damaged("the remainder is of third order", rest <= frechet_bounds(eps)[1] * t**3)
    # On the saddle at 0 there is no slope, and F falls like t^2 / (2 eps): the lower bound is needed, if not so low.
    t = 0.01
    rest = value(t * pm, pm, eps, half, half) - value(on_line(0.0), pm, eps, ONE, half)
    assert rest == pytest.approx(-(t**2) / (2 * eps), rel=1e-3)
    sharp(-rest, frechet_bounds(eps)[0] * t**2, at_least=0.005)
    damaged("F is convex along displacements", rest >= 0)


@pytest.mark.parametrize(
    ("claim", "setting"),
    [(check_displacements, (s, eps)) for s in range(2) for eps in (0.3, 2.0)] + [(check_remainders, (20.0,))],
)
def test_thm_frechet_derivative(claim, setting):
    """Differences of the primal value along displacements, against the library's field.

    Checked by: finite differences, primal value.
    """
    claim(*setting)


# thm-steepest-descent -------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(2))
def test_thm_steepest_descent(seed):
    """Slopes of the primal value along v, along what the paper prints, and along many others.

    Checked by: finite differences, primal value.
    """
    x, y, a, b, generator = problem(seed)
    eps = 0.5

    def slope(phi):
        return float(derivative(lambda t: value(x + t * phi, y, eps, a, b)))

    def unit(phi):
        return phi / (a @ phi.square().sum(1)).sqrt()

    v = velocity(x, y, eps, a, b)
    length, mean_speed = float((a @ v.square().sum(1)).sqrt()), float(a @ v.norm(dim=1))
    best = slope(unit(v))
    assert best == pytest.approx(-length, abs=1e-8)
    for scale in (0.05, 0.3, 3.0):
        other = unit(v / length + scale * torch.randn(v.shape, generator=generator, dtype=F64))
        assert slope(other) > best + 1e-6
    # The printed direction climbs, at the rate of the L1 norm; turned round it is less steep than v.
    printed = -v / v.norm(dim=1, keepdim=True)
    assert slope(printed) == pytest.approx(mean_speed, abs=1e-8)
    damaged("the printed direction descends", slope(printed) < 0)
    damaged("normalised at each point it is as steep", mean_speed >= length - 1e-3)
    sharp(mean_speed, length)
    # But it is the steepest among fields of speed at most one everywhere.
    signs = torch.randn(v.shape, generator=generator, dtype=F64)
    assert slope(signs / signs.norm(dim=1, keepdim=True)) > -mean_speed
    # Of one speed everywhere, the two are one: a translated cloud.
    v = velocity(y + 0.1, y, eps, b, b)
    sharp(b @ v.norm(dim=1), (b @ v.square().sum(1)).sqrt(), at_least=1 - 1e-9)


# thm-descent ----------------------------------------------------------------------------


def check_books(seed, eps):
    x, y, a, b, _ = problem(seed)
    step, steps = 0.1, 8
    field = nl.fields.Sinkhorn(eps=eps, tol=1e-12)
    path = nl.follow(field, x, y, step=step, steps=steps, method="rk4", a=a, b=b)
    F = torch.stack([value(p, y, eps, a, b) for p in path])
    speed2 = torch.stack([a @ field(p, y, a=a, b=b).square().sum(1) for p in path])
    assert (F[1:] < F[:-1]).all()
    # Simpson's rule for the dissipation, over all and over parts.
    for k in (4, 8):
        w = torch.tensor([1.0] + [4.0, 2.0] * (k // 2 - 1) + [4.0, 1.0], dtype=F64)
        spent = step / 3 * (w @ speed2[: k + 1])
        assert abs((F[0] - F[k]) / spent - 1) < 1e-4
    # The mean decays like e^{-t}, and nobody leaves the ball of the theorem.
    gap = [a @ path[k] - b @ y for k in (0, steps)]
    assert (gap[1] - math.exp(-steps * step) * gap[0]).norm() < 1e-7
    t = step * torch.arange(steps + 1, dtype=F64)
    assert (path.norm(dim=2).amax(1) <= (x.norm(dim=1).max() + 1) * t.exp() - 1 + 1e-9).all()
    # Total dissipation is at most F at the start.
    assert step * speed2[1:].sum() < F[0]

    # With half a self term the books do not balance.
    def half(p, y, a, b):
        cross, own = (nl.barycentric_map(p, z, eps, a, w, tol=1e-12)() for z, w in ((y, b), (p, a)))
        return cross - own / 2 - p / 2

    path = nl.follow(half, x, y, step=step, steps=2, method="rk4", a=a, b=b)
    speed2 = torch.stack([a @ half(p, y, a, b).square().sum(1) for p in path])
    spent = step / 3 * (speed2[0] + 4 * speed2[1] + speed2[2])
    damaged("half a self term", abs((F[0] - value(path[-1], y, eps, a, b)) / spent - 1) < 0.01)


def check_extremal_flow():
    """One particle and one goal: all of F is spent. A crumb opposite its crowd and beside its goal runs outward."""
    field = nl.fields.Sinkhorn(eps=20.0, tol=1e-12)
    path = nl.follow(field, on_line(1.0), on_line(-1.0), 0.1, 30, method="rk4")[:, 0, 0]
    w = torch.tensor([1.0] + [4.0, 2.0] * 14 + [4.0, 1.0], dtype=F64)
    sharp(0.1 / 3 * w @ (path + 1) ** 2, 2, at_least=0.99)
    crowd, mass = on_line(-1.0, 1.0), torch.tensor([0.999, 0.001], dtype=F64)
    path = nl.follow(field, crowd, on_line(1.0), 0.05, 4, method="rk4", a=mass)[:, 1, 0]
    t = 0.2
    sharp(path[-1] - 1, 2 * (math.exp(t) - 1))
    damaged("nobody leaves the ball of cloud and target", path[-1] <= 1)


@pytest.mark.parametrize(
    ("claim", "setting"), [(check_books, (0, 0.3)), (check_books, (1, 1.0)), (check_extremal_flow, ())]
)
def test_thm_descent(claim, setting):
    """Particles followed by the library; the drop of the primal value, against the integral of the squared speed.

    Checked by: simulation, primal value.
    """
    claim(*setting)


# thm-stationarity -----------------------------------------------------------------------


@pytest.mark.parametrize("eps", [0.1, 0.5])
def test_thm_stationarity(eps):
    """Values and fields of many pairs on a grid, of which none rests; clouds that rest, hypothesis by hypothesis.

    Checked by: primal value, brute force.
    """
    generator = torch.Generator().manual_seed(7)
    grid = torch.linspace(-1, 1, 41, dtype=F64)[:, None]

    def density():
        c, s = torch.rand(2, 2, 1, generator=generator, dtype=F64)
        w = torch.exp(-((grid.T - 2 * c + 1) ** 2) / (0.05 + s**2)).sum(0)
        return w / w.sum()

    for k in range(6):
        # Ever nearer to the target, but never there.
        a, other = density(), density()
        b = (1 - 0.5**k) * a + 0.5**k * other
        F = value(grid, grid, eps, a, b)
        cross, own = both_potentials(grid, grid, grid.clone(), eps, a, b)
        delta = cross - own
        v = velocity(grid, grid.clone(), eps, a, b)[:, 0]
        first_order = (a - b) @ delta
        assert F > 0
        assert F <= first_order
        # The potential's total change is the integral of the velocity.
        w1 = (a - b).cumsum(0).abs().sum() * (grid[1] - grid[0])
        assert first_order <= v.abs().max() * w1 * (1 + 1e-2)
        assert osc(delta) >= F / (0.5 * (a - b).abs().sum())
        # On a measure with (nearly) full support the cloud itself moves: its dissipation is of the order of F.
        assert (a @ v**2) > 0.3 * F
    # Two atoms: F = d^2/2, the middle and the last term are d^2.
    one, other = on_line(-1.0), on_line(1.0)
    ends = torch.cat([one, other])
    cross, own = both_potentials(ends, one, other, eps, ONE, ONE)
    middle = (cross - own)[0] - (cross - own)[1]
    sharp(value(one, other, eps, ONE, ONE), middle)
    sharp(middle, velocity(one, other, eps, at=grid).norm(dim=1).max() * 2, at_least=0.99)
    # Without a density, in the plane: an infinite support, and no motion. On the line: a single point.
    flat = torch.stack([grid[:, 0], torch.zeros(41, dtype=F64)], 1)
    up = torch.tensor([0.0, 0.5], dtype=F64)
    copies = torch.cat([flat + up, flat - up])
    a, b = (torch.full((n,), 1 / n, dtype=F64) for n in (41, 82))
    assert value(flat, copies, eps, a, b) > 0.01
    damaged("a singular law in the plane rests at its target only", velocity(flat, copies, eps).abs().max() > 1e-7)
    point, (pm, half) = on_line(0.0), two_atoms()
    assert value(point, pm, eps, ONE, half) > 0.01
    damaged("one point on the line does", velocity(point, pm, eps).abs().max() > 1e-12)
    # The first variation is not the same on both supports, and the blurred segment moves.
    cross, own = both_potentials(torch.cat([flat, copies]), flat, copies, eps, a, b)
    assert osc(cross - own) > 0.01
    thick = torch.cat([flat + s * up for s in (-0.4, -0.2, 0.0, 0.2, 0.4)])
    assert velocity(thick, copies, eps).square().sum(1).mean().sqrt() > 0.05


# thm-stall ------------------------------------------------------------------------------


def check_a_point(d, eps):
    _, y, _, b, generator = problem(d, d=d)
    mean = (b @ y)[None]
    assert velocity(mean, y, eps, ONE, b).abs().max() < 1e-12
    assert divergence(mean, y, eps, ONE, b) > 0.01
    # The field about it: an exponentially tilted mean of the target.
    z = points(generator, 6, d)
    tilted = torch.softmax((z - mean) @ (y - mean).T / eps + b.log(), -1) @ (y - mean)
    assert (velocity(mean, y, eps, ONE, b, at=z) - tilted).abs().max() < 1e-9
    # A lone particle, moved, returns at rate one, though the field about it repels.
    assert (velocity(z[:1], y, eps, ONE, b) - (mean - z[:1])).abs().max() < 1e-10
    damaged("the field about the point attracts", ((z - mean) * tilted).sum(1).max() < 0)
    damaged("any other point rests too", velocity(z[:1], y, eps, ONE, b).abs().max() < 1e-3)


def check_two_atoms(eps):
    zero, (atoms, half) = on_line(0.0), two_atoms()
    z = torch.linspace(-1.5, 1.5, 7, dtype=F64)[:, None]
    assert (velocity(zero, atoms, eps, at=z) - torch.tanh(z / eps)).abs().max() < 1e-9
    formula = 0.5 + eps / 2 * math.log((1 + math.exp(-2 / eps)) / 2)
    assert abs(divergence(zero, atoms, eps, None, None) - formula) < 1e-11
    assert abs(value(zero, atoms, eps, ONE, half) - formula) < 1e-11
    damaged("the value is one half", abs(divergence(zero, atoms, eps, None, None) - 0.5) < 0.01)


def check_a_hyperplane(d, eps):
    generator = torch.Generator().manual_seed(10 * d)
    base, a = points(generator, 6, d - 1), weights(generator, 6)
    heights, r = torch.tensor([-0.8, 0.1, 0.6], dtype=F64), weights(generator, 3)
    heights = heights - r @ heights
    x = torch.cat([base, torch.zeros(6, 1, dtype=F64)], 1)
    y = torch.cat([base.repeat_interleave(3, 0), heights.repeat(6)[:, None]], 1)
    b = (a[:, None] * r).reshape(-1)
    # On the plane nothing moves; off it the motion is vertical, and known.
    z = points(generator, 6, d)
    v = velocity(x, y, eps, a, b, at=torch.cat([x, z]))
    assert v[:6].abs().max() < 1e-9
    vertical = torch.softmax(z[:, -1:] * heights / eps + r.log(), -1) @ heights
    assert v[6:, :-1].abs().max() < 1e-9
    assert (v[6:, -1] - vertical).abs().max() < 1e-9
    # The divergence is that of the heights alone.
    rest = value(on_line(0.0), heights[:, None], eps, ONE, r)
    assert abs(divergence(x, y, eps, a, b) - rest) < 1e-10
    assert rest > 0.01
    damaged("heights of any mean", velocity(x, y + 0.1, eps, a, b).abs().max() < 1e-3)
    tilted = (b * torch.linspace(0.5, 1.5, len(b), dtype=F64)) / (b @ torch.linspace(0.5, 1.5, len(b), dtype=F64))
    damaged("a target that is no product", velocity(x, y, eps, a, tilted).abs().max() < 1e-3)


def check_instability(seed, eps=0.5, h=1e-4, n=4):
    _, y, _, b, generator = problem(seed)
    a, mean = weights(generator, n), b @ y

    def speeds(offsets):
        return velocity(mean + offsets.reshape(n, 2), y, eps, a, b).reshape(-1)

    J = torch.stack([(speeds(h * e) - speeds(-h * e)) / (2 * h) for e in torch.eye(2 * n, dtype=F64)], 1)
    cov = (b[:, None] * (y - mean)).T @ (y - mean)
    # The whole matrix, not just its spectrum.
    spread = torch.eye(n, dtype=F64) - a.expand(n, n)

    def linear(rate):
        return torch.kron(spread, cov * rate) - torch.kron(a.expand(n, n).contiguous(), torch.eye(2, dtype=F64))

    assert (J - linear(1 / eps)).abs().max() < 1e-5
    damaged("differences die at these rates", (J - linear(-1 / eps)).abs().max() < 0.01)
    damaged("or grow at rates without 1/eps", (J - linear(1.0)).abs().max() < 0.01)


@pytest.mark.parametrize(
    ("claim", "setting"),
    [(check_a_point, (d, eps)) for d in (1, 2, 3) for eps in (0.2, 1.0)]
    + [(check_two_atoms, (eps,)) for eps in (0.2, 0.5, 2.0)]
    + [(check_a_hyperplane, (d, eps)) for d in (2, 3) for eps in (0.2, 1.0)]
    + [(check_instability, (0,)), (check_instability, (1,))],
)
def test_thm_stall(claim, setting):
    """The library's field and divergence against tilted means, products and primal values.

    Checked by: closed form, primal value, finite differences.
    """
    claim(*setting)
