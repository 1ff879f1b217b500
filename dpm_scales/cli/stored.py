"""Read the options stored in a run's folder, `overrides.yaml`, and refuse unsafe ones.

Resuming an untrusted run executes none of its code and writes only into its folder.

Options on the command line may name any class of any package. Options stored in a folder may only choose among this
package's configs and classes, and set values. Otherwise Hydra would import and call whatever a `_target_` names, read
configs from any folder (`hydra.searchpath`, `process=../../elsewhere`), or take `--config-dir` from the stored options.
Nor may they name a place to write to (`logger.save_dir`), or one to download a data set to.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from dpm_scales.errors import UserError, require
from dpm_scales.models.trust import ADVICE, OPTION_ROOMS, check_target, walk_config
from dpm_scales.storage import open_regular, read_yaml

_KEY = re.compile(r"[A-Za-z][\w/-]*(\.\w+)*")
_ENVIRONMENT = re.compile(r"\$\{oc\.env:\w+(,[^{}$]*)?\}")
_LONGEST_KEY = 200
#: options by which the user trusts packages, which are typed each time
NEVER_STORED = ("allow", "plugins")
#: sections whose classes write files, and the names of their arguments for places to write to
_WRITERS = ("logger", "trainer")
_PLACE = re.compile(r"(.*_)?(dir|dirs|path|folder|root|file|files)")
#: options that may name addresses to fetch from
_FETCHED = ("data.root", "data.val_root", "data.index")
#: files that record the config folder, `--config-dir`, that a run was trained with, and its other flags for configs
CONFIG_DIR_FILE, CONFIG_FLAGS_FILE = "config_dir", "config_flags"
#: flags whose values are recorded there: they replace the configs that all options refer to
CONFIG_FLAGS = ("--config-path=", "--config-name=")
MAX_RECORD_BYTES = 4096


def key_of(override: str) -> str:
    """Return the key that an override changes, adds or removes."""
    return override.split("=", 1)[0].lstrip("+~")


_without_downloads: set[Path] = set()


def may_download(run_dir: Path) -> bool:
    """Return whether a run may fetch its data: not if only its folder names the place, see `stored_overrides`."""
    return run_dir not in _without_downloads


def stored_overrides(
    file: Path, without: Collection[str], paths: Collection[str], allow: Collection[str] = ()
) -> list[str]:
    """Return the options in a run's `overrides.yaml`.

    Args:
        without: keys to leave out; their values are not checked.
        paths: keys whose values are paths, which may be any and may refer to environment variables.
        allow: other packages whose classes the options may name.

    Raises: UserError if the file is damaged, or holds an option that does more than choose configs and set values.
    """
    damaged = f"{file} is damaged; remove it and give the run's options again"
    try:
        values = read_yaml(file)
    except UserError as error:
        raise UserError(damaged) from error
    require(isinstance(values, list) and all(isinstance(value, str) for value in values), damaged)
    stored = [value for value in values if key_of(value) not in without]
    keys = {key for override in stored for key in _check(override, file, paths, allow)}
    _without_downloads.discard(file.parent)
    if keys.intersection(_FETCHED).difference(without) and "data.download" not in without:
        _without_downloads.add(file.parent)
    return stored


def stored_config_dir(run_dir: Path) -> str | None:
    """Return the config folder that a run was trained with, as recorded in the run's folder, or None.

    Only for messages: configs import the classes that they name, so a folder is opened only if the user types it.
    """
    return _record(run_dir / CONFIG_DIR_FILE) or None


def stored_config_flags(run_dir: Path) -> list[str]:
    """Return the flags `--config-path=…` and `--config-name=…` that a run was trained with; for messages, as above."""
    return [line for line in _record(run_dir / CONFIG_FLAGS_FILE).splitlines() if line.startswith(CONFIG_FLAGS)]


def _record(file: Path) -> str:
    """Return the text of a small file; empty if it is missing or not a regular file."""
    try:
        with open_regular(file) as record:
            text = record.read(MAX_RECORD_BYTES).decode(errors="replace").strip()
    except (OSError, UserError):
        return ""
    return "" if file.is_symlink() else text


def _check(text: str, file: Path, paths: Collection[str], allow: Collection[str]) -> list[str]:
    """Return the keys that a stored option sets. Raises UserError if a folder may not hold the option."""
    from hydra.core.override_parser.overrides_parser import OverridesParser  # slow to import, and `key_of` is quick
    from hydra.errors import HydraException

    refused, option = f"{file} holds the option {text[:200]!r}", f"the option {text[:200]!r} in {file}"
    try:
        override = OverridesParser.create().parse_override(text)
        value = None if override.is_sweep_override() else override.value()
    except (HydraException, RecursionError) as error:
        raise UserError(f"{refused}, which is not a valid option") from error
    key = override.key_or_group
    require(not override.is_sweep_override(), f"{refused}: a sweep, where a run has one value")
    require(bool(_KEY.fullmatch(key)) and len(key) <= _LONGEST_KEY, f"{refused}, which is not a valid option")
    parts = re.split(r"[./]", key)
    require(parts[0] != "hydra", f"{refused}, and settings of Hydra are not a run's; {ADVICE}")
    require(
        parts[0] not in NEVER_STORED,
        f"{refused}, and what is trusted is said on the command line alone; remove it there",
    )
    names_class = parts[-1] == "_target_"
    hidden = any(part.startswith("_") for part in (parts[:-1] if names_class else parts))
    require(not hidden, f"{refused}, which a stored run may not; {ADVICE}")
    if names_class:
        check_target(value, option, OPTION_ROOMS, allow, ADVICE)
    _check_value(value, key, refused, option, paths, allow)
    leaves = list(_leaves(value, key))
    for name, entry in leaves:
        section, *names = name.split(".")
        if section in _WRITERS and names:
            place = bool(_PLACE.fullmatch(names[-1]))
            base = Path() if place else file.parent  # other names are relative to the run's folder
            is_text = isinstance(entry, str)
            inside = is_text and "$" not in entry and _is_below(base, entry, file.parent)
            outside = f"{refused}, which names a place to write to outside of {file.parent}; {ADVICE}"
            require(inside or not (is_text or place), outside)
    return [name for name, _ in leaves]


def _leaves(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) for each plain value within the value of an option."""
    if isinstance(value, dict):
        for name, entry in value.items():
            yield from _leaves(entry, f"{key}.{name}")
    elif isinstance(value, list):
        for entry in value:
            yield from _leaves(entry, key)
    else:
        yield key, value


def _is_below(base: Path, name: str, folder: Path) -> bool:
    """Return whether `name`, relative to `base` and with links resolved, is `folder` or lies in it."""
    try:
        return (base / Path(name).expanduser()).resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError, ValueError):
        return False


def _check_value(
    value: Any, key: str, refused: str, option: str, paths: Collection[str], allow: Collection[str]
) -> None:
    for node in walk_config(value, refused):
        if isinstance(node, dict):
            for name, entry in node.items():
                if name == "_target_":
                    check_target(entry, option, OPTION_ROOMS, allow, ADVICE)
                else:
                    plain = not str(name).startswith("_") or name == "_partial_"
                    require(plain, f"{refused}, with a key that a stored run may not have; {ADVICE}")
        elif isinstance(node, str):
            rest = _ENVIRONMENT.sub("", node) if key in paths else node
            require("${" not in rest, f"{refused}, with an interpolation; {ADVICE}")
            # config groups are chosen by keys without a dot
            inside = not (node.startswith(("/", "~")) or "\\" in node or ".." in node.split("/"))
            require(inside or "." in key or key in paths, f"{refused}, which leads out of the configs; {ADVICE}")
