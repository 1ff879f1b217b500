"""Train a model with the options in `sys.argv`: one run, or all runs of a sweep; see configs/train.yaml."""

from __future__ import annotations

import sys

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from dpm_scales.cli.arguments import with_stored_overrides
from dpm_scales.cli.main import CONFIGS, is_sweep, job
from dpm_scales.cli.main import main as run_main


@hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="train")
@job
def run(cfg: DictConfig) -> float | None:
    from dpm_scales.distributed.ranks import current_world
    from dpm_scales.sweeps.table import job_folders, write_table
    from dpm_scales.training.run import train

    overrides = list(HydraConfig.get().overrides.task)
    if cfg.check_resume:
        from dpm_scales.training.check_resume import check_resume

        sys.exit(check_resume(cfg, overrides))
    root, folder = job_folders(cfg)
    cfg.run_dir = str(folder)
    result = train(cfg, folder, overrides)
    if is_sweep() and current_world().is_main:
        write_table(root)
    return result.get(cfg.objective)


def _resume_and_run() -> None:
    sys.argv[1:] = with_stored_overrides(sys.argv[1:])
    run()


def main() -> None:
    """Run the command; a user's mistake ends with one line and status 2."""
    run_main(_resume_and_run, "train")
