"""Sets of images that are judged or judged by: files, arrays, the data sets of `configs/data`, the data of a run; and
the few images that a model edits or starts from."""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import PIL
import torch
from omegaconf import OmegaConf
from torch import Tensor

from dpm_scales import data as rooms
from dpm_scales.data import ArraySource, ImageDataModule, ImageDataset
from dpm_scales.data.base import ImageSource
from dpm_scales.data.files import ImageStore, batches_of_one_size, open_store, require_readable
from dpm_scales.errors import UserError, require, suggest
from dpm_scales.images import load_image
from dpm_scales.training.arguments import CONFIGS
from dpm_scales.training.building import build, nodes
from dpm_scales.training.reading import read_yaml
from dpm_scales.training.sample_folder import SHEETS

SPLITS = ("train", "val", "all")
RUN_DATA = "data"
"""What names the data set of the run that made the model."""

ARRAYS = (".npy", ".npz")
READERS = 4  # threads that decode files


class Pictures(ABC):
    """Some images in a fixed order.

    Attributes:
        source: where they come from, in words.
        sizes: sizes (H, W) that occur.
        num_classes, class_names: of the images' labels, as `ImageSource` has them; None where they have none.
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
        """uint8 (B, C, H, W), B <= `batch_size`, each batch of one size, in order."""

    def labelled(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The same with the images' labels, int64 (B,). Raises UserError where they have none."""
        raise UserError(f"{self.source}: these images have no labels")

    def digest(self) -> str:
        """SHA-256 of the content, in hexadecimal digits: another image, or another order, gives another one."""
        if self._digest is None:
            self._digest = self._hash()
        return self._digest

    @abstractmethod
    def _hash(self) -> str: ...


class PictureFiles(Pictures):
    """Image files, decoded as RGB; `limit` of them, spread evenly over the names, or all.

    Raises: UserError where one can't be read.
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


class PictureSet(Pictures):
    """Parts of a data set, plain views; `limit` images, spread evenly, or all."""

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


def open_pictures(
    place: str, key: str, split: str = "train", limit: int | None = None, model: Path | None = None
) -> Pictures:
    """The images of a place.

    Args:
        place: a folder, a .zip, .npy or .npz file, the name of a file in `configs/data`, or "data".
        key: the option that names it, for messages.
        split: "train", "val" or "all": which part of a data set; files have no parts.
        limit: number of images, spread evenly; None for all.
        model: whose run "data" is the data of.

    Raises: UserError for a place that is none, or without two images.
    """
    require(split in SPLITS, f"unknown split {split!r}: {suggest(str(split), SPLITS)}")
    names = sorted(path.stem for path in (CONFIGS / "data").glob("*.yaml"))
    pictures: Pictures
    if place == RUN_DATA:
        require(model is not None, f"{key}=data is the data of the model's run, and no model= was given")
        assert model is not None
        pictures = data_pictures(run_data(model).source, split, f"data of {model}", limit)
    elif place in names:
        pictures = data_pictures(_named_data(place, key).source, split, place, limit)
    elif Path(place).suffix.lower() in ARRAYS:
        array = ArraySource(place, val_fraction=0.0)
        pictures = PictureSet(array, [array.train()], place, limit)
    else:
        if not Path(place).expanduser().exists():
            known = f"a folder, a .zip, .npy or .npz file, data (that of the model's run), {', '.join(names)}"
            raise UserError(f"{key}={place}: no such folder or file; allowed are {known}")
        pictures = PictureFiles(open_store(place), limit)
    require(len(pictures) >= 2, f"{key}={place}: needs 2 images or more, found {len(pictures)}")
    return pictures


def data_pictures(source: ImageSource, split: str, name: str, limit: int | None = None) -> PictureSet:
    """The training images of a source, its validation images, or both. Raises UserError for another split."""
    require(split in SPLITS, f"unknown split {split!r}: {suggest(str(split), SPLITS)}")
    parts = {"train": [source.train], "val": [source.val], "all": [source.train, source.val]}[split]
    return PictureSet(source, [part() for part in parts], f"{name}, split {split}", limit)


def run_data(model: Path) -> ImageDataModule:
    """The data set that the run of a model was trained on.

    Args:
        model: run folder, or an export or a checkpoint in one.

    Raises: UserError without the run's config.yaml, or if that names a data set that is not of this package.
    """
    for folder in (model, *model.parents[:2]):
        config = folder / "config.yaml"
        values = read_yaml(config) if config.is_file() else None
        if isinstance(values, dict) and isinstance(values.get("data"), dict):
            return _build_stored(values["data"], str(config))
    raise UserError(f"{model} lies in no run folder, whose config.yaml would name the data; give reference=DIR")


def read_images(place: str, channels: int) -> tuple[list[str], Tensor]:
    """Names, and uint8 ``(N, C, H, W)``, of a file or of all images of a folder or .zip file in the names' order.

    Raises: UserError for unreadable files, other channels and mixed sizes; it names the file.
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


def _named_data(name: str, key: str) -> ImageDataModule:
    settings = OmegaConf.load(CONFIGS / "data" / f"{name}.yaml")
    missing = sorted(OmegaConf.missing_keys(settings))
    require(not missing, f"{key}={name} would need data.{', data.'.join(missing)}; give its folder or file: {key}=PATH")
    return _build(OmegaConf.to_container(settings, resolve=True), name)


def _build_stored(settings: dict[str, Any], source: str) -> ImageDataModule:
    """The data set of a run's config, which is downloaded to the usual place alone."""
    usual = settings.get("root") == os.environ.get("DPM_SCALES_DATA", "data_cache")
    if "download" not in settings or usual:
        return _build(settings, source)
    try:
        return _build({**settings, "download": False}, source)
    except UserError as error:
        raise UserError(f"{source}: {error}; or name the data set or its folder: reference=NAME_OR_DIR") from error


def _build(settings: Any, source: str) -> ImageDataModule:
    """Raises UserError unless the config asks for a data set of this package and nothing else."""
    room, _, name = str(settings.get("_target_")).rpartition(".")
    ours = room == "dpm_scales.data" and name in rooms.__all__
    require(ours, f"{source}: the data {settings.get('_target_')!r} are not of dpm_scales.data; give reference=DIR")
    held = [node for value in settings.values() for node in nodes(value, source)]
    objects = any(isinstance(node, dict) or (isinstance(node, str) and "${" in node) for node in held)
    hidden = any(str(key).startswith("_") for key in settings.keys() - {"_target_"})
    require(not objects and not hidden, f"{source}: the data's config holds objects; give reference=DIR")
    built: ImageDataModule = build(settings, ImageDataModule, f"{source}: data")
    built.prepare_data()
    return built


def _spread(count: int, limit: int | None) -> list[int]:
    """Numbers of `limit` of `count` images, evenly over them, or of all."""
    if limit is None or limit >= count:
        return list(range(count))
    return [i * count // limit for i in range(limit)]
