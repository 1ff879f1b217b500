"""Lightning's trainer as a run needs it: environment, strategy, precision, log interval, several processes."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch.callbacks import Callback
from omegaconf import DictConfig

from dpm_scales.cli.arguments import TRAIN, config_flags, tidy
from dpm_scales.distributed.fsdp import FSDP, ShardedStrategy
from dpm_scales.distributed.ranks import meet
from dpm_scales.models.instantiate import build
from dpm_scales.training.checkpoints import (
    AtomicCheckpointIO,
)
from dpm_scales.training.run_folder import Rescue
from dpm_scales.training.settings import (
    precision_of,
)


def follow_environment(cfg: DictConfig) -> ClusterEnvironment:
    """How processes are started; where torchrun or srun did, the trainer takes the devices and machines that they gave.

    So one command line serves one process and many, and Lightning guesses nothing: inside a batch script it would wait
    for processes that nobody starts.
    """
    shard = meet()
    if shard.world_size == 1:
        return LightningEnvironment()
    cfg.trainer.devices, cfg.trainer.num_nodes = shard.local_world_size, shard.num_nodes
    if cfg.trainer.strategy == "auto":
        cfg.trainer.strategy = "ddp"
    return TorchElasticEnvironment()


#: times that a run logs at least, however short
LOGGED_AT_LEAST = 20


def log_interval(trainer: DictConfig) -> int:
    """Steps from one row of metrics.csv to the next."""
    steps, most = int(trainer.max_steps), int(trainer.log_every_n_steps)
    return most if steps < 0 else max(1, min(most, steps // LOGGED_AT_LEAST))


def make_trainer(cfg: DictConfig, run_dir: Path, callbacks: list[Callback], rescue: Rescue) -> pl.Trainer:
    environment = follow_environment(cfg)
    strategy = cfg.trainer.strategy
    return build(
        cfg.trainer,
        pl.Trainer,
        "trainer",
        given={
            "strategy": ShardedStrategy() if strategy == FSDP else strategy,
            "precision": precision_of(cfg),
            "log_every_n_steps": log_interval(cfg.trainer),
            "callbacks": callbacks,
            "logger": False,  # they come when the run folder is there
            "plugins": [AtomicCheckpointIO(rescue), environment],
            "default_root_dir": str(run_dir),
            "num_sanity_val_steps": 0,
            "check_val_every_n_epoch": None,
            "enable_model_summary": False,
            "enable_checkpointing": False,  # the callbacks of ours do it
        },
    )


def silence_lightning() -> None:
    """Lightning's advertisements and what is true of every short run; our own first line says the rest."""
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
    """Let the processes that Lightning starts for further devices train this run, also where a sweep started it.

    They repeat this process's command line, so theirs is this run's; and afterwards nothing is left of their group that
    the next run would take for its own.
    """
    argv, environment = sys.argv, dict(os.environ)
    options = tidy([*config_flags(), *(o for o in overrides if not o.startswith("run_dir=")), f"run_dir={run_dir}"])
    program = sys.modules["__main__"]
    spec = getattr(program, "__spec__", None)
    sys.argv, program.__spec__ = [str(TRAIN), *options], None  # the program may be joblib's, or submitit's
    try:
        yield
    finally:
        sys.argv, program.__spec__ = argv, spec
        if "LOCAL_RANK" not in environment and "LOCAL_RANK" in os.environ and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        for name in ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            if name in os.environ and name not in environment:
                del os.environ[name]
