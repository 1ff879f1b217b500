"""Autoguidance: the formula on two ideal denoisers, its ends to the bit, one call of each network, clipping."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dpm_scales.denoisers import Denoiser
from dpm_scales.guidance import Autoguidance, ListedGuidance
from dpm_scales.likelihood import VariationalBound
from dpm_scales.priors import GaussianPrior
from dpm_scales.processes import VP, Blurring, OsmosisDiffusion
from dpm_scales.rng import CounterRNG
from dpm_scales.samplers import DDIM, Ancestral, DPMSolver, Heun, Sampler
from dpm_scales.targets import Clean, Noise, Velocity
from support.mixtures import mixture
from support.oracles import (
    H,
    TinyNetwork,
    W,
    close,
    coefficients,
    curves,
    float64,
    generator,
    images,
    named,
    over,
    pixels,
    pretended_gpu,
)
from support.reference import Twin


class Counted(TinyNetwork):
    """Notes the images and labels of each call; `worse` changes its answers."""

    def __init__(self, worse: float = 1.0, channels: int = 1) -> None:
        super().__init__(channels)
        self.worse = worse
        self.seen: list[tuple[int, list[int] | None]] = []

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        self.seen.append((len(x), None if labels is None else labels.tolist()))
        return self.worse * super().forward(self.worse * x, t, labels)


def pair(target: Any = None, process: Any = None) -> tuple[Denoiser, Denoiser]:
    """Return a model and its guide, in float64."""
    process, target = process or VP(8), target or Clean(clip=False)
    return Denoiser(Counted(), process, target).double(), Denoiser(Counted(0.6), process, target).double()


@over(named("vp-cosine", "ve-edm", "blurring"))
def test_guided_estimate_is_the_formula(twin: Twin) -> None:
    """m_s = lambda_s(L) (G + w (D - G)), for numbers and by frequency; D and G in closed form, to 1e-10."""
    (network, model), (worse, guide) = mixture(twin), mixture(twin, seed=11)
    y, labels, t, s = images(3, 1, H, W) * 2, torch.tensor([0, 1, 1]), [0.5, 0.75, 1.0], [0.25, 0.5, 0.5]
    u = coefficients(y.numpy())
    frequency = np.hypot(np.arange(H)[:, None] / H, np.arange(W) / W) / 2
    listed = ListedGuidance([0.5, 3.0], [0.1, 0.4])
    for scale, weight in ((0.0, 0.0), (0.5, 0.5), (2.5, 2.5), (listed, np.interp(frequency, [0.1, 0.4], [0.5, 3.0]))):
        network.calls = worse.calls = 0
        actual = Autoguidance(model, guide, scale).predict_mean(y, float64(t), float64(s), None, labels)
        assert (network.calls, worse.calls) == (1, 1)
        for b in range(3):
            good, bad = (one.estimate(u[b], t[b], int(labels[b])) for one in (network, worse))
            assert np.abs(good - bad).max() > 1e-3
            expected = curves(twin, s[b])[0] * (bad + weight * (good - bad))
            close(coefficients(actual[b].numpy()), expected, 1e-10 * (1 + np.abs(expected).max()))


def test_sampling_follows_the_formula_to_the_end() -> None:
    """DDIM's steps by hand, mode by mode, with the explicit guided estimate."""
    twin = named("blurring")[0]
    (network, model), (worse, guide) = mixture(twin), mixture(twin, seed=11)
    y, labels = images(2, 1, H, W), torch.tensor([1, 0])
    scales = [1.0, 0.5, 0.25, 0.0]
    guided = Autoguidance(model, guide, 2.0)
    found = DDIM(0.0, 3).reverse(guided, y, CounterRNG(0, 2), None, labels, float64(scales))
    for b in range(2):
        u = coefficients(y[b, 0].numpy())
        for t, s in zip(scales, scales[1:], strict=False):
            good, bad = (one.estimate(u, t, int(labels[b])) for one in (network, worse))
            estimate = bad + 2 * (good - bad)
            (signal, noise), (after, left) = curves(twin, t), curves(twin, s) if s > 0 else (1.0, 0.0)
            u = after * estimate + left / noise * (u - signal * estimate)
        close(found[b, 0].numpy(), pixels(u), 1e-9 * (1 + np.abs(u).max()))


SAMPLERS: list[Sampler] = [Ancestral(4), DDIM(0.0, 4), Heun(4, "uniform"), DPMSolver(1.0, 4, "uniform")]


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda sampler: type(sampler).__name__)
def test_a_weight_of_one_is_the_model_and_of_zero_the_guide_to_the_bit(sampler: Sampler) -> None:
    """A model that guides itself is unguided; each network is called once an evaluation."""
    model, guide = pair()
    evaluations = 7 if isinstance(sampler, Heun) else 4

    def drawn(denoiser: Any) -> Tensor:
        for one in (model, guide):
            one.network.seen.clear()
        settings = (denoiser, GaussianPrior(), CounterRNG(1, 3), (1, H, W), torch.tensor([0, 1, 0]))
        return sampler.sample(*settings, dtype=torch.float64)

    alone, worse = drawn(model), drawn(guide)
    assert torch.equal(drawn(Autoguidance(model, guide, 1.0)), alone)
    assert torch.equal(drawn(Autoguidance(model, guide, 0.0)), worse)
    assert torch.equal(drawn(Autoguidance(model, model, 3.0)), alone)
    assert not torch.equal(drawn(Autoguidance(model, guide, 2.0)), alone)
    assert model.network.seen == guide.network.seen == [(3, [0, 1, 0])] * evaluations


def test_a_guide_without_labels_sees_none() -> None:
    model, guide = pair()
    y, t, labels = images(2, 1, H, W), float64(0.5), torch.tensor([0, 1])
    found = Autoguidance(model, guide, 2.0, guide_labels=False).predict_mean(y, t, t, None, labels)
    assert model.network.seen == [(2, [0, 1])] and guide.network.seen == [(2, None)]
    good, bad = model.predict_mean(y, t, t, None, labels), guide.predict_mean(y, t, t)
    close(found.detach().numpy(), (bad + 2 * (good - bad)).detach().numpy(), 1e-12)


@pytest.mark.parametrize("target", [Noise(), Velocity(), Clean(clip=False)])
def test_every_targets_clean_images_are_guided_alike(target: Any) -> None:
    model, guide = pair(target, Blurring(8))
    y, t, s = images(2, 1, H, W), float64(0.75), float64(0.625)
    found = Autoguidance(model, guide, 2.5).predict_mean(y, t, s)
    good, bad = (one.predict_mean(y, t, s) for one in (model, guide))
    close(found.detach().numpy(), (bad + 2.5 * (good - bad)).detach().numpy(), 1e-9)


def test_guided_images_are_clipped_once_and_after_guidance() -> None:
    y, t, s = 3 * images(2, 1, H, W), float64(0.75), float64(0.0)
    clipped, free = (Autoguidance(*pair(target), 20.0).predict_mean(y, t, s) for target in (Clean(), None))
    assert float(free.detach().abs().max()) > 1.1
    close(clipped.detach().numpy(), free.detach().clamp(-1, 1).numpy(), 1e-12)


def test_outside_the_interval_the_model_answers_alone() -> None:
    model, guide = pair()
    y, t, labels = images(2, 1, H, W), float64([0.5, 0.75]), torch.tensor([0, 1])
    log_snr = model.process.log_snr(t, torch.zeros(1).double()).flatten().tolist()
    alone, everywhere = (one.predict_mean(y, t, t, None, labels) for one in (model, Autoguidance(model, guide, 4.0)))
    for interval, variable in (([0.7, 0.8], "t"), ([log_snr[1], log_snr[1] + 0.1], "logsnr")):
        found = Autoguidance(model, guide, 4.0, interval, variable).predict_mean(y, t, t, None, labels)
        assert torch.equal(found[0], alone[0]) and torch.equal(found[1], everywhere[1])
    assert not torch.equal(alone[0], everywhere[0])


def test_both_answer_for_the_same_guidance_image_of_osmosis() -> None:
    process = OsmosisDiffusion(8)

    class FirstChannel(Counted):
        def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
            return super().forward(x[:, :1], t, labels) + 0.1 * x[:, 1:]

    model, guide = (Denoiser(FirstChannel(worse), process, Clean(clip=False)).double() for worse in (1.0, 0.6))
    x_0, t, s = images(2, 1, 6, 9), float64(0.75), float64(0.5)
    context = process.context(x_0, generator())
    found = Autoguidance(model, guide, 3.0).predict_mean(x_0, t, s, context)
    good, bad = (one.predict_mean(x_0, t, s, context) for one in (model, guide))
    close(found.detach().numpy(), (bad + 3 * (good - bad)).detach().numpy(), 1e-8)


def test_the_bound_of_a_guided_chain_is_that_of_its_estimates() -> None:
    """As for guidance by labels the chain is another one; a model that guides itself keeps its own."""
    model, guide = pair(process=Blurring(8))
    x_0 = images(2, 1, H, W)

    def bound(denoiser: Any) -> Tensor:
        return VariationalBound(denoiser, GaussianPrior())(x_0, CounterRNG(0, 2)).total.detach()

    alone, guided = bound(model), bound(Autoguidance(model, guide, 2.0))
    assert torch.equal(bound(Autoguidance(model, model, 2.0)), alone)
    assert guided.isfinite().all() and not torch.equal(guided, alone)


def test_model_and_guide_move_together_and_stay_on_the_device() -> None:
    model, guide = (Denoiser(Counted(worse, 2), Blurring(8), Clean()) for worse in (1.0, 0.6))
    guided = Autoguidance(model, guide, ListedGuidance([1, 2]), [-3.0, 4.0], "logsnr")
    assert guided.network is model.network and guided.guide is guide
    with pretended_gpu(guided):
        y = torch.randn(4, 2, 6, 9, device="cuda")
        t = torch.full((), 0.5, dtype=torch.float64, device="cuda")
        assert guided.predict_mean(y, t, t / 2).device.type == "cuda"
