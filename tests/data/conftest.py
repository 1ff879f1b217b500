"""Tar shards of numbered images, in a folder and on a server, for the tests of shards."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from dpm_scales.shards import fetch as fetching
from support.shards import Faults, packed, served


@pytest.fixture
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of a test, and pauses of no time between tries."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("DPM_SCALES_CACHE", str(folder))
    monkeypatch.setattr(fetching, "FIRST_PAUSE", 0.0)
    return folder


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
