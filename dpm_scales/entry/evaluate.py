"""Compare images with real ones with the options in `sys.argv`; see configs/evaluate.yaml."""

from __future__ import annotations

import hydra
from omegaconf import DictConfig

from dpm_scales.cli.main import CONFIGS, job
from dpm_scales.cli.main import main as run_main


@hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="evaluate")
@job
def run(cfg: DictConfig) -> None:
    from dpm_scales.commands.evaluate import evaluate

    evaluate(cfg)


def main() -> None:
    """Run the command; a user's mistake ends with one line and status 2."""
    run_main(run, "evaluate")
