"""Slow reference laws of every process: dense matrices, explicit chains and closed forms, in numpy and scipy.

Nothing here calls the package except `Twin.build`. A process is described by one step of its chain,

    U_k = alpha_k(mu) U_{k-1} + beta_k(mu) G,        variances add: gamma_k^2 = alpha_k^2 gamma_{k-1}^2 + beta_k^2,

and, separately, by the closed forms of its mean factor and noise at any t. Images of H x W pixels are vectors of
H * W entries, row by row, and operators are matrices.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.fft
import scipy.linalg

from dpm_scales.processes import VE, VP, Blurring, BlurringChain, Homogeneous, InverseHeat, Process
from dpm_scales.schedules import (
    ConstantBeta,
    ConstantNoise,
    CosineLogSNR,
    EDMNoise,
    GeometricNoise,
    LinearBeta,
    LinearTimeBlur,
    ListedBeta,
    ListedBlurSigmas,
    ListedDissipationTimes,
    ListedNoise,
    LogBlur,
    SigmoidSignal,
    SinSquaredBlur,
)

Array = np.ndarray[Any, Any]

# --- operators as matrices --------------------------------------------------------------------------------------------


def dct_basis(n: int) -> Array:
    """Return scipy's orthonormal DCT-II as a matrix whose rows are the basis functions."""
    return scipy.fft.dct(np.eye(n), type=2, norm="ortho", axis=0)


def neumann_laplacian(height: int, width: int) -> Array:
    """Return the 5-point stencil with reflecting boundaries, summed edge by edge."""
    matrix = np.zeros((height * width, height * width))
    for row in range(height):
        for column in range(width):
            here = row * width + column
            for down, right in ((1, 0), (0, 1)):
                if row + down < height and column + right < width:
                    there = (row + down) * width + column + right
                    matrix[here, here] -= 1
                    matrix[there, there] -= 1
                    matrix[here, there] += 1
                    matrix[there, here] += 1
    return matrix


def eigenvalues(height: int, width: int, spectrum: str = "continuous") -> Array:
    """Return mu of the reflecting Laplacian, ``(height, width)``, one by one."""
    mu = np.empty((height, width))
    for k in range(height):
        for j in range(width):
            if spectrum == "continuous":
                mu[k, j] = math.pi**2 * (k**2 / height**2 + j**2 / width**2)
            else:
                mu[k, j] = 4 * math.sin(math.pi * k / (2 * height)) ** 2 + 4 * math.sin(math.pi * j / (2 * width)) ** 2
    return mu


def minus_laplacian(height: int, width: int, spectrum: str | None) -> Array:
    """Return L as a dense matrix: C' diag(mu) C, the stencil itself, or 0 where `spectrum` is None."""
    if spectrum is None:
        return np.zeros((height * width, height * width))
    if spectrum == "discrete":
        return -neumann_laplacian(height, width)
    basis = np.kron(dct_basis(height), dct_basis(width))
    return basis.T @ np.diag(eigenvalues(height, width).ravel()) @ basis


def dense_function(matrix: Array, f: Callable[[Array], Array]) -> Array:
    """Return f(matrix) for a symmetric matrix >= 0."""
    mu, vectors = np.linalg.eigh(matrix)
    return (vectors * np.broadcast_to(f(mu.clip(0)), mu.shape)) @ vectors.T


def dense_heat(height: int, width: int, time: float, spectrum: str = "continuous") -> Array:
    """Return exp(-T L) by scipy's general matrix exponential."""
    return scipy.linalg.expm(-time * minus_laplacian(height, width, spectrum))


# --- noise, by steps and in closed form -------------------------------------------------------------------------------


@dataclass(frozen=True)
class NoiseTwin:
    """(a, gamma^2) at any t, and (alpha_k, beta_k^2) of one step, for the eigenvalue 0."""

    at: Callable[[float], tuple[float, float]]
    step: Callable[[int], tuple[float, float]]


def listed_beta(betas: Sequence[float]) -> NoiseTwin:
    """Return the variance-preserving chain with standard deviations beta_k; log a is linear between the scales."""
    num_scales = len(betas)
    logs = [sum(0.5 * math.log(1 - b * b) for b in betas[:k]) for k in range(num_scales + 1)]

    def at(t: float) -> tuple[float, float]:
        a = math.exp(np.interp(t * num_scales, np.arange(num_scales + 1), logs))
        return a, 1 - a * a

    return NoiseTwin(at, lambda k: (math.sqrt(1 - betas[k - 1] ** 2), betas[k - 1] ** 2))


def log_snr_curve(log_snr: Callable[[float], float], num_scales: int) -> NoiseTwin:
    """Return variance-preserving noise from logSNR: each step then has beta^2 = 1 - alpha^2.

    Scale 0 is the image: below the first scale gamma^2 / a^2 falls linearly to 0.
    """

    def at(t: float) -> tuple[float, float]:
        ratio = math.exp(-log_snr(t)) * min(t * num_scales, 1)
        return math.sqrt(1 / (1 + ratio)), ratio / (1 + ratio)

    def step(k: int) -> tuple[float, float]:
        alpha = at(k / num_scales)[0] / at((k - 1) / num_scales)[0]
        return alpha, 1 - alpha**2

    return NoiseTwin(at, step)


def cosine_log_snr(t: float, low: float = -10.0, high: float = 10.0, shift: float = 1.0) -> float:
    """Return -2 log tan(a + t (b - a)) + 2 log(shift)."""
    a, b = math.atan(math.exp(-high / 2)), math.atan(math.exp(-low / 2))
    return -2 * math.log(math.tan(a + t * (b - a))) + 2 * math.log(shift)


def sigmoid_log_snr(t: float, start: float = -3.0, end: float = 3.0, minimum: float = 1e-5) -> float:
    """Return log(a^2 / (1 - a^2)) with a^2 a normalised falling sigmoid."""

    def s(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    signal = (s(end) - s(start + t * (end - start))) / (s(end) - s(start))
    signal = min(max(signal, minimum), 1 - minimum)
    return math.log(signal / (1 - signal))


def exploding(scales: Callable[[float], float], num_scales: int) -> NoiseTwin:
    """Return noise with a = 1; `scales` gives gamma at k in [1, num_scales], its square falls linearly to 0 below 1."""

    def at(t: float) -> tuple[float, float]:
        k = t * num_scales
        return 1.0, scales(k) ** 2 if k >= 1 else scales(1) ** 2 * k

    return NoiseTwin(at, lambda k: (1.0, at(k / num_scales)[1] - at((k - 1) / num_scales)[1]))


def edm_knot(k: float, num_scales: int, low: float = 0.002, high: float = 80.0, rho: float = 7.0) -> float:
    """Return EDM's noise level, Karras et al. 2022, Eq. (5): i = 0 .. N-1 runs down from `high` to `low`; k = N - i."""
    i = num_scales - k
    return (high ** (1 / rho) + i / (num_scales - 1) * (low ** (1 / rho) - high ** (1 / rho))) ** rho


def geometric_knot(k: float, num_scales: int, low: float, high: float) -> float:
    """Return a value log-spaced from `low` at k = 1 to `high` at k = num_scales."""
    return low * (high / low) ** ((k - 1) / (num_scales - 1))


def listed_noise(scales: Sequence[float]) -> NoiseTwin:
    """Return noise with listed gamma_k; gamma^2 is linear between the scales."""
    num_scales = len(scales)
    squares = [0.0, *(g * g for g in scales)]
    return NoiseTwin(
        lambda t: (1.0, float(np.interp(t * num_scales, np.arange(num_scales + 1), squares))),
        lambda k: (1.0, squares[k] - squares[k - 1]),
    )


# --- blur -------------------------------------------------------------------------------------------------------------


def log_blur(num_scales: int, low: float, high: float) -> Callable[[float], float]:
    """Return T(t) for sigma log-spaced from `low` at k = 1; T is linear below."""

    def time(t: float) -> float:
        k = t * num_scales
        return geometric_knot(max(k, 1), num_scales, low, high) ** 2 / 2 * min(k, 1)

    return time


def sin_squared_blur(high: float) -> Callable[[float], float]:
    """Return T(t) for sigma = high sin^2(pi t / 2)."""
    return lambda t: (high * math.sin(math.pi * t / 2) ** 2) ** 2 / 2


def listed_time(times: Sequence[float]) -> Callable[[float], float]:
    """Return T(t) from its listed values at the scales, linear between them."""
    return lambda t: float(np.interp(t * len(times), np.arange(len(times) + 1), [0.0, *times]))


# --- processes --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Twin:
    """A process of the package and its description: noise at mu = 0, T(t), the floor d_min, or one beta for all mu."""

    name: str
    build: Callable[[], Process]
    num_scales: int
    noise: NoiseTwin
    time: Callable[[float], float] | None = None
    spectrum: str | None = None
    floor: float = 0.0
    chain_noise: float | None = None

    def decay(self, t: float, mu: Array) -> Array:
        """Return d_t(mu)."""
        if self.time is None:
            return np.ones_like(mu)
        return (1 - self.floor) * np.exp(-mu * self.time(t)) + self.floor

    def signal(self, t: float, mu: Array) -> Array:
        """Return lambda_t(mu) in closed form."""
        return self.noise.at(t)[0] * self.decay(t, mu)

    def variance(self, t: float, mu: Array) -> Array:
        """Return gamma_t^2(mu): closed form for the marginal form, the recursion step by step for the chain form."""
        if self.chain_noise is None:
            return np.full_like(mu, self.noise.at(t)[1])
        assert self.time is not None
        variance, position = np.zeros_like(mu), t * self.num_scales
        whole = math.floor(position + 1e-9)
        for k in range(1, whole + 1):
            alpha, beta_squared = self.step(k, mu)
            variance = alpha**2 * variance + beta_squared
        part = max(position - whole, 0.0)
        return np.exp(-2 * mu * (self.time(t) - self.time(whole / self.num_scales))) * variance + (
            part * self.chain_noise**2
        )

    def step(self, k: int, mu: Array) -> tuple[Array, Array]:
        """Return alpha_k(mu), beta_k^2(mu) of U_k = alpha_k U_{k-1} + beta_k G."""
        now, before = k / self.num_scales, (k - 1) / self.num_scales
        if self.chain_noise is not None:
            assert self.time is not None
            return np.exp(-mu * (self.time(now) - self.time(before))), np.full_like(mu, self.chain_noise**2)
        alpha_scalar, beta_squared = self.noise.step(k)
        alpha = alpha_scalar * self.decay(now, mu) / self.decay(before, mu)
        # compensates the noise of the previous scale that blur removes
        carried = self.noise.at(before)[1]
        return alpha, beta_squared + (alpha_scalar**2 - alpha**2) * carried

    def chain(self, last: int, mu: Array, first: int = 0) -> tuple[Array, Array]:
        """Return the product of alpha_k and the added variance over the steps first+1 .. last."""
        signal, variance = np.ones_like(mu), np.zeros_like(mu)
        for k in range(first + 1, last + 1):
            alpha, beta_squared = self.step(k, mu)
            signal, variance = alpha * signal, alpha**2 * variance + beta_squared
        return signal, variance

    def mu(self, height: int, width: int) -> Array:
        """Return the eigenvalues, ``(height, width)``; all 0 for pixels."""
        return np.zeros((height, width)) if self.spectrum is None else eigenvalues(height, width, self.spectrum)

    def matrix(self, height: int, width: int) -> Array:
        """Return L, dense."""
        return minus_laplacian(height, width, self.spectrum)


NO_NOISE = NoiseTwin(lambda t: (1.0, 0.0), lambda k: (1.0, 0.0))


def _twins() -> list[Twin]:
    K = 8
    betas = [0.1, 0.0, 0.3, 0.05, 0.6, 0.2, 0.2, 0.9]
    gammas = [0.01, 0.05, 0.05, 0.3, 1.0, 2.0, 2.5, 9.0]
    sigmas = [0.3, 0.3, 0.9, 1.0, 2.0, 2.2, 3.0, 5.0]
    times = [0.1, 1.0, 1.5, 1.5, 2.0, 5.0, 10.0, 30.0]
    linear = [math.sqrt(v) for v in np.linspace(0.01, 0.3, K)]
    cosine, sigmoid = log_snr_curve(cosine_log_snr, K), log_snr_curve(sigmoid_log_snr, K)
    shifted = log_snr_curve(lambda t: cosine_log_snr(t, -8, 6, 0.5), K)
    rho_3, geometric = (lambda k: edm_knot(k, K, 0.05, 4.0, 3.0)), (lambda k: geometric_knot(k, K, 0.01, 5.0))
    low, tenth = exploding(lambda k: 0.01, K), exploding(lambda k: 0.1, K)
    log_4, log_3, by_sigma = log_blur(K, 0.5, 4.0), log_blur(K, 0.5, 3.0), listed_time([s**2 / 2 for s in sigmas])
    by_time, sine_4, sine_20 = listed_time(times), sin_squared_blur(4.0), sin_squared_blur(20.0)
    smooth, grid = "continuous", "discrete"  # spectra
    return [
        Twin("vp-constant", lambda: VP(K, ConstantBeta(0.1)), K, listed_beta([0.1] * K)),
        Twin("vp-linear", lambda: VP(K, LinearBeta(0.01, 0.3)), K, listed_beta(linear)),
        Twin("vp-listed", lambda: VP(K, ListedBeta(betas)), K, listed_beta(betas)),
        Twin("vp-cosine", lambda: VP(K), K, cosine),
        Twin("vp-cosine-shifted", lambda: VP(K, CosineLogSNR(-8, 6, shift=0.5)), K, shifted),
        Twin("vp-sigmoid", lambda: VP(K, SigmoidSignal()), K, sigmoid),
        Twin("ve-edm", lambda: VE(K), K, exploding(lambda k: edm_knot(k, K), K)),
        Twin("ve-edm-rho-3", lambda: VE(K, EDMNoise(0.05, 4.0, 3.0)), K, exploding(rho_3, K)),
        Twin("ve-geometric", lambda: VE(K, GeometricNoise(0.01, 5.0)), K, exploding(geometric, K)),
        Twin("ve-listed", lambda: VE(K, ListedNoise(gammas)), K, listed_noise(gammas)),
        Twin("homogeneous-log", lambda: Homogeneous(K, LogBlur(0.5, 4.0)), K, NO_NOISE, log_4, smooth),
        Twin(
            "homogeneous-listed-discrete",
            lambda: Homogeneous(K, ListedDissipationTimes(times), grid),
            *(K, NO_NOISE, by_time, grid),
        ),
        Twin("inverse-heat", lambda: InverseHeat(K, blur=LogBlur(0.5, 4.0)), K, low, log_4, smooth),
        Twin(
            "inverse-heat-0.1",
            lambda: InverseHeat(K, ConstantNoise(0.1), ListedBlurSigmas(sigmas)),
            K,
            tenth,
            by_sigma,
            smooth,
        ),
        Twin(
            "inverse-heat-discrete",
            lambda: InverseHeat(K, ConstantNoise(0.1), LinearTimeBlur(12.0), grid),
            *(K, tenth, lambda t: 12.0 * t, grid),
        ),
        Twin("blurring", lambda: Blurring(K, blur=SinSquaredBlur(4.0)), K, cosine, sine_4, smooth, 0.001),
        Twin("blurring-default-blur", lambda: Blurring(K), K, cosine, sine_20, smooth, 0.001),
        Twin(
            "blurring-listed-discrete",
            lambda: Blurring(K, LinearBeta(0.01, 0.3), ListedBlurSigmas(sigmas), 0.2, grid),
            *(K, listed_beta(linear), by_sigma, grid, 0.2),
        ),
        Twin(
            "blurring-no-floor",
            lambda: Blurring(K, SigmoidSignal(), LogBlur(0.5, 3.0), 0.0),
            *(K, sigmoid, log_3, smooth),
        ),
        Twin("chain", lambda: BlurringChain(K, blur=LogBlur(0.5, 4.0)), K, NO_NOISE, log_4, smooth, chain_noise=0.1),
        Twin(
            "chain-linear-discrete",
            lambda: BlurringChain(K, 0.3, LinearTimeBlur(3.0), grid),
            *(K, NO_NOISE, lambda t: 3.0 * t, grid),
            chain_noise=0.3,
        ),
        Twin(
            "chain-listed",
            lambda: BlurringChain(K, 0.05, ListedDissipationTimes(times)),
            *(K, NO_NOISE, by_time, smooth),
            chain_noise=0.05,
        ),
    ]


TWINS = _twins()


def cosine_twin(num_scales: int, low: float = -10.0, high: float = 10.0, blur_sigma: float | None = None) -> Twin:
    """Return "vp", or "blurring" with sine-squared blur and a floor of 0.05."""
    noise = log_snr_curve(lambda t: cosine_log_snr(t, low, high), num_scales)
    if blur_sigma is None:
        return Twin("vp", lambda: VP(num_scales, CosineLogSNR(low, high)), num_scales, noise)
    return Twin(
        "blurring",
        lambda: Blurring(num_scales, CosineLogSNR(low, high), SinSquaredBlur(blur_sigma), 0.05),
        *(num_scales, noise, sin_squared_blur(blur_sigma), "continuous", 0.05),
    )


def edm_twin(num_scales: int, low: float, high: float) -> Twin:
    """Return "ve" with EDM's noise."""
    noise = exploding(lambda k: edm_knot(k, num_scales, low, high), num_scales)
    return Twin("ve", lambda: VE(num_scales, EDMNoise(low, high)), num_scales, noise)


def linear_heat_twin(num_scales: int, std: float, time: float) -> Twin:
    """Return "heat" with constant noise and dissipation time linear in t."""
    return Twin(
        "heat",
        lambda: InverseHeat(num_scales, ConstantNoise(std), LinearTimeBlur(time)),
        *(num_scales, exploding(lambda k: std, num_scales), lambda t: time * t, "continuous"),
    )


def linear_chain_twin(num_scales: int, time: float) -> Twin:
    """Return "chain" with beta = 0.1 and dissipation time linear in t."""
    return Twin(
        "chain",
        lambda: BlurringChain(num_scales, 0.1, LinearTimeBlur(time)),
        *(num_scales, NO_NOISE, lambda t: time * t, "continuous"),
        chain_noise=0.1,
    )
