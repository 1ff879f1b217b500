"""Choose the processes of the studio from the configs, edit their schedules, and write them as configs for `train`."""

from __future__ import annotations

import re
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from dpm_scales.cli import configs
from dpm_scales.cli.composed import composed
from dpm_scales.cli.program import command_line
from dpm_scales.errors import require, suggest
from dpm_scales.models.instantiate import CONFIGS, build, plain
from dpm_scales.models.trust import check_targets
from dpm_scales.processes import Process

GROUP = "process"
PARTS = ("noise", "blur", "color", "clock")
"""Groups nested in the group of processes."""

NONE = "none"
MAX_SCALES = 2000
"""Largest num_scales of an edited process."""

MAX_TEXT = 2000
_NAME = re.compile(r"[a-z][a-z0-9_]{0,39}", re.ASCII)
_COMPOSING = threading.Lock()
"""Lock for composing configs: Hydra's state is global."""

_HIDDEN = ("_target_", "_partial_")


@dataclass(frozen=True)
class Parameter:
    """A parameter of a process that can be edited.

    Attributes:
        key: dotted key below the process, such as ``noise.logsnr_min``.
        value: value as YAML.
        comment: the config's comment on it, empty without one.
    """

    key: str
    value: str
    comment: str


@dataclass(frozen=True)
class Laws:
    """The processes that can be chosen: those in configs/process, and those in the user's own folder of configs.

    Attributes:
        folder: as train's ``--config-dir``; None for none.
        allow: packages whose classes the user's configs may name.
    """

    folder: Path | None = None
    allow: tuple[str, ...] = ()
    _built: dict[tuple[str, tuple[int, int]], Process] = field(default_factory=dict)
    _settings: dict[tuple[str, ...], dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in self._own():
            self.settings(name)  # a mistake in a config is reported before the page opens

    def names(self) -> list[str]:
        """Return the names of all processes, sorted; the user's own come first."""
        own = self._own()
        return [*own, *(name for name in configs.choices(GROUP) if name not in own)]

    def _own(self) -> list[str]:
        if self.folder is None:
            return []
        require(self.folder.is_dir(), f"configs={self.folder}: no such folder")
        own = sorted(path.stem for path in (self.folder / GROUP).glob("*.yaml"))
        require(bool(own), f"configs={self.folder} holds no {GROUP}/NAME.yaml")
        return own

    def parts(self, name: str) -> dict[str, tuple[list[str], str]]:
        """Return the parts that can be chosen for a process: their choices, "none" where allowed, and the default."""
        found = {}
        for group, choice in configs.defaults(self._file(name)):
            part = group.removeprefix("optional ")
            if part in PARTS:
                needed = [one for one in configs.choices(f"{GROUP}/{part}") if not self._incomplete(part, one)]
                found[part] = (needed if choice else [NONE, *needed], choice or NONE)
        return found

    def _incomplete(self, part: str, choice: str) -> bool:
        """Return whether a config has mandatory values, which only the user can give."""
        options = configs.chosen_options(f"{GROUP}/{part}", CONFIGS / GROUP / part / f"{choice}.yaml")
        return any(option.value == "???" for option in options.values())

    def _file(self, name: str) -> Path:
        require(name in self.names(), f"unknown process {name!r}: {suggest(name, self.names())}")
        own = () if self.folder is None else (str(self.folder),)
        file = configs.config_file(GROUP, name, own)
        assert file is not None
        return file

    def settings(self, name: str, parts: Mapping[str, str] | None = None) -> dict[str, Any]:
        """Return the config of a process in plain containers, as `train` composes it.

        Args:
            parts: choices other than the default ones, by part.

        Raises: UserError for unknown names, and for classes that are not allowed.
        """
        known = self.parts(name)
        overrides = [f"{GROUP}={name}"]
        for part, choice in (parts or {}).items():
            if part not in known or choice == known[part][1]:
                continue
            require(choice in known[part][0], f"unknown {part} {choice!r}: {suggest(choice, known[part][0])}")
            overrides.append(f"{GROUP}/{part}={'null' if choice == NONE else choice}")
        key = tuple(overrides)
        if key not in self._settings:
            with _COMPOSING:
                settings = _composed(overrides, self.folder)
            check_targets(settings, str(self._file(name)), self.allow)
            self._settings[key] = settings
        return deepcopy(self._settings[key])

    def parameters(self, name: str, parts: Mapping[str, str] | None = None) -> list[Parameter]:
        """Return the parameters of a process with these parts, those of its parts first."""
        comments = {key: option.comment for key, option in configs.chosen_options(GROUP, self._file(name)).items()}
        for part, (_, choice) in self.parts(name).items():
            chosen = (parts or {}).get(part, choice)
            file = configs.config_file(f"{GROUP}/{part}", chosen)
            own = {} if file is None else configs.chosen_options(f"{GROUP}/{part}", file)
            comments |= {key: option.comment for key, option in own.items()}
        found = [
            Parameter(
                key, yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("...\n").strip(), text
            )
            for key, value in _leaves(self.settings(name, parts))
            for text in [comments.get(f"{GROUP}.{key}", "")]
        ]
        return sorted(found, key=lambda one: "." not in one.key)

    def edited(self, name: str, parts: Mapping[str, str], values: Mapping[str, str]) -> dict[str, Any]:
        """Return the config of a process with other parts and other values.

        Args:
            values: YAML by dotted key, as in `Parameter`.

        Raises: UserError for a key that the process does not have, and for text that is not a plain value.
        """
        settings = self.settings(name, parts)
        known = [key for key, _ in _leaves(settings)]
        for key, text in values.items():
            require(key in known, f"{name} has no parameter {key!r}: {suggest(key, known)}")
            node = settings
            *path, last = key.split(".")
            for step in path:
                node = node[step]
            node[last] = _value(key, text)
        check_targets(settings, name, self.allow)
        scales = settings.get("num_scales")
        fits = not isinstance(scales, int) or scales <= MAX_SCALES
        require(fits, f"num_scales={scales}: the studio draws at most {MAX_SCALES}")
        return settings

    def process(self, name: str, size: tuple[int, int]) -> Process:
        """Return a process for images of (H, W) pixels, built once."""
        key = (name, size)
        if key not in self._built:
            while len(self._built) >= 64:
                self._built.pop(next(iter(self._built)))
            self._built[key] = build_process(self.settings(name), size)
        return self._built[key]


def build_process(settings: dict[str, Any], size: tuple[int, int]) -> Process:
    """Return the process of a config, for images of (H, W) pixels. Raises UserError for values that don't fit."""
    process: Process = build(settings, Process, GROUP)
    process.bind_size(size)
    return process


def export(settings: Mapping[str, Any], name: str) -> str:
    """Return a config as the YAML of ``process/NAME.yaml``, with the command that uses it as a comment on top."""
    require(_NAME.fullmatch(name) is not None, f"name {name!r}: allowed are a-z, 0-9 and _, at most 40, a letter first")
    taken = name in configs.choices(GROUP)
    require(not taken, f"{name} is the name of a process of dpm_scales; choose another")
    use = command_line("train", "--config-dir", "my_configs", f"{GROUP}={name}")
    own = {key: value for key, value in settings.items() if key not in PARTS}
    parts = {key: value for key, value in settings.items() if key in PARTS}
    text = yaml.dump({**own, **parts}, Dumper=_Dumper, sort_keys=False, default_flow_style=False, width=110)
    return f"# my_configs/{GROUP}/{name}.yaml\n# {use}\n{text}"


class _Dumper(yaml.SafeDumper):
    """Writes lists in one line, and mappings in a line for each entry."""


_Dumper.add_representer(
    list, lambda dumper, value: dumper.represent_sequence("tag:yaml.org,2002:seq", value, flow_style=True)
)


def _composed(overrides: Sequence[str], folder: Path | None) -> dict[str, Any]:
    """Return the process of configs/train.yaml with overrides. Raises UserError if they don't fit."""
    place = [] if folder is None else [f"hydra.searchpath=['file://{folder.absolute()}']"]
    settings: dict[str, Any] = plain(composed("train", [*place, *overrides])[GROUP])
    require(isinstance(settings, dict), f"{overrides[0]} is no process: no mapping with a _target_")
    return settings


def _leaves(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted key and the value of each parameter; parts that are left out have none."""
    for key, value in node.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        elif key not in _HIDDEN and not (value is None and key in PARTS):
            yield f"{prefix}{key}", value


def _value(key: str, text: str) -> Any:
    """Return YAML text as a number, a word, a bool, None or a flat list of numbers. Raises UserError for others."""
    require(len(text) <= MAX_TEXT, f"{key}: at most {MAX_TEXT} characters")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = {}
    try:  # YAML 1.1 reads 1e-4 as a word
        value = float(value) if isinstance(value, str) else value
    except ValueError:
        pass
    plain_value = value is None or isinstance(value, str | int | float)
    numbers = isinstance(value, list) and all(isinstance(entry, int | float) for entry in value)
    require(plain_value or numbers, f"{key} must be a number, a word, null or a list of numbers, got {text!r}")
    return value


def names_of(text: str) -> Collection[str]:
    """Return the packages in the value of an option ``allow=[a,b]``."""
    return [name for name in text.strip("[] ").split(",") if name]
