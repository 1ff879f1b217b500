"""The precisions in which a network can be computed; processes and samplers keep theirs."""

from __future__ import annotations

from dpm_scales.errors import require, suggest

PRECISIONS = {"32": "32-true", "32-true": "32-true", "bf16": "bf16-mixed", "bf16-mixed": "bf16-mixed"}
"""Accepted names, mapped to Lightning's. Half precision overflows; a process computes its curves in 64 bits anyway."""
FULL, BFLOAT16 = "32-true", "bf16-mixed"


def precision_name(key: str, value: object) -> str:
    """Return a precision by Lightning's name.

    Args:
        key: the option, for messages.

    Raises: UserError for an unknown precision, and for one that overflows.
    """
    name = str(value)
    require(not name.startswith("16"), f"{key}={name} overflows; use {BFLOAT16} or {FULL}")
    require(name in PRECISIONS, f"unknown {key} {name!r}: {suggest(name, PRECISIONS)}")
    return PRECISIONS[name]
