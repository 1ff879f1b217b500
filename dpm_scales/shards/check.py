"""Read a set of shards in full and report its faults, or make an index of shards that have none."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from dpm_scales.errors import UserError, require
from dpm_scales.shards.cache import ShardCache
from dpm_scales.shards.fetch import FetchError, fetch, is_url, shown
from dpm_scales.shards.index import ShardEntry, ShardIndex
from dpm_scales.shards.places import Located, locate, match_index
from dpm_scales.shards.scan import Faults, Scan, index_of, scan
from dpm_scales.shards.shard import Keys, Shard
from dpm_scales.shards.shard_set import index_at

Report = Callable[[str, int], Callable[[float], None]]
"""Begins a part, given its name and number of steps; returns a callback for the number of steps done."""


@dataclass(frozen=True)
class Checked:
    """Result of checking a set of shards.

    Attributes:
        shards, images, bytes: numbers of shards, images and bytes read.
        faults: see `Faults`.
    """

    shards: int
    images: int
    bytes: int
    faults: Faults


def check_shards(
    root: str | Path, keys: Keys, cache: ShardCache, report: Report, index: str | Path | None = None
) -> Checked:
    """Read all shards that `root` names in full (archives, checksums, keys, images and labels) and return the result.

    Args:
        root: see `places`.
        keys: which members are images and labels.
        cache: cache for remote shards.
        report: shows progress.
        index: path or address of the index, if it is not beside the shards.

    Raises: UserError if there are no shards, or the index is invalid.
    """
    located = locate(root, index)
    known: ShardIndex | None = None
    pairs: list[tuple[str, ShardEntry | None]] = [(tar, None) for tar in located.tars]
    if located.index is not None:
        known = index_at(located.index, cache)
        pairs = [*match_index(located, known)]
    faults, images, size = Faults(), 0, 0
    first_of: dict[str, str] = {}
    advance = report("shards", len(pairs))
    for place, entry in pairs:
        try:
            path = cache.path(place, entry) if entry is not None and is_url(place) else Path(place)
            found = scan(path, shown(place), keys, whole=True)
            _find_twice(path, shown(place), keys, first_of, found.faults)
        except (OSError, UserError) as error:
            text = getattr(error, "strerror", None) or str(error)
            faults.add("shards that can't be read", text if shown(place) in text else f"{shown(place)} ({text})")
            advance(1)
            continue
        if entry is not None and known is not None:
            _compare(found, entry, known, shown(place), keys)
        faults.join(found.faults)
        images, size = images + found.images, size + found.bytes
        advance(1)
    if located.index is not None and not located.is_remote and not located.tars:
        listed = {entry.name for entry in known.shards} if known is not None else set()
        folder = Path(located.index).parent
        for tar in sorted([*folder.glob("*.tar"), *folder.glob("*/*.tar")]):
            if tar.relative_to(folder).as_posix() not in listed:
                faults.add("shards that the index does not name", str(tar))
    return Checked(len(pairs), images, size, faults)


def _find_twice(path: Path, name: str, keys: Keys, first_of: dict[str, str], faults: Faults) -> None:
    """Record in `faults` the keys that also occur in an earlier shard."""
    shard = Shard(path, name, keys, partial=True)
    shard.close()
    for member in shard.names:
        key = member.split(".", 1)[0]
        other = first_of.setdefault(key, name)
        if other != name:
            faults.add("keys in several shards", f"{name}/{member} (and {other})")


def _compare(found: Scan, entry: ShardEntry, index: ShardIndex, name: str, keys: Keys) -> None:
    """Record in `found.faults` the differences between a shard and its entry in the index."""
    for what, here, told in (
        ("size", found.bytes, entry.bytes),
        ("number of images", found.images, entry.images),
        ("checksum", found.sha256, entry.sha256 or found.sha256),
    ):
        if here != told:
            found.faults.add(f"shards with another {what} than the index says", f"{name} ({here}, not {told})")
    for size in sorted(found.sizes):
        if index.image_size is not None and size != index.image_size:
            found.faults.add("shards with images of another size than the index says", f"{name} ({size})")
    if keys.label is not None and found.classes > (index.num_classes or 0):
        told = index.num_classes
        found.faults.add("shards with more classes than the index says", f"{name} ({found.classes}, not {told})")


def index_shards(located: Located, keys: Keys, cache: ShardCache, report: Report) -> tuple[ShardIndex, Faults]:
    """Read shards in full and return their index and their faults.

    Remote shards are fetched one at a time, and not kept.

    Raises: UserError if there are no shards, or one can't be read at all.
    """
    require(bool(located.tars), f"{located.source} is an index; name the shards")
    faults, scans = Faults(), []
    advance = report("shards", len(located.tars))
    for place, name in zip(located.tars, located.names, strict=True):
        with _file(place, cache) as path:
            try:
                found = scan(path, shown(place), keys, whole=True)
            except OSError as error:
                raise UserError(f"{shown(place)}: {error.strerror or error}") from error
        faults.join(found.faults)
        scans.append((name, found))
        advance(1)
    return index_of(scans, keys), faults


@contextmanager
def _file(place: str, cache: ShardCache) -> Iterator[Path]:
    if not is_url(place):
        yield Path(place)
        return
    with tempfile.TemporaryDirectory(prefix="dpm-scales-") as folder:
        path = Path(folder) / "shard.tar"
        try:
            with path.open("w+b") as file:
                fetch(place, file, patience=cache.patience)
        except OSError as error:
            raise FetchError(f"{shown(place)}: {error.strerror or error}") from error
        yield path
