"""nsgf-lite: generative modelling by Wasserstein gradient flows, the library that the book's chapters call."""

from nsgf_lite import closed_forms, fields, metrics, plots, toy
from nsgf_lite.checks import check, scale
from nsgf_lite.divergence import entropic_cost, sinkhorn_divergence
from nsgf_lite.particles import follow
from nsgf_lite.sinkhorn import (
    BarycentricMap,
    ConvergenceWarning,
    Potentials,
    barycentric_map,
    plan,
    potentials,
)

__version__ = "0.1.0"

__all__ = [
    "BarycentricMap",
    "ConvergenceWarning",
    "Potentials",
    "barycentric_map",
    "check",
    "closed_forms",
    "entropic_cost",
    "fields",
    "follow",
    "metrics",
    "plan",
    "plots",
    "potentials",
    "scale",
    "sinkhorn_divergence",
    "toy",
]
