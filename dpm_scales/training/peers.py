"""End a run on several ranks with one line if one of them dies.

torchrun then prints its own report, with the message that each rank left in its error file.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from torch import distributed

from dpm_scales.distributed.launch import AGAIN, LostProcessError
from dpm_scales.errors import UserError
from dpm_scales.training.run_folder import only_run

_LOST = re.compile(r"gloo|nccl|connection (reset|closed|refused)|broken pipe", re.IGNORECASE)


@contextmanager
def told_if_one_is_lost(run_dir: Path, main: bool) -> Iterator[None]:
    """Turn the failure of a collective operation, after another rank has died, into one line.

    The first rank reports it; if that has died too, as the run folder's lock shows, the others do.

    Args:
        main: whether this is the first rank.

    Raises:
        LostProcessError: another rank has died.
        SystemExit: the same, and the first rank reports it.
    """
    _leave_message(f"it was killed, or used up the machine's memory; {AGAIN}")
    try:
        yield
    except SystemExit:
        _leave_message(f"it was stopped; {AGAIN}")
        raise
    except UserError as error:
        _leave_message(str(error))
        raise
    except Exception as error:
        _leave_message(None)
        if not is_lost(error):
            raise
        _leave_message(f"another process was gone; {AGAIN}")
        if not main and _is_held(run_dir):
            raise SystemExit(LostProcessError.status) from None
        raise LostProcessError(f"another process of this run is gone, and this one ends too; {AGAIN}") from error
    _leave_message(None)


def is_lost(error: BaseException) -> bool:
    """Return whether an exception means that another rank no longer answers."""
    several = distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
    known = isinstance(error, distributed.DistError) or _LOST.search(str(error)) is not None
    return several and isinstance(error, RuntimeError) and known


def _is_held(run_dir: Path) -> bool:
    try:
        with only_run(run_dir):
            return False
    except UserError:
        return True


def _leave_message(text: str | None) -> None:
    """Write the message that torchrun reports if this rank fails; None removes it."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not file:
        return
    with suppress(OSError):
        if text is None:
            Path(file).unlink(missing_ok=True)
        else:
            more = {"timestamp": str(int(time.time()))}  # without a call stack, which torchrun would show instead
            Path(file).write_text(json.dumps({"message": {"message": text, "extraInfo": more}}))
