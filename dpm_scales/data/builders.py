"""One builder for each file in configs/data: the arguments of a source and of `ImageDataModule`, side by side.

They keep the keys of a config flat (`data.root=DIR data.batch_size=32`). The configs give all values; the classes
document the arguments and their defaults.
"""

from __future__ import annotations

from collections.abc import Sequence

from dpm_scales.data.datamodule import ImageDataModule
from dpm_scales.data.downloads import TorchvisionSource
from dpm_scales.data.folder import BSDS500, ImageFolder
from dpm_scales.data.sources import ArraySource, Digits, Photos


def digits_data(
    *,
    val_fraction: float,
    split_seed: int,
    batch_size: int,
    num_workers: int,
    seed: int,
    pin_memory: bool | None,
    drop_last: bool,
) -> ImageDataModule:
    """Return batches of `Digits`."""
    source = Digits(
        val_fraction=val_fraction,
        split_seed=split_seed,
    )
    return ImageDataModule(source, batch_size, num_workers, seed, pin_memory, drop_last)


def photos_data(
    *,
    patch_size: int | Sequence[int],
    stride: int,
    val_photo: str,
    random_flip: bool,
    batch_size: int,
    num_workers: int,
    seed: int,
    pin_memory: bool | None,
    drop_last: bool,
) -> ImageDataModule:
    """Return batches of `Photos`."""
    source = Photos(
        patch_size=patch_size,
        stride=stride,
        val_photo=val_photo,
        random_flip=random_flip,
    )
    return ImageDataModule(source, batch_size, num_workers, seed, pin_memory, drop_last)


def folder_data(
    *,
    root: str,
    channels: int,
    image_size: int | Sequence[int] | None,
    resize_mode: str,
    random_crop: bool,
    random_flip: bool,
    rotate_portrait: bool,
    split: str,
    val_fraction: float,
    split_seed: int,
    labels: str,
    on_error: str,
    verify: str,
    batch_size: int,
    num_workers: int,
    seed: int,
    pin_memory: bool | None,
    drop_last: bool,
) -> ImageDataModule:
    """Return batches of `ImageFolder`."""
    source = ImageFolder(
        root=root,
        channels=channels,
        image_size=image_size,
        resize_mode=resize_mode,
        random_crop=random_crop,
        random_flip=random_flip,
        rotate_portrait=rotate_portrait,
        split=split,
        val_fraction=val_fraction,
        split_seed=split_seed,
        labels=labels,
        on_error=on_error,
        verify=verify,
    )
    return ImageDataModule(source, batch_size, num_workers, seed, pin_memory, drop_last)


def bsds500_data(
    *,
    root: str,
    patch_size: int | Sequence[int] | None,
    channels: int,
    random_crop: bool,
    random_flip: bool,
    rotate_portrait: bool,
    on_error: str,
    batch_size: int,
    num_workers: int,
    seed: int,
    pin_memory: bool | None,
    drop_last: bool,
) -> ImageDataModule:
    """Return batches of `BSDS500`."""
    source = BSDS500(
        root=root,
        patch_size=patch_size,
        channels=channels,
        random_crop=random_crop,
        random_flip=random_flip,
        rotate_portrait=rotate_portrait,
        on_error=on_error,
    )
    return ImageDataModule(source, batch_size, num_workers, seed, pin_memory, drop_last)


def torchvision_data(
    *,
    name: str,
    root: str,
    download: bool,
    image_size: int | Sequence[int] | None,
    pad_to: int | Sequence[int] | None,
    random_flip: bool,
    batch_size: int,
    num_workers: int,
    seed: int,
    pin_memory: bool | None,
    drop_last: bool,
) -> ImageDataModule:
    """Return batches of `TorchvisionSource`."""
    source = TorchvisionSource(
        name=name,
        root=root,
        download=download,
        image_size=image_size,
        pad_to=pad_to,
        random_flip=random_flip,
    )
    return ImageDataModule(source, batch_size, num_workers, seed, pin_memory, drop_last)


def array_data(
    *,
    path: str,
    val_fraction: float,
    split_seed: int,
    random_flip: bool,
    batch_size: int,
    num_workers: int,
    seed: int,
    pin_memory: bool | None,
    drop_last: bool,
) -> ImageDataModule:
    """Return batches of `ArraySource`."""
    source = ArraySource(
        path=path,
        val_fraction=val_fraction,
        split_seed=split_seed,
        random_flip=random_flip,
    )
    return ImageDataModule(source, batch_size, num_workers, seed, pin_memory, drop_last)
