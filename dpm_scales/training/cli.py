"""What the entry points share: one clear line for a user's mistake, and the way a run is found again.

Hydra is asked for its exceptions instead of its own reports. A user's mistake ends with one line on standard error and
status 2; whatever is not one keeps its traceback. HYDRA_FULL_ERROR=1 gives the traceback of both.
"""

from __future__ import annotations

import errno
import functools
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from typing import NoReturn, TypeVar

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, InstantiationException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from dpm_scales.errors import UserError, printable, require, suggest
from dpm_scales.training.arguments import (
    ALIASES,
    CONFIGS,
    HELP_FLAGS,
    NEVER_EMPTY,
    TRAIN,
    UnknownFlagError,
    tidy,
    with_stored_overrides,
)
from dpm_scales.training.building import arguments_of, locate, plain
from dpm_scales.training.configs import all_groups, switches
from dpm_scales.training.hints import TASK_GROUPS, option_of_flag, unknown_option
from dpm_scales.training.stored import key_of
from dpm_scales.training.switches import check_switches

__all__ = ["CONFIGS", "TRAIN", "is_sweep", "job", "main", "one_line", "tidy", "with_stored_overrides"]

Result = TypeVar("Result")

TRACEBACK = "HYDRA_FULL_ERROR"
#: the user's own wish for tracebacks; Hydra's variable is set in any case, or Hydra would not hand us its exceptions
WISH = "DPM_SCALES_TRACEBACK"
#: what the operating system says of a place that the user named; anything else is a defect
PLACE_ERRORS = (errno.ENAMETOOLONG, errno.EACCES, errno.EPERM, errno.EROFS, errno.ELOOP, errno.EIO, errno.ESTALE)


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
            _prepare(cfg)
            return function(cfg)
        except Exception as error:
            line = one_line(error)
            if line is None or os.environ.get(WISH) == "1":
                raise
            if not is_sweep():
                _fail(line, error)
            _say(f"failed: {' '.join(HydraConfig.get().overrides.task)}: {line}")
            raise UserError(line) from None

    return run


def main(entry: Callable[[], None], config_name: str) -> None:
    """Run a `hydra.main` function; exits with status 2 and one line on standard error for a user's mistake."""
    os.environ.setdefault(WISH, os.environ.get(TRACEBACK, "0"))  # processes started from here inherit it
    os.environ[TRACEBACK] = "1"
    os.environ.setdefault("OC_CAUSE", "0")  # under a debugger OmegaConf would chain what its message already says
    warnings.formatwarning = lambda message, *_args, **_kwargs: _line(f"warning: {message}") + "\n"
    try:
        sys.argv[1:] = tidy(sys.argv[1:], ALIASES.get(config_name, {}))
        if not set(HELP_FLAGS).isdisjoint(sys.argv[1:]):
            from dpm_scales.training.help import help_text

            with suppress(BrokenPipeError):  # a pager that has seen enough
                print(help_text(config_name, sys.argv[1:]), flush=True)
            return
        entry()
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        line = one_line(error, config_name)
        if line is None or os.environ[WISH] == "1":
            raise
        _fail(line, error)


def _prepare(cfg: DictConfig) -> None:
    """Make the config of a job what the code below may rely on, while torch is loaded.

    Raises: UserError for empty paths, wherever they come from, and for switches that are neither true nor false.
    """
    for key in NEVER_EMPTY:
        value = OmegaConf.select(cfg, key)
        require(not isinstance(value, str) or bool(value.strip()), f"{key} is empty; give it a value, or leave it out")
    declared = switches(HydraConfig.get().job.config_name)
    check_switches(plain(cfg), declared, built=False)
    with loading("torch"):
        import_module("torch")
        forget_old_options(cfg, HydraConfig.get().overrides.task)
        check_switches(plain(cfg), declared, built=True)


@contextmanager
def loading(what: str) -> Iterator[None]:
    """On a terminal, say what takes its time meanwhile; the line is gone afterwards."""
    shown = sys.stderr.isatty() and os.environ.get("LOCAL_RANK", "0") == "0"
    if shown:
        print(f"loading {what} …", end="", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        if shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def forget_old_options(cfg: DictConfig, overrides: Iterable[str]) -> None:
    """Remove what belongs to the class that `KEY._target_=…` has replaced: options that the new class does not take.

    Those that were given on the command line stay, for the class to refuse.
    """
    given = [key_of(override) for override in overrides]
    for key in [key.removesuffix("._target_") for key in given if key.endswith("._target_")]:
        node = OmegaConf.select(cfg, key)
        if not OmegaConf.is_dict(node) or key == "trainer":  # whose options the run reads itself
            continue
        taken = arguments_of(locate(node.get("_target_")))
        for name in list(node):
            typed = any(one == f"{key}.{name}" or one.startswith(f"{key}.{name}.") for one in given)
            if not (str(name).startswith("_") or typed or taken is None or name in taken):
                with open_dict(node):
                    del node[name]


def _line(text: str) -> str:
    """One line for a terminal, whatever names of files and keys it holds."""
    return printable(" ".join(text.split()))


def _say(text: str) -> None:
    """The one place where errors are printed."""
    print(_line(text), file=sys.stderr, flush=True)


def _fail(line: str, error: BaseException) -> NoReturn:
    _say(f"error: {line}")
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
        if isinstance(link, UnknownFlagError) and config_name:
            return str(UnknownFlagError(link.typed, option_of_flag(config_name, link.key), link.value))
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
        return _not_a_name(config_name)
    if isinstance(error, InstantiationException):
        return _instantiation(error, chain[-1])
    for link in chain:
        if isinstance(link, OSError) and link.errno in PLACE_ERRORS and link.filename is not None:
            return f"{str(link.filename)[:200]!r}: {link.strerror}; choose another place"
    for link in reversed(chain):
        if isinstance(link, HydraException | OmegaConfBaseException):
            return _shorten(str(link), config_name)
        if type(link).__name__ == "MisconfigurationException":  # Lightning's; importing it would take seconds
            return " ".join(str(link).split())
    return None


def _not_a_name(config_name: str) -> str:
    """The line for a config group that is given null, a number or a switch."""
    key, value = "a config group", "null"
    for argument in sys.argv[1:]:
        name, equals, rest = argument.partition("=")
        if equals and name in all_groups(config_name):
            chosen = OverridesParser.create().parse_override(argument).value()
            key, value = (key, value) if isinstance(chosen, str | list) else (name, rest)
    return f"{key} is chosen by a name, and can't be {value}; leave it out for the default"


def _shorten(message: str, config_name: str) -> str:
    """Hydra's several lines as one, with the nearest key for an unknown one."""
    unknown = re.search(r"Key '([^']+)' is not in struct\s+full_key: (\S+)", message)
    if unknown:
        return unknown_option(config_name, unknown.group(2), sys.argv[1:])
    no_group = re.search(r"Could not override '([^']+)'\.\s*No match in the defaults list", message)
    found = no_group or re.search(r"Could not delete from config\. '([^']+)' does not exist", message)
    if found:
        return unknown_option(config_name, found.group(1), sys.argv[1:])
    if "hydra/launcher/submitit" in message:
        return "this launcher needs the submitit plugin: pip install '.[slurm]'"
    lines = [line.strip() for line in message.splitlines() if line.strip() and "hydra.cc" not in line]
    return " ".join(lines)


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
