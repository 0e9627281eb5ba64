"""Networks of points and times, made by one call and trained alone or stacked."""

from nsgf_lite.networks.perceptrons import MLP, Residual, call, seeded
from nsgf_lite.networks.stack import Stack

__all__ = ["MLP", "Residual", "Stack", "call", "seeded"]
