"""The folder that `sample.py` writes to: one command's images, and `sample.json`, which says how they were made.

The record is written before the first image. A folder whose record is that of a command takes that command again, and
more images of it; every other command needs `overwrite=true`, which removes what the record describes.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dpm_scales.data.image_sets import SHEETS
from dpm_scales.errors import UserError, require
from dpm_scales.storage import check_writable, guarded, lock, open_regular, write_text

RECORD = "sample.json"
FORMAT = "dpm_scales samples"
VERSION = 1
PRIOR_RECORD = "prior_images.json"
"""Which image each sample started from."""


MAX_RECORD_BYTES = 2**20
NAMED = 3  # differences that a message names
PATHS = ("model", "path")
"""Keys of the record that say where something lay, not what it was."""


def image_name(number: int) -> str:
    """Name of the image with a number."""
    return f"{number:06d}.png"


def image_text(record: Mapping[str, Any], number: int) -> dict[str, str]:
    """Metadata of the image with a number: the same for the same seed and weights."""
    seed, weights = str(record["seed"]), str(record["weights_sha256"])
    return {"Software": "dpm_scales", "seed": seed, "number": str(number), "weights_sha256": weights}


def numbered_images(folder: Path) -> dict[Path, int]:
    """The numbered images in a folder, with their numbers."""
    found = [path for path in folder.glob("[0-9]*.png") if re.fullmatch("[0-9]+", path.stem)]
    return {path: int(path.stem) for path in sorted(found) if len(path.stem) < 300}


def require_free(folder: Path, record: Mapping[str, Any], overwrite: bool) -> None:
    """Raise UserError if the folder holds images that the command of `record` may not write beside or over."""
    images = numbered_images(folder)
    present = [*images, *(folder / name for name in SHEETS if (folder / name).exists())]
    if not present:
        return
    count, older = int(record["number"]), read_record(folder)
    if overwrite:
        limit = max(count, 0 if older is None else older["number"])
        foreign = [path for path, number in images.items() if path.name != image_name(number) or number >= limit]
        require(
            not foreign,
            f"{folder} holds {foreign[0].name!r}, which overwrite=true does not replace: no {RECORD} describes it; "
            "choose another out"
            if foreign
            else "",
        )
        return
    if older is None:
        raise UserError(
            f"{folder} holds images already ({present[0].name!r}), and no {RECORD} says that they are of this command; "
            "choose another out, or set overwrite=true"
        )
    changes = differences(older, json.loads(to_json(record)))
    more = len(changes) - NAMED
    shown = "; ".join(changes[:NAMED]) + (f"; and {more} more" if more > 0 else "")
    require(
        not changes,
        f"{folder} holds images of another command ({shown}); choose another out, or set overwrite=true",
    )


@contextmanager
def claimed(folder: Path, record: Mapping[str, Any], overwrite: bool) -> Iterator[None]:
    """Keep a folder for this command while its body runs; `sample.json` is written first.

    With `overwrite`, all that the record there describes is removed first, and images in the place of new ones.

    Raises: UserError if the folder can't be written to, has no room, is in use by another process, or is not free, see
    `require_free`.
    """
    require_free(folder, record, overwrite)
    require_room(folder, int(record["number"]))
    check_writable(folder)
    advice = "wait for it, or choose another out"
    with guarded(folder), lock(folder / ".lock", "is being written to by", advice):
        require_free(folder, record, overwrite)  # once more: another process may have just finished
        older = read_record(folder)
        if overwrite and (older is None or differences(older, json.loads(to_json(record)))):
            _remove(folder, () if older is None else (*SHEETS, PRIOR_RECORD))
        write_text(folder / RECORD, to_json(record))
        yield


def require_room(folder: Path, count: int) -> None:
    """Raise UserError unless the disk of `folder` has room for `count` files more than there are, at the least."""
    place = next((parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.is_dir()), None)
    if place is None or not hasattr(os, "statvfs"):
        return
    disk = os.statvfs(place)
    room = min(
        disk.f_bavail if disk.f_blocks else math.inf,  # a file takes a block or more
        disk.f_favail if disk.f_files else math.inf,
    )
    if count > room + len(numbered_images(folder)):
        raise UserError(f"{count} images need as many files, and the disk of {folder} has room for {room}; draw fewer")


def read_record(folder: Path) -> dict[str, Any] | None:
    """Content of the folder's `sample.json`; None if there is none that this version understands."""
    try:
        with open_regular(folder / RECORD) as file:
            text = file.read(MAX_RECORD_BYTES + 1)
        record = json.loads(text) if len(text) <= MAX_RECORD_BYTES else None
    except (OSError, ValueError, RecursionError):  # UserError, for a pipe, is a ValueError
        return None
    if not isinstance(record, dict) or record.get("format") != FORMAT or record.get("version") != VERSION:
        return None
    number = record.get("number")
    return record if type(number) is int and number >= 0 else None


def differences(older: Mapping[str, Any], newer: Mapping[str, Any]) -> list[str]:
    """What makes two records those of different images: ``"seed is 0 there and 5 here"``.

    Paths make no difference, and neither do more images, since each depends on its own number alone.
    """
    before, now = _leaves(older), _leaves(newer)
    keys = [key for key in {**now, **before} if before.get(key) != now.get(key)]
    if "number" in keys and before["number"] < now["number"]:
        keys.remove("number")
    return [
        f"{json.dumps(key)[1:-1]} is {_short(before.get(key))} there and {_short(now.get(key))} here" for key in keys
    ]


def to_json(record: Mapping[str, Any]) -> str:
    """Text of a record; the same for the same record."""
    return json.dumps(record, indent=1, default=lambda value: type(value).__name__) + "\n"


def _leaves(record: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by their dotted keys, without paths."""
    leaves: dict[str, Any] = {}
    for key, value in record.items():
        if isinstance(value, Mapping) and value:
            leaves |= _leaves(value, f"{prefix}{key}.")
        elif key not in PATHS:
            leaves[f"{prefix}{key}"] = value
    return leaves


def _short(value: Any) -> str:
    """A value for a message: ASCII, without control characters, not too long."""
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:36]} …"


def _remove(folder: Path, beside: tuple[str, ...]) -> None:
    try:
        for path in (*numbered_images(folder), *(folder / name for name in beside)):
            path.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"can't remove {error.filename}: {error.strerror}; choose another out") from error
