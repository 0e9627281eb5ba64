"""One test for each theorem of the chapter book/non_gradient_curl.md.

Curls, wedges and Jacobians by automatic differentiation and by differences, on random weighted clouds, against
formulas that share no code with the fields; the cross by sympy; the work on a loop against the integral of the curl.
"""

import math

import pytest
import sympy
import torch
from conftest import damaged
from numpy.polynomial.hermite_e import hermegauss
from numpy.polynomial.legendre import leggauss

import nsgf_lite as nl
from nsgf_lite import closed_forms, fields

F64 = torch.float64
CROSS = torch.tensor([[1, 0], [-1, 0]], dtype=F64), torch.tensor([[0, 1], [0, -1]], dtype=F64)
TURN = torch.arange(128, dtype=F64) * (2 * math.pi / 128)
RING = torch.stack([TURN.cos(), TURN.sin()], 1)  # counterclockwise
ALONG = torch.stack([-TURN.sin(), TURN.cos()], 1)


def problem(seed, d=2, n=6, m=5):
    g = torch.Generator().manual_seed(seed)
    x, y = torch.randn(n, d, generator=g, dtype=F64), torch.randn(m, d, generator=g, dtype=F64) + 0.5
    a, b = (torch.rand(k, generator=g, dtype=F64) + 0.2 for k in (n, m))
    return x, y, a / a.sum(), b / b.sum(), g


def curl(V, z):
    z = z.clone().requires_grad_()
    flow = V(z)
    (dx,) = torch.autograd.grad(flow[:, 0].sum(), z, retain_graph=True)
    (dy,) = torch.autograd.grad(flow[:, 1].sum(), z)
    return dy[:, 0] - dx[:, 1]


def kernel_mean(z, points, w, h):
    return torch.exp(-(torch.cdist(z, points) ** 2) / (2 * h**2)) @ w


def parts(x, y, a, b, h, z):
    """log C and psi of the population form."""
    p_tilde, q_tilde = b / kernel_mean(y, x, a, h).sqrt(), a / kernel_mean(x, x, a, h).sqrt()
    P, Q = kernel_mean(z, y, p_tilde, h).log(), kernel_mean(z, x, q_tilde, h).log()
    return P + Q + 2 * math.log(h) - (kernel_mean(z, y, b, h) * kernel_mean(z, x, a, h)).log() / 2, P - Q


def gradient(f, z):
    return torch.autograd.grad(f.sum(), z, retain_graph=True)[0]


def work(field, x, y, centre, r, a=None, b=None):
    V = field(x, y, at=torch.as_tensor(centre, dtype=F64) + r * RING, a=a, b=b)
    return float((V * ALONG).sum() * 2 * math.pi * r / len(TURN))


def jacobian(v, x, y, a, b, h=1e-4):
    def flow(flat):
        fixed = torch.Generator().manual_seed(0)
        return v(flat.reshape(x.shape), y, a=a, b=b, generator=fixed).reshape(-1)

    here, steps = x.reshape(-1), h * torch.eye(x.numel(), dtype=F64)
    return torch.stack([(flow(here + e) - flow(here - e)) / (2 * h) for e in steps], 1)


def asymmetry(J, a):
    H = a.repeat_interleave(len(J) // len(a))[:, None] * J
    return float((H - H.T).norm() / (H + H.T).norm())


# thm-wedge ------------------------------------------------------------------------------


@pytest.mark.parametrize(("seed", "h"), [(0, 0.7), (1, 1.0), (2, 1.6)])
def test_thm_wedge(seed, h):
    """Curl by automatic differentiation of the field; C and psi written out here.

    Checked by: definition.
    """
    x, y, a, b, g = problem(seed)
    z = torch.randn(7, 2, generator=g, dtype=F64).requires_grad_()
    log_C, psi = parts(x, y, a, b, h, z)
    to_C, to_psi = gradient(log_C, z), gradient(psi, z)
    C, z = log_C.exp().detach()[:, None], z.detach()

    def V(t):
        return fields.SinkhornProxy(h * h)(x, y, at=t, a=a, b=b)

    assert (V(z) - C * to_psi).abs().max() < 1e-13
    wedge = C[:, 0] * (to_C[:, 0] * to_psi[:, 1] - to_C[:, 1] * to_psi[:, 0])
    assert (curl(V, z) - wedge).abs().max() < 1e-12
    assert wedge.abs().max() > 1e-3
    damaged("the wedge turned round", (curl(V, z) + wedge).abs().max() < 1e-6)
    damaged("C > 0 dropped: psi rises along -V too", (parts(x, y, a, b, h, z - 1e-3 * V(z))[1] > psi).any())
    # Without the factor nothing is left; and psi rises along the frozen flow.
    assert curl(lambda t: V(t) / parts(x, y, a, b, h, t)[0].exp()[:, None], z).abs().max() < 1e-12
    path = nl.follow(lambda points, data: V(points), z, y, step=0.02, steps=60, method="heun")
    climb = torch.stack([parts(x, y, a, b, h, t)[1] for t in path]).diff(dim=0)
    assert climb.min() > -1e-12 and climb[0].min() > 0
    # Dependent gradients: data and model on one line, and a field that depends on one coordinate.
    flat, line = x * torch.tensor([1.0, 0.0]), y * torch.tensor([1.0, 0.0])
    # C then depends on both coordinates, psi on one: on the line itself the wedge vanishes, off it it does not.
    on_line = torch.cat([z[:, :1], torch.zeros(7, 1, dtype=F64)], 1)
    assert curl(lambda t: fields.SinkhornProxy(h * h)(flat, line, at=t, a=a, b=b), on_line).abs().max() < 1e-12
    assert curl(lambda t: fields.SinkhornProxy(h * h)(flat, line, at=t, a=a, b=b), z).abs().max() > 1e-3
    # In three dimensions the field is orthogonal to its curl.
    x, y, a, b, g = problem(seed, d=3)
    z = torch.randn(1, 3, generator=g, dtype=F64)
    J = torch.autograd.functional.jacobian(lambda t: fields.SinkhornProxy(h * h)(x, y, at=t, a=a, b=b)[0], z)[:, 0]
    swirl = torch.stack([J[2, 1] - J[1, 2], J[0, 2] - J[2, 0], J[1, 0] - J[0, 1]])
    v = fields.SinkhornProxy(h * h)(x, y, at=z, a=a, b=b)[0]
    assert swirl.norm() > 1e-4 and abs(swirl @ v) < 1e-12


# thm-cross-curl -------------------------------------------------------------------------


@pytest.mark.parametrize("h", [0.6, 1.0, 2.0])
def test_thm_cross_curl(h):
    """From the definition, by symbols and by automatic differentiation.

    Checked by: computer algebra, definition.
    """
    g = torch.Generator().manual_seed(0)
    z = 1.5 * torch.randn(9, 2, generator=g, dtype=F64)
    half = torch.full((2,), 0.5, dtype=F64)

    def V(t):
        return fields.SinkhornProxy(h * h)(*CROSS, at=t)

    s, t = torch.tanh(z / h**2).unbind(1)
    C = h**2 * (2 * math.exp(1 / h**2) / (1 + math.exp(-2 / h**2))) ** 0.5
    C = C * (kernel_mean(z, CROSS[1], half, h) * kernel_mean(z, CROSS[0], half, h)).sqrt()
    swirl = -C / h**4 * (z[:, 0] * t + z[:, 1] * s - s * t)
    assert (V(z) - (C / h**2)[:, None] * torch.stack([-s, t], 1)).abs().max() < 1e-13
    assert (closed_forms.cross_velocity(z, h) - V(z)).abs().max() < 1e-13
    assert (curl(V, z) - swirl).abs().max() < 1e-12
    assert (closed_forms.cross_curl(z, h) - swirl).abs().max() < 1e-13
    damaged("the bracket without its product", (curl(V, z) + C / h**4 * (z[:, 0] * t + z[:, 1] * s)).abs().max() < 1e-6)
    damaged("h^2 for h^4", h != 1 and (curl(V, z) - swirl * h**2).abs().max() < 1e-6)
    log_C, _ = parts(*CROSS, half, half, h, z)
    assert (log_C.exp() - C).abs().max() < 1e-13
    if h != 1.0:
        return
    # sympy, from the definition: the curl over C, identically, and the two numbers.
    X, Y = sympy.symbols("x y", real=True)

    def smooth(atoms, at=(X, Y), w=(1, 1)):
        squares = [(at[0] - u) ** 2 + (at[1] - v) ** 2 for u, v in atoms]
        return sum(m * sympy.exp(-r / 2) for m, r in zip(w, squares, strict=True)) / 2

    q, p = [(1, 0), (-1, 0)], [(0, 1), (0, -1)]
    tilde = [smooth(atoms, w=[1 / sympy.sqrt(smooth(q, at=t)) for t in atoms]) for atoms in (p, q)]
    factor = tilde[0] * tilde[1] / sympy.sqrt(smooth(p) * smooth(q))
    flow = [factor * sympy.diff(sympy.log(tilde[0] / tilde[1]), t) for t in (X, Y)]
    symbolic = sympy.diff(flow[1], X) - sympy.diff(flow[0], Y)
    number = sympy.lambdify((X, Y), (symbolic, symbolic / factor), "math")
    one = torch.ones(1, 2, dtype=F64)
    for value, ratio in (
        (number(1, 1)),
        (float(curl(V, one)), float(curl(V, one) / parts(*CROSS, half, half, 1, one)[0].exp())),
    ):
        assert value == pytest.approx(-0.710614, abs=5e-7)
        assert ratio == pytest.approx(-0.943163, abs=5e-7)
    assert -(2 * math.tanh(1) - math.tanh(1) ** 2) == pytest.approx(-0.943163, abs=5e-7)
    for (u, v), c in zip(z.tolist(), swirl.tolist(), strict=True):
        assert number(u, v)[0] == pytest.approx(c, abs=1e-11)
    assert (torch.sign(swirl) == -torch.sign(z.prod(1))).all()
    # Blurred, the curl tends to that of the atoms, at the rate of the variance.
    line, mass = map(torch.from_numpy, hermegauss(5))
    nodes, mass = torch.cartesian_prod(line, line), torch.outer(mass, mass).reshape(-1).repeat(2)
    mass = mass / mass.sum()
    gaps = []
    for sigma in (0.2, 0.1, 0.05):
        x, y = ((c[:, None] + sigma * nodes).reshape(-1, 2) for c in CROSS)
        blurred = curl(lambda t, x=x, y=y: fields.SinkhornProxy(1.0)(x, y, at=t, a=mass, b=mass), one)
        gaps.append(float((blurred + 0.710614).abs()))
        assert float(blurred) < -0.5
    assert gaps[0] / gaps[1] == pytest.approx(4, rel=0.2) and gaps[1] / gaps[2] == pytest.approx(4, rel=0.2)


# thm-loop-work --------------------------------------------------------------------------


@pytest.mark.parametrize(("seed", "eps"), [(0, 0.3), (1, 1.0), (2, 3.0)])
def test_thm_loop_work(seed, eps):
    """Trapezoidal sums on circles against integrals over discs.

    Checked by: quadrature, closed form.
    """
    # Stokes on the cross, by Gauss-Legendre in the radius; small circles; the lap of the chapter.
    proxy = fields.SinkhornProxy(1.0)
    nodes, w = (torch.from_numpy(t) for t in leggauss(24))
    c = torch.tensor([1.0, 1.0], dtype=F64)
    for centre, r in (((1.0, 1.0), 1.0), ((1.0, 1.0), 0.5 + seed), ((-0.3, 0.8), 0.7)):
        radius = r * (nodes + 1) / 2
        disc = torch.tensor(centre, dtype=F64) + radius[:, None, None] * RING
        swirl = closed_forms.cross_curl(disc.reshape(-1, 2)).reshape(24, -1).mean(1)
        flux = float(math.pi * r * (w * radius * swirl).sum())
        assert work(proxy, *CROSS, centre, r) == pytest.approx(flux, abs=1e-10)
    assert work(proxy, *CROSS, c, 1.0) == pytest.approx(-1.441159, abs=5e-7)
    assert abs(work(proxy, *CROSS, (0.0, 0.0), 0.5 + seed)) < 1e-13
    swirl = closed_forms.cross_curl
    e, d = torch.eye(2, dtype=F64), 1e-3
    laplacian = sum(swirl(c + s * u) - swirl(c[None]) for u in e[:, None] for s in (d, -d)) / d**2
    two_terms = [math.pi * r**2 * float(swirl(c[None])) + math.pi * r**4 / 8 * float(laplacian) for r in (0.2, 0.1)]
    remainder = [work(proxy, *CROSS, c, r) - two for r, two in zip((0.2, 0.1), two_terms, strict=True)]
    assert remainder[0] / remainder[1] == pytest.approx(64, rel=0.1)
    one_term = [work(proxy, *CROSS, c, r) - math.pi * r**2 * float(swirl(c[None])) for r in (0.2, 0.1)]
    damaged("one term leaves a remainder of sixth order", one_term[0] / one_term[1] > 32)
    # A hole in the disc: no curl where the field is defined, and a full turn for a lap.
    around = RING.flip(1) * torch.tensor([-1.0, 1.0])
    damaged("a field defined off the centre only pays nothing without curl", abs((around * ALONG).sum()) < 1e-6)
    # Random clouds: the one-shot field works, the Sinkhorn field does not, converged or not; nor do smoothed scores.
    x, y, a, b, _ = problem(seed, n=7, m=9)
    assert abs(work(fields.SinkhornProxy(eps), x, y, (0.3, 0.2), 1.0, a, b)) > 1e-3
    for field in (fields.Sinkhorn(eps, tol=1e-9), fields.Sinkhorn(eps, tol=0.5), fields.ScoreDifference(eps**0.5)):
        V = field(x, y, at=torch.tensor([0.3, 0.2], dtype=F64) + RING, a=a, b=b)
        assert V.norm(dim=1).max() > 0.05
        assert abs(work(field, x, y, (0.3, 0.2), 1.0, a, b)) < 1e-10


# thm-gaussian-curl ----------------------------------------------------------------------


@pytest.mark.parametrize(("A", "B", "h"), [((1.5, 0.5), (1.0, 1.0), 1.2), ((0.4, 0.9), (0.7, 0.3), 1.0)])
def test_thm_gaussian_curl(A, B, h):
    """The library's field on quadrature nodes of the two laws.

    Checked by: quadrature.
    """
    line, mass = map(torch.from_numpy, hermegauss(20))
    nodes, mass = torch.cartesian_prod(line, line), torch.outer(mass, mass).reshape(-1)
    mass = mass / mass.sum()
    A, B = torch.tensor(A, dtype=F64), torch.tensor(B, dtype=F64)
    z = torch.randn(6, 2, generator=torch.Generator().manual_seed(0), dtype=F64)

    def V(t, A=A, B=B):
        return fields.SinkhornProxy(h * h)(nodes * A.sqrt(), nodes * B.sqrt(), at=t, a=mass, b=mass)

    A_tilde = 1 / (1 / A - 1 / (2 * (A + h * h))) + h * h
    B_tilde = 1 / (1 / B - 1 / (2 * (A + h * h))) + h * h
    S = 1 / A_tilde - 1 / B_tilde
    G = 1 / A_tilde + 1 / B_tilde - (1 / (A + h * h) + 1 / (B + h * h)) / 2
    v = V(z)
    C = v[:, 0] / (S[0] * z[:, 0])
    assert (v - C[:, None] * S * z).abs().max() < 1e-5
    decay = torch.exp(-(G * z**2).sum(1) / 2)
    assert (C / decay - (C / decay)[0]).abs().max() < 1e-4 * C.abs().max()
    swirl = -C * (G[0] * S[1] - G[1] * S[0]) * z.prod(1)
    assert (curl(V, z) - swirl).abs().max() < 1e-4 * swirl.abs().max() + 1e-6
    assert swirl.abs().max() > 1e-3
    plain = G + (1 / (A + h * h) + 1 / (B + h * h)) / 2
    wrong = -C * (plain[0] * S[1] - plain[1] * S[0]) * z.prod(1)
    damaged("G without the plain kernel means", (curl(V, z) - wrong).abs().max() < 1e-2 * swirl.abs().max())
    damaged("any two Gaussians have no curl", curl(V, z).abs().max() < 1e-3)
    assert curl(lambda t: V(t, A=0 * A + 0.8, B=0 * B + 0.5), z).abs().max() < 1e-6


# thm-tangent-projection -----------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_thm_tangent_projection(seed):
    """Orthogonality to gradients of polynomials; the exact Gaussian velocity.

    Checked by: quadrature, closed form.
    """
    g = torch.Generator().manual_seed(seed)
    root = torch.randn(2, 2, 2, generator=g, dtype=F64)
    A, B = root @ root.mT + 0.3 * torch.eye(2, dtype=F64)
    eps = 0.7
    M, own = closed_forms.gaussian_map(A, B, eps), closed_forms.gaussian_map(A, A, eps)
    # The regression C A^-1, transposed by mistake, moves the law as the Sinkhorn velocity does: its projection is that.
    L, K = A @ M @ torch.linalg.inv(A) - own, M - own
    values, axes = torch.linalg.eigh(A)
    right = axes.T @ (L @ A + A @ L.T) @ axes
    projected = axes @ (right / (values[:, None] + values)) @ axes.T
    assert (projected - projected.T).abs().max() < 1e-12
    assert (projected - K).abs().max() < 1e-10 and (L - K).abs().max() > 1e-2
    damaged("K is the symmetric part of L", ((L + L.T) / 2 - K).abs().max() < 1e-4)
    # A singular covariance: every symmetric K with the right values on the line solves it, and they agree there.
    flat, e = torch.diag(torch.tensor([1.0, 0.0], dtype=F64)), torch.eye(2, dtype=F64)
    solutions = [torch.diag(torch.tensor([L[0, 0], k], dtype=F64)) for k in (0.0, 5.0)]
    other = torch.diag(torch.tensor([L[0, 0], 0.0], dtype=F64))
    assert all(torch.equal(U @ flat + flat @ U, other @ flat + flat @ other) for U in solutions)
    damaged("a singular covariance determines K", torch.equal(*solutions))
    assert torch.equal(solutions[0] @ e[0], solutions[1] @ e[0])
    # The same from the velocity as a function, at finitely many points.
    v = closed_forms.gaussian_velocity(torch.zeros(2, dtype=F64), A, torch.zeros(2, dtype=F64), B, eps)
    points = torch.randn(5, 2, generator=g, dtype=F64)
    assert (v(points) - points @ projected.T).abs().max() < 1e-10
    # Pythagoras, and no gradient sees the rest: quadrature against gradients of cubic and quartic polynomials.
    energy = [float((U @ A @ U.T).trace()) for U in (L, projected, L - projected)]
    assert energy[0] == pytest.approx(energy[1] + energy[2], rel=1e-12)
    line, mass = map(torch.from_numpy, hermegauss(8))
    nodes, mass = torch.cartesian_prod(line, line), torch.outer(mass, mass).reshape(-1)
    mass, x = mass / mass.sum(), nodes @ torch.linalg.cholesky(A).T
    u, w = x.unbind(1)
    for slope in ([3 * u**2 * w, u**3], [2 * u * w**2, 2 * u**2 * w], [w, u], [4 * u**3, 0 * u]):
        seen = torch.stack(slope, 1)
        assert abs(mass @ (seen * (x @ (L - projected).T)).sum(1)) < 1e-10
    # On finitely many points every field is a gradient: bumps of one quarter of the least distance.
    x, y, a, b, _ = problem(seed)
    v = fields.SinkhornProxy(0.5)(x, y, a=a, b=b)
    radius = torch.cdist(x, x).fill_diagonal_(torch.inf).min() / 4
    z = x.clone().requires_grad_()
    away = z[:, None] - x
    bump = (1 - (away.square().sum(-1) / radius**2).clamp_max(1) ** 2) ** 2
    (slope,) = torch.autograd.grad((bump * (away * v).sum(-1)).sum(), z)
    assert (slope - v).abs().max() < 1e-12


# thm-second-variation -------------------------------------------------------------------


def squared_mmd(x, y, a, b, h):
    """From its definition, all pairs."""
    z, w = torch.cat([x, y]), torch.cat([a, -b])
    return w @ kernel_mean(z, z, w, h)


GRADIENTS = {
    "sinkhorn": (
        fields.Sinkhorn(0.8, tol=1e-12),
        lambda x, y, a, b: nl.sinkhorn_divergence(x, y, 0.8, a, b, tol=1e-12),
    ),
    "mmd": (fields.MMD(1.1), lambda x, y, a, b: squared_mmd(x, y, a, b, 1.1)),
    "laplace": (fields.MMD(1.1, "laplace"), None),
    "drmmd": (fields.DrMMD(0.1, 1.1), None),
    "kale": (fields.KALE(0.1, 1.1, tol=1e-16), None),
    "sliced": (fields.SlicedWasserstein(20), None),
    "exact": (fields.Wasserstein(), lambda x, y, a, b: nl.metrics.w2(x, y, a, b) ** 2 / 2),
}


@pytest.mark.parametrize("name", GRADIENTS)
@pytest.mark.parametrize("d", [1, 2])
def test_thm_second_variation(name, d):
    """Jacobians by differences; slopes of the functionals' values by differences.

    Checked by: finite differences, definition.
    """
    v, F = GRADIENTS[name]
    x, y, a, b, g = problem(d, d=d, n=4, m=5)
    J = jacobian(v, x, y, a, b)
    assert asymmetry(J, a) < 1e-7
    # Not by being blind: with other weights the same matrix is not symmetric (where particles see one another).
    if name in ("sinkhorn", "mmd", "laplace", "drmmd", "kale"):
        assert asymmetry(J, a.flip(0)) > 1e-3
        damaged("the matrix of the velocities is symmetric without the weights", asymmetry(J, a * 0 + 1) < 1e-4)

    def pulled(x, y, at=None, a=None, b=None, generator=None):
        return -(1 + a @ (x - a @ x).square().sum(1)) * x  # half the second moment falls along it

    assert float(a @ (x * pulled(x, y, a=a)).sum(1)) < 0
    damaged("a field along which a functional falls is symmetric", asymmetry(jacobian(pulled, x, y, a, b), a) < 1e-3)
    # Part 2's potential is the functional, up to a constant.
    if F is None:
        return
    t, w = (torch.from_numpy(s) for s in leggauss(10))

    def potential(X):
        work = [float((a[:, None] * v(s * X, y, a=a, b=b) * X).sum()) for s in (t + 1) / 2]
        return -float(w @ torch.tensor(work, dtype=F64)) / 2

    other = x + 0.1 * torch.randn(4, d, generator=g, dtype=F64)
    difference = float(F(other, y, a, b) - F(x, y, a, b))
    assert potential(other) - potential(x) == pytest.approx(difference, abs=1e-6 if name == "sinkhorn" else 0.1)
    # and its slope is the force, weight by weight.
    h = 1e-4
    for i in range(4):
        push = torch.zeros_like(x)
        push[i, 0] = h
        slope = float(F(x + push, y, a, b) - F(x - push, y, a, b)) / (2 * h)
        assert slope == pytest.approx(-float(a[i] * v(x, y, a=a, b=b)[i, 0]), abs=1e-6)


# thm-kl-field-not-a-gradient ------------------------------------------------------------


@pytest.mark.parametrize("d", [1, 2, 3])
@pytest.mark.parametrize(("h", "left"), [(1.0, 0.8), (0.6, 0.3), (1.5, 0.45)])
def test_thm_kl_field_not_a_gradient(d, h, left):
    """Jacobians of the field by differences against the formula for two particles.

    Checked by: finite differences, closed form.
    """
    v = fields.ScoreDifference(h)
    x, y, a, b, g = problem(d, d=d, n=2, m=4)
    a1, a2 = left, 1 - left
    a = torch.tensor([a1, a2], dtype=F64)
    D = float((x[1] - x[0]).norm())
    e, kappa = (x[1] - x[0]) / D, math.exp(-(D**2) / (2 * h**2))
    Q1, Q2 = a1 + a2 * kappa, a2 + a1 * kappa
    J = jacobian(v, x, y, a, b, h=1e-5)
    H = a.repeat_interleave(d)[:, None] * J
    gap = float(e @ (H[:d, d:] - H[d:, :d].T) @ e)
    formula = -a1 * a2 * kappa * (1 / Q1 - 1 / Q2 - D**2 / h**2 * (a1 / Q1**2 - a2 / Q2**2))
    assert gap == pytest.approx(formula, abs=1e-9) and abs(formula) > 1e-6
    damaged("the Jacobian of two unequal particles is symmetric", abs(gap) < 1e-7)
    one_pull = -a1 * a2 * kappa * (1 / Q1 - 1 / Q2)
    damaged("the asymmetry without its second bracket", abs(gap - one_pull) < 1e-3 * abs(gap))
    # The pair pushes itself: data a single point, whose pull is y - x.
    alone = v(x, y[:1], a=a)
    force = a @ alone - (y[0] - a @ x)
    assert (force - a1 * a2 * D * kappa * (a1 - a2) * (1 - kappa) / (Q1 * Q2) * e).abs().max() < 1e-12
    assert force.norm() > 1e-4
    # Equal weights: none of it for two, all of it for three; no curl in the place for either.
    assert asymmetry(jacobian(v, x, y, a * 0 + 0.5, b), a * 0 + 0.5) < 1e-8
    three = torch.cat([x, x[1:] + 0.3])
    third = torch.full((3,), 1 / 3, dtype=F64)
    assert asymmetry(jacobian(v, three, y, third, b), third) > 1e-3
    z = torch.randn(1, d, generator=g, dtype=F64)
    P = torch.autograd.functional.jacobian(lambda t: v(x, y, at=t, a=a, b=b)[0], z)[:, 0]
    assert (P - P.T).abs().max() < 1e-13
    # One convolution more repairs it.
    if d == 1:
        true = fields.SmoothedKL(h, nodes=40)
        assert asymmetry(jacobian(true, x, y, a, b), a) < 1e-4 * asymmetry(J, a) + 1e-8
