"""Schedules from lists of numbers, and arguments that are refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dpm_scales.schedules import (
    BlurSchedule,
    ConstantBeta,
    ConstantNoise,
    CosineLogSNR,
    EDMNoise,
    GeometricNoise,
    LinearBeta,
    LinearTimeBlur,
    ListedBeta,
    ListedBlurSigmas,
    ListedDissipationTimes,
    ListedNoise,
    LogBlur,
    Schedule,
    SigmoidSignal,
    SinSquaredBlur,
)
from support.schedules import bound, knots, one_line


def _additive(schedule: Schedule, t: Tensor) -> Tensor:
    """The quantity that adds up along the chain."""
    value = schedule(t)
    if isinstance(schedule, BlurSchedule):
        return value
    return value[0] if isinstance(schedule, ListedBeta) else (2 * value[1]).exp()


def test_scales_of_a_constant_chain_may_stand_for_many_steps() -> None:
    """The chain step by step, seen at some of them."""
    steps = [1, 4, 5, 20]
    whole = bound(ConstantBeta(0.3), 20)(torch.tensor([k / 20 for k in steps], dtype=torch.float64))
    some = bound(ConstantBeta(0.3, steps), 4)(torch.tensor([0.25, 0.5, 0.75, 1.0], dtype=torch.float64))
    for a, b in zip(whole, some, strict=True):
        np.testing.assert_allclose(a.numpy(), b.numpy(), atol=1e-13)
    assert "ascending" in one_line(lambda: ConstantBeta(0.3, [4, 1]))
    assert "num_scales" in one_line(lambda: bound(ConstantBeta(0.3, steps), 5))


LISTS: list[Callable[[list[float]], Schedule]] = [ListedBeta, ListedNoise, ListedBlurSigmas, ListedDissipationTimes]


@settings(deadline=None, max_examples=25)
@given(
    make=st.sampled_from(LISTS),
    values=st.lists(st.floats(0.01, 0.95), min_size=1, max_size=6),
    k=st.integers(0, 5),
    part=st.floats(0, 1),
)
def test_lists_hit_their_knots_and_are_linear_between_them(
    make: Callable[[list[float]], Schedule], values: list[float], k: int, part: float
) -> None:
    values, k = sorted(values), k % len(values)
    schedule = bound(make(values), len(values))
    if make is ListedBeta:
        table = np.cumsum([0.0, *(0.5 * math.log(1 - b * b) for b in values)])
    else:
        table = np.array([0.0, *({ListedNoise: lambda v: v * v, ListedBlurSigmas: lambda v: v * v / 2}.get(
            make, lambda v: v)(value) for value in values)])  # fmt: skip
    np.testing.assert_allclose(_additive(schedule, knots(len(values))).numpy(), table, rtol=1e-12, atol=1e-15)
    t = torch.tensor((k + part) / len(values), dtype=torch.float64)
    expected = (1 - part) * table[k] + part * table[k + 1]
    assert float(_additive(schedule, t)) == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(
    ("schedule", "name"),
    [
        (ListedBeta([0.1, 0.2]), "betas"),
        (ListedNoise([0.1, 0.2]), "noise_scales"),
        (ListedBlurSigmas([0.1, 0.2]), "blur_sigmas"),
        (ListedDissipationTimes([0.1, 0.2]), "dissipation_times"),
    ],
)
@pytest.mark.parametrize("num_scales", [1, 3])
def test_a_list_of_another_length_names_num_scales(schedule: Schedule, name: str, num_scales: int) -> None:
    message = one_line(lambda: schedule.bind(num_scales))
    for words in (type(schedule).__name__, name, "2 entries", f"num_scales is {num_scales}", "num_scales=2"):
        assert words in message


@pytest.mark.parametrize("make", LISTS)
@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([], "empty"),
        ("0.1, 0.2", "must be a list of numbers"),
        (0.1, "must be a list of numbers"),
        (None, "must be a list of numbers"),
        ([0.1, -0.2], "entry 2 is -0.2"),
        ([0.1, math.nan], "entry 2 is nan"),
        ([math.inf], "entry 1 is inf"),
        ([0.1, "0.2"], "entry 2 is '0.2'"),
        ([None], "entry 1 is None"),
    ],
)
def test_what_is_not_a_list_of_numbers_is_refused(make: Callable[[Any], Schedule], values: Any, words: str) -> None:
    message = one_line(lambda: make(values))
    assert words in message and getattr(make, "__name__", "") in message


@pytest.mark.parametrize("make", LISTS)
def test_lists_may_be_tuples_or_arrays(make: Callable[[Any], Schedule]) -> None:
    values = [0.1, 0.25, 0.5]
    expected = _additive(bound(make(values), 3), knots(3))
    assert torch.equal(_additive(bound(make(tuple(values)), 3), knots(3)), expected)
    assert torch.equal(_additive(bound(make(np.array(values)), 3), knots(3)), expected)  # type: ignore[arg-type]


@pytest.mark.parametrize("make", [ListedBlurSigmas, ListedDissipationTimes])
def test_blur_that_sharpens_names_the_scale(make: Callable[[list[float]], Schedule]) -> None:
    message = one_line(lambda: make([1.0, 3.0, 2.0, 4.0]).bind(4))
    for words in ("scale k=3", "2 follows 3", "increasing order"):
        assert words in message


@pytest.mark.parametrize("beta", [1.0, 1.5])
def test_beta_of_one_or_more_is_refused(beta: float) -> None:
    message = one_line(lambda: ListedBeta([0.1, beta]))
    assert "scale k=2" in message and "[0, 1)" in message and f"{beta:g}" in message
    assert "[0, 1)" in one_line(lambda: ConstantBeta(beta))
    assert "[0, 1)" in one_line(lambda: LinearBeta(0.1, beta))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ConstantNoise(-0.1), ["ConstantNoise", "noise_std", "positive", "-0.1"]),
        (lambda: ConstantNoise(0), ["noise_std", "positive"]),
        (lambda: ConstantNoise(math.nan), ["noise_std", "nan"]),
        (lambda: ConstantNoise("0.1"), ["noise_std", "'0.1'"]),
        (lambda: ConstantBeta(-0.1), ["ConstantBeta", "beta", "-0.1"]),
        (lambda: LinearBeta(0.02, 1e-4), ["ddpm_beta_min=0.02", "ddpm_beta_max=0.0001", "swap"]),
        (lambda: LinearBeta(0, 0.02), ["ddpm_beta_min", "positive"]),
        (lambda: GeometricNoise(80, 0.002), ["noise_min=80", "noise_max=0.002"]),
        (lambda: EDMNoise(0.002, -80), ["EDMNoise", "noise_max", "-80"]),
        (lambda: EDMNoise(rho=0), ["rho", "positive"]),
        (lambda: LogBlur(24, 0.5), ["LogBlur", "blur_sigma_min=24", "blur_sigma_max=0.5"]),
        (lambda: LogBlur(0, 0.5), ["blur_sigma_min", "positive"]),
        (lambda: SinSquaredBlur(-1), ["SinSquaredBlur", "blur_sigma_max", "-1"]),
        (lambda: LinearTimeBlur(0), ["dissipation_time_max", "positive"]),
        (lambda: CosineLogSNR(10, -10), ["logsnr_min=10", "logsnr_max=-10"]),
        (lambda: CosineLogSNR(shift=0), ["shift", "positive"]),
        (lambda: SigmoidSignal(3, -3), ["start=3", "end=-3"]),
        (lambda: SigmoidSignal(tau=-1), ["tau", "positive"]),
        (lambda: SigmoidSignal(minimum=0.7), ["minimum", "0.5", "0.7"]),
    ],
)
def test_bad_arguments_name_class_argument_and_value(make: Callable[[], Schedule], words: list[str]) -> None:
    message = one_line(make)
    assert all(word in message for word in words), message
