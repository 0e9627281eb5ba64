"""What every model of the book shares: fit on a source and a target, sample by an explicit solver, save and load."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Generator, Tensor, nn

from nsgf_lite.inputs import exact, read_clouds, read_counts, read_generator
from nsgf_lite.models.saved import Saved, made, told
from nsgf_lite.networks import MLP, call, evaluating
from nsgf_lite.particles import METHODS, advance
from nsgf_lite.training import Part, Stream, Training, fit_together
from nsgf_lite.training.together import Batch

NetworkFactory = Callable[[int, int], nn.Module]


def read_factory(**factories: NetworkFactory | None) -> None:
    """Check that the named parameters make networks; ValueError if not."""
    for name, factory in factories.items():
        if factory is not None and (isinstance(factory, nn.Module) or not callable(factory)):
            raise ValueError(f"{name} must be None or a function {name}(d, classes), got {factory!r}")


@dataclass
class Flow(Saved):
    """A velocity field v(x, t), t in [0, 1], learned by regression; the base of NSGF and of the straight flows.

    A model has the parameters `network`, which makes the network from the dimension and the number of classes,
    ``network(d, classes)``, to be called as ``(x, t)`` or ``(x, t, label)`` (None for :class:`nsgf_lite.networks.MLP`),
    and `labels`, the number of classes that a data loader's labels name. It says in :meth:`_begin` how to prepare, and
    in :meth:`_batch` which (x, t, v) it regresses on. Networks, batches and samples are float32, whatever torch's
    default dtype is, and ``torch.autocast`` changes nothing.

    Used in
    -------
    The base of every model; no chapter makes one of its own.
    """

    alone: ClassVar[bool] = False  # whether the model cannot train in a stack with others
    outputs: ClassVar[int | None] = None  # of the network that is made by default; None for a velocity

    velocity: nn.Module = field(init=False, repr=False)
    source: Stream = field(init=False, repr=False)
    target: Stream = field(init=False, repr=False)

    # --- what a model adds ----------------------------------------------------------------------------------------

    def _begin(self, generator: Generator) -> None:
        """Fill what the batches are drawn from, before the first step of a new run."""

    def _batch(self, n: int, step: int, generator: Generator) -> Batch:
        """Draw x (n, d), t (n,), v (n, d) and labels (n,), or None, for one optimiser step."""
        raise NotImplementedError

    def _parts(self) -> dict[str, Part]:
        """What a checkpoint must hold beside network, optimiser and generator."""
        return {"source": self.source, "target": self.target}

    def _asks(self, step: int) -> bool:
        """Whether the batch of this step asks the network for velocities."""
        return False

    def _saved(self) -> None:
        """A checkpoint has been written."""

    def _data(self) -> list[str]:
        """What a checkpoint remembers of the data."""
        return [repr(self.source), repr(self.target)]

    # --- what all share -------------------------------------------------------------------------------------------

    def prepare(self, source: Any, target: Any, training: Training, generator: Generator) -> nn.Module:
        """Read the data and make the network, standardised to them; ``fit`` does this first.

        Raises
        ------
        ValueError
            If source and target disagree in dimension, or as :class:`nsgf_lite.training.Stream`.
        """
        labels = getattr(self, "labels", 0)
        self.source, self.target = Stream("source", source, labels), Stream("target", target, labels)
        self.classes = self.target.classes
        if self.source.classes not in (0, self.classes):
            raise ValueError(f"source has {self.source.classes} classes and target {self.classes}")
        kinds = range(max(1, self.classes))
        share = -(-training.batch // len(kinds))
        first = [s.many(share, generator, c) for s in (self.source, self.target) for c in kinds]
        self.dimension = first[-1].shape[1]
        for k, points in enumerate(first):
            if points.shape[1] != self.dimension:
                name = "source" if k < len(kinds) else "target"
                raise ValueError(f"{name} has dimension {points.shape[1]} and target {self.dimension}")
        return self._make(generator, torch.cat(first))

    @torch.inference_mode(False)  # in which no gradient could ever be taken of the network
    def _make(self, generator: Generator, points: Tensor | None = None) -> nn.Module:
        self.velocity = self._made("network", self.outputs, generator, points)
        return self.velocity

    def _made(self, name: str, out: int | None, generator: Generator, points: Tensor | None) -> nn.Module:
        """The network that the parameter `name` makes, or the one made by default, standardised if there are points."""
        make = getattr(self, name, None)
        if make is None:
            make = lambda d, classes: MLP(d, out=out, classes=classes)  # noqa: E731
        network = made(name, lambda: make(self.dimension, self.classes), generator)
        if points is not None and isinstance(network, MLP):
            network.standardise(points)
        return network.to(generator.device)

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
        """Train on a source and a target, each a law, a tensor, a data loader, or one of these for each class.

        Parameters
        ----------
        source, target : Law, Tensor, DataLoader, or a sequence
            As :class:`nsgf_lite.training.Stream` reads them.
        training : Training
            The budget.
        seed : int
            All chance of the run: the same bits again on one machine with one number of threads.
        checkpoint : path
            File to resume from and to write; see :func:`nsgf_lite.training.train`.
        progress : bool
            Show a progress bar with the loss.

        Raises
        ------
        ValueError
            If the data do not fit one another or the minibatch, the network returns anything but velocities, or the
            checkpoint is another run's.
        OSError
            If another run is at work on the checkpoint, or it cannot be written.
        FloatingPointError
            If the run diverges; the message says at which step.
        """
        fit_together([self], [source], [target], training, seeds=[seed], checkpoint=checkpoint, progress=progress)
        return self

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
        """Positions (steps + 1, n, d) along the learned flow from the source; arguments as in :meth:`sample`."""
        if solver not in METHODS:
            raise ValueError(f"solver must be one of {', '.join(METHODS)}, got {solver!r}")
        x, labels = self._start(n, steps, start, label, generator)
        rows = [x]
        for k in range(steps):
            moved, _ = advance(lambda z, t: self._at(z, t, labels), rows[-1], k / steps, 1 / steps, solver)
            rows.append(moved)
        return told(torch.stack(rows))

    def sample(
        self,
        n: int,
        steps: int,
        solver: str = "euler",
        *,
        start: Tensor | None = None,
        label: int | None = None,
        generator: Generator | None = None,
    ) -> Tensor:
        """Samples (n, d) of the target: the source's points at the end of the learned flow.

        A RuntimeWarning says so if some of them are not finite.

        Parameters
        ----------
        n, steps : int
            Number of samples, and of steps of the solver.
        solver : str
            ``euler``, ``heun`` or ``rk4``: 1, 2, 4 evaluations of the network a step.
        start : Tensor
            Points (n, d) to start from, instead of a draw from the source; a loaded model has no source and needs it.
        label : int
            Class, if the model has classes; without it each point gets one at random.
        generator : Generator
            Chance of the source; by default a fresh one with seed 0.

        Raises
        ------
        ValueError
            If the model has not been fitted, or start, label or solver do not fit.
        """
        return self.path(n, steps, solver, start=start, label=label, generator=generator)[-1]

    def evaluations(self, steps: int, solver: str = "euler") -> int:
        """Number of network evaluations that each sample costs; arguments as in :meth:`sample`."""
        if solver not in METHODS:
            raise ValueError(f"solver must be one of {', '.join(METHODS)}, got {solver!r}")
        read_counts(steps=steps)
        return steps * (len(METHODS[solver]) - 1)

    def _start(
        self, n: int, steps: int, start: Tensor | None, label: int | None, generator: Generator | None
    ) -> tuple[Tensor, Tensor | None]:
        """Starting points and labels of a sample."""
        if not hasattr(self, "velocity"):
            raise ValueError("the model has not been fitted: call fit or load first")
        n, steps = read_counts(n=n, steps=steps)
        read_generator(generator)
        if label is not None and (type(label) is not int or not 0 <= label < self.classes):
            raise ValueError(f"label must be None or an integer below the classes, {self.classes}, got {label!r}")
        device = next(self.velocity.parameters()).device
        generator = generator or torch.Generator(device).manual_seed(0)
        labels = None
        if self.classes:
            drawn = torch.randint(self.classes, (n,), generator=generator, device=generator.device).to(device)
            labels = drawn if label is None else torch.full_like(drawn, label)
        if start is not None:
            read_clouds(start=start)
            if start.shape != (n, self.dimension):
                raise ValueError(f"start must have shape ({n}, {self.dimension}), got {tuple(start.shape)}")
            start = start.to(device, torch.float32)
            read_clouds(start=start)
            return start, labels
        if not hasattr(self, "source"):
            raise ValueError("a loaded model has no source: give the points to start from as start=")
        if labels is None or not self.source.classes:
            return self.source.draw(n, generator).to(device), labels
        x = torch.empty(n, self.dimension, device=device, dtype=torch.float32)
        for c in labels.unique().tolist():
            x[labels == c] = self.source.draw(int((labels == c).sum()), generator, c).to(device)
        return x, labels

    def _at(self, x: Tensor, t: float | Tensor, labels: Tensor | None) -> Tensor:
        """Velocity of the points x, in evaluation mode, at the time t, one number or one for each point, (n, 1)."""
        times = torch.as_tensor(t, dtype=x.dtype, device=x.device).expand(len(x), 1)[:, 0]
        with evaluating(self.velocity):
            return call(self.velocity, x, times, labels)

    # --- files ----------------------------------------------------------------------------------------------------

    def networks(self) -> dict[str, nn.Module]:
        """The networks that :meth:`save` writes."""
        return {"velocity": self.velocity} if hasattr(self, "velocity") else {}
