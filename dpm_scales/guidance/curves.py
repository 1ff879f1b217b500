r"""Curves of guidance: a weight w(r) for each frequency in place of one number.

A curve multiplies the DCT of the difference between two predictions. r is the radial frequency of a coefficient in
cycles per pixel, whatever the process's operator,

    r = sqrt(k^2 / H^2 + l^2 / W^2) / 2,    from 0, the mean intensity, to 0.707

| class | w(r) |
|---|---|
| LowHigh | low + (high - low) / (1 + (cutoff / r)^sharpness) |
| ListedGuidance | linear between listed frequencies, constant beyond |

A weight of 0 leaves the answer guided away from, 1 the model's own, more than 1 exaggerates their difference.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from dpm_scales.describe import Describable
from dpm_scales.errors import UserError, require, require_number
from dpm_scales.schedules.base import Float64Module, frequency_knots, on_knots

MAX_WEIGHT = 1e30
"""Largest weight: close to the limit of single precision."""

HIGHEST_FREQUENCY = 0.5**0.5
"""Radial frequency of the finest checkerboard, in cycles per pixel."""


class GuidanceCurve(Describable, Float64Module, ABC):
    """A weight of guidance for each frequency; subclasses define `forward`."""

    def __init__(self) -> None:
        super().__init__()

    @abstractmethod
    def forward(self, r: Tensor) -> Tensor:
        """Return the weight at radial frequencies r >= 0 in cycles per pixel: float64, from 0 to 1e30, r's shape."""

    @property
    def constant(self) -> float | None:
        """The weight, if it is known to be the same at all frequencies."""
        return None

    def check(self) -> None:
        """Raise UserError unless the weights of all frequencies are in range."""
        like = next(self.buffers(), None)
        device = None if like is None else like.device
        r = torch.linspace(0, HIGHEST_FREQUENCY, 65, dtype=torch.float64, device=device)
        with torch.no_grad():
            w = self(r)
        name = type(self).__name__
        shape = tuple(w.shape) if isinstance(w, Tensor) else type(w).__name__
        require(shape == (65,), f"guidance: {name} returns {shape} for 65 frequencies; it must return one weight each")
        wrong = ~((w >= 0) & (w <= MAX_WEIGHT))  # also where it is not a number
        if bool(wrong.any()):
            first = int(wrong.nonzero()[0])
            raise UserError(
                f"guidance: {name} has the weight {float(w[first]):g} at {float(r[first]):.3g} cycles per pixel; "
                f"allowed are 0 to {MAX_WEIGHT:g}"
            )


class LowHigh(GuidanceCurve):
    """One weight for low frequencies, another for high ones, with a smooth step between them.

    Args:
        low: weight of the mean intensity, from 0 to 1e30.
        high: weight far above the cutoff, as `low`.
        cutoff: radial frequency in cycles per pixel, in (0, 1], with the mean of both weights.
        sharpness: exponent in (0, 1000]; at twice the cutoff 1 / (1 + 2^sharpness) of the step is left.

    Raises: UserError for values out of range.
    """

    def __init__(self, low: float = 1.0, high: float = 1.0, cutoff: float = 0.1, sharpness: float = 4.0) -> None:
        super().__init__()
        for name, value in (("low", low), ("high", high)):
            require_number(f"guidance.{name}", value, 0, MAX_WEIGHT)
        for name, value, most in (("cutoff", cutoff, 1), ("sharpness", sharpness, 1000)):
            require_number(f"guidance.{name}", value, 0, most)
            require(value > 0, f"guidance.{name} must be positive, got {value!r}")
        self.low, self.high = float(low), float(high)
        self.cutoff, self.sharpness = float(cutoff), float(sharpness)

    @property
    def constant(self) -> float | None:
        return self.low if self.low == self.high else None

    def forward(self, r: Tensor) -> Tensor:
        step = torch.sigmoid(self.sharpness * (r.to(torch.float64) / self.cutoff).log())
        return torch.lerp(torch.full_like(step, self.low), torch.full_like(step, self.high), step)


class ListedGuidance(GuidanceCurve):
    """Weights at listed frequencies, linear between them and constant beyond.

    Args:
        weights: from 0 to 1e30, at least two.
        frequencies: radial frequencies in cycles per pixel, ascending in [0, 1], one for each weight; None for evenly
            spaced ones from 0 to 0.5.

    Raises: UserError for values out of range and for lists of different lengths.
    """

    knots: Tensor
    values: Tensor

    def __init__(self, weights: Sequence[float], frequencies: Sequence[float] | None = None) -> None:
        super().__init__()
        listed, places = frequency_knots(self, weights, frequencies)
        require(
            max(listed) <= MAX_WEIGHT, f"ListedGuidance: weights must be at most {MAX_WEIGHT:g}, got {max(listed):g}"
        )
        require(places[-1] <= 1, f"ListedGuidance: frequencies are in cycles per pixel, at most 1, got {places[-1]:g}")
        self.register_buffer("knots", torch.tensor(places, dtype=torch.float64), persistent=False)
        self.register_buffer("values", torch.tensor(listed, dtype=torch.float64), persistent=False)
        self._constant = listed[0] if len(set(listed)) == 1 else None

    @property
    def constant(self) -> float | None:
        return self._constant

    def forward(self, r: Tensor) -> Tensor:
        return on_knots(self.values, self.knots, r.to(torch.float64))
