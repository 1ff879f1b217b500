"""Determine the state of a run, from the files in its folder alone.

damaged      a file of the folder can't be read, or is not what a run writes
running      a process holds the folder's lock
failed       the latest training ended with an error
finished     all steps are taken, and the model is exported
interrupted  there are a checkpoint or metrics, and steps are left
new          no step has been logged or saved
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from dpm_scales.cli.stored import key_of
from dpm_scales.errors import UserError, require
from dpm_scales.models.seals import checkpoint_step
from dpm_scales.run_folders.evaluations import RESULT, Evaluation, read_evaluation
from dpm_scales.run_folders.files import (
    FAILURE,
    MAX_METRICS_BYTES,
    finished_result,
    max_steps_of,
    read_metrics,
    stored_config,
    stored_result,
)
from dpm_scales.run_folders.looking import lock_holder, survey
from dpm_scales.storage import read_text, read_yaml

Result = TypeVar("Result")

STATES = ("finished", "running", "interrupted", "failed", "new", "damaged")
#: name of the lowest validation loss of a run; val/loss is the last one
BEST = "val/best_loss"
MOST_OPTIONS = MOST_METRICS = 1000
_SHOWN = re.compile(r"(train|val|eval)/[!-~]+")
#: files whose latest change counts as the run's
_WRITTEN = ("metrics.csv", "result.json", "checkpoints/last.ckpt", "config.yaml", "overrides.yaml")


@dataclass
class Run:
    """A run, as the files in its folder describe it.

    Attributes:
        folder: path as it was found.
        state: one of `STATES`.
        reason: why it is damaged or failed, or which process runs it; empty otherwise.
        steps: number of steps taken, according to the files.
        max_steps: the number of steps to take; None without a limit or where it is not stored.
        resumes_from: step of `last.ckpt`; None without one.
        metrics: last values by name, ``train/…``, ``val/…``, ``eval/…``; `BEST`; ``evaluate/…`` of `evaluate.py`.
        best_step: number of steps at the lowest validation loss.
        overrides: the options given, by key.
        config: the resolved options.
        evaluations: results of `evaluate.py`, the latest last.
        seconds: duration of the latest training, if it is finished.
        changed: time of the last change, in seconds since 1970.
        bytes: size of the folder; `bytes_complete` is False where it has more than ten thousand files.
        loadable: whether there is an export or a checkpoint.
    """

    folder: Path
    state: str = "new"
    reason: str = ""
    steps: int = 0
    max_steps: int | None = None
    resumes_from: int | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    best_step: int | None = None
    overrides: dict[str, str] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    evaluations: list[Evaluation] = field(default_factory=list)
    seconds: float | None = None
    changed: float = 0.0
    bytes: int = 0
    bytes_complete: bool = True
    loadable: bool = False

    def add(self, evaluation: Evaluation) -> None:
        """Add a result of `evaluate.py`; its values replace those of earlier ones."""
        self.evaluations = sorted([*self.evaluations, evaluation], key=lambda one: one.date)
        self.metrics |= {name: value for one in self.evaluations for name, value in one.values.items()}


def read_run(folder: Path) -> Run:
    """Return the run in a folder; damaged files make its state "damaged", with the reason, and never raise."""
    run, reasons = Run(folder), []

    def attempt(read: Callable[[], Result], instead: Result) -> Result:
        try:
            return read()
        except (UserError, OSError, UnicodeDecodeError) as error:
            reasons.append(str(error))
            return instead

    found = survey(folder)
    if found.refusal is not None:
        run.state, run.reason = "damaged", found.refusal
        return run
    run.bytes, run.bytes_complete, run.changed = found.bytes, found.complete, _changed(folder)
    run.loadable = any((folder / name).is_file() for name in ("model/model.safetensors", "checkpoints/last.ckpt"))
    run.config = attempt(lambda: stored_config(folder), {})
    run.max_steps = max_steps_of(run.config)
    run.resumes_from = checkpoint_step(folder / "checkpoints" / "last.ckpt")
    logged = attempt(lambda: _add_metrics(run), 0)
    result: dict[str, Any] = attempt(lambda: _result(folder, run.max_steps), {})
    overrides = attempt(lambda: _overrides(folder), None)
    given = result.get("overrides", []) if overrides is None else overrides
    if len(given) > MOST_OPTIONS:
        reasons.append(f"{folder / 'overrides.yaml'} has {len(given)} options, more than any run")
        given = []
    run.overrides = {key_of(option): option.partition("=")[2] for option in given}
    run.steps = max(logged, run.resumes_from or 0, result.get("steps", 0))
    run.metrics |= {name: value for name, value in _numbers(result).items() if _SHOWN.fullmatch(name)}
    run.seconds = _numbers(result).get("seconds")
    for file in (file for file in found.files if file.name == RESULT):
        run.add(attempt(lambda file=file: read_evaluation(file), Evaluation(file)))  # type: ignore[misc]
    failure = attempt(lambda: _line(folder / FAILURE), "")
    holder = lock_holder(folder / ".lock")
    for state, holds, reason in (
        ("damaged", bool(reasons), reasons[0] if reasons else ""),
        ("running", holder is not None, holder or ""),
        ("failed", bool(failure), failure),
        ("finished", bool(result) and _is_complete(run, int(result["steps"])), ""),
        ("interrupted", run.steps > 0, ""),
    ):
        if holds:
            run.state, run.reason = state, reason
            break
    return run


def _is_complete(run: Run, steps: int) -> bool:
    """Return whether a result after `steps` is that of the whole run, which may also end at `trainer.max_time`."""
    trainer = run.config.get("trainer")
    timed = isinstance(trainer, dict) and trainer.get("max_time") is not None
    ended = steps == run.steps and (timed or run.max_steps is None)
    return ended or (run.max_steps is not None and steps >= run.max_steps)


def _result(folder: Path, max_steps: int | None) -> dict[str, Any]:
    """Return the content of `result.json`; empty without one, or if the run has been started anew since."""
    file = folder / "result.json"
    if not file.is_file():
        return {}
    found = finished_result(folder, max_steps) if max_steps is not None else None
    result = stored_result(file) if found is None else found
    taken = checkpoint_step(folder / "checkpoints" / "last.ckpt")
    return {} if taken is not None and result["steps"] > taken else result


def _overrides(folder: Path) -> list[str] | None:
    file = folder / "overrides.yaml"
    if not file.is_file():
        return None
    values = read_yaml(file)
    ok = isinstance(values, list) and all(isinstance(value, str) for value in values)
    require(ok, f"{file} is damaged; remove it and give the run's options again")
    return list(values)


def _line(file: Path) -> str:
    return " ".join(read_text(file, 2**16).split()) if file.is_file() else ""


def _add_metrics(run: Run) -> int:
    """Add the last values of a run's `metrics.csv` and its lowest validation loss; return the number of steps logged.

    Rows are numbered from 0; a row with the learning rate alone belongs to a step that has only begun.
    """
    file = run.folder / "metrics.csv"
    if not file.is_file():
        return 0
    columns, rows = read_metrics(file, MAX_METRICS_BYTES)
    require(len(columns) <= MOST_METRICS, f"{file} has {len(columns)} columns, more than any run")
    for place, name in enumerate(columns):
        last = next((row[place] for row in reversed(rows) if row[place]), None)
        if last is not None and _SHOWN.fullmatch(name):
            run.metrics[name] = float(last)
    step = columns.index("step")
    if "val/loss" in columns:
        place = columns.index("val/loss")
        losses = [(float(row[place]), int(row[step]) + 1) for row in rows if row[place]]
        finite = [pair for pair in losses if math.isfinite(pair[0])]
        if finite:
            run.metrics[BEST], run.best_step = min(finite)
    measured = [place for place, name in enumerate(columns) if _SHOWN.fullmatch(name)]
    return max((int(row[step]) + 1 for row in rows if any(row[place] for place in measured)), default=0)


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers among the values as floats."""
    found = {}
    for name, value in values.items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            try:
                found[name] = float(value)
            except OverflowError:  # an integer of hundreds of digits
                continue
    return found


def _changed(folder: Path) -> float:
    times = []
    for name in _WRITTEN:
        try:
            times.append((folder / name).stat().st_mtime)
        except OSError:
            continue
    return max(times, default=0.0)
