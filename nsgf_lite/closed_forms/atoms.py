"""Few atoms: what each velocity field does to two modes of unequal mass, and a field with a curl, in closed form.

Cost ``|x - y|^2 / 2``, temperature `eps` and bandwidth `h` with ``eps = h^2``, everything in float64.
"""

import math
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from nsgf_lite.inputs import LARGEST, read_clouds, read_positive


def _read_masses(alpha: float, beta: float) -> tuple[float, float]:
    masses: dict[str, Any] = {"alpha": alpha, "beta": beta}
    for name, mass in masses.items():
        number = isinstance(mass, Real) and not isinstance(mass, bool)
        if not (number and 0 < mass < 1):
            raise ValueError(f"{name} must lie strictly between 0 and 1, got {mass!r}")
    return float(alpha), float(beta)


def _read_lengths(**lengths: float) -> list[float]:
    """Positive numbers that can be squared and divided by one another; ValueError names the one that cannot."""
    least, most = 1 / LARGEST[torch.float32], LARGEST[torch.float32]
    for name, value in zip(lengths, read_positive(**lengths), strict=True):
        if not least <= value <= most:
            raise ValueError(f"{name} must lie between {least:g} and {most:g}, got {value!r}")
    return [float(value) for value in lengths.values()]


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
    :prf:ref:`thm-two-atoms`, :prf:ref:`thm-two-modes-sinkhorn`, :prf:ref:`thm-cluster-split`
    """
    alpha, beta = _read_masses(alpha, beta)
    (distance,), (eps,) = _read_lengths(distance=distance), read_positive(eps=eps)
    k2 = torch.exp(torch.tensor(-(distance**2) / eps, dtype=torch.float64))
    linear = (beta - alpha) + k2 * (alpha + 1 - beta)
    constant = k2 * alpha * (1 - beta)
    root = (linear.square() + 4 * (1 - k2) * constant).sqrt()
    # Two forms of one root; each is free of subtraction on its side.
    return 2 * constant / (linear + root) if linear > 0 else (root - linear) / (2 * (1 - k2))


def two_atom_velocity(
    field: str, alpha: float, beta: float, distance: float, h: float, order: int | None = None
) -> float:
    """Velocity at the right one of two atoms, where the model has mass ``1 - beta`` and the data ``1 - alpha``.

    Exact, or to one or two orders as ``k = exp(-distance^2 / (2 h^2))`` tends to zero; in units of length, negative
    where the field moves mass to the left, as it should when ``alpha > beta``.

    Parameters
    ----------
    field : str
        ``scores`` (difference of smoothed scores), ``proxy`` (the one-shot Sinkhorn field), ``sinkhorn`` (converged,
        at ``eps = h^2``), or ``wasserstein`` (the exact plan's; needs ``alpha >= beta``).
    alpha, beta : float
        Mass on the left of the data, and of the model.
    distance, h : float
        Between the atoms, and of the kernel.
    order : int
        1 for the leading term, 2 for the next one added; None for the exact velocity. The two-term expansion of the
        Sinkhorn field needs ``alpha > beta``.

    Raises
    ------
    ValueError
        If a parameter is out of range.

    Source
    ------
    Leading terms: the note on drifting (2026), section 3.3; the exact forms, next orders and Sinkhorn's are ours.

    Used in
    -------
    :prf:ref:`thm-two-modes-scores`, :prf:ref:`thm-two-modes-proxy`, :prf:ref:`thm-two-modes-wasserstein`,
    :prf:ref:`thm-two-modes-sinkhorn`, :prf:ref:`thm-float32-horizon`, :prf:ref:`thm-cluster-split`
    """
    alpha, beta = _read_masses(alpha, beta)
    distance, h = _read_lengths(distance=distance, h=h)
    if order not in (None, 1, 2):
        raise ValueError(f"order must be None, 1 or 2, got {order!r}")
    k = math.exp(-(distance**2) / (2 * h**2))
    gap, left, right = alpha - beta, 1 - alpha, 1 - beta
    if field == "wasserstein":
        if gap < 0:
            raise ValueError(f"the exact plan's velocity is written for alpha >= beta, got {alpha!r} and {beta!r}")
        return -distance * gap / right
    if field == "sinkhorn":
        if order is None:
            moved, own = two_atom_mass(alpha, beta, distance, h**2), two_atom_mass(beta, beta, distance, h**2)
            return -distance * float(moved - own) / right
        if gap <= 0:
            raise ValueError(f"the expansion of the Sinkhorn field needs alpha > beta, got {alpha!r} and {beta!r}")
        return -distance * (gap / right - (k * math.sqrt(beta / right) if order == 2 else 0.0))
    here, there = left + alpha * k, right + beta * k  # data and model, blurred, at the right atom
    if field == "scores":
        if order is None:
            return -distance * k * gap / (here * there)
        next_order = 1 - k * (alpha / left + beta / right) if order == 2 else 1.0
        return -distance * k * gap / (left * right) * next_order
    if field == "proxy":
        if order is None:
            return -distance * k * gap / (there * math.sqrt((beta + right * k) * here))
        next_order = 1 - k * (beta / right + right / (2 * beta) + alpha / (2 * left)) if order == 2 else 1.0
        return -distance * k * gap / (right * math.sqrt(beta * left)) * next_order
    raise ValueError(f"field must be 'scores', 'proxy', 'sinkhorn' or 'wasserstein', got {field!r}")


def _cross(points: Tensor, h: float) -> tuple[Tensor, Tensor, Tensor]:
    """Coordinates in units of h squared, and the factor C, of the field of :func:`cross_velocity`."""
    read_clouds(points=points)
    (h,) = _read_lengths(h=h)
    if points.shape[-1] != 2:
        raise ValueError(f"points must have shape (k, 2), got {tuple(points.shape)}")
    u, v = (points.double() / h**2).unbind(-1)
    # log of sqrt(k*p k*q), and of the two constants that p and q are divided by
    log_cosh = [torch.logaddexp(t, -t) - math.log(2) for t in (u, v)]
    log_mix = -(points.double().square().sum(-1) + 1) / (2 * h**2) + (log_cosh[0] + log_cosh[1]) / 2
    log_scale = (-1 / h**2 + math.log1p(math.exp(-2 / h**2)) - math.log(2)) / 2
    return u, v, h**2 * torch.exp(log_mix - log_scale)


def cross_velocity(points: Tensor, h: float = 1.0) -> Tensor:
    """Velocity (k, 2) of the Sinkhorn proxy from atoms at (±1, 0) to atoms at (0, ±1), of mass one half each.

    ``C (-tanh(x/h^2), tanh(y/h^2)) / h^2`` with ``C`` the proxy's factor ``h^2 (k*p)(k*q) / sqrt(...)`` of its
    population form; for h = 1 its curl at (1, 1) is -0.710614, which is -0.943163 C.

    Raises
    ------
    ValueError
        If points are not a cloud in the plane, or h is not positive.

    Used in
    -------
    :doc:`/book/non_gradient_curl`, :prf:ref:`thm-cross-curl`
    """
    u, v, C = _cross(points, h)
    return (C / h**2).unsqueeze(-1) * torch.stack([-torch.tanh(u), torch.tanh(v)], -1)


def cross_curl(points: Tensor, h: float = 1.0) -> Tensor:
    """Curl (k,), ``d V_y / dx - d V_x / dy``, of :func:`cross_velocity`.

    Raises
    ------
    ValueError
        As :func:`cross_velocity`.

    Used in
    -------
    :doc:`/book/non_gradient_curl`, :prf:ref:`thm-cross-curl`, :prf:ref:`thm-loop-work`
    """
    u, v, C = _cross(points, h)
    return C / h**4 * (torch.tanh(u) * torch.tanh(v) - points[..., 0] * torch.tanh(v) - points[..., 1] * torch.tanh(u))
