"""What each sampler does where logSNR is infinite: at the image, from pure noise, and before a clock has started."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable

import numpy as np
import pytest
from torch import Tensor

from dpm_scales.processes import VP, Process, Spectral
from dpm_scales.rng import CounterRNG
from dpm_scales.samplers import (
    DDIM,
    Ancestral,
    Cold,
    Dissipation,
    DPMSolver,
    Heun,
    PastStep,
    Sampler,
    StepContext,
    UniPC,
)
from dpm_scales.schedules import SpectralClock
from support.oracles import Estimating, ScriptedNoise, close, coefficients, float64, images

SIZE = (5, 8)
SAMPLERS: dict[str, Callable[[], Sampler]] = {
    "ancestral": Ancestral,
    "ddim": DDIM,
    "ddim-half": lambda: DDIM(0.5),
    "dpmpp": DPMSolver,
    "dpmpp-sde": lambda: DPMSolver(1.0),
    "unipc": UniPC,
    "heun-noise": lambda: Heun(variable="noise"),
    "heun-logsnr": lambda: Heun(variable="logsnr"),
    "dissipation": lambda: Dissipation(0.8),
    "cold": Cold,
}
Y, M, LATER, WHITE = (images(2, 1, *SIZE, seed=seed) for seed in range(4))


class Scripted(Estimating):
    """Returns the same m_s always: the estimate at the end of Heun's step."""

    def predict_mean(
        self, y_t: Tensor, t: Tensor, s: Tensor, context: Tensor | None = None, labels: Tensor | None = None
    ) -> Tensor:
        return LATER


def move(process: Process, sampler: Sampler, t: float, s: float) -> StepContext:
    past: deque[PastStep] = deque(maxlen=sampler.memory)
    return StepContext(Scripted(process), float64(t), float64(s), ScriptedNoise([WHITE]), past=past, left=5)


# half the change of logSNR from `Rectified` at t = 1, where a = 1e-12 as float64 has it
S = 0.4
H = math.log((1 - S) / S) - math.log1p(-(1 - 1e-12))
FROM_NOISE: dict[str, Callable[[], Tensor]] = {
    **dict.fromkeys(("ancestral", "dpmpp-sde"), lambda: M + S * WHITE),
    **dict.fromkeys(("ddim", "dpmpp", "unipc", "heun-noise"), lambda: M + S * Y),
    "ddim-half": lambda: M + S * (math.sqrt(0.75) * Y + 0.5 * WHITE),
    "heun-logsnr": lambda: M + S * Y + (1 - (1 - math.exp(-H)) / H) * (LATER - M),
    "dissipation": lambda: M + 0.8 * S * WHITE,
    "cold": lambda: Y + M,
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_step_from_pure_noise(name: str) -> None:
    sampler = SAMPLERS[name]()
    close(sampler.step(move(Spectral(100), sampler, 1.0, S), Y, M), FROM_NOISE[name](), 1e-10)


def test_the_step_after_pure_noise_hardly_uses_its_estimate() -> None:
    """DPM-Solver++(2M): weight -h / (2 h_1), with h_1 the 27 nats of the first step; in UniPC's corrector it is 1/2."""
    process, r = Spectral(100), 0.2
    h = math.log((1 - r) / r) - math.log((1 - S) / S)
    older = M * (1 - r) / (1 - S)  # at the scale r
    for make in (DPMSolver, UniPC):
        sampler: Sampler = make()
        first, second = move(process, sampler, 1.0, S), move(process, sampler, S, r)
        first.past.append(PastStep(float64(1.0), float64(S), Y, M))
        second.past.extend(first.past)
        start = M + S * Y
        if isinstance(sampler, UniPC):
            start = 0.5 * M + 0.5 * LATER * (1 - S) / (1 - r) + S * Y
            close(sampler.correct(second, M + S * Y, LATER), start, 1e-10)
        mean = LATER + h / (2 * H) * (LATER - older)
        expected = r / S * start + (1 - r / S * (1 - S) / (1 - r)) * mean
        close(sampler.step(second, M + S * Y, LATER), expected, 1e-10)
    assert h / (2 * H) < 0.02


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_last_step_returns_the_estimate(name: str) -> None:
    """But for frequencies whose clock has not started at t: they are the image's own already."""

    def end(process: Process) -> Tensor:
        return SAMPLERS[name]().reverse(Scripted(process), Y, CounterRNG(0, 2), scales=float64([0.5, 0.0]))

    close(end(Spectral(100)), LATER, 0, 0)
    process = VP(50, clock=SpectralClock(5.0))
    still = (process.noise_scale(0.5, process.operator().eigenvalues(*SIZE)) == 0).numpy()
    assert 0 < still.sum() < still.size
    found, unchanged, estimate = (coefficients(x.numpy()) for x in (end(process), Y, LATER))
    close(found, np.where(still, unchanged, estimate), 1e-10)


@pytest.mark.parametrize("name", SAMPLERS)
def test_frequencies_without_noise(name: str) -> None:
    """At neither scale: the clock has not started; at s only: it starts within the step."""
    process, sampler = VP(50, clock=SpectralClock(5.0)), SAMPLERS[name]()
    noise_s, noise_t = (process.noise_scale(t, process.operator().eigenvalues(*SIZE)) for t in (0.3, 0.5))
    still, starts = (noise_t == 0).numpy(), ((noise_t > 0) & (noise_s == 0)).numpy()
    assert 0 < still.sum() and 0 < starts.sum()
    found = coefficients(sampler.step(move(process, sampler, 0.5, 0.3), Y, M).numpy())
    unchanged, estimate, later = (coefficients(x.numpy()) for x in (Y, M, LATER))
    close(found[..., still], (estimate if name == "dissipation" else unchanged)[..., still], 1e-10)
    if name != "cold":  # which is for processes without noise
        close(found[..., starts], (later if name == "heun-logsnr" else estimate)[..., starts], 1e-10)
