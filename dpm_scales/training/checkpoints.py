"""Checkpoints of a run: written atomically, with a checksum; the last few and the best few are kept.

`last.ckpt` is the newest, `best.ckpt` the one with the lowest validation loss. What they replace is kept as
`step-N.ckpt` (`checkpoint.keep_last`) and `best-step-N.ckpt` (`checkpoint.keep_best`): links to the same file, made
before the new one takes the name, so that there is always a `last.ckpt` and never a half-written one.
"""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import SIGTERMException

from dpm_scales.distributed.lightning_private import is_accumulating, update_step_metrics, validation_follows
from dpm_scales.errors import UserError, require_number
from dpm_scales.models.checksums import DamagedFileError, read_checkpoint, write_checkpoint
from dpm_scales.models.io import checkpoints
from dpm_scales.models.seals import checkpoint_step
from dpm_scales.storage import FolderGoneError, link
from dpm_scales.training.health import Health
from dpm_scales.training.module import MOST_STEPS
from dpm_scales.training.run_folder import Rescue

#: keys that resuming needs besides the weights
NEEDED = ("optimizer_states", "lr_schedulers", "loops", "callbacks", "averaging_state", "bad_steps", "global_step")


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes checkpoints atomically, with a checksum, and reads them without unpickling.

    Args:
        rescue: saves the run elsewhere if its folder is gone.
    """

    def __init__(self, rescue: Rescue | None = None) -> None:
        super().__init__()
        self.rescue = rescue

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        try:
            write_checkpoint(Path(path), checkpoint)
        except FolderGoneError as error:
            if self.rescue is None:
                raise
            raise self.rescue.save(
                error, lambda folder: write_checkpoint(folder / "checkpoints" / "last.ckpt", checkpoint)
            ) from error

    def load_checkpoint(
        self, path: Any, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        return read_checkpoint(Path(path), map_location)


class CheckpointFolder:
    """Names a run's checkpoints, and removes those that are not kept.

    Args:
        folder: made at the first checkpoint.
        keep_last: number of newest checkpoints to keep, `last.ckpt` included; >= 1.
        keep_best: number of best checkpoints to keep, `best.ckpt` included; 0 for none.
    """

    def __init__(self, folder: Path, keep_last: int = 2, keep_best: int = 1) -> None:
        require_number("checkpoint.keep_last", keep_last, 1, whole=True)
        require_number("checkpoint.keep_best", keep_best, 0, whole=True)
        self.folder, self.keep_last, self.keep_best = folder, keep_last, keep_best
        self.last, self.best = folder / "last.ckpt", folder / "best.ckpt"

    def save_last(self, trainer: pl.Trainer) -> None:
        """Write `last.ckpt`; the one before stays as `step-N.ckpt`."""
        if trainer.is_global_zero and self.keep_last > 1:
            self._keep(self.last, "step", trainer.global_step)
        trainer.save_checkpoint(self.last)
        if trainer.is_global_zero:
            steps = sorted(step for step in self._steps("step") if step < trainer.global_step)
            self._prune("step", steps[-(self.keep_last - 1) :] if self.keep_last > 1 else [])

    def save_best(self, trainer: pl.Trainer, ranked: list[int]) -> None:
        """Write this step's checkpoint as one of the best; `ranked` lists their steps, best first."""
        step = trainer.global_step
        if trainer.is_global_zero and ranked[0] == step and self.keep_best > 1:
            self._keep(self.best, "best-step", step)
        trainer.save_checkpoint(self.best if ranked[0] == step else self._name("best-step", step))
        if trainer.is_global_zero:
            self._prune("best-step", ranked[1:])

    def _name(self, kind: str, step: int) -> Path:
        return self.folder / f"{kind}-{step:06d}.ckpt"

    def _steps(self, kind: str) -> list[int]:
        names = [path.stem.removeprefix(f"{kind}-") for path in self.folder.glob(f"{kind}-*.ckpt")]
        return [int(name) for name in names if name.isdecimal()]

    def _keep(self, path: Path, kind: str, now: int) -> None:
        step = checkpoint_step(path)
        if step is not None and step != now:
            link(path, self._name(kind, step))

    def _prune(self, kind: str, kept: list[int]) -> None:
        for step in set(self._steps(kind)) - set(kept):
            self._name(kind, step).unlink(missing_ok=True)


def find_checkpoint(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """Return the checkpoint to resume from and its content; None if there is none.

    It is `last.ckpt`; if that is damaged, the undamaged one with the most steps, with a warning.

    Raises: UserError if none can be read, or if another version wrote `last.ckpt`.
    """
    damaged: list[DamagedFileError] = []
    last = folder / "last.ckpt"
    found = checkpoints(folder)
    for path in found:
        try:
            values = read_checkpoint(path)
        except DamagedFileError as error:
            damaged.append(error)
            continue
        missing = [key for key in NEEDED if key not in values]
        if missing:
            raise UserError(f"{path} holds weights alone; a run can't resume from it ({missing[0]} is missing)")
        if path != last:
            reason = str(damaged[0]) if last.is_file() else f"{last} is missing"
            warnings.warn(f"{reason}; resuming from {path}, step {values['global_step']}", stacklevel=2)
        return path, values
    if damaged:
        hint = "" if len(found) == 1 else f" (nor can the {len(found) - 1} others there)"
        raise UserError(f"{damaged[0]}{hint}; remove {folder} to start again, or choose another run_dir")
    return None


def restore_last(good: Path) -> None:
    """Make `last.ckpt` a link to `good`, atomically; a damaged one is kept as `last.damaged`."""
    last = good.with_name("last.ckpt")
    if good != last:
        if last.is_file():
            link(last, last.with_name("last.damaged"))
        link(good, last)


class Checkpoints(Callback):
    """Writes the checkpoints of a run, only when the last step was finite.

    `last.ckpt` is written every n steps, after the step with which `StopTogether` ends the run, and at the end of
    training; `best.ckpt`, and the next best, by validation loss, where of equal losses the earlier one ranks first.

    Where a validation follows a step, the step's checkpoint waits for the validation's end: a run resumed from between
    the two would skip it.

    Args:
        folder: names the files, and removes those that are not kept.
        health: decides whether the weights may be saved.
        every_n_steps: optimiser steps from one `last.ckpt` to the next, >= 1.
    """

    def __init__(self, folder: CheckpointFolder, health: Health, every_n_steps: int) -> None:
        require_number("checkpoint.every_n_steps", every_n_steps, 1, MOST_STEPS, whole=True)
        self.folder, self.health, self.every_n_steps = folder, health, every_n_steps
        self._step = self._saved = 0  # the last one seen, and the last one in a checkpoint
        self._waits = False
        self._ranked: list[tuple[float, int]] = []  # (loss, step), best first

    @property
    def state_key(self) -> str:
        """Name of this callback's state in checkpoints, kept from the first release."""
        return "BestCheckpoint"

    def state_dict(self) -> dict[str, Any]:
        return {"ranked": [list(entry) for entry in self._ranked]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._ranked = [(float(loss), int(step)) for loss, step in state_dict["ranked"]]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._step = self._saved = trainer.global_step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._step:  # gradients are being accumulated, and no checkpoint holds them
            return
        self._step = trainer.global_step
        if self._step % self.every_n_steps == 0 or trainer.received_sigterm:
            self._waits = validation_follows(trainer)
            if not self._waits:
                # Lightning logs the step only after this hook: a kill between the two would lose its row
                update_step_metrics(trainer)
                self._save_last(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._save_if_best(trainer)
        if self._waits or trainer.received_sigterm:  # after the ranking, which `last.ckpt` holds
            self._waits = False
            self._save_last(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.health.check_end(trainer)
        self.folder.save_last(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        # SIGTERM may also come after `on_train_batch_end`; Lightning then stops between two steps, or in a validation
        between = not trainer.validating and not is_accumulating(trainer)
        if isinstance(exception, SIGTERMException) and between and self._saved < trainer.global_step == self._step:
            self._save_last(trainer)

    def _save_last(self, trainer: pl.Trainer) -> None:
        if self.health.good(trainer):
            self.folder.save_last(trainer)
            self._saved = self._step

    def _save_if_best(self, trainer: pl.Trainer) -> None:
        loss = trainer.callback_metrics.get("val/loss")
        if trainer.sanity_checking or loss is None or not math.isfinite(float(loss)) or not self.health.good(trainer):
            return
        step = trainer.global_step
        # a run resumed from an earlier checkpoint repeats its own steps
        earlier = [(value, done) for value, done in self._ranked if done < step]
        self._ranked = sorted([*earlier, (float(loss), step)])[: self.folder.keep_best]
        ranked = [done for _, done in self._ranked]
        if step in ranked:
            self.folder.save_best(trainer, ranked)
