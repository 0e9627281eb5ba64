"""Entropic optimal transport: potentials to a stated tolerance, plans, maps, costs and the Sinkhorn divergence."""

from nsgf_lite.transport.divergence import entropic_cost, sinkhorn_divergence
from nsgf_lite.transport.problem import ConvergenceWarning, Potentials
from nsgf_lite.transport.sinkhorn import BarycentricMap, barycentric_map, plan, potentials

__all__ = [
    "BarycentricMap",
    "ConvergenceWarning",
    "Potentials",
    "barycentric_map",
    "entropic_cost",
    "plan",
    "potentials",
    "sinkhorn_divergence",
]
