"""One training loop for every model: warm-up, decay, clipping, averaged weights, checkpoints that resume to the bit."""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import torch
from accelerate import Accelerator
from torch import Generator, Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm.auto import tqdm

from nsgf_lite.inputs import read_counts, read_naturals, read_positive
from nsgf_lite.networks import Stack
from nsgf_lite.training import checkpoints


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
        read_counts(steps=self.steps, batch=self.batch, every=self.every)
        read_positive(rate=self.rate, clip=self.clip)
        read_naturals(warmup=self.warmup, decay=self.decay)
        if not (isinstance(self.ema, int | float) and 0 <= self.ema < 1):
            raise ValueError(f"ema must be in [0, 1), got {self.ema!r}")

    def rate_at(self, step: int) -> float:
        """Learning rate of the step, counted from 0."""
        if step < self.warmup:
            return self.rate * (step + 1) / self.warmup
        if not self.decay:
            return self.rate
        length = max(1, (self.steps - self.warmup) // self.decay)
        return self.rate * (1 + math.cos(math.pi * ((step - self.warmup) % length) / length)) / 2


class Part(Protocol):
    """What a training draws on and a checkpoint must remember: a pool, a data loader, a population of particles."""

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


def machine() -> Accelerator:
    """CUDA if there is some, else the CPU: Apple's MPS lacks the float64 that the solver needs."""
    return Accelerator(cpu=not torch.cuda.is_available())


def _nested(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}/{name}": value for name, value in tensors.items()}


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name[len(prefix) + 1 :]: value for name, value in tensors.items() if name.startswith(prefix + "/")}


def train(
    network: nn.Module,
    loss: Callable[[nn.Module, int], Tensor],
    training: Training,
    generator: Generator,
    *,
    start: Callable[[], None] = lambda: None,
    parts: dict[str, Part] | None = None,
    identity: dict[str, object] | None = None,
    checkpoint: str | Path | None = None,
    saved: Callable[[], None] = lambda: None,
    progress: bool = True,
    name: str = "train",
    accelerator: Accelerator | None = None,
) -> list[float]:
    """Train the network in place, leave the averaged weights in it, and return the losses, means over 100 steps.

    Parameters
    ----------
    network : nn.Module
        What is trained; a :class:`nsgf_lite.networks.Stack` is clipped member by member, as if each trained alone.
    loss : callable
        ``loss(network, step)``, a scalar; it draws its own minibatch from the generator.
    training : Training
        The budget.
    generator : Generator
        All chance of the run, on the device of the run.
    start : callable
        Called before the first step of a new run (a pool is filled there); not when a checkpoint is taken up.
    parts : dict of Part
        Whatever else changes during the run.
    identity : dict
        Hyperparameters, in JSON's terms; a checkpoint made under others is refused.
    checkpoint : path
        File to write every ``training.every`` steps and at the end, and to resume from if it is there. Other processes
        than the first add their number to the name.
    saved : callable
        Called after each checkpoint, or where one would have been: what only older ones need may go.
    progress : bool
        Show a progress bar with the loss.
    accelerator : Accelerator
        Device and processes; by default what Accelerate finds, CUDA or the CPU.

    Raises
    ------
    ValueError
        If the checkpoint is damaged, or was made under other hyperparameters or for another network, or the processes'
        checkpoints are not of the same step.
    FloatingPointError
        If the loss is NaN or infinite; the message says at which step.

    Used in
    -------
    :func:`nsgf_lite.fit_together`
    """
    accelerator = accelerator or machine()
    rank = accelerator.process_index
    file = None if checkpoint is None else Path(f"{checkpoint}.{rank}" if rank else checkpoint)
    identity = {**(identity or {}), "training": asdict(training), "processes": accelerator.num_processes}
    parts = parts or {}
    network.to(accelerator.device)
    ema = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(training.ema))
    optimizer = torch.optim.Adam(network.parameters(), lr=training.rate, fused=True)
    wrapped, fast = accelerator.prepare(network, optimizer)
    losses: list[float] = []
    recent: list[float] = []
    done = 0

    def state() -> tuple[dict[str, Tensor], dict[str, object]]:
        tensors = _nested("network", network.state_dict()) | _nested("ema", ema.state_dict())
        for k, values in optimizer.state_dict()["state"].items():
            tensors |= _nested(f"adam/{k}", values)
        for part, thing in parts.items():
            tensors |= _nested(f"part/{part}", thing.state())
        tensors["generator"] = generator.get_state()
        tensors["losses"] = torch.tensor(losses + recent, dtype=torch.float64)
        return tensors, {"identity": identity, "step": done, "means": len(losses)}

    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        checkpoints.sweep(file)
    if file is not None and file.exists():
        tensors, notes = checkpoints.read(file)
        if notes.get("identity") != json_like(identity):
            raise ValueError(
                f"{file} was made under other hyperparameters: {_differences(notes.get('identity'), identity)}"
            )
        try:
            network.load_state_dict(_under("network", tensors))
            ema.load_state_dict(_under("ema", tensors))
        except RuntimeError as error:
            raise ValueError(f"{file} holds another network: {error}") from None
        memory = optimizer.state_dict()
        count = {int(key.split("/")[1]) for key in tensors if key.startswith("adam/")}
        memory["state"] = {k: _under(f"adam/{k}", tensors) for k in sorted(count)}
        optimizer.load_state_dict(memory)
        for part, thing in parts.items():
            thing.restore({key: value.clone() for key, value in _under(f"part/{part}", tensors).items()})
        generator.set_state(tensors["generator"].clone())
        means = int(notes["means"])
        everything = tensors["losses"].tolist()
        done, losses, recent = int(notes["step"]), everything[:means], everything[means:]
    else:
        start()
    at = accelerator.gather(torch.tensor([done], device=accelerator.device)).tolist()
    if len(set(at)) > 1:
        raise ValueError(f"the processes' checkpoints {checkpoint}, {checkpoint}.1, … are of different steps, {at}")

    bar = tqdm(total=training.steps, initial=done, desc=name, disable=not (progress and accelerator.is_main_process))
    with bar:
        for step in range(done, training.steps):
            for group in optimizer.param_groups:
                group["lr"] = training.rate_at(step)
            value = loss(wrapped, step)
            recent.append(float(value.detach()))
            if not math.isfinite(recent[-1]):
                raise FloatingPointError(
                    f"{name} diverged: the loss is {recent[-1]} at step {step + 1} of {training.steps}; "
                    f"a smaller rate than {training.rate:g}, or a look at the data?"
                )
            optimizer.zero_grad()
            accelerator.backward(value)
            if isinstance(network, Stack):
                clip_members(network, training.clip)
            else:
                accelerator.clip_grad_norm_(network.parameters(), training.clip)
            fast.step()
            ema.update_parameters(network)
            done = step + 1
            if len(recent) == 100 or done == training.steps:
                losses.append(math.fsum(recent) / len(recent))
                recent.clear()
                bar.set_postfix(loss=f"{losses[-1]:.4g}", refresh=False)
            bar.update()
            if done % training.every == 0 or done == training.steps:
                if file is not None:
                    checkpoints.write(file, *state())
                saved()
    if training.ema:
        network.load_state_dict(ema.module.state_dict())
    return losses


def clip_members(network: nn.Module, largest: float) -> None:
    """Shorten each member's gradient to the largest norm, as clipping would if the member trained alone."""
    grads = [p.grad for p in network.parameters() if p.grad is not None]
    norm = torch.stack([g.flatten(1).square().sum(1) for g in grads]).sum(0).sqrt()
    factor = (largest / (norm + 1e-6)).clamp_max(1)
    for g in grads:
        g.mul_(factor.reshape(-1, *[1] * (g.ndim - 1)))


def json_like(value: object) -> object:
    """The value as JSON gives it back: tuples become lists."""
    return json.loads(json.dumps(value))


def _differences(was: object, now: object) -> str:
    before, after = _leaves(was), _leaves(json_like(now))
    names = [name for name in before | after if before.get(name) != after.get(name)]
    return ", ".join(f"{name} was {before.get(name)!r} and is {after.get(name)!r}" for name in names)


def _leaves(value: object, name: str = "") -> dict[str, object]:
    """Numbers and texts within dicts and lists, each with its path, such as ``models.0.eps``."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if pairs is None:
        return {name: value}
    return {key: leaf for k, v in pairs for key, leaf in _leaves(v, f"{name}.{k}".lstrip(".")).items()}
