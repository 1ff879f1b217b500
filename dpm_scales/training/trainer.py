"""Build Lightning's trainer for a run: environment, strategy, precision, log interval, number of ranks."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import lightning.pytorch as pl
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch.callbacks import Callback
from omegaconf import DictConfig

from dpm_scales.distributed.fsdp import FSDP, ShardedStrategy
from dpm_scales.distributed.ranks import current_world, meet
from dpm_scales.errors import require
from dpm_scales.models.instantiate import build
from dpm_scales.training.checkpoints import AtomicCheckpointIO
from dpm_scales.training.run_folder import Rescue
from dpm_scales.training.settings import precision_of


def follow_environment(cfg: DictConfig) -> ClusterEnvironment:
    """Return the cluster environment; if torchrun or srun started ranks, set the trainer's devices and nodes to theirs.

    One command line then serves one rank and many, and Lightning does not guess: inside a batch script it would wait
    for ranks that nobody starts.
    """
    world = meet()
    if world.world_size == 1:
        return LightningEnvironment()
    if str(cfg.trainer.devices).count(",") + 1 != world.local_world_size:  # else a list of GPUs
        cfg.trainer.devices = world.local_world_size
    cfg.trainer.num_nodes = world.num_nodes
    if cfg.trainer.strategy == "auto":
        cfg.trainer.strategy = "ddp"
    return TorchElasticEnvironment()


def ranks_to_start(cfg: DictConfig, run_dir: Path) -> int:
    """Return the number of ranks of a run that this process has to start, itself included; 1 if it is one of several.

    Raises: UserError if ranks on other machines would be needed.
    """
    options = cfg.trainer
    if current_world().world_size > 1 or (options.devices == 1 and options.num_nodes == 1):
        return 1
    trainer = make_trainer(cfg, run_dir, [], Rescue(run_dir))
    require(
        trainer.num_nodes == 1,
        f"trainer.num_nodes={trainer.num_nodes}: start the command on every machine, with torchrun or srun",
    )
    return trainer.num_devices


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
