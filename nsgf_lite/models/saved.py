"""What a model of the book is to a file: its parameters, and the networks that it has trained."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Self

import torch
from torch import Generator, Tensor, nn

from nsgf_lite.networks import seeded
from nsgf_lite.training import checkpoints, described, json_like

MAKERS = ("network", "transport", "critic")  # what makes networks: their shapes are in the file


def told(x: Tensor) -> Tensor:
    """The points (…, n, d) as they are; a RuntimeWarning if some of the last n are not finite."""
    lost = int((~torch.isfinite(x).all(-1)).reshape(-1, x.shape[-2])[-1].sum())
    if lost:
        warnings.warn(
            f"{lost} of {x.shape[-2]} points ended at no finite place: the network was followed to where it was not "
            "trained; train it at a smaller rate, or look at where those points start",
            RuntimeWarning,
            stacklevel=3,
        )
    return x


@dataclass
class Saved:
    """A model whose parameters are its dataclass's fields; those that make networks are no part of its identity.

    Used in
    -------
    The base of :class:`nsgf_lite.Flow` and :class:`nsgf_lite.JKOFlow`; no chapter makes one of its own.
    """

    classes: int = field(init=False, default=0, repr=False)
    dimension: int = field(init=False, default=0, repr=False)
    losses: list[float] = field(init=False, default_factory=list, repr=False)

    def networks(self) -> dict[str, nn.Module]:
        """The networks that :meth:`save` writes; none before the model is fitted or loaded."""
        raise NotImplementedError

    def _make(self, generator: Generator, points: Tensor | None = None) -> nn.Module:
        """Make the networks for the model's dimension and classes, standardised to the points if there are some."""
        raise NotImplementedError

    def hyperparameters(self) -> dict[str, object]:
        """Name of the model and values of its parameters, in JSON's terms."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.init and f.name not in MAKERS}
        return {"model": type(self).__name__, **{k: _plain(v) for k, v in values.items()}}

    def save(self, path: str | Path) -> None:
        """Write networks and hyperparameters to one safetensors file, atomically; OSError if the disk is full."""
        if not self.networks():
            raise ValueError("the model has not been fitted: there is nothing to save")
        tensors = {f"{a}/{b}": t for a, network in self.networks().items() for b, t in network.state_dict().items()}
        notes = {"hyperparameters": self.hyperparameters(), "dimension": self.dimension, "classes": self.classes}
        checkpoints.write(path, tensors, {**notes, "losses": self.losses})

    def load(self, path: str | Path) -> Self:
        """Read networks from a file of :meth:`save`, into a model made with the same hyperparameters.

        Raises
        ------
        ValueError
            If the file is damaged, or of other hyperparameters or another shape.
        """
        tensors, notes = checkpoints.read(path)
        mine = json_like(self.hyperparameters())
        if notes.get("hyperparameters") != mine:
            raise ValueError(f"{path} holds a model with {notes.get('hyperparameters')}, not {mine}")
        self.dimension, self.classes, self.losses = notes["dimension"], notes["classes"], notes["losses"]
        self._make(torch.Generator().manual_seed(0))
        for name, network in self.networks().items():
            own = {key[len(name) + 1 :]: t for key, t in tensors.items() if key.startswith(name + "/")}
            try:
                network.load_state_dict(own)
            except RuntimeError as error:
                raise ValueError(f"{path} holds a network of another shape: {error}") from None
        return self


def made(name: str, make: Callable[[], nn.Module], generator: Generator) -> nn.Module:
    """The network that the named parameter makes; ValueError if it is none, or not in float32."""
    network = seeded(make, generator)
    if not isinstance(network, nn.Module):
        raise ValueError(f"{name} must make a torch.nn.Module, got {type(network).__name__}")
    kinds = {t.dtype for t in network.state_dict().values() if t.dtype.is_floating_point or t.dtype.is_complex}
    if kinds - {torch.float32}:
        raise ValueError(f"{name} must make a network in float32, as the data are, got {kinds - {torch.float32}}")
    return network


def _plain(value: object) -> object:
    """A hyperparameter in JSON's terms."""
    return value if isinstance(value, bool | int | float | str | type(None)) else described(value)
