r"""Colours: the spectrum of the noise, w_t(mu) in gamma_t(mu) = gamma_t w_t(mu).

Energy and shape are independent. With `energy="unit"` w is divided by its root mean square over the spectrum of an
image, so that a pixel has as much noise as with white noise at the same t; `energy="published"` uses w as the formula
gives it. The spectrum is that of the image size to which the process is bound (`Process.bind_size`), the size of the
training images; until then it is that of 64 x 64 pixels.

| class | w(mu), r = sqrt(mu) / 2 pi cycles per pixel | source |
|---|---|---|
| WhiteColor | 1 | |
| PowerLaw | (r + offset)^exponent | SAGD, arXiv 2510.09660 |
| DataPower | P(mu)^exponent, P the power of the training images | EqualSNR, arXiv 2505.11278 |
| KernelColor | root of the variance at mu under the covariance (d + 1)^-decay | Flicker-DDPM, arXiv 2606.03393 |
| LowPass | exp(-mu time (1 - t)) | Low-Pass Flow Matching, arXiv 2606.02177 |
| ListedColor | any numbers, log-linear between the frequencies listed | |

A colour that does not change with t reduces to white noise: w(L)^-1 y obeys the white process, with the data
w(L)^-1 y_0.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dpm_scales.describe import Describable
from dpm_scales.errors import is_number, is_whole, require, require_choice, require_finite, require_positive
from dpm_scales.schedules.base import HIGHEST, LOWEST, Float64Module, frequency_knots, on_knots, on_log_knots

ENERGIES = ("unit", "published")
MAX_CONTRAST = 1e6
"""Largest ratio of w between two frequencies: beyond it one of them has no noise in float32."""

UNBOUND = 64
"""Side in px of the images to which a colour refers until it is bound to a size."""

Power = Callable[[Tensor], Tensor]


def frequency(mu: Tensor) -> Tensor:
    """Return the radial frequency sqrt(mu) / (2 pi) in cycles per pixel."""
    return mu.clamp(min=0).sqrt() / (2 * math.pi)


class Color(Describable, Float64Module, ABC):
    """The spectrum of noise. A subclass defines `log_shape`.

    Args:
        energy: "unit" to normalise the mean of w^2 over the spectrum of an image to 1, "published" for the formula's.
    """

    #: whether w is the same at every t > 0
    is_fixed: bool = True
    #: whether w is measured from training images, see `fit`
    learns: bool = False
    #: what to change if w is too uneven, as the end of an error message
    remedy: str = "bring its weights closer together"
    spectrum: Tensor
    fixed_energy: Tensor

    def __init__(self, energy: str = "unit") -> None:
        super().__init__()
        require_choice("energy", energy, ENERGIES, type(self).__name__)
        self.energy = energy
        self.register_buffer("spectrum", torch.zeros(1, dtype=torch.float64), persistent=False)
        self.register_buffer("fixed_energy", torch.zeros((), dtype=torch.float64), persistent=False)

    @abstractmethod
    def log_shape(self, t: Tensor, mu: Tensor) -> Tensor:
        """Return log w_t(mu), before normalisation by `energy`, float64.

        Args:
            t: scales that broadcast against mu, ``(1, ...)`` or ``(B, 1, ...)``; a fixed colour ignores them.
            mu: eigenvalues in 1/px^2.
        """

    def log(self, t: Tensor, mu: Tensor) -> Tensor:
        """Return log w_t(mu), float64; arguments as for `log_shape`."""
        shape = self.log_shape(t, mu)
        if self.energy == "published":
            return shape
        return shape - (self.fixed_energy if self.is_fixed else self.log_energy(t, mu.ndim))

    def log_energy(self, t: Tensor, ndim: int) -> Tensor:
        """Return half the log of the mean of w_t^2 over the spectrum of an image, with `ndim` dimensions of size one.

        Args:
            t: as for `log_shape`.
            ndim: number of dimensions of mu.
        """
        flat = t.reshape(-1, 1)
        log_square = torch.atleast_2d(2 * self.log_shape(flat, self.spectrum))
        log_square = log_square.expand(len(log_square), len(self.spectrum))
        log_mean = 0.5 * (torch.logsumexp(log_square, -1) - math.log(len(self.spectrum)))
        ones = (1,) * ndim
        return log_mean.reshape(-1, 1, *ones) if log_mean.numel() > 1 else log_mean.reshape(ones)

    def bind_spectrum(self, mu: Tensor) -> None:
        """Set the spectrum to which `energy` refers to the eigenvalues mu of the images, of any shape.

        Raises: UserError for a colour that vanishes or overflows there.
        """
        self.spectrum = mu.flatten().to(torch.float64)
        self._measure()
        self.contrast()

    def contrast(self) -> float:
        """Return the log of the largest ratio of w between two frequencies of the spectrum; 0 if w is the same for all.

        Raises: UserError for a colour that vanishes or overflows there.
        """
        ends = torch.linspace(0, 1, 9, dtype=torch.float64, device=self.spectrum.device)[1:]
        shape = torch.stack([self.log_shape(t.reshape(1), self.spectrum).expand(self.spectrum.shape) for t in ends])
        finite, name = bool(torch.isfinite(shape).all()), type(self).__name__
        require(finite, f"{name}: the colour of the noise is zero or infinite at some frequency; {self.remedy}")
        contrast = float((shape.amax(1) - shape.amin(1)).max())
        require(
            contrast <= math.log(MAX_CONTRAST),
            f"{name}: the noise of one frequency is 1e{contrast / math.log(10):.0f} times that of another, at most "
            f"1e{math.log10(MAX_CONTRAST):.0f} is allowed; {self.remedy}",
        )
        return contrast

    def _measure(self) -> None:
        """Compute the energy of a fixed colour, once for all t."""
        if self.is_fixed:
            self.fixed_energy = self.log_energy(torch.ones_like(self.spectrum[:1]), 0)

    def fit(self, power: Power) -> None:  # noqa: B027 - most colours are formulas
        """Fit w to the data's power P(mu), if the colour `learns`; otherwise do nothing."""


class WhiteColor(Color):
    """White noise: w = 1."""

    def __init__(self) -> None:
        super().__init__()

    def log_shape(self, t: Tensor, mu: Tensor) -> Tensor:
        return torch.zeros_like(mu[(slice(0, 1),) * mu.ndim])


class PowerLaw(Color):
    """w = (r + offset)^exponent, r in cycles per pixel (SAGD, arXiv 2510.09660).

    Args:
        exponent: positive for more noise at high frequencies.
        offset: > 0, in cycles per pixel; keeps the mean intensity's noise finite.
    """

    remedy = "lower its exponent"

    def __init__(self, exponent: float = 0.5, offset: float = 0.05, energy: str = "unit") -> None:
        super().__init__(energy)
        require_finite(self, exponent=exponent)
        require_positive(self, offset=offset)
        self.exponent, self.offset = float(exponent), float(offset)

    def log_shape(self, t: Tensor, mu: Tensor) -> Tensor:
        return self.exponent * torch.log(frequency(mu) + self.offset)


class DataPower(Color):
    """w = P(mu)^exponent, P the power of the training images; at 1/2 all frequencies have the same SNR (EqualSNR).

    White until training calls `fit` before its first step; the curve is stored with the model's weights.

    Args:
        exponent: 0.5 for equal SNR (arXiv 2505.11278).
    """

    learns = True
    remedy = "lower its exponent"
    KNOTS = 48
    log_power: Tensor

    def __init__(self, exponent: float = 0.5, energy: str = "unit") -> None:
        super().__init__(energy)
        require_finite(self, exponent=exponent)
        self.exponent = float(exponent)
        self.register_buffer("log_power", torch.zeros(self.KNOTS + 1, dtype=torch.float64))

    @torch.no_grad()
    def fit(self, power: Power) -> None:
        device = self.log_power.device
        knots = torch.linspace(LOWEST, HIGHEST, self.KNOTS, dtype=torch.float64, device=device)
        mu = torch.cat([torch.zeros_like(knots[:1]), knots.exp()])
        self.log_power.copy_(power(mu).log())
        self.bind_spectrum(self.spectrum)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._measure()

    def log_shape(self, t: Tensor, mu: Tensor) -> Tensor:
        return self.exponent * on_log_knots(self.log_power.to(torch.float64), mu)


class KernelColor(Color):
    """Noise whose covariance at the distance d px is close to (d + 1)^-decay (Flicker-DDPM, arXiv 2606.03393).

    The variances of the DCT's coefficients under that covariance K, the diagonal of C K C^T, are those of the closest
    noise that the DCT makes independent. w^2(mu) is their mean over coefficients of similar sqrt(mu), linear in
    between, so that noise has the same power in every direction and a pixel the variance 1 of the kernel. For images
    of 32 x 32 pixels, correlations up to a distance of 8 px are the kernel's to within 0.02 for a decay of 0.2 and
    0.05 for 0.5.

    Args:
        decay: eta > 0; published as 0.20.
        extent: None, or N >= 2 for the cosine series of the kernel along an axis, repeated with a period of 2 N px,
            S_k = sum over dx, dy of C(d) cos(pi k dx / N) with |dx|, |dy| <= N, the ends counted half. Its noise is
            correlated more than the kernel's, by up to 0.2 for N = 32 and images of that size; it was the default.
    """

    FLOOR = 1e-6
    """Lowest power, relative to that of the mean intensity."""
    log_series: Tensor
    unit: Tensor

    def __init__(self, decay: float = 0.2, extent: int | None = None, energy: str = "unit") -> None:
        super().__init__(energy)
        require_positive(self, decay=decay)
        ok = extent is None or (is_whole(extent, 2) and extent <= 512)
        require(ok, f"KernelColor: extent must be null or a whole number from 2 to 512, got {extent!r}")
        self.decay, self.extent = float(decay), extent
        self.register_buffer("log_series", torch.zeros(2, dtype=torch.float64), persistent=False)
        self.register_buffer("unit", torch.tensor(math.pi / (extent or 1), dtype=torch.float64), persistent=False)
        if extent is None:
            lowest = (math.pi / UNBOUND * torch.arange(UNBOUND, dtype=torch.float64)) ** 2
            self._fit_kernel(lowest[:, None] + lowest)
        else:
            self._set(self._periodic(extent))

    def bind_spectrum(self, mu: Tensor) -> None:
        if self.extent is None and mu.ndim == 2:
            self._fit_kernel(mu.to(torch.float64))
        super().bind_spectrum(mu)

    @torch.no_grad()
    def _fit_kernel(self, mu: Tensor) -> None:
        """Set the series to means of the coefficients' variances at multiples of the lowest frequency.

        Args:
            mu: eigenvalues ``(H, W)`` of the DCT's coefficients.
        """
        height, width = mu.shape
        down, right = (torch.arange(n, dtype=torch.float64, device=mu.device) for n in (height, width))
        kernel = self._kernel(down[:, None], right)
        power = dct_products(height, mu.device) @ kernel @ dct_products(width, mu.device).mT
        self.unit = torch.tensor(math.pi / max(height, width), dtype=torch.float64, device=mu.device)
        place = (mu.clamp(min=0).sqrt() / self.unit).flatten()
        below = place.floor()
        share, index = place - below, below.long()
        sums = torch.zeros(2, int(index.max()) + 2, dtype=torch.float64, device=mu.device)
        for number, values in enumerate((power.flatten(), torch.ones_like(place))):
            sums[number].index_add_(0, index, (1 - share) * values).index_add_(0, index + 1, share * values)
        # a knot beyond the last coefficient, or between coarse ones of a narrow image, repeats the one before
        filled = sums[1] > 1e-9
        last = torch.where(filled, torch.arange(len(filled), device=mu.device), 0).cummax(0).values
        self._set((sums[0] / sums[1])[last])

    def _set(self, series: Tensor) -> None:
        self.log_series = series.clamp(min=self.FLOOR * float(series[0])).log()

    def _kernel(self, dy: Tensor, dx: Tensor) -> Tensor:
        return (torch.hypot(dy, dx) + 1) ** -self.decay

    def _periodic(self, extent: int) -> Tensor:
        d = torch.arange(extent + 1, dtype=torch.float64)
        twice = 1.0 + ((d > 0) & (d < extent)).to(d.dtype)  # both signs, the ends half
        return torch.cos(math.pi / extent * d[:, None] * d) @ (twice * (self._kernel(d[:, None], d) @ twice))

    def log_shape(self, t: Tensor, mu: Tensor) -> Tensor:
        last = len(self.log_series) - 1
        place = (mu.clamp(min=0).sqrt() / self.unit).clamp(max=last)
        below = place.clamp(max=last - 1).floor()
        series, index = self.log_series.exp(), below.long()
        return 0.5 * torch.lerp(series[index], series[index + 1], place - below).log()


def dct_products(size: int, device: torch.device | str | None = None) -> Tensor:
    """Return ``(size, size)`` sums over x of c_k(x) c_k(x + d), both signs of d, of the orthonormal DCT's vectors."""
    k = torch.arange(size, dtype=torch.float64, device=device)
    basis = torch.cos(math.pi / size * k[:, None] * (k + 0.5)) * math.sqrt(2 / size)
    basis[0] /= math.sqrt(2)
    power = torch.fft.rfft(basis, 2 * size).abs().square()  # padded, so that nothing wraps
    return torch.fft.irfft(power, 2 * size)[:, :size] * (1 + (k > 0).to(k.dtype))


class LowPass(Color):
    """w_t = exp(-mu time (1 - t)): noise that loses its high frequencies towards the image, white at t = 1.

    Args:
        time: dissipation time at t = 0 in px^2, > 0 (arXiv 2606.02177 leaves the kernel open; this is a Gaussian).
    """

    is_fixed = False
    remedy = "lower its time"

    def __init__(self, time: float = 0.25, energy: str = "published") -> None:
        super().__init__(energy)
        require_positive(self, time=time)
        self.time = float(time)

    def log_shape(self, t: Tensor, mu: Tensor) -> Tensor:
        return -mu * (self.time * (1 - t.to(torch.float64)))


class ListedColor(Color):
    """w at listed frequencies, log-linear between them and constant beyond.

    Args:
        weights: w > 0, at least two.
        frequencies: radial frequencies in cycles per pixel, ascending, one for each weight; None for evenly spaced
            ones from 0 to 0.5.
    """

    knots: Tensor
    values: Tensor

    def __init__(
        self, weights: Sequence[float], frequencies: Sequence[float] | None = None, energy: str = "unit"
    ) -> None:
        super().__init__(energy)
        listed, places = frequency_knots(self, weights, frequencies)
        for k, value in enumerate(listed, start=1):
            ok = is_number(value) and value > 0
            require(ok, f"ListedColor: weights: entry {k} is {value:g}; without noise a frequency has no law, so w > 0")
        self.register_buffer("knots", torch.tensor(places, dtype=torch.float64), persistent=False)
        self.register_buffer("values", torch.tensor(listed, dtype=torch.float64).log(), persistent=False)

    def log_shape(self, t: Tensor, mu: Tensor) -> Tensor:
        return on_knots(self.values, self.knots, frequency(mu))
