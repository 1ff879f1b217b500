"""Images from a folder tree or a zip archive, decoded on access."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dpm_scales import images
from dpm_scales.data.base import NO_LABEL, ImageSource, maybe_flip, split_indices
from dpm_scales.data.files import ImageStore, inspect_images, listed, open_store
from dpm_scales.data.replaced import ReplacedImages
from dpm_scales.errors import UserError, require, suggest

RESIZE_MODES = ("none", "resize", "crop", "resize_crop")
SPLITS = ("auto", "folder", "fraction")
VAL_FOLDERS = ("val", "valid", "validation", "test")


@dataclass(frozen=True)
class View:
    """Transform of a decoded image to shape (channels, *size).

    Attributes:
        channels: 1 or 3.
        size: (H, W) in pixels.
        resize_mode: see `ImageFolder`.
        random_crop: whether to crop at a random position instead of the centre.
        random_flip: whether to mirror half of the images.
        rotate_portrait: whether to rotate portrait images by 90 degrees.
        center_crop: (H, W) of a central crop that precedes everything else, or None.
    """

    channels: int
    size: tuple[int, int]
    resize_mode: str = "none"
    random_crop: bool = False
    random_flip: bool = False
    rotate_portrait: bool = False
    center_crop: tuple[int, int] | None = None

    @property
    def is_random(self) -> bool:
        """Return whether the transform is random."""
        return self.random_crop or self.random_flip

    @property
    def only_mirrors(self) -> bool:
        """Return whether a flip is the only random part."""
        return self.random_flip and not self.random_crop

    def identity(self) -> list[Any]:
        """Return the settings on which the plain view depends, as plain values."""
        center = None if self.center_crop is None else list(self.center_crop)
        return [self.channels, list(self.size), self.resize_mode, self.rotate_portrait, center]

    def __call__(self, image: Tensor, rng: np.random.Generator | None) -> Tensor:
        """Map uint8 (C, h, w) to uint8 (C, *size); without `rng`, crops are centred and nothing is mirrored."""
        if self.center_crop is not None:
            image = _crop(image, self.center_crop, None)
        if self.rotate_portrait and image.shape[1] > image.shape[2]:
            image = image.rot90(1, (1, 2))
        if self.resize_mode == "resize":
            image = images.resize(image, self.size)
        elif self.resize_mode == "resize_crop":
            scale = max(self.size[0] / image.shape[1], self.size[1] / image.shape[2])
            height, width = (
                max(need, round(have * scale)) for need, have in zip(self.size, image.shape[1:], strict=True)
            )
            image = images.resize(image, (height, width))
        if self.resize_mode in ("crop", "resize_crop"):
            image = _crop(image, self.size, rng if self.random_crop else None)
        if tuple(image.shape[1:]) != self.size:
            raise UserError(f"its size {tuple(image.shape[1:])} is not {self.size}")
        if self.random_flip:
            image = maybe_flip(image, rng)
        return image.contiguous()


def _crop(image: Tensor, size: tuple[int, int], rng: np.random.Generator | None) -> Tensor:
    """Return a crop (C, *size) of an image, at a random position with `rng`, otherwise at the centre."""
    for axis, side in ((1, size[0]), (2, size[1])):
        spare = image.shape[axis] - side
        if spare < 0:
            raise UserError(f"its size {tuple(image.shape[1:])} is below the crop {size}")
        image = image.narrow(axis, spare // 2 if rng is None else int(rng.integers(spare + 1)), side)
    return image


class FileImages(ReplacedImages):
    """Some files of a store; an unreadable one raises or is replaced by the next readable one, see `on_error`."""

    def __init__(
        self, store: ImageStore, names: Sequence[str], labels: Sequence[int] | None, view: View, on_error: str
    ) -> None:
        self.store, self.names, self.view = store, list(names), view
        self.labels = None if labels is None else torch.tensor(labels, dtype=torch.int64)
        super().__init__(len(self.names), str(store.root), on_error)
        self.augmented, self.mirrored = view.is_random, view.only_mirrors

    def identity(self) -> list[Any]:
        labels = None if self.labels is None else self.labels.tolist()
        return [type(self.store).__name__, self.store.state(self.names), labels, self.view.identity()]

    def file_bytes(self) -> float:
        return self.store.file_bytes(self.names)

    def name(self, index: int) -> str:
        return self.names[index]

    def describe(self, index: int) -> str:
        return self.store.describe(self.names[index])

    def load(self, index: int, rng: np.random.Generator | None) -> tuple[Tensor, int]:
        image = self.store.load(self.names[index], self.view.channels)
        return self.view(image, rng), NO_LABEL if self.labels is None else int(self.labels[index])


class ImageFolder(ImageSource):
    """All images in a folder tree or .zip file; a single enclosing folder is ignored.

    Args:
        root: the folder or .zip file.
        channels: 1 grey or 3 RGB; images are converted.
        image_size: side, or [height, width], in pixels; null if all images have the same size.
        resize_mode: treatment of images of another size: "none" refuses them, "resize" distorts them, "crop" crops the
            original, "resize_crop" first shrinks or enlarges the image until the crop just fits.
        random_crop: whether to crop training images at random positions instead of the centre.
        random_flip: whether to mirror half of the training images.
        rotate_portrait: whether to rotate portrait images by 90 degrees.
        split: "folder" trains on `train/` and validates on `val/` (or valid, validation, test); "fraction" holds out
            `val_fraction` of the images, drawn with `split_seed`; "auto" uses the folders if both exist.
        val_fraction, split_seed: see `split`.
        labels: "folder" numbers the folders (below train/ and val/) in alphabetical order; "none" gives no labels.
        on_error: "skip" omits unreadable images, and classes without images, with a warning; "raise" stops at the
            first.
        verify: how much of each image is read at the start: "headers" (and the last bytes), "full", or "none", which
            needs image_size.

    Attributes:
        left_out: the images found unreadable at the start, and the reasons.

    Raises:
        UserError: nothing to read, unsuitable sizes, or, with on_error="raise", an unreadable image or a class without
            images.
    """

    def __init__(
        self,
        root: str | Path,
        channels: int = 3,
        image_size: int | Sequence[int] | None = None,
        resize_mode: str = "resize_crop",
        random_crop: bool = False,
        random_flip: bool = False,
        rotate_portrait: bool = False,
        split: str = "auto",
        val_fraction: float = 0.1,
        split_seed: int = 0,
        labels: str = "none",
        on_error: str = "skip",
        verify: str = "headers",
    ) -> None:
        require(channels in (1, 3), f"channels={channels}: allowed are 1 (grey) and 3 (RGB)")
        require_one_of("resize_mode", resize_mode, RESIZE_MODES)
        require_one_of("split", split, SPLITS)
        require_one_of("labels", labels, ("folder", "none"))
        require_one_of("on_error", on_error, ("skip", "raise"))
        require_one_of("verify", verify, ("headers", "full", "none"))
        size = None if image_size is None else images.size_pair(image_size, "image_size")
        mode = "none" if size is None else resize_mode
        require(
            not random_crop or mode in ("crop", "resize_crop"),
            "random_crop=true needs image_size and resize_mode=crop or resize_crop",
        )
        self.channels = channels
        self.rotate_portrait = rotate_portrait
        self.store = open_store(root)
        *parts, self.split_note = split_names(self.store, split, val_fraction, split_seed)
        require(verify != "none" or size is not None, "verify=none needs image_size, for example image_size=64")
        self.sizes: dict[str, tuple[int, int]] = {}
        self.left_out: dict[str, str] = {}
        if verify != "none":
            self.sizes = self._inspect([*parts[0], *parts[1]], on_error, full=verify == "full")
            parts = [[name for name in part if name in self.sizes] for part in parts]
        require(bool(parts[0]), f"{root}: no readable training images")
        self.image_size = self._common_size(size, mode)
        classes = class_of_names([*parts[0], *parts[1]], self.store) if labels == "folder" else None
        if classes is not None:
            self.class_names = tuple(sorted(set(classes.values())))
            self.num_classes = len(self.class_names)
            empty = sorted(_class_folders(self.store, [*parts[0], *parts[1]]) - set(self.class_names))
            message = f"{root}: {len(empty)} class folders hold no readable image: {listed(empty)}"
            require(not empty or on_error == "skip", f"{message}; fill or remove them, or set on_error=skip")
            if empty:
                warnings.warn(f"{message}; they do not count as classes", stacklevel=2)
        train_view = View(channels, self.image_size, mode, random_crop, random_flip, rotate_portrait)
        val_view = View(channels, self.image_size, mode, rotate_portrait=rotate_portrait)
        self._train, self._val = (
            FileImages(self.store, names, self._numbers(names, classes), view, on_error)
            for names, view in zip(parts, (train_view, val_view), strict=True)
        )

    def train(self) -> FileImages:
        return self._train

    def val(self) -> FileImages:
        return self._val

    def _numbers(self, names: Sequence[str], classes: dict[str, str] | None) -> list[int] | None:
        if classes is None or self.class_names is None:
            return None
        numbers = {name: number for number, name in enumerate(self.class_names)}
        return [numbers[classes[name]] for name in names]

    def _inspect(self, names: list[str], on_error: str, full: bool) -> dict[str, tuple[int, int]]:
        """Return the sizes (H, W) as read, and report unreadable images."""
        sizes, bad = inspect_images(self.store, names, full)
        if bad and on_error == "raise":
            name, reason = next(iter(bad.items()))
            raise UserError(f"{self.store.describe(name)}: {reason}; repair or remove it, or set on_error=skip")
        require(bool(sizes), f"{self.store.root}: none of its {len(names)} images can be read")
        if bad:
            self.left_out = bad
            message = f"{self.store.root}: {len(bad)} unreadable images are left out: {listed(bad)}"
            warnings.warn(message, stacklevel=4)
        if self.rotate_portrait:
            return {name: (min(size), max(size)) for name, size in sizes.items()}
        return sizes

    def _common_size(self, size: tuple[int, int] | None, mode: str) -> tuple[int, int]:
        """Return the size to which all images are brought, after checking that this is possible."""
        first = min(self.sizes, default="")
        wanted = self.sizes[first] if size is None else size
        for name, (height, width) in sorted(self.sizes.items()):
            if size is None and (height, width) != wanted:
                raise UserError(
                    f"{self.store.root}: mixed sizes, {first} is {wanted}, {name} {(height, width)} (height, width); "
                    "set image_size, for example image_size=64"
                )
            if mode == "none" and (height, width) != wanted:
                raise UserError(
                    f"{self.store.describe(name)}: {(height, width)} is not image_size={wanted}; set resize_mode to "
                    "resize, crop or resize_crop"
                )
            if mode == "crop" and (height < wanted[0] or width < wanted[1]):
                raise UserError(
                    f"{self.store.describe(name)}: {(height, width)} is below the crop {wanted}; set a smaller size or "
                    "resize_mode=resize_crop"
                )
        return wanted


class BSDS500(ImageFolder):
    """The Berkeley segmentation photos: 500 of 481x321 pixels, a third of them portrait, in images/{train,val,test}.

    Args:
        root: the folder or .zip file that contains `images`.
        patch_size: side, or [height, width], of the crop in pixels; null takes whole photos and needs rotate_portrait.
        channels: 1 grey or 3 RGB.
        random_crop: whether to crop training patches at random positions instead of the centre.
        random_flip: whether to mirror half of the training patches.
        rotate_portrait: whether to rotate portrait photos, so that all are (321, 481).
        on_error: as in `ImageFolder`.
    """

    def __init__(
        self,
        root: str | Path,
        patch_size: int | Sequence[int] | None = 64,
        channels: int = 3,
        random_crop: bool = True,
        random_flip: bool = False,
        rotate_portrait: bool = False,
        on_error: str = "skip",
    ) -> None:
        require(
            patch_size is not None or rotate_portrait,
            "patch_size=null takes whole photos, of which some are upright: set rotate_portrait=true or a patch_size",
        )
        super().__init__(
            root,
            channels=channels,
            image_size=patch_size,
            resize_mode="crop",
            random_crop=random_crop and patch_size is not None,
            random_flip=random_flip,
            rotate_portrait=rotate_portrait,
            split="folder",
            on_error=on_error,
        )


def split_names(
    store: ImageStore, split: str, val_fraction: float, split_seed: int
) -> tuple[list[str], list[str], str]:
    """Return training and validation names, and a note that names their folders.

    Unreadable files take part in the split, so that repairing one does not move others.
    """
    tops: dict[str, list[str]] = {}
    for name, parts in _inner_parts(store.names).items():
        tops.setdefault(parts[0] if len(parts) > 1 else "", []).append(name)
    val_folder = next((folder for folder in VAL_FOLDERS if folder in tops), None)
    both = "train" in tops and val_folder is not None
    if split == "folder" or (split == "auto" and both):
        found = ", ".join(sorted(top for top in tops if top)) or "no folders"
        require(both, f"{store.root}: holds {found}; split=folder needs train/ and one of {', '.join(VAL_FOLDERS)}")
        left = sorted(f"{top}/" if top else "files beside them" for top in set(tops) - {"train", val_folder})
        unused = f"; not used: {listed(left)}" if left else ""
        return tops["train"], tops[val_folder or ""], f"train/ + {val_folder}/{unused}"
    train, val = split_indices(len(store.names), val_fraction, split_seed)
    return [store.names[i] for i in train.tolist()], [store.names[i] for i in val.tolist()], ""


def _inner_parts(names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Return the path parts of each name, without a single enclosing folder."""
    parts = {name: PurePosixPath(name).parts for name in names}
    while len({part[0] for part in parts.values()}) == 1 and all(len(part) > 2 for part in parts.values()):
        parts = {name: part[1:] for name, part in parts.items()}
    return parts


def class_of_names(names: Sequence[str], store: ImageStore) -> dict[str, str]:
    """Return the folder that labels each name: the first folder below train/, val/ and so on, otherwise the first."""
    classes: dict[str, str] = {}
    inner = _inner_parts(store.names)
    for name in names:
        parts = inner[name]
        folders = parts[1:-1] if parts[0] in ("train", *VAL_FOLDERS) else parts[:-1]
        require(bool(folders), f"{store.describe(name)}: lies in no class folder; sort it into one or set labels=none")
        classes[name] = folders[0]
    return classes


def _class_folders(store: ImageStore, names: Sequence[str]) -> set[str]:
    """Return the names of all folders at the level of the classes, with or without images.

    Args:
        names: the images in use; folders at the top without any of them are no classes, if these lie in train/, val/ …
    """
    inner = _inner_parts(store.names)
    shell = len(PurePosixPath(store.names[0]).parts) - len(inner[store.names[0]])
    prefix = PurePosixPath(store.names[0]).parts[:shell]
    tops = {inner[name][0] for name in names}
    divided = tops <= {"train", *VAL_FOLDERS}
    classes = set()
    for folder in store.folders:
        parts = PurePosixPath(folder).parts
        hidden = any(part.startswith(".") or part == "__MACOSX" for part in parts)
        if hidden or parts[:shell] != prefix:
            continue
        rest = parts[shell:]
        if divided and rest:
            rest = rest[1:] if rest[0] in tops else ()
        if rest:
            classes.add(rest[0])
    return classes


def require_one_of(key: str, value: str, allowed: Sequence[str]) -> None:
    """Raise UserError, in the words of the command line, unless `value` is one of `allowed`."""
    require(value in allowed, f"unknown {key}={value!r}: {suggest(str(value), allowed)}")
