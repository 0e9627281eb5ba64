"""One-step generators, trained to move where a velocity field pushes their samples."""

from collections.abc import Sequence
from itertools import groupby
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn

from nsgf_lite.fields import Critic, Field
from nsgf_lite.inputs import exact, read_counts, read_generator, read_positive
from nsgf_lite.networks import Stack, evaluating
from nsgf_lite.toy import Gaussian
from nsgf_lite.training import Part, Training, machine
from nsgf_lite.training import train as run
from nsgf_lite.training.loop import read_seed, read_training
from nsgf_lite.training.streams import Stream, described


def _noise(noise: Any) -> Stream:
    """A law, or the dimension of a standard normal one."""
    if not isinstance(noise, bool) and isinstance(noise, Integral):
        dimension: Any = noise
        (d,) = read_counts(noise=dimension)
        unit = tuple(tuple(float(i == j) for j in range(d)) for i in range(d))
        return Stream("noise", Gaussian((0.0,) * d, unit))
    return Stream("noise", noise)


def _read_generator(generator: nn.Module) -> None:
    """Check that a network was given, and not what makes one, or a generator of chance; ValueError if not."""
    if not isinstance(generator, nn.Module):
        raise ValueError(f"generator must be a network, a torch.nn.Module, got {generator!r}")


def velocity(fields: Sequence[Field], x: Tensor, y: Tensor, generator: Generator) -> Tensor:
    """Velocities (s, n, d) of an ensemble x (s, n, d) towards y (s, m, d); equal neighbouring fields as a batch.

    Raises
    ------
    ValueError
        If there are not as many fields as members, or as the fields.

    Used in
    -------
    :func:`nsgf_lite.drifting.train`
    """
    if len(fields) != len(x):
        raise ValueError(f"field must be one, or one for each of the {len(x)} members, got {len(fields)}")
    parts, k = [], 0
    for field, members in groupby(fields):
        n = len(list(members))
        parts.append(field(x[k : k + n], y[k : k + n], generator=generator))
        k += n
    return torch.cat(parts)


def train(
    generator: nn.Module,
    field: Field | Sequence[Field],
    target: Any,
    training: Training | None = None,
    *,
    noise: Any = 2,
    data: int | None = None,
    step: float = 1.0,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    progress: bool = True,
) -> list[float]:
    """Train a one-step generator in place by ``E|f(z) - stop(f(z) + step V(f(z)))|²`` and return the losses.

    The stop means that the drifted point is a constant: the gradient is that of a functional F whose Wasserstein
    gradient flow has the velocity V, up to the factor ``2 step``.

    Parameters
    ----------
    generator : nn.Module
        From noise (n, k) to points (n, d); or a :class:`nsgf_lite.networks.Stack`, an ensemble that trains as one.
    field : Field, or a sequence of them
        The velocity; for a stack, one for all members or one for each. Equal neighbours are called as a batch. A field
        that learns (:class:`nsgf_lite.fields.Critic`) is fitted to each minibatch first, and is not for stacks.
    target : Law, Tensor or DataLoader
        The data, as :class:`nsgf_lite.training.Stream` reads them; members of a stack get minibatches of their own.
    training : Training
        The budget; ``training.batch`` samples of the generator in each step.
    noise : Law or int
        Law of the noise, or the dimension of a standard normal one.
    data : int
        Number of data points in each step; by default as many as samples.
    step : float
        Step of the drift, in units of the field's time.
    seed : int
        All chance of the run.
    checkpoint : path
        File to resume from and to write; see :func:`nsgf_lite.training.train`.
    progress : bool
        Show a progress bar with the loss, which is ``step² E|V|²``, summed over the members of a stack.

    Raises
    ------
    ValueError
        If the data are conditional or smaller than a minibatch, dimensions disagree, a stack is given a field that
        learns, or as the field.
    FloatingPointError
        If the run diverges, or takes the points to where the field fails; the message says at which step.

    Source
    ------
    Deng et al. (2026), equation 6; the note on drifting (2026), Algorithm 2 and Proposition 2.

    Used in
    -------
    :prf:ref:`thm-surrogate-gradient`, :doc:`/book/drifting_models`, :doc:`/book/field_zoo`
    """
    training, seed = read_training(training), read_seed(seed=seed)
    _read_generator(generator)
    (m,) = read_counts(data=training.batch if data is None else data)
    (step,) = read_positive(step=step)
    where = machine()
    chance = Generator(where.device).manual_seed(seed + 1_000_003 * where.process_index)
    source, stream = _noise(noise), Stream("target", target)
    if source.classes or stream.classes:
        raise ValueError("noise and target must be of one class: a one-step generator takes no labels")
    stacked = isinstance(generator, Stack)
    members = generator.size if isinstance(generator, Stack) else 1
    fields = list(field) if isinstance(field, Sequence) else [field] * members
    if len(fields) != members:
        raise ValueError(f"field must be one, or one for each of the {members} members, got {len(fields)}")
    for one in fields:
        if not callable(one):
            raise ValueError(f"field must be one of nl.fields, or called as they are, got {one!r}")
    parts: dict[str, Part] = {"noise": source, "target": stream}
    learner = next((f for f in fields if hasattr(f, "fit")), None)
    if learner is not None and stacked:
        raise ValueError(
            f"field must not learn where a stack is trained, got {learner!r}: train its members one by one"
        )
    if isinstance(learner, Critic):
        parts["critic"] = learner

    def batch(of: Stream, n: int) -> Tensor:
        if not stacked:
            return of.draw(n, chance)
        if isinstance(of.parts[0] if of.parts else None, Tensor):  # without replacement within each minibatch
            return torch.stack([of.draw(n, chance) for _ in range(members)])
        return torch.stack(list(of.many(members * n, chance).split(n)))

    def move(x: Tensor, y: Tensor) -> Tensor:
        if stacked:
            return velocity(fields, x, y, chance)
        fit = getattr(fields[0], "fit", None)
        if fit is not None:
            fit(x, y, generator=chance)
        return fields[0](x, y, generator=chance)

    def loss(network: nn.Module, number: int) -> Tensor:
        z, y = batch(source, training.batch), batch(stream, m)
        try:
            x = network(z)
        except RuntimeError as error:
            if number or isinstance(error, torch.OutOfMemoryError):
                raise
            raise ValueError(f"generator must take noise of shape {tuple(z.shape)}: {error}") from error
        need = (*y.shape[:-2], training.batch, y.shape[-1])
        if x.shape != need:
            raise ValueError(f"generator must make points of shape {need}, as target has, got {tuple(x.shape)}")
        if not bool(torch.isfinite(x).all()):
            return x.sum() * torch.nan  # which the loop reports, with the step
        here = x.detach()
        try:
            v = move(here, y)
        except (ValueError, FloatingPointError) as error:
            if not number:
                raise
            raise FloatingPointError(
                f"drifting stopped at step {number + 1} of {training.steps}, "
                f"its points up to {float(here.abs().max()):.3g}: {error}"
            ) from error
        return (x - (here + step * v).detach()).square().sum(-1).mean(-1).sum()

    return run(
        generator,
        loss,
        training,
        chance,
        parts=parts,
        identity=lambda: {
            "field": [[described(f), len(list(members))] for f, members in groupby(fields)],
            "data": [repr(source), repr(stream), m],
            "step": step,
            "seed": seed,
            "generator": described(generator),
        },
        checkpoint=checkpoint,
        progress=progress,
        name="drifting",
        where=where,
    )


@exact
@torch.no_grad()
def sample(generator: nn.Module, n: int, noise: Any = 2, *, chance: Generator | None = None) -> Tensor:
    """Samples (n, d) of a one-step generator, or (s, n, d) of a stack: one evaluation on fresh noise.

    Parameters
    ----------
    generator : nn.Module
        As in :func:`train`.
    n : int
        Number of samples, of each member.
    noise : Law or int
        As in :func:`train`.
    chance : Generator
        Chance of the noise; by default a fresh one with seed 0.

    Raises
    ------
    ValueError
        If n is not a positive integer, or the noise is none.

    Used in
    -------
    :doc:`/book/drifting_models`
    """
    (n,) = read_counts(n=n)
    _read_generator(generator)
    read_generator(chance)
    device = next(generator.parameters()).device
    chance = chance or Generator(device).manual_seed(0)
    z = _noise(noise).many(n, chance).to(device)
    with evaluating(generator):
        return generator(z.expand(generator.size, *z.shape) if isinstance(generator, Stack) else z)
