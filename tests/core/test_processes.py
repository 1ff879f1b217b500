"""The laws of every process against dense Gaussians and closed forms: curves, marginals, transitions, posteriors."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dpm_scales.processes import (
    VP,
    BlurringChain,
    Gaussian,
    Homogeneous,
    InverseHeat,
    Process,
)
from dpm_scales.schedules import (
    ConstantBeta,
    LinearTimeBlur,
)
from support.laws import BETWEEN, PAIRS, as_matrix, dense, full, noisy_twins, twins, vectors
from support.oracles import H, W, close, float64, images
from support.reference import Array, Twin

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
