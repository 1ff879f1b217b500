"""Write models: `model.safetensors` and `config.yaml`."""

from __future__ import annotations

from pathlib import Path

import yaml
from torch import Tensor

from dpm_scales.errors import UserError, require
from dpm_scales.models.base import Parts
from dpm_scales.models.checksums import FORMAT, write_tensors
from dpm_scales.models.weights_fit import not_finite
from dpm_scales.storage import read_yaml, write_text

WEIGHTS_FILE, CONFIG_FILE = "model.safetensors", "config.yaml"


def save_model(folder: Path, model: Parts, state: dict[str, Tensor] | None = None) -> None:
    """Write `model.safetensors` and `config.yaml` into `folder`, each atomically.

    Args:
        state: weights in place of the model's own.

    Raises: UserError, and writes nothing, if a weight is not finite, or a part can't be described by plain values.
    """
    reason = model.recipe.undescribed
    require(reason is None, f"the model can't be saved: {reason}")
    save_weights(folder, model.state_dict() if state is None else state)
    write_text(folder / CONFIG_FILE, yaml.safe_dump(model.recipe.to_dict(), sort_keys=False))


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
        others = sorted(path.name for path in folder.iterdir() if path.name not in (WEIGHTS_FILE, CONFIG_FILE))
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
