"""Networks of points and times, made by one call and trained alone or stacked."""

from nsgf_lite.networks.maps import ICNN, LogRatio, ResidualMap
from nsgf_lite.networks.perceptrons import MLP, Residual, call, evaluating, lent_chance, seeded, valued
from nsgf_lite.networks.stack import Stack

__all__ = [
    "ICNN",
    "MLP",
    "LogRatio",
    "Residual",
    "ResidualMap",
    "Stack",
    "call",
    "evaluating",
    "lent_chance",
    "seeded",
    "valued",
]
