"""Rows of benchmarks end with the processes that run them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import rows

PARENT = """
from benchmarks.rows import run_process
run_process(["sh", "-c", "echo started; exec sleep 300"])
"""


def test_sigterm_ends_the_process_that_a_row_waits_for() -> None:
    command = [sys.executable, "-c", PARENT]
    root = Path(__file__).resolve().parents[2]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "started\n"
        parent.send_signal(signal.SIGTERM)
        # the pipe closes when both have ended
        assert parent.communicate(timeout=60) == ("", None)
        assert parent.returncode == 128 + signal.SIGTERM


def test_sigterm_while_a_process_starts_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[Any]] = []
    start = subprocess.Popen

    def interrupted(*arguments: Any, **options: Any) -> subprocess.Popen[Any]:
        started.append(start(*arguments, **options))
        os.kill(os.getpid(), signal.SIGTERM)  # before the caller knows the process
        return started[0]

    monkeypatch.setattr(rows.subprocess, "Popen", interrupted)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended:
        rows.run_process(["sleep", "300"])
    assert ended.value.code == 128 + signal.SIGTERM
    assert started[0].returncode == -signal.SIGKILL
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_process_reports_its_status_and_where_it_ran(tmp_path: Path) -> None:
    assert rows.run_process(["sh", "-c", "echo $PWD > here; exit 3"], cwd=tmp_path) == 3
    assert Path((tmp_path / "here").read_text().strip()).samefile(tmp_path)
