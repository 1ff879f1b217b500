"""Complete words of a command line: config groups, options and values, those that `--help` lists.

Nothing here imports torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from dpm_scales.cli import configs
from dpm_scales.cli.arguments import (
    ALIASES,
    CURVES,
    FLAG_CHOICES,
    NEVER_EMPTY,
    PLAIN_FLAGS,
    SHORT_FLAGS,
    VALUE_FLAGS,
    config_dirs,
    is_multirun,
    tidy,
)
from dpm_scales.cli.help import MISSING, chosen, group_name, typed_options
from dpm_scales.errors import UserError
from dpm_scales.models.instantiate import CONFIGS

FLAGS = sorted({flag for flag in (*PLAIN_FLAGS, *VALUE_FLAGS) if flag.startswith("--")} - {"--shell-completion"})
#: default values that are not worth offering
_NO_VALUE = ("", "null", MISSING)


def candidates(config_name: str, words: Sequence[str], word: str) -> list[str]:
    """Return what `word`, typed after `words`, can become; empty if the shell may offer file names.

    A whole argument ends with a space; `optimizer.` and `process=` are continued. Names are offered level by level.

    Args:
        config_name: the command's config.
        words: arguments before the word. Configs chosen by them determine the options, as in `--help`.
        word: the beginning of an argument, possibly empty.
    """
    flag = SHORT_FLAGS.get(words[-1], words[-1]) if words else ""
    if flag in FLAG_CHOICES:
        return [f"{value} " for value in FLAG_CHOICES[flag] if value.startswith(word)]
    if flag in VALUE_FLAGS:
        return []
    if word.startswith("-"):
        return [f"{name} " for name in FLAGS if name.startswith(word)]
    try:
        argv = tidy(words, ALIASES.get(config_name, {}))
    except UserError:
        argv = []
    sign = word[:1] if word.startswith(("+", "~")) else ""
    key, equals, value = word.removeprefix(sign).partition("=")
    groups = _groups(config_name)
    defaults = _defaults(config_name, argv)
    if not equals:
        return sorted({sign + name for name in _next_level([*groups, *defaults], key)})
    head, comma, last = value.rpartition(",") if is_multirun(argv) else ("", "", value)
    return [
        f"{sign}{key}={head}{comma}{choice} " for choice in _values(config_name, key, argv) if choice.startswith(last)
    ]


def _groups(config_name: str) -> dict[str, str]:
    """Return the config groups of a command by the name under which they are chosen."""
    outer = configs.groups(config_name)
    names = [*configs.all_groups(config_name), *(["experiment"] if "experiment" in outer else [])]
    swept = [f"hydra/{group.name}" for group in (CONFIGS / "hydra").iterdir()] if config_name == "train" else []
    return {group_name(group): group for group in (*names, *sorted(swept))}


def _defaults(config_name: str, argv: Sequence[str]) -> dict[str, str]:
    """Return the options, those of the chosen configs included, with their values as written in the configs."""
    found = [*configs.read_options(CONFIGS / f"{config_name}.yaml")[1]]
    for group, choice in chosen(config_name, argv).items():
        path = configs.config_file(group, choice, config_dirs(argv))
        found += typed_options(config_name, group, path) if path else []
    left_out = {*configs.GIVEN, *configs.groups(config_name)}
    curves = {f"{key}.{name}": text for key, own in CURVES.get(config_name, {}).items() for name, text in own.items()}
    typed = [o for o in found if o.text and o.key not in left_out and not o.key.endswith(configs.CLASS_KEYS)]
    return curves | {o.key: o.text for o in typed}


def _values(config_name: str, key: str, argv: Sequence[str]) -> list[str]:
    """Return the values to offer for a config group or an option."""
    group = _groups(config_name).get(key)
    if group is not None:
        own = [path.stem for place in config_dirs(argv) for path in Path(place, group).glob("*.yaml")]
        return sorted({*configs.choices(group), *own})
    if key in configs.switches(config_name):
        return ["false", "true"]
    default = _defaults(config_name, argv).get(key, "")
    plain = key not in NEVER_EMPTY and default not in _NO_VALUE and not re.search(r"[\s${}\[\]'\"]", default)
    return [default] if plain else []


def _next_level(names: Iterable[str], start: str) -> list[str]:
    """Return the names that begin with `start`, followed by `=`, or cut after the next dot or slash."""
    found = []
    for name in names:
        if name.startswith(start):
            cut = re.search(r"[./]", name[len(start) :])
            found.append(f"{name}=" if cut is None else name[: len(start) + cut.end()])
    return found
