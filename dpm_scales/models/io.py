"""Models as files: `model.safetensors` + `config.yaml`, and checkpoints read without unpickling anything.

The config names classes of this package alone: a stranger's file can't make us import something else. It is checked
against `dpm_scales.` before anything is built from it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml
from torch import Tensor

from dpm_scales.errors import OutOfMemoryError, UserError, require, suggest
from dpm_scales.memory import lacks_memory
from dpm_scales.models.checksums import (
    DamagedFileError,
    checkpoint_step,
    read_checkpoint,
    read_tensors,
    write_tensors,
)
from dpm_scales.models.instantiate import cause, root
from dpm_scales.models.model import Model, Recipe, build_model
from dpm_scales.models.weights_fit import MisfitError, not_finite, require_dtypes
from dpm_scales.storage import read_yaml, write_text

WEIGHTS = ("averaged", "raw")


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
