"""Read the images of the studio: uploads of limited size, and the examples that ship with scikit-image."""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import cache

import torch
from PIL import Image
from torch import Tensor

from dpm_scales.errors import UserError, printable, require
from dpm_scales.images import DECODING_ERRORS, load_image, resize

MAX_BYTES = 20 * 2**20
"""Largest upload, in bytes."""

MAX_PIXELS = 25 * 10**6
"""Largest upload, in pixels: it bounds the memory and the time of decoding."""

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""Formats of uploads; the decoders of others are never tried."""

SIDES = (128, 256, 384, 512)
"""Longer side in pixels to which larger images can be reduced."""

SIDE = 256
NAME_LENGTH = 60
SHADED = "chelsea, shaded"
EXAMPLES = ("chelsea", "astronaut", "coffee", "camera", SHADED)
"""Images of `skimage.data` that its wheel contains, and one of them in the shadow of a bar."""

SHADOW = ((0.33, 0.28), (0.6, 0.75), 0.24)
"""The bar: its ends as shares of the width and height, and its width as a share of the shorter side."""

SHADOW_LIGHT, SHADOW_EDGE = 0.42, 2.0
"""Light that is left in the shadow, and the width of its soft edge in px of the largest size."""


@dataclass(frozen=True)
class Photo:
    """An image of moderate size.

    Attributes:
        name: name of the file or the example.
        image: uint8 ``(C, H, W)``, C = 1 or 3.
        original: (H, W) before it was reduced.
    """

    name: str
    image: Tensor
    original: tuple[int, int]

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) in pixels."""
        return self.image.shape[-2], self.image.shape[-1]

    def note(self) -> str:
        """Return a line with the name and the size, and the reduction if there was one."""
        kind = "grey" if len(self.image) == 1 else "RGB"
        (height, width), (had_height, had_width) = self.size, self.original
        if self.size == self.original:
            return f"{self.name}: {width} × {height} px, {kind}"
        return f"{self.name}: reduced from {had_width} × {had_height} to {width} × {height} px, {kind}"

    def reduced(self, side: int) -> Photo:
        """Return the photo with a longer side of at most `side` pixels."""
        longer = max(self.size)
        if longer <= side:
            return self
        height, width = (max(1, round(n * side / longer)) for n in self.size)
        return Photo(self.name, resize(self.image, (height, width)), self.original)


def read_upload(content: bytes, name: str = "upload") -> Photo:
    """Return an uploaded image, reduced to at most the last of `SIDES`.

    The header is checked before anything is decoded.

    Raises: UserError for a file that is too large, not an image in one of the `FORMATS`, or damaged.
    """
    name = printable(name[-NAME_LENGTH:])
    limit = f"allowed are {MAX_BYTES >> 20} MB and {MAX_PIXELS // 10**6} megapixels"
    require(len(content) > 0, f"{name} is empty; choose an image file")
    require(len(content) <= MAX_BYTES, f"{name} has {len(content) / 2**20:.1f} MB; {limit}")
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as picture:
            width, height = picture.size
    except DECODING_ERRORS:
        known = ", ".join(FORMATS[:-1])
        raise UserError(f"{name} is no image that can be read; allowed are {known} and {FORMATS[-1]}") from None
    require(width * height <= MAX_PIXELS, f"{name} has {width} × {height} pixels; {limit}")
    image = load_image(content, name=name)
    return Photo(name, image, (image.shape[-2], image.shape[-1])).reduced(SIDES[-1])


@cache
def example(name: str) -> Photo:
    """Return one of `EXAMPLES`, reduced to at most the last of `SIDES`. Raises UserError for another name."""
    require(name in EXAMPLES, f"unknown example {name!r}; allowed: {', '.join(EXAMPLES)}")
    from skimage import data

    array = getattr(data, name.partition(",")[0])()
    image = torch.from_numpy(array[None] if array.ndim == 2 else array.transpose(2, 0, 1).copy())
    size = (image.shape[-2], image.shape[-1])
    if name == SHADED:
        shade = (0.5 - capsule(SHADOW, size) / SHADOW_EDGE).clamp(0, 1)
        image = (image * (1 - (1 - SHADOW_LIGHT) * shade)).round().to(torch.uint8)
    return Photo(name, image, size).reduced(SIDES[-1])


def capsule(bar: tuple[tuple[float, float], tuple[float, float], float], size: tuple[int, int]) -> Tensor:
    """Return the signed distance in px of each pixel to a bar with round ends, ``(H, W)``, negative inside.

    Args:
        bar: as `SHADOW`; the brush paints it in one stroke.
        size: (H, W).
    """
    (x_0, y_0), (x_1, y_1), width = bar
    ends = torch.tensor([[x_0, y_0], [x_1, y_1]]) * torch.tensor([size[1], size[0]])
    rows, columns = (torch.arange(n) + 0.5 for n in size)
    places = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), -1)
    along = ends[1] - ends[0]
    share = (((places - ends[0]) @ along) / (along @ along)).clamp(0, 1)
    return (places - ends[0] - share[..., None] * along).norm(dim=-1) - width * min(size) / 2


def fitted(photo: Photo, channels: int, size: tuple[int, int]) -> Tensor:
    """Return the photo for a model, uint8 ``(channels, H, W)``: its centre, cropped to the shape and resized."""
    (height, width), (had_height, had_width) = size, photo.size
    rows = min(had_height, max(1, round(had_width * height / width)))
    columns = min(had_width, max(1, round(had_height * width / height)))
    top, left = (had_height - rows) // 2, (had_width - columns) // 2
    image = resize(photo.image[:, top : top + rows, left : left + columns], size)
    if channels == 1 and len(image) == 3:
        weights = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)  # luma, as Pillow converts
        return (image.float() * weights).sum(0, keepdim=True).round().to(torch.uint8)
    return image.expand(channels, -1, -1)
