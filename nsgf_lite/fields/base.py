"""How every field is called, and the Gaussian and Laplace affinities that most of them are made of."""

import math
import warnings
from typing import Protocol

import torch
from torch import Generator, Tensor

from nsgf_lite.inputs import read_clouds, read_weights
from nsgf_lite.transport.sinkhorn import Potentials, _outside
from nsgf_lite.transport.solver import PLANE, affinity

Warm = dict[str, Potentials]


class UnderflowWarning(UserWarning):
    """All affinities between particles and data are zero to machine precision; the message says at which distance."""


class Field(Protocol):
    """A velocity of particles x (n, d) towards data y (m, d), at the particles or at other points (k, d).

    Batches (b, n, d), (b, m, d) and (b, k, d) are taken by every field but :class:`Wasserstein` and :class:`Critic`.
    """

    def __call__(
        self,
        x: Tensor,
        y: Tensor,
        at: Tensor | None = None,
        a: Tensor | None = None,
        b: Tensor | None = None,
        generator: Generator | None = None,
        warm: Warm | None = None,
    ) -> Tensor:
        """Velocity (n, d), or (k, d) at the points `at`."""
        ...


class Formula:
    """A field that is a formula in the particles, the data and their weights: what reads its arguments."""

    def __call__(
        self,
        x: Tensor,
        y: Tensor,
        at: Tensor | None = None,
        a: Tensor | None = None,
        b: Tensor | None = None,
        generator: Generator | None = None,
        warm: Warm | None = None,
    ) -> Tensor:
        """Velocity (n, d) of the particles x (n, d) towards the data y (m, d), or (k, d) at the points `at`.

        Weights a (n,), b (m,) are uniform if None; differentiable in x and `at`; `warm` is not used. A
        FloatingPointError where a velocity is too large for the dtype.
        """
        points = {} if at is None else {"at": at}
        read_clouds(x=x, y=y, **points)
        a, b = read_weights("a", a, x), read_weights("b", b, y)
        velocity = self._velocity(x, y, at, a, b, generator)
        finite = torch.isfinite(velocity.detach()).all(-1)
        if not bool(finite.all()):
            raise FloatingPointError(f"{self} is too large for {x.dtype} at {int((~finite).sum())} points")
        return velocity

    def _velocity(
        self, x: Tensor, y: Tensor, at: Tensor | None, a: Tensor, b: Tensor, generator: Generator | None
    ) -> Tensor:
        raise NotImplementedError


def log_kernel(x: Tensor, y: Tensor, h: float | Tensor, kernel: str = "gaussian", own: bool = False) -> Tensor:
    """Exponents (…, n, m): ``-|x-y|^2 / (2 h^2)``, or ``-|x-y| / h`` for the Laplace kernel; `own` says that y is x.

    Raises
    ------
    ValueError
        If the bandwidth is so small, or the points so far, that an exponent overflows (or a sum of a few would).
    """
    centre = y.detach().mean(-2, keepdim=True)
    H, p, q = affinity(x - centre, y - centre)
    cost = -H if x.shape[-1] <= PLANE else (p.unsqueeze(-1) + q.unsqueeze(-2) - H).clamp_min(0)
    if own and x.shape[-1] > PLANE:  # where rounding would leave a point at some distance from itself
        cost = cost.masked_fill(torch.eye(x.shape[-2], dtype=torch.bool, device=x.device), 0)
    if kernel == "gaussian":
        exponent = cost / -(h * h)
    else:  # the root has no derivative at zero; a constant there has
        exponent = torch.where(cost > 0, (2 * cost.clamp_min(torch.finfo(x.dtype).tiny)).sqrt(), 0) / -h
    if not float(exponent.detach().amin()) > -torch.finfo(x.dtype).max / 16:
        shown = float(h) if not isinstance(h, Tensor) else float(h.min())
        furthest = (2 * float(cost.detach().amax())) ** 0.5
        raise ValueError(f"|x-y|/h overflows: h must be larger for points {furthest:.3g} apart, got {shown:g}")
    return exponent


def median_distance(x: Tensor, y: Tensor) -> Tensor:
    """Median distance between distinct points of both clouds, shape (…, 1, 1); one if all points coincide."""
    z = torch.cat([x, y], -2).detach()
    distance = torch.cdist(z, z, compute_mode="donot_use_mm_for_euclid_dist").flatten(-2)
    h = torch.where(distance > 0, distance, torch.nan).nanmedian(-1).values
    return h.nan_to_num(1.0)[..., None, None]


def warn_underflow(largest: Tensor, x: Tensor, y: Tensor) -> None:
    """Warn if the largest exponent of each problem of the batch says that nothing is left of the data's pull."""
    gone = largest.detach() < math.log(torch.finfo(x.dtype).tiny)
    if not bool(gone.any()):
        return
    nearest = float(torch.cdist(x.detach(), y.detach()).amin())
    warnings.warn(
        f"every affinity between particles and data underflows in {int(gone.sum())} of {gone.numel()} problems (the "
        f"nearest pair of all is {nearest:.3g} apart): the data's pull is zero there; a larger bandwidth would help.",
        UnderflowWarning,
        stacklevel=_outside(),
    )
