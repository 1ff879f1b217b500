r"""Churn (Karras et al. 2022, Algorithm 2) for any process: before each step the image is moved to a coarser scale.

Added noise removes errors of earlier steps. The Markov transition from t to a coarser scale t_hat adds it exactly: if
y_t has the law of scale t, y_t_hat has that of t_hat,

    y_t_hat = rho(L) y_t + s_noise beta(L) eps,   rho = lambda_t_hat / lambda_t,
    beta^2 = gamma_t_hat^2 - rho^2 gamma_t^2      at every eigenvalue.

Under blur the image is blurred further, by exp(-mu (T_t_hat - T_t)), and the added noise also replaces what that blur
removes from the existing noise. Without blur and with a = 1 (VE), rho = 1 and beta^2 = gamma_t_hat^2 - gamma_t^2, as in
EDM.

t_hat is the scale whose noise level is (1 + min(s_churn / steps, sqrt(2) - 1)) times that of t, but at most t = 1, the
process's last scale. The level is gamma / lambda at the eigenvalue 0, EDM's sigma; where the noise is constant, so that
only blur distinguishes the scales, it is the blur's standard deviation in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from dpm_scales.errors import require
from dpm_scales.processes import Context, Process, Step
from dpm_scales.samplers.grids import scales_at
from dpm_scales.schedules import is_number


class Churn:
    """Noise added before each step of a sampler.

    Args:
        s_churn: EDM's S_churn, >= 0.
        s_min, s_max: levels between which steps are churned; s_max None for no bound.
        s_noise: factor on the added noise; published values are 1.003 to 1.007.

    Raises: UserError for negative numbers, and for s_max < s_min.
    """

    def __init__(self, s_churn: float, s_min: float = 0.0, s_max: float | None = None, s_noise: float = 1.0) -> None:
        for name, value in {"s_churn": s_churn, "s_min": s_min, "s_noise": s_noise}.items():
            require(is_number(value) and value >= 0, f"{name} must be a number >= 0, got {value!r}")
        ok = s_max is None or (is_number(s_max) and s_max >= s_min)
        require(ok, f"s_max must be a number >= s_min={s_min:g} or null, got {s_max!r}")
        self.s_churn, self.s_min, self.s_noise = float(s_churn), float(s_min), float(s_noise)
        self.s_max = math.inf if s_max is None else float(s_max)

    def check(self, process: Process, scales: Tensor) -> Tensor:
        """Return the churned scales of `scales`. Raises UserError for a process without noise."""
        require(
            process.has_noise(),
            f"churn adds noise, and {type(process).__name__} has none; set sampler.s_churn=0",
        )
        return self.scales(process, scales)

    def scales(self, process: Process, scales: Tensor) -> Tensor:
        """Return t_hat >= t of every step, ``(steps,)``, along descending `scales` ``(steps + 1,)``."""
        ts = scales[:-1]
        level = _level(process)
        now = level(ts)
        factor = 1 + min(self.s_churn / len(ts), math.sqrt(2) - 1)
        higher = scales_at(level, factor * now, 1 / process.num_scales)
        return torch.where((now >= self.s_min) & (now <= self.s_max), torch.maximum(higher, ts), ts)

    def add(
        self, process: Process, y: Tensor, t: Tensor, t_hat: Tensor, noise: Tensor, context: Context = None
    ) -> Tensor:
        """Return y at t_hat by the transition from y at t, whose eps is `noise` times s_noise."""
        step = Step(process, t, t_hat)
        spread = (lambda mu: self.s_noise * step.transition_std(mu), noise)
        return process.operator(context).combine((step.rho, y), spread)


def _level(process: Process) -> Callable[[Tensor], Tensor]:
    """Return the level that grows with t: gamma / lambda, or under constant noise the blur's standard deviation."""
    blur = process.blur
    if process.has_constant_noise() and blur is not None:
        return lambda t: (2 * blur(t)).sqrt()
    return process.noise_level
