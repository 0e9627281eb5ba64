"""Velocity fields: small dataclasses of hyperparameters, all called ``field(x, y, at=None, a=None, b=None)``."""

from nsgf_lite.fields.base import Field, UnderflowWarning
from nsgf_lite.fields.critic import Critic
from nsgf_lite.fields.interaction import Interaction
from nsgf_lite.fields.scores import Drift, ScoreDifference, SinkhornProxy, SmoothedKL
from nsgf_lite.fields.stein import Stein, score
from nsgf_lite.fields.transport import Sinkhorn, SlicedWasserstein, Wasserstein, exact_plan
from nsgf_lite.fields.witness import KALE, MMD, DrMMD, Kernel

__all__ = [
    "Critic",
    "DrMMD",
    "Drift",
    "Field",
    "Interaction",
    "KALE",
    "Kernel",
    "MMD",
    "ScoreDifference",
    "Sinkhorn",
    "SinkhornProxy",
    "SlicedWasserstein",
    "SmoothedKL",
    "Stein",
    "UnderflowWarning",
    "Wasserstein",
    "exact_plan",
    "score",
]
