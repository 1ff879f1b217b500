"""White noise that depends only on a seed, the number of a sample and the number of a draw.

Sampling with it gives the same image for the same (seed, number), in batches of any size and on any number of devices;
a training image gets the same noise whichever process handles it.
It is a counter-based generator: the state is a counter, hashed by SplitMix64's finaliser (Steele et al. 2014) in
integer arithmetic that wraps, so every device draws the same bits, and all samples are drawn in one operation.
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
    """Return x shifted to the right logically; torch's shift is arithmetic."""
    return (x >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = _shift(x, 30).bitwise_xor_(x).mul_(_MIX_1)
    x = _shift(x, 27).bitwise_xor_(x).mul_(_MIX_2)
    return _shift(x, 31).bitwise_xor_(x)


def _wrapped(x: int) -> int:
    """Return x modulo 2^64 as a signed 64-bit integer."""
    return (x + 2**63) % 2**64 - 2**63


def _mixed(x: int) -> int:
    """Return `_mix` of one integer, without work for the device."""
    x %= 2**64
    x = (x >> 30 ^ x) * _MIX_1 % 2**64
    x = (x >> 27 ^ x) * _MIX_2 % 2**64
    return _wrapped(x >> 31 ^ x)


class CounterRNG:
    """Independent noise for the samples numbered `first`, `first + stride`, ... of a seed.

    Args:
        seed: any integer from 0 to 2^63 - 1.
        count: number of samples B, >= 1.
        first: number of the first sample, >= 0.
        device: device on which the noise is drawn.
        stride: difference between successive numbers, >= 1; the number of processes that share a batch.

    Raises: UserError for other arguments.
    """

    def __init__(
        self, seed: int, count: int, first: int = 0, device: torch.device | str | None = None, stride: int = 1
    ) -> None:
        require(is_whole(seed, 0) and seed < 2**63, f"seed must be a whole number from 0 to 2^63 - 1, got {seed!r}")
        require(is_whole(count, 1), f"a noise source needs at least one sample, got count={count!r}")
        require(is_whole(first, 0), f"samples are numbered from 0, got first={first!r}")
        require(is_whole(stride, 1), f"numbers of samples must grow, got stride={stride!r}")
        numbers = torch.arange(first, first + count * stride, stride, dtype=torch.int64, device=device)
        self._keys = _mix((numbers + 1) * _GOLDEN + _mixed(seed + _GOLDEN))
        self._draws = 0
        self.numbers = numbers
        self.count = count
        self.device = self._keys.device

    def uniform(self, shape: tuple[int, ...] = ()) -> Tensor:
        """Draw ``(B, *shape)`` uniform in [0, 1), float64."""
        bits = _shift(self._bits(math.prod(shape)), 11)
        return (bits.to(torch.float64) * 2.0**-53).reshape(self.count, *shape)

    def normal(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        """Draw ``(B, *shape)`` standard normal (Box-Muller, in float64, then cast)."""
        radius = torch.sqrt(-2 * torch.log1p(-self.uniform(shape)))
        return (radius * torch.cos(2 * math.pi * self.uniform(shape))).to(dtype)

    def normal_float32(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        """Draw ``(B, *shape)`` standard normal for training, several times faster, of magnitude at most 6.7.

        64 random bits give two numbers, radius and angle using 32 each (Box-Muller), in float32, in which devices
        round differently.
        """
        size = math.prod(shape)
        bits = self._bits((size + 1) // 2)
        # half a step away from zero, whose logarithm is infinite
        radius = _shift(bits, 32).to(torch.float32).add_(0.5).mul_(2.0**-32).log_().mul_(-2).sqrt_()
        angle = bits.bitwise_and_(0xFFFFFFFF).to(torch.float32).mul_(2 * math.pi * 2.0**-32)
        pair = torch.cat([torch.cos(angle).mul_(radius), angle.sin_().mul_(radius)], 1)
        return pair[:, :size].reshape(self.count, *shape).to(dtype)

    def _bits(self, size: int) -> Tensor:
        """Draw ``(B, size)`` integers of 64 random bits."""
        self._draws += 1
        streams = _mix(self._keys + _wrapped(self._draws * _GOLDEN))
        counters = torch.arange(1, size + 1, dtype=torch.int64, device=self.device) * _GOLDEN
        return _mix(streams[:, None] + counters)


Randomness = torch.Generator | CounterRNG | None
"""Source of a law's random numbers: torch's generator (None for its default one), or one with a stream per sample."""


def white_noise(like: Tensor, randomness: Randomness) -> Tensor:
    """Draw standard normal noise with the shape, dtype and device of `like` ``(B, ...)``."""
    if isinstance(randomness, CounterRNG):
        return randomness.normal_float32(tuple(like.shape[1:]), like.dtype)
    return torch.randn(like.shape, generator=randomness, dtype=like.dtype, device=like.device)
