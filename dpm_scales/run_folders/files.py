"""Read the small files of a run's folder: its result, its metrics, its options."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

from dpm_scales.errors import UserError, is_whole, require
from dpm_scales.models.seals import checkpoint_step
from dpm_scales.models.trust import walk_config
from dpm_scales.storage import read_text, read_yaml

#: the error that ended the latest training in the folder; removed when training starts again
FAILURE = "failure.txt"
MAX_RESULT_BYTES, MAX_METRICS_BYTES = 2**22, 2**26


def stored_result(file: Path) -> dict[str, Any]:
    """Return a finished run's metrics and its `overrides`. Raises UserError if the file is damaged."""
    try:
        result = json.loads(read_text(file, MAX_RESULT_BYTES))
        if not isinstance(result["overrides"], list) or not all(isinstance(o, str) for o in result["overrides"]):
            raise ValueError("overrides are no options")
        return {**result, "steps": int(result["steps"])}
    except (OSError, ValueError, KeyError, TypeError, RecursionError, OverflowError) as error:
        raise UserError(f"{file} is damaged ({error!r}); remove it: the run writes it anew") from error


def finished_result(run_dir: Path, max_steps: int) -> dict[str, Any] | None:
    """Return the result of a run that has taken `max_steps` steps or more, else None.

    A run writes `last.ckpt` before `result.json`, so a result can't have more steps than it, nor, where the checkpoints
    were removed, more than `trainer.max_steps` of the stored options.

    Raises: UserError if the file is damaged, or if the run can't have taken its steps.
    """
    file = run_dir / "result.json"
    if not file.is_file():
        return None
    result = stored_result(file)
    steps = result["steps"]
    if not 0 < max_steps <= steps:
        return None
    taken = checkpoint_step(run_dir / "checkpoints" / "last.ckpt")
    source = "checkpoints/last.ckpt"
    if taken is None:
        taken, source = max_steps_of(stored_config(run_dir)), "config.yaml"
    require(
        taken is None or steps <= taken,
        f"{file} is damaged ({steps} steps, and {source} says {taken}); remove it: the run writes it anew",
    )
    return result


def stored_config(run_dir: Path) -> dict[str, Any]:
    """Return the options in a run's `config.yaml`; empty if there is none. Raises UserError if it is damaged."""
    file = run_dir / "config.yaml"
    if not file.is_file():
        return {}
    config = read_yaml(file)
    require(isinstance(config, dict), f"{file} is damaged (no options); the run writes it anew when it is resumed")
    for _ in walk_config(config, str(file)):  # refuses aliases that would expand to more than memory holds
        pass
    return dict(config)


def max_steps_of(config: dict[str, Any]) -> int | None:
    """Return `trainer.max_steps` of a run's options; None without a limit."""
    trainer = config.get("trainer")
    steps = trainer.get("max_steps") if isinstance(trainer, dict) else None
    return steps if is_whole(steps, 1) else None


def read_metrics(file: Path, most: int | None = None) -> tuple[list[str], list[list[str]]]:
    """Return the columns and rows of a `metrics.csv`, numbers as text; missing cells at a row's end are empty.

    Args:
        most: largest size to read, in bytes.

    Raises: UserError if the file is not a run's table, or is larger.
    """
    try:
        reader = csv.reader(io.StringIO(read_text(file, most), newline=""), strict=True)
        columns = next(reader, ["step", "epoch"])
        if "step" not in columns or len({*columns}) < len(columns):
            raise ValueError("no column 'step', or two of one name")
        step, width = columns.index("step"), len(columns)
        rows = [row + [""] * (width - len(row)) for row in reader if row]
        for row in rows:
            if len(row) > width or int(row[step]) < 0:
                raise ValueError(f"row {row}")
            for text in filter(None, row):
                float(text)
        return columns, rows
    except (csv.Error, ValueError, OSError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{file} is damaged ({repr(error)[:200]}); remove it: the run begins a new one") from error
