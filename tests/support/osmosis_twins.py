"""Slow reference implementations of the osmosis operator: matrices summed edge by edge, in numpy and scipy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import scipy.sparse
import torch
from torch import Tensor

from support.reference import Array, dense_function

SIZES = [(5, 8), (8, 5), (7, 7), (1, 6), (6, 1), (1, 1), (2, 3)]


def images(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Draw uniform values in [0, 1]."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def guidance_images(*shape: int, seed: int = 1, dark: float = 0.1) -> Tensor:
    """Draw the paper's guidance images, mean 0.5 and noise 0.1, with a fraction `dark` of pixels clipped to 1e-6."""
    generator = torch.Generator().manual_seed(seed)
    v = (0.5 + 0.1 * torch.randn(shape, generator=generator, dtype=torch.float64)).clamp(1e-6, 1)
    return torch.where(torch.rand(shape, generator=generator) < dark, 1e-6, v)


def edges(height: int, width: int) -> Iterator[tuple[int, int]]:
    """Yield neighbouring pixels i, j (right of or below i) as row-major indices."""
    for row in range(height):
        for column in range(width):
            here = row * width + column
            if column + 1 < width:
                yield here, here + 1
            if row + 1 < height:
                yield here, here + width


def osmosis_matrix(v: Array) -> Array:
    """Return P of a guidance image ``(H, W)``: (P u)_i = sum_j 2 v_i / (v_i + v_j) u_j - 2 v_j / (v_i + v_j) u_i."""
    grey = v.ravel()
    matrix = np.zeros((v.size, v.size))
    for i, j in edges(*v.shape):
        total = grey[i] + grey[j]
        matrix[i, j] += 2 * grey[i] / total
        matrix[j, j] -= 2 * grey[i] / total
        matrix[j, i] += 2 * grey[j] / total
        matrix[i, i] -= 2 * grey[j] / total
    return matrix


def drift_matrix(right: Array, down: Array) -> Array:
    """Return P for drift on the edges, ``(H, W - 1)`` and ``(H - 1, W)``: u flows from i to j at the rate 1 + d/2."""
    height, width = right.shape[0], down.shape[1]
    matrix = np.zeros((height * width, height * width))
    for i, j in edges(height, width):
        row, column = divmod(i, width)
        d = right[row, column] if j == i + 1 and column + 1 < width else down[row, column]
        matrix[j, i] += 1 + d / 2
        matrix[i, i] -= 1 + d / 2
        matrix[i, j] += 1 - d / 2
        matrix[j, j] -= 1 - d / 2
    return matrix


def sparse_osmosis_matrix(v: Array) -> scipy.sparse.csc_matrix:
    """Return `osmosis_matrix` as a sparse matrix, without loops, for larger images."""
    index, grey = np.arange(v.size).reshape(v.shape), v.ravel()
    i = np.concatenate([index[:, :-1].ravel(), index[:-1].ravel()])
    j = np.concatenate([index[:, 1:].ravel(), index[1:].ravel()])
    into_i, into_j = 2 * grey[i] / (grey[i] + grey[j]), 2 * grey[j] / (grey[i] + grey[j])
    entries = np.concatenate([into_i, -into_i, into_j, -into_j])
    rows, columns = np.concatenate([i, j, j, i]), np.concatenate([j, j, i, i])
    return scipy.sparse.csc_matrix((entries, (rows, columns)), shape=(v.size, v.size))


def white_matrix(v: Array) -> Array:
    """Return L = -V^{-1/2} P V^{1/2}, symmetric up to rounding."""
    root = np.sqrt(v.ravel())
    return -osmosis_matrix(v) * root[None, :] / root[:, None]


def per_image(matrix: Callable[[Array], Array], v: Tensor, u: Tensor) -> Tensor:
    """Multiply each image by the `matrix` of the guidance image of the same sample and channel: ``(B, C, H, W)``."""
    v = v.expand_as(u)
    out = np.empty(u.shape)
    for b in range(u.shape[0]):
        for c in range(u.shape[1]):
            out[b, c] = (matrix(v[b, c].numpy()) @ u[b, c].double().numpy().ravel()).reshape(u.shape[2:])
    return torch.from_numpy(out)


def white_function(f: Callable[[Array], Any], v: Tensor, y: Tensor) -> Tensor:
    """Return f(L) y from the eigenvectors of each dense matrix."""

    def function(grey: Array) -> Array:
        matrix = white_matrix(grey)
        return dense_function((matrix + matrix.T) / 2, f)

    return per_image(function, v, y)


def means(x: Tensor) -> Tensor:
    return x.mean((-2, -1), keepdim=True)
