"""Samples and trajectories of every process: Monte Carlo, other libraries, number formats, gradients."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from dpm_scales.processes import (
    VP,
    Blurring,
    Gaussian,
    Homogeneous,
)
from dpm_scales.schedules import (
    LinearBeta,
)
from support.laws import as_matrix, dense, twins, vectors
from support.oracles import H, W, close, float64, generator, images, over, refused
from support.reference import TWINS, Array, Twin

# --- Monte Carlo ------------------------------------------------------------------------------------------------------


def check_statistics(samples: Array, mean: Array, covariance: Array, rows: int) -> None:
    """Mean and covariance of samples (N, D), each entry within 5 standard errors of the Gaussian's."""
    spread = np.diag(covariance)
    assert (np.abs(samples.mean(0) - mean) <= 5 * np.sqrt(spread / rows) + 1e-9).all()
    error = 5 * np.sqrt((np.outer(spread, spread) + covariance**2) / rows) + 1e-12
    assert (np.abs(np.cov(samples.T) - covariance) <= error).all()


@twins
def test_explicit_chain_of_random_steps_has_the_processs_marginal(twin: Twin) -> None:
    """U_k = alpha_k U_{k-1} + beta_k G run on 20000 images of 2 x 3 pixels with dense matrices, Eq. (7), (36)."""
    rows, height, width = 20000, 2, 3
    process, rng = twin.build(), np.random.default_rng(1)
    x = images(1, 1, height, width)
    u = np.tile(vectors(x)[0, 0], (rows, 1))
    for k in range(1, twin.num_scales + 1):
        alpha = dense(twin, lambda mu, k=k: twin.step(k, mu)[0], height, width)
        beta = dense(twin, lambda mu, k=k: np.sqrt(twin.step(k, mu)[1].clip(0)), height, width)
        u = u @ alpha + rng.standard_normal(u.shape) @ beta
        if k in (1, twin.num_scales // 2, twin.num_scales):
            law = process.marginal(x, k / twin.num_scales)
            std = as_matrix(law.operator, law.std, height, width)
            check_statistics(u, vectors(law.mean)[0, 0], std @ std.T, rows)


@twins
def test_samples_have_the_twins_marginal(twin: Twin) -> None:
    rows, height, width = 20000, 2, 3
    process, x = twin.build(), images(1, 1, height, width)
    t = 0.55
    drawn = process.sample(x.expand(rows, 1, height, width), t, generator(2))
    signal = dense(twin, lambda mu: twin.signal(t, mu), height, width)
    covariance = dense(twin, lambda mu: twin.variance(t, mu), height, width)
    check_statistics(vectors(drawn)[:, 0], signal @ vectors(x)[0, 0], covariance, rows)


@twins
def test_samples_with_one_t_per_sample_have_each_its_own_noise(twin: Twin) -> None:
    rows, height, width = 4000, 2, 3
    process, scales = twin.build(), [0.06, 0.5, 1.0]
    x = images(3, 1, height, width)
    drawn = process.sample(x.repeat(rows, 1, 1, 1), float64(scales).repeat(rows), generator(3))
    for b, t in enumerate(scales):
        signal = dense(twin, lambda mu, t=t: twin.signal(t, mu), height, width)
        covariance = dense(twin, lambda mu, t=t: twin.variance(t, mu), height, width)
        check_statistics(vectors(drawn)[b::3, 0], signal @ vectors(x)[b, 0], covariance, rows)


@twins
def test_trajectories_are_markov_paths_of_the_chain(twin: Twin) -> None:
    """Mean and covariance at each scale, and between two scales: cov(y_t, y_s) = rho cov(y_s)."""
    rows, height, width, pixels = 8000, 2, 3, 6
    process, x = twin.build(), images(1, 1, height, width)
    ks = [1, 4, 7]
    path = process.trajectory(x.expand(rows, 1, height, width), [k / 8 for k in ks], generator(4))
    joint = np.concatenate([vectors(p)[:, 0] for p in path], 1)
    mean, covariance = np.zeros(3 * pixels), np.zeros((3 * pixels, 3 * pixels))
    for i, j in itertools.product(range(3), repeat=2):
        early, late = sorted((ks[i], ks[j]))

        def cross(mu: Array, early: int = early, late: int = late) -> Array:
            return twin.chain(late, mu, early)[0] * twin.chain(early, mu)[1]

        block = dense(twin, cross, height, width)
        covariance[i * pixels : (i + 1) * pixels, j * pixels : (j + 1) * pixels] = block
    for i, k in enumerate(ks):
        signal = dense(twin, lambda mu, k=k: twin.chain(k, mu)[0], height, width)
        mean[i * pixels : (i + 1) * pixels] = signal @ vectors(x)[0, 0]
    check_statistics(joint, mean, covariance, rows)


# --- DDPM -------------------------------------------------------------------------------------------------------------


def ddpm_scheduler() -> Any:
    """diffusers' DDPM with the paper's settings."""
    diffusers = pytest.importorskip("diffusers")
    return diffusers.DDPMScheduler(
        1000, beta_start=1e-4, beta_end=0.02, variance_type="fixed_small", clip_sample=False, prediction_type="sample"
    )


def in_float64(scheduler: Any) -> Any:
    """The same scheduler with its tables in float64: float32 has four digits left of 1 - alpha_bar."""
    scheduler.betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    scheduler.alphas = 1 - scheduler.betas
    scheduler.alphas_cumprod = torch.cumprod(scheduler.alphas, 0)
    return scheduler


def test_vp_with_linear_beta_has_the_alpha_bar_of_diffusers() -> None:
    scheduler, process = ddpm_scheduler(), VP(1000, LinearBeta())
    t = torch.arange(1, 1001, dtype=torch.float64) / 1000
    mu = torch.zeros(1, 1, dtype=torch.float64)
    alpha_bar = process.signal_scale(t, mu).flatten() ** 2
    close(alpha_bar.numpy(), scheduler.alphas_cumprod.double().numpy(), atol=1e-6, rtol=1e-4)
    close(alpha_bar.numpy(), in_float64(scheduler).alphas_cumprod.numpy())


@pytest.mark.parametrize("k", [0, 1, 10, 500, 999])
def test_vp_posterior_is_the_step_of_diffusers(k: int) -> None:
    scheduler, process = in_float64(ddpm_scheduler()), VP(1000, LinearBeta())
    x_0, x_t = images(2, 3, 4, 6), images(2, 3, 4, 6, seed=1)
    law = process.posterior(x_t, x_0, k / 1000, (k + 1) / 1000)
    if k > 0:
        variance = float(scheduler._get_variance(k))
        assert float(law.std(torch.zeros(1, 1).double())) ** 2 == pytest.approx(variance, rel=1e-7)
    expected = scheduler.step(x_0, k, x_t, generator=generator(5)).prev_sample
    close(law.sample(generator(5)).numpy(), expected.numpy(), atol=1e-7)


def test_vp_sample_is_diffusers_add_noise() -> None:
    scheduler, process = in_float64(ddpm_scheduler()), VP(1000, LinearBeta())
    x, k = images(5, 3, 4, 6), torch.tensor([0, 1, 100, 500, 999])
    noise = torch.randn(x.shape, generator=generator(6), dtype=torch.float64)
    expected = scheduler.add_noise(x, noise, k)
    close(process.sample(x, (k + 1) / 1000, generator(6)).numpy(), expected.numpy(), atol=1e-5)  # t is float32 here
    close(process.sample(x, (k + 1).double() / 1000, generator(6)).numpy(), expected.numpy(), atol=1e-10)


# --- trajectories and samples -----------------------------------------------------------------------------------------


@twins
def test_trajectory_has_one_image_per_scale_starts_at_the_image_and_is_reproducible(twin: Twin) -> None:
    process, x = twin.build(), images(2, 3, H, W).float()
    scales = [0.0, 0.0, 0.1, 0.5, 0.5, 1.0]
    path = process.trajectory(x, scales, generator(7))
    assert path.shape == (6, 2, 3, H, W) and path.dtype == torch.float32
    assert torch.equal(path[0], x) and torch.equal(path[1], x)
    assert torch.equal(path[3], path[4]), "no time passes between equal scales"
    assert torch.equal(path, process.trajectory(x, scales, generator(7)))
    assert torch.equal(path, process.trajectory(x, float64(scales), generator(7)))  # type: ignore[arg-type]
    if not isinstance(process, Homogeneous):
        assert not torch.equal(path, process.trajectory(x, scales, generator(8)))


@over([twin for twin in TWINS if not twin.build().has_noise()])
def test_trajectory_without_noise_is_the_chain_of_transitions(twin: Twin) -> None:
    """All means come from one sweep; step by step they are the same."""
    process, x = twin.build(), images(2, 3, H, W)
    scales = [0.0, 0.1, 0.5, 0.5, 1.0]
    path = process.trajectory(x, scales)
    step, before = x, 0.0
    for image, t in zip(path, scales, strict=True):
        step = process.transition(step, before, t).mean if t > before else step
        torch.testing.assert_close(image, step, atol=1e-12, rtol=1e-9)
        before = t


@pytest.mark.parametrize("scales", [[], [0.5, 0.4], [-0.1, 0.5], [0.5, 1.1], [math.nan], [0.2, math.nan]])
def test_scales_of_a_trajectory_must_ascend_in_the_unit_interval(scales: list[float]) -> None:
    with refused("trajectory", "ascending", "[0, 1]"):
        VP(8).trajectory(images(1, 1, 2, 2), scales)


@twins
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_laws_keep_the_number_format_and_generators_make_them_reproducible(twin: Twin, dtype: torch.dtype) -> None:
    process, x, x_0 = twin.build(), images(2, 3, H, W).to(dtype), images(2, 3, H, W, seed=1).to(dtype)
    s, t = torch.tensor([0.1, 0.5]), torch.tensor([0.7, 0.9])
    laws: list[Callable[[], Gaussian]] = [
        lambda: process.marginal(x, t),
        lambda: process.transition(x, s, t),
        lambda: process.posterior(x, x_0, s, t),
        lambda: process.posterior(x, x_0, 0.2, 0.6),
    ]
    for law in laws:
        assert law().mean.dtype == dtype and law().mean.shape == x.shape
        drawn = law().sample(generator(9))
        assert drawn.dtype == dtype and drawn.shape == x.shape and drawn.isfinite().all()
        assert torch.equal(drawn, law().sample(generator(9)))
    assert torch.equal(process.sample(x, t, generator(9)), process.marginal(x, t).sample(generator(9)))


@twins
def test_float32_images_give_what_float64_images_give(twin: Twin) -> None:
    process, x, x_0 = twin.build(), images(2, 1, 16, 12), images(2, 1, 16, 12, seed=1)
    s, t = float64([0.1, 0.5]), float64([0.7, 0.9])
    close(process.marginal(x.float(), t).mean.numpy(), process.marginal(x, t).mean.numpy(), 2e-6)
    single, double = (process.posterior(x.to(d), x_0.to(d), s, t).mean for d in (torch.float32, torch.float64))
    close(single.numpy(), double.numpy(), 4e-6)


@twins
def test_gradients_flow_through_a_sample(twin: Twin) -> None:
    x = images(1, 1, H, W).requires_grad_()
    twin.build().sample(x, 0.4, generator()).sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0


@twins
def test_processes_can_be_copied(twin: Twin) -> None:
    process, x = twin.build(), images(2, 1, H, W)
    assert torch.equal(copy.deepcopy(process).sample(x, 0.3, generator(1)), process.sample(x, 0.3, generator(1)))


def test_processes_without_guidance_have_no_context() -> None:
    process = Blurring()
    assert process.context(images(1, 1, 2, 2)) is None and process.context_features(None) is None
    assert process.context_channels == 0
