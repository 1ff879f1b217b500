"""Work of further ranks in tests; their interpreters import this, so it imports nothing heavy."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path


def note(folder: str) -> None:
    """Write this rank's variables and process number, under its rank."""
    names = ("WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    words = [str(os.getpid()), *(os.environ[name] for name in names)]
    (Path(folder) / os.environ["RANK"]).write_text(" ".join(words))


def note_and_wait(folder: str) -> None:
    note(folder)
    time.sleep(600)


def fail(status: int) -> None:
    sys.exit(status)
