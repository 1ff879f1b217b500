"""The exception for the user's mistakes, and checks of arguments that raise it.

Constructors and readers raise it with a single line: what was seen, what is allowed, what to do. Entry points print
that line and exit with its status, 2; any other exception is a bug and keeps its traceback.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from numbers import Real

MOST = 2**63 - 1


class UserError(ValueError):
    """Bad input, described by a one-line message for the user.

    Attributes:
        status: exit status of an entry point.
    """

    status = 2

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


class OutOfMemoryError(UserError):
    """The machine lacks the memory; another one may have it."""

    status = 1


def printable(text: str) -> str:
    """Return `text` with escapes, ``\\x1b``, for characters that would control a terminal or reorder a line."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def nearest(name: str, names: Iterable[str], sure: bool = False) -> str | None:
    """Return the one of `names` that `name` most likely misspells or abbreviates; None if none is similar.

    Options with a common parent, `optimizer.…`, are compared by the rest of their names.

    Args:
        sure: whether to accept only close matches.
    """
    known = sorted(names)
    parent = name.rpartition(".")[0]
    if parent and all(other.startswith(f"{parent}.") for other in known):
        found = nearest(name[len(parent) + 1 :], [other[len(parent) + 1 :] for other in known], sure)
        return None if found is None else f"{parent}.{found}"
    lower = {other.lower(): other for other in known}
    meant = name.lower()
    words = meant.split("_")
    ways = [
        difflib.get_close_matches(meant, lower, n=1, cutoff=0.8),
        [other for other in lower if is_initials(meant, other)],
    ]
    if not sure:
        ways += [
            [other for other in lower if _shortens(words, other.split("_"))],
            difflib.get_close_matches(meant, lower, n=1, cutoff=0.5),
        ]
    return next((lower[found[0]] for found in ways if found), None)


def is_initials(name: str, other: str) -> bool:
    """Return whether `name` consists of the initials of the words in `other`: lr, learning_rate."""
    words = other.split("_")
    return len(words) > 1 and name == "".join(word[:1] for word in words)


def _shortens(words: list[str], others: list[str]) -> bool:
    """Return whether each of `words`, of at least three letters, is a prefix of one of `others`, in order."""
    rest = iter(others)
    return all(len(word) > 2 and any(other.startswith(word) for other in rest) for word in words)


def suggest(name: str, allowed: Iterable[str], misspelt: bool = True) -> str:
    """Return ``"did you mean 'x'? allowed: a, b, x"`` for an unknown `name`; no guess if it can't be `misspelt`."""
    names = sorted(allowed)
    close = nearest(name, names) if misspelt else None
    hint = f"did you mean {close!r}? " if close is not None else ""
    return f"{hint}allowed: {', '.join(names) or 'none'}"


def require(condition: bool, message: str) -> None:
    """Raise `UserError(message)` unless `condition` holds."""
    if not condition:
        raise UserError(message)


def require_choice(name: str, value: object, allowed: Iterable[str], owner: str = "") -> None:
    """Raise UserError, with the nearest of `allowed`, unless `value` is one of them.

    Args:
        name: name of the option.
        owner: class or task that has the option, if the message should name it.
    """
    names = tuple(allowed)
    if value not in names:
        prefix = f"{owner}: " if owner else ""
        raise UserError(f"{prefix}unknown {name} {value!r}: {suggest(str(value), names)}")


def is_whole(value: object, low: float = -math.inf) -> bool:
    """Return whether `value` is an integer (not a bool) of at least `low`."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= low


def require_number(
    name: str, value: object, low: float = -math.inf, high: float = math.inf, whole: bool = False
) -> None:
    """Raise UserError unless `value` is a number (with `whole`, a whole one) with `low` <= value <= `high`.

    Infinite numbers and integers beyond 64 bits are refused.
    """
    fits = is_whole(value) or (not whole and isinstance(value, float) and math.isfinite(value))
    limit = min(high, MOST) if is_whole(value) and value > MOST else high  # type: ignore[operator]
    if fits and low <= value <= limit:  # type: ignore[operator]
        return
    kind = "a whole number" if whole else "a number" if math.isfinite(high) else "a finite number"
    bounds = [f" {sign} {bound:g}" for sign, bound in ((">=", low), ("<=", limit)) if math.isfinite(bound)]
    raise UserError(f"{name} must be {kind}{' and'.join(bounds)}, got {value!r:.100}")


def is_number(value: object) -> bool:
    """Return whether `value` is a finite real number of Python or NumPy; booleans are not numbers here."""
    try:
        return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer beyond the largest float
        return False


def require_positive(owner: object, **values: float) -> None:
    """Raise UserError, naming owner and argument, unless every value is a positive finite number."""
    for name, value in values.items():
        ok = is_number(value) and value > 0
        require(ok, f"{type(owner).__name__}: {name} must be a positive number, got {value!r}")


def require_finite(owner: object, **values: float) -> None:
    """Raise UserError, naming owner and argument, unless every value is a finite number."""
    for name, value in values.items():
        require(is_number(value), f"{type(owner).__name__}: {name} must be a number, got {value!r}")
