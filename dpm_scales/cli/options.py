"""Read and check options that several commands share: counts, devices, sizes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from omegaconf import DictConfig

from dpm_scales.errors import UserError, is_whole, require, require_number, suggest
from dpm_scales.models.guided import weight_settings
from dpm_scales.models.instantiate import plain


def image_size(cfg: DictConfig) -> tuple[int, int] | None:
    """Return the (H, W) in the config, or None if it sets no size. Raises UserError for invalid values."""
    size = plain(cfg.size)
    if size is None:
        return None
    sides = size if isinstance(size, list) else [size, size]
    pair = len(sides) == 2 and all(is_whole(n, 1) for n in sides)
    require(pair, f"size must be a number of pixels or [height,width], got {size!r}")
    return sides[0], sides[1]


DEVICES = ("auto", "cpu", "cuda", "mps", "xpu")


def check_counts(cfg: DictConfig, numbers: Sequence[str] = ("num_samples",), least: int = 1) -> None:
    """Raise UserError for an invalid seed or batch size, or if a value of the keys `numbers` is below `least`."""
    for name, low in {**dict.fromkeys(numbers, least), "batch_size": 1, "seed": 0}.items():
        require_number(name, cfg[name], low, whole=True)


def pick_device(name: str) -> torch.device:
    """Return the device for "auto" or a device name. Raises UserError if it is not available."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind = name.partition(":")[0]
    require(kind in DEVICES, f"unknown device {name!r}: {suggest(kind, DEVICES)}")
    require(kind != "cpu" or name in ("cpu", "cpu:0"), f"device={name} is not available here; use device=cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"device={name} is not available here ({reason}); use device=auto") from error


def guidance_settings(cfg: DictConfig) -> dict[str, Any] | None:
    """Return the guidance settings in a config, or None if it has none. Raises UserError for an invalid weight."""
    scale = weight_settings(plain(cfg.guidance))
    if scale == 1:
        return None
    interval = plain(cfg.guidance_interval)
    return {"scale": scale, "interval": interval, "variable": cfg.guidance_variable}
