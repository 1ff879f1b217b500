"""Name the folders of runs and sweeps by their options, so that a repeated command finds its earlier results."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Sequence
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from dpm_scales.cli.stored import key_of
from dpm_scales.errors import UserError
from dpm_scales.storage import read_yaml
from dpm_scales.tables import short_numbers

RUNS, SWEEPS = Path("runs"), Path("sweeps")
#: options that determine where or on what device to run, not the result; names omit them
UNNAMED = (
    *("run_dir", "resume", "allow", "plugins", "trainer.devices", "trainer.num_nodes", "trainer.accelerator"),
    *("trainer.enable_progress_bar", "hydra"),
)
LONGEST_NAME = 80  # characters, before the hash


def run_folder(root: Path, overrides: Sequence[str], constant: Collection[str] = ()) -> Path:
    """Return the folder below `root` for the run with these options: the existing one, or a new one.

    Args:
        overrides: the run's options, ``KEY=VALUE``, in any order.
        constant: keys that all runs of the sweep share; the name omits them.
    """
    new, plain = root / run_name(overrides, constant), root / plain_name(overrides)
    return plain if plain.is_dir() and not new.exists() else new


def plain_name(overrides: Sequence[str]) -> str:
    """Return the name of a run's folder that shows all options unchanged, as in earlier versions."""
    named = sorted(filter(_names, overrides))
    return _name(named, named)


def run_name(overrides: Sequence[str], constant: Collection[str] = ()) -> str:
    """Return a run's folder name, the same for the same options in any order; "default" without any.

    A hash of all options is appended if one is omitted, rounded or respelled, so that different options never share a
    folder.
    """
    named = _named(overrides)
    return _name([short_numbers(o) for o in named if key_of(o) not in constant], named)


def sweep_folder(overrides: Sequence[str]) -> Path:
    """Return the folder of a sweep without `run_dir`, named by its options, those that vary first.

    A sweep that an earlier version began in runs/ stays there.
    """
    varied = varied_keys(overrides)
    named = sorted(_named(overrides), key=lambda o: key_of(o) not in varied)
    folder = SWEEPS / _name([short_numbers(o) for o in named], named)
    return RUNS if not folder.exists() and _begun_in_runs(named, varied) else folder


def varied_keys(overrides: Sequence[str]) -> list[str]:
    """Return the keys of the options with several values, in the given order."""
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    return [key_of(o.input_line or "") for o in parsed if o.is_sweep_override()]


def _named(overrides: Sequence[str]) -> list[str]:
    """Return the options that name a run, in alphabetical order; of repeated ones the last, which takes effect."""
    return sorted({o.partition("=")[0]: o for o in overrides if _names(o)}.values())


def _names(override: str) -> bool:
    return not override.lstrip("+~").startswith(UNNAMED)


def _name(shown: Sequence[str], named: Sequence[str]) -> str:
    """Return a folder's name that shows some options and identifies all."""
    full = ",".join(named)
    name = re.sub(r"[^A-Za-z0-9=.,_+-]+", "-", ",".join(shown))[:LONGEST_NAME]
    if name != full:
        digest = hashlib.sha256(full.encode()).hexdigest()[:12]
        name = f"{name}-{digest}" if name else digest
    return name or "default"


def _begun_in_runs(named: Sequence[str], varied: Sequence[str]) -> bool:
    """Return whether runs/ is the folder of a sweep with runs that this sweep may have made."""
    if not any((RUNS / name).is_file() for name in ("multirun.yaml", "study.db")):
        return False
    keys = {key_of(o) for o in named}
    constant = _values([o for o in named if key_of(o) not in varied])
    for file in RUNS.glob("*/overrides.yaml"):
        try:
            stored = _values(_named(read_yaml(file)))
        except (UserError, HydraException, TypeError, AttributeError):  # not options of this package
            continue
        if stored.keys() == keys and constant.items() <= stored.items():
            return True
    return False


def _values(overrides: Sequence[str]) -> dict[str, str]:
    """Return the values of the options with a single value, by key, as Hydra spells them."""
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    return {key_of(o.input_line or ""): o.get_value_element_as_str() for o in parsed}
