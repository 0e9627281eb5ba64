"""nsgf-lite: generative modelling by Wasserstein gradient flows, the library that the book's chapters call."""

from nsgf_lite import closed_forms, fields, functionals, logistic, metrics, networks, plots, targets, toy
from nsgf_lite.checks import check, scale
from nsgf_lite.models import (
    EPT,
    NSGF,
    OTCFM,
    Flow,
    FlowMatching,
    JKOFlow,
    NSGFPlusPlus,
    Pool,
    RectifiedFlow,
    StochasticInterpolant,
    drifting,
    trajectories,
)
from nsgf_lite.particles import follow, langevin
from nsgf_lite.training import Training, fit_together
from nsgf_lite.transport import (
    BarycentricMap,
    ConvergenceWarning,
    Potentials,
    barycentric_map,
    entropic_cost,
    plan,
    potentials,
    sinkhorn_divergence,
)

__version__ = "0.1.0"

__all__ = [
    "BarycentricMap",
    "ConvergenceWarning",
    "EPT",
    "Flow",
    "FlowMatching",
    "JKOFlow",
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
    "functionals",
    "langevin",
    "logistic",
    "metrics",
    "networks",
    "plan",
    "plots",
    "potentials",
    "scale",
    "sinkhorn_divergence",
    "targets",
    "toy",
    "trajectories",
]
