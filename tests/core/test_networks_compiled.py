"""Networks that are compiled, by backends of the tests: results are the plain ones, whether compiling works or not."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dpm_scales.errors import UserError
from dpm_scales.networks import compiled_training, evaluated

Graph = Callable[..., Any]


class Small(nn.Module):
    """Draws random numbers in training, and changes a buffer."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width)
        self.drop, self.last = nn.Dropout(0.5), nn.Conv2d(width, 1, 1)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        if x.shape[1] != 1:
            raise UserError("one channel alone")
        return self.last(self.drop(self.norm(self.first(x)))) * t[:, None, None, None]


class Broken(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        raise RuntimeError("no backward pass\nin two lines")


def steps(network: nn.Module) -> list[Tensor]:
    """Two steps of training and an evaluation: results, gradients, buffers and the next random number."""
    torch.manual_seed(1)
    found = []
    for count in (3, 3, 2):
        x, t = torch.randn(count, 1, 4, 6), torch.rand(count)
        network.train(count == 3)
        with torch.set_grad_enabled(count == 3):
            y = network(x, t)
        if count == 3:
            y.square().sum().backward()
        found.append(y.detach())
    gradients = [p.grad for p in network.parameters() if p.grad is not None]
    assert len(gradients) == 6
    return [*found, *gradients, *(b.clone() for b in network.buffers()), torch.rand(1)]


def compiling(monkeypatch: pytest.MonkeyPatch, backend: Callable[[Any, Any], Graph]) -> None:
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))


def no_graph(graph: Any, inputs: Any) -> Graph:
    raise RuntimeError("\nno such device\nand more")


def no_gradient(graph: Any, inputs: Any) -> Graph:
    return lambda *args: [Broken.apply(one) if one.requires_grad else one for one in graph.forward(*args)]


@pytest.mark.parametrize(
    ("backend", "reasons"),
    [
        (None, []),
        (no_graph, ["RuntimeError: no such device"]),
        (no_gradient, ["RuntimeError: no backward pass"]),
    ],
)
def test_a_compiled_network_is_the_plain_one(backend: Any, reasons: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Results, gradients, buffers and random numbers, also where the backend fails, for whatever reason."""
    torch.manual_seed(0)
    network = Small()
    twin, failed, graphs = copy.deepcopy(network), [], []

    def recorded(graph: Any, inputs: Any) -> Graph:
        graphs.append(graph)
        made: Graph = graph.forward if backend is None else backend(graph, inputs)
        return made

    compiling(monkeypatch, recorded)
    with compiled_training(network, failed.append):
        found = steps(network)
        assert network.state_dict().keys() == twin.state_dict().keys()
        inner = copy.deepcopy(network)
        before = len(graphs)
        inner(torch.randn(5, 1, 4, 6), torch.rand(5))
        assert len(graphs) == before, "a copy is not compiled"
    assert failed == reasons and len(graphs) == 1
    network(torch.randn(7, 1, 4, 6), torch.rand(7))
    assert len(graphs) == before, "nor is the network afterwards"
    for one, other in zip(found, steps(twin), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_evaluation_mode_is_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here what is compiled is off by one, and plain results come first, last and between."""
    compiling(monkeypatch, lambda graph, inputs: lambda *args: [one + 1 for one in graph.forward(*args)])
    network = Small()
    network.drop.p, network.norm.momentum = 0.0, 0.0
    inputs = [(torch.randn(n, 1, 4, 6), torch.rand(n)) for n in (2, 3)]
    with torch.no_grad():
        expected = [[network.train(training)(*one) for one in inputs] for training in (False, True)]
        with compiled_training(network, pytest.fail):
            for training in (False, True, False):
                for one, plain in zip(inputs, expected[training], strict=True):
                    torch.testing.assert_close(network.train(training)(*one) - int(training), plain)


def test_what_the_network_raises_itself_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    compiling(monkeypatch, lambda graph, inputs: graph.forward)
    network = Small()
    with compiled_training(network, pytest.fail), pytest.raises(UserError, match="^one channel alone$"):
        network(torch.randn(2, 3, 4, 6), torch.rand(2))


def test_networks_of_one_class_do_not_use_up_each_others_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the runs of a sweep in one process; torch keeps eight for each function."""
    compiling(monkeypatch, lambda graph, inputs: graph.forward)
    networks = [Small(width) for width in (2, 3, 4)]
    with torch._dynamo.config.patch(recompile_limit=1), torch.no_grad():
        for network in networks:
            with compiled_training(network, pytest.fail):
                network(torch.randn(2, 1, 4, 6), torch.rand(2))
        with evaluated(networks, False, True, pytest.fail):
            for network in networks:
                network(torch.randn(2, 1, 4, 6), torch.rand(2))


def test_an_interpreter_without_compilation(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **options: Any) -> None:
        raise RuntimeError("torch.compile is not supported here")

    monkeypatch.setattr(torch, "compile", refuse)
    network, failed = Small(), []
    with compiled_training(network, failed.append):
        assert network(torch.randn(2, 1, 4, 6), torch.rand(2)).shape == (2, 1, 4, 6)
    assert failed == ["RuntimeError: torch.compile is not supported here"]


@pytest.mark.parametrize("compiled", [False, True])
def test_networks_in_bfloat16_keep_weights_and_hooks(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Graph:
        graphs.append(graph)
        made: Graph = graph.forward
        return made

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    torch.manual_seed(0)
    network, seen = Small().eval(), []
    network.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    inputs = [(torch.randn(n, 1, 4, 6), torch.rand(n)) for n in (3, 3, 2)]
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            expected = [network(*one) for one in inputs]
        full = [network(*one) for one in inputs]
        seen.clear()
        with evaluated([network], True, compiled, pytest.fail):
            found = [network(*one) for one in inputs]
        assert seen == [3, 3, 2] and len(graphs) == (2 if compiled else 0)
        torch.testing.assert_close(network(*inputs[0]), full[0], rtol=0, atol=0)
    for one, other, plain in zip(found, expected, full, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
        assert not torch.equal(one.float(), plain)
    assert {p.dtype for p in network.parameters()} == {torch.float32} and "forward" not in vars(network)
