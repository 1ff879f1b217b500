"""Run `evaluate.py`: compare samples of a model, or images in a folder, with a set of real images."""

from __future__ import annotations

import json
import platform
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from dpm_scales.cli.options import check_counts, guidance_settings, pick_device
from dpm_scales.commands.shared import choose_model
from dpm_scales.data.image_sets import ImageSet
from dpm_scales.distributed.ranks import leave, meet, own_device
from dpm_scales.errors import UserError, require, require_number
from dpm_scales.evaluation.generated import ModelSamples, sample_features
from dpm_scales.evaluation.likelihood import METHODS, bits_per_dim, check_classes, estimator, save_plot
from dpm_scales.evaluation.reference_cache import cache_folder, reference_features
from dpm_scales.evaluation.references import open_images
from dpm_scales.memory import require_memory
from dpm_scales.metrics import FeatureNetwork, FeatureSet, Measure, compare, pick_features
from dpm_scales.metrics.figures import (
    FEWEST_NEIGHBOURS,
    check_measures,
    check_numbers,
    few_images,
    memory_needed,
    needs_rows,
)
from dpm_scales.models.generate import pick_labels
from dpm_scales.models.instantiate import plain
from dpm_scales.progress import Report
from dpm_scales.storage import check_writable, write_text

RESULT = "evaluation.json"
FORMAT = "dpm_scales evaluation"
VERSION = 1
PACKAGES = ("dpm-scales", "torch", "torchvision", "numpy", "pillow")
SMALL_SIDE = 32
"""Shorter side below which images are enlarged so much that features trained on photos miss most of what matters."""


def evaluate(cfg: DictConfig) -> None:
    """Compute the measures in the config and report them. Raises UserError for invalid options, before sampling.

    Processes started by torchrun or srun share the samples of a model; the first does everything else.
    """
    measures = _check(cfg)
    world = meet()
    device = own_device(pick_device(str(cfg.device)), world)
    run = None if cfg.model is None else Path(str(cfg.model))
    real = open_images(str(cfg.reference), "reference", str(cfg.split), cfg.num_reference, run, plain(cfg.allow))
    fake: ImageSet | ModelSamples
    if run is None:
        fake = open_images(str(cfg.samples), "samples", "all", cfg.num_samples)
    else:
        number = cfg.num_samples or len(real)
        require_memory(8 * number, f"labels of num_samples={number}", "lower num_samples")
        fake = _drawn(cfg, number, device)
    yardstick = None
    if cfg.yardstick is not None:
        yardstick = open_images(
            str(cfg.yardstick), "yardstick", str(cfg.yardstick_split), len(fake), run, plain(cfg.allow)
        )
    for other in (fake, *([] if yardstick is None else [yardstick])):
        _check_sizes(real, other, cfg.any_size)
        check_numbers(measures, len(real), len(other))
    held = _held_out(cfg, fake, run)
    network = pick_features(str(cfg.features), cfg.inception, device, cfg.download)
    require_memory(
        memory_needed(measures, (len(real), len(fake)), network.dim, cfg.manifold_images),
        f"features of {len(real)} real images and num_samples={len(fake)} samples",
        "lower num_samples, num_reference or manifold_images, or take measures=[frechet]",
    )
    out = None if cfg.out is None else Path(str(cfg.out))
    if out is not None and world.is_main:
        check_writable(out)
    if not world.is_main:
        if isinstance(fake, ModelSamples):
            sample_features(fake, network, cfg.batch_size, True, world, None)
        leave()
        return

    rows, folder = needs_rows(measures), cache_folder() if cfg.cache else None
    with Report() as report:

        def known(name: str, pictures: ImageSet) -> FeatureSet:
            advance = report.part(f"{name} features", len(pictures))
            return reference_features(pictures, network, cfg.batch_size, rows, folder, advance)

        reference = known("reference", real)
        bound = None if yardstick is None else known("yardstick", yardstick)
        judged = sample_features(fake, network, cfg.batch_size, rows, world, report)
        figures = compare(reference, judged, network, measures, cfg.manifold_images, report.part)
        bounds = None
        if bound is not None:

            def of_yardstick(name: str, steps: int) -> Callable[[float], None]:
                return report.part(f"{name} of the yardstick", steps)

            bounds = compare(reference, bound, network, measures, cfg.manifold_images, of_yardstick)
        likelihoods = likelihood(cfg, fake, held, device, out, report)
    doubts = find_doubts(len(real), len(fake), network, real.sizes)
    doubts += [doubt for doubt in [_part_alone(figures, len(real), len(fake))] if doubt is not None]
    result = {
        "format": FORMAT,
        "version": VERSION,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "figures": _as_table(figures),
        "features": {
            "network": network.name,
            "weights_sha256": network.hash,
            "dim": network.dim,
            "resizing": network.resizing,
        },
        "real": _origin(real),
        "fake": fake.origin() if isinstance(fake, ModelSamples) else _origin(fake),
        "yardstick": None
        if yardstick is None or bounds is None
        else _origin(yardstick) | {"figures": _as_table(bounds)},
        "likelihood": likelihoods,
        "warnings": doubts,
        "device": str(device),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
    }
    for doubt in doubts:
        warnings.warn(doubt, stacklevel=1)
    _show(figures, bounds, f"{len(fake)} samples by {len(real)} real images, features {network.name}")
    if out is not None:
        write_text(out / RESULT, json.dumps(result, indent=1) + "\n")
        print(f"result in {out / RESULT}")
    leave()


def _held_out(cfg: DictConfig, fake: ImageSet | ModelSamples, run: Path | None) -> ImageSet | None:
    """Return the images for the likelihood, None if not requested. Raises UserError if the model has no likelihood."""
    if cfg.likelihood is None or not isinstance(fake, ModelSamples):
        return None
    estimator(fake.model, cfg.likelihood, cfg.likelihood_scales, cfg.likelihood_draws)
    held = open_images(
        str(cfg.reference), "reference", str(cfg.likelihood_split), cfg.num_reference, run, plain(cfg.allow)
    )
    check_classes(fake.model, held)
    return held


def likelihood(
    cfg: DictConfig,
    fake: ImageSet | ModelSamples,
    held: ImageSet | None,
    device: torch.device,
    out: Path | None,
    report: Report,
) -> dict[str, Any] | None:
    """Return the bits per dimension of the held-out images, or None if the config does not request them."""
    if held is None or not isinstance(fake, ModelSamples):
        return None
    wanted = (str(cfg.likelihood), cfg.likelihood_scales, cfg.likelihood_draws, cfg.seed, device)
    recipe = fake.model.recipe
    batches = held.batches(cfg.batch_size) if recipe.num_classes is None else held.labelled(cfg.batch_size)
    advance = report.part(f"likelihood ({cfg.likelihood})", len(held))
    result = bits_per_dim(fake.model, batches, *wanted, on_images=advance)
    print(f"likelihood: {result.line()}")
    plain_result = None
    if recipe.num_classes is not None and recipe.label_dropout > 0:
        advance = report.part("likelihood without labels", len(held))
        batches = held.batches(cfg.batch_size)
        plain_result = bits_per_dim(fake.model, batches, *wanted, on_images=advance, use_labels=False)
        print(f"without labels: {plain_result.line()}")
    if out is not None:
        save_plot(out / "likelihood.png", result)
    kept: dict[str, Any] = {**result.to_dict(), "images": _origin(held)}
    if plain_result is not None:
        kept["without_labels"] = plain_result.to_dict()
    return kept


# --- options and checks -----------------------------------------------------------------------------------------------


def _check(cfg: DictConfig) -> tuple[str, ...]:
    """Return the measures to compute. Raises UserError for invalid options."""
    require(
        (cfg.model is None) != (cfg.samples is None),
        "give one of model=RUN_OR_EXPORT_OR_CKPT, which is sampled, and samples=DIR",
    )
    check_counts(cfg, [key for key in ("num_samples", "num_reference") if cfg[key] is not None], 2)
    if cfg.manifold_images is not None:
        require_number("manifold_images", cfg.manifold_images, FEWEST_NEIGHBOURS, whole=True)
    ok = cfg.likelihood is None or cfg.likelihood in METHODS
    require(ok, f"likelihood={cfg.likelihood!r}: allowed is null, {', '.join(METHODS)}")
    ok = cfg.likelihood is None or cfg.model is not None
    require(ok, f"likelihood={cfg.likelihood} is that of images under a model: give model=, not samples=")
    if cfg.samples is not None:
        for key, usual in {"steps": None, "labels": None, "guidance": 1, "weights": "averaged"}.items():
            require(cfg[key] == usual, f"{key} is for sampling a model, and samples={cfg.samples} are there already")
        chosen = plain(cfg.sampler).get("_target_")
        require(chosen is None, f"sampler is for sampling a model, and samples={cfg.samples} are there already")
    return check_measures(plain(cfg.measures))


def _drawn(cfg: DictConfig, number: int, device: torch.device) -> ModelSamples:
    model = choose_model(cfg)
    labels = pick_labels(model, plain(cfg.labels), number)
    model.prior.check_size(model.recipe.image_size)
    guidance = guidance_settings(cfg)
    return ModelSamples(model, str(cfg.model), cfg.weights, guidance, number, cfg.seed, labels, device)


def _check_sizes(real: ImageSet, other: ImageSet | ModelSamples, any_size: bool) -> None:
    """Raise UserError for images of several sizes, whose distance reflects sharpness, unless `any_size` is set."""
    if any_size:
        return
    for pictures in (real, other):
        if len(pictures.sizes) > 1:
            (h, w), (height, width) = pictures.sizes[0], pictures.sizes[-1]
            raise UserError(
                f"{pictures.source}: images of {len(pictures.sizes)} sizes, from {h}x{w} to {height}x{width}; bring "
                "them to one, or set any_size=true"
            )
    (h, w), (height, width) = real.sizes[0], other.sizes[0]
    require(
        (h, w) == (height, width),
        f"{other.source}: images of {height}x{width}, and of {h}x{w} in the reference; bring them to one size, or set "
        "any_size=true",
    )


# --- reports ----------------------------------------------------------------------------------------------------------


def find_doubts(real: int, fake: int, network: FeatureNetwork, sizes: Sequence[tuple[int, int]]) -> list[str]:
    """Return caveats for measures of so many images, one line each."""
    counted = (few_images(number, name, network) for number, name in ((real, "real images"), (fake, "samples")))
    doubts = [doubt for doubt in counted if doubt is not None]
    if min(min(size) for size in sizes) < SMALL_SIDE:
        doubts.append(
            f"images below {SMALL_SIDE} px are enlarged to {network.input_side} px for features of photos: figures "
            "rank models of one data set, and mean little beside those of another"
        )
    return doubts


def _part_alone(figures: dict[str, Measure], real: int, fake: int) -> str | None:
    """Return a caveat if some measures use only part of the images, else None."""
    parts = {name: figure.images for name, figure in figures.items() if figure.images is not None}
    if not parts:
        return None
    (taken, drawn), names = next(iter(parts.values())), list(parts)
    return (
        f"{', '.join(names[:-1])} and {names[-1]} are those of {taken} of {real} real images and {drawn} of {fake} "
        "samples (manifold_images); compare them with figures of as many alone"
    )


def _as_table(figures: dict[str, Measure]) -> dict[str, dict[str, Any]]:
    return {name: {key: v for key, v in asdict(figure).items() if v is not None} for name, figure in figures.items()}


def _origin(pictures: ImageSet) -> dict[str, Any]:
    return {
        "source": pictures.source,
        "number": len(pictures),
        "sizes": [list(size) for size in pictures.sizes],
        "sha256": pictures.digest(),
    }


def _show(figures: dict[str, Measure], bounds: dict[str, Measure] | None, title: str) -> None:
    table = Table(title=title, title_justify="left")
    for column in ("figure", "value", "standard error", *(["yardstick"] if bounds else []), "better"):
        table.add_column(column, justify="left" if column in ("figure", "better") else "right")
    for name, figure in figures.items():
        error = "" if figure.std_error is None else f"{figure.std_error:.2g}"
        name = name if figure.neighbours is None else f"{name}, k = {figure.neighbours}"
        yardstick = [f"{bounds[key].value:.4g}" for key in [name.partition(",")[0]]] if bounds else []
        table.add_row(name, f"{figure.value:.4g}", error, *yardstick, figure.better)
    Console().print(table)
