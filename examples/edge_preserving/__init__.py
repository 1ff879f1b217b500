r"""Diffusion that stops at edges, as a process of your own.

    d_t u = div(g(|grad v|^2) grad u),    v the image, blurred by `guidance_sigma` px

The weights are fixed by v (Weickert 1998, Sect. 1.3.1, takes v = u), so the operator is linear, and every image has its
own. v is the context: it comes from the image, and in sampling from a training image.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dpm_scales.errors import require_choice
from dpm_scales.operators import heat_blur
from dpm_scales.processes import Context, StencilProcess
from dpm_scales.rng import Randomness
from dpm_scales.schedules import BlurSchedule, CosineLogSNR, NoiseSchedule, SinSquaredBlur, require_positive


class EdgePreserving(StencilProcess):
    """Edge-preserving diffusion and scheduled noise.

    Args:
        num_scales, noise, blur, min_decay, value_range, tolerance: as for `StencilProcess`.
        contrast: gradient at which diffusion begins to stop, in units where black is 0 and white 1, per px, > 0.
        guidance_sigma: blur of the image from which the weights are computed, in px, > 0.
        diffusivity: g(s^2) for s = |grad v| / contrast, "perona_malik", 1 / (1 + s^2), or "weickert",
            1 - exp(-3.31488 / s^8).
    """

    def __init__(
        self,
        num_scales: int = 1000,
        noise: NoiseSchedule | None = None,
        blur: BlurSchedule | None = None,
        min_decay: float = 0.001,
        contrast: float = 0.1,
        guidance_sigma: float = 1.0,
        diffusivity: str = "perona_malik",
        value_range: Sequence[float] = (-1.0, 1.0),
        tolerance: float = 1e-6,
    ) -> None:
        super().__init__(
            num_scales, noise or CosineLogSNR(), blur or SinSquaredBlur(8.0), min_decay, value_range, tolerance
        )
        require_positive(self, contrast=contrast, guidance_sigma=guidance_sigma)
        require_choice("diffusivity", diffusivity, ("perona_malik", "weickert"), type(self).__name__)
        self.contrast, self.guidance_sigma, self.diffusivity = contrast, guidance_sigma, diffusivity

    def context(self, x_0: Tensor, generator: Randomness = None) -> Context:
        return heat_blur(x_0, self.guidance_sigma**2 / 2)

    def edge_weights(self, context: Tensor) -> tuple[Tensor, Tensor]:
        low, high = self.value_range
        v = F.pad(context, (1, 1, 1, 1), mode="replicate") / (self.contrast * (high - low))
        across, down = (v[..., 1:-1, 2:] - v[..., 1:-1, :-2]) / 2, (v[..., 2:, 1:-1] - v[..., :-2, 1:-1]) / 2
        squares = (across**2 + down**2).sum(1, keepdim=True)  # all channels have the same edges
        if self.diffusivity == "weickert":
            g = -torch.expm1(-3.31488 / squares.clamp(min=1e-9) ** 4)
        else:
            g = 1 / (1 + squares)
        return (g[..., 1:] + g[..., :-1]) / 2, (g[..., 1:, :] + g[..., :-1, :]) / 2
