"""Compile networks, and compute them as they are where compiling fails.

torch compiles at the first call for each shape of the inputs, and the backward pass at the first gradient. Whether it
can is found out by a trial before the first such call: an evaluation, and a gradient where one is computed, whose
effects on random numbers and buffers are undone. So a failure changes nothing: the same call is then computed plainly.
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
    """Calls the compiled form of a network; once compiling has failed, the plain form.

    Args:
        network: whose parameters and buffers both forms use.
        compiled, plain: both forms, functions of the same arguments, the first one a tensor.
        failed: called once, after the plain form has returned: an error of the network itself comes before it.
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
        """Compile for these arguments; return why that fails, None if it does not."""
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
    """Return class and first line of what a backend has raised, at most `LONGEST_REASON` characters."""
    inner = getattr(error, "inner_exception", error)
    line = next((line.strip() for line in str(inner).splitlines() if line.strip()), "")
    return printable(f"{type(inner).__name__}: {line}" if line else type(inner).__name__)[:LONGEST_REASON]


def _compiled(
    network: nn.Module, plain: Callable[..., Tensor], failed: Failed, mode: str | None = None
) -> Callable[..., Tensor]:
    """Return the compiled form of a function of a network, guarded, or the function where none can be made."""
    try:
        made = torch.compile(_with_own_code(plain), fullgraph=True, dynamic=False, mode=mode)
    except RuntimeError as error:  # an interpreter or system that torch.compile does not know
        failed(reason_of(error))
        return plain
    return Guarded(network, made, plain, failed)


def _with_own_code(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return a function that calls `function`, with a code object of its own.

    torch keeps and counts graphs by code object, and gives up after eight: without this, all networks of one class that
    a process makes, as in a sweep, would count as one.
    """

    def call(*args: Any, **kwargs: Any) -> Tensor:
        return function(*args, **kwargs)

    return FunctionType(call.__code__.replace(), globals(), call.__name__, None, call.__closure__)


@contextmanager
def compiled_training(network: nn.Module, failed: Failed) -> Iterator[None]:
    """Compile a network in one piece while the body runs, with its hooks.

    Names of parameters stay, and copies of the network are not compiled.

    Args:
        failed: called if compiling fails, at the first step; the network is then computed plainly.
    """
    made = _compiled(network, network._call_impl, failed)
    # `Module.__call__` calls it in place of `_call_impl`; copies of a module leave it out
    network._compiled_call_impl = made
    try:
        yield
    finally:
        network._compiled_call_impl = None


@contextmanager
def evaluated(networks: Iterable[nn.Module], bfloat16: bool, compiled: bool, failed: Failed) -> Iterator[None]:
    """Compute networks in another way while the body runs, in place; their hooks are called as before.

    Args:
        bfloat16: compute convolutions and matrix products in bfloat16, by autocast; the weights stay as they are.
        compiled: compile each in one piece, anew for each shape of its inputs; on CUDA as a CUDA graph.
        failed: called if compiling fails; the network is then computed plainly.
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
