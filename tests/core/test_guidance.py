"""Classifier-free guidance: the formula on a mixture of Gaussians, its ends to the bit, intervals, batches, devices."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dpm_scales.denoisers import BaseDenoiser, Denoiser
from dpm_scales.editing import Consistent, Mask, encode
from dpm_scales.guidance import ClassifierFreeGuidance
from dpm_scales.likelihood import FlowLikelihood
from dpm_scales.priors import GaussianPrior
from dpm_scales.processes import VE, VP, Blurring, InverseHeat, OsmosisDiffusion
from dpm_scales.rng import CounterRNG
from dpm_scales.samplers import DDIM, Ancestral, Dissipation, DPMSolver, Heun, Sampler, UniPC
from dpm_scales.spectrum import DataSpectrum
from dpm_scales.targets import Clean, NextScale, Noise, Target, Velocity
from support.flows import SMOOTH
from support.mixtures import NULL, mixture
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
    pretended_gpu,
    refused,
    with_target,
)
from support.reference import Twin

HEAT = next(twin for twin in SMOOTH if twin.name == "heat")  # enough noise to keep the classes apart from certainty


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 2.0, 7.5])
@over([*named("vp-cosine", "ve-edm", "blurring"), HEAT])
def test_guided_estimate_is_the_formula(twin: Twin, scale: float) -> None:
    """m_s = lambda_s(L) (D + scale (D_label - D)), one call of the network for both; D and D_label in closed form."""
    network, denoiser = mixture(twin)
    y, labels, t = images(3, 1, H, W) * 2, torch.tensor([0, 1, 1]), [0.5, 0.75, 1.0]
    s = [0.25, 0.5, 0.5]
    guided = ClassifierFreeGuidance(denoiser, NULL, scale)
    actual = guided.predict_mean(y, float64(t), float64(s), None, labels)
    assert network.calls == 1
    u = coefficients(y.numpy())
    for b in range(3):
        with_label = network.estimate(u[b], t[b], int(labels[b]))
        without = network.estimate(u[b], t[b], NULL)
        assert np.abs(with_label - without).max() > 1e-4
        expected = curves(twin, s[b])[0] * (without + scale * (with_label - without))
        close(coefficients(actual[b].numpy()), expected, 1e-9 * (1 + np.abs(expected).max()))


SAMPLERS: list[Sampler] = [
    *(Ancestral(), DDIM(0.0, None), Heun(None, "uniform"), Heun(None, "uniform", s_churn=8.0)),
    *(DPMSolver(0.0, None, "uniform"), UniPC(2, None, "uniform"), Dissipation()),
]


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda sampler: type(sampler).__name__)
def test_scale_one_is_unguided_and_zero_unconditional_to_the_bit(sampler: Sampler) -> None:
    """In every sampler, and they differ from each other and from a scale of 2."""
    denoiser = Denoiser(TinyNetwork(), VP(6), Clean())
    labels, null = torch.tensor([0, 1, 0]), torch.full((3,), NULL)

    def drawn(denoiser: Denoiser, labels: Tensor) -> Tensor:
        return sampler.sample(denoiser, GaussianPrior(), CounterRNG(1, 3), (1, H, W), labels)

    ends = [drawn(ClassifierFreeGuidance(denoiser, NULL, scale), labels) for scale in (0.0, 1.0, 2.0)]
    assert torch.equal(ends[0], drawn(denoiser, null)) and torch.equal(ends[1], drawn(denoiser, labels))
    assert not torch.equal(ends[0], ends[1]) and not torch.equal(ends[1], ends[2])


def test_network_is_called_once_a_step_with_both_halves() -> None:
    seen: list[tuple[Tensor, Tensor, Tensor | None]] = []

    class Watched(TinyNetwork):
        def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
            seen.append((x, t, labels))
            return super().forward(x, t, labels)

    guided = ClassifierFreeGuidance(Denoiser(Watched(), VP(4), Clean()), NULL, 3.0)
    DDIM(0.0, 4).sample(guided, GaussianPrior(), CounterRNG(0, 2), (1, H, W), torch.tensor([0, 1]))
    assert len(seen) == 4
    for x, t, labels in seen:
        assert x.shape[0] == 4 and torch.equal(x[:2], x[2:]) and torch.equal(t[:2], t[2:])
        assert labels is not None and labels.tolist() == [0, 1, NULL, NULL]


@pytest.mark.parametrize("variable", ["t", "logsnr"])
def test_outside_the_interval_the_label_is_followed_and_no_more(variable: str) -> None:
    """Scale by scale, both ends belonging to the interval; to the bit."""
    denoiser, labels = Denoiser(TinyNetwork(), VP(8), Clean(clip=False)).double(), torch.tensor([0, 1])
    y, ts = images(2, 1, H, W), float64([0.25, 0.5, 0.75, 1.0])
    interval = [0.5, 0.75]
    if variable == "logsnr":
        log_snr = denoiser.process.log_snr(ts, torch.zeros(1).double()).flatten().tolist()
        interval = [log_snr[2], log_snr[1]]
    everywhere, inside = (
        ClassifierFreeGuidance(denoiser, NULL, 4.0),
        ClassifierFreeGuidance(denoiser, NULL, 4.0, interval, variable),
    )
    for i, t in enumerate(ts):
        values = [d.predict_mean(y, t, t / 2, None, labels) for d in (inside, everywhere, denoiser)]
        assert torch.equal(values[0], values[1 if i in (1, 2) else 2]) and not torch.equal(values[1], values[2])
    with_zero = ClassifierFreeGuidance(denoiser, NULL, 0.0, interval, variable)
    assert torch.equal(
        with_zero.predict_mean(y, ts[0], ts[0], None, labels), denoiser.predict_mean(y, ts[0], ts[0], None, labels)
    )
    without = denoiser.predict_mean(y, ts[1], ts[1], None, torch.tensor([NULL, NULL]))
    close(with_zero.predict_mean(y, ts[1], ts[1], None, labels).detach().numpy(), without.detach().numpy(), 1e-14)


@pytest.mark.parametrize("target", [Clean(clip=False), Noise(), Velocity(), NextScale()])
@over(named("vp-cosine", "blurring"))
def test_every_targets_clean_images_are_guided_alike(twin: Twin, target: Target) -> None:
    """m_s of the guided prediction is the guided m_s, since m_s is affine in the prediction."""
    denoiser, labels = with_target(twin, target, TinyNetwork()), torch.tensor([0, 1])
    y, t, s = images(2, 1, H, W), float64(0.75), float64(0.75 - 1 / twin.num_scales)
    guided = ClassifierFreeGuidance(denoiser, NULL, 2.5).predict_mean(y, t, s, None, labels)
    with_label, without = (denoiser.predict_mean(y, t, s, None, v) for v in (labels, torch.full((2,), NULL)))
    close(guided.detach().numpy(), (without + 2.5 * (with_label - without)).detach().numpy(), 1e-9)


def test_guided_images_are_clipped_once_and_after_guidance() -> None:
    denoiser, labels = Denoiser(TinyNetwork(), VP(4), Clean("none")).double(), torch.tensor([0, 1])
    y, t = 3 * images(2, 1, H, W), float64(0.75)
    free = Denoiser(denoiser.network, denoiser.process, Clean("none", clip=False)).double()
    expected = ClassifierFreeGuidance(free, NULL, 20.0).predict_mean(y, t, float64(0.0), None, labels)
    signal = denoiser.process.signal_scale(0.0, torch.zeros(1, 1).double())
    assert float(expected.detach().abs().max()) > 1.1 * float(signal)
    clipped = ClassifierFreeGuidance(denoiser, NULL, 20.0).predict_mean(y, t, float64(0.0), None, labels)
    close(clipped.detach().numpy(), (signal * (expected / signal).clamp(-1, 1)).detach().numpy(), 1e-12)


def test_context_goes_with_both_halves() -> None:
    """Osmosis: each half has the operator of its own guidance images."""
    process = OsmosisDiffusion(8)

    class FirstChannel(TinyNetwork):
        def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
            return super().forward(x[:, :1], t, labels) + 0.1 * x[:, 1:]

    denoiser, x_0 = Denoiser(FirstChannel(), process, Clean(clip=False)).double(), images(2, 1, 6, 9)
    context, labels, t, s = process.context(x_0, generator()), torch.tensor([0, 1]), float64(0.75), float64(0.5)
    guided = ClassifierFreeGuidance(denoiser, NULL, 3.0).predict_mean(x_0, t, s, context, labels)
    with_label, without = (denoiser.predict_mean(x_0, t, s, context, v) for v in (labels, torch.full((2,), NULL)))
    close(guided.detach().numpy(), (without + 3 * (with_label - without)).detach().numpy(), 1e-8)


def test_samplers_ask_a_denoiser_for_its_means_alone() -> None:
    class Still(BaseDenoiser):
        """Its estimate is one image, whatever it sees."""

        def __init__(self, process: VP, image: Tensor) -> None:
            super().__init__()
            self.process, self.target, self.spectrum, self.image = process, Clean(), DataSpectrum(), image

        def predict_mean(
            self, y_t: Tensor, t: Tensor, s: Tensor, context: Tensor | None = None, labels: Tensor | None = None
        ) -> Tensor:
            return self.process.operator(context).apply(self.process.signal(s), self.image.expand(y_t.shape))

    image = images(1, 1, H, W).float()
    for sampler in (Ancestral(4), DDIM(0.0, 4), Heun(4), DPMSolver(0.0, 4), UniPC(2, 4)):
        still = Still(VP(8), image)
        sampler.check(still)
        found = sampler.sample(still, GaussianPrior(), CounterRNG(0, 2), (1, H, W))
        torch.testing.assert_close(found, image.expand(2, 1, H, W))
    with pytest.raises(TypeError, match="abstract"):
        BaseDenoiser()  # type: ignore[abstract]


def test_guidance_shares_the_denoisers_parts_and_moves_with_them() -> None:
    denoiser = Denoiser(TinyNetwork(), Blurring(4), Clean())
    guided = ClassifierFreeGuidance(denoiser, NULL, 2.0)
    assert guided.network is denoiser.network and guided.spectrum is denoiser.spectrum
    assert guided.state_dict().keys() == denoiser.state_dict().keys()
    denoiser.spectrum.std.fill_(0.1)
    assert float(guided.spectrum.std) == pytest.approx(0.1)


class Everywhere(ClassifierFreeGuidance):
    """Evaluates both answers in every step, and chooses scale by scale."""

    for_steps = BaseDenoiser.for_steps


@pytest.mark.parametrize("variable", ["t", "logsnr"])
@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda sampler: type(sampler).__name__)
def test_steps_outside_the_interval_evaluate_the_label_alone(sampler: Sampler, variable: str) -> None:
    """The same images as with both answers in each step, but few evaluations without the label."""
    network = TinyNetwork()
    evaluated: list[int] = []
    network.register_forward_pre_hook(lambda module, given: evaluated.append(len(given[0])))
    denoiser, labels = Denoiser(network, VP(8), Clean()).double(), torch.tensor([0, 1, 0])
    interval = [0.4, 0.63]
    if variable == "logsnr":
        zero = torch.zeros(1).double()
        interval = [float(denoiser.process.log_snr(float64([t]), zero)) for t in reversed(interval)]

    def drawn(kind: type[ClassifierFreeGuidance], labels: Tensor | None) -> tuple[Tensor, int]:
        evaluated.clear()
        guided = kind(denoiser, NULL, 4.0, interval, variable)
        found = sampler.sample(guided, GaussianPrior(), CounterRNG(1, 3), (1, H, W), labels, dtype=torch.float64)
        return found, sum(evaluated) // 3

    (found, number), (expected, most) = drawn(ClassifierFreeGuidance, labels), drawn(Everywhere, labels)
    close(found.numpy(), expected.numpy(), 1e-12)
    assert not torch.equal(found, drawn(ClassifierFreeGuidance, None)[0])
    # the steps from 6/8, 5/8 and 4/8 touch the interval, and churn lifts the one from 3/8; Heun evaluates at both ends
    guided = 3 if sampler.churn is None else 4
    assert number == most // 2 + guided * (2 if isinstance(sampler, Heun) else 1)


def test_estimates_that_agree_with_a_measurement_leave_out_the_same_evaluations() -> None:
    evaluated: list[int] = []
    network = TinyNetwork()
    network.register_forward_pre_hook(lambda module, given: evaluated.append(len(given[0])))
    denoiser, labels, known = Denoiser(network, VP(8), Clean()).double(), torch.tensor([0, 1]), torch.ones(H, W) > 0
    known[1:3] = False
    drawn = []
    for kind in (ClassifierFreeGuidance, Everywhere):
        evaluated.clear()
        guided = kind(denoiser, NULL, 4.0, [0.5, 0.63])
        restored = Consistent(guided, Mask(known), Mask(known).forward(images(2, 1, H, W)), 0.1)
        drawn.append(
            DDIM(0.0, 8).sample(restored, GaussianPrior(), CounterRNG(1, 2), (1, H, W), labels, dtype=torch.float64)
        )
        assert sum(evaluated) == 2 * (11 if kind is ClassifierFreeGuidance else 16)
    close(drawn[0].numpy(), drawn[1].numpy(), 1e-12)


def test_encodings_and_flows_leave_out_the_same_evaluations() -> None:
    evaluated: list[int] = []
    network = TinyNetwork()
    network.register_forward_pre_hook(lambda module, given: evaluated.append(len(given[0])))
    denoiser, labels, x = Denoiser(network, VP(8), Clean()).double(), torch.tensor([0, 1]), images(2, 1, H, W)
    scales = torch.arange(8, -1, -1, dtype=torch.float64) / 8

    def found(kind: type[ClassifierFreeGuidance]) -> tuple[Tensor, int, Tensor, int]:
        guided = kind(denoiser, NULL, 4.0, [0.3, 0.45])
        evaluated.clear()
        y, encoding = encode(guided, x, scales, None, labels), sum(evaluated) // 2
        evaluated.clear()
        flow = FlowLikelihood(guided, GaussianPrior(), 7)
        return y, encoding, flow(x, CounterRNG(3, 2), labels).steps, sum(evaluated) // 2

    y, encoding, traces, evaluations = found(ClassifierFreeGuidance)
    expected, every_encoding, expected_traces, most = found(Everywhere)
    close(y.numpy(), expected.numpy(), 1e-12)
    close(traces.numpy(), expected_traces.numpy(), 1e-12)
    # two steps of either touch the interval, from 2/8 to 3/8 to 4/8 and from 0.13 to 0.31 to 0.59; a step has 4
    # evaluations in an encoding and 2 in a flow, whose decoder has one more
    assert encoding == every_encoding // 2 + 2 * 4
    assert evaluations == most // 2 + 2 * 2 + 1


@pytest.mark.parametrize(("interval", "variable"), [(None, "t"), ([-3.0, 4.0], "logsnr")])
def test_guidance_stays_on_the_device_and_never_waits_for_it(interval: Any, variable: str) -> None:
    """But once before the first step, if there is an interval."""
    kind = ClassifierFreeGuidance if interval is None else Everywhere
    guided = kind(Denoiser(TinyNetwork(2), Blurring(8), Clean()), NULL, 2.0, interval, variable)
    sampler = Ancestral()
    scales = sampler.scales(guided.process)[-3:]
    with pretended_gpu(guided):
        y, labels = torch.randn(4, 2, 6, 9, device="cuda"), torch.zeros(4, dtype=torch.int64, device="cuda")
        noise = CounterRNG(0, 4, device="cuda")
        assert sampler.reverse(guided, y, noise, None, labels, scales.to("cuda")).device.type == "cuda"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"scale": -1.0}, ("guidance", "-1.0")),
        ({"scale": "2"}, ("guidance", "'2'")),
        ({"interval": [0.8, 0.1]}, ("guidance_interval", "[low,high]", "[0.8, 0.1]")),
        ({"interval": [0.1]}, ("guidance_interval", "[0.1]")),
        ({"interval": 0.5}, ("guidance_interval", "0.5")),
        ({"variable": "sigma"}, ("guidance_variable", "logsnr, t")),
    ],
)
def test_what_cannot_be_meant_is_refused(arguments: dict[str, Any], words: tuple[str, ...]) -> None:
    with refused(*words):
        ClassifierFreeGuidance(Denoiser(TinyNetwork(), VE(4), Clean()), NULL, **({"scale": 2.0} | arguments))


def test_interval_in_logsnr_needs_one_that_changes() -> None:
    with refused("logSNR of InverseHeat", "guidance_variable=t"):
        ClassifierFreeGuidance(Denoiser(TinyNetwork(), InverseHeat(4), Clean()), NULL, 2.0, [-1.0, 1.0], "logsnr")


def test_without_labels_the_answer_is_that_of_no_label() -> None:
    denoiser, y, t = Denoiser(TinyNetwork(), VP(4), Clean()), images(2, 1, H, W).float(), float64(0.5)
    plain = ClassifierFreeGuidance(denoiser, NULL, 5.0).predict_mean(y, t, t)
    assert torch.equal(plain, denoiser.predict_mean(y, t, t, None, torch.tensor([NULL, NULL])))
