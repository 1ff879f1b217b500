"""`python evolve.py data=DIR out=DIR`: the figures and tables of Sect. 6.3, Peter 2024, from any folder of images."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from dpm_scales import plots
from dpm_scales.errors import UserError, require, suggest
from dpm_scales.images import write_text
from dpm_scales.metrics import (
    FeatureNetwork,
    entropy_increments,
    frechet_distance,
    kernel_distance,
    pick_features,
    reverse_entropy_bounds,
)
from dpm_scales.processes import Process
from dpm_scales.progress import progress_bar
from dpm_scales.storage import check_writable
from dpm_scales.study.comparison import Entry, Parts, measure
from dpm_scales.study.images import ImageSet, image_set
from dpm_scales.tables import csv_text
from dpm_scales.training.building import build, plain
from dpm_scales.training.sampling import check_counts, pick_device

SECOND_DRAW = "second draw"
Row = dict[str, Any]


def compare(cfg: DictConfig) -> None:
    """Everything is checked before the first image is read."""
    require(isinstance(cfg.audit, bool), f"audit must be true or false, got {cfg.audit!r}")
    if cfg.folder is None:
        require(cfg.audit, "data=DIR names the folder of images to compare the processes on (data=photos: bundled)")
        from dpm_scales.study.audit_run import audit

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
    check_writable(out)
    for entry in entries:
        entry.process.to(device)

    with progress_bar() as progress:
        bar = progress.add_task("images", total=len(images.names))
        parts = measure(
            entries, images, out, cfg.seed, features, cfg.batch_size, device, lambda n: progress.advance(bar, n)
        )
        times = [float(t) for t in plain(cfg.times)]
        names = [entry.name for entry in entries]
        save_variance(out, parts, [n for n in names if not n.endswith(SECOND_DRAW)], times)
        save_entropy(out, parts, entries, times, images.sizes[cfg.show[0]])
        if features is not None and reference is not None:
            others = [name for name in names if name != reference]
            bar = progress.add_task("distances", total=len(others) * len(times))
            save_distances(out, parts, others, reference, times, features, lambda: progress.advance(bar))
        save_trajectories(out, entries, images, plain(cfg.show), times, cfg.seed, device)
    if cfg.audit:
        from dpm_scales.study.audit_run import write_audit

        shown = images.load(cfg.show[0])[None]
        write_audit(
            {e.name: e.process.cpu() for e in entries if not e.name.endswith(SECOND_DRAW)}, shown, out, cfg.seed
        )
    save_settings(out, cfg, len(images.names), features)
    print(f"{len(images.names)} images, {len(entries)} processes, {len(times)} times: figures in {out}")


# --- what is asked for ------------------------------------------------------------------------------------------------


def comparison_entries(cfg: DictConfig) -> list[Entry]:
    """The processes of the config, then the chosen one. Raises UserError for times or scales that do not fit."""
    times = plain(cfg.times)
    good = isinstance(times, list) and times and all(isinstance(t, int | float) and t > 0 for t in times)
    require(bool(good) and sorted(set(times)) == times, f"times must be ascending numbers > 0, got {times!r}")
    even = tuple((k + 1) / len(times) for k in range(len(times)))
    entries = []
    listed = plain(cfg.processes)
    require(isinstance(listed, dict), f"processes must be configs by name, got {listed!r}")
    for name, node in listed.items():
        if node is None:
            continue
        given = {} if isinstance(node, dict) and node.get("num_scales") is not None else {"num_scales": len(times)}
        process = build(node, Process, f"processes.{name}", given=given)
        entries.append(Entry(str(name), process, even))
    if cfg.get("process") is not None:
        scales = plain(cfg.scales) or list(even)
        good = isinstance(scales, list) and all(isinstance(t, int | float) and 0 <= t <= 1 for t in scales)
        if not good or sorted(scales) != scales or len(scales) != len(times):
            raise UserError(f"scales must be {len(times)} ascending numbers in [0, 1], one for each time, got {scales}")
        chosen = HydraConfig.get().runtime.choices.get("process") if HydraConfig.initialized() else None
        name = str(chosen or cfg.process.get("_target_", "")).rpartition(".")[2]
        name = f"{name}, chosen" if name in cfg.processes else name
        entries.append(Entry(name, build(cfg.process, Process, "process"), tuple(map(float, scales))))
    require(len(entries) > 0, "no processes to compare; keep one of processes, or choose process=NAME")
    return entries


def comparison_images(cfg: DictConfig) -> ImageSet:
    """The images of the config. Raises UserError for what can't be meant."""
    check_counts(cfg, [] if cfg.limit is None else ["limit"])
    images = image_set(str(cfg.folder), cfg.limit)
    show = plain(cfg.show)
    fits = isinstance(show, list) and show and all(isinstance(i, int) and 0 <= i < len(images.names) for i in show)
    require(bool(fits), f"show must list numbers of images from 0 to {len(images.names) - 1}, got {show!r}")
    return images


def _features(cfg: DictConfig, device: torch.device) -> FeatureNetwork | None:
    if cfg.features is None or cfg.reference is None:
        return None
    return pick_features(str(cfg.features), inception=cfg.inception, device=device)


def _reference(cfg: DictConfig, entries: Sequence[Entry]) -> str | None:
    if cfg.reference is None:
        return None
    name = str(cfg.reference)
    if name not in [entry.name for entry in entries]:
        raise UserError(f"unknown reference {name!r}: {suggest(name, [e.name for e in entries])}, or null")
    return name


# --- tables and figures -----------------------------------------------------------------------------------------------


def save_variance(out: Path, parts: Parts, names: Sequence[str], times: Sequence[float]) -> None:
    """`variance.csv` and `variance.png`, Fig. 4a: mean over the images, and the standard deviation between them."""
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
    with plots.figure(out / "variance.png") as (_, axes):
        plots.lines(axes, times, means, bands)
        count = rows[0]["n"]
        axes.set(xlabel="t in px² (DPM: steps)", ylabel="image variance, white = 1", yscale="log")
        axes.set_title(f"mean and standard deviation over {count} images", fontsize=9)


def save_entropy(
    out: Path, parts: Parts, entries: Sequence[Entry], times: Sequence[float], size: tuple[int, int]
) -> None:
    """`entropy.csv` and `entropy.png`: nats per pixel and channel, in units where black is 0 and white 1, for images
    of `size`; what each step adds; the bounds of the reverse step's entropy; osmosis' relative entropy, measured."""
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
        (curves, "H(U_t | U_0), nats per pixel and channel"),
        (relative, "−Σ u ln(u / w), nats per image channel"),
    ]
    panels = [panel for panel in panels if panel[0]]
    if panels:
        with plots.figure(out / "entropy.png", 4.6 * len(panels), ncols=len(panels), squeeze=False) as (_, axes):
            for axis, (values, label) in zip(axes[0], panels, strict=True):
                plots.lines(axis, times, values)
                axis.set(xlabel="t in px² (DPM: steps)", ylabel=label)


def save_distances(
    out: Path,
    parts: Parts,
    others: Sequence[str],
    reference: str,
    times: Sequence[float],
    features: FeatureNetwork,
    on_distance: Any,
) -> None:
    """`distance.csv` and `distance.png`, Fig. 4b: of each process's images to those of the reference at the same t."""
    rows: list[Row] = []
    for k, t in enumerate(times):
        real = parts.features(reference, k)
        for name in others:
            own = parts.features(name, k)
            row: Row = {"process": name, "t": t, "reference": reference, "features": features.name, "n": len(own)}
            if len(own) > 1:
                kernel = kernel_distance(own, real)
                row |= {"frechet_name": features.distance_name, "frechet": frechet_distance(own, real)}
                row |= {"kernel_name": features.kernel_name, "kernel": kernel.value, "kernel_se": kernel.std_error}
                rows.append(row)
            on_distance()
    if not rows:
        print("distances need 2 images or more; none were measured")
        return
    save_csv(out / "distance.csv", rows)
    count = rows[0]["n"]
    with plots.figure(out / "distance.png", 9.2, ncols=2) as (drawing, axes):
        for axis, key, label in (
            (axes[0], "frechet", features.distance_name),
            (axes[1], "kernel", features.kernel_name),
        ):
            curves = {name: [row[key] for row in rows if row["process"] == name] for name in others}
            plots.lines(axis, times, curves)
            axis.set(xlabel="t in px² (DPM: steps)", ylabel=f"{label} to {reference} at the same t")
            if key == "frechet":
                axis.set_yscale("log")
            else:  # unbiased, so it may be negative
                axis.set_yscale("symlog", linthresh=1e-3)
                axis.set_ylim(bottom=min(-1e-3, 1.5 * min(min(curve) for curve in curves.values())))
        axes[1].get_legend().remove()
        drawing.suptitle(f"features {features.name}, {count} images", fontsize=9)


def save_trajectories(
    out: Path,
    entries: Sequence[Entry],
    images: ImageSet,
    show: Sequence[int],
    times: Sequence[float],
    seed: int,
    device: torch.device,
) -> None:
    """`trajectories.png`, Fig. 3, and one more for each further image: a row for a process, a column for a time."""
    kept = [entry for entry in entries if not entry.name.endswith(SECOND_DRAW)]
    for index in show:
        x = images.load(index)[None].to(device)
        rows = {}
        for entry in kept:
            path, _ = entry.path(x, seed)
            rows[entry.name] = [p[0].permute(1, 2, 0).cpu().numpy() for p in map(entry.shown, path)]
        name = "trajectories.png" if index == show[0] else f"trajectories_{index:06d}.png"
        plots.sheet(out / name, rows, [f"t = {t:g}" for t in times])


def save_csv(path: Path, rows: Sequence[Row]) -> None:
    """A table with the keys of the first row as its header."""
    shown = ({key: f"{v:.8g}" if isinstance(v, float) else v for key, v in row.items()} for row in rows)
    write_text(path, csv_text(list(rows[0]), shown))


def save_settings(out: Path, cfg: DictConfig, count: int, features: FeatureNetwork | None) -> None:
    """`comparison.json`: what the figures were made of."""
    network = None if features is None else {"name": features.name, "weights_sha256": features.hash}
    keys = ("folder", "times", "reference", "seed", "batch_size", "processes", "process", "scales")
    settings = {key: plain(cfg.get(key)) for key in keys} | {"images": count, "features": network}
    write_text(out / "comparison.json", json.dumps(settings, indent=1) + "\n")
