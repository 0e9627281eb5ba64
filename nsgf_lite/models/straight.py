"""Flows along interpolations: flow matching, OT-CFM, rectified flow and the stochastic interpolant.

Each regresses v(x_t, t) on the velocity of a path between a source point x0 and a target point x1, t uniform in [0, 1].
"""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Generator, Tensor, nn

from nsgf_lite.inputs import read_parameters
from nsgf_lite.models.flow import Batch, Flow, NetworkFactory, read_factory
from nsgf_lite.training import Part, Training
from nsgf_lite.training.checkpoints import hash_of


class Table:
    """Pairs (x0, x1) with their class, made before training and drawn from during it."""

    def __init__(self) -> None:
        self.x0 = self.x1 = torch.empty(0)
        self.label = torch.empty(0, dtype=torch.int64)

    def add(self, x0: Tensor, x1: Tensor, label: int) -> None:
        """Add pairs (n, d) of one class."""
        labels = torch.full((len(x0),), label, device=x0.device)
        old = [(self.x0, self.x1, self.label)] if len(self.x0) else []
        self.x0, self.x1, self.label = (torch.cat(rows) for rows in zip(*old, (x0, x1, labels), strict=True))

    def sample(self, n: int, generator: Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Draw n pairs with replacement."""
        row = torch.randint(len(self.x0), (n,), generator=generator, device=generator.device).to(self.x0.device)
        x0, x1, label = (column[row].to(generator.device) for column in (self.x0, self.x1, self.label))
        return x0, x1, label

    def state(self) -> dict[str, Tensor]:
        """All pairs."""
        return {"x0": self.x0, "x1": self.x1, "label": self.label}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Take them up."""
        self.x0, self.x1, self.label = state["x0"], state["x1"], state["label"]


@dataclass
class Interpolant(Flow):
    """Base of the straight flows: independent pairs (x0, x1) on the segment ``x_t = (1-t) x0 + t x1``."""

    network: NetworkFactory | None = None
    labels: int = 0
    table: Table = field(init=False, default_factory=Table, repr=False)

    def __post_init__(self) -> None:
        read_parameters(self, naturals="labels")
        read_factory(network=self.network)

    def prepare(self, source: Any, target: Any, training: Training, generator: Generator) -> nn.Module:
        """As :meth:`Flow.prepare`; and an empty table."""
        self.table = Table()
        return super().prepare(source, target, training, generator)

    def _pairs(self, n: int, label: int, generator: Generator) -> tuple[Tensor, Tensor]:
        """Draw n pairs of a source and a target point."""
        return self.source.draw(n, generator, label), self.target.draw(n, generator, label)

    def _between(self, x0: Tensor, x1: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Position and velocity at the times t (n, 1) of the path from x0 to x1."""
        return (1 - t) * x0 + t * x1, x1 - x0

    def _parts(self) -> dict[str, Part]:
        return super()._parts() | {"table": self.table}

    def _batch(self, n: int, step: int, generator: Generator) -> Batch:
        t = torch.rand(n, generator=generator, device=generator.device, dtype=torch.float32)
        if len(self.table.x0):
            x0, x1, labels = self.table.sample(n, generator)
        else:
            # As many of each class as there is room for: the classes take turns at the few that are left.
            labels = (torch.arange(n, device=t.device) + step) % max(1, self.classes)
            counts = torch.bincount(labels).tolist()
            drawn = [self._pairs(count, c, generator) for c, count in enumerate(counts) if count]
            x0, x1 = (torch.cat(column) for column in zip(*drawn, strict=True))
            labels = labels.sort().values
        x, v = self._between(x0, x1, t.unsqueeze(1))
        return x, t, v, labels if self.classes else None


@dataclass
class FlowMatching(Interpolant):
    """Flow matching along conditional optimal-transport paths: ``x_t = (1 - (1-s) t) x0 + t x1``, independent pairs.

    Parameters
    ----------
    smallest : float
        s, the standard deviation (in units of the source's) that the path keeps at t = 1.

    Raises
    ------
    ValueError
        If smallest is not in [0, 1).

    Source
    ------
    Lipman et al. (2023), equations 22 and 23.

    Used in
    -------
    :doc:`/book/two_dimensional_benchmark`
    """

    smallest: float = 1e-2

    def __post_init__(self) -> None:
        super().__post_init__()
        read_parameters(self, sizes="smallest")
        if self.smallest >= 1:
            raise ValueError(f"smallest must be below 1, got {self.smallest!r}")

    def _between(self, x0: Tensor, x1: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        kept = 1 - self.smallest
        return (1 - kept * t) * x0 + t * x1, x1 - kept * x0


@dataclass
class StochasticInterpolant(Interpolant):
    """Trigonometric interpolant ``x_t = cos(πt/2) x0 + sin(πt/2) x1``, independent pairs.

    Source
    ------
    Albergo and Vanden-Eijnden (2023), equation 5.

    Used in
    -------
    :doc:`/book/two_dimensional_benchmark`
    """

    def _between(self, x0: Tensor, x1: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = (math.pi / 2 * t).cos(), (math.pi / 2 * t).sin()
        return cos * x0 + sin * x1, math.pi / 2 * (cos * x1 - sin * x0)


@dataclass
class OTCFM(Interpolant):
    """Conditional flow matching with optimal-transport pairs: x0 and x1 matched exactly within minibatches.

    Parameters
    ----------
    minibatch : int
        Number of points that are matched at once, exactly (SciPy's linear assignment).
    matched : int
        Number of minibatches matched once, before training, whose pairs are drawn from afterwards; 0 for fresh pairs in
        every step.

    Raises
    ------
    ValueError
        If minibatch is not a positive integer or matched is negative; when fitted, if fresh pairs are to come from a
        minibatch that is not the training's batch, or fewer minibatches are matched than there are classes.

    Source
    ------
    Tong et al. (2024), Proposition 3.4; Pooladian et al. (2023).

    Used in
    -------
    :doc:`/book/two_dimensional_benchmark`
    """

    minibatch: int = 256
    matched: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        read_parameters(self, counts="minibatch", naturals="matched")

    def prepare(self, source: Any, target: Any, training: Training, generator: Generator) -> nn.Module:
        """As :meth:`Interpolant.prepare`."""
        if not self.matched and self.minibatch != training.batch:
            raise ValueError(
                f"minibatch must be the training's batch, {training.batch}, if pairs are matched afresh in every step "
                f"(matched = 0), got {self.minibatch}"
            )
        network = super().prepare(source, target, training, generator)
        if 0 < self.matched < self.classes:
            raise ValueError(f"matched must be at least the number of classes, {self.classes}, got {self.matched}")
        return network

    def _begin(self, generator: Generator) -> None:
        for k in range(self.matched):
            label = k % max(1, self.classes)
            self.table.add(*self._pairs(self.minibatch, label, generator), label)

    def _pairs(self, n: int, label: int, generator: Generator) -> tuple[Tensor, Tensor]:
        x0, x1 = super()._pairs(n, label, generator)
        cost = torch.cdist(x0.double(), x1.double(), compute_mode="donot_use_mm_for_euclid_dist").square().cpu().numpy()
        return x0, x1[torch.from_numpy(linear_sum_assignment(cost)[1]).to(x1.device)]


@dataclass
class RectifiedFlow(Interpolant):
    """Rectified flow: straight paths between independent pairs, or between a teacher's starting points and samples.

    Parameters
    ----------
    teacher : Flow
        A fitted model; None gives 1-RF, a 1-RF as teacher 2-RF, and so on.
    pairs, teacher_steps : int
        Number of pairs drawn from the teacher, and of its Euler steps; a tensor of fewer points is gone through again.

    Raises
    ------
    ValueError
        If a number is not a positive integer; when fitted, if the teacher has not been fitted, or there are fewer pairs
        than classes.

    Source
    ------
    Liu, Gong, Liu (2023), Algorithm 1 ("reflow").

    Used in
    -------
    :doc:`/book/two_dimensional_benchmark`
    """

    teacher: Flow | None = field(default=None, repr=False)
    pairs: int = 50_000
    teacher_steps: int = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        read_parameters(self, counts="pairs teacher_steps")
        if not isinstance(self.teacher, Flow | None):
            raise ValueError(f"teacher must be None or a fitted model, got {self.teacher!r}")

    def hyperparameters(self) -> dict[str, object]:
        """As :meth:`Flow.hyperparameters`, with the teacher's in place of the teacher."""
        mine = super().hyperparameters()
        return {**mine, "teacher": None if self.teacher is None else self.teacher.hyperparameters()}

    def _data(self) -> list[str]:
        weights = self.teacher.networks() if self.teacher is not None else {}
        return super()._data() + [f"{name} of hash {hash_of(net.state_dict())}" for name, net in weights.items()]

    def _begin(self, generator: Generator) -> None:
        if self.teacher is None:
            return
        for label in range(max(1, self.classes)):
            n = self.pairs // max(1, self.classes)
            x0 = self.source.many(n, generator, label)
            x1 = self.teacher.sample(n, self.teacher_steps, start=x0, label=label if self.classes else None)
            self.table.add(x0, x1.to(x0.device), label)
