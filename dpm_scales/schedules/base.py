"""Base class of all schedules: checks of their arguments, the number of scales, tables."""

from __future__ import annotations

import math
from abc import ABC
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from dpm_scales.describe import Describable
from dpm_scales.errors import UserError, is_number, require, require_positive

LOWEST, HIGHEST = math.log(1e-5), math.log(20.0)
"""Range of curves over log mu: from the lowest frequency of an image side of 1000 px to the highest of any image."""


def require_ordered(owner: object, low: str, low_value: float, high: str, high_value: float) -> None:
    require_positive(owner, **{low: low_value, high: high_value})
    if low_value > high_value:
        raise UserError(
            f"{type(owner).__name__}: {low}={low_value:g} exceeds {high}={high_value:g}; swap them or raise {high}"
        )


def numbers_of(owner: object, name: str, values: Sequence[float]) -> list[float]:
    """Return a list from YAML or Python as floats. Raises UserError unless all are finite and >= 0."""
    label = f"{type(owner).__name__}: {name}"
    if isinstance(values, str) or not hasattr(values, "__iter__"):
        raise UserError(f"{label} must be a list of numbers, got {values!r}")
    numbers = list(values)
    require(len(numbers) > 0, f"{label} is empty; give one number per scale")
    for k, value in enumerate(numbers, start=1):
        ok = is_number(value) and value >= 0
        require(ok, f"{label}: entry {k} is {value!r}; every entry must be a number >= 0")
    return [float(value) for value in numbers]


def frequency_knots(
    owner: object, weights: Sequence[float], frequencies: Sequence[float] | None
) -> tuple[list[float], list[float]]:
    """Return listed weights and their frequencies as floats; None for frequencies evenly spaced from 0 to 0.5.

    Raises: UserError unless there are two or more weights, all >= 0, and one ascending frequency for each.
    """
    name = type(owner).__name__
    few = hasattr(weights, "__len__") and len(weights) < 2
    require(not few, f"{name}: weights needs two or more entries")
    listed = numbers_of(owner, "weights", weights)
    if frequencies is None:
        places = [0.5 * k / (len(listed) - 1) for k in range(len(listed))]
    else:
        places = numbers_of(owner, "frequencies", frequencies)
    require(
        len(places) == len(listed),
        f"{name}: {len(listed)} weights and {len(places)} frequencies; give one frequency for each weight",
    )
    ascending = all(a < b for a, b in zip(places, places[1:], strict=False))
    require(ascending, f"{name}: frequencies must ascend, got {places}")
    return listed, places


def on_knots(values: Tensor, knots: Tensor, x: Tensor) -> Tensor:
    """Return a curve at x, linear between its values ``(K,)`` at ascending knots ``(K,)`` and constant beyond them."""
    x = x.clamp(knots[0], knots[-1])
    index = torch.searchsorted(knots, x, right=True).clamp(1, len(knots) - 1)
    low, high = knots[index - 1], knots[index]
    return torch.lerp(values[index - 1], values[index], (x - low) / (high - low))


def on_log_knots(values: Tensor, mu: Tensor) -> Tensor:
    """Return a curve of mu, float64, linear between knots evenly spaced in log mu and constant beyond them.

    Args:
        values: ``(K + 1,)`` float64: the value at mu = 0, then those at K knots from `LOWEST` to `HIGHEST` in log mu.
    """
    knots = len(values) - 1
    place = (mu.clamp(min=1e-30).log() - LOWEST) * ((knots - 1) / (HIGHEST - LOWEST))
    below = place.clamp(0, knots - 2).floor()
    index = below.long()
    curve = torch.lerp(values[1:][index], values[1:][index + 1], (place - below).clamp(0, 1))
    return torch.where(mu > 0, curve, values[0])


class Float64Module(nn.Module):
    """A module whose buffers move with the model to its device, but stay float64 when the model is cast."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Float64Module:
        kept = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        for name, buffer in kept.items():
            moved = self._buffers[name]
            assert moved is not None
            self._buffers[name] = buffer.to(moved.device)
        return self


class Schedule(Describable, Float64Module, ABC):
    """A curve of t. The process that owns it calls `bind` once, which checks and tabulates lists."""

    knots: Tensor
    num_scales: int = 0

    def bind(self, num_scales: int) -> None:
        """Fix the number of scales.

        Raises: UserError if a list has another length, or if the schedule is bound to another number of scales.
        """
        require(
            self.num_scales in (0, num_scales),
            f"{type(self).__name__}: already bound to a process of {self.num_scales} scales, so it can't serve one of "
            f"{num_scales}; give each process a schedule of its own",
        )
        self.num_scales = num_scales

    def _tabulate(self, values: Sequence[float] | Tensor) -> None:
        """Register the values of the curve at the knots k / num_scales, k = 0..num_scales."""
        table = torch.as_tensor(values, dtype=torch.float64)
        self.register_buffer("knots", table, persistent=False)

    def _interpolate(self, t: Tensor) -> Tensor:
        position = (t.to(torch.float64) * self.num_scales).clamp(0, self.num_scales)
        index = position.floor().clamp(max=self.num_scales - 1).long()
        # take: indexing with a 0-dim tensor would wait for the device
        return torch.lerp(self.knots.take(index), self.knots.take(index + 1), position - index)

    def _progress(self, t: Tensor) -> Tensor:
        """Return the position of t from 0 at k = 1 to 1 at t = 1; 1 if there is only one scale."""
        first = 1 / self.num_scales
        return ((t - first) / (1 - first)).clamp(0, 1) if self.num_scales > 1 else torch.ones_like(t)

    def _before_first(self, t: Tensor) -> Tensor:
        """Return the position of t from the image to the first scale: linear from 0 at t = 0 to 1 at k = 1, then 1."""
        t = t.to(torch.float64)
        # before `bind` there is no first scale
        return (t * self.num_scales).clamp(0, 1) if self.num_scales > 0 else (t > 0).to(torch.float64)

    def _fits(self, name: str, values: Sequence[float], num_scales: int) -> None:
        require(
            len(values) == num_scales,
            f"{type(self).__name__}: {name} has {len(values)} entries, but num_scales is {num_scales}; "
            f"set num_scales={len(values)}",
        )

    def _log_ramp_squared(self, t: Tensor, low: float, high: float) -> Tensor:
        """Return the square of a value log-spaced from `low` at k = 1 to `high` at t = 1; it starts linearly from 0."""
        t = t.to(torch.float64)
        ramp = 2 * (math.log(low) + self._progress(t) * math.log(high / low))
        return torch.exp(ramp) * self._before_first(t)
