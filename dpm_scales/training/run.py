"""One training run: the run folder, resuming, the trainer, the export, the result."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import time
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import yaml
from hydra.utils import instantiate
from lightning.pytorch.callbacks import Callback, LearningRateMonitor, RichProgressBar
from omegaconf import DictConfig, OmegaConf

from dpm_scales.data import ImageDataModule
from dpm_scales.errors import UserError, require
from dpm_scales.images import write_text
from dpm_scales.training.callbacks import (
    AtomicCheckpointIO,
    FinalCheckpoint,
    MetricsFile,
    SampleGrid,
    WeightAverage,
    check_writable,
    checkpoints,
)
from dpm_scales.training.export import PARTS, Model, Recipe, build_model, plain, read_checkpoint, save_model
from dpm_scales.training.module import DiffusionModule, fit_to_data

#: overrides that say where or on what to run, not what: they do not name a run
UNNAMED = ("run_dir", "resume", "trainer.devices", "trainer.accelerator", "trainer.enable_progress_bar", "hydra")


def run_name(overrides: list[str]) -> str:
    """A folder name from a run's overrides, the same for the same overrides in any order; "default" without any."""
    named = sorted(o for o in overrides if not o.lstrip("+~").startswith(UNNAMED))
    name = re.sub(r"[^A-Za-z0-9=.,_+-]+", "-", ",".join(named)) or "default"
    if len(name) > 100:
        name = f"{name[:80]}-{hashlib.sha256(','.join(named).encode()).hexdigest()[:12]}"
    return name


def _recipe(cfg: DictConfig, data: ImageDataModule) -> Recipe:
    parts = {name: plain(cfg[name]) for name in PARTS}
    for key in ("in_channels", "out_channels", "num_classes"):
        parts["network"].pop(key, None)
    classes = data.num_classes if cfg.conditional else None
    if cfg.conditional and classes is None:
        raise UserError("conditional=true needs labels, and this data set has none; choose another or set data.labels")
    names = tuple(getattr(data.source, "class_names", None) or ()) if classes else ()
    return Recipe(parts, data.channels, data.image_size, classes, names or None)


def _trainer(cfg: DictConfig, run_dir: Path, callbacks: list[Callback], loggers: list[Any]) -> pl.Trainer:
    settings = OmegaConf.to_container(cfg.trainer, resolve=True)
    assert isinstance(settings, dict)
    cuda = torch.cuda.is_available() and settings["accelerator"] in ("auto", "gpu", "cuda")
    settings["precision"] = settings["precision"] or ("bf16-mixed" if cuda else "32-true")
    if str(settings["precision"]).startswith("16"):
        raise UserError(f"trainer.precision={settings['precision']} overflows; use bf16-mixed or 32-true")
    return instantiate(
        settings,
        callbacks=callbacks,
        logger=loggers,
        plugins=[AtomicCheckpointIO()],
        default_root_dir=str(run_dir),
        num_sanity_val_steps=0,
        check_val_every_n_epoch=None,
        enable_model_summary=False,
        _convert_="all",
    )


def _quiet() -> None:
    """Lightning's advertisements and what is true of every short run; our own first line says the rest."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    for message in (
        ".*LeafSpec.*",
        ".*number of training batches.*",
        ".*many workers.*",
        ".*exists and is not empty.*",
    ):
        warnings.filterwarnings("ignore", message)


def train(cfg: DictConfig, run_dir: Path, overrides: list[str]) -> dict[str, Any]:
    """Train to the end, from the last checkpoint if there is one; returns and saves the result.

    Everything that the user can get wrong is looked at before the run folder is made.
    """
    _quiet()
    data: ImageDataModule = instantiate(cfg.data)
    data.prepare_data()
    recipe = _recipe(cfg, data)
    model = build_model(recipe)
    model_seed = int(cfg.seed)
    require(model_seed >= 0, f"seed must be >= 0, got {model_seed}")
    pl.seed_everything(model_seed, workers=True, verbose=False)
    model = build_model(recipe)
    module = DiffusionModule(
        model,
        conditional=bool(cfg.conditional),
        seed=model_seed,
        compile_network=bool(cfg.compile),
        **plain(cfg.optimizer),
    )
    if cfg.channels_last:
        module.to(memory_format=torch.channels_last)
    average = WeightAverage(cfg.ema.decay)
    grid = SampleGrid(run_dir / "samples", cfg.samples.num_images, model_seed)
    folder = run_dir / "checkpoints"
    savers = checkpoints(folder, cfg.checkpoint.every_n_steps)
    fit_to_data(model, data)

    last = folder / "last.ckpt"
    done = run_dir / "result.json"
    if done.is_file():
        result = json.loads(done.read_text())
        if result["steps"] >= cfg.trainer.max_steps:
            print(f"{run_dir} is finished ({result['steps']} steps); raise trainer.max_steps or choose another run_dir")
            return result
    check_writable(run_dir)
    metrics = MetricsFile(run_dir / "metrics.csv")
    resume = last if last.is_file() else None
    if resume is not None:
        metrics.forget_after(int(read_checkpoint(resume)["global_step"]))
    config = OmegaConf.to_container(cfg, resolve=True)
    write_text(run_dir / "config.yaml", yaml.safe_dump(config, sort_keys=False))
    write_text(run_dir / "overrides.yaml", yaml.safe_dump(overrides))

    loggers: list[Any] = [metrics]
    if cfg.logger.get("_target_"):
        loggers.append(_logger(cfg, run_dir))
    callbacks: list[Callback] = [FinalCheckpoint(last), grid, average, LearningRateMonitor("step"), *savers]
    if cfg.trainer.enable_progress_bar:
        callbacks.append(RichProgressBar(leave=False))
    trainer = _trainer(cfg, run_dir, callbacks, loggers)
    if trainer.is_global_zero:
        count = sum(p.numel() for p in model.denoiser.network.parameters())
        print(
            f"{run_dir}: {type(model.denoiser.process).__name__}, {count / 1e6:.2f} M parameters, "
            f"{len(data.train_set)} images of {recipe.image_size[0]}x{recipe.image_size[1]}x{recipe.channels}, "
            f"batch {data.batch_size} x {trainer.world_size}, steps {cfg.trainer.max_steps}, "
            f"{trainer.strategy.root_device}, {trainer.precision}" + (f", resuming {resume}" if resume else "")
        )
    start = time.perf_counter()
    trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=True)
    seconds = time.perf_counter() - start
    if trainer.interrupted:
        raise UserError(f"interrupted at step {trainer.global_step}; go on with: python train.py run_dir={run_dir}")
    return _finish(trainer, module, run_dir, overrides, seconds)


def _finish(
    trainer: pl.Trainer, module: DiffusionModule, run_dir: Path, overrides: list[str], seconds: float
) -> dict[str, Any]:
    values = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
    result = {"overrides": overrides, "steps": trainer.global_step, "seconds": round(seconds, 1), **values}
    if trainer.is_global_zero:
        # after fit, the module holds the averaged weights
        save_model(run_dir / "model", module.parts, module.model.state_dict())
        write_text(run_dir / "result.json", json.dumps(result, indent=1))
    for logger in trainer.loggers:
        if hasattr(logger, "experiment") and hasattr(logger.experiment, "finish"):
            logger.experiment.finish()  # or the next run of a sweep would go on in this one
    return result


def _logger(cfg: DictConfig, run_dir: Path) -> Any:
    settings = plain(cfg.logger)
    if settings["_target_"].endswith("WandbLogger"):
        # the id is kept, so that a resumed run goes on in the same one
        kept = run_dir / "wandb_id"
        settings["id"] = kept.read_text() if kept.is_file() else hashlib.sha256(str(run_dir).encode()).hexdigest()[:8]
        write_text(kept, settings["id"])
        settings["resume"] = "allow"
    return instantiate(settings)


__all__ = ["Model", "run_name", "train"]
