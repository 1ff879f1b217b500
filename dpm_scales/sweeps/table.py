"""Determine the folder of a sweep, and tabulate its results."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, open_dict, read_write
from rich import box
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from dpm_scales.cli.main import is_sweep
from dpm_scales.cli.stored import key_of
from dpm_scales.errors import UserError
from dpm_scales.run_folders import ranking
from dpm_scales.run_folders.files import stored_result
from dpm_scales.storage import write_text
from dpm_scales.sweeps.naming import RUNS, run_folder, sweep_folder, varied_keys
from dpm_scales.tables import cell, column_head, csv_text, elided

Row = dict[str, Any]

PADDING = 2  # characters between columns
#: options that change what the validation loss measures: its noise, targets or images
LAWS = ("process", "target", "experiment", "data")
#: options of the data that do not change the validation images
SAME_IMAGES = tuple(f"data.{name}" for name in ranking.SAME_IMAGES)


def sweep_root(config: DictConfig, sweep_dir: str) -> Path:
    """Return the folder of a sweep's run folders: `run_dir` if given, else Hydra's `sweep.dir`."""
    return Path(str(config.run_dir or sweep_dir))


def job_folders(config: DictConfig) -> tuple[Path, Path]:
    """Return the parent folder of this job's run, and the run's own, named by its options unless `run_dir` names it.

    Called in a Hydra job, part of a sweep or single.
    """
    hydra = HydraConfig.get()
    root = sweep_root(config, hydra.sweep.dir if is_sweep() else str(RUNS))
    if config.run_dir is not None and not is_sweep():
        return root.parent, root
    return root, run_folder(root, hydra.overrides.task, hydra.job.config.override_dirname.exclude_keys)


def results(root: Path) -> tuple[dict[str, Row], list[str]]:
    """Return the results of the finished runs directly below `root`, by folder, and a line for each damaged file."""
    found, damaged = {}, []
    for path in sorted(root.glob("*/result.json")):
        try:
            found[path.parent.name] = stored_result(path)
        except UserError as error:
            damaged.append(str(error))
    return found, damaged


def collect(root: Path) -> tuple[list[str], list[Row]]:
    """Return the options in which the finished runs directly below `root` differ, and a row for each run, by folder."""
    finished, _ = results(root)
    options = {
        name: {key: value for key, _, value in (o.partition("=") for o in result.pop("overrides"))}
        for name, result in finished.items()
    }
    keys = dict.fromkeys(key for given in options.values() for key in given)
    varied = [key for key in keys if len({given.get(key) for given in options.values()}) > 1]
    rows = [
        {"run": name, **{key: options[name].get(key, "") for key in varied}, **result}
        for name, result in finished.items()
    ]
    return varied, rows


def unfinished(root: Path, rows: list[Row]) -> list[str]:
    """Return the names of the run folders directly below `root` that have no row."""
    finished = {row["run"] for row in rows}
    return sorted(path.parent.name for path in root.glob("*/overrides.yaml") if path.parent.name not in finished)


def write_table(root: Path) -> tuple[list[str], list[Row]]:
    """Write `sweep.csv` with the finished runs below `root`; return the result of `collect`.

    Called after every run, so that the table exists even if a later run fails.
    """
    varied, rows = collect(root)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    write_text(root / "sweep.csv", csv_text(columns, rows))
    if len(collect(root)[1]) != len(rows):  # another process finished a run meanwhile
        return write_table(root)
    return varied, rows


def compared(varied: Sequence[str], rows: Iterable[Row], objective: str, highest: bool = False) -> list[list[Row]]:
    """Return groups of rows with comparable objectives, the best first in each group.

    A validation loss is compared within one process, target and data set; a metric of the samples among all.

    Args:
        varied: options in which the runs differ.
        objective: the value to compare; rows without it come last.
        highest: whether the highest value is the best, instead of the lowest.
    """
    laws = [key for key in varied if _is_law(key)] if objective.startswith("val/") else []
    laws.sort(key=lambda key: "." in key)  # choices first, so that those of one process are adjacent
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(str(row[key]) for key in laws), []).append(row)
    return [sorted(groups[law], key=lambda row: _rank(row.get(objective), highest)) for law in sorted(groups)]


def summary(
    root: Path, varied: Sequence[str], rows: Sequence[Row], objective: str, highest: bool = False, width: int = 80
) -> Group:
    """Return a readable table, at most `width` characters wide: varied options, the objective, the reason for groups.

    Long cells are elided, and columns that do not fit are omitted; `sweep.csv` has everything.
    """
    groups = compared(varied, rows, objective, highest)
    names = list(varied) or ["run"]
    heads = {name: column_head(name, names) for name in names} | {name: name for name in (objective, "seconds")}
    cells = {name: [cell(row.get(name, "")) for row in rows] for name in heads}
    needs = {name: max(map(len, (head, *cells[name]))) + PADDING for name, head in heads.items()}
    room, columns = width - needs[objective], []
    for name in (*names, "seconds"):
        if needs[name] > room:
            break
        columns.append(name)
        room -= needs[name]
    columns.insert(len([name for name in columns if name != "seconds"]), objective)
    notes = []
    if left := [name for name in names if name not in columns]:
        notes.append(f"{len(left)} more columns in sweep.csv: {elided(', '.join(left), width)}")
    if len(groups) > 1:
        notes.append(
            f"{objective} compares runs of one process, target and data set: others measure different things, and are "
            "compared by their samples (evaluation.every_n_steps=N objective=eval/…)"
        )
    table = Table(box=box.SIMPLE_HEAD, padding=(0, PADDING, 0, 0), pad_edge=False)
    for name in columns:
        table.add_column(Text(heads[name]), no_wrap=True)
    for group in groups:
        for row in group:
            table.add_row(*(Text(cell(row.get(name, ""))) for name in columns))
        if max(map(len, groups)) > 1:
            table.add_section()
    return Group(Text(f"{root}/sweep.csv"), table, *map(Text, notes))


def _is_law(option: str) -> bool:
    key = key_of(option)
    return key.replace("/", ".").split(".")[0] in LAWS and key not in SAME_IMAGES


def _rank(value: Any, highest: bool) -> float:
    """Return a sort key that puts the best first and missing values last."""
    number = float(value) if isinstance(value, int | float) else math.nan
    return math.inf if math.isnan(number) else -number if highest else number


class SweepTable(Callback):
    """Callback that sets the folder of a sweep and prints a table of its runs at the end."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Pass the folder of the sweep and the options common to all jobs to the jobs through Hydra's config."""
        hydra = config.hydra
        given = [*(f"{key}={value}" for key, value in (hydra.sweeper.get("params") or {}).items())]
        given += hydra.overrides.task
        varied = varied_keys(given)
        constant = [key_of(option) for option in given if key_of(option) not in varied] if varied else []
        chosen = config.run_dir or hydra.sweep.dir != "."
        root = sweep_root(config, hydra.sweep.dir if chosen else str(sweep_folder(given)))
        with open_dict(config), read_write(config):
            hydra.sweep.dir = str(root)  # for Hydra's multirun.yaml
            if not chosen:
                hydra.overrides.hydra.append(f"hydra.sweep.dir='{root}'")
            keys = ",".join(f"'{key}'" for key in constant)
            hydra.overrides.hydra.append(f"hydra.job.config.override_dirname.exclude_keys=[{keys}]")

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        from dpm_scales.distributed.ranks import current_world  # loads torch, which would delay errors about options

        if not current_world().is_main:
            return
        root = Path(config.hydra.sweep.dir)
        varied, rows = write_table(root)
        highest = config.hydra.sweeper.get("direction") == "maximize"
        console = Console()
        console.print(summary(root, varied, rows, str(config.objective), highest, console.width))
        for line in results(root)[1]:
            warnings.warn(f"{line}; until then it is not in the table", stacklevel=1)
        left = unfinished(root, rows)
        if left:
            print(f"{len(left)} of {len(rows) + len(left)} runs unfinished: {', '.join(left)}")
