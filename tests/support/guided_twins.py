"""A dense twin of osmosis diffusion for a given guidance image, with the ideal denoiser of Gaussian images.

The expectation of the package's bound is exact: every term is quadratic in one draw of noise, and the average over the
2 N points +-sqrt(N) e_j has the first and second moments of the normal distribution.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import scipy.special
import scipy.stats
import torch
from torch import Tensor, nn

from dpm_scales.denoisers import Denoiser
from dpm_scales.likelihood import VariationalBound
from dpm_scales.priors import OsmosisPrior
from dpm_scales.processes import Osmosis, OsmosisDiffusion
from dpm_scales.schedules import CosineLogSNR, LinearTimeBlur
from dpm_scales.targets import Clean
from support.oracles import ScriptedNoise
from support.osmosis_twins import white_matrix
from support.reference import Array, cosine_log_snr, dct_basis

LOW_SNR, HIGH_SNR, TIME, FLOOR, STD = -6.0, 7.0, 0.4, 0.05, 0.06


def osmosis(num_scales: int = 4, **settings: object) -> OsmosisDiffusion:
    values: dict[str, object] = {"guidance_blur_sigma": 0.6, "guidance_noise": 0.1, "value_range": (0.0, 1.0)}
    noise, blur = CosineLogSNR(LOW_SNR, HIGH_SNR), LinearTimeBlur(TIME)
    return OsmosisDiffusion(num_scales, noise, blur, FLOOR, tolerance=1e-11, **(values | settings))  # type: ignore[arg-type]


@dataclass
class Twin:
    """Osmosis diffusion for one guidance image ``(H, W)``, with the ideal denoiser of x_0 ~ N(mean, covariance)."""

    v: Array
    mean: Array
    covariance: Array
    num_scales: int = 4
    ends: tuple[float, float] = (LOW_SNR, HIGH_SNR)
    root: Array = field(init=False)

    def __post_init__(self) -> None:
        self.root = np.sqrt(self.v.ravel() / self.v.mean())
        mu, self.vectors = np.linalg.eigh(white_matrix(self.v))
        self.mu = mu.clip(0)

    def function(self, values: Array) -> Array:
        return np.asarray(self.vectors @ np.diag(values * np.ones_like(self.mu)) @ self.vectors.T)

    def curves(self, t: float) -> tuple[Array, Array]:
        """Return lambda and gamma of the eigenvalues."""
        log_snr = cosine_log_snr(t, *self.ends)
        decay = (1 - FLOOR) * np.exp(-self.mu * TIME * t) + FLOOR
        return np.sqrt(scipy.special.expit(log_snr)) * decay, np.sqrt(scipy.special.expit(-log_snr)) * np.ones_like(
            decay
        )

    def estimate(self, t: float) -> tuple[Array, Array]:
        """Return W, w with E[y_0 | y_t] = W y_t + w."""
        signal, noise = (self.function(c) for c in self.curves(t))
        mean, covariance = self.mean / self.root, self.covariance / np.outer(self.root, self.root)
        gain = covariance @ signal @ np.linalg.inv(signal @ covariance @ signal + noise @ noise)
        return gain, mean - gain @ signal @ mean

    def model(self, grey: float, std: float) -> tuple[Array, Array]:
        """Return mean and covariance of (y_1, ..., y_{t_1}, x_0) by the ancestral chain from lambda_1(0) m sqrt(v)."""
        n, count, eye = len(self.mu), self.num_scales, np.eye(len(self.mu))
        ts = [k / count for k in range(count, 0, -1)]
        signal, noise = self.curves(1.0)
        at_grey = math.sqrt(scipy.special.expit(cosine_log_snr(1.0, *self.ends)))
        means = [at_grey * grey * self.root]
        factor = np.zeros(((count + 1) * n, (count + 1) * n))
        factor[:n, :n] = self.function(noise)
        for k, (t, s) in enumerate(zip(ts, [*ts[1:], 0.0], strict=True)):
            gain, offset = self.estimate(t)
            (signal_t, noise_t), (signal_s, noise_s) = self.curves(t), self.curves(s)
            if s > 0:
                tau = 1 - (signal_t * noise_s / signal_s / noise_t) ** 2
                keep = noise_s * np.sqrt(1 - tau) / noise_t
                pull = self.function(signal_s - keep * signal_t)
                matrix, constant = self.function(keep) + pull @ gain, pull @ offset
                own = self.function(noise_s * np.sqrt(tau))
            else:
                back = np.diag(self.root) @ self.function(signal_s)
                matrix, constant, own = back @ gain, back @ offset, np.diag(self.root) * std
            means.append(matrix @ means[-1] + constant)
            rows, before = slice((k + 1) * n, (k + 2) * n), slice(k * n, (k + 1) * n)
            factor[rows] = matrix @ factor[before]
            factor[rows, rows] += own @ eye
        return np.concatenate(means), factor @ factor.T

    def inference(self, x_0: Array) -> tuple[Array, Array]:
        """Return mean and covariance of (y_1, ..., y_{t_1}) given x_0."""
        n, count = len(self.mu), self.num_scales
        ts = [k / count for k in range(count, 0, -1)]
        y_0 = x_0 / self.root
        covariance = np.empty((count * n, count * n))
        for (i, t), (j, s) in itertools.product(enumerate(ts), repeat=2):
            later, early = max(t, s), min(t, s)
            both = self.curves(later)[0] / self.curves(early)[0] * self.curves(early)[1] ** 2
            covariance[i * n : (i + 1) * n, j * n : (j + 1) * n] = self.function(both)
        return np.concatenate([self.function(self.curves(t)[0]) @ y_0 for t in ts]), covariance

    def log_p(self, x_0: Array, grey: float, std: float = STD) -> float:
        mean, covariance = self.model(grey, std)
        n = len(self.mu)
        return float(scipy.stats.multivariate_normal.logpdf(x_0, mean[-n:], covariance[-n:, -n:]))

    def bound(self, x_0: Array, grey: float, std: float = STD) -> float:
        """Return -log p(x_0 | v) + KL(q(y_1, ..., y_{t_1} | x_0) || p(y_1, ..., y_{t_1} | x_0, v))."""
        mean, covariance = self.model(grey, std)
        n = len(self.mu)
        cross = covariance[:-n, -n:] @ np.linalg.inv(covariance[-n:, -n:])
        ours, given = mean[:-n] + cross @ (x_0 - mean[-n:]), covariance[:-n, :-n] - cross @ covariance[-n:, :-n]
        theirs, spread = self.inference(x_0)
        inverse, apart = np.linalg.inv(given), ours - theirs
        dets = np.linalg.slogdet(given)[1] - np.linalg.slogdet(spread)[1]
        divergence = 0.5 * (np.trace(inverse @ spread) + apart @ inverse @ apart - len(apart) + dets)
        return float(divergence) - self.log_p(x_0, grey, std)


class LinearDenoiser(Denoiser):
    """The ideal denoiser of each context's twin."""

    def __init__(self, process: Osmosis, twin_of: Callable[[Array], Twin]) -> None:
        super().__init__(nn.Identity(), process, Clean())
        self.twin_of, self._twins = twin_of, dict[bytes, Twin]()

    def predict_mean(
        self, y_t: Tensor, t: Tensor, s: Tensor, context: Tensor | None = None, labels: Tensor | None = None
    ) -> Tensor:
        assert context is not None
        rows = []
        for y, v in zip(y_t.numpy(), context.numpy()[:, 0], strict=True):
            twin = self._twins.setdefault(v.tobytes(), self.twin_of(v))
            gain, offset = twin.estimate(float(t))
            rows.append(twin.function(twin.curves(float(s))[0]) @ (gain @ y.ravel() + offset))
        return torch.from_numpy(np.stack(rows)).reshape(y_t.shape)


class Scripted(ScriptedNoise):
    """Scripted noise that also returns listed uniform numbers."""

    def __init__(self, draws: Sequence[Tensor], uniforms: Sequence[float] = ()) -> None:
        super().__init__(draws)
        self.uniforms = list(uniforms)

    def uniform(self, shape: tuple[int, ...] = ()) -> Tensor:
        assert shape == ()
        return torch.full((self.count,), self.uniforms.pop(0), dtype=torch.float64)


def expected(
    denoiser: LinearDenoiser, prior: OsmosisPrior, x_0: Array, white: Array, uniforms: Sequence[float] = ()
) -> tuple[float, float]:
    """Return the package's bound for a density, averaged over the noise of the chain, and its context's part.

    Args:
        x_0: one image, ``(H, W)``.
        white: white noise of its guidance image.
        uniforms: uniform numbers for the other random choices.
    """
    n = x_0.size
    points = math.sqrt(n) * np.concatenate([np.eye(n), -np.eye(n)]).reshape(2 * n, 1, *x_0.shape)
    rows = torch.from_numpy(np.broadcast_to(x_0, points.shape).copy())
    first = torch.from_numpy(np.broadcast_to(white, points.shape).copy())
    noise = Scripted([first, *[torch.from_numpy(points)] * denoiser.process.num_scales], uniforms)
    found = VariationalBound(denoiser, prior, decoder_std=STD, levels=None)(rows, noise)
    assert not noise.draws and not noise.uniforms
    return float(found.total.mean()), float(found.context.mean())


def blur_matrix(height: int, width: int, sigma: float) -> Array:
    """Return the matrix of Gaussian blur with reflecting boundaries, by the DCT."""
    basis = np.kron(dct_basis(height), dct_basis(width))
    mu = np.pi**2 * ((np.arange(height)[:, None] / height) ** 2 + (np.arange(width) / width) ** 2)
    return np.asarray(basis.T @ np.diag(np.exp(-mu.ravel() * sigma**2 / 2)) @ basis)


def pattern_matrix(height: int, width: int, sigma: float) -> Array:
    """Return the matrix that maps white noise to smooth noise of the same average variance."""
    blur = blur_matrix(height, width, sigma)
    return np.asarray(blur / math.sqrt(np.trace(blur @ blur.T) / len(blur)))


def data(n: int) -> tuple[Array, Array]:
    """Return mean and covariance of images with correlated pixels, within [0, 1]."""
    rng = np.random.default_rng(n)
    factor = 0.04 * rng.normal(size=(n, n)) + 0.06
    return 0.5 + 0.1 * rng.normal(size=n), factor @ factor.T + 0.002 * np.eye(n)


def fitted(process: Osmosis, training: Array) -> OsmosisPrior:
    prior = OsmosisPrior()
    prior.fit(torch.from_numpy(training[:, None]), process)
    return prior


#: 1 x 2 pixels; the grey values are multiples of 1/64, exact in the float32 that the prior keeps
TRAINING = np.array([[[0.4375, 0.53125]], [[0.625, 0.46875]], [[0.59375, 0.65625]]])
IMAGE = np.array([[0.46, 0.63]])
PAIR = data(2)


def pair(v: Array) -> Twin:
    return Twin(v, *PAIR)
