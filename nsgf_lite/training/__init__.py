"""Training: one loop, what it draws on, and files from which an interrupted run goes on to the bit."""

from nsgf_lite.training.checkpoints import json_like
from nsgf_lite.training.loop import Chance, Part, Training, clip_members, train
from nsgf_lite.training.machines import machine
from nsgf_lite.training.streams import Stream, described
from nsgf_lite.training.together import fit_together

__all__ = [
    "Chance",
    "Part",
    "Stream",
    "Training",
    "clip_members",
    "described",
    "fit_together",
    "json_like",
    "machine",
    "train",
]
