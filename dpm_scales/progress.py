"""Show the progress of long commands: description, count, rate and time left, in terminals of any width."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from datetime import timedelta
from types import TracebackType

from rich.cells import cell_len, set_cell_size
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.progress import Progress, Task
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

MIN_BAR, MAX_BAR = 8, 40
GAP = 2


class TaskLine:
    """Display of one task in one line, which omits whole parts, the least important first, if there is no room.

    The order of omission is elapsed time, bar, figures (last one first), rate. Counts and the remaining time are always
    shown; a description is shortened before it is omitted.

    Args:
        task: the task, optionally with the fields `unit`, the unit of the rate; `figures`, a list of short texts; and
            `clock`, the seconds passed and left of a task that ends by time.
        pad: minimum width of the description, in cells.
    """

    def __init__(self, task: Task, pad: int = 0) -> None:
        self.task, self.pad = task, max(pad, cell_len(task.description))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        task, width = self.task, options.max_width
        clock: tuple[float, float] | None = task.fields.get("clock")
        total = f"{task.total:.0f}" if task.total is not None else "" if clock else "?"
        count = f"{task.completed:.0f}".rjust(len(total)) + (f"/{total}" if total else "")
        left = _time(task.time_remaining if clock is None else max(clock[1], 0.0))
        passed = _time(task.finished_time if task.finished else task.elapsed)
        speed = task.finished_speed or task.speed
        needed = [count] if task.finished else [count, f"{left} left"]
        free = width - sum(map(len, needed)) - GAP * (len(needed) - 1)
        description = set_cell_size(task.description, max(min(self.pad, free - GAP), 0))
        if cell_len(description) < cell_len(task.description):
            description = f"{set_cell_size(description, cell_len(description) - 1)}…" if len(description) > 1 else ""
        free -= cell_len(description) + GAP if description else 0

        def fits(text: str) -> bool:
            nonlocal free
            room = bool(text) and cell_len(text) + GAP <= free
            free -= cell_len(text) + GAP if room else 0
            return room

        rate = ""
        if speed is not None:
            number = f"{speed:.{0 if speed >= 100 else 1 if speed >= 1 else 2}f}"
            rate = f"{number} {task.fields.get('unit', '')}".rstrip() + "/s"
        rates = [rate] if fits(rate) else []
        figures: list[str] = []
        for figure in task.fields.get("figures", ()):
            if not fits(figure):
                break
            figures.append(figure)
        bar = min(free - GAP, MAX_BAR)
        bars: list[RenderableType] = []
        if bar >= MIN_BAR:
            free -= bar + GAP
            whole, done = (task.total, task.completed) if clock is None else (sum(clock), clock[0])
            bars = [ProgressBar(whole, done, bar, pulse=not task.started)]
        times = [passed] if fits(passed) else []

        def styled(texts: Iterable[str], style: str) -> list[RenderableType]:
            return [Text(text, style, no_wrap=True) for text in texts if text]

        line = Table.grid(padding=(0, GAP, 0, 0), pad_edge=False)
        line.add_row(
            *styled([description], "progress.description"),
            *styled([count], "progress.download"),
            *bars,
            *styled(rates, "progress.data.speed"),
            *styled(times, "progress.elapsed"),
            *styled(needed[1:], "progress.remaining"),
            *styled(figures, ""),
        )
        yield line


def _time(seconds: float | None) -> str:
    return "-:--:--" if seconds is None else str(timedelta(seconds=int(seconds)))


class LineProgress(Progress):
    """Rich progress display with a `TaskLine` for each task."""

    def get_renderables(self) -> Iterable[RenderableType]:
        tasks = [task for task in self.tasks if task.visible]
        pad = max((cell_len(task.description) for task in tasks), default=0)
        yield from (TaskLine(task, pad) for task in tasks)


def progress_bar(shown: bool = True) -> Progress:
    """Return a progress bar with counts, rate, elapsed and remaining time; with `shown` False it displays nothing."""
    return LineProgress(disable=not shown)


FIRST_LINE, NEXT_LINES = 5.0, 30.0
"""Seconds until the first line of a part, and between further lines, if the output is not a terminal."""


class Report:
    """Progress display of several parts: name, count, total, rate and remaining time of each.

    It is a context manager. In a terminal, each part has a bar. Elsewhere, as in a log file, a part that takes longer
    than `FIRST_LINE` seconds prints a line every `NEXT_LINES` seconds, and one at its end.

    Args:
        clock: a clock in seconds; tests pass their own.
        shown: False to display nothing.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, shown: bool = True) -> None:
        self.clock, self.shown = clock, shown
        self.bars = progress_bar(shown)
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
        """Begin a part of `total` steps; return a callback that takes the number of steps done, possibly a fraction."""
        if not self.shown:
            return lambda count: None
        if self.in_terminal:
            bar = self.bars.add_task(name, total=total)
            return lambda count: self.bars.advance(bar, count)
        return _Lines(name, total, self.clock)


class _Lines:
    """Printer of progress lines for one part."""

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
