r"""What the network is asked for, and how its answer becomes the clean image at the target scale.

A sampler needs only m_s = lambda_s(L) y_0-hat. With F the network, and c_skip, c_out, c_in scalars of t,

    prediction = c_skip x_t + c_out F(c_in x_t, t),     loss = weight * mean (prediction - truth)^2

(lam, gam: lambda, gamma.)

| target | truth | m_s | c_skip | c_out | weight |
|---|---|---|---|---|---|
| Clean | x_0 | lambda_s(L) x_0-hat | S / V | sqrt(D) | 1 / D |
| Clean, not preconditioned | x_0 | lambda_s(L) x_0-hat | 0 | 1 | 1 |
| Noise | eps | (y_t - gamma_t eps-hat) / rho | 0 | 1 | 1 |
| Velocity | lam_t eps - gam_t y_0 | lam_s (lam_t y_t - gam_t v-hat) / (lam_t^2 + gam_t^2) | 0 | 1 | 1 |
| FinerScale | m_s - x_t at s = t - 1/K | x_t + the answer | 0 | sqrt(R) | 1 / R or 1 |

and always c_in = 1 / sqrt(V). These are moments of the data model below, averaged over the spectrum: V = Var(x_t),
S = Cov(x_0, x_t), D = Var(x_0 - c_skip x_t), R = Var(m_s - x_t). Where lambda and gamma do not depend on mu they are
exactly EDM's (Karras et al. 2022, Table 1), for any a_t: c_skip = a s^2 / (a^2 s^2 + gamma^2) and
c_out = gamma s / sqrt(a^2 s^2 + gamma^2).

The Clean target never divides, so it is the robust one under blur: errors of a noise estimate are amplified by 1 / rho
at high frequencies. The noise target's division is by rho, the factor of one step, never by lambda_t.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from dpm_scales.errors import UserError, require
from dpm_scales.operators import Operator
from dpm_scales.processes import Process, Step

# Of Var(x_0): scales that differ by nothing, as the first of a list may from the image, ask for nothing, not for 0 / 0.
_SMALLEST = 1e-12
#: a step that blurs a frequency by more than this leaves nothing of it to divide by
MAX_DIVISION = 1e6


@dataclass(frozen=True)
class Moments:
    """Second moments of scale t under the data model: images of standard deviation `data_std` per pixel, whose power
    is spread over the spectrum as `weights`. All of shape ``(B, 1, 1, 1)`` or ``()``, in squared pixel units."""

    data: Tensor  # Var(x_0)
    cross: Tensor  # S
    total: Tensor  # V
    residual: Tensor  # D
    step: Tensor  # R


def moments(process: Process, operator: Operator, t: Tensor, data_std: Tensor, size: tuple[int, int]) -> Moments:
    """The moments at scales t ``(B,)`` for images of `size` (H, W).

    The power of the data falls as 1 / mu, as it does in natural images and, roughly, in drawings; where nothing depends
    on mu the distribution does not matter.
    """
    mu = operator.eigenvalues(*size, t.device)
    power = torch.where(mu > 0, 1 / mu.clamp(min=1e-12), torch.zeros_like(mu))
    if mu.numel() == 1:
        power = torch.ones_like(mu)
    power = power / power.sum()

    def mean(values: Tensor, weights: Tensor) -> Tensor:
        return (values * weights).sum((-2, -1), keepdim=True)

    finer = (t - 1 / process.num_scales).clamp(min=0)
    flat = torch.full_like(mu, 1 / mu.numel())
    signal, finer_signal = process.signal_scale(t, mu), process.signal_scale(finer, mu)
    noise = mean(process.noise_scale(t, mu) ** 2, flat)
    variance = data_std.to(torch.float64) ** 2
    first, second = mean(signal, power), mean(signal**2, power)
    smallest = _SMALLEST * variance
    total = torch.maximum(variance * second + noise, smallest)
    spread = mean((signal - first) ** 2, power)  # second - first^2 without the cancellation
    step = variance * mean((finer_signal - signal) ** 2, power) + noise
    return Moments(
        data=variance,
        cross=variance * first,
        total=total,
        residual=torch.maximum(variance * (noise + variance * spread) / total, smallest),
        step=torch.maximum(step, smallest),
    )


def steepest_blur(process: Process, scales: Tensor) -> float:
    """log of the largest factor by which a step between `scales` (descending) blurs some frequency beyond the mean."""
    largest = process.operator().eigenvalues(64, 64, scales.device).max()
    mu = largest * torch.linspace(0, 1, 24, dtype=torch.float64, device=scales.device) ** 3
    log_rho = Step(process, scales[1:], scales[:-1]).log_rho(mu)
    return float((log_rho[..., :1] - log_rho).max())


@dataclass(frozen=True)
class Scalings:
    """c_skip, c_out, c_in and the loss weight; ``(B, 1, 1, 1)``."""

    skip: Tensor
    out: Tensor
    inner: Tensor
    weight: Tensor


def _plain(m: Moments) -> Scalings:
    one = torch.ones_like(m.total)
    return Scalings(torch.zeros_like(one), one, m.total.rsqrt(), one)


def _require_noise(process: Process, target: str) -> None:
    require(
        process.has_noise(),
        f"the {target} target needs noise, and {type(process).__name__} has none; use target=clean or finer",
    )


class Target(ABC):
    """One row of the table above. Images and predictions are in white coordinates unless said otherwise."""

    def check(self, process: Process) -> None:  # noqa: B027 - most targets fit every process
        """Raise UserError if the process can't be learnt through this target."""

    def check_scales(self, process: Process, scales: Tensor) -> None:  # noqa: B027
        """Raise UserError if a sampler can't go through `scales` (descending to 0) with this target."""

    def scalings(self, m: Moments) -> Scalings:
        return _plain(m)

    @abstractmethod
    def truth(self, process: Process, operator: Operator, x_0: Tensor, x_t: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the prediction should be; x in pixels, `noise` white."""

    @abstractmethod
    def clean(
        self, process: Process, operator: Operator, prediction: Tensor, y_t: Tensor, t: Tensor, s: Tensor
    ) -> Tensor:
        """m_s in white coordinates from a prediction at scale t."""


class Clean(Target):
    """The clean image x_0, in pixels.

    Args:
        preconditioned: EDM's scalings (default), or none.
        clip: clip the estimate to the process's value range while sampling.
    """

    def __init__(self, preconditioned: bool = True, clip: bool = True) -> None:
        self.preconditioned, self.clip = preconditioned, clip

    def scalings(self, m: Moments) -> Scalings:
        if not self.preconditioned:
            return _plain(m)
        return Scalings(m.cross / m.total, m.residual.sqrt(), m.total.rsqrt(), 1 / m.residual)

    def truth(self, process: Process, operator: Operator, x_0: Tensor, x_t: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return x_0

    def clean(
        self, process: Process, operator: Operator, prediction: Tensor, y_t: Tensor, t: Tensor, s: Tensor
    ) -> Tensor:
        if self.clip:
            prediction = prediction.clamp(*process.value_range)
        return operator.apply(process.signal(s), operator.to_white(prediction))


class Noise(Target):
    """The noise eps (Ho et al. 2020)."""

    def check(self, process: Process) -> None:
        _require_noise(process, "noise")

    def check_scales(self, process: Process, scales: Tensor) -> None:
        blur = steepest_blur(process, scales)
        require(
            blur <= math.log(MAX_DIVISION),
            f"the noise target divides by what a step leaves of each frequency, here by 1e-{blur / math.log(10):.0f}, "
            f"more than 1e-{math.log10(MAX_DIVISION):.0f} can be undone; use target=clean, more steps or less blur",
        )
        step = Step(process, scales[1:], scales[:-1])
        process.resolve(lambda mu: torch.exp(-step.log_rho(mu)))

    def truth(self, process: Process, operator: Operator, x_0: Tensor, x_t: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return noise

    def clean(
        self, process: Process, operator: Operator, prediction: Tensor, y_t: Tensor, t: Tensor, s: Tensor
    ) -> Tensor:
        step = process.step(s, t)
        return operator.combine(
            (lambda mu: torch.exp(-step.log_rho(mu)), y_t),
            (lambda mu: -step.noise_t(mu) * torch.exp(-step.log_rho(mu)), prediction),
        )


class Velocity(Target):
    """v = lambda_t(L) eps - gamma_t(L) y_0 (Salimans & Ho 2022), for any operator."""

    def check(self, process: Process) -> None:
        _require_noise(process, "velocity")

    def check_scales(self, process: Process, scales: Tensor) -> None:
        step = Step(process, scales[1:], scales[:-1])
        process.resolve(lambda mu: self._gain(step, mu), lambda mu: self._gain(step, mu) * step.signal_t(mu))

    def truth(self, process: Process, operator: Operator, x_0: Tensor, x_t: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return operator.combine(
            (process.signal(t), noise), (lambda mu: -process.noise_scale(t, mu), operator.to_white(x_0))
        )

    def clean(
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


class FinerScale(Target):
    """The step to the next finer scale, m_s - x_t in pixels, s = t - 1 / num_scales (Rissanen et al. 2023, Eq. (9)).

    Args:
        equal_weight: give every scale the same weight, rather than the published unweighted pixel loss.
    """

    def __init__(self, equal_weight: bool = False) -> None:
        self.equal_weight = equal_weight

    def scalings(self, m: Moments) -> Scalings:
        weight = 1 / m.step if self.equal_weight else torch.ones_like(m.step)
        return Scalings(torch.zeros_like(m.step), m.step.sqrt(), m.total.rsqrt(), weight)

    def truth(self, process: Process, operator: Operator, x_0: Tensor, x_t: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        finer = (t - 1 / process.num_scales).clamp(min=0)
        return operator.to_pixels(operator.apply(process.signal(finer), operator.to_white(x_0))) - x_t

    def clean(
        self, process: Process, operator: Operator, prediction: Tensor, y_t: Tensor, t: Tensor, s: Tensor
    ) -> Tensor:
        return y_t + operator.to_white(prediction)

    def check_scales(self, process: Process, scales: Tensor) -> None:
        self.check_steps(process, len(scales) - 1)

    def check_steps(self, process: Process, steps: int) -> None:
        """Raise UserError unless `steps` walks the whole chain: the network knows one step only."""
        if steps != process.num_scales:
            raise UserError(
                f"a network trained on the finer-scale target knows steps of 1/{process.num_scales} only, "
                f"got steps={steps}; set steps={process.num_scales} or train with target=clean"
            )
