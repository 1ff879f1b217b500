"""JiT: positions by rotation, identity at the start, sizes, labels, number formats, and the paper's sizes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dpm_scales.errors import UserError
from dpm_scales.networks import JiT
from dpm_scales.networks.jit import JiTBlock, RotaryAttention, SwiGLU, rope_angles, rotate
from support.networks import (
    CLASSES,
    check_compiled_gradients,
    check_inductor,
    check_network_contract,
    inputs,
    perturbed,
)


def build(**changes: Any) -> JiT:
    """A transformer small enough for tests, with labels."""
    arguments: dict[str, Any] = {
        **{"in_channels": 2, "out_channels": 3, "width": 16, "depth": 3, "num_heads": 2, "patch_size": 4},
        **{"bottleneck": 6, "num_classes": CLASSES},
    }
    torch.manual_seed(0)
    return JiT(**(arguments | changes))


@pytest.mark.parametrize("class_tokens", [0, 3])
def test_the_contract_of_networks(class_tokens: int) -> None:
    check_network_contract(lambda **changes: build(class_tokens=class_tokens, **changes), (12, 20))


def test_rotations_are_those_of_complex_numbers() -> None:
    torch.manual_seed(0)
    angles = rope_angles(3, 5, 12, torch.device("cpu"), torch.float64)
    assert angles.shape == (15, 6)
    x = torch.randn(2, 15, 12, dtype=torch.float64)
    turned = torch.complex(x[..., :6], x[..., 6:]) * torch.exp(1j * angles)
    expected = torch.cat([turned.real, turned.imag], -1)
    torch.testing.assert_close(rotate(x, angles.cos(), angles.sin()), expected, rtol=0, atol=1e-12)


def test_angles_are_those_of_diffusers() -> None:
    """Each axis has the 1-D angles of diffusers, and its rotation of halves is the same."""
    embeddings = pytest.importorskip("diffusers.models.embeddings")
    rows, columns, head_dim = 3, 5, 16
    angles = rope_angles(rows, columns, head_dim, torch.device("cpu"), torch.float64)
    place = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
    parts = [
        embeddings.get_1d_rotary_pos_embed(
            head_dim // 2, place[:, axis], use_real=True, repeat_interleave_real=False, freqs_dtype=torch.float64
        )
        for axis in (0, 1)
    ]
    # of an axis: its angles twice, for the two halves of its channels
    for axis, (cosine, sine) in enumerate(parts):
        own = angles.chunk(2, 1)[axis]
        torch.testing.assert_close(cosine.double(), torch.cat([own, own], 1).cos(), rtol=0, atol=1e-6)
        x = torch.randn(1, 1, rows * columns, head_dim // 2, dtype=torch.float64)
        theirs = embeddings.apply_rotary_emb(x, (cosine.double(), sine.double()), use_real=True, use_real_unbind_dim=-2)
        torch.testing.assert_close(rotate(x, own.cos(), own.sin()), theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("shift", [(0, 1), (2, 0), (3, -2)])
def test_scores_depend_on_the_difference_of_places_alone(shift: tuple[int, int]) -> None:
    torch.manual_seed(0)
    rows, columns, head_dim = 9, 8, 8
    angles = rope_angles(rows, columns, head_dim, torch.device("cpu"), torch.float64).unflatten(0, (rows, columns))
    q, k = torch.randn(2, head_dim, dtype=torch.float64)

    def score(a: tuple[int, int], b: tuple[int, int]) -> Tensor:
        turned = [rotate(x[None], angles[p].cos()[None], angles[p].sin()[None])[0] for x, p in ((q, a), (k, b))]
        return turned[0] @ turned[1]

    a, b = (1, 4), (5, 2)
    moved = [(p[0] + shift[0], p[1] + shift[1]) for p in (a, b)]
    torch.testing.assert_close(score(a, b), score(*moved), rtol=0, atol=1e-12)
    assert abs(float(score(a, b) - score(a, moved[1]))) > 1e-3


def test_attention_by_hand() -> None:
    torch.manual_seed(0)
    rows, columns, width, heads = 2, 3, 16, 2
    attention = RotaryAttention(width, heads).double()
    nn.init.uniform_(attention.norm_q.weight, 0.5, 2)
    nn.init.uniform_(attention.norm_k.weight, 0.5, 2)
    x = torch.randn(2, 6, width, dtype=torch.float64)
    angles = rope_angles(rows, columns, 8, torch.device("cpu"), torch.float64)
    q, k, v = (x @ attention.qkv.weight.T + attention.qkv.bias).split(width, -1)
    parts = []
    for head in range(heads):
        part = slice(8 * head, 8 * head + 8)
        turned = []
        for values, norm in ((q[..., part], attention.norm_q), (k[..., part], attention.norm_k)):
            unit = values / (values.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight
            turned.append(torch.complex(unit[..., :4], unit[..., 4:]) * torch.exp(1j * angles))
        scores = (turned[0] @ turned[1].mH).real / math.sqrt(8)
        parts.append(scores.softmax(-1) @ v[..., part])
    expected = torch.cat(parts, -1) @ attention.project.weight.T + attention.project.bias
    torch.testing.assert_close(attention(x, angles.cos(), angles.sin()), expected, rtol=0, atol=1e-10)


def test_swiglu_by_hand() -> None:
    torch.manual_seed(0)
    layer, x = SwiGLU(6, 10).double(), torch.randn(4, 6, dtype=torch.float64)
    gate, value = (x @ layer.expand.weight.T + layer.expand.bias).split(10, -1)
    expected = (gate / (1 + (-gate).exp()) * value) @ layer.project.weight.T + layer.project.bias
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-12)


def test_a_new_block_is_the_identity_and_a_new_network_zero() -> None:
    network = build()
    block = network.blocks[1]
    assert isinstance(block, JiTBlock)
    x, emb, angles = torch.randn(2, 6, 16), torch.randn(2, 16), torch.randn(6, 4)
    assert torch.equal(block(x, emb, angles.cos(), angles.sin()), x)
    assert torch.count_nonzero(network(*inputs(2, 8, 12))) == 0
    # the gates get a gradient at once, the rest once they are open
    (block(x, emb, angles.cos(), angles.sin()) ** 2).sum().backward()
    assert all(block.modulation.weight.grad[i * 16 : i * 16 + 16].abs().sum() > 0 for i in (2, 5))  # type: ignore[index]


def test_moving_an_image_by_patches_moves_the_result() -> None:
    """One token has no neighbours: its place is not seen. Of two, the difference of places is."""
    network = perturbed(build()).double()
    x, t, labels = inputs(2, 4, 4, dtype=torch.float64)
    twice = torch.cat([x, x], -1)
    out = network(twice, t, labels)
    torch.testing.assert_close(out[..., :4], out[..., 4:], rtol=0, atol=1e-12)
    assert (network(torch.cat([x, -x], -1), t, labels)[..., :4] - out[..., :4]).abs().max() > 1e-4


def test_tokens_of_the_label_join_at_a_third_of_the_depth() -> None:
    network = perturbed(build(class_tokens=3, depth=6))
    counts: list[int] = []
    for block in network.blocks:
        block.register_forward_hook(lambda _, args, __: counts.append(args[0].shape[1]))
    network(*inputs(2, 8, 12))
    assert counts == [6, 6, 9, 9, 9, 9]


def test_dropout_acts_in_the_middle_half_and_in_training_only() -> None:
    network = perturbed(build(depth=8, dropout=0.5))
    rates = [block.attention.dropout.p for block in network.blocks]  # type: ignore[union-attr]
    assert rates == [0, 0, 0.5, 0.5, 0.5, 0.5, 0, 0]
    arguments = inputs(2, 8, 8)
    assert not torch.equal(network(*arguments), network(*arguments))
    network.eval()
    assert torch.equal(network(*arguments), network(*arguments))


@pytest.mark.parametrize(
    ("settings", "millions"), [({}, 131), ({"width": 1024, "depth": 24, "num_heads": 16}, 459)], ids=["B", "L"]
)
def test_the_papers_networks_have_the_papers_size(settings: dict[str, Any], millions: int) -> None:
    """The paper states JiT-B/16 131 M, JiT-L/16 459 M parameters."""
    with torch.device("meta"):
        network = JiT(3, 3, class_tokens=32, num_classes=1000, **settings)
    assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(millions, abs=1)


def test_compiled_gradients_are_the_same() -> None:
    check_compiled_gradients(perturbed(build(depth=1, class_tokens=3)).double(), inputs(2, 8, 12, dtype=torch.float64))


@pytest.mark.slow
def test_inductor_gives_the_same() -> None:
    check_inductor(perturbed(build(depth=1, class_tokens=3)), inputs(2, 8, 12))


@pytest.mark.parametrize(
    ("changes", "seen"),
    [
        ({"in_channels": 0}, "in_channels is 0"),
        ({"depth": 0}, "depth is 0"),
        ({"width": 20}, "width is 20 and num_heads is 2"),
        ({"num_heads": 3}, "width is 16 and num_heads is 3"),
        ({"patch_size": 1.5}, "patch_size is 1.5"),
        ({"bottleneck": True}, "bottleneck is True"),
        ({"mlp_ratio": -1}, "mlp_ratio must be"),
        ({"mlp_ratio": 0.01}, "mlp_ratio is 0.01"),
        ({"class_tokens": -1}, "class_tokens must be"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"num_classes": 0}, "num_classes is 0"),
    ],
)
def test_a_wrong_argument_is_named(changes: dict[str, Any], seen: str) -> None:
    with pytest.raises(UserError, match=seen) as caught:
        build(**changes)
    assert "\n" not in str(caught.value)


def test_sides_that_patches_do_not_divide_are_padded_by_the_border() -> None:
    network = perturbed(build()).eval()
    x, t, labels = inputs(2, 9, 11)
    padded = torch.from_numpy(np.pad(x.numpy(), ((0, 0), (0, 0), (0, 3), (0, 1)), mode="edge"))
    found = network(x, t, labels)
    assert found.shape == (2, 3, 9, 11)
    assert torch.equal(found, network(padded, t, labels)[..., :9, :11])
