r"""DPM-Solver++(2M), and its stochastic variant, for any operator (Lu et al. 2022, Algorithm 2).

With h = (l_s - l_t) / 2 the exact step of the probability-flow ODE is, for each eigenvalue,

    y_s = gamma_s / gamma_t y_t + lambda_s int exp(-(h - x)) y_0-hat(x) dx,      x from 0 to h in half the logSNR

A DDIM step takes y_0-hat for constant. Here it is continued in a straight line through the last two estimates,

    y_0-hat + h / (2 h') (y_0-hat - y_0-hat'),        h' the length of the step before.

h is a function of mu: under blur each frequency has its own logSNR, and its own h and h'. Where a step leaves less than
a thousandth of a frequency, what the estimate before says of it is not brought back, and the step fades into DDIM's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dpm_scales.denoisers import Denoiser
from dpm_scales.operators import SpectralFunction
from dpm_scales.processes import Context, Process, Step
from dpm_scales.samplers.grids import tables_of
from dpm_scales.samplers.one_step import DDIM

_FAINT = 1e-3


class DPMSolver(DDIM):
    """Second order with one evaluation a step.

    Args:
        eta: 0 for the probability-flow ODE, DPM-Solver++(2M); 1 for its SDE, SDE-DPM-Solver++(2M).
        steps: number of steps and of evaluations.
        grid, rho: as for `Sampler`; "logsnr" is the authors' own.
    """

    one_scale_at_a_time = False

    def __init__(self, eta: float = 0.0, steps: int | None = 20, grid: str = "logsnr", rho: float = 7.0) -> None:
        super().__init__(eta, steps, grid, rho)

    def check(self, denoiser: Denoiser) -> None:
        super().check(denoiser)
        scales = self.scales(denoiser.process, tables_of(denoiser.process))
        if len(scales) > 3:
            denoiser.process.resolve(*_weights(denoiser.process, scales[:-3], scales[1:-2], scales[2:-1]))

    def continued(
        self, denoiser: Denoiser, m: Tensor, before: Tensor, r: Tensor, t: Tensor, s: Tensor, context: Context
    ) -> Tensor:
        """lambda_s of the continued estimate, from m = lambda_s y_0-hat and `before` = lambda_t y_0-hat'."""
        own, past = _weights(denoiser.process, r, t, s)
        return denoiser.process.operator(context).combine((own, m), (past, before))


def _weights(process: Process, r: Tensor, t: Tensor, s: Tensor) -> tuple[SpectralFunction, SpectralFunction]:
    """Of m and of the estimate before, for the step from t to s after one from r to t."""
    step, past = Step(process, s, t), Step(process, t, r)

    def slope(mu: Tensor) -> Tensor:
        h, h_before, rho = step.half_log_snr_gain(mu), past.half_log_snr_gain(mu), step.rho(mu)
        usable = (h_before > 1e-12) & torch.isfinite(h) & torch.isfinite(h_before)
        ratio = torch.where(usable, h, 0.0) / (2 * torch.where(usable, h_before, 1.0))
        return ratio * rho**2 / (rho**2 + _FAINT**2)

    return lambda mu: 1 + slope(mu), lambda mu: -slope(mu) / step.rho(mu).clamp(min=1e-30)
