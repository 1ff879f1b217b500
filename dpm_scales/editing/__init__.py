"""Editing with an unconditional model: a known image conditions the reverse process, or starts it.

degradations   y = A x + sigma eps: known pixels, blur, block averages
consistent     a denoiser conditioned on y
latents        images as states at a scale: noised, encoded, interpolated, with shared noise
"""

from __future__ import annotations

from dpm_scales.editing.consistent import (
    COVARIANCES,
    Consistent,
    Resampling,
    check_covariance,
    check_estimates,
    restore,
)
from dpm_scales.editing.degradations import Average, Blur, Degradation, Mask
from dpm_scales.editing.latents import (
    BranchingNoise,
    between,
    context_of,
    encode,
    nearest_blur,
    noised,
    scales_from,
    slerp,
)

__all__ = [
    "COVARIANCES",
    "Average",
    "Blur",
    "BranchingNoise",
    "Consistent",
    "Degradation",
    "Mask",
    "Resampling",
    "between",
    "check_covariance",
    "check_estimates",
    "context_of",
    "encode",
    "nearest_blur",
    "noised",
    "restore",
    "scales_from",
    "slerp",
]
