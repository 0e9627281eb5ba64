"""One training loop for every model: warm-up, decay, clipping, averaged weights, checkpoints that resume to the bit."""

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from numbers import Integral
from pathlib import Path
from typing import Protocol

import torch
from torch import Generator, Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm.auto import tqdm

from nsgf_lite.inputs import exact, read_parameters
from nsgf_lite.networks import Stack
from nsgf_lite.training import checkpoints
from nsgf_lite.training.machines import Machine, chance_of_dropout, machine


@dataclass(frozen=True)
class Training:
    """Budget and habits of a training, the same for every model that is compared.

    Parameters
    ----------
    steps, batch : int
        Number of optimiser steps, and of points in each.
    rate : float
        Adam's largest learning rate: reached linearly in `warmup` steps.
    decay : int
        Number of half cosines down to zero that follow, each from the full rate; 0 to keep the rate.
    warmup : int
        Number of steps of the rise; 0 for none.
    clip : float
        Largest norm of the gradient; longer ones are shortened to it.
    ema : float
        Decay of the exponential moving average of the weights, which is what samples; 0 for none.
    every : int
        Number of steps between two checkpoints.

    Raises
    ------
    ValueError
        If a number is out of its range.

    Source
    ------
    Adam, averaged weights, warm-up, cosine and clipping are this project's habits. Zhu et al. (2024) use AdamW with
    weight decay 1e-4 for images (Appendix E.2), name no optimiser for the plane, and no average and no warm-up
    (section 5.2).

    Used in
    -------
    :doc:`/book/neural_sinkhorn_flow`
    """

    steps: int = 10_000
    batch: int = 256
    rate: float = 1e-3
    decay: int = 1
    warmup: int = 200
    clip: float = 1.0
    ema: float = 0.999
    every: int = 1_000

    def __post_init__(self) -> None:
        counts, naturals = "steps batch every", "warmup decay"
        read_parameters(self, positive="rate clip", sizes="ema", counts=counts, naturals=naturals)
        if self.ema >= 1:
            raise ValueError(f"ema must be below 1, got {self.ema!r}")

    def rate_at(self, step: int) -> float:
        """Learning rate of the step, counted from 0."""
        if step < self.warmup:
            return self.rate * (step + 1) / self.warmup
        if not self.decay:
            return self.rate
        length = max(1, (self.steps - self.warmup) // self.decay)
        return self.rate * (1 + math.cos(math.pi * ((step - self.warmup) % length) / length)) / 2


def read_training(training: Training | None) -> Training:
    """The budget, or that by default if there is none; ValueError if it is no budget."""
    if not isinstance(training, Training | None):
        raise ValueError(f"training must be None or a Training, got {training!r}")
    return training or Training()


def read_seed(*, seed: object) -> int:
    """The seed as one of Python's integers; ValueError if it is none, or none that a generator takes."""
    if isinstance(seed, bool) or not isinstance(seed, Integral) or abs(int(seed)) >= 2**62:
        raise ValueError(f"seed must be an integer of fewer than 63 bits, got {seed!r}")
    return int(seed)


class Part(Protocol):
    """What a training draws on and a checkpoint must remember: a pool, a data loader, a population of particles.

    One that keeps files has an attribute `folder`, which the training holds as it holds the checkpoint.
    """

    def state(self) -> dict[str, Tensor]:
        """Everything that a resumed run needs."""
        ...

    def restore(self, state: dict[str, Tensor]) -> None:
        """Take that up again."""
        ...


@dataclass
class Chance:
    """A generator as a part of a checkpoint."""

    generator: Generator

    def state(self) -> dict[str, Tensor]:
        """The generator's state."""
        return {"state": self.generator.get_state()}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Take it up."""
        self.generator.set_state(state["state"])


@exact
def train(
    network: nn.Module,
    loss: Callable[[nn.Module, int], Tensor],
    training: Training,
    generator: Generator,
    *,
    start: Callable[[], None] = lambda: None,
    parts: dict[str, Part] | None = None,
    identity: Callable[[], dict[str, object]] = dict,
    checkpoint: str | Path | None = None,
    saved: Callable[[], None] = lambda: None,
    progress: bool = True,
    name: str = "train",
    where: Machine | None = None,
    shown: Callable[[], dict[str, str]] = dict,
) -> list[float]:
    """Train the network in place, leave the averaged weights in it, and return the losses, means over 100 steps.

    The same seed gives the same bits, interrupted or not, on one machine with one number of threads; another number
    adds in another order. The network is left in evaluation mode.

    Parameters
    ----------
    network : nn.Module
        What is trained; a :class:`nsgf_lite.networks.Stack` is clipped member by member, as if each trained alone.
    loss : callable
        ``loss(network, step)``, a scalar; it draws its own minibatch from the generator.
    training : Training
        The budget.
    generator : Generator
        All chance of the run, on the device of the run; its seed is also that of dropout.
    start : callable
        Called before the first step of a new run (a pool is filled there); not when a checkpoint is taken up.
    parts : dict of Part
        Whatever else changes during the run.
    identity : callable
        Gives what the run is of, hyperparameters and data, in JSON's terms. A checkpoint made of another is refused,
        and so is one made by other code of this library.
    checkpoint : path
        File to write every ``training.every`` steps and at the end, and to resume from if it is there. Other processes
        than the first add their number to the name; none replaces its file before all have written theirs.
    saved : callable
        Called after each checkpoint, or where one would have been: what only older ones need may go.
    progress : bool
        Show a progress bar with the loss.
    where : Machine
        Device and processes; by default what Accelerate finds, CUDA or the CPU.
    shown : callable
        What the progress bar shows beside the loss.

    Raises
    ------
    ValueError
        If the checkpoint is damaged, or was made under other hyperparameters, of other data or for another network, or
        the processes' checkpoints are not of the same step; if the checkpoint is a folder.
    OSError
        If another run is at work on the checkpoint or the folder of a part, or they cannot be written: before any work.
    FloatingPointError
        If the loss is NaN or infinite; the message says at which step.

    Used in
    -------
    :func:`nsgf_lite.fit_together`
    """
    where, parts = where or machine(), parts or {}
    rank = where.process_index
    file = None if checkpoint is None else where.own(checkpoint)
    with ExitStack() as to_the_end:
        if file is not None:
            to_the_end.enter_context(checkpoints.held(file))
        for folder in (getattr(part, "folder", None) for part in parts.values()):
            if folder is not None:
                to_the_end.enter_context(checkpoints.held(folder, folder=True))
        to_the_end.enter_context(torch.inference_mode(False))
        to_the_end.enter_context(torch.enable_grad())
        run = _Run(network.to(where.device).train(), training, generator, parts)
        wrapped = where.shared(network)
        whose: dict[str, object] = {}
        if file is not None:
            whose = identity() | {"training": asdict(training), "processes": where.num_processes}
            whose["code"] = checkpoints.code()
        if file is not None and file.exists():
            run.resume(file, whose)
        else:
            start()
        at = where.all_of(run.done)
        if len(set(at)) > 1:
            raise ValueError(f"the processes' checkpoints {checkpoint}, {checkpoint}.1, … are of different steps, {at}")
        with tqdm(total=training.steps, initial=run.done, desc=name, disable=not progress or rank > 0) as bar:
            for step in range(run.done, training.steps):
                with chance_of_dropout(network, generator, step):
                    run.advance(loss(wrapped, step), name)
                if not run.recent:
                    bar.set_postfix(loss=f"{run.losses[-1]:.4g}", **shown(), refresh=False)
                bar.update()
                if run.done % training.every == 0 or run.done == training.steps:
                    if file is not None:
                        checkpoints.write(file, *run.state(whose), complete=lambda: where.all_of(run.done))
                    saved()
    if training.ema:
        network.load_state_dict(run.ema.module.state_dict())
    network.eval()
    return run.losses


class _Run:
    """What changes during a training: weights and their average, the optimiser's memory, chance, parts, losses."""

    def __init__(self, network: nn.Module, training: Training, generator: Generator, parts: dict[str, Part]) -> None:
        self.network, self.training, self.generator, self.parts = network, training, generator, parts
        self.ema = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(training.ema))
        # fused on the CPU needs torch 2.4
        self.optimizer = torch.optim.Adam(network.parameters(), lr=training.rate, fused=True)
        self.done, self.losses, self.recent = 0, list[float](), list[float]()

    def advance(self, value: Tensor, name: str) -> None:
        """One step of the optimiser down the gradient of the loss."""
        self.recent.append(float(value.detach()))
        if not math.isfinite(self.recent[-1]):
            raise FloatingPointError(
                f"{name} diverged: the loss is {self.recent[-1]} at step {self.done + 1} of {self.training.steps}; "
                f"a smaller rate than {self.training.rate:g}, or a look at the data?"
            )
        for group in self.optimizer.param_groups:
            group["lr"] = self.training.rate_at(self.done)
        self.optimizer.zero_grad()
        value.backward()
        if isinstance(self.network, Stack):
            clip_members(self.network, self.training.clip)
        else:
            nn.utils.clip_grad_norm_(self.network.parameters(), self.training.clip)
        self.optimizer.step()
        self.ema.update_parameters(self.network)
        self.done += 1
        if len(self.recent) == 100 or self.done == self.training.steps:
            self.losses.append(math.fsum(self.recent) / len(self.recent))
            self.recent.clear()

    def state(self, whose: dict[str, object]) -> tuple[dict[str, Tensor], dict[str, object]]:
        """All of it, for a file, and whose it is."""
        tensors = _nested("network", self.network.state_dict()) | _nested("ema", self.ema.state_dict())
        for k, values in self.optimizer.state_dict()["state"].items():
            tensors |= _nested(f"adam/{k}", values)
        for part, thing in self.parts.items():
            tensors |= _nested(f"part/{part}", thing.state())
        tensors["generator"] = self.generator.get_state()
        tensors["losses"] = torch.tensor(self.losses + self.recent, dtype=torch.float64)
        return tensors, {"identity": whose, "step": self.done, "means": len(self.losses)}

    def resume(self, file: Path, whose: dict[str, object]) -> None:
        """Take up from the file what :meth:`state` gave."""
        tensors, notes = checkpoints.read(file)
        if notes.get("identity") != checkpoints.json_like(whose):
            told = checkpoints.differences(notes.get("identity"), whose)
            raise ValueError(f"{file} was made under other hyperparameters: {told}")
        try:
            self.network.load_state_dict(_under("network", tensors))
            self.ema.load_state_dict(_under("ema", tensors))
        except RuntimeError as error:
            raise ValueError(f"{file} holds another network: {error}") from None
        memory = self.optimizer.state_dict()
        count = {int(key.split("/")[1]) for key in tensors if key.startswith("adam/")}
        memory["state"] = {k: _under(f"adam/{k}", tensors) for k in sorted(count)}
        self.optimizer.load_state_dict(memory)
        for part, thing in self.parts.items():
            thing.restore(_under(f"part/{part}", tensors))
        self.generator.set_state(tensors["generator"])
        means, every = int(notes["means"]), tensors["losses"].tolist()
        self.done, self.losses, self.recent = int(notes["step"]), every[:means], every[means:]


def _nested(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}/{name}": value for name, value in tensors.items()}


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name[len(prefix) + 1 :]: value for name, value in tensors.items() if name.startswith(prefix + "/")}


def clip_members(network: nn.Module, largest: float) -> None:
    """Shorten each member's gradient to the largest norm, as clipping would if the member trained alone."""
    grads = [p.grad for p in network.parameters() if p.grad is not None]
    norm = torch.stack([g.flatten(1).square().sum(1) for g in grads]).sum(0).sqrt()
    factor = (largest / (norm + 1e-6)).clamp_max(1)
    for g in grads:
        g.mul_(factor.reshape(-1, *[1] * (g.ndim - 1)))
