"""Minibatches without end, from whatever a reader calls data: a law to sample, a tensor, or a data loader."""

import inspect
import re
from collections.abc import Iterator, Sequence
from functools import partial
from types import FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, SequentialSampler

from nsgf_lite.inputs import read_clouds, read_counts
from nsgf_lite.networks import lent_chance
from nsgf_lite.toy import Law
from nsgf_lite.training.checkpoints import hash_of

Data = Law | Tensor | DataLoader | Sequence[Law | Tensor]


def _by_class(name: str, points: Tensor, labels: Tensor) -> list[Tensor]:
    """Rows of each class 0, 1, …; ValueError unless every class up to the largest has some."""
    if labels.shape != points.shape[:1] or not len(labels) or int(labels.min()) < 0:
        raise ValueError(
            f"{name} with labels must be (points, labels), labels non-negative integers of shape "
            f"({len(points)},), got {labels.dtype} of shape {tuple(labels.shape)}"
        )
    return [points[labels == c] for c in range(int(labels.max()) + 1)]


def _refuse_one_hot(name: str, parts: Sequence[Any]) -> None:
    """Labels are one integer for each point: rows of zeros with a one must not pass for the points of a class."""
    for c, part in enumerate(parts):
        if not isinstance(part, Tensor):
            continue
        integers = not part.dtype.is_floating_point and part.dtype != torch.uint8
        one_hot = len(parts) == 2 and c == 1 and part.ndim == 2 and part.shape[:1] == getattr(parts[0], "shape", ())[:1]
        if one_hot and not integers:
            one_hot = bool(((part == 0) | (part == 1)).all() and (part.sum(1) == 1).all())
        if integers or one_hot:
            raise ValueError(
                f"{name} of class {c} must be points, got {part.dtype} of shape {tuple(part.shape)}: labels are one "
                "integer for each point, (points, labels) with labels of shape (n,); of one-hot rows that is argmax(1)"
            )


def described(value: object) -> str:
    """What a checkpoint remembers of a value: its repr without addresses, and a hash of the arrays that it holds."""
    if isinstance(value, Tensor):
        return f"tensor{tuple(value.shape)} of hash {hash_of({'': value})}"
    text = re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))
    held = dict(_arrays(value, "", 4))
    return f"{text} with {len(held)} of hash {hash_of(held)}" if held else text


def _arrays(value: object, name: str, depth: int) -> Iterator[tuple[str, Tensor]]:
    """Arrays that a value holds, in its attributes, lists, dicts and functions, each with its path; no network's."""
    if isinstance(value, Tensor | np.ndarray):
        if isinstance(value, Tensor) or value.dtype.kind in "biuf":
            yield name, torch.as_tensor(value)
        return
    if depth == 0 or isinstance(value, nn.Module | type | ModuleType):
        return
    for key, part in _inside(value).items():
        yield from _arrays(part, f"{name}.{key}", depth - 1)


def _inside(value: object) -> dict:
    """What a value is made of; of a function what its code reads: defaults, closure, and its own module's variables."""
    if isinstance(value, dict):
        return value
    if isinstance(value, list | tuple):
        return dict(enumerate(value))
    if isinstance(value, partial):
        return {"func": value.func, "args": value.args, "keywords": value.keywords}
    if isinstance(value, MethodType):
        return {"self": value.__self__, "func": value.__func__}
    if isinstance(value, FunctionType):
        read = inspect.getclosurevars(value)
        own = {
            key: part
            for key, part in read.globals.items()
            if not isinstance(part, FunctionType) or part.__module__ == value.__module__
        }
        return {"defaults": value.__defaults__, "keywords": value.__kwdefaults__, **read.nonlocals, **own}
    return getattr(value, "__dict__", {})


def _single(name: str, points: Tensor) -> Tensor:
    """Points (n, ...) as a cloud (n, d) in float32; ValueError if they are none, or integers other than bytes."""
    if points.ndim > 1:
        points = points.flatten(1)
        if points.dtype == torch.float64:
            read_clouds(**{name: points})
        if points.dtype in (torch.int8, torch.int16, torch.int32, torch.int64):
            raise ValueError(f"{name} must be points, floats or the bytes (uint8) of images, got {points.dtype}")
        points = points.float()
    read_clouds(**{name: points})
    return points


class Stream:
    """Endless minibatches (n, d) in float32 of a law, a tensor or a data loader, class by class where there are labels.

    Parameters
    ----------
    name : str
        What error messages call it.
    data : Law, Tensor, DataLoader, or a sequence of laws and tensors
        A law has ``sample(n, generator)``. A tensor (n, …) is flattened to (n, d) and drawn from without replacement
        within a minibatch. A pair (points, labels) or a sequence, one law or tensor for each class, makes the stream
        conditional. A data loader is read on and on; one that yields pairs (points, labels) needs `classes`.
        If it shuffles, it (and its sampler, if you made one) needs a generator of its own.
    classes : int
        Number of classes that a data loader's labels name; 0 for none.

    Raises
    ------
    ValueError
        If the data are none of these, a class is empty, labels are out of range, a tensor has fewer points than a
        minibatch, points are not finite, or a data loader shuffles by the global generator.

    Used in
    -------
    :meth:`nsgf_lite.Flow.fit`
    """

    def __init__(self, name: str, data: Any, classes: int = 0) -> None:
        self.name, self.loader, self.parts = name, None, []
        if isinstance(classes, bool) or not (isinstance(classes, int) and classes >= 0):
            raise ValueError(f"the number of classes (labels=) must be a non-negative integer, got {classes!r}")
        self._rows: Iterator[Any] | None = None
        self._epoch, self._taken = torch.empty(0, dtype=torch.uint8), 0
        if isinstance(data, DataLoader):
            sampler = getattr(data.batch_sampler, "sampler", data.sampler)
            in_order = isinstance(sampler, SequentialSampler) or isinstance(data.dataset, IterableDataset)
            chance = getattr(sampler, "generator", data.generator)
            if not in_order and (chance is None or chance is not data.generator):
                raise ValueError(f"{name} shuffles: give the DataLoader, and its sampler, one generator= of their own")
            self.loader, self.classes = data, classes
            self._left: list[Tensor] = [torch.empty(0, 0)] * max(1, classes)
            return
        pair = isinstance(data, tuple) and len(data) == 2 and isinstance(data[1], Tensor)
        if pair and isinstance(data[0], Tensor) and data[1].ndim == 1 and not data[1].dtype.is_floating_point:
            data = _by_class(name, *data)
        elif isinstance(data, list | tuple):
            _refuse_one_hot(name, data)
        self.classes = len(data) if isinstance(data, list | tuple) else 0
        for c, part in enumerate(data if self.classes else [data]):
            if isinstance(part, Tensor):
                part = _single(f"{name} of class {c}" if self.classes else name, part.detach())
            elif not hasattr(part, "sample"):
                raise ValueError(
                    f"{name} must be a law with sample(n, generator), a tensor, a DataLoader, or one of these for "
                    f"each class, got {type(part).__name__}"
                )
            self.parts.append(part)

    def __repr__(self) -> str:
        """What a checkpoint remembers of the data: laws by their parameters, points by a hash."""
        if self.loader is None:
            return "; ".join(map(described, self.parts))
        data = self.loader.dataset
        size = str(len(data)) if hasattr(data, "__len__") else type(data).__name__
        held = dict(_arrays(data, "", 3))
        return f"loader of {size} by {self.loader.batch_size}" + (f", hash {hash_of(held)}" if held else "")

    def draw(self, n: int, generator: Generator, label: int = 0) -> Tensor:
        """Minibatch (n, d) of the class, on the generator's device; a stream of one class ignores the label."""
        read_counts(n=n)
        if self.loader is not None:
            points = self._read_on(n, self._class(label))
        else:
            part = self.parts[self._class(label)]
            if isinstance(part, Tensor):
                of_class = f" of class {label}" if self.classes else ""
                if len(part) < n:
                    raise ValueError(f"{self.name} has {len(part)} points{of_class}, fewer than a minibatch of {n}")
                points = part[
                    torch.randperm(len(part), generator=generator, device=generator.device)[:n].to(part.device)
                ]
            else:
                points = part.sample(n, generator)
                if len(points) != n:
                    raise ValueError(f"{self.name} must give as many points as it is asked for, {n}, got {len(points)}")
                points = points.flatten(1)
        points = points.to(generator.device, torch.float32)
        read_clouds(**{self.name: points})
        return points

    def many(self, n: int, generator: Generator, label: int = 0) -> Tensor:
        """As :meth:`draw`, but from a tensor of fewer than n points in as many passes as it takes."""
        read_counts(n=n)
        part = self.parts[self._class(label)] if self.parts else None
        most = len(part) if isinstance(part, Tensor) else n
        return torch.cat([self.draw(min(most, n - k), generator, label) for k in range(0, n, most)])

    def _class(self, label: int) -> int:
        """The label, checked; 0 for a stream of one class."""
        if self.classes and (isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < self.classes):
            raise ValueError(f"label must be an integer from 0 to {self.classes - 1}, got {label!r}")
        return label if self.classes else 0

    def _read_on(self, n: int, label: int) -> Tensor:
        """The next n rows of the class from the loader; rows of other classes wait, at most 16 minibatches of each."""
        before = -1  # rows held when the present pass began, if it began in this call
        while len(self._left[label]) < n:
            batch = None if self._rows is None else next(self._rows, None)
            if batch is None:
                if len(self._left[label]) == before:
                    raise ValueError(f"{self.name} has no points of class {label} in a whole pass")
                before = len(self._left[label])
                self._open()
                continue
            self._taken += 1
            points, labels = batch if isinstance(batch, list | tuple) and len(batch) == 2 else (batch, None)
            points = points[0] if isinstance(points, list | tuple) else points
            if not isinstance(points, Tensor) or points.ndim < 2:
                got = tuple(points.shape) if isinstance(points, Tensor) else type(points).__name__
                raise ValueError(f"{self.name} must yield points of shape (n, …), alone or first in a tuple, got {got}")
            points = points.flatten(1).float()
            if self.classes and not self._are_labels(labels, len(points)):
                raise ValueError(
                    f"{self.name} must yield pairs (points, labels), labels (n,) integers below {self.classes}"
                )
            for c in range(len(self._left)):
                rows = points[labels == c] if self.classes else points
                kept = torch.cat([self._left[c], rows]) if self._left[c].numel() else rows
                self._left[c] = kept[: 16 * n + len(points)] if c != label else kept
        taken, self._left[label] = self._left[label][:n], self._left[label][n:]
        return taken

    def _are_labels(self, labels: Any, n: int) -> bool:
        """Whether these are n labels of this stream's classes."""
        if not isinstance(labels, Tensor) or labels.shape != (n,) or labels.dtype.is_floating_point:
            return False
        return bool(((labels >= 0) & (labels < self.classes)).all())

    def _open(self) -> Iterator[Any]:
        """Begin an epoch, and remember the loader's generator so that a resumed run can begin the same one."""
        assert self.loader is not None
        if self.loader.generator is not None:
            self._epoch = self.loader.generator.get_state()
        with lent_chance([]):  # a loader without a generator seeds its workers by the global one
            self._rows, self._taken = iter(self.loader), 0
        return self._rows

    def state(self) -> dict[str, Tensor]:
        """Where a data loader stands; nothing for laws and tensors, whose chance is the training generator's."""
        if self.loader is None:
            return {}
        left = {f"left.{c}": rows.clone() for c, rows in enumerate(self._left)}
        if self.loader.generator is not None:  # which another loader may share
            left["now"] = self.loader.generator.get_state()
        return left | {"epoch": self._epoch, "taken": torch.tensor(self._taken if self._rows is not None else -1)}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Put a data loader back to where :meth:`state` found it, by reading its current epoch again up to there."""
        if self.loader is None:
            return
        self._left = [state[f"left.{c}"] for c in range(len(self._left))]
        self._epoch, taken, self._rows = state["epoch"], int(state["taken"]), None
        if taken >= 0:
            if self.loader.generator is not None:
                self.loader.generator.set_state(self._epoch)
            for _ in zip(range(taken), self._open(), strict=False):
                pass
            self._taken = taken
        if self.loader.generator is not None:
            self.loader.generator.set_state(state["now"])
