"""Energies of a law without a critic: averages over its particles, over their pairs, or by the map's determinant."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nsgf_lite import fields
from nsgf_lite.functionals.base import Functional, LogDensity, Move, Reference, read_functions, read_values
from nsgf_lite.inputs import read_parameters
from nsgf_lite.networks import ICNN

_LAW = 1000  # particles that stand for the law in an interaction


@dataclass(frozen=True)
class FreeEnergy(Functional):
    """``KL(P|Q)`` for a density Q without a critic, up to an entropy: ``-E_P[log Q] - E[log det DT]``, T a gradient.

    The change of variables: what the map T does to the entropy of the law before it, which is left out. For maps that
    are :class:`nsgf_lite.networks.ICNN`.

    Parameters
    ----------
    log_density : callable
        As :class:`KL`.
    determinant : str
        ``exact``, of order d³, or ``sampled``, by Hutchinson's estimate of its gradient with conjugate gradients.
    iterations : int
        Largest number of conjugate gradients, if sampled.

    Raises
    ------
    ValueError
        If determinant is neither; in a JKO step, if the map is no gradient, or as :class:`KL`.

    Source
    ------
    Mokrov et al. (2021) (exact); Alvarez-Melis et al. (2021) (sampled); Fan et al. (2022), Section 3.3.

    Used in
    -------
    :class:`nsgf_lite.JKOFlow`
    """

    log_density: LogDensity
    determinant: str = "exact"
    iterations: int = 10

    def __post_init__(self) -> None:
        read_functions(log_density=self.log_density)
        if self.determinant not in ("exact", "sampled"):
            raise ValueError(f"determinant must be 'exact' or 'sampled', got {self.determinant!r}")
        read_parameters(self, counts="iterations")

    def on_particles(self, s: Tensor | None, x: Tensor, reference: Reference | None, move: Move | None) -> Tensor:
        """As :meth:`Functional.on_particles`."""
        assert move is not None
        if not isinstance(move.network, ICNN):
            raise ValueError(
                f"transport must make an ICNN for FreeEnergy, a gradient, got {type(move.network).__name__}"
            )
        value = read_values("log_density", self.log_density, x)
        if self.determinant == "exact" or move.exact:
            gain = torch.cat([move.network.log_det(part) for part in move.x.split(1000)])
        else:
            gain = move.network.log_det_surrogate(move.x, move.generator, self.iterations)
        return -value - gain


@dataclass(frozen=True)
class Potential(Functional):
    """``E_P[V]``.

    Parameters
    ----------
    V : callable
        Potential (n,) at points (n, d), differentiable.

    Raises
    ------
    ValueError, FloatingPointError
        In a JKO step, as :class:`KL` for its log-density.

    Used in
    -------
    :class:`nsgf_lite.JKOFlow`
    """

    V: Callable[[Tensor], Tensor]

    def __post_init__(self) -> None:
        read_functions(V=self.V)

    def on_particles(self, s: Tensor | None, x: Tensor, reference: Reference | None, move: Move | None) -> Tensor:
        """As :meth:`Functional.on_particles`."""
        return read_values("V", self.V, x)

    def slope(self, x: Tensor, crowd: Tensor) -> Tensor:
        """As :meth:`Functional.slope`."""
        with torch.inference_mode(False), torch.enable_grad():
            z = x.clone().detach().requires_grad_()
            (slope,) = torch.autograd.grad(read_values("V", self.V, z).sum(), z)
        return slope


@dataclass(frozen=True)
class Interaction(Functional):
    """``1/2 E[W(X - Y)]`` for independent X, Y of law P: the energy whose flow has the velocity ``-∇(W * P)``.

    In an implicit step the pairs are those of a minibatch; where it has more than a thousand particles, the pairs of
    each with the first thousand.

    Parameters
    ----------
    W : callable
        Potential (…,) at displacements (…, d), even and differentiable but perhaps at zero, which is left out.

    Source
    ------
    Fan et al. (2022), Appendix C, without whose missing ½ the velocity would be twice that.

    Used in
    -------
    :class:`nsgf_lite.JKOFlow`
    """

    W: Callable[[Tensor], Tensor]

    def __post_init__(self) -> None:
        read_functions(W=self.W)

    def on_particles(self, s: Tensor | None, x: Tensor, reference: Reference | None, move: Move | None) -> Tensor:
        """As :meth:`Functional.on_particles`; the law is the first thousand particles, each without itself."""
        if len(x) < 2:
            raise ValueError("an interaction needs two particles at least, got 1")
        law = x[:_LAW]  # all pairs of ten thousand take seconds; the mean over fewer is as unbiased
        others = len(law) - (torch.arange(len(x), device=x.device) < len(law)).to(x)

        def of(part: Tensor) -> Tensor:
            apart = part.unsqueeze(1) - law
            same = (apart == 0).all(-1)  # itself, and whoever is at its place
            value = self.W(torch.where(same.unsqueeze(-1), torch.ones_like(apart), apart))
            return torch.where(same, torch.zeros_like(value), value).sum(1)

        return torch.cat([of(part) for part in x.split(max(1, 2**22 // law.numel()))]) / others / 2

    def slope(self, x: Tensor, crowd: Tensor) -> Tensor:
        """As :meth:`Functional.slope`: minus the velocity of :class:`nsgf_lite.fields.Interaction`."""
        return -fields.Interaction(self.W)(crowd, at=x)
