r"""Image editing by osmosis: shadow removal and seamless cloning (Weickert et al. 2013, Vogel et al. 2013).

Up to a factor, an image is the steady state of its own canonical drift. So one edits the drift and lets osmosis rebuild
the image: d = 0 across an edge says "no change here", the drift of another image says "change as that one does".
A multiplicative change of light, as a shadow is, leaves the drift as it is everywhere but on the shadow's edge.

The edited drift has no known steady state; it is found by implicit Euler with growing steps (`steady_state`).
Osmosis keeps the mean grey value of the image it starts from, and that factor is all that is left to choose: `match`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dpm_scales.errors import UserError, require, suggest
from dpm_scales.operators import canonical_drift, drift_stencil, steady_state

MATCHES = ("mean", "outside")
SHADOW_MASKS = ("region", "edge")


def remove_shadow(
    image: Tensor,
    mask: Tensor,
    mask_marks: str = "region",
    match: str = "mean",
    offset: float = 0.0,
    tol: float = 1e-6,
) -> Tensor:
    """Remove a shadow: the image's own drift, but 0 on the shadow's edge (Weickert et al. 2013, Sect. 4).

    Exact, up to the factor that `match` fixes, where the shadow is a factor and the scene does not change across the
    shadow's edge; what the scene does there is lost.

    Args:
        image: ``(B, C, H, W)``, > 0.
        mask: bool ``(H, W)`` or ``(B | 1, C | 1, H, W)``.
        mask_marks: "region": the mask is True in the shadow, the drift is 0 between pixels inside and outside;
            "edge": it is True on the shadow's edge (penumbra), the drift is 0 on all edges that touch the mask.
        match: "mean": the mean grey value stays, as osmosis has it; "outside": each channel is rescaled so that its
            mean outside the mask stays: what lies in the light keeps its brightness.
        offset: added before and taken away after, for images with black pixels; 1/255 of the value range is usual.
        tol: relative change at which the steady state is reached.

    Returns: ``(B, C, H, W)``, same dtype; computed in float64.
    Raises: UserError for values, shapes or names that do not fit.
    """
    if mask_marks not in SHADOW_MASKS:
        raise UserError(f"unknown mask_marks {mask_marks!r}: {suggest(str(mask_marks), SHADOW_MASKS)}")
    f, inside = _positive(image, offset, "image"), _mask(mask, image)
    keep_right, keep_down = _agree(inside) if mask_marks == "region" else _both(~inside)
    right, down = canonical_drift(f)
    return _rebuild(right * keep_right, down * keep_down, f, inside, match, offset, tol).to(image.dtype)


def blend(
    background: Tensor,
    foreground: Tensor,
    mask: Tensor,
    match: str = "mean",
    offset: float = 0.0,
    tol: float = 1e-6,
) -> Tensor:
    """Clone the foreground into the background without a seam (Weickert et al. 2013, Vogel et al. 2013).

    The drift is the foreground's between pixels of the mask, the background's between pixels outside, and the mean of
    both across the mask's edge. A factor on the foreground changes nothing.

    Args:
        background: ``(B, C, H, W)``, > 0.
        foreground: likewise; only what lies in the mask and beside it counts.
        mask: bool ``(H, W)`` or ``(B | 1, C | 1, H, W)``, True where the foreground goes.
        match: "mean": the result has the background's mean grey value; "outside": each channel is rescaled so that its
            mean outside the mask is the background's.
        offset: added before and taken away after, for images with black pixels.
        tol: relative change at which the steady state is reached.

    Returns: ``(B, C, H, W)``, same dtype as the background; computed in float64.
    Raises: UserError for values, shapes or names that do not fit.
    """
    f, g = _positive(background, offset, "background"), _positive(foreground, offset, "foreground")
    require(
        f.shape == g.shape,
        f"background and foreground must have one shape, got {tuple(f.shape)} and {tuple(g.shape)}",
    )
    inside = _mask(mask, background)
    weight = inside.to(f.dtype)
    shares = ((weight[..., 1:] + weight[..., :-1]) / 2, (weight[..., 1:, :] + weight[..., :-1, :]) / 2)
    drifts = zip(canonical_drift(f), canonical_drift(g), shares, strict=True)
    right, down = (torch.lerp(outer, inner, share.expand_as(outer)) for outer, inner, share in drifts)
    return _rebuild(right, down, f, inside, match, offset, tol).to(background.dtype)


def _rebuild(
    right: Tensor, down: Tensor, start: Tensor, inside: Tensor, match: str, offset: float, tol: float
) -> Tensor:
    """The steady state of a drift, with the grey values that `match` asks of it, without the offset."""
    if match not in MATCHES:
        raise UserError(f"unknown match {match!r}: {suggest(str(match), MATCHES)}")
    u = steady_state(drift_stencil(right, down), start, tol)
    if match == "outside":
        lit = (~inside).to(u.dtype)
        require(bool(lit.expand_as(u).any(-1).any(-1).all()), "match='outside' needs pixels outside the mask")
        u = u * (start * lit).sum((-2, -1), keepdim=True) / (u * lit).sum((-2, -1), keepdim=True)
    return u - offset


def _agree(inside: Tensor) -> tuple[Tensor, Tensor]:
    """Edges between two pixels of the same side."""
    return inside[..., 1:] == inside[..., :-1], inside[..., 1:, :] == inside[..., :-1, :]


def _both(free: Tensor) -> tuple[Tensor, Tensor]:
    """Edges between two free pixels."""
    return free[..., 1:] & free[..., :-1], free[..., 1:, :] & free[..., :-1, :]


def _positive(image: Tensor, offset: float, name: str) -> Tensor:
    ok = isinstance(image, Tensor) and image.ndim == 4 and image.numel() > 0 and image.is_floating_point()
    require(ok, f"{name} must be a float tensor (B, C, H, W), got {_seen(image)}")
    require(offset >= 0 and math.isfinite(offset), f"offset must be a number >= 0, got {offset}")
    shifted = image.detach().to(torch.float64) + offset
    low, high = (float(edge) for edge in shifted.aminmax())
    if not (low > 0 and math.isfinite(high)):
        raise UserError(
            f"osmosis needs positive values, got {name} from {low - offset:g} to {high - offset:g} with "
            f"offset={offset:g}; pass a larger offset, e.g. 1/255 of the value range"
        )
    return shifted


def _mask(mask: Tensor, image: Tensor) -> Tensor:
    """The mask as bool ``(B | 1, C | 1, H, W)``."""
    ok = isinstance(mask, Tensor) and mask.dtype == torch.bool
    require(ok, f"mask must be a bool tensor, got {_seen(mask)}; compare with a threshold, e.g. mask > 0.5")
    wide = mask[None, None] if mask.ndim == 2 else mask
    fits = wide.ndim == 4 and wide.shape[-2:] == image.shape[-2:]
    if not fits or any(m not in (1, n) for m, n in zip(wide.shape[:2], image.shape[:2], strict=True)):
        raise UserError(f"mask of shape {tuple(mask.shape)} does not fit images of shape {tuple(image.shape)}")
    return wide.to(image.device)


def _seen(value: object) -> str:
    return f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
