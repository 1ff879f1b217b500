"""A stranger's run folder: whatever lies in the place of a file or a folder, nothing is written elsewhere."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from dpm_scales import storage
from dpm_scales.commands.measure import run as measure
from dpm_scales.errors import UserError
from support.shell import SMALL, Outcome, call, files, train

OPTIONS = (
    *("trainer.max_steps=3", "trainer.val_check_interval=2", "logger=tensorboard"),
    *("checkpoint.every_n_steps=1", "checkpoint.keep_last=3", "checkpoint.keep_best=2"),
)
FILES = ("config.yaml", "overrides.yaml", "metrics.csv", "result.json", ".lock", "model/config.yaml")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With all that a run may leave behind."""
    folder = train(tmp_path_factory.mktemp("folders") / "run", *OPTIONS)
    (folder / "wandb_id").write_text("0123abcd")
    (folder / "unreadable.txt").write_text("1 unreadable images\n")
    return folder


def names(folder: Path) -> list[str]:
    """Of all files and folders, at any depth."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    """A folder with a file of the name that every folder of a run may have, and one beside it."""
    folder = tmp_path / "victim"
    folder.mkdir()
    for name in ("precious", "config.yaml", "model.safetensors", "step-000003.png"):
        (folder / name).write_text("precious")
    return folder


@contextlib.contextmanager
def replaced(path: Path, kind: str, victim: Path) -> Iterator[None]:
    """Something else in the place of a file or folder, for a while."""
    kept = victim.parent / f"kept {path.name}"
    folder = path.is_dir()
    path.rename(kept)
    if kind == "link":
        path.symlink_to(victim if folder else victim / "precious")
    elif kind == "pipe":
        os.mkfifo(path)
    elif folder:
        path.write_text("in the way")
    else:
        path.mkdir()
    try:
        yield
    finally:
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        kept.rename(path)


def resume(folder: Path, *options: str) -> Outcome:
    return call("train.py", f"run_dir={folder}", "trainer.max_steps=5", *options, cwd=folder.parent)


def assert_refused(outcome: Outcome, *words: str) -> None:
    lines = outcome.err.splitlines()
    assert outcome.status == 2 and len(lines) == 1 and lines[0].startswith("error: "), outcome.out + outcome.err
    assert all(word in lines[0] for word in words), lines[0]


def test_a_link_at_every_name_is_refused(run: Path, victim: Path, tmp_path: Path) -> None:
    """Before anything is written. What lies deeper is found by the same walk, without another start of the command."""
    copied = Path(shutil.copytree(run, tmp_path / "run"))
    found = names(copied)
    assert {*FILES, "samples", "model", "checkpoints", "checkpoints/last.ckpt", "tensorboard"} <= set(found)
    before, precious = files(copied), files(victim)
    for name in found:
        with replaced(copied / name, "link", victim):
            words = f"run/{name}' is a link, and nothing is written through it; remove it"
            with pytest.raises(UserError) as caught:
                storage.check_folder(copied)
            assert words in str(caught.value)
            if "/" not in name and name != "overrides.yaml":
                assert_refused(resume(copied), words)
        assert files(copied) == before and files(victim) == precious, name


def test_links_that_appear_later_are_not_followed(
    run: Path, victim: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or that the first look misses. Files are replaced by new ones; a lock and folders are refused."""
    monkeypatch.setattr("dpm_scales.training.run_folder.check_folder", lambda *_: None)
    precious = files(victim)
    cases = ("metrics.csv config.yaml result.json", ".lock", "samples", "model", "checkpoints")
    for number, name in enumerate(cases):
        copied = Path(shutil.copytree(run, tmp_path / f"run{number}"))
        with contextlib.ExitStack() as stack:
            for each in name.split():
                stack.enter_context(replaced(copied / each, "link", victim))
            outcome = resume(copied, "logger=csv")
            assert files(victim) == precious, name
            if " " not in name:
                assert outcome.status == 2 and "Traceback" not in outcome.err
                assert f"run{number}/{name}' is a link, and nothing is written through it" in outcome.err, outcome.err


def test_the_links_are_dangerous(run: Path, victim: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the two looks, what they point to is lost."""
    monkeypatch.setattr("dpm_scales.training.run_folder.check_folder", lambda *_: None)
    monkeypatch.setattr("dpm_scales.training.run_folder.guarded", lambda *_: contextlib.nullcontext())
    copied = Path(shutil.copytree(run, tmp_path / "run"))
    with replaced(copied / "model", "link", victim):
        assert resume(copied, "logger=csv").status == 0
    assert (victim / "config.yaml").read_text() != "precious"


def test_links_where_results_have_a_folder_of_their_own(run: Path, victim: Path, tmp_path: Path) -> None:
    """A process fitted to another, the best options of a search, the covariance of a model."""
    precious = files(victim)
    out = tmp_path / "out"
    out.mkdir()
    (out / "process").symlink_to(victim)
    options = ("task=match", "criterion=snr", "like=blurring", "data=photos", "limit=1", "times=[1,5]", f"out={out}")
    assert_refused(
        call("evolve.py", *options, cwd=tmp_path), "out/process' is a link, and nothing is written through it"
    )
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "experiment").symlink_to(victim)
    search = ("-m", "hydra/sweeper=optuna", "hydra.sweeper.n_trials=1", "seed=range(0,9)", f"run_dir={tmp_path}/root")
    outcome = call("train.py", *search, *SMALL, "trainer.max_steps=1", cwd=tmp_path)
    assert_refused(outcome, "root/experiment' is a link, and nothing is written through it")
    copied = Path(shutil.copytree(run, tmp_path / "run"))
    kept = Path(shutil.move(copied / "model", tmp_path / "kept"))
    (copied / "model").symlink_to(kept)
    before = files(kept)
    with pytest.raises(UserError, match="run/model' is a link, and nothing is written through it"):
        measure([str(copied), "num_images=4"])
    assert files(kept) == before and files(victim) == precious
    (tmp_path / "link").symlink_to(kept)  # what was typed may be one
    measure([str(tmp_path / "link"), "images=digits", "num_images=4"])
    assert set(files(kept)) - set(before) == {"covariance.safetensors"}


def test_links_in_the_folder_of_a_sweep(victim: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where Hydra and Optuna write too, and where a run's own folder may be a link."""
    root, precious = tmp_path / "sweep", files(victim)
    root.mkdir()
    sweep = ("-m", "seed=0,1", f"run_dir={root}", *SMALL, "trainer.max_steps=1", "samples.num_images=0")
    for name in ("multirun.yaml", "study.db", ".submitit"):
        (root / name).symlink_to(victim / "precious")
        assert_refused(call("train.py", *sweep, cwd=tmp_path), f"sweep/{name}' is a link, and nothing is written")
        (root / name).unlink()
    assert call("train.py", *sweep, cwd=tmp_path).status == 0
    first = next(path.parent for path in sorted(root.glob("*/result.json")))
    shutil.rmtree(first)
    first.symlink_to(victim)
    outcome = call("train.py", *sweep, cwd=tmp_path)
    assert outcome.status == 2 and f"{first.name}' is a link, and nothing is written" in outcome.err, outcome.err
    assert files(victim) == precious


# --- places in stored options -----------------------------------------------------------------------------------------

PLACES = (
    "logger.save_dir={away}",
    "logger.save_dir=runs",
    "logger.save_dir=null",
    "++logger={save_dir:away}",
    'logger.save_dir="~/x"',
    "logger.save_dir={run}/../x",
    "logger.save_dir={run}/$EMPTY/../x",
    "logger.name={away}",
    "logger.name=../x",
    "logger.version=../../x",
    "+logger.sub_dir=../x",
    "+logger.log_dir=x",
    "+logger.settings={files_dir:{away}}",
    "+trainer.default_root_dir={away}",
    "+trainer.default_root_dir=null",
)


@pytest.mark.parametrize("option", PLACES)
def test_stored_options_lead_nowhere(option: str, run: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(run, tmp_path / "run"))
    stored = copied / "overrides.yaml"
    text = option.replace("{away}", str(tmp_path / "away")).replace("{run}", str(copied))
    stored.write_text(yaml.safe_dump([*yaml.safe_load(stored.read_text()), text]))
    before = files(tmp_path)
    outcome = resume(copied)
    assert_refused(outcome, repr(text), "names a place to write to outside of", "give this option on the command line")
    assert files(tmp_path) == before


def test_places_within_the_run_and_on_the_command_line(run: Path, tmp_path: Path) -> None:
    """Are the user's to choose."""
    copied = Path(shutil.copytree(run, tmp_path / "run"))
    stored = copied / "overrides.yaml"
    options = yaml.safe_load(stored.read_text())
    stored.write_text(yaml.safe_dump([*options, f"logger.save_dir={copied}/logs", "logger.name=a", "logger.version=b"]))
    assert resume(copied).status == 0
    assert list((copied / "logs" / "a" / "b").glob("events.*"))
    outcome = resume(copied, f"logger.save_dir={tmp_path / 'away'}", "trainer.max_steps=6")
    assert outcome.status == 0 and list((tmp_path / "away" / "a" / "b").glob("events.*")), outcome.err
    stored.write_text(yaml.safe_dump([*options, "data.source={_target_:dpm_scales.data.TorchvisionSource}"]))
    assert_refused(resume(copied), "which could download to any place; if you trust it")


def test_nothing_is_downloaded_to_where_a_folder_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless the place or the wish is typed; a data set that is there is read from anywhere."""
    from torchvision import datasets

    asked: list[bool] = []

    def absent(root: str, train: bool, download: bool) -> None:
        asked.append(download)
        raise RuntimeError("Dataset not found")

    monkeypatch.setattr(datasets, "MNIST", absent)
    folder, away = tmp_path / "run", tmp_path / "away"
    folder.mkdir()
    for stored in ("data.root=away", "++data={root:away}"):
        (folder / "overrides.yaml").write_text(yaml.safe_dump(["data=mnist", stored]))
        assert_refused(resume(folder), "MNIST is not in away (Dataset not found); put", "or set download=true")
        assert asked == [False] and not away.exists()
        for typed in (f"data.root={away}", "data.download=true"):
            asked.clear()
            assert_refused(resume(folder, typed), "cannot download MNIST")
            assert asked == [False, True]
            shutil.rmtree(away)
        asked.clear()
