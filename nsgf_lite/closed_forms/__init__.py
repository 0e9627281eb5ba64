"""What can be written down exactly: the oracles that the solver, the flows and the chapters are tested against."""

from nsgf_lite.closed_forms.atoms import cross_curl, cross_velocity, two_atom_mass, two_atom_velocity
from nsgf_lite.closed_forms.diffusions import barenblatt, barenblatt_radius, gaussian_ksd, ou_moments
from nsgf_lite.closed_forms.gaussians import (
    gaussian_divergence,
    gaussian_flow,
    gaussian_map,
    gaussian_ot,
    gaussian_velocity,
)
from nsgf_lite.closed_forms.jko import gaussian_chi2, gaussian_kl, jko_barenblatt, jko_gaussian
from nsgf_lite.closed_forms.segments import (
    gaussian_w2,
    handover_constant,
    segment_law,
    segment_time,
    segment_velocity,
)

__all__ = [
    "barenblatt",
    "barenblatt_radius",
    "cross_curl",
    "cross_velocity",
    "gaussian_chi2",
    "gaussian_divergence",
    "gaussian_flow",
    "gaussian_kl",
    "gaussian_ksd",
    "gaussian_map",
    "gaussian_ot",
    "gaussian_velocity",
    "gaussian_w2",
    "handover_constant",
    "jko_barenblatt",
    "jko_gaussian",
    "ou_moments",
    "segment_law",
    "segment_time",
    "segment_velocity",
    "two_atom_mass",
    "two_atom_velocity",
]
