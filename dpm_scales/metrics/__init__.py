"""Measures of images and of sets of images."""

from dpm_scales.metrics.distances import FeatureStatistics, KernelDistance, frechet_distance, kernel_distance
from dpm_scales.metrics.features import EffLite0Features, FeatureNetwork, InceptionFeatures, pick_features

__all__ = [
    "EffLite0Features",
    "FeatureNetwork",
    "FeatureStatistics",
    "InceptionFeatures",
    "KernelDistance",
    "frechet_distance",
    "kernel_distance",
    "pick_features",
]
