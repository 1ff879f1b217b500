r"""The osmosis operator L = -V^{-1/2} P V^{1/2} of a guidance image v, and its functional calculus.

With v normalised to mean one and y = V^{-1/2} x the osmosis filter dx/dt = P x becomes dy/dt = -L y, L symmetric, so
every formula of a process holds as it stands: white noise is white in y, and has the standard deviation sqrt(v) in x.
L has no transform that diagonalises it for all v; f(L) y is a Chebyshev expansion on [0, 8]. A constant v gives
`HeatOperator("discrete")`.

The eigenvector of L to the eigenvalue 0 is known, sqrt(v), so that component is f(0) exactly: f(0) = 1 keeps the mean
intensity, whatever the degree.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dpm_scales.errors import UserError, is_whole, require
from dpm_scales.operators.base import Operator, SpectralFunction
from dpm_scales.operators.chebyshev import chebyshev_coefficients, chebyshev_nodes, collect, expand
from dpm_scales.operators.heat import HeatOperator
from dpm_scales.operators.stencil import Stencil, osmosis_stencil, white_stencil


class OsmosisOperator(Operator):
    """L for a batch of guidance images, one for each sample and channel.

    Args:
        guidance_image: v > 0, ``(B | 1, C | 1, H, W)`` or ``(C | 1, H, W)``, of any float dtype and scale. Sizes of
            one serve all samples or channels.
        degree: K of the expansions. `chebyshev_degree` says what a function needs: 64 is enough for 1e-6 of a blur of
            4 px, 256 of one of 20 px.
        validate: whether to look at the values of v, which waits for the device; None where they lie on the CPU.

    Raises: UserError for a wrong shape or dtype, a guidance image that requires gradients (they are not computed), or
    values that are not positive and finite.
    """

    def __init__(self, guidance_image: Tensor, degree: int = 128, validate: bool | None = None) -> None:
        guidance = check_guidance(guidance_image, validate)
        require(is_whole(degree, 1), f"OsmosisOperator: degree must be a whole number >= 1, got {degree!r}")
        self.degree = degree
        self.guidance = normalised(guidance)
        self._sqrt = self.guidance.sqrt()
        self._stencils: dict[tuple[torch.dtype, bool], Stencil] = {}

    # --- the operator itself ------------------------------------------------------------------------------------------

    def matvec(self, u: Tensor) -> Tensor:
        """Return P u in pixels, Eq. (46), Peter 2024: ``(B, C, H, W)``, same dtype."""
        self.check_images(u)
        return self.stencil(u.dtype).product(u)

    def dense(self, white: bool = False) -> Tensor:
        """Return P, or L in whitened coordinates, as matrices ``(B | 1, C | 1, N, N)`` in float64."""
        return self.stencil(torch.float64, white).dense()

    def stencil(self, dtype: torch.dtype, white: bool = False) -> Stencil:
        """Return P, or L in whitened coordinates; weights are computed in float64."""
        key = (dtype, white)
        if key not in self._stencils:
            build = white_stencil if white else osmosis_stencil
            self._stencils[key] = build(self.guidance).to(dtype)
        return self._stencils[key]

    def eigenvalues(self, height: int, width: int, device: torch.device | str | None = None) -> Tensor:
        """Return the spectrum of the constant guidance image, a model of L's spectrum for power spectra and entropies.

        Exact eigenvalues of other v need the dense matrix; [0, 8] bounds them all.
        """
        return HeatOperator("discrete").eigenvalues(height, width, device)

    # --- coordinates --------------------------------------------------------------------------------------------------

    def to_white(self, x: Tensor) -> Tensor:
        self.check_images(x)
        return x / self._sqrt.to(x.dtype)

    def to_pixels(self, y: Tensor) -> Tensor:
        self.check_images(y)
        return y * self._sqrt.to(y.dtype)

    def log_volume(self) -> Tensor:
        """Return sum 1/2 ln v per image channel, v normalised to mean one: float64 ``(B | 1, C | 1)``, <= 0."""
        return 0.5 * self.guidance.log().sum((-2, -1))

    def at_degree(self, degree: int) -> OsmosisOperator:
        if degree <= self.degree:
            return self
        finer = copy.copy(self)
        finer.degree = degree
        return finer

    # --- functional calculus ------------------------------------------------------------------------------------------

    def apply(self, f: SpectralFunction, y: Tensor) -> Tensor:
        return self.combine((f, y))

    def apply_all(self, functions: Sequence[SpectralFunction], y: Tensor) -> list[Tensor]:
        """Return f_1(L) y, f_2(L) y, ... at the price of one sweep and one multiplication each."""
        self.check_images(y)
        values = [f(self._mu(y.device)) for f in functions]
        results = {i: v.to(y.dtype) * y for i, v in enumerate(values) if _is_constant(v)}
        turning = [i for i in range(len(values)) if i not in results]
        if turning:
            dtype = working_dtype(y.dtype)
            flat, mode = y.to(dtype).flatten(-2), self._mode(dtype)
            coefficients = [self._coefficients(values[i], dtype) for i in turning]
            dc = (flat * mode).sum(-1, keepdim=True)
            expanded = expand(self.stencil(dtype, white=True), flat, coefficients)
            for i, out in zip(turning, expanded, strict=True):
                results[i] = _set_dc(out, mode, values[i][..., -1].to(dtype) * dc).view(y.shape).to(y.dtype)
        return [results[i] for i in range(len(values))]

    def combine(self, *terms: tuple[SpectralFunction, Tensor]) -> Tensor:
        scaled: list[Tensor] = []
        coefficients: list[Tensor] = []
        flats: list[Tensor] = []
        dc: list[Tensor] = []
        first = terms[0][1]
        dtype = working_dtype(first.dtype)
        mode = self._mode(dtype)
        for f, y in terms:
            self.check_images(y)
            values = f(self._mu(y.device))
            if _is_constant(values):
                scaled.append(values.to(y.dtype) * y)
                continue
            coefficients.append(self._coefficients(values, dtype))
            flats.append(y.to(dtype).flatten(-2))
            dc.append(values[..., -1].to(dtype) * (flats[-1] * mode).sum(-1, keepdim=True))
        if flats:
            out = collect(self.stencil(dtype, white=True), coefficients, flats)
            scaled.append(_set_dc(out, mode, torch.stack(dc).sum(0)).view(first.shape).to(first.dtype))
        return scaled[0] if len(scaled) == 1 else torch.stack(scaled).sum(0)

    def _mu(self, device: torch.device) -> Tensor:
        """Return Chebyshev nodes, then 0: ``(1, M + 1)``."""
        return torch.nn.functional.pad(chebyshev_nodes(2 * (self.degree + 1), device), (0, 1))[None]

    def _coefficients(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        return chebyshev_coefficients(values[..., :-1], self.degree).to(dtype)

    def _mode(self, dtype: torch.dtype) -> Tensor:
        """Return the normalised eigenvector to the eigenvalue 0, ``(B | 1, C | 1, N)``."""
        flat = self._sqrt.flatten(-2)
        return (flat / math.sqrt(flat.shape[-1])).to(dtype)

    def check_images(self, y: Tensor) -> None:
        """Raise UserError unless images of this shape fit the guidance image."""
        if y.ndim == 4 and y.shape[-2:] == self.guidance.shape[-2:]:
            if all(own in (1, its) for own, its in zip(self.guidance.shape[:2], y.shape[:2], strict=True)):
                return
        raise UserError(
            f"images of shape {tuple(y.shape)} do not fit a guidance image of shape {tuple(self.guidance.shape)}: "
            "height and width must be the same, batch and channels too or 1 in the guidance image"
        )


def check_guidance(guidance_image: Tensor, validate: bool | None = None) -> Tensor:
    """Return the guidance image as ``(B | 1, C | 1, H, W)``. Raises UserError, see `OsmosisOperator`."""
    v = guidance_image
    ok = isinstance(v, Tensor) and v.ndim in (3, 4) and v.numel() > 0
    require(ok, f"guidance image must be (B, C, H, W) or (C, H, W), not empty, got {_seen(v)}")
    require(v.is_floating_point(), f"guidance image must be of a float dtype, got {v.dtype}; convert with .float()")
    require(not v.requires_grad, "gradients with respect to the guidance image are not computed: pass v.detach()")
    if v.device.type == "cpu" if validate is None else validate:
        low, high = (float(edge) for edge in v.aminmax())
        if not (low > 0 and math.isfinite(high)):
            raise UserError(
                f"guidance image must be positive and finite, got values from {low:g} to {high:g}; "
                "clip it from below, e.g. at 1e-6"
            )
    return v if v.ndim == 4 else v[None]


def normalised(guidance: Tensor) -> Tensor:
    """Return v / mean(v) for each image channel, float64."""
    v = guidance.to(torch.float64)
    return v / v.mean((-2, -1), keepdim=True)


def _set_dc(out: Tensor, mode: Tensor, dc: Tensor) -> Tensor:
    """Return `out` with its component along the eigenvector to the eigenvalue 0 set to `dc`."""
    return torch.addcmul(out, dc - (out * mode).sum(-1, keepdim=True), mode)


def _is_constant(values: Tensor) -> bool:
    return values.shape[-1] == 1


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the recursion: half precision is for storage, and would lose all digits in it."""
    return dtype if dtype == torch.float64 else torch.float32


def _seen(value: object) -> str:
    return f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
