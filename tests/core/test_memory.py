"""Memory is compared with what there is before it is taken."""

from __future__ import annotations

import math
import resource
from pathlib import Path

import numpy as np
import pytest
import torch

from dpm_scales import memory
from dpm_scales.data import Digits, ImageDataModule
from dpm_scales.errors import OutOfMemoryError, UserError
from dpm_scales.memory import NEGLIGIBLE, available_memory, lacks_memory, require_memory
from dpm_scales.models.instantiate import build
from dpm_scales.processes import Process
from support.shell import composed


def test_what_does_not_fit_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda device: 3 * 2.0**30)
    require_memory(3 * 2**30, "num_samples=3", "lower num_samples")
    with pytest.raises(OutOfMemoryError) as caught:
        require_memory(3 * 2**30 + 1, "num_samples=4", "lower num_samples")
    assert str(caught.value) == (
        "num_samples=4 would take 3 GiB of memory, and this machine has 3 GiB left; lower num_samples"
    )
    assert caught.value.status == 1
    for absurd in (10**400, math.inf):
        with pytest.raises(OutOfMemoryError, match="would take more than 1024 PiB"):
            require_memory(absurd, "x", "y")


def test_little_is_always_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda device: 0.0)
    require_memory(NEGLIGIBLE, "x", "y")
    with pytest.raises(OutOfMemoryError):
        require_memory(NEGLIGIBLE + 1, "x", "y")


def test_the_limit_of_the_process_counts() -> None:
    before, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    free = available_memory()
    assert 0 < free < 2**60
    try:
        resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, hard))
        assert available_memory() <= 2**28 + 2**20  # this test's own pages may have been freed
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (before, hard))


@pytest.mark.parametrize("version", [1, 2])
def test_limits_of_control_groups_count(version: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of all levels, and what the kernel can drop at once is no use of memory."""
    root = tmp_path / ("sys/fs/cgroup" if version == 2 else "sys/fs/cgroup/memory")
    names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    job = root / "slurm" / "job"
    job.mkdir(parents=True)
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/slurm/job\n" if version == 2 else "9:cpu:/x\n4:memory:/slurm/job\n")
    for folder, values in ((job, ("max" if version == 2 else str(2**63), "5000")), (job.parent, ("9000", "6000"))):
        for name, value in zip(names, values, strict=True):
            (folder / name).write_text(f"{value}\n")
        (folder / "memory.stat").write_text("anon 5\nactive_file 100\ninactive_file 900\n")
    monkeypatch.setattr(memory, "Path", lambda place: tmp_path / str(place).lstrip("/"))
    assert min(memory._of_control_groups()) == 4000


def test_errors_that_tell_of_memory() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert lacks_memory(caught.value) == "the machine"
    with pytest.raises(RuntimeError) as overflow:
        torch.empty(2**40, 2**40)
    assert lacks_memory(overflow.value) == "the machine"
    with pytest.raises(MemoryError) as of_numpy:
        np.empty(2**60, dtype=np.uint8)
    assert lacks_memory(of_numpy.value) == "the machine"
    assert lacks_memory(torch.OutOfMemoryError("CUDA out of memory")) == "the device"
    assert lacks_memory(RuntimeError("shapes do not fit")) is None
    assert lacks_memory(ValueError("DefaultCPUAllocator")) is None


# --- what a user's numbers ask for ------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [10**9, 10**12, 10**30])
@pytest.mark.parametrize("process", ["vp", "ve", "heat", "blurring", "blurring_chain", "osmosis_diffusion"])
def test_scales_are_counted_before_their_tables_are_made(process: str, number: int) -> None:
    config = composed(f"process={process}", f"process.num_scales={number}").process
    with pytest.raises(OutOfMemoryError, match=f"num_scales={number} would take"):
        build(config, Process, "process")


@pytest.mark.parametrize("number", [10**8, 10**12])
def test_batches_are_counted_before_they_are_loaded(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda device: 2.0**34)
    with pytest.raises(
        OutOfMemoryError, match=f"batch_size={number} images of 8x8x1 would take .*; lower data.batch_si"
    ):
        ImageDataModule(Digits(), number, drop_last=False)
    ImageDataModule(Digits(), 10**5, drop_last=False)


@pytest.mark.parametrize("option", ["batch_size", "num_workers", "seed"])
@pytest.mark.parametrize("value", [1.5, 1e30, float("nan"), True, -1])
def test_batches_are_counted_in_whole_numbers(option: str, value: float) -> None:
    with pytest.raises(UserError, match=f"{option}(=.*: allowed is| must be) a whole number"):
        ImageDataModule(Digits(), **{"batch_size": 8, option: value})  # type: ignore[arg-type]
