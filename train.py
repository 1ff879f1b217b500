"""Train a model: `python train.py [process=… data=… experiment=… key=value …]`; see configs/train.yaml."""

from __future__ import annotations

import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from dpm_scales.training.cli import main, with_stored_overrides


@hydra.main(version_base="1.3", config_path="configs", config_name="train")
def run(cfg: DictConfig) -> float | None:
    from dpm_scales.training.run import run_name, train
    from dpm_scales.training.sweep import is_sweep, sweep_root

    overrides = list(HydraConfig.get().overrides.task)
    if is_sweep() or cfg.run_dir is None:
        run_dir = sweep_root(cfg) / run_name(overrides)
        cfg.run_dir = str(run_dir)
    else:
        run_dir = Path(cfg.run_dir)
    result = train(cfg, run_dir, overrides)
    return result.get("val/loss")


def entry() -> None:
    sys.argv[1:] = with_stored_overrides(sys.argv[1:])
    run()


if __name__ == "__main__":
    main(entry, "train")
