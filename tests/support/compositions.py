"""Cache what Hydra composes from the package's configs, which hundreds of commands in the tests compose again.

Hydra reads some 25 YAML files for each command (80 ms). Which files these are follows from the choices of groups alone,
so each file is read once, and those of the same choices are merged once; single values are set afterwards, on a copy.
Configs of a user, and of plug-ins, are always read.
"""

from __future__ import annotations

import contextlib
import copy
import pickle
from collections.abc import Hashable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from hydra._internal import config_loader_impl, defaults_list
from hydra._internal.config_repository import ConfigRepository
from hydra.core.config_store import ConfigStore

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
#: where configs are looked for, apart from those of users
KNOWN = {str(CONFIGS), "hydra.conf", ""}

_list = defaults_list._create_defaults_list
_map = defaults_list._create_interpolation_map
_merge = config_loader_impl.ConfigLoaderImpl._compose_config_from_defaults_list
_load = ConfigRepository.load_config
#: pickled, which copies a config five times as fast as deepcopy
_files: dict[str, bytes] = {}
_lists: dict[Hashable, Any] = {}
_merged: dict[Hashable, bytes] = {}
_stored = set(ConfigStore.instance().repo)


def _known(repo: Any) -> bool:
    """Return whether all configs are those of the package and of Hydra."""
    return {source.path for source in repo.get_sources()} <= KNOWN and set(ConfigStore.instance().repo) <= _stored


def _loaded(self: Any, config_path: str) -> Any:
    """Return a copy of a loaded file, since Hydra moves parts of it into the config that it composes."""
    if not _known(self):
        return _load(self, config_path)
    if config_path not in _files:
        _files[config_path] = pickle.dumps(_load(self, config_path))
    return pickle.loads(_files[config_path])


def _listed(repo: Any, config_name: str | None, overrides: Any, prepend_hydra: bool, skip_missing: bool) -> Any:
    """Return the files to be merged, as Hydra's function, which also notes in `overrides` what it chose."""
    arguments: dict[str, Any] = {"prepend_hydra": prepend_hydra, "skip_missing": skip_missing}
    if overrides.append_group_defaults or overrides.deletions or not _known(repo):
        return _list(repo, config_name, overrides, **arguments)
    key = (config_name, repr(overrides.override_choices), prepend_hydra, skip_missing)
    if key not in _lists:
        _lists[key] = _list(repo, config_name, overrides, **arguments), copy.deepcopy(vars(overrides))
    result, noted = _lists[key]
    own = overrides.config_overrides
    vars(overrides).update(copy.deepcopy(noted), config_overrides=own)
    return result


def _choices(overrides: Any, defaults: list[Any], self_added: bool) -> Any:
    """Return the config that interpolated choices refer to; empty without any, though Hydra makes it for every file."""
    return _map(overrides, defaults, self_added) if any(d.is_interpolation() for d in defaults) else {}


def _merged_once(self: Any, defaults: list[Any], repo: Any) -> Any:
    """Return the merged files, before single values are set."""
    if not _known(repo):
        return _merge(self, defaults, repo)
    key = repr(defaults)
    if key not in _merged:
        _merged[key] = pickle.dumps(_merge(self, defaults, repo))
    return pickle.loads(_merged[key])


@contextlib.contextmanager
def remembered() -> Iterator[None]:
    """Let Hydra read the package's own configs once for each set of choices."""
    with (
        mock.patch.object(ConfigRepository, "load_config", _loaded),
        mock.patch.object(defaults_list, "_create_defaults_list", _listed),
        mock.patch.object(defaults_list, "_create_interpolation_map", _choices),
        mock.patch.object(config_loader_impl.ConfigLoaderImpl, "_compose_config_from_defaults_list", _merged_once),
    ):
        yield
