r"""Guidance as denoisers that any sampler takes: the prediction is led away from a worse one.

    prediction = other + w (D(y_t | label) - other)

| class | other | source |
|---|---|---|
| ClassifierFreeGuidance | D(y_t), the same network without the label | Ho & Salimans 2021 |
| Autoguidance | the prediction of a guide, a worse model of the same process | Karras et al. 2024 |

0 is the other answer, 1 the model's own, more than 1 exaggerates the difference (Ho & Salimans' w is ours - 1). All
targets' m_s are affine in the prediction, so the same holds for the estimates of the clean image; they are clipped to
the value range once, after guidance.

w is a number, or a curve of the radial frequency (`guidance.curves`) by which the DCT of the difference is multiplied.
With an operator that is diagonal in the DCT that is the DCT of the estimates' difference, for every target; under
osmosis it is so for predictions of the image, while predictions of noise are filtered in whitened coordinates.

An interval keeps guidance to the scales where it helps (Kynkäänniemi et al. 2024); outside it the answer is the
model's, and samplers evaluate nothing else in steps that lie outside. Each evaluation is one call of each network: the
label's answer and the one without it share a batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dpm_scales.denoisers import BaseDenoiser, Denoiser, TargetDenoiser
from dpm_scales.errors import require, require_choice
from dpm_scales.guidance.curves import GuidanceCurve
from dpm_scales.operators import HeatOperator, Operator
from dpm_scales.processes import Context
from dpm_scales.schedules import is_number
from dpm_scales.schedules.color import frequency

VARIABLES = ("t", "logsnr")

_DCT = HeatOperator()


class Guided(TargetDenoiser):
    """A denoiser with guidance; it shares network, process, target and spectrum with the one it is made from.

    Args:
        denoiser: the one whose answer is exaggerated.
        scale: w, a number >= 0 or a curve.
        interval: (low, high), the scales that are guided; None for all.
        variable: variable of the interval: "t", or "logsnr", log(lambda_t^2 / gamma_t^2) of the eigenvalue 0.

    Raises: UserError for values out of range, and for an interval in logSNR where the process keeps that constant.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        scale: float | GuidanceCurve,
        interval: Sequence[float] | None = None,
        variable: str = "t",
    ) -> None:
        super().__init__()
        if isinstance(scale, GuidanceCurve):
            scale.check()
        else:
            require(is_number(scale) and scale >= 0, f"guidance must be a number >= 0 or a curve, got {scale!r}")
        require_choice("guidance_variable", variable, VARIABLES)
        low, high = guided_interval(interval)
        require(
            variable == "t" or interval is None or not denoiser.process.has_constant_noise(),
            f"the logSNR of {type(denoiser.process).__name__} is the same at all scales; set guidance_variable=t",
        )
        self.network, self.process, self.target = denoiser.network, denoiser.process, denoiser.target
        self.spectrum = denoiser.spectrum
        self._own = (denoiser,)  # in a tuple, since its weights are this module's already
        self.error_variance = denoiser.error_variance
        self.scale = scale if isinstance(scale, GuidanceCurve) else float(scale)
        self.low, self.high, self.variable = low, high, variable

    @property
    def own(self) -> Denoiser:
        """The denoiser whose answer is exaggerated."""
        return self._own[0]

    @property
    def everywhere(self) -> bool:
        """Whether all scales are guided."""
        return self.low == -math.inf and self.high == math.inf

    def for_steps(self, starts: Tensor, ends: Tensor, labels: Tensor | None = None) -> Sequence[BaseDenoiser]:
        """Return the model's own denoiser for steps whose scales are all on one side of the interval, else this one."""
        if self.everywhere:
            return super().for_steps(starts, ends, labels)
        start, end = self._place(starts), self._place(ends)
        outside = (torch.maximum(start, end) < self.low) | (torch.minimum(start, end) > self.high)
        return [self.own if alone else self for alone in outside.tolist()]

    def _guided(self, t: Tensor, answer: Tensor, other: Tensor) -> Tensor:
        """Return the prediction led away from `other`, all ``(B, C, H, W)``, for scales t ``(B,)``."""
        if isinstance(self.scale, GuidanceCurve):
            curve = self.scale
            guided = other + _DCT.apply(lambda mu: curve(frequency(mu)), answer - other)
        else:
            guided = torch.lerp(other, answer, self.scale)
        return guided if self.everywhere else torch.where(self._inside(t)[:, None, None, None], guided, answer)

    def _inside(self, t: Tensor) -> Tensor:
        """Return which of the scales ``(B,)`` are guided, as a mask."""
        place = self._place(t)
        return (place >= self.low) & (place <= self.high)

    def _place(self, t: Tensor) -> Tensor:
        """Return the interval's variable at scales ``(B,)``."""
        if self.variable == "t":
            return t
        zero = torch.zeros(1, dtype=torch.float64, device=t.device)
        return self.process.log_snr(t, zero).reshape(t.shape)


class ClassifierFreeGuidance(Guided):
    """A denoiser led away from its own answer without the label.

    Args:
        denoiser: trained with label dropout; that is not checked.
        null_label: what the network takes for "no label".
        scale, interval, variable: as for `Guided`.

    Raises: as `Guided`.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        null_label: int,
        scale: float | GuidanceCurve,
        interval: Sequence[float] | None = None,
        variable: str = "t",
    ) -> None:
        super().__init__(denoiser, scale, interval, variable)
        self.null_label = null_label

    def for_steps(self, starts: Tensor, ends: Tensor, labels: Tensor | None = None) -> Sequence[BaseDenoiser]:
        """Return the denoisers as `Guided` does; without labels always this one, since it answers for no label."""
        return [self] * len(starts) if labels is None else super().for_steps(starts, ends, labels)

    def predict(
        self, operator: Operator, y_t: Tensor, t: Tensor, context: Context = None, labels: Tensor | None = None
    ) -> Tensor:
        """Return the guided prediction in the target's terms."""
        null = torch.full((y_t.shape[0],), self.null_label, dtype=torch.int64, device=y_t.device)
        if labels is None or (self.scale == 0 and self.everywhere):
            return self.own.predict(operator, y_t, t, context, null)
        if self.scale == 1:
            return self.own.predict(operator, y_t, t, context, labels)
        both = None if context is None else torch.cat([context, context])
        twice = self.own.predict(
            self.process.operator(both), torch.cat([y_t, y_t]), torch.cat([t, t]), both, torch.cat([labels, null])
        )
        labelled, plain = twice.chunk(2)
        return self._guided(t, labelled, plain)


class Autoguidance(Guided):
    """A denoiser led away from the answer of a guide, a worse model of the same process (Karras et al. 2024).

    Args:
        denoiser: as for `Guided`.
        guide: of an equal process and the same kind of target; that is not checked.
        scale, interval, variable: as for `Guided`.
        guide_labels: whether the guide sees the labels too; else it answers without.

    Raises: as `Guided`.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        guide: Denoiser,
        scale: float | GuidanceCurve,
        interval: Sequence[float] | None = None,
        variable: str = "t",
        guide_labels: bool = True,
    ) -> None:
        super().__init__(denoiser, scale, interval, variable)
        self.guide, self.guide_labels = guide, guide_labels

    def predict(
        self, operator: Operator, y_t: Tensor, t: Tensor, context: Context = None, labels: Tensor | None = None
    ) -> Tensor:
        """Return the guided prediction in the target's terms."""
        answer = self.own.predict(operator, y_t, t, context, labels)
        other = self.guide.predict(operator, y_t, t, context, labels if self.guide_labels else None)
        return self._guided(t, answer, other)


def guided_interval(interval: Sequence[float] | None) -> tuple[float, float]:
    """Return the interval of scales that are guided, all for None. Raises UserError unless it is [low, high]."""
    if interval is None:
        return -math.inf, math.inf
    ok = isinstance(interval, Sequence) and len(interval) == 2 and all(is_number(v) for v in interval)
    require(ok and interval[0] <= interval[1], f"guidance_interval must be [low,high] or null, got {interval!r}")
    return float(interval[0]), float(interval[1])
