"""Neural Sinkhorn gradient flow: a network learns the Sinkhorn flow's velocity, alone or before a straight flow."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Self

import torch
from accelerate import Accelerator
from torch import Generator, Tensor, nn

from nsgf_lite.fields import Sinkhorn
from nsgf_lite.inputs import read_clouds, read_counts, read_positive
from nsgf_lite.models.flow import Batch, Flow, NetworkFactory, call
from nsgf_lite.models.pool import Pool, trajectories
from nsgf_lite.models.straight import Interpolant
from nsgf_lite.networks import MLP, seeded
from nsgf_lite.particles import advance
from nsgf_lite.training import Part, Training, machine, train


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
        read_positive(eps=self.eps, step=self.step, tol=self.tol)
        read_counts(steps=self.steps, minibatch=self.minibatch, pool=self.pool, together=self.together)
        if self.step >= 2:
            raise ValueError(f"step must be below 2, where explicit steps diverge, got {self.step}")
        if not (isinstance(self.renew, int) and self.renew >= 0):
            raise ValueError(f"renew must be a non-negative integer, got {self.renew!r}")

    def hyperparameters(self) -> dict[str, object]:
        """As :meth:`Flow.hyperparameters`, without the folder, which may move."""
        return {name: value for name, value in super().hyperparameters().items() if name != "folder"}

    def prepare(self, source: Any, target: Any, training: Training, generator: Generator) -> nn.Module:
        """As :meth:`Flow.prepare`; and an empty pool."""
        rank = machine().process_index
        self.trajectories = Pool(self.pool, f"{self.folder}.{rank}" if self.folder and rank else self.folder, self.half)
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
        x, k, v, labels = self.trajectories.sample(n, generator)
        return x, k / self.steps, self.step * self.steps * v, labels if self.classes else None


@dataclass
class NSGFPlusPlus(Flow):
    """NSGF++: at most five Sinkhorn steps, a predicted time, and a straight flow from there to the end.

    Three parts, trained one after the other with the same budget and seed: an :class:`NSGF` of `steps` steps; a
    straight flow regressed on ``x1 - x0`` along ``x_t = (1-t) x0 + t x1``, the one that
    :class:`nsgf_lite.RectifiedFlow` without a teacher learns from that seed; a predictor of the time t at which a point
    lies on such a segment. ``model.losses`` has the losses of the three in this order.

    A sample costs `steps` evaluations of the first network, one of the predictor, and those of the straight flow:
    :meth:`evaluations` adds them up.

    Parameters
    ----------
    eps, step, steps, network, minibatch, pool, renew, on_policy, together, tol, folder, half, labels
        As :class:`NSGF`; steps at most 5.
    predictor : callable
        Makes the time predictor: ``predictor(d, classes)``, one output, whose logistic function is the time. By default
        :class:`nsgf_lite.networks.MLP`.

    Raises
    ------
    ValueError
        As :class:`NSGF`; if steps is more than 5.

    Source
    ------
    Zhu et al. (2024), the version with NSGF++ (arXiv 2401.14069).

    Used in
    -------
    :doc:`/book/two_phase`
    """

    eps: float = 0.1
    step: float = 0.2
    steps: int = 5
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
    predictor: NetworkFactory | None = None
    sinkhorn: NSGF = field(init=False, repr=False)
    straight: Interpolant = field(init=False, repr=False)
    clock: nn.Module = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.sinkhorn = NSGF(**{f.name: getattr(self, f.name) for f in fields(NSGF) if f.init})
        if self.steps > 5:
            raise ValueError(f"steps must be at most 5, the first phase is short by design, got {self.steps}")
        self.straight = Interpolant(self.network, self.labels)

    def hyperparameters(self) -> dict[str, object]:
        """As :meth:`NSGF.hyperparameters`."""
        values = super().hyperparameters()
        return {name: value for name, value in values.items() if name not in ("folder", "predictor")}

    def prepare(self, source: Any, target: Any, training: Training, generator: Generator) -> nn.Module:
        """Refused: the three parts train one after the other."""
        raise ValueError("NSGFPlusPlus cannot be fitted together with others: call its fit")

    def fit(
        self,
        source: Any,
        target: Any,
        training: Training | None = None,
        *,
        seed: int = 0,
        checkpoint: str | Path | None = None,
        progress: bool = True,
    ) -> Self:
        """Train the three parts on a source and a target; as :meth:`Flow.fit`, with a checkpoint file for each part.

        The files are `checkpoint` with ``.sinkhorn``, ``.straight`` and ``.clock`` added.
        """
        training = training or Training()
        losses: list[float] = []
        for name, part in (("sinkhorn", self.sinkhorn), ("straight", self.straight)):
            file = None if checkpoint is None else f"{checkpoint}.{name}"
            part.fit(source, target, training, seed=seed, checkpoint=file, progress=progress)
            losses += part.losses
        accelerator = Accelerator()
        chance = torch.Generator(accelerator.device).manual_seed(seed + 1_000_003 * accelerator.process_index)
        self._make_clock(chance, self.straight._batch(training.batch, 0, chance)[0])

        def loss(network: nn.Module, step: int) -> Tensor:
            x, t, _, labels = self.straight._batch(training.batch, step, chance)
            return (torch.sigmoid(_timeless(network, x, labels)) - t).square().mean()

        losses += train(
            self.clock,
            loss,
            training,
            chance,
            parts=self.straight._parts(),
            identity={"models": self.hyperparameters(), "seeds": seed, "network": str(self.clock)},
            checkpoint=None if checkpoint is None else f"{checkpoint}.clock",
            progress=progress,
            name="time predictor",
            accelerator=accelerator,
        )
        self.source, self.target, self.velocity = self.straight.source, self.straight.target, self.straight.velocity
        self.dimension, self.classes, self.losses = self.straight.dimension, self.straight.classes, losses
        return self

    @torch.no_grad()
    def time(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """Predicted times (n,) at which the points x (n, d) lie on a straight path, for their labels (n,) if any.

        Raises
        ------
        ValueError
            If the model has not been fitted, x is not a cloud of its dimension, or labels are missing or not wanted.
        """
        if not hasattr(self, "velocity"):
            raise ValueError("the model has not been fitted: call fit or load first")
        read_clouds(x=x)
        if x.ndim != 2 or x.shape[1] != self.dimension:
            raise ValueError(f"x must have shape (n, {self.dimension}), got {tuple(x.shape)}")
        device = next(self.velocity.parameters()).device
        return torch.sigmoid(_timeless(self.clock, x.to(device, torch.float32), labels))

    def evaluations(self, steps: int, solver: str = "euler") -> int:
        """Network evaluations for each sample: the Sinkhorn steps, one of the predictor, and the straight flow's."""
        return self.steps + 1 + super().evaluations(steps, solver)

    @torch.no_grad()
    def path(
        self,
        n: int,
        steps: int,
        solver: str = "euler",
        *,
        start: Tensor | None = None,
        label: int | None = None,
        generator: Generator | None = None,
    ) -> Tensor:
        """Positions (self.steps + steps + 1, n, d): the Sinkhorn steps, by Euler, then `steps` of the straight flow.

        Arguments as in :meth:`sample`. Row ``self.steps`` is where the phases meet; from there each particle goes from
        its own predicted time to 1.
        """
        x, labels = self._start(n, steps, start, label, generator)
        rows = [x]
        for k in range(self.steps):
            moved, _ = advance(lambda z, t: self.sinkhorn._at(z, t, labels), rows[-1], k / self.steps, 1 / self.steps)
            rows.append(moved)
        begin = self.time(rows[-1], labels).unsqueeze(1)
        length = (1 - begin) / steps
        for k in range(steps):
            now = begin + k * length
            moved, _ = advance(lambda z, t: self.straight._at(z, t, labels), rows[-1], now, length, solver)
            rows.append(moved)
        return torch.stack(rows)

    def _make(self, generator: Generator, points: Tensor | None = None) -> nn.Module:
        for part in (self.sinkhorn, self.straight):
            part.dimension, part.classes = self.dimension, self.classes
            part._make(generator, points)
        self._make_clock(generator, points)
        self.velocity = self.straight.velocity
        return self.velocity

    def _make_clock(self, generator: Generator, points: Tensor | None = None) -> None:
        make = self.predictor or (lambda d, classes: MLP(d, out=1, classes=classes))
        part = self.straight
        self.clock = seeded(lambda: make(part.dimension, part.classes), generator).to(generator.device)
        if points is not None and isinstance(self.clock, MLP):
            self.clock.standardise(points)

    def networks(self) -> dict[str, nn.Module]:
        """The three networks that :meth:`Flow.save` writes."""
        return {"sinkhorn": self.sinkhorn.velocity, "straight": self.straight.velocity, "clock": self.clock}


def _timeless(network: nn.Module, x: Tensor, labels: Tensor | None) -> Tensor:
    """Value (n,) of a network of one output that is not told the time."""
    return call(network, x, x.new_zeros(len(x)), labels)[:, 0]
