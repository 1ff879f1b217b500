"""Rank runs by a metric whose direction is known."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

from dpm_scales.errors import UserError, require, suggest
from dpm_scales.run_folders.evaluations import HIGHER, LOWER
from dpm_scales.run_folders.state import Run

#: names of metrics after their ``eval/`` or ``val/``; `evaluate.py` stores the directions of its own
_LOWER = re.compile(r"(best_)?loss(_\w[\w.]*)?|f(id|d_\w+)|k(id|d_\w+)|bits_per_dim|bad_steps", re.ASCII)
_HIGHER = re.compile(r"precision|recall|density|coverage")
#: options of the data that do not change the validation images
SAME_IMAGES = ("batch_size", "num_workers", "pin_memory", "decoded", "on_device", "drop_last", "seed") + (
    *("random_flip", "random_crop"),
)


def best_runs(runs: Sequence[Run], metric: str, direction: str | None = None) -> list[Run]:
    """Return the runs that have a finite value of a metric and a model to load, the best first.

    Equal values are sorted by folder. Damaged runs are left out.

    Args:
        direction: "lower" or "higher" is better; None for the metric's own.

    Raises: UserError if no run has the metric, or if its direction is not known.
    """
    known = sorted({name for run in runs for name in run.metrics})
    require(bool(runs), "there are no runs to compare")
    require(bool(known), "no run has metrics yet")
    require(metric in known, f"unknown metric {metric!r}: {suggest(metric, known)}")
    sign = -1 if (direction or direction_of(metric, runs)) == HIGHER else 1
    able = [run for run in runs if run.state != "damaged" and run.loadable]
    having = [run for run in able if math.isfinite(run.metrics.get(metric, math.nan))]
    return sorted(having, key=lambda run: (sign * run.metrics[metric], run.folder))


def direction_of(metric: str, runs: Sequence[Run]) -> str:
    """Return whether "lower" or "higher" values of a metric are better. Raises UserError if that is not known."""
    stored = {one.better[metric] for run in runs for one in run.evaluations if metric in one.better}
    name = metric.partition("/")[2]
    stored |= {LOWER} if _LOWER.fullmatch(name) else {HIGHER} if _HIGHER.fullmatch(name) else set()
    if len(stored) != 1:
        raise UserError(f"whether lower or higher {metric} is better is not stored; add direction=lower or higher")
    return stored.pop()


def laws(runs: Sequence[Run]) -> int:
    """Return the number of different combinations of process, target and data set; their losses are not comparable.

    Runs without stored options count as one.
    """
    return len({repr(_law(run.config)) for run in runs})


def _law(config: dict[str, Any]) -> list[Any]:
    """Return the options in a run's config that determine what a loss measures."""
    data = config.get("data")
    images = {key: value for key, value in data.items() if key not in SAME_IMAGES} if isinstance(data, dict) else data
    return [config.get("process"), config.get("target"), images]
