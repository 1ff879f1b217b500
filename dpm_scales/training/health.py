"""Handle non-finite losses: their steps are skipped, and a run with too many ends with advice.

A step whose gradients are not finite is skipped on the device and counted there (see `DiffusionModule`). The host reads
the count where it waits for the device anyway: whenever a checkpoint is due, and every `CHECK_STEPS` steps.
"""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from dpm_scales.distributed.fsdp import local
from dpm_scales.errors import UserError, require_number
from dpm_scales.models.io import checkpoints
from dpm_scales.models.seals import checkpoint_step
from dpm_scales.storage import link
from dpm_scales.training.module import MOST_STEPS, DiffusionModule
from dpm_scales.training.resuming import resume_command

CHECK_STEPS = 50
SAFE_RATE = 1e-4
"""Learning rate at which hardly any network diverges."""


class Health:
    """Checks whether a run's weights may be saved.

    Args:
        folder: folder of the run's checkpoints.
        max_bad_steps: number of consecutive steps without a finite loss after which the run ends.
    """

    def __init__(self, folder: Path, max_bad_steps: int) -> None:
        require_number("optimizer.max_bad_steps", max_bad_steps, 1, MOST_STEPS, whole=True)
        self.folder, self.max_bad_steps = folder, max_bad_steps

    def good(self, trainer: pl.Trainer) -> bool:
        """Return whether the last step was finite, the same answer on all ranks; waits for the device.

        Raises: UserError if the run has diverged: too many steps in a row were not finite, or a weight is not.
        """
        module = _module(trainer)
        _, row, longest = map(int, module.bad_steps.tolist())
        lost = torch.stack([~torch.isfinite(local(p.detach())).all() for p in module.parameters()]).any()
        lost = cast(Tensor, trainer.strategy.reduce(lost.to(torch.float32), reduce_op="sum"))
        if longest >= self.max_bad_steps:
            what = f"the loss was not finite for {longest} steps in a row until step {trainer.global_step}"
            self._end(trainer, what, row)
        if float(lost) > 0:
            self._end(trainer, f"weights are not finite after step {trainer.global_step}", row)
        return row == 0

    def check_end(self, trainer: pl.Trainer) -> None:
        """Raise UserError unless the run ends with a finite step; warn if the last validation was not finite."""
        if self.good(trainer):
            loss = trainer.callback_metrics.get("val/loss")
            if loss is not None and trainer.is_global_zero and not math.isfinite(float(loss)):
                rate = f"with a lower rate, such as {self._slower(trainer)}"
                warnings.warn(f"val/loss is {float(loss):g} at the end; train again {rate}", stacklevel=2)
            return
        row, step = int(_module(trainer).bad_steps[1]), trainer.global_step
        which = f"the last {row} steps" if row > 1 else "the last step"
        once = [f"trainer.max_steps={trainer.max_steps + 1}"] if row == 1 and trainer.max_steps > 0 else None
        self._end(trainer, f"the loss was not finite in {which} before the end at step {step}", row, once)

    def _end(self, trainer: pl.Trainer, what: str, row: int, options: list[str] | None = None) -> None:
        """Raise UserError that says `what`, and how to resume from weights that were good.

        Args:
            row: number of consecutive steps up to now that were not finite.
            options: options to resume the run with; None for a lower learning rate.
        """
        if not trainer.is_global_zero:
            raise SystemExit(0)  # the first rank reports
        run_dir = self.folder.parent
        more = "" if str(trainer.precision).startswith("32") else ", or with trainer.precision=32-true"
        start = f"{what}; none of it is saved"
        # several batches have failed with these weights
        failed = trainer.global_step - row if row > 1 else -1
        found = [(path, checkpoint_step(path)) for path in checkpoints(self.folder)]
        # without a checkpoint, the same steps would fail again
        command = resume_command(run_dir, *(options if options and found else [self._slower(trainer)]))
        good = [path for path, step in found if step != failed]
        if not found:
            raise UserError(f"{start}. There is no checkpoint yet: start again with {command}{more}")
        if not good:
            raise UserError(
                f"{start}. The only checkpoint, of step {failed}, holds the weights that failed: remove {self.folder}, "
                f"and start again with {command}{more}"
            )
        set_aside([path for path, step in found if step == failed], good[0])
        step = checkpoint_step(self.folder / "last.ckpt")
        raise UserError(f"{start}. The last good checkpoint is of step {step}: resume with {command}{more}")

    def _slower(self, trainer: pl.Trainer) -> str:
        return f"optimizer.learning_rate={min(_module(trainer).learning_rate / 10, SAFE_RATE):g}"


class StopDiverged(Callback):
    """Ends a run that has diverged, also when no checkpoint is due."""

    def __init__(self, health: Health) -> None:
        self.health = health
        self._step = 0

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step != self._step and trainer.global_step % CHECK_STEPS == 0:
            self._step = trainer.global_step
            self.health.good(trainer)


def set_aside(failed: list[Path], good: Path) -> None:
    """Rename checkpoints to `step-N.diverged`, and make `last.ckpt` a link to `good`, which exists at any moment."""
    last = good.with_name("last.ckpt")
    for path in failed:
        link(path, path.with_name(f"step-{checkpoint_step(path) or 0:06d}.diverged"))
    if good != last:
        link(good, last)
    for path in failed:
        if path != last:
            path.unlink(missing_ok=True)


def _module(trainer: pl.Trainer) -> DiffusionModule:
    return cast(DiffusionModule, trainer.lightning_module)
