"""Fields of kernel averages: the smoothed scores, the flow of their divergence, and the one-shot Sinkhorn plans."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Generator, Tensor

from nsgf_lite.fields.base import Formula, log_kernel, warn_underflow
from nsgf_lite.inputs import read_parameters, read_positive


def _mean_shift(exponent: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of y (…, m, d) under the softmax of the exponents (…, k, m), and the log of the sum of exponentials."""
    total = torch.logsumexp(exponent, -1)
    return torch.exp(exponent - total.unsqueeze(-1)) @ y, total


@dataclass(frozen=True)
class ScoreDifference(Formula):
    """Mean shift towards the data minus mean shift towards the particles: ``h^2 (grad log k*p - grad log k*q)``.

    In units of length. Curl-free in the point, and yet not the Wasserstein gradient of any functional of q.

    Parameters
    ----------
    h : float
        Bandwidth, in units of length, of the kernel ``exp(-|x - y|^2 / (2 h^2))``.
    kernel : str
        ``gaussian``; or ``laplace``, which weighs displacements with ``exp(-|x - y| / h)`` and normalises with the
        kernel k that makes this a gradient, ``(1 + |x - y| / h) exp(-|x - y| / h)``.

    Raises
    ------
    ValueError
        If a parameter is out of range; when called, as :func:`nsgf_lite.potentials`, or if h is so small that
        ``|x-y|/h`` overflows.

    Source
    ------
    Deng et al. (2026), equation 8; the note on drifting (2026), equations 10 to 14; Franz et al. (2026), sharp kernels.

    Used in
    -------
    :prf:ref:`thm-tweedie`, :prf:ref:`thm-score-difference-consistency`, :prf:ref:`thm-two-modes-scores`,
    :prf:ref:`thm-mass-blindness`, :prf:ref:`thm-kl-field-not-a-gradient`, :prf:ref:`thm-smoothed-flow-any-kernel`
    """

    h: float
    kernel: str = "gaussian"

    def __post_init__(self) -> None:
        read_parameters(self, positive="h")
        if self.kernel not in ("gaussian", "laplace"):
            raise ValueError(f"kernel must be 'gaussian' or 'laplace', got {self.kernel!r}")

    def _velocity(
        self, x: Tensor, y: Tensor, at: Tensor | None, a: Tensor, b: Tensor, generator: Generator | None
    ) -> Tensor:
        z = x if at is None else at
        if self.kernel == "laplace":
            return self._sharp(z, y, b, own=False) - self._sharp(z, x, a, own=at is None)
        towards, _ = _mean_shift(log_kernel(z, y, self.h) + b.log().unsqueeze(-2), y)
        away, _ = _mean_shift(log_kernel(z, x, self.h, own=at is None) + a.log().unsqueeze(-2), x)
        return towards - away

    def _sharp(self, z: Tensor, points: Tensor, weights: Tensor, own: bool) -> Tensor:
        """Displacements weighed with the Laplace kernel, over the sum of a kernel whose gradient that is."""
        K, log_weights = log_kernel(z, points, self.h, "laplace", own), weights.log().unsqueeze(-2)
        image, total = _mean_shift(K + log_weights, points)
        log_sharp = torch.logsumexp(K + torch.log1p(-K) + log_weights, -1)
        return torch.exp(total - log_sharp).unsqueeze(-1) * (image - z)


@dataclass(frozen=True)
class SmoothedKL(Formula):
    """Velocity of the Wasserstein gradient flow of KL(q_h | p_h): ``k_h * (grad log p_h - grad log q_h)``.

    In units of one over length; ``p_h = k_h * p``, the data blurred by a normal law of standard deviation h. The outer
    convolution, which :class:`ScoreDifference` lacks, is Gauss-Hermite quadrature or a mean over normal draws.

    Parameters
    ----------
    h : float
        Bandwidth, in units of length.
    nodes : int
        Number of quadrature nodes along each axis; ``nodes ** d`` evaluations, at most 4096.
    draws : int
        If positive, a mean over so many standard normal vectors from the generator takes the place of quadrature.

    Raises
    ------
    ValueError
        If a parameter is out of range; when called, as :class:`ScoreDifference`, if the quadrature has too many nodes
        for the dimension, or draws are asked for without a generator.

    Source
    ------
    The note on drifting (2026), equation 24 and Appendix A.

    Used in
    -------
    :prf:ref:`thm-smoothed-kl-flow`
    """

    h: float
    nodes: int = 8
    draws: int = 0

    def __post_init__(self) -> None:
        read_parameters(self, positive="h", counts="nodes", naturals="draws")

    def _noise(self, x: Tensor, generator: Generator | None) -> tuple[Tensor, Tensor]:
        """Standard normal vectors (k, d) and their weights (k,)."""
        d = x.shape[-1]
        if self.draws:
            if not isinstance(generator, Generator):
                raise ValueError(f"generator must be a torch.Generator where draws > 0, got {generator!r}")
            z = torch.randn(self.draws, d, generator=generator, device=generator.device, dtype=x.dtype)
            return z.to(x.device), x.new_full((self.draws,), 1 / self.draws)
        if self.nodes**d > 4096:
            raise ValueError(f"nodes ** d must be at most 4096, got {self.nodes} ** {d}; give draws= and a generator")
        points, weights = np.polynomial.hermite_e.hermegauss(self.nodes)
        axes = torch.as_tensor(points, dtype=x.dtype, device=x.device)
        mass = torch.as_tensor(weights / weights.sum(), dtype=x.dtype, device=x.device)
        z = torch.cartesian_prod(*[axes] * d).reshape(-1, d)
        return z, torch.cartesian_prod(*[mass] * d).reshape(-1, d).prod(-1)

    def _velocity(
        self, x: Tensor, y: Tensor, at: Tensor | None, a: Tensor, b: Tensor, generator: Generator | None
    ) -> Tensor:
        z = x if at is None else at
        velocity = torch.zeros_like(z)
        for noise, weight in zip(*self._noise(x, generator), strict=True):
            moved = z + self.h * noise
            towards, _ = _mean_shift(log_kernel(moved, y, self.h) + b.log().unsqueeze(-2), y)
            away, _ = _mean_shift(log_kernel(moved, x, self.h) + a.log().unsqueeze(-2), x)
            velocity = velocity + weight * (towards - away)
        return velocity / self.h / self.h


@dataclass(frozen=True)
class SinkhornProxy(Formula):
    """One-shot stand-in for the Sinkhorn field: one symmetric normalisation of the kernel, and cross weighting.

    ``A = K / sqrt(row sums x column sums)`` between particles and data and among particles, with row sums r_xy, r_xx;
    the velocity ``r_xx A_xy y - r_xy A_xx x``, in units of length. With more iterations the normalisation is repeated,
    and tends to the plans of :class:`Sinkhorn`, the velocity to its velocity.

    Parameters
    ----------
    eps : float
        Temperature, in units of squared length (the cost is ``|x - y|^2 / 2``): the square of the bandwidth h.
    iterations : int
        Number of symmetric normalisations.

    Raises
    ------
    ValueError
        If a parameter is out of range; when called, as :class:`ScoreDifference`. An :class:`UnderflowWarning` where
        nothing is left of the data's pull.

    Source
    ------
    The note on drifting (2026), equations 28 to 35; Knight, Ruiz, Uçar (2014) for the iteration.

    Used in
    -------
    :prf:ref:`thm-cross-weighting`, :prf:ref:`thm-proxy-population`, :prf:ref:`thm-proxy-consistency`,
    :prf:ref:`thm-hub-suppression`, :prf:ref:`thm-symmetric-normalisation`, :prf:ref:`thm-far-mode`,
    :prf:ref:`thm-two-modes-proxy`, :prf:ref:`thm-mass-blindness`, :prf:ref:`thm-wedge`, :prf:ref:`thm-gaussian-curl`,
    :prf:ref:`thm-one-shot-no-gradient`
    """

    eps: float
    iterations: int = 1

    def __post_init__(self) -> None:
        read_parameters(self, positive="eps", counts="iterations")

    def _velocity(
        self, x: Tensor, y: Tensor, at: Tensor | None, a: Tensor, b: Tensor, generator: Generator | None
    ) -> Tensor:
        towards, log_towards = self._images(x, y, at, a, b, own=False)
        away, log_away = self._images(x, x, at, a, a, own=True)
        factor = log_towards + log_away
        warn_underflow(factor.amax(-1), x, y)
        return torch.exp(factor).unsqueeze(-1) * (towards - away)

    def _images(
        self, x: Tensor, y: Tensor, at: Tensor | None, a: Tensor, b: Tensor, own: bool
    ) -> tuple[Tensor, Tensor]:
        """Mean of y under each row of the normalised kernel, and the log of the row's sum."""
        h = self.eps**0.5
        K = log_kernel(x, y, h, own=own)
        rows = K + b.log().unsqueeze(-2)
        points = rows if at is None else log_kernel(at, y, h) + b.log().unsqueeze(-2)
        u, v, w = rows.new_zeros(rows.shape[:-1]), rows.new_zeros(b.shape), points.new_zeros(points.shape[:-1])
        for _ in range(self.iterations):
            row = torch.logsumexp(rows + v.unsqueeze(-2), -1)
            column = row if own else torch.logsumexp(K + (u + a.log()).unsqueeze(-1), -2)
            at_row = row if at is None else torch.logsumexp(points + v.unsqueeze(-2), -1)
            # Half of Sinkhorn's step on both sides at once: A becomes A / sqrt(row sum x column sum).
            u, v, w = (u - row) / 2, (v - column) / 2, (w - at_row) / 2
        image, total = _mean_shift(points + v.unsqueeze(-2), y)
        return image, total + w


@dataclass(frozen=True)
class Drift(Formula):
    """The field that drifting models are trained with: Deng et al.'s Algorithm 2, and its variants.

    Affinities ``A = sqrt(row softmax x column softmax)`` of the logits of particles to data and to one another, row
    sums r_xy, r_xx; the velocity ``r_xx A_xy y - r_xy A_xx x``. Several temperatures: each field divided by its root
    mean square over the (weighted) particles' coordinates, then summed. One temperature: in units of length.

    Parameters
    ----------
    temperatures : tuple of float
        τ, in units of length where the logits are ``-|x-y| / τ``, of squared length where ``-|x-y|^2 / (2τ)``.
    distance : str
        ``euclidean``, as published, or ``squared``.
    ignore_self : bool
        Whether a particle's affinity to itself is left out.
    normalisation : str
        ``concatenated``, as published: one row softmax over data and particles together; or ``separate``.
    floor : float
        Smallest affinity (1e-3 in the published code, masked entries included; 0 in the published algorithm).

    Raises
    ------
    ValueError
        If a parameter is out of range; when called, as :class:`ScoreDifference`, or if self-affinities are left out
        and fewer than two particles have positive weight. An :class:`UnderflowWarning` where nothing is left of the
        data's pull.

    Source
    ------
    Deng et al. (2026), Algorithm 2; the note on drifting (2026), Algorithm 1. Weights count as multiplicities.

    Used in
    -------
    :prf:ref:`thm-drift-is-proxy`, :prf:ref:`thm-one-shot-no-gradient`, :prf:ref:`thm-affinity-floor`,
    :prf:ref:`thm-floor-rest`
    """

    temperatures: tuple[float, ...] = (0.05,)
    distance: str = "euclidean"
    ignore_self: bool = True
    normalisation: str = "concatenated"
    floor: float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.temperatures, tuple) or not self.temperatures:
            raise ValueError(f"temperatures must be a tuple of positive numbers, got {self.temperatures!r}")
        taus = tuple(read_positive(temperatures=tau)[0] for tau in self.temperatures)
        object.__setattr__(self, "temperatures", taus)
        if self.distance not in ("euclidean", "squared"):
            raise ValueError(f"distance must be 'euclidean' or 'squared', got {self.distance!r}")
        if self.normalisation not in ("concatenated", "separate"):
            raise ValueError(f"normalisation must be 'concatenated' or 'separate', got {self.normalisation!r}")
        if self.floor != 0:
            read_parameters(self, positive="floor")

    def _velocity(
        self, x: Tensor, y: Tensor, at: Tensor | None, a: Tensor, b: Tensor, generator: Generator | None
    ) -> Tensor:
        if self.ignore_self and int((a > 0).sum(-1).min()) < 2:
            raise ValueError("ignore_self needs at least two particles of positive weight, got fewer")
        if len(self.temperatures) == 1:
            return self._one(self.temperatures[0], x, y, at, a, b)
        velocity = torch.zeros_like(x if at is None else at)
        for temperature in self.temperatures:
            term = self._one(temperature, x, y, at, a, b)
            own = term if at is None else self._one(temperature, x, y, None, a, b)
            # in units of the largest entry: the square of a velocity underflows long before the velocity does
            own = torch.where((a > 0).unsqueeze(-1), own, 0)
            largest = own.detach().abs().amax((-2, -1), keepdim=True)
            unit = torch.where(largest > 0, largest, 1)
            size = (a.unsqueeze(-1) * (own / unit).square()).sum(-2, keepdim=True).mean(-1, keepdim=True)
            size = torch.where(largest > 0, size, 1).sqrt()
            velocity = velocity + torch.where(largest > 0, term / unit / size, 0)
        return velocity

    def _one(self, temperature: float, x: Tensor, y: Tensor, at: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
        z = x if at is None else at
        kernel = "laplace" if self.distance == "euclidean" else "gaussian"
        h = temperature if self.distance == "euclidean" else temperature**0.5
        many_x, many_y = ((w * (w > 0).sum(-1, keepdim=True)).log() for w in (a, b))  # weights as multiplicities
        from_y, from_x = log_kernel(x, y, h, kernel), log_kernel(x, x, h, kernel, own=True)
        if self.ignore_self:
            from_x = from_x.masked_fill(torch.eye(x.shape[-2], dtype=torch.bool, device=x.device), -torch.inf)
        columns = [torch.logsumexp(K + many_x.unsqueeze(-1), -2) for K in (from_y, from_x)]
        if at is not None:
            from_y, from_x = log_kernel(z, y, h, kernel), log_kernel(z, x, h, kernel)
        masses = (many_y.unsqueeze(-2), many_x.unsqueeze(-2))
        rows = [torch.logsumexp(K + mass, -1) for K, mass in zip((from_y, from_x), masses, strict=True)]
        if self.normalisation == "concatenated":
            rows = [torch.logaddexp(*rows)] * 2
        log_y, log_x = (
            K - (row.unsqueeze(-1) + column.unsqueeze(-2)) / 2
            for K, row, column in zip((from_y, from_x), rows, columns, strict=True)
        )
        if not self.floor:
            towards, total_y = _mean_shift(log_y + masses[0], y)
            away, total_x = _mean_shift(log_x + masses[1], x)
            warn_underflow((total_y + total_x).amax(-1), x, y)
            return torch.exp(total_y + total_x).unsqueeze(-1) * (towards - away)
        A_y, A_x = (A.exp().clamp_min(self.floor) * mass.exp() for A, mass in ((log_y, masses[0]), (log_x, masses[1])))
        return A_x.sum(-1, keepdim=True) * (A_y @ y) - A_y.sum(-1, keepdim=True) * (A_x @ x)
