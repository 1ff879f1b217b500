r"""Weights of the scales in the loss: published ones, as functions of the signal-to-noise ratio, and a learned one.

A weight is published for one target and applies to all, since the squared errors of x_0, eps and v at a given x_t are
fixed multiples of each other. With SNR = lambda^2 / gamma^2 and the weight w of eps's squared error,

| weight | w(SNR), of eps | of x_0: w SNR | of v, variance preserving: w SNR / (SNR + 1) | source |
|---|---|---|---|---|
| MinSNR | min(1, gamma / SNR) | min(SNR, gamma) | min(SNR, gamma) / (SNR + 1) | Hang et al. 2023, Sect. 3.4 |
| P2 | (k + SNR)^-gamma | SNR (k + SNR)^-gamma | ... | Choi et al. 2022, Eq. (8) |
| FlowLoss | (D / lambda)^2, D = lambda gamma' - lambda' gamma | (D / gamma)^2 | ... | Li & He 2025 |
| EDM | 1 + 1 / (s^2 SNR) | SNR + 1 / s^2 | ... | Karras et al. 2022, Table 1 |

s is the data's standard deviation. For any process v = lambda eps - gamma y_0, and a unit squared error of v
corresponds to a squared error of lambda^2 / (lambda^2 + gamma^2)^2 of eps.

Under blur each frequency has its own SNR. The weight of a scale is then the mean of its frequencies' weights, weighted
by the data's power P(mu) (`spectrum`). Where lambda and gamma do not depend on mu this is the published weight.

`Learned` fits the weights to the losses, for any process.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from dpm_scales.describe import Describable
from dpm_scales.errors import is_whole, require
from dpm_scales.operators import Operator
from dpm_scales.processes import Process
from dpm_scales.schedules import require_finite, require_positive
from dpm_scales.spectrum import DataSpectrum
from dpm_scales.targets import Clean, Target

_FAINT = 1e-100  # smallest signal scale to divide by
_LARGEST = 1e12  # beyond it float32 gradients overflow in the optimiser


class LossWeight(Describable, ABC):
    """A row of the table above, or a weight that is learned with the network."""

    #: whether the weight replaces the target's own, rather than being applied to its loss by `balanced`
    replaces = True

    def check(self, process: Process, target: Target) -> None:
        """Raise UserError if the weight is not defined for this process and target."""
        require(
            process.has_noise(),
            f"a loss weight by the signal-to-noise ratio needs noise, and {type(process).__name__} has none; "
            "use weight=target",
        )
        t = torch.arange(1, process.num_scales + 1, dtype=torch.float64) / process.num_scales
        largest = float(self(process, process.operator(), target, t, DataSpectrum(), (64, 64)).max())
        parts = {"clock": process.clock, "blur": process.blur, "noise levels": process.noise}
        reason = next(part for part, curve in parts.items() if curve is not None)
        remedy = "weight=target" if isinstance(target, Clean) else "target=clean or weight=target"
        most = f"{largest:.0e}" if math.isfinite(largest) else "inf"
        require(
            largest < _LARGEST,
            f"{type(self).__name__} weights errors of the {type(target).__name__} target by up to {most} under the "
            f"{reason} of {type(process).__name__}; use {remedy}",
        )

    def of_curves(self, process: Process, t: Tensor, mu: Tensor, variance: Tensor) -> Tensor:
        """Return w at scales t ``(B,)`` and eigenvalues mu: ``(B, 1, *mu.shape)``, trailing dimensions possibly one."""
        signal, noise = process.signal_scale(t, mu).clamp(min=_FAINT), process.noise_scale(t, mu)
        return self.of_noise((signal / noise) ** 2, variance)

    @abstractmethod
    def of_noise(self, snr: Tensor, variance: Tensor) -> Tensor:
        """Return w > 0 of the shape of `snr`.

        Args:
            snr: signal-to-noise ratios lambda^2 / gamma^2 > 0 at the eigenvalues, float64 ``(B, 1, h, w)``.
            variance: variance of the data, ``()``, in squared units of the process's value range.
        """

    def __call__(
        self,
        process: Process,
        operator: Operator,
        target: Target,
        t: Tensor,
        spectrum: DataSpectrum,
        size: tuple[int, int],
    ) -> Tensor:
        """Return the weight of the squared error of the target's prediction, float64 ``(B, 1, 1, 1)``.

        Args:
            t: ``(B,)`` in (0, 1].
            size: (H, W) of the images.
        """
        mu = operator.eigenvalues(*size, t.device)
        weight = self.of_curves(process, t, mu, spectrum.variance) * target.noise_errors_at(process, t, mu)
        power = spectrum.on(mu)
        weight = weight.expand(*weight.shape[:-2], *mu.shape)
        return (weight * power).sum((-2, -1), keepdim=True) / power.sum()

    def balanced(self, loss: Tensor, process: Process, t: Tensor) -> Tensor:
        """Return the losses to minimise, ``(B,)``, from the weighted losses at scales t ``(B,)``; by default these."""
        return loss


class MinSNR(LossWeight):
    """Min-SNR-gamma: no scale's error of x_0 weighs more than at SNR = gamma (Hang et al. 2023).

    Args:
        gamma: > 0, published as 5.
    """

    def __init__(self, gamma: float = 5.0) -> None:
        require_positive(self, gamma=gamma)
        self.gamma = float(gamma)

    def of_noise(self, snr: Tensor, variance: Tensor) -> Tensor:
        return (self.gamma / snr).clamp(max=1)


class P2(LossWeight):
    """Perception prioritised: scales that only remove imperceptible noise weigh less (Choi et al. 2022).

    Args:
        gamma: strength, >= 0, published as 0.5 or 1; 0 weights all errors of eps equally.
        k: > 0, published as 1.
    """

    def __init__(self, gamma: float = 1.0, k: float = 1.0) -> None:
        require_positive(self, k=k)
        require_finite(self, gamma=gamma)
        require(gamma >= 0, f"P2: gamma must be >= 0, got {gamma!r}")
        self.gamma, self.k = float(gamma), float(k)

    def of_noise(self, snr: Tensor, variance: Tensor) -> Tensor:
        return (self.k + snr) ** -self.gamma


class EDM(LossWeight):
    """Unit expected loss of a new network at every scale, for any target (Karras et al. 2022).

    The Clean target's own weight is the same for processes without blur.
    """

    def of_noise(self, snr: Tensor, variance: Tensor) -> Tensor:
        return 1 + 1 / (variance * snr)


class FlowLoss(LossWeight):
    """The squared error of the flow's velocity, for any target (Li & He 2025, JiT: a network that predicts the image).

    With D = lambda gamma' - lambda' gamma an error of x_0 is D / gamma times as large in v: 1 / t for `Rectified`.

    Args:
        max_weight: largest weight of the error of x_0, > 0; published as (1 / 0.05)^2 = 400.
    """

    def __init__(self, max_weight: float = 400.0) -> None:
        require_positive(self, max_weight=max_weight)
        self.max_weight = float(max_weight)

    def of_curves(self, process: Process, t: Tensor, mu: Tensor, variance: Tensor) -> Tensor:
        signal, noise = process.signal_scale(t, mu).clamp(min=_FAINT), process.noise_scale(t, mu)
        return ((self.speed(process, t, mu) / noise) ** 2).clamp(max=self.max_weight) * (noise / signal) ** 2

    def speed(self, process: Process, t: Tensor, mu: Tensor) -> Tensor:
        """Return D at scales t ``(B,)`` and eigenvalues mu, in the shape of the curves."""
        return process.flow_speed(t, mu, process.rates(t, mu))

    def of_noise(self, snr: Tensor, variance: Tensor) -> Tensor:
        raise NotImplementedError("the flow's loss depends on the speed of the curves too")


class Learned(LossWeight, nn.Module):
    """Learned uncertainty (Kendall et al. 2018; Karras et al. 2024, EDM2, Eq. 21): loss / exp(u(t)) + u(t).

    It is minimal where exp(u(t)) is the expected loss at scale t, so that all scales contribute equally, whatever their
    losses. The loss is that with the target's own weight. u is a cosine series in t and in log t, initially 0; its
    coefficients are trained with the network and stored in checkpoints, but not in the exported model. It works with
    any process, also without noise. The training loss can be negative.

    Args:
        terms: number of terms of each of the two series, at least 1.

    Raises: UserError for an invalid number of terms.
    """

    replaces = False

    def __init__(self, terms: int = 16) -> None:
        nn.Module.__init__(self)
        require(is_whole(terms, 1), f"Learned: terms must be a whole number from 1, got {terms!r}")
        self.terms = terms
        # a module rather than a parameter, since FSDP gathers weights when a module is called
        self.series = nn.Linear(2 * terms, 1, bias=False)
        nn.init.zeros_(self.series.weight)

    def check(self, process: Process, target: Target) -> None:
        """Accept any process and target."""

    def of_noise(self, snr: Tensor, variance: Tensor) -> Tensor:
        raise NotImplementedError("the learned weight is a function of the scale")

    def log_level(self, process: Process, t: Tensor) -> Tensor:
        """Return u ``(B,)`` at scales t ``(B,)`` in (0, 1]."""
        dtype = self.series.weight.dtype
        t = t.to(torch.float64)
        late = 1 + t.clamp(min=1 / process.num_scales).log() / math.log(max(process.num_scales, 2))
        order = torch.arange(self.terms, device=t.device, dtype=torch.float64)
        # the constant of one series and the orders 1.. of both
        angles = torch.cat([t[:, None] * order, late[:, None] * (order + 1)], 1)
        u: Tensor = self.series((math.pi * angles).cos().to(dtype))
        return u[:, 0]

    def balanced(self, loss: Tensor, process: Process, t: Tensor) -> Tensor:
        u = self.log_level(process, t).to(loss.dtype)
        return loss * (-u).exp() + u
