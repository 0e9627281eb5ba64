"""One test for each theorem of the chapter book/interaction_energies.md.

Energies are double sums written out here, steps are solved by SciPy or in closed form; the field that moves the
particles, what follows it and what measures distances is the library.
"""

import math

import numpy as np
import pytest
import torch
from conftest import damaged, sharp
from scipy.integrate import quad
from scipy.optimize import brentq, minimize
from scipy.special import roots_hermite

import nsgf_lite as nl

F64 = torch.float64
Interaction = nl.fields.Interaction


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed):
    return torch.randn(*shape, generator=seeded(seed), dtype=F64)


def weights(n, seed):
    w = torch.rand(n, generator=seeded(seed), dtype=F64) + 0.2
    return w / w.sum()


def total(W, x, a):
    """The sum over all pairs, without the one half."""
    return float(a.to(x) @ W(x[:, None] - x) @ a.to(x))


def spread2(e, a):
    return float(a @ (e**2).sum(1) - ((a @ e) ** 2).sum())


def ring_W(z):
    square = (z**2).sum(-1)
    return square**2 / 4 - square / 2


def gas_W(z):
    return (z**2).sum(-1) / 2 - z.abs().sum(-1).log()


# thm-interaction-flow -------------------------------------------------------------------

# potentials with the largest lambda for which W - lambda/2 |z|^2 is convex
POTENTIALS = {
    "ring": (ring_W, -1.0),
    "convex": (lambda z: (z**2).sum(-1) * 0.75 + (z**4).sum(-1) / 4, 1.5),
    "repelling": (lambda z: torch.exp(-(z**2).sum(-1) / 2), -1.0),
}


@pytest.mark.parametrize("d", [1, 2])
@pytest.mark.parametrize("name", POTENTIALS)
def test_thm_interaction_flow(name, d):
    """Double sums and their differences; two clouds of unequal weights that are followed.

    Checked by: finite differences, definition, simulation.
    """
    W, lam = POTENTIALS[name]
    field, n = Interaction(W), 7
    x, y, a = normal(n, d, seed=d), normal(n, d, seed=d + 5), weights(n, d)
    phi = normal(n, d, seed=9)
    ahead, behind = (total(W, x + s * 1e-5 * phi, a) / 2 for s in (1, -1))
    rate = -float(a @ (field(x, a=a) * phi).sum(1))
    assert abs((ahead - behind) / 2e-5 - rate) < 1e-8 * (1 + abs(rate))
    damaged("the sum over all pairs has this gradient once", abs((ahead - behind) / 1e-5 - rate) < 0.1 * abs(rate))
    # the mean rests, the energy falls by the integral of the square of the speed
    h, steps = 0.02, 40
    one, other = (nl.follow(field, z, z, h, steps, method="rk4", a=a) for z in (x, y))
    assert (a @ (one[-1] - x)).abs().max() < 1e-13
    speed2 = torch.stack([a @ (field(z, a=a) ** 2).sum(1) for z in one])
    spent = h / 3 * (speed2[0] + speed2[-1] + 4 * speed2[1::2].sum() + 2 * speed2[2:-1:2].sum())
    lost = (total(W, x, a) - total(W, one[-1], a)) / 2
    assert abs(lost / spent - 1) < 1e-3
    damaged("it loses the sum over all pairs", abs(2 * lost / spent - 1) < 0.1)
    twice = nl.follow(lambda z, y, a: 2 * field(z, a=a), x, x, h, steps // 2, method="rk4", a=a)[-1]
    assert (twice - one[-1]).abs().max() < 1e-4
    # convexity along segments, and contraction
    apart = spread2(x - y, a)
    for s in (0.2, 0.5):
        chord = (1 - s) * total(W, x, a) / 2 + s * total(W, y, a) / 2
        assert total(W, (1 - s) * x + s * y, a) / 2 <= chord - lam / 2 * s * (1 - s) * apart + 1e-12
    for k in (10, 40):
        assert spread2(one[k] - other[k], a) <= math.exp(-2 * lam * h * k) * apart * (1 + 1e-6)
    # Where the second derivative is lambda, both are nearly equalities: near z = 0.
    p, q = 0.05 * x, 0.05 * y
    near = [nl.follow(field, z, z, h, steps, method="rk4", a=a)[-1] for z in (p, q)]
    left = spread2(near[0] - near[1], a)
    sharp(left, math.exp(-2 * lam * h * steps) * spread2(p - q, a), at_least=0.9)
    damaged("faster by a tenth", left <= math.exp(-2.2 * abs(lam) * h * steps - 0.05) * spread2(p - q, a))
    # clouds of other sizes, at different means: the means keep their distance
    other_cloud = 0.3 * normal(5, d, seed=3) + 1
    late = [nl.follow(field, z, z, h, steps, method="rk4")[-1] for z in (x, other_cloud)]
    means = float(((x.mean(0) - other_cloud.mean(0)) ** 2).sum())
    before, after = (nl.metrics.w2(*pair) ** 2 for pair in ((x, other_cloud), late))
    assert after - means <= math.exp(-2 * lam * h * steps) * (before - means) * (1 + 1e-6)
    if name == "convex":
        damaged("contraction also of the means", after <= math.exp(-2 * lam * h * steps) * before)
        pair = torch.tensor([[-0.5], [0.5]], dtype=F64)
        runaway = nl.follow(Interaction(lambda z: -(z**4).sum(-1) / 4), pair, pair, 2e-3, 200, method="rk4")[-1]
        assert abs(runaway.diff(dim=0) - 1 / math.sqrt(1 - 0.8)) < 1e-6  # on its way to infinity at time 1/2
        leaning = Interaction(lambda z: z.sum(-1) + (z**2).sum(-1))
        damaged("the mean rests for any W", (a @ leaning(x, a=a)).abs().max() < 0.1)


# thm-ring -------------------------------------------------------------------------------


def excess(x, a):
    """By the theorem: what the sum over all pairs has above its least value."""
    d, y = x.shape[1], x - a @ x
    square = (y**2).sum(1)
    s, M = float(a @ square), (a[:, None] * y).T @ y
    off = M - s / d * torch.eye(d, dtype=F64)
    return (1 + 1 / d) * (s - d / (2 * (d + 1))) ** 2 + float((off**2).sum() + a @ (square - s) ** 2 / 2)


def circle(*turns):
    turns = 2 * math.pi * torch.tensor(turns, dtype=F64)
    return torch.stack([turns.cos(), turns.sin()], 1) / math.sqrt(3)


def check_squares(d):
    x, a = normal(9, d, seed=d) + 1, weights(9, d)
    low = -d / (4 * (d + 1))
    assert abs(total(ring_W, x, a) - low - excess(x, a)) < 1e-12
    damaged("the same with the one half", abs(total(ring_W, x, a) / 2 - low - excess(x, a)) < 1e-3)
    # a minimiser that knows no moments finds the value and the radius
    n = 6 if d == 3 else 5
    uniform = torch.full((n,), 1 / n, dtype=F64)

    def objective(flat):
        z = torch.tensor(flat, dtype=F64).reshape(n, d)
        pairs = z[:, None] - z
        slope = 2 / n**2 * (((pairs**2).sum(-1, keepdim=True) - 1) * pairs).sum(1)
        return float(ring_W(pairs).sum()) / n**2, slope.reshape(-1).numpy()

    found = min(
        (minimize(objective, normal(n * d, seed=s).numpy(), jac=True, tol=1e-13) for s in range(4)), key=lambda r: r.fun
    )
    z = torch.tensor(found.x, dtype=F64).reshape(n, d)
    if d > 1:
        assert abs(found.fun - low) < 1e-10
        radius = (z - z.mean(0)).norm(dim=1)
        assert (radius - math.sqrt(d / (2 * (d + 1)))).abs().max() < 1e-4
        damaged("the radius is one half", (radius - 0.5).abs().max() < 0.05)
    else:  # five equal particles cannot be two heaps of equal mass
        damaged("also for five particles on the line", found.fun < low + 1e-3)
    assert excess(z, uniform) > -1e-12


def check_field():
    at = 2 * normal(20, 2, seed=1)
    x, a = normal(6, 2, seed=2), weights(6, 2)
    y, m = x - a @ x, a @ x
    square = (y**2).sum(1)
    s, M, q = float(a @ square), (a[:, None] * y).T @ y, (a * square) @ y
    z = at - m
    claim = -(((z**2).sum(1, keepdim=True) + s - 1) * z + 2 * z @ M - q)
    assert (Interaction(ring_W)(x, at=at, a=a) - claim).abs().max() < 1e-12
    damaged("without the third moment", (Interaction(ring_W)(x, at=at, a=a) - claim + q).abs().max() < 1e-2)
    pull = -((at**2).sum(1, keepdim=True) - 1 / 3) * at
    unequal = torch.tensor([1 / 5, 2 / 15], dtype=F64).repeat_interleave(3)
    for name, ring, mass in (
        ("triangle", circle(0, 1 / 3, 2 / 3), None),
        ("square", circle(0, 1 / 4, 1 / 2, 3 / 4), None),
        ("triangles of unequal mass", circle(*(k / 3 + s for s in (0, 0.1) for k in range(3))), unequal),
    ):  # fmt: skip
        a = torch.full((len(ring),), 1 / len(ring), dtype=F64) if mass is None else mass
        assert abs(total(ring_W, ring, a) + 1 / 6) < 1e-12, name
        assert (Interaction(ring_W)(ring, at=at, a=a) - pull).abs().max() < 1e-11, name
    damaged("the uniform ring alone is least", total(ring_W, circle(0, 1 / 3, 2 / 3), torch.ones(3) / 3) > -0.16)
    for other in (circle(0, 0.5), circle(0, 0.3, 0.6), circle(0, 0.2, 0.5, 0.7)):
        damaged(
            "any points on the circle are least", total(ring_W, other, torch.ones(len(other)) / len(other)) < -0.1666
        )


def check_confined():
    x = 0.5 * normal(24, 2, seed=3)
    uniform = torch.full((24,), 1 / 24, dtype=F64)
    path = nl.follow(Interaction(ring_W), x, x, 0.1, 300)
    eta = [excess(z, uniform) for z in path]
    assert all(after <= before + 1e-15 for before, after in zip(eta, eta[1:], strict=False)) and eta[-1] < 1e-5
    for z, e in zip(path, eta, strict=True):
        radius = (z - z.mean(0)).norm(dim=1)
        assert ((radius - 3**-0.5) ** 2).mean() <= 6 * e + 1e-14
    # a thousandth of the mass in the middle of a ring: the bound is nearly reached
    ring = torch.cat([circle(0, 1 / 3, 2 / 3), torch.zeros(1, 2, dtype=F64)])
    a = torch.tensor([0.333, 0.333, 0.333, 0.001], dtype=F64)
    outside = float(a @ ((ring - a @ ring).norm(dim=1) - 3**-0.5) ** 2)
    sharp(outside, 6 * excess(ring, a), at_least=0.95)
    damaged("with half the constant", outside <= 3 * excess(ring, a))


@pytest.mark.parametrize(
    ("claim", "setting"), [(check_squares, (d,)) for d in (1, 2, 3)] + [(check_field, ()), (check_confined, ())]
)
def test_thm_ring(claim, setting):
    """Double sums; a minimiser that knows no moments; particles that are followed to the ring.

    Checked by: definition, brute force, simulation.
    """
    claim(*setting)


# thm-semicircle -------------------------------------------------------------------------


def sigma(x):
    return math.sqrt(max(2 - x * x, 0)) / math.pi


def principal_value(x):
    """By folding the integral about the singularity: of (sigma(x - u) - sigma(x + u)) / u."""
    edges = sorted({abs(x - math.sqrt(2)), abs(x + math.sqrt(2))})
    pieces = zip([0.0, *edges], edges, strict=False)
    return sum(quad(lambda u: (sigma(x - u) - sigma(x + u)) / u, p, q, limit=200)[0] for p, q in pieces if q > p)


def log_energy(quantile, n=1500):
    """Energy with one half of W from quantiles at n levels; a cell's own pairs as of a uniform law on it."""
    x = quantile((np.arange(n) + 0.5) / n)
    gap = np.abs(x[:, None] - x)
    width = np.gradient(x)
    np.fill_diagonal(gap, width * math.exp(-1.5))
    return float((gap**2 / 2 - np.log(gap)).mean()) / 2


def semicircle_quantile(s, R=2**0.5):
    turn = np.linspace(0, math.pi, 200_001)
    return -R * np.cos(np.interp(s, (turn - np.sin(2 * turn) / 2) / math.pi, turn))


def test_thm_semicircle():
    """Principal values by adaptive quadrature; energies of other laws from their quantiles; particles that follow.

    Checked by: quadrature, closed form, simulation.
    """
    assert abs(quad(sigma, -math.sqrt(2), math.sqrt(2))[0] - 1) < 1e-9
    assert abs(quad(lambda x: x * x * sigma(x), -math.sqrt(2), math.sqrt(2))[0] - 0.5) < 1e-9
    for x in (-1.2, 0.3, 1.0):
        assert abs(principal_value(x) - x) < 1e-6
    for x in (1.5, -2.0, 4.0):
        assert abs(principal_value(x) - x + math.copysign(math.sqrt(x * x - 2), x)) < 1e-6
    damaged("a semicircle of radius 2", abs(2 * principal_value(1.0) / 4 - 1.0) < 0.1)
    # many particles at the quantiles feel that force between and outside of them
    cloud = torch.tensor(semicircle_quantile((np.arange(4000) + 0.5) / 4000))[:, None]
    middle = (cloud[1000:3000:250] + cloud[1001:3001:250]) / 2
    assert Interaction(gas_W)(cloud, at=middle).abs().max() < 0.01
    outside = torch.tensor([[2.0], [-3.0]], dtype=F64)
    force = -Interaction(gas_W)(cloud, at=outside)
    assert (force - outside.sign() * (outside**2 - 2).sqrt()).abs().max() < 1e-3
    # growth: semicircles of other radii, uniform laws, and one that is not centred
    least = log_energy(semicircle_quantile)
    assert abs(least - (3 / 8 + math.log(2) / 4)) < 1e-3  # the closed form of the least energy
    s = (np.arange(20_000) + 0.5) / 20_000
    for quantile in (
        lambda s: semicircle_quantile(s, 0.7),
        lambda s: 4 * s - 2,
        lambda s: np.where(s < 0.5, s - 1.5, s + 1.5),
        lambda s: 3 * s**2,
    ):
        y = quantile(s)
        grown = log_energy(quantile) - least
        w2, m = ((y - semicircle_quantile(s)) ** 2).mean(), y.mean()
        assert grown >= (w2 - m**2) / 2 - 1e-3
    wide = log_energy(lambda s: semicircle_quantile(s, 400.0)) - least
    w2 = ((400 - math.sqrt(2)) / math.sqrt(2)) ** 2 / 2
    sharp(w2 / 2, wide, at_least=0.98)
    damaged("growth by the whole square", wide >= w2)
    shifted = log_energy(lambda s: semicircle_quantile(s) + 3) - least
    damaged("growth without taking off the mean", shifted >= 9 / 2)
    # semicircles stay semicircles
    n = 60
    start = torch.tensor(semicircle_quantile((np.arange(n) + 0.5) / n, 3.0))[:, None]
    end = nl.follow(Interaction(gas_W), start, start, 4e-3, 100, method="rk4")[-1]
    R = math.sqrt(2 + 7 * math.exp(-0.8))
    goal = torch.tensor(semicircle_quantile((np.arange(n) + 0.5) / n, R))[:, None]
    assert nl.metrics.w2(end, goal) < 0.02 < 0.1 * nl.metrics.w2(start, goal)
    damaged("the radius as e^-t", abs(float(end.max()) - (math.sqrt(2) + (3 - math.sqrt(2)) * math.exp(-0.4))) < 0.05)


# thm-hermite-equilibrium ----------------------------------------------------------------


def zeros(n):
    return torch.tensor(roots_hermite(n)[0])[:, None] / math.sqrt(n)


def gas_energy(x):
    i, j = torch.triu_indices(len(x), len(x), 1)
    return float(gas_W(x[i] - x[j]).sum()) / len(x) ** 2


@pytest.mark.parametrize("n", [2, 3, 8, 21])
def test_thm_hermite_equilibrium(n):
    """SciPy's zeros of Hermite's polynomials; a minimiser that knows none; energies as double sums; particles.

    Checked by: another library, brute force, definition, simulation.
    """
    field, rest = Interaction(gas_W), zeros(n)
    assert field(rest).abs().max() < 1e-12 * n
    damaged("the zeros over the root of 2N", field(rest / math.sqrt(2)).abs().max() < 0.1)
    damaged("self-interaction counted as a neighbour's", field(rest * math.sqrt(n / (n - 1))).abs().max() < 1e-2 / n)
    variance = (1 - 1 / n) / 2
    assert abs((rest**2).mean() - variance) < 1e-13
    damaged("the variance of the semicircle", abs((rest**2).mean() - 0.5) < 1e-3)
    # the inequality, at equilibrium and elsewhere
    x, y = (normal(n, 1, seed=s).sort(0).values * size for s, size in ((n, 1.0), (n + 1, 2.0)))
    uniform = torch.full((n,), 1 / n, dtype=F64)
    for p, q in ((rest, x), (rest, y), (x, y)):
        linear = -float((field(p) * (q - p)).mean())
        assert gas_energy(q) >= gas_energy(p) + linear + spread2(q - p, uniform) / 2 - 1e-12
    if n <= 8:
        found = minimize(
            lambda z: gas_energy(torch.tensor(np.cumsum(np.exp(z)), dtype=F64)[:, None]), np.zeros(n), tol=1e-10
        )
        place = torch.tensor(np.cumsum(np.exp(found.x)))[:, None]
        assert (place - place.mean() - rest).abs().max() < 1e-3
    # the flow: variance, contraction, gaps
    wide, far = 3 * zeros(n) + 0.1 * x, 60 * zeros(n)
    h, steps = 5e-3, 100
    one = nl.follow(field, wide, wide, h, steps, method="rk4")
    for k in (20, 100):
        late = variance + math.exp(-2 * h * k) * (spread2(wide, uniform) - variance)
        assert abs(spread2(one[k], uniform) - late) < 1e-7
    damaged("at the rate e^-t", abs(spread2(one[-1], uniform) - variance - math.exp(-0.5)
            * (spread2(wide, uniform) - variance)) < 0.1)  # fmt: skip
    two = nl.follow(field, far, far, h, steps, method="rk4")
    before, after = spread2(wide - far, uniform), spread2(one[-1] - two[-1], uniform)
    sharp(math.sqrt(after), math.exp(-0.5) * math.sqrt(before), at_least=0.95)
    damaged("faster by a fifth", math.sqrt(after) <= math.exp(-0.6) * math.sqrt(before))
    sharp(math.exp(-0.5) * far.diff(dim=0).min(), two[-1].diff(dim=0).min(), at_least=0.95)
    assert all(float(z.diff(dim=0).min()) >= math.exp(-h * k) * float(wide.diff(dim=0).min()) - 1e-12
               for k, z in enumerate(one))  # fmt: skip


# thm-log-gas-steps ----------------------------------------------------------------------


def implicit(y, a):
    """By SciPy: the step as a minimisation over the logarithms of the gaps and the mean."""
    n = len(y)

    def objective(z):
        x = torch.tensor(np.concatenate([[0.0], np.cumsum(np.exp(z[1:].clip(-30, 30)))]))[:, None]
        x = x - x.mean() + z[0]
        return float(((x - y) ** 2).mean()) / (2 * a) + gas_energy(x), x

    start = np.concatenate([[float(y.mean())], np.log(np.full(n - 1, 0.5))])
    found = minimize(lambda z: objective(z)[0], start, tol=1e-12, options={"gtol": 1e-9})
    return objective(found.x)[1]


def check_explicit(c):
    """Two lattices of width g with a gap of c g between them."""
    g = 1e-3
    lattice = g * torch.arange(40, dtype=F64)
    x = torch.cat([-c * g / 2 - lattice.flip(0), c * g / 2 + lattice])[:, None]
    allowed = 1 / (1 + 2 / (80 * float(x.diff(dim=0).min()) ** 2))
    field = Interaction(gas_W)
    for share in (0.3, 0.9, 1.0):
        moved = nl.follow(field, x, x, share * allowed, 1)[-1]
        assert float((moved.diff(dim=0) / x.diff(dim=0)).min()) >= 1 - share - 1e-9
    speed = field(x).diff(dim=0)
    crossing = float((x.diff(dim=0) / -speed)[speed < 0].min())
    sharp(allowed, crossing)
    moved = nl.follow(field, x, x, 1.01 * crossing, 1)[-1]
    damaged("order for three times this step", (nl.follow(field, x, x, 3 * allowed, 1)[-1].diff(dim=0) > 0).all())
    assert (moved.diff(dim=0) < 0).any()


def check_implicit(a):
    n, field = 6, Interaction(gas_W)
    rest, uniform = zeros(n), torch.full((n,), 1 / n, dtype=F64)
    y = normal(n, 1, seed=4)  # in no order
    x = implicit(y, a)
    assert (x - a * field(x) - y).abs().max() < 1e-4 and abs(float(x.mean() - y.mean())) < 1e-5
    ordered = y.sort(0).values
    assert gas_energy(implicit(ordered, a)) <= gas_energy(ordered)
    other = implicit(2 * ordered + 1, a)
    assert math.sqrt(spread2(x - other, uniform)) <= math.sqrt(spread2(y - 2 * ordered - 1, uniform)) / (1 + a) + 1e-5
    far, farther = 40 * rest, 60 * rest
    near = [implicit(z, a) for z in (far, farther)]
    shrunk = math.sqrt(spread2(near[0] - near[1], uniform))
    bound = math.sqrt(spread2(far - farther, uniform)) / (1 + a)
    sharp(shrunk, bound * (1 + 1e-6), at_least=0.99)
    damaged("by 1 - a, as an explicit step", shrunk <= (1 - a) * (1 + a) * bound)
    assert (x - rest - x.mean()).square().mean() <= (y - rest - y.mean()).square().mean() / (1 + a) ** 2 + 1e-6


@pytest.mark.parametrize(
    ("claim", "setting"), [(check_explicit, c) for c in (2.0, 2.5)] + [(check_implicit, a) for a in (0.3, 2.0)]
)
def test_thm_log_gas_steps(claim, setting):
    """Explicit steps until particles cross; implicit ones by a minimiser over logarithms of gaps.

    Checked by: brute force, simulation.
    """
    claim(setting)


# thm-forward-backward -------------------------------------------------------------------

LAM, BIG = 0.5, 1.0


def soft_W(z):
    return (LAM * z**2 / 2 + (BIG - LAM) * torch.log(torch.cosh(z))).sum(-1)


def entropy(x):
    return -float((len(x) * x.diff(dim=0)).log().sum()) / len(x)


def minimised(objective, y):
    """Over ordered positions, by SciPy, in the mean and the logarithms of the gaps."""

    def at(z):
        x = torch.tensor(np.concatenate([[0.0], np.cumsum(np.exp(z[1:].clip(-30, 30)))]))[:, None]
        return x - x.mean() + z[0]

    start = np.concatenate([[float(y.mean())], np.log(np.diff(np.sort(y[:, 0].numpy())) + 1e-3)])
    return at(minimize(lambda z: objective(at(z)), start, tol=1e-13, options={"gtol": 1e-8}).x)


def check_schemes(a):
    n, field = 5, Interaction(soft_W)
    uniform = torch.full((n,), 1 / n, dtype=F64)

    def energy(x):
        return total(soft_W, x, uniform) / 2 + entropy(x)

    def forward_backward(x):
        y = nl.follow(field, x, x, a, 1)[-1]
        return minimised(lambda z: float(((z - y) ** 2).mean()) / (2 * a) + entropy(z), y)

    def backward(x):
        return minimised(lambda z: float(((z - x) ** 2).mean()) / (2 * a) + energy(z), x)

    least = minimised(lambda z: energy(z) + float(z.mean() ** 2), torch.linspace(-1, 1, n, dtype=F64)[:, None])
    x, y = normal(n, 1, seed=1).sort(0).values, 3 * normal(n, 1, seed=2).sort(0).values + 1
    for step, q in ((forward_backward, max(abs(1 - a * LAM), abs(1 - a * BIG))), (backward, 1 / (1 + a * LAM))):
        assert (step(least) - least).abs().max() < 2e-3  # one place of rest
        now, goal = x, least - least.mean() + x.mean()
        for k in (1, 2, 3):
            now = step(now)
            assert energy(now) - energy(goal) <= float(((x - goal) ** 2).mean()) / (2 * a * k) + 1e-9
        assert abs(float(now.mean() - x.mean())) < 1e-4
        ratio = math.sqrt(spread2(step(x) - step(y), uniform) / spread2(x - y, uniform))
        assert ratio <= q + 1e-4
    doubled = minimised(lambda z: energy(z) + total(soft_W, z, uniform) / 2 + float(z.mean() ** 2), least)
    damaged("the same place of rest without the one half", (doubled - least).abs().max() < 0.05)


def check_sharp():
    """Quadratic W and no F: the rates are reached. A constant approach: half of the sublinear bound is."""
    x, y = 2 * normal(6, 1, seed=3), normal(6, 1, seed=4)
    uniform, a = torch.full((6,), 1 / 6, dtype=F64), 0.4
    field = Interaction(lambda z: LAM * (z**2).sum(-1) / 2)
    moved = [nl.follow(field, z, z, a, 1)[-1] for z in (x, y)]
    ratio = math.sqrt(spread2(moved[0] - moved[1], uniform) / spread2(x - y, uniform))
    sharp(ratio, 1 - a * LAM, at_least=0.999)
    damaged("forward contracts by no more than backward", ratio >= 1 / (1 + a * LAM))
    solved = [brentq(lambda z, s=float(s): z + a * LAM * z - s, -9, 9) for s in x - x.mean()]
    left = torch.tensor(solved, dtype=F64)[:, None] - (x - x.mean())
    # the implicit step is the one whose field, at its end, leads back
    end = x + left
    assert (end - a * field(end) - x).abs().max() < 1e-9
    sharp(math.sqrt(spread2(end, uniform) / spread2(x, uniform)), 1 / (1 + a * LAM), at_least=0.999)
    # two particles, F = c |x_2 - x_1|: in k steps of a backward method half of the bound is used
    k, D = 5, 1.0
    c, z = D / (4 * k * a), torch.tensor([[-D], [D]], dtype=F64)
    for _ in range(k):
        z = minimised(lambda p, q=z: float(((p - q) ** 2).mean()) / (2 * a) + c * float(p[1] - p[0]), z)
    gap = float(z[1] - z[0])
    sharp(c * gap, D**2 / (2 * a * k), at_least=0.45)
    damaged("like one over k squared", c * gap <= D**2 / (2 * a * k**2))


@pytest.mark.parametrize(("claim", "setting"), [(check_schemes, (a,)) for a in (0.3, 1.0)] + [(check_sharp, ())])
def test_thm_forward_backward(claim, setting):
    """Proxes by a minimiser over logarithms of gaps, energies as double sums, forward steps by the library's field.

    Checked by: brute force, definition, closed form.
    """
    claim(*setting)


# thm-finite-volume ----------------------------------------------------------------------


def centres(n, h):
    line = (np.arange(n) - (n - 1) / 2) * h
    return np.stack(np.meshgrid(line, line, indexing="ij"), -1).reshape(-1, 2)


def outflow(r, u, minus, plus, axis):
    """Cell by cell, as a loop: the change of r by the fluxes across the faces of one axis."""
    change = np.zeros_like(r)
    for i in np.ndindex(*r.shape):
        j = list(i)
        j[axis] += 1
        j = tuple(j)
        if j[axis] < r.shape[axis]:
            flux = max(u[i], 0) * plus[i] + min(u[i], 0) * minus[j]
            change[i] -= flux
            change[j] += flux
    return change


def sides(r, axis):
    """Values at both faces of each cell, by the minmod slope, cell by cell."""
    slope = np.zeros_like(r)
    for i in np.ndindex(*r.shape):
        if 0 < i[axis] < r.shape[axis] - 1:
            step = np.zeros(2, int)
            step[axis] = 1
            ahead, behind = r[tuple(i + step)] - r[i], r[i] - r[tuple(i - step)]
            slope[i] = np.sign(ahead) * min(abs(ahead), abs(behind)) if ahead * behind > 0 else 0
    return r - slope / 2, r + slope / 2


def test_thm_finite_volume():
    """The scheme as a loop over cells: its energy by differences, its forces by the library's field on the cells.

    Checked by: finite differences, definition.
    """
    n, h, strength = 7, 0.4, 0.1
    x = torch.tensor(centres(n, h))

    def W(z):
        return -torch.exp(-(z**2).sum(-1)) / math.pi

    def lean(z):
        return W(z) * (1 + 5 * z.sum(-1))

    def matrix(W):
        return W(x[:, None] - x).numpy()

    def xi_of(r, K):
        return 1.5 * strength * r**2 + h**2 * (K @ r.reshape(-1)).reshape(n, n)

    def energy(r, K):
        return h**2 * (strength * r**3 / 2).sum() + h**4 / 2 * r.reshape(-1) @ K @ r.reshape(-1)

    def rates(r, K):
        xi, change, spent = xi_of(r, K), np.zeros_like(r), 0.0
        for axis in (0, 1):
            u = -np.diff(xi, axis=axis, append=xi.take([-1], axis)) / h
            minus, plus = sides(r, axis)
            assert (minus >= 0).all() and (plus >= 0).all() and np.allclose(minus + plus, 2 * r)
            change += outflow(r, u, minus, plus, axis)
            behind = np.roll(minus, -1, axis)
            spent += h**2 * (u * (np.maximum(u, 0) * plus + np.minimum(u, 0) * behind)).sum()
        return change / h, spent

    K = matrix(W)
    fast = 0.0
    for seed in range(3):
        r = torch.rand(n, n, generator=seeded(seed), dtype=F64).numpy() ** 3
        change, spent = rates(r, K)
        assert abs(change.sum()) < 1e-12 and spent > 0
        slope = (energy(r + 1e-6 * change, K) - energy(r - 1e-6 * change, K)) / 2e-6
        assert abs(slope / -spent - 1) < 1e-6
        damaged(
            "the interaction counted twice",
            abs((slope + h**4 * r.reshape(-1) @ K @ change.reshape(-1)) / -spent - 1) < 1e-3,
        )
        skew = matrix(lean)
        change, spent = rates(r, skew)
        slope = (energy(r + 1e-6 * change, skew) - energy(r - 1e-6 * change, skew)) / 2e-6
        damaged("for a W that is not even", abs(slope / -spent - 1) < 1e-3)
        xi = xi_of(r, K)
        fast = max(np.abs(np.diff(xi, axis=k)).max() / h for k in (0, 1))
        stepped = r + 0.999 * h / (4 * fast) * rates(r, K)[0]
        assert stepped.min() >= -1e-15
    # the force of the cells is that of the library's field, with masses as weights, to second order of the cells
    smooth = np.exp(-(centres(n, h) ** 2).sum(1)).reshape(n, n)
    mass = smooth.sum() * h**2
    a = torch.tensor(smooth.reshape(-1) / smooth.sum())
    faces = x.reshape(n, n, 2)[:-1] + torch.tensor([h / 2, 0.0], dtype=F64)
    force = mass * nl.fields.Interaction(W)(x, at=faces.reshape(-1, 2), a=a)[:, 0].reshape(n - 1, n).numpy()
    by_cells = -np.diff(h**2 * (K @ smooth.reshape(-1)).reshape(n, n), axis=0) / h
    assert np.abs(force - by_cells).max() < 0.02 * np.abs(force).max()
    damaged("half the force", np.abs(force / 2 - by_cells).max() < 0.1 * np.abs(force).max())
    # a peak that all leaves at the greatest speed: empty after the longest step that is allowed
    peak, speed = np.zeros((3, 3)), 0.7
    peak[1, 1] = 1.0
    out = np.zeros_like(peak)
    for axis in (0, 1):
        u = np.zeros_like(peak)
        u[1, 1] = speed
        u[(0, 1) if axis == 0 else (1, 0)] = -speed
        out += outflow(peak, u, *sides(peak, axis), axis)
    tau = h / (4 * speed)
    sharp(-out[1, 1] * tau / h, peak[1, 1], at_least=0.999)
    damaged("any step of h over twice the speed", peak[1, 1] + h / (2 * speed) / h * out[1, 1] >= 0)


# thm-split-kl ---------------------------------------------------------------------------


def entropy_step(tau, a):
    """By a minimiser: the widest that the JKO step of the entropy makes of N(0, tau^2), among Gaussians."""
    return brentq(lambda s: (s - tau) / a - 1 / s, 1e-9, 10 + tau + a)


@pytest.mark.parametrize(("alpha", "a"), [(2.0, 0.2), (0.5, 0.8)])
def test_thm_split_kl(alpha, a):
    """Steps by a root finder and by noise, quantiles against all laws, and the flow that both approach.

    Checked by: brute force, simulation, closed form.
    """
    goal, q = alpha**-0.5, a * alpha
    # the JKO step of the entropy beats other laws than Gaussians: quantiles of a cloud, by a minimiser
    n, tau = 16, 0.8
    levels = (torch.arange(n, dtype=F64) + 0.5) / n
    z = torch.distributions.Normal(torch.tensor(0.0, dtype=F64), 1.0).icdf(levels)[:, None]
    best = minimised(lambda x: float(((x - tau * z) ** 2).mean()) / (2 * a) + entropy(x), tau * z)
    wide = entropy_step(tau, a)
    assert abs(wide - (tau + math.sqrt(tau**2 + 4 * a)) / 2) < 1e-9
    middle = slice(4, -4)
    assert (best[middle] / z[middle] / wide - 1).abs().max() < 0.06
    # (i): Q rests; contraction
    s = 200.0
    ratio = abs(entropy_step((1 - q) * s, a) - goal) / abs(s - goal)
    sharp(ratio, 1 - q, at_least=0.95)
    damaged("by 1 / (1 + a alpha) of the backward step, squared", ratio <= (1 + q) ** -2 * (1 - q))
    assert abs(entropy_step((1 - q) * goal, a) - goal) < 1e-8
    nearly = (entropy_step((1 - q) * (goal + 1e-4), a) - goal) / 1e-4
    assert abs(nearly - (1 - q) / (1 + q)) < 1e-3
    damaged("near Q by 1 - a alpha", abs(nearly - (1 - q)) < 0.02)
    # (ii): noisy particles, followed by the library
    count = 30_000
    x = normal(count, 1, seed=1)

    def noisy(x, y, generator, sign=-1.0):
        kick = torch.randn(x.shape, generator=generator, dtype=F64)
        return sign * alpha * x + math.sqrt(2 / a) * kick

    end = nl.follow(noisy, x, x, a, 40, generator=seeded(2))[-1]
    error = math.sqrt(2 / count)
    assert abs(end.var() * alpha * (1 - q / 2) - 1) < 4 * error + (1 - q) ** 80
    damaged("noise has the variance of Q", abs(end.var() * alpha - 1) < 4 * error)
    away = nl.follow(lambda x, y, generator: noisy(x, y, generator, 1.0), x + 1, x, a, 6, generator=seeded(2))[-1]
    assert abs(away.mean() / (1 + q) ** 6 - 1) < 0.1
    damaged("the other sign takes the mean to b", abs(away.mean()) < 1)
    # both are of first order: short steps follow the flow
    errors = []
    for k in (64, 128):
        short, sd, mean = 0.64 / k, 1.5, 1.0
        for _ in range(k):
            sd, mean = entropy_step((1 - short * alpha) * sd, short), (1 - short * alpha) * mean
        m, S = nl.closed_forms.ou_moments(0.64, alpha, 0.0, 1.0, 2.25)
        errors.append(abs(mean - float(m)) + abs(sd - float(S) ** 0.5))
    assert errors[1] < 0.01 and abs(errors[0] / errors[1] - 2) < 0.2
