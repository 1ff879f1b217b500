"""The likelihood under every fixed colour is that of the filtered data, whole and term by term."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from dpm_scales.likelihood import FlowLikelihood, Likelihood, VariationalBound, follow_flow, start_law
from dpm_scales.priors import GaussianPrior
from dpm_scales.processes import Process
from support.colors import COLORS, LAWS, Pair, pair
from support.oracles import Estimating, Hadamard, ScriptedNoise, close, coefficients, float64, images
from support.reference import Array

SIZE = (2, 8)
N, BATCH, STD = 16, 2, 0.4
#: every law with two colours, every colour with two laws or three
CASES = [(law, list(COLORS)[(i + j) % len(COLORS)]) for i, law in enumerate(LAWS) for j in (0, 2)]
#: float64 has 16 digits, and terms of small noise are up to 1e5 nats
NEAR = (1e-10, 1e-14)
over = pytest.mark.parametrize(("law", "name"), CASES)


def whites(number: int) -> list[Tensor]:
    return [images(BATCH, 1, *SIZE, seed=k) for k in range(1, number + 1)]


def agree(case: Pair, colored: Likelihood, white: Likelihood, x: Tensor, finest: float, noise: Tensor) -> None:
    """Compare all terms; the decoder's Gaussian is in pixels, so it is computed from the white process's estimate."""
    close(colored.context, torch.zeros(BATCH), 0, 0)
    close(colored.prior, white.prior, *NEAR)
    close(colored.steps, white.steps, *NEAR)
    close(colored.scales, white.scales, 1e-12, 0)
    t = float64(finest)
    z = case.white.perturb(case.tint(x, -1), t, noise, case.white.operator())
    error = x - case.tint(case.denoisers()[1].predict_mean(z, t, 0 * t))
    decoder = (0.5 * (error / STD) ** 2).flatten(1).sum(1) + N * (math.log(STD) + 0.5 * math.log(2 * math.pi))
    close(colored.decoder, decoder, 1e-10, 0)
    close(colored.total, white.prior + white.steps.sum(1) + decoder, *NEAR)


@pytest.mark.parametrize("reverse", ["ancestral", "dissipation"])
@over
def test_the_bound_is_that_of_the_filtered_data(law: str, name: str, reverse: str) -> None:
    case, x, draws = pair(law, name, SIZE), images(BATCH, 1, *SIZE), whites(4)
    found = [
        VariationalBound(denoiser, GaussianPrior(), 4, None, reverse, decoder_std=STD, levels=None)(
            data, ScriptedNoise(draws)
        )
        for denoiser, data in zip(case.denoisers(), (x, case.tint(x, -1)), strict=True)
    ]
    agree(case, found[0], found[1], x, 3 / 12, draws[-1])


@over
def test_the_flow_s_likelihood_is_that_of_the_filtered_data(law: str, name: str) -> None:
    """By all sign vectors, so that the trace is exact in both coordinates."""
    case, x, draws = pair(law, name, SIZE), images(BATCH, 1, *SIZE), whites(1)
    found = [
        FlowLikelihood(denoiser, GaussianPrior(), 2, N, decoder_std=STD, levels=None)(data, Hadamard(BATCH, N, draws))
        for denoiser, data in zip(case.denoisers(), (x, case.tint(x, -1)), strict=True)
    ]
    agree(case, found[0], found[1], x, 1 / 12, draws[0])


class Linear(Estimating):
    """The estimate g_t(mu) u_t of each DCT coefficient, by scipy's DCT."""

    def __init__(self, case: Pair, process: Process) -> None:
        super().__init__(process)
        self.case = case

    def gain(self, t: float) -> Array:
        return np.asarray((1 + 0.3 * t) / (1 + self.case.mu.numpy()))

    def predict_mean(
        self, y_t: Tensor, t: Tensor, s: Tensor, context: Tensor | None = None, labels: Tensor | None = None
    ) -> Tensor:
        signal = self.process.signal_scale(s, self.case.mu).expand(SIZE)
        return self.case.multiply(signal * torch.from_numpy(self.gain(float(t))), y_t)


@over
def test_the_density_is_that_of_the_filtered_data_and_the_volume_of_the_filter(law: str, name: str) -> None:
    """-log p(y) = -log p(z) + sum ln w, and both by Heun's steps of each coefficient's kappa u, in numpy."""
    case, y, scales = pair(law, name, SIZE), images(BATCH, 1, *SIZE), [1.0, 0.8, 0.55]

    def density(process: Process, y: Tensor) -> tuple[Tensor, Tensor]:
        start, _ = start_law(GaussianPrior(), process, y, Hadamard(BATCH, N))
        last, traces = follow_flow(Linear(case, process), start, y, float64(scales), Hadamard(BATCH, N), probes=N)
        volume = process.log_noise_scale(scales[-1], case.mu).expand(SIZE).sum()
        return last - traces.sum(1) + volume, traces

    (ours, traces), (theirs, _) = density(case.colored, y), density(case.white, case.tint(y, -1))
    close(ours, theirs + case.log_weight.sum(), *NEAR)

    def curves(t: float) -> tuple[Array, Array]:
        signal, noise = (f(t, case.mu).expand(SIZE).numpy() for f in (case.white.signal_scale, case.white.noise_scale))
        return signal, noise * case.log_weight.exp().numpy()

    u, trace, denoiser = coefficients(y.numpy()), [], Linear(case, case.white)
    z, volume = u / curves(scales[-1])[1], np.log(curves(scales[-1])[1]).sum()
    for a, b in ((scales[2], scales[1]), (scales[1], scales[0])):
        (signal_a, noise_a), (signal_b, noise_b) = curves(a), curves(b)
        kappa = signal_b / noise_b - signal_a / noise_a
        slope_a, slope_b = denoiser.gain(a) * noise_a, denoiser.gain(b) * noise_b
        z = z + kappa * (slope_a + slope_b * (1 + kappa * slope_a)) * z / 2
        trace.insert(0, (kappa * (slope_a + slope_b) / 2).sum())
    close(traces, np.broadcast_to(trace, traces.shape), *NEAR)
    expected = 0.5 * (z**2).sum((1, 2, 3)) + 0.5 * N * math.log(2 * math.pi) - sum(trace) + volume
    close(ours, expected, *NEAR)
