"""Print errors as one line, and never fail because nobody reads: closing a terminal must not end training."""

from __future__ import annotations

import errno
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

from dpm_scales.errors import UserError, printable

#: error numbers of a reader that is gone: a pager or `head` that exited, a terminal that was closed
_LEFT = (errno.EPIPE, errno.EIO)

#: sequences that move progress bars and colour tables, which are kept; other controls of a terminal, and bidi controls
_CONTROLS = re.compile(
    "\x1b\\[(?:[0-9;]*[mKAG]|\\?25[hl])|[\0-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]"
)


def without_controls(text: str) -> str:
    """Return `text` with escapes for characters that a file name must not send to a terminal, such as bidi controls."""
    return _CONTROLS.sub(lambda found: found[0] if len(found[0]) > 1 else printable(found[0]), text)


class _Lasting:
    """A text stream that escapes control characters, discards output once writing fails, and keeps the first error."""

    def __init__(self, stream: Any) -> None:
        self.stream, self.reason = stream, None
        if hasattr(stream, "reconfigure"):  # names may hold any character, and a locale may be ASCII
            with suppress(OSError, ValueError):  # it flushes first, which may fail
                stream.reconfigure(errors="backslashreplace")

    reason: OSError | None

    def write(self, text: str) -> int:
        self._try(lambda: self.stream.write(without_controls(text)))
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
            with suppress(OSError, ValueError):  # buffered output must not fail again when Python exits
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, self.stream.fileno())
                os.close(null)


@contextmanager
def lasting_output() -> Iterator[None]:
    """Discard what the body prints once it can't be written (no reader, full disk), instead of failing.

    Control characters, and those that the stream's encoding lacks, are written as escapes.

    Raises: OutputLostError (status 1), after the body, if standard output was lost other than by a reader that left.
    """
    before = sys.stdout, sys.stderr
    streams = [None if stream is None else _Lasting(stream) for stream in before]  # None: closed at startup
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
    """Standard output could not be written; the command's files are complete."""

    status = 1


@contextmanager
def reported() -> Iterator[None]:
    """Run the body of a command without Hydra; for a user's mistake, print one line and exit with its status."""
    try:
        with lasting_output():
            yield
    except KeyboardInterrupt:
        sys.exit(130)
    except UserError as error:
        fail(str(error), error.status)


def line_of(text: str) -> str:
    """Return the text as one line that is safe to print, whatever file names and keys it contains."""
    return printable(" ".join(text.split()))


def one_line_warnings() -> None:
    """Print each warning of this process as one line, without its place in the code."""
    warnings.formatwarning = lambda message, *_args, **_kwargs: line_of(f"warning: {message}") + "\n"


def complain(text: str) -> None:
    """Print a line on standard error; all errors are printed here."""
    print(line_of(text), file=sys.stderr, flush=True)


def fail(line: str, status: int) -> NoReturn:
    """Print an error and exit with `status`."""
    complain(f"error: {line}")
    sys.exit(status)
