"""Compute exact probability flows of Gaussian data, and run samplers for comparison."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from dpm_scales.samplers import Sampler
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
    Array,
    Twin,
    cosine_twin,
    edm_twin,
    linear_chain_twin,
    linear_heat_twin,
)


def run(
    sampler: Sampler, twin: Twin, data: Data, scales: Sequence[float], start: Tensor, whites: Sequence[Tensor]
) -> list[Array]:
    """Run a sampler of the package; return the DCT coefficients after each step."""
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
    cosine_twin(1000),
    edm_twin(1000, 0.05, 4.0),
    cosine_twin(1000, blur_sigma=2.0),
    linear_heat_twin(200, 0.5, 0.3),
    linear_chain_twin(160, 0.3),
]


def flow(twin: Twin, data: GaussianData, u: Array, t: float, s: float) -> Array:
    """Return the exact solution: a Gaussian's probability flow keeps each coefficient's (u_t - mean_t) / std_t."""
    (signal_t, noise_t), (signal_s, noise_s) = curves(twin, t), curves(twin, s)
    std_t = np.sqrt(signal_t**2 * data.variance + noise_t**2)
    std_s = np.sqrt(signal_s**2 * data.variance + noise_s**2)
    return np.asarray(signal_s * data.mean + std_s / std_t * (u - signal_t * data.mean))
