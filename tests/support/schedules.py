"""Schedules bound to a number of scales, and messages of refused ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dpm_scales.errors import UserError
from dpm_scales.schedules import Schedule

K = 5
"""Number of scales."""


def bound(schedule: Schedule, num_scales: int = K) -> Any:
    """Return the schedule, bound."""
    schedule.bind(num_scales)
    return schedule


def knots(num_scales: int) -> Tensor:
    """Return t of k = 0 .. num_scales."""
    return torch.arange(num_scales + 1, dtype=torch.float64) / num_scales


def one_line(make: Callable[[], Any]) -> str:
    """Return the message of the UserError that `make` raises."""
    with pytest.raises(UserError) as caught:
        make()
    message = str(caught.value)
    assert "\n" not in message and len(message) < 300
    return message
