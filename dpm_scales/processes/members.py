r"""The members: each an operator and two schedules.

Members differ in their operator and schedules alone:

| process | lambda_t(mu) | gamma_t(mu) |
|---|---|---|
| VP | a_t | sqrt(1 - a_t^2) |
| VE | 1 | growing |
| Homogeneous | exp(-mu T) | 0 |
| InverseHeat | exp(-mu T) | constant |
| Blurring (marginal form) | a_t ((1 - d_min) exp(-mu T) + d_min) | sqrt(1 - a_t^2) |
| BlurringChain, Eq. (36) | prod exp(-mu dT) | gamma_k^2 = exp(-2 mu dT) gamma_{k-1}^2 + beta_k^2 |
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from dpm_scales.operators import HeatOperator, PixelOperator
from dpm_scales.processes.law import Process, Scale, as_scale
from dpm_scales.schedules import (
    BlurSchedule,
    ConstantNoise,
    CosineLogSNR,
    EDMNoise,
    LogBlur,
    NoiseSchedule,
    NoNoise,
    SinSquaredBlur,
    require_positive,
)


class VP(Process):
    """Variance-preserving DPM: L = 0, a^2 + gamma^2 = 1 (Eq. (3), (16); default: cosine logSNR)."""

    variance_preserving: ClassVar[bool] = True

    def __init__(
        self,
        num_scales: int = 1000,
        noise: NoiseSchedule | None = None,
        value_range: Sequence[float] = (-1.0, 1.0),
    ) -> None:
        super().__init__(
            PixelOperator(), num_scales, CosineLogSNR() if noise is None else noise, value_range=value_range
        )


class VE(Process):
    """Variance-exploding DPM: L = 0, a = 1 (default: EDM's noise levels for images of about unit variance)."""

    def __init__(
        self,
        num_scales: int = 1000,
        noise: NoiseSchedule | None = None,
        value_range: Sequence[float] = (-1.0, 1.0),
    ) -> None:
        super().__init__(PixelOperator(), num_scales, EDMNoise() if noise is None else noise, value_range=value_range)


class Homogeneous(Process):
    """Homogeneous diffusion without noise: x_t = exp(-T L) x_0 (Sect. 2.1)."""

    def __init__(
        self,
        num_scales: int = 200,
        blur: BlurSchedule | None = None,
        spectrum: str = "continuous",
        value_range: Sequence[float] = (0.0, 1.0),
    ) -> None:
        super().__init__(
            HeatOperator(spectrum), num_scales, NoNoise(), LogBlur() if blur is None else blur, value_range=value_range
        )


class InverseHeat(Process):
    """Inverse heat dissipation (IHDM, Rissanen et al. 2023): blur, and the same small noise at every scale.

    With noise 0.1 in place of 0.01 it is the blurring diffusion of the paper's experiments (Figs. 3 and 4).
    """

    def __init__(
        self,
        num_scales: int = 200,
        noise: NoiseSchedule | None = None,
        blur: BlurSchedule | None = None,
        spectrum: str = "continuous",
        value_range: Sequence[float] = (0.0, 1.0),
    ) -> None:
        super().__init__(
            HeatOperator(spectrum),
            num_scales,
            ConstantNoise() if noise is None else noise,
            LogBlur() if blur is None else blur,
            value_range=value_range,
        )


class Blurring(Process):
    """Blurring diffusion in marginal form (Hoogeboom & Salimans 2023): a VP schedule times a blur floored at d_min."""

    variance_preserving: ClassVar[bool] = True

    def __init__(
        self,
        num_scales: int = 1000,
        noise: NoiseSchedule | None = None,
        blur: BlurSchedule | None = None,
        min_decay: float = 0.001,
        spectrum: str = "continuous",
        value_range: Sequence[float] = (-1.0, 1.0),
    ) -> None:
        super().__init__(
            HeatOperator(spectrum),
            num_scales,
            CosineLogSNR() if noise is None else noise,
            SinSquaredBlur() if blur is None else blur,
            min_decay,
            value_range,
        )


class BlurringChain(Process):
    r"""Blurring diffusion in chain form, Eq. (36): U_k = exp(-mu dT_k) U_{k-1} + beta G, one beta for every mu.

    So gamma_k^2(mu) = exp(-2 mu dT_k) gamma_{k-1}^2 + beta^2: it grows without bound at mu = 0 and converges elsewhere
    (the corrected Prop. 10); where the steps of T grow it even falls, so no Lyapunov property is promised.
    Scales between k and k + 1 take a part of the step: T from the schedule, beta^2 in proportion.
    """

    lyapunov: ClassVar[bool] = False

    def __init__(
        self,
        num_scales: int = 200,
        step_noise: float = 0.1,
        blur: BlurSchedule | None = None,
        spectrum: str = "continuous",
        value_range: Sequence[float] = (0.0, 1.0),
    ) -> None:
        require_positive(self, step_noise=step_noise)
        self.step_noise = float(step_noise)
        super().__init__(
            HeatOperator(spectrum), num_scales, NoNoise(), LogBlur() if blur is None else blur, value_range=value_range
        )

    def log_noise_scale(self, t: Scale, mu: Tensor) -> Tensor:
        assert self.blur is not None
        t = as_scale(t, mu)
        # with s_i^2 = sum_{j <= i} beta^2 exp(2 mu T_j), gamma_i^2 = exp(-2 mu T_i) s_i^2; in logs, since s overflows
        knots = torch.arange(1, self.num_scales + 1, dtype=torch.float64, device=t.device) / self.num_scales
        exponents = 2 * mu * self.blur(knots).reshape(-1, *(1,) * mu.ndim)
        table = torch.logcumsumexp(exponents, 0)
        table = torch.cat([torch.full_like(table[:1], -torch.inf), table])
        position = t * self.num_scales
        index = position.floor()
        part = position - index
        # not table[index]: indexing with a 0-dim tensor would wait for the device
        reached = table.index_select(0, index.long().reshape(-1)).reshape((*t.shape, *mu.shape))
        carried = reached - 2 * mu * self.blur(t).reshape((*t.shape, *(1,) * mu.ndim))
        fresh = torch.log(part).reshape((*t.shape, *(1,) * mu.ndim))
        log_variance = torch.logaddexp(carried, fresh.expand_as(carried)) + 2 * math.log(self.step_noise)
        log_noise = 0.5 * log_variance
        return log_noise.unsqueeze(1) if t.ndim else log_noise
