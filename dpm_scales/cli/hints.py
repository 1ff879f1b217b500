"""Suggest what an unknown option was meant to be: another name, another choice of its group, another level.

Nothing here imports torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Transformer
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dpm_scales.cli import configs
from dpm_scales.cli.arguments import config_dirs, is_multirun, split_flags
from dpm_scales.errors import is_initials, nearest, suggest
from dpm_scales.models.instantiate import CONFIGS

#: config groups whose choices are tasks
TASK_GROUPS = ("task", "edit")
MOST_NAMED = 4
#: options by the names that other libraries or our other commands have for them, by entry point
SYNONYMS = {"train": {"out": ["run_dir"], "steps": ["trainer.max_steps"], "epochs": ["trainer.max_steps"]}}


def unknown_option(config_name: str, full: str, argv: Sequence[str]) -> str:
    """Return the error message for the unknown option `full`, with a suggestion.

    Args:
        config_name: the entry point's config; empty if the option comes from our own code, not from a command line.
        argv: the command line, as `tidy` returns it.
    """
    if not config_name:
        return f"the option {full!r} was removed, and is needed; leave it as it is"
    owners = _owners(config_name, full)
    if owners:
        more = [f"{len(owners) - MOST_NAMED} more"] if len(owners) > MOST_NAMED else []
        return f"unknown option {full!r}: it belongs to {' and '.join([*owners[:MOST_NAMED], *more])}"
    config = _composed(config_name, argv)
    level = _level(config_name, config, full)
    elsewhere = _elsewhere(config_name, config, full) if nearest(full, level, sure=True) is None else []
    if elsewhere:
        level_too = f" allowed: {', '.join(sorted(level))}" if level else ""
        return f"unknown option {full!r}: did you mean {' or '.join(map(repr, elsewhere[:MOST_NAMED]))}?{level_too}"
    hint = suggest(full, level) if level else _without_level(config_name, config, full)
    return f"unknown option {full!r}: {hint}"


def _without_level(config_name: str, config: Any, full: str) -> str:
    """Return the hint for an option below a key that has none: its group's options in other choices, or a like name."""
    parent, _, last = full.rpartition(".")
    group = parent.replace(".", "/")
    if group in configs.all_groups(config_name):
        others = {key for choice in configs.choices(group) for key in configs.keys(group, choice)}
        typed = [key for key in others if not key.endswith(configs.CLASS_KEYS)]
        return f"{suggest(full, typed)}, each with its choice of {group}"
    beside = _level(config_name, config, parent)
    if parent not in beside:
        return suggest(full, ())
    meant = [key for key in beside if key.endswith(f"_{last}")]
    guess = f"did you mean {' or '.join(map(repr, meant))}?" if meant else f"give {parent}=VALUE alone"
    return f"{parent} has no options of its own; {guess}"


def mistaken_option(config_name: str, argv: Sequence[str]) -> str | None:
    """Return the error message for the first option that names no choice or key of the config; None if all do.

    Args: as for `unknown_option`.
    """
    flags, options = split_flags(argv)
    if any(flag.startswith(("--config-name=", "--config-path=")) for flag in flags):
        return None  # of another config
    groups = [*configs.all_groups(config_name), "experiment"]
    present = {*configs.groups(config_name), *_keys(_composed(config_name, argv), ""), *configs.GIVEN}
    for override in OverridesParser.create().parse_overrides(options):
        group, key = override.key_or_group, override.key_or_group.replace("/", ".")
        sweep = override.is_sweep_override()
        chosen = override.sweep_iterator(Transformer.identity) if sweep else [override.value()]
        if group in groups and not override.is_delete() and not all(isinstance(one, str | list) for one in chosen):
            value = str(override.input_line).partition("=")[2]
            return f"{group} is chosen by a name, and can't be {value}; leave it out for the default"
        if "/" in group and group in groups and not override.is_delete():
            line = _without_group(config_name, argv, group)
            if line is not None:
                return line
        if override.is_add() and group in groups and group in _choices(config_name, argv):
            option = str(override.input_line).removeprefix("+")
            return f"{group} is in the config already; write {option} without the +"
        ours = not (key.startswith("hydra.") or key.rpartition(".")[2].startswith("_") or key[-1].isdigit())
        if ours and key not in present and not (override.is_add() or override.is_force_add()):
            return unknown_option(config_name, key, argv)
        if sweep and not is_multirun(flags):
            values = str(override.input_line).partition("=")[2]
            return f"{group}={values} gives several values: -m makes a run of each, and {group}=[{values}] is a list"
    return None


def _without_group(config_name: str, argv: Sequence[str], group: str) -> str | None:
    """Return the error message for a nested group, process/clock say, that the chosen config of its group lacks."""
    outer, places = group.partition("/")[0], config_dirs(argv)
    typed = [a.partition("=")[2] for a in argv if re.fullmatch(rf"{outer}=[\w,]+", a)]
    own = _choices(config_name, argv).get(outer)
    for choice in typed[-1].split(",") if typed else [str(own)]:
        path = configs.config_file(outer, choice, places)
        taken = [] if path is None else configs.groups_in(outer, path)
        # a config of the user's own may inherit groups from the one it extends
        if path is None or group in taken or not path.is_relative_to(CONFIGS):
            continue
        files = {name: configs.config_file(outer, name) for name in configs.choices(outer)}
        with_it = [name for name, file in files.items() if file and group in configs.groups_in(outer, file)]
        more = f" or one of {len(with_it) - MOST_NAMED} more" if len(with_it) > MOST_NAMED else ""
        only = f", only {', '.join(taken)}" if taken else ""
        others = ", ".join(with_it[:MOST_NAMED]) + more
        return f"{outer}={choice} takes no {group}{only}; leave it out, or choose {outer}={others}"
    return None


def option_of_flag(config_name: str, key: str) -> str:
    """Return the option that the flag `--key` most resembles; `key` itself if none is similar."""
    config = _composed(config_name, ())
    level = _level(config_name, config, key)
    if key in level:
        return key
    return next(iter(_elsewhere(config_name, config, key)), nearest(key, level) or key)


def _owners(config_name: str, full: str) -> list[str]:
    """Return the choices of config groups that have the option, such as `process/blur=listed_sigmas`."""
    parent = full.rpartition(".")[0]
    found = []
    for group in configs.all_groups(config_name):
        name = "task" if group in TASK_GROUPS else group
        if parent == ("" if name == "task" else configs.package(group)):
            owners = [choice for choice in configs.choices(group) if full in configs.keys(group, choice)]
            found += [f"{name}={choice}" for choice in owners]
    return found


def _composed(config_name: str, argv: Sequence[str], with_hydra: bool = False) -> Any:
    """Return the config with the choices made on the command line.

    If they can't be composed, it is that of the outer groups' choices, or else the default one.

    Args:
        with_hydra: whether to include Hydra's own config, which names the choices.
    """
    outer = configs.groups(config_name)
    choices = [a for a in argv if re.fullmatch(rf"({'|'.join(outer)})(/\w+)*=\w+", a)]
    plain = [a for a in choices if "/" not in a]
    places = ",".join(f"'file://{Path(place).absolute()}'" for place in config_dirs(argv))
    own = [f"hydra.searchpath=[{places}]"] if places else []
    for overrides in ([*own, *choices], [*own, *plain], []):
        GlobalHydra.instance().clear()
        try:
            with initialize_config_dir(str(CONFIGS), version_base="1.3"):
                return compose(config_name, overrides=overrides, return_hydra_config=with_hydra)
        except (HydraException, OmegaConfBaseException, ValueError):  # ValueError: a choice that is no name
            continue
    return OmegaConf.create()


def _choices(config_name: str, argv: Sequence[str]) -> Any:
    """Return the choice of each group in the config, nested groups included, without those that a + adds."""
    return OmegaConf.select(_composed(config_name, argv, with_hydra=True), "hydra.runtime.choices") or {}


def _level(config_name: str, config: Any, full: str) -> list[str]:
    """Return the keys of the config at the level of `full`."""
    parent = full.rpartition(".")[0]
    node = OmegaConf.select(config, parent) if parent else config
    if not OmegaConf.is_dict(node):
        return []
    chosen = ["experiment"] if config_name == "train" and not parent else []  # has no key in the config
    return chosen + [f"{parent}.{key!s}".lstrip(".") for key in node if key not in configs.CLASS_KEYS]


def _elsewhere(config_name: str, config: Any, full: str) -> list[str]:
    """Return the options that `full` is a synonym of, and those at any level whose last part is its own.

    If there are none, return those that have its last part as their initials.
    """
    meant = SYNONYMS.get(config_name, {}).get(full, [])
    last = full.rpartition(".")[2]
    every = list(_keys(config, ""))
    same = [key for key in every if key.rpartition(".")[2] == last]
    return [*meant, *same] or [key for key in every if is_initials(last, key.rpartition(".")[2])]


def _keys(node: Any, where: str) -> Iterator[str]:
    for key in node:
        full = f"{where}{key}"
        if key != "_target_" and full not in configs.GIVEN:
            yield full
            child = node._get_node(key)
            if OmegaConf.is_dict(child) and not child._is_none() and not child._is_missing():
                yield from _keys(child, f"{full}.")
