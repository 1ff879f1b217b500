"""MNIST, Fashion-MNIST, CIFAR-10 and CelebA through torchvision."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from dpm_scales import images
from dpm_scales.data.base import ImageDataset, ImageSource, TensorImages
from dpm_scales.data.files import open_store
from dpm_scales.data.folder import FileImages, View
from dpm_scales.errors import UserError, require, suggest
from dpm_scales.locks import lock
from dpm_scales.storage import make_folder

DATASETS = {
    # name: (channels, native size, where torchvision looks below root)
    "MNIST": (1, (28, 28), "MNIST/raw/train-images-idx3-ubyte.gz and its three siblings"),
    "FashionMNIST": (1, (28, 28), "FashionMNIST/raw/train-images-idx3-ubyte.gz and its three siblings"),
    "CIFAR10": (3, (32, 32), "cifar-10-python.tar.gz"),
    "CelebA": (3, (218, 178), "celeba/img_align_celeba.zip and the five .txt lists"),
}
CELEBA_CROP = (178, 178)


class TorchvisionSource(ImageSource):
    """One of torchvision's data sets; its test part (CelebA: its valid part) is the validation part.

    Args:
        name: "MNIST", "FashionMNIST", "CIFAR10" or "CelebA".
        root: folder of the files.
        download: whether to fetch missing files.
        image_size: side, or [height, width], in pixels; null keeps the native size. CelebA is first cropped to the
            central square and needs a size.
        pad_to: size reached by adding black margins after resizing, e.g. 32 for MNIST.
        random_flip: whether to mirror half of the training images.

    Raises:
        UserError: an unknown name or invalid sizes; on use, missing files that cannot be fetched.
    """

    def __init__(
        self,
        name: str,
        root: str | Path,
        download: bool = True,
        image_size: int | Sequence[int] | None = None,
        pad_to: int | Sequence[int] | None = None,
        random_flip: bool = False,
    ) -> None:
        require(name in DATASETS, f"unknown data set name={name!r}: {suggest(name, DATASETS)}")
        self.channels, native, self._files = DATASETS[name]
        require(name != "CelebA" or image_size is not None, "CelebA needs image_size, for example image_size=64")
        require(name != "CelebA" or pad_to is None, "pad_to is not for CelebA; set image_size")
        self.name = name
        self.root = Path(root).expanduser()
        self.download = download
        self.random_flip = random_flip
        self._content_size = native if image_size is None else images.size_pair(image_size, "image_size")
        self.image_size = self._content_size if pad_to is None else images.size_pair(pad_to, "pad_to")
        fits = all(outer >= inner for outer, inner in zip(self.image_size, self._content_size, strict=True))
        require(fits, f"pad_to={pad_to} is below the image size {self._content_size}")
        if name != "CelebA":
            self.num_classes = 10
        self._parts: dict[bool, ImageDataset] = {}

    def prepare(self) -> None:
        for train in (True, False):
            self._open(train)

    def train(self) -> ImageDataset:
        return self._part(train=True)

    def val(self) -> ImageDataset:
        return self._part(train=False)

    def _part(self, train: bool) -> ImageDataset:
        if train not in self._parts:
            dataset = self._open(train)
            flip = self.random_flip and train
            self._parts[train] = (
                self._celeba(dataset, flip) if self.name == "CelebA" else self._in_memory(dataset, flip)
            )
        return self._parts[train]

    def _open(self, train: bool) -> Any:
        """Return the torchvision data set, fetched if necessary."""
        from torchvision import datasets

        def construct(download: bool) -> Any:
            if self.name == "CelebA":
                return datasets.CelebA(self.root, "train" if train else "valid", download=download)
            return getattr(datasets, self.name)(self.root, train=train, download=download)

        try:
            return construct(download=False)
        except (RuntimeError, OSError) as error:
            require(
                self.download,
                f"{self.name} is not in {self.root} ({error}); put {self._files} there or set download=true",
            )
        try:
            with _lock(self.root):
                return construct(download=True)
        except (RuntimeError, OSError, ImportError) as error:
            raise UserError(
                f"cannot download {self.name} ({error}); get the files elsewhere and put {self._files} into {self.root}"
            ) from error

    def _in_memory(self, dataset: Any, flip: bool) -> TensorImages:
        data: Tensor = torch.as_tensor(dataset.data)
        data = data[:, None] if data.ndim == 3 else data.permute(0, 3, 1, 2)
        data = images.resize(data.contiguous(), self._content_size)
        spare_y, spare_x = (outer - inner for outer, inner in zip(self.image_size, self._content_size, strict=True))
        margins = (spare_x // 2, spare_x - spare_x // 2, spare_y // 2, spare_y - spare_y // 2)
        self.class_names = tuple(dataset.classes)
        return TensorImages(functional.pad(data, margins), torch.as_tensor(dataset.targets).long(), flip)

    def _celeba(self, dataset: Any, flip: bool) -> FileImages:
        view = View(3, self.image_size, "resize", random_flip=flip, center_crop=CELEBA_CROP)
        store = open_store(self.root / "celeba" / "img_align_celeba")
        return FileImages(store, dataset.filename, None, view, on_error="raise")


def _lock(folder: Path) -> AbstractContextManager[None]:
    """Return a lock that lets one process at a time download into `folder`, which is created."""
    make_folder(folder)
    return lock(folder / ".download.lock", "is being filled by", "wait for it", wait=True)
