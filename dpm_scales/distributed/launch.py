"""Start the ranks of a run on this machine, with the environment variables that torchrun sets.

    with LocalRanks(4) as ranks:                      # this process is rank 0
        ...                                           # whatever may fail, before further processes start
        with ranks.others(work, argument):            # ranks 1 to 3 call work(argument)
            work(argument)

The process that the user started is rank 0: it receives the signals, prints, and returns the exit status. With
`torch.distributed.run` that process would not be a rank: its status is 1 for any error, and it prints a report.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import connection
from multiprocessing.context import SpawnProcess
from types import TracebackType
from typing import Any

from torch import distributed

from dpm_scales.errors import UserError

#: seconds that ranks have to end after another one has ended
GRACE = 30
#: seconds between the death of rank 0 and SIGTERM for the others
ORPHANED = 5
AGAIN = "the same command resumes the run from its last checkpoint"
#: variables that are set here or by Lightning
VARIABLES = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "NODE_RANK"),
    *("MASTER_ADDR", "MASTER_PORT"),
)


class LostProcessError(UserError):
    """Another rank of the run has died, which is not the user's mistake."""

    status = 1


class LocalRanks:
    """A context in which this process is rank 0 of `count` on this machine.

    On exit the process group is destroyed and the variables are restored, so that a process can do several runs.

    Args:
        count: number of ranks; with 1 nothing is set or started.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._before: dict[str, str] = {}

    def __enter__(self) -> LocalRanks:
        self._before = {name: os.environ[name] for name in VARIABLES if name in os.environ}
        if self.count > 1:
            os.environ.update(self._variables(0, _free_port()))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if "RANK" not in self._before and distributed.is_initialized():
            distributed.destroy_process_group()
        for name in VARIABLES:
            os.environ.pop(name, None)
        os.environ.update(self._before)

    @contextmanager
    def others(self, work: Callable[..., None], *arguments: Any) -> Iterator[None]:
        """Start the other ranks, which call `work(*arguments)`; all of them have ended when the context closes.

        Only rank 0 receives Ctrl-C, and ranks agree on when to stop. They end if rank 0 dies. If one of them fails and
        rank 0, which may be waiting for it, does not end within `GRACE` seconds, rank 0 is ended.

        Args:
            work: a module-level function, whose arguments can be pickled.
        """
        if self.count == 1:
            yield
            return
        port, context = _free_port(), multiprocessing.get_context("spawn")
        os.environ["MASTER_PORT"] = port
        ranks = [
            context.Process(target=work_apart, args=(self._variables(rank, port), work, arguments))
            for rank in range(1, self.count)
        ]
        over, patient = threading.Event(), False
        held = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # inherited
        try:
            for rank in ranks:
                rank.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, held)
        threading.Thread(target=_watch, args=(ranks, over), daemon=True).start()
        try:
            yield
            patient = True
        except (SystemExit, LostProcessError):
            patient = True  # the others stop as well, or report why they failed
            raise
        finally:
            over.set()
            for rank in ranks:
                rank.join(GRACE if patient else 0)
                rank.kill()
                rank.join()

    def _variables(self, rank: int, port: str) -> dict[str, str]:
        count = str(self.count)
        sizes = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "GROUP_RANK": "0"}
        return {**sizes, "RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}


def _free_port() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


def work_apart(variables: dict[str, str], work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    """Call `work(*arguments)` in a started process, with further variables; it ends when its parent is gone.

    It forms a separate process group, so that the terminal's signals reach only the parent.
    """
    os.setpgid(0, 0)  # the terminal's signals are for rank 0
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    threading.Thread(target=_follow, daemon=True).start()
    os.environ.update(variables)
    work(*arguments)


def _follow() -> None:
    """Send this process SIGTERM once rank 0 is gone, unless it ends on its own, as after a failed collective."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    time.sleep(ORPHANED)
    os.kill(os.getpid(), signal.SIGTERM)


def _watch(ranks: list[SpawnProcess], over: threading.Event) -> None:
    """End this process if a rank has failed and `over` is not set within `GRACE` seconds."""
    running = list(ranks)
    while running:
        connection.wait([rank.sentinel for rank in running])
        ended = [rank for rank in running if not rank.is_alive()]
        running = [rank for rank in running if rank not in ended]
        if any(rank.exitcode for rank in ended) and not over.wait(GRACE):
            print(f"error: another process of this run is gone, and this one ends too; {AGAIN}", file=sys.stderr)
            os._exit(LostProcessError.status)
