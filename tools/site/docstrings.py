"""A griffe extension: docstrings in the form that mkdocstrings renders, with formulas as TeX.

The text of a docstring goes through `formulas.markdown`. In the sections of arguments and attributes only descriptions
do, "a, b: text" becomes an entry each, and "Raises: UserError for ..." on one line a sentence with a bold beginning.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import griffe

from tools.site.formulas import markdown, prose

_SECTION = re.compile(r"(Args|Attributes|Raises|Returns|Yields):\s*$")
_ONE_LINE = re.compile(r"(Raises|Returns|Yields): (?=\S)")
_ENTRY = re.compile(r"    (\w+(?:, \w+)*): ?(.*)$")


def _lines(text: str) -> Iterator[str]:
    free: list[str] = []
    section = False
    for line in text.splitlines():
        if _SECTION.match(line):
            yield markdown("\n".join(free))
            free, section = [], True
            yield line
        elif section and (line.startswith("    ") or not line.strip()):
            entry = _ENTRY.match(line)
            if entry:
                for name in entry[1].split(", "):
                    yield f"    {name}: {prose(entry[2])}"
            else:
                yield prose(line)
        else:
            section = False
            free.append(_ONE_LINE.sub(r"**\1:** ", line))
    yield markdown("\n".join(free))


def rewritten(text: str) -> str:
    """Return a docstring with formulas as TeX, in Google's style."""
    return "\n".join(_lines(text))


class Formulas(griffe.Extension):
    """Rewrite every docstring once it is loaded."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = rewritten(obj.docstring.value)
