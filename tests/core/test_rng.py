"""The noise source: reproducible however samples are batched, independent, uniform and normal."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dpm_scales.rng import CounterRNG, _mix
from support.oracles import close, pretended_gpu, refused

MASK = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15


def mix(x: int) -> int:
    """SplitMix64's finaliser (Steele, Lea & Flood 2014, Fig. 16), in unsigned integers."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def plain_uniform(seed: int, number: int, draw: int, size: int) -> list[float]:
    """Sample `number`'s draw (from 1), value by value: the counter is hashed at each of three levels."""
    key = mix((mix((seed + GOLDEN) & MASK) + (number + 1) * GOLDEN) & MASK)
    stream = mix((key + draw * GOLDEN) & MASK)
    return [(mix((stream + i * GOLDEN) & MASK) >> 11) / 2**53 for i in range(1, size + 1)]


def signed(x: int) -> int:
    return x - 2**64 if x >= 2**63 else x


def test_finaliser_gives_splitmix64s_known_numbers() -> None:
    """Seed 1234567, the test vector of Vigna's reference implementation: state += golden, then the finaliser."""
    known = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    states = [(1234567 + i * GOLDEN) & MASK for i in range(1, 6)]
    assert [mix(state) for state in states] == known
    mixed = _mix(torch.tensor([signed(state) for state in states]))
    assert [value & MASK for value in mixed.tolist()] == known


@given(st.integers(0, MASK))
@settings(deadline=None, max_examples=200)
def test_finaliser_wraps_as_unsigned_integers_do(x: int) -> None:
    assert int(_mix(torch.tensor(signed(x)))) & MASK == mix(x)


@pytest.mark.parametrize("seed", [0, 1, 42, 2**31, 2**63 - 1])
def test_uniform_is_the_plain_computation(seed: int) -> None:
    source = CounterRNG(seed, 3, first=1000)
    for draw, shape in enumerate([(2, 3), (), (1, 4, 2), (5,)], start=1):
        drawn = source.uniform(shape)
        assert drawn.shape == (3, *shape) and drawn.dtype == torch.float64
        expected = [plain_uniform(seed, 1000 + b, draw, math.prod(shape)) for b in range(3)]
        assert drawn.reshape(3, -1).tolist() == expected


def test_normal_is_box_muller_of_two_draws() -> None:
    u, v = (np.array(plain_uniform(9, 4, draw, 12)).reshape(3, 4) for draw in (1, 2))
    expected = np.sqrt(-2 * np.log(1 - u)) * np.cos(2 * math.pi * v)
    close(CounterRNG(9, 1, 4).normal((3, 4), torch.float64)[0].numpy(), expected, 1e-14, 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_normal_is_drawn_in_float64_and_cast(dtype: torch.dtype) -> None:
    drawn = CounterRNG(3, 4).normal((2, 5), dtype)
    assert drawn.dtype == dtype and drawn.shape == (4, 2, 5)
    assert torch.equal(drawn, CounterRNG(3, 4).normal((2, 5), torch.float64).to(dtype))


@pytest.mark.parametrize("batches", [[12], [1] * 12, [5, 7], [3, 1, 8], [11, 1]])
def test_samples_draw_the_same_bits_in_any_batches(batches: list[int]) -> None:
    whole = CounterRNG(7, 12, first=20)
    expected = [whole.normal((2, 3)), whole.uniform(), whole.normal((4,), torch.float64), whole.uniform((2,))]
    parts: list[list[torch.Tensor]] = [[], [], [], []]
    first = 20
    for count in batches:
        source = CounterRNG(7, count, first)
        draws = [source.normal((2, 3)), source.uniform(), source.normal((4,), torch.float64), source.uniform((2,))]
        for part, draw in zip(parts, draws, strict=True):
            part.append(draw)
        first += count
    for part, value in zip(parts, expected, strict=True):
        assert torch.equal(torch.cat(part), value)


def correlations(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest correlation between a row of `a` and a row of `b`, in standard errors."""
    z = np.corrcoef(a.flatten(1).numpy(), b.flatten(1).numpy())[: len(a), len(a) :]
    return float(np.abs(z).max() * math.sqrt(a[0].numel()))


def test_samples_draws_and_seeds_are_independent() -> None:
    """No correlation beyond 5 standard errors among 24 x 24 pairs, nor of the squares; neighbours in every respect."""
    rows, size = 24, (4000,)
    source, other = CounterRNG(11, rows), CounterRNG(12, rows)
    first, second, foreign = source.normal(size), source.normal(size), other.normal(size)
    for a, b in [(first, second), (first, foreign), (second, foreign)]:
        assert correlations(a, b) < 5
        assert correlations(a**2, b**2) < 5
    among = np.corrcoef(first.numpy()) - np.eye(rows)
    assert np.abs(among).max() * math.sqrt(size[0]) < 5
    # within one image: a value and those up to 8 places further
    for lag in range(1, 9):
        assert abs(float((first[:, lag:] * first[:, :-lag]).mean())) * math.sqrt(rows * size[0]) < 5


def test_no_draw_is_met_again() -> None:
    """Neither under another seed, nor another sample, nor a later draw, nor another place: 600 000 different values."""
    values = [CounterRNG(seed, 50, first).uniform((300,)) for seed in range(10) for first in (0, 50)]
    source = CounterRNG(3, 50, 100)
    values += [source.uniform((300,)) for _ in range(20)]
    flat = torch.cat([value.flatten() for value in values])
    assert len(flat) == 600_000 and len(flat.unique()) == len(flat)


def test_a_sample_shares_nothing_with_the_sum_of_seed_and_number() -> None:
    assert not torch.equal(CounterRNG(5, 1, 2).uniform((4,)), CounterRNG(6, 1, 1).uniform((4,)))
    assert not torch.equal(CounterRNG(5, 1, 2).uniform((4,)), CounterRNG(2, 1, 5).uniform((4,)))


@pytest.mark.parametrize("direction", ["within a sample", "across samples", "across draws", "across seeds"])
def test_values_are_uniform_and_normal(direction: str) -> None:
    """Kolmogorov-Smirnov against scipy's laws, 20000 values along each axis."""
    count = 20000
    if direction == "within a sample":
        uniform, normal = CounterRNG(1, 1).uniform((count,)), CounterRNG(2, 1).normal((count,), torch.float64)
    elif direction == "across samples":
        uniform, normal = CounterRNG(1, count).uniform(), CounterRNG(2, count).normal((), torch.float64)
    elif direction == "across draws":
        one, two = CounterRNG(1, 20), CounterRNG(2, 20)
        uniform = torch.cat([one.uniform() for _ in range(1000)])
        normal = torch.cat([two.normal((), torch.float64) for _ in range(1000)])
    else:
        uniform = torch.cat([CounterRNG(seed, 20).uniform() for seed in range(1000)])
        normal = torch.cat([CounterRNG(seed, 20).normal((), torch.float64) for seed in range(1000)])
    assert (uniform >= 0).all() and (uniform < 1).all()
    assert scipy.stats.kstest(uniform.numpy().ravel(), "uniform").pvalue > 1e-3
    assert scipy.stats.kstest(normal.numpy().ravel(), "norm").pvalue > 1e-3


def test_moments_of_the_normal_law() -> None:
    """Mean, variance, skewness and kurtosis of a million values, each within 5 standard errors."""
    values = CounterRNG(123, 100).normal((10000,), torch.float64)
    n = values.numel()
    for power, mean, variance in [(1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)]:
        assert abs(float((values**power).mean()) - mean) < 5 * math.sqrt(variance / n)


def test_every_bit_of_the_mantissa_is_fair() -> None:
    bits = (CounterRNG(5, 1).uniform((20000,)) * 2**53).long()
    for i in range(53):
        assert abs(float(((bits >> i) & 1).double().mean()) - 0.5) < 5 * 0.5 / math.sqrt(20000)


@pytest.mark.parametrize("seed", [-1, 2**63, 1.5, "0", None, True])
def test_seeds_that_are_no_whole_numbers_are_refused(seed: Any) -> None:
    with refused("seed", "whole number", repr(seed)):
        CounterRNG(seed, 1)


@pytest.mark.parametrize("count", [0, -1, 2.5, True])
def test_at_least_one_sample(count: Any) -> None:
    with refused("at least one sample", repr(count)):
        CounterRNG(0, count)


@pytest.mark.parametrize("first", [-1, 0.5, None])
def test_samples_are_numbered_from_zero(first: Any) -> None:
    with refused("numbered from 0", repr(first)):
        CounterRNG(0, 1, first)


def test_noise_is_made_on_the_device() -> None:
    with pretended_gpu():
        source = CounterRNG(3, 4, 10, device="cuda")
        assert source.device.type == "cuda"
        for drawn in (
            source.uniform(),
            source.uniform((2, 3)),
            source.normal((2, 3)),
            source.normal((), torch.float64),
        ):
            assert drawn.device.type == "cuda" and drawn.shape[0] == 4
