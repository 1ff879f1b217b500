"""Sample or edit images: `python sample.py model=RUN_EXPORT_OR_CKPT [task=NAME] out=DIR`; see configs/sample.yaml."""

from __future__ import annotations

import hydra
from omegaconf import DictConfig

from dpm_scales.cli.main import job, main


@hydra.main(version_base="1.3", config_path="configs", config_name="sample")
@job
def run(cfg: DictConfig) -> None:
    from dpm_scales.commands.sample import run as run_task

    run_task(cfg)


if __name__ == "__main__":
    main(run, "sample")
