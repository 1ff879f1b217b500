"""Keep tensors that depend only on sizes and a device, such as eigenvalues."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import lru_cache, wraps

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode


def kept(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return a function that keeps the constants that it makes, each a dozen kernels; callers must not change them.

    While torch compiles or a dispatch mode is active, such as that of fake tensors, constants are made anew.
    """
    cached = lru_cache(maxsize=32)(make)

    @wraps(make)
    def get(*args: Hashable) -> Tensor:
        if torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None:
            return make(*args)
        with torch.inference_mode(False), torch.no_grad():
            return cached(*args)

    return get
