"""The loop over pairs of scales that all samplers share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from dpm_scales.denoisers import Denoiser
from dpm_scales.errors import UserError, is_whole, require, suggest
from dpm_scales.noise import NoiseSource
from dpm_scales.priors import Prior
from dpm_scales.processes import Context, Process
from dpm_scales.samplers.grids import GRIDS, karras_grid, logsnr_grid, tables_of, uniform_grid
from dpm_scales.schedules import require_positive
from dpm_scales.targets import FinerScale

OnStep = Callable[[int, Tensor], None]


class Sampler:
    """The loop; members give one step.

    Args:
        steps: number of steps, at most the process's num_scales; None for all of them.
        grid: "uniform" in t, "karras" (EDM's, in the noise level) or "logsnr" (uniform in it).
        rho: exponent of the karras grid.
    """

    #: may be used where the network knows only the next finer scale
    one_scale_at_a_time = True

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
        return uniform_grid(process, steps, device)

    def check(self, denoiser: Denoiser) -> None:
        """Raise UserError, before any work, if this sampler can't run with this denoiser."""
        scales = self.scales(denoiser.process, tables_of(denoiser.process))
        if isinstance(denoiser.target, FinerScale):
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
        noise: NoiseSource,
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
        noise: NoiseSource,
        context: Context = None,
        labels: Tensor | None = None,
        scales: Tensor | None = None,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """The loop itself, from y (white coordinates) at ``scales[0]``; see `sample`."""
        operator = denoiser.process.operator(context)
        if scales is None:
            scales = self.scales(denoiser.process, y.device)
        last, before = len(scales) - 2, None
        for i in range(last + 1):
            t, s = scales[i], scales[i + 1]
            m = denoiser.clean(y, t, s, context, labels)
            if i < last:
                estimate = m if before is None else self.continued(denoiser, m, before, scales[i - 1], t, s, context)
                y, before = self.step(denoiser, y, estimate, t, s, noise, context, labels), m
            else:
                y = m
            if on_step is not None:
                on_step(i, operator.to_pixels(y))
        return operator.to_pixels(y)

    def continued(
        self, denoiser: Denoiser, m: Tensor, before: Tensor, r: Tensor, t: Tensor, s: Tensor, context: Context
    ) -> Tensor:
        """What `step` takes for m_s, from the second step on.

        Args:
            m: m_s by the estimate at t.
            before: m_t by the estimate at r, the scale before t.
        """
        return m

    @abstractmethod
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
        """y_s from y_t and m_s."""
