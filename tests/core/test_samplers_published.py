"""Samplers against published algorithms: diffusers' schedulers, EDM's Algorithm 1, IHDM's Algorithm 2; and on a finite
data set, whose ideal denoiser is a softmax average."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy.linalg import expm
from torch import Tensor

from dpm_scales.denoisers import Denoiser
from dpm_scales.priors import DataPrior, GaussianPrior, Prior
from dpm_scales.processes import VE, VP, Blurring, BlurringChain, InverseHeat
from dpm_scales.rng import CounterRNG
from dpm_scales.samplers import DDIM, Ancestral, Dissipation, DPMSolver, Heun, Sampler, StepContext
from dpm_scales.schedules import ConstantNoise, LinearBeta, LogBlur, SinSquaredBlur
from dpm_scales.targets import Clean, NextScale, Noise, Target, Velocity
from support.oracles import (
    Answer,
    OracleDenoiser,
    PointData,
    ScriptedNoise,
    TinyNetwork,
    close,
    coefficients,
    float64,
    generator,
    images,
)
from support.reference import (
    NO_NOISE,
    Array,
    Twin,
    cosine_log_snr,
    edm_knot,
    exploding,
    log_blur,
    log_snr_curve,
    minus_laplacian,
    sin_squared_blur,
)

H, W = 3, 5

# --- diffusers --------------------------------------------------------------------------------------------------------

PREDICTIONS: dict[str, Callable[[], Target]] = {
    "sample": lambda: Clean(preconditioning="none", clip=False),
    "epsilon": Noise,
    "v_prediction": Velocity,
}


def in_float64(scheduler: Any, steps: int) -> Any:
    """The scheduler with its tables in float64, and `steps` equal steps."""
    scheduler.betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    scheduler.alphas = 1 - scheduler.betas
    scheduler.alphas_cumprod = torch.cumprod(scheduler.alphas, 0)
    scheduler.one = scheduler.final_alpha_cumprod = torch.ones((), dtype=torch.float64)
    scheduler.set_timesteps(steps)
    return scheduler


def one_step(sampler: Sampler, target: Target, output: Tensor, x_t: Tensor, i: int, j: int, white: Tensor) -> Tensor:
    """From diffusers' time step i to j, where 0 is our k = 1 and -1 or less the image."""
    denoiser = Denoiser(Answer(output), VP(1000, LinearBeta()), target)
    t, s = float64((i + 1) / 1000), float64(max(j + 1, 0) / 1000)
    m = denoiser.predict_mean(x_t, t, s)
    return sampler.step(StepContext(denoiser, t, s, ScriptedNoise([white])), x_t, m)


@pytest.mark.parametrize("steps", [1000, 50])
@pytest.mark.parametrize("prediction", list(PREDICTIONS))
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_ddim_step_is_that_of_diffusers(steps: int, prediction: str, eta: float) -> None:
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMScheduler(
        1000, beta_start=1e-4, beta_end=0.02, clip_sample=False, prediction_type=prediction
    )
    scheduler = in_float64(scheduler, steps)
    output, x_t, white = images(2, 3, 4, 6), images(2, 3, 4, 6, seed=1), images(2, 3, 4, 6, seed=2)
    stride = 1000 // steps
    for i in (1000 - stride, 20 * stride, stride, 0):
        expected = scheduler.step(output, i, x_t, eta=eta, variance_noise=white if eta > 0 else None).prev_sample
        actual = one_step(DDIM(eta), PREDICTIONS[prediction](), output, x_t, i, i - stride, white)
        close(actual.numpy(), expected.numpy(), 1e-9, 1e-9)


@pytest.mark.parametrize("steps", [1000, 50])
@pytest.mark.parametrize("prediction", list(PREDICTIONS))
def test_ancestral_step_is_diffusers_ddpm(steps: int, prediction: str) -> None:
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDPMScheduler(
        1000,
        beta_start=1e-4,
        beta_end=0.02,
        variance_type="fixed_small",
        clip_sample=False,
        prediction_type=prediction,
    )
    scheduler = in_float64(scheduler, steps)
    output, x_t = images(2, 3, 4, 6), images(2, 3, 4, 6, seed=1)
    white = torch.randn(x_t.shape, generator=generator(5), dtype=torch.float64)
    stride = 1000 // steps
    for i in (1000 - stride, 20 * stride, stride, 0):
        expected = scheduler.step(output, i, x_t, generator=generator(5)).prev_sample
        actual = one_step(Ancestral(), PREDICTIONS[prediction](), output, x_t, i, i - stride, white)
        close(actual.numpy(), expected.numpy(), 1e-9, 1e-9)


@pytest.mark.parametrize("clip", [True, False])
def test_whole_ddim_run_with_clipping_is_that_of_diffusers(clip: bool) -> None:
    """20 steps with a network; `clip_sample` with a recomputed epsilon is what clipping the estimate means here."""
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMScheduler(
        1000, beta_start=1e-4, beta_end=0.02, clip_sample=clip, prediction_type="sample"
    )
    scheduler = in_float64(scheduler, 20)
    network = TinyNetwork().double()
    x = start = 2 * images(2, 1, 4, 6)
    with torch.no_grad():
        for i in scheduler.timesteps.tolist():
            t = torch.full((2,), (i + 1) / 1000, dtype=torch.float64)
            # c_in = 1 / sqrt(alpha_bar data_std^2 + 1 - alpha_bar)
            a = scheduler.alphas_cumprod[i]
            output = 3 * network(x / torch.sqrt(a * 0.25 + 1 - a), t)
            x = scheduler.step(output, i, x, use_clipped_model_output=True).prev_sample

    class Thrice(TinyNetwork):
        def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
            return 3 * super().forward(x, t, labels)

    target = Clean(preconditioning="none", clip=clip)
    denoiser = Denoiser(Thrice(), VP(1000, LinearBeta()), target, 0.5).double()
    # their grid starts at 951, ours would at 1000
    scales = float64([*((scheduler.timesteps.double() + 1) / 1000).tolist(), 0.0])
    actual = DDIM(0.0, 20).reverse(denoiser, start, ScriptedNoise([]), scales=scales)
    close(actual.numpy(), x.numpy(), 1e-9)
    assert float(actual.abs().max()) > (0.9 if clip else 1)


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("prediction", list(PREDICTIONS))
def test_whole_dpm_solver_run_is_that_of_diffusers(prediction: str, eta: float) -> None:
    """20 steps of a network on their grid, DPM-Solver++(2M) and its SDE variant; their tables are float32."""
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DPMSolverMultistepScheduler(
        1000,
        beta_start=1e-4,
        beta_end=0.02,
        prediction_type=prediction,
        algorithm_type="sde-dpmsolver++" if eta else "dpmsolver++",
        solver_order=2,
        final_sigmas_type="zero",
    )
    scheduler.set_timesteps(20)
    network = TinyNetwork().double()
    x = start = images(2, 1, 4, 6)
    whites = [images(2, 1, 4, 6, seed=20 + k) for k in range(20)]
    alpha_bar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    with torch.no_grad():
        for i, white in zip(scheduler.timesteps.tolist(), whites, strict=True):
            t = torch.full((2,), (i + 1) / 1000, dtype=torch.float64)
            output = network(x / torch.sqrt(alpha_bar[i] * 0.25 + 1 - alpha_bar[i]), t)
            x = scheduler.step(output, i, x, variance_noise=white if eta else None).prev_sample.double()
    denoiser = Denoiser(network, VP(1000, LinearBeta()), PREDICTIONS[prediction](), 0.5).double()
    scales = float64([(i + 1) / 1000 for i in scheduler.timesteps.tolist()] + [0.0])
    actual = DPMSolver(eta, 20).reverse(denoiser, start, ScriptedNoise(whites[:19] if eta else []), scales=scales)
    close(actual.numpy(), x.numpy(), 2e-4 * float(x.abs().max()))


# --- EDM --------------------------------------------------------------------------------------------------------------


def edm_algorithm_1(denoise: Callable[[Array, float], Array], x: Array, levels: list[float]) -> Array:
    """Karras et al. 2022, Algorithm 1, line by line, for sigma(t) = t and s(t) = 1."""
    for i in range(len(levels) - 1):
        d = (x - denoise(x, levels[i])) / levels[i]
        following = x + (levels[i + 1] - levels[i]) * d
        if levels[i + 1] != 0:
            d_prime = (following - denoise(following, levels[i + 1])) / levels[i + 1]
            following = x + (levels[i + 1] - levels[i]) * (d / 2 + d_prime / 2)
        x = following
    return x


@pytest.mark.parametrize("steps", [1, 2, 18, 40])
def test_heun_on_edms_grid_is_edms_algorithm_1(steps: int) -> None:
    """For the ideal denoiser of three images; noise levels from EDM's Eq. (5), which also makes the process."""
    points = images(3, H, W, seed=4).numpy()

    def denoise(x: Array, sigma: float) -> Array:
        distance = ((x[:, None] - points) ** 2).sum((-2, -1)) / sigma**2
        weight = np.exp(-(distance - distance.min(1, keepdims=True)) / 2)
        return np.asarray(np.einsum("bn,nhw->bhw", weight / weight.sum(1, keepdims=True), points))

    twin = Twin("ve", lambda: VE(1000), 1000, exploding(lambda k: edm_knot(k, 1000), 1000))
    low, high = 0.002 ** (1 / 7), 80 ** (1 / 7)
    levels = [(high + i / max(steps - 1, 1) * (low - high)) ** 7 for i in range(steps)] + [0.0]
    start = 80 * images(6, 1, H, W, seed=9)
    expected = edm_algorithm_1(denoise, start[:, 0].numpy(), levels)
    denoiser = OracleDenoiser(twin, PointData(coefficients(points), np.full(3, 1 / 3)))
    actual = Heun(steps).reverse(denoiser, start, ScriptedNoise([]))
    close(actual[:, 0].numpy(), expected, 1e-9)


# --- IHDM -------------------------------------------------------------------------------------------------------------


def test_dissipation_is_rissanens_algorithm_2() -> None:
    """u_K = A_K x + delta eps, then u_{k-1} = u_k + f(u_k, k) + delta eps, without noise at the end; A is dense, by
    scipy's matrix exponential, and f the network's part in the finer-scale target."""
    num_scales, sigma, delta, data_std = 6, 0.01, 0.0125, 0.25
    process = InverseHeat(num_scales, ConstantNoise(sigma), LogBlur(0.5, 3.0))
    times = [0.0] + [(0.5 * (3.0 / 0.5) ** (k / (num_scales - 1))) ** 2 / 2 for k in range(num_scales)]
    laplacian = minus_laplacian(H, W, "continuous")
    blur = [expm(-time * laplacian) for time in times]
    network = TinyNetwork().double()
    denoiser = Denoiser(network, process, NextScale(), data_std).double()
    training = images(4, 1, H, W).float()
    prior = DataPrior(noise_ratio=1.25, tolerance=1e-12)
    prior.fit(training, process)

    # the network's input and output are scaled by second moments, so that f is of unit variance for white data
    mu = np.linalg.eigvalsh(laplacian).clip(0)

    def f(u: Array, k: int) -> Array:
        decay, finer = np.exp(-mu * times[k]), np.exp(-mu * times[k - 1])
        total = data_std**2 * (decay**2).mean() + sigma**2
        step = data_std**2 * ((finer - decay) ** 2).mean() + sigma**2
        t = torch.full((len(u),), k / num_scales, dtype=torch.float64)
        seen = torch.from_numpy(u / math.sqrt(total)).reshape(-1, 1, H, W)
        return math.sqrt(step) * network(seen, t).detach().numpy().reshape(len(u), -1)

    source = CounterRNG(5, 7)
    chosen = training[(source.uniform() * 4).long()].double().flatten(1).numpy()
    draws = [source.normal((1, H, W), torch.float64).flatten(1).numpy() for _ in range(num_scales)]
    u = chosen @ blur[num_scales] + delta * draws[0]
    for k in range(num_scales, 0, -1):
        u = u + f(u, k)
        if k > 1:
            u = u + delta * draws[num_scales - k + 1]
    actual = Dissipation(1.25).sample(denoiser, prior, CounterRNG(5, 7), (1, H, W), dtype=torch.float64)
    close(actual.flatten(1).numpy(), u, 1e-6)  # the training images are stored in float32


def test_dissipation_takes_the_noise_ratio_of_the_process() -> None:
    """delta / sigma = 0 is the deterministic walk; twice the ratio, twice the noise."""
    process = InverseHeat(4)
    denoiser = Denoiser(Answer(torch.zeros(2, 1, H, W).double()), process, NextScale())
    y, white = images(2, 1, H, W), images(2, 1, H, W, seed=1)
    t, s = float64(0.75), float64(0.5)
    for ratio in (0.0, 1.25, 2.5):
        moved = Dissipation(ratio).step(StepContext(denoiser, t, s, ScriptedNoise([white])), y, y)
        close((moved - y).numpy(), (ratio * 0.01 * white).numpy(), 1e-14)


# --- a finite data set ------------------------------------------------------------------------------------------------

K = 40
POINTS = images(3, H, W, seed=21).numpy() + np.array([-0.6, 0.0, 0.6])[:, None, None]
SHARES = np.array([0.5, 0.3, 0.2])
VP_TWIN = Twin("vp", lambda: VP(K), K, log_snr_curve(cosine_log_snr, K))
VE_TWIN = Twin("ve", lambda: VE(K), K, exploding(lambda k: edm_knot(k, K), K))
BLURRING_TWIN = Twin(
    "blurring",
    lambda: Blurring(K, blur=SinSquaredBlur(4.0)),
    K,
    log_snr_curve(cosine_log_snr, K),
    sin_squared_blur(4.0),
    "continuous",
    0.001,
)
HEAT_TWIN = Twin(
    "heat",
    lambda: InverseHeat(K, ConstantNoise(0.01), LogBlur(0.3, 4.0)),
    K,
    exploding(lambda k: 0.01, K),
    log_blur(K, 0.3, 4.0),
    "continuous",
)
CHAIN_TWIN = Twin(
    "chain",
    lambda: BlurringChain(K, 0.02, LogBlur(0.3, 4.0)),
    K,
    NO_NOISE,
    log_blur(K, 0.3, 4.0),
    "continuous",
    chain_noise=0.02,
)
SAMPLERS: dict[str, Callable[[], Sampler]] = {
    "ancestral": Ancestral,
    "ddim-0": lambda: DDIM(0.0, None),
    "ddim-0.5": lambda: DDIM(0.5, None),
    "ddim-1": lambda: DDIM(1.0, None),
    "heun": lambda: Heun(K),
    "heun-logsnr": lambda: Heun(K, "uniform", variable="logsnr"),
}


def drawn(twin: Twin, sampler: Sampler, prior: Prior, shares: Array, count: int, seed: int = 3) -> tuple[Array, Array]:
    """Distance of each sample to the nearest data point (largest pixel), and which it is."""
    denoiser = OracleDenoiser(twin, PointData(coefficients(POINTS), shares))
    x = sampler.sample(denoiser, prior, CounterRNG(seed, count), (1, H, W), dtype=torch.float64)
    distance = np.abs(x.numpy() - POINTS).max((-2, -1))
    return distance.min(1), distance.argmin(1)


@pytest.mark.parametrize("name", list(SAMPLERS))
@pytest.mark.parametrize("twin", [VP_TWIN, VE_TWIN, BLURRING_TWIN], ids=lambda twin: twin.name)
def test_samples_of_a_finite_data_set_are_its_images_as_often_as_they_occur(twin: Twin, name: str) -> None:
    """800 samples; shares within 4 standard errors, plus 1 % for the steps' length and the prior."""
    count = 800
    distance, which = drawn(twin, SAMPLERS[name](), GaussianPrior(), SHARES, count)
    assert (distance < 1e-3).mean() > 0.99
    shares = np.bincount(which, minlength=3) / count
    assert (np.abs(shares - SHARES) < 4 * np.sqrt(SHARES * (1 - SHARES) / count) + 0.01).all(), shares


@pytest.mark.parametrize("name", ["ancestral", "ddim-0", "ddim-0.5", "heun-logsnr", "dissipation"])
@pytest.mark.parametrize("twin", [HEAT_TWIN, CHAIN_TWIN], ids=lambda twin: twin.name)
def test_blurred_images_are_led_back_to_the_images_they_came_from(twin: Twin, name: str) -> None:
    """From the data prior: the grey value tells the images apart, whatever the noise."""
    count = 100
    prior = DataPrior(noise_ratio=1.0)
    prior.fit(torch.from_numpy(POINTS)[:, None], twin.build())
    sampler = Dissipation(1.0) if name == "dissipation" else SAMPLERS[name]()
    distance, which = drawn(twin, sampler, prior, np.full(3, 1 / 3), count)
    assert distance.max() < 1e-3
    assert (which == (CounterRNG(3, count).uniform() * 3).long().numpy()).all()


@pytest.mark.parametrize("twin", [VP_TWIN, BLURRING_TWIN, VE_TWIN], ids=lambda twin: twin.name)
def test_dissipation_lands_on_the_data_too(twin: Twin) -> None:
    """Its law isn't the data's, but where two images are each other's negatives both are met equally often."""
    points, count = np.stack([POINTS[0], -POINTS[0]]), 400
    denoiser = OracleDenoiser(twin, PointData(coefficients(points), np.full(2, 0.5)))
    x = Dissipation(1.0).sample(denoiser, GaussianPrior(), CounterRNG(3, count), (1, H, W), dtype=torch.float64)
    distance = np.abs(x.numpy() - points).max((-2, -1))
    assert (distance.min(1) < 1e-3).mean() > 0.99
    assert abs((distance.argmin(1) == 0).mean() - 0.5) < 4 * 0.5 / math.sqrt(count)
