"""Write models: `model.safetensors`, `config.yaml` and, if it was measured, `covariance.safetensors`."""

from __future__ import annotations

from pathlib import Path

import yaml
from torch import Tensor

from dpm_scales.covariance import ErrorVariance, denoiser_digest
from dpm_scales.errors import UserError, require
from dpm_scales.models.base import Parts
from dpm_scales.models.checksums import FORMAT, read_tensors, write_tensors
from dpm_scales.models.weights_fit import not_finite
from dpm_scales.storage import read_yaml, write_text

WEIGHTS_FILE, CONFIG_FILE, COVARIANCE_FILE = "model.safetensors", "config.yaml", "covariance.safetensors"


def save_model(folder: Path, model: Parts, state: dict[str, Tensor] | None = None) -> None:
    """Write a model's files into `folder`, each atomically; remove a `covariance.safetensors` for other weights.

    Args:
        state: weights in place of the model's own.

    Raises: UserError, and writes nothing, if a weight is not finite, or a part can't be described by plain values.
    """
    reason = model.recipe.undescribed
    require(reason is None, f"the model can't be saved: {reason}")
    state = model.state_dict() if state is None else state
    save_weights(folder, state)
    write_text(folder / CONFIG_FILE, yaml.safe_dump(model.recipe.to_dict(), sort_keys=False))
    table = model.denoiser.error_variance
    if table is not None and table.weights_sha256 == digest_in(state):
        save_covariance(folder, table)
    else:
        (folder / COVARIANCE_FILE).unlink(missing_ok=True)


def save_covariance(folder: Path, table: ErrorVariance) -> Path:
    """Write `covariance.safetensors` into the folder of the model that it was measured for; return its path."""
    write_tensors(folder / COVARIANCE_FILE, {name: value.cpu() for name, value in table.to_tensors().items()})
    return folder / COVARIANCE_FILE


def read_covariance(folder: Path) -> ErrorVariance | None:
    """Return the covariance stored in a model's folder, None without one. Raises UserError if the file is damaged."""
    path = folder / COVARIANCE_FILE
    if not path.is_file():
        return None
    try:
        return ErrorVariance.from_tensors(read_tensors(path), str(path))
    except UserError as error:
        raise UserError(f"{error}; measure it again, dpm-scales measure MODEL, or remove it") from error


def digest_in(state: dict[str, Tensor]) -> str:
    """Return the digest of the denoiser's weights in a model's `state_dict`; see `denoiser_digest`."""
    prefix = "denoiser."
    return denoiser_digest(
        {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    )


def save_weights(folder: Path, state: dict[str, Tensor]) -> None:
    """Write `model.safetensors` into `folder`. Raises UserError, and writes nothing, if a weight is not finite."""
    bad = not_finite(state)
    require(
        bad is None,
        f"the model is not exported to {folder}: {bad} is not finite, so training has diverged; go back to an earlier "
        "checkpoint, or train again with a lower optimizer.learning_rate",
    )
    tensors = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    write_tensors(folder / WEIGHTS_FILE, tensors)


def save_folder(folder: Path, model: Parts) -> None:
    """Write a model into a folder that is missing, empty or holds a model, which is replaced.

    Raises: UserError if it holds anything else, and as `save_model` does.
    """
    require(not folder.exists() or folder.is_dir(), f"{folder} is a file; give a folder to save the model in")
    if folder.is_dir():
        own = (WEIGHTS_FILE, CONFIG_FILE, COVARIANCE_FILE)
        others = sorted(path.name for path in folder.iterdir() if path.name not in own)
        held = f"{folder} holds other files ({', '.join(others[:3])}{', ...' if len(others) > 3 else ''})"
        require(not others, f"{held}; give a folder of the model's own")
        config = folder / CONFIG_FILE
        if config.exists():
            require(_is_model(config), f"{config} is not of a dpm_scales model; give a folder of the model's own")
    save_model(folder, model)


def _is_model(config: Path) -> bool:
    try:
        values = read_yaml(config)
    except UserError:
        return False
    return isinstance(values, dict) and values.get("format") == FORMAT
