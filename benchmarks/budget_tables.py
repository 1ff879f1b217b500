"""Write the table of `benchmarks.budgets` from its finished rows, and keep all rows in a CSV file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.rows import Row, commits_of, finished_rows, grouped, merged, publish, read_csv, real_distance
from benchmarks.spectral_tables import spread
from dpm_scales.errors import require
from dpm_scales.storage import write_text

START, END = "<!-- budgets -->", "<!-- end of budgets -->"
KEY = ("set", "trick", "budget", "seed", "average", "number", "machine")
"""Columns that identify a line of the CSV file."""
USUAL = 10
"""The average with `ema.decay`'s ramp, which row names do not mention."""
NAMES = {0: "last weights", 5: "EMA over a fifth", 20: "EMA over a twentieth"}


def table(lines: Sequence[Row]) -> str:
    """Return a Markdown table for each set and machine: a row for each trick, a column for each budget."""
    return "\n".join(_group(own) for own in grouped(lines, ("set", "machine", "number")))


def _group(lines: Sequence[Row]) -> str:
    first = lines[-1]
    budgets = sorted({float(line["budget"]) for line in lines})
    rows: dict[str, dict[float, list[Row]]] = {}
    for line in lines:
        average = int(line["average"])
        name = str(line["trick"]) if average == USUAL else f"{line['trick']}, {NAMES[average]}"
        rows.setdefault(name, {}).setdefault(float(line["budget"]), []).append(line)

    def order(name: str) -> tuple[float, ...]:
        own = rows[name]
        return tuple(float(np.mean([float(r["fd"]) for r in own[b]])) if b in own else np.inf for b in budgets)

    seeds = sorted({int(line["seed"]) for line in lines})
    text = [
        f"{first['set']}, {first['figure']}, {first['number']} samples, lower is better; {first['machine']}; seeds "
        f"{', '.join(map(str, seeds))}: the mean ± half of the range. In brackets the steps. Commits "
        f"{commits_of(lines)}.",
        "",
        f"| | {' | '.join(f'{budget:g} s' for budget in budgets)} |",
        "|---" * (len(budgets) + 1) + "|",
    ]
    for name in sorted(rows, key=order):
        cells = [_cell(rows[name].get(budget, [])) for budget in budgets]
        text.append(f"| {name} | {' | '.join(cells)} |")
    real = real_distance(lines)
    if real:
        text.append(f"| real images | {' | '.join([real] * len(budgets))} |")
    return "\n".join(text) + "\n"


def _cell(own: Sequence[Row]) -> str:
    if not own:
        return ""
    steps = float(np.mean([float(line["steps"]) for line in own]))
    return f"{spread([float(line['fd']) for line in own])} ({steps:.0f})"


def write_page(out: Path, path: Path, page: Path | None) -> str:
    """Add the finished rows in `out` to the CSV file `path`; rewrite the table of a page; return the table.

    Raises: UserError if there are no rows, or the page has no place for the table.
    """
    lines = merged(read_csv(path), finished_rows(out), KEY)
    require(bool(lines), f"{out}: no finished rows")
    found = table(lines)
    write_text(out / "budgets.md", found)
    publish(lines, found, path, page, START, END)
    return found
