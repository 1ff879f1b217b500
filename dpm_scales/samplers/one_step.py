"""Samplers that use no earlier steps."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from dpm_scales.denoisers import BaseDenoiser
from dpm_scales.errors import UserError, require, require_choice, suggest
from dpm_scales.moments import steepest_blur
from dpm_scales.operators import Term, spectral_of
from dpm_scales.processes import Process, Step
from dpm_scales.samplers.churn import Churn
from dpm_scales.samplers.grids import tables_of
from dpm_scales.samplers.loop import Sampler, StepContext
from dpm_scales.samplers.measuring import require_measurable
from dpm_scales.schedules import Color, is_number
from dpm_scales.targets import MAX_DIVISION

_TINY = 1e-300  # below any standard deviation, to divide by

COVARIANCES = ("optimal",)


class DDIM(Sampler):
    """DDIM: deterministic at eta = 0 (the probability-flow ODE), the ancestral sampler at eta = 1.

    Args:
        eta: in [0, 1].
        steps, grid, rho, noise_color: as for `Sampler`.
        covariance: covariance of a step: None for that of q(x_s | x_t, x_0), as published; "optimal" adds the variance
            that stems from the network's error at each frequency, which must have been measured, see
            `dpm_scales.covariance`; eta = 0 is then Analytic-DDIM (Bao et al. 2022), which is not deterministic.
    """

    def __init__(
        self,
        eta: float = 0.0,
        steps: int | None = 50,
        grid: str = "uniform",
        rho: float = 7.0,
        noise_color: Color | None = None,
        covariance: str | None = None,
    ) -> None:
        super().__init__(steps, grid, rho, noise_color)
        require(is_number(eta) and 0 <= eta <= 1, f"eta must lie in [0, 1], got {eta!r}")
        if covariance is not None:
            require_choice("covariance", covariance, COVARIANCES)
        self.eta, self.covariance = float(eta), covariance

    @property
    def is_random(self) -> bool:
        return self._adds_noise or self.churn is not None

    @property
    def _adds_noise(self) -> bool:
        return self.eta > 0 or self.covariance is not None

    def require_covariance(self, denoiser: BaseDenoiser) -> None:
        if self.covariance is None:
            return
        require_measurable(denoiser)
        table = denoiser.error_variance
        if table is None:
            raise UserError(
                "covariance=optimal needs the variance of the network's error, which this model does not hold; measure "
                "it: dpm-scales measure MODEL, or model.measure_covariance(images)"
            )
        table.require_weights(denoiser)

    def step(self, move: StepContext, y: Tensor, m: Tensor) -> Tensor:
        step = move.curves

        def weights(mu: Tensor) -> tuple[Tensor, Tensor]:
            coef_xt = self._coef_xt(step, mu)
            return coef_xt, 1 - coef_xt * step.rho(mu)

        terms: list[Term] = [(weights, [y, m])]
        if not self._adds_noise:
            return move.operator.combine(*terms)
        noise = move.added(y)
        if self.eta > 0:
            terms.append((lambda mu: self._noise_std(step, mu), noise))
        y_s = move.operator.combine(*terms)
        if self.covariance is None:
            return y_s
        return y_s + spectral_of(move.operator).apply(lambda mu: self._missing_std(move, mu), noise)

    def _coef_xt(self, step: Step, mu: Tensor) -> Tensor:
        """Return a, the weight of y_t in a step."""
        square = self.eta**2
        # 1 - eta^2 tau with tau = 1 - exp(-2h), without cancellation where tau is nearly 1
        rest = (1 - square) + square * torch.exp(-2 * step.half_log_snr_gain(mu).clamp(min=0))
        return step.noise_ratio(mu) * rest.sqrt()

    def _missing_std(self, move: StepContext, mu: Tensor) -> Tensor:
        """Return the excess of the optimal standard deviation over `_noise_std`; 0 without an error."""
        step = move.curves
        std = self._noise_std(step, mu)
        weight = step.signal_s(mu) * (1 - self._coef_xt(step, mu) * step.rho(mu))  # lambda_s - a lambda_t
        variance = weight**2 * move.error_variance(mu)
        return variance / ((std**2 + variance).sqrt() + std).clamp(min=_TINY)

    def _noise_std(self, step: Step, mu: Tensor) -> Tensor:
        """Return the standard deviation of the noise that a step adds."""
        return self.eta * step.posterior_std(mu)


class Ancestral(DDIM):
    """The reverse chain with the posterior's own noise: DDIM with eta = 1.

    Args:
        steps, grid, rho, noise_color: as for `Sampler`.
        variance: variance of the noise that a step adds: None for the posterior's, "transition" for that of
            q(x_t | x_s). They are the bounds for data of zero and of unit variance (Ho et al. 2020, Sect. 3.2;
            diffusers' fixed_small and fixed_large); with "transition" a step of VE is the predictor of Song et al.
            2021, Algorithm 2.
        covariance: "optimal" for the variance measured for each frequency, see `DDIM`; excludes `variance`.
    """

    variances = ("transition",)

    def __init__(
        self,
        steps: int | None = None,
        grid: str = "uniform",
        rho: float = 7.0,
        variance: str | None = None,
        noise_color: Color | None = None,
        covariance: str | None = None,
    ) -> None:
        super().__init__(1.0, steps, grid, rho, noise_color, covariance)
        if variance is not None:
            require_choice("variance", variance, self.variances)
            require(
                covariance is None,
                f"variance={variance} and covariance={covariance} both set the noise of a step; leave one of them out",
            )
        self.variance = variance

    def _noise_std(self, step: Step, mu: Tensor) -> Tensor:
        return super()._noise_std(step, mu) if self.variance is None else step.transition_std(mu)


class Heun(DDIM):
    r"""Second-order method for the probability-flow ODE: a DDIM step, then a correction by the estimate at its end.

    y_s += w(h) (m_s(y_s) - m_s(y_t)), h = (l_s - l_t) / 2, with 2 steps - 1 evaluations in all and

    - variable="noise":  w = (exp(h) - 1) / 2, the trapezoid in gamma / lambda, exactly EDM's;
    - variable="logsnr": w = 1 - (1 - exp(-h)) / h, the exponential integrator of the same order: bounded where a step
      spans many nats, as at the high frequencies of a blur;
    - variable=None: "noise" if logSNR changes equally at all frequencies (`Process.is_scalar`), otherwise "logsnr".

    With "noise", w = 0 where scale s has no noise, as in EDM's last step, and where scale t is pure noise.

    Churn (`Churn`; Karras et al. 2022, Algorithm 2) adds noise before each step, which removes errors of earlier steps.

    Args:
        steps, grid, rho, noise_color: as for `Sampler`.
        variable: "noise", "logsnr" or None, see above.
        s_churn: EDM's S_churn, >= 0; with 0 no noise is drawn.
        s_min, s_max: levels between which steps are churned; s_max None for no bound.
        s_noise: factor on the added noise; published values are 1.003 to 1.007.
    """

    one_scale_at_a_time = False
    variables = ("noise", "logsnr")

    def __init__(
        self,
        steps: int | None = 18,
        grid: str = "karras",
        rho: float = 7.0,
        variable: str | None = None,
        s_churn: float = 0.0,
        s_min: float = 0.0,
        s_max: float | None = None,
        s_noise: float = 1.0,
        noise_color: Color | None = None,
    ) -> None:
        super().__init__(0.0, steps, grid, rho, noise_color)
        if variable is not None and variable not in self.variables:
            raise UserError(f"unknown variable {variable!r}: {suggest(str(variable), self.variables)}, or null")
        churn = Churn(s_churn, s_min, s_max, s_noise)
        self.churn = churn if s_churn > 0 else None
        self.variable = variable

    def check(self, denoiser: BaseDenoiser) -> None:
        super().check(denoiser)
        process = denoiser.process
        scales = self.scales(process, tables_of(process))
        if self.churn is not None:
            churned = self.churn.check(process, scales)
            # the scales in the order of visits: up to t_hat, which involves no division, and down to s
            scales = torch.stack([churned, scales[1:]], 1).flatten()
            denoiser.target.check_scales(process, scales)
        if self._in_noise(process):
            blur = steepest_blur(process, scales)
            require(
                blur <= math.log(MAX_DIVISION),
                f"Heun in the noise level amplifies what a step of {type(process).__name__} has blurred away, here by "
                f"1e{blur / math.log(10):.0f}; set sampler.variable=logsnr (or null)",
            )

    def _in_noise(self, process: Process) -> bool:
        return self.variable == "noise" or (self.variable is None and process.is_scalar)

    def step(self, move: StepContext, y: Tensor, m: Tensor) -> Tensor:
        first = super().step(move, y, m)
        step, in_noise = move.curves, self._in_noise(move.process)

        def weight(mu: Tensor) -> Tensor:
            h = step.half_log_snr_gain(mu)
            if in_noise:
                # a step from pure noise: the estimate at its start carries no information
                return torch.where(h > math.log(MAX_DIVISION), 0.0, torch.expm1(h) / 2)
            safe = h.clamp(min=1e-8)
            return torch.where(h > 1e-4, 1 + torch.expm1(-safe) / safe, h / 2)

        change = replace(move, t=move.s).predict_mean(first) - m
        return first + move.operator.apply(weight, change)


class Dissipation(Sampler):
    """IHDM's sampler: y_s = m_s + delta eps', delta = `noise_ratio` gamma_s (Rissanen et al. 2023, Algorithm 2).

    Args:
        noise_ratio: delta / sigma >= 0, published as 1.25; samples collapse near 2.
        steps, grid, noise_color: as for `Sampler`.
    """

    def __init__(
        self,
        noise_ratio: float = 1.25,
        steps: int | None = None,
        grid: str = "uniform",
        noise_color: Color | None = None,
    ) -> None:
        super().__init__(steps, grid, noise_color=noise_color)
        require(is_number(noise_ratio) and noise_ratio >= 0, f"noise_ratio must be >= 0, got {noise_ratio!r}")
        self.noise_ratio = float(noise_ratio)

    @property
    def is_random(self) -> bool:
        return self.noise_ratio > 0

    def step(self, move: StepContext, y: Tensor, m: Tensor) -> Tensor:
        return m + self.noise_ratio * move.operator.apply(move.curves.noise_s, move.added(y))


class Cold(Sampler):
    """Cold diffusion: y_s = y_t - lambda_t(L) y_0-hat + lambda_s(L) y_0-hat, for processes without noise.

    (Bansal et al. 2022, Algorithm 2; their Algorithm 1 is `Dissipation` with noise_ratio 0.)
    """

    def __init__(self, steps: int | None = None, grid: str = "uniform", noise_color: Color | None = None) -> None:
        super().__init__(steps, grid, noise_color=noise_color)

    @property
    def is_random(self) -> bool:
        return False

    def step(self, move: StepContext, y: Tensor, m: Tensor) -> Tensor:
        return y + m - move.operator.apply(move.curves.rho, m)
