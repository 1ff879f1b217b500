r"""Multistep samplers for any operator: DPM-Solver++ (Lu et al. 2022) and UniPC (Zhao et al. 2023).

With h = (l_s - l_t) / 2 the exact step of the probability-flow ODE is, for each eigenvalue,

    y_s = gamma_s / gamma_t y_t + lambda_s int exp(-(h - x)) y_0-hat(x) dx,      x from 0 to h in half the logSNR

A DDIM step takes y_0-hat to be constant. Here it is the polynomial through the last estimates. Let
r_k = (l_k - l_t) / (2 h) be the position of estimate k, in steps: r < 0 for earlier ones, r = 1 for the one at the end.
A DDIM step then uses, instead of m_s,

    m_s + sum_k c_k lambda_s (y_0-hat_k - y_0-hat),      sum_k c_k r_k^j = b_j = j! phi_{j+1}(-h) / phi_1(-h),

with phi_1(z) = (exp(z) - 1) / z, phi_{j+1} = (phi_j - 1 / j!) / z; a single estimate has b_1 = 1/2 (for both: Zhao et
al. 2023, Eq. (8) with B(h) = exp(h) - 1, "bh2"; for the second order also Lu et al. 2022, Algorithm 2).

h is a function of mu: under blur each frequency has its own logSNR, hence its own h and r. Where the stored mean of an
earlier estimate retains less than a thousandth of a frequency, that estimate is not used, and the order falls by one.
Without blur lambda_s / lambda_t is one number, and the methods are the published ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dpm_scales.errors import is_whole, require
from dpm_scales.processes import Process, Step
from dpm_scales.samplers.loop import PastStep, StepContext
from dpm_scales.samplers.one_step import DDIM
from dpm_scales.schedules import Color

_FAINT = 1e-3
_SHORTEST = 1e-12  # h of a step below which a frequency does not change
_SERIES = 0.3  # h below which phi is summed as a series of `_TERMS` terms, since the closed forms cancel
_TERMS = 12


class DPMSolver(DDIM):
    """DPM-Solver++(2M), second order with one evaluation per step, and its stochastic variant.

    Args:
        eta: 0 for the probability-flow ODE, DPM-Solver++(2M); 1 for its SDE, SDE-DPM-Solver++(2M).
        steps: number of steps and of evaluations.
        grid, rho, noise_color: as for `Sampler`; "logsnr" is the authors' grid.
        order: 2, or 1 for DPM-Solver++(1), which is `DDIM`.
        covariance: covariance of a step, see `DDIM`; requires eta > 0.
    """

    one_scale_at_a_time = False
    highest = 2

    def __init__(
        self,
        eta: float = 0.0,
        steps: int | None = 20,
        grid: str = "logsnr",
        rho: float = 7.0,
        order: int = 2,
        noise_color: Color | None = None,
        covariance: str | None = None,
    ) -> None:
        super().__init__(eta, steps, grid, rho, noise_color, covariance)
        require(
            covariance is None or eta > 0,
            f"covariance={covariance} adds noise, and eta=0 is the probability flow, which has none; set sampler.eta=1",
        )
        ok = is_whole(order, 1) and order <= self.highest
        require(ok, f"order must be a whole number from 1 to {self.highest}, got {order!r}")
        self.order = order
        self.memory = order - 1

    def step(self, move: StepContext, y: Tensor, m: Tensor) -> Tensor:
        used = list(move.past)[: min(self.order, move.left + 1) - 1]
        move.past.appendleft(PastStep(move.t, move.s, y, m))
        return super().step(move, y, _extrapolate(move, m, used))


class UniPC(DPMSolver):
    """UniPC: each estimate is used twice, to correct the step that led to it and to predict the next one.

    The predictor of order 2 is that of DPM-Solver++(2M); the corrector, which costs no evaluation, raises the order by
    one. It solves the probability-flow ODE only; as published, the order falls in the last steps.

    Args:
        order: order p of the predictor, 1 to 3; the method is then of order p + 1 unless limited by frequencies that
            are blurred away or by the first steps, which have no older estimates. Measured orders on Gaussian data,
            t = 0.9 to 0.1, 20 to 80 steps: 2.0 for p = 1; 2.9 to 3.2 for p = 2; for p = 3 only 2.8 to 3.3 on VP,
            blurring and heat, and 4.0 on VE.
        steps: number of steps and of evaluations.
        grid, rho: as for `Sampler`.
        noise_color: must be None, since no noise is added.
    """

    highest = 3

    def __init__(
        self,
        order: int = 2,
        steps: int | None = 20,
        grid: str = "logsnr",
        rho: float = 7.0,
        noise_color: Color | None = None,
    ) -> None:
        super().__init__(0.0, steps, grid, rho, order, noise_color)
        self.memory = order

    def step(self, move: StepContext, y: Tensor, m: Tensor) -> Tensor:
        return super().step(move, self.correct(move, y, m), m)

    def correct(self, move: StepContext, y: Tensor, m: Tensor) -> Tensor:
        """Return y_t from the last step repeated, its polynomial now also through the estimate at t."""
        if not move.past:
            return y
        last, *older = list(move.past)[: self.order]
        curves, again = move.curves, replace(move, t=last.t, s=move.t)
        polynomial = _Interpolation(move.process, last.t, move.t, [p.t for p in older], [p.s for p in older], end=True)

        def weights(mu: Tensor) -> list[Tensor]:
            *before, ending = polynomial.weights(mu)
            return [*before, ending * curves.rho(mu)]

        return DDIM.step(self, again, last.y, move.operator.combine((weights, [last.m, *(p.m for p in older), m])))


def _extrapolate(move: StepContext, m: Tensor, used: Sequence[PastStep]) -> Tensor:
    """Return m_s from the polynomial through the estimate at t and those of the steps `used`, newest first."""
    if not used:
        return m
    polynomial = _Interpolation(move.process, move.t, move.s, [p.t for p in used], [p.s for p in used])
    return move.operator.combine((polynomial.weights, [m, *(p.m for p in used)]))


@dataclass(frozen=True)
class _Interpolation:
    """The coefficients c_k of the step from t to s, as functions of mu.

    Args:
        knots: the scales of the earlier estimates, newest first.
        kept: the scale whose lambda(L) multiplies y_0-hat in each stored estimate.
        end: whether the estimate at s is also known; its c_k is the last.
    """

    process: Process
    t: Tensor
    s: Tensor
    knots: Sequence[Tensor]
    kept: Sequence[Tensor]
    end: bool = False

    def weights(self, mu: Tensor) -> list[Tensor]:
        """Return the weight of lambda_s y_0-hat, then those of the other estimates in their stored form."""
        found = self._coefficients(mu)
        shrink = [Step(self.process, self.s, kept).rho(mu).clamp(min=1e-30) for kept in self.kept]
        stored = [c / r for c, r in zip(found, shrink, strict=False)]
        return [1 - torch.stack(found).sum(0), *stored, *found[len(stored) :]]

    def _coefficients(self, mu: Tensor) -> list[Tensor]:
        """Return all c_k, of a lower order where an estimate cannot be used."""
        number = len(self.knots)
        h = Step(self.process, self.s, self.t).half_log_snr_gain(mu)
        changes = (h > _SHORTEST) & torch.isfinite(h)
        h = torch.where(changes, h, 1.0)
        asked = number + self.end
        moments = [torch.full_like(h, 0.5)] if asked == 1 else _moments(h, asked)
        ends = [torch.ones_like(h)] if self.end else []
        found = [torch.zeros_like(h)] * number + [changes * c for c in _lagrange(ends, moments)]
        places: list[Tensor] = []
        coarser, covered = self.t, torch.zeros_like(h)
        for k in range(number):
            length = Step(self.process, coarser, self.knots[k]).half_log_snr_gain(mu)
            changes = changes & (length > _SHORTEST) & torch.isfinite(length)
            coarser, covered = self.knots[k], covered + torch.where(changes, length, 1.0)
            places.append(-covered / h)
            exact = _lagrange(places + ends, moments)
            padded = exact[: k + 1] + [torch.zeros_like(h)] * (number - k - 1) + exact[k + 1 :]
            trust = changes.to(h.dtype)
            if self.process.blur is not None:
                left = Step(self.process, self.s, self.kept[k]).rho(mu)
                trust = trust * left**2 / (left**2 + _FAINT**2)
            found = [torch.lerp(low, high, trust) for low, high in zip(found, padded, strict=True)]
        return found


def _moments(h: Tensor, number: int) -> list[Tensor]:
    """Return b_1, b_2, ... = j! phi_{j+1}(-h) / phi_1(-h)."""
    small = h < _SERIES
    near, far = torch.where(small, h, 0.0), torch.where(small, 1.0, h)
    phi = -torch.expm1(-far) / far
    first = torch.where(small, _series(near, 1), phi)
    moments = []
    for j in range(1, number + 1):
        phi = (1 / math.factorial(j) - phi) / far
        moments.append(math.factorial(j) * torch.where(small, _series(near, j + 1), phi) / first)
    return moments


def _series(h: Tensor, k: int) -> Tensor:
    """Return phi_k(-h) = sum_m (-h)^m / (m + k)!"""
    total = torch.zeros_like(h)
    for m in reversed(range(_TERMS)):
        total = total * -h + 1 / math.factorial(m + k)
    return total


def _lagrange(places: Sequence[Tensor], moments: Sequence[Tensor]) -> list[Tensor]:
    """Return c_k with sum_k c_k r_k^j = b_j: moments of the polynomials that are 1 at r_k, 0 at 0 and the others."""
    found = []
    for k, place in enumerate(places):
        polynomial, value = [torch.ones_like(place)], place
        for i, other in enumerate(places):
            if i != k:
                shifted = [torch.zeros_like(place), *polynomial]
                polynomial = [
                    a - other * b for a, b in zip(shifted, [*polynomial, torch.zeros_like(place)], strict=True)
                ]
                value = value * (place - other)
        found.append(sum((a * b for a, b in zip(polynomial, moments, strict=False)), torch.zeros_like(place)) / value)
    return found
