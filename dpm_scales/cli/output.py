"""Standard output and error that outlive their reader: a terminal that closes ends no training."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from dpm_scales.errors import UserError

#: the reader has left: a pager or `head` that has seen enough, a terminal that was closed
_LEFT = (errno.EPIPE, errno.EIO)


class _Lasting:
    """A text stream that drops what can't be written any more, and keeps the first reason."""

    def __init__(self, stream: Any) -> None:
        self.stream, self.reason = stream, None
        if hasattr(stream, "reconfigure"):  # names of files and classes are of any script, and a locale may be ASCII
            with suppress(OSError, ValueError):  # it flushes first
                stream.reconfigure(errors="backslashreplace")

    reason: OSError | None

    def write(self, text: str) -> int:
        self._try(lambda: self.stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._try(self.stream.flush)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def _try(self, action: Callable[[], Any]) -> None:
        if self.reason is not None:
            return
        try:
            action()
        except OSError as error:
            self.reason = error
            with suppress(OSError, ValueError):  # what is buffered must not fail once more when Python ends
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, self.stream.fileno())
                os.close(null)


@contextmanager
def lasting_output() -> Iterator[None]:
    """Let what is printed inside be lost, rather than the work, once nobody reads it or its disk is full.

    Characters that the stream's encoding lacks are written as escapes.

    Raises: UserError, after the work, with status 1 if standard output was lost to anything but a reader that left.
    """
    before = sys.stdout, sys.stderr
    streams = [None if stream is None else _Lasting(stream) for stream in before]  # None: closed from the beginning
    sys.stdout, sys.stderr = streams
    try:
        yield
        out = streams[0]
        if out is not None:
            out.flush()
            if out.reason is not None and out.reason.errno not in _LEFT:
                raise OutputLostError(f"standard output could not be written: {out.reason.strerror}; the rest is done")
    finally:
        for stream in streams:
            if stream is not None:
                stream.flush()
        sys.stdout, sys.stderr = before


class OutputLostError(UserError):
    """Standard output could not be written; the command's files are whole."""

    status = 1
