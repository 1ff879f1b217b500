"""Whole images at full resolution, as the studies want them: a folder in its order, or scikit-image's free photos."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dpm_scales.data.files import ImageStore, inspect_images, open_store
from dpm_scales.data.sources import Photos
from dpm_scales.errors import UserError
from dpm_scales.images import load_image

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
        with self.store.open(name) as file:
            return load_image(file, channels=3, name=self.store.describe(name))

    def batches(self, batch_size: int) -> Iterator[list[int]]:
        """Numbers of neighbours of one size, at most `batch_size` together."""
        batch: list[int] = []
        for index, size in enumerate(self.sizes):
            if batch and (len(batch) == batch_size or size != self.sizes[batch[0]]):
                yield batch
                batch = []
            batch.append(index)
        if batch:
            yield batch


def image_set(place: str, limit: int | None = None) -> ImageSet:
    """The images of a folder or .zip file, or scikit-image's with "photos".

    Raises: UserError where there are none, or where one can't be read: a figure over a part of a set is not the set's.
    """
    if place == PHOTOS:
        names = list(Photos.PHOTOS)[:limit]
        shapes = [_photo(name).shape for name in names]
        return ImageSet(names, [(int(s[1]), int(s[2])) for s in shapes], None)
    store = open_store(place)
    names = store.names[:limit]
    sizes, bad = inspect_images(store, names, full=False)
    if bad:
        name, reason = next(iter(bad.items()))
        raise UserError(
            f"{len(bad)} of {len(names)} images can't be read, the first is {store.describe(name)} ({reason}); "
            "replace or remove them"
        )
    return ImageSet(names, [sizes[name] for name in names], store)


def _photo(name: str) -> Tensor:
    from skimage import data

    return torch.from_numpy(np.ascontiguousarray(getattr(data, name)().transpose(2, 0, 1)))
