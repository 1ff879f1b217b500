"""From a source of images to batches, on any number of devices, exactly resumable in mid-epoch."""

from __future__ import annotations

import math
import signal
import warnings
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch.utils.data import DataLoader

from dpm_scales import images
from dpm_scales.data.base import ImageDataset, ImageSource
from dpm_scales.data.sampler import EpochImages, ShuffledBatches, collate
from dpm_scales.distributed.lightning_private import batches_processed
from dpm_scales.errors import is_whole, require
from dpm_scales.memory import require_memory

BYTES_PER_IMAGE, BYTES_PER_PIXEL = 400, 14
"""What a batch takes at least: the loaded images twice as they are collated, then as floats, with noise and a result;
and for each of them objects of Python."""


class ImageDataModule(pl.LightningDataModule):
    """Batches (images uint8 (B, C, H, W), labels int64 (B,)) of a source.

    Training batches are numbered over the whole run; their content depends on the number, `seed`, `batch_size`, the
    images and how many devices there are. The number of batches consumed is part of a checkpoint.

    Args:
        source: the images.
        batch_size: images of one batch on one device.
        num_workers: loading processes of each device; 0 loads in the training process.
        seed: of the order and the augmentation, >= 0.
        pin_memory: page-locked batches; null if CUDA is there.
        drop_last: leave out the images that fill no batch; otherwise images from the front fill the last batch up.

    Raises:
        UserError: a value out of range.
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
    ) -> None:
        super().__init__()
        require(is_whole(batch_size, 1), f"batch_size={batch_size}: allowed is a whole number >= 1")
        require(is_whole(num_workers, 0), f"num_workers={num_workers}: allowed is a whole number >= 0")
        require(is_whole(seed, 0), f"seed={seed}: allowed is a whole number >= 0")
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
        self._start_batch = 0
        self._anchor: tuple[pl.Trainer | None, int] | None = None

    @property
    def channels(self) -> int:
        """1 grey or 3 RGB."""
        return self.source.channels

    @property
    def image_size(self) -> tuple[int, int]:
        """(H, W) in pixels."""
        return self.source.image_size

    @property
    def num_classes(self) -> int | None:
        """Number of labels, None without labels."""
        return self.source.num_classes

    @property
    def train_set(self) -> ImageDataset:
        """Training images by index, not augmented."""
        return self.source.train()

    @property
    def val_set(self) -> ImageDataset:
        """Validation images by index."""
        return self.source.val()

    def prepare_data(self) -> None:
        """Download what is missing."""
        self.source.prepare()

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled batches; every iterator starts at `next_batch()` and yields one epoch's worth."""
        train = self.train_set
        sampler = ShuffledBatches(
            len(train),
            self.batch_size,
            self.seed,
            self.next_batch,
            drop_last=self.drop_last,
            rank=self.trainer.global_rank if self.trainer is not None else 0,
            world_size=self._world_size(),
        )
        loader: TrainLoader = TrainLoader(
            EpochImages(train, self.seed),
            batch_size=self.batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            collate_fn=collate,
            pin_memory=self.pin_memory,
            persistent_workers=self.num_workers > 0,
            worker_init_fn=_ignore_interrupts,
        )
        loader.read_state, loader.write_state = self.state_dict, self._go_on
        return loader

    def val_dataloader(self) -> DataLoader[Any] | list[DataLoader[Any]]:
        """All validation images in order, the last batch perhaps smaller; no loader if none are held out."""
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
            worker_init_fn=_ignore_interrupts,
        )

    def set_start_batch(self, number: int) -> None:
        """Let the next training iterator start at batch `number` >= 0, counted over the whole run."""
        require(number >= 0, f"start batch {number}: allowed is a whole number >= 0")
        self._start_batch = number
        self._anchor = None

    def next_batch(self) -> int:
        """Number of the next training batch that the trainer has not consumed; prefetched ones do not count."""
        trainer = self.trainer
        consumed = 0 if trainer is None else batches_processed(trainer)
        if self._anchor is None or self._anchor[0] is not trainer:
            self._anchor = (trainer, consumed)
        return self._start_batch + consumed - self._anchor[1]

    def state_dict(self) -> dict[str, Any]:
        """What Lightning stores in a checkpoint: the position, and what the order depends on."""
        return {"next_batch": self.next_batch(), **self._order_keys()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume at the stored position; warns if the order is no longer the stored run's."""
        now = self._order_keys()
        before = {key: state_dict.get(key, value) for key, value in now.items()}
        changed = [key for key, value in now.items() if before[key] != value]
        # a batch is shared by the processes: how many there are makes no difference to what is in it
        if before["batch_size"] * before["world_size"] == now["batch_size"] * now["world_size"]:
            changed = [key for key in changed if key not in ("batch_size", "world_size")]
        if changed and (self.trainer is None or self.trainer.is_global_zero):
            differences = ", ".join(f"{key} {before[key]} -> {now[key]}" for key in changed)
            warnings.warn(
                f"the order of the training images differs from the checkpoint's: {differences}", stacklevel=2
            )
        self._go_on(state_dict)

    def statistics(self, max_images: int = 10000) -> dict[str, float]:
        """Mean and standard deviation of all training pixels and channels, on the scale where white is 1.

        Taken from at most `max_images` images spread evenly over the training set.
        """
        require(max_images >= 1, f"max_images={max_images}: allowed is a whole number >= 1")
        self.prepare_data()
        train = self.train_set
        require(len(train) > 0, "no training images")
        number, total, squares = 0, 0.0, 0.0
        for index in np.linspace(0, len(train) - 1, min(max_images, len(train))).round().astype(int).tolist():
            values = images.to_range(train[index][0], (0.0, 1.0)).double()
            number += values.numel()
            total += float(values.sum())
            squares += float(values.square().sum())
        mean = total / number
        return {"mean": mean, "std": math.sqrt(max(squares / number - mean**2, 0.0))}

    def _go_on(self, state_dict: dict[str, Any]) -> None:
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
        }


def _ignore_interrupts(worker: int) -> None:
    """Ctrl-C reaches all processes of a terminal; the training process ends the others, after its last step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class TrainLoader(DataLoader[Any]):
    """A loader with the data module's state.

    Lightning warns about mid-epoch checkpoints of loaders without state, and restores a loader's state only on some
    of its ways to resume; the data module's own hooks are what counts, both agree.
    """

    read_state: Callable[[], dict[str, Any]]
    write_state: Callable[[dict[str, Any]], None]

    def state_dict(self) -> dict[str, Any]:
        return self.read_state()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.write_state(state_dict)
