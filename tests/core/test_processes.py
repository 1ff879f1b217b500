"""The law of every process against its slow twin: closed forms, explicit chains, dense Gaussian conditioning."""

from __future__ import annotations

import copy
import inspect
import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from dpm_scales.operators import Operator, SpectralFunction
from dpm_scales.processes import (
    VE,
    VP,
    Blurring,
    BlurringChain,
    Gaussian,
    Homogeneous,
    InverseHeat,
    InverseOsmosis,
    OsmosisDiffusion,
    OsmosisFilter,
    Process,
    as_scale,
)
from dpm_scales.schedules import (
    ConstantBeta,
    ConstantNoise,
    GeometricNoise,
    LinearBeta,
    LinearTimeBlur,
    ListedBeta,
    ListedBlurSigmas,
    ListedDissipationTimes,
    ListedNoise,
    LogBlur,
    NoiseSchedule,
)
from support.oracles import NOISY, H, W, close, float64, generator, images, over, pretended_gpu, refused
from support.reference import TWINS, Array, Twin, dense_function

BETWEEN = [0.03, 0.125, 0.2, 0.375, 0.44, 0.7, 0.875, 0.99, 1.0]
PAIRS = [(0.0, 0.125), (0.0, 0.55), (0.125, 0.25), (0.03, 0.1), (0.3, 0.9), (0.75, 1.0), (0.25, 0.875)]


twins = over(TWINS)
noisy_twins = over(NOISY)
lyapunov_twins = over([twin for twin in TWINS if twin.chain_noise is None])


def vectors(x: Tensor) -> Array:
    """Images as rows of H * W entries."""
    return x.flatten(-2).numpy()


def as_matrix(op: Operator, f: SpectralFunction, height: int = H, width: int = W) -> Array:
    """The matrix of f(L), column by column."""
    unit = torch.eye(height * width, dtype=torch.float64).reshape(-1, 1, height, width)
    return op.apply(f, unit)[:, 0].flatten(1).numpy().T


def dense(twin: Twin, f: Callable[[Array], Array], height: int = H, width: int = W) -> Array:
    return dense_function(twin.matrix(height, width), f)


def full(value: Tensor, batch: int, mu: Tensor) -> Array:
    """A curve of t and mu for `batch` samples, ``(batch, *mu.shape)``."""
    return value.expand(batch, 1, *mu.shape)[:, 0].numpy() if value.ndim > mu.ndim else value.expand(mu.shape).numpy()


# --- the curves -------------------------------------------------------------------------------------------------------


@twins
def test_signal_and_noise_are_the_closed_forms(twin: Twin) -> None:
    process, mu = twin.build(), torch.from_numpy(twin.mu(H, W))
    for t in [0.0, *BETWEEN]:
        for scale in (t, float64(t)):
            signal, noise = process.signal_scale(scale, mu), process.noise_scale(scale, mu)
            assert signal.dtype == noise.dtype == torch.float64
            close(full(signal, 1, mu), twin.signal(t, mu.numpy()))
            close(full(noise, 1, mu) ** 2, twin.variance(t, mu.numpy()))


@twins
def test_curves_of_one_t_per_sample_have_a_batch_and_a_channel_axis(twin: Twin) -> None:
    process, mu = twin.build(), torch.from_numpy(twin.mu(H, W))
    t = float64(BETWEEN)
    signal, noise = process.signal_scale(t, mu), process.noise_scale(t, mu)
    assert signal.shape[:2] == noise.shape[:2] == (len(BETWEEN), 1)
    close(full(signal, len(t), mu), np.stack([twin.signal(v, mu.numpy()) for v in BETWEEN]))
    close(full(noise, len(t), mu) ** 2, np.stack([twin.variance(v, mu.numpy()) for v in BETWEEN]))


@twins
def test_curves_at_the_scales_are_those_of_the_explicit_chain(twin: Twin) -> None:
    process, mu = twin.build(), torch.from_numpy(twin.mu(H, W))
    for k in range(twin.num_scales + 1):
        signal, variance = twin.chain(k, mu.numpy())
        close(full(process.signal_scale(k / twin.num_scales, mu), 1, mu), signal)
        close(full(process.noise_scale(k / twin.num_scales, mu), 1, mu) ** 2, variance)


@twins
def test_log_snr_is_the_logarithm_of_the_ratio(twin: Twin) -> None:
    process, mu = twin.build(), torch.from_numpy(twin.mu(H, W))
    for t in BETWEEN:
        log_snr, variance = full(process.log_snr(t, mu), 1, mu), twin.variance(t, mu.numpy())
        if not variance.any():
            assert (log_snr == math.inf).all()
            continue
        usable = twin.signal(t, mu.numpy()) > 1e-100
        expected = np.log(twin.signal(t, mu.numpy())[usable] ** 2 / variance[usable])
        close(log_snr[usable], expected, atol=1e-8)
        assert np.isfinite(log_snr).all()


def test_trap_figure_independent_noise_adds_variances() -> None:
    """beta = 0.1, alpha = sqrt(0.99), step 100: 0.796, where the printed Eq. (14) gives 7.9."""
    assert float(VP(100, ConstantBeta(0.1)).noise_scale(1.0, torch.zeros(1, 1).double())) == pytest.approx(
        0.796, abs=5e-4
    )


def test_chain_form_grows_without_bound_at_mu_zero_and_settles_elsewhere() -> None:
    """Prop. 10, corrected: gamma^2 -> beta^2 / (1 - alpha^2), but k beta^2 for the mean."""
    process = BlurringChain(400, 0.1, LinearTimeBlur(400.0))
    mu = float64([[0.0, 0.1]])
    noise = process.noise_scale(1.0, mu) ** 2
    close(noise.numpy(), [[400 * 0.01, 0.01 / (1 - math.exp(-0.2))]])


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


# --- marginal and transition ------------------------------------------------------------------------------------------


@twins
def test_marginal_is_the_dense_gaussian(twin: Twin) -> None:
    process, x = twin.build(), images(2, 2, H, W)
    for t in [0.0, *BETWEEN]:
        law = process.marginal(x, t)
        close(vectors(law.mean), vectors(x) @ dense(twin, lambda mu, t=t: twin.signal(t, mu)))
        std = as_matrix(law.operator, law.std)
        close(std @ std.T, dense(twin, lambda mu, t=t: twin.variance(t, mu)))


@twins
def test_perturbed_images_are_the_dense_mean_and_the_dense_noise(twin: Twin) -> None:
    process, y, white = twin.build(), images(3, 2, H, W), images(3, 2, H, W, seed=5) - 0.5
    scales = [0.06, 0.5, 1.0]
    found = process.perturb(y, float64(scales), white, process.operator())
    for b, t in enumerate(scales):
        mean = vectors(y[b]) @ dense(twin, lambda mu, t=t: twin.signal(t, mu))
        noise = vectors(white[b]) @ dense(twin, lambda mu, t=t: np.sqrt(twin.variance(t, mu)))
        close(vectors(found[b]), mean + noise)


@twins
def test_transition_is_the_product_of_the_chains_steps(twin: Twin) -> None:
    process, x = twin.build(), images(2, 2, H, W)
    for s, t in [(0, 1), (0, 5), (1, 2), (3, 8), (2, 6), (7, 8), (4, 4)]:
        law = process.transition(x, s / 8, t / 8)

        def rho(mu: Array, s: int = s, t: int = t) -> Array:
            return np.prod([twin.step(k, mu)[0] for k in range(s + 1, t + 1)], axis=0) * np.ones_like(mu)

        def variance(mu: Array, s: int = s, t: int = t) -> Array:
            total = np.zeros_like(mu)
            for k in range(s + 1, t + 1):
                alpha, beta_squared = twin.step(k, mu)
                total = alpha**2 * total + beta_squared
            return total

        close(vectors(law.mean), vectors(x) @ dense(twin, rho))
        std = as_matrix(law.operator, law.std)
        close(std @ std.T, dense(twin, variance), atol=1e-9)


def check_chapman_kolmogorov(process: Process, r: float, s: float, t: float, mu: Tensor) -> None:
    first, second, both = process.step(r, s), process.step(s, t), process.step(r, t)
    scale = float(process.noise_scale(t, mu).max()) ** 2
    close(full(first.rho(mu) * second.rho(mu), 1, mu), full(both.rho(mu), 1, mu))
    close(
        full(second.rho(mu) ** 2 * first.transition_std(mu) ** 2 + second.transition_std(mu) ** 2, 1, mu),
        full(both.transition_std(mu) ** 2, 1, mu),
        atol=1e-12 * (1 + scale),
    )
    close(full(process.signal_scale(s, mu) * second.rho(mu), 1, mu), full(process.signal_scale(t, mu), 1, mu))
    close(
        full(second.rho(mu) ** 2 * process.noise_scale(s, mu) ** 2 + second.transition_std(mu) ** 2, 1, mu),
        full(process.noise_scale(t, mu) ** 2, 1, mu),
        atol=1e-12 * (1 + scale),
    )


@twins
@settings(deadline=None, max_examples=25)
@given(scales=st.lists(st.floats(0, 1), min_size=3, max_size=3), size=st.tuples(st.integers(1, 9), st.integers(1, 9)))
def test_chapman_kolmogorov_between_any_scales(twin: Twin, scales: list[float], size: tuple[int, int]) -> None:
    """transition . transition = transition, marginal . transition = marginal: signals multiply, variances add."""
    check_chapman_kolmogorov(twin.build(), *sorted(scales), torch.from_numpy(twin.mu(*size)))


@twins
def test_chapman_kolmogorov_on_images(twin: Twin) -> None:
    process, x = twin.build(), images(2, 1, H, W)
    for r, s, t in [(0.1, 0.35, 0.8), (0.125, 0.5, 1.0), (0.51, 0.53, 0.6)]:
        first = process.transition(x, r, s)
        second, both = process.transition(first.mean, s, t), process.transition(x, r, t)
        close(second.mean.numpy(), both.mean.numpy())
        rho = as_matrix(second.operator, process.step(s, t).rho)
        stds = [as_matrix(law.operator, law.std) for law in (first, second, both)]
        covariances = [std @ std.T for std in stds]
        close(rho @ covariances[0] @ rho.T + covariances[1], covariances[2], atol=1e-9)
        start = process.marginal(x, s)
        end = process.transition(start.mean, s, t)
        close(end.mean.numpy(), process.marginal(x, t).mean.numpy())


@twins
def test_variance_of_transitions_is_never_negative_at_any_eigenvalue(twin: Twin) -> None:
    process = twin.build()
    mu = torch.linspace(0, 2 * math.pi**2, 300, dtype=torch.float64).reshape(1, -1)
    if twin.spectrum is None:
        mu = torch.zeros(1, 1, dtype=torch.float64)
    grid = torch.linspace(0, 1, 41, dtype=torch.float64)
    step = process.step(grid[:-1], grid[1:])
    noise = step.noise_t(mu) ** 2
    assert (noise - step.rho(mu) ** 2 * step.noise_s(mu) ** 2 >= -1e-12 * noise).all()
    assert ((step.rho(mu) > 0) | (step.log_rho(mu) < -700)).all() and (step.rho(mu) <= 1 + 1e-12).all()
    for part in (step.tau(mu), step.posterior_coef_xt(mu), step.posterior_std(mu), step.transition_std(mu)):
        assert torch.isfinite(part).all() and (part >= 0).all()
    assert (step.tau(mu) <= 1).all()


# --- posterior --------------------------------------------------------------------------------------------------------


def conditioned(twin: Twin, s: float, t: float, x_0: Array, x_t: Array) -> tuple[Array, Array]:
    """Mean and covariance of y_s given y_t, from the joint Gaussian of (y_s, y_t) given y_0."""

    def rho(mu: Array) -> Array:
        return np.exp(np.log(twin.signal(t, mu)) - np.log(twin.signal(s, mu)))

    var_s, var_t = (dense(twin, lambda mu, v=v: twin.variance(v, mu)) for v in (s, t))
    mean_s, mean_t = (x_0 @ dense(twin, lambda mu, v=v: twin.signal(v, mu)) for v in (s, t))
    cross = dense(twin, rho) @ var_s
    if not var_t.any():
        return mean_s, np.zeros_like(var_s)
    gain = np.linalg.solve(var_t, cross).T
    return mean_s + (x_t - mean_t) @ gain.T, var_s - gain @ cross


@twins
@pytest.mark.parametrize(("s", "t"), PAIRS)
def test_posterior_is_dense_gaussian_conditioning(twin: Twin, s: float, t: float) -> None:
    process, x_0 = twin.build(), images(2, 2, H, W)
    x_t = images(2, 2, H, W, seed=1)
    law = process.posterior(x_t, x_0, s, t)
    mean, covariance = conditioned(twin, s, t, vectors(x_0), vectors(x_t))
    close(vectors(law.mean), mean, atol=1e-8)
    std = as_matrix(law.operator, law.std)
    close(std @ std.T, covariance, atol=1e-9 * (1 + np.abs(covariance).max()))


@twins
def test_posterior_given_the_image_itself_is_the_image(twin: Twin) -> None:
    """At s = 0, where a process has no noise at all there."""
    x_0 = images(2, 1, H, W)
    law = twin.build().posterior(images(2, 1, H, W, seed=1), x_0, 0.0, 0.4)
    close(law.mean.numpy(), x_0.numpy(), atol=1e-12)
    assert not as_matrix(law.operator, law.std).any()


@noisy_twins
def test_posterior_of_equal_scales_is_the_sample(twin: Twin) -> None:
    x_t = images(2, 1, H, W, seed=1)
    law = twin.build().posterior(x_t, images(2, 1, H, W), 0.6, 0.6)
    close(law.mean.numpy(), x_t.numpy(), atol=1e-12)
    assert not as_matrix(law.operator, law.std).any()


@twins
@settings(deadline=None, max_examples=15)
@given(scales=st.lists(st.floats(0, 1), min_size=2, max_size=2, unique=True))
def test_transition_then_posterior_gives_back_the_marginal(twin: Twin, scales: list[float]) -> None:
    """The law of y_s, from y_t ~ marginal and y_s | y_t: a^2 gamma_t^2 + std^2 = gamma_s^2, tau + a rho = 1."""
    s, t = sorted(scales)
    process, mu = twin.build(), torch.from_numpy(twin.mu(H, W))
    step = process.step(s, t)
    close(
        full(step.posterior_coef_xt(mu) ** 2 * step.noise_t(mu) ** 2 + step.posterior_std(mu) ** 2, 1, mu),
        full(process.noise_scale(s, mu) ** 2, 1, mu),
    )
    close(full(step.tau(mu) + step.posterior_coef_xt(mu) * step.rho(mu), 1, mu), 1)


@twins
def test_step_length_is_half_the_gain_of_log_snr(twin: Twin) -> None:
    process, mu = twin.build(), torch.from_numpy(twin.mu(H, W))
    gain = full(process.step(0.3, 0.7).half_log_snr_gain(mu), 1, mu)
    if not twin.variance(0.3, mu.numpy()).any():
        assert (gain == math.inf).all()
        return
    # in logarithms: the heaviest of these blurs underflow
    expected = 0.5 * (process.log_snr(0.3, mu) - process.log_snr(0.7, mu))
    close(gain, full(expected, 1, mu))
    assert (gain >= 0).all() and gain[-1, -1] > 0


@twins
def test_ratio_of_the_noise_scales(twin: Twin) -> None:
    process, mu = twin.build(), torch.from_numpy(twin.mu(H, W))
    assert not process.step(0.0, 0.0).noise_ratio(mu).isnan().any()
    assert (process.step(0.0, 0.4).noise_ratio(mu) == 0).all()
    expected = (
        0.0
        if isinstance(process, Homogeneous)
        else np.sqrt(twin.variance(0.3, mu.numpy()) / twin.variance(0.7, mu.numpy()))
    )
    close(full(process.step(0.3, 0.7).noise_ratio(mu), 1, mu), expected)


@twins
def test_noise_is_constant_for_heat_alone(twin: Twin) -> None:
    process = twin.build()
    assert process.has_constant_noise() == isinstance(process, InverseHeat | Homogeneous)


@twins
def test_one_t_per_sample_is_the_same_as_one_by_one(twin: Twin) -> None:
    process = twin.build()
    x, x_0 = images(4, 2, H, W), images(4, 2, H, W, seed=1)
    s, t = float64([0.0, 0.125, 0.3, 0.77]), float64([0.02, 0.5, 0.41, 1.0])
    noise = images(4, 2, H, W, seed=2)

    def check(law: Gaussian, single: Callable[[int], Gaussian]) -> None:
        spread = law.operator.apply(law.std, noise)
        for b in range(4):
            one = single(b)
            close(law.mean[b : b + 1].numpy(), one.mean.numpy(), atol=1e-12)
            close(spread[b].numpy(), one.operator.apply(one.std, noise[b : b + 1])[0].numpy(), atol=1e-12)

    check(process.marginal(x, t), lambda b: process.marginal(x[b : b + 1], float(t[b])))
    check(process.transition(x, s, t), lambda b: process.transition(x[b : b + 1], float(s[b]), float(t[b])))
    check(
        process.posterior(x, x_0, s, t),
        lambda b: process.posterior(x[b : b + 1], x_0[b : b + 1], float(s[b]), float(t[b])),
    )


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


# --- entropy ----------------------------------------------------------------------------------------------------------


@twins
def test_conditional_entropy_is_that_of_the_dense_covariance(twin: Twin) -> None:
    process = twin.build()
    scales = [0.05, 0.125, 0.6, 1.0]
    entropy = process.conditional_entropy(float64(scales), (H, W))
    assert entropy.dtype == torch.float64 and entropy.shape == (4,)
    for b, t in enumerate(scales):
        covariance = dense(twin, lambda mu, t=t: twin.variance(t, mu))
        one = process.conditional_entropy(t, (H, W))
        assert one.shape == () and one == entropy[b]
        if not covariance.any():
            assert entropy[b] == -math.inf
            continue
        sign, log_det = np.linalg.slogdet(2 * math.pi * math.e * covariance)
        assert sign == 1
        assert float(entropy[b]) == pytest.approx(0.5 * log_det, rel=1e-8, abs=1e-8)
    assert process.conditional_entropy(float64([0.4]), (H, W)).shape == (1,)


@lyapunov_twins
def test_entropy_and_noise_never_fall_where_the_lyapunov_property_is_promised(twin: Twin) -> None:
    process, t = twin.build(), torch.linspace(0, 1, 201, dtype=torch.float64)
    assert process.lyapunov
    mu = torch.from_numpy(twin.mu(H, W))
    assert (process.noise_scale(t, mu).diff(dim=0) >= -1e-12).all()
    entropy = process.conditional_entropy(t, (H, W))
    assert ((entropy[1:] >= entropy[:-1] - 1e-9) | (entropy[1:] == entropy[:-1])).all()


def test_chain_form_with_growing_steps_breaks_the_lyapunov_property() -> None:
    """Longer steps of blur take more from the noise than beta adds, at some mu: so it is not promised."""
    process = BlurringChain(200, 0.1, LogBlur(0.5, 24))
    assert not process.lyapunov
    t, mu = torch.arange(201).double() / 200, torch.linspace(0, 5, 100, dtype=torch.float64).reshape(1, -1)
    noise = process.noise_scale(t, mu)[:, 0, 0]
    fall = noise.diff(dim=0)
    assert (fall[:, 0] > 0).all(), "the mean only gains noise"
    assert fall.min() < -1e-3 * noise.max()


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


# --- underflow --------------------------------------------------------------------------------------------------------


HEAVY: dict[str, Callable[[], Process]] = {
    "inverse-heat": lambda: InverseHeat(200, blur=LogBlur(0.5, 128)),
    "homogeneous": lambda: Homogeneous(200, LogBlur(0.5, 128)),
    "blurring": lambda: Blurring(200, blur=LogBlur(0.5, 128)),
    "blurring-no-floor": lambda: Blurring(200, blur=LogBlur(0.5, 128), min_decay=0.0),
    "chain": lambda: BlurringChain(200, blur=LogBlur(0.5, 128)),
}


@pytest.mark.parametrize("name", [*list(HEAVY)[:-1], pytest.param("chain", marks=pytest.mark.slow)])
def test_heavy_blur_underflows_to_nothing_worse_than_zero(name: str) -> None:
    """128 px at 64 x 64 pixels: lambda_t is 0 in float32 nearly everywhere, so lambda_t / lambda_s would be NaN."""
    process = HEAVY[name]()
    x_0, x_t = images(2, 1, 64, 64).float(), images(2, 1, 64, 64, seed=1).float()
    mu = process.operator().eigenvalues(64, 64)
    for s, t in [(0.0, 0.005), (0.005, 0.01), (0.5, 0.505), (0.5, 1.0), (0.9, 0.905), (0.995, 1.0), (0.0, 1.0)]:
        step = process.step(s, t)
        for part in (step.rho, step.posterior_coef_xt, step.tau, step.transition_std, step.posterior_std):
            value = part(mu)
            assert torch.isfinite(value).all() and (value >= 0).all()
        assert (step.rho(mu) <= 1 + 1e-12).all()
        for law in (
            process.marginal(x_0, t),
            process.transition(x_t, s, t),
            process.posterior(x_t, x_0, s, t),
            process.posterior(x_t, x_0, float64([s, s]), float64([t, t])),
        ):
            assert law.mean.isfinite().all() and law.mean.abs().max() < 100
            assert law.sample(generator()).isfinite().all()


def test_ratio_of_underflowing_signals_is_the_blur_between_the_scales() -> None:
    process = InverseHeat(200, blur=LogBlur(0.5, 128))
    mu = process.operator().eigenvalues(64, 64)
    s, t = 0.99, 0.995
    naive = (process.signal_scale(t, mu).float() / process.signal_scale(s, mu).float()).isnan()
    assert naive.double().mean() > 0.3, "the case that the logarithm is for"
    sigma = [0.5 * (128 / 0.5) ** ((200 * v - 1) / 199) for v in (s, t)]
    expected = torch.exp(-mu * (sigma[1] ** 2 - sigma[0] ** 2) / 2)
    torch.testing.assert_close(process.step(s, t).rho(mu), expected, rtol=1e-8, atol=1e-300)


# --- construction -----------------------------------------------------------------------------------------------------


PROCESSES: list[Callable[..., Process]] = [VP, VE, Homogeneous, InverseHeat, Blurring, BlurringChain]


@pytest.mark.parametrize("make", PROCESSES)
def test_processes_are_built_without_arguments(make: Callable[..., Process]) -> None:
    process = make()
    assert process.sample(torch.zeros(1, 1, 4, 6), 0.5).shape == (1, 1, 4, 6)
    assert process.value_range[0] < process.value_range[1]


@pytest.mark.parametrize("make", PROCESSES)
@pytest.mark.parametrize("num_scales", [0, -3, True, 2.5, "8", None])
def test_num_scales_must_be_a_whole_number(make: Callable[..., Process], num_scales: Any) -> None:
    with refused(getattr(make, "__name__", ""), "num_scales", "whole number >= 1", repr(num_scales)):
        make(num_scales)


@pytest.mark.parametrize("make", PROCESSES)
def test_one_scale_is_enough(make: Callable[..., Process]) -> None:
    process, x = make(1), images(2, 1, H, W)
    assert process.sample(x, 1.0).isfinite().all()
    assert process.posterior(x, x, 0.0, 1.0).sample().isfinite().all()


@pytest.mark.parametrize("make", PROCESSES)
@pytest.mark.parametrize("value_range", [(1.0, -1.0), (0.0, 0.0), (0.0,), (0.0, 1.0, 2.0), (math.nan, 1.0)])
def test_value_range_must_ascend(make: Callable[..., Process], value_range: tuple[float, ...]) -> None:
    with refused(getattr(make, "__name__", ""), "value_range", "low < high"):
        make(value_range=value_range)


@pytest.mark.parametrize("min_decay", [-0.1, 1.0, 1.5, math.nan])
def test_min_decay_must_lie_below_one(min_decay: float) -> None:
    with refused("Blurring", "min_decay", "[0, 1)", repr(min_decay)):
        Blurring(min_decay=min_decay)


@pytest.mark.parametrize("make", [*PROCESSES, OsmosisFilter, InverseOsmosis, OsmosisDiffusion])
@pytest.mark.parametrize("value", [0, False, "", [], 0.1])
def test_schedule_must_be_one(make: Callable[..., Process], value: Any) -> None:
    """What is false is not taken for the default."""
    keys = {"noise", "blur"} & set(inspect.signature(make).parameters)
    assert keys
    for key in keys:
        with refused(getattr(make, "__name__", ""), f"{key}={value!r} is no {key} schedule"):
            make(**{key: value})


@pytest.mark.parametrize("std", [-0.1, 0.0, math.inf, "0.1"])
def test_noise_must_be_positive(std: Any) -> None:
    with refused("BlurringChain", "step_noise", "positive", repr(std)):
        BlurringChain(step_noise=std)
    with refused("ConstantNoise", "noise_std", "positive", repr(std)):
        InverseHeat(noise=ConstantNoise(std))


@pytest.mark.parametrize("make", [Homogeneous, InverseHeat, Blurring, BlurringChain])
def test_blur_out_of_order_names_the_scale(make: Callable[..., Process]) -> None:
    with refused("blur_sigmas", "scale k=3", "1 follows 2", "increasing"):
        make(4, blur=ListedBlurSigmas([1.0, 2.0, 1.0, 3.0]))
    with refused("dissipation_times", "num_scales=2"):
        make(4, blur=ListedDissipationTimes([1.0, 2.0]))


@pytest.mark.parametrize("make", [Homogeneous, InverseHeat, Blurring, BlurringChain])
def test_unknown_spectrum_is_refused(make: Callable[..., Process]) -> None:
    with refused("spectrum", "'discreet'", "did you mean 'discrete'"):
        make(spectrum="discreet")


@pytest.mark.parametrize("make", [VE, InverseHeat])
def test_noise_that_falls_names_scale_eigenvalue_and_negative_variance(make: Callable[..., Process]) -> None:
    with refused(make.__name__ if isinstance(make, type) else "", "k=3 of 4", "mu=0", "variance -0.16", "raise"):
        make(4, ListedNoise([0.1, 0.5, 0.3, 0.6]))


class Curves(NoiseSchedule):
    """Any (a_k, gamma_k)."""

    def __init__(self, signal: list[float], noise: list[float]) -> None:
        super().__init__()
        self.table = torch.log(float64([signal, noise]))

    def forward(self, t: Tensor) -> tuple[Tensor, Tensor]:
        index = (t * self.num_scales).round().long()
        return self.table[0, index], self.table[1, index]


def test_noise_that_falls_with_the_signal_breaks_the_lyapunov_property() -> None:
    """The chain exists, but entropy would fall: refused where the property is promised, and only there."""
    curves = Curves([1.0, 0.5, 0.1], [0.0, 0.5, 0.3])
    with refused("VE", "k=2 of 2", "mu=0", "falls from 0.5 to 0.3", "Lyapunov", "non-decreasing"):
        VE(2, curves)

    class Free(VE):
        lyapunov = False

    Free(2, curves)


@pytest.mark.parametrize("make", [VP, Blurring, OsmosisDiffusion])
def test_variance_must_be_preserved_where_it_is_promised(make: Callable[..., Process]) -> None:
    with refused(make.__name__ if isinstance(make, type) else "", "is 1.25 at scale k=4 of 4", "GeometricNoise", "ve"):
        make(4, noise=GeometricNoise(0.1, 0.5))


def test_noise_that_grows_too_slowly_for_the_signal_is_refused() -> None:
    """gamma_2^2 < rho^2 gamma_1^2 in spite of a falling signal."""
    with refused("VP", "k=2 of 2", "variance -0.08", "noise must grow"):
        VP(2, Curves([1.0, 0.9, 0.81], [0.0, 0.5, 0.35]))


def test_signal_that_grows_is_refused() -> None:
    with refused("VP", "k=2 of 2", "mu=0", "grows by a factor 2", "amplify"):
        VP(2, Curves([1.0, 0.4, 0.8], [0.0, 0.5, 2.0]))


@pytest.mark.parametrize("t", [-0.1, 1.5, math.nan])
def test_numbers_outside_the_unit_interval_are_no_scales(t: float) -> None:
    with refused("scale t", "[0, 1]", str(t)):
        as_scale(t)
    with refused("scale t", "[0, 1]"):
        VP(4).sample(images(1, 1, 2, 2), t)


# --- devices ----------------------------------------------------------------------------------------------------------


def check_on_gpu(process: Process, s: Tensor | float, t: Tensor | float) -> None:
    x = torch.rand(4, 3, 6, 9, device="cuda")
    for drawn in (
        process.sample(x, t),
        process.transition(x, s, t).sample(),
        process.posterior(x, x, s, t).sample(),
    ):
        assert drawn.device.type == "cuda" and drawn.shape == x.shape


@twins
def test_laws_stay_on_the_device_with_one_t_per_sample(twin: Twin) -> None:
    process = twin.build()
    with pretended_gpu(process):
        s, t = torch.rand(4, device="cuda"), torch.rand(4, device="cuda")
        check_on_gpu(process, s, t)
        assert process.conditional_entropy(t, (6, 9)).device.type == "cuda"


@twins
def test_laws_stay_on_the_device_with_one_t_for_all(twin: Twin) -> None:
    process = twin.build()
    with pretended_gpu(process):
        check_on_gpu(process, torch.rand((), device="cuda"), torch.rand((), device="cuda"))


@twins
def test_laws_and_trajectories_stay_on_the_device_with_numbers(twin: Twin) -> None:
    process = twin.build()
    with pretended_gpu(process):
        check_on_gpu(process, 0.25, 0.7)
        assert process.trajectory(torch.rand(2, 1, 6, 9, device="cuda"), [0.0, 0.3, 1.0]).device.type == "cuda"


@pytest.mark.parametrize(
    "make",
    [VP, VE, Homogeneous, InverseHeat, Blurring, BlurringChain, lambda: VE(8, GeometricNoise())],
)
def test_processes_made_of_formulas_need_no_move(make: Callable[[], Process]) -> None:
    process = make()
    with FakeTensorMode(allow_non_fake_inputs=True):
        check_on_gpu(process, torch.rand(4, device="cuda"), torch.rand(4, device="cuda"))


def test_the_pretended_gpu_notices_mixed_devices() -> None:
    process = VP(4, ListedBeta([0.1] * 4))
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(Exception, match="device"):
        check_on_gpu(process, torch.rand(4, device="cuda"), torch.rand(4, device="cuda"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_laws_on_a_gpu_are_those_on_the_cpu() -> None:
    x, x_0 = images(2, 1, H, W), images(2, 1, H, W, seed=1)
    s, t = float64([0.1, 0.5]), float64([0.7, 0.9])
    for twin in TWINS:
        process = twin.build()
        expected = process.posterior(x, x_0, s, t).mean
        actual = process.to("cuda").posterior(x.cuda(), x_0.cuda(), s.cuda(), t.cuda()).mean
        torch.testing.assert_close(actual.cpu(), expected, atol=1e-10, rtol=1e-9)
