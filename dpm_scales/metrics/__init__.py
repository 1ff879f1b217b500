"""Measures of images and of sets of images."""

from dpm_scales.metrics.distances import FeatureStatistics, KernelDistance, frechet_distance, kernel_distance
from dpm_scales.metrics.features import EffLite0Features, FeatureNetwork, InceptionFeatures, pick_features
from dpm_scales.metrics.scale_space import (
    average_grey,
    entropy_increments,
    image_variance,
    relative_entropy,
    reverse_entropy_bounds,
    step_entropy,
)

__all__ = [
    "EffLite0Features",
    "FeatureNetwork",
    "FeatureStatistics",
    "InceptionFeatures",
    "KernelDistance",
    "average_grey",
    "entropy_increments",
    "frechet_distance",
    "image_variance",
    "kernel_distance",
    "pick_features",
    "relative_entropy",
    "reverse_entropy_bounds",
    "step_entropy",
]
