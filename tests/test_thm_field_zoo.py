"""One test for each theorem of the chapter book/field_zoo.md.

Stricter than the chapter's cells: several seeds, unequal weights, clouds of
different sizes, float64.  The functionals are computed here from their
definitions (kernels by explicit loops over norms, KALE by scipy's optimiser,
lines by quantile functions, critics by Newton's method), without the library.
"""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.special import lambertw

import nsgf_lite as nl

F64 = torch.float64
pytestmark = pytest.mark.filterwarnings("error::nsgf_lite.ConvergenceWarning")


def problem(seed, n=5, m=7, d=2):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=generator, dtype=F64)
    y = torch.randn(m, d, generator=generator, dtype=F64) + 0.5
    a = torch.rand(n, generator=generator, dtype=F64) + 0.2
    b = torch.rand(m, generator=generator, dtype=F64) + 0.2
    return x, y, a / a.sum(), b / b.sum(), generator


def gram(x, y, h):
    return torch.exp(-((x[:, None, :] - y[None, :, :]) ** 2).sum(-1) / (2 * h * h))


def mmd2(x, y, a, b, h):
    return a @ gram(x, x, h) @ a - 2 * a @ gram(x, y, h) @ b + b @ gram(y, y, h) @ b


def drmmd(x, y, a, b, h, lam):
    """(1 + λ) |(Σ_p + λ)^(-1/2) (m_q - m_p)|², in the span of all kernels: an orthonormal basis by Cholesky."""
    z, c = torch.cat([x, y]), torch.cat([a, -b])
    root = torch.linalg.cholesky(gram(z, z, h) + 1e-14 * torch.eye(len(z), dtype=F64))  # rows: features
    data, w = root[len(x) :], c @ root
    covariance = data.T @ (b[:, None] * data) + lam * torch.eye(len(z), dtype=F64)
    return (1 + lam) * w @ torch.linalg.solve(covariance, w)


def kale(x, y, a, b, h, lam):
    """(1 + λ) max 1 + E_q h - E_p e^h - (λ/2)|h|², over coordinates in an orthonormal basis, by Newton."""
    z = torch.cat([x, y])
    root = torch.linalg.cholesky(gram(z, z, h) + 1e-14 * torch.eye(len(z), dtype=F64))
    crowd, data = root[: len(x)], root[len(x) :]
    u = torch.zeros(len(z), dtype=F64)
    value = lambda u: 1 + a @ (crowd @ u) - b @ (data @ u).exp() - lam / 2 * u @ u  # noqa: E731
    for _ in range(60):
        mass = b * (data @ u).exp()
        slope = a @ crowd - mass @ data - lam * u
        step = torch.linalg.solve(data.T @ (mass[:, None] * data) + lam * torch.eye(len(u), dtype=F64), slope)
        length = 1.0
        while value(u + length * step) < value(u) + 0.1 * length * (slope @ step) - 1e-15 and length > 1e-6:
            length /= 2
        u = u + length * step
        if slope @ step < 1e-24:
            break
    return (1 + lam) * value(u)


def slopes(functional, x, a, t=1e-5):
    """-(1/a_i) dF/dx_i by central differences."""
    out = torch.zeros_like(x)
    for i in range(x.shape[0]):
        for j in range(x.shape[1]):
            e = torch.zeros_like(x)
            e[i, j] = t
            out[i, j] = -(functional(x + e) - functional(x - e)) / (2 * t) / a[i]
    return out


KERNEL_FIELDS = {
    "mmd": (lambda h: nl.fields.MMD(h), mmd2),
    "drmmd": (lambda h: nl.fields.DrMMD(0.1, h), lambda *p: drmmd(*p, lam=0.1)),
    "kale": (lambda h: nl.fields.KALE(0.1, h), lambda *p: kale(*p, lam=0.1)),
}


# thm-lone-particle ---------------------------------------------------------------------


@pytest.mark.parametrize("d", [1, 3])
@pytest.mark.parametrize("r", [0.3, 1.0, 4.0])
def test_thm_lone_particle(r, d):
    h, lam = 0.7, 0.05
    direction = torch.arange(1, d + 1, dtype=F64)
    x, y = r * (direction / direction.norm())[None] + 0.2, torch.full((1, d), 0.2, dtype=F64)
    kappa = math.exp(-(r**2) / (2 * h**2))
    beta = lam * lambertw(math.exp(kappa / lam) / lam).real
    F = nl.fields
    expected = {
        F.ScoreDifference(h): 1.0,
        F.SinkhornProxy(h * h): 1.0,
        F.Sinkhorn(h * h): 1.0,
        F.Wasserstein(): 1.0,
        F.SmoothedKL(h): 1 / h**2,
        F.Drift((h * h,), "squared", ignore_self=False): kappa**0.5 / (1 + kappa),
        F.MMD(h): 2 * kappa / h**2,
        F.DrMMD(lam, h): 2 * (1 + kappa / lam) * kappa / h**2,
        F.KALE(lam, h): (1 + 1 / lam) * beta * kappa / h**2,
    }
    for field, share in expected.items():
        v = field(x, y)
        assert torch.allclose(v, share * (y - x), rtol=1e-7, atol=1e-12), field
    many = torch.stack([F.SlicedWasserstein(1)(x, y, generator=torch.Generator().manual_seed(s))[0] for s in range(50)])
    along = many @ (y - x)[0] / r**2
    assert bool(((along >= 0) & (along <= 1)).all())
    # Each direction gives θ <θ, y - x>: its square length is its share along y - x.
    assert torch.allclose(many.square().sum(1) / r**2, along, atol=1e-12)


# thm-kernel-descent --------------------------------------------------------------------


@pytest.mark.parametrize("name", KERNEL_FIELDS)
@pytest.mark.parametrize("seed", range(2))
def test_thm_kernel_descent(seed, name):
    x, y, a, b, generator = problem(seed)
    h, lam = 0.8, 0.1
    make, functional = KERNEL_FIELDS[name]
    C = {"mmd": 1.0, "drmmd": (1 + lam) / lam, "kale": (1 + lam) / (2 * lam)}[name]
    gap = math.sqrt(mmd2(x, y, a, b, h))
    U = 2 * C * gap if name != "kale" else 2 * (1 + lam) / lam * gap
    field, K = make(h), (C + math.sqrt(3) * U / 2) / h**2
    v = field(x, y, a=a, b=b)
    power, start = a @ v.square().sum(1), functional(x, y, a, b, h)
    assert float(v.norm(dim=1).max()) <= U / h
    for share in (0.5, 1.0):
        eta = share / K
        end = functional(x + eta * v, y, a, b, h)
        assert end <= start - eta * (1 - eta * K) * power + 1e-12
    # The rate is -∫|v|²: a short step loses what the velocity says, to second order.
    for eta in (1e-3 / K, 1e-2 / K):
        assert abs((functional(x + eta * v, y, a, b, h) - start) / (-eta * power) - 1) <= K * eta + 1e-6
    # Along another displacement the derivative is -∫<v, Φ>.
    phi, s = torch.randn(x.shape, generator=generator, dtype=F64), 1e-5
    rise = (functional(x + s * phi, y, a, b, h) - functional(x - s * phi, y, a, b, h)) / (2 * s)
    assert abs(rise + a @ (v * phi).sum(1)) < 1e-6 * (1 + abs(rise))


# thm-mmd-variation ---------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_thm_mmd_variation(seed):
    x, y, a, b, generator = problem(seed)
    h = 0.9
    z = torch.cat([x, y[:2] + 0.1])
    now = torch.cat([a, torch.zeros(2, dtype=F64)])
    other = torch.rand(len(z), generator=generator, dtype=F64)
    chi = other / other.sum() - now
    u = 2 * (gram(z, x, h) @ a - gram(z, y, h) @ b)
    for t in (1.0, 0.1):
        rise = mmd2(z, y, now + t * chi, b, h) - mmd2(z, y, now, b, h)
        assert abs(rise - t * (chi @ u) - t * t * chi @ gram(z, z, h) @ chi) < 1e-13
    field = nl.fields.MMD(h)
    v = field(x, y, a=a, b=b)
    assert torch.allclose(v, slopes(lambda x: mmd2(x, y, a, b, h), x, a), atol=1e-8)
    points = torch.randn(4, 2, generator=generator, dtype=F64).requires_grad_()
    (slope,) = torch.autograd.grad((2 * (gram(points, x, h) @ a - gram(points, y, h) @ b)).sum(), points)
    assert torch.allclose(field(x, y, at=points.detach(), a=a, b=b), -slope, atol=1e-13)
    assert torch.allclose(field(x, y, at=x, a=a, b=b), v, atol=1e-13)
    # Wide kernels see means only, with the remainders of the theorem.
    R, wide = float(torch.cat([x, y]).norm(dim=1).max()), 20.0
    gap = b @ y - a @ x
    assert abs(wide**2 * mmd2(x, y, a, b, wide) - gap @ gap) <= 8 * R**4 / wide**2
    far = wide**2 * nl.fields.MMD(wide)(x, y, a=a, b=b) - 2 * gap
    assert float(far.norm(dim=1).max()) <= 16 * R**3 / wide**2
    # The chapter's metric is the same functional, with equal weights.
    equal = [torch.full((len(p),), 1 / len(p), dtype=F64) for p in (x, y)]
    assert abs(nl.metrics.mmd2(x, y, h) - mmd2(x, y, *equal, h)) < 1e-13


# thm-drmmd-variation -------------------------------------------------------------------


@pytest.mark.parametrize("lam", [0.01, 1.0])
@pytest.mark.parametrize("seed", range(2))
def test_thm_drmmd_variation(seed, lam):
    x, y, a, b, generator = problem(seed)
    h = 0.6
    field = nl.fields.DrMMD(lam, h)
    v = field(x, y, a=a, b=b)
    assert torch.allclose(v, slopes(lambda x: drmmd(x, y, a, b, h, lam), x, a), rtol=1e-6, atol=1e-6)
    points = torch.randn(3, 2, generator=generator, dtype=F64)
    joined, mass = torch.cat([x, points]), torch.cat([a, torch.zeros(3, dtype=F64)])
    # The first variation at a point: what the first crumb of mass there costs; exact, as F is quadratic in the mass.
    t = 1e-4

    def variation(z):
        up = drmmd(torch.cat([x, z[None]]), y, torch.cat([a, mass.new_tensor([t])]), b, h, lam)
        down = drmmd(torch.cat([x, z[None]]), y, torch.cat([a, mass.new_tensor([-t])]), b, h, lam)
        return (up - down) / (2 * t)

    e = 1e-4 * torch.eye(2, dtype=F64)
    by_difference = torch.stack([torch.stack([variation(z - k) - variation(z + k) for k in e]) / 2e-4 for z in points])
    assert torch.allclose(field(x, y, at=points, a=a, b=b), by_difference, rtol=1e-4, atol=1e-4)
    assert torch.allclose(field(x, y, at=joined, a=a, b=b)[: len(x)], v, atol=1e-10)
    # Bounds and limits.
    m2 = mmd2(x, y, a, b, h)
    values = [drmmd(x, y, a, b, h, s) for s in (1e-3, 1e-2, 0.1, 1.0, 10.0)]
    assert all(m2 <= f <= (1 + 1 / s) * m2 for f, s in zip(values, (1e-3, 1e-2, 0.1, 1.0, 10.0), strict=True))
    assert all(p > q for p, q in zip(values, values[1:], strict=False))
    large = 50.0
    gap = nl.fields.DrMMD(large, h)(x, y, a=a, b=b) - nl.fields.MMD(h)(x, y, a=a, b=b)
    assert float(gap.norm(dim=1).max()) <= 2 * math.sqrt(m2) / (large * h)
    # On the data's own atoms: the spectral formula, and χ² as λ vanishes; there g solves a system of the eigenbasis.
    q = torch.rand(len(y), generator=generator, dtype=F64)
    q = q / q.sum()
    root = b.sqrt()
    s, E = torch.linalg.eigh(root[:, None] * gram(y, y, h) * root)
    c = E.T @ ((q - b) / root)
    chi2 = ((q - b) ** 2 / b).sum()
    assert abs((c * c).sum() - chi2) < 1e-10
    for small in (0.1, 1e-3):
        g = E @ (s / (s + small) * c) / root  # (Σ + λ)^{-1} (m_q - m_p) on the data
        value = (1 + small) * (s / (s + small) * c * c).sum()
        assert abs(value - (1 + small) * (q - b) @ g) < 1e-9
        coefficients = torch.linalg.solve(gram(y, y, h), g)
        z = torch.randn(3, 2, generator=generator, dtype=F64)
        pull = gram(z, y, h) * coefficients
        expected = 2 * (1 + small) * (pull.sum(1, keepdim=True) * z - pull @ y) / h**2
        got = nl.fields.DrMMD(small, h)(y.clone(), y, at=z, a=q, b=b)
        assert torch.allclose(got, expected, rtol=1e-5, atol=1e-6)
    assert abs(drmmd_on_atoms(s, c, 1e-13) / chi2 - 1) < 1e-3


def drmmd_on_atoms(s, c, lam):
    return (1 + lam) * (s / (s + lam) * c * c).sum()


# thm-kale-variation --------------------------------------------------------------------


@pytest.mark.parametrize("lam", [0.02, 0.5])
@pytest.mark.parametrize("seed", range(2))
def test_thm_kale_variation(seed, lam):
    x, y, a, b, generator = problem(seed)
    h = 0.8
    v = nl.fields.KALE(lam, h)(x, y, a=a, b=b)
    assert torch.allclose(v, slopes(lambda x: kale(x, y, a, b, h, lam), x, a), rtol=1e-5, atol=1e-5)
    # Mass: the slope is (1+λ) h_q up to the remainder; here by the values h_q(y) from the stationarity equation.
    z = torch.cat([x, y[:3] + 0.1])
    now = torch.cat([a, torch.zeros(3, dtype=F64)])
    other = torch.rand(len(z), generator=generator, dtype=F64)
    chi = other / other.sum() - now
    t = 1e-3
    rise = kale(z, y, now + t * chi, b, h, lam) - kale(z, y, now, b, h, lam)
    fall = kale(z, y, now - t * chi, b, h, lam) - kale(z, y, now, b, h, lam)
    bound = (1 + lam) * t * t * (chi @ gram(z, z, h) @ chi) / (2 * lam)
    assert -1e-12 <= rise + fall <= 2 * bound + 1e-12
    # Limits in λ: half of MMD² above, KL below on common atoms.
    m2, large = mmd2(x, y, a, b, h), 40.0
    M = math.sqrt(m2)
    value = large / (1 + large) * kale(x, y, a, b, h, large)
    assert m2 / 2 * (1 - math.exp(M / large) / large) <= value <= m2 / 2
    gap = nl.fields.KALE(large, h)(x, y, a=a, b=b) - nl.fields.MMD(h)(x, y, a=a, b=b) / 2
    assert float(gap.norm(dim=1).max()) <= 2 * M / (large * h) * (1 + math.exp(2 * M / large))
    q = torch.rand(len(y), generator=generator, dtype=F64) + 0.2
    q = q / q.sum()
    kl = float((q * (q / b).log()).sum())
    near = [kale_on_atoms(y, q, b, 0.6, s) for s in (1e-1, 1e-3, 1e-6)]
    assert near[0] < near[1] < near[2] <= kl and near[2] > 0.98 * kl
    # The library's witness on the atoms tends to log(q/p): its differences across atoms, by integrating its velocity.
    small = 1e-5
    field, path = nl.fields.KALE(small, 0.6), torch.linspace(0, 1, 2001, dtype=F64)[:, None]
    for i, j in ((0, 1), (2, 3)):
        line = y[i] + path * (y[j] - y[i])
        slope = -(field(y.clone(), y, at=line, a=q, b=b) @ (y[j] - y[i]))
        integral = float(torch.trapezoid(slope, path[:, 0]))
        wanted = float((q[j] / b[j]).log() - (q[i] / b[i]).log())
        assert abs(integral - wanted) < 0.02 * (1 + abs(wanted))


def kale_on_atoms(y, q, b, h, lam):
    """G_λ, without 1 + λ, when q lives on the data's atoms: over the values of h there, by scipy."""
    inverse = torch.linalg.inv(gram(y, y, h)).numpy()
    q, b = q.numpy(), b.numpy()

    def loss(u):
        e = b * np.exp(u)
        return -(1 + q @ u - e.sum() - lam / 2 * u @ inverse @ u), -(q - e - lam * inverse @ u)

    return -minimize(loss, np.zeros(len(q)), jac=True, method="BFGS", options={"gtol": 1e-10}).fun


# thm-f-divergence-critic ---------------------------------------------------------------

FORMS = {  # f, f', f'' of the density ratio
    "kl": (lambda r: r * r.log(), lambda r: 1 + r.log(), lambda r: 1 / r),
    "reverse_kl": (lambda r: -r.log(), lambda r: -1 / r, lambda r: 1 / r**2),
    "js": (
        lambda r: (r * r.log() - (1 + r) * ((1 + r) / 2).log()) / 2,
        lambda r: (2 * r / (1 + r)).log() / 2,
        lambda r: 1 / (2 * r * (1 + r)),
    ),
}


@pytest.mark.parametrize("name", FORMS)
def test_thm_f_divergence_critic(name):
    f, slope, curvature = FORMS[name]
    generator = torch.Generator().manual_seed(1)
    p, q, r = (torch.rand(9, generator=generator, dtype=F64) + 0.2 for _ in range(3))
    p, q, r = p / p.sum(), q / q.sum(), r / r.sum()
    D = lambda q: p @ f(q / p)  # noqa: E731
    t = 1e-6
    assert abs((D(q + t * (r - q)) - D(q)) / t - (r - q) @ slope(q / p)) < 1e-4
    # The gap of any critic is a Bregman divergence, zero for f'(q/p) alone.
    other = torch.rand(9, generator=generator, dtype=F64) + 0.5
    J = lambda ratio: q @ slope(ratio) - p @ (ratio * slope(ratio) - f(ratio))  # noqa: E731
    bregman = p @ (f(q / p) - f(other) - slope(other) * (q / p - other))
    assert abs(D(q) - J(other) - bregman) < 1e-12 and bregman > 1e-3 and abs(D(q) - J(q / p)) < 1e-12
    # The library's critic with an affine log ratio, against Newton's method on the same two clouds.
    u = torch.special.ndtri((torch.arange(60, dtype=F64) + 0.5) / 60)
    x, y = (0.6 + u)[:, None], u[:, None]
    critic = nl.fields.Critic(name, make=lambda d: torch.nn.Linear(d, 1))
    training = nl.Training(steps=150, batch=60, rate=0.08, decay=1, warmup=0, ema=0.0)
    critic.fit(x, y, training, generator=torch.Generator().manual_seed(2))
    (weight,), bias = critic.network.weight.detach(), critic.network.bias.detach()

    def gain(c):
        here, there = (torch.exp(c[0] * z[:, 0] + c[1]) for z in (x, y))
        return slope(here).mean() - (there * slope(there) - f(there)).mean()

    c = torch.zeros(2, dtype=F64)
    for _ in range(30):
        H = torch.autograd.functional.hessian(gain, c)
        c.requires_grad_()
        (g,) = torch.autograd.grad(gain(c), c)
        c = (c - torch.linalg.solve(H, g)).detach()
    assert torch.allclose(torch.cat([weight, bias]), c, atol=2e-3)
    assert abs(float(c[0]) - 0.6) < 0.05  # log q/p of the two normal laws is 0.6 x - 0.18
    ratio = torch.exp(weight * x + bias)
    assert torch.allclose(critic(x, y), -ratio * curvature(ratio) * weight, atol=1e-10)
    at = torch.tensor([[-1.0], [2.0]], dtype=F64)
    ratio = torch.exp(weight * at + bias)
    assert torch.allclose(critic(x, y, at=at), -ratio * curvature(ratio) * weight, atol=1e-10)


# thm-sliced-variation ------------------------------------------------------------------


def directions(L, d, seed):
    """The directions that the library draws from a generator of this seed."""
    theta = torch.randn(L, d, generator=torch.Generator().manual_seed(seed), dtype=F64)
    return theta / theta.norm(dim=1, keepdim=True)


def on_line(u, v, a, b):
    """½ W_2² on the line, by the quantile functions on the common refinement of their steps."""
    u, i = u.sort()
    v, j = v.sort()
    A, B = a[i].cumsum(0), b[j].cumsum(0)
    levels = torch.cat([torch.zeros(1, dtype=F64), torch.cat([A[:-1], B[:-1]]).sort().values, torch.ones(1, dtype=F64)])
    middle = (levels[1:] + levels[:-1]) / 2
    gap = u[torch.searchsorted(A[:-1].contiguous(), middle)] - v[torch.searchsorted(B[:-1].contiguous(), middle)]
    return (levels.diff() * gap**2).sum() / 2


@pytest.mark.parametrize("d", [1, 3])
@pytest.mark.parametrize("seed", range(2))
def test_thm_sliced_variation(seed, d):
    x, y, a, b, generator = problem(seed, d=d)
    L = 6
    theta = directions(L, d, seed)
    field = nl.fields.SlicedWasserstein(L)
    chance = lambda: torch.Generator().manual_seed(seed)  # noqa: E731
    functional = lambda x: sum(on_line(x @ t, y @ t, a, b) for t in theta) / L  # noqa: E731
    v = field(x, y, a=a, b=b, generator=chance())
    assert torch.allclose(v, slopes(functional, x, a), atol=1e-7)
    # Equal numbers and weights take another road.
    even, twin = torch.full((5,), 0.2, dtype=F64), y[:5]
    functional = lambda x: sum(on_line(x @ t, twin @ t, even, even) for t in theta) / L  # noqa: E731
    assert torch.allclose(field(x, twin, generator=chance()), slopes(functional, x, even), atol=1e-7)
    # The mean, and dilations: a symmetric matrix of trace one takes the place of I.
    M = theta.T @ theta / L
    assert abs(M.trace() - 1) < 1e-12
    assert torch.allclose(a @ v, M @ (b @ y - a @ x), atol=1e-12)
    c = torch.randn(d, generator=generator, dtype=F64)
    w = c + 0.5 * x
    v = field(x, c + 1.5 * x, a=a, b=a, generator=chance())
    assert torch.allclose(v, w @ M, atol=1e-12)
    # The Monte Carlo error of one direction on a dilation: d - 1 times the squared length of the mean.
    draws = torch.stack([field(x, c + 1.5 * x, a=a, b=a, generator=generator) for _ in range(150)])
    error = (draws - w / d).square().sum(-1).mean(0)
    wanted = (d - 1) / L * (w / d).square().sum(-1)
    assert torch.allclose(error, wanted, rtol=0.5, atol=1e-12)
    assert torch.allclose(draws.mean(0), w / d, atol=float(5 * (wanted.max() / 150).sqrt()) + 1e-12)
