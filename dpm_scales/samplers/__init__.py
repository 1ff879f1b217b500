r"""One loop over pairs of scales (t, s), from 1 to 0, for every process.

    y_s = m_s + a (y_t - rho m_s) + b eps'          a, b, rho functions of L; m_s = lambda_s(L) y_0-hat

| sampler | a | b | source |
|---|---|---|---|
| Ancestral | gamma_s sqrt(1 - tau) / gamma_t | gamma_s sqrt(tau) | Ho et al. 2020 |
| DDIM(eta) | gamma_s sqrt(1 - eta^2 tau) / gamma_t | eta gamma_s sqrt(tau) | Song et al. 2021, Eq. (16) |
| Heun | gamma_s / gamma_t, then a second evaluation at s | 0 | Karras et al. 2022, Algorithm 1 |
| DPMSolver | as DDIM, with m_s extrapolated from the last two estimates | as DDIM | Lu et al. 2022, DPM-Solver++(2M) |
| UniPC | as DPMSolver with eta = 0, and each step repeated with the estimate at its end | 0 | Zhao et al. 2023 |
| Dissipation | 0 | delta | Rissanen et al. 2023, Algorithm 2 |
| Cold | 1 | 0 | Bansal et al. 2022, Algorithm 2 |

`noise_color` replaces the white eps' by noise of another spectrum, see `samplers.color`. `covariance="optimal"` adds
the variance that stems from the network's error at each frequency, (lambda_s - a lambda_t)^2 v(mu, t), to b^2, see
`dpm_scales.covariance`.

The last step, from t to s = 0, returns m_0 without noise: y_0-hat itself, since scale 0 is the image (lambda_0 = 1).
"""

from __future__ import annotations

from dpm_scales.denoisers import BaseDenoiser
from dpm_scales.samplers.churn import Churn
from dpm_scales.samplers.grids import GRIDS, karras_grid, logsnr_grid, quadratic_grid, uniform_grid
from dpm_scales.samplers.loop import OnStep, PastStep, Sampler, StepContext
from dpm_scales.samplers.multistep import DPMSolver, UniPC
from dpm_scales.samplers.one_step import DDIM, Ancestral, Cold, Dissipation, Heun
from dpm_scales.schedules import Color
from dpm_scales.targets import NextScale

__all__ = [
    "DDIM",
    "GRIDS",
    "Ancestral",
    "Churn",
    "Cold",
    "DPMSolver",
    "Dissipation",
    "Heun",
    "OnStep",
    "PastStep",
    "Sampler",
    "StepContext",
    "UniPC",
    "auto_sampler",
    "karras_grid",
    "logsnr_grid",
    "quadratic_grid",
    "uniform_grid",
]


def auto_sampler(
    denoiser: BaseDenoiser,
    steps: int | None = None,
    noise_color: Color | None = None,
    covariance: str | None = None,
) -> Sampler:
    """Return the default sampler of a model: Heun without blur, dissipation without noise, else SDE-DPM-Solver++(2M).

    Processes with `deterministic_sampling` get DPM-Solver++(2M) in place of its SDE, unless they are given a colour or
    a covariance of the noise to add: Warm Diffusion comes closer to the data with it in any number of steps.

    Noise added along the way removes errors of earlier steps, and a second-order method needs a fraction of the
    ancestral sampler's steps: on 8 px digits 50 steps came closer to the data than 250 for blurring and osmosis
    diffusion, and than all 100 under constant noise. Without any noise a chain amplifies its own errors, so a single
    step is taken. The finer-scale target predicts the next scale only, so it gets the ancestral sampler.

    Args:
        steps: None for 18 (Heun, 35 evaluations), 1 (no noise), all scales (finer-scale target) or at most 50 (else).
        noise_color: as for `Sampler`; Heun adds no noise and refuses it.
        covariance: as for `DDIM`; if given, the sampler is always SDE-DPM-Solver++(2M).
    """
    process = denoiser.process
    number = min(50, process.num_scales) if steps is None else steps
    if covariance is not None:
        return DPMSolver(1.0, number, "uniform", noise_color=noise_color, covariance=covariance)
    if not process.has_noise():
        return Dissipation(steps=1 if steps is None else steps, noise_color=noise_color)
    if isinstance(denoiser.target, NextScale):
        return Ancestral(steps, noise_color=noise_color)
    if process.is_scalar:
        return Heun(steps=min(18, process.num_scales) if steps is None else steps, noise_color=noise_color)
    eta = 0.0 if process.deterministic_sampling and noise_color is None else 1.0
    return DPMSolver(eta, number, "uniform", noise_color=noise_color)
