"""Hold locks on folders that exclude other processes, also on other machines."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dpm_scales.errors import UserError, require
from dpm_scales.storage import SAFE, kind_of, refusal


@contextmanager
def lock(path: Path, held: str, advice: str, wait: bool = False) -> Iterator[None]:
    """Hold a lock in the body that excludes other processes, also on other machines.

    The operating system releases the lock when this process ends, even if it is killed. On a file system without locks,
    or in a read-only folder, nothing is locked.

    Args:
        path: the lock file, created if missing; it contains the name of the holder.
        held, advice: parts of the message ``"FOLDER {held} HOLDER; {advice}"``.
        wait: whether to wait for the other process instead of raising.

    Raises: UserError if another process holds the lock, or if `path` is not a regular file, such as a link.
    """
    descriptor = _locked(path, held, advice, wait)
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _locked(path: Path, held: str, advice: str, wait: bool) -> int | None:
    """Return an open descriptor that holds the lock, or None if locks are not available."""
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    kind = kind_of(path)
    require(kind in (None, "a file"), refusal(path, str(kind)))
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | SAFE, 0o666)
    except OSError:
        return None
    try:
        status = os.fstat(descriptor)
        # a hard link could overwrite a file in another place
        require(stat.S_ISREG(status.st_mode) and status.st_nlink <= 1, refusal(path, "a file with other names"))
        # not flock, whose locks data-loading processes inherit and keep after this one is killed
        fcntl.lockf(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        job = os.environ.get("SLURM_JOB_ID")
        holder = f"process {os.getpid()} on {socket.gethostname()}" + (f", job {job}" if job else "")
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, holder.encode(), 0)
    except (BlockingIOError, PermissionError) as error:
        holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip()
        os.close(descriptor)
        known = repr(holder) if holder and not holder.isprintable() else holder or "another process"
        raise UserError(f"{path.parent} {held} {known}; {advice}") from error
    except OSError:
        os.close(descriptor)
        return None
    except UserError:
        os.close(descriptor)
        raise
    return descriptor
