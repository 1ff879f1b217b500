"""Shuffle images in an order that depends only on (seed, batch number), so that training can resume at any batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torch.utils.data.distributed import DistributedSampler

from dpm_scales.data.base import ImageDataset
from dpm_scales.data.order import EpochOrder, Permuted
from dpm_scales.errors import require

Key = tuple[int, int]
"""(image index, epoch)."""


class ShuffledBatches(DistributedSampler[Key]):
    """Endless shuffled global batches n = 0, 1, 2, ...; an iterator yields the batches of one epoch.

    With E batches per epoch, batch n is part n mod E of the order of epoch n // E, by default a permutation drawn from
    (seed, n // E). Rank `rank` of `world_size` takes every `world_size`-th image of the global batch. An iterator
    starts at batch `next_batch()`, the only number needed to resume, and yields keys (index, epoch), one per image.

    It derives from DistributedSampler only so that Lightning does not replace it on several devices.

    Args:
        num_images: size of the data set.
        batch_size: images per batch on one rank.
        seed: seed of all permutations, >= 0.
        next_batch: returns the number of the batch at which to start; called by every new iterator.
        drop_last: whether to drop an incomplete last batch; otherwise the first images of the order fill it up.
        rank, world_size: index of this rank, and number of ranks.
        where: prefix of the names of arguments in messages.
        order: the order of each epoch; None for permutations of all images.

    Raises:
        UserError: fewer images than one global batch with `drop_last`.
    """

    def __init__(
        self,
        num_images: int,
        batch_size: int,
        seed: int,
        next_batch: Callable[[], int],
        drop_last: bool = True,
        rank: int = 0,
        world_size: int = 1,
        where: str = "",
        order: EpochOrder | None = None,
    ) -> None:
        global_batch = batch_size * world_size
        require(num_images > 0, "no training images")
        devices = f" on {world_size} devices" if world_size > 1 else ""
        enough = num_images // world_size
        smaller = f"{where}batch_size <= {enough} or " if enough else ""
        require(
            num_images >= global_batch or not drop_last,
            f"{where}batch_size={batch_size}{devices} exceeds the {num_images} training images; "
            f"set {smaller}{where}drop_last=false",
        )
        self.num_images = num_images
        self.batch_size = batch_size
        self.order = Permuted(num_images, seed) if order is None else order
        self.next_batch = next_batch
        self.rank = rank
        self.world_size = world_size
        self.batches_per_epoch = num_images // global_batch if drop_last else -(-num_images // global_batch)

    def __len__(self) -> int:
        return self.batches_per_epoch * self.batch_size

    def __iter__(self) -> Iterator[Key]:
        start = self.next_batch()
        slots = np.arange(self.batch_size) * self.world_size + self.rank
        for batch in range(start, start + self.batches_per_epoch):
            epoch, number = divmod(batch, self.batches_per_epoch)
            places = (number * self.batch_size * self.world_size + slots) % self.num_images
            for index in self.order(epoch, places).tolist():
                yield index, epoch

    def set_epoch(self, epoch: int) -> None:
        """Do nothing: the batch number determines the epoch."""


class EpochImages(Dataset[tuple[Tensor, int]]):
    """Training images by key (index, epoch); the augmentation depends only on (seed, epoch, index)."""

    def __init__(self, images: ImageDataset, seed: int) -> None:
        self.images = images
        self.seed = seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, keys: Sequence[Key | int]) -> list[tuple[Tensor, int]]:
        """Return the images of a batch."""
        self.images.expect([key if isinstance(key, int) else key[0] for key in keys])
        return [self[key] for key in keys]

    def __getitem__(self, key: Key | int) -> tuple[Tensor, int]:
        index, epoch = (key, 0) if isinstance(key, int) else key
        rng = np.random.default_rng((self.seed, epoch, index)) if self.images.augmented else None
        return self.images.get(index, rng)


def collate(items: Sequence[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
    """Return a batch (images uint8 (B, C, H, W), labels int64 (B,))."""
    images, labels = zip(*items, strict=True)
    return torch.stack(images), torch.tensor(labels, dtype=torch.int64)
