"""The first number of NumPy's generator seeded with (seed, epoch, index), for many images at once.

It decides which images are mirrored, see `sampler.EpochImages`. Making a generator for each image takes about 20 us,
which would be most of the host's work for batches that are gathered on a GPU.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint32]
Doubles = NDArray[np.float64]


def first_draws(seed: int, epoch: NDArray[np.int64], index: NDArray[np.int64]) -> Doubles:
    """Return `np.random.default_rng((seed, epoch, index)).random()` for each pair, ``(B,)``, in [0, 1).

    NumPy documents both algorithms and guarantees their streams: `SeedSequence` hashes the numbers to a seed of PCG64,
    whose first output is used.

    Args:
        seed: an integer >= 0 of any size.
        epoch, index: ``(B,)``, each in [0, 2^32).
    """
    state = _seed_words([*_words(seed, len(index)), epoch.astype(np.uint32), index.astype(np.uint32)])
    high, low = _pcg64(state)
    mixed, turn = high ^ low, high >> np.uint64(58)
    output = (mixed >> turn) | (mixed << ((np.uint64(64) - turn) & np.uint64(63)))
    return (output >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _words(number: int, count: int) -> list[Words]:
    """Return the 32-bit words of a number, lowest first, each repeated to ``(count,)``."""
    words = []
    while True:
        words.append(np.full(count, number & 0xFFFFFFFF, dtype=np.uint32))
        number >>= 32
        if number == 0:
            return words


class _Hash:
    """SeedSequence's hash of words, whose constant changes with each word."""

    def __init__(self, constant: int, factor: int) -> None:
        self.constant, self.factor = constant, factor

    def __call__(self, value: Words) -> Words:
        value = value ^ np.uint32(self.constant)
        self.constant = self.constant * self.factor & 0xFFFFFFFF
        value = value * np.uint32(self.constant)
        return value ^ (value >> np.uint32(16))


def _seed_words(entropy: list[Words]) -> list[NDArray[np.uint64]]:
    """Return SeedSequence(entropy).generate_state(4, uint64) for each column: four words ``(B,)``."""
    zero = np.zeros_like(entropy[0])
    hashed = _Hash(0x43B0D7E5, 0x931E8875)

    def mix(x: Words, y: Words) -> Words:
        value = np.uint32(0xCA01F9DD) * x - np.uint32(0x4973F715) * y
        return value ^ (value >> np.uint32(16))

    pool = [hashed(entropy[k] if k < len(entropy) else zero) for k in range(4)]
    for source in range(4):
        for target in range(4):
            if source != target:
                pool[target] = mix(pool[target], hashed(pool[source]))
    for word in entropy[4:]:
        for target in range(4):
            pool[target] = mix(pool[target], hashed(word))
    hashed = _Hash(0x8B51F9DD, 0x58F38DED)
    half = [hashed(pool[k % 4]).astype(np.uint64) for k in range(8)]
    return [half[2 * k] | half[2 * k + 1] << np.uint64(32) for k in range(4)]


Wide = tuple[NDArray[np.uint64], NDArray[np.uint64]]
"""Numbers of 128 bits: high and low words."""

_MULTIPLIER = (np.uint64(0x2360ED051FC65DA4), np.uint64(0x4385DF649FCCF645))


def _pcg64(words: list[NDArray[np.uint64]]) -> Wide:
    """Return the state of PCG64, seeded with four words, at its first output."""
    high, low = words[2], words[3]
    one = np.uint64(1)
    increment = (high << one | low >> np.uint64(63), low << one | one)
    # from state 0: a step, adding the seed, a step; then the step that precedes the first output
    state = _added(increment, (words[0], words[1]))
    for _ in range(2):
        state = _added(_times_multiplier(state), increment)
    return state


def _added(a: Wide, b: Wide) -> Wide:
    low = a[1] + b[1]
    return a[0] + b[0] + (low < a[1]).astype(np.uint64), low


def _times_multiplier(a: Wide) -> Wide:
    """Return a times PCG64's multiplier, modulo 2^128."""
    high, low = _MULTIPLIER
    shift, mask = np.uint64(32), np.uint64(0xFFFFFFFF)
    x0, x1, y0, y1 = a[1] & mask, a[1] >> shift, low & mask, low >> shift
    middle = x1 * y0 + (x0 * y0 >> shift)
    cross = x0 * y1 + (middle & mask)
    carried = x1 * y1 + (middle >> shift) + (cross >> shift)
    return carried + a[1] * high + a[0] * low, a[1] * low
