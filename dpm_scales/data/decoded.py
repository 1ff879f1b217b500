"""Images that are decoded once: kept in a file that all processes map into memory, or on the device.

Both keep the plain view of each image, `get(index, None)`, and mirror it as the images themselves would be, so that
batches are identical to the byte. The file holds, for N images of P bytes,

    N × (CRC-32 of pixels and label, label), 8 bytes each; N × P bytes of pixels

and is filled as images are requested, by any number of processes. A record whose checksum does not match counts as
missing, and the image is decoded again. So a killed process or a power failure leaves no wrong image.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import signal
import struct
import zlib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dpm_scales.data.base import FLIPPED, ImageDataset, TensorImages, maybe_flip
from dpm_scales.data.draws import first_draws
from dpm_scales.data.order import EpochOrder
from dpm_scales.data.replaced import ReplacedImages
from dpm_scales.errors import UserError, require
from dpm_scales.memory import available_memory, require_memory
from dpm_scales.progress import Report
from dpm_scales.storage import open_sized

DECODED = "decoded"
"""Folder of these files in the cache of shards."""

VERSION = 1
"""Version of the file; increase it when the same images give different bytes."""

_RECORD = struct.Struct("<Ii")
FREE_SHARE = 0.25
"""Largest share of a device's free memory for images kept there by default."""

QUICK_BYTES = 2**30
"""Largest size of the files of images that are decoded at the start by default: some 20 seconds of one process."""

_LOADED = 256  # images brought to the device at a time


def ignore_interrupts(worker: int) -> None:
    """Ignore Ctrl-C, which reaches every process of a terminal; the training process stops its loaders."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _is_keepable(images: ImageDataset) -> bool:
    """Return whether `get(index, rng)` does no more than mirror `get(index, None)`."""
    return images.mirrored or not images.augmented


def require_keepable(images: ImageDataset, option: str) -> None:
    """Raise UserError if `get(index, rng)` does more than mirror `get(index, None)`."""
    other = "and these are cropped, or changed otherwise, at random; set data.random_crop=false"
    require(_is_keepable(images), f"{option} keeps one view of each image, {other}")


class DecodedImages(ImageDataset):
    """Images of files, decoded on first access and kept in a file.

    Args:
        images: images with an `identity`.
        shape: (C, H, W) of each image.
        folder: folder of the file, which is named after the identity.

    Raises:
        UserError: images without an identity, or cropped at random; a full disk.
    """

    def __init__(self, images: ImageDataset, shape: tuple[int, int, int], folder: Path) -> None:
        require_keepable(images, "data.decoded=true")
        identity = images.identity()
        kinds = "files that are read by number, as by data=folder, data=webdataset and data=hf data.streaming=false"
        if identity is None or not isinstance(images, ReplacedImages):
            raise UserError(f"data.decoded=true is for images of {kinds}; leave it out")
        self.images, self.shape = images, shape
        self.augmented, self.mirrored = images.augmented, images.mirrored
        self._bytes = math.prod(shape)
        made_of = json.dumps([VERSION, PIL.__version__, list(shape), len(images), identity])
        self.path = folder / f"{hashlib.sha256(made_of.encode(errors='surrogateescape')).hexdigest()}.images"
        self._file, self._map = -1, memoryview(b"")
        self._open()

    def __len__(self) -> int:
        return len(self.images)

    def order(self, seed: int) -> EpochOrder:
        return self.images.order(seed)

    def pool(self, count: int) -> Sequence[int]:
        return self.images.pool(count)

    def file_bytes(self) -> float:
        return self.images.file_bytes()

    def expect(self, indices: Sequence[int]) -> None:
        self.images.expect([index for index in indices if self._kept(index) is None])

    def get(self, index: int, rng: np.random.Generator | None) -> tuple[Tensor, int]:
        found = self._kept(index)
        if found is None:
            found = self.images.get(index, None)
            if not self.images.is_replaced(index):
                self._keep(index, *found)
        image, label = found
        return (maybe_flip(image, rng) if self.mirrored else image), label

    def _open(self) -> None:
        size = len(self) * (_RECORD.size + self._bytes)
        self._file = open_sized(self.path, size)
        self._map = memoryview(mmap.mmap(self._file, size, access=mmap.ACCESS_READ))

    def _place(self, index: int) -> int:
        return len(self) * _RECORD.size + index * self._bytes

    def _kept(self, index: int) -> tuple[Tensor, int] | None:
        if self._file < 0:
            self._open()
        checksum, label = _RECORD.unpack_from(self._map, index * _RECORD.size)
        if checksum == 0:
            return None
        start = self._place(index)
        pixels = np.frombuffer(self._map[start : start + self._bytes], np.uint8).reshape(self.shape).copy()
        return (torch.from_numpy(pixels), label) if _checksum(pixels, label) == checksum else None

    def _keep(self, index: int, image: Tensor, label: int) -> None:
        pixels = image.contiguous().numpy()
        with suppress(OSError):  # the image is then decoded again next time
            _write(self._file, pixels.tobytes(), self._place(index))
            _write(self._file, _RECORD.pack(_checksum(pixels, label), label), index * _RECORD.size)

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_file": -1, "_map": b""}

    def __del__(self) -> None:
        if getattr(self, "_file", -1) >= 0:
            with suppress(OSError):
                os.close(self._file)


def _write(file: int, data: bytes, offset: int) -> None:
    if hasattr(os, "pwrite"):
        os.pwrite(file, data, offset)
    else:
        os.lseek(file, offset, os.SEEK_SET)
        os.write(file, data)


def _checksum(pixels: np.ndarray, label: int) -> int:
    """Return a checksum, never 0."""
    return zlib.crc32(pixels.data, label & 0xFFFFFFFF) or 1


class Drawn(NamedTuple):
    """A batch of images on the device: their numbers, int64 (B,), and whether each is mirrored, bool (B,)."""

    indices: Tensor
    mirrored: Tensor


class Draws(Dataset[tuple[int, bool]]):
    """The random draws of `sampler.EpochImages` for each image, without the image, by key (index, epoch)."""

    def __init__(self, images: ImageDataset, seed: int) -> None:
        self.images, self.seed = images, seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, keys: Sequence[tuple[int, int]]) -> Drawn:
        """Return the draws of a whole batch; torch's loader calls this method if there is one."""
        index, epoch = np.asarray(keys, dtype=np.int64).T.copy()
        mirrored = np.zeros(len(index), dtype=bool)
        if self.images.mirrored:
            mirrored = first_draws(self.seed, epoch, index) < FLIPPED
        return Drawn(torch.from_numpy(index), torch.from_numpy(mirrored))


def as_it_is(batch: Drawn) -> Drawn:
    """Return a batch unchanged, since `Draws` returns whole batches."""
    return batch


def fits(images: ImageDataset, shape: tuple[int, int, int], device: torch.device) -> bool:
    """Return whether images of a shape (C, H, W) are kept on the device by default.

    These are images in memory and, on a GPU, those of files that are quickly decoded, if they fit along with training.
    """
    if device.type == "cpu":
        return isinstance(images, TensorImages)
    if not _is_keepable(images) or len(images) * math.prod(shape) > FREE_SHARE * available_memory(device):
        return False
    return images.file_bytes() <= QUICK_BYTES


class DeviceImages:
    """All images of a part, uint8 (N, C, H, W), and their labels, int64 (N,), on a device.

    Args:
        images: the part.
        shape: (C, H, W) of each image.
        device: the device on which they are kept.
        num_workers: number of loader processes that decode them.
        shown: whether to report progress.

    Raises:
        UserError: images that are cropped at random.
        OutOfMemoryError: more images than fit.
    """

    def __init__(
        self, images: ImageDataset, shape: tuple[int, int, int], device: torch.device, num_workers: int, shown: bool
    ) -> None:
        require_keepable(images, "data.on_device=true")
        self.device, self.mirrored, number = device, images.mirrored, len(images)
        height, width = shape[1:]
        what = f"data.on_device=true with {number} images of {height}x{width}x{shape[0]}"
        if not (isinstance(images, TensorImages) and images.images.device == device):  # else nothing is copied
            require_memory(number * (math.prod(shape) + 8), what, "set data.on_device=false", device)
        if isinstance(images, TensorImages):
            none = torch.full((number,), -1)
            labels = none if images.labels is None else images.labels
            self.images, self.labels = images.images.to(device), labels.to(device)
            return
        self.images = torch.empty((number, *shape), dtype=torch.uint8, device=device)
        self.labels = torch.empty(number, dtype=torch.int64, device=device)
        loader: DataLoader[tuple[Tensor, int]] = DataLoader(
            images, _LOADED, num_workers=num_workers, worker_init_fn=ignore_interrupts
        )
        with Report() as report:
            advance = report.part("images to the device", number) if shown else lambda count: None
            done = 0
            for batch, labels in loader:
                part = slice(done, done + len(batch))
                self.images[part], self.labels[part] = batch.to(device), labels.to(device)
                advance(len(batch))
                done += len(batch)

    def gather(self, drawn: Drawn) -> tuple[Tensor, Tensor]:
        """Return the images (B, C, H, W) and labels (B,) of a batch."""
        images = self.images[drawn.indices]
        if self.mirrored:
            images = torch.where(drawn.mirrored[:, None, None, None], images.flip(-1), images)
        return images, self.labels[drawn.indices]
