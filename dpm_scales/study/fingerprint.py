"""Fingerprints of processes and images: stored results are reused only if these are the same.

A process is described by its class and its whole content, however it was built: schedules, operator, every argument of
its constructor. An omitted option of a config and the same option at its default give the same description; any other
value of any option gives a different one.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dpm_scales.data.image_sets import NumberedImages
from dpm_scales.errors import UserError
from dpm_scales.operators import Degrees

_CONTENT = ("_parameters", "_buffers", "_modules")
_BOOKKEEPING = vars(nn.Module()).keys() - set(_CONTENT)
"""Attributes of every torch module that are not its content: hooks, modes, names."""

_OPAQUE = ("builtins", "functools", "types")
"""Modules of functions, methods and partial functions, whose attributes do not describe what they compute."""

_KNOWN_CODE = ("dpm_scales", "torch", "numpy", "abc", "builtins", "typing")
"""Packages whose code changes only with their version."""

MAX_DEPTH = 40


def fingerprint(*content: Any) -> str:
    """Return the hexadecimal SHA-256 of values that JSON can represent."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def describe(value: Any, where: str = "process", depth: int = 0) -> Any:
    """Return a description of a process, or of part of its content, in plain containers.

    Args:
        value: numbers, strings, None, containers, tensors and arrays (by content), objects (by class and attributes).
            A class outside this package includes its source code, if Python finds it.
        where: name of the value, for messages.
        depth: number of enclosing objects and containers.

    Raises: UserError for values that cannot be described: functions, files, objects that contain themselves.
    """
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value.hex()  # exact, and also for infinities, which JSON lacks
    if isinstance(value, Tensor | np.ndarray | np.generic):
        array = value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
        if array.dtype != object:
            return [str(array.dtype), list(array.shape), hashlib.sha256(array.tobytes()).hexdigest()]
    if isinstance(value, torch.dtype | torch.device):
        return str(value)
    if isinstance(value, type):
        return _named(value)
    if isinstance(value, list | tuple | set | frozenset):
        items = [describe(item, where, depth + 1) for item in value]
        return items if isinstance(value, list | tuple) else {"set": sorted(items, key=json.dumps)}
    if isinstance(value, Mapping):
        pairs = [[describe(key, where), describe(item, f"{where}.{key}", depth + 1)] for key, item in value.items()]
        return {"mapping": sorted(pairs, key=json.dumps)}
    held = getattr(value, "__dict__", None)
    if held is None or type(value).__module__ in _OPAQUE or depth > MAX_DEPTH:
        raise UserError(
            f"{where}: {value!r} can't be compared with what an earlier call had; hold numbers, strings, lists or "
            "objects of them instead"
        )
    if isinstance(value, nn.Module):
        # degrees are remembered results, which follow from the rest
        held = {k: item for k, item in held.items() if k not in _BOOKKEEPING and not isinstance(item, Degrees)}
    return [_named(type(value)), describe(held, where, depth + 1)]


def _named(kind: type) -> list[str]:
    """Return the name of a class, followed by its source and that of its bases, except for `_KNOWN_CODE`."""
    name = f"{kind.__module__}.{kind.__qualname__}"
    return [name, *(_source(base) for base in kind.__mro__ if base.__module__.partition(".")[0] not in _KNOWN_CODE)]


def _source(kind: type) -> str:
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):  # defined in an interpreter, or compiled
        return ""


def describe_images(images: NumberedImages) -> list[list[Any]]:
    """Return the name, size and SHA-256 of each image, whose content is read once."""
    return [
        [name, list(size), images.digest(index)]
        for index, (name, size) in enumerate(zip(images.names, images.sizes, strict=True))
    ]
