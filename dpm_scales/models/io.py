"""Save and load models: `model.safetensors` + `config.yaml`, and checkpoints, read without unpickling any object.

The config may only name classes of this package and of packages that the user trusts: it is checked by
`models.trust` before anything is imported or built.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor, nn

from dpm_scales.covariance import ErrorVariance
from dpm_scales.denoisers import Denoiser
from dpm_scales.errors import OutOfMemoryError, UserError, require, suggest
from dpm_scales.memory import lacks_memory
from dpm_scales.models.checksums import (
    DamagedFileError,
    read_checkpoint,
    read_tensors,
    write_tensors,
)
from dpm_scales.models.export import digest_in, read_covariance, save_covariance, save_model
from dpm_scales.models.from_diffusers import is_diffusers, read_pipeline
from dpm_scales.models.hub import fetch, is_on_hub
from dpm_scales.models.instantiate import root_cause, root_cause_line
from dpm_scales.models.model import Model, Recipe, build_denoiser, build_sampler
from dpm_scales.models.post_hoc import Reconstruction, reconstruction
from dpm_scales.models.seals import checkpoint_step
from dpm_scales.models.trust import foreign_packages, trusted_names
from dpm_scales.models.weights_fit import MisfitError, not_finite, require_dtypes
from dpm_scales.storage import new_folder, read_yaml, write_text

__all__ = ["WEIGHTS", "checkpoints", "export_model", "load_model", "require_finite_weights", "save_model"]

WEIGHTS = ("averaged", "raw")
MEASURING = {"_target_": "dpm_scales.samplers.Ancestral"}


@dataclass(frozen=True)
class _Wanted:
    """The caller's settings that replace those in the file, see `load_model`, and whether a covariance is read."""

    allow: Collection[str] = ()
    sampler: Mapping[str, Any] | None = None
    steps: int | None = None
    covariance: bool = True
    ema: float | None = None
    ema_step: int | None = None

    def recipe(self, values: Any, source: str) -> Recipe:
        """Return the recipe in a file, without its sampler if the caller gives another."""
        if self.sampler is not None and isinstance(values, dict) and "sampler" in values:
            values = {**values, "sampler": None}  # not built, so its class need not be trusted
        return Recipe.from_dict(values, source, self.allow)

    def average(self, path: Path, weights: str) -> Reconstruction | None:
        """Return the average that the caller chose from the run at `path`; None for the exported one."""
        return chosen_average(path, weights, self.ema, self.ema_step)

    def with_sampler(self, recipe: Recipe) -> Recipe:
        """Return the recipe with the caller's sampler and steps."""
        settings = recipe.parts["sampler"] if self.sampler is None else dict(self.sampler)
        if self.steps is not None and isinstance(settings, dict):
            settings = {**settings, "steps": self.steps}
        return replace(recipe, parts={**recipe.parts, "sampler": settings})


def load_model(
    path: str | Path,
    weights: str = "averaged",
    *,
    allow: Collection[str] = (),
    sampler: Mapping[str, Any] | None = None,
    steps: int | None = None,
    ema: float | None = None,
    ema_step: int | None = None,
) -> Model:
    """Return the model of a run folder, an export folder or a checkpoint file, on the CPU, in evaluation mode.

    Args:
        path: one of these; ``hf://owner/name[@revision]``, a model on the Hugging Face Hub; or a folder that diffusers
            wrote, a pipeline of `UNet2DModel`, see `models.from_diffusers`.
        weights: "averaged", or "raw" for the weights of the last step, which only checkpoints hold.
        allow: packages, modules or classes that you trust, such as ``["mynet"]``: besides those of dpm_scales, the
            model may name their classes, which are then imported.
        sampler: config of a sampler that replaces the model's own.
        steps: number of steps of the sampler; None for its own.
        ema: length, as a share of the run, of the power-function average of the weights to reconstruct from the
            snapshots in a run folder; None for the average that the run exported.
        ema_step: step of the snapshot at which this average ends; None for the last.

    Raises: UserError if there is no model, if it names a class that is not allowed, if its weights are not finite or do
    not fit its config, or if its snapshots do not give the average.
    """
    return _loaded(path, weights, _Wanted(trusted_names(allow), sampler, steps, ema=ema, ema_step=ema_step))


def load_to_measure(folder: Path, allow: Collection[str] = ()) -> Model:
    """Return the model of an export folder with a sampler that needs no covariance; a stored one is not read.

    Args:
        folder, allow: as in `load_model`.

    Raises: as `load_model`.
    """
    return _loaded(folder, WEIGHTS[0], _Wanted(trusted_names(allow), MEASURING, covariance=False))


def _loaded(path: str | Path, weights: str, wanted: _Wanted) -> Model:
    require(weights in WEIGHTS, f"unknown weights {weights!r}: {suggest(str(weights), WEIGHTS)}")
    path = _local(path)
    average = wanted.average(path, weights)
    if path.is_dir() and not _has_model(path) and is_diffusers(path):
        require(weights != "raw", f"raw weights are in checkpoints only, not in {path}")
        return _with_weights(*read_pipeline(path), str(path), wanted)
    tensors = _weights_file(path, weights)
    if tensors.suffix == ".safetensors":
        recipe = wanted.recipe(*_exported_recipe(tensors))  # before its weights are read
        state = _exported_weights(tensors)
        table = read_covariance(tensors.parent) if wanted.covariance else None
    else:
        state, values = _checkpointed(tensors, weights)
        recipe, table = wanted.recipe(values, str(tensors)), None
    state = state if average is None else average.replace_in(state)
    return _with_weights(recipe, state, str(tensors), wanted, table)


def chosen_average(
    path: str | Path, weights: str, ema: float | None, ema_step: int | None = None, prefix: str = ""
) -> Reconstruction | None:
    """Return the average that the options of a command choose, None for the one that the run exported.

    Args:
        path, weights, ema, ema_step: as in `load_model`.
        prefix: prefix of the options' names in messages.

    Raises: UserError as `reconstruction`, and for options that exclude each other.
    """
    if ema is None:
        require(ema_step is None, f"{prefix}ema_step={ema_step} ends the average of {prefix}ema=LENGTH; add that")
        return None
    require(weights == WEIGHTS[0], f"{prefix}ema={ema} is an average, and {prefix}weights={weights}; leave one out")
    return reconstruction(_local(path), ema, ema_step, prefix)


def export_model(
    path: str | Path,
    folder: Path,
    weights: str = "averaged",
    ema: float | None = None,
    ema_step: int | None = None,
) -> tuple[Path, list[str]]:
    """Copy a model into a new folder, as `load_model` reads it, with its `covariance.safetensors` if it has one.

    Nothing is built, so classes of other packages are neither imported nor checked.

    Args:
        path, weights, ema, ema_step: as in `load_model`; a folder of diffusers is refused.
        folder: created with all files or not at all.

    Returns: the file or folder that held the weights, and the packages whose classes the model uses.

    Raises: UserError if there is no model, if its weights are damaged or not finite, or if `folder` exists and is not
    empty.
    """
    require(weights in WEIGHTS, f"unknown weights {weights!r}: {suggest(str(weights), WEIGHTS)}")
    place = _local(path)
    average = chosen_average(place, weights, ema, ema_step)
    tensors = _weights_file(place, weights)
    if tensors.suffix == ".safetensors":
        values, source = _exported_recipe(tensors)
        state, table = _exported_weights(tensors), read_covariance(tensors.parent)
    else:
        state, values = _checkpointed(tensors, weights)
        source, table = str(tensors), None
    state = state if average is None else average.replace_in(state)
    packages = foreign_packages(values)
    if not packages:
        Recipe.from_dict(values, source)
    require_finite_weights(state, source)
    with new_folder(folder) as made:
        write_tensors(made / "model.safetensors", {name: value.contiguous() for name, value in state.items()})
        write_text(made / "config.yaml", yaml.safe_dump(values, sort_keys=False))
        if table is not None and table.weights_sha256 == digest_in(state):
            save_covariance(made, table)
    return tensors if average is None else average.folder, packages


def export_folder(path: str | Path) -> Path:
    """Return the folder that holds the `model.safetensors` of an exported model, where more files can be put.

    Args:
        path: a run folder or an export.

    Raises: UserError for other models, and if there is none.
    """
    found = Path(path)
    beside = "copy it into a folder first: dpm-scales runs export MODEL out=DIR"
    require(not is_on_hub(path), f"{path} is on the Hub, and its files lie in a cache; {beside}")
    tensors = _weights_file(_local(found), WEIGHTS[0])
    require(tensors.suffix == ".safetensors", f"{tensors} is a checkpoint, which holds no further tables; {beside}")
    return tensors.parent


def _local(path: str | Path) -> Path:
    """Return the path of a model on this machine, fetched from the Hub if it lies there. Raises UserError."""
    found = fetch(str(path)) if is_on_hub(path) else Path(path)
    require(found.exists(), f"no model at {found}: no such file or folder")
    return found


def _weights_file(path: Path, weights: str) -> Path:
    """Return the file that holds the weights of a run folder, an export folder or a checkpoint. Raises UserError."""
    tensors = path
    if path.is_dir():
        tensors = next((file for file in _exports(path) if file.is_file()), path / "checkpoints" / "last.ckpt")
        if weights == "raw":
            tensors = path / "checkpoints" / "last.ckpt"
            require(tensors.is_file(), f"raw weights are in checkpoints only, and there is no {tensors}")
        require(tensors.is_file(), f"no model in {path}: neither model/model.safetensors nor checkpoints/last.ckpt")
    is_export = tensors.suffix == ".safetensors"
    require(not (is_export and weights == "raw"), f"raw weights are in checkpoints only, not in {tensors}")
    return tensors


def _exports(folder: Path) -> list[Path]:
    return [place / "model.safetensors" for place in (folder / "model", folder)]


def _has_model(folder: Path) -> bool:
    return any(path.is_file() for path in (*_exports(folder), folder / "checkpoints" / "last.ckpt"))


def _exported_recipe(tensors: Path) -> tuple[Any, str]:
    """Return the content of the config beside exported weights, unchecked, and the config's path."""
    config = tensors.with_name("config.yaml")
    require(config.is_file(), f"{tensors} has no config.yaml beside it")
    return read_yaml(config), str(config)


def _exported_weights(tensors: Path) -> dict[str, Tensor]:
    with _offering(tensors.parent.parent / "checkpoints"):
        return read_tensors(tensors)


def _checkpointed(path: Path, weights: str) -> tuple[dict[str, Tensor], Any]:
    """Return the weights in a checkpoint, named as in `Model.state_dict`, and its recipe, unchecked."""
    with _offering(path.parent):
        values = read_checkpoint(path)
    # with weight averaging, `state_dict` holds the average and the raw weights are separate
    state = values.get("current_model_state", values["state_dict"]) if weights == "raw" else values["state_dict"]
    state = {name.removeprefix("model."): value for name, value in state.items() if name.startswith("model.")}
    return state, values["recipe"]


def checkpoints(folder: Path) -> list[Path]:
    """Return all checkpoints in a folder: `last.ckpt`, then the others from the latest step to the earliest."""
    others = [path for path in folder.glob("*.ckpt") if path.name != "last.ckpt" and not path.name.startswith(".")]
    others.sort(key=lambda path: (-(checkpoint_step(path) or 0), path.name))
    return [path for path in (folder / "last.ckpt", *others) if path.is_file()]


@contextmanager
def _offering(folder: Path) -> Iterator[None]:
    """Add the name of an intact checkpoint in `folder`, if there is one, to a DamagedFileError raised in the body."""
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


def _with_weights(
    recipe: Recipe,
    state: dict[str, Tensor],
    source: str,
    wanted: _Wanted,
    table: ErrorVariance | None = None,
) -> Model:
    try:
        denoiser, prior = build_denoiser(recipe, weights=state)
        modules = nn.ModuleDict({"denoiser": denoiser, "prior": prior})
        require_dtypes(state, modules.state_dict())
        modules.load_state_dict(state)
    except Exception as error:
        raise _refused(error, source) from error
    require_finite_weights(state, source)
    denoiser.error_variance = table  # perhaps for other weights: a sampler that uses it checks
    asked = wanted.with_sampler(recipe)
    try:
        sampler = build_sampler(asked.parts["sampler"], denoiser)
    except Exception:
        if wanted.sampler is None:
            _require_sampler(recipe, denoiser, source)
        raise
    return Model.of(denoiser, prior, sampler, asked).eval()


def require_finite_weights(state: dict[str, Tensor], source: str) -> None:
    """Raise UserError, naming the file, if a weight is not finite."""
    bad = not_finite(state)
    require(bad is None, f"{source}: the weights are not finite ({bad}): training has diverged; choose another model")


def _require_sampler(recipe: Recipe, denoiser: Denoiser, source: str) -> None:
    """Raise UserError, naming the file, unless its own sampler can be built."""
    try:
        build_sampler(recipe.parts["sampler"], denoiser)
    except Exception as error:
        raise _refused(error, source) from error


def _refused(error: Exception, source: str) -> UserError:
    """Return the error for a model that could not be built or loaded with its weights."""
    first = root_cause(error)
    if isinstance(first, OutOfMemoryError) or lacks_memory(first) is not None:
        return OutOfMemoryError(f"{source}: the model needs more memory than there is: {root_cause_line(error)}")
    if isinstance(first, MisfitError):
        return UserError(f"{source}: the weights do not fit the config: {first}")
    if str(first).startswith("Error(s) in loading state_dict"):
        lines = str(first).splitlines()
        return UserError(f"{source}: the weights do not fit the config: {lines[min(1, len(lines) - 1)].strip()}")
    return UserError(f"{source}: the model's config can't be built: {root_cause_line(error)}")
