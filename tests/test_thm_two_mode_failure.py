"""One test for each theorem of the chapter book/two_mode_failure.md.

The referee is mpmath at 110 digits, from the definitions (sums over the atoms), not from the closed forms. Over
decades of kappa the closed forms of the library agree with it to rounding, the remainders lie in their bounds, and
their observed orders are those stated; at moderate kappa the library's fields agree with the closed forms.
"""

import math

import mpmath as mp
import pytest
import torch
from conftest import damaged, sharp

import nsgf_lite as nl
from nsgf_lite.closed_forms import two_atom_mass, two_atom_velocity

F64 = torch.float64
mp.mp.dps = 110
pytestmark = pytest.mark.filterwarnings(
    "error::nsgf_lite.ConvergenceWarning", "ignore::nsgf_lite.fields.UnderflowWarning"
)

MASSES = [(0.7, 0.4), (0.95, 0.9), (0.5, 0.02), (0.81, 0.19)]
each_masses = pytest.mark.parametrize(("alpha", "beta"), MASSES)
DECADES = range(1, 16)


def tensor(values):
    return torch.tensor(values, dtype=F64)


def bandwidth(distance, decade):
    """The h for which kappa is about ten to the minus decade."""
    return distance / math.sqrt(2 * decade * math.log(10))


def referee(field, alpha, beta, distance, h):
    """Kappa, and the velocity at the right atom from the sums that define it."""
    alpha, beta, D, h = (mp.mpf(v) for v in (alpha, beta, distance, h))
    kappa = mp.exp(-D * D / (2 * h * h))
    y, p, q = (-D / 2, D / 2), (alpha, 1 - alpha), (beta, 1 - beta)
    k = ((mp.mpf(1), kappa), (kappa, mp.mpf(1)))

    def total(weights, values=(1, 1), row=1):
        return mp.fsum(k[row][j] * weights[j] * values[j] for j in (0, 1))

    if field == "scores":
        return kappa, total(p, y) / total(p) - total(q, y) / total(q)
    if field == "proxy":
        crowd = (total(q, row=0), total(q, row=1))  # column sums, of data and of model alike
        towards = [k[1][j] * p[j] / mp.sqrt(total(p) * crowd[j]) for j in (0, 1)]
        away = [k[1][j] * q[j] / mp.sqrt(total(q) * crowd[j]) for j in (0, 1)]
        return kappa, (
            mp.fsum(away) * mp.fsum(w * z for w, z in zip(towards, y, strict=True))
            - mp.fsum(towards) * mp.fsum(w * z for w, z in zip(away, y, strict=True))
        )

    def moved(goal):
        """Mass from right to left: the zero of J' in the proof of thm-two-atoms, a quadratic."""
        a = 1 - kappa**2
        b = beta - goal + kappa**2 * (goal + 1 - beta)
        t = (-b + mp.sqrt(b * b + 4 * a * kappa**2 * goal * (1 - beta))) / (2 * a)
        balance = t * (beta - goal + t) - kappa**2 * (goal - t) * (1 - beta - t)
        assert abs(balance) < mp.mpf(10) ** -90
        return t

    return kappa, -D * (moved(alpha) - moved(beta)) / (1 - beta)


def leading(field, alpha, beta, distance, kappa):
    size = {
        "scores": (alpha - beta) / ((1 - alpha) * (1 - beta)),
        "proxy": (alpha - beta) / ((1 - beta) * mp.sqrt(beta * (1 - alpha))),
    }[field]
    return distance * kappa * size


def order(sizes, errors):
    """Slope of log error against log size."""
    s, e = tensor([float(mp.log(v)) for v in sizes]), tensor([float(mp.log(v)) for v in errors])
    s = s - s.mean()
    return float(s @ e / (s @ s))


def atoms(distance, d, generator):
    """Atoms at a distance along a random direction of R^d, that direction, and the middle."""
    e, middle = torch.randn(2, d, generator=generator, dtype=F64)
    e = e / e.norm()
    return torch.stack([middle - distance / 2 * e, middle + distance / 2 * e]), e


def library(field, alpha, beta, distance, d=2, seed=0):
    """Coefficient along the axis of the library's field at the right atom, with the data's left atom given twice."""
    x, e = atoms(distance, d, torch.Generator().manual_seed(seed))
    y = torch.cat([x, x[:1]])
    v = field(x, y, a=tensor([beta, 1 - beta]), b=tensor([alpha / 4, 1 - alpha, 3 * alpha / 4]))[1]
    assert (v - (v @ e) * e).norm() < 1e-13 * distance  # along the axis
    return float(v @ e)


def check_one_shot(field, make, alpha, beta, steps, squares):
    """Closed form, remainder 0 <= rho <= bound, observed orders 1 and 2; then the library's field."""
    D, kappas, first, second = 2.3, [], [], []
    for decade in DECADES:
        h = bandwidth(D, decade)
        kappa, truth = referee(field, alpha, beta, D, h)
        assert abs(two_atom_velocity(field, alpha, beta, D, h) / truth - 1) < 1e-13
        size = leading(field, mp.mpf(alpha), mp.mpf(beta), mp.mpf(D), kappa)
        rho = -truth / size - 1 + kappa * steps
        assert 0 <= rho <= kappa**2 * (steps**2 + squares) / 2
        assert abs(truth) <= size
        if decade == DECADES[-1]:
            sharp(float(rho / kappa**2), float((steps**2 + squares) / 2), 0.999)
            damaged("the remainder's constant halved", rho <= kappa**2 * (steps**2 + squares) / 4)
            damaged("kappa without the one half in the cost", abs(truth) <= size * kappa)
        for k in (1, 2):
            series = -size * (1 - kappa * steps if k == 2 else 1)
            assert abs(two_atom_velocity(field, alpha, beta, D, h, order=k) / series - 1) < 1e-12
        if kappa * steps < 0.01:
            kappas.append(kappa)
            first.append(abs(truth / size + 1))
            second.append(abs(rho))
    assert len(kappas) >= 10
    assert abs(order(kappas, first) - 1) < 1e-3 and abs(order(kappas, second) - 2) < 1e-3
    for ratio, seed in ((0.5, 0), (1.5, 1), (3.0, 2)):
        h = D / ratio
        exact = two_atom_velocity(field, alpha, beta, D, h)
        assert abs(library(make(h), alpha, beta, D, d=1 + seed, seed=seed) - exact) < 1e-14 * D + 1e-12 * abs(exact)


# thm-two-modes-scores -------------------------------------------------------------------


@each_masses
def test_thm_two_modes_scores(alpha, beta):
    """Sums over the atoms at 110 digits; then the library's field.

    Checked by: exact arithmetic, definition.
    """
    u, w = mp.mpf(alpha) / (1 - mp.mpf(alpha)), mp.mpf(beta) / (1 - mp.mpf(beta))
    check_one_shot("scores", nl.fields.ScoreDifference, alpha, beta, u + w, u**2 + w**2)


# thm-two-modes-proxy --------------------------------------------------------------------


@each_masses
def test_thm_two_modes_proxy(alpha, beta):
    """Sums over the atoms at 110 digits; then the library's field.

    Checked by: exact arithmetic, definition.
    """
    u, w = mp.mpf(alpha) / (1 - mp.mpf(alpha)), mp.mpf(beta) / (1 - mp.mpf(beta))
    check_one_shot(
        "proxy",
        lambda h: nl.fields.SinkhornProxy(h * h),
        alpha,
        beta,
        w + 1 / (2 * w) + u / 2,
        w**2 + 1 / (2 * w**2) + u**2 / 2,
    )
    for ratio in (0.3, 2.0, 7.0):  # the ratio of the two fields, exactly
        kappa = math.exp(-(ratio**2) / 2)
        both = [two_atom_velocity(name, alpha, beta, 1.0, 1 / ratio) for name in ("proxy", "scores")]
        known = math.sqrt((1 - alpha + alpha * kappa) / (beta + (1 - beta) * kappa))
        assert both[0] / both[1] == pytest.approx(known, rel=1e-12)
        if ratio < 1 and alpha + beta != 1:
            damaged("the ratio is that of the limit at every kappa", abs(known**2 * beta / (1 - alpha) - 1) < 1e-3)


# thm-two-modes-wasserstein --------------------------------------------------------------


@each_masses
def test_thm_two_modes_wasserstein(alpha, beta):
    """The plan of a linear program, on atoms and on heaps.

    Checked by: linear program, simulation.
    """
    D, exact = 2.3, -2.3 * (alpha - beta) / (1 - beta)
    assert two_atom_velocity("wasserstein", alpha, beta, D, 0.1) == pytest.approx(exact, rel=1e-14)
    for d in (1, 2, 3):
        assert library(nl.fields.Wasserstein(), alpha, beta, D, d, seed=d) == pytest.approx(exact, rel=1e-12)
        # Clusters of any shapes, of radius r: D > 2 sqrt 2 r.
        generator = torch.Generator().manual_seed(d)
        ends, e = atoms(D, d, generator)
        r = 0.99 * D / (2 * math.sqrt(2))

        def cluster(n, centre, chance=generator, d=d, r=r):
            way = torch.randn(n, d, generator=chance, dtype=F64)
            return centre + r * torch.rand(n, 1, generator=chance, dtype=F64) * way / way.norm(dim=1, keepdim=True)

        x = torch.cat([cluster(5, ends[0]), cluster(8, ends[1])])
        y = torch.cat([cluster(9, ends[0]), cluster(4, ends[1])])
        a, b = torch.rand(13, generator=generator, dtype=F64), torch.rand(13, generator=generator, dtype=F64)
        a[:5] *= beta / a[:5].sum()
        a[5:] *= (1 - beta) / a[5:].sum()
        b[:9] *= alpha / b[:9].sum()
        b[9:] *= (1 - alpha) / b[9:].sum()
        P = nl.fields.exact_plan(x, y, a, b)
        assert float(P[5:, :9].sum()) == pytest.approx(alpha - beta, abs=1e-12)
        assert float(P[:5, 9:].sum()) == pytest.approx(0, abs=1e-12)
        mean = a[5:] @ nl.fields.Wasserstein()(x, y, a=a, b=b)[5:] / (1 - beta)
        assert (mean - exact * e).norm() <= 2 * r
    # Both constants bite: goals shifted by 2r; and pairs that enclose more than a right angle, which do cross.
    r, axis = 0.2 * D, torch.tensor([1.0, 0.0], dtype=F64)
    places = tensor([[-D / 2, 0], [D / 2 + r, 0]]), tensor([[-D / 2 - r, 0], [D / 2 - r, 0]])
    mean = nl.fields.Wasserstein()(*places, a=tensor([beta, 1 - beta]), b=tensor([alpha, 1 - alpha]))[1] @ axis
    sharp(abs(float(mean) - exact), 2 * r, 0.999)
    damaged("the mean within r", abs(float(mean) - exact) <= r)
    r = D / 2.75
    turn = 2 * r * math.sqrt(1 - (2 * r / D) ** 2)  # the tangent from the origin to the ball of radius 2r about De
    shift = tensor([-((2 * r) ** 2) / D / 2, turn / 2]), tensor([-((2 * r) ** 2) / D / 2, -turn / 2])
    ends = tensor([[-D / 2, 0], [D / 2, 0]])
    x, y = (torch.stack([ends[0] - t, ends[1] + t]) for t in shift)
    assert max(float((z - ends).norm(dim=1).max()) for z in (x, y)) <= r * (1 + 1e-9)
    crossing = nl.fields.exact_plan(x, y, tensor([beta, 1 - beta]), tensor([alpha, 1 - alpha]))
    damaged("D > 2.74 r is enough", float(crossing[0, 1]) < 1e-12)
    # At once: a particle on its way to the other mode has half of the way behind it at time log 2.
    x, y = tensor([[-1.0], [0.9], [1.0], [1.1]]), tensor([[-1.0], [-1.0], [1.0], [1.0]])
    path = nl.follow(nl.fields.Wasserstein(), x, y, math.log(2) / 8, 8, method="rk4")
    assert float(path[-1, 1, 0]) == pytest.approx((0.9 - 1) / 2, abs=1e-5)


# thm-two-modes-sinkhorn -----------------------------------------------------------------


@each_masses
def test_thm_two_modes_sinkhorn(alpha, beta):
    """The plan's quadratic at 110 digits; then the library's field.

    Checked by: exact arithmetic.
    """
    D, gap, kappas, first, second = 2.3, mp.mpf(alpha) - mp.mpf(beta), [], [], []
    spread = mp.sqrt(mp.mpf(beta) * (1 - mp.mpf(beta)))
    for decade in DECADES:
        h = bandwidth(D, decade)
        kappa, truth = referee("sinkhorn", alpha, beta, D, h)
        assert abs(two_atom_velocity("sinkhorn", alpha, beta, D, h) / truth - 1) < 1e-13
        scaled = -truth * (1 - mp.mpf(beta)) / D
        rho = scaled - gap + kappa * spread
        assert 0 <= rho <= kappa**2 * (mp.mpf(1) / 2 + mp.mpf(beta) * (1 - mp.mpf(alpha)) / gap)
        assert truth < 0
        if decade == DECADES[-1]:
            constant = mp.mpf(1) / 2 + mp.mpf(beta) * (1 - mp.mpf(alpha)) / gap
            sharp(float(rho / kappa**2), float(constant), 0.999)
            damaged("the remainder without the cross plan's part", rho <= kappa**2 / 2)
            damaged("no term of first order", abs(scaled - gap) <= kappa**2 * constant)
        # The closed form of the mass that the self plan sends, and its bounds.
        s = 2 * kappa * spread**2 / (kappa + mp.sqrt(kappa**2 + 4 * (1 - kappa**2) * spread**2))
        assert abs(two_atom_mass(beta, beta, D, h * h).item() / s - 1) < 1e-13
        assert kappa * spread - kappa**2 / 2 <= s <= kappa * spread
        series = two_atom_velocity("sinkhorn", alpha, beta, D, h, order=2)
        assert abs(series * (1 - mp.mpf(beta)) / D + gap - kappa * spread) < 1e-14
        if kappa < 0.01 * gap:
            kappas.append(kappa)
            first.append(abs(scaled - gap))
            second.append(abs(rho))
    assert abs(order(kappas, first) - 1) < 1e-2 and abs(order(kappas, second) - 2) < 1e-2
    limit = two_atom_velocity("wasserstein", alpha, beta, D, 0.2)
    assert two_atom_velocity("sinkhorn", alpha, beta, D, 0.2) == pytest.approx(limit, rel=1e-12)
    assert two_atom_velocity("sinkhorn", alpha, beta, D, 0.2, order=1) == pytest.approx(limit, rel=1e-12)
    for ratio, seed in ((0.5, 0), (1.5, 1), (3.0, 2)):
        h = D / ratio
        exact = two_atom_velocity("sinkhorn", alpha, beta, D, h)
        v = library(nl.fields.Sinkhorn(h * h, tol=1e-13), alpha, beta, D, d=1 + seed, seed=seed)
        assert abs(v - exact) < 1e-9


# thm-mass-blindness ---------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
@each_masses
def test_thm_mass_blindness(alpha, beta, seed):
    """Fields on random heaps; MMD's from its kernel sums.

    Checked by: definition.
    """
    generator = torch.Generator().manual_seed(seed)
    D, d, h = 2.0, 1 + seed % 3, [0.3, 0.45, 0.7, 1.0][seed]
    r = [0.0, 0.1, 0.2, 0.3][seed]
    ends, e = atoms(D, d, generator)

    def ball(n):
        way = torch.randn(n, d, generator=generator, dtype=F64)
        return r * way / way.norm(dim=1, keepdim=True) * torch.rand(n, 1, generator=generator, dtype=F64).sqrt()

    x = torch.cat([ends[0] + ball(3), ends[1] + ball(5)])
    shape = torch.cat([torch.softmax(torch.randn(n, generator=generator, dtype=F64), 0) for n in (3, 5)])
    left = torch.arange(8) < 3
    q, p = (torch.where(left, m * shape, (1 - m) * shape) for m in (beta, alpha))
    y = torch.cat([x, x[:2]])  # two of the data's points given twice
    b = torch.cat([p[:2] / 3, p[2:], 2 * p[:2] / 3])
    at = torch.cat([x[3:], ends[1] + ball(20), (ends[1] - r * e)[None]])
    kappa = math.exp(-D * (D - 4 * r) / (2 * h * h))
    gap = (alpha - beta) / (1 - beta)
    for make, constant in (
        (nl.fields.ScoreDifference(h), gap / (1 - alpha)),
        (nl.fields.SinkhornProxy(h * h), gap / math.sqrt(beta * (1 - alpha))),
    ):
        v = make(x, y, at=at, a=q, b=b)
        bound = (D + 2 * r) * kappa * constant
        assert float(v.norm(dim=1).max()) <= bound + 1e-14
        assert (v @ e < 1e-14).all()
        if r == 0:
            sharp(float(v.norm(dim=1).max()), bound * (1 + 1e-6), 0.999)
            damaged("nine tenths of the bound", float(v.norm(dim=1).max()) <= 0.9 * bound)
            exact = two_atom_velocity("scores" if "Score" in repr(make) else "proxy", alpha, beta, D, h)
            assert (v - exact * e).norm(dim=1).max() < 1e-13

    # MMD sees masses: its velocity is that of the excess, not small, and outwards.
    def pull(z, points, weights):
        gap = z[:, None] - points
        k = torch.exp(-gap.square().sum(-1) / (2 * h * h)) * weights
        return (k[..., None] * gap).sum(1) / h**2

    v = nl.fields.MMD(h)(x, y, at=at, a=q, b=b)
    near, far = pull(at, x[3:], shape[3:]), pull(at, x[:3], shape[:3])
    assert (v - 2 * (alpha - beta) * (near - far)).norm(dim=1).max() < 1e-12
    same = nl.fields.ScoreDifference(h)(x, y, at=at, a=q, b=q_as(b, beta, alpha, y, ends))
    assert same.norm(dim=1).max() < 1e-12  # equal masses: nothing at all


def q_as(b, beta, alpha, y, ends):
    """The data's weights with the model's masses."""
    left = (y - ends[0]).norm(dim=1) < (y - ends[1]).norm(dim=1)
    return torch.where(left, b * beta / alpha, b * (1 - beta) / (1 - alpha))


# thm-float32-horizon --------------------------------------------------------------------

FORMATS = {torch.bfloat16: 8, torch.float16: 11, torch.float32: 24, torch.float64: 53}


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_thm_float32_horizon(dtype):
    """Additions in the format itself.

    Checked by: exact arithmetic, simulation.
    """
    digits = FORMATS[dtype]
    assert torch.finfo(dtype).eps == 2.0 ** (1 - digits)
    # Steps that are lost, at places of every mantissa; and one that is not, where the bound is sharp.
    generator = torch.Generator().manual_seed(0)
    x = (1 + torch.rand(2000, generator=generator, dtype=F64)).to(dtype)
    x[0] = 1.0
    step = (x.double() * 2.0 ** (-digits - 2) * 0.999).to(dtype)
    assert torch.equal(x - step, x) and torch.equal(x + step, x)
    least = torch.tensor(2.0 ** (-digits - 1) * 1.01, dtype=dtype)
    assert x[0] - least < x[0]
    sharp(2.0 ** (-digits - 2), float(least), 0.49)  # within a factor two of the least step that is not lost
    damaged("twice the step is lost, too", x[0] - least == x[0])
    if dtype in (torch.bfloat16, torch.float16):
        return
    for (alpha, beta), eta in zip(MASSES, (1.0, 0.5, 1.0, 0.2), strict=True):
        c = {
            "scores": (alpha - beta) / ((1 - alpha) * (1 - beta)),
            "proxy": (alpha - beta) / ((1 - beta) * math.sqrt(beta * (1 - alpha))),
        }
        mirrored = {
            "scores": (alpha - beta) / (alpha * beta),
            "proxy": (alpha - beta) / (beta * math.sqrt((1 - beta) * alpha)),
        }
        fields = {"scores": lambda h: nl.fields.ScoreDifference(h), "proxy": lambda h: nl.fields.SinkhornProxy(h * h)}
        for name, make in fields.items():
            D = 1.7
            edge = torch.tensor([-D / 2, D / 2], dtype=F64).to(dtype)[:, None]
            a, b = (torch.tensor([m, 1 - m], dtype=F64).to(dtype) for m in (beta, alpha))
            far = math.sqrt(2 * math.log(2.0 ** (digits + 3) * eta * c[name])) * (1 + 1e-6)
            v = two_atom_velocity(name, alpha, beta, D, D / far)
            assert v != 0 and edge[1] + eta * v == edge[1], "a step by the exact velocity is lost"
            # The left atom is the right one of the mirrored problem, with a constant of its own.
            largest = max(c[name], mirrored[name])
            away = math.sqrt(2 * math.log(2.0 ** (digits + 3) * eta * largest)) * (1 + 1e-6)
            left = -two_atom_velocity(name, 1 - alpha, 1 - beta, D, D / away)
            assert left != 0 and edge[0] + eta * left == edge[0], "so is the left one's"
            blind = math.sqrt(2 * math.log(2.0 ** (digits + 2) * alpha / (1 - alpha)))
            further = max(far, blind) + 0.15
            path = nl.follow(make(D / further), edge, edge.clone(), eta, 5, a=a, b=b)
            assert (path[:, 1] == edge[1]).all(), "and so are steps by the computed one"
            # This side of it the field is seen, with an error of about one rounding over kappa.
            near = math.sqrt(2 * math.log(2.0 ** (digits - 8)))
            v = make(D / near)(edge, edge.clone(), a=a, b=b)[1, 0]
            assert float(v) == pytest.approx(two_atom_velocity(name, alpha, beta, D, D / near), rel=0.15)
    # The closed form is good until kappa itself underflows.
    with mp.workdps(400):
        _, truth = referee("scores", 0.7, 0.4, 1.0, 1 / 37.0)
    assert abs(two_atom_velocity("scores", 0.7, 0.4, 1.0, 1 / 37.0) / truth - 1) < 1e-12
    assert two_atom_velocity("scores", 0.7, 0.4, 1.0, 1 / 38.7) == 0.0


# thm-soft-threshold ---------------------------------------------------------------------


@pytest.mark.parametrize("d", [1, 2, 3])
@pytest.mark.parametrize("eps", [0.2, 1.0])
def test_thm_soft_threshold(eps, d):
    """The threshold by bisection of the marginal.

    Checked by: brute force.
    """
    generator = torch.Generator().manual_seed(d)
    D, alpha = 1.6, 0.35
    ends, e = atoms(D, d, generator)
    middle = ends.mean(0)
    x = middle + torch.randn(7, d, generator=generator, dtype=F64)
    a = torch.softmax(torch.randn(7, generator=generator, dtype=F64), 0)
    T = nl.barycentric_map(x, ends, eps, a, tensor([alpha, 1 - alpha]), tol=1e-13)

    def share(points, threshold):
        return torch.sigmoid(-D * ((points - middle) @ e - threshold) / eps)

    low, high = -30.0, 30.0
    for _ in range(100):
        theta = (low + high) / 2
        low, high = (theta, high) if float(a @ share(x, theta)) < alpha else (low, theta)
    at = torch.cat([x, middle + 2 * torch.randn(20, d, generator=generator, dtype=F64)])
    claim = ends[1] - D * share(at, theta)[:, None] * e
    assert (T(at) - claim).norm(dim=1).max() < 1e-9
    slopes = torch.autograd.functional.jacobian(lambda z: T(z).sum(0), at).movedim(1, 0)
    tau = share(at, theta)
    known = (D**2 / eps * tau * (1 - tau))[:, None, None] * torch.outer(e, e)
    assert (slopes - known).abs().max() < 1e-7
    assert torch.linalg.eigvalsh((slopes + slopes.mT) / 2).max() <= D**2 / (4 * eps) + 1e-7
    there = (middle + theta * e)[None]
    steepest = e @ torch.autograd.functional.jacobian(lambda z: T(z).sum(0), there)[:, 0] @ e
    sharp(steepest, D**2 / (4 * eps) * (1 + 1e-7), 0.999)
    damaged("an eighth for the quarter", steepest <= D**2 / (8 * eps))
    damaged("the threshold at the middle", abs(float(a @ share(x, 0.0)) - alpha) < 1e-3)


# thm-cluster-split ----------------------------------------------------------------------


def split_rate(name, alpha, beta, D, h):
    """The slope along the axis that the theorem states."""
    kappa = math.exp(-(D**2) / (2 * h * h))
    p, q = alpha * kappa / (1 - alpha + alpha * kappa), beta * kappa / (1 - beta + beta * kappa)
    if name == "mmd":
        return 2 * (alpha - beta) / h**2 * (1 - kappa + kappa * D**2 / h**2)
    speed = abs(two_atom_velocity(name, alpha, beta, D, h))
    if name == "scores":
        rest = 1 - p - q
    elif name == "proxy":
        rest = 1 - (p + q) / 2
    else:
        rest = 1 - float(two_atom_mass(alpha, beta, D, h * h) + two_atom_mass(beta, beta, D, h * h)) / (1 - beta)
    return D / h**2 * speed * rest


@pytest.mark.parametrize("name", ["scores", "proxy", "sinkhorn", "mmd", "floor"])
@pytest.mark.parametrize(("alpha", "beta"), [(0.7, 0.4), (0.97, 0.3)])
def test_thm_cluster_split(name, alpha, beta):
    """Derivatives of the fields, automatic or by differences, and heaps that shrink.

    Checked by: finite differences, definition.
    """
    D, h, d = 2.0, 1.1, 2
    generator = torch.Generator().manual_seed(5)
    ends, e = atoms(D, d, generator)
    a, b = tensor([beta, 1 - beta]), tensor([alpha, 1 - alpha])
    axis = torch.outer(e, e)
    field = {
        "scores": nl.fields.ScoreDifference(h),
        "proxy": nl.fields.SinkhornProxy(h * h),
        "sinkhorn": nl.fields.Sinkhorn(h * h, tol=1e-13),
        "mmd": nl.fields.MMD(h),
        "floor": nl.fields.Drift((h * h / 8,), "squared", False, floor=0.1),
    }[name]

    def speed(z):
        return field(ends, ends.clone(), at=z, a=a, b=b)

    if name == "sinkhorn":
        steps = 1e-4 * torch.eye(d, dtype=F64)
        slope = torch.stack([(speed(ends[1:] + s) - speed(ends[1:] - s))[0] / 2e-4 for s in steps], 1)
        accuracy = 1e-6
    else:
        slope = torch.autograd.functional.jacobian(speed, ends[1:])[0, :, 0]
        accuracy = 1e-10
    if name == "floor":
        kappa = math.exp(-4 * D**2 / h**2)
        gain = D * 8 / h**2 * (alpha + beta) * kappa / (2 - alpha - beta + (alpha + beta) * kappa)
        v = float(speed(ends[1:])[0] @ e)
        assert v < -0.05 and gain > 0
        assert (slope - gain / 2 * v * axis).abs().max() < 1e-12
        return
    rate = split_rate(name, alpha, beta, D, h)
    known = rate * axis
    if name == "mmd":
        across = 2 * (alpha - beta) / h**2 * (1 - math.exp(-(D**2) / (2 * h * h)))
        known = known + across * (torch.eye(d, dtype=F64) - axis)
    assert (slope - known).abs().max() < accuracy * (1 + abs(rate))
    damaged("the rate without D/h^2", abs(float(e @ slope @ e) - rate * h**2 / D) < 1e-3 * abs(rate))
    damaged("the same in every direction", (slope - rate * torch.eye(d, dtype=F64)).abs().max() < 1e-3 * abs(rate))
    # Particles of a small cluster move apart at that rate, and the size of what is left over is of second order.
    shape = torch.randn(4, d, generator=generator, dtype=F64)
    w = torch.softmax(torch.randn(4, generator=generator, dtype=F64), 0) * (1 - beta)
    left_over = []
    for size in (1e-2, 5e-3):
        x = torch.cat([ends[:1], ends[1] + size * shape])
        v = field(x, ends, a=torch.cat([a[:1], w]), b=b)[1:]
        off = (v - v[0]) - size * (shape - shape[0]) @ slope.T
        left_over.append(float(off.norm()))
        assert left_over[-1] < 0.2 * size * (abs(rate) + 0.05)
    assert left_over[1] < 0.35 * left_over[0]
    if name == "sinkhorn":  # the criterion tau + sigma < 1
        parts = [float(two_atom_mass(m, beta, D, h * h)) / (1 - beta) for m in (alpha, beta)]
        assert (sum(parts) < 1) == (rate > 0) == (alpha < 0.9)


# thm-affinity-floor ---------------------------------------------------------------------


def affinities(alpha, beta, kappa, N, M):
    """The affinities of a right particle to the left and to the right, before the floor."""
    here, there, far = 1 - alpha + alpha * kappa, 1 - beta + beta * kappa, beta + (1 - beta) * kappa
    row = M * here + N * there
    return kappa / math.sqrt(row * N * far), 1 / math.sqrt(row * N * there)


@pytest.mark.parametrize(("N", "M"), [(50, 50), (20, 40), (40, 20), (500, 500), (2000, 2000)])
@pytest.mark.parametrize("distance", ["squared", "euclidean"])
def test_thm_affinity_floor(distance, N, M):
    """Algorithm 2 on points that sit on two atoms, against the closed form.

    Checked by: closed form.
    """
    D, alpha, beta, delta = 2.0, 0.7, 0.4, 1e-3
    rows = min(N, 100), min(M, 100)  # beyond a hundred: each point for several, the floor as many times higher
    times = N // rows[0]
    assert times == M // rows[1]
    x = torch.where(torch.arange(rows[0]) < round(beta * rows[0]), -D / 2, D / 2).double()[:, None]
    y = torch.where(torch.arange(rows[1]) < round(alpha * rows[1]), -D / 2, D / 2).double()[:, None]
    for tau in (0.02, 0.09, 0.4, 2.0):
        kappa = math.exp(-(D**2) / (2 * tau)) if distance == "squared" else math.exp(-D / tau)
        to_left, to_right = affinities(alpha, beta, kappa, N, M)
        for floor in (0.0, delta, 0.05):
            v = nl.fields.Drift((tau,), distance, False, floor=floor * times)(x, y)
            assert (v[x < 0] - v[0]).abs().max() < 1e-12 and (v[x > 0] - v[-1]).abs().max() < 1e-12
            exact = -D * (alpha - beta) * N * M * max(to_left, floor) * max(to_right, floor)
            assert float(v[-1]) == pytest.approx(exact, rel=1e-10, abs=1e-14)
            if floor == delta and to_left <= delta <= to_right and N == M:
                known = (
                    -D
                    * N
                    * delta
                    * (alpha - beta)
                    / math.sqrt((2 - alpha - beta + (alpha + beta) * kappa) * (1 - beta + beta * kappa))
                )
                assert float(v[-1]) == pytest.approx(known, rel=1e-10)
                limit = -D * N * delta * (alpha - beta) / math.sqrt((2 - alpha - beta) * (1 - beta))
                share = kappa * ((alpha + beta) / (2 - alpha - beta) + beta / (1 - beta)) / 2
                assert 0 <= float(v[-1]) / limit - 1 + share + 1e-12
                assert float(v[-1]) / limit - 1 <= 1e-12
                sharp(float(v[-1]) / limit, 1.0)
                if share > 1e-6:
                    damaged("half of the first-order term", float(v[-1]) / limit - 1 + share / 2 >= 0)
                damaged("the same at every batch size", abs(float(v[-1]) / limit * N / 50 - 1) < 0.1 and N != 50)
                if distance == "squared" and N in (50, 500) and tau == 0.02:
                    assert round(float(v[-1]), 3) == {50: -0.041, 500: -0.408}[N]
    if N == 2000:  # everything floored: the same for all particles, towards the data's mean
        v = nl.fields.Drift((0.02,), distance, False, floor=delta * times)(x, y)
        assert (v - (N * delta) ** 2 * (y.mean() - x.mean())).abs().max() < 1e-10


# thm-floor-rest -------------------------------------------------------------------------


@pytest.mark.parametrize("phi", [0.03, 0.2, 0.6])
@pytest.mark.parametrize(("alpha", "beta"), [(0.7, 0.4), (0.6, 0.5)])
def test_thm_floor_rest(phi, alpha, beta):
    """Velocities of the floored field at many places, and where an atom ends.

    Checked by: closed form, simulation.
    """
    D, h = 2.0, 0.125
    a, b, y = tensor([beta, 1 - beta]), tensor([alpha, 1 - alpha]), tensor([[-D / 2], [D / 2]])

    def speed(z, h=h):
        """Velocity of the model's right atom, standing at each of the places z in turn."""
        field = nl.fields.Drift((h * h,), "squared", False, floor=phi / 2)  # two rows that stand for N points
        z = torch.atleast_1d(torch.as_tensor(z, dtype=F64))
        x = torch.stack([torch.full_like(z, -D / 2), z], 1)[..., None]
        each = [v.expand(len(z), *v.shape) for v in (y, a, b)]
        return field(x, each[0], a=each[1], b=each[2])[:, 1, 0]

    # Near the right data atom: the balance of the pull back and the floor's pull.
    seen = 0
    for xi in (0.0, 0.03, 0.1, 0.16, 0.2, 0.25):
        k = math.exp(-(xi**2) / (2 * h * h))
        A = 1 / math.sqrt((1 - beta) * (1 - beta + (1 - alpha) * k))
        root = math.sqrt(k)
        if root * A < phi:  # the theorem does not speak of these
            continue
        leave = phi * A * (D - xi) * (alpha * (1 - beta) - beta * (1 - alpha) * root)
        stay = (1 - alpha) * root * A * xi * (beta * phi + (1 - beta) * A)
        assert float(speed(D / 2 - xi)) == pytest.approx(stay - leave, rel=1e-9, abs=1e-12)
        seen += 1
    assert seen >= 4
    # Far from everything: a straight way to the data's mean, and past it.
    mean = (1 - 2 * alpha) * D / 2
    rest = mean + beta * phi * (mean + D / 2)
    for z in (rest, rest + 0.1, rest - 0.1):
        assert float(speed(z, 0.05)) == pytest.approx(phi * (rest - z), rel=1e-9, abs=1e-12)
    damaged("at rest at the data's mean itself", abs(float(speed(mean, 0.05))) < 1e-3 * phi)
    # What the atom does: caught near the mode below the threshold, at rest between the modes above it.
    grid = torch.linspace(0.001, 0.5, 400, dtype=F64)
    omega = torch.exp(-grid.square() / (4 * h * h))
    A = ((1 - beta) * (1 - beta + (1 - alpha) * omega**2)) ** -0.5
    hold = (1 - alpha) * omega * grid
    pull = (D - grid) * (alpha * (1 - beta) - beta * (1 - alpha) * omega) - beta * hold
    caught = bool(((1 - beta) * A * hold / pull)[pull > 0].max() > phi)
    assert caught == bool(speed(D / 2 - grid).max() > 0)
    z = D / 2
    for _ in range(120):
        z += 0.2 / max(phi, 0.2) * float(speed(z))
    assert caught == (phi == 0.03)
    assert D / 2 - 2 * h < z < D / 2 if caught else abs(z - rest) < 1e-6
