"""Findings of an audit."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Verdict(StrEnum):
    """Result of checking a statement."""

    EXACTLY = "exactly"
    IN_LAW = "in law"
    IN_EXPECTATION = "in expectation"
    CORRECTED = "corrected"  # only the corrected statement holds
    VIOLATED = "violated"
    NOT_APPLICABLE = "not applicable"


@dataclass(frozen=True)
class Finding:
    """Result for one statement of the paper and one process.

    Attributes:
        name: name of the property.
        source: place in the paper.
        direction: "forward" or "reverse".
        printed: the statement as printed.
        verdict: result of the check.
        figure: description of the measured quantity.
        measured, expected: its value, and the value to compare with; NaN if there is nothing to measure.
        tolerance: allowed difference of the two, or allowed excess of the first over the second.
        drawn, std_error: the value from random paths, and its standard error; None if not drawn.
        corrected: the correct statement, if the printed one is wrong.
        scale, eigenvalue: location of the largest error.
        note: further remarks.
    """

    name: str
    source: str
    direction: str
    printed: str
    verdict: Verdict
    figure: str = ""
    measured: float = float("nan")
    expected: float = float("nan")
    tolerance: float = 0.0
    drawn: float | None = None
    std_error: float | None = None
    corrected: str = ""
    scale: float | None = None
    eigenvalue: float | None = None
    note: str = ""
