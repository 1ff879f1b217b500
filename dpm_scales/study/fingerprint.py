"""Fingerprints of processes and images: figures kept in a folder serve again only where these are the same.

A process is described by its class and all that it holds, whichever way it was built: schedules, operator, every value
that its constructor took. An option of a config that is left out and the same option at its default value give one
description; any other value of any option gives another.
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

_CONTENT = ("_parameters", "_buffers", "_modules")
_BOOKKEEPING = vars(nn.Module()).keys() - set(_CONTENT)
"""What every torch module holds besides its content: hooks, modes, names."""

_OPAQUE = ("builtins", "functools", "types")
"""Modules of functions, methods, partial functions: they have attributes, which say nothing of what they do."""

_KNOWN_CODE = ("dpm_scales", "torch", "numpy", "abc", "builtins", "typing")
"""Code that changes with a version alone."""

MAX_DEPTH = 40


def fingerprint(*content: Any) -> str:
    """Return the SHA-256, in hexadecimal digits, of values that JSON takes."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def describe(value: Any, where: str = "process", depth: int = 0) -> Any:
    """Describe a process, or whatever it holds, in plain containers.

    Args:
        value: numbers, strings, None, containers, tensors and arrays (by content), objects by their class and
            attributes. A class outside this package counts with its source code, as far as Python finds it.
        where: its name, for messages.
        depth: how many objects and containers lie around it.

    Raises: UserError for what can't be told apart from another: functions, files, objects that hold themselves.
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
        held = {key: item for key, item in held.items() if key not in _BOOKKEEPING}
    return [_named(type(value)), describe(held, where, depth + 1)]


def _named(kind: type) -> list[str]:
    """Name a class, with the source of whatever of it is not of this package."""
    name = f"{kind.__module__}.{kind.__qualname__}"
    return [name, *(_source(base) for base in kind.__mro__ if base.__module__.partition(".")[0] not in _KNOWN_CODE)]


def _source(kind: type) -> str:
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):  # typed into an interpreter, or compiled
        return ""


def describe_images(images: NumberedImages) -> list[list[Any]]:
    """Describe images by name, size and the SHA-256 of their content, which is read once."""
    return [
        [name, list(size), images.digest(index)]
        for index, (name, size) in enumerate(zip(images.names, images.sizes, strict=True))
    ]
