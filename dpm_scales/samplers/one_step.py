"""Samplers whose step looks at the scale it comes from, and at nothing before."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dpm_scales.denoisers import Denoiser
from dpm_scales.errors import UserError, require, suggest
from dpm_scales.noise import NoiseSource
from dpm_scales.processes import Context, Process, Step
from dpm_scales.samplers.grids import tables_of
from dpm_scales.samplers.loop import Sampler
from dpm_scales.schedules import is_number
from dpm_scales.targets import MAX_DIVISION, steepest_blur


class DDIM(Sampler):
    """From deterministic (eta = 0: the probability-flow ODE, exact in the posterior's mean) to ancestral (eta = 1)."""

    def __init__(self, eta: float = 0.0, steps: int | None = 50, grid: str = "uniform", rho: float = 7.0) -> None:
        super().__init__(steps, grid, rho)
        require(is_number(eta) and 0 <= eta <= 1, f"eta must lie in [0, 1], got {eta!r}")
        self.eta = float(eta)

    def step(
        self,
        denoiser: Denoiser,
        y: Tensor,
        m: Tensor,
        t: Tensor,
        s: Tensor,
        noise: NoiseSource,
        context: Context,
        labels: Tensor | None,
    ) -> Tensor:
        step = Step(denoiser.process, s, t)
        square = self.eta**2

        def keep(mu: Tensor) -> Tensor:
            # 1 - eta^2 tau with tau = 1 - exp(-2h), kept apart from cancellation where tau is nearly 1
            rest = (1 - square) + square * torch.exp(-2 * step.half_log_snr_gain(mu).clamp(min=0))
            return step.noise_ratio(mu) * rest.sqrt()

        terms = [(keep, y), (lambda mu: 1 - keep(mu) * step.rho(mu), m)]
        if self.eta > 0:
            white = noise.normal(tuple(y.shape[1:]), y.dtype)
            terms.append((lambda mu: self.eta * step.posterior_std(mu), white))
        return denoiser.process.operator(context).combine(*terms)


class Ancestral(DDIM):
    """The reverse chain with the posterior's own noise: DDIM with eta = 1."""

    def __init__(self, steps: int | None = None, grid: str = "uniform", rho: float = 7.0) -> None:
        super().__init__(1.0, steps, grid, rho)


class Heun(DDIM):
    """Second order on the probability-flow ODE: a DDIM step, then a correction with the clean image seen at its end.

    y_s += w(h) (m_s(y_s) - m_s(y_t)), h = (l_s - l_t) / 2, with 2 steps - 1 evaluations in all and

    - variable="noise":  w = (exp(h) - 1) / 2, the trapezoid in gamma / lambda, exactly EDM's;
    - variable="logsnr": w = 1 - (1 - exp(-h)) / h, the exponential integrator of the same order: bounded where a step
      spans many nats, as it does at the high frequencies of a blur;
    - variable=None: "noise" where nothing blurs, else "logsnr".

    Where scale s has no noise there is nothing left to correct in "noise", as in EDM's last step.
    """

    one_scale_at_a_time = False
    variables = ("noise", "logsnr")

    def __init__(
        self, steps: int | None = 18, grid: str = "karras", rho: float = 7.0, variable: str | None = None
    ) -> None:
        super().__init__(0.0, steps, grid, rho)
        if variable is not None and variable not in self.variables:
            raise UserError(f"unknown variable {variable!r}: {suggest(str(variable), self.variables)}, or null")
        self.variable = variable

    def check(self, denoiser: Denoiser) -> None:
        super().check(denoiser)
        process = denoiser.process
        if self._in_noise(process):
            blur = steepest_blur(process, self.scales(process, tables_of(process)))
            require(
                blur <= math.log(MAX_DIVISION),
                f"Heun in the noise level amplifies what a step of {type(process).__name__} has blurred away, here by "
                f"1e{blur / math.log(10):.0f}; set sampler.variable=logsnr (or null)",
            )

    def _in_noise(self, process: Process) -> bool:
        return self.variable == "noise" or (self.variable is None and process.blur is None)

    def step(
        self,
        denoiser: Denoiser,
        y: Tensor,
        m: Tensor,
        t: Tensor,
        s: Tensor,
        noise: NoiseSource,
        context: Context,
        labels: Tensor | None,
    ) -> Tensor:
        first = super().step(denoiser, y, m, t, s, noise, context, labels)
        step = Step(denoiser.process, s, t)
        in_noise = self._in_noise(denoiser.process)

        def weight(mu: Tensor) -> Tensor:
            h = step.half_log_snr_gain(mu)
            if in_noise:
                return torch.where(torch.isinf(h), 0.0, torch.expm1(h) / 2)
            safe = h.clamp(min=1e-8)
            return torch.where(h > 1e-4, 1 + torch.expm1(-safe) / safe, h / 2)

        change = denoiser.clean(first, s, s, context, labels) - m
        return first + denoiser.process.operator(context).apply(weight, change)


class Dissipation(Sampler):
    """IHDM's: y_s = m_s + delta eps', delta = `noise_ratio` gamma_s.

    Args:
        noise_ratio: delta / sigma, published 1.25; samples collapse near 2.
        steps: None for all scales.
    """

    def __init__(self, noise_ratio: float = 1.25, steps: int | None = None, grid: str = "uniform") -> None:
        super().__init__(steps, grid)
        require(is_number(noise_ratio) and noise_ratio >= 0, f"noise_ratio must be >= 0, got {noise_ratio!r}")
        self.noise_ratio = float(noise_ratio)

    def step(
        self,
        denoiser: Denoiser,
        y: Tensor,
        m: Tensor,
        t: Tensor,
        s: Tensor,
        noise: NoiseSource,
        context: Context,
        labels: Tensor | None,
    ) -> Tensor:
        white = noise.normal(tuple(y.shape[1:]), y.dtype)
        operator = denoiser.process.operator(context)
        return m + self.noise_ratio * operator.apply(lambda mu: denoiser.process.noise_scale(s, mu), white)


class Cold(Sampler):
    """Cold diffusion: y_s = y_t - lambda_t(L) y_0-hat + lambda_s(L) y_0-hat, for processes without noise.

    (Bansal et al. 2022, Algorithm 2; their Algorithm 1 is `Dissipation` with noise_ratio 0.)
    """

    def __init__(self, steps: int | None = None, grid: str = "uniform") -> None:
        super().__init__(steps, grid)

    def step(
        self,
        denoiser: Denoiser,
        y: Tensor,
        m: Tensor,
        t: Tensor,
        s: Tensor,
        noise: NoiseSource,
        context: Context,
        labels: Tensor | None,
    ) -> Tensor:
        rho = Step(denoiser.process, s, t).rho
        return y + m - denoiser.process.operator(context).apply(rho, m)
