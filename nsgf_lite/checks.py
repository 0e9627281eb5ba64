"""Claims that a page makes and a machine verifies."""

import json
import math
import os
import time
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

Size = TypeVar("Size")
_RUN = f"{os.getpid()}-{time.time_ns()}.jsonl"  # this process's file among those of NSGF_CHECKS


def check(claim: str, value: float | Tensor, below: float | None = None, above: float | None = None) -> None:
    """Print ``holds: claim`` if the value lies strictly between the bounds, and raise otherwise.

    The line shows no measured number, so that it reads the same on every machine. Where the environment variable
    ``NSGF_CHECKS`` names a folder, claim, value and bounds are noted there: the page *Environment* shows how near each
    claim of the book comes to its bound, and a line ``holds:`` that no check printed is found.

    Parameters
    ----------
    claim : str
        The claim in words.
    value : float or Tensor
        One number, in the units of the bounds.
    below, above : float
        Strict bounds; at least one is needed.

    Raises
    ------
    AssertionError
        If the value breaks a bound, or is NaN or infinite.
    ValueError
        If the value is not a single number, or no bound is given.

    Used in
    -------
    Every chapter.
    """
    if below is None and above is None:
        raise ValueError("check: give a bound, below= or above=")
    lower, upper = (None if bound is None else _number("a bound", bound) for bound in (above, below))
    if not all(math.isfinite(bound) for bound in (lower, upper) if bound is not None):
        raise ValueError(f"check: a bound must be finite, got below={below}, above={above}")
    number = _number("value", value)
    within = (upper is None or number < upper) and (lower is None or number > lower)
    if not (math.isfinite(number) and within):
        bounds = ", ".join(
            f"{side} {bound:g}" for side, bound in (("above", lower), ("below", upper)) if bound is not None
        )
        raise AssertionError(f"broken: {claim}: got {number:.6g}, needed {bounds}")
    if folder := os.environ.get("NSGF_CHECKS"):
        with open(Path(folder) / _RUN, "a", encoding="utf-8") as file:
            file.write(json.dumps({"claim": claim, "value": number, "below": upper, "above": lower}) + "\n")
    print(f"holds: {claim}")


def _number(name: str, value: Any) -> float:
    """Read one number, of Python's, NumPy's, torch's or another library's own kind."""
    shape = getattr(value, "shape", ())
    if isinstance(value, str | bytes) or shape not in ((), (1,)):
        got = f"shape {tuple(shape)}" if shape else repr(value)
        raise ValueError(f"check: {name} must be a single number, got {got}")
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ValueError(f"check: {name} must be a single number, got {value!r}") from None


def scale(fast: Size, full: Size) -> Size:
    """Return `fast` or `full` as the environment variable ``NSGF_SCALE`` says (``fast`` unless set).

    It may change only numbers of points, steps and seeds; every check must hold in both settings.

    Raises
    ------
    ValueError
        If ``NSGF_SCALE`` is neither ``fast`` nor ``full``.

    Used in
    -------
    :doc:`/book/wasserstein_gradient_flows`, :doc:`/book/sinkhorn_first_variation`,
    :doc:`/book/gaussian_sinkhorn_flow`, :doc:`/book/mean_field_limit`, :doc:`/book/neural_sinkhorn_flow`,
    :doc:`/book/two_phase`, :doc:`/book/two_dimensional_benchmark`, :doc:`/book/choosing`
    """
    setting = os.environ.get("NSGF_SCALE", "fast")
    if setting not in ("fast", "full"):
        raise ValueError(f"NSGF_SCALE must be 'fast' or 'full', got {setting!r}")
    return full if setting == "full" else fast
