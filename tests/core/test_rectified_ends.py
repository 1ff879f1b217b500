"""The straight path at its ends: logSNR is so low at t = 1 that y_1 is the noise, and +inf at t = 0, the image."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from dpm_scales.denoisers import Denoiser
from dpm_scales.likelihood import FlowLikelihood, VariationalBound
from dpm_scales.operators import HeatOperator
from dpm_scales.priors import GaussianPrior
from dpm_scales.processes import Process, Spectral
from dpm_scales.rng import CounterRNG
from dpm_scales.samplers import DDIM, Ancestral, Cold, Dissipation, DPMSolver, Heun, Sampler, UniPC
from dpm_scales.schedules import PowerLaw
from dpm_scales.targets import Flow
from support.oracles import Estimating, ScriptedNoise, TinyNetwork, close, float64, images
from support.reference import eigenvalues

SIZE, K = (3, 4), 10
LAST = 1 - (1 - 1e-12)
"""The signal that the package leaves at t = 1, so that logSNR is finite: 1e-12, rounded as 1 - t is."""
PROCESSES: dict[str, Callable[[], Process]] = {
    "white": lambda: Spectral(K),
    "colored": lambda: Spectral(K, color=PowerLaw(0.5)),
}
over = pytest.mark.parametrize("name", PROCESSES)


def built(name: str) -> Process:
    process = PROCESSES[name]()
    process.bind_size(SIZE)
    return process


def weight(name: str) -> Tensor:
    """Return w of each frequency."""
    w = (np.sqrt(eigenvalues(*SIZE)) / (2 * np.pi) + 0.05) ** 0.5
    return torch.from_numpy(w / np.sqrt((w**2).mean())) if name == "colored" else torch.ones(SIZE, dtype=torch.float64)


def tinted(name: str, x: Tensor) -> Tensor:
    return HeatOperator().synthesis(weight(name) * HeatOperator().analysis(x))


class Estimate(Estimating):
    """An estimate of the image that depends on y_t and t, in pixels."""

    @staticmethod
    def image(y: Tensor, t: float) -> Tensor:
        return torch.tanh(0.6 * y - 0.3 * y.roll(1, -1)) * math.cos(t)

    def predict_mean(
        self, y_t: Tensor, t: Tensor, s: Tensor, context: Tensor | None = None, labels: Tensor | None = None
    ) -> Tensor:
        return (1 - float(s)) * self.image(y_t, float(t))


def half_gain(t: float, s: float) -> float:
    """Return h = (l_s - l_t) / 2; it does not depend on a colour."""
    signal = [max(1 - u, LAST) for u in (s, t)]
    return math.log(signal[0] * t / (signal[1] * s))


S = 0.7
Formula = Callable[[str, Tensor, Tensor, Tensor], Tensor]
"""y at s = 0.7 from the colour, y_1, the estimate at y_1, and the noise drawn, where nothing is left of the image."""


def ode(name: str, y: Tensor, image: Tensor, noise: Tensor) -> Tensor:
    return S * y + (1 - S) * image


def heun(name: str, y: Tensor, image: Tensor, noise: Tensor) -> Tensor:
    first, h = ode(name, y, image, noise), half_gain(1.0, S)
    return first + (1 + math.expm1(-h) / h) * (1 - S) * (Estimate.image(first, S) - image)


FROM_NOISE: dict[str, tuple[Callable[[], Sampler], Formula]] = {
    "ancestral": (Ancestral, lambda name, y, image, noise: (1 - S) * image + S * tinted(name, noise)),
    "ancestral-transition": (
        lambda: Ancestral(variance="transition"),
        lambda name, y, image, noise: (1 - S) * image + tinted(name, noise),
    ),
    "ddim": (lambda: DDIM(0.0, None), ode),
    "ddim-0.6": (
        lambda: DDIM(0.6, None),
        lambda name, y, image, noise: 0.8 * S * y + (1 - S) * image + 0.6 * S * tinted(name, noise),
    ),
    "dpmpp": (lambda: DPMSolver(0.0, None, "uniform"), ode),
    "unipc": (lambda: UniPC(3, None, "uniform"), ode),
    "heun-noise": (lambda: Heun(None, "uniform", variable="noise"), ode),
    "heun-logsnr": (lambda: Heun(None, "uniform", variable="logsnr"), heun),
    "heun-churned": (lambda: Heun(None, "uniform", variable="logsnr", s_churn=4.0), heun),
    "dissipation": (Dissipation, lambda name, y, image, noise: (1 - S) * image + 1.25 * S * tinted(name, noise)),
    "cold": (Cold, lambda name, y, image, noise: y + (1 - S) * image),
}


@pytest.mark.parametrize("sampler", FROM_NOISE)
@over
def test_the_first_step_from_pure_noise_in_closed_form(name: str, sampler: str) -> None:
    """And the way down to the image ends in finite numbers, the last of which is the estimate itself."""
    make, formula = FROM_NOISE[sampler]
    process, y = built(name), images(2, 1, *SIZE)
    draws = [images(2, 1, *SIZE, seed=k) for k in range(1, 9)]
    path: list[Tensor] = []
    scales = float64([1.0, S, 0.4, 0.1, 0.0])
    make().reverse(Estimate(process), y, ScriptedNoise(draws), scales=scales, on_step=lambda i, x: path.append(x))
    close(path[0], formula(name, y, Estimate.image(y, 1.0), draws[0]), 1e-10, 0)
    assert all(bool(torch.isfinite(x).all()) for x in path)
    if sampler != "heun-churned":
        close(path[3], Estimate.image(path[2], 0.1), 1e-12, 0)


@over
def test_churn_up_to_the_noise_forgets_the_image(name: str) -> None:
    process, y, noise = built(name), images(2, 1, *SIZE), images(2, 1, *SIZE, seed=1)
    churn = Heun(None, "uniform", s_churn=4.0, s_noise=1.01).churn
    assert churn is not None
    one = float64(1.0)
    for t in (0.999, 0.5):
        close(churn.add(process, y, float64(t), one, noise), 1.01 * tinted(name, noise), 1e-8, 0)
    close(churn.add(process, y, one, one, noise), y, 1e-12, 0)
    reached = churn.scales(process, float64([1.0, 0.99, 0.5, 0.1, 0.0]))
    level = 1.0 + min(4.0 / 4, math.sqrt(2) - 1)
    expected = [1.0, *(min(level * t / (1 - t) / (1 + level * t / (1 - t)), 1.0) for t in (0.99, 0.5, 0.1))]
    close(reached, expected, 1e-10, 0)


@over
def test_curves_at_the_ends(name: str) -> None:
    """logSNR is +inf at the image and 2 ln 1e-12 - 2 ln w at the noise; no function of a step is NaN."""
    process, mu = built(name), torch.from_numpy(eigenvalues(*SIZE))
    log = weight(name).log()
    close(process.log_snr(1.0, mu).expand(SIZE), 2 * math.log(LAST) - 2 * log, 1e-10, 0)
    assert bool(torch.isposinf(process.log_snr(0.0, mu)).all())
    for s, t in ((0.0, 1.0), (0.0, 0.3), (0.6, 1.0)):
        step = process.step(s, t)
        signal, noise, rho = max(1 - s, LAST), s, max(1 - t, LAST) / max(1 - s, LAST)
        kept = (rho * noise / t) ** 2
        for found, expected in (
            (step.rho, np.full(SIZE, rho)),
            (step.posterior_coef_xt, np.full(SIZE, rho * (noise / t) ** 2)),
            (step.posterior_coef_x0, np.full(SIZE, signal * (1 - kept))),
            (step.posterior_std, noise * math.sqrt(1 - kept) * log.exp()),
            (step.transition_std, math.sqrt(t**2 - (rho * noise) ** 2) * log.exp()),
        ):
            close(found(mu).expand(SIZE), expected, 1e-10, 0)


@over
def test_the_start_is_the_noise_and_its_term_of_the_likelihood_is_zero(name: str) -> None:
    """Without a colour to the bit, in float32 y_1 of any image too; KL(q(y_1 | y_0) || p) = 1/2 |1e-12 y_0 / w|^2."""
    process, x = built(name), images(3, 1, *SIZE)
    y, context = GaussianPrior().sample(process, CounterRNG(4, 3), (1, *SIZE), torch.float64)
    noise = CounterRNG(4, 3).normal((1, *SIZE), torch.float64)
    assert context is None
    if name == "white":
        assert torch.equal(y, noise)
        white = noise.float()
        assert torch.equal(process.perturb(x.float(), 1.0, white, process.operator()), white)
    close(y, tinted(name, noise), 1e-12, 0)
    divergence = 0.5 * (LAST * HeatOperator().analysis(x) / weight(name)).square().flatten(1).sum(1)
    assert 0 < float(divergence.max()) < 1e-20
    denoiser = Denoiser(TinyNetwork().double(), process, Flow())
    found = VariationalBound(denoiser, GaussianPrior())(x, CounterRNG(0, 3))
    close(found.prior, divergence, 0, 1e-10)
    assert bool((found.prior < 1e-20).all()) and torch.isfinite(found.total).all()
    assert torch.isfinite(FlowLikelihood(denoiser, GaussianPrior(), 4)(x, CounterRNG(0, 3)).total).all()
