"""Ranks: the number of this process and of all processes, as set by torchrun, srun or submitit, and its share of work.

    world = current_world()
    for number in world.part(num_samples): ...        # this rank's samples
    barrier()                                         # wait for all ranks
    if world.is_main: ...                             # what one rank does for all

A process started alone is rank 0 of 1; nothing needs to be set.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch

from dpm_scales.errors import UserError

PORTS = 20000  # jobs use port PORTS + (number % PORTS)
PATIENCE = timedelta(days=1)  # longest wait for the slowest process; a dead one is noticed at once


@dataclass(frozen=True)
class World:
    """This process among the `world_size` processes that share the work.

    Args:
        rank: index of this process, from 0.
        world_size: number of processes.
        local_rank: index of this process on its machine, which is also that of its device.
        local_world_size: number of processes on its machine.
        node: index of its machine.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    node: int = 0

    @property
    def is_main(self) -> bool:
        """Return whether this rank writes the files that all ranks share."""
        return self.rank == 0

    @property
    def num_nodes(self) -> int:
        """Return the number of machines."""
        return self.world_size // self.local_world_size

    def part(self, count: int) -> range:
        """Return this rank's part of 0..count - 1: contiguous, of almost equal length on all ranks, possibly empty."""
        first, last = (-(-number * count // self.world_size) for number in (self.rank, self.rank + 1))
        return range(first, last)


def visible_gpus() -> int:
    """Return the number of CUDA devices that this process sees, without claiming any of them."""
    return torch.cuda.device_count()


def current_world(environment: Mapping[str, str] | None = None) -> World:
    """Return the world described by the environment variables of torchrun, srun, or submitit's local executor.

    A command in a batch script without srun runs alone.

    Raises: UserError if the variables contradict each other, or machines have different numbers of processes.
    """
    values = os.environ if environment is None else environment

    def number(name: str, otherwise: int) -> int:
        try:
            return int(values.get(name, otherwise))
        except ValueError as error:
            raise UserError(f"the environment variable {name}={values[name]!r} is not a number") from error

    if "RANK" in values and "WORLD_SIZE" in values:
        size = number("WORLD_SIZE", 1)
        local = number("LOCAL_WORLD_SIZE", size)
        world = World(number("RANK", 0), size, number("LOCAL_RANK", 0), local, number("GROUP_RANK", 0))
    elif number("SLURM_STEP_NUM_TASKS", 1) > 1:
        size, nodes = number("SLURM_STEP_NUM_TASKS", 1), number("SLURM_STEP_NUM_NODES", 1)
        if size % nodes:
            raise UserError(f"{size} processes on {nodes} machines: give every machine the same --ntasks-per-node")
        local = number("SLURM_LOCALID", 0)
        world = World(number("SLURM_PROCID", 0), size, local, size // nodes, number("SLURM_NODEID", 0))
    elif number("SUBMITIT_LOCAL_NTASKS", 1) > 1:
        size, rank = number("SUBMITIT_LOCAL_NTASKS", 1), number("SUBMITIT_LOCAL_GLOBALID", 0)
        world = World(rank, size, rank, size)
    else:
        return World()
    if not 0 <= world.rank < world.world_size or world.world_size % world.local_world_size:
        raise UserError(
            f"the environment describes process {world.rank} of {world.world_size}, {world.local_world_size} on each "
            "machine; unset RANK and WORLD_SIZE, or start it with torchrun or srun"
        )
    return world


def meet() -> World:
    """Return the world, after setting the variables through which ranks of srun or submitit find each other."""
    world = current_world()
    if world.world_size > 1 and "RANK" not in os.environ:
        hosts = os.environ.get("SLURM_STEP_NODELIST", "") if "SLURM_STEP_NUM_TASKS" in os.environ else ""
        job = os.environ.get("SLURM_JOB_ID") or os.environ.get("SUBMITIT_LOCAL_JOB_ID") or "0"
        step = os.environ.get("SLURM_STEP_ID", "0")
        number = int(re.sub(r"\D", "", job) or 0) + 97 * int(re.sub(r"\D", "", step) or 0)
        os.environ.setdefault("MASTER_ADDR", first_host(hosts))
        os.environ.setdefault("MASTER_PORT", str(PORTS + number % PORTS))
        os.environ |= {
            "RANK": str(world.rank),
            "WORLD_SIZE": str(world.world_size),
            "LOCAL_RANK": str(world.local_rank),
            "LOCAL_WORLD_SIZE": str(world.local_world_size),
            "GROUP_RANK": str(world.node),
        }
    return world


def first_host(hosts: str) -> str:
    """Return the first name of a SLURM list such as ``node[003-006,9],login1``; this machine for none."""
    found = re.match(r"([^\[,\s]+)(?:\[([^\]\-,]+)[^\]]*\])?([^\[,\s]*)", hosts)
    return "127.0.0.1" if found is None else "".join(part or "" for part in found.groups())


def own_device(device: torch.device, world: World) -> torch.device:
    """Return this rank's GPU if `device` is "cuda" without an index and there are several ranks, else `device`."""
    if device.type != "cuda" or device.index is not None or world.world_size == 1:
        return device
    return torch.device("cuda", world.local_rank % torch.cuda.device_count())


def connect() -> None:
    """Create the process group of all ranks, once; collective operations need it. Does nothing with a single rank."""
    if meet().world_size > 1 and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", timeout=PATIENCE)


def barrier() -> None:
    """Connect all ranks and wait for them; does nothing with a single rank."""
    connect()
    if meet().world_size > 1:
        torch.distributed.barrier()


def first_decides(decide: Callable[[], None]) -> None:
    """Call `decide` on the first rank, while the others wait.

    Raises: its UserError there, and SystemExit with the same status on the others, so that one line is printed.
    """
    world = meet()
    if world.world_size == 1:
        decide()
        return
    connect()
    status: list[int | None] = [None]
    try:
        if world.is_main:
            decide()
    except UserError as error:
        status = [error.status]
        raise
    finally:
        torch.distributed.broadcast_object_list(status)
    if status[0] is not None:
        raise SystemExit(status[0])


def leave() -> None:
    """Wait for the others, and destroy the process group: the last call of an entry point."""
    barrier()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
