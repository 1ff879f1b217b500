"""Measure the training data before the first step: its spectrum, and the images that a prior starts from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from dpm_scales.data import ImageDataModule
from dpm_scales.errors import require
from dpm_scales.images import to_range
from dpm_scales.models.model import Model

SPECTRUM_IMAGES = 2000  # enough for a curve of 26 numbers


def fit_to_data(model: Model, data: ImageDataModule) -> Model:
    """Fit the model's buffers to the training data, and return the model with the recipe that results.

    The data's spectrum is measured, the target's "auto" choices are resolved by it, and a prior that starts from
    training images gets them. The modules are shared with `model`, whose recipe stays as it was.

    Raises: UserError if all training images have the same constant value.
    """
    process, spectrum = model.denoiser.process, model.denoiser.spectrum
    low, high = process.value_range
    std = data.statistics()["std"] * (high - low)
    require(std > 0, "all training images are the same grey: nothing to learn")
    spectrum.std.fill_(std)
    train = data.train_set

    def spread(count: int) -> list[int]:
        """Return the indices of at most `count` training images, evenly spaced, or from a few shards."""
        pool = train.pool(count)
        return [pool[i] for i in torch.linspace(0, len(pool) - 1, min(count, len(pool))).round().long().tolist()]

    def loaded(index: list[int]) -> Tensor:
        return to_range(torch.stack([train[i][0] for i in index]), (low, high))

    def white_batches() -> Iterator[tuple[Tensor, Tensor]]:
        generator, chosen = torch.Generator().manual_seed(0), spread(SPECTRUM_IMAGES)
        for start in range(0, len(chosen), 64):
            x = loaded(chosen[start : start + 64])
            context, mean = process.context(x, generator), x.mean((-2, -1))
            yield process.operator(context).to_white(x - process.steady_state(mean, context)), mean

    spectrum.fit(white_batches())
    process.fit_color(spectrum)
    recipe = model.recipe
    target = {**recipe.parts["target"], **model.denoiser.resolve_auto(recipe.image_size)}
    if model.prior.max_images > 0:
        model.prior.fit(loaded(spread(model.prior.max_images)), process)
    return model.replaced(recipe=replace(recipe, parts={**recipe.parts, "target": target}))
