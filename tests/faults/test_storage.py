"""Files appear whole or not at all, in real folders, by one process at a time."""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from dpm_scales import locks, storage
from dpm_scales.errors import UserError
from dpm_scales.storage import FolderGoneError
from support.shell import files


def put(kind: str, path: Path, victim: Path) -> None:
    """Something at `path` that is no file and no folder."""
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(str(path))
    elif kind == "device":
        try:
            os.mknod(path, 0o600 | 0o020000, os.makedev(1, 3))
        except PermissionError:
            pytest.skip("may not make devices")
    elif kind == "hard link":
        os.link(victim, path)
    else:
        path.symlink_to(victim)


# --- durable ----------------------------------------------------------------------------------------------------------


def test_a_file_is_on_disk_before_it_takes_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that no power failure leaves an empty file; its folder, which holds the name, is written afterwards."""
    events: list[Any] = []
    replace = Path.replace
    monkeypatch.setattr(os, "fsync", lambda handle: events.append(os.fstat(handle).st_ino))
    monkeypatch.setattr(Path, "replace", lambda self, to: (events.append("named"), replace(self, to))[1])
    storage.write_text(tmp_path / "a", "text")
    assert events == [(tmp_path / "a").stat().st_ino, "named", tmp_path.stat().st_ino]
    events.clear()
    with storage.new_folder(tmp_path / "folder") as folder:
        storage.write_text(folder / "a", "text")
    assert events[-1] == tmp_path.stat().st_ino


# --- links ------------------------------------------------------------------------------------------------------------


def test_a_link_is_replaced_and_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "a").symlink_to(victim)
    storage.write_text(tmp_path / "a", "new")
    assert victim.read_text() == "precious"
    assert not (tmp_path / "a").is_symlink() and (tmp_path / "a").read_text() == "new"


@pytest.mark.parametrize("deep", ["a", "a/b"])
def test_folders_below_a_guarded_one_are_real(deep: str, tmp_path: Path) -> None:
    root, victim = tmp_path / "root", tmp_path / "victim"
    (root / deep).parent.mkdir(parents=True)
    victim.mkdir()
    (root / deep).symlink_to(victim)
    (tmp_path / "named").symlink_to(root)  # the user's own word may be a link
    with storage.guarded(tmp_path / "named"):
        for write in (storage.make_folder, storage.check_writable, lambda path: storage.write_text(path / "x", "")):
            with pytest.raises(UserError, match=rf"named/{deep}' is a link, and nothing is written through it"):
                write(tmp_path / "named" / deep)
        with pytest.raises(UserError, match="leads out of"):
            storage.write_text(tmp_path / "named" / ".." / "out" / "x", "")
        storage.write_text(tmp_path / "named" / "c" / "d" / "x", "here")
    assert not any(victim.iterdir()) and (root / "c" / "d" / "x").read_text() == "here"
    storage.write_text(root / deep / "x", "unguarded")
    assert (victim / "x").read_text() == "unguarded", "the link is no link"


def test_links_in_a_folder(tmp_path: Path) -> None:
    """None at its top, deeper none that leads out; loggers have links to their newest files."""
    root = tmp_path / "root"
    (root / "logs" / "newest").mkdir(parents=True)
    (tmp_path / "root2").mkdir()
    storage.check_folder(tmp_path / "nothing there")
    (root / "logs" / "link").symlink_to("newest")
    storage.check_folder(root)
    for place, target in (("top", "logs"), ("gone", "nowhere"), ("logs/out", "../../root2"), ("logs/out", "/nowhere")):
        (root / place).symlink_to(target)
        with pytest.raises(UserError, match=rf"root/{place}' is a link, and nothing is written through it; remove it"):
            storage.check_folder(root)
        (root / place).unlink()
    (tmp_path / "named").symlink_to(root)
    storage.check_folder(tmp_path / "named")


@pytest.mark.parametrize("kind", ["pipe", "socket", "device"])
def test_what_hangs_a_reader(kind: str, tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    place = tmp_path / "root" / "a"
    put(kind, place, tmp_path)
    with pytest.raises(UserError, match=rf"root/a' is a {kind}, and nothing"):
        storage.check_folder(tmp_path / "root")
    (tmp_path / "b").symlink_to(place)
    for path in (place, tmp_path / "b"):
        with pytest.raises(UserError, match=f"is a {kind}, where a file belongs"):
            storage.open_regular(path)


def test_regular_files_are_read_through_links(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("ä")
    (tmp_path / "b").symlink_to("a")
    assert storage.read_text(tmp_path / "b") == "ä"
    for missing in (tmp_path / "c", tmp_path):
        with pytest.raises(OSError):
            storage.read_text(missing)


# --- guarded folders --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["deleted", "moved", "replaced"])
def test_a_folder_that_goes_away_is_not_made_anew(end: str, tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    with storage.guarded(root):
        storage.write_text(root / "a" / "b", "")
        root.rename(tmp_path / "moved")
        if end == "replaced":
            root.mkdir()
        with pytest.raises(FolderGoneError, match="root is gone: it was deleted, moved or unmounted") as caught:
            storage.write_text(root / "a" / "b", "")
        assert caught.value.folder == root
        assert root.exists() == (end == "replaced") and not list(root.glob("*"))
    storage.write_text(root / "a" / "b", "not guarded any more")


# --- locks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["link", "hard link", "pipe", "socket", "device"])
def test_a_lock_is_a_file_of_its_own(kind: str, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    path = tmp_path / ".lock"
    put(kind, path, victim)
    words = "a file with other names" if kind == "hard link" else f"a {kind}"
    with pytest.raises(UserError, match=rf"\.lock' is {words}, and nothing is"), locks.lock(path, "is held by", ""):
        pytest.fail("entered")
    assert victim.read_text() == "precious"


def _hold(path: Path, held: Any) -> None:
    with locks.lock(path, "is held by", "wait"):
        held.set()
        time.sleep(100)


def test_a_lock_keeps_other_processes_out(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    processes = multiprocessing.get_context("fork")
    held = processes.Event()
    holder = processes.Process(target=_hold, args=(path, held), daemon=True)
    holder.start()
    assert held.wait(60)
    with pytest.raises(UserError) as caught, locks.lock(path, "is held by", "wait"):
        pytest.fail("entered")
    assert str(caught.value) == f"{tmp_path} is held by process {holder.pid} on {socket.gethostname()}; wait"
    holder.kill()
    holder.join(60)
    with locks.lock(path, "is held by", "wait", wait=True):
        assert files(tmp_path) == {".lock": f"process {os.getpid()} on {socket.gethostname()}".encode()}


# --- leftovers --------------------------------------------------------------------------------------------------------


def test_leftovers_of_killed_writers_are_removed(tmp_path: Path) -> None:
    kept = [".hidden.tmp", "a.tmp", ".a.0123456789abcdef.tmp"]
    for name in kept:
        (tmp_path / name).write_text("")
    (tmp_path / "deep").mkdir()
    (tmp_path / ".b.0123456789ab.tmp").mkdir()
    left = storage._temporary(tmp_path / "deep" / "a.ckpt")
    left.write_text("half")
    assert left.name.startswith(".a.ckpt.") and left.name.endswith(".tmp")
    storage.remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.rglob("*")) == sorted([*kept, "deep", ".b.0123456789ab.tmp"])
