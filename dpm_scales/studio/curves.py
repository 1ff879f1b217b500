r"""Measure a photo under a process: the image at a scale, and the curves of its scale-space.

With E_k the energy of the photo's DCT coefficients near the eigenvalue mu_k, where white is 1, and n_k their number,

    power(t, mu)     = lambda_t(mu)^2 E(mu) / n(mu) + gamma_t(mu)^2                      its mean over the noise
    variance(t)      = sum_{k > 0} (lambda_t(mu_k)^2 E_k + gamma_t(mu_k)^2 n_k) / N      likewise, over N pixels

where the operator is diagonal in the DCT basis. That of osmosis is not: both are then measured on the image that is
shown. Curves are evaluated at `KNOTS` frequencies and are linear in between, so that a slider need not wait for all
frequencies.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dpm_scales.images import to_range
from dpm_scales.metrics import image_variance
from dpm_scales.operators import HeatOperator
from dpm_scales.processes import Process
from dpm_scales.rng import CounterRNG
from dpm_scales.spectrum import DataSpectrum
from dpm_scales.study.comparison import Entry

Array = NDArray[np.float64]

KNOTS = 200
RINGS = 40
"""Points of a spectrum, evenly spaced in the logarithm of the frequency."""

SCALES = 41
MEASURED_SCALES = 13
"""Scales at which the variance is drawn: from the closed form, and measured on images."""

ENTROPY_SIDE = 64
"""Side of the image whose entropy is drawn, for processes without a context; it hardly changes the value per pixel."""

HEAT = HeatOperator()


class View:
    """A photo under a process, always with the same noise.

    Args:
        name: name of the process.
        process: bound to the size of the photo. A noise colour that is measured from data is fitted to the photo.
        image: uint8 ``(C, H, W)``.
        seed: seed of the noise and of the context.
    """

    def __init__(self, name: str, process: Process, image: Tensor, seed: int = 0) -> None:
        self.name, self.process, self.image = name, process, image
        self.entry = Entry(name, process, (1.0,))
        self.x_0 = to_range(image[None], process.value_range)
        if process.color is not None:
            spectrum = DataSpectrum(max(float(self.x_0.std()), 1e-3))
            mean = self.x_0.mean((-2, -1))
            spectrum.fit([(self.x_0 - mean[..., None, None], mean)])
            process.fit_color(spectrum)
        self.context = process.context_from(self.x_0, CounterRNG(seed, 1))
        self.operator = process.operator(self.context)
        self.y_0 = self.operator.to_white(self.x_0)
        self.white = CounterRNG(seed + 1, 1).normal(tuple(self.x_0.shape[1:]), self.x_0.dtype)

    @torch.no_grad()
    def at(self, t: float) -> Tensor:
        """Return x_t in pixels of the process's value range, ``(1, C, H, W)``."""
        scale = torch.tensor(t, dtype=torch.float64)
        return self.operator.to_pixels(self.process.perturb(self.y_0, scale, self.white, self.operator))

    def shown(self, x: Tensor) -> Tensor:
        """Return x_t as a uint8 image ``(C, H, W)``, as `study.comparison.Entry.shown` does."""
        return self.entry.shown(x)[0]

    @property
    def is_stretched(self) -> bool:
        """True if images are shown with stretched contrast, from their smallest to their largest value."""
        return not self.entry.keeps_grey

    def _unit(self, x: Tensor) -> Tensor:
        """Return images with black 0 and white 1, float64."""
        low, high = self.process.value_range
        return (x.to(torch.float64) - low) / (high - low)

    # --- curves at one scale ------------------------------------------------------------------------------------------

    @cached_property
    def frequencies(self) -> Tensor:
        """Frequencies in cycles per pixel, from one period of the image to that of the largest eigenvalue."""
        highest = self.operator.largest or HEAT.largest
        lowest = 0.5 / max(self.image.shape[-2:])
        return torch.logspace(math.log10(lowest), math.log10(math.sqrt(highest) / (2 * math.pi)), RINGS).double()

    def snr(self, t: float) -> Array | None:
        """Return lambda_t^2 / gamma_t^2 in dB at `frequencies`; None without noise and at t = 0."""
        if t == 0 or not self.process.has_noise():
            return None
        mu = (2 * math.pi * self.frequencies) ** 2
        decibels = (10 / math.log(10)) * self.process.log_snr(t, mu)
        return decibels.expand(mu.shape).numpy()

    # --- curves of all scales -----------------------------------------------------------------------------------------

    @cached_property
    def _energy(self) -> tuple[Tensor, Tensor, Tensor]:
        """Knots mu_k, with E_k and n_k; the coefficient of the mean, which is constant, is left out."""
        u = HEAT.analysis(self._unit(self.x_0)).square().mean((0, 1)).flatten()[1:]
        own = self.process.operator().eigenvalues(*self.image.shape[-2:])
        mu = (own if own.numel() > 1 else HEAT.eigenvalues(*self.image.shape[-2:])).flatten()[1:]
        knots = torch.logspace(math.log10(float(mu.min())), math.log10(float(mu.max())), KNOTS, dtype=torch.float64)
        place = torch.searchsorted(knots, mu).clamp(1, KNOTS - 1)
        share = ((mu - knots[place - 1]) / (knots[place] - knots[place - 1])).clamp(0, 1)
        sums = torch.zeros(2, KNOTS, dtype=torch.float64)
        for row, values in enumerate((u, torch.ones_like(u))):
            sums[row].index_add_(0, place - 1, (1 - share) * values).index_add_(0, place, share * values)
        return knots, sums[0], sums[1]

    @property
    def is_closed(self) -> bool:
        """True if the operator is diagonal in the DCT basis."""
        return self.operator.is_diagonal

    @cached_property
    def variance(self) -> tuple[Array, Array]:
        """Scales, and the variance of the image's pixels at each, black 0 and white 1."""
        ts = np.linspace(0, 1, SCALES if self.is_closed else MEASURED_SCALES)
        if not self.is_closed:
            return ts, np.array([float(image_variance(self._unit(self.at(float(t)))).mean()) for t in ts])
        knots, energy, number = self._energy
        low, high = self.process.value_range
        found = []
        for t in map(float, ts):
            signal, noise = self.process.signal_scale(t, knots), self.process.noise_scale(t, knots) / (high - low)
            noise = noise.expand(knots.shape) if t > 0 else torch.zeros_like(knots)
            found.append(float((signal.square() * energy + noise.square() * number).sum()))
        return ts, np.array(found) / self.image.shape[-1] / self.image.shape[-2]

    @cached_property
    def entropy(self) -> tuple[Array, Array] | None:
        """Scales > 0, and the conditional entropy in nats per pixel and channel; None without noise."""
        if not self.process.has_noise():
            return None
        height, width = self.image.shape[-2:]
        if not self.process.has_context:
            height, width = min(height, ENTROPY_SIDE), min(width, ENTROPY_SIDE)
        ts = torch.linspace(0, 1, SCALES, dtype=torch.float64)[1:]
        nats = self.process.conditional_entropy(ts[:, None].flatten(), (height, width), self.context)
        return ts.numpy(), (nats.reshape(len(ts), -1).mean(1) / (height * width)).numpy()

    @cached_property
    def schedule(self) -> Schedule:
        """The curves of the process against t."""
        return schedule(self.process)

    def power(self, x: Tensor) -> tuple[Array, Array]:
        """Return frequencies in cycles per pixel, and the mean power of an image's DCT coefficients around them."""
        return ring_power(self._unit(x))


@dataclass(frozen=True)
class Schedule:
    """The curves of a process against t, without an image.

    Attributes:
        ts: scales.
        signal: lambda_t by frequency in cycles per pixel; 0 is the mean intensity.
        noise: gamma_t likewise, black 0 and white `high - low`.
        log_snr: log(lambda_t^2 / gamma_t^2) likewise; nan without noise.
        blur_sigma: in px; None for a process that does not blur.
    """

    ts: Array
    signal: dict[float, Array]
    noise: dict[float, Array]
    log_snr: dict[float, Array]
    blur_sigma: Array | None


FREQUENCIES = (0.0, 0.05, 0.5)
"""Frequencies in cycles per pixel whose curves are drawn: the mean intensity, coarse structure, the finest detail."""


def schedule(process: Process, number: int = 101) -> Schedule:
    """Return the curves of a process at `number` scales from 0 to 1."""
    ts = torch.linspace(0, 1, number, dtype=torch.float64)
    mu = torch.tensor([(2 * math.pi * r) ** 2 for r in FREQUENCIES], dtype=torch.float64)
    shape = (number, len(mu))
    signal = process.signal_scale(ts, mu).reshape(number, -1).expand(shape)
    noise = process.noise_scale(ts, mu).reshape(number, -1).expand(shape)
    snr = process.log_snr(ts, mu).reshape(number, -1).expand(shape) if process.has_noise() else signal * math.nan

    def by_frequency(table: Tensor) -> dict[float, Array]:
        return {r: table[:, k].numpy() for k, r in enumerate(FREQUENCIES)}

    gaussian = process.blur is not None and process.blur.is_gaussian
    sigma = (2 * process.blur(ts)).sqrt().numpy() if gaussian and process.blur is not None else None
    return Schedule(ts.numpy(), by_frequency(signal), by_frequency(noise), by_frequency(snr), sigma)


def ring_power(x: Tensor) -> tuple[Array, Array]:
    """Return frequencies in cycles per pixel and the mean squared DCT coefficients in rings around them.

    Args:
        x: images ``(B, C, H, W)``, over which the mean is taken too.

    Returns: two arrays of at most `RINGS` entries, one for each ring that holds a coefficient; the mean is left out.
    """
    height, width = x.shape[-2:]
    energy = HEAT.analysis(x.to(torch.float64)).square().mean((0, 1)).flatten()[1:]
    r = HEAT.eigenvalues(height, width).flatten()[1:].sqrt() / (2 * math.pi)
    position = (r / r.min()).log() / (r.max() / r.min()).log() * RINGS
    ring = position.long().clamp(0, RINGS - 1)
    number = torch.bincount(ring, minlength=RINGS).double()
    sums = torch.zeros(2, RINGS, dtype=torch.float64)
    sums[0].index_add_(0, ring, energy)
    sums[1].index_add_(0, ring, r.log())
    kept = number > 0
    return (sums[1, kept] / number[kept]).exp().numpy(), (sums[0, kept] / number[kept]).numpy()
