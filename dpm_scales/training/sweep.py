"""One table of results after a sweep."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, open_dict, read_write
from rich.console import Console
from rich.table import Table

from dpm_scales.errors import UserError
from dpm_scales.images import write_text
from dpm_scales.tables import csv_text
from dpm_scales.training.shards import this_shard
from dpm_scales.training.stored import stored_result

Row = dict[str, Any]


def sweep_root(config: DictConfig) -> Path:
    """Folder of a sweep's run folders: `run_dir` if given, else runs/."""
    return Path(str(config.run_dir or "runs"))


def results(root: Path) -> tuple[dict[str, Row], list[str]]:
    """Results of the finished runs directly below `root`, by folder name; and a line for each file that is damaged."""
    found, damaged = {}, []
    for path in sorted(root.glob("*/result.json")):
        try:
            found[path.parent.name] = stored_result(path)
        except UserError as error:
            damaged.append(str(error))
    return found, damaged


def collect(root: Path) -> tuple[list[str], list[Row]]:
    """Options in which the finished runs directly below `root` differ, and one row for each run, by folder name."""
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
    """Names of the run folders directly below `root` that have no row."""
    finished = {row["run"] for row in rows}
    return sorted(path.parent.name for path in root.glob("*/overrides.yaml") if path.parent.name not in finished)


def write_table(root: Path) -> tuple[list[str], list[Row]]:
    """Write `sweep.csv` with the finished runs below `root`; returns what `collect` does.

    Called after every run: a run that fails takes nothing from the table of the others.
    """
    varied, rows = collect(root)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    write_text(root / "sweep.csv", csv_text(columns, rows))
    if len(collect(root)[1]) != len(rows):  # another process finished a run meanwhile, perhaps after it wrote
        return write_table(root)
    return varied, rows


class SweepTable(Callback):
    """Prints the runs of a sweep beside each other."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        with open_dict(config), read_write(config):
            config.hydra.sweep.dir = str(sweep_root(config))  # for Hydra's multirun.yaml

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        if not this_shard().is_main:
            return
        root = sweep_root(config)
        varied, rows = write_table(root)
        columns = [*(varied or ["run"]), "steps", "seconds", "val/loss"]
        table = Table(title=f"{root}/sweep.csv")
        for name in columns:
            table.add_column(name, overflow="fold")
        for row in rows:
            table.add_row(*(f"{v:.4g}" if isinstance(v, float) else str(v) for v in (row.get(c, "") for c in columns)))
        Console().print(table)
        for line in results(root)[1]:
            warnings.warn(f"{line}; until then it is not in the table", stacklevel=1)
        left = unfinished(root, rows)
        if left:
            print(f"{len(left)} of {len(rows) + len(left)} runs unfinished: {', '.join(left)}")
