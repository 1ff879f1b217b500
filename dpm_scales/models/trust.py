"""What a file may name: the only allow-list.

Whoever types a command may name any class of any package. A file may not: a model's config and a checkpoint's recipe
may name classes that the core defines; the stored options and the data's config of a run, those of `dpm_scales.data`
too. Nothing else is imported.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from typing import Any

from dpm_scales.errors import UserError, require

MAX_NODES, MAX_DEPTH = 10**5, 50


def nodes(value: Any, source: str) -> Iterator[Any]:
    """All values in nested containers, parents first. Refuses a tree that refers to itself, or is absurdly large."""
    stack, number = [(value, 0)], 0
    while stack:
        node, depth = stack.pop()
        number += 1
        require(number <= MAX_NODES and depth <= MAX_DEPTH, f"{source}: the model's config is too large or too deep")
        yield node
        if isinstance(node, dict | list | tuple):
            children = node.values() if isinstance(node, dict) else node
            stack += [(child, depth + 1) for child in children]


#: names that classes had in files of earlier versions
RENAMED = {
    "dpm_scales.priors.GuidancePrior": "dpm_scales.priors.OsmosisPrior",
    "dpm_scales.targets.FinerScale": "dpm_scales.targets.NextScale",
}


def current_names(config: Any) -> Any:
    """Return nested plain containers with the present name of every class that a `_target_` names."""
    if isinstance(config, dict):
        name = config.get("_target_")
        renamed = {"_target_": RENAMED[name]} if isinstance(name, str) and name in RENAMED else {}
        return {key: current_names(value) for key, value in config.items()} | renamed
    return [current_names(value) for value in config] if isinstance(config, list) else config


ROOMS = ("processes", "schedules", "targets", "networks", "priors", "samplers")


def check_targets(value: Any, source: str) -> None:
    """Raise UserError unless a config is plain, resolved, and names classes of the core alone."""
    for node in nodes(value, source):
        if isinstance(node, dict):
            for key, entry in node.items():
                if key == "_target_":
                    check_target(entry, source)
                elif str(key).startswith("_") and key != "_partial_":
                    raise UserError(f"{source} holds the key {key!r}, which a model's config may not")
        elif isinstance(node, str) and "${" in node:
            raise UserError(f"{source} holds the interpolation {node!r}; a model's config must be resolved")
        elif not isinstance(node, str | int | float | bool | list | tuple | None):
            raise UserError(f"{source} holds a {type(node).__name__}, which a model's config may not")


def check_target(name: Any, source: str) -> None:
    """Only what a room of the core itself defines: no import of others, nothing that a room imports from elsewhere."""
    parts = name.split(".") if isinstance(name, str) else []
    ours = len(parts) == 3 and parts[0] == "dpm_scales" and parts[1] in ROOMS
    require(ours, f"{source} asks for {name!r}; a model may only use the classes of dpm_scales")
    found = getattr(import_module(f"dpm_scales.{parts[1]}"), parts[2], None)
    defined_here = str(getattr(found, "__module__", "")).startswith(f"dpm_scales.{parts[1]}")
    require(callable(found) and defined_here, f"{source} asks for {name!r}, which this version of dpm_scales has not")


ADVICE = "if you trust it, give this option on the command line"


def check_class(name: Any, refused: str) -> None:
    """Only what the core or the data's room defines."""
    from dpm_scales import data

    room, _, own = str(name).rpartition(".")
    if room == "dpm_scales.data" and own in data.__all__:
        require(own != "TorchvisionSource", f"{refused}, which could download to any place; {ADVICE}")
        return
    try:
        check_target(name, refused)
    except UserError as error:
        raise UserError(f"{error}; {ADVICE}") from error
