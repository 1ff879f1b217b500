"""Write tables as CSV text without cells that a spreadsheet would interpret as formulas."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

#: first characters of formulas (OWASP, "CSV Injection"); the last four are full-width forms
FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20")


def csv_text(columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> str:
    """Return a table as CSV text with a header and lines ending in a line feed; missing cells are empty.

    A name or value that a spreadsheet would interpret as a formula is prefixed with an apostrophe. Numbers are kept.

    Raises: ValueError if a row has a key that is not a column.
    """
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, columns, restval="", lineterminator="\n")
    writer.writerow({name: _shown(name) for name in columns})
    writer.writerows({name: _shown(value) for name, value in row.items()} for row in rows)
    return buffer.getvalue()


def _shown(value: Any) -> Any:
    """Return the value of a cell, escaped if a spreadsheet would interpret it as a formula."""
    if not isinstance(value, str) or not value.startswith(FORMULA):
        return value
    try:
        float(value)
    except ValueError:
        return f"'{value}"
    return value
