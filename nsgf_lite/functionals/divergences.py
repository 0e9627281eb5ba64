"""Divergences and entropies of a law: each the largest value that a critic can give it."""

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from nsgf_lite.functionals.base import Functional, LogDensity, Move, Reference, read_functions, read_values
from nsgf_lite.functionals.references import Ball, Moments, data
from nsgf_lite.inputs import read_parameters


@dataclass(frozen=True)
class KL(Functional):
    """``KL(P|Q)`` for a density Q, by a critic: ``1 + sup_s E_P[s + log(µ/Q)] - E_µ[e^s]``, s = log dP/dµ at best.

    µ is the Gaussian law with the mean and covariance of the particles at the beginning of each JKO step, or follows
    them within it, which a Q needs that is much narrower than the particles. If Q is not normalised, all values are
    less by the logarithm of its mass, and the flow is the same.

    Parameters
    ----------
    log_density : callable
        Logarithm of Q (n,) at points (n, d), up to a constant; differentiable.
    follow : float
        Share, from 0 to 1, that the particles as they are now moved get in µ at each step of the critic.

    Raises
    ------
    ValueError
        If follow is not a number from 0 to 1; in a JKO step, if log_density returns another shape, or the particles
        are too few for a covariance.
    FloatingPointError
        In a JKO step, if log_density is NaN or infinite at a particle.

    Source
    ------
    Fan et al. (2022), Corollary 3.3 and Table 1; with ``h = e^s`` for the positive function h.

    Used in
    -------
    :class:`nsgf_lite.JKOFlow`
    """

    log_density: LogDensity
    follow: float = 0.0

    def __post_init__(self) -> None:
        read_functions(log_density=self.log_density)
        read_parameters(self, sizes="follow")
        if self.follow > 1:
            raise ValueError(f"follow must be a number from 0 to 1, got {self.follow!r}")

    def reference(self) -> Reference:
        """As :meth:`Functional.reference`."""
        return Moments(self.follow)

    def on_particles(self, s: Tensor | None, x: Tensor, reference: Reference | None, move: Move | None) -> Tensor:
        """As :meth:`Functional.on_particles`."""
        assert s is not None and isinstance(reference, Moments)
        if move is None:
            return s
        return 1 + s + reference.log_density(x) - read_values("log_density", self.log_density, x)

    def on_reference(self, s: Tensor, reference: Reference) -> Tensor:
        """As :meth:`Functional.on_reference`."""
        return s.exp()


@dataclass(frozen=True)
class KLSamples(Functional):
    """``KL(P|Q)`` for data of law Q, by a critic: ``1 + sup_s E_P[s] - E_Q[e^s]``, s = log dP/dQ at best.

    Parameters
    ----------
    samples : Law, Tensor or DataLoader
        The data, as :class:`nsgf_lite.training.Stream` reads them.

    Source
    ------
    Fan et al. (2022), equation 12.

    Used in
    -------
    :class:`nsgf_lite.JKOFlow`
    """

    samples: Any

    def reference(self) -> Reference:
        """As :meth:`Functional.reference`."""
        return data(self.samples)

    def on_particles(self, s: Tensor | None, x: Tensor, reference: Reference | None, move: Move | None) -> Tensor:
        """As :meth:`Functional.on_particles`."""
        assert s is not None
        return 1 + s

    def on_reference(self, s: Tensor, reference: Reference) -> Tensor:
        """As :meth:`Functional.on_reference`."""
        return s.exp()


@dataclass(frozen=True)
class JSD(Functional):
    """``KL(P|(P+Q)/2) + KL(Q|(P+Q)/2)``, *twice* Jensen and Shannon's divergence, by a critic, for data of law Q.

    ``log 4 + sup_s E_P[log σ(-s)] + E_Q[log σ(s)]``, s = log dQ/dP at best, σ the logistic function.

    Parameters
    ----------
    samples : Law, Tensor or DataLoader
        The data, as :class:`nsgf_lite.training.Stream` reads them.

    Source
    ------
    Fan et al. (2022), Corollary 3.5; with ``h = σ(s)``.

    Used in
    -------
    :class:`nsgf_lite.JKOFlow`
    """

    samples: Any

    def reference(self) -> Reference:
        """As :meth:`Functional.reference`."""
        return data(self.samples)

    def on_particles(self, s: Tensor | None, x: Tensor, reference: Reference | None, move: Move | None) -> Tensor:
        """As :meth:`Functional.on_particles`."""
        assert s is not None
        return math.log(4) + logsigmoid(-s)

    def on_reference(self, s: Tensor, reference: Reference) -> Tensor:
        """As :meth:`Functional.on_reference`."""
        return -logsigmoid(s)


@dataclass(frozen=True)
class Entropy(Functional):
    """``1/(m-1) ∫P^m``, m > 1, by a critic: ``Ω^{1-m} (sup_h E_P[m/(m-1) h^{m-1}] - E_U[h^m])``, h = ΩP at best.

    U is uniform on a ball of volume Ω that holds the particles with some margin, anew in each JKO step. The unit is
    that of P^{m-1}.

    Parameters
    ----------
    m : float
        The power; 2 for Pearson's divergence to the uniform law.
    margin : float
        How much larger than the particles' radius the ball is, as a share of it.

    Raises
    ------
    ValueError
        If m is not above one, or the margin not positive; in a JKO step, if a particle leaves the ball.

    Source
    ------
    Fan et al. (2022), Corollary 3.4; with ``h = softplus(s)``.

    Used in
    -------
    :class:`nsgf_lite.JKOFlow`
    """

    m: float
    margin: float = 0.25

    def __post_init__(self) -> None:
        read_parameters(self, positive="m margin")
        if self.m <= 1:
            raise ValueError(f"m must be greater than 1, got {self.m!r}")

    def reference(self) -> Reference:
        """As :meth:`Functional.reference`."""
        return Ball(self.margin)

    def on_particles(self, s: Tensor | None, x: Tensor, reference: Reference | None, move: Move | None) -> Tensor:
        """As :meth:`Functional.on_particles`."""
        assert s is not None
        return self.m / (self.m - 1) * softplus(s) ** (self.m - 1)

    def on_reference(self, s: Tensor, reference: Reference) -> Tensor:
        """As :meth:`Functional.on_reference`."""
        return softplus(s) ** self.m

    def unit(self, reference: Reference | None) -> float:
        """Ω^{1-m}."""
        assert isinstance(reference, Ball)
        return math.exp((1 - self.m) * reference.log_volume)
