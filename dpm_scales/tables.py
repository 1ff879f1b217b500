"""Format tables: as CSV text whose cells no spreadsheet interprets as formulas, and with short cells."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dpm_scales.errors import printable

#: first characters of formulas (OWASP, "CSV Injection"); the last four are full-width forms
FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20")
LONGEST_CELL = 24  # characters
LONGEST_NUMBER = 7  # characters, before a decimal number is rounded
_DECIMAL = re.compile(r"(?<![\w.])\d+\.\d+(?:[eE][+-]?\d+)?(?![\w.])")


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


def short_numbers(text: str) -> str:
    """Return the text with long decimals rounded to four digits: ``rate=0.0023456789`` becomes ``rate=0.002346``."""

    def short(match: re.Match[str]) -> str:
        number = match.group()
        rounded = f"{float(number):.4g}"
        return number if len(number) <= LONGEST_NUMBER or float(rounded) == float(number) else rounded

    return _DECIMAL.sub(short, text)


def column_head(name: str, names: Sequence[str]) -> str:
    """Return the last part of an option's name, or the whole name if others end with the same part; elided."""
    short = name.rpartition(".")[2]
    return elided(short if [n.rpartition(".")[2] for n in names].count(short) == 1 else name)


def cell(value: Any, longest: int = LONGEST_CELL) -> str:
    """Return a value as short text: numbers with four digits, control characters escaped, a long middle elided."""
    text = f"{value:.4g}" if isinstance(value, float) else short_numbers(str(value))
    return elided(printable(text), longest)


def elided(text: str, longest: int = LONGEST_CELL) -> str:
    """Return the text, with its middle elided if it is longer than `longest` characters."""
    half = longest // 2
    return text if len(text) <= longest else f"{text[: longest - half - 1]}…{text[-half:]}"
