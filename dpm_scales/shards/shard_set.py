"""A set of shards, opened when needed: local files, or files fetched into the cache."""

from __future__ import annotations

import io
import math
import os
import threading
import warnings
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from dpm_scales.data.files import ImageStore, file_size, file_state
from dpm_scales.data.replaced import LoadingError
from dpm_scales.errors import UserError, require
from dpm_scales.shards.cache import DEFAULT_GIGABYTES, ShardCache
from dpm_scales.shards.fetch import is_url, require_storable, shown
from dpm_scales.shards.index import MAX_INDEX_BYTES, ShardEntry, ShardIndex, parse_index
from dpm_scales.shards.places import locate, match_index, read_index
from dpm_scales.shards.scan import digest_of, scanned
from dpm_scales.shards.shard import Keys, Shard
from dpm_scales.storage import data_cache, open_regular

OPENINGS = 3
"""Number of tries to open a fetched shard, which another process may remove from the cache in the meantime."""


class ShardError(LoadingError):
    """A shard that can't be read."""


class ShardSet:
    """Shards by number, the last opened of which stay open. Workers receive a pickled copy, or open files by a fork.

    Args:
        source: the given root, for messages.
        places: path or address of each shard.
        entries: entry of each shard in the index.
        keys: which members are images and labels.
        cache: cache of fetched shards.
        keep: number of shards that stay open.
        sized: whether the sizes of files must be those of the index.
        partial: whether a shard may be damaged after the images that the index counts.
    """

    def __init__(
        self,
        source: str,
        places: Sequence[str],
        entries: Sequence[ShardEntry],
        keys: Keys,
        cache: ShardCache,
        keep: int = 16,
        sized: bool = True,
        partial: bool = False,
    ) -> None:
        self.source, self.places, self.entries = source, tuple(places), tuple(entries)
        self.keys, self.cache, self.keep, self.sized, self.partial = keys, cache, keep, sized, partial
        self._open: OrderedDict[int, Shard] = OrderedDict()

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def remote(self) -> list[ShardEntry]:
        """Return the entries of remote shards, which are fetched."""
        return [entry for place, entry in zip(self.places, self.entries, strict=True) if is_url(place)]

    def name(self, number: int) -> str:
        """Return a shard's name for messages."""
        return shown(self.places[number])

    def open(self, number: int) -> Shard:
        """Return a shard with as many images as the index says. Raises ShardError if that is not possible."""
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        while len(self._open) >= self.keep:
            self._open.popitem(last=False)[1].close()
        try:
            shard = self._opened(number)
        except (OSError, UserError) as error:
            reason = str(error)
            known = reason if self.name(number) in reason else f"{self.name(number)}: {reason}"
            raise ShardError(known) from error
        entry, expected = self.entries[number], self.entries[number].images
        if self.sized and shard.bytes != entry.bytes:
            shard.close()
            raise ShardError(
                f"{self.name(number)}: has {shard.bytes} bytes, and the index says {entry.bytes}; it was changed"
            )
        if len(shard) != expected:
            shard.close()
            raise ShardError(
                f"{self.name(number)}: holds {len(shard)} images, and the index says {expected}; run dpm-scales data "
                "check, and make the index again"
            )
        self._open[number] = shard
        return shard

    def _opened(self, number: int) -> Shard:
        for _ in range(OPENINGS - 1):
            try:
                return Shard(self.path(number), self.name(number), self.keys, self.partial)
            except FileNotFoundError:
                if not is_url(self.places[number]):
                    raise
        return Shard(self.path(number), self.name(number), self.keys, self.partial)

    def path(self, number: int) -> Path:
        """Return the path of a shard's file, fetched if necessary. Raises UserError if that fails."""
        place = self.places[number]
        return self.cache.path(place, self.entries[number]) if is_url(place) else Path(place)

    def state(self, number: int) -> list[Any]:
        """Return plain values that change whenever a shard's content does: its checksum, and a local file's state."""
        place, entry = self.places[number], self.entries[number]
        return [entry.sha256, entry.images, *([] if is_url(place) else file_state(Path(place)))]

    def file_bytes(self, number: int) -> float:
        """Return the bytes of a shard; infinity for one that has to be fetched."""
        place = self.places[number]
        return math.inf if is_url(place) else file_size(Path(place))

    def expect(self, numbers: Sequence[int]) -> None:
        """Prefetch the remote ones of these shards."""
        wanted = [(self.places[n], self.entries[n]) for n in numbers if is_url(self.places[n])]
        if wanted:
            self.cache.expect(wanted)

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_open": OrderedDict()}


class ShardStore(ImageStore):
    """The images of a set of shards as a store of files, in the order of shards and archives, by `SHARD/MEMBER`."""

    def __init__(self, shards: ShardSet) -> None:
        super().__init__(Path(shards.source))
        self.shards = shards
        self._lock = threading.Lock()
        self._places: dict[str, tuple[int, int]] = {}
        for number in range(len(shards)):
            shard = shards.open(number)
            self._places |= {f"{shards.entries[number].name}/{n}": (number, i) for i, n in enumerate(shard.names)}
        self.names = list(self._places)

    def open(self, name: str) -> BinaryIO:
        number, index = self._places[name]
        with self._lock:  # another thread may close a shard to open one
            return io.BytesIO(self.shards.open(number).content(index))

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_lock": None}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__ |= state | {"_lock": threading.Lock()}


@dataclass(frozen=True)
class Opened:
    """A set of shards with its index.

    Attributes:
        shards: the set.
        index: the index of these shards.
        left_out: faults of shards that are left out, or read in part, by path or address.
    """

    shards: ShardSet
    index: ShardIndex
    left_out: dict[str, str]


def open_shards(
    root: str | Path,
    keys: Keys,
    index: str | Path | None = None,
    cache: ShardCache | None = None,
    on_error: str = "skip",
    verify: str = "headers",
    keep: int = 16,
) -> Opened:
    """Return the shards that `root` names, see `locate`; local ones without an index are scanned to make one.

    Args:
        on_error: "skip" leaves out, with a warning, shards that are missing or differ from the index or, without an
            index, whatever can't be read; "raise" stops at the first.
        verify: "headers" compares the sizes of local files with the index, "full" also their checksums, "none" neither.
        keep: number of shards that stay open.

    Raises: UserError if there are no shards, or none that can be read.
    """
    for place in (root, index):
        require_storable(str(place))
    cache = cache or ShardCache(data_cache(), DEFAULT_GIGABYTES)
    located = locate(root, index)
    if located.index is None:
        found, left_out = scanned(located, keys, cache.folder)
        pairs = list(zip(located.tars, found.shards, strict=True))
        told = "have faults, and are read as far as they can be"
    else:
        found = index_at(located.index, cache)
        pairs = match_index(located, found)
        checked = {place: _difference(place, entry, verify) for place, entry in pairs}
        left_out = {place: reason for place, reason in checked.items() if reason is not None}
        pairs = [(place, entry) for place, entry in pairs if place not in left_out]
        told = "are left out"
        for place, entry in pairs:
            known = entry.sha256 is not None or not is_url(place)
            require(known, f"{shown(located.index)}: no checksum of {entry.name}; make it again: dpm-scales data index")
    if left_out:
        first, reason = next(iter(left_out.items()))
        require(on_error == "skip", f"{first}: {reason}; mend it, or set on_error=skip")
        total = len(left_out) + len(pairs) if located.index is not None else len(pairs)
        message = f"{len(left_out)} of {total} shards {told}; the first is {first}: {reason}"
        warnings.warn(f"{located.source}: {message}", stacklevel=3)
    entries = tuple(entry for _, entry in pairs)
    require(any(entry.images for entry in entries), f"{located.source}: the shards hold no image that can be read")
    sized, partial = verify != "none", located.index is None
    shards = ShardSet(located.source, [place for place, _ in pairs], entries, keys, cache, keep, sized, partial)
    return Opened(shards, replace(found, shards=entries), left_out)


def index_at(place: str, cache: ShardCache) -> ShardIndex:
    """Return the index at a path or an address."""
    return parse_index(cache.text(place, MAX_INDEX_BYTES), shown(place)) if is_url(place) else read_index(place)


def _difference(place: str, entry: ShardEntry, verify: str) -> str | None:
    """Return how a local file differs from its entry in the index, or None. Fetched files are always verified."""
    if is_url(place) or verify == "none":
        return None
    try:
        with open_regular(place) as file:
            size = os.fstat(file.fileno()).st_size
            if size != entry.bytes:
                return f"it has {size} bytes, and the index says {entry.bytes}"
            if verify == "full" and entry.sha256 is not None:
                sha256 = digest_of(file)
                if sha256 != entry.sha256:
                    return f"its SHA-256 is {sha256[:12]}…, and the index says {entry.sha256[:12]}…"
    except OSError as error:
        return error.strerror or str(error)
    return None
