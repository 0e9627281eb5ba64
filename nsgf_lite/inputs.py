"""What a function accepts: each reader raises a ValueError that names the argument, what came and what is needed."""

import functools
import math
import sys
from collections.abc import Callable
from contextlib import ExitStack
from numbers import Integral, Real
from typing import ParamSpec, TypeVar

import torch
from torch import Generator, Tensor

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

# Beyond these sizes squared distances, and sums of many, would overflow.
LARGEST = {torch.float32: 1e14, torch.float64: 1e100}
_MOST = sys.float_info.max


def exact(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """The function at its arguments' own precision, also where its caller has turned on ``torch.autocast``."""

    @functools.wraps(function)
    def outside(*given: Arguments.args, **named: Arguments.kwargs) -> Result:
        on = [kind for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
        if not on:
            return function(*given, **named)
        with ExitStack() as stack:
            for kind in on:
                stack.enter_context(torch.autocast(kind, enabled=False))
            return function(*given, **named)

    return outside


def read_clouds(**clouds: Tensor) -> None:
    """Check that the named clouds are non-empty, of a size to compute with, and fit together; ValueError says which
    does not, and why."""
    first_name, first = next(iter(clouds.items()))
    for name, x in clouds.items():
        if not isinstance(x, Tensor) or x.dtype not in LARGEST:
            got = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"{name} must be a float32 or float64 tensor, got {got}")
        if x.ndim not in (2, 3) or x.numel() == 0:
            raise ValueError(f"{name} must have shape (n, d) or (b, n, d), none of them zero, got {tuple(x.shape)}")
        if x.dtype != first.dtype or x.device != first.device:
            raise ValueError(
                f"{first_name} and {name} must share dtype and device, got {first.dtype} on {first.device} "
                f"and {x.dtype} on {x.device}"
            )
        if x.ndim != first.ndim or x.shape[-1] != first.shape[-1] or x.shape[:-2] != first.shape[:-2]:
            raise ValueError(
                f"{first_name} and {name} must agree in batch and dimension, "
                f"got {tuple(first.shape)} and {tuple(x.shape)}"
            )
        low, high = torch.aminmax(x.detach())
        largest = max(-float(low), float(high))  # NaN, both of them, if there is one
        if not math.isfinite(largest):
            raise ValueError(f"{name} must be finite, got NaN or inf")
        if largest > LARGEST[x.dtype]:
            raise ValueError(
                f"{name} must lie within ±{LARGEST[x.dtype]:g}, so that {x.dtype} holds squared distances, "
                f"got {largest:g}"
            )


def _number(value: object) -> float:
    """The value as one of Python's numbers, NaN if it is none."""
    if isinstance(value, bool):
        return math.nan
    if isinstance(value, int):
        return value
    return float(value) if isinstance(value, Real) else math.nan


def _integer(value: object) -> int | None:
    """The value as one of Python's integers, None if it is none."""
    return None if isinstance(value, bool) or not isinstance(value, Integral) else int(value)


def _numbers(need: str, holds: Callable[[float], bool], numbers: dict[str, float]) -> list[float]:
    for name, value in numbers.items():
        if not holds(_number(value)):
            raise ValueError(f"{name} must be a {need}, got {value!r}")
    return [_number(value) for value in numbers.values()]


def read_positive(**numbers: float) -> list[float]:
    """The named numbers as Python's; ValueError unless they are positive and finite."""
    return _numbers("positive finite number", lambda value: 0 < value <= _MOST, numbers)


def read_sizes(**numbers: float) -> list[float]:
    """The named numbers as Python's; ValueError unless they are zero or more, and finite."""
    return _numbers("non-negative finite number", lambda value: 0 <= value <= _MOST, numbers)


def read_finite(**numbers: float) -> list[float]:
    """The named numbers as Python's; ValueError unless they are finite."""
    return _numbers("finite number", lambda value: abs(value) <= _MOST, numbers)


def read_counts(**counts: int) -> list[int]:
    """The named numbers as Python's; ValueError unless they are positive integers."""
    for name, value in counts.items():
        number = _integer(value)
        if number is None or number <= 0:
            raise ValueError(f"{name} must be a positive integer, got {value!r}")
    return [int(value) for value in counts.values()]


def read_naturals(**counts: int) -> list[int]:
    """The named numbers as Python's; ValueError unless they are integers, zero or more."""
    for name, value in counts.items():
        number = _integer(value)
        if number is None or number < 0:
            raise ValueError(f"{name} must be a non-negative integer, got {value!r}")
    return [int(value) for value in counts.values()]


def read_parameters(
    thing: object, *, positive: str = "", sizes: str = "", finite: str = "", counts: str = "", naturals: str = ""
) -> None:
    """Check a dataclass's parameters, named in words, and leave Python's numbers there, also if it is frozen."""
    readers: list[tuple[Callable[..., list], str]] = [
        (read_positive, positive),
        (read_sizes, sizes),
        (read_finite, finite),
        (read_counts, counts),
        (read_naturals, naturals),
    ]
    for read, names in readers:
        for name in names.split():
            object.__setattr__(thing, name, read(**{name: getattr(thing, name)})[0])


def read_generator(generator: Generator | None) -> None:
    """Check that the generator is one, or None; ValueError if not."""
    if generator is not None and not isinstance(generator, Generator):
        raise ValueError(f"generator must be a torch.Generator, got {generator!r}")


def read_flags(**flags: bool) -> None:
    """Check that the named values are True or False; ValueError says which is not."""
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise ValueError(f"{name} must be True or False, got {value!r}")


def read_weights(name: str, weights: Tensor | None, x: Tensor) -> Tensor:
    """Return the weights of cloud x, uniform if None, shape x.shape[:-1]; ValueError unless they are a probability."""
    if weights is None:
        return x.new_full(x.shape[:-1], 1 / x.shape[-2])
    if not isinstance(weights, Tensor) or weights.dtype != x.dtype or weights.device != x.device:
        raise ValueError(
            f"{name} must be a tensor of dtype {x.dtype} on {x.device}, as its cloud is, got {weights!r:.80}"
        )
    if weights.shape not in (x.shape[:-1], x.shape[-2:-1]):
        raise ValueError(
            f"{name} must have shape {tuple(x.shape[:-1])}, one weight per point, got {tuple(weights.shape)}"
        )
    if not bool(torch.isfinite(weights).all()) or bool((weights < 0).any()):
        raise ValueError(
            f"{name} must be finite and non-negative, got values from {weights.min():g} to {weights.max():g}"
        )
    off = float((weights.detach().sum(-1) - 1).abs().max())
    if off > (1e-6 if x.dtype == torch.float64 else 1e-4):
        raise ValueError(f"{name} must sum to one, got a sum that is off by {off:g}")
    return weights.expand(x.shape[:-1])
