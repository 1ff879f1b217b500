"""Train one run: build it from its config, resume it, export the model, return the result."""

from __future__ import annotations

import json
import math
import sys
import time
import warnings
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, LearningRateMonitor
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from dpm_scales.cli.arguments import typed_packages
from dpm_scales.cli.output import one_line_warnings, reported
from dpm_scales.cli.stored import key_of
from dpm_scales.data import ImageDataModule, ShuffledBatches, listed
from dpm_scales.distributed.launch import LocalRanks, LostProcessError
from dpm_scales.distributed.signals import StopTogether, requeue
from dpm_scales.errors import UserError, require, require_number
from dpm_scales.models.export import save_weights
from dpm_scales.models.instantiate import build, check_kind, plain
from dpm_scales.models.io import checkpoints, save_model
from dpm_scales.models.model import PARTS, Model, Recipe, build_model
from dpm_scales.models.seals import checkpoint_step
from dpm_scales.models.trust import current_names, foreign_packages, trusted_names
from dpm_scales.plots import curves
from dpm_scales.processes import title_of
from dpm_scales.run_folders.files import finished_result
from dpm_scales.storage import FolderGoneError, write_text
from dpm_scales.training.callbacks import check_order
from dpm_scales.training.checkpoints import (
    CheckpointFolder,
    Checkpoints,
    find_checkpoint,
    restore_last,
)
from dpm_scales.training.compiling import compiled, compiles
from dpm_scales.training.ema import EMA
from dpm_scales.training.failures import UnreadableImages, told_in_one_line
from dpm_scales.training.fit import fit_to_data
from dpm_scales.training.health import Health, StopDiverged
from dpm_scales.training.loggers import further_loggers
from dpm_scales.training.module import DiffusionModule
from dpm_scales.training.monitoring import periodic_evaluation
from dpm_scales.training.peers import told_if_one_is_lost
from dpm_scales.training.pictures import Curves, SampleGrid
from dpm_scales.training.power_averages import PowerAverages, power_averages, require_resumable_averages
from dpm_scales.training.reporting import LastValidation, LoggedSteps, MetricsFile, StepBar
from dpm_scales.training.resumable import require_resumable, restored_in_one_line
from dpm_scales.training.resuming import KeepOptions, options_of, resume_command, trust_needed, what_changed
from dpm_scales.training.run_folder import Rescue, failure_recorded, prepare, taken, trusted_data
from dpm_scales.training.settings import (
    check_grid,
    check_keys,
    check_numbers,
    check_objective,
    check_same_model,
)
from dpm_scales.training.time_budget import TimeBudget, by_time, seconds_passed_and_left, share_passed
from dpm_scales.training.trainer import make_trainer, ranks_to_start, silence_lightning
from dpm_scales.weights import LossWeight

REPORT_DELAY = 3
"""Seconds that a rank waits before it reports an error: rank 0 may report the same one first, and end this rank."""


def _recipe(cfg: DictConfig, data: ImageDataModule) -> Recipe:
    parts = {name: plain(cfg[name]) for name in PARTS}
    for key in ("in_channels", "out_channels", "num_classes"):
        parts["network"].pop(key, None)
    classes = data.num_classes if cfg.conditional else None
    if cfg.conditional and classes is None:
        more = " or set data.labels" if "labels" in cfg.data else ""
        raise UserError(f"conditional=true needs labels, and this data set has none; choose another{more}")
    names = tuple(getattr(data.source, "class_names", None) or ()) if classes else ()
    require_number("label_dropout", cfg.label_dropout, 0, 1)
    require(cfg.label_dropout < 1, "label_dropout=1 leaves no label to learn from; choose less")
    dropout = float(cfg.label_dropout) if classes else 0.0
    return Recipe(parts, data.channels, data.image_size, classes, names or None, dropout)


@dataclass(frozen=True)
class Trained:
    """A run that has taken all its steps.

    Attributes:
        result: content of result.json: `overrides`, `steps`, `seconds`, and the last ``val/`` and ``eval/`` metrics.
        model: the model with the recipe fitted to the training data; its weights are those of the last step.
        state: EMA weights of the model; None for a run that was finished before, and on other ranks of a command.
    """

    result: dict[str, Any]
    model: Model
    state: dict[str, Tensor] | None


def train(cfg: DictConfig, run_dir: Path, overrides: list[str]) -> dict[str, Any]:
    """Train to the end, from the last checkpoint if there is one; return and save the result.

    All options are checked before the run folder is made.

    Args:
        cfg: as composed from configs/train.yaml.
        run_dir: folder of the run; made if missing.
        overrides: the command line's options, ``KEY=VALUE``, stored in the folder.

    Returns:
        The content of result.json: `overrides`, `steps`, `seconds`, and the last ``val/`` and ``eval/`` metrics.

    Raises:
        UserError: an option out of range, a folder or checkpoint that can't be used, or a diverged run.
        SystemExit: after Ctrl-C or a signal, with 128 + its number; a checkpoint is written first.
    """
    silence_lightning()
    check_keys(cfg)
    check_numbers(cfg)
    with LocalRanks(ranks_to_start(cfg, run_dir)) as ranks:
        return _build_and_fit(cfg, run_dir, overrides, ranks)


def _train_further_rank(settings: dict[str, Any], run_dir: Path, overrides: list[str]) -> None:
    """Train as a rank that rank 0 has started; print an error in one line, unless rank 0 reports the same one."""
    silence_lightning()
    one_line_warnings()
    with reported():
        try:
            _build_and_fit(OmegaConf.create(settings), run_dir, overrides, LocalRanks(1))
        except UserError as error:
            if not isinstance(error, LostProcessError):
                time.sleep(REPORT_DELAY)
            raise


def _build_and_fit(cfg: DictConfig, run_dir: Path, overrides: list[str], ranks: LocalRanks) -> dict[str, Any]:
    """Build everything that a run needs, and train; see `train`."""
    data: ImageDataModule = build(trusted_data(cfg, run_dir), ImageDataModule, "data")
    data.prepare_data()
    recipe = _recipe(cfg, data)
    pl.seed_everything(cfg.seed, workers=True, verbose=False)
    return train_model(cfg, run_dir, overrides, build_model(recipe), data, ranks=ranks).result


def train_model(
    cfg: DictConfig,
    run_dir: Path,
    overrides: list[str],
    model: Model,
    data: ImageDataModule,
    again: str | None = None,
    ranks: LocalRanks | None = None,
) -> Trained:
    """Train a model on images, as `train` does with those that the config describes.

    Args:
        cfg, run_dir, overrides: as for `train`.
        model: its denoiser and prior are trained and fitted in place.
        data: images, after `prepare_data`.
        again: how to resume the run, for messages; None for the command that does.
        ranks: starts the other ranks, which build the same from the config; None if there are none to start.
    """
    recipe = model.recipe
    optimizer = plain(cfg.optimizer)
    max_bad_steps = optimizer.pop("max_bad_steps", 20)
    module = DiffusionModule(
        model,
        seed=cfg.seed,
        scale_sampling=cfg.scale_sampling,
        scale_mean=cfg.scale_mean,
        scale_std=cfg.scale_std,
        pairing=cfg.training.pairing,
        candidates=cfg.training.candidates,
        loss_weight=None if cfg.weight.get("_target_") is None else build(cfg.weight, LossWeight, "weight"),
        **optimizer,
    )
    if cfg.channels_last:
        module.to(memory_format=torch.channels_last)
    kept = CheckpointFolder(run_dir / "checkpoints", cfg.checkpoint.keep_last, cfg.checkpoint.keep_best)
    health = Health(kept.folder, max_bad_steps)
    average, stop = EMA(cfg.ema.decay, cfg.ema.length), StopTogether()
    powers = power_averages(run_dir, health, cfg.ema, cfg.trainer.max_steps)
    evaluations = periodic_evaluation(average, data, cfg.seed, cfg.evaluation)
    check_objective(cfg.objective, [name for evaluation in evaluations for name in evaluation.names()])
    if cfg.logger.get("_target_") is not None:
        check_kind(cfg.logger, Logger, "logger")
    callbacks: list[Callback] = [
        LoggedSteps(),
        stop,
        StopDiverged(health),
        SampleGrid(run_dir / "samples", cfg.samples.num_images, cfg.seed, cfg.samples.num_trajectories),
        average,
        *powers,
        *evaluations,
        LastValidation(),
        Checkpoints(kept, health, cfg.checkpoint.every_n_steps),
        LearningRateMonitor("step"),
        KeepOptions(cfg),
        UnreadableImages(data, run_dir / "unreadable.txt"),
    ]
    if by_time(cfg):
        callbacks.append(TimeBudget())
    if cfg.samples.curves:
        callbacks.append(Curves(run_dir / curves.NAME))
    check_grid(cfg.samples.num_images, recipe)
    if cfg.trainer.enable_progress_bar:
        callbacks.append(StepBar())
    check_order(callbacks)
    rescue = Rescue(run_dir)
    trainer = make_trainer(cfg, run_dir, callbacks, rescue)
    # an empty sampler, for its checks
    world_size = trainer.world_size
    ShuffledBatches(len(data.train_set), data.batch_size, 0, int, data.drop_last, 0, world_size, "data.")
    module.model = fit_to_data(model, data)

    with taken(run_dir) if trainer.is_global_zero else nullcontext():
        return _resume_and_fit(
            cfg, run_dir, overrides, trainer, module, data, average, powers, stop, rescue, again, ranks or LocalRanks(1)
        )


def _resume_and_fit(
    cfg: DictConfig,
    run_dir: Path,
    overrides: list[str],
    trainer: pl.Trainer,
    module: DiffusionModule,
    data: ImageDataModule,
    average: EMA,
    powers: list[PowerAverages],
    stop: StopTogether,
    rescue: Rescue,
    again: str | None,
    ranks: LocalRanks,
) -> Trained:
    """Train from the folder's last checkpoint, if there is one; return and save the result."""
    model, main = module.parts, trainer.is_global_zero
    resume, steps, changed, passed = None, 0, "", 0.0
    warned: list[str] = []
    found = find_checkpoint(run_dir / "checkpoints")
    if found is not None:
        resume, checkpoint = found
        require_resumable(checkpoint, resume, trainer, module, data, trusted_names(plain(cfg.allow)))
        check_same_model(current_names(checkpoint["recipe"]), current_names(model.recipe.to_dict()), run_dir)
        require_resumable_averages(checkpoint, resume, powers, module)
        steps = int(checkpoint["global_step"])
        passed = share_passed(trainer, checkpoint)
        rate = module.learning_rate * module.rate(steps, cfg.trainer.max_steps, passed)
        changed, warned = what_changed(checkpoint, options_of(cfg), rate)
        del checkpoint  # as large as weights, EMA and optimiser state together
    del found
    finished = finished_result(run_dir, cfg.trainer.max_steps if passed < 1 else steps)
    if finished is not None:
        if main:
            more = f"raise trainer.{'max_steps' if passed < 1 else 'max_time'} or choose another run_dir"
            print(f"{run_dir} is finished ({finished['steps']} steps); {more}")
        return Trained(finished, model, None)

    limit = cfg.trainer.max_steps
    require(
        limit == -1 or steps <= limit,
        f"{run_dir} has taken {steps} steps, more than trainer.max_steps={limit}; max_steps={steps} ends it there",
    )
    metrics = MetricsFile(run_dir / "metrics.csv")
    if main:
        rescue.texts, rescue.metrics = prepare(cfg, run_dir, overrides), metrics.text
        if resume is not None:
            restore_last(resume)
        print(_first_line(cfg, run_dir, trainer, model, data) + (f", resuming {resume}" if resume else ""))
        needed = trust_needed(foreign_packages(model.recipe.parts, plain(cfg.data)), typed_packages(overrides))
        if needed:
            print(needed)
        if changed:
            print(changed)
        if steps >= cfg.trainer.log_every_n_steps and metrics.is_empty:
            warned.append(f"{metrics.path} is missing or empty: what was logged before step {steps} is lost")
        if len(data.val_set) == 0:
            warned.append("there are no validation images: no val/loss, no best.ckpt and no sample grids will be made")
        if cfg.ema.length is not None and any(key_of(typed) == "ema.decay" for typed in overrides):
            warned.append(f"ema.decay={cfg.ema.decay} has no effect: ema.length={cfg.ema.length} is in its place")
        for line in warned:
            warnings.warn(line, stacklevel=2)
    metrics.forget_from(steps)
    trainer.loggers = [metrics, *further_loggers(cfg, run_dir, main)]
    start = time.perf_counter()
    # other ranks must not download to a place where this one may not
    settings = {**plain(cfg), "data": trusted_data(cfg, run_dir)}
    with ranks.others(_train_further_rank, settings, run_dir, overrides):
        try:
            shape = (data.batch_size, model.recipe.image_size, data.num_workers)
            with (
                failure_recorded(run_dir, main),
                restored_in_one_line(trainer, resume),
                told_if_one_is_lost(run_dir, main),
                told_in_one_line(*shape),
                compiled(cfg, model.denoiser.network, main),
            ):
                trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=True)
        except SystemExit:
            # how Lightning ends after Ctrl-C or a signal of SIGNALS
            if not main:
                raise SystemExit(0) from None  # the first rank has the run's status
            saved = next(map(checkpoint_step, checkpoints(run_dir / "checkpoints")), 0)
            earlier = f", from step {saved}" if saved != trainer.global_step else ""
            command = resume_command(run_dir) if again is None else again
            print(f"stopped at step {trainer.global_step}; resume with: {command}{earlier}", file=sys.stderr)
            requeue(stop.received)
            raise SystemExit(128 + (stop.received or 15) if trainer.received_sigterm else 130) from None
        seconds = time.perf_counter() - start
        result = {
            "overrides": overrides,
            "steps": trainer.global_step,
            "seconds": round(seconds, 1),
            **metrics.last("val/"),
            **metrics.last("eval/"),
        }
        state = average.averaged(keep=main or again is not None)
        if main:

            def finish(folder: Path) -> None:
                if model.recipe.undescribed is None:
                    save_model(folder / "model", model, state)
                else:
                    save_weights(folder / "model", state)
                write_text(folder / "result.json", json.dumps(result, indent=1))

            try:
                finish(run_dir)
            except FolderGoneError as error:
                raise rescue.save(error, finish) from error
        for logger in trainer.loggers:
            if hasattr(logger, "experiment") and hasattr(logger.experiment, "finish"):
                logger.experiment.finish()  # or the next run of a sweep would continue it
        return Trained(result, model, state or None)


def _images(data: ImageDataModule) -> str:
    """Return how many images train and validate, and which folders they come from."""
    note = f" ({data.source.split_note})" if data.source.split_note else ""
    return f"{len(data.train_set)} + {len(data.val_set)} images{note}"


def _classes(cfg: DictConfig, data: ImageDataModule) -> str:
    """Return the classes that the network gets, or that are labelled but not used; empty without any."""
    if not cfg.conditional:
        asked = cfg.data.get("labels") not in (None, "none")
        return f"{data.num_classes} classes, not shown without conditional=true, " if asked else ""
    names = data.source.class_names
    return f"{data.num_classes} classes{f': {listed(names)}' if names else ''}, "


def _first_line(cfg: DictConfig, run_dir: Path, trainer: pl.Trainer, model: Model, data: ImageDataModule) -> str:
    """Return a line on model, data and options; batch = images per rank x ranks x accumulated batches."""
    height, width = model.recipe.image_size
    parts = [data.batch_size, trainer.world_size, *([n] if (n := trainer.accumulate_grad_batches) > 1 else [])]
    clock = seconds_passed_and_left(trainer)
    ends = [] if trainer.max_steps == -1 else [f"steps {trainer.max_steps}"]
    ends += [] if clock is None else [f"time {timedelta(seconds=round(sum(clock)))}"]
    return (
        f"{run_dir}: {title_of(model.denoiser.process)}, "
        f"{sum(p.numel() for p in model.denoiser.network.parameters()) / 1e6:.2f} M parameters, "
        f"{_images(data)} of {height}x{width}x{model.recipe.channels}, {_classes(cfg, data)}"
        f"batch {' x '.join(map(str, parts))} = {math.prod(parts)}, learning rate {cfg.optimizer.learning_rate:g}, "
        f"{', '.join(ends)}, {trainer.strategy.root_device}, {trainer.precision}"
        f"{', compiled' if compiles(cfg) else ''}"
    )
