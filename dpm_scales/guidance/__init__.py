"""Guidance by labels or by a worse model, with one weight or one for each frequency, as denoisers for any sampler."""

from dpm_scales.guidance.curves import MAX_WEIGHT, GuidanceCurve, ListedGuidance, LowHigh
from dpm_scales.guidance.denoisers import VARIABLES, Autoguidance, ClassifierFreeGuidance, guided_interval

__all__ = [
    "MAX_WEIGHT",
    "VARIABLES",
    "Autoguidance",
    "ClassifierFreeGuidance",
    "GuidanceCurve",
    "ListedGuidance",
    "LowHigh",
    "guided_interval",
]
