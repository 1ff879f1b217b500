r"""The power spectrum of the data over the eigenvalues of the operator: P(mu), measured from training images.

Images have most of their power at low frequencies, and a process that blurs treats frequencies differently; so the
preconditioning (`targets`) uses P(mu) where EDM's uses one number (Karras et al. 2022, Table 1).

P is stored relative to white data of the same variance, at knots that are evenly spaced in log mu, and separately at
mu = 0, the mean intensity. Until it is measured, data are assumed to be white.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from dpm_scales.errors import require
from dpm_scales.operators import HeatOperator
from dpm_scales.schedules import is_number
from dpm_scales.schedules.base import HIGHEST, LOWEST, on_log_knots

KNOTS = 25

_SMALLEST = 1e-6
"""Lowest power relative to white data; below it, 8-bit images are dominated by rounding."""


class DataSpectrum(nn.Module):
    """P(mu), the variance of the coefficients of clean images, in squared units of the value range.

    Args:
        std: standard deviation of the pixels of the training images, > 0.

    Raises: UserError for an invalid std.
    """

    std: Tensor
    log_factor: Tensor

    def __init__(self, std: float = 0.5) -> None:
        super().__init__()
        ok = is_number(std) and std > 0
        require(ok, f"data_std must be positive, got {std!r}; are all training images the same grey?")
        self.register_buffer("std", torch.tensor(float(std)))
        self.register_buffer("log_factor", torch.zeros(KNOTS + 1))

    @property
    def variance(self) -> Tensor:
        """Return P averaged over the spectrum, float64 ``()``."""
        return self.std.to(torch.float64) ** 2

    def forward(self, mu: Tensor) -> Tensor:
        """Return P(mu), float64, in the shape of mu."""
        return self.variance * torch.exp(on_log_knots(self.log_factor.to(torch.float64), mu))

    def on(self, mu: Tensor) -> Tensor:
        """Return P at an operator's eigenvalues; if there is a single one, for all frequencies, the data's variance."""
        return self.variance.expand(mu.shape) if mu.numel() == 1 else self(mu)

    @torch.no_grad()
    def fit(self, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Measure P relative to the variance, which is not changed.

        Args:
            batches: images in whitened coordinates minus their steady state, ``(N, C, H, W)`` of one size, and their
                mean intensities ``(N, C)``.

        Raises: UserError if there are no images.
        """
        operator, number = HeatOperator(), 0
        squares = first = second = torch.zeros(())
        mu = torch.zeros(())
        for y, mean in batches:
            if number == 0:
                mu = operator.eigenvalues(y.shape[-2], y.shape[-1], y.device).flatten()
            u, mean = operator.analysis(y.to(torch.float64)).flatten(-2), mean.to(torch.float64)
            squares, number = squares + u.square().mean(1).sum(0), number + len(y)
            first, second = first + mean.sum(0), second + mean.square().sum(0)
        require(number > 0, "no images to measure a spectrum from")
        power = squares / number
        power[0] = len(mu) * (second / number - (first / number) ** 2).clamp(min=0).mean()
        white = power.mean()
        log_factors = (power / torch.where(white > 0, white, 1)).clamp(min=_SMALLEST).log()
        curve = log_factors[:1].expand(KNOTS)
        if len(mu) > 1:
            knots = torch.linspace(LOWEST, HIGHEST, KNOTS, dtype=torch.float64, device=mu.device)
            log_mu = mu[1:].log()
            # beyond the image's frequencies P is that of its lowest and highest one
            inside = torch.minimum(torch.maximum(knots, log_mu.min()), log_mu.max())
            distance = (inside[:, None] - log_mu) / (0.5 * (knots[1] - knots[0]))
            curve = _local_lines(torch.softmax(-0.5 * distance**2, -1), distance, log_factors[1:])
        self.log_factor.copy_(torch.cat([log_factors[:1], curve]))
        # smoothing changes the mean, which is restored here
        self.log_factor.sub_((self(mu).mean() / self.variance).log())


def _local_lines(weights: Tensor, x: Tensor, values: Tensor) -> Tensor:
    """Return local linear fits of `values` at x = 0, with weights that sum to 1; power laws are reproduced exactly."""
    x_mean, mean = (weights * x).sum(-1), weights @ values
    spread = (weights * x**2).sum(-1) - x_mean**2
    slope = ((weights * x) @ values - x_mean * mean) / spread.clamp(min=1e-2)
    return mean - slope * x_mean
