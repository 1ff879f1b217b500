"""Processes of osmosis with a coloured noise, and their laws in closed form, by dense matrices."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dpm_scales.processes import Blurring, InverseHeat, InverseOsmosis, Osmosis, OsmosisDiffusion, Process
from dpm_scales.schedules import Color, ConstantNoise, LinearTimeBlur, LowPass, PowerLaw
from support.oracles import float64
from support.osmosis_twins import guidance_images, means, white_function
from support.reference import Array, NoiseTwin, cosine_log_snr, eigenvalues, exploding, log_snr_curve

K, BATCH, CHANNELS, SIZE = 8, 2, 2, (2, 4)
TIME, CONSTANT, FLOOR = 2.0, 0.1, 0.001
T, S = float64([0.4, 1.0]), float64([0.15, 0.7])


class Falling(Color):
    """w = (1 + mu)^-1/2, smooth on the whole spectrum."""

    def log_shape(self, t: Tensor, mu: Tensor) -> Tensor:
        return -0.5 * torch.log1p(mu)


@dataclass(frozen=True)
class Tone:
    """A colour of the package or of one's own, and its closed form."""

    build: Callable[[], Color]
    weight: Callable[[float, Array], Array]
    smooth: bool = True

    def __call__(self, t: float, mu: Array) -> Array:
        """Return w_t(mu), normalised over the spectrum of the constant guidance image for unit energy."""
        weight = self.weight(t, mu)
        if self.build().energy == "published":
            return weight
        return np.asarray(weight / np.sqrt((self.weight(t, eigenvalues(*SIZE, "discrete")) ** 2).mean()))


TONES = {
    "falling": Tone(Falling, lambda t, mu: (1 + mu) ** -0.5),
    "low-pass": Tone(lambda: LowPass(0.3), lambda t, mu: np.exp(-0.3 * mu * (1 - t))),
    "power-law": Tone(lambda: PowerLaw(0.5, 0.2), lambda t, mu: (np.sqrt(mu) / (2 * np.pi) + 0.2) ** 0.5, False),
}


@dataclass(frozen=True)
class Kind:
    """A process of osmosis, its heat counterpart, and their curves in closed form."""

    osmosis: Callable[[Color], Osmosis]
    heat: Callable[[Color], Process]
    noise: NoiseTwin
    floor: float

    def signal(self, t: float, mu: Array) -> Array:
        return np.asarray(self.noise.at(t)[0] * ((1 - self.floor) * np.exp(-mu * TIME * t) + self.floor))


KINDS = {
    "osmosis-diffusion": Kind(
        lambda color: OsmosisDiffusion(K, blur=LinearTimeBlur(TIME), color=color, tolerance=1e-12),
        lambda color: Blurring(K, blur=LinearTimeBlur(TIME), spectrum="discrete", color=color),
        log_snr_curve(cosine_log_snr, K),
        FLOOR,
    ),
    "inverse-osmosis": Kind(
        lambda color: InverseOsmosis(K, ConstantNoise(CONSTANT), LinearTimeBlur(TIME), color=color, tolerance=1e-12),
        lambda color: InverseHeat(K, ConstantNoise(CONSTANT), LinearTimeBlur(TIME), "discrete", color=color),
        exploding(lambda k: CONSTANT, K),
        0.0,
    ),
}


def at_zero(mu: Array) -> Array:
    """Return eigenvalues of a dense matrix, with 0 for the one that is 0 up to rounding."""
    return np.where(mu < 1e-12, 0.0, mu)


class Case:
    """A coloured process, guidance images, and the functions of L in closed form."""

    def __init__(self, kind: str, tone: str) -> None:
        self.kind, self.tone = KINDS[kind], TONES[tone]
        self.process = self.kind.osmosis(self.tone.build())
        self.process.bind_size(SIZE)
        self.v = guidance_images(BATCH, CHANNELS, *SIZE, dark=0.0)
        self.root = (self.v / means(self.v)).sqrt()
        self.signal = self.kind.signal
        #: whether the standard deviation of a step is smooth: its square vanishes at mu = 0 under constant noise
        self.smooth_steps = self.tone.smooth and kind == "osmosis-diffusion"

    def noise(self, t: float, mu: Array) -> Array:
        return np.asarray(math.sqrt(self.kind.noise.at(t)[1]) * self.tone(t, mu))

    def function(self, f: Callable[[Array], Array], y: Tensor) -> Tensor:
        """Return f(L) y by the dense matrices."""
        return white_function(lambda mu: f(at_zero(mu)), self.v, y)

    def each(self, f: Callable[[float, float, Array], Array], y: Tensor) -> Tensor:
        """Return f_{s, t}(L) y for the scales of each sample."""
        pairs = zip(S.tolist(), T.tolist(), strict=True)
        rows = [self.function(lambda mu, s=s, t=t: f(s, t, mu), y) for s, t in pairs]  # type: ignore[misc]
        return torch.cat([row[b : b + 1] for b, row in enumerate(rows)])

    # --- the law, by its formulas

    def rho(self, s: float, t: float, mu: Array) -> Array:
        return self.signal(t, mu) / self.signal(s, mu)

    def beta(self, s: float, t: float, mu: Array) -> Array:
        return np.sqrt((self.noise(t, mu) ** 2 - (self.rho(s, t, mu) * self.noise(s, mu)) ** 2).clip(0))

    def gain(self, s: float, t: float, mu: Array) -> Array:
        return self.rho(s, t, mu) * self.noise(s, mu) ** 2 / self.noise(t, mu) ** 2

    def pull(self, s: float, t: float, mu: Array) -> Array:
        return self.signal(s, mu) - self.gain(s, t, mu) * self.signal(t, mu)

    def spread(self, s: float, t: float, mu: Array) -> Array:
        return self.noise(s, mu) * self.beta(s, t, mu) / self.noise(t, mu)


case = functools.cache(Case)
