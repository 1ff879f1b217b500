"""Evolve real images with the options in `sys.argv`; see configs/evolve.yaml."""

from __future__ import annotations

import hydra
from omegaconf import DictConfig

from dpm_scales.cli.main import CONFIGS, job
from dpm_scales.cli.main import main as run_main


@hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="evolve")
@job
def run(cfg: DictConfig) -> None:
    from dpm_scales.commands.evolve import run as run_task

    run_task(cfg)


def main() -> None:
    """Run the command; a user's mistake ends with one line and status 2."""
    run_main(run, "evolve")
