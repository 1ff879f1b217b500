"""Coloured noise on the osmosis operator, by the eigenvectors of the dense matrices of random guidance images.

Curves and colours are closed forms in numpy. Here the package expands functions of L to 1e-12 of their largest value,
so means, and standard deviations that are smooth at mu = 0, agree to 1e-10. Roots at mu = 0 (a power law, the posterior
under constant noise) are expanded to 1e-2.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import scipy.special
import torch
from torch import Tensor

from dpm_scales.denoisers import BaseDenoiser
from dpm_scales.likelihood import VariationalBound, follow_flow, start_law
from dpm_scales.priors import OsmosisPrior
from dpm_scales.processes import OsmosisDiffusion, Process
from dpm_scales.rng import CounterRNG
from dpm_scales.samplers import Ancestral, DPMSolver, Sampler
from dpm_scales.schedules import PowerLaw
from support.oracles import Estimating, Hadamard, ScriptedNoise, close, float64
from support.osmosis_colors import BATCH, CHANNELS, KINDS, SIZE, TONES, K, S, T, at_zero, case
from support.osmosis_twins import guidance_images, images, means, white_function, white_matrix
from support.reference import (
    Array,
)

EXACT, ROUGH = 1e-10, 1e-2


def over(test: Callable[..., None]) -> Callable[..., None]:
    return pytest.mark.parametrize("tone", TONES)(pytest.mark.parametrize("kind", KINDS)(test))


def near(actual: Tensor, expected: Tensor, exact: bool = True) -> None:
    """Compare to 1e-10, or to 1e-2 of the largest value where a function has a root at mu = 0."""
    close(actual, expected, EXACT if exact else ROUGH * float(expected.abs().max()), 0)


def drawn(seed: int) -> Tensor:
    return 2 * images(BATCH, CHANNELS, *SIZE, seed=seed) - 1


# --- the law ----------------------------------------------------------------------------------------------------------


@over
def test_the_law_is_that_of_the_dense_matrix(kind: str, tone: str) -> None:
    """Marginal, transition, posterior, each at scales of its own for every sample, and a draw from the marginal."""
    c = case(kind, tone)
    x, x_t, noise = drawn(0), drawn(1), drawn(2)
    y, y_t = x / c.root, x_t / c.root
    law = c.process.marginal(x, T, c.v)
    close(law.mean, c.root * c.each(lambda s, t, mu: c.signal(t, mu), y), EXACT, 0)
    spread = c.each(lambda s, t, mu: c.noise(t, mu), noise)
    near(law.operator.apply(law.std, noise), spread, c.tone.smooth)
    near(c.process.perturb(y, T, noise, law.operator), law.mean / c.root + spread, c.tone.smooth)
    law = c.process.transition(x, S, T, c.v)
    close(law.mean, c.root * c.each(c.rho, y), EXACT, 0)
    near(law.operator.apply(law.std, noise), c.each(c.beta, noise), c.smooth_steps)
    law = c.process.posterior(x_t, x, S, T, c.v)
    close(law.mean, c.root * (c.each(c.pull, y) + c.each(c.gain, y_t)), EXACT, 0)
    near(law.operator.apply(law.std, noise), c.each(c.spread, noise), c.smooth_steps)


@over
def test_the_entropy_is_the_determinant_of_the_dense_matrix(kind: str, tone: str) -> None:
    """Per image and channel, with one scale for all and one for each; without a context, of the heat operator."""
    c = case(kind, tone)

    def entropy(t: float, v: Array) -> float:
        mu = at_zero(np.linalg.eigvalsh(white_matrix(v)))
        covariance = 2 * np.pi * np.e * c.noise(t, mu) ** 2
        return float(0.5 * np.log(covariance).sum() + 0.5 * np.log(v / v.mean()).sum())

    together, apart = (c.process.conditional_entropy(t, SIZE, c.v) for t in (0.4, T))
    shared = c.process.conditional_entropy(T, SIZE, c.v[:1])
    for b, t in enumerate(T.tolist()):
        rows = [[entropy(t, v.numpy()) for v in c.v[k]] for k in (b, 0)]
        close(apart[b], rows[0], EXACT, 0)
        close(shared[b], rows[1], EXACT, 0)
        close(together[b], [entropy(0.4, v.numpy()) for v in c.v[b]], EXACT, 0)
    flat = np.full(SIZE, 0.3)
    close(c.process.conditional_entropy(0.4, SIZE), entropy(0.4, flat), EXACT, 0)
    # the spectrum of a constant guidance image would be wrong by far more, unless its trace is all that counts
    lost = (together - entropy(0.4, flat) - 0.5 * (c.v / means(c.v)).log().sum((-2, -1))).abs().max()
    assert float(lost) < EXACT if tone == "low-pass" else float(lost) > 1e-3


def test_large_images_have_nearly_the_entropy_of_their_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    process = OsmosisDiffusion(K, color=PowerLaw(0.5))
    process.bind_size((9, 7))
    v = guidance_images(1, 1, 9, 7, dark=0.0)
    exact = process.conditional_entropy(0.4, (9, 7), v)
    monkeypatch.setattr("dpm_scales.processes.expanded.DENSE_PIXELS", 62)
    difference = (process.conditional_entropy(0.4, (9, 7), v) - exact).abs() / 63
    assert difference.shape == (1, 1) and 1e-8 < float(difference) < 0.01


# --- a step of the samplers -------------------------------------------------------------------------------------------


class Estimate(Estimating):
    """m_s of an estimate that is neither linear nor symmetric, by `apply`, which multiplies by lambda_s(L)."""

    def __init__(self, process: Process, apply: Callable[[float, Tensor], Tensor]) -> None:
        super().__init__(process)
        self.apply_signal = apply

    @staticmethod
    def image(y: Tensor, t: float) -> Tensor:
        return torch.tanh(0.5 * y + 0.3 * y.roll(1, -1) - 0.2 * y.roll(1, -2)) * math.cos(t)

    def predict_mean(
        self, y_t: Tensor, t: Tensor, s: Tensor, context: Tensor | None = None, labels: Tensor | None = None
    ) -> Tensor:
        return self.apply_signal(float(s), self.image(y_t, float(t)))


SAMPLERS: dict[str, tuple[Callable[[], Sampler], float, int]] = {
    "ancestral": (Ancestral, 1.0, 1),
    "dpmpp": (lambda: DPMSolver(0.0, None, "uniform"), 0.0, 2),
    "sde-dpmpp": (lambda: DPMSolver(1.0, None, "uniform"), 1.0, 2),
    "dpmpp-1": (lambda: DPMSolver(0.0, None, "uniform", order=1), 0.0, 1),
}
LADDER = [0.9, 0.6, 0.35, 0.0]


def steps_of(sampler: Sampler, denoiser: BaseDenoiser, y: Tensor, whites: list[Tensor], v: Tensor | None) -> Tensor:
    """Return the whitened images after the first two steps, ``(2, B, C, H, W)``."""
    path: list[Tensor] = []
    white = denoiser.process.operator(v).to_white
    scales = float64(LADDER)
    sampler.reverse(denoiser, y, ScriptedNoise(whites), v, scales=scales, on_step=lambda i, x: path.append(white(x)))
    return torch.stack(path[:2])


@pytest.mark.parametrize("sampler", SAMPLERS)
@over
def test_a_step_of_a_sampler_is_that_of_the_dense_matrix(kind: str, tone: str, sampler: str) -> None:
    """Two steps: the second order of DPM-Solver++ begins with the second, at each eigenvalue with its own h."""
    c, (make, eta, order) = case(kind, tone), SAMPLERS[sampler]
    whites, y = [drawn(3), drawn(4)], drawn(5)
    denoiser = Estimate(c.process, lambda s, x: c.function(lambda mu: c.signal(s, mu), x))
    path = steps_of(make(), denoiser, y, whites, c.v)

    def h(s: float, t: float, mu: Array) -> Array:
        return np.log(c.signal(s, mu) * c.noise(t, mu) / (c.signal(t, mu) * c.noise(s, mu)))

    previous: Tensor | None = None
    for i, (t, s) in enumerate(((0.9, 0.6), (0.6, 0.35))):
        image = Estimate.image(y, t)

        def keep(mu: Array, s: float = s, t: float = t) -> Array:
            kept = np.exp(-2 * h(s, t, mu))
            return c.noise(s, mu) / c.noise(t, mu) * np.sqrt(1 - eta**2 + eta**2 * kept)

        def draw(mu: Array, s: float = s, t: float = t) -> Array:
            return c.signal(s, mu) - keep(mu, s, t) * c.signal(t, mu)

        def slope(mu: Array, s: float = s, t: float = t) -> Array:
            before = h(0.6, 0.9, mu)
            used = (c.signal(t, mu) / c.signal(s, mu)) ** 2
            trust = used / (used + 1e-6) * (before > 1e-12) * (h(s, t, mu) > 1e-12)
            return trust * h(s, t, mu) / (2 * np.where(before > 1e-12, before, 1.0)) * draw(mu, s, t)

        expected = c.function(keep, y) + c.function(draw, image)
        if eta:
            expected = expected + c.function(lambda mu, s=s, t=t: eta * c.spread(s, t, mu), whites[i])  # type: ignore[misc]
        if order == 2 and previous is not None:
            expected = expected + c.function(slope, image - previous)
        near(path[i], expected, eta == 0 or c.smooth_steps)
        y, previous = path[i], image


@over
def test_constant_guidance_is_the_colored_heat_process(kind: str, tone: str) -> None:
    """The law, the entropy and two steps of each sampler."""
    c = case(kind, tone)
    heat = c.kind.heat(c.tone.build())
    heat.bind_size(SIZE)
    x, x_t, noise = drawn(0), drawn(1), drawn(2)
    v = torch.full_like(x, 0.4)
    for ours, theirs, smooth in (
        (c.process.marginal(x, T, v), heat.marginal(x, T), c.tone.smooth),
        (c.process.transition(x, S, T, v), heat.transition(x, S, T), c.smooth_steps),
        (c.process.posterior(x_t, x, S, T, v), heat.posterior(x_t, x, S, T), c.smooth_steps),
    ):
        close(ours.mean, theirs.mean, EXACT, 0)
        near(ours.operator.apply(ours.std, noise), theirs.operator.apply(theirs.std, noise), smooth)
    entropy = heat.conditional_entropy(T, SIZE)[:, None].expand(BATCH, CHANNELS)
    close(c.process.conditional_entropy(T, SIZE, v), entropy, EXACT, 0)
    apply: Callable[[float, Tensor], Tensor] = lambda s, x: heat.operator().apply(heat.signal(s), x)  # noqa: E731
    for make, eta, _ in SAMPLERS.values():
        found = [
            steps_of(make(), Estimate(process, apply), x, [noise, x_t], context)
            for process, context in ((c.process, v), (heat, None))
        ]
        near(found[0], found[1], eta == 0 or c.smooth_steps)


# --- likelihood -------------------------------------------------------------------------------------------------------


@over
def test_the_start_is_a_mixture_of_the_colored_noise(kind: str, tone: str) -> None:
    """-log p of z = gamma_1^-1(L) y and the bound of the divergence, from the eigenvectors of each matrix."""
    c, ratio, grey = case(kind, tone), 1.25, float64([[0.25, 0.5], [-0.5, 0.125], [0.75, -0.25]])
    prior = OsmosisPrior(ratio)
    prior.fit(grey[..., None, None].expand(3, CHANNELS, *SIZE).float(), c.process)
    start, v = start_law(prior, c.process, drawn(0) / 2, CounterRNG(0, BATCH))
    assert v is not None
    y, number = 2 * drawn(1), CHANNELS * SIZE[0] * SIZE[1]
    squares = torch.zeros(BATCH, 3, dtype=torch.float64)
    for i, mean in enumerate(grey):
        centre = float(c.signal(1.0, np.zeros(1))[0]) * mean[:, None, None] * (v / means(v)).sqrt()
        white = white_function(lambda mu: 1 / c.noise(1.0, at_zero(mu)), v, y - centre)
        squares[:, i] = (white / ratio).square().flatten(1).sum(1)
    log_sum = scipy.special.logsumexp(start.log_weights.numpy() - squares.numpy() / 2, axis=1)
    constant = number * (math.log(ratio) + 0.5 * math.log(2 * math.pi))
    tolerance = (1e-8, 0) if c.tone.smooth else (0, ROUGH)
    close(start.negative_log_density(y), constant - log_sum, *tolerance)
    constant = 0.5 * number * (1 / ratio**2 - 1 + 2 * math.log(ratio))
    close(start.divergence(y), constant - log_sum, *tolerance)


@pytest.mark.parametrize("reverse", ["ancestral", "dissipation"])
@over
def test_the_terms_of_the_bound_are_those_of_the_dense_matrix(kind: str, tone: str, reverse: str) -> None:
    """1/2 <d, f(L) d> at noisy images that are drawn densely too, relative to the term."""
    c, prior, x = case(kind, tone), OsmosisPrior(), drawn(0) / 2
    prior.fit(images(3, CHANNELS, *SIZE, seed=9).float(), c.process)
    whites = [drawn(k) for k in range(3)]
    guidance = torch.randn(x.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    _, v = start_law(prior, c.process, x, ScriptedNoise([guidance]))
    assert v is not None

    def function(f: Callable[[Array], Array], y: Tensor) -> Tensor:
        return white_function(lambda mu: f(at_zero(mu)), v, y)

    denoiser = Estimate(c.process, lambda s, y: function(lambda mu: c.signal(s, mu), y))
    bound = VariationalBound(denoiser, prior, steps=4, reverse=reverse)
    found = bound(x, ScriptedNoise([guidance, *whites, drawn(7)]))
    y_0 = x / (v / means(v)).sqrt()
    for i, (t, s) in enumerate(((1.0, 0.75), (0.75, 0.5), (0.5, 0.25))):
        y_t = c.process.perturb(y_0, t, whites[i], c.process.operator(v))
        d = function(lambda mu, s=s: c.signal(s, mu), y_0 - Estimate.image(y_t, t))  # type: ignore[misc]

        def weight(mu: Array, s: float = s, t: float = t) -> Array:
            if reverse == "dissipation":
                return (1.25 * c.noise(s, mu)) ** -2
            return (c.beta(s, t, mu) / c.noise(t, mu) / c.noise(s, mu)) ** 2

        excess = 0.5 * (1 / 1.25**2 - 1 + 2 * math.log(1.25)) if reverse == "dissipation" else 0.0
        expected = 0.5 * (d * function(weight, d)).flatten(1).sum(1) + x[0].numel() * excess
        close(found.steps[:, i], expected, 0, EXACT if c.tone.smooth else ROUGH)


@over
def test_the_flow_and_its_trace_are_those_of_the_dense_matrix(kind: str, tone: str) -> None:
    """Heun's steps for an estimate g_t(L) y, eigenvalue by eigenvalue in z = y / gamma: density and every trace."""
    c, v, y = case(kind, tone), case(kind, tone).v[:, :1], drawn(1)[:, :1] / 2
    prior = OsmosisPrior()
    prior.fit(torch.zeros(1, 1, *SIZE), c.process)
    start, _ = start_law(prior, c.process, y, CounterRNG(0, BATCH))
    start = type(start)(**{**vars(start), "operator": c.process.operator(v)})  # of these guidance images
    values, vectors = zip(*(np.linalg.eigh(white_matrix(image[0].numpy())) for image in v), strict=True)
    at, basis = at_zero(np.stack(values)), torch.from_numpy(np.stack(vectors))

    def factor(t: float, mu: Array) -> Array:
        return (1 + 0.3 * t) / (1 + mu)

    class Linear(Estimating):
        def predict_mean(
            self, y_t: Tensor, t: Tensor, s: Tensor, context: Tensor | None = None, labels: Tensor | None = None
        ) -> Tensor:
            scale = torch.from_numpy(c.signal(float(s), at) * factor(float(t), at))
            return (basis @ (scale[..., None] * (basis.mT @ y_t.flatten(1)[..., None]))).reshape(y_t.shape)

    scales = [1.0, 0.7, 0.4]
    number = SIZE[0] * SIZE[1]
    last, traces = follow_flow(Linear(c.process), start, y, float64(scales), Hadamard(BATCH, number), v, probes=number)
    z = (basis.mT @ y.flatten(1)[..., None])[..., 0].numpy() / c.noise(scales[-1], at)
    exact = 1e-8 if c.tone.smooth else ROUGH * number
    for i in (1, 0):
        a, b = scales[i + 1], scales[i]
        kappa = c.signal(b, at) / c.noise(b, at) - c.signal(a, at) / c.noise(a, at)
        slopes = [factor(t, at) * c.noise(t, at) for t in (a, b)]
        ahead = z + kappa * slopes[0] * z
        z = z + kappa * (slopes[0] * z + slopes[1] * ahead) / 2
        close(traces[:, i], (kappa * (slopes[0] + slopes[1]) / 2).sum(1), exact, 0)
    close(last, 0.5 * (z**2).sum(1) + 0.5 * number * math.log(2 * math.pi), exact, 0 if c.tone.smooth else 0.05)
