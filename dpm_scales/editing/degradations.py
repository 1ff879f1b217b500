r"""Known linear degradations of images: y = A x + sigma eps.

For a Gaussian x of mean m and stationary covariance C, i.e. diagonal in the DCT with the variances c,

    E[x | y] = m + G (y - A m),      G = C A' (A C A' + sigma^2)^-1

| A | A C A' | G |
|---|---|---|
| Blur: K(mu) in the DCT | K^2 c, in the DCT | c K / (K^2 c + sigma^2), in the DCT |
| Average of f x f pixels | sum of c g^2 over aliases, in the small image's DCT | closed form |
| Mask: the known pixels | not diagonal | conjugate gradients |

Averaging f neighbours maps the cosine k of an axis to a cosine of the small axis: k itself, or the one onto which it is
aliased, scaled by g. So A C A' is diagonal for any stationary C, not only for C = 1, where it is 1 / f^2 and G the
pseudo-inverse that repeats each pixel (Wang et al. 2023, DDNM).

For the mask the conjugate gradients are preconditioned by C^-1 restricted to known pixels, which is the inverse up to
effects at the border of the hole: about ten steps are enough.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from dpm_scales.errors import UserError, is_number, require, require_number
from dpm_scales.operators import HeatOperator
from dpm_scales.operators.heat import dct_matrix

_TINY = 1e-300
MOST_BLUR = 1e6
"""Largest blur in pixels."""
HEAT = HeatOperator()


class Degradation(ABC):
    """A linear map A on images ``(B, C, H, W)``.

    Covariances are given as the variances of DCT coefficients, float64 ``(H, W)`` or ``(B, 1, H, W)``.
    """

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """Return A x."""

    @abstractmethod
    def inverse(self, y: Tensor) -> Tensor:
        """Return A^+ y, the image of least norm that A maps to y; for `Blur` it is y, with only the mean right."""

    @abstractmethod
    def gain(self, covariance: Tensor, noise_std: float, residual: Tensor) -> Tensor:
        """Return G r for r = y - A x, ``(B, C, H, W)`` in the dtype of r.

        Args:
            covariance: c > 0.
            noise_std: sigma >= 0, in the images' units.
        """

    def project(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the image nearest to x that A maps to y."""
        return x + self.inverse(y - self.forward(x))

    def level(self, y: Tensor) -> Tensor:
        """Return the mean intensity of the known part, ``(B, C, 1, 1)``."""
        return y.mean((-2, -1), keepdim=True)


class Mask(Degradation):
    """The map that keeps known pixels and sets the others to 0.

    Args:
        known: bool, ``(H, W)`` or broadcastable to the images.
        iterations: number of conjugate gradient steps.
    """

    def __init__(self, known: Tensor, iterations: int = 20) -> None:
        self.known, self.iterations = known, iterations

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(self.known, x, torch.zeros_like(x))

    def inverse(self, y: Tensor) -> Tensor:
        return self.forward(y)

    def project(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.where(self.known, y, x)

    def level(self, y: Tensor) -> Tensor:
        known = self.known.expand_as(y).to(y.dtype)
        return (known * y).sum((-2, -1), keepdim=True) / known.sum((-2, -1), keepdim=True)

    def gain(self, covariance: Tensor, noise_std: float, residual: Tensor) -> Tensor:
        precision = 1 / (covariance + noise_std**2)
        r = self.forward(residual.to(torch.float64))
        x, p, z = torch.zeros_like(r), torch.zeros_like(r), self.forward(_filtered(precision, r))
        rz, beta = _dot(r, z), torch.zeros_like(r[..., :1, :1])
        for _ in range(self.iterations):
            p = z + beta * p
            moved = self.forward(_filtered(covariance, p)) + noise_std**2 * p
            step = _ratio(rz, _dot(p, moved))
            x, r = x + step * p, r - step * moved
            z = self.forward(_filtered(precision, r))
            rz, before = _dot(r, z), rz
            beta = _ratio(rz, before)
        return _filtered(covariance, x).to(residual.dtype)


class Average(Degradation):
    """Means over blocks of f x f pixels: a smaller image, as from a camera with larger pixels.

    Args:
        factor: f >= 1.
    """

    def __init__(self, factor: int) -> None:
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        f, (height, width) = self.factor, x.shape[-2:]
        if height % f or width % f:
            raise UserError(f"factor={f} does not divide images of {height}x{width} pixels")
        return x.reshape(*x.shape[:-2], height // f, f, width // f, f).mean((-3, -1))

    def inverse(self, y: Tensor) -> Tensor:
        return y.repeat_interleave(self.factor, -2).repeat_interleave(self.factor, -1)

    def gain(self, covariance: Tensor, noise_std: float, residual: Tensor) -> Tensor:
        rows, columns = (self._folding(n, residual.device) for n in residual.shape[-2:])
        variance = rows**2 @ covariance @ (columns**2).mT + noise_std**2
        u = HEAT.analysis(residual.to(torch.float64)) / variance
        return HEAT.synthesis(covariance * (rows.mT @ u @ columns)).to(residual.dtype)

    def _folding(self, n: int, device: torch.device) -> Tensor:
        """Return the averaged cosines of an axis in terms of the small axis's, ``(n, f n)``, one entry per column."""
        fine = dct_matrix(self.factor * n, device)
        means = fine.reshape(self.factor * n, n, self.factor).mean(-1)
        folded = dct_matrix(n, device) @ means.mT
        return torch.where(folded.abs() > 1e-9, folded, torch.zeros_like(folded))


class Blur(Degradation):
    """Gaussian blur with reflecting boundaries, as in heat processes: K(mu) = exp(-mu sigma^2 / 2).

    Args:
        blur_sigma: standard deviation in px, > 0.
    """

    def __init__(self, blur_sigma: float) -> None:
        require(is_number(blur_sigma) and blur_sigma > 0, f"blur_sigma must be > 0 px, got {blur_sigma!r}")
        require_number("blur_sigma", blur_sigma, high=MOST_BLUR)
        self.blur_sigma = float(blur_sigma)

    def forward(self, x: Tensor) -> Tensor:
        return _filtered(self._factor(x), x)

    def inverse(self, y: Tensor) -> Tensor:
        return y

    def project(self, x: Tensor, y: Tensor) -> Tensor:
        """Return x itself, since dividing by K would amplify the rounding errors of y."""
        return x

    def gain(self, covariance: Tensor, noise_std: float, residual: Tensor) -> Tensor:
        factor = self._factor(residual)
        gain = covariance * factor / (factor**2 * covariance + noise_std**2).clamp(min=_TINY)
        return _filtered(gain, residual)

    def _factor(self, x: Tensor) -> Tensor:
        mu = HEAT.eigenvalues(x.shape[-2], x.shape[-1], x.device)
        return torch.exp(-mu * (self.blur_sigma**2 / 2))


def _filtered(gain: Tensor, x: Tensor) -> Tensor:
    """Return x with its DCT coefficients multiplied by `gain`, in the dtype of x."""
    return HEAT.synthesis(gain.to(x.dtype) * HEAT.analysis(x))


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Return inner products of image channels, ``(B, C, 1, 1)``."""
    return (a * b).sum((-2, -1), keepdim=True)


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    """Return a / b, and 0 where b is 0, that is, where the conjugate gradients have converged."""
    return torch.where(b.abs() > _TINY, a / b.where(b.abs() > _TINY, torch.ones_like(b)), torch.zeros_like(a))
