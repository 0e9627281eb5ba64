"""The field of particles that attract and repel each other, with no data in it."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from nsgf_lite.fields.base import Formula, Warm
from nsgf_lite.inputs import read_clouds, read_weights

_BLOCK = 2**22  # coordinates of displacements that are held at once


@dataclass(frozen=True)
class Interaction(Formula):
    """Velocity ``-∫ grad W(z - x) dP(x)`` of the flow of the interaction energy, *with* its one half, of a potential W.

    There is no data: no y is needed, and to follow the field give None for it, ``nl.follow(field, x, None, …)``.
    Points at one place exert no force on each other: where W is smooth and even its
    slope is zero there, and where it is singular, a particle does not feel itself.

    Parameters
    ----------
    W : callable
        An even function of displacements (…, d), with values (…,); differentiated by torch.

    Raises
    ------
    ValueError
        If W is not callable; when called, if the clouds do not fit, or W does not give a differentiable tensor (…,).
        A FloatingPointError where a velocity is too large for the dtype.

    Source
    ------
    Fan et al. (2022), equations 15 and 17.

    Used in
    -------
    :prf:ref:`thm-interaction-flow`, :prf:ref:`thm-ring`, :prf:ref:`thm-semicircle`,
    :prf:ref:`thm-hermite-equilibrium`, :prf:ref:`thm-log-gas-steps`, :prf:ref:`thm-forward-backward`,
    :prf:ref:`thm-finite-volume`
    """

    W: Callable[[Tensor], Tensor]

    def __post_init__(self) -> None:
        if not callable(self.W):
            raise ValueError(f"W must be a function of displacements (…, d), got {self.W!r}")

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
        """Velocity (n, d) of the particles x (n, d), or (k, d) at the points `at`.

        Weights a (n,) are uniform if None; differentiable in x and `at`. Where y (m, d) and b (m,) are given they are
        read, to be clouds and weights that fit, and no more; `warm` is not used.
        """
        if y is not None:
            read_clouds(x=x, y=y)
            read_weights("b", b, y)
        return super().__call__(x, x, at, a, a, generator)

    def _velocity(
        self, x: Tensor, y: Tensor, at: Tensor | None, a: Tensor, b: Tensor, generator: Generator | None
    ) -> Tensor:
        points = x if at is None else at
        rows = max(1, _BLOCK // x.numel())
        return torch.cat([self._of_all(z, x, a) for z in points.split(rows, -2)], -2)

    def _of_all(self, z: Tensor, x: Tensor, a: Tensor) -> Tensor:
        """Minus the sum over all particles of the slopes of W, at some of the points."""
        with torch.inference_mode(False), torch.enable_grad():  # a caller without gradients wants the slope, too
            apart = z.unsqueeze(-2) - x.unsqueeze(-3)
            together = (apart == 0).all(-1, keepdim=True)
            apart = torch.where(together, torch.ones_like(apart), apart)
            tracked = apart.requires_grad
            apart = apart if tracked else apart.requires_grad_()
            value = self.W(apart)
            if not isinstance(value, Tensor) or value.shape != apart.shape[:-1] or not value.requires_grad:
                got = f"{tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(
                    f"W must take displacements {tuple(apart.shape)} to a tensor {tuple(apart.shape[:-1])} that torch "
                    f"can differentiate, got {got}"
                )
            (slope,) = torch.autograd.grad(value.sum(), apart, create_graph=tracked)
        slope = torch.where(together, torch.zeros_like(slope), slope)
        return -(a.unsqueeze(-1).unsqueeze(-3) * slope).sum(-2)
