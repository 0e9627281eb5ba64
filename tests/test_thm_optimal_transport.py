"""One test for each theorem of the chapter book/optimal_transport.md.

Stricter than the chapter's cells: several seeds, unequal weights, clouds
of different sizes, float64.  The oracles (cost, soft transform, primal and
dual values) are written out here, so that they share no code with the
library.
"""

import math
import re
from decimal import Decimal, getcontext

import ot
import pytest
import torch
from conftest import ROOT, damaged, sharp

import nsgf_lite as nl
from nsgf_lite.closed_forms import gaussian_map, gaussian_ot, two_atom_mass

F64 = torch.float64


def problem(seed, n=7, m=11, d=2, spread=1.0):
    """Two weighted clouds of different sizes; nothing uniform."""
    generator = torch.Generator().manual_seed(seed)
    x = spread * torch.randn(n, d, generator=generator, dtype=F64)
    y = spread * torch.randn(m, d, generator=generator, dtype=F64) + 0.5
    a = torch.rand(n, generator=generator, dtype=F64) + 0.2
    b = torch.rand(m, generator=generator, dtype=F64) + 0.2
    return x, y, a / a.sum(), b / b.sum(), generator


def cost(x, y):
    return 0.5 * ((x[:, None, :] - y[None, :, :]) ** 2).sum(-1)


def transform(g, b, c, eps):
    """The soft c-transform: -eps log sum_j b_j exp((g_j - c_ij)/eps)."""
    return -eps * torch.logsumexp((g - c) / eps + b.log(), dim=-1)


def primal(pi, c, a, b, eps):
    return ((pi * c).sum() + eps * torch.xlogy(pi, pi / (a[:, None] * b)).sum()).item()


def dual(f, g, c, a, b, eps):
    mass = (a[:, None] * b * torch.exp((f[:, None] + g - c) / eps)).sum()
    return (a @ f + b @ g - eps * (mass - 1)).item()


def oscillation(h):
    return (h.max() - h.min()).item()


def entropy(a):
    return -torch.xlogy(a, a).sum().item()


def test_proofs_lean_on_each_other_in_no_circle():
    """Duality needs the contraction, the contraction must not need duality; so in every chapter."""
    proof = re.compile(r":name: proof-(\S+)\n(.*?)^:::$", re.S | re.M)
    uses = {}
    for chapter in (ROOT / "book").glob("*.md"):
        for name, text in proof.findall(chapter.read_text(encoding="utf-8")):
            uses[f"thm-{name}"] = set(re.findall(r"\{prf:ref\}`(thm-[\w-]+)`", text))
    assert "thm-birkhoff" in uses["thm-entropic-duality"] and not uses["thm-birkhoff"]
    while uses:
        free = [name for name, needs in uses.items() if not needs & uses.keys()]
        assert free, f"each of these proofs refers to another of them: {uses}"
        for name in free:
            del uses[name]


@pytest.mark.parametrize("eps", [0.3, 2.0])
@pytest.mark.parametrize("seed", range(3))
def test_thm_entropic_duality(seed, eps):
    """What the plan costs, computed from the plan, is what the prices earn; POT's plan costs the same.

    Checked by: primal value, another library, linear program.
    """
    x, y, a, b, generator = problem(seed)
    c = cost(x, y)
    f, g = nl.potentials(x, y, eps, a, b, tol=1e-12)
    pi = nl.plan(x, y, eps, a, b, tol=1e-12)
    best = primal(pi, c, a, b, eps)

    # the plan is a coupling, and of the stated form
    assert (pi.sum(1) - a).abs().sum() < 1e-12
    assert (pi.sum(0) - b).abs().sum() < 1e-12
    density = torch.exp((f[:, None] + g - c) / eps)
    assert (pi - a[:, None] * b * density).abs().max() < 1e-13

    # strong duality: the library's plan and POT's, the dual value, and what the library calls the cost
    other = ot.bregman.sinkhorn_log(a, b, c, eps, numItermax=20000, stopThr=1e-13)
    assert (pi - other).abs().max() < 1e-10
    assert abs(primal(other, c, a, b, eps) - best) < 1e-10
    assert abs(dual(f, g, c, a, b, eps) - best) < 1e-10
    assert abs(nl.entropic_cost(x, y, eps, a, b, tol=1e-12).item() - best) < 1e-10
    exact = ot.emd2(a.numpy(), b.numpy(), c.numpy())
    assert exact < best < exact + eps * min(entropy(a), entropy(b))

    # every other coupling costs more, every other pair is worth less, and
    # the gap is the integral of the defect in Young's inequality
    for _ in range(5):
        i, k = torch.randperm(len(a), generator=generator)[:2]
        j, ell = torch.randperm(len(b), generator=generator)[:2]
        shift = torch.zeros_like(pi)
        amount = 0.7 * torch.minimum(pi[i, j], pi[k, ell])
        shift[i, j] = shift[k, ell] = -amount
        shift[i, ell] = shift[k, j] = amount
        costlier = primal(pi + shift, c, a, b, eps)
        assert costlier > best + 1e-8

        f1 = f + 0.2 * torch.randn(len(f), generator=generator, dtype=F64)
        g1 = g + 0.2 * torch.randn(len(g), generator=generator, dtype=F64)
        poorer = dual(f1, g1, c, a, b, eps)
        assert poorer < best - 1e-8

        r = (pi + shift) / (a[:, None] * b)
        phi = (f1[:, None] + g1 - c) / eps
        defect = torch.xlogy(r, r) - r - r * phi + phi.exp()
        gap = eps * (a[:, None] * b * defect).sum().item()
        assert defect.min() > -1e-12
        assert abs(costlier - poorer - gap) < 1e-10
    assert abs(dual(f + 3, g - 3, c, a, b, eps) - best) < 1e-10  # a constant is free, part 2

    damaged("weak duality without the exponential term", (a @ (f + 0.1) + b @ g).item() <= best)
    damaged("the plan at half the temperature is a coupling", abs((a @ density**2 @ b).item() - 1) < 1e-3)
    damaged("the value is the transport cost alone", abs((pi * c).sum().item() - best) < 1e-3)


def test_entropic_duality_of_one_point():
    """One point has one coupling: the product, whose entropy is zero."""
    x, y, _, b, _ = problem(3)
    pi = nl.plan(x[:1], y, 0.4, None, b)
    assert (pi - b).abs().max() < 1e-15
    assert abs(nl.entropic_cost(x[:1], y, 0.4, None, b).item() - (cost(x[:1], y) @ b).item()) < 1e-12


def test_potentials_may_be_infinite_off_an_unbounded_support():
    """Two points against (1+|y|)^-4: f = (x^2-1)/2 - log int e^{xy}/cosh y dnu, and no number beyond the points."""
    x = torch.tensor([[-1.0], [1.0]], dtype=F64)
    places = torch.tensor([[1.0], [0.3], [1.2]], dtype=F64)
    beyond = []
    for radius in (30, 100, 300):
        y = torch.linspace(-radius, radius, 20 * radius + 1, dtype=F64)[:, None]
        b = (1 + y[:, 0].abs()) ** -4
        b = b / b.sum()
        f = nl.barycentric_map(x, y, 1.0, b=b, tol=1e-13).potential(places)
        mass = torch.logsumexp(places * y.T - torch.logaddexp(y, -y).T + math.log(2) + b.log(), 1)
        formula = (places[:, 0] ** 2 - 1) / 2 - mass
        assert ((f - f[0]) - (formula - formula[0])).abs().max() < 1e-10
        beyond.append((f[2] - f[0]).item())
        assert abs((f[1] - f[0]).item()) < 0.5
    assert beyond[0] > beyond[1] + 3 and beyond[1] > beyond[2] + 30


@pytest.mark.parametrize("eps", [0.25, 1.5])
@pytest.mark.parametrize("seed", range(3))
def test_thm_sinkhorn_equations(seed, eps):
    """The equations, the ascent and the value, each from its definition; uniqueness by iterating from elsewhere.

    Checked by: definition, simulation, primal value.
    """
    x, y, a, b, generator = problem(seed)
    c = cost(x, y)
    f, g = nl.potentials(x, y, eps, a, b, tol=1e-12)
    assert (f - transform(g, b, c, eps)).abs().max() < 1e-10
    assert (g - transform(f, a, c.T, eps)).abs().max() < 1e-10

    # both equations: the mass is one, and <mu,f> + <nu,g> is what the plan costs
    pi = a[:, None] * b * torch.exp((f[:, None] + g - c) / eps)
    value = (a @ f + b @ g).item()
    assert abs(pi.sum().item() - 1) < 1e-12
    assert abs(primal(pi, c, a, b, eps) - value) < 1e-10
    # one equation: the mass is one, the value lower
    start = torch.randn(len(a), generator=generator, dtype=F64)
    lone = transform(start, a, c.T, eps)
    assert abs((a @ torch.exp((start[:, None] + lone - c) / eps) @ b).item() - 1) < 1e-12
    assert abs(dual(start, lone, c, a, b, eps) - (a @ start + b @ lone).item()) < 1e-12
    damaged("one equation is enough for the value", (a @ start + b @ lone).item() > value - 1e-3)

    # uniqueness up to a constant: solve from elsewhere
    f1, g1 = start, None
    for _ in range(3000):
        g1 = transform(f1, a, c.T, eps)
        f1 = transform(g1, b, c, eps)
    assert oscillation(f1 - f) < 1e-9
    assert oscillation(g1 - g) < 1e-9
    assert abs((f1 - f).mean() + (g1 - g).mean()) < 1e-9
    damaged("unique, constants and all", (f1 - f).abs().max() < 1e-3)

    # the extension obeys the equation at points far from the cloud too
    T = nl.barycentric_map(x, y, eps, a, b, tol=1e-12)
    points = 3 * torch.randn(9, 2, generator=generator, dtype=F64)
    extended = T.potential(points)
    g2 = T.solution.g
    assert (extended - transform(g2, b, cost(points, y), eps)).abs().max() < 1e-12
    assert (T.potential(x) - T.solution.f).abs().max() < 1e-10

    # a half step raises the dual by eps <mu, e^s - 1 - s>
    f0, g0 = f + 0.3 * start, g
    better = transform(g0, b, c, eps)
    s = (f0 - better) / eps
    rise = eps * (a @ (s.exp() - 1 - s)).item()
    gain = dual(better, g0, c, a, b, eps) - dual(f0, g0, c, a, b, eps)
    assert rise > 0 and abs(gain - rise) < 1e-10
    damaged(
        "the rise is that of its quadratic term",
        abs(gain - eps * (a @ s**2).item() / 2) < 0.1 * abs(gain - rise) + 1e-6,
    )

    # a transform is Lipschitz with the constant of the cost, however wild g is
    wild = 50 * torch.randn(len(b), generator=generator, dtype=F64)
    steps = (transform(wild, b, c, eps)[:, None] - transform(wild, b, c, eps)).abs()
    middle = (x[:, None] + x[None]) / 2
    reach = (middle[:, :, None] - y).norm(dim=-1).max()
    assert (steps <= reach * torch.cdist(x, x) + 1e-12).all()
    pole = torch.tensor([[2.0, 0.0]], dtype=F64)  # one goal, and two places in line with it
    line = torch.tensor([[0.0, 0.0], [-0.5, 0.0]], dtype=F64)
    change = transform(torch.zeros(1, dtype=F64), torch.ones(1, dtype=F64), cost(line, pole), eps).diff().abs()
    sharp(change, 2.25 * 0.5)


@pytest.mark.parametrize("eps", [0.3, 1.0])
@pytest.mark.parametrize("d", [1, 2, 3])
def test_thm_potential_gradient(d, eps):
    """Gradient and slope by central differences of the extended potential; the bound reached by two opposite points.

    Checked by: finite differences, closed form.
    """
    x, y, a, b, generator = problem(10 + d, n=6, m=9, d=d)
    T = nl.barycentric_map(x, y, eps, a, b, tol=1e-12)
    g = T.solution.g
    points = torch.cat([x, 2 * torch.randn(4, d, generator=generator, dtype=F64)])

    def at(step):
        return T.potential(points + step), T(points + step)

    h = 1e-4
    gradient = torch.empty_like(points)
    jacobian = torch.empty(len(points), d, d, dtype=F64)
    for k in range(d):
        step = h * torch.eye(d, dtype=F64)[k]
        (f_up, t_up), (f_down, t_down) = at(step), at(-step)
        gradient[:, k] = (f_up - f_down) / (2 * h)
        jacobian[:, :, k] = (t_up - t_down) / (2 * h)

    assert (gradient - (points - T(points))).abs().max() < 5e-8 / eps**2
    weight = torch.softmax((g - cost(points, y)) / eps + b.log(), dim=1)
    mean = weight @ y
    assert (T(points) - mean).abs().max() < 1e-12
    offset = y[None] - mean[:, None]
    covariance = torch.einsum("pj,pjk,pjl->pkl", weight, offset, offset)
    assert (jacobian - covariance / eps).abs().max() < 5e-7 / eps**3
    assert (jacobian - jacobian.mT).abs().max() < 5e-7 / eps**3
    eigenvalues = torch.linalg.eigvalsh((jacobian + jacobian.mT) / 2)
    centre = (y.max(0).values + y.min(0).values) / 2
    radius = (y - centre).norm(dim=1).max().item()
    assert eigenvalues.min() > -1e-6
    assert eigenvalues.max() <= radius**2 / eps + 1e-6
    damaged("the gradient without the one half of the cost", (gradient - 2 * (points - T(points))).abs().max() < 0.1)
    if eps != 1:
        damaged("the slope is the covariance, not over eps", (jacobian - covariance).abs().max() < 0.01)

    # two opposite points, one pair: T(x) = tanh(<x,y>/eps) y, with slope R^2/eps at 0
    ends = torch.zeros(2, d, dtype=F64)
    ends[0], ends[1] = 0.6, -0.6
    radius2 = (ends[0] @ ends[0]).item()
    opposite = nl.barycentric_map(x[:2] - x[:2].mean(0), ends, eps, tol=1e-12)
    exact = torch.tanh(points @ ends[0] / eps)[:, None] * ends[0]
    assert (opposite(points) - exact).abs().max() < 1e-10
    step = 1e-4 * ends[:1]
    slope = ((opposite(step) - opposite(-step)).norm() / (2e-4 * radius2**0.5)).item()
    sharp(slope, radius2 / eps)
    damaged("half the bound", slope <= radius2 / (2 * eps))

    # one goal only: a constant map
    single = nl.barycentric_map(x, y[:1], eps, a)
    assert (single(points) - y[0]).abs().max() < 1e-12


def ball(n, d, radius, generator):
    direction = torch.randn(n, d, generator=generator, dtype=F64)
    length = torch.rand(n, 1, generator=generator, dtype=F64) ** (1 / d)
    return radius * length * direction / direction.norm(dim=1, keepdim=True)


@pytest.mark.parametrize("eps", [0.7, 1.5, 4.0])
@pytest.mark.parametrize("seed", range(3))
def test_thm_birkhoff(seed, eps):
    """The iteration, written out, against the library's potentials; two atoms reach every constant.

    Checked by: simulation, definition.
    """
    generator = torch.Generator().manual_seed(seed)
    radius, n, m = 1.0, 9, 13
    x = ball(n, 2, radius, generator)
    y = ball(m, 2, radius, generator) + torch.tensor([5.0, -2.0], dtype=F64)
    a = torch.rand(n, generator=generator, dtype=F64) + 0.1
    b = torch.rand(m, generator=generator, dtype=F64) + 0.1
    a, b = a / a.sum(), b / b.sum()
    c, kappa = cost(x, y), math.tanh(radius**2 / eps)

    # 1. one transform contracts, whatever the two functions are
    for size in (1e-3, 1.0, 30.0):
        f0 = size * torch.randn(n, generator=generator, dtype=F64)
        f1 = size * torch.randn(n, generator=generator, dtype=F64)
        change = transform(f1, a, c.T, eps) - transform(f0, a, c.T, eps)
        assert oscillation(change) <= kappa * oscillation(f1 - f0) + 1e-12

    # 2. the iteration runs to the library's potentials at that rate
    f, g = nl.potentials(x, y, eps, a, b, tol=1e-13)
    fk = torch.randn(n, generator=generator, dtype=F64)
    start, errors = oscillation(fk - f), []
    for k in range(1, 60):
        gk = transform(fk, a, c.T, eps)
        before, fk = fk, transform(gk, b, c, eps)
        errors.append(oscillation(fk - f))
        assert errors[-1] <= kappa ** (2 * k) * start + 1e-11
        assert oscillation(gk - g) <= kappa ** (2 * k - 1) * start + 1e-11
        # 3. the marginal error is bounded by the change of the potential
        row = (b * torch.exp((before[:, None] + gk - c) / eps)).sum(1)
        bound = 2 * math.tanh(oscillation(before - fk) / (4 * eps))
        assert (a @ (row - 1).abs()).item() <= bound + 1e-12
    assert errors[-1] < 1e-11

    # sharp: two atoms of equal weight at distance 2 R, for one transform and for many
    pair = torch.tensor([[-1.0], [1.0]], dtype=F64)
    half, square = torch.full((2,), 0.5, dtype=F64), cost(pair, pair)
    h = 1e-4 * torch.tensor([1.0, -1.0], dtype=F64)
    once = transform(h, half, square, eps)
    sharp(oscillation(once), kappa * oscillation(h), at_least=1 - 1e-6)
    damaged("tanh(R^2 / 2 eps)", oscillation(once) <= math.tanh(1 / (2 * eps)) * oscillation(h))
    many = h
    for _ in range(4):
        many = transform(transform(many, half, square, eps), half, square, eps)
    own = nl.potentials(pair, pair.clone(), eps, tol=1e-14).f
    sharp(oscillation(many - own), kappa**8 * oscillation(h), at_least=1 - 1e-6)
    damaged("kappa^(2k+1) after k steps", oscillation(many - own) <= kappa**9 * oscillation(h))

    # sharp, part 3: densities e^-1 and e against one point
    share = (math.e - 1) / (math.e - 1 / math.e)
    weight, one = torch.tensor([share, 1 - share], dtype=F64), torch.ones(1, dtype=F64)
    column = square[:, :1]
    first = torch.tensor([-eps, eps], dtype=F64) + column[:, 0]
    second = transform(transform(first, weight, column.T, eps), one, column, eps)
    error = (weight @ (((first - second) / eps).exp() - 1).abs()).item()
    sharp(error, 2 * math.tanh(oscillation(first - second) / (4 * eps)), at_least=1 - 1e-9)
    damaged("tanh without its 2", error <= math.tanh(oscillation(first - second) / (4 * eps)))

    # a support of one point: radius zero, and one step is enough
    lone = transform(transform(f0[:1], one, c[:1].T, eps), b, c[:1], eps)
    assert oscillation(lone) == 0


@pytest.mark.parametrize("eps", [0.4, 1.0, 3.0])
@pytest.mark.parametrize("seed", range(3))
def test_thm_local_rate(seed, eps):
    """The rate measured on the iteration, the correlation from the library's plan and from its definition.

    Checked by: simulation, definition, closed form.
    """
    generator = torch.Generator().manual_seed(seed)
    n, m = 8, 11
    x, y = ball(n, 2, 1.0, generator), ball(m, 2, 1.0, generator)
    a = torch.rand(n, generator=generator, dtype=F64) + 0.1
    b = torch.rand(m, generator=generator, dtype=F64) + 0.1
    a, b = a / a.sum(), b / b.sum()
    c = cost(x, y)
    f, g = nl.potentials(x, y, eps, a, b, tol=1e-14)
    pi = nl.plan(x, y, eps, a, b, tol=1e-14)
    sigma = torch.linalg.svdvals(pi / (a[:, None] * b).sqrt())
    assert abs(sigma[0] - 1) < 1e-12 and sigma[1] <= math.tanh(1 / eps)

    def norm(e, weight):
        return (weight @ e**2).sqrt().item()

    def centred(e, weight):
        return e - weight @ e

    # the definition: raise E[e(X) h(Y)] by conditional means in turn, from anywhere
    e = centred(torch.randn(n, generator=generator, dtype=F64), a)
    for _ in range(400):
        h = pi.T @ e / b
        h = h / norm(h, b)
        e = centred(pi @ h / a, a)
        e = e / norm(e, a)
    assert abs((e @ pi @ h).item() - sigma[1]) < 1e-8
    for _ in range(5):  # and no pair of functions does better
        one, two = (torch.randn(k, generator=generator, dtype=F64) for k in (n, m))
        one, two = centred(one, a), centred(two, b)
        assert (one @ pi @ two).item() <= sigma[1] * norm(one, a) * norm(two, b)

    # 3 and 4. the iteration, started along the slowest mode: its rate is the square, and no less
    fk, ratios, sizes = f + 1e-3 * e, [], [1e-3]
    while len(sizes) < 60 and sizes[-1] > 1e-9:
        fk = transform(transform(fk, a, c.T, eps), b, c, eps)
        sizes.append(norm(centred(fk - f, a), a))
        ratios.append(sizes[-1] / sizes[-2])
    assert len(ratios) > 2
    sharp(ratios[-1], sigma[1] ** 2 * 1.001, at_least=0.998)
    damaged("the third singular value", ratios[-1] <= 1.001 * sigma[2] ** 2)
    damaged("the cube", ratios[-1] <= 1.001 * sigma[1] ** 3)

    # 1. the remainder is of second order, with the constant of the proof; sharp at high temperature
    def remainder(size, eps, f, g, pi):
        moved = transform(f + size * e, a, c.T, eps) - transform(f, a, c.T, eps)
        return (moved + pi.T @ (size * e) / b).abs().max().item()

    constant = math.exp((oscillation(f) + oscillation(e) + oscillation(c)) / eps) / (2 * eps)
    assert remainder(1.0, eps, f, g, pi) <= constant
    assert 3.5 < remainder(0.02 * eps, eps, f, g, pi) / remainder(0.01 * eps, eps, f, g, pi) < 4.5
    warm = 40.0
    f, g = nl.potentials(x, y, warm, a, b, tol=1e-14)
    pi = nl.plan(x, y, warm, a, b, tol=1e-14)
    constant = math.exp((oscillation(f) + oscillation(e) + oscillation(c)) / warm) / (2 * warm)
    sharp(remainder(1.0, warm, f, g, pi), constant, at_least=0.6)

    # two atoms: the correlation of a two-by-two table, in closed form, and tanh(R^2/eps) where the weights are equal
    ends = torch.tensor([[-1.0], [1.0]], dtype=F64)
    for alpha, beta in ((0.3, 0.6), (0.5, 0.5)):
        t = float(two_atom_mass(alpha, beta, 2.0, eps))
        table = (alpha - t) * (1 - beta - t) - t * (beta - alpha + t)
        table /= math.sqrt(alpha * (1 - alpha) * beta * (1 - beta))
        have, need = (torch.tensor([p, 1 - p], dtype=F64) for p in (beta, alpha))
        pi = nl.plan(ends, ends.clone(), eps, have, need, tol=1e-14)
        found = torch.linalg.svdvals(pi / (have[:, None] * need).sqrt())[1].item()
        assert abs(found - table) < 1e-12
        sharp(found, math.tanh(1 / eps), at_least=0.4)
    assert abs(found - math.tanh(1 / eps)) < 1e-12

    # two opposite pairs at a right angle: the product plan, no correlation, and one step is enough
    x, y = torch.tensor([[[1.0, 0.0], [-1.0, 0.0]], [[0.0, 1.0], [0.0, -1.0]]], dtype=F64)
    half = torch.full((2,), 0.5, dtype=F64)
    assert torch.linalg.svdvals(2 * nl.plan(x, y, eps, tol=1e-14))[1] < 1e-14
    fk = transform(transform(fk[:2], half, cost(y, x), eps), half, cost(x, y), eps)
    assert oscillation(fk) < 1e-14


@pytest.mark.parametrize("alpha", [0.001, 0.5, 0.7])
@pytest.mark.parametrize("beta", [0.2, 0.4, 0.7])
def test_thm_two_atoms(alpha, beta):
    """The library's root against the minimum of the cost, found by bisection of its slope, in forty digits.

    Checked by: exact arithmetic, brute force.
    """
    getcontext().prec = 40
    for distance, eps in ((2.0, 0.5), (1.0, 2.0), (3.0, 0.9)):
        al, be, D, ep = map(Decimal, (alpha, beta, distance, eps))
        low, high = max(Decimal(0), al - be), min(al, 1 - be)
        for _ in range(140):
            s = (low + high) / 2
            uphill = D**2 + ep * (s * (be - al + s) / ((al - s) * (1 - be - s))).ln() > 0
            low, high = (low, s) if uphill else (s, high)
        exact = float(s)
        t = float(two_atom_mass(alpha, beta, distance, eps))
        assert abs(t - exact) < 1e-14
        ends = torch.tensor([[-distance / 2], [distance / 2]], dtype=F64)
        have = torch.tensor([beta, 1 - beta], dtype=F64)
        need = torch.tensor([alpha, 1 - alpha], dtype=F64)
        pi = nl.plan(ends, ends.clone(), eps, have, need, tol=1e-14)
        assert abs(pi[1, 0].item() - exact) < 1e-13
        # the mean goal of the right-hand pile, and its failing variant, the pull of the whole mass
        right = nl.barycentric_map(ends, ends.clone(), eps, have, need, tol=1e-14)(ends[1:]).item()
        goal = distance / 2 - distance * exact / (1 - beta)
        assert abs(right - goal) < 1e-12
        damaged("the mean goal without 1 - beta", abs(right - (distance / 2 - distance * exact)) < 1e-9)
        # the quadratic equation, with kappa squared and not kappa
        for power, true in ((1, True), (0.5, False)):
            k = math.exp(-(distance**2) / eps * power)
            residual = (1 - k) * exact**2 + ((beta - alpha) + k * (alpha + 1 - beta)) * exact - k * alpha * (1 - beta)
            if true:
                assert abs(residual) < 1e-15
            else:
                damaged("kappa for kappa squared", abs(residual) < 1e-6)
        # nothing travels to and fro at low temperature, and the product is the limit at high
        assert abs(float(two_atom_mass(alpha, beta, distance, 1e-2)) - max(0.0, alpha - beta)) < 1e-12
        assert abs(float(two_atom_mass(alpha, beta, distance, 1e6)) - alpha * (1 - beta)) < 1e-5


def gaussian_grid(mean, covariance, points, width):
    """Nodes and weights of the trapezoidal rule, spectrally accurate here."""
    d = len(mean)
    axes = [
        m + torch.linspace(-width, width, points, dtype=F64) * v.sqrt()
        for m, v in zip(mean, covariance.diagonal(), strict=True)
    ]
    nodes = torch.cartesian_prod(*axes).reshape(-1, d)
    z = nodes - mean
    log_density = -0.5 * (z @ torch.linalg.inv(covariance) * z).sum(1)
    weights = torch.softmax(log_density, 0)
    keep = weights > 1e-13
    weights = weights[keep]
    return nodes[keep], weights / weights.sum()


def matrix(rows):
    return torch.tensor(rows, dtype=F64)


@pytest.mark.parametrize("eps", [0.5, 2.0])
@pytest.mark.parametrize(
    ("a", "A", "b", "B"),
    [
        ([0.3], [[1.0]], [-0.5], [[0.25]]),
        ([0.0], [[0.5]], [2.0], [[2.0]]),
    ],
)
def test_thm_gaussian_plan(a, A, b, B, eps):
    """The solver on grids, which are quadrature rules, against the formulas; the value from the grid's plan.

    Checked by: quadrature, primal value.
    """
    a, A, b, B = matrix(a), matrix(A), matrix(b), matrix(B)
    x, wx = gaussian_grid(a, A, 161, 8.0)
    y, wy = gaussian_grid(b, B, 151, 8.0)
    pi = nl.plan(x, y, eps, wx, wy, tol=1e-11)
    value = primal(pi, cost(x, y), wx, wy, eps)
    assert abs(value - float(gaussian_ot(a, A, b, B, eps))) < 1e-8
    M = gaussian_map(A, B, eps)
    assert abs(M.item() - (math.sqrt(4 * A * B + eps**2) - eps) / (2 * A.item())) < 1e-12
    T = nl.barycentric_map(x, y, eps, wx, wy, tol=1e-11)
    points = a + torch.linspace(-2, 2, 9, dtype=F64)[:, None]
    assert (T(points) - (b + (points - a) @ M)).abs().max() < 1e-7
    # the goals given x: their covariance is eps M, the same for every x; the cross-covariance is A M
    middle = slice(len(x) // 4, 3 * len(x) // 4)
    rows = pi[middle] / wx[middle, None]
    mean = rows @ y
    spread = rows @ y**2 - mean**2
    assert (spread - eps * M).abs().max() < 1e-7
    cross = ((x - a) * wx[:, None]).T @ (pi / wx[:, None] @ (y - b))
    assert (cross - A @ M).abs().max() < 1e-8
    damaged("the goals have covariance M", (spread - M).abs().max() < 1e-2)
    damaged("log of eps for 2 eps", abs(value - eps * math.log(2) / 2 - float(gaussian_ot(a, A, b, B, eps))) < 1e-2)
    damaged("the slope without its one half", (T(points) - (b + (points - a) @ (2 * M))).abs().max() < 1e-2)
    # singular covariances are limits: a point against B costs half its trace, and M tends to B / eps
    tiny = 1e-9 * torch.eye(1, dtype=F64)
    assert abs(float(gaussian_ot(a, tiny, b, B, eps)) - ((a - b) ** 2 + B).item() / 2) < 1e-7
    assert abs(gaussian_map(tiny, B, eps).item() - B.item() / eps) < 1e-6


def test_gaussian_plan_plane():
    """Covariances that do not commute: the slope is M, not C A^{-1}."""
    a, b, eps = matrix([0.2, -0.1]), matrix([-0.4, 0.6]), 1.0
    A, B = matrix([[1.0, 0.6], [0.6, 0.8]]), matrix([[0.6, -0.3], [-0.3, 1.2]])
    x, wx = gaussian_grid(a, A, 25, 5.0)
    y, wy = gaussian_grid(b, B, 23, 5.0)
    T = nl.barycentric_map(x, y, eps, wx, wy, tol=1e-8)
    M = gaussian_map(A, B, eps)
    points = a + matrix([[1.0, 0.0], [0.0, 1.0], [-0.7, 0.9], [0.0, 0.0]])
    assert (T(points) - (b + (points - a) @ M)).abs().max() < 1e-4
    trap = A @ M @ torch.linalg.inv(A)  # C A^{-1}, with C = A M
    damaged("the slope is C A^-1", (T(points) - (b + (points - a) @ trap.T)).abs().max() < 1e-2)
    value = primal(nl.plan(x, y, eps, wx, wy, tol=1e-8), cost(x, y), wx, wy, eps)
    assert abs(value - float(gaussian_ot(a, A, b, B, eps))) < 1e-4


@pytest.mark.parametrize("eps", [0.05, 1.0, 10.0])
@pytest.mark.parametrize("d", [1, 2, 3, 5])
def test_gaussian_plan_algebra(d, eps):
    generator = torch.Generator().manual_seed(d)
    root = torch.randn(2, d, d, generator=generator, dtype=F64)
    A, B = root @ root.mT + 0.3 * torch.eye(d, dtype=F64)
    M = gaussian_map(A, B, eps)
    assert (M - M.T).abs().max() < 1e-10
    assert (eps * M + M @ A @ M - B).abs().max() < 1e-8 * B.abs().max()
    assert torch.linalg.eigvalsh(M).min() > 0
    # the value from its pieces: transport cost plus mutual information
    zero = torch.zeros(d, dtype=F64)
    transport = 0.5 * (A.trace() + B.trace()) - (A @ M).trace()
    information = 0.5 * (torch.logdet(B) - torch.logdet(eps * M))
    value = float(gaussian_ot(zero, A, zero, B, eps))
    assert abs(value - (transport + eps * information).item()) < 1e-8 * max(1, abs(value))
    # a shift of the means adds half its square
    shift = torch.randn(d, generator=generator, dtype=F64)
    moved = float(gaussian_ot(shift, A, zero, B, eps))
    assert abs(moved - value - 0.5 * (shift @ shift).item()) < 1e-8 * max(1, abs(value))
    # the trap differs from the map as soon as covariances do not commute
    if d > 1:
        assert (A @ M @ torch.linalg.inv(A) - M).abs().max() > 1e-3


@pytest.mark.parametrize("seed", range(4))
def test_thm_entropic_gap(seed):
    """The cost of the library's plan against a linear program; the limit at an optimum that is not unique.

    Checked by: primal value, linear program.
    """
    x, y, a, b, _ = problem(seed, n=6, m=9)
    c = cost(x, y)
    exact = ot.emd2(a.numpy(), b.numpy(), c.numpy())
    room = min(entropy(a), entropy(b))
    assert room <= math.log(6)
    grid = [0.1, 0.4, 0.7, 1.0, 1.3, 50.0]
    plans = [nl.plan(x, y, eps, a, b, tol=1e-12) for eps in grid]
    values = [primal(pi, c, a, b, eps) for pi, eps in zip(plans, grid, strict=True)]
    for pi, eps, value in zip(plans, grid, values, strict=True):
        assert exact <= (pi * c).sum().item() <= value <= exact + eps * room
        assert abs(nl.entropic_cost(x, y, eps, a, b, tol=1e-12).item() - value) < 1e-10
    # 2. non-decreasing, concave, and at most what the product costs
    assert values == sorted(values) and values[-1] <= (a @ c @ b).item()
    assert torch.tensor(values[:5]).diff(n=2).max() < -1e-4
    damaged("convex in eps", torch.tensor(values[:5]).diff(n=2).min() >= 0)

    # 1. the bound is reached by distant pairs, of unequal weights too
    n, eps = 8, 0.05
    far = 2 * torch.arange(n, dtype=F64)[:, None]
    for w in (torch.full((n,), 1 / n, dtype=F64), torch.linspace(1, 3, n, dtype=F64) / 16):
        pi = nl.plan(far, far + 0.3, eps, w, w, tol=1e-12)
        gap = primal(pi, cost(far, far + 0.3), w, w, eps) - 0.3**2 / 2
        sharp(gap, eps * entropy(w), at_least=1 - 1e-8)
        damaged("half the bound", gap <= eps * entropy(w) / 2)
    damaged("log n for unequal weights", abs(gap - eps * math.log(n)) < 1e-4)

    # 3. two opposite pairs at a right angle, and a pair by itself: many exact plans, and the limit is the least KL
    x = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [9.0, 9.0]], dtype=F64)
    y = torch.tensor([[0.0, 1.0], [0.0, -1.0], [9.0, 8.0]], dtype=F64)
    third, c = torch.full((3,), 1 / 3, dtype=F64), cost(x, y)
    exact = ot.emd2(third.numpy(), third.numpy(), c.numpy())
    vertex = torch.as_tensor(ot.emd(third.numpy(), third.numpy(), c.numpy()))
    least = torch.tensor([[1, 1, 0], [1, 1, 0], [0, 0, 2]], dtype=F64) / 6
    assert abs((least * c).sum().item() - exact) < 1e-12 and abs((vertex * c).sum().item() - exact) < 1e-12
    information = [torch.xlogy(p, 9 * p).sum().item() for p in (least, vertex)]
    pi = nl.plan(x, y, 0.02, tol=1e-13)
    rate = (primal(pi, c, third, third, 0.02) - exact) / 0.02
    assert (pi - least).abs().max() < 1e-10 and abs(rate - information[0]) < 1e-10
    damaged("the limit is the KL of any exact plan", abs(rate - information[1]) < 1e-2)
    damaged("the limit is log n though the plan is not unique", abs(rate - math.log(3)) < 1e-2)

    # one point: no entropy, no gap
    assert abs(nl.entropic_cost(x[:1], y, 3.0).item() - ot.emd2([1.0], third.numpy(), c[:1].numpy())) < 1e-12


@pytest.mark.parametrize("eps", [0.02, 0.1, 0.5, 2.0])
@pytest.mark.parametrize("seed", range(2))
def test_thm_self_averaging(seed, eps):
    """The iteration, written out, near the library's potential; the operator from the library's plan.

    Checked by: simulation, closed form.
    """
    generator = torch.Generator().manual_seed(100 + seed)
    n = 24
    x = torch.rand(n, 1 + seed, generator=generator, dtype=F64)
    a = torch.rand(n, generator=generator, dtype=F64) + 0.2
    a, c = a / a.sum(), cost(x, x)
    solved = nl.potentials(x, x, eps, a, a, tol=1e-11)
    f = solved.f
    assert (solved.f - solved.g).abs().max() < 1e-10
    assert (f - transform(f, a, c, eps)).abs().max() < 1e-9
    # some forty halvings of the error at most, however small eps
    assert solved.converged and solved.iterations <= 80

    # P is self-adjoint in L2(mu), between 0 and the identity
    pi = nl.plan(x, x, eps, a, a, tol=1e-11)
    assert (pi - pi.T).abs().max() < 1e-11
    assert (pi.sum(1) - a).abs().max() < 1e-10
    root = a.sqrt()
    eigenvalues = torch.linalg.eigvalsh(pi / (root[:, None] * root))
    assert eigenvalues.min() > -1e-10 and abs(eigenvalues.max() - 1) < 1e-9
    second = eigenvalues[-2].item()

    # its second eigenvalue tends to one: the bound of the theorem, reached within 2.5 by two atoms
    variance = torch.linalg.eigvalsh(torch.cov(x.T, correction=0, aweights=a).reshape(x.shape[1], -1))
    assert 1 - second <= eps * entropy(a) / variance.max().item() + 1e-10
    ends = torch.tensor([[-1.0], [1.0]], dtype=F64)
    two = torch.linalg.eigvalsh(2 * nl.plan(ends, ends, 1.5, tol=1e-14))[0].item()
    assert abs(two - math.tanh(1 / 1.5)) < 1e-12
    sharp(1 - two, 1.5 * math.log(2), at_least=0.4)
    damaged("a third of the bound", 1 - two <= 1.5 * math.log(2) / 3)

    # the averaged iteration halves the error, the alternating one does not
    h = torch.randn(n, generator=generator, dtype=F64)
    averaged = f + 1e-3 * h
    norms = []
    for _ in range(25):
        averaged = 0.5 * (averaged + transform(averaged, a, c, eps))
        norms.append((a @ (averaged - f) ** 2).sqrt().item())
    ratios = [v / u for u, v in zip(norms, norms[1:], strict=False) if v > 1e-9]
    assert all(ratio <= 0.5 + 2e-3 for ratio in ratios)
    sharp(ratios[-1], 0.5 + 2e-3, at_least=0.9)
    damaged("four ninths for one half", ratios[-1] <= 4 / 9)

    alternating, sizes = f + 1e-3 * h, []
    for _ in range(40):
        alternating = transform(transform(alternating, a, c, eps), a, c, eps)
        sizes.append(oscillation(alternating - f))
    late = [v / u for u, v in zip(sizes, sizes[1:], strict=False) if v > 1e-9]
    assert len(late) < 3 or late[-1] < 1.1 * second**2
    if eps <= 0.02:
        damaged("alternating halves the error as well", late[-1] <= 0.6)

    # two measures, both potentials averaged: (1 + sigma_2) / 2, and no half
    y, b = x[:17] ** 2, a[:17] / a[:17].sum()
    other, sigma = cost(x, y), nl.plan(x, y, 0.1, a, b, tol=1e-13) / (a[:, None] * b).sqrt()
    sigma, pair, sizes = torch.linalg.svdvals(sigma)[1].item(), (h, h[:17]), []
    for _ in range(40):
        f1, g1 = pair
        pair = (f1 + transform(g1, b, other, 0.1)) / 2, (g1 + transform(f1, a, other.T, 0.1)) / 2
        sizes.append(oscillation(pair[0] - f1))
    assert abs(sizes[-1] / sizes[-2] - (1 + sigma) / 2) < 1e-2
    damaged("one half for two measures", sizes[-1] / sizes[-2] <= 0.6)

    # a cost whose kernel is not positive definite, |x - y|^4: a negative eigenvalue, and a rate above one half
    points = torch.tensor([-1.0, 0.0, 1.0], dtype=F64)
    quartic, third = (points[:, None] - points) ** 4, torch.full((3,), 1 / 3, dtype=F64)
    now, sizes = torch.zeros(3, dtype=F64), []
    for _ in range(60):
        now, last = (now + transform(now, third, quartic, 4.0)) / 2, now
        sizes.append(oscillation(now - last))
    least = torch.linalg.eigvalsh(((now[:, None] + now - quartic) / 4).exp() / 3)[0].item()
    assert least < -0.03 and abs(sizes[25] / sizes[24] - (1 - least) / 2) < 1e-6
    damaged("one half for every kernel", sizes[25] / sizes[24] <= 0.51)

    # one point: at rest after one step
    lone = nl.potentials(x[:1], x[:1], eps)
    assert abs(lone.f.item()) < 1e-15


@pytest.mark.parametrize("eps", [0.003, 0.03, 0.3])
def test_self_averaging_counts(eps):
    """The self problem takes about as many steps as halvings, at every temperature."""
    x, _, a, _, _ = problem(5, n=40)
    own = nl.potentials(x, x, eps, a, a, tol=1e-10)
    assert own.converged and own.iterations <= 50
    assert oscillation(own.f - transform(own.f, a, cost(x, x), eps)) < 1e-9
