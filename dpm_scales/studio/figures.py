"""Draw the figures of the studio as images, in the style and the colours of `plots`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from dpm_scales import plots
from dpm_scales.studio.curves import FREQUENCIES, Schedule, View

Image = NDArray[np.uint8]

DPI = 110
WIDTH = 10.2
REFERENCE = {"color": "0.45", "linestyle": ":", "linewidth": 1.4}
FREQUENCY_LINES = dict(zip(FREQUENCIES, ("-", (0, (5, 1.5)), (0, (1.2, 1.2))), strict=True))
POWER_FLOOR = 1e-9
"""Smallest power that is drawn: below it rounding errors dominate."""

LOWEST_SNR = -80.0
"""Smallest signal-to-noise ratio that is drawn, in dB."""

CYCLES = "frequency (cycles/px)"
SCALE = "scale t"


class Drawing:
    """A figure while it is drawn; `image` is set afterwards."""

    def __init__(self, figure: Figure, axes: Any) -> None:
        self.figure, self.axes = figure, axes
        self.image: Image = np.zeros((1, 1, 3), np.uint8)


@contextmanager
def drawing(height: float, rows: int, columns: int, **margins: float) -> Iterator[Drawing]:
    """Yield a figure of `height` inches and its axes ``(rows, columns)``; set its `image` ``(H, W, 3)`` on exit.

    Args:
        margins: of `Figure.subplots_adjust`, which is much faster than a constrained layout.
    """
    with matplotlib.rc_context({**plots.STYLE, "figure.constrained_layout.use": False}):  # type: ignore[dict-item]
        figure = Figure(figsize=(WIDTH, height), dpi=DPI)
        made = Drawing(figure, figure.subplots(rows, columns, squeeze=False))
        yield made
        figure.subplots_adjust(**margins)
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        made.image = np.asarray(canvas.buffer_rgba())[..., :3].copy()


def styles(names: Sequence[str]) -> list[dict[str, Any]]:
    """Return the colour and dashes of each process, as arguments of matplotlib's `plot`."""
    again = [f"{name}, {plots.SECOND_DRAW}" if name in names[:k] else name for k, name in enumerate(names)]
    looks = plots.looks(again)
    dashes = ("-", (0, (5, 1.5)))  # curves of both stay visible where they coincide
    return [{"color": looks[name].colour, "linestyle": dashes[k % 2]} for k, name in enumerate(again)]


def scale_space(views: Sequence[View], images: Sequence[Any], t: float) -> Image:
    """Draw what processes do to a photo: their curves, the SNR and the spectrum at t, variance and entropy.

    Args:
        views: one or two; both of one photo.
        images: x_t of each, in pixels.
    """
    looks = styles([view.name for view in views])
    with drawing(5.6, 2, 3, left=0.062, right=0.985, top=0.905, bottom=0.092, wspace=0.27, hspace=0.48) as made:
        (signal, noise, snr), (power, variance, entropy) = made.axes
        power.loglog(*views[0].power(views[0].x_0), label="image", **REFERENCE)
        for view, x, look in zip(views, images, looks, strict=True):
            curve = view.schedule
            mean, finest = FREQUENCIES[0], FREQUENCIES[-1]
            signal.plot(curve.ts, curve.signal[mean], label=view.name, **look)
            if not np.allclose(curve.signal[mean], curve.signal[finest]):
                signal.plot(curve.ts, curve.signal[finest], **{**look, "linewidth": 0.9, "alpha": 0.6})
            noise.plot(curve.ts[1:], curve.noise[mean][1:], **look)
            if not np.allclose(curve.noise[mean], curve.noise[finest]):
                noise.plot(curve.ts[1:], curve.noise[finest][1:], **{**look, "linewidth": 0.9, "alpha": 0.6})
            decibels = view.snr(t)
            if decibels is not None:
                snr.semilogx(view.frequencies.numpy(), decibels, **look)
            power.loglog(*view.power(x), **look)
            variance.plot(*view.variance, **look)
            _dot(variance, view.variance, t, look)
            if view.entropy is not None:
                entropy.plot(*view.entropy, **look)
                _dot(entropy, view.entropy, t, look)
        for axes in (signal, noise, variance, entropy):
            axes.axvline(t, color="0.6", linewidth=0.8)
            axes.set(xlabel=SCALE, xlim=(0, 1))
        signal.set_title(r"signal scale $\lambda_t$ (thin: finest detail)")
        noise.set_title(r"noise scale $\gamma_t$")
        if noise.lines and noise.get_ylim()[1] > 4:
            noise.set_yscale("log")
        snr.set(title=rf"SNR $\lambda_t^2 / \gamma_t^2$ at t = {t:.3g} (dB)", xlabel=CYCLES)
        snr.set_ylim(bottom=max(snr.get_ylim()[0], LOWEST_SNR))
        snr.axhline(0, color="0.6", linewidth=0.8)
        power.set(title=f"power spectrum at t = {t:.3g} (white is 1)", xlabel=CYCLES)
        low, high = power.get_ylim()
        power.set_ylim(max(low, POWER_FLOOR), high)
        power.legend(loc="lower left")
        variance.set_title("variance of pixels (white is 1)")
        entropy.set_title(r"entropy $H(X_t\,|\,X_0)$ (nats/px)")
        _log_if_wide(variance)
        _say_empty(snr, "no noise" if t > 0 else "t = 0: the image itself")
        _say_empty(entropy, "no noise: one outcome")
        handles = [*signal.get_legend_handles_labels()[0]]
        made.figure.legend(handles, [view.name for view in views], loc="upper center", ncols=2, fontsize=10)
    return made.image


def edited_schedule(edited: Schedule, usual: Schedule, name: str) -> Image:
    """Draw an edited schedule, and in grey the one that it was made from."""
    colour = styles([name])[0]["color"]
    panels: list[tuple[str, Mapping[float, Any], Mapping[float, Any]]] = [
        (r"signal scale $\lambda_t$", edited.signal, usual.signal),
        (r"noise scale $\gamma_t$", edited.noise, usual.noise),
        (r"log SNR, $\ln \lambda_t^2 / \gamma_t^2$", edited.log_snr, usual.log_snr),
    ]
    with drawing(5.6, 2, 2, left=0.06, right=0.985, top=0.9, bottom=0.092, wspace=0.18, hspace=0.42) as made:
        for axes, (title, curves, before) in zip(made.axes.flat, panels, strict=False):
            for k, (r, dash) in enumerate(FREQUENCY_LINES.items()):
                axes.plot(usual.ts[1:], before[r][1:], color="0.65", linestyle=dash, linewidth=1.0)
                label = "mean intensity" if r == 0 else f"{r:g} cycles/px"
                axes.plot(
                    edited.ts[1:], curves[r][1:], color=colour, linestyle=dash, label=label, linewidth=2.2 - 0.5 * k
                )
            axes.set(title=title, xlabel=SCALE, xlim=(0, 1))
            if "noise" in title:
                _log_if_wide(axes)
        _say_empty(made.axes.flat[2], "no noise")
        blur = made.axes.flat[3]
        if usual.blur_sigma is not None:
            blur.plot(usual.ts, usual.blur_sigma, color="0.65", linewidth=1.0)
        if edited.blur_sigma is not None:
            blur.plot(edited.ts, edited.blur_sigma, color=colour, linewidth=2.2)
        blur.set(title="blur σ (px)", xlabel=SCALE, xlim=(0, 1))
        _say_empty(blur, "no Gaussian blur")
        handles, labels = made.axes.flat[0].get_legend_handles_labels()
        grey = matplotlib.lines.Line2D([], [], color="0.65", linewidth=1.0)
        made.figure.legend([*handles, grey], [*labels, "as shipped"], loc="upper center", ncols=4, fontsize=10)
    return made.image


def _dot(axes: Any, curve: tuple[Any, Any], t: float, look: Mapping[str, Any]) -> None:
    """Mark the value of a curve at t."""
    if t >= curve[0][0]:
        axes.plot([t], [np.interp(t, *curve)], "o", color=look["color"], markersize=5, clip_on=False, zorder=4)


def _log_if_wide(axes: Any) -> None:
    """Make the y-axis logarithmic if positive values span more than a factor of 50."""
    values = np.concatenate([np.asarray(line.get_ydata(), float) for line in axes.lines if len(line.get_ydata()) > 2])
    positive = values[np.isfinite(values) & (values > 0)]
    if positive.size and positive.max() > 50 * positive.min():
        axes.set_yscale("log")


def _say_empty(axes: Any, text: str) -> None:
    """Write a text into axes without curves."""
    if not any(len(line.get_ydata()) > 2 and np.isfinite(line.get_ydata()).any() for line in axes.lines):
        axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", color="0.4")
        axes.set_yticks([])
