"""Check a run's options before anything is made; wrong ones would otherwise fail late or deep inside a library."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import yaml
from omegaconf import DictConfig, OmegaConf

from dpm_scales.distributed.fsdp import FSDP
from dpm_scales.errors import UserError, is_whole, require, require_number, suggest
from dpm_scales.memory import require_memory
from dpm_scales.models.instantiate import CONFIGS, defaults_of, locate
from dpm_scales.models.model import PARTS, Recipe
from dpm_scales.networks.precision import BFLOAT16, FULL, precision_name
from dpm_scales.training.module import BANDS, MOST_STEPS

SECTIONS = ("optimizer", "training", "ema", "checkpoint", "samples", "evaluation")
"""Sections of configs/train.yaml that are not config groups."""

MOST_DEVICES = 4096
"""Largest number of devices on a machine, and of machines."""


def check_keys(cfg: DictConfig) -> None:
    """Raise UserError for keys that nothing reads: Hydra lets an experiment file add any."""
    known = yaml.safe_load((CONFIGS / "train.yaml").read_text())
    read = {"": [*PARTS, "data", "weight", "trainer", "logger", *known]}
    read |= {section: list(known[section]) for section in SECTIONS}
    for section, names in read.items():
        kind = f"{section} holds options, {section}.NAME=VALUE, and is not one itself: got {section}={cfg.get(section)}"
        require(not section or OmegaConf.is_dict(cfg.get(section)), kind)
        for key in cfg[section] if section else cfg:
            if key not in names:
                full = [f"{section}.{name}".lstrip(".") for name in (key, *names)]
                raise UserError(f"unknown option {full[0]!r}: {suggest(full[0], full[1:])}")


def check_numbers(cfg: DictConfig) -> None:
    """Raise UserError for numbers and strategies that would otherwise fail late, or inside Lightning."""
    require_number("seed", cfg.seed, 0, 2**32 - 1, whole=True)
    require(
        cfg.process.get("num_scales") != 1,
        "process.num_scales=1 leaves samplers no step between noise and image; choose 2 or more",
    )
    trainer = cfg.trainer
    if trainer.max_steps != -1:
        require_number("trainer.max_steps", trainer.max_steps, 1, MOST_STEPS, whole=True)
    require(
        trainer.max_steps != -1 or trainer.max_time is not None,
        "trainer.max_steps=-1 never ends; set trainer.max_time=DD:HH:MM:SS or a number of steps",
    )
    for name in ("val_check_interval", "log_every_n_steps", "accumulate_grad_batches"):
        require_number(f"trainer.{name}", trainer[name], 1, MOST_STEPS, whole=True)
    for name in ("devices", "num_nodes"):
        many = is_whole(trainer[name], MOST_DEVICES + 1)
        require(not many, f"trainer.{name}={trainer[name]}: allowed are at most {MOST_DEVICES}")
    strategy = str(trainer.strategy)
    require(
        strategy in ("auto", FSDP) or strategy.startswith("ddp"),
        f"trainer.strategy={strategy}: allowed are auto, ddp (whole weights on every device) and fsdp (shards of them)",
    )
    require(
        strategy != FSDP or not cfg.compile,
        "compile=true compiles a network in one piece, trainer=fsdp computes it block by block; leave one of them out",
    )
    require(
        strategy != FSDP or cfg.optimizer.method != "muon",
        "optimizer.method=muon needs whole matrices, trainer=fsdp has a part of each on every device; leave one out",
    )
    if trainer.gradient_clip_val is not None:
        require_number("trainer.gradient_clip_val", trainer.gradient_clip_val, 0)
        require(trainer.gradient_clip_val > 0, "trainer.gradient_clip_val=0 stops all learning; null clips nothing")


def check_objective(objective: Any, evaluated: Iterable[str]) -> None:
    """Raise UserError unless `objective` is one of the metrics in result.json.

    Args:
        evaluated: names of the metrics of the run's samples, if it measures any.
    """
    bands = (f"val/loss_t{(band + 1) / BANDS:.2f}" for band in range(BANDS))
    names = ["steps", "seconds", "val/loss", *bands, *evaluated]
    hint = "; figures of samples (eval/...) need evaluation.every_n_steps" if str(objective).startswith("eval/") else ""
    known = suggest(str(objective), names)
    require(objective in names, f"objective={objective} is no figure of this run: {known}{hint}")


def check_grid(num_images: int, recipe: Recipe) -> None:
    """Raise OutOfMemoryError unless the sample grid's images and their noise fit into memory."""
    height, width = recipe.image_size
    require_memory(
        2 * 4 * num_images * recipe.channels * height * width,
        f"samples.num_images={num_images} images of {height}x{width}",
        "lower samples.num_images",
    )


def uses_cuda(cfg: DictConfig) -> bool:
    """Return whether a run with this config trains on CUDA devices."""
    return torch.cuda.is_available() and cfg.trainer.accelerator in ("auto", "gpu", "cuda")


def precision_of(cfg: DictConfig) -> str:
    """Return the precision by Lightning's name. Raises UserError for an unknown one and float16, which overflows."""
    wanted = cfg.trainer.precision
    usual = BFLOAT16 if uses_cuda(cfg) else FULL
    return precision_name("trainer.precision", usual if wanted is None else wanted)


def check_same_model(before: Any, now: Any, run_dir: Path, key: str = "") -> None:
    """Raise UserError, naming the first key, if a run would resume as another model. The sampler may change.

    An argument that an earlier version of a class did not have is taken to have had its present default.
    """
    if key == "sampler" or before == now:
        return
    if isinstance(before, dict) and isinstance(now, dict):
        if "_target_" in now:
            usual = defaults_of(locate(now["_target_"]))
            before = {**{name: usual[name] for name in now if name in usual}, **before}
        for name in sorted({**before, **now}, key=lambda name: name != "_target_"):
            check_same_model(before.get(name), now.get(name), run_dir, f"{key}.{name}".lstrip("."))
        return
    name = key.removesuffix("._target_")
    if name != key:
        before, now = (str(target).rpartition(".")[2] for target in (before, now))
    raise UserError(
        f"{run_dir} was trained with {name}={before}, and now {name} is {now}; choose another run_dir, "
        f"or leave {name} as it was"
    )
