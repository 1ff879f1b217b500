r"""The colour of the noise that a sampler adds: eps' becomes beta_t(-Laplacian) eps' (arXiv 2605.30332).

Inexact by design: a step of the reverse process adds as much noise at each frequency as the law of scale s requires,
and with an ideal denoiser ends in that law; coloured, it adds more at some frequencies and less at others. The noise
per pixel does not change: the mean of beta^2 over the spectrum of the image is 1.

beta is a curve over the eigenvalues of -Laplacian, in the DCT of the generated images, whatever the process's operator:
the noise of a step is b(L) beta_t(-Laplacian) eps', with b(L) as in `samplers`, including the process's own colour.
With an operator that is diagonal in the DCT, and with the pixel operator, that is b beta at each frequency. t is the
scale from which the step starts or, for churn, the scale to which it leads.
"""

from __future__ import annotations

from copy import deepcopy

import torch
from torch import Tensor

from dpm_scales.denoisers import BaseDenoiser
from dpm_scales.errors import require
from dpm_scales.operators import HeatOperator
from dpm_scales.schedules import Color

_DCT = HeatOperator()


def require_color(color: object) -> None:
    """Raise UserError unless `color` is a colour of unit energy."""
    require(
        isinstance(color, Color), f"noise_color={color!r:.100} is no colour; see dpm_scales.schedules, or leave it out"
    )
    energy = getattr(color, "energy", "unit")
    require(
        energy == "unit",
        f"noise_color: {type(color).__name__} has energy={energy!r}, but steps add as much noise as white noise; set "
        "energy=unit",
    )


class StepColor:
    """beta_t for images of one size, on their device.

    Args:
        color: a colour of unit energy, which is copied.
        denoiser: provides the power of the training images, for a colour that `learns`.
        size: (H, W) of the images.
        device: device of the images.

    Raises: UserError for a colour that vanishes or overflows at some frequency.
    """

    def __init__(
        self, color: Color, denoiser: BaseDenoiser, size: tuple[int, int], device: torch.device | str | None = None
    ) -> None:
        own, power = deepcopy(color), denoiser.spectrum
        own.fit(lambda mu: power(mu.to(power.std.device)).to(mu.device))
        own.bind_spectrum(_DCT.eigenvalues(*size))
        self.is_white = own.contrast() == 0
        self.color = own.to(device)

    def tint(self, t: Tensor, white: Tensor) -> Tensor:
        """Return beta_t(-Laplacian) eps', ``(B, C, H, W)``; exactly eps' if beta is 1.

        Args:
            t: the scale, ``()``.
            white: eps' ``(B, C, H, W)``.
        """
        if self.is_white:
            return white
        return _DCT.apply(lambda mu: self.color.log(t.reshape((1,) * mu.ndim), mu).exp(), white)
