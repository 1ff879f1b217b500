"""diffusers' U-Net as a network: arguments, sizes, labels, time steps, devices; the targets' options that it needs."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch

import dpm_scales as ds
from dpm_scales.denoisers import Denoiser
from dpm_scales.networks import DiffusersUNet
from dpm_scales.processes import VE, VP, Blurring
from dpm_scales.samplers import Ancestral
from dpm_scales.schedules import GeometricNoise
from dpm_scales.targets import Clean, Noise, Target, Velocity
from support.diffusers_folders import UNET
from support.oracles import Answer, close, float64, images, pretended_gpu, refused

FOURIER = {**UNET, "time_embedding_type": "fourier"}


def build(unet: dict[str, Any] = UNET, channels: int = 2, **arguments: Any) -> DiffusersUNet:
    torch.manual_seed(0)
    return DiffusersUNet(channels, channels, unet=unet, **arguments)


@pytest.mark.parametrize("num_scales", [7, 1000, 4000])
def test_scale_k_is_their_step_k_minus_one(num_scales: int) -> None:
    network = build(num_scales=num_scales)
    for dtype in (torch.float32, torch.float64):
        k = torch.arange(1, num_scales + 1, dtype=dtype)
        assert torch.equal(network._step(k / num_scales), k - 1)


def test_noise_levels_are_those_of_the_process() -> None:
    network = build(FOURIER, num_scales=20, noise_levels=[0.02, 30.0])
    process = VE(20, GeometricNoise(0.02, 30.0))
    t = torch.linspace(0.01, 1, 57, dtype=torch.float64)
    expected = process.noise_scale(t, torch.zeros(1).double()).flatten()
    close(network._noise_level(t).numpy(), expected.numpy(), 0, 1e-12)
    x = images(2, 2, 4, 6).float()
    level = network._noise_level(t[[20, 50]]).float()
    with torch.no_grad():
        score = network.unet(x, level).sample
        close(network(x, t[[20, 50]].float()), -level[:, None, None, None] * score, 1e-5, 1e-5)


def test_no_label_is_one_more_index() -> None:
    network = build(num_classes=3)
    assert network.unet.class_embedding.weight.shape[0] == 4
    x, t = images(2, 2, 4, 6).float(), torch.tensor([0.5, 1.0])
    with torch.no_grad():
        assert torch.equal(network(x, t), network(x, t, torch.tensor([3, 3])))
        assert not torch.equal(network(x, t), network(x, t, torch.tensor([1, 3])))
    assert build(num_classes=3, no_label=False).unet.class_embedding.weight.shape[0] == 3


BAD: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "unknown": ({"unet": {**UNET, "layer_per_block": 2}}, ("'layer_per_block'", "did you mean 'layers_per_block'")),
    "own": ({"unet": {**UNET, "in_channels": 2}}, ("unet must not contain 'in_channels'",)),
    "channels": ({"channels": 0}, ("in_channels is 0",)),
    "classes": ({"num_classes": 0}, ("num_classes is 0",)),
    "scales": ({"num_scales": 2.5}, ("num_scales is 2.5",)),
    "levels": ({"unet": FOURIER, "noise_levels": [3, 2]}, ("noise_levels", "[3, 2]")),
    "fourier": ({"unet": FOURIER}, ("time_embedding_type=fourier with noise_levels=None",)),
    "positional": ({"noise_levels": [1, 2]}, ("time_embedding_type=positional with noise_levels=[1, 2]",)),
    "classes of": ({"unet": {**UNET, "class_embed_type": "identity"}}, ("class_embed_type=identity",)),
    "blocks": ({"unet": {**UNET, "block_out_channels": [8]}}, ("UNet2DModel can't be built", "number of")),
    "groups": ({"unet": {**UNET, "norm_num_groups": 3}}, ("UNet2DModel can't be built",)),
    "heads": ({"unet": {**UNET, "attention_head_dim": 17}}, ("unet.attention_head_dim=17", "no head")),
    "a name": ({"unet": {**UNET, "act_fn": "sillu"}}, ("UNet2DModel can't be built", "sillu")),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name: str) -> None:
    arguments, words = BAD[name]
    with refused(*words):
        build(**arguments)


def test_bad_inputs() -> None:
    network, t = build(), torch.ones(1)
    with refused("shape (1, 3, 4, 4)", "in_channels"):
        network(torch.zeros(1, 3, 4, 4), t)
    with refused("images of 4x5 pixels", "multiples of 2"):
        network(torch.zeros(1, 2, 4, 5), t)
    with refused("labels are given to a network without classes"):
        network(torch.zeros(1, 2, 4, 4), t, torch.zeros(1, dtype=torch.int64))


def test_dropped_labels_need_an_index() -> None:
    network = ds.configured(DiffusersUNet, unet=UNET, no_label=False)
    with refused("no_label=false", "label_dropout=0"):
        ds.Model(network, image_size=8, channels=1, num_classes=3)
    model = ds.Model(network, image_size=8, channels=1, num_classes=3, label_dropout=0.0)
    assert model.sample(2, steps=2).shape == (2, 1, 8, 8)


def test_everything_stays_on_the_device() -> None:
    network = build(num_classes=2)
    fourier = build(FOURIER, num_scales=20, noise_levels=[0.02, 30.0])
    with pretended_gpu(network, fourier), torch.no_grad():
        x, t = torch.randn(2, 2, 4, 4, device="cuda"), torch.rand(2, device="cuda")
        assert network(x, t).device.type == fourier(x, t).device.type == "cuda"


# --- options of targets and samplers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [Noise, Velocity, lambda **options: Clean(preconditioning="none", **options)])
def test_without_scaling_the_network_sees_x_t(target: Any) -> None:
    seen = []

    class Spy(Answer):
        def forward(self, x: torch.Tensor, t: torch.Tensor, labels: Any = None) -> torch.Tensor:
            seen.append(x)
            return super().forward(x, t, labels)

    x_t = images(2, 1, 3, 5)
    for scale_input in (False, True):
        denoiser = Denoiser(Spy(x_t), VP(10), target(scale_input=scale_input))
        denoiser.predict_mean(x_t, float64(0.3), float64(0.2))
    assert torch.equal(seen[0], x_t) and not torch.allclose(seen[1], x_t)


@pytest.mark.parametrize("target", [Noise, Velocity])
def test_clipping_is_that_of_the_clean_estimate(target: Any) -> None:
    process, t, s = VP(10), float64(0.7), float64(0.6)
    output, x_t = 2 * images(2, 1, 3, 5), images(2, 1, 3, 5, seed=1)
    free = Denoiser(Answer(output), process, target()).predict_mean(x_t, t, float64(0.0))
    assert float(free.abs().max()) > 1.5
    clipped = Denoiser(Answer(output), process, target(clip=True)).predict_mean(x_t, t, s)
    close(clipped, process.signal_scale(s, torch.zeros(1).double()) * free.clamp(-1, 1), 1e-12)


@pytest.mark.parametrize("target", [Noise(clip=True), Velocity(clip=True)], ids=["noise", "velocity"])
def test_clipping_is_refused_under_blur(target: Target) -> None:
    with refused("clip=true divides", "target=clean"):
        Denoiser(torch.nn.Identity(), Blurring(10), target)


def test_bad_options() -> None:
    with refused("scale_input=false", "preconditioning=none"):
        Clean(scale_input=False)
    with refused("unknown variance 'large'", "transition"):
        Ancestral(variance="large")


def test_diffusers_arguments_are_those_of_this_version() -> None:
    """What the config of their U-Net may hold is what is handed on."""
    from dpm_scales.networks.diffusers_unet import OWN, unet_arguments

    network = diffusers.UNet2DModel(
        block_out_channels=(32,), down_block_types=["DownBlock2D"], up_block_types=["UpBlock2D"]
    )
    assert {*unet_arguments(), *OWN} == {key for key in network.config if not key.startswith("_")}
