"""Theorems of the chapter on drifting models: book/drifting_models.md."""

import copy
import math

import numpy as np
import pytest
import torch

import nsgf_lite as nl

F64 = torch.float64
TOL = 1e-12


def cloud(generator, n, d, radius=1.0):
    """Points in a ball, with unequal weights."""
    z = torch.randn(n, d, generator=generator, dtype=F64)
    w = torch.rand(n, generator=generator, dtype=F64) ** 2 + 0.05
    return radius * z / (1 + z.norm(dim=1, keepdim=True)), w / w.sum()


def hermite(count, d=1):
    """Nodes and weights of the standard normal law."""
    z, w = map(torch.from_numpy, np.polynomial.hermite_e.hermegauss(count))
    w = w / w.sum()
    grid = torch.cartesian_prod(*[z] * d).reshape(-1, d)
    return grid, torch.cartesian_prod(*[w] * d).reshape(-1, d).prod(1)


def log_kernel_mean(z, points, w, h):
    """log (k * p)(z), written out."""
    return torch.logsumexp(-(z[:, None] - points).square().sum(2) / (2 * h**2) + w.log(), 1)


def kernel_mean(z, points, w, h):
    """m_p(z), and the covariance of the reweighted law, written out."""
    share = torch.softmax(-(z[:, None] - points).square().sum(2) / (2 * h**2) + w.log(), 1)
    mean = share @ points
    off = points - mean[:, None]
    return mean, torch.einsum("kn,kni,knj->kij", share, off, off)


class Lattice:
    """Integrals over the line or the plane on a lattice: for what is analytic and decays, right to rounding."""

    def __init__(self, d, h, reach=7.0):
        step = h / 3
        axis = torch.arange(-reach, reach + step, step, dtype=F64)
        self.h, self.cell = h, step**d
        self.points = torch.cartesian_prod(*[axis] * d).reshape(-1, d)
        self.norm = (2 * math.pi * h**2) ** (d / 2)

    def log_density(self, x, a):
        return log_kernel_mean(self.points, x, a, self.h) - math.log(self.norm)

    def divergence(self, x, a, y, b):
        s, r = self.log_density(x, a), self.log_density(y, b)
        return (s.exp() * (s - r)).sum() * self.cell

    def psi(self, z, x, a, y, b):
        """gamma_h * log(q_h / p_h) at z."""
        ratio = self.log_density(x, a) - self.log_density(y, b)
        near = torch.exp(-(z[:, None] - self.points).square().sum(2) / (2 * self.h**2)) / self.norm
        return near @ ratio * self.cell


def network(generator, d=2, noise=2, width=8):
    return nl.networks.seeded(lambda: nl.networks.Residual(noise, d, width=width, depth=1), generator)


def gradient(value, net):
    return torch.cat([p.flatten() for p in torch.autograd.grad(value, list(net.parameters()))])


def mean_kernel(u, v, h):
    return torch.exp(-(u[:, None] - v).square().sum(2) / (2 * h**2)).mean()


def mmd2(x, y, h=0.8):
    return mean_kernel(x, x, h) - 2 * mean_kernel(x, y, h) + mean_kernel(y, y, h)


def smoothed(x, y, h=0.7):
    a, b = (torch.full((len(t),), 1 / len(t), dtype=F64) for t in (x, y))
    return Lattice(1, h).divergence(x, a, y, b)


CASES = {
    "sinkhorn": (nl.fields.Sinkhorn(0.5, TOL), lambda x, y: nl.sinkhorn_divergence(x, y, 0.5, tol=TOL), 2),
    "mmd": (nl.fields.MMD(0.8), mmd2, 2),
    "smoothed kl": (nl.fields.SmoothedKL(0.7, nodes=40), smoothed, 1),
}


# thm-surrogate-gradient -----------------------------------------------------------------


def check_identity(case, seed, eta=0.3):
    """Stopped gradient = 2 eta x gradient of the functional = finite difference; without the stop it is another."""
    field, F, d = CASES[case]
    generator = torch.Generator().manual_seed(seed)
    net = network(generator, d).double()
    z = torch.randn(9, 2, generator=generator, dtype=F64)
    y = cloud(generator, 6, d)[0]
    x = net(z)
    goal = (x + eta * field(x.detach(), y)).detach()
    stopped = gradient((x - goal).square().sum(1).mean(), net)
    whole = gradient(F(net(z), y), net)
    assert (stopped - 2 * eta * whole).norm() < 1e-7 * whole.norm()
    direction = torch.randn(len(whole), generator=generator, dtype=F64)
    values = []
    for s in (1e-4, -1e-4):
        moved = copy.deepcopy(net)
        start = torch.nn.utils.parameters_to_vector(moved.parameters())
        torch.nn.utils.vector_to_parameters(start + s * direction, moved.parameters())
        values.append(float(F(moved(z), y).detach()))
    assert abs((values[0] - values[1]) / 2e-4 - whole @ direction) < 1e-5 * direction.norm()
    if case == "sinkhorn":  # which cannot be differentiated through
        return
    loose = gradient((net(z) - (lambda u: u + eta * field(u, y))(net(z))).square().sum(1).mean(), net)
    value = gradient(field(net(z), y).square().sum(1).mean(), net)
    assert (loose - eta**2 * value).norm() < 1e-9 * value.norm()
    assert torch.cosine_similarity(loose, whole, dim=0) < (0.98 if d > 1 else 1 - 1e-6)


def check_training(case, seed, step):
    """The library's loop: its first gradient is the functional's, and its loss is step^2 E|V|^2."""
    field, F, d = CASES[case]
    net = network(torch.Generator().manual_seed(seed), d)
    start, seen = copy.deepcopy(net).double(), {}

    def note(module, given):
        seen["z"] = given[0].detach().double()

    net.register_forward_pre_hook(note)

    def spy(x, y, **_):
        seen["y"], seen["v"] = y.double(), field(x.double(), y.double())
        return seen["v"].float()

    budget = nl.Training(steps=1, batch=32, rate=1e-5, warmup=0, decay=0, clip=1e9, ema=0.0)
    law = nl.toy.Gaussian([0.4] * d, [[float(i == j) for i in range(d)] for j in range(d)])
    losses = nl.drifting.train(net, spy, law, budget, data=20, step=step, seed=seed, progress=False)
    got = torch.cat([p.grad.flatten() for p in net.parameters()]).double()
    want = 2 * step * gradient(F(start(seen["z"]), seen["y"]), start)
    assert len(seen["y"]) == 20
    assert (got - want).norm() < 1e-4 * want.norm()
    assert losses[0] == pytest.approx(step**2 * float(seen["v"].square().sum(1).mean()), rel=1e-4)


def check_the_value_is_blind(seed):
    """A generator of one point at the mean of the data: loss and drift vanish, the functional does not."""
    generator = torch.Generator().manual_seed(seed)
    y = cloud(generator, 7, 2)[0]
    point = y.mean(0).expand(5, 2).clone()
    field, F, _ = CASES["sinkhorn"]
    assert field(point, y).norm() < 1e-9
    assert F(point, y) > 0.01
    # Following the goals to the end is Euler's method for the flow.
    x = cloud(generator, 5, 2)[0]
    path = nl.follow(field, x, y, step=0.3, steps=1)
    assert (path[1] - (x + 0.3 * field(x, y))).norm() < 1e-12
    assert F(path[1], y) < F(x, y)


@pytest.mark.parametrize(
    ("claim", "setting"),
    [(check_identity, (case, seed)) for case in CASES for seed in (0, 1)]
    + [(check_training, (case, seed, step)) for case in CASES for seed, step in ((0, 1.0), (1, 0.3))]
    + [(check_the_value_is_blind, (0,))],
)
def test_thm_surrogate_gradient(claim, setting):
    claim(*setting)


# thm-tweedie ----------------------------------------------------------------------------


@pytest.mark.parametrize(("d", "h", "seed"), [(1, 0.3, 0), (2, 0.5, 1), (3, 1.5, 2), (2, 0.2, 3)])
def test_thm_tweedie(d, h, seed):
    generator = torch.Generator().manual_seed(seed)
    (x, a), (y, b) = cloud(generator, 8, d), cloud(generator, 11, d)
    field = nl.fields.ScoreDifference(h)
    z = torch.cat([x, torch.randn(6, d, generator=generator, dtype=F64)])
    V = field(x, y, at=z, a=a, b=b)
    # 1 and 4: posterior means, and derivatives of logarithms.
    (p_mean, p_cov), (q_mean, q_cov) = kernel_mean(z, y, b, h), kernel_mean(z, x, a, h)
    assert (V - (p_mean - q_mean)).abs().max() < 1e-11
    moving = z.clone().requires_grad_()
    ratio = log_kernel_mean(moving, y, b, h) - log_kernel_mean(moving, x, a, h)
    (slope,) = torch.autograd.grad(ratio.sum(), moving)
    assert (V - h**2 * slope).abs().max() < 1e-11
    assert (field(x, y, a=a, b=b) - V[:8]).abs().max() < 1e-11
    # 2: the Jacobian is a difference of covariances.
    J = torch.stack(
        [torch.autograd.functional.jacobian(lambda u: field(x, y, at=u[None], a=a, b=b)[0], u) for u in z[6:11]]
    )
    assert (J - (p_cov - q_cov)[6:11] / h**2).abs().max() < 1e-8 / h**2
    # 3: seen by one particle, the field is mean shift, which climbs.
    for u in z:
        there = u + field(u[None], y, b=b)[0]
        rise = log_kernel_mean(there[None], y, b, h) - log_kernel_mean(u[None], y, b, h)
        assert rise >= (there - u).square().sum() / (2 * h**2) - 1e-12
    # The posterior mean of a Gaussian, in closed form.
    if d <= 2:
        nodes, w = hermite(40 if d == 1 else 26, d)
        root = 0.5 * torch.eye(d, dtype=F64) + 0.2 * torch.randn(d, d, generator=generator, dtype=F64)
        B, wide = root @ root.T, 1.0
        gain = B @ torch.linalg.inv(B + wide**2 * torch.eye(d, dtype=F64))
        at = 0.7 * torch.randn(5, d, generator=generator, dtype=F64)
        one = torch.zeros(1, d, dtype=F64)
        closed = 0.3 + (at - 0.3) @ gain.T
        assert (nl.fields.ScoreDifference(wide)(one, 0.3 + nodes @ root.T, at=at, b=w) - closed).abs().max() < 1e-5


# thm-score-difference-consistency -------------------------------------------------------


def check_the_field_holds_the_data(d, seed):
    """Integrate V along straight lines from one point: k * p comes back, with its constant."""
    generator, h = torch.Generator().manual_seed(seed), 0.6
    (x, a), (y, b) = cloud(generator, 5, d), cloud(generator, 7, d)
    lattice = Lattice(d, h, reach=4.2 if d == 2 else 6.0)
    t, w = map(torch.from_numpy, np.polynomial.legendre.leggauss(40))
    t, w = (t + 1) / 2, w / 2
    z = lattice.points if d == 1 else lattice.points[::7]
    lines = (t[:, None, None] * z).reshape(-1, d)
    V = nl.fields.ScoreDifference(h)(x, y, at=lines, a=a, b=b).reshape(len(t), len(z), d)
    work = (w[:, None] * (V * z).sum(2)).sum(0)
    guess = (log_kernel_mean(z, x, a, h) + work / h**2).exp()
    truth = log_kernel_mean(z, y, b, h).exp()
    if d == 1:  # the constant by the normalisation
        guess = guess * lattice.norm / (guess.sum() * lattice.cell)
        assert (guess - truth).abs().max() < 1e-8
    ratio = (guess / truth).log()
    assert ratio.max() - ratio.min() < 1e-7


def check_only_at_home(d, seed):
    generator = torch.Generator().manual_seed(seed)
    y, b = cloud(generator, 6, d)
    at = torch.randn(20, d, generator=generator, dtype=F64)
    # The same law, its atoms shuffled and split.
    order = torch.randperm(12, generator=generator)
    x, a = y.repeat(2, 1)[order], torch.cat([0.3 * b, 0.7 * b])[order]
    for h in (0.1, 0.5, 2.0):
        field = nl.fields.ScoreDifference(h)
        assert field(x, y, at=at, a=a, b=b).abs().max() < 1e-10
        assert field(y, y.clone(), a=b, b=b).abs().max() < 1e-10
    # Ever nearer laws: the field fades in proportion, and never on a set of positive measure.
    other = torch.roll(b, 1)
    sizes = []
    for k in (1, 10, 20):
        near = (1 - 2.0**-k) * b + 2.0**-k * other
        V = nl.fields.ScoreDifference(0.5)(y, y.clone(), at=at, a=near, b=b)
        assert (V.norm(dim=1) > 0).all()
        sizes.append(float(V.norm()) * 2**k)
    assert sizes[2] == pytest.approx(sizes[1], rel=1e-2)


def check_particles_may_rest(h):
    field = nl.fields.ScoreDifference(h)
    pair = torch.tensor([[-1.0], [1.0]], dtype=F64)
    z = torch.linspace(-1.5, 1.5, 7, dtype=F64)[:, None]
    zero = torch.zeros(1, 1, dtype=F64)
    assert field(zero, pair).abs().max() < 1e-14
    assert (field(zero, pair, at=z) - torch.tanh(z / h**2)).abs().max() < 1e-12
    flat = torch.stack([z[:, 0], 0 * z[:, 0]], 1)
    up = torch.tensor([0.0, 0.5], dtype=F64)
    copies = torch.cat([flat + up, flat - up])
    assert field(flat, copies).abs().max() < 1e-12
    # With some density the same segment does not rest.
    thick = torch.cat([flat + s * up for s in (-0.4, 0.0, 0.4)])
    assert field(thick, copies).norm(dim=1).max() > 0.01


@pytest.mark.parametrize(
    ("claim", "setting"),
    [(check_the_field_holds_the_data, (d, seed)) for d in (1, 2) for seed in (0, 1)]
    + [(check_only_at_home, (d, 5)) for d in (1, 3)]
    + [(check_particles_may_rest, (h,)) for h in (0.4, 1.0)],
)
def test_thm_score_difference_consistency(claim, setting):
    claim(*setting)


# thm-smoothed-kl-flow -------------------------------------------------------------------


def check_velocity(d, h, seed):
    """Autograd of the divergence on a lattice; the smoothing of the score difference; the speed limit; draws."""
    generator = torch.Generator().manual_seed(seed)
    (x, a), (y, b) = cloud(generator, 5, d), cloud(generator, 7, d)
    lattice = Lattice(d, h, reach=1 + 7 * h)
    moving = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(lattice.divergence(moving, a, y, b), moving)
    field = nl.fields.SmoothedKL(h, nodes=40 if d == 1 else 20)
    V = field(x, y, a=a, b=b)
    assert (V + slope / a[:, None]).abs().max() < 1e-6
    z = torch.cat([x, 2 * torch.randn(4, d, generator=generator, dtype=F64)])
    at = field(x, y, at=z, a=a, b=b)
    assert (at[:5] - V).abs().max() < 1e-12
    noise, w = hermite(30 if d == 1 else 16, d)
    moved = (z[:, None] + h * noise).reshape(-1, d)
    pointwise = nl.fields.ScoreDifference(h)(x, y, at=moved, a=a, b=b).reshape(len(z), -1, d)
    assert (at - (w @ pointwise) / h**2).abs().max() < 1e-5
    assert at.norm(dim=1).max() <= 2 / h**2
    # Without the convolution it is not minus the slope.
    raw = nl.fields.ScoreDifference(h)(x, y, a=a, b=b) / h**2
    assert (raw + slope / a[:, None]).norm() > 1e3 * (V + slope / a[:, None]).norm()
    # Normal draws in place of the quadrature.
    chance = torch.Generator().manual_seed(seed)
    drawn = nl.fields.SmoothedKL(h, draws=400)(x, y, a=a, b=b, generator=chance)
    spread = pointwise[:5].sub(V[:, None] * h**2).square().sum(2) @ w
    assert (drawn - V).norm(dim=1).max() < 6 * float((spread / 400).sqrt().max()) / h**2 + 1e-6


def check_tangent(seed, h=0.7):
    """The first variation, as the line integral of the velocity: tangent plane + divergence, and Jeffreys' identity."""
    generator = torch.Generator().manual_seed(seed)
    (x, a), (y, b), (s, c) = (cloud(generator, n, 1) for n in (5, 7, 4))
    lattice = Lattice(1, h)
    t, w = map(torch.from_numpy, np.polynomial.legendre.leggauss(24))
    field = nl.fields.SmoothedKL(h, nodes=40)

    def psi(z):
        lines = ((t[:, None, None] + 1) / 2 * z).reshape(-1, 1)
        V = field(x, y, at=lines, a=a, b=b).reshape(len(t), len(z))
        return -(w / 2) @ (V * z[:, 0])

    reference = lattice.psi(torch.cat([x, y, s]), x, a, y, b)
    shift = psi(torch.cat([x, y, s])) - reference
    assert shift.max() - shift.min() < 1e-6
    F = lattice.divergence(x, a, y, b)
    for end, mass in ((s, c), (y, b), (10 * s, c)):  # far outside the ball too
        wide = Lattice(1, h, reach=16.0)
        exact = wide.divergence(end, mass, y, b) - wide.divergence(end, mass, x, a)
        assert abs(F + mass @ psi(end) - a @ psi(x) - exact) < 1e-5
    jeffreys = F + lattice.divergence(y, b, x, a)
    assert abs(a @ psi(x) - b @ psi(y) - jeffreys) < 1e-6
    grid = torch.linspace(-1, 1, 201, dtype=F64)[:, None]
    cdf = (a @ (x < grid.T).to(F64)) - (b @ (y < grid.T).to(F64))
    w1 = cdf.abs().sum() * 0.01
    assert jeffreys <= field(x, y, at=grid, a=a, b=b).abs().max() * w1 * 1.05
    assert field(y, y.clone(), a=b, b=b).abs().max() < 1e-10


def check_displacement(seed, h=0.7):
    """The remainder along displacements, of particles split in two, at large and small steps."""
    generator = torch.Generator().manual_seed(seed)
    (x, a), (y, b) = cloud(generator, 5, 1), cloud(generator, 7, 1)
    lattice = Lattice(1, h, reach=10.0)
    x2, a2 = x.repeat(2, 1), a.repeat(2) / 2
    phi = torch.randn(10, 1, generator=generator, dtype=F64)
    V = nl.fields.SmoothedKL(h, nodes=40)(x2, y, a=a2, b=b)
    F, slope, size = lattice.divergence(x, a, y, b), a2 @ (V * phi)[:, 0], a2 @ phi[:, 0] ** 2
    errors = []
    for t in (1.0, 0.1, 0.01, 0.001):
        errors.append(abs(float(lattice.divergence(x2 + t * phi, a2, y, b) - F + t * slope)))
        assert errors[-1] <= 0.5 * (1 / h**2 + 1 / h**4) * size * t**2
    assert errors[2] / errors[3] == pytest.approx(100, rel=0.25)


def check_gaussians(d):
    """Between Gaussians the two fields agree; for one particle between two atoms they do not."""
    nodes, w = hermite(40 if d == 1 else 22, d)
    x, y = 0.6 * nodes, 0.2 + 0.8 * nodes
    at = torch.linspace(-0.5, 0.5, 3, dtype=F64)[:, None].expand(3, d)
    scores = nl.fields.ScoreDifference(1.0)(x, y, at=at, a=w, b=w)
    true = nl.fields.SmoothedKL(1.0, nodes=8)(x, y, at=at, a=w, b=w)
    assert (scores - true).abs().max() < 1e-3
    assert scores.abs().max() > 0.1
    h, e = 0.6, 1e-5
    pair = torch.tensor([[-1.0], [1.0]], dtype=F64)
    near, zero = torch.tensor([[e]], dtype=F64), torch.zeros(1, 1, dtype=F64)
    noise, mass = hermite(60)
    slopes = [nl.fields.ScoreDifference(h)(zero, pair, at=near) / e, nl.fields.SmoothedKL(h, 60)(zero, pair, near) / e]
    assert float(slopes[0]) == pytest.approx(h**-2, rel=1e-4)
    assert float(slopes[1]) == pytest.approx(float(mass @ torch.cosh(noise[:, 0] / h) ** -2) / h**4, rel=1e-3)
    assert float(slopes[1]) < 0.7 * float(slopes[0]) / h**2


@pytest.mark.parametrize(
    ("claim", "setting"),
    [(check_velocity, setting) for setting in ((1, 0.6, 0), (1, 1.2, 1), (2, 1.0, 2))]
    + [(check_tangent, (seed,)) for seed in (0, 1)]
    + [(check_displacement, (seed,)) for seed in (0, 1)]
    + [(check_gaussians, (1,)), (check_gaussians, (2,))],
)
def test_thm_smoothed_kl_flow(claim, setting):
    claim(*setting)
