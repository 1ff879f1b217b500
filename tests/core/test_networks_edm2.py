"""EDM2's U-Net: closed forms of its functions, magnitudes, the length of weights, and the paper's sizes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from torch import Tensor, nn

from dpm_scales.errors import UserError
from dpm_scales.networks import EDM2
from dpm_scales.networks.edm2 import CosineAttention, MPBlock
from dpm_scales.networks.magnitude import MPLayer, ScaleWaves, mp_cat, mp_silu, mp_sum, pixel_norm
from support.networks import (
    CLASSES,
    check_compiled_gradients,
    check_inductor,
    check_network_contract,
    inputs,
    perturbed,
)


def build(**changes: Any) -> EDM2:
    """A U-Net small enough for tests, with attention, labels and three levels."""
    arguments: dict[str, Any] = {
        **{"in_channels": 2, "out_channels": 3, "widths": [8, 12, 16], "attention_levels": [1], "head_dim": 4},
        "num_classes": CLASSES,
    }
    torch.manual_seed(0)
    return EDM2(**(arguments | changes))


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def rms(x: Tensor) -> float:
    return float(x.detach().square().mean().sqrt())


@pytest.mark.parametrize("patch_size", [1, 2])
def test_the_contract_of_networks(patch_size: int) -> None:
    check_network_contract(lambda **changes: build(patch_size=patch_size, **changes), (8, 16))


# --- functions --------------------------------------------------------------------------------------------------------


def test_mp_silu_keeps_the_magnitude_of_normal_values() -> None:
    def density(z: float) -> float:
        return float(mp_silu(torch.tensor(z, dtype=torch.float64))) ** 2 * math.exp(-z * z / 2) / math.sqrt(2 * math.pi)

    assert quad(density, -40, 40, epsabs=1e-12)[0] == pytest.approx(1, abs=1e-8)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 1.0])
def test_mp_sum_keeps_the_magnitude_of_independent_values(share: float) -> None:
    """Its coefficients are in the ratio asked for, and their squares add up to 1, exactly."""
    one, zero = torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    a, b = float(mp_sum(one, zero, share)), float(mp_sum(zero, one, share))
    assert a**2 + b**2 == pytest.approx(1, abs=1e-14)
    assert a * share == pytest.approx(b * (1 - share), abs=1e-14)


@pytest.mark.parametrize("share", [0.2, 0.5])
def test_mp_cat_keeps_the_magnitude_and_shares_it(share: float) -> None:
    """The mean square of unit inputs is 1; the parts' energies are in the ratio of the shares' squares."""
    a, b = torch.ones(2, 6, 3, 5, dtype=torch.float64), torch.ones(2, 10, 3, 5, dtype=torch.float64)
    both = mp_cat(a, b, share)
    assert both.shape == (2, 16, 3, 5) and rms(both) == pytest.approx(1, abs=1e-14)
    energy = [float(part.square().sum()) for part in both.split([6, 10], 1)]
    assert math.sqrt(energy[1] / energy[0]) == pytest.approx(share / (1 - share), rel=1e-12)


def test_pixel_norm_divides_by_the_root_mean_square() -> None:
    torch.manual_seed(0)
    x = 7 * normal(2, 12, 3, 5)
    expected = x.numpy() / np.sqrt((x.numpy() ** 2).mean(1, keepdims=True))
    np.testing.assert_allclose(pixel_norm(x).numpy(), expected, rtol=1e-9)
    assert torch.count_nonzero(pixel_norm(torch.zeros(1, 4, 1, 1))) == 0


def test_waves_have_the_law_of_the_papers() -> None:
    """Normal frequencies, uniform phases: mean square 1, and correlation exp(-(2 pi 4 d)^2 / 2) at distance d."""
    waves = ScaleWaves(4096)
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    features = waves(t)
    assert features.dtype == torch.float64
    torch.testing.assert_close(features.square().mean(1), torch.ones_like(t), rtol=0, atol=0.02)
    correlation = (features @ features[50] / 4096).numpy()
    np.testing.assert_allclose(correlation, np.exp(-((8 * np.pi * (t.numpy() - 0.5)) ** 2) / 2), rtol=0, atol=0.02)
    assert waves(t.bfloat16()).dtype == torch.float32


# --- layers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", [(), (1, 1), (3, 3)])
@pytest.mark.parametrize("rate_scale", [1.0, 10.0])
def test_layers_are_products_with_rows_of_unit_length(kernel: tuple[int, ...], rate_scale: float) -> None:
    torch.manual_seed(0)
    layer = MPLayer(5, 7, kernel, rate_scale).double()
    x = normal(2, 5, 4, 6)[..., 0, 0] if not kernel else normal(2, 5, 4, 6)
    w = layer.weight.detach().numpy()
    unit = torch.tensor(w / np.linalg.norm(w.reshape(7, -1), axis=1).reshape(7, *[1] * (w.ndim - 1)))
    expected = x @ unit.T if not kernel else nn.functional.conv2d(x, unit, padding=kernel[0] // 2)
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(layer(x, torch.tensor([0.3])), 0.3 * expected, rtol=0, atol=1e-7)


def test_the_gradient_is_orthogonal_to_the_rows() -> None:
    """The length of a row has no effect, so that its gradient turns it only."""
    torch.manual_seed(0)
    layer = MPLayer(5, 7, (3, 3), 10.0).double()
    layer(normal(2, 5, 4, 6)).square().sum().backward()
    assert layer.weight.grad is not None
    along = (layer.weight * layer.weight.grad).flatten(1).sum(1)
    size = layer.weight.flatten(1).norm(dim=1) * layer.weight.grad.flatten(1).norm(dim=1)
    assert float((along.abs() / size).detach().max()) < 1e-12


@pytest.mark.parametrize("rate_scale", [1.0, 10.0])
def test_steps_leave_the_length_of_all_rows_and_the_result_as_they_were(rate_scale: float) -> None:
    network = build(rate_scale=rate_scale).double()
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.1 / rate_scale)
    arguments = inputs(2, 8, 16, dtype=torch.float64)
    for _ in range(3):
        optimizer.zero_grad()
        (network(*arguments) - arguments[0][:, :1]).square().mean().backward()
        optimizer.step()
    layers = [part for part in network.modules() if isinstance(part, MPLayer)]
    before, expected = [layer.weight.detach().clone() for layer in layers], network(*arguments)
    network.after_step()
    for layer, weight in zip(layers, before, strict=True):
        size = layer.weight.detach().flatten(1).square().mean(1).sqrt()
        torch.testing.assert_close(size, torch.full_like(size, 1 / rate_scale), rtol=1e-12, atol=0)
        turned = nn.functional.cosine_similarity(layer.weight.flatten(1), weight.flatten(1))
        torch.testing.assert_close(turned, torch.ones_like(turned), rtol=0, atol=1e-12)
    assert any(not torch.allclose(layer.weight, w) for layer, w in zip(layers, before, strict=True))
    torch.testing.assert_close(network(*arguments), expected, rtol=0, atol=1e-10)


def test_rate_scale_is_a_factor_on_the_learning_rate() -> None:
    """Adam's steps of two networks, one of which has 1 / 10 of the parameters and rate, give the same results."""
    results = []
    for scale in (1.0, 10.0):
        network = build(rate_scale=scale, num_classes=None).double()
        optimizer = torch.optim.Adam(network.parameters(), lr=0.02 / scale, eps=0)
        x, t, _ = inputs(2, 8, 8, dtype=torch.float64)
        for _ in range(4):
            optimizer.zero_grad()
            (network(x, t) - x[:, :1] * t[:, None, None, None]).square().mean().backward()
            # of what has no gradient yet, Adam without eps makes 0 / 0
            for parameter in network.parameters():
                assert parameter.grad is not None
                parameter.grad += 1e-9 * scale
            optimizer.step()
            network.after_step()
        results.append(network(x, t))
    torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=1e-6)
    assert rms(results[0]) > 0.01


def test_cosine_attention_by_hand() -> None:
    torch.manual_seed(0)
    attention = CosineAttention(8, 4, 1.0).double()
    x = normal(2, 8, 2, 3)
    qkv = attention.qkv(x).reshape(2, 3, 2, 4, 6)  # (image, of q k v, head, channel, pixel)
    unit = qkv / qkv.square().mean(3, keepdim=True).sqrt()
    q, k, v = unit.unbind(1)
    cosines = torch.einsum("bhcq,bhck->bhqk", q, k) / 4
    assert float(cosines.detach().abs().max()) <= 1 + 1e-9
    mixed = torch.einsum("bhqk,bhck->bhcq", (cosines * math.sqrt(4)).softmax(-1), v).reshape(2, 8, 2, 3)
    expected = (0.7 * x + 0.3 * attention.project(mixed)) / math.sqrt(0.7**2 + 0.3**2)
    torch.testing.assert_close(attention(x), expected, rtol=0, atol=1e-7)


def test_a_padded_image_gives_the_same_as_a_repeated_border() -> None:
    network = perturbed(build()).double()
    x, t, labels = inputs(2, 5, 7, dtype=torch.float64)
    by_hand = nn.functional.pad(x, (0, 1, 0, 3), mode="replicate")
    torch.testing.assert_close(network(x, t, labels), network(by_hand, t, labels)[..., :5, :7], rtol=0, atol=1e-12)


# --- magnitudes -------------------------------------------------------------------------------------------------------


def test_every_layer_keeps_the_magnitude() -> None:
    """Of a wide network with normal inputs, whatever the length of its weights."""
    torch.manual_seed(0)
    settings = {"widths": [64, 96, 128], "attention_levels": [2], "head_dim": 32, "num_classes": 10}
    network = EDM2(3, 3, **settings)
    with torch.no_grad():
        for part in network.modules():
            if isinstance(part, MPLayer):
                part.weight.mul_(100)
            if isinstance(part, MPBlock):
                part.gain.value.fill_(0.0)
        network.gain_out.value.fill_(1 / network.gain_out.rate_scale)
    found: dict[str, float] = {}
    for name, part in network.named_modules():
        if isinstance(part, MPLayer | MPBlock | CosineAttention):
            part.register_forward_hook(lambda _, __, out, name=name: found.update({name: rms(out)}))
    with torch.no_grad():
        out = network(torch.randn(8, 3, 32, 32), torch.rand(8), torch.arange(8))
    assert len(found) > 60 and rms(out) == pytest.approx(1, abs=0.25)
    blocks = [value for name, value in found.items() if name.count(".") == 1]
    # zeros outside of the image and averages where it is halved have less than one, correlations may have more
    assert all(0.6 < value < 1.15 for value in blocks), found
    assert np.mean(blocks) == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize(("width", "millions"), [(128, 124.7), (192, 280.2), (256, 497.8), (320, 777.5)])
def test_the_papers_networks_have_the_papers_size(width: int, millions: float) -> None:
    """The paper states EDM2-XS 125 M, -S 280 M, -M 498 M, -L 777 M parameters (ImageNet, latents of 64 px)."""
    with torch.device("meta"):
        settings = {"blocks_per_level": 3, "attention_levels": [2, 3], "num_classes": 1000}
        network = EDM2(4, 4, [width, 2 * width, 3 * width, 4 * width], **settings)
    assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(millions, abs=0.06)


def test_compiled_gradients_are_the_same() -> None:
    check_compiled_gradients(
        perturbed(build(widths=[4, 8], head_dim=8, patch_size=2)).double(), inputs(2, 8, 16, dtype=torch.float64)
    )


@pytest.mark.slow
def test_inductor_gives_the_same() -> None:
    """One level has every layer but resampling, and takes a third of the time of two."""
    check_inductor(perturbed(build(widths=[8], attention_levels=[0], head_dim=8, patch_size=2)), inputs(2, 8, 16))


@pytest.mark.parametrize(
    ("changes", "seen"),
    [
        ({"out_channels": -1}, "out_channels is -1"),
        ({"widths": []}, r"widths is \[\]"),
        ({"widths": [8, 12.5]}, r"widths is \[8, 12.5\]"),
        ({"blocks_per_level": 0}, "blocks_per_level is 0"),
        ({"attention_levels": [3]}, r"attention_levels is \[3\]"),
        ({"head_dim": 5}, "head_dim is 5; it must divide the attended width"),
        ({"patch_size": 0}, "patch_size is 0"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"rate_scale": 0}, "rate_scale must be > 0"),
        ({"rate_scale": "1"}, "rate_scale must be"),
    ],
)
def test_a_wrong_argument_is_named(changes: dict[str, Any], seen: str) -> None:
    with pytest.raises(UserError, match=seen) as caught:
        build(**changes)
    assert "\n" not in str(caught.value)
