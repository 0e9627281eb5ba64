"""How every field is called, and the Gaussian and Laplace affinities that most of them are made of."""

import math
import warnings
from typing import ClassVar, Protocol

import torch
from torch import Generator, Tensor

from nsgf_lite.inputs import LARGEST, exact, read_clouds, read_generator, read_weights
from nsgf_lite.transport.problem import Potentials, _outside
from nsgf_lite.transport.solver import PLANE, affinity, centre, gathered

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
    """A field that is a formula in the particles, the data and their weights: what reads its arguments.

    It is worked out around the centre of the data, which no velocity depends on, with the points of weight zero out of
    the way.
    """

    anywhere: ClassVar[bool] = True  # whether the velocity is defined at other points than the particles

    @exact
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
        read_generator(generator)
        given, a, b = (a, b), read_weights("a", a, x), read_weights("b", b, y)
        idle_x, idle_y = (w is not None and bool((w == 0).any()) for w in given)
        there = x if idle_x and at is None and self.anywhere else None
        x, y = gathered(x, a) if idle_x else x, gathered(y, b) if idle_y else y
        origin = centre(y)
        x, y = x - origin, y - origin
        at, there = (None if z is None else z - origin for z in (at, there))
        velocity = self._velocity(x, y, at, a, b, generator)
        if there is not None:  # particles of weight zero have the velocity of the points where they are
            velocity = torch.where((a > 0).unsqueeze(-1), velocity, self._velocity(x, y, there, a, b, generator))
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
    d, rounding = x.shape[-1], torch.finfo(x.dtype).eps
    inner = d > PLANE
    if inner:
        origin = centre(y)
        H, p, q = affinity(x - origin, y - origin)
        # of the largest cost, beside the square of a length that hardly matters to the kernel
        inner = bool(rounding * (p.amax() + q.amax()) < (2**-9 if kernel == "gaussian" else 2**-11) * _square(h))
    if inner:
        cost = (p.unsqueeze(-1) + q.unsqueeze(-2) - H).clamp_min(0)
        if own:  # where rounding would leave a point at some distance from itself
            cost = cost.masked_fill(torch.eye(x.shape[-2], dtype=torch.bool, device=x.device), 0)
    else:
        cost = -affinity(x, y, d)[0]
    if kernel == "gaussian":
        exponent = cost / -(h * h)
    else:  # the root has no derivative at zero; a constant there has
        exponent = torch.where(cost > 0, (2 * cost.clamp_min(torch.finfo(x.dtype).tiny)).sqrt(), 0) / -h
    shown = float(h) if not isinstance(h, Tensor) else float(h.min())
    if not float(exponent.detach().amin()) > -torch.finfo(x.dtype).max / 16:
        furthest = (2 * float(cost.detach().amax())) ** 0.5
        raise ValueError(f"|x-y|/h overflows: h must be larger for points {furthest:.3g} apart, got {shown:g}")
    if shown * LARGEST[x.dtype] < 1:
        least = f"{1 / LARGEST[x.dtype]:g} for points in {x.dtype}"
        raise ValueError(f"|x-y|/h overflows, or |x-y|^2 vanishes: h must be larger, at least {least}, got {shown:g}")
    return exponent


def _square(h: float | Tensor) -> float:
    """The smallest bandwidth squared."""
    return float(h.min()) ** 2 if isinstance(h, Tensor) else h * h


def median_distance(x: Tensor, y: Tensor, a: Tensor | None = None, b: Tensor | None = None) -> Tensor:
    """Median distance between distinct points of both clouds, shape (…, 1, 1); one if all points coincide.

    Points of weight zero, if there are weights, do not count.
    """
    z = torch.cat([x, y], -2).detach()
    distance = torch.cdist(z, z, compute_mode="donot_use_mm_for_euclid_dist")
    counts = distance > 0
    if a is not None and b is not None:
        there = torch.cat([a, b], -1) > 0
        counts &= there.unsqueeze(-1) & there.unsqueeze(-2)
    h = torch.where(counts, distance, torch.nan).flatten(-2).nanmedian(-1).values
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
