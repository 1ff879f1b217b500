"""Two sets of images compared in the features of one network: metrics by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dpm_scales.errors import UserError, require, require_choice
from dpm_scales.metrics.distances import FeatureStatistics, frechet_distance, kernel_distance, kernel_subsets
from dpm_scales.metrics.features import FeatureNetwork
from dpm_scales.metrics.overlap import DENSITY_NEIGHBOURS, PRECISION_NEIGHBOURS, manifolds

Array = NDArray[Any]

Track = Callable[[str, int], Callable[[int], None]]

MEASURES = ("frechet", "kernel", "manifolds")
"""Kinds of measures; all but the first need the features of all images at once."""

FEWEST_NEIGHBOURS = 1 + max(PRECISION_NEIGHBOURS, DENSITY_NEIGHBOURS)
"""Least number of images of each set for "manifolds"."""


@dataclass(frozen=True)
class FeatureSet:
    """Features of a set of images.

    Attributes:
        statistics: their number, mean and covariance.
        rows: float32 (n, d), or None where they were not kept.
    """

    statistics: FeatureStatistics
    rows: Array | None

    @property
    def number(self) -> int:
        """Number of images."""
        return self.statistics.number


@dataclass(frozen=True)
class Measure:
    """One metric.

    Attributes:
        value: its value.
        std_error: its standard error, where it is known.
        neighbours: k of the metrics of nearest neighbours.
        images: numbers of real and fake images used, where these are not all.
        better: "lower" or "higher".
    """

    value: float
    better: str
    std_error: float | None = None
    neighbours: int | None = None
    images: tuple[int, int] | None = None


def check_measures(measures: Any) -> tuple[str, ...]:
    """Return a list of `MEASURES` as a tuple. Raises UserError for anything else."""
    require(isinstance(measures, list | tuple) and len(measures) > 0, f"measures must be a list of {MEASURES}")
    for name in measures:
        require_choice("measure", name, MEASURES)
    return tuple(measures)


def check_numbers(measures: Sequence[str], *numbers: int) -> None:
    """Raise UserError for sets of images that are too small for these measures."""
    if "manifolds" in measures and min(numbers) < FEWEST_NEIGHBOURS:
        found = " and ".join(map(str, numbers))
        raise UserError(
            f"nearest neighbours need {FEWEST_NEIGHBOURS} images or more in each set, got {found}; give more, or leave "
            "manifolds out of measures"
        )


def few_images(number: int, what: str, network: FeatureNetwork) -> str | None:
    """Return a line that says so if a Fréchet distance of `number` images (`what` of them) is too high, else None."""
    if number > network.dim:
        return None
    return (
        f"{number} {what} for {network.dim} features: their covariance is singular and {network.distance_name} too "
        f"high; compare it with that of as many images alone, or take {network.kernel_name}"
    )


def needs_rows(measures: Sequence[str]) -> bool:
    """Return whether these measures need more of a set than its statistics."""
    return any(name != "frechet" for name in measures)


def gather(
    network: FeatureNetwork,
    batches: Iterable[Tensor],
    keep_rows: bool = True,
    on_images: Callable[[int], None] | None = None,
) -> FeatureSet:
    """Return features of uint8 images (B, 1 or 3, H, W) given in batches.

    Args:
        keep_rows: keep all of them; without, memory is of order d^2 whatever the number of images.
        on_images: called with the number of images of each part that the network has processed.
    """
    statistics = FeatureStatistics()
    rows: list[Array] = []
    for images in batches:
        parts = []
        for part in images.split(network.batch_size):  # as the network does, to report progress
            parts.append(network(part).cpu())
            if on_images is not None:
                on_images(len(part))
        features = torch.cat(parts)
        statistics.update(features)
        if keep_rows:
            rows.append(features.numpy())
    return FeatureSet(statistics, np.concatenate(rows) if rows else None)


def compare(
    real: FeatureSet,
    fake: FeatureSet,
    network: FeatureNetwork,
    measures: Sequence[str] = MEASURES,
    manifold_images: int | None = None,
    track: Track | None = None,
) -> dict[str, Measure]:
    """Return the metrics of two sets by name.

    Args:
        real, fake: features by `network`; with `rows` unless `measures` is ("frechet",).
        manifold_images: at most so many images of each set, spread evenly, for the measures of nearest neighbours,
            whose time grows with the square of the number; None for all.
        track: called with the name of each part and its number of steps; returns a callback for the number done.

    Raises: UserError for too few images, or an unknown measure.
    """
    measures = check_measures(measures)
    begin = track or (lambda name, steps: lambda count: None)
    metrics: dict[str, Measure] = {}
    if "frechet" in measures:
        advance = begin("Fréchet distance", 1)
        metrics[network.distance_name] = Measure(frechet_distance(real.statistics, fake.statistics), "lower")
        advance(1)
    if not needs_rows(measures):
        return metrics
    if real.rows is None or fake.rows is None:
        raise ValueError("measures other than frechet need the features of all images")
    if "kernel" in measures:
        advance = begin("kernel distance", kernel_subsets(fake.number, real.number))
        value, error = kernel_distance(fake.rows, real.rows, on_subset=advance)
        metrics[network.kernel_name] = Measure(value, "lower", std_error=error)
    if "manifolds" in measures:
        sets = [spread_evenly(rows, manifold_images) for rows in (real.rows, fake.rows)]
        fewer = len(sets[0]) < real.number or len(sets[1]) < fake.number
        images = (len(sets[0]), len(sets[1])) if fewer else None
        advance = begin("nearest neighbours", len(sets[0]) + 2 * len(sets[1]))
        overlap = manifolds(sets[0], sets[1], on_rows=advance)
        for name, value in overlap._asdict().items():
            k = PRECISION_NEIGHBOURS if name in ("precision", "recall") else DENSITY_NEIGHBOURS
            metrics[name] = Measure(value, "higher", neighbours=k, images=images)
    return metrics


def spread_evenly(rows: Array, limit: int | None) -> Array:
    """Return `limit` of the rows, evenly spread over them, or all where there are no more."""
    if limit is None or len(rows) <= limit:
        return rows
    return rows[np.arange(limit) * len(rows) // limit]


def memory_needed(measures: Sequence[str], numbers: Sequence[int], dim: int, manifold_images: int | None) -> int:
    """Return the bytes that the measures of sets of so many images hold at least, at once."""
    if not needs_rows(measures):
        return 0
    compared = numbers if manifold_images is None else [min(number, manifold_images) for number in numbers]
    return dim * (4 * sum(numbers) + (8 * sum(compared) if "manifolds" in measures else 0))
