"""Keep power-function averages of the weights beside the EMA, and write snapshots of them for post-hoc EMA (EDM2)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from omegaconf import DictConfig
from torch import Tensor

from dpm_scales.distributed.fsdp import like, local, whole
from dpm_scales.errors import UserError, require, require_number
from dpm_scales.models.checksums import is_plain_tensor
from dpm_scales.models.instantiate import plain
from dpm_scales.models.post_hoc import FOLDER, remove_later, write_snapshot
from dpm_scales.models.power_profiles import check_length, exponent_of, newest_weight
from dpm_scales.models.weights_fit import not_finite
from dpm_scales.storage import FolderGoneError
from dpm_scales.training.health import Health
from dpm_scales.training.module import MOST_STEPS, DiffusionModule

KEY = "power_averages"
"""Key of a checkpoint: the lengths, and for each the averages of the parameters by name."""
SNAPSHOTS = 32
"""Number of snapshots of a run whose `ema.snapshot_every` is null."""


class PowerAverages(Callback):
    """Keeps averages of the parameters with power-function profiles, see `models.power_profiles`, sharded like them.

    They are written to `ema/step-N.safetensors` every n steps and after the last one. Averages and their snapshots
    depend only on the weights after each step: a resumed run has the same ones.

    Args:
        folder: folder of the run.
        health: decides whether the weights may be saved.
        lengths: lengths of the averages, distinct, in [SHORTEST, LONGEST].
        every_n_steps: optimiser steps from one snapshot to the next, >= 1.

    Raises: UserError for values out of range.
    """

    def __init__(self, folder: Path, health: Health, lengths: Sequence[float], every_n_steps: int) -> None:
        self.lengths = check_lengths(lengths)
        require_number("ema.snapshot_every", every_n_steps, 1, MOST_STEPS, whole=True)
        self.folder, self.health, self.every_n_steps = folder / FOLDER, health, every_n_steps
        self._exponents = [exponent_of(length) for length in self.lengths]
        self._averages: list[dict[str, Tensor]] = []
        self._loaded: list[dict[str, Tensor]] | None = None
        self._step = self._written = 0

    @property
    def averages(self) -> list[dict[str, Tensor]]:
        """Return for each length the averages of the parameters by name; empty before `Trainer.fit`."""
        return self._averages

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._loaded = checkpoint[KEY]["averages"]

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint[KEY] = {"lengths": list(self.lengths), "averages": whole(self._averages, trainer.is_global_zero)}

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the averages from the parameters, or from the averages in a checkpoint, sharded like the parameters."""
        parameters = {name: value.detach() for name, value in _parameters(pl_module)}
        if self._loaded is None:
            self._averages = [{name: value.clone() for name, value in parameters.items()} for _ in self.lengths]
            return
        self._averages = [
            {name: like(loaded[name].to(value.device), value) for name, value in parameters.items()}
            for loaded in self._loaded
        ]
        self._loaded = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._step = self._written = trainer.global_step
        if trainer.is_global_zero:
            remove_later(self.folder, self._step)  # written by a run that was killed after its checkpoint

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step, last = trainer.global_step, 0 < trainer.max_steps <= trainer.global_step
        if step == self._step:  # gradients are being accumulated
            return
        self._step = step
        currents = [local(value.detach()) for _, value in _parameters(pl_module)]
        for averages, exponent in zip(self._averages, self._exponents, strict=True):
            torch._foreach_lerp_([*map(local, averages.values())], currents, newest_weight(step, exponent))
        if step % self.every_n_steps == 0 or last:
            self._write(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._written < self._step:  # `trainer.max_time` is up
            self._write(trainer)

    def _write(self, trainer: pl.Trainer) -> None:
        """Write a snapshot if the last step was finite; called by all ranks."""
        if not self.health.good(trainer):
            return
        self._written = self._step
        averages = whole(self._averages, trainer.is_global_zero)
        if trainer.is_global_zero:
            with suppress(FolderGoneError):  # the next checkpoint saves the run elsewhere
                write_snapshot(self.folder, self._step, self.lengths, averages)


def _parameters(module: pl.LightningModule) -> list[tuple[str, Tensor]]:
    assert isinstance(module, DiffusionModule)
    return [*module.parts.named_parameters()]


def check_lengths(lengths: Any) -> tuple[float, ...]:
    """Return the value of `ema.power_lengths` as floats. Raises UserError unless they are distinct lengths."""
    listed = list(lengths) if isinstance(lengths, list | tuple) else []
    require(bool(listed), f"ema.power_lengths must be a list of lengths, [0.05,0.10], or null, got {lengths!r:.100}")
    found = tuple(check_length("ema.power_lengths", value) for value in listed)
    require(len({*found}) == len(found), f"ema.power_lengths={listed!r:.100} has a length twice; give each once")
    return found


def power_averages(folder: Path, health: Health, settings: DictConfig, max_steps: int) -> list[PowerAverages]:
    """Return a list with the callback that the section `ema` configures; empty without `power_lengths`.

    Args:
        folder: folder of the run.
        settings: section `ema` of configs/train.yaml.
        max_steps: number of steps of the run; -1 if it ends by time.

    Raises: UserError for values out of range, and for an interval that has no effect or is missing.
    """
    lengths, every = plain(settings.power_lengths), settings.snapshot_every
    if lengths is None:
        no_effect = f"ema.snapshot_every={every} is of power averages; add ema.power_lengths=[0.05,0.10]"
        require(every is None, no_effect)
        return []
    if every is None:
        needed = "ema.power_lengths with trainer.max_steps=-1 needs ema.snapshot_every, the steps between two snapshots"
        require(max_steps > 0, needed)
        every = max(1, max_steps // SNAPSHOTS)
    return [PowerAverages(folder, health, lengths, every)]


def require_resumable_averages(
    checkpoint: dict[str, Any], path: Path, kept: Sequence[PowerAverages], module: DiffusionModule
) -> None:
    """Raise UserError unless the averages in a checkpoint are those that the run keeps, from its first step on."""
    stored, lengths = checkpoint.get(KEY), [list(one.lengths) for one in kept]
    if stored is None and not lengths:
        return
    held = stored.get("lengths") if isinstance(stored, dict) else stored
    now = lengths[0] if lengths else None
    if held != now:
        which = "choose another run_dir" if held is None else f"leave ema.power_lengths={held} as it was"
        raise UserError(
            f"{path} has power averages of lengths {held!r:.80}, and ema.power_lengths is {now}; they begin with a "
            f"run's first step, so {which}"
        )
    assert isinstance(stored, dict) and now is not None
    wanted, found = dict(module.parts.named_parameters()), stored.get("averages")
    listed = found if isinstance(found, list) else []
    odd = None if len(listed) == len(now) else f"{KEY}.averages must be a list of {len(now)}"
    for number, average in enumerate(listed):
        odd = odd or _odd(f"{KEY}.averages[{number}]", average, wanted)
    require(odd is None, f"{path} can't be resumed: {odd}; remove it to resume from another one, if there is any")


def _odd(where: str, average: Any, wanted: dict[str, torch.nn.Parameter]) -> str | None:
    """Return what is wrong with an average in a checkpoint, or None."""
    if not isinstance(average, dict) or average.keys() != wanted.keys():
        return f"{where} must have the model's parameters"
    for name, value in wanted.items():
        found = average[name]
        if not is_plain_tensor(found) or found.shape != value.shape or found.dtype != value.dtype:
            return f"{where}.{name} must be a tensor {value.dtype} {tuple(value.shape)}"
    bad = not_finite(average)
    return None if bad is None else f"{where}.{bad} is not finite, so that training had diverged"
