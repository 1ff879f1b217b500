"""Prepare the command line for Hydra: split flags from options, quote values, restore a resumed run's options.

Nothing here imports torch.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser

from dpm_scales.cli.plugins import (
    active_plugins,
    announcing,
    class_choices,
    config_folders,
    plugin_names,
    trusted_packages,
)
from dpm_scales.cli.stored import NEVER_STORED, key_of, stored_config_dir, stored_config_flags, stored_overrides
from dpm_scales.errors import UserError, require, suggest
from dpm_scales.models.instantiate import CONFIGS
from dpm_scales.models.trust import foreign_packages, trusted_names
from dpm_scales.storage import check_names

SWEEP_FLAGS = ("-m", "--multirun")
HELP_FLAGS = ("-h", "--help")
INFO_FLAGS = ("-i", "--info")
#: Hydra's flags; those with a value are written as one argument, `--config-dir=DIR`
PLAIN_FLAGS = (
    *(*SWEEP_FLAGS, *HELP_FLAGS, "-r", "--run", "--hydra-help", "--version", "--resolve"),
    *("-sc", "--shell-completion", *INFO_FLAGS),
)
SHORT_FLAGS = {"-cd": "--config-dir", "-cp": "--config-path", "-cn": "--config-name", "-c": "--cfg", "-p": "--package"}
VALUE_FLAGS = (*SHORT_FLAGS.values(), "--experimental-rerun", "--info")
FLAG_CHOICES = {
    "--cfg": ("job", "hydra", "all"),
    "--info": ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath"),
}
CONFIG_DIR = "--config-dir="
#: flags of which Hydra takes one at a time
MODES = ("--multirun", "--run", "--cfg", "--info", "--shell-completion")
SHORT_MODES = {"-m": "--multirun", "-r": "--run", "-i": "--info", "-sc": "--shell-completion"}
#: options whose values are paths, which may need quotes in Hydra's grammar (names of run folders contain = and ,)
PATHS = (
    *("run_dir", "resume", "model", "guide", "out", "reference", "inception", "folder", "data.root", "data.path"),
    *("data.val_root", "data.index"),
    *("image", "mask", "background", "foreground", "start", "end", "samples", "yardstick", "prior_images"),
    "evaluation.inception",
)
NEVER_EMPTY = (*PATHS, "logger.save_dir")
#: options that take lists, which may be given without brackets
LISTS = ("labels", "guidance_interval", "allow", "plugins")
#: Hydra's names of options, by entry point, that would otherwise be read as a config group or that were renamed
ALIASES = {
    "evolve": {"data": "folder", "processes.dpm": "processes.vp"},
    "sample": {"task": "edit"},
    "evaluate": {"baseline": "yardstick", "baseline_split": "yardstick_split"},
}
#: options, by entry point, that take a number or the arguments of a curve, with their defaults as written
_CURVE = {"low": "1.0", "high": "1.0", "cutoff": "0.1", "sharpness": "4.0", "weights": "", "frequencies": ""}
CURVES = {"sample": {"guidance": _CURVE}, "evaluate": {"guidance": _CURVE}}
#: former choices of options, with their present names
CHOICE_ALIASES = {"edit=generate": "edit=draw"}
#: files and folders that Hydra, Optuna, submitit and a search write into a sweep's folder
SWEEP_FILES = (
    *("multirun.yaml", "study.db", "study.db-journal", "study.db-wal", "study.db-shm", ".submitit"),
    "experiment",
)
PLAIN_VALUE = re.compile(r"""null|\$\{.*|".*"|'.*'|[A-Za-z_./][A-Za-z0-9_./+-]*""", re.DOTALL)
#: an item of a list without brackets, quoted or not; below, an item that Hydra's grammar accepts without quotes
LIST_ITEM = re.compile(r"""'[^']*'|"[^"]*"|[^,]+""")
PLAIN_ITEM = re.compile(r"""'[^']*'|"[^"]*"|[A-Za-z0-9_./+-]+|\$\{.*""", re.DOTALL)
EMPTY = re.compile(r"""\s*|'\s*'|"\s*\"""")


class UnknownFlagError(UserError):
    """An argument that begins with a dash but is not one of Hydra's flags.

    Attributes:
        typed: the argument, followed by the next one if that is its value.
        key, value: the option that was probably meant; value is `VALUE` if none was given.
    """

    def __init__(self, typed: str, key: str, value: str) -> None:
        super().__init__(f"{typed}: options are KEY=VALUE: {key}={value}")
        self.typed, self.key, self.value = typed, key, value


def split_flags(argv: Iterable[str]) -> tuple[list[str], list[str]]:
    """Return Hydra's flags, each joined with its value into one argument, and the options.

    Raises: UserError for any other argument that begins with a dash, for a flag that lacks its value, and for several
    flags of which only one may be given.
    """
    flags, options, rest = [], [], list(argv)
    while rest:
        typed = rest.pop(0)
        name, equals, value = typed.partition("=")
        name = SHORT_FLAGS.get(name, name)
        if name.startswith("--"):  # may be abbreviated, as in argparse
            longer = {flag for flag in (*PLAIN_FLAGS, *VALUE_FLAGS) if flag.startswith(name)}
            name = longer.pop() if len(longer) == 1 else name
        alone = bool(equals) or not rest or rest[0].startswith("-") or "=" in rest[0]
        if not typed.startswith("-"):
            options.append(typed)
        elif name in INFO_FLAGS and not equals and not alone:
            rest.insert(0, f"--info={rest.pop(0)}")
        elif name in PLAIN_FLAGS and not equals:
            flags.append(name)
        elif name in VALUE_FLAGS:
            require(bool(equals or rest), f"{typed} needs a value: {name} VALUE")
            value = value if equals else rest.pop(0)
            require(not EMPTY.fullmatch(value), f"{name} is empty; give it a value or leave it out")
            if name == "--config-path" and "://" not in value:  # Hydra would look for it beside dpm_scales/entry
                value = str(Path(value).absolute())
            known = FLAG_CHOICES.get(name, (value,))
            require(value in known, f"unknown {name} {value!r}: {suggest(value, known)}")
            flags.append(f"{name}={value}")
        else:
            whole = typed if alone else f"{typed} {rest[0]}"
            value = value if equals else "VALUE" if alone else rest[0]
            raise UnknownFlagError(whole, name.lstrip("-").replace("-", "_") or "KEY", value)
    names = [flag.partition("=")[0] for flag in flags]
    modes = {name: None for name in (SHORT_MODES.get(name, name) for name in names) if name in MODES}
    require(len(modes) < 2, f"{' and '.join(modes)} exclude each other; leave one out")
    return flags, options


def tidy(
    argv: Iterable[str],
    aliases: Mapping[str, str] = MappingProxyType({}),
    announced: Collection[tuple[str, str]] = (),
    curves: Collection[str] = (),
) -> list[str]:
    """Return the arguments in the form that Hydra's grammar expects.

    Flags come first. Paths are quoted where necessary, and lists are put in brackets unless they are swept over.
    Replacing an object, `KEY={_target_:…}`, becomes a removal and an addition, since Hydra would merge it with the
    existing one; it comes before options within it. Options of a class chosen by `KEY._target_=…` may be new keys, and
    so may those of a curve, `guidance.low=…`, which replace the number.

    Args:
        aliases: Hydra's names of some keys.
        announced: choices (group, name) that are classes of plugins, whose options may be new keys.
        curves: options that take a number or the arguments of a curve.

    Raises: UserError for unknown flags and for empty paths.
    """
    flags, given = split_flags(argv)
    sweep = is_multirun(flags)
    keys = [argument.partition("=")[0] for argument in given]
    classes = tuple(key.removesuffix("_target_") for key in keys if key.endswith("._target_") and key[0] not in "+~")
    classes += tuple(f"{group.replace('/', '.')}." for group, name in announced if _may_choose(given, group, name))
    classes += tuple(f"{curve}." for curve in curves)
    objects = tuple(f"{key_of(typed)}." for typed in given if _is_object(typed))
    options: list[str] = []
    for typed in given:
        name, equals, value = typed.partition("=")
        key = _renamed(name, aliases)
        argument = CHOICE_ALIASES.get(f"{key}{equals}{value}", f"{key}{equals}{value}")
        empty = key_of(argument) in NEVER_EMPTY and equals and EMPTY.fullmatch(value)
        require(not empty, f"{name} is empty; give it a value, or leave it out")
        several = value.startswith("{") or (sweep and "," in value)
        if key in PATHS and equals and not PLAIN_VALUE.fullmatch(value) and not several:
            mark = '"' if "'" in value else "'"
            options.append(f"{key}={mark}{value}{mark}")
        elif key in LISTS and value[:1] not in ("[", "{", "$", ""):
            items = [item if PLAIN_ITEM.fullmatch(item) else repr(item) for item in LIST_ITEM.findall(value)]
            joined = ",".join(items)
            options.append(f"{key}={joined}" if sweep or len(items) == 1 else f"{key}=[{joined}]")
        elif _is_object(typed) and not key.startswith(objects):
            place = 0 if any(other.startswith(f"{key}.") for other in keys) else len(options)
            options[place:place] = [f"~{key}", f"+{key}={value}"]
        elif key.startswith((*classes, *objects)) and not key.endswith("._target_") and key[0] not in "+~":
            options.append(f"++{argument}")
        else:
            options.append(argument)
    return flags + options


def _may_choose(options: Iterable[str], group: str, name: str) -> bool:
    """Return whether the options, or an experiment that they choose, may choose `name` in a group of configs."""
    typed = dict(option.split("=", 1) for option in options if "=" in option)
    return name in typed[group].split(",") if group in typed else "experiment" in typed


def _is_object(option: str) -> bool:
    """Return whether an option replaces an object with another, `KEY={_target_:…}`."""
    key, _, value = option.partition("=")
    return value.startswith("{") and "_target_" in value and key[0] not in "+~"


def _renamed(key: str, aliases: Mapping[str, str]) -> str:
    """Return `key` with the name of the option, or of the config that contains it, replaced according to `aliases`."""
    name = key.lstrip("+~")
    for old, new in aliases.items():
        if name == old or name.startswith(f"{old}."):
            return key[: len(key) - len(name)] + new + name[len(old) :]
    return key


def is_multirun(flags: Iterable[str]) -> bool:
    """Return whether the flags request a sweep."""
    return not set(SWEEP_FLAGS).isdisjoint(flags)


def config_dirs(argv: Iterable[str]) -> list[str]:
    """Return the user's config folders named by the flags in `argv`, as `tidy` returns it; Hydra uses the last."""
    return [flag.removeprefix(CONFIG_DIR) for flag in argv if flag.startswith(CONFIG_DIR)][-1:]


def config_flags() -> list[str]:
    """Return where the configs of the current job of `train` come from, for a command that repeats the job's options.

    These are the flags `--config-dir`, `--config-path` and `--config-name` and the option `hydra.searchpath`, if given.
    """
    if not HydraConfig.initialized():
        return []
    hydra = HydraConfig.get()
    places = {source.provider: source.path for source in hydra.runtime.config_sources}
    found = [f"{CONFIG_DIR}{places['command-line']}"] if "command-line" in places else []
    if "main" in places and places["main"] != str(CONFIGS):
        found.append(f"--config-path={places['main']}")
    if hydra.job.config_name not in (None, "train"):
        found.append(f"--config-name={hydra.job.config_name}")
    return found + [option for option in hydra.overrides.hydra if key_of(option) == "hydra.searchpath"]


def with_stored_overrides(argv: Iterable[str]) -> list[str]:
    """Return flags, a resumed run's stored overrides, then the new ones, so that `run_dir=DIR` alone resumes its run.

    Raises: UserError if `resume` names a folder without a run, if the stored options are damaged, unsafe or need the
    user's config folder, and if a sweep is requested of one run.
    """
    flags, options = split_flags(argv)
    sweep = is_multirun(flags)
    checks = [a for a in options if key_of(a) == "check_resume" and not a.lower().endswith("=false")]
    require(not (sweep and checks), "check_resume=true checks one run; leave -m out")  # before Hydra makes a folder
    resume = _path_option(options, "resume", sweep)
    if resume is not None:
        require(
            not sweep, "resume=DIR resumes one run at a time; repeat the command of the sweep to resume all of its runs"
        )
        require((Path(resume) / "overrides.yaml").is_file(), f"resume={resume}: no run there")
        options = tidy([a for a in options if not a.startswith(("resume=", "run_dir="))] + [f"run_dir={resume}"])
    folder = _path_option(options, "run_dir", sweep)
    if sweep and folder is not None:
        check_names(folder, SWEEP_FILES)
    if folder is None or sweep or not (Path(folder) / "overrides.yaml").is_file():
        return [*flags, *options]
    keys = {key_of(a) for a in options} | {"run_dir", "resume"}
    stored = stored_overrides(Path(folder) / "overrides.yaml", keys, PATHS, _allowed(options))
    _require_flags(flags, Path(folder))
    if not any(key_of(a) == "hydra.searchpath" for a in options):
        _require_configs(stored, Path(folder), flags)
    return [*flags, *stored, *options]


def _require_flags(flags: list[str], run_dir: Path) -> None:
    """Raise UserError if the run was trained with a flag that replaces all configs and is not given again."""
    for flag in stored_config_flags(run_dir):
        name, _, value = flag.partition("=")
        again = f"{name} {shlex.quote(value)}"
        given = any(one.startswith(f"{name}=") for one in flags)
        require(given, f"{run_dir} was trained with {again}; give it again, with --config-dir as it was")


def _require_configs(stored: list[str], run_dir: Path, flags: list[str]) -> None:
    """Raise UserError, suggesting `--config-dir`, if a stored option chooses a config that does not exist.

    The message names the config folder of the original run; it is never opened, since configs may import anything.
    """
    given = config_dirs(flags)
    own = [flag.partition("=")[2] for flag in flags if flag.startswith("--config-path=")]
    places = [*map(Path, own or [str(CONFIGS)]), *map(Path, given), *config_folders()]
    for option in stored:
        override = OverridesParser.create().parse_override(option)
        group, value = override.key_or_group, override.value()
        choices = [choice for choice in (value if isinstance(value, list) else [value]) if isinstance(choice, str)]
        # `+GROUP=NAME` adds a group of the user's own, since no key of the configs can be added
        is_group = any((place / group).is_dir() for place in places) or override.is_add()
        if "." in group or not is_group or override.is_delete():
            continue
        for choice in choices:
            if any((place / group / f"{choice.removesuffix('.yaml')}.yaml").is_file() for place in places):
                continue
            if (group, choice) in class_choices():
                continue
            plugins = announcing(group, choice)
            if plugins and stored_config_dir(run_dir) is None:
                raise UserError(f"{run_dir} was trained with {option}, of a plugin; give plugins={plugins[0]}")
            first = stored_config_dir(run_dir)
            if given:
                seen = f", and --config-dir {shlex.quote(given[0])} holds no {group}/{choice}.yaml"
            else:
                seen = ", a config of your own"
            again = f"--config-dir {shlex.quote(first)} as it was" if first else "the --config-dir that holds it"
            raise UserError(f"{run_dir} was trained with {option}{seen}; give {again}")


def _allowed(options: list[str]) -> tuple[str, ...]:
    """Return the packages in the last ``allow=…`` of the options, and those of the active plugins."""
    typed = [option for option in options if option.startswith("allow=")][-1:]
    named = trusted_names([] if not typed else OverridesParser.create().parse_override(typed[0]).value())
    return (*named, *trusted_packages())


def typed_plugins(options: Iterable[str]) -> tuple[str, ...]:
    """Return the packages in the last ``plugins=…`` of the options, as `tidy` returns them.

    Raises: UserError for other values than names, and for a sweep over them.
    """
    typed = [option for option in options if option.startswith("plugins=")][-1:]
    if not typed:
        return ()
    override = OverridesParser.create().parse_override(typed[0])
    value = typed[0].partition("=")[2]
    require(not override.is_sweep_override(), f"plugins={value}: plugins are those of all runs, plugins=[{value}]")
    return plugin_names(override.value())


def trust_options() -> list[str]:
    """Return ``plugins=…`` and ``allow=…`` as far as resuming the current job will need them, for the command."""
    packages = typed_packages(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []
    return trust_words(packages)


def trust_words(packages: Iterable[str]) -> list[str]:
    """Return ``plugins=…`` for the active plugins and ``allow=…`` for packages that do not belong to them."""
    names = [plugin.name for plugin in active_plugins()]
    others = sorted(set(packages) - set(trusted_packages()))
    given = {key: values for key, values in {"plugins": names, "allow": others}.items() if values}
    return [
        f"{key}={values[0]}" if len(values) == 1 else f"{key}=[{','.join(values)}]" for key, values in given.items()
    ]


def typed_packages(overrides: Iterable[str]) -> list[str]:
    """Return the packages other than dpm_scales whose classes are named in a run's options, sorted alphabetically."""
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    plain = [one for one in parsed if not one.is_sweep_override() and not one.is_delete()]
    named = [
        {one.key_or_group.rpartition(".")[2]: one.value()} for one in plain if one.key_or_group not in NEVER_STORED
    ]
    return foreign_packages(named)


def _path_option(options: list[str], key: str, sweep: bool) -> str | None:
    """Return the value of the last ``key=…`` without quotes, or None if there is none."""
    values = [a for a in options if a.startswith(f"{key}=")]
    if not values or (sweep and "," in values[-1]):
        return None
    value = OverridesParser.create().parse_override(values[-1]).value()
    return None if value is None else str(value)
