"""Format the help of a command: examples, config groups, and every option with its comment in the YAML files.

Nothing here imports torch.
"""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from dpm_scales.cli import configs
from dpm_scales.cli.arguments import ALIASES, config_dirs
from dpm_scales.cli.configs import Option
from dpm_scales.cli.hints import TASK_GROUPS
from dpm_scales.cli.plugins import announced_class, config_folders
from dpm_scales.cli.program import program
from dpm_scales.errors import UserError, suggest
from dpm_scales.models.instantiate import CONFIGS

EXAMPLE, MISSING = "python ", "???"
KEY_WIDTH, MAX_WIDTH = 34, 120
FLAGS = {
    "-m, --multirun": "a sweep: a run for each value of KEY=A,B, for each combination of several",
    "--config-dir DIR": "a folder of your own configs beside these: DIR/process/mine.yaml is process=mine",
    "--cfg job": "print the composed config and do nothing else",
    "--hydra-help": "further flags, of Hydra",
    "-h, --help": "this, with the options of the groups that are chosen beside it",
}


def help_text(config_name: str, argv: Sequence[str]) -> str:
    """Return the help of an entry point, listing the options of the configs chosen in `argv` (see `tidy`)."""
    width = min(shutil.get_terminal_size((100, 24)).columns, MAX_WIDTH)
    head, options = configs.read_options(CONFIGS / f"{config_name}.yaml")
    examples = [line for line in head if line.startswith(EXAMPLE)]
    about = " ".join(line for line in head if not line.startswith(EXAMPLE))
    groups, script = configs.groups(config_name), f"{EXAMPLE}{config_name}.py"
    sections = [
        f"usage: {program(config_name)} [GROUP=NAME ...] [KEY=VALUE ...]",
        "\n".join(textwrap.wrap(about, width)),
        "\n".join(["examples:", *(f"  {line.replace(script, program(config_name), 1)}" for line in examples)]),
        "\n".join(["groups, GROUP=NAME:", *_groups(config_name, width)]),
        "\n".join(["options, KEY=VALUE:", *_lines([o for o in options if o.key not in groups], width)]),
    ]
    for group, choice in chosen(config_name, argv).items():
        path = configs.config_file(group, choice, _places(argv))
        target = announced_class(group, choice)
        if path is None and target is not None:
            sections.append(
                f"{group_name(group)}={choice}: {target} of a plugin; its options are the constructor's arguments"
            )
            continue
        if path is None:
            raise UserError(f"unknown {group_name(group)} {choice!r}: {suggest(choice, configs.choices(group))}")
        lines = _lines(typed_options(config_name, group, path), width)
        about = " ".join(configs.read_options(path)[0])
        sections += ["\n".join([*textwrap.wrap(f"{group_name(group)}={choice}: {about}", width), *lines])]
    sweeps = config_name == "train"
    flags = [line for flag, text in FLAGS.items() if sweeps or "-m" not in flag for line in _row(flag, text, width)]
    return "\n\n".join([*sections, "\n".join(["flags:", *flags])])


def _places(argv: Sequence[str]) -> list[str]:
    """Return the folders of the user's configs and of the active plugins'."""
    return [*config_dirs(argv), *map(str, config_folders())]


def typed_options(config_name: str, group: str, path: Path) -> list[Option]:
    """Return the options of a chosen config, with the names under which they are typed."""
    names = {key: alias for alias, key in ALIASES.get(config_name, {}).items()}
    own = [replace(o, key=names.get(o.key, o.key)) for o in configs.chosen_options(group, path).values()]
    return [option for option in own if option.key != "task"]


def group_name(group: str) -> str:
    """Return the name under which a config group is chosen."""
    return "task" if group in TASK_GROUPS else group


def _groups(config_name: str, width: int) -> Iterator[str]:
    """Yield the lines that list each group with its choices, `data: array, bsds500, ...`."""
    outer = configs.groups(config_name)
    names = [*configs.all_groups(config_name), *(["experiment"] if "experiment" in outer else [])]
    for group in names:
        text = f"{group_name(group)}: {', '.join(configs.choices(group))}"
        yield from textwrap.wrap(text, width, initial_indent="  ", subsequent_indent="      ")


def chosen(config_name: str, argv: Sequence[str]) -> dict[str, str]:
    """Return the choice in each group: from the command line, the chosen experiment, or the defaults."""
    typed = dict(a.lstrip("+").split("=", 1) for a in argv if "=" in a and not a.startswith(("-", "~")))
    found = {group: choice for group, choice in configs.groups(config_name).items()}
    experiment = configs.config_file("experiment", typed.get("experiment", ""), _places(argv))
    for group, choice in configs.defaults(experiment) if experiment else ():
        found[group.removeprefix("override ").lstrip("/")] = choice
    chosen: dict[str, str] = {}
    for group in [*found]:
        choice = typed.get(group, found[group])
        if choice is None or group.startswith("override"):
            continue
        chosen[group] = choice
        path = configs.config_file(group, choice, _places(argv))
        for inner, name in configs.defaults(path) if path else ():
            if inner and name is not None and not inner.startswith("override"):
                chosen[f"{group}/{inner}"] = typed.get(f"{group}/{inner}", name)
    return chosen


def _lines(options: Iterable[Option], width: int) -> Iterator[str]:
    for option in options:
        yield from (f"  # {line}" for line in option.above)
        if option.key.endswith(configs.CLASS_KEYS) or option.key in configs.GIVEN:
            continue
        if option.text or option.comment:
            given = f"{option.key}={option.text}" if option.text else f"{option.key}:"
            if option.text == MISSING:
                yield from _row(f"{option.key}=", f"needed: {option.comment}".rstrip(": "), width)
            else:
                yield from _row(given, option.comment, width)


def _row(left: str, text: str, width: int) -> Iterator[str]:
    """Yield the lines of a two-column row; the right column starts on the next line if the left is too wide."""
    lines = textwrap.wrap(text, max(width - KEY_WIDTH - 4, 30)) or [""]
    if len(left) > KEY_WIDTH - 2 and lines[0]:
        yield f"  {left}"
    else:
        yield f"  {left:{KEY_WIDTH}}{lines.pop(0)}".rstrip()
    yield from (f"  {'':{KEY_WIDTH}}{line}" for line in lines)
