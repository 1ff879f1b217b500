"""Measure the training data before the first step: its spectrum, and what a prior starts from."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from dpm_scales.data import ImageDataModule
from dpm_scales.errors import require
from dpm_scales.images import to_range
from dpm_scales.models.model import Model

SPECTRUM_IMAGES = 2000  # enough for a curve of 26 numbers


def fit_to_data(model: Model, data: ImageDataModule) -> None:
    """Measure the data's spectrum, settle what depends on it, and hand training images to a prior that starts there."""
    process, spectrum = model.denoiser.process, model.denoiser.spectrum
    low, high = process.value_range
    std = data.statistics()["std"] * (high - low)
    require(std > 0, "all training images are the same grey: nothing to learn")
    spectrum.std.fill_(std)
    train = data.train_set

    def spread(count: int) -> list[int]:
        """Numbers of at most `count` training images, evenly over the set."""
        return torch.linspace(0, len(train) - 1, min(count, len(train))).round().long().tolist()

    def loaded(index: list[int]) -> Tensor:
        return to_range(torch.stack([train[i][0] for i in index]), (low, high))

    def white_batches() -> Iterator[tuple[Tensor, Tensor]]:
        generator, chosen = torch.Generator().manual_seed(0), spread(SPECTRUM_IMAGES)
        for start in range(0, len(chosen), 64):
            x = loaded(chosen[start : start + 64])
            context, grey = process.context(x, generator), x.mean((-2, -1))
            yield process.operator(context).to_white(x - process.steady_state(grey, context)), grey

    spectrum.fit(white_batches())
    model.recipe.parts["target"].update(model.denoiser.resolve_auto(model.recipe.image_size))
    if model.prior.max_images > 0:
        model.prior.fit(loaded(spread(model.prior.max_images)), process)
