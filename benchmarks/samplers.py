"""Measure sample quality against the number of network evaluations, for each sampler and process.

    python -m benchmarks.quality --set digits --out runs/quality --recipes vp ve heat blurring
    python -m benchmarks.samplers --set digits --models runs/quality --out runs/samplers
    python -m benchmarks.samplers --set photos32 --models runs/quality --out runs/samplers --device cuda

The table is `SET.csv` and `SET.md` (recipe, sampler, evaluations, the judge's metrics), the plot `SET.png`: the Fréchet
distance of digits to real ones, of photo patches to the training patches. Existing rows of the table are kept:
delete a row to recompute it, and use another --out for another grid or seed. Deterministic samplers are omitted for
processes with constant noise.
"""

from __future__ import annotations

import argparse
import csv
import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.judges import JUDGES, PhotosJudge
from dpm_scales import plots
from dpm_scales.models.generate import draw
from dpm_scales.models.io import load_model
from dpm_scales.models.model import Model
from dpm_scales.processes import Process
from dpm_scales.samplers import DDIM, GRIDS, Ancestral, DPMSolver, Heun, Sampler, UniPC
from dpm_scales.storage import write_text
from dpm_scales.tables import csv_text

EVALUATIONS = (5, 10, 20, 50, 200)
RECIPES = ("vp", "ve", "heat", "blurring")


def _heun(process: Process, number: int, s_churn: float = 0.0) -> Sampler:
    """Return Heun's sampler for `number` evaluations, on EDM's grid for models without blur."""
    return Heun((number + 1) // 2, "karras" if process.blur is None else "uniform", s_churn=s_churn)


SAMPLERS: dict[str, Callable[[Process, int, str], Sampler]] = {
    "ancestral": lambda process, number, grid: Ancestral(number),
    "ddim": lambda process, number, grid: DDIM(0.0, number, grid),
    "heun": lambda process, number, grid: _heun(process, number),
    "heun, churn": lambda process, number, grid: _heun(process, number, s_churn=number / 10),
    "dpm++ 2m": lambda process, number, grid: DPMSolver(0.0, number, grid),
    "sde-dpm++ 2m": lambda process, number, grid: DPMSolver(1.0, number, grid),
    "unipc": lambda process, number, grid: UniPC(2, number, grid),
}
DETERMINISTIC = ("ddim", "heun", "dpm++ 2m", "unipc")


FIGURES = {"digits": ("fd_ratio", "confidence_ratio"), "photos32": ("fd_training", "kd_training")}
"""Figures of a judge's report in the table; the first is plotted."""
LABELS = {"digits": "FD, halves of the real digits = 1", "photos32": "FD-efflite0 to training patches"}

Row = dict[str, Any]


def missing(
    model: Model, recipe: str, evaluations: Sequence[int], rows: Sequence[Row], grid: str
) -> Iterator[tuple[Row, Model]]:
    """Yield the head of each missing row, and the model with its sampler; `grid` applies to models without blur."""
    process, there = model.denoiser.process, {(r["recipe"], r["sampler"], int(r["evaluations"])) for r in rows}
    for name, make in SAMPLERS.items():
        if process.has_constant_noise() and name in DETERMINISTIC:
            continue
        for number in evaluations:
            if number > process.num_scales:
                continue
            sampler = make(process, number, grid if process.blur is None else "uniform")
            sampler.check(model.denoiser)
            used = 2 * (sampler.steps or 1) - 1 if isinstance(sampler, Heun) else number
            if (recipe, name, used) not in there:
                yield {"recipe": recipe, "sampler": name, "evaluations": used}, model.replaced(sampler=sampler)


def write_tables(rows: Sequence[Row], name: str, out: Path) -> None:
    """Write `SET.csv` with all rows, and `SET.md` with the first metric: samplers down, evaluations across.

    Heun's samplers take an odd number of evaluations and appear at the next even one.
    """
    write_text(out / f"{name}.csv", csv_text(["recipe", "sampler", "evaluations", *FIGURES[name]], rows))
    numbers = _numbers(rows)
    lines = [f"| recipe | sampler | {' | '.join(map(str, numbers))} |", "|---" * (2 + len(numbers)) + "|"]
    for recipe, sampler in dict.fromkeys((row["recipe"], row["sampler"]) for row in rows):
        found = {
            min(n for n in numbers if n >= int(row["evaluations"])): f"{float(row[FIGURES[name][0]]):.3g}"
            for row in rows
            if (row["recipe"], row["sampler"]) == (recipe, sampler)
        }
        lines.append(f"| {recipe} | {sampler} | {' | '.join(found.get(n, '') for n in numbers)} |")
    write_text(out / f"{name}.md", "\n".join(lines) + "\n")


def _numbers(rows: Sequence[Row]) -> list[int]:
    """Return the requested numbers of evaluations."""
    return sorted({int(row["evaluations"]) for row in rows if row["sampler"] == "ancestral"})


def plot(rows: Sequence[Row], name: str, path: Path, real: float) -> None:
    """Plot one panel per recipe, with one line per sampler.

    Real images appear as a grey line on logarithmic axes, which wide ranges have; else only in the axis label.
    """
    recipes, figure = list(dict.fromkeys(row["recipe"] for row in rows)), FIGURES[name][0]
    numbers, values = _numbers(rows), [float(row[figure]) for row in rows]
    spread = max(values) > 4 * min(values)
    shape = {"ncols": len(recipes), "squeeze": False, "sharey": True}
    with plots.figure(path, 3.0 * len(recipes) + 1.4, 3.4, **shape) as (drawing, axes):
        drawn = {}
        for axis, recipe in zip(axes[0], recipes, strict=True):
            for i, sampler in enumerate(SAMPLERS):
                points = sorted(
                    (int(row["evaluations"]), float(row[figure]))
                    for row in rows
                    if (row["recipe"], row["sampler"]) == (recipe, sampler)
                )
                if points:
                    look = {"color": plots.COLOURS[i], "marker": plots.MARKERS[i], "linestyle": plots.DASHES[i % 4]}
                    (drawn[sampler],) = axis.plot(*zip(*points, strict=True), **look)
            axis.set(xlabel="evaluations of the network", title=f"{name}_{recipe}", xscale="log")
            if spread:
                axis.set_yscale("log")
                axis.axhline(real, color="grey", linewidth=0.8)
            axis.set_xticks(numbers, labels=map(str, numbers))
            axis.minorticks_off()
        axes[0][0].set_ylabel(LABELS[name] if spread else f"{LABELS[name]} (real ones: {real:.3g})")
        order = [sampler for sampler in SAMPLERS if sampler in drawn]
        drawing.legend([drawn[sampler] for sampler in order], order, loc="outside right upper")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Quality against evaluations of the network.")
    parser.add_argument("--set", choices=sorted(FIGURES), default="digits")
    parser.add_argument("--models", type=Path, required=True, help="folder of benchmarks.quality")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=RECIPES)
    parser.add_argument("--evaluations", nargs="+", type=int, default=EVALUATIONS)
    parser.add_argument("--number", type=int, default=500, help="samples of each")
    parser.add_argument("--grid", choices=sorted(GRIDS), default="logsnr", help="grid for models without blur")
    parser.add_argument("--seed", type=int, default=0, help="of the samples")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)
    name, device = options.set, torch.device(options.device)
    judge, table = JUDGES[name](), options.out / f"{options.set}.csv"
    if isinstance(judge, PhotosJudge):
        judge.network.to(device)
    rows: list[Row] = list(csv.DictReader(io.StringIO(table.read_text()))) if table.is_file() else []
    for recipe in options.recipes:
        model = load_model(options.models / f"{name}_{recipe}")
        for head, chosen in missing(model, recipe, options.evaluations, rows, options.grid):
            images = torch.cat(list(draw(chosen, options.number, options.seed, device=device)))
            report = judge.report(images.cpu().numpy())
            rows.append(head | {key: round(report[key], 4) for key in FIGURES[name]})
            print(rows[-1], flush=True)
            write_tables(rows, name, options.out)
    yardstick = judge.real_reports(options.number).get("training real", {}).get(FIGURES[name][0], 1.0)
    plot(rows, name, options.out / f"{name}.png", yardstick)


if __name__ == "__main__":
    main()
