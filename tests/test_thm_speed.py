"""One test for each theorem of the chapter book/speed.md.

Stricter than the chapter's cells: several seeds, unequal weights, clouds of different sizes, float64. Transforms,
sweeps and Hessians are written out here, so that they share no code with the library.
"""

import math

import pytest
import torch
from conftest import damaged, sharp

import nsgf_lite as nl
from nsgf_lite.transport import solver

F64 = torch.float64


def problem(seed, n=17, m=12):
    """Two weighted clouds of different sizes, in discs of radius one with different centres."""
    generator = torch.Generator().manual_seed(seed)

    def disc(k):
        z = torch.randn(k, 2, generator=generator, dtype=F64)
        w = torch.rand(k, generator=generator, dtype=F64) + 0.2
        return z / (1 + z.square().sum(1, keepdim=True)).sqrt(), w / w.sum()

    (x, a), (y, b) = disc(n), disc(m)
    return x, y + torch.tensor([0.7, -0.4], dtype=F64), a, b


def cost(x, y):
    return (x[:, None] - y[None]).square().sum(-1) / 2


def transform(g, b, c, eps):
    return -eps * torch.logsumexp((g - c) / eps + b.log(), -1)


def osc(h):
    return float(h.max() - h.min())


def second_eigenvalue(plan, a, b):
    """Of the two steps together, and how the first marginal fits: the plan is the library's."""
    assert (plan.sum(1) - a).abs().sum() < 1e-9 and (plan.sum(0) - b).abs().sum() < 1e-9
    sigma = torch.linalg.svdvals(plan / (a[:, None] * b).sqrt())
    assert abs(sigma[0] - 1) < 1e-9
    return float(sigma[1] ** 2)


# The price of stopping early ------------------------------------------------------------------------------------------


def the_flow_obeys_it(eps):
    """Both terms of the velocity obey it: stopped early, it errs by at most the two bounds together."""
    x, y, a, b = problem(5)
    rows = [nl.plan(x, z, eps, a, w, tol=1e-13) / a[:, None] for z, w in ((y, b), (x, a))]
    exact = rows[0] @ y - rows[1] @ x
    for tol in (1e-2, 1e-4, 1e-6):
        v = nl.fields.Sinkhorn(eps, tol)(x, y, a=a, b=b)
        allowed = 0.0
        for target, weights in ((y, b), (x, a)):
            done = nl.potentials(x, target, eps, a, weights, tol=tol)
            star = nl.potentials(x, target, eps, a, weights, tol=1e-13)
            allowed += 2 * math.tanh(osc(done.g - star.g) / (4 * eps))
        assert (v - exact).norm(dim=1).max() <= allowed + 1e-11


def its_constants_are_attained(eps, R=0.7):
    """One particle at 0 between two data at -R and R, and two particles on two data: all four bounds bite."""
    y = torch.tensor([-R, R], dtype=F64)

    def mean(b, g):
        return float(torch.softmax(g / eps + b.log(), 0) @ y)

    # parts 2 and 3: equal weights, so the solution is g = 0; the plan is the law of the data, lambda = 0, rho = R
    b, g = torch.full((2,), 0.5, dtype=F64), 1e-2 * eps * torch.tensor([-0.5, 0.5], dtype=F64)
    column = torch.softmax(g / eps + b.log(), 0)
    S, tau, chi = (
        float((column - b) @ g) / eps,
        float((column - b).abs().sum()),
        float(((column - b).square() / b).sum().sqrt()),
    )
    sharp(mean(b, g) ** 2, R**2 * S, 0.999)
    sharp(R**2 * S, R**2 * tau * osc(g) / (2 * eps), 0.999)
    sharp(abs(mean(b, g)), R * chi * (1 + 1e-4), 0.999)
    damaged("part 2 with nine tenths of its constant", mean(b, g) ** 2 <= 0.9 * R**2 * S)
    damaged("part 3 with tau for chi and half of rho", abs(mean(b, g)) <= R * tau / 2)
    # part 1 at any distance: weights that lean by half the tilt
    for s in (0.1 * eps, 3 * eps, 20 * eps):
        lean = torch.softmax(torch.tensor([s / 4, -s / 4], dtype=F64) / eps, 0)
        g = torch.tensor([-s / 2, s / 2], dtype=F64)
        moved = mean(lean, g) - mean(lean, torch.zeros(2, dtype=F64))
        sharp(moved, 2 * R * math.tanh(s / (4 * eps)), 0.999)
        damaged("part 1 with an eighth for the quarter", moved <= 2 * R * math.tanh(s / (8 * eps)))
    # eta against delta
    c = (y[:, None] - y).square() / 2
    g = 1e-4 * eps * torch.tensor([-0.5, 0.5], dtype=F64)
    ratio = osc(g) / osc(transform(transform(g, b, c, eps), b, c.T, eps) - g)
    sharp(ratio, math.cosh(R**2 / eps) ** 2, 0.999)
    damaged("cosh for its square", ratio <= math.cosh(R**2 / eps))


@pytest.mark.parametrize("eps", [0.1, 0.5])
@pytest.mark.parametrize("seed", range(3))
def test_thm_unconverged_velocity(seed, eps):
    """Stopped maps against means under the converged plan; transforms are written out here.

    Checked by: definition, closed form.
    """
    its_constants_are_attained(eps)
    x, y, a, b = problem(seed)
    c, radius = cost(x, y), 1.0
    converged = nl.barycentric_map(x, y, eps, a, b, tol=1e-13)
    g_star, plan = converged.solution.g, nl.plan(x, y, eps, a, b, tol=1e-13)
    lam = second_eigenvalue(plan, a, b)
    rows = plan / a[:, None]
    mean = rows @ y
    second = torch.einsum("ij,jk,jl->ikl", rows, y, y) - mean[:, :, None] * mean[:, None]
    rho = float(torch.linalg.eigvalsh(second)[:, -1].max().sqrt())
    generator = torch.Generator().manual_seed(seed)
    anywhere = 3 * torch.randn(20, 2, generator=generator, dtype=F64)

    states = [nl.barycentric_map(x, y, eps, a, b, tol=10.0**-k) for k in (1, 2, 4, 6, 8)]
    for T in states:
        # The library ends on a row step, says the marginal error it has, and keeps its word.
        f, g = T.solution
        tilt = f - transform(g, b, c, eps)
        assert tilt.abs().max() < 1e-11
        after = transform(f - tilt, a, c.T, eps)
        column = b * torch.exp((g - after) / eps)
        tau = float((column - b).abs().sum())
        assert abs(tau - T.solution.marginal_error) < 1e-3 * tau + 1e-12
        delta, eta = osc(after - g), osc(g - g_star)
        wrong = T() - mean
        largest, average = float(wrong.norm(dim=1).max()), float((a @ wrong.square().sum(1)).sqrt())
        noise = 1e-11
        # part 1, at the points and anywhere
        assert eta <= delta * math.cosh(radius**2 / eps) ** 2 + noise
        assert largest <= 2 * radius * math.tanh(eta / (4 * eps)) + noise
        away = (T(anywhere) - converged(anywhere)).norm(dim=1).max()
        assert away <= 2 * radius * math.tanh(eta / (4 * eps)) + noise
        # part 2: the bound, and the identity for S
        current = a[:, None] * b * torch.exp((f[:, None] + g - c) / eps)
        S = float((column - b) @ (g - g_star)) / eps
        both = float(((current - plan) * (current / plan).log()).sum())
        assert abs(S - both) <= 1e-3 * both + 1e-13
        assert average <= radius * math.sqrt(max(both, 0)) + 1e-6 * noise**0.5 + noise
        assert both <= tau * eta / (2 * eps) + noise**2 + 1e-13
        # part 3 near the solution
        chi = float(((column - b).square() / b).sum().sqrt())
        if tau < 1e-2:
            assert average <= 1.05 * rho * chi / math.sqrt(1 - lam) + noise
    taus = [T.solution.marginal_error for T in states]
    assert taus[0] > 1e-9 and taus[-1] <= 1e-8

    # The constant of part 3 is attained to first order in the direction of the slow mode, up to rho.
    slow = torch.linalg.svd(plan / (a[:, None] * b).sqrt()).Vh[1] / b.sqrt()
    g = g_star + 1e-5 * eps * slow
    after = transform(transform(g, b, c, eps), a, c.T, eps)
    assert osc(after - g) == pytest.approx((1 - lam) * osc(g - g_star), rel=1e-3)
    chi = float((b @ torch.expm1((g - after) / eps).square()).sqrt())
    S = float(b @ (torch.expm1((g - after) / eps) * (g - g_star))) / eps
    assert S == pytest.approx(chi**2 / (1 - lam), rel=1e-3)

    the_flow_obeys_it(2 * eps)


# Over-relaxation ------------------------------------------------------------------------------------------------------


def sweep(z, w, c, a, b, eps):
    f, g = z[: len(a)], z[len(a) :]
    g = g + w * (transform(f, a, c.T, eps) - g)
    f = f + w * (transform(g, b, c, eps) - f)
    return torch.cat([f, g])


def radius_of(w, lam):
    """The spectral radius of the theorem."""
    if w >= 2 / (1 + math.sqrt(1 - lam)):
        return w - 1
    return (w * math.sqrt(lam) + math.sqrt(w * w * lam - 4 * w + 4)) ** 2 / 4


def the_solver_uses_it(lam):
    """A plain rate that two looks reveal makes Young's exponent."""
    looks = [1e-1, 1e-1 * lam**solver.CHECK]
    w, _ = solver.relaxation(1.0, looks)
    assert w == pytest.approx(2 / (1 + math.sqrt(1 - lam)), abs=1e-9)


def it_saves_what_it_promises():
    """On a slow problem the library takes a fraction of the plain steps, and not fewer than the optimum allows."""
    generator = torch.Generator().manual_seed(0)
    x = nl.toy.EightGaussians().sample(60, generator, dtype=F64)
    y = nl.toy.Moons().sample(50, generator, dtype=F64)
    uniform = torch.full((60,), 1 / 60, dtype=F64), torch.full((50,), 1 / 50, dtype=F64)
    lam = second_eigenvalue(nl.plan(x, y, 0.5, tol=1e-13), *uniform)
    assert lam > 0.9
    coarse, fine = (nl.potentials(x, y, 0.5, tol=tol) for tol in (1e-4, 1e-11))
    steps = fine.iterations - coarse.iterations
    gained = math.log(fine.marginal_error / coarse.marginal_error)
    best = 2 / (1 + math.sqrt(1 - lam)) - 1
    assert 0.6 * gained / math.log(best) < steps < gained / math.log(lam) / 2.5


@pytest.mark.parametrize("eps", [0.05, 0.2])
@pytest.mark.parametrize("shape", [(17, 12), (9, 9)])
def test_thm_overrelaxation(shape, eps):
    """Eigenvalues of the derivative of a sweep that is written out here, and the rate of its iterates.

    Checked by: definition, simulation.
    """
    x, y, a, b = problem(3, *shape)
    c = cost(x, y)
    plan = nl.plan(x, y, eps, a, b, tol=1e-13)
    lam = second_eigenvalue(plan, a, b)
    sigma = torch.linalg.svdvals(plan / (a[:, None] * b).sqrt())
    star = torch.cat(tuple(nl.potentials(x, y, eps, a, b, tol=1e-13)))
    best = 2 / (1 + math.sqrt(1 - lam))

    # 1. all eigenvalues of the sweep's derivative are those of the theorem
    for w in (0.5, 1.0, 1.3, 0.9 * best, 1.9):
        J = torch.autograd.functional.jacobian(lambda z, w=w: sweep(z, w, c, a, b, eps), star)
        seen = torch.linalg.eigvals(J).abs().sort().values
        half = w * sigma.to(torch.complex128) / 2
        root = (half**2 + 1 - w).sqrt()
        said = torch.cat([(half + root) ** 2, (half - root) ** 2]).abs()
        said = torch.cat([said, torch.full((abs(len(a) - len(b)),), abs(1 - w), dtype=F64)]).sort().values
        assert (seen - said).abs().max() < 1e-4
        # 2. the largest is the one of the constants, the second the radius
        without = seen[(seen - 1).abs().argsort()[1:]].max()
        assert abs(without - radius_of(w, lam)) < 1e-5

    # 2. the optimum: nothing on a grid is below it, and outside (0, 2) nothing converges
    grid = [radius_of(k / 500, lam) for k in range(1, 1000)]
    assert best - 1 - 1e-12 <= min(grid) < best - 1 + 0.05
    lowest = grid.index(min(grid))
    assert all(later < earlier for earlier, later in zip(grid[:lowest], grid[1 : lowest + 1], strict=True))
    assert all(later > earlier for earlier, later in zip(grid[lowest:], grid[lowest + 1 :], strict=False))
    assert abs(radius_of(1.0, lam) - lam) < 1e-12
    J = torch.autograd.functional.jacobian(lambda z: sweep(z, 2.05, c, a, b, eps), star)
    assert torch.linalg.eigvals(J).abs().max() > 1.04

    def seen(w):
        J = torch.autograd.functional.jacobian(lambda z: sweep(z, w, c, a, b, eps), star)
        return float(torch.linalg.eigvals(J).abs().sort().values[-2])

    slip = 2 / (1 + math.sqrt(1 - math.sqrt(lam)))
    sharp(seen(best), (best - 1) * (1 + 1e-3), 0.99)
    damaged("the rate of half a step for that of a sweep is as good", seen(slip) <= best - 1 + 1e-3)
    damaged("and so is the plain iteration", seen(1.0) <= best - 1 + 1e-3)

    # 3. the nonlinear iteration runs at this rate near the solution
    for w in (1.0, 1.2, 1.95):
        bump = torch.linspace(-1, 1, len(star), dtype=F64).sin()
        z, errors = star + 1e-4 * eps * bump, []
        while len(errors) < 400 and (not errors or errors[-1] > 1e-10 * eps):
            z = sweep(z, w, c, a, b, eps)
            errors.append(osc((z - star)[len(a) :]))
        late = torch.tensor(errors[len(errors) // 2 :], dtype=F64).log()
        t = torch.arange(len(late), dtype=F64)
        t = t - t.mean()
        assert float((t @ late / (t @ t)).exp()) == pytest.approx(radius_of(w, lam), abs=0.02)

    # 4. the library does so
    the_solver_uses_it(lam)
    it_saves_what_it_promises()


# Newton's method ------------------------------------------------------------------------------------------------------


def its_bound_is_attained(eps, q=1e-9):
    """One particle and two data, one of almost no mass: a step from z below the solution multiplies the error so."""
    b = torch.tensor([q, 1 - q], dtype=F64)
    for z in (0.1, 1.0, 2.0):
        g = torch.tensor([-z * eps, 0.0], dtype=F64)  # the solution is constant
        p = torch.softmax(g / eps + b.log(), 0)
        H = (torch.diag(p) - p[:, None] * p) / eps
        step = torch.linalg.lstsq(H / H.abs().max(), (b - p)[:, None] / H.abs().max(), driver="gelsd").solution[:, 0]
        left = osc(g + step)
        sharp(left, (math.expm1(z) - z) * eps, 0.99)
        damaged("the bound with nine tenths of its constant", left <= 0.9 * (math.expm1(z) - z) * eps)
    damaged("a full step from afar comes nearer all the same", left <= 2.0 * eps)


@pytest.mark.parametrize("eps", [0.005, 0.02])
@pytest.mark.parametrize("seed", range(2))
def test_thm_newton_semidual(seed, eps):
    """Derivatives by automatic differentiation of the semi-dual as defined; the library's steps against the bound.

    Checked by: definition, closed form.
    """
    its_bound_is_attained(eps)
    x, y, a, b = problem(seed, 24, 19)
    c = cost(x, y)
    g_star = nl.potentials(x, y, eps, a, b, tol=1e-14).g

    def semidual(g):
        return a @ transform(g, b, c, eps) + b @ g

    def hessian(g):
        P = torch.softmax((g - c) / eps + b.log(), 1)
        return (torch.diag(a @ P) - P.T @ (a[:, None] * P)) / eps

    # 1. gradient and Hessian, by automatic differentiation; concave, the kernel constant
    generator = torch.Generator().manual_seed(seed)
    g = g_star + eps * torch.randn(len(b), generator=generator, dtype=F64)
    slope = torch.autograd.functional.jacobian(semidual, g)
    plan = a[:, None] * torch.softmax((g - c) / eps + b.log(), 1)
    assert (slope - (b - plan.sum(0))).abs().max() < 1e-10
    assert (torch.autograd.functional.hessian(semidual, g) + hessian(g)).abs().max() < 1e-8 / eps
    values = torch.linalg.eigvalsh(hessian(g))
    assert abs(values[0]) < 1e-12 / eps and values[1] > 0
    assert semidual(g_star) >= semidual(g)

    # 2. each undamped step of the library's Newton method obeys the bound, and it arrives
    H, p, q = solver.affinity(x[None], y[None])
    start = (g_star + 0.5 * eps * torch.linspace(-1, 1, len(b), dtype=F64).sin() - q[0])[None]
    path = []
    for steps in range(7):
        f, at, taken, error = solver.newton(H.clone(), a[None], b[None], eps, start, 0, 1e-15, steps)
        path.append(at[0] + q[0])
        assert taken <= steps
    for before, after in zip(path, path[1:], strict=False):
        e, moved = before - g_star, after - g_star
        z, metric = osc(e) / eps, hessian(before)
        if z < 1e-6:
            break
        size, left = (float((h @ metric @ h).clamp_min(0).sqrt()) for h in (e, moved))
        assert left <= (math.expm1(z) - z) / z * size + 1e-9 * size
    assert osc(path[-1] - g_star) / eps < 1e-7
    assert error < 1e-11
    # Quadratic, not linear: the second half of the way costs one step.
    errors = [osc(at - g_star) / eps for at in path]
    close = [(u, v) for u, v in zip(errors, errors[1:], strict=False) if 1e-5 < u < 0.3]
    assert close and all(v < 2 * u * u for u, v in close)
