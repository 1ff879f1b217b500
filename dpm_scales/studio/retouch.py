"""Retouch photos by osmosis with painted masks: shadows removed, objects cloned without a seam."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable

import torch
from torch import Tensor

from dpm_scales.commands.retouch import AUTO_MATCH, AUTO_PENUMBRA, RANGE, place
from dpm_scales.editing.osmosis import blend, check_shadow_options, remove_shadow
from dpm_scales.errors import UserError, require
from dpm_scales.images import LEVELS, load_image, to_range, to_uint8
from dpm_scales.studio.photos import MAX_BYTES, SIDES

OFFSET = 1 / LEVELS
"""Added to all pixels while solving, since osmosis needs positive values."""

TOLERANCE = 1e-4
PREFIX = "data:image/png;base64,"
OnChannel = Callable[[float], None]


def read_mask(painted: str | None, size: tuple[int, int]) -> Tensor:
    """Return a painted mask, bool ``(H, W)``, thresholded at half.

    Args:
        painted: a PNG file as a data URL, from the page's brush; empty if nothing was painted.
        size: (H, W) of the image.

    Raises: UserError for an empty mask, for anything but such a file, and for another size.
    """
    require(bool(painted), "nothing is painted; drag over the image first")
    assert painted is not None
    require(painted.startswith(PREFIX) and len(painted) <= MAX_BYTES, "the mask is no PNG image; reload the page")
    try:
        content = base64.b64decode(painted.removeprefix(PREFIX), validate=True)
    except binascii.Error:
        raise UserError("the mask is no PNG image; reload the page") from None
    # the size in the header of a PNG file, before it is decoded
    width, height = (int.from_bytes(content[k : k + 4]) for k in (16, 20))
    fits = content[:8] == b"\x89PNG\r\n\x1a\n" and max(width, height) <= SIDES[-1]
    require(fits, "the mask is no PNG image of the studio; reload the page")
    mask = load_image(content, 1, "the mask")[0] > LEVELS // 2
    seen = f"the mask has {width} × {height} pixels, the image {size[1]} × {size[0]}; paint it anew"
    require(tuple(mask.shape) == size, seen)
    require(bool(mask.any()), "nothing is painted; drag over the image first")
    require(not bool(mask.all()), "all of the image is painted; leave a part of it")
    return mask


def shadow(
    image: Tensor,
    mask: Tensor,
    marks: str = "region",
    match: str = "auto",
    penumbra: int | None = None,
    on_channel: OnChannel | None = None,
) -> Tensor:
    """Remove a shadow, as ``evolve.py task=shadow`` does: uint8 ``(C, H, W)``.

    Args:
        image: uint8 ``(C, H, W)``.
        mask: bool ``(H, W)``.
        marks: "region", the mask covers the shadow, or "edge", its border.
        match, penumbra: as in `editing.osmosis.remove_shadow`; "auto" and None choose by `marks`.
    """
    match = AUTO_MATCH.get(marks, "mean") if match == "auto" else match
    width = AUTO_PENUMBRA.get(marks, 0) if penumbra is None or marks == "edge" else penumbra
    check_shadow_options(marks, match, width)

    def edit(f: Tensor) -> Tensor:
        return remove_shadow(f, mask, marks, match, OFFSET, TOLERANCE, width)

    return _by_channel(edit, on_channel, image)


def clone(
    background: Tensor,
    foreground: Tensor,
    mask: Tensor,
    centre: tuple[float, float] = (0.5, 0.5),
    match: str = "pinned",
    mixed: bool = False,
    on_channel: OnChannel | None = None,
) -> tuple[Tensor, Tensor]:
    """Blend a painted part of an image into another one, as ``evolve.py task=clone`` does.

    Args:
        background: uint8 ``(C, H, W)``; grey images become RGB if the other one is.
        foreground: uint8 ``(C, h, w)``.
        mask: bool ``(h, w)``.
        centre: where the centre of the mask's bounding box goes, as shares of the background's height and width.
        match, mixed: as in `editing.osmosis.blend`.

    Returns: the part pasted without blending, and the result.
    Raises: UserError for a mask that covers none or all of the background.
    """
    channels = max(len(background), len(foreground))
    background, foreground = background.expand(channels, -1, -1), foreground.expand(channels, -1, -1)
    size = (background.shape[-2], background.shape[-1])
    rows, columns = (mask.any(axis).nonzero().flatten() for axis in (1, 0))
    middle = ((int(rows[0]) + int(rows[-1])) / 2, (int(columns[0]) + int(columns[-1])) / 2)
    corner = tuple(round(share * n - half) for share, n, half in zip(centre, size, middle, strict=True))
    placed, inside = place(foreground, mask, size, (corner[0], corner[1]))

    def edit(f: Tensor, g: Tensor) -> Tensor:
        return blend(f, g, inside, match, OFFSET, TOLERANCE, mixed)

    return torch.where(inside, placed, background), _by_channel(edit, on_channel, background, placed)


def _by_channel(edit: Callable[..., Tensor], on_channel: OnChannel | None, *images: Tensor) -> Tensor:
    """Apply an edit of floats ``(1, 1, H, W)`` to each channel of uint8 images ``(C, H, W)``."""
    results = []
    for number, channels in enumerate(zip(*images, strict=True)):
        results.append(edit(*(to_range(channel, RANGE, torch.float64)[None, None] for channel in channels))[0])
        if on_channel is not None:
            on_channel((number + 1) / len(images[0]))
    return to_uint8(torch.cat(results), RANGE)
