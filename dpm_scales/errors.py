"""The one exception that means "the user can mend this".

Constructors and readers raise it with a single line: what was seen, what is allowed, what to do. Entry points print
that line and exit with its status, 2; everything else is a defect and keeps its traceback.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable

MOST = 2**63 - 1


class UserError(ValueError):
    """Bad input whose message is one line fit for a person.

    Attributes:
        status: that an entry point ends with.
    """

    status = 2

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


class OutOfMemoryError(UserError):
    """Asked for more than the machine has; another machine might do it."""

    status = 1


def suggest(name: str, allowed: Iterable[str]) -> str:
    """``"did you mean 'x'? allowed: a, b, x"`` for an unknown `name`."""
    names = sorted(allowed)
    lower = {known.lower(): known for known in names}
    close = difflib.get_close_matches(name.lower(), lower, n=1, cutoff=0.5)
    hint = f"did you mean {lower[close[0]]!r}? " if close else ""
    return f"{hint}allowed: {', '.join(names)}"


def require(condition: bool, message: str) -> None:
    """Raise `UserError(message)` unless `condition` holds."""
    if not condition:
        raise UserError(message)


def is_whole(value: object, low: float = -math.inf) -> bool:
    """Whether `value` is an integer (a truth value is none) of at least `low`."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= low


def require_number(
    name: str, value: object, low: float = -math.inf, high: float = math.inf, whole: bool = False
) -> None:
    """Raise UserError unless `value` is a number (a whole one if asked for) with `low` <= value <= `high`.

    Infinite ones are refused, and those beyond 64 bits.
    """
    fits = is_whole(value) or (not whole and isinstance(value, float) and math.isfinite(value))
    limit = min(high, MOST) if is_whole(value) and value > MOST else high  # type: ignore[operator]
    if fits and low <= value <= limit:  # type: ignore[operator]
        return
    kind = "a whole number" if whole else "a number" if math.isfinite(high) else "a finite number"
    bounds = [f" {sign} {bound:g}" for sign, bound in ((">=", low), ("<=", limit)) if math.isfinite(bound)]
    raise UserError(f"{name} must be {kind}{' and'.join(bounds)}, got {value!r:.100}")
