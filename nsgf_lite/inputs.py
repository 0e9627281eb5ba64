"""What a function accepts: each reader raises a ValueError that names the argument, what came and what is needed."""

import math

import torch
from torch import Tensor


def read_clouds(**clouds: Tensor) -> None:
    """Check that the named clouds are non-empty, finite and fit together; ValueError says which does not, and why."""
    first_name, first = next(iter(clouds.items()))
    for name, x in clouds.items():
        if not isinstance(x, Tensor) or x.dtype not in (torch.float32, torch.float64):
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
        # One cheap pass; the sum of finite numbers may overflow, so only then is each looked at.
        if not math.isfinite(float(x.detach().sum())) and not bool(torch.isfinite(x).all()):
            raise ValueError(f"{name} must be finite, got NaN or inf")


def read_positive(**numbers: float) -> None:
    """Check that the named numbers are positive and finite; ValueError says which is not."""
    for name, value in numbers.items():
        if isinstance(value, bool) or not (isinstance(value, int | float) and 0 < value < math.inf):
            raise ValueError(f"{name} must be a positive finite number, got {value!r}")


def read_counts(**counts: int) -> None:
    """Check that the named numbers are positive integers; ValueError says which is not."""
    for name, value in counts.items():
        if isinstance(value, bool) or not (isinstance(value, int) and value > 0):
            raise ValueError(f"{name} must be a positive integer, got {value!r}")


def read_naturals(**counts: int) -> None:
    """Check that the named numbers are integers, zero or more; ValueError says which is not."""
    for name, value in counts.items():
        if not (isinstance(value, int) and value >= 0):
            raise ValueError(f"{name} must be a non-negative integer, got {value!r}")


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
