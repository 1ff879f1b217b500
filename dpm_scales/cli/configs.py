"""Read the YAML files in configs/ as written: options, values and comments, without composing them.

Nothing here imports torch.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from yaml.constructor import SafeConstructor

from dpm_scales.models.instantiate import CONFIGS

GLOBAL = "# @package _global_"
#: options set from the training data, not by the user
GIVEN = ("network.in_channels", "network.out_channels", "network.num_classes")

#: keys by which a config names its class; no options of a command line
CLASS_KEYS = ("_target_", "_partial_")

#: switches by entry point that are null unless given, and that no class annotates
LEFT_TO_THE_MACHINE = {"train": ("compile",)}


@dataclass(frozen=True)
class Option:
    """A line of a config.

    Attributes:
        key: full dotted key.
        text: the value as written; empty for a section.
        value: the parsed value; None for a section.
        comment: the comment on the same line.
        above: comments on the lines above.
    """

    key: str
    text: str
    value: Any
    comment: str
    above: tuple[str, ...] = ()


def _comment(line: str) -> str:
    return line.partition("#")[2].strip()


def _options(node: yaml.MappingNode, prefix: str, lines: list[str], header: int) -> Iterator[Option]:
    for key_node, value_node in node.value:
        key, start, end = f"{prefix}{key_node.value}", key_node.start_mark.line, value_node.end_mark
        if key_node.value in ("defaults", "hydra"):
            continue
        above: list[str] = []
        for line in reversed(lines[header:start]):
            if not line.strip().startswith("#"):
                break
            above.insert(0, _comment(line))
        block = isinstance(value_node, yaml.MappingNode) and not value_node.flow_style
        if block:
            yield Option(key, "", None, _comment(lines[start]), tuple(above))
            yield from _options(value_node, f"{key}.", lines, header)
            continue
        first, last = value_node.start_mark, value_node.end_mark
        text = "".join(value_node.start_mark.buffer[first.pointer : last.pointer].split("\n")).strip()
        tail = lines[end.line][end.column :] if end.line < len(lines) else ""
        yield Option(key, text, SafeConstructor().construct_document(value_node), _comment(tail), tuple(above))


@functools.cache
def read_options(path: Path, package: str = "") -> tuple[tuple[str, ...], tuple[Option, ...]]:
    """Return the comments at the head of a config, and its options in order.

    Args:
        package: key under which the options are placed.
    """
    text = path.read_text()
    lines = text.splitlines()
    header = next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))
    head = tuple(_comment(line) for line in lines[:header] if line != GLOBAL)
    root = yaml.compose(text)
    prefix = "" if GLOBAL in lines or not package else f"{package}."
    return head, tuple(_options(root, prefix, lines, header)) if isinstance(root, yaml.MappingNode) else ()


@functools.cache
def defaults(path: Path) -> tuple[tuple[str, str | None], ...]:
    """Return (group, choice) for each entry of a config's defaults list; the group is "" for the config's own group."""
    listed = (yaml.safe_load(path.read_text()) or {}).get("defaults", [])
    entries = [entry if isinstance(entry, dict) else {"": entry} for entry in listed if entry != "_self_"]
    return tuple((str(group), choice) for entry in entries for group, choice in entry.items())


def groups(config_name: str) -> dict[str, str | None]:
    """Return the config groups of an entry point, in order, with the default choice of each."""
    listed = defaults(CONFIGS / f"{config_name}.yaml")
    return {group: choice for group, choice in listed if not group.startswith("override")}


def choices(group: str) -> list[str]:
    """Return the names of the configs in a group."""
    return sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))


def package(group: str) -> str:
    """Return the key under which the configs of a group are placed, unless they declare `_global_`."""
    return group.replace("/", ".")


def inner_groups(group: str) -> list[str]:
    """Return the groups nested in a group, such as process/noise and process/blur."""
    return sorted(path.relative_to(CONFIGS).as_posix() for path in (CONFIGS / group).iterdir() if path.is_dir())


def groups_in(group: str, path: Path) -> list[str]:
    """Return the groups nested in `group` that a config of it takes, such as process/noise, sorted."""
    return sorted(f"{group}/{name}" for name, _ in defaults(path) if name and not name.startswith("override"))


def config_file(group: str, choice: str, own: Sequence[str] = ()) -> Path | None:
    """Return the file of a choice from the package's configs or the folders `own`; None if there is none."""
    places = [place / group / f"{choice}.yaml" for place in (CONFIGS, *map(Path, own))]
    return next((path for path in places if path.is_file()), None)


def chosen_options(group: str, path: Path) -> dict[str, Option]:
    """Return the options of a config by key, beginning with those inherited from other configs of the group."""
    found: dict[str, Option] = {}
    for inner, name in defaults(path):
        inherited = config_file(group, name, (str(path.parents[group.count("/") + 1]),)) if name and not inner else None
        found |= chosen_options(group, inherited) if inherited else {}
    return found | {option.key: option for option in read_options(path, package(group))[1]}


def keys(group: str, choice: str) -> set[str]:
    """Return the keys in one config of a group; each nested group counts as one key."""
    path = CONFIGS / group / f"{choice}.yaml"
    return {package(inner) for inner in groups_in(group, path)} | set(chosen_options(group, path))


def all_groups(config_name: str) -> list[str]:
    """Return the config groups of an entry point, each followed by its nested groups.

    `experiment` is left out, since it has no options of its own.
    """
    outer = [group for group in groups(config_name) if group != "experiment"]
    return [name for group in outer for name in (group, *inner_groups(group))]


@functools.cache
def switches(config_name: str) -> Mapping[str, Any]:
    """Return the switches of an entry point by key: bool, or ``bool | None`` where null is allowed too.

    They are the options that a config sets to true or false, and `LEFT_TO_THE_MACHINE`; empty for a user's own config.
    """
    path = CONFIGS / f"{config_name}.yaml"
    if not path.is_file():
        return {}
    found = [*read_options(path)[1]]
    for group in all_groups(config_name):
        for choice in choices(group):
            found += chosen_options(group, CONFIGS / group / f"{choice}.yaml").values()
    left = dict.fromkeys(LEFT_TO_THE_MACHINE.get(config_name, ()), bool | None)
    return {**{option.key: bool for option in found if isinstance(option.value, bool)}, **left}
