"""The osmosis processes: constant guidance gives the heat operator's processes; other guidance the dense matrices'."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dpm_scales.denoisers import Denoiser
from dpm_scales.operators import OsmosisOperator
from dpm_scales.priors import OsmosisPrior, auto_prior
from dpm_scales.processes import (
    Blurring,
    Homogeneous,
    InverseHeat,
    InverseOsmosis,
    Osmosis,
    OsmosisDiffusion,
    OsmosisFilter,
    Process,
    Spectral,
)
from dpm_scales.rng import CounterRNG
from dpm_scales.samplers import DDIM, Ancestral, Cold, Dissipation, DPMSolver, Heun, Sampler
from dpm_scales.schedules import FlowBlur, LogBlur, LowPass, Rectified, SinSquaredBlur
from dpm_scales.targets import Clean, NextScale, Noise, Target, Velocity
from support.oracles import TinyNetwork, generator, pretended_gpu
from support.osmosis_twins import guidance_images, images, means, white_function

EXACT = 1e-12  # tolerance of the expansion


@dataclass(frozen=True)
class Pair:
    """An osmosis process and its counterpart of the heat operator."""

    name: str
    osmosis: Callable[[], Osmosis]
    heat: Callable[[], Process]
    noisy: bool = True


PAIRS = [
    Pair(
        "osmosis-diffusion",
        lambda: OsmosisDiffusion(20, blur=SinSquaredBlur(4.0), tolerance=EXACT),
        lambda: Blurring(20, blur=SinSquaredBlur(4.0), spectrum="discrete"),
    ),
    Pair(
        "inverse-osmosis",
        lambda: InverseOsmosis(20, blur=LogBlur(0.3, 3.0), tolerance=EXACT),
        lambda: InverseHeat(20, blur=LogBlur(0.3, 3.0), spectrum="discrete"),
    ),
    Pair(
        "osmosis-flow",
        lambda: OsmosisDiffusion(20, Rectified(), FlowBlur(), tolerance=EXACT),
        lambda: Spectral(20, Rectified(), FlowBlur(), min_decay=0.001, spectrum="discrete"),
    ),
    Pair(
        "osmosis-low-pass",
        lambda: OsmosisDiffusion(20, blur=SinSquaredBlur(4.0), color=LowPass(0.2), tolerance=EXACT),
        lambda: Blurring(20, blur=SinSquaredBlur(4.0), color=LowPass(0.2), spectrum="discrete"),
    ),
    Pair(
        "osmosis-filter",
        lambda: OsmosisFilter(20, blur=LogBlur(0.3, 3.0), tolerance=EXACT),
        lambda: Homogeneous(20, blur=LogBlur(0.3, 3.0), spectrum="discrete"),
        noisy=False,
    ),
]
pairs = pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair.name)
noisy_pairs = pytest.mark.parametrize("pair", [pair for pair in PAIRS if pair.noisy], ids=lambda pair: pair.name)
T = torch.tensor([0.1, 0.55, 1.0], dtype=torch.float64)
S = torch.tensor([0.05, 0.4, 0.5], dtype=torch.float64)


def constant(x: Tensor) -> Tensor:
    return torch.full_like(x, 0.37)


def close(actual: Tensor, expected: Tensor, atol: float = 1e-10) -> None:
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0)


def curve(f: Callable[[Tensor], Tensor]) -> Callable[[Any], Any]:
    """A function of tensors for numpy."""
    return lambda mu: np.broadcast_to(f(torch.from_numpy(np.asarray(mu))).numpy(), np.shape(mu))


# --- constant guidance ------------------------------------------------------------------------------------------------


@pairs
def test_constant_guidance_gives_the_law_of_the_heat_operator(pair: Pair) -> None:
    ours, theirs = pair.osmosis(), pair.heat()
    x_0, x_t = images(3, 2, 5, 7), images(3, 2, 5, 7, seed=1)
    v = constant(x_0)
    close(ours.marginal(x_0, T, v).mean, theirs.marginal(x_0, T).mean)
    close(ours.transition(x_0, S, T, v).mean, theirs.transition(x_0, S, T).mean)
    mu = torch.linspace(0, 8, 9, dtype=torch.float64)[None]
    close(ours.noise_scale(T, mu), theirs.noise_scale(T, mu), 1e-15)
    if pair.noisy:
        close(ours.posterior(x_t, x_0, S, T, v).mean, theirs.posterior(x_t, x_0, S, T).mean)
        close(ours.posterior(x_t, x_0, S, T, v).std(mu), theirs.posterior(x_t, x_0, S, T).std(mu), 1e-15)
        entropy = ours.conditional_entropy(0.5, (5, 7), v)
        close(entropy, theirs.conditional_entropy(0.5, (5, 7)).expand_as(entropy))


@noisy_pairs
def test_constant_guidance_gives_the_samples_of_the_heat_operator(pair: Pair) -> None:
    x_0 = images(3, 2, 5, 7)
    ours = pair.osmosis().sample(x_0, T, generator(), constant(x_0))
    close(ours, pair.heat().sample(x_0, T, generator()))


class Blind(torch.nn.Module):
    """A network that does not look at the guidance."""

    def __init__(self, inner: torch.nn.Module, channels: int) -> None:
        super().__init__()
        self.inner, self.channels = inner, channels

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        out: Tensor = self.inner(x[:, : self.channels], t, labels)
        return out


SAMPLERS: list[tuple[Sampler, Target]] = [
    (Ancestral(5), Clean()),
    (DDIM(0.0, 5), Clean()),
    (DDIM(0.5, 5), Velocity()),
    (Ancestral(20), Noise()),
    (Heun(5, grid="uniform", variable="logsnr"), Clean()),
    (DPMSolver(0.0, 5, "uniform"), Clean()),
    (Dissipation(1.25), NextScale()),
    (Cold(5), Clean()),
]


@pairs
@pytest.mark.parametrize(("sampler", "target"), SAMPLERS, ids=lambda x: type(x).__name__)
def test_constant_guidance_gives_every_sampler_step_of_the_heat_operator(
    pair: Pair, sampler: Sampler, target: Target
) -> None:
    if not pair.noisy and isinstance(target, Noise | Velocity):
        return  # refused for both
    network = TinyNetwork(2).double()
    ours = Denoiser(Blind(network, 2), pair.osmosis(), target).double()
    theirs = Denoiser(network, pair.heat(), target).double()
    sampler.check(ours)
    sampler.check(theirs)
    y = images(3, 2, 5, 7, seed=2)
    frames: list[list[Tensor]] = [[], []]
    for kept, denoiser, context in ((frames[0], ours, constant(y)), (frames[1], theirs, None)):
        sampler.reverse(denoiser, y, CounterRNG(0, 3), context, on_step=lambda i, x, kept=kept: kept.append(x.clone()))
    assert len(frames[0]) == len(frames[1]) > 1
    # Where the noise is constant the posterior's std is a root at mu = 0, which no polynomial follows: see `tolerance`;
    # the network's filter sharpens what that leaves.
    rough = isinstance(sampler, DDIM) and sampler.eta > 0 and pair.name == "inverse-osmosis"
    for a, b in zip(*frames, strict=True):
        # errors of the expansion are amplified by 1 / rho where a target divides
        atol = 0.05 * 0.01 if rough else 1e-6 if isinstance(target, Noise) else 1e-8
        torch.testing.assert_close(a, b, atol=atol, rtol=1e-2 if rough else 1e-8)


# --- any guidance -----------------------------------------------------------------------------------------------------


@pairs
def test_marginal_is_the_dense_function_in_white_coordinates(pair: Pair) -> None:
    process, x_0 = pair.osmosis(), images(3, 2, 4, 6)
    v = guidance_images(3, 2, 4, 6)
    root = (v / means(v)).sqrt()
    law = process.marginal(x_0, T, v)
    for b, t in enumerate(T.tolist()):
        f = curve(lambda mu, t=t: process.signal_scale(t, mu))
        expected = root[b : b + 1] * white_function(f, v[b : b + 1], (x_0 / root)[b : b + 1])
        # pixels of v = 1e-6 are a thousand times larger in white coordinates
        close(law.mean[b : b + 1], expected, 1e-8)


@noisy_pairs
def test_posterior_is_gaussian_conditioning_in_white_coordinates(pair: Pair) -> None:
    process, x_0, x_t = pair.osmosis(), images(1, 2, 4, 6), images(1, 2, 4, 6, seed=4)
    v, s, t = guidance_images(1, 2, 4, 6, dark=0.0), 0.3, 0.6
    root = (v / means(v)).sqrt()

    def factor(name: str) -> Callable[[Any], Any]:
        def f(mu: Tensor) -> Tensor:
            a_s, g_s = process.signal_scale(s, mu), process.noise_scale(s, mu)
            a_t, g_t = process.signal_scale(t, mu), process.noise_scale(t, mu)
            gain = (a_t / a_s) * g_s**2 / g_t**2  # Cov(y_s, y_t | y_0) / Var(y_t | y_0)
            return gain if name == "x_t" else a_s - gain * a_t

        return curve(f)

    expected = root * (white_function(factor("x_0"), v, x_0 / root) + white_function(factor("x_t"), v, x_t / root))
    close(process.posterior(x_t, x_0, s, t, v).mean, expected, 1e-8)


def test_noise_in_pixels_has_the_variance_of_the_guidance_image() -> None:
    process = OsmosisDiffusion(20, blur=SinSquaredBlur(4.0))
    x_0 = torch.zeros(20000, 1, 2, 3, dtype=torch.float64)
    v = torch.rand(1, 1, 2, 3, generator=generator(), dtype=torch.float64) + 0.1
    x_t = process.sample(x_0, 0.5, generator(1), v.expand(20000, -1, -1, -1))
    expected = (v / v.mean())[0] * process.noise_scale(0.5, torch.zeros(1, dtype=torch.float64)) ** 2
    close(x_t.var(0), expected, 6 * (2 / 20000) ** 0.5 * float(expected.max()))


@pairs
def test_entropy_adds_the_volume_of_the_guidance_image(pair: Pair) -> None:
    process, v = pair.osmosis(), guidance_images(2, 1, 4, 6, dark=0.0)
    white = process.conditional_entropy(1.0, (4, 6))
    expected = white + 0.5 * (v / means(v)).log().sum((-2, -1))
    close(process.conditional_entropy(1.0, (4, 6), v), expected)
    if pair.noisy:  # one t per sample, and more channels than samples
        v = guidance_images(2, 3, 4, 6, dark=0.0)
        both = process.conditional_entropy(T[1:], (4, 6), v)
        for b, t in enumerate(T[1:].tolist()):
            close(both[b : b + 1], process.conditional_entropy(t, (4, 6), v[b : b + 1]))


def test_steady_state_is_reached_and_the_mean_grey_value_kept() -> None:
    process = OsmosisFilter(3, blur=LogBlur(1.0, 200.0))
    x_0, v = images(2, 3, 4, 6), guidance_images(2, 3, 4, 6, dark=0.0)
    end = process.marginal(x_0, 1.0, v).mean
    close(end, v / means(v) * means(x_0), 1e-6)
    close(process.steady_state(x_0.mean((-2, -1)), v), v / means(v) * means(x_0))


# --- guidance and prior -----------------------------------------------------------------------------------------------


@pairs
def test_auto_prior_is_that_of_guidance_images(pair: Pair) -> None:
    assert isinstance(auto_prior(pair.osmosis()), OsmosisPrior)


@pairs
def test_prior_is_the_steady_state_and_noise(pair: Pair) -> None:
    process, prior = pair.osmosis(), OsmosisPrior(noise_ratio=0.5)
    data = images(7, 2, 5, 4)
    prior.fit(data, process)
    y, v = prior.sample(process, CounterRNG(3, 400), (2, 5, 4), torch.float64)
    assert v is not None and v.shape == (400, 2, 5, 4)
    root = (v / means(v)).sqrt()
    grey = data.mean((-2, -1))
    zero = torch.zeros((), dtype=torch.float64)
    signal, noise = process.signal_scale(1.0, zero), process.noise_scale(1.0, zero)
    # whose grey values a sample took: those for which what is left is noise
    left = y[:, None] - signal * root[:, None] * grey[None, :, :, None, None]
    residual = left.pow(2).mean((2, 3, 4)).amin(1)
    close(residual.mean(), (0.5 * noise) ** 2, 0.03 * float(noise) ** 2 + 1e-12)
    if pair.noisy:
        return
    assert left.pow(2).mean((2, 3, 4)).argmin(1).unique().numel() == 7


# --- training and devices ---------------------------------------------------------------------------------------------


def test_cold_diffusion_with_the_true_image_walks_the_trajectory_back() -> None:
    """With x_0-hat = x_0 every step of Algorithm 2 lands on the filter's own evolution."""

    class Truth(torch.nn.Module):
        def __init__(self, x_0: Tensor) -> None:
            super().__init__()
            self.x_0 = x_0

        def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
            return self.x_0

    process = OsmosisFilter(20, blur=LogBlur(0.3, 3.0), tolerance=EXACT)
    x_0, v = images(2, 1, 4, 6), guidance_images(2, 1, 4, 6, dark=0.0)
    denoiser = Denoiser(Truth(x_0), process, Clean(preconditioning="none", clip=False)).double()
    operator = OsmosisOperator(v, process.degree)
    start = process.marginal(x_0, 1.0, v).mean
    seen: list[Tensor] = []
    sampler = Cold(5)
    sampler.reverse(denoiser, operator.to_white(start), CounterRNG(0, 2), v, on_step=lambda i, x: seen.append(x))
    for t, x in zip(sampler.scales(process)[1:].tolist(), seen, strict=True):
        close(x, process.marginal(x_0, t, v).mean, 1e-8)


@pairs
@pytest.mark.parametrize("target", [Clean(), NextScale()], ids=lambda t: type(t).__name__)
def test_losses_have_gradients(pair: Pair, target: Target) -> None:
    process = pair.osmosis()
    low, high = process.value_range
    network = torch.nn.Conv2d(4, 2, 1)

    class Wrapped(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = network

        def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
            out: Tensor = self.conv(x)
            return out

    denoiser = Denoiser(Wrapped(), process, target)
    loss = denoiser.loss(low + (high - low) * images(3, 2, 5, 7, dtype=torch.float32), T, generator=generator())
    loss.mean().backward()  # type: ignore[no-untyped-call]
    assert loss.shape == (3,) and bool(torch.isfinite(loss).all())
    assert network.weight.grad is not None and float(network.weight.grad.abs().sum()) > 0


@pairs
def test_law_loss_and_sampler_stay_on_the_device(pair: Pair) -> None:
    process = pair.osmosis()
    denoiser = Denoiser(Blind(TinyNetwork(2), 2), process, Clean())
    prior = OsmosisPrior()
    prior.fit(images(7, 2, 5, 7, dtype=torch.float32), process)
    sampler = Ancestral(3) if pair.noisy else Cold(3)
    sampler.check(denoiser)
    with pretended_gpu(denoiser, prior):
        x_0 = torch.rand(3, 2, 5, 7, device="cuda")
        t = torch.rand(3, device="cuda", dtype=torch.float64)
        v = process.context(x_0)
        assert process.sample(x_0, t, context=v).device.type == "cuda"
        assert denoiser.loss(x_0, t).device.type == "cuda"
        scales = torch.tensor([1.0, 0.5, 0.25, 0.0], device="cuda", dtype=torch.float64)
        out = sampler.sample(denoiser, prior, CounterRNG(0, 3, device="cuda"), (2, 5, 7), scales=scales)
        assert out.device.type == "cuda"
