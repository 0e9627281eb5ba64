"""What a functional of a law is to a JKO step, and what the reference law of its critic is."""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn

from nsgf_lite.inputs import read_positive

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

    def on_particles(self, s: Tensor | None, x: Tensor, reference: "Reference | None", move: "Move | None") -> Tensor:
        """A, one number for each particle x (n, d), given the critic's values s (n,).

        Where a critic only learns, `move` is None, and what does not depend on s may be left out.
        """
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


class Reference:
    """A law to sample, which may follow the particles from one JKO step to the next."""

    def renew(self, crowd: Tensor) -> None:
        """Fit it to the particles (n, d) at the beginning of a JKO step."""

    def draw(self, n: int, generator: Generator) -> Tensor:
        """Points (n, d) of the law."""
        raise NotImplementedError

    def follow(self, x: Tensor) -> None:
        """Come along with moved particles (n, d) within a JKO step, before each step of the critic."""

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


def read_functions(**functions: object) -> None:
    """ValueError unless the named things can be called."""
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
