"""Colours that change with t: the law and every sampler step by frequency, energy, and chains that can't exist."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from dpm_scales.errors import UserError
from dpm_scales.operators import HeatOperator, PixelOperator
from dpm_scales.processes import VE, VP, Blurring, InverseHeat, InverseOsmosis, Process, Spectral
from dpm_scales.schedules import (
    Color,
    ConstantNoise,
    CosineLogSNR,
    EDMNoise,
    LinearTimeBlur,
    LowPass,
    NoiseSchedule,
    Rectified,
)
from support.frequencies import SAMPLERS, at_scales, path, visited
from support.oracles import close, coefficients, float64, generator, images, pixels
from support.reference import Array, cosine_log_snr, edm_knot, eigenvalues

SIZE, K, TIME = (2, 3), 12, 0.12
MU = eigenvalues(*SIZE)
T, S = float64([0.25, 0.6, 1.0]), float64([0.1, 0.5, 0.75])


def low_pass(t: float, mu: Array, energy: str, spectrum: Array = MU, time: float = TIME) -> Array:
    """Return w_t(mu) = exp(-mu time (1 - t)), with unit energy over its root mean square over the spectrum."""
    mean_square = np.exp(-2 * spectrum * time * (1 - t)).mean()
    return np.asarray(np.exp(-mu * time * (1 - t)) / (math.sqrt(mean_square) if energy == "unit" else 1.0))


def cosine(t: float) -> tuple[float, float]:
    ratio = math.exp(-cosine_log_snr(t)) * min(t * K, 1)
    return 1 / math.sqrt(1 + ratio), math.sqrt(ratio / (1 + ratio))


def edm(t: float) -> float:
    return edm_knot(max(t * K, 1), K, 0.05, 5.0) * math.sqrt(min(t * K, 1))


@dataclass(frozen=True)
class Law:
    """A process under the low pass, and (a_t, gamma_t) and T(t) of the same without a colour, in closed form."""

    build: Callable[[Color], Process]
    noise: Callable[[float], tuple[float, float]]
    blur: Callable[[float], float] = lambda t: 0.0

    def curves(self, t: float, energy: str) -> tuple[Array, Array]:
        signal, noise = self.noise(t)
        return signal * np.exp(-MU * self.blur(t)), noise * low_pass(t, MU, energy)


LAWS = {
    "rectified": Law(lambda color: Spectral(K, Rectified(), color=color), lambda t: (1 - (1 - 1e-12) * t, t)),
    "vp": Law(lambda color: VP(K, color=color), cosine),
    "ve": Law(lambda color: VE(K, EDMNoise(0.05, 5.0), color=color), lambda t: (1.0, edm(t))),
    "blurring": Law(
        lambda color: Blurring(K, blur=LinearTimeBlur(0.7), min_decay=0.0, color=color), cosine, lambda t: 0.7 * t
    ),
}
#: noise of unit energy would fall at low frequencies where that of the schedule hardly grows
over = pytest.mark.parametrize(
    ("law", "energy"), [*((law, "published") for law in LAWS), ("rectified", "unit"), ("ve", "unit")]
)


def bound(law: str, energy: str) -> Process:
    process = LAWS[law].build(LowPass(TIME, energy))
    process.bind_size(SIZE)
    return process


def per_sample(x: Tensor, f: Callable[[float, float], Array]) -> Array:
    """Multiply each sample's coefficients by f(s, t) at its own scales."""
    factors = np.stack([f(s, t) for s, t in zip(S.tolist(), T.tolist(), strict=True)])
    return pixels(factors[:, None] * coefficients(x.numpy()))


@over
def test_the_law_in_closed_form(law: str, energy: str) -> None:
    """Marginal, transition and posterior, with scales of its own for each sample: mean, and std times an image."""
    process, curves = bound(law, energy), LAWS[law].curves
    x, x_t, noise = (images(3, 2, *SIZE, seed=k) for k in range(3))

    def at(s: float, t: float) -> tuple[Array, Array, Array, Array]:
        return *curves(s, energy), *curves(t, energy)

    def beta(s: float, t: float) -> Array:
        signal_s, noise_s, signal_t, noise_t = at(s, t)
        return np.sqrt(noise_t**2 - (signal_t / signal_s * noise_s) ** 2)

    def gain(s: float, t: float) -> Array:
        signal_s, noise_s, signal_t, noise_t = at(s, t)
        return signal_t / signal_s * noise_s**2 / noise_t**2

    def pull(s: float, t: float) -> Array:
        signal_s, _, signal_t, _ = at(s, t)
        return signal_s - gain(s, t) * signal_t

    def spread(s: float, t: float) -> Array:
        _, noise_s, _, noise_t = at(s, t)
        return noise_s * beta(s, t) / noise_t

    marginal, transition = process.marginal(x, T), process.transition(x, S, T)
    posterior = process.posterior(x_t, x, S, T)
    close(marginal.mean, per_sample(x, lambda s, t: at(s, t)[2]), 1e-10, 0)
    close(transition.mean, per_sample(x, lambda s, t: at(s, t)[2] / at(s, t)[0]), 1e-10, 0)
    close(posterior.mean, per_sample(x, pull) + per_sample(x_t, gain), 1e-10, 0)
    for found, std in ((marginal, lambda s, t: at(s, t)[3]), (transition, beta), (posterior, spread)):
        close(HeatOperator().apply(found.std, noise), per_sample(noise, std), 1e-10, 0)
    entropy = [0.5 * np.log(2 * np.pi * np.e * curves(t, energy)[1] ** 2).sum() for t in T.tolist()]
    close(process.conditional_entropy(T, SIZE), entropy, 1e-10, 0)


@pytest.mark.parametrize("energy", ["published", "unit"])
@pytest.mark.parametrize("t", [0.2, 0.5, 0.9])
def test_a_pixel_s_energy_at_every_scale(t: float, energy: str) -> None:
    """The mean square of 4000 images of noise, by Monte Carlo, within 5 standard errors; and the formula."""
    process, number = bound("rectified", energy), 4000
    expected = t**2 * (low_pass(t, MU, energy) ** 2).mean()
    close((process.noise_scale(t, torch.from_numpy(MU)) ** 2).mean(), expected, 1e-12, 0)
    assert (expected == pytest.approx(t**2, abs=1e-12)) == (energy == "unit")
    white = torch.randn(number, 1, *SIZE, generator=generator(), dtype=torch.float64)
    drawn = process.noise_at(t, white, process.operator()).square().mean((-3, -2, -1))
    assert abs(float(drawn.mean()) - expected) < 5 * float(drawn.std()) / math.sqrt(number)


# --- samplers: each frequency is a scalar process of its own ----------------------------------------------------------


class Alone(NoiseSchedule):
    """The curves of one frequency mu, as those of a process without a spectrum."""

    def __init__(self, noise: NoiseSchedule, mu: float, energy: str) -> None:
        super().__init__()
        self.noise, self.mu, self.energy = noise, mu, energy

    def bind(self, num_scales: int) -> None:
        super().bind(num_scales)
        self.noise.bind(num_scales)

    def forward(self, t: Tensor) -> tuple[Tensor, Tensor]:
        signal, noise = self.noise(t)
        weights = [math.log(low_pass(float(at), np.array(self.mu), self.energy)) for at in t.reshape(-1)]
        return signal, noise + float64(weights).reshape(t.shape)


@pytest.mark.parametrize(("law", "energy"), [("vp", "published"), ("rectified", "unit")])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_each_step_treats_a_frequency_like_a_scalar_process(law: str, sampler: str, energy: str) -> None:
    process, white = bound(law, energy), {"rectified": Rectified, "vp": CosineLogSNR}[law]
    start, *whites = (coefficients(images(2, 1, *SIZE, seed=k).numpy()) for k in range(6))
    found = path(SAMPLERS[sampler](), process, start, whites)
    scales = visited(SAMPLERS[sampler](), process)  # t_hat of churn follows the schedule, not the colour
    for row, column in np.ndindex(SIZE):
        place = (..., slice(row, row + 1), slice(column, column + 1))
        alone = Process(PixelOperator(), K, Alone(white(), float(MU[row, column]), energy))
        one = path(at_scales(SAMPLERS[sampler](), scales), alone, start[place], [w[place] for w in whites])
        close(found[place], one, 1e-10, 0)


# --- chains that can't exist ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fault:
    """The first step and eigenvalue at which a chain can't exist, and why."""

    step: int
    mu: float
    words: str


#: checked one after the other, each for all steps
NEGATIVE, FALLING = "the transition would need the variance -", "the noise falls from"
STEPS = 40


def first_fault(curves: Callable[[float, Array], tuple[Array, Array]], spectrum: str) -> Fault | None:
    """Return the first fault of lambda_t(mu) and gamma_t(mu), at the eigenvalues that a process probes.

    These are 24, denser near 0, up to the largest of 64 x 64 pixels.
    """
    probes = np.linspace(0, 1, 24) ** 3 * eigenvalues(64, 64, spectrum).max()
    signals, noises = (
        np.stack(rows) for rows in zip(*(curves(k / STEPS, probes) for k in range(STEPS + 1)), strict=True)
    )
    for words, kept in ((NEGATIVE, signals[1:] / signals[:-1]), (FALLING, np.ones_like(signals[1:]))):
        for k in range(1, STEPS + 1):
            grown = noises[k] ** 2 - (kept[k - 1] * noises[k - 1]) ** 2
            bad = probes[grown < -1e-9 * noises[k] ** 2]
            if len(bad):
                return Fault(k, float(bad[0]), words)
    return None


def refusal(make: Callable[[], object]) -> Fault | None:
    """Return what the error says; None if the process exists."""
    try:
        make()
    except UserError as error:
        pattern = rf"\w+: at scale k=(\d+) of {STEPS}, eigenvalue mu=(\S+): ({NEGATIVE}|{FALLING}).*"
        found = re.fullmatch(pattern, str(error))
        assert found is not None, error
        return Fault(int(found[1]), float(found[2]), found[3])
    return None


class Whistle(Color):
    """Noise that falls towards t = 1 at high frequencies."""

    is_fixed = False

    def log_shape(self, t: Tensor, mu: Tensor) -> Tensor:
        return mu * (1 - t) * 0.5


def whistle(t: float, mu: Array) -> Array:
    return np.asarray(np.exp(0.5 * mu * (1 - t)))


def white(kind: str, t: float, mu: Array) -> tuple[Array, Array]:
    """Return lambda_t and gamma_t of the process without a colour."""
    if kind == "vp":
        ratio = math.exp(-cosine_log_snr(t)) * min(t * STEPS, 1)
        return np.full_like(mu, 1 / math.sqrt(1 + ratio)), np.full_like(mu, math.sqrt(ratio / (1 + ratio)))
    if kind == "rectified":
        return np.full_like(mu, 1 - (1 - 1e-12) * t), np.full_like(mu, t)
    return np.exp(-mu * BLUR * t), np.full_like(mu, 0.1 if t > 0 else 0.0)


BLUR = 0.5
CHAINS: dict[str, Callable[[Color], object]] = {
    "heat": lambda color: InverseHeat(STEPS, ConstantNoise(0.1), LinearTimeBlur(BLUR), color=color),
    "osmosis": lambda color: InverseOsmosis(STEPS, ConstantNoise(0.1), LinearTimeBlur(BLUR), color=color),
    "vp": lambda color: VP(STEPS, color=color),
    "rectified": lambda color: Spectral(STEPS, color=color),
}


#: of the low passes of unit energy
POSSIBLE = [("vp", 0.002), ("rectified", 0.002), ("rectified", 0.05), ("rectified", 0.12)]


@pytest.mark.parametrize("color", ["whistle", "published", 0.002, 0.05, 0.12, 0.4])
@pytest.mark.parametrize("kind", CHAINS)
def test_a_chain_is_refused_at_the_scale_and_eigenvalue_where_it_fails(kind: str, color: str | float) -> None:
    """Computed from the closed forms; also which chains exist.

    A low pass gains high frequencies as t grows. With unit energy (its time is given) low ones lose as much, which is
    too much where the noise of the schedule hardly grows.
    """
    spectrum = "discrete" if kind == "osmosis" else "continuous"
    weight: Callable[[float, Array], Array]
    made: Color
    if color == "whistle":
        made, weight = Whistle("published"), whistle
    elif isinstance(color, float):
        made, mu = LowPass(color, "unit"), eigenvalues(64, 64, spectrum)
        weight = lambda t, at: low_pass(t, at, "unit", mu, color)  # noqa: E731
    else:
        made, weight = LowPass(0.5), lambda t, at: low_pass(t, at, "published", at, 0.5)

    def curves(t: float, mu: Array) -> tuple[Array, Array]:
        signal, noise = white(kind, t, mu)
        return signal, noise * weight(t, mu)

    expected, found = first_fault(curves, spectrum), refusal(lambda: CHAINS[kind](made))
    assert (expected is None) == (color == "published" or (kind, color) in POSSIBLE)
    if expected is None or found is None:
        assert expected is found is None, (expected, found)
    else:
        assert (found.step, found.words) == (expected.step, expected.words), (expected, found)
        assert found.mu == pytest.approx(expected.mu, rel=1e-3)
