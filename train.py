"""Train a model: `python train.py [process=… data=… experiment=… key=value …]`; see configs/train.yaml."""

from __future__ import annotations

import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from dpm_scales.training.cli import is_sweep, job, main, with_stored_overrides


@hydra.main(version_base="1.3", config_path="configs", config_name="train")
@job
def run(cfg: DictConfig) -> float | None:
    from dpm_scales.training.run import run_name, train
    from dpm_scales.training.shards import this_shard
    from dpm_scales.training.sweep import sweep_root, write_table

    overrides = list(HydraConfig.get().overrides.task)
    if cfg.check_resume:
        from dpm_scales.training.check_resume import check_resume

        sys.exit(check_resume(cfg, overrides))
    root = sweep_root(cfg)
    if is_sweep() or cfg.run_dir is None:
        cfg.run_dir = str(root / run_name(overrides))
    result = train(cfg, Path(str(cfg.run_dir)), overrides)
    if is_sweep() and this_shard().is_main:
        write_table(root)
    return result.get(cfg.objective)


def entry() -> None:
    sys.argv[1:] = with_stored_overrides(sys.argv[1:])
    run()


if __name__ == "__main__":
    main(entry, "train")
