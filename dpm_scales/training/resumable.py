"""Check that a run can be resumed from a checkpoint, by comparing it with what the run itself would write.

torch and Lightning restore what they find, key by key; a value of another kind would end the run with a traceback, at
once or some steps later.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, Timer
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from dpm_scales.data import ImageDataModule
from dpm_scales.errors import UserError, require
from dpm_scales.models.checksums import is_plain_tensor
from dpm_scales.models.instantiate import root_cause, root_cause_line
from dpm_scales.models.model import Recipe
from dpm_scales.models.trust import walk_config
from dpm_scales.models.weights_fit import not_finite
from dpm_scales.training.module import DiffusionModule

LARGEST = 2**53
"""Largest value of any counter of a run."""


def require_resumable(
    checkpoint: dict[str, Any],
    path: Path,
    trainer: pl.Trainer,
    module: DiffusionModule,
    data: ImageDataModule,
    allow: Collection[str] = (),
) -> None:
    """Raise UserError unless everything in a checkpoint is of the kind that this run would write.

    Missing and additional keys are left to the code that reads them. Weights and the optimiser's moments are compared
    only if the model is the same; if not, `check_same_model` gives a better message than that shapes differ.
    """
    own = module.parts.recipe.to_dict()  # whose classes are imported already
    classes = {node["_target_"] for node in walk_config(own, "recipe") if isinstance(node, dict) and "_target_" in node}
    Recipe.from_dict(checkpoint["recipe"], str(path), (*classes, *allow))
    require(
        _of_weight(checkpoint.get("state_dict")) == _of_weight(module.state_dict()),
        f"{path} can't be resumed with this weight=: a learned one has parameters, which can't be added or left out; "
        "give the one that the run was trained with, or choose another run_dir",
    )
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], fused=True)
    schedule = LambdaLR(optimizer, lambda _: 1.0).state_dict()
    del schedule["lr_lambdas"]  # a plain function, of which nothing is stored
    wanted: dict[str, Any] = {}
    module.on_save_checkpoint(wanted)
    del wanted["recipe"]  # compared separately
    wanted |= {
        "global_step": 0,
        "epoch": 0,
        "averaging_state": {"n_averaged": torch.zeros((), dtype=torch.int64)},
        "loops": {"fit_loop": trainer.fit_loop.state_dict()},
        "callbacks": {callback.state_key: _state_of(callback) for callback in _callbacks(trainer)},
        "lr_schedulers": [schedule],
        type(data).__qualname__: data.state_dict(),
    }
    odd = _difference(wanted, checkpoint, "")
    ours = {**own, "sampler": None}
    if odd is None and {**checkpoint["recipe"], "sampler": None} == ours:
        odd = _odd_optimizer(checkpoint["optimizer_states"], optimizer.param_groups[0], list(module.parameters()))
        odd = odd or _odd_weights(checkpoint, module)
    if odd is not None:
        raise UserError(f"{path} can't be resumed: {odd}; remove it to resume from another one, if there is any")


@contextmanager
def restored_in_one_line(trainer: pl.Trainer, path: Path | None) -> Iterator[None]:
    """Turn an exception raised while `Trainer.fit` restores the checkpoint at `path` into a UserError."""
    started = _Started()
    _callbacks(trainer).insert(0, started)
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        if path is None or started.training or isinstance(error, UserError):
            raise
        first = root_cause(error)
        reason = f"{first} is missing" if isinstance(first, KeyError) else root_cause_line(error)
        raise UserError(f"{path} can't be resumed: {reason}; choose another run_dir") from error


class _Started(Callback):
    """Records whether training has begun."""

    training = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.training = True


def _callbacks(trainer: pl.Trainer) -> list[Callback]:
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return callbacks


def _state_of(callback: Callback) -> dict[str, Any]:
    """Return a callback's state; the seconds of a timer are floats even before it has started."""
    state = callback.state_dict()
    if isinstance(callback, Timer):
        state["time_elapsed"] = {stage: float(seconds) for stage, seconds in state["time_elapsed"].items()}
    return state


def _of_weight(state: Any) -> set[str]:
    """Return the names of the loss weight's parameters in a state; empty for a value that is not a mapping."""
    return {name for name in state if str(name).startswith("loss_weight.")} if isinstance(state, dict) else set()


def _difference(wanted: Any, found: Any, where: str) -> str | None:
    """Return how `found` differs in kind from `wanted`, or None; keys that only one of them has are ignored."""
    if isinstance(wanted, dict):
        if not isinstance(found, dict):
            return _not_a(where, "a mapping", found)
        pairs = [(f"{where}.{key}".lstrip("."), wanted[key], found[key]) for key in wanted if key in found]
        return next((odd for key, a, b in pairs if (odd := _difference(a, b, key)) is not None), None)
    if isinstance(wanted, list | tuple):
        if not isinstance(found, list | tuple) or (wanted and len(found) != len(wanted)):
            return _not_a(where, f"a list of {len(wanted)}" if wanted else "a list", found)
        pairs = [(f"{where}[{i}]", a, b) for i, (a, b) in enumerate(zip(wanted, found, strict=False))]
        return next((odd for key, a, b in pairs if (odd := _difference(a, b, key)) is not None), None)
    if isinstance(wanted, Tensor):
        fits = is_plain_tensor(found) and found.shape == wanted.shape and found.dtype == wanted.dtype
        return None if fits else _not_a(where, f"a tensor {wanted.dtype} {tuple(wanted.shape)}", found)
    if isinstance(wanted, bool) or wanted is None:
        return None if isinstance(found, type(wanted)) else _not_a(where, "true or false" if wanted else "empty", found)
    if isinstance(wanted, int):
        whole = isinstance(found, int) and not isinstance(found, bool) and 0 <= found < LARGEST
        return None if whole else _not_a(where, "a number of steps", found)
    if isinstance(wanted, float):
        number = isinstance(found, int | float) and not isinstance(found, bool) and abs(found) < math.inf
        return None if number else _not_a(where, "a number", found)
    return None if isinstance(found, type(wanted)) else _not_a(where, f"a {type(wanted).__name__}", found)


def _not_a(where: str, kind: str, found: Any) -> str:
    shown = f"a tensor {found.dtype} {tuple(found.shape)}" if isinstance(found, Tensor) else repr(found)
    shown = shown if len(shown) <= 60 else f"a {type(found).__name__}"
    return f"{where} must be {kind}, and is {shown}"


def _odd_optimizer(states: Any, group: dict[str, Any], parameters: list[nn.Parameter]) -> str | None:
    """Return what is wrong with the optimiser's groups or the shapes of its moments, or None."""
    where = "optimizer_states"
    if not isinstance(states, list) or len(states) != 1 or not isinstance(states[0], dict):
        return _not_a(where, "a list of one mapping", states)
    groups, moments = states[0].get("param_groups"), states[0].get("state")
    if not isinstance(groups, list) or len(groups) != 1 or not isinstance(groups[0], dict):
        return _not_a(f"{where}.param_groups", "a list of one mapping", groups)
    if groups[0].get("params") != list(range(len(parameters))):
        return f"{where}.param_groups.params does not number the {len(parameters)} parameters of the model"
    odd = _difference({**group, "initial_lr": 0.0, "params": []}, groups[0], f"{where}.param_groups")
    if odd is not None:
        return odd
    for key, value in group.items():
        if isinstance(value, bool) and groups[0].get(key, value) != value:
            return f"{where}.param_groups.{key} must be {value}"
    if not isinstance(moments, dict):
        return _not_a(f"{where}.state", "a mapping", moments)
    for number, values in moments.items():
        if not isinstance(number, int) or not 0 <= number < len(parameters):
            return f"{where}.state has no parameter {number!r} to belong to"
        like = parameters[number].detach()
        needed = {"step": torch.zeros(()), "exp_avg": like, "exp_avg_sq": like}
        if not isinstance(values, dict) or values.keys() != needed.keys():
            return _not_a(f"{where}.state.{number}", f"a mapping of {', '.join(needed)}", values)
        odd = _difference(needed, values, f"{where}.state.{number}")
        if odd is not None:
            return odd
    return None


def _odd_weights(checkpoint: dict[str, Any], module: DiffusionModule) -> str | None:
    """Return which weights do not fit the model, or None; buffers may have any size, since a prior's may."""
    parameters, wanted = dict(module.named_parameters()), module.state_dict()
    for key in ("state_dict", "current_model_state"):
        found = checkpoint.get(key)
        if found is None:
            continue
        if found.keys() != wanted.keys():
            return f"{key} lacks or adds {sorted(found.keys() ^ wanted.keys())[0]}"
        for name, value in wanted.items():
            shape = value.shape if name in parameters else found[name].shape
            if found[name].shape != shape or found[name].dtype != value.dtype or found[name].ndim != value.ndim:
                return _not_a(f"{key}.{name}", f"a tensor {value.dtype} {tuple(value.shape)}", found[name])
        bad = not_finite(found)
        if bad is not None:
            return f"{key}.{bad} is not finite, so that training had diverged"
    return None
