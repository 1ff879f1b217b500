"""Draw the curves of training: losses, losses by scale, learning rate, gradient norm, metrics of the samples."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dpm_scales.errors import UserError, require, suggest
from dpm_scales.plots import COLOURS, DASHES, Array, figure, graded, logarithmic

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NAME = "curves.png"
MOST_POINTS = 1000
"""Largest number of points of a curve; longer curves are averaged."""
MOST_METRICS = 6
"""Largest number of panels for metrics of the samples."""
RATE, SKIPPED = "learning rate", "skipped steps"

_BAND = re.compile(r"val/loss_t(\d\.\d+)")
_MARKED = 40  # largest number of points that are marked
_WIDTH, _HEIGHT = 3.3, 2.5  # of a panel, in inches


@dataclass(frozen=True)
class Curve:
    """Values by the number of steps taken, ascending; finite values only."""

    steps: Array
    values: Array


def read_curves(rows: Iterable[Mapping[str, str]]) -> dict[str, Curve]:
    """Return the curves of a `metrics.csv` by the name of their column, those with at least one finite value.

    Args:
        rows: cells by column; empty ones are left out. Rows are numbered from 0, by "step".
    """
    found: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        step = int(row["step"]) + 1
        for name, text in row.items():
            if text and name not in ("step", "epoch") and math.isfinite(value := float(text)):
                found.setdefault(name, []).append((step, value))
    pairs = {name: np.array(own, dtype=float) for name, own in found.items()}
    return {name: Curve(own[:, 0], own[:, 1]) for name, own in pairs.items()}


def draw_run(path: Path, curves: Mapping[str, Curve], metric: str | None = None) -> None:
    """Write the curves of a run as a PNG file, a panel for each kind that the run has.

    Args:
        metric: name of the only curve to draw; None for all standard ones.

    Raises: UserError for an unknown metric, or if there is nothing to draw.
    """
    if metric is not None:
        require(metric in curves, f"unknown metric {metric!r}: {suggest(metric, curves)}")
        panels = [(metric, [metric])]
    else:
        panels = _panels(curves)
    if not panels:
        raise UserError("nothing has been logged yet")
    columns = min(len(panels), 3 if len(panels) != 4 else 2)
    rows = math.ceil(len(panels) / columns)
    size = {"width": _WIDTH * max(columns, 1.5), "height": _HEIGHT * rows + 0.1}
    with figure(path, nrows=rows, ncols=columns, squeeze=False, **size) as (_, axes):
        for place, (label, names) in zip(axes.flat, panels, strict=False):
            _draw_panel(place, label, {name: curves[name] for name in names})
        for place in axes.flat[len(panels) :]:
            place.set_visible(False)


def _panels(curves: Mapping[str, Curve]) -> list[tuple[str, list[str]]]:
    """Return the label of each panel and the names of its curves."""
    bands = sorted(name for name in curves if _BAND.fullmatch(name))
    metrics = [name for name in curves if name.startswith("eval/")][:MOST_METRICS]
    rate = [name for name in curves if name.startswith("lr-")]
    skipped = [name for name in ("train/bad_steps",) if name in curves and curves[name].values.max() > 0]
    panels = [
        ("loss", [name for name in ("train/loss", "val/loss") if name in curves]),
        ("val/loss by scale", bands),
        *((name, [name]) for name in metrics),
        (RATE, rate[:1]),
        ("gradient norm", [name for name in ("train/grad_norm",) if name in curves]),
        (SKIPPED, skipped),
    ]
    return [(label, names) for label, names in panels if names]


def _draw_panel(axes: Axes, label: str, curves: Mapping[str, Curve]) -> None:
    bands = [name for name in curves if _BAND.fullmatch(name)]
    if bands and len(curves) > 1:
        low = 0.0
        for name, colour, dash in zip(bands, graded(len(bands)), DASHES * len(bands), strict=False):
            high = float(name.rpartition("_t")[2])
            draw_curve(axes, curves[name], colour, f"{low:g} < t ≤ {high:g}", dash)
            low = high
    else:
        for name, curve in curves.items():
            if name.startswith("train/") and len(curve.steps) > _MARKED:
                axes.plot(*_thinned(curve), color="0.75", linewidth=0.8, zorder=1)
                draw_curve(axes, smoothed(curve), COLOURS[0], f"{name}, running mean")
            else:
                draw_curve(axes, curve, COLOURS[1 if name.startswith("val/") else 0], name)
    axes.set(xlabel="steps", ylabel=label)
    if label != RATE:
        spread_out(axes, curves.values())
    short_steps(axes)
    if len(curves) > 1 or label not in (*curves, RATE, SKIPPED):
        # above the panel, where it hides no curve
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, fontsize=8, columnspacing=1.2)


def spread_out(axes: Axes, curves: Iterable[Curve]) -> None:
    """Make the y-axis logarithmic if the values are positive and span more than a factor of 20."""
    every = np.concatenate([curve.values for curve in curves])
    if every.min() > 0 and every.max() > 20 * every.min():
        logarithmic(axes)


def draw_curve(axes: Axes, curve: Curve, colour: str, label: str | None = None, dash: object = "-") -> None:
    """Draw a line, with its points marked if they are few."""
    marker = "o" if len(curve.steps) <= _MARKED else ""
    axes.plot(*_thinned(curve), color=colour, marker=marker, markersize=3, linestyle=dash, label=label, zorder=2)


def smoothed(curve: Curve) -> Curve:
    """Return the mean of a curve over a moving window, a twentieth of its points wide."""
    reach = max(1, len(curve.values) // 40)
    total = np.concatenate([[0.0], curve.values.cumsum()])
    place = np.arange(len(curve.values))
    first, last = (place - reach).clip(0), (place + reach + 1).clip(max=len(place))
    return Curve(curve.steps, (total[last] - total[first]) / (last - first))


def _thinned(curve: Curve) -> tuple[Array, Array]:
    """Return at most `MOST_POINTS` points: means of neighbouring ones."""
    number = len(curve.steps)
    if number <= MOST_POINTS:
        return curve.steps, curve.values
    starts = np.linspace(0, number, MOST_POINTS, endpoint=False).astype(int)
    counts = np.diff([*starts, number])
    return np.add.reduceat(curve.steps, starts) / counts, np.add.reduceat(curve.values, starts) / counts


def short_steps(axes: Axes) -> None:
    """Write the numbers of steps on the x-axis as 500, 20k or 1.5M."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))


def short(value: float) -> str:
    """Return a number of steps as 500, 20k or 1.5M."""
    size = abs(value)
    return f"{value / 1e6:g}M" if size >= 1e6 else f"{value / 1e3:g}k" if size >= 1e4 else f"{value:g}"
