"""Check that switches are true or false: Hydra reads `no`, `off` and `n` as strings, which Python takes as true.

An option is a switch if one of the package's configs sets it to true or false, or if the class named in its config
annotates it as bool; the class may also allow null or certain strings.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from dpm_scales.models.instantiate import alternatives, hints_of, locate, require_switch


def check_switches(settings: Mapping[str, Any], declared: Mapping[str, Any], built: bool) -> None:
    """Raise UserError for the first switch of a composed config that is neither true nor false.

    Args:
        settings: plain containers.
        declared: switches of the package's configs, see `configs.switches`.
        built: check the configs of objects, whose classes are imported; otherwise all other configs.
    """
    for where, node in _nodes(settings, ""):
        name = node.get("_target_")
        if isinstance(name, str) != built:
            continue
        hints = hints_of(locate(name)) if isinstance(name, str) else {}
        for key, value in node.items():
            full = f"{where}{key}"
            if full in declared:  # required, so null can't leave the choice to the class
                null = type(None) in alternatives(declared[full])
                allowed = [one for one in alternatives(hints.get(key, declared[full])) if null or one is not type(None)]
                require_switch(full, value, allowed)
            elif key in hints:
                require_switch(full, value, alternatives(hints[key]))


def _nodes(node: Mapping[str, Any], where: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    yield where, node
    for key, value in node.items():
        if isinstance(value, Mapping):
            yield from _nodes(value, f"{where}{key}.")
