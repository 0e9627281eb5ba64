"""What a JKO step descends: functionals of a law, which add and multiply with positive numbers."""

from nsgf_lite.functionals.base import Functional, Move, Reference, Sum, read_values
from nsgf_lite.functionals.divergences import JSD, KL, Entropy, KLSamples
from nsgf_lite.functionals.energies import FreeEnergy, Interaction, Potential
from nsgf_lite.functionals.references import Ball, Moments, Samples

__all__ = [
    "Ball",
    "Entropy",
    "FreeEnergy",
    "Functional",
    "Interaction",
    "JSD",
    "KL",
    "KLSamples",
    "Moments",
    "Move",
    "Potential",
    "Reference",
    "Samples",
    "Sum",
    "read_values",
]
