"""Networks of points and times: one multilayer perceptron for every model, one residual network for one step."""

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Generator, Tensor, nn

from nsgf_lite.inputs import read_clouds, read_counts, read_naturals

Module = TypeVar("Module", bound=nn.Module)

_lent = threading.RLock()


@contextmanager
def lent_chance(devices: Sequence[int] | None = None) -> Iterator[None]:
    """Torch's global generators, for one thread at a time, and put back as they were: the CPU's and the devices'."""
    with _lent, torch.random.fork_rng(devices):
        yield


@contextmanager
def _single() -> Iterator[None]:
    """Torch's default of float32, whatever its caller's is, and that again afterwards."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(default)


def seeded(make: Callable[[], Module], generator: Generator) -> Module:
    """Return ``make()``, its weights drawn from the generator and not from torch's global state.

    They are float32 under every default dtype, unless `make` asks for another itself.

    Used in
    -------
    :meth:`nsgf_lite.Flow.fit`
    """
    seed = int(torch.randint(2**62, (1,), generator=generator, device=generator.device))
    with lent_chance(), _single(), torch.inference_mode(False):  # weights made in inference mode could never be trained
        torch.manual_seed(seed)
        return make()


@torch.no_grad()
def _standardise(centre: Tensor, spread: Tensor, **cloud: Tensor) -> None:
    read_clouds(**cloud)
    ((name, points),) = cloud.items()
    if points.shape[1:] != centre.shape:
        raise ValueError(f"{name} must have shape (n, {len(centre)}), got {tuple(points.shape)}")
    centre.copy_(points.mean(0))
    spread.copy_((points - points.mean(0)).square().mean().sqrt().clamp_min(1e-12))


class MLP(nn.Module):
    """Multilayer perceptron of a point x (n, d), a time t (n,) in [0, 1] and a class label (n,): SiLU hidden layers.

    Time enters as ``t, cos(πkt), sin(πkt)`` for k up to `frequencies`, so that a velocity may change fast in time.
    Points are standardised by the buffers `centre` (d,) and `spread`, which :meth:`standardise` sets; a velocity (`out`
    None) is multiplied by `spread` again, so that the unit of length does not matter.

    Parameters
    ----------
    dimension : int
        d, the dimension of a point.
    out : int
        Number of outputs; None for a velocity, which has d and the unit of the points.
    width, depth : int
        Size and number of the hidden layers.
    frequencies : int
        Number of frequencies in the code of time.
    classes : int
        Number of class labels; 0 for none.

    Raises
    ------
    ValueError
        If a size is not a positive integer, or a label is missing or not wanted.

    Source
    ------
    Zhu et al. (2024), Appendix E.1 (three hidden layers of 256); the code of time is ours.

    Used in
    -------
    :doc:`/book/neural_sinkhorn_flow`
    """

    centre: Tensor
    spread: Tensor

    def __init__(
        self,
        dimension: int,
        out: int | None = None,
        width: int = 256,
        depth: int = 3,
        frequencies: int = 4,
        classes: int = 0,
    ) -> None:
        super().__init__()
        read_counts(dimension=dimension, width=width, depth=depth, out=1 if out is None else out)
        read_naturals(frequencies=frequencies, classes=classes)
        self.dimension, self.out, self.frequencies, self.classes = dimension, out, frequencies, classes
        sizes = [dimension + 1 + 2 * frequencies + classes, *[width] * depth]
        layers: list[nn.Module] = []
        for before, after in zip(sizes, sizes[1:], strict=False):
            layers += [nn.Linear(before, after), nn.SiLU()]
        self.layers = nn.Sequential(*layers, nn.Linear(width, dimension if out is None else out))
        self.register_buffer("centre", torch.zeros(dimension))
        self.register_buffer("spread", torch.ones(()))

    def standardise(self, x: Tensor) -> None:
        """Set centre and spread to the mean and the root mean square deviation of the points x (n, d)."""
        _standardise(self.centre, self.spread, x=x)

    def read_labels(self, label: Tensor | None = None) -> None:
        """Check that the labels are such as the network was made for; ValueError if not."""
        if (label is None) != (self.classes == 0):
            raise ValueError(f"a label is {'missing' if label is None else 'not wanted'}: classes = {self.classes}")
        if label is None:
            return
        if label.dtype not in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64):
            raise ValueError(f"label must be integers, got {label.dtype}")
        try:
            wrong = bool(((label < 0) | (label >= self.classes)).any())
        except RuntimeError:  # one member's slice of a stack, which has read them all
            return
        if wrong:
            raise ValueError(f"label must be from 0 to {self.classes - 1}, got {label.min()} to {label.max()}")

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        """Value (n, d) or (n, out) at points x (n, d) and times t (n,), for the labels (n,) if there are classes."""
        self.read_labels(label)
        angle = math.pi * t.unsqueeze(-1) * torch.arange(1, self.frequencies + 1, device=x.device, dtype=x.dtype)
        code = [(x - self.centre) / self.spread, t.unsqueeze(-1), angle.cos(), angle.sin()]
        if label is not None:
            code.append((label.unsqueeze(-1) == torch.arange(self.classes, device=x.device)).to(x.dtype))
        value = self.layers(torch.cat(code, -1))
        return value * self.spread if self.out is None else value


class Residual(nn.Module):
    """Residual network from (n, inputs) to (n, out): ``h + W₂ silu(W₁ norm(h))`` in each block, no time and no label.

    A one-step generator from noise to data, or a critic with one output. Outputs are multiplied by the buffers `spread`
    and moved by `centre` (out,), which :meth:`standardise` sets, so that the data's unit of length does not matter.

    Parameters
    ----------
    inputs, out : int
        Dimension of the noise, and of a point.
    width, depth : int
        Size of the hidden layers, and number of blocks.

    Raises
    ------
    ValueError
        If a size is not a positive integer.

    Source
    ------
    The note on drifting (2026), section 4.3 (a feed-forward residual network; its sizes are ours).

    Used in
    -------
    :func:`nsgf_lite.drifting.train`
    """

    centre: Tensor
    spread: Tensor

    def __init__(self, inputs: int, out: int, width: int = 64, depth: int = 2) -> None:
        super().__init__()
        read_counts(inputs=inputs, out=out, width=width, depth=depth)
        self.first, self.last = nn.Linear(inputs, width), nn.Linear(width, out)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
            for _ in range(depth)
        )
        self.register_buffer("centre", torch.zeros(out))
        self.register_buffer("spread", torch.ones(()))

    def standardise(self, y: Tensor) -> None:
        """Set centre and spread to the mean and the root mean square deviation of the points y (n, out)."""
        _standardise(self.centre, self.spread, y=y)

    def forward(self, z: Tensor) -> Tensor:
        """Points (n, out) from noise z (n, inputs)."""
        h = self.first(z)
        for block in self.blocks:
            h = h + block(h)
        return self.last(h) * self.spread + self.centre


def valued(value: object, x: Tensor, out: int | None) -> Tensor:
    """What a network returned at points x: of shape (…, n, out), or of the points' own if out is None.

    Raises
    ------
    ValueError
        If it is anything else: one number for each point would be added to all of its coordinates.
    """
    need = (*x.shape[:-1], x.shape[-1] if out is None else out)
    if isinstance(value, Tensor) and value.shape == need:
        return value
    got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
    raise ValueError(f"the network must return a tensor of shape {need} at points of {tuple(x.shape)}, got {got}")


def call(network: nn.Module, x: Tensor, t: Tensor, labels: Tensor | None, out: int | None = None) -> Tensor:
    """The network's value, as :func:`valued` checks it, with the labels only if there are some."""
    return valued(network(x, t) if labels is None else network(x, t, labels), x, out)


@contextmanager
def evaluating(*networks: nn.Module) -> Iterator[None]:
    """The networks in evaluation mode: no dropout, and running statistics stay; afterwards each part as it was."""
    modes = [(module, module.training) for network in networks for module in network.modules()]
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, mode in modes:
            module.training = mode
