"""List, rank and export runs with the arguments in `sys.argv`; only `export` imports torch, and none Hydra."""

from __future__ import annotations

import sys

from dpm_scales.cli.output import reported
from dpm_scales.commands.runs import run


def main() -> None:
    """Run the command; a user's mistake ends with one line and status 2."""
    with reported():
        run(sys.argv[1:])
