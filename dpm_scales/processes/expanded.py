"""Processes whose operator depends on the context and is expanded, since no transform diagonalises it.

To define such a process, subclass `StencilProcess` with two methods: `context`, which derives something from the image
(a smoothed copy, say), and `edge_weights`, which derives weights from that. The rest follows.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Hashable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from dpm_scales.operators import (
    Degrees,
    ExpandedOperator,
    HeatOperator,
    Operator,
    SpectralFunction,
    StencilOperator,
    chebyshev_degree,
)
from dpm_scales.operators.degrees import RehearsedOperator
from dpm_scales.operators.expanded import TOLERANCE
from dpm_scales.processes.law import Context, Process
from dpm_scales.processes.steps import Scale, few_scales
from dpm_scales.rng import Randomness
from dpm_scales.schedules import BlurSchedule, Color, NoiseSchedule, require_positive

STRIDES = (1, 4, 20, 100)
"""Step lengths, in scales, whose functions determine the degree when a process is built."""

REHEARSED = 100
"""Number of scales whose functions are rehearsed then; where others need a higher degree, a device returns NaN."""

DENSE_PIXELS = 1024
"""Largest number of pixels for which the entropy of coloured noise is computed from dense matrices."""


class ExpandedProcess(Process, ABC):
    """A process with a context and an expanded operator; without a context it is diffusion with unit weights.

    Args:
        num_scales, noise, blur, min_decay, value_range, color: as for `Process`. There is no clock: a clock is not a
            smooth function of mu, as an expansion needs.
        tolerance: bound on the error of f(L), relative to the largest f. For functions that vanish like a square root
            at mu = 0, as the posterior's standard deviation under constant noise does, it is 1e-2.

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
        #: degree sufficient for the means of the law itself
        self.degree = chebyshev_degree(self._means(ts, len(ts), STRIDES), self.tolerance)
        self.degrees.learn(*self._means(ts, REHEARSED, {*STRIDES, num_scales // 4, num_scales // 2, num_scales}))
        if color is not None:
            self._rehearse_noise(few_scales(ts[1:], REHEARSED // 4))

    def _means(self, ts: Tensor, number: int, strides: Collection[int]) -> list[SpectralFunction]:
        """Return the factors of the law's means for steps of the lengths `strides`, at no more than `number` scales."""
        pick = few_scales(torch.arange(len(ts)), number)
        functions: list[SpectralFunction] = [self.signal(ts[pick])]
        for stride in strides:
            if 1 <= stride <= self.num_scales:
                finer = pick[pick < len(ts) - stride]
                step = self.step(ts[finer], ts[finer + stride])
                functions += [step.rho, step.posterior_coef_xt, step.posterior_coef_x0]
        return functions

    def _rehearse_noise(self, ts: Tensor) -> None:
        """Learn the degrees of the coloured noise that training adds."""
        with self.rehearsal("noise", 1) as new:
            if new:
                self.noise_at(ts, ts[:, None, None, None], self._operator)

    @abstractmethod
    def context(self, x_0: Tensor, generator: Randomness = None) -> Context: ...

    @abstractmethod
    def operator(self, context: Context = None) -> Operator: ...

    def degree_of(self, *functions: SpectralFunction) -> int:
        return max(self.degree, chebyshev_degree(functions, self.tolerance))

    def conditional_entropy(self, t: Scale, size: tuple[int, int], context: Context = None) -> Tensor:
        """Return H(U_t | U_0) as `Process` does; with a context and a colour float64 ``(B | 1, C | 1)``.

        Coloured noise has the determinant of gamma_t(L), for which the eigenvalues of each context's matrix are
        computed. Images of more than `DENSE_PIXELS` get those of unit weights instead, with an error below 0.01 nats
        per pixel for guidance noise of 0.1.
        """
        operator = self.operator(context)
        if self.color is None or not isinstance(operator, ExpandedOperator) or math.prod(size) > DENSE_PIXELS:
            return super().conditional_entropy(t, size, context)
        scales, mu = self._scale(t).reshape(-1), operator.dense_eigenvalues()
        per_mode = 0.5 * math.log(2 * math.pi * math.e) + self.log_noise_scale(scales, mu)[:, 0]
        total = per_mode.expand(len(scales), *mu.shape).sum(-1)  # every scale with every sample
        both = len(scales) > 1 and len(mu) > 1
        return (total.diagonal().T if both else total.flatten(0, 1)) + operator.log_volume()

    @contextmanager
    def rehearsal(self, key: Hashable, calls: int) -> Iterator[bool]:
        # a colour that learns changes when it is fitted or loaded, and with it the degrees: a device then waits
        if key in self.degrees.rehearsed or (self.color is not None and self.color.learns):
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
    """A process of diffusion along the edges of the pixel grid, with weights computed from a context."""

    @abstractmethod
    def context(self, x_0: Tensor, generator: Randomness = None) -> Context:
        """Return the context ``(B, ...)`` of images ``(B, C, H, W)``, one each, drawn with `generator` if random."""

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
