"""nsgf-lite: generative modelling by Wasserstein gradient flows, the library that the book's chapters call."""

from nsgf_lite import closed_forms, drifting, fields, metrics, networks, plots, toy
from nsgf_lite.checks import check, scale
from nsgf_lite.divergence import entropic_cost, sinkhorn_divergence
from nsgf_lite.ept import EPT
from nsgf_lite.models import Flow, fit_together
from nsgf_lite.nsgf import NSGF, NSGFPlusPlus
from nsgf_lite.particles import follow
from nsgf_lite.pool import Pool, trajectories
from nsgf_lite.sinkhorn import (
    BarycentricMap,
    ConvergenceWarning,
    Potentials,
    barycentric_map,
    plan,
    potentials,
)
from nsgf_lite.straight import OTCFM, FlowMatching, RectifiedFlow, StochasticInterpolant
from nsgf_lite.training import Training

__version__ = "0.1.0"

__all__ = [
    "BarycentricMap",
    "ConvergenceWarning",
    "EPT",
    "Flow",
    "FlowMatching",
    "NSGF",
    "NSGFPlusPlus",
    "OTCFM",
    "Pool",
    "Potentials",
    "RectifiedFlow",
    "StochasticInterpolant",
    "Training",
    "barycentric_map",
    "check",
    "closed_forms",
    "drifting",
    "entropic_cost",
    "fields",
    "fit_together",
    "follow",
    "metrics",
    "networks",
    "plan",
    "plots",
    "potentials",
    "scale",
    "sinkhorn_divergence",
    "toy",
    "trajectories",
]
