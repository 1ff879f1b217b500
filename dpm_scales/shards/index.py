"""The index of a set of tar shards, `index.json`, with their names, sizes, numbers of images and checksums.

    {"format": "dpm_scales shards", "version": 1, "images": 1000, "image_size": [32, 32], "num_classes": 2,
     "class_names": ["cat", "dog"],
     "shards": [{"name": "train-000000.tar", "part": "train", "images": 1000, "bytes": 4096000, "sha256": "…"}, …],
     "made": {…}}

Names are relative to the index and never lead out of its folder, so a stranger's index can't name any other file or
server.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from dpm_scales.errors import UserError, is_whole, printable, require

INDEX = "index.json"
FORMAT, VERSION = "dpm_scales shards", 1
MAX_INDEX_BYTES = 64 * 2**20
MOST = 2**48
PARTS = ("", "train", "val")
_SHA256 = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class ShardEntry:
    """One shard.

    Attributes:
        name: path relative to the index, with slashes.
        images: number of images.
        bytes: size of the file.
        sha256: SHA-256 of the file, hexadecimal; None if it was not read in full.
        part: "train", "val", or "" if the split is drawn.
    """

    name: str
    images: int
    bytes: int
    sha256: str | None = None
    part: str = ""


@dataclass(frozen=True)
class ShardIndex:
    """A set of shards.

    Attributes:
        shards: in order of name.
        image_size: (H, W) of all images; None if sizes differ.
        num_classes: number of labels; None without labels.
        class_names: one name for each label, or None.
        made: settings with which the shards were made, for the record.
    """

    shards: tuple[ShardEntry, ...]
    image_size: tuple[int, int] | None = None
    num_classes: int | None = None
    class_names: tuple[str, ...] | None = None
    made: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        """Return the number of images."""
        return sum(shard.images for shard in self.shards)

    def to_json(self) -> str:
        """Return the text of the file, identical for equal indices."""
        shards = [
            {"name": s.name, "part": s.part, "images": s.images, "bytes": s.bytes, "sha256": s.sha256}
            for s in self.shards
        ]
        head = {
            "format": FORMAT,
            "version": VERSION,
            "images": len(self),
            "image_size": None if self.image_size is None else list(self.image_size),
            "num_classes": self.num_classes,
            "class_names": None if self.class_names is None else list(self.class_names),
            "made": self.made,
        }
        lines = ",\n".join(f"  {json.dumps(shard)}" for shard in shards)
        return f'{json.dumps(head, indent=1)[:-2]},\n "shards": [\n{lines}\n ]\n}}\n'


def parse_index(text: bytes | str, source: str) -> ShardIndex:
    """Return the index in a file's text.

    Args:
        source: the file, for messages.

    Raises: UserError for anything that this program would not have written, and names that lead out of the folder.
    """
    try:
        held = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{source} is not JSON ({error}); make it again with dpm-scales data index") from error
    ours = isinstance(held, dict) and held.get("format") == FORMAT
    require(ours, f"{source} is not an index of shards; make one with dpm-scales data index")
    version = held.get("version")
    known = f"{source}: version {version!r:.20} of the index, and this program reads {VERSION}; make it again"
    require(version == VERSION, known)
    try:
        shards = tuple(_entry(one) for one in held["shards"])
        size = held["image_size"]
        if size is not None:
            _check(len(size) == 2 and all(is_whole(side, 1) and side < 2**16 for side in size), "image_size", size)
        classes, names = held["num_classes"], held["class_names"]
        _check(classes is None or (is_whole(classes, 1) and classes < 2**31), "num_classes", classes)
        if names is not None:
            ok = isinstance(names, list) and all(isinstance(name, str) for name in names) and len(names) == classes
            _check(ok, "class_names", names)
        made = held.get("made")
        index = ShardIndex(
            shards,
            None if size is None else (size[0], size[1]),
            classes,
            None if names is None else tuple(printable(name) for name in names),
            made if isinstance(made, dict) else {},
        )
    except (KeyError, TypeError, ValueError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise UserError(f"{source} is damaged: {reason}; make it again with dpm-scales data index") from error
    twice = [name for name, number in _counted([shard.name for shard in shards]) if number > 1]
    require(not twice, f"{source} names {twice[0] if twice else ''!r} twice; make it again")
    return index


def _entry(held: Any) -> ShardEntry:
    name, part, images = held["name"], held["part"], held["images"]
    _check(isinstance(name, str) and is_inside(name), "name", name)
    _check(part in PARTS, "part", part)
    for key in ("images", "bytes"):
        _check(is_whole(held[key], 0) and held[key] < MOST, key, held[key])
    sha256 = held["sha256"]
    _check(sha256 is None or (isinstance(sha256, str) and bool(_SHA256.fullmatch(sha256))), "sha256", sha256)
    return ShardEntry(name, images, held["bytes"], sha256, part)


def is_inside(name: str) -> bool:
    """Return whether a name is that of a tar file in or below the folder of its index, on any system and in URLs."""
    path = PurePosixPath(name)
    plain = name.isprintable() and not any(mark in name for mark in "\\:?#%") and len(name) < 1000
    return plain and not path.is_absolute() and ".." not in path.parts and name.endswith(".tar")


def _check(fits: bool, key: str, value: Any) -> None:
    if not fits:
        raise ValueError(f"{key} is {value!r:.60}")


def _counted(names: Sequence[str]) -> list[tuple[str, int]]:
    found: dict[str, int] = {}
    for name in names:
        found[name] = found.get(name, 0) + 1
    return list(found.items())
