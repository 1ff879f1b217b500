"""Models as files: `model.safetensors` + `config.yaml`, and checkpoints read without unpickling anything.

The config names classes of this package alone: a stranger's file can't make us import something else. It is checked
against `dpm_scales.` before anything is built from it.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import safetensors
import torch
import yaml
from hydra.utils import instantiate
from omegaconf import OmegaConf
from safetensors.torch import load_file, save
from torch import Tensor, nn

from dpm_scales.denoisers import Denoiser
from dpm_scales.errors import UserError, require, suggest
from dpm_scales.images import write_bytes, write_text
from dpm_scales.priors import Prior
from dpm_scales.samplers import Sampler

FORMAT = "dpm_scales model"
VERSION = 2
WEIGHTS = ("averaged", "raw")
#: parts of a model; each is a config with a `_target_` of this package
PARTS = ("process", "target", "network", "prior", "sampler")
ROOMS = ("processes", "schedules", "targets", "networks", "priors", "samplers")


@dataclass(frozen=True)
class Recipe:
    """All that is needed to build a model again: plain containers, as in `config.yaml`.

    Args:
        parts: configs of process, target, network, prior and sampler.
        channels, image_size: of the training images.
        num_classes: labels that the network was trained with, or None.
    """

    parts: dict[str, Any]
    channels: int
    image_size: tuple[int, int]
    num_classes: int | None = None
    class_names: tuple[str, ...] | None = None

    def to_dict(self) -> dict[str, Any]:
        image = {"channels": self.channels, "height": self.image_size[0], "width": self.image_size[1]}
        names = list(self.class_names) if self.class_names else None
        labels = {"num_classes": self.num_classes, "class_names": names}
        return {"format": FORMAT, "version": VERSION, "image": image, "labels": labels, **self.parts}

    @staticmethod
    def from_dict(values: Any, source: str) -> Recipe:
        """Raises UserError for anything that is not a recipe of this version."""
        if not isinstance(values, dict) or values.get("format") != FORMAT:
            raise UserError(f"{source} is not a dpm_scales model; give a run folder, its model/ folder or a checkpoint")
        if values.get("version") != VERSION:
            raise UserError(f"{source} has model format {values.get('version')!r}; this version reads {VERSION}")
        try:
            image, labels = values["image"], values["labels"]
            parts = {name: values[name] for name in PARTS}
            size = (int(image["height"]), int(image["width"]))
            names = labels["class_names"]
            recipe = Recipe(parts, int(image["channels"]), size, labels["num_classes"], tuple(names) if names else None)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{source}: the model's config is incomplete or damaged ({error!r})") from error
        _check_targets(parts, source)
        return recipe


@dataclass
class Model:
    """A trained (or fresh) model."""

    denoiser: Denoiser
    prior: Prior
    sampler: Sampler
    recipe: Recipe

    def modules(self) -> nn.ModuleDict:
        """Denoiser and prior under the names that exports and checkpoints use."""
        return nn.ModuleDict({"denoiser": self.denoiser, "prior": self.prior})


def build_model(recipe: Recipe, data_std: float = 0.5) -> Model:
    """Build a model with fresh weights. Raises UserError for parts that do not fit together."""
    parts = OmegaConf.create({name: recipe.parts[name] for name in PARTS})  # so that errors name the part

    def build(name: str, **arguments: Any) -> Any:
        return instantiate(parts[name], _convert_="all", **arguments)

    process = build("process")
    inputs = recipe.channels * (1 + process.context_channels)
    network = build("network", in_channels=inputs, out_channels=recipe.channels, num_classes=recipe.num_classes)
    target, prior, sampler = build("target"), build("prior"), build("sampler")
    if not isinstance(prior, Prior):
        prior = prior(process)
    if not isinstance(sampler, Sampler):
        sampler = sampler(process)
    denoiser = Denoiser(network, process, target, data_std)
    sampler.check(denoiser)
    return Model(denoiser, prior, sampler, recipe)


def save_model(folder: Path, model: Model, state: dict[str, Tensor] | None = None) -> None:
    """Write `model.safetensors` and `config.yaml` into `folder`, each whole or not at all."""
    state = model.modules().state_dict() if state is None else state
    tensors = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    folder.mkdir(parents=True, exist_ok=True)
    # one entry: several come in any order, and the same model should be the same bytes
    write_bytes(folder / "model.safetensors", save(tensors, metadata={"format": f"{FORMAT} {VERSION}"}))
    write_text(folder / "config.yaml", yaml.safe_dump(model.recipe.to_dict(), sort_keys=False))


def load_model(path: str | Path, weights: str = "averaged") -> Model:
    """A model from a run folder, an export folder or a checkpoint file, on the CPU, in evaluation mode.

    Args:
        weights: "averaged", or "raw" for the last step's weights, which only checkpoints hold.

    Raises: UserError if nothing is there, if it is not a model of ours, or if its weights do not fit its config.
    """
    path = Path(path)
    require(weights in WEIGHTS, f"unknown weights {weights!r}: {suggest(str(weights), WEIGHTS)}")
    require(path.exists(), f"no model at {path}: no such file or folder")
    tensors = path
    if path.is_dir():
        exports = [folder / "model.safetensors" for folder in (path / "model", path)]
        tensors = next((file for file in exports if file.is_file()), path / "checkpoints" / "last.ckpt")
        if weights == "raw":
            tensors = path / "checkpoints" / "last.ckpt"
            require(tensors.is_file(), f"raw weights are in checkpoints only, and there is no {tensors}")
        require(tensors.is_file(), f"no model in {path}: neither model/model.safetensors nor checkpoints/last.ckpt")
    if tensors.suffix == ".safetensors":
        require(weights != "raw", f"raw weights are in checkpoints only, not in {tensors}")
        return _load_export(tensors)
    return _load_checkpoint(tensors, weights)


def _load_export(tensors: Path) -> Model:
    config = tensors.with_name("config.yaml")
    require(config.is_file(), f"{tensors} has no config.yaml beside it")
    try:
        values = yaml.safe_load(config.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{config} is not YAML: {error}") from error
    try:
        state = load_file(tensors)
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f"{tensors} is not a safetensors file: {error}") from error
    return _with_weights(Recipe.from_dict(values, str(config)), state, str(tensors))


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint's plain containers and tensors; whatever else is in it is refused, never executed."""
    try:
        values = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise UserError(f"{path} is not a checkpoint of dpm_scales (it is damaged or holds foreign objects)") from error
    states = [values.get(key, {}) for key in ("state_dict", "current_model_state")] if isinstance(values, dict) else []
    plain_states = all(isinstance(state, dict) and all(isinstance(name, str) for name in state) for state in states)
    if not states or not plain_states or not {"state_dict", "recipe"} <= values.keys():
        raise UserError(f"{path} is not a checkpoint of dpm_scales")
    return values


def _load_checkpoint(path: Path, weights: str) -> Model:
    values = read_checkpoint(path)
    # with weight averaging, `state_dict` is the average and the raw weights lie apart
    state = values.get("current_model_state", values["state_dict"]) if weights == "raw" else values["state_dict"]
    state = {name.removeprefix("model."): value for name, value in state.items() if name.startswith("model.")}
    return _with_weights(Recipe.from_dict(values["recipe"], str(path)), state, str(path))


def _with_weights(recipe: Recipe, state: dict[str, Tensor], source: str) -> Model:
    try:
        model = build_model(recipe)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{source}: the model's config can't be built: {_cause(error)}") from error
    try:
        model.modules().load_state_dict(state)
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise UserError(f"{source}: the weights do not fit the config: {first}") from error
    model.modules().eval()
    return model


def _check_targets(value: Any, source: str) -> None:
    if isinstance(value, dict):
        for key, entry in value.items():
            if key == "_target_":
                _check_target(entry, source)
            elif str(key).startswith("_") and key != "_partial_":
                raise UserError(f"{source} holds the key {key!r}, which a model's config may not")
            else:
                _check_targets(entry, source)
    elif isinstance(value, list):
        for entry in value:
            _check_targets(entry, source)
    elif isinstance(value, str) and "${" in value:
        raise UserError(f"{source} holds the interpolation {value!r}; a model's config must be resolved")


def _check_target(name: Any, source: str) -> None:
    """Only what a room of the core itself defines: no import of others, nothing that a room imports from elsewhere."""
    parts = name.split(".") if isinstance(name, str) else []
    ours = len(parts) == 3 and parts[0] == "dpm_scales" and parts[1] in ROOMS
    require(ours, f"{source} asks for {name!r}; a model may only use the classes of dpm_scales")
    found = getattr(import_module(f"dpm_scales.{parts[1]}"), parts[2], None)
    defined_here = str(getattr(found, "__module__", "")).startswith(f"dpm_scales.{parts[1]}")
    require(callable(found) and defined_here, f"{source} asks for {name!r}, which this version of dpm_scales has not")


def _cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def plain(config: Any) -> Any:
    """An OmegaConf node as plain containers, resolved: what checkpoints may hold."""
    return OmegaConf.to_container(config, resolve=True) if OmegaConf.is_config(config) else config


def with_sampler(model: Model, sampler: Any) -> Model:
    """The model with another sampler (a config), checked against its denoiser."""
    built = instantiate(sampler, _convert_="all")
    if not isinstance(built, Sampler):
        built = built(model.denoiser.process)
    built.check(model.denoiser)
    parts = {**model.recipe.parts, "sampler": plain(sampler)}
    return replace(model, sampler=built, recipe=replace(model.recipe, parts=parts))
