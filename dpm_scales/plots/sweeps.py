"""Draw a sweep: each option against a metric, all options at once in parallel coordinates, the curves of all runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dpm_scales.plots import COLOURS, MARKERS, Array, figure, graded, legend, logarithmic, looks
from dpm_scales.plots.curves import Curve, draw_curve, short_steps, spread_out
from dpm_scales.tables import cell, column_head

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PARAMETERS, PARALLEL, CURVES = "parameters.png", "parallel.png", "curves.png"
SEEDS = ("seed", "data.seed")
"""Options that only repeat a run: runs that differ in them alone are averaged."""
MOST_PANELS = 9
MOST_GROUPS = 10
"""Largest number of groups in a legend; more numbers get a colour bar, and more names a single colour."""
_SPARSE = 12  # largest number of values whose means are joined by a line
_LONGEST = 24  # characters of a tick
_TICKS = 6  # largest number of values that all get a tick
_GAP = 0.06  # between ticks, as a share of the height of an axis
_BEST: dict[str, Any] = {
    "linestyle": "",
    "marker": "o",
    "markersize": 9,
    "markerfacecolor": "none",
    "color": "black",
}


@dataclass(frozen=True)
class Sweep:
    """The finished runs of a sweep.

    Attributes:
        options: the options in which the runs differ, each with the value of every run as text, "" where it has none.
        values: the metric of every run, finite.
        metric: name of the metric.
        lowest: whether the lowest value is the best; None if that is not known.
    """

    options: Mapping[str, Sequence[str]]
    values: Sequence[float]
    metric: str
    lowest: bool | None = True

    @property
    def parameters(self) -> list[str]:
        """The options other than seeds, which only repeat runs."""
        return [key for key in self.options if key not in SEEDS]

    @property
    def best(self) -> int | None:
        """Index of the best run; None if it is not known which values are better."""
        if self.lowest is None or not self.values:
            return None
        return int(np.argmin(self.values) if self.lowest else np.argmax(self.values))

    def head(self, key: str) -> str:
        """Return the short name of an option."""
        return plain(column_head(key, list(self.options)))


@dataclass(frozen=True)
class Axis:
    """The places of an option's values: numbers, or names in alphabetical order.

    Attributes:
        places: place of each run.
        names: names of the places 0, 1, …; None for numbers.
        log: whether the numbers need a logarithmic axis.
    """

    places: Array
    names: Sequence[str] | None = None
    log: bool = False

    @classmethod
    def of(cls, texts: Sequence[str]) -> Axis:
        """Return the axis of values given as text."""
        numbers = [_number(text) for text in texts]
        known = np.array([number for number in numbers if number is not None])
        if len(known) == len(texts):
            return cls(known, None, bool(known.min() > 0 and known.max() > 20 * known.min()))
        names = sorted(set(texts))
        return cls(np.array([names.index(text) for text in texts], dtype=float), [name or "–" for name in names])

    @property
    def heights(self) -> Array:
        """The places in [0, 1], for parallel coordinates."""
        low, high = self.ends
        places = np.log(self.places) if self.log else self.places
        return np.full(len(places), 0.5) if high <= low else (places - low) / (high - low)

    @property
    def ends(self) -> tuple[float, float]:
        """Lowest and highest place, of which the logarithm is taken where the axis is logarithmic."""
        if self.names is not None:
            return 0.0, len(self.names) - 1.0
        places = np.log(self.places) if self.log else self.places
        return float(places.min()), float(places.max())

    @property
    def distinct(self) -> list[float]:
        """The distinct numbers, if they are few enough to be ticks; else empty."""
        values = [] if self.names is not None else np.unique(self.places).tolist()
        return values if len(values) <= _TICKS else []

    def ticks(self) -> list[tuple[float, str]]:
        """Return heights with their texts: those of all names and of few numbers, else the ends and round numbers."""
        if self.names is not None:
            last = max(len(self.names) - 1, 1)
            return [(i / last if len(self.names) > 1 else 0.5, plain(name)) for i, name in enumerate(self.names)]
        low, high = self.ends
        if high <= low:
            return [(0.5, f"{self.places[0]:.3g}")]
        chosen = self.distinct or [float(self.places.min()), float(self.places.max()), *self._round()]
        found: list[tuple[float, str]] = []
        for value in chosen:
            height = ((math.log(value) if self.log else value) - low) / (high - low)
            if all(abs(height - other) > _GAP for other, _ in found):
                found.append((height, f"{value:.3g}"))
        return found

    def _round(self) -> list[float]:
        """Return round numbers between the ends."""
        from matplotlib.ticker import LogLocator, MaxNLocator

        low, high = float(self.places.min()), float(self.places.max())
        locator = LogLocator() if self.log else MaxNLocator(_TICKS - 1)
        return [float(value) for value in locator.tick_values(low, high) if low < value < high]


def plain(name: str) -> str:
    """Return a name, elided, and escaped so that matplotlib shows it unchanged."""
    return cell(name, _LONGEST).replace("$", r"\$")


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


# --- one option at a time ---------------------------------------------------------------------------------------------


def draw_parameters(path: Path, sweep: Sweep) -> list[str]:
    """Write a panel for each option, the metric against its values: points are runs, lines or bars their means.

    With two options, colours show the values of the other one. Return the options that were left out, beyond
    `MOST_PANELS`.
    """
    keys = sweep.parameters or list(sweep.options)
    shown = keys[:MOST_PANELS]
    columns = min(len(shown), 3 if len(shown) != 4 else 2)
    rows = math.ceil(len(shown) / columns)
    values = np.array(sweep.values)
    size = {"width": 3.1 * max(columns, 1.4) + 1.4, "height": 2.6 * rows + 0.2}
    with figure(path, nrows=rows, ncols=columns, squeeze=False, sharey=True, **size) as (drawing, axes):
        for place, key in zip(axes.flat, shown, strict=False):
            other = next((k for k in keys if k != key), None) if len(keys) == 2 else None
            if other is not None and len(set(sweep.options[other])) > MOST_GROUPS:
                other = None
            _draw_option(place, sweep, values, key, other)
        for place in axes.flat[len(shown) :]:
            place.set_visible(False)
        for row in axes:
            row[0].set_ylabel(plain(sweep.metric))
        if values.min() > 0 and values.max() > 20 * values.min():
            logarithmic(axes[0, 0])
        _explain(axes.flat[len(shown) - 1], sweep)
        legend(drawing, list(axes.flat[: len(shown)]))
    return keys[MOST_PANELS:]


def _explain(axes: Axes, sweep: Sweep) -> None:
    """Add points, lines and the circle to the legend."""
    axes.plot([], [], linestyle="", marker="o", color="0.4", alpha=0.6, markersize=4, label="run")
    axes.plot([], [], color="0.4", linewidth=2, label="mean")
    if sweep.best is not None:
        axes.plot([], [], label="best", **_BEST)


def _draw_option(axes: Axes, sweep: Sweep, values: Array, key: str, other: str | None) -> None:
    axis = Axis.of(sweep.options[key])
    groups = _groups(sweep, key, other)
    best = sweep.best
    for place, (label, (members, colour, marker)) in enumerate(groups.items()):
        # neighbouring groups of names do not hide each other
        shift = 0.0 if axis.names is None or other is None else 0.6 * ((place + 0.5) / len(groups) - 0.5)
        at, own = axis.places[members] + shift, values[members]
        axes.plot(at, own, linestyle="", marker=marker, color=colour, alpha=0.5, markersize=4.5, markeredgewidth=0)
        distinct = np.unique(at)
        means = np.array([own[at == one].mean() for one in distinct])
        name = label if other is not None else ""
        if axis.names is not None:
            half = 0.25 / (len(groups) if other is not None else 1)
            axes.hlines(means, distinct - half, distinct + half, color=colour, linewidth=2, label=name)
        elif 1 < len(distinct) <= _SPARSE:
            axes.plot(distinct, means, color=colour, label=name)
        else:
            axes.plot([], [], linestyle="", marker=marker, color=colour, label=name)
        if best is not None and members[best]:
            axes.plot(axis.places[best] + shift, values[best], clip_on=False, **_BEST)
    axes.set_xlabel(sweep.head(key))
    if axis.names is not None:
        crowded = sum(len(name) for name in axis.names) > 26
        texts = [plain(name) for name in axis.names]
        axes.set_xticks(range(len(texts)), texts, rotation=30 if crowded else 0, ha="right" if crowded else "center")
        axes.set_xlim(-0.6, len(texts) - 0.4)
        return
    if axis.log:
        axes.set_xscale("log")
    if axis.distinct:
        axes.set_xticks(axis.distinct, [f"{value:g}" for value in axis.distinct])
        axes.minorticks_off()


def _groups(sweep: Sweep, key: str, other: str | None) -> dict[str, tuple[Array, str, str]]:
    """Return (mask of the runs, colour, marker) of each group of runs, by its label in the legend."""
    if other is not None:
        return {f"{sweep.head(other)} {label}": rest for label, rest in _by_value(sweep, other)}
    if key == "process":
        return dict(_by_value(sweep, key))
    return {"": (np.ones(len(sweep.values), bool), COLOURS[0], "o")}


def _by_value(sweep: Sweep, key: str) -> list[tuple[str, tuple[Array, str, str]]]:
    """Return (label, (mask of the runs, colour, marker)) for each value of an option."""
    texts = list(sweep.options[key])
    axis = Axis.of(texts)
    distinct = sorted(set(texts), key=lambda text: (axis.places[texts.index(text)], text))
    colours = colours_of(key, distinct, axis.names is None)
    members = {text: np.array([one == text for one in texts]) for text in distinct}
    marks = [MARKERS[i % len(MARKERS)] for i in range(len(distinct))]
    return [
        (plain(text or "–"), (members[text], colour, mark))
        for text, colour, mark in zip(distinct, colours, marks, strict=True)
    ]


def colours_of(key: str, texts: Sequence[str], graduated: bool) -> list[str]:
    """Return a colour for each value of an option: that of the process, a shade for a number, or a distinct one."""
    if key == "process":
        known = looks([text.lower() for text in texts])
        return [known[text.lower()].colour for text in texts]
    return graded(len(texts)) if graduated else [COLOURS[i % len(COLOURS)] for i in range(len(texts))]


# --- all options at once ----------------------------------------------------------------------------------------------


def draw_parallel(path: Path, sweep: Sweep) -> list[str]:
    """Write parallel coordinates: an axis for each option and one for the metric, a line for each combination.

    Runs that differ in their seeds alone are one line, of their mean. Better lines are darker, and the best is black.
    Return the options that were left out.
    """
    keys, left = sweep.parameters[: MOST_PANELS - 1], sweep.parameters[MOST_PANELS - 1 :]
    rows = list(zip(*(sweep.options[key] for key in keys), strict=True))
    distinct = sorted(set(rows))
    chosen = [rows.index(row) for row in distinct]
    means = np.array(
        [np.mean([value for one, value in zip(rows, sweep.values, strict=True) if one == row]) for row in distinct]
    )
    positive = bool(means.min() > 0 and means.max() > 20 * means.min())
    axes_of = [*(Axis.of([sweep.options[key][i] for i in chosen]) for key in keys), Axis(means, None, positive)]
    heights = np.stack([axis.heights for axis in axes_of], 1)
    names = [*(sweep.head(key) for key in keys), plain(sweep.metric)]
    worst_first = np.argsort(-means if sweep.lowest is not False else means)
    shades = graded(len(means))[::-1]  # by rank, since a single bad value would make all others equal
    with figure(path, 1.45 * len(names) + 0.8, 3.4) as (_, axes):
        for i, shade in zip(worst_first, shades, strict=True):
            axes.plot(range(len(names)), heights[i], color=shade, linewidth=1, alpha=0.8)
        if sweep.lowest is not None:
            axes.plot(range(len(names)), heights[worst_first[-1]], color="black", linewidth=2.2, label="best")
            axes.legend(loc="upper center", bbox_to_anchor=(0.5, 0.02), fontsize=8)
        for place, axis in enumerate(axes_of):
            axes.axvline(place, color="0.3", linewidth=0.8, zorder=3)
            for height, text in axis.ticks():
                axes.plot([place - 0.02, place + 0.02], [height, height], color="0.3", linewidth=0.8, zorder=3)
                axes.annotate(
                    text, (place, height), (4, 0), textcoords="offset points", va="center", fontsize=7.5, zorder=4,
                    bbox={"boxstyle": "round,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.8},
                )  # fmt: skip
        axes.set_xticks(range(len(names)), names)
        axes.xaxis.tick_top()
        axes.tick_params(axis="x", length=0)
        axes.set(yticks=[], xlim=(-0.1, len(names) - 0.55), ylim=(-0.05, 1.05))
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
    return left


# --- curves -----------------------------------------------------------------------------------------------------------


def draw_curves(path: Path, curves: Sequence[Curve], metric: str, key: str = "", texts: Sequence[str] = ()) -> None:
    """Write one figure with a metric of all runs against their steps.

    Args:
        curves: one for each run.
        key: option whose values are the colours; "" for none.
        texts: its value in each run.
    """
    distinct = list(dict.fromkeys(texts))
    axis = Axis.of(distinct) if distinct else None
    numbers = axis is not None and axis.names is None
    if axis is not None:
        distinct = [distinct[i] for i in np.argsort(axis.places, kind="stable")]
    crowded = len(distinct) > MOST_GROUPS
    if numbers and crowded:
        shades = graded(256)
        heights = Axis.of(distinct).heights
        colours = {text: shades[round(255 * float(height))] for text, height in zip(distinct, heights, strict=True)}
    elif crowded:
        colours = dict.fromkeys(distinct, COLOURS[0])
    else:
        colours = dict(zip(distinct, colours_of(key, distinct, numbers), strict=True))
    with figure(path, 6.4, 3.4) as (drawing, axes):
        pairs = list(zip(curves, texts or [""] * len(curves), strict=True))
        for text in distinct or [""]:
            own = [curve for curve, of in pairs if of == text]
            for curve, label in zip(own, [plain(text or "–"), *[None] * len(own)], strict=False):
                draw_curve(axes, curve, colours.get(text, COLOURS[0]), None if crowded else label)
        axes.set(xlabel="steps", ylabel=plain(metric))
        spread_out(axes, curves)
        short_steps(axes)
        if axis is not None and numbers and crowded:
            _colour_bar(drawing, axes, axis, key)
        elif distinct and not crowded:
            legend(drawing, [axes])
            drawing.legends[0].set_title(plain(column_head(key, [key])))


def _colour_bar(drawing: Any, axes: Axes, axis: Axis, key: str) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, LogNorm, Normalize

    low, high = float(axis.places.min()), float(axis.places.max())
    scale = LogNorm(low, high) if axis.log else Normalize(low, high)
    drawing.colorbar(ScalarMappable(scale, ListedColormap(graded(256))), ax=axes, label=plain(column_head(key, [key])))
