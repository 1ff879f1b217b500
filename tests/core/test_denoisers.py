"""The denoiser: what the network sees, what its output means, and what it is trained on."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dpm_scales.denoisers import Denoiser
from dpm_scales.moments import Moments, Scalings
from dpm_scales.networks import UNet
from dpm_scales.processes import VE, VP, Homogeneous, InverseHeat
from dpm_scales.targets import Clean, NextScale, Noise, Velocity
from support.oracles import (
    BY_NAME,
    MEMBERS,
    NOISY_MEMBERS,
    Answer,
    GaussianData,
    H,
    TinyNetwork,
    W,
    close,
    coefficients,
    curves,
    float64,
    gaussian_data,
    generator,
    images,
    named,
    noised,
    over,
    pixels,
    pretended_gpu,
    refused,
    scaled,
    spread,
    with_target,
)
from support.reference import TWINS, Array, Twin
from support.targets import TARGETS

OF_NOISE = ("noise", "velocity")

# every process with every target that suits it
SUITABLE = [
    pytest.param(twin, name, id=f"{twin.name}-{name}")
    for twin in named(*MEMBERS)
    for name in TARGETS
    if name not in OF_NOISE or twin.name in NOISY_MEMBERS
]


def of(denoiser: Denoiser, t: Tensor, size: tuple[int, int] = (H, W)) -> Scalings:
    process = denoiser.process
    return denoiser.target.scalings(Moments(process, process.operator(), t, denoiser.spectrum, size))


def gain(denoiser: Denoiser, twin: Twin, t: Tensor, size: tuple[int, int] = (H, W)) -> Array:
    """w = lambda P / (lambda^2 P + gamma^2) for each image and DCT coefficient, P = 1/4; 1 without a filter."""
    if of(denoiser, t, size).filter is None:
        return np.ones((len(t), 1, *size))
    gains = []
    for v in t.tolist():
        signal, noise = curves(twin, v, *size)
        noise = np.where(noise > 0, noise**2, 1e-4 * 0.25)
        gains.append(signal * 0.25 / (signal**2 * 0.25 + noise))
    return np.stack(gains)[:, None]


def start(denoiser: Denoiser, twin: Twin, x: Tensor, t: Tensor) -> Tensor:
    """z, mode by mode in numpy."""
    size = (x.shape[-2], x.shape[-1])
    return torch.from_numpy(pixels(gain(denoiser, twin, t, size) * coefficients(x.numpy())))


def asked_for(twin: Twin, name: str, x_0: Tensor, x_t: Tensor, noise: Tensor, t: list[float]) -> Tensor:
    """What the prediction should be, mode by mode in numpy."""
    if name == "noise":
        return noise
    if name == "velocity":
        return scaled(twin, noise, t) - spread(twin, x_0, t)
    if name.startswith("finer"):
        return scaled(twin, x_0, [max(v - 1 / twin.num_scales, 0) for v in t]) - x_t
    return x_0


# --- the network ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(TARGETS))
def test_network_sees_the_scaled_image_the_scale_and_the_labels(name: str) -> None:
    network = Answer(torch.zeros(3, 2, H, W))
    denoiser = Denoiser(network, VP(8), TARGETS[name](), 0.5)
    x, t, labels = images(3, 2, H, W).float(), float64([0.125, 0.5, 1.0]), torch.tensor([2, 0, 1])
    denoiser.predict_mean(x, t, t - 0.125, labels=labels)
    seen, scale, given = network.seen.pop()
    z = start(denoiser, BY_NAME["vp-cosine"], x.double(), t)
    close(seen.numpy(), (of(denoiser, t).inner * z).numpy(), 1e-5)
    assert seen.dtype == scale.dtype == torch.float32
    close(scale.numpy(), t.numpy(), 1e-7)
    assert given is labels
    denoiser.loss(x, t, labels, generator())
    assert network.seen.pop()[2] is labels
    # one t for all, and no labels
    denoiser.predict_mean(x, float64(0.5), float64(0.25))
    _, scale, given = network.seen.pop()
    assert scale.tolist() == [0.5] * 3 and given is None
    denoiser.loss(x, t)
    assert network.seen.pop()[2] is None


class ClassifierFreeGuidance(VP):
    """A process with a context: an image that the network sees as well."""

    context_channels = 1

    def context(self, x_0: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return torch.rand(x_0.shape, generator=generator, dtype=x_0.dtype) + 1

    def context_features(self, context: Tensor | None) -> Tensor | None:
        assert context is not None
        return context - 1


def test_network_sees_the_context_as_further_channels() -> None:
    network, process = Answer(torch.zeros(3, 2, H, W)), ClassifierFreeGuidance(8)
    denoiser = Denoiser(network, process, Clean(), 0.5)
    x, t, context = images(3, 2, H, W), float64([0.125, 0.5, 1.0]), images(3, 2, H, W, seed=1)
    denoiser.predict_mean(x, t, t, context)
    seen = network.seen.pop()[0]
    assert seen.shape == (3, 4, H, W) and torch.equal(seen[:, 2:], context - 1)
    denoiser.loss(x, t, context=context)
    assert torch.equal(network.seen.pop()[0][:, 2:], context - 1)
    # none given: the process draws one, before the noise
    denoiser.loss(x, t, generator=generator(4))
    expected = torch.rand(x.shape, generator=generator(4), dtype=x.dtype)
    assert torch.equal(network.seen.pop()[0][:, 2:], (expected + 1) - 1)


@over(TWINS)
def test_new_networks_answer_with_the_wiener_estimate(twin: Twin) -> None:
    """A U-Net starts at zero; so the clean image is w(L) x_t, and the finer scale x_t itself."""
    network = UNet(1, 1, [8], 1, [], 8)
    x, t = images(3, 1, 4, 6), float64([0.125, 0.5, 1.0])
    s = t - 1 / twin.num_scales
    denoiser = with_target(twin, Clean("wiener", clip=False), network)
    estimate = start(denoiser, twin, x, t)
    close(denoiser.predict_mean(x, t, s).detach().numpy(), scaled(twin, estimate, s.tolist()).numpy(), 1e-10, 1e-7)
    denoiser = with_target(twin, NextScale(), network)
    close(denoiser.predict_mean(x, t, s).detach().numpy(), x.numpy())


@pytest.mark.parametrize(("twin", "name"), SUITABLE)
def test_prediction_is_c_skip_z_plus_c_out_f_of_c_in_z(twin: Twin, name: str) -> None:
    network = TinyNetwork()
    denoiser = with_target(twin, TARGETS[name](), network)
    x, t = images(2, 1, H, W), float64([0.375, 1.0])
    s = t - 1 / twin.num_scales
    c, z = of(denoiser, t), start(denoiser, twin, x, t)
    prediction = c.skip * z + c.out * network(c.inner * z, t)
    expected = denoiser.target.predict_mean(denoiser.process, denoiser.process.operator(), prediction, x, t, s)
    close(denoiser.predict_mean(x, t, s).detach().numpy(), expected.detach().numpy(), 1e-12, 1e-9)


@pytest.mark.parametrize(("twin", "name"), SUITABLE)
def test_one_t_per_sample_is_the_same_as_one_by_one(twin: Twin, name: str) -> None:
    denoiser = with_target(twin, TARGETS[name](), TinyNetwork())
    x, t = images(3, 1, H, W), float64([0.25, 0.625, 1.0])
    s = t - 1 / twin.num_scales
    together = denoiser.predict_mean(x, t, s)
    assert together.shape == x.shape and together.dtype == x.dtype
    for b in range(3):
        alone = denoiser.predict_mean(x[b : b + 1], t[b], s[b])
        close(together[b : b + 1].detach().numpy(), alone.detach().numpy(), 1e-12)
    loss = denoiser.loss(x, t, generator=generator(3))
    noise = torch.randn(x.shape, generator=generator(3), dtype=torch.float64)
    x_t = noised(twin, x, noise, t.tolist())
    loss = loss.detach()
    for b in range(3):
        one = slice(b, b + 1)
        prediction, weight = denoiser._predict(denoiser.process.operator(), x_t[one], t[one], None, None)
        truth = asked_for(twin, name, x[one], x_t[one], noise[one], [float(t[b])])
        close(float(loss[b]), float((weight * (prediction - truth) ** 2).mean().detach()), 1e-10, 1e-7)


# --- the loss ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("twin", "name"), SUITABLE)
def test_loss_is_the_weighted_mean_square_of_the_error(twin: Twin, name: str) -> None:
    """By hand, for a network that always gives the same, from the generator's noise and the curves of the twin."""
    answer = images(4, 2, H, W, seed=8)
    denoiser = with_target(twin, TARGETS[name](), Answer(answer))
    x_0, t = images(4, 2, H, W), [0.125, 0.3, 0.5, 1.0]
    loss = denoiser.loss(x_0, float64(t), generator=generator(6))
    assert loss.shape == (4,) and loss.dtype == torch.float64
    noise = torch.randn(x_0.shape, generator=generator(6), dtype=torch.float64)
    x_t = noised(twin, x_0, noise, t)
    c = of(denoiser, float64(t))
    error = c.skip * start(denoiser, twin, x_t, float64(t)) + c.out * answer - asked_for(twin, name, x_0, x_t, noise, t)
    close(loss.numpy(), (c.weight * error**2).mean((1, 2, 3)).numpy(), 1e-10, 1e-8)
    assert torch.equal(loss, denoiser.loss(x_0, float64(t), generator=generator(6)))


def expectation(twin: Twin, name: str, data: GaussianData, t: float) -> tuple[Callable[[Array], Array], Array]:
    """E[truth | u_t] as a function of u_t, and Var(truth | u_t), for each DCT coefficient."""
    signal, noise = curves(twin, t)
    finer = curves(twin, max(t - 1 / twin.num_scales, 0))[0]
    uncertainty = data.uncertainty(signal, noise)

    def clean(u: Array) -> Array:
        return data.estimate(u, signal, noise)

    def eps(u: Array) -> Array:
        return np.asarray((u - signal * clean(u)) / noise)

    if name == "noise":
        return eps, uncertainty * (signal / noise) ** 2
    if name == "velocity":
        return lambda u: signal * eps(u) - noise * clean(u), uncertainty * ((signal**2 + noise**2) / noise) ** 2
    if name.startswith("finer"):
        return lambda u: finer * clean(u) - u, uncertainty * finer**2
    return clean, uncertainty


class Ideal(nn.Module):
    """The network that makes the prediction E[truth | x_t]; one scale for all."""

    def __init__(self, predict: Callable[[Array], Array]) -> None:
        super().__init__()
        self.predict = predict
        self.c: Scalings | None = None
        self.gain = np.ones((1, 1, H, W))

    def forward(self, seen: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        assert self.c is not None
        z = seen / self.c.inner
        # what the filter leaves nothing of tells nothing
        u = np.where(self.gain > 1e-140, coefficients(z.numpy()) / self.gain.clip(1e-140), 0)
        wanted = torch.from_numpy(pixels(self.predict(u)))
        return (wanted - self.c.skip * z) / self.c.out


@pytest.mark.parametrize("name", list(TARGETS))
@over(named(*NOISY_MEMBERS))
def test_ideal_network_has_the_irreducible_loss_and_gives_the_best_estimate(twin: Twin, name: str) -> None:
    """weight * mean over coefficients of Var(truth | x_t), 3000 images, within 5 standard errors; others have more."""
    data, count = gaussian_data(), 3000
    x_0 = data.sample(count)
    for t in (0.25, 0.625):
        predict, variance = expectation(twin, name, data, t)
        network = Ideal(predict)
        denoiser = with_target(twin, TARGETS[name](), network)
        network.c, network.gain = of(denoiser, float64([t])), gain(denoiser, twin, float64([t]))
        scale = torch.full((count,), t, dtype=torch.float64)
        loss = denoiser.loss(x_0, scale, generator=generator(2))
        expected = float(network.c.weight) * variance.mean()
        assert float(loss.mean()) == pytest.approx(expected, abs=5 * float(loss.std()) / math.sqrt(count))
        assert float(loss.std()) / math.sqrt(count) < 0.03 * expected
        # the estimate does not depend on the target, where its division can be undone
        s = t - 1 / twin.num_scales
        signal = curves(twin, t)[0]
        if name == "noise" and (curves(twin, s)[0] / signal).max() > 1e6:
            continue
        y_t = images(5, 1, H, W, seed=7)
        best = per_mode_estimate(data, twin, y_t, t, s)
        close(denoiser.predict_mean(y_t, float64(t), float64(s)).numpy(), best.numpy(), 1e-8, 1e-6)
        # a little less than ideal costs what its error weighs
        worse = with_target(twin, TARGETS[name](), Ideal(lambda u, predict=predict: predict(u) + 0.5))
        worse.network.c, worse.network.gain = network.c, network.gain
        offset = pixels(np.full((H, W), 0.5))
        cost = float(worse.loss(x_0, scale, generator=generator(2)).mean() - loss.mean())
        tolerance = 10 * float(network.c.weight) * math.sqrt(variance.max() * (offset**2).mean() / count)
        assert cost == pytest.approx(float(network.c.weight) * (offset**2).mean(), abs=tolerance)


def per_mode_estimate(data: GaussianData, twin: Twin, y_t: Tensor, t: float, s: float) -> Tensor:
    """lambda_s E[y_0 | y_t]."""
    u = data.estimate(coefficients(y_t.numpy()), *curves(twin, t))
    return torch.from_numpy(pixels(curves(twin, s)[0] * u))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("twin", "name"), SUITABLE)
def test_number_format_is_that_of_the_images(twin: Twin, name: str, dtype: torch.dtype) -> None:
    """Also where the network answers in another, as it does under autocast."""

    class Foreign(nn.Module):
        answer = torch.bfloat16

        def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
            assert x.dtype == t.dtype == dtype
            return torch.zeros_like(x, dtype=self.answer)

    denoiser = Denoiser(Foreign(), twin.build(), TARGETS[name]())
    x, t = images(2, 1, H, W).to(dtype), float64([0.5, 1.0])
    for Foreign.answer in (torch.bfloat16, torch.float64):
        assert denoiser.predict_mean(x, t, t - 0.125).dtype == dtype
        assert denoiser.loss(x, t).dtype == dtype
    assert denoiser.loss(x, t.float()).isfinite().all()


@pytest.mark.parametrize(("twin", "name"), SUITABLE)
def test_loss_of_one_step_reaches_the_network_and_only_it(twin: Twin, name: str) -> None:
    denoiser = with_target(twin, TARGETS[name](), TinyNetwork())
    denoiser.loss(images(2, 1, H, W), float64([0.5, 1.0]), generator=generator()).mean().backward()
    gradients = {key: p.grad for key, p in denoiser.named_parameters()}
    assert set(gradients) == {"network.weight", "network.bias"}
    assert all(g is not None and g.isfinite().all() and g.abs().sum() > 0 for g in gradients.values())


# --- construction -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data_std", [0.0, -0.5, math.nan, math.inf, "0.5", True])
def test_data_std_must_be_positive(data_std: Any) -> None:
    with refused("data_std", "positive", repr(data_std), "same grey"):
        Denoiser(TinyNetwork(), VP(8), Clean(), data_std)


def test_targets_that_do_not_suit_the_process_are_refused() -> None:
    with refused("noise target", "Homogeneous"):
        Denoiser(TinyNetwork(), Homogeneous(8), Noise())
    with refused("velocity target", "Homogeneous"):
        Denoiser(TinyNetwork(), Homogeneous(8), Velocity())


def test_data_std_is_stored_with_the_weights_and_used() -> None:
    denoiser = Denoiser(TinyNetwork(), VE(8), Clean(), 0.25)
    other = Denoiser(TinyNetwork(), VE(8), Clean(), 0.75)
    own = {"spectrum.std", "spectrum.log_factor"}
    assert set(denoiser.state_dict()) == own | {"network.weight", "network.bias"}
    other.load_state_dict(denoiser.state_dict())
    assert float(other.spectrum.std) == 0.25
    x, t = images(2, 1, H, W), float64([0.5, 1.0])
    assert torch.equal(other.predict_mean(x, t, t), denoiser.predict_mean(x, t, t))
    other.spectrum.std.fill_(0.75)
    assert not torch.equal(other.predict_mean(x, t, t), denoiser.predict_mean(x, t, t))


# --- devices ----------------------------------------------------------------------------------------------------------


#: every target with a process of each operator, and every process with a target
ON_DEVICE = [
    pytest.param(twin, name, id=f"{twin.name}-{name}")
    for twin in named(*MEMBERS)
    for name in TARGETS
    if twin.name in ("vp-cosine", "blurring") or name == "clean-wiener"
]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(("twin", "name"), ON_DEVICE)
def test_loss_and_clean_image_stay_on_the_device_and_never_wait_for_it(twin: Twin, name: str, device: str) -> None:
    """Fake tensors refuse mixed devices, and any value read back by the host; gradients too on the fake CPU."""
    denoiser = Denoiser(TinyNetwork(2), twin.build(), TARGETS[name]())
    with pretended_gpu(denoiser, device=device):
        x, t = torch.rand(4, 2, 6, 9, device=device), torch.rand(4, device=device, dtype=torch.float64)
        labels = torch.zeros(4, dtype=torch.int64, device=device)
        loss = denoiser.loss(x, t, labels)
        assert loss.device.type == device and loss.shape == (4,)
        if device == "cpu" or torch.cuda.is_available():  # the autograd engine asks the driver for its context
            loss.mean().backward()
            assert all(p.grad is not None and p.grad.device.type == device for p in denoiser.network.parameters())
            return
        for s, one in ((t / 2, t), (t[0] / 2, t[0])):
            clean = denoiser.predict_mean(x, one, s, labels=labels)
            assert clean.device.type == device and clean.shape == x.shape


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_clean_image_on_a_gpu_is_that_on_the_cpu() -> None:
    x, t = images(2, 1, H, W), float64([0.5, 1.0])
    for twin, name in itertools.product(named(*NOISY_MEMBERS), TARGETS):
        denoiser = with_target(twin, TARGETS[name](), TinyNetwork())
        expected = denoiser.predict_mean(x, t, t - 0.125).detach()
        actual = denoiser.to("cuda").predict_mean(x.cuda(), t.cuda(), (t - 0.125).cuda()).detach()
        torch.testing.assert_close(actual.cpu(), expected, atol=1e-9, rtol=1e-7)


def test_the_pretended_gpu_notices_a_denoiser_left_behind() -> None:
    denoiser = Denoiser(TinyNetwork(), InverseHeat(8), Clean())
    with pretended_gpu(), pytest.raises(Exception, match="device"):
        denoiser.loss(torch.rand(4, 1, 6, 9, device="cuda"), torch.rand(4, device="cuda"))
