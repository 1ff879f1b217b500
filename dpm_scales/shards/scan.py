"""Read tar shards to find the entries of an index, and their faults."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from dpm_scales import images
from dpm_scales.data.files import LISTED, read_header
from dpm_scales.data.folder import VAL_FOLDERS
from dpm_scales.errors import UserError, require
from dpm_scales.locks import lock
from dpm_scales.shards.cache import INDICES
from dpm_scales.shards.index import ShardEntry, ShardIndex, parse_index
from dpm_scales.shards.places import Located, read_index
from dpm_scales.shards.shard import Keys, Shard, decode
from dpm_scales.storage import make_folder, write_text

VERSION = 1
"""Version of the scan; increase it when the same shards give a different index."""


@dataclass
class Faults:
    """Faults of some files: their number by kind, and the first names of each kind."""

    counts: dict[str, int] = field(default_factory=dict)
    names: dict[str, list[str]] = field(default_factory=dict)

    def add(self, kind: str, name: str) -> None:
        self.counts[kind] = self.counts.get(kind, 0) + 1
        if len(self.names.setdefault(kind, [])) < LISTED:
            self.names[kind].append(name)

    def join(self, other: Faults) -> None:
        """Add the faults of other files."""
        for kind, count in other.counts.items():
            self.counts[kind] = self.counts.get(kind, 0) + count
            self.names.setdefault(kind, []).extend(other.names[kind])
            del self.names[kind][LISTED:]

    def __bool__(self) -> bool:
        return bool(self.counts)

    def lines(self) -> list[str]:
        """Return a line for each kind, with the number and the first names."""
        return [f"{count} {kind}: {_first(self.names[kind], count)}" for kind, count in self.counts.items()]


def _first(names: Sequence[str], count: int) -> str:
    return ", ".join(names) + (", …" if count > len(names) else "")


@dataclass
class Scan:
    """Content of one shard.

    Attributes:
        images: number of images.
        bytes, sha256: size and checksum of the file; the checksum is None unless it was read in full.
        sizes: the upright sizes (H, W) that occur.
        classes: largest label + 1; 0 without labels.
        faults: see `Faults`.
    """

    images: int = 0
    bytes: int = 0
    sha256: str | None = None
    sizes: set[tuple[int, int]] = field(default_factory=set)
    classes: int = 0
    faults: Faults = field(default_factory=Faults)


def scan(path: Path, name: str, keys: Keys, whole: bool = False, on_image: Callable[[], None] | None = None) -> Scan:
    """Return the content of a shard.

    Args:
        path: path of the file.
        name: name of the shard, for faults.
        keys: which members are images and labels.
        whole: decode all images and compute the checksum; otherwise only headers are read.
        on_image: called after each image.

    Raises: UserError or OSError if the file can't be opened.
    """
    found, faults = Scan(), Faults()
    shard = Shard(path, name, keys, partial=True)
    try:
        found.images, found.bytes, found.faults = len(shard), shard.bytes, faults
        if shard.damage is not None:
            faults.add("shards that can't be read to their end", f"{name} ({shard.damage})")
        for kind, keys_of_kind in shard.defects.items():
            for key in keys_of_kind:
                faults.add(f"keys {kind}", f"{name}/{key}")
        for index, member in enumerate(shard.names):
            where = f"{name}/{member}"
            try:
                if whole:
                    image = decode(shard.content(index), None, where)
                    found.sizes.add((image.shape[1], image.shape[2]))
                else:
                    with shard.open(index) as file:
                        found.sizes.add(read_header(file)[0])
            except images.DECODING_ERRORS as error:
                faults.add("images that can't be read", where if where in str(error) else f"{where} ({error})")
            if keys.label is not None:
                try:
                    found.classes = max(found.classes, shard.label(index) + 1)
                except UserError as error:
                    faults.add("images without a label", f"{where} ({error})")
            if on_image is not None:
                on_image()
        if whole:
            with path.open("rb") as file:
                found.sha256 = digest_of(file)
    finally:
        shard.close()
    return found


def digest_of(file: Any) -> str:
    """Return the SHA-256 of an open binary file, from its position, as hexadecimal digits."""
    return hashlib.file_digest(file, "sha256").hexdigest()


def index_of(scans: Iterable[tuple[str, Scan]], keys: Keys, class_names: Sequence[str] | None = None) -> ShardIndex:
    """Return the index of shards, given their names and contents."""
    entries, sizes, classes = [], set(), 0
    for name, found in scans:
        top = PurePosixPath(name).parts[0] if "/" in name else ""
        part = "val" if top in VAL_FOLDERS else "train" if top == "train" else ""
        entries.append(ShardEntry(name, found.images, found.bytes, found.sha256, part))
        sizes |= found.sizes
        classes = max(classes, found.classes)
    if {entry.part for entry in entries} != {"train", "val"}:
        entries = [ShardEntry(e.name, e.images, e.bytes, e.sha256) for e in entries]
    return ShardIndex(
        tuple(entries),
        next(iter(sizes)) if len(sizes) == 1 else None,
        classes or None,
        tuple(class_names) if class_names is not None and len(class_names) == classes else None,
        {"image": keys.image, "labels": keys.label},
    )


def scanned(located: Located, keys: Keys, folder: Path) -> tuple[ShardIndex, dict[str, str]]:
    """Return the index of local shards that have none, stored in the cache `folder`, and the faults by shard.

    One process scans while others wait. The index is made again if the size or modification time of a shard changes.
    """
    tars, names = located.tars, located.names
    status = [Path(tar).stat() for tar in tars]
    files = [[str(Path(tar).absolute()), s.st_size, s.st_mtime_ns] for tar, s in zip(tars, status, strict=True)]
    made_of = json.dumps([VERSION, keys.image, keys.label, files])
    path = folder / INDICES / f"{hashlib.sha256(made_of.encode(errors='surrogateescape')).hexdigest()}.json"
    with suppress(UserError, OSError):
        make_folder(path.parent)
    with lock(path.parent / "scan.lock", "is being filled by", "wait for it", wait=True):
        with suppress(UserError, KeyError, TypeError, ValueError):
            index = read_index(path)
            faults = {tars[int(number)]: str(reason) for number, reason in index.made["faults"].items()}
            require(len(index.shards) == len(tars), "")
            return index, faults
        scans = []
        for tar, name in zip(tars, names, strict=True):
            try:
                scans.append((name, scan(Path(tar), name, keys)))
            except (OSError, UserError) as error:
                scans.append((name, Scan(faults=Faults({str(error): 1}, {str(error): [name]}))))
        index = index_of(scans, keys)
        faults = {str(n): "; ".join(found.faults.lines()) for n, (_, found) in enumerate(scans) if found.faults}
        index.made["faults"] = faults
        with suppress(UserError, OSError):
            parse_index(index.to_json(), "")
            write_text(path, index.to_json())
    return index, {tars[int(number)]: reason for number, reason in faults.items()}
