"""Build Lightning's trainer for a run: environment, strategy, precision, log interval, further ranks."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch.callbacks import Callback
from omegaconf import DictConfig

from dpm_scales.cli.arguments import config_flags, tidy
from dpm_scales.cli.program import child_environment
from dpm_scales.distributed.fsdp import FSDP, ShardedStrategy
from dpm_scales.distributed.ranks import meet
from dpm_scales.models.instantiate import build
from dpm_scales.training.checkpoints import AtomicCheckpointIO
from dpm_scales.training.run_folder import Rescue
from dpm_scales.training.settings import precision_of


def follow_environment(cfg: DictConfig) -> ClusterEnvironment:
    """Return how ranks are started; if torchrun or srun did, set the trainer's devices and machines to theirs.

    One command line then serves one rank and many, and Lightning does not guess: inside a batch script it would wait
    for ranks that nobody starts.
    """
    world = meet()
    if world.world_size == 1:
        return LightningEnvironment()
    cfg.trainer.devices, cfg.trainer.num_nodes = world.local_world_size, world.num_nodes
    if cfg.trainer.strategy == "auto":
        cfg.trainer.strategy = "ddp"
    return TorchElasticEnvironment()


#: variables that `child_environment` sets
PATHS = ("PYTHONPATH", "PYTHONSAFEPATH")
#: least number of rows in metrics.csv, however short the run
LOGGED_AT_LEAST = 20


def log_interval(trainer: DictConfig) -> int:
    """Return the number of steps from one row of metrics.csv to the next."""
    steps, most = int(trainer.max_steps), int(trainer.log_every_n_steps)
    return most if steps < 0 else max(1, min(most, steps // LOGGED_AT_LEAST))


def make_trainer(cfg: DictConfig, run_dir: Path, callbacks: list[Callback], rescue: Rescue) -> pl.Trainer:
    """Build the trainer of a run; its loggers are added once the run folder exists."""
    environment = follow_environment(cfg)
    strategy = cfg.trainer.strategy
    return build(
        cfg.trainer,
        pl.Trainer,
        "trainer",
        kwargs={
            "strategy": ShardedStrategy() if strategy == FSDP else strategy,
            "precision": precision_of(cfg),
            "log_every_n_steps": log_interval(cfg.trainer),
            "callbacks": callbacks,
            "logger": False,
            "plugins": [AtomicCheckpointIO(rescue), environment],
            "default_root_dir": str(run_dir),
            "num_sanity_val_steps": 0,
            "check_val_every_n_epoch": None,
            "enable_model_summary": False,
            "enable_checkpointing": False,  # `Checkpoints` does it
        },
    )


def silence_lightning() -> None:
    """Silence Lightning's advertisements, and warnings that every short run would cause."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for message in (
        ".*LeafSpec.*",
        ".*number of training batches.*",
        ".*many workers.*",
        ".*exists and is not empty.*",
        ".*across ranks is zero.*",  # without validation images
        ".*returned a view tensor.*",  # FSDP's; nothing is done in place with what a network returns
    ):
        warnings.filterwarnings("ignore", message)


@contextmanager
def repeat_command(overrides: list[str], run_dir: Path) -> Iterator[None]:
    """Make the ranks that Lightning starts for further devices train this run, also within a sweep.

    Lightning repeats this process's command line, which is therefore set to this run's. Afterwards the ranks' process
    group and environment variables are removed, so that the next run of a sweep does not join them.
    """
    argv, environment = sys.argv, dict(os.environ)
    options = tidy([*config_flags(), *(o for o in overrides if not o.startswith("run_dir=")), f"run_dir={run_dir}"])
    program = sys.modules["__main__"]  # may be joblib's, or submitit's
    spec = getattr(program, "__spec__", None)
    sys.argv, program.__spec__ = [argv[0], "train", *options], find_spec("dpm_scales.__main__")
    os.environ.update(child_environment())
    try:
        yield
    finally:
        sys.argv, program.__spec__ = argv, spec
        if "LOCAL_RANK" not in environment and "LOCAL_RANK" in os.environ and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        os.environ.update({name: environment[name] for name in PATHS if name in environment})
        for name in (*PATHS, "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            if name in os.environ and name not in environment:
                del os.environ[name]
