"""Open the image sets to compare (files, arrays, data sets of `configs/data`, the data of a run), and the images that a
model edits or from which it starts."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpm_scales.data import ArraySource
from dpm_scales.data.base import ImageSource
from dpm_scales.data.files import open_store
from dpm_scales.data.image_sets import ARRAYS, DataImageSet, FileImageSet, ImageSet
from dpm_scales.errors import UserError, require, suggest
from dpm_scales.models.instantiate import CONFIGS, build, read_config
from dpm_scales.models.trust import DATA_ROOMS, check_target, trusted_names, walk_config
from dpm_scales.shards.places import is_shards
from dpm_scales.shards.shard import Keys
from dpm_scales.shards.shard_set import ShardStore, open_shards
from dpm_scales.storage import read_yaml

if TYPE_CHECKING:
    from dpm_scales.data import ImageDataModule

SPLITS = ("train", "val", "all")
RUN_DATA = "data"
"""Name that selects the data set on which the model was trained."""


def open_images(
    place: str,
    key: str,
    split: str = "train",
    limit: int | None = None,
    model: Path | None = None,
    allow: Collection[str] = (),
) -> ImageSet:
    """Return the images at a place.

    Args:
        place: a folder, a .zip, .npy or .npz file, the folder, pattern or address of tar shards, the name of a file in
            `configs/data`, or "data".
        key: the option that gives the place, for messages.
        split: part of a data set, "train", "val" or "all"; ignored for files.
        limit: number of images to take, spread evenly; None for all.
        model: path of the model whose training data "data" selects.
        allow: packages whose classes the config of "data" may name besides dpm_scales.data.

    Raises: UserError for an unknown place, or one with fewer than two images.
    """
    require(split in SPLITS, f"unknown split {split!r}: {suggest(str(split), SPLITS)}")
    names = sorted(path.stem for path in (CONFIGS / "data").glob("*.yaml"))
    pictures: ImageSet
    if place == RUN_DATA:
        require(model is not None, f"{key}=data is the data of the model's run, and no model= was given")
        assert model is not None
        pictures = data_images(run_data(model, allow, key).source, split, f"data of {model}", limit)
    elif place in names:
        pictures = data_images(_named_data(place, key).source, split, place, limit)
    elif is_shards(place):
        pictures = FileImageSet(ShardStore(open_shards(place, Keys(), on_error="raise").shards), limit)
    elif Path(place).suffix.lower() in ARRAYS:
        array = ArraySource(place, val_fraction=0.0)
        pictures = DataImageSet(array, [array.train()], place, limit)
    else:
        if not Path(place).expanduser().exists():
            files = "a folder, a .zip, .npy or .npz file, the folder or address of tar shards"
            known = f"{files}, data (that of the model's run), {', '.join(names)}"
            raise UserError(f"{key}={place}: no such folder or file; allowed are {known}")
        pictures = FileImageSet(open_store(place), limit)
    require(len(pictures) >= 2, f"{key}={place}: needs 2 images or more, found {len(pictures)}")
    return pictures


def data_images(source: ImageSource, split: str, name: str, limit: int | None = None) -> DataImageSet:
    """Return the training images of a source, its validation images, or both. Raises UserError for another split."""
    require(split in SPLITS, f"unknown split {split!r}: {suggest(str(split), SPLITS)}")
    parts = {"train": [source.train], "val": [source.val], "all": [source.train, source.val]}[split]
    return DataImageSet(source, [part() for part in parts], f"{name}, split {split}", limit)


def run_data(model: Path, allow: Collection[str] = (), key: str = "reference") -> ImageDataModule:
    """Return the data set on which a model was trained.

    Args:
        model: run folder, or an export or a checkpoint in one.
        allow: packages whose classes the run's config may name besides dpm_scales.data.
        key: the option that needs it, for messages.

    Raises: UserError if the run's config.yaml is missing, or names a class that is not allowed.
    """
    for folder in (model, *model.parents[:2]):
        config = folder / "config.yaml"
        values = read_yaml(config) if config.is_file() else None
        if isinstance(values, dict) and isinstance(values.get("data"), dict):
            return _build_stored(values["data"], str(config), allow, key)
    raise UserError(f"{model} lies in no run folder, whose config.yaml would name the data; give {key}=DIR")


def _named_data(name: str, key: str) -> ImageDataModule:
    return _build(read_config(CONFIGS / "data" / f"{name}.yaml", key), name)


def _build_stored(settings: dict[str, Any], source: str, allow: Collection[str], key: str) -> ImageDataModule:
    """Return the data set in a run's config, which is downloaded only to the default folder."""
    usual = settings.get("root") == os.environ.get("DPM_SCALES_DATA", "data_cache")
    if "download" not in settings or usual:
        return _build(settings, source, allow, key)
    try:
        return _build({**settings, "download": False}, source, allow, key)
    except UserError as error:
        raise UserError(f"{source}: {error}; or name the data set or its folder: {key}=NAME_OR_DIR") from error


def _build(settings: Any, source: str, allow: Collection[str] = (), key: str = "reference") -> ImageDataModule:
    """Return the data set in a config. Raises UserError if it names a class that is not allowed, or holds objects."""
    from dpm_scales.data import ImageDataModule  # imports Lightning, which takes seconds

    allow, advice = trusted_names(allow), f"give {key}=DIR"
    check_target(settings.get("_target_"), f"{source}: the data's config", DATA_ROOMS, allow, advice)
    held = [node for value in settings.values() for node in walk_config(value, source)]
    for node in held:
        if isinstance(node, dict) and "_target_" in node:
            check_target(node["_target_"], f"{source}: the data's config", (), allow, advice)
    unresolved = any(isinstance(node, str) and "${" in node for node in held)
    keys = [settings.keys(), *(node.keys() for node in held if isinstance(node, dict))]
    hidden = any(str(key).startswith("_") for names in keys for key in names - {"_target_"})
    objects = not allow and any(isinstance(node, dict) for node in held)
    require(not (objects or unresolved or hidden), f"{source}: the data's config holds objects; {advice}")
    built: ImageDataModule = build(settings, ImageDataModule, f"{source}: data")
    built.prepare_data()
    return built
