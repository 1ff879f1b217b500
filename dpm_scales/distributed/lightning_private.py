"""All access to Lightning's private parts, which may change: the package uses them only through these functions.

Checked with Lightning 2.6. `pyproject.toml` bounds the version; before raising the bound, check this file.
"""

from __future__ import annotations

import math

import lightning.pytorch as pl


def batches_processed(trainer: pl.Trainer) -> int:
    """Return the number of training batches that the run has completed, including earlier sessions.

    It is the number of the batch being trained on, on which data order and random numbers of a step depend.
    """
    # `completed` lags while a hook saves after a step, `ready` leads after a step that failed
    return int(getattr(trainer.fit_loop.epoch_loop.batch_progress.total, "processed", 0))


def validation_follows(trainer: pl.Trainer) -> bool:
    """Return whether a validation is due after the batch that has just been trained on."""
    batches = trainer.fit_loop.epoch_loop.total_batch_idx + 1
    return bool(trainer.enable_validation and batches % (trainer.val_check_batch or math.inf) == 0)


def is_accumulating(trainer: pl.Trainer) -> bool:
    """Return whether there are gradients that no optimiser step has used yet."""
    return trainer.fit_loop.epoch_loop._should_accumulate()


def stop_after_step(trainer: pl.Trainer) -> None:
    """Make Lightning end the run after the current step, as after SIGTERM."""
    trainer._signal_connector.received_sigterm = True


def leave_signals_to_us(trainer: pl.Trainer) -> None:
    """Keep Lightning from broadcasting SIGTERM, which disturbs the other ranks and syncs the device in each step."""
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]


def update_step_metrics(trainer: pl.Trainer) -> None:
    """Log the current step now; Lightning does so only after all hooks, and then does nothing more."""
    trainer._logger_connector.update_train_step_metrics()


def number_logs_by_step(trainer: pl.Trainer) -> None:
    """Make loggers count optimiser steps; Lightning's own count is one too high if a finished run is extended."""
    trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step
