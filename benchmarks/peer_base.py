"""Define what a library of `benchmarks.peer_models` does: build a network, train it within a budget, and draw."""

from __future__ import annotations

import importlib.metadata
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

Choice = TypeVar("Choice")
Budget = Callable[[], float]
"""Function that returns the seconds left."""


def batches(images: Tensor, batch_size: int, seed: int) -> Iterator[Tensor]:
    """Yield endless batches of the rows of a tensor, in a new random order for each pass."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(images), generator=generator).to(images.device)
        for start in range(0, len(images) - batch_size + 1, batch_size):
            yield images[order[start : start + batch_size]]


class Peer(ABC):
    """A library with a network, trained and sampled.

    Args:
        images: training images uint8 ``(N, C, H, W)``, on the device of the network.
        batch_size: images per step.
        seed: seed of weights, order and noise.
        folder: folder for files of the run.
        small: whether to build the smallest network instead, for tests.
        large: whether to build one of about 35 M parameters, for colour images of 32 px on a GPU.
    """

    package: ClassVar[str]
    sampler: ClassVar[str]
    network: torch.nn.Module
    steps = 0

    def __init__(
        self, images: Tensor, batch_size: int, seed: int, folder: Path, small: bool = False, large: bool = False
    ) -> None:
        self.images, self.batch_size, self.seed, self.folder = images, batch_size, seed, folder
        self.small, self.large = small, large and not small
        torch.manual_seed(seed)
        self.build()

    @property
    def version(self) -> str:
        """The version of the library."""
        return importlib.metadata.version(self.package)

    def _of(self, small: Choice, usual: Choice, large: Choice) -> Choice:
        return small if self.small else large if self.large else usual

    @property
    def shape(self) -> tuple[int, int, int]:
        """C, H, W of an image."""
        return (self.images.shape[1], self.images.shape[2], self.images.shape[3])

    @abstractmethod
    def build(self) -> None:
        """Import the library and make network and optimiser."""

    @abstractmethod
    def loss(self, x: Tensor) -> Tensor:
        """Return the loss ``()`` of floating-point images in [0, 1]."""

    def after_step(self) -> None:  # noqa: B027, optional
        """Update averages and learning rates."""

    @abstractmethod
    def inputs(self) -> tuple[Any, ...]:
        """Return the arguments of the network for one image."""

    def train(self, left: Budget) -> None:
        """Train until no seconds are left, for at least one step."""
        network, optimizer, clip = self.network.train(), self.optimizer, self.clip
        for x in batches(self.images, self.batch_size, self.seed):
            optimizer.zero_grad()
            self.loss(x.float() / 255).backward()
            if clip is not None:
                torch.nn.utils.clip_grad_norm_(network.parameters(), clip)
            optimizer.step()
            self.after_step()
            self.steps += 1
            if left() <= 0:
                return

    optimizer: torch.optim.Optimizer
    clip: float | None = None

    @abstractmethod
    def generate(self, number: int) -> Tensor:
        """Return float images in [0, 1]."""

    def samplers(self) -> dict[str, Callable[[int], Tensor]]:
        """Return functions that draw a number of uint8 images ``(N, C, H, W)``, by their names in the table."""

        def draw(number: int) -> Tensor:
            with torch.no_grad():
                return (self.generate(number).clamp(0, 1) * 255).round().to(torch.uint8).cpu()

        return {self.sampler: draw}
