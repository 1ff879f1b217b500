"""A prior for any process with a context, which is drawn from training images."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from dpm_scales.errors import require
from dpm_scales.operators import Operator
from dpm_scales.priors.base import FittedPrior
from dpm_scales.priors.start import Mixture, Start, one_like
from dpm_scales.processes import MAX_MEAN_LEFT, Context, Process
from dpm_scales.rng import CounterRNG


class ContextPrior(FittedPrior):
    """y_1 = r gamma_1(L) eps, with the context of a random training image x, as `Process.context_from` draws it.

    If a process leaves more than 2 % of the mean intensity at scale 1, relative to its noise, lambda_1(L) y_0 is added,
    y_0 the training image in whitened coordinates: the process's own law at scale 1 for this image.

    The likelihood is conditional on the context (`Process.condition`), and known only if sampling starts from noise.

    Args:
        noise_ratio: r, the noise of the start relative to the process's; None for 1.25 under constant noise, else 1.
        max_images: number of training images to store, unchanged.
    """

    stored: ClassVar[tuple[str, ...]] = ("images",)
    images: Tensor

    def __init__(self, noise_ratio: float | None = None, max_images: int = 256) -> None:
        super().__init__(noise_ratio, max_images)
        self.register_buffer("images", torch.zeros(0, 1, 1, 1))

    def check_kind(self, process: Process) -> None:
        require(
            process.has_context,
            f"ContextPrior draws contexts, and {type(process).__name__} has none; set prior=auto",
        )

    def _store(self, images: Tensor, process: Process) -> None:
        self.images = images.to(self.images.device, torch.float32)

    def sample(
        self, process: Process, noise: CounterRNG, size: tuple[int, int, int], dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor, Context]:
        self.check_kind(process)
        require(len(self.images) > 0, "ContextPrior: no training images stored yet; train the model first")
        channels = self.images.shape[1]
        require(channels == size[0], f"this model was trained on {channels} channel(s); it can't sample {size[0]}")
        self.check_size(size[1:])
        x = self.images[self._pick(noise, len(self.images))].to(dtype)
        context = process.context_from(x, noise)
        operator = process.operator(context)
        start = self.ratio(process) * process.noise_at(1.0, noise.normal(size, dtype), operator)
        if not _ends_in_noise(process):
            start = start + operator.apply(process.signal(one_like(x)), operator.to_white(x))
        return start, context

    def check_size(self, size: tuple[int, int]) -> None:
        """Raise UserError unless images of `size` (H, W) were fitted."""
        trained = tuple(self.images.shape[-2:])
        require(
            len(self.images) == 0 or trained == tuple(size),
            f"this model takes contexts from images of {trained[0]}x{trained[1]} pixels; it can't sample "
            f"{size[0]}x{size[1]}",
        )

    def law(self, process: Process, x_0: Tensor, noise: CounterRNG) -> tuple[Start, Context]:
        self._require_density(process, x_0.shape[1])
        require(
            _ends_in_noise(process),
            f"ContextPrior: {type(process).__name__} ends in blurred training images, whose density given a context is "
            "not known, so there is no likelihood; take a process that ends in noise",
        )
        context = process.context_from(x_0, noise)

        def distances(operator: Operator, y: Tensor) -> Tensor:
            one = one_like(y)
            white = operator.apply(lambda mu: 1 / process.noise_scale(one, mu), y)
            return white.square().flatten(1).sum(1, keepdim=True)

        zero = torch.zeros(x_0.shape[0], dtype=torch.float64, device=x_0.device)
        return Mixture(process.operator(context), zero, zero[:1, None], distances, self.ratio(process)), context


def _ends_in_noise(process: Process) -> bool:
    return process.has_noise() and process.mean_left <= MAX_MEAN_LEFT
