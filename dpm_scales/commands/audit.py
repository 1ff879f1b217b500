"""Run `evolve.py task=audit`: check the paper's propositions for its processes, or for the user's own."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from dpm_scales.audit.report import write_audit
from dpm_scales.commands.processes import CHOSEN, comparison_entries
from dpm_scales.data.image_sets import PHOTOS, numbered_images
from dpm_scales.errors import require_number
from dpm_scales.storage import check_writable


def audit(cfg: DictConfig) -> None:
    """Audit the chosen process (process=NAME), or else those in the config. Raises UserError for invalid options."""
    require_number("seed", cfg.seed, 0, whole=True)
    entries = comparison_entries(cfg)
    if cfg.get("process") is not None:
        entries = entries[-1:]
    processes = {entry.name.removesuffix(CHOSEN): entry.process for entry in entries}
    out = Path(str(cfg.out))
    place = PHOTOS if cfg.folder is None else str(cfg.folder)
    images = numbered_images(place, 1).load(0)[None]
    check_writable(out)
    write_audit(processes, images, out, cfg.seed)
