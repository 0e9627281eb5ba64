"""Distances between samples, and the floor below which no generated sample can be expected to go."""

import itertools
import math
from collections.abc import Callable, Iterator

import torch
from torch import Generator, Tensor

from nsgf_lite.closed_forms import gaussian_kl
from nsgf_lite.closed_forms.gaussians import Matrix, Vector
from nsgf_lite.fields import exact_plan
from nsgf_lite.fields.base import median_distance
from nsgf_lite.inputs import exact, read_clouds, read_counts, read_generator, read_positive
from nsgf_lite.toy import Law

_BLOCK = 2**24  # entries of a matrix of distances that are held at once
_TILE = 512  # points along a side of a square of pairs; its numbers stay in the cache


@exact
def w2(x: Tensor, y: Tensor, a: Tensor | None = None, b: Tensor | None = None) -> float:
    """Wasserstein distance W_2, the root of the least mean of ``|x - y|^2`` (no one half), in units of length; exact.

    Clouds (n, d), (m, d), weights (n,), (m,) uniform if None; computed in float64 by POT's network simplex.

    Raises
    ------
    ValueError
        As :func:`nsgf_lite.potentials`.

    Used in
    -------
    :prf:ref:`thm-small-eps`, :doc:`/book/intro`, :doc:`/book/wasserstein_gradient_flows`,
    :doc:`/book/sinkhorn_first_variation`, :doc:`/book/mean_field_limit`, :doc:`/book/neural_sinkhorn_flow`,
    :doc:`/book/two_phase`, :doc:`/book/two_dimensional_benchmark`, :doc:`/book/speed`, :doc:`/book/field_zoo`
    """
    P = exact_plan(x, y, a, b)
    distance = _distances(x.detach().double(), y.detach().double()).to(P)
    unit = float(distance[P > 0].max()) or 1.0  # squares of tiny distances would vanish
    return unit * math.sqrt(float((P * (distance / unit).square()).sum()))


def _distances(x: Tensor, y: Tensor) -> Tensor:
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")


def _median_distance(z: Tensor) -> float:
    """As :func:`median_distance`, of one cloud of any size, by two looks at all distances."""
    if len(z) ** 2 <= _BLOCK:
        return float(median_distance(z, z[:0]))
    rows = max(1, _BLOCK // len(z))
    top = max(float(_distances(block, z).max()) for block in z.split(rows))
    if top == 0:
        return 1.0
    edges = torch.linspace(0, top, 2**16 + 1, dtype=z.dtype, device=z.device)

    def looks() -> Iterator[tuple[Tensor, Tensor]]:
        """Distances between distinct points, and the numbers of the bins that they are in."""
        for block in z.split(rows):
            d = _distances(block, z).flatten()
            d = d[d > 0]
            yield d, torch.bucketize(d, edges).clamp_max(len(edges) - 1)

    counts = torch.zeros(len(edges), dtype=torch.long, device=z.device)
    for _, k in looks():
        counts += torch.bincount(k, minlength=len(edges))
    total = counts.cumsum(0)
    rank = (int(total[-1]) - 1) // 2
    home = int(torch.searchsorted(total, rank, right=True))
    inside = torch.cat([d[k == home] for d, k in looks()]).sort().values
    return float(inside[rank - int(total[home]) + int(counts[home])])


@exact
def mmd2(x: Tensor, y: Tensor, bandwidth: float | None = None) -> float:
    """Squared maximum mean discrepancy with the kernel ``exp(-|x-y|^2 / (2 h^2))``, biased (never negative), no unit.

    Clouds (n, d), (m, d). The bandwidth h is by default the median distance between distinct points of both clouds.

    Raises
    ------
    ValueError
        If the clouds do not fit, or the bandwidth is not positive.

    Source
    ------
    Gretton et al. (2012), the biased estimate.

    Used in
    -------
    :prf:ref:`thm-mmd-variation`
    """
    read_clouds(x=x, y=y)
    if x.ndim != 2:
        raise ValueError(f"x must have shape (n, d), one cloud, got {tuple(x.shape)}")
    z = torch.cat([x, y]).detach().double()
    (h,) = read_positive(bandwidth=_median_distance(z) if bandwidth is None else bandwidth)
    sign = torch.cat([z.new_full((len(x),), 1 / len(x)), z.new_full((len(y),), -1 / len(y))])
    rows = max(1, _BLOCK // len(z))
    parts = [
        float(share @ torch.exp((_distances(block, z) / h).square() / -2) @ sign)
        for block, share in zip(z.split(rows), sign.split(rows), strict=True)
    ]
    return max(math.fsum(parts), 0.0)


@exact
@torch.no_grad()
def ksd(x: Tensor, score: Callable[[Tensor], Tensor], h: float | None = None) -> float:
    """Kernelised Stein discrepancy of points x (n, d) from a law known by its score, unbiased; one over length².

    The mean over pairs ``i != j`` of ``k (s_i . s_j + (s_i - s_j) . u / h^2 + d / h^2 - |u|^2 / h^4)`` with
    ``u = x_i - x_j``, ``k = exp(-|u|^2 / (2h^2))`` and ``s = score(x)``: Liu, Lee and Jordan's S, without a root, which
    is zero if the points are of that law. Being unbiased it may be negative. Tiles of pairs are summed, in float64.

    Parameters
    ----------
    x : Tensor
        At least two points.
    score : callable
        Gradient of the log density, ``(n, d) -> (n, d)``; of a log density ``f`` it is ``partial(nl.fields.score, f)``.
    h : float or None
        Bandwidth, in units of length; None for the median distance between distinct points of x. Methods are compared
        at one bandwidth, so give it then.

    Raises
    ------
    ValueError
        If x is not a cloud of at least two points, a score is not finite or of another shape, or h is not positive, or
        so small that the discrepancy overflows.

    Source
    ------
    Liu, Lee, Jordan (2016), Theorem 3.6; Fan et al. (2022), Section F.1.
    """
    read_clouds(x=x)
    n, d = x.shape[-2:]
    if x.ndim != 2 or n < 2:
        raise ValueError(f"x must have shape (n, d) with n > 1, one cloud, got {tuple(x.shape)}")
    if not callable(score):
        raise ValueError(f"score must be a function of points (n, d), got {score!r}")
    slope = score(x)
    if not isinstance(slope, Tensor) or slope.shape != x.shape or not bool(torch.isfinite(slope).all()):
        raise ValueError(f"score must give a finite vector for each point, shape {tuple(x.shape)}, got {slope!r:.80}")
    z, s = x.detach().double() - x.detach().double().mean(0), slope.detach().double()
    (h,) = read_positive(h=_median_distance(z) if h is None else h)
    z, s = z / h, s * h  # lengths in units of h: what comes out is in units of 1 / h^2
    size, along, total = z.square().sum(1), (s * z).sum(1), []
    for k, l in itertools.combinations_with_replacement(range(0, n, _TILE), 2):
        here, there = slice(k, k + _TILE), slice(l, l + _TILE)
        square = (size[here, None] + size[there] - 2 * z[here] @ z[there].T).clamp_min(0)
        cross = along[here, None] + along[there] - s[here] @ z[there].T - z[here] @ s[there].T
        values = torch.exp(square / -2) * (s[here] @ s[there].T + cross + d - square)
        total.append(float(values.sum() - values.diagonal().sum() if k == l else 2 * values.sum()))
    value = math.fsum(total) / (n * (n - 1)) / h / h if all(map(math.isfinite, total)) else math.nan
    if not math.isfinite(value):
        raise ValueError(f"h must be larger, or the scores smaller: the discrepancy overflows, got h = {h:g}")
    return value


def symmetric_kl(a: Vector, A: Matrix, b: Vector, B: Matrix) -> float:
    """Symmetric divergence ``KL(N(a, A) | N(b, B)) + KL(N(b, B) | N(a, A))``: the sum, not its half; no unit.

    Raises
    ------
    ValueError
        If a covariance is not symmetric positive definite, or the sizes differ.

    Source
    ------
    Fan et al. (2022), Sections 5.2 and F.1, after Mokrov et al. (2021); the sum is what the authors' code has.
    """
    return float(gaussian_kl(a, A, b, B) + gaussian_kl(b, B, a, A))


def symmetric_kl_floor(n: int, d: int) -> float:
    """Mean of :func:`symmetric_kl` between a Gaussian law and the one with the mean and covariance of n of its points.

    Exactly ``d (d + 3) (n - 1) / (2 n (n - d - 2))`` for the unbiased covariance: what a perfect generator scores.

    Raises
    ------
    ValueError
        If n or d is not a positive integer, or n < d + 3, when the mean is infinite.

    Used in
    -------
    :prf:ref:`thm-symmetric-floor`
    """
    n, d = read_counts(n=n, d=d)
    if n < d + 3:
        raise ValueError(f"n must be at least d + 3 = {d + 3}, got {n}: below, the mean is infinite")
    return d * (d + 3) * (n - 1) / (2 * n * (n - d - 2))


def _read_logs(**logs: Tensor) -> list[Tensor]:
    """Log densities (n,) at one sample's points, in float64; minus infinity where there is no density."""
    (first, *_) = logs.values()
    for name, value in logs.items():
        if not isinstance(value, Tensor) or value.ndim != 1 or not len(value) or value.shape != first.shape:
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"{name} must be a log density at each point, shape (n,) for all of them, got {got}")
        if not value.dtype.is_floating_point or bool(torch.isnan(value).any()) or bool(torch.isposinf(value).any()):
            raise ValueError(f"{name} must be numbers below +inf, got NaN, +inf or {value.dtype}")
    return [value.detach().double() for value in logs.values()]


def sampled_kl(log_p: Tensor, log_q: Tensor, smallest: float | None = None) -> tuple[float, float]:
    """KL(p | q) by the mean of ``log p - log q`` over a sample of p, with its standard error; no unit.

    It is infinite where p has mass and q none; then so is the answer as soon as one point of the sample lies there, and
    :func:`sampled_js`, which is always finite, is the one to report. `smallest` takes densities below it for as large,
    such as 1e-45, single precision's smallest: the answer is then finite, and grows with -log of it times the mass
    outside.

    Parameters
    ----------
    log_p, log_q : Tensor
        Log densities, normalised, at the points of a sample of p: shape (n,), n at least two.
    smallest : float or None
        Smallest density, or None.

    Raises
    ------
    ValueError
        If they are not of one shape, one is NaN or +inf, p vanishes at a point of its own sample, or `smallest` is not
        positive.

    Source
    ------
    Fan et al. (2022), Section F.1, after Mokrov et al. (2021).
    """
    log_p, log_q = _read_logs(log_p=log_p, log_q=log_q)
    if len(log_p) < 2 or bool(torch.isneginf(log_p).any()):
        raise ValueError(f"log_p must be finite at two points or more of a sample of p, got {len(log_p)} points")
    if smallest is not None:
        least = math.log(read_positive(smallest=smallest)[0])
        log_p, log_q = log_p.clamp_min(least), log_q.clamp_min(least)
    values = log_p - log_q
    if not bool(torch.isfinite(values).all()):
        return math.inf, math.inf
    return float(values.mean()), float(values.std()) / math.sqrt(len(values))


def sampled_js(p_at_x: Tensor, q_at_x: Tensor, p_at_y: Tensor, q_at_y: Tensor) -> tuple[float, float]:
    """Jensen and Shannon's divergence of p and q by samples x of p and y of q, with its standard error; no unit.

    ``(E_p log(2p/(p+q)) + E_q log(2q/(p+q))) / 2``, between zero and log 2 whatever the supports. Half of what Fan et
    al. call JSD.

    Parameters
    ----------
    p_at_x, q_at_x, p_at_y, q_at_y : Tensor
        Log densities, normalised, of p and q at the points x (n,) and y (m,), minus infinity where there is none.

    Raises
    ------
    ValueError
        If shapes do not fit, one is NaN or +inf, or a law vanishes at a point of its own sample.

    Source
    ------
    Lin (1991).
    """
    halves = []
    pairs = {"p_at_x": _read_logs(p_at_x=p_at_x, q_at_x=q_at_x), "q_at_y": _read_logs(q_at_y=q_at_y, p_at_y=p_at_y)}
    for name, (own, other) in pairs.items():
        if len(own) < 2 or bool(torch.isneginf(own).any()):
            law = name[0]
            raise ValueError(f"{name} must be finite at two points or more of a sample of {law}, got {len(own)} points")
        halves.append(math.log(2) - torch.logaddexp(torch.zeros_like(own), other - own))
    error = math.sqrt(sum(float(half.var()) / len(half) for half in halves)) / 2
    return sum(float(half.mean()) for half in halves) / 2, error


def floor(
    law: Law, n: int, generator: Generator, metric: Callable[[Tensor, Tensor], float] = w2, pairs: int = 8
) -> tuple[float, float]:
    """Mean and standard deviation of the metric between two independent samples (n, d) of n points of one law.

    A perfect generator scores this much, so distances are read beside it.

    Raises
    ------
    ValueError
        If there are fewer than two pairs, n is not a positive integer, or law, generator or metric are none.

    Used in
    -------
    :doc:`/book/intro`, :doc:`/book/two_phase`, :doc:`/book/two_dimensional_benchmark`
    """
    if not hasattr(law, "sample"):
        raise ValueError(f"law must have sample(n, generator), got {type(law).__name__}")
    if not callable(metric):
        raise ValueError(f"metric must be a function of two samples, got {type(metric).__name__}")
    read_generator(generator)
    pairs, n = read_counts(pairs=pairs, n=n)
    if pairs < 2:
        raise ValueError(f"pairs must be at least 2, got {pairs}")
    pair = [metric(law.sample(n, generator), law.sample(n, generator)) for _ in range(pairs)]
    values = torch.tensor(pair, dtype=torch.float64)
    return float(values.mean()), float(values.std())
