"""Targets: what the network is asked for against dense matrices, and its answer turned into the clean image."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dpm_scales.processes import VE, VP, Homogeneous, InverseHeat, InverseOsmosis, OsmosisDiffusion, Process
from dpm_scales.schedules import ConstantNoise, LinearTimeBlur, ListedBeta, ListedDissipationTimes, LogBlur
from dpm_scales.spectrum import DataSpectrum
from dpm_scales.targets import Clean, NextScale, Noise, Target, Velocity, moments, steepest_blur
from support.oracles import (
    BY_NAME,
    NOISY,
    H,
    W,
    close,
    curves,
    float64,
    generator,
    images,
    named,
    noised,
    over,
    refused,
    scaled,
)
from support.reference import TWINS, Array, Twin, dense_function

SCALAR = [twin for twin in TWINS if twin.spectrum is None]
BLURRED = [twin for twin in TWINS if twin.spectrum is not None]
PAIRS = [(0.0, 0.125), (0.0, 0.01), (0.125, 0.25), (0.03, 0.1), (0.3, 0.9), (0.75, 1.0), (0.49, 0.5), (0.99, 1.0)]

#: name, the target, and whether it asks for noise
TARGETS: dict[str, Callable[[], Target]] = {
    "clean": lambda: Clean("scalar", clip=False),
    "clean-wiener": lambda: Clean("wiener", clip=False),
    "clean-plain": lambda: Clean(preconditioning="none", clip=False),
    "noise": Noise,
    "velocity": Velocity,
    "finer": NextScale,
    "finer-equal": lambda: NextScale(equal_weight=True),
}


def vectors(x: Tensor) -> Array:
    return x.flatten(-2).numpy()


def dense(twin: Twin, f: Callable[[Array], Array]) -> Array:
    return dense_function(twin.matrix(H, W), f)


def amplification(twin: Twin, s: float, t: float) -> float:
    """The largest lambda_s / lambda_t."""
    return float(np.exp(np.log(curves(twin, s)[0]) - np.log(curves(twin, t)[0])).max())


# --- prediction to clean image ----------------------------------------------------------------------------------------


def check_recovery(twin: Twin, target: Target, pairs: list[tuple[float, float]], atol: float) -> None:
    process, count = twin.build(), len(pairs)
    s, t = [p[0] for p in pairs], [p[1] for p in pairs]
    x_0, noise = images(count, 2, H, W), images(count, 2, H, W, seed=1)
    y_t = noised(twin, x_0, noise, t)
    operator = process.operator()
    truth = target.regression_target(process, operator, x_0, y_t, noise, float64(t))
    m = target.predict_mean(process, operator, truth, y_t, float64(t), float64(s))
    assert m.dtype == torch.float64 and m.shape == x_0.shape
    close(m.numpy(), scaled(twin, x_0, s).numpy(), atol)
    for b in range(count):  # one t and s for all images
        one = slice(b, b + 1)
        truth = target.regression_target(process, operator, x_0[one], y_t[one], noise[one], float64([t[b]]))
        m = target.predict_mean(process, operator, truth, y_t[one], float64(t[b]), float64(s[b]))
        close(m.numpy(), scaled(twin, x_0[one], [s[b]]).numpy(), atol)


@pytest.mark.parametrize("name", ["clean", "clean-wiener", "clean-plain"])
@over(TWINS)
def test_clean_image_gives_the_blurred_image(twin: Twin, name: str) -> None:
    check_recovery(twin, TARGETS[name](), PAIRS, 1e-12)


@over(NOISY)
def test_noise_gives_the_clean_image(twin: Twin) -> None:
    """The error of the last bit grows by 1 / rho, so only steps that blur less than a millionfold are asked for."""
    pairs = [pair for pair in PAIRS if amplification(twin, *pair) < 1e6]
    assert len(pairs) >= 2
    worst = max(amplification(twin, *pair) for pair in pairs)
    check_recovery(twin, Noise(), pairs, 1e-13 * worst * (1 + curves(twin, 1.0)[1].max()))


@over(NOISY)
def test_velocity_gives_the_clean_image_at_any_blur(twin: Twin) -> None:
    """lambda^2 + gamma^2 is never small where there is noise: 1e-4 for IHDM's, 1e-5 at a tenth of its first scale."""
    smallest = min(float((curves(twin, t)[0] ** 2 + curves(twin, t)[1] ** 2).min()) for _, t in PAIRS)
    check_recovery(twin, Velocity(), PAIRS, 1e-13 * (1 + curves(twin, 1.0)[1].max()) / min(smallest, 1))


@pytest.mark.parametrize("name", ["finer", "finer-equal"])
@over(TWINS)
def test_finer_scale_gives_the_clean_image_one_scale_down(twin: Twin, name: str) -> None:
    pairs = [((k - 1) / twin.num_scales, k / twin.num_scales) for k in (1, 2, 5, 8)]
    check_recovery(twin, TARGETS[name](), pairs, 1e-13 * (1 + curves(twin, 1.0)[1].max()))


@over([*named("vp-cosine", "blurring", "inverse-heat")])
def test_clean_image_is_clipped_to_the_values_of_the_process(twin: Twin) -> None:
    process = twin.build()
    low, high = process.value_range
    prediction = 5 * images(2, 1, H, W)
    s, t = float64([0.1, 0.2]), float64([0.5, 0.9])
    for clip, wanted in [(True, prediction.clamp(low, high)), (False, prediction)]:
        m = Clean(clip=clip).predict_mean(process, process.operator(), prediction, prediction, t, s)
        close(m.numpy(), scaled(twin, wanted, [0.1, 0.2]).numpy(), 1e-12)
    assert Clean().clip


@pytest.mark.parametrize("name", list(TARGETS))
@pytest.mark.parametrize("make", [OsmosisDiffusion, InverseOsmosis])
def test_clean_image_is_found_where_pixels_are_not_white(make: Callable[..., Process], name: str) -> None:
    """Osmosis: x = sqrt(v) y. Clean and finer speak of pixels, noise and velocity of white coordinates."""
    process, target = make(8, blur=LogBlur(0.5, 2.0)), TARGETS[name]()
    low, high = process.value_range
    x_0, noise = low + (high - low) * (images(3, 2, 6, 9) + 1) / 2, images(3, 2, 6, 9, seed=1)
    operator = process.operator(process.context(x_0, generator(2)))
    t = float64([0.125, 0.25, 0.5])
    s = t - 0.125
    y_0 = operator.to_white(x_0)
    assert (y_0 - x_0).abs().max() > 0.1
    y_t = operator.combine((process.signal(t), y_0), (lambda mu: process.noise_scale(t, mu), noise))
    truth = target.regression_target(process, operator, x_0, operator.to_pixels(y_t), noise, t)
    if name.startswith("clean"):
        assert torch.equal(truth, x_0)
    if name.startswith("finer"):
        step = operator.to_pixels(operator.apply(process.signal(s), y_0) - y_t)
        close(truth.numpy(), step.numpy(), 1e-12)
    m = target.predict_mean(process, operator, truth, y_t, t, s)
    close(m.numpy(), operator.apply(process.signal(s), y_0).numpy(), 1e-5)


# --- what is asked for ------------------------------------------------------------------------------------------------


@over(TWINS)
def test_truths_are_those_of_dense_matrices(twin: Twin) -> None:
    process, t = twin.build(), [0.03, 0.125, 0.6, 1.0]
    operator = process.operator()
    x_0, noise = images(4, 2, H, W), images(4, 2, H, W, seed=1)
    y_t = noised(twin, x_0, noise, t)

    def asked(target: Target) -> Array:
        return vectors(target.regression_target(process, operator, x_0, y_t, noise, float64(t)))

    assert torch.equal(Clean().regression_target(process, operator, x_0, y_t, noise, float64(t)), x_0)
    assert torch.equal(Noise().regression_target(process, operator, x_0, y_t, noise, float64(t)), noise)
    for b, v in enumerate(t):
        signal = dense(twin, lambda mu, v=v: twin.signal(v, mu))
        std = dense(twin, lambda mu, v=v: np.sqrt(twin.variance(v, mu).clip(0)))
        velocity = vectors(noise)[b] @ signal - vectors(x_0)[b] @ std
        close(asked(Velocity())[b], velocity)
        finer = dense(twin, lambda mu, v=v: twin.signal(max(v - 1 / twin.num_scales, 0), mu))
        close(asked(NextScale())[b], vectors(x_0)[b] @ finer - vectors(y_t)[b])


def test_velocity_of_a_variance_preserving_process_is_salimans_and_hos() -> None:
    """v = alpha eps - sigma x, and x = alpha z - sigma v (their Sect. 4)."""
    process = VP(8)
    t = float64([0.2, 0.7])
    mu = torch.zeros(1, 1, dtype=torch.float64)
    alpha, sigma = process.signal_scale(t, mu), process.noise_scale(t, mu)
    x_0, noise = images(2, 1, H, W), images(2, 1, H, W, seed=1)
    z = alpha * x_0 + sigma * noise
    v = Velocity().regression_target(process, process.operator(), x_0, z, noise, t)
    close(v.numpy(), (alpha * noise - sigma * x_0).numpy())
    estimate = Velocity().predict_mean(process, process.operator(), v, z, t, torch.zeros_like(t))
    close(estimate.numpy(), (alpha * z - sigma * v).numpy())


# --- preconditioning --------------------------------------------------------------------------------------------------


def white(std: float) -> DataSpectrum:
    spectrum = DataSpectrum(std).double()
    spectrum.std.fill_(std)  # not rounded on the way
    return spectrum


def scalings(process: Process, target: Target, t: list[float], data_std: float, size: tuple[int, int] = (H, W)) -> Any:
    m = moments(process, process.operator(), float64(t), white(data_std), size)
    return target.scalings(m)


def filtered(c: Any, x: Tensor) -> Tensor:
    """w x for the processes without blur."""
    return x if c.filter is None else c.filter(torch.zeros(1, 1, dtype=torch.float64)) * x


def flat(value: Tensor) -> Array:
    return value.flatten().numpy()


@pytest.mark.parametrize("kind", ["scalar", "wiener"])
@pytest.mark.parametrize("data_std", [0.5, 1.3])
def test_scalings_of_an_exploding_process_are_edms_table_1(data_std: float, kind: str) -> None:
    """c_skip, c_out, c_in and lambda(sigma) as printed there, at EDM's own noise levels."""
    t = [0.01, 0.2, 0.5, 0.9, 1.0]
    sigma = np.array(
        [(0.002 ** (1 / 7) + (k - 1) / 99 * (80 ** (1 / 7) - 0.002 ** (1 / 7))) ** 7 for k in (1, 20, 50, 90, 100)]
    )
    c = scalings(VE(100), Clean(kind), t, data_std)
    one = torch.ones((), dtype=torch.float64)
    close(flat(c.skip * filtered(c, one)), data_std**2 / (sigma**2 + data_std**2), 1e-13)
    close(flat(c.out), sigma * data_std / np.sqrt(data_std**2 + sigma**2), 1e-13)
    close(flat(c.inner * filtered(c, one)), 1 / np.sqrt(sigma**2 + data_std**2), 1e-13)
    close(flat(c.weight), (sigma**2 + data_std**2) / (sigma * data_std) ** 2, 1e-6)


@pytest.mark.parametrize("kind", ["scalar", "wiener"])
@over(SCALAR)
def test_scalings_without_blur_are_those_of_signal_and_noise(twin: Twin, kind: str) -> None:
    """c_skip = a s^2 / V, c_out = gamma s / sqrt(V), c_in = 1 / sqrt(V), V = a^2 s^2 + gamma^2."""
    process, s, t = twin.build(), 0.7, [0.125, 0.3, 0.625, 1.0]
    a = np.array([float(curves(twin, v)[0][0, 0]) for v in t])
    gamma = np.array([float(curves(twin, v)[1][0, 0]) for v in t])
    finer = np.array([float(curves(twin, v - 1 / 8)[0][0, 0]) for v in t])
    total = a**2 * s**2 + gamma**2
    c, one = scalings(process, Clean(kind), t, s), torch.ones((), dtype=torch.float64)
    close(flat(c.skip * filtered(c, one)), a * s**2 / total)
    close(flat(c.out), gamma * s / np.sqrt(total))
    close(flat(c.inner * filtered(c, one)), 1 / np.sqrt(total))
    close(flat(c.weight), total / (gamma * s) ** 2)
    step = (finer - a) ** 2 * s**2 + gamma**2
    for target, out, weight in [
        (Clean(preconditioning="none"), 1, 1),
        (Noise(), 1, 1),
        (Velocity(), 1, 1),
        (NextScale(), np.sqrt(step), 1),
        (NextScale(equal_weight=True), np.sqrt(step), 1 / step),
    ]:
        c = scalings(process, target, t, s)
        assert not c.skip.any() and c.skip.shape == c.out.shape == c.inner.shape == c.weight.shape == (4, 1, 1, 1)
        close(flat(c.inner), 1 / np.sqrt(total))
        close(flat(c.out), out)
        close(flat(c.weight), weight)


@over(BLURRED)
def test_scalings_under_blur_are_second_moments_averaged_over_the_spectrum(twin: Twin) -> None:
    """For coloured data, by loops over the frequencies: "scalar" takes the regression of x_0 on x_t, "wiener" that of
    each coefficient; c_out is the error's standard deviation, c_in that of what the network sees."""
    process, t = twin.build(), [0.125, 0.3, 0.625, 1.0]
    spectrum = white(0.6)
    spectrum.log_factor.copy_(torch.linspace(2, -2, len(spectrum.log_factor)))
    mu = twin.mu(H, W).ravel()
    power = spectrum(float64(mu.tolist())).tolist()
    m = moments(process, process.operator(), float64(t), spectrum, (H, W))
    targets = (Clean("scalar"), Clean("wiener"), Velocity(), NextScale(equal_weight=True))
    scalar, c, plain, finer = (target.scalings(m) for target in targets)
    assert c.filter is not None and scalar.filter is plain.filter is finer.filter is None
    gains = c.filter(float64(mu.tolist()))
    for b, v in enumerate(t):
        signal, noise = (curve.ravel() for curve in curves(twin, v))
        before = curves(twin, v - 1 / 8)[0].ravel()
        estimate = residual = total = cross = step = 0.0
        for j, (p, a, n, f) in enumerate(zip(power, signal, noise, before, strict=True)):
            floor = n * n if n > 0 else 1e-4 * 0.6**2
            wiener = a * p / (a * a * p + floor)
            assert float(gains[b].flatten()[j]) == pytest.approx(wiener, rel=1e-7)
            estimate += wiener**2 * (a * a * p + floor) / len(mu)
            residual += ((1 - wiener * a) ** 2 * p + wiener**2 * floor) / len(mu)
            total += (a * a * p + n * n) / len(mu)
            cross += a * p / len(mu)
            step += ((a - f) ** 2 * p + n * n) / len(mu)
        close(float(c.skip[b]), 1)
        close(float(c.inner[b]), 1 / math.sqrt(estimate), 0, 1e-7)
        close(float(c.out[b]), math.sqrt(residual), 1e-9, 1e-6)
        close(float(c.weight[b]), 1 / residual, 0, 1e-5)
        mean_power = sum(power) / len(power)
        close(float(scalar.skip[b]), cross / total)
        close(float(scalar.out[b]), math.sqrt(mean_power - cross**2 / total), 1e-7, 1e-6)
        close([float(x[b]) for x in (scalar.inner, plain.inner, finer.inner)], 1 / math.sqrt(total))
        assert (float(plain.skip[b]), float(plain.out[b]), float(plain.weight[b])) == (0, 1, 1)
        close([float(finer.out[b]), float(finer.weight[b])], [math.sqrt(step), 1 / step])


@over([twin for twin in BLURRED if twin.name in BY_NAME])
def test_wiener_estimate_is_the_best_linear_one(twin: Twin) -> None:
    """Against the normal equations of dense covariance matrices, for data of a measured spectrum."""
    process, t = twin.build(), 0.5
    spectrum = white(0.6)
    spectrum.log_factor.copy_(torch.linspace(2, -2, len(spectrum.log_factor)))
    m = moments(process, process.operator(), float64([t]), spectrum, (H, W))
    data = dense(twin, lambda mu: spectrum(torch.from_numpy(mu)).numpy())
    blur = dense(twin, lambda mu: twin.signal(t, mu) * np.ones_like(mu))
    noise = dense(twin, lambda mu: np.maximum(twin.variance(t, mu), 0) * np.ones_like(mu))
    if not noise.any():
        noise = 1e-4 * 0.6**2 * np.eye(H * W)
    best = np.linalg.solve(blur @ data @ blur.T + noise, blur @ data)  # symmetric: all commute
    x = images(2, 1, H, W)
    z = process.operator().apply(m.wiener, x)
    scale = float(np.abs(best).max())
    close(vectors(z), vectors(x) @ best, 1e-6 * scale)
    uncertainty = np.trace(data - data @ blur @ best) / (H * W)
    assert float(m.wiener_residual) == pytest.approx(uncertainty, rel=1e-5, abs=1e-9)


def white_images(twin: Twin, data_std: float, count: int) -> tuple[Tensor, Tensor]:
    """Images of independent pixels, and noise."""
    white = torch.randn(2, count, 1, 16, 16, generator=generator(5), dtype=torch.float64)
    return data_std * white[0], white[1]


@pytest.mark.parametrize("name", ["clean", "clean-wiener", "finer", "finer-equal"])
@over(SCALAR)
def test_networks_see_and_give_unit_variance(twin: Twin, name: str) -> None:
    """(truth - c_skip x_t) / c_out and c_in x_t on white data: 51200 pixels, within 5 standard errors of 1."""
    s, count, target = 0.7, 200, TARGETS[name]()
    process = twin.build()
    x_0, noise = white_images(twin, s, count)
    for t in (0.125, 0.5, 1.0):
        scale = torch.full((count,), t, dtype=torch.float64)
        x_t = noised(twin, x_0, noise, t)
        c = scalings(process, target, [t], s, (16, 16))
        z = filtered(c, x_t)
        asked = (target.regression_target(process, process.operator(), x_0, x_t, noise, scale) - c.skip * z) / c.out
        for value in (asked, c.inner * z):
            assert float((value**2).mean()) == pytest.approx(1, abs=5 * math.sqrt(2 / value.numel()))
        if name != "finer":  # every scale counts the same
            close(flat(c.weight * c.out**2), 1)


@over([twin for twin in SCALAR if twin.name.startswith("vp")])
def test_velocity_asks_for_unit_variance_where_variance_is_preserved(twin: Twin) -> None:
    process = twin.build()
    x_0, noise = white_images(twin, 1.0, 200)
    t = torch.full((200,), 0.5, dtype=torch.float64)
    for target in (Noise(), Velocity()):
        asked = target.regression_target(process, process.operator(), x_0, noised(twin, x_0, noise, 0.5), noise, t)
        assert float((asked**2).mean()) == pytest.approx(1, abs=5 * math.sqrt(2 / asked.numel()))


# --- what can't be learnt or walked -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("target", "name"), [(Noise(), "noise"), (Velocity(), "velocity")])
def test_targets_of_noise_need_some(target: Target, name: str) -> None:
    with refused(f"the {name} target needs noise", "Homogeneous has none", "target=clean"):
        target.check(Homogeneous(8))
    for twin in NOISY:
        target.check(twin.build())


def test_other_targets_suit_every_process() -> None:
    for twin in TWINS:
        for target in (Clean(), NextScale()):
            target.check(twin.build())


@pytest.mark.parametrize("steps", [1, 7, 9])
def test_finer_scale_walks_whole_chains_only(steps: int) -> None:
    process = InverseHeat(8)
    NextScale().check_steps(process, 8)
    with refused("finer-scale", "steps of 1/8 only", f"steps={steps}", "set steps=8"):
        NextScale().check_steps(process, steps)
    with refused("finer-scale", f"steps={steps}"):
        NextScale().check_scales(process, torch.linspace(1, 0, steps + 1, dtype=torch.float64))


def test_steepest_blur_is_the_largest_factor_of_one_step() -> None:
    """exp(-mu dT) at the highest frequency of a 64 x 64 image; 0 nats without blur."""
    process = InverseHeat(4, ConstantNoise(0.1), ListedDissipationTimes([0.1, 0.5, 0.6, 3.0]))
    highest = 2 * (math.pi * 63 / 64) ** 2
    assert steepest_blur(process, float64([1.0, 0.75, 0.5, 0.25, 0.0])) == pytest.approx(2.4 * highest)
    assert steepest_blur(process, float64([0.75, 0.5, 0.25, 0.0])) == pytest.approx(0.4 * highest)
    assert steepest_blur(process, float64([1.0, 0.0])) == pytest.approx(3.0 * highest)
    assert steepest_blur(VP(8), float64([1.0, 0.0])) == steepest_blur(VE(8), float64([1.0, 0.5, 0.0])) == 0


def test_noise_target_is_refused_where_a_step_blurs_too_much_to_divide_by() -> None:
    all_scales = torch.linspace(1, 0, 9, dtype=torch.float64)
    for twin in NOISY:
        process, heavy = twin.build(), steepest_blur(twin.build(), all_scales) > math.log(1e6)
        if heavy:
            with refused("noise target divides", "target=clean", "more steps"):
                Noise().check_scales(process, all_scales)
        else:
            Noise().check_scales(process, all_scales)
    # more steps do help
    slow = InverseHeat(100, ConstantNoise(0.1), LinearTimeBlur(10.0))
    Noise().check_scales(slow, torch.linspace(1, 0, 101, dtype=torch.float64))
    with refused("1e-83"):
        Noise().check_scales(slow, float64([1.0, 0.0]))


def test_published_blurs_are_too_heavy_for_the_noise_target_and_the_floored_one_is_not() -> None:
    scales = torch.linspace(1, 0, 201, dtype=torch.float64)
    with refused("noise target"):
        Noise().check_scales(InverseHeat(200, blur=LogBlur(0.5, 24)), scales)
    Noise().check_scales(BY_NAME["blurring-default-blur"].build(), scales[::25])


@pytest.mark.parametrize("name", list(TARGETS))
def test_scales_that_differ_by_nothing_ask_for_nothing(name: str) -> None:
    """The first of a list may be the image itself: no 0 / 0, and 0 asked for stays 0."""
    target = TARGETS[name]()
    still: list[Process] = [VP(4, ListedBeta([0.0, 0.1, 0.1, 0.1]))]
    if name not in ("noise", "velocity"):
        still += [Homogeneous(4, ListedDissipationTimes([0.0, 1.0, 1.0, 2.0]))]
    x_0 = images(2, 1, H, W)
    for process in still:
        for t in (0.25, 0.75):
            c = scalings(process, target, [t, t], 0.5)
            assert all(torch.isfinite(value).all() for value in (c.skip, c.out, c.inner, c.weight))
            x_t = process.sample(x_0, t)
            asked = target.regression_target(
                process, process.operator(), x_0, x_t, torch.zeros_like(x_0), float64([t, t])
            )
            z = x_t if c.filter is None else process.operator().apply(c.filter, x_t)
            assert torch.isfinite(z).all()
            loss = c.weight * (c.skip * z + c.out * 1.0 - asked) ** 2
            assert torch.isfinite(loss).all()


def test_wiener_is_chosen_where_only_blur_tells_the_scales_apart() -> None:
    """And refused by another name."""
    for twin in TWINS:
        process = twin.build()
        noise = [float(curves(twin, t)[1].max()) for t in (1 / twin.num_scales, 1.0)]
        sharpened = scalings(process, Clean(), [0.5], 0.5).filter is not None
        assert sharpened == math.isclose(*noise, rel_tol=1e-8)
    with refused("unknown preconditioning 'winer'", "did you mean 'wiener'"):
        Clean("winer")


def test_heavy_blur_without_noise_leaves_scalings_finite() -> None:
    """128 px on 8 x 8 pixels: every factor but the mean's underflows."""
    process = Homogeneous(8, LogBlur(0.5, 128))
    c = scalings(process, Clean("wiener"), [0.125, 0.5, 1.0], 0.5, (8, 8))
    assert torch.isfinite(c.filter(process.operator().eigenvalues(8, 8))).all()
    assert all(torch.isfinite(value).all() for value in (c.skip, c.out, c.inner, c.weight))
