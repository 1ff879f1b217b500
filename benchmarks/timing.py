"""Measure wall-clock times of calls, on a CPU or a GPU."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

import torch

Result = TypeVar("Result")


def timed(run: Callable[[], Result], device: torch.device) -> tuple[float, Result]:
    """Return the seconds of one run, and its result, after synchronising with the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    result = run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start, result


def seconds(call: Callable[[], object], device: torch.device, calls: int = 1) -> float:
    """Return the seconds of one call, averaged over several in a row."""

    def run() -> None:
        for _ in range(calls):
            call()

    return timed(run, device)[0] / calls
