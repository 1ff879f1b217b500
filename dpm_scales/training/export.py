"""Models as files: `model.safetensors` + `config.yaml`, and checkpoints read without unpickling anything.

The config names classes of this package alone: a stranger's file can't make us import something else. It is checked
against `dpm_scales.` before anything is built from it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor, nn

from dpm_scales.denoisers import Denoiser
from dpm_scales.errors import OutOfMemoryError, UserError, require, suggest
from dpm_scales.images import write_text
from dpm_scales.memory import lacks_memory
from dpm_scales.priors import Prior
from dpm_scales.processes import Process
from dpm_scales.samplers import Sampler
from dpm_scales.targets import Target
from dpm_scales.training.building import build, cause, nodes, plain, root
from dpm_scales.training.reading import read_yaml
from dpm_scales.training.sealed import (
    FORMAT,
    VERSION,
    DamagedFileError,
    checkpoint_step,
    read_checkpoint,
    read_tensors,
    write_tensors,
)
from dpm_scales.training.weights_fit import MisfitError, not_finite, require_dtypes, require_fit, within_memory

WEIGHTS = ("averaged", "raw")
#: parts of a model; each is a config with a `_target_` of this package
PARTS = ("process", "target", "network", "prior", "sampler")
MAX_SIDE = 2**20
ROOMS = ("processes", "schedules", "targets", "networks", "priors", "samplers")


@dataclass(frozen=True)
class Recipe:
    """All that is needed to build a model again: plain containers, as in `config.yaml`.

    Args:
        parts: configs of process, target, network, prior and sampler.
        channels, image_size: of the training images.
        num_classes: labels that the network was trained with, or None.
        label_dropout: share of the labels that training left out, so that the network knows "no label" too.
    """

    parts: dict[str, Any]
    channels: int
    image_size: tuple[int, int]
    num_classes: int | None = None
    class_names: tuple[str, ...] | None = None
    label_dropout: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        image = {"channels": self.channels, "height": self.image_size[0], "width": self.image_size[1]}
        names = list(self.class_names) if self.class_names else None
        labels: dict[str, Any] = {"num_classes": self.num_classes, "class_names": names}
        if self.label_dropout > 0:  # files without it are of models trained without
            labels["label_dropout"] = self.label_dropout
        return {"format": FORMAT, "version": VERSION, "image": image, "labels": labels, **self.parts}

    @staticmethod
    def from_dict(values: Any, source: str) -> Recipe:
        """Raises UserError for anything that is not a recipe of this version."""
        if not isinstance(values, dict) or values.get("format") != FORMAT:
            raise UserError(f"{source} is not a dpm_scales model; give a run folder, its model/ folder or a checkpoint")
        if values.get("version") != VERSION:
            raise UserError(f"{source} has model format {values.get('version')!r}; this version reads {VERSION}")
        _check_targets(values, source)
        try:
            image, labels = values["image"], values["labels"]
            parts = {name: values[name] for name in PARTS}
            size = (int(image["height"]), int(image["width"]))
            names = labels["class_names"] or None
            if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
                raise ValueError("class_names are no list of names")
            dropout = float(labels.get("label_dropout", 0.0))
            if not 0 <= dropout < 1:
                raise ValueError(f"label_dropout={dropout}")
            names = None if names is None else tuple(names)
            recipe = Recipe(parts, int(image["channels"]), size, labels["num_classes"], names, dropout)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise UserError(f"{source}: the model's config is incomplete or damaged ({error!r})") from error
        sides = (recipe.channels, *recipe.image_size)
        require(all(0 < side <= MAX_SIDE for side in sides), f"{source}: the model's images can't be {sides}")
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


def build_model(recipe: Recipe, data_std: float = 0.5, weights: Mapping[str, Tensor] | None = None) -> Model:
    """Build a model with fresh weights.

    Args:
        data_std: as in `Denoiser`.
        weights: that the model is to be given, by the names of `Model.modules`: its network is compared with them
            before memory is taken for it.

    Raises: UserError for parts that do not fit together, MisfitError for weights of another network, OutOfMemoryError
    for a network larger than the machine's memory.
    """
    parts = recipe.parts
    process = build(parts["process"], Process, "process")
    inputs = recipe.channels * (1 + process.context_channels)
    given = {"in_channels": inputs, "out_channels": recipe.channels, "num_classes": recipe.num_classes}
    make = partial(build, parts["network"], nn.Module, "network", given=given)
    if weights is not None:
        require_fit(make, weights, "denoiser.network.")
    with within_memory("this network"):
        network = make()
    trainable = any(parameter.requires_grad for parameter in network.parameters())
    require(trainable, f"network: {type(network).__name__} has no weights to train")
    target = build(parts["target"], Target, "target")
    prior = build(parts["prior"], Prior, "prior", {"process": process})
    prior.check(process)
    denoiser = Denoiser(network, process, target, data_std)
    sampler = build(parts["sampler"], Sampler, "sampler", {"denoiser": denoiser})
    sampler.check(denoiser)
    return Model(denoiser, prior, sampler, recipe)


def save_model(folder: Path, model: Model, state: dict[str, Tensor] | None = None) -> None:
    """Write `model.safetensors` and `config.yaml` into `folder`, each whole or not at all.

    Raises: UserError, and writes nothing, if a weight is not finite.
    """
    state = model.modules().state_dict() if state is None else state
    bad = not_finite(state)
    require(
        bad is None,
        f"the model is not exported to {folder}: {bad} is not finite, so training has diverged; go back to an earlier "
        "checkpoint, or train again with a lower optimizer.learning_rate",
    )
    tensors = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    write_tensors(folder / "model.safetensors", tensors)
    write_text(folder / "config.yaml", yaml.safe_dump(model.recipe.to_dict(), sort_keys=False))


def load_model(path: str | Path, weights: str = "averaged") -> Model:
    """A model from a run folder, an export folder or a checkpoint file, on the CPU, in evaluation mode.

    Args:
        weights: "averaged", or "raw" for the last step's weights, which only checkpoints hold.

    Raises: UserError if nothing is there, if it is not a model of ours, or if its weights are not finite or do not fit
    its config.
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
    recipe = Recipe.from_dict(read_yaml(config), str(config))
    with _offering(tensors.parent.parent / "checkpoints"):
        state = read_tensors(tensors)
    return _with_weights(recipe, state, str(tensors))


def checkpoints(folder: Path) -> list[Path]:
    """All checkpoints in a folder: `last.ckpt`, then the others, later steps first; empty if there are none."""
    others = [path for path in folder.glob("*.ckpt") if path.name != "last.ckpt" and not path.name.startswith(".")]
    others.sort(key=lambda path: (-(checkpoint_step(path) or 0), path.name))
    return [path for path in (folder / "last.ckpt", *others) if path.is_file()]


@contextmanager
def _offering(folder: Path) -> Iterator[None]:
    """The message about a damaged file names a checkpoint in `folder` that is whole, if there is one."""
    try:
        yield
    except DamagedFileError as error:
        whole = next((path for path in checkpoints(folder) if _is_whole(path)), None)
        if whole is None:
            raise
        raise DamagedFileError(f"{error}; {whole} (step {checkpoint_step(whole)}) is whole") from error


def _is_whole(path: Path) -> bool:
    try:
        read_checkpoint(path)
    except UserError:
        return False
    return True


def _load_checkpoint(path: Path, weights: str) -> Model:
    with _offering(path.parent):
        values = read_checkpoint(path)
    # with weight averaging, `state_dict` is the average and the raw weights lie apart
    state = values.get("current_model_state", values["state_dict"]) if weights == "raw" else values["state_dict"]
    state = {name.removeprefix("model."): value for name, value in state.items() if name.startswith("model.")}
    return _with_weights(Recipe.from_dict(values["recipe"], str(path)), state, str(path))


def _with_weights(recipe: Recipe, state: dict[str, Tensor], source: str) -> Model:
    try:
        model = build_model(recipe, weights=state)
        require_dtypes(state, model.modules().state_dict())
        model.modules().load_state_dict(state)
    except Exception as error:
        raise _refused(error, source) from error
    bad = not_finite(state)
    require(bad is None, f"{source}: the weights are not finite ({bad}): training has diverged; choose another model")
    model.modules().eval()
    return model


def _refused(error: Exception, source: str) -> UserError:
    """The line for a model that could not be built and given its weights."""
    first = root(error)
    if isinstance(first, OutOfMemoryError) or lacks_memory(first) is not None:
        return OutOfMemoryError(f"{source}: the model needs more memory than there is: {cause(error)}")
    if isinstance(first, MisfitError):
        return UserError(f"{source}: the weights do not fit the config: {first}")
    if str(first).startswith("Error(s) in loading state_dict"):
        lines = str(first).splitlines()
        return UserError(f"{source}: the weights do not fit the config: {lines[min(1, len(lines) - 1)].strip()}")
    return UserError(f"{source}: the model's config can't be built: {cause(error)}")


def _check_targets(value: Any, source: str) -> None:
    """Raise UserError unless a config is plain, resolved, and names classes of the core alone."""
    for node in nodes(value, source):
        if isinstance(node, dict):
            for key, entry in node.items():
                if key == "_target_":
                    check_target(entry, source)
                elif str(key).startswith("_") and key != "_partial_":
                    raise UserError(f"{source} holds the key {key!r}, which a model's config may not")
        elif isinstance(node, str) and "${" in node:
            raise UserError(f"{source} holds the interpolation {node!r}; a model's config must be resolved")
        elif not isinstance(node, str | int | float | bool | list | tuple | None):
            raise UserError(f"{source} holds a {type(node).__name__}, which a model's config may not")


def check_target(name: Any, source: str) -> None:
    """Only what a room of the core itself defines: no import of others, nothing that a room imports from elsewhere."""
    parts = name.split(".") if isinstance(name, str) else []
    ours = len(parts) == 3 and parts[0] == "dpm_scales" and parts[1] in ROOMS
    require(ours, f"{source} asks for {name!r}; a model may only use the classes of dpm_scales")
    found = getattr(import_module(f"dpm_scales.{parts[1]}"), parts[2], None)
    defined_here = str(getattr(found, "__module__", "")).startswith(f"dpm_scales.{parts[1]}")
    require(callable(found) and defined_here, f"{source} asks for {name!r}, which this version of dpm_scales has not")


def with_sampler(model: Model, sampler: Any) -> Model:
    """The model with another sampler (a config), checked against its denoiser."""
    built = build(sampler, Sampler, "sampler", {"denoiser": model.denoiser})
    built.check(model.denoiser)
    parts = {**model.recipe.parts, "sampler": plain(sampler)}
    return replace(model, sampler=built, recipe=replace(model.recipe, parts=parts))
