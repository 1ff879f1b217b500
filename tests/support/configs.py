"""The files in configs/, by group and unresolved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from support.shell import CONFIGS


def choices(group: str) -> list[str]:
    """Return the names of the files of a group."""
    return sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))


def raw(path: Path) -> dict[str, Any]:
    """Return the content of a file, unresolved."""
    values: Any = OmegaConf.to_container(OmegaConf.load(path))
    return values
