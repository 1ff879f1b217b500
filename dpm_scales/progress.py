"""The bar that long commands show: what, how much, at what rate, how long still. It fits terminals of any width."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import timedelta

from rich.cells import cell_len, set_cell_size
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.progress import Progress, Task
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

MIN_BAR, MAX_BAR = 8, 40
GAP = 2


class TaskLine:
    """One task in one line; where there is no room, what matters less is left out as a whole.

    First the time passed, then the bar, then figures, the last one first, then the rate. Counts and the time left stay,
    and a description is shortened before it is left out.

    Args:
        task: may have the fields `unit`, what the rate counts, and `figures`, a list of short texts.
        pad: cells that the description fills at least.
    """

    def __init__(self, task: Task, pad: int = 0) -> None:
        self.task, self.pad = task, max(pad, cell_len(task.description))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        task, width = self.task, options.max_width
        total = "?" if task.total is None else f"{task.total:.0f}"
        count = f"{task.completed:.0f}".rjust(len(total)) + f"/{total}"
        left, passed = _time(task.time_remaining), _time(task.finished_time if task.finished else task.elapsed)
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
            bars = [ProgressBar(task.total, task.completed, bar, pulse=not task.started)]
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
    """Rich's display of tasks, a `TaskLine` for each."""

    def get_renderables(self) -> Iterable[RenderableType]:
        tasks = [task for task in self.tasks if task.visible]
        pad = max((cell_len(task.description) for task in tasks), default=0)
        yield from (TaskLine(task, pad) for task in tasks)


def progress_bar(shown: bool = True) -> Progress:
    """A bar with counts, rate, time passed and time left."""
    return LineProgress(disable=not shown)
