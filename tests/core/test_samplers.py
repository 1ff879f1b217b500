"""The loop of the samplers: grids, what is refused, the last step, reproducibility, labels, reports."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from dpm_scales.denoisers import Denoiser
from dpm_scales.networks import UNet
from dpm_scales.priors import GaussianPrior, auto_prior
from dpm_scales.processes import VE, VP, Blurring, BlurringChain, Homogeneous, InverseHeat, Process
from dpm_scales.rng import CounterRNG
from dpm_scales.samplers import (
    DDIM,
    Ancestral,
    Dissipation,
    Heun,
    Sampler,
    StepContext,
    auto_sampler,
)
from dpm_scales.schedules import (
    ConstantNoise,
    LinearBeta,
    ListedBeta,
    LogBlur,
)
from dpm_scales.targets import Clean, NextScale, Noise, Target, Velocity
from support.oracles import (
    BY_NAME,
    MEMBERS,
    Answer,
    GaussianData,
    H,
    OracleDenoiser,
    ScriptedNoise,
    TinyNetwork,
    W,
    close,
    coefficients,
    curves,
    float64,
    gaussian_data,
    images,
    named,
    over,
    pixels,
    with_target,
)
from support.reference import TWINS, Twin
from support.samplers import SAMPLERS

samplers = pytest.mark.parametrize("name", list(SAMPLERS))
TARGETS: dict[str, Callable[[], Target]] = {
    "clean": Clean,
    "noise": Noise,
    "velocity": Velocity,
    "finer": NextScale,
}


class Smooth(nn.Module):
    """Pixel by pixel: no sum whose rounding depends on the batch."""

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        shift = t if labels is None else t + labels
        return torch.sin(2 * x + shift[:, None, None, None])


def of(process: Process, target: Target | None = None, network: nn.Module | None = None) -> Denoiser:
    return Denoiser(network or Smooth(), process, target or Clean())


# --- the steps --------------------------------------------------------------------------------------------------------


@samplers
@over(TWINS)
def test_last_step_returns_the_estimate_without_noise(twin: Twin, name: str) -> None:
    """E[y_0 | y_t] at the last scale before 0, and nothing is drawn for it."""
    denoiser = with_target(twin, Clean(clip=False), TinyNetwork())
    y, t = images(2, 1, H, W), 1 / twin.num_scales
    end = SAMPLERS[name]().reverse(denoiser, y, ScriptedNoise([]), scales=float64([t, 0.0]))
    expected = denoiser.predict_mean(y, float64(t), float64(0.0)).detach()
    assert torch.equal(end, expected)


@over(named(*MEMBERS))
def test_ddim_of_eta_one_is_ancestral_and_of_eta_zero_draws_nothing(twin: Twin) -> None:
    denoiser, y = with_target(twin, Clean(), TinyNetwork()), images(3, 1, H, W)
    ends = [sampler.reverse(denoiser, y, CounterRNG(2, 3)) for sampler in (Ancestral(), DDIM(1.0, None))]
    assert torch.equal(*ends)
    silent = DDIM(0.0, None).reverse(denoiser, y, ScriptedNoise([]))
    assert torch.equal(silent, DDIM(0.0, None).reverse(denoiser, y, CounterRNG(9, 3)))
    if not isinstance(denoiser.process, Homogeneous):
        assert not torch.equal(*[DDIM(0.0, None).reverse(denoiser, y, CounterRNG(9, 3)), ends[0]])
        noisy = [DDIM(0.4, None).reverse(denoiser, y, CounterRNG(seed, 3)) for seed in (2, 3)]
        assert not torch.equal(*noisy)


@pytest.mark.parametrize("name", ["clean", "velocity", "noise"])
@over(named("vp-cosine", "ve-edm", "blurring"))
def test_ancestral_step_draws_from_the_posterior_given_the_estimate(twin: Twin, name: str) -> None:
    """The step is `Process.posterior`, with the estimate in the image's place."""
    denoiser = with_target(twin, TARGETS[name](), TinyNetwork())
    process, y, white = denoiser.process, images(2, 1, H, W), images(2, 1, H, W, seed=1)
    s, t = float64(0.5), float64(0.625)
    with torch.no_grad():
        m = denoiser.predict_mean(y, t, s)
        estimate = denoiser.predict_mean(y, t, float64(0.0))
        actual = Ancestral().step(StepContext(denoiser, t, s, ScriptedNoise([white])), y, m)
    law = process.posterior(y, estimate, s, t)
    expected = law.mean + law.operator.apply(law.std, white)
    close(actual.numpy(), expected.numpy(), 1e-8)


@samplers
@pytest.mark.parametrize("make", [lambda: Homogeneous(20), lambda: Homogeneous(20, LogBlur(0.5, 128))])
def test_a_process_without_noise_is_walked_without_nan(make: Callable[[], Process], name: str) -> None:
    """All samplers but cold do the same, y_s = m_s (Heun looks again at s), and end at the network's last estimate."""
    denoiser = of(make(), network=TinyNetwork())
    prior = auto_prior(denoiser.process)
    prior.fit(images(4, 1, 6, 9), denoiser.process)
    sampler = SAMPLERS[name]()
    end = sampler.sample(denoiser, prior, CounterRNG(0, 3), (1, 6, 9))
    assert end.isfinite().all() and end.abs().max() < 2
    if name not in ("heun", "cold"):
        plain = Dissipation(0.0).sample(denoiser, prior, CounterRNG(0, 3), (1, 6, 9))
        close(end.numpy(), plain.numpy(), 1e-5)


def test_heun_takes_an_euler_step_to_a_scale_without_noise() -> None:
    """A chain whose first beta is 0: gamma / lambda = 0 at k = 1, where there is nothing left to correct."""
    denoiser = of(VP(4, ListedBeta([0.0, 0.3, 0.3, 0.3])))
    y = images(2, 1, H, W)
    ends = [s.reverse(denoiser, y, ScriptedNoise([]), scales=float64([0.5, 0.25, 0.0])) for s in (Heun(), DDIM())]
    assert ends[0].isfinite().all()
    close(ends[0].numpy(), ends[1].numpy(), 1e-12)
    assert Heun(4, "uniform", variable="logsnr").reverse(denoiser, y, ScriptedNoise([])).isfinite().all()


HEAVY: dict[str, Callable[[], Process]] = {
    "vp": VP,
    "vp-linear": lambda: VP(1000, LinearBeta()),
    "ve": VE,
    "heat": lambda: InverseHeat(200, blur=LogBlur(0.5, 128)),
    "constant": lambda: InverseHeat(200, ConstantNoise(0.1)),
    "blurring": lambda: Blurring(200, blur=LogBlur(0.5, 128)),
    "chain": lambda: BlurringChain(50),
    "homogeneous": Homogeneous,
}


@pytest.mark.parametrize(
    ("name", "target"), [(n, t) for n in HEAVY for t in ("clean", "velocity") if (n, t) != ("homogeneous", "velocity")]
)
def test_published_schedules_are_walked_in_float32_without_overflow(name: str, target: str) -> None:
    """Rectangles of 12 x 16 pixels, 5 or 10 steps, from the process's own prior."""
    process = HEAVY[name]()
    denoiser = of(process, TARGETS[target](), TinyNetwork())
    prior = auto_prior(process)
    prior.fit(images(4, 1, 12, 16), process)
    for sampler in (
        Ancestral(10),
        DDIM(0.0, 10),
        Heun(5, "uniform"),
        Dissipation(1.25, 10),
        auto_sampler(denoiser, 10),
    ):
        x = sampler.sample(denoiser, prior, CounterRNG(0, 2), (1, 12, 16))
        assert x.dtype == torch.float32 and x.shape == (2, 1, 12, 16) and x.isfinite().all(), type(sampler)
        assert x.abs().max() < 1000


# --- batches, labels, reports -----------------------------------------------------------------------------------------


def in_parts(sampler: Sampler, denoiser: Denoiser, parts: list[int], dtype: torch.dtype) -> Tensor:
    prior, first, ends = auto_prior(denoiser.process), 0, []
    prior.fit(images(5, 1, H, W), denoiser.process)
    for count in parts:
        noise = CounterRNG(4, count, first)
        labels = torch.arange(first, first + count) % 3
        ends.append(sampler.sample(denoiser, prior, noise, (1, H, W), labels, dtype=dtype))
        first += count
    return torch.cat(ends)


@samplers
@pytest.mark.parametrize("process", [VP(8), VE(8)], ids=["vp", "ve"])
def test_same_seed_gives_the_same_bits_in_any_batches(process: Process, name: str) -> None:
    """In float32, where neither process nor network sums over pixels: the sampler itself adds nothing."""
    denoiser = of(process)
    whole = in_parts(SAMPLERS[name](), denoiser, [6], torch.float32)
    for parts in ([1] * 6, [4, 2], [5, 1]):
        assert torch.equal(in_parts(SAMPLERS[name](), denoiser, parts, torch.float32), whole)


@samplers
@over(named(*MEMBERS))
def test_same_seed_gives_the_same_images_in_any_batches(twin: Twin, name: str) -> None:
    """With convolutions, which may round differently in another batch: to 1e-9 in float64."""
    check_batches(with_target(twin, Clean(clip=False), TinyNetwork()), name)


def test_same_seed_gives_the_same_images_in_any_batches_of_a_unet() -> None:
    torch.manual_seed(0)
    network = UNet(1, 1, [8], 1, [0], 8, num_classes=3)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.2)
    check_batches(with_target(BY_NAME["blurring"], Clean(clip=False), network.eval()), "ddim-0.4")


def check_batches(denoiser: Denoiser, name: str) -> None:
    whole = in_parts(SAMPLERS[name](), denoiser, [5], torch.float64)
    scale = float(whole.abs().max())
    assert scale > 0.01 and whole[0].sub(whole[1]).abs().max() > 1e-4 * scale
    parts = in_parts(SAMPLERS[name](), denoiser, [1, 4], torch.float64)
    close(parts.numpy(), whole.numpy(), 1e-9 * scale)


def test_seeds_and_labels_matter() -> None:
    denoiser, prior, size = of(VP(8)), GaussianPrior(), (1, H, W)
    one, two = (Ancestral().sample(denoiser, prior, CounterRNG(seed, 2), size) for seed in (1, 2))
    assert not torch.equal(one, two) and not torch.equal(one[0], one[1])
    labelled = Ancestral().sample(denoiser, prior, CounterRNG(1, 2), size, torch.tensor([0, 1]))
    assert torch.equal(labelled[0], one[0]) and not torch.equal(labelled[1], one[1])


@samplers
def test_labels_and_scales_reach_every_evaluation(name: str) -> None:
    network = Answer(torch.zeros(2, 1, H, W))
    labels = torch.tensor([2, 0])
    SAMPLERS[name]().sample(of(VP(4), network=network), GaussianPrior(), CounterRNG(0, 2), (1, H, W), labels)
    assert all(given is labels for _, _, given in network.seen)
    evaluated = [t.tolist() for _, t, _ in network.seen]
    once = [1.0, 0.75, 0.5, 0.25]
    wanted = [1.0, 0.75, 0.75, 0.5, 0.5, 0.25, 0.25] if name == "heun" else once
    assert evaluated == [[t, t] for t in wanted]


class Bright(VP):
    """Pixels are twice the white coordinates, and the context says what to add for the network."""

    context_channels = 1

    def context_features(self, context: Tensor | None) -> Tensor | None:
        return context


@samplers
def test_context_reaches_every_evaluation(name: str) -> None:
    network, context = Answer(torch.zeros(2, 1, H, W).double()), images(2, 1, H, W)
    SAMPLERS[name]().reverse(of(Bright(4), network=network), images(2, 1, H, W), CounterRNG(0, 2), context)
    assert len(network.seen) == (7 if name == "heun" else 4)
    assert all(torch.equal(seen[:, 1:], context) for seen, _, _ in network.seen)


@samplers
@over(named("vp-cosine", "blurring"))
def test_each_step_is_reported(twin: Twin, name: str) -> None:
    denoiser = OracleDenoiser(twin, gaussian_data())
    seen: list[tuple[int, Tensor]] = []
    y, sampler = images(2, 1, H, W), SAMPLERS[name]()
    end = sampler.reverse(denoiser, y, CounterRNG(1, 2), on_step=lambda i, x: seen.append((i, x)))
    assert [i for i, _ in seen] == list(range(8)) and torch.equal(seen[-1][1], end)
    # what is reported is the path itself: the first step alone leads to the first report
    first = sampler.scales(denoiser.process)[:2]
    m = denoiser.predict_mean(y, first[0], first[1])
    assert torch.equal(sampler.step(StepContext(denoiser, first[0], first[1], CounterRNG(1, 2)), y, m), seen[0][1])
    counts: list[int] = []
    sampler.sample(
        denoiser, GaussianPrior(), CounterRNG(1, 2), (1, H, W), on_step=lambda i, x: counts.append(i), dtype=y.dtype
    )
    assert counts == list(range(8))


def test_sampling_starts_at_the_prior_and_follows_the_given_scales() -> None:
    network = Answer(torch.zeros(3, 1, H, W))
    denoiser = of(VP(8), network=network)
    Ancestral().sample(denoiser, GaussianPrior(), CounterRNG(0, 3), (1, H, W), scales=float64([1.0, 0.3, 0.0]))
    start, _ = GaussianPrior().sample(denoiser.process, CounterRNG(0, 3), (1, H, W))
    seen, t, _ = network.seen[0]
    # c_in at t = 1: the variance of the noise and of data of standard deviation 0.5
    signal, noise = curves(BY_NAME["vp-cosine"], 1.0)
    close(seen.numpy(), (start / math.sqrt(0.25 * signal[0, 0] ** 2 + noise[0, 0] ** 2)).numpy(), 1e-6)
    assert [float(t[0]) for _, t, _ in network.seen] == pytest.approx([1.0, 0.3])


def test_nothing_is_recorded_for_gradients() -> None:
    denoiser = of(VP(4), network=TinyNetwork())
    assert not Ancestral().sample(denoiser, GaussianPrior(), CounterRNG(0, 1), (1, H, W)).requires_grad
    assert not Heun(4).reverse(denoiser, images(1, 1, H, W), CounterRNG(0, 1)).requires_grad


# --- the best estimate, through every target --------------------------------------------------------------------------


class IdealNoise(nn.Module):
    """E[eps | x_t] for Gaussian data; sees c_in x_t."""

    def __init__(self, twin: Twin, data: GaussianData, data_std: float) -> None:
        super().__init__()
        self.twin, self.data, self.data_std = twin, data, data_std

    def forward(self, seen: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        signal, noise = curves(self.twin, float(t[0]))
        u = coefficients(seen.numpy()) * math.sqrt(signal[0, 0] ** 2 * self.data_std**2 + noise[0, 0] ** 2)
        return torch.from_numpy(pixels((u - signal * self.data.estimate(u, signal, noise)) / noise))


@pytest.mark.parametrize("sampler", [Ancestral(), DDIM(0.0, None), Heun(8), Dissipation(1.0)])
@over(named("vp-constant", "vp-cosine", "ve-edm"))
def test_ideal_noise_network_samples_as_the_ideal_denoiser_does(twin: Twin, sampler: Sampler) -> None:
    data, y = gaussian_data(), images(3, 1, H, W)
    network = IdealNoise(twin, data, 0.5)
    actual = sampler.reverse(with_target(twin, Noise(), network), y, CounterRNG(1, 3))
    expected = sampler.reverse(OracleDenoiser(twin, data), y, CounterRNG(1, 3))
    close(actual.numpy(), expected.numpy(), 1e-8, 1e-8)
