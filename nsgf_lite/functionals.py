"""What a JKO step descends: functionals of a law, each the largest value that a critic can give it, or an average."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import logsigmoid, softplus

from nsgf_lite import fields
from nsgf_lite.inputs import read_parameters, read_positive
from nsgf_lite.networks import ICNN
from nsgf_lite.training.streams import Stream

LogDensity = Callable[[Tensor], Tensor]


class Functional:
    """A functional F of a law P, known by samples; functionals add, and multiply with positive numbers.

    One with a critic is ``F(P) = unit (constant + sup_s E_P[A(s)] - E_Γ[B(s)])``: :meth:`on_particles` is A, with the
    constant, and :meth:`on_reference` is B, both of the critic's values s; the reference law Γ is what
    :meth:`reference` makes, and :meth:`unit` a number. At the best critic ``unit A`` is the first variation of F. One
    without a critic is ``E_P[A]``.

    Used in
    -------
    :class:`nsgf_lite.JKOFlow`
    """

    def reference(self) -> "Reference | None":
        """The law Γ that the critic tells P from, anew for each training; None for a functional without a critic."""
        return None

    def on_particles(self, s: Tensor | None, x: Tensor, reference: "Reference | None", move: "Move") -> Tensor:
        """A, one number for each particle x (n, d), given the critic's values s (n,)."""
        raise NotImplementedError

    def on_reference(self, s: Tensor, reference: "Reference") -> Tensor:
        """B, one number for each of the critic's values s (n,) at points of Γ."""
        raise NotImplementedError

    def unit(self, reference: "Reference | None") -> float:
        """What A and B are to be multiplied with; apart, so that a critic learns at one rate in every unit."""
        return 1.0

    def slope(self, x: Tensor, crowd: Tensor) -> Tensor:
        """Gradient (n, d) of the first variation at x (n, d), the law being that of the crowd (m, d)."""
        raise ValueError(f"{type(self).__name__} has no explicit step: its first variation needs a density")

    def terms(self) -> "list[tuple[float, Functional]]":
        """The functionals it is a sum of, each with its factor."""
        return [(1.0, self)]

    def __add__(self, other: "Functional") -> "Sum":
        if not isinstance(other, Functional):
            return NotImplemented
        return Sum(tuple(self.terms() + other.terms()))

    def __rmul__(self, factor: float) -> "Sum":
        return Sum(((factor, self),))


@dataclass(frozen=True)
class Sum(Functional):
    """A sum of functionals, as ``0.1 * Entropy(3) + Interaction(W)`` makes it.

    Raises
    ------
    ValueError
        If a factor is not positive.
    """

    each: tuple[tuple[float, Functional], ...]

    def __post_init__(self) -> None:
        for factor, _ in self.each:
            read_positive(factor=factor)

    def slope(self, x: Tensor, crowd: Tensor) -> Tensor:
        """As :meth:`Functional.slope`."""
        return torch.stack([factor * term.slope(x, crowd) for factor, term in self.each]).sum(0)

    def terms(self) -> list[tuple[float, Functional]]:
        """As :meth:`Functional.terms`, the factors multiplied."""
        return [(factor * inner, term) for factor, part in self.each for inner, term in part.terms()]

    def __rmul__(self, factor: float) -> "Sum":
        return Sum(tuple((factor * own, term) for own, term in self.each))


@dataclass
class Move:
    """What has just been moved: points x (n, d), the map they went through, and the chance of this step."""

    x: Tensor
    network: nn.Module
    generator: Generator
    exact: bool = False  # whether the value matters, and not its gradient alone


# --- the laws that critics tell particles from ------------------------------------------------------------------------


class Reference:
    """A law to sample, which may follow the particles from one JKO step to the next."""

    def renew(self, crowd: Tensor) -> None:
        """Fit it to the particles (n, d) at the beginning of a JKO step."""

    def draw(self, n: int, generator: Generator) -> Tensor:
        """Points (n, d) of the law."""
        raise NotImplementedError

    def check(self, x: Tensor) -> None:
        """ValueError if moved particles (n, d) are where the reference does not reach."""

    def frozen(self) -> "Reference":
        """The law as it is now, whatever becomes of this one."""
        return copy.deepcopy(self)

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint must hold."""
        return {}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Take that up again."""


class Moments(Reference):
    """The Gaussian law with the particles' mean and covariance."""

    mean: Tensor
    factor: Tensor

    def renew(self, crowd: Tensor) -> None:
        """As :meth:`Reference.renew`; ValueError if there are too few particles for a covariance."""
        n, d = crowd.shape
        wide = crowd.double()
        self.mean = wide.mean(0)
        covariance = (wide - self.mean).T @ (wide - self.mean) / max(n - 1, 1)
        values = torch.linalg.eigvalsh(covariance)
        if n <= d or not float(values[0]) > 1e-12 * float(values[-1]):
            raise ValueError(
                f"the covariance of {n} particles in dimension {d} is singular: there are too few, or they lie in a "
                "plane; give more particles"
            )
        self.factor = torch.linalg.cholesky(covariance)

    def draw(self, n: int, generator: Generator) -> Tensor:
        """As :meth:`Reference.draw`."""
        mean, factor = (t.to(generator.device, torch.float32) for t in (self.mean, self.factor))
        noise = torch.randn(n, len(mean), generator=generator, device=generator.device, dtype=torch.float32)
        return mean + noise @ factor.T

    def log_density(self, x: Tensor) -> Tensor:
        """Logarithm of the density (n,) at the points x (n, d)."""
        mean, factor = self.mean.to(x), self.factor.to(x)
        u = torch.linalg.solve_triangular(factor, (x - mean).T, upper=False)
        return -u.square().sum(0) / 2 - factor.diagonal().log().sum() - len(mean) / 2 * math.log(2 * math.pi)

    def state(self) -> dict[str, Tensor]:
        """As :meth:`Reference.state`."""
        return {"mean": self.mean, "factor": self.factor} if hasattr(self, "mean") else {}

    def restore(self, state: dict[str, Tensor]) -> None:
        """As :meth:`Reference.restore`."""
        self.mean, self.factor = state["mean"], state["factor"]


@dataclass
class Ball(Reference):
    """The uniform law on the ball about the particles' mean that holds them all, larger by the margin."""

    margin: float

    centre: Tensor | None = None
    radius: float = 0.0

    def renew(self, crowd: Tensor) -> None:
        """As :meth:`Reference.renew`."""
        self.centre = crowd.mean(0)
        self.radius = (1 + self.margin) * float((crowd - self.centre).norm(dim=1).max())
        if not self.radius > 0:
            raise ValueError("the particles must not all be at one place: their law has no density")

    def draw(self, n: int, generator: Generator) -> Tensor:
        """As :meth:`Reference.draw`."""
        assert self.centre is not None
        d = len(self.centre)
        way = torch.randn(n, d, generator=generator, device=generator.device, dtype=torch.float32)
        share = torch.rand(n, 1, generator=generator, device=generator.device, dtype=torch.float32) ** (1 / d)
        return self.centre.to(way) + self.radius * share * way / way.norm(dim=1, keepdim=True)

    def check(self, x: Tensor) -> None:
        """As :meth:`Reference.check`."""
        assert self.centre is not None
        out = int(((x.detach() - self.centre.to(x)).norm(dim=1) > self.radius).sum())
        if out:
            raise ValueError(
                f"{out} of {len(x)} moved particles are outside of the reference ball, where the critic knows nothing: "
                f"take a larger margin than {self.margin:g}, or a smaller step"
            )

    @property
    def log_volume(self) -> float:
        """Logarithm of the volume Ω of the ball."""
        assert self.centre is not None
        d = len(self.centre)
        return d * math.log(self.radius) + d / 2 * math.log(math.pi) - math.lgamma(d / 2 + 1)

    def state(self) -> dict[str, Tensor]:
        """As :meth:`Reference.state`."""
        if self.centre is None:
            return {}
        return {"centre": self.centre, "radius": torch.tensor(self.radius, dtype=torch.float64)}

    def restore(self, state: dict[str, Tensor]) -> None:
        """As :meth:`Reference.restore`."""
        self.centre, self.radius = state["centre"], float(state["radius"])


@dataclass
class Samples(Reference):
    """The data, which stay what they are."""

    stream: Stream

    def draw(self, n: int, generator: Generator) -> Tensor:
        """As :meth:`Reference.draw`."""
        return self.stream.many(n, generator)

    def frozen(self) -> "Reference":
        """As :meth:`Reference.frozen`."""
        return self

    def state(self) -> dict[str, Tensor]:
        """As :meth:`Reference.state`."""
        return self.stream.state()

    def restore(self, state: dict[str, Tensor]) -> None:
        """As :meth:`Reference.restore`."""
        self.stream.restore(state)


def _data(samples: Any) -> Samples:
    stream = Stream("samples", samples)
    if stream.classes:
        raise ValueError(f"samples must have no classes, got {stream.classes}")
    return Samples(stream)


# --- the functionals --------------------------------------------------------------------------------------------------


def _read_function(**functions: object) -> None:
    for name, function in functions.items():
        if not callable(function):
            raise ValueError(f"{name} must be a function of points, got {function!r}")


def read_values(name: str, function: LogDensity, x: Tensor, void: bool = False) -> Tensor:
    """Values (n,) of a reader's function at x (n, d); ValueError or FloatingPointError if they are none.

    With `void` minus infinity is a value: the logarithm of a density where there is none.
    """
    value = function(x)
    if not isinstance(value, Tensor) or value.shape != x.shape[:1]:
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{name} must return shape ({len(x)},) at {len(x)} points, got {got}")
    wrong = ~torch.isfinite(value) & ~(torch.isneginf(value) & void)
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        raise FloatingPointError(
            f"{name} is {float(value.detach()[row])} at {int(wrong.sum())} of {len(x)} particles, the first of them "
            f"{x[row].tolist()}"
        )
    return value


@dataclass(frozen=True)
class KL(Functional):
    """``KL(P|Q)`` for a density Q, by a critic: ``1 + sup_s E_P[s + log(µ/Q)] - E_µ[e^s]``, s = log dP/dµ at best.

    µ is the Gaussian law with the mean and covariance of the particles at the beginning of each JKO step. If Q is not
    normalised, all values are less by the logarithm of its mass, and the flow is the same.

    Parameters
    ----------
    log_density : callable
        Logarithm of Q (n,) at points (n, d), up to a constant; differentiable.

    Raises
    ------
    ValueError
        In a JKO step, if log_density returns another shape, or the particles are too few for a covariance.
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

    def __post_init__(self) -> None:
        _read_function(log_density=self.log_density)

    def reference(self) -> Reference:
        """As :meth:`Functional.reference`."""
        return Moments()

    def on_particles(self, s: Tensor | None, x: Tensor, reference: Reference | None, move: Move) -> Tensor:
        """As :meth:`Functional.on_particles`."""
        assert s is not None and isinstance(reference, Moments)
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
        return _data(self.samples)

    def on_particles(self, s: Tensor | None, x: Tensor, reference: Reference | None, move: Move) -> Tensor:
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
        return _data(self.samples)

    def on_particles(self, s: Tensor | None, x: Tensor, reference: Reference | None, move: Move) -> Tensor:
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

    def on_particles(self, s: Tensor | None, x: Tensor, reference: Reference | None, move: Move) -> Tensor:
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
        _read_function(log_density=self.log_density)
        if self.determinant not in ("exact", "sampled"):
            raise ValueError(f"determinant must be 'exact' or 'sampled', got {self.determinant!r}")
        read_parameters(self, counts="iterations")

    def on_particles(self, s: Tensor | None, x: Tensor, reference: Reference | None, move: Move) -> Tensor:
        """As :meth:`Functional.on_particles`."""
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
        _read_function(V=self.V)

    def on_particles(self, s: Tensor | None, x: Tensor, reference: Reference | None, move: Move) -> Tensor:
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
        _read_function(W=self.W)

    def on_particles(self, s: Tensor | None, x: Tensor, reference: Reference | None, move: Move) -> Tensor:
        """As :meth:`Functional.on_particles`; the particles of the batch are the law, each without itself."""
        n = len(x)
        if n < 2:
            raise ValueError("an interaction needs two particles at least, got 1")

        def of(part: Tensor) -> Tensor:
            apart = part.unsqueeze(1) - x
            same = (apart == 0).all(-1)  # itself, and whoever is at its place
            value = self.W(torch.where(same.unsqueeze(-1), torch.ones_like(apart), apart))
            return torch.where(same, torch.zeros_like(value), value).sum(1) / (n - 1) / 2

        return torch.cat([of(part) for part in x.split(max(1, 2**22 // x.numel()))])

    def slope(self, x: Tensor, crowd: Tensor) -> Tensor:
        """As :meth:`Functional.slope`: minus the velocity of :class:`nsgf_lite.fields.Interaction`."""
        return -fields.Interaction(self.W)(crowd, at=x)
