"""Whole images at full resolution, as the studies want them: a folder in its order, or scikit-image's free photos."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dpm_scales.data.files import ImageStore, batches_of_one_size, open_store, require_readable
from dpm_scales.data.sources import Photos

PHOTOS = "photos"


@dataclass(frozen=True)
class ImageSet:
    """Images by number: their names, and their upright sizes (H, W)."""

    names: list[str]
    sizes: list[tuple[int, int]]
    store: ImageStore | None

    def load(self, index: int) -> Tensor:
        """RGB uint8 ``(3, H, W)``. Raises UserError for an unreadable file."""
        name = self.names[index]
        if self.store is None:
            return _photo(name)
        return self.store.load(name, channels=3)

    def digest(self, index: int) -> str:
        """Return the SHA-256 of an image's file, or of the pixels of one without a file, in hexadecimal digits."""
        if self.store is None:
            return hashlib.sha256(self.load(index).numpy().tobytes()).hexdigest()
        with self.store.open(self.names[index]) as file:
            return hashlib.sha256(file.read()).hexdigest()

    def batches(self, batch_size: int) -> Iterator[list[int]]:
        """Numbers of neighbours of one size, at most `batch_size` together."""
        return batches_of_one_size(self.sizes, batch_size)


def image_set(place: str, limit: int | None = None) -> ImageSet:
    """The images of a folder or .zip file, or scikit-image's with "photos".

    Raises: UserError where there are none, or where one can't be read.
    """
    if place == PHOTOS:
        names = list(Photos.PHOTOS)[:limit]
        shapes = [_photo(name).shape for name in names]
        return ImageSet(names, [(int(s[1]), int(s[2])) for s in shapes], None)
    store = open_store(place)
    names = store.names[:limit]
    sizes = require_readable(store, names)
    return ImageSet(names, [sizes[name] for name in names], store)


def _photo(name: str) -> Tensor:
    from skimage import data

    return torch.from_numpy(np.ascontiguousarray(getattr(data, name)().transpose(2, 0, 1)))
