"""Open the studio with the arguments in `sys.argv`."""

from __future__ import annotations

import sys

from dpm_scales.cli.output import reported
from dpm_scales.studio.run import run


def main() -> None:
    """Run the command; a user's mistake ends with one line and status 2."""
    with reported():
        run(sys.argv[1:])
