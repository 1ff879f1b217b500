"""`evolve.py`: forward processes on real images, one function of the config for each task."""

from __future__ import annotations

from importlib import import_module

from omegaconf import DictConfig

TASKS = {
    "compare": ("dpm_scales.commands.compare", "compare"),
    "audit": ("dpm_scales.commands.audit", "audit"),
    "match": ("dpm_scales.commands.match", "match"),
    "shadow": ("dpm_scales.commands.retouch", "shadow"),
    "clone": ("dpm_scales.commands.retouch", "clone"),
}
"""Module and function of each task of configs/task; a module is imported when its task is called."""


def run(cfg: DictConfig) -> None:
    """Do the task that the config names. Raises UserError for a user's mistakes."""
    module, function = TASKS[cfg.task]
    getattr(import_module(module), function)(cfg)
