"""Sweeps: a folder for each job, named by its overrides, and one table."""

from __future__ import annotations

import csv
import io
import json
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from joblib.externals.loky import get_reusable_executor
from rich.console import Console

from dpm_scales.sweeps import table as sweep
from dpm_scales.sweeps.naming import plain_name
from dpm_scales.tables import FORMULA
from dpm_scales.training.reporting import MetricsFile
from support.cluster_shell import Forked, wait_for
from support.shell import FAST, SMALL, call, checkpoint, files, settings
from support.warm import warm_python

SIX = ("process=vp,heat,blurring", "process.num_scales=4,6", "sampler.steps=null")


def rows(root: Path) -> list[dict[str, str]]:
    with (root / "sweep.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def rows_or_none(root: Path) -> list[dict[str, str]] | None:
    return rows(root) if (root / "sweep.csv").is_file() else None


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
    assert {"sweep"} == {path.name for path in tmp_path.iterdir()}  # Hydra's multirun.yaml is in it
    assert yaml.safe_load((root / "multirun.yaml").read_text())["run_dir"] == "sweep"
    assert "process.num_scales" in outcome.out and "seconds" in outcome.out  # the table is shown
    before = {folder: (folder / "model/model.safetensors").stat().st_mtime_ns for folder in folders(root)}
    again = call("train.py", "-m", *SMALL, *FAST, *SIX, "run_dir=sweep", cwd=tmp_path)
    assert again.status == 0, again.err
    assert before == {folder: (folder / "model/model.safetensors").stat().st_mtime_ns for folder in folders(root)}


@pytest.mark.slow
def test_joblib_runs_them_side_by_side_with_the_same_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In two workers, which are forks of this process."""
    two = ("process=vp,ve", "trainer.max_steps=4")
    one_by_one = call("train.py", "-m", *SMALL, *two, "run_dir=one", cwd=tmp_path)
    joblib = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
    monkeypatch.setattr(sys, "executable", warm_python())
    together = call("train.py", "-m", *SMALL, *two, *joblib, "run_dir=two", cwd=tmp_path)
    get_reusable_executor().shutdown(wait=True)
    assert one_by_one.status == 0 and together.status == 0, together.err
    assert [f.name for f in folders(tmp_path / "one")] == [f.name for f in folders(tmp_path / "two")]
    names = ("process", "steps", "val/loss")
    assert [[row[n] for n in names] for row in rows(tmp_path / "one")] == [
        [row[n] for n in names] for row in rows(tmp_path / "two")
    ]


@pytest.mark.slow
def test_sweep_that_is_killed_goes_on_where_it_stopped(tmp_path: Path) -> None:
    """kill -9 in its second run: the first is not repeated, the second resumes, the third starts."""
    run_options = (*SMALL, "trainer.max_steps=30", "trainer.val_check_interval=30", "checkpoint.every_n_steps=2")
    options = (*run_options, "seed=1,2,3", "run_dir=sweep")
    root = tmp_path / "sweep"
    process = Forked([{}], "-m", *options, cwd=tmp_path)
    wait_for(lambda: len(list(root.glob("*/checkpoints/last.ckpt"))) == 2, process)
    process.signal(signal.SIGKILL)
    assert [end.status for end in process.finish()] == [-9]
    (finished,) = folders(root)
    (stopped,) = (path.parents[1] for path in root.glob("*/checkpoints/last.ckpt") if path.parents[1] != finished)
    before, steps = files(finished), checkpoint(stopped)["global_step"]
    assert 2 <= steps < 30 and len(rows(root)) == 1
    again = call("train.py", "-m", *options, cwd=tmp_path)
    assert again.status == 0, again.err
    assert again.out.count("is finished (30 steps)") == 1 and again.out.count(", resuming ") == 1
    assert f"{stopped.name}: " in next(line for line in again.out.splitlines() if ", resuming " in line)
    assert files(finished) == before | {".lock": files(finished)[".lock"]}
    assert {settings(folder)["seed"] for folder in folders(root)} == {1, 2, 3} and len(rows(root)) == 3
    one = tmp_path / "one"  # undisturbed
    assert call("train.py", *run_options, "seed=2", f"run_dir={one}", cwd=tmp_path).status == 0
    assert settings(stopped)["seed"] == 2 and files(stopped / "model") == files(one / "model")


def test_failing_job_leaves_the_others_results(tmp_path: Path) -> None:
    outcome = call(
        "train.py", "-m", *SMALL, "process.num_scales=6,0", "trainer.max_steps=2", "run_dir=sweep", cwd=tmp_path
    )
    assert outcome.status != 0
    line = outcome.err.strip().splitlines()[-1]
    assert "num_scales must be a whole number >= 1, got 0" in line and "Traceback" not in outcome.err
    failed = [line for line in outcome.err.splitlines() if line.startswith("failed: ")]
    assert len(failed) == 1 and " process.num_scales=0 " in failed[0] and failed[0].endswith("got 0")
    table = rows(tmp_path / "sweep")
    assert len(table) == 1 and len(folders(tmp_path / "sweep")) == 1
    (good,) = folders(tmp_path / "sweep")
    (good / "result.json").write_text("{")
    with pytest.warns(UserWarning, match=rf"^sweep/{good.name}/result.json is damaged \(") as caught:
        again = call("train.py", "-m", *SMALL, "seed=1", "trainer.max_steps=1", "run_dir=sweep", cwd=tmp_path)
    assert len(caught) == 1 and "\n" not in str(caught[0].message)
    assert again.status == 0 and len(rows(tmp_path / "sweep")) == 1 and rows(tmp_path / "sweep")[0]["steps"] == "1"
    assert f"1 of 2 runs unfinished: {good.name}\n" in again.out


def test_mistyped_choice_ends_a_sweep_before_its_first_run(tmp_path: Path) -> None:
    outcome = call("train.py", "-m", *SMALL, "process=vp,haet", "run_dir=sweep", cwd=tmp_path)
    assert outcome.status == 2 and outcome.err.startswith("error: unknown process 'haet': did you mean 'heat'")
    assert folders(tmp_path / "sweep") == [] and not rows_or_none(tmp_path / "sweep")


def test_flags_may_come_last(tmp_path: Path) -> None:
    """Hydra's own parser takes them only before or behind all options."""
    outcome = call("train.py", *SMALL[:4], "-m", *SMALL[4:], "seed=1,2", "trainer.max_steps=1", cwd=tmp_path)
    assert outcome.status == 0, outcome.err
    (root,) = (tmp_path / "sweeps").iterdir()
    assert {row["seed"] for row in rows(root)} == {"1", "2"} and not (tmp_path / "runs").exists()


# --- folders ----------------------------------------------------------------------------------------------------------

ONE_STEP = (*(o for o in SMALL if not o.startswith("trainer.max_steps=")), "trainer.max_steps=1")


def test_sweep_has_a_folder_of_its_own_which_its_options_name(tmp_path: Path) -> None:
    """Not the time: the same options in another order find it again. It holds this sweep's runs alone."""
    single = call("train.py", *ONE_STEP, "seed=3", cwd=tmp_path)
    first = call("train.py", "-m", *ONE_STEP, "seed=1,2", cwd=tmp_path)
    assert single.status == first.status == 0, first.err
    (root,) = (tmp_path / "sweeps").iterdir()
    assert root.name.startswith("seed=1,2,data.batch_size=16,")  # what varies comes first
    assert sorted(folder.name[:7] for folder in folders(root)) == ["seed=1-", "seed=2-"]
    assert {row["seed"] for row in rows(root)} == {"1", "2"} and "run" in rows(root)[0]
    assert not (tmp_path / "runs" / "sweep.csv").exists() and len(folders(tmp_path / "runs")) == 1
    again = call("train.py", "seed=1,2", *reversed(ONE_STEP), "-m", cwd=tmp_path)
    assert again.status == 0 and again.out.count("is finished (1 steps)") == 2
    other = call("train.py", "-m", *ONE_STEP, "seed=1,2", "ema.decay=0.9", cwd=tmp_path)
    assert other.status == 0 and len(list((tmp_path / "sweeps").iterdir())) == 2 and "is finished" not in other.out


def test_runs_of_two_sweeps_in_one_folder_are_two(tmp_path: Path) -> None:
    """Their names show what varies; what does not is in their hash."""
    for decay in ("0.9", "0.99"):
        outcome = call("train.py", "-m", *ONE_STEP, "seed=1,2", f"ema.decay={decay}", "run_dir=sweep", cwd=tmp_path)
        assert outcome.status == 0 and "is finished" not in outcome.out
    assert len({(row["seed"], row["ema.decay"]) for row in rows(tmp_path / "sweep")}) == 4


def test_runs_under_their_old_names_go_on(tmp_path: Path) -> None:
    """Every option was in a name once, and a sweep's runs were in runs/."""
    options = [option for option in ONE_STEP if not option.startswith("samples.curves=")]  # a newer one
    jobs = [[*options, f"seed={seed}", "ema.decay=0.9123456789"] for seed in (1, 2)]
    for job in jobs:
        assert call("train.py", *job, f"run_dir=runs/{plain_name(job)}", cwd=tmp_path).status == 0
    (tmp_path / "runs" / "multirun.yaml").touch()
    sweep_again = call("train.py", "-m", *options, "seed=1,2", "ema.decay=0.9123456789", cwd=tmp_path)
    assert sweep_again.status == 0 and sweep_again.out.count("is finished (1 steps)") == 2, sweep_again.err
    assert call("train.py", *jobs[0], cwd=tmp_path).out.count("is finished (1 steps)") == 1
    assert len(folders(tmp_path / "runs")) == 2 and len(rows(tmp_path / "runs")) == 2
    assert not (tmp_path / "sweeps").exists()
    more = call("train.py", "-m", *ONE_STEP, "seed=1,2", "ema.decay=0.8", cwd=tmp_path)  # another sweep
    assert more.status == 0 and len(folders(tmp_path / "runs")) == 2 and len(list((tmp_path / "sweeps").iterdir())) == 1


def test_order_of_overrides_does_not_matter(tmp_path: Path) -> None:
    a = call("train.py", *SMALL, "process=ve", cwd=tmp_path)
    b = call("train.py", "process=ve", *reversed(SMALL), cwd=tmp_path)
    assert a.status == 0 and b.status == 0
    assert len(folders(tmp_path / "runs")) == 1 and "finished" in b.out


# --- the table --------------------------------------------------------------------------------------------------------


def put(root: Path, name: str, overrides: list[str], **values: Any) -> None:
    (root / name).mkdir(parents=True)
    (root / name / "result.json").write_text(json.dumps({"overrides": overrides, "steps": 6, **values}))


def test_table_shows_what_the_runs_differ_in(tmp_path: Path) -> None:
    put(tmp_path, "a", ["process=vp", "seed=1", "trainer.max_steps=6"], **{"val/loss": 0.5})
    put(tmp_path, "b", ["process=heat", "trainer.max_steps=6", "~sampler.steps"], **{"val/loss": 0.25, "new": 1.0})
    (tmp_path / "c").mkdir()  # a run that failed
    varied, found = sweep.write_table(tmp_path)
    assert varied == ["process", "seed", "~sampler.steps"]
    assert [row["run"] for row in found] == ["a", "b"]
    assert (tmp_path / "sweep.csv").read_text().splitlines() == [
        "run,process,seed,~sampler.steps,steps,val/loss,new",
        "a,vp,1,,6,0.5,",
        "b,heat,,,6,0.25,1.0",
    ]


DAMAGED = {
    "cut": '{"overrides": ["seed=1"], "ste',
    "empty": "",
    "list": "[1, 2]",
    "number": "3",
    "no overrides": '{"steps": 6}',
    "overrides": '{"overrides": {"seed": 1}, "steps": 6}',
    "no option": '{"overrides": [3], "steps": 6}',
    "steps": '{"overrides": ["seed=1"], "steps": "six"}',
    "infinity": '{"overrides": ["seed=1"], "steps": Infinity}',
    "deep": "[" * 10**5,
    "bytes": "\ud800",
}


def test_damaged_results_are_unfinished_runs(tmp_path: Path) -> None:
    """However many there are, the table holds the others, and one line names each file."""
    put(tmp_path, "a", ["seed=1"], **{"val/loss": 0.5})
    put(tmp_path, "z", ["seed=2"], **{"val/loss": 0.25})
    for name, text in DAMAGED.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "result.json").write_bytes(text.encode(errors="surrogatepass"))
    (tmp_path / "stopped").mkdir()
    for folder in tmp_path.iterdir():
        (folder / "overrides.yaml").write_text("[]\n")
    varied, found = sweep.write_table(tmp_path)
    assert varied == ["seed"] and [row["run"] for row in found] == ["a", "z"] and len(rows(tmp_path)) == 2
    told = sweep.results(tmp_path)[1]
    assert len(told) == len(DAMAGED) and not any("\n" in line for line in told)
    for line, name in zip(told, sorted(DAMAGED), strict=True):
        assert line.startswith(f"{tmp_path / name}/result.json is damaged (") and "; remove it: the run " in line
    assert sweep.unfinished(tmp_path, found) == sorted([*DAMAGED, "stopped"])


def test_table_misses_no_run_that_ends_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process may write its own table between our look and our writing."""
    put(tmp_path, "a", ["seed=1"])
    write = sweep.write_text

    def late(path: Path, text: str) -> None:
        if not (tmp_path / "b").exists():
            put(tmp_path, "b", ["seed=2"])
        write(path, text)

    monkeypatch.setattr(sweep, "write_text", late)
    sweep.write_table(tmp_path)
    assert [row["run"] for row in rows(tmp_path)] == ["a", "b"]


def lines(table: Any, width: int = 80) -> list[str]:
    console = Console(width=width, file=io.StringIO(), record=True)
    console.print(table)
    return [line.rstrip() for line in console.export_text().splitlines() if line.strip()]


def test_table_is_readable_at_80_columns() -> None:
    """However many options vary, and however long they are."""
    varied = ["process", "process.num_scales", *(f"network.option_{i}" for i in range(20)), "data.root"]
    found = [{**dict.fromkeys(varied, "x" * 30 + str(i)), "process": "vp", "val/loss": 1.0 + i} for i in range(3)]
    found[0]["process.num_scales"] = "0.123456789012345"
    found[1]["process.num_scales"] = "[red]\x1b[1m"
    shown = lines(sweep.summary(Path("sweeps/a"), varied, found, "val/loss"))
    assert all(len(line) <= 80 for line in shown)
    assert shown[0].strip() == "sweeps/a/sweep.csv"
    assert shown[1].split() == ["process", "num_scales", "option_0", "val/loss"]
    assert "0.1235" in shown[3] and "[red]\\x1b[1m" in shown[4] and f"{'x' * 11}…{'x' * 11}2" in shown[5]
    assert any(line.strip().startswith("20 more columns in sweep.csv: network.option_1, ") for line in shown)
    wide = lines(sweep.summary(Path("a"), varied[:2], found, "val/loss"))
    assert wide[1].split() == ["process", "num_scales", "val/loss", "seconds"]
    two = [f"{part}.{name}" for part in ("data", "network") for name in ("seed", "x")]
    heads = lines(sweep.summary(Path("a"), two, [{"run": "a", **dict.fromkeys(two, "1")}], "val/loss"))[1]
    assert heads.split() == ["data.seed", "data.x", "network.seed", "network.x", "val/loss", "seconds"]
    assert lines(sweep.summary(Path("a"), [], [{"run": "a", "val/loss": 2.0}], "val/loss"))[1].split()[0] == "run"


def test_losses_of_different_processes_are_not_sorted_as_if_they_compared() -> None:
    """Each process by itself, the best first, and a line that says why; figures of the samples compare all."""
    losses = {("vp", "1"): 0.3, ("vp", "2"): 0.1, ("heat", "1"): 20.0, ("heat", "2"): None, ("heat", "3"): 0.2}
    found = [
        {"run": f"{p}{s}", "process": p, "seed": s, "seconds": 1.0, "val/loss": loss, "eval/fid": loss}
        for (p, s), loss in losses.items()
    ]
    varied = ["process", "seed"]

    def order(objective: str, highest: bool = False, rows: Any = found) -> list[list[str]]:
        return [[row["run"] for row in group] for group in sweep.compared(varied, rows, objective, highest)]

    assert order("val/loss") == [["heat3", "heat1", "heat2"], ["vp2", "vp1"]]
    assert order("val/loss", highest=True) == [["heat1", "heat3", "heat2"], ["vp1", "vp2"]]
    assert order("eval/fid") == [["vp2", "heat3", "vp1", "heat1", "heat2"]]
    shown = lines(sweep.summary(Path("a"), varied, found, "val/loss"))
    assert ["".join(line.split()[:2]) for line in shown[3:8]] == ["heat3", "heat1", "heat2", "vp2", "vp1"]
    pairs = [(scales, process) for scales in "12" for process in ("vp", "ve")]
    grid = [{"run": f"{s}{p}", "process.num_scales": s, "process": p, "val/loss": 1.0} for s, p in pairs]
    together = [group[0]["run"] for group in sweep.compared(["process.num_scales", "process"], grid, "val/loss")]
    assert together == ["1ve", "2ve", "1vp", "2vp"]
    assert "measure different things" in " ".join(shown)
    for rows, objective in ((found, "eval/fid"), (found[:2], "val/loss")):
        assert "different" not in " ".join(lines(sweep.summary(Path("a"), varied, rows, objective)))
    apart = ["process/noise", "process.num_scales", "target", "data.root", "+data.x", "experiment"]
    for option in (*apart, "seed", "network", "optimizer.learning_rate", "data.batch_size", "data.random_flip"):
        two = [{"run": "a", option: "1", "val/loss": 1.0}, {"run": "b", option: "2", "val/loss": 2.0}]
        assert len(sweep.compared([option], two, "val/loss")) == (2 if option in apart else 1), option


def test_no_table_holds_a_formula(tmp_path: Path) -> None:
    """What a spreadsheet would run: keys and values of a stranger's result, and options; numbers stay numbers."""
    put(tmp_path, "a", ["seed=@SUM(A1)", "+new=1"], **{"=cmd|'/c calc'!A0": -0.5, "val/loss": -1e-3})
    put(tmp_path, "b", ["seed=-2", "+new=\t=2", "-x=\uff1d3"], **{"@x": "+5", "-y": "-z"})
    sweep.write_table(tmp_path)
    with (tmp_path / "sweep.csv").open(newline="") as file:
        cells = [cell for row in csv.reader(file) for cell in row]
    assert {"'=cmd|'/c calc'!A0", "'@SUM(A1)", "'+new", "'\t=2", "'-x", "'\uff1d3", "'@x", "'-y", "'-z"} <= set(cells)
    assert {"-0.5", "-0.001", "-2", "+5"} <= set(cells)
    assert not [c for c in cells if c.startswith(FORMULA) and c not in ("-0.5", "-0.001", "-2", "+5")]
    log = MetricsFile(tmp_path / "metrics.csv")
    log.log_metrics({"train/loss": -0.25, "=1+1": 1.0}, 3)
    log.save()
    assert log.path.read_text() == "step,epoch,train/loss,'=1+1\n3,,-0.25,1\n"


# --- several processes for each run -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_sweep_of_runs_with_two_processes_each(tmp_path: Path) -> None:
    """The second process does that run alone, and the next run of the sweep starts another."""
    two = ("seed=1,2", "trainer=ddp", "trainer.devices=2", "trainer.max_steps=3", "checkpoint.every_n_steps=2")
    (outcome,) = Forked([{}], "-m", *SMALL, *two, "run_dir=sweep", cwd=tmp_path).finish()
    assert outcome.status == 0, outcome.err
    assert len(folders(tmp_path / "sweep")) == 2 and outcome.out.count("batch 16 x 2") == 2
    for folder in folders(tmp_path / "sweep"):
        assert checkpoint(folder)["global_step"] == 3
        assert checkpoint(folder)["ImageDataModule"]["world_size"] == 2
    seeds = {settings(folder)["seed"] for folder in folders(tmp_path / "sweep")}
    assert seeds == {1, 2} and len(rows(tmp_path / "sweep")) == 2
