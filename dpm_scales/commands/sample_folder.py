"""Manage the output folder of `sample.py`: the images of one command, and `sample.json`, the record of their settings.

The record is written before the first image. The same command may run again in its folder, also for more images; any
other command needs `overwrite=true`, which removes the images that the record describes.
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

from dpm_scales.commands.sample_shards import PER_SHARD, begin, numbered_shards
from dpm_scales.data.image_sets import SHEETS
from dpm_scales.errors import UserError, require
from dpm_scales.locks import lock
from dpm_scales.storage import check_writable, guarded, open_regular, write_text

RECORD = "sample.json"
FORMAT = "dpm_scales samples"
VERSION = 1
PRIOR_RECORD = "prior_images.json"
"""File that names the image each sample started from."""
SMALLEST_MEMBER = 1024
"""Bytes of the smallest file in a tar file, with its header."""

MAX_RECORD_BYTES = 2**20
NAMED = 3  # largest number of differences in a message
PATHS = ("model", "path")
"""Keys of the record that hold a location rather than content."""
NOT_COMPARED = (*PATHS, "class_names")
"""Keys of the record in which two commands for the same images may differ."""


def image_name(number: int) -> str:
    """Return the file name of an image."""
    return f"{number:06d}.png"


def image_text(record: Mapping[str, Any], number: int) -> dict[str, str]:
    """Return the metadata of an image; equal for equal seed and weights."""
    seed, weights, guide = str(record["seed"]), str(record["weights_sha256"]), record.get("guide")
    text = {"Software": "dpm_scales", "seed": seed, "number": str(number), "weights_sha256": weights}
    return text | ({} if guide is None else {"guide_sha256": str(guide["weights_sha256"])})


def numbered_images(folder: Path) -> dict[Path, int]:
    """Return the numbered images in a folder, with their numbers."""
    found = [path for path in folder.glob("[0-9]*.png") if re.fullmatch("[0-9]+", path.stem)]
    return {path: int(path.stem) for path in sorted(found) if len(path.stem) < 300}


def require_free(folder: Path, record: Mapping[str, Any], overwrite: bool) -> None:
    """Raise UserError if the folder holds images that the command of `record` may neither add to nor overwrite."""
    images = numbered_images(folder)
    shards = numbered_shards(folder)
    present = [*images, *shards, *(folder / name for name in SHEETS if (folder / name).exists())]
    if not present:
        return
    count, older = int(record["number"]), read_record(folder)
    if overwrite:
        limit = max(count, 0 if older is None else older["number"])
        foreign = [path for path, number in images.items() if path.name != image_name(number) or number >= limit]
        foreign += shards if older is None or "shards" not in older else []
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
    """Reserve a folder for this command while the body runs, and write `sample.json`.

    With `overwrite`, the files that an older record describes are removed first, and images that would be replaced.

    Raises: UserError if the folder can't be written to, has no room, is in use by another process, or is not free, see
    `require_free`.
    """
    require_free(folder, record, overwrite)
    count = int(record["number"])
    require_room(folder, count, "shards" in record)
    check_writable(folder)
    advice = "wait for it, or choose another out"
    with guarded(folder), lock(folder / ".lock", "is being written to by", advice):
        require_free(folder, record, overwrite)  # again: another process may have just finished
        older = read_record(folder)
        if overwrite and (older is None or differences(older, json.loads(to_json(record)))):
            _remove(folder, () if older is None else (*SHEETS, PRIOR_RECORD))
        write_text(folder / RECORD, to_json(record))
        if "shards" in record:
            begin(folder)
        yield


def require_room(folder: Path, count: int, in_shards: bool = False) -> None:
    """Raise UserError if the disk of `folder` has no room for `count` images in all, even of minimum size.

    Args:
        in_shards: images lie in tar files, where each takes at least a header and a block of content.
    """
    place = next((parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.is_dir()), None)
    if place is None or not hasattr(os, "statvfs"):
        return
    disk = os.statvfs(place)
    blocks = disk.f_bavail if disk.f_blocks else math.inf
    if in_shards:
        kept = sum(path.suffix == ".tar" for path in numbered_shards(folder))
        most = PER_SHARD * kept + blocks * disk.f_frsize / SMALLEST_MEMBER
        require(count <= most, f"the disk of {folder} has room for at most {most:.0f} of {count} images; draw fewer")
        return
    room = min(blocks, disk.f_favail if disk.f_files else math.inf)  # a file takes at least one block
    if count > room + len(numbered_images(folder)):
        raise UserError(f"{count} images need as many files, and the disk of {folder} has room for {room}; draw fewer")


def read_record(folder: Path) -> dict[str, Any] | None:
    """Return the content of the folder's `sample.json`, or None if it is missing or not understood by this version."""
    try:
        with open_regular(folder / RECORD) as file:
            text = file.read(MAX_RECORD_BYTES + 1)
        record = json.loads(text) if len(text) <= MAX_RECORD_BYTES else None
    except (OSError, ValueError, RecursionError):  # includes UserError, raised for a pipe
        return None
    if not isinstance(record, dict) or record.get("format") != FORMAT or record.get("version") != VERSION:
        return None
    number = record.get("number")
    return record if type(number) is int and number >= 0 else None


def differences(older: Mapping[str, Any], newer: Mapping[str, Any]) -> list[str]:
    """Return the differences between two records that change images: ``"seed is 0 there and 5 here"``.

    Paths and the number of images are ignored, since each image depends only on its own number.
    """
    before, now = _leaves(older), _leaves(newer)
    keys = [key for key in {**now, **before} if before.get(key) != now.get(key)]
    if "number" in keys and before["number"] < now["number"]:
        keys.remove("number")
    return [
        f"{json.dumps(key)[1:-1]} is {_short(before.get(key))} there and {_short(now.get(key))} here" for key in keys
    ]


def to_json(record: Mapping[str, Any]) -> str:
    """Return the JSON text of a record, the same for the same record."""
    return json.dumps(record, indent=1, default=lambda value: type(value).__name__) + "\n"


def _leaves(record: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values by dotted key, without paths."""
    leaves: dict[str, Any] = {}
    for key, value in record.items():
        if isinstance(value, Mapping) and value:
            leaves |= _leaves(value, f"{prefix}{key}.")
        elif key not in NOT_COMPARED:
            leaves[f"{prefix}{key}"] = value
    return leaves


def _short(value: Any) -> str:
    """Return a value for a message: ASCII, without control characters, shortened."""
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:36]} …"


def _remove(folder: Path, beside: tuple[str, ...]) -> None:
    try:
        for path in (*numbered_images(folder), *numbered_shards(folder), *(folder / name for name in beside)):
            path.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"can't remove {error.filename}: {error.strerror}; choose another out") from error
