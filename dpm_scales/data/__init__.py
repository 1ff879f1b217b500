"""Data sets and batches of uint8 images with integer labels; tar shards of them are in `dpm_scales.shards`."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dpm_scales.data.base import ImageDataset, ImageSource, TensorImages
from dpm_scales.data.downloads import TorchvisionSource
from dpm_scales.data.files import listed
from dpm_scales.data.folder import BSDS500, FileImages, ImageFolder
from dpm_scales.data.hf import HubSource
from dpm_scales.data.mnist5000 import Mnist5000
from dpm_scales.data.order import EpochOrder
from dpm_scales.data.sampler import ShuffledBatches
from dpm_scales.data.sources import ArraySource, Digits, Photos

if TYPE_CHECKING:
    from dpm_scales.data.builders import (
        array_data,
        bsds500_data,
        digits_data,
        folder_data,
        hf_data,
        mnist5000_data,
        photos_data,
        torchvision_data,
    )
    from dpm_scales.data.datamodule import ImageDataModule
    from dpm_scales.data.given import GivenImages, given_data

__all__ = [
    "BSDS500",
    "ArraySource",
    "Digits",
    "EpochOrder",
    "FileImages",
    "GivenImages",
    "HubSource",
    "ImageDataModule",
    "ImageDataset",
    "ImageFolder",
    "ImageSource",
    "Mnist5000",
    "Photos",
    "ShuffledBatches",
    "TensorImages",
    "TorchvisionSource",
    "array_data",
    "bsds500_data",
    "digits_data",
    "folder_data",
    "given_data",
    "hf_data",
    "listed",
    "mnist5000_data",
    "photos_data",
    "torchvision_data",
]


def __getattr__(name: str) -> Any:
    # the data module needs Lightning, which takes seconds to import
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    places = {"ImageDataModule": "datamodule", "GivenImages": "given", "given_data": "given"}
    return getattr(import_module(f"{__name__}.{places.get(name, 'builders')}"), name)
