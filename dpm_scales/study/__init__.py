"""Studies of forward processes on real images: what `evolve.py` does, one function of the config for each task."""

from __future__ import annotations

from importlib import import_module

from omegaconf import DictConfig

TASKS = {
    "compare": ("dpm_scales.study.compare", "compare"),
    "audit": ("dpm_scales.study.audit_run", "audit"),
    "match": ("dpm_scales.study.match", "match"),
    "shadow": ("dpm_scales.study.edit", "shadow"),
    "clone": ("dpm_scales.study.edit", "clone"),
}
"""Module and function of each task of configs/task; a module is imported when its task is called."""


def run(cfg: DictConfig) -> None:
    """Do the task that the config names. Raises UserError for a user's mistakes."""
    module, function = TASKS[cfg.task]
    getattr(import_module(module), function)(cfg)
