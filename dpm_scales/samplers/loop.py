"""The loop over pairs of scales that all samplers share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dpm_scales.denoisers import BaseDenoiser, WithoutNetwork
from dpm_scales.describe import Describable
from dpm_scales.errors import UserError, is_whole, require, require_choice
from dpm_scales.operators import Operator
from dpm_scales.priors import Prior
from dpm_scales.processes import Context, Process, Step
from dpm_scales.processes.law import DEFAULT_SIZE
from dpm_scales.rng import CounterRNG
from dpm_scales.samplers.churn import Churn
from dpm_scales.samplers.color import StepColor, require_color
from dpm_scales.samplers.grids import (
    GRIDS,
    karras_grid,
    logsnr_grid,
    quadratic_grid,
    tables_of,
    uniform_grid,
)
from dpm_scales.schedules import Color, require_positive
from dpm_scales.targets import NextScale

OnStep = Callable[[int, Tensor], None]


@dataclass(frozen=True)
class PastStep:
    """A finished step: the y at t from which it started, and m = lambda_s y_0-hat from the estimate at t."""

    t: Tensor
    s: Tensor
    y: Tensor
    m: Tensor


@dataclass(frozen=True)
class StepContext:
    """One step of a sampler, from scale t down to s."""

    #: for evaluations from t down to s, see `BaseDenoiser.for_steps`
    denoiser: BaseDenoiser
    t: Tensor
    s: Tensor
    noise: CounterRNG
    context: Context = None
    labels: Tensor | None = None
    #: finished steps, newest first: a multistep sampler appends to it, the loop bounds its length by `memory`
    past: deque[PastStep] = field(default_factory=lambda: deque(maxlen=0))
    #: number of steps after this one
    left: int = 0
    #: colour of the noise that the step adds; None for white noise
    color: StepColor | None = None

    @property
    def process(self) -> Process:
        return self.denoiser.process

    @property
    def operator(self) -> Operator:
        return self.process.operator(self.context)

    def error_variance(self, mu: Tensor) -> Tensor:
        """Return v(mu, t), the variance of the estimate's error at the eigenvalues of the DCT, see `covariance`."""
        denoiser = self.denoiser
        assert denoiser.error_variance is not None  # `Sampler.check` requires it
        found: Tensor = denoiser.error_variance(self.process, denoiser.spectrum, self.t, mu)
        return found

    @property
    def curves(self) -> Step:
        """Return the functions of mu between the two scales."""
        return Step(self.process, self.s, self.t)

    def predict_mean(self, y: Tensor) -> Tensor:
        """Evaluate the denoiser at y_t and return m_s = lambda_s(L) y_0-hat."""
        return self.denoiser.predict_mean(y, self.t, self.s, self.context, self.labels)

    def image(self, y: Tensor, m: Tensor) -> Tensor:
        """Return the image at the end of the last step, s = 0: m_0, but y_t where a clock has not started at t.

        Such a frequency has no noise yet, so that of y_t is the image's own, and needs no estimate.
        """
        if self.process.clock is None:
            return m
        ratio = self.curves.noise_ratio  # 1 for such a frequency, else 0
        return self.operator.combine((lambda mu: (ratio(mu), 1 - ratio(mu)), [y, m]))

    def white(self, like: Tensor) -> Tensor:
        """Draw white noise of the shape and dtype of `like`."""
        return self.noise.normal(tuple(like.shape[1:]), like.dtype)

    def added(self, like: Tensor) -> Tensor:
        """Draw the noise eps' that the step adds: white noise, tinted by the sampler's `noise_color`."""
        white = self.white(like)
        return white if self.color is None else self.color.tint(self.t, white)


class Sampler(Describable, ABC):
    """Base class of all samplers: the loop over pairs of scales. A subclass defines `step`.

    Args:
        steps: number of steps, at most the process's num_scales; None for all scales.
        grid: "uniform" in t, "quadratic", "karras" (EDM's, in the noise level) or "logsnr", see `samplers.grids`.
        rho: exponent of the karras grid.
        noise_color: colour of the noise that steps add, see `samplers.color`; inexact. None for white noise.

    Raises: UserError for values out of range.
    """

    #: whether a step evaluates only its own two scales, as required by a network that predicts the next scale only
    one_scale_at_a_time = True
    #: number of finished steps that `step` uses
    memory = 0
    #: noise added before each step; None for none
    churn: Churn | None = None
    noise_color: Color | None = None
    #: covariance of a step, where a sampler has a choice; None for the published one
    covariance: str | None = None

    def __init__(
        self,
        steps: int | None = None,
        grid: str = "uniform",
        rho: float = 7.0,
        noise_color: Color | None = None,
    ) -> None:
        require(steps is None or is_whole(steps, 1), f"steps must be a whole number >= 1 or null, got {steps!r}")
        require_choice("grid", grid, GRIDS)
        require_positive(self, rho=rho)
        if noise_color is not None:
            require_color(noise_color)
        self.steps, self.grid, self.rho, self.noise_color = steps, grid, float(rho), noise_color

    @property
    def is_random(self) -> bool:
        """Return whether the result depends on noise drawn after the start; True unless a sampler overrides it."""
        return True

    def scales(self, process: Process, device: torch.device | str | None = None) -> Tensor:
        """Return ``(steps + 1,)`` scales from 1 down to 0. Raises UserError for more steps than scales."""
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

    def check(self, denoiser: BaseDenoiser) -> None:
        """Raise UserError, before any work, if this sampler can't run with this denoiser."""
        self.require_covariance(denoiser)
        scales = self.scales(denoiser.process, tables_of(denoiser.process))
        if isinstance(denoiser.target, NextScale):
            if not self.one_scale_at_a_time:
                raise UserError(
                    f"sampler {type(self).__name__} looks at other scales than the next one, which the finer-scale "
                    "target does not know; use sampler=dissipation or ancestral"
                )
            require(self.grid == "uniform", "the finer-scale target needs sampler.grid=uniform")
        denoiser.target.check_scales(denoiser.process, scales)
        if self.noise_color is not None:
            self._check_color(self.noise_color, denoiser)
        self._rehearse(denoiser, scales)

    def require_covariance(self, denoiser: BaseDenoiser) -> None:  # noqa: B027 - most samplers need none
        """Raise UserError if steps need the variance of the denoiser's error and none was measured for its weights."""

    def _check_color(self, color: Color, denoiser: BaseDenoiser) -> None:
        """Raise UserError for a colour if no noise is added, and for one that vanishes or overflows."""
        name, process = type(self).__name__, type(denoiser.process).__name__
        without = "set noise_color=null"
        require(
            self.is_random,
            f"noise_color colours the noise that steps add, and {name} adds none here; {without}, or take sampler="
            "ancestral, ddim or dpmpp with sampler.eta=1, or heun with sampler.s_churn above 0",
        )
        require(denoiser.process.has_noise(), f"noise_color needs noise, and {process} has none; {without}")
        StepColor(color, denoiser, DEFAULT_SIZE)

    def _rehearse(self, denoiser: BaseDenoiser, scales: Tensor) -> None:
        """Run all steps without a network if the operator expands its functions, so that devices need not wait later.

        A custom sampler that needs a real image or its context is not rehearsed.
        """
        key = (type(self), repr(vars(self)), type(denoiser.target), *scales.tolist())
        try:
            with denoiser.process.rehearsal(key, len(scales)) as new:
                if new:
                    y = torch.zeros(1, 1, 1, 1, dtype=torch.float64, device=scales.device)
                    self.reverse(WithoutNetwork(denoiser), y, CounterRNG(0, 1, device=scales.device), scales=scales)
        except UserError:
            raise
        except Exception:  # whatever a custom sampler raises; devices then wait for its functions
            return

    @torch.no_grad()
    def sample(
        self,
        denoiser: BaseDenoiser,
        prior: Prior,
        noise: CounterRNG,
        size: tuple[int, int, int],
        labels: Tensor | None = None,
        scales: Tensor | None = None,
        on_step: OnStep | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """Draw images: y_1 from the prior, then the reverse process down to scale 0.

        Args:
            noise: one stream per sample; their number is B.
            size: (C, H, W).
            labels: ``(B,)`` int64 or None.
            scales: replaces the sampler's own grid, descending to 0; the caller must then have called `check`.
            on_step: called with the index of each finished step and the image after it (pixels).

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
        denoiser: BaseDenoiser,
        y: Tensor,
        noise: CounterRNG,
        context: Context = None,
        labels: Tensor | None = None,
        scales: Tensor | None = None,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """Run the loop from y (whitened) at ``scales[0]`` and return images; arguments and result as for `sample`."""
        process = denoiser.process
        operator = process.operator(context)
        if scales is None:
            scales = self.scales(process, y.device)
        churned = None if self.churn is None else self.churn.scales(process, scales)
        color = None
        if self.noise_color is not None:
            color = StepColor(self.noise_color, denoiser, (y.shape[-2], y.shape[-1]), y.device)
        starts = scales[:-1] if churned is None else churned
        denoisers = denoiser.for_steps(starts, scales[1:], labels)
        past: deque[PastStep] = deque(maxlen=self.memory)
        steps, last = scales.unbind(), len(scales) - 2  # tensors of their own, by which curves are kept
        with process.kept_curves():
            for i in range(last + 1):
                t = steps[i] if churned is None else churned[i]
                move = StepContext(denoisers[i], t, steps[i + 1], noise, context, labels, past, last - i, color)
                if self.churn is not None:
                    y = self.churn.add(process, y, steps[i], t, move.added(y), context)
                m = move.predict_mean(y)
                y = self.step(move, y, m) if i < last else move.image(y, m)
                if on_step is not None:
                    on_step(i, operator.to_pixels(y))
        return operator.to_pixels(y)

    @abstractmethod
    def step(self, move: StepContext, y: Tensor, m: Tensor) -> Tensor:
        """Return y_s, ``(B, C, H, W)`` in whitened coordinates, for s > 0.

        Args:
            move: the two scales, and whatever else a step may need: process, denoiser, noise, finished steps.
            y: y_t.
            m: m_s = lambda_s(L) y_0-hat by the denoiser's estimate at y_t.
        """
