"""Measures of images and of sets of images."""

from dpm_scales.metrics.base import FeatureSet, ImageMetric, Measure, Metric, Track
from dpm_scales.metrics.distances import FeatureStatistics, KernelDistance, frechet_distance, kernel_distance
from dpm_scales.metrics.features import EffLite0Features, FeatureNetwork, InceptionFeatures, pick_features
from dpm_scales.metrics.figures import (
    MEASURES,
    METRICS,
    FrechetMetric,
    KernelMetric,
    ManifoldMetric,
    compare,
    few_images,
    gather,
)
from dpm_scales.metrics.overlap import Manifolds, manifolds
from dpm_scales.metrics.scale_space import (
    average_grey,
    entropy_increments,
    image_variance,
    relative_entropy,
    reverse_entropy_bounds,
    step_entropy,
)

__all__ = [
    "MEASURES",
    "METRICS",
    "EffLite0Features",
    "FeatureNetwork",
    "FeatureSet",
    "FeatureStatistics",
    "FrechetMetric",
    "ImageMetric",
    "InceptionFeatures",
    "KernelDistance",
    "KernelMetric",
    "ManifoldMetric",
    "Manifolds",
    "Measure",
    "Metric",
    "Track",
    "average_grey",
    "compare",
    "entropy_increments",
    "few_images",
    "frechet_distance",
    "gather",
    "image_variance",
    "kernel_distance",
    "manifolds",
    "pick_features",
    "relative_entropy",
    "reverse_entropy_bounds",
    "step_entropy",
]
