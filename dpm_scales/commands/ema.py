"""`dpm-scales ema`: sample with averages of several lengths, and draw the samples' quality against the length."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig, OmegaConf

from dpm_scales import plots
from dpm_scales.cli.program import program
from dpm_scales.commands.ema_words import LENGTHS, Asked
from dpm_scales.commands.evaluate import drawn, plan
from dpm_scales.commands.question import Answer, Question, measure
from dpm_scales.distributed.ranks import leave
from dpm_scales.errors import UserError, printable, require, suggest
from dpm_scales.evaluation.generated import ModelSamples
from dpm_scales.metrics.figures import check_names
from dpm_scales.models.io import chosen_average
from dpm_scales.models.post_hoc import possible_lengths
from dpm_scales.run_folders.evaluations import HIGHER, MAX_BYTES, metric_key
from dpm_scales.storage import check_writable, read_text, write_text
from dpm_scales.tables import csv_text

EXPORTED = "exported"
"""Name of the average that the run exported."""
CURVE = "power-function averages"

Figures = Mapping[str, Mapping[str, Any]]


def draw_quality(cfg: DictConfig, asked: Asked) -> None:
    """Measure each length, and the run's own average beside them; write `quality.csv` and `quality.png`.

    Args:
        cfg: as composed from configs/evaluate.yaml; its model is the run.
        asked: the command's own options.

    Raises: UserError for invalid options, lengths that can't be reconstructed and damaged snapshots, before sampling.
    """
    lengths = asked.lengths or usual_lengths(asked.run, cfg.ema_step)
    averages = {f"{length:g}": chosen_average(asked.run, cfg.weights, length, cfg.ema_step) for length in lengths}
    own = OmegaConf.merge(cfg, {"ema_step": None})
    assert isinstance(own, DictConfig)
    question = plan(own)
    names = check_names(question.metrics, question.network)
    ranked = _metric(asked.metric, names)
    if question.world.is_main:
        check_writable(asked.out)
    results: dict[str, Figures] = {}
    for number, name in enumerate((EXPORTED, *averages)):
        if name != EXPORTED:
            question = replace(question, fake=_samples(cfg, float(name), question))
        figures, measured = _figures(question, asked.out / f"{name if name == EXPORTED else f'length-{name}'}.json")
        results[name] = figures
        if question.world.is_main:
            shown = ", ".join(f"{key} {figure['value']:.4g}" for key, figure in figures.items())
            known = "" if measured else ", measured before"
            print(f"{number + 1} of {len(averages) + 1}, {_called(name)}: {shown}{known}", flush=True)
    if question.world.is_main:
        save_table(asked.out / "quality.csv", results, {n: a.record() for n, a in averages.items() if a is not None})
        save_figure(asked.out / "quality.png", results, question)
        print(printable(_verdict(results, ranked, asked, cfg.ema_step)))
    leave()


def usual_lengths(run: Path, step: int | None) -> tuple[float, ...]:
    """Return those of `LENGTHS` that a run's snapshots reconstruct; if none, the shortest and longest possible ones."""
    low, high = possible_lengths(run, step)
    return tuple(length for length in LENGTHS if low <= length <= high) or tuple(sorted({low, high}))


def _samples(cfg: DictConfig, length: float, question: Question) -> ModelSamples:
    varied = OmegaConf.merge(cfg, {"ema": length})
    assert isinstance(varied, DictConfig)
    return drawn(varied, len(question.fake), question.device)


def _metric(asked: str | None, names: Sequence[str]) -> str:
    """Return the name of the figure that ranks the lengths. Raises UserError for one that is not measured."""
    keys = {metric_key(name).rpartition("/")[2]: name for name in names}
    if asked is None:
        return names[0]
    key = metric_key(asked).rpartition("/")[2]
    require(key in keys, f"metric={asked} is not among the measures: {suggest(key, keys)}")
    return keys[key]


def _figures(question: Question, file: Path) -> tuple[Figures, bool]:
    """Return the figures of a question, and whether they had to be measured, not read from `file`, which keeps them."""
    wanted = _identity(Answer(question, {}, None, None, None, []).to_dict())
    known = _read(file)
    names = {*check_names(question.metrics, question.network)}
    if known is not None and _identity(known) == wanted and {*known["figures"]} == names:
        return known["figures"], False
    answer = measure(question)
    if answer is None:  # the first process has it
        return {}, True
    content = answer.to_dict()
    write_text(file, json.dumps(content, indent=1) + "\n")
    return content["figures"], True


def _read(file: Path) -> dict[str, Any] | None:
    """Return the content of an evaluation's file; None if it is missing, damaged or of another version."""
    try:
        found = json.loads(read_text(file, MAX_BYTES))
        figures = found["figures"]
        whole = all(isinstance(one["value"], float | int) and "better" in one for one in figures.values())
        return found if whole else None
    except (OSError, UserError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _identity(result: Mapping[str, Any]) -> Any:
    """Return what the figures of an evaluation depend on, as in JSON: images, features, weights, sampler, seed."""
    fake = result.get("fake")
    samples = {k: v for k, v in fake.items() if k not in ("model", "network_evaluations")} if fake else None
    kept = {key: result.get(key) for key in ("format", "version", "features", "real", "own_metrics")}
    return json.loads(json.dumps({**kept, "fake": samples}))


def _called(name: str) -> str:
    return f"the {name} average" if name == EXPORTED else f"ema={name}"


def _verdict(results: Mapping[str, Figures], metric: str, asked: Asked, step: int | None) -> str:
    """Return a line that reports the best length by a figure, compared with the average that the run exported."""

    def value(name: str) -> float:
        return float(results[name][metric]["value"])

    sign = -1 if results[EXPORTED][metric]["better"] == HIGHER else 1
    best, *_ = sorted((name for name in results if name != EXPORTED), key=lambda name: sign * value(name))
    judged = ", and is no worse" if sign * value(EXPORTED) <= sign * value(best) else ""
    exported = f"the average that the run exported has {value(EXPORTED):.4g}{judged}"
    until = "" if step is None else f" ema_step={step}"
    use = f"{program('sample')} model={asked.run} ema={best}{until}"
    return f"best: ema={best}, {metric} {value(best):.4g}; {exported}; {use}; {asked.out / 'quality.png'}"


def save_table(path: Path, results: Mapping[str, Figures], averages: Mapping[str, Mapping[str, Any]]) -> None:
    """Write a table with a row per average: its record, and each figure with its standard error if it has one."""
    rows = []
    for name, figures in results.items():
        row: dict[str, Any] = {"average": name, **averages.get(name, {})}
        for key, figure in figures.items():
            row[key] = f"{figure['value']:.8g}"
            if figure.get("std_error") is not None:
                row[f"{key} standard error"] = f"{figure['std_error']:.3g}"
        rows.append(row)
    write_text(path, csv_text(list(dict.fromkeys(name for row in reversed(rows) for name in row)), rows))


def save_figure(path: Path, results: Mapping[str, Figures], question: Question) -> None:
    """Draw each figure against the length, with its standard error as a band, and the exported average as a line."""
    lengths = [float(name) for name in results if name != EXPORTED]
    names = list(results[EXPORTED])
    styles = {CURVE: plots.Look(plots.COLOURS[0], "o", "-", True)}
    size = {"width": 3.6 * len(names) + 1.8, "height": 3.4, "ncols": len(names), "squeeze": False}
    with plots.figure(path, **size) as (drawing, axes):
        for axis, name in zip(axes[0], names, strict=True):
            own = [results[f"{length:g}"][name] for length in lengths]
            values = [float(one["value"]) for one in own]
            errors = [float(one["std_error"]) for one in own if one.get("std_error") is not None]
            spread = np.array(values) + np.outer([-1, 1], errors) if len(errors) == len(own) else None
            band = None if spread is None else {CURVE: spread}
            plots.lines(axis, lengths, {CURVE: values}, styles, band)
            plots.logarithmic_x(axis, lengths, 12)
            exported = float(results[EXPORTED][name]["value"])
            axis.axhline(exported, color="0.4", linestyle="--", linewidth=1.2, label="the exported average")
            better = own[0]["better"]
            axis.set(xlabel="length of the average (share of the run)", ylabel=f"{name} ({better} is better)")
            axis.set_title("± standard error" if band else "", fontsize=9)
        plots.legend(drawing, list(axes[0]))
        drawing.suptitle(f"{len(question.fake)} samples by {len(question.real)} real images", fontsize=9)
