"""Scales, the functions of mu that lead from one to another and back, and the resulting Gaussians."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dpm_scales.errors import require
from dpm_scales.operators import Operator, SpectralFunction
from dpm_scales.schedules import Clock

Scale = Tensor | float


def as_scale(t: Scale, like: Tensor | None = None) -> Tensor:
    """Return t as a float64 tensor, on `like`'s device if it is a Python number."""
    if isinstance(t, Tensor):
        return t.to(torch.float64)
    require(0 <= t <= 1, f"a scale t must lie in [0, 1], got {t}")
    return torch.full((), float(t), dtype=torch.float64, device=None if like is None else like.device)


def few_scales(scales: Tensor, number: int) -> Tensor:
    """Return at most `number` of the scales, evenly spread, with the first and the last."""
    return scales[torch.linspace(0, len(scales) - 1, min(len(scales), number)).round().long()]


@dataclass(frozen=True)
class Gaussian:
    """A Gaussian on images: `mean` in pixels ``(B, C, H, W)``, `std` a function of mu in whitened coordinates."""

    mean: Tensor
    std: SpectralFunction
    operator: Operator

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Draw one image each: ``(B, C, H, W)`` in pixels."""
        noise = torch.randn(self.mean.shape, generator=generator, dtype=self.mean.dtype, device=self.mean.device)
        return self.mean + self.operator.to_pixels(self.operator.apply(self.std, noise))


class Curves(Protocol):
    """The curves of a process, see `Process`."""

    @property
    def clock(self) -> Clock | None:
        """Return the time of each eigenvalue, or None if all have the same."""

    def log_signal_scale(self, t: Tensor, mu: Tensor) -> Tensor:
        """Return log lambda_t(mu)."""

    def noise_scale(self, t: Tensor, mu: Tensor) -> Tensor:
        """Return gamma_t(mu)."""

    def log_noise_scale(self, t: Tensor, mu: Tensor) -> Tensor:
        """Return log gamma_t(mu)."""


@dataclass(frozen=True)
class Step:
    """The functions of mu between two scales s <= t; each maps mu to ``mu.shape`` or ``(B, 1, *mu.shape)``."""

    process: Curves
    s: Tensor
    t: Tensor

    def signal_s(self, mu: Tensor) -> Tensor:
        """Return lambda_s."""
        return torch.exp(self.process.log_signal_scale(self.s, mu))

    def signal_t(self, mu: Tensor) -> Tensor:
        """Return lambda_t."""
        return torch.exp(self.process.log_signal_scale(self.t, mu))

    def noise_s(self, mu: Tensor) -> Tensor:
        """Return gamma_s."""
        return self.process.noise_scale(self.s, mu)

    def noise_t(self, mu: Tensor) -> Tensor:
        """Return gamma_t."""
        return self.process.noise_scale(self.t, mu)

    def log_rho(self, mu: Tensor) -> Tensor:
        """Return log(lambda_t / lambda_s)."""
        return self.process.log_signal_scale(self.t, mu) - self.process.log_signal_scale(self.s, mu)

    def rho(self, mu: Tensor) -> Tensor:
        """Return lambda_t / lambda_s, in (0, 1]."""
        return torch.exp(self.log_rho(mu))

    def half_log_snr_gain(self, mu: Tensor) -> Tensor:
        """Return h = (l_s - l_t) / 2 >= 0, the step of exponential integrators; +inf where scale s has no noise."""
        return -self.log_rho(mu) - self._log_noise_ratio(mu)

    def transition_std(self, mu: Tensor) -> Tensor:
        """Return beta with beta^2 = gamma_t^2 - rho^2 gamma_s^2."""
        variance = self.noise_t(mu) ** 2 - self.rho(mu) ** 2 * self.noise_s(mu) ** 2
        return variance.clamp(min=0).sqrt()

    def tau(self, mu: Tensor) -> Tensor:
        """Return 1 - exp(l_t - l_s), in [0, 1]; 1 where scale s has no noise."""
        return -torch.expm1(-2 * self.half_log_snr_gain(mu).clamp(min=0))

    def posterior_coef_xt(self, mu: Tensor) -> Tensor:
        """Return a = gamma_s sqrt(1 - tau) / gamma_t = rho gamma_s^2 / gamma_t^2, the weight of y_t in the mean."""
        return torch.exp(self.log_rho(mu) + 2 * self._log_noise_ratio(mu))

    def posterior_coef_x0(self, mu: Tensor) -> Tensor:
        """Return lambda_s - a lambda_t = lambda_s tau, the weight of y_0 in the mean, without cancellation."""
        return self.signal_s(mu) * self.tau(mu)

    def posterior_std(self, mu: Tensor) -> Tensor:
        """Return gamma_s sqrt(tau)."""
        return self.noise_s(mu) * self.tau(mu).sqrt()

    def noise_ratio(self, mu: Tensor) -> Tensor:
        """Return gamma_s / gamma_t; 0 where scale s has no noise."""
        return torch.exp(self._log_noise_ratio(mu))

    def _log_noise_ratio(self, mu: Tensor) -> Tensor:
        """Return log(gamma_s / gamma_t); -inf where scale s has no noise, and by convention where neither has.

        Where a clock has not started at either scale, y is still the image at both: the ratio is 1.
        """
        log_s, log_t = self.process.log_noise_scale(self.s, mu), self.process.log_noise_scale(self.t, mu)
        ratio = torch.where(torch.isneginf(log_s), log_s, log_s - log_t)
        return ratio if self.process.clock is None else torch.where(torch.isneginf(log_t), 0.0, ratio)
