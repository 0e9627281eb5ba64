"""Distances between samples, and the floor below which no generated sample can be expected to go."""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Generator, Tensor

from nsgf_lite.fields import exact_plan
from nsgf_lite.fields.base import median_distance
from nsgf_lite.inputs import exact, read_clouds, read_counts, read_generator, read_positive
from nsgf_lite.toy import Law

_BLOCK = 2**24  # entries of a matrix of distances that are held at once


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
