"""Compare the checkpoints of two runs up to a tolerance."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from support.shell import assert_equal

STATES = (
    "state_dict",
    "current_model_state",
    "averaging_state",
    "power_averages",
    "optimizer_states",
    "lr_schedulers",
    "bad_steps",
)


def assert_close(ours: dict[str, Any], theirs: dict[str, Any], tolerance: float) -> None:
    """Assert that two checkpoints agree: their tensors by relative error in the norm, the rest to the last bit."""
    names = [name for name in STATES if name in ours]
    assert names == [name for name in STATES if name in theirs]
    for name in names:
        pairs = list(leaves(ours[name], theirs[name]))
        assert pairs, name
        for a, b in pairs:
            assert type(a) is type(b) and (not isinstance(a, Tensor) or a.shape == b.shape and a.dtype == b.dtype)
            if isinstance(a, Tensor) and a.is_floating_point():
                assert float((a - b).norm()) <= tolerance * float(b.norm()), name
            else:
                assert_equal(a, b, name)


def leaves(a: Any, b: Any) -> list[tuple[Any, Any]]:
    """Return pairs of values at the same places of two containers of one structure."""
    if isinstance(a, dict):
        assert list(a) == list(b)
        return [pair for key in a for pair in leaves(a[key], b[key])]
    if isinstance(a, list):
        assert len(a) == len(b)
        return [pair for x, y in zip(a, b, strict=True) for pair in leaves(x, y)]
    return [(a, b)]
