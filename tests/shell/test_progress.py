"""The line that shows how far a command is: counts and the time left are whole at any width of the terminal."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from dpm_scales.progress import LineProgress
from support.shell import attempt, column

FIGURES = ["train/loss 0.8108", "val/loss 0.9044"]


def lines(width: int, *tasks: tuple[str, dict[str, object]], done: int = 83) -> list[str]:
    """What a terminal of `width` cells shows after `done` steps of 2200, five a second."""
    clock = [0.0]
    console = Console(width=width, file=io.StringIO(), color_system=None)
    progress = LineProgress(console=console, get_time=lambda: clock[0])
    numbers = [progress.add_task(name, total=2200, **fields) for name, fields in tasks]  # type: ignore[arg-type]
    for step in range(1, done + 1):
        clock[0] += 0.2
        for number in numbers:
            progress.update(number, completed=step)
    console.print(progress.get_renderable())
    text = console.file.getvalue()  # type: ignore[attr-defined]
    return text.splitlines()


@pytest.mark.parametrize("width", [200, 120, 80, 60, 40])
def test_steps_and_time_left_are_whole(width: int) -> None:
    (line,) = lines(width, ("step", {"unit": "steps", "figures": FIGURES}))
    assert len(line) <= width
    assert "83/2200" in line and "0:07:04 left" in line and "…" not in line
    assert line.startswith("step ")
    assert "5.0 steps/s" in line or width < 60
    assert all(figure in line for figure in FIGURES) == (width >= 80)


def test_a_wide_terminal_has_a_bar_and_the_time_passed() -> None:
    (line,) = lines(120, ("sampling", {}))
    assert "━" in line or "╸" in line
    assert "5.0/s" in line and "0:00:16" in line


def test_descriptions_are_shortened_before_counts_are() -> None:
    first, second = lines(40, ("features of the reference", {}), ("draw", {}))
    assert max(len(first), len(second)) <= 40 and first.index("83/2200") == second.index("83/2200")
    assert first.startswith("features of") and "…" in first and second.startswith("draw ")


def test_without_a_known_end() -> None:
    clock = [0.0]
    console = Console(width=80, file=io.StringIO(), color_system=None)
    progress = LineProgress(console=console, get_time=lambda: clock[0])
    progress.add_task("step", total=None)
    console.print(progress.get_renderable())
    assert "0/?" in console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize("width", [120, 40])
def test_time_left_of_a_task_that_ends_by_time(width: int) -> None:
    """Two thirds of the bar after two thirds of the time; no total, as the number of steps is not known."""
    console = Console(width=width, file=io.StringIO(), color_system=None)
    progress = LineProgress(console=console)
    for steps, clock in ((None, (120.0, 60.0)), (2200, (120.0, 60.0)), (None, (181.0, -1.0))):
        progress.add_task("step", total=steps, completed=83, clock=clock)  # type: ignore[arg-type]
    console.print(progress.get_renderable())
    by_time, both, over = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert "0:01:00 left" in by_time and " 83 " in by_time and "/" not in by_time
    assert "0:01:00 left" in both and "83/2200" in both
    assert "0:00:00 left" in over
    if width == 120:  # 40 cells; without colours the part that is left is blank
        assert 25 <= sum(by_time.count(cell) for cell in "━╸") <= 28
        assert over.count("━") == 40


def test_training_shows_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    console = Console(width=80, file=io.StringIO(), force_terminal=True, color_system=None)
    monkeypatch.setattr("dpm_scales.training.reporting.get_console", lambda: console)
    outcome = attempt(tmp_path / "run", "trainer.max_steps=2", "samples.num_images=0")
    assert outcome.status == 0, outcome.err
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "2/2" in shown and "step " in shown and "…" not in shown


def test_a_run_that_ends_by_time_shows_what_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the first line, in a log file and on a terminal; steps that end sooner count instead."""
    by_time = ("trainer.max_time=00:01:00:00", "samples.num_images=0")
    outcome = attempt(tmp_path / "run", *by_time, "trainer.max_steps=2")
    assert outcome.status == 0, outcome.err
    assert ", steps 2, time 1:00:00, cpu" in outcome.out
    assert "step 2/2, " in outcome.out and ", 0:00:00 left, " in outcome.out

    outcome = attempt(
        tmp_path / "timed", "trainer.max_time=00:00:00:03", "samples.num_images=0", "trainer.max_steps=-1"
    )
    assert outcome.status == 0, outcome.err
    assert ", time 0:00:03, cpu" in outcome.out and "steps -1" not in outcome.out
    told = [line for line in outcome.out.splitlines() if line.startswith("step ")]
    assert told and all(re.match(r"step \d+, [\d.]+ steps/s, 0:00:0[0-3] left, ", line) for line in told)

    console = Console(width=120, file=io.StringIO(), force_terminal=True, color_system=None)
    monkeypatch.setattr("dpm_scales.training.reporting.get_console", lambda: console)
    monkeypatch.setattr("dpm_scales.training.reporting.StepBar._rate", lambda *args: 1e-6)  # by steps, weeks
    assert attempt(tmp_path / "bar", *by_time, "trainer.max_steps=3").status == 0
    assert "0:59:5" in console.file.getvalue()  # type: ignore[attr-defined]


def test_a_log_file_has_a_line_now_and_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every half minute, without waiting for a validation."""
    monkeypatch.setattr("dpm_scales.training.reporting.NEXT_LINES", 0.0)
    outcome = attempt(tmp_path / "run", "trainer.max_steps=3", "samples.num_images=0")
    assert outcome.status == 0, outcome.err
    told = [line.partition(",")[0] for line in outcome.out.splitlines() if line.startswith("step ")]
    assert list(dict.fromkeys(told)) == ["step 1/3", "step 2/3", "step 3/3"]


def test_the_losses_are_those_of_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a log file, a line for each validation; on a terminal, the bar's last reading."""
    outcome = attempt(tmp_path / "run", "samples.num_images=0")
    assert outcome.status == 0, outcome.err
    losses, validated = column(tmp_path / "run", "train/loss"), column(tmp_path / "run", "val/loss")
    told = [line.partition("left, ")[2] for line in outcome.out.splitlines() if line.startswith("step ")]
    assert told == [f"train/loss {losses[n]:.4f}  val/loss {v:.4f}" for n, v in zip((2, 5), validated, strict=True)]

    console = Console(width=120, file=io.StringIO(), force_terminal=True, color_system=None)
    monkeypatch.setattr("dpm_scales.training.reporting.get_console", lambda: console)
    monkeypatch.setattr("dpm_scales.training.reporting.LOSS_EVERY", 3)
    assert attempt(tmp_path / "other", "samples.num_images=0").status == 0
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert f"train/loss {losses[5]:.4f}" in shown and f"val/loss {validated[0]:.4f}" in shown
