"""Define HDFM's loss as released, for the leaderboard's comparison with the exact one.

Heat Dissipation Flow Matching (arXiv 2605.19371) lets a network learn the velocity of a path of blur and noise. The
released loss gives the blur term half of the weight that it has in the path's derivative.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dpm_scales.processes.law import Process
from dpm_scales.weights import FlowLoss


class HalfBlurFlowLoss(FlowLoss):
    """The squared error of a velocity with half of its blur term, for any target, and processes whose mean is never 0.

    With lambda = a exp(-mu T) half of lambda' - lambda a' / a = -lambda mu T' is left out, so that D grows by
    (lambda' - lambda a' / a) gamma / 2.

    Args:
        max_weight: largest weight of the error of x_0, > 0.
    """

    def speed(self, process: Process, t: Tensor, mu: Tensor) -> Tensor:
        mean = torch.zeros_like(mu)
        fading = process.rates(t, mean)[0] / process.signal_scale(t, mean)
        blurring = process.rates(t, mu)[0] - process.signal_scale(t, mu) * fading
        return super().speed(process, t, mu) + 0.5 * blurring * process.noise_scale(t, mu)
