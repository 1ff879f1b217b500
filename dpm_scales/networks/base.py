"""The interface of a network, which any `torch.nn.Module` can satisfy, and the base class of the networks here."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpm_scales.describe import Describable
from dpm_scales.errors import UserError, is_whole, require


class Network(Protocol):
    """A module built with `in_channels`, `out_channels` and `num_classes` (None without labels) besides its options.

    It may have two further methods:
    `check_size(size)` raises UserError for an unsupported image size ``(H, W)``, before training and sampling.
    `after_step()` is called after each optimiser step, without gradients, for example to project weights. Under FSDP a
    parameter is then a distributed tensor, sharded along its first dimension.
    """

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return ``(B, out_channels, H, W)``; the target defines what it means.

        Args:
            x: image, scaled to about unit variance, with the context's features if any, ``(B, in_channels, H, W)``.
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


def require_size(network: nn.Module, size: tuple[int, int]) -> None:
    """Raise UserError if a network that has `check_size` can't take images of `size` (H, W)."""
    check_size = getattr(network, "check_size", None)
    if callable(check_size):
        check_size(size)


def require_counts(**counts: object) -> None:
    """Raise UserError unless all values are whole numbers from 1."""
    for name, value in counts.items():
        require(is_whole(value, 1), f"{name} is {value!r}; allowed are whole numbers from 1")


class ImageNetwork(Describable, nn.Module, ABC):
    """Base class of the networks here: channels and classes, set by the caller or the model, and checks of the inputs.

    Args:
        in_channels: channels of the input, at least 1; None leaves the network without layers until `complete`.
        out_channels: channels of the result, at least 1; None as for `in_channels`.
        num_classes: number of class labels, at least 1; None for a network without labels.

    Raises: UserError if an argument is outside the ranges above.
    """

    def __init__(self, in_channels: int | None, out_channels: int | None, num_classes: int | None) -> None:
        super().__init__()
        given = {"in_channels": in_channels, "out_channels": out_channels, "num_classes": num_classes}
        require_counts(**{name: value for name, value in given.items() if value is not None})
        both = f"in_channels is {in_channels} and out_channels is {out_channels}; give both, or leave both to the model"
        require((in_channels is None) == (out_channels is None), both)
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.num_classes = num_classes

    def complete(self, in_channels: int, out_channels: int, num_classes: int | None = None) -> None:
        """Build the layers of a network that was constructed without `in_channels` and `out_channels`.

        Raises: UserError for values other than those the network was constructed with.
        """
        wanted = {"in_channels": in_channels, "out_channels": out_channels, "num_classes": num_classes}
        complete = self.in_channels is not None and self.out_channels is not None
        for name, value in wanted.items():
            own = getattr(self, name)
            differs = f"the network has {name}={own}, and {value} is needed here; leave {name} out of its arguments"
            require(own == value or (own is None and not complete), differs)
        if not complete:
            self.in_channels, self.out_channels, self.num_classes = in_channels, out_channels, num_classes
            self._build(in_channels, out_channels)

    def _build_if_complete(self) -> None:
        """Build all layers if the channels are known; called last in a constructor."""
        if self.in_channels is not None and self.out_channels is not None:
            self._build(self.in_channels, self.out_channels)

    @abstractmethod
    def _build(self, in_channels: int, out_channels: int) -> None:
        """Build all layers."""

    def _check(self, x: Tensor, t: Tensor) -> None:
        """Raise UserError unless inputs have the shapes and types that `Network.forward` takes."""
        # Plain branches, not `require`: its message would be formatted at every call, and fix a dynamic shape.
        if self.in_channels is None or self.out_channels is None:
            raise UserError("the network has no layers yet; give in_channels and out_channels, or make a Model of it")
        if x.ndim != 4 or x.shape[1] != self.in_channels or not x.is_floating_point():
            raise UserError(
                f"x has shape {tuple(x.shape)} and type {x.dtype}; allowed is floating point of shape "
                f"(batch, {self.in_channels}, height, width): change the data or the network's in_channels"
            )
        if t.shape != x.shape[:1] or not t.is_floating_point():
            raise UserError(
                f"t has shape {tuple(t.shape)} and type {t.dtype}; allowed is one floating point scale per image, "
                f"shape ({x.shape[0]},)"
            )

    def _labels(self, labels: Tensor | None, t: Tensor) -> Tensor | None:
        """Return labels ``(B,)``, the index of "no label" in place of None; None for a network without classes.

        Raises: UserError for labels of another shape or type, or for a network without classes.
        """
        if self.num_classes is None:
            if labels is not None:
                raise UserError("labels are given to a network without classes; leave them out or set num_classes")
            return None
        if labels is None:
            return torch.full(t.shape, self.num_classes, device=t.device, dtype=torch.int64)
        if labels.shape != t.shape or labels.dtype != torch.int64:
            raise UserError(
                f"labels have shape {tuple(labels.shape)} and type {labels.dtype}; allowed is one torch.int64 label "
                f"per image, shape ({t.shape[0]},)"
            )
        return labels


def fold(x: Tensor, patch_size: int, multiple: int) -> Tensor:
    """Pad an image at the right and bottom to multiples of `multiple`, and fold patches of its pixels into channels.

    Padding repeats the border. Returns ``(B, C patch_size^2, H' / patch_size, W' / patch_size)``.
    """
    bottom, right = -x.shape[2] % multiple, -x.shape[3] % multiple
    if bottom or right:
        x = F.pad(x, (0, right, 0, bottom), mode="replicate")
    return x if patch_size == 1 else F.pixel_unshuffle(x, patch_size)


def unfold(h: Tensor, patch_size: int, size: tuple[int, int]) -> Tensor:
    """Undo `fold`: return images ``(B, C, *size)``."""
    h = h if patch_size == 1 else F.pixel_shuffle(h, patch_size)
    return h[..., : size[0], : size[1]]
