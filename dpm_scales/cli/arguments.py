"""The command line before Hydra reads it: flags, options as Hydra's grammar wants them, and those that a run keeps.

Nothing here imports torch.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser

from dpm_scales.cli.stored import key_of, stored_config_dir, stored_overrides
from dpm_scales.errors import UserError, require, suggest
from dpm_scales.models.instantiate import CONFIGS
from dpm_scales.models.trust import foreign_packages, trusted_names
from dpm_scales.storage import check_names

TRAIN = CONFIGS.with_name("train.py")
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
#: options whose values are paths: they may hold what Hydra's grammar wants in quotes (run folders hold = and ,)
PATHS = (
    *("run_dir", "resume", "model", "out", "reference", "inception", "folder", "data.root", "data.path"),
    *("image", "mask", "background", "foreground", "start", "end", "samples", "yardstick", "prior_images"),
    "evaluation.inception",
)
NEVER_EMPTY = (*PATHS, "logger.save_dir")
#: options that are lists, which may be given without their brackets
LISTS = ("labels", "guidance_interval", "allow")
#: options of an entry point that Hydra would take for one of the config groups, or that had another name once
ALIASES = {
    "evolve": {"data": "folder", "processes.dpm": "processes.vp"},
    "sample": {"task": "edit"},
    "evaluate": {"baseline": "yardstick", "baseline_split": "yardstick_split"},
}
#: further names of choices, by option
CHOICE_ALIASES = {"edit=generate": "edit=draw"}
#: what Hydra, Optuna and submitit write into a sweep's folder
SWEEP_FILES = ("multirun.yaml", "study.db", "study.db-journal", "study.db-wal", "study.db-shm", ".submitit")
PLAIN_VALUE = re.compile(r"""null|\$\{.*|".*"|'.*'|[A-Za-z_./][A-Za-z0-9_./+-]*""", re.DOTALL)
#: one of a list without brackets, in its quotes if it has some, and what Hydra's grammar takes for one value as it is
LIST_ITEM = re.compile(r"""'[^']*'|"[^"]*"|[^,]+""")
PLAIN_ITEM = re.compile(r"""'[^']*'|"[^"]*"|[A-Za-z0-9_./+-]+|\$\{.*""", re.DOTALL)
EMPTY = re.compile(r"""\s*|'\s*'|"\s*\"""")


class UnknownFlagError(UserError):
    """An argument that begins with a dash and is none of Hydra's flags.

    Attributes:
        typed: the argument, with the next one where that is its value.
        key, value: the option that may have been meant, `VALUE` where none was given.
    """

    def __init__(self, typed: str, key: str, value: str) -> None:
        super().__init__(f"{typed}: options are KEY=VALUE: {key}={value}")
        self.typed, self.key, self.value = typed, key, value


def split_flags(argv: Iterable[str]) -> tuple[list[str], list[str]]:
    """Flags, each with its value in one argument, and options.

    Raises: UserError for other arguments that begin with a dash, and for a flag without its value.
    """
    flags, options, rest = [], [], list(argv)
    while rest:
        typed = rest.pop(0)
        name, equals, value = typed.partition("=")
        name = SHORT_FLAGS.get(name, name)
        if name.startswith("--"):  # shortened, as argparse allows it
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
            known = FLAG_CHOICES.get(name, (value,))
            require(value in known, f"unknown {name} {value!r}: {suggest(value, known)}")
            flags.append(f"{name}={value}")
        else:
            whole = typed if alone else f"{typed} {rest[0]}"
            value = value if equals else "VALUE" if alone else rest[0]
            raise UnknownFlagError(whole, name.lstrip("-").replace("-", "_") or "KEY", value)
    return flags, options


def tidy(argv: Iterable[str], aliases: Mapping[str, str] = MappingProxyType({})) -> list[str]:
    """Arguments as Hydra wants them.

    Args:
        aliases: Hydra's names of some keys.

    Returns flags first; quotes around the paths that need them; brackets around lists, where no sweep goes through
    them; an object in place of another, `KEY={_target_:…}`, which Hydra would merge with the one that is there, as
    removal and addition; and the options of another class, `KEY._target_=…`, as such that may be new.

    Raises: UserError for flags that are none, and for paths that are empty.
    """
    flags, given = split_flags(argv)
    sweep = is_multirun(flags)
    keys = [argument.partition("=")[0] for argument in given]
    classes = tuple(key.removesuffix("_target_") for key in keys if key.endswith("._target_") and key[0] not in "+~")
    options = []
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
        elif value.startswith("{") and "_target_" in value and key[0] not in "+~":
            options += [f"~{key}", f"+{key}={value}"]
        elif key.startswith(classes) and not key.endswith("._target_"):
            options.append(f"++{argument}")
        else:
            options.append(argument)
    return flags + options


def _renamed(key: str, aliases: Mapping[str, str]) -> str:
    """Replace the name of an option, or of the config that it is an option of, by what `aliases` calls it."""
    name = key.lstrip("+~")
    for old, new in aliases.items():
        if name == old or name.startswith(f"{old}."):
            return key[: len(key) - len(name)] + new + name[len(old) :]
    return key


def is_multirun(flags: Iterable[str]) -> bool:
    """Whether the flags ask for a sweep."""
    return not set(SWEEP_FLAGS).isdisjoint(flags)


def config_dirs(argv: Iterable[str]) -> list[str]:
    """The user's config folders that the flags of tidy arguments name; Hydra takes the last."""
    return [flag.removeprefix(CONFIG_DIR) for flag in argv if flag.startswith(CONFIG_DIR)][-1:]


def config_flags() -> list[str]:
    """The flags that name the user's config folder in the job that runs, for a command that repeats its options."""
    if not HydraConfig.initialized():
        return []
    sources = HydraConfig.get().runtime.config_sources
    return [f"{CONFIG_DIR}{source.path}" for source in sources if source.provider == "command-line"]


def with_stored_overrides(argv: Iterable[str]) -> list[str]:
    """Flags, a resumed run's own overrides, and those given now, so that `run_dir=DIR` alone resumes the run in DIR.

    Raises: UserError if `resume` names a folder without a run, if its options are damaged, could do harm or need the
    user's config folder, and for a sweep of one run.
    """
    flags, options = split_flags(argv)
    sweep = is_multirun(flags)
    checks = [a for a in options if key_of(a) == "check_resume" and not a.lower().endswith("=false")]
    require(not (sweep and checks), "check_resume=true checks one run; leave -m out")  # before Hydra makes a folder
    resume = _path_option(options, "resume", sweep)
    if resume is not None:
        require(not sweep, "resume goes on with one run; the same sweep once more goes on with all of its runs")
        require((Path(resume) / "overrides.yaml").is_file(), f"resume={resume}: no run there")
        options = tidy([a for a in options if not a.startswith(("resume=", "run_dir="))] + [f"run_dir={resume}"])
    folder = _path_option(options, "run_dir", sweep)
    if sweep and folder is not None:
        check_names(folder, SWEEP_FILES)
    if folder is None or sweep or not (Path(folder) / "overrides.yaml").is_file():
        return [*flags, *options]
    keys = {key_of(a) for a in options} | {"run_dir", "resume"}
    stored = stored_overrides(Path(folder) / "overrides.yaml", keys, PATHS, _allowed(options))
    if not any(key_of(a) == "hydra.searchpath" for a in options):
        _require_configs(stored, Path(folder), config_dirs(flags))
    return [*flags, *stored, *options]


def _require_configs(stored: list[str], run_dir: Path, given: list[str]) -> None:
    """Raise UserError, naming `--config-dir`, for a stored choice of a config that is not there.

    The folder that the run was trained with is named, not opened: configs may import anything.
    """
    for option in stored:
        override = OverridesParser.create().parse_override(option)
        group, value = override.key_or_group, override.value()
        choices = [choice for choice in (value if isinstance(value, list) else [value]) if isinstance(choice, str)]
        places = [place / group for place in (CONFIGS, *map(Path, given))]
        if "." in group or not (CONFIGS / group).is_dir() or override.is_delete():
            continue
        for choice in choices:
            if any((place / f"{choice.removesuffix('.yaml')}.yaml").is_file() for place in places):
                continue
            first = stored_config_dir(run_dir)
            if given:
                seen = f", and --config-dir {shlex.quote(given[0])} holds no {group}/{choice}.yaml"
            else:
                seen = ", a config of your own"
            again = f"--config-dir {shlex.quote(first)} as it was" if first else "the --config-dir that holds it"
            raise UserError(f"{run_dir} was trained with {option}{seen}; give {again}")


def _allowed(options: list[str]) -> tuple[str, ...]:
    """Return the packages of the last ``allow=…`` that was typed."""
    typed = [option for option in options if option.startswith("allow=")][-1:]
    return trusted_names([] if not typed else OverridesParser.create().parse_override(typed[0]).value())


def trust_options() -> list[str]:
    """Return ``allow=[…]`` if the stored options of the job that runs will need it, for a command that resumes it."""
    if not HydraConfig.initialized():
        return []
    parsed = OverridesParser.create().parse_overrides(list(HydraConfig.get().overrides.task))
    plain = [one for one in parsed if not one.is_sweep_override() and not one.is_delete()]
    named = [{one.key_or_group.rpartition(".")[2]: one.value()} for one in plain if one.key_or_group != "allow"]
    packages = foreign_packages(named)
    return [f"allow=[{','.join(packages)}]"] if packages else []


def _path_option(options: list[str], key: str, sweep: bool) -> str | None:
    """Value of the last ``key=…``, without its quotes; None for none."""
    values = [a for a in options if a.startswith(f"{key}=")]
    if not values or (sweep and "," in values[-1]):
        return None
    value = OverridesParser.create().parse_override(values[-1]).value()
    return None if value is None else str(value)
