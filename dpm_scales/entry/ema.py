"""Draw the quality of a run's samples against the length of the average, with the arguments in `sys.argv`."""

from __future__ import annotations

import sys

import hydra
from omegaconf import DictConfig

from dpm_scales.cli.main import CONFIGS, job
from dpm_scales.cli.main import main as run_main
from dpm_scales.cli.output import reported
from dpm_scales.cli.program import program
from dpm_scales.commands.ema_words import HELP, HELP_FLAGS, Asked, asked_of


def main() -> None:
    """Run the command; a user's mistake ends with one line and status 2."""
    if not set(HELP_FLAGS).isdisjoint(sys.argv[1:]):
        print(HELP.format(program("ema")))
        return
    with reported():
        asked = asked_of(sys.argv[1:])
        sys.argv[1:] = asked.options
        run_main(_entry(asked), "evaluate")


def _entry(asked: Asked):  # type: ignore[no-untyped-def]
    """Return the function that composes the options of evaluate.py and draws the curve."""

    @hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="evaluate")
    @job
    def run(cfg: DictConfig) -> None:
        from dpm_scales.commands.ema import draw_quality

        draw_quality(cfg, asked)

    return run
