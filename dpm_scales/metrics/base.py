"""Interfaces of evaluation: extractors describe images by numbers, metrics compare two sets of images by them.

An extractor maps each image to `dim` numbers: a pretrained network (`FeatureNetwork`), or an `ImageMetric`, which
computes its own. Since images are described independently, they can come in batches of any size and be divided among
processes, and those of a reference can be described once and cached. A metric compares the numbers of two sets.
"""

from __future__ import annotations

import hashlib
import inspect
import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from numpy.typing import NDArray
from torch import Tensor

from dpm_scales.errors import UserError, is_whole, require
from dpm_scales.metrics.distances import FeatureStatistics

Array = NDArray[Any]

Track = Callable[[str, int], Callable[[float], None]]
"""Begins a part of the work, given its name and number of steps; returns a callback for the number of steps done."""

_NAME = re.compile(r"[A-Za-z][\w.-]*", re.ASCII)


@dataclass(frozen=True)
class FeatureSet:
    """Features of a set of images.

    Attributes:
        statistics: their number, mean and covariance.
        rows: float32 (n, d), or None if they were not kept.
    """

    statistics: FeatureStatistics
    rows: Array | None

    @property
    def number(self) -> int:
        """Return the number of images."""
        return self.statistics.number


@dataclass(frozen=True)
class Measure:
    """One value of a metric.

    Attributes:
        value: the value.
        better: which values are better, "lower" or "higher".
        std_error: its standard error, if known.
        neighbours: k, for metrics based on nearest neighbours.
        images: numbers of real and fake images used, if not all.
    """

    value: float
    better: Literal["lower", "higher"]
    std_error: float | None = None
    neighbours: int | None = None
    images: tuple[int, int] | None = None


class Extractor(Protocol):
    """A map from each image to numbers.

    Attributes:
        name: its name in results.
        dim: number of values per image.
        hash: SHA-256 of its weights, in hexadecimal digits; "" without weights.
        resizing: description of how images are resized.
        batch_size: number of images that it processes at once.
        options: arguments of its constructor, as given in a config.
    """

    name: str
    dim: int
    batch_size: int
    options: Mapping[str, Any]

    @property
    def hash(self) -> str: ...
    @property
    def resizing(self) -> str: ...

    def __call__(self, images: Tensor) -> Tensor:
        """Return float32 (B, dim) of uint8 images (B, 1 or 3, H, W)."""


class Metric(ABC):
    """A comparison of a set of images with real ones by their features.

    The features are those of the chosen feature network, float32. A metric that computes its own numbers from images is
    an `ImageMetric`.

    Attributes:
        name: name of its value in tables, in `evaluation.json` (`figures`) and, in lower case, in `metrics.csv`
            (`eval/…`).
        needs_rows: whether it needs the features of all images (`FeatureSet.rows`), or only their number, mean and
            covariance (`FeatureSet.statistics`), whose memory does not grow with the number of images.
        fewest: smallest number of images in each set; fewer are refused before anything is sampled.
        options: arguments of its constructor, as given in a config.
    """

    name: str
    needs_rows: bool = True
    fewest: int = 2
    options: Mapping[str, Any] = {}

    def names(self, network: Extractor) -> tuple[str, ...]:
        """Return the names of its values for the features of `network`, before anything is measured."""
        return (self.name,)

    def memory(self, numbers: Sequence[int], dim: int) -> float:
        """Return the bytes that it needs besides the features, for sets of these numbers of images."""
        return 0

    @abstractmethod
    def compare(self, real: FeatureSet, fake: FeatureSet, track: Track) -> Sequence[Measure]:
        """Return one `Measure` for each of `names`, in their order.

        Args:
            real, fake: features of the real images and of those to evaluate; with `rows` if `needs_rows`.
            track: reports the progress of long work, ``advance = track("what", steps)``, ``advance(1)``; can be
                ignored.
        """


class ImageMetric(Metric):
    """A comparison of a set of images with real ones by numbers computed from the images themselves.

    `compare` gets the numbers of `describe` in place of a network's features. They are computed for each image
    independently, so that images can be divided among processes and those of the reference can be cached.

    Attributes:
        dim: number of values per image.
        batch_size: largest number of images passed to `describe` at once.
    """

    dim: int = 1
    batch_size: int = 64
    hash = ""
    resizing = "none"

    @abstractmethod
    def describe(self, images: Tensor) -> Tensor:
        """Return finite floats (B, dim), on any device, of uint8 images (B, C, H, W), C = 1 (grey) or 3 (RGB).

        Images have their original size, which may differ between batches, and may be on any device. The numbers of an
        image must not depend on the rest of its batch.
        """

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Return the result of `describe` as float32 (B, dim). Raises UserError if it has another shape."""
        parts = images.split(self.batch_size)
        return torch.cat([as_described(self, "describe", self.describe(part), len(part)) for part in parts])


def as_described(extractor: Extractor, method: str, values: Any, number: int) -> Tensor:
    """Return the result of an extractor's method for `number` images as float32 (number, dim).

    Raises: UserError for anything but floats of this shape.
    """
    fits = isinstance(values, Tensor) and values.shape == (number, extractor.dim) and values.is_floating_point()
    if not fits:
        found = f"{values.dtype} {tuple(values.shape)}" if isinstance(values, Tensor) else f"a {type(values).__name__}"
        raise UserError(
            f"{_class_of(extractor)}.{method} returned {found} for {number} images; it must return floats (B, dim), "
            f"here {(number, extractor.dim)}"
        )
    described: Tensor = values.float()
    return described


def check_attributes(value: object, attributes: Sequence[str]) -> None:
    """Raise UserError unless a custom class has set its attributes: a name, and whole numbers above 0."""
    what = _class_of(value)
    for key in attributes:
        found = getattr(value, key, None)
        if key == "name":
            ok = isinstance(found, str) and bool(_NAME.fullmatch(found))
            require(ok, f"{what}: name must be a word of letters, digits, '_', '-' and '.', got {found!r}")
        else:
            require(is_whole(found, 1), f"{what}: {key} must be a whole number > 0, got {found!r}")


def identity_of(extractor: Extractor) -> list[Any]:
    """Return a JSON-compatible list of all that determines the numbers that an extractor computes.

    The list holds name, weights and resizing; for a class from outside this package also the class, the source of its
    module and its options.
    """
    identity: list[Any] = [extractor.name, extractor.hash, extractor.resizing]
    kind = type(extractor)
    if kind.__module__.partition(".")[0] == "dpm_scales":
        return identity
    try:
        source = inspect.getsource(sys.modules[kind.__module__])
    except (KeyError, OSError, TypeError):  # defined in an interpreter, or compiled
        source = ""
    return [*identity, _class_of(extractor), hashlib.sha256(source.encode()).hexdigest(), dict(extractor.options)]


def _class_of(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"
