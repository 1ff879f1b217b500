"""Blur schedules: curves of the dissipation time."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from dpm_scales.errors import is_number, require, require_positive
from dpm_scales.schedules.base import Schedule, numbers_of, require_ordered
from dpm_scales.schedules.noise import NoiseSchedule


class BlurSchedule(Schedule):
    """Dissipation time T(t) in px^2 (blur_sigma^2 / 2), non-decreasing, 0 at t = 0."""

    #: whether the blur is the Gaussian factor exp(-mu T); otherwise `log_factor` defines it
    is_gaussian: bool = True

    @abstractmethod
    def forward(self, t: Tensor) -> Tensor:
        """Return T(t) in px^2, float64, of the shape of the scales t in [0, 1]."""

    def log_factor(self, t: Tensor, mu: Tensor) -> Tensor:
        """Return the log of the factor that blur applies at each eigenvalue, before d_min, float64.

        Args:
            t: scales that broadcast against mu, ``(1, ...)`` or ``(B, 1, ...)``.
        """
        return -mu * self(t)


class LogBlur(BlurSchedule):
    """blur_sigma log-spaced from `blur_sigma_min` at k = 1 to `blur_sigma_max` px (IHDM; CIFAR-10: 0.5 to 24)."""

    def __init__(self, blur_sigma_min: float = 0.5, blur_sigma_max: float = 24.0) -> None:
        super().__init__()
        require_ordered(self, "blur_sigma_min", blur_sigma_min, "blur_sigma_max", blur_sigma_max)
        self.blur_sigma_min, self.blur_sigma_max = blur_sigma_min, blur_sigma_max

    def forward(self, t: Tensor) -> Tensor:
        return 0.5 * self._log_ramp_squared(t, self.blur_sigma_min, self.blur_sigma_max)


class SinSquaredBlur(BlurSchedule):
    """blur_sigma(t) = blur_sigma_max sin^2(pi t / 2) px (Hoogeboom & Salimans 2023)."""

    def __init__(self, blur_sigma_max: float = 20.0) -> None:
        super().__init__()
        require_positive(self, blur_sigma_max=blur_sigma_max)
        self.blur_sigma_max = blur_sigma_max

    def forward(self, t: Tensor) -> Tensor:
        return 0.5 * (self.blur_sigma_max * torch.sin(t.to(torch.float64) * (math.pi / 2)) ** 2) ** 2


class LinearTimeBlur(BlurSchedule):
    """T(t) = t dissipation_time_max px^2: plain diffusion with equal steps."""

    def __init__(self, dissipation_time_max: float = 100.0) -> None:
        super().__init__()
        require_positive(self, dissipation_time_max=dissipation_time_max)
        self.dissipation_time_max = dissipation_time_max

    def forward(self, t: Tensor) -> Tensor:
        return self.dissipation_time_max * t.to(torch.float64)


class FlowBlur(BlurSchedule):
    """T(t) = ln(1 / (1 - t)) / 2 px^2, so that (1 - t) exp(-mu T) = (1 - t)^(1 + mu / 2) (HDFM, arXiv 2605.19371).

    Args:
        signal_min: value of 1 - t at the end, as in `Rectified`; 1e-4 gives a blur sigma of 3.03 px.
    """

    def __init__(self, signal_min: float = 1e-4) -> None:
        super().__init__()
        ok = is_number(signal_min) and 0 < signal_min < 1
        require(ok, f"FlowBlur: signal_min must lie in (0, 1), got {signal_min!r}")
        self.signal_min = float(signal_min)

    def forward(self, t: Tensor) -> Tensor:
        return -0.5 * torch.log1p(-(1 - self.signal_min) * t.to(torch.float64))


class NoiseBlur(BlurSchedule):
    """blur_sigma(t) = ratio gamma_t, in proportion to the noise (Warm Diffusion, arXiv 2511.16904).

    Args:
        noise: the process's noise schedule; `Warm` passes it on.
        ratio: b >= 0 px per unit of noise, the blur-to-noise ratio.
    """

    def __init__(self, noise: NoiseSchedule, ratio: float = 0.5) -> None:
        super().__init__()
        ok = is_number(ratio) and ratio >= 0
        require(ok, f"NoiseBlur: ratio must be a number >= 0, got {ratio!r}")
        self.noise, self.ratio = noise, float(ratio)

    def bind(self, num_scales: int) -> None:
        super().bind(num_scales)
        self.noise.bind(num_scales)

    def forward(self, t: Tensor) -> Tensor:
        return 0.5 * self.ratio**2 * torch.exp(2 * self.noise(t)[1])


class CutOff(BlurSchedule):
    """An ideal low-pass: frequencies above a cut-off that falls with t keep only d_min (arXiv 2603.08709).

    The cut-off is omega_c(t) = sqrt(2) pi 2^(-levels t), from the highest frequency of the grid down by `levels`
    octaves. T(t) is that of the Gaussian blur with the factor 1/2 at omega_c.

    Args:
        levels: octaves lost at t = 1, > 0.
    """

    is_gaussian = False

    def __init__(self, levels: float = 2.0) -> None:
        super().__init__()
        require_positive(self, levels=levels)
        self.levels = float(levels)

    def cut_off(self, t: Tensor) -> Tensor:
        """Return the cut-off mu_c(t) = omega_c(t)^2 in 1/px^2."""
        return 2 * math.pi**2 * torch.exp2(-2 * self.levels * t.to(torch.float64))

    def forward(self, t: Tensor) -> Tensor:
        return torch.where(t > 0, math.log(2) / self.cut_off(t), 0.0)

    def log_factor(self, t: Tensor, mu: Tensor) -> Tensor:
        gone = mu > self.cut_off(t) * (1 + 1e-12)
        return torch.zeros_like(gone, dtype=torch.float64).masked_fill(gone, -math.inf)


class _ListedBlur(BlurSchedule):
    """Dissipation times from a list, one value per scale."""

    values: list[float]
    argument: str

    def bind(self, num_scales: int) -> None:
        self._fits(self.argument, self.values, num_scales)
        super().bind(num_scales)
        for k in range(1, num_scales):
            before, after = self.values[k - 1], self.values[k]
            require(
                after >= before,
                f"{type(self).__name__}: {self.argument} sharpen at scale k={k + 1}: {after:g} follows {before:g}; "
                "blur can only grow, so list them in increasing order",
            )
        self._tabulate([0.0, *(self.time(value) for value in self.values)])

    @staticmethod
    @abstractmethod
    def time(value: float) -> float: ...

    def forward(self, t: Tensor) -> Tensor:
        return self._interpolate(t)


class ListedBlurSigmas(_ListedBlur):
    """Any blur sigmas in px, one per scale, non-decreasing."""

    argument = "blur_sigmas"

    def __init__(self, blur_sigmas: Sequence[float]) -> None:
        super().__init__()
        self.values = numbers_of(self, self.argument, blur_sigmas)

    @staticmethod
    def time(value: float) -> float:
        return value**2 / 2


class ListedDissipationTimes(_ListedBlur):
    """Any dissipation times in px^2, one per scale, non-decreasing (the paper's experiments: 1, 5, ..., 10000)."""

    argument = "dissipation_times"

    def __init__(self, dissipation_times: Sequence[float]) -> None:
        super().__init__()
        self.values = numbers_of(self, self.argument, dissipation_times)

    @staticmethod
    def time(value: float) -> float:
        return value
