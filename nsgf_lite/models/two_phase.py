"""NSGF++: a few steps of the neural Sinkhorn flow, then a straight flow from a predicted time."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Self

import torch
from torch import Generator, Tensor, nn

from nsgf_lite.inputs import exact, read_clouds
from nsgf_lite.models.flow import Flow, NetworkFactory, call, read_factory
from nsgf_lite.models.nsgf import NSGF
from nsgf_lite.models.saved import told
from nsgf_lite.models.straight import Interpolant
from nsgf_lite.networks import evaluating
from nsgf_lite.particles import advance
from nsgf_lite.training import Training, checkpoints, machine, train
from nsgf_lite.training.loop import read_seed, read_training


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
        names = [f.name for f in fields(NSGF) if f.init]
        self.sinkhorn = NSGF(**{name: getattr(self, name) for name in names})
        for name in names:  # as it has read them
            setattr(self, name, getattr(self.sinkhorn, name))
        read_factory(predictor=self.predictor)
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
        training, seed = read_training(training), read_seed(seed=seed)
        where = machine()
        files: dict[str, str | None] = {"sinkhorn": None, "straight": None, "clock": None}
        if checkpoint is not None:
            files = {name: f"{checkpoint}.{name}" for name in files}
            for file in files.values():  # all three, before the work on any
                with checkpoints.held(where.own(str(file))):
                    pass
        losses: list[float] = []
        for name, part in (("sinkhorn", self.sinkhorn), ("straight", self.straight)):
            part.fit(source, target, training, seed=seed, checkpoint=files[name], progress=progress)
            losses += part.losses
        chance = torch.Generator(where.device).manual_seed(seed + 1_000_003 * where.process_index)
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
            identity=lambda: {
                "models": self.hyperparameters(),
                "data": self.straight._data(),
                "seeds": seed,
                "network": str(self.clock),
            },
            checkpoint=files["clock"],
            progress=progress,
            name="time predictor",
            where=where,
        )
        self.source, self.target, self.velocity = self.straight.source, self.straight.target, self.straight.velocity
        self.dimension, self.classes, self.losses = self.straight.dimension, self.straight.classes, losses
        return self

    @exact
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
        with evaluating(self.clock):
            return torch.sigmoid(_timeless(self.clock, x.to(device, torch.float32), labels))

    def evaluations(self, steps: int, solver: str = "euler") -> int:
        """Network evaluations for each sample: the Sinkhorn steps, one of the predictor, and the straight flow's."""
        return self.steps + 1 + super().evaluations(steps, solver)

    @exact
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
        return told(torch.stack(rows))

    def _make(self, generator: Generator, points: Tensor | None = None) -> nn.Module:
        for part in (self.sinkhorn, self.straight):
            part.dimension, part.classes = self.dimension, self.classes
            part._make(generator, points)
        self._make_clock(generator, points)
        self.velocity = self.straight.velocity
        return self.velocity

    def _make_clock(self, generator: Generator, points: Tensor | None = None) -> None:
        self.dimension, self.classes = self.straight.dimension, self.straight.classes
        self.clock = self._made("predictor", 1, generator, points)

    def networks(self) -> dict[str, nn.Module]:
        """The three networks that :meth:`Flow.save` writes."""
        return {"sinkhorn": self.sinkhorn.velocity, "straight": self.straight.velocity, "clock": self.clock}


def _timeless(network: nn.Module, x: Tensor, labels: Tensor | None) -> Tensor:
    """Value (n,) of a network of one output that is not told the time."""
    return call(network, x, x.new_zeros(len(x)), labels, 1)[:, 0]
