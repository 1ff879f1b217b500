"""A folder of fetched shards, shared by all processes of this machine that use it, with a limit on its size.

A file is named by the SHA-256 of its content; it is written beside its final path, checked and renamed. A lock of the
operating system lets one process fetch a shard while others wait for it. The least recently used shards are removed
first; a process that has one open can still read it.
"""

from __future__ import annotations

import hashlib
import os
import queue
import re
import threading
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path

from dpm_scales.errors import UserError, is_number, require
from dpm_scales.locks import lock
from dpm_scales.shards.fetch import Patience, fetch, fetch_text, shown
from dpm_scales.shards.index import ShardEntry
from dpm_scales.storage import atomic_write, make_folder, write_bytes

INDICES = "indices"
"""Subfolder of the cache for indices that were fetched, or made for local shards that have none."""

FETCHERS = 4
"""Number of threads per process that prefetch shards."""

GIB, DEFAULT_GIGABYTES = 2**30, 50.0
_OURS = re.compile(r"[0-9a-f]{64}\.tar")
_LEFT = re.compile(r"\.[0-9a-f]{64}\.tar\.[0-9a-f]{12}\.tmp")
_STALE = 600.0  # seconds after which an unlocked temporary file without writes counts as left by a killed process


class ShardCache:
    """Shards by address, fetched when first needed.

    Args:
        folder: folder of the files; created when the first is fetched.
        gigabytes: limit on their total size in GiB, > 0.
        patience: tries and timeout for each address.
        download: whether to fetch files; False uses only those in the cache.

    Raises: UserError for a size that is not positive.
    """

    def __init__(self, folder: Path, gigabytes: float, patience: Patience | None = None, download: bool = True) -> None:
        require(is_number(gigabytes) and gigabytes > 0, f"cache_gb={gigabytes!r:.20}: allowed is a number > 0")
        self.folder, self.limit = folder, int(gigabytes * GIB)
        self.patience, self.download = patience or Patience(), download
        self._pid, self._mutexes = os.getpid(), dict[str, threading.Lock]()
        self._wanted: queue.SimpleQueue[tuple[str, ShardEntry]] | None = None

    def path(self, url: str, entry: ShardEntry) -> Path:
        """Return the path of a shard's file, fetched if it is not in the cache. Raises UserError if that fails."""
        assert entry.sha256 is not None
        path = self.folder / f"{entry.sha256}.tar"
        if self._is_there(path, entry):
            return path
        self._require_download(url)
        bucket = entry.sha256[:2]
        with self._mutex(bucket), self._lock(f"{bucket}.lock"):
            if not self._is_there(path, entry):
                self._make_room(entry.bytes)
                with atomic_write(path) as file:
                    fetch(url, file, entry.bytes, entry.sha256, patience=self.patience)
        return path

    def text(self, url: str, most: int) -> bytes:
        """Return a file of at most `most` bytes and cache it; without `download`, return the cached one."""
        kept = self.folder / INDICES / f"{hashlib.sha256(url.encode()).hexdigest()}.json"
        if not self.download:
            if not kept.is_file():
                self._require_download(url)
            return kept.read_bytes()
        text = fetch_text(url, most, self.patience)
        with suppress(UserError, OSError):
            write_bytes(kept, text)
        return text

    def _require_download(self, url: str) -> None:
        where = f"{shown(url)} is not in {self.folder}, and data.download=false fetches nothing"
        require(self.download, f"{where}, the default for addresses from a run's folder; give data.download=true")

    def require_room(self, sizes: Sequence[int], number: int) -> None:
        """Raise UserError unless the `number` largest of files with these sizes in bytes fit within the limit."""
        needed = sum(sorted(sizes)[-number:])
        require(
            needed <= self.limit,
            f"cache_gb={self.limit / GIB:g} is less than the {needed / GIB:.2f} GiB of two windows of shards, which "
            "are used at a time; raise it, or lower window",
        )

    def expect(self, wanted: Sequence[tuple[str, ShardEntry]]) -> None:
        """Prefetch shards in daemon threads; failures are ignored here and reported by `path`."""
        if not self.download:
            return
        self._notice_fork()
        if self._wanted is None:
            self._wanted = queue.SimpleQueue()
            for _ in range(FETCHERS):
                threading.Thread(target=self._fetch_ahead, args=(self._wanted,), daemon=True).start()
        for one in wanted:
            self._wanted.put(one)

    def _fetch_ahead(self, wanted: queue.SimpleQueue[tuple[str, ShardEntry]]) -> None:
        while True:
            url, entry = wanted.get()
            with suppress(UserError, OSError):
                self.path(url, entry)

    def _is_there(self, path: Path, entry: ShardEntry) -> bool:
        try:
            if path.stat().st_size != entry.bytes:
                return False
            os.utime(path)  # the time of its last use
        except OSError:
            return False
        return True

    def _mutex(self, bucket: str) -> threading.Lock:
        """Return a lock between threads; the system's lock is between processes, and any thread could release it."""
        self._notice_fork()
        return self._mutexes.setdefault(bucket, threading.Lock())

    def _notice_fork(self) -> None:
        """After a fork, drop the parent's threads and its locks, which one of those may have held."""
        if self._pid != os.getpid():
            self._pid, self._mutexes, self._wanted = os.getpid(), {}, None

    def _lock(self, name: str) -> AbstractContextManager[None]:
        make_folder(self.folder)
        return lock(self.folder / name, "is being filled by", "wait for it", wait=True)

    def _make_room(self, size: int) -> None:
        """Remove the least recently used shards until `size` more bytes fit within the limit."""
        with self._mutex("room"), self._lock("room.lock"):
            files = []
            for file in os.scandir(self.folder):
                with suppress(OSError):
                    status = file.stat(follow_symlinks=False)
                    if _OURS.fullmatch(file.name):
                        files.append((status.st_mtime, status.st_size, file.path))
                    elif _LEFT.fullmatch(file.name):
                        old = status.st_mtime < time.time() - _STALE
                        if not (old and self._removed(file.path, file.name[1:3])):
                            size += status.st_size
            used = sum(one[1] for one in files)
            for _, freed, path in sorted(files):
                if used + size <= self.limit:
                    break
                with suppress(OSError):
                    os.unlink(path)
                used -= freed

    def _removed(self, path: str, bucket: str) -> bool:
        """Remove a leftover file, unless one of its bucket is being fetched; return whether it was removed."""
        mutex = self._mutex(bucket)
        if not mutex.acquire(blocking=False):
            return False
        try:
            with lock(self.folder / f"{bucket}.lock", "is being filled by", "wait for it"):
                os.unlink(path)
                return True
        except (UserError, OSError):
            return False
        finally:
            mutex.release()

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_pid": -1, "_mutexes": {}, "_wanted": None}
