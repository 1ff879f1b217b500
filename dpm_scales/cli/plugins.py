"""Plugins: installed packages that announce classes and configs by entry points, switched on by `plugins=[NAME]`.

Reading the entry points of the named packages imports nothing. A name that was switched on is a choice of its group:
`network=dit` chooses the class that the package announces as `dit` in the group `dpm_scales.networks`. The folder
announced in `dpm_scales.configs` joins the places where configs are found. As with `allow=[PACKAGE]`, files may name
classes of the package; this trust is never stored.

Nothing here imports torch.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import Distribution, PackageNotFoundError, distribution, entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf, open_dict

from dpm_scales.cli import configs
from dpm_scales.errors import UserError, require, suggest
from dpm_scales.models.instantiate import plain

PREFIX = "dpm_scales."
CONFIGS_GROUP = f"{PREFIX}configs"
#: groups of entry points, with the groups of configs whose choices their names become
CHOICES = {
    f"{PREFIX}networks": "network",
    f"{PREFIX}targets": "target",
    f"{PREFIX}weights": "weight",
    f"{PREFIX}processes": "process",
    f"{PREFIX}noise_schedules": "process/noise",
    f"{PREFIX}blur_schedules": "process/blur",
    f"{PREFIX}priors": "prior",
    f"{PREFIX}samplers": "sampler",
    f"{PREFIX}data": "data",
}
#: groups of entry points, with the options whose values their names become
VALUES = {f"{PREFIX}metrics": "measures", f"{PREFIX}features": "features"}
GROUPS = (*CHOICES, *VALUES, CONFIGS_GROUP)
#: values of these options that dpm_scales provides
SHIPPED_VALUES = {"measures": ("frechet", "kernel", "manifolds"), "features": ("auto", "inception", "efflite0")}
_NAME = re.compile(r"[A-Za-z_]\w*", re.ASCII)
_CLASS = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", re.ASCII)
_MODULE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", re.ASCII)
_PACKAGE = re.compile(r"[A-Za-z0-9]([\w.-]*[A-Za-z0-9])?", re.ASCII)


@dataclass(frozen=True)
class Plugin:
    """The classes and configs that an installed package announces.

    Attributes:
        name: name of the distribution, as pip knows it.
        packages: packages to import from, which are trusted.
        classes: names of classes by (group of configs, or option; name).
        folder: folder of its configs, or None.
    """

    name: str
    packages: tuple[str, ...]
    classes: dict[tuple[str, str], str]
    folder: Path | None

    def choices(self) -> Iterator[tuple[str, str]]:
        """Yield (group, name) for each class and each file of configs."""
        yield from self.classes
        for file in sorted(self.folder.rglob("*.yaml")) if self.folder is not None else ():
            yield file.parent.relative_to(self.folder).as_posix(), file.stem  # type: ignore[arg-type]


@dataclass
class _Active:
    """The plugins of the running command, and the entries that they have put into Hydra's store of configs."""

    plugins: tuple[Plugin, ...] = ()
    stored: list[tuple[str, str]] = field(default_factory=list)


_active = _Active()


def plugin_names(value: Any) -> tuple[str, ...]:
    """Return the value of the option `plugins`, a name or a list of names, as a tuple. Raises UserError otherwise."""
    names = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list | tuple) else None
    if names is None or not all(isinstance(name, str) and _PACKAGE.fullmatch(name) for name in names):
        raise UserError(f"plugins must name installed packages, such as plugins=mynet, got {value!r}")
    return tuple(dict.fromkeys(names))


def find_plugins(names: Iterable[str]) -> tuple[Plugin, ...]:
    """Return the plugins of the named packages, without importing them.

    Raises: UserError for a package that is not installed or announces nothing, for an invalid entry point, and for a
        name that is announced twice or taken by a config of this package.
    """
    plugins = tuple(_read(name) for name in names)
    owners: dict[tuple[str, str], str] = {}
    for plugin in plugins:
        for group, choice in plugin.choices():
            shown = f"{group}={choice}"
            other = owners.setdefault((group, choice), plugin.name)
            both = f"{other} and {plugin.name} both announce {shown}"
            require(other == plugin.name, f"{both}; leave one out of plugins, and name its classes by _target_")
            known = SHIPPED_VALUES[group] if group in SHIPPED_VALUES else configs.choices(group)
            require(
                choice not in known, f"{plugin.name} announces {shown}, a name of dpm_scales; it needs another name"
            )
    return plugins


def _read(name: str) -> Plugin:
    found = _distribution(name)
    known = found.metadata["Name"]
    entries = [entry for entry in found.entry_points if entry.group.startswith(PREFIX)]
    require(
        bool(entries),
        f"plugins={name}: this package announces nothing for dpm_scales; name its classes by _target_, with allow=",
    )
    classes: dict[tuple[str, str], str] = {}
    packages, folder = set(), None
    for entry in entries:
        announced = f"{known} announces {entry.name} = {entry.value} in {entry.group}"
        require(entry.group in GROUPS, f"{announced}, an unknown group: {suggest(entry.group, GROUPS)}")
        is_class = entry.group != CONFIGS_GROUP
        form = _CLASS if is_class else _MODULE
        example = "package.module:Class" if is_class else "package.folder"
        require(bool(form.fullmatch(entry.value)), f"{announced}, which does not have the form {example}")
        package = entry.value.partition(":")[0].partition(".")[0]
        own = package != "dpm_scales" and package not in sys.stdlib_module_names
        require(own, f"{announced}, which is not its own")
        packages.add(package)
        if not is_class:
            require(folder is None, f"{known} announces two folders of configs; one is allowed")
            folder = _folder(entry.value, announced)
            continue
        require(bool(_NAME.fullmatch(entry.name)), f"{announced}; a name has letters, digits and _ alone")
        key = ({**CHOICES, **VALUES}[entry.group], entry.name)
        require(key not in classes, f"{known} announces {key[0]}={key[1]} twice")
        classes[key] = entry.value.replace(":", ".")
    plugin = Plugin(known, tuple(sorted(packages)), classes, folder)
    listed = list(plugin.choices())
    for group, choice in listed:  # a class and a file
        require(listed.count((group, choice)) == 1, f"{known} announces {group}={choice} twice")
    return plugin


def _distribution(name: str) -> Distribution:
    try:
        return distribution(name)
    except PackageNotFoundError:
        pass
    others = _installed()
    known = f"installed plugins: {', '.join(others)}" if others else "no plugin is installed"
    raise UserError(f"plugins={name}: no package of this name is installed; {known}")


def _installed() -> list[str]:
    """Return the names of the installed packages that announce anything, sorted."""
    entries = [entry for group in GROUPS for entry in entry_points(group=group)]
    return sorted({entry.dist.name for entry in entries if entry.dist is not None})


def _folder(module: str, announced: str) -> Path:
    """Return the folder of a package that holds configs, without importing it. Raises UserError if there is none."""
    package, *inner = module.split(".")
    spec = find_spec(package)  # of a package without a dot: nothing is imported
    for place in (spec.submodule_search_locations or []) if spec is not None else []:
        folder = Path(place, *inner)
        if folder.is_dir():
            return folder.resolve()
    raise UserError(f"{announced}, and there is no such folder")


# --- the running command ----------------------------------------------------------------------------------------------


def activate(names: Iterable[str]) -> None:
    """Switch on the named plugins, and off all others, for the configs composed from now on. Raises UserError."""
    repo = ConfigStore.instance().repo
    for group, file in _active.stored:
        node = repo
        for part in group.split("/"):
            node = node[part]
        node.pop(file, None)
    _active.stored, _active.plugins = [], find_plugins(names)
    for plugin in _active.plugins:
        for (group, name), target in plugin.classes.items():
            if group in CHOICES.values():
                ConfigStore.instance().store(name, _node(group, target), group, provider=f"plugin {plugin.name}")
                _active.stored.append((group, f"{name}.yaml"))


def _node(group: str, target: str) -> dict[str, Any]:
    """Return the config of an announced class: its own, or that of a data module around a source of images."""
    if group != "data":
        return {"_target_": target}
    options = {"batch_size": 32, "num_workers": 0, "seed": 0, "pin_memory": None, "drop_last": True}
    options |= {"decoded": False, "on_device": None}
    return {"_target_": "dpm_scales.data.ImageDataModule", "source": {"_target_": target}, **options}


def config_folders() -> list[Path]:
    """Return the folders of configs of the active plugins."""
    return [plugin.folder for plugin in _active.plugins if plugin.folder is not None]


def class_choices() -> set[tuple[str, str]]:
    """Return the (group of configs, name) of each class of the active plugins."""
    return {key for plugin in _active.plugins for key in plugin.classes}


def announced_class(group: str, name: str) -> str | None:
    """Return the class that an active plugin announces as `name` in a group of configs, or None."""
    return next((plugin.classes[group, name] for plugin in _active.plugins if (group, name) in plugin.classes), None)


def active_plugins() -> tuple[Plugin, ...]:
    """Return the plugins of the running command."""
    return _active.plugins


def trusted_packages() -> list[str]:
    """Return the packages of the active plugins, sorted."""
    return sorted({package for plugin in _active.plugins for package in plugin.packages})


def announcing(group: str, choice: str) -> list[str]:
    """Return the installed packages that announce a choice, without importing them."""
    found = set()
    for name in _installed():
        try:
            if (group, choice) in _read(name).choices():
                found.add(name)
        except UserError:  # it can't be switched on
            continue
    return sorted(found)


def _class_of(option: str, name: Any, named: Mapping[tuple[str, str], dict[str, str]]) -> Any:
    """Return the config of an announced metric or feature network; any other value unchanged.

    Raises: UserError for a name announced by an installed package that is not switched on.
    """
    if not isinstance(name, str) or name in SHIPPED_VALUES[option]:
        return name
    if (option, name) not in named:
        found = announcing(option, name)
        require(not found, f"{option}: an installed package announces {name}: plugins={''.join(found[:1])}")
    return named.get((option, name), name)


def apply_plugins(cfg: DictConfig) -> None:
    """Trust the packages of the plugins in a composed config, and replace names of metrics and features with classes.

    Raises: UserError as `find_plugins` does.
    """
    plugins = find_plugins(plugin_names(plain(cfg.get("plugins")) or []))
    _active.plugins = plugins  # also in a process that a launcher starts with a composed config
    with open_dict(cfg):
        if plugins and "allow" in cfg:
            allowed = [cfg.allow] if isinstance(cfg.allow, str) else list(cfg.allow)
            cfg.allow = [*allowed, *(package for plugin in plugins for package in plugin.packages)]
        named = {key: {"_target_": target} for plugin in plugins for key, target in plugin.classes.items()}
        for section in (cfg, cfg.get("evaluation")):
            if not OmegaConf.is_dict(section):
                continue
            if isinstance(section.get("features"), str):
                section["features"] = _class_of("features", section["features"], named)
            if OmegaConf.is_list(section.get("measures")):
                section["measures"] = [_class_of("measures", one, named) for one in section["measures"]]
