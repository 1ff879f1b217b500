"""Figures: one style, colours that colour-blind readers can tell apart (Okabe & Ito), markers that print in grey."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dpm_scales.images import write_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Array = NDArray[Any]

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999933")
MARKERS = "osD^vPX*"
DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.2, 1.2)), (0, (5, 1.5, 1.2, 1.5)))
"""Curves that lie on one another still show, each through the gaps of the other."""
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
    """A figure of `width` x `height` inches and its axes, written whole to the PNG file `path` on leaving."""
    import matplotlib

    with matplotlib.rc_context({**STYLE, "backend": "Agg"}):  # type: ignore[dict-item]
        import matplotlib.pyplot as plt

        drawing, axes = plt.subplots(figsize=(width, height), **subplots)
        try:
            yield drawing, axes
            buffer = io.BytesIO()
            drawing.savefig(buffer, format="png", dpi=150)
        finally:
            plt.close(drawing)
    write_bytes(path, buffer.getvalue())


def lines(
    axes: Axes,
    x: Sequence[float],
    curves: Mapping[str, Sequence[float] | Array],
    spread: Mapping[str, Array] | None = None,
) -> None:
    """A marked line for each named curve over the positive x (log axis); `spread` (below, above) as a pale band."""
    for i, (name, values) in enumerate(curves.items()):
        colour = COLOURS[i % len(COLOURS)]
        look: dict[str, Any] = {"marker": MARKERS[i % len(MARKERS)], "markerfacecolor": "white" if i % 2 else colour}
        axes.plot(x, values, color=colour, linestyle=DASHES[i % len(DASHES)], label=name, **look)
        if spread is not None and name in spread:
            axes.fill_between(x, *spread[name], color=colour, alpha=0.15, linewidth=0)
    if len(x) > 1 and max(x) / min(x) > 20:
        axes.set_xscale("log")
    axes.legend()


def sheet(path: Path, rows: Mapping[str, Sequence[Array]], columns: Sequence[str], inches: float = 1.5) -> None:
    """A table of pictures ``(H, W, 3)`` uint8, with the names of its rows and columns."""
    first = next(iter(rows.values()))[0]
    height = inches * first.shape[0] / first.shape[1]
    size = {"width": inches * len(columns) + 0.3, "height": height * len(rows) + 0.25}
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
