"""Several processes of an entry point at a time, started as srun and torchrun do, on this machine."""

from __future__ import annotations

import itertools
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from shell import ROOT, Outcome

#: of SLURM's jobs: their number is also that of a port
JOBS = itertools.count(os.getpid() % 9000 + 1000)


def start(*command: str, cwd: Path, **variables: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1", "WANDB_MODE": "offline", **variables}
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, cwd=cwd, env=environment, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True
    )


def srun(count: int, script: str, *arguments: str, cwd: Path, **variables: str) -> list[subprocess.Popen[str]]:
    """The processes of one job step on one machine; `script` may be Python's "-c"."""
    job = str(next(JOBS))
    step = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": str(count), "SLURM_STEP_NUM_NODES": "1"}
    step |= {"SLURM_JOB_ID": job, "SLURM_NTASKS": str(count), "SLURM_JOB_NAME": "train", "SLURM_NODEID": "0"}
    command = (sys.executable, script if script == "-c" else str(ROOT / script), *arguments)
    return [
        start(*command, cwd=cwd, **step, SLURM_PROCID=str(k), SLURM_LOCALID=str(k), **variables) for k in range(count)
    ]


def torchrun(options: tuple[str, ...], script: str, *arguments: str, cwd: Path) -> subprocess.Popen[str]:
    return start(sys.executable, "-m", "torch.distributed.run", *options, str(ROOT / script), *arguments, cwd=cwd)


def free_port() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


def finish(*processes: subprocess.Popen[str]) -> list[Outcome]:
    """What they leave; none outlives the test."""
    try:
        ends = [process.communicate(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [Outcome(p.returncode, out, err) for p, (out, err) in zip(processes, ends, strict=True)]


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Until it holds, which must be while the process runs."""
    until = time.monotonic() + 200
    while not condition():
        assert process.poll() is None and time.monotonic() < until, process.communicate(timeout=10)
        time.sleep(0.02)
