"""The flow's likelihood on Gaussian data, where flow and density are known: exact values, order of convergence."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor, nn

from dpm_scales.denoisers import Denoiser
from dpm_scales.likelihood import FlowLikelihood, follow_flow, start_law
from dpm_scales.operators import HeatOperator
from dpm_scales.priors import GaussianPrior, OsmosisPrior
from dpm_scales.processes import VP, Homogeneous, InverseHeat, OsmosisDiffusion
from dpm_scales.rng import CounterRNG
from dpm_scales.schedules import CosineLogSNR, SinSquaredBlur
from dpm_scales.targets import Clean, NextScale, Noise, Velocity
from support.oracles import (
    GaussianData,
    Hadamard,
    TinyNetwork,
    close,
    coefficients,
    curves,
    gaussian_data,
    images,
    over,
    pixels,
    pretended_gpu,
    refused,
    with_target,
)
from support.osmosis_twins import white_matrix
from support.reference import (
    Array,
    Twin,
    cosine_twin,
    edm_twin,
    linear_chain_twin,
    linear_heat_twin,
)

SMOOTH = [
    cosine_twin(100, -8, 6),
    edm_twin(100, 0.05, 4.0),
    cosine_twin(100, -8, 6, blur_sigma=2.0),
    linear_heat_twin(100, 0.2, 0.4),
    linear_chain_twin(100, 0.4),  # from k = 10 on: below, the noise of the chain grows from nothing within a step
]


H, W = 1, 4


class Differentiable(Denoiser):
    """lambda_s(L) E[y_0 | y_t] of Gaussian data, in torch."""

    def __init__(self, twin: Twin, data: GaussianData) -> None:
        super().__init__(nn.Identity(), twin.build(), Clean())
        self.twin, self.data, self.basis = twin, data, HeatOperator()

    def predict_mean(
        self, y_t: Tensor, t: Tensor, s: Tensor, context: Tensor | None = None, labels: Tensor | None = None
    ) -> Tensor:
        (signal, noise), signal_s = curves(self.twin, float(t), H, W), curves(self.twin, float(s), H, W)[0]
        gain = self.data.variance * signal / (signal**2 * self.data.variance + noise**2)
        slope, offset = (torch.from_numpy(signal_s * v) for v in (gain, (1 - gain * signal) * self.data.mean))
        return self.basis.synthesis(slope * self.basis.analysis(y_t) + offset)


def exact(twin: Twin, data: GaussianData, u: Array, a: float) -> Array:
    """-log p(u_a): N(0, gamma_1^2) at t = 1 drawn along the flow, which keeps (u - mean) / std."""
    (signal_a, noise_a), (signal_1, noise_1) = curves(twin, a, H, W), curves(twin, 1.0, H, W)
    std_a = np.sqrt(signal_a**2 * data.variance + noise_a**2)
    ratio = std_a / np.sqrt(signal_1**2 * data.variance + noise_1**2)
    mean = signal_a * data.mean - ratio * signal_1 * data.mean
    return np.asarray(-scipy.stats.norm.logpdf(u, mean, ratio * noise_1).sum((1, 2, 3)))


def density(twin: Twin, data: GaussianData, y: Tensor, scales: Sequence[float]) -> Array:
    """-log p(y_a) by the package, `scales` descending to a."""
    start, _ = start_law(GaussianPrior(), twin.build(), y, CounterRNG(0, len(y)))
    grid = torch.tensor(scales, dtype=torch.float64)
    last, traces = follow_flow(Differentiable(twin, data), start, y, grid, Hadamard(len(y), H * W), probes=H * W)
    log_volume = np.log(curves(twin, scales[-1], H, W)[1] * np.ones((H, W))).sum()
    return np.asarray((last - traces.sum(1)).numpy() + log_volume)


@over(SMOOTH)
def test_flow_has_the_exact_density_in_the_limit_and_is_of_second_order(twin: Twin) -> None:
    """Five images, 8 to 32 steps: the slope of log(error) over log(steps), and 0.1 nats with 32 of them."""
    data, a = gaussian_data(H, W), 0.2
    signal, noise = curves(twin, a, H, W)
    y = torch.from_numpy(pixels(1.5 * signal * coefficients(images(5, 1, H, W).numpy())))
    y = y + float(noise.max()) * images(5, 1, H, W, seed=1)
    expected = exact(twin, data, coefficients(y.numpy()), a)
    counts = [8, 16, 32]
    errors = [np.abs(density(twin, data, y, np.linspace(1.0, a, n + 1).tolist()) - expected).max() for n in counts]
    slope = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert slope == pytest.approx(2, abs=0.15), errors
    assert errors[-1] < 0.1


def test_traces_are_estimated_without_bias() -> None:
    """One random probe each, 4000 times: the average is the trace by all sign vectors, within 4 standard errors."""
    twin, data = SMOOTH[2], gaussian_data(H, W)
    y = images(1, 1, H, W)
    start, _ = start_law(GaussianPrior(), twin.build(), y, CounterRNG(0, 1))
    grid = torch.tensor([1.0, 0.5, 0.25], dtype=torch.float64)
    truth = follow_flow(Differentiable(twin, data), start, y, grid, Hadamard(1, H * W), probes=H * W)[1]
    many = y.expand(4000, -1, -1, -1)
    for probes in (1, 3):
        found = follow_flow(Differentiable(twin, data), start, many, grid, CounterRNG(1, 4000), probes=probes)[1]
        error = found.std(0) / math.sqrt(4000)
        assert ((found.mean(0) - truth[0]).abs() < 4 * error).all()


class DenseGaussian(Denoiser):
    """E[y_0 | y_t] for y_0 ~ N(0, P(L)), by the eigenvectors of each guidance image's operator."""

    def predict_mean(
        self, y_t: Tensor, t: Tensor, s: Tensor, context: Tensor | None = None, labels: Tensor | None = None
    ) -> Tensor:
        assert context is not None
        mu, vectors = spectrum_of(context)
        signal, noise, signal_s = (
            torch.stack([f(k, row) for row in mu]).reshape(mu.shape)
            for f, k in (
                (self.process.signal_scale, t),
                (lambda k, row: self.process.noise_scale(k, row).expand_as(row), t),
                (self.process.signal_scale, s),
            )
        )
        u = (vectors.mT @ y_t.flatten(1)[..., None])[..., 0]
        factor = signal_s * power(mu) * signal / (signal**2 * power(mu) + noise**2)
        return (vectors @ (factor * u)[..., None]).reshape(y_t.shape)


def power(mu: Tensor) -> Tensor:
    return 0.5 / (0.2 + mu)


def spectrum_of(v: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues ``(B, N)`` and eigenvectors ``(B, N, N)`` of L."""
    matrices = [torch.from_numpy(white_matrix(image[0].numpy())) for image in v]
    mu, vectors = torch.linalg.eigh(torch.stack([(m + m.T) / 2 for m in matrices]))
    return mu.clamp(min=0), vectors


def test_osmosis_has_the_density_of_its_dense_operator() -> None:
    """Data N(0, P(L)) for each guidance image v, 2 x 4 pixels: the flow's density, and its order."""
    law = OsmosisDiffusion(100, CosineLogSNR(-6, 4), SinSquaredBlur(1.0), 0.05)
    x_0, prior = images(2, 1, 2, 4, seed=2), OsmosisPrior()
    prior.fit(torch.zeros(1, 1, 2, 4), law)  # mean grey value 0: N(0, gamma_1^2)
    start, v = start_law(prior, law, x_0, CounterRNG(0, 2))
    assert v is not None
    mu, vectors = spectrum_of(v)
    a, y = 0.3, images(2, 1, 2, 4, seed=3)

    def spread(t: float) -> Array:
        noise = law.noise_scale(t, mu[0]).numpy()
        return np.stack([np.sqrt(law.signal_scale(t, row).numpy() ** 2 * power(row).numpy() + noise**2) for row in mu])

    noise_1, noise_a = (float(law.noise_scale(t, torch.zeros(1))) for t in (1.0, a))
    u = (vectors.mT @ y.flatten(1)[..., None])[..., 0].numpy()
    expected = -scipy.stats.norm.logpdf(u, 0, spread(a) / spread(1.0) * noise_1).sum(1)
    counts, errors = [5, 10, 20], []
    for count in counts:
        grid = torch.linspace(1.0, a, count + 1, dtype=torch.float64)
        denoiser = DenseGaussian(TinyNetwork(), law, Clean())
        last, traces = follow_flow(denoiser, start, y, grid, Hadamard(2, 8), v, probes=8)
        errors.append(np.abs((last - traces.sum(1)).numpy() + 8 * math.log(noise_a) - expected).max())
    slope = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert slope == pytest.approx(2, abs=0.25), errors
    assert errors[-1] < 0.1


@over(SMOOTH[:4])
def test_flow_and_decoder_bound_the_likelihood(twin: Twin) -> None:
    """As a density (`levels=None`), the average over Gaussian data is the data's, and what the laws of y_1 and of the
    decoder lose, within 4 standard errors and 0.1 nats for 100 steps."""
    data, std = gaussian_data(H, W), 0.3
    x_0 = data.sample(1000, seed=1)
    flow = FlowLikelihood(Differentiable(twin, data), GaussianPrior(), 100, decoder_std=std, levels=None)
    found = flow(x_0, CounterRNG(0, 1000))
    assert found.scales.shape == (101,) and found.steps.shape == (1000, 100)
    (signal_1, noise_1), open_ = curves(twin, 1.0, H, W), data.uncertainty(*curves(twin, 0.01, H, W))
    spread = signal_1**2 * data.variance + noise_1**2
    loss = 0.5 * (np.log(noise_1**2 / spread) + (spread + (signal_1 * data.mean) ** 2) / noise_1**2 - 1).sum()
    loss += (np.log(std) - 0.5 * np.log(open_) + open_ / (2 * std**2) - 0.5).sum()
    truth = -scipy.stats.norm.logpdf(coefficients(x_0.numpy()), data.mean, np.sqrt(data.variance)).sum((1, 2, 3))
    excess = found.total.numpy() - truth
    assert excess.mean() == pytest.approx(loss, abs=4 * excess.std() / math.sqrt(1000) + 0.1)


@pytest.mark.parametrize("target", [Clean(clip=False), Noise(), Velocity()], ids=["clean", "noise", "velocity"])
def test_targets_of_a_network_give_its_own_trace(target: Clean | Noise | Velocity) -> None:
    """tr(dm_s / dy) of a nonlinear network, by all sign vectors, against its whole Jacobian matrix: first step."""
    twin = SMOOTH[2]
    denoiser = with_target(twin, target, TinyNetwork())
    y, process = images(1, 1, H, W), denoiser.process
    start, _ = start_law(GaussianPrior(), process, y, CounterRNG(0, 1))
    grid = torch.tensor([1.0, 0.9], dtype=torch.float64)
    found = follow_flow(denoiser, start, y, grid, Hadamard(1, H * W), probes=H * W)[1]
    basis, a, b = HeatOperator(), grid[1], grid[0]
    (signal_a, noise_a), (signal_b, noise_b) = curves(twin, 0.9, H, W), curves(twin, 1.0, H, W)
    own = signal_b * noise_a / noise_b / signal_a - 1

    def answer(y: Tensor, t: Tensor) -> Tensor:
        return basis.analysis(denoiser.predict_mean(basis.synthesis(y), t, a))

    u_a = basis.analysis(y)
    growth, m_a = torch.from_numpy(noise_b / noise_a), answer(u_a, a)
    u_b = growth * (u_a + torch.from_numpy(own) * m_a)
    total = 0.0
    for u, t, factor in ((u_a, a, own), (u_b, b, own * noise_b / noise_a)):
        jacobian = torch.autograd.functional.jacobian(lambda u, t=t: answer(u, t), u).reshape(H * W, H * W)
        total += 0.5 * float((torch.from_numpy(factor).ravel() * jacobian.diagonal()).sum())
    close(found, [[total]], 1e-9, 1e-8)


def test_what_the_flow_can_not_do_is_refused() -> None:
    prior = GaussianPrior()
    with refused("no noise"):
        FlowLikelihood(Denoiser(TinyNetwork(), Homogeneous(4), Clean()), prior)
    with refused("finer-scale"):
        FlowLikelihood(Denoiser(TinyNetwork(), InverseHeat(4), NextScale()), prior)
    with refused("num_scales"):
        FlowLikelihood(Denoiser(TinyNetwork(), VP(1), Clean()), prior)
    for wrong in ({"steps": 0}, {"probes": 0}, {"decoder_std": 0.0}):
        with refused(*wrong):
            FlowLikelihood(Denoiser(TinyNetwork(), VP(4), Clean()), prior, **wrong)


def test_flow_stays_on_the_device_and_never_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    flow = FlowLikelihood(Denoiser(TinyNetwork(), VP(4), Clean()), GaussianPrior(), steps=1)
    # the backward pass itself refuses to work for a GPU that is not there
    monkeypatch.setattr(torch.autograd, "grad", lambda m, y, v, retain_graph: (m * v,))
    with pretended_gpu(flow.denoiser):
        x_0 = torch.rand(2, 1, H, W, device="cuda")
        assert flow(x_0, CounterRNG(0, 2, device="cuda")).total.device.type == "cuda"
