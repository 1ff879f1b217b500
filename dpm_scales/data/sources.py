"""Data sets that fit in memory and need no download: digits, photos, arrays from a file."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dpm_scales import images
from dpm_scales.data.base import ImageSource, TensorImages, split_indices
from dpm_scales.errors import UserError, require, suggest

MAGIC = (b"\x93NUMPY", b"PK\x03\x04", b"PK\x05\x06")
"""First bytes of .npy files and of .npz files, which are zip files."""


@functools.cache
def _digits() -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return ink values 0 to 16, (1797, 64), and labels (1797,); cached, since scikit-learn parses them from text."""
    from sklearn.datasets import load_digits

    ink, labels = load_digits(return_X_y=True)
    return ink, labels


class Digits(ImageSource):
    """The 1797 handwritten digits of scikit-learn: 8x8 grey pixels, ten classes, each split by the same fraction."""

    channels = 1
    image_size = (8, 8)
    num_classes = 10
    class_names = tuple("0123456789")

    def __init__(self, val_fraction: float = 0.2, split_seed: int = 0) -> None:
        ink, labels = _digits()
        data = torch.from_numpy(np.round(ink * images.LEVELS / 16).astype(np.uint8)).reshape(-1, 1, 8, 8)
        targets = torch.from_numpy(labels.astype(np.int64))
        train, val = split_indices(len(data), val_fraction, split_seed, labels)
        self._train = TensorImages(data[train], targets[train])
        self._val = TensorImages(data[val], targets[val])

    def train(self) -> TensorImages:
        return self._train

    def val(self) -> TensorImages:
        return self._val


class Photos(ImageSource):
    """Patches of the free photos in scikit-image at scales 1, 1/2 and 1/4, RGB; one photo is held out.

    The defaults give 4155 patches of 32 px in total.

    Args:
        patch_size: side of a patch, or [height, width], in pixels.
        stride: distance between neighbouring patches in pixels.
        val_photo: the photo held out: "astronaut", "coffee", "chelsea" or "rocket".
        random_flip: whether to mirror half of the training patches.
    """

    PHOTOS = ("astronaut", "coffee", "chelsea", "rocket")
    SHRINK_FACTORS = (1, 2, 4)
    channels = 3

    def __init__(
        self,
        patch_size: int | Sequence[int] = 32,
        stride: int = 16,
        val_photo: str = "chelsea",
        random_flip: bool = False,
    ) -> None:
        self.image_size = images.size_pair(patch_size, "patch_size")
        require(stride >= 1, f"stride={stride}: allowed is a number of pixels >= 1")
        require(val_photo in self.PHOTOS, f"unknown val_photo={val_photo!r}: {suggest(val_photo, self.PHOTOS)}")
        self._train = TensorImages(
            torch.cat([self._patches(name, stride) for name in self.PHOTOS if name != val_photo]),
            random_flip=random_flip,
        )
        self._val = TensorImages(self._patches(val_photo, stride))
        smallest = min(len(self._train), len(self._val))
        require(smallest > 0, f"patch_size={patch_size}: larger than the photos; allowed is up to [300, 451]")

    def train(self) -> TensorImages:
        return self._train

    def val(self) -> TensorImages:
        return self._val

    def _patches(self, name: str, stride: int) -> Tensor:
        from skimage import data

        photo = torch.from_numpy(np.ascontiguousarray(getattr(data, name)().transpose(2, 0, 1)))
        height, width = self.image_size
        parts = [photo.new_empty((0, 3, height, width))]
        for factor in self.SHRINK_FACTORS:
            small = images.resize(photo, (photo.shape[1] // factor, photo.shape[2] // factor))
            if small.shape[1] >= height and small.shape[2] >= width:
                windows = small.unfold(1, height, stride).unfold(2, width, stride)  # (3, rows, columns, H, W)
                parts.append(windows.permute(1, 2, 0, 3, 4).reshape(-1, 3, height, width))
        return torch.cat(parts)


class ArraySource(ImageSource):
    """Images of one size from a NumPy file: uint8 (N, H, W) or (N, H, W, C), C = 1 or 3.

    Args:
        path: a .npy file, or a .npz file with `images` and, optionally, integer `labels` (N,).
        val_fraction: fraction of the images (of every label) held out.
        split_seed: seed of the split.
        random_flip: whether to mirror half of the training images.

    Raises:
        UserError: a missing file, pickled objects in it, arrays of another type or shape, or more classes than images.
    """

    def __init__(
        self, path: str | Path, val_fraction: float = 0.1, split_seed: int = 0, random_flip: bool = False
    ) -> None:
        array, labels = read_arrays(Path(path))
        require(array.dtype == np.uint8, f"{path}: images are {array.dtype}; save them as uint8, 0 to 255")
        data = array[..., None] if array.ndim == 3 else array
        require(
            data.ndim == 4 and data.shape[-1] in (1, 3) and data.size > 0,
            f"{path}: images have the shape {array.shape}; allowed are (N, H, W), (N, H, W, 1) and (N, H, W, 3)",
        )
        tensor = torch.from_numpy(np.ascontiguousarray(data.transpose(0, 3, 1, 2)))
        targets: Tensor | None = None
        if labels is not None:
            integer = labels.shape == (len(data),) and labels.dtype.kind in "iu" and labels.min() >= 0
            require(integer, f"{path}: labels are {labels.dtype} {labels.shape}; need integers >= 0, ({len(data)},)")
            self.num_classes = int(labels.max()) + 1
            require(
                self.num_classes <= len(data),
                f"{path}: labels go up to {self.num_classes - 1}, which makes {self.num_classes} classes of "
                f"{len(data)} images; number the classes from 0 without gaps",
            )
            targets = torch.from_numpy(labels.astype(np.int64))
            absent = np.flatnonzero(np.bincount(labels.astype(np.int64)) == 0).tolist()
            if absent:
                some = ", ".join(map(str, absent[:10])) + (", …" if len(absent) > 10 else "")
                warnings.warn(
                    f"{path}: {len(absent)} of {self.num_classes} classes have no image and will not be learnt: "
                    f"{some}; number the classes without gaps",
                    stacklevel=2,
                )
        self.channels = tensor.shape[1]
        self.image_size = (tensor.shape[2], tensor.shape[3])
        train, val = split_indices(len(tensor), val_fraction, split_seed, labels)
        self._train = TensorImages(tensor[train], None if targets is None else targets[train], random_flip)
        self._val = TensorImages(tensor[val], None if targets is None else targets[val])

    def train(self) -> TensorImages:
        return self._train

    def val(self) -> TensorImages:
        return self._val


def read_arrays(path: Path, mapped: bool = False) -> tuple[np.ndarray, np.ndarray | None]:
    """Return the images, and the labels or None, of a .npy or .npz file; objects are never unpickled.

    Args:
        mapped: map the images of a .npy file into memory, so that they are read when used.

    Raises: UserError for other files.
    """
    require(path.is_file(), f"{path}: no such file; give a .npy or .npz file")
    kind = f"{path}: not a readable .npy or .npz file without pickled objects"
    try:
        with path.open("rb") as file:
            start = file.read(len(MAGIC[0]))
        require(start.startswith(MAGIC), f"{kind} (it begins as neither of them does)")
        content = np.load(path, mmap_mode="r" if mapped else None, allow_pickle=False)
        if isinstance(content, np.ndarray):
            return content, None
        with content:
            keys = list(content.keys())
            names = ", ".join(map(repr, keys)) or "nothing"
            require("images" in keys, f"{path}: holds {names}; save the array under 'images'")
            return content["images"], content["labels"] if "labels" in keys else None
    except UserError:
        raise
    except Exception as error:  # NumPy parses headers as Python code; damaged ones raise nearly anything
        reason = str(error).split("\n")[0] or type(error).__name__
        # NumPy's message advises allowing them
        reason = "it holds Python objects; save arrays of numbers" if "allow_pickle" in reason else reason
        raise UserError(f"{kind} ({reason})") from error
