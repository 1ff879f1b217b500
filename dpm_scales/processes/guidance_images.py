"""Draw the guidance images of an osmosis process.

    v = clip(m + detail + noise * pattern, minimum, 1)

in units where black is 0 and white is 1: m is the mean intensity of an image channel, `detail` the zero-mean detail of
a guiding image, and the pattern, of variance one, is made from white noise.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dpm_scales.errors import is_number, require, require_choice, require_positive
from dpm_scales.operators import HeatOperator, heat_blur

PATTERNS = ("white", "smooth", "edges")
IMAGES = ("none", "own", "other")


@dataclass(frozen=True)
class Guidance:
    """The `guidance_*` arguments of an osmosis process.

    Args:
        noise: standard deviation of the guidance image around the mean intensity, >= 0.
        minimum: smallest value of the guidance image, in (0, 1).
        pattern: "white" noise; "smooth", noise blurred by `blur_sigma` and rescaled to the same standard deviation;
            "edges", the sign of the blurred noise.
        blur_sigma: blur of the last two patterns, and of images that guide, in px, > 0.
        image: "none"; "own", each image guides itself; "other", the next image of the batch guides it.
        visible: whether the network sees the guidance image.
    """

    noise: float
    minimum: float
    pattern: str
    blur_sigma: float
    image: str
    visible: bool

    def checked(self, owner: object) -> Guidance:
        """Return the same values, as floats. Raises UserError, naming owner and argument, for values out of range."""
        name = type(owner).__name__
        require_positive(owner, guidance_min=self.minimum, guidance_blur_sigma=self.blur_sigma)
        require_choice("guidance_pattern", self.pattern, PATTERNS, name)
        require_choice("guidance_image", self.image, IMAGES, name)
        ok = isinstance(self.visible, bool)
        require(ok, f"{name}: guidance_input must be true or false, got {self.visible!r}")
        ok = is_number(self.noise) and self.noise >= 0
        require(ok, f"{name}: guidance_noise must be a number >= 0, got {self.noise!r}")
        require(self.minimum < 1, f"{name}: guidance_min must lie in (0, 1), got {self.minimum!r}")
        noise, minimum, blur_sigma = float(self.noise), float(self.minimum), float(self.blur_sigma)
        return replace(self, noise=noise, minimum=minimum, blur_sigma=blur_sigma)

    def detail(self, images: Tensor) -> Tensor:
        """Return the detail with which images ``(B, C, H, W)`` guide: the images blurred, minus their mean."""
        blurred = heat_blur(images, self.blur_sigma**2 / 2)
        return blurred - blurred.mean((-2, -1), keepdim=True)

    def draw(self, mean: Tensor, white: Tensor, detail: Tensor | None = None) -> Tensor:
        """Return guidance images ``(B, C, H, W)`` from mean intensities ``(B, C)``, white noise and `detail`."""
        level = mean[..., None, None]
        if detail is not None:
            level = level + detail
        return (level + self.noise * self.patterned(white)).clamp(self.minimum, 1.0)

    def patterned(self, white: Tensor) -> Tensor:
        """Return the pattern, of variance one, made from white noise ``(B, C, H, W)``."""
        if self.pattern == "white":
            return white
        time = self.blur_sigma**2 / 2
        smooth = heat_blur(white, time)
        if self.pattern == "edges":
            return torch.sign(smooth)
        mu = HeatOperator().eigenvalues(white.shape[-2], white.shape[-1], white.device)
        return smooth / torch.exp(-2 * time * mu).mean().sqrt().to(white.dtype)
