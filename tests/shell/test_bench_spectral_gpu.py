"""The script that compares processes on one GPU: its jobs, their end, its exit status; with a stand-in for Python."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STAND_IN = """#!/usr/bin/env bash
[[ $* == *--tables* ]] && { echo "| vp | $STATUS |" >"$TABLE"; echo "$@" >>"$CALLS"; exit 0; }
echo "$@" >>"$CALLS"
if [[ $STATUS == forever ]]; then
    sleep 300 &
    echo $! >>"$CHILDREN"
    wait
fi
echo "job ends"
exit "$STATUS"
"""


@pytest.mark.parametrize(
    ("status", "minutes", "expected"), [("0", 2, 0), ("3", 2, 1), ("forever", 1, 0)], ids=["ends", "fails", "too long"]
)
def test_script_runs_jobs_side_by_side_and_stops_them(status: str, minutes: int, expected: int, tmp_path: Path) -> None:
    python, out, calls, children = (tmp_path / name for name in ("python", "out", "calls", "children"))
    python.write_text(STAND_IN)
    python.chmod(0o755)
    told = {"STATUS": status, "TABLE": out / "mnist.md", "CALLS": calls, "CHILDREN": children}
    given = {"DEVICE": "cpu", "PYTHON": python, "TABLES": "57", **told}
    command = [ROOT / "benchmarks/spectral_gpu.sh", out, minutes, 2, 640, "--rows", "vp", "heat"]
    done = subprocess.run(
        [str(word) for word in command],
        env={**os.environ, **{key: str(value) for key, value in given.items()}},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == expected, done.stderr
    assert f"| vp | {status} |" in done.stdout
    job = f"-m benchmarks.spectral --set mnist --images 640 --device cpu --out {out} --rows vp heat"
    job += " --override trainer.accelerator=cpu"
    lines = calls.read_text().splitlines()
    assert lines[-1] == f"{job} --tables" and lines[:-1] == [job, job]
    if status == "forever":
        end = time.monotonic() + 20
        while any(Path(f"/proc/{pid}").exists() for pid in children.read_text().split()):
            assert time.monotonic() < end, "trainings outlive the script"
            time.sleep(0.1)
    else:
        assert "job ends" in done.stdout
