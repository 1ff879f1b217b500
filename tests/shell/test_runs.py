"""`dpm-scales runs`: states, metrics and ranks of runs, from their files alone, whatever these hold."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.cells import cell_len
from rich.console import Console

from dpm_scales.commands.runs import run
from dpm_scales.commands.runs_table import table
from dpm_scales.errors import UserError
from dpm_scales.run_folders.find import find_runs
from dpm_scales.run_folders.looking import lock_holder
from dpm_scales.run_folders.state import STATES as STATE_NAMES
from dpm_scales.run_folders.state import Run, read_run
from dpm_scales.training.module import DiffusionModule
from dpm_scales.training.run_folder import only_run
from support.shell import ROOT, SMALL, attempt, broken_off, call, train

#: as `write_checkpoint` ends its files
SEAL = "\ndpm_scales checkpoint 0003 step {:012d} sha256 " + "0" * 64 + "\n"


def put(
    folder: Path,
    *overrides: str,
    max_steps: int | None = 100,
    result: dict[str, Any] | None = None,
    checkpoint: int | None = None,
    metrics: str | None = None,
    **config: Any,
) -> Path:
    """Write a run's folder, with those of its files that are given."""
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "overrides.yaml").write_text(yaml.safe_dump(list(overrides)))
    (folder / "config.yaml").write_text(yaml.safe_dump({"trainer": {"max_steps": max_steps}, **config}))
    if result is not None:
        (folder / "result.json").write_text(json.dumps({"overrides": list(overrides), "seconds": 2.5, **result}))
    if checkpoint is not None:
        (folder / "checkpoints" / "last.ckpt").write_text(SEAL.format(checkpoint))
    if metrics is not None:
        (folder / "metrics.csv").write_text(metrics)
    return folder


def listed(place: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, Any]]:
    run([str(place), *arguments, "--json"])
    values: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    return values


# --- states -----------------------------------------------------------------------------------------------------------

METRICS = "step,epoch,train/loss,val/loss,eval/fid\n0,0,3,2.5,\n9,0,2,1.5,30\n19,1,1,1.75,\n"
STATES: dict[str, tuple[dict[str, Any], str, int]] = {
    "new": ({}, "new", 0),
    "logged": ({"metrics": METRICS}, "interrupted", 20),
    "saved": ({"checkpoint": 40, "metrics": METRICS}, "interrupted", 40),
    "done": ({"checkpoint": 100, "result": {"steps": 100}}, "finished", 100),
    "done without checkpoints": ({"result": {"steps": 100}}, "finished", 100),
    "extended": ({"checkpoint": 60, "result": {"steps": 50}}, "interrupted", 60),
    "extended, not yet begun": ({"checkpoint": 50, "result": {"steps": 50}}, "interrupted", 50),
    "shortened": ({"checkpoint": 100, "result": {"steps": 100}, "max_steps": 50}, "finished", 100),
    "begun anew": ({"checkpoint": 20, "result": {"steps": 90}}, "interrupted", 20),
    "ended by time": (
        {"checkpoint": 70, "result": {"steps": 70}, "trainer": {"max_steps": 100, "max_time": "00:01:00:00"}},
        "finished",
        70,
    ),
    "no limit": ({"checkpoint": 70, "result": {"steps": 70}, "max_steps": -1}, "finished", 70),
    "forged": ({"checkpoint": 40, "result": {"steps": 10**9}}, "damaged", 40),
    "forged without checkpoints": ({"result": {"steps": 10**9}}, "damaged", 0),
}


@pytest.mark.parametrize("case", STATES)
def test_the_state_follows_from_the_files(case: str, tmp_path: Path) -> None:
    given, state, steps = STATES[case]
    found = read_run(put(tmp_path / "a", **given))
    assert (found.state, found.steps) == (state, steps), found.reason
    assert found.resumes_from == given.get("checkpoint")
    if case.startswith("forged"):
        source = "checkpoints/last.ckpt says 40" if "checkpoint" in given else "config.yaml says 100"
        assert found.reason.endswith(f"({10**9} steps, and {source}); remove it: the run writes it anew")


def test_metrics_are_the_last_values_and_the_lowest_validation_loss(tmp_path: Path) -> None:
    found = read_run(put(tmp_path / "a", metrics=METRICS, result={"steps": 20, "val/loss": 1.75, "note": "x"}))
    assert found.metrics == {"train/loss": 1, "val/loss": 1.75, "eval/fid": 30, "val/best_loss": 1.5}
    assert found.best_step == 10 and found.seconds == 2.5


def test_a_lock_is_seen_without_being_taken(tmp_path: Path) -> None:
    folder = put(tmp_path / "a", checkpoint=40)
    code = (
        "import sys\nfrom pathlib import Path\nfrom dpm_scales.locks import lock\n"
        f"with lock(Path({str(folder / '.lock')!r}), '', ''):\n    print('held', flush=True)\n    sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=-1, stdout=-1, text=True, cwd=ROOT) as holder:
        assert holder.stdin is not None and holder.stdout is not None and holder.stdout.readline() == "held\n"
        found = read_run(folder)
        assert found.state == "running" and found.reason.startswith(f"process {holder.pid} on ")
        holder.stdin.close()
        holder.wait(timeout=60)
    assert read_run(folder).state == "interrupted" and lock_holder(folder / ".lock") is None
    with only_run(folder):  # which another process could not take while it is held
        pass


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with runs of `train.py`: finished, interrupted, failed."""
    folder = tmp_path_factory.mktemp("trained")
    train(folder / "whole")
    with broken_off(4):
        attempt(folder / "cut", "checkpoint.every_n_steps=2", "trainer.val_check_interval=2")
    return folder


def test_runs_of_train_py(trained: Path) -> None:
    whole, cut = read_run(trained / "whole"), read_run(trained / "cut")
    assert (whole.state, whole.steps, whole.max_steps, whole.resumes_from) == ("finished", 6, 6, 6), whole.reason
    result = json.loads((trained / "whole" / "result.json").read_text())
    assert whole.metrics["val/loss"] == result["val/loss"] and whole.overrides["trainer.max_steps"] == "6"
    sizes = {file.stat().st_ino: file.stat().st_size for file in (trained / "whole").rglob("*") if file.is_file()}
    assert whole.bytes == sum(sizes.values()) and whole.bytes_complete and time.time() - whole.changed < 3600
    assert (cut.state, cut.reason, cut.resumes_from) == ("failed", "ZeroDivisionError()", 4)


def test_a_resumed_run_forgets_its_failure(trained: Path, tmp_path: Path) -> None:
    with broken_off(1):
        attempt(tmp_path / "run", "trainer.max_steps=2")
    assert (tmp_path / "run" / "failure.txt").read_text() == "ZeroDivisionError()\n"
    train(tmp_path / "run", "trainer.max_steps=2")
    assert read_run(tmp_path / "run").state == "finished" and not (tmp_path / "run" / "failure.txt").exists()


def test_the_line_of_a_failure_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: DiffusionModule, *args: Any) -> None:
        raise UserError("the loss\nis not finite")

    monkeypatch.setattr(DiffusionModule, "training_step", fail)
    outcome = attempt(tmp_path / "run")
    assert outcome.status == 2 and outcome.err.strip() == "error: the loss is not finite"
    found = read_run(tmp_path / "run")
    assert (found.state, found.reason, found.steps) == ("failed", "the loss is not finite", 0)


def test_a_refused_option_is_no_failure(trained: Path) -> None:
    outcome = call("train.py", f"run_dir={trained / 'whole'}", "process=heat", cwd=trained)
    assert outcome.status == 2 and read_run(trained / "whole").state == "finished"


def test_a_forged_result_does_not_finish_a_run(tmp_path: Path) -> None:
    run_dir = train(tmp_path / "run", "trainer.max_steps=2")
    file = run_dir / "result.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "steps": 10**9}))
    outcome = attempt(run_dir, "trainer.max_steps=3")
    line = (
        f"error: {file} is damaged ({10**9} steps, and checkpoints/last.ckpt says 2); remove it: the run writes it anew"
    )
    assert outcome.status == 2 and outcome.err.strip() == line
    file.unlink()
    outcome = attempt(run_dir, "trainer.max_steps=3")
    assert outcome.status == 0 and "resuming" in outcome.out and read_run(run_dir).state == "finished"


# --- files of strangers -----------------------------------------------------------------------------------------------


def sparse(file: Path) -> None:
    with file.open("wb") as out:
        out.truncate(2**34)


#: as text it would have 10^9 words
ALIASES = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 9))
ALIASES += "process: {_target_: *a8}\n"
DAMAGE = {
    "result cut": lambda f: (f / "result.json").write_text('{"overrides": ['),
    "result deep": lambda f: (f / "result.json").write_text("[" * 10**5),
    "result huge": lambda f: sparse(f / "result.json"),
    "result number": lambda f: (f / "result.json").write_text('{"overrides": [], "steps": 1' + "0" * 5000 + "}"),
    "result pipe": lambda f: os.mkfifo(f / "result.json"),
    "result link": lambda f: (f / "result.json").symlink_to("/dev/zero"),
    "metrics of another": lambda f: (f / "metrics.csv").write_text("a,b\n1,2\n"),
    "metrics text": lambda f: (f / "metrics.csv").write_text("step,val/loss\n1,x\n"),
    "metrics bytes": lambda f: (f / "metrics.csv").write_bytes(b"step,val/loss\n1,\xff\n"),
    "metrics huge": lambda f: sparse(f / "metrics.csv"),
    "metrics pipe": lambda f: os.mkfifo(f / "metrics.csv"),
    "metrics link": lambda f: (f / "metrics.csv").symlink_to("/dev/zero"),
    "config list": lambda f: (f / "config.yaml").write_text("[1]"),
    "config object": lambda f: (f / "config.yaml").write_text("!!python/object/apply:os.system [touch made]"),
    "config deep": lambda f: (f / "config.yaml").write_text("[" * 10**6),
    "config huge": lambda f: sparse(f / "config.yaml"),
    "config aliases": lambda f: (f / "config.yaml").write_text(ALIASES),
    "many options": lambda f: (f / "overrides.yaml").write_text("".join(f"- a{i}=1\n" for i in range(10**4))),
    "overrides": lambda f: (f / "overrides.yaml").write_text("{a: 1}"),
    "failure pipe": lambda f: os.mkfifo(f / "failure.txt"),
    "lock link": lambda f: (f / ".lock").symlink_to("/dev/tty"),
    "checkpoint link": lambda f: (f / "checkpoints" / "last.ckpt").symlink_to("/etc/passwd"),
    "evaluation cut": lambda f: (f / "evaluation.json").write_text("{"),
    "evaluation of another": lambda f: (f / "evaluation.json").write_text('{"format": 3}'),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_run_is_listed_with_a_reason(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    put(tmp_path / "runs" / "whole", checkpoint=40)
    DAMAGE[case](put(tmp_path / "runs" / "x"))
    whole, damaged = listed(Path("runs"), capsys)
    assert whole["state"] == "interrupted" and damaged["state"] == "damaged"
    assert damaged["reason"].startswith(("runs/x/", "'runs/x/")) and len(damaged["reason"]) < 400
    assert not (tmp_path / "made").exists()
    for arguments in (["runs", "--csv"], ["runs"]):
        run(arguments)
    out = capsys.readouterr().out
    assert f"x: {damaged['reason']}" in out and "2 runs, 1 interrupted, 1 damaged" in out


def test_control_characters_are_escaped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evil = "\x1b[2J\u202e"
    folder = put(tmp_path / f"a{evil}", f"seed={evil}", f"{evil}=1", metrics=f'step,"eval/{evil}"\n1,2\n', checkpoint=1)
    put(tmp_path / "b", "seed=1", metrics="step,val/loss\n1,2\n", checkpoint=1)
    (folder / "failure.txt").write_text(f"no{evil}")
    (tmp_path / "judged").mkdir()
    (tmp_path / "judged" / "evaluation.json").write_text(json.dumps({"format": evil}))
    for arguments in ([], ["--csv"], ["--json"], ["state=failed"]):
        run([str(tmp_path), *arguments])
    run(["best", str(tmp_path), "metric=val/loss"])
    out, err = capsys.readouterr()
    assert "\x1b" not in out + err and "\u202e" not in out + err and "a\\x1b[2J\\u202e" in out


def test_paths_that_can_not_be_printed_are_no_answer(tmp_path: Path) -> None:
    put(tmp_path / "a\n-rf", metrics="step,val/loss\n1,2\n", checkpoint=1)
    with pytest.raises(UserError, match=r"a\\n-rf has characters that can't be printed; rename it$"):
        run(["best", str(tmp_path), "--path"])


def test_links_lead_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path / "scratch" / "a")
    (tmp_path / "place").mkdir()
    monkeypatch.chdir(tmp_path / "place")
    for name in ("elsewhere", "runs"):
        Path(name).symlink_to(tmp_path / "scratch")
    Path("loop").symlink_to(".")
    put(Path(".hidden/a"))
    put(Path("node_modules/a"))
    assert [str(one.folder) for one in find_runs().runs] == ["runs/a"]  # a place that many users keep on another disk
    assert [str(one.folder) for one in find_runs(".").runs] == []
    assert [str(one.folder) for one in find_runs("elsewhere").runs] == ["elsewhere/a"]


def test_large_folders_are_not_looked_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    put(tmp_path / "runs" / "a")
    for index in range(20):
        (tmp_path / "images" / "deep" / str(index)).mkdir(parents=True)
    monkeypatch.setattr("dpm_scales.run_folders.find.MOST_ENTRIES", 12)
    run([str(tmp_path), "--json"])
    out, err = capsys.readouterr()
    assert len(json.loads(out)) == 1 and "warning: only the first " in err


# --- the table --------------------------------------------------------------------------------------------------------


def lines(runs: list[Run], width: int) -> list[str]:
    console = Console(width=width, file=io.StringIO(), record=True)
    console.print(table(runs, width, now=10.0**9))
    return [line.rstrip() for line in console.export_text().splitlines() if line.strip()]


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_tables_fit_the_terminal(width: int, tmp_path: Path) -> None:
    runs = []
    for index, name in enumerate(("first", "second" * 12, "数字" * 8)):
        folder = put(tmp_path / name, f"seed={index}", "process=vp", metrics=METRICS, result={"steps": 20})
        os.utime(folder / "metrics.csv", (10**9 - 7200,) * 2)
        for file in ("result.json", "config.yaml", "overrides.yaml"):
            os.utime(folder / file, (10**9 - 90000,) * 2)
        runs.append(read_run(folder))
    head, *rows = lines(runs, width)[int(width < 120) :]  # after the folder, which takes two lines where it is narrow
    rows = [head, *rows] if "state" in head else rows
    assert max(map(cell_len, rows)) <= width
    first = rows[2].split()
    assert first[:3] == ["first", "interrupted", "20/100"], rows
    assert ("seed" in rows[0]) == (width >= 120) and "process" not in rows[0]
    if width == 200:
        heads = ["run", "state", "steps", "seed", "train/loss", "val/loss", "val/best_loss", "eval/fid", "changed"]
        assert rows[0].split() == [*heads, "size"]
        assert first[3:11] == ["0", "1", "1.75", "1.5", "30", "2", "h", "ago"]
    else:
        assert "with --csv or --json" in rows[-1]


def test_options_not_given_are_those_of_the_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(tmp_path / "a", "seed=3", "run_dir=a", "trainer.max_steps=5", seed=3, process={"_target_": "x.processes.VP"})
    put(tmp_path / "b", "run_dir=b", "process=heat", seed=0)
    run([str(tmp_path)])
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith((" run", " a", " b"))]
    assert [row[3:5] for row in rows] == [["seed", "process"], ["3", "VP"], ["0", "heat"]]
    assert "max_steps" not in rows[0]


def test_the_page_explains_every_state() -> None:
    page = (ROOT / "docs" / "runs.md").read_text()
    assert re.findall(r"^\| `(\w+)` \| \w", page, re.MULTILINE) == list(STATE_NAMES)


def test_csv_has_a_column_for_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(tmp_path / "a", "seed=1", "state=x", metrics=METRICS)
    put(tmp_path / "b", "optimizer.learning_rate=0.1", result={"steps": 100, "val/loss": 0.5, "eval/fid": float("nan")})
    run([str(tmp_path), "--csv"])
    first, second = csv.DictReader(io.StringIO(capsys.readouterr().out))
    assert (first["state"], first["seed"], first["eval/fid"], first["val/loss"]) == ("interrupted", "1", "30.0", "1.75")
    assert (second["state"], second["optimizer.learning_rate"], second["seed"]) == ("finished", "0.1", "")
    values = listed(tmp_path, capsys)
    assert values[1]["metrics"] == {"val/loss": 0.5, "eval/fid": None} and values[0]["options"]["state"] == "x"


def test_nothing_heavy_is_imported(tmp_path: Path) -> None:
    for index in range(3):
        put(tmp_path / str(index), metrics=METRICS, checkpoint=20)
    code = f"from dpm_scales.commands.runs import run\nrun([{str(tmp_path)!r}])\nrun(['best', {str(tmp_path)!r}])"
    names = "\nprint(*sorted({name.partition('.')[0] for name in sys.modules}), file=sys.stderr)"
    code += f"\nimport sys{names}\nfrom dpm_scales.commands.plot import run\nrun([{str(tmp_path / '0')!r}]){names}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    listing, drawing = (set(line.split()) for line in done.stderr.splitlines())
    heavy = {"torch", "hydra", "omegaconf", "lightning", "safetensors"}
    assert not (heavy | {"numpy", "matplotlib"}) & listing and "rich" in listing
    assert not heavy & drawing and "matplotlib" in drawing and (tmp_path / "0" / "curves.png").is_file()


def test_small_options_are_the_suites(trained: Path) -> None:
    assert {option.partition("=")[0] for option in SMALL} <= set(read_run(trained / "whole").overrides)
