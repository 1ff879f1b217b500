"""Run the entry points: report a user's mistake in one line, and find stored runs again.

Hydra is made to raise its exceptions instead of reporting them itself. A user's mistake ends with one line on standard
error and status 2; any other error keeps its traceback. HYDRA_FULL_ERROR=1 shows the traceback of both.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import NoReturn, TypeVar

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

from dpm_scales.cli.arguments import (
    ALIASES,
    CURVES,
    HELP_FLAGS,
    NEVER_EMPTY,
    config_dirs,
    tidy,
    typed_plugins,
    with_stored_overrides,
)
from dpm_scales.cli.configs import switches
from dpm_scales.cli.messages import TRACEBACK, causes, one_line
from dpm_scales.cli.output import complain, fail, lasting_output, one_line_warnings
from dpm_scales.cli.plugins import activate, apply_plugins, class_choices
from dpm_scales.cli.stored import key_of
from dpm_scales.cli.switches import check_switches
from dpm_scales.errors import UserError, require
from dpm_scales.models.instantiate import CONFIGS, arguments_of, locate, plain

__all__ = ["CONFIGS", "is_sweep", "job", "main", "one_line", "tidy", "with_stored_overrides"]

Result = TypeVar("Result")

#: variable that keeps the user's HYDRA_FULL_ERROR; Hydra's own is always set, or it would not raise its exceptions
WISH = "DPM_SCALES_TRACEBACK"


def is_sweep() -> bool:
    """Return whether this job is part of a sweep."""
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def job(function: Callable[[DictConfig], Result]) -> Callable[[DictConfig], Result]:
    """Wrap the function that `hydra.main` calls, so that a user's mistake ends in one line without Hydra's own output.

    A run of a sweep prints its line at once, since Hydra raises only the first failure, at the end.
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
            complain(f"failed: {' '.join(HydraConfig.get().overrides.task)}: {line}")
            raise UserError(line) from None

    return run


def main(entry: Callable[[], None], config_name: str) -> None:
    """Run a `hydra.main` function; for a user's mistake, print one line on standard error and exit with status 2."""
    os.environ.setdefault(WISH, os.environ.get(TRACEBACK, "0"))  # inherited by child processes
    os.environ[TRACEBACK] = "1"
    os.environ.setdefault("OC_CAUSE", "0")  # else OmegaConf repeats its message under a debugger
    one_line_warnings()
    try:
        with lasting_output():
            _require_folder()
            aliases = ALIASES.get(config_name, {})
            curves = CURVES.get(config_name, {})
            argv = tidy(sys.argv[1:], aliases, curves=curves)
            for place in config_dirs(argv):
                require("://" in place or Path(place).is_dir(), f"--config-dir {place}: no such folder")
            activate(typed_plugins(argv))
            sys.argv[1:] = tidy(argv, aliases, class_choices(), curves)
            if not set(HELP_FLAGS).isdisjoint(sys.argv[1:]):
                from dpm_scales.cli.help import help_text

                print(help_text(config_name, sys.argv[1:]))
            else:
                entry()
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        line = one_line(error, config_name)
        if line is None or os.environ[WISH] == "1":
            raise
        _fail(line, error)


def _require_folder() -> None:
    try:
        os.getcwd()
    except OSError as error:
        raise UserError(f"the current folder: {error.strerror}; change to one that exists") from error


def _prepare(cfg: DictConfig) -> None:
    """Normalise and check the config of a job while torch is loaded.

    Raises: UserError for empty paths, wherever they come from, and for switches that are neither true nor false.
    """
    for key in NEVER_EMPTY:
        value = OmegaConf.select(cfg, key)
        require(not isinstance(value, str) or bool(value.strip()), f"{key} is empty; give it a value, or leave it out")
    apply_plugins(cfg)
    declared = switches(HydraConfig.get().job.config_name)
    check_switches(plain(cfg), declared, built=False)
    with loading("torch"):
        import_module("torch")
        forget_old_options(cfg, HydraConfig.get().overrides.task)
        check_switches(plain(cfg), declared, built=True)


@contextmanager
def loading(what: str) -> Iterator[None]:
    """Show on a terminal what is being loaded while the body runs, and erase the line afterwards."""
    shown = sys.stderr.isatty() and os.environ.get("LOCAL_RANK", "0") == "0"
    if shown:
        print(f"loading {what} …", end="", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        if shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def forget_old_options(cfg: DictConfig, overrides: Iterable[str]) -> None:
    """Remove the options of a class replaced by `KEY._target_=…` that the new class does not accept.

    Options given on the command line are kept, so that the class can refuse them.
    """
    given = [key_of(override) for override in overrides]
    for key in [key.removesuffix("._target_") for key in given if key.endswith("._target_")]:
        node = OmegaConf.select(cfg, key)
        if not OmegaConf.is_dict(node) or key == "trainer":  # the run reads its options itself
            continue
        taken = arguments_of(locate(node.get("_target_")))
        for name in list(node):
            typed = any(one == f"{key}.{name}" or one.startswith(f"{key}.{name}.") for one in given)
            if not (str(name).startswith("_") or typed or taken is None or name in taken):
                with open_dict(node):
                    del node[name]


def _fail(line: str, error: BaseException) -> NoReturn:
    fail(line, next((link.status for link in causes(error) if isinstance(link, UserError)), 2))
