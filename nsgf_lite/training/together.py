"""Fit equal models side by side: one training of their networks, stacked."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Generator, Tensor, nn

from nsgf_lite.networks import MLP, Stack, call
from nsgf_lite.training.loop import Chance, Part, Training, read_seed, read_training, train
from nsgf_lite.training.machines import machine
from nsgf_lite.training.streams import Stream

Batch = tuple[Tensor, Tensor, Tensor, Tensor | None]


class Trainee(Protocol):
    """What this training needs of a model: data to read, a network, and batches to regress it on."""

    alone: ClassVar[bool]  # whether the model cannot train in a stack with others
    source: Stream
    target: Stream
    losses: list[float]

    def hyperparameters(self) -> dict[str, object]:
        """What a checkpoint must agree with."""
        ...

    def prepare(self, source: Any, target: Any, training: Training, generator: Generator) -> nn.Module:
        """Read the data and make the network."""
        ...

    def _begin(self, generator: Generator) -> None:
        """Fill what the batches are drawn from, before the first step of a new run."""
        ...

    def _batch(self, n: int, step: int, generator: Generator) -> Batch:
        """Draw x (n, d), t (n,), v (n, d) and labels (n,), or None, for one optimiser step."""
        ...

    def _parts(self) -> dict[str, Part]:
        """What a checkpoint must hold beside network, optimiser and generator."""
        ...

    def _asks(self, step: int) -> bool:
        """Whether the batch of this step asks the network for velocities."""
        ...

    def _saved(self) -> None:
        """A checkpoint has been written."""
        ...

    def _data(self) -> list[str]:
        """What a checkpoint remembers of the data."""
        ...


@torch.inference_mode(False)  # in which no pool could be filled and no network trained
def fit_together(
    models: Sequence[Trainee],
    sources: Sequence[Any],
    targets: Sequence[Any],
    training: Training | None = None,
    *,
    seeds: Sequence[int],
    checkpoint: str | Path | None = None,
    progress: bool = True,
) -> None:
    """Fit equal models, each on its source and target with its seed, in one training of stacked networks.

    Each ends with the weights that it would have had alone, up to rounding: gradients, clipping and Adam do not mix
    members. Their ``losses`` are the sum over all.

    Raises
    ------
    ValueError
        As :meth:`Flow.fit`; if the models are not of one shape, of a kind that trains alone, the same twice, or share a
        folder; if there are not as many sources, targets and seeds as models.

    Used in
    -------
    :doc:`/book/two_dimensional_benchmark`
    """
    training = read_training(training)
    counts = {"sources": len(sources), "targets": len(targets), "seeds": len(seeds)}
    for name, count in counts.items():
        if count != len(models) or not count:
            raise ValueError(f"{name} must be one for each model, {len(models)}, and at least one, got {count}")
    if len(set(map(id, models))) < len(models):
        raise ValueError("models must be different objects: one of them is there twice")
    for model in models:
        if model.alone:
            raise ValueError(f"{type(model).__name__} cannot be fitted together with others: call its fit")
    folders = [str(folder) for folder in (getattr(model, "folder", None) for model in models) if folder is not None]
    if len(set(map(os.path.realpath, folders))) < len(folders):
        raise ValueError(f"each model needs a folder of its own, got {folders}")
    where = machine()
    rank = 1_000_003 * where.process_index
    seeds = [read_seed(seed=seed) for seed in seeds]
    chances = [torch.Generator(where.device).manual_seed(seed + rank) for seed in seeds]
    each = list(zip(models, chances, strict=True))
    nets = [
        model.prepare(source, target, training, chance)
        for (model, chance), source, target in zip(each, sources, targets, strict=True)
    ]
    if len(set(map(id, nets))) < len(nets):
        raise ValueError("network must make a new network each time, and has made the same one twice")
    alone = len(nets) == 1
    network = nets[0] if alone else Stack(nets)
    spreads = [net.spread if isinstance(net, MLP) else torch.ones((), dtype=torch.float32) for net in nets]
    unit = torch.stack(spreads).to(where.device)  # so that clipping does not depend on the unit of length

    def loss(net: nn.Module, step: int) -> Tensor:
        if isinstance(network, Stack) and any(model._asks(step) for model in models):
            network.unstack(nets)
        draws = [model._batch(training.batch, step, chance) for model, chance in each]
        x, t, v = (torch.stack(column) for column in zip(*(draw[:3] for draw in draws), strict=True))
        labels = [draw[3] for draw in draws if draw[3] is not None]
        label = torch.stack(labels) if labels else None
        if alone:
            x, t, v, label = draws[0]
        return ((call(net, x, t, label) - v).square().sum(-1).mean(-1) / unit**2).sum()

    def begin() -> None:
        for model, chance in each:
            model._begin(chance)

    def saved() -> None:
        for model in models:
            model._saved()

    parts: dict[str, Part] = {f"{k}.{name}": part for k, m in enumerate(models) for name, part in m._parts().items()}
    parts |= {f"{k}.chance": Chance(chance) for k, chance in enumerate(chances[1:], 1)}
    losses = train(
        network,
        loss,
        training,
        chances[0],
        start=begin,
        parts=parts,
        identity=lambda: {
            "models": [m.hyperparameters() for m in models],
            "data": [m._data() for m in models],
            "seeds": list(seeds),
            "network": str(nets[0]),
        },
        checkpoint=checkpoint,
        saved=saved,
        progress=progress,
        name=type(models[0]).__name__,
        where=where,
    )
    if isinstance(network, Stack):
        network.unstack(nets)
    for model in models:
        model.losses = losses
