"""Report failures of memory and files in the middle of a run, with what to change."""

from __future__ import annotations

import errno
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback

from dpm_scales.data import ImageDataModule, listed
from dpm_scales.errors import OutOfMemoryError, UserError
from dpm_scales.storage import write_bytes

MOST_NAMES = 1000
"""Largest number of unreadable images that `unreadable.txt` lists."""


#: torch's messages when tensors can't be sent between processes
_FEW_FILES = ("Too many open files", "received 0 items of ancdata")


@contextmanager
def told_in_one_line(batch_size: int, image_size: tuple[int, int], num_workers: int) -> Iterator[None]:
    """Turn a lack of memory or of file handles, and the death of a loader process, into an OutOfMemoryError.

    Args:
        batch_size: images per batch on one device.
        image_size: (H, W) in pixels.
        num_workers: number of loader processes.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError, OSError) as error:
        text = str(error)
        if text.startswith(_FEW_FILES) or (isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE)):
            raise OutOfMemoryError(
                "more files are open than the system allows; the last checkpoint is kept: allow more with ulimit -n, "
                f"or lower data.num_workers={num_workers}, then resume"
            ) from error
        memory = isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in text
        if memory:
            place = "the device" if isinstance(error, torch.OutOfMemoryError) else "the machine"
            raise OutOfMemoryError(
                f"{place} is out of memory with batches of {batch_size} images of {image_size[0]}x{image_size[1]}; the "
                "last checkpoint is kept: lower data.batch_size (trainer.accumulate_grad_batches makes up for it), "
                "data.image_size or samples.num_images, or choose a smaller network"
            ) from error
        if text.startswith("DataLoader worker"):
            reason = " ".join(text.split())[:200]
            raise OutOfMemoryError(
                f"a loading process died ({reason}); the last checkpoint is kept: lower data.num_workers={num_workers} "
                "if the machine, or its /dev/shm, is out of memory, then resume"
            ) from error
        raise


class UnreadableImages(Callback):
    """Warns of images that could not be read, at each validation and at the end if there are new ones.

    Their names are written to the run folder's `unreadable.txt`.
    """

    def __init__(self, data: ImageDataModule, path: Path) -> None:
        self.data, self.path = data, path
        self._told = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._tell(trainer, warn=False)  # those found at the start have been reported

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._tell(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._tell(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._tell(trainer)

    def _tell(self, trainer: pl.Trainer, warn: bool = True) -> None:
        source = self.data.source
        names = [*getattr(source, "left_out", {})]
        for part in (source.train(), source.val()):
            names += getattr(part, "unreadable", ())  # of files and shards
        if len(names) == self._told or not trainer.is_global_zero:
            return
        self._told = len(names)
        if warn:
            warnings.warn(f"{len(names)} unreadable images so far: {listed(names)}; see {self.path}", stacklevel=2)
        more = f"and {len(names) - MOST_NAMES} more\n" if len(names) > MOST_NAMES else ""
        text = "".join(f"{name!r}\n" for name in names[:MOST_NAMES])
        try:
            write_bytes(self.path, f"{len(names)} unreadable images\n{text}{more}".encode(errors="backslashreplace"))
        except UserError as error:  # a full disk must not end a run for this
            warnings.warn(str(error), stacklevel=2)
