"""Parse arguments of commands without a config: words, KEY=VALUE, and flags. Imports neither Hydra nor torch."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from dpm_scales.errors import UserError, require, require_number, suggest

_KEY = re.compile(r"[a-z]\w*", re.ASCII)


@dataclass(frozen=True)
class Words:
    """The arguments of a command.

    Attributes:
        words: arguments that are neither options nor flags.
        options: values of options by key.
        flags: the flags given.
    """

    words: list[str]
    options: dict[str, str]
    flags: set[str]

    def number(self, key: str, usual: int, least: int = 1) -> int:
        """Return an option as a whole number >= `least`; `usual` if it is not given. Raises UserError for others."""
        text = self.options.get(key)
        if text is None:
            return usual
        require(text.isascii() and text.isdecimal() and len(text) < 19, f"{key} must be a whole number, got {text!r}")
        require_number(key, int(text), least, whole=True)
        return int(text)

    def decimal(self, key: str) -> float | None:
        """Return an option as a number; None if it is not given. Raises UserError for others."""
        text = self.options.get(key)
        if text is None:
            return None
        try:
            number = float(text)
        except ValueError:
            raise UserError(f"{key} must be a number, got {text!r:.100}") from None
        require_number(key, number)
        return number


def split_words(
    argv: Sequence[str], most: int, options: Collection[str] = (), flags: Collection[str] = (), usage: str = ""
) -> Words:
    """Return the arguments by kind.

    An argument with ``=`` is an option, unless a file or folder has its name; folders of runs do.

    Args:
        most: largest number of words.
        options, flags: those that the command has.
        usage: how to call it, for messages.

    Raises: UserError for an unknown option or flag, an empty value, an option given twice, and for too many words.
    """
    found = Words([], {}, set())
    for argument in argv:
        key, equals, value = argument.partition("=")
        if argument.startswith("-"):
            name = key.lstrip("-")
            if name in options:
                raise UserError(f"{argument}: options are KEY=VALUE: {name}={value or 'VALUE'}")
            require(argument in flags, f"unknown flag {argument!r}: {suggest(argument, flags)}")
            found.flags.add(argument)
        elif equals and _KEY.fullmatch(key) and (key in options or not Path(argument).exists()):
            require(key in options, f"unknown option {key!r}: {suggest(key, options)}")
            require(bool(value.strip()), f"{key} is empty; give it a value, or leave it out")
            require(key not in found.options, f"{key} is given twice; give it once")
            found.options[key] = value
        else:
            require(bool(argument.strip()), "an empty argument; name a folder, or leave it out")
            found.words.append(argument)
    require(len(found.words) <= most, f"{' '.join(found.words)!r} are too many arguments: {usage}")
    return found
