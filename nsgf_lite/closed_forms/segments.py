"""Straight segments between two Gaussians in closed form: the law on the way, its velocity, and what a point tells of
the time.

``x_t = (1-t) x0 + t x1`` with independent ``x0 ~ N(m, S)`` and ``x1 ~ N(m*, S*)``; everything in float64.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from nsgf_lite.closed_forms.gaussians import Matrix, Vector, _covariance, _mean, _read_points, _root
from nsgf_lite.inputs import exact, read_counts, read_finite, read_positive, read_sizes

Law = tuple[Tensor, Tensor]


def _laws(m: Vector, S: Matrix, target_mean: Vector, target_covariance: Matrix) -> tuple[Law, Law]:
    """Read two Gaussians of one dimension."""
    return _pair(("m", m, "S", S), ("target_mean", target_mean, "target_covariance", target_covariance))


def _pair(one: tuple[str, Vector, str, Matrix], other: tuple[str, Vector, str, Matrix]) -> tuple[Law, Law]:
    first, second = (_covariance(name, matrix) for _, _, name, matrix in (one, other))
    if first.shape != second.shape:
        raise ValueError(
            f"{one[2]} and {other[2]} must have one size, got {tuple(first.shape)} and {tuple(second.shape)}"
        )
    d = len(first)
    return (_mean(one[0], one[1], d), first), (_mean(other[0], other[1], d), second)


def _moment(t: float) -> float:
    """Read a time; what a solver's additions leave beyond an end is taken for the end."""
    try:
        (moment,) = read_finite(t=t)
    except ValueError:
        moment = math.nan
    if not -1e-9 <= moment <= 1 + 1e-9:
        raise ValueError(f"t must be a number from 0 to 1, got {t!r}")
    return min(max(moment, 0.0), 1.0)


def _at(t: float, start: Law, end: Law) -> Law:
    (m, S), (goal, B) = start, end
    return (1 - t) * m + t * goal, (1 - t) ** 2 * S + t**2 * B


def gaussian_w2(a: Vector, A: Matrix, b: Vector, B: Matrix) -> Tensor:
    """Wasserstein distance W_2 between N(a, A) and N(b, B), a scalar in units of length (no one half).

    ``|a-b|^2 + tr(A + B - 2 (A^{1/2} B A^{1/2})^{1/2})``, and its root.

    Raises
    ------
    ValueError
        If a covariance is not symmetric positive definite, or the sizes differ.

    Source
    ------
    Villani (2009), after Dowson and Landau (1982).

    Used in
    -------
    :prf:ref:`thm-handover`, :prf:ref:`thm-two-curves`, :prf:ref:`thm-flow-matching-gaussians`
    """
    (a, A), (b, B) = _pair(("a", a, "A", A), ("b", b, "B", B))
    root = _root(A)
    cross = torch.linalg.eigvalsh(root @ B @ root).clamp_min(0).sqrt().sum()
    return ((a - b).square().sum() + A.trace() + B.trace() - 2 * cross).clamp_min(0).sqrt()


def segment_law(t: float, m: Vector, S: Matrix, target_mean: Vector, target_covariance: Matrix) -> Law:
    """Mean (d,) and covariance (d, d) of x_t: ``(1-t) m + t m*`` and ``(1-t)^2 S + t^2 S*``.

    Raises
    ------
    ValueError
        If t is not in [0, 1], a covariance is not symmetric positive definite, or the sizes differ.

    Used in
    -------
    :prf:ref:`thm-straight-flow`, :prf:ref:`thm-handover`, :prf:ref:`thm-two-curves`,
    :prf:ref:`thm-flow-matching-gaussians`
    """
    return _at(_moment(t), *_laws(m, S, target_mean, target_covariance))


def segment_velocity(
    t: float, m: Vector, S: Matrix, target_mean: Vector, target_covariance: Matrix
) -> Callable[[Tensor], Tensor]:
    """Velocity of the straight flow at time t, ``E[x1 - x0 | x_t = x]``: a function of points (k, d).

    ``m* - m + (t S* - (1-t) S) C^{-1} (x - m_t)``, where m_t and C are the moments of :func:`segment_law`.

    Raises
    ------
    ValueError
        As :func:`segment_law`; when called, if the points are no cloud of this dimension.

    Used in
    -------
    :prf:ref:`thm-straight-flow`, :prf:ref:`thm-handover`, :prf:ref:`thm-flow-matching-gaussians`
    """
    t, (start, end) = _moment(t), _laws(m, S, target_mean, target_covariance)
    mean, covariance = _at(t, start, end)
    slope = torch.linalg.solve(covariance, t * end[1] - (1 - t) * start[1])  # of x - mean written as a row
    drift = end[0] - start[0]

    @exact
    def velocity(x: Tensor) -> Tensor:
        _read_points(x, len(mean))
        return drift.to(x) + (x - mean.to(x)) @ slope.to(x)

    return velocity


def segment_time(
    x: Tensor, m: Vector, S: Matrix, target_mean: Vector, target_covariance: Matrix, nodes: int = 400
) -> tuple[Tensor, Tensor]:
    """Mean and variance, both (k,), of a uniform t given ``x_t = x`` at points x (k, d): the best predictor, its error.

    The density of t is proportional to that of N(m_t, C_t) at x, with the moments of :func:`segment_law`; its integrals
    are taken by Gauss and Legendre's rule with that many nodes.

    Raises
    ------
    ValueError
        As :func:`segment_law`; if x is not a cloud (k, d).

    Used in
    -------
    :prf:ref:`thm-time-predictor`
    """
    start, end = _laws(m, S, target_mean, target_covariance)
    _read_points(x, len(start[0]))
    (nodes,) = read_counts(nodes=nodes)
    if x.ndim != 2:
        raise ValueError(f"x must have shape (k, {len(start[0])}), got {tuple(x.shape)}")
    node, weight = np.polynomial.legendre.leggauss(nodes)
    times, t = torch.from_numpy((node + 1) / 2), torch.from_numpy((node + 1) / 2)[:, None]
    # In coordinates where S is the identity and S* diagonal, C_t is diagonal: w, shape (nodes, d).
    factor = torch.linalg.cholesky(start[1])
    inner = torch.linalg.solve_triangular(factor, end[1], upper=False)
    spectrum, vectors = torch.linalg.eigh(torch.linalg.solve_triangular(factor, inner.T, upper=False))
    to = torch.linalg.solve_triangular(factor, torch.eye(len(factor), dtype=torch.float64), upper=False).T @ vectors
    y, drift = (x.detach().cpu().double() - start[0]) @ to, (end[0] - start[0]) @ to
    w = (1 - t) ** 2 + t**2 * spectrum
    squares = y.square() @ (1 / w).T - 2 * y @ (t * drift / w).T + ((t * drift).square() / w).sum(1)
    logs = torch.from_numpy(np.log(weight)) - squares / 2 - w.log().sum(1) / 2
    chance = torch.softmax(logs, 1)
    guess = chance @ times
    return guess, (chance * (times - guess[:, None]).square()).sum(1)


def handover_constant(tau: float, sigma: float, radius: float) -> float:
    """Largest factor by which the straight flow stretches distances from time tau to 1, without unit.

    For the source N(0, I) and a target that is N(0, sigma^2 I) convolved with a law in a ball of that radius; with
    ``w = (1-tau)^2 + tau^2 sigma^2`` it is ``sigma / w^{1/2} exp(radius^2 / 2 (1 / sigma^2 - tau^2 / w))``.

    Raises
    ------
    ValueError
        If tau is not in [0, 1], sigma is not positive, radius is negative, or the factor overflows.

    Used in
    -------
    :prf:ref:`thm-handover`
    """
    (sigma,), (radius,) = read_positive(sigma=sigma), read_sizes(radius=radius)
    tau = _moment(tau)
    try:
        w = (1 - tau) ** 2 + tau**2 * sigma**2
        factor = sigma / math.sqrt(w) * math.exp(radius**2 / 2 * (1 / sigma**2 - tau**2 / w))
    except (OverflowError, ZeroDivisionError):
        factor = math.inf
    if not math.isfinite(factor):
        raise ValueError(f"radius must be smaller beside sigma, got {radius!r} and {sigma!r}: the factor overflows")
    return factor
