r"""Clocks: a separate time for each frequency, lambda_t(mu) = a(t_mu), gamma_t(mu) = gamma(t_mu)."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from dpm_scales.describe import Describable
from dpm_scales.errors import is_number, require


class Clock(Describable, ABC):
    """The time t_mu of each eigenvalue: non-decreasing in t, 0 at t = 0, 1 at t = 1."""

    @abstractmethod
    def __call__(self, t: Tensor, mu: Tensor, largest: float) -> Tensor:
        """Return t_mu in [0, 1], float64.

        Args:
            t: scales that broadcast against mu, ``(1, ...)`` or ``(B, 1, ...)``.
            mu: eigenvalues.
            largest: upper bound on the operator's spectrum.
        """


class SpectralClock(Clock):
    r"""t_mu = clamp((1 + b) t - b (1 - sqrt(mu / mu_max)), 0, 1): fine detail is lost first (GUD, arXiv 2410.02667).

    b = 0 gives all frequencies the same time; as b grows they are lost one after another: autoregression over scales.

    Args:
        spread: b >= 0.
    """

    def __init__(self, spread: float = 1.0) -> None:
        ok = is_number(spread) and spread >= 0
        require(ok, f"SpectralClock: spread must be a number >= 0, got {spread!r}")
        self.spread = float(spread)

    def __call__(self, t: Tensor, mu: Tensor, largest: float) -> Tensor:
        place = (mu / largest).clamp(0, 1).sqrt()
        return ((1 + self.spread) * t.to(torch.float64) - self.spread * (1 - place)).clamp(0, 1)
