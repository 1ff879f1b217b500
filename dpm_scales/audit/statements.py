"""The decorator of all checks, which adds the paper's statement to the measurement."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

from dpm_scales.audit.findings import Finding, Verdict
from dpm_scales.audit.lab import Lab


@dataclass(frozen=True)
class Measured:
    """Result of a measurement: `fits` is whether it is within the tolerances, all else is as in `Finding`.

    The verdict applies if the measurement fits. `drawn` is a value and its standard error. A non-empty `figure`
    replaces the statement's.
    """

    verdict: Verdict
    fits: bool
    measured: float
    tolerance: float = 0.0
    expected: float = 0.0
    figure: str = ""
    drawn: tuple[float, float | None] | None = None
    corrected: str = ""
    scale: float | None = None
    eigenvalue: float | None = None
    note: str = ""


Text = str | Callable[[Lab], str]
"""A text, or a function that chooses it for a process."""

Measure = Callable[[Lab], Measured | str]
"""A measurement for one process, or the reason why the statement does not apply to it."""

Check = Callable[[Lab], Finding]


def statement(
    name: str, source: Text, printed: Text, figure: str = "", direction: str = "forward", without_noise: str = ""
) -> Callable[[Measure], Check]:
    """Return a decorator that turns a measurement into the check of a statement.

    Args:
        name, source, printed, figure, direction: as in `Finding`.
        without_noise: why the statement does not apply to processes without noise; empty if it does.

    A measurement that is NaN, as for laws with infinite or negative variance, violates the statement.
    """

    def decorate(measure: Measure) -> Check:
        @functools.wraps(measure)
        def check(lab: Lab) -> Finding:
            place, text = (part if isinstance(part, str) else part(lab) for part in (source, printed))
            found = without_noise if without_noise and not lab.noisy else measure(lab)
            if isinstance(found, str):
                return Finding(name, place, direction, text, Verdict.NOT_APPLICABLE, note=found)
            values = {key: value for key, value in vars(found).items() if key not in ("fits", "drawn")}
            values["drawn"], values["std_error"] = found.drawn or (None, None)
            values["figure"] = found.figure or figure
            if not found.fits:
                values["verdict"] = Verdict.VIOLATED
            if math.isnan(found.measured) and found.verdict is not Verdict.NOT_APPLICABLE:
                values |= {"verdict": Verdict.VIOLATED, "corrected": "", "note": "the laws are not finite"}
            return Finding(name, place, direction, text, **values)

        return check

    return decorate


def by_blur(without: str, blurring: str) -> Callable[[Lab], str]:
    """Return a function that chooses the text for processes without or with blur."""
    return lambda lab: blurring if lab.blurs else without
