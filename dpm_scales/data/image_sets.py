"""Images in a fixed order without a split: files, arrays, folders of whole photos."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL
import torch
from torch import Tensor

from dpm_scales.data import ImageDataset
from dpm_scales.data.base import ImageSource
from dpm_scales.data.files import ImageStore, batches_of_one_size, open_store, require_readable
from dpm_scales.data.sources import Photos
from dpm_scales.errors import UserError, require
from dpm_scales.images import load_image

PHOTOS = "photos"


@dataclass(frozen=True)
class NumberedImages:
    """Images by index, with their names and upright sizes (H, W)."""

    names: list[str]
    sizes: list[tuple[int, int]]
    store: ImageStore | None

    def load(self, index: int) -> Tensor:
        """Return image `index` as RGB uint8 ``(3, H, W)``. Raises UserError for an unreadable file."""
        name = self.names[index]
        if self.store is None:
            return _photo(name)
        return self.store.load(name, channels=3)

    def digest(self, index: int) -> str:
        """Return the hexadecimal SHA-256 of an image's file, or of its pixels if it has no file."""
        if self.store is None:
            return hashlib.sha256(self.load(index).numpy().tobytes()).hexdigest()
        with self.store.open(self.names[index]) as file:
            return hashlib.sha256(file.read()).hexdigest()

    def batches(self, batch_size: int) -> Iterator[list[int]]:
        """Yield the indices of consecutive images of one size, at most `batch_size` at a time."""
        return batches_of_one_size(self.sizes, batch_size)


def numbered_images(place: str, limit: int | None = None) -> NumberedImages:
    """Return the images of a folder or .zip file, or with "photos" those of scikit-image.

    Raises: UserError if there are none, or if one cannot be read.
    """
    if place == PHOTOS:
        names = list(Photos.PHOTOS)[:limit]
        shapes = [_photo(name).shape for name in names]
        return NumberedImages(names, [(int(s[1]), int(s[2])) for s in shapes], None)
    store = open_store(place)
    names = store.names[:limit]
    sizes = require_readable(store, names)
    return NumberedImages(names, [sizes[name] for name in names], store)


def _photo(name: str) -> Tensor:
    from skimage import data

    return torch.from_numpy(np.ascontiguousarray(getattr(data, name)().transpose(2, 0, 1)))


ARRAYS = (".npy", ".npz")

READERS = 4  # number of threads that decode files


class ImageSet(ABC):
    """Images in a fixed order.

    Attributes:
        source: description of their origin.
        sizes: the sizes (H, W) that occur.
        num_classes, class_names: as in `ImageSource`; None without labels.
    """

    source: str
    sizes: tuple[tuple[int, int], ...]
    num_classes: int | None = None
    class_names: tuple[str, ...] | None = None
    _digest: str | None = None

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def batches(self, batch_size: int) -> Iterator[Tensor]:
        """Yield uint8 batches (B, C, H, W) in order, B <= `batch_size`, each of one image size."""

    def labelled(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the same batches with their labels, int64 (B,). Raises UserError if there are no labels."""
        raise UserError(f"{self.source}: these images have no labels")

    def digest(self) -> str:
        """Return the hexadecimal SHA-256 of the content, which changes with any image and with the order."""
        if self._digest is None:
            self._digest = self._hash()
        return self._digest

    @abstractmethod
    def _hash(self) -> str: ...


class FileImageSet(ImageSet):
    """Image files, decoded as RGB: all, or `limit` of them, evenly spaced in the sorted names.

    Raises: UserError if one cannot be read.
    """

    def __init__(self, store: ImageStore, limit: int | None = None) -> None:
        names = list(store.names)
        if any(Path(name).stem.isdigit() for name in names):
            names = [name for name in names if name not in SHEETS]
        self._names = [names[i] for i in _spread(len(names), limit)]
        self._store, self.source = store, str(store.root)
        self._size_of = require_readable(store, self._names)
        self.sizes = tuple(sorted(set(self._size_of.values())))

    def __len__(self) -> int:
        return len(self._names)

    def batches(self, batch_size: int) -> Iterator[Tensor]:
        sizes = [self._size_of[name] for name in self._names]
        with ThreadPoolExecutor(READERS) as pool:
            for batch in batches_of_one_size(sizes, batch_size):
                yield torch.stack(list(pool.map(self._load, [self._names[i] for i in batch])))

    def _hash(self) -> str:
        total = hashlib.sha256(f"files {PIL.__version__}".encode())  # decoders differ in the last bit
        for name in self._names:
            with self._store.open(name) as file:
                total.update(hashlib.sha256(file.read()).digest())
        return total.hexdigest()

    def _load(self, name: str) -> Tensor:
        return self._store.load(name, channels=3)


class DataImageSet(ImageSet):
    """Parts of a data set without augmentation: all images, or `limit` of them, evenly spaced."""

    def __init__(self, data: ImageSource, parts: Sequence[ImageDataset], source: str, limit: int | None = None) -> None:
        every = [(part, i) for part in parts for i in range(len(part))]
        self._images = [every[i] for i in _spread(len(every), limit)]
        self.source, self.num_classes, self.class_names = source, data.num_classes, data.class_names
        size = tuple(self._load(0).shape[1:]) if self._images else (0, 0)
        self.sizes = ((size[0], size[1]),)

    def __len__(self) -> int:
        return len(self._images)

    def batches(self, batch_size: int) -> Iterator[Tensor]:
        for start in range(0, len(self), batch_size):
            yield torch.stack([self._load(i) for i in range(start, min(start + batch_size, len(self)))])

    def labelled(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        require(self.num_classes is not None, f"{self.source}: these images have no labels")
        for start in range(0, len(self), batch_size):
            items = [part[place] for part, place in self._images[start : start + batch_size]]
            yield torch.stack([image for image, _ in items]), torch.tensor([label for _, label in items])

    def _hash(self) -> str:
        total = hashlib.sha256(b"pixels")
        for index in range(len(self)):
            image = self._load(index)
            total.update(hashlib.sha256(str(tuple(image.shape)).encode() + image.numpy().tobytes()).digest())
        return total.hexdigest()

    def _load(self, index: int) -> Tensor:
        part, place = self._images[index]
        return part[place][0]


def read_images(place: str, channels: int) -> tuple[list[str], Tensor]:
    """Return names and images, uint8 ``(N, C, H, W)``, of one file or, in order of names, of a folder or .zip file.

    Raises: UserError, naming the file, for an unreadable file, another number of channels, or mixed sizes.
    """
    path = Path(place)
    if path.is_dir() or path.suffix.lower() == ".zip":
        store = open_store(place)
        images = [(store.describe(name), store.load(name)) for name in store.names]
    else:
        images = [(place, load_image(place))]
    kinds, (first, like) = {1: "grey", 3: "RGB"}, images[0]
    for name, image in images:
        require(
            len(image) == channels,
            f"{name} is {kinds[len(image)]}, and this model draws {kinds[channels]} images; convert it",
        )
        require(
            image.shape == like.shape,
            f"{name} has {size_of(image)} pixels, {first} {size_of(like)} (height x width); one run takes one size",
        )
    return [name for name, _ in images], torch.stack([image for _, image in images])


def size_of(image: Tensor) -> str:
    return f"{image.shape[-2]}x{image.shape[-1]}"


def _spread(count: int, limit: int | None) -> list[int]:
    """Return the indices of `limit` of `count` images, evenly spaced, or of all."""
    if limit is None or limit >= count:
        return list(range(count))
    return [i * count // limit for i in range(limit)]


SHEETS = ("grid.png", "comparison.png", "trajectory.png", "trajectory.gif", "film.gif")
"""Names of the overview images that `sample.py` writes beside its numbered images."""
