"""Samplers on Gaussian data: every step against plain formulas, exact laws, and the order of convergence.

For data with independent Gaussian DCT coefficients the optimal denoiser is linear, so a sampler maps a Gaussian to a
Gaussian, coefficient by coefficient. The formulas below are written from the papers, in numpy, from the curves of the
slow twins.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from dpm_scales.samplers import DDIM, Ancestral, Cold, Dissipation, DPMSolver, Heun, Sampler, uniform_grid
from support.flows import SMOOTH, flow, run
from support.oracles import (
    NOISY,
    NOISY_MEMBERS,
    Data,
    GaussianData,
    H,
    PointData,
    W,
    close,
    coefficients,
    curves,
    gaussian_data,
    images,
    named,
    over,
    pixels,
)
from support.reference import (
    TWINS,
    Array,
    Twin,
)

# --- the samplers, once more ------------------------------------------------------------------------------------------

# a step: (u_t, the data, (lambda_t, gamma_t), (lambda_s, gamma_s), white noise or None) -> u_s
PlainStep = Callable[[Array, Data, tuple[Array, Array], tuple[Array, Array], Array], Array]


def plain_ancestral(u: Array, data: Data, t: tuple[Array, Array], s: tuple[Array, Array], white: Array) -> Array:
    """A draw from q(u_s | u_t, u_0), by conditioning the Gaussian (u_s, u_t) given u_0 (Ho et al. 2020, Eq. (6))."""
    rho = np.exp(np.log(t[0]) - np.log(s[0]))
    estimate = data.estimate(u, *t)
    gain = rho * s[1] ** 2 / t[1] ** 2  # Cov(u_s, u_t) / Var(u_t)
    variance = s[1] ** 2 - gain * rho * s[1] ** 2
    return np.asarray(s[0] * estimate + gain * (u - t[0] * estimate) + np.sqrt(variance.clip(0)) * white)


def plain_ddim(eta: float) -> PlainStep:
    """Song et al. 2021, Eq. (12) and (16): predicted image, direction to u_t, noise."""

    def step(u: Array, data: Data, t: tuple[Array, Array], s: tuple[Array, Array], white: Array) -> Array:
        rho = np.exp(np.log(t[0]) - np.log(s[0]))
        estimate = data.estimate(u, *t)
        noise = (u - t[0] * estimate) / t[1]
        sigma = eta * s[1] / t[1] * np.sqrt((t[1] ** 2 - rho**2 * s[1] ** 2).clip(0))
        # sqrt(gamma_s^2 - sigma^2), multiplied out since the two may agree in all digits
        direction = s[1] * np.sqrt(1 - eta**2 + eta**2 * (rho * s[1] / t[1]) ** 2)
        return np.asarray(s[0] * estimate + direction * noise + sigma * white)

    return step


def plain_heun(u: Array, data: Data, t: tuple[Array, Array], s: tuple[Array, Array], white: Array) -> Array:
    """Karras et al. 2022, Algorithm 1, for z = u / lambda and the noise level sigma = gamma / lambda."""
    z, high, low = u / t[0], t[1] / t[0], s[1] / s[0]
    first = (z - data.estimate(u, *t)) / high
    euler = z + (low - high) * first
    second = (euler - data.estimate(s[0] * euler, *s)) / low
    return np.asarray(s[0] * (z + (low - high) * (first + second) / 2))


def plain_exponential(u: Array, data: Data, t: tuple[Array, Array], s: tuple[Array, Array], white: Array) -> Array:
    """u_s = gamma_s / gamma_t u_t + gamma_s int exp(l) x(l) dl over l = log(lambda / gamma) (Lu et al. 2022, Eq. (9)),
    x the line through the estimates at both ends, the integral by Gauss-Legendre quadrature."""
    start, length = np.log(t[0] / t[1]), np.log(s[0] / s[1]) - np.log(t[0] / t[1])
    nodes, weights = np.polynomial.legendre.leggauss(40)
    positions = (nodes + 1) / 2

    def integral(line: Callable[[float], Array]) -> Array:
        values = [w / 2 * np.exp(start + x * length) * line(x) for x, w in zip(positions, weights, strict=True)]
        return np.asarray(s[1] / t[1] * u + s[1] * length * sum(values))

    early = data.estimate(u, *t)
    late = data.estimate(integral(lambda x: early), *s)
    return integral(lambda x: early + x * (late - early))


def plain_dissipation(ratio: float) -> PlainStep:
    """Rissanen et al. 2023, Algorithm 2: the blurred estimate and fresh noise."""
    return lambda u, data, t, s, white: np.asarray(s[0] * data.estimate(u, *t) + ratio * s[1] * white)


def plain_cold(u: Array, data: Data, t: tuple[Array, Array], s: tuple[Array, Array], white: Array) -> Array:
    """Bansal et al. 2022, Algorithm 2: take the degradation of the estimate away, and put that of scale s on."""
    estimate = data.estimate(u, *t)
    return np.asarray(u - t[0] * estimate + s[0] * estimate)


@dataclass(frozen=True)
class Case:
    name: str
    sampler: Callable[[], Sampler]
    step: PlainStep
    draws: bool
    max_log_blur: float = math.inf  # of one step; beyond it the plain formula loses its digits


CASES = [
    Case("ancestral", Ancestral, plain_ancestral, True),
    Case("ddim-0", lambda: DDIM(0.0, None), plain_ddim(0.0), False),
    Case("ddim-0.4", lambda: DDIM(0.4, None), plain_ddim(0.4), True),
    Case("ddim-1", lambda: DDIM(1.0, None), plain_ddim(1.0), True),
    Case("heun-noise", lambda: Heun(None, "uniform", variable="noise"), plain_heun, False, 6.0),
    Case("heun-logsnr", lambda: Heun(None, "uniform", variable="logsnr"), plain_exponential, False, 20.0),
    Case("dissipation", lambda: Dissipation(1.25), plain_dissipation(1.25), True),
    Case("dissipation-0", lambda: Dissipation(0.0), plain_dissipation(0.0), True),
    Case("cold", Cold, plain_cold, False),
]


def walk(
    case: Case, twin: Twin, data: Data, scales: Sequence[float], start: Array, whites: Sequence[Array]
) -> list[Array]:
    """The coefficients after each step, by the plain formulas; the last step returns E[y_0 | y_t]."""
    path, u = [], start
    for i, (t, s) in enumerate(zip(scales[:-1], scales[1:], strict=True)):
        at_t, at_s = curves(twin, t), curves(twin, s)
        last = i == len(scales) - 2
        u = data.estimate(u, *at_t) if last else case.step(u, data, at_t, at_s, whites[i])
        path.append(u)
    return path


def steepest(twin: Twin, scales: Sequence[float]) -> float:
    """log of the largest lambda_s / lambda_t of a step."""
    return max(
        float((np.log(curves(twin, s)[0]) - np.log(curves(twin, t)[0])).max())
        for t, s in zip(scales[:-1], scales[1:], strict=True)
    )


def grid(twin: Twin) -> list[float]:
    return [k / twin.num_scales for k in range(twin.num_scales, -1, -1)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@over(named(*NOISY_MEMBERS, "vp-listed", "blurring-no-floor", "chain-listed"))
def test_every_step_is_the_plain_formula_for_each_frequency(twin: Twin, case: Case) -> None:
    """All scales of the chain, 3 x 5 pixels and 2 channels, from a random start, with a random but common noise."""
    scales, data = grid(twin), gaussian_data()
    if steepest(twin, scales[:-1]) > case.max_log_blur:
        scales = [*np.linspace(1.0, 0.875, 101).tolist(), 0.0]  # a part of the way, in short steps
    assert steepest(twin, scales[:-1]) <= case.max_log_blur
    start = images(3, 2, H, W) * 2 * (1 + float(curves(twin, 1.0)[1].max()))
    whites = [images(3, 2, H, W, seed=10 + i) * 1.7 for i in range(len(scales) - 2)]
    expected = walk(case, twin, data, scales, coefficients(start.numpy()), [coefficients(w.numpy()) for w in whites])
    actual = run(case.sampler(), twin, data, scales, start, whites if case.draws else [])
    for u, v in zip(actual, expected, strict=True):
        close(u, v, 1e-9 * (1 + np.abs(v).max()), 0)


# --- exact laws -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Law:
    """A Gaussian on the coefficients: mean ``(H, W)`` and covariance ``(H * W, H * W)``."""

    mean: Array
    covariance: Array


def push(
    sampler: Sampler, twin: Twin, data: Data, scales: Sequence[float], mean: Array, variance: Array, draws: bool
) -> list[Law]:
    """The law after each step of a sampler that is affine in its start and in each of its draws: one image without
    noise, and one more for each entry of the start and of each draw."""
    size, steps = H * W, len(scales) - 2
    unit = pixels(np.eye(size).reshape(size, 1, H, W))
    start = np.broadcast_to(pixels(mean), (1 + size * (1 + steps * draws), 1, H, W)).copy()
    start[1 : 1 + size] += unit
    whites = [np.zeros_like(start) for _ in range(steps * draws)]
    for i, white in enumerate(whites):
        white[1 + size * (1 + i) : 1 + size * (2 + i)] = unit
    path = run(sampler, twin, data, scales, torch.from_numpy(start), [torch.from_numpy(w) for w in whites])
    laws = []
    for u in path:
        rows = (u[1:, 0] - u[0, 0]).reshape(-1, size)
        by_start, by_noise = rows[:size], rows[size:]
        laws.append(Law(u[0, 0], by_start.T @ (variance.ravel()[:, None] * by_start) + by_noise.T @ by_noise))
    return laws


def check_law(law: Law, mean: Array, variance: Array, tolerance: float = 1e-9) -> None:
    scale = 1 + np.abs(variance).max()
    close(law.mean, mean, tolerance * math.sqrt(scale), tolerance)
    close(law.covariance, np.diag(variance.ravel()), tolerance * scale, tolerance)


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@over(NOISY)
def test_chain_given_the_image_has_the_marginals_of_the_process(twin: Twin, eta: float) -> None:
    """With y_0 known, y_s ~ N(lambda_s y_0, gamma_s^2) at every scale and for every eta (Song et al. 2021, Lemma 1)."""
    y_0 = coefficients(images(1, 1, H, W, seed=5).numpy())[0, 0]
    data, scales = PointData(y_0[None], np.ones(1)), grid(twin)
    signal, noise = curves(twin, 1.0)
    sampler = Ancestral() if eta == 1.0 else DDIM(eta, None)
    laws = push(sampler, twin, data, scales, signal * y_0, noise**2, eta > 0)
    for s, law in zip(scales[1:-1], laws[:-1], strict=True):
        signal, noise = curves(twin, s)
        check_law(law, signal * y_0, noise**2)
    check_law(laws[-1], curves(twin, 0.0)[0] * y_0, np.zeros((H, W)))


@pytest.mark.parametrize("sampler", [Cold(), Dissipation(0.0), DDIM(0.0, None)])
@over(TWINS)
def test_samplers_without_noise_lead_a_blurred_image_back_along_its_own_scale_space(
    twin: Twin, sampler: Sampler
) -> None:
    """With y_0 known and y_1 = lambda_1 y_0: y_s = lambda_s y_0 at every scale."""
    y_0 = coefficients(images(1, 1, H, W, seed=5).numpy())
    data, scales = PointData(y_0[0], np.ones(1)), grid(twin)
    start = torch.from_numpy(pixels(curves(twin, 1.0)[0] * y_0))
    whites = [torch.ones_like(start)] * (len(scales) - 2)  # drawn by one of them, and multiplied by 0
    path = run(sampler, twin, data, scales, start, whites)
    for s, u in zip(scales[1:], path, strict=True):
        close(u, curves(twin, s)[0] * y_0, 1e-12)


@dataclass(frozen=True)
class Line:
    """u_s = slope u_t + offset + noise, of given variance, for each coefficient."""

    slope: Array
    offset: Array
    variance: Array


def gaussian_line(eta: float, ratio: float, data: GaussianData, twin: Twin, t: float, s: float, last: bool) -> Line:
    """One step of DDIM(eta), or of Dissipation(ratio) if eta is negative, in closed form."""
    (signal_t, noise_t), (signal_s, noise_s) = curves(twin, t), curves(twin, s)
    gain = data.variance * signal_t / (signal_t**2 * data.variance + noise_t**2)
    rest = data.mean * (1 - gain * signal_t)  # the estimate is gain u_t + rest
    if last:
        return Line(signal_s * gain, signal_s * rest, np.zeros_like(gain))
    if eta < 0:
        return Line(signal_s * gain, signal_s * rest, ratio**2 * noise_s**2)
    rho = np.exp(np.log(signal_t) - np.log(signal_s))
    variance = eta**2 * noise_s**2 * (1 - (rho * noise_s / noise_t) ** 2)
    keep = np.sqrt(noise_s**2 - variance) / noise_t
    return Line(signal_s * gain + keep * (1 - signal_t * gain), (signal_s - keep * signal_t) * rest, variance)


@pytest.mark.parametrize(
    ("sampler", "eta", "ratio"),
    [
        (Ancestral(), 1.0, 0.0),
        (DDIM(0.0, None), 0.0, 0.0),
        (DDIM(0.4, None), 0.4, 0.0),
        (Dissipation(1.25), -1.0, 1.25),
        (Dissipation(0.5), -1.0, 0.5),
    ],
    ids=["ancestral", "ddim-0", "ddim-0.4", "dissipation-1.25", "dissipation-0.5"],
)
@over(NOISY)
def test_mean_and_variance_of_gaussian_data_are_propagated_in_closed_form(
    twin: Twin, sampler: Sampler, eta: float, ratio: float
) -> None:
    """mean' = slope mean + offset, variance' = slope^2 variance + noise, per eigenvalue, from the marginal at t = 1."""
    data, scales = gaussian_data(), grid(twin)
    signal, noise = curves(twin, 1.0)
    mean, variance = signal * data.mean, signal**2 * data.variance + noise**2
    laws = push(sampler, twin, data, scales, mean, variance, eta != 0)
    for i, law in enumerate(laws):
        line = gaussian_line(eta, ratio, data, twin, scales[i], scales[i + 1], i == len(laws) - 1)
        mean, variance = line.slope * mean + line.offset, line.slope**2 * variance + line.variance
        check_law(law, mean, variance)


@over(named("vp-constant", "vp-cosine", "blurring", "inverse-heat-0.1", "chain"))
def test_ancestral_steps_lose_some_of_the_datas_variance_and_less_with_more_steps(twin: Twin) -> None:
    """Their noise is the posterior's given y_0, to which the data's own uncertainty would have to be added."""
    data, s = gaussian_data(), 0.25
    signal, noise = curves(twin, 1.0)
    mean, variance = signal * data.mean, signal**2 * data.variance + noise**2
    exact = curves(twin, s)[0] ** 2 * data.variance + curves(twin, s)[1] ** 2
    lost = []
    for steps in (4, 8):
        scales = uniform_grid(twin.build(), steps).tolist()
        law = push(Ancestral(), twin, data, scales, mean, variance, True)[scales.index(s) - 1]
        lost.append(exact - np.diag(law.covariance).reshape(H, W))
        close(law.covariance, np.diag(np.diag(law.covariance)), 1e-9)
    # at mu = 0 a process of constant noise has nothing to lose
    assert (lost[1] > -1e-12).all() and (lost[1] < lost[0] + 1e-12).all() and lost[1].sum() < 0.9 * lost[0].sum()


# --- the probability-flow ODE -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sampler", "order"),
    [
        (DDIM(0.0, None), 1),
        (Heun(None, "uniform", variable="noise"), 2),
        (Heun(None, "uniform", variable="logsnr"), 2),
        (DPMSolver(0.0, None, "uniform"), 2),
    ],
    ids=["ddim", "heun-noise", "heun-logsnr", "dpm-solver"],
)
@pytest.mark.parametrize("twin", SMOOTH, ids=lambda twin: twin.name)
def test_deterministic_samplers_converge_to_the_probability_flow(twin: Twin, sampler: Sampler, order: int) -> None:
    """The slope of log(error) over log(steps), for 40 and 80 steps from t = 0.95 to t = 0.25, within 0.15."""
    data, start = gaussian_data(), images(4, 1, H, W)
    exact = flow(twin, data, coefficients(start.numpy()), 0.95, 0.25)
    errors = []
    for count in (40, 80):
        scales = [*np.linspace(0.95, 0.25, count + 1).tolist(), 0.0]
        errors.append(np.abs(run(sampler, twin, data, scales, start, [])[-2] - exact).max())
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.15), errors
    assert errors[1] < (4e-2 if order == 1 else 3e-3)


def test_heuns_variables_are_two_methods() -> None:
    twin, start = SMOOTH[0], images(4, 1, H, W)
    ends = [
        run(Heun(None, "uniform", variable=v), twin, gaussian_data(), [1.0, 0.5, 0.25, 0.0], start, [])[-1]
        for v in ("noise", "logsnr")
    ]
    assert np.abs(ends[0] - ends[1]).max() > 1e-3
