"""Batches of a source of images, on any number of devices, exactly resumable mid-epoch."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch.utils.data import DataLoader

from dpm_scales import images
from dpm_scales.data.base import ImageDataset, ImageSource
from dpm_scales.data.decoded import (
    DECODED,
    DecodedImages,
    DeviceImages,
    Drawn,
    Draws,
    as_it_is,
    fits,
    ignore_interrupts,
    require_keepable,
)
from dpm_scales.data.sampler import EpochImages, ShuffledBatches, collate
from dpm_scales.describe import Describable
from dpm_scales.distributed.lightning_private import batches_processed
from dpm_scales.errors import is_whole, require, require_number
from dpm_scales.memory import require_memory
from dpm_scales.storage import data_cache

BYTES_PER_IMAGE, BYTES_PER_PIXEL = 400, 14
"""Minimum memory of a batch in bytes: per image, its Python objects; per pixel and channel, two copies of the loaded
image during collation, then the float image, its noise and a result."""

MOST_WORKERS, MOST_SEED = 1024, 2**53 - 1
"""Largest number of loader processes, and largest seed that checkpoints keep."""


class ImageDataModule(Describable, pl.LightningDataModule):
    """Batches (images uint8 (B, C, H, W), labels int64 (B,)) of a source.

    Training batches are numbered over the whole run. Their content depends on the number, `seed`, the images and the
    total batch size of all ranks. Checkpoints hold the number of the next batch.

    Args:
        source: the images.
        batch_size: images per batch on one device.
        num_workers: loader processes per rank; 0 loads in the training process.
        seed: seed of the order and the augmentation, from 0 to `MOST_SEED`.
        pin_memory: whether batches are page-locked; None locks them if CUDA is available.
        drop_last: whether to drop an incomplete last batch; otherwise the first images of the order fill it up.
        decoded: keep decoded images in a file that all processes map into memory, see `decoded`.
        on_device: keep the training images on the device, where batches are gathered and mirrored; None does so if
            they fit in a quarter of the device's free memory and are in memory already or, on a GPU, in files of at
            most 1 GiB.

    Raises:
        UserError: a value out of range, or images that can't be kept.
        OutOfMemoryError: batches larger than the machine's memory.
    """

    def __init__(
        self,
        source: ImageSource,
        batch_size: int,
        num_workers: int = 0,
        seed: int = 0,
        pin_memory: bool | None = None,
        drop_last: bool = True,
        decoded: bool = False,
        on_device: bool | None = None,
    ) -> None:
        super().__init__()
        require(is_whole(batch_size, 1), f"batch_size={batch_size}: allowed is a whole number >= 1")
        require_number("num_workers", num_workers, 0, MOST_WORKERS, whole=True)
        require_number("seed", seed, 0, MOST_SEED, whole=True)
        size = (source.channels, *source.image_size)
        require_memory(
            batch_size * (BYTES_PER_IMAGE + BYTES_PER_PIXEL * math.prod(size)),
            f"batch_size={batch_size} images of {size[1]}x{size[2]}x{size[0]}",
            "lower data.batch_size (trainer.accumulate_grad_batches makes up for it)",
        )
        self.source = source
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.pin_memory = torch.cuda.is_available() if pin_memory is None else pin_memory
        self.drop_last = drop_last
        self.decoded, self.on_device = decoded, on_device
        self._parts: dict[bool, ImageDataset] = {}
        self._held: DeviceImages | None = None
        self._start_batch = 0
        self._anchor: tuple[pl.Trainer | None, int] | None = None

    @property
    def channels(self) -> int:
        """Return the number of channels: 1 for grey, 3 for RGB."""
        return self.source.channels

    @property
    def image_size(self) -> tuple[int, int]:
        """Return the image size (H, W) in pixels."""
        return self.source.image_size

    @property
    def num_classes(self) -> int | None:
        """Return the number of labels; None without labels."""
        return self.source.num_classes

    @property
    def train_set(self) -> ImageDataset:
        """Return the training images; indexing does not augment them."""
        return self._part(True)

    @property
    def val_set(self) -> ImageDataset:
        """Return the validation images."""
        return self._part(False)

    def _part(self, train: bool) -> ImageDataset:
        if train not in self._parts:
            part = self.source.train() if train else self.source.val()
            if self.on_device and train:
                require_keepable(part, "data.on_device=true")
            if self.decoded and len(part):
                part = DecodedImages(part, (self.channels, *self.image_size), data_cache() / DECODED)
            self._parts[train] = part
        return self._parts[train]

    def prepare_data(self) -> None:
        """Download missing files."""
        self.source.prepare()

    def train_dataloader(self) -> DataLoader[Any]:
        """Return shuffled batches; every iterator starts at `next_batch()` and yields the batches of one epoch."""
        train = self.train_set
        sampler = ShuffledBatches(
            len(train),
            self.batch_size,
            self.seed,
            self.next_batch,
            drop_last=self.drop_last,
            rank=self.trainer.global_rank if self.trainer is not None else 0,
            world_size=self._world_size(),
            order=train.order(self.seed),
        )
        placed = self._is_placed(train)
        joined: Callable[[Any], Any] = as_it_is if placed else collate
        loader: TrainLoader = TrainLoader(
            Draws(train, self.seed) if placed else EpochImages(train, self.seed),
            batch_size=self.batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            collate_fn=joined,
            pin_memory=self.pin_memory,
            persistent_workers=self.num_workers > 0,
            worker_init_fn=ignore_interrupts,
        )
        loader.read_state, loader.write_state = self.state_dict, self._restore
        return loader

    def _is_placed(self, train: ImageDataset) -> bool:
        """Return whether training images are kept on the trainer's device, where hooks gather the batches."""
        if self.trainer is None or self.on_device is False:
            return False
        return self.on_device is True or fits(
            train, (self.channels, *self.image_size), self.trainer.strategy.root_device
        )

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Return a batch of images and labels, gathered on the device if they are kept there."""
        if not isinstance(batch, Drawn):
            return batch
        if self._held is None or self._held.device != batch.indices.device:
            shape = (self.channels, *self.image_size)
            shown = self.trainer is None or self.trainer.is_global_zero
            self._held = DeviceImages(self.train_set, shape, batch.indices.device, self.num_workers, shown)
        return self._held.gather(batch)

    def val_dataloader(self) -> DataLoader[Any] | list[DataLoader[Any]]:
        """Return all validation images in order, the last batch possibly smaller; no loader if none are held out."""
        val = self.val_set
        if len(val) == 0:
            return []
        return DataLoader(
            val,
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            collate_fn=collate,
            pin_memory=self.pin_memory,
            persistent_workers=self.num_workers > 0,
            worker_init_fn=ignore_interrupts,
        )

    def set_start_batch(self, number: int) -> None:
        """Make the next training iterator start at batch `number` >= 0, counted over the whole run."""
        require(number >= 0, f"start batch {number}: allowed is a whole number >= 0")
        self._start_batch = number
        self._anchor = None

    def next_batch(self) -> int:
        """Return the number of the next batch to train on; prefetched batches do not count."""
        trainer = self.trainer
        consumed = 0 if trainer is None else batches_processed(trainer)
        if self._anchor is None or self._anchor[0] is not trainer:
            self._anchor = (trainer, consumed)
        return self._start_batch + consumed - self._anchor[1]

    def state_dict(self) -> dict[str, Any]:
        """Return the state for checkpoints: the position and all values that determine the order."""
        return {"next_batch": self.next_batch(), **self._order_keys()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume at the stored position; warn if the order differs from that of the stored run."""
        now = self._order_keys()
        before = {key: state_dict.get(key, value) for key, value in now.items()}
        changed = [key for key, value in now.items() if before[key] != value]
        # ranks share a batch, whose content depends only on its total size
        if before["batch_size"] * before["world_size"] == now["batch_size"] * now["world_size"]:
            changed = [key for key in changed if key not in ("batch_size", "world_size")]
        if changed and (self.trainer is None or self.trainer.is_global_zero):
            differences = ", ".join(f"{key} {before[key]} -> {now[key]}" for key in changed)
            warnings.warn(
                f"the order of the training images differs from the checkpoint's: {differences}", stacklevel=2
            )
        self._restore(state_dict)

    def statistics(self, max_images: int = 10000) -> dict[str, float]:
        """Return `mean` and `std` over all training pixels and channels, for values in [0, 1].

        They are measured on at most `max_images` images, evenly spaced in the training set or in a few of its shards.
        """
        require(max_images >= 1, f"max_images={max_images}: allowed is a whole number >= 1")
        self.prepare_data()
        train = self.train_set
        require(len(train) > 0, "no training images")
        number, total, squares = 0, 0.0, 0.0
        pool = train.pool(max_images)
        places = np.linspace(0, len(pool) - 1, min(max_images, len(pool))).round().astype(int).tolist()
        together = max(1, 2**16 // (self.channels * self.image_size[0] * self.image_size[1]))
        for start in range(0, len(places), together):
            chosen = [train[pool[place]][0] for place in places[start : start + together]]
            values = images.to_range(torch.stack(chosen), (0.0, 1.0)).double()
            number += values.numel()
            for image, square in zip(values, values.square(), strict=True):
                total += float(image.sum())
                squares += float(square.sum())
        mean = total / number
        return {"mean": mean, "std": math.sqrt(max(squares / number - mean**2, 0.0))}

    def _restore(self, state_dict: dict[str, Any]) -> None:
        self.set_start_batch(int(state_dict["next_batch"]))

    def _world_size(self) -> int:
        return self.trainer.world_size if self.trainer is not None else 1

    def _order_keys(self) -> dict[str, int]:
        return {
            "seed": self.seed,
            "batch_size": self.batch_size,
            "world_size": self._world_size(),
            "num_images": len(self.train_set),
            "drop_last": self.drop_last,
            **self.train_set.order(self.seed).keys(),
        }


class TrainLoader(DataLoader[Any]):
    """Loader whose state is that of the data module.

    Lightning warns about mid-epoch checkpoints if a loader has no state, but restores that state only in some cases.
    The data module's own hooks always restore the same state.
    """

    read_state: Callable[[], dict[str, Any]]
    write_state: Callable[[dict[str, Any]], None]

    def state_dict(self) -> dict[str, Any]:
        return self.read_state()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.write_state(state_dict)
