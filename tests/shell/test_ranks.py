"""Which part of shared work is whose, and that a part does not depend on who has it."""

from __future__ import annotations

import multiprocessing
import os
import time
from pathlib import Path

import pytest
import torch

from dpm_scales.denoisers import spread_evenly
from dpm_scales.distributed.ranks import World, barrier, current_world, first_host, leave
from dpm_scales.errors import UserError
from dpm_scales.rng import CounterRNG, white_noise
from support.cluster_shell import job_step
from support.shell import assert_equal, small_model

# --- who is who -------------------------------------------------------------------------------------------------------

TORCHRUN = {"WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "GROUP_RANK": "1"}
SRUN = {"SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NUM_NODES": "2", "SLURM_NODEID": "1", "SLURM_LOCALID": "3"}


@pytest.mark.parametrize(
    ("environment", "world"),
    [
        ({}, World()),
        ({**TORCHRUN, "RANK": "5"}, World(5, 8, 1, 4, 1)),
        ({**SRUN, "SLURM_PROCID": "7"}, World(7, 8, 3, 4, 1)),
        ({"SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_JOB_ID": "9"}, World()),  # a batch script without srun
        ({"SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "8"}, World()),  # a shell in a job
        ({"SUBMITIT_LOCAL_NTASKS": "2", "SUBMITIT_LOCAL_GLOBALID": "1"}, World(1, 2, 1, 2)),
        ({"WORLD_SIZE": "2", "LOCAL_RANK": "1"}, World()),  # a process that Lightning started
    ],
)
def test_processes_are_told_by_whoever_started_them(environment: dict[str, str], world: World) -> None:
    assert current_world(environment) == world


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "2", "WORLD_SIZE": "2"}, "process 2 of 2"),
        ({"RANK": "one", "WORLD_SIZE": "2"}, "RANK='one'"),
        ({"RANK": "0", "WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "2"}, "2 on each machine"),
        ({**SRUN, "SLURM_STEP_NUM_TASKS": "7"}, "7 processes on 2 machines"),
    ],
)
def test_contradictions_of_the_environment_are_told(environment: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        current_world(environment)


@pytest.mark.parametrize("count", [0, 1, 5, 8, 9, 1000])
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_parts_are_the_whole(count: int, world_size: int) -> None:
    parts = [World(rank, world_size).part(count) for rank in range(world_size)]
    assert [number for part in parts for number in part] == list(range(count))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1 and len(parts[0]) >= min(count, 1)


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        ("", "127.0.0.1"),
        ("login1", "login1"),
        ("a,b", "a"),
        ("node[003-006,9],login1", "node003"),
        ("node[7]", "node7"),
        ("node[7,9-12]-ib", "node7-ib"),
        ("gpu-a[01-02].example.org", "gpu-a01.example.org"),
    ],
)
def test_first_machine_of_a_list(hosts: str, first: str) -> None:
    assert first_host(hosts) == first


def come_and_go(step: dict[str, str], done: Path) -> None:
    """The second process comes later."""
    os.environ.update(step)
    if current_world().rank == 1:
        time.sleep(0.5)
        done.touch()
    barrier()
    assert done.exists()
    leave()


@pytest.mark.slow
def test_nobody_leaves_before_all_are_there(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=come_and_go, args=(step, tmp_path / "done")) for step in job_step(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        process.kill()
    assert [process.exitcode for process in processes] == [0, 0]


# --- random numbers of a shared batch ---------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 5, 7), (1,), ()])
@pytest.mark.parametrize("world_size", [2, 3])
def test_noise_of_an_image_does_not_depend_on_who_draws_it(world_size: int, shape: tuple[int, ...]) -> None:
    whole, first = CounterRNG(4, 6 * world_size, 100), 100
    shares = [CounterRNG(4, 6, first + rank, stride=world_size) for rank in range(world_size)]
    for draw in ("normal_float32", "uniform", "normal_float32"):
        together = torch.stack([getattr(share, draw)(shape) for share in shares], 1).flatten(0, 1)
        assert_equal(getattr(whole, draw)(shape), together)


def test_quick_normal_is_standard_normal() -> None:
    """Kolmogorov and Smirnov's bound at 1e-4; neighbours, draws and the pairs of Box-Muller are independent."""
    source = CounterRNG(9, 1000)
    x, y = source.normal_float32((1001,)).double(), source.normal_float32((1001,)).double()
    assert x.shape == (1000, 1001) and torch.isfinite(x).all()
    for draw in (x, y):
        ordered = draw.flatten().sort().values
        law = torch.special.ndtr(ordered)
        steps = torch.arange(1, len(ordered) + 1, dtype=torch.float64) / len(ordered)
        assert float((law - steps).abs().max()) < 2.23 / len(ordered) ** 0.5
        assert float(draw.abs().max()) > 4.5
    pairs = [
        (x, y),
        (x[:, 1:], x[:, :-1]),
        (x[1:], x[:-1]),
        (x[:, :500], x[:, 501:]),
        (x[:, :500] ** 2, x[:, 501:] ** 2),
    ]
    for a, b in pairs:
        assert abs(float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])) < 5e-3
    assert white_noise(torch.empty(1000, 2, dtype=torch.float64), source).dtype == torch.float64


@pytest.mark.parametrize("world_size", [2, 3])
def test_loss_of_an_image_does_not_depend_on_whose_batch_it_is_in(world_size: int) -> None:
    """Also where the process draws something for each image."""
    model = small_model("process=osmosis_diffusion")
    x_0 = torch.rand(4 * world_size, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    t = torch.linspace(0.1, 1, len(x_0), dtype=torch.float64)
    with torch.no_grad():
        whole = model.denoiser.loss(x_0, t, generator=CounterRNG(3, len(x_0), 50))
        for rank in range(world_size):
            noise = CounterRNG(3, 4, 50 + rank, stride=world_size)
            part = model.denoiser.loss(x_0[rank::world_size], t[rank::world_size], generator=noise)
            torch.testing.assert_close(part, whole[rank::world_size], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("world_size", "count"), [(2, 8), (3, 9), (4, 7)])
def test_scales_of_a_shared_batch_are_those_of_one(world_size: int, count: int) -> None:
    whole = spread_evenly(torch.arange(count), count, 0.3)
    parts = [spread_evenly(torch.arange(rank, count, world_size), count, 0.3) for rank in range(world_size)]
    for rank, part in enumerate(parts):
        assert torch.equal(part, whole[rank::world_size])


def test_stride_must_lead_on() -> None:
    with pytest.raises(UserError, match="stride=0"):
        CounterRNG(0, 2, stride=0)
