"""Follow a velocity field with particles, and record the path."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, Tensor
from tqdm.auto import tqdm

from nsgf_lite.fields.base import Field, Warm
from nsgf_lite.fields.stein import LogDensity, score
from nsgf_lite.inputs import LARGEST, read_clouds, read_counts, read_generator, read_positive, read_weights

# Explicit Runge-Kutta methods: each row of nodes says where a stage stands, the last row how the stages are averaged.
METHODS: dict[str, list[list[float]]] = {
    "euler": [[], [1.0]],
    "heun": [[], [1.0], [1 / 2, 1 / 2]],
    "rk4": [[], [1 / 2], [0.0, 1 / 2], [0.0, 0.0, 1.0], [1 / 6, 1 / 3, 1 / 3, 1 / 6]],
}


Time = float | Tensor


def advance(
    velocity: Callable[[Tensor, Any], Tensor], x: Tensor, t: Time, step: Time, method: str = "euler"
) -> tuple[Tensor, Tensor]:
    """One explicit Runge-Kutta step of ``dx/dt = velocity(x, t)``: the positions (n, d) at t + step, the velocity at t.

    Time and step are numbers, or one for each particle, (n, 1).

    Raises
    ------
    ValueError
        If the method is unknown.

    Source
    ------
    Hairer, Nørsett, Wanner (1993), Section II.1.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    *nodes, average = METHODS[method]
    stages: list[Tensor] = []
    for row in nodes:
        moved = sum((w * v for w, v in zip(row, stages, strict=True) if w), torch.zeros_like(x))
        stages.append(velocity(x + step * moved, t + step * sum(row)))
    return x + step * sum(w * v for w, v in zip(average, stages, strict=True)), stages[0]


@torch.no_grad()
def follow(
    field: Field | Callable[..., Tensor],
    x: Tensor,
    y: Tensor | None,
    step: float,
    steps: int,
    *,
    method: str = "euler",
    a: Tensor | None = None,
    b: Tensor | None = None,
    generator: Generator | None = None,
    stop_below: float | None = None,
    progress: bool = False,
) -> Tensor:
    """Positions (steps + 1, n, d) of particles that start at x and follow ``field(x, y)`` towards the data y.

    Parameters
    ----------
    field : Field
        A velocity field, called with the moving particles and the data.
    x, y : Tensor
        Particles (n, d) and data (m, d), or batches of them; y is None for a field that has no data.
    step : float
        Length of a time step.
    steps : int
        Number of steps.
    method : str
        ``euler``, ``heun`` or ``rk4``: explicit Runge-Kutta of order 1, 2, 4, at 1, 2, 4 velocities a step.
    a, b : Tensor
        Weights of particles and data, uniform if None.
    generator : Generator
        Passed on to a field that has chance in it.
    stop_below : float
        Stop early, with a shorter path, once the root mean square speed falls below this.
    progress : bool
        Show a progress bar.

    Raises
    ------
    ValueError
        If the clouds do not fit, the method is unknown, or step or steps is not positive.
    FloatingPointError
        If the particles leave the numbers whose squares their dtype holds; the message says at which step.

    Source
    ------
    Zhu et al. (2024), equation 14 (Euler); Hairer, Nørsett, Wanner (1993), Section II.1.

    Used in
    -------
    :prf:ref:`thm-quantile-flow`, :prf:ref:`thm-descent`, :prf:ref:`thm-mean-field`, :prf:ref:`thm-gaussian-mean`
    """
    read_clouds(x=x, **({} if y is None else {"y": y}))
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if not callable(field):
        raise ValueError(f"field must be a velocity field, to be called with particles and data, got {field!r}")
    (step,), (steps,) = read_positive(step=step), read_counts(steps=steps)
    if stop_below is not None:
        (stop_below,) = read_positive(stop_below=stop_below)
    read_generator(generator)
    read_weights("a", a, x)
    if y is not None:
        read_weights("b", b, y)
    elif b is not None:
        raise ValueError("b must be None where there are no data, y = None")
    given = {"a": a, "b": b, "generator": generator}
    options: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    # A field that can start from its last solution is given a place to keep it.
    warm: Warm = {}
    if "warm" in inspect.signature(field).parameters:
        options["warm"] = warm
    velocity_of: Callable[..., Tensor] = field
    path = [x]
    for k in tqdm(range(1, steps + 1), desc="follow", disable=not progress):
        moved, velocity = advance(lambda z, t: velocity_of(z, y, **options), path[-1], 0.0, step, method)
        if stop_below is not None and float(velocity.square().sum(-1).mean().sqrt()) < stop_below:
            break
        path.append(moved)
        if not float(moved.abs().amax()) <= LARGEST[x.dtype]:
            raise FloatingPointError(
                f"particles left the numbers that {x.dtype} can square at step {k} of {steps}; "
                f"a smaller step than {step:g}?"
            )
    return torch.stack(path)


@torch.no_grad()
def langevin(
    log_density: LogDensity, x: Tensor, step: float, steps: int, *, generator: Generator, progress: bool = False
) -> Tensor:
    """Positions (n, d) of n chains after unadjusted Langevin's ``x + step grad log p(x) + sqrt(2 step) noise``.

    Euler's steps of the diffusion whose densities follow the flow of KL( . | p). They are not corrected, and so they
    settle at another law: for ``p = N(b, A^{-1})`` at ``N(b, (A - step A^2 / 2)^{-1})``, as long as ``step A < 2``.

    Parameters
    ----------
    log_density : callable
        Log density of the target up to a constant, ``(n, d) -> (n,)``, as :func:`nsgf_lite.fields.score` takes it.
    x : Tensor
        Where the chains begin, (n, d).
    step : float
        Length of a step, in units of squared length.
    steps : int
        Number of steps.
    generator : Generator
        The noise.
    progress : bool
        Show a progress bar.

    Raises
    ------
    ValueError
        If a number is not positive, the generator is none, or as :func:`nsgf_lite.fields.score`.
    FloatingPointError
        If a chain leaves the numbers whose squares its dtype holds; the message says at which step.

    Source
    ------
    Roberts and Tweedie (1996).
    """
    read_clouds(x=x)
    (step,), (steps,) = read_positive(step=step), read_counts(steps=steps)
    if not isinstance(generator, Generator):
        raise ValueError(f"generator must be a torch.Generator (chance is always explicit here), got {generator!r}")
    for k in tqdm(range(1, steps + 1), desc="langevin", disable=not progress):
        noise = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=generator.device).to(x.device)
        x = x + step * score(log_density, x) + (2 * step) ** 0.5 * noise
        if not float(x.abs().amax()) <= LARGEST[x.dtype]:
            raise FloatingPointError(
                f"chains left the numbers that {x.dtype} can square at step {k} of {steps}; "
                f"a smaller step than {step:g}?"
            )
    return x
