"""Run `python evolve.py data=DIR out=DIR`: the figures and tables of Sect. 6.3, Peter 2024, from a folder of images."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig

from dpm_scales import plots
from dpm_scales.audit.report import write_audit
from dpm_scales.cli.options import pick_device
from dpm_scales.commands.audit import audit
from dpm_scales.commands.processes import comparison_entries, comparison_images, current_name
from dpm_scales.data.image_sets import NumberedImages
from dpm_scales.errors import UserError, require, suggest
from dpm_scales.evaluation.choices import choose_features, described
from dpm_scales.memory import require_memory
from dpm_scales.metrics import (
    FeatureNetwork,
    FeatureStatistics,
    entropy_increments,
    few_images,
    frechet_distance,
    kernel_distance,
    reverse_entropy_bounds,
)
from dpm_scales.models.instantiate import plain
from dpm_scales.plots import SECOND_DRAW, Look
from dpm_scales.progress import Report
from dpm_scales.storage import check_writable, write_text
from dpm_scales.study.comparison import Entry, Parts, measure
from dpm_scales.tables import csv_text

Row = dict[str, Any]


def compare(cfg: DictConfig) -> None:
    """Compare the processes in the config on a folder of images; write tables and figures.

    Raises: UserError for invalid options, before the first image is read.
    """
    if cfg.folder is None:
        require(cfg.audit, "data=DIR names the folder of images to compare the processes on (data=photos: bundled)")
        audit(cfg)
        return
    entries = comparison_entries(cfg)
    out, device = Path(str(cfg.out)), pick_device(str(cfg.device))
    images = comparison_images(cfg)
    features = _features(cfg, device)
    reference = _reference(cfg, entries)
    if features is not None and reference is not None and cfg.second_draw:
        first = next(entry for entry in entries if entry.name == reference)
        entries = [*entries, Entry(f"{reference}, {SECOND_DRAW}", first.process, first.scales)]
    _check_memory(entries, images, cfg.batch_size, features)
    check_writable(out)
    for entry in entries:
        entry.process.to(device)

    with Report() as report:
        advance = report.part("images", len(images.names))
        parts = measure(entries, images, out, cfg.seed, features, cfg.batch_size, device, advance)
        times = [float(t) for t in plain(cfg.times)]
        names = [entry.name for entry in entries]
        styles = plots.looks(names)
        save_variance(out, parts, [n for n in names if not n.endswith(SECOND_DRAW)], times, styles)
        save_entropy(out, parts, entries, times, images.sizes[cfg.show[0]], styles)
        doubts = []
        if features is not None and reference is not None:
            others = [name for name in names if name != reference]
            advance = report.part("distances", len(others) * len(times))
            doubts = save_distances(out, parts, others, reference, times, features, styles, advance)
        save_trajectories(out, entries, images, plain(cfg.show), times, cfg.seed, device)
    if cfg.audit:
        shown = images.load(cfg.show[0])[None]
        write_audit(
            {e.name: e.process.cpu() for e in entries if not e.name.endswith(SECOND_DRAW)}, shown, out, cfg.seed
        )
    save_settings(out, cfg, len(images.names), features, doubts)
    for doubt in doubts:
        warnings.warn(doubt, stacklevel=1)
    number = sum(not entry.name.endswith(SECOND_DRAW) for entry in entries)
    counts = f"{counted(len(images.names), 'image')}, {counted(number, 'process', 'es')}, {counted(len(times), 'time')}"
    print(f"{counts}: figures in {out}")


# --- options and checks -----------------------------------------------------------------------------------------------


def _features(cfg: DictConfig, device: torch.device) -> FeatureNetwork | None:
    if cfg.features is None or cfg.reference is None:
        return None
    return choose_features(cfg.features, cfg.inception, device)


def _reference(cfg: DictConfig, entries: Sequence[Entry]) -> str | None:
    if cfg.reference is None:
        return None
    name = current_name(cfg.reference)
    if name not in [entry.name for entry in entries]:
        raise UserError(f"unknown reference {name!r}: {suggest(name, [e.name for e in entries])}, or null")
    return name


def _check_memory(
    entries: Sequence[Entry], images: NumberedImages, batch_size: int, features: FeatureNetwork | None
) -> None:
    """Raise OutOfMemoryError if the paths of the largest batch, or two sets of features, do not fit into memory."""
    times = len(entries[0].scales)
    pixels = max(3 * len(batch) * math.prod(images.sizes[batch[0]]) for batch in images.batches(batch_size))
    require_memory(4.0 * times * pixels, f"batch_size={batch_size} images at {times} times", "lower batch_size")
    if features is not None:
        count = len(images.names)
        require_memory(24.0 * count * features.dim, f"features of {count} images", "lower limit, or set features=null")


# --- tables and figures -----------------------------------------------------------------------------------------------


def save_variance(
    out: Path, parts: Parts, names: Sequence[str], times: Sequence[float], styles: Mapping[str, Look]
) -> None:
    """Write `variance.csv` and `variance.png` (Fig. 4a): mean and standard deviation over the images."""
    rows: list[Row] = []
    means, bands = {}, {}
    for name in names:
        values = parts.series(name, "variance")
        assert values is not None
        spread = values.std(1, ddof=1) if values.shape[1] > 1 else np.zeros(len(times))
        means[name] = values.mean(1)
        bands[name] = np.stack([np.maximum(means[name] - spread, means[name] / 10), means[name] + spread])
        for t, mean, std in zip(times, means[name], spread, strict=True):
            rows.append({"process": name, "t": t, "mean": mean, "std": std, "n": values.shape[1]})
    save_csv(out / "variance.csv", rows)
    with plots.figure(out / "variance.png", 6.2) as (drawing, axes):
        plots.lines(axes, times, means, styles, bands)
        plots.logarithmic(axes)
        axes.set(xlabel=time_label(names), ylabel="variance over an image's pixels, white = 1")
        axes.set_title(f"mean ± standard deviation over {counted(rows[0]['n'], 'image')}", fontsize=9)
        plots.legend(drawing, [axes])


def save_entropy(
    out: Path,
    parts: Parts,
    entries: Sequence[Entry],
    times: Sequence[float],
    size: tuple[int, int],
    styles: Mapping[str, Look],
) -> None:
    """Write `entropy.csv` and `entropy.png`: nats per pixel and channel, in units where black is 0 and white 1.

    They hold the conditional entropy for images of `size`, the entropy that each step adds, the bounds of the reverse
    step's entropy, and the measured relative entropy of osmosis.
    """
    rows: list[Row] = []
    curves, relative = {}, {}
    for entry in (e for e in entries if not e.name.endswith(SECOND_DRAW)):
        low, high = entry.process.value_range
        pixels = size[0] * size[1]
        tables = next(entry.process.buffers(), None)
        scales = torch.tensor(entry.scales, dtype=torch.float64, device=None if tables is None else tables.device)
        entropy = (entry.process.conditional_entropy(scales, size) / pixels).cpu().numpy() - np.log(high - low)
        lower, upper = (b.cpu().numpy() / pixels for b in reverse_entropy_bounds(entry.process, scales, size))
        added = entropy_increments(entry.process, scales, size).cpu().numpy() / pixels
        own = parts.series(entry.name, "relative_entropy")
        measured = None if own is None else own.mean(1)
        if np.isfinite(entropy).all():
            curves[entry.name] = entropy
        if measured is not None:
            relative[entry.name] = measured
        for k, t in enumerate(times):
            row = {"process": entry.name, "t": t, "conditional_entropy": entropy[k]}
            row |= {"increment": added[k - 1] if k else np.nan}
            row |= {"reverse_lower": lower[k - 1] if k else np.nan, "reverse_upper": upper[k - 1] if k else np.nan}
            rows.append(row | {"relative_entropy": np.nan if measured is None else measured[k]})
    save_csv(out / "entropy.csv", rows)
    panels = [
        (curves, "conditional entropy (processes with noise)", "$H(U_t\\,|\\,U_0)$, nats per pixel and channel"),
        (relative, "relative entropy of the images", "$-\\Sigma\\,u\\,\\ln(u/w)$, nats per image channel"),
    ]
    panels = [panel for panel in panels if panel[0]]
    if panels:
        width = 4.4 * len(panels) + 1.2
        with plots.figure(out / "entropy.png", width, ncols=len(panels), squeeze=False) as (drawing, axes):
            for axis, (values, title, label) in zip(axes[0], panels, strict=True):
                plots.lines(axis, times, values, styles)
                axis.set_title(title, fontsize=9)
                axis.set(xlabel=time_label(list(values)), ylabel=label)
            plots.legend(drawing, list(axes[0]))


def save_distances(
    out: Path,
    parts: Parts,
    others: Sequence[str],
    reference: str,
    times: Sequence[float],
    features: FeatureNetwork,
    styles: Mapping[str, Look],
    on_distance: Callable[[int], None],
) -> list[str]:
    """Write `distance.csv` and `distance.png` (Fig. 4b): distance of each process to the reference at the same t.

    Returns: caveats for the reader, one line each.
    """
    rows: list[Row] = []
    for k, t in enumerate(times):
        real = parts.features(reference, k)
        statistics = FeatureStatistics.of_rows(real)
        for name in others:
            own = parts.features(name, k)
            row: Row = {"process": name, "t": t, "reference": reference, "features": features.name, "n": len(own)}
            if len(own) > 1:
                kernel = kernel_distance(own, real)
                row |= {"frechet_name": features.distance_name, "frechet": frechet_distance(own, statistics)}
                row |= {"kernel_name": features.kernel_name, "kernel": kernel.value, "kernel_se": kernel.std_error}
                rows.append(row)
            on_distance(1)
    if not rows:
        print("distances need 2 images or more; none were measured")
        return []
    save_csv(out / "distance.csv", rows)
    count = int(rows[0]["n"])
    doubt = few_images(count, "images", features)
    if doubt is not None:
        doubt += f", which is too low, as both sets come from the same {count} photos"
    curves = {name: [row for row in rows if row["process"] == name] for name in others}
    with plots.figure(out / "distance.png", 9.8, 3.8, ncols=2) as (drawing, (frechet, kernel)):
        plots.lines(frechet, times, {name: [row["frechet"] for row in own] for name, own in curves.items()}, styles)
        plots.logarithmic(frechet)
        means = {name: np.array([row["kernel"] for row in own]) for name, own in curves.items()}
        errors = {name: np.array([row["kernel_se"] for row in own]) for name, own in curves.items()}
        bands = {name: np.stack([means[name] - errors[name], means[name] + errors[name]]) for name in means}
        plots.lines(kernel, times, means, styles, bands)
        # the estimate is unbiased, so it may be negative; the axis is linear where noise dominates
        noise = float(np.median(np.concatenate(list(errors.values()))))
        plots.signed_logarithmic(kernel, 10.0 ** np.ceil(np.log10(max(noise, 1e-6))))
        kernel.set_title("± standard error", fontsize=9)
        frechet.set_title(f"too high: fewer images than {features.dim} features" if doubt else "", fontsize=9)
        for axis, name in ((frechet, features.distance_name), (kernel, features.kernel_name)):
            axis.set(xlabel=time_label(others), ylabel=f"{name} to {reference} at the same t")
        plots.legend(drawing, [frechet])
        drawing.suptitle(f"{counted(count, 'image')}, features {features.name}", fontsize=9)
    return [] if doubt is None else [doubt]


def save_trajectories(
    out: Path,
    entries: Sequence[Entry],
    images: NumberedImages,
    show: Sequence[int],
    times: Sequence[float],
    seed: int,
    device: torch.device,
) -> None:
    """Write `trajectories.png` (Fig. 3), and another file for each further image.

    Rows are processes and columns are times; the first column is the image.
    """
    kept = [entry for entry in entries if not entry.name.endswith(SECOND_DRAW)]
    stretched = [entry.name for entry in kept if not entry.keeps_grey]
    note = time_label([entry.name for entry in kept])
    note += f"; {', '.join(stretched)}: each image from its smallest value to its largest" if stretched else ""
    for index in show:
        x = images.load(index)[None].to(device)
        rows = {}
        for entry in kept:
            path, _ = entry.path(x, seed)
            shown = [x, *map(entry.shown, path)]
            rows[entry.name] = [p[0].permute(1, 2, 0).cpu().numpy() for p in shown]
        name = "trajectories.png" if index == show[0] else f"trajectories_{index:06d}.png"
        plots.sheet(out / name, rows, ["t = 0, the image", *(f"t = {t:g}" for t in times)], note=note)


def time_label(names: Sequence[str]) -> str:
    """Return the label of the time axis in a figure of these processes."""
    return "t in px² (vp: steps)" if "vp" in names else "t in px²"


def counted(count: int, noun: str, ending: str = "s") -> str:
    """Return `count` followed by the noun, plural unless `count` is 1."""
    return f"{count} {noun}{'' if count == 1 else ending}"


def save_csv(path: Path, rows: Sequence[Row]) -> None:
    """Write a table; the keys of the first row are its header."""
    shown = ({key: f"{v:.8g}" if isinstance(v, float) else v for key, v in row.items()} for row in rows)
    write_text(path, csv_text(list(rows[0]), shown))


def save_settings(
    out: Path, cfg: DictConfig, count: int, features: FeatureNetwork | None, doubts: Sequence[str]
) -> None:
    """Write `comparison.json`: the settings and data behind the figures."""
    network = None
    if features is not None:
        network = {"name": features.name, "weights_sha256": features.hash, **(described(features) or {})}
    keys = ("folder", "times", "reference", "seed", "batch_size", "processes", "process", "scales")
    settings = {key: plain(cfg.get(key)) for key in keys} | {"images": count, "features": network}
    settings |= {"warnings": list(doubts)}
    write_text(out / "comparison.json", json.dumps(settings, indent=1) + "\n")
