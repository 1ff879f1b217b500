"""Blur schedules: curves of the dissipation time."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from dpm_scales.errors import require, require_positive
from dpm_scales.schedules.base import Schedule, numbers_of, require_ordered


class BlurSchedule(Schedule):
    """Dissipation time T(t) in px^2 (blur_sigma^2 / 2), non-decreasing, 0 at t = 0."""

    @abstractmethod
    def forward(self, t: Tensor) -> Tensor:
        """Return T(t) in px^2, float64, of the shape of the scales t in [0, 1]."""


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


class _ListedBlur(BlurSchedule):
    """Knots of T, one per scale."""

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
