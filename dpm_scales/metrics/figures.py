"""Compare two sets of images in the features of a network by named metrics."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dpm_scales.errors import UserError, require, require_choice, require_number
from dpm_scales.metrics.base import Array, Extractor, FeatureSet, ImageMetric, Measure, Metric, Track
from dpm_scales.metrics.distances import FeatureStatistics, frechet_distance, kernel_distance, kernel_subsets
from dpm_scales.metrics.features import FeatureNetwork
from dpm_scales.metrics.overlap import DENSITY_NEIGHBOURS, PRECISION_NEIGHBOURS, Manifolds, manifolds

FEWEST_NEIGHBOURS = 1 + max(PRECISION_NEIGHBOURS, DENSITY_NEIGHBOURS)
"""Smallest number of images in each set for metrics of nearest neighbours."""


class FrechetMetric(Metric):
    """Fréchet distance of Gaussians fitted to the features, see `frechet_distance`."""

    name = "frechet"
    needs_rows = False

    def names(self, network: Extractor) -> tuple[str, ...]:
        return (getattr(network, "distance_name", self.name),)

    def compare(self, real: FeatureSet, fake: FeatureSet, track: Track) -> Sequence[Measure]:
        advance = track("Fréchet distance", 1)
        measures = [Measure(frechet_distance(real.statistics, fake.statistics), "lower")]
        advance(1)
        return measures


class KernelMetric(Metric):
    """Squared kernel distance (MMD) of the features with its standard error, see `kernel_distance`."""

    name = "kernel"

    def names(self, network: Extractor) -> tuple[str, ...]:
        return (getattr(network, "kernel_name", self.name),)

    def compare(self, real: FeatureSet, fake: FeatureSet, track: Track) -> Sequence[Measure]:
        assert real.rows is not None and fake.rows is not None
        advance = track("kernel distance", kernel_subsets(fake.number, real.number))
        value, error = kernel_distance(fake.rows, real.rows, on_subset=advance)
        return [Measure(value, "lower", std_error=error)]


class ManifoldMetric(Metric):
    """Precision, recall, density and coverage from nearest neighbours, see `manifolds`.

    Args:
        images: largest number of images used of each set, spread evenly, since time grows with its square; None for
            all.
    """

    name = "manifolds"
    fewest = FEWEST_NEIGHBOURS

    def __init__(self, images: int | None = None) -> None:
        if images is not None:
            require_number("manifold_images", images, FEWEST_NEIGHBOURS, whole=True)
        self.images = images

    def names(self, network: Extractor) -> tuple[str, ...]:
        return Manifolds._fields

    def memory(self, numbers: Sequence[int], dim: int) -> float:
        return 8 * dim * sum(number if self.images is None else min(number, self.images) for number in numbers)

    def compare(self, real: FeatureSet, fake: FeatureSet, track: Track) -> Sequence[Measure]:
        assert real.rows is not None and fake.rows is not None
        sets = [spread_evenly(rows, self.images) for rows in (real.rows, fake.rows)]
        fewer = len(sets[0]) < real.number or len(sets[1]) < fake.number
        images = (len(sets[0]), len(sets[1])) if fewer else None
        advance = track("nearest neighbours", len(sets[0]) + 2 * len(sets[1]))
        overlap = manifolds(sets[0], sets[1], on_rows=advance)
        neighbours = {"precision": PRECISION_NEIGHBOURS, "recall": PRECISION_NEIGHBOURS}
        return [
            Measure(value, "higher", neighbours=neighbours.get(name, DENSITY_NEIGHBOURS), images=images)
            for name, value in overlap._asdict().items()
        ]


METRICS: dict[str, type[Metric]] = {kind.name: kind for kind in (FrechetMetric, KernelMetric, ManifoldMetric)}
"""Metrics by name."""

MEASURES = tuple(METRICS)
"""Names of metrics; all but the first need the features of all images at once."""


def metric_of(name: Any, manifold_images: int | None = None) -> Metric:
    """Return the metric of a name in `METRICS`. Raises UserError for any other name."""
    require_choice("measure", name, METRICS)
    return ManifoldMetric(manifold_images) if METRICS[name] is ManifoldMetric else METRICS[name]()


def check_measures(measures: Any) -> tuple[Any, ...]:
    """Return a list of measures as a tuple. Raises UserError for anything else, or an empty list."""
    require(isinstance(measures, list | tuple) and len(measures) > 0, f"measures must be a list of {MEASURES}")
    return tuple(measures)


def check_numbers(metrics: Sequence[Metric], *numbers: int) -> None:
    """Raise UserError for sets of images that are too small for these metrics."""
    for metric in metrics:
        if min(numbers) < metric.fewest:
            found = " and ".join(map(str, numbers))
            raise UserError(
                f"{metric.name} needs {metric.fewest} images or more in each set, got {found}; give more, or leave "
                f"{metric.name} out of measures"
            )


def check_names(metrics: Sequence[Metric], network: FeatureNetwork | None) -> tuple[str, ...]:
    """Return the names of all values, in order. Raises UserError if two metrics use one name."""
    names = [name for metric in metrics for name in metric.names(_source(metric, network))]
    twice = sorted({name for name in names if names.count(name) > 1})
    require(not twice, f"measures: two of them are called {', '.join(twice)}; leave one out, or give it another name")
    return tuple(names)


def few_images(number: int, what: str, network: FeatureNetwork) -> str | None:
    """Return a warning if `number` images (called `what`) are too few for the Fréchet distance, otherwise None."""
    if number > network.dim:
        return None
    return (
        f"{number} {what} for {network.dim} features: their covariance is singular and {network.distance_name} too "
        f"high; compare it only with those of as many images, or take {network.kernel_name}"
    )


def needs_network(metrics: Sequence[Metric]) -> bool:
    """Return whether any of these metrics uses the features of a network."""
    return not all(isinstance(metric, ImageMetric) for metric in metrics)


def needs_rows(metrics: Sequence[Metric]) -> bool:
    """Return whether these metrics need more of a set than its statistics."""
    return any(metric.needs_rows for metric in metrics)


def extractors(metrics: Sequence[Metric], network: FeatureNetwork | None) -> list[Extractor]:
    """Return the extractors that these metrics need: the network, if any uses it, and all image metrics."""
    shared: list[Extractor] = [network] if network is not None and needs_network(metrics) else []
    return [*shared, *(metric for metric in metrics if isinstance(metric, ImageMetric))]


def _source(metric: Metric, network: FeatureNetwork | None) -> Extractor:
    """Return the extractor of a metric. Raises ValueError if it needs a network and there is none."""
    if isinstance(metric, ImageMetric):
        return metric
    if network is None:
        raise ValueError(f"{metric.name} needs a feature network")
    return network


def gather(
    network: Extractor,
    batches: Iterable[Tensor],
    keep_rows: bool = True,
    on_images: Callable[[float], None] | None = None,
) -> FeatureSet:
    """Return features of uint8 images (B, 1 or 3, H, W) given in batches; see `gather_all`."""
    return gather_all([network], batches, keep_rows, on_images)[0]


def gather_all(
    sources: Sequence[Extractor],
    batches: Iterable[Tensor],
    keep_rows: bool = True,
    on_images: Callable[[float], None] | None = None,
) -> list[FeatureSet]:
    """Return the features of uint8 images (B, 1 or 3, H, W) by each of several extractors, reading the images once.

    Args:
        keep_rows: whether to keep the features of all images; if not, memory is O(d^2) whatever their number.
        on_images: called after each part with its number of images, divided by the number of extractors.

    Raises: UserError for features that are not finite.
    """
    statistics = [FeatureStatistics() for _ in sources]
    rows: list[list[Array]] = [[] for _ in sources]
    for images in batches:
        for index, source in enumerate(sources):
            parts = []
            for part in images.split(source.batch_size):  # as a network does, but here to report progress
                parts.append(source(part).cpu())
                if on_images is not None:
                    on_images(len(part) / len(sources))
            features = torch.cat(parts)
            ok = bool(features.isfinite().all())
            require(ok, f"{source.name} describes an image by numbers that are not finite; leave it out, or mend it")
            statistics[index].update(features)
            if keep_rows:
                rows[index].append(features.numpy())
    kept = (np.concatenate(one) if one else None for one in rows)
    return [FeatureSet(own, one) for own, one in zip(statistics, kept, strict=True)]


def compare(
    real: FeatureSet | Sequence[FeatureSet],
    fake: FeatureSet | Sequence[FeatureSet],
    network: FeatureNetwork | None,
    measures: Sequence[str | Metric] = MEASURES,
    manifold_images: int | None = None,
    track: Track | None = None,
) -> dict[str, Measure]:
    """Return the metrics of two sets by name.

    Args:
        real, fake: features by `network`; with `rows` if any metric needs them. With image metrics, a list of the
            features by each of `extractors(measures, network)`.
        measures: names in `METRICS`, or metrics.
        manifold_images: the argument `images` of `ManifoldMetric` if that is given by name.
        track: see `Track`.

    Raises: UserError for too few images, an unknown measure, or a metric whose values don't match its `names`.
    """
    named = dict.fromkeys(check_measures(measures))
    metrics = [one if isinstance(one, Metric) else metric_of(one, manifold_images) for one in named]
    metrics.sort(key=lambda metric: MEASURES.index(metric.name) if metric.name in METRICS else len(METRICS))
    begin = track or (lambda name, steps: lambda count: None)
    check_names(metrics, network)
    known = [[one] if isinstance(one, FeatureSet) else list(one) for one in (real, fake)]
    sources = {id(source): index for index, source in enumerate(extractors(metrics, network))}
    values: dict[str, Measure] = {}
    for metric in metrics:
        source = _source(metric, network)
        sets = [features[sources[id(source)]] for features in known]
        if metric.needs_rows and any(one.rows is None for one in sets):
            raise ValueError(f"{metric.name} needs the features of all images")
        found = list(metric.compare(sets[0], sets[1], begin))
        names = metric.names(source)
        kind = f"{type(metric).__module__}.{type(metric).__qualname__}"
        ok = len(found) == len(names) and all(isinstance(one, Measure) for one in found)
        require(ok, f"{kind}.compare must return a Measure for each of {', '.join(names)}, got {found!r:.100}")
        values |= dict(zip(names, found, strict=True))
    return values


def spread_evenly(rows: Array, limit: int | None) -> Array:
    """Return `limit` evenly spaced rows, or all if there are no more than that."""
    if limit is None or len(rows) <= limit:
        return rows
    return rows[np.arange(limit) * len(rows) // limit]


def memory_needed(metrics: Sequence[Metric], numbers: Sequence[int], network: FeatureNetwork | None) -> float:
    """Return a lower bound on the peak memory, in bytes, of the metrics of sets of these numbers of images."""
    if not needs_rows(metrics):
        return 0
    rows = sum(4 * sum(numbers) * source.dim for source in extractors(metrics, network))
    return rows + sum(metric.memory(numbers, _source(metric, network).dim) for metric in metrics)
