"""Run `evaluate.py`: compare samples of a model, or images in a folder, with a set of real images."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from omegaconf import DictConfig

from dpm_scales.cli.options import check_counts, guidance_settings, pick_device
from dpm_scales.commands.question import LikelihoodQuestion, Question, measure
from dpm_scales.commands.shared import GUIDE_OPTIONS, choose_model
from dpm_scales.data.image_sets import ImageSet
from dpm_scales.distributed.ranks import leave, meet, own_device
from dpm_scales.errors import UserError, require, require_number
from dpm_scales.evaluation.choices import choose_features, choose_metrics, rehearse
from dpm_scales.evaluation.generated import ModelSamples
from dpm_scales.evaluation.likelihood import METHODS, check_classes, estimator
from dpm_scales.evaluation.reference_cache import REFERENCES
from dpm_scales.evaluation.references import RUN_DATA, open_images
from dpm_scales.memory import require_memory
from dpm_scales.metrics import Metric
from dpm_scales.metrics.figures import FEWEST_NEIGHBOURS, check_names, check_numbers, memory_needed, needs_network
from dpm_scales.models.generate import pick_labels
from dpm_scales.models.hub import is_on_hub
from dpm_scales.models.instantiate import plain
from dpm_scales.networks.precision import FULL, precision_name
from dpm_scales.storage import check_writable, user_cache


def evaluate(cfg: DictConfig) -> None:
    """Compute the measures in the config and report them. Raises UserError for invalid options, before sampling.

    Processes started by torchrun or srun share the samples of a model; the first does everything else.
    """
    question = plan(cfg)
    answer = measure(question)
    if answer is not None:
        for doubt in answer.doubts:
            warnings.warn(doubt, stacklevel=1)
        answer.show()
        if question.out is not None:
            print(f"result in {answer.save(question.out)}")
    leave()


def plan(cfg: DictConfig) -> Question:
    """Return the question that the config describes, with all options checked, all files opened and the model loaded.

    Raises: UserError for invalid options, OutOfMemoryError if the features would not fit into memory.
    """
    metrics = _check(cfg)
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
        fake = drawn(cfg, number, device)
    yardstick = None
    if cfg.yardstick is not None:
        yardstick = open_images(
            str(cfg.yardstick), "yardstick", str(cfg.yardstick_split), len(fake), run, plain(cfg.allow)
        )
    for other in (fake, *([] if yardstick is None else [yardstick])):
        _check_sizes(real, other, cfg.any_size)
        check_numbers(metrics, len(real), len(other))
    likelihood = _likelihood(cfg, fake, run)
    network = choose_features(cfg.features, cfg.inception, device, cfg.download) if needs_network(metrics) else None
    check_names(metrics, network)
    require_memory(
        memory_needed(metrics, (len(real), len(fake)), network),
        f"features of {len(real)} real images and num_samples={len(fake)} samples",
        "lower num_samples, num_reference or manifold_images, or take measures=[frechet]",
    )
    rehearse(metrics, network, real)
    out = None if cfg.out is None else Path(str(cfg.out))
    if out is not None and world.is_main:
        check_writable(out)
    return Question(
        metrics=metrics,
        network=network,
        real=real,
        fake=fake,
        yardstick=yardstick,
        likelihood=likelihood,
        batch_size=cfg.batch_size,
        cache=user_cache(REFERENCES) if cfg.cache else None,
        device=device,
        world=world,
        out=out,
    )


def _likelihood(cfg: DictConfig, fake: ImageSet | ModelSamples, run: Path | None) -> LikelihoodQuestion | None:
    """Return the question for bits per dimension; None if they are not wanted. Raises UserError if it has no answer."""
    if cfg.likelihood is None or not isinstance(fake, ModelSamples):
        return None
    estimator(fake.model, cfg.likelihood, cfg.likelihood_scales, cfg.likelihood_draws)
    held = open_images(
        str(cfg.reference), "reference", str(cfg.likelihood_split), cfg.num_reference, run, plain(cfg.allow)
    )
    check_classes(fake.model, held)
    return LikelihoodQuestion(
        fake.model, held, str(cfg.likelihood), cfg.likelihood_scales, cfg.likelihood_draws, cfg.seed
    )


def _check(cfg: DictConfig) -> tuple[Metric, ...]:
    """Return the metrics to compute. Raises UserError for invalid options."""
    require(
        (cfg.model is None) != (cfg.samples is None),
        "give model=RUN, an export or a checkpoint, to sample from it, or samples=DIR, and not both",
    )
    check_counts(cfg, [key for key in ("num_samples", "num_reference") if cfg[key] is not None], 2)
    if cfg.manifold_images is not None:
        require_number("manifold_images", cfg.manifold_images, FEWEST_NEIGHBOURS, whole=True)
    precision_name("precision", cfg.precision)
    require(isinstance(cfg.compile, bool), f"compile must be true or false, got {cfg.compile!r}")
    ok = cfg.likelihood is None or cfg.likelihood in METHODS
    require(ok, f"likelihood={cfg.likelihood!r}: allowed is null, {', '.join(METHODS)}")
    ok = cfg.likelihood is None or cfg.model is not None
    require(ok, f"likelihood={cfg.likelihood} is that of images under a model: give model=, not samples=")
    if is_on_hub(cfg.model):
        for key in ("reference", "yardstick"):
            said = f"{key}={RUN_DATA} is the data of a run, and {cfg.model} is on the Hub, without its run"
            require(cfg[key] != RUN_DATA, f"{said}; name the data set or its folder: {key}=NAME_OR_DIR")
    if cfg.samples is not None:
        sampling = {"steps": None, "labels": None, "guidance": 1, "guide": None, "weights": "averaged"}
        how = {"precision": FULL, "compile": False}
        for key, usual in {**sampling, **how, "ema": None, "ema_step": None, **GUIDE_OPTIONS}.items():
            require(cfg[key] == usual, f"{key} is for sampling a model, and samples={cfg.samples} are there already")
        chosen = [value for value in plain(cfg.sampler).values() if value is not None]
        require(not chosen, f"sampler is for sampling a model, and samples={cfg.samples} are there already")
    return choose_metrics(cfg.measures, cfg.manifold_images)


def drawn(cfg: DictConfig, number: int, device: torch.device) -> ModelSamples:
    """Return the samples that a config describes, not yet drawn. Raises UserError for invalid options."""
    chosen = choose_model(cfg)
    model = chosen.model
    labels = pick_labels(model, plain(cfg.labels), number)
    model.prior.check_size(model.recipe.image_size)
    guidance = guidance_settings(cfg)
    given = (model, str(cfg.model), cfg.weights, guidance, number, cfg.seed, labels, device)
    precision = precision_name("precision", cfg.precision)
    return ModelSamples(*given, guide=chosen.guide, ema=chosen.ema, precision=precision, compile=cfg.compile)


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
