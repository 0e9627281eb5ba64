"""The solver against oracles that share no code with it.

Everywhere the cost is ``|x - y|^2 / 2`` and the temperature eps as in the library; where another library uses the
cost ``|x - y|^2`` it is given ``2 eps`` and its values, potentials and gradients are halved. Float64 unless said
otherwise. `reached` prints the error beside its bound: ``pytest tests/test_sinkhorn.py -rP`` shows the table.
"""

import itertools
import math
import warnings

import geomloss
import numpy as np
import ot
import pytest
import torch
from conftest import ROOT, require

import nsgf_lite as nl
from nsgf_lite.closed_forms import gaussian_divergence, gaussian_map, gaussian_ot
from nsgf_lite.transport.problem import Extension, Potentials

F64 = torch.float64
DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
    ),
]
pytestmark = pytest.mark.filterwarnings("error::nsgf_lite.ConvergenceWarning")


def reached(what, error, bound):
    error = float(error.detach() if isinstance(error, torch.Tensor) else error)
    print(f"{what}: error {error:.1e}, bound {bound:.0e}")
    assert error <= bound


def clouds(seed, n=9, m=13, d=2, batch=()):
    """Two clouds of different sizes with unequal weights."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(*batch, n, d, generator=g, dtype=F64)
    y = 0.7 * torch.randn(*batch, m, d, generator=g, dtype=F64) + 0.5
    a, b = (0.2 + torch.rand(*batch, k, generator=g, dtype=F64) for k in (n, m))
    return x, y, a / a.sum(-1, keepdim=True), b / b.sum(-1, keepdim=True)


def dense_cost(x, y):
    return (x[..., :, None, :] - y[..., None, :, :]).square().sum(-1) / 2


def textbook(x, y, eps, a, b, steps=4000):
    """Alternating Sinkhorn steps in the log domain, as in a textbook."""
    c, f, g = dense_cost(x, y), torch.zeros_like(a), torch.zeros_like(b)
    for _ in range(steps):
        f = -eps * torch.logsumexp((g - c) / eps + b.log(), -1)
        g = -eps * torch.logsumexp((f[:, None] - c) / eps + a.log()[:, None], 0)
    return f, g


def textbook_divergence(x, y, eps, a, b):
    def cost(x, y, a, b):
        f, g = textbook(x, y, eps, a, b)
        return a @ f + b @ g

    return cost(x, y, a, b) - (cost(x, x, a, a) + cost(y, y, b, b)) / 2


def centred(f, a):
    """A potential without its free constant."""
    return f - (a * f).sum(-1, keepdim=True)


# Gaussians, in closed form (Janati et al. 2020, cost with the one half) ---------------------------------------------


def hermite(k):
    z, w = np.polynomial.hermite_e.hermegauss(k)
    return torch.tensor(z), torch.tensor(w / w.sum())


def trapezium(k, end):
    z = torch.linspace(-end, end, k, dtype=F64)
    w = torch.exp(-z * z / 2)
    return z, w / w.sum()


def quadrature(mean, variances, axes, rules):
    """Weighted nodes of N(mean, axes diag(variances) axes^T): a product of one-dimensional rules along its axes."""
    z = torch.cartesian_prod(*(rule[0] for rule in rules)).reshape(-1, len(rules))
    w = torch.cartesian_prod(*(rule[1] for rule in rules)).reshape(-1, len(rules)).prod(1)
    keep = w > 1e-16
    return mean + (z[keep] * variances.sqrt()) @ axes.T, w[keep] / w[keep].sum()


GAUSSIANS = [
    # variances of each, the rules, eps, then bounds for OT, S, T on points of the law
    ([1.0], [0.25], [trapezium(401, 9.0)], [trapezium(351, 9.0)], 0.5, 1e-13, 1e-13, 1e-12),
    ([1.0], [0.25], [trapezium(401, 9.0)], [trapezium(351, 9.0)], 0.05, 1e-13, 1e-13, 1e-12),
    ([1.2, 0.3], [0.9, 0.2], [trapezium(36, 6.5)] * 2, [trapezium(32, 6.5)] * 2, 0.5, 2e-9, 1e-9, 1e-8),
    (
        [0.3, 0.15, 0.06, 0.03, 0.01],
        [0.25, 0.2, 0.1, 0.03, 0.02],
        [hermite(k) for k in (7, 6, 4, 4, 3)],
        [hermite(k) for k in (6, 6, 5, 4, 3)],
        1.0,
        1e-12,
        2e-10,
        2e-7,
    ),
]


@pytest.mark.parametrize(("vx", "vy", "rx", "ry", "eps", "ot_bound", "s_bound", "t_bound"), GAUSSIANS)
def test_gaussians_in_closed_form(vx, vy, rx, ry, eps, ot_bound, s_bound, t_bound):
    """OT_eps, S_eps and T between Gaussians, in one, two and five dimensions, covariances that do not commute."""
    d, g = len(vx), torch.Generator().manual_seed(5)
    vx, vy = torch.tensor(vx, dtype=F64), torch.tensor(vy, dtype=F64)
    U, V = (torch.linalg.qr(torch.randn(d, d, generator=g, dtype=F64))[0] for _ in range(2))
    A, B = (U * vx) @ U.T, (V * vy) @ V.T
    A, B = (A + A.T) / 2, (B + B.T) / 2
    assert d == 1 or (A @ B - B @ A).abs().max() > 1e-2
    mean_x, mean_y = torch.zeros(d, dtype=F64), torch.linspace(0.4, 1.0, d, dtype=F64)
    (x, a), (y, b) = quadrature(mean_x, vx, U, rx), quadrature(mean_y, vy, V, ry)
    assert len(x) != len(y)
    name = f"d={d} eps={eps:g} n={len(x)} m={len(y)}"
    exact = gaussian_ot(mean_x, A, mean_y, B, eps)
    reached(f"Gaussians {name} OT", (nl.entropic_cost(x, y, eps, a, b, tol=1e-12) - exact).abs(), ot_bound)
    exact = gaussian_divergence(mean_x, A, mean_y, B, eps)
    S = nl.sinkhorn_divergence(x, y, eps, a, b, tol=1e-12)
    reached(f"Gaussians {name} S", (S - exact).abs(), s_bound)
    points = mean_x + (torch.randn(40, d, generator=g, dtype=F64) * vx.sqrt()) @ U.T
    T = nl.barycentric_map(x, y, eps, a, b, tol=1e-12)
    affine = mean_y + (points - mean_x) @ gaussian_map(A, B, eps).T
    reached(f"Gaussians {name} T", (T(points) - affine).abs().max(), t_bound)


def test_known_value():
    """S_eps from N(0, 1) to N(1, .25) at eps = .5, the number recorded when the solver was designed."""
    one = torch.ones(1, dtype=F64)
    x, a = quadrature(0 * one, one, one[None], [trapezium(401, 9.0)])
    y, b = quadrature(one, one / 4, one[None], [trapezium(401, 9.0)])
    reached(
        "N(0,1) to N(1,.25)", (nl.sinkhorn_divergence(x, y, 0.5, a, b, tol=1e-12) - 0.6123458543179471).abs(), 1e-13
    )


# Independent implementations ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("eps", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("d", [1, 2, 9, 50])
def test_textbook(d, eps):
    """Potentials, cost and plan against textbook iterations, on both sides of the switch to inner products (d > 8)."""
    x, y, a, b = clouds(d, d=d)
    x, y = x / math.sqrt(d), y / math.sqrt(d)
    f, g = textbook(x, y, eps, a, b)
    pot = nl.potentials(x, y, eps, a, b, tol=1e-13)
    tilt = (a @ f - b @ g) / 2
    reached(f"d={d} eps={eps:g} f", (pot.f - f + tilt).abs().max(), 1e-10)
    reached(f"d={d} eps={eps:g} g", (pot.g - g - tilt).abs().max(), 1e-10)
    assert abs(float(a @ pot.f - b @ pot.g)) < 1e-12, "the weighted means of f and g agree"
    reached(f"d={d} eps={eps:g} OT", (nl.entropic_cost(x, y, eps, a, b, tol=1e-13) - a @ f - b @ g).abs(), 1e-11)
    P = a[:, None] * b * torch.exp((f[:, None] + g - dense_cost(x, y)) / eps)
    reached(f"d={d} eps={eps:g} plan", (nl.plan(x, y, eps, a, b, tol=1e-13) - P).abs().max(), 1e-12)


@pytest.mark.parametrize("eps", [0.05, 0.5, 5.0])
def test_pot_plans(eps):
    """POT has the cost |x - y|^2, so its regularisation is 2 eps."""
    x, y, a, b = clouds(1, n=30, m=45)
    theirs = ot.bregman.sinkhorn_log(
        a.numpy(), b.numpy(), (2 * dense_cost(x, y)).numpy(), 2 * eps, numItermax=100_000, stopThr=1e-13
    )
    error = np.abs(nl.plan(x, y, eps, a, b, tol=1e-13).numpy() - theirs).max()
    reached(f"POT plan eps={eps:g}, entries of size {theirs.max():.1e}", error, 1e-12)


@pytest.fixture(scope="module")
def ott_answers():
    """OTT-JAX compiled once: f, g, whether they converged, the divergence and its gradients, for the cost |x - y|^2."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_PLATFORMS", "cpu")
        try:
            import jax
            from ott.geometry.pointcloud import PointCloud
            from ott.solvers.linear import solve
            from ott.tools.sinkhorn_divergence import sinkhorn_divergence
        except ImportError:
            require(False, "ott-jax, the extra [ott]")
        options = {"threshold": 1e-12, "max_iterations": 100_000}

        @jax.jit
        def answers(x, y, a, b, eps):
            def divergence(x, y):
                return sinkhorn_divergence(PointCloud, x, y, a=a, b=b, epsilon=eps, solve_kwargs=options)[0]

            out = solve(PointCloud(x, y, epsilon=eps), a=a, b=b, **options)
            return out.f, out.g, out.converged, *jax.value_and_grad(divergence, (0, 1))(x, y)

        with jax.enable_x64(True):
            yield lambda *inputs: jax.device_get(answers(*inputs))


@pytest.mark.parametrize("eps", [0.1, 1.0])
def test_ott(ott_answers, eps):
    """OTT-JAX: cost |x - y|^2, plan exp((f + g - c) / eps) without the weights: 2 eps, half of f, less eps log a."""
    x, y, a, b = clouds(2, n=20, m=31)
    f, g, converged, value, (gx, gy) = ott_answers(*(t.numpy() for t in (x, y, a, b)), 2 * eps)
    assert converged
    ours = nl.potentials(x, y, eps, a, b, tol=1e-13)
    for name, mine, theirs, w in (("f", ours.f, f, a), ("g", ours.g, g, b)):
        theirs = torch.tensor(theirs) / 2 - eps * w.log()
        reached(f"OTT {name} eps={eps:g}", (centred(mine, w) - centred(theirs, w)).abs().max(), 1e-9)
    x.requires_grad_(), y.requires_grad_()
    S = nl.sinkhorn_divergence(x, y, eps, a, b, tol=1e-13)
    S.backward()
    reached(f"OTT divergence eps={eps:g}", abs(S.item() - value / 2), 1e-9)
    reached(f"OTT gradient in x eps={eps:g}", np.abs(x.grad.numpy() - gx / 2).max(), 1e-11)
    reached(f"OTT gradient in y eps={eps:g}", np.abs(y.grad.numpy() - gy / 2).max(), 1e-11)


@pytest.mark.parametrize("debias", [True, False])
def test_geomloss(debias):
    """GeomLoss: SamplesLoss(p=2) has our cost, eps = blur^2, and no tolerance; it converges as scaling nears one."""
    x, y, a, b = clouds(3, n=20, m=25)
    eps, ours = 0.3, nl.sinkhorn_divergence if debias else nl.entropic_cost
    x.requires_grad_(), y.requires_grad_()
    value = ours(x, y, eps, a, b, tol=1e-13)
    gradient = torch.cat(torch.autograd.grad(value, (x, y)))
    value, errors, gradients = value.item(), [], []
    for scaling in (0.9, 0.99, 0.999):
        loss = geomloss.SamplesLoss(
            "sinkhorn", p=2, blur=math.sqrt(eps), scaling=scaling, debias=debias, backend="tensorized"
        )
        theirs = loss(a, x, b, y)
        gradients.append(torch.cat(torch.autograd.grad(theirs, (x, y))))
        errors.append((abs(theirs.item() - value), float((gradients[-1] - gradient).norm() / gradient.norm())))
        print(f"GeomLoss scaling {scaling}: value {errors[-1][0]:.1e}, gradient {errors[-1][1]:.1e} (relative)")
    reached(f"GeomLoss at .999, debias={debias}, value", errors[-1][0], 1e-6)
    reached(f"GeomLoss at .999, debias={debias}, gradient", errors[-1][1], 1e-3)
    # First order in 1 - scaling, towards our answer: extrapolated, the last two are much nearer to it than either.
    limit = gradients[-1] + (gradients[-1] - gradients[-2]) / 9
    error = (limit - gradient).norm() / gradient.norm()
    reached(f"GeomLoss extrapolated to scaling 1, debias={debias}, gradient", error, 3e-4)


# Derivatives --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [nl.sinkhorn_divergence, nl.entropic_cost])
@pytest.mark.parametrize("d", [2, 9])
def test_finite_differences(function, d):
    """The envelope theorem's gradients in x, y, a and b, in one random direction each, by a fourth-order difference."""
    x, y, a, b = clouds(4, d=d)
    g = torch.Generator().manual_seed(0)
    tensors = [t.requires_grad_() for t in (x, y, a, b)]
    gradients = torch.autograd.grad(function(x, y, 0.4, a, b, tol=1e-13), tensors)
    for k, name in enumerate("xyab"):
        way = torch.randn(tensors[k].shape, generator=g, dtype=F64) / math.sqrt(d)
        if name in "ab":  # weights keep their sum
            way = 0.05 * (way - way.mean())

        def along(t, k=k, way=way):
            moved = [s.detach() + (t * way if i == k else 0) for i, s in enumerate(tensors)]
            return function(moved[0], moved[1], 0.4, *moved[2:], tol=1e-13).item()

        h = 2e-3
        slope = (8 * (along(h) - along(-h)) - along(2 * h) + along(-2 * h)) / (12 * h)
        assert abs(slope) > 1e-3
        reached(f"{function.__name__} d={d} in {name}", abs((gradients[k] * way).sum().item() - slope), 1e-8)


def test_gradcheck():
    """Every entry of the Jacobians, batched, weights through a softmax; y is x included."""
    x, y, a, b = clouds(5, n=4, m=5, batch=(2,))
    inputs = [t.requires_grad_() for t in (x, y, a.log(), b.log())]

    def divergence(x, y, u, v):
        return nl.sinkhorn_divergence(x, y, 0.5, u.softmax(-1), v.softmax(-1), tol=1e-13)

    def own(x, u):
        a = u.softmax(-1)
        return nl.entropic_cost(x, x, 0.5, a, a, tol=1e-13)

    assert torch.autograd.gradcheck(divergence, inputs, eps=1e-5, atol=1e-8, rtol=1e-6)
    assert torch.autograd.gradcheck(own, inputs[::2], eps=1e-5, atol=1e-8, rtol=1e-6)


def test_gradient_flows_only_where_it_is_asked():
    x, y, a, b = clouds(6)
    assert not nl.sinkhorn_divergence(x, y, 0.5, a, b).requires_grad
    y.requires_grad_()
    (g,) = torch.autograd.grad(nl.sinkhorn_divergence(x, y, 0.5, a, b), (y,))
    assert g.shape == y.shape and g.norm() > 0.1
    assert not nl.potentials(x, y, 0.5, a, b).f.requires_grad
    assert not nl.plan(x, y, 0.5, a, b).requires_grad


@pytest.mark.parametrize("function", [nl.sinkhorn_divergence, nl.entropic_cost])
def test_second_derivative_raises(function):
    x, y, _, _ = clouds(7)
    x.requires_grad_()
    (g,) = torch.autograd.grad(function(x, y, 0.5), x, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        (g.square().sum() + x.sum()).backward()


def test_velocity_is_minus_n_times_the_gradient():
    """T_xy - T_xx is minus the gradient of S_eps in a particle, divided by the particle's weight."""
    x, y, a, b = clouds(8)
    x.requires_grad_()
    (g,) = torch.autograd.grad(nl.sinkhorn_divergence(x, y, 0.3, a, b, tol=1e-13), x)
    v = nl.fields.Sinkhorn(0.3, tol=1e-13)(x.detach(), y, a=a, b=b)
    reached("velocity and gradient", (v + g / a[:, None]).abs().max(), 1e-10)


@pytest.mark.parametrize("d", [2, 9])
def test_map_is_the_gradient_of_the_potential(d):
    """grad f = x - T(x) and grad T = Cov(y given x) / eps, at points that are no particles; T() is T(x)."""
    x, y, a, b = clouds(9, d=d)
    eps = 0.6
    T = nl.barycentric_map(x, y, eps, a, b, tol=1e-13)
    reached(f"d={d} potential at x", (T.potential(x) - T.solution.f).abs().max(), 1e-11)
    reached(f"d={d} T() and T(x)", (T() - T(x)).abs().max(), 1e-11)
    P = nl.plan(x, y, eps, a, b, tol=1e-13)
    reached(f"d={d} T() and the plan", (T() - P @ y / P.sum(1, keepdim=True)).abs().max(), 1e-11)
    points = clouds(10, d=d)[0].requires_grad_()
    (slope,) = torch.autograd.grad(T.potential(points).sum(), points)
    reached(f"d={d} gradient of f", (slope - (points - T(points))).abs().max(), 1e-11)
    jacobian = torch.autograd.functional.jacobian(lambda z: T(z[None])[0], points[0].detach())
    w = torch.softmax((T.solution.g - dense_cost(points[:1].detach(), y)[0]) / eps + b.log(), 0)
    mean = w @ y
    covariance = (w[:, None] * (y - mean)).T @ (y - mean)
    reached(f"d={d} gradient of T", (jacobian - covariance / eps).abs().max(), 1e-11)


# Consistency --------------------------------------------------------------------------------------------------------


def test_marginals_and_stated_error():
    x, y, a, b = clouds(11, n=40, m=60)
    for tol in (1e-2, 1e-4, 1e-8, 1e-12):
        pot = nl.potentials(x, y, 0.2, a, b, tol=tol)
        f, g = pot
        P = a[:, None] * b * torch.exp((f[:, None] + g - dense_cost(x, y)) / 0.2)
        error = max(float((P.sum(1) - a).abs().sum()), float((P.sum(0) - b).abs().sum()))
        assert pot.converged and pot.marginal_error <= tol
        reached(f"marginals at tol {tol:g}", error, 1.001 * tol + 1e-14)
        P = nl.plan(x, y, 0.2, a, b, tol=tol)
        assert float((P.sum(1) - a).abs().sum()) < 1e-14 and abs(float(P.sum()) - 1) < 1e-14
        assert float((P.sum(0) - b).abs().sum()) <= 1.001 * tol + 1e-14


@pytest.mark.parametrize("d", [2, 9])
def test_batch_equals_loop(d):
    x, y, a, b = clouds(12, d=d, batch=(3,))
    y = y * torch.tensor([1.0, 3.0, 0.2], dtype=F64)[:, None, None]
    points = torch.randn(3, 5, d, generator=torch.Generator().manual_seed(0), dtype=F64)
    x.requires_grad_()

    def everything(x, y, a, b, points):
        S = nl.sinkhorn_divergence(x, y, 0.5, a, b, tol=1e-13)
        (g,) = torch.autograd.grad(S.sum(), x)
        pot = nl.potentials(x, y, 0.5, a, b, tol=1e-13)
        own = nl.potentials(x, x, 0.5, a, a, tol=1e-13)
        T = nl.barycentric_map(x, y, 0.5, a, b, tol=1e-13)
        v = nl.fields.Sinkhorn(0.5, tol=1e-13)
        answers = [S, g, pot.f, pot.g, own.f, nl.plan(x, y, 0.5, a, b, tol=1e-13), T(points), T.potential(points)]
        return [*answers, v(x, y, a=a, b=b), v(x, y, points, a, b)]

    together = everything(x, y, a, b, points)
    alone = [everything(x[k], y[k], a[k], b[k], points[k]) for k in range(3)]
    for t, one in zip(together, zip(*alone, strict=True), strict=True):
        assert t.shape == torch.stack(one).shape
        reached(f"d={d} batch", (t - torch.stack(one)).abs().max(), 1e-10)
    shared = a[0] * 0 + 1 / a.shape[1]  # one weight vector for the whole batch
    S = nl.sinkhorn_divergence(x, y, 0.5, shared, None, tol=1e-13)
    reached("shared weights", (S - nl.sinkhorn_divergence(x, y, 0.5, tol=1e-13)).abs().max(), 1e-12)


@pytest.mark.parametrize("eps", [0.01, 0.3, 30.0])
def test_self_problem(eps):
    """`y is x` solves the symmetric problem; a clone goes through the alternating iteration to the same answer."""
    x, _, a, _ = clouds(13, n=30)
    own, other = (nl.potentials(x, z, eps, a, w, tol=1e-13) for z, w in ((x, a), (x.clone(), a.clone())))
    assert torch.equal(own.f, own.g)
    # Their mean: far-off points exchange so little mass that f - g is hardly determined there.
    reached(f"eps={eps:g} f", (own.f - (other.f + other.g) / 2).abs().max(), 1e-10)
    costs = [nl.entropic_cost(x, z, eps, a, w, tol=1e-13) for z, w in ((x, a), (x.clone(), a.clone()))]
    reached(f"eps={eps:g} OT", (costs[0] - costs[1]).abs(), 1e-12)
    assert own.iterations <= 48, "the averaged iteration halves the error at least, at every temperature"
    # the same cloud with two weightings is not the self problem
    b = a.flip(0)
    f, g = textbook(x, x, max(eps, 0.3), a, b)
    S = nl.entropic_cost(x, x, max(eps, 0.3), a, b, tol=1e-13)
    reached(f"eps={eps:g} two weightings", (S - a @ f - b @ g).abs(), 1e-10)
    assert nl.sinkhorn_divergence(x, x, eps, a, a) == 0


def test_self_gradient_counts_both_arguments():
    x, _, a, _ = clouds(14)
    x.requires_grad_()
    (whole,) = torch.autograd.grad(nl.entropic_cost(x, x, 0.4, a, a, tol=1e-13), x)
    (half,) = torch.autograd.grad(nl.entropic_cost(x, x.detach().clone(), 0.4, a, a, tol=1e-13), x)
    reached("self gradient", (whole - 2 * half).abs().max(), 1e-12)
    assert half.norm() > 1e-2
    (none,) = torch.autograd.grad(nl.sinkhorn_divergence(x, x.detach().clone(), 0.4, a, a, tol=1e-13), x)
    reached("gradient at the minimum", none.norm(), 1e-12)


def test_permutation_symmetry_and_swap():
    x, y, a, b = clouds(15)
    i, j = torch.randperm(9, generator=torch.Generator().manual_seed(1)), torch.arange(12, -1, -1)
    P, Q = nl.plan(x, y, 0.3, a, b, tol=1e-13), nl.plan(x[i], y[j], 0.3, a[i], b[j], tol=1e-13)
    reached("permutation", (P[i][:, j] - Q).abs().max(), 1e-13)
    reached("swap", (P.T - nl.plan(y, x, 0.3, b, a, tol=1e-13)).abs().max(), 1e-12)
    S = [nl.sinkhorn_divergence(*args, tol=1e-13) for args in ((x, y, 0.3, a, b), (y, x, 0.3, b, a))]
    reached("swap S", (S[0] - S[1]).abs(), 1e-13)


def test_scaling():
    """Lengths times s and eps times s^2: costs times s^2, plans unchanged."""
    x, y, a, b = clouds(16)
    for s in (1e-4, 1e4):
        S = nl.sinkhorn_divergence(s * x, s * y, 0.3 * s * s, a, b, tol=1e-12) / s**2
        reached(f"scale {s:g}", (S - nl.sinkhorn_divergence(x, y, 0.3, a, b, tol=1e-12)).abs(), 1e-11)


def test_translation():
    """A common shift changes nothing; float32 at an offset of 1000 loses what its input has lost, and no more."""
    x, y, a, b = clouds(17, n=50, m=60)
    shift = torch.tensor([1000.0, -1000.0], dtype=F64)
    S, moved = (nl.sinkhorn_divergence(x + s, y + s, 0.3, a, b, tol=1e-12) for s in (0 * shift, shift))
    reached("float64 S", (S - moved).abs(), 1e-11)
    # 32-bit numbers near 1000 are 6e-5 apart: compare with the exact answer for the rounded input
    x32, y32, a32, b32 = ((t + s).float() for t, s in ((x, shift), (y, shift), (a, 0), (b, 0)))
    exact = nl.fields.Sinkhorn(0.3, tol=1e-12)(x32.double(), y32.double(), a=a32.double() / a32.double().sum(), b=b)
    v = nl.fields.Sinkhorn(0.3, tol=1e-5)(x32, y32, a=a32, b=b32)
    reached("float32 velocity at offset 1000", (v - exact).norm() / exact.norm(), 1e-3)
    value = nl.sinkhorn_divergence(x32, y32, 0.3, a32, b32, tol=1e-5)
    reached("float32 S at offset 1000", (value - S).abs(), 1e-4)


# Speed of convergence, and its limits -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def problem():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT))
        from benchmarks.problems import problem

        yield problem


@pytest.mark.parametrize("name", "ABCD")
def test_velocity_on_the_benchmark_problems(problem, name):
    """Relative velocity error of float32 at tol 3e-4 and of float64 at tol 1e-7, against float64 at tol 1e-12."""
    x, y, eps = problem(name, 0)
    exact = nl.fields.Sinkhorn(eps, tol=1e-12)(x, y)
    v = nl.fields.Sinkhorn(eps, tol=3e-4)(x.float(), y.float())
    assert v.dtype == torch.float32
    reached(f"{name} float32", (v - exact).norm() / exact.norm(), 1e-3)
    reached(f"{name} float64", (nl.fields.Sinkhorn(eps, tol=1e-7)(x, y) - exact).norm() / exact.norm(), 1e-6)


def test_reference_is_right_on_a_benchmark_problem(problem):
    """The reference of the test above against POT, which iterates in the log domain."""
    x, y, eps = problem("D", 0)
    n = len(x)
    w = np.full(n, 1 / n)
    cost = 2 * dense_cost(x, y).numpy()
    P = ot.bregman.sinkhorn_log(w, w, cost, 2 * eps, numItermax=100_000, stopThr=1e-9)
    Q = ot.bregman.sinkhorn_log(w, w, 2 * dense_cost(x, x).numpy(), 2 * eps, numItermax=100_000, stopThr=1e-9)
    v = n * (torch.tensor(P) @ y - torch.tensor(Q) @ x)
    error = (nl.fields.Sinkhorn(eps, tol=1e-12)(x, y) - v).norm() / v.norm()
    reached("D against POT", error, 1e-6)


@pytest.mark.parametrize("eps", [0.0025, 5e-4])
def test_small_temperatures(problem, eps):
    """Where Sinkhorn's iteration would need millions of steps, Newton's method reaches 1e-6."""
    x, y, _ = problem("A", 0)
    pot = nl.potentials(x, y, eps, tol=1e-6)
    assert pot.converged
    P = torch.exp((pot.f[:, None] + pot.g - dense_cost(x, y)) / eps) / (len(x) * len(y))
    error = max((P.sum(k) * len(x) - 1).abs().mean().item() for k in (0, 1))
    reached(f"A at eps={eps:g}, {pot.iterations} steps, marginals", error, 1.1e-6)
    # exact transport from below and above: OT_0 <= OT_eps <= OT_0 + eps log n
    n = len(x)
    exact = ot.emd2(np.full(n, 1 / n), np.full(n, 1 / n), dense_cost(x, y).numpy())
    gap = float((pot.f.mean() + pot.g.mean()) - exact)
    print(f"A at eps={eps:g}: OT_eps - OT_0 = {gap:.2e}, eps log n = {eps * math.log(n):.2e}")
    assert 0 < gap <= eps * math.log(n) + 1e-5


def test_hopeless_temperature(problem):
    """Out of reach: the warning and the result name the error that was reached."""
    x, y, _ = problem("A", 0)
    with pytest.warns(nl.ConvergenceWarning, match=r"marginal error [\d.e-]+, not 1e-06.*eps = 1e-05 is") as caught:
        pot = nl.potentials(x, y, 1e-5, tol=1e-6, max_iter=700)
    assert not pot.converged and 1e-6 < pot.marginal_error <= 2
    assert f"marginal error {pot.marginal_error:.2g}," in str(caught[0].message)
    assert f"after {pot.iterations} steps" in str(caught[0].message) and pot.iterations <= 710
    assert caught[0].filename == __file__, "the warning points at the caller's line"
    assert torch.isfinite(pot.f).all() and torch.isfinite(pot.g).all()


@pytest.mark.parametrize("call", ["plan", "entropic_cost", "sinkhorn_divergence", "barycentric_map", "field"])
def test_nobody_is_silent(call, monkeypatch):
    """Every function that solves warns when the solve has stopped early, at the caller's line."""
    x, y, _, _ = clouds(18)
    solve, original = getattr(nl, call, None), nl.barycentric_map
    if call == "field":
        monkeypatch.setattr(nl.fields.transport, "barycentric_map", lambda *a, **k: original(*a, **k, max_iter=2))
        solve = lambda x, y, eps, tol, max_iter: nl.fields.Sinkhorn(eps, tol)(x, y)  # noqa: E731
    with pytest.warns(nl.ConvergenceWarning, match=r"stopped after \d steps at marginal error \d") as caught:
        solve(x, y, 0.3, tol=1e-10, max_iter=2)
    assert all(w.filename == __file__ for w in caught)


def test_tolerance_below_rounding_is_raised():
    """tol below ten rounding units stops at the rounding, without a warning."""
    x, y, a, b = (t.float() for t in clouds(19))
    pot = nl.potentials(x, y, 0.5, a, b, tol=1e-12)
    assert pot.converged and pot.marginal_error <= 10 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("d", [2, 9])
@pytest.mark.parametrize("own", [False, True])
def test_warm_start(own, d):
    """Along a path, a start from the last potentials gives the same answer in fewer steps, with norms or without."""
    x, y, a, b = clouds(20, n=60, m=60, d=d)
    x, y = x * math.sqrt(2 / d), y * math.sqrt(2 / d)
    v = nl.fields.Sinkhorn(0.1, tol=1e-8)
    last, cold_steps, warm_steps = None, 0, 0
    for _ in range(8):
        args = (x, x, 0.1, a, a) if own else (x, y, 0.1, a, b)
        cold, warm = nl.potentials(*args, tol=1e-8), nl.potentials(*args, tol=1e-8, init=last)
        reached("warm and cold", (cold.f - warm.f).abs().max(), 1e-7)
        if last is not None:
            cold_steps, warm_steps = cold_steps + cold.iterations, warm_steps + warm.iterations
        last = warm
        x = x + 0.1 * v(x, y, a=a, b=b)
    print(f"steps: cold {cold_steps}, warm {warm_steps}")
    assert warm_steps < 0.9 * cold_steps
    again = nl.potentials(*args, tol=1e-8, init=warm)
    assert again.iterations <= 8


def test_warm_start_survives_a_jump():
    """Potentials of a problem far away are a poor start, and a harmless one."""
    x, y, a, b = clouds(21)
    far = nl.potentials(x + 100, 3 * y - 50, 0.05, a, b)
    f, _ = nl.potentials(x, y, 0.5, a, b, tol=1e-12, init=far)
    reached("after a jump", (f - nl.potentials(x, y, 0.5, a, b, tol=1e-12).f).abs().max(), 1e-10)


# Borders of the domain ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eps", [1e-3, 0.1, 1.0])
@pytest.mark.parametrize("where", [0.5, 100.0])
def test_zero_weights(where, eps):
    """Points of weight zero change nothing, and there the potentials are extended; also far from all the others."""
    x, y, a, b = clouds(22, n=5, m=6)
    x, y = 3 * x, 3 * y
    X, Y = torch.cat([x, x[:1] + where]), torch.cat([y[:1] - where, y])
    zero = torch.zeros(1, dtype=F64)
    A, B = torch.cat([a, zero]), torch.cat([zero, b])
    less, more = nl.potentials(x, y, eps, a, b, tol=1e-10), nl.potentials(X, Y, eps, A, B, tol=1e-10)
    reached("f", (more.f[:-1] - less.f).abs().max(), 1e-8)
    reached("g", (more.g[1:] - less.g).abs().max(), 1e-8)
    f = -eps * torch.logsumexp((less.g - dense_cost(X, y)) / eps + b.log(), -1)
    g = -eps * torch.logsumexp((less.f[:, None] - dense_cost(x, Y)) / eps + a.log()[:, None], 0)
    reached("f extended", (more.f - f).abs().max(), 1e-8)
    reached("g extended", (more.g - g).abs().max(), 1e-8)
    P = nl.plan(X, Y, eps, A, B, tol=1e-10)
    reached("plan", (P[:-1, 1:] - nl.plan(x, y, eps, a, b, tol=1e-10)).abs().max(), 1e-9)
    assert P[-1].abs().max() == 0 and P[:, 0].abs().max() == 0
    own, whole = nl.potentials(x, x, eps, a, a, tol=1e-10), nl.potentials(X, X, eps, A, A, tol=1e-10)
    reached("self", (whole.f[:-1] - own.f).abs().max(), 1e-8)
    f = -eps * torch.logsumexp((own.f - dense_cost(X, x)) / eps + a.log(), -1)
    reached("self extended", (whole.f - f).abs().max(), 1e-8)
    v, V = nl.fields.Sinkhorn(eps, tol=1e-10), nl.fields.Sinkhorn(eps, tol=1e-10)
    reached("velocity", (V(X, Y, a=A, b=B) - v(x, y, at=X, a=a, b=b)).abs().max(), 1e-7)
    X.requires_grad_(), A.requires_grad_()
    gx, ga = torch.autograd.grad(nl.sinkhorn_divergence(X, Y, eps, A, B, tol=1e-10), (X, A))
    assert gx[-1].abs().max() == 0 and torch.isfinite(ga).all()
    reached("gradient in a", (centred(ga, A) - centred(more.f - whole.f, A)).abs().max(), 1e-8)


@pytest.mark.parametrize("eps", [0.01, 1.0])
def test_duplicates(eps):
    """A point twice is a point with twice the weight."""
    x, y, a, b = clouds(23)
    twice, share = torch.cat([x, x[:3]]), torch.cat([a[:3] / 2, a[3:], a[:3] / 2])
    reached("S", (nl.sinkhorn_divergence(twice, y, eps, share, b, tol=1e-12)
                  - nl.sinkhorn_divergence(x, y, eps, a, b, tol=1e-12)).abs(), 1e-11)  # fmt: skip
    f = nl.potentials(twice, y, eps, share, b, tol=1e-12).f
    reached("f", (f[:3] - f[-3:]).abs().max(), 1e-12)
    one = torch.zeros(4, 2, dtype=F64)
    assert nl.sinkhorn_divergence(one, one.clone(), eps).abs() < 1e-15


@pytest.mark.parametrize(("n", "m"), [(1, 1), (1, 7), (7, 1)])
@pytest.mark.parametrize("eps", [1e-3, 1.0])
def test_one_point(n, m, eps):
    """With one point on a side the plan is the product: OT_eps is the mean cost."""
    x, y, a, b = clouds(24, n=n, m=m)
    reached("plan", (nl.plan(x, y, eps, a, b) - a[:, None] * b).abs().max(), 1e-14)
    mean = (a[:, None] * b * dense_cost(x, y)).sum()
    reached("OT", (nl.entropic_cost(x, y, eps, a, b) - mean).abs(), 1e-13)
    reached("T", (nl.barycentric_map(x, y, eps, a, b)() - b @ y).abs().max(), 1e-14)


def test_huge_temperature():
    """S_eps tends to half the squared distance of the means, with an error of order 1/eps."""
    x, y, a, b = clouds(25)
    limit = (a @ x - b @ y).square().sum() / 2
    errors = [float((nl.sinkhorn_divergence(x, y, eps, a, b, tol=1e-14) - limit).abs()) for eps in (1e2, 1e4)]
    assert errors[1] < 0.02 * errors[0]
    reached("eps = 1e6", (nl.sinkhorn_divergence(x, y, 1e6, a, b, tol=1e-14) - limit).abs(), 1e-5)
    x32, y32, a32, b32 = (t.float() for t in (x, y, a, b))
    v = nl.fields.Sinkhorn(1e6)(x32, y32, a=a32, b=b32)
    reached("velocity, float32", (v - (b32 @ y32 - a32 @ x32)).abs().max(), 1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_tiny_temperature(dtype):
    """With n = m small and eps far below every gap, the plan is the exact assignment."""
    g = torch.Generator().manual_seed(3)
    x, y = (torch.randn(6, 2, generator=g, dtype=F64) for _ in range(2))
    exact = ot.emd(np.full(6, 1 / 6), np.full(6, 1 / 6), dense_cost(x, y).numpy())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", nl.ConvergenceWarning)  # float32 cannot certify a plan this sharp
        P = nl.plan(x.to(dtype), y.to(dtype), 1e-4, tol=1e-6)
    reached(f"assignment, {dtype}", np.abs(P.double().numpy() - exact).max(), 1e-6)


def test_a_map_far_from_the_origin():
    """Norms of a thousand would leave single precision nothing of a kernel of inner products."""
    x, y, a, b = (t.float() for t in clouds(26, n=40, m=50, d=9))
    x, y, points = ((16 * t).round() / 16 for t in (x, y, x + 0.1))
    there, here = (nl.barycentric_map(x + s, y + s, 0.5, a, b, tol=1e-5)(points + s) - s for s in (1024.0, 0.0))
    reached("T at offset 1024", (there - here).abs().max(), 2e-3)
    exact = nl.barycentric_map(*(t.double() for t in (x, y)), 0.5, *(t.double() / t.sum() for t in (a, b)))
    reached("T", (there - exact(points.double())).abs().max(), 2e-3)


@pytest.mark.parametrize("d", [2, 784])
def test_float32_keeps_its_type_and_answer(d):
    x, y, a, b = clouds(26, n=40, m=50, d=d)
    x, y = x / math.sqrt(d), y / math.sqrt(d)
    x32, y32, a32, b32 = (t.float() for t in (x, y, a, b))
    for name, answer in {
        "f": lambda *t: nl.potentials(*t[:2], 0.2, *t[2:], tol=1e-5).f,
        "plan": lambda *t: nl.plan(*t[:2], 0.2, *t[2:], tol=1e-5),
        "S": lambda *t: nl.sinkhorn_divergence(*t[:2], 0.2, *t[2:], tol=1e-5),
        "T": lambda *t: nl.barycentric_map(*t[:2], 0.2, *t[2:], tol=1e-5)(t[0] + 0.1),
    }.items():
        low, high = answer(x32, y32, a32, b32), answer(x, y, a, b)
        assert low.dtype == torch.float32 and high.dtype == F64
        reached(f"d={d} {name}", (low - high).abs().max() / high.abs().max(), 1e-4)


def test_inputs_are_left_alone():
    x, y, a, b = clouds(27)
    kept = [t.clone() for t in (x, y, a, b)]
    nl.sinkhorn_divergence(x, y, 0.3, a, b)
    T = nl.barycentric_map(x, y, 0.3, a, b)
    first = T(x)
    T.potential(x), T(), T(x)
    assert torch.equal(T(x), first)
    assert all(torch.equal(t, k) for t, k in zip((x, y, a, b), kept, strict=True))


def test_blocks():
    """A map of many data points works through its points a block at a time, with the same answer."""
    g = torch.Generator().manual_seed(0)
    m, k = 2**20, 20
    y, points = torch.randn(m, 1, generator=g, dtype=F64), torch.randn(k, 1, generator=g, dtype=F64)
    b, dual = torch.full((m,), 1 / m, dtype=F64), torch.randn(m, generator=g, dtype=F64)
    extension = Extension(y[None], b[None], dual[None], 0.5, None, 8)
    T = nl.BarycentricMap(y, b, 0.5, Potentials(b, dual, 0, 0.0, True), torch.zeros(1, m, dtype=F64), extension)
    assert [S.shape[1] for S, _ in extension.blocks(points[None])] == [16, 4], "the test must need several blocks"
    S = (dual - (points - y.T).square() / 2) / 0.5
    reached("T", (T(points) - torch.softmax(S, 1) @ y).abs().max(), 1e-12)
    f = -0.5 * (torch.logsumexp(S, 1) - math.log(m))
    reached("f", (T.potential(points) - f).abs().max(), 1e-12)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_devices(device, dtype):
    """Values, gradients, maps, batches and small temperatures on each device, against float64 textbook steps."""
    x, y, a, b = clouds(28, n=30, m=40)
    exact = textbook_divergence(x, y, 0.3, a, b)
    f, _ = textbook(x, y, 0.3, a, b)
    X, Y, A, B = (t.to(device, dtype) for t in (x, y, a, b))
    bound = 1e-5 if dtype == torch.float32 else 1e-10
    tol = 1e-6 if dtype == torch.float32 else 1e-12
    X.requires_grad_()
    S = nl.sinkhorn_divergence(X, Y, 0.3, A, B, tol=tol)
    (g,) = torch.autograd.grad(S, X)
    assert S.device.type == g.device.type == device and S.dtype == g.dtype == dtype
    reached(f"S on {device}", (S.detach().cpu() - exact).abs(), bound)
    pot = nl.potentials(X, Y, 0.3, A, B, tol=tol)
    reached(f"f on {device}", (centred(pot.f.cpu().double(), a) - centred(f, a)).abs().max(), bound)
    v = nl.fields.Sinkhorn(0.3, tol=tol)(X.detach(), Y, a=A, b=B)
    reached(f"velocity on {device}", (v + g / A[:, None]).abs().max(), 10 * bound)
    both = nl.potentials(torch.stack([X, X + 1]), torch.stack([Y, Y + 1]), 0.3, A, B, tol=tol)
    reached(f"batch on {device}", (both.f - pot.f).abs().max(), 10 * bound)
    sharp = nl.potentials(
        X.double(), Y.double(), 3e-3, A.double() / A.double().sum(), B.double() / B.double().sum(), tol=1e-8
    )
    assert sharp.converged and sharp.f.device.type == device


def test_random_problems():
    """Two hundred small problems of all shapes, sharp and flat: converged, finite, marginals as stated."""
    g = torch.Generator().manual_seed(7)
    shapes = itertools.cycle(itertools.product((1, 2, 5), (1, 3, 8), (1, 2, 10)))
    worst = 0.0
    for k, (n, m, d) in zip(range(200), shapes, strict=False):
        x, y, a, b = clouds(1000 + k, n, m, d)
        eps = 10 ** (6 * float(torch.rand(1, generator=g)) - 3)
        tol = 10 ** (-10 * float(torch.rand(1, generator=g)) - 1)
        pot = nl.potentials(x, y, eps, a, b, tol=tol)
        P = a[:, None] * b * torch.exp((pot.f[:, None] + pot.g - dense_cost(x, y)) / eps)
        error = max(float((P.sum(1) - a).abs().sum()), float((P.sum(0) - b).abs().sum()))
        worst = max(worst, error / (tol + 1e-14 / eps))
        assert pot.converged
    reached("marginal error over what was asked", worst, 1.5)
