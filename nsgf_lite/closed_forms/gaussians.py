"""Entropic transport between Gaussians, and its flow, in closed form.

Cost ``|x - y|^2 / 2``, temperature `eps` in units of squared length, everything in float64.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from nsgf_lite.inputs import LARGEST, exact, read_clouds, read_positive

Vector = Tensor | Sequence[float] | float
Matrix = Tensor | Sequence[Sequence[float]] | float


def _root(matrix: Tensor) -> Tensor:
    """Symmetric square root of a symmetric positive semidefinite matrix."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T


def _covariance(name: str, matrix: Matrix) -> Tensor:
    """Read a covariance, a number standing for a variance in one dimension; ValueError unless positive definite."""
    try:
        given = torch.as_tensor(matrix, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"{name} must be a symmetric matrix (or a variance), got {matrix!r}") from None
    square = given.reshape(1, 1) if given.ndim == 0 else given
    if (
        square.ndim != 2
        or square.shape[0] != square.shape[1]
        or square.numel() == 0
        or float((square - square.T).abs().max()) > 1e-12 * float(square.abs().max())
    ):
        raise ValueError(f"{name} must be a symmetric matrix (or a variance), got shape {tuple(given.shape)}")
    if not bool(torch.isfinite(square).all()) or float(torch.linalg.eigvalsh(square)[0]) <= 0:
        raise ValueError(f"{name} must be positive definite, got {given.tolist()}")
    _moderate(name, square)
    return square.detach()


def _moderate(name: str, given: Tensor) -> None:
    """Refuse what would overflow when it is multiplied."""
    if float(given.abs().max()) > LARGEST[torch.float64]:
        raise ValueError(f"{name} must lie within ±{LARGEST[torch.float64]:g}, got {float(given.abs().max()):g}")


def _read_points(x: Tensor, d: int) -> None:
    """Check that the points are a cloud, or a batch of them, of dimension d."""
    read_clouds(x=x)
    if x.shape[-1] != d:
        raise ValueError(f"x must have shape (k, {d}), got {tuple(x.shape)}")


def _mean(name: str, mean: Vector, d: int) -> Tensor:
    try:
        vector = torch.as_tensor(mean, dtype=torch.float64).detach().reshape(-1)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"{name} must be {d} numbers, got {mean!r}") from None
    if vector.shape != (d,):
        raise ValueError(f"{name} must have {d} entries, got {vector.numel()}")
    if not bool(torch.isfinite(vector).all()):
        raise ValueError(f"{name} must be finite, got {vector.tolist()}")
    _moderate(name, vector)
    return vector


def _temperature(eps: float) -> float:
    (eps,) = read_positive(eps=eps)
    least, most = 1 / LARGEST[torch.float64], LARGEST[torch.float64]
    if not least <= eps <= most:
        raise ValueError(f"eps must lie between {least:g} and {most:g}, got {eps!r}")
    return float(eps)


def _times(times: Tensor | Sequence[float]) -> Tensor:
    """Read increasing times from 0 on, shape (k,)."""
    try:
        clock = torch.as_tensor(times, dtype=torch.float64).detach().cpu()
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"times must be increasing numbers from 0 on, got {times!r}") from None
    fine = clock.ndim == 1 and len(clock) > 0 and bool(torch.isfinite(clock).all())
    if not (fine and clock[0] >= 0 and bool((clock.diff() > 0).all())):
        raise ValueError(f"times must be increasing numbers from 0 on, got {times!r}")
    return clock


def _read(A: Matrix, B: Matrix, eps: float) -> tuple[Tensor, Tensor, float]:
    """Read two covariances of one size and a temperature."""
    first, second = _covariance("A", A), _covariance("B", B)
    if first.shape != second.shape:
        raise ValueError(f"A and B must have one size, got {tuple(first.shape)} and {tuple(second.shape)}")
    return first, second, _temperature(eps)


def _slope(A: Tensor, B: Tensor, eps: float) -> Tensor:
    """Slope M of :func:`gaussian_map`, with B's root in place of A's: nothing is inverted, A may be singular."""
    root = _root(B)
    spectrum, vectors = torch.linalg.eigh(root @ A @ root)
    half = root @ vectors
    slope = 2 * (half / ((4 * spectrum.clamp_min(0) + eps**2).sqrt() + eps)) @ half.T
    return (slope + slope.T) / 2


def gaussian_map(A: Matrix, B: Matrix, eps: float) -> Tensor:
    """Slope M of the barycentric projection ``T(x) = b + M(x - a)`` from N(a, A) to N(b, B), shape (d, d).

    M is the symmetric solution of ``eps M + M A M = B``, that is ``A^{-1/2} (D - eps I) A^{-1/2} / 2`` with
    ``D = (4 A^{1/2} B A^{1/2} + eps^2 I)^{1/2}``; the cross-covariance of the plan is ``A M``.

    Raises
    ------
    ValueError
        If a covariance is not symmetric positive definite, the sizes differ, or eps <= 0.

    Source
    ------
    Janati et al. (2020), Theorem 1, in units of the cost ``|x - y|^2 / 2``.

    Used in
    -------
    :prf:ref:`thm-gaussian-plan`, :prf:ref:`thm-gaussian-sinkhorn-flow`, :prf:ref:`thm-two-curves`,
    :prf:ref:`thm-tangent-projection`
    """
    return _slope(*_read(A, B, eps))


def gaussian_ot(a: Vector, A: Matrix, b: Vector, B: Matrix, eps: float) -> Tensor:
    """Entropic cost OT_eps between N(a, A) and N(b, B), a scalar in units of squared length.

    ``2 OT_eps = |a-b|^2 + tr(A + B - D) + d eps (1 - log 2 eps) + eps log det(D + eps I)``, with the same D.

    Raises
    ------
    ValueError
        As :func:`gaussian_map`, or if a mean has the wrong length.

    Source
    ------
    Janati et al. (2020), Theorem 1, in units of the cost ``|x - y|^2 / 2``.

    Used in
    -------
    :prf:ref:`thm-gaussian-plan`, :prf:ref:`thm-two-curves`
    """
    A, B, eps = _read(A, B, eps)
    d = len(A)
    a, b = _mean("a", a, d), _mean("b", b, d)
    root = _root(A)
    spectrum = torch.linalg.eigvalsh(root @ B @ root).clamp_min(0)
    excess = 4 * spectrum / ((4 * spectrum + eps**2).sqrt() + eps)  # D - eps, which would cancel for large eps
    transport = (a - b).square().sum() + A.trace() + B.trace() - excess.sum()
    # eps (1 - log 2 eps) + eps log(D + eps) - eps, summed over the spectrum, with the logarithms joined
    entropy = eps * torch.log1p(excess / (2 * eps)).sum()
    return (transport + entropy) / 2


def gaussian_divergence(a: Vector, A: Matrix, b: Vector, B: Matrix, eps: float) -> Tensor:
    """Sinkhorn divergence S_eps between N(a, A) and N(b, B), a scalar in units of squared length.

    Raises
    ------
    ValueError
        As :func:`gaussian_ot`.

    Source
    ------
    Janati et al. (2020), in units of the cost ``|x - y|^2 / 2``.

    Used in
    -------
    :prf:ref:`thm-gaussian-divergence`, :prf:ref:`thm-not-a-metric`, :prf:ref:`thm-gaussian-dissipation`
    """
    return gaussian_ot(a, A, b, B, eps) - (gaussian_ot(a, A, a, A, eps) + gaussian_ot(b, B, b, B, eps)) / 2


def gaussian_velocity(a: Vector, A: Matrix, b: Vector, B: Matrix, eps: float) -> Callable[[Tensor], Tensor]:
    """Velocity of the Sinkhorn flow at N(a, A) towards N(b, B): a function of points (k, d).

    ``v(x) = b - a + (M(A, B) - M(A, A)) (x - a)``, affine, with M from :func:`gaussian_map`.

    Raises
    ------
    ValueError
        As :func:`gaussian_map`; when called, if the points are no cloud of this dimension.

    Used in
    -------
    :prf:ref:`thm-sinkhorn-velocity`, :prf:ref:`thm-gaussian-sinkhorn-flow`
    """
    slope = gaussian_map(A, B, eps) - gaussian_map(A, A, eps)
    a, b = _mean("a", a, len(slope)), _mean("b", b, len(slope))

    @exact
    def velocity(x: Tensor) -> Tensor:
        _read_points(x, len(a))
        return (b - a).to(x) + (x - a.to(x)) @ slope.to(x)

    return velocity


def gaussian_flow(
    m: Vector, S: Matrix, target_mean: Vector, target_covariance: Matrix, eps: float, times: Tensor | Sequence[float]
) -> tuple[Tensor, Tensor]:
    """Means (k, d) and covariances (k, d, d) of the Sinkhorn flow from N(m, S) to a Gaussian, at k times.

    ``m' = m* - m`` and ``S' = K S + S K`` with ``K = M(S, S*) - M(S, S)`` and M from :func:`gaussian_map`: the mean by
    its formula, the covariance by an adaptive Runge-Kutta method of order 8 with relative tolerance 1e-12.

    Parameters
    ----------
    m, S : float or Tensor
        Mean (d,) and covariance (d, d) at time 0.
    target_mean, target_covariance : float or Tensor
        The target's.
    eps : float
        Temperature, in units of squared length.
    times : Tensor or sequence
        Increasing times, the first of them 0 or later.

    Raises
    ------
    ValueError
        As :func:`gaussian_ot`, or if the times are not finite, increasing and non-negative.

    Source
    ------
    Janati et al. (2020), Theorem 1, for M; the flow is derived in the chapter.

    Used in
    -------
    :prf:ref:`thm-gaussian-sinkhorn-flow`, :prf:ref:`thm-gaussian-mean`, :prf:ref:`thm-gaussian-variance`,
    :prf:ref:`thm-gaussian-eps`, :prf:ref:`thm-two-curves`, :doc:`/book/mean_field_limit`
    """
    start, target = (
        _covariance(name, given).detach().cpu() for name, given in (("S", S), ("target_covariance", target_covariance))
    )
    d = len(start)
    if start.shape != target.shape:
        sizes = f"{tuple(start.shape)} and {tuple(target.shape)}"
        raise ValueError(f"S and target_covariance must have one size, got {sizes}")
    m, goal = (_mean(name, given, d).detach().cpu() for name, given in (("m", m), ("target_mean", target_mean)))
    clock, eps = _times(times), _temperature(eps)

    def rate(_: float, flat: np.ndarray) -> np.ndarray:
        now = torch.from_numpy(flat).reshape(d, d)
        K = _slope(now, target, eps) - _slope(now, now, eps)
        return (K @ now + now @ K.T).reshape(-1).numpy()

    size = float(max(start.abs().max(), target.abs().max()))

    def far(_: float, flat: np.ndarray) -> float:
        """Zero where the flow has arrived: the integration ends there, however long the times are."""
        return float(np.abs(flat.reshape(d, d) - target.numpy()).max()) - 1e-12 * size

    far.terminal = True  # type: ignore[attr-defined]
    # From 0 and a little beyond the last time, so that a flow of no length is a flow.
    solution = solve_ivp(
        rate,
        (0.0, float(clock[-1]) + 1e-3),
        start.reshape(-1).numpy(),
        method="DOP853",
        t_eval=clock.numpy(),
        rtol=1e-12,
        atol=1e-14 * size,
        events=far,
    )
    if not solution.success:
        raise FloatingPointError(f"the flow could not be integrated: {solution.message}")
    covariances = target.repeat(len(clock), 1, 1)
    before = np.asarray(solution.y).reshape(d * d, -1).T.copy()  # none, if the flow arrived before the first time
    covariances[: len(before)] = torch.from_numpy(before).reshape(-1, d, d)
    means = goal + torch.exp(-clock)[:, None] * (m - goal)
    return means, (covariances + covariances.mT) / 2
