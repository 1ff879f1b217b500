"""diffusers' U-Net as a network of this package, so that models can be converted in both directions.

diffusers is imported only when such a network is built.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dpm_scales.describe import Describable
from dpm_scales.errors import UserError, is_number, is_whole, nearest, require

#: arguments of UNet2DModel that are determined by those of `DiffusersUNet`
OWN = ("in_channels", "out_channels", "num_class_embeds", "num_train_timesteps", "sample_size")
# t and num_scales are rounded to float32, so k = t num_scales is an integer only up to this
_ROUNDING = 1e-3


def unet_class() -> Any:
    """Return diffusers' `UNet2DModel`. Raises UserError if diffusers is not installed."""
    try:
        from diffusers import UNet2DModel
    except ImportError as error:
        raise UserError(
            f"DiffusersUNet needs diffusers ({error}): pip install 'dpm-scales[diffusers]', or choose another network"
        ) from error
    return UNet2DModel


def unet_arguments() -> dict[str, Any]:
    """Return the arguments of `UNet2DModel` that `DiffusersUNet(unet=...)` takes, with their defaults."""
    parameters = inspect.signature(unet_class()).parameters.values()
    return {p.name: p.default for p in parameters if p.name not in OWN}


class DiffusersUNet(Describable, nn.Module):
    """diffusers' `UNet2DModel` as a function of the scale t.

    diffusers numbers the steps of a chain from 0, so step i is scale k = i + 1: the U-Net receives the timestep
    t num_scales - 1. Scales between two steps give fractions.

    With `noise_levels` it is a network of a variance-exploding chain (Song et al. 2021; diffusers'
    ScoreSdeVePipeline): it receives the noise level gamma_t and predicts the score, which this class converts to the
    noise, eps = -gamma_t score.

    Args:
        in_channels: channels of the input, at least 1.
        out_channels: channels of the result, at least 1.
        num_classes: number of class labels. One more index, `num_classes`, means "no label". None builds a network
            without labels.
        unet: the other arguments of `UNet2DModel`, by name; missing ones have their defaults there.
        num_scales: number of steps of the chain, at least 1.
        noise_levels: (lowest, highest) gamma, at k = 1 and at t = 1, log-spaced in between; None for timesteps.
        no_label: False builds the label embedding without the additional index, as diffusers' own training does.

    Raises: UserError if diffusers is missing, for arguments out of range, and for those that `UNet2DModel` refuses.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        num_classes: int | None = None,
        unet: Mapping[str, Any] | None = None,
        num_scales: int = 1000,
        noise_levels: Sequence[float] | None = None,
        no_label: bool = True,
    ) -> None:
        super().__init__()
        settings = dict(unet or {})
        known = unet_arguments()
        for name in settings:
            require(
                name not in OWN, f"unet must not contain {name!r}, which follows from the network's other arguments"
            )
            close = nearest(str(name), known)
            hint = "" if close is None else f": did you mean {close!r}?"
            require(name in known, f"unet holds {name!r}, and UNet2DModel has no such argument{hint}")
        counts = {"in_channels": in_channels, "out_channels": out_channels, "num_scales": num_scales}
        counts |= {} if num_classes is None else {"num_classes": num_classes}
        for name, value in counts.items():
            require(is_whole(value, 1), f"{name} is {value!r}; allowed are whole numbers from 1")
        embedding = settings.get("time_embedding_type", known["time_embedding_type"])
        if noise_levels is not None:
            ok = isinstance(noise_levels, Sequence) and len(noise_levels) == 2 and all(map(is_number, noise_levels))
            ok = ok and 0 < noise_levels[0] <= noise_levels[1]
            require(ok, f"noise_levels must be [lowest, highest], numbers > 0, got {noise_levels!r}")
        require(
            (embedding == "fourier") == (noise_levels is not None),
            f"time_embedding_type={embedding} with noise_levels={noise_levels}: noise levels are for fourier, which "
            "divides the result by them, and time steps for the others",
        )
        class_embedding = settings.get("class_embed_type")
        require(
            class_embedding is None,
            f"class_embed_type={class_embedding}: labels are embedded by a table here; leave it out",
        )
        self.in_channels, self.num_classes, self.num_scales = in_channels, num_classes, num_scales
        self.noise_levels = None if noise_levels is None else (float(noise_levels[0]), float(noise_levels[1]))
        self.embedding, self.no_label = embedding, no_label
        self.multiple = 2 ** max(len(settings.get("block_out_channels", known["block_out_channels"])) - 1, 0)
        classes = None if num_classes is None else num_classes + int(no_label)
        steps = num_scales if embedding == "learned" else None
        own = dict(zip(OWN, (in_channels, out_channels, classes, steps, None), strict=True))
        try:
            self.unet = unet_class()(**{**settings, **own})
        except (ValueError, TypeError, IndexError, KeyError, ZeroDivisionError) as error:
            if isinstance(error, UserError):
                raise
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(f"UNet2DModel can't be built: {reason:.200}") from error
        wide = any(getattr(part, "heads", 1) < 1 for part in self.unet.modules())
        require(
            not wide,
            f"unet.attention_head_dim={settings.get('attention_head_dim', known['attention_head_dim'])} exceeds the "
            "width of a level with attention, or of the middle, which leaves no head; choose less",
        )

    def check_size(self, size: tuple[int, int]) -> None:
        """Raise UserError for an image size ``(H, W)`` that the levels do not divide."""
        if size[0] % self.multiple or size[1] % self.multiple:
            raise UserError(
                f"images of {size[0]}x{size[1]} pixels: UNet2DModel with these levels needs sides that are "
                f"multiples of {self.multiple}; change the images' size or the number of block_out_channels"
            )

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """Apply the network.

        Args:
            x: (B, in_channels, H, W) floating point, H and W multiples of 2^(number of levels - 1).
            t: (B,) floating point scale in (0, 1].
            labels: (B,) int64 in [0, num_classes], where `num_classes` means "no label"; None means that for all.

        Returns: (B, out_channels, H, W).
        Raises: UserError for another number of channels, a size that the levels do not divide, labels for a network
            without classes, and missing labels for a network without an index for "no label".
        """
        # plain branches: the message would be formatted at every call
        if x.ndim != 4 or x.shape[1] != self.in_channels:
            raise UserError(
                f"x has shape {tuple(x.shape)}; allowed is (batch, {self.in_channels}, height, width): change the data "
                "or the network's in_channels"
            )
        self.check_size((x.shape[2], x.shape[3]))
        if self.noise_levels is None:
            return self._call(x, self._step(t), labels)
        level = self._noise_level(t)
        return -level.to(x.dtype)[:, None, None, None] * self._call(x, level.to(x.dtype), labels)

    def _call(self, x: Tensor, step: Tensor, labels: Tensor | None) -> Tensor:
        if self.num_classes is None:
            if labels is not None:
                raise UserError("labels are given to a network without classes; leave them out or set num_classes")
        elif labels is None:
            if not self.no_label:
                raise UserError("this network was trained with labels only; give labels")
            labels = torch.full(step.shape, self.num_classes, device=x.device, dtype=torch.int64)
        out: Tensor = self.unet(x, step, labels, return_dict=False)[0]
        return out

    def _step(self, t: Tensor) -> Tensor:
        """Return diffusers' timestep of t, exact where t is a scale of the chain."""
        step = t.to(torch.promote_types(t.dtype, torch.float32)) * self.num_scales - 1
        nearest = step.round()
        if self.embedding == "learned":  # a table of the steps
            return nearest.clamp(0, self.num_scales - 1).long()
        return torch.where((step - nearest).abs() < _ROUNDING, nearest, step)

    def _noise_level(self, t: Tensor) -> Tensor:
        """Return gamma_t of `GeometricNoise`, float64, including scales below the first."""
        assert self.noise_levels is not None
        low, high = self.noise_levels
        k = t.to(torch.float64) * self.num_scales
        progress = ((k - 1) / max(self.num_scales - 1, 1)).clamp(0, 1)
        return torch.exp(math.log(low) + progress * math.log(high / low)) * k.clamp(0, 1).sqrt()
