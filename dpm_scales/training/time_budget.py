"""Let cosine decay end with `trainer.max_time`, for runs without a number of steps."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, Timer
from omegaconf import DictConfig
from torch import distributed
from torch.optim import Optimizer

from dpm_scales.training.module import DiffusionModule


def seconds_of(max_time: Any) -> float:
    """Return a duration, "DD:HH:MM:SS" or a mapping of units, in seconds."""
    duration = Timer(timedelta(**max_time) if isinstance(max_time, dict) else max_time).time_remaining()
    assert duration is not None
    return duration


def by_time(cfg: DictConfig) -> bool:
    """Return whether the time of a run, and no number of steps, ends the decay of its learning rate."""
    return bool(cfg.trainer.max_steps == -1 and cfg.trainer.max_time is not None)


def share_passed(checkpoint: dict[str, Any], max_time: Any) -> float:
    """Return the share of `max_time` that had passed when a checkpoint was written; 0 without a limit."""
    if max_time is None:
        return 0.0
    elapsed = checkpoint.get("callbacks", {}).get("Timer", {}).get("time_elapsed", {}).get("train", 0.0)
    return min(1.0, max(0.0, float(elapsed)) / max(seconds_of(max_time), 1e-9))


class TimeBudget(Callback):
    """Tell the module at each step which share of `trainer.max_time` has passed, by the clock of rank 0.

    The rate of a step then depends on the speed of the machine, so that the same seed does not give the same weights,
    and a resumed run not those of an uninterrupted one.
    """

    def __init__(self, max_time: Any) -> None:
        self._seconds = seconds_of(max_time)
        self._group: Any = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.world_size > 1:
            self._group = distributed.new_group(backend="gloo")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._tell(trainer, pl_module)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        self._tell(trainer, pl_module)  # the rate of the next step is set right after this one

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if self._group is not None:
            distributed.destroy_process_group(self._group)
            self._group = None

    def _tell(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        assert isinstance(module, DiffusionModule)
        timer = next(callback for callback in trainer.callbacks if isinstance(callback, Timer))  # type: ignore[attr-defined]
        share = min(1.0, max(0.0, timer.time_elapsed()) / self._seconds)
        if self._group is not None:
            shared = torch.tensor(share, dtype=torch.float64)
            distributed.broadcast(shared, 0, self._group)
            share = float(shared)
        module.passed = share
