"""Clocks: steps, entropy, samplers, targets and losses for b = 0, 1, 100, by the closed form of each frequency."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from dpm_scales.denoisers import Denoiser
from dpm_scales.editing import Average, Consistent, Mask, restore
from dpm_scales.likelihood import FlowLikelihood, VariationalBound
from dpm_scales.operators import PixelOperator
from dpm_scales.priors import DataPrior, GaussianPrior
from dpm_scales.processes import VE, VP, Blurring, InverseHeat, Process, Spectral
from dpm_scales.rng import CounterRNG
from dpm_scales.samplers import DDIM, Churn
from dpm_scales.schedules import (
    Clock,
    ConstantNoise,
    CosineLogSNR,
    EDMNoise,
    LinearTimeBlur,
    NoiseSchedule,
    Rectified,
    SpectralClock,
)
from dpm_scales.targets import Clean, Flow, Noise, Target, Velocity
from dpm_scales.weights import EDM, MinSNR
from support.frequencies import LADDER, SAMPLERS, at_scales, path, visited
from support.oracles import TinyNetwork, close, coefficients, float64, images, pixels, refused
from support.reference import Array, cosine_log_snr, edm_knot, eigenvalues

SIZE, K = (2, 4), 12
MU = eigenvalues(*SIZE)
SPREADS = [0.0, 1.0, 100.0]
PAIRS = [(0.0, 0.3), (0.1, 0.45), (0.3, 0.8), (0.45, 0.5), (0.7, 1.0)]


def cosine(t: float) -> tuple[float, float]:
    ratio = math.exp(-cosine_log_snr(t)) * min(t * K, 1)
    return 1 / math.sqrt(1 + ratio), math.sqrt(ratio / (1 + ratio))


@dataclass(frozen=True)
class Law:
    """A process, and (a, gamma), dissipation time and d_min of the same without a clock, in closed form."""

    build: Callable[[Clock | None], Process]
    noise: Callable[[float], tuple[float, float]]
    time: Callable[[float], float] = lambda t: 0.0
    floor: float = 0.0

    def at(self, t: float, spread: float) -> tuple[Array, Array]:
        """Return lambda_t(mu) and gamma_t(mu), each frequency at its own time."""
        place = np.sqrt(MU / (2 * math.pi**2))
        times = np.clip((1 + spread) * t - spread * (1 - place), 0, 1)
        blur = [(1 - self.floor) * math.exp(-m * self.time(s)) + self.floor for m, s in zip(MU.flat, times.flat)]  # noqa: B905
        pairs = [self.noise(float(s)) for s in times.flat]
        signal, noise = (np.array(values).reshape(SIZE) for values in zip(*pairs, strict=True))
        return signal * np.array(blur).reshape(SIZE), noise


LAWS = {
    "vp": Law(lambda clock: VP(K, clock=clock), cosine),
    "ve": Law(
        lambda clock: VE(K, EDMNoise(0.05, 5.0), clock=clock),
        lambda t: (1.0, edm_knot(max(t * K, 1), K, 0.05, 5.0) * math.sqrt(min(t * K, 1))),
    ),
    "rectified": Law(lambda clock: Spectral(K, clock=clock), lambda t: (1 - (1 - 1e-12) * t, t)),
    "blurring": Law(
        lambda clock: Blurring(K, blur=LinearTimeBlur(0.7), min_decay=0.05, clock=clock),
        cosine,
        lambda t: 0.7 * t,
        0.05,
    ),
    "heat": Law(
        lambda clock: InverseHeat(K, ConstantNoise(0.1), LinearTimeBlur(0.7), clock=clock),
        lambda t: (1.0, 0.1 * math.sqrt(min(t * K, 1))),
        lambda t: 0.7 * t,
    ),
}
over = pytest.mark.parametrize("spread", SPREADS)
laws = pytest.mark.parametrize("law", LAWS)


def clocked(law: str, spread: float) -> Process:
    return LAWS[law].build(SpectralClock(spread))


@over
@laws
def test_a_step_in_closed_form(law: str, spread: float) -> None:
    """Every function of mu between two scales; a frequency that has not started by t stays what it is."""
    process, mu = clocked(law, spread), torch.from_numpy(MU)
    for s, t in PAIRS:
        (signal_s, noise_s), (signal, noise) = LAWS[law].at(s, spread), LAWS[law].at(t, spread)
        rho, started = signal / signal_s, noise > 0
        ratio = np.where(started, noise_s / np.where(started, noise, 1.0), 1.0)
        left = np.clip(1 - (rho * ratio) ** 2, 0, None)
        step = process.step(s, t)
        for found, expected in (
            (step.signal_s, signal_s),
            (step.noise_t, noise),
            (step.rho, rho),
            (step.noise_ratio, ratio),
            (step.transition_std, noise * np.sqrt(left)),
            (step.posterior_coef_xt, rho * ratio**2),
            (step.posterior_coef_x0, signal_s * left),
            (step.posterior_std, noise_s * np.sqrt(left)),
            (step.tau, left),
        ):
            # a root of a difference keeps half of the digits
            close(
                found(mu).expand(SIZE),
                expected,
                1e-7 if found in (step.transition_std, step.posterior_std) else 1e-10,
                0,
            )
        gain = step.half_log_snr_gain(mu).expand(SIZE)
        assert not gain.isnan().any() and bool((gain >= -1e-12).all())
        with np.errstate(divide="ignore"):
            close(process.log_snr(t, mu).expand(SIZE), 2 * np.log(signal / noise), 1e-10, 1e-10)
            entropy = 0.5 * np.log(2 * np.pi * np.e * noise**2).sum()  # -inf where a frequency has not started
        close(process.conditional_entropy(t, SIZE), entropy, 1e-10, 0)
    assert math.isfinite(process.conditional_entropy(1.0, SIZE))


class Alone(NoiseSchedule):
    """The curves of one frequency, at its own time, as those of a process without a spectrum."""

    def __init__(self, noise: NoiseSchedule, mu: float, spread: float) -> None:
        super().__init__()
        self.noise, self.spread, self.place = noise, spread, math.sqrt(mu / (2 * math.pi**2))

    def bind(self, num_scales: int) -> None:
        super().bind(num_scales)
        self.noise.bind(num_scales)

    def forward(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return self.noise(((1 + self.spread) * t - self.spread * (1 - self.place)).clamp(0, 1))


SCHEDULES: dict[str, Callable[[], NoiseSchedule]] = {
    "vp": CosineLogSNR,
    "ve": lambda: EDMNoise(0.05, 5.0),
    "rectified": Rectified,
}


def start_of(sampler: str) -> tuple[Array, list[Array]]:
    start, *whites = (coefficients(images(2, 1, *SIZE, seed=k).numpy()) for k in range(6))
    return start, whites


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(("law", "spread"), [("vp", 1.0), ("ve", 100.0), ("rectified", 1.0)])
def test_a_sampler_treats_a_frequency_like_a_scalar_process(law: str, sampler: str, spread: float) -> None:
    """As long as it has noise; after that no sampler changes it, the last step included, but dissipation does."""
    process, (start, whites) = clocked(law, spread), start_of(sampler)
    found = path(SAMPLERS[sampler](), process, start, whites)
    assert np.isfinite(found).all()
    scales, before, kinds = visited(SAMPLERS[sampler](), process), np.concatenate([start[None], found[:-1]]), set()
    for row, column in ((0, 0), (0, 2), (1, 3)):
        place = (..., slice(row, row + 1), slice(column, column + 1))
        alone = Process(PixelOperator(), K, Alone(SCHEDULES[law](), float(MU[row, column]), spread))
        one = path(at_scales(SAMPLERS[sampler](), scales), alone, start[place], [w[place] for w in whites])
        for i, t in enumerate(scales.tolist()):
            started = bool(LAWS[law].at(t, spread)[1][row, column] > 0)
            kinds.add(started)
            if started or (sampler == "dissipation" and i < len(LADDER) - 2):
                close(found[i][place], one[i], 1e-10, 0)
            else:
                close(found[i][place], before[i][place], 1e-12, 0)
    assert kinds == {True, False}


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("law", ["vp", "rectified", "blurring"])
def test_a_clock_of_no_spread_is_no_clock(law: str, sampler: str) -> None:
    start, whites = start_of(sampler)
    with_clock, without = (
        path(SAMPLERS[sampler](), process, start, whites) for process in (clocked(law, 0.0), LAWS[law].build(None))
    )
    close(with_clock, without, 1e-10, 0)


@pytest.mark.parametrize("spread", SPREADS[1:])
@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if name != "heun-noise"])  # which amplifies under blur
@pytest.mark.parametrize("law", ["blurring", "heat"])
def test_samplers_give_numbers_under_blur(law: str, sampler: str, spread: float) -> None:
    start, whites = start_of(sampler)
    found = path(SAMPLERS[sampler](), clocked(law, spread), start, whites)
    assert np.isfinite(found).all() and np.abs(found).max() < 30


def test_churn_under_constant_noise_follows_the_blur_with_a_clock_too() -> None:
    scales = float64(LADDER)
    churned = [Churn(0.5).scales(LAWS["heat"].build(clock), scales) for clock in (None, SpectralClock(3.0))]
    close(churned[1], churned[0], 0, 0)
    assert bool((churned[0] > scales[:-1]).all()) and float(churned[0].max()) < 1
    for law, constant in (("heat", True), ("vp", False), ("ve", False), ("rectified", False)):
        assert all(clocked(law, spread).has_constant_noise() == constant for spread in SPREADS), law


TARGETS: dict[str, Callable[[], Target]] = {
    "clean": lambda: Clean(clip=False),
    "noise": Noise,
    "velocity": Velocity,
    "flow": Flow,
}


@over
@pytest.mark.parametrize("target", TARGETS)
@laws
def test_targets_give_the_mean_back_and_finite_losses(law: str, target: str, spread: float) -> None:
    """m_s from the ideal prediction; and the loss of a network and its gradient."""
    process = clocked(law, spread)
    if target == "flow" and (spread > 0 or law == "heat"):
        with refused("flow", "do not change", "target=clean"):
            TARGETS[target]().check(process)
        return
    x, noise = images(3, 1, *SIZE), images(3, 1, *SIZE, seed=1)
    t, s = float64([0.2, 0.55, 0.9]), float64([0.0, 0.3, 0.7])
    operator, chosen = process.operator(), TARGETS[target]()
    y_t = process.perturb(x, t, noise, operator)
    truth = chosen.regression_target(process, operator, x, y_t, noise, t)
    assert torch.isfinite(truth).all()
    mean = chosen.predict_mean(process, operator, truth, y_t, t, s)
    expected = [LAWS[law].at(float(one), spread)[0] for one in s]
    # the noise target divides by what is left of the signal: 1e-12 where a clock of the straight path has run out
    exact = 1e-3 if target == "noise" and law == "rectified" else 1e-10
    close(mean, pixels(np.stack(expected)[:, None] * coefficients(x.numpy())), exact, 0)
    network = TinyNetwork().double()
    loss = Denoiser(network, process, TARGETS[target]()).loss(x, t)
    loss.sum().backward()  # type: ignore[no-untyped-call]
    gradients = [parameter.grad for parameter in network.parameters()]
    assert torch.isfinite(loss).all() and all(g is not None and torch.isfinite(g).all() for g in gradients)


def test_likelihoods_refuse_clocks_and_take_one_of_no_spread() -> None:
    x = images(2, 1, *SIZE)

    def terms(clock: Clock | None) -> list[Tensor]:
        denoiser, prior = Denoiser(TinyNetwork().double(), VP(K, clock=clock), Clean()), GaussianPrior()
        return [
            make(denoiser, prior)(x, CounterRNG(0, 2)).total
            for make in (lambda d, p: VariationalBound(d, p), lambda d, p: FlowLikelihood(d, p, 3))  # type: ignore[no-any-return]
        ]

    for found, expected in zip(terms(SpectralClock(0.0)), terms(None), strict=True):
        close(found, expected, 1e-10, 1e-12)
    for make in (VariationalBound, FlowLikelihood):
        for spread in SPREADS[1:]:
            with refused("VP has no noise at scale", "no density"):
                make(Denoiser(TinyNetwork(), VP(K, clock=SpectralClock(spread)), Clean()), GaussianPrior())


def test_a_start_from_blurred_images_refuses_clocks() -> None:
    with refused("DataPrior", "InverseHeat has a clock", "leave process/clock out"):
        DataPrior().check(clocked("heat", 1.0))


def test_edits_without_noise_agree_with_the_given_image_under_a_clock() -> None:
    """Frequencies that are the image already miss what the last steps change at others."""
    denoiser = Denoiser(TinyNetwork().double(), Spectral(20, CosineLogSNR(), clock=SpectralClock(1.0)), Clean())
    denoiser.process.bind_size((6, 10))
    given = images(2, 1, 6, 10)
    for degradation in (Mask(torch.arange(60).reshape(6, 10) % 3 > 0), Average(2)):
        y = degradation.forward(given)
        consistent, scales = Consistent(denoiser, degradation, y), torch.linspace(1, 0, 5, dtype=torch.float64)
        x = restore(consistent, DDIM(0.5), scales, CounterRNG(0, 2), (1, 6, 10), dtype=torch.float64)
        close(degradation.forward(x), y, 1e-11, 0)
        assert float((x - given).abs().mean()) > 0.05


def test_weights_that_a_clock_makes_infinite_name_it() -> None:
    clocked = VP(20, clock=SpectralClock(1.0))
    with refused("MinSNR", "up to inf under the clock of VP; use weight=target"):
        MinSNR().check(clocked, Clean())
    with refused("under the noise levels of Spectral; use target=clean or weight=target"):
        EDM().check(Spectral(1000, Rectified()), Noise())
