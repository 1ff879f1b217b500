"""Measure a run's samples while it trains: `eval/fid` and other metrics in metrics.csv."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from omegaconf import DictConfig
from torch import Tensor

from dpm_scales.data import ImageDataModule
from dpm_scales.errors import require, require_number
from dpm_scales.evaluation.choices import choose_features, choose_metrics, rehearse
from dpm_scales.evaluation.reference_cache import REFERENCES, reference_features
from dpm_scales.evaluation.references import data_images
from dpm_scales.images import to_uint8
from dpm_scales.memory import require_memory
from dpm_scales.metrics import FeatureSet, FeatureStatistics, compare
from dpm_scales.metrics.figures import check_names, check_numbers, extractors, memory_needed, needs_network, needs_rows
from dpm_scales.models.model import Model
from dpm_scales.rng import CounterRNG
from dpm_scales.storage import user_cache
from dpm_scales.training.ema import EMA
from dpm_scales.training.module import DiffusionModule

PREFIX = "eval/"


class PeriodicEvaluation(Callback):
    """Logs metrics of samples against the run's images, every n steps and after the last, with the EMA weights.

    Sample i has the same noise every time. All ranks draw a share of the samples, and the first one computes the
    metrics. The random numbers of training are unaffected, and checkpoints hold no state of this callback.

    Args:
        average: EMA of the run.
        data: images of the run.
        seed: seed of the samples.
        settings: section `evaluation` of configs/train.yaml.

    Raises: UserError for a value out of range, a missing feature network, or fewer than two reference images.
    """

    def __init__(self, average: EMA, data: ImageDataModule, seed: int, settings: DictConfig) -> None:
        for key, low in {"every_n_steps": 1, "num_samples": 2, "batch_size": 1}.items():
            require_number(f"evaluation.{key}", settings[key], low, whole=True)
        if settings.num_reference is not None:
            require_number("evaluation.num_reference", settings.num_reference, 2, whole=True)
        self.metrics = choose_metrics(settings.measures, key="evaluation.measures")
        self.average, self.seed = average, seed
        self.every_n_steps, self.num_samples = int(settings.every_n_steps), int(settings.num_samples)
        self.batch_size, self.cache = int(settings.batch_size), bool(settings.cache)
        split = str(settings.split)
        self.reference = data_images(data.source, split, "the run's data", settings.num_reference)
        require(len(self.reference) >= 2, f"evaluation.split={split} has {len(self.reference)} images, and needs 2")
        check_numbers(self.metrics, len(self.reference), self.num_samples)
        with _own_random_numbers(torch.device("cpu")):  # building a network draws its initial weights
            self.network = None
            if needs_network(self.metrics):
                self.network = choose_features(settings.features, settings.inception, key="evaluation.features")
            rehearse(self.metrics, self.network, self.reference, "evaluation.measures")
        self.sources = extractors(self.metrics, self.network)
        require_memory(  # features of all ranks together
            4.0 * self.num_samples * sum(source.dim for source in self.sources)
            + memory_needed(self.metrics, (len(self.reference), self.num_samples), self.network),
            f"features of evaluation.num_samples={self.num_samples} samples",
            "lower evaluation.num_samples",
        )
        check_names(self.metrics, self.network)
        self._known: list[FeatureSet] | None = None
        self._step = 0

    def names(self) -> list[str]:
        """Return the names of the metrics, as in `metrics.csv` and `result.json`."""
        return [f"{PREFIX}{_key(name)}" for name in check_names(self.metrics, self.network)]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._step = trainer.global_step
        if self.network is not None:
            self.network.to(pl_module.device)
        if trainer.is_global_zero:
            folder = user_cache(REFERENCES) if self.cache else None
            settings = (self.batch_size, needs_rows(self.metrics), folder)
            with _own_random_numbers(pl_module.device):
                self._known = [reference_features(self.reference, source, *settings) for source in self.sources]

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step, last = trainer.global_step, 0 < trainer.max_steps <= trainer.global_step
        if step == self._step or not (step % self.every_n_steps == 0 or last):
            return
        self._step = step
        assert isinstance(pl_module, DiffusionModule)
        with _own_random_numbers(pl_module.device):
            features = self._features(self.average.model(), pl_module)
            if self._known is None:
                return
            judged = [FeatureSet(FeatureStatistics().update(own), own.numpy()) for own in features]
            figures = compare(self._known, judged, self.network, self.metrics)
        values = {f"{PREFIX}{_key(name)}": figure.value for name, figure in figures.items()}
        for logger in trainer.loggers:
            logger.log_metrics(values, step - 1)  # rows are numbered from 0
            logger.save()

    @torch.no_grad()
    def _features(self, model: Model, pl_module: DiffusionModule) -> list[Tensor]:
        """Return the features ``(num_samples, d)`` of the samples of all ranks by each extractor, on the CPU."""
        trainer, recipe = pl_module.trainer, model.recipe
        share = -(-self.num_samples // trainer.world_size)
        # the last rank may draw more than needed: with sharded weights all ranks must run equally many batches
        start = trainer.global_rank * share
        stop = start + share
        scales = model.sampler.scales(model.denoiser.process, pl_module.device)  # checked when the model was built
        dims = [source.dim for source in self.sources]
        own = torch.zeros(share, sum(dims), device=pl_module.device)
        for first in range(start, stop, self.batch_size):
            noise = CounterRNG(self.seed, min(self.batch_size, stop - first), first, pl_module.device)
            numbers = torch.arange(first, first + noise.count, device=pl_module.device)
            labels = None if recipe.num_classes is None else numbers % recipe.num_classes
            size = (recipe.channels, *recipe.image_size)
            x = model.sampler.sample(model.denoiser, model.prior, noise, size, labels, scales)
            place = first - start
            images = to_uint8(x, model.denoiser.process.value_range)
            own[place : place + noise.count] = torch.cat([source(images).to(own) for source in self.sources], 1)
        gathered = cast(Tensor, pl_module.all_gather(own))
        every = gathered.reshape(-1, sum(dims))[: self.num_samples].cpu()
        return [column.contiguous() for column in every.split(dims, 1)]


def periodic_evaluation(
    average: EMA, data: ImageDataModule, seed: int, settings: DictConfig
) -> list[PeriodicEvaluation]:
    """Return a list with the callback that the section `evaluation` configures; empty without `every_n_steps`."""
    return [] if settings.every_n_steps is None else [PeriodicEvaluation(average, data, seed, settings)]


@contextmanager
def _own_random_numbers(device: torch.device) -> Iterator[None]:
    """Restore the state of torch's generators at the end."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield


def _key(name: str) -> str:
    return name.lower().replace("-", "_")
