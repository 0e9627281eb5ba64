"""Steps in time in closed form: down ``KL( . || N(b, B))`` between Gaussians, and down ``1/(m-1) ∫P^m`` between
profiles of Barenblatt; and two divergences of Gaussians. Everything in float64.
"""

import math

import torch
from scipy.optimize import brentq
from torch import Tensor

from nsgf_lite.closed_forms.diffusions import _read_profile
from nsgf_lite.closed_forms.gaussians import Matrix, Vector
from nsgf_lite.closed_forms.segments import Law, _pair
from nsgf_lite.inputs import read_counts, read_positive

SCHEMES = ("jko", "explicit", "crank-nicolson", "trapezoid")


def _laws(mean: Vector, covariance: Matrix, target_mean: Vector, target_covariance: Matrix) -> tuple[Law, Law]:
    return _pair(
        ("mean", mean, "covariance", covariance),
        ("target_mean", target_mean, "target_covariance", target_covariance),
    )


def gaussian_kl(mean: Vector, covariance: Matrix, target_mean: Vector, target_covariance: Matrix) -> Tensor:
    """Kullback-Leibler divergence ``KL(N(m, S) || N(b, B))``, a scalar without unit.

    ``(tr B^{-1}S - d - log det B^{-1}S + (m-b)' B^{-1} (m-b)) / 2``.

    Raises
    ------
    ValueError
        If a covariance is not symmetric positive definite, the sizes differ, or a covariance is singular to rounding.

    Used in
    -------
    :prf:ref:`thm-f-duality`, :prf:ref:`thm-kl-reference`, :prf:ref:`thm-moment-projection`,
    :prf:ref:`thm-jko-gaussian`, :prf:ref:`thm-crank-nicolson`, :func:`nsgf_lite.metrics.symmetric_kl`
    """
    (m, S), (b, B) = _laws(mean, covariance, target_mean, target_covariance)
    root = torch.linalg.cholesky(B)
    inner = torch.linalg.solve_triangular(root, torch.linalg.cholesky(S), upper=False)
    gap = torch.linalg.solve_triangular(root, (m - b).unsqueeze(1), upper=False)
    # tr(C) - d - log det(C) of C = inner inner^T, by its eigenvalues, so that little is lost where they are near one
    excess = torch.linalg.eigvalsh(inner @ inner.T) - 1
    value = (excess - torch.log1p(excess)).sum() / 2 + gap.square().sum() / 2
    if not bool(torch.isfinite(value)):
        raise ValueError("the covariances must be better conditioned: their divergence is not a number in float64")
    return value


def gaussian_chi2(mean: Vector, covariance: Matrix, target_mean: Vector, target_covariance: Matrix) -> Tensor:
    """Pearson's divergence ``chi2(N(m, S) || N(b, B))``, the variance of the ratio of the densities under N(b, B).

    With ``d = m - b`` it is ``det B det S^{-1/2} det(2B - S)^{-1/2} exp(d' (2B - S)^{-1} d) - 1``, a scalar without
    unit, and infinite unless ``2B - S`` is positive definite.

    Raises
    ------
    ValueError
        As :func:`gaussian_kl`.

    Used in
    -------
    :prf:ref:`thm-f-duality`, :prf:ref:`thm-kl-reference`, :prf:ref:`thm-moment-projection`,
    :prf:ref:`thm-critic-class`, :prf:ref:`thm-critic-gap`
    """
    (m, S), (b, B) = _laws(mean, covariance, target_mean, target_covariance)
    room = 2 * B - S
    spectrum, vectors = torch.linalg.eigh(room)
    if float(spectrum[0]) <= 0:
        return torch.tensor(math.inf, dtype=torch.float64)
    shift = (vectors.T @ (m - b)).square() @ (1 / spectrum)
    return torch.expm1(torch.logdet(B) - torch.logdet(S) / 2 - spectrum.log().sum() / 2 + shift)


def jko_gaussian(
    mean: Vector,
    covariance: Matrix,
    target_mean: Vector,
    target_covariance: Matrix,
    step: float,
    scheme: str = "jko",
) -> Law:
    """Mean (d,) and covariance (d, d) after one step from N(m, S) down ``KL( . || N(b, B))``.

    Parameters
    ----------
    mean, covariance : float or Tensor
        m and S.
    target_mean, target_covariance : float or Tensor
        b and B.
    step : float
        Its size a, in units of squared length.
    scheme : str
        "jko", the minimiser of ``W_2^2 / 2a + F``: with ``M = I + a B^{-1}`` its covariance is
        ``M^{-1/2} Y M^{-1/2}``, where ``Y - 2a I + a^2 Y^{-1} = M^{-1/2} S M^{-1/2}`` and ``Y >= a I``.
        "explicit", the push-forward by ``x - a grad log(P_k / Q)``. "crank-nicolson", the minimiser of
        ``W_2^2 / 2a + F / 2 + int (dF/dP)(P_k) dP / 2``. "trapezoid", half an explicit and then half a JKO step.

    Raises
    ------
    ValueError
        If a covariance is not symmetric positive definite, the sizes differ, step <= 0, the scheme is unknown, the
        Crank-Nicolson objective has no minimum (``I + a B^{-1} - a S^{-1} / 2`` is not positive definite), or the
        explicit step flattens a direction.

    Source
    ------
    Fan et al. (2022), Proposition 4.5 (for S = B = I) and Appendix B; the closed forms are derived in the chapter.

    Used in
    -------
    :prf:ref:`thm-jko-gaussian`, :prf:ref:`thm-implicit-explicit`, :prf:ref:`thm-crank-nicolson`,
    :prf:ref:`thm-jko-particles`, :prf:ref:`thm-rademacher`
    """
    start, (b, B) = _laws(mean, covariance, target_mean, target_covariance)
    (a,) = read_positive(step=step)
    if scheme not in SCHEMES:
        raise ValueError(f"scheme must be one of {', '.join(SCHEMES)}, got {scheme!r}")
    precision = torch.cholesky_inverse(torch.linalg.cholesky(B))
    if scheme == "explicit":
        return _explicit(*start, b, precision, a)
    if scheme == "trapezoid":
        return _implicit(*_explicit(*start, b, precision, a / 2), b, precision, a / 2, 1.0)
    return _implicit(*start, b, precision, a, 1.0 if scheme == "jko" else 0.5)


def _explicit(m: Tensor, S: Tensor, b: Tensor, precision: Tensor, a: float) -> Law:
    eye = torch.eye(len(m), dtype=torch.float64)
    slope = eye + a * (torch.cholesky_inverse(torch.linalg.cholesky(S)) - precision)
    factor = slope @ torch.linalg.cholesky(S)
    if float(torch.linalg.eigvalsh(slope).abs().min()) <= 1e-12 * float(slope.abs().max()):
        raise ValueError(
            f"step must not flatten a direction, got {a!r} with an explicit step of slope {slope.tolist()}"
        )
    return m - a * precision @ (m - b), factor @ factor.T


def _implicit(m: Tensor, S: Tensor, b: Tensor, precision: Tensor, a: float, share: float) -> Law:
    """Minimiser of ``W_2^2 / 2a`` plus `share` of KL plus the rest of it with its first variation frozen at N(m, S)."""
    eye = torch.eye(len(m), dtype=torch.float64)
    frozen = (1 - share) * a * torch.cholesky_inverse(torch.linalg.cholesky(S))
    M = eye + a * precision - frozen
    values, vectors = torch.linalg.eigh(M)
    if float(values[0]) <= 0:
        raise ValueError(f"step must leave the objective a minimum, got {a!r} with M = {M.tolist()}")
    half = (vectors / values.sqrt()) @ vectors.T
    spread, axes = torch.linalg.eigh(half @ S @ half)
    spread, own = spread.clamp_min(0), share * a
    root = (axes * ((spread.sqrt() + (spread + 4 * own).sqrt()) / 2)) @ axes.T  # of Y
    factor = half @ root
    goal = b + torch.linalg.solve(M, (eye - frozen) @ (m - b))
    return goal, factor @ factor.T


def jko_barenblatt(t: float, step: float, d: int, m: float) -> float:
    """Age s of Barenblatt's profile after one JKO step down ``1/(m-1) ∫P^m`` from the profile of age t.

    A step leads from one :func:`barenblatt` to another, with ``s (1 - (t/s)^γ) = step γ`` and ``γ = 1/(d(m-1) + 2)``.
    It is younger than the flow: ``s < t + step``, up to rounding.

    Parameters
    ----------
    t, step : float
        Both in the flow's unit of time.
    d : int
        Dimension.
    m : float
        Power, greater than one.

    Raises
    ------
    ValueError
        If t, step or d is not positive, or m <= 1.

    Source
    ------
    The experiment is Fan et al. (2022), Section 5.4; the closed form is derived in the chapter.

    Used in
    -------
    :prf:ref:`thm-jko-barenblatt`
    """
    t, m = _read_profile(t, m)
    (step,), (d,) = read_positive(step=step), read_counts(d=d)
    gamma, share = 1 / (d * (m - 1) + 2), step / t
    # in units of t, the step's end as 1 + r: the left side lies below the right at r = 0, above it at r = share and, so
    # that rounding cannot hide it, at twice that
    r = brentq(lambda r: -(1 + r) * math.expm1(-gamma * math.log1p(r)) - gamma * share, 0.0, 2 * share, xtol=1e-300)
    return t * (1 + float(r))
