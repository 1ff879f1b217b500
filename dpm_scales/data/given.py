"""Images passed in Python: tensors, arrays, and torch data sets."""

from __future__ import annotations

from collections.abc import Sequence, Sized
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from dpm_scales.data.base import NO_LABEL, ImageDataset, ImageSource, TensorImages, maybe_flip, split_indices
from dpm_scales.data.datamodule import ImageDataModule
from dpm_scales.errors import UserError, is_whole, require

NEED = "give uint8 (N, C, H, W), values 0 to 255"


class DatasetImages(ImageDataset):
    """Some items of a data set, each an image or (image, label): a uint8 tensor (C, H, W) or a PIL image.

    Args:
        dataset: data set with a length and items by index.
        indices: indices of the items.
        shape: (C, H, W) of all images.
        num_classes: number of labels, which are 0 to num_classes - 1; None ignores the labels of items.
        random_flip: whether to mirror half of the images.
    """

    def __init__(
        self,
        dataset: Any,
        indices: Sequence[int],
        shape: tuple[int, ...],
        num_classes: int | None = None,
        random_flip: bool = False,
    ) -> None:
        self.dataset, self.indices, self.shape = dataset, indices, shape
        self.num_classes, self.random_flip = num_classes, random_flip
        self.augmented = self.mirrored = random_flip

    def __len__(self) -> int:
        return len(self.indices)

    def get(self, index: int, rng: np.random.Generator | None) -> tuple[Tensor, int]:
        number = int(self.indices[index])
        image, label = item_of(self.dataset, number)
        same = tuple(image.shape) == self.shape
        require(same, f"item {number} has shape {tuple(image.shape)} and item 0 {self.shape}; give images of one size")
        if self.num_classes is None:
            label = NO_LABEL
        else:
            known = is_whole(label, 0) and label < self.num_classes
            require(known, f"item {number} has the label {label!r}; this model needs 0 to {self.num_classes - 1}")
        return (maybe_flip(image, rng) if self.random_flip else image), label


def item_of(dataset: Any, number: int) -> tuple[Tensor, Any]:
    """Return an item's image, uint8 (C, H, W), and its label, or `NO_LABEL`. Raises UserError for other items."""
    item = dataset[number]
    pair = isinstance(item, tuple | list) and len(item) == 2
    image, label = item if pair else (item, NO_LABEL)
    if isinstance(label, Tensor | np.integer) and np.ndim(label) == 0:
        label = label.item()
    if isinstance(image, Image.Image):
        pixels = np.array(image if image.mode in ("L", "RGB") else image.convert("RGB"))
        image = torch.from_numpy(pixels)
        image = image[None] if image.ndim == 2 else image.permute(2, 0, 1).contiguous()
    shown = f"{image.dtype} {tuple(image.shape)}" if isinstance(image, Tensor) else type(image).__name__
    right = isinstance(image, Tensor) and image.dtype == torch.uint8 and image.ndim == 3
    advice = "a PIL image or a uint8 tensor (C, H, W), alone or with a label (torchvision: PILToTensor, not ToTensor)"
    require(right, f"item {number} is {shown}; give {advice}")
    return image, label


class GivenImages(ImageSource):
    """Images in memory or in a torch data set, with a fraction held out.

    Args:
        images: a uint8 tensor or array ``(N, C, H, W)``, values 0 to 255; or a data set with a length and items by
            index, see `DatasetImages`.
        labels: labels of a tensor's images, integers >= 0, ``(N,)``; None for no labels.
        num_classes: number of labels; None ignores those of a data set's items.
        val_fraction: fraction of the images (for tensors, of every label) held out.
        split_seed: seed of the split.
        random_flip: whether to mirror half of the training images.

    Raises: UserError for images or labels of another type or shape.
    """

    def __init__(
        self,
        images: Tensor | np.ndarray | Dataset[Any],
        labels: Tensor | np.ndarray | Sequence[int] | None = None,
        num_classes: int | None = None,
        val_fraction: float = 0.1,
        split_seed: int = 0,
        random_flip: bool = False,
    ) -> None:
        if isinstance(images, Tensor | np.ndarray):
            self.num_classes = None if labels is None else num_classes
            pixels = as_pixels(images)
            numbers = None if labels is None else as_labels(labels, len(pixels), num_classes)
            self.channels, self.image_size = pixels.shape[1], (pixels.shape[2], pixels.shape[3])
            by_class = None if numbers is None else numbers.numpy()
            train, val = split_indices(len(pixels), val_fraction, split_seed, by_class)
            self._train: ImageDataset = TensorImages(
                pixels[train], None if numbers is None else numbers[train], random_flip
            )
            self._val: ImageDataset = TensorImages(pixels[val], None if numbers is None else numbers[val])
            return
        mapped = isinstance(images, Sized) and hasattr(images, "__getitem__")
        require(mapped, f"images are a {type(images).__name__}; {NEED}, a folder, or a data set with len() and [index]")
        require(labels is None, "labels= are for tensors; a data set gives (image, label)")
        count = len(images)  # type: ignore[arg-type]
        require(count > 0, "images are empty")
        first, label = item_of(images, 0)
        labelled = num_classes is None or label != NO_LABEL
        require(labelled, f"this model has num_classes={num_classes}, and the data set's items have no labels")
        self.num_classes = num_classes
        shape = tuple(first.shape)
        self.channels, self.image_size = shape[0], (shape[1], shape[2])
        names = getattr(images, "classes", None)
        if num_classes is not None and names is not None and len(names) == num_classes:
            self.class_names = tuple(map(str, names))
        train, val = split_indices(count, val_fraction, split_seed)
        self._train = DatasetImages(images, train.tolist(), shape, num_classes, random_flip)
        self._val = DatasetImages(images, val.tolist(), shape, num_classes)

    def train(self) -> ImageDataset:
        return self._train

    def val(self) -> ImageDataset:
        return self._val


def as_pixels(images: Tensor | np.ndarray) -> Tensor:
    """Return images as a uint8 tensor ``(N, C, H, W)`` on the CPU. Raises UserError for another type or shape."""
    shape = tuple(images.shape)
    kind = str(images.dtype).removeprefix("torch.")
    floats = "; of floats in [0, 1]: (images * 255).round() as uint8" if "float" in kind else ""
    require(kind == "uint8", f"images are {kind}; {NEED}{floats}")
    last = "; of channels last: images.transpose(0, 3, 1, 2) or images.permute(0, 3, 1, 2)"
    advice = "; of grey images: images[:, None]" if len(shape) == 3 else last if shape[-1:] in ((1,), (3,)) else ""
    channels_first = len(shape) == 4 and shape[1] in (1, 3)
    require(channels_first and 0 not in shape, f"images have shape {shape}, C = 1 or 3 is needed; {NEED}{advice}")
    return torch.as_tensor(images).cpu()


def as_labels(labels: Tensor | np.ndarray | Sequence[int], count: int, num_classes: int | None) -> Tensor:
    """Return labels as int64 ``(count,)`` on the CPU. Raises UserError for another type, shape or range."""
    try:
        found = torch.as_tensor(labels).cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"labels must be integers, ({count},), got {labels!r:.100}") from error
    plain = not (found.is_floating_point() or found.is_complex() or found.dtype == torch.bool)
    right = plain and tuple(found.shape) == (count,)
    require(right, f"labels are {found.dtype} of shape {tuple(found.shape)}; give integers, ({count},), one per image")
    most = num_classes if num_classes is not None else int(found.max()) + 1
    inside = 0 <= int(found.min()) and int(found.max()) < most
    known = f"labels go from {int(found.min())} to {int(found.max())}; this model has num_classes={most}"
    require(inside, f"{known}, so they must go from 0 to {most - 1}")
    return found.to(torch.int64)


def given_data(
    *,
    images: Any = None,
    labels: Any = None,
    num_classes: int | None = None,
    val_fraction: float = 0.1,
    split_seed: int = 0,
    random_flip: bool = False,
    batch_size: int = 64,
    num_workers: int = 0,
    seed: int = 0,
    pin_memory: bool | None = None,
    drop_last: bool = True,
    decoded: bool = False,
    on_device: bool | None = None,
) -> ImageDataModule:
    """Return batches of `GivenImages`.

    Raises: UserError without images, as for a run that was started in Python and is resumed on the command line.
    """
    again = "resume it there, by ds.train(model, images, run_dir=...), or give data=folder data.root=DIR"
    require(images is not None, f"the images of this run were given in Python; {again}")
    source = GivenImages(images, labels, num_classes, val_fraction, split_seed, random_flip)
    return ImageDataModule(source, batch_size, num_workers, seed, pin_memory, drop_last, decoded, on_device)
