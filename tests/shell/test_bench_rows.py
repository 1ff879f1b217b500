"""Rows of benchmarks end with the processes that run them."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

PARENT = """
import subprocess
from benchmarks.rows import end_with_children
end_with_children()
subprocess.run(["sh", "-c", "echo $$; exec sleep 300"], check=False)
"""


def test_sigterm_ends_the_process_that_a_row_waits_for() -> None:
    command = [sys.executable, "-c", PARENT]
    root = Path(__file__).resolve().parents[2]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root) as parent:
        assert parent.stdout is not None
        child = Path(f"/proc/{int(parent.stdout.readline())}")
        assert child.exists()
        parent.send_signal(signal.SIGTERM)
        assert parent.wait(30) == 128 + signal.SIGTERM
        end = time.monotonic() + 20
        while child.exists():
            assert time.monotonic() < end, "its child lives on"
            time.sleep(0.05)
