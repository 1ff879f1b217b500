"""Guidance images in the likelihood, on images of two and three pixels with Gaussian laws, float64.

With a linear denoiser the whole model is Gaussian for each guidance image v, so that p(x_0 | v) is a dense matrix away,
and so is the divergence of the chain's law under inference from that under the model given x_0: their sum is the
expected bound, to the last digit. Its expectation in the package is exact as well: every term is quadratic in one draw
of noise, of which the 2 N points +-sqrt(N) e_j stand for the normal law. What is left, the guidance, is enumerated.
"""

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
from dpm_scales.likelihood import FlowLikelihood, VariationalBound, start_law
from dpm_scales.priors import OsmosisPrior
from dpm_scales.priors.guidance import Known, infer_guidance
from dpm_scales.processes import VP, InverseOsmosis, Osmosis, OsmosisDiffusion
from dpm_scales.rng import CounterRNG
from dpm_scales.schedules import CosineLogSNR, LinearTimeBlur
from dpm_scales.targets import Clean
from support.guided_twins import (
    FLOOR,
    HIGH_SNR,
    IMAGE,
    LOW_SNR,
    TIME,
    TRAINING,
    LinearDenoiser,
    Scripted,
    Twin,
    blur_matrix,
    data,
    expected,
    fitted,
    osmosis,
    pair,
    pattern_matrix,
)
from support.oracles import close, images, pretended_gpu
from support.reference import Array, cosine_log_snr

# --- what is enumerated -----------------------------------------------------------------------------------------------


def near(process: Osmosis) -> Array:
    """q(i | x_0): grey values by the noise that the finest scale leaves of the mean."""
    log_snr = cosine_log_snr(1 / process.num_scales, LOW_SNR, HIGH_SNR)
    distance = (TRAINING.mean((1, 2)) - IMAGE.mean()) ** 2
    return np.asarray(scipy.special.softmax(-0.5 * 2 * np.exp(log_snr) * distance))


def test_edges_are_summed_up() -> None:
    """Four patterns of signs around three grey values: -log P(x_0) exactly, and the bound, exactly, above it."""
    process = osmosis(guidance_pattern="edges")
    prior, denoiser, q = fitted(process, TRAINING), LinearDenoiser(process, pair), near(process)
    matrix, greys = pattern_matrix(1, 2, 0.6), TRAINING.mean((1, 2))
    correlation = matrix[0] @ matrix[1] / (matrix[0] @ matrix[0])
    same = 0.25 + math.asin(correlation) / (2 * math.pi)
    probability, total, bound = 0.0, 0.0, float(q @ np.log(3 * q))
    for signs in itertools.product([1.0, -1.0], repeat=2):
        share = same if signs[0] == signs[1] else 0.5 - same
        white = np.linalg.solve(matrix, np.array(signs)).reshape(1, 2)
        for i, grey in enumerate(greys):
            twin = pair(np.array([[grey + 0.1 * signs[0], grey + 0.1 * signs[1]]]))
            probability += share / 3 * math.exp(twin.log_p(IMAGE.ravel(), grey))
            bound += share * q[i] * twin.bound(IMAGE.ravel(), grey)
            middle = float(q[:i].sum() + q[i] / 2)
            found, context = expected(denoiser, prior, IMAGE, white, [middle])
            close(context, q @ np.log(3 * q), 1e-12)
            close(found - context, twin.bound(IMAGE.ravel(), grey), 1e-7, 1e-7)
            total += share * q[i] * found
    close(total, bound, 1e-7, 1e-7)
    assert -math.log(probability) < total < -math.log(probability) + 2.5


def test_other_images_are_summed_up() -> None:
    """No noise: three grey values and the relief of three images, nine guidance images."""
    process = osmosis(guidance_image="other", guidance_noise=0.0)
    prior, denoiser, q = fitted(process, TRAINING), LinearDenoiser(process, pair), near(process)
    smooth = (blur_matrix(1, 2, 0.6) @ TRAINING.reshape(3, 2, 1)).reshape(3, 1, 2)
    greys, probability, total = TRAINING.mean((1, 2)), 0.0, 0.0
    for i, j in itertools.product(range(3), repeat=2):
        v = greys[i] + smooth[j] - smooth[j].mean()
        twin = pair(v)
        probability += math.exp(twin.log_p(IMAGE.ravel(), greys[i])) / 9
        middle = float(q[:i].sum() + q[i] / 2)
        found, context = expected(denoiser, prior, IMAGE, np.zeros((1, 2)), [(j + 0.5) / 3, middle])
        close(context, q @ np.log(3 * q), 1e-12)
        close(found - context, twin.bound(IMAGE.ravel(), greys[i]), 1e-5, 1e-5)  # relief is kept in float32
        total += q[i] / 3 * found
    assert -math.log(probability) < total < -math.log(probability) + 2.5


@pytest.mark.parametrize(
    "settings", [{"guidance_pattern": "smooth"}, {"guidance_image": "other"}], ids=["smooth", "other, with noise"]
)
@pytest.mark.parametrize("count", [1, 3], ids=["one grey value", "three"])
def test_bound_holds_with_smooth_guidance_and_with_noise_on_other_images(settings: dict[str, str], count: int) -> None:
    """-log P(x_0) by quadrature over the guidance's noise, below the bound; for one grey value the start is no mixture,
    so that the rest of the bound is the twin's, and the context's part the divergence of two normal laws."""
    training = TRAINING[:count] if count > 1 else IMAGE.round(1)[None] + np.array([[[0.0, -0.04]]])
    process = osmosis(guidance_noise=0.04, **settings)
    prior, denoiser = fitted(process, training), LinearDenoiser(process, pair)
    nodes, weights = np.polynomial.hermite_e.hermegauss(4)
    weights = weights / weights.sum()
    matrix = pattern_matrix(1, 2, 0.6) if "guidance_pattern" in settings else np.eye(2)
    reliefs = [np.zeros((1, 2))]
    if "guidance_image" in settings:
        smooth = (blur_matrix(1, 2, 0.6) @ training.reshape(count, 2, 1)).reshape(count, 1, 2)
        reliefs = list(smooth - smooth.mean((1, 2), keepdims=True))
    probability = total = told = exact = 0.0
    for (a, p), (b, r) in itertools.product(zip(nodes, weights, strict=True), repeat=2):
        white = np.array([[a, b]])
        wave = 0.04 * (matrix @ white.ravel()).reshape(1, 2)
        for j, relief in enumerate(reliefs):
            share = p * r / len(reliefs)
            for grey in training.mean((1, 2)):
                probability += share / count * math.exp(pair(grey + relief + wave).log_p(IMAGE.ravel(), grey))
            uniforms = [(j + 0.5) / count] if len(reliefs) > 1 or "guidance_image" in settings else []
            found, context = expected(denoiser, prior, IMAGE, white, uniforms)
            total, told = total + share * found, told + share * context
            if count == 1:
                grey = float(training.mean())
                exact += share * pair(IMAGE.mean() + relief + wave).bound(IMAGE.ravel(), grey)
    assert told > 0 and -math.log(probability) < total < -math.log(probability) + 2.5
    if count == 1:
        close(total - told, exact, 1e-5, 1e-5)
    # the mean of the guidance is normal around either grey value: the divergence in closed form, for one of them
    if count == 1:
        gain = matrix.sum() / 2
        apart = IMAGE.mean() - training.astype(np.float32).mean()
        close(told, apart**2 / (2 * (0.04 * gain) ** 2 / 2), 1e-9, 1e-5)


# --- guidance by the image itself -------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"guidance_pattern": "smooth"}, {"guidance_pattern": "edges"}])
@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_own_guidance_gives_the_likelihood_given_it(noise: float, settings: dict[str, str]) -> None:
    """1 x 3 pixels: -log p(x_0 | v, m_0) <= the bound, which is the twin's; other training images change nothing."""
    process = osmosis(guidance_image="own", guidance_noise=noise, **settings)
    mean, covariance = data(3)
    denoiser = LinearDenoiser(process, lambda v: Twin(v, mean, covariance))
    x_0, white = np.array([[0.35, 0.6, 0.55]]), np.array([[0.9, -0.7, 0.4]])
    matrix = np.eye(3) if not settings else pattern_matrix(1, 3, 0.6)
    wave = matrix @ white.ravel()
    wave = np.sign(wave) if settings.get("guidance_pattern") == "edges" else wave
    v = (blur_matrix(1, 3, 0.6) @ x_0.ravel() + noise * wave).reshape(1, 3)
    twin = Twin(v, mean, covariance)
    for training in (np.full((1, 1, 3), 0.2), np.random.default_rng(0).uniform(size=(4, 1, 3))):
        found, context = expected(denoiser, fitted(process, training), x_0, white)
        assert context == 0
        close(found, twin.bound(x_0.ravel(), x_0.mean()), 1e-7, 1e-7)
        assert found > -twin.log_p(x_0.ravel(), x_0.mean())
    assert process.condition == "guidance image"


def test_ideal_denoiser_of_images_given_their_guidance_attains_their_entropy() -> None:
    """x_0 and v = blurred x_0 + noise are jointly Gaussian: the average bound over x_0 given v lies above h(x_0 | v),
    and comes down to it, but for the decoder's share, as the number of steps grows."""
    mean, covariance = data(3)
    covariance = 100 * covariance  # what of it the decoder's noise hides is then little
    blur, std, ends = blur_matrix(1, 3, 0.6), 1.0, (-8.0, 5.0)
    v = np.array([[0.48, 0.55, 0.41]])
    given = np.linalg.inv(np.linalg.inv(covariance) + blur.T @ blur / std**2)
    centre = given @ (np.linalg.solve(covariance, mean) + blur.T @ v.ravel() / std**2)
    entropy = 0.5 * np.linalg.slogdet(2 * np.pi * np.e * given)[1]
    points = math.sqrt(6) * np.concatenate([np.eye(6), -np.eye(6)])  # of x_0 given v, and of the chain's noise
    x_0 = centre + points[:, :3] @ np.linalg.cholesky(given).T
    white = torch.from_numpy((v.ravel() - x_0 @ blur.T) / std).reshape(12, 1, 1, 3)
    rows, chain = torch.from_numpy(x_0).reshape(12, 1, 1, 3), torch.from_numpy(points[:, 3:]).reshape(12, 1, 1, 3)
    gaps, counts = [], [50, 100, 200]
    for count in counts:
        process = OsmosisDiffusion(
            *(count, CosineLogSNR(*ends), LinearTimeBlur(TIME), FLOOR, std),
            **{"guidance_image": "own", "guidance_blur_sigma": 0.6, "value_range": (0.0, 1.0), "tolerance": 1e-10},
        )
        denoiser = LinearDenoiser(process, lambda v: Twin(v.round(12), centre, given, ends=ends))
        finest = math.exp(-cosine_log_snr(1 / count, *ends) / 2)
        bound = VariationalBound(denoiser, fitted(process, v[None]), decoder_std=finest, levels=None)
        gaps.append(float(bound(rows, Scripted([white, *[chain] * count])).total.mean()) - entropy)
    assert gaps[0] > gaps[1] > gaps[2] > 0
    limit = (gaps[0] - 6 * gaps[1] + 8 * gaps[2]) / 3  # of c + a / K + b / K^2
    assert abs(limit) < 0.02 < 0.2 < gaps[2], gaps


# --- costs, and where they come from ----------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [OsmosisDiffusion, InverseOsmosis])
@pytest.mark.parametrize("low", [0.0, -1.0])
def test_smooth_guidance_costs_what_its_density_says(make: type[Osmosis], low: float) -> None:
    """log N(v; m_0, C) - log 1/M sum N(v; m_i, C) with the dense covariance of the pattern, 2 channels, 3 x 4."""
    process = make(8, guidance_pattern="smooth", guidance_blur_sigma=0.5, value_range=(low, 1.0))  # type: ignore[call-arg]
    span = 1 - low
    x_0 = low + span * (0.5 + 0.03 * images(5, 2, 3, 4, seed=1))
    training = low + span * (0.5 + 0.03 * images(4, 2, 3, 4, seed=2))
    prior = OsmosisPrior()
    prior.fit(training, process)
    start, v = start_law(prior, process, x_0, CounterRNG(0, 5))
    assert v is not None and 0.01 < float(v.min()) and float(v.max()) < 1
    matrix = 0.1 * pattern_matrix(3, 4, 0.5)
    own = (x_0.mean((-2, -1)).numpy() - low) / span
    known = (prior.grey.double().numpy() - low) / span

    def log_q(grey: Array) -> Array:
        """Of 5 images around greys (5, 2)."""
        off = (v.numpy() - grey[..., None, None]).reshape(5, 2, 12)
        return np.asarray(scipy.stats.multivariate_normal.logpdf(off, np.zeros(12), matrix @ matrix.T).sum(1))

    each = np.stack([log_q(np.broadcast_to(g, (5, 2))) for g in known], 1)
    total = scipy.special.logsumexp(each, 1)
    close(start.context_cost, log_q(own) - total + math.log(4), 1e-5)
    close(start.log_weights, each - total[:, None], 1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {"guidance_pattern": "smooth"},
        {"guidance_pattern": "edges"},
        {"guidance_image": "other"},
        {"guidance_image": "own"},
    ],
    ids=lambda settings: next(iter(settings.values())),
)
@pytest.mark.parametrize("method", ["vlb", "flow"])
def test_an_image_gets_the_same_in_any_batch(method: str, settings: dict[str, str]) -> None:
    process = osmosis(8, **settings)
    prior = OsmosisPrior()
    prior.fit(0.3 + 0.4 * images(7, 1, 3, 5, seed=2).abs(), process)

    class Mean(nn.Module):
        def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
            image, guidance = x.chunk(2, 1)
            return torch.tanh(image + guidance)

    denoiser, x_0 = Denoiser(Mean(), process, Clean()).double(), images(5, 1, 3, 5).abs()
    look = VariationalBound(denoiser, prior, draws=3) if method == "vlb" else FlowLikelihood(denoiser, prior, 3)
    whole = look(x_0, CounterRNG(4, 5)).total
    parts = [look(x_0[:2], CounterRNG(4, 2)).total, look(x_0[2:], CounterRNG(4, 3, first=2)).total]
    assert bool(torch.isfinite(whole).all())
    close(torch.cat(parts), whole, 1e-8, 1e-8)


@pytest.mark.parametrize(
    "settings", [{"pattern": "smooth"}, {"pattern": "edges"}, {"image": "other"}, {"image": "own"}]
)
def test_guidance_is_drawn_on_the_device(settings: dict[str, str]) -> None:
    process, prior = osmosis(**{f"guidance_{name}": value for name, value in settings.items()}), OsmosisPrior()
    prior.fit(torch.rand(4, 1, 3, 5), process)
    with pretended_gpu(process, prior):
        start, v = start_law(prior, process, torch.rand(2, 1, 3, 5, device="cuda"), CounterRNG(0, 2, device="cuda"))
        assert v is not None and v.device.type == start.context_cost.device.type == "cuda"
        assert start.divergence(torch.rand(2, 1, 3, 5, device="cuda")).device.type == "cuda"


def test_only_guidance_by_the_image_itself_is_a_condition() -> None:
    own, other = osmosis(guidance_image="own"), osmosis(guidance_image="other")
    assert own.condition == "guidance image"
    assert other.condition is VP(4).condition is None


def test_grey_values_are_drawn_as_often_as_they_should() -> None:
    """Edges: 20000 draws of the guidance's grey value, by its two levels, within 4 standard errors."""
    process = osmosis(guidance_pattern="edges")
    prior, q = fitted(process, TRAINING), near(process)
    x_0 = torch.from_numpy(IMAGE).expand(20000, 1, 1, 2)
    known = Known(prior.grey, prior.relief, torch.zeros(1, 3))
    log_weights, _, grey_of, v = infer_guidance(process, known, x_0, CounterRNG(1, 20000))
    assert v is not None and grey_of.shape == (20000, 1, 1) and bool((log_weights == 0).all())
    for grey, share in zip(TRAINING.mean((1, 2)), q, strict=True):
        chosen = (grey_of[:, 0, 0].numpy() == grey).mean()
        assert abs(chosen - share) < 4 * math.sqrt(share * (1 - share) / 20000) + 1e-9
    levels = (v - grey_of[..., None]).abs()
    close(levels, 0.1 * np.ones(levels.shape), 1e-12)
