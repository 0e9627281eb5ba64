"""Two flows of densities in closed form, Ornstein and Uhlenbeck's diffusion and the porous medium, and how far apart
two Gaussians are in KL and in Stein's discrepancy; all in float64."""

import math

import torch
from torch import Tensor

from nsgf_lite.closed_forms.gaussians import Matrix, Vector, _covariance, _mean
from nsgf_lite.inputs import read_clouds, read_counts, read_positive, read_sizes


def ou_moments(
    t: float, A: Matrix, b: Vector, mean: Vector | None = None, covariance: Matrix | None = None
) -> tuple[Tensor, Tensor]:
    """Mean (d,) and covariance (d, d) at time t >= 0 of the flow of ``KL( . || N(b, A^{-1}))``, begun at N(0, I).

    ``b + e^{-At} (mean - b)`` and ``e^{-At} covariance e^{-At} + A^{-1} (I - e^{-2At})``, for any law that begins with
    these moments; a Gaussian stays one. A is the target's precision. See Fan et al. (2022), Section 5.2.

    Raises
    ------
    ValueError
        If t is negative, A or the covariance is not symmetric positive definite, or the sizes differ.

    Used in
    -------
    :prf:ref:`thm-ou-flow`, :prf:ref:`thm-jko-step`, :prf:ref:`thm-flow-matching-gaussians`
    """
    (t,) = read_sizes(t=t)
    A = _covariance("A", A)
    d = len(A)
    b, start = _mean("b", b, d), _mean("mean", [0.0] * d if mean is None else mean, d)
    spread = torch.eye(d, dtype=torch.float64) if covariance is None else _covariance("covariance", covariance)
    if len(spread) != d:
        raise ValueError(f"A and covariance must have one size, got {tuple(A.shape)} and {tuple(spread.shape)}")
    rates, vectors = torch.linalg.eigh(A)
    decay = (vectors * torch.exp(-rates * t)) @ vectors.T
    noise = (vectors * (-torch.expm1(-2 * rates * t) / rates)) @ vectors.T
    return b + decay @ (start - b), decay @ spread @ decay + noise


def barenblatt(t: float, x: Tensor, m: float) -> Tensor:
    """Density (k,) at points x (k, d) of the porous medium flow, at time t > 0 if all mass is at the origin at time 0.

    With ``alpha = d / (d (m-1) + 2)``, ``beta = (m-1) alpha / (2 m d)``, and C such that the mass is one, it is
    ``t^{-alpha} (C - beta |x|^2 t^{-2 alpha/d})_+^{1/(m-1)}``, a solution of ``d rho/dt = Laplacian of rho^m``.

    Raises
    ------
    ValueError
        If t <= 0, m <= 1, x is not a cloud, or t or m is so extreme that the density overflows.

    Source
    ------
    Fan et al. (2022), Section 5.4, where C is left free.

    Used in
    -------
    :prf:ref:`thm-porous-medium`
    """
    t, m = _read_profile(t, m)
    read_clouds(x=x)
    d, p = x.shape[-1], 1 / (m - 1)
    try:
        alpha, beta, height = _profile(d, m)
        # lengths in units of the support's, so that nothing overflows but the density itself
        near = (height - (x / t ** (alpha / d)).square().sum(-1) * beta).clamp_min(0)
        density = t**-alpha * near**p
    except (OverflowError, ZeroDivisionError):
        density = x.new_full(x.shape[:-1], math.nan)
    if not bool(torch.isfinite(density).all()):
        raise ValueError(f"t and m must be less extreme, got {t!r} and {m!r}: the density overflows")
    return density


def _read_profile(t: float, m: float) -> tuple[float, float]:
    t, m = read_positive(t=t, m=m)
    if m <= 1:
        raise ValueError(f"m must be greater than 1, got {m!r}")
    return t, m


def _profile(d: int, m: float) -> tuple[float, float, float]:
    """Exponent alpha, slope beta, and the height C that makes the mass one."""
    p = 1 / (m - 1)
    alpha = d / (d * (m - 1) + 2)
    beta = (m - 1) * alpha / (2 * m * d)
    # the mass of (C - beta |x|^2)_+^p is C^{p + d/2} times the exponential of this
    log_mass = d / 2 * math.log(math.pi / beta) + math.lgamma(p + 1) - math.lgamma(p + 1 + d / 2)
    return alpha, beta, math.exp(-log_mass / (p + d / 2))


def barenblatt_radius(t: float, d: int, m: float) -> float:
    """Radius ``(C / beta)^{1/2} t^{alpha/d}`` of the ball that :func:`barenblatt` fills at time t > 0, a length.

    Raises
    ------
    ValueError
        If t <= 0, m <= 1, d is not a positive integer, or they are so extreme that the radius overflows.

    Used in
    -------
    :class:`nsgf_lite.targets.Barenblatt`
    """
    t, m = _read_profile(t, m)
    (d,) = read_counts(d=d)
    try:
        alpha, beta, height = _profile(d, m)
        radius = math.sqrt(height / beta) * t ** (alpha / d)
    except (OverflowError, ZeroDivisionError, ValueError):
        radius = math.nan
    if not 0 < radius < math.inf:
        raise ValueError(f"t and m must be less extreme, got {t!r} and {m!r}: the radius overflows")
    return radius


def _pair(a: Vector, A: Matrix, b: Vector, B: Matrix) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Read two Gaussians of one dimension."""
    A, B = _covariance("A", A), _covariance("B", B)
    if A.shape != B.shape:
        raise ValueError(f"A and B must have one size, got {tuple(A.shape)} and {tuple(B.shape)}")
    return _mean("a", a, len(A)), A, _mean("b", b, len(A)), B


def gaussian_ksd(a: Vector, A: Matrix, b: Vector, B: Matrix, h: float) -> Tensor:
    """What :func:`nsgf_lite.metrics.ksd` estimates for points of N(a, A) and the score of N(b, B), a scalar.

    With ``S = B^{-1}``, ``c = S (a - b)`` and ``T = (A^{-1}/2 + I/h^2)^{-1}`` it is ``det(I + 2A/h^2)^{-1/2}`` times
    ``|c|^2 + tr(S A S)/2 + d/h^2 - tr(S^2 T)/4 - tr(S T)/h^2 - tr(T)/h^4``.

    Two points are ``a + (s + u)/2`` and ``a + (s - u)/2`` with independent s, u of law N(0, 2A). The kernel sees u
    alone: it turns u's law into N(0, T), times the determinant; and the mean over s and u of what stands beside the
    kernel, a quadratic polynomial, is the second factor. It is zero if the Gaussians are one.

    Raises
    ------
    ValueError
        If a covariance is not symmetric positive definite, the sizes differ, h is not positive, or they are so extreme
        that the value overflows.

    Source
    ------
    The discrepancy is Liu, Lee, Jordan (2016), Theorem 3.6; its value for Gaussians is ours.
    """
    a, A, b, B = _pair(a, A, b, B)
    h, d = read_positive(h=h)[0], len(A)
    if not 1e-50 < h < 1e50:
        raise ValueError(f"h must lie between 1e-50 and 1e+50, got {h!r}")
    S, one = torch.linalg.inv(B), torch.eye(d, dtype=torch.float64)
    c, square = S @ (a - b), h * h
    T = torch.linalg.solve(one + 2 * A / square, 2 * A)
    inside = c @ c + (S @ A @ S).trace() / 2 + d / square
    inside = inside - (S @ S @ T).trace() / 4 - (S @ T).trace() / square - T.trace() / square**2
    value = inside * torch.exp(-torch.linalg.slogdet(one + 2 * A / square).logabsdet / 2)
    if not bool(torch.isfinite(value)):
        raise ValueError("the covariances and h must be less extreme: their discrepancy is not a number in float64")
    return value
