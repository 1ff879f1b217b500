"""Draw figures in one style, with a colour and a marker for each process that colour-blind readers can distinguish.

Nothing here imports torch; `plots.rows`, which joins images, does.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dpm_scales.storage import write_bytes

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Array = NDArray[Any]

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999933")
MARKERS = "osD^vPX*"
SECOND_DRAW = "second draw"
"""Suffix of the name of a process's second draw."""
DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.2, 1.2)), (0, (5, 1.5, 1.2, 1.5)))
"""Dash patterns that keep coinciding curves visible, each through the gaps of the other."""
SHIPPED: dict[str, tuple[str, str]] = {
    "vp": ("#0072B2", "o"),
    "heat": ("#D55E00", "s"),
    "homogeneous": ("#009E73", "D"),
    "blurring": ("#CC79A7", "^"),
    "osmosis": ("#E69F00", "v"),
    "ve": ("#000000", "P"),
    "blurring_constant": ("#960000", "X"),
    "blurring_chain": ("#4B5A5A", "*"),
    "inverse_osmosis": ("#69C3FF", "<"),
    "osmosis_diffusion": ("#000069", ">"),
}
"""Colour and marker of each process in `configs/process`, the same in every figure."""

FURTHER = ("#3100CE", "#6D86FF", "#3D6D49", "#6DDB86", "#552424", "#3D496D", "#F3B6C2")
"""Colours of all other processes."""
SPECTRAL: dict[str, tuple[str, str]] = {
    "rectified": (FURTHER[0], "h"),
    "hdfm": (FURTHER[1], "p"),
    "warm": (FURTHER[2], "d"),
    "equal_snr": (FURTHER[3], "8"),
    "power_law": (FURTHER[4], "H"),
    "flicker": (FURTHER[5], "1"),
    "low_pass_flow": (FURTHER[6], "2"),
    "clocked": (FURTHER[0], "3"),
    "cut_off": (FURTHER[3], "4"),
}
"""Colour and marker of the spectral members; hardly more than 17 colours can be told apart, so two are shared."""

STYLE = {
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.constrained_layout.use": True,
    "font.size": 9,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
    "lines.markersize": 4.5,
}


@contextmanager
def figure(path: Path, width: float = 5.2, height: float = 3.6, **subplots: Any) -> Iterator[tuple[Figure, Any]]:
    """Yield a figure of `width` x `height` inches and its axes; write it atomically to the PNG file `path` on exit.

    pyplot, whose state belongs to the user, is not used.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):  # type: ignore[arg-type]
        drawing = Figure(figsize=(width, height))
        yield drawing, drawing.subplots(**subplots)
        buffer = io.BytesIO()
        drawing.savefig(buffer, format="png", dpi=150)
    write_bytes(path, buffer.getvalue())


@dataclass(frozen=True)
class Look:
    """Style of a process: colour, marker (filled or not) and dashes."""

    colour: str
    marker: str
    dash: Any
    filled: bool

    def line(self) -> dict[str, Any]:
        """Return keyword arguments for matplotlib's `plot`."""
        inside = self.colour if self.filled else "white"
        return {"color": self.colour, "marker": self.marker, "markerfacecolor": inside, "linestyle": self.dash}


def looks(names: Sequence[str]) -> dict[str, Look]:
    """Return the look of each process of a study, by name.

    Those in `SHIPPED` and `SPECTRAL` are fixed. Any other name gets a colour among `FURTHER` that depends only on the
    name, or the next free one if another name has that colour; so pass all names of a study at once. "NAME, second
    draw" gets the colour of NAME, dotted.
    """
    markers, shipped = [marker for _, marker in SHIPPED.values()], {**SHIPPED, **SPECTRAL}
    found = {name: Look(*look, DASHES[i % len(DASHES)], i % 2 == 0) for i, (name, look) in enumerate(shipped.items())}
    drawn = {_process_of(name) for name in names}
    taken = {FURTHER.index(colour) for name, (colour, _) in SPECTRAL.items() if name in drawn}
    for name in sorted(drawn - shipped.keys()):
        start = hashlib.sha256(name.encode()).digest()[0]
        order = [(start + k) % len(FURTHER) for k in range(len(FURTHER))]
        place = next((k for k in order if k not in taken), order[0])
        taken.add(place)
        marker = markers[(start + len(taken)) % len(markers)]
        found[name] = Look(FURTHER[place], marker, DASHES[start % len(DASHES)], start % 2 == 0)
    again = {name: found[_process_of(name)] for name in names}
    return {name: look if name in found else Look(look.colour, "x", ":", True) for name, look in again.items()}


def _process_of(name: str) -> str:
    return name.removesuffix(f", {SECOND_DRAW}")


def lines(
    axes: Axes,
    x: Sequence[float],
    curves: Mapping[str, Sequence[float] | Array],
    styles: Mapping[str, Look],
    spread: Mapping[str, Array] | None = None,
) -> None:
    """Draw a marked line for each named curve over the positive x.

    Args:
        x: ascending; the axis is logarithmic if they span more than a factor of 20.
        styles: looks of the curves by name, as returned by `looks`.
        spread: lower and upper bound of a pale band around a curve, by name.
    """
    for name, values in curves.items():
        # markers at the ends of the axes are not clipped at the frame
        axes.plot(x, values, label=name, clip_on=False, zorder=3, **styles[name].line())
        if spread is not None and name in spread:
            axes.fill_between(x, *spread[name], color=styles[name].colour, alpha=0.15, linewidth=0)
    if len(x) > 1 and max(x) / min(x) > 20:
        logarithmic_x(axes, x)


def logarithmic_x(axes: Axes, x: Sequence[float], most: int = 14) -> None:
    """Make the x-axis logarithmic, with ticks at those of the positive ascending `x` that have room, about `most`."""
    axes.set_xscale("log")
    ticks = [x[0]]
    for value in x[1:]:
        if value / ticks[-1] > (x[-1] / x[0]) ** (1 / most):
            ticks.append(value)
    axes.set_xticks(ticks, [f"{value:g}" for value in ticks])
    axes.minorticks_off()


def logarithmic(axes: Axes) -> None:
    """Make the y-axis logarithmic, with enough labels in plain numbers; call it after drawing."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 500 * low else (1,)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def signed_logarithmic(axes: Axes, linear: float) -> None:
    """Make the y-axis logarithmic on both sides of 0 and linear within +-`linear`, which is shaded.

    Labels are plain numbers. An axis that ends within ten times `linear` stays linear. Call it after drawing.
    """
    from matplotlib.ticker import StrMethodFormatter

    axes.axhline(0, color="0.6", linewidth=0.8)
    if max(map(abs, axes.get_ylim())) > 10 * linear:
        axes.set_yscale("symlog", linthresh=linear)
        axes.axhspan(-linear, linear, color="0.95", zorder=0)
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))


def legend(drawing: Figure, axes: Sequence[Axes]) -> None:
    """Draw one legend for all curves of `axes` beside them."""
    known: dict[Any, Artist] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            known.setdefault(label, handle)
    drawing.legend(list(known.values()), list(known), loc="outside right upper")


def graded(number: int) -> list[str]:
    """Return `number` colours from dark to light, from a colour map for colour-blind readers."""
    import matplotlib
    from matplotlib.colors import to_hex

    shades = matplotlib.colormaps["cividis"](np.linspace(0.0, 0.85, number))
    return [to_hex(shade) for shade in shades]


def sheet(
    path: Path, rows: Mapping[str, Sequence[Array]], columns: Sequence[str], inches: float = 1.5, note: str = ""
) -> None:
    """Write a table of pictures ``(H, W, 3)`` uint8 of one size.

    Args:
        rows: pictures of each row, by its name.
        columns: names of the columns.
        inches: width of a picture in inches.
        note: a line below the table.
    """
    first = next(iter(rows.values()))[0]
    height = inches * first.shape[0] / first.shape[1]
    size = {"width": inches * len(columns) + 0.3, "height": height * len(rows) + 0.3 + (0.25 if note else 0)}
    with figure(path, nrows=len(rows), ncols=len(columns), squeeze=False, **size) as (drawing, axes):
        drawing.set_layout_engine("constrained", w_pad=0.01, h_pad=0.01, wspace=0.01, hspace=0.01)
        for line, (name, pictures) in zip(axes, rows.items(), strict=True):
            for cell, picture in zip(line, pictures, strict=True):
                cell.imshow(np.asarray(picture), interpolation="nearest")
                cell.set(xticks=[], yticks=[])
                cell.spines[:].set_visible(False)
            line[0].set_ylabel(name)
        for cell, title in zip(axes[0], columns, strict=True):
            cell.set_title(title, fontsize=9)
        if note:
            drawing.supxlabel(note, fontsize=8)
