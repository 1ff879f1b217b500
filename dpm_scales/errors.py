"""The one exception that means "the user can mend this".

Constructors and readers raise it with a single line: what was seen, what is allowed, what to do. Entry points print
that line and exit with status 2; everything else is a defect and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Bad input whose message is one line fit for a person."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


def suggest(name: str, allowed: Iterable[str]) -> str:
    """``"did you mean 'x'? allowed: a, b, x"`` for an unknown `name`."""
    names = sorted(allowed)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}allowed: {', '.join(names)}"


def require(condition: bool, message: str) -> None:
    """Raise `UserError(message)` unless `condition` holds."""
    if not condition:
        raise UserError(message)
