"""Networks that map a noisy or blurred image and its scale to an image of the same size."""

from __future__ import annotations

from dpm_scales.networks.base import Network, require_forward, require_size
from dpm_scales.networks.compiled import compiled_training, evaluated
from dpm_scales.networks.diffusers_unet import DiffusersUNet
from dpm_scales.networks.edm2 import EDM2
from dpm_scales.networks.jit import JiT
from dpm_scales.networks.unet import UNet

__all__ = [
    "EDM2",
    "DiffusersUNet",
    "JiT",
    "Network",
    "UNet",
    "compiled_training",
    "evaluated",
    "require_forward",
    "require_size",
]
