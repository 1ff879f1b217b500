"""A prior of steady states of guidance images."""

from __future__ import annotations

import math
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from dpm_scales.errors import require
from dpm_scales.operators import Operator
from dpm_scales.priors.base import STEERABLE, FittedPrior
from dpm_scales.priors.guidance import Known, infer_guidance
from dpm_scales.priors.start import Mixture, Start, one_like, squared_distances
from dpm_scales.processes import Context, Osmosis, Process
from dpm_scales.rng import CounterRNG


class OsmosisPrior(FittedPrior):
    """y_1 = lambda_1(0) V^{-1/2} (v m) + r gamma_1(L) eps.

    m are the mean intensities of a random training image, and v is the guidance image that the process draws around
    them, normalised to mean one. If images guide, it is the same training image, or a random one with
    `guidance_image="other"`. The buffer `grey` holds the mean intensities, `relief` the detail of guiding images.

    Args:
        noise_ratio: r, the noise of the start relative to the process's.
        max_images: number of training images whose mean intensities are stored; at most 1000 if images guide.
    """

    max_guides: ClassVar[int] = 1000

    stored: ClassVar[tuple[str, ...]] = ("grey", "relief")
    grey: Tensor
    relief: Tensor

    def __init__(self, noise_ratio: float = 1.0, max_images: int = 10000) -> None:
        require(noise_ratio is not None, "OsmosisPrior: noise_ratio must be >= 0, got None")
        super().__init__(noise_ratio, max_images)
        self.register_buffer("grey", torch.zeros(0, 1))
        self.register_buffer("relief", torch.zeros(0, 1, 1, 1))

    def check_kind(self, process: Process) -> None:
        as_osmosis(process)

    def steer(self, images: Tensor, process: Process) -> None:
        osmosis = as_osmosis(process)
        require(
            osmosis.guidance.image != "none",
            f"this model's {type(process).__name__} takes an image's mean grey values alone, and no image can choose "
            f"its start; models whose start can be chosen are {STEERABLE}",
        )
        super().steer(images, process)

    def _limit(self, process: Process) -> int:
        guides = as_osmosis(process).guidance.image != "none"
        return min(self.max_images, self.max_guides) if guides else self.max_images

    def _store(self, images: Tensor, process: Process) -> None:
        images, device = images.to(torch.float32), self.grey.device
        detail = as_osmosis(process).guidance_detail(images)
        self.grey = images.mean((-2, -1)).to(device)
        if detail is not None:
            self.relief = detail.to(device)

    def sample(
        self, process: Process, noise: CounterRNG, size: tuple[int, int, int], dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor, Context]:
        osmosis = as_osmosis(process)
        count, channels = self.grey.shape
        require(count > 0, "OsmosisPrior: no grey values stored yet; train the model first")
        require(channels == size[0], f"this model was trained on {channels} channel(s); it can't sample {size[0]}")
        one = torch.ones((), dtype=torch.float64, device=noise.device)
        index = self._pick(noise, count)
        mean, detail = self.grey[index].to(dtype), None
        if len(self.relief) > 0:
            self.check_size(size[1:])
            guides = self._pick(noise, count) if osmosis.guidance.image == "other" else index
            detail = self.relief[guides].to(dtype)
        context = osmosis.draw_guidance(mean, noise.normal(size, dtype), detail)
        operator = osmosis.operator(context)
        signal = osmosis.signal_scale(one, torch.zeros_like(one)).to(dtype)
        start = signal * operator.to_white(osmosis.steady_state(mean, context))
        return start + self.ratio(process) * osmosis.noise_at(1.0, noise.normal(size, dtype), operator), context

    def check_size(self, size: tuple[int, int]) -> None:
        """Raise UserError if images guide and those fitted don't have `size` (H, W)."""
        trained = tuple(self.relief.shape[-2:])
        require(
            len(self.relief) == 0 or trained == tuple(size),
            f"this model is guided by images of {trained[0]}x{trained[1]} pixels; it can't sample {size[0]}x{size[1]}",
        )
        require(
            len(self.relief) == 0 or self.relief.shape[:2] == self.grey.shape,
            f"this model's prior has {tuple(self.grey.shape)} grey values and {tuple(self.relief.shape[:2])} guidance "
            "images: its file is damaged; train it again",
        )

    def law(self, process: Process, x_0: Tensor, noise: CounterRNG) -> tuple[Start, Context]:
        osmosis, equal = as_osmosis(process), self._require_density(process, x_0.shape[1])
        known = Known(self.grey, self.relief, equal)
        log_weights, cost, grey, context = infer_guidance(osmosis, known, x_0, noise)

        def distances(operator: Operator, y: Tensor) -> Tensor:
            # along sqrt(v), plus orthogonal to it; a colour's noise is scaled to that along sqrt(v)
            one, zero = one_like(y), torch.zeros((), dtype=torch.float64, device=y.device)
            std, log_noise = osmosis.noise_scale(one, zero), osmosis.log_noise_scale
            y = operator.apply(lambda mu: torch.exp(log_noise(one, 0 * mu) - log_noise(one, mu)), y)
            mode = operator.to_pixels(torch.ones_like(y)) / math.sqrt(y.shape[-2] * y.shape[-1])
            along = (y * mode).sum((-2, -1))
            across = (y - along[..., None, None] * mode).square().flatten(1).sum(1)
            scale = osmosis.signal_scale(one, zero) * math.sqrt(y.shape[-2] * y.shape[-1])
            distances = squared_distances(along[:, None], scale * grey.to(torch.float64))[:, 0]
            return (across[:, None] + distances) / std**2

        return Mixture(osmosis.operator(context), cost, log_weights, distances, self.ratio(process)), context

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # models saved before images could guide lack this buffer
        state_dict.setdefault(prefix + "relief", torch.zeros(0, 1, 1, 1))
        super()._load_from_state_dict(state_dict, prefix, *args)


def as_osmosis(process: Process) -> Osmosis:
    """Return the process, typed as an osmosis process. Raises UserError for any other."""
    require(
        process.default_prior() == "guidance",
        f"OsmosisPrior starts from guidance images and needs an osmosis process, not {type(process).__name__}; "
        "set prior=auto",
    )
    return cast(Osmosis, process)
