"""Progress of long commands: bars in a terminal, lines at intervals in a log."""

from __future__ import annotations

from unittest import mock

import pytest
from rich.console import Console

from dpm_scales import progress as reporting
from dpm_scales.progress import Report


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def run(total: int, seconds: float, step: float = 1.0) -> None:
    """A part of `total` steps that take `seconds` each."""
    clock = Clock()
    with Report(clock) as report:
        advance = report.part("features", total)
        done = 0.0
        while done < total - 1e-9:
            clock.now += seconds * step
            done += step
            advance(step)


def test_a_log_has_a_line_at_intervals_and_one_at_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    run(100, 1.0)
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "features: 5 of 100, 1.00/s, 0:01:35 left",
        "features: 35 of 100, 1.00/s, 0:01:05 left",
        "features: 65 of 100, 1.00/s, 0:00:35 left",
        "features: 95 of 100, 1.00/s, 0:00:05 left",
        "features: 100 in 0:01:40, 1.00/s",
    ]


def test_a_short_part_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    run(40, 0.1)
    assert capsys.readouterr().out == ""


def test_parts_of_a_step_count(capsys: pytest.CaptureFixture[str]) -> None:
    """Three steps of a sampler a minute each, of two images: the first line comes before the first image is done."""
    run(2, 180.0, step=1 / 3)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "features: 0 of 2, 0.01/s, 0:05:00 left" and lines[-1] == "features: 2 in 0:06:00, 0.01/s"
    assert len(lines) == 6


def test_a_part_that_would_take_ages(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    with Report(clock) as report:
        advance = report.part("sampling", 10**17)
        clock.now += 10
        advance(1)
    assert capsys.readouterr().out == f"sampling: 1 of {10**17}, 0.10/s, more than 2 million years left\n"


def test_a_terminal_has_bars(capsys: pytest.CaptureFixture[str]) -> None:
    from dpm_scales.progress import progress_bar

    bars = progress_bar()
    console = Console(force_terminal=True, width=100)
    with (
        mock.patch.object(reporting, "progress_bar", lambda shown: bars),
        mock.patch.object(bars.live, "console", console),
        Report() as report,
    ):
        advance = report.part("sampling", 4)
        advance(1.5)
        advance(0.5)
        assert [(task.description, task.completed, task.total) for task in bars.tasks] == [("sampling", 2, 4)]
    assert "sampling" in capsys.readouterr().out


def test_what_is_not_shown_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    with Report(clock, shown=False) as report:
        advance = report.part("sampling", 2)
        clock.now += 100
        advance(2)
    assert capsys.readouterr().out == ""
