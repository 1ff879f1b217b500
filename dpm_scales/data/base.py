"""What every data set offers: a training part and a validation part of uint8 images with integer labels."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from dpm_scales.errors import is_whole, require

NO_LABEL = -1
"""Label of images that have none."""


class ImageDataset(Dataset[tuple[Tensor, int]], ABC):
    """One part of a source: items are (image uint8 (C, H, W), label), all of one size."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def get(self, index: int, rng: np.random.Generator | None) -> tuple[Tensor, int]:
        """Item `index`; `rng` drives the augmentation, None asks for the plain, centred view."""

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self.get(index, None)


class ImageSource(ABC):
    """A data set, split into training and validation images of one size.

    Attributes:
        channels: 1 grey or 3 RGB.
        image_size: (H, W) in pixels.
        num_classes: number of labels, or None if the images have none (their label is then -1).
        class_names: one name for each label, or None.
        split_note: which folders the two parts are, and which are not used; empty where no folders divide them.
    """

    channels: int
    image_size: tuple[int, int]
    num_classes: int | None = None
    class_names: tuple[str, ...] | None = None
    split_note: str = ""

    def prepare(self) -> None:  # noqa: B027 - most sources have nothing to fetch
        """Fetch what must be on disk before `train` and `val`; safe to call from several processes."""

    @abstractmethod
    def train(self) -> ImageDataset:
        """Images to learn from, augmented if the source was asked to."""

    @abstractmethod
    def val(self) -> ImageDataset:
        """Images held out; never augmented."""


class TensorImages(ImageDataset):
    """Images held in memory: `images` uint8 (N, C, H, W), `labels` int64 (N,) or None."""

    def __init__(self, images: Tensor, labels: Tensor | None = None, random_flip: bool = False) -> None:
        self.images = images
        self.labels = labels
        self.random_flip = random_flip

    def __len__(self) -> int:
        return len(self.images)

    def get(self, index: int, rng: np.random.Generator | None) -> tuple[Tensor, int]:
        image = self.images[index]
        if self.random_flip:
            image = maybe_flip(image, rng)
        return image, NO_LABEL if self.labels is None else int(self.labels[index])


def maybe_flip(image: Tensor, rng: np.random.Generator | None) -> Tensor:
    """Mirror (C, H, W) left to right in half of the draws."""
    return image.flip(-1) if rng is not None and rng.random() < 0.5 else image


def split_indices(
    number: int, val_fraction: float, seed: int, labels: np.ndarray | None = None
) -> tuple[Tensor, Tensor]:
    """Sorted training and validation indices below `number`: the same fraction of every label, drawn with `seed`.

    Where there are two images or more and the fraction is positive, at least one is held out.

    Raises:
        UserError: a fraction outside of [0, 1).
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


def size_pair(value: int | Sequence[int], key: str) -> tuple[int, int]:
    """(H, W) in pixels from one number (square) or two.

    Raises:
        UserError: neither, or not positive; `key` is the name in the message.
    """
    pair = (value, value) if isinstance(value, int) else tuple(value) if not isinstance(value, str) else ()
    valid = len(pair) == 2 and all(is_whole(side, 1) for side in pair)
    require(valid, f"{key}={value}: allowed is a number of pixels >= 1 or [height, width]")
    return pair[0], pair[1]
