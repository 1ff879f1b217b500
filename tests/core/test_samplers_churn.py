"""EDM's churn: Algorithm 2 and diffusers' Euler scheduler where the process is scalar, exact laws where it blurs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from dpm_scales.denoisers import Denoiser
from dpm_scales.processes import VE, VP, Homogeneous, InverseHeat, OsmosisDiffusion, Process
from dpm_scales.rng import CounterRNG
from dpm_scales.samplers import (
    DDIM,
    Ancestral,
    Churn,
    Cold,
    Dissipation,
    DPMSolver,
    Heun,
    Sampler,
    StepContext,
    UniPC,
    uniform_grid,
)
from dpm_scales.schedules import ConstantNoise, LogBlur, SinSquaredBlur
from dpm_scales.targets import Clean, Noise
from support.oracles import (
    NOISY,
    H,
    OracleDenoiser,
    PointData,
    ScriptedNoise,
    TinyNetwork,
    W,
    close,
    coefficients,
    curves,
    float64,
    gaussian_data,
    images,
    named,
    over,
    pixels,
    pretended_gpu,
    refused,
)
from support.reference import Array, Twin, edm_knot, exploding

EDM = Twin("ve", lambda: VE(1000), 1000, exploding(lambda k: edm_knot(k, 1000), 1000))


def edm_levels(steps: int) -> list[float]:
    """Karras et al. 2022, Eq. (5)."""
    low, high = 0.002 ** (1 / 7), 80 ** (1 / 7)
    return [(high + i / (steps - 1) * (low - high)) ** 7 for i in range(steps)] + [0.0]


def edm_algorithm_2(
    denoise: Callable[[Array, float], Array],
    x: Array,
    levels: Sequence[float],
    whites: Sequence[Array],
    churn: tuple[float, float, float, float],
    highest: float = math.inf,
) -> list[Array]:
    """Karras et al. 2022, Algorithm 2, line by line; churn is (S_churn, S_min, S_max, S_noise).

    `highest` bounds t_hat, for a process that ends there. Returns the image after each step.
    """
    s_churn, s_min, s_max, s_noise = churn
    number, path = len(levels) - 1, []
    for i in range(number):
        gamma = min(s_churn / number, math.sqrt(2) - 1) if s_min <= levels[i] <= s_max else 0.0
        hat = max(min(levels[i] + gamma * levels[i], highest), levels[i])
        x_hat = x + math.sqrt(hat**2 - levels[i] ** 2) * s_noise * whites[i]
        d = (x_hat - denoise(x_hat, hat)) / hat
        x = x_hat + (levels[i + 1] - hat) * d
        if levels[i + 1] != 0:
            d_prime = (x - denoise(x, levels[i + 1])) / levels[i + 1]
            x = x_hat + (levels[i + 1] - hat) * (d / 2 + d_prime / 2)
        path.append(x)
    return path


@pytest.mark.parametrize("steps", [5, 18])
@pytest.mark.parametrize("churn", [(40.0, 0.05, 50.0, 1.003), (3.0, 0.0, math.inf, 1.0), (80.0, 0.0, math.inf, 0.9)])
def test_exploding_noise_is_edms_algorithm_2(steps: int, churn: tuple[float, float, float, float]) -> None:
    """For the ideal denoiser of three images, step by step but for the levels beyond 80, where the process ends."""
    points = images(3, H, W, seed=4).numpy()

    def denoise(x: Array, sigma: float) -> Array:
        distance = ((x[:, None] - points) ** 2).sum((-2, -1)) / sigma**2
        weight = np.exp(-(distance - distance.min(1, keepdims=True)) / 2)
        return np.asarray(np.einsum("bn,nhw->bhw", weight / weight.sum(1, keepdims=True), points))

    start = 80 * images(6, 1, H, W, seed=9)
    whites = [images(6, 1, H, W, seed=20 + i) * 1.7 for i in range(steps)]
    plain = [white[:, 0].numpy() for white in whites]
    expected = edm_algorithm_2(denoise, start[:, 0].numpy(), edm_levels(steps), plain, churn, 80.0)
    denoiser = OracleDenoiser(EDM, PointData(coefficients(points), np.full(3, 1 / 3)))
    s_churn, s_min, s_max, s_noise = churn
    sampler = Heun(steps, s_churn=s_churn, s_min=s_min, s_max=None if s_max == math.inf else s_max, s_noise=s_noise)
    path: list[Array] = []
    sampler.reverse(denoiser, start, ScriptedNoise(whites), on_step=lambda i, x: path.append(x[:, 0].numpy()))
    for x, wanted in zip(path, expected, strict=True):
        close(x, wanted, 1e-8)
    calm = edm_algorithm_2(denoise, start[:, 0].numpy(), edm_levels(steps), plain, (0.0, 0.0, 80.0, 1.0))
    assert np.abs(expected[-2] - calm[-2]).max() > 1e-3  # the churn is felt


@torch.no_grad()
def test_churned_euler_step_is_that_of_diffusers() -> None:
    """EDMEulerScheduler: up to t_hat, then DDIM's step down; a whole run of theirs, in their float32."""
    diffusers = pytest.importorskip("diffusers")
    scheduler: Any = diffusers.EDMEulerScheduler(0.002, 80.0, sigma_data=0.5, prediction_type="epsilon")
    scheduler.set_timesteps(8)
    levels = scheduler.sigmas.double().tolist()
    process, sampler = VE(1000), Heun(8, s_churn=6.0, s_min=0.01, s_max=40.0, s_noise=1.01)
    scales = sampler.scales(process)
    close(process.noise_scale(scales[:-1], torch.zeros(1, 1).double()).flatten(), levels[:-1], 1e-6, 1e-5)
    assert sampler.churn is not None
    starts = sampler.churn.scales(process, scales)
    denoiser = Denoiser(TinyNetwork().double(), process, Clean("scalar", clip=False), 0.5).double()
    x = y = 80 * images(2, 1, H, W)
    for i, t in enumerate(scheduler.timesteps[:-1]):
        white = torch.randn(x.shape, generator=torch.Generator().manual_seed(i))
        seen = scheduler.scale_model_input(x.float(), t)
        assert seen.shape == x.shape
        y_hat = sampler.churn.add(process, y, scales[i], starts[i], white.double())
        m = denoiser.predict_mean(y_hat, starts[i], scales[i + 1])
        hat = float(process.noise_scale(starts[i], torch.zeros(1, 1).double()))
        # what their preconditioning makes of the network's answer is the estimate
        skip, out = 0.25 / (hat**2 + 0.25), hat * 0.5 / math.sqrt(hat**2 + 0.25)
        answer = ((m - skip * y_hat) / out).float()
        x = scheduler.step(
            answer,
            t,
            x.float(),
            s_churn=6.0,
            s_tmin=0.01,
            s_tmax=40.0,
            s_noise=1.01,
            generator=torch.Generator().manual_seed(i),
        ).prev_sample
        y = DDIM(0.0).step(StepContext(denoiser, starts[i], scales[i + 1], ScriptedNoise([])), y_hat, m)
        close(x.numpy(), y.numpy(), 2e-4 * float(y.abs().max()), 2e-4)
        y = x.double()


@over(NOISY)
def test_what_is_raised_has_the_law_of_the_coarser_scale(twin: Twin) -> None:
    """y_t ~ N(lambda_t y_0, gamma_t^2) and white noise: the mean lambda_t_hat y_0 and variance gamma_t_hat^2, mode by
    mode, from the slow curves; and t_hat at the level asked for."""
    process = twin.build()
    churn, scales = Churn(4.0), uniform_grid(process, process.num_scales)
    starts = churn.scales(process, scales)
    assert (starts >= scales[:-1]).all() and float(starts.max()) == 1.0
    factor = 1 + min(4.0 / twin.num_scales, math.sqrt(2) - 1)
    y_0 = coefficients(images(1, 1, H, W, seed=5).numpy())
    unit = torch.from_numpy(pixels(np.eye(H * W).reshape(H * W, 1, H, W)))
    for t, higher in zip(scales[1:-1].tolist(), starts[1:].tolist(), strict=True):
        signal, noise = curves(twin, t)
        signal_hat, noise_hat = curves(twin, higher)
        zeros = torch.zeros(1, 1, H, W).double()
        mean = churn.add(process, torch.from_numpy(pixels(signal * y_0)), float64(t), float64(higher), zeros)
        close(coefficients(mean.numpy()), signal_hat * y_0, 1e-9)
        moved = [
            churn.add(process, y, float64(t), float64(higher), white)
            for y, white in ((noise_scaled(noise), 0 * unit), (0 * unit, unit))
        ]
        covariance = sum((m := coefficients(v.numpy()).reshape(H * W, -1)).T @ m for v in moved)
        close(covariance, np.diag(noise_hat.ravel() ** 2), 1e-9 * (1 + noise_hat.max() ** 2))
        if not process.has_constant_noise() and higher < 1:
            level, level_hat = (noise / signal)[0, 0], (noise_hat / signal_hat)[0, 0]
            assert level_hat == pytest.approx(factor * level, rel=1e-9)
        elif process.has_constant_noise() and higher < 1:
            assert twin.time is not None
            assert math.sqrt(twin.time(higher) / twin.time(t)) == pytest.approx(factor, rel=1e-9)


def noise_scaled(noise: Array) -> torch.Tensor:
    """gamma_t times each unit coefficient, in pixels."""
    return torch.from_numpy(pixels((np.eye(H * W) * noise.ravel()).reshape(H * W, 1, H, W)))


def test_without_churn_nothing_is_drawn_and_every_step_is_heuns() -> None:
    denoiser, y = OracleDenoiser(EDM, gaussian_data()), 80 * images(2, 1, H, W)
    plain = Heun(6).reverse(denoiser, y, ScriptedNoise([]))
    assert torch.equal(Heun(6, s_churn=0.0, s_min=1.0, s_noise=2.0).reverse(denoiser, y, ScriptedNoise([])), plain)
    whites = [images(2, 1, H, W, seed=k) for k in range(6)]
    outside = Heun(6, s_churn=9.0, s_min=200.0).reverse(denoiser, y, ScriptedNoise(whites))
    close(outside.numpy(), plain.numpy(), 1e-12)
    assert not torch.allclose(Heun(6, s_churn=9.0).reverse(denoiser, y, ScriptedNoise(whites)), plain, atol=1e-3)


@over(named("vp-cosine", "blurring", "inverse-heat-0.1"))
def test_the_evaluation_is_at_the_coarser_scale(twin: Twin) -> None:
    """Not at the scale that the step was to start from, with all of the way down from there."""
    seen = []

    class Watching(OracleDenoiser):
        def predict_mean(self, y_t: Any, t: Any, s: Any, context: Any = None, labels: Any = None) -> Any:
            seen.append((float(t), float(s)))
            return super().predict_mean(y_t, t, s, context, labels)

    sampler = Heun(4, "uniform", s_churn=1.2)
    scales = sampler.scales(twin.build())
    assert sampler.churn is not None
    starts = sampler.churn.scales(twin.build(), scales)
    sampler.reverse(Watching(twin, gaussian_data()), images(2, 1, H, W), CounterRNG(0, 2))
    assert seen[::2] == list(zip(starts.tolist(), scales[1:].tolist(), strict=True))
    assert seen[1::2] == [(s, s) for s in scales[1:-1].tolist()]


def test_levels_between_which_steps_are_churned() -> None:
    process, sampler = VE(1000), Heun(12, s_churn=2.0, s_min=0.1, s_max=10.0)
    assert sampler.churn is not None
    scales = sampler.scales(process)
    starts = sampler.churn.scales(process, scales)
    levels = process.noise_scale(scales[:-1], torch.zeros(1, 1).double()).flatten()
    inside = (levels >= 0.1) & (levels <= 10.0)
    assert 0 < inside.sum() < 12
    assert torch.equal(starts > scales[:-1], inside)
    blur = InverseHeat(40, blur=LogBlur(0.5, 8.0))
    widths = Heun(None, "uniform", s_churn=2.0, s_min=1.0, s_max=4.0)  # in pixels, where the noise is constant
    scales = widths.scales(blur)
    assert widths.churn is not None
    starts = widths.churn.scales(blur, scales)
    sigma = (2 * blur.blur(scales[:-1])).sqrt()
    assert torch.equal(starts > scales[:-1], (sigma >= 1) & (sigma <= 4))


@pytest.mark.parametrize(
    "process",
    [
        VP(3),
        InverseHeat(3, ConstantNoise(0.1), LogBlur(0.3, 4.0)),
        OsmosisDiffusion(3, blur=SinSquaredBlur(2.0), guidance_input=False),
    ],
)
def test_churn_stays_on_the_device_and_never_waits_for_it(process: Process) -> None:
    denoiser, sampler = Denoiser(TinyNetwork(2), process, Clean()), Heun(None, "uniform", s_churn=3.0)
    scales = sampler.scales(process)
    sampler.check(denoiser)
    context = process.context(torch.zeros(4, 2, 6, 9))
    with pretended_gpu(denoiser):
        y, v = torch.randn(4, 2, 6, 9, device="cuda"), None if context is None else context.to("cuda")
        x = sampler.reverse(denoiser, y, CounterRNG(0, 4, device="cuda"), v, scales=scales.to("cuda"))
        assert x.device.type == "cuda"


def test_check_looks_at_the_way_that_is_gone() -> None:
    """Division by what a step down from t_hat blurs is refused."""
    mild = Denoiser(TinyNetwork(), InverseHeat(60, ConstantNoise(0.1), LogBlur(0.5, 2.0)), Noise())
    Heun(None, "uniform").check(mild)
    with refused("noise target divides"):
        Heun(None, "uniform", s_churn=60.0).check(mild)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"s_churn": -1.0}, ("s_churn", "-1.0")),
        ({"s_churn": "1"}, ("s_churn", "'1'")),
        ({"s_min": math.nan}, ("s_min", "nan")),
        ({"s_noise": math.inf}, ("s_noise", "inf")),
        ({"s_min": 2.0, "s_max": 1.0}, ("s_max", "s_min=2", "1.0")),
    ],
)
def test_values_out_of_range_are_refused(arguments: dict[str, Any], words: tuple[str, ...]) -> None:
    make: Callable[..., Heun] = Heun
    with refused(*words):
        make(**arguments)


def test_churn_needs_noise() -> None:
    with refused("churn", "Homogeneous", "s_churn=0"):
        Heun(4, "uniform", s_churn=1.0).check(Denoiser(TinyNetwork(), Homogeneous(8), Clean()))


def test_whether_a_sampler_draws_noise_is_what_its_steps_do() -> None:
    """`is_random` against the draws of a run: two seeds end apart, or on the same bits."""
    denoiser, y = Denoiser(TinyNetwork(), VP(10), Clean()), images(2, 1, H, W)
    plain: list[Sampler] = [DDIM(0.0, 4), Heun(4), Cold(4), Dissipation(0.0, 4), DPMSolver(0.0, 4), UniPC(2, 4)]
    drawn: list[Sampler] = [DDIM(0.1, 4), Ancestral(4), Heun(4, s_churn=1.0), Dissipation(1.0, 4), DPMSolver(1.0, 4)]
    for sampler in plain + drawn:
        one, two = (sampler.reverse(denoiser, y, CounterRNG(seed, 2)) for seed in (1, 2))
        assert sampler.is_random == (sampler in drawn) != torch.equal(one, two), type(sampler).__name__
