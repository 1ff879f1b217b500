"""One table of results after a sweep."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from dpm_scales.images import write_text


def collect(root: Path) -> list[dict[str, Any]]:
    """Results of all finished runs directly below `root`, by folder name."""
    rows = []
    for path in sorted(root.glob("*/result.json")):
        result = json.loads(path.read_text())
        result.pop("overrides")
        rows.append({"run": path.parent.name, **result})
    return rows


class SweepTable(Callback):
    """Prints the runs of a sweep beside each other, and writes `sweep.csv` into their common folder."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        root = sweep_root(config)
        rows = collect(root)
        if not rows:
            return
        columns = list(dict.fromkeys(name for row in rows for name in row))
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_text(root / "sweep.csv", buffer.getvalue())
        table = Table(title=f"{root}/sweep.csv")
        for name in columns:
            table.add_column(name, overflow="fold")
        for row in rows:
            table.add_row(*(f"{v:.4g}" if isinstance(v, float) else str(v) for v in (row.get(c, "") for c in columns)))
        Console().print(table)


def sweep_root(config: DictConfig) -> Path:
    """Folder of a sweep's run folders: `run_dir` if given, else runs/."""
    return Path(config.run_dir or "runs")


def is_sweep() -> bool:
    """Whether this job is one of several."""
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN
