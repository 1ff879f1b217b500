"""Compute functions of any expanded operator from the eigenvalues of dense matrices."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import Tensor

from dpm_scales.operators import ExpandedOperator, Operator, OsmosisOperator, SpectralFunction, StencilOperator
from dpm_scales.processes import Context, ExpandedProcess

P = TypeVar("P", bound=ExpandedProcess)


class DenseOperator(Operator):
    """f(L) y by the eigenvectors of L, for one matrix per sample and channel, ``(B | 1, C | 1, N, N)``."""

    def __init__(self, like: ExpandedOperator) -> None:
        self.like = like
        assert isinstance(like, OsmosisOperator | StencilOperator)
        matrix = like.dense(white=True) if isinstance(like, OsmosisOperator) else like.dense()
        self.values, self.vectors = torch.linalg.eigh((matrix + matrix.mT) / 2)

    def eigenvalues(self, height: int, width: int, device: torch.device | str | None = None) -> Tensor:
        return self.like.eigenvalues(height, width, device)

    def apply(self, f: SpectralFunction, y: Tensor) -> Tensor:
        out, flat = torch.empty_like(y, dtype=torch.float64), y.to(torch.float64).flatten(-2)
        for b in range(y.shape[0]):
            for c in range(y.shape[1]):
                place = (min(b, len(self.values) - 1), min(c, self.values.shape[1] - 1))
                values = f(self.values[place].clamp(min=0)[None])
                if values.ndim == 4:  # one function for each sample
                    values = values[min(b, len(values) - 1), 0]
                vectors = self.vectors[place]
                out[b, c] = ((flat[b, c] @ vectors * values[0]) @ vectors.T).view(y.shape[2:])
        return out.to(y.dtype)

    def to_white(self, x: Tensor) -> Tensor:
        return self.like.to_white(x)

    def to_pixels(self, y: Tensor) -> Tensor:
        return self.like.to_pixels(y)

    def log_volume(self) -> Tensor | float:
        return self.like.log_volume()


def dense_twin(process: P) -> P:
    """Return the same process with a dense operator for every context."""
    twin = copy.copy(process)

    def operator(context: Context = None) -> Operator:
        own = process.operator(context)
        return DenseOperator(own) if isinstance(own, ExpandedOperator) else own

    twin.operator = operator  # type: ignore[method-assign]
    return twin
