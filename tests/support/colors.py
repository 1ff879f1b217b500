"""Colours, laws, and the white process that a coloured one is on filtered data."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dpm_scales.operators import HeatOperator
from dpm_scales.processes import Blurring, InverseHeat, Process, Spectral, Warm
from dpm_scales.schedules import (
    Color,
    CosineLogSNR,
    DataPower,
    EDMNoise,
    KernelColor,
    LinearTimeBlur,
    ListedColor,
    PowerLaw,
    Rectified,
    SinSquaredBlur,
)
from support.oracles import Estimating
from support.reference import Array, Twin, dct_basis, eigenvalues

SIZE = (6, 10)
K = 12


def data_power() -> Color:
    color = DataPower(0.5)
    color.fit(lambda mu: 1 / (mu + 0.1))
    return color


#: every kind of colour that does not change with t
COLORS: dict[str, Callable[[], Color]] = {
    "power-law": lambda: PowerLaw(0.5),
    "power-law-published": lambda: PowerLaw(-0.3, 0.02, "published"),
    "data": data_power,
    "kernel": lambda: KernelColor(0.4),
    "kernel-periodic": lambda: KernelColor(0.4, 8),
    "listed": lambda: ListedColor([1.0, 0.2, 3.0], [0.0, 0.2, 0.6]),
}
LAWS: dict[str, Callable[[Color | None], Process]] = {
    "vp": lambda color: Spectral(K, CosineLogSNR(), color=color),
    "ve": lambda color: Spectral(K, EDMNoise(0.02, 20.0), color=color),
    "rectified": lambda color: Spectral(K, Rectified(), color=color),
    "blurring": lambda color: Blurring(K, blur=SinSquaredBlur(3.0), color=color),
    "heat": lambda color: InverseHeat(K, blur=LinearTimeBlur(3.0), color=color),
    "warm": lambda color: Warm(K, EDMNoise(0.02, 3.0), 0.5, color=color),
}


class Pair:
    """A coloured process, the white one, and the filter w(L) between them, for images of one size."""

    def __init__(self, law: str, name: str, size: tuple[int, int] = SIZE) -> None:
        self.colored, self.white = LAWS[law](COLORS[name]()), LAWS[law](None)
        self.colored.bind_size(size)
        color = self.colored.color
        assert color is not None
        self.mu = HeatOperator().eigenvalues(*size)
        self.log_weight = color.log(torch.ones(1, 1, dtype=torch.float64), self.mu)
        self._rows, self._columns = (torch.from_numpy(dct_basis(n)) for n in size)

    def tint(self, x: Tensor, power: int = 1) -> Tensor:
        """Return w(L)^power x."""
        return self.multiply(torch.exp(power * self.log_weight), x)

    def multiply(self, factor: Tensor, x: Tensor) -> Tensor:
        """Multiply the DCT coefficients of x by `factor` ``(H, W)``, by scipy's DCT."""
        return self._rows.T @ (factor * (self._rows @ x @ self._columns.T)) @ self._columns

    def denoisers(self) -> tuple[Estimate, Estimate]:
        """Return a denoiser of the coloured process, and that of the white one of which it is the filtered image."""
        return (
            Estimate(self.colored, lambda y: self.tint(y, -1), self.tint),
            Estimate(self.white, lambda z: z, lambda z: z),
        )


pair = functools.cache(Pair)


@dataclass(frozen=True)
class ColoredTwin(Twin):
    """A twin whose noise has the weights w(mu), normalised over the spectrum of images of `size`; without its chain."""

    weight: Callable[[Array], Array] = np.ones_like
    size: tuple[int, int] = SIZE

    def variance(self, t: float, mu: Array) -> Array:
        mean_square = (self.weight(eigenvalues(*self.size)) ** 2).mean()
        return np.asarray(super().variance(t, mu) * self.weight(mu) ** 2 / mean_square)

    def step(self, k: int, mu: Array) -> tuple[Array, Array]:
        raise NotImplementedError


class Estimate(Estimating):
    """An estimate of y_0 that is neither linear nor symmetric, between coordinates given by `there` and `back`."""

    def __init__(self, process: Process, there: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor]) -> None:
        super().__init__(process)
        self.there, self.back = there, back

    def predict_mean(
        self, y_t: Tensor, t: Tensor, s: Tensor, context: Tensor | None = None, labels: Tensor | None = None
    ) -> Tensor:
        z = self.there(y_t)
        estimate = torch.tanh(0.5 * z + 0.3 * z.roll(1, -1) - 0.2 * z.roll(2, -2)) * torch.cos(t)
        return self.process.operator().apply(self.process.signal(s), self.back(estimate))
