r"""Laws as matrices, on images small enough to make matrices cheap.

A law of a process is a Gaussian with a mean affine in the initial image. Applying it to unit images gives the matrix of
its mean, and applying its noise to unit images gives the covariance. So these matrices test the public functions of a
process, not its curves:

    u_t ~ N(A u_s + b, S)  and  u_s ~ N(A' u_0 + b', S')   give   u_t ~ N(A A' u_0 + A b' + b, A S' A^T + S)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dpm_scales.processes import Context, Gaussian, Process


@dataclass(frozen=True)
class Law:
    """N(matrix u + offset, covariance) of images as vectors of N pixels: ``(N, N)``, ``(N,)``, ``(N, N)``, float64."""

    matrix: Tensor
    offset: Tensor
    covariance: Tensor

    def after(self, first: Law) -> Law:
        """Return the law that applies `first`, then this law."""
        return Law(
            self.matrix @ first.matrix,
            self.matrix @ first.offset + self.offset,
            self.matrix @ first.covariance @ self.matrix.T + self.covariance,
        )

    def mean(self, x: Tensor) -> Tensor:
        """Return the means given images ``(..., N)``."""
        return x @ self.matrix.T + self.offset

    def moved(self, matrix: Tensor) -> Law:
        """Return the law of images permuted by `matrix`."""
        return Law(matrix @ self.matrix @ matrix.T, matrix @ self.offset, matrix @ self.covariance @ matrix.T)


@dataclass(frozen=True)
class Posterior:
    """q(u_s | u_t, u_0) = N(keep u_t + pull u_0 + offset, covariance)."""

    keep: Tensor
    pull: Tensor
    offset: Tensor
    covariance: Tensor

    def after(self, later: Law) -> Law:
        """Return the law of u_s given u_0, where `later` is the law of u_t given u_0."""
        return Law(
            self.keep @ later.matrix + self.pull,
            self.keep @ later.offset + self.offset,
            self.keep @ later.covariance @ self.keep.T + self.covariance,
        )


class DenseProcess:
    """The laws of a process on one-channel images of `size` = (H, W), all with the same context."""

    def __init__(self, process: Process, size: tuple[int, int], context: Context = None) -> None:
        self.process, self.size, self.context = process, size, context
        self.operator = process.operator(context)
        pixels = size[0] * size[1]
        self.units = torch.eye(pixels, dtype=torch.float64)
        self._basis = torch.cat([self.units, torch.zeros(1, pixels, dtype=torch.float64)]).reshape(-1, 1, *size)

    def marginal(self, t: float) -> Law:
        """Return q(u_t | u_0)."""
        return self._law(self.process.marginal(self._basis, t, self.context))

    def transition(self, s: float, t: float) -> Law:
        """Return q(u_t | u_s)."""
        return self._law(self.process.transition(self._basis, s, t, self.context))

    def posterior(self, s: float, t: float) -> Posterior:
        """Return q(u_s | u_t, u_0)."""
        nothing = torch.zeros_like(self._basis)
        later = self.process.posterior(self._basis, nothing, s, t, self.context)
        keep, offset = _affine(later.mean)
        pull, _ = _affine(self.process.posterior(nothing, self._basis, s, t, self.context).mean)
        return Posterior(keep, pull, offset, self._covariance(later))

    def _law(self, gaussian: Gaussian) -> Law:
        return Law(*_affine(gaussian.mean), self._covariance(gaussian))

    def _covariance(self, gaussian: Gaussian) -> Tensor:
        op = gaussian.operator
        noise = op.to_pixels(op.apply(gaussian.std, self._basis[:-1])).flatten(1)  # row j: the noise from unit image j
        return noise.T @ noise


def permutation_matrix(order: Tensor) -> Tensor:
    """Return the matrix that moves pixel ``order[i]`` to position i."""
    return torch.eye(len(order), dtype=torch.float64)[order]


def rotation_matrix(size: tuple[int, int]) -> Tensor:
    """Return the matrix that rotates an image of `size` by 90 degrees."""
    numbers = torch.arange(size[0] * size[1]).reshape(size)
    return permutation_matrix(torch.rot90(numbers, 1, (-2, -1)).flatten())


def entropy(covariance: Tensor) -> float:
    """Return the entropy of a Gaussian in nats, 1/2 ln det(2 pi e S); -inf if S is singular."""
    scaled = 2 * torch.pi * torch.e * covariance
    sign, log_det = torch.linalg.slogdet(scaled)
    return float(0.5 * log_det) if bool(sign > 0) else -torch.inf


def root(variance: float) -> float:
    """Return the square root; NaN for a negative variance, which can occur in broken laws."""
    return math.sqrt(variance) if variance >= 0 else math.nan


def eigen(symmetric: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenvalues in ascending order and eigenvectors; NaN for a matrix that is not finite."""
    if not bool(torch.isfinite(symmetric).all()):
        return torch.full_like(symmetric[0], math.nan), torch.full_like(symmetric, math.nan)
    return torch.linalg.eigh(symmetric)


def solve(matrix: Tensor, right: Tensor) -> Tensor:
    """Return the minimum-norm least-squares solution of ``matrix x = right``; NaN for matrices that are not finite."""
    if not bool(torch.isfinite(matrix).all() and torch.isfinite(right).all()):
        return torch.full((matrix.shape[1], right.shape[1]), math.nan, dtype=matrix.dtype)
    return torch.linalg.lstsq(matrix, right, driver="gelsd").solution


def _affine(mean: Tensor) -> tuple[Tensor, Tensor]:
    flat = mean.flatten(1)
    return (flat[:-1] - flat[-1]).T.contiguous(), flat[-1]


def largest(values: Tensor) -> float:
    """Return the largest absolute value."""
    return float(values.abs().max())
