r"""f(L) y by Chebyshev expansion, for operators that no transform diagonalises, and the operator of given edge weights.

    L = D' W D,    (L y)_i = sum over the neighbours j of  w_ij (y_i - y_j),    0 <= w_ij <= 1

D takes the differences along the edges of the pixel grid, W = diag(w) weights them: diffusion that the weights slow
down, with reflecting boundaries. Every edge adds a rank-one matrix of norm 2 w, and the edges split into four
matchings, so the spectrum of L lies in [0, 8]. Unit weights give `HeatOperator("discrete")`.

The eigenvector of L with eigenvalue 0 is known (the constant image; under osmosis sqrt(v)), so its component is
multiplied by exactly f(0): f(0) = 1 preserves the mean intensity, however far f is expanded.
"""

from __future__ import annotations

import copy
import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor

from dpm_scales.errors import UserError, is_whole, require
from dpm_scales.operators.base import Operator, SpectralFunction, Term, Weights, images_of
from dpm_scales.operators.chebyshev import collect, expand
from dpm_scales.operators.degrees import Degrees, Series, fixed_series
from dpm_scales.operators.heat import HeatOperator
from dpm_scales.operators.stencil import Stencil, edge_stencil

TOLERANCE = 1e-6
"""Default bound on the error of f(L), relative to the largest f."""


class ExpandedOperator(Operator):
    """A symmetric five-point stencil with spectrum in [0, 8] for each sample and channel, and its functional calculus.

    Args:
        degree: degree of all expansions, whatever their error; None for the degree that each function needs.
        degrees: how that is found, shared by the operators of a process; None for a tolerance of 1e-6.
    """

    def __init__(self, degree: int | None = None, degrees: Degrees | None = None) -> None:
        ok = degree is None or is_whole(degree, 1)
        require(ok, f"{type(self).__name__}: degree must be a whole number >= 1, got {degree!r}")
        self.degree, self._degrees = degree, Degrees(TOLERANCE) if degrees is None else degrees
        self._symmetric: dict[torch.dtype, Stencil] = {}

    @abstractmethod
    def _build(self) -> Stencil:
        """Return L, float64."""

    @abstractmethod
    def check_images(self, y: Tensor) -> None:
        """Raise UserError unless images of this shape fit the operator."""

    @abstractmethod
    def _mode(self, dtype: torch.dtype) -> Tensor:
        """Return the normalised eigenvector with eigenvalue 0, ``(B | 1, C | 1, N)``."""

    def symmetric_stencil(self, dtype: torch.dtype) -> Stencil:
        """Return L; its weights are computed in float64."""
        if dtype not in self._symmetric:
            self._symmetric[dtype] = self._build().to(dtype)
        return self._symmetric[dtype]

    def eigenvalues(self, height: int, width: int, device: torch.device | str | None = None) -> Tensor:
        """Return the spectrum for unit weights, a model of L's spectrum for power spectra; [0, 8] bounds L's own."""
        return HeatOperator("discrete").eigenvalues(height, width, device)

    def dense_eigenvalues(self) -> Tensor:
        """Return L's own eigenvalues ``(B | 1, C | 1, N)``, ascending, float64, from dense matrices: N^3 operations."""
        mu = torch.linalg.eigvalsh(self.symmetric_stencil(torch.float64).dense())
        return torch.where(mu > 1e-12, mu, 0.0)  # the eigenvalue 0, up to rounding: a colour can have a root there

    def at_degree(self, degree: int) -> Self:
        fixed = copy.copy(self)
        fixed.degree = degree
        return fixed

    # --- functional calculus ------------------------------------------------------------------------------------------

    def apply(self, f: SpectralFunction, y: Tensor) -> Tensor:
        return self.combine((f, y))

    def apply_all(self, functions: Sequence[SpectralFunction], y: Tensor) -> list[Tensor]:
        """Return f_1(L) y, f_2(L) y, ... at the cost of one sweep and one multiplication each."""
        self.check_images(y)
        series = [self._series(f, 1, y.device)[0] for f in functions]
        results = {i: s.at_zero.to(y.dtype) * y for i, s in enumerate(series) if s.coefficients is None}
        varying = [(i, s.at_zero, s.coefficients) for i, s in enumerate(series) if s.coefficients is not None]
        if varying:
            dtype = working_dtype(y.dtype)
            flat, mode = y.to(dtype).flatten(-2), self._mode(dtype)
            dc = (flat * mode).sum(-1, keepdim=True)
            expanded = expand(self.symmetric_stencil(dtype), flat, [c.to(dtype) for _, _, c in varying])
            for (i, at_zero, _), out in zip(varying, expanded, strict=True):
                results[i] = _set_dc(out, mode, at_zero[..., 0].to(dtype) * dc).view(y.shape).to(y.dtype)
        return [results[i] for i in range(len(series))]

    def combine(self, *terms: Term) -> Tensor:
        scaled: list[Tensor] = []
        coefficients: list[Tensor] = []
        flats: list[Tensor] = []
        dc: list[Tensor] = []
        first = images_of(terms[0])[0]
        dtype = working_dtype(first.dtype)
        mode = self._mode(dtype)
        for term in terms:
            ys = images_of(term)
            for y in ys:
                self.check_images(y)
            for series, y in zip(self._series(term[0], len(ys), first.device), ys, strict=True):
                if series.coefficients is None:
                    scaled.append(series.at_zero.to(y.dtype) * y)
                    continue
                coefficients.append(series.coefficients.to(dtype))
                flats.append(y.to(dtype).flatten(-2))
                dc.append(series.at_zero[..., 0].to(dtype) * (flats[-1] * mode).sum(-1, keepdim=True))
        if flats:
            out = collect(self.symmetric_stencil(dtype), coefficients, flats)
            scaled.append(_set_dc(out, mode, torch.stack(dc).sum(0)).view(first.shape).to(first.dtype))
        return scaled[0] if len(scaled) == 1 else torch.stack(scaled).sum(0)

    def _series(self, f: SpectralFunction | Weights, number: int, device: torch.device) -> list[Series]:
        if self.degree is not None:
            return fixed_series(f, self.degree, device)
        return self._degrees.series(f, number, device)


class StencilOperator(ExpandedOperator):
    """L given by edge weights, one set for each sample and channel; whitened coordinates are pixels.

    Args:
        right: weight of the edge from each pixel to its right neighbour, in [0, 1], ``(B | 1, C | 1, H, W - 1)``.
        down: likewise to the lower neighbour, ``(B | 1, C | 1, H - 1, W)``.
        degree, degrees: see `ExpandedOperator`.
        validate: whether to check the values of the weights, which waits for the device; None checks them on the CPU
            only.

    Raises: UserError for shapes that belong to no common grid, and for weights outside [0, 1].
    """

    def __init__(
        self,
        right: Tensor,
        down: Tensor,
        degree: int | None = None,
        degrees: Degrees | None = None,
        validate: bool | None = None,
    ) -> None:
        super().__init__(degree, degrees)
        ok = (
            right.ndim == down.ndim == 4 and right.shape[2] == down.shape[2] + 1 and right.shape[3] + 1 == down.shape[3]
        )
        require(
            ok and right.shape[:2] == down.shape[:2],
            "edge weights must be (B, C, H, W - 1) to the right and (B, C, H - 1, W) down, got "
            f"{tuple(right.shape)} and {tuple(down.shape)}",
        )
        require(
            not (right.requires_grad or down.requires_grad),
            "gradients with respect to edge weights are not computed: pass them detached",
        )
        if right.device.type == "cpu" if validate is None else validate:
            for weights in (right, down):
                require(
                    bool(((weights >= 0) & (weights <= 1)).all()),
                    "edge weights must lie in [0, 1]; divide them by their largest and multiply the dissipation time",
                )
        self._right, self._down = right.to(torch.float64), down.to(torch.float64)

    def dense(self) -> Tensor:
        """Return L as matrices ``(B | 1, C | 1, N, N)`` in float64, for tests and small images."""
        return self.symmetric_stencil(torch.float64).dense()

    def check_images(self, y: Tensor) -> None:
        size = (self._right.shape[-2], self._down.shape[-1])
        if y.ndim == 4 and tuple(y.shape[-2:]) == size:
            if all(own in (1, its) for own, its in zip(self._right.shape[:2], y.shape[:2], strict=True)):
                return
        raise UserError(
            f"images of shape {tuple(y.shape)} do not fit edge weights of {tuple(self._right.shape[:2])} samples and "
            f"channels and {size[0]}x{size[1]} pixels: sizes must be the same, samples and channels too or 1"
        )

    def _build(self) -> Stencil:
        return edge_stencil(self._right, self._down)

    def _mode(self, dtype: torch.dtype) -> Tensor:
        number = self._right.shape[-2] * self._down.shape[-1]
        return torch.full((1, 1, number), 1 / math.sqrt(number), dtype=dtype, device=self._right.device)


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the recursion, at least float32: half precision would lose all digits in it."""
    return dtype if dtype == torch.float64 else torch.float32


def _set_dc(out: Tensor, mode: Tensor, dc: Tensor) -> Tensor:
    """Return `out` with its component along the eigenvector with eigenvalue 0 set to `dc`."""
    return torch.addcmul(out, dc - (out * mode).sum(-1, keepdim=True), mode)
