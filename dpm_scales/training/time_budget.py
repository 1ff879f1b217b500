"""Let cosine decay end with `trainer.max_time`, for runs without a number of steps."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, Timer
from omegaconf import DictConfig
from torch import distributed
from torch.optim import Optimizer

from dpm_scales.training.module import DiffusionModule


def by_time(cfg: DictConfig) -> bool:
    """Return whether the learning rate of a run decays with its time instead of its number of steps."""
    return bool(cfg.trainer.max_steps == -1 and cfg.trainer.max_time is not None)


def share_passed(trainer: pl.Trainer, checkpoint: dict[str, Any] | None = None) -> float:
    """Return the share of `trainer.max_time` that has passed, in [0, 1]; 0 without a limit.

    Args:
        checkpoint: if given, the share is that which had passed when it was written.
    """
    clock = seconds_passed_and_left(trainer)
    if clock is None:
        return 0.0
    elapsed, seconds = clock[0], sum(clock)
    if checkpoint is not None:
        elapsed = float(checkpoint.get("callbacks", {}).get("Timer", {}).get("time_elapsed", {}).get("train", 0.0))
    return 1.0 if elapsed >= seconds else max(0.0, elapsed) / seconds


def seconds_passed_and_left(trainer: pl.Trainer) -> tuple[float, float] | None:
    """Return the seconds that have passed and are left of `trainer.max_time`, or None without a limit."""
    timer = next((callback for callback in trainer.callbacks if isinstance(callback, Timer)), None)  # type: ignore[attr-defined]
    left = None if timer is None else timer.time_remaining()
    return None if timer is None or left is None else (timer.time_elapsed(), left)


class TimeBudget(Callback):
    """Updates the module's share of `trainer.max_time` that has passed at each step, by the clock of rank 0.

    The rate of a step then depends on the speed of the machine: the same seed does not give the same weights, nor does
    a resumed run give those of an uninterrupted one.
    """

    def __init__(self) -> None:
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
        share = share_passed(trainer)
        if self._group is not None:
            shared = torch.tensor(share, dtype=torch.float64)
            distributed.broadcast(shared, 0, self._group)
            share = float(shared)
        module.passed = share
