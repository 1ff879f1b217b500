"""Building blocks of the U-Net: scale embedding, residual block, self-attention, resampling.

On the CPU none of them copies between memory formats: channels_last inputs give channels_last results.
"""

from __future__ import annotations

import math
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpm_scales.errors import require

_SCALE_FACTOR = 1000.0  # stretches t in [0, 1] to the step numbers that the frequencies were chosen for
_MAX_PERIOD = 10_000.0
LABEL_STD = 0.1
"""Standard deviation of a new label embedding: about that of a new scale embedding, so that neither dominates."""

_Module = TypeVar("_Module", bound=nn.Module)


def zero_init(module: _Module) -> _Module:
    """Set every parameter of `module` to zero and return it."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def group_norm(channels: int) -> nn.GroupNorm:
    """Return a group norm with the most groups that divide `channels`: at most 32, of at least 4 channels (EDM)."""
    groups = max(g for g in range(1, max(min(32, channels // 4), 1) + 1) if channels % g == 0)
    return nn.GroupNorm(groups, channels, eps=1e-5)


class ScaleEmbedding(nn.Module):
    """Sinusoidal features of ``1000 * t``, then a two-layer MLP (DDPM, Ho et al. 2020; ADM, Dhariwal & Nichol 2021).

    Args:
        dim: number of features and width of the result; even, at least 4.

    Raises:
        UserError: if `dim` is odd or too small.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        require(
            isinstance(dim, int) and dim >= 4 and dim % 2 == 0,
            f"embedding_dim is {dim!r}; allowed are even numbers from 4: one half is cosines, the other sines",
        )
        self.dim = dim
        self.expand = nn.Linear(dim, dim)
        self.project = nn.Linear(dim, dim)

    def features(self, t: Tensor) -> Tensor:
        """Return ``[cos, sin]`` of ``1000 * t`` at geometric frequencies from 1 to 1e-4.

        Args:
            t: (B,) float scale in [0, 1].

        Returns:
            (B, dim) values in [-1, 1], in float32 or, for a float64 `t`, in float64.
        """
        # Computed on the fly rather than kept in a buffer: a buffer would be rounded by .bfloat16() and lost by
        # to_empty(). Never below float32, where neighbouring scales would coincide.
        dtype = torch.promote_types(t.dtype, torch.float32)
        half = self.dim // 2
        exponents = torch.arange(half, device=t.device, dtype=dtype) / max(half - 1, 1)
        angles = (_SCALE_FACTOR * t.to(dtype))[:, None] * torch.exp(-math.log(_MAX_PERIOD) * exponents)
        return torch.cat([angles.cos(), angles.sin()], dim=1)

    def forward(self, t: Tensor) -> Tensor:
        """Map (B,) scales in [0, 1] to (B, dim) embeddings."""
        features = self.features(t).to(self.expand.weight.dtype)
        out: Tensor = self.project(F.silu(self.expand(features)))
        return out


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions whose second group norm is scaled and shifted by the embedding (ADM's adaptive norm).

    The second convolution starts at zero, so that the block starts as its shortcut.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the result; a 1x1 convolution is the shortcut where they differ.
        embedding_dim: width of the embedding.
        dropout: probability in [0, 1) of dropping a value before the second convolution.
    """

    def __init__(self, in_channels: int, out_channels: int, embedding_dim: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = group_norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.modulation = nn.Linear(embedding_dim, 2 * out_channels)
        self.norm2 = group_norm(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zero_init(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.shortcut = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """Map (B, in_channels, H, W) and an activated embedding (B, embedding_dim) to (B, out_channels, H, W)."""
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.modulation(emb)[:, :, None, None].chunk(2, dim=1)
        h = F.silu(torch.addcmul(shift, self.norm2(h), scale + 1))
        out: Tensor = self.shortcut(x) + self.conv2(self.dropout(h))
        return out


class SelfAttention(nn.Module):
    """Multi-head self-attention over all pixels with a residual shortcut (Vaswani et al. 2017; ADM).

    The output projection starts at zero, so that the block starts as the identity. There is no positional encoding:
    the surrounding convolutions supply positions.

    Args:
        channels: channels of the input and the result.
        num_heads: number of heads; must divide `channels`.

    Raises:
        UserError: if `num_heads` does not divide `channels`.
    """

    def __init__(self, channels: int, num_heads: int) -> None:
        super().__init__()
        require(
            num_heads >= 1 and channels % num_heads == 0,
            f"{channels} channels cannot be split into {num_heads} attention heads; choose a divisor of {channels}",
        )
        self.num_heads = num_heads
        self.norm = group_norm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.project = zero_init(nn.Linear(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C, H, W)."""
        b, c, height, width = x.shape
        # For channels_last these are views: pixels are already rows of a (B, HW, C) matrix.
        tokens = self.norm(x).flatten(2).transpose(1, 2)
        qkv = self.qkv(tokens).view(b, height * width, 3, self.num_heads, c // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, height * width, c)
        out: Tensor = x + self.project(attended).transpose(1, 2).reshape(b, c, height, width)
        return out


class Downsample(nn.Conv2d):
    """Halve height and width with a 3x3 convolution of stride 2: (B, in, H, W) to (B, out, H/2, W/2), H and W even."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 3, stride=2, padding=1)


class Upsample(nn.Conv2d):
    """Double height and width by repeating pixels, then a 3x3 convolution: (B, in, H, W) to (B, out, 2H, 2W)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1)

    def forward(self, input: Tensor) -> Tensor:  # the base class's name
        """Map (B, in_channels, H, W) to (B, out_channels, 2H, 2W)."""
        return super().forward(F.interpolate(input, scale_factor=2.0, mode="nearest"))
