"""Laws with a density, in any dimension: what a flow towards a density is compared with."""

import math
from dataclasses import dataclass

import torch
from scipy.special import betaincinv
from torch import Generator, Tensor

from nsgf_lite.closed_forms import barenblatt, barenblatt_radius
from nsgf_lite.inputs import exact, read_clouds, read_counts, read_parameters, read_positive
from nsgf_lite.toy import _check, _normal, _uniform


def _points(x: Tensor, d: int) -> None:
    read_clouds(x=x)
    if x.shape[-1] != d:
        raise ValueError(f"x must have shape (n, {d}), got {tuple(x.shape)}")


@dataclass(frozen=True, eq=False)
class GaussianMixture:
    """Equal mixture of round Gaussians about the means (k, d), with standard deviation `scale` along each axis.

    Raises
    ------
    ValueError
        If the means are not a cloud or the scale is not positive; when called, as the laws of :mod:`nsgf_lite.toy`, or
        if the points have another dimension or are too far for their log density.

    Source
    ------
    Fan et al. (2022), Section 5.1.
    """

    means: Tensor
    scale: float = 1.0

    def __post_init__(self) -> None:
        read_clouds(means=self.means)
        if self.means.ndim != 2:
            raise ValueError(f"means must have shape (k, d), got {tuple(self.means.shape)}")
        read_parameters(self, positive="scale")

    def sample(self, n: int, generator: Generator, dtype: torch.dtype = torch.float32) -> Tensor:
        """Draw n points, shape (n, d)."""
        _check(n, generator, dtype)
        k, d = self.means.shape
        row = torch.randint(k, (n,), generator=generator, device=generator.device)
        return self.means.to(generator.device, dtype)[row] + self.scale * _normal(n, generator, dtype, d)

    @exact
    def log_density(self, x: Tensor) -> Tensor:
        """Log of the density, normalised, at points x (n, d): shape (n,)."""
        k, d = self.means.shape
        _points(x, d)
        means = self.means.to(x)
        origin = means.mean(0)
        z, m = (x - origin) / self.scale, (means - origin) / self.scale
        each = z @ m.T - m.square().sum(1) / 2
        constant = math.log(k) + d * (math.log(2 * math.pi) / 2 + math.log(self.scale))
        value = torch.logsumexp(each, -1) - z.square().sum(-1) / 2 - constant
        if not bool(torch.isfinite(value).all()):
            raise ValueError(f"scale must be larger for points so far away: the log density overflows, {self.scale!r}")
        return value


def random_mixture(
    d: int, side: float, generator: Generator, components: int = 10, scale: float = 1.0
) -> GaussianMixture:
    """Mixture with means drawn uniformly from the cube ``[-side/2, side/2]^d``, in float64.

    The published experiments have ten components and a side of 5 to 1.5, by dimension; their text leaves the standard
    deviation of the components open, the authors' code has one.

    Raises
    ------
    ValueError
        If d or the number of components is not a positive integer, side or scale not positive, or the generator none.

    Source
    ------
    Fan et al. (2022), Sections 5.1 and F.2, Table 4.
    """
    (d, components), (side,) = read_counts(d=d, components=components), read_positive(side=side)
    means = _uniform(components * d, generator, torch.float64).view(components, d)
    return GaussianMixture(side * (means - 0.5), scale)


@dataclass(frozen=True)
class Barenblatt:
    """The law of :func:`nsgf_lite.closed_forms.barenblatt` in dimension d, at time t: the porous medium's own profile.

    The density falls from the centre as ``(1 - s^2)^{1/(m-1)}``, with s the distance in units of the support's radius.
    In polar coordinates s has a density proportional to ``s^{d-1} (1 - s^2)^{1/(m-1)}``; hence ``w = s^2`` one
    proportional to ``w^{d/2 - 1} (1 - w)^{1/(m-1)}``: it is a Beta variable with parameters d/2 and m/(m-1). A point is
    the radius times ``w^{1/2}`` times a direction, uniform and independent of it. This is exact in every dimension.

    Raises
    ------
    ValueError
        If d is not a positive integer, t <= 0 or m <= 1; when called, as the laws of :mod:`nsgf_lite.toy`.

    Source
    ------
    Fan et al. (2022), Sections 5.4 and F.5, who sample by rejection; the radial law is ours.
    """

    d: int
    t: float = 1.0
    m: float = 2.0

    def __post_init__(self) -> None:
        read_parameters(self, counts="d", positive="t m")
        barenblatt_radius(self.t, self.d, self.m)

    @property
    def radius(self) -> float:
        """Of the support, a length."""
        return barenblatt_radius(self.t, self.d, self.m)

    @property
    def acceptance(self) -> float:
        """Share of the points that :meth:`rejection` keeps: one over the largest density times the cube's volume."""
        top = barenblatt(self.t, torch.zeros(1, self.d, dtype=torch.float64), self.m).log()
        return math.exp(-float(top) - self.d * math.log(2 * self.radius))

    def sample(self, n: int, generator: Generator, dtype: torch.dtype = torch.float32) -> Tensor:
        """Draw n points, shape (n, d)."""
        u = _uniform(n, generator, torch.float64)
        direction = _normal(n, generator, torch.float64, self.d)
        _check(n, generator, dtype)
        w = torch.from_numpy(betaincinv(self.d / 2, self.m / (self.m - 1), u.cpu().numpy())).to(u)
        length = self.radius * w.sqrt() / direction.norm(dim=1)
        return (length.unsqueeze(1) * direction).to(dtype)

    def rejection(self, n: int, generator: Generator, dtype: torch.dtype = torch.float32) -> Tensor:
        """Draw n points, shape (n, d), by rejection from the uniform law on the cube about the support.

        The share that is kept, `acceptance`, falls faster than exponentially with d: for m = 2 it is 0.21 in dimension
        3, 0.020 in dimension 6, 4e-4 in dimension 10. Below 1e-4 this is a ValueError; :meth:`sample` has no limit.
        """
        _check(n, generator, dtype)
        if self.acceptance < 1e-4:
            raise ValueError(f"d must be smaller for rejection: {self.acceptance:.1g} of the points would be kept")
        kept: list[Tensor] = []
        top = float(barenblatt(self.t, torch.zeros(1, self.d, dtype=torch.float64), self.m))
        while sum(map(len, kept)) < n:
            u = _uniform(4096 * (self.d + 1), generator, torch.float64).view(4096, self.d + 1)
            x = self.radius * (2 * u[:, 1:] - 1)
            kept.append(x[u[:, 0] * top < barenblatt(self.t, x, self.m)])
        return torch.cat(kept)[:n].to(dtype)

    @exact
    def log_density(self, x: Tensor) -> Tensor:
        """Log of the density at points x (n, d), minus infinity outside the support: shape (n,)."""
        _points(x, self.d)
        return barenblatt(self.t, x, self.m).log()
