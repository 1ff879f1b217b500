r"""The variance of a network's error, by scale and frequency, which the noise of a reverse step neglects.

A step from t to s of the reverse process draws from q(y_s | y_t, y_0) with the network's estimate y_0-hat in place of
y_0, which y_t does not determine fully. By the law of total variance the step closest to p(y_s | y_t) in
Kullback-Leibler divergence, among those with the same mean and a covariance that is diagonal in the DCT, adds noise of
a larger variance to each coefficient:

    b^2(mu) + (lambda_s - a lambda_t)^2 v(t),     v(t) = E <phi, y_0 - y_0-hat(y_t, t)>^2

phi is the coefficient's cosine, an eigenvector of L with eigenvalue mu, and a is the weight of y_t in the step's mean
(`samplers`). With one number v for all coefficients this is Analytic-DPM (Bao et al. 2022, Theorem 1). Others learn v
as a function of y_t, by pixel (Ou et al. 2024) or in the DCT (Xia et al. 2026); here it is an average over images, and
nothing is learnt. If y_0 is Gaussian with independent coefficients and the estimate ideal, y_s then has the law of
scale s exactly, whatever the length of the step.

v is measured on training images (`samplers.measuring`). It is stored as its ratio r to the error of the Wiener estimate
for the data's spectrum P (`spectrum`),

    v(t) = r(t) P gamma_t^2 / (lambda_t^2 P + gamma_t^2),

since r varies slowly: it is interpolated linearly in t between the scales of the table, and bilinearly in the
frequencies of rows and columns between knots (images of up to 16 px have a knot for each frequency). r = 1 for Gaussian
data of that spectrum and an ideal network.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from dpm_scales.errors import UserError, require
from dpm_scales.moments import visible_noise, wiener_error
from dpm_scales.processes import Process
from dpm_scales.schedules.base import Float64Module
from dpm_scales.spectrum import DataSpectrum

#: prefixes of the names of the denoiser's tensors that determine the table
_PARTS = ("network.", "spectrum.")
_NAMES = ("scales", "rows", "columns", "ratio", "num_images", "seed", "weights_sha256")
KNOTS = 16
"""Largest number of knots per axis."""


def knots_of(size: int, device: torch.device | str | None = None) -> Tensor:
    """Return the knots of an axis, at most `KNOTS` frequencies k / size in [0, 1), float64.

    For more frequencies than that, half of the knots are the lowest ones and the rest are evenly spaced in log k.
    """
    k = torch.arange(min(size, KNOTS), dtype=torch.float64, device=device)
    if size > KNOTS:
        half = KNOTS // 2
        spread = torch.linspace(0, 1, KNOTS - half + 1, dtype=torch.float64, device=device)
        k[half - 1 :] = (half - 1) * ((size - 1) / (half - 1)) ** spread
    return k / size


def hats(knots: Tensor, size: int) -> Tensor:
    """Return the weights ``(size, K)`` that interpolate K values at knots to the frequencies k / size.

    Interpolation is linear between the knots, constant beyond the last one; each row sums to 1.
    """
    at = torch.arange(size, dtype=torch.float64, device=knots.device)[:, None] / size
    at = torch.minimum(at, knots[-1])
    one = torch.ones_like(knots[:1])
    below = torch.cat([knots[:1] - one, knots[:-1]])
    above = torch.cat([knots[1:], knots[-1:] + one])
    return torch.minimum((at - below) / (knots - below), (above - at) / (above - knots)).clamp(min=0)


class ErrorVariance(Float64Module):
    """The measured error variance v of one network.

    Args:
        scales: scales of the measurement, ``(S,)``, ascending in (0, 1].
        rows, columns: knots, ``(R,)`` and ``(C,)``, ascending from 0: frequencies in units of pi / px.
        ratio: r at these scales and knots, ``(S, R, C)``, >= 0.
        weights_sha256: digest of the denoiser to which it belongs, see `denoiser_digest`.
        num_images: number of images on which it was measured.
        seed: seed of their noise.

    Tensors are float64. Raises: UserError for other shapes and types, and values out of range.
    """

    scales: Tensor
    rows: Tensor
    columns: Tensor
    ratio: Tensor

    def __init__(
        self,
        scales: Tensor,
        rows: Tensor,
        columns: Tensor,
        ratio: Tensor,
        weights_sha256: str,
        num_images: int,
        seed: int,
    ) -> None:
        super().__init__()
        axes = {"scales": scales, "rows": rows, "columns": columns}
        found = ", ".join(f"{name} {tuple(axis.shape)}" for name, axis in [*axes.items(), ("ratio", ratio)])
        shaped = all(axis.ndim == 1 for axis in axes.values()) and ratio.shape == tuple(map(len, axes.values()))
        floats = all(axis.dtype == torch.float64 for axis in (*axes.values(), ratio))
        require(shaped and floats and ratio.numel() > 0, f"no table of errors: {found}")
        for name, axis in axes.items():
            require(bool((axis.diff() > 0).all()), f"no table of errors: its {name} do not ascend")
        ends = 0 < float(scales[0]) and float(scales[-1]) <= 1 and float(rows[0]) == float(columns[0]) == 0
        require(ends, "no table of errors: its scales leave (0, 1], or its frequencies do not begin at 0")
        require(
            bool((ratio.isfinite() & (ratio >= 0)).all()), "no table of errors: it holds numbers below 0 or no numbers"
        )
        for name, values in {**axes, "ratio": ratio}.items():
            # not in `state_dict`, so that a model's weights are the same with and without a table
            self.register_buffer(name, values, persistent=False)
        self.weights_sha256, self.num_images, self.seed = weights_sha256, num_images, seed

    @staticmethod
    def fit(
        denoiser: nn.Module,
        process: Process,
        spectrum: DataSpectrum,
        mu: Tensor,
        scales: Tensor,
        errors: Tensor,
        num_images: int,
        seed: int,
    ) -> ErrorVariance:
        """Return the table of a denoiser's measured errors.

        Args:
            spectrum: spectrum P of the data.
            mu: eigenvalues of the DCT coefficients, ``(H, W)``.
            scales: ``(S,)``, ascending.
            errors: mean squares of the errors' DCT coefficients, ``(S, H, W)`` float64.
        """
        height, width = errors.shape[-2:]
        rows, columns = knots_of(height, mu.device), knots_of(width, mu.device)
        up, across = hats(rows, height), hats(columns, width)
        linear = _linear_error(process, spectrum, scales, mu)[:, 0]
        ratio = (up.mT @ errors @ across) / (up.mT @ linear @ across)
        # interpolation between knots changes the sum, which is restored here
        kept = (up @ ratio @ across.mT * linear).sum((-2, -1), keepdim=True)
        total = errors.sum((-2, -1), keepdim=True)
        ratio = ratio * torch.where(kept > 0, total / kept, 1)
        return ErrorVariance(scales, rows, columns, ratio, denoiser_digest(denoiser.state_dict()), num_images, seed)

    def forward(self, process: Process, spectrum: DataSpectrum, t: Tensor, mu: Tensor) -> Tensor:
        """Return v, float64 ``(B | 1, 1, H, W)``, in squared units of the value range.

        Args:
            t: ``()`` or ``(B,)``; below the first scale of the table, r is that of this first scale.
            mu: eigenvalues of the DCT coefficients, ``(H, W)``, also if the process has a single eigenvalue.
        """
        at, last = t.reshape(-1), len(self.scales) - 1
        upper = torch.searchsorted(self.scales, at).clamp(min(1, last), last)
        lower = (upper - 1).clamp(min=0)
        low, high = self.scales[lower], self.scales[upper]
        weight = ((at - low) / (high - low).clamp(min=1e-300)).clamp(0, 1)
        ratio = torch.lerp(self.ratio[lower], self.ratio[upper], weight[:, None, None])
        height, width = mu.shape
        ratio = hats(self.rows, height) @ ratio @ hats(self.columns, width).mT
        return ratio[:, None] * _linear_error(process, spectrum, t, mu)

    def require_weights(self, denoiser: nn.Module) -> None:
        """Raise UserError if the table was measured with weights other than the denoiser's."""
        require(
            self.weights_sha256 == denoiser_digest(denoiser.state_dict()),
            "the model's covariance was measured with other weights than it has now; measure it again: "
            "dpm-scales measure MODEL, or model.measure_covariance(images)",
        )

    def record(self) -> dict[str, int | str]:
        """Return plain values that identify the table: number of images, seed and SHA-256."""
        digest = tensors_digest(self.to_tensors().items())
        return {"num_images": self.num_images, "seed": self.seed, "sha256": digest}

    def to_tensors(self) -> dict[str, Tensor]:
        """Return the table as tensors, for storing."""
        counts = {"num_images": self.num_images, "seed": self.seed}
        return {
            **{name: getattr(self, name) for name in _NAMES[:4]},
            "weights_sha256": torch.tensor(list(bytes.fromhex(self.weights_sha256)), dtype=torch.uint8),
            **{name: torch.tensor(count, dtype=torch.int64) for name, count in counts.items()},
        }

    @staticmethod
    def from_tensors(tensors: Mapping[str, Tensor], source: str) -> ErrorVariance:
        """Return the table in the result of `to_tensors`. Raises UserError, naming the file `source`, for others."""
        try:
            scales, rows, columns, ratio, images, seed, digest = (tensors[name] for name in _NAMES)
            ok = digest.dtype == torch.uint8 and digest.shape == (32,)
            require(ok, f"no table of errors: weights_sha256 {tuple(digest.shape)}")
            return ErrorVariance(scales, rows, columns, ratio, bytes(digest.tolist()).hex(), int(images), int(seed))
        except KeyError as error:
            raise UserError(f"{source} is no table of errors: {error} is missing") from error
        except (UserError, RuntimeError, ValueError) as error:
            raise UserError(f"{source}: {error}") from error


def _linear_error(process: Process, spectrum: DataSpectrum, t: Tensor, mu: Tensor) -> Tensor:
    """Return the error of the Wiener estimate, ``(B | 1, 1, *mu.shape)``."""
    error = wiener_error(process.signal_scale(t, mu), spectrum(mu), visible_noise(process, t, mu, spectrum))
    return error.expand(t.numel(), 1, *mu.shape)


def denoiser_digest(state: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of the names and values in `state_dict` of a denoiser's network and spectrum."""
    return tensors_digest((name, value) for name, value in state.items() if name.startswith(_PARTS))


def tensors_digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Return the SHA-256 of named tensors as hexadecimal digits, independent of their order."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors, key=lambda entry: entry[0]):
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(name.encode() + flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
