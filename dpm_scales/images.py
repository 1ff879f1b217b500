"""Convert, tile, load and save eight-bit images. Only this module depends on 0..255.

Images that are stored or shown are uint8, (C, H, W) or (B, C, H, W). Models use floats in a `value_range` = (lo, hi),
to which an affine map takes 0 (lo) and 255 (hi). Files are written atomically.
"""

from __future__ import annotations

import io
import math
import struct
import unicodedata
import zlib
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from einops import rearrange, repeat
from PIL import Image, ImageDraw, ImageFont, ImageOps, PngImagePlugin
from torch import Tensor
from torch.nn import functional

from dpm_scales.errors import UserError, is_whole, require
from dpm_scales.storage import atomic_write, open_regular
from dpm_scales.storage import write_bytes as write_bytes
from dpm_scales.storage import write_text as write_text

LEVELS = 255
"""Maximum value of an eight-bit image."""

PADDING_LEVEL = 128
"""Grey value between the cells of a grid, visible next to black and white."""

SMALLEST_CELL = 32
"""Minimum side in pixels of images in `make_grid`, which enlarges smaller ones."""

CLASS_COLUMNS, CLASS_ROWS, CAPTION_LENGTH = 10, 20, 24
"""Limits of `make_class_grid`: images in a row, classes in a column, characters of a name."""

DECODING_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    LookupError,
    ArithmeticError,
    TypeError,
    AttributeError,
    AssertionError,
    RuntimeError,
    MemoryError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
"""Exceptions of Pillow for damaged files, depending on the format and the damage."""


def to_range(images: Tensor, value_range: tuple[float, float], dtype: torch.dtype = torch.float32) -> Tensor:
    """Return uint8 images of any shape, mapped to floats in `value_range` = (lo, hi), lo < hi.

    Raises:
        ValueError: `images` are not uint8, or the range is empty.
    """
    low, high = _check_range(value_range)
    if images.dtype != torch.uint8:
        raise ValueError(f"to_range: expected uint8 images, got {images.dtype}")
    return (images.to(torch.float32) / LEVELS * (high - low) + low).to(dtype)


def to_uint8(x: Tensor, value_range: tuple[float, float]) -> Tensor:
    """Return floats of any shape, mapped from `value_range` to uint8: clipped, then rounded to nearest. NaN becomes 0.

    ``to_uint8(to_range(images, r), r)`` equals `images` exactly.
    """
    low, high = _check_range(value_range)
    levels = (x.detach().to(torch.float32) - low) / (high - low) * LEVELS
    return levels.nan_to_num(nan=0.0).clamp(0, LEVELS).round().to(torch.uint8)


def psnr(images: Tensor, reference: Tensor) -> float:
    """Return the peak signal-to-noise ratio in dB over all pixels of uint8 images of equal shape; inf if identical."""
    error = (images.to(torch.float64) - reference.to(torch.float64)).square().mean()
    return float(10 * torch.log10(LEVELS**2 / error))


def resize(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Return a uint8 image (C, H, W) or batch (B, C, H, W), resized to `size` = (H', W'), bicubic and antialiased."""
    if tuple(image.shape[-2:]) == tuple(size):
        return image
    batch = image if image.ndim == 4 else image[None]
    out = functional.interpolate(batch, size=size, mode="bicubic", antialias=True)
    return out if image.ndim == 4 else out[0]


def make_grid(images: Tensor, columns: int | None = None, padding: int = 1, upscale: int | None = None) -> Tensor:
    """Return uint8 images (N, C, H, W), tiled row by row into one image (C, H', W').

    Args:
        images: at least one image; they may be rectangular.
        columns: images per row; by default, the number that makes the grid nearly square.
        padding: grey pixels around every image, after enlargement.
        upscale: integer factor of the nearest-neighbour enlargement; by default, the smallest that makes the shorter
            side at least 32 pixels.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or len(images) == 0:
        raise ValueError(f"make_grid: expected uint8 (N, C, H, W), N >= 1, got {images.dtype} {tuple(images.shape)}")
    images = images.cpu()
    number, channels, height, width = images.shape
    factor = upscale if upscale is not None else math.ceil(SMALLEST_CELL / min(height, width))
    if factor < 1 or padding < 0 or (columns is not None and columns < 1):
        raise ValueError(f"make_grid: columns={columns}, upscale={upscale} must be >= 1 and padding={padding} >= 0")
    if columns is None:
        columns = math.ceil(math.sqrt(number * height / width))
    columns = min(columns, number)
    rows = math.ceil(number / columns)
    cells = repeat(images, "n c h w -> n c (h down) (w across)", down=factor, across=factor)
    cells = functional.pad(cells, (padding, 0, padding, 0), value=PADDING_LEVEL)
    blank = cells.new_full((rows * columns - number, *cells.shape[1:]), PADDING_LEVEL)
    sheet = rearrange(torch.cat([cells, blank]), "(row column) c h w -> c (row h) (column w)", column=columns)
    return functional.pad(sheet, (0, padding, 0, padding), value=PADDING_LEVEL)


def make_class_grid(images: Tensor, labels: Sequence[int], names: Sequence[str] | None = None) -> Tensor:
    """Return uint8 images (N, C, H, W), tiled into one image (C, H', W') with a row per class, its name on the left.

    Rows are sorted by label. A class of more than 10 images takes several rows, and more than 20 classes take several
    columns.

    Args:
        images: at least one image; they may be rectangular.
        labels: class of each image.
        names: names of the classes 0, 1, …; a name with letters other than Latin ones is replaced by its number.
    """
    classes = sorted(set(labels))
    members = [[i for i, label in enumerate(labels) if label == number] for number in classes]
    columns = min(CLASS_COLUMNS, max(map(len, members)))
    strips = [make_grid(images[chosen], columns) for chosen in members]
    width = max(strip.shape[-1] for strip in strips)
    side = min(images.shape[-2:])
    text_size = min(max(side * math.ceil(SMALLEST_CELL / side) // 4, 12), 24)
    written = [_ascii(names[number]) if names else "" for number in classes]
    captions = [caption(text or str(number), text_size) for text, number in zip(written, classes, strict=True)]
    margin = max(name.shape[-1] for name in captions)

    rows = []
    for strip, name in zip(strips, captions, strict=True):
        row = images.new_full((strip.shape[0], strip.shape[1], margin + width), PADDING_LEVEL)
        row[:, :, margin : margin + strip.shape[2]] = strip
        height = min(row.shape[1], name.shape[0])
        row[:, :height, margin - name.shape[1] : margin] = name[:height]
        rows.append(row)
    # the lower padding of a row is the upper padding of the next
    blocks = [rows[start : start + CLASS_ROWS] for start in range(0, len(rows), CLASS_ROWS)]
    sheets = [torch.cat([*(row[:, :-1] for row in block[:-1]), block[-1]], 1) for block in blocks]
    tallest = max(sheet.shape[1] for sheet in sheets)
    pad = functional.pad
    return torch.cat([pad(sheet, (0, 0, 0, tallest - sheet.shape[1]), value=PADDING_LEVEL) for sheet in sheets], 2)


def _ascii(name: str) -> str:
    """Return `name` without accents, which the font lacks; empty if letters other than Latin ones remain."""
    plain = "".join(c for c in unicodedata.normalize("NFKD", name) if not unicodedata.combining(c))
    return plain if plain.isascii() and plain.isprintable() else ""


def caption(text: str, size: int) -> Tensor:
    """Return white text of `size` pixels on the grey of the padding, uint8 (H, W); long text is truncated."""
    text = text if len(text) <= CAPTION_LENGTH else f"{text[: CAPTION_LENGTH - 3]}..."
    font = ImageFont.load_default(size)
    left, top, right, bottom = font.getbbox(text)
    picture = Image.new("L", (math.ceil(right - left) + size, math.ceil(bottom) + size // 2), PADDING_LEVEL)
    ImageDraw.Draw(picture).text((size // 2 - left, size // 4), text, fill=LEVELS, font=font)
    return torch.from_numpy(np.array(picture))


def save_png(path: str | Path, image: Tensor, text: Mapping[str, str] | None = None) -> None:
    """Save a uint8 image (C, H, W) atomically: C = 1 as grey (mode L), C = 3 as RGB.

    Args:
        text: metadata, written as tEXt chunks in this order; `Image.open(path).text` reads them.
    """
    with atomic_write(path) as file:
        file.write(png_bytes(image, text))


def png_bytes(image: Tensor, text: Mapping[str, str] | None = None) -> bytes:
    """Return a uint8 image (C, H, W) as the content of a PNG file; arguments as for `save_png`."""
    chunks, file = PngImagePlugin.PngInfo(), io.BytesIO()
    for key, value in (text or {}).items():
        chunks.add_text(key, value)
    _to_pillow(image).save(file, format="PNG", pnginfo=chunks)
    return file.getvalue()


def save_gif(path: str | Path, frames: Tensor | Sequence[Tensor], duration_ms: int) -> None:
    """Save uint8 frames (T, C, H, W) atomically as an endless GIF with `duration_ms` milliseconds per frame."""
    pictures = [_to_pillow(frame) for frame in frames]
    if not pictures:
        raise ValueError("save_gif: no frames")
    with atomic_write(path) as file:
        pictures[0].save(file, format="GIF", save_all=True, append_images=pictures[1:], duration=duration_ms, loop=0)


def load_image(source: str | Path | bytes | BinaryIO, channels: int | None = None, name: str | None = None) -> Tensor:
    """Return a decoded image file as uint8 (C, H, W), upright.

    EXIF rotation is applied, palettes are expanded, transparency is composited on white, CMYK becomes RGB, and 16-bit
    grey is scaled to 8 bits. Only the first frame of an animation is decoded.

    Args:
        source: path, file content or open binary file.
        channels: 1 for grey, 3 for RGB, None to keep the stored channels.
        name: name in error messages; by default the path.

    Raises:
        UserError: a missing file, one that is not an image, or a truncated one; the message names the file.
    """
    require(channels in (None, 1, 3), f"channels={channels}: allowed are 1 (grey), 3 (RGB) and null (as stored)")
    if name is None:
        name = str(source) if isinstance(source, (str, Path)) else str(getattr(source, "name", "image"))
    try:
        with _opened(source) as file, Image.open(file) as picture:
            picture.load()
            ImageOps.exif_transpose(picture, in_place=True)
            array = _to_array(picture, channels)
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{name}: no such file") from None
    except DECODING_ERRORS as error:
        reason = str(error) or type(error).__name__
        raise UserError(f"{name}: not a readable image ({reason}); replace or remove it") from error
    return torch.from_numpy(array)


def _opened(source: str | Path | bytes | BinaryIO) -> AbstractContextManager[BinaryIO]:
    if isinstance(source, str | Path):
        return open_regular(source)
    return nullcontext(io.BytesIO(source) if isinstance(source, bytes) else source)


def _to_array(picture: Image.Image, channels: int | None) -> np.ndarray:
    """Return a Pillow image of any mode as a new uint8 array (C, H, W)."""
    if picture.mode.startswith("I"):
        wide = np.asarray(picture).astype(np.int64)
        if wide.min() < 0 or wide.max() > 65535:
            raise ValueError("grey values outside of 0..65535")
        picture = Image.fromarray(((wide + 128) // 257).astype(np.uint8))
    elif picture.mode == "F":
        raise ValueError("floating-point grey values have no known range")
    grey = picture.mode in ("1", "L", "LA", "La")
    if picture.has_transparency_data:
        front = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", front.size, "white"), front).convert("RGB")
    mode = {None: "L" if grey else "RGB", 1: "L", 3: "RGB"}[channels]
    if picture.mode != mode:
        picture = picture.convert(mode)
    return np.array(picture)[None] if mode == "L" else np.asarray(picture).transpose(2, 0, 1).copy()


def _to_pillow(image: Tensor) -> Image.Image:
    if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] not in (1, 3):
        raise ValueError(f"expected a uint8 image (1 or 3, H, W), got {image.dtype} {tuple(image.shape)}")
    array = image.cpu().numpy()
    return Image.fromarray(array[0] if len(array) == 1 else np.ascontiguousarray(array.transpose(1, 2, 0)))


def _check_range(value_range: tuple[float, float]) -> tuple[float, float]:
    low, high = value_range
    if not low < high:
        raise ValueError(f"value_range={value_range}: the first value must be below the second")
    return float(low), float(high)


def size_pair(value: int | Sequence[int], key: str) -> tuple[int, int]:
    """Return (H, W) in pixels from one number (square) or two.

    Raises:
        UserError: any other value, or one that is not positive; the message calls it `key`.
    """
    pair = (value, value) if isinstance(value, int) else tuple(value) if not isinstance(value, str) else ()
    valid = len(pair) == 2 and all(is_whole(side, 1) for side in pair)
    require(valid, f"{key}={value}: allowed is a number of pixels >= 1 or [height, width]")
    return pair[0], pair[1]
