"""Tar shards of numbered images, in a folder and on a server, for the tests of shards."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.shards import Faults, packed, served


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 numbered images in five shards."""
    folder = tmp_path_factory.mktemp("set") / "shards"
    packed(folder, 40)
    return folder


@pytest.fixture
def copied(shards: Path, tmp_path: Path) -> Path:
    """The same, to be spoilt."""
    return Path(shutil.copytree(shards, tmp_path / "shards"))


@pytest.fixture
def server(shards: Path, tmp_path: Path) -> Iterator[tuple[str, Faults, Path]]:
    """Address, faults, and the folder that is served."""
    copy = Path(shutil.copytree(shards, tmp_path / "served"))
    with served(copy, stall=0.3) as (url, faults):
        yield url, faults, copy
