r"""Homogeneous diffusion in the DCT basis, for any rectangle.

With reflecting boundaries the Laplacian on an H x W grid is diagonal in the orthonormal DCT-II:

    mu_{kl} = pi^2 (k^2/H^2 + l^2/W^2)                      continuous spectrum, Eq. (35), Peter 2024
    mu_{kl} = 4 sin^2(pi k/2H) + 4 sin^2(pi l/2W)           the 5-point stencil's ("discrete")

Both are sums of a row and a column part, so exp(-mu T) is separable and a blur is two small matrix products,
G_H(T) x G_W(T). By the product-to-sum rule a blur matrix is Toeplitz plus Hankel,

    G(T)_{ij} = h(i - j) + h(i + j + 1),   h(n) = 1/2N sum_k w_k exp(-mu_k T) cos(pi k n/N),   w_0 = 1, w_k = 2,

so that building it costs one (N x N+1) product for the whole batch instead of a matrix product per sample.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dpm_scales.errors import UserError, require, suggest
from dpm_scales.operators.base import Decay, Operator, SpectralFunction

SPECTRA = ("continuous", "discrete")


def _cosines(n: int, columns: int, numerator_step: int, offset: int, device: torch.device | str | None) -> Tensor:
    """cos(pi k (numerator_step * j + offset) / 2n) for k < n, j < columns, in float64; exact phases by integer modulo."""
    k = torch.arange(n, device=device)[:, None]
    j = torch.arange(columns, device=device)[None, :] * numerator_step + offset
    return torch.cos(((k * j) % (4 * n)).to(torch.float64) * (math.pi / (2 * n)))


def dct_matrix(n: int, device: torch.device | str | None = None) -> Tensor:
    """Orthonormal DCT-II as an ``(n, n)`` float64 matrix: ``u = C x``."""
    rows = torch.full((n, 1), math.sqrt(2 / n), dtype=torch.float64, device=device)
    rows[0] = math.sqrt(1 / n)
    return rows * _cosines(n, n, 2, 1, device)


def _axis_eigenvalues(n: int, spectrum: str, device: torch.device | str | None) -> Tensor:
    omega = torch.arange(n, dtype=torch.float64, device=device) * (math.pi / n)
    return omega**2 if spectrum == "continuous" else 4 * torch.sin(omega / 2) ** 2


def _blur_matrix(n: int, time: Tensor, spectrum: str, dtype: torch.dtype) -> Tensor:
    """G(T) of shape ``(*time.shape, n, n)`` in `dtype`, computed in float64."""
    device = time.device
    decay = torch.exp(-_axis_eigenvalues(n, spectrum, device) * time[..., None]) / n
    decay[..., 0] /= 2
    taps = (decay @ _cosines(n, n + 1, 2, 0, device)).to(dtype)
    i = torch.arange(n, device=device)
    near = (i[:, None] - i[None, :]).abs()
    far = i[:, None] + i[None, :] + 1
    far = torch.minimum(far, 2 * n - far)  # h(2N - n) = h(n): the image seen in the far mirror
    return taps[..., near] + taps[..., far]


def heat_blur(x: Tensor, dissipation_time: Tensor | float, spectrum: str = "continuous") -> Tensor:
    """Homogeneous diffusion ``exp(T Laplacian) x`` with reflecting boundaries (Eq. (33)-(35), Peter 2024).

    Args:
        x: images ``(B, C, H, W)``, any float dtype.
        dissipation_time: T in px^2 (``blur_sigma**2 / 2``), >= 0; a number, ``()`` or one per sample ``(B,)``.
        spectrum: "continuous" (Gaussian) or "discrete" (the 5-point stencil).

    Returns: ``(B, C, H, W)``, same dtype.
    Raises: UserError for a shape or spectrum that does not fit.
    """
    _check_spectrum(spectrum)
    require(x.ndim == 4, f"heat_blur: images must be (B, C, H, W), got shape {tuple(x.shape)}")
    if isinstance(dissipation_time, Tensor):
        time = dissipation_time.to(device=x.device, dtype=torch.float64)
    else:
        require(dissipation_time >= 0, f"heat_blur: dissipation_time must be >= 0 px^2, got {dissipation_time}")
        time = torch.full((), dissipation_time, dtype=torch.float64, device=x.device)
    if time.ndim > 1 or (time.ndim == 1 and time.shape[0] != x.shape[0]):
        raise UserError(
            f"heat_blur: dissipation_time must be a number or one per image ({x.shape[0]},), got {tuple(time.shape)}"
        )
    batch, channels, height, width = x.shape
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

    def __init__(self, spectrum: str = "continuous") -> None:
        _check_spectrum(spectrum)
        self.spectrum = spectrum

    def eigenvalues(self, height: int, width: int, device: torch.device | str | None = None) -> Tensor:
        rows = _axis_eigenvalues(height, self.spectrum, device)
        columns = _axis_eigenvalues(width, self.spectrum, device)
        return rows[:, None] + columns[None, :]

    def analysis(self, x: Tensor) -> Tensor:
        """Orthonormal DCT-II over the last two axes: pixels to coefficients u."""
        rows, columns = self._matrices(x)
        return rows @ (x @ columns.mT)

    def synthesis(self, u: Tensor) -> Tensor:
        """Inverse of `analysis`."""
        rows, columns = self._matrices(u)
        return rows.mT @ (u @ columns)

    def apply(self, f: SpectralFunction, y: Tensor) -> Tensor:
        if isinstance(f, Decay):
            return self._apply_decay(f, y)
        mu = self.eigenvalues(y.shape[-2], y.shape[-1], y.device)
        values = f(mu).to(y.dtype)
        if values.shape[-2:] == (1, 1):
            return values * y
        return self.synthesis(values * self.analysis(y))

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
        columns = dct_matrix(width, x.device).to(x.dtype)
        rows = columns if height == width else dct_matrix(height, x.device).to(x.dtype)
        return rows, columns


def _check_spectrum(spectrum: str) -> None:
    if spectrum not in SPECTRA:
        raise UserError(f"unknown spectrum {spectrum!r}: {suggest(str(spectrum), SPECTRA)}")
