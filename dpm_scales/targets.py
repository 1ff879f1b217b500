r"""Regression targets of the network, and the conversion of its output to the mean m_s at the next scale.

A sampler needs only m_s = lambda_s(L) y_0-hat; at s = 0 that is y_0-hat. With F the network, and c_skip, c_out, c_in
scalars of t,

    prediction = c_skip z + c_out F(c_in z, t),     loss = weight * mean (prediction - regression target)^2

(lam, gam: lambda, gamma.)

| target | regression target | m_s | c_skip | c_out | weight |
|---|---|---|---|---|---|
| Clean, "scalar" | x_0 | lambda_s(L) x_0-hat | S / V | sqrt(D) | 1 / D |
| Clean, "wiener" | x_0 | lambda_s(L) x_0-hat | 1 | sqrt(D) | 1 / D |
| Clean, "none" | x_0 | lambda_s(L) x_0-hat | 0 | 1 | 1 |
| Noise | eps | (y_t - gamma_t eps-hat) / rho | 0 | 1 | 1 |
| Velocity | lam_t eps - gam_t y_0 | lam_s (lam_t y_t - gam_t v-hat) / (lam_t^2 + gam_t^2) | 0 | 1 | 1 |
| Flow | lam' y_0 + gam' eps | lam_s (gam' y_t - gam_t v-hat) / (lam_t gam' - lam' gam_t) | 0 | sqrt(F) | 1 / F |
| NextScale | m_s - x_t at s = t - 1/K | x_t + prediction | 0 | sqrt(R) | 1 / R or 1 |

The network receives c_in z and the prediction starts from c_skip z, with z = w(L) y_t in pixels. By default w = 1,
z = x_t and c_in = 1 / sqrt(V); with "wiener", z is the Wiener estimate of x_0, the optimum of linear filtering:

    w = lambda_t P / (lambda_t^2 P + gamma_t^2),    c_in = 1 / sqrt(Z)

"spectral" is the same in the DCT, for operators with a single eigenvalue.

P(mu) is the measured variance of the data at each frequency (`spectrum`). Averages over the spectrum are V = Var(x_t),
S = Cov(x_0, x_t), D = Var(x_0 - c_skip z), Z = Var(z), R = Var(m_s - x_t), F = Var(v). Where lambda and gamma do not
depend on mu, "wiener" and "scalar" coincide and are exactly EDM's (Karras et al. 2022, Table 1), for any a_t:
c_skip w = a s^2 / (a^2 s^2 + gamma^2), c_out = gamma s / sqrt(a^2 s^2 + gamma^2), c_in w = 1 / sqrt(V).

Under blur and a little constant noise x_t is smooth, and to the network its strong frequencies hide the faint ones; z
is sharpened down to the noise. Under scheduled noise the raw pixels carry more information only if the data are nearly
white, like 8 px digits.

The Clean target never divides, which makes it robust under blur: errors of a noise estimate are amplified by 1 / rho at
high frequencies. The noise target divides by rho, the factor of one step, never by lambda_t.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from dpm_scales.describe import Describable
from dpm_scales.errors import UserError, require, require_choice
from dpm_scales.moments import Moments, Scalings, plain_scalings, steepest_blur
from dpm_scales.operators import Operator, spectral_of
from dpm_scales.processes import Process, Step, few_scales
from dpm_scales.spectrum import DataSpectrum

#: largest factor by which a step may blur a frequency that is divided by what is left of it
MAX_DIVISION = 1e6
#: smallest gain for which "auto" chooses the Wiener estimate: MNIST benefits at 1.11, 8 px digits (up to 1.09) do not
WORTHWHILE = 1.1
PRECONDITIONINGS = ("auto", "scalar", "wiener", "spectral", "none")


def _require_noise(process: Process, target: str) -> None:
    require(
        process.has_noise(),
        f"the {target} target needs noise, and {type(process).__name__} has none; use target=clean or finer",
    )


def _check_division(process: Process, scales: Tensor, target: str) -> None:
    """Raise UserError if a step between `scales` (descending) leaves too little of a frequency to divide by."""
    blur = steepest_blur(process, scales)
    require(
        blur <= math.log(MAX_DIVISION),
        f"the {target} target divides by what a step leaves of each frequency, here by 1e-{blur / math.log(10):.0f}, "
        f"more than 1e-{math.log10(MAX_DIVISION):.0f} can be undone; use target=clean, more steps or less blur",
    )


class Target(Describable, ABC):
    """One row of the table above. Images and predictions are in whitened coordinates unless said otherwise."""

    def check(self, process: Process) -> None:  # noqa: B027 - most targets fit every process
        """Raise UserError if the process can't be learnt through this target."""

    def check_scales(self, process: Process, scales: Tensor) -> None:  # noqa: B027
        """Raise UserError if a sampler can't go through `scales` (descending to 0) with this target."""

    def resolve_auto(self, process: Process, spectrum: DataSpectrum, size: tuple[int, int]) -> dict[str, str]:
        """Resolve "auto" arguments from the data's spectrum, for images of `size` (H, W); return them by name."""
        return {}

    def basis(self, operator: Operator) -> Operator:
        """Return the operator at whose eigenvalues the moments are taken, and of which the filter w is a function."""
        return operator

    def scalings(self, m: Moments) -> Scalings:
        return plain_scalings(m)

    def noise_errors(self, signal: Tensor, noise: Tensor) -> Tensor:
        """Return the squared error of eps for a unit squared error of the prediction, given lambda_t and gamma_t.

        Raises: UserError if the prediction does not determine eps.
        """
        raise UserError(
            f"a loss weight by the signal-to-noise ratio needs an estimate of the clean image, and the "
            f"{type(self).__name__} target gives none; use target=clean, noise or velocity, or weight=target"
        )

    def noise_errors_at(self, process: Process, t: Tensor, mu: Tensor) -> Tensor:
        """Return `noise_errors` at scales t ``(B,)`` and eigenvalues mu."""
        return self.noise_errors(process.signal_scale(t, mu).clamp(min=1e-100), process.noise_scale(t, mu))

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
        preconditioning: "scalar" (EDM's), "wiener", "spectral", "none", or "auto", see `resolve_auto`. "spectral" is
            "wiener" in the DCT, for operators with a single eigenvalue, such as those of VP and VE.
        clip: whether to clip the estimate to the process's value range during sampling.
        scale_input: whether to divide the network's input by its standard deviation; False only with preconditioning
            "none".

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
        """Resolve "auto" to "wiener", "spectral" or "scalar".

        The Wiener estimate is chosen if the noise is constant, so that only blur distinguishes the scales, or if its
        error is less than 1 / `WORTHWHILE` of that of the best scalar, in the geometric mean over the scales: 0.4 (vp)
        to 0.6 (ve) of it for grey photos of 64 px, 0.7 (vp) to 0.9 (blurring) for MNIST, 0.92 and more for 8 px digits.
        It is "spectral" if the operator has a single eigenvalue, otherwise "wiener".
        """
        if self.preconditioning == "auto":
            k = torch.linspace(1, process.num_scales, min(50, process.num_scales), dtype=torch.float64)
            t = k.round().to(spectrum.std.device) / process.num_scales
            own = process.operator()
            resolved = spectral_of(own)
            m = Moments(process, resolved, t, spectrum, size)
            gain = (m.residual / m.wiener_residual).log().mean().exp()
            estimate = "wiener" if resolved is own else "spectral"
            self.preconditioning = estimate if m.constant_noise or bool(gain > WORTHWHILE) else "scalar"
        return {"preconditioning": self.preconditioning}

    def basis(self, operator: Operator) -> Operator:
        return spectral_of(operator) if self.preconditioning == "spectral" else operator

    def scalings(self, m: Moments) -> Scalings:
        if self.preconditioning == "none":
            return plain_scalings(m, self.scale_input)
        if self.preconditioning in ("wiener", "spectral") or (self.preconditioning == "auto" and m.constant_noise):
            residual = m.wiener_residual
            return Scalings(torch.ones_like(residual), residual.sqrt(), m.estimate.rsqrt(), 1 / residual, m.wiener)
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
    """A prediction that contains noise, from which the estimate of the clean image is computed.

    Args:
        clip: whether to clip this estimate to the process's value range during sampling, as DDPM's code does; only
            without blur.
        scale_input: whether to divide the network's input by its standard deviation; DDPM's code does not, and gives
            the network x_t itself.
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
        return plain_scalings(m, self.scale_input)

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
        _check_division(process, scales, "noise")

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


class Flow(_Mixed):
    """v = d y_t / dt = lambda'_t(L) y_0 + gamma'_t(L) eps, the velocity of flow matching (Lipman et al. 2023).

    With D = lambda gamma' - lambda' gamma > 0: y_0 = (gamma' y - gamma v) / D. For `Rectified` without blur,
    v = eps - x_0 and D = 1. The output is scaled by the standard deviation of v, a constant for `Rectified`.
    Arguments are as for `_Mixed`.
    """

    name = "flow"

    def check(self, process: Process) -> None:
        super().check(process)
        t = torch.arange(1, process.num_scales + 1, dtype=torch.float64) / process.num_scales
        mu = torch.linspace(0, 1, 24, dtype=torch.float64) ** 3 * process.operator().largest
        still = ~(process.flow_speed(t, mu, process.rates(t, mu)) > 0)
        require(
            not bool(still.any()),
            f"the flow target divides by the speed at which signal turns into noise, and {type(process).__name__} has "
            "frequencies that do not change at some scale, or have no signal left there; use target=clean",
        )
        with process.rehearsal(type(self), 1) as new:
            if new:
                some = few_scales(t, 100)
                image = some[:, None, None, None]
                self.regression_target(process, process.operator(), image, image, image, some)

    def check_scales(self, process: Process, scales: Tensor) -> None:
        _check_division(process, scales, "flow")

    def scalings(self, m: Moments) -> Scalings:
        variance = m.flow
        return replace(plain_scalings(m, self.scale_input), out=variance.sqrt(), weight=1 / variance)

    def regression_target(
        self, process: Process, operator: Operator, x_0: Tensor, x_t: Tensor, noise: Tensor, t: Tensor
    ) -> Tensor:
        return operator.combine((lambda mu: process.rates(t, mu), [operator.to_white(x_0), noise]))

    def _mean(
        self, process: Process, operator: Operator, prediction: Tensor, y_t: Tensor, t: Tensor, s: Tensor
    ) -> Tensor:
        def weights(mu: Tensor) -> tuple[Tensor, Tensor]:
            rates = process.rates(t, mu)
            gain = process.signal_scale(s, mu) / process.flow_speed(t, mu, rates)
            return gain * rates[1], -gain * process.noise_scale(t, mu)

        return operator.combine((weights, [y_t, prediction]))

    def noise_errors_at(self, process: Process, t: Tensor, mu: Tensor) -> Tensor:
        speed = process.flow_speed(t, mu, process.rates(t, mu))
        return (process.signal_scale(t, mu).clamp(min=1e-100) / speed) ** 2


class NextScale(Target):
    """The step to the next finer scale, m_s - x_t in pixels, s = t - 1 / num_scales (Rissanen et al. 2023, Eq. (9)).

    Args:
        equal_weight: whether to weight all scales equally, instead of the published unweighted pixel loss.
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
        """Raise UserError unless `steps` is the whole chain, since the network has learnt single steps only."""
        if steps != process.num_scales:
            raise UserError(
                f"a network trained on the finer-scale target has learnt steps of 1/{process.num_scales} only, "
                f"got steps={steps}; set steps={process.num_scales} or train with target=clean"
            )


FinerScale = NextScale
"""Name of `NextScale` in the first release."""
