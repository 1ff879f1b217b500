"""`dpm-scales runs`: list runs, name the best, export a model; only the last of these imports torch."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from dpm_scales.cli.output import complain
from dpm_scales.cli.program import program
from dpm_scales.cli.words import split_words
from dpm_scales.commands.runs_table import given_where_varied, show_groups
from dpm_scales.errors import UserError, printable, require, require_choice
from dpm_scales.run_folders.evaluations import HIGHER, LOWER
from dpm_scales.run_folders.find import MOST_ENTRIES, Found, find_runs
from dpm_scales.run_folders.ranking import best_runs, laws
from dpm_scales.run_folders.state import STATES, Run
from dpm_scales.tables import csv_text

HELP = f"""\
usage: {{0}} [DIR] [state=STATE] [--json | --csv]
       {{0}} best [DIR] [metric=val/loss] [top=5] [direction=lower|higher] [--path]
       {{0}} export RUN out=DIR [weights=averaged|raw] [ema=LENGTH] [ema_step=N] [format=diffusers]

List the runs in and below DIR, the current folder by default, with their states, losses and evaluations;
name the best of them; copy a run's model out of its folder.

  state=STATE   only runs that are {", ".join(STATES)}
  --json, --csv everything that is known, for scripts
  metric=NAME   a column of the list, such as val/loss, {"val/best_loss"} or eval/fid
  top=K         the K best; 5 by default, 1 with --path
  --path        only paths, one a line: model=$({{0}} best --path)
  weights=raw   of the last step, in place of the EMA weights
  ema=LENGTH    of a power-function average, from the run's snapshots, which ends at step ema_step
  format=...    diffusers: a pipeline that diffusers loads, of vp or ve with network=diffusers_unet

A folder called best or export is listed as ./best or ./export."""
HELP_FLAGS = ("-h", "--help")
LOSSES_DIFFER = (
    "{metric} compares runs of one process, target and data set, and these have {number}: others measure different "
    "things, and are compared by their samples (metric=eval/… or evaluate/…)"
)


def run(argv: Sequence[str]) -> None:
    """List runs, name the best, or export one, as `HELP` says.

    Args:
        argv: arguments after `dpm-scales runs`.

    Raises: UserError for arguments that can't be used.
    """
    word, rest = (argv[0], argv[1:]) if argv else ("", [])
    if not set(HELP_FLAGS).isdisjoint(argv):
        print(HELP.format(program("runs")))
    elif word == "best":
        _best(rest)
    elif word == "export":
        from dpm_scales.commands.runs_export import export  # loads torch

        export(rest)
    else:
        _list(argv)


def _list(argv: Sequence[str]) -> None:
    asked = split_words(argv, 1, ("state",), ("--json", "--csv"), f"{program('runs')} [DIR]")
    require(len(asked.flags) < 2, "--json and --csv at once; give one")
    state = asked.options.get("state")
    if state is not None:
        require_choice("state", state, STATES)
    found = find_runs(*asked.words)
    runs = [run for run in found.runs if state in (None, run.state)]
    if "--json" in asked.flags:
        print(json.dumps([_as_json(run) for run in runs], indent=1, allow_nan=False))
    elif "--csv" in asked.flags:
        rows = [_as_row(run) for run in runs]
        print(csv_text(list(dict.fromkeys(name for row in rows for name in row)), rows), end="")
    elif runs:
        show_groups(runs)
    else:
        kind = "" if state is None else f"{state} "
        print(f"no {kind}runs in or below {printable(*asked.words) if asked.words else 'the current folder'}")
    _note(found)


def _best(argv: Sequence[str]) -> None:
    usage = f"{program('runs')} best [DIR] [metric=val/loss] [top=K]"
    asked = split_words(argv, 1, ("metric", "top", "direction"), ("--path",), usage)
    path, metric = "--path" in asked.flags, asked.options.get("metric", "val/loss")
    top, direction = asked.number("top", 1 if path else 5), asked.options.get("direction")
    if direction is not None:
        require_choice("direction", direction, (LOWER, HIGHER))
    found = find_runs(*asked.words)
    place = printable(*asked.words) if asked.words else "the current folder"
    try:
        ranked = best_runs(found.runs, metric, direction)
    except UserError as error:
        raise UserError(f"{place}: {error}") from error
    require(bool(ranked), f"{place}: no run has a finite {metric} and a model to load")
    if metric.startswith(("val/", "train/")) and (number := laws(ranked)) > 1:
        _warn(LOSSES_DIFFER.format(metric=metric, number=number))
    ranked = ranked[:top]
    if path:
        for run in ranked:
            name = str(run.folder)
            require(name.isprintable(), f"{printable(name)} has characters that can't be printed; rename it")
            print(name)
        return
    names = [printable(str(run.folder)) for run in ranked]
    width, varied = max(map(len, names)), given_where_varied(ranked)
    for name, run in zip(names, ranked, strict=True):
        options = " ".join(f"{key}={value}" for key, value in varied[run.folder].items() if value)
        line = f"{name:{width}}  {metric} {run.metrics[metric]:<10.6g}  {run.state:11}  {run.steps} steps"
        print(f"{line}  {printable(options)}".rstrip())
    _note(found)


def _note(found: Found) -> None:
    """Print on standard error what was not read."""
    for line in found.unread:
        _warn(line)
    if not found.complete:
        _warn(f"only the first {MOST_ENTRIES} entries were looked at; name a folder that holds the runs")


def _warn(line: str) -> None:
    complain(f"warning: {line}")


def _time(seconds: float) -> str | None:
    """Return a time in ISO 8601, UTC; None for 0, and for one out of the calendar's range."""
    try:
        return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds") if seconds else None
    except (ValueError, OverflowError, OSError):
        return None


def _fields(run: Run) -> dict[str, Any]:
    return {
        "run": str(run.folder),
        "state": run.state,
        "reason": run.reason,
        "steps": run.steps,
        "max_steps": run.max_steps,
        "resumes_from": run.resumes_from,
        "best_step": run.best_step,
        "seconds": run.seconds if run.seconds is not None and math.isfinite(run.seconds) else None,
        "changed": _time(run.changed),
        "bytes": run.bytes,
    }


def _as_json(run: Run) -> dict[str, Any]:
    """Return everything known about a run, with null for numbers that are not finite, which JSON lacks."""
    return _fields(run) | {
        "metrics": {name: value if math.isfinite(value) else None for name, value in run.metrics.items()},
        "options": run.overrides,
        "evaluations": [
            {"file": str(one.file), "date": one.date, "samples": one.samples, "metrics": one.values}
            for one in run.evaluations
        ],
    }


def _as_row(run: Run) -> dict[str, Any]:
    """Return a run as a row of a table: fields, metrics and options; an option named like a field is left out."""
    row = _fields(run) | run.metrics
    row = row | {key: value for key, value in run.overrides.items() if key not in row}
    return {
        printable(name): "" if value is None else printable(value) if isinstance(value, str) else value
        for name, value in row.items()
    }
