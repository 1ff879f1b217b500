r"""Classifier-free guidance (Ho & Salimans 2021), as a denoiser that any sampler takes.

A network trained with label dropout gives two predictions, with the label and without. Guidance extrapolates from the
second through the first,

    prediction = D(y_t) + scale (D(y_t | label) - D(y_t)),

0 is the answer without the label, 1 that with it, more than 1 exaggerates what the label says (the paper's w is
scale - 1). All targets' m_s are affine in the prediction, so the same holds for the estimates of the clean image; they
are clipped to the value range once, after guidance.

An interval keeps guidance to the scales where it helps (Kynkäänniemi et al. 2024); outside it the answer is the one
with the label. Both answers come from one call of the network, with twice the batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dpm_scales.denoisers import Denoiser, TargetDenoiser
from dpm_scales.errors import require, require_choice
from dpm_scales.operators import Operator
from dpm_scales.processes import Context
from dpm_scales.schedules import is_number

VARIABLES = ("t", "logsnr")


class ClassifierFreeGuidance(TargetDenoiser):
    """A denoiser with guidance; it shares network, process, target and spectrum with the one it is made from.

    Args:
        denoiser: trained with label dropout; that is not checked.
        null_label: what the network takes for "no label".
        scale: >= 0.
        interval: (low, high), the scales that are guided; None for all.
        variable: variable of the interval: "t", or "logsnr", log(lambda_t^2 / gamma_t^2) of the eigenvalue 0.

    Raises: UserError for values out of range, and for an interval in logSNR where the process keeps that constant.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        null_label: int,
        scale: float,
        interval: Sequence[float] | None = None,
        variable: str = "t",
    ) -> None:
        super().__init__()
        require(is_number(scale) and scale >= 0, f"guidance must be a number >= 0, got {scale!r}")
        require_choice("guidance_variable", variable, VARIABLES)
        low, high = guided_interval(interval)
        require(
            variable == "t" or interval is None or not denoiser.process.has_constant_noise(),
            f"the logSNR of {type(denoiser.process).__name__} is the same at all scales; set guidance_variable=t",
        )
        self.network, self.process, self.target = denoiser.network, denoiser.process, denoiser.target
        self.spectrum, self._answer = denoiser.spectrum, denoiser.predict
        self.null_label, self.scale, self.low, self.high = null_label, float(scale), low, high
        self.variable = variable

    def predict(
        self, operator: Operator, y_t: Tensor, t: Tensor, context: Context = None, labels: Tensor | None = None
    ) -> Tensor:
        """Return the guided prediction in the target's terms."""
        null = torch.full((y_t.shape[0],), self.null_label, dtype=torch.int64, device=y_t.device)
        everywhere = self.low == -math.inf and self.high == math.inf
        if labels is None or (self.scale == 0 and everywhere):
            return self._answer(operator, y_t, t, context, null)
        if self.scale == 1:
            return self._answer(operator, y_t, t, context, labels)
        both = None if context is None else torch.cat([context, context])
        twice = self._answer(
            self.process.operator(both), torch.cat([y_t, y_t]), torch.cat([t, t]), both, torch.cat([labels, null])
        )
        labelled, plain = twice.chunk(2)
        guided = torch.lerp(plain, labelled, self.scale)
        return guided if everywhere else torch.where(self._inside(t)[:, None, None, None], guided, labelled)

    def _inside(self, t: Tensor) -> Tensor:
        """Return which of the scales ``(B,)`` are guided, as a mask."""
        place = t
        if self.variable == "logsnr":
            place = self.process.log_snr(t, torch.zeros(1, dtype=torch.float64, device=t.device)).reshape(t.shape)
        return (place >= self.low) & (place <= self.high)


def guided_interval(interval: Sequence[float] | None) -> tuple[float, float]:
    """Return the interval of scales that are guided, all for None. Raises UserError unless it is [low, high]."""
    if interval is None:
        return -math.inf, math.inf
    ok = isinstance(interval, Sequence) and len(interval) == 2 and all(is_number(v) for v in interval)
    require(ok and interval[0] <= interval[1], f"guidance_interval must be [low,high] or null, got {interval!r}")
    return float(interval[0]), float(interval[1])
