"""Draw tables and plots of the comparison of processes from its finished rows, see `benchmarks.spectral`.

    python -m benchmarks.spectral_tables runs/spectral runs/other --out docs/leaderboard --page docs/leaderboard.md

writes, for the rows of all folders together and of rows.csv in --out as it was,

    rows.csv                  a line for each row, seed and kind of samples, with machine, commit and date
    NAME.md                   quality at each number of evaluations, by the better of DPM-Solver++(2M) and its SDE
    NAME_evaluations.png      quality against evaluations
    NAME_blur.png             against the ratio of blur to noise, if rows of that group are finished
    NAME_color.png            against the exponent of the noise's spectrum, likewise

for each NAME, an image set and a budget such as `mnist_600_seconds`. Several seeds appear as their mean and half of
their range. A line of the folders replaces that of the same row, seed and sampler, so machines can add to one table.

--page rewrites the part of a Markdown page between `<!-- tables -->` and `<!-- end of tables -->`.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.rows import Row, merged, read_csv, with_part, write_csv
from dpm_scales import plots
from dpm_scales.errors import require
from dpm_scales.storage import write_text

REAL = "real images"
START, END = "<!-- tables -->", "<!-- end of tables -->"
KEY = ("set", "budget", "row", "options", "shared", "seed", "sampler", "asked", "number")
"""Columns that identify a line of rows.csv."""
EXTRAS = {"kd": "KD of `auto`", "fid": "FID of `auto`"}
"""Further measures of the samples, each a column of tables that have it."""
LETTERS = {"2m": "", "sde": " ˢ"}
GROUPS = {"blur": (r"warm b=(\S+)", "blur σ in px per unit of noise, b"), "color": (r"power_law a=(\S+)", "exponent α")}


def read_rows(folders: Sequence[Path]) -> list[Row]:
    """Return a line for each row, seed and kind of samples that the folders hold, and for the real images."""
    lines: list[Row] = []
    for path in sorted(path for folder in folders for path in folder.glob("*/seed*/row.json")):
        row = json.loads(path.read_text())
        samples = row.pop("samples")
        lines += [row | entry for entry in samples]
    real = [json.loads(path.read_text()) for folder in folders for path in folder.glob("real.json")]
    return lines + [{"row": REAL, "budget": "", "sampler": "", "asked": 0, "seed": 0} | line for line in real]


def spread(values: Sequence[float]) -> str:
    """Return "mean ± half of the range", the mean in three digits and the other as precise, or the single value."""
    mean, half = float(np.mean(values)), (max(values) - min(values)) / 2
    if len(values) == 1:
        return _three(mean)
    digits = f"{mean:.0f}" if abs(mean) >= 100 else f"{mean:#.3g}"
    return f"{digits} ± {half:.{len(digits.partition('.')[2])}f}"


def _three(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def quality(lines: Sequence[Row], row: str, asked: int) -> tuple[str, list[float]]:
    """Return the better solver of `asked` evaluations for a row, by its mean over seeds, and the distances by seed."""
    by_solver: dict[str, list[float]] = {}
    for line in lines:
        if line["row"] == row and int(line["asked"]) == asked and (line["sampler"] == "auto") == (asked == 0):
            by_solver.setdefault(line["sampler"], []).append(float(line["fd"]))
    if not by_solver:
        return "", []
    return min(by_solver.items(), key=lambda item: float(np.mean(item[1])))


def table(lines: Sequence[Row], figure: str) -> str:
    """Return a Markdown table of one image set and budget, the best row by its own sampler first."""
    numbers = sorted({int(line["asked"]) for line in lines} - {0})
    names = list(dict.fromkeys(line["row"] for line in lines if line["row"] != REAL))
    names.sort(key=lambda name: float(np.mean(quality(lines, name, 0)[1] or [np.inf])))
    extras = [key for key in EXTRAS if any(line.get(key) for line in lines)]
    heads = ["process", "seeds", "input", *map(str, numbers), "`auto`", *(EXTRAS[key] for key in extras)]
    heads += ["training s", "ms / image", "commit, date, machine"]
    text = [
        f"{figure}, lower is better; ˢ: by the SDE solver.\n",
        f"| {' | '.join(heads)} |",
        "|---" * len(heads) + "|",
    ]
    for name in names:
        own = [line for line in lines if line["row"] == name]
        kinds = {tuple(str(line[key]) for key in ("options", "shared", "number")) for line in own}
        require(len(kinds) == 1, f"rows of {name} differ in more than the seed: {sorted(kinds)}; name them apart")
        auto = [line for line in own if line["sampler"] == "auto"]
        cells = []
        for number in (*numbers, 0):
            solver, values = quality(lines, name, number)
            cells.append(f"{spread(values)}{LETTERS.get(solver, '')}" if values else "")
        for key in extras:
            values = [float(line[key]) for line in auto if line.get(key)]
            cells.append(spread(values) if values else "")
        seeds = {line["seed"] for line in own}
        here = [line for line in own if line["machine"] == own[0]["machine"]]  # only its times are comparable
        seconds = {line["seed"]: float(line["training_cpu_seconds"]) for line in here if line["training_cpu_seconds"]}
        each = [1e3 * float(line["seconds"]) / int(line["number"]) for line in here if line["sampler"] == "auto"]
        cells += [f"{np.mean(values):.0f}" if values else "" for values in (list(seconds.values()), each)]
        text.append(f"| {name} | {len(seeds)} | {own[0]['preconditioning']} | {' | '.join(cells)} | {_origin(own)} |")
    for line in lines:
        if line["row"] == REAL:
            gaps = " |" * len(numbers)
            cells = [_three(float(line["fd"]))]
            cells += [_three(float(line[key])) if line.get(key) else "" for key in extras]
            text.append(f"| {REAL}, n = {line['number']} | | |{gaps} {' | '.join(cells)} | | | |")
    return "\n".join(text) + "\n"


def _origin(lines: Sequence[Row]) -> str:
    """Return commits, dates and machine of the lines, for each machine."""
    parts = []
    for machine in dict.fromkeys(line["machine"] for line in lines):
        own = [line for line in lines if line["machine"] == machine]
        commits, dates = (" ".join(dict.fromkeys(line[key] for line in own)) for key in ("commit", "date"))
        parts.append(f"{commits}, {dates}, {machine}")
    return "; ".join(parts)


def plot_evaluations(lines: Sequence[Row], figure: str, path: Path) -> None:
    """Plot quality against evaluations, a line for each process, if there are several of both."""
    names = [name for name in dict.fromkeys(line["row"] for line in lines) if _plain(name)]
    numbers = sorted({int(line["asked"]) for line in lines} - {0})
    if len(names) < 2 or len(numbers) < 2:
        return
    styles = plots.looks(names)
    with plots.figure(path, 6.6, 4.2) as (drawing, axes):
        for name in names:
            points = [(n, np.mean(quality(lines, name, n)[1])) for n in numbers if quality(lines, name, n)[1]]
            if points:
                axes.plot(*zip(*points, strict=True), label=name, **styles[name].line())
        _finish(axes, figure, lines)
        axes.set(xscale="log", xlabel="evaluations of the network")
        axes.set_xticks(numbers, labels=map(str, numbers))
        axes.minorticks_off()
        plots.legend(drawing, [axes])


def plot_group(lines: Sequence[Row], group: str, figure: str, path: Path) -> None:
    """Plot quality against the number in a group's names, for 10 and 20 evaluations and the model's own sampler."""
    pattern, label = GROUPS[group]
    found = {line["row"]: re.fullmatch(pattern, line["row"]) for line in lines}
    values = sorted((float(match[1]), row) for row, match in found.items() if match)
    if len(values) < 2:
        return
    asked = [number for number in (10, 20, 0) if any(quality(lines, row, number)[1] for _, row in values)]
    with plots.figure(path, 5.2, 3.6) as (_, axes):
        for i, number in enumerate(asked):
            points = [(x, quality(lines, row, number)[1]) for x, row in values if quality(lines, row, number)[1]]
            xs, means = [x for x, _ in points], [float(np.mean(v)) for _, v in points]
            halves = [(max(v) - min(v)) / 2 for _, v in points]
            name = f"{number} evaluations" if number else "sampler=auto"
            look = {"color": plots.COLOURS[i], "marker": plots.MARKERS[i], "linestyle": plots.DASHES[i]}
            axes.errorbar(xs, means, yerr=halves, label=name, capsize=2, **look)
        _finish(axes, figure, lines)
        axes.set(xlabel=label)
        if group == "blur":
            axes.set_xscale("symlog", linthresh=0.25)
            axes.set_xticks([x for x, _ in values], labels=[f"{x:g}" for x, _ in values])
            axes.set_xlim(-0.03, 1.2 * max(x for x, _ in values))
            axes.minorticks_off()
        axes.legend()


def _plain(name: str) -> bool:
    """Return whether a row is a process itself, not a variant of one such as "warm b=1"."""
    return " " not in name


def _finish(axes: Any, figure: str, lines: Sequence[Row]) -> None:
    """Label the axis of the distances; real images are a line where they are near, else in the label."""
    from matplotlib.ticker import MaxNLocator, NullLocator

    real = next((float(line["fd"]) for line in lines if line["row"] == REAL), None)
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    near = real is not None and real > low / 2
    if real is not None and near:
        axes.axhline(real, color="grey", linewidth=0.8)
        place = axes.get_yaxis_transform()
        axes.text(0.99, real, f"{REAL}: {_three(real)}", transform=place, ha="right", va="bottom", fontsize="small")
    elif real is not None:
        figure = f"{figure} (real images: {_three(real)})"
    axes.set_ylabel(figure)
    marks = [m * 10.0**e for e in range(-3, 5) for m in (1, 1.5, 2, 3, 5, 7)]
    shown = [m for m in marks if low / (2 if near else 1) <= m <= high]
    if len(shown) < 3:  # a narrow range
        shown = [m for m in MaxNLocator(5).tick_values(low, high) if low <= m <= high]
    axes.set_yticks(shown, minor=False)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())


def contests(lines: Sequence[Row]) -> dict[str, list[Row]]:
    """Return the lines of each image set and budget by name, with those of as many real images as samples."""
    pairs = sorted({(line["set"], line["budget"]) for line in lines if line["row"] != REAL})
    found = {}
    for images, budget in pairs:
        own = [line for line in lines if line["set"] == images and line["budget"] == budget]
        numbers = {str(line["number"]) for line in own}
        real = [line for line in lines if line["set"] == images and line["row"] == REAL]
        found[f"{images}_{budget}".replace(" ", "_")] = own + [line for line in real if str(line["number"]) in numbers]
    return found


def write_tables(out: Path, folders: Sequence[Path] | None = None) -> dict[str, str]:
    """Write rows.csv, tables and plots of the rows in `folders`, by default in `out` itself; return tables by name."""
    path = out / "rows.csv"
    old = [] if folders is None else read_csv(path)
    lines = merged(old, read_rows([out] if folders is None else folders), KEY)
    if not lines:
        return {}
    write_csv(path, lines)
    tables = {}
    for name, own in contests(lines).items():
        figure = next((line["figure"] for line in own if line.get("figure")), "FD")
        tables[name] = table(own, figure)
        write_text(out / f"{name}.md", tables[name])
        plot_evaluations(own, figure, out / f"{name}_evaluations.png")
        for group in GROUPS:
            plot_group(own, group, figure, out / f"{name}_{group}.png")
    return tables


def page_with(text: str, tables: dict[str, str], folder: str) -> str:
    """Return a page with the part between its markers replaced by the tables, each with its plots in `folder`.

    Raises: UserError if the page lacks the markers.
    """
    parts = []
    for name, found in tables.items():
        parts.append(f"## {name.replace('_', ' ')}\n\n{found}")
        parts += [f"![{kind}]({folder}/{name}_{kind}.png)\n" for kind in ("evaluations", *GROUPS)]
    return with_part(text, START, END, "\n".join(parts), "the page")


def _is_absent(line: str, folder: Path) -> bool:
    """Return whether a line shows a picture that was not drawn for lack of rows."""
    match = re.fullmatch(r"!\[\w+\]\((.+\.png)\)", line)
    return match is not None and not (folder / match[1]).is_file()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Draw tables and plots from finished rows.")
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--page", type=Path, metavar="FILE.md", help="page to rewrite; the folder --out is beside it")
    options = parser.parse_args(arguments)
    for folder in options.folders:
        require(folder.is_dir(), f"{folder} is no folder; give those that benchmarks.spectral wrote")
    options.out.mkdir(parents=True, exist_ok=True)
    tables = write_tables(options.out, options.folders)
    if options.page is not None:
        folder = options.out.resolve().relative_to(options.page.resolve().parent).as_posix()
        page = page_with(options.page.read_text(), tables, folder)
        kept = "\n".join(line for line in page.splitlines() if not _is_absent(line, options.page.parent))
        write_text(options.page, re.sub(r"\n{3,}", "\n\n", kept) + "\n")


if __name__ == "__main__":
    main()
