"""Layers that preserve the magnitude of activations (Karras et al. 2024, "Analyzing and improving the training dynamics
of diffusion models", EDM2). Written from the paper.

If the inputs' values have a mean square of one, so do the results'. Weights have one row per output; only the row's
direction matters:

    W_i / |W_i|    the weight of output i

Every optimiser step lengthens the rows, which makes later steps smaller. Therefore `after_step` scales them back after
each step (forced weight normalisation, Eq. 66) to a mean square of 1 / rate_scale^2 of their values, so that a step
rotates a row by about learning_rate * rate_scale. The result of a network does not depend on the length of the rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# sqrt(E[silu(z)^2]), z standard normal
_SILU_RMS = 0.596469211111423
_EPS = 1e-4
_TINY = 1e-12


def mp_silu(x: Tensor) -> Tensor:
    """Return silu(x) / sqrt(E[silu(z)^2]), z standard normal (Eq. 81)."""
    return F.silu(x) / _SILU_RMS


def mp_sum(a: Tensor, b: Tensor, share: float) -> Tensor:
    """Return (1 - share) a + share b, rescaled to preserve the magnitude of independent a, b (Eq. 88)."""
    return torch.lerp(a, b, share) / math.hypot(1 - share, share)


def mp_cat(a: Tensor, b: Tensor, share: float = 0.5) -> Tensor:
    """Concatenate channels so that b contributes `share`, whatever the numbers of channels (Eq. 103).

    Args:
        a, b: ``(B, channels, H, W)``.
    """
    channels = a.shape[1], b.shape[1]
    total = math.sqrt(sum(channels)) / math.hypot(1 - share, share)
    scale_a, scale_b = ((total * s / math.sqrt(n)) for s, n in zip((1 - share, share), channels, strict=True))
    return torch.cat([a * scale_a, b * scale_b], 1)


def pixel_norm(x: Tensor, dim: int = 1) -> Tensor:
    """Return x divided by its root mean square over `dim`."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return x * (wide.square().mean(dim, keepdim=True) + _EPS**2).rsqrt().to(x.dtype)


class ScaleWaves(nn.Module):
    """Cosines of the scale t: sqrt(2) cos(2 pi (f 4 t + p)), of mean square one (Eq. 75).

    The paper draws normal frequencies f and uniform phases p. Here f are quantiles of the normal and p is evenly
    spread: the same distribution, without numbers that would have to be stored. The range of 4 t is about that of the
    paper's ln(sigma) / 4.

    Args:
        dim: number of cosines.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, t: Tensor) -> Tensor:
        """Map ``(B,)`` scales in [0, 1] to ``(B, dim)``, float32 or, for a float64 `t`, float64."""
        dtype = torch.promote_types(t.dtype, torch.float32)
        i = torch.arange(self.dim, device=t.device, dtype=dtype)
        frequency = torch.special.ndtri((i + 0.5) / self.dim)
        phase = (i * (math.sqrt(5) - 1) / 2) % 1  # multiples of the golden ratio fill [0, 1) evenly
        return math.sqrt(2) * torch.cos(2 * math.pi * (4 * t.to(dtype)[:, None] * frequency + phase))


class Gain(nn.Module):
    """A learned number, initially zero; the parameter is the number divided by `rate_scale`."""

    def __init__(self, rate_scale: float) -> None:
        super().__init__()
        self.rate_scale = rate_scale
        self.value = nn.Parameter(torch.zeros(1))  # FSDP can't shard a scalar

    def forward(self) -> Tensor:
        """Return the number, ``(1,)``."""
        return self.value * self.rate_scale


class MPLayer(nn.Module):
    """A convolution without bias, or a linear layer, that preserves magnitude (Eq. 47, 66).

    Args:
        in_channels, out_channels: channels of the input and the result.
        kernel: (height, width) of the convolution, odd; () for a linear layer.
        rate_scale: factor on the learning rate, > 0.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: Sequence[int], rate_scale: float) -> None:
        super().__init__()
        self.rate_scale = rate_scale
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, *kernel))
        self.after_step()

    def unit_weight(self) -> Tensor:
        """Return the weight with rows of unit length."""
        rows = tuple(range(1, self.weight.ndim))
        length = torch.linalg.vector_norm(self.weight, dim=rows, keepdim=True)
        return self.weight / length.clamp(min=_TINY)

    def forward(self, x: Tensor, gain: Tensor | None = None) -> Tensor:
        """Map ``(B, in_channels, H, W)``, or ``(B, in_channels)`` for a linear layer, to ``out_channels`` channels.

        Args:
            gain: factor on the result, ``(1,)``.
        """
        weight = self.unit_weight()
        weight = (weight if gain is None else weight * gain).to(x.dtype)
        if weight.ndim == 2:
            return F.linear(x, weight)
        return F.conv2d(x, weight, padding=(weight.shape[2] // 2, weight.shape[3] // 2))

    @torch.no_grad()
    def after_step(self) -> None:
        """Scale the rows to a mean square of 1 / rate_scale^2. Shards hold whole rows, so each rank scales its own."""
        weight = self.weight.detach()
        to_local = getattr(weight, "to_local", None)  # only sharded weights have it, see `networks.base.Network`
        rows = weight if to_local is None else to_local()
        length = torch.linalg.vector_norm(rows, dim=tuple(range(1, rows.ndim)), keepdim=True)
        rows.mul_(math.sqrt(self.weight[0].numel()) / self.rate_scale / length.clamp(min=_TINY))
