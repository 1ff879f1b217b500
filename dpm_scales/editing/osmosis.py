r"""Image editing by osmosis: shadow removal and seamless cloning (Weickert et al. 2013, Vogel et al. 2013).

Up to a factor, an image is the steady state of its own canonical drift. So one edits the drift and reconstructs the
image by osmosis: d = 0 across an edge removes the contrast there, the drift of another image imposes its contrast.
A multiplicative change of light, such as a shadow, changes the drift only at the shadow's edge.

The steady state of the edited drift is computed by implicit Euler with growing steps (`steady_state`). It is unique up
to a factor, which osmosis fixes by preserving the mean intensity of the initial image; `match` chooses the factor:

| `match` | |
|---|---|
| "mean" | the mean intensity is preserved, as in osmosis |
| "outside" | each channel is rescaled to preserve its mean outside the mask |
| "lit" | (shadows) each channel is rescaled to preserve its mean where the result is brightened least, the lit part |
| "pinned" | every pixel outside the mask is kept, and osmosis reconstructs the inside between them |
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from dpm_scales.errors import UserError, is_whole, require, require_choice
from dpm_scales.operators import canonical_drift, drift_stencil, steady_state

MATCHES = ("mean", "outside", "pinned")
SHADOW_MATCHES = (*MATCHES, "lit")
SHADOW_MASKS = ("region", "edge")


def remove_shadow(
    image: Tensor,
    mask: Tensor,
    mask_marks: str = "region",
    match: str = "mean",
    offset: float = 0.0,
    tol: float = 1e-6,
    penumbra: int = 0,
) -> Tensor:
    """Return an image without its shadow, with the drift set to 0 on the shadow's edge (Weickert et al. 2013, Sect. 4).

    The result is exact, up to the factor that `match` fixes, if the shadow is multiplicative and the scene is constant
    across the shadow's edge; edges of the scene there are lost.

    Args:
        image: ``(B, C, H, W)``, > 0.
        mask: bool ``(H, W)`` or ``(B | 1, C | 1, H, W)``.
        mask_marks: "region": the mask is True in the shadow, the drift is 0 between pixels inside and outside;
            "edge": it is True on the shadow's edge (penumbra), the drift is 0 on all edges that touch the mask.
        match: a row of the table above. "outside" and "pinned" need a mask of the region; for "lit", a channel's pixels
            outside the mask are split at the mean of the 5th and 95th percentile of log(result / image).
        offset: added before and subtracted afterwards, for images with black pixels; 1/255 of the value range is usual.
        tol: relative change at which the steady state is reached.
        penumbra: for a region with a soft edge, half the edge's width in px: the drift is 0 on all edges that touch a
            pixel within this distance (along rows, columns and diagonals) of the other side, and they count as inside.

    Returns: ``(B, C, H, W)``, same dtype; computed in float64.
    Raises: UserError for invalid values, shapes or names.
    """
    check_shadow_options(mask_marks, match, penumbra)
    f, inside = _positive(image, offset, "image"), _mask(mask, image)
    keep_right, keep_down = _agree(inside) if mask_marks == "region" else _both(~inside)
    if penumbra > 0:
        wide, narrow = _grown(inside, penumbra), ~_grown(~inside, penumbra)
        clear_right, clear_down = _both(narrow | ~wide)
        keep_right, keep_down, inside = keep_right & clear_right, keep_down & clear_down, wide
    right, down = canonical_drift(f)
    return _rebuild(right * keep_right, down * keep_down, f, f, inside, match, offset, tol).to(image.dtype)


def blend(
    background: Tensor,
    foreground: Tensor,
    mask: Tensor,
    match: str = "mean",
    offset: float = 0.0,
    tol: float = 1e-6,
    mixed: bool = False,
) -> Tensor:
    """Return the background with the foreground cloned in seamlessly (Weickert et al. 2013, Vogel et al. 2013).

    The drift is the foreground's between pixels of the mask, the background's between pixels outside, and the mean of
    both across the mask's edge. A constant factor on the foreground has no effect.

    Args:
        background: ``(B, C, H, W)``, > 0.
        foreground: ``(B, C, H, W)``, > 0; only its pixels in the mask and next to it are used.
        mask: bool ``(H, W)`` or ``(B | 1, C | 1, H, W)``, True where the foreground is inserted.
        match: a row of the table above, for the background: "mean", "outside" or "pinned".
        offset: added before and subtracted afterwards, for images with black pixels.
        tol: relative change at which the steady state is reached.
        mixed: between pixels of the mask, use the stronger of both drifts, as mixed gradients do (Perez et al. 2003):
            the background's texture shows through where the foreground is flat.

    Returns: ``(B, C, H, W)``, same dtype as the background; computed in float64.
    Raises: UserError for invalid values, shapes or names.
    """
    require_choice("match", match, MATCHES)
    f, g = _positive(background, offset, "background"), _positive(foreground, offset, "foreground")
    require(
        f.shape == g.shape,
        f"background and foreground must have one shape, got {tuple(f.shape)} and {tuple(g.shape)}",
    )
    inside = _mask(mask, background)
    weight = inside.to(f.dtype)
    shares = ((weight[..., 1:] + weight[..., :-1]) / 2, (weight[..., 1:, :] + weight[..., :-1, :]) / 2)
    drifts = []
    for outer, inner, share in zip(canonical_drift(f), canonical_drift(g), shares, strict=True):
        if mixed:
            inner = torch.where(inner.abs() < outer.abs(), outer, inner)
        drifts.append(torch.lerp(outer, inner, share.expand_as(outer)))
    pasted = torch.where(inside, g, f)  # close to the result except for the lighting
    return _rebuild(drifts[0], drifts[1], f, pasted, inside, match, offset, tol).to(background.dtype)


def check_shadow_options(mask_marks: str, match: str, penumbra: int) -> None:
    """Raise UserError for options of `remove_shadow` that do not exist or contradict each other."""
    require_choice("mask_marks", mask_marks, SHADOW_MASKS)
    require_choice("match", match, SHADOW_MATCHES)
    region = mask_marks == "region"
    require(
        region or match in ("mean", "lit"), f"match={match} would keep the shadow: mask_marks=edge needs lit or mean"
    )
    require(is_whole(penumbra, 0), f"penumbra must be a whole number of px >= 0, got {penumbra!r}")
    require(region or penumbra == 0, "penumbra is for mask_marks=region; with mask_marks=edge the mask is the penumbra")


def _rebuild(
    right: Tensor, down: Tensor, image: Tensor, start: Tensor, inside: Tensor, match: str, offset: float, tol: float
) -> Tensor:
    """Return the steady state of a drift, scaled to `image` according to `match`, minus the offset."""
    if match != "mean":
        some = bool((~inside).expand_as(image).any(-1).any(-1).all())
        require(some, f"match={match!r} needs pixels outside the mask")
    if match == "pinned":
        return steady_state(drift_stencil(right, down), torch.where(inside, start, image), tol, fixed=~inside) - offset
    u = steady_state(drift_stencil(right, down), start, tol)
    kept = torch.ones_like(inside) if match == "mean" else ~inside
    if match == "lit":
        kept = _least_brightened(u / image, kept)
    weight = kept.to(u.dtype)
    return u * ((image * weight).sum((-2, -1), keepdim=True) / (u * weight).sum((-2, -1), keepdim=True)) - offset


def _least_brightened(gain: Tensor, outside: Tensor) -> Tensor:
    """Return a mask of the pixels outside whose log gain lies in the lower half of its range there."""
    lowest = torch.finfo(gain.dtype).tiny
    logs = gain.clamp_min(lowest).log().masked_fill(~outside, math.inf)
    ordered, last = logs.flatten(-2).sort(-1).values, outside.flatten(-2).sum(-1, keepdim=True) - 1
    low, high = (ordered.gather(-1, (share * last).long().expand_as(ordered[..., :1])) for share in (0.05, 0.95))
    return logs <= ((low + high) / 2)[..., None]


def _grown(mask: Tensor, radius: int) -> Tensor:
    """Return the mask dilated by a square of side 2 radius + 1."""
    return F.max_pool2d(mask.to(torch.float32), 2 * radius + 1, stride=1, padding=radius) > 0


def _agree(inside: Tensor) -> tuple[Tensor, Tensor]:
    """Return the edges, right and down, between two pixels on the same side."""
    return inside[..., 1:] == inside[..., :-1], inside[..., 1:, :] == inside[..., :-1, :]


def _both(free: Tensor) -> tuple[Tensor, Tensor]:
    """Return the edges, right and down, between two free pixels."""
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
    """Return the mask as bool ``(B | 1, C | 1, H, W)``."""
    ok = isinstance(mask, Tensor) and mask.dtype == torch.bool
    require(ok, f"mask must be a bool tensor, got {_seen(mask)}; compare with a threshold, e.g. mask > 0.5")
    wide = mask[None, None] if mask.ndim == 2 else mask
    fits = wide.ndim == 4 and wide.shape[-2:] == image.shape[-2:]
    if not fits or any(m not in (1, n) for m, n in zip(wide.shape[:2], image.shape[:2], strict=True)):
        raise UserError(f"mask of shape {tuple(mask.shape)} does not fit images of shape {tuple(image.shape)}")
    return wide.to(image.device)


def _seen(value: object) -> str:
    return f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
