"""Compile networks, and fall back to the uncompiled form where compiling fails.

torch compiles at the first call for each shape of the inputs, and the backward pass at the first gradient. Before the
first such call a trial tests whether that works: an evaluation, and a gradient where one is computed, whose effects on
random numbers and buffers are undone. So a failure changes nothing: the same call then runs uncompiled.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from dpm_scales.errors import printable

Failed = Callable[[str], None]
"""Called with the reason when compiling fails; may raise."""
LONGEST_REASON = 200


class Guarded:
    """A callable that runs the compiled form of a network or, once compiling has failed, the plain form.

    Args:
        network: the network whose parameters and buffers both forms use.
        compiled, plain: both forms, functions of the same arguments, the first one a tensor.
        failed: called once, after the plain form has returned, so that an error of the network itself is raised first.
    """

    def __init__(
        self, network: nn.Module, compiled: Callable[..., Tensor], plain: Callable[..., Tensor], failed: Failed
    ) -> None:
        self._network, self._compiled, self._plain, self._failed = network, compiled, plain, failed
        self._tried: set[Any] = set()
        self._usable = True

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        if not self._usable:
            return self._plain(*args, **kwargs)
        given = (*args, *kwargs.values())
        shapes = tuple((one.shape, one.dtype) if isinstance(one, Tensor) else None for one in given)
        kind = (shapes, torch.is_grad_enabled(), self._network.training)
        if kind not in self._tried:
            reason = self._trial(args, kwargs)
            if reason is not None:
                self._usable = False
                result = self._plain(*args, **kwargs)
                self._failed(reason)
                return result
            self._tried.add(kind)
        return self._compiled(*args, **kwargs)

    def _trial(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        """Compile for these arguments; return the reason if that fails, otherwise None."""
        device = args[0].device
        buffers = [(buffer, buffer.detach().clone()) for buffer in self._network.buffers()]
        try:
            with torch.random.fork_rng([device] if device.type == "cuda" else []):
                result = self._compiled(*args, **kwargs)
                if result.requires_grad:
                    weights = [p for p in self._network.parameters() if p.requires_grad]
                    torch.autograd.grad(result.sum(), weights, allow_unused=True)
        except Exception as error:  # whatever a backend may raise
            return reason_of(error)
        finally:
            with torch.no_grad():
                for buffer, value in buffers:
                    buffer.copy_(value)
        return None


def reason_of(error: Exception) -> str:
    """Return the class and first line of a backend's error, at most `LONGEST_REASON` characters."""
    inner = getattr(error, "inner_exception", error)
    line = next((line.strip() for line in str(inner).splitlines() if line.strip()), "")
    return printable(f"{type(inner).__name__}: {line}" if line else type(inner).__name__)[:LONGEST_REASON]


def _compiled(
    network: nn.Module, plain: Callable[..., Tensor], failed: Failed, mode: str | None = None
) -> Callable[..., Tensor]:
    """Return the compiled form of a function of a network, guarded, or the function itself if it can't be compiled."""
    try:
        made = torch.compile(_with_own_code(plain), fullgraph=True, dynamic=False, mode=mode)
    except RuntimeError as error:  # an interpreter or system that torch.compile does not support
        failed(reason_of(error))
        return plain
    return Guarded(network, made, plain, failed)


def _with_own_code(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return a function that calls `function`, with a separate code object.

    torch caches and counts graphs by code object, and gives up after eight: without this, all networks of one class
    that a process builds, as in a sweep, would share that limit.
    """

    def call(*args: Any, **kwargs: Any) -> Tensor:
        return function(*args, **kwargs)

    return FunctionType(call.__code__.replace(), globals(), call.__name__, None, call.__closure__)


@contextmanager
def compiled_training(network: nn.Module, failed: Failed) -> Iterator[None]:
    """Compile a network as a single graph for training while the body runs, including its hooks.

    In evaluation mode it runs uncompiled: validations and sample grids have shapes of their own, and compiling for each
    takes longer than it saves. Parameter names do not change, and copies of the network are not compiled.

    Args:
        failed: called if compiling fails, at the first step; the network then runs uncompiled.
    """
    plain: Callable[..., Tensor] = network._call_impl
    made = _compiled(network, plain, failed)

    def call(*args: Any, **kwargs: Any) -> Tensor:
        return made(*args, **kwargs) if network.training else plain(*args, **kwargs)

    # `Module.__call__` calls it in place of `_call_impl`; copies of a module omit it
    network._compiled_call_impl = call
    try:
        yield
    finally:
        network._compiled_call_impl = None


@contextmanager
def evaluated(networks: Iterable[nn.Module], bfloat16: bool, compiled: bool, failed: Failed) -> Iterator[None]:
    """Run networks in bfloat16 or compiled while the body runs, in place; their hooks are called as before.

    Args:
        bfloat16: compute convolutions and matrix products in bfloat16, by autocast; the weights are not converted.
        compiled: compile each as a single graph, separately for each shape of its inputs; on CUDA as a CUDA graph.
        failed: called if compiling fails; the network then runs uncompiled.
    """
    changed: list[nn.Module] = []
    try:
        for network in networks if bfloat16 or compiled else ():
            # an attribute of the instance hides the method, and `Module.__call__` calls it between the hooks
            network.forward = _forward(network, bfloat16, compiled, failed)
            changed.append(network)
        yield
    finally:
        for network in changed:
            del network.forward


def _forward(network: nn.Module, bfloat16: bool, compiled: bool, failed: Failed) -> Callable[..., Tensor]:
    plain: Callable[..., Tensor] = network.forward
    graphed = compiled and next((p.is_cuda for p in network.parameters()), False)
    compute = _compiled(network, plain, failed, "reduce-overhead" if graphed else None) if compiled else plain

    @functools.wraps(plain)
    def forward(*args: Any, **kwargs: Any) -> Tensor:
        if graphed:
            torch.compiler.cudagraph_mark_step_begin()
        with torch.autocast(args[0].device.type, torch.bfloat16) if bfloat16 else nullcontext():
            result = compute(*args, **kwargs)
        # the next evaluation of a CUDA graph overwrites its result
        return result.clone() if graphed else result

    return forward
