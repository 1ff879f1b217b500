"""How far the parts of a long command are: bars in a terminal, and a line now and then where there is none."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from types import TracebackType

from dpm_scales.progress import progress_bar

FIRST_LINE, NEXT_LINES = 5.0, 30.0
"""Seconds after which a part has its first line, and its further ones, where output is no terminal."""


class Report:
    """Progress of several parts: what, how many of how many, at what rate, how long still.

    A context manager. In a terminal each part has a bar. Elsewhere, as in a log file, a part that takes longer than
    `FIRST_LINE` seconds prints a line every `NEXT_LINES` seconds, and one at its end.

    Args:
        clock: seconds that pass, for tests.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.bars = progress_bar()
        self.in_terminal = self.bars.console.is_terminal
        if not self.in_terminal:
            self.bars.disable = True

    def __enter__(self) -> Report:
        self.bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.bars.stop()

    def part(self, name: str, total: int) -> Callable[[float], None]:
        """Begin a part of `total` steps; returns what is called with the number of steps done, also parts of one."""
        if self.in_terminal:
            bar = self.bars.add_task(name, total=total)
            return lambda count: self.bars.advance(bar, count)
        return _Lines(name, total, self.clock)


class _Lines:
    """The lines of one part."""

    def __init__(self, name: str, total: int, clock: Callable[[], float]) -> None:
        self.name, self.total, self.clock = name, total, clock
        self.done, self.ended = 0.0, False
        self.began = clock()
        self.due = self.began + FIRST_LINE

    def __call__(self, count: float) -> None:
        self.done += count
        now = self.clock()
        passed = now - self.began
        if self.done > self.total - 1e-6 and not self.ended:
            self.ended = True
            if passed >= FIRST_LINE:
                print(f"{self.name}: {self.total} in {_clock(passed)}, {_rate(self.total / passed)}", flush=True)
        elif now >= self.due and self.done > 0 and not self.ended:
            self.due = now + NEXT_LINES
            rate = self.done / passed
            left = _clock((self.total - self.done) / rate)
            print(f"{self.name}: {int(self.done)} of {self.total}, {_rate(rate)}, {left} left", flush=True)


def _clock(seconds: float) -> str:
    try:
        return str(timedelta(seconds=round(seconds)))
    except OverflowError:
        return "more than 2 million years"


def _rate(speed: float) -> str:
    return f"{speed:.{0 if speed >= 10 else 2}f}/s"
