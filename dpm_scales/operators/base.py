"""Diffusion operators and their functional calculus.

A process of this package consists of a self-adjoint operator L >= 0 and two curves over its eigenvalues mu, so that
every formula takes the form ``f(L) y``. An operator evaluates it, independently of the process:

    PixelOperator     L = 0                       multiply by f(0)
    HeatOperator      L = -Laplacian              DCT, multiply by f(mu), inverse DCT
    StencilOperator   L from edge weights         Chebyshev expansion of f on an interval that bounds the spectrum
    OsmosisOperator   L = -V^{-1/2} P V^{1/2}     the same

`f` maps eigenvalues (a float64 tensor of any shape) to a tensor with optional leading batch dimensions ``(B, 1)``.
Trailing dimensions of size one mean that f does not depend on mu: the operator then only scales, without a transform.
Images are ``(B, C, H, W)``; ``x`` denotes pixels, ``y`` whitened coordinates (in which the process's noise is white).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor

from dpm_scales.operators.constants import kept

SpectralFunction = Callable[[Tensor], Tensor]

Weights = Callable[[Tensor], Sequence[Tensor]]
"""Several functions of mu that are computed together."""

Term = tuple[SpectralFunction, Tensor] | tuple[Weights, Sequence[Tensor]]
"""A function and the image it acts on, or a function that returns one weight for each of several images."""


def values_of(f: SpectralFunction | Weights, mu: Tensor) -> list[Tensor]:
    """Return f(mu) as a list: all weights of a function that returns several, otherwise its one value."""
    values = f(mu)
    return [values] if isinstance(values, Tensor) else list(values)


def images_of(term: Term) -> list[Tensor]:
    """Return the images of a term, one for each weight of its function."""
    return [term[1]] if isinstance(term[1], Tensor) else list(term[1])


def single_terms(terms: Sequence[Term]) -> Iterator[tuple[SpectralFunction, Tensor]]:
    """Yield the terms, split into one function per image."""
    for f, y in terms:
        if isinstance(y, Tensor):
            yield cast(SpectralFunction, f), y
        else:
            weights = cast(Weights, f)
            yield from ((lambda mu, k=k, weights=weights: weights(mu)[k], one) for k, one in enumerate(y))


def batch_view(value: Tensor, mu: Tensor) -> Tensor:
    """Return `value` of shape ``()`` or ``(B,)``, shaped to broadcast against ``(B, C, *mu.shape)``."""
    ones = (1,) * mu.ndim
    return value.reshape(ones) if value.ndim == 0 else value.reshape(-1, 1, *ones)


@dataclass(frozen=True)
class Decay:
    """The spectral function ``exp(log_scale) * ((1 - floor) * exp(-mu * time) + floor)``, the form of all mean factors.

    `log_scale` and `time` (px^2) are float64 of shape ``()`` or ``(B,)``; `floor` is Hoogeboom & Salimans' d_min.
    A class rather than a closure, so that the heat operator can recognise and compute it faster (it is separable).
    """

    log_scale: Tensor
    time: Tensor | None = None
    floor: float = 0.0

    def log(self, mu: Tensor) -> Tensor:
        """Return log f(mu), finite even where f underflows."""
        log_scale = batch_view(self.log_scale, mu)
        if self.time is None:
            return log_scale
        exponent = -mu * batch_view(self.time, mu)
        if self.floor > 0:
            exponent = torch.log(self.floor + (1 - self.floor) * torch.exp(exponent))
        return log_scale + exponent

    def __call__(self, mu: Tensor) -> Tensor:
        return torch.exp(self.log(mu))


@dataclass(frozen=True)
class LogCurve:
    """A positive spectral function given by its logarithm."""

    log: SpectralFunction

    def __call__(self, mu: Tensor) -> Tensor:
        return torch.exp(self.log(mu))


class Operator(ABC):
    """A self-adjoint operator L >= 0 on images, diagonal or not, with its functional calculus."""

    #: whether L is diagonal in the DCT-II, with `eigenvalues` in the order of its coefficients (or one for all of them)
    is_diagonal: ClassVar[bool] = False

    @property
    def largest(self) -> float:
        """Return an upper bound on the eigenvalues for images of any size, in 1/px^2; 0 where L = 0."""
        return 0.0

    @abstractmethod
    def eigenvalues(self, height: int, width: int, device: torch.device | str | None = None) -> Tensor:
        """Return the eigenvalues mu in 1/px^2, float64, broadcastable to ``(height, width)``."""

    @abstractmethod
    def apply(self, f: SpectralFunction, y: Tensor) -> Tensor:
        """Return f(L) y for y of shape ``(B, C, H, W)``; same shape and dtype."""

    def apply_all(self, functions: Sequence[SpectralFunction], y: Tensor) -> list[Tensor]:
        """Return f_1(L) y, f_2(L) y, ..., at the cost of one sweep where the operator expands its functions."""
        return [self.apply(f, y) for f in functions]

    def combine(self, *terms: Term) -> Tensor:
        """Return sum_i f_i(L) y_i, at the cost of one synthesis where the operator is diagonal.

        Args:
            terms: pairs ``(f, y)``, or ``(weights, [y_1, y_2, ...])`` with one function mu -> (f_1, f_2, ...) for all.
        """
        return torch.stack([self.apply(f, y) for f, y in single_terms(terms)]).sum(0)

    def at_degree(self, degree: int) -> Operator:
        """Return this operator with all expansions fixed to `degree`, whatever their error; itself if it has none."""
        return self

    def to_white(self, x: Tensor) -> Tensor:
        """Map pixels to whitened coordinates, in which the noise is white."""
        return x

    def to_pixels(self, y: Tensor) -> Tensor:
        """Map whitened coordinates to pixels, the inverse of `to_white`."""
        return y

    def log_volume(self) -> Tensor | float:
        """Return log |det| of `to_pixels` per image channel, in nats; entropies in pixels include it."""
        return 0.0


@kept
def _kept_zero(device: torch.device) -> Tensor:
    return torch.zeros(1, 1, dtype=torch.float64, device=device)


class PixelOperator(Operator):
    """L = 0: no diffusion, all pixels independent (Eq. (3), Peter 2024)."""

    is_diagonal: ClassVar[bool] = True

    def eigenvalues(self, height: int, width: int, device: torch.device | str | None = None) -> Tensor:
        if device is None:  # the default device may change
            return torch.zeros(1, 1, dtype=torch.float64)
        return _kept_zero(torch.device(device))

    def apply(self, f: SpectralFunction, y: Tensor) -> Tensor:
        return f(self.eigenvalues(1, 1, y.device)).to(y.dtype) * y

    def combine(self, *terms: Term) -> Tensor:
        parts = []
        for term in terms:
            ys = images_of(term)
            values = values_of(term[0], self.eigenvalues(1, 1, ys[0].device))
            parts += [v.to(y.dtype) * y for v, y in zip(values, ys, strict=True)]
        return torch.stack(parts).sum(0)
