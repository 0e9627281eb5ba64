"""One test for each theorem of the chapter book/wasserstein_gradient_flows.md.

Stricter than the chapter's cells: several dimensions and seeds, float64.  Energies, velocities and slopes are written
out here; what moves the particles, measures their distance and knows the exact flows is the library.
"""

import math

import pytest
import torch
from conftest import damaged, sharp
from numpy.polynomial.hermite_e import hermegauss
from scipy.optimize import minimize

import nsgf_lite as nl

F64 = torch.float64
NORMAL = torch.distributions.Normal(torch.tensor(0.0, dtype=F64), 1.0)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed):
    return torch.randn(*shape, generator=seeded(seed), dtype=F64)


def positive(d, seed, least=0.3):
    root = normal(d, d, seed=seed)
    return root @ root.T / d + least * torch.eye(d, dtype=F64)


def order(errors, steps):
    e = torch.tensor([float(e) for e in errors]).log()
    s = torch.tensor([float(s) for s in steps]).log()
    s = s - s.mean()
    return float((s @ e) / (s @ s))


def simpson(values, h):
    k = len(values) - 1
    w = torch.tensor([1.0] + [4.0, 2.0] * (k // 2 - 1) + [4.0, 1.0], dtype=F64)
    return h / 3 * (w @ values)


def slope_of(f, z):
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        return torch.autograd.grad(f(z).sum(), z)[0]


def timed(velocity):
    """A field of the state (x, t) from a velocity v(x, t): the time rides along as the last coordinate."""

    def field(state, y, **_):
        x, t = state[:, :-1], float(state[0, -1])
        return torch.cat([velocity(x, t), torch.ones_like(state[:, -1:])], 1)

    return field


def carry(velocity, x, start, end, steps):
    state = torch.cat([x, torch.full((len(x), 1), start, dtype=F64)], 1)
    return nl.follow(timed(velocity), state, state, (end - start) / steps, steps, method="rk4")[-1, :, :-1]


# The energies of the tests: smooth, not convex, with second derivatives below 1 and 2 * SOFT.
SOFT = 0.5


def V_of(x):
    return (1 + x[..., 0] ** 2).sqrt() + 0.2 * torch.cos(2 * x).sum(-1)


def W_of(z):
    return SOFT * torch.exp(-(z**2).sum(-1))


def energy(x, a):
    return a @ V_of(x) + 0.5 * a @ W_of(x[:, None] - x) @ a


def velocity(x, y=None, a=None, **_):
    a = torch.full((len(x),), 1 / len(x), dtype=F64) if a is None else a
    return -slope_of(V_of, x) - (a[:, None] * slope_of(W_of, x[:, None] - x)).sum(1)


def weights(n, seed):
    w = torch.rand(n, generator=seeded(seed), dtype=F64) + 0.1
    return w / w.sum()


# thm-continuity-equation ----------------------------------------------------------------


@pytest.mark.parametrize("d", [1, 2, 3])
def test_thm_continuity_equation(d):
    """Both sides of the weak form, by following and by Simpson's rule; densities, by differences and for Gaussians.

    Checked by: quadrature, finite differences, closed form.
    """
    B = normal(d, d, seed=d)
    x, a = normal(40, d, seed=d + 1), weights(40, d)

    def field(x, y=None, **_):
        return torch.sin(x @ B.T) - 0.3 * x

    def divergence(x):
        return (torch.cos(x @ B.T) * B.diagonal()).sum(-1) - 0.3 * d

    h, steps = 0.02, 40
    path = nl.follow(field, x, x, h, steps, method="rk4", a=a)
    # The weak form, with test functions of compact support.
    for centre in normal(4, d, seed=7):

        def bump(z, centre=centre):
            return (1 - ((z - centre) ** 2).sum(-1) / 9).clamp_min(0) ** 4

        gain = (slope_of(bump, path) * field(path)).sum(-1) @ a
        change = a @ (bump(path[-1]) - bump(path[0]))
        assert abs(change) > 1e-4
        assert abs(change - simpson(gain, h)) < 1e-7
    # The density: the Jacobian of the flow is the exponential of the divergence.
    e = 1e-5 * torch.eye(d, dtype=F64)
    ahead = [[nl.follow(field, x + s * k, x, h, steps, method="rk4")[-1] for s in (1, -1)] for k in e]
    jacobian = torch.stack([(up - down) / 2e-5 for up, down in ahead], -1)
    stretch = simpson(divergence(path), h).exp()
    assert (jacobian.det() / stretch - 1).abs().max() < 1e-6
    damaged("densities are carried along unchanged", (stretch - 1).abs().max() < 0.1)
    damaged("the divergence with the other sign", (jacobian.det() * stretch - 1).abs().max() < 0.1)
    # An affine field carries a Gaussian density to the Gaussian density it should.
    S = positive(d, seed=d)
    flow = torch.linalg.matrix_exp(0.8 * B)
    end = nl.follow(lambda x, y: x @ B.T, x, x, h, steps, method="rk4")[-1]
    start_law = torch.distributions.MultivariateNormal(torch.zeros(d, dtype=F64), S)
    end_law = torch.distributions.MultivariateNormal(torch.zeros(d, dtype=F64), flow @ S @ flow.T)
    assert (end_law.log_prob(end) - start_law.log_prob(x) + 0.8 * B.trace()).abs().max() < 1e-4
    # Growth: at most exponential, and a field of linear growth gets there.
    far = torch.full((1, d), 100.0, dtype=F64)
    grown = nl.follow(lambda x, y: x, far, far, 0.01, 100, method="rk4")[-1]
    sharp(1 + grown.norm(), (1 + far.norm()) * math.e, at_least=0.98)
    # Without a derivative uniqueness fails: v = 2 sqrt|x|, and both delta_0 and delta_{t^2} solve the weak form.
    r = torch.linspace(0, 1, 101, dtype=F64)
    for place, speed in ((0 * r, 0 * r), (r**2, 2 * r)):
        assert (speed - 2 * place.abs().sqrt()).abs().max() < 1e-15
        change = torch.exp(-(place[-1] ** 2)) - torch.exp(-(place[0] ** 2))
        assert abs(change - simpson(-2 * place * torch.exp(-(place**2)) * speed, 0.01)) < 1e-6
    damaged("one solution from delta_0, for any continuous field", (r**2)[-1] < 1e-3)
    # The solution is unique, its velocity is not: add a field that turns a wheel.
    if d == 2:
        angle = 2 * math.pi * torch.arange(16, dtype=F64) / 16
        wheel = torch.stack([angle.cos(), angle.sin()], 1)

        def turn(x, y):
            return torch.stack([-x[:, 1], x[:, 0]], 1) - 0.1 * x

        turned = nl.follow(turn, wheel, wheel, math.pi / 80, 10, method="rk4")[-1]
        straight = nl.follow(lambda x, y: -0.1 * x, wheel, wheel, math.pi / 80, 10, method="rk4")[-1]
        assert (turned - straight).norm(dim=1).min() > 0.3
        assert nl.metrics.w2(turned, straight) < 1e-6


# thm-first-variations -------------------------------------------------------------------


def check_weights(seed):
    """Parts 1 and 2: along mixtures, on the points of a grid, whose cells are a unit of volume du."""
    n, du = 30, 0.1
    grid = du * torch.arange(n, dtype=F64)[:, None]
    rho, sigma = weights(n, seed) / du, weights(n, seed + 10) / du
    rho[:3] = 0  # vacuum
    rho = rho / (rho.sum() * du)
    chi = sigma - rho
    W = W_of(grid[:, None] - grid)

    def interaction(r):
        return 0.5 * r @ W @ r * du**2

    slope = W @ rho * du
    for t in (1.0, 0.3, 1e-3):  # exact to the second order, at any step
        exact = t * chi @ slope * du + t**2 / 2 * chi @ W @ chi * du**2
        assert abs(interaction(rho + t * chi) - interaction(rho) - exact) < 1e-13
    quotient = (interaction(rho + 1e-6 * chi) - interaction(rho)) / 1e-6
    damaged("2 W * mu, as though without the one half", abs(quotient - 2 * chi @ slope * du) < 1e-3)
    lean = W * (1 + 0.5 * torch.tanh(grid - grid.T))  # an interaction that is not even
    quotient = ((rho + 1e-6 * chi) @ lean @ (rho + 1e-6 * chi) - rho @ lean @ rho) * du**2 / 2e-6
    damaged("W * mu for any W", abs(quotient - chi @ lean @ rho * du**2) < 1e-3)
    for m in (1.5, 2.0, 3.0):

        def porous(r, m=m):
            return (r**m).sum() * du / (m - 1)

        slope = m / (m - 1) * chi @ rho ** (m - 1) * du
        quotients = [(porous(rho + t * chi) - porous(rho)) / t for t in (1.0, 0.1, 1e-2, 1e-4, 1e-6)]
        assert all(a > b > slope for a, b in zip(quotients, quotients[1:], strict=False))
        assert abs(quotients[-1] - slope) < 3e-3
        damaged("the energy per mass, U / rho", abs(quotients[-1] - slope / m) < 0.02)
    # The entropy: U'(0) is minus infinity, so the quotients have no bound once vacuum is filled...
    quotients = [float((torch.special.xlogy(r, r) - torch.special.xlogy(rho, rho)).sum() * du / t)
                 for t in (1e-2, 1e-4, 1e-6, 1e-8) for r in (rho + t * chi,)]  # fmt: skip
    fall = float(sigma[:3].sum() * du * math.log(100))
    assert all(abs(a - b - fall) < 0.2 for a, b in zip(quotients, quotients[1:], strict=False))
    # ...and the slope is that of log rho + 1 where there is none.
    chi[:3] = 0
    chi = chi - (chi.sum() / rho.sum()) * rho
    r = rho + 1e-6 * chi
    quotient = (torch.special.xlogy(r, r) - torch.special.xlogy(rho, rho)).sum() * du / 1e-6
    assert abs(quotient - chi[3:] @ (1 + rho[3:].log()) * du) < 1e-4


def check_displacements(d):
    """Part 3, with the library moving the points: one Euler step of length lambda along phi."""
    x, a = normal(12, d, seed=d), weights(12, d)

    def phi(x, y=None, **_):
        return torch.cos(x + 0.3) * torch.exp(-(x**2).sum(-1, keepdim=True) / 8)

    rate = -(a @ (velocity(x, a=a) * phi(x)).sum(1))
    steps = [2.0**-k for k in range(4, 9)]
    moved = [nl.follow(phi, x, x, h, 1)[-1] for h in steps]
    errors = [abs((energy(z, a) - energy(x, a)) / h - rate) for z, h in zip(moved, steps, strict=True)]
    assert errors[-1] < 0.01
    assert abs(order(errors, steps) - 1) < 0.2
    # Internal energies, from a Barenblatt profile, on the line: density rho / (1 + lambda phi') after the step.
    m = 2.0
    grid = torch.linspace(-3, 3, 6001, dtype=F64)[:, None]
    dx = float(grid[1, 0] - grid[0, 0])
    rho = nl.closed_forms.barenblatt(1.0, grid, m)
    jacobian = slope_of(phi, grid)[:, 0]
    pressure = rho**m
    rate = -(pressure * jacobian).sum() * dx
    by_parts = (torch.gradient(pressure, spacing=dx)[0] * phi(grid)[:, 0]).sum() * dx
    by_slope = (rho * torch.gradient(m / (m - 1) * rho ** (m - 1), spacing=dx)[0] * phi(grid)[:, 0]).sum() * dx
    assert abs(rate) > 1e-3
    assert abs(rate - by_parts) < 1e-6
    assert abs(rate - by_slope) < 1e-4
    h = 1e-4
    up, down = ((1 + s * h * jacobian) for s in (1, -1))
    energies = [((rho / j) ** m * j).sum() * dx / (m - 1) for j in (up, down)]
    assert abs((energies[0] - energies[1]) / (2 * h) - rate) < 1e-6
    assert abs(torch.trapezoid(rho, grid[:, 0]) - 1) < 1e-6
    # The profile is the one whose velocity -grad U'(rho) is linear: (alpha / d) x, alpha = 1/3.
    inside = rho > 0.02
    force = -torch.gradient(m / (m - 1) * rho ** (m - 1), spacing=dx)[0]
    assert (force - grid[:, 0] / 3)[inside].abs().max() < 1e-6


@pytest.mark.parametrize(
    ("claim", "setting"), [(check_weights, s) for s in range(2)] + [(check_displacements, d) for d in (1, 2, 3)]
)
def test_thm_first_variations(claim, setting):
    """Energies written out, of masses on a grid and of moved points; their quotients against the slopes.

    Checked by: definition, finite differences.
    """
    claim(setting)


# thm-energy-dissipation -----------------------------------------------------------------


def check_particles(d):
    x, a = normal(15, d, seed=d), weights(15, d)
    path = nl.follow(velocity, x, x, 0.05, 40, method="rk4", a=a)
    F = torch.stack([energy(z, a) for z in path])
    speed2 = torch.stack([a @ (velocity(z, a=a) ** 2).sum(1) for z in path])
    assert (F[1:] < F[:-1]).all()
    for k in (10, 20, 40):
        assert abs((F[0] - F[k]) / simpson(speed2[: k + 1], 0.05) - 1) < 1e-5
    # Enough is lost for that to mean something, and with the interaction counted twice the books do not balance.
    twice = torch.stack([F_k + 0.5 * a @ W_of(z[:, None] - z) @ a for F_k, z in zip(F, path, strict=True)])
    assert F[0] - F[-1] > 0.01
    damaged("the interaction counted twice", abs((twice[0] - twice[-1]) / simpson(speed2, 0.05) - 1) < 2e-3)


def check_hypotheses():
    """Without bounded second derivatives: V = -x^4 / 4, and the particle is gone at time one half."""
    start = torch.ones(1, 1, dtype=F64)
    almost = nl.follow(lambda x, y: x**3, start, start, 1e-3, 400, method="rk4")[-1]
    assert abs(almost - 1 / math.sqrt(1 - 0.8)) < 1e-6
    try:
        nl.follow(lambda x, y: x**3, start, start, 1e-3, 1000, method="rk4")
        alive = True
    except FloatingPointError:
        alive = False
    damaged("the flow of any smooth energy exists for all times", alive)


def check_gaussian_density(d):
    """KL along the Ornstein-Uhlenbeck flow, in closed form: its slope is minus the mean square of the velocity."""
    A, b, m0, S0 = positive(d, 1), normal(d, seed=2), normal(d, seed=3), positive(d, 4)
    eye = torch.eye(d, dtype=F64)

    def kl(t):
        m, S = nl.closed_forms.ou_moments(t, A, b, m0, S0)
        return ((A @ S).trace() + (m - b) @ A @ (m - b) - d - torch.logdet(A @ S)) / 2

    for t in (0.1, 0.5, 2.0):
        m, S = nl.closed_forms.ou_moments(t, A, b, m0, S0)
        K = torch.linalg.inv(S) - A
        square = (A @ (m - b)).square().sum() + (K @ S @ K).trace()
        assert abs((kl(t + 1e-4) - kl(t - 1e-4)) / 2e-4 + square) < 1e-6 * (1 + float(square))
        assert square > 1e-4 and ((A @ S - eye).abs().max() > 1e-4)


def check_chain_rule():
    """For a field that is no gradient flow: d/dt of the energy is the integral of <grad P(rho), v>."""
    grid, m, h = torch.linspace(-4, 4, 8001, dtype=F64)[:, None], 3.0, 1e-4
    dx = float(grid[1, 0] - grid[0, 0])

    def density(t):  # Gaussians carried by v = 0.7 x + 0.2
        m_t = 0.2 / 0.7 * (math.exp(0.7 * t) - 1)
        z = (grid[:, 0] - m_t) / (0.5 * math.exp(0.7 * t))
        return torch.exp(-(z**2) / 2) / (0.5 * math.exp(0.7 * t) * math.sqrt(2 * math.pi))

    end = nl.follow(lambda x, y: 0.7 * x + 0.2, grid[::500], grid[::500], 0.05, 10, method="rk4")[-1]
    ahead = 0.5 / 0.5 * math.exp(0.35) * grid[::500] + 0.2 / 0.7 * (math.exp(0.35) - 1)
    assert (end - ahead).abs().max() < 1e-7
    F = [(density(0.5 + s * h) ** m).sum() * dx / (m - 1) for s in (1, -1)]
    rho = density(0.5)
    rate = (torch.gradient(rho**m, spacing=dx)[0] * (0.7 * grid[:, 0] + 0.2)).sum() * dx
    assert abs((F[0] - F[1]) / (2 * h) - rate) < 1e-5
    assert abs(rate) > 0.05


@pytest.mark.parametrize(
    ("claim", "setting"),
    [(check_particles, (d,)) for d in (1, 2, 3)]
    + [(check_gaussian_density, (d,)) for d in (1, 3)]
    + [(check_chain_rule, ()), (check_hypotheses, ())],
)
def test_thm_energy_dissipation(claim, setting):
    """Energies, written out, of particles that are followed; Gaussians in closed form; a density on a grid.

    Checked by: simulation, quadrature, closed form.
    """
    claim(*setting)


# thm-jko-step ---------------------------------------------------------------------------


def implicit(x, a, rounds=60):
    z = x
    for _ in range(rounds):
        z = x + a * velocity(z)
    return z


def check_smooth(d):
    x, uniform = normal(14, d, seed=d), torch.full((14,), 1 / 14, dtype=F64)
    # |V''| <= 1 + 0.8, |W''| <= 2 SOFT
    L = 1.8 + 2 * SOFT
    speed = velocity(x).square().sum(1).mean().sqrt()
    sizes = [0.1 * 2.0**-k for k in range(4)]
    gaps = []
    for a in sizes:
        z = implicit(x, a)
        explicit = nl.follow(velocity, x, x, a, 1)[-1]
        gaps.append(nl.metrics.w2(z, explicit))
        assert gaps[-1] <= a**2 * L / (1 - a * L) * speed

        def objective(y, a=a):
            return nl.metrics.w2(y, x) ** 2 / (2 * a) + energy(y, uniform)

        # It is a minimiser: no other cloud of so many points does better, nor the explicit one.
        best = objective(z)
        assert best <= energy(x, uniform) and best < objective(explicit)
        for s in (1e-3, 1e-2, 0.1):
            assert best < objective(z + s * normal(14, d, seed=9))
        # Optimality: the optimal plan back to the start, by linear programming, points along the slope.
        back = nl.fields.Wasserstein()(z, x)
        assert (back / a + velocity(z)).abs().max() < 1e-12
        damaged("the plan points along the velocity", (back / a - velocity(z)).abs().max() < 0.1)
    assert abs(order(gaps, sizes) - 2) < 0.25
    damaged("implicit and explicit steps agree to third order", order(gaps, sizes) > 2.5)
    # Step after step: first order, within the bound.
    T, errors = 0.8, []
    flow = nl.follow(velocity, x, x, T / 40, 40, method="rk4")
    fastest = max(float(velocity(z).square().sum(1).mean().sqrt()) for z in flow)
    for a in sizes[:3]:
        z, k = x, round(T / a)
        for _ in range(k):
            z = implicit(z, a, rounds=40)
        errors.append(nl.metrics.w2(z, flow[-1]))
        assert errors[-1] <= a * fastest / 2 * ((1 - a * L) ** -k - 1)
    assert abs(order(errors, sizes[:3]) - 1) < 0.25
    damaged("the scheme is of second order", order(errors, sizes[:3]) > 1.5)


def check_by_values(d):
    """The step found from values of the objective only, downhill on a simplex: three particles, unequal masses."""
    n, a, mass = 3, 0.3, weights(3, d)
    x = normal(n, d, seed=d + 2)

    def objective(y):
        y = torch.from_numpy(y).reshape(n, d)
        return float(nl.metrics.w2(y, x, mass, mass) ** 2 / (2 * a) + energy(y, mass))

    tight = {"xatol": 1e-9, "fatol": 1e-14, "maxiter": 20_000, "maxfev": 20_000, "adaptive": True}
    found = minimize(objective, x.reshape(-1).numpy(), method="Nelder-Mead", options=tight)
    z = torch.from_numpy(found.x).reshape(n, d)
    back = nl.fields.Wasserstein()(z, x, a=mass, b=mass)
    assert (back / a + velocity(z, a=mass)).abs().max() < 1e-5
    fixed = x
    for _ in range(200):
        fixed = x + a * velocity(fixed, a=mass)
    assert (z - fixed).abs().max() < 1e-5
    damaged("it is the explicit step", (z - x - a * velocity(x, a=mass)).abs().max() < 1e-3)


def check_extremal_steps(ell):
    """The hill V = -ell x^2 / 2 uses both bounds; so does W = ell z^2 / 2 the Lipschitz constant, without a 2."""
    x = normal(6, 1, seed=3)
    x = x - x.mean()
    size = x.square().mean().sqrt()
    for a in (0.1 / ell, 0.5 / ell):
        step = x / (1 - a * ell)  # minimises (y - x)^2 / (2 a) - ell y^2 / 2
        hill = [
            (s - x).square().mean() / (2 * a) - ell / 2 * s.square().mean() for s in (step, 1.01 * step, 0.99 * step)
        ]
        assert hill[0] < min(hill[1:])
        gap = nl.metrics.w2(step, nl.follow(lambda x, y: ell * x, x, x, a, 1)[-1])
        sharp(gap, a**2 * ell / (1 - a * ell) * ell * size, at_least=0.999)
    a, k = 0.01 / ell, 50
    off = ((1 - a * ell) ** -k - math.exp(k * a * ell)) * size
    sharp(off, a * ell * math.exp(k * a * ell) * size / 2 * ((1 - a * ell) ** -k - 1))
    damaged("of second order in a", off <= a**2 * ell * math.exp(k * a * ell) * size / 2 * ((1 - a * ell) ** -k - 1))
    # With a ell > 1 there is no step: the objective has no minimum.
    a = 1.5 / ell
    far = [(r * x - x).square().mean() / (2 * a) - ell / 2 * (r * x).square().mean() for r in (10, 100, 1000)]
    damaged("a step exists for every a", far[2] > far[1] > far[0])
    # The lift of W = ell z^2 / 2 is ell (X - E X): of Lipschitz constant ell, reached by centred differences.
    y = 2 * x
    lift = [ell * (z[:, None] - z).mean(1) for z in (x, y)]
    sharp((lift[1] - lift[0]).square().mean().sqrt(), ell * (y - x).square().mean().sqrt(), at_least=0.999)


def check_lift(seed):
    """Smooth interactions never exceed the constant ell_W, whatever the clouds."""
    for k in range(20):
        x, y = normal(9, 2, seed=100 * seed + k), normal(9, 2, seed=100 * seed + k + 50) * 0.3
        lift = [slope_of(W_of, z[:, None] - z).mean(1) for z in (x, x + y)]
        moved = (lift[1] - lift[0]).square().sum(1).mean().sqrt()
        assert moved <= 2 * SOFT * y.square().sum(1).mean().sqrt()


def kl(m, S, eta):
    d = len(m)
    return (S.trace() + (m - eta).square().sum() - d - torch.logdet(S)) / 2


def check_gaussians(d):
    eta, a = normal(d, seed=d), 0.7
    start, sigma = normal(d, seed=d + 5), 0.4
    eye = torch.eye(d, dtype=F64)

    def step(m, s, a):
        return (m + a * eta) / (1 + a), (s + math.sqrt(s * s + 4 * a * (1 + a))) / (2 * (1 + a))

    def objective(m, S):
        # W_2^2 is twice the entropic cost as eps tends to zero
        w2 = 2 * nl.closed_forms.gaussian_ot(m, S, start, sigma**2 * eye, 1e-9)
        return w2 / (2 * a) + kl(m, S, eta)

    m, s = step(start, sigma, a)
    best = objective(m, s**2 * eye)
    rise = []
    for size in (0.1, 0.05):
        change = normal(d, d, seed=8) * size
        skew = (eye + change) @ (eye + change).T * s**2
        assert objective(m, skew) > best
        assert objective(m, (s + size) ** 2 * eye) > best < objective(m, (s - size) ** 2 * eye)
        rise.append(objective(m + size * normal(d, seed=6), s**2 * eye) - best)
    assert abs(rise[0] / rise[1] - 4) < 1e-4, "a minimum in the mean: quadratic"
    # Optimality: back along the map between the two Gaussians.
    z = normal(5, d, seed=4)
    slope = z - eta - (z - m) / s**2
    assert ((start + sigma / s * (z - m) - z) / a - slope).abs().max() < 1e-12
    damaged("the map forward for the map back", ((m + s / sigma * (z - start) - z) / a - slope).abs().max() < 0.1)
    explicit = sigma + a * (1 / sigma - sigma)
    damaged("the explicit step's deviation", objective(m, explicit**2 * eye) <= best)
    # From N(0, I), and to first order the Ornstein-Uhlenbeck flow.
    m, s = torch.zeros(d, dtype=F64), 1.0
    for k in range(1, 6):
        m, s = step(m, s, a)
        assert (m - eta * (1 - (1 + a) ** -k)).norm() < 1e-14 and abs(s - 1) < 1e-14
    exact = nl.closed_forms.ou_moments(1.0, eye, eta, start, sigma**2 * eye)
    off = []
    sizes = [1 / 20, 1 / 40, 1 / 80]
    for small in sizes:
        m, s = start, sigma
        for _ in range(round(1 / small)):
            m, s = step(m, s, small)
        off.append([(m - exact[0]).norm(), abs(s**2 - exact[1][0, 0])])
    for column in zip(*off, strict=True):
        assert abs(order(column, sizes) - 1) < 0.1


def quantile_energy(x, target=1.0):
    gaps = len(x) * (x[1:] - x[:-1])
    return ((x - target) ** 2 / 2).mean() - gaps.log().sum() / len(x)


def newton(start, a):
    x = start.clone()

    def J(x):
        return ((x - start) ** 2).mean() / (2 * a) + quantile_energy(x)

    for _ in range(60):
        slope = slope_of(J, x)
        if len(x) * slope.abs().max() < 1e-12:
            break
        move = torch.linalg.solve(torch.autograd.functional.hessian(J, x), slope)
        while not J(x - move) <= J(x) + 1e-14:
            move = move / 2
        x = x - move
    return x


def check_on_the_line(a):
    """Optimality without formulas: one explicit step *uphill* from the JKO step leads back to the start."""
    n = 24
    x = NORMAL.icdf((torch.arange(n, dtype=F64) + 0.5) / n)
    z = newton(x, a)
    assert (z.diff() > 0).all()

    def uphill(p, y):
        return n * slope_of(quantile_energy, p[:, 0])[:, None]

    back = nl.follow(uphill, z[:, None], z[:, None], a, 1)[-1, :, 0]
    assert (back - x).abs().max() < 1e-9
    mean, deviation = z.mean(), z.std(correction=0)
    assert abs(mean - a / (1 + a)) < 1e-10
    assert abs(deviation - 1) < 0.06
    assert quantile_energy(z) + nl.metrics.w2(z[:, None], x[:, None]) ** 2 / (2 * a) < quantile_energy(x)


@pytest.mark.parametrize(
    ("claim", "setting"),
    [(check_smooth, 1), (check_smooth, 2)]
    + [(check_by_values, 1), (check_by_values, 2), (check_extremal_steps, 1.0), (check_extremal_steps, 3.0)]
    + [(check_lift, 0), (check_lift, 1)]
    + [(check_gaussians, d) for d in (1, 3)]
    + [(check_on_the_line, a) for a in (0.1, 1.0, 10.0)],
)
def test_thm_jko_step(claim, setting):
    """Steps by fixed points, by Newton and by a search that sees values only; plans by the network simplex.

    Checked by: linear program, brute force, closed form.
    """
    claim(setting)


# thm-quantile-flow ----------------------------------------------------------------------


INTERNAL = {
    "entropy": (lambda r: torch.special.xlogy(r, r), lambda r: r),
    "porous": (lambda r: r**3 / 2, lambda r: r**3),
}


@pytest.mark.parametrize("name", INTERNAL)
def test_thm_quantile_flow(name):
    """Distances by the network simplex against sorted points; the energy written out; particles followed.

    Checked by: linear program, finite differences, simulation.
    """
    # The distance is that of quantile functions, also for clouds of different sizes, and of unequal masses.
    x, y = normal(6, 1, seed=1), 2 * normal(9, 1, seed=2)
    gap = x[:, 0].sort().values.repeat_interleave(3) - y[:, 0].sort().values.repeat_interleave(2)
    assert abs(nl.metrics.w2(x, y) - gap.square().mean().sqrt()) < 1e-10
    counts = torch.tensor([1, 2, 3, 1, 4, 1])  # twelfths
    gap = x[:, 0].sort().values.repeat_interleave(counts[x[:, 0].argsort()]) - torch.linspace(-1, 1, 12, dtype=F64)
    evenly = torch.linspace(-1, 1, 12, dtype=F64)[:, None]
    assert abs(nl.metrics.w2(x, evenly, counts.to(F64) / 12, None) - gap.square().mean().sqrt()) < 1e-10
    damaged("points paired as they come", abs(nl.metrics.w2(x, y[:6]) - (x - y[:6]).square().mean().sqrt()) < 1e-3)
    # The energy is convex, and the flow is its gradient flow.
    U, P = INTERNAL[name]
    n = 12

    def E(z, V=lambda z: z**2, W=lambda z: z**4 / 4):
        gaps = n * (z[1:] - z[:-1])
        return V(z).mean() + W(z[:, None] - z).mean() / 2 + (gaps * U(1 / gaps)).sum() / n

    def field(x, y=None, force=True, **_):
        p = P(1 / (n * (x[1:] - x[:-1])))
        edge = torch.zeros_like(p[:1])
        push = n * (torch.cat([edge, p]) - torch.cat([p, edge]))
        return push - 2 * x - ((x - x.T) ** 3).mean(1, keepdim=True) if force else push

    clouds = [normal(n, seed=s).sort().values * 1.3 for s in range(3, 7)]
    for one, other in zip(clouds, clouds[1:], strict=False):
        assert E((one + other) / 2) < (E(one) + E(other)) / 2
        assert (field(one[:, None])[:, 0] + n * slope_of(E, one)).abs().max() < 1e-8 * float(field(one[:, None]).norm())
        damaged("pressures with the sign turned", (field(one[:, None]) - 2 * field(one[:, None], force=False)
                + n * slope_of(E, one)[:, None]).abs().max() < 0.1)  # fmt: skip
    wide = torch.linspace(-40, 40, n, dtype=F64)
    hill = [E(z, lambda z: -(z**2), lambda z: 0 * z) for z in (wide, 1.2 * wide, 1.1 * wide)]
    damaged("E_n is convex for any V", hill[2] <= (hill[0] + hill[1]) / 2)
    # Particles keep their order: the smallest gap grows.
    start = NORMAL.icdf((torch.arange(n, dtype=F64) + 0.5) / n)[:, None]
    path = nl.follow(lambda x, y: field(x, force=False), start, start, 2e-3, 200, method="rk4")[..., 0]
    least = path.diff(dim=1).amin(1)
    assert (least.diff() > 0).all() and least[0] > 0
    # Energy is lost at the rate of the mean square speed, and the mean rests.
    bare = [E(z, V=lambda z: 0 * z, W=lambda z: 0 * z) for z in path]
    spent = simpson(torch.stack([field(z[:, None], force=False).square().mean() for z in path]), 2e-3)
    assert abs((bare[0] - bare[-1]) / spent - 1) < 1e-6
    assert path.mean(1).abs().max() < 1e-12
    if name == "entropy":
        grown = path.square().mean(1) - path[0].square().mean()
        assert (grown - 2 * (1 - 1 / n) * 2e-3 * torch.arange(201, dtype=F64)).abs().max() < 1e-9
        damaged("the variance grows by 2 t", abs(grown[-1] - 2 * 0.4) < 0.01)
    # With a potential of curvature 2: no gap shrinks faster than e^{-2t}.
    path = nl.follow(
        lambda x, y: field(x, force=False) - 2 * (x - 3), 0.5 * start, start, 5e-4, 200, method="rk4"
    )[..., 0]  # fmt: skip
    times = 5e-4 * torch.arange(201, dtype=F64)
    least = path.diff(dim=1).amin(1)
    assert (least >= torch.exp(-2 * times) * least[0] - 1e-9).all()
    # Far apart, particles feel V alone: with V'' = 2 the rate is reached.
    far = 40 * start
    path = nl.follow(lambda x, y: field(x, force=False) - 2 * x, far, far, 5e-4, 200, method="rk4")[..., 0]
    sharp(math.exp(-2 * 0.1) * path[0].diff().min(), path[-1].diff().min(), at_least=0.9)
    # An attraction closes gaps without any V: W = 0 is needed; so is a bound of V''.
    near = nl.follow(lambda x, y: field(x, force=False) - 2 * (x - x.mean()), far, far, 5e-4, 200, method="rk4")[..., 0]
    damaged("gaps do not shrink if V = 0, with W = z^2", near[-1].diff().min() >= near[0].diff().min())


# thm-heat-flow --------------------------------------------------------------------------


@pytest.mark.parametrize("d", [1, 2])
def test_thm_heat_flow(d):
    """Mixtures of Gaussians: differences of their densities, their distribution functions, particles that follow.

    Checked by: finite differences, quadrature, simulation, closed form.
    """
    atoms, a = normal(4, d, seed=d), weights(4, d)

    def density(x, t):
        square = ((x[:, None] - atoms) ** 2).sum(-1)
        return (a * torch.exp(-square / (4 * t))).sum(1) / (4 * math.pi * t) ** (d / 2)

    def origin(x, t):
        square = ((x[:, None] - atoms) ** 2).sum(-1)
        return torch.softmax(a.log() - square / (4 * t), 1) @ atoms

    def v(x, t):
        return (x - origin(x, t)) / (2 * t)

    x, t, h = normal(20, d, seed=5), 0.4, 1e-3
    # The velocity is minus the gradient of log rho, and the density solves the heat equation.
    assert (v(x, t) + slope_of(lambda x: density(x, t).log(), x)).abs().max() < 1e-10
    e = h * torch.eye(d, dtype=F64)
    change = (density(x, t + h) - density(x, t - h)) / (2 * h)
    laplace = sum(density(x + s * k, t) - density(x, t) for k in e for s in (1, -1)) / h**2
    assert (change - laplace).abs().max() < 1e-4 * change.abs().max() + 1e-6
    damaged("half the Laplacian", (change - laplace / 2).abs().max() < 1e-2 * change.abs().max())
    damaged(
        "a point minus its origin over t", (2 * v(x, t) + slope_of(lambda x: density(x, t).log(), x)).abs().max() < 1
    )
    # Carried by v, log rho changes by minus the integral of the divergence: the law of the particles is rho.
    if d == 1:
        cdf = [(NORMAL.cdf((z - atoms.T) / math.sqrt(2 * s)) * a).sum(1) for z, s in
               ((x, 0.1), (carry(v, x, 0.1, 0.5, 100), 0.5))]  # fmt: skip
        assert (cdf[1] - cdf[0]).abs().max() < 1e-7
    # Moments and speed, from a large sample of exact increments.
    big = atoms[torch.multinomial(a, 20_000, True, generator=seeded(3))]
    big = big + math.sqrt(2 * t) * normal(20_000, d, seed=4)
    speed2 = v(big, t).square().sum(1)
    assert speed2.mean() < d / (2 * t)
    # Gaussians: particles along the formula, and the Ornstein-Uhlenbeck flow without a force.
    m, S = normal(d, seed=1), positive(d, 2)

    def root(M):
        values, vectors = torch.linalg.eigh(M)
        return (vectors * values.sqrt()) @ vectors.T

    later = S + 1.0 * torch.eye(d, dtype=F64)  # t = 1/2
    end = carry(lambda x, t: (x - m) @ torch.linalg.inv(S + 2 * t * torch.eye(d, dtype=F64)), x, 0.0, 0.5, 50)
    assert (end - m - (x - m) @ torch.linalg.inv(root(S)) @ root(later)).abs().max() < 1e-6
    free = nl.closed_forms.ou_moments(0.5, 1e-8 * torch.eye(d, dtype=F64), torch.zeros(d), m, S)
    assert (free[0] - m).abs().max() < 1e-7 and (free[1] - later).abs().max() < 1e-7
    # From one point both bounds are equalities, by Gauss and Hermite's rule in each coordinate.
    nodes, mass = map(torch.from_numpy, hermegauss(8))
    nodes = math.sqrt(2 * t) * torch.cartesian_prod(*[nodes] * d).reshape(-1, d)
    mass = torch.cartesian_prod(*[mass / mass.sum()] * d).reshape(-1, d).prod(1)
    point, one = torch.zeros(1, d, dtype=F64), torch.ones(1, dtype=F64)
    sharp(nl.metrics.w2(nodes, point, mass, one), math.sqrt(2 * d * t), at_least=0.999)
    sharp(mass @ (nodes / (2 * t)).square().sum(1), d / (2 * t), at_least=0.999)
    damaged("W_2 grows like t", nl.metrics.w2(nodes / 10, point, mass, one) <= math.sqrt(2 * d) * t / 100)
    # Everywhere at once: W_2 to the start is at most sqrt(2 d t), and the density is positive.
    shift = math.sqrt(2 * 1e-4) * normal(4, d, seed=6)
    assert nl.metrics.w2(atoms + shift, atoms) <= shift.square().sum(1).mean().sqrt() + 1e-12
    assert (density(3 + x, 1e-2) > 0).all()


# thm-ou-flow ----------------------------------------------------------------------------


@pytest.mark.parametrize("d", [1, 2, 3])
def test_thm_ou_flow(d):
    """Particles that know only their own moments, and random ones, against the closed form; distances of Gaussians.

    Checked by: simulation, closed form.
    """
    A, b = positive(d, 1), normal(d, seed=2)
    x, a = normal(8, d, seed=3) @ positive(d, 4) + 1, weights(8, d)

    def moments(x):
        m = a @ x
        return m, (a[:, None] * (x - m)).T @ (x - m)

    # Particles that know only their own mean and covariance: the Gaussian flow with those moments.
    def field(x, y, a):
        m, S = moments(x)
        return -(x - b) @ A + (x - m) @ torch.linalg.inv(S)

    path = nl.follow(field, x, x, 0.01, 80, method="rk4", a=a)
    for k in (10, 40, 80):
        exact = nl.closed_forms.ou_moments(0.01 * k, A, b, *moments(x))
        for mine, theirs in zip(moments(path[k]), exact, strict=True):
            assert (mine - theirs).abs().max() < 1e-5
    # Langevin, from N(0, I): moments within five standard errors and the bias of the step.
    h, n = 0.005, 4000
    start = normal(n, d, seed=5)

    def langevin(x, y, generator):
        return -(x - b) @ A + math.sqrt(2 / h) * torch.randn(x.shape, generator=generator, dtype=F64)

    walk = nl.follow(langevin, start, start, h, 100, generator=seeded(6))
    m, S = nl.closed_forms.ou_moments(0.5, A, b)
    s = S.diagonal()
    assert ((walk[-1].mean(0) - m) / (s / n).sqrt()).abs().max() < 5
    assert ((walk[-1].T.cov() - S) / ((s[:, None] * s + S**2) / n).sqrt()).abs().max() < 5
    half = nl.follow(lambda x, y, generator: langevin(x, y, generator) / math.sqrt(2)
                     + (1 / math.sqrt(2) - 1) * (x - b) @ A, start, start, h, 100, generator=seeded(6))  # fmt: skip
    scores = (half[-1].T.cov() - S) / ((s[:, None] * s + S**2) / n).sqrt()
    damaged("dB for the root of 2 dB", scores.abs().max() < 5)
    # Two flows approach each other; the target is at rest.
    rate = float(torch.linalg.eigvalsh(A)[0])
    one, other = (normal(d, seed=7), positive(d, 8)), (normal(d, seed=9), positive(d, 10))

    def w2(p, q):
        return math.sqrt(2 * float(nl.closed_forms.gaussian_ot(*p, *q, 1e-10)))

    inverse = torch.linalg.inv(A)
    target = (b, (inverse + inverse.T) / 2)

    def at(t, p):
        m, S = nl.closed_forms.ou_moments(t, A, b, *p)
        return m, (S + S.T) / 2

    for t in (0.3, 1.0):
        assert w2(at(t, one), at(t, other)) <= math.exp(-rate * t) * w2(one, other) + 1e-6
        assert (at(t, target)[1] - target[1]).abs().max() < 1e-12
    assert w2(at(30 / rate, one), target) < 1e-4
    # Translates along the slowest direction approach at this rate, and no faster.
    shifted = (one[0] + torch.linalg.eigh(A)[1][:, 0], one[1])
    sharp((at(1.0, shifted)[0] - at(1.0, one)[0]).norm(), math.exp(-rate), at_least=0.999)
    damaged("at twice the rate", w2(at(1.0, shifted), at(1.0, one)) <= math.exp(-2 * rate) * w2(shifted, one))


# thm-porous-medium ----------------------------------------------------------------------


def check_profile(d, m):
    alpha = d / (d * (m - 1) + 2)
    generator = seeded(d)
    directions = torch.nn.functional.normalize(torch.randn(30, d, generator=generator, dtype=F64), dim=1)
    sphere = {1: 2.0, 2: 2 * math.pi, 3: 4 * math.pi}[d]
    r = 5 * (torch.arange(50_000, dtype=F64) + 0.5) / 50_000
    ray = torch.cat([r[:, None], torch.zeros(len(r), d - 1, dtype=F64)], 1)
    shell = sphere * r ** (d - 1) * 5 / 50_000

    def rho(t, x):
        return nl.closed_forms.barenblatt(t, x, m)

    # Mass, front, scaling.
    one = rho(1.0, ray)
    front = r[one > 0].max()
    assert 0.5 < front < 4.9
    for t in (0.5, 2.0):
        now = rho(t, ray)
        assert abs(shell @ now - 1) < 1e-4
        assert abs(r[now > 0].max() - front * t ** (alpha / d)) < 3e-4
        assert abs(shell @ now**m * t ** (alpha * (m - 1)) / (shell @ one**m) - 1) < 1e-4
    # The equation and the velocity, inside the support.
    x = 0.6 * front * torch.rand(30, 1, generator=generator, dtype=F64) * directions
    h = 1e-3
    change = (rho(1 + h, x) - rho(1 - h, x)) / (2 * h)
    e = h * torch.eye(d, dtype=F64)
    laplace = sum(rho(1.0, x + s * k) ** m - rho(1.0, x) ** m for k in e for s in (1, -1)) / h**2
    assert (change - laplace).abs().max() < 1e-4
    flux = -slope_of(lambda x: rho(1.3, x) ** m, x)
    assert (flux - rho(1.3, x)[:, None] * alpha / d * x / 1.3).abs().max() < 1e-10
    # The balance of energy.
    damaged("mass one with a C of one", abs(shell @ (1 - (m - 1) * alpha / (2 * m * d) * r**2).clamp_min(0)
            ** (1 / (m - 1)) - 1) < 0.01)  # fmt: skip
    damaged("it solves the heat equation", (change - sum(rho(1.0, x + s * k) - rho(1.0, x) for k in e for s in (1, -1))
            / h**2).abs().max() < 1e-2)  # fmt: skip
    balance = (m - 1) * alpha * (shell @ one**m) / (m - 1) / ((alpha / d) ** 2 * (shell @ (one * r**2)))
    assert abs(balance - 1) < 1e-4


def check_rays(d, m):
    """Particles carried by v = (alpha / d) x / t, and the density along them."""
    alpha = d / (d * (m - 1) + 2)
    x = 0.4 * normal(20, d, seed=d)
    end = carry(lambda x, t: alpha / d * x / t, x, 0.5, 2.0, 60)
    assert (end - 4 ** (alpha / d) * x).abs().max() < 1e-5
    ratio = nl.closed_forms.barenblatt(2.0, end, m) * 4**alpha - nl.closed_forms.barenblatt(0.5, x, m)
    assert ratio.abs().max() < 1e-4
    wrong = 2 * alpha / d * x  # at time 0.5 the velocity is x / t times alpha / d, not half of that
    damaged("rays of twice the exponent", (end - 4 ** (2 * alpha / d) * x).abs().max() < 0.1 * wrong.abs().max())


def check_pressed_particles():
    """Particles that know nothing but the pressure of their neighbours arrive where the profile says."""
    m, n = 2.0, 16

    def quantiles(t):
        grid = torch.linspace(-4, 4, 40_001, dtype=F64)
        mass = torch.cumulative_trapezoid(nl.closed_forms.barenblatt(t, grid[:, None], m), grid)
        levels = (torch.arange(n, dtype=F64) + 0.5) / n
        return grid[1:][torch.searchsorted(mass, levels)][:, None]

    def field(x, y):
        p = (1 / (n * (x[1:] - x[:-1]))) ** m
        edge = torch.zeros_like(p[:1])
        return n * (torch.cat([edge, p]) - torch.cat([p, edge]))

    start, goal = quantiles(0.2), quantiles(1.2)
    end = nl.follow(field, start, start, 1 / 250, 250, method="rk4")[-1]
    assert nl.metrics.w2(end, goal) < 4e-3 < 0.02 * nl.metrics.w2(start, goal)


@pytest.mark.parametrize(
    ("claim", "setting"),
    [(check_profile, (d, m)) for d in (1, 2, 3) for m in (1.5, 2.0, 3.0)]
    + [(check_rays, (1, 2.0)), (check_rays, (3, 1.5)), (check_pressed_particles, ())],
)
def test_thm_porous_medium(claim, setting):
    """The profile by quadrature and differences; particles carried by the field, and by each other's pressure.

    Checked by: quadrature, finite differences, simulation.
    """
    claim(*setting)
