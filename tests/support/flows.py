"""Compute exact probability flows of Gaussian data, and run samplers for comparison."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from dpm_scales.processes import VE, VP, Blurring, BlurringChain, InverseHeat
from dpm_scales.samplers import Sampler
from dpm_scales.schedules import ConstantNoise, EDMNoise, LinearTimeBlur, SinSquaredBlur
from support.oracles import (
    Data,
    GaussianData,
    OracleDenoiser,
    ScriptedNoise,
    close,
    coefficients,
    curves,
    float64,
)
from support.reference import (
    NO_NOISE,
    Array,
    Twin,
    cosine_log_snr,
    edm_knot,
    exploding,
    log_snr_curve,
    sin_squared_blur,
)


def run(
    sampler: Sampler, twin: Twin, data: Data, scales: Sequence[float], start: Tensor, whites: Sequence[Tensor]
) -> list[Array]:
    """Run the same with the package; return the coefficients of the images."""
    path: list[Array] = []
    denoiser = OracleDenoiser(twin, data)
    noise = ScriptedNoise(whites)
    end = sampler.reverse(
        denoiser, start, noise, scales=float64(scales), on_step=lambda i, x: path.append(coefficients(x.numpy()))
    )
    close(coefficients(end.numpy()), path[-1], 0, 0)
    return path


# gentle curves, without kinks between t = 0.95 and t = 0.25
SMOOTH = [
    Twin("vp", lambda: VP(1000), 1000, log_snr_curve(cosine_log_snr, 1000)),
    Twin(
        "ve",
        lambda: VE(1000, EDMNoise(0.05, 4.0)),
        1000,
        exploding(lambda k: edm_knot(k, 1000, 0.05, 4.0), 1000),
    ),
    Twin(
        "blurring",
        lambda: Blurring(1000, blur=SinSquaredBlur(2.0), min_decay=0.05),
        1000,
        log_snr_curve(cosine_log_snr, 1000),
        sin_squared_blur(2.0),
        "continuous",
        0.05,
    ),
    Twin(
        "heat",
        lambda: InverseHeat(200, ConstantNoise(0.5), LinearTimeBlur(0.3)),
        200,
        exploding(lambda k: 0.5, 200),
        lambda t: 0.3 * t,
        "continuous",
    ),
    Twin(
        "chain",
        lambda: BlurringChain(160, 0.1, LinearTimeBlur(0.3)),
        160,
        NO_NOISE,
        lambda t: 0.3 * t,
        "continuous",
        chain_noise=0.1,
    ),
]


def flow(twin: Twin, data: GaussianData, u: Array, t: float, s: float) -> Array:
    """Return the exact solution: a Gaussian's probability flow keeps each coefficient's (u_t - mean_t) / std_t."""
    (signal_t, noise_t), (signal_s, noise_s) = curves(twin, t), curves(twin, s)
    std_t = np.sqrt(signal_t**2 * data.variance + noise_t**2)
    std_s = np.sqrt(signal_s**2 * data.variance + noise_s**2)
    return np.asarray(signal_s * data.mean + std_s / std_t * (u - signal_t * data.mean))
