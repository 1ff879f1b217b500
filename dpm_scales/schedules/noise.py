"""Noise schedules: signal and noise scales at the eigenvalue 0."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from dpm_scales.errors import UserError, is_number, require, require_finite, require_positive
from dpm_scales.schedules.base import Schedule, numbers_of, require_ordered


class NoiseSchedule(Schedule):
    """Signal and noise scales a_t and gamma_t at the eigenvalue 0.

    Scale 0 is the image: a_0 = 1 and gamma_0 = 0, log gamma_0 = -inf.
    """

    @abstractmethod
    def forward(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return log a_t and log gamma_t, float64, of the shape of the scales t in [0, 1]; a_t never increases."""


class _LogSNR(NoiseSchedule):
    """Variance preserving, a^2 + gamma^2 = 1, given by logSNR = log(a^2 / gamma^2).

    Published curves end at t = 0 with a finite logSNR, a little noise and a < 1. They apply from the first scale of the
    chain, k >= 1; before it gamma^2 / a^2 falls linearly to 0, so that scale 0 is the image.
    """

    @abstractmethod
    def log_snr(self, t: Tensor) -> Tensor:
        """Return the published curve, in nats, float64."""

    def forward(self, t: Tensor) -> tuple[Tensor, Tensor]:
        log_snr = self.log_snr(t) - torch.log(self._before_first(t))
        return 0.5 * F.logsigmoid(log_snr), 0.5 * F.logsigmoid(-log_snr)


class CosineLogSNR(_LogSNR):
    """logSNR(t) = -2 log tan(a + t (b - a)), a and b such that it falls from `logsnr_max` to `logsnr_min` at t = 1.

    Args:
        logsnr_min, logsnr_max: logSNR at both ends before the shift, in nats.
        shift: factor on the signal-to-noise amplitude, 32 / d for d-pixel images ("simple diffusion").
    """

    def __init__(self, logsnr_min: float = -10.0, logsnr_max: float = 10.0, shift: float = 1.0) -> None:
        super().__init__()
        require_positive(self, shift=shift)
        require_finite(self, logsnr_min=logsnr_min, logsnr_max=logsnr_max)
        if not logsnr_min < logsnr_max:
            raise UserError(f"CosineLogSNR: logsnr_min={logsnr_min:g} must be below logsnr_max={logsnr_max:g}")
        self.logsnr_min, self.logsnr_max, self.shift = logsnr_min, logsnr_max, shift

    def log_snr(self, t: Tensor) -> Tensor:
        start = math.atan(math.exp(-0.5 * self.logsnr_max))
        end = math.atan(math.exp(-0.5 * self.logsnr_min))
        angle = start + t.to(torch.float64) * (end - start)
        return -2 * torch.log(torch.tan(angle)) + 2 * math.log(self.shift)


class SigmoidSignal(_LogSNR):
    """a_t^2 = (s(end) - s(start + t (end - start))) / (s(end) - s(start)), s(x) = sigmoid(x / tau), >= `minimum`."""

    def __init__(self, start: float = -3.0, end: float = 3.0, tau: float = 1.0, minimum: float = 1e-5) -> None:
        super().__init__()
        require_positive(self, tau=tau, minimum=minimum)
        require_finite(self, start=start, end=end)
        if not start < end:
            raise UserError(f"SigmoidSignal: start={start:g} must be below end={end:g}")
        require(minimum < 0.5, f"SigmoidSignal: minimum must be below 0.5, got {minimum:g}")
        self.start, self.end, self.tau, self.minimum = start, end, tau, minimum

    def log_snr(self, t: Tensor) -> Tensor:
        first, last = (1 / (1 + math.exp(-x / self.tau)) for x in (self.start, self.end))
        now = torch.sigmoid((self.start + t.to(torch.float64) * (self.end - self.start)) / self.tau)
        signal = ((last - now) / (last - first)).clamp(self.minimum, 1 - self.minimum)
        return torch.logit(signal)


class ListedBeta(NoiseSchedule):
    """Variance preserving chain U_k = sqrt(1 - beta_k^2) U_{k-1} + beta_k G, any beta_k in [0, 1) (Eq. (7), (16))."""

    def __init__(self, betas: Sequence[float]) -> None:
        super().__init__()
        self.betas = self._checked(numbers_of(self, "betas", betas))

    def _checked(self, betas: list[float]) -> list[float]:
        for k, beta in enumerate(betas, start=1):
            require(beta < 1, f"{type(self).__name__}: beta at scale k={k} is {beta:g}; it must lie in [0, 1)")
        return betas

    def bind(self, num_scales: int) -> None:
        self._fits("betas", self.betas, num_scales)
        super().bind(num_scales)
        betas = torch.tensor(self.betas, dtype=torch.float64)
        self._tabulate(F.pad(torch.cumsum(0.5 * torch.log1p(-(betas**2)), 0), (1, 0)))

    def forward(self, t: Tensor) -> tuple[Tensor, Tensor]:
        log_signal = self._interpolate(t)
        return log_signal, 0.5 * torch.log(-torch.expm1(2 * log_signal))


class ConstantBeta(ListedBeta):
    """A chain of steps with the same beta (the paper's experiments: 0.1).

    Args:
        beta: standard deviation of the noise of one step, in (0, 1).
        steps: number of steps of the chain from 0 to each scale, ascending; None for one step per scale.
    """

    def __init__(self, beta: float = 0.1, steps: Sequence[float] | None = None) -> None:
        require_positive(self, beta=beta)
        super().__init__([beta])
        self.beta, self.steps = beta, None if steps is None else numbers_of(self, "steps", steps)
        if self.steps is not None:
            require(sorted(self.steps) == self.steps, f"ConstantBeta: steps must be ascending, got {self.steps}")

    def bind(self, num_scales: int) -> None:
        steps = [float(k) for k in range(1, num_scales + 1)] if self.steps is None else self.steps
        self._fits("steps", steps, num_scales)
        NoiseSchedule.bind(self, num_scales)
        log_keep = math.log1p(-(self.beta**2))
        taken = [b - a for a, b in zip([0.0, *steps], steps, strict=False)]
        self.betas = [math.sqrt(-math.expm1(number * log_keep)) for number in taken]
        # not from the betas: the beta of thousands of steps rounds to 1
        self._tabulate([0.0, *(0.5 * log_keep * k for k in steps)])


class LinearBeta(ListedBeta):
    """DDPM's chain: beta_k^2 linear from `ddpm_beta_min` to `ddpm_beta_max` (Ho et al. 2020: 1e-4, 0.02, K = 1000)."""

    def __init__(self, ddpm_beta_min: float = 1e-4, ddpm_beta_max: float = 0.02) -> None:
        require_ordered(self, "ddpm_beta_min", ddpm_beta_min, "ddpm_beta_max", ddpm_beta_max)
        super().__init__([math.sqrt(ddpm_beta_min), math.sqrt(ddpm_beta_max)])
        self.ddpm_beta_min, self.ddpm_beta_max = ddpm_beta_min, ddpm_beta_max

    def bind(self, num_scales: int) -> None:
        variances = torch.linspace(self.ddpm_beta_min, self.ddpm_beta_max, num_scales, dtype=torch.float64)
        self.betas = variances.sqrt().tolist()
        super().bind(num_scales)


class Rectified(NoiseSchedule):
    """Flow matching's straight path: a_t = 1 - t, gamma_t = t (Lipman et al. 2023; Liu et al. 2023).

    Here a_t = 1 - (1 - signal_min) t, so that logSNR stays finite at t = 1, where y_1 is noise plus `signal_min` times
    the image, by default far below float32's resolution.

    Args:
        signal_min: a_1, in (0, 1); 1e-4 for paths that end before pure noise, as in HDFM (arXiv 2605.19371).
    """

    def __init__(self, signal_min: float = 1e-12) -> None:
        super().__init__()
        ok = is_number(signal_min) and 0 < signal_min < 1
        require(ok, f"Rectified: signal_min must lie in (0, 1), got {signal_min!r}")
        self.signal_min = float(signal_min)

    def forward(self, t: Tensor) -> tuple[Tensor, Tensor]:
        t = t.to(torch.float64)
        return torch.log1p(-(1 - self.signal_min) * t), torch.log(t)


class _Exploding(NoiseSchedule):
    """Variance exploding, a = 1: only the noise grows, gamma_t^2 given by `variance`."""

    @abstractmethod
    def variance(self, t: Tensor) -> Tensor: ...

    def forward(self, t: Tensor) -> tuple[Tensor, Tensor]:
        variance = self.variance(t)
        return torch.zeros_like(variance), 0.5 * torch.log(variance)


class GeometricNoise(_Exploding):
    """gamma_k log-spaced from `noise_min` at k = 1 to `noise_max` (Song et al. 2021), in units of the images."""

    def __init__(self, noise_min: float = 0.002, noise_max: float = 80.0) -> None:
        super().__init__()
        require_ordered(self, "noise_min", noise_min, "noise_max", noise_max)
        self.noise_min, self.noise_max = noise_min, noise_max

    def variance(self, t: Tensor) -> Tensor:
        return self._log_ramp_squared(t, self.noise_min, self.noise_max)


class EDMNoise(_Exploding):
    """gamma^(1/rho) linear in k from `noise_min` at k = 1 to `noise_max` at t = 1 (Karras et al. 2022, Eq. (5))."""

    def __init__(self, noise_min: float = 0.002, noise_max: float = 80.0, rho: float = 7.0) -> None:
        super().__init__()
        require_ordered(self, "noise_min", noise_min, "noise_max", noise_max)
        require_positive(self, rho=rho)
        self.noise_min, self.noise_max, self.rho = noise_min, noise_max, rho

    def variance(self, t: Tensor) -> Tensor:
        t = t.to(torch.float64)
        low, high = self.noise_min ** (1 / self.rho), self.noise_max ** (1 / self.rho)
        return (low + self._progress(t) * (high - low)) ** (2 * self.rho) * self._before_first(t)


class ListedNoise(_Exploding):
    """Any gamma_k, one per scale, non-decreasing, in units of the images."""

    def __init__(self, noise_scales: Sequence[float]) -> None:
        super().__init__()
        self.noise_scales = numbers_of(self, "noise_scales", noise_scales)

    def bind(self, num_scales: int) -> None:
        self._fits("noise_scales", self.noise_scales, num_scales)
        super().bind(num_scales)
        self._tabulate([0.0, *(g * g for g in self.noise_scales)])

    def variance(self, t: Tensor) -> Tensor:
        return self._interpolate(t)


class ConstantNoise(_Exploding):
    """The same gamma = `noise_std` at every scale but 0 (IHDM: 0.01 for images in [0, 1])."""

    def __init__(self, noise_std: float = 0.01) -> None:
        super().__init__()
        require_positive(self, noise_std=noise_std)
        self.noise_std = noise_std

    def variance(self, t: Tensor) -> Tensor:
        return self.noise_std**2 * self._before_first(t)


class NoNoise(_Exploding):
    """gamma = 0: a deterministic scale-space."""

    def variance(self, t: Tensor) -> Tensor:
        return torch.zeros_like(t, dtype=torch.float64)
