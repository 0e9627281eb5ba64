"""Stein's variational gradient: a field towards a law that is known by its log density, with no data of it."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from nsgf_lite.fields.base import Warm, log_kernel
from nsgf_lite.inputs import exact, read_clouds, read_generator, read_parameters, read_weights
from nsgf_lite.transport.solver import centre, gathered

LogDensity = Callable[[Tensor], Tensor]


@exact
@torch.inference_mode(False)
@torch.enable_grad()
def score(log_density: LogDensity, x: Tensor) -> Tensor:
    """Gradient (n, d) of a log density at the points x (n, d), by automatic differentiation; one over length.

    `log_density` takes points (k, d) and gives their values (k,), each a function of its own point alone. What it lacks
    of being normalised does not matter. The gradient is not differentiable once more.

    Raises
    ------
    ValueError
        If x is not a cloud, `log_density` not a function, one of its values NaN or +inf or their shape another one, or
        the gradient is not finite or does not exist.

    Used in
    -------
    :class:`Stein`, :func:`nsgf_lite.langevin`, :func:`nsgf_lite.metrics.ksd`
    """
    read_clouds(x=x)
    if not callable(log_density):
        raise ValueError(f"log_density must be a function of points (n, d), got {log_density!r}")
    z = x.detach().clone().reshape(-1, x.shape[-1]).requires_grad_()
    n, value = len(z), log_density(z)
    if not isinstance(value, Tensor) or value.shape != (n,):
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"log_density must give one value for each point, shape ({n},), got {got}")
    wrong = torch.isnan(value) | torch.isposinf(value)
    if bool(wrong.any()):
        raise ValueError(
            f"log_density must be a number below +inf, got NaN or +inf at {int(wrong.sum())} of {n} points"
        )
    slope = None
    if value.requires_grad:
        (slope,) = torch.autograd.grad(value, z, torch.ones_like(value), allow_unused=True)
    if slope is None:
        raise ValueError("log_density must be differentiable by autograd, got values that no point's gradient reaches")
    wrong = ~torch.isfinite(slope).all(-1)
    if bool(wrong.any()):
        raise ValueError(f"log_density must have a finite gradient, got NaN or inf at {int(wrong.sum())} of {n} points")
    return slope.view(x.shape)


@dataclass(frozen=True)
class Stein:
    """Stein variational gradient descent: ``sum_j a_j [k(x_j, z) grad log p(x_j) + grad_{x_j} k(x_j, z)]`` at z.

    The steepest descent of KL(q | p) in the space of the Gaussian kernel ``k(x, z) = exp(-|x - z|^2 / (2h^2))``. It has
    no data: `y` must be None, as it is in ``nl.follow(field, x, None, step, steps)``. In units of one over length;
    not differentiable.

    Parameters
    ----------
    log_density : callable
        Log density of the target up to a constant, ``(n, d) -> (n,)``, as :func:`score` takes it.
    h : float or None
        Bandwidth, in units of length; None for the heuristic of the authors' code, ``h^2 = m / (2 log(n + 1))``, with m
        the median of ``|x_i - x_j|^2`` over all n² pairs, a particle with itself included (their paper has log n, and
        says why: then each particle's kernels sum to about one). If m is zero, h is one.

    Raises
    ------
    ValueError
        If h is not positive; when called, if `y` or `b` is given, clouds or weights do not fit, or as :func:`score`.
    FloatingPointError
        When called, if a velocity is too large for the dtype.

    Source
    ------
    Liu and Wang (2016), equation 8 and Algorithm 1; the bandwidth is that of their published ``svgd.py``.
    """

    log_density: LogDensity
    h: float | None = None

    def __post_init__(self) -> None:
        if not callable(self.log_density):
            raise ValueError(f"log_density must be a function of points (n, d), got {self.log_density!r}")
        if self.h is not None:
            read_parameters(self, positive="h")

    @exact
    @torch.no_grad()
    def __call__(
        self,
        x: Tensor,
        y: Tensor | None = None,
        at: Tensor | None = None,
        a: Tensor | None = None,
        b: Tensor | None = None,
        generator: Generator | None = None,
        warm: Warm | None = None,
    ) -> Tensor:
        """Velocity (n, d) of the particles x (n, d), or (k, d) at the points `at`; weights a (n,), uniform if None."""
        if y is not None or b is not None:
            raise ValueError("y and b must be None: the target is known by its log density, and has no data")
        read_clouds(x=x, **({} if at is None else {"at": at}))
        read_generator(generator)
        weighed, a = a is not None, read_weights("a", a, x)
        z = x if at is None else at
        idle = weighed and bool((a == 0).any())
        h = self.h or self._bandwidth(x, a)
        x = gathered(x, a) if idle else x
        slope, origin = score(self.log_density, x), centre(x)
        x, z = x - origin, z - origin
        K = log_kernel(z, x, h, own=at is None and not idle).exp() * a.unsqueeze(-2)
        push = K.sum(-1, keepdim=True) * z - K @ x
        velocity = K @ slope + push / h / h
        if not bool(torch.isfinite(velocity).all()):
            raise FloatingPointError(f"the velocity is too large for {x.dtype}: a larger h than {self.h}?")
        return velocity

    def _bandwidth(self, x: Tensor, a: Tensor) -> float | Tensor:
        """The heuristic, of the particles that have weight; for a batch, one for each problem, (b, 1, 1)."""
        if x.ndim == 3:
            each = [self._bandwidth(cloud, mass) for cloud, mass in zip(x, a, strict=True)]
            return x.new_tensor(each)[:, None, None]
        z = x.detach()[a > 0]
        square = torch.cdist(z, z, compute_mode="donot_use_mm_for_euclid_dist").square().flatten()
        middle = [square.kthvalue(k).values for k in ((len(square) + 1) // 2, len(square) // 2 + 1)]
        median = float(middle[0] + middle[1]) / 2
        return math.sqrt(median / (2 * math.log(len(z) + 1))) or 1.0
