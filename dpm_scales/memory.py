"""Check that memory is free before allocating it.

Code that allocates a table, batch or list of a size chosen by the user first calls `require_memory` with a lower bound
on its bytes: the user gets one line at once, instead of a late failure or a machine that starts to swap.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from dpm_scales.errors import OutOfMemoryError

if TYPE_CHECKING:  # importing torch takes seconds
    import torch

#: number of bytes below which nothing is checked
NEGLIGIBLE = 2**24
_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB")
#: torch's messages on the CPU, for sizes that can't be allocated or that overflow 64 bits
_ALLOCATION_FAILED = re.compile("DefaultCPUAllocator|Storage size calculation|integer multiplication overflow")


def require_memory(num_bytes: float, what: str, remedy: str, device: torch.device | None = None) -> None:
    """Raise OutOfMemoryError (status 1) unless `num_bytes` are free.

    Args:
        num_bytes: lower bound on the bytes held at the same time; a Python number of any size.
        what: what needs them, with the option that sets its size: ``"batch_size=100000 images of 64x64"``.
        remedy: what to do instead: ``"lower batch_size"``.
        device: device that holds them; None for the machine's own memory.
    """
    if num_bytes <= NEGLIGIBLE:
        return
    available = available_memory(device)
    if num_bytes > available:
        place = "this machine" if device is None or device.type == "cpu" else f"the device {device}"
        raise OutOfMemoryError(
            f"{what} would take {_size(num_bytes)} of memory, and {place} has {_size(available)} left; {remedy}"
        )


def available_memory(device: torch.device | None = None) -> float:
    """Return the number of bytes that can still be allocated, infinity if it is unknown.

    For the machine itself this is the minimum left by the kernel, the limits of this process (``ulimit -v``) and those
    of its control groups (containers, SLURM); for a CUDA device, the memory that is free or cached by torch.
    """
    if device is not None and device.type == "cuda":
        import torch

        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device is not None and device.type != "cpu":
        return math.inf
    return max(0.0, min(_of_machine(), _of_process(), *_of_control_groups()))


def lacks_memory(error: BaseException) -> str | None:
    """Return where memory ran out, "the machine" or "the device", or None if the error has another cause."""
    if isinstance(error, MemoryError):
        return "the machine"
    if any(kind.__name__ == "OutOfMemoryError" and kind.__module__ == "torch" for kind in type(error).__mro__):
        return "the device"
    return "the machine" if isinstance(error, RuntimeError) and _ALLOCATION_FAILED.search(str(error)) else None


def _size(num_bytes: float) -> str:
    if num_bytes >= 2**60:
        return "more than 1024 PiB"
    unit = 0
    while num_bytes >= 1024 and unit < len(_UNITS) - 1:
        num_bytes /= 1024
        unit += 1
    return f"{num_bytes:.3g} {_UNITS[unit]}" if num_bytes < 1000 else f"{num_bytes:.0f} {_UNITS[unit]}"


def _of_machine() -> float:
    try:
        text = Path("/proc/meminfo").read_text()
    except OSError:
        try:
            return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
        except (ValueError, OSError, AttributeError):
            return math.inf
    kib = {name: int(value) for name, value in re.findall(r"^(MemAvailable|SwapFree):\s+(\d+) kB", text, re.MULTILINE)}
    return 1024.0 * (kib["MemAvailable"] + kib.get("SwapFree", 0)) if "MemAvailable" in kib else math.inf


def _of_process() -> float:
    try:
        import resource

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except (ImportError, OSError):  # Windows; no /proc
        return math.inf
    return math.inf if limit == resource.RLIM_INFINITY else float(limit - pages * resource.getpagesize())


def _of_control_groups() -> Iterator[float]:
    """Yield the bytes left by each control group of this process, for both versions of the interface."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, name = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root = Path("/sys/fs/cgroup/memory" if controllers else "/sys/fs/cgroup")
        own = root / name.lstrip("/")
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if controllers else ("memory.max", "memory.current")
        for folder in (own, *own.parents):
            if root not in (folder, *folder.parents):
                break
            try:
                limit, used = ((folder / file).read_text().strip() for file in names)
                stat = dict(entry.split() for entry in (folder / "memory.stat").read_text().splitlines())
            except (OSError, ValueError):
                continue
            if limit.isdecimal():
                files = ("active_file", "inactive_file")
                cached = sum(int(stat.get(f"total_{key}", stat.get(key, 0))) for key in files)
                yield float(int(limit) - int(used) + cached)
