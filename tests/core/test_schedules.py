"""Schedules against their formulas, and as modules."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from dpm_scales.errors import UserError
from dpm_scales.processes import VP, InverseHeat
from dpm_scales.schedules import (
    BlurSchedule,
    ConstantBeta,
    ConstantNoise,
    CosineLogSNR,
    EDMNoise,
    GeometricNoise,
    LinearBeta,
    LinearTimeBlur,
    ListedBeta,
    ListedBlurSigmas,
    ListedDissipationTimes,
    ListedNoise,
    LogBlur,
    NoiseSchedule,
    NoNoise,
    Schedule,
    SigmoidSignal,
    SinSquaredBlur,
)
from support.reference import (
    NoiseTwin,
    cosine_log_snr,
    edm_knot,
    exploding,
    geometric_knot,
    listed_beta,
    listed_noise,
    listed_time,
    log_blur,
    log_snr_curve,
    sigmoid_log_snr,
    sin_squared_blur,
)
from support.schedules import K, bound, knots

BETAS = [0.1, 0.0, 0.5, 0.2, 0.9]
GAMMAS = [0.1, 0.1, 0.5, 2.0, 3.0]
TIMES = [0.5, 0.5, 2.0, 8.0, 100.0]
TS = torch.tensor([0.0, 0.03, 0.2, 0.31, 0.4, 0.5, 0.6, 0.77, 0.8, 0.99, 1.0], dtype=torch.float64)

NOISE: dict[str, tuple[Callable[[], NoiseSchedule], NoiseTwin]] = {
    "constant-beta": (lambda: ConstantBeta(0.3), listed_beta([0.3] * K)),
    "linear-beta": (lambda: LinearBeta(0.01, 0.5), listed_beta(np.sqrt(np.linspace(0.01, 0.5, K)).tolist())),
    "listed-beta": (lambda: ListedBeta(BETAS), listed_beta(BETAS)),
    "cosine": (CosineLogSNR, log_snr_curve(cosine_log_snr, K)),
    "cosine-other": (
        lambda: CosineLogSNR(-15, 12, shift=0.25),
        log_snr_curve(lambda t: cosine_log_snr(t, -15, 12, 0.25), K),
    ),
    "sigmoid": (SigmoidSignal, log_snr_curve(sigmoid_log_snr, K)),
    "geometric": (lambda: GeometricNoise(0.01, 50), exploding(lambda k: geometric_knot(k, K, 0.01, 50), K)),
    "edm": (EDMNoise, exploding(lambda k: edm_knot(k, K), K)),
    "listed-noise": (lambda: ListedNoise(GAMMAS), listed_noise(GAMMAS)),
    "constant-noise": (lambda: ConstantNoise(0.1), exploding(lambda k: 0.1, K)),
    "no-noise": (NoNoise, NoiseTwin(lambda t: (1.0, 0.0), lambda k: (1.0, 0.0))),
}
BLUR: dict[str, tuple[Callable[[], BlurSchedule], Callable[[float], float]]] = {
    "log": (lambda: LogBlur(0.5, 24), log_blur(K, 0.5, 24)),
    "sin-squared": (SinSquaredBlur, sin_squared_blur(20.0)),
    "linear-time": (lambda: LinearTimeBlur(30), lambda t: 30 * t),
    "listed-sigmas": (lambda: ListedBlurSigmas(TIMES), listed_time([s * s / 2 for s in TIMES])),
    "listed-times": (lambda: ListedDissipationTimes(TIMES), listed_time(TIMES)),
}


# --- every noise schedule ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NOISE)
def test_noise_is_its_closed_form_at_and_between_the_scales(name: str) -> None:
    make, twin = NOISE[name]
    log_signal, log_noise = bound(make())(TS)
    assert log_signal.dtype == log_noise.dtype == torch.float64
    assert log_signal.shape == log_noise.shape == TS.shape
    signal, variance = np.array([twin.at(t) for t in TS.tolist()]).T
    np.testing.assert_allclose(log_signal.exp().numpy(), signal, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose((2 * log_noise).exp().numpy(), variance, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("name", NOISE)
def test_noise_is_that_of_its_chain_of_steps(name: str) -> None:
    make, twin = NOISE[name]
    log_signal, log_noise = bound(make())(knots(K))
    signal, variance = twin.at(0.0)
    for k in range(1, K + 1):
        alpha, beta_squared = twin.step(k)
        signal, variance = alpha * signal, alpha**2 * variance + beta_squared
        assert math.exp(log_signal[k]) == pytest.approx(signal, rel=1e-11)
        assert math.exp(2 * log_noise[k]) == pytest.approx(variance, rel=1e-9)


@pytest.mark.parametrize("name", [*NOISE, *BLUR])
def test_scalar_t_float32_t_and_vector_t_agree(name: str) -> None:
    make = NOISE[name][0] if name in NOISE else BLUR[name][0]
    schedule = bound(make())
    t = torch.tensor([0.25, 0.5, 0.625, 1.0])
    vector = schedule(t)
    double = schedule(t.double())
    for b in range(4):
        scalar = schedule(t[b].double())
        for one, many, other in zip(
            *((v if isinstance(v, tuple) else (v,)) for v in (scalar, vector, double)), strict=True
        ):
            assert one.shape == () and one.dtype == many.dtype == torch.float64
            assert torch.equal(one, many[b]) and torch.equal(one, other[b])


@pytest.mark.parametrize("name", [n for n in NOISE if n.split("-")[-1] in ("beta", "cosine", "other", "sigmoid")])
def test_variance_preserving(name: str) -> None:
    log_signal, log_noise = bound(NOISE[name][0]())(TS)
    torch.testing.assert_close((2 * log_signal).exp() + (2 * log_noise).exp(), torch.ones_like(TS), rtol=1e-13, atol=0)


@pytest.mark.parametrize("name", NOISE)
def test_noise_never_falls_and_signal_never_grows(name: str) -> None:
    t = torch.linspace(0, 1, 401, dtype=torch.float64)
    log_signal, log_noise = bound(NOISE[name][0]())(t)
    assert (log_signal.diff() <= 1e-12).all()
    assert (log_noise.exp().diff() >= -1e-12).all()
    assert not log_signal.isnan().any() and not log_noise.isnan().any()


@pytest.mark.parametrize("name", [n for n in NOISE if "cosine" not in n and n != "sigmoid"])
def test_scale_zero_is_the_image_itself(name: str) -> None:
    log_signal, log_noise = bound(NOISE[name][0]())(torch.zeros((), dtype=torch.float64))
    assert log_signal == 0 and log_noise == -math.inf


# --- single noise schedules -------------------------------------------------------------------------------------------


def test_trap_figure_step_100_of_beta_one_tenth() -> None:
    """Independent noise adds variances: 0.796 = sqrt(1 - 0.99^100), where adding standard deviations gives 7.9."""
    log_signal, log_noise = bound(ConstantBeta(0.1), 100)(torch.ones((), dtype=torch.float64))
    assert math.exp(log_noise) == pytest.approx(0.796, abs=5e-4)
    assert math.exp(log_noise) == pytest.approx(math.sqrt(1 - 0.99**100), rel=1e-12)
    assert math.exp(log_signal) == pytest.approx(math.sqrt(0.99) ** 100, rel=1e-12)


def test_linear_beta_defaults_are_ddpms() -> None:
    log_signal, _ = bound(LinearBeta(), 1000)(knots(1000))
    betas = 1 - torch.exp(2 * log_signal.diff())
    np.testing.assert_allclose(betas.numpy(), np.linspace(1e-4, 0.02, 1000), rtol=1e-9)


def test_cosine_log_snr_ends_middle_and_shift() -> None:
    t = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    plain = CosineLogSNR().log_snr(t)
    np.testing.assert_allclose(plain.numpy(), [10.0, 0.0, -10.0], atol=1e-9)
    np.testing.assert_allclose(CosineLogSNR(-3, 7).log_snr(t[[0, 2]]).numpy(), [7.0, -3.0], atol=1e-9)
    shifted = CosineLogSNR(shift=32 / 64).log_snr(t)
    np.testing.assert_allclose((shifted - plain).numpy(), 2 * math.log(0.5), atol=1e-12)
    formula = [cosine_log_snr(value) for value in TS.tolist()]
    np.testing.assert_allclose(CosineLogSNR().log_snr(TS).numpy(), formula, atol=1e-9)


def test_cosine_is_close_to_the_untruncated_cosine() -> None:
    """tan(pi t / 2) = gamma / a: the signal is cos(pi t / 2)."""
    t = torch.linspace(0.1, 0.9, 9, dtype=torch.float64)
    log_signal, _ = bound(CosineLogSNR(-40, 40), 100)(t)
    torch.testing.assert_close(log_signal.exp(), torch.cos(t * math.pi / 2), rtol=1e-6, atol=0)


def test_sigmoid_signal_ends_and_symmetry() -> None:
    t = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    curve = bound(SigmoidSignal(minimum=1e-4))
    np.testing.assert_allclose(torch.sigmoid(curve.log_snr(t)).numpy(), [1 - 1e-4, 0.5, 1e-4], rtol=1e-9)
    np.testing.assert_allclose((2 * curve(t)[0]).exp().numpy(), [1, 0.5, 1e-4], rtol=1e-9)  # scale 0 is the image


def test_edm_knots_are_karras_grid() -> None:
    N = 18
    i = np.arange(N)
    rho, low, high = 7.0, 0.002, 80.0
    grid = (high ** (1 / rho) + i / (N - 1) * (low ** (1 / rho) - high ** (1 / rho))) ** rho
    _, log_noise = bound(EDMNoise(), N)(knots(N))
    np.testing.assert_allclose(log_noise.exp().numpy()[1:], grid[::-1], rtol=1e-10)


def test_geometric_knots() -> None:
    _, log_noise = bound(GeometricNoise(), 10)(knots(10))
    np.testing.assert_allclose(log_noise.exp().numpy()[1:], np.geomspace(0.002, 80, 10), rtol=1e-10)


@pytest.mark.parametrize("schedule", [GeometricNoise(0.002, 80), EDMNoise(0.002, 80)])
def test_with_one_scale_that_scale_lies_between_the_ends(schedule: Schedule) -> None:
    log_noise = bound(schedule, 1)(torch.ones((), dtype=torch.float64))[1]
    assert 0.002 * (1 - 1e-9) <= math.exp(log_noise) <= 80 * (1 + 1e-9)


# --- every blur schedule ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BLUR)
def test_blur_is_its_closed_form_at_and_between_the_scales(name: str) -> None:
    make, twin = BLUR[name]
    time = bound(make())(TS)
    assert time.dtype == torch.float64 and time.shape == TS.shape
    np.testing.assert_allclose(time.numpy(), [twin(t) for t in TS.tolist()], rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("name", BLUR)
def test_blur_starts_at_nothing_and_only_grows(name: str) -> None:
    time = bound(BLUR[name][0]())(torch.linspace(0, 1, 401, dtype=torch.float64))
    assert time[0] == 0 and (time.diff() >= 0).all()


def test_log_blur_knots_of_the_published_cifar10_schedule() -> None:
    time = bound(LogBlur(0.5, 24), 200)(knots(200))
    np.testing.assert_allclose(np.sqrt(2 * time.numpy()[1:]), np.geomspace(0.5, 24, 200), rtol=1e-10)


def test_sin_squared_blur_at_known_scales() -> None:
    sigma = (2 * bound(SinSquaredBlur(20))(torch.tensor([0, 1 / 3, 0.5, 1], dtype=torch.float64))).sqrt()
    np.testing.assert_allclose(sigma.numpy(), [0, 5, 10, 20], rtol=1e-12, atol=1e-12)


# --- as modules -------------------------------------------------------------------------------------------------------


def test_tables_are_no_part_of_a_checkpoint() -> None:
    assert VP(4, LinearBeta()).state_dict() == {}


@pytest.mark.parametrize(
    "cast",
    [nn.Module.half, nn.Module.float, lambda m: m.to(torch.bfloat16)],
    ids=["float16", "float32", "bfloat16"],
)
@pytest.mark.parametrize(
    "make",
    [lambda: VP(K, LinearBeta()), lambda: InverseHeat(K, blur=ListedBlurSigmas(TIMES))],
    ids=["vp-linear", "inverse-heat-listed"],
)
def test_curves_stay_float64_when_a_model_around_them_is_cast(
    cast: Callable[[nn.Module], nn.Module], make: Callable[[], nn.Module]
) -> None:
    """Half-precision training casts every floating-point buffer of a module tree."""
    exact, process = make(), make()
    cast(nn.ModuleList([process]))
    t, mu = TS, torch.tensor([0.0, 0.7], dtype=torch.float64)
    for curve in ("signal_scale", "noise_scale"):
        torch.testing.assert_close(getattr(process, curve)(t, mu), getattr(exact, curve)(t, mu), rtol=1e-12, atol=0)


@pytest.mark.parametrize("make", [ConstantBeta, LinearBeta, CosineLogSNR, GeometricNoise])
def test_a_schedule_given_to_two_processes_serves_both_or_is_refused(make: Callable[[], NoiseSchedule]) -> None:
    schedule = make()
    process = VP(4, schedule) if not isinstance(schedule, GeometricNoise) else InverseHeat(4, schedule)
    before = schedule(TS)
    try:
        VP(50, schedule) if not isinstance(schedule, GeometricNoise) else InverseHeat(50, schedule)
    except UserError:
        return
    for old, new in zip(before, process.noise(TS), strict=True):
        assert torch.equal(old, new)
