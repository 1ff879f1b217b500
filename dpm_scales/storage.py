"""Write the files and folders of commands atomically, and never through a link.

Everything that a command writes into a folder is opened here. A folder may come from a stranger, who can put a link,
a pipe or a device in place of any file or folder that will be written or read.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import yaml

from dpm_scales.errors import UserError, require

#: flags for opening files; Windows lacks some, but there a stranger's archive can't create links without extra rights
SAFE = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
_KINDS = {
    stat.S_IFLNK: "a link",
    stat.S_IFDIR: "a folder",
    stat.S_IFREG: "a file",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
#: links that are tolerated: Weights & Biases recreates this one, to its service's log, for each run and never opens it
KEPT_LINKS = ("debug-core.log",)
_TEMPORARY = ".{name}.{mark}.tmp"
DATA_CACHE = "DPM_SCALES_CACHE"
"""Environment variable that names the folder of fetched shards and decoded images."""


class FolderGoneError(UserError):
    """A guarded folder was deleted, moved or unmounted; nothing is written in its place.

    Attributes:
        folder: the guarded folder.
    """

    def __init__(self, folder: Path, more: str = "") -> None:
        gone = f"{folder} is gone: it was deleted, moved or unmounted while a command wrote to it"
        super().__init__(f"{gone}; {more}" if more else gone)
        self.folder = folder


class _Guard:
    """A guarded folder: its absolute path, and an open descriptor, so that no other folder can reuse its inode."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.path, self.gone = folder, folder.absolute(), False
        self._open: int | None = None
        with suppress(OSError, AttributeError):  # not readable, or Windows
            self._open = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)

    def check(self) -> None:
        """Raise FolderGoneError unless the folder is still at its path."""
        try:
            now = os.stat(self.path)
            self.gone = self._open is not None and not os.path.samestat(os.fstat(self._open), now)
        except OSError:
            self.gone = True
        if self.gone:
            raise FolderGoneError(self.folder)

    def close(self) -> None:
        if self._open is not None:
            os.close(self._open)


_GUARDS: list[_Guard] = []


@contextmanager
def guarded(folder: str | Path) -> Iterator[None]:
    """Restrict this module's writes below `folder` to real folders, and refuse them once `folder` is gone.

    `folder` itself may be a link, since the user named it. `check_folder` checks what it already contains.

    Raises:
        FolderGoneError: from any write, once the folder has been deleted, moved or replaced.
        UserError: from a write below a link, or below a file in place of a folder.
    """
    guard = _Guard(Path(folder))
    _GUARDS.append(guard)
    try:
        yield
    finally:
        _GUARDS.remove(guard)
        guard.close()


def any_gone() -> bool:
    """Return whether an earlier write found a guarded folder gone, without accessing the disk."""
    return any(guard.gone for guard in _GUARDS)


def check_folder(folder: str | Path) -> None:
    """Raise UserError if something in `folder` could redirect writes to another place, or block a reader.

    No direct entry of the folder may be a link, and no deeper entry may be a link that leads out of it (loggers keep
    links to their newest files), except `KEPT_LINKS`. Pipes, sockets and devices are refused at any depth.
    """
    for _, refusal in entries_below(folder):
        require(refusal is None, str(refusal))


def entries_below(folder: str | Path) -> Iterator[tuple[os.DirEntry[str], str | None]]:
    """Yield all entries at any depth that are not folders, with the reason why `check_folder` refuses them, or None."""
    root = os.path.realpath(folder)
    stack = [str(folder)]
    while stack:
        place = stack.pop()
        try:
            entries = list(os.scandir(place))
        except OSError:  # missing or unreadable: the first write will report it
            continue
        for entry in entries:
            kind = None
            if entry.is_symlink():
                inside = os.path.commonpath([root, os.path.realpath(entry.path)]) == root
                kept = (inside or entry.name in KEPT_LINKS) and place != str(folder)
                kind = None if kept else "a link"
            elif entry.is_dir(follow_symlinks=False):
                stack.append(entry.path)
                continue
            elif not entry.is_file(follow_symlinks=False):
                kind = kind_of(entry.path)
            yield entry, None if kind is None else refusal(entry.path, kind)


def check_names(folder: str | Path, names: Iterable[str]) -> None:
    """Raise UserError if one of these names, which other libraries will write, is neither a file nor a folder."""
    for name in names:
        kind = kind_of(Path(folder, name))
        require(kind in (None, "a file", "a folder"), refusal(Path(folder, name), str(kind)))


def make_folder(folder: str | Path) -> None:
    """Create a folder and its missing parents; below a guarded folder, links are refused.

    Raises:
        OSError: the folder can't be created.
        FolderGoneError, UserError: see `guarded`.
    """
    folder = Path(folder)
    absolute = folder.absolute()
    for guard in _GUARDS:
        if not absolute.is_relative_to(guard.path):
            continue
        guard.check()
        place = guard.path
        for part in absolute.relative_to(guard.path).parts:
            require(part != "..", f"{folder} leads out of {guard.folder}")
            place /= part
            with suppress(FileExistsError):
                place.mkdir()
            kind = kind_of(place)
            if kind in ("a file", None):
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(place))
            require(kind == "a folder", refusal(place, str(kind)))
    folder.mkdir(parents=True, exist_ok=True)


def check_writable(folder: str | Path) -> None:
    """Create `folder`; raise UserError unless files can be created in it."""
    folder = Path(folder)
    probe = folder / f".write-test-{uuid.uuid4().hex[:12]}"
    try:
        make_folder(folder)
        os.close(os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL | SAFE, 0o666))
        probe.unlink()
    except OSError as error:
        raise UserError(f"can't write to {folder}: {error.strerror}; choose another folder") from error


@contextmanager
def atomic_write(path: str | Path) -> Iterator[BinaryIO]:
    """Yield a new binary file beside `path`; on leaving it is flushed to disk and renamed to `path`.

    If the body raises, the file is removed and `path` is unchanged. Missing parent folders are created. A link at
    `path` is replaced, not followed.

    Raises:
        UserError: the file can't be written (permissions, full disk, a folder in its place).
        FolderGoneError: see `guarded`.
    """
    path = Path(path)
    temporary = _temporary(path)
    try:
        make_folder(path.parent)
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | SAFE
        with open(os.open(temporary, flags, 0o666), "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        raise _not_written(path, error) from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def _not_written(path: Path, error: OSError) -> UserError:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    hint = "free some space; existing files are unchanged" if full else "choose a writable place"
    return UserError(f"cannot write {path}: {error.strerror or error}; {hint}")


def open_sized(path: str | Path, size: int) -> int:
    """Open a file of `size` bytes for random access by several processes, and return its descriptor.

    A new file holds zeros. Its disk space is allocated at once, so that later writes can't fill the disk.

    Raises: UserError if the file can't be created (permissions, full disk), or if a link is in its place.
    """
    path, new = Path(path), False
    try:
        make_folder(path.parent)
        new = not path.exists()
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | SAFE, 0o666)
        try:
            require(stat.S_ISREG(os.fstat(descriptor).st_mode), refusal(path, "no file"))
            if os.fstat(descriptor).st_size != size:
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(descriptor, 0, size)
                os.ftruncate(descriptor, size)
        except BaseException:
            os.close(descriptor)
            if new:
                path.unlink(missing_ok=True)
            raise
        return descriptor
    except OSError as error:
        raise _not_written(path, error) from error


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write a binary file atomically."""
    with atomic_write(path) as file:
        file.write(data)


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 text file atomically, with the line endings of `text`."""
    write_bytes(path, text.encode("utf-8"))


@contextmanager
def new_folder(folder: str | Path) -> Iterator[Path]:
    """Yield an empty folder beside `folder`, which is renamed to `folder` at the end, or removed if the body raises.

    Raises: UserError if `folder` exists and is not an empty folder, or can't be created.
    """
    folder = Path(folder)
    kind = kind_of(folder)
    require(kind in (None, "a folder"), f"{folder} is {kind}; choose a new folder")
    temporary = _temporary(folder.absolute())
    try:
        require(kind is None or not any(folder.iterdir()), f"{folder} is not empty; choose a new folder")
        make_folder(temporary)
        yield temporary
        if kind is not None:
            folder.rmdir()
        temporary.rename(folder)
        _sync_folder(folder.parent)
    except OSError as error:
        raise UserError(f"cannot make {folder}: {error.strerror or error}; choose a new folder") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def link(source: Path, target: Path) -> None:
    """Make `target` a hard link to `source`, atomically, or a copy if the file system has no hard links."""
    temporary = _temporary(target)
    make_folder(target.parent)
    try:
        os.link(source, temporary)
        temporary.replace(target)
    except OSError:
        with open_regular(source) as original, atomic_write(target) as copied:
            shutil.copyfileobj(original, copied)
    finally:
        with suppress(OSError):
            temporary.unlink()  # still exists if both names were already the same file


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files that killed writers left below `folder`."""
    for leftover in folder.rglob(_TEMPORARY.format(name="*", mark="?" * 12)):
        with suppress(OSError):  # a folder of that name is not a leftover
            leftover.unlink()


def open_regular(path: str | Path) -> BinaryIO:
    """Open a regular file for reading; links are followed.

    Raises:
        UserError: it is a pipe, a socket or a device, which could block the reader or never end.
        OSError: it is missing, a folder, or not readable.
    """
    kind = kind_of(os.path.realpath(path))
    if kind not in ("a file", "a folder", None):
        raise UserError(f"{path} is {kind}, where a file belongs; remove it")
    # checked again after opening, since another process may have replaced it
    file = open(os.open(path, os.O_RDONLY | (SAFE & ~getattr(os, "O_NOFOLLOW", 0))), "rb")
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise UserError(f"{path} is not a regular file; remove it")
    return file


def read_text(path: str | Path, most: int | None = None) -> str:
    """Return the content of a regular UTF-8 file of at most `most` bytes.

    Raises: the errors of `open_regular`, UserError for a larger file, and UnicodeDecodeError.
    """
    with open_regular(path) as file:
        data = file.read() if most is None else file.read(most + 1)
    require(most is None or len(data) <= most, f"{path} is larger than {most} bytes")
    return data.decode("utf-8")


def _temporary(path: Path) -> Path:
    return path.with_name(_TEMPORARY.format(name=path.name, mark=uuid.uuid4().hex[:12]))


def kind_of(path: str | Path) -> str | None:
    """Return the kind of entry at `path`, without following links; None if there is none."""
    try:
        return _KINDS.get(stat.S_IFMT(os.lstat(path).st_mode), "no file")
    except OSError:
        return None


def refusal(path: str | Path, kind: str) -> str:
    """Return a message that refuses to write to `path`, which is `kind`, such as "a link"."""
    return f"{str(path)!r} is {kind}, and nothing is written through it; remove it, or choose another folder"


def _sync_folder(folder: Path) -> None:
    """Flush a folder to disk, so that a rename in it is durable, if the file system supports it."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


MAX_CONFIG_BYTES = 2**20
#: the loader of `yaml.safe_load`, in C if PyYAML has it, which is eight times faster
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def read_yaml(path: Path) -> Any:
    """Return the plain values of a YAML file, without constructing objects. Raises UserError for any other file."""
    try:
        with open_regular(path) as file:
            text = file.read(MAX_CONFIG_BYTES + 1)
        require(len(text) <= MAX_CONFIG_BYTES, f"{path} is larger than {MAX_CONFIG_BYTES} bytes, not a config")
        return yaml.load(text.decode(), Loader=_Loader)
    except (yaml.YAMLError, ValueError, RecursionError, OSError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is not YAML: {error or type(error).__name__}") from error


def user_cache(name: str) -> Path:
    """Return the folder `dpm_scales/NAME` in $XDG_CACHE_HOME or in ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "dpm_scales" / name


def data_cache() -> Path:
    """Return the folder of fetched shards and decoded images: `$DPM_SCALES_CACHE`, or that of `user_cache`."""
    named = os.environ.get(DATA_CACHE, "")
    return Path(named).expanduser() if named else user_cache("shards")
