"""Sweeps: a folder for each job, named by its overrides, and one table."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from shell import FAST, SMALL, call, files, run

SIX = ("process=vp,heat,blurring", "process.num_scales=4,6", "sampler.steps=null")


def rows(root: Path) -> list[dict[str, str]]:
    with (root / "sweep.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def folders(root: Path) -> list[Path]:
    return sorted(path.parent for path in root.glob("*/result.json"))


@pytest.mark.slow
def test_six_runs_end_in_six_folders_and_one_table(tmp_path: Path) -> None:
    outcome = call("train.py", "-m", *SMALL, *FAST, *SIX, "run_dir=sweep", cwd=tmp_path)
    assert outcome.status == 0, outcome.err
    root = tmp_path / "sweep"
    assert len(folders(root)) == 6
    table = rows(root)
    pairs = {(row["process"], row["process.num_scales"]) for row in table}
    assert pairs == {(process, scales) for process in ("vp", "heat", "blurring") for scales in ("4", "6")}
    assert all(float(row["val/loss"]) > 0 and int(row["steps"]) == 6 for row in table)
    for folder in folders(root):
        assert {"model/model.safetensors", "model/config.yaml", "config.yaml", "metrics.csv"} <= set(files(folder))
    before = {folder: (folder / "model/model.safetensors").stat().st_mtime_ns for folder in folders(root)}
    again = call("train.py", "-m", *SMALL, *FAST, *SIX, "run_dir=sweep", cwd=tmp_path)
    assert again.status == 0, again.err
    assert before == {folder: (folder / "model/model.safetensors").stat().st_mtime_ns for folder in folders(root)}


@pytest.mark.slow
def test_joblib_runs_them_side_by_side_with_the_same_results(tmp_path: Path) -> None:
    two = ("process=vp,ve", "trainer.max_steps=4")
    one_by_one = run("train.py", "-m", *SMALL, *two, "run_dir=one", cwd=tmp_path)
    joblib = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
    together = run("train.py", "-m", *SMALL, *two, *joblib, "run_dir=two", cwd=tmp_path)
    assert one_by_one.status == 0 and together.status == 0, together.err
    assert [f.name for f in folders(tmp_path / "one")] == [f.name for f in folders(tmp_path / "two")]
    names = ("process", "steps", "val/loss")
    assert [[row[n] for n in names] for row in rows(tmp_path / "one")] == [
        [row[n] for n in names] for row in rows(tmp_path / "two")
    ]


def test_failing_job_leaves_the_others_results(tmp_path: Path) -> None:
    outcome = call(
        "train.py", "-m", *SMALL, "process.num_scales=6,0", "trainer.max_steps=2", "run_dir=sweep", cwd=tmp_path
    )
    assert outcome.status != 0
    line = outcome.err.strip().splitlines()[-1]
    assert "num_scales must be a whole number >= 1, got 0" in line and "Traceback" not in outcome.err
    table = rows(tmp_path / "sweep")
    assert len(table) == 1 and len(folders(tmp_path / "sweep")) == 1


def test_order_of_overrides_does_not_matter(tmp_path: Path) -> None:
    a = call("train.py", *SMALL, "process=ve", cwd=tmp_path)
    b = call("train.py", "process=ve", *reversed(SMALL), cwd=tmp_path)
    assert a.status == 0 and b.status == 0
    assert len(folders(tmp_path / "runs")) == 1 and "finished" in b.out
