"""Compare images with real ones: `python evaluate.py model=… | samples=DIR reference=…`; see configs/evaluate.yaml."""

from __future__ import annotations

import hydra
from omegaconf import DictConfig

from dpm_scales.cli.main import job, main


@hydra.main(version_base="1.3", config_path="configs", config_name="evaluate")
@job
def run(cfg: DictConfig) -> None:
    from dpm_scales.commands.evaluate import evaluate

    evaluate(cfg)


if __name__ == "__main__":
    main(run, "evaluate")
