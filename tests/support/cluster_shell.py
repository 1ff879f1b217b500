"""Run several processes of an entry point on this machine, started as by srun and torchrun."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from support.shell import ROOT, Outcome, call
from support.warm import warm_python

#: SLURM job numbers, which also determine a port
JOBS = itertools.count(os.getpid() % 9000 + 1000)


def start(*command: str, cwd: Path, **variables: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1", "WANDB_MODE": "offline", **variables}
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, cwd=cwd, env=environment, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True
    )


def job_step(count: int) -> list[dict[str, str]]:
    """Return the environment that SLURM gives each process of a job step."""
    job = str(next(JOBS))
    step = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": str(count), "SLURM_STEP_NUM_NODES": "1"}
    step |= {"SLURM_JOB_ID": job, "SLURM_NTASKS": str(count), "SLURM_JOB_NAME": "train", "SLURM_NODEID": "0"}
    return [{**step, "SLURM_PROCID": str(k), "SLURM_LOCALID": str(k)} for k in range(count)]


class Forked:
    """Run ``python train.py arguments`` in forked children, which start fast because all modules are imported.

    Args:
        steps: environment of each child.
        prepare: called first in each child, with its rank.
        python: executable with which the children start further processes; None for forks of this one.
    """

    def __init__(
        self,
        steps: list[dict[str, str]],
        *arguments: str,
        cwd: Path,
        prepare: Callable[[int], Any] = lambda rank: None,
        python: str | None = None,
    ) -> None:
        python = python or warm_python()
        self.folder = Path(tempfile.mkdtemp())
        self.children: list[int] = []
        for rank, step in enumerate(steps):
            child = os.fork()
            if child == 0:
                status = 99
                told = self.folder / str(rank)
                try:
                    os.setpgid(0, 0)  # one group with its children, as in a terminal
                    signal.signal(signal.SIGINT, signal.default_int_handler)
                    sys.executable = python
                    multiprocessing.set_executable(python)
                    prepare(rank)
                    outcome = call("train.py", *arguments, cwd=cwd, environment={"NO_COLOR": "1", **step})
                    told.write_text(json.dumps(asdict(outcome)))
                    status = outcome.status
                except BaseException:
                    told.write_text(json.dumps(asdict(Outcome(status, "", traceback.format_exc()))))
                finally:
                    os._exit(status)
            self.children.append(child)

    def running(self) -> bool:
        """Return whether all processes are running; those that have ended can still be waited for."""
        ended = [os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) for child in self.children]
        return not any(ended)

    def signal(self, number: int) -> None:
        """Send a signal to all processes and their children."""
        for child in self.children:
            os.killpg(child, number)

    def finish(self) -> list[Outcome]:
        """Wait for the processes and return their outcomes; none outlives the test."""
        until, outcomes = time.monotonic() + 240, []
        try:
            for rank, child in enumerate(self.children):
                while (status := os.waitpid(child, os.WNOHANG)) == (0, 0):
                    assert time.monotonic() < until, "a process hangs"
                    time.sleep(0.01)
                told = self.folder / str(rank)
                code = os.waitstatus_to_exitcode(status[1])
                outcomes.append(Outcome(**json.loads(told.read_text())) if told.is_file() else Outcome(code, "", ""))
                self.children[rank] = 0
        finally:
            for child in filter(None, self.children):
                os.killpg(child, signal.SIGKILL)
                os.waitpid(child, 0)
        return outcomes


def torchrun(options: tuple[str, ...], script: str, *arguments: str, cwd: Path) -> subprocess.Popen[str]:
    """Start torchrun, whose processes are forks of this one."""
    return start(warm_python(), "-m", "torch.distributed.run", *options, str(ROOT / script), *arguments, cwd=cwd)


def free_port() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


def finish(*processes: subprocess.Popen[str]) -> list[Outcome]:
    """Wait for the processes and return their outcomes; none outlives the test."""
    try:
        ends = [process.communicate(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [Outcome(p.returncode, out, err) for p, (out, err) in zip(processes, ends, strict=True)]


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str] | Forked) -> None:
    """Wait until the condition holds, which must happen while the process runs."""
    until = time.monotonic() + 200
    while not condition():
        if isinstance(process, Forked):
            assert process.running() and time.monotonic() < until, process.finish()
        else:
            assert process.poll() is None and time.monotonic() < until, process.communicate(timeout=10)
        time.sleep(0.02)
