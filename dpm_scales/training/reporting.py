"""Report a run: the steps that loggers count, the last validation, the progress bar, metrics.csv."""

from __future__ import annotations

import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback, ProgressBar
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only
from rich import get_console
from rich.progress import Progress, TaskID

from dpm_scales.distributed.lightning_private import number_logs_by_step
from dpm_scales.plots.curves import Curve, read_curves
from dpm_scales.progress import NEXT_LINES, LineProgress
from dpm_scales.run_folders.files import read_metrics
from dpm_scales.storage import FolderGoneError, write_text
from dpm_scales.tables import csv_text
from dpm_scales.training.time_budget import seconds_passed_and_left

LOSS_EVERY = 50
"""Steps between two readings of the loss by the progress bar: each waits for the device."""


class LoggedSteps(Callback):
    """Makes loggers count optimiser steps, and logs the last step whatever the interval."""

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        number_logs_by_step(trainer)
        if 0 < trainer.max_steps <= trainer.global_step + 1:
            trainer.log_every_n_steps = 1  # type: ignore[attr-defined]


class LastValidation(Callback):
    """Runs a validation after the last step, so that every run ends with a grid and a loss to compare."""

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if 0 < trainer.max_steps <= trainer.global_step:
            trainer.val_check_batch = 1


class StepBar(ProgressBar):
    """Shows one bar over all steps, with rate, time left and loss; in a log file, one line at each validation and every
    `NEXT_LINES` seconds."""

    def __init__(self) -> None:
        super().__init__()
        self._enabled = True
        self._bar: Progress | None = None
        self._started, self._told = (0.0, 0), 0.0

    def disable(self) -> None:
        """Disable the bar; Lightning does so on all ranks but the first."""
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._started, self._told = (time.perf_counter(), trainer.global_step), time.perf_counter()
        if not self._enabled or not get_console().is_terminal:
            return
        total = trainer.max_steps if trainer.max_steps > 0 else None
        self._bar = LineProgress(console=get_console())
        self._bar.add_task("step", total=total, completed=trainer.global_step, unit="steps", figures=[])
        self._bar.start()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._bar is None:
            if self._enabled and time.perf_counter() - self._told >= NEXT_LINES:
                self._tell(trainer)
            return
        self._bar.update(TaskID(0), completed=trainer.global_step, clock=self._end_by_time(trainer))
        if trainer.global_step % LOSS_EVERY == 0:
            self._bar.update(TaskID(0), figures=self._losses(trainer))

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._enabled and self._bar is None and not trainer.sanity_checking:
            self._tell(trainer)

    def _tell(self, trainer: pl.Trainer) -> None:
        """Print a line on the steps, their rate, the time left and the losses."""
        self._told = time.perf_counter()
        rate, clock = self._rate(trainer), self._end_by_time(trainer)
        total = f"/{trainer.max_steps}" if trainer.max_steps > 0 else ""
        parts = [f"step {trainer.global_step}{total}", f"{rate:.1f} steps/s"]
        if clock or total:
            seconds = max(clock[1], 0.0) if clock else (trainer.max_steps - trainer.global_step) / max(rate, 1e-9)
            parts.append(f"{timedelta(seconds=round(seconds))} left")
        losses = "  ".join(self._losses(trainer))
        print(", ".join([*parts, losses] if losses else parts), flush=True)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._stop()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _end_by_time(self, trainer: pl.Trainer) -> tuple[float, float] | None:
        """Return the seconds passed and left of `trainer.max_time`, or None if the run's steps end it sooner."""
        clock = seconds_passed_and_left(trainer)
        if clock is None or trainer.max_steps <= 0:
            return clock
        by_steps = (trainer.max_steps - trainer.global_step) / max(self._rate(trainer), 1e-9)
        return None if by_steps <= clock[1] else clock

    def _rate(self, trainer: pl.Trainer) -> float:
        start, first = self._started
        return (trainer.global_step - first) / max(time.perf_counter() - start, 1e-9)

    def _losses(self, trainer: pl.Trainer) -> list[str]:
        values = trainer.callback_metrics
        return [f"{name} {float(values[name]):.4f}" for name in ("train/loss", "val/loss") if name in values]


class MetricsFile(Logger):
    """Logger for `metrics.csv`: one row for each time something is logged; a resumed run appends to it.

    Lightning's CSVLogger rewrites the file from memory, so that a resumed run would lose the rows before it. If the
    run's folder is gone, rows are kept in memory alone, and the next checkpoint reports it.

    Raises: UserError if the file at `path` is not a run's table.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self._rows: list[dict[str, str]] = []
        self._columns: list[str] = ["step", "epoch"]
        if path.is_file():
            self._columns, rows = read_metrics(path)
            self._rows = [dict(zip(self._columns, row, strict=True)) for row in rows]

    @property
    def name(self) -> str:
        return "metrics"

    @property
    def version(self) -> str:
        return ""

    @property
    def is_empty(self) -> bool:
        """True if the file has no rows."""
        return not self._rows

    def text(self) -> str:
        """Return the file's content."""
        return csv_text(self._columns, self._rows)

    def last(self, prefix: str) -> dict[str, float]:
        """Return the last value of every column whose name begins with `prefix`."""
        named = [(name, row[name]) for row in self._rows for name in row if name.startswith(prefix)]
        return {name: float(value) for name, value in named if value}

    def curves(self) -> dict[str, Curve]:
        """Return the finite values of every column by the number of steps."""
        return read_curves(self._rows)

    def column(self, name: str) -> dict[int, float]:
        """Return the values of a column by step."""
        return {int(row["step"]): float(row[name]) for row in self._rows if row.get(name)}

    def forget_from(self, step: int) -> None:
        """Drop the rows that a run resumed after `step` steps will write again; rows are numbered from 0."""
        self._rows = [row for row in self._rows if int(row["step"]) < step]

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the run's config.yaml holds the hyper-parameters."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self._columns += [name for name in metrics if name not in self._columns]
        row = {"step": str(step or 0), **{name: f"{value:.8g}" for name, value in metrics.items()}}
        if self._rows and self._rows[-1]["step"] == row["step"]:
            self._rows[-1].update(row)
        else:
            self._rows.append(row)

    @rank_zero_only
    def save(self) -> None:
        with suppress(FolderGoneError):
            write_text(self.path, self.text())

    @rank_zero_only
    def finalize(self, status: str) -> None:
        self.save()
