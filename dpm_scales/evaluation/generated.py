"""Draw a model's samples for evaluation and compute their features, distributed over ranks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from dpm_scales.data.image_sets import ImageSet
from dpm_scales.distributed.ranks import World, connect
from dpm_scales.metrics import FeatureSet, FeatureStatistics
from dpm_scales.metrics.base import Extractor
from dpm_scales.metrics.figures import gather_all
from dpm_scales.models.generate import computed, draw, evaluations, weights_digest
from dpm_scales.models.model import Model
from dpm_scales.networks.precision import FULL
from dpm_scales.progress import Report


@dataclass(frozen=True)
class ModelSamples:
    """Samples of a model, drawn on demand.

    Attributes:
        model: the model, with the chosen sampler.
        source: path of the model.
        weights: "averaged" or "raw".
        guidance: settings of the guidance, or None.
        number, seed: number and seed of the samples.
        labels: labels ``(number,)``, or None.
        guide: path and weights of the guiding model, or None.
        ema: record of the reconstructed EMA of the weights; None for the EMA that the run exported.
        precision: precision in which the network is computed, "32-true" or "bf16-mixed".
        compile: whether the network is compiled.
        spent: number of images evaluated by each network, by its name; "samples" counts the images drawn here so far.
    """

    model: Model
    source: str
    weights: str
    guidance: dict[str, Any] | None
    number: int
    seed: int
    labels: Tensor | None
    device: torch.device
    guide: dict[str, Any] | None = None
    ema: dict[str, Any] | None = None
    precision: str = FULL
    compile: bool = False
    spent: Counter[str] = field(default_factory=Counter)

    def __len__(self) -> int:
        return self.number

    def batches(
        self, batch_size: int, numbers: range | None = None, on_samples: Callable[[float], None] | None = None
    ) -> Iterator[Tensor]:
        """Yield batches, uint8 ``(B, C, H, W)``, of the samples with these consecutive `numbers`, by default all.

        `on_samples` is called after each step of the sampler with the batch size divided by the number of steps.
        """
        part = range(self.number) if numbers is None else numbers
        if not part:
            return
        labels = None if self.labels is None else self.labels[part.start : part.stop]
        steps = len(self.model.sampler.scales(self.model.denoiser.process)) - 1

        def on_step(index: int, x: Tensor) -> None:
            if on_samples is not None:
                on_samples(len(x) / steps)

        given = (self.model, len(part), self.seed, batch_size)
        with computed(self.model, self.precision, self.compile), evaluations(self.model) as counts:
            yield from draw(*given, labels=labels, device=self.device, on_step=on_step, first=part.start)
        self.spent.update(counts, samples=len(part))

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """Return the size (H, W) of all samples, as the only entry."""
        return (self.model.recipe.image_size,)

    def origin(self) -> dict[str, Any]:
        """Return the settings needed to draw the samples again."""
        process, sampler = self.model.denoiser.process, self.model.sampler
        table = self.model.denoiser.error_variance if sampler.covariance is not None else None
        return {
            "model": self.source,
            "weights": self.weights,
            **({} if self.ema is None else {"ema": self.ema}),
            "weights_sha256": weights_digest(self.model),
            "process": type(process).__name__,
            "sampler": type(sampler).__name__,
            "sampler_settings": self.model.recipe.parts["sampler"],
            "steps": len(sampler.scales(process)) - 1,
            **({} if table is None else {"covariance": table.record()}),
            "guidance": self.guidance,
            "guide": self.guide,
            **({} if self.precision == FULL else {"precision": self.precision}),
            **({"compile": True} if self.compile else {}),
            "network_evaluations": {
                name: count / self.spent["samples"] for name, count in self.spent.items() if name != "samples"
            },
            "seed": self.seed,
            "labels": None if self.labels is None else sorted(set(self.labels.tolist())),
            "number": self.number,
            "sizes": [list(size) for size in self.sizes],
        }


def sample_features(
    fake: ImageSet | ModelSamples,
    sources: Sequence[Extractor],
    batch_size: int,
    rows: bool,
    world: World,
    report: Report | None,
) -> list[FeatureSet]:
    """Return the features of all samples by each of the extractors; each sample is drawn once.

    A model's samples are distributed over all ranks, which must all call this function.
    """
    share = world.part(len(fake)) if isinstance(fake, ModelSamples) else range(len(fake))

    def part(name: str) -> Callable[[float], None] | None:
        return None if report is None else report.part(name, len(share))

    batches = (
        fake.batches(batch_size, share, part("sampling"))
        if isinstance(fake, ModelSamples)
        else fake.batches(batch_size)
    )
    alone = world.world_size == 1 or not isinstance(fake, ModelSamples)
    own = gather_all(sources, batches, rows or not alone, part("sample features"))
    if alone:
        return own
    parts = [len(replace(world, rank=rank).part(len(fake))) for rank in range(world.world_size)]
    dims = [source.dim for source in sources]
    padded = torch.zeros(max(parts), sum(dims))
    for values, column in zip(own, padded.split(dims, 1), strict=True):
        if values.rows is not None:
            column[: len(values.rows)] = torch.from_numpy(values.rows)
    connect()
    gathered = [torch.empty_like(padded) for _ in parts]
    torch.distributed.all_gather(gathered, padded)
    every = torch.cat([values[:number] for values, number in zip(gathered, parts, strict=True)])
    columns = [column.contiguous() for column in every.split(dims, 1)]
    return [FeatureSet(FeatureStatistics().update(column), column.numpy()) for column in columns]
