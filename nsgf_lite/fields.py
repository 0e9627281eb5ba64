"""Velocity fields: small frozen dataclasses of hyperparameters, all called ``field(x, y, at=None, a=None, b=None)``."""

from dataclasses import dataclass
from typing import Protocol

import ot
import torch
from torch import Generator, Tensor

from nsgf_lite.inputs import read_clouds, read_weights
from nsgf_lite.sinkhorn import Potentials, barycentric_map

Warm = dict[str, Potentials]


class Field(Protocol):
    """A velocity of particles x (n, d) towards data y (m, d), at the particles or at other points (k, d)."""

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


@dataclass(frozen=True)
class Sinkhorn:
    """Velocity of the Wasserstein gradient flow of the Sinkhorn divergence to the data.

    ``v(z) = T_xy(z) - T_xx(z)``, a difference of two barycentric projections: towards the data, away from the crowd.

    Parameters
    ----------
    eps : float
        Temperature, in units of squared length (the cost is ``|x - y|^2 / 2``).
    tol : float
        L1 marginal error at which the two solves stop; a :class:`nsgf_lite.ConvergenceWarning` where one does not.

    Raises
    ------
    ValueError
        When called, as :func:`nsgf_lite.potentials`.

    Source
    ------
    Zhu et al. (2024), Theorem 1 and equation 13.

    Used in
    -------
    :prf:ref:`thm-first-variation`, :prf:ref:`thm-sinkhorn-velocity`, :prf:ref:`thm-velocity-lipschitz`,
    :prf:ref:`thm-velocity-stability`, :prf:ref:`thm-gaussian-stays-gaussian`, :prf:ref:`thm-overshoot`
    """

    eps: float
    tol: float = 1e-4

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
        """Velocity (n, d) of the particles x towards the data y, or (k, d) at the points `at`.

        ``warm``, a dict, is read for potentials to start from and left with the new ones: keep one along a path.
        """
        memory: Warm = {} if warm is None else warm

        def images(role: str, z: Tensor, weights: Tensor | None) -> Tensor:
            T = barycentric_map(x, z, self.eps, a, weights, tol=self.tol, init=memory.get(role))
            memory[role] = T.solution
            return T(at)

        return images("towards", y, b) - images("away", x, a)


@dataclass(frozen=True)
class Wasserstein:
    """Velocity of the flow of ``W_2^2 / 2``: the exact plan's barycentric projection minus the particle.

    Defined at the particles only: the exact potential has kinks between them.

    Raises
    ------
    ValueError
        When called, as :func:`exact_plan`, or if `at` is given.

    Source
    ------
    Ambrosio, Gigli, Savaré (2008), Theorem 8.4.7; the plan by POT's network simplex.

    Used in
    -------
    :prf:ref:`thm-geometric-approach`, :doc:`/book/optimal_transport`, :doc:`/book/mean_field_limit`
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
        """Velocity (n, d) of the particles x (n, d) towards the data y (m, d); particles of weight zero rest."""
        if at is not None:
            raise ValueError("at must be None: the exact plan gives a velocity at the particles only")
        P = exact_plan(x, y, a, b)
        mass = P.sum(1, keepdim=True)
        return torch.where(mass > 0, P @ y.to(P) / mass.clamp_min(1e-300) - x.to(P), 0.0).to(x)


def exact_plan(x: Tensor, y: Tensor, a: Tensor | None = None, b: Tensor | None = None) -> Tensor:
    """Optimal coupling (n, m) for the squared distance, in float64 on the CPU, by POT's network simplex.

    Raises
    ------
    ValueError
        As :func:`nsgf_lite.potentials`, or if the clouds are batches.

    Used in
    -------
    :doc:`/book/sinkhorn_divergence`
    """
    read_clouds(x=x, y=y)
    if x.ndim != 2:
        raise ValueError(f"x must have shape (n, d), one cloud, got {tuple(x.shape)}")
    a, b = read_weights("a", a, x), read_weights("b", b, y)
    X, Y, a, b = (t.detach().double().cpu() for t in (x, y, a, b))
    plan = ot.emd(
        (a / a.sum()).numpy(),
        (b / b.sum()).numpy(),
        torch.cdist(X, Y, compute_mode="donot_use_mm_for_euclid_dist").square().numpy(),
        numItermax=10_000_000,
    )
    return torch.from_numpy(plan).to(x.device)
