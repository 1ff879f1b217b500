"""`dpm-scales plot`: draw a run's curves, and a sweep's options against a metric. Imports neither torch nor Hydra."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from dpm_scales.cli.output import complain
from dpm_scales.cli.program import program
from dpm_scales.cli.words import Words, split_words
from dpm_scales.commands.runs import HELP_FLAGS, LOSSES_DIFFER
from dpm_scales.commands.runs_table import UNSHOWN, given_where_varied
from dpm_scales.errors import UserError, printable, require, require_choice, suggest
from dpm_scales.plots import curves, sweeps
from dpm_scales.plots.curves import Curve
from dpm_scales.plots.sweeps import Sweep
from dpm_scales.run_folders.evaluations import HIGHER, LOWER
from dpm_scales.run_folders.files import MAX_METRICS_BYTES, read_metrics
from dpm_scales.run_folders.find import MOST_ENTRIES, Found, find_runs
from dpm_scales.run_folders.ranking import direction_of, laws
from dpm_scales.run_folders.state import BEST, STATES, Run
from dpm_scales.storage import check_writable

HELP = """\
usage: {0} RUN|SWEEP [metric=NAME] [direction=lower|higher] [out=DIR]

Draw pictures of a run or of a sweep, beside what they show:

RUN/curves.png         losses, losses by scale, learning rate, gradient norm, metrics of the samples, against steps
SWEEP/parameters.png   each option that varies against the metric: runs as points, with the mean of their seeds
SWEEP/parallel.png     all options at once, if they are three or more, or those of a search
SWEEP/curves.png       the metric of all runs against their steps

  metric=NAME       a column of `runs`, such as val/loss or eval/fid; by default the runs' objective
  direction=lower   or higher is better; by default the metric's own
  out=DIR           another folder for the pictures

examples:
  {0} runs/default
  {0} sweeps/first metric=eval/fd_efflite0
  {0} search out=figures"""
#: fewest options that are shown at once, in a sweep and in a search
MANY, MANY_SEARCHED = 3, 2
SEARCHED = "study.db"
#: options that are not drawn: those of a table of runs, except the one that has a column of its own there
UNDRAWN = tuple(key for key in UNSHOWN if key != "trainer.max_steps")
DEFAULT_METRIC = "val/loss"


def run(argv: Sequence[str]) -> None:
    """Draw a run or a sweep, as `HELP` says.

    Args:
        argv: arguments after `dpm-scales plot`.

    Raises: UserError for arguments that can't be used, for a folder without runs, a sweep without finished runs, and an
    unknown metric.
    """
    command = program("plot")
    if not set(HELP_FLAGS).isdisjoint(argv):
        print(HELP.format(command))
        return
    usage = f"{command} RUN|SWEEP"
    asked = split_words(argv, 1, ("metric", "direction", "out"), (), usage)
    require(len(asked.words) == 1, f"name the folder of a run or of a sweep: {usage}")
    if "direction" in asked.options:
        require_choice("direction", asked.options["direction"], (LOWER, HIGHER))
    place = Path(asked.words[0])
    require(place.exists(), f"{printable(str(place))}: no such folder")
    found = find_runs(place)
    name = printable(str(place))
    require(bool(found.runs), f"{name} is no run, and there are none below it; {program('runs')} lists runs")
    out = Path(asked.options.get("out", place))
    if [one.folder for one in found.runs] == [place]:
        _draw_run(found.runs[0], out, asked, name)
    else:
        _draw_sweep(found, place, out, asked, name)


def _draw_run(one: Run, out: Path, asked: Words, name: str) -> None:
    require("direction" not in asked.options, "direction is for sweeps, which have a best run; leave it out")
    require(one.state != "damaged", f"{name} is damaged: {one.reason}")
    logged = _curves(one)
    metric = asked.options.get("metric")
    try:
        require(bool(logged), "nothing has been logged yet")
        if metric is not None:
            require(metric in logged, f"unknown metric {metric!r}: {suggest(metric, logged)}")
    except UserError as error:
        raise UserError(f"{name}: {error}") from error
    check_writable(out)
    curves.draw_run(out / curves.NAME, logged, metric)
    print(printable(f"{out / curves.NAME}: {one.state}, {one.steps} steps"))


def _curves(one: Run) -> dict[str, Curve]:
    """Return the curves in a run's `metrics.csv`; none without the file. Raises UserError if it is damaged."""
    file = one.folder / "metrics.csv"
    if not file.is_file():
        return {}
    columns, rows = read_metrics(file, MAX_METRICS_BYTES)
    return curves.read_curves(dict(zip(columns, row, strict=True)) for row in rows)


def _draw_sweep(found: Found, place: Path, out: Path, asked: Words, name: str) -> None:
    finished = [one for one in found.runs if one.state == "finished"]
    counts = Counter(one.state for one in found.runs)
    states = ", ".join(f"{counts[state]} {state}" for state in STATES if counts[state])
    require(bool(finished), f"{name}: no run is finished ({states}); finish some, or draw a single one by its name")
    metric = asked.options.get("metric") or _objective(finished)
    known = {key for one in finished for key, value in one.metrics.items() if math.isfinite(value)}
    require(metric in known, f"{name}: unknown metric {metric!r}: {suggest(metric, known)}")
    measured = [one for one in finished if math.isfinite(one.metrics.get(metric, math.nan))]
    lowest = _lowest(metric, measured, asked)
    if metric.startswith(("val/", "train/")) and (number := laws(measured)) > 1:
        complain(f"warning: {LOSSES_DIFFER.format(metric=metric, number=number)}")
        lowest = None
    given = given_where_varied(measured, UNDRAWN)
    keys = list(given[measured[0].folder])
    options = {key: [given[one.folder][key] for one in measured] for key in keys}
    sweep = Sweep(options, [one.metrics[metric] for one in measured], metric, lowest)
    check_writable(out)
    if keys:
        left = sweeps.draw_parameters(out / sweeps.PARAMETERS, sweep)
        print(printable(f"{out / sweeps.PARAMETERS}: {metric} of {len(measured)} runs against {_names(keys, left)}"))
    else:
        print("the finished runs differ in no option: no parameters.png")
    if len(sweep.parameters) >= (MANY_SEARCHED if (place / SEARCHED).is_file() else MANY):
        left = sweeps.draw_parallel(out / sweeps.PARALLEL, sweep)
        print(printable(f"{out / sweeps.PARALLEL}: {_names(sweep.parameters, left)}, and {metric}"))
    _draw_curves(found, out, metric, keys, sweep)
    if len(measured) < len(found.runs):
        others = f"{len(found.runs) - len(measured)} of {len(found.runs)} runs ({states})"
        print(f"{others} have no final {metric}: they are in curves.png alone")
    if not found.complete:
        complain(f"warning: only the first {MOST_ENTRIES} entries were looked at; name a folder that holds the runs")


def _draw_curves(found: Found, out: Path, metric: str, keys: Sequence[str], sweep: Sweep) -> None:
    """Draw the metric of all runs against their steps, where it is measured in training."""
    column = "val/loss" if metric == BEST else metric
    logged, unread = {}, 0
    for one in found.runs:
        try:
            own = _curves(one)
        except UserError:
            unread += 1
            continue
        if column in own:
            logged[one.folder] = (one, own[column])
    if unread:
        complain(f"warning: metrics.csv of {unread} runs is damaged; {program('runs')} says why")
    if not logged:
        print(f"{metric} is not measured in training: no curves.png")
        return
    key = "process" if "process" in keys else next(iter([*sweep.parameters, *keys]), "")
    runs = [one for one, _ in logged.values()]
    given = given_where_varied(runs, UNDRAWN)
    texts = [given[one.folder].get(key, "") for one in runs] if key else []
    sweeps.draw_curves(out / sweeps.CURVES, [curve for _, curve in logged.values()], column, key, texts)
    print(printable(f"{out / sweeps.CURVES}: {column} of {len(runs)} runs against steps"))


def _objective(runs: Sequence[Run]) -> str:
    """Return the objective that all runs share, else the validation loss."""
    named = {str(one.config.get("objective")) for one in runs}
    shared = named.pop() if len(named) == 1 else DEFAULT_METRIC
    return shared if any(shared in one.metrics for one in runs) else DEFAULT_METRIC


def _lowest(metric: str, runs: Sequence[Run], asked: Words) -> bool | None:
    """Return whether the lowest value is the best; None if that is not known."""
    given = asked.options.get("direction")
    try:
        return (given or direction_of(metric, runs)) == LOWER
    except UserError:
        return None


def _names(keys: Sequence[str], left: Sequence[str]) -> str:
    shown = [key for key in keys if key not in left]
    return ", ".join(shown) + (f" ({len(left)} more options are left out)" if left else "")
