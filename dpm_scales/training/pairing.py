"""Check the options for pairing images with noises in training, see `processes.pairing`."""

from __future__ import annotations

from dpm_scales.errors import require, require_number, suggest
from dpm_scales.processes import Process

PAIRINGS = ("none", "nearest")
USUAL = 8
MOST = 1024
"""Largest number of candidates: each is a batch of noise to draw, and with more, training does little else."""


def candidates_of(pairing: str, candidates: int | None, process: Process) -> int:
    """Return the number of noises drawn for each image, 1 without pairing.

    Args:
        pairing: "none" or "nearest".
        candidates: number of noises for "nearest"; None for `USUAL`.

    Raises: UserError for an unknown name, a number out of range, and a process without noise.
    """
    known = suggest(str(pairing), PAIRINGS)
    require(pairing in PAIRINGS, f"unknown training.pairing {pairing!r}: {known}")
    if pairing == "none":
        ok = candidates is None
        require(ok, f"training.candidates={candidates} is the number of training.pairing=nearest; leave it out")
        return 1
    name = type(process).__name__
    require(process.has_noise(), f"training.pairing=nearest chooses noises, and {name} has none; leave it out")
    number = USUAL if candidates is None else candidates
    require_number("training.candidates", number, 1, MOST, whole=True)
    return number
