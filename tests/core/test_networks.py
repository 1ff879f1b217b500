"""The U-Net: shapes, initial values, conditioning, number formats, compilation, devices, sizes and messages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dpm_scales.errors import UserError
from dpm_scales.networks import UNet
from dpm_scales.networks.blocks import ResidualBlock, ScaleEmbedding, SelfAttention, group_norm
from support.networks import check_compiled_gradients, check_inductor

CONFIGS = Path(__file__).parents[2] / "configs" / "network"
CLASSES = 3


def build(**changes: Any) -> UNet:
    """A U-Net small enough for tests, with attention, labels and three levels."""
    arguments: dict[str, Any] = {
        "in_channels": 2,
        "out_channels": 3,
        "widths": [8, 12, 16],
        "blocks_per_level": 1,
        "attention_levels": [1],
        "embedding_dim": 16,
        "num_heads": 2,
        "num_classes": CLASSES,
    }
    torch.manual_seed(0)
    return UNet(**(arguments | changes))


def perturbed(network: UNet) -> UNet:
    """`network` with noise on every parameter, so that no layer hides behind one that starts at zero."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return network


def inputs(batch: int = 2, height: int = 8, width: int = 8, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(2)
    x = torch.randn(batch, 2, height, width, **kwargs)
    t = torch.linspace(0.2, 0.9, batch, **kwargs)
    return x, t, torch.arange(batch) % CLASSES


@pytest.mark.parametrize("extra_decoder_block", [True, False])
@pytest.mark.parametrize("patch_size", [1, 2])
@pytest.mark.parametrize("size", [(8, 8), (28, 28), (33, 47), (16, 40), (5, 7), (1, 1)])
def test_output_has_the_input_size(size: tuple[int, int], patch_size: int, extra_decoder_block: bool) -> None:
    network = build(patch_size=patch_size, extra_decoder_block=extra_decoder_block)
    x, t, labels = inputs(2, *size)
    assert network(x, t, labels).shape == (2, 3, *size)


def test_a_new_network_returns_zeros_and_a_changed_one_does_not() -> None:
    network = build()
    assert torch.count_nonzero(network(*inputs())) == 0
    assert network.conv_out.bias is not None
    assert perturbed(network)(*inputs()).std() > 0.01


def test_a_new_block_is_its_shortcut() -> None:
    x, emb = torch.randn(2, 8, 6, 6), torch.randn(2, 16)
    assert torch.equal(ResidualBlock(8, 8, 16, dropout=0.0)(x, emb), x)
    assert torch.equal(SelfAttention(8, 2)(x), x)


@pytest.mark.parametrize("patch_size", [1, 2])
def test_padding_repeats_the_border_at_the_right_and_bottom(patch_size: int) -> None:
    network = perturbed(build(patch_size=patch_size)).double()
    multiple = 4 * patch_size
    x, t, labels = inputs(2, 2 * multiple - 3, multiple - 1, dtype=torch.float64)
    by_hand = torch.cat([x, x[:, :, -1:].expand(-1, -1, 3, -1)], dim=2)
    by_hand = torch.cat([by_hand, by_hand[..., -1:]], dim=3)
    expected = network(by_hand, t, labels)[..., :-3, :-1]
    torch.testing.assert_close(network(x, t, labels), expected, rtol=0, atol=1e-12)


def test_a_size_that_divides_is_not_padded(monkeypatch: pytest.MonkeyPatch) -> None:
    network = build(patch_size=2)

    def refuse(*_: Any, **__: Any) -> Tensor:
        raise AssertionError("padded")

    monkeypatch.setattr(F, "pad", refuse)
    network(*inputs(2, 8, 24))
    with pytest.raises(AssertionError, match="padded"):
        network(*inputs(2, 8, 25))


@pytest.mark.parametrize("extra_decoder_block", [True, False])
def test_the_gradient_reaches_every_parameter(extra_decoder_block: bool) -> None:
    network = perturbed(build(extra_decoder_block=extra_decoder_block))
    x, t, _ = inputs(CLASSES + 1)
    network(x, t, torch.arange(CLASSES + 1)).square().sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        # A key's bias shifts all scores of a query alike, so softmax cancels it: only the rest must be reached.
        gradient = parameter.grad
        if name.endswith("qkv.bias"):
            query, _, value = gradient.chunk(3)
            gradient = torch.cat([query, value])
        assert gradient.isfinite().all(), name
        assert (gradient.flatten(1) if gradient.ndim > 1 else gradient[:, None]).abs().amax(1).min() > 0, name


def test_labels_and_scale_change_the_result() -> None:
    network = perturbed(build())
    x, t, labels = inputs()
    out = network(x, t, labels)
    assert (network(x, t, (labels + 1) % CLASSES) - out).abs().max() > 1e-3
    assert (network(x, t * 0.5, labels) - out).abs().max() > 1e-3


def test_no_labels_means_the_extra_index() -> None:
    network = perturbed(build())
    x, t, labels = inputs()
    none = torch.full_like(labels, CLASSES)
    assert torch.equal(network(x, t), network(x, t, none))
    mixed = network(x, t, torch.stack([labels[0], none[1]]))
    torch.testing.assert_close(mixed[1], network(x, t)[1])
    assert (mixed[0] - network(x, t)[0]).abs().max() > 1e-3


@pytest.mark.parametrize("patch_size", [1, 2])
def test_channels_last_gives_the_same_and_stays(patch_size: int) -> None:
    network = perturbed(build(patch_size=patch_size))
    x, t, labels = inputs(2, 16, 24)
    expected = network(x, t, labels)
    assert expected.is_contiguous()
    network = network.to(memory_format=torch.channels_last)
    out = network(x.to(memory_format=torch.channels_last), t, labels)
    assert out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5 * float(expected.detach().abs().max()))


@pytest.mark.parametrize("block", [ResidualBlock(8, 12, 16, 0.0), SelfAttention(8, 2)], ids=["residual", "attention"])
def test_blocks_stay_channels_last(block: nn.Module) -> None:
    block = block.to(memory_format=torch.channels_last)
    x = torch.randn(2, 8, 4, 6).to(memory_format=torch.channels_last)
    out = block(x, torch.randn(2, 16)) if isinstance(block, ResidualBlock) else block(x)
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert not out.is_contiguous()


def test_bf16_autocast_is_close_to_fp32() -> None:
    network = perturbed(build())
    x, t, labels = inputs(2, 16, 16)
    expected = network(x, t, labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = network(x, t, labels)
    assert out.dtype == torch.bfloat16
    assert not torch.equal(out.float(), expected)
    out.float().square().mean().backward()
    assert ((out - expected).norm() / expected.norm()).item() < 0.05


#: every kind of layer once: attention, labels, and a way down and up
LITTLE: dict[str, Any] = {"widths": [4, 8], "embedding_dim": 8, "num_heads": 1}


def test_dynamo_captures_one_graph_without_labels_too() -> None:
    torch._dynamo.reset()
    network = perturbed(build(**LITTLE, patch_size=2))
    compiled = torch.compile(network, fullgraph=True, backend="eager")
    x, t, _ = inputs(2, 9, 12)
    torch.testing.assert_close(compiled(x, t), network(x, t))


@pytest.mark.slow
def test_dynamo_shares_one_graph_between_batch_sizes() -> None:
    torch._dynamo.reset()
    network = perturbed(build(**LITTLE))
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(network, fullgraph=True, backend=counter, dynamic=True)
    for batch in (5, 6, 7):  # equal sizes would be taken for one symbol, and 2 is the number of channels
        torch.testing.assert_close(compiled(*inputs(batch)), network(*inputs(batch)))
    assert counter.frame_count == 1


def test_compiled_gradients_are_the_same() -> None:
    check_compiled_gradients(perturbed(build(**LITTLE)).double(), inputs(dtype=torch.float64))


@pytest.mark.slow
def test_inductor_gives_the_same() -> None:
    check_inductor(perturbed(build(**LITTLE)), inputs())


@pytest.mark.parametrize(
    ("device", "labelled", "autocast"),
    [("cuda", True, False), ("cuda", False, False), ("cpu", True, False), ("cpu", True, True)],
)
def test_everything_stays_on_the_device(device: str, labelled: bool, autocast: bool) -> None:
    # Fake tensors refuse mixed devices and any value read back, so this needs no GPU.
    with FakeTensorMode():
        with torch.device(device):
            network = build(patch_size=2)
            x, t = torch.randn(2, 2, 9, 12), torch.rand(2)
            labels = torch.zeros(2, dtype=torch.int64) if labelled else None
        with torch.autocast(device, dtype=torch.bfloat16, enabled=autocast):
            out = network(x, t, labels)
        assert out.device.type == device
        assert out.shape == (2, 3, 9, 12)
        if device == "cpu" or torch.cuda.is_available():  # the autograd engine asks the driver for its context
            out.float().square().mean().backward()
            assert all(p.grad is not None and p.grad.device.type == device for p in network.parameters())


def load(name: str, **changes: Any) -> UNet:
    config = OmegaConf.merge(OmegaConf.load(CONFIGS / f"{name}.yaml"), changes)
    network = instantiate(config)
    assert isinstance(network, UNet)
    return network


@pytest.mark.parametrize(
    ("name", "channels", "low", "high"),
    [("tiny", 1, 0.75e6, 0.95e6), ("small", 1, 1.2e6, 1.6e6), ("adm", 3, 265e6, 300e6)],
)
def test_configs_build_networks_of_the_stated_size(name: str, channels: int, low: float, high: float) -> None:
    with torch.device("meta"):
        network = load(name, in_channels=channels, out_channels=channels)
        x, t = torch.randn(1, channels, 64, 64), torch.rand(1)
        assert network(x, t).shape == x.shape
    assert low < sum(p.numel() for p in network.parameters()) < high


@pytest.mark.parametrize("name", ["tiny", "small", "adm"])
def test_configs_leave_channels_and_classes_to_the_caller(name: str) -> None:
    config = OmegaConf.load(CONFIGS / f"{name}.yaml")
    assert OmegaConf.missing_keys(config) == {"in_channels", "out_channels"}
    assert OmegaConf.select(config, "num_classes", default="absent") is None


def test_adm_attends_at_32_16_and_8_pixels_with_heads_of_64() -> None:
    sides: set[tuple[int, int]] = set()
    with torch.device("meta"):
        network = load("adm", in_channels=3, out_channels=3)
        for module in network.modules():
            if isinstance(module, SelfAttention):
                module.register_forward_hook(
                    lambda m, args, _: sides.add((args[0].shape[-1], args[0].shape[1] // m.num_heads))
                )
        network(torch.randn(1, 3, 64, 64), torch.rand(1))
    assert sides == {(32, 64), (16, 64), (8, 64)}


def test_scale_features_follow_the_formula() -> None:
    t = torch.tensor([0.0, 0.001, 0.37, 1.0], dtype=torch.float64)
    features = ScaleEmbedding(6).features(t)
    frequencies = torch.tensor([1.0, 1e-2, 1e-4], dtype=torch.float64)
    angles = 1000 * t[:, None] * frequencies
    torch.testing.assert_close(features, torch.cat([angles.cos(), angles.sin()], dim=1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scale_features_tell_scales_apart(dtype: torch.dtype) -> None:
    embedding = ScaleEmbedding(64)
    t = torch.arange(0, 1001, dtype=dtype) / 1000
    features = embedding.features(t)
    distances = torch.cdist(features, features, compute_mode="donot_use_mm_for_euclid_dist")
    assert distances.fill_diagonal_(torch.inf).min() > 0.5
    with torch.no_grad():
        near, far = embedding.double()(torch.tensor([0.001, 0.002], dtype=torch.float64))
    assert (near - far).norm() > 0.01


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_samples_do_not_see_each_other(dtype: torch.dtype, tolerance: float) -> None:
    network = perturbed(build()).to(dtype)
    x, t, labels = inputs(2, 8, 12, dtype=dtype)
    together = network(x, t, labels)
    alone = torch.cat([network(x[i : i + 1], t[i : i + 1], labels[i : i + 1]) for i in range(2)])
    torch.testing.assert_close(together, alone, rtol=0, atol=tolerance * max(1.0, float(alone.detach().abs().max())))


def test_attention_is_softmax_of_scaled_products() -> None:
    torch.manual_seed(0)
    heads, channels, x = 2, 8, torch.randn(3, 8, 4, 5, dtype=torch.float64)
    attention = SelfAttention(channels, heads).double()
    nn.init.normal_(attention.project.weight)
    nn.init.normal_(attention.project.bias)
    tokens = attention.norm(x).permute(0, 2, 3, 1).reshape(3, 20, channels)
    q, k, v = (tokens @ attention.qkv.weight.T + attention.qkv.bias).split(channels, dim=-1)
    parts = []
    for head in range(heads):
        part = slice(head * channels // heads, (head + 1) * channels // heads)
        scores = q[..., part] @ k[..., part].transpose(1, 2) / (channels / heads) ** 0.5
        parts.append(scores.softmax(dim=-1) @ v[..., part])
    mixed = torch.cat(parts, dim=-1) @ attention.project.weight.T + attention.project.bias
    expected = x + mixed.reshape(3, 4, 5, channels).permute(0, 3, 1, 2)
    torch.testing.assert_close(attention(x), expected, rtol=0, atol=1e-12)


def test_residual_block_scales_and_shifts_its_second_norm() -> None:
    torch.manual_seed(0)
    x, emb = torch.randn(2, 8, 5, 6, dtype=torch.float64), torch.randn(2, 16, dtype=torch.float64)
    block = ResidualBlock(8, 12, 16, dropout=0.0).double()
    nn.init.normal_(block.conv2.weight)
    scale, shift = block.modulation(emb)[..., None, None].split(12, dim=1)
    h = block.norm2(block.conv1(F.silu(block.norm1(x)))) * (1 + scale) + shift
    torch.testing.assert_close(block(x, emb), block.shortcut(x) + block.conv2(F.silu(h)), rtol=0, atol=1e-12)


def test_dropout_acts_in_training_only() -> None:
    network = perturbed(build(dropout=0.5))
    arguments = inputs()
    assert not torch.equal(network(*arguments), network(*arguments))
    network.eval()
    assert torch.equal(network(*arguments), network(*arguments))


@pytest.mark.parametrize(("channels", "groups"), [(4, 1), (7, 1), (24, 6), (36, 9), (192, 32), (88, 22)])
def test_group_norm_has_groups_of_four_and_more(channels: int, groups: int) -> None:
    assert group_norm(channels).num_groups == groups


@pytest.mark.parametrize(
    ("changes", "seen"),
    [
        ({"in_channels": 0}, "in_channels is 0"),
        ({"out_channels": -1}, "out_channels is -1"),
        ({"out_channels": None}, "out_channels is None"),
        ({"widths": []}, r"widths is \[\]"),
        ({"widths": 32}, "widths is 32"),
        ({"widths": [8, 2]}, r"widths is \[8, 2\]"),
        ({"widths": [8, 12.5]}, r"widths is \[8, 12.5\]"),
        ({"blocks_per_level": 0}, "blocks_per_level is 0"),
        ({"blocks_per_level": True}, "blocks_per_level is True"),
        ({"attention_levels": [3]}, r"attention_levels is \[3\]"),
        ({"attention_levels": [-1]}, r"attention_levels is \[-1\]"),
        ({"embedding_dim": 15}, "embedding_dim is 15"),
        ({"patch_size": 0}, "patch_size is 0"),
        ({"num_heads": 3}, "16 channels cannot be split into 3|8 channels cannot be split into 3"),
        ({"num_heads": None, "head_dim": 5}, "head_dim is 5"),
        ({"num_heads": 2, "head_dim": 4}, "num_heads is 2 and head_dim is 4"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"num_classes": 0}, "num_classes is 0"),
    ],
)
def test_a_wrong_argument_is_named(changes: dict[str, Any], seen: str) -> None:
    with pytest.raises(UserError, match=seen) as caught:
        build(**changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "seen"),
    [
        ({"x": torch.randn(2, 3, 8, 8)}, r"x has shape \(2, 3, 8, 8\).*\(batch, 2, height, width\)"),
        ({"x": torch.randn(2, 8, 8)}, r"x has shape \(2, 8, 8\)"),
        ({"x": torch.zeros(2, 2, 8, 8, dtype=torch.uint8)}, "type torch.uint8"),
        ({"t": torch.rand(3)}, r"t has shape \(3,\).*shape \(2,\)"),
        ({"t": torch.tensor(0.5)}, r"t has shape \(\)"),
        ({"t": torch.tensor([1, 2])}, "type torch.int64"),
        ({"labels": torch.zeros(1, dtype=torch.int64)}, r"labels have shape \(1,\)"),
        ({"labels": torch.zeros(2)}, "type torch.float32"),
    ],
)
def test_a_wrong_input_is_named(changes: dict[str, Tensor], seen: str) -> None:
    x, t, labels = inputs()
    with pytest.raises(UserError, match=seen) as caught:
        build()(**({"x": x, "t": t, "labels": labels} | changes))
    assert "\n" not in str(caught.value)


def test_labels_for_a_network_without_classes_are_refused() -> None:
    with pytest.raises(UserError, match="without classes"):
        build(num_classes=None)(*inputs())
