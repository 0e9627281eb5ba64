"""Distances between samples, and the floor below which no generated sample can be expected to go."""

import math
from collections.abc import Callable

import torch
from torch import Generator, Tensor

from nsgf_lite.fields import exact_plan
from nsgf_lite.fields.base import median_distance
from nsgf_lite.inputs import read_clouds, read_counts, read_positive
from nsgf_lite.toy import Law


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
    distance = torch.cdist(x.detach().double(), y.detach().double(), compute_mode="donot_use_mm_for_euclid_dist")
    return math.sqrt(float((P * distance.square().to(P)).sum()))


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
    distance = torch.cdist(z, z, compute_mode="donot_use_mm_for_euclid_dist")
    bandwidth = float(median_distance(x.double(), y.double())) if bandwidth is None else bandwidth
    read_positive(bandwidth=bandwidth)
    kernel = torch.exp(-distance.square() / (2 * bandwidth**2))
    sign = torch.cat([z.new_full((len(x),), 1 / len(x)), z.new_full((len(y),), -1 / len(y))])
    return max(float(sign @ kernel @ sign), 0.0)


def floor(
    law: Law, n: int, generator: Generator, metric: Callable[[Tensor, Tensor], float] = w2, pairs: int = 8
) -> tuple[float, float]:
    """Mean and standard deviation of the metric between two independent samples (n, d) of n points of one law.

    A perfect generator scores this much, so distances are read beside it.

    Raises
    ------
    ValueError
        If there are fewer than two pairs, or n is not a positive integer.

    Used in
    -------
    :doc:`/book/intro`, :doc:`/book/neural_sinkhorn_flow`, :doc:`/book/two_phase`,
    :doc:`/book/two_dimensional_benchmark`
    """
    read_counts(pairs=pairs)
    if pairs < 2:
        raise ValueError(f"pairs must be at least 2, got {pairs}")
    values = torch.tensor([metric(law.sample(n, generator), law.sample(n, generator)) for _ in range(pairs)])
    return float(values.mean()), float(values.std())
