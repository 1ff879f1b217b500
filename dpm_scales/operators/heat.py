r"""Homogeneous diffusion in the DCT basis, for any rectangle.

With reflecting boundaries the Laplacian on an H x W grid is diagonal in the orthonormal DCT-II:

    mu_{kl} = pi^2 (k^2/H^2 + l^2/W^2)                      continuous spectrum, Eq. (35), Peter 2024
    mu_{kl} = 4 sin^2(pi k/2H) + 4 sin^2(pi l/2W)           the 5-point stencil's ("discrete")

Both are sums of a row and a column part, so exp(-mu T) is separable and a blur is two small matrix products,
G_H(T) x G_W(T) with G(T) = C' diag(exp(-mu T)) C and C the DCT matrix: cheaper than the four products of a transform
and its inverse, and than an FFT up to several hundred pixels.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from dpm_scales.errors import UserError, require, require_choice
from dpm_scales.operators.base import Decay, Operator, PixelOperator, SpectralFunction, Term, images_of, values_of
from dpm_scales.operators.constants import kept

SPECTRA = ("continuous", "discrete")


def dct_matrix(n: int, device: torch.device | str | None = None) -> Tensor:
    """Return the orthonormal DCT-II as an ``(n, n)`` float64 matrix: ``u = C x``."""
    k = torch.arange(n, dtype=torch.float64, device=device)
    basis = torch.cos(torch.outer(k * (math.pi / n), k + 0.5)) * math.sqrt(2 / n)
    basis[0] *= math.sqrt(0.5)
    return basis


def _axis_eigenvalues(n: int, spectrum: str, device: torch.device | str | None) -> Tensor:
    omega = torch.arange(n, dtype=torch.float64, device=device) * (math.pi / n)
    return omega**2 if spectrum == "continuous" else 4 * torch.sin(omega / 2) ** 2


def _eigenvalues(height: int, width: int, spectrum: str, device: torch.device | str | None) -> Tensor:
    rows, columns = (_axis_eigenvalues(n, spectrum, device) for n in (height, width))
    return rows[:, None] + columns[None, :]


@kept
def _basis(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return dct_matrix(n, device).to(dtype)


_kept_axis_eigenvalues = kept(_axis_eigenvalues)
_kept_eigenvalues = kept(_eigenvalues)


def _blur_matrix(n: int, time: Tensor, spectrum: str, dtype: torch.dtype) -> Tensor:
    """Return G(T) of shape ``(*time.shape, n, n)`` in `dtype`; the exponentials are taken in float64."""
    basis = _basis(n, dtype, time.device)
    decay = torch.exp(-_kept_axis_eigenvalues(n, spectrum, time.device) * time[..., None]).to(dtype)
    return (basis.T * decay[..., None, :]) @ basis


def _as_given(x: Tensor) -> torch.autocast:
    """Return a context without autocast: the law is computed in the images' own precision."""
    return torch.autocast(x.device.type, enabled=False)


def heat_blur(x: Tensor, dissipation_time: Tensor | float, spectrum: str = "continuous") -> Tensor:
    """Return the diffused images ``exp(T Laplacian) x`` with reflecting boundaries (Eq. (33)-(35), Peter 2024).

    Args:
        x: images ``(B, C, H, W)``, any float dtype.
        dissipation_time: T in px^2 (``blur_sigma**2 / 2``), >= 0; a number, ``()`` or one per sample ``(B,)``.
        spectrum: "continuous" (Gaussian) or "discrete" (the 5-point stencil).

    Returns: ``(B, C, H, W)``, same dtype.
    Raises: UserError for an invalid shape, dtype, time or spectrum.
    """
    _check_spectrum(spectrum)
    require(x.ndim == 4, f"heat_blur: images must be (B, C, H, W), got shape {tuple(x.shape)}")
    require(x.is_floating_point(), f"heat_blur: images must be of a float dtype, got {x.dtype}; convert with .float()")
    if isinstance(dissipation_time, Tensor):
        time = dissipation_time.to(device=x.device, dtype=torch.float64)
    else:
        require(dissipation_time >= 0, f"heat_blur: dissipation_time must be >= 0 px^2, got {dissipation_time}")
        time = torch.full((), dissipation_time, dtype=torch.float64, device=x.device)
    if time.ndim > 1 or (time.ndim == 1 and time.shape[0] != x.shape[0]):
        raise UserError(
            f"heat_blur: dissipation_time must be a number or one per image ({x.shape[0]},), got {tuple(time.shape)}"
        )
    time = time.clamp(max=1e300)  # 0 * inf: an infinite time leaves the mean image
    batch, channels, height, width = x.shape
    with _as_given(x):
        columns = _blur_matrix(width, time, spectrum, x.dtype)
        rows = columns if height == width else _blur_matrix(height, time, spectrum, x.dtype)
        if time.ndim == 0:
            return rows @ (x @ columns)
        x = torch.bmm(x.reshape(batch, channels * height, width), columns)
        return rows[:, None] @ x.reshape(batch, channels, height, width)


class HeatOperator(Operator):
    """L = -Laplacian on H x W pixels with reflecting boundaries, diagonal in the DCT-II basis.

    Args:
        spectrum: "continuous" (the Gaussian's, default) or "discrete" (the 5-point stencil's, in [0, 8]).
    """

    is_diagonal: ClassVar[bool] = True

    def __init__(self, spectrum: str = "continuous") -> None:
        _check_spectrum(spectrum)
        self.spectrum = spectrum

    @property
    def largest(self) -> float:
        return 2 * math.pi**2 if self.spectrum == "continuous" else 8.0

    def eigenvalues(self, height: int, width: int, device: torch.device | str | None = None) -> Tensor:
        if device is None:  # the default device may change
            return _eigenvalues(height, width, self.spectrum, device)
        return _kept_eigenvalues(height, width, self.spectrum, torch.device(device))

    def analysis(self, x: Tensor) -> Tensor:
        """Return the orthonormal DCT-II over the last two axes: pixels to coefficients u."""
        rows, columns = self._matrices(x)
        with _as_given(x):
            return rows @ (x @ columns.mT)

    def synthesis(self, u: Tensor) -> Tensor:
        """Invert `analysis`."""
        rows, columns = self._matrices(u)
        with _as_given(u):
            return rows.mT @ (u @ columns)

    def apply(self, f: SpectralFunction, y: Tensor) -> Tensor:
        if isinstance(f, Decay):
            return self._apply_decay(f, y)
        mu = self.eigenvalues(y.shape[-2], y.shape[-1], y.device)
        values = f(mu).to(y.dtype)
        if values.shape[-2:] == (1, 1):
            return values * y
        return self.synthesis(values * self.analysis(y))

    def combine(self, *terms: Term) -> Tensor:
        coefficients: list[Tensor] = []
        pixels: list[Tensor] = []
        like = images_of(terms[0])[0]
        mu = self.eigenvalues(like.shape[-2], like.shape[-1], like.device)
        for term in terms:
            ys = images_of(term)
            for given, y in zip(values_of(term[0], mu), ys, strict=True):
                values = given.to(y.dtype)
                if values.shape[-2:] == (1, 1):
                    pixels.append(values * y)
                else:
                    coefficients.append(values * self.analysis(y))
        if coefficients:
            pixels.append(self.synthesis(torch.stack(coefficients).sum(0)))
        return torch.stack(pixels).sum(0)

    def _apply_decay(self, f: Decay, y: Tensor) -> Tensor:
        scale = torch.exp(f.log_scale).to(y.dtype)
        if scale.ndim == 1:
            scale = scale.reshape(-1, 1, 1, 1)
        if f.time is None:
            return scale * y
        blurred = heat_blur(y, f.time, self.spectrum)
        if f.floor > 0:
            blurred = torch.lerp(blurred, y, f.floor)
        return scale * blurred

    @staticmethod
    def _matrices(x: Tensor) -> tuple[Tensor, Tensor]:
        height, width = x.shape[-2:]
        columns = _basis(width, x.dtype, x.device)
        return (columns if height == width else _basis(height, x.dtype, x.device)), columns


def spectral_of(operator: Operator) -> Operator:
    """Return `operator`, or a `HeatOperator`, which resolves frequencies, in place of a `PixelOperator`."""
    return HeatOperator() if isinstance(operator, PixelOperator) else operator


def _check_spectrum(spectrum: str) -> None:
    require_choice("spectrum", spectrum, SPECTRA)
