"""Show tables of runs on a terminal, one for each folder of runs."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Collection, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from rich import box
from rich.cells import cell_len
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from dpm_scales.errors import printable
from dpm_scales.run_folders.evaluations import PREFIX
from dpm_scales.run_folders.state import BEST, STATES, Run
from dpm_scales.tables import cell, column_head, elided

GAP = 2  # characters between columns
SHORTEST_NAME, LONGEST_NAME = 16, 40  # characters of a run's name in a narrow and in a wide table
#: width of a table that is not shown on a terminal: all columns
UNLIMITED = 10_000
STYLES = {"running": "green", "failed": "red", "damaged": "red", "interrupted": "yellow"}
UNITS = ((86400 * 365, "y"), (86400, "d"), (3600, "h"), (60, "min"), (1, "s"))
#: options that say where a run lies and what is trusted, or that have a column of their own
UNSHOWN = ("run_dir", "resume", "allow", "plugins", "trainer.max_steps")


def show_groups(runs: Sequence[Run]) -> None:
    """Print the runs, a table for each folder that holds some of them, at most as wide as the terminal."""
    console = Console()
    width = console.width if sys.stdout.isatty() else UNLIMITED
    console.width = width
    ordered = sorted(runs, key=lambda run: (run.folder.parent, run.folder))
    for _, group in groupby(ordered, lambda run: run.folder.parent):
        console.print(table(list(group), width, time.time()), soft_wrap=True)


def table(runs: Sequence[Run], width: int, now: float) -> Group:
    """Return a table of runs that lie in one folder, at most `width` characters wide, and notes below it.

    Args:
        now: the present, in seconds since 1970.
    """
    folder = runs[0].folder.parent
    counts = Counter(run.state for run in runs)
    states = ", ".join(f"{counts[state]} {state}" for state in STATES if counts[state])
    columns = _columns(runs, now, width)
    # the table has a blank at either edge, and one between columns besides its padding
    needs = {name: max(map(cell_len, (name, *cells))) + GAP for name, cells in columns.items()}
    room, shown = width - 2, set[str]()
    for name in sorted(columns, key=_importance):
        if shown and needs[name] > room:
            continue
        shown.add(name)
        room -= needs[name]
    left = [name for name in columns if name not in shown]
    drawn = Table(box=box.SIMPLE_HEAD, padding=(0, GAP - 1, 0, 0), pad_edge=False)
    for name in (name for name in columns if name in shown):
        drawn.add_column(Text(name), no_wrap=True, justify="right" if _is_number(name) else "left")
    for number, run in enumerate(runs):
        style = STYLES.get(run.state, "")
        row = [Text(columns[name][number], style if name == "state" else "") for name in columns if name in shown]
        drawn.add_row(*row)
    head = f"{printable(str(folder))}: {len(runs)} run{'s' if len(runs) > 1 else ''}, {states}"
    notes = [Text(f"{printable(run.folder.name)}: {printable(run.reason)}") for run in runs if run.reason]
    if left:
        more = f"{len(left)} more column{'s' if len(left) > 1 else ''} with --csv or --json: "
        notes.append(Text(more + elided(", ".join(left), max(width - len(more), 1))))
    return Group(Text(head, "bold"), drawn, *notes, Text(""))


def given_where_varied(runs: Sequence[Run], unshown: Collection[str] = UNSHOWN) -> dict[Path, dict[str, str]]:
    """Return for each folder the options in which the runs differ, with their values; empty where not given.

    A value that was not given is taken from the resolved options: a plain value, or the name of a class.

    Args:
        unshown: options to leave out.
    """
    keys = [key for key in dict.fromkeys(key for run in runs for key in run.overrides) if key not in unshown]
    values = {run.folder: {key: run.overrides.get(key, _resolved(run.config, key)) for key in keys} for run in runs}
    varied = [key for key in keys if len({given[key] for given in values.values()}) > 1]
    return {folder: {key: given[key] for key in varied} for folder, given in values.items()}


def _resolved(config: dict[str, Any], key: str) -> str:
    value: Any = config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    if isinstance(value, dict):
        value = str(value.get("_target_", "")).rpartition(".")[2]
    return str(value) if isinstance(value, str | int | float | bool) else ""


def _columns(runs: Sequence[Run], now: float, width: int) -> dict[str, list[str]]:
    """Return the cells of all columns, by the columns' heads."""
    longest = width if width == UNLIMITED else max(SHORTEST_NAME, min(width // 3, LONGEST_NAME))
    varied = given_where_varied(runs)
    keys = list(varied[runs[0].folder])
    heads = {key: printable(column_head(key, keys)) for key in keys}
    metrics = sorted({name for run in runs for name in run.metrics if _is_shown(name)}, key=_metric_order)
    columns = {
        "run": [cell(run.folder.name or str(run.folder), longest) for run in runs],
        "state": [run.state for run in runs],
        "steps": [f"{run.steps}/{'∞' if run.max_steps is None else run.max_steps}" for run in runs],
    }
    for key in keys:
        columns.setdefault(heads[key], [cell(varied[run.folder][key]) for run in runs])
    columns |= {name: [_number(run.metrics.get(name)) for run in runs] for name in metrics}
    columns["changed"] = [_age(now - run.changed) if run.changed else "" for run in runs]
    columns["size"] = [_size(run.bytes) + ("" if run.bytes_complete else "+") for run in runs]
    return columns


def _is_shown(name: str) -> bool:
    """Return whether a metric is a column: losses of bands of scales and norms are not."""
    return name in ("train/loss", "val/loss", BEST) or name.startswith(("eval/", PREFIX))


def _metric_order(name: str) -> tuple[int, str]:
    return (["train", "val", "eval", "evaluate"].index(name.partition("/")[0]), "" if name == "val/loss" else name)


def _is_number(name: str) -> bool:
    """Return whether a column holds numbers, which are right-aligned."""
    return name in ("steps", "changed", "size") or _is_shown(name)


def _importance(name: str) -> int:
    """Return the priority of a column if not all fit: the lowest numbers are shown first."""
    first = ("run", "state", "steps", "val/loss", "changed")
    last = ("val/best_loss", "train/loss", "size")
    is_metric = name.startswith(("eval/", PREFIX))
    return first.index(name) if name in first else 10 + last.index(name) if name in last else 6 + (not is_metric)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _age(seconds: float) -> str:
    """Return a duration in its largest unit, such as "3 h"."""
    for unit, name in UNITS:
        if seconds >= unit:
            return f"{seconds / unit:.0f} {name} ago"
    return "now"


def _size(number: int) -> str:
    """Return a number of bytes in units of 1000, such as "12 MB"."""
    size = float(number)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 999.5:
            return f"{size:.0f} {unit}" if size >= 9.95 or unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
