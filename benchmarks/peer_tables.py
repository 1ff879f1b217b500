"""Write the table of `benchmarks.peers` from its finished rows, and keep all rows in a CSV file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.rows import Row, finished_rows, grouped, merged, publish, read_csv, real_distance
from benchmarks.spectral_tables import spread
from dpm_scales.errors import require
from dpm_scales.storage import write_text

START, END = "<!-- peers -->", "<!-- end of peers -->"
KEY = ("set", "peer", "budget", "seed", "sampler", "number", "batch", "machine")
"""Columns that identify a line of the CSV file."""
NAMES = {"dpm_scales": "**dpm_scales**"}


def read_rows(out: Path) -> list[Row]:
    """Return a line for each finished row and kind of samples, with the machine's ceilings and the real images."""
    ceilings = out / "ceilings.json"
    machine = json.loads(ceilings.read_text()) if ceilings.is_file() else {}
    rates = {f"ceiling_{key}": machine.get(key, "") for key in ("matrix", "convolution", "copy", "share")}
    return [line | rates for line in finished_rows(out)]


def table(lines: Sequence[Row]) -> str:
    """Return a Markdown table for each set, machine, batch and number of samples, the best row of a budget first."""
    return "\n".join(_group(own) for own in grouped(lines, ("set", "machine", "batch", "number")))


def _group(lines: Sequence[Row]) -> str:
    first = lines[-1]
    heads = ["budget s", "library", "M parameters", "M multiply-adds", "start s", "images/s", "MiB"]
    heads += ["sampler", "s / 1000 samples", "FD", "commit, date"]
    text = [
        f"{first['set']}, batches of {first['batch']}, {first['machine']}, torch {first['torch']}; {first['figure']}, "
        f"{first['number']} samples, lower is better.",
        "",
        f"| {' | '.join(heads)} |",
        "|---" * len(heads) + "|",
    ]
    rows: dict[tuple[float, str, str], list[Row]] = {}
    for line in lines:
        rows.setdefault((float(line["budget"]), line["peer"], line["sampler"]), []).append(line)
    order = sorted(rows, key=lambda key: (key[0], float(np.mean([float(line["fd"]) for line in rows[key]]))))
    for budget, peer, sampler in order:
        own = rows[budget, peer, sampler]
        last = own[-1]

        def mean(name: str, own: Sequence[Row] = own) -> float:
            return float(np.mean([float(line[name]) for line in own]))

        cells = [
            f"{budget:g}",
            f"{NAMES.get(peer, peer)} {last['version']}",
            f"{mean('parameters') / 1e6:.2f}",
            f"{mean('multiply_adds'):.0f}",
            f"{mean('start'):.1f}",
            f"{mean('images') / (mean('spent') - mean('start')):.0f}",
            f"{mean('memory'):.0f}",
            sampler,
            f"{1000 * mean('seconds') / mean('number'):.0f}",
            spread([float(line["fd"]) for line in own]),
            f"{last['commit']}, {last['date']}",
        ]
        text.append(f"| {' | '.join(cells)} |")
    real = real_distance(lines)
    if real:
        text.append(f"| | real images | | | | | | | | {real} | |")
    if str(first.get("ceiling_matrix", "")):
        text += ["", _ceilings(first)]
    return "\n".join(text) + "\n"


def _ceilings(line: Row) -> str:
    return (
        f"The machine by itself: {float(line['ceiling_matrix']):.0f} GFLOP/s in a product of 1024 x 1024 matrices, "
        f"{float(line['ceiling_convolution']):.0f} GFLOP/s in the convolutions of a training step of `network=small`, "
        f"each alone, which are {100 * float(line['ceiling_share']):.0f} % of the step's seconds; a copy moves "
        f"{float(line['ceiling_copy']):.1f} GB/s."
    )


def write_page(out: Path, path: Path, page: Path | None) -> str:
    """Add the finished rows in `out` to the CSV file `path`; rewrite the table of a page; return the table.

    Raises: UserError if there are no rows, or the page has no place for the table.
    """
    lines = merged(read_csv(path), read_rows(out), KEY)
    lines.sort(key=lambda line: (str(line["set"]), float(line["budget"])))
    require(bool(lines), f"{out}: no finished rows")
    found = table(lines)
    write_text(out / "peers.md", found)
    publish(lines, found, path, page, START, END)
    return found
