"""`dpm-scales data`: pack, check and index, from the words of a command line to its lines and files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from dpm_scales.cli.program import FORM
from dpm_scales.commands.data import run
from dpm_scales.entry.start import console
from dpm_scales.errors import UserError
from dpm_scales.shards import ShardSource
from support.shell import call, photos


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Type commands as in a shell; a folder and a cache of its own."""
    monkeypatch.setenv(FORM, "console")
    monkeypatch.setenv("DPM_SCALES_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def test_pack_check_and_train(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    photos(tmp_path / "f" / "cat", 5)
    photos(tmp_path / "f" / "dog", 4, first=5)
    line = ["pack", "f", "out=s", "per_shard=4", "labels=folder", "image_size=6,8", "channels=1", "seed=3"]
    run(line)
    out = capsys.readouterr().out
    assert out == "9 images in 3 shards in s, 2 classes\ntrain with data=webdataset data.root=s\n"
    run(line)
    assert capsys.readouterr().out == out
    made = json.loads((tmp_path / "s" / "index.json").read_text())["made"]
    assert made["format"] == "png" and made["image_size"] == [6, 8]
    source = ShardSource("s", channels=1, labels="cls", val_fraction=0.4)
    assert (source.image_size, source.class_names) == ((6, 8), ("cat", "dog"))
    assert len(source.train()) + len(source.val()) == 9
    run(["check", "s", "labels=cls"])
    assert capsys.readouterr().out == "s: 9 images in 3 shards, 0.0 MiB\nno faults\n"


def test_parts_and_arrays(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for part in ("train", "val"):
        photos(tmp_path / "f" / part, 3)
    run(["pack", "f", "out=s", "shuffle=false"])
    assert capsys.readouterr().out.startswith("6 images in 2 shards in s, parts val and train")
    np.save("a.npy", np.zeros((3, 4, 4), np.uint8))
    run(["pack", "a.npy", "out=t", "format=ppm"])
    assert capsys.readouterr().out.startswith("3 images in 1 shards in t\n")


def test_index_of_others_shards(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    photos(tmp_path / "f", 3)
    run(["pack", "f", "out=s", "per_shard=2"])
    (tmp_path / "s" / "index.json").unlink()
    run(["index", "s/*.tar", "out=mine.json"])
    run(["index", "s"])
    assert (tmp_path / "mine.json").read_text() == (tmp_path / "s" / "index.json").read_text()
    assert "s/index.json: 3 images in 2 shards\n" in capsys.readouterr().out
    path = tmp_path / "s" / "shard-000001.tar"
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(UserError, match="^s: 4 kinds of faults$"):
        run(["check", "s"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("  1 shards that can't be read to their end: s/shard-000001.tar (it ends within")
    run(["index", "s", "out=other.json"])
    assert "1 shards that can't be read to their end" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["pak"], r"unknown action 'pak': did you mean 'pack'\? allowed: check, index, pack"),
        (["pack", "f"], "name images and a folder for the shards: dpm-scales data pack FOLDER out=DIR"),
        (["pack", "f", "out=s", "size=8"], "unknown option 'size': did you mean 'image_size'"),
        (["pack", "f", "out=s", "per_shard=x"], "per_shard must be a whole number, got 'x'"),
        (["pack", "f", "out=s", "per_shard=0"], "per_shard=0: allowed is a number of images >= 1"),
        (["pack", "f", "out=s", "image_size=4x4"], "image_size must be a whole number, got '4x4'"),
        (
            ["pack", "f", "out=s", "image_size=1,2,3"],
            "image_size=1,2,3: allowed is a number of pixels, or HEIGHT,WIDTH",
        ),
        (["pack", "f", "out=s", "shuffle=no"], "shuffle=no: allowed are true and false"),
        (["pack", "f", "out=s", "format=webp"], "unknown format='webp'"),
        (["pack", "none", "out=s"], "none: no such folder or zip archive"),
        (["check"], "name shards: dpm-scales data check DIR"),
        (["check", "none"], "none: no such file; give the folder"),
        (["check", "s", "timeout=0"], "timeout must be a whole number >= 1"),
        (["index", "https://a/b.tar"], "name the file of the index, out=FILE"),
        (["index", "https://a/b"], r"name its \.tar files, as in 'https://…/shard-\{000\.\.099\}\.tar'"),
    ],
)
def test_lines_that_are_none(line: list[str], message: str, tmp_path: Path) -> None:
    photos(tmp_path / "f", 2)
    with pytest.raises(UserError, match=message):
        run(line)
    assert not (tmp_path / "s").exists()


def test_help(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    run([])
    text = capsys.readouterr().out
    assert text.startswith("usage: dpm-scales data pack") and "train-{000..099}.tar'" in text
    monkeypatch.setattr("sys.argv", ["dpm-scales", "data", "pack", "x", "out=y", "--help"])
    console()
    assert capsys.readouterr().out == text
    assert all(len(line) <= 120 for line in text.splitlines())


def test_what_is_not_downloaded_is_refused_by_a_run(tmp_path: Path) -> None:
    """An address without an index ends with one line, before the run's folder is made."""
    outcome = call(
        "train.py", "data=webdataset", "data.root='http://127.0.0.1:9/{0..3}.tar'", "run_dir=r", cwd=tmp_path
    )
    assert outcome.status == 2 and "the shards of an address need an index" in outcome.err
    assert not (tmp_path / "r").exists()
