"""The variational bound: every term against dense laws, and on Gaussian data its expectation in closed form.

For data with independent Gaussian DCT coefficients and their ideal denoiser the expected bound is, by the chain rule of
the divergence of the whole path x_0, y_{t_1}, ..., y_1 under inference from that under the model,

    h(x_0) + KL(q(y_1) || p(y_1)) + sum E KL(q(y_s | y_t) || p(y_s | y_t)) + E KL(q(x_0 | y_{t_1}) || p(x_0 | y_{t_1})),

where the marginal q(y_s | y_t) has the variance that the posterior has and, on top, what y_t leaves open of y_0.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dpm_scales.denoisers import Denoiser
from dpm_scales.likelihood import VariationalBound
from dpm_scales.priors import GaussianPrior, auto_prior
from dpm_scales.processes import (
    VP,
    Homogeneous,
    InverseHeat,
    InverseOsmosis,
    OsmosisDiffusion,
    OsmosisFilter,
    Process,
)
from dpm_scales.rng import CounterRNG
from dpm_scales.schedules import SinSquaredBlur
from dpm_scales.targets import Clean, NextScale, Noise
from support.oracles import (
    NOISY,
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
    gaussian_data,
    images,
    named,
    over,
    pixels,
    pretended_gpu,
    refused,
    with_target,
)
from support.reference import (
    Array,
    Twin,
    cosine_twin,
    edm_twin,
    linear_heat_twin,
)

# --- every term -------------------------------------------------------------------------------------------------------


def gaussian_divergence(mean: Array, variance: Array, other_mean: Array, other_variance: Array) -> Array:
    """KL(N(mean, variance) || N(other)) per coefficient; 0 where both are points and the same."""
    same = (variance == 0) & (other_variance == 0) & (np.abs(mean - other_mean) < 1e-12)
    a, b = np.where(same, 1, variance), np.where(same, 1, other_variance)
    return np.asarray(0.5 * (np.log(b / a) + (a + (mean - other_mean) ** 2) / b - 1))


def conditioned(u_0: Array, u_t: Array, twin: Twin, s: float, t: float) -> tuple[Array, Array]:
    """Mean and variance of u_s given u_t and u_0, from the joint Gaussian of (u_s, u_t) given u_0."""
    (signal_t, noise_t), (signal_s, noise_s) = curves(twin, t), curves(twin, s)
    covariance = np.exp(np.log(signal_t) - np.log(signal_s)) * noise_s**2
    gain = covariance / noise_t**2
    variance = np.where(np.isclose(covariance, noise_t**2, 1e-12, 0), 0, noise_s**2 - gain * covariance)
    return signal_s * u_0 + gain * (u_t - signal_t * u_0), variance


@pytest.mark.parametrize("reverse", ["ancestral", "dissipation"])
@over([twin for twin in NOISY if twin.name != "vp-listed"])
def test_every_term_is_the_divergence_of_two_gaussians(twin: Twin, reverse: str) -> None:
    """3 x 5 pixels, 2 channels, all scales; per image, and by bands. "vp-listed" has a step without noise."""
    data, x_0, ratio = gaussian_data(), images(2, 2, H, W, seed=4), 1.4
    whites = [images(2, 2, H, W, seed=10 + i) * 1.7 for i in range(twin.num_scales)]
    bound = VariationalBound(
        OracleDenoiser(twin, data), GaussianPrior(), reverse=reverse, noise_ratio=ratio, num_bands=3
    )
    found = bound(x_0, ScriptedNoise(whites))
    scales = [k / twin.num_scales for k in range(twin.num_scales, 0, -1)]
    close(found.scales, scales)
    u_0 = coefficients(x_0.numpy())
    highest = np.pi * np.hypot((H - 1) / H, (W - 1) / W)
    frequency = np.pi * np.hypot(np.arange(H)[:, None] / H, np.arange(W) / W) / highest
    for i, (t, s) in enumerate(zip(scales[:-1], scales[1:], strict=True)):
        (signal_t, noise_t), (signal_s, noise_s) = curves(twin, t), curves(twin, s)
        u_t = signal_t * u_0 + noise_t * coefficients(whites[i].numpy())
        estimate = data.estimate(u_t, signal_t, noise_t)
        if reverse == "ancestral":
            laws = (*conditioned(u_0, u_t, twin, s, t), *conditioned(estimate, u_t, twin, s, t))
        else:
            laws = (signal_s * u_0, noise_s**2, signal_s * estimate, ratio**2 * noise_s**2)
        expected = gaussian_divergence(*laws)
        size = 1e-9 * (1 + np.abs(expected).sum())
        # the posterior's variance, a difference, has fewer digits than the function tau
        close(found.steps[:, i], expected.sum((1, 2, 3)), size, 1e-6)
        assert found.bands is not None
        for band in range(3):
            inside = np.minimum((frequency * 3 + 1e-12).astype(int), 2) == band
            close(found.bands[:, i, band], (expected * inside).sum((1, 2, 3)), size, 1e-6)
    close(found.steps, found.bands.sum(2))
    signal, noise = curves(twin, 1.0)
    close(found.prior, gaussian_divergence(signal * u_0, noise**2, 0 * u_0, noise**2).sum((1, 2, 3)), 1e-9, 1e-9)
    assert (found.context == 0).all()
    close(found.total, found.prior + found.steps.sum(1) + found.decoder)


# --- Gaussian data ----------------------------------------------------------------------------------------------------


def square(data: GaussianData, steps: int) -> tuple[Tensor, ScriptedNoise]:
    """Four images and their noise, +-1 standard deviations in all combinations: quadratic functions of independent
    coefficients have exactly their expectation as the average over the four."""
    corners = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]], dtype=torch.float64)
    shape = data.mean.shape
    u = data.mean + corners[:, :1, None, None].numpy() * np.sqrt(data.variance)
    white = pixels(corners[:, 1:, None, None].numpy() * np.ones((4, 1, *shape)))
    return torch.from_numpy(pixels(u)), ScriptedNoise([torch.from_numpy(white)] * steps)


class Worse(OracleDenoiser):
    """Estimates that are too bold."""

    def predict_mean(
        self, y_t: Tensor, t: Tensor, s: Tensor, context: Tensor | None = None, labels: Tensor | None = None
    ) -> Tensor:
        return 1.1 * super().predict_mean(y_t, t, s, context, labels)


def expected_bound(denoiser: OracleDenoiser, data: GaussianData, steps: int, decoder_std: float) -> float:
    """Of a density (`levels=None`), by the package, exactly."""
    x_0, noise = square(data, steps)
    bound = VariationalBound(denoiser, GaussianPrior(), steps, decoder_std=decoder_std, levels=None)
    return float(bound(x_0, noise).total.mean())


@pytest.mark.parametrize("size", [(H, W), (4, 2)], ids=["3x5", "4x2"])
@over(named(*NOISY_MEMBERS, "vp-linear", "blurring-listed-discrete", "chain-linear-discrete"))
def test_expected_bound_is_the_entropy_and_the_divergences_of_the_chain(twin: Twin, size: tuple[int, int]) -> None:
    data, std = gaussian_data(*size), 0.3
    scales = [k / twin.num_scales for k in range(twin.num_scales, 0, -1)]
    entropy = 0.5 * np.log(2 * np.pi * np.e * data.variance).sum()
    signal, noise = curves(twin, 1.0, *size)
    total = entropy + gaussian_divergence(
        signal * data.mean, signal**2 * data.variance + noise**2, 0 * data.mean, noise**2
    )
    total = entropy + (total - entropy).sum()
    for t, s in zip(scales[:-1], scales[1:], strict=True):
        at_t, (signal_s, noise_s) = curves(twin, t, *size), curves(twin, s, *size)
        tau = 1 - np.exp(2 * (np.log(at_t[0]) - np.log(signal_s) + np.log(noise_s) - np.log(at_t[1])))
        tau = np.where(tau < 1e-14, 0, tau)
        # twice the divergence of N(m, v + w) from N(m, v) is w / v - log(1 + w / v)
        excess = tau * signal_s**2 / noise_s**2 * data.uncertainty(*at_t)
        total += 0.5 * (excess - np.log1p(excess)).sum()
    open_ = data.uncertainty(*curves(twin, scales[-1], *size))
    total += (np.log(std) - 0.5 * np.log(open_) + open_ / (2 * std**2) - 0.5).sum()
    found = expected_bound(OracleDenoiser(twin, data), data, twin.num_scales, std)
    assert found == pytest.approx(total, abs=1e-8 * (1 + abs(total)))
    assert found > entropy
    assert expected_bound(Worse(twin, data), data, twin.num_scales, std) > found + 1e-3


# logSNR smooth down to t = 0, where the bound's gap is of first order
GENTLE = [
    cosine_twin(400, -6, 2),
    edm_twin(400, 0.3, 3.0),
    linear_heat_twin(400, 0.5, 0.3),
    cosine_twin(400, -6, 2, blur_sigma=2.0),
]


@over(GENTLE)
def test_steps_lose_in_proportion_to_their_length(twin: Twin) -> None:
    """What the chain adds to h(x_0) + KL at scale 1 + KL of the decoder falls like 1 / K: slope of the logarithms."""
    data, std = gaussian_data(), 0.5
    counts, gaps = [25, 50, 100, 200], []
    signal, noise = curves(twin, 1.0)
    entropy = 0.5 * np.log(2 * np.pi * np.e * data.variance).sum()
    start = gaussian_divergence(signal * data.mean, signal**2 * data.variance + noise**2, 0 * data.mean, noise**2).sum()
    for count in counts:
        open_ = data.uncertainty(*curves(twin, 1 / count))
        end = (np.log(std) - 0.5 * np.log(open_) + open_ / (2 * std**2) - 0.5).sum()
        gaps.append(expected_bound(OracleDenoiser(twin, data), data, count, std) - entropy - start - end)
    slope = -np.polyfit(np.log(counts[1:]), np.log(gaps[1:]), 1)[0]
    assert slope == pytest.approx(1, abs=0.1), gaps
    assert 0 < gaps[-1] < 0.02 * len(data.mean.ravel())


# --- draws ------------------------------------------------------------------------------------------------------------


class Zero(Denoiser):
    """Always answers with black: every term of an image is then a number, whatever the noise."""

    def __init__(self, process: Process) -> None:
        super().__init__(nn.Identity(), process, Clean())

    def predict_mean(
        self, y_t: Tensor, t: Tensor, s: Tensor, context: Tensor | None = None, labels: Tensor | None = None
    ) -> Tensor:
        return torch.zeros_like(y_t)


@pytest.mark.parametrize("reverse", ["ancestral", "dissipation"])
@over(named("vp-cosine", "ve-edm", "blurring", "inverse-heat-0.1", "chain"))
def test_draws_have_the_terms_as_their_expectation(twin: Twin, reverse: str) -> None:
    """Each step's average over 4000 images of three draws each, within 5 standard errors; and the sum."""
    denoiser, x_0 = Zero(twin.build()), images(1, 1, H, W)
    exact = VariationalBound(denoiser, GaussianPrior(), reverse=reverse, num_bands=2)(x_0, CounterRNG(0, 1))
    drawn = VariationalBound(denoiser, GaussianPrior(), None, 3, reverse, num_bands=2)
    found = drawn(x_0.expand(4000, -1, -1, -1), CounterRNG(1, 4000))
    assert (found.steps > 0).sum(1).max() <= 3
    assert found.bands is not None and exact.bands is not None
    pairs = [(found.steps, exact.steps), (found.bands.flatten(1), exact.bands.flatten(1))]
    for values, truth in [*pairs, (found.steps.sum(1, keepdim=True), exact.steps.sum(1, keepdim=True))]:
        error = values.std(0) / math.sqrt(len(values))
        assert ((values.mean(0) - truth[0]).abs() <= 5 * error + 1e-9 * truth[0].abs()).all()
        # drawn in proportion to what matters: the sum varies by less than a term
        assert (error < truth[0].abs().max() * 0.1).all()


def test_as_many_draws_as_steps_look_at_all_of_them() -> None:
    denoiser, x_0 = Zero(VP(6)), images(2, 1, H, W)
    every = VariationalBound(denoiser, GaussianPrior())(x_0, CounterRNG(3, 2))
    close(VariationalBound(denoiser, GaussianPrior(), draws=5)(x_0, CounterRNG(3, 2)).total, every.total, 0, 0)


@pytest.mark.parametrize("draws", [None, 3])
def test_an_image_gets_the_same_in_any_batch(draws: int | None) -> None:
    process = OsmosisDiffusion(10, blur=SinSquaredBlur(2.0))
    denoiser = Denoiser(WithGuidance(), process, Clean()).double()
    prior = auto_prior(process)
    x_0 = images(5, 1, H, W)
    prior.fit(images(7, 1, H, W, seed=2), process)
    bound = VariationalBound(denoiser, prior, draws=draws)
    whole = bound(x_0, CounterRNG(4, 5))
    parts = [bound(x_0[:2], CounterRNG(4, 2)), bound(x_0[2:], CounterRNG(4, 3, first=2))]
    for name in ("context", "prior", "steps", "decoder", "total"):
        close(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name), 1e-9, 1e-9)


class WithGuidance(nn.Module):
    """Sees image and guidance, answers with an image."""

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        image, guidance = x.chunk(2, 1)
        return torch.tanh(image + guidance)


# --- what can't be, and where it runs ---------------------------------------------------------------------------------


@pytest.mark.parametrize("process", [Homogeneous(4), OsmosisFilter(4)], ids=["homogeneous", "osmosis"])
def test_without_noise_there_is_no_likelihood(process: Process) -> None:
    with refused(type(process).__name__, "no noise", "no likelihood"):
        VariationalBound(Denoiser(TinyNetwork(), process, Clean()), auto_prior(process))


def test_values_that_can_not_be_meant_are_refused() -> None:
    denoiser, prior = Zero(VP(8)), GaussianPrior()
    for wrong, words in [
        ({"steps": 9}, ["steps", "8", "9"]),
        ({"steps": 0}, ["steps"]),
        ({"draws": 0}, ["draws"]),
        ({"reverse": "ancestrel"}, ["ancestral", "did you mean"]),
        ({"noise_ratio": 0.0}, ["noise_ratio"]),
        ({"decoder_std": -1.0}, ["decoder_std"]),
        ({"levels": 1}, ["levels"]),
        ({"num_bands": -1}, ["num_bands"]),
    ]:
        with refused(*words):
            VariationalBound(denoiser, prior, **wrong)
    with refused("finer-scale", "steps=4"):
        VariationalBound(Denoiser(TinyNetwork(), InverseHeat(8), NextScale()), prior, steps=4)
    with refused("noise target divides"):
        VariationalBound(Denoiser(TinyNetwork(), InverseHeat(8), Noise()), prior)


@pytest.mark.parametrize(
    ("process", "draws"),
    [(VP(3), None), (InverseHeat(4), 1), (InverseOsmosis(4, blur=SinSquaredBlur(1.0)), 1)],
    ids=["vp", "heat", "osmosis"],
)
def test_everything_stays_on_the_device_and_nothing_waits_for_it(process: Process, draws: int | None) -> None:
    prior = auto_prior(process) if isinstance(process, InverseOsmosis) else GaussianPrior()
    prior.fit(torch.rand(4, 1, H, W), process)
    network = WithGuidance() if isinstance(process, InverseOsmosis) else TinyNetwork()
    bound = VariationalBound(Denoiser(network, process, Clean()), prior, draws=draws, num_bands=2)
    with pretended_gpu(bound.denoiser, prior):
        x_0 = torch.rand(2, 1, H, W, device="cuda")
        found = bound(x_0, CounterRNG(0, 2, device="cuda"))
        assert found.total.device.type == "cuda" and found.total.shape == (2,)


def test_other_targets_give_the_terms_of_their_estimate() -> None:
    """A noise target that answers with the true noise knows the image: nothing is left but what the prior adds."""
    twin = named("vp-cosine")[0]
    x_0, white = images(2, 1, H, W), images(2, 1, H, W, seed=1)

    class Truth(nn.Module):
        def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
            return white

    bound = VariationalBound(with_target(twin, Noise(), Truth()), GaussianPrior())
    found = bound(x_0, ScriptedNoise([white] * 8))
    assert found.steps.abs().max() < 1e-9


def test_a_chain_of_one_step_is_prior_and_decoder() -> None:
    x_0 = images(2, 1, H, W)
    found = VariationalBound(Zero(VP(5)), GaussianPrior(), steps=1, draws=3, num_bands=2)(x_0, CounterRNG(0, 2))
    assert found.steps.shape == (2, 0) and found.scales.tolist() == [1.0]
    close(found.total, found.prior + found.decoder)
