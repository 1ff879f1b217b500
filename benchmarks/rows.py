"""Share the rows of benchmarks between processes, keep them in CSV files, and write their tables on pages."""

from __future__ import annotations

import csv
import io
import json
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from dpm_scales.errors import UserError, require
from dpm_scales.locks import lock
from dpm_scales.storage import write_text
from dpm_scales.tables import csv_text

Row = dict[str, Any]


@contextmanager
def claimed(path: Path) -> Iterator[bool]:
    """Hold the lock of a row while the body runs; yield whether it is held, and print who holds it otherwise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        is_held = True
        try:
            stack.enter_context(lock(path, "is run by", "it takes this row"))
        except UserError as other:
            print(other, flush=True)
            is_held = False
        yield is_held


def run_process(command: Sequence[str], **options: Any) -> int:
    """Run a command, which ends with this process at SIGTERM; return its exit status.

    Args:
        command: the program and its arguments.
        options: of `subprocess.Popen`.

    Raises: SystemExit at SIGTERM, also at one that arrives while the command starts.
    """
    received: list[int] = []
    process: subprocess.Popen[Any] | None = None

    def end(number: int, _: Any) -> None:
        received.append(number)
        if process is not None:
            process.kill()

    before = signal.signal(signal.SIGTERM, end)
    try:
        process = subprocess.Popen(command, **options)
        if received:
            process.kill()
        with process:
            status = process.wait()
    finally:
        signal.signal(signal.SIGTERM, before)
    if received:
        sys.exit(128 + received[0])
    return status


def finished_rows(out: Path) -> list[Row]:
    """Return a line for each entry of `samples` in OUT/*/*/seed*.json, with the distance of real images as `real_fd`.

    OUT/real.json holds that distance; it is "" for rows of another set or number of samples.
    """
    real_file = out / "real.json"
    real = json.loads(real_file.read_text()) if real_file.is_file() else {}
    lines = []
    for path in sorted(out.glob("*/*/seed*.json")):
        row = json.loads(path.read_text())
        same = (real.get("set"), real.get("number")) == (row["set"], row["number"])
        row["real_fd"] = round(real["fd"], 4) if same else ""
        lines += [{**row, **entry} for entry in row.pop("samples")]
    return lines


def read_csv(path: Path) -> list[Row]:
    """Return the lines of a CSV file with a header; none if there is no file."""
    return list(csv.DictReader(io.StringIO(path.read_text()))) if path.is_file() else []


def write_csv(path: Path, lines: Sequence[Row]) -> None:
    """Write lines under a header of all their keys."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, csv_text(list(dict.fromkeys(key for line in lines for key in line)), lines))


def require_same(path: Path, found: Row, settings: dict[str, str], number: int) -> None:
    """Raise UserError if a row that is finished in part was made with other settings or numbers of samples."""
    for key, value in settings.items() if found else ():
        require(
            found[key] == value, f"{path} has {key}={found[key]!r}, and this command {value!r}; choose another --out"
        )
    numbers = {entry["number"] for entry in found.get("samples", ())} - {number}
    require(not numbers, f"{path} has {sorted(numbers)} samples, and this command draws {number}; choose another --out")


def merged(old: Sequence[Row], new: Sequence[Row], key: Sequence[str]) -> list[Row]:
    """Return the lines of both; a new line replaces an old one that agrees in `key`, where 60.0 and "60" agree."""
    found = {tuple(_plain(line.get(name, "")) for name in key): line for line in [*old, *new]}
    return list(found.values())


def grouped(lines: Sequence[Row], key: Sequence[str]) -> list[list[Row]]:
    """Return the lines that agree in `key`, one list for each value, in the order of their first lines."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for line in lines:
        groups.setdefault(tuple(str(line[name]) for name in key), []).append(line)
    return list(groups.values())


def commits_of(lines: Sequence[Row]) -> str:
    """Return commits and dates of the lines, sorted."""
    return ", ".join(sorted({f"{line['commit']}, {line['date']}" for line in lines}))


def real_distance(lines: Sequence[Row]) -> str:
    """Return the distance of real images in three digits, or "" if it was not measured."""
    found = sorted({str(line["real_fd"]) for line in lines} - {""})
    return f"{float(found[0]):.3g}" if found else ""


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value).removesuffix(".0")


def publish(lines: Sequence[Row], found: str, kept: Path, page: Path | None, start: str, end: str) -> None:
    """Write all lines to the CSV file `kept`, and a table of them between the lines `start` and `end` of a page.

    Raises: UserError if the page has no place for the table.
    """
    write_csv(kept, lines)
    if page is not None:
        write_text(page, with_part(page.read_text(), start, end, found, page))


def with_part(text: str, start: str, end: str, part: str, page: object) -> str:
    """Return the text of a page with `part` between its lines `start` and `end`.

    Raises: UserError, naming `page`, if it lacks those lines.
    """
    before, has_start, rest = text.partition(start)
    _, has_end, after = rest.partition(end)
    require(bool(has_start and has_end), f"{page} needs a line {start} and below it a line {end}")
    return f"{before}{start}\n\n{part}\n{end}{after}"
