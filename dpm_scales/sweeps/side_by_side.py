"""Run each job in its own process, as many at a time as there are places; the others wait for a free one."""

from __future__ import annotations

import os
import signal
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import BaseContext
from typing import Any

from dpm_scales.distributed.launch import work_apart

Place = Mapping[str, str]
"""Environment variables of the job that runs in it."""
Work = Callable[[bytes], bytes]


@dataclass(frozen=True)
class End:
    """Outcome of a job.

    Attributes:
        result: what its work returned; None if the process ended before.
        status: exit status of the process, minus the signal's number if one killed it.
    """

    result: bytes | None
    status: int


def run_side_by_side(jobs: Sequence[bytes], places: Sequence[Place], work: Work, context: BaseContext) -> list[End]:
    """Call ``work(job)`` for each job, in order, one at a time in each place; return the outcomes.

    A process that dies ends its own job only. All processes end if this one dies.

    Args:
        work: a function of a module.
        context: starts processes, for example ``multiprocessing.get_context("spawn")``.

    Raises: KeyboardInterrupt after Ctrl-C, which every running job gets; a second one kills them.
    """
    waiting, free = deque(range(len(jobs))), deque(places)
    running: dict[int, tuple[Any, Connection, Place]] = {}
    ends: dict[int, End] = {}
    try:
        while waiting or running:
            while waiting and free:
                number, place = waiting.popleft(), free.popleft()
                running[number] = (*_start(jobs[number], place, work, context), place)
            handles = [handle for process, receiver, _ in running.values() for handle in (receiver, process.sentinel)]
            ready = wait(handles)
            for number, (process, receiver, place) in list(running.items()):
                if receiver in ready or process.sentinel in ready:
                    result = _received(receiver)
                    process.join()
                    ends[number] = End(result, process.exitcode)
                    del running[number]
                    free.append(place)
    except KeyboardInterrupt:
        _end(process for process, *_ in running.values())
        raise
    return [ends[number] for number in range(len(jobs))]


def _start(job: bytes, place: Place, work: Work, context: BaseContext) -> tuple[Any, Connection]:
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=work_apart, args=({}, _work_and_send, (work, job, sender)))  # type: ignore[attr-defined]
    held = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # inherited, and unblocked in a group of its own
    try:
        with _variables(place):  # here, not in the process: torch reads some of them when it is imported
            process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held)
    sender.close()
    return process, receiver


def _work_and_send(work: Work, job: bytes, sender: Connection) -> None:
    sender.send_bytes(work(job))
    sender.close()


def _received(receiver: Connection) -> bytes | None:
    try:
        return receiver.recv_bytes() if receiver.poll() else None
    except (EOFError, OSError):  # it died before, or while it was sending
        return None
    finally:
        receiver.close()


def _end(processes: Iterator[Any]) -> None:
    """Forward Ctrl-C and wait while runs write their checkpoints; kill them at the next Ctrl-C."""
    started = list(processes)
    try:
        for process in started:
            if process.is_alive():
                os.kill(process.pid, signal.SIGINT)
        for process in started:
            process.join()
    except KeyboardInterrupt:
        for process in started:
            process.kill()
            process.join()


@contextmanager
def _variables(place: Place) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in place}
    os.environ.update(place)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
