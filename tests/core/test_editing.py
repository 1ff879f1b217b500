"""Degraded images and the denoiser that knows them, against dense Gaussian algebra."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from dpm_scales.denoisers import Denoiser
from dpm_scales.editing import Average, Blur, Consistent, Degradation, Mask, Resampling, restore
from dpm_scales.processes import VP, OsmosisDiffusion
from dpm_scales.rng import CounterRNG
from dpm_scales.samplers import DDIM, Ancestral, Dissipation, Heun, StepContext
from dpm_scales.schedules import SinSquaredBlur
from dpm_scales.targets import Clean, NextScale, Noise
from support.oracles import (
    BY_NAME,
    NOISY_MEMBERS,
    GaussianData,
    H,
    OracleDenoiser,
    ScriptedNoise,
    TinyNetwork,
    W,
    close,
    coefficients,
    curves,
    float64,
    gaussian_data,
    generator,
    images,
    named,
    over,
    pixels,
    pretended_gpu,
    refused,
    with_target,
)
from support.reference import Array, Twin, dct_basis

SIZE = (6, 4)


def known_pixels(height: int, width: int) -> Tensor:
    """Some two thirds, without a pattern; never all."""
    known = torch.rand(height, width, generator=generator(5)) < 0.65
    known[1, 1], known[0, 0] = False, True
    return known


def block_means(height: int, width: int, factor: int) -> Array:
    """Dense ``(h w, H W)``."""
    rows, columns = (np.kron(np.eye(n // factor), np.full((1, factor), 1 / factor)) for n in (height, width))
    return np.kron(rows, columns)


def dense_blur(height: int, width: int, sigma: float) -> Array:
    """exp(sigma^2 / 2 Laplacian), dense."""
    axes = []
    for n in (height, width):
        basis = dct_basis(n)
        axes.append(basis.T @ np.diag(np.exp(-((np.pi * np.arange(n) / n) ** 2) * sigma**2 / 2)) @ basis)
    return np.kron(*axes)


def dense_dct(height: int, width: int) -> Array:
    return np.kron(dct_basis(height), dct_basis(width))


Case = tuple[Degradation, Array]


def cases(height: int = SIZE[0], width: int = SIZE[1]) -> dict[str, Case]:
    """Each degradation and its dense matrix; a mask's rows of unknown pixels are zero."""
    known = known_pixels(height, width)
    return {
        "mask": (Mask(known, iterations=40), np.diag(known.double().numpy().ravel())),
        "average": (Average(2), block_means(height, width, 2)),
        "blur": (Blur(0.7), dense_blur(height, width, 0.7)),
    }


def dense_gain(a: Array, c: Array, noise_std: float) -> Array:
    """C A' (A C A' + sigma^2)^+ for C dense; unknown pixels of a mask say nothing."""
    system = a @ c @ a.T + noise_std**2 * np.diag(a.any(1).astype(float))
    return np.asarray(c @ a.T @ np.linalg.pinv(system, rcond=1e-13))


def spread_covariance(height: int, width: int, seed: int = 0) -> Array:
    """Variances of DCT coefficients over four orders of magnitude."""
    return np.asarray(np.exp(np.random.default_rng(seed).uniform(-5, 4, (height, width))))


def matrix_times(matrix: Array, x: Tensor, size: tuple[int, int]) -> Array:
    return np.asarray(np.einsum("ij,bcj->bci", matrix, x.flatten(-2).numpy()).reshape(*x.shape[:2], *size))


# --- degradations -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", cases())
def test_degradations_against_dense_matrices(name: str) -> None:
    degradation, a = cases()[name]
    x = images(2, 3, *SIZE)
    y = degradation.forward(x)
    close(y, matrix_times(a, x, tuple(y.shape[-2:])), atol=1e-12)
    if name != "blur":
        close(degradation.inverse(y), matrix_times(np.linalg.pinv(a), y, SIZE), atol=1e-12)
        nearest = degradation.project(images(2, 3, *SIZE, seed=1), y)
        close(degradation.forward(nearest), y, atol=1e-14)
        # what A does not see stays
        unseen = np.eye(a.shape[1]) - np.linalg.pinv(a) @ a
        close(matrix_times(unseen, nearest, SIZE), matrix_times(unseen, images(2, 3, *SIZE, seed=1), SIZE), atol=1e-12)


@pytest.mark.parametrize("noise_std", [0.0, 0.3])
@pytest.mark.parametrize("name", cases())
def test_gains_against_dense_algebra(name: str, noise_std: float) -> None:
    degradation, a = cases()[name]
    covariance, basis = spread_covariance(*SIZE), dense_dct(*SIZE)
    residual = degradation.forward(images(2, 3, *SIZE))
    expected = dense_gain(a, basis.T @ np.diag(covariance.ravel()) @ basis, noise_std)
    found = degradation.gain(torch.from_numpy(covariance), noise_std, residual)
    close(found, matrix_times(expected, residual, SIZE), atol=1e-8, rtol=1e-6)


def test_a_gain_for_each_image() -> None:
    """Covariances ``(B, 1, H, W)``."""
    for degradation, _ in cases().values():
        residual = degradation.forward(images(3, 2, *SIZE))
        each = torch.stack([torch.from_numpy(spread_covariance(*SIZE, seed))[None] for seed in range(3)])
        whole = degradation.gain(each, 0.1, residual)
        for b in range(3):
            close(whole[b : b + 1], degradation.gain(each[b, 0], 0.1, residual[b : b + 1]), atol=1e-9)


@pytest.mark.parametrize("factor", [2, 3, 4])
def test_white_covariance_gives_the_pseudo_inverse(factor: int) -> None:
    """A^T (A A^T)^-1 of block means repeats each pixel; that of a mask puts 0 in the hole."""
    height, width = 12, 24
    small, white = images(2, 1, height // factor, width // factor), torch.ones(height, width, dtype=torch.float64)
    pinv = np.linalg.pinv(block_means(height, width, factor))
    close(Average(factor).inverse(small), matrix_times(pinv, small, (height, width)), atol=1e-12)
    close(Average(factor).gain(3 * white, 0.0, small), Average(factor).inverse(small), atol=1e-12)
    known = known_pixels(height, width)
    y = Mask(known).forward(images(1, 1, height, width))
    close(Mask(known, iterations=2).gain(3 * white, 0.0, y), y, atol=1e-12)


def test_twenty_gradient_steps_are_enough_for_a_large_hole_in_a_photo_like_image() -> None:
    """A power law, as of photos, over a hole of a quarter of the image; float32 images are solved in float64."""
    height, width = 16, 24
    frequency = np.hypot(*np.meshgrid(np.arange(width) / width, np.arange(height) / height))
    covariance = 1 / (frequency + 0.02) ** 2
    known = torch.ones(height, width, dtype=torch.bool)
    known[4:12, 6:18] = False
    y = Mask(known).forward(images(1, 1, height, width))
    basis = dense_dct(height, width)
    dense = dense_gain(np.diag(known.double().numpy().ravel()), basis.T @ np.diag(covariance.ravel()) @ basis, 0.0)
    expected = matrix_times(dense, y, (height, width))
    found = Mask(known).gain(torch.from_numpy(covariance), 0.0, y.float())
    assert found.dtype == torch.float32
    close(found, expected, atol=2e-3 * np.abs(expected).max(), rtol=0)


def test_what_a_degradation_refuses() -> None:
    with refused("factor=3", "6x4"):
        Average(3).forward(images(1, 1, *SIZE))
    for wrong in (0, -1, float("nan"), "wide", True):
        with refused("blur_sigma must be > 0 px"):
            Blur(wrong)  # type: ignore[arg-type]


# --- the estimate -----------------------------------------------------------------------------------------------------


def posterior(
    data: GaussianData, a: Array, y: Tensor, noise_std: float, x_t: Tensor, law: tuple[Array, Array]
) -> Array:
    """E[x_0 | x_t, y] by dense conditioning on both at once: ``(B, 1, H, W)``."""
    height, width = data.mean.shape
    signal, noise = (curve.ravel() for curve in law)
    rows = a.any(1)
    seen = (a @ dense_dct(height, width).T)[rows]
    h = np.concatenate([np.diag(signal), seen])
    variance = np.diag(data.variance.ravel())
    r = np.diag(np.concatenate([noise**2, np.full(len(seen), noise_std**2)]))
    gain = variance @ h.T @ np.linalg.inv(h @ variance @ h.T + r)
    u_t, given = coefficients(x_t.numpy()).reshape(len(x_t), -1), y.flatten(1).numpy()[:, rows]
    u = data.mean.ravel() + (np.concatenate([u_t, given], 1) - h @ data.mean.ravel()) @ gain.T
    return pixels(u.reshape(-1, 1, height, width))


@pytest.mark.parametrize("noise_std", [0.0, 0.2])
@pytest.mark.parametrize("name", cases())
@over(named(*NOISY_MEMBERS))
def test_the_estimate_is_exact_for_gaussian_data(twin: Twin, name: str, noise_std: float) -> None:
    """m_s = lambda_s E[x_0 | x_t, y], at every scale, for every process; nothing is approximate but the solver."""
    data = gaussian_data(*SIZE)
    degradation, a = cases()[name]
    y = degradation.forward(data.sample(3, seed=1))
    known = Consistent(
        OracleDenoiser(twin, data), degradation, y, noise_std, lambda mu: torch.from_numpy(data.variance)
    )
    for t, s in ((1.0, 0.5), (0.4, 0.0)):
        x_t = images(3, 1, *SIZE, seed=2)
        exact = posterior(data, a, y, noise_std, x_t, curves(twin, t, *SIZE))
        signal, _ = curves(twin, s, *SIZE)
        scale = np.abs(exact).max()
        close(known.predict_mean(x_t, float64(t), float64(s)), pixels(signal * coefficients(exact)), atol=2e-6 * scale)


def moments(x: Tensor) -> tuple[Array, Array]:
    flat = x.flatten(1).numpy()
    return flat.mean(0), np.cov(flat.T)


def dense_posterior(data: GaussianData, a: Array, y: Tensor, noise_std: float) -> tuple[Array, Array]:
    """Mean and covariance of x_0 given y, in pixels, for one image y."""
    height, width = data.mean.shape
    basis, rows = dense_dct(height, width), a.any(1)
    prior, mean = basis.T @ np.diag(data.variance.ravel()) @ basis, basis.T @ data.mean.ravel()
    seen, given = a[rows], y.flatten().numpy()[rows]
    gain = prior @ seen.T @ np.linalg.inv(seen @ prior @ seen.T + noise_std**2 * np.eye(len(seen)))
    return mean + gain @ (given - seen @ mean), prior - gain @ seen @ prior


@pytest.mark.slow
@pytest.mark.parametrize(
    ("process", "name", "noise_std"),
    [("vp-cosine", "mask", 0.0), ("vp-cosine", "blur", 0.5), ("blurring", "blur", 0.5)],
)
def test_many_small_steps_sample_the_posterior(process: str, name: str, noise_std: float) -> None:
    """The ancestral chain with the exact estimate has the mean of p(x_0 | y), and its covariance as steps become small:
    what is missing, since a step takes the estimate for certain, falls like their length."""
    data, count = gaussian_data(H, W), 1000
    degradation, a = {
        "mask": (Mask(known_pixels(H, W), iterations=4), np.diag(known_pixels(H, W).double().numpy().ravel())),
        "blur": (Blur(0.7), dense_blur(H, W, 0.7)),
    }[name]
    y = degradation.forward(data.sample(1, seed=1))
    oracle, observed = OracleDenoiser(BY_NAME[process], data), y.expand(count, 1, H, W)
    known = Consistent(oracle, degradation, observed, noise_std, lambda mu: torch.from_numpy(data.variance))
    mean, covariance = dense_posterior(data, a, y, noise_std)
    spread, missing = np.sqrt(np.diag(covariance).clip(0)), []
    for steps in (30, 150):
        scales = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
        found = restore(known, Ancestral(), scales, CounterRNG(0, count), (1, H, W), dtype=torch.float64)
        found_mean, found_covariance = moments(found)
        np.testing.assert_array_less(np.abs(found_mean - mean), 5 * spread / count**0.5 + 1e-6 + 0.01 * spread.max())
        missing.append(1 - np.trace(found_covariance) / np.trace(covariance))
    assert np.abs(found_covariance - covariance).max() < 0.2 * covariance.max()
    assert abs(missing[1]) < 0.12 and abs(missing[1]) < 0.45 * missing[0], missing
    # the data as such are far from it
    assert np.abs(covariance - pixel_covariance(data)).max() > 0.5 * covariance.max()


def pixel_covariance(data: GaussianData) -> Array:
    basis = dense_dct(*data.mean.shape)
    return np.asarray(basis.T @ np.diag(data.variance.ravel()) @ basis)


@pytest.mark.parametrize("noise_std", [0.0, 0.4])
@pytest.mark.parametrize("name", cases())
def test_first_guess_is_drawn_from_the_gaussian_model_s_posterior(name: str, noise_std: float) -> None:
    """Matheron's rule, around the known mean."""
    degradation, a = cases()[name]
    data = GaussianData(np.zeros(SIZE), gaussian_data(*SIZE).variance)
    y = degradation.forward(data.sample(1, seed=1)) + 0.7 * degradation.forward(torch.ones(1, 1, *SIZE).double())
    level = y.flatten().numpy()[a.any(1)].mean()
    data = GaussianData(coefficients(np.full(SIZE, level)), data.variance)
    count = 4000
    denoiser = with_target(BY_NAME["vp-cosine"], Clean(), TinyNetwork())
    known = Consistent(
        denoiser, degradation, y.expand(count, -1, -1, -1), noise_std, lambda mu: torch.from_numpy(data.variance)
    )
    mean, covariance = dense_posterior(data, a, y, noise_std)
    found_mean, found = moments(known.first_guess(CounterRNG(0, count), (1, *SIZE), torch.float64))
    spread = np.sqrt(np.diag(covariance).clip(1e-12))
    np.testing.assert_array_less(np.abs(found_mean - mean), 5 * spread / count**0.5 + 1e-5)
    scale = max(np.diag(covariance).max(), 1e-6)
    assert np.abs(found - covariance).max() < 0.12 * scale


# --- consistency ------------------------------------------------------------------------------------------------------


def osmosis() -> Denoiser:
    return Denoiser(TinyNetworkOfTwo(), OsmosisDiffusion(num_scales=8, blur=SinSquaredBlur(1.0)), Clean()).double()


class TinyNetworkOfTwo(TinyNetwork):
    """Sees the guidance image, and mixes it in."""

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        return super().forward(x[:, :1] + 0.3 * x[:, 1:], t, labels)


DENOISERS: dict[str, Callable[[], Denoiser]] = {
    **{name: (lambda name=name: with_target(BY_NAME[name], Clean(), TinyNetwork())) for name in NOISY_MEMBERS},
    "homogeneous-log": lambda: with_target(BY_NAME["homogeneous-log"], Clean(), TinyNetwork()),
    "vp, noise target": lambda: with_target(BY_NAME["vp-cosine"], Noise(), TinyNetwork()),
    "osmosis": osmosis,
}
MODELS = [*((name, "spectrum") for name in DENOISERS), ("vp-cosine", "white"), ("osmosis", "white")]


@pytest.mark.parametrize(("process", "covariance"), MODELS)
def test_results_are_consistent_to_rounding(process: str, covariance: str) -> None:
    """A x = y for known pixels and block means, with any network, process, sampler and covariance."""
    denoiser = DENOISERS[process]()
    samplers = (
        [Dissipation(0.0)] if process == "homogeneous-log" else [Ancestral(), DDIM(0.5), Resampling(DDIM(1.0), 1)]
    )
    if process == "vp-cosine":
        samplers.append(Heun())
    scales = torch.linspace(1, 0, 4, dtype=torch.float64)
    for sampler in samplers:
        for name in ("mask", "average"):
            degradation = cases()[name][0]
            y = degradation.forward(images(2, 1, *SIZE))
            known = Consistent(denoiser, degradation, y, 0.0, covariance)
            x = restore(known, sampler, scales, CounterRNG(0, 2), (1, *SIZE), dtype=torch.float64)
            close(degradation.forward(x), y, atol=1e-11)
            assert float((x - degradation.inverse(y)).abs().max()) > 1e-3


def test_known_pixels_keep_their_bytes_in_single_precision() -> None:
    from dpm_scales.images import to_range, to_uint8

    known = known_pixels(8, 8)
    photo = torch.randint(0, 256, (2, 1, 8, 8), dtype=torch.uint8, generator=generator())
    for denoiser in (DENOISERS["vp-cosine"]().float(), DENOISERS["blurring"]().float(), osmosis().float()):
        value_range = denoiser.process.value_range
        consistent = Consistent(denoiser, Mask(known), to_range(photo, value_range))
        scales = torch.linspace(1, 0, 5, dtype=torch.float64)
        x = restore(consistent, Ancestral(), scales, CounterRNG(0, 2), (1, 8, 8))
        assert torch.equal(to_uint8(x, value_range)[..., known], photo[..., known])


@torch.no_grad()
def test_resampling_goes_back_by_the_process_itself() -> None:
    """One step and two repeats, with scripted noise, by the law's own transition."""
    twin = BY_NAME["blurring"]
    denoiser = with_target(twin, Clean(), TinyNetwork())
    draws = [torch.randn(2, 1, H, W, generator=generator(i), dtype=torch.float64) for i in range(5)]
    t, s = float64(0.8), float64(0.5)
    x = images(2, 1, H, W)
    down = Ancestral()
    m = denoiser.predict_mean(x, t, s)
    found = Resampling(down, 2).step(StepContext(denoiser, t, s, ScriptedNoise(draws)), x, m)
    y = x
    for k in range(3):
        if k > 0:
            law = denoiser.process.transition(y, s, t)
            y = law.mean + denoiser.process.operator().apply(law.std, draws[2 * k - 1])
        y = down.step(StepContext(denoiser, t, s, ScriptedNoise([draws[2 * k]])), y, denoiser.predict_mean(y, t, s))
    close(found, y, atol=1e-12)


def test_what_can_t_be_conditioned() -> None:
    y = images(1, 1, *SIZE)
    heat = BY_NAME["inverse-heat"]
    with refused("target=finer", "predicts the next scale only"):
        Consistent(with_target(heat, NextScale(), TinyNetwork()), Mask(known_pixels(*SIZE)), y)
    with refused("unknown covariance 'spectra'", "did you mean 'spectrum'"):
        Consistent(DENOISERS["blurring"](), Mask(known_pixels(*SIZE)), y, 0.0, "spectra")
    for wrong in (-1, 1.5, True):
        with refused("resample must be a whole number >= 0"):
            Resampling(Ancestral(), wrong)  # type: ignore[arg-type]


def test_nothing_waits_for_the_device() -> None:
    denoiser = osmosis()
    for repeats in (0, 1):  # which takes the steps on the host first
        Resampling(Ancestral(), repeats).check(denoiser)
    with pretended_gpu(denoiser):
        mask = torch.ones(4, 2, dtype=torch.bool, device="cuda")
        scales = torch.linspace(1, 0, 3, dtype=torch.float64, device="cuda")
        for degradation, size in ((Average(2), (2, 1)), (Blur(1.0), (4, 2)), (Mask(mask, iterations=1), (4, 2))):
            known = Consistent(denoiser, degradation, torch.rand(2, 1, *size, device="cuda"), 0.1)
            noise = CounterRNG(0, 2, device="cuda")
            sampler = Resampling(Ancestral(), 1 if size == (2, 1) else 0)
            assert restore(known, sampler, scales, noise, (1, 4, 2)).device.type == "cuda"


def test_default_process_has_what_edits_need() -> None:
    """P is the measured spectrum by default, one number with white."""
    denoiser = Denoiser(TinyNetwork(), VP(num_scales=4), Clean(), data_std=0.3)
    mu = torch.linspace(0, 9, 5, dtype=torch.float64)
    denoiser.spectrum.log_factor[0] = 1.0
    y = images(1, 1, *SIZE)
    spectrum = Consistent(denoiser, Mask(known_pixels(*SIZE)), y)
    white = Consistent(denoiser, Mask(known_pixels(*SIZE)), y, covariance="white")
    close(spectrum.power(mu), denoiser.spectrum(mu)), close(white.power(mu), np.full(5, 0.3**2), rtol=1e-6)
    assert float(spectrum.power(mu)[0]) > 2 * float(white.power(mu)[0])
