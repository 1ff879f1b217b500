r"""The osmosis operator L = -V^{-1/2} P V^{1/2} of a guidance image v.

With v normalised to mean one and y = V^{-1/2} x the osmosis filter dx/dt = P x becomes dy/dt = -L y, L symmetric, so
every formula of a process holds unchanged: white noise is white in y, and has the standard deviation sqrt(v) in x.
No transform diagonalises L for all v; see `expanded` for f(L) y. A constant v gives `HeatOperator("discrete")`.
The eigenvector with eigenvalue 0 is sqrt(v).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dpm_scales.errors import UserError, require
from dpm_scales.operators.degrees import Degrees
from dpm_scales.operators.expanded import ExpandedOperator
from dpm_scales.operators.stencil import Stencil, osmosis_stencil, white_stencil


class OsmosisOperator(ExpandedOperator):
    """L for a batch of guidance images, one for each sample and channel.

    Args:
        guidance_image: v > 0, ``(B | 1, C | 1, H, W)`` or ``(C | 1, H, W)``, of any float dtype and scale. Dimensions
            of size one are shared by all samples or channels.
        degree: degree K of all expansions, whatever their error; None for the degree that each function needs.
        validate: whether to check the values of v, which waits for the device; None checks them on the CPU only.
        degrees: how degrees are found, shared by the operators of a process; None for a tolerance of 1e-6.

    Raises: UserError for a wrong shape or dtype, a guidance image that requires gradients (they are not computed), or
    values that are not positive and finite.
    """

    def __init__(
        self,
        guidance_image: Tensor,
        degree: int | None = None,
        validate: bool | None = None,
        degrees: Degrees | None = None,
    ) -> None:
        guidance = check_guidance(guidance_image, validate)
        super().__init__(degree, degrees)
        self.guidance = normalised(guidance)
        self._sqrt = self.guidance.sqrt()
        self._drift: dict[torch.dtype, Stencil] = {}

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
        if white:
            return self.symmetric_stencil(dtype)
        if dtype not in self._drift:
            self._drift[dtype] = osmosis_stencil(self.guidance).to(dtype)
        return self._drift[dtype]

    def _build(self) -> Stencil:
        return white_stencil(self.guidance)

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

    def _mode(self, dtype: torch.dtype) -> Tensor:
        """Return the normalised eigenvector with eigenvalue 0, ``(B | 1, C | 1, N)``."""
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


def _seen(value: object) -> str:
    return f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
