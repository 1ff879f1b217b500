"""The contract of a network, which any `torch.nn.Module` can meet."""

from __future__ import annotations

import inspect
from typing import Protocol

from torch import Tensor, nn

from dpm_scales.errors import UserError


class Network(Protocol):
    """A module built with `in_channels`, `out_channels` and `num_classes` (None without labels) besides its options."""

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return ``(B, out_channels, H, W)``; the target defines what it means.

        Args:
            x: image, scaled to about unit variance, and features of the context if any, ``(B, in_channels, H, W)``.
            t: scales ``(B,)`` in (0, 1].
            labels: ``(B,)`` int64, `num_classes` for "no label"; None for a network without labels.
        """


def require_forward(network: nn.Module) -> None:
    """Raise UserError unless a network's `forward` takes the arguments of `Network`."""
    try:
        signature = inspect.signature(network.forward)
    except (TypeError, ValueError):  # compiled code has none
        return
    try:
        signature.bind(None, None, None)
    except TypeError:
        kind = f"{type(network).__module__}.{type(network).__qualname__}"
        raise UserError(f"network: {kind}.forward takes {signature}; it must take (x, t, labels=None)") from None
