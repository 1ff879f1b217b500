"""Interface of all data sets: training and validation images, uint8, with integer labels."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from dpm_scales.data.order import EpochOrder, Permuted
from dpm_scales.describe import Describable
from dpm_scales.errors import require

NO_LABEL = -1
"""Label of images without a label."""

FLIPPED = 0.5
"""Probability with which an image is mirrored: the first number of its generator is below it."""


class ImageDataset(Dataset[tuple[Tensor, int]], ABC):
    """Training or validation part of a source: items (image uint8 (C, H, W), label), all images of one size.

    Attributes:
        augmented: whether `get` draws from `rng`. If not, no generator is made, which would take as long as decoding a
            small image.
        mirrored: whether `get` uses `rng` for `maybe_flip` only. Images that are mirrored, or not augmented, can be
            kept decoded.
    """

    augmented: bool = True
    mirrored: bool = False

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def get(self, index: int, rng: np.random.Generator | None) -> tuple[Tensor, int]:
        """Return item `index`, augmented with draws from `rng`; with None, the plain, centred view."""

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self.get(index, None)

    def order(self, seed: int) -> EpochOrder:
        """Return the order of training: by default, a permutation of all images for each epoch."""
        return Permuted(len(self), seed)

    def pool(self, count: int) -> Sequence[int]:
        """Return the indices from which to sample `count` images: all, or at least `count` that are quick to read."""
        return range(len(self))

    def expect(self, indices: Sequence[int]) -> None:  # noqa: B027 - most images are read one by one
        """Prepare to read these items next: those of a batch, which may be read faster together."""

    def identity(self) -> list[Any] | None:
        """Return plain values that change whenever an image or label does; None if no such values are known."""
        return None

    def file_bytes(self) -> float:
        """Return the bytes of the files on this machine that all items are decoded from; infinity if unknown."""
        return math.inf


class ImageSource(Describable, ABC):
    """A data set, split into training and validation images of one size.

    Attributes:
        channels: 1 grey or 3 RGB.
        image_size: (H, W) in pixels.
        num_classes: number of labels, or None if the images have none (their label is then -1).
        class_names: one name for each label, or None.
        split_note: text that names the folders of both parts and the unused ones; empty if the split has no folders.
    """

    channels: int
    image_size: tuple[int, int]
    num_classes: int | None = None
    class_names: tuple[str, ...] | None = None
    split_note: str = ""

    def prepare(self) -> None:  # noqa: B027 - most sources have nothing to fetch
        """Fetch the files that `train` and `val` need; safe to call from several processes."""

    @abstractmethod
    def train(self) -> ImageDataset:
        """Return the training images, augmented if so configured."""

    @abstractmethod
    def val(self) -> ImageDataset:
        """Return the validation images, never augmented."""


class TensorImages(ImageDataset):
    """Images held in memory: `images` uint8 (N, C, H, W), `labels` int64 (N,) or None."""

    def __init__(self, images: Tensor, labels: Tensor | None = None, random_flip: bool = False) -> None:
        self.images = images
        self.labels = labels
        self.random_flip = self.augmented = self.mirrored = random_flip

    def __len__(self) -> int:
        return len(self.images)

    def file_bytes(self) -> float:
        return 0.0

    def get(self, index: int, rng: np.random.Generator | None) -> tuple[Tensor, int]:
        image = self.images[index]
        if self.random_flip:
            image = maybe_flip(image, rng)
        return image, NO_LABEL if self.labels is None else int(self.labels[index])


def maybe_flip(image: Tensor, rng: np.random.Generator | None) -> Tensor:
    """Return the image (C, H, W), mirrored left to right with probability 1/2; unchanged without `rng`."""
    return image.flip(-1) if rng is not None and rng.random() < FLIPPED else image


def split_indices(
    number: int, val_fraction: float, seed: int, labels: np.ndarray | None = None
) -> tuple[Tensor, Tensor]:
    """Return sorted training and validation indices below `number`, drawn with `seed`.

    Every label is split by the same fraction; if it is positive, at least one image of each label with two or more is
    held out.

    Raises:
        UserError: a fraction outside [0, 1).
    """
    require(0.0 <= val_fraction < 1.0, f"val_fraction={val_fraction}: allowed is 0 <= val_fraction < 1")
    rng = np.random.default_rng(seed)
    groups = np.zeros(number, dtype=np.int64) if labels is None else labels
    is_val = np.zeros(number, dtype=bool)
    for group in np.unique(groups):
        members = rng.permutation(np.flatnonzero(groups == group))
        held_out = round(val_fraction * len(members))
        if val_fraction > 0 and len(members) > 1:
            held_out = max(1, held_out)
        is_val[members[:held_out]] = True
    return torch.from_numpy(np.flatnonzero(~is_val)), torch.from_numpy(np.flatnonzero(is_val))
