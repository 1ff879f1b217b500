"""What the entry points share: one clear line for a user's mistake, and the way a run is found again.

Hydra is asked for its exceptions instead of its own reports. A user's mistake ends with one line on standard error and
status 2; whatever is not one keeps its traceback. HYDRA_FULL_ERROR=1 gives the traceback of both.
"""

from __future__ import annotations

import functools
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, InstantiationException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from dpm_scales.errors import UserError, require, suggest
from dpm_scales.training.stored import key_of, stored_overrides

Result = TypeVar("Result")

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
TRAIN = CONFIGS.with_name("train.py")
TRACEBACK = "HYDRA_FULL_ERROR"
#: the user's own wish for tracebacks; Hydra's variable is set in any case, or Hydra would not hand us its exceptions
WISH = "DPM_SCALES_TRACEBACK"
SWEEP_FLAGS = ("-m", "--multirun")
#: options whose values are paths: they may hold what Hydra's grammar wants in quotes (run folders hold = and ,)
PATHS = (
    *("run_dir", "resume", "model", "out", "reference", "inception", "folder", "data.root", "data.path"),
    *("image", "mask", "background", "foreground", "start", "end", "samples", "yardstick"),
)
#: options that are lists, which may be given without their brackets
LISTS = ("labels", "guidance_interval")
#: options of an entry point that Hydra would take for one of the config groups, or that had another name once
ALIASES = {"evolve": {"data": "folder", "processes.dpm": "processes.vp"}, "sample": {"task": "edit"}}
#: config groups whose choices are tasks
TASK_GROUPS = ("task", "edit")
PLAIN_VALUE = re.compile(r"""null|\$\{.*|".*"|'.*'|[A-Za-z_./][A-Za-z0-9_./+-]*""", re.DOTALL)


def is_sweep() -> bool:
    """Whether this job is one of several."""
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def job(function: Callable[[DictConfig], Result]) -> Callable[[DictConfig], Result]:
    """Decorator below `hydra.main`: a single run ends here with its line, before Hydra adds lines of its own.

    A run of a sweep says its line at once, since at the end Hydra hands on the first failure alone.
    """

    @functools.wraps(function)
    def run(cfg: DictConfig) -> Result:
        try:
            return function(cfg)
        except Exception as error:
            line = one_line(error)
            if line is None or os.environ.get(WISH) == "1":
                raise
            if not is_sweep():
                _fail(line, error)
            print(f"failed: {' '.join(HydraConfig.get().overrides.task)}: {line}", file=sys.stderr, flush=True)
            raise UserError(line) from None

    return run


def main(entry: Callable[[], None], config_name: str) -> None:
    """Run a `hydra.main` function; exits with status 2 and one line on standard error for a user's mistake."""
    os.environ.setdefault(WISH, os.environ.get(TRACEBACK, "0"))  # processes started from here inherit it
    os.environ[TRACEBACK] = "1"
    os.environ.setdefault("OC_CAUSE", "0")  # under a debugger OmegaConf would chain what its message already says
    aliases = ALIASES.get(config_name, {})
    sys.argv[1:] = tidy([f"{_renamed(key, aliases)}{rest}" for key, rest in map(_split, sys.argv[1:])])
    warnings.formatwarning = lambda message, *_args, **_kwargs: f"warning: {' '.join(str(message).split())}\n"
    try:
        entry()
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        line = one_line(error, config_name)
        if line is None or os.environ[WISH] == "1":
            raise
        _fail(line, error)


def tidy(argv: list[str]) -> list[str]:
    """Arguments as Hydra wants them.

    Flags first; quotes around the paths that need them; brackets around lists, where no sweep goes through them; and an
    object in place of another, `KEY={_target_:…}`, which
    Hydra would merge with the one that is there, as removal and addition.
    """
    sweep = bool(set(SWEEP_FLAGS) & set(argv))
    flags = [a for a in argv if a in SWEEP_FLAGS]
    options = []
    for argument in argv:
        key, equals, value = argument.partition("=")
        if argument in SWEEP_FLAGS:
            continue
        several = value.startswith("{") or (sweep and "," in value)
        if key in PATHS and equals and not PLAIN_VALUE.fullmatch(value) and not several:
            mark = '"' if "'" in value else "'"
            options.append(f"{key}={mark}{value}{mark}")
        elif key in LISTS and "," in value and value[0] not in "[{'\"" and not sweep:
            options.append(f"{key}=[{value}]")
        elif value.startswith("{") and "_target_" in value and key[0] not in "+~":
            options += [f"~{key}", f"+{key}={value}"]
        else:
            options.append(argument)
    return flags + options


def _renamed(key: str, aliases: dict[str, str]) -> str:
    """Replace the name of an option, or of the config that it is an option of, by what `aliases` calls it."""
    name = key.lstrip("+~")
    for old, new in aliases.items():
        if name == old or name.startswith(f"{old}."):
            return key[: len(key) - len(name)] + new + name[len(old) :]
    return key


def _split(argument: str) -> tuple[str, str]:
    """Key, and the rest with its equals sign."""
    key, equals, value = argument.partition("=")
    return key, equals + value


def _fail(line: str, error: BaseException) -> NoReturn:
    print(f"error: {line}", file=sys.stderr)
    sys.exit(next((link.status for link in _causes(error) if isinstance(link, UserError)), 2))


def _causes(error: BaseException) -> Iterator[BaseException]:
    link: BaseException | None = error
    while link is not None:
        yield link
        link = link.__cause__


def one_line(error: BaseException, config_name: str = "") -> str | None:
    """The line for a user's mistake, None for a defect."""
    chain = list(_causes(error))
    for link in chain:
        if isinstance(link, UserError):
            return str(link)
    for link in chain:
        if isinstance(link, MissingConfigException) and link.options:
            name = str(link.missing_cfg_file or "").removesuffix(".yaml")
            group, _, choice = name.rpartition("/")
            group = "task" if group in TASK_GROUPS else group
            return f"unknown {group or 'config'} {choice!r}: {suggest(choice, link.options)}"
        if isinstance(link, OverrideParseException):
            return f"{link.override!r} is not an option: write KEY=VALUE, and quote values with spaces or brackets"
        if isinstance(link, MissingMandatoryValue):
            key = re.search(r"(?:full_key: |mandatory value: )([\w.]+)", str(link))
            return f"{key.group(1) if key else 'a key'} has no value yet; give it on the command line: KEY=VALUE"
    if type(error) is ValueError and "Config group override must be a string" in str(error):  # Hydra's
        group = next((a.partition("=")[0] for a in sys.argv if a.endswith("=null")), "a config group")
        return f"{group} is chosen by a name, and can't be null; leave it out for the default"
    if isinstance(error, InstantiationException):
        return _instantiation(error, chain[-1])
    for link in reversed(chain):
        if isinstance(link, HydraException | OmegaConfBaseException):
            return _shorten(str(link), config_name)
        if type(link).__name__ == "MisconfigurationException":  # Lightning's; importing it would take seconds
            return " ".join(str(link).split())
    return None


def _shorten(message: str, config_name: str) -> str:
    """Hydra's several lines as one, with the nearest key for an unknown one."""
    unknown = re.search(r"Key '([^']+)' is not in struct\s+full_key: (\S+)", message)
    if unknown:
        return _unknown(config_name, unknown.group(2))
    no_group = re.search(r"Could not override '([^']+)'\.\s*No match in the defaults list", message)
    found = no_group or re.search(r"Could not delete from config\. '([^']+)' does not exist", message)
    if found:
        return _unknown(config_name, found.group(1))
    if "hydra/launcher/submitit" in message:
        return "this launcher needs the submitit plugin: pip install '.[slurm]'"
    lines = [line.strip() for line in message.splitlines() if line.strip() and "hydra.cc" not in line]
    return " ".join(lines)


def _groups(config_name: str) -> list[str]:
    """Config groups of an entry point; `experiment`, which may lie elsewhere and has no keys of its own, apart."""
    defaults = yaml.safe_load((CONFIGS / f"{config_name}.yaml").read_text())["defaults"]
    names = [key for entry in defaults if isinstance(entry, dict) for key in entry]
    return [name for name in names if name != "experiment" and not name.startswith("override")]


def _unknown(config_name: str, full: str) -> str:
    """The line for an option that is not there, with the nearest one that is."""
    if not config_name:  # not given, but asked for by our own code
        return f"the option {full!r} was removed, and is needed; leave it as it is"
    for group in set(TASK_GROUPS) & set(_groups(config_name)):
        tasks = [path for path in sorted((CONFIGS / group).glob("*.yaml")) if full in yaml.safe_load(path.read_text())]
        if tasks:
            return f"unknown option {full!r}: it belongs to {' and '.join(f'task={path.stem}' for path in tasks)}"
    return f"unknown option {full!r}: {suggest(full, _known_keys(config_name, full))}"


def _known_keys(config_name: str, full: str) -> list[str]:
    """Keys at the level of `full` in the config with the choices made on the command line."""
    groups = "|".join(_groups(config_name))
    choices = [a for a in sys.argv[1:] if re.fullmatch(rf"({groups})=\w+", a)]
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        node: Any = compose(config_name, overrides=choices)
    parent = full.rpartition(".")[0]
    for part in filter(None, parent.split(".")):
        if not OmegaConf.is_dict(node) or part not in node:
            return []
        node = node._get_node(part)
    if not OmegaConf.is_dict(node):
        return []
    chosen = ["experiment"] if config_name == "train" and not parent else []  # leaves no key of its own behind
    return chosen + [f"{parent}.{key!s}".lstrip(".") for key in node if key != "_target_"]


def _instantiation(error: InstantiationException, root: BaseException) -> str | None:
    """Arguments that a config's class does not take: the user's mistake; anything else below it: ours."""
    text = " ".join(str(root).split()) or type(root).__name__
    key = re.search(r"full_key: (\S+)", str(error))
    target = re.search(r"target '([\w.]+)'", str(error))
    where = key.group(1) if key else target.group(1) if target else "config"
    unexpected = re.search(r"got an unexpected keyword argument '(\w+)'", text)
    if unexpected:
        return f"unknown option {where}.{unexpected.group(1)}"
    if isinstance(root, InstantiationException):
        return text
    if isinstance(root, TypeError | ValueError | ImportError | AttributeError) or "Misconfig" in type(root).__name__:
        return f"{where}: {text} ({TRACEBACK}=1 shows where)"
    return None


def with_stored_overrides(argv: list[str]) -> list[str]:
    """A resumed run's own overrides, followed by those given now, so that `run_dir=DIR` alone goes on with DIR.

    Raises: UserError if `resume` names a folder without a run, if its options are damaged or could do harm, and for
    a sweep of one run.
    """
    sweep = bool(set(SWEEP_FLAGS) & set(argv))
    checks = [a for a in argv if key_of(a) == "check_resume" and not a.lower().endswith("=false")]
    require(not (sweep and checks), "check_resume=true checks one run; leave -m out")  # before Hydra makes a folder
    resume = _path_option(argv, "resume")
    if resume is not None:
        require(not sweep, "resume goes on with one run; the same sweep once more goes on with all of its runs")
        require((Path(resume) / "overrides.yaml").is_file(), f"resume={resume}: no run there")
        argv = tidy([a for a in argv if not a.startswith(("resume=", "run_dir="))] + [f"run_dir={resume}"])
    folder = _path_option(argv, "run_dir")
    if folder is None or sweep:
        return argv
    stored_file = Path(folder) / "overrides.yaml"
    if not stored_file.is_file():
        return argv
    keys = {key_of(a) for a in argv} | {"run_dir", "resume"}
    return [*stored_overrides(stored_file, keys, PATHS), *argv]


def _path_option(argv: list[str], key: str) -> str | None:
    """Value of the last ``key=…``, without its quotes; None for none."""
    values = [a for a in argv if a.startswith(f"{key}=")]
    if not values or (set(SWEEP_FLAGS) & set(argv) and "," in values[-1]):
        return None
    value = OverridesParser.create().parse_override(values[-1]).value()
    return None if value in (None, "") else str(value)
