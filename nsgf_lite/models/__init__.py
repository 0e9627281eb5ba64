"""Models that learn a flow or a generator: all with ``fit``, ``sample``, ``save`` and ``load``."""

from nsgf_lite.models import drifting
from nsgf_lite.models.ept import EPT
from nsgf_lite.models.flow import Flow
from nsgf_lite.models.jko import JKOFlow
from nsgf_lite.models.nsgf import NSGF
from nsgf_lite.models.pool import Pool, trajectories
from nsgf_lite.models.straight import OTCFM, FlowMatching, RectifiedFlow, StochasticInterpolant
from nsgf_lite.models.two_phase import NSGFPlusPlus

__all__ = [
    "EPT",
    "Flow",
    "FlowMatching",
    "JKOFlow",
    "NSGF",
    "NSGFPlusPlus",
    "OTCFM",
    "Pool",
    "RectifiedFlow",
    "StochasticInterpolant",
    "drifting",
    "trajectories",
]
