"""One test for each theorem of the chapter book/sinkhorn_first_variation.md.

Stricter than the chapter's cells: several seeds and temperatures, unequal
weights, clouds of different sizes, float64.  The reference solver below is
a plain log-domain Sinkhorn loop that shares no code with the library.
"""

import math

import pytest
import torch
from geomloss import SamplesLoss
from numpy.polynomial.hermite_e import hermegauss

import nsgf_lite as nl

F64 = torch.float64
TOL = 1e-13
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


def reference_value(x, y, eps, a, b):
    f, g = reference(x, y, eps, a, b)
    own = a @ reference_self(x, eps, a) + b @ reference_self(y, eps, b)
    return a @ f + b @ g - own


def reference_velocity(z, x, y, eps, a, b):
    _, g = reference(x, y, eps, a, b)
    towards = torch.softmax((g - cost(z, y)) / eps + b.log(), -1) @ y
    f = reference_self(x, eps, a)
    return towards - torch.softmax((f - cost(z, x)) / eps + a.log(), -1) @ x


def osc(h):
    return (h.max() - h.min()).item()


def divergence(x, y, eps, a, b):
    return nl.sinkhorn_divergence(x, y, eps, a=a, b=b, tol=TOL)


def both_potentials(z, x, y, eps, a, b):
    """The two potentials whose difference is the first variation, at z."""
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


@pytest.mark.parametrize("eps", [0.8, 3.0])
@pytest.mark.parametrize("seed", range(2))
def test_thm_potential_continuity(seed, eps):
    x, y, a, b, generator = problem(seed)
    ball = torch.cat([points(generator, 60), x, y])
    kappa, M = math.tanh(1 / eps), math.exp(4 / eps)

    def solve(x, a):
        towards = nl.barycentric_map(x, y, eps, a=a, b=b, tol=TOL)
        back = nl.barycentric_map(y, x, eps, a=b, b=a, tol=TOL)
        own = nl.barycentric_map(x, x, eps, a=a, b=a, tol=TOL)
        f, _ = nl.potentials(x, y, eps, a=a, b=b, tol=TOL)
        # These are the potentials of the theorem: they solve the equations.
        g_ball = transform(f, a, cost(ball, x), eps)
        assert osc(g_ball - back.potential(ball)) < 1e-10
        f_x = transform(back.potential(y), b, cost(x, y), eps)
        assert osc(f_x - f) < 1e-10
        h = own.potential(x)
        assert (transform(h, a, cost(ball, x), eps) - own.potential(ball)).abs().max() < 1e-10
        return [p.potential(ball) for p in (towards, back, own)], [towards(ball), own(ball)], f

    def verify(new, old, delta, w1, half_step):
        (f1, g1, h1), (T1, U1), _ = new
        (f0, g0, h0), (T0, U0), _ = old
        assert half_step <= delta
        moved = [osc(f1 - f0), osc(g1 - g0), osc(h1 - h0)]
        assert moved[0] <= 2 * kappa / (1 - kappa**2) * delta
        assert moved[1] <= 2 / (1 - kappa**2) * delta
        assert moved[2] <= 2 / (1 - kappa) * delta
        assert (T1 - T0).norm(dim=1).max() <= 2 / eps * moved[1] + 1e-11
        slack = M * (1 + 4 / eps) * w1
        assert (U1 - U0).norm(dim=1).max() <= 2 / eps * moved[2] + slack
        # One half step is not the whole story: f moves as well.
        assert moved[0] > 1e-6
        return moved

    old = solve(x, a)
    f = old[2]
    # Mass is moved: total variation; the change is linear in t.
    other, moved = weights(generator, len(x)), {}
    for t in (0.1, 0.05):
        mixed = (1 - t) * a + t * other
        tv = 0.5 * (mixed - a).abs().sum().item()
        half = transform(f, mixed, cost(ball, x), eps) - transform(f, a, cost(ball, x), eps)
        w1 = 2 * tv  # the diameter times TV is an upper bound
        moved[t] = verify(solve(x, mixed), old, eps * (M - 1) * tv, w1, half.abs().max())
    for big, small in zip(moved[0.1], moved[0.05], strict=True):
        assert small / big == pytest.approx(0.5, abs=0.05)
    # Points are moved: TV is one however small the step, W_1 is not.
    shift = 0.01 * points(generator, len(x))
    w1 = (a @ shift.norm(dim=1)).item()
    f_there = transform(nl.potentials(x, y, eps, a=a, b=b, tol=TOL).g, b, cost(x + shift, y), eps)
    f_here = transform(nl.potentials(x, y, eps, a=a, b=b, tol=TOL).g, b, cost(x, y), eps)
    half = transform(f_there, a, cost(ball, x + shift), eps) - transform(f_here, a, cost(ball, x), eps)
    verify(solve(x + shift, a), old, 2 * M * w1, w1, half.abs().max())


# thm-first-variation --------------------------------------------------------------------


@pytest.mark.parametrize("eps", [0.3, 1.0, 4.0])
@pytest.mark.parametrize("seed", range(2))
def test_thm_first_variation(seed, eps):
    x, y, a, b, generator = problem(seed, n=9, m=7)
    # The first three points have no mass under mu, and get some.
    a = torch.cat([torch.zeros(3, dtype=F64), weights(generator, 6)])
    chi = weights(generator, 9) - a
    tv = 0.5 * chi.abs().sum()
    cross, own = both_potentials(x, x, y, eps, a, b)
    base = divergence(x, y, eps, a, b)
    assert abs(base - reference_value(x, y, eps, a, b)) < 1e-10
    slope = chi @ (cross - own)

    steps = [2.0**-k for k in range(4, 9)]
    rises = [divergence(x, y, eps, a + t * chi, b) - base for t in steps]
    errors = [abs(r / t - slope) for r, t in zip(rises, steps, strict=True)]
    assert abs(order(errors, steps) - 1) < 0.1
    extrapolated = 2 * rises[-1] / steps[-1] - rises[-2] / steps[-2]
    assert abs(extrapolated - slope) < 5e-2 * errors[-1] + 1e-9
    bound = 5 * eps * math.exp(6 / eps) * tv**2
    assert all(e <= bound * t for e, t in zip(errors, steps, strict=True))
    # F is convex, so the remainder has a sign.
    assert all(r > t * slope for r, t in zip(rises, steps, strict=True))

    # Automatic differentiation in the weights gives the same function, up to a constant.
    mass = a.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(divergence(x, y, eps, mass, b), mass)
    assert osc(gradient - (cross - own)) < 1e-10

    # The sandwich of the cross term, at large steps.
    for t in (1.0, 0.3):
        now = a + t * chi
        rise = nl.entropic_cost(x, y, eps, a=now, b=b, tol=TOL) - nl.entropic_cost(x, y, eps, a=a, b=b, tol=TOL)
        later = both_potentials(x, x, y, eps, now, b)
        assert t * (chi @ cross) < rise < t * (chi @ later[0])
        # The self term's, where both marginals move.
        rise = nl.entropic_cost(x, x, eps, a=now, b=now, tol=TOL) - nl.entropic_cost(x, x, eps, a=a, b=a, tol=TOL)
        E, E_t = (torch.exp((h[:, None] + h - cost(x, x)) / eps) for h in (own, later[1]))
        low = 2 * t * (chi @ own) - eps * t**2 * (chi @ E @ chi)
        high = 2 * t * (chi @ later[1]) + eps * t**2 * (chi @ E_t @ chi)
        assert low < rise < high

    # Half a self term, or none, is not the derivative.
    for wrong in (chi @ (cross - 0.5 * own), chi @ cross):
        assert abs(extrapolated - wrong) > 20 * abs(extrapolated - slope)


# thm-sinkhorn-velocity ------------------------------------------------------------------


def check_clouds(d, eps):
    x, y, a, b, generator = problem(d, n=8, m=11, d=d)
    z = torch.cat([x, points(generator, 5, d), 100 * points(generator, 5, d)])
    v = velocity(x, y, eps, a, b, at=z)
    # The difference of the two averages, by a solver that is not ours.
    assert (v - reference_velocity(z, x, y, eps, a, b)).abs().max() < 1e-9
    # Minus the gradient of the first variation, anywhere.
    points_ = z[:13].clone().requires_grad_()
    cross, own = both_potentials(points_, x, y, eps, a, b)
    (gradient,) = torch.autograd.grad((cross - own).sum(), points_)
    assert (v[:13] + gradient).abs().max() < 1e-10
    # Minus the gradient of S on samples, divided by the weight.
    moving = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(divergence(moving, y, eps, a, b), moving)
    assert (velocity(x, y, eps, a, b) + gradient / a[:, None]).abs().max() < 1e-9
    moving = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(divergence(moving, y, eps, None, None), moving)
    assert (velocity(x, y, eps) + len(x) * gradient).abs().max() < 1e-9
    # And by finite differences of the reference value.
    h = 1e-4
    e = torch.zeros_like(x)
    e[2, 0] = h
    quotient = (reference_value(x + e, y, eps, a, b) - reference_value(x - e, y, eps, a, b)) / (2 * h)
    assert abs(-quotient / a[2] - v[2, 0]) < 1e-6
    # Never faster than 2R; the mean; the Jacobian.
    assert v.norm(dim=1).max() <= 2
    assert (a @ v[:8] - (b @ y - a @ x)).norm() < 1e-10
    J = torch.autograd.functional.jacobian(lambda p: velocity(x, y, eps, a, b, at=p[None])[0], z[0])
    assert (J - J.T).abs().max() < 1e-10
    assert torch.linalg.eigvalsh(J).abs().max() <= 1 / eps
    # At the target nothing moves.
    assert velocity(y, y.clone(), eps, b, b).abs().max() < 1e-9


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


def check_geomloss():
    """An independent implementation, pushed towards convergence."""
    x, y, _, _, _ = problem(5, n=40, m=30)
    v, off = velocity(x, y, 0.1), []
    for scaling in (0.5, 0.8, 0.95, 0.99):
        z = x.clone().requires_grad_()
        loss = SamplesLoss("sinkhorn", p=2, blur=0.1**0.5, scaling=scaling, debias=True, backend="tensorized")
        (gradient,) = torch.autograd.grad(loss(z, y), z)
        off.append(float((-len(x) * gradient - v).norm() / v.norm()))
    assert off[3] < off[2] < off[1] < off[0]
    assert off[3] < 0.05


@pytest.mark.parametrize(
    ("claim", "setting"),
    [(check_clouds, (d, eps)) for d in (1, 2, 5) for eps in (0.3, 2.0)]
    + [(check_gaussians, (1,)), (check_gaussians, (3,)), (check_geomloss, ())],
)
def test_thm_sinkhorn_velocity(claim, setting):
    claim(*setting)


# thm-frechet-derivative -----------------------------------------------------------------


@pytest.mark.parametrize("eps", [0.3, 2.0])
@pytest.mark.parametrize("seed", range(2))
def test_thm_frechet_derivative(seed, eps):
    x, y, a, b, generator = problem(seed)
    x, y = x / 2, y / 2  # room for the displacements within the ball
    x[1] = x[0]  # two particles at one place, which part: Phi is no function of X
    phi = points(generator, len(x)) / 2
    derivative = -(a @ (velocity(x, y, eps, a, b) * phi).sum(1))

    def F(t):
        return divergence(x + t * phi, y, eps, a, b)

    assert abs(F(0.1) - reference_value(x + 0.1 * phi, y, eps, a, b)) < 1e-10
    steps = [2.0**-k for k in range(3, 8)]
    one_sided = [abs((F(t) - F(0.0)) / t - derivative) for t in steps]
    central = [abs((F(t) - F(-t)) / (2 * t) - derivative) for t in steps]
    assert abs(order(one_sided, steps) - 1) < 0.15
    assert abs(order(central, steps) - 2) < 0.15
    assert central[-1] < 1e-4
    C = 23 * (1 + 1 / eps) * math.exp(6 / eps) * phi.norm(dim=1).max() ** 2
    assert all(e <= C * t for e, t in zip(one_sided, steps, strict=True))
    # By the gradients of the two potentials, as the theorem has it.
    z = x.clone().requires_grad_()
    cross, own = both_potentials(z, x, y, eps, a, b)
    (gradient,) = torch.autograd.grad((cross - own).sum(), z)
    assert abs(a @ (gradient * phi).sum(1) - derivative) < 1e-10


# thm-steepest-descent -------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(2))
def test_thm_steepest_descent(seed):
    x, y, a, b, generator = problem(seed)
    eps, h = 0.5, 1e-4

    def slope(phi):
        up, down = (divergence(x + s * h * phi, y, eps, a, b) for s in (1, -1))
        return float((up - down) / (2 * h))

    def unit(phi):
        return phi / (a @ phi.square().sum(1)).sqrt()

    v = velocity(x, y, eps, a, b)
    length, mean_speed = float((a @ v.square().sum(1)).sqrt()), float(a @ v.norm(dim=1))
    best = slope(unit(v))
    assert best == pytest.approx(-length, abs=1e-6)
    for scale in (0.05, 0.3, 3.0):
        other = unit(v / length + scale * torch.randn(v.shape, generator=generator, dtype=F64))
        assert slope(other) > best + 1e-6
    # The printed direction climbs, at the rate of the L1 norm; turned round it is less steep than v.
    printed = -v / v.norm(dim=1, keepdim=True)
    assert slope(printed) == pytest.approx(mean_speed, abs=1e-6)
    assert mean_speed < length - 1e-3
    # But it is the steepest among fields of speed at most one everywhere.
    signs = torch.randn(v.shape, generator=generator, dtype=F64)
    assert slope(signs / signs.norm(dim=1, keepdim=True)) > -mean_speed


# thm-descent ----------------------------------------------------------------------------


@pytest.mark.parametrize(("seed", "eps"), [(0, 0.3), (1, 1.0)])
def test_thm_descent(seed, eps):
    x, y, a, b, _ = problem(seed)
    step, steps = 0.1, 8
    field = nl.fields.Sinkhorn(eps=eps, tol=1e-12)
    path = nl.follow(field, x, y, step=step, steps=steps, method="rk4", a=a, b=b)
    F = torch.stack([divergence(p, y, eps, a, b) for p in path])
    speed2 = torch.stack([a @ field(p, y, a=a, b=b).square().sum(1) for p in path])
    assert (F[1:] < F[:-1]).all()
    # Simpson's rule for the dissipation, over all and over parts.
    for k in (4, 8):
        w = torch.tensor([1.0] + [4.0, 2.0] * (k // 2 - 1) + [4.0, 1.0], dtype=F64)
        spent = step / 3 * (w @ speed2[: k + 1])
        assert abs((F[0] - F[k]) / spent - 1) < 1e-4
    assert abs(F[-1] - reference_value(path[-1], y, eps, a, b)) < 1e-9
    # The mean decays like e^{-t}, and nobody leaves the ball of the theorem.
    gap = [a @ path[k] - b @ y for k in (0, steps)]
    assert (gap[1] - math.exp(-steps * step) * gap[0]).norm() < 1e-7
    t = step * torch.arange(steps + 1, dtype=F64)
    assert (path.norm(dim=2).amax(1) <= (x.norm(dim=1).max() + 1) * t.exp() - 1 + 1e-9).all()
    # Total dissipation is at most F at the start.
    assert step * speed2[1:].sum() < F[0]


# thm-stationarity -----------------------------------------------------------------------


@pytest.mark.parametrize("eps", [0.1, 0.5])
def test_thm_stationarity(eps):
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
        F = divergence(grid, grid.clone(), eps, a, b)
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
        # On a measure with (nearly) full support the cloud itself moves.
        assert (a @ v**2).sqrt() > 0.3 * F
    v = velocity(grid, grid.clone(), eps, a, a.clone())
    cross, own = both_potentials(grid, grid, grid.clone(), eps, a, a.clone())
    assert v.abs().max() < 1e-8
    assert osc(cross - own) < 1e-8
    # In the plane: the field that rests on a segment does not rest on a blurred one.
    flat = torch.stack([grid[:, 0], torch.zeros(41, dtype=F64)], 1)
    up = torch.tensor([0.0, 0.5], dtype=F64)
    copies = torch.cat([flat + up, flat - up])
    thick = torch.cat([flat + s * up for s in (-0.4, -0.2, 0.0, 0.2, 0.4)])
    assert velocity(flat, copies, eps).abs().max() < 1e-7
    rms = velocity(thick, copies, eps).square().sum(1).mean().sqrt()
    assert rms > 0.05


# thm-stall ------------------------------------------------------------------------------


def check_a_point(d, eps):
    _, y, _, b, generator = problem(d, d=d)
    mean = (b @ y)[None]
    one = torch.ones(1, dtype=F64)
    assert velocity(mean, y, eps, one, b).abs().max() < 1e-12
    assert divergence(mean, y, eps, one, b) > 0.01
    # The field about it: an exponentially tilted mean of the target.
    z = points(generator, 6, d)
    tilted = torch.softmax((z - mean) @ (y - mean).T / eps + b.log(), -1) @ (y - mean)
    assert (velocity(mean, y, eps, one, b, at=z) - tilted).abs().max() < 1e-9
    # A lone particle, moved, returns at rate one.
    assert (velocity(z[:1], y, eps, one, b) - (mean - z[:1])).abs().max() < 1e-10


def check_two_atoms(eps):
    zero, atoms = torch.zeros(1, 1, dtype=F64), torch.tensor([[-1.0], [1.0]], dtype=F64)
    z = torch.linspace(-1.5, 1.5, 7, dtype=F64)[:, None]
    assert (velocity(zero, atoms, eps, at=z) - torch.tanh(z / eps)).abs().max() < 1e-9
    value = 0.5 + eps / 2 * math.log((1 + math.exp(-2 / eps)) / 2)
    assert abs(divergence(zero, atoms, eps, None, None) - value) < 1e-11


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
    zero, one = torch.zeros(1, 1, dtype=F64), torch.ones(1, dtype=F64)
    rest = divergence(zero, heights[:, None], eps, one, r)
    assert abs(divergence(x, y, eps, a, b) - rest) < 1e-10
    assert rest > 0.01


def check_instability(seed, eps=0.5, h=1e-4, n=4):
    _, y, _, b, generator = problem(seed)
    a, mean = weights(generator, n), b @ y

    def speeds(offsets):
        return velocity(mean + offsets.reshape(n, 2), y, eps, a, b).reshape(-1)

    J = torch.stack([(speeds(h * e) - speeds(-h * e)) / (2 * h) for e in torch.eye(2 * n, dtype=F64)], 1)
    cov = (b[:, None] * (y - mean)).T @ (y - mean)
    # The whole matrix, not just its spectrum.
    spread = torch.eye(n, dtype=F64) - a.expand(n, n)
    claim = torch.kron(spread, cov / eps) - torch.kron(a.expand(n, n).contiguous(), torch.eye(2, dtype=F64))
    assert (J - claim).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("claim", "setting"),
    [(check_a_point, (d, eps)) for d in (1, 2, 3) for eps in (0.2, 1.0)]
    + [(check_two_atoms, (eps,)) for eps in (0.2, 0.5, 2.0)]
    + [(check_a_hyperplane, (d, eps)) for d in (2, 3) for eps in (0.2, 1.0)]
    + [(check_instability, (0,)), (check_instability, (1,))],
)
def test_thm_stall(claim, setting):
    claim(*setting)
