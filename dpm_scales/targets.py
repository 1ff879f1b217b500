r"""Regression targets of the network, and the way from its output to the clean image at the target scale.

A sampler needs only m_s = lambda_s(L) y_0-hat; at s = 0 that is y_0-hat. With F the network, and c_skip, c_out, c_in
scalars of t,

    prediction = c_skip z + c_out F(c_in z, t),     loss = weight * mean (prediction - truth)^2

(lam, gam: lambda, gamma.)

| target | truth | m_s | c_skip | c_out | weight |
|---|---|---|---|---|---|
| Clean, "scalar" | x_0 | lambda_s(L) x_0-hat | S / V | sqrt(D) | 1 / D |
| Clean, "wiener" | x_0 | lambda_s(L) x_0-hat | 1 | sqrt(D) | 1 / D |
| Clean, "none" | x_0 | lambda_s(L) x_0-hat | 0 | 1 | 1 |
| Noise | eps | (y_t - gamma_t eps-hat) / rho | 0 | 1 | 1 |
| Velocity | lam_t eps - gam_t y_0 | lam_s (lam_t y_t - gam_t v-hat) / (lam_t^2 + gam_t^2) | 0 | 1 | 1 |
| NextScale | m_s - x_t at s = t - 1/K | x_t + the answer | 0 | sqrt(R) | 1 / R or 1 |

The network sees c_in z and the prediction starts from c_skip z, with z = w(L) y_t in pixels. Mostly w = 1, z = x_t and
c_in = 1 / sqrt(V); "wiener" takes for z the Wiener estimate of x_0, all that linear filtering can do:

    w = lambda_t P / (lambda_t^2 P + gamma_t^2),    c_in = 1 / sqrt(Z)

P(mu) is the variance of the data at each frequency, measured (`spectrum`). Averages over the spectrum: V = Var(x_t),
S = Cov(x_0, x_t), D = Var(x_0 - c_skip z), Z = Var(z), R = Var(m_s - x_t). Where lambda and gamma do not depend on mu,
"wiener" and "scalar" are one, and exactly EDM's (Karras et al. 2022, Table 1), for any a_t:
c_skip w = a s^2 / (a^2 s^2 + gamma^2), c_out = gamma s / sqrt(a^2 s^2 + gamma^2), c_in w = 1 / sqrt(V).

Under blur and a little constant noise x_t is smooth, and its faint frequencies are lost to the network beside the
strong ones; z is sharpened down to the noise. Under scheduled noise the raw pixels carry more information.

The Clean target never divides, so it is the robust one under blur: errors of a noise estimate are amplified by 1 / rho
at high frequencies. The noise target's division is by rho, the factor of one step, never by lambda_t.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dpm_scales.describe import Describable
from dpm_scales.errors import UserError, require, require_choice
from dpm_scales.operators import Operator, SpectralFunction
from dpm_scales.processes import Process, Step
from dpm_scales.spectrum import DataSpectrum

# Least second moment, in units of Var(x_0): a scale may equal the image (the first of a list), and 0 / 0 is undefined.
_SMALLEST = 1e-12
# Noise variance of a deterministic process, in units of Var(x_0): sharpening by more than 50 amplifies rounding errors.
_ROUNDING = 1e-4
#: a step that blurs a frequency by more than this leaves nothing of it to divide by
MAX_DIVISION = 1e6
#: samples of osmosis diffusion on photos, where the gain is 1.35, lie under grain without
WORTHWHILE = 1.25
PRECONDITIONINGS = ("auto", "scalar", "wiener", "none")


@dataclass(frozen=True)
class Moments:
    """Second moments of scale t for data of a spectrum: ``(B, 1, 1, 1)`` or ``()``, in squared pixel units."""

    wiener: SpectralFunction  # w
    estimate: Tensor  # Z
    wiener_residual: Tensor  # D for w
    cross: Tensor  # S
    residual: Tensor  # D for w = 1
    total: Tensor  # V
    step: Tensor  # R
    constant_noise: bool


def wiener_error(signal: Tensor, power: Tensor, noise: Tensor) -> Tensor:
    """Return P gamma^2 / (lambda^2 P + gamma^2), the error variance of the Wiener estimate of x_0.

    Args:
        signal, power, noise: lambda_t, P and gamma_t^2 of each eigenvalue.
    """
    return power * noise / (signal**2 * power + noise)


def visible_noise(process: Process, t: Tensor, mu: Tensor, spectrum: DataSpectrum) -> Tensor:
    """Return gamma_t^2, or the variance of rounding errors where there is no noise."""
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
    return Moments(
        wiener=wiener,
        estimate=torch.maximum(mean((signal * power) ** 2 / sharpened), smallest),
        wiener_residual=torch.maximum(mean(wiener_error(signal, power, noise)), smallest),
        cross=cross,
        residual=torch.maximum(mean(error), smallest),
        total=total,
        step=torch.maximum(mean(step), smallest),
        constant_noise=process.has_constant_noise(),
    )


def steepest_blur(process: Process, scales: Tensor) -> float:
    """Return the log of the largest factor by which a step between `scales` (descending) blurs beyond the mean."""
    largest = process.operator().eigenvalues(64, 64, scales.device).max()
    mu = largest * torch.linspace(0, 1, 24, dtype=torch.float64, device=scales.device) ** 3
    log_rho = Step(process, scales[1:], scales[:-1]).log_rho(mu)
    return float((log_rho[..., :1] - log_rho).max())


@dataclass(frozen=True)
class Scalings:
    """c_skip, c_out, c_in and the loss weight, ``(B, 1, 1, 1)``; and w, None for 1."""

    skip: Tensor
    out: Tensor
    inner: Tensor
    weight: Tensor
    filter: SpectralFunction | None = None


def _plain(m: Moments, scale_input: bool = True) -> Scalings:
    one = torch.ones_like(m.total)
    return Scalings(torch.zeros_like(one), one, m.total.rsqrt() if scale_input else one, one)


def _require_noise(process: Process, target: str) -> None:
    require(
        process.has_noise(),
        f"the {target} target needs noise, and {type(process).__name__} has none; use target=clean or finer",
    )


class Target(Describable, ABC):
    """One row of the table above. Images and predictions are in whitened coordinates unless said otherwise."""

    def check(self, process: Process) -> None:  # noqa: B027 - most targets fit every process
        """Raise UserError if the process can't be learnt through this target."""

    def check_scales(self, process: Process, scales: Tensor) -> None:  # noqa: B027
        """Raise UserError if a sampler can't go through `scales` (descending to 0) with this target."""

    def resolve_auto(self, process: Process, spectrum: DataSpectrum, size: tuple[int, int]) -> dict[str, str]:
        """Resolve "auto" arguments by the data's spectrum, for images of `size` (H, W); return them by name."""
        return {}

    def scalings(self, m: Moments) -> Scalings:
        return _plain(m)

    def noise_errors(self, signal: Tensor, noise: Tensor) -> Tensor:
        """Return the squared error of eps for a unit squared error of the prediction, from lambda_t and gamma_t.

        Raises: UserError where the prediction does not say what eps is.
        """
        raise UserError(
            f"a loss weight by the signal-to-noise ratio speaks of the clean image, and the {type(self).__name__} "
            "target of another; use target=clean, noise or velocity, or weight=target"
        )

    @abstractmethod
    def regression_target(
        self, process: Process, operator: Operator, x_0: Tensor, x_t: Tensor, noise: Tensor, t: Tensor
    ) -> Tensor:
        """Return the ideal prediction ``(B, C, H, W)``; x in pixels, `noise` white."""

    @abstractmethod
    def predict_mean(
        self, process: Process, operator: Operator, prediction: Tensor, y_t: Tensor, t: Tensor, s: Tensor
    ) -> Tensor:
        """Return m_s ``(B, C, H, W)`` in whitened coordinates from a prediction at scale t."""


class Clean(Target):
    """The clean image x_0, in pixels.

    Args:
        preconditioning: "scalar" (EDM's), "wiener", "none", or "auto", see `resolve_auto`.
        clip: clip the estimate to the process's value range while sampling.
        scale_input: divide the network's input by its standard deviation; False only with preconditioning "none".

    Raises: UserError for other values.
    """

    def __init__(self, preconditioning: str = "auto", clip: bool = True, scale_input: bool = True) -> None:
        require_choice("preconditioning", preconditioning, PRECONDITIONINGS)
        require(
            scale_input or preconditioning == "none",
            f"Clean: scale_input=false leaves the network's input as it is, and preconditioning={preconditioning} "
            "scales it; set preconditioning=none",
        )
        self.preconditioning, self.clip, self.scale_input = preconditioning, clip, scale_input

    def resolve_auto(self, process: Process, spectrum: DataSpectrum, size: tuple[int, int]) -> dict[str, str]:
        """Resolve "auto" to "wiener" or "scalar".

        "wiener" where the noise is constant, so that only blur distinguishes the scales, and where estimating each
        frequency by itself leaves less than 1 / `WORTHWHILE` of the error, in the geometric mean over the scales (a
        quarter of it for photos under blur, all of it for 8 px digits).
        """
        if self.preconditioning == "auto":
            k = torch.linspace(1, process.num_scales, min(50, process.num_scales), dtype=torch.float64)
            t = k.round().to(spectrum.std.device) / process.num_scales
            m = moments(process, process.operator(), t, spectrum, size)
            gain = (m.residual / m.wiener_residual).log().mean().exp()
            self.preconditioning = "wiener" if m.constant_noise or bool(gain > WORTHWHILE) else "scalar"
        return {"preconditioning": self.preconditioning}

    def scalings(self, m: Moments) -> Scalings:
        if self.preconditioning == "none":
            return _plain(m, self.scale_input)
        if self.preconditioning == "wiener" or (self.preconditioning == "auto" and m.constant_noise):
            one, residual = torch.ones_like(m.total), m.wiener_residual
            return Scalings(one, residual.sqrt(), m.estimate.rsqrt(), 1 / residual, m.wiener)
        return Scalings(m.cross / m.total, m.residual.sqrt(), m.total.rsqrt(), 1 / m.residual)

    def noise_errors(self, signal: Tensor, noise: Tensor) -> Tensor:
        return (signal / noise) ** 2

    def regression_target(
        self, process: Process, operator: Operator, x_0: Tensor, x_t: Tensor, noise: Tensor, t: Tensor
    ) -> Tensor:
        return x_0

    def predict_mean(
        self, process: Process, operator: Operator, prediction: Tensor, y_t: Tensor, t: Tensor, s: Tensor
    ) -> Tensor:
        if self.clip:
            prediction = prediction.clamp(*process.value_range)
        return operator.apply(process.signal(s), operator.to_white(prediction))


class _Mixed(Target):
    """A prediction that holds noise, from which the estimate of the clean image follows by arithmetic.

    Args:
        clip: clip this estimate to the process's value range while sampling, as DDPM's code does; only without blur.
        scale_input: divide the network's input by its standard deviation; False as in DDPM's code, which gives the
            network x_t itself.
    """

    name: ClassVar[str]

    def __init__(self, clip: bool = False, scale_input: bool = True) -> None:
        self.clip, self.scale_input = clip, scale_input

    def check(self, process: Process) -> None:
        _require_noise(process, self.name)
        require(
            not self.clip or process.blur is None,
            f"the {self.name} target with clip=true divides by the signal's scale, and the blur of "
            f"{type(process).__name__} leaves none of the high frequencies; use target=clean, which clips too",
        )

    def scalings(self, m: Moments) -> Scalings:
        return _plain(m, self.scale_input)

    def predict_mean(
        self, process: Process, operator: Operator, prediction: Tensor, y_t: Tensor, t: Tensor, s: Tensor
    ) -> Tensor:
        if not self.clip:
            return self._mean(process, operator, prediction, y_t, t, s)
        x_0 = operator.to_pixels(self._mean(process, operator, prediction, y_t, t, torch.zeros_like(s)))
        return operator.apply(process.signal(s), operator.to_white(x_0.clamp(*process.value_range)))

    @abstractmethod
    def _mean(
        self, process: Process, operator: Operator, prediction: Tensor, y_t: Tensor, t: Tensor, s: Tensor
    ) -> Tensor:
        """Return m_s without clipping, see `predict_mean`."""


class Noise(_Mixed):
    """The noise eps (Ho et al. 2020); arguments as for `_Mixed`."""

    name = "noise"

    def check_scales(self, process: Process, scales: Tensor) -> None:
        blur = steepest_blur(process, scales)
        require(
            blur <= math.log(MAX_DIVISION),
            f"the noise target divides by what a step leaves of each frequency, here by 1e-{blur / math.log(10):.0f}, "
            f"more than 1e-{math.log10(MAX_DIVISION):.0f} can be undone; use target=clean, more steps or less blur",
        )

    def noise_errors(self, signal: Tensor, noise: Tensor) -> Tensor:
        return torch.ones_like(signal)

    def regression_target(
        self, process: Process, operator: Operator, x_0: Tensor, x_t: Tensor, noise: Tensor, t: Tensor
    ) -> Tensor:
        return noise

    def _mean(
        self, process: Process, operator: Operator, prediction: Tensor, y_t: Tensor, t: Tensor, s: Tensor
    ) -> Tensor:
        step = process.step(s, t)
        return operator.combine(
            (lambda mu: torch.exp(-step.log_rho(mu)), y_t),
            (lambda mu: -step.noise_t(mu) * torch.exp(-step.log_rho(mu)), prediction),
        )


class Velocity(_Mixed):
    """v = lambda_t(L) eps - gamma_t(L) y_0 (Salimans & Ho 2022), for any operator; arguments as for `_Mixed`."""

    name = "velocity"

    def noise_errors(self, signal: Tensor, noise: Tensor) -> Tensor:
        return (signal / (signal**2 + noise**2)) ** 2

    def regression_target(
        self, process: Process, operator: Operator, x_0: Tensor, x_t: Tensor, noise: Tensor, t: Tensor
    ) -> Tensor:
        return operator.combine(
            (process.signal(t), noise), (lambda mu: -process.noise_scale(t, mu), operator.to_white(x_0))
        )

    def _mean(
        self, process: Process, operator: Operator, prediction: Tensor, y_t: Tensor, t: Tensor, s: Tensor
    ) -> Tensor:
        step = Step(process, s, t)
        return operator.combine(
            (lambda mu: self._gain(step, mu) * step.signal_t(mu), y_t),
            (lambda mu: -self._gain(step, mu) * step.noise_t(mu), prediction),
        )

    @staticmethod
    def _gain(step: Step, mu: Tensor) -> Tensor:
        return step.signal_s(mu) / (step.signal_t(mu) ** 2 + step.noise_t(mu) ** 2)


class NextScale(Target):
    """The step to the next finer scale, m_s - x_t in pixels, s = t - 1 / num_scales (Rissanen et al. 2023, Eq. (9)).

    Args:
        equal_weight: give every scale the same weight, rather than the published unweighted pixel loss.
    """

    def __init__(self, equal_weight: bool = False) -> None:
        self.equal_weight = equal_weight

    def scalings(self, m: Moments) -> Scalings:
        weight = 1 / m.step if self.equal_weight else torch.ones_like(m.step)
        return Scalings(torch.zeros_like(m.step), m.step.sqrt(), m.total.rsqrt(), weight)

    def regression_target(
        self, process: Process, operator: Operator, x_0: Tensor, x_t: Tensor, noise: Tensor, t: Tensor
    ) -> Tensor:
        finer = (t - 1 / process.num_scales).clamp(min=0)
        return operator.to_pixels(operator.apply(process.signal(finer), operator.to_white(x_0))) - x_t

    def predict_mean(
        self, process: Process, operator: Operator, prediction: Tensor, y_t: Tensor, t: Tensor, s: Tensor
    ) -> Tensor:
        return y_t + operator.to_white(prediction)

    def check_scales(self, process: Process, scales: Tensor) -> None:
        self.check_steps(process, len(scales) - 1)

    def check_steps(self, process: Process, steps: int) -> None:
        """Raise UserError unless `steps` is the whole chain: the network has learnt single steps only."""
        if steps != process.num_scales:
            raise UserError(
                f"a network trained on the finer-scale target has learnt steps of 1/{process.num_scales} only, "
                f"got steps={steps}; set steps={process.num_scales} or train with target=clean"
            )


FinerScale = NextScale
"""The name of the first release."""
