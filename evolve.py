"""Evolve real images: `python evolve.py [task=NAME] [process=NAME] out=DIR key=value …`; see configs/evolve.yaml."""

from __future__ import annotations

import hydra
from omegaconf import DictConfig

from dpm_scales.cli.main import job, main


@hydra.main(version_base="1.3", config_path="configs", config_name="evolve")
@job
def run(cfg: DictConfig) -> None:
    from dpm_scales.commands.evolve import run as run_task

    run_task(cfg)


if __name__ == "__main__":
    main(run, "evolve")
