"""The cache of fetched shards, which processes share: its limits, its order, interrupts, forks, full disks."""

from __future__ import annotations

import os
import pickle
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from dpm_scales import data
from dpm_scales.errors import UserError
from dpm_scales.locks import lock
from dpm_scales.shards import ShardSource
from dpm_scales.shards import fetch as fetching
from dpm_scales.shards.cache import GIB, ShardCache
from dpm_scales.shards.fetch import Patience
from dpm_scales.shards.index import ShardIndex
from support.shards import Faults, entry_of, fetched_numbers, number_of

pytestmark = pytest.mark.usefixtures("cache")

COUNT = 40
SHARD = "shard-000001.tar"


def small(folder: Path, served: Path, shards: int) -> ShardCache:
    """A cache with room for so many shards of a folder."""
    return ShardCache(folder, shards * entry_of(served).bytes / GIB)


def test_the_shard_used_longest_ago_goes_first(server: tuple[str, Faults, Path], cache: Path) -> None:
    url, faults, folder = server
    held = small(cache, folder, 3)
    names = [f"shard-00000{n}.tar" for n in (0, 1, 2, 0, 3)]
    for age, name in enumerate(names):
        path = held.path(url + name, entry_of(folder, name))
        os.utime(path, (age, age))
    # others' files stay: only names of its own are removed
    (cache / "mine.tar").write_bytes(bytes(10**6))
    assert {path.stem for path in cache.glob("?" * 64 + ".tar")} == {
        entry_of(folder, f"shard-00000{n}.tar").sha256 for n in (0, 2, 3)
    }
    leftover = cache / f".{'0' * 64}.tar.{'1' * 12}.tmp"
    leftover.write_bytes(b"x")
    os.utime(leftover, (0, 0))
    with lock(cache / "00.lock", "", ""):  # by this process, which may fetch it in another thread
        held._mutex("00").acquire()
        held._make_room(0)
        held._mutex("00").release()
        assert leftover.exists()
    held.path(f"{url}{SHARD}", entry_of(folder))
    assert not leftover.exists() and (cache / "mine.tar").exists()


def test_runs_with_other_limits_share_a_cache(server: tuple[str, Faults, Path], cache: Path) -> None:
    """The smaller one removes what the larger one will fetch again; both read all images."""
    url, faults, folder = server
    bytes_ = entry_of(folder).bytes
    sizes = {"cache_gb": 2.5 * bytes_ / GIB}, {"cache_gb": 1.0}
    parts = [ShardSource(url, channels=1, val_fraction=0, window=1, **size).train() for size in sizes]
    shown = [number_of(image) for image, _ in (ShardSource(folder, channels=1, val_fraction=0).train())]  # type: ignore[attr-defined]
    for index in range(0, COUNT, 2):
        other = COUNT - 1 - index
        assert [number_of(parts[0][index][0]), number_of(parts[1][other][0])] == [shown[index], shown[other]]
    parts[0].shards._open.clear()
    number_of(parts[0][0][0])
    assert sum(path.stat().st_size for path in cache.glob("*.tar")) <= 5 * bytes_


def test_an_interrupt_leaves_nothing_half_fetched(
    server: tuple[str, Faults, Path], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C while bytes come; the next command fetches the shard."""
    url, faults, folder = server
    held, entry = ShardCache(cache, 1), entry_of(folder)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(fetching, "_checked", interrupt)
        held.path(f"{url}{SHARD}", entry)
    assert [path.suffix for path in cache.iterdir()] == [".lock"] * len(list(cache.iterdir()))
    assert held.path(f"{url}{SHARD}", entry).read_bytes() == (folder / SHARD).read_bytes()


def test_a_shard_that_others_remove_is_fetched_again(server: tuple[str, Faults, Path], cache: Path) -> None:
    """An open one is read on; a damaged file is replaced."""
    url, _, _ = server
    part = ShardSource(url, channels=1, val_fraction=0).train()
    first = [number_of(part[i][0]) for i in range(8)]
    for path in cache.glob("*.tar"):
        path.unlink()
    assert [number_of(part[i][0]) for i in range(8)] == first
    again = pickle.loads(pickle.dumps(part))  # as in a worker
    assert [number_of(again[i][0]) for i in range(8)] == first
    for path in cache.glob("*.tar"):
        path.write_bytes(b"short")
    assert [number_of(pickle.loads(pickle.dumps(part))[i][0]) for i in range(8)] == first


def test_a_cache_too_small_for_two_windows(server: tuple[str, Faults, Path]) -> None:
    url, _, folder = server
    bytes_ = entry_of(folder).bytes
    with pytest.raises(
        UserError, match=r"cache_gb=.* is less than the 0\.00 GiB of two windows .*raise it, or lower window"
    ):
        fetched_numbers(url, window=2, cache_gb=3.9 * bytes_ / GIB)
    assert len(fetched_numbers(url, window=1, cache_gb=2 * bytes_ / GIB)) == COUNT
    assert len(fetched_numbers(folder, window=2, cache_gb=bytes_ / GIB)) == COUNT  # local shards need none


def test_processes_and_threads_share_one_fetch(server: tuple[str, Faults, Path], cache: Path) -> None:
    """Four processes of two threads each want the same shard while it comes slowly."""
    url, faults, folder = server
    faults.of[SHARD] = ["stall", "ok"]
    entry, held = entry_of(folder), ShardCache(cache, 1, Patience(2, 5))
    children = []
    for _ in range(4):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                threads = [threading.Thread(target=held.path, args=(f"{url}{SHARD}", entry)) for _ in range(2)]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
                status = int(not (cache / f"{entry.sha256}.tar").is_file())
            finally:
                os._exit(status)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * 4
    assert sum(name == SHARD for name, _ in faults.asked) == 1


def test_a_fork_does_not_wait_for_a_thread_of_its_parent(server: tuple[str, Faults, Path], cache: Path) -> None:
    url, _, folder = server
    held, entry = ShardCache(cache, 1), entry_of(folder)
    held._mutex(str(entry.sha256)[:2]).acquire()  # by a thread that the child does not have
    child = os.fork()
    if child == 0:
        status = 1
        try:
            status = int(not held.path(f"{url}{SHARD}", entry).is_file())
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_the_next_window_is_fetched_ahead(server: tuple[str, Faults, Path]) -> None:
    """While the first is trained on; and the batches are those of the folder, with workers too."""
    url, faults, folder = server
    options: dict[str, Any] = {"channels": 1, "val_fraction": 0, "window": 2}
    module = data.ImageDataModule(ShardSource(url, **options), 8, seed=3)
    loader = iter(module.train_dataloader())
    next(loader)
    until = time.monotonic() + 5
    while sum(name.endswith(".tar") for name, _ in faults.asked) < 4 and time.monotonic() < until:
        time.sleep(0.01)
    assert sum(name.endswith(".tar") for name, _ in faults.asked) == 4
    local = data.ImageDataModule(ShardSource(folder, **options), 8, num_workers=2, seed=3)
    remote = data.ImageDataModule(ShardSource(url, **options), 8, num_workers=2, seed=3)
    pairs = list(zip(local.train_dataloader(), remote.train_dataloader(), strict=True))
    assert len(pairs) == 5 and all(a[0].equal(b[0]) for a, b in pairs)
    assert sorted(name for name, _ in faults.asked if name.endswith(".tar")) == sorted(
        p.name for p in folder.glob("*.tar")
    )


def test_a_full_disk_ends_with_one_line(server: tuple[str, Faults, Path], cache: Path, monkeypatch: Any) -> None:
    url, _, folder = server

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dpm_scales.shards.cache.fetch", full)
    with pytest.raises(UserError, match="No space left on device; free some space"):
        ShardCache(cache, 1).path(f"{url}{SHARD}", entry_of(folder))
    assert not list(cache.glob("*.tmp")) and isinstance(ShardIndex(()), ShardIndex)
