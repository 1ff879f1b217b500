"""Scales, and the twins' operators as dense matrices on small images."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dpm_scales.operators import Operator, SpectralFunction
from support.oracles import NOISY, H, W, over
from support.reference import TWINS, Array, Twin, dense_function

BETWEEN = [0.03, 0.125, 0.2, 0.375, 0.44, 0.7, 0.875, 0.99, 1.0]
PAIRS = [(0.0, 0.125), (0.0, 0.55), (0.125, 0.25), (0.03, 0.1), (0.3, 0.9), (0.75, 1.0), (0.25, 0.875)]


twins = over(TWINS)
noisy_twins = over(NOISY)
lyapunov_twins = over([twin for twin in TWINS if twin.chain_noise is None])


def vectors(x: Tensor) -> Array:
    """Return images as rows of H * W entries."""
    return x.flatten(-2).numpy()


def as_matrix(op: Operator, f: SpectralFunction, height: int = H, width: int = W) -> Array:
    """Return the matrix of f(L), column by column."""
    unit = torch.eye(height * width, dtype=torch.float64).reshape(-1, 1, height, width)
    return op.apply(f, unit)[:, 0].flatten(1).numpy().T


def dense(twin: Twin, f: Callable[[Array], Array], height: int = H, width: int = W) -> Array:
    return dense_function(twin.matrix(height, width), f)


def full(value: Tensor, batch: int, mu: Tensor) -> Array:
    """Return a curve of t and mu for `batch` samples, ``(batch, *mu.shape)``."""
    return value.expand(batch, 1, *mu.shape)[:, 0].numpy() if value.ndim > mu.ndim else value.expand(mu.shape).numpy()
