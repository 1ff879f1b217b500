"""Build the loggers beside metrics.csv: TensorBoard, Weights & Biases or the user's own, with the run's options."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, TensorBoardLogger
from omegaconf import DictConfig

from dpm_scales.models.instantiate import build, plain
from dpm_scales.storage import read_text, write_text


def further_loggers(cfg: DictConfig, run_dir: Path, main: bool) -> list[Logger]:
    """Build the loggers of the config, none or one, and give them the resolved config.

    Args:
        cfg: the run's config.
        run_dir: the run's folder, which keeps the id of a run of Weights & Biases.
        main: whether this process is the first; the others log nothing.
    """
    if cfg.logger.get("_target_") is None:
        return []
    settings = plain(cfg.logger)
    if settings["_target_"].endswith("WandbLogger") and main:
        # the id is kept, so that a resumed run continues the same one
        kept = run_dir / "wandb_id"
        if not kept.is_file():
            write_text(kept, secrets.token_hex(4))
        settings |= {"id": read_text(kept), "resume": "allow"}
        if settings.get("offline"):  # some thirty lines, none of which is of use before `wandb sync`
            os.environ.setdefault("WANDB_SILENT", "true")
    logger: Logger = build(settings, Logger, "logger")
    if main:
        logger.log_hyperparams(plain(cfg))
        if isinstance(logger, TensorBoardLogger):
            _show_hyperparameters(logger, plain(cfg), str(cfg.objective))
    return [logger]


def _show_hyperparameters(logger: TensorBoardLogger, config: dict[str, Any], objective: str) -> None:
    """Fill TensorBoard's HPARAMS page, with the run's objective as its metric.

    Lightning would also log a value of the metric, before any has been measured.
    """
    from torch.utils.tensorboard.summary import hparams

    writer = logger.experiment._get_file_writer()
    for summary in hparams(dict(_flat(config)), {objective: 0}):
        writer.add_summary(summary)


def _flat(config: dict[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values in nested mappings by dotted key, in types that TensorBoard accepts."""
    for name, value in config.items():
        key = f"{above}{name}"
        if isinstance(value, dict):
            yield from _flat(value, f"{key}.")
        else:
            # TensorBoard would turn a bool into a number, and accepts no None
            yield key, value if type(value) in (int, float, str) else json.dumps(value)
