"""An image set of a few random pixels, for tests of benchmarks."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.image_sets import ImageSet


class Few(ImageSet):
    """A few 8 px images; the distance is the mean intensity."""

    name, network, batch_size, quality = "few", "tiny", 4, "mean"

    def overrides(self) -> list[str]:
        raise NotImplementedError("train.py is not given these images")

    def training_images(self) -> np.ndarray[Any, Any]:
        return np.random.default_rng(0).integers(0, 256, (12, 1, 8, 8), dtype=np.uint8)

    def report(self, images: np.ndarray[Any, Any]) -> dict[str, float]:
        assert images.dtype == np.uint8 and images.shape == (3, 1, 8, 8)
        return {"fd": float(images.mean()), "confidence": 0.5}

    def real(self, number: int) -> dict[str, float]:
        return {"fd": 70.0}
