"""`evolve.py`: forward processes on real images, one function of the config for each task of configs/task.

A task imports its module when it is called.
"""

from __future__ import annotations

from omegaconf import DictConfig


def run(cfg: DictConfig) -> None:
    """Do the task that the config names. Raises UserError for a user's mistakes."""
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
