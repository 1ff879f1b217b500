"""The last line of a checkpoint: format, training step, SHA-256 of the bytes before it. Read without torch."""

from __future__ import annotations

import re
from pathlib import Path
from typing import BinaryIO

from dpm_scales.errors import UserError
from dpm_scales.storage import open_regular

VERSION = 3
"""Format version of checkpoints, exports and their recipes; 3 added checksums."""

_SEAL = re.compile(rb"\ndpm_scales checkpoint (\d{4}) step (\d{12}) sha256 ([0-9a-f]{64})\n")
_SEAL_BYTES = len("\ndpm_scales checkpoint 0000 step 000000000000 sha256 \n") + 64


def checkpoint_step(path: Path) -> int | None:
    """Return the training step of a checkpoint, reading only its last line; None if `path` is not a checkpoint."""
    try:
        with open_regular(path) as file:
            found, _ = read_seal(file)
    except (OSError, UserError):
        return None
    return int(found[2]) if found else None


def read_seal(file: BinaryIO) -> tuple[re.Match[bytes] | None, int]:
    """Return the match of a checkpoint's last line, None for other files, and the number of bytes before it."""
    size = max(file.seek(0, 2) - _SEAL_BYTES, 0)
    file.seek(size)
    return _SEAL.fullmatch(file.read(_SEAL_BYTES)), size
