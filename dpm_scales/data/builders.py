"""Builders, one for each source of images, which take its arguments together with those of `ImageDataModule`.

They keep the keys of a config flat (`data.root=DIR data.batch_size=32`). The classes document the arguments and their
defaults.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, get_type_hints

from dpm_scales.data.base import ImageSource
from dpm_scales.data.datamodule import ImageDataModule
from dpm_scales.data.downloads import TorchvisionSource
from dpm_scales.data.folder import BSDS500, ImageFolder
from dpm_scales.data.hf import HubSource
from dpm_scales.data.mnist5000 import Mnist5000
from dpm_scales.data.sources import ArraySource, Digits, Photos


def batches_of(source: type[ImageSource], name: str) -> Callable[..., ImageDataModule]:
    """Return a builder called `name`, whose keyword arguments are those of `source` and of `ImageDataModule`."""
    own, others = (dict(inspect.signature(made).parameters) for made in (source, ImageDataModule))
    del others["source"]
    arguments = [p.replace(kind=p.KEYWORD_ONLY) for p in (own | others).values()]
    signature = inspect.Signature(arguments, return_annotation=ImageDataModule)

    def build(**settings: Any) -> ImageDataModule:
        signature.bind(**settings)
        images = source(**{key: value for key, value in settings.items() if key in own})
        return ImageDataModule(images, **{key: value for key, value in settings.items() if key in others})

    hints = get_type_hints(ImageDataModule.__init__) | get_type_hints(source.__init__)
    build.__annotations__ = {p.name: hints[p.name] for p in arguments} | {"return": ImageDataModule}
    build.__signature__ = signature  # type: ignore[attr-defined]
    build.__name__ = build.__qualname__ = name
    build.__module__ = source.__module__
    build.__doc__ = f"Return batches of `{source.__name__}`."
    return build


digits_data = batches_of(Digits, "digits_data")
mnist5000_data = batches_of(Mnist5000, "mnist5000_data")
photos_data = batches_of(Photos, "photos_data")
folder_data = batches_of(ImageFolder, "folder_data")
bsds500_data = batches_of(BSDS500, "bsds500_data")
torchvision_data = batches_of(TorchvisionSource, "torchvision_data")
array_data = batches_of(ArraySource, "array_data")
hf_data = batches_of(HubSource, "hf_data")
