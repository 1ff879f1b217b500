"""`hydra/launcher=shared_gpu`: several runs of a sweep at a time on each GPU of this machine, or on its CPU."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import sys
import traceback
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus, configure_log, run_job, setup_globals
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict

from dpm_scales.cli.arguments import typed_plugins
from dpm_scales.cli.output import complain, lasting_output, one_line_warnings
from dpm_scales.cli.plugins import activate
from dpm_scales.distributed.ranks import current_world, visible_gpus
from dpm_scales.errors import UserError, require, require_number
from dpm_scales.sweeps.side_by_side import End, Place, run_side_by_side

VISIBLE, THREADS = "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS"


def places(
    runs_per_gpu: int, gpus: Sequence[int | str] | None, environment: Mapping[str, str], found: int
) -> list[Place]:
    """Return the environment variables of each place for a run at a time; neighbours have different GPUs.

    Args:
        runs_per_gpu: at least 1.
        gpus: their numbers or names, as in CUDA_VISIBLE_DEVICES; None for all that are visible.
        environment: variables of this process.
        found: number of GPUs that are visible to it; with none, runs share the CPU.

    Raises: UserError for GPUs that are not visible, and for another number of runs.
    """
    require_number("hydra.launcher.runs_per_gpu", runs_per_gpu, 1, whole=True)
    given = [name.strip() for name in environment[VISIBLE].split(",")] if environment.get(VISIBLE) else None
    visible = [str(number) for number in range(found)] if given is None else given[:found]
    chosen = visible if gpus is None else [str(gpu) for gpu in gpus]
    known = f"visible are {', '.join(visible)}" if visible else "none is visible"
    for gpu in chosen:
        require(gpu in visible, f"hydra.launcher.gpus: there is no GPU {gpu}; {known}")
    require(gpus is None or len(chosen) > 0, "hydra.launcher.gpus is empty; name some, or null for all")
    require(len(set(chosen)) == len(chosen), "hydra.launcher.gpus names one twice; runs_per_gpu says how many share it")
    cards: list[dict[str, str]] = [{VISIBLE: gpu} for gpu in chosen] or [{}]
    together = [*cards] * runs_per_gpu
    threads = max(1, (os.cpu_count() or 1) // len(together))
    own = {} if THREADS in environment else {THREADS: str(threads)}
    return [{**card, **own} for card in together]


def launch(
    hydra_context: HydraContext,
    task_function: TaskFunction,
    config: DictConfig,
    runs_per_gpu: int,
    gpus: Sequence[int | str] | None,
    jobs: Sequence[Sequence[str]],
    first: int,
) -> list[JobReturn]:
    """Run the jobs of a sweep, each in its own process; return their results in order.

    A job that fails prints its line and does not affect the others.

    Args:
        config: config of the sweep.
        runs_per_gpu, gpus: see `places`.
        jobs: overrides of each job.
        first: number of the first job.

    Raises:
        UserError: options out of range, or a command that was started in several processes.
        KeyboardInterrupt: after Ctrl-C; all runs have written a checkpoint.
    """
    require(
        current_world().world_size == 1,
        "hydra/launcher=shared_gpu starts all runs from one process: start it without torchrun or srun",
    )
    found = visible_gpus()
    together = places(runs_per_gpu, gpus, os.environ, found)
    devices = config.trainer.devices
    require(
        found == 0 or not isinstance(devices, int) or devices <= 1,
        f"hydra/launcher=shared_gpu gives a run one GPU, and trainer.devices={devices} needs more; leave one out",
    )
    setup_globals()
    configure_log(config.hydra.hydra_logging, config.hydra.verbose)
    Path(str(config.hydra.sweep.dir)).mkdir(parents=True, exist_ok=True)
    # the name now refers to the function that `hydra.main` returned
    name = (task_function.__module__, task_function.__qualname__)
    payloads = [pickle.dumps((first + i, list(job), hydra_context, name, config)) for i, job in enumerate(jobs)]
    ends = run_side_by_side(payloads, together, run_pickled, multiprocessing.get_context("spawn"))
    return [_returned(list(job), end) for job, end in zip(jobs, ends, strict=True)]


def _returned(job: list[str], end: End) -> JobReturn:
    """Return what Hydra's sweepers read: value or error. Print the line of a job whose process has died."""
    if end.result is not None:
        status, value = pickle.loads(end.result)
    else:
        line = f"its process ended with status {end.status}; the same command resumes it"
        complain(f"failed: {' '.join(job)}: {line}")
        status, value = JobStatus.FAILED, UserError(line)
    done = JobReturn(overrides=job, status=status)
    done.return_value = value
    return done


def run_pickled(payload: bytes) -> bytes:
    """Run a job of `launch` in this process; return its status, and its value or error, pickled."""
    number, overrides, hydra_context, (module, name), config = pickle.loads(payload)
    setup_globals()
    Plugins.instance()  # registers the configs of Hydra's plugins, and `activate` those of plugins of this package
    activate(typed_plugins(sys.argv[1:]))
    one_line_warnings()
    with lasting_output():
        own = hydra_context.config_loader.load_sweep_config(config, overrides)
        with open_dict(own):
            own.hydra.job.id = f"{own.hydra.job.name}_{number}"
            own.hydra.job.num = number
        HydraConfig.instance().set_config(own)
        done = run_job(
            hydra_context=hydra_context,
            task_function=getattr(import_module(module), name).__wrapped__,
            config=own,
            job_dir_key="hydra.sweep.dir",
            job_subdir_key="hydra.sweep.subdir",
        )
        value: Any = done._return_value
        if done.status == JobStatus.FAILED and not isinstance(value, UserError):
            traceback.print_exception(value)  # here, since pickling loses it
            value = RuntimeError(f"{type(value).__name__}: {value}")
        return pickle.dumps((done.status, value))
