"""Replace the pretrained feature networks with a small exact one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from dpm_scales.distributed.ranks import World
from dpm_scales.errors import UserError
from dpm_scales.metrics import FeatureNetwork

DIM = 12
Result = TypeVar("Result")


class Means(FeatureNetwork):
    """Compute the mean colours of the quarters of an image."""

    name = "means"
    distance_name = "FD-means"
    kernel_name = "KD-means"
    dim = DIM
    input_side = 6

    def __init__(self, hash: str = "0" * 64) -> None:
        super().__init__(hash, 16)
        self.calls = 0

    def embed(self, pixels: Tensor) -> Tensor:
        self.calls += 1
        return functional.adaptive_avg_pool2d(pixels, 2).flatten(1) / 255


@contextmanager
def small_features(network: FeatureNetwork) -> Iterator[None]:
    """Make every command use this network, whichever it requests; "missing" finds none."""

    def pick(name: str = "auto", *_: Any, **__: Any) -> FeatureNetwork:
        if name == "missing":
            raise UserError("no feature network: install one")
        torch.rand(7)  # as for a network initialised with random weights
        return network

    with mock.patch("dpm_scales.evaluation.choices.pick_features", pick):
        yield


def on_ranks(number: int, function: Callable[[World], Result]) -> list[Result]:
    """Return the results of `function`, which gathers tensors once, on each of `number` ranks. The group is a mock."""
    own: dict[int, Tensor] = {}
    results: list[Result] = []
    for collecting in (True, False):
        for rank in range(number):

            def all_gather(gathered: list[Tensor], values: Tensor, rank: int = rank) -> None:
                own[rank] = values
                for place, other in zip(gathered, range(number), strict=True):
                    place.copy_(own.get(other, values))

            with (
                mock.patch("dpm_scales.evaluation.generated.connect", lambda: None),
                mock.patch("torch.distributed.all_gather", all_gather),
            ):
                found = function(World(rank, number))
            results += [] if collecting else [found]
    return results


def noise_images(folder: Path, number: int, seed: int, size: tuple[int, int] = (8, 8), level: int = 0) -> Path:
    """Write grey files 000000.png, … of white noise around a grey level."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for i in range(number):
        Image.fromarray(rng.integers(level, level + 128, size, dtype=np.uint8)).save(folder / f"{i:06d}.png")
    return folder


class Fake(torch.nn.Module):
    """Compute simple features: mean and standard deviation of each channel."""

    name, distance_name, kernel_name, hash, resizing = "fake", "FD-fake", "KD-fake", "0", "none"
    options: Mapping[str, Any] = {}
    dim = 6

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = images.float()
        return torch.cat([x.mean((-2, -1)), x.std((-2, -1))], 1)
