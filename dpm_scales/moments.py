"""Second moments of a scale for data of a known spectrum, and the resulting preconditioning, see `targets`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dpm_scales.operators import Operator, SpectralFunction
from dpm_scales.processes import Process, Step
from dpm_scales.spectrum import DataSpectrum

# Smallest second moment, relative to Var(x_0): a scale can equal the image (the first of a list), which gives 0 / 0.
_SMALLEST = 1e-12
# Noise variance of deterministic processes, relative to Var(x_0): sharpening by more than 50 amplifies rounding errors.
_ROUNDING = 1e-4


@dataclass(frozen=True)
class Moments:
    """Second moments of scale t for data of a spectrum, see `targets`: ``(B, 1, 1, 1)`` or ``()``, in squared units of
    the value range."""

    wiener: SpectralFunction  # w
    estimate: Tensor  # Z
    wiener_residual: Tensor  # D for w
    cross: Tensor  # S
    residual: Tensor  # D for w = 1
    total: Tensor  # V
    step: Tensor  # R
    constant_noise: bool
    flow: Callable[[], Tensor]  # F, the variance of d y_t / dt, computed on demand


def wiener_error(signal: Tensor, power: Tensor, noise: Tensor) -> Tensor:
    """Return P gamma^2 / (lambda^2 P + gamma^2), the error variance of the Wiener estimate of x_0.

    Args:
        signal, power, noise: lambda_t, P and gamma_t^2 at each eigenvalue.
    """
    return power * noise / (signal**2 * power + noise)


def visible_noise(process: Process, t: Tensor, mu: Tensor, spectrum: DataSpectrum) -> Tensor:
    """Return gamma_t^2 at the eigenvalues mu, or the variance of rounding errors where there is no noise."""
    noise = process.noise_scale(t, mu) ** 2
    return torch.where(noise > 0, noise, _ROUNDING * spectrum.variance)


def moments(process: Process, operator: Operator, t: Tensor, spectrum: DataSpectrum, size: tuple[int, int]) -> Moments:
    """Return the moments at scales t ``(B,)`` for images of `size` (H, W)."""
    finer = (t - 1 / process.num_scales).clamp(min=0)
    smallest = _SMALLEST * spectrum.variance

    def parts(mu: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return process.signal_scale(t, mu), spectrum.on(mu), visible_noise(process, t, mu, spectrum)

    def wiener(mu: Tensor) -> Tensor:
        signal, power, noise = parts(mu)
        return signal * power / (signal**2 * power + noise)

    def mean(values: Tensor) -> Tensor:
        return values.expand(*values.shape[:-2], *mu.shape).mean((-2, -1), keepdim=True)

    mu = operator.eigenvalues(*size, t.device)
    signal, power, noise = parts(mu)
    true_noise = process.noise_scale(t, mu) ** 2
    sharpened = signal**2 * power + noise
    total = torch.maximum(mean(signal**2 * power + true_noise), smallest)
    cross = mean(signal * power)
    error = (1 - cross / total * signal) ** 2 * power + (cross / total) ** 2 * true_noise
    step = (process.signal_scale(finer, mu) - signal) ** 2 * power + true_noise

    def flow() -> Tensor:
        signal_rate, noise_rate = process.rates(t, mu)
        return torch.maximum(mean(signal_rate**2 * power + noise_rate**2), smallest)

    return Moments(
        wiener=wiener,
        estimate=torch.maximum(mean((signal * power) ** 2 / sharpened), smallest),
        wiener_residual=torch.maximum(mean(wiener_error(signal, power, noise)), smallest),
        cross=cross,
        residual=torch.maximum(mean(error), smallest),
        total=total,
        step=torch.maximum(mean(step), smallest),
        constant_noise=process.has_constant_noise(),
        flow=flow,
    )


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
    largest = process.operator().eigenvalues(64, 64, scales.device).max()
    mu = largest * torch.linspace(0, 1, 24, dtype=torch.float64, device=scales.device) ** 3
    log_rho = Step(process, scales[1:], scales[:-1]).log_rho(mu)
    return float((log_rho[..., :1] - log_rho).max())
