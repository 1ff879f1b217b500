"""Second moments of a scale for data of a known spectrum, and the resulting preconditioning, see `targets`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from dpm_scales.operators import Operator, SpectralFunction
from dpm_scales.processes import Process, Step
from dpm_scales.processes.checks import spanning
from dpm_scales.spectrum import DataSpectrum

# Smallest second moment, relative to Var(x_0): a scale can equal the image (the first of a list), which gives 0 / 0.
_SMALLEST = 1e-12
# Noise variance of deterministic processes, relative to Var(x_0): sharpening by more than 50 amplifies rounding errors.
_ROUNDING = 1e-4


def wiener_error(signal: Tensor, power: Tensor, noise: Tensor) -> Tensor:
    """Return P gamma^2 / (lambda^2 P + gamma^2), the error variance of the Wiener estimate of x_0.

    Args:
        signal, power, noise: lambda_t, P and gamma_t^2 at each eigenvalue.
    """
    return power * noise / (signal**2 * power + noise)


def visible_noise(process: Process, t: Tensor, mu: Tensor, spectrum: DataSpectrum) -> Tensor:
    """Return gamma_t^2 at the eigenvalues mu, or the variance of rounding errors where there is no noise."""
    return _visible(process.noise_scale(t, mu) ** 2, spectrum)


def _visible(noise: Tensor, spectrum: DataSpectrum) -> Tensor:
    return torch.where(noise > 0, noise, _ROUNDING * spectrum.variance)


class Moments:
    """Second moments of scale t for data of a spectrum, see `targets`: ``(B, 1, 1, 1)`` or ``()``, in squared units of
    the value range. Each is computed when it is first read, since a target needs a few of them.

    Args:
        process: the forward law.
        operator: the operator at whose eigenvalues averages are taken.
        t: scales ``(B,)``.
        spectrum: P(mu).
        size: (H, W) of the images.
    """

    def __init__(
        self, process: Process, operator: Operator, t: Tensor, spectrum: DataSpectrum, size: tuple[int, int]
    ) -> None:
        self._process, self._t, self._spectrum = process, t, spectrum
        self._mu = operator.eigenvalues(*size, t.device)
        self._smallest = _SMALLEST * spectrum.variance

    def wiener(self, mu: Tensor) -> Tensor:
        """Return w."""
        if mu is self._mu:
            signal, power, noise = self._signal, self._power, self._visible
        else:
            signal, power = self._process.signal_scale(self._t, mu), self._spectrum.on(mu)
            noise = visible_noise(self._process, self._t, mu, self._spectrum)
        return signal * power / (signal**2 * power + noise)

    @cached_property
    def _signal(self) -> Tensor:
        return self._process.signal_scale(self._t, self._mu)

    @cached_property
    def _power(self) -> Tensor:
        return self._spectrum.on(self._mu)

    @cached_property
    def _noise(self) -> Tensor:
        """The variance of the noise, 0 where there is none."""
        return self._process.noise_scale(self._t, self._mu) ** 2

    @cached_property
    def _visible(self) -> Tensor:
        return _visible(self._noise, self._spectrum)

    def _mean(self, values: Tensor) -> Tensor:
        return values.expand(*values.shape[:-2], *self._mu.shape).mean((-2, -1), keepdim=True)

    def _moment(self, values: Tensor) -> Tensor:
        return torch.maximum(self._mean(values), self._smallest)

    @cached_property
    def total(self) -> Tensor:
        """V."""
        return self._moment(self._signal**2 * self._power + self._noise)

    @cached_property
    def cross(self) -> Tensor:
        """S."""
        return self._mean(self._signal * self._power)

    @cached_property
    def residual(self) -> Tensor:
        """D for w = 1."""
        slope = self.cross / self.total
        return self._moment((1 - slope * self._signal) ** 2 * self._power + slope**2 * self._noise)

    @cached_property
    def estimate(self) -> Tensor:
        """Z."""
        sharpened = self._signal**2 * self._power + self._visible
        return self._moment((self._signal * self._power) ** 2 / sharpened)

    @cached_property
    def wiener_residual(self) -> Tensor:
        """D for w."""
        return self._moment(wiener_error(self._signal, self._power, self._visible))

    @cached_property
    def step(self) -> Tensor:
        """R."""
        finer = (self._t - 1 / self._process.num_scales).clamp(min=0)
        lost = self._process.signal_scale(finer, self._mu) - self._signal
        return self._moment(lost**2 * self._power + self._noise)

    @cached_property
    def flow(self) -> Tensor:
        """F, the variance of d y_t / dt."""
        signal_rate, noise_rate = self._process.rates(self._t, self._mu)
        return self._moment(signal_rate**2 * self._power + noise_rate**2)

    @property
    def constant_noise(self) -> bool:
        """Whether gamma is the same at all scales but 0."""
        return self._process.has_constant_noise()


@dataclass(frozen=True)
class Scalings:
    """c_skip, c_out, c_in and the loss weight, ``(B, 1, 1, 1)``, and w, or None for w = 1; see `targets`."""

    skip: Tensor
    out: Tensor
    inner: Tensor
    weight: Tensor
    filter: SpectralFunction | None = None


def plain_scalings(m: Moments, scale_input: bool = True) -> Scalings:
    one = torch.ones_like(m.total)
    return Scalings(torch.zeros_like(one), one, m.total.rsqrt() if scale_input else one, one)


def steepest_blur(process: Process, scales: Tensor) -> float:
    """Return the log of the largest factor by which a step between `scales` (descending) damps a frequency, relative to
    the mean intensity."""
    mu = spanning(process.operator()).to(scales.device)
    log_rho = Step(process, scales[1:], scales[:-1]).log_rho(mu)
    return float((log_rho[..., :1] - log_rho).max())
