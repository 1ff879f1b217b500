r"""Processes of the osmosis operator, each the counterpart of a heat process, with a guidance image for every sample.

| process | curves of | noise in pixels | guidance image v, per image and channel |
|---|---|---|---|
| OsmosisFilter (Sect. 6.2) | Homogeneous | 0 | clip(m + 0.1 N(0, 1), 1e-6, 1) |
| InverseOsmosis | InverseHeat | sqrt(v) sigma, v of mean one | clip(m + 0.1 N(0, 1), 1e-2, 1) |
| OsmosisDiffusion | Blurring | sqrt(v) gamma_t, v of mean one | clip(m + 0.1 N(0, 1), 1e-2, 1) |

m is the mean intensity of the image, in units where black is 0 and white is 1. The guidance image is the process's
context: drawn once per sample, passed to the operator, and to the network as the channels v - 1. A constant v
(`guidance_noise=0`) gives the heat operator's process with the discrete spectrum.

Instead of white noise the guidance may be a smooth field, or one of flat regions with edges (`guidance_pattern`). It is
drawn independently of the image's content, so it is not a condition: the reverse process has the data's law for each v.

With `guidance_image` the guidance is a blurred image s: v = clip(m + s - mean(s) + 0.1 N(0, 1), ...). If s is the image
itself ("own"), osmosis evolves it towards v, and the reverse process draws from the law of images given v: the choice
of v determines what is drawn. If s is another image of the batch ("other"), it is not a condition. Osmosis preserves
signs, so the steady state resembles v only where intensities are positive: use `value_range=[0,1]`.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from dpm_scales.errors import UserError, require
from dpm_scales.operators import Operator, OsmosisOperator
from dpm_scales.processes.expanded import ExpandedProcess
from dpm_scales.processes.guidance_images import Guidance
from dpm_scales.processes.law import Context
from dpm_scales.rng import CounterRNG, Randomness, white_noise
from dpm_scales.schedules import (
    BlurSchedule,
    Color,
    ConstantNoise,
    CosineLogSNR,
    LogBlur,
    NoiseSchedule,
    NoNoise,
    SinSquaredBlur,
)


class Osmosis(ExpandedProcess):
    """A process of the osmosis operator; without a context, that of a constant guidance image.

    Args:
        num_scales, noise, blur, min_decay, value_range, color: as for `Process`.
        guidance: how guidance images are drawn; subclasses take its values as `guidance_*`.
        tolerance: as for `ExpandedProcess`.

    Raises: UserError as `Process` does, and for values out of range.
    """

    def __init__(
        self,
        num_scales: int,
        noise: NoiseSchedule,
        blur: BlurSchedule,
        min_decay: float,
        value_range: Sequence[float],
        guidance: Guidance,
        tolerance: float,
        color: Color | None = None,
    ) -> None:
        super().__init__(num_scales, noise, blur, min_decay, value_range, tolerance, color)
        self.guidance = guidance.checked(self)
        self.context_channels = int(guidance.visible)

    def context(self, x_0: Tensor, generator: Randomness = None) -> Context:
        """Draw a guidance image around each image's mean intensity: ``(B, C, H, W)``."""
        white, detail = white_noise(x_0, generator), self.guidance_detail(x_0)
        if detail is not None and self.guidance.image == "other":
            detail = detail.roll(1, 0)
        return self.draw_guidance(x_0.mean((-2, -1)), white, detail)

    def context_from(self, x: Tensor, noise: CounterRNG) -> Context:
        require(
            self.guidance.image != "other",
            f"{type(self).__name__} with guidance_image=other leads to an image of its own; there is nothing to edit",
        )
        white = noise.normal(tuple(x.shape[1:]), x.dtype)
        return self.draw_guidance(x.mean((-2, -1)), white, self.guidance_detail(x))

    def default_prior(self) -> str:
        return "guidance"

    @property
    def condition(self) -> str | None:
        return "guidance image" if self.guidance.image == "own" else None

    def guidance_detail(self, images: Tensor) -> Tensor | None:
        """Return the zero-mean detail with which images ``(B, C, H, W)`` guide (white is 1); None if they don't."""
        return None if self.guidance.image == "none" else self.guidance.detail(self._unit(images))

    def draw_guidance(self, mean: Tensor, white: Tensor, detail: Tensor | None = None) -> Tensor:
        """Return guidance images ``(B, C, H, W)``.

        Args:
            mean: mean intensities ``(B, C)`` in the value range.
            white: white noise ``(B, C, H, W)``.
            detail: as `guidance_detail` returns it.
        """
        return self.guidance.draw(self._unit(mean), white, detail)

    def _unit(self, values: Tensor) -> Tensor:
        """Map the value range to [0, 1]."""
        low, high = self.value_range
        return (values - low) / (high - low)

    def operator(self, context: Context = None) -> Operator:
        return self._operator if context is None else OsmosisOperator(context, validate=False, degrees=self.degrees)

    def context_features(self, context: Context) -> Context:
        """Return v - 1, v of mean one, ``(B, C, H, W)``; None if the network does not see it.

        Raises: UserError without a context.
        """
        if self.context_channels == 0:
            return None
        if context is None:
            raise UserError(f"{type(self).__name__} needs a guidance image: pass context=process.context(x_0)")
        return _mean_one(context) - 1

    def steady_state(self, mean: Tensor, context: Context = None) -> Tensor:
        """Return v times `mean`, v of mean one."""
        flat = super().steady_state(mean)
        return flat if context is None else _mean_one(context) * flat


def _mean_one(context: Tensor) -> Tensor:
    return context / context.mean((-2, -1), keepdim=True)


class OsmosisFilter(Osmosis):
    """The osmosis filter, without noise: Sect. 6.2, Peter 2024 (Weickert et al. 2013)."""

    def __init__(
        self,
        num_scales: int = 200,
        blur: BlurSchedule | None = None,
        guidance_noise: float = 0.1,
        guidance_min: float = 1e-6,
        guidance_pattern: str = "white",
        guidance_blur_sigma: float = 2.0,
        guidance_image: str = "none",
        guidance_input: bool = True,
        tolerance: float = 1e-6,
        value_range: Sequence[float] = (0.0, 1.0),
    ) -> None:
        guidance = Guidance(
            guidance_noise, guidance_min, guidance_pattern, guidance_blur_sigma, guidance_image, guidance_input
        )
        super().__init__(
            num_scales, NoNoise(), LogBlur() if blur is None else blur, 0.0, value_range, guidance, tolerance
        )


class InverseOsmosis(Osmosis):
    """Osmosis with the same small noise at every scale: the counterpart of inverse heat dissipation."""

    def __init__(
        self,
        num_scales: int = 200,
        noise: NoiseSchedule | None = None,
        blur: BlurSchedule | None = None,
        guidance_noise: float = 0.1,
        guidance_min: float = 1e-2,
        guidance_pattern: str = "white",
        guidance_blur_sigma: float = 2.0,
        guidance_image: str = "none",
        guidance_input: bool = True,
        tolerance: float = 1e-6,
        value_range: Sequence[float] = (0.0, 1.0),
        color: Color | None = None,
    ) -> None:
        noise, blur = ConstantNoise() if noise is None else noise, LogBlur() if blur is None else blur
        guidance = Guidance(
            guidance_noise, guidance_min, guidance_pattern, guidance_blur_sigma, guidance_image, guidance_input
        )
        super().__init__(num_scales, noise, blur, 0.0, value_range, guidance, tolerance, color)


class OsmosisDiffusion(Osmosis):
    """Osmosis with scheduled noise: the counterpart of blurring diffusion in marginal form.

    It combines Gaussian noise with drift-diffusion between the pixels: the two readings of the Fokker-Planck equation
    (Sect. 6, Peter 2024) in one process.

    The noise schedule need not preserve variance: with a_t and T(t) the law exists for any gamma_t that does not fall.
    Neither a_t nor the decay d_t(mu) grows, so rho = lambda_t / lambda_s <= 1 at every eigenvalue in [0, 8], for every
    guidance image, and the transition's variance is beta^2 = gamma_t^2 - rho^2 gamma_s^2 >= gamma_t^2 - gamma_s^2 >= 0.
    A fixed colour multiplies it by w(mu)^2; one that changes with t is checked at every scale. With `Rectified` it is
    flow matching: lambda_t(mu) = (1 - t) d_t(mu), gamma_t = t.
    """

    def __init__(
        self,
        num_scales: int = 1000,
        noise: NoiseSchedule | None = None,
        blur: BlurSchedule | None = None,
        min_decay: float = 0.001,
        guidance_noise: float = 0.1,
        guidance_min: float = 1e-2,
        guidance_pattern: str = "white",
        guidance_blur_sigma: float = 2.0,
        guidance_image: str = "none",
        guidance_input: bool = True,
        tolerance: float = 1e-6,
        value_range: Sequence[float] = (-1.0, 1.0),
        color: Color | None = None,
    ) -> None:
        noise, blur = CosineLogSNR() if noise is None else noise, SinSquaredBlur() if blur is None else blur
        guidance = Guidance(
            guidance_noise, guidance_min, guidance_pattern, guidance_blur_sigma, guidance_image, guidance_input
        )
        super().__init__(num_scales, noise, blur, min_decay, value_range, guidance, tolerance, color)
