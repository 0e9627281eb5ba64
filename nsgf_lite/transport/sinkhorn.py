"""Entropic optimal transport between point clouds: potentials, plans and barycentric maps.

Cost ``|x - y|^2 / 2``, temperature `eps` in units of squared length; :mod:`nsgf_lite.solver` does the iterations.
"""

import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from nsgf_lite.inputs import read_clouds, read_counts, read_positive, read_weights
from nsgf_lite.transport.solver import affinity, alternate, averaged, softmax


class ConvergenceWarning(UserWarning):
    """An iteration stopped before it reached its tolerance; the message says where it stands."""


@dataclass(frozen=True)
class Potentials:
    """Dual potentials ``f`` (n,) or (b, n) and ``g`` (m,) or (b, m); unpacks as ``f, g``.

    ``marginal_error`` is the L1 distance between the plan's marginals and the weights (the largest in the batch),
    ``iterations`` the number of Sinkhorn and Newton steps. Normalised so that the weighted means of f and g agree.
    """

    f: Tensor
    g: Tensor
    iterations: int
    marginal_error: float
    converged: bool

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.f, self.g))


def _gathered(x: Tensor, a: Tensor) -> Tensor:
    """The cloud with its points of weight zero put on the heaviest one: however far they were, no step overflows."""
    heaviest = a.argmax(-1)[..., None, None].expand(-1, 1, x.shape[-1])
    return torch.where((a > 0).unsqueeze(-1), x, x.gather(-2, heaviest))


def _outside() -> int:
    """Stack level, seen from the caller, of the first frame outside this package and torch."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back and frame.f_globals.get("__name__", "").startswith(("nsgf_lite", "torch.")):
        level, frame = level + 1, frame.f_back
    return level


@dataclass(frozen=True)
class Problem:
    """Two clouds with weights, (b,n,d), (b,m,d), (b,n), (b,m), checked; `own` if they are one and the same."""

    x: Tensor
    y: Tensor
    a: Tensor
    b: Tensor
    eps: float
    own: bool
    single: bool

    def solve(self, tol: float, max_iter: int, init: Potentials | None = None) -> tuple[Potentials, Tensor]:
        """Potentials shaped as the input; and, batched, the plan's exponent ``(g - c) / eps`` up to a term in x."""
        if init is not None and not (init.g.numel() == self.b.numel() and init.g.dtype == self.b.dtype):
            raise ValueError(
                f"init must be the potentials of a problem of this size and dtype, with g of shape "
                f"{tuple(self.b.shape)[self.single :]} and {self.b.dtype}, got {tuple(init.g.shape)} and {init.g.dtype}"
            )
        with torch.no_grad():
            idle = bool((self.a == 0).any() or (self.b == 0).any())
            x, y = (_gathered(self.x, self.a), _gathered(self.y, self.b)) if idle else (self.x, self.y)
            centre = y.mean(-2, keepdim=True)
            H, p, q = affinity(x - centre, y - centre)
            mean_cost = float((p.mean(-1) + q.mean(-1) - H.mean((-2, -1))).max())
            goal = max(tol, 10 * torch.finfo(H.dtype).eps)
            start = -q if init is None else init.g.reshape(q.shape) - q
            start = _gathered(start.unsqueeze(-1), self.b).squeeze(-1) if idle else start
            if self.own:
                f, g, steps, error = averaged(H, self.a, self.eps, start, goal, max_iter)
            else:
                hot = self.eps if init is not None else max(self.eps, mean_cost)
                f, g, steps, error = alternate(H, self.a, self.b, self.eps, start, hot, goal, max_iter)
            exponent = H.add_(g.unsqueeze(-2)).div_(self.eps)
            f, g = f + p, g + q
            if idle:
                f, g, exponent = self._put_back(f, g)
            tilt = ((self.b * g).sum(-1, keepdim=True) - (self.a * f).sum(-1, keepdim=True)) / 2
            f, g, tilt = (self.unbatch(t) for t in (f, g, tilt))
        if not error <= goal:
            warnings.warn(
                f"potentials stopped after {steps} steps at marginal error {error:.2g}, not {goal:.2g}. "
                f"eps = {self.eps:g} is {self.eps / max(mean_cost, 1e-300):.1g} of the mean cost {mean_cost:.3g}; "
                "a larger eps or max_iter, or float64, would help.",
                ConvergenceWarning,
                stacklevel=_outside(),
            )
        return Potentials(f + tilt, g - tilt, steps, error, error <= goal), exponent

    def _put_back(self, f: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Potentials extended to the points of weight zero, and the exponent of the plan there."""
        from_y = BarycentricMap(self.y, self.b, self.eps, Potentials(f, g, 0, 0.0, True), f)
        from_x = BarycentricMap(self.x, self.a, self.eps, Potentials(g, f, 0, 0.0, True), g)
        f, g = (
            torch.where(self.a > 0, f, from_y.potential(self.x)),
            torch.where(self.b > 0, g, from_x.potential(self.y)),
        )
        centre = self.y.mean(-2, keepdim=True)
        H, _, q = affinity(self.x - centre, self.y - centre)
        return f, g, H.add_((g - q).unsqueeze(-2)).div_(self.eps)

    def unbatch(self, t: Tensor) -> Tensor:
        return t.squeeze(0) if self.single else t


def read_problem(
    x: Tensor, y: Tensor, a: Tensor | None, b: Tensor | None, eps: float, tol: float, max_iter: int
) -> Problem:
    read_positive(eps=eps, tol=tol)
    read_counts(max_iter=max_iter)
    read_clouds(x=x, y=y)
    own, single = y is x and b is a, x.ndim == 2
    a, b = read_weights("a", a, x), read_weights("b", b, y)
    if single:
        x, y, a, b = (t.unsqueeze(0) for t in (x, y, a, b))
    return Problem(x, y, a, b, float(eps), own, single)


def potentials(
    x: Tensor,
    y: Tensor,
    eps: float,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    tol: float = 1e-4,
    max_iter: int = 10_000,
    init: Potentials | None = None,
) -> Potentials:
    """Dual potentials of entropic optimal transport from cloud x to cloud y, cost ``|x - y|^2 / 2``.

    Where y is the very tensor x (and b is a), the symmetric self problem is solved, with f = g.

    Parameters
    ----------
    x, y : Tensor
        Clouds (n, d) and (m, d), or batches (b, n, d) and (b, m, d); float32 or float64, on any device.
    eps : float
        Temperature, in units of squared length.
    a, b : Tensor
        Weights (n,) and (m,), or (b, n) and (b, m), non-negative, summing to one; uniform if None.
        At points of weight zero the potentials are extended by the Sinkhorn equations.
    tol : float
        L1 marginal error at which to stop, raised to ten rounding units of the dtype if it is below. In float32 the
        rounding of f and g themselves moves the plan by about ``1e-7 max|f| / eps``.
    max_iter : int
        Steps after which to stop with a :class:`ConvergenceWarning`.
    init : Potentials
        Warm start, such as the solution before the particles moved; g is used, and f recomputed from it.

    Raises
    ------
    ValueError
        If shapes, dtypes or devices do not fit, a cloud is empty or not finite, weights are not a probability,
        or eps, tol or max_iter is not positive.

    Source
    ------
    Cuturi (2013); over-relaxation: Thibault et al. (2021), Lehmann et al. (2022); absorption: Schmitzer (2019).

    Used in
    -------
    :prf:ref:`thm-entropic-duality`, :prf:ref:`thm-sinkhorn-equations`, :prf:ref:`thm-first-variation`
    """
    return read_problem(x, y, a, b, eps, tol, max_iter).solve(tol, max_iter, init)[0]


def plan(
    x: Tensor,
    y: Tensor,
    eps: float,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    tol: float = 1e-4,
    max_iter: int = 10_000,
) -> Tensor:
    """Entropic coupling ``a_i exp((f_i + g_j - c_ij) / eps) b_j``, shape (n, m) or (b, n, m), total mass one.

    Arguments and errors as in :func:`potentials`.

    Used in
    -------
    :prf:ref:`thm-entropic-duality`, :prf:ref:`thm-two-atoms`
    """
    problem = read_problem(x, y, a, b, eps, tol, max_iter)
    _, exponent = problem.solve(tol, max_iter)
    # The last step made the rows exact; the softmax is that step.
    rows = softmax(exponent + problem.b.log().unsqueeze(-2))
    return problem.unbatch(rows * problem.a.unsqueeze(-1) * (problem.b > 0).unsqueeze(-2))


@dataclass(frozen=True)
class BarycentricMap:
    """The barycentric projection T of an entropic plan and the potential f, whose gradient is ``x - T(x)``, on R^d.

    ``y`` (m, d) or (b, m, d) and ``b`` (m,) or (b, m) are the data and their weights, ``solution`` the potentials;
    :func:`barycentric_map` makes it.

    Raises
    ------
    ValueError
        When called with points that do not fit ``y`` in dimension, batch, dtype or device, or that are not finite.
    """

    y: Tensor
    b: Tensor
    eps: float
    solution: Potentials
    _exponent: Tensor

    def __call__(self, points: Tensor | None = None) -> Tensor:
        """Images (k, d) or (b, k, d) of the points, by default of the cloud x; differentiable in the points."""
        if points is None:
            return softmax(self._exponent + self.b.log().unsqueeze(-2)) @ self.y
        return torch.cat([softmax(S) @ self.y for S, _ in self._blocks(points)], -2)

    def potential(self, points: Tensor) -> Tensor:
        """Potential f (k,) or (b, k) at the points, extended by the Sinkhorn equation; differentiable in the points."""
        return torch.cat([p - self.eps * torch.logsumexp(S, -1) for S, p in self._blocks(points)], -1)

    def _blocks(self, points: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Exponents of the kernel with the weights, a few million entries at a time, and the norms left outside."""
        read_clouds(y=self.y, points=points)
        centre = self.y.mean(-2, keepdim=True)
        for block in points.split(max(1, 2**24 // self.y[..., 0].numel()), -2):
            H, p, q = affinity(block - centre, self.y - centre)
            yield (H + (self.solution.g - q).unsqueeze(-2)) / self.eps + self.b.log().unsqueeze(-2), p


def barycentric_map(
    x: Tensor,
    y: Tensor,
    eps: float,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    tol: float = 1e-4,
    max_iter: int = 10_000,
    init: Potentials | None = None,
) -> BarycentricMap:
    """Barycentric projection T of the entropic plan from x to y: ``T(points)`` is the mean of y given the point.

    ``T()`` gives the images of x itself, ``T.potential(points)`` the extended potential f. Arguments and errors as in
    :func:`potentials`.

    Used in
    -------
    :prf:ref:`thm-potential-gradient`, :prf:ref:`thm-sinkhorn-velocity`
    """
    problem = read_problem(x, y, a, b, eps, tol, max_iter)
    solution, exponent = problem.solve(tol, max_iter, init)
    weights = problem.unbatch(problem.b).detach()
    return BarycentricMap(y.detach(), weights, problem.eps, solution, problem.unbatch(exponent))
