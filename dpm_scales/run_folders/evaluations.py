"""Read the results of `evaluate.py`, and find the runs that they belong to."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dpm_scales.errors import UserError, require
from dpm_scales.storage import read_text

#: file, and its format's name
RESULT, FORMAT = "evaluation.json", "dpm_scales evaluation"
MAX_BYTES = 2**22
PREFIX = "evaluate/"
BITS = f"{PREFIX}bits_per_dim"
LOWER, HIGHER = "lower", "higher"
_DATE = re.compile(r"\d{4}-\d\d-\d\dT[\d:.+]{5,30}")


@dataclass(frozen=True)
class Evaluation:
    """A result of `evaluate.py`.

    Attributes:
        file: the `evaluation.json`.
        model: as it was given: a run, an export or a checkpoint; None for images.
        date: in ISO 8601, UTC; empty if it is not stored.
        samples: number of samples that were evaluated; None if it is not stored.
        values: metrics by name, ``evaluate/…``.
        better: "lower" or "higher", by name.
    """

    file: Path
    model: str | None = None
    date: str = ""
    samples: int | None = None
    values: dict[str, float] = field(default_factory=dict)
    better: dict[str, str] = field(default_factory=dict)


def read_evaluation(file: Path) -> Evaluation:
    """Return the result of `evaluate.py` in a file. Raises UserError for any other file, and for a damaged one."""
    try:
        result = json.loads(read_text(file, MAX_BYTES))
        require(isinstance(result, dict) and result["format"] == FORMAT, "another format")
        values, better = {}, {}
        for name, figure in result["figures"].items():
            key = metric_key(name)
            values[key], better[key] = float(figure["value"]), str(figure.get("better"))
        likelihood = result.get("likelihood")
        if isinstance(likelihood, dict):
            values[BITS], better[BITS] = float(likelihood["bits"]), LOWER
        fake = result["fake"]
        model, number, date = fake.get("model"), fake.get("number"), str(result.get("date"))
        return Evaluation(
            file,
            model if isinstance(model, str) else None,
            date if _DATE.fullmatch(date) else "",
            number if isinstance(number, int) else None,
            {name: value for name, value in values.items() if math.isfinite(value)},
            {name: way for name, way in better.items() if way in (LOWER, HIGHER)},
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        reason = str(error) if isinstance(error, UserError) else repr(error)[:200]
        raise UserError(f"{file} is damaged ({reason}); remove it, or evaluate again") from error


def metric_key(name: str) -> str:
    """Return the name under which a run lists a figure of `evaluate.py`: FD-efflite0 as evaluate/fd_efflite0."""
    return PREFIX + re.sub(r"\W+", "_", name.lower())


def evaluated_run(evaluation: Evaluation, runs: dict[Path, Any]) -> Path | None:
    """Return the run, a key of `runs` (by resolved folder), that an evaluation's model belongs to; None without one.

    A relative path is looked up in the current folder and in the parents of the evaluation's file, one of which may be
    the folder in which `evaluate.py` was called.
    """
    if evaluation.model is None or "\0" in evaluation.model:
        return None
    places = (Path(), *evaluation.file.absolute().parents)
    for place in places:
        try:
            model = (place / evaluation.model).resolve()
        except (OSError, RuntimeError, ValueError):  # too long, or a loop of links
            continue
        for folder in (model, *list(model.parents)[:2]):  # RUN, RUN/model, RUN/checkpoints/last.ckpt
            if folder in runs:
                return folder
    return None
