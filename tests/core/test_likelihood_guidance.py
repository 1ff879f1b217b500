"""Guidance images in the likelihood, on images of two and three pixels with Gaussian laws, float64.

With a linear denoiser the whole model is Gaussian for each guidance image v, so that p(x_0 | v) is a dense matrix away,
and so is the divergence of the chain's law under inference from that under the model given x_0: their sum is the
expected bound, to the last digit. Its expectation in the package is exact as well: every term is quadratic in one draw
of noise, of which the 2 N points +-sqrt(N) e_j stand for the normal law. What is left, the guidance, is enumerated.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from torch import Tensor, nn

from dpm_scales.denoisers import Denoiser
from dpm_scales.likelihood import FlowLikelihood, VariationalBound, start_law
from dpm_scales.priors import OsmosisPrior
from dpm_scales.processes import VP, InverseOsmosis, Osmosis, OsmosisDiffusion
from dpm_scales.rng import CounterRNG
from dpm_scales.schedules import CosineLogSNR, LinearTimeBlur
from dpm_scales.targets import Clean
from support.oracles import ScriptedNoise, close, images, pretended_gpu
from support.osmosis_twins import white_matrix
from support.reference import Array, cosine_log_snr, dct_basis

LOW_SNR, HIGH_SNR, TIME, FLOOR, STD = -6.0, 7.0, 0.4, 0.05, 0.06


def osmosis(num_scales: int = 4, **settings: object) -> OsmosisDiffusion:
    values: dict[str, object] = {"guidance_blur_sigma": 0.6, "guidance_noise": 0.1, "value_range": (0.0, 1.0)}
    noise, blur = CosineLogSNR(LOW_SNR, HIGH_SNR), LinearTimeBlur(TIME)
    return OsmosisDiffusion(num_scales, noise, blur, FLOOR, tolerance=1e-11, **(values | settings))  # type: ignore[arg-type]


# --- the dense twin ---------------------------------------------------------------------------------------------------


@dataclass
class Twin:
    """Osmosis diffusion for one guidance image ``(H, W)``, with the ideal denoiser of x_0 ~ N(mean, covariance)."""

    v: Array
    mean: Array
    covariance: Array
    num_scales: int = 4
    ends: tuple[float, float] = (LOW_SNR, HIGH_SNR)
    root: Array = field(init=False)

    def __post_init__(self) -> None:
        self.root = np.sqrt(self.v.ravel() / self.v.mean())
        mu, self.vectors = np.linalg.eigh(white_matrix(self.v))
        self.mu = mu.clip(0)

    def function(self, values: Array) -> Array:
        return np.asarray(self.vectors @ np.diag(values * np.ones_like(self.mu)) @ self.vectors.T)

    def curves(self, t: float) -> tuple[Array, Array]:
        """lambda and gamma of the eigenvalues."""
        log_snr = cosine_log_snr(t, *self.ends)
        decay = (1 - FLOOR) * np.exp(-self.mu * TIME * t) + FLOOR
        return np.sqrt(scipy.special.expit(log_snr)) * decay, np.sqrt(scipy.special.expit(-log_snr)) * np.ones_like(
            decay
        )

    def estimate(self, t: float) -> tuple[Array, Array]:
        """W, w with E[y_0 | y_t] = W y_t + w."""
        signal, noise = (self.function(c) for c in self.curves(t))
        mean, covariance = self.mean / self.root, self.covariance / np.outer(self.root, self.root)
        gain = covariance @ signal @ np.linalg.inv(signal @ covariance @ signal + noise @ noise)
        return gain, mean - gain @ signal @ mean

    def model(self, grey: float, std: float) -> tuple[Array, Array]:
        """Mean and covariance of (y_1, ..., y_{t_1}, x_0) under the ancestral chain from lambda_1(0) m sqrt(v)."""
        n, count, eye = len(self.mu), self.num_scales, np.eye(len(self.mu))
        ts = [k / count for k in range(count, 0, -1)]
        signal, noise = self.curves(1.0)
        at_grey = math.sqrt(scipy.special.expit(cosine_log_snr(1.0, *self.ends)))
        means = [at_grey * grey * self.root]
        factor = np.zeros(((count + 1) * n, (count + 1) * n))
        factor[:n, :n] = self.function(noise)
        for k, (t, s) in enumerate(zip(ts, [*ts[1:], 0.0], strict=True)):
            gain, offset = self.estimate(t)
            (signal_t, noise_t), (signal_s, noise_s) = self.curves(t), self.curves(s)
            if s > 0:
                tau = 1 - (signal_t * noise_s / signal_s / noise_t) ** 2
                keep = noise_s * np.sqrt(1 - tau) / noise_t
                pull = self.function(signal_s - keep * signal_t)
                matrix, constant = self.function(keep) + pull @ gain, pull @ offset
                own = self.function(noise_s * np.sqrt(tau))
            else:
                back = np.diag(self.root) @ self.function(signal_s)
                matrix, constant, own = back @ gain, back @ offset, np.diag(self.root) * std
            means.append(matrix @ means[-1] + constant)
            rows, before = slice((k + 1) * n, (k + 2) * n), slice(k * n, (k + 1) * n)
            factor[rows] = matrix @ factor[before]
            factor[rows, rows] += own @ eye
        return np.concatenate(means), factor @ factor.T

    def inference(self, x_0: Array) -> tuple[Array, Array]:
        """Mean and covariance of (y_1, ..., y_{t_1}) given x_0."""
        n, count = len(self.mu), self.num_scales
        ts = [k / count for k in range(count, 0, -1)]
        y_0 = x_0 / self.root
        covariance = np.empty((count * n, count * n))
        for (i, t), (j, s) in itertools.product(enumerate(ts), repeat=2):
            later, early = max(t, s), min(t, s)
            both = self.curves(later)[0] / self.curves(early)[0] * self.curves(early)[1] ** 2
            covariance[i * n : (i + 1) * n, j * n : (j + 1) * n] = self.function(both)
        return np.concatenate([self.function(self.curves(t)[0]) @ y_0 for t in ts]), covariance

    def log_p(self, x_0: Array, grey: float, std: float = STD) -> float:
        mean, covariance = self.model(grey, std)
        n = len(self.mu)
        return float(scipy.stats.multivariate_normal.logpdf(x_0, mean[-n:], covariance[-n:, -n:]))

    def bound(self, x_0: Array, grey: float, std: float = STD) -> float:
        """-log p(x_0 | v) + KL(q(y_1, ..., y_{t_1} | x_0) || p(y_1, ..., y_{t_1} | x_0, v))."""
        mean, covariance = self.model(grey, std)
        n = len(self.mu)
        cross = covariance[:-n, -n:] @ np.linalg.inv(covariance[-n:, -n:])
        ours, given = mean[:-n] + cross @ (x_0 - mean[-n:]), covariance[:-n, :-n] - cross @ covariance[-n:, :-n]
        theirs, spread = self.inference(x_0)
        inverse, apart = np.linalg.inv(given), ours - theirs
        dets = np.linalg.slogdet(given)[1] - np.linalg.slogdet(spread)[1]
        divergence = 0.5 * (np.trace(inverse @ spread) + apart @ inverse @ apart - len(apart) + dets)
        return float(divergence) - self.log_p(x_0, grey, std)


class LinearDenoiser(Denoiser):
    """That of the twin of each context."""

    def __init__(self, process: Osmosis, twin_of: Callable[[Array], Twin]) -> None:
        super().__init__(nn.Identity(), process, Clean())
        self.twin_of, self._twins = twin_of, dict[bytes, Twin]()

    def predict_mean(
        self, y_t: Tensor, t: Tensor, s: Tensor, context: Tensor | None = None, labels: Tensor | None = None
    ) -> Tensor:
        assert context is not None
        rows = []
        for y, v in zip(y_t.numpy(), context.numpy()[:, 0], strict=True):
            twin = self._twins.setdefault(v.tobytes(), self.twin_of(v))
            gain, offset = twin.estimate(float(t))
            rows.append(twin.function(twin.curves(float(s))[0]) @ (gain @ y.ravel() + offset))
        return torch.from_numpy(np.stack(rows)).reshape(y_t.shape)


class Scripted(ScriptedNoise):
    """Listed uniform numbers too."""

    def __init__(self, draws: Sequence[Tensor], uniforms: Sequence[float] = ()) -> None:
        super().__init__(draws)
        self.uniforms = list(uniforms)

    def uniform(self, shape: tuple[int, ...] = ()) -> Tensor:
        assert shape == ()
        return torch.full((self.count,), self.uniforms.pop(0), dtype=torch.float64)


def expected(
    denoiser: LinearDenoiser, prior: OsmosisPrior, x_0: Array, white: Array, uniforms: Sequence[float] = ()
) -> tuple[float, float]:
    """The package's bound for a density, averaged over the noise of the chain; and its context's part. For one image
    ``(H, W)``, the guidance's white noise and the uniform numbers that choose what else there is."""
    n = x_0.size
    points = math.sqrt(n) * np.concatenate([np.eye(n), -np.eye(n)]).reshape(2 * n, 1, *x_0.shape)
    rows = torch.from_numpy(np.broadcast_to(x_0, points.shape).copy())
    first = torch.from_numpy(np.broadcast_to(white, points.shape).copy())
    noise = Scripted([first, *[torch.from_numpy(points)] * denoiser.process.num_scales], uniforms)
    found = VariationalBound(denoiser, prior, decoder_std=STD, levels=None)(rows, noise)
    assert not noise.draws and not noise.uniforms
    return float(found.total.mean()), float(found.context.mean())


def blur_matrix(height: int, width: int, sigma: float) -> Array:
    """Gaussian blur with reflecting boundaries, by the DCT."""
    basis = np.kron(dct_basis(height), dct_basis(width))
    mu = np.pi**2 * ((np.arange(height)[:, None] / height) ** 2 + (np.arange(width) / width) ** 2)
    return np.asarray(basis.T @ np.diag(np.exp(-mu.ravel() * sigma**2 / 2)) @ basis)


def pattern_matrix(height: int, width: int, sigma: float) -> Array:
    """White noise to smooth noise of the same average variance."""
    blur = blur_matrix(height, width, sigma)
    return np.asarray(blur / math.sqrt(np.trace(blur @ blur.T) / len(blur)))


def data(n: int) -> tuple[Array, Array]:
    """Mean and covariance of images whose pixels go together, within [0, 1]."""
    rng = np.random.default_rng(n)
    factor = 0.04 * rng.normal(size=(n, n)) + 0.06
    return 0.5 + 0.1 * rng.normal(size=n), factor @ factor.T + 0.002 * np.eye(n)


def fitted(process: Osmosis, training: Array) -> OsmosisPrior:
    prior = OsmosisPrior()
    prior.fit(torch.from_numpy(training[:, None]), process)
    return prior


#: 1 x 2 pixels; the grey values are multiples of 1/64, exact in the float32 that the prior keeps
TRAINING = np.array([[[0.4375, 0.53125]], [[0.625, 0.46875]], [[0.59375, 0.65625]]])
IMAGE = np.array([[0.46, 0.63]])
PAIR = data(2)


def pair(v: Array) -> Twin:
    return Twin(v, *PAIR)


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
    nodes, weights = np.polynomial.hermite_e.hermegauss(6)
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
    start, v = start_law(prior, process, x_0, CounterRNG(1, 20000))
    assert v is not None and start.grey is not None and start.grey.shape == (20000, 1, 1)
    for grey, share in zip(TRAINING.mean((1, 2)), q, strict=True):
        chosen = (start.grey[:, 0, 0].numpy() == grey).mean()
        assert abs(chosen - share) < 4 * math.sqrt(share * (1 - share) / 20000) + 1e-9
    levels = (v - start.grey[..., None]).abs()
    close(levels, 0.1 * np.ones(levels.shape), 1e-12)
