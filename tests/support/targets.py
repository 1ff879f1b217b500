"""Targets by name, and functions of a twin's operator as dense matrices."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from dpm_scales.targets import Clean, NextScale, Noise, Target, Velocity
from support.oracles import H, W
from support.reference import Array, Twin, dense_function

#: factories of targets by name
TARGETS: dict[str, Callable[[], Target]] = {
    "clean": lambda: Clean("scalar", clip=False),
    "clean-wiener": lambda: Clean("wiener", clip=False),
    "clean-plain": lambda: Clean(preconditioning="none", clip=False),
    "noise": Noise,
    "velocity": Velocity,
    "finer": NextScale,
    "finer-equal": lambda: NextScale(equal_weight=True),
}


def vectors(x: Tensor) -> Array:
    """Return images as vectors, ``(..., H * W)``."""
    return x.flatten(-2).numpy()


def dense(twin: Twin, f: Callable[[Array], Array]) -> Array:
    """Return f(L) on images of the oracles' size."""
    return dense_function(twin.matrix(H, W), f)
