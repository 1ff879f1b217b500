"""Targets: what the network is asked for against dense matrices, and its answer turned into the clean image."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from dpm_scales.moments import steepest_blur
from dpm_scales.processes import VE, VP, Homogeneous, InverseHeat, InverseOsmosis, OsmosisDiffusion, Process
from dpm_scales.schedules import ConstantNoise, LinearTimeBlur, ListedDissipationTimes, LogBlur
from dpm_scales.targets import Clean, NextScale, Noise, Target, Velocity
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
from support.reference import TWINS, Array, Twin
from support.targets import TARGETS, dense, vectors

PAIRS = [(0.0, 0.125), (0.0, 0.01), (0.125, 0.25), (0.03, 0.1), (0.3, 0.9), (0.75, 1.0), (0.49, 0.5), (0.99, 1.0)]


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
