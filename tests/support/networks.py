"""Check what every network of the package must do, whatever its layers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._inductor import config as inductor
from torch._subclasses.fake_tensor import FakeTensorMode

from dpm_scales.describe import describe
from dpm_scales.errors import UserError
from dpm_scales.models.instantiate import build as built

CLASSES = 3


def perturbed(network: nn.Module) -> nn.Module:
    """Return `network` with noise on every parameter, so that no layer hides behind one that starts at zero."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return network


def inputs(
    batch: int = 2, height: int = 8, width: int = 8, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """Return images of two channels, scales and labels."""
    torch.manual_seed(2)
    x = torch.randn(batch, 2, height, width, dtype=dtype)
    t = torch.linspace(0.2, 0.9, batch, dtype=dtype)
    return x, t, torch.arange(batch) % CLASSES


def check_network_contract(make: Callable[..., nn.Module], size: tuple[int, int]) -> None:
    """Assert the contract of `networks.base.Network` for a network from 2 to 3 channels with `CLASSES` classes.

    Args:
        make: builds it, with changes of its arguments by name.
        size: size of rectangular images that it takes without padding.
    """
    _check_results(make, size)
    _check_formats(make, size)
    _check_gradients(make, size)
    _check_construction(make, size)
    _check_devices(make, size)
    _check_messages(make, size)


def _check_results(make: Callable[..., nn.Module], size: tuple[int, int]) -> None:
    network = perturbed(make()).double()
    x, t, labels = inputs(2, *size, dtype=torch.float64)
    out = network(x, t, labels)
    assert out.shape == (2, 3, *size) and out.dtype == torch.float64 and out.std() > 0.01
    changed = {"x": (x + 1, t, labels), "t": (x, t * 0.5, labels), "labels": (x, t, (labels + 1) % CLASSES)}
    for name, arguments in changed.items():
        assert (network(*arguments) - out).abs().max() > 1e-3, name
    alone = torch.cat([network(x[i : i + 1], t[i : i + 1], labels[i : i + 1]) for i in range(2)])
    torch.testing.assert_close(alone, out, rtol=0, atol=1e-10)
    none = torch.full_like(labels, CLASSES)
    assert torch.equal(network(x, t), network(x, t, none))
    mixed = network(x, t, torch.stack([labels[0], none[1]]))
    torch.testing.assert_close(mixed[1], network(x, t)[1], rtol=0, atol=1e-10)


def _check_formats(make: Callable[..., nn.Module], size: tuple[int, int]) -> None:
    network = perturbed(make())
    x, t, labels = inputs(2, *size)
    expected = network(x, t, labels)
    limit = float(expected.detach().abs().max())
    last = network.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last), t, labels)
    torch.testing.assert_close(last, expected, rtol=0, atol=1e-4 * limit)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = network(x, t, labels)
    low.float().square().mean().backward()
    assert ((low.float() - expected).norm() / expected.norm()).item() < 0.1


def _check_gradients(make: Callable[..., nn.Module], size: tuple[int, int]) -> None:
    network = perturbed(make())
    x, t, _ = inputs(CLASSES + 1, *size)
    network(x, t, torch.arange(CLASSES + 1)).square().sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


def _check_construction(make: Callable[..., nn.Module], size: tuple[int, int]) -> None:
    """Build it from its description, on the meta device, and completed by a model, and load weights each time."""
    network = perturbed(make())
    arguments = inputs(2, *size)
    expected = network(*arguments)
    again = built(describe(network), nn.Module, "network")
    again.load_state_dict(network.state_dict())
    assert torch.equal(again(*arguments), expected)
    with torch.device("meta"):
        empty = make()
        assert empty(*(value.to("meta") for value in arguments)).shape == expected.shape
    empty.to_empty(device="cpu")
    empty.load_state_dict(network.state_dict())
    assert torch.equal(empty(*arguments), expected)
    later = make(in_channels=None, out_channels=None, num_classes=None)
    later.complete(in_channels=2, out_channels=3, num_classes=CLASSES)  # type: ignore[operator]
    later.load_state_dict(network.state_dict())
    assert torch.equal(later(*arguments), expected)


def _check_devices(make: Callable[..., nn.Module], size: tuple[int, int]) -> None:
    """Fake tensors refuse mixed devices and any value read back, so this needs no GPU."""
    with FakeTensorMode(), torch.device("cuda"):
        network = make()
        x, t = torch.randn(2, 2, *size), torch.rand(2)
        for labels in (torch.zeros(2, dtype=torch.int64), None):
            out = network(x, t, labels)
            assert out.device.type == "cuda" and out.shape == (2, 3, *size)


def check_inductor(network: nn.Module, arguments: tuple[Tensor, ...]) -> None:
    """Assert that dynamo captures the network in one graph, and that inductor's code gives the network's results.

    The backward pass is not compiled, see `check_compiled_gradients`. Scalar code, compiled in this process, takes a
    third of the time: vector instructions are inductor's responsibility, and each of its workers would import torch.
    """
    torch._dynamo.reset()
    with torch.no_grad(), inductor.patch({"compile_threads": 1, "cpp.vec_isa_ok": False}):
        compiled = torch.compile(network, fullgraph=True)
        torch.testing.assert_close(compiled(*arguments), network(*arguments), rtol=1e-4, atol=1e-4)


def check_compiled_gradients(network: nn.Module, arguments: tuple[Tensor, ...]) -> None:
    """Assert that forward and backward passes are captured in one graph each, with the network's own gradients."""
    torch._dynamo.reset()
    found = []
    for one in (torch.compile(network, fullgraph=True, dynamic=False, backend="aot_eager"), network):
        network.zero_grad()
        one(*arguments).square().sum().backward()
        found.append({name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None})
    assert len(found[1]) == len(list(network.parameters()))
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-9)


def _check_messages(make: Callable[..., nn.Module], size: tuple[int, int]) -> None:
    x, t, labels = inputs(2, *size)
    network, plain = make(), make(num_classes=None)
    assert plain(x, t).shape == (2, 3, *size)
    for run, line in (
        (lambda: network(x[:, :1], t, labels), r"x has shape .*allowed is floating point"),
        (lambda: network(x, t[:1], labels), r"t has shape \(1,\)"),
        (lambda: network(x, t, labels.float()), "labels have shape .* type torch.float32"),
        (lambda: plain(x, t, labels), "without classes"),
        (lambda: make(in_channels=None, out_channels=None)(x, t), "has no layers yet"),
        (lambda: make(out_channels=None), "give both"),
    ):
        with pytest.raises(UserError, match=line) as caught:
            run()
        assert "\n" not in str(caught.value)


#: options of runs with the papers' networks at toy size, for 8 px digits; `support.shell.SMALL` has those of the U-Net
TOY = {
    "jit": ("network=jit", "network.width=16", "network.depth=2", "network.num_heads=2", "network.bottleneck=6"),
    "edm2": ("network=edm2", "network.widths=[8,8]", "network.head_dim=4", "network.attention_levels=[1]"),
}
