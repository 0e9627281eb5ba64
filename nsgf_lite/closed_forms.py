"""Entropic optimal transport that can be written down: the oracles that the solver and the chapters are tested against.

Cost ``|x - y|^2 / 2``, temperature `eps` in units of squared length, everything in float64.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from nsgf_lite.inputs import read_positive

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
        or not torch.allclose(square, square.T, rtol=0, atol=1e-12)
    ):
        raise ValueError(f"{name} must be a symmetric matrix (or a variance), got shape {tuple(given.shape)}")
    if not bool(torch.isfinite(square).all()) or float(torch.linalg.eigvalsh(square)[0]) <= 0:
        raise ValueError(f"{name} must be positive definite, got {given.tolist()}")
    return square


def _mean(name: str, mean: Vector, d: int) -> Tensor:
    vector = torch.as_tensor(mean, dtype=torch.float64).reshape(-1)
    if vector.shape != (d,):
        raise ValueError(f"{name} must have {d} entries, got {vector.numel()}")
    if not bool(torch.isfinite(vector).all()):
        raise ValueError(f"{name} must be finite, got {vector.tolist()}")
    return vector


def _temperature(eps: float) -> float:
    read_positive(eps=eps)
    return float(eps)


def _read(A: Matrix, B: Matrix, eps: float) -> tuple[Tensor, Tensor, float]:
    """Read two covariances of one size and a temperature."""
    first, second = _covariance("A", A), _covariance("B", B)
    if first.shape != second.shape:
        raise ValueError(f"A and B must have one size, got {tuple(first.shape)} and {tuple(second.shape)}")
    return first, second, _temperature(eps)


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
    :prf:ref:`thm-gaussian-plan`
    """
    A, B, eps = _read(A, B, eps)
    root = _root(A)
    # D - eps I = 4 S (D + eps I)^{-1} with S = A^{1/2} B A^{1/2}: no cancellation when eps is large
    spectrum, vectors = torch.linalg.eigh(root @ B @ root)
    spectrum = spectrum.clamp_min(0)
    excess = (vectors * (4 * spectrum / ((4 * spectrum + eps**2).sqrt() + eps))) @ vectors.T
    inverse = torch.linalg.inv(root)
    slope = inverse @ excess @ inverse / 2
    return (slope + slope.T) / 2


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
    :prf:ref:`thm-gaussian-plan`
    """
    A, B, eps = _read(A, B, eps)
    d = len(A)
    a, b = _mean("a", a, d), _mean("b", b, d)
    root = _root(A)
    D = (4 * torch.linalg.eigvalsh(root @ B @ root).clamp_min(0) + eps**2).sqrt()
    transport = (a - b).square().sum() + A.trace() + B.trace() - D.sum()
    # eps (1 - log 2 eps) + eps log(D + eps), summed over the spectrum, with the logarithms joined: stable for large eps
    entropy = eps * (1 + torch.log((D + eps) / (2 * eps))).sum()
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
    :prf:ref:`thm-gaussian-divergence`, :prf:ref:`thm-not-a-metric`
    """
    return gaussian_ot(a, A, b, B, eps) - (gaussian_ot(a, A, a, A, eps) + gaussian_ot(b, B, b, B, eps)) / 2


def gaussian_velocity(a: Vector, A: Matrix, b: Vector, B: Matrix, eps: float) -> Callable[[Tensor], Tensor]:
    """Velocity of the Sinkhorn flow at N(a, A) towards N(b, B): a function of points (k, d).

    ``v(x) = b - a + (M(A, B) - M(A, A)) (x - a)``, affine, with M from :func:`gaussian_map`.

    Raises
    ------
    ValueError
        As :func:`gaussian_map`.

    Used in
    -------
    :prf:ref:`thm-sinkhorn-velocity`
    """
    slope = gaussian_map(A, B, eps) - gaussian_map(A, A, eps)
    a, b = _mean("a", a, len(slope)), _mean("b", b, len(slope))
    return lambda x: (b - a).to(x) + (x - a.to(x)) @ slope.to(x)


def two_atom_mass(alpha: float, beta: float, distance: float, eps: float) -> Tensor:
    """Mass that the entropic plan sends from the right to the left of two atoms at that distance, a scalar.

    The source has mass `beta` on the left, the target `alpha`; the mass t is the root between ``max(0, alpha - beta)``
    and ``min(alpha, 1 - beta)`` of ``(1-k^2) t^2 + [(beta-alpha) + k^2 (alpha+1-beta)] t - k^2 alpha (1-beta) = 0``,
    with ``k = exp(-distance^2 / (2 eps))``.

    Raises
    ------
    ValueError
        If a mass is not strictly between 0 and 1, or distance or eps is not positive.

    Used in
    -------
    :prf:ref:`thm-two-atoms`
    """
    for name, mass in (("alpha", alpha), ("beta", beta)):
        if not (isinstance(mass, int | float) and 0 < mass < 1):
            raise ValueError(f"{name} must lie strictly between 0 and 1, got {mass!r}")
    read_positive(distance=distance)
    k2 = torch.exp(torch.tensor(-(distance**2) / _temperature(eps), dtype=torch.float64))
    linear = (beta - alpha) + k2 * (alpha + 1 - beta)
    constant = k2 * alpha * (1 - beta)
    root = (linear.square() + 4 * (1 - k2) * constant).sqrt()
    # Two forms of one root; each is free of subtraction on its side.
    return 2 * constant / (linear + root) if linear > 0 else (root - linear) / (2 * (1 - k2))
