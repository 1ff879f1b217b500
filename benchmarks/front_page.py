"""Write the first rows of the leaderboard into README.md, between its two marks.

    python -m benchmarks.front_page --table mnist_13440_images --rows 6

The rows are those of docs/leaderboard/NAME.md, best first, and only the best of each process; their machines and dates
come from rows.csv beside it.
"""

from __future__ import annotations

import argparse
import csv
import textwrap
from collections.abc import Sequence
from pathlib import Path

from benchmarks.rows import with_part
from dpm_scales.errors import require
from dpm_scales.storage import write_text

ROOT = Path(__file__).resolve().parents[1]
START, END = "<!-- leaderboard -->", "<!-- end of leaderboard -->"
DROPPED = ("seeds", "KD of `auto`", "training s", "ms / image", "commit, date, machine")


def cells(line: str) -> list[str]:
    """Return the cells of a row of a Markdown table."""
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def first_rows(table: str, number: int) -> list[str]:
    """Return the head of a leaderboard table, its first `number` processes, and the real images.

    Of the variants of a process, "warm b=1", the process itself is shown if it has a row, else the best of them.
    """
    lines = [line for line in table.splitlines() if line.startswith("|")]
    head = cells(lines[0])
    kept = [i for i, name in enumerate(head) if name not in DROPPED]
    body = [cells(line) for line in lines[2:]]
    plain, rows, seen = {row[0] for row in body}, [], set()
    for row in body:
        family = row[0].split()[0]
        is_chosen = family not in seen and len(seen) < number and (row[0] == family or family not in plain)
        if is_chosen or row[0].startswith("real images"):
            seen.add(family)
            rows.append(f"| {' | '.join(row[i] for i in kept)} |")
    return [f"| {' | '.join(head[i] for i in kept)} |", "|" + "---|" * len(kept), *rows]


def section(folder: Path, name: str, number: int) -> str:
    """Return the text between the marks."""
    known = sorted(path.stem for path in folder.glob("*.md"))
    require(name in known, f"no table {name} in {folder}; there are {', '.join(known)}")
    table = (folder / f"{name}.md").read_text()
    image_set, _, budget = name.partition("_")
    budget = budget.replace("_", " ")
    rows = first_rows(table, number)
    names = {cells(row)[0] for row in rows}
    with (folder / "rows.csv").open(newline="") as file:
        known_lines = [line for line in csv.DictReader(file) if (line["set"], line["budget"]) == (image_set, budget)]
    lines = [line for line in known_lines if line["row"] in names]
    require(bool(lines), f"{folder / 'rows.csv'} has no rows of {image_set} and {budget}; draw its tables anew")
    machines = " and ".join(sorted({line["machine"] for line in lines if line["machine"]}))
    dates = sorted({line["date"] for line in lines})
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    what = table.splitlines()[0].rstrip(".")
    about = f"{image_set.upper()}, {budget} for each row ({machines}; {when}). {what}; columns are evaluations."
    return "\n".join(
        [
            textwrap.fill(about, 120),
            "",
            *rows,
            "",
            "[All rows, and what they say](docs/leaderboard.md).",
        ]
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--table", required=True, metavar="NAME", help="of docs/leaderboard/NAME.md")
    parser.add_argument("--rows", type=int, default=6, metavar="N", help="number of processes")
    parser.add_argument("--page", type=Path, default=ROOT / "README.md")
    parser.add_argument("--folder", type=Path, default=ROOT / "docs" / "leaderboard")
    options = parser.parse_args(arguments)
    text = options.page.read_text()
    part = section(options.folder, options.table, options.rows)
    write_text(options.page, with_part(text, START, END, f"{part}\n", options.page))


if __name__ == "__main__":
    main()
