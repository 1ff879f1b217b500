"""Train from Python: `train` composes the options of the command line from its arguments, and does the same run."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torch.utils.data import Dataset

from dpm_scales.cli.composed import composed
from dpm_scales.data import ImageDataModule, ImageSource
from dpm_scales.data.given import given_data
from dpm_scales.describe import Configured, Describable, DescriptionError, describe
from dpm_scales.errors import require, require_number, suggest
from dpm_scales.models.checksums import read_tensors
from dpm_scales.models.instantiate import CONFIGS, build, defaults_of, plain
from dpm_scales.models.model import PARTS, Model
from dpm_scales.shards.places import is_shards
from dpm_scales.training.module import MOST_STEPS
from dpm_scales.training.reporting import MetricsFile
from dpm_scales.training.run import train_model
from dpm_scales.training.run_folder import trusted_data
from dpm_scales.training.settings import check_keys, check_numbers
from dpm_scales.training.trainer import silence_lightning

Images = Tensor | np.ndarray | str | Path | Dataset[Any] | ImageSource | ImageDataModule
#: options that are determined by the arguments of `train`, with the reason
FIXED = {
    **dict.fromkeys((*PARTS, "conditional", "label_dropout"), "it follows from the model"),
    "run_dir": "it is an argument of its own",
    "resume": "give run_dir=",
    "allow": "classes given in Python are trusted",
    "check_resume": "it is an option of the command line alone",
    "trainer.max_steps": "give steps=",
}


@dataclass(frozen=True)
class Losses:
    """The losses of a run, by the number of preceding steps, as in metrics.csv.

    Attributes:
        train: losses of single batches, every `trainer.log_every_n_steps` steps.
        val: means over the validation images, always with the same noise; empty if none are held out.
    """

    train: dict[int, float]
    val: dict[int, float]


def train(
    model: Model,
    images: Images,
    steps: int = 2000,
    run_dir: str | Path | None = None,
    *,
    labels: Tensor | np.ndarray | Sequence[int] | None = None,
    progress: bool = True,
    **options: Any,
) -> Losses:
    """Train a model in place; afterwards it has the EMA weights and is in evaluation mode, on its original device.

    Args:
        model: the model.
        images: a uint8 tensor or array ``(N, C, H, W)``; a folder or .zip file of images, or a .npy or .npz file; the
            folder, pattern or address of tar shards, with labels .cls; a torch data set, whose items are uint8 tensors
            or PIL images, alone or with a label; an `ImageSource`; or an `ImageDataModule`.
        steps: total number of steps.
        run_dir: folder of the run, with the files of `train.py`; an existing run is resumed. None for a temporary one.
        labels: labels of a tensor's images, integers ``(N,)``.
        progress: whether to show a progress bar.
        options: those of `train.py`. Sections are mappings, ``optimizer={"learning_rate": 1e-4}``; a string chooses a
            config, ``logger="tensorboard"``; objects are allowed too, ``weight=MinSNR()``.

    Returns: the losses of the whole run.

    Raises:
        UserError: images or options that can't be used, a folder that can't be resumed, or a diverged run.
        KeyboardInterrupt: after Ctrl-C; a checkpoint is written first.
    """
    require(isinstance(model, Model), f"model must be a Model, got {type(model).__name__}")
    require_number("steps", steps, 1, MOST_STEPS, whole=True)
    data_settings, given = _data_settings(model, images, labels, dict(options.pop("data", {})))
    choices, values = _split(options)
    values += [("trainer.max_steps", steps), ("trainer.enable_progress_bar", bool(progress))]
    cfg, overrides = _config(model, data_settings, choices, values)
    temporary = tempfile.TemporaryDirectory() if run_dir is None else nullcontext(str(run_dir))
    with temporary as place, torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        silence_lightning()
        folder = Path(place)
        cfg.run_dir = str(folder)
        check_keys(cfg)
        check_numbers(cfg)
        data = _data(cfg, folder, given)
        data.prepare_data()
        _check_data(model, data)
        names = data.source.class_names
        if model.recipe.num_classes is not None and model.recipe.class_names is None and names:
            model.recipe = replace(model.recipe, class_names=tuple(names))
        model.train()
        device, again = model.device, f"ds.train(model, images, run_dir={str(folder)!r})"
        try:
            done = train_model(cfg, folder, overrides, model, data, again)
        except SystemExit as end:
            raise KeyboardInterrupt(f"stopped; resume with {again}") from end
        state = done.state
        if state is None and (file := folder / "model" / "model.safetensors").is_file():
            state = read_tensors(file)
        model.to(memory_format=torch.contiguous_format)
        if state is not None:
            model.load_state_dict(state)
        model.recipe = done.model.recipe
        model.to(device).eval()
        metrics = MetricsFile(folder / "metrics.csv")
        return Losses(metrics.column("train/loss"), metrics.column("val/loss"))


# --- data -------------------------------------------------------------------------------------------------------------


def _data_settings(model: Model, images: Any, labels: Any, options: dict[str, Any]) -> tuple[Any, Any]:
    """Return the section `data` of the config, with `options`, and the data that a config can't hold.

    Returns: the name of a config and its options, or settings; and the data module, the arguments of `given_data`, or
        None.
    Raises: UserError for images of an unknown kind.
    """
    recipe = model.recipe
    path = isinstance(images, str | Path)
    require(labels is None or isinstance(images, Tensor | np.ndarray), "labels= are for tensors of images")
    if path and str(images).endswith((".npy", ".npz")):
        return ("array", {"path": str(images), **options}), None
    if path and is_shards(str(images)):
        kind = {"labels": "cls"} if recipe.num_classes is not None else {}
        size = {"root": str(images), "channels": recipe.channels, "image_size": list(recipe.image_size)}
        return ("webdataset", {**size, **kind, **options}), None
    if path:
        require(Path(images).exists(), f"{images}: no such file or folder of images")
        kind = {"labels": "folder"} if recipe.num_classes is not None else {}
        size = {"root": str(images), "channels": recipe.channels, "image_size": list(recipe.image_size)}
        return ("folder", {**size, **kind, **options}), None
    if isinstance(images, ImageDataModule):
        require(not options, f"data={options}: give these to the ImageDataModule itself")
        return _described(images), images
    own = {name: value for name, value in defaults_of(given_data).items() if name in _GIVEN_OPTIONS}
    if isinstance(images, ImageSource):
        batches = {name: value for name, value in own.items() if name in _BATCH_OPTIONS}
        settings = _with_options(batches, options)
        return _described(data := ImageDataModule(images, **settings)), data
    require(
        isinstance(images, Tensor | np.ndarray) or hasattr(images, "__getitem__"),
        f"images must be a tensor, a folder, a data set, an ImageSource or an ImageDataModule, got {images!r:.100}",
    )
    settings = {"_target_": "dpm_scales.data.given_data", **_with_options(own, options)}
    return settings, {"images": images, "labels": labels, "num_classes": recipe.num_classes}


_BATCH_OPTIONS = ("batch_size", "num_workers", "seed", "pin_memory", "drop_last", "decoded", "on_device")
_GIVEN_OPTIONS = ("val_fraction", "split_seed", "random_flip", *_BATCH_OPTIONS)


def _with_options(defaults: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    for name in options:
        require(name in defaults, f"unknown option 'data.{name}': {suggest(name, defaults)}")
    return {**defaults, **options}


def _described(data: ImageDataModule) -> dict[str, Any]:
    """Return the config of a data module, or one that can't be rebuilt if some of its parts can't be described."""
    try:
        found: dict[str, Any] = describe(data)
        return found
    except DescriptionError:
        return {"_target_": "dpm_scales.data.given_data", "batch_size": data.batch_size, "seed": data.seed}


def _data(cfg: DictConfig, run_dir: Path, given: Any) -> ImageDataModule:
    """Return the data module: the one passed by the user, or that of the config."""
    settings = trusted_data(cfg, run_dir)
    if isinstance(given, ImageDataModule):
        return given
    if given is not None:
        settings.pop("_target_")
        return given_data(**given, **settings)
    made: ImageDataModule = build(settings, ImageDataModule, "data")
    return made


def _check_data(model: Model, data: ImageDataModule) -> None:
    """Raise UserError unless the data have the model's image size, channels and number of classes."""
    recipe = model.recipe
    ours, theirs = ((r.channels, *r.image_size) for r in (recipe, data))
    ok = ours == theirs
    require(ok, f"images have (channels, height, width) = {theirs}, and the model {ours}; make the model for them")
    classes = recipe.num_classes
    if classes is not None:
        have = data.num_classes
        require(have is not None, f"the model has num_classes={classes}, and the images have no labels; give labels=")
        require(have == classes, f"the model has num_classes={classes}, and the images have labels of {have} classes")


# --- options ----------------------------------------------------------------------------------------------------------


def _split(options: Mapping[str, Any]) -> tuple[dict[str, Any], list[tuple[str, Any]]]:
    """Return the config chosen for each group, as a name or an object, and the other options with dotted keys."""
    choices, values = {}, []
    for key, value in options.items():
        is_object = isinstance(value, Describable | Configured) or (isinstance(value, dict) and "_target_" in value)
        if is_object or (isinstance(value, str) and (CONFIGS / key).is_dir()):
            choices[key] = value
        else:
            values += list(_leaves(value, key))
    for key in (*choices, *(key for key, _ in values)):
        for fixed, reason in FIXED.items():
            require(not f"{key}.".startswith(f"{fixed}."), f"{key} is no option of ds.train: {reason}")
    return choices, values


def _leaves(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for name, entry in value.items():
            yield from _leaves(entry, f"{key}.{name}")
    else:
        yield key, describe(value)


def _config(
    model: Model, data: Any, choices: dict[str, Any], values: list[tuple[str, Any]]
) -> tuple[DictConfig, list[str]]:
    """Return the config of a run, and the overrides of configs/train.yaml that produce it."""
    recipe, overrides = model.recipe, []
    base = composed("train", [])
    for key, value in choices.items():
        overrides += [f"{key}={value}"] if isinstance(value, str) else _replaced(key, describe(value))
    for part in PARTS:
        settings = recipe.parts[part]
        if settings != plain(base[part]):
            overrides += _replaced(part, settings)
    if recipe.num_classes is not None:
        overrides.append("conditional=true")
        if recipe.label_dropout != base.label_dropout:
            overrides.append(f"label_dropout={recipe.label_dropout}")
    if isinstance(data, tuple):
        name, settings = data
        overrides.append(f"data={name}")
        values = [*_leaves(settings, "data"), *values]
    else:
        overrides += _replaced("data", data)
    chosen = composed("train", overrides)
    for key, value in values:
        _require_known(chosen, key)
        if plain(OmegaConf.select(chosen, key, throw_on_missing=False)) != value:
            overrides.append(f"{key}={_text(value)}")
    return composed("train", overrides), overrides


def _require_known(cfg: DictConfig, key: str) -> None:
    """Raise UserError unless the config has the key, at each of its levels."""
    parent, names = "", key.split(".")
    for name in names:
        node = OmegaConf.select(cfg, parent) if parent else cfg
        full = f"{parent}.{name}".lstrip(".")
        held = [f"{parent}.{other!s}".lstrip(".") for other in node] if OmegaConf.is_dict(node) else []
        known = suggest(full, held) if held else f"{parent} has no options"
        require(full in held, f"unknown option {full!r}: {known}")
        parent = full


def _replaced(key: str, settings: Any) -> list[str]:
    """Return the overrides that put an object's config in place of the one at `key`."""
    return [f"~{key}", f"+{key}={_text(settings)}"]


def _text(value: Any) -> str:
    """Return plain containers in Hydra's grammar of overrides."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        text = value.replace("\\'", "\\\\'").replace("'", "\\'")
        return f"'{text}'"
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{_text(entry)}" for key, entry in value.items()) + "}"
    return "[" + ",".join(map(_text, value)) + "]" if isinstance(value, list) else repr(value)
