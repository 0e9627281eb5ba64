"""Entropic optimal transport between point clouds: potentials, plans and barycentric maps.

Cost ``|x - y|^2 / 2``, temperature `eps` in units of squared length; :mod:`nsgf_lite.transport.solver` does the
iterations.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nsgf_lite.inputs import exact, read_clouds
from nsgf_lite.transport.problem import Extension, Potentials, read_problem
from nsgf_lite.transport.solver import softmax


@exact
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
    problem, tol, max_iter = read_problem(x, y, a, b, eps, tol, max_iter)
    return problem.potentials(problem.solve(tol, max_iter, init))


@exact
@torch.no_grad()
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
    problem, tol, max_iter = read_problem(x, y, a, b, eps, tol, max_iter)
    exponent = problem.solve(tol, max_iter).exponent
    # The last step made the rows exact; the softmax is that step.
    rows = softmax(exponent + problem.b.log().unsqueeze(-2))
    return problem.unbatch(rows * problem.a.unsqueeze(-1) * (problem.b > 0).unsqueeze(-2)).to(x.dtype)


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
    _extension: Extension

    @exact
    def __call__(self, points: Tensor | None = None) -> Tensor:
        """Images (k, d) or (b, k, d) of the points, by default of the cloud x; differentiable in the points."""
        known = self._extension
        if points is None:
            images = softmax(self._exponent + known.b.log().unsqueeze(-2)) @ known.y
        else:
            images = known.images(self._read(points))
        return self._as_given(images if known.origin is None else images + known.origin)

    @exact
    def potential(self, points: Tensor) -> Tensor:
        """Potential f (k,) or (b, k) at the points, extended by the Sinkhorn equation; differentiable in the points."""
        return self._as_given(self._extension.potential(self._read(points)))

    def _read(self, points: Tensor) -> Tensor:
        read_clouds(y=self.y, points=points)
        return points.reshape(len(self._extension.y), *points.shape[-2:])

    def _as_given(self, values: Tensor) -> Tensor:
        return (values if self.y.ndim == 3 else values.squeeze(0)).to(self.y.dtype)


@exact
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
    problem, tol, max_iter = read_problem(x, y, a, b, eps, tol, max_iter)
    solved = problem.solve(tol, max_iter, init)
    solution, weights = problem.potentials(solved), problem.unbatch(problem.b).detach()
    towards = replace(solved.towards, g=solved.towards.g - solved.tilt)
    return BarycentricMap(y.detach(), weights, problem.eps, solution, solved.exponent, towards)
