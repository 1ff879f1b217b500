"""White noise that depends on a seed, a sample's number and the draw's number alone.

Sampling with it gives the same image for the same (seed, number), in batches of any size and on any number of devices.
A counter-based generator: the state is a counter, hashed by SplitMix64's finaliser (Steele et al. 2014), in integer
arithmetic that wraps, so every device draws the same bits, and all samples are drawn in one operation.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dpm_scales.errors import is_whole, require

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit integer
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical shift to the right; torch's is arithmetic."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * _MIX_1
    x = (x ^ _shift(x, 27)) * _MIX_2
    return x ^ _shift(x, 31)


class NoiseSource:
    """Independent noise for the samples numbered `first`, `first + 1`, ... of a seed.

    Args:
        seed: any integer from 0 to 2^63 - 1.
        count: number of samples B, >= 1.
        first: number of the first one, >= 0.
        device: where the noise is made.

    Raises: UserError for anything else.
    """

    def __init__(self, seed: int, count: int, first: int = 0, device: torch.device | str | None = None) -> None:
        require(is_whole(seed, 0) and seed < 2**63, f"seed must be a whole number from 0 to 2^63 - 1, got {seed!r}")
        require(is_whole(count, 1), f"a noise source needs at least one sample, got count={count!r}")
        require(is_whole(first, 0), f"samples are numbered from 0, got first={first!r}")
        numbers = torch.arange(first, first + count, dtype=torch.int64, device=device)
        seeded = _mix(torch.full((), seed, dtype=torch.int64, device=device) + _GOLDEN)
        self._keys = _mix(seeded + (numbers + 1) * _GOLDEN)
        self._draws = 0
        self.numbers = numbers
        self.count = count
        self.device = self._keys.device

    def uniform(self, shape: tuple[int, ...] = ()) -> Tensor:
        """``(B, *shape)`` in [0, 1), float64."""
        self._draws += 1
        size = math.prod(shape)
        # the product wraps as a tensor; as a Python number it would leave 64 bits
        number = torch.full((), self._draws, dtype=torch.int64, device=self.device)
        streams = _mix(self._keys + number * _GOLDEN)
        counters = torch.arange(1, size + 1, dtype=torch.int64, device=self.device) * _GOLDEN
        bits = _shift(_mix(streams[:, None] + counters), 11)
        return (bits.to(torch.float64) * 2.0**-53).reshape(self.count, *shape)

    def normal(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        """``(B, *shape)`` standard normal (Box-Muller, in float64, then cast)."""
        radius = torch.sqrt(-2 * torch.log1p(-self.uniform(shape)))
        return (radius * torch.cos(2 * math.pi * self.uniform(shape))).to(dtype)
