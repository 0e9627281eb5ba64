"""Claims that a page makes and a machine verifies."""

import math
import os
from typing import TypeVar

from torch import Tensor

Size = TypeVar("Size")


def check(claim: str, value: float | Tensor, below: float | None = None, above: float | None = None) -> None:
    """Print ``holds: claim`` if the value lies strictly between the bounds, and raise otherwise.

    The line shows no measured number, so that it reads the same on every machine.

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
    if any(bound is not None and not math.isfinite(bound) for bound in (below, above)):
        raise ValueError(f"check: a bound must be finite, got below={below}, above={above}")
    if getattr(value, "size", None) is not None and getattr(value, "shape", ()) not in ((), (1,)):
        raise ValueError(f"check: value must be a single number, got shape {tuple(value.shape)}")  # type: ignore[union-attr]
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"check: value must be a single number, got {value!r}") from None
    within = (below is None or number < below) and (above is None or number > above)
    if not (math.isfinite(number) and within):
        bounds = ", ".join(
            f"{side} {bound:g}" for side, bound in (("above", above), ("below", below)) if bound is not None
        )
        raise AssertionError(f"broken: {claim}: got {number:.6g}, needed {bounds}")
    print(f"holds: {claim}")


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
