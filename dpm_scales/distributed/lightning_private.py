"""Every access to what Lightning does not promise to keep: the package reads and changes it through these functions.

Checked with Lightning 2.6. `pyproject.toml` bounds the version; after raising the bound, compare this file first.
"""

from __future__ import annotations

import math

import lightning.pytorch as pl


def batches_processed(trainer: pl.Trainer) -> int:
    """Return how many training batches the run has completed, earlier sessions included.

    The number of the batch being trained on. The data order and the random numbers of a step both depend on it.
    """
    # `completed` lags while a hook saves after a step, `ready` leads after a step that failed
    return int(getattr(trainer.fit_loop.epoch_loop.batch_progress.total, "processed", 0))


def validation_follows(trainer: pl.Trainer) -> bool:
    """Return whether a validation is due after the batch that has just been trained on."""
    batches = trainer.fit_loop.epoch_loop.total_batch_idx + 1
    return bool(trainer.enable_validation and batches % (trainer.val_check_batch or math.inf) == 0)


def is_accumulating(trainer: pl.Trainer) -> bool:
    """Return whether gradients are held that no optimiser step has used yet."""
    return trainer.fit_loop.epoch_loop._should_accumulate()


def stop_after_step(trainer: pl.Trainer) -> None:
    """Let Lightning end the run after the current step, as after SIGTERM."""
    trainer._signal_connector.received_sigterm = True


def leave_signals_to_us(trainer: pl.Trainer) -> None:
    """Keep Lightning from broadcasting SIGTERM, amid whatever the other ranks do and with a device sync each step."""
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]


def update_step_metrics(trainer: pl.Trainer) -> None:
    """Log the current step now; Lightning does so only after all hooks, and then does nothing more."""
    trainer._logger_connector.update_train_step_metrics()


def number_logs_by_step(trainer: pl.Trainer) -> None:
    """Let loggers count optimiser steps; Lightning's own count is one too high where a finished run is extended."""
    trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step
