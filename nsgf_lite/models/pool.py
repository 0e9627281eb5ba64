"""The trajectory pool: what the empirical Sinkhorn flow did, bounded in size, recycled, in memory or on disk."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Generator, Tensor

from nsgf_lite.fields.base import Field, Warm
from nsgf_lite.inputs import read_clouds, read_counts, read_positive
from nsgf_lite.training import checkpoints


@torch.no_grad()
def trajectories(
    field: Field, x: Tensor, y: Tensor, step: float, steps: int, pilot: Callable[[Tensor, int], Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Positions and velocities, both (steps, b, n, d), of b minibatches x (b, n, d) that follow the field towards y.

    Row k of the second holds the field's velocity *at* row k of the first, and ``x[k+1] = x[k] + step * v[k]``, unless
    a pilot is given: then ``x[k+1] = pilot(x[k], k)``, and v says where the field would have gone from there.

    Raises
    ------
    ValueError
        As :func:`nsgf_lite.follow`.
    FloatingPointError
        If the particles leave the finite numbers.

    Source
    ------
    Zhu et al. (2024), Algorithm 1.

    Used in
    -------
    :prf:ref:`thm-marginals`, :prf:ref:`thm-euler-blur`, :doc:`/book/neural_sinkhorn_flow`
    """
    read_clouds(x=x, y=y)
    read_positive(step=step)
    read_counts(steps=steps)
    positions, velocities = [], []
    warm: Warm = {}
    for k in range(steps):
        v = field(x, y, warm=warm)
        positions.append(x)
        velocities.append(v)
        x = x + step * v if pilot is None else pilot(x, k)
        if not bool(torch.isfinite(x).all()):
            raise FloatingPointError(f"particles left the finite numbers at step {k + 1} of {steps}")
    return torch.stack(positions), torch.stack(velocities)


class Pool:
    """Bounded store of (x, t, v): the trajectories of the `capacity` newest minibatches; older ones leave.

    ``pool.nbytes`` is what it holds and ``pool.bound`` what it can hold at most. On disk, minibatches that the last
    checkpoint needs stay until :meth:`sweep` is called.

    Parameters
    ----------
    capacity : int
        Number of minibatches kept.
    folder : path
        Keep them on disk, a file for each minibatch, mapped into memory when read; None for in memory. The folder is
        the pool's own; a new pool deletes the minibatches that an older one left there.
    half : bool
        Store in half precision: half the size, three digits.

    Raises
    ------
    ValueError
        If capacity is not a positive integer; when minibatches of another shape are added; when half precision cannot
        hold a number; when a file of a resumed pool is missing or damaged.
    OSError
        If the disk is full.

    Source
    ------
    Zhu et al. (2024), Algorithm 1 ("trajectory pool"), with the replay of Mnih et al. (2013).

    Used in
    -------
    :doc:`/book/neural_sinkhorn_flow`
    """

    def __init__(self, capacity: int, folder: str | Path | None = None, half: bool = False) -> None:
        read_counts(capacity=capacity)
        self.capacity, self.folder, self.half = capacity, None if folder is None else Path(folder), half
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
        self.added = 0
        self._x, self._v, self._label = torch.empty(0), torch.empty(0), torch.zeros(capacity, dtype=torch.int64)
        self._files: dict[int, tuple[Tensor, Tensor]] = {}
        self._retired: list[Path] = []
        self._shape: tuple[int, ...] = ()

    def __len__(self) -> int:
        """Number of minibatches held."""
        return min(self.added, self.capacity)

    @property
    def nbytes(self) -> int:
        """Bytes of positions and velocities held."""
        return len(self) * self.bound // self.capacity

    @property
    def bound(self) -> int:
        """Bytes of positions and velocities that are never exceeded."""
        size = 2 * (2 if self.half else 4) * self.capacity if self._shape else 0
        for length in self._shape:
            size *= length
        return size

    def add(self, x: Tensor, v: Tensor, labels: Tensor | None = None) -> None:
        """Add b minibatches, x and v (steps, b, n, d) as :func:`trajectories` gives them, labels (b,)."""
        if x.shape != v.shape or x.ndim != 4 or not x.numel():
            raise ValueError(f"x and v must share a shape (steps, b, n, d), got {tuple(x.shape)} and {tuple(v.shape)}")
        if labels is not None and labels.shape != x.shape[1:2]:
            raise ValueError(f"labels must have shape ({x.shape[1]},), one a minibatch, got {tuple(labels.shape)}")
        shape = (x.shape[0], *x.shape[2:])
        if self._shape and shape != self._shape:
            raise ValueError(f"minibatches must have (steps, n, d) = {self._shape} as the pool's, got {shape}")
        x, v = (part.to(torch.float16 if self.half else torch.float32) for part in (x, v))
        if not all(bool(torch.isfinite(part).all()) for part in (x, v)):
            raise ValueError("x and v must be finite" + (", also in half precision" if self.half else ""))
        self._shape = shape
        for k in range(x.shape[1]):
            self._put(self.added % self.capacity, (x[:, k], v[:, k]))
            self._label[self.added % self.capacity] = 0 if labels is None else int(labels[k])
            self.added += 1

    def _put(self, slot: int, block: tuple[Tensor, Tensor]) -> None:
        if self.folder is None:
            if self._x.numel() == 0:
                self._x, self._v = (part.new_empty(self.capacity, *self._shape) for part in block)
            self._x[slot], self._v[slot] = block
            return
        if not self.added:  # a new run: what another left in the folder is not its own
            self._clear(range(0))
        checkpoints.write(self._file(self.added), {"x": block[0], "v": block[1]}, {"minibatch": self.added})
        self._map(self.added)
        if self.added >= self.capacity:
            self._retired.append(self._file(self.added - self.capacity))

    def _file(self, number: int) -> Path:
        assert self.folder is not None
        return self.folder / f"minibatch-{number:08d}.safetensors"

    def _map(self, number: int) -> None:
        tensors, _ = checkpoints.read(self._file(number))
        self._files[number % self.capacity] = tensors["x"], tensors["v"]

    def _clear(self, kept: range) -> None:
        """Delete the files of all minibatches but these, and drafts."""
        assert self.folder is not None
        checkpoints.sweep(self.folder / "minibatch-*")
        names = set(map(self._file, kept))
        for path in self.folder.glob("minibatch-*.safetensors"):
            if path not in names:
                path.unlink()

    def sweep(self) -> None:
        """Delete the files of minibatches that left the pool."""
        while self._retired:
            self._retired.pop().unlink(missing_ok=True)

    def sample(self, n: int, generator: Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Draw n triples uniformly: positions (n, d), step numbers (n,), velocities (n, d), labels (n,).

        Raises
        ------
        ValueError
            If the pool is empty.
        """
        if not len(self):
            raise ValueError("the pool is empty: add trajectories before sampling")
        steps, particles, d = self._shape
        row = torch.randint(len(self) * steps * particles, (n,), generator=generator, device=generator.device)
        slot, step = row // (steps * particles), row // particles % steps
        if self.folder is None:
            here = row.to(self._x.device)
            x, v = self._x.view(-1, d)[here], self._v.view(-1, d)[here]
        else:
            x, v = torch.empty(n, d), torch.empty(n, d)
            inside, home = (row % (steps * particles)).cpu(), slot.cpu()
            for k in home.unique().tolist():
                for out, part in zip((x, v), self._files[k], strict=True):
                    out[home == k] = part.view(-1, d)[inside[home == k]].float()
        label = self._label.to(slot.device)[slot]
        return x.to(row.device, torch.float32), step, v.to(row.device, torch.float32), label

    def state(self) -> dict[str, Tensor]:
        """Everything, if in memory; on disk, the numbers of the minibatches, whose files stay where they are."""
        state = {"added": torch.tensor(self.added), "label": self._label.clone()}
        state["shape"] = torch.tensor(self._shape or (0, 0, 0))
        return state if self.folder is not None else state | {"x": self._x, "v": self._v}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Take up :meth:`state`; files written after it are dropped."""
        if (self.folder is None) != ("x" in state):
            there = "in memory" if "x" in state else "on disk"
            raise ValueError(f"the checkpoint's pool is {there}, this one is not: see folder=")
        self.added, self._label = int(state["added"]), state["label"]
        self._shape = tuple(state["shape"].tolist()) if self.added else ()
        self._files, self._retired = {}, []
        if self.folder is None:
            self._x, self._v = state["x"], state["v"]
            return
        wanted = range(max(0, self.added - self.capacity), self.added)
        self._clear(wanted)
        for number in wanted:
            if not self._file(number).exists():
                raise ValueError(f"{self._file(number)} is missing: the pool on disk is not the checkpoint's")
            self._map(number)
