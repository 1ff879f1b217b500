"""The loop over pairs of scales that all samplers share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dpm_scales.denoisers import Denoiser
from dpm_scales.errors import UserError, is_whole, require, suggest
from dpm_scales.operators import Operator
from dpm_scales.priors import Prior
from dpm_scales.processes import Context, Process, Step
from dpm_scales.rng import CounterRNG
from dpm_scales.samplers.grids import (
    GRIDS,
    karras_grid,
    logsnr_grid,
    quadratic_grid,
    tables_of,
    uniform_grid,
)
from dpm_scales.schedules import require_positive
from dpm_scales.targets import NextScale

OnStep = Callable[[int, Tensor], None]


@dataclass(frozen=True)
class Move:
    """What a step from scale t down to s has at hand."""

    denoiser: Denoiser
    t: Tensor
    s: Tensor
    noise: CounterRNG
    context: Context = None
    labels: Tensor | None = None

    @property
    def process(self) -> Process:
        return self.denoiser.process

    @property
    def operator(self) -> Operator:
        return self.process.operator(self.context)

    @property
    def curves(self) -> Step:
        """The process's functions of mu between the two scales."""
        return Step(self.process, self.s, self.t)

    def predict_mean(self, y: Tensor) -> Tensor:
        """m_s by the estimate at y_t."""
        return self.denoiser.predict_mean(y, self.t, self.s, self.context, self.labels)

    def white(self, like: Tensor) -> Tensor:
        """White noise for images like these."""
        return self.noise.normal(tuple(like.shape[1:]), like.dtype)


@dataclass(frozen=True)
class Past:
    """A finished step: y at t, from where it started, and m = lambda_s y_0-hat, by the estimate at t."""

    t: Tensor
    s: Tensor
    y: Tensor
    m: Tensor


class Sampler(ABC):
    """The loop; members give one step.

    Args:
        steps: number of steps, at most the process's num_scales; None for all of them.
        grid: "uniform" in t, "quadratic" (in its root), "karras" (EDM's, in the noise level), "logsnr" (uniform in it).
        rho: exponent of the karras grid.
    """

    #: may be used where the network knows only the next finer scale
    one_scale_at_a_time = True
    #: number of finished steps that a step looks back on
    memory = 0

    def __init__(self, steps: int | None = None, grid: str = "uniform", rho: float = 7.0) -> None:
        require(steps is None or is_whole(steps, 1), f"steps must be a whole number >= 1 or null, got {steps!r}")
        if grid not in GRIDS:
            raise UserError(f"unknown grid {grid!r}: {suggest(str(grid), GRIDS)}")
        require_positive(self, rho=rho)
        self.steps, self.grid, self.rho = steps, grid, float(rho)

    def scales(self, process: Process, device: torch.device | str | None = None) -> Tensor:
        """``(steps + 1,)`` scales from 1 down to 0. Raises UserError for more steps than scales."""
        steps = process.num_scales if self.steps is None else self.steps
        require(
            steps <= process.num_scales,
            f"steps={steps} exceeds the process's num_scales={process.num_scales}; lower steps",
        )
        if self.grid == "karras":
            return karras_grid(process, steps, self.rho, device)
        if self.grid == "logsnr":
            return logsnr_grid(process, steps, device)
        if self.grid == "quadratic":
            return quadratic_grid(process, steps, device)
        return uniform_grid(process, steps, device)

    def check(self, denoiser: Denoiser) -> None:
        """Raise UserError, before any work, if this sampler can't run with this denoiser."""
        scales = self.scales(denoiser.process, tables_of(denoiser.process))
        if isinstance(denoiser.target, NextScale):
            if not self.one_scale_at_a_time:
                raise UserError(
                    f"sampler {type(self).__name__} looks at other scales than the next one, which the finer-scale "
                    "target does not know; use sampler=dissipation or ancestral"
                )
            require(self.grid == "uniform", "the finer-scale target needs sampler.grid=uniform")
        denoiser.target.check_scales(denoiser.process, scales)

    @torch.no_grad()
    def sample(
        self,
        denoiser: Denoiser,
        prior: Prior,
        noise: CounterRNG,
        size: tuple[int, int, int],
        labels: Tensor | None = None,
        scales: Tensor | None = None,
        on_step: OnStep | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """Draw images from the prior at scale 1 to scale 0.

        Args:
            noise: one stream per sample; B is its count.
            size: (C, H, W).
            labels: ``(B,)`` int64 or None.
            scales: another grid than the sampler's own, descending to 0; whoever gives one has called `check`.
            on_step: called with the index of each finished step and the image there (pixels).

        Returns: ``(B, C, H, W)`` in pixels (the process's value range, not clipped).
        Raises: UserError if this sampler can't run with this denoiser.
        """
        if scales is None:
            self.check(denoiser)
        y, context = prior.sample(denoiser.process, noise, size, dtype)
        return self.reverse(denoiser, y, noise, context, labels, scales, on_step)

    @torch.no_grad()
    def reverse(
        self,
        denoiser: Denoiser,
        y: Tensor,
        noise: CounterRNG,
        context: Context = None,
        labels: Tensor | None = None,
        scales: Tensor | None = None,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """The loop itself, from y (white coordinates) at ``scales[0]``; see `sample`."""
        operator = denoiser.process.operator(context)
        if scales is None:
            scales = self.scales(denoiser.process, y.device)
        starts = self.starts(denoiser.process, scales)
        last = len(scales) - 2
        past: tuple[Past, ...] = ()
        for i in range(last + 1):
            t, s = scales[i], scales[i + 1]
            if starts is not None:
                y, t = self.raised(denoiser.process, y, t, starts[i], noise, context), starts[i]
            move = Move(denoiser, t, s, noise, context, labels)
            m = move.predict_mean(y)
            if i < last:
                y = self.corrected(move, y, m, past)
                before = Past(t, s, y, m)
                y = self.step(move, y, self.continued(move, m, past, last - i))
                past = (before, *past)[: self.memory]
            else:
                y = m
            if on_step is not None:
                on_step(i, operator.to_pixels(y))
        return operator.to_pixels(y)

    def starts(self, process: Process, scales: Tensor) -> Tensor | None:
        """``(steps,)``: the coarser scale that each step goes to before it starts; None for none."""
        return None

    def raised(
        self, process: Process, y: Tensor, t: Tensor, higher: Tensor, noise: CounterRNG, context: Context
    ) -> Tensor:
        """y at `higher` from y at t, for samplers that have `starts`."""
        return y

    def corrected(self, move: Move, y: Tensor, m: Tensor, past: Sequence[Past]) -> Tensor:
        """y at t once more, now that m_s is known from the estimate there."""
        return y

    def continued(self, move: Move, m: Tensor, past: Sequence[Past], left: int) -> Tensor:
        """What `step` takes for m_s.

        Args:
            m: m_s by the estimate at t.
            past: the last finished steps, the newest first, at most `memory`.
            left: number of steps still to come after this one.
        """
        return m

    @abstractmethod
    def step(self, move: Move, y: Tensor, m: Tensor) -> Tensor:
        """y_s from y_t and m_s."""
