"""Measure how the optimal covariance of a reverse step changes samples, by model, sampler and number of steps.

    python -m benchmarks.quality --set digits --out runs/quality --recipes vp blurring heat
    python -m benchmarks.covariance --set digits --out runs/covariance --models vp=runs/quality/digits_vp \\
      blurring=runs/quality/digits_blurring heat=runs/quality/digits_heat
    python -m benchmarks.covariance --out runs/covariance --tables --csv docs/results/covariance.csv \\
      --page docs/samplers.md

Each model is measured on training images as by `dpm-scales measure`; its folder is left as it is. It then draws the
same samples three times: without the covariance, with it, and with its mean over all frequencies, which is
Analytic-DPM's choice (Bao et al. 2022). Their Fréchet distances are those of `benchmarks.image_sets`.

Finished rows are kept, OUT/SET/MODEL_SAMPLER_STEPS/seedN.json, where the seed is that of the samples. The same command
resumes, and several at once share the rows.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.image_sets import IMAGE_SETS, ImageSet
from benchmarks.rows import Row, claimed, commits_of, finished_rows, grouped, merged, publish, read_csv, real_distance
from benchmarks.spectral import provenance
from benchmarks.spectral_tables import spread
from dpm_scales.covariance import ErrorVariance
from dpm_scales.errors import UserError, require
from dpm_scales.models.generate import draw
from dpm_scales.models.io import load_model
from dpm_scales.models.model import Model
from dpm_scales.processes import Process
from dpm_scales.samplers import DDIM, Ancestral, DPMSolver, Sampler
from dpm_scales.spectrum import DataSpectrum
from dpm_scales.storage import write_text

START, END = "<!-- covariance -->", "<!-- end of covariance -->"
KEY = ("set", "model", "sampler", "steps", "covariance", "seed", "number", "machine")
"""Columns that identify a line of the CSV file."""
KINDS = ("none", "optimal", "mean")
MEASURED = 1000
"""Number of training images on which a model is measured."""
SAMPLERS: dict[str, Callable[[int, str, str | None], Sampler]] = {
    "ancestral": lambda steps, grid, covariance: Ancestral(steps, grid, covariance=covariance),
    "dpmpp eta=1": lambda steps, grid, covariance: DPMSolver(1.0, steps, grid, covariance=covariance),
    "ddim": lambda steps, grid, covariance: DDIM(0.0, steps, grid, covariance=covariance),
}


class MeanVariance(ErrorVariance):
    """The variance of a network's error with one value for all frequencies, the mean of the measured ones."""

    def forward(self, process: Process, spectrum: DataSpectrum, t: Tensor, mu: Tensor) -> Tensor:
        variance = super().forward(process, spectrum, t, mu)
        return variance.mean((-2, -1), keepdim=True).expand_as(variance)


def mean_of(table: ErrorVariance) -> MeanVariance:
    """Return a table of the same measurement that neglects frequencies."""
    parts = (table.scales, table.rows, table.columns, table.ratio)
    return MeanVariance(*parts, table.weights_sha256, table.num_images, table.seed)


def measure(model: Model, images: ImageSet, device: torch.device) -> Model:
    """Return the model on the device, its covariance measured on at most `MEASURED` training images."""
    data = torch.from_numpy(images.training_images())
    chosen = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[:MEASURED]
    model = model.to(device).eval()
    model.measure_covariance(data[chosen].to(device))
    return model


def run_row(
    model: Model, sampler: str, steps: int, seed: int, options: argparse.Namespace, images: ImageSet
) -> list[Row]:
    """Return the distances of the samples of each kind of covariance."""
    process = model.denoiser.process
    grid = "logsnr" if process.blur is None else "uniform"
    measured = model.denoiser.error_variance
    assert measured is not None
    found = []
    for kind in KINDS:
        covariance = None if kind == "none" else "optimal"
        chosen = model.replaced(sampler=SAMPLERS[sampler](steps, grid, covariance))
        chosen.denoiser.error_variance = mean_of(measured) if kind == "mean" else measured
        drawn = torch.cat(list(draw(chosen, options.number, seed, device=torch.device(options.device))))
        figures = {key: round(value, 4) for key, value in images.report(drawn.cpu().numpy()).items()}
        found.append({"covariance": kind, **figures})
    model.denoiser.error_variance = measured
    return found


def run(options: argparse.Namespace) -> None:
    """Run all rows that are neither finished nor locked by another process."""
    device = torch.device(options.device)
    images = IMAGE_SETS[options.set]((options.cache or options.out).resolve(), options.source)
    for text in options.models:
        name, _, path = text.partition("=")
        require(bool(name and path), f"--models {text}: expected NAME=RUN")
        model: Model | None = None
        for sampler, steps, seed in itertools.product(options.samplers, options.steps, options.seeds):
            row = f"{name}_{sampler}_{steps}".replace(" ", "_").replace("=", "")
            file = options.out / images.name / row / f"seed{seed}.json"
            with claimed(file.with_suffix(".lock")) as is_held:
                if not is_held or file.is_file():
                    continue
                model = model or measure(load_model(Path(path)), images, device)
                process = model.denoiser.process
                if steps > process.num_scales or (sampler == "ddim" and process.has_constant_noise()):
                    continue
                head: Row = {"set": images.name, "figure": images.quality, "model": name, "sampler": sampler}
                head |= {"steps": steps, "seed": seed, "number": options.number, **provenance(device)}
                samples = run_row(model, sampler, steps, seed, options, images)
                write_text(file, json.dumps(head | {"samples": samples}, indent=2) + "\n")
                print(f"{name}, {sampler}, {steps} steps, seed {seed}: {samples}", flush=True)
    real = {"set": images.name, "number": options.number} | images.real(options.number)
    write_text(options.out / "real.json", json.dumps(real) + "\n")


# --- table ------------------------------------------------------------------------------------------------------------


def table(lines: Sequence[Row]) -> str:
    """Return a Markdown table for each set and machine: without, with the covariance, with its mean, by steps."""
    return "\n".join(_group(own) for own in grouped(lines, ("set", "machine", "number")))


def _group(lines: Sequence[Row]) -> str:
    first = lines[-1]
    numbers = sorted({int(line["steps"]) for line in lines})
    seeds = len({str(line["seed"]) for line in lines})
    text = [
        f"{first['set']}, {first['figure']}, {first['number']} samples, {seeds} draws of each, lower is better; "
        f"{first['machine']}; {commits_of(lines)}.",
        "",
        f"| model | sampler | covariance | {' | '.join(f'{number} steps' for number in numbers)} |",
        "|---" * (len(numbers) + 3) + "|",
    ]
    names = {"none": "without", "optimal": "by frequency", "mean": "one value"}
    for model, sampler in dict.fromkeys((line["model"], line["sampler"]) for line in lines):
        for kind in KINDS:
            key = (model, sampler, kind)
            own = [line for line in lines if (line["model"], line["sampler"], line["covariance"]) == key]
            cells = [_cell([line for line in own if int(line["steps"]) == number]) for number in numbers]
            text.append(f"| {model} | {sampler} | {names[kind]} | {' | '.join(cells)} |")
    real = real_distance(lines)
    if real:
        text.append(f"\nAs many real images that no model has seen: {real}.")
    return "\n".join(text) + "\n"


def _cell(own: Sequence[Row]) -> str:
    return spread([float(line["fd"]) for line in own]) if own else ""


def write_page(out: Path, path: Path, page: Path | None) -> str:
    """Add the finished rows in `out` to the CSV file `path`; rewrite the table of a page; return the table.

    Raises: UserError if there are no rows, or the page has no place for the table.
    """
    lines = merged(read_csv(path), finished_rows(out), KEY)
    require(bool(lines), f"{out}: no finished rows")
    found = table(lines)
    publish(lines, found, path, page, START, END)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Samples with and without the optimal covariance.")
    parser.add_argument("--set", choices=sorted(IMAGE_SETS), default="digits")
    parser.add_argument("--source", type=Path, metavar="DIR", help="folder of the images, where the set can be given")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cache", type=Path, help="prepared images and features; OUT unless given")
    parser.add_argument("--models", nargs="*", default=[], metavar="NAME=RUN", help="trained models")
    parser.add_argument("--samplers", nargs="+", choices=list(SAMPLERS), default=list(SAMPLERS))
    parser.add_argument("--steps", nargs="+", type=int, default=[5, 10, 20, 50])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of the samples")
    parser.add_argument("--number", type=int, default=2000, help="samples of each kind")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tables", action="store_true", help="only write the table")
    parser.add_argument("--csv", type=Path, help="file of all rows, which grows; OUT/covariance.csv unless given")
    parser.add_argument("--page", type=Path, metavar="FILE.md", help="page whose table is rewritten")
    options: Any = parser.parse_args(arguments)
    options.out = options.out.resolve()
    try:
        if not options.tables:
            require(bool(options.models), "--models: give trained models as NAME=RUN")
            run(options)
        print(write_page(options.out, options.csv or options.out / "covariance.csv", options.page))
    except UserError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
