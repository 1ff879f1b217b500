"""Run `python evolve.py task=match like=osmosis data=DIR out=DIR`: fit a schedule to another process, for training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import yaml
from omegaconf import DictConfig
from torch import Tensor

from dpm_scales import plots
from dpm_scales.cli.options import pick_device
from dpm_scales.cli.program import command_line
from dpm_scales.commands.compare import save_csv
from dpm_scales.commands.processes import comparison_entries, comparison_images, current_name
from dpm_scales.data.image_sets import NumberedImages
from dpm_scales.errors import UserError, require, suggest
from dpm_scales.images import to_range
from dpm_scales.models.instantiate import plain
from dpm_scales.operators import HeatOperator
from dpm_scales.progress import progress_bar
from dpm_scales.storage import check_names, check_writable, guarded, write_text
from dpm_scales.study.comparison import Entry, noise_seed
from dpm_scales.study.matching import (
    CRITERIA,
    Match,
    fit_blur_and_noise,
    fit_error,
    fit_log_snr,
    octave_index,
    octave_sums,
)

FOLDER = "process"
"""Folder of the config, a group for `--config-dir`."""
PAPER_NOISE = 0.1
"""Noise of the blurring diffusion that the paper compares with osmosis, for the error before fitting."""


def match(cfg: DictConfig) -> None:
    """Fit a schedule to a process and write its config. Raises UserError for invalid options, before reading images."""
    criterion, out = str(cfg.criterion), Path(str(cfg.out))
    require(criterion in CRITERIA, f"unknown criterion {criterion!r}: {suggest(criterion, CRITERIA)}")
    entries = {entry.name: entry for entry in comparison_entries(cfg)}
    like = current_name(cfg.like)
    if like not in entries:
        raise UserError(f"unknown process to match, like={cfg.like!r}: {suggest(like, entries)}")
    entry, times = entries[like], [float(t) for t in plain(cfg.times)]
    check_writable(out)
    check_names(out, [FOLDER])
    if criterion == "snr":
        zero = torch.zeros((), dtype=torch.float64)
        scales = torch.tensor(entry.scales, dtype=torch.float64)
        betas = fit_log_snr(entry.process.log_snr(scales, zero).flatten())
        _save_process(out, f"{like} by {criterion}", _chain(betas))
        print(f"{_file(out)}: betas of {len(betas)} scales with the SNR of {like} at mu = 0")
        return
    require(
        cfg.folder is not None, "data=DIR names the folder of images whose energies are matched (data=photos: bundled)"
    )
    images = comparison_images(cfg)
    power, wanted = energies(entry, images, int(cfg.seed), pick_device(str(cfg.device)))
    result = fit_blur_and_noise(wanted, power, times, criterion)
    before = fit_error(power, wanted, times, PAPER_NOISE)
    _save_process(out, f"{like} by {criterion}", _blur(result))
    rows = [
        {"t": t, "dissipation_time": time, "noise_std": noise, "error": error, "error_unfitted": old}
        for t, time, noise, error, old in zip(
            times, result.dissipation_times, result.noise_stds, result.error, before, strict=True
        )
    ]
    save_csv(out / "match.csv", rows)
    _plot(out, result, times, like)
    fitted, old = (sum(values) / len(values) for values in (result.error, before))
    print(
        f"{_file(out)}: energies per octave within a factor exp({fitted:.3f}) of {like}'s on average over the "
        f"times, against exp({old:.3f}) for blur of the same time and noise {PAPER_NOISE:g}; train with "
        f"{command_line('train', '--config-dir', str(out), 'process=matched')}"
    )


@torch.no_grad()
def energies(entry: Entry, images: NumberedImages, seed: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the energy of clean images per frequency ``(H, W)``, and of a process's per octave ``(T, octaves)``.

    Both are means over images and channels, where white is 1. Portrait images are rotated, larger ones centre-cropped.
    """
    sides = [(min(s), max(s)) for s in images.sizes]
    size = (min(s[0] for s in sides), min(s[1] for s in sides))
    index, operator = octave_index(*size, device), HeatOperator()
    low, high = entry.process.value_range
    entry.process.to(device)
    power = torch.zeros(size, dtype=torch.float64, device=device)
    octaves = torch.zeros(len(entry.scales), int(index.max()) + 1, dtype=torch.float64, device=device)
    with progress_bar() as progress:
        for i in progress.track(range(len(images.names)), description="images"):
            x = images.load(i)[None].to(device)
            x = x.rot90(1, (-2, -1)) if x.shape[-2] > x.shape[-1] else x
            top, left = ((have - want) // 2 for have, want in zip(x.shape[-2:], size, strict=True))
            x = x[..., top : top + size[0], left : left + size[1]]
            path, _ = entry.path(x, noise_seed(seed, entry.name, i))
            u = operator.analysis(((path - low) / (high - low)).flatten(1, 2).to(torch.float64))
            octaves += octave_sums(u.square().mean(1), index)
            power += operator.analysis(to_range(x, (0.0, 1.0), torch.float64)).square().mean((0, 1))
    return power / len(images.names), octaves / len(images.names)


def _blur(result: Match) -> dict[str, Any]:
    return {
        "_target_": "dpm_scales.processes.InverseHeat",
        "num_scales": len(result.noise_stds),
        "noise": {
            "_target_": "dpm_scales.schedules.ListedNoise",
            "noise_scales": [float(f"{v:.6g}") for v in result.noise_stds],
        },
        "blur": {
            "_target_": "dpm_scales.schedules.ListedDissipationTimes",
            "dissipation_times": [float(f"{v:.6g}") for v in result.dissipation_times],
        },
        "value_range": [0.0, 1.0],
    }


def _chain(betas: list[float]) -> dict[str, Any]:
    noise = {"_target_": "dpm_scales.schedules.ListedBeta", "betas": [float(f"{v:.8g}") for v in betas]}
    return {"_target_": "dpm_scales.processes.VP", "num_scales": len(betas), "noise": noise, "value_range": [-1.0, 1.0]}


def _file(out: Path) -> Path:
    return out / FOLDER / "matched.yaml"


def _save_process(out: Path, fitted_to: str, process: dict[str, Any]) -> None:
    command = command_line("train", "--config-dir", "THIS_FOLDER/..", "process=matched")
    made = f"# fitted to {fitted_to}; {command}\n"
    with guarded(out):
        write_text(_file(out), made + yaml.safe_dump(process, sort_keys=False))


def _plot(out: Path, result: Match, times: list[float], name: str) -> None:
    """Write `match.png`: energy per octave at each time, of the process and of the fit."""
    octaves = list(range(1, result.wanted.shape[1] + 1))
    with plots.figure(out / "match.png", 6.4, 4.0) as (drawing, axes):
        for k, (t, colour) in enumerate(zip(times, plots.graded(len(times)), strict=True)):
            marker = plots.MARKERS[k % len(plots.MARKERS)]
            axes.plot(octaves, result.wanted[k].cpu(), marker, color=colour, label=f"t = {t:g} px²", clip_on=False)
            axes.plot(octaves, result.fitted[k].cpu(), color=colour)
        axes.set_yscale("log")
        axes.set_xticks(octaves)
        axes.set(xlabel="octave of frequency, coarse to fine", ylabel="energy per image channel, white = 1")
        axes.set_title(f"{name} (markers) and blur with noise fitted to it (lines)", fontsize=9)
        plots.legend(drawing, [axes])
