"""Draw the figures of docs/law.md, docs/processes.md and docs/corrections.md; no network is used.

    python -m benchmarks.figures --out docs                       # all of them, a minute on one core
    python -m benchmarks.figures --out docs --only processes

law/snr.png           logSNR of each frequency at each scale, one panel per process
law/curves.png        signal and noise against frequency, at several scales
law/spectra.png       power spectrum of a photo along each process
processes/NAME.png    signal and noise of a process against the scale
processes/NAME.jpg    a photo along the process
corrections.png       the noise of a chain: printed formula, corrected formula, random draws
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from matplotlib.colors import Normalize
from PIL import Image
from torch import Tensor

from benchmarks.gallery import photo
from dpm_scales.audit.corrections import corrections
from dpm_scales.cli.configs import choices
from dpm_scales.images import make_grid, to_range, to_uint8
from dpm_scales.models.card import plot_schedule
from dpm_scales.operators import HeatOperator
from dpm_scales.plots import figure, graded, legend, lines, logarithmic, looks
from dpm_scales.processes import VP, Process
from dpm_scales.rng import CounterRNG
from dpm_scales.schedules import ConstantBeta

ROOT = Path(__file__).resolve().parents[1]
SIDE = 72
SHOWN = ("vp", "heat", "blurring", "osmosis_diffusion", "rectified", "warm", "equal_snr", "clocked")
"""Processes of the figures of docs/law.md: they differ in kind."""

STRIP = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)
HEAT = HeatOperator()


def the_photo() -> Tensor:
    """Return the photo of the figures, uint8 ``(1, 3, SIDE, SIDE)``."""
    cat = np.array(photo("chelsea", (90, 0, 390, 300), (SIDE, SIDE)))
    return torch.from_numpy(cat).permute(2, 0, 1)[None]


def process(name: str, x: Tensor) -> Process:
    """Return a shipped process, with the spectrum of the photo ``(1, 3, H, W)`` where its noise has that colour."""
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        made: Process = instantiate(compose("train", overrides=[f"process={name}"]).process)
    made.bind_size((SIDE, SIDE))
    made.fit_color(smooth_power(to_range(x, made.value_range).double()))
    return made


def smooth_power(x: Tensor) -> Callable[[Tensor], Tensor]:
    """Return P(mu) of images ``(B, C, H, W)``: a power of mu fitted to their DCT, finite at 0."""
    power = HEAT.analysis(x).square().mean((0, 1)).flatten()[1:]
    mu = HEAT.eigenvalues(*x.shape[-2:]).flatten()[1:]
    slope, offset = np.polyfit(mu.log().numpy(), power.log().numpy(), 1)
    return lambda at: torch.exp(float(offset) + float(slope) * (at + float(mu.min())).log())


def frequencies(number: int = 121) -> tuple[Tensor, Tensor]:
    """Return radial frequencies in cycles per pixel, from 0 to 1/2, and their eigenvalues mu."""
    r = torch.linspace(0, 0.5, number, dtype=torch.float64)
    return r, (2 * math.pi * r) ** 2


def draw_snr(out: Path, processes: dict[str, Process]) -> None:
    """Draw the logSNR against frequency and scale, one panel per process."""
    r, mu = frequencies()
    t = torch.linspace(1 / 200, 1, 200, dtype=torch.float64)
    with figure(out / "law/snr.png", 7.6, 4.2, nrows=2, ncols=4, sharex=True, sharey=True) as (drawing, axes):
        for axis, (name, shown) in zip(axes.flat, processes.items(), strict=True):
            signal, noise = shown.signal_scale(t, mu), shown.noise_scale(t, mu)
            signal, noise = (curve[:, 0].expand(len(t), len(mu)) for curve in (signal, noise))
            log_snr = (2 * (signal.clamp(min=1e-12) / noise.clamp(min=1e-12)).log()).clamp(-12, 12)
            drawn = axis.pcolormesh(r, t, log_snr, cmap="cividis", norm=Normalize(-12, 12), rasterized=True)
            axis.contour(r, t, log_snr, levels=[0], colors="white", linewidths=1)
            axis.set_title(name, fontsize=9)
            axis.grid(False)
        for axis in axes[1]:
            axis.set_xlabel("cycles per pixel")
        for axis in axes[:, 0]:
            axis.set_ylabel("scale t")
        drawing.colorbar(drawn, ax=axes, label="logSNR (white: 0)", aspect=40)


def draw_curves(out: Path, processes: dict[str, Process]) -> None:
    """Draw signal and noise against frequency at several scales, for four processes."""
    r, mu = frequencies()
    scales = (0.1, 0.3, 0.5, 0.7, 0.9)
    colours = graded(len(scales))
    names = ("vp", "heat", "blurring", "equal_snr")
    with figure(out / "law/curves.png", 7.6, 3.6, nrows=2, ncols=4, sharex=True) as (drawing, axes):
        for column, name in enumerate(names):
            for t, colour in zip(scales, colours, strict=True):
                at = torch.tensor(t, dtype=torch.float64)
                curves = (processes[name].signal_scale(at, mu), processes[name].noise_scale(at, mu))
                for axis, curve in zip(axes[:, column], curves, strict=True):
                    axis.plot(r, curve.expand(len(mu)), color=colour, label=f"t = {t:g}")
            axes[0, column].set(title=name, ylim=(0, 1.05))
            axes[1, column].set(xlabel="cycles per pixel", ylim=(0.005, 60))
            logarithmic(axes[1, column])
        axes[0, 0].set_ylabel("signal $\\lambda_t$")
        axes[1, 0].set_ylabel("noise $\\gamma_t$")
        legend(drawing, [axes[0, 0]])


def radial_power(x: Tensor, bins: int = 24) -> tuple[Tensor, Tensor]:
    """Return the mean power of images ``(B, C, H, W)`` in rings of frequency, and the middle of each ring."""
    power = HEAT.analysis(x.double()).square().mean((0, 1)).flatten()
    r = HEAT.eigenvalues(*x.shape[-2:]).flatten().sqrt() / (2 * math.pi)
    ring = (r / 0.5 * bins).long().clamp(max=bins - 1)
    total, number = torch.zeros(bins).double(), torch.zeros(bins).double()
    total.index_add_(0, ring, power)
    number.index_add_(0, ring, torch.ones_like(power))
    return (torch.arange(bins) + 0.5) / (2 * bins), total / number


def draw_spectra(out: Path, processes: dict[str, Process], x: Tensor) -> None:
    """Draw the power spectrum of the photo along four processes."""
    colours = graded(len(STRIP))
    names = ("vp", "heat", "blurring", "equal_snr")
    with figure(out / "law/spectra.png", 7.6, 2.3, ncols=4, sharex=True, sharey=True) as (drawing, axes):
        for axis, name in zip(axes, names, strict=True):
            for picture, t, colour in zip(path(processes[name], x), STRIP, colours, strict=True):
                low, high = processes[name].value_range
                r, power = radial_power((picture - low) / (high - low))
                axis.plot(r, power, color=colour, label=f"t = {t:g}")
            axis.set(title=name, xlabel="cycles per pixel")
        axes[0].set_ylabel("power")
        axes[0].set_ylim(3e-5, 3)
        logarithmic(axes[0])
        axes[0].set_yticks([1e-4, 1e-2, 1], ["10⁻⁴", "10⁻²", "1"])
        legend(drawing, [axes[0]])


def path(shown: Process, x: Tensor, seed: int = 0) -> Tensor:
    """Return one image ``(1, 3, H, W)`` at each scale of `STRIP`, with the same noise throughout."""
    x_0 = to_range(x, shown.value_range)
    context = shown.context_from(x_0, CounterRNG(seed, 1))
    operator = shown.operator(context)
    white = CounterRNG(seed + 1, 1).normal(tuple(x.shape[1:]), x_0.dtype)
    y_0 = operator.to_white(x_0)
    states = [y_0, *(shown.perturb(y_0, torch.tensor(t, dtype=torch.float64), white, operator) for t in STRIP[1:])]
    return torch.stack([operator.to_pixels(y) for y in states])


def save_strip(file: Path, pictures: Sequence[Tensor]) -> None:
    """Write pictures ``(1, 3, H, W)`` uint8 side by side as a JPEG file."""
    grid = make_grid(torch.cat(list(pictures)), len(pictures), 2)
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(grid.permute(1, 2, 0).numpy()).save(file, quality=88, optimize=True)


def draw_process(out: Path, name: str, shown: Process, x: Tensor) -> None:
    """Draw the schedule of a process, and the photo along it; ve's noise is shown in units of its own spread."""
    (out / "processes").mkdir(parents=True, exist_ok=True)
    plot_schedule(out / "processes" / f"{name}.png", shown)
    pictures = []
    for picture in path(shown, x):
        low, high = shown.value_range
        middle, half = (low + high) / 2, (high - low) / 2
        spread = float((picture - middle).std()) / half
        pictures.append(to_uint8((picture - middle) / max(1.0, 1.5 * spread) + middle, shown.value_range))
    save_strip(out / "processes" / f"{name}.jpg", pictures)


def draw_corrections(out: Path) -> None:
    """Draw the noise of a variance-preserving chain by the printed and by the corrected formula, and as drawn."""
    k, beta = np.arange(1, 101), 0.1
    alpha = math.sqrt(1 - beta**2)
    printed = np.cumsum(beta * alpha ** (k - 1))  # sum of beta alpha^j, j < k: standard deviations add
    chain = VP(100, ConstantBeta(beta))
    corrected = chain.noise_scale(torch.from_numpy(k / 100), torch.zeros(1, dtype=torch.float64)).flatten().numpy()
    example = next(found for found in corrections() if "gamma_100" in found.example)
    with figure(out / "corrections.png", 5.2, 2.8) as (_, axes):
        styles = looks(["printed", "corrected"])
        lines(axes, k.tolist(), {"printed": printed, "corrected": corrected}, styles)
        for line in axes.lines:
            line.set_marker("")
        axes.errorbar([100], [example.measured], [example.std_error], fmt="ko", label="random draws", zorder=4)
        axes.set(xlabel="step k", ylabel="standard deviation $\\gamma_k$", xscale="linear")
        axes.set_xticks([0, 25, 50, 75, 100], ["0", "25", "50", "75", "100"])
        axes.legend()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("docs"))
    parser.add_argument("--only", choices=["law", "processes", "corrections"], help="all unless given")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    x, out = the_photo(), arguments.out
    if arguments.only in (None, "law"):
        (out / "law").mkdir(parents=True, exist_ok=True)
        shown = {name: process(name, x) for name in SHOWN}
        draw_snr(out, shown)
        draw_curves(out, shown)
        draw_spectra(out, shown, x)
    if arguments.only in (None, "processes"):
        for name in choices("process"):
            draw_process(out, name, process(name, x), x)
    if arguments.only in (None, "corrections"):
        draw_corrections(out)


if __name__ == "__main__":
    main()
