r"""The concrete processes, which differ only in their operator and their two schedules:

| process | lambda_t(mu) | gamma_t(mu) |
|---|---|---|
| VP | a_t | sqrt(1 - a_t^2) |
| VE | 1 | growing |
| Homogeneous | exp(-mu T) | 0 |
| InverseHeat | exp(-mu T) | constant |
| Blurring (marginal form) | a_t ((1 - d_min) exp(-mu T) + d_min) | sqrt(1 - a_t^2) |
| Spectral | any a_t, blur and clock | any noise, colour and clock |
| Warm | exp(-mu (b sigma_t)^2 / 2) | sigma_t |
| BlurringChain, Eq. (36) | prod exp(-mu dT) | gamma_k^2 = exp(-2 mu dT) gamma_{k-1}^2 + beta_k^2 |

The noise of VP, VE, Blurring, InverseHeat and Spectral can have a colour, and their eigenvalues a clock; VP and VE then
use the heat operator, without blur.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from dpm_scales.operators import HeatOperator, LogCurve, Operator, PixelOperator, SpectralFunction
from dpm_scales.processes.kept import kept_curve
from dpm_scales.processes.law import Process
from dpm_scales.processes.steps import Scale
from dpm_scales.schedules import (
    BlurSchedule,
    Clock,
    Color,
    ConstantNoise,
    CosineLogSNR,
    EDMNoise,
    LogBlur,
    NoiseBlur,
    NoiseSchedule,
    NoNoise,
    Rectified,
    SinSquaredBlur,
    require_positive,
)


def _plain(color: Color | None, clock: Clock | None) -> Operator:
    """Return L = 0, or the heat operator where frequencies differ by their noise or their time."""
    return PixelOperator() if color is None and clock is None else HeatOperator()


class VP(Process):
    """Variance-preserving DPM: L = 0, a^2 + gamma^2 = 1 (Eq. (3), (16); default: cosine logSNR)."""

    variance_preserving: ClassVar[bool] = True

    def __init__(
        self,
        num_scales: int = 1000,
        noise: NoiseSchedule | None = None,
        value_range: Sequence[float] = (-1.0, 1.0),
        color: Color | None = None,
        clock: Clock | None = None,
    ) -> None:
        noise = CosineLogSNR() if noise is None else noise
        super().__init__(_plain(color, clock), num_scales, noise, value_range=value_range, color=color, clock=clock)


class VE(Process):
    """Variance-exploding DPM: L = 0, a = 1 (default: EDM's noise levels for images of about unit variance)."""

    def __init__(
        self,
        num_scales: int = 1000,
        noise: NoiseSchedule | None = None,
        value_range: Sequence[float] = (-1.0, 1.0),
        color: Color | None = None,
        clock: Clock | None = None,
    ) -> None:
        noise = EDMNoise() if noise is None else noise
        super().__init__(_plain(color, clock), num_scales, noise, value_range=value_range, color=color, clock=clock)


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
        color: Color | None = None,
        clock: Clock | None = None,
    ) -> None:
        super().__init__(
            HeatOperator(spectrum),
            num_scales,
            ConstantNoise() if noise is None else noise,
            LogBlur() if blur is None else blur,
            value_range=value_range,
            color=color,
            clock=clock,
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
        color: Color | None = None,
        clock: Clock | None = None,
    ) -> None:
        super().__init__(
            HeatOperator(spectrum),
            num_scales,
            CosineLogSNR() if noise is None else noise,
            SinSquaredBlur() if blur is None else blur,
            min_decay,
            value_range,
            color,
            clock,
        )


class Spectral(Process):
    """Any curves on the heat operator: signal and noise, blur, colour of the noise, and clock, chosen independently.

    Flow matching (`Rectified`), HDFM (`Rectified` and `FlowBlur`), EqualSNR (`DataPower`), SAGD (`PowerLaw`),
    Flicker-DDPM (`KernelColor`), low-pass flow (`LowPass`), GUD (`SpectralClock`) and scale-space diffusion (`CutOff`)
    are configs of it.

    Args:
        num_scales, noise, blur, min_decay, value_range, color, clock: as for `Process`.
        spectrum: spectrum of the heat operator, "continuous" or "discrete".

    Raises: UserError as `Process` does.
    """

    def __init__(
        self,
        num_scales: int = 1000,
        noise: NoiseSchedule | None = None,
        blur: BlurSchedule | None = None,
        color: Color | None = None,
        clock: Clock | None = None,
        min_decay: float = 0.0,
        spectrum: str = "continuous",
        value_range: Sequence[float] = (-1.0, 1.0),
    ) -> None:
        noise = Rectified() if noise is None else noise
        super().__init__(HeatOperator(spectrum), num_scales, noise, blur, min_decay, value_range, color, clock)


class Warm(Process):
    """Blur in proportion to the noise: blur_sigma = b gamma_t px (Warm Diffusion, arXiv 2511.16904).

    Args:
        blur_ratio: b >= 0 px per unit of noise; 0 gives VE; published values are 0.5 to 2.
        num_scales, noise, value_range, color: as for `Process`; by default `noise` has EDM's levels.
        spectrum: spectrum of the heat operator, "continuous" or "discrete".

    Raises: UserError as `Process` does.
    """

    deterministic_sampling: ClassVar[bool] = True

    def __init__(
        self,
        num_scales: int = 1000,
        noise: NoiseSchedule | None = None,
        blur_ratio: float = 0.5,
        spectrum: str = "continuous",
        value_range: Sequence[float] = (-1.0, 1.0),
        color: Color | None = None,
    ) -> None:
        noise = EDMNoise() if noise is None else noise
        blur = NoiseBlur(noise, blur_ratio)
        super().__init__(HeatOperator(spectrum), num_scales, noise, blur, 0.0, value_range, color)


class BlurringChain(Process):
    r"""Blurring diffusion in chain form, Eq. (36): U_k = exp(-mu dT_k) U_{k-1} + beta G, one beta for every mu.

    So gamma_k^2(mu) = exp(-2 mu dT_k) gamma_{k-1}^2 + beta^2: it grows without bound at mu = 0 and converges elsewhere
    (the corrected Prop. 10); where the steps of T grow it even falls, so no Lyapunov property is promised.
    Scales between k and k + 1 take a fraction of the step: T from the schedule, beta^2 in proportion.
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

    def white_signal(self, t: Scale) -> SpectralFunction:
        """Return w_t^-1 lambda_t with w_t = gamma_t(mu) / gamma_t(0): the chain's blur colours its noise."""
        t, signal = self._scale(t), self.signal(t)
        return LogCurve(lambda mu: signal.log(mu) - self.log_noise_scale(t, mu) + self.log_noise_scale(t, 0 * mu))

    @kept_curve
    def log_noise_scale(self, t: Tensor, mu: Tensor) -> Tensor:
        assert self.blur is not None
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


def title_of(process: Process) -> str:
    """Return the name to show for a process: its class and the curves that it leaves open, ``Spectral (Rectified)``."""
    own = (process.noise, process.blur) if type(process) is Spectral else ()
    curves = (*own, process.color, process.clock)
    names = ", ".join(type(curve).__name__ for curve in curves if curve is not None)
    return f"{type(process).__name__} ({names})" if names else type(process).__name__
