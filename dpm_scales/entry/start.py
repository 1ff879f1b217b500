"""Start a command: the function of the console script `dpm-scales`, of `python -m dpm_scales`, and of the scripts.

Without a command, or with `--help` or `--version`, neither torch nor Hydra is imported.
"""

from __future__ import annotations

import importlib
import sys

from dpm_scales import __version__
from dpm_scales.cli.output import reported
from dpm_scales.entry.commands import COMMANDS
from dpm_scales.errors import require, suggest

HELP_FLAGS, VERSION_FLAGS = ("-h", "--help"), ("-V", "--version")
COMPLETION_FLAGS = ("-sc", "--shell-completion")


def start(name: str, form: str) -> None:
    """Run the command `name` with the arguments in `sys.argv[1:]`.

    Args:
        form: how the command was typed, a key of `program.FORMS`.
    """
    from dpm_scales.cli.program import SCRIPT, remember_form

    flag, *action = sys.argv[1:] or [""]
    # Hydra installs the completion of `python SCRIPT`
    if flag in COMPLETION_FLAGS and (form != SCRIPT or "".join(action).startswith("query=")):
        _complete(action)
        return
    remember_form(form)
    importlib.import_module(COMMANDS[name].module).main()


def console() -> None:
    """Run `dpm-scales COMMAND ARGUMENTS`."""
    dispatch("console")


def dispatch(form: str) -> None:
    """Run the command that the first argument names, or print the list of commands, or the version.

    An unknown command ends with one line and status 2.
    """
    word, *rest = sys.argv[1:] or HELP_FLAGS[:1]
    with reported():
        if word in HELP_FLAGS:
            print(overview())
            return
        if word in VERSION_FLAGS:
            print(f"dpm-scales {__version__}")
            return
        if word in COMPLETION_FLAGS:
            _complete(rest)
            return
        _require_command(word)
    sys.argv[1:] = rest
    start(word, form)


def overview() -> str:
    """Return the help: the commands, each with what it does."""
    width = max(map(len, COMMANDS)) + 2
    rows = [f"  {name:{width}}{command.about}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: dpm-scales COMMAND [GROUP=NAME ...] [KEY=VALUE ...]",
            "",
            "Train, sample and study generative image models whose forward process is a scale-space.",
            "",
            "commands:",
            *rows,
            "",
            "dpm-scales COMMAND --help lists the options of a command; dpm-scales --version prints the version.",
        ]
    )


def _complete(action: list[str]) -> None:
    """Print what a shell needs to complete command lines."""
    from dpm_scales.entry.completion import complete

    with reported():
        require(len(action) == 1, "-sc needs install=SHELL, uninstall=SHELL or query=SHELL; for example install=bash")
        text = complete(action[0])
        if text:
            print(text)


def _require_command(word: str) -> None:
    """Raise UserError unless `word` is a command."""
    first = f"{word!r} where a command belongs: dpm-scales COMMAND {word}"
    require("=" not in word and not word.startswith("-"), f"{first}; commands: {', '.join(COMMANDS)}")
    require(word in COMMANDS, f"unknown command {word!r}: {suggest(word, COMMANDS)}")
