"""The start of the likelihood: mixtures at scale 1 against dense sums, guidance images; and images of two pixels, of
which everything can be counted."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from torch import Tensor, nn

from dpm_scales.denoisers import Denoiser
from dpm_scales.likelihood import VariationalBound, negative_log_likelihood, start_law
from dpm_scales.operators import HeatOperator
from dpm_scales.priors import DataPrior, GaussianPrior, OsmosisPrior, Prior, Start
from dpm_scales.processes import VP, Context, InverseHeat, InverseOsmosis, Osmosis, OsmosisDiffusion, Process
from dpm_scales.rng import CounterRNG
from dpm_scales.schedules import ConstantNoise, CosineLogSNR, LinearTimeBlur, LogBlur, SinSquaredBlur
from dpm_scales.targets import Clean
from support.oracles import (
    H,
    PointData,
    W,
    close,
    coefficients,
    curves,
    images,
    named,
    over,
    refused,
)
from support.osmosis_twins import white_matrix
from support.reference import Array, Twin, cosine_log_snr, log_snr_curve

# --- mixtures ---------------------------------------------------------------------------------------------------------


def mixture(log_weights: Array, y: Array, centres: Array, std: Array) -> Array:
    """log of a mixture's density, ``(B,)``, term by term with scipy."""
    terms = [
        log_w + scipy.stats.norm.logpdf(y, c, std).sum((1, 2, 3)) for log_w, c in zip(log_weights, centres, strict=True)
    ]
    return np.asarray(scipy.special.logsumexp(terms, 0))


def bounded_divergence(log_weights: Array, mean: Array, std: Array, centres: Array, other: Array) -> Array:
    """-logsumexp(log w_i - KL_i), KL_i summed over coefficients."""

    def divergence(c: Array) -> Array:
        terms = np.log(other / std) + (std**2 + (mean - c) ** 2) / (2 * other**2) - 0.5
        return np.asarray(terms.sum((1, 2, 3)))

    terms = [log_w - divergence(c) for log_w, c in zip(log_weights, centres, strict=True)]
    return np.asarray(-scipy.special.logsumexp(terms, 0))


@pytest.mark.parametrize("ratio", [1.0, 1.25])
@over(named("inverse-heat", "inverse-heat-0.1", "blurring", "blurring-listed-discrete", "chain"))
def test_blurred_images_are_a_mixture(twin: Twin, ratio: float) -> None:
    """DataPrior: the density and the bound, 3 x 5 pixels, 2 channels, against sums over its images."""
    process, training, x_0 = twin.build(), images(6, 2, H, W, seed=2).float(), images(3, 2, H, W, seed=3)
    prior = DataPrior(ratio, tolerance=1e-30)
    prior.fit(training, process)
    signal, noise = curves(twin, 1.0)
    centres, weights = signal * coefficients(training.double().numpy()), np.full(6, -math.log(6))
    start, context = start_law(prior, process, x_0, CounterRNG(0, 3))
    assert context is None and (start.context_cost == 0).all()
    mean = torch.from_numpy(signal * coefficients(x_0.numpy()))
    expected = bounded_divergence(weights, mean.numpy(), noise, centres, ratio * noise)
    operator = HeatOperator(twin.spectrum or "continuous")
    close(start.divergence(operator.synthesis(mean)), expected, 1e-4, 1e-5)  # the prior keeps float32
    y = operator.synthesis(mean) + 0.1 * images(3, 2, H, W, seed=5)
    log_volume = 2 * np.log(noise * np.ones((H, W))).sum()
    expected = -mixture(weights, coefficients(y.numpy()), centres, ratio * noise) - log_volume
    close(start.negative_log_density(y), expected, 1e-4, 1e-5)


@over(named("inverse-heat-0.1", "chain"))
def test_bound_of_a_mixture_is_one(twin: Twin) -> None:
    """Not below the divergence itself, by 20000 draws from q, within 4 standard errors; equal for one component."""
    process, training = twin.build(), images(6, 1, H, W, seed=2)
    prior = DataPrior(1.25)
    prior.fit(training, process)
    x_0 = images(1, 1, H, W, seed=3)
    start, _ = start_law(prior, process, x_0, CounterRNG(0, 1))
    operator, one = process.operator(), torch.ones((), dtype=torch.float64)
    mean = operator.apply(process.signal(one), x_0)
    white = CounterRNG(0, 20000).normal((1, H, W), torch.float64)
    y = mean + operator.apply(lambda mu: process.noise_scale(one, mu), white)
    log_q = -0.5 * white.square().flatten(1).sum(1) - 0.5 * H * W * math.log(2 * math.pi)
    sampled = log_q + start.negative_log_density(y)
    error = float(sampled.std()) / math.sqrt(len(sampled))
    assert float(sampled.mean()) - 4 * error < float(start.divergence(mean)) < float(sampled.mean()) + 1.0
    prior.fit(training[:1], process)
    alone, _ = start_law(prior, process, x_0, CounterRNG(0, 1))
    sampled = log_q + alone.negative_log_density(y)
    assert float(sampled.mean() - alone.divergence(mean)) == pytest.approx(0, abs=4 * float(sampled.std()) / 140)


# --- guidance images --------------------------------------------------------------------------------------------------


def guided(noise: float = 0.1, least: float = 0.01) -> list[Osmosis]:
    return [
        OsmosisDiffusion(6, blur=SinSquaredBlur(2.0), guidance_noise=noise, guidance_min=least),
        InverseOsmosis(6, ConstantNoise(0.1), LogBlur(0.5, 2.0), guidance_noise=noise, guidance_min=least),
    ]


def clipped_log_density(v: Array, grey: Array, std: float, least: float) -> Array:
    """Of clip(grey + std N(0, 1), least, 1): density between, probability at the bounds, pixel by pixel."""
    inside = scipy.stats.norm.logpdf(v, grey, std)
    dark = scipy.stats.norm.logcdf(least, grey, std) * np.ones_like(v)
    bright = scipy.stats.norm.logsf(1.0, grey, std) * np.ones_like(v)
    return np.asarray(np.where(v <= least, dark, np.where(v >= 1, bright, inside)))


@pytest.mark.parametrize("least", [0.01, 0.35], ids=["unclipped", "clipped"])
@pytest.mark.parametrize("process", range(2), ids=["osmosis_diffusion", "inverse_osmosis"])
def test_guidance_costs_what_it_tells_of_the_mean(process: int, least: float) -> None:
    """log q(v; m_0) - log 1/M sum q(v; m_i), and the mixture around steady states, from scipy and dense matrices."""
    law = guided(0.2, least)[process]
    low, high = law.value_range
    training = low + (high - low) * images(5, 2, H, W, seed=6).abs().float()
    x_0 = low + (high - low) * images(3, 2, H, W, seed=7).abs()
    prior = OsmosisPrior(1.3)
    prior.fit(training, law)
    start, v = start_law(prior, law, x_0, CounterRNG(0, 3))
    assert v is not None
    assert v.shape == x_0.shape and 0 <= int((v == least).sum()) < v.numel() / 2
    assert least == 0.01 or bool((v == least).any())
    grey = (prior.grey.double().numpy() - low) / (high - low)
    own = (x_0.mean((-2, -1)).numpy() - low) / (high - low)

    def log_q(g: Array) -> Array:
        return clipped_log_density(v.numpy(), g[..., None, None], 0.2, least).sum((1, 2, 3))

    each = np.stack([log_q(g) for g in grey], 1)
    total = scipy.special.logsumexp(each, 1)
    close(start.context_cost, log_q(own) - total + math.log(5), 1e-5)
    close(start.log_weights, each - total[:, None], 1e-5)

    y = images(3, 2, H, W, seed=8) * 3
    v_mean = v.numpy() / v.numpy().mean((-2, -1), keepdims=True)
    noise, signal = (float(f(1.0, torch.zeros(1))) for f in (law.noise_scale, law.signal_scale))
    means = prior.grey.double().numpy()
    for b in range(3):
        centres = signal * means[:, :, None, None] * np.sqrt(v_mean[b])
        std = np.full((H, W), 1.3 * noise)
        weights = start.log_weights[b].numpy()
        log_volume = 2 * H * W * math.log(noise)
        expected = -mixture(weights, y[b : b + 1].numpy(), centres[:, None], std) - log_volume
        close(start.negative_log_density(y)[b], expected[0], 1e-6, 1e-6)
        expected = bounded_divergence(weights, y[b : b + 1].numpy(), np.full((H, W), noise), centres[:, None], std)
        close(start.divergence(y)[b], expected[0], 1e-6, 1e-6)


def test_what_guidance_tells_is_positive_on_average_and_little_for_much_noise() -> None:
    costs = []
    for noise in (0.02, 0.5):
        law = guided(noise)[0]
        training, x_0 = images(50, 1, H, W, seed=1), images(300, 1, H, W, seed=2)
        prior = OsmosisPrior()
        prior.fit(training, law)
        cost = start_law(prior, law, x_0, CounterRNG(0, 300))[0].context_cost
        assert cost.mean() > 3 * cost.std() / math.sqrt(300)
        costs.append(float(cost.mean()))
    assert costs[0] > 1 > 0.3 > costs[1]


class Guess(Denoiser):
    """Answers with lambda_s(L) of an image that depends on t alone, by the dense operator of the guidance image."""

    def predict_mean(
        self, y_t: Tensor, t: Tensor, s: Tensor, context: Tensor | None = None, labels: Tensor | None = None
    ) -> Tensor:
        return self.process.operator(context).at_degree(60).apply(self.process.signal(s), guess(t, y_t))


def guess(t: Tensor, like: Tensor) -> Tensor:
    return torch.sin(t * 7 + torch.arange(like[0].numel()).reshape(like.shape[1:])).expand_as(like)


class Blind(nn.Module):
    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        return x.chunk(2, 1)[0]


@pytest.mark.parametrize("reverse", ["ancestral", "dissipation"])
@pytest.mark.parametrize("process", range(2), ids=["osmosis_diffusion", "inverse_osmosis"])
def test_terms_of_osmosis_are_those_of_the_dense_operator(process: int, reverse: str) -> None:
    """1/2 d' f(L) d by eigenvectors of L, 3 x 5 pixels, 2 channels, to 1e-5 of the sum; a band has 1/2 (P d)' f(L) d, P
    the DCT coefficients of its frequencies."""
    law = guided()[process]
    x_0, prior = images(2, 2, H, W).abs(), OsmosisPrior()
    prior.fit(images(4, 2, H, W, seed=9).abs(), law)
    denoiser = Guess(Blind(), law, Clean())
    found = VariationalBound(denoiser, prior, reverse=reverse, num_bands=2)(x_0, CounterRNG(1, 2))
    assert found.bands is not None
    close(found.bands.sum(2), found.steps)
    frequency = np.hypot(np.arange(H)[:, None] / H, np.arange(W) / W)
    low = frequency < frequency.max() / 2
    _, v = start_law(prior, law, x_0, CounterRNG(1, 2))
    assert v is not None
    for i in range(5):
        t, s = (torch.tensor((6 - k) / 6, dtype=torch.float64) for k in (i, i + 1))
        for b in range(2):
            total = lower = 0.0
            for c in range(2):
                matrix, grey = white_matrix(v[b, c].numpy()), v[b, c].numpy().ravel()
                mu, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
                y_0 = x_0[b, c].numpy().ravel() / np.sqrt(grey / grey.mean())
                at = torch.from_numpy(mu.clip(0))
                signal_t, signal_s = (law.signal_scale(k, at).numpy() for k in (t, s))
                noise_t, noise_s = (law.noise_scale(k, at).numpy() for k in (t, s))
                u = signal_s * (vectors.T @ (y_0 - guess(t, x_0)[b, c].numpy().ravel()))
                weight, excess = 1 / (1.25 * noise_s) ** 2, 0.5 * (0.64 - 1 + 2 * math.log(1.25))
                if reverse == "ancestral":
                    tau, excess = 1 - (signal_t * noise_s / signal_s / noise_t) ** 2, 0.0
                    weight = tau / noise_s**2
                both = [coefficients((vectors @ w).reshape(H, W)) for w in (u, weight * u)]
                total += float(0.5 * (weight * u**2).sum()) + H * W * excess
                lower += float((0.5 * both[0] * both[1] + excess)[low].sum())
            assert float(found.steps[b, i]) == pytest.approx(total, rel=1e-5, abs=1e-5)
            assert float(found.bands[b, i, 0]) == pytest.approx(lower, rel=1e-5, abs=1e-5 * (1 + abs(total)))


def test_constant_guidance_is_the_heat_operator() -> None:
    """The same network, images and noise by both routes, but for how v is drawn: the terms of the chain agree."""
    x_0 = images(2, 1, H, W).abs()
    flat = InverseOsmosis(6, ConstantNoise(0.1), LinearTimeBlur(2.0), guidance_noise=0.0, guidance_input=False)
    heat = InverseHeat(6, ConstantNoise(0.1), LinearTimeBlur(2.0), "discrete")
    prior = OsmosisPrior()
    prior.fit(x_0, flat)

    class Mean(nn.Module):
        def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
            return torch.full_like(x, 0.4)

    found = [
        VariationalBound(Denoiser(Mean(), law, Clean("none")), p)(x_0, CounterRNG(0, 2))
        for law, p in ((flat, prior), (heat, GaussianPrior()))
    ]
    assert (found[0].context == 0).all()
    close(found[0].steps, found[1].steps, 1e-6, 1e-6)
    close(found[0].decoder, found[1].decoder, 1e-6, 1e-6)


def test_densities_that_are_not_known_are_refused() -> None:
    x_0 = images(2, 1, H, W).abs().float()

    def law(prior: Prior, process: Osmosis | VP | InverseHeat) -> None:
        start_law(prior, process, x_0, CounterRNG(0, 2))

    with refused("train the model first"):
        law(OsmosisPrior(), InverseOsmosis(4))
    silent = DataPrior(0.0)
    silent.fit(x_0, InverseHeat(4))
    with refused("noise_ratio=0"):
        law(silent, InverseHeat(4))
    colour = DataPrior()
    colour.fit(torch.rand(2, 3, H, W), InverseHeat(4))
    with refused("3 channel", "of 1"):
        law(colour, InverseHeat(4))

    class Other(Prior):
        def sample(self, process, noise, size, dtype=torch.float32):  # type: ignore[no-untyped-def]
            raise AssertionError

    with refused("Other", "not known"):
        law(Other(), VP(4))


def test_a_prior_of_ones_own_brings_its_law() -> None:
    """y_1 = 2 gamma_1(L) eps: the bound has its divergence, here by quadrature, and its cost of the context."""

    class WideLaw(Start):
        def negative_log_density(self, y: Tensor) -> Tensor:
            raise AssertionError

        def divergence(self, mean: Tensor) -> Tensor:
            return (0.5 * (mean / (2 * math.exp(-0.5))) ** 2 + math.log(2) - 0.375).flatten(1).sum(1)

    class Wide(GaussianPrior):
        def law(self, process: Process, x_0: Tensor, noise: CounterRNG) -> tuple[Start, Context]:
            return WideLaw(process.operator(), torch.full((len(x_0),), 0.5, dtype=torch.float64)), None

    process, x_0 = InverseHeat(4, ConstantNoise(math.exp(-0.5)), LogBlur(0.5, 2.0)), images(2, 1, H, W)
    found = VariationalBound(Guess(nn.Identity(), process, Clean()), Wide())(x_0, CounterRNG(0, 2))
    mean = process.operator().apply(process.signal(1.0), x_0).numpy()
    nodes, weights = np.polynomial.hermite_e.hermegauss(40)
    at = mean[..., None] + math.exp(-0.5) * nodes
    logs = scipy.stats.norm.logpdf(at, mean[..., None], math.exp(-0.5)) - scipy.stats.norm.logpdf(
        at, 0, 2 * math.exp(-0.5)
    )
    close(found.prior, (logs @ weights / weights.sum()).sum((1, 2, 3)), 1e-9, 1e-9)
    assert (found.context == 0.5).all()


# --- everything counted -----------------------------------------------------------------------------------------------


def test_bound_holds_on_images_that_can_be_counted() -> None:
    """Two pixels of three values, a chain of two latent scales, the ideal denoiser: P(x) of all nine images by
    quadrature sums to 1, and the bound of each lies above -log P(x), by little."""
    num, levels, std = 3, 3, 0.4
    twin = Twin(
        "two", lambda: VP(num, CosineLogSNR(-5, 3)), num, log_snr_curve(lambda t: cosine_log_snr(t, -5, 3), num)
    )
    every = np.array(list(itertools.product([-1.0, 0.0, 1.0], repeat=2))).reshape(9, 1, 2)
    probabilities = np.random.default_rng(0).dirichlet(np.full(9, 0.7))
    data = PointData(every, probabilities)

    class Ideal(Denoiser):  # in pixels: without blur they serve as coefficients
        def predict_mean(
            self, y_t: Tensor, t: Tensor, s: Tensor, context: Tensor | None = None, labels: Tensor | None = None
        ) -> Tensor:
            estimate = data.estimate(y_t.numpy(), *curves(twin, float(t), 1, 2))
            return torch.from_numpy(curves(twin, float(s), 1, 2)[0] * estimate)

    axis = np.linspace(-5.5, 5.5, 71)
    area = (axis[1] - axis[0]) ** 2
    points = np.stack(np.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 1, 2)
    (signal_1, noise_1), (signal_2, noise_2) = curves(twin, 1.0, 1, 2), curves(twin, 2 / 3, 1, 2)
    signal_3, noise_3 = curves(twin, 1 / 3, 1, 2)
    density = scipy.stats.norm.pdf(points, 0, noise_1).prod((1, 2))
    for (a, b), (c, d) in (((signal_1, noise_1), (signal_2, noise_2)), ((signal_2, noise_2), (signal_3, noise_3))):
        gain = a / c * d**2 / b**2
        mean = c * (data_mean := data.estimate(points, a, b)) + gain * (points - a * data_mean)
        spread = np.sqrt(d**2 - gain**2 * b**2)
        kernel = [scipy.stats.norm.pdf(axis[:, None], mean[:, 0, j], spread[0, j]) for j in range(2)]
        density = np.einsum("in,jn,n->ij", *kernel, density * area, optimize=True).ravel()
    estimate = torch.from_numpy(data.estimate(points, signal_3, noise_3))[:, None]
    exact = np.empty(9)
    for i, image in enumerate(every):
        x = torch.from_numpy(image).expand(len(points), 1, 1, 2)
        nats = negative_log_likelihood(x, estimate, torch.full_like(x, std), (-1.0, 1.0), levels)
        exact[i] = -math.log((np.exp(-nats.numpy()) * density * area).sum())
    assert np.exp(-exact).sum() == pytest.approx(1, abs=1e-6)

    bound = VariationalBound(
        Ideal(nn.Identity(), twin.build(), Clean()), GaussianPrior(), None, None, decoder_std=std, levels=levels
    )
    draws = 4000
    gaps, sizes = np.empty(9), np.empty(9)
    for i, image in enumerate(every):
        x = torch.from_numpy(image).expand(draws, 1, 1, 2)
        found = bound(x, CounterRNG(i, draws)).total.numpy()
        gaps[i], sizes[i] = found.mean() - exact[i], found.std() / math.sqrt(draws)
    assert (gaps > -3 * sizes).all() and (gaps > 0).sum() >= 8
    entropy = -(probabilities * np.log(probabilities)).sum()
    assert entropy < (probabilities * exact).sum() < (probabilities * (exact + gaps)).sum()
    assert (probabilities * gaps).sum() < 0.5
