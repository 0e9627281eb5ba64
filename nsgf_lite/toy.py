"""Two-dimensional laws to flow from and to; each states its scale, which dominates every distance reported on it."""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Generator, Tensor

from nsgf_lite.inputs import read_counts, read_parameters


class Law(Protocol):
    """Anything with ``sample(n, generator, dtype) -> (n, d)``; the laws below raise ValueError on a parameter that is
    not finite, a noise below zero, an n below one, a generator that is none, a dtype other than float32 and float64."""

    def sample(self, n: int, generator: Generator, dtype: torch.dtype = torch.float32) -> Tensor:
        """Draw n points, shape (n, d), on the generator's device."""
        ...


def _uniform(n: int, generator: Generator, dtype: torch.dtype) -> Tensor:
    _check(n, generator, dtype)
    return torch.rand(n, generator=generator, dtype=dtype, device=generator.device)


def _normal(n: int, generator: Generator, dtype: torch.dtype, d: int = 2) -> Tensor:
    _check(n, generator, dtype)
    return torch.randn(n, d, generator=generator, dtype=dtype, device=generator.device)


def _check(n: int, generator: Generator, dtype: torch.dtype) -> None:
    read_counts(n=n)
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"dtype must be torch.float32 or torch.float64, got {dtype!r}")
    if not isinstance(generator, Generator):
        raise ValueError(f"generator must be a torch.Generator (chance is always explicit here), got {generator!r}")


@dataclass(frozen=True)
class Gaussian:
    """Normal law with the given mean (d numbers) and covariance (d by d); standard in the plane by default.

    Used in
    -------
    :doc:`/book/intro`, :doc:`/book/optimal_transport`, :doc:`/book/sinkhorn_divergence`,
    :doc:`/book/sinkhorn_first_variation`, :doc:`/book/mean_field_limit`, :doc:`/book/neural_sinkhorn_flow`,
    :doc:`/book/two_phase`, :doc:`/book/choosing`
    """

    mean: tuple[float, ...] = (0.0, 0.0)
    covariance: tuple[tuple[float, ...], ...] = ((1.0, 0.0), (0.0, 1.0))

    def sample(self, n: int, generator: Generator, dtype: torch.dtype = torch.float32) -> Tensor:
        """Draw n points, shape (n, d); ValueError if the covariance is not symmetric positive definite."""
        try:
            mean, covariance = (torch.tensor(p, dtype=torch.float64) for p in (self.mean, self.covariance))
        except (TypeError, ValueError, RuntimeError):
            raise ValueError(f"mean and covariance must be tuples of numbers, got {self}") from None
        if mean.ndim != 1:
            raise ValueError(f"mean must be a tuple of numbers, got {self.mean!r}")
        d = len(mean)
        if not bool(torch.isfinite(mean).all()):
            raise ValueError(f"mean must be finite, got {self.mean}")
        if covariance.shape != (d, d) or not torch.equal(covariance, covariance.T):
            raise ValueError(f"covariance must be a symmetric {d} by {d} matrix, got {self.covariance}")
        root, failed = torch.linalg.cholesky_ex(covariance)
        if failed or not bool(torch.isfinite(covariance).all()):
            raise ValueError(f"covariance must be positive definite, got {self.covariance}")
        z = _normal(n, generator, dtype, d)
        return z @ root.T.to(z) + mean.to(z)


@dataclass(frozen=True)
class EightGaussians:
    """Equal mixture of eight round Gaussians on a circle.

    The defaults are torchcfm's: radius 5 and *covariance* ``sqrt(0.1) I``, which is a standard deviation of 0.562.
    FFJORD's scale is ``EightGaussians(radius=2.8284, sigma=0.3536)``.

    Used in
    -------
    :doc:`/book/sinkhorn_first_variation`, :doc:`/book/neural_sinkhorn_flow`, :doc:`/book/two_phase`,
    :doc:`/book/two_dimensional_benchmark`, :doc:`/book/speed`, :doc:`/book/choosing`
    """

    radius: float = 5.0
    sigma: float = 0.1**0.25

    def __post_init__(self) -> None:
        read_parameters(self, finite="radius", sizes="sigma")

    def sample(self, n: int, generator: Generator, dtype: torch.dtype = torch.float32) -> Tensor:
        """Draw n points, shape (n, 2)."""
        angle = torch.floor(8 * _uniform(n, generator, dtype)) * (math.pi / 4)
        centres = self.radius * torch.stack([angle.cos(), angle.sin()], dim=1)
        return centres + self.sigma * _normal(n, generator, dtype)


@dataclass(frozen=True)
class Moons:
    """Two interleaved half circles: scikit-learn's ``make_moons(noise)`` law, times `scale`, plus `shift`.

    The defaults, noise 0.2, scale 3 and shift -1 (in both coordinates), are torchcfm's.

    Used in
    -------
    :doc:`/book/intro`, :doc:`/book/sinkhorn_first_variation`, :doc:`/book/neural_sinkhorn_flow`,
    :doc:`/book/two_phase`, :doc:`/book/two_dimensional_benchmark`, :doc:`/book/speed`, :doc:`/book/choosing`,
    :doc:`/book/errata`
    """

    noise: float = 0.2
    scale: float = 3.0
    shift: float = -1.0

    def __post_init__(self) -> None:
        read_parameters(self, sizes="noise", finite="scale shift")

    def sample(self, n: int, generator: Generator, dtype: torch.dtype = torch.float32) -> Tensor:
        """Draw n points, shape (n, 2); each half circle has each point with probability one half."""
        angle = math.pi * _uniform(n, generator, dtype)
        lower = _uniform(n, generator, dtype) < 0.5
        across = torch.where(lower, 1 - angle.cos(), angle.cos())
        up = torch.where(lower, 0.5 - angle.sin(), angle.sin())
        points = torch.stack([across, up], dim=1) + self.noise * _normal(n, generator, dtype)
        return self.scale * points + self.shift


@dataclass(frozen=True)
class SCurve:
    """The letter S: scikit-learn's ``make_s_curve`` seen along its flat axis, with noise, times `scale`.

    Angle t uniform in (-3π/2, 3π/2); the point is ``(sin t, sign(t)(cos t - 1))``.

    Used in
    -------
    :doc:`/book/intro`, :doc:`/book/two_dimensional_benchmark`
    """

    noise: float = 0.05
    scale: float = 1.5

    def __post_init__(self) -> None:
        read_parameters(self, sizes="noise", finite="scale")

    def sample(self, n: int, generator: Generator, dtype: torch.dtype = torch.float32) -> Tensor:
        """Draw n points, shape (n, 2)."""
        t = 3 * math.pi * (_uniform(n, generator, dtype) - 0.5)
        points = torch.stack([t.sin(), t.sign() * (t.cos() - 1)], dim=1)
        return self.scale * (points + self.noise * _normal(n, generator, dtype))


@dataclass(frozen=True)
class Checkerboard:
    """Uniform law on the eight dark squares of a 4 by 4 board that fills ``[-side/2, side/2]^2``; side 4 by default.

    Used in
    -------
    :doc:`/book/optimal_transport`, :doc:`/book/two_dimensional_benchmark`
    """

    side: float = 4.0

    def __post_init__(self) -> None:
        read_parameters(self, finite="side")

    def sample(self, n: int, generator: Generator, dtype: torch.dtype = torch.float32) -> Tensor:
        """Draw n points, shape (n, 2)."""
        column = torch.floor(4 * _uniform(n, generator, dtype))
        row = 2 * torch.floor(2 * _uniform(n, generator, dtype)) + column % 2
        corner = torch.stack([column, row], dim=1)
        inside = torch.stack([_uniform(n, generator, dtype), _uniform(n, generator, dtype)], dim=1)
        return self.side * ((corner + inside) / 4 - 0.5)


@dataclass(frozen=True)
class Circles:
    """Two concentric circles with equal mass: radii `scale` and ``ratio * scale``, noise of the same unit as the ratio.

    The law of scikit-learn's ``make_circles(noise, factor)``, times `scale`.

    Used in
    -------
    :doc:`/book/sinkhorn_divergence`, :doc:`/book/neural_sinkhorn_flow`
    """

    ratio: float = 0.5
    noise: float = 0.05
    scale: float = 3.0

    def __post_init__(self) -> None:
        read_parameters(self, sizes="noise", finite="ratio scale")

    def sample(self, n: int, generator: Generator, dtype: torch.dtype = torch.float32) -> Tensor:
        """Draw n points, shape (n, 2)."""
        angle = 2 * math.pi * _uniform(n, generator, dtype)
        inner = (_uniform(n, generator, dtype) >= 0.5).to(dtype)
        radius = 1 - inner + self.ratio * inner
        circle = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1)
        return self.scale * (circle + self.noise * _normal(n, generator, dtype))


@dataclass(frozen=True)
class Spiral:
    """Two opposite Archimedean arms: ``r = scale * sqrt(u)`` at angle ``turns * 2π sqrt(u)``, u uniform, with noise.

    Used in
    -------
    :doc:`/book/optimal_transport`
    """

    turns: float = 1.5
    noise: float = 0.1
    scale: float = 4.0

    def __post_init__(self) -> None:
        read_parameters(self, sizes="noise", finite="turns scale")

    def sample(self, n: int, generator: Generator, dtype: torch.dtype = torch.float32) -> Tensor:
        """Draw n points, shape (n, 2)."""
        root = _uniform(n, generator, dtype).sqrt()
        angle = 2 * math.pi * self.turns * root
        arm = self.scale * torch.where(_uniform(n, generator, dtype) < 0.5, root, -root)
        return torch.stack([arm * angle.cos(), arm * angle.sin()], dim=1) + self.noise * _normal(n, generator, dtype)
