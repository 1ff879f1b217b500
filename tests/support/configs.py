"""The files in configs/, by group and as they stand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from support.shell import CONFIGS


def choices(group: str) -> list[str]:
    """Return the names of the files of a group."""
    return sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))


def raw(path: Path) -> dict[str, Any]:
    """Return a file as it stands, nothing resolved."""
    values: Any = OmegaConf.to_container(OmegaConf.load(path))
    return values
