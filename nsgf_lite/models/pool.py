"""The trajectory pool: what the empirical Sinkhorn flow did, bounded in size, recycled, in memory or on disk."""

from collections.abc import Callable
from os import PathLike
from pathlib import Path

import torch
from torch import Generator, Tensor

from nsgf_lite.fields.base import Field, Warm
from nsgf_lite.inputs import read_clouds, read_counts, read_flags, read_positive
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
        Store in half precision: half the size, and three digits, in any unit and far from the origin: of each
        minibatch's positions about their mean, and of its velocities, in units of the largest.

    Raises
    ------
    ValueError
        If capacity is not a positive integer, half is not a flag, or the folder is a file; when minibatches of another
        shape are added, or such as are not finite; when a file of a resumed pool is missing, damaged, of another run,
        or in another's place.
    OSError
        If the disk is full, or the folder cannot be written.

    Source
    ------
    Zhu et al. (2024), Algorithm 1 ("trajectory pool"), with the replay of Mnih et al. (2013).

    Used in
    -------
    :doc:`/book/neural_sinkhorn_flow`
    """

    def __init__(self, capacity: int, folder: str | Path | None = None, half: bool = False) -> None:
        (capacity,) = read_counts(capacity=capacity)
        read_flags(half=half)
        if not isinstance(folder, str | PathLike | None):
            raise ValueError(f"folder must be None or a path, got {folder!r}")
        self.capacity, self.folder, self.half = capacity, None if folder is None else Path(folder), half
        if self.folder is not None:
            if self.folder.is_file():
                raise ValueError(f"folder must be a folder, and {self.folder} is a file")
            self.folder.mkdir(parents=True, exist_ok=True)
        self.added = 0
        self._x, self._v, self._label = torch.empty(0), torch.empty(0), torch.zeros(capacity, dtype=torch.int64)
        self._frame = torch.empty(
            0
        )  # of each minibatch in half precision: mean (d,), units of positions, of velocities
        self._files: dict[int, tuple[Tensor, Tensor]] = {}
        self._marks = torch.zeros(capacity, 16, dtype=torch.uint8)  # hashes of the files
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
        for name, part in (("x", x), ("v", v)):
            if not isinstance(part, Tensor) or not part.dtype.is_floating_point:
                got = part.dtype if isinstance(part, Tensor) else type(part).__name__
                raise ValueError(f"{name} must be a tensor of floats, got {got}")
        if x.shape != v.shape or x.ndim != 4 or not x.numel():
            raise ValueError(f"x and v must share a shape (steps, b, n, d), got {tuple(x.shape)} and {tuple(v.shape)}")
        if labels is not None and labels.shape != x.shape[1:2]:
            raise ValueError(f"labels must have shape ({x.shape[1]},), one a minibatch, got {tuple(labels.shape)}")
        shape = (x.shape[0], *x.shape[2:])
        if self._shape and shape != self._shape:
            raise ValueError(f"minibatches must have (steps, n, d) = {self._shape} as the pool's, got {shape}")
        x, v = x.float(), v.float()
        if not all(bool(torch.isfinite(part).all()) for part in (x, v)):
            raise ValueError("x and v must be finite in float32, got NaN or inf")
        self._shape = shape
        if self.folder is None and not self.half:
            self._put_all(x, v, labels)
            return
        for k in range(x.shape[1]):
            slot = self.added % self.capacity
            self._put(slot, self._halved(slot, x[:, k], v[:, k]) if self.half else (x[:, k], v[:, k]))
            self._label[slot] = 0 if labels is None else int(labels[k])
            self.added += 1

    def _put_all(self, x: Tensor, v: Tensor, labels: Tensor | None) -> None:
        """All minibatches at once, in memory: of more than the capacity the last."""
        if self._x.numel() == 0:
            self._x, self._v = (part.new_empty(self.capacity, *self._shape) for part in (x, v))
        count = x.shape[1]
        new = torch.arange(max(0, count - self.capacity), count)
        slots = (self.added + new) % self.capacity
        for store, part in ((self._x, x), (self._v, v)):
            store[slots.to(store.device)] = part[:, new.to(part.device)].transpose(0, 1)
        self._label[slots] = 0 if labels is None else labels.cpu()[new]
        self.added += count

    def _halved(self, slot: int, x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """One minibatch in half precision, from -1 to 1, and its frame kept."""
        if not self._frame.numel():
            self._frame = x.new_zeros(self.capacity, x.shape[-1] + 2)
        mean = x.mean((0, 1))
        x = x - mean
        units = torch.stack([part.abs().amax() for part in (x, v)]).clamp_min(torch.finfo(torch.float32).tiny)
        self._frame[slot] = torch.cat([mean, units])
        return (x / units[0]).half(), (v / units[1]).half()

    def _put(self, slot: int, block: tuple[Tensor, Tensor]) -> None:
        if self.folder is None:
            if self._x.numel() == 0:
                self._x, self._v = (part.new_empty(self.capacity, *self._shape) for part in block)
            self._x[slot], self._v[slot] = block
            return
        if not self.added:  # a new run: what another left in the folder is not its own
            self._clear(range(0))
        mark = checkpoints.write(self._file(self.added), {"x": block[0], "v": block[1]}, {"minibatch": self.added})
        self._marks[slot] = torch.tensor(list(bytes.fromhex(mark)))
        self._map(self.added)
        if self.added >= self.capacity:
            self._retired.append(self._file(self.added - self.capacity))

    def _file(self, number: int) -> Path:
        assert self.folder is not None
        return self.folder / f"minibatch-{number:08d}.safetensors"

    def _map(self, number: int) -> None:
        slot = number % self.capacity
        mark = bytes(self._marks[slot].tolist()).hex()
        tensors, _ = checkpoints.read(self._file(number), mapped=True, mark=mark)
        self._files[slot] = tensors["x"], tensors["v"]

    def _clear(self, kept: range) -> None:
        """Delete the files of all minibatches but these, and drafts."""
        assert self.folder is not None
        checkpoints.sweep(self.folder, "minibatch-*")
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
        (n,) = read_counts(n=n)
        if not len(self):
            raise ValueError("the pool is empty: add trajectories before sampling")
        steps, particles, d = self._shape
        row = torch.randint(len(self) * steps * particles, (n,), generator=generator, device=generator.device)
        slot, step = row // (steps * particles), row // particles % steps
        if self.folder is None:
            here = row.to(self._x.device)
            x, v = self._x.view(-1, d)[here], self._v.view(-1, d)[here]
        else:
            x, v = (torch.empty(n, d, dtype=torch.float32) for _ in "xv")
            inside, home = (row % (steps * particles)).cpu(), slot.cpu()
            for k in home.unique().tolist():
                for out, part in zip((x, v), self._files[k], strict=True):
                    out[home == k] = part.view(-1, d)[inside[home == k]].float()
        label = self._label.to(slot.device)[slot]
        x, v = x.to(row.device, torch.float32), v.to(row.device, torch.float32)
        if self.half:
            mean, unit, pace = self._frame.to(row.device)[slot].split([d, 1, 1], -1)
            x, v = x * unit + mean, v * pace
        return x, step, v, label

    def state(self) -> dict[str, Tensor]:
        """Everything, if in memory; on disk, numbers and hashes of the minibatches, whose files stay where they are."""
        state = {"added": torch.tensor(self.added), "label": self._label.clone(), "frame": self._frame}
        state["shape"] = torch.tensor(self._shape or (0, 0, 0))
        return state | ({"x": self._x, "v": self._v} if self.folder is None else {"marks": self._marks.clone()})

    def restore(self, state: dict[str, Tensor]) -> None:
        """Take up :meth:`state`; files written after it are dropped."""
        if (self.folder is None) != ("x" in state):
            there = "in memory" if "x" in state else "on disk"
            raise ValueError(f"the checkpoint's pool is {there}, this one is not: see folder=")
        self.added, self._label, self._frame = int(state["added"]), state["label"], state["frame"]
        self._shape = tuple(state["shape"].tolist()) if self.added else ()
        self._files, self._retired = {}, []
        if self.folder is None:
            self._x, self._v = state["x"], state["v"]
            return
        self._marks = state["marks"]
        wanted = range(max(0, self.added - self.capacity), self.added)
        self._clear(wanted)
        for number in wanted:
            if not self._file(number).exists():
                raise ValueError(f"{self._file(number)} is missing: the pool on disk is not the checkpoint's")
            self._map(number)
