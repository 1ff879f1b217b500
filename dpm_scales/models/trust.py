"""Define which classes a file may name; this is the only allow-list.

A command line may name any class of any package, a file may not. The config of a model and the recipe of a checkpoint
may name classes of the core; the stored options of a run also those of `dpm_scales.weights`, `dpm_scales.data` and
`dpm_scales.shards`; the data config of a run only those of the last two. Nothing else is imported unless the user
trusts its package: `allow=[mynet]`.
"""

from __future__ import annotations

import pydoc
import re
import sys
from collections.abc import Collection, Iterator
from importlib import import_module
from typing import Any

from dpm_scales.errors import UserError, require

MAX_NODES, MAX_DEPTH = 10**5, 50

#: packages whose classes may be named by a model's config, by a run's data config, and by a run's stored options
MODEL_ROOMS = ("processes", "schedules", "targets", "networks", "priors", "samplers")
DATA_ROOMS = ("data", "shards")
OPTION_ROOMS = (*MODEL_ROOMS, "weights", *DATA_ROOMS)
#: classes of these packages that no file may name, and why
HARMFUL = {
    "dpm_scales.data.TorchvisionSource": "could download to any place",
    "dpm_scales.shards.ShardSource": "could fetch from any address",
    "dpm_scales.data.HubSource": "could fetch any set of the Hub",
}
#: former names of classes in files of earlier versions, with their present names
RENAMED = {
    "dpm_scales.priors.GuidancePrior": "dpm_scales.priors.OsmosisPrior",
    "dpm_scales.targets.FinerScale": "dpm_scales.targets.NextScale",
    "dpm_scales.data.ShardImages": "dpm_scales.shards.ShardImages",
    "dpm_scales.data.ShardSource": "dpm_scales.shards.ShardSource",
    "dpm_scales.data.shards_data": "dpm_scales.shards.shards_data",
}
ADVICE = "if you trust it, give this option on the command line"
_NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", re.ASCII)


def walk_config(value: Any, source: str) -> Iterator[Any]:
    """Yield all values in nested containers, parents first.

    Raises: UserError for a tree that contains itself, or has more than `MAX_NODES` values or `MAX_DEPTH` levels.
    """
    stack, number = [(value, 0)], 0
    while stack:
        node, depth = stack.pop()
        number += 1
        require(number <= MAX_NODES and depth <= MAX_DEPTH, f"{source}: the model's config is too large or too deep")
        yield node
        if isinstance(node, dict | list | tuple):
            children = node.values() if isinstance(node, dict) else node
            stack += [(child, depth + 1) for child in children]


def current_names(config: Any) -> Any:
    """Return nested plain containers with former class names in every `_target_` replaced by the present ones."""
    if isinstance(config, dict):
        name = config.get("_target_")
        renamed = {"_target_": RENAMED[name]} if isinstance(name, str) and name in RENAMED else {}
        return {key: current_names(value) for key, value in config.items()} | renamed
    return [current_names(value) for value in config] if isinstance(config, list) else config


def trusted_names(allow: Any) -> tuple[str, ...]:
    """Return the value of the option `allow`, a name or a list of names, as a tuple.

    Raises: UserError for anything but names of packages, modules or classes.
    """
    names = (allow,) if isinstance(allow, str) else tuple(allow) if isinstance(allow, list | tuple | set) else None
    if names is None or not all(isinstance(name, str) and _NAME.fullmatch(name) for name in names):
        raise UserError(f"allow must name packages whose classes files may use, such as allow=mynet, got {allow!r}")
    return names


def foreign_packages(*configs: Any) -> list[str]:
    """Return the packages other than dpm_scales whose classes are named in plain containers, sorted alphabetically."""
    found = {node.get("_target_") for node in walk_config(configs, "options") if isinstance(node, dict)}
    packages = {name.partition(".")[0] for name in found if isinstance(name, str) and _NAME.fullmatch(name)}
    return sorted(packages - {"dpm_scales"})


def check_targets(value: Any, source: str, allow: Collection[str] = ()) -> None:
    """Raise UserError unless a model's config is plain and resolved, and names only allowed classes.

    Args:
        source: the file, for messages.
        allow: packages, modules or classes that the user trusts; see `check_target`.
    """
    for node in walk_config(value, source):
        if isinstance(node, dict):
            for key, entry in node.items():
                if key == "_target_":
                    check_target(entry, source, allow=allow)
                elif str(key).startswith("_") and key != "_partial_":
                    raise UserError(f"{source} holds the key {key!r}, which a model's config may not")
        elif isinstance(node, str) and "${" in node:
            raise UserError(f"{source} holds the interpolation {node!r}; a model's config must be resolved")
        elif not isinstance(node, str | int | float | bool | list | tuple | None):
            raise UserError(f"{source} holds a {type(node).__name__}, which a model's config may not")


def check_target(
    name: Any, source: str, rooms: Collection[str] = MODEL_ROOMS, allow: Collection[str] = (), advice: str = ""
) -> None:
    """Raise UserError unless a file may name this class; import nothing unless its name is allowed.

    A class must be defined in the package that its name gives, one of `rooms` or a trusted one, which excludes
    `mynet.os.system`.

    Args:
        name: value of a `_target_`.
        source: the file, for messages.
        rooms: packages of dpm_scales whose classes may be named.
        allow: packages, modules or classes that the user trusts.
        advice: what the user can do if `allow` does not help.
    """
    text = name if isinstance(name, str) and _NAME.fullmatch(name) else ""
    text = RENAMED.get(text, text)
    advice = f"; {advice}" if advice else ""
    parts = text.split(".")
    asked = f"{source} asks for {name!r}"
    if len(parts) == 3 and parts[0] == "dpm_scales" and parts[1] in rooms:
        require(text not in HARMFUL, f"{asked}, which {HARMFUL.get(text)}{advice}")
        room = f"dpm_scales.{parts[1]}"
        found = getattr(import_module(room), parts[2], None)
        require(_is_defined_in(found, room), f"{asked}, which this version of dpm_scales does not have{advice}")
        return
    trusted = next((prefix for prefix in allow if f"{text}.".startswith(f"{prefix}.")), None)
    if trusted is None:
        # never advise the user to trust os.system
        no_package = parts[0] in ("", "dpm_scales") or parts[0] in sys.stdlib_module_names
        end = advice if no_package else f"; if you trust it: allow={parts[0]}"
        if MODEL_ROOMS[0] in rooms:
            raise UserError(f"{asked}; a model may only use the classes of dpm_scales{end}")
        end = "" if no_package else end  # the message already gives the advice
        raise UserError(f"{asked}; data may only use the classes of dpm_scales.data, or be given by reference=DIR{end}")
    try:
        found = pydoc.locate(text)
    except pydoc.ErrorDuringImport as error:
        raise UserError(f"{asked}, which can't be imported: {error.value}") from error
    require(found is not None, f"{asked}, and there is no such class; is its package installed, or on PYTHONPATH?")
    require(text == trusted or _is_defined_in(found, trusted), f"{asked}, which is not a class of {trusted}")


def _is_defined_in(found: Any, package: str) -> bool:
    return callable(found) and f"{getattr(found, '__module__', '')}.".startswith(f"{package}.")
