"""Euler particle transport: particles descend a divergence whose density ratio a network estimates at every step."""

import copy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Generator, Tensor, nn

from nsgf_lite.inputs import exact, read_parameters
from nsgf_lite.models.flow import Flow, NetworkFactory, call, read_factory
from nsgf_lite.models.saved import told
from nsgf_lite.networks import MLP, evaluating
from nsgf_lite.training import Training, machine, train
from nsgf_lite.training.loop import read_seed, read_training


@dataclass
class EPT(Flow):
    """Euler particle transport along the Wasserstein gradient flow of KL, by a density ratio learned at every step.

    A network learns ``r = log(q/p)`` by logistic regression between the particles (law q) and the data (law p); the
    particles move by ``-step * ∇r``, the explicit step of the flow of ``KL(q|p)``; and so on, the network going on from
    where it was. Sampling repeats the moves with the networks kept, so it takes exactly `steps` steps.

    Parameters
    ----------
    step : float
        Length of a step.
    steps : int
        Number of steps; the training's budget is shared out among them.
    particles : int
        Number of particles that are moved along during training; a tensor of fewer points is gone through again.
    network : callable
        Makes the ratio network, ``network(d, classes)``, one output; None for :class:`nsgf_lite.networks.MLP`.
    longest : float
        Longest move of a particle in one step, in units of the data's spread: a ratio between laws that hardly overlap
        is steep, and an explicit step on it leaps.

    Raises
    ------
    ValueError
        If a number is not positive, the training has fewer steps than the transport, or data come with classes.

    Source
    ------
    Gao et al. (2022), Algorithm 1, with the KL divergence; logistic regression is their Example 2.

    Used in
    -------
    :doc:`/book/two_dimensional_benchmark`
    """

    alone: ClassVar[bool] = True
    outputs: ClassVar[int | None] = 1

    step: float = 0.1
    steps: int = 100
    particles: int = 10_000
    network: NetworkFactory | None = None
    longest: float = 0.5
    kept: list[nn.Module] = field(init=False, default_factory=list, repr=False)

    def __post_init__(self) -> None:
        read_parameters(self, positive="step longest", counts="steps particles")
        read_factory(network=self.network)

    @torch.inference_mode(False)
    def _make(self, generator: Generator, points: Tensor | None = None) -> nn.Module:
        super()._make(generator, points)
        self.kept = [copy.deepcopy(self.velocity) for _ in range(self.steps)]
        return self.velocity

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
        """Train on a source and a target; as :meth:`Flow.fit`."""
        # The ratio changes with every move: no average over old weights, and a rate that starts anew for each.
        training = replace(read_training(training), ema=0.0, warmup=0, decay=self.steps)
        inner = training.steps // self.steps
        if inner == 0:
            raise ValueError(f"training must have at least {self.steps} steps, one a move, got {training.steps}")
        where = machine()
        device = where.device
        generator = torch.Generator(device).manual_seed(read_seed(seed=seed))
        network = self.prepare(source, target, training, generator)
        if self.classes:
            raise ValueError(f"target must have no classes: EPT here is unconditional, got {self.classes}")
        crowd = Crowd(self.source.many(self.particles, generator))

        def loss(net: nn.Module, step: int) -> Tensor:
            if step and step % inner == 0 and step // inner <= self.steps:
                self._move(network, step // inner - 1, crowd)
            row = torch.randint(self.particles, (training.batch,), generator=generator, device=device)
            q, p = crowd.x[row], self.target.draw(training.batch, generator)
            ratio = _ratio(net, torch.cat([q, p]))
            softplus = nn.functional.softplus
            return softplus(-ratio[: len(q)]).mean() + softplus(ratio[len(q) :]).mean()

        self.losses = train(
            network,
            loss,
            training,
            generator,
            parts={**self._parts(), "crowd": crowd, "kept": Kept(self.kept)},
            identity=lambda: {"models": self.hyperparameters(), "data": self._data(), "seeds": seed},
            checkpoint=checkpoint,
            progress=progress,
            name="EPT",
            where=where,
        )
        if training.steps == inner * self.steps:
            self.kept[-1].load_state_dict(network.state_dict())
        return self

    def _move(self, network: nn.Module, k: int, crowd: "Crowd") -> None:
        """Keep the network as the k-th, and move the particles by it."""
        self.kept[k].load_state_dict(network.state_dict())
        crowd.x = crowd.x + self._displacement(crowd.x, k)

    def _displacement(self, x: Tensor, k: int) -> Tensor:
        """Move (n, d) of the points in step k: minus the gradient of the log-ratio, times the step, not too long."""
        network = self.kept[k]
        with torch.inference_mode(False), torch.enable_grad(), evaluating(network):
            z = x.clone().detach().requires_grad_()
            (gradient,) = torch.autograd.grad(_ratio(network, z).sum(), z)
        longest = self.longest * (network.spread if isinstance(network, MLP) else 1.0)
        length = self.step * gradient.norm(dim=1, keepdim=True)
        return -self.step * gradient * (longest / length.clamp_min(1e-12)).clamp_max(1)

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
        """Positions (steps + 1, n, d); ValueError unless steps is the model's own and the solver is ``euler``."""
        if steps != self.steps or solver != "euler":
            raise ValueError(f"EPT samples by its own {self.steps} Euler steps, got {steps} of {solver!r}")
        x, _ = self._start(n, steps, start, label, generator)
        rows = [x]
        for k in range(steps):
            rows.append(rows[-1] + self._displacement(rows[-1], k))
        return told(torch.stack(rows))

    def networks(self) -> dict[str, nn.Module]:
        """The ratio networks, one for each step."""
        return {f"ratio{k}": network for k, network in enumerate(self.kept)}


def _ratio(network: nn.Module, x: Tensor) -> Tensor:
    """Estimate of ``log(q/p)`` (n,) at the points x (n, d)."""
    return call(network, x, x.new_zeros(len(x)), None, 1)[:, 0]


@dataclass
class Crowd:
    """The particles of a training, as a part of its checkpoint."""

    x: Tensor

    def state(self) -> dict[str, Tensor]:
        """The particles."""
        return {"x": self.x}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Take them up."""
        self.x = state["x"].to(self.x.device)


@dataclass
class Kept:
    """The networks kept so far, as a part of a checkpoint."""

    networks: list[nn.Module]

    def state(self) -> dict[str, Tensor]:
        """All their tensors."""
        return {f"{k}/{n}": t for k, net in enumerate(self.networks) for n, t in net.state_dict().items()}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Take them up."""
        for k, net in enumerate(self.networks):
            net.load_state_dict({n: state[f"{k}/{n}"] for n in net.state_dict()})
