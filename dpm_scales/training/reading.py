"""Reading small files of plain values, without importing torch: what a command line needs before there is work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from dpm_scales.errors import UserError, require
from dpm_scales.storage import open_regular

MAX_CONFIG_BYTES = 2**20


def read_yaml(path: Path) -> Any:
    """Plain values of a YAML file, which constructs nothing. Raises UserError for anything else."""
    try:
        with open_regular(path) as file:
            text = file.read(MAX_CONFIG_BYTES + 1)
        require(len(text) <= MAX_CONFIG_BYTES, f"{path} is larger than {MAX_CONFIG_BYTES} bytes: no config of ours")
        return yaml.safe_load(text.decode())
    except (yaml.YAMLError, ValueError, RecursionError, OSError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is not YAML: {error or type(error).__name__}") from error
