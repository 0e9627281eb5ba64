"""The laws that critics tell particles from: a Gaussian with their moments, a ball that holds them, the data."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from nsgf_lite.functionals.base import Reference
from nsgf_lite.training.streams import Stream


class Moments(Reference):
    """The Gaussian law with the particles' mean and covariance, which may follow them within a JKO step."""

    mean: Tensor
    factor: Tensor

    def __init__(self, share: float = 0.0) -> None:
        self.share = share

    def renew(self, crowd: Tensor) -> None:
        """As :meth:`Reference.renew`; ValueError if there are too few particles for a covariance."""
        self._fit(*_moments(crowd), len(crowd))

    def follow(self, x: Tensor) -> None:
        """As :meth:`Reference.follow`: the moments of what was, and of a share of the moved particles."""
        if self.share:
            mean, covariance = _moments(x)
            old, gone = self.factor @ self.factor.T, mean - self.mean
            between = self.share * (1 - self.share) * torch.outer(gone, gone)
            mixed = (1 - self.share) * old + self.share * covariance + between
            self._fit(self.mean + self.share * gone, mixed, len(x))

    def _fit(self, mean: Tensor, covariance: Tensor, n: int) -> None:
        if not bool(torch.isfinite(covariance).all()):
            raise FloatingPointError("the particles have no covariance, some are not finite: the map diverged")
        values = torch.linalg.eigvalsh(covariance)
        if not float(values[0]) > 1e-12 * float(values[-1]):
            raise ValueError(
                f"the covariance of {n} particles in dimension {len(mean)} is singular: there are too few, or they "
                "lie in a plane; give more particles"
            )
        self.mean, self.factor = mean, torch.linalg.cholesky(covariance)

    def draw(self, n: int, generator: Generator) -> Tensor:
        """As :meth:`Reference.draw`."""
        mean, factor = (t.to(generator.device, torch.float32) for t in (self.mean, self.factor))
        noise = torch.randn(n, len(mean), generator=generator, device=generator.device, dtype=torch.float32)
        return mean + noise @ factor.T

    def log_density(self, x: Tensor) -> Tensor:
        """Logarithm of the density (n,) at the points x (n, d)."""
        mean, factor = self.mean.to(x), self.factor.to(x)
        u = torch.linalg.solve_triangular(factor, (x - mean).T, upper=False)
        return -u.square().sum(0) / 2 - factor.diagonal().log().sum() - len(mean) / 2 * math.log(2 * math.pi)

    def state(self) -> dict[str, Tensor]:
        """As :meth:`Reference.state`."""
        return {"mean": self.mean, "factor": self.factor} if hasattr(self, "mean") else {}

    def restore(self, state: dict[str, Tensor]) -> None:
        """As :meth:`Reference.restore`."""
        self.mean, self.factor = state["mean"], state["factor"]


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (d,) and covariance (d, d) of points (n, d), in float64."""
    wide = x.double()
    apart = wide - wide.mean(0)
    return wide.mean(0), apart.T @ apart / max(len(x) - 1, 1)


@dataclass
class Ball(Reference):
    """The uniform law on the ball about the particles' mean that holds them all, larger by the margin."""

    margin: float

    centre: Tensor | None = None
    radius: float = 0.0

    def renew(self, crowd: Tensor) -> None:
        """As :meth:`Reference.renew`."""
        self.centre = crowd.mean(0)
        self.radius = (1 + self.margin) * float((crowd - self.centre).norm(dim=1).max())
        if not self.radius > 0:
            raise ValueError("the particles must not all be at one place: their law has no density")

    def draw(self, n: int, generator: Generator) -> Tensor:
        """As :meth:`Reference.draw`."""
        assert self.centre is not None
        d = len(self.centre)
        way = torch.randn(n, d, generator=generator, device=generator.device, dtype=torch.float32)
        share = torch.rand(n, 1, generator=generator, device=generator.device, dtype=torch.float32) ** (1 / d)
        return self.centre.to(way) + self.radius * share * way / way.norm(dim=1, keepdim=True)

    def check(self, x: Tensor) -> None:
        """As :meth:`Reference.check`."""
        assert self.centre is not None
        out = int(((x.detach() - self.centre.to(x)).norm(dim=1) > self.radius).sum())
        if out:
            raise ValueError(
                f"{out} of {len(x)} moved particles are outside of the reference ball, where the critic knows nothing: "
                f"take a larger margin than {self.margin:g}, or a smaller step"
            )

    @property
    def log_volume(self) -> float:
        """Logarithm of the volume Ω of the ball."""
        assert self.centre is not None
        d = len(self.centre)
        return d * math.log(self.radius) + d / 2 * math.log(math.pi) - math.lgamma(d / 2 + 1)

    def state(self) -> dict[str, Tensor]:
        """As :meth:`Reference.state`."""
        if self.centre is None:
            return {}
        return {"centre": self.centre, "radius": torch.tensor(self.radius, dtype=torch.float64)}

    def restore(self, state: dict[str, Tensor]) -> None:
        """As :meth:`Reference.restore`."""
        self.centre, self.radius = state["centre"], float(state["radius"])


@dataclass
class Samples(Reference):
    """The data, which stay what they are."""

    stream: Stream

    def draw(self, n: int, generator: Generator) -> Tensor:
        """As :meth:`Reference.draw`."""
        return self.stream.many(n, generator)

    def frozen(self) -> "Reference":
        """As :meth:`Reference.frozen`."""
        return self

    def state(self) -> dict[str, Tensor]:
        """As :meth:`Reference.state`."""
        return self.stream.state()

    def restore(self, state: dict[str, Tensor]) -> None:
        """As :meth:`Reference.restore`."""
        self.stream.restore(state)


def data(samples: Any) -> Samples:
    """The reference law of data that a reader gives as `samples`; ValueError if they have classes."""
    stream = Stream("samples", samples)
    if stream.classes:
        raise ValueError(f"samples must have no classes, got {stream.classes}")
    return Samples(stream)
