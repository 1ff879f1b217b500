"""Find the folders of runs below a folder."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from dpm_scales.errors import UserError, require
from dpm_scales.run_folders.evaluations import RESULT, evaluated_run, read_evaluation
from dpm_scales.run_folders.state import Run, read_run

DEEPEST = 8
MOST_ENTRIES = 50_000
#: folders that hold no runs and may be large
SKIPPED = ("__pycache__", "node_modules", "site-packages")


@dataclass
class Found:
    """The runs below a folder.

    Attributes:
        runs: sorted by folder.
        complete: False if the folder holds more than was searched.
        unread: one line for each result of `evaluate.py` that can't be read.
    """

    runs: list[Run] = field(default_factory=list)
    complete: bool = True
    unread: list[str] = field(default_factory=list)


def find_runs(place: str | Path | None = None) -> Found:
    """Return the runs in and below a folder, with the results of `evaluate.py` that lie there.

    Links are not followed, except for `place` itself and, in the current folder, `runs` and `sweeps`. Hidden folders
    are left out. Nothing but the small files of each run is read.

    Args:
        place: None for the current folder.

    Raises: UserError if there is no such folder.
    """
    root = Path("" if place is None else place)
    require(root.is_dir(), f"{root} is no folder; name one that holds runs")
    starts = [root, *(Path(name) for name in ("runs", "sweeps") if place is None and Path(name).is_symlink())]
    folders, files, complete = _walk([start for start in starts if start.is_dir()])
    found = Found([read_run(folder) for folder in sorted(folders)], complete)
    by_place = {run.folder.resolve(): run for run in found.runs}
    for file in files:
        try:
            evaluation = read_evaluation(file)
        except UserError as error:
            found.unread.append(str(error))
            continue
        run = evaluated_run(evaluation, by_place)
        if run is not None:
            by_place[run].add(evaluation)
    return found


def _walk(starts: Iterable[Path]) -> tuple[list[Path], list[Path], bool]:
    """Return the folders of runs, the results of `evaluate.py` outside of them, and whether everything was seen."""
    runs, files, seen, complete = [], [], 0, True
    queue = deque((start, 0) for start in starts)
    while queue:
        folder, depth = queue.popleft()
        try:
            entries = sorted(islice(os.scandir(folder), MOST_ENTRIES + 1), key=lambda entry: entry.name)
        except OSError:  # unreadable, or removed since
            continue
        names = {entry.name for entry in entries}
        if is_run(names):
            runs.append(folder)
            continue
        if RESULT in names:
            files.append(folder / RESULT)
        seen += len(entries)
        below = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
        below = [name for name in below if not name.startswith(".") and name not in SKIPPED]
        if depth < DEEPEST and seen <= MOST_ENTRIES:
            queue.extend((folder / name, depth + 1) for name in below)
        elif below:
            complete = False
    return runs, files, complete


def is_run(names: Iterable[str]) -> bool:
    """Return whether a folder with entries of these names is one that `train.py` made."""
    names = set(names)
    return bool(names & {"overrides.yaml", "result.json"}) or {"checkpoints", "config.yaml"} <= names
