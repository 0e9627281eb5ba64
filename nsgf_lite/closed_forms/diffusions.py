"""Two flows of densities in closed form: Ornstein and Uhlenbeck's diffusion, and the porous medium; all in float64."""

import math

import torch
from torch import Tensor

from nsgf_lite.closed_forms.gaussians import Matrix, Vector, _covariance, _mean
from nsgf_lite.inputs import read_clouds, read_positive, read_sizes


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
    t, m = read_positive(t=t, m=m)
    read_clouds(x=x)
    if m <= 1:
        raise ValueError(f"m must be greater than 1, got {m!r}")
    d, p = x.shape[-1], 1 / (m - 1)
    alpha = d / (d * (m - 1) + 2)
    beta = (m - 1) * alpha / (2 * m * d)
    # the mass of (C - beta |x|^2)_+^p is C^{p + d/2} times the exponential of this
    log_mass = d / 2 * math.log(math.pi / beta) + math.lgamma(p + 1) - math.lgamma(p + 1 + d / 2)
    try:
        height = math.exp(-log_mass / (p + d / 2))
        # lengths in units of the support's, so that nothing overflows but the density itself
        near = (height - (x / t ** (alpha / d)).square().sum(-1) * beta).clamp_min(0)
        density = t**-alpha * near**p
    except (OverflowError, ZeroDivisionError):
        density = x.new_full(x.shape[:-1], math.nan)
    if not bool(torch.isfinite(density).all()):
        raise ValueError(f"t and m must be less extreme, got {t!r} and {m!r}: the density overflows")
    return density
