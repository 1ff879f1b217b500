"""Quality of 8 px digits against the number of network evaluations, for each sampler and process.

    python -m benchmarks.quality --set digits --out runs/quality --recipes vp ve heat blurring
    python -m benchmarks.samplers --models runs/quality --out runs/samplers

The table is `samplers.csv` (recipe, sampler, evaluations, confidence of real, FD of halves), the plot `samplers.png`.
A sampler is left out where its process has no use for it: deterministic ones under constant noise.
"""

from __future__ import annotations

import argparse
import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.judges import JUDGES
from dpm_scales import plots
from dpm_scales.images import write_text
from dpm_scales.processes import Process
from dpm_scales.samplers import DDIM, Ancestral, DPMSolver, Heun, Sampler, UniPC
from dpm_scales.training.export import load_model
from dpm_scales.training.sampling import draw

EVALUATIONS = (5, 10, 20, 50, 200)
RECIPES = ("vp", "ve", "heat", "blurring")


def _grid(process: Process) -> str:
    """Uniform in logSNR where only noise tells the scales apart."""
    return "logsnr" if process.blur is None else "uniform"


def _heun(process: Process, number: int, s_churn: float = 0.0) -> Sampler:
    """Of `number` evaluations, on EDM's grid where nothing blurs."""
    return Heun((number + 1) // 2, "karras" if process.blur is None else "uniform", s_churn=s_churn)


SAMPLERS: dict[str, Callable[[Process, int], Sampler]] = {
    "ancestral": lambda process, number: Ancestral(number),
    "ddim": lambda process, number: DDIM(0.0, number, _grid(process)),
    "heun": _heun,
    "heun, churn": lambda process, number: _heun(process, number, s_churn=number / 10),
    "dpm++ 2m": lambda process, number: DPMSolver(0.0, number, _grid(process)),
    "sde-dpm++ 2m": lambda process, number: DPMSolver(1.0, number, _grid(process)),
    "unipc": lambda process, number: UniPC(2, number, _grid(process)),
}
DETERMINISTIC = ("ddim", "heun", "dpm++ 2m", "unipc")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Quality against evaluations of the network.")
    parser.add_argument("--models", type=Path, required=True, help="folder of benchmarks.quality")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=RECIPES)
    parser.add_argument("--evaluations", nargs="+", type=int, default=EVALUATIONS)
    parser.add_argument("--number", type=int, default=500, help="samples of each")
    options = parser.parse_args(arguments)
    judge = JUDGES["digits"]()
    rows: list[dict[str, object]] = []
    curves: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for recipe in options.recipes:
        model = load_model(options.models / f"digits_{recipe}")
        process = model.denoiser.process
        for name, make in SAMPLERS.items():
            if process.has_constant_noise() and name in DETERMINISTIC:
                continue
            for number in options.evaluations:
                if number > process.num_scales:
                    continue
                sampler = make(process, number)
                sampler.check(model.denoiser)
                images = torch.cat(list(draw(replace(model, sampler=sampler), options.number, seed=0)))
                report = judge.report(images.numpy())
                used = 2 * (sampler.steps or 1) - 1 if isinstance(sampler, Heun) else number
                row = {"recipe": recipe, "sampler": name, "evaluations": used}
                rows.append(row | {key: round(report[key], 4) for key in ("confidence_ratio", "fd_ratio")})
                curves.setdefault(recipe, {}).setdefault(name, []).append((used, report["fd_ratio"]))
                print(rows[-1], flush=True)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(options.out / "samplers.csv", text.getvalue())
    with plots.figure(options.out / "samplers.png", 3.2 * len(curves), 3.4, ncols=len(curves), squeeze=False) as (
        _,
        axes,
    ):
        for axis, (recipe, found) in zip(axes[0], curves.items(), strict=True):
            for i, name in enumerate(SAMPLERS):
                if name in found:
                    look = {"color": plots.COLOURS[i], "marker": plots.MARKERS[i], "linestyle": plots.DASHES[i % 4]}
                    axis.plot(*zip(*found[name], strict=True), label=name, **look)
            axis.axhline(1, color="grey", linewidth=0.8)
            axis.set(xlabel="evaluations of the network", title=f"digits_{recipe}", xscale="log", yscale="log")
            axis.legend()
        axes[0][0].set_ylabel("FD, halves of the real digits = 1")


if __name__ == "__main__":
    main()
