"""Neural Sinkhorn gradient flow: a network learns the Sinkhorn flow's velocity."""

from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn

from nsgf_lite.fields import Sinkhorn
from nsgf_lite.inputs import read_flags, read_parameters
from nsgf_lite.models.flow import Batch, Flow, NetworkFactory, read_factory
from nsgf_lite.models.pool import Pool, trajectories
from nsgf_lite.training import Part, Training, machine


@dataclass
class NSGF(Flow):
    """Neural Sinkhorn gradient flow: v(x, t) regressed on the velocity of minibatches that follow the Sinkhorn flow.

    ``steps`` explicit steps of length ``step`` take a minibatch of the source to one of the target; their positions and
    velocities fill a :class:`nsgf_lite.Pool`, from which the regression draws. Time is divided by
    ``step * steps``, so that the network's runs from 0 to 1 and its velocity is ``step * steps`` times the flow's.

    Parameters
    ----------
    eps : float
        Temperature, in units of squared length (the cost is ``|x - y|^2 / 2``).
    step : float
        Length of an explicit step of the flow; below 1, and near the end all of ``exp(-step * steps)`` is left to go.
    steps : int
        Number of steps; sample with as many: the network knows the times of these alone.
    network : callable
        See :class:`nsgf_lite.models.Flow`.
    minibatch : int
        Number of particles, and of data, that a Sinkhorn problem sees.
    pool : int
        Number of minibatches whose trajectories the pool holds.
    renew : int
        Number of optimiser steps between two renewals of the pool's oldest `together` minibatches; 0 for none.
    on_policy : bool
        Renewed minibatches are moved by the network, and record the velocity of the Sinkhorn flow where it took them.
    together : int
        Number of minibatches solved at once.
    tol : float
        L1 marginal error at which each solve stops.
    folder : path
        Where the pool lives on disk, and it alone; None for in memory. Other processes than the first add their number.
    half : bool
        Store the pool in half precision.
    labels : int
        Number of classes that a data loader's labels name.

    Raises
    ------
    ValueError
        If a number is not positive, step is not below 2 (explicit steps diverge), or the pool cannot hold every class.

    Source
    ------
    Zhu et al. (2024), Algorithms 1 and 2.

    Used in
    -------
    :doc:`/book/neural_sinkhorn_flow`, :doc:`/book/two_phase`, :doc:`/book/two_dimensional_benchmark`
    """

    eps: float = 0.1
    step: float = 0.4
    steps: int = 10
    network: NetworkFactory | None = None
    minibatch: int = 256
    pool: int = 100
    renew: int = 0
    on_policy: bool = False
    together: int = 4
    tol: float = 1e-3
    folder: str | Path | None = None
    half: bool = False
    labels: int = 0
    trajectories: Pool = field(init=False, repr=False)

    def __post_init__(self) -> None:
        counts = "steps minibatch pool together"
        read_parameters(self, positive="eps step tol", counts=counts, naturals="renew labels")
        if self.step >= 2:
            raise ValueError(f"step must be below 2, where explicit steps diverge, got {self.step}")
        read_flags(on_policy=self.on_policy, half=self.half)
        read_factory(network=self.network)
        if not isinstance(self.folder, str | PathLike | None):
            raise ValueError(f"folder must be None or a path, got {self.folder!r}")

    def hyperparameters(self) -> dict[str, object]:
        """As :meth:`Flow.hyperparameters`, without the folder, which may move."""
        return {name: value for name, value in super().hyperparameters().items() if name != "folder"}

    def prepare(self, source: Any, target: Any, training: Training, generator: Generator) -> nn.Module:
        """As :meth:`Flow.prepare`; and an empty pool."""
        folder = None if self.folder is None else machine().own(self.folder)
        self.trajectories = Pool(self.pool, folder, self.half)
        network = super().prepare(source, target, training, generator)
        if self.pool < self.classes:
            raise ValueError(f"pool must hold a minibatch of each class, {self.classes}, got {self.pool}")
        return network

    def _parts(self) -> dict[str, Part]:
        return super()._parts() | {"pool": self.trajectories}

    def _build(self, minibatches: int, generator: Generator, on_policy: bool = False) -> None:
        """Follow so many minibatches, each of one class in turn, and add what they did to the pool."""
        turn = self.trajectories.added
        labels = torch.tensor([(turn + k) % max(1, self.classes) for k in range(minibatches)])
        x = torch.stack([self.source.draw(self.minibatch, generator, c) for c in labels.tolist()])
        y = torch.stack([self.target.draw(self.minibatch, generator, c) for c in labels.tolist()])
        each = labels.to(x.device).repeat_interleave(self.minibatch) if self.classes else None

        def pilot(z: Tensor, k: int) -> Tensor:
            return z + self._at(z.flatten(0, 1), k / self.steps, each).view_as(z) / self.steps

        field = Sinkhorn(self.eps, self.tol)
        flow = trajectories(field, x, y, self.step, self.steps, pilot if on_policy else None)
        self.trajectories.add(*flow, labels)

    def _begin(self, generator: Generator) -> None:
        for k in range(0, self.pool, self.together):
            self._build(min(self.together, self.pool - k), generator)
        self._saved()

    def _renews(self, step: int) -> bool:
        return bool(self.renew and step and step % self.renew == 0)

    def _asks(self, step: int) -> bool:
        return self.on_policy and self._renews(step)

    def _saved(self) -> None:
        self.trajectories.sweep()

    def _batch(self, n: int, step: int, generator: Generator) -> Batch:
        if self._renews(step):
            self._build(self.together, generator, self.on_policy)
        x, number, v, labels = self.trajectories.sample(n, generator)
        k = number.float()
        return x, k / self.steps, self.step * self.steps * v, labels if self.classes else None
