"""Read the processes and images of a study from the config of `evolve.py`."""

from __future__ import annotations

from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from dpm_scales.cli.options import check_counts
from dpm_scales.data.image_sets import NumberedImages, numbered_images
from dpm_scales.errors import UserError, is_whole, require
from dpm_scales.models.instantiate import build, plain
from dpm_scales.processes import Process
from dpm_scales.schedules import is_number
from dpm_scales.study.comparison import FORMER_NAMES, Entry

CHOSEN = ", chosen"
"""Suffix of the chosen process's name if a listed process has the same name."""


def current_name(name: object) -> str:
    """Return the present name of a process in the config, given that name or a former one."""
    return FORMER_NAMES.get(str(name), str(name))


def chosen_name() -> str | None:
    """Return NAME from process=NAME on the command line, or None if it is not given."""
    return HydraConfig.get().runtime.choices.get("process") if HydraConfig.initialized() else None


def comparison_entries(cfg: DictConfig) -> list[Entry]:
    """Return the processes in the config, then the chosen one. Raises UserError for times or scales that do not fit."""
    times = plain(cfg.times)
    good = isinstance(times, list) and times and all(is_number(t) and t > 0 for t in times)
    require(bool(good) and sorted(set(times)) == times, f"times must be ascending numbers > 0, got {times!r}")
    even = tuple((k + 1) / len(times) for k in range(len(times)))
    entries = []
    listed = plain(cfg.processes)
    require(isinstance(listed, dict), f"processes must be configs by name, got {listed!r}")
    for name, node in listed.items():
        if node is None:
            continue
        given = {} if isinstance(node, dict) and node.get("num_scales") is not None else {"num_scales": len(times)}
        process = build(node, Process, f"processes.{name}", kwargs=given)
        entries.append(Entry(str(name), process, even))
    if cfg.get("process") is not None:
        scales = plain(cfg.scales) or list(even)
        good = isinstance(scales, list) and all(is_number(t) and 0 <= t <= 1 for t in scales)
        if not good or sorted(scales) != scales or len(scales) != len(times):
            raise UserError(f"scales must be {len(times)} ascending numbers in [0, 1], one for each time, got {scales}")
        name = chosen_name() or str(cfg.process.get("_target_", "")).rpartition(".")[2]
        name = f"{name}{CHOSEN}" if name in [entry.name for entry in entries] else name
        entries.append(Entry(name, build(cfg.process, Process, "process"), tuple(map(float, scales))))
    require(len(entries) > 0, "no processes to compare; keep one of processes, or choose process=NAME")
    return entries


def comparison_images(cfg: DictConfig) -> NumberedImages:
    """Return the images in the config. Raises UserError for invalid options."""
    check_counts(cfg, [] if cfg.limit is None else ["limit"])
    out, folder = Path(str(cfg.out)), Path(str(cfg.folder))
    inside = folder.is_dir() and out.resolve().is_relative_to(folder.resolve())
    require(not inside, f"out={out} lies in data={folder}: the figures would become its images; choose another out")
    images = numbered_images(str(cfg.folder), cfg.limit)
    show = plain(cfg.show)
    fits = isinstance(show, list) and show and all(is_whole(i, 0) and i < len(images.names) for i in show)
    require(bool(fits), f"show must list numbers of images from 0 to {len(images.names) - 1}, got {show!r}")
    return images
