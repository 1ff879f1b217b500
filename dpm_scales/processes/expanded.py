"""Processes whose operator depends on the context and is expanded, since no transform diagonalises it.

A process of one's own is a subclass of `StencilProcess` with two methods: `context`, which makes something of the image
(a smoothed copy, say), and `edge_weights`, which makes weights of that. The rest follows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Hashable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from dpm_scales.operators import Degrees, HeatOperator, Operator, SpectralFunction, StencilOperator, chebyshev_degree
from dpm_scales.operators.degrees import RehearsedOperator
from dpm_scales.operators.expanded import TOLERANCE
from dpm_scales.processes.law import Context, Process
from dpm_scales.rng import Randomness
from dpm_scales.schedules import BlurSchedule, Color, NoiseSchedule, require_positive

STRIDES = (1, 4, 20, 100)
"""Steps, in scales, whose functions are looked at when a process is built."""

REHEARSED = 100
"""Scales whose functions are rehearsed then; where others need more, a device says so."""


class ExpandedProcess(Process, ABC):
    """A process with a context and an expanded operator; without a context it is diffusion with weights of one.

    Args:
        num_scales, noise, blur, min_decay, value_range, color: as for `Process`. There is no clock: it is no smooth
            function of mu, which an expansion needs.
        tolerance: bound on the error of f(L), relative to the largest f. Functions that vanish like a root at mu = 0,
            as the posterior's standard deviation under constant noise does, are met to 1e-2.

    Raises: UserError as `Process` does, and for values out of range.
    """

    def __init__(
        self,
        num_scales: int,
        noise: NoiseSchedule,
        blur: BlurSchedule | None,
        min_decay: float = 0.0,
        value_range: Sequence[float] = (-1.0, 1.0),
        tolerance: float = TOLERANCE,
        color: Color | None = None,
    ) -> None:
        super().__init__(HeatOperator("discrete"), num_scales, noise, blur, min_decay, value_range, color)
        require_positive(self, tolerance=tolerance)
        self.tolerance = float(tolerance)
        self.degrees = Degrees(self.tolerance)
        ts = torch.arange(self.num_scales + 1, dtype=torch.float64) / self.num_scales
        #: degree that is enough for the law's own means
        self.degree = chebyshev_degree(self._means(ts, len(ts), STRIDES), self.tolerance)
        self.degrees.learn(*self._means(ts, REHEARSED, {*STRIDES, num_scales // 4, num_scales // 2, num_scales}))

    def _means(self, ts: Tensor, number: int, strides: Collection[int]) -> list[SpectralFunction]:
        """Return the factors of the law's means, for steps of these lengths, at no more than `number` scales."""
        pick = torch.linspace(0, len(ts) - 1, min(len(ts), number)).round().long()
        functions: list[SpectralFunction] = [self.signal(ts[pick])]
        for stride in strides:
            if 1 <= stride <= self.num_scales:
                finer = pick[pick < len(ts) - stride]
                step = self.step(ts[finer], ts[finer + stride])
                functions += [step.rho, step.posterior_coef_xt, step.posterior_coef_x0]
        return functions

    @abstractmethod
    def context(self, x_0: Tensor, generator: Randomness = None) -> Context: ...

    @abstractmethod
    def operator(self, context: Context = None) -> Operator: ...

    def degree_of(self, *functions: SpectralFunction) -> int:
        return max(self.degree, chebyshev_degree(functions, self.tolerance))

    @contextmanager
    def rehearsal(self, key: Hashable, calls: int) -> Iterator[bool]:
        if key in self.degrees.rehearsed:
            yield False
            return
        own, self._operator = self._operator, RehearsedOperator(self.degrees, calls)
        try:
            with self.degrees.all_or_nothing():
                yield True
            self.degrees.rehearsed.add(key)
        finally:
            self._operator = own


class StencilProcess(ExpandedProcess):
    """A process of diffusion along the edges of the pixel grid, with weights that follow from a context."""

    @abstractmethod
    def context(self, x_0: Tensor, generator: Randomness = None) -> Context:
        """Return the context of images ``(B, C, H, W)``, one for each: ``(B, ...)``; drawn, where it is random."""

    @abstractmethod
    def edge_weights(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weights of the edges to the right and to the lower neighbour, in [0, 1].

        Returns: ``(B, C | 1, H, W - 1)`` and ``(B, C | 1, H - 1, W)``.
        """

    def operator(self, context: Context = None) -> Operator:
        if context is None:
            return self._operator
        right, down = self.edge_weights(context)
        return StencilOperator(right.detach(), down.detach(), degrees=self.degrees)
