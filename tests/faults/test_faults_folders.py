"""Run folders that go away, lie in the wrong place, or hold a folder where a file belongs."""

from __future__ import annotations

import csv
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from dpm_scales.errors import UserError
from dpm_scales.models.io import save_model
from dpm_scales.sweeps.table import results
from dpm_scales.training.reporting import LoggedSteps, MetricsFile
from dpm_scales.training.run_folder import FILES, FOLDERS, taken
from support.shell import (
    FAST,
    Outcome,
    assert_equal,
    attempt,
    call,
    checkpoint,
    column,
    files,
    photos,
    settings,
    table,
    train,
)

RUN = (*FAST, "trainer.max_steps=6", "trainer.val_check_interval=3", "trainer.log_every_n_steps=2", "ema.decay=0.9")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("folders") / "run", *RUN, "checkpoint.every_n_steps=2")


def error_line(outcome: Outcome) -> str:
    lines = [line for line in outcome.err.splitlines() if line.startswith("error: ")]
    assert outcome.status == 2 and len(lines) == 1 and "Traceback" not in outcome.err, outcome.out + outcome.err
    return lines[0]


# --- folders that go away ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("end", "step", "saved"),
    [("deleted", 1, 3), ("moved", 2, 3), ("with all above", 3, 4), ("replaced", 5, 6)],
    ids=["figure", "grid", "checkpoint", "end"],
)
def test_a_run_whose_folder_goes_away_is_saved_elsewhere(
    end: str, step: int, saved: int, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And is resumed from there to what an undisturbed run ends with. Nothing is made at the old place."""
    above = tmp_path / "runs"
    above.mkdir()
    run_dir = above / "run"
    original = LoggedSteps.on_train_batch_start

    def vanishing(self: LoggedSteps, trainer: Any, *rest: Any) -> None:
        if trainer.global_step == step and run_dir.exists():
            if end == "deleted":
                shutil.rmtree(run_dir)
            else:
                (above if end == "with all above" else run_dir).rename(tmp_path / "moved")
            if end == "replaced":
                run_dir.mkdir()
        original(self, trainer, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(LoggedSteps, "on_train_batch_start", vanishing)
        patch.setattr("tempfile.gettempdir", lambda: str(tmp_path / "temporary"))
        line = error_line(attempt(run_dir, *RUN, "checkpoint.every_n_steps=4"))
    place = (tmp_path / "temporary" if end == "with all above" else above) / "run-rescued"
    assert line.startswith(f"error: {run_dir} is gone: it was deleted, moved or unmounted while a command wrote to it")
    assert line.endswith(f"; the run is saved in {place}, and run_dir={place} resumes it")
    assert not run_dir.exists() or (end == "replaced" and not files(run_dir))
    assert {"config.yaml", "overrides.yaml", "metrics.csv", "checkpoints/last.ckpt"} <= set(files(place))
    assert checkpoint(place)["global_step"] == saved
    outcome = call("train.py", f"run_dir={place}", cwd=tmp_path)
    assert outcome.status == 0, outcome.err
    for part in ("state_dict", "current_model_state", "optimizer_states"):
        assert_equal(checkpoint(place)[part], checkpoint(finished)[part])
    assert column(place, "train/loss") == column(finished, "train/loss")


def test_an_export_without_a_folder_is_saved_elsewhere(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir, taken = tmp_path / "run", tmp_path / "run-rescued"
    taken.mkdir()

    def vanishing(folder: Path, *rest: Any) -> None:
        if folder.parent == run_dir:
            run_dir.rename(tmp_path / "moved")
        save_model(folder, *rest)

    monkeypatch.setattr("dpm_scales.training.run.save_model", vanishing)
    assert f"is saved in {tmp_path}/run-rescued-2, and" in error_line(attempt(run_dir, *RUN))
    kept = files(tmp_path / "run-rescued-2")
    assert kept["model/model.safetensors"] == files(finished)["model/model.safetensors"]
    assert {"result.json", "metrics.csv", "config.yaml"} <= set(kept) and not files(taken)


# --- places -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inside", ["", "runs/a", "linked"])
def test_runs_among_their_own_images_are_refused(inside: str, tmp_path: Path) -> None:
    root = photos(tmp_path / "photos", size=(8, 8))
    run_dir = root / inside
    if inside == "linked":
        (tmp_path / "link").symlink_to(root)
        run_dir = tmp_path / "link" / "run"
    before = files(root)
    options = ("data=folder", f"data.root={root}", "data.batch_size=4")
    line = error_line(call("train.py", *options, f"run_dir={run_dir}", cwd=tmp_path))
    assert f"run_dir={run_dir} lies in data.root={root}: the run's sample grids would become training images" in line
    assert files(root) == before
    assert attempt(tmp_path / "run", *options, "trainer.max_steps=1").status == 0
    line = error_line(call("train.py", "data=hf", *options[1:], f"run_dir={run_dir}", cwd=tmp_path))
    assert f"run_dir={run_dir} lies in data.root={root}: " in line and files(root) == before


def test_a_run_without_validation_images_says_so(tmp_path: Path) -> None:
    root = photos(tmp_path / "photos", 3, size=(8, 8))
    with pytest.warns(UserWarning, match="no validation images: no val/loss, no best.ckpt and no sample grids"):
        options = ("data=folder", f"data.root={root}", "data.val_fraction=0", "data.batch_size=2")
        assert attempt(tmp_path / "run", *options).status == 0


def test_names_that_are_too_long(finished: Path, tmp_path: Path) -> None:
    long = "x" * 300
    for script, option in (("train.py", "run_dir"), ("train.py", "resume"), ("sample.py", "model")):
        more = ["out=out"] if script == "sample.py" else []
        line = error_line(call(script, f"{option}={tmp_path / long}", *more, cwd=tmp_path))
        assert "too long" in line and len(line) < 1000
    copied = Path(shutil.copytree(finished, tmp_path / "run"))
    key = "x" * 5000
    (copied / "overrides.yaml").write_text(f"- {key}=1\n")
    assert "which is not a valid option" in error_line(call("train.py", f"run_dir={copied}", cwd=tmp_path))
    assert "too long" in error_line(call("train.py", f"{key}=1", f"run_dir={tmp_path / 'new'}", cwd=tmp_path))
    assert not (tmp_path / "new").exists()


# --- what lies in a folder --------------------------------------------------------------------------------------------


def test_a_folder_at_the_name_of_a_file_is_told_first(finished: Path, tmp_path: Path) -> None:
    """And a file at that of a folder: at every name that a run writes, before it has cost a step."""
    copied = Path(shutil.copytree(finished, tmp_path / "run"))
    names = sorted(path.relative_to(copied).as_posix() for path in copied.rglob("*"))
    assert {"metrics.csv", "result.json", "checkpoints/last.ckpt", "samples", "model/config.yaml"} <= set(names)
    for name in names:
        path, kept = copied / name, tmp_path / "kept"
        folder = path.is_dir()
        path.rename(kept)
        path.write_text("") if folder else path.mkdir()
        before = files(copied)
        kind = "a file, where a folder" if folder else "a folder, where a file"
        words = f"run/{name} is {kind} belongs" if name != ".lock" else "is a folder, and nothing"
        if "/" not in name or name == "checkpoints/last.ckpt":
            line = error_line(call("train.py", *RUN, f"run_dir={copied}", "trainer.max_steps=8", cwd=tmp_path))
            assert words in line
        else:  # found by the same look, without another start of the command
            with pytest.raises(UserError) as caught, taken(copied):
                pass
            assert words in str(caught.value)
        assert files(copied) == before
        path.unlink() if folder else path.rmdir()
        kept.rename(path)


def test_the_names_are_those_that_a_run_writes(finished: Path) -> None:
    for path in finished.rglob("*"):
        name = path.relative_to(finished)
        assert name.as_posix() in (*FOLDERS, ".lock") or any(name.match(pattern) for pattern in FILES), name


def test_missing_figures_are_told(finished: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(finished, tmp_path / "run"))
    (copied / "metrics.csv").unlink()
    with pytest.warns(UserWarning, match=r"metrics.csv is missing or empty: what was logged before step 6 is lost"):
        assert call("train.py", f"run_dir={copied}", "trainer.max_steps=8", cwd=tmp_path).status == 0
    assert [row["step"] for row in table(copied)] and settings(copied)["trainer"]["max_steps"] == 8


@pytest.mark.parametrize(
    "text",
    [
        "a,b\n",
        "a,step,step\n1,2,3\n",
        "step,epoch\n1,2,3\n",
        "step,val/loss\n1,x\n",
        "step,a\n-1,2\n",
        "step\n1_0_\n",
        "\xff",
    ],
)
def test_tables_of_others_are_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_bytes(text.encode("latin1"))
    with pytest.raises(UserError, match=r"metrics.csv is damaged \(.*\); remove it: the run begins a new one"):
        MetricsFile(path)


def test_an_empty_table_is_none(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text("")
    metrics = MetricsFile(path)
    metrics.log_metrics({"a": 1.5}, 3)
    metrics.save()
    with path.open(newline="") as file:
        assert list(csv.DictReader(file)) == [{"step": "3", "epoch": "", "a": "1.5"}]


def test_pipes_hang_nobody(finished: Path, tmp_path: Path) -> None:
    """In a sweep's folder, as a model, as an image."""
    for name in ("a", "b"):
        (tmp_path / "runs" / name).mkdir(parents=True)
    shutil.copy(finished / "result.json", tmp_path / "runs" / "a")
    os.mkfifo(tmp_path / "runs" / "b" / "result.json")
    found, damaged = results(tmp_path / "runs")
    assert list(found) == ["a"] and len(damaged) == 1 and "b/result.json is a pipe, where a file belongs" in damaged[0]
    (tmp_path / "export").mkdir()
    shutil.copy(finished / "model" / "config.yaml", tmp_path / "export")
    for name in ("x.ckpt", "export/model.safetensors", "x.png"):
        os.mkfifo(tmp_path / name)
    editing = (f"model={finished}", "task=inpaint", "image=x.png", "mask=x.png")
    for options in (("model=x.ckpt",), ("model=export/model.safetensors",), editing):
        line = error_line(call("sample.py", *options, "out=out", cwd=tmp_path))
        assert "is a pipe, where a file belongs; remove it" in line, line
