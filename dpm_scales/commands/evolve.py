"""Run `evolve.py`: forward processes on real images, with one function of the config per task in configs/task.

Each task imports its module only when called.
"""

from __future__ import annotations

from omegaconf import DictConfig


def run(cfg: DictConfig) -> None:
    """Run the task named in the config. Raises UserError for a user's mistakes."""
    TASKS[cfg.task](cfg)


def _compare(cfg: DictConfig) -> None:
    from dpm_scales.commands.compare import compare

    compare(cfg)


def _audit(cfg: DictConfig) -> None:
    from dpm_scales.commands.audit import audit

    audit(cfg)


def _match(cfg: DictConfig) -> None:
    from dpm_scales.commands.match import match

    match(cfg)


def _shadow(cfg: DictConfig) -> None:
    from dpm_scales.commands.retouch import shadow

    shadow(cfg)


def _clone(cfg: DictConfig) -> None:
    from dpm_scales.commands.retouch import clone

    clone(cfg)


TASKS = {"compare": _compare, "audit": _audit, "match": _match, "shadow": _shadow, "clone": _clone}
