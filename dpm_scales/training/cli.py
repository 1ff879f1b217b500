"""What the entry points share: one clear line for a user's mistake, and the way a run is found again.

Hydra is asked for its exceptions instead of its own reports; whatever is not a user's mistake keeps its traceback.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from hydra.errors import ConfigCompositionException, HydraException, InstantiationException, MissingConfigException
from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from dpm_scales.errors import UserError, suggest


def main(entry: Callable[[], None], config_name: str) -> None:
    """Run a `hydra.main` function; exits with status 2 and one line on standard error for a user's mistake."""
    traceback_wanted = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        entry()
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        line = one_line(error, config_name)
        if line is None or traceback_wanted:
            raise
        print(f"error: {line}", file=sys.stderr)
        sys.exit(2)


def one_line(error: BaseException, config_name: str) -> str | None:
    """The line for a user's mistake, None for a defect."""
    chain: list[BaseException] = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    for link in chain:
        if isinstance(link, UserError):
            return str(link)
    for link in chain:
        if isinstance(link, MissingConfigException) and link.options:
            name = str(link.missing_cfg_file or "").removesuffix(".yaml")
            group, _, choice = name.rpartition("/")
            return f"unknown {group or 'config'} {choice!r}: {suggest(choice, link.options)}"
        if isinstance(link, MissingMandatoryValue):
            key = re.search(r"(?:full_key: |mandatory value: )([\w.]+)", str(link))
            return f"{key.group(1) if key else 'a key'} has no value yet; give it on the command line: KEY=VALUE"
    for link in reversed(chain):
        if isinstance(link, ConfigCompositionException | OmegaConfBaseException | HydraException):
            if isinstance(link, InstantiationException):
                continue
            return _shorten(str(link), config_name)
    if isinstance(error, InstantiationException):
        return _instantiation(error, chain[-1])
    return None


def _shorten(message: str, config_name: str) -> str:
    """Hydra's several lines as one, with the nearest key for an unknown one."""
    unknown = re.search(r"Key '([^']+)' is not in struct\s+full_key: (\S+)", message)
    if unknown:
        full = unknown.group(2)
        return f"unknown option {full!r}: {suggest(full, _known_keys(config_name, full))}"
    group = re.search(r"Could not override '([^']+)'\.\s*No match in the defaults list", message)
    if group:
        return f"unknown option {group.group(1)!r}: {suggest(group.group(1), _known_keys(config_name, ''))}"
    lines = [line.strip() for line in message.splitlines() if line.strip() and "hydra.cc" not in line]
    return " ".join(lines)


def _known_keys(config_name: str, full: str) -> list[str]:
    """Keys at the level of `full` in the config with its default choices."""
    from hydra import compose
    from hydra.core.global_hydra import GlobalHydra

    if not GlobalHydra.instance().is_initialized():
        return []
    overrides = [a for a in sys.argv[1:] if re.fullmatch(r"(process|data|network|sampler|target|prior)=\w+", a)]
    node: Any = compose(config_name, overrides=overrides)
    parent = full.rpartition(".")[0]
    for part in filter(None, parent.split(".")):
        if not OmegaConf.is_dict(node) or part not in node:
            return []
        node = node._get_node(part)
    return [f"{parent}.{key!s}".lstrip(".") for key in node] if OmegaConf.is_dict(node) else []


def _instantiation(error: InstantiationException, root: BaseException) -> str | None:
    """Wrong arguments of a config's class: the user's; anything else below it: ours."""
    text = str(root)
    unexpected = re.search(r"(\w+)(?:\.__init__)?\(\) got an unexpected keyword argument '(\w+)'", text)
    if unexpected:
        key = re.search(r"full_key: (\S+)", str(error))
        return f"unknown option {(key.group(1) + '.') if key else ''}{unexpected.group(2)}"
    if isinstance(root, TypeError | ImportError | AttributeError) and "Error locating target" in str(error):
        return _shorten(str(error), "")
    return None


def with_stored_overrides(argv: list[str]) -> list[str]:
    """A resumed run's own overrides, followed by those given now, so that `run_dir=DIR` alone goes on with DIR.

    Raises: UserError if `resume` names a folder without a run.
    """
    given = dict(a.split("=", 1) for a in argv if re.match(r"(run_dir|resume)=", a))
    if "resume" in given and given["resume"] not in ("null", ""):
        folder = Path(given["resume"])
        if not (folder / "overrides.yaml").is_file():
            raise UserError(f"resume={folder}: no run there (it would hold overrides.yaml)")
        argv = [a for a in argv if not a.startswith(("resume=", "run_dir="))] + [f"run_dir={folder}"]
    elif "run_dir" in given and not {"-m", "--multirun"} & set(argv):
        folder = Path(given["run_dir"])
    else:
        return argv
    stored_file = folder / "overrides.yaml"
    if not stored_file.is_file():
        return argv
    stored = [o for o in yaml.safe_load(stored_file.read_text()) if not o.startswith(("run_dir=", "resume="))]
    keys = {a.split("=", 1)[0] for a in argv}
    return [o for o in stored if o.split("=", 1)[0] not in keys] + argv
