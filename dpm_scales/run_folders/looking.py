"""Inspect a folder without changing it: its files and their size, and who holds its lock."""

from __future__ import annotations

import os
import stat
import struct
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from dpm_scales.errors import UserError, printable
from dpm_scales.storage import entries_below, open_regular


@dataclass(frozen=True)
class Survey:
    """The files in a folder, at any depth.

    Attributes:
        bytes: size of all files; one with several names in the folder counts once.
        files: paths of the files.
        refusal: why nothing may be written there, see `check_folder`; None if it may.
        complete: whether all entries were seen.
    """

    bytes: int
    files: list[Path]
    refusal: str | None
    complete: bool


def survey(folder: str | Path, most: int = 10_000) -> Survey:
    """Return the files in `folder` and their size, of at most `most` entries, without following links."""
    sizes: dict[tuple[int, int], int] = {}
    files, first, count = [], None, 0
    for entry, refusal in entries_below(folder):
        count += 1
        if count > most:
            break
        first = first or refusal
        with suppress(OSError):  # removed since
            status = entry.stat(follow_symlinks=False)
            if stat.S_ISREG(status.st_mode):
                sizes[status.st_dev, status.st_ino] = status.st_size
                files.append(Path(entry.path))
    return Survey(sum(sizes.values()), files, first, count <= most)


def lock_holder(path: Path) -> str | None:
    """Return the name of the other process that holds the lock at `path`, without taking it; None if there is none.

    Locks of this process are not seen, nor are any where the operating system can't be asked (Windows).
    """
    # struct flock, whose layout Python does not provide: (type, whence, start, length, pid) in another order
    layout, order = ("qqihh", (3, 4, 0, 1, 2)) if sys.platform == "darwin" else ("hhqqi0q", (0, 1, 2, 3, 4))
    try:
        import fcntl

        with open_regular(path) as file:
            values = (fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
            asked = struct.pack(layout, *(values[order.index(place)] for place in range(5)))
            answer = struct.unpack(layout, fcntl.fcntl(file, fcntl.F_GETLK, asked))
            if answer[order[0]] == fcntl.F_UNLCK:
                return None
            return printable(file.read(200).decode(errors="replace").strip()) or "another process"
    except (ImportError, OSError, UserError):
        return None
