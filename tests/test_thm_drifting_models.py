"""Theorems of the chapter on drifting models: book/drifting_models.md."""

import copy
import math

import numpy as np
import pytest
import torch
from conftest import damaged, sharp

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


class Kinked(torch.nn.Module):
    """A generator of ReLU units: Lipschitz in its parameters, and not differentiable everywhere."""

    def __init__(self, d):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(2, 16), torch.nn.ReLU(), torch.nn.Linear(16, d))

    def forward(self, z):
        return self.layers(z)


def check_identity(case, seed, kinked=False, eta=0.3):
    """Stopped gradient = 2 eta x finite difference of the functional; without the stop it is another."""
    field, F, d = CASES[case]
    generator = torch.Generator().manual_seed(seed)
    net = nl.networks.seeded(lambda: Kinked(d), generator) if kinked else network(generator, d)
    net = net.double()
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
    slope = (values[0] - values[1]) / 2e-4
    assert abs(stopped @ direction - 2 * eta * slope) < 3e-7 * direction.norm()
    damaged("the factor 2", abs(stopped @ direction - eta * slope) < 1e-3 * abs(slope))
    damaged("the sign", stopped @ direction * slope < 0)
    if case == "sinkhorn":  # which cannot be differentiated through
        return
    loose = gradient((net(z) - (lambda u: u + eta * field(u, y))(net(z))).square().sum(1).mean(), net)
    value = gradient(field(net(z), y).square().sum(1).mean(), net)
    assert (loose - eta**2 * value).norm() < 1e-9 * value.norm()
    if not kinked:  # whose samples start as one heap: there the two are nearly parallel
        assert torch.cosine_similarity(loose, whole, dim=0) < (0.98 if d > 1 else 1 - 1e-6)
    damaged("without the stop", (loose - 2 * eta * whole).norm() < 0.1 * whole.norm())


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


def check_by_hand(eta=0.2, theta=0.6, h=1e-6):
    """Potential energies: f = theta z in a bowl and on a hill; and a step in z, Lipschitz on no one neighbourhood."""
    z = torch.tensor([-1.0, 1.0], dtype=F64)  # mean square one
    for bend in (1.0, -1.0):  # W = bend x^2 / 2
        loss = [(((t - theta) * z + eta * bend * theta * z) ** 2).mean() for t in (theta + h, theta - h)]
        value = [bend * (t * z).square().mean() / 2 for t in (theta + h, theta - h)]
        assert abs((loss[0] - loss[1]) - 2 * eta * (value[0] - value[1])) < 1e-8 * h
    W = torch.tensor([0.3, 1.0], dtype=F64)  # at 0 and at 1; f = 1 where z < theta, z uniform on [0, 1]
    value = [t * W[1] + (1 - t) * W[0] for t in (theta + h, theta - h)]
    z = (torch.arange(1000, dtype=F64) + 0.5) / 1000
    inner = ((z < theta + h).to(F64) - (z < theta - h).to(F64)).abs().max()  # derivative zero for almost every z
    damaged("not Lipschitz on one neighbourhood", abs(2 * eta * (value[0] - value[1]) / (2 * h)) <= inner)


@pytest.mark.parametrize(
    ("claim", "setting"),
    [(check_identity, (case, seed)) for case in CASES for seed in (0, 1)]
    + [(check_identity, (case, 3, True)) for case in CASES]
    + [(check_by_hand, ())]
    + [(check_training, (case, seed, step)) for case in CASES for seed, step in ((0, 1.0), (1, 0.3))]
    + [(check_the_value_is_blind, (0,))],
)
def test_thm_surrogate_gradient(claim, setting):
    """Checked by: finite differences, closed form."""
    claim(*setting)


# thm-tweedie ----------------------------------------------------------------------------


@pytest.mark.parametrize(("d", "h", "seed"), [(1, 0.3, 0), (2, 0.5, 1), (3, 1.5, 2), (2, 0.2, 3)])
def test_thm_tweedie(d, h, seed):
    """Checked by: definition, closed form."""
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
    # One datum makes part 3 an equality.
    one, u = y[:1], z[:1] + 0.1
    step = nl.fields.ScoreDifference(h)(u, one)
    assert (u + step - one).abs().max() < 1e-12
    rise = log_kernel_mean(u + step, one, b[:1], h) - log_kernel_mean(u, one, b[:1], h)
    sharp(step.square().sum() / (2 * h**2), rise, 0.999)
    damaged("twice the climb", rise >= step.square().sum() / h**2)
    damaged("scores without h squared", h == 1 or (V - slope).norm() < 0.01 * slope.norm())
    if d > 1:
        shares = torch.softmax(-torch.cdist(z, y) / h + b.log(), 1)  # mean shift with another kernel
        unit = (z[:, None] - y) / torch.cdist(z, y)[..., None] / h
        pull = torch.einsum("kn,kni,knj->kij", shares, y - (shares @ y)[:, None], -unit)
        damaged("mean shift by exp(-distance) is a gradient", (pull - pull.mT).norm() < 1e-3 * pull.norm())
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
    off = (log_kernel_mean(z, x, a, h) + work / h).exp() / truth
    damaged("1/h for 1/h squared", off.log().max() - off.log().min() < 0.1)


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
    for q, p in ((zero, pair), (flat, copies)):  # no absolutely continuous part: at rest and yet not the data
        damaged("q of any kind", field(q, p).abs().max() > 1e-12 or field(q, p, at=p + 0.1).abs().max() < 1e-3)
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
    """Checked by: quadrature, definition."""
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


def check_constants(h=0.5):
    """Atoms for which the bounds of parts 2 to 4 are reached, or nearly; and what is false with less."""
    one, lattice = torch.ones(1, dtype=F64), Lattice(1, h, reach=9.0)

    def spot(place):
        return torch.full((1, 1), place, dtype=F64)

    R = 0.8
    speed = float(nl.fields.SmoothedKL(h)(spot(-R), spot(R)))
    sharp(speed, 2 * R / h**2, 0.999)
    damaged("half the speed limit", speed <= R / h**2)
    damaged("units of length", speed <= 2 * R / h)
    jeffreys = lattice.divergence(spot(-R), one, spot(R), one) + lattice.divergence(spot(R), one, spot(-R), one)
    sharp(jeffreys, speed * 2 * R, 0.999)
    damaged("one divergence for both", lattice.divergence(spot(-R), one, spot(R), one) > 0.9 * speed * 2 * R)
    R, t = 0.3 * h, 0.4
    moved = lattice.divergence(spot(t), one, spot(0.0), one)  # p = q: the velocity is zero
    sharp(moved, (1 / h**2 + R**2 / h**4) * t**2 / 2, 0.9)
    damaged("half the constant", moved <= (1 / h**2 + R**2 / h**4) * t**2 / 4)
    # A light particle amid two heavy ones, above one datum: the second term is needed.
    R, t, light = 3 * h, 0.02, 1e-6
    masses = torch.tensor([(1 - light) / 2, light, (1 - light) / 2], dtype=F64)
    F = [lattice.divergence(torch.tensor([[-R], [s], [R]], dtype=F64), masses, spot(0.0), one) for s in (0.0, t)]
    rest = float(F[1] - F[0]) / (light * t**2 / 2)
    assert 2 / h**2 < rest <= 1 / h**2 + R**2 / h**4
    damaged("without the second term", rest <= 1 / h**2)


@pytest.mark.parametrize(
    ("claim", "setting"),
    [(check_constants, ())]
    + [(check_velocity, setting) for setting in ((1, 0.6, 0), (1, 1.2, 1), (2, 1.0, 2))]
    + [(check_tangent, (seed,)) for seed in (0, 1)]
    + [(check_displacement, (seed,)) for seed in (0, 1)]
    + [(check_gaussians, (1,)), (check_gaussians, (2,))],
)
def test_thm_smoothed_kl_flow(claim, setting):
    """Checked by: quadrature, primal value, closed form."""
    claim(*setting)


# thm-smoothed-flow-any-kernel ------------------------------------------------------------


class Panels:
    """Integrals over the line by Gauss and Legendre, on panels that end where a kernel may have a kink."""

    def __init__(self, *atoms, reach=20.0, longest=0.5):
        ends = torch.cat([*atoms, torch.tensor([-reach, reach], dtype=F64)]).detach().unique()
        cuts = [
            torch.linspace(s, t, int((t - s) / longest) + 2, dtype=F64) for s, t in zip(ends, ends[1:], strict=False)
        ]
        cuts = torch.cat([*[c[:-1] for c in cuts], ends[-1:]])
        nodes, weights = map(torch.from_numpy, np.polynomial.legendre.leggauss(12))
        half = (cuts[1:] - cuts[:-1]) / 2
        self.u = ((cuts[1:] + cuts[:-1])[:, None] / 2 + half[:, None] * nodes).flatten()
        self.w = (half[:, None] * weights).flatten()

    def blur(self, gamma, x, a):
        return gamma(self.u[:, None] - x) @ a

    def divergence(self, gamma, x, a, y, b):
        s, r = self.blur(gamma, x, a), self.blur(gamma, y, b)
        return float((s * (s / r).log()) @ self.w)


def laplace(z, h=0.4):
    return torch.exp(-z.abs() / h) / (2 * h)


def matern(z, h=0.4):
    return (1 + z.abs() / h) * torch.exp(-z.abs() / h) / (4 * h)


def bell(z, h=0.4):
    return torch.exp(-(z**2) / (2 * h * h)) / (2 * math.pi * h * h) ** 0.5


def skew(z, up=0.3, down=0.8):
    return torch.where(z > 0, torch.exp(-z / up), torch.exp(z / down)) / (up + down)


def divergence(gamma, x, a, y, b):
    return Panels(x, y).divergence(gamma, x, a, y, b)


def slopes(gamma, x, a, y, b, step=1e-4):
    """-(1/a) dF/dx by central differences of the value."""
    out = []
    for i in range(len(x)):
        move = step * torch.eye(len(x), dtype=F64)[i]
        out.append(divergence(gamma, x - move, a, y, b) - divergence(gamma, x + move, a, y, b))
    return torch.tensor(out, dtype=F64) / (2 * step * a)


def check_any_tangent(gamma, seed):
    """F = tangent plane + divergence, psi by quadrature of its definition; false for noise that is not symmetric."""
    generator = torch.Generator().manual_seed(seed)
    (x, a), (y, b), (s, c) = (cloud(generator, n, 1) for n in (5, 7, 4))
    x, y, s = (t[:, 0] for t in (x, y, 3 * s))
    line = Panels(x, y, s, reach=10.0 if gamma is bell else 20.0)  # further out a bell underflows
    ratio = (line.blur(gamma, x, a) / line.blur(gamma, y, b)).log()
    plane = line.divergence(gamma, x, a, y, b)
    for points, masses, sign in ((s, c, 1), (x, a, -1)):
        plane = plane + sign * (masses @ (gamma(points[:, None] - line.u) @ (ratio * line.w)))
    exact = line.divergence(gamma, s, c, y, b)
    defect = abs(plane + line.divergence(gamma, s, c, x, a) - exact)
    if gamma is not skew:
        assert defect < 1e-11 * exact
        damaged("without the last divergence", abs(plane - exact) < 0.01 * exact)
    else:
        damaged("noise that is not symmetric", defect < 0.01 * exact)


def check_any_velocity(seed, h=0.4):
    """The library's score difference for a kernel with an exponential tail, smoothed once more, is the slope of F."""
    generator = torch.Generator().manual_seed(seed)
    (x, a), (y, b) = cloud(generator, 5, 1), cloud(generator, 7, 1)
    line = Panels(x[:, 0], y[:, 0])
    field = nl.fields.ScoreDifference(h, "laplace")
    raw = field(x, y, at=line.u[:, None], a=a, b=b)[:, 0] / h**2
    V = matern(line.u - x) @ (raw * line.w)
    slope = slopes(matern, x[:, 0], a, y[:, 0], b)
    assert (V - slope).abs().max() < 1e-6 * slope.abs().max()
    assert V.abs().max() <= 2 / h
    bare = field(x, y, a=a, b=b)[:, 0] / h**2
    damaged("one smoothing only", (bare - slope).norm() < 0.1 * slope.norm())
    # Laplace noise, its scores written out.
    scores = []
    for points, masses in ((y, b), (x, a)):
        away = points[:, 0] - line.u[:, None]
        share = masses * laplace(away)
        scores.append((share / share.sum(1, keepdim=True) * away.sign()).sum(1) / h)
    V = laplace(line.u - x) @ ((scores[0] - scores[1]) * line.w)
    assert (V - slopes(laplace, x[:, 0], a, y[:, 0], b)).abs().max() < 1e-5
    # Displacements of all sizes, each particle split in two.
    x2, a2 = x[:, 0].repeat(2), a.repeat(2) / 2
    phi = torch.randn(10, generator=generator, dtype=F64)
    F, drop = divergence(laplace, x[:, 0], a, y[:, 0], b), a2 @ (V.repeat(2) * phi)
    for t in (2.0, 0.3, 0.05):
        rest = abs(divergence(laplace, x2 + t * phi, a2, y[:, 0], b) - F + t * drop)
        assert rest <= 1.5 / h**2 * t**2 * (a2 @ phi**2)
    # At rest in the ball: only the data.
    assert field(x, x.clone(), at=line.u[:, None], a=a, b=a).abs().max() < 1e-12


def check_any_constants(h=0.4):
    one = torch.ones(1, dtype=F64)
    zero, far = torch.zeros(1, dtype=F64), torch.full((1,), 9 * h, dtype=F64)
    middle = torch.tensor([-h / 100, h / 100], dtype=F64) + 4.5 * h
    line = Panels(zero, far, middle)
    ratio = (line.blur(laplace, zero, one) / line.blur(laplace, far, one)).log()
    psi = laplace(middle[:, None] - line.u) @ (ratio * line.w)
    speed = float(psi[0] - psi[1]) / (h / 50)
    sharp(speed, 2 / h, 0.95)
    damaged("speed at most L", speed <= 1 / h)
    # Two displaced noises: one half L^2 |v|^2 is reached as v tends to zero.
    moved = divergence(laplace, torch.full((1,), 0.02 * h, dtype=F64), one, zero, one)
    sharp(moved, 0.02**2 / 2, 0.98)
    # A light particle that leaves the datum, midway between two heavy ones.
    light, t = 1e-3, 0.1 * h
    masses = torch.tensor([(1 - light) / 2, light, (1 - light) / 2], dtype=F64)
    F = [divergence(laplace, torch.tensor([-4 * h, s, 4 * h], dtype=F64), masses, zero, one) for s in (0.0, t)]
    sharp(F[1] - F[0], 1.5 / h**2 * light * t**2, 0.45)
    damaged("the Gaussian's constant, 1/2", F[1] - F[0] <= 0.5 / h**2 * light * t**2)
    pair, even = torch.tensor([-1.0, 1.0], dtype=F64), torch.full((2,), 0.5, dtype=F64)
    stalls = slopes(laplace, zero, one, pair, even).abs().max() < 1e-9
    damaged("at rest on the support only", not stalls or divergence(laplace, zero, one, pair, even) < 0.1)


@pytest.mark.parametrize(
    ("claim", "setting"),
    [(check_any_tangent, (gamma, seed)) for gamma, seed in ((laplace, 0), (matern, 1), (bell, 2), (skew, 3))]
    + [(check_any_velocity, (seed,)) for seed in (0, 1)]
    + [(check_any_constants, ())],
)
def test_thm_smoothed_flow_any_kernel(claim, setting):
    """Checked by: quadrature, finite differences."""
    claim(*setting)
