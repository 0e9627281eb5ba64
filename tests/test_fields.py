"""The fields of drifting models: each against slow loops written from its formula, its population form, its functional,
and what every velocity owes its reader: batches, weights, symmetries, precision, and errors instead of NaN."""

import itertools
import math
import statistics
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.optimize import fsolve, linprog
from test_bad_input import CLOUDS, INF, NAN, WEIGHTS, cloud, refused, spoiled
from torch import Generator

import nsgf_lite as nl
from nsgf_lite.fields.base import log_kernel
from nsgf_lite.fields.witness import solve_ridge

F = nl.fields


def chance(seed=0):
    return Generator().manual_seed(seed)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=chance(seed), dtype=torch.float64).to(dtype)


def simplex(*shape, seed=0):
    a = torch.rand(*shape, generator=chance(seed), dtype=torch.float64) + 0.1
    return a / a.sum(-1, keepdim=True)


def close(one, two, tol=1e-12):
    """Equal up to tol times the size of what is compared."""
    one, two = (torch.as_tensor(t, dtype=torch.float64) for t in (one, two))
    assert one.shape == two.shape and bool(torch.isfinite(two).all()), (one.shape, two)
    assert float((one - two).abs().max()) <= tol * max(float(two.abs().max()), 1e-300), (one - two).abs().max()


X, Y, Z = normal(5, 2), normal(7, 2, seed=1) + 0.5, normal(4, 2, seed=2)
A, B = simplex(5), simplex(7, seed=1)

# --- formulas, as loops over lists of lists ---------------------------------------------------------------------------


def square(p, q):
    return sum((s - t) ** 2 for s, t in zip(p, q, strict=True))


def gauss(p, q, h):
    return math.exp(-square(p, q) / (2 * h**2))


def laplace(p, q, h):
    return math.exp(-math.sqrt(square(p, q)) / h)


def slope(p, q, h, kernel):
    """Gradient of k(., q) at p."""
    far = math.sqrt(square(p, q))
    if kernel == "gaussian":
        factor = -gauss(p, q, h) / h**2
    else:
        factor = -laplace(p, q, h) / (h * far) if far else 0.0
    return [factor * (s - t) for s, t in zip(p, q, strict=True)]


def lists(*tensors):
    return [t.tolist() for t in tensors]


def mean_shift(z, y, b, h):
    """E_{k,p}[y] = ∫k(z, y) y dp / ∫k(z, y) dp."""
    total, moment = 0.0, [0.0] * len(z)
    for point, mass in zip(y, b, strict=True):
        k = mass * gauss(z, point, h)
        total += k
        moment = [s + k * t for s, t in zip(moment, point, strict=True)]
    return [s / total for s in moment]


def score_difference(x, y, z, a, b, h):
    x, y, z, a, b = lists(x, y, z, a, b)
    return [[s - t for s, t in zip(mean_shift(p, y, b, h), mean_shift(p, x, a, h), strict=True)] for p in z]


def smoothed_kl(x, y, z, a, b, h, nodes):
    """k_h * (grad log p_h - grad log q_h), the convolution by a product of Gauss and Hermite's rules."""
    node, weight = np.polynomial.hermite_e.hermegauss(nodes)
    out = torch.zeros_like(z)
    for index in itertools.product(range(nodes), repeat=z.shape[1]):
        mass = math.prod(weight[k] / math.sqrt(2 * math.pi) for k in index)
        moved = z + h * torch.tensor([node[k] for k in index], dtype=torch.float64)
        out += mass / h**2 * torch.tensor(score_difference(x, y, moved, a, b, h), dtype=torch.float64)
    return out


def one_shot(x, y, z, a, b, h, iterations):
    """Rows at z of A <- A / sqrt(row sum x column sum), repeated, from A = K; columns are those of the particles."""
    x, y, z, a, b = lists(x, y, z, a, b)
    M = [[gauss(p, q, h) for q in y] for p in x]
    N = [[gauss(p, q, h) for q in y] for p in z]
    for _ in range(iterations):
        row = [sum(b[j] * M[i][j] for j in range(len(y))) for i in range(len(x))]
        at_row = [sum(b[j] * N[i][j] for j in range(len(y))) for i in range(len(z))]
        column = [sum(a[i] * M[i][j] for i in range(len(x))) for j in range(len(y))]
        N = [[N[i][j] / math.sqrt(at_row[i] * column[j]) for j in range(len(y))] for i in range(len(z))]
        M = [[M[i][j] / math.sqrt(row[i] * column[j]) for j in range(len(y))] for i in range(len(x))]
    return N


def proxy(x, y, z, a, b, eps, iterations=1):
    h = math.sqrt(eps)
    to_y, to_x = one_shot(x, y, z, a, b, h, iterations), one_shot(x, x, z, a, a, h, iterations)
    out = []
    for i in range(len(z)):
        r_y = sum(float(b[j]) * to_y[i][j] for j in range(len(y)))
        r_x = sum(float(a[k]) * to_x[i][k] for k in range(len(x)))
        to_data = [sum(float(b[j]) * to_y[i][j] * float(y[j, c]) for j in range(len(y))) for c in range(z.shape[1])]
        to_self = [sum(float(a[k]) * to_x[i][k] * float(x[k, c]) for k in range(len(x))) for c in range(z.shape[1])]
        out.append([r_x * s - r_y * t for s, t in zip(to_data, to_self, strict=True)])
    return out


def algorithm_2(x, y, tau, distance, ignore_self, normalisation, floor, z=None):
    """Deng et al.'s Algorithm 2, as its pseudocode goes; at other points z the particles still make the columns."""
    x, y, z = x.tolist(), y.tolist(), None if z is None else z.tolist()

    def logit(p, q):
        return -square(p, q) / (2 * tau) if distance == "squared" else -math.sqrt(square(p, q)) / tau

    def own(i, k):
        return -INF if ignore_self and i == k else logit(x[i], x[k])

    n, m = len(x), len(y)
    columns_y = [sum(math.exp(logit(x[i], y[j])) for i in range(n)) for j in range(m)]
    columns_x = [sum(math.exp(own(i, k)) for i in range(n)) for k in range(n)]
    out = []
    for i, p in enumerate(x if z is None else z):
        to_y = [math.exp(logit(p, q)) for q in y]
        to_x = [math.exp(own(i, k) if z is None else logit(p, x[k])) for k in range(n)]
        row_y, row_x = sum(to_y), sum(to_x)
        if normalisation == "concatenated":
            row_y = row_x = row_y + row_x
        A_y = [max(math.sqrt(to_y[j] / row_y * to_y[j] / columns_y[j]), floor) for j in range(m)]
        A_x = [max(math.sqrt(to_x[k] / row_x * to_x[k] / columns_x[k]), floor) for k in range(n)]
        W_y, W_x = [s * sum(A_x) for s in A_y], [s * sum(A_y) for s in A_x]
        out.append(
            [sum(W_y[j] * y[j][c] for j in range(m)) - sum(W_x[k] * x[k][c] for k in range(n)) for c in range(len(p))]
        )
    return torch.tensor(out, dtype=torch.float64)


def descent(z, atoms, c, h, kernel):
    """Minus the gradient at z of Σ_l c_l k(·, atoms_l), a sum over bandwidths."""
    out = []
    for p in z.tolist():
        grad = [0.0] * len(p)
        for width in h:
            for q, mass in zip(atoms.tolist(), c.tolist(), strict=True):
                grad = [s + mass * t for s, t in zip(grad, slope(p, q, width, kernel), strict=True)]
        out.append([-s for s in grad])
    return torch.tensor(out, dtype=torch.float64)


def gram(x, y, h, kernel):
    k = gauss if kernel == "gaussian" else laplace
    return torch.tensor([[sum(k(p, q, w) for w in h) for q in y.tolist()] for p in x.tolist()], dtype=torch.float64)


def mmd_flow(x, y, z, a, b, h, kernel):
    return 2 * descent(z, torch.cat([x, y]), torch.cat([a, -b]), h, kernel)


def drmmd_flow(x, y, z, a, b, lam, h, kernel):
    """On the span of all points, Σ_p has the matrix D G with D the data's weights; (Σ_p + λ) e = m_q - m_p."""
    w, c = torch.cat([x, y]), torch.cat([a, -b])
    D = torch.diag(torch.cat([torch.zeros_like(a), b]))
    e = torch.linalg.solve(D @ gram(w, w, h, kernel) + lam * torch.eye(len(w), dtype=torch.float64), c)
    return 2 * (1 + lam) * descent(z, w, e, h, kernel)


def kale_witness(x, y, a, b, lam, h, kernel):
    """Values h*(y): λ h* = m_q - Σ_j b_j exp(h*(y_j)) k(·, y_j), where the objective's gradient vanishes."""
    K, crowd = gram(y, y, h, kernel).numpy(), (gram(y, x, h, kernel) @ a).numpy()
    equation = lambda t: lam * t - crowd + K @ (b.numpy() * np.exp(t))  # noqa: E731
    jacobian = lambda t: lam * np.eye(len(t)) + K * (b.numpy() * np.exp(t))  # noqa: E731
    t, _, done, message = fsolve(equation, np.zeros(len(y)), fprime=jacobian, xtol=1e-14, full_output=True)
    assert np.abs(equation(t)).max() < 1e-12 * max(1, lam), message
    return torch.from_numpy(t)


def kale_flow(x, y, z, a, b, lam, h, kernel):
    mass = b * kale_witness(x, y, a, b, lam, h, kernel).exp()
    return (1 + lam) / lam * descent(z, torch.cat([x, y]), torch.cat([a, -mass]), h, kernel)


def staircase(u, v, a, b):
    """Monotone plan on the line, mass by mass from the left."""
    P = torch.zeros(len(u), len(v), dtype=torch.float64)
    left, right = sorted(range(len(u)), key=u.__getitem__), sorted(range(len(v)), key=v.__getitem__)
    have, want, i, j = list(a), list(b), 0, 0
    while i < len(u) and j < len(v):
        move = min(have[left[i]], want[right[j]])
        P[left[i], right[j]] += move
        have[left[i]] -= move
        want[right[j]] -= move
        if have[left[i]] <= want[right[j]]:
            i += 1
        else:
            j += 1
    return P


def directions(k, d, seed, dtype=torch.float64):
    theta = torch.randn(k, d, generator=chance(seed), dtype=dtype).double()
    return theta / theta.norm(dim=1, keepdim=True)


def sliced_flow(x, y, a, b, theta):
    out = torch.zeros_like(x)
    for t in theta:
        u, v = x @ t, y @ t
        images = staircase(u.tolist(), v.tolist(), a.tolist(), b.tolist()) @ v / a
        out += torch.outer(images - u, t) / len(theta)
    return out


# --- against the loops ------------------------------------------------------------------------------------------------

WEIGHED = pytest.mark.parametrize("weighed", [False, True], ids=["uniform", "weighed"])
ANYWHERE = pytest.mark.parametrize("where", [None, Z], ids=["particles", "points"])


def options(weighed, where):
    """Keywords for the field, and x, y, z, a, b for the loops."""
    a, b = (A, B) if weighed else (torch.full_like(A, 0.2), torch.full_like(B, 1 / 7))
    given = {"a": A, "b": B} if weighed else {}
    return given | {"at": where}, (X, Y, X if where is None else where, a, b)


@WEIGHED
@ANYWHERE
@pytest.mark.parametrize("h", [0.2, 1.0, 30.0])
def test_score_difference(weighed, where, h):
    given, plain = options(weighed, where)
    close(F.ScoreDifference(h)(X, Y, **given), score_difference(*plain, h))


@WEIGHED
@ANYWHERE
@pytest.mark.parametrize(("h", "nodes"), [(0.3, 3), (1.5, 6)])
def test_smoothed_kl(weighed, where, h, nodes):
    given, plain = options(weighed, where)
    close(F.SmoothedKL(h, nodes)(X, Y, **given), smoothed_kl(*plain, h, nodes))


def test_smoothed_kl_by_draws():
    """A mean over the generator's normal vectors, which tends to the quadrature."""
    noise = torch.randn(9, 2, generator=chance(4), dtype=torch.float64)
    field = F.ScoreDifference(0.7)
    mean = sum(field(X, Y, at=X + 0.7 * vector) for vector in noise) / 9 / 0.49
    close(F.SmoothedKL(0.7, draws=9)(X, Y, generator=chance(4)), mean)
    many = F.SmoothedKL(0.7, draws=600)(X, Y, generator=chance(5))
    close(many, F.SmoothedKL(0.7, 12)(X, Y), 0.1)


@WEIGHED
@ANYWHERE
@pytest.mark.parametrize(("eps", "iterations"), [(0.1, 1), (0.1, 4), (2.0, 1), (2.0, 3)])
def test_sinkhorn_proxy(weighed, where, eps, iterations):
    given, plain = options(weighed, where)
    close(F.SinkhornProxy(eps, iterations)(X, Y, **given), proxy(*plain, eps, iterations), 1e-11)


def test_sinkhorn_proxy_as_the_note_writes_it():
    """Equations 28 to 30: softmaxes of the logits over rows and over columns, scaled by the root of n m."""
    n, m, eps = len(X), len(Y), 0.4
    out = torch.zeros_like(X)

    def affinities(y):
        L = torch.tensor([[-square(p, q) / (2 * eps) for q in y.tolist()] for p in X.tolist()], dtype=torch.float64)
        return math.sqrt(n * len(y)) * (torch.softmax(L, 1) * torch.softmax(L, 0)).sqrt()

    A_y, A_x = affinities(Y), affinities(X)
    for i in range(n):
        r_y, r_x = A_y[i].sum() / m, A_x[i].sum() / n
        out[i] = r_x * sum(A_y[i, j] * Y[j] for j in range(m)) / m - r_y * sum(A_x[i, k] * X[k] for k in range(n)) / n
    close(F.SinkhornProxy(eps)(X, Y), out)


def test_iterated_proxy_is_the_sinkhorn_field():
    for where in (None, Z):
        exact = F.Sinkhorn(0.5, tol=1e-13)(X, Y, at=where, a=A, b=B)
        errors = [
            float((F.SinkhornProxy(0.5, k)(X, Y, at=where, a=A, b=B) - exact).abs().max()) for k in (1, 8, 64, 512)
        ]
        assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-10 < errors[0]


VARIANTS = list(
    itertools.product(["euclidean", "squared"], [True, False], ["concatenated", "separate"], [0.0, 1e-3, 0.2])
)


@ANYWHERE
@pytest.mark.parametrize(("distance", "ignore_self", "normalisation", "floor"), VARIANTS)
def test_drift(where, distance, ignore_self, normalisation, floor):
    variant = (distance, ignore_self, normalisation, floor)
    for x, y in ((X, Y), (Y, X), (X, Y[:1])):
        each = []
        for tau in (0.1, 0.9):
            each.append(algorithm_2(x, y, tau, *variant, z=where))
            close(F.Drift((tau,), *variant)(x, y, at=where), each[-1])
        several = torch.zeros_like(each[0])
        for tau, field in zip((0.1, 0.9), each, strict=True):
            own = algorithm_2(x, y, tau, *variant).tolist()
            several += field / math.sqrt(statistics.fmean(v * v for row in own for v in row))
        close(F.Drift((0.1, 0.9), *variant)(x, y, at=where), several, 1e-11)


def test_drift_of_several_temperatures_forgets_the_unit_of_length():
    """Each field is divided by its size: a temperature at which it is a hundred orders smaller counts as much."""
    far = X + 30.0
    small, large = F.Drift((1.0,), "squared"), F.Drift((100.0,), "squared")
    v, w = small(X, far), large(X, far)
    assert 0 < float(v.abs().max()) < 1e-40
    unit = [t / (t / t.abs().max()).square().mean().sqrt() / t.abs().max() for t in (v, w)]
    close(F.Drift((1.0, 100.0), "squared")(X, far), unit[0] + unit[1])
    assert float(F.Drift((0.3, 0.6))(X, X.clone() + 1, a=A).square().sum(-1) @ A) > 0
    weighed = F.Drift((0.3, 0.6), ignore_self=False)
    parts = [F.Drift((tau,), ignore_self=False)(X, Y, a=A) for tau in (0.3, 0.6)]
    close(weighed(X, Y, a=A), sum(v / (A @ v.square()).mean().sqrt() for v in parts))


KERNELS = [("gaussian", (0.5,)), ("gaussian", (0.2, 1.0, 4.0)), ("laplace", (0.5,)), ("laplace", (0.2, 1.0))]


@WEIGHED
@ANYWHERE
@pytest.mark.parametrize(("kernel", "h"), KERNELS)
def test_kernel_flows(weighed, where, kernel, h):
    given, plain = options(weighed, where)
    width = h[0] if len(h) == 1 else h
    close(F.MMD(width, kernel)(X, Y, **given), mmd_flow(*plain, h, kernel))
    for lam in (1e-3, 0.3, 20.0):
        close(F.DrMMD(lam, width, kernel)(X, Y, **given), drmmd_flow(*plain, lam, h, kernel), 1e-9)
        close(F.KALE(lam, width, kernel)(X, Y, **given), kale_flow(*plain, lam, h, kernel), 1e-4 if lam < 0.1 else 1e-6)
        close(F.KALE(lam, width, kernel, 1e-16)(X, Y, **given), kale_flow(*plain, lam, h, kernel), 1e-7)


@pytest.mark.parametrize("kernel", ["gaussian", "laplace"])
def test_median_bandwidth(kernel):
    """The median distance between distinct points of both clouds; a batch has one for each problem."""
    points = [*X.tolist(), *Y.tolist(), X[0].tolist()]
    apart = [math.sqrt(square(p, q)) for p, q in itertools.combinations(points, 2)]
    h = statistics.median_low(d for d in apart if d > 0)
    y = torch.cat([Y, X[:1]])
    for field in (F.MMD, lambda h, k: F.DrMMD(0.1, h, k), lambda h, k: F.KALE(0.5, h, k)):
        close(field(None, kernel)(X, y), field(h, kernel)(X, y))
        both = field(None, kernel)(torch.stack([X, 3 * X]), torch.stack([y, 3 * y]))
        close(both[0], field(h, kernel)(X, y))
        close(both[1], field(3 * h, kernel)(3 * X, 3 * y))
    assert float(F.MMD(None, kernel)(X[:1], X[:1]).abs().max()) == 0  # no two distinct points


@WEIGHED
def test_sliced(weighed):
    given, (x, y, _, a, b) = options(weighed, None)
    theta = directions(6, 2, 3)
    close(F.SlicedWasserstein(6)(x, y, generator=chance(3), **given), sliced_flow(x, y, a, b, theta), 1e-11)
    close(
        F.SlicedWasserstein(6)(y, x, generator=chance(3)), sliced_flow(y, x, b * 0 + 1 / 7, a * 0 + 0.2, theta), 1e-11
    )
    square = F.SlicedWasserstein(6)(x, y[:5], generator=chance(3))  # as many
    close(square, sliced_flow(x, y[:5], a * 0 + 0.2, a * 0 + 0.2, theta), 1e-11)
    weighed = F.SlicedWasserstein(6)(x, y[:5], a=A, generator=chance(3))
    close(weighed, sliced_flow(x, y[:5], A, a * 0 + 0.2, theta), 1e-11)


def test_sliced_weights_that_are_small_or_a_little_off():
    """A mass so small that its quantiles round together still goes to the datum that is there."""
    x = torch.tensor([[0.0], [1.0], [2.0]], dtype=torch.float64)
    y = torch.tensor([[10.3], [11.7]], dtype=torch.float64)
    for tiny in (1e-13, 1e-17, 0.0):
        a = torch.tensor([0.5, 0.5 - tiny, tiny], dtype=torch.float64)
        there = x + F.SlicedWasserstein(3)(x, y, a=a, generator=chance())
        close(there, [[10.3], [11.7], [11.7 if tiny else 2.0]])
    off = F.SlicedWasserstein(6)(X, Y, a=A * (1 + 9e-7), b=B * (1 - 9e-7), generator=chance(3))
    close(off, F.SlicedWasserstein(6)(X, Y, a=A, b=B, generator=chance(3)))
    a = torch.tensor([0.5, 0.5, 5e-5])  # within what float32 allows
    close(x + F.SlicedWasserstein(3)(x.float(), y.float(), a=a, generator=chance()), [[10.3], [11.7], [11.7]], 1e-4)


def test_wasserstein():
    cost = [[square(p, q) for q in Y[:5].tolist()] for p in X.tolist()]
    best = min(itertools.permutations(range(5)), key=lambda s: sum(cost[i][s[i]] for i in range(5)))
    close(F.Wasserstein()(X, Y[:5]), Y[list(best)] - X)
    marginals = np.concatenate([np.kron(np.eye(5), np.ones(7)), np.kron(np.ones(5), np.eye(7))])
    cost = [square(p, q) for p in X.tolist() for q in Y.tolist()]
    plan = linprog(cost, A_eq=marginals, b_eq=torch.cat([A, B]).numpy()).x.reshape(5, 7)
    close(F.Wasserstein()(X, Y, a=A, b=B), torch.from_numpy(plan) @ Y / A[:, None] - X, 1e-9)


# --- population forms: one-dimensional normal laws, discretised finely ------------------------------------------------

LINE = torch.linspace(-12, 12, 1201, dtype=torch.float64)[:, None]
POINTS = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
Q, P = (-0.5, 0.8), (0.7, 0.6)  # mean and standard deviation


def density(t, law, h=0.0):
    """Of the law, blurred by a normal law of standard deviation h."""
    s2 = law[1] ** 2 + h**2
    return math.exp(-((t - law[0]) ** 2) / (2 * s2)) / math.sqrt(2 * math.pi * s2)


def masses(law):
    a = torch.exp(-((LINE[:, 0] - law[0]) ** 2) / (2 * law[1] ** 2))
    return a / a.sum()


def population(field, **more):
    return field(LINE, LINE + 0, at=POINTS, a=masses(Q), b=masses(P), **more)[:, 0]


@pytest.mark.parametrize("h", [0.3, 1.0])
def test_scores_of_normal_laws(h):
    score = [(POINTS[:, 0] - law[0]) / -(law[1] ** 2 + h**2) for law in (P, Q)]
    close(population(F.ScoreDifference(h)), h**2 * (score[0] - score[1]), 1e-10)
    close(population(F.SmoothedKL(h)), score[0] - score[1], 1e-10)  # the blur of a linear function is itself


@pytest.mark.parametrize("h", [0.5, 1.0])
def test_proxy_of_normal_laws(h):
    """C (grad log k*p~ - grad log k*q~), with p~ = p / sqrt(k*q), q~ = q / sqrt(k*q), by adaptive quadrature."""
    unit = math.sqrt(2 * math.pi) * h

    def tilted(law, t, power):
        """∫ k(t, y) (y - t)^power law~(y) dy."""
        value = lambda y: math.exp(-((t - y) ** 2) / (2 * h**2)) * (y - t) ** power * density(y, law)  # noqa: E731
        return quad(lambda y: value(y) / math.sqrt(unit * density(y, Q, h)), -12, 12, epsabs=1e-13, epsrel=1e-12)[0]

    expected, halved = [], []
    for t in POINTS[:, 0].tolist():
        p, q = unit * density(t, P, h), unit * density(t, Q, h)
        of_p, of_q = tilted(P, t, 0), tilted(Q, t, 0)
        score = [tilted(law, t, 1) / total / h**2 for law, total in ((P, of_p), (Q, of_q))]
        expected.append(h**2 * of_p * of_q / math.sqrt(p * q) * (score[0] - score[1]))
        halved.append(expected[-1] * math.sqrt(p * q) / (p + q))
    close(population(F.SinkhornProxy(h * h)), expected, 1e-9)
    drift = F.Drift((h * h,), "squared", ignore_self=False, normalisation="separate")
    close(population(drift), expected, 1e-9)  # as many particles as data
    close(population(F.Drift((h * h,), "squared", ignore_self=False)), halved, 1e-9)


@pytest.mark.parametrize("h", [0.4, 2.0])
def test_mmd_of_normal_laws(h):
    pull = [
        -math.sqrt(2 * math.pi) * h * density(t, law, h) * (t - law[0]) / (law[1] ** 2 + h**2)
        for law in (Q, P)
        for t in POINTS[:, 0].tolist()
    ]
    close(population(F.MMD(h)), [-2 * (q - p) for q, p in zip(pull[:9], pull[9:], strict=True)], 1e-10)


@pytest.mark.parametrize("field", [F.SlicedWasserstein(2), F.Wasserstein()])
def test_transport_of_normal_laws(field):
    """The increasing map, by quantiles, to the width of the grid."""
    keep = (LINE[:, 0] - Q[0]).abs() < 2.5
    x, y = LINE[::3], LINE[1::3]
    a, b = masses(Q)[::3] / masses(Q)[::3].sum(), masses(P)[1::3] / masses(P)[1::3].sum()
    v = field(x, y, a=a, b=b, generator=chance())
    expected = P[0] + P[1] / Q[1] * (x - Q[0]) - x
    assert float((v - expected)[keep[::3]].abs().max()) < 0.03


def test_smoothed_kl_converges_to_its_convolution():
    """By the trapezoidal rule on a fine grid, for atoms, where the scores are far from linear."""
    x, y, z, h = X[:, :1], Y[:, :1], Z[:, :1], 0.6
    step = torch.linspace(-8, 8, 801, dtype=torch.float64)
    k = torch.exp(-step.square() / 2)
    moved = (z + h * step).reshape(-1, 1)
    scores = torch.tensor(score_difference(x, y, moved, torch.full((5,), 0.2), torch.full((7,), 1 / 7), h))
    close(F.SmoothedKL(h, nodes=60)(x, y, at=z), (scores.reshape(4, -1) / h**2 * k / k.sum()).sum(1)[:, None], 1e-6)


# --- gradient flows: minus the gradient of the functional, by mass ----------------------------------------------------


def gradient(functional, x, a):
    x = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(functional(x), x)
    return -grad / a[:, None]


def kernel_matrix(x, y, h, kernel):
    gap = x[:, None] - y[None]
    if kernel == "gaussian":
        return torch.exp(-gap.square().sum(-1) / (2 * h**2))
    size = gap.square().sum(-1)
    return torch.exp(-torch.where(size > 0, size.clamp_min(1e-300), 0).sqrt() / h)


@WEIGHED
@pytest.mark.parametrize("kernel", ["gaussian", "laplace"])
def test_kernel_functionals(weighed, kernel):
    given, (x, y, _, a, b) = options(weighed, None)
    c = torch.cat([a, -b])

    def operator(x):
        w = torch.cat([x, y])
        gap = w[:, None] - w[None]
        size = gap.square().sum(-1) + torch.eye(len(w))  # the diagonal, which does not move, without a root at zero
        G = torch.exp(-size / (2 * 0.49)) if kernel == "gaussian" else torch.exp(-size.sqrt() / 0.7)
        return G - torch.diag(torch.diag(G)) + torch.eye(len(w), dtype=torch.float64)

    close(F.MMD(0.7, kernel)(x, y, **given), gradient(lambda x: c @ operator(x) @ c, x, a))
    D = torch.diag(torch.cat([torch.zeros_like(a), b]))
    for lam in (1e-2, 1.0):

        def chi2(x, lam=lam):
            G = operator(x)
            return (1 + lam) * c @ G @ torch.linalg.solve(D @ G + lam * torch.eye(len(c), dtype=torch.float64), c)

        close(F.DrMMD(lam, 0.7, kernel)(x, y, **given), gradient(chi2, x, a), 1e-9)


@pytest.mark.parametrize("kernel", ["gaussian", "laplace"])
def test_kale_functional(kernel):
    """Central differences of (1+λ) max_h { 1 + E_q h - E_p e^h - (λ/2) |h|² }, maximised anew at each."""
    lam, h = 0.2, (0.7,)

    def functional(x):
        t = kale_witness(x, Y, A, B, lam, h, kernel)
        c, w = torch.cat([A, -B * t.exp()]) / lam, torch.cat([x, Y])
        values = gram(w, w, h, kernel) @ c
        return (1 + lam) * float(1 + A @ values[:5] - B @ values[5:].exp() - lam / 2 * c @ values)

    v, step = torch.zeros_like(X), 1e-5
    for i, k in itertools.product(range(5), range(2)):
        move = torch.zeros_like(X)
        move[i, k] = step
        v[i, k] = -(functional(X + move) - functional(X - move)) / (2 * step) / A[i]
    close(F.KALE(lam, 0.7, kernel, tol=1e-15)(X, Y, a=A, b=B), v, 1e-7)


def test_smoothed_kl_functional():
    """KL(q_h | p_h) by the trapezoidal rule on the line."""
    x, y, a, b, h = X[:, :1], Y[:, :1], A, B, 0.6
    grid = torch.linspace(-8, 8, 1601, dtype=torch.float64)

    def kl(x):
        q, p = (
            w @ torch.exp(-((grid - z) ** 2) / (2 * h**2)) / (h * math.sqrt(2 * math.pi)) for z, w in ((x, a), (y, b))
        )
        return (q * (q.clamp_min(1e-300).log() - p.clamp_min(1e-300).log())).sum() * (grid[1] - grid[0])

    close(F.SmoothedKL(h, nodes=60)(x, y, a=a, b=b), gradient(kl, x, a), 1e-6)


def test_sliced_functional():
    theta = directions(6, 2, 3)

    def half(x):
        total = torch.zeros((), dtype=torch.float64)
        for t in theta:
            u, v = x @ t, Y @ t
            P = staircase(u.tolist(), v.tolist(), A.tolist(), B.tolist())
            total = total + (P * (u[:, None] - v).square()).sum() / 2
        return total / len(theta)

    close(F.SlicedWasserstein(6)(X, Y, a=A, b=B, generator=chance(3)), gradient(half, X, A), 1e-10)


# --- limits of the regularised divergences ----------------------------------------------------------------------------


def test_large_ridges_are_mmd():
    mmd = F.MMD(0.6)(X, Y, a=A, b=B)
    for lam in (1e4, 1e6):
        close(F.DrMMD(lam, 0.6)(X, Y, a=A, b=B), mmd, 10 / lam)
        close(F.KALE(lam, 0.6)(X, Y, a=A, b=B), mmd / 2, 10 / lam)


def test_small_ridges_are_the_divergences():
    """On common atoms the witness tends to the kernel's interpolation of that of χ², 2 (q/p - 1), or of KL, log q/p."""
    x = torch.tensor([[0.0, 0.0], [1.0, 0.2], [0.1, 1.2], [-0.9, 0.5], [0.4, -1.0]], dtype=torch.float64)
    b, h = simplex(5, seed=7), (0.4,)
    K = gram(x, x, h, "gaussian")
    for field, ratio in ((F.DrMMD, 2 * (A / b - 1)), (lambda *given: F.KALE(*given, tol=1e-14), (A / b).log())):
        limit = descent(Z, x, torch.linalg.solve(K, ratio), h, "gaussian")
        gaps = [float((field(lam, 0.4)(x, x + 0, at=Z, a=A, b=b) - limit).abs().max()) for lam in (1e-3, 1e-5)]
        assert gaps[1] < 1e-2 * float(limit.abs().max()) and 50 < gaps[0] / gaps[1] < 200  # first order in λ


@pytest.mark.parametrize("lam", [1e-12, 1e-6, 1.0, 1e3])
def test_ridge_solver(lam):
    """To rounding at every λ, and where a mass vanishes or is large."""
    K, f = gram(Y, Y, (0.5,), "gaussian"), normal(7)
    for mass in (B, torch.tensor([0.0, 1e-20, 1e-3, 0.1, 1.0, 30.0, 5e3], dtype=torch.float64)):
        g = solve_ridge(K, mass.sqrt(), f, lam)
        system = torch.diag(torch.full((7,), lam, dtype=torch.float64)) + K * mass
        residual = (system @ g - f).abs() / (system.abs() @ g.abs() + f.abs())
        assert float(residual.max()) < 1e-13


def test_a_ridge_that_is_lost_is_refused():
    twice = torch.cat([Y, Y])
    refused(lambda: F.DrMMD(1e-18, 0.5)(X, twice), "lam must be larger", "got 1e-18")


def test_kale_near_convergence_and_far_from_it():
    exact = kale_flow(X, Y, X, A, B, 0.01, (0.5,), "gaussian")
    gaps = []
    for steps in (1, 2, 3, 4, 5):
        with pytest.warns(nl.ConvergenceWarning, match=rf"KALE stopped after {steps} Newton steps? at .* lam = 0.01"):
            v = F.KALE(0.01, 0.5, max_iter=steps)(X, Y, a=A, b=B)
        gaps.append(float((v - exact).abs().max() / exact.abs().max()))
        if steps == 1:  # the first step of Newton's method linearises the exponential
            close(v, F.DrMMD(0.01, 0.5)(X, Y, a=A, b=B) / 2, 1e-10)
    assert gaps[-1] < 1e-3 and gaps[-1] < gaps[1] and max(gaps) < 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        close(F.KALE(0.01, 0.5)(X, Y, a=A, b=B), exact, 1e-5)


def test_kale_of_clouds_far_apart():
    """e^h is small on the data then, and full Newton steps would overshoot."""
    for lam in (1e-4, 1e-2):
        v = F.KALE(lam, 1.0)(X + 3, Y)
        assert bool(torch.isfinite(v).all()) and bool((v.mean(0) < 0).all())


# --- the critic -------------------------------------------------------------------------------------------------------

DIVERGENCES = {
    "kl": lambda u: u * math.log(u),
    "reverse_kl": lambda u: -math.log(u),
    "js": lambda u: (u * math.log(2 * u / (1 + u)) + math.log(2 / (1 + u))) / 2,
}
ONE = nl.Training(steps=1, rate=1e-9, decay=0, warmup=0, ema=0.0)


def line(weight, bias):
    """A critic network s(z) = <weight, z> + bias."""

    def make(d):
        layer = torch.nn.Linear(d, 1).double()
        with torch.no_grad():
            layer.weight.copy_(torch.tensor([weight]))
            layer.bias.fill_(bias)
        return layer

    return make


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("penalty", [0.0, 0.6])
def test_critic_by_its_divergence(name, penalty):
    """E_q f'(e^s) - E_p f*(f'(e^s)) - (λ/2) |grad s|² is what it maximises; the velocity is -grad f'(e^s)."""
    f, tiny = DIVERGENCES[name], 1e-5
    d = lambda u: (f(u * (1 + tiny)) - f(u * (1 - tiny))) / (2 * tiny * u)  # noqa: E731
    w, bias = [0.7, -0.4], 0.2
    ratio = lambda p: math.exp(sum(s * t for s, t in zip(w, p, strict=True)) + bias)  # noqa: E731
    critic = F.Critic(name, penalty, line(w, bias)).fit(X, Y, ONE)
    on_q, on_p = [ratio(p) for p in X.tolist()], [ratio(p) for p in Y.tolist()]
    gain = statistics.fmean(d(u) for u in on_q) - statistics.fmean(u * d(u) - f(u) for u in on_p)
    assert critic.losses == [pytest.approx(-gain + penalty / 2 * square(w, [0, 0]), rel=1e-6)]
    for z, at in ((X, None), (Z, Z)):
        second = [(d(u * (1 + 1e-4)) - d(u * (1 - 1e-4))) / 2e-4 for u in map(ratio, z.tolist())]  # of f', in s
        expected = [[-s * t for t in w] for s in second]
        close(critic(X, Y, at=at), expected, 1e-4)


def test_the_penalty_is_on_particles_and_data_alike():
    """For s = |z|²/2 the slope is z itself: of both laws, each with weight one half."""

    class Bowl(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.height = torch.nn.Parameter(torch.ones((), dtype=torch.float64))

        def forward(self, z):
            return self.height * z.square().sum(-1, keepdim=True) / 2

    free, held = (F.Critic("kl", penalty, lambda d: Bowl()).fit(X, Y, ONE).losses[0] for penalty in (0.0, 0.6))
    size = sum(statistics.fmean(square(p, [0, 0]) for p in z.tolist()) for z in (X, Y)) / 2
    assert held - free == pytest.approx(0.6 / 2 * size, rel=1e-9)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_a_critic_where_nothing_is_differentiated(mode):
    expected = F.Critic(training=ONE).fit(X, Y)(X, Y)
    with mode():
        x, y = X.clone(), Y.clone()
        critic = F.Critic(training=ONE).fit(x, y)
        assert torch.equal(critic(x, y), expected)
    assert torch.equal(critic(X, Y), expected)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_critic_finds_the_density_ratio_of_normal_laws(name):
    """log q/p = m z - m²/2 between N(m, 1) and N(0, 1); midpoints of quantiles stand for the laws."""
    z = torch.special.ndtri((torch.arange(400, dtype=torch.float64) + 0.5) / 400)[:, None]
    m = 0.8
    budget = nl.Training(steps=150, batch=400, rate=0.05, warmup=0, decay=1, ema=0.0)
    critic = F.Critic(name, make=line([0.0], 0.0)).fit(z + m, z, budget)
    assert float(critic.network.weight.detach()) == pytest.approx(m, abs=0.03)
    assert float(critic.network.bias.detach()) == pytest.approx(-(m**2) / 2, abs=0.03)
    s = m * POINTS - m**2 / 2
    factor = {"kl": torch.ones_like(s), "reverse_kl": (-s).exp(), "js": torch.sigmoid(-s) / 2}[name]
    close(critic(z, z, at=POINTS), -m * factor, 0.1)
    if name != "js":
        assert critic.losses[-1] == pytest.approx(-(m**2) / 2, abs=0.02)  # minus the divergence


def test_a_penalty_flattens_the_critic():
    """The residual network, too, learns the ratio; with a penalty it is a neural KALE, and flatter."""
    x, y = normal(200, 2) + 1, normal(200, 2, seed=1)
    make = lambda d: nl.networks.Residual(d, 1, width=16, depth=1).double()  # noqa: E731
    budget = nl.Training(steps=80, batch=200, rate=5e-3, warmup=0, decay=0, ema=0.0)
    free, held = (F.Critic("kl", penalty, make, budget).fit(x, y)(x, y) for penalty in (0.0, 3.0))
    assert float((free.mean(0) + 1).abs().max()) < 0.5
    assert float(held.norm()) < 0.7 * float(free.norm()) and bool((held.mean(0) < 0).all())


def test_critic_states():
    critic = F.Critic(make=line([0.0, 0.0], 0.0))
    refused(lambda: critic(X, Y), "has not been fitted")
    assert critic.state() == {}
    critic.fit(X, Y, nl.Training(steps=4, batch=3, rate=0.1, warmup=0, ema=0.0), generator=chance(1))
    again = F.Critic(make=line([0.0, 0.0], 0.0))
    again.restore(critic.state())
    assert torch.equal(again(X, Y), critic(X, Y)) and float(critic(X, Y).abs().max()) > 0
    before, state = critic(X, Y), torch.random.get_rng_state()
    assert torch.equal(critic(X, Y + 1), before)  # the call learns nothing
    critic.fit(X, Y, ONE)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert float((critic(X, Y) - before).abs().max()) < 1e-6  # and a fit goes on from where it stands
    again.restore({})
    refused(lambda: again(X, Y), "has not been fitted")
    refused(lambda: critic(X, Y, a=A), "a and b must be None")
    refused(lambda: critic(X, Y, b=B), "a and b must be None")
    for call in (critic, critic.fit):
        refused(lambda call=call: call(normal(4, 3), normal(4, 3)), "float64 points of dimension 2", "dimension 3")
        refused(lambda call=call: call(X.float(), Y.float()), "fitted to torch.float64 points", "float32")
        refused(lambda call=call: call(X, normal(4, 3)), "x and y must agree")
    refused(lambda: critic(X, Y, at=Z.float()), "float32")
    refused(lambda: critic.fit(X[None], Y[None]), "one cloud", r"\(1, 5, 2\)")
    refused(lambda: critic.fit(spoiled(X, NAN), Y), "x must be finite")


def test_a_critic_that_diverges_says_so():
    critic = F.Critic("kl")
    with pytest.raises(FloatingPointError, match=r"critic diverged: the loss is (nan|inf) at step \d+ of 50"):
        critic.fit(X.float(), Y.float(), nl.Training(steps=50, rate=1e6, warmup=0, decay=0, ema=0.0))
    with pytest.raises(FloatingPointError, match="velocity is not finite at 5 points"):
        critic(X.float(), Y.float())
    critic = F.Critic("reverse_kl", make=line([1.0, 0.0], 0.0)).fit(X, Y, ONE)
    with pytest.raises(FloatingPointError, match="reverse_kl's first variation overflows"):
        critic(X, Y, at=X - 800)


def test_extreme_ratios_of_a_bounded_variation():
    """JS's first variation is bounded above and linear below: no ratio is too extreme."""
    for bias in (-2000.0, 2000.0):
        critic = F.Critic("js", make=line([1.0, 0.0], bias)).fit(X, Y, ONE)
        close(critic(X, Y), [[-0.5 if bias < 0 else 0.0, 0.0]] * 5, 1e-6)


# --- what every field owes its reader ---------------------------------------------------------------------------------

EVERY = {
    "ScoreDifference": F.ScoreDifference(0.7),
    "ScoreDifference, laplace": F.ScoreDifference(0.7, "laplace"),
    "SmoothedKL": F.SmoothedKL(0.7, 3),
    "SmoothedKL, draws": F.SmoothedKL(0.7, draws=5),
    "SinkhornProxy": F.SinkhornProxy(0.5),
    "SinkhornProxy, iterated": F.SinkhornProxy(0.5, 4),
    "Drift": F.Drift((0.4,)),
    "Drift, squared": F.Drift((0.4,), "squared", False, "separate"),
    "Drift, several": F.Drift((0.2, 0.5), ignore_self=False),
    "Drift, floor": F.Drift((0.2,), floor=0.05),
    "MMD": F.MMD(0.8),
    "MMD, sum": F.MMD((0.3, 2.0), "laplace"),
    "MMD, median": F.MMD(),
    "DrMMD": F.DrMMD(0.05, 0.8),
    "KALE": F.KALE(0.05, 0.8),
    "Sinkhorn": F.Sinkhorn(0.5, 1e-12),
    "SlicedWasserstein": F.SlicedWasserstein(9),
    "Wasserstein": F.Wasserstein(),
}
SINGLE = ["Wasserstein"]
AT_PARTICLES = ["SlicedWasserstein", "Wasserstein"]
SELFISH = ["Drift", "Drift, floor"]  # a particle's affinity to itself is left out, a point's to a particle is not
BATCHED = [name for name in EVERY if name not in SINGLE]
EVERYWHERE = [name for name in EVERY if name not in AT_PARTICLES]


def call(name, x, y, seed=5, **given):
    return EVERY[name](x, y, generator=chance(seed), **given)


@pytest.mark.parametrize("name", BATCHED)
def test_a_batch_is_its_problems(name):
    x, y, z = normal(3, 5, 2), normal(3, 7, 2, seed=1) + 0.4, normal(3, 4, 2, seed=2)
    x = x * torch.tensor([0.5, 1.0, 2.0])[:, None, None]
    a, b = simplex(3, 5), simplex(3, 7, seed=1)
    for given in ({}, {"a": a, "b": b}, {"at": z, "a": a}):
        if "at" in given and name not in EVERYWHERE:
            continue
        whole = call(name, x, y, **given)
        for k in range(3):
            single = call(name, x[k], y[k], **{key: value[k] for key, value in given.items()})
            close(whole[k], single, 1e-8 if name in ("Sinkhorn", "KALE") else 1e-12)
    shared = call(name, x, y, b=B)  # one set of weights for all
    close(shared, call(name, x, y, b=B.expand(3, 7)))


@pytest.mark.parametrize("name", [name for name in EVERY if name not in SELFISH and "median" not in name])
def test_weights_are_repeated_points(name):
    """Both clouds doubled in number, so that the sums over points in Drift keep their ratio."""
    times_x, times_y = torch.tensor([3, 1, 2, 1, 3]), torch.tensor([1, 2, 4, 1, 1, 3, 2])
    many_x, many_y = X.repeat_interleave(times_x, 0), Y.repeat_interleave(times_y, 0)
    v = call(name, X, Y, a=times_x / times_x.sum().double(), b=times_y / times_y.sum().double())
    if name == "Wasserstein":  # whose plan may treat twins differently: their mean is what is determined
        repeated = call(name, many_x, many_y)
        means = torch.stack([part.mean(0) for part in repeated.split(times_x.tolist())])
        close(v, means, 1e-9)
    else:
        repeated = call(name, many_x, many_y)
        if name == "SlicedWasserstein":  # likewise
            repeated = torch.stack([part.mean(0) for part in repeated.split(times_x.tolist())])
            v, times_x = v, torch.ones(5, dtype=torch.int64)
        close(repeated, v.repeat_interleave(times_x, 0), 1e-7 if name in ("Sinkhorn", "KALE") else 1e-10)
    if name not in AT_PARTICLES:
        zero = torch.tensor([0.3, 0.0, 0.5, 0.2, 0.0], dtype=torch.float64)
        keep = zero > 0
        left_out = call(name, X[keep], Y, at=Z, a=zero[keep])
        close(call(name, X, Y, at=Z, a=zero), left_out, 1e-7)


@pytest.mark.parametrize("name", EVERY)
def test_translations_and_the_order_of_points(name):
    shift = torch.tensor([3.0, -7.0], dtype=torch.float64)
    v = call(name, X, Y)
    tol = 1e-7 if name in ("Sinkhorn", "KALE") else 1e-11
    close(call(name, X + shift, Y + shift), v, tol)
    order, other = torch.randperm(5, generator=chance()), torch.randperm(7, generator=chance())
    close(call(name, X[order], Y[other]), v[order], tol)


@pytest.mark.parametrize("name", [name for name in EVERY if name not in ("SlicedWasserstein", "SmoothedKL, draws")])
def test_rotations(name):
    turn = torch.linalg.qr(normal(2, 2, seed=3)).Q
    tol = {"Sinkhorn": 1e-7, "KALE": 1e-7, "SmoothedKL": 0.05}.get(name, 1e-11)
    close(call(name, X @ turn.T, Y @ turn.T), call(name, X, Y) @ turn.T, tol)


def test_the_unit_of_length():
    """Velocities in units of length, of one over length, or as the functional has it."""
    for s in (1e-17, 1e-3, 1e6):
        for power, field in {
            1: lambda s: F.ScoreDifference(0.7 * s),
            -1: lambda s: F.SmoothedKL(0.7 * s),
        }.items():
            close(field(s)(s * X, s * Y) / s**power, field(1)(X, Y), 1e-11)
        close(F.SinkhornProxy(0.5 * s * s)(s * X, s * Y) / s, F.SinkhornProxy(0.5)(X, Y), 1e-11)
        close(F.Drift((0.5 * s,))(s * X, s * Y) / s, F.Drift((0.5,))(X, Y), 1e-11)
        for kernel in ("gaussian", "laplace"):
            close(F.MMD(0.5 * s, kernel)(s * X, s * Y) * s, F.MMD(0.5, kernel)(X, Y), 1e-11)
            close(F.DrMMD(0.1, None, kernel)(s * X, s * Y) * s, F.DrMMD(0.1, None, kernel)(X, Y), 1e-9)


@pytest.mark.parametrize("name", EVERYWHERE)
def test_at_the_particles(name):
    if name in SELFISH:
        other = {"Drift": F.Drift((0.4,), ignore_self=False), "Drift, floor": F.Drift((0.2,), "euclidean", False)}[name]
        close(other(X, Y, at=X), other(X, Y))
        assert float((call(name, X, Y, at=X) - call(name, X, Y)).abs().max()) > 1e-3
    else:
        close(call(name, X, Y, at=X), call(name, X, Y), 1e-9)
    close(call(name, X, Y, at=Z)[1:3], call(name, X, Y, at=Z[1:3]), 1e-12)


IN_SINGLE = {
    "ScoreDifference": lambda s: F.ScoreDifference(s),
    "ScoreDifference, laplace": lambda s: F.ScoreDifference(s, "laplace"),
    "SmoothedKL": lambda s: F.SmoothedKL(s, 1),
    "SinkhornProxy": lambda s: F.SinkhornProxy(s * s, 3),
    "Drift": lambda s: F.Drift((s / 4, s)),
    "Drift, floor": lambda s: F.Drift((s / 4,), floor=1e-2),
    "MMD": lambda s: F.MMD(s),
    "MMD, laplace": lambda s: F.MMD(None, "laplace"),
    "DrMMD": lambda s: F.DrMMD(1e-3, s),
    "KALE": lambda s: F.KALE(1e-2, None, "laplace"),
    "Sinkhorn": lambda s: F.Sinkhorn(s * s, 1e-7),
    "Wasserstein": lambda s: F.Wasserstein(),
}


@pytest.mark.parametrize("name", IN_SINGLE)
@pytest.mark.parametrize("d", [2, 784])
def test_single_precision(name, d):
    x, y = normal(12, d, dtype=torch.float32), normal(15, d, seed=1, dtype=torch.float32) * 0.8 + 0.3
    field = IN_SINGLE[name](math.sqrt(d) / 2)
    v = field(x, y)
    assert v.dtype == torch.float32
    close(v, field(x.double(), y.double()), 2e-4 if d == 2 else 2e-3)
    offset = field(x + 1000, y + 1000)  # rounding of the points is all that it costs
    assert float((offset - v).abs().max()) < (3e-2 if d == 784 else 1e-2) * float(v.abs().max()) + 1e-4


@pytest.mark.parametrize("field", [F.DrMMD(1e-7, 3.0), F.KALE(1e-4, 3.0)])
def test_small_ridges_in_single_precision(field):
    """Only the points and the velocity are rounded, not what is solved between."""
    x, y = X.float(), Y.float()
    close(field(x, y), field(x.double(), y.double()), 3e-7)


@pytest.mark.parametrize("kernel", ["gaussian", "laplace"])
def test_a_point_is_at_no_distance_from_itself(kernel):
    """Whatever the rounding of inner products says."""
    x = normal(20, 784, dtype=torch.float32) + 5
    exponent = log_kernel(x, x, 0.3, kernel, own=True)
    assert float(exponent.diagonal().abs().max()) == 0 and float(exponent.max()) == 0


@pytest.mark.parametrize("d", [2, 784])
@pytest.mark.parametrize("m", [12, 15])
def test_sliced_in_single_precision(d, m):
    x, y = normal(12, d, dtype=torch.float32), normal(m, d, seed=1, dtype=torch.float32) + 0.3
    v = F.SlicedWasserstein(20)(x, y, generator=chance(3))
    theta = directions(20, d, 3, torch.float32)
    uniform = [torch.full((n,), 1 / n, dtype=torch.float64) for n in (12, m)]
    assert v.dtype == torch.float32
    close(v, sliced_flow(x.double(), y.double(), *uniform, theta), 1e-4)


@pytest.mark.parametrize("name", EVERY)
def test_the_same_chance_twice(name):
    before = torch.random.get_rng_state()
    v = call(name, X, Y)
    assert torch.equal(call(name, X, Y), v) and v.shape == X.shape and v.dtype == torch.float64
    assert torch.equal(torch.random.get_rng_state(), before)
    if name in ("SlicedWasserstein", "SmoothedKL, draws"):
        assert not torch.equal(call(name, X, Y, seed=6), v)


def test_critic_the_same_chance_twice():
    before = torch.random.get_rng_state()
    fit = lambda seed: F.Critic().fit(  # noqa: E731
        X, Y, nl.Training(steps=3, batch=3, warmup=0, ema=0.0), generator=None if seed is None else chance(seed)
    )(X, Y)
    assert torch.equal(fit(1), fit(1)) and not torch.equal(fit(1), fit(2)) and torch.equal(fit(None), fit(None))
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("name", EVERY)
def test_particles_that_follow_come_nearer(name):
    """With warm starts and chance passed on; steps a tenth of the way at first."""
    x, y = normal(30, 2), normal(30, 2, seed=1) * 0.5 + torch.tensor([1.5, -1.0])
    speed = call(name, x, y).square().sum(-1).mean().sqrt()
    path = nl.follow(EVERY[name], x, y, 0.1 * nl.metrics.w2(x, y) / float(speed), 8, generator=chance(2))
    assert path.shape == (9, 30, 2) and nl.metrics.w2(path[-1], y) < 0.98 * nl.metrics.w2(x, y)


def test_fields_are_values():
    for name, field in EVERY.items():
        assert field == EVERY[name] and hash(field) == hash(EVERY[name])
        with pytest.raises(AttributeError):
            field.h = 1.0
    assert F.MMD(0.5) == F.MMD(0.5) != F.MMD(0.6) and F.DrMMD(0.1, 0.5) != F.KALE(0.1, 0.5)
    assert F.Critic() != F.Critic()  # each has a network of its own


ZERO = [name for name in EVERY if name not in SELFISH]


@pytest.mark.parametrize("name", ZERO)
@pytest.mark.parametrize("d", [2, 30])
def test_no_velocity_where_the_laws_agree(name, d):
    if name == "SmoothedKL" and d == 30:
        pytest.skip("too many nodes")
    x = normal(6, d)
    a = simplex(6)
    scale = float(call(name, x, x + 1).abs().max())
    for given in ({}, {"a": a, "b": a}):
        v = call(name, x, x.clone(), **given)
        assert float(v.abs().max()) < (1e-6 if name in ("KALE", "Sinkhorn") else 1e-9) * scale
    if name in EVERYWHERE:
        elsewhere = call(name, x, x.clone(), at=x[:2] + 0.3)
        assert float(elsewhere.abs().max()) < 1e-6 * scale


@pytest.mark.parametrize("name", EVERY)
def test_coinciding_particles(name):
    """All particles in one point, which may be a datum, too."""
    heap = torch.zeros(5, 2, dtype=torch.float64)
    v = call(name, heap, Y)
    assert bool(torch.isfinite(v).all())
    if name not in AT_PARTICLES:  # where the plan may take them apart
        close(v, v[:1].expand(5, 2), 1e-9)
        assert float((v * Y.mean(0)).sum(-1).min()) > 0
    nothing = call(name, heap, heap.clone())
    assert float(nothing.abs().max()) < 1e-9
    assert bool(torch.isfinite(call(name, heap, torch.cat([heap, Y]))).all())


DIFFERENTIABLE = [name for name in EVERYWHERE if name != "Sinkhorn"]


@pytest.mark.parametrize("name", DIFFERENTIABLE)
@pytest.mark.parametrize("d", [2, 9])
def test_jacobians(name, d):
    """By autograd as by differences, in the particles and in the points; finite where particles coincide."""
    if name == "SmoothedKL" and d == 9:
        pytest.skip("too many nodes")
    x, y, z, move = normal(4, d), normal(5, d, seed=1), normal(3, d, seed=2), normal(4, d, seed=3)
    if name == "MMD, median":  # a constant to autograd
        return
    for f, point, to in ((lambda x: call(name, x, y), x, move), (lambda z: call(name, x, y, at=z), z, move[:3])):
        _, tangent = torch.autograd.functional.jvp(f, point, to)
        step = 1e-5
        tol = 1e-4 if name == "KALE" else 1e-6  # whose solution has a tolerance
        close(tangent, (f(point + step * to) - f(point - step * to)) / (2 * step), tol)
    x = torch.cat([x, x[:1], y[:1]]).requires_grad_()
    (grad,) = torch.autograd.grad(call(name, x, y).square().sum(), x)
    assert bool(torch.isfinite(grad).all())


# --- bad input --------------------------------------------------------------------------------------------------------

FITTED = F.Critic(make=line([1.0, 0.0], 0.0)).fit(X, Y, ONE)
ASKED = {name: partial(call, name) for name in EVERY}
ASKED |= {"Critic": FITTED, "Critic.fit": lambda x, y: F.Critic(training=ONE).fit(x, y)}


@pytest.mark.parametrize("name", [name for name in ASKED if name not in ("Sinkhorn", "Wasserstein")])
@pytest.mark.parametrize("case", CLOUDS)
def test_clouds(name, case):
    make, parts = CLOUDS[case]
    refused(lambda: ASKED[name](*make()), *parts)


@pytest.mark.parametrize("name", [name for name in EVERY if name not in ("Sinkhorn", "Wasserstein")])
@pytest.mark.parametrize("case", WEIGHTS)
def test_weights(name, case):
    make, parts = WEIGHTS[case]
    for which in ("a", "b"):
        refused(lambda which=which: ASKED[name](cloud(), cloud() + 1, **{which: make()}), f"^{which} must", *parts)


@pytest.mark.parametrize("name", [*[name for name in EVERYWHERE if name != "Sinkhorn"], "Critic"])
def test_points(name):
    field = ASKED[name]
    refused(lambda: field(X, Y, at=normal(3, 3)), "x and at", r"\(5, 2\) and \(3, 3\)")
    refused(lambda: field(X, Y, at=Z.float()), "x and at", "float32")
    refused(lambda: field(X, Y, at=Z[None]), "x and at", r"\(1, 4, 2\)")
    refused(lambda: field(X, Y, at=spoiled(Z, NAN)), "at must be finite")
    refused(lambda: field(X, Y, at=Z[:0]), "at must have shape", r"got \(0, 2\)")
    refused(lambda: field(X, Y, at=Z.tolist()), "at must be .* tensor", "list")


@pytest.mark.parametrize("name", AT_PARTICLES)
def test_fields_at_particles_only(name):
    refused(lambda: ASKED[name](X, Y, at=Z), "at must be None", "at the particles only")


POSITIVE = [0, 0.0, -1.0, NAN, INF, "0.1", True, [0.1], torch.tensor(0.1)]
NUMBERS = {
    "h": [F.ScoreDifference, F.SmoothedKL, F.MMD, lambda h: F.MMD((0.1, h)), lambda h: F.DrMMD(0.1, h)],
    "eps": [F.SinkhornProxy],
    "temperatures": [lambda t: F.Drift((t,)), lambda t: F.Drift((0.1, t))],
    "lam": [F.DrMMD, F.KALE],
    "tol": [lambda tol: F.KALE(0.1, tol=tol)],
    "floor": [lambda floor: F.Drift(floor=floor)],
    "penalty": [lambda penalty: F.Critic(penalty=penalty)],
}
COUNTS = {
    "nodes": lambda k: F.SmoothedKL(0.5, k),
    "iterations": lambda k: F.SinkhornProxy(0.5, k),
    "max_iter": lambda k: F.KALE(0.5, max_iter=k),
    "directions": F.SlicedWasserstein,
}


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", POSITIVE, ids=repr)
def test_numbers(name, value):
    for make in NUMBERS[name]:
        if name in ("floor", "penalty") and not isinstance(value, list | torch.Tensor) and value == 0:
            make(value)  # none
        else:
            refused(lambda make=make: make(value), f"^{name} must be a positive", "got ")


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize("value", [0, -3, 2.5, NAN, "many", None, True])
def test_counts(name, value):
    refused(lambda: COUNTS[name](value), f"^{name} must be a positive integer", f"got {value!r}")


def test_choices():
    refused(lambda: F.Drift(0.1), "temperatures must be a tuple", "got 0.1")
    refused(lambda: F.Drift(()), "temperatures must be a tuple", r"got \(\)")
    refused(lambda: F.Drift([0.1]), "temperatures must be a tuple", r"got \[0.1\]")
    refused(lambda: F.ScoreDifference(0.5, "imq"), "kernel must be 'gaussian' or 'laplace'", "imq")
    refused(lambda: F.Drift(distance="cosine"), "distance must be 'euclidean' or 'squared'", "cosine")
    refused(lambda: F.Drift(normalisation="rows"), "normalisation must be 'concatenated' or 'separate'", "rows")
    for make in (F.MMD, lambda *given: F.DrMMD(0.1, *given), lambda *given: F.KALE(0.1, *given)):
        refused(lambda make=make: make(0.5, "imq"), "kernel must be 'gaussian' or 'laplace'", "imq")
        refused(lambda make=make: make(()), "h must name at least one", r"got \(\)")
        refused(lambda make=make: make([0.1, 0.2]), "h must be a positive", r"got \[0.1, 0.2\]")
    refused(lambda: F.Critic("chi2"), "divergence must be one of kl, reverse_kl, js", "got 'chi2'")
    refused(lambda: F.SmoothedKL(0.5, draws=-1), "draws must be a non-negative integer", "got -1")
    refused(lambda: F.SmoothedKL(0.5, draws=2.5), "draws must be", "got 2.5")
    refused(lambda: F.SmoothedKL(0.5)(normal(4, 5), normal(4, 5)), "at most 4096", "8 \\*\\* 5", "draws")


@pytest.mark.parametrize("field", [F.SlicedWasserstein(4), F.SmoothedKL(0.5, draws=4)])
@pytest.mark.parametrize("generator", [None, 0, torch])
def test_chance_must_be_given(field, generator):
    refused(lambda: field(X, Y, generator=generator), "generator must be a torch.Generator", "got ")


def test_a_particle_alone_cannot_ignore_itself():
    for given in ({"x": X[:1]}, {"x": X, "a": torch.tensor([0.0, 1.0, 0.0, 0.0, 0.0], dtype=torch.float64)}):
        refused(lambda given=given: F.Drift()(y=Y, **given), "ignore_self needs at least two particles")
    pair = torch.stack([X, X])
    a = torch.stack([A, torch.tensor([0.0, 1.0, 0.0, 0.0, 0.0], dtype=torch.float64)])
    refused(lambda: F.Drift()(pair, pair, a=a), "ignore_self needs at least two particles")
    for field in (*[F.Drift(ignore_self=False)], *[field for name, field in EVERY.items() if name not in SELFISH]):
        v = field(X[:1], Y, generator=chance())
        assert v.shape == (1, 2) and bool(torch.isfinite(v).all())


# --- the edges of arithmetic: never NaN in silence --------------------------------------------------------------------

NARROW = {
    "SinkhornProxy": lambda h: F.SinkhornProxy(h * h),
    "Drift": lambda h: F.Drift((h,)),
    "Drift, separate": lambda h: F.Drift((h * h, 4 * h * h), "squared", False, "separate"),
    "MMD": lambda h: F.MMD(h),
    "MMD, laplace": lambda h: F.MMD((h, h / 2), "laplace"),
    "DrMMD": lambda h: F.DrMMD(0.1, h),
    "KALE": lambda h: F.KALE(0.1, h),
}


@pytest.mark.parametrize("name", NARROW)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_underflow_is_reported(name, dtype):
    x, y = X.to(dtype), Y.to(dtype) + 100
    z = x - 100 if "Proxy" in name or "separate" in name else x  # the softmax over rows alone keeps the nearest pair
    with pytest.warns(nl.fields.UnderflowWarning, match=r"in 1 of 1 problems .* apart") as told:
        v = NARROW[name](0.05)(x, y, at=z)
    assert bool(torch.isfinite(v).all()) and all(warning.filename == __file__ for warning in told)
    problems = torch.stack([x, x]), torch.stack([y, y - 100]), torch.stack([z, x])
    with pytest.warns(nl.fields.UnderflowWarning, match="in 1 of 2 problems"):
        both = NARROW[name](0.05)(*problems)
    close(both[0], v)
    assert bool(torch.isfinite(both).all()) and float(both[1].abs().max()) > 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        NARROW[name](0.5)(x, x + 0.5)
        NARROW[name](50.0)(x, y)


@pytest.mark.parametrize("field", [F.ScoreDifference(0.02), F.SmoothedKL(0.02), F.Drift((0.05,), floor=1e-3)])
def test_fields_that_no_distance_stops(field):
    """The nearest datum remains, whatever its distance; and the floor keeps all."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        v = field(X, Y + 100)
    assert bool((v > 1e-3).all()) and bool(torch.isfinite(v).all())


WIDE = NARROW | {"ScoreDifference": F.ScoreDifference, "SmoothedKL": lambda h: F.SmoothedKL(h, 2)}


@pytest.mark.parametrize("name", WIDE)
def test_overflow_is_refused(name):
    """Also where the exponents are finite still, and a sum of two is not."""
    # (h, distance) in float32: exponents of 1e40, and of about 2e38
    edges = [(1e-20, 1.0), (1e-19, 2.0)] if "laplace" not in name and name != "Drift" else [(1e-38, 10.0), (1e-38, 2.0)]
    for h, far in edges:
        x, y = torch.zeros(2, 2), torch.full((3, 2), far)
        if name in ("DrMMD", "KALE"):  # in float64
            x, y, h = x.double(), y.double() * 1e10, 1e-150
        refused(lambda x=x, y=y, h=h: WIDE[name](h)(x, y), r"\|x-y\|/h overflows", "h must be larger", "got ")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the data's pull is gone, or not: but never NaN
        for exponent in range(-12, 160, 4):
            x, y = torch.zeros(2, 2), torch.full((3, 2), 10 ** (exponent / 8))
            try:
                v = WIDE[name](1.0)(x, y)
            except ValueError:
                continue
            assert bool(torch.isfinite(v).all())


@pytest.mark.parametrize("name", WIDE)
@pytest.mark.parametrize("h", [1e10, 1e60, 1e150])
def test_a_bandwidth_beyond_all_distances(name, h):
    if name == "KALE" and h > 1e100:
        h = 1e100
    v = WIDE[name](h)(X, Y)
    assert bool(torch.isfinite(v).all())
    if name == "ScoreDifference":
        close(v, (Y.mean(0) - X.mean(0)).expand(5, 2))


def test_a_velocity_that_overflows_is_an_error():
    """A field of next to no size at the particles, which ignore themselves, is large in these units elsewhere."""
    x, y = X.float(), Y.float()
    narrow = F.Drift((0.0025, 0.01), "squared", normalisation="separate")
    with pytest.raises(FloatingPointError, match=r"Drift\(.* is too large for torch.float32 at \d points"):
        narrow(x, y, at=x)
    assert bool(torch.isfinite(narrow(x, y)).all())


# --- few atoms in closed form, and what the fields stand on -----------------------------------------------------------


@pytest.mark.parametrize(("alpha", "beta"), [(0.7, 0.4), (0.2, 0.6), (0.5, 0.5)])
@pytest.mark.parametrize("h", [0.3, 0.6, 2.0])
def test_two_atoms(alpha, beta, h):
    """The exact velocities are the fields'; their expansions tend to them with κ, each at its order."""
    atoms = torch.tensor([[-1.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    weights = {"a": torch.tensor([beta, 1 - beta]).double(), "b": torch.tensor([alpha, 1 - alpha]).double()}
    weights = {name: w / w.sum() for name, w in weights.items()}
    closed = lambda name, *order: nl.closed_forms.two_atom_velocity(name, alpha, beta, 2.0, h, *order)  # noqa: E731
    fields = {
        "scores": F.ScoreDifference(h),
        "proxy": F.SinkhornProxy(h * h),
        "sinkhorn": F.Sinkhorn(h * h, tol=1e-14),
    }
    if alpha >= beta:
        fields["wasserstein"] = F.Wasserstein()
    for name, field in fields.items():
        v = field(atoms, atoms.clone(), **weights)[1]
        assert abs(float(v[0]) - closed(name)) < 1e-7 * abs(closed(name)) + 2e-12 and float(v[1]) == 0
    kappa = math.exp(-2 / h**2)
    if kappa < 0.01 and alpha > beta:
        for name in fields:
            exact, first, second = closed(name), closed(name, 1), closed(name, 2)
            assert abs(first / exact - 1) < 4 * kappa and abs(second / exact - 1) < 20 * kappa**2 + 1e-14


def test_two_atoms_refuse():
    v = nl.closed_forms.two_atom_velocity
    for bad in (0.0, 1.0, -0.2, NAN, "half", True):
        refused(lambda bad=bad: v("scores", bad, 0.4, 2.0, 0.5), "alpha must lie strictly", f"got {bad!r}")
        refused(lambda bad=bad: v("scores", 0.4, bad, 2.0, 0.5), "beta must lie strictly", f"got {bad!r}")
    for bad in (0.0, -1.0, NAN, INF, "far", True):
        refused(lambda bad=bad: v("proxy", 0.7, 0.4, bad, 0.5), "distance must be a positive", f"got {bad!r}")
        refused(lambda bad=bad: v("proxy", 0.7, 0.4, 2.0, bad), "h must be a positive", f"got {bad!r}")
    refused(lambda: v("scores", 0.7, 0.4, 2.0, 0.5, 3), "order must be None, 1 or 2", "got 3")
    refused(lambda: v("kl", 0.7, 0.4, 2.0, 0.5), "field must be 'scores'", "got 'kl'")
    refused(lambda: v("wasserstein", 0.4, 0.7, 2.0, 0.5), "alpha >= beta", "0.4 and 0.7")
    refused(lambda: v("sinkhorn", 0.4, 0.7, 2.0, 0.5, 1), "alpha > beta", "0.4 and 0.7")


@pytest.mark.parametrize("h", [0.2, 1.0, 3.0])
def test_the_cross(h):
    """The closed form is the proxy's velocity, and its curl that of differences."""
    x = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64)
    velocity, curl = nl.closed_forms.cross_velocity, nl.closed_forms.cross_curl
    z = torch.cat([Z, torch.tensor([[1.0, 1.0], [0.0, 0.0], [3.0, -2.0]], dtype=torch.float64)])
    close(velocity(z, h), F.SinkhornProxy(h * h)(x, x.flip(1), at=z), 1e-11)
    step = 1e-5
    right, up = torch.tensor([[step, 0.0], [0.0, step]], dtype=torch.float64)
    differences = velocity(z + right, h)[:, 1] - velocity(z - right, h)[:, 1]
    differences -= velocity(z + up, h)[:, 0] - velocity(z - up, h)[:, 0]
    close(curl(z, h), differences / (2 * step), 1e-7)
    if h == 1:
        assert float(curl(z)[4]) == pytest.approx(-0.710614, abs=1e-6)
    for function in (velocity, curl):
        refused(lambda function=function: function(normal(4, 3)), r"points must have shape \(k, 2\)", r"\(4, 3\)")
        refused(lambda function=function: function(Z, 0.0), "h must be a positive", "got 0.0")
        refused(lambda function=function: function(spoiled(Z, NAN)), "points must be finite")
        assert bool(torch.isfinite(function(1e3 * Z, h)).all())


def test_residual_networks():
    z, y = normal(9, 3, dtype=torch.float32), normal(50, 2, dtype=torch.float32) * 3 + 7
    net = nl.networks.seeded(lambda: nl.networks.Residual(3, 2, width=8, depth=2), chance())
    raw = net(z)
    net.standardise(y)
    spread = float((y - y.mean(0)).square().mean().sqrt())
    close(net(z).detach(), (raw * spread + y.mean(0)).detach(), 1e-5)
    h = net.first(z)
    for norm, first, act, second in net.blocks:
        h = h + second(act(first(norm(h))))
    close(raw.detach(), net.last(h).detach(), 1e-6)
    for bad in ({"inputs": 0}, {"out": -1}, {"width": 2.5}, {"depth": 0}):
        refused(lambda bad=bad: nl.networks.Residual(**{"inputs": 3, "out": 2} | bad), f"{next(iter(bad))} must be")
    refused(lambda: net.standardise(spoiled(y, NAN)), "y must be finite")
    for bad in (y[:, :1], normal(4, 3), y[None]):
        refused(lambda bad=bad: net.standardise(bad), r"y must have shape \(n, 2\)", "got ")
        refused(lambda bad=bad: nl.networks.MLP(2).standardise(bad), r"x must have shape \(n, 2\)", "got ")
