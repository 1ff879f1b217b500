"""Turn exceptions into one-line messages for users' mistakes."""

from __future__ import annotations

import errno
import re
import sys
import traceback
from collections.abc import Iterator

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, InstantiationException, MissingConfigException, OverrideParseException
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from yaml import MarkedYAMLError

from dpm_scales.cli.arguments import (
    UnknownFlagError,
)
from dpm_scales.cli.configs import all_groups
from dpm_scales.cli.hints import TASK_GROUPS, option_of_flag, unknown_option
from dpm_scales.errors import UserError, suggest

TRACEBACK = "HYDRA_FULL_ERROR"

#: error numbers caused by a path that the user named; any other is a defect
PLACE_ERRORS = (errno.ENAMETOOLONG, errno.EACCES, errno.EPERM, errno.EROFS, errno.ELOOP, errno.EIO, errno.ESTALE)


def causes(error: BaseException) -> Iterator[BaseException]:
    link: BaseException | None = error
    while link is not None:
        yield link
        link = link.__cause__


def one_line(error: BaseException, config_name: str = "") -> str | None:
    """Return the one-line message for a user's mistake, or None for a defect."""
    chain = list(causes(error))
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
    if type(error) is ValueError and "Config group override must be a string" in str(error):  # raised by Hydra
        return _not_a_name(config_name)
    if isinstance(error, InstantiationException):
        return _instantiation(error, chain[-1])
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
    for link in reversed(chain):
        if isinstance(link, HydraException | OmegaConfBaseException):
            return _shorten(str(link), config_name)
        if type(link).__name__ == "MisconfigurationException":  # of Lightning, which takes seconds to import
            return " ".join(str(link).split())
    return None


def _config_path(error: BaseException) -> str | None:
    """Return the path of the config that Hydra was reading when it failed, or None if it was not reading one."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if frame.f_code.co_name == "load_config" and "full_path" in frame.f_locals:
            return str(frame.f_locals["full_path"])
    return None


def _not_a_name(config_name: str) -> str:
    """Return the message for a config group that is set to null, a number or a boolean."""
    key, value = "a config group", "null"
    for argument in sys.argv[1:]:
        name, equals, rest = argument.partition("=")
        if equals and name in all_groups(config_name):
            chosen = OverridesParser.create().parse_override(argument).value()
            key, value = (key, value) if isinstance(chosen, str | list) else (name, rest)
    return f"{key} is chosen by a name, and can't be {value}; leave it out for the default"


def _shorten(message: str, config_name: str) -> str:
    """Return Hydra's multi-line message as one line; for an unknown key, with the most similar one."""
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
    """Return the message for an object that can't be built from its config's arguments, or None for a defect."""
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
