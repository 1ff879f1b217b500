"""Compare the weights in a file with the model that its config describes, before allocating that model's memory.

One line in an untrusted config can describe a network of a million channels or a billion blocks. The weights in the
file bound what the config may request: the network is built on torch's meta device, where weights have shapes but no
memory, and building stops when it has more tensors than the file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from dpm_scales.errors import OutOfMemoryError, UserError
from dpm_scales.memory import available_memory


class MisfitError(UserError):
    """Weights that do not fit the config."""


@contextmanager
def at_most(count: int) -> Iterator[None]:
    """Raise MisfitError in the body as soon as its modules have more than `count` parameter tensors in all."""
    numbers = iter(range(count))

    def register(parameter: nn.Parameter) -> None:
        if next(numbers, None) is None:
            raise MisfitError(f"the config asks for more than {count} tensors, and the file has fewer")

    with _at_each_parameter(register):
        yield


@contextmanager
def within_memory(what: str) -> Iterator[None]:
    """Raise OutOfMemoryError in the body as soon as its modules' parameters exceed the memory that was free before."""
    free = available_memory()

    def register(parameter: nn.Parameter) -> None:
        nonlocal free
        free -= parameter.numel() * parameter.element_size()
        if free < 0:
            raise OutOfMemoryError(f"{what} has more parameters than this machine has memory for; choose a smaller one")

    with _at_each_parameter(register):
        yield


@contextmanager
def _at_each_parameter(function: Callable[[nn.Parameter], None]) -> Iterator[None]:
    """Call a function for every parameter registered by a module in the body."""
    handle = register_module_parameter_registration_hook(lambda _module, _name, parameter: function(parameter))
    try:
        yield
    finally:
        handle.remove()


def require_fit(make: Callable[[], nn.Module], weights: Mapping[str, Tensor], prefix: str) -> None:
    """Raise MisfitError unless the parameters and buffers of a module match `weights` in name, shape and type.

    Args:
        make: builds the module; it is called on the meta device.
        weights: all weights of the model.
        prefix: prefix of the module's names in `weights`.
    """
    held = {name: value for name, value in weights.items() if name.startswith(prefix)}
    with torch.device("meta"), at_most(len(held) + 100):  # a margin, so that the message can name missing ones
        wanted = {prefix + name: value for name, value in make().state_dict().items()}
    for name in wanted:
        if name not in held:
            raise MisfitError(f'Missing key "{name}"')
    for name, value in held.items():
        if name not in wanted:
            raise MisfitError(f'Unexpected key "{name}"')
        if value.shape != wanted[name].shape:
            shapes = f"{tuple(value.shape)} in the file, {tuple(wanted[name].shape)} by the config"
            raise MisfitError(f"size mismatch for {name}: {shapes}")
    require_dtypes(held, wanted)


def require_dtypes(held: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Raise MisfitError if tensors of the same name differ in type; copying would convert them silently."""
    for name, value in held.items():
        if name in wanted and value.dtype != wanted[name].dtype:
            raise MisfitError(f"{name} is {value.dtype} in the file, {wanted[name].dtype} by the config")


def not_finite(state: Mapping[str, Tensor]) -> str | None:
    """Return the name of the first tensor that holds a NaN or an infinity, or None."""
    for name, value in state.items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            return name
    return None
