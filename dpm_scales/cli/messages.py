"""Turn exceptions into one-line messages for users' mistakes."""

from __future__ import annotations

import errno
import sys
import traceback
from collections.abc import Iterator

from hydra.errors import HydraException, InstantiationException, MissingConfigException, OverrideParseException
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException
from yaml import MarkedYAMLError

from dpm_scales.cli.arguments import UnknownFlagError, config_dirs
from dpm_scales.cli.hints import TASK_GROUPS, mistaken_option, option_of_flag, unknown_option
from dpm_scales.cli.plugins import announcing
from dpm_scales.errors import UserError, nearest, suggest

TRACEBACK = "HYDRA_FULL_ERROR"
#: configs of the launchers of Hydra's submitit plugin
SUBMITIT = "hydra/launcher/submitit"

#: error numbers caused by a path that the user named; any other is a defect
PLACE_ERRORS = (errno.ENAMETOOLONG, errno.EACCES, errno.EPERM, errno.EROFS, errno.ELOOP, errno.EIO, errno.ESTALE)


def causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an exception and its chain of causes."""
    link: BaseException | None = error
    while link is not None:
        yield link
        link = link.__cause__


def one_line(error: BaseException, config_name: str = "") -> str | None:
    """Return the one-line message for a user's mistake, or None for a defect.

    Args:
        config_name: the entry point's config; empty within a job, whose config is composed.
    """
    chain = list(causes(error))
    for link in chain:
        if isinstance(link, UnknownFlagError) and config_name:
            return str(UnknownFlagError(link.typed, option_of_flag(config_name, link.key), link.value))
        if isinstance(link, UserError):
            return str(link)
    for link in chain:
        if isinstance(link, MissingConfigException) and str(link.missing_cfg_file).startswith(SUBMITIT):
            return "this launcher needs the submitit plugin: pip install '.[slurm]'"
        if isinstance(link, MissingConfigException) and link.options:
            name = str(link.missing_cfg_file or "").removesuffix(".yaml")
            group, _, choice = name.rpartition("/")
            group = "task" if group in TASK_GROUPS else group
            hint = suggest(choice, link.options)
            if nearest(choice, link.options, sure=True) is None and not config_dirs(sys.argv[1:]):
                hint += "; a config of your own needs --config-dir DIR"
            return f"unknown {group or 'config'} {choice!r}: {hint}{_of_plugins(name)}"
        if isinstance(link, OverrideParseException):
            return f"{link.override!r} is not an option: write KEY=VALUE, and quote values with spaces or brackets"
        if isinstance(link, MissingMandatoryValue):
            return f"{link.full_key or 'a key'} has no value yet; give it on the command line: KEY=VALUE"
        if isinstance(link, ConfigAttributeError | ConfigKeyError) and link.full_key:
            return unknown_option(config_name, str(link.full_key), sys.argv[1:])
    for link in chain:
        if isinstance(link, OSError) and link.errno in PLACE_ERRORS and link.filename is not None:
            return f"{str(link.filename)[:200]!r}: {link.strerror}; choose another place"
    for link in chain:
        if isinstance(link, MarkedYAMLError) and link.problem_mark is not None:
            mark = link.problem_mark
            return f"{mark.name} is not YAML: {link.problem}, line {mark.line + 1}, column {mark.column + 1}"
        path = _config_path(link) if isinstance(link, UnicodeDecodeError) else None
        if path is not None:
            return f"{path} is not UTF-8 text: {link.reason}; save it as UTF-8"  # type: ignore[attr-defined]
    if config_name and (type(error) is ValueError or isinstance(error, HydraException)):
        mistaken = mistaken_option(config_name, sys.argv[1:])
        if mistaken is not None:
            return mistaken
    if isinstance(error, InstantiationException) and len(chain) > 1:
        return None  # an exception in a constructor that `build` does not take for a mistake
    for link in reversed(chain):
        if isinstance(link, HydraException | OmegaConfBaseException):
            lines = [line.strip() for line in str(link).splitlines() if line.strip() and "hydra.cc" not in line]
            return " ".join(lines)
        if type(link).__name__ == "MisconfigurationException":  # of Lightning, which takes seconds to import
            return " ".join(str(link).split())
    return None


def _of_plugins(name: str) -> str:
    """Return the end of a line on an unknown config, GROUP/NAME: which installed packages announce it."""
    group, _, choice = name.rpartition("/")
    found = announcing(group, choice)
    return f"; an installed package announces it: plugins={found[0]}" if found else ""


def _config_path(error: BaseException) -> str | None:
    """Return the path of the config that Hydra was reading when it failed, or None if it was not reading one."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if frame.f_code.co_name == "load_config" and "full_path" in frame.f_locals:
            return str(frame.f_locals["full_path"])
    return None
