"""Read the images that judges compare: MNIST's digits, and folders of samples."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Array = NDArray[Any]

SAMPLE_NAME = re.compile(r"\d{6}\.png")
"""Files of one image each; the grid and trajectories beside them are left out."""


def mnist_digits() -> tuple[Array, Array]:
    """Return images uint8 (5000, 32, 32), 28 px digits in a black frame of 2 px, and labels int64 (5000,)."""
    from dpm_scales.data.mnist5000 import digits

    return digits()


def read_samples(folder: str | Path, channels: int = 1) -> Array:
    """Return the images 000000.png, 000001.png, … of a folder: uint8, grey (N, H, W) or RGB (N, 3, H, W).

    Raises:
        ValueError: no images, or images of different sizes.
    """
    paths = sorted(path for path in Path(folder).glob("*.png") if SAMPLE_NAME.fullmatch(path.name))
    if not paths:
        raise ValueError(f"{folder}: no images named 000000.png, 000001.png, …")
    images = []
    for path in paths:
        with Image.open(path) as picture:
            images.append(np.asarray(picture.convert("L")) if channels == 1 else _rgb(picture))
    sizes = {image.shape for image in images}
    if len(sizes) > 1:
        raise ValueError(f"{folder}: images of different sizes: {', '.join(map(str, sorted(sizes)))}")
    return np.stack(images)


def _rgb(picture: Image.Image) -> Array:
    """Return uint8 (3, H, W)."""
    return np.asarray(picture.convert("RGB")).transpose(2, 0, 1)
