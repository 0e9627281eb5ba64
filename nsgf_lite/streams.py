"""Minibatches without end, from whatever a reader calls data: a law to sample, a tensor, or a data loader."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Generator, Tensor
from torch.utils.data import DataLoader

from nsgf_lite.inputs import read_clouds, read_counts
from nsgf_lite.toy import Law

Data = Law | Tensor | DataLoader | Sequence[Law | Tensor]


def _by_class(name: str, points: Tensor, labels: Tensor) -> list[Tensor]:
    """Rows of each class 0, 1, …; ValueError unless every class up to the largest has some."""
    if labels.shape != points.shape[:1] or labels.dtype.is_floating_point or int(labels.min()) < 0:
        raise ValueError(
            f"{name} with labels must be (points, labels), labels non-negative integers of shape "
            f"({len(points)},), got {labels.dtype} of shape {tuple(labels.shape)}"
        )
    return [points[labels == c] for c in range(int(labels.max()) + 1)]


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
    classes : int
        Number of classes that a data loader's labels name; 0 for none.

    Raises
    ------
    ValueError
        If the data are none of these, a class is empty, a tensor has fewer points than a minibatch, points are not
        finite, or a data loader shuffles without a generator of its own (it would draw from the global one).

    Used in
    -------
    :doc:`/book/neural_sinkhorn_flow`
    """

    def __init__(self, name: str, data: Any, classes: int = 0) -> None:
        self.name, self.loader, self.parts = name, None, []
        self._rows: Iterator[Any] | None = None
        self._epoch, self._taken = torch.empty(0, dtype=torch.uint8), 0
        if isinstance(data, DataLoader):
            if data.generator is None and not isinstance(data.sampler, torch.utils.data.SequentialSampler):
                raise ValueError(f"{name} shuffles: give the DataLoader a generator= of its own")
            self.loader, self.classes = data, classes
            self._left: list[Tensor] = [torch.empty(0, 0)] * max(1, classes)
            return
        pair = isinstance(data, tuple) and len(data) == 2 and isinstance(data[1], Tensor)
        if pair and isinstance(data[0], Tensor) and data[1].ndim == 1 and not data[1].dtype.is_floating_point:
            data = _by_class(name, *data)
        self.classes = len(data) if isinstance(data, list | tuple) else 0
        for part in data if self.classes else [data]:
            if isinstance(part, Tensor):
                part = part.detach().flatten(1).float() if part.ndim > 1 else part
                read_clouds(**{name: part})
            elif not hasattr(part, "sample"):
                raise ValueError(
                    f"{name} must be a law with sample(n, generator), a tensor, a DataLoader, or one of these for "
                    f"each class, got {type(part).__name__}"
                )
            self.parts.append(part)

    def __repr__(self) -> str:
        """What a checkpoint remembers of the data: laws by their parameters, tensors by shape and mean."""
        shown = [
            f"tensor{tuple(p.shape)} of mean {p.mean():.6g}" if isinstance(p, Tensor) else repr(p) for p in self.parts
        ]
        return f"loader of {len(self.loader.dataset)}" if self.loader else "; ".join(shown)  # type: ignore[arg-type]

    def draw(self, n: int, generator: Generator, label: int = 0) -> Tensor:
        """Minibatch (n, d) of the class, on the generator's device; a stream of one class ignores the label."""
        read_counts(n=n)
        if self.loader is not None:
            points = self._read_on(n, label if self.classes else 0)
        else:
            part = self.parts[label if self.classes else 0]
            if isinstance(part, Tensor):
                of_class = f" of class {label}" if self.classes else ""
                if len(part) < n:
                    raise ValueError(f"{self.name} has {len(part)} points{of_class}, fewer than a minibatch of {n}")
                points = part[
                    torch.randperm(len(part), generator=generator, device=generator.device)[:n].to(part.device)
                ]
            else:
                points = part.sample(n, generator).flatten(1)
        points = points.to(generator.device, torch.float32)
        read_clouds(**{self.name: points})
        return points

    def _read_on(self, n: int, label: int) -> Tensor:
        """The next n rows of the class from the loader; rows of other classes wait, at most 16 minibatches of each."""
        epochs = 0
        while len(self._left[label]) < n:
            batch = next(self._rows or self._open(), None)
            if batch is None:
                self._rows, epochs = None, epochs + 1
                if epochs > n:
                    raise ValueError(f"{self.name} has no points of class {label} in a whole pass")
                continue
            self._taken += 1
            points, labels = batch if isinstance(batch, list | tuple) and len(batch) == 2 else (batch, None)
            points = (points[0] if isinstance(points, list | tuple) else points).flatten(1).float()
            if self.classes and labels is None:
                raise ValueError(f"{self.name} must yield pairs (points, labels), classes = {self.classes}")
            for c in range(len(self._left)):
                rows = points[labels == c] if self.classes else points
                kept = torch.cat([self._left[c], rows]) if self._left[c].numel() else rows
                self._left[c] = kept[: 16 * n + len(points)] if c != label else kept
        taken, self._left[label] = self._left[label][:n], self._left[label][n:]
        return taken

    def _open(self) -> Iterator[Any]:
        """Begin an epoch, and remember the loader's generator so that a resumed run can begin the same one."""
        assert self.loader is not None
        if self.loader.generator is not None:
            self._epoch = self.loader.generator.get_state()
        self._rows, self._taken = iter(self.loader), 0
        return self._rows

    def state(self) -> dict[str, Tensor]:
        """Where a data loader stands; nothing for laws and tensors, whose chance is the training generator's."""
        if self.loader is None:
            return {}
        left = {f"left.{c}": rows.clone() for c, rows in enumerate(self._left)}
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
