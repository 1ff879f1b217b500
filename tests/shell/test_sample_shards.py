"""`sample.py … shards=true`: the samples of single files as tar shards; killed, continued, shared, and evaluated."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch

from dpm_scales.commands import sample_shards
from dpm_scales.models.io import save_model
from dpm_scales.models.model import build_model
from dpm_scales.samplers import Heun
from dpm_scales.shards import ShardSource
from dpm_scales.shards.cache import ShardCache
from dpm_scales.shards.check import check_shards
from dpm_scales.shards.shard import Keys
from support.evaluate_helpers import Means, small_features
from support.shell import call, drawn, files, one_after_the_other, sample, small_model

pytestmark = pytest.mark.filterwarnings("ignore:.*(covariance is singular|px are enlarged)")
SOME = ("num_samples=7", "steps=2", "batch_size=2")
SHARDED = (*SOME, "shards=true")


@pytest.fixture(autouse=True)
def _few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample_shards, "PER_SHARD", 3)
    monkeypatch.setattr("dpm_scales.commands.sample_folder.PER_SHARD", 3)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    like = small_model().recipe
    classes = {"num_classes": 3, "class_names": ("cat", "dog", "Kuh"), "label_dropout": 0.1}
    made = build_model(type(like)(**{**vars(like), **classes}))
    torch.nn.init.normal_(made.denoiser.network.conv_out.weight, std=0.1)  # type: ignore[union-attr, arg-type]
    folder = tmp_path_factory.mktemp("model") / "m"
    save_model(folder, made)
    return folder


@pytest.fixture(scope="module")
def single(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same samples in single files."""
    return sample(model, tmp_path_factory.mktemp("single") / "out", *SOME)


@pytest.fixture
def whole(model: Path, tmp_path: Path) -> Path:
    return sample(model, tmp_path / "whole", *SHARDED)


def unpacked(out: Path) -> dict[str, bytes]:
    """Contents of all members of the shards in a folder."""
    found = {}
    for path in sorted(out.glob("*.tar")):
        with tarfile.open(path) as archive:
            found |= {member.name: archive.extractfile(member).read() for member in archive}  # type: ignore[union-attr]
    return found


def test_shards_hold_the_files_of_single_samples(whole: Path, single: Path, tmp_path: Path) -> None:
    members = unpacked(whole)
    assert {name: data for name, data in members.items() if name.endswith(".png")} == drawn(single)
    assert [members[f"{n:06d}.cls"] for n in range(7)] == [b"0", b"1", b"2", b"0", b"1", b"2", b"0"]
    names = {"sample.json", "grid.png", "index.json", ".lock", *(f"samples-00000{n}.tar" for n in range(3))}
    assert set(files(whole)) == names
    assert (whole / "grid.png").read_bytes() != b"" and not drawn(whole)
    found = check_shards(whole, Keys(None, "cls"), ShardCache(tmp_path, 1), lambda *_: lambda _: None)
    assert not found.faults and found.images == 7
    source = ShardSource(whole, channels=1, labels="cls", val_fraction=0)
    assert (source.class_names, source.image_size, len(source.train())) == (("cat", "dog", "Kuh"), (8, 8), 7)
    assert json.loads((whole / "sample.json").read_text())["shards"] == 3
    assert "shards" not in (single / "sample.json").read_text()


def test_a_killed_command_goes_on_with_the_shards_that_are_missing(
    model: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, calls, original = tmp_path / "out", iter(range(100)), Heun.sample

    def cut(self: Heun, *rest: Any, **more: Any) -> Any:
        if next(calls) == 3:  # in the second shard
            raise KeyboardInterrupt
        return original(self, *rest, **more)

    with monkeypatch.context() as patched:
        patched.setattr(Heun, "sample", cut)
        call("sample.py", f"model={model}", f"out={out}", *SHARDED, cwd=tmp_path)
    assert [path.name for path in sorted(out.glob("*.tar"))] == ["samples-000000.tar"]
    told = call("evaluate.py", f"samples={out}", f"reference={whole}", cwd=tmp_path)
    assert told.status == 2 and "its shards are not complete; repeat the command that makes them" in told.err
    time = (out / "samples-000000.tar").stat().st_mtime_ns
    assert files(sample(model, out, *SHARDED)) == files(whole)
    assert (out / "samples-000000.tar").stat().st_mtime_ns == time
    (out / "samples-000001.tar").write_bytes(b"damaged")
    assert files(sample(model, out, *SHARDED, "batch_size=5")) == files(whole)


def test_more_samples_fill_the_last_shard(model: Path, whole: Path, tmp_path: Path) -> None:
    more = sample(model, tmp_path / "more", *SHARDED, "num_samples=10")
    assert files(sample(model, whole, *SHARDED, "num_samples=10")) == files(more)
    assert (
        "number is 10 there and 7 here"
        in call("sample.py", f"model={model}", f"out={whole}", *SHARDED, cwd=tmp_path).err
    )


def test_processes_share_the_shards(model: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one_after_the_other(monkeypatch)
    for rank, own in ((1, 1), (0, 3)):
        ranks = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"}
        end = call("sample.py", f"model={model}", *SHARDED, "out=two", cwd=tmp_path, environment=ranks)
        assert end.status == 0, end.err
        assert len(list((tmp_path / "two").glob("*.tar"))) == own
    assert files(tmp_path / "two") == files(whole)


def test_single_files_and_shards_are_different_commands(model: Path, whole: Path, single: Path, tmp_path: Path) -> None:
    line = call("sample.py", f"model={model}", f"out={whole}", *SOME, cwd=tmp_path).err
    assert "holds images of another command (shards is 3 there and null here)" in line
    assert files(sample(model, whole, *SOME, "overwrite=true")) == files(single)
    assert set(unpacked(sample(model, whole, *SHARDED, "overwrite=true"))) and not drawn(whole)
    (whole / "sample.json").unlink()
    line = call("sample.py", f"model={model}", f"out={whole}", *SHARDED, "overwrite=true", cwd=tmp_path).err
    assert "'samples-000000.tar', which overwrite=true does not replace: no sample.json describes it" in line
    line = call("sample.py", f"model={model}", "out=x", "task=coarse", "starts=1", "shards=true", cwd=tmp_path).err
    assert line.startswith("error: unknown option 'shards': it belongs to task=draw")


def test_shards_are_evaluated_like_their_files(
    whole: Path, single: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    figures = []
    with small_features(Means()):
        for place in (whole, single):
            options = (f"samples={place}", f"reference={single}", "measures=[frechet]", f"out={tmp_path / place.name}")
            assert call("evaluate.py", *options, cwd=tmp_path).status == 0
            figures.append(json.loads((tmp_path / place.name / "evaluation.json").read_text())["figures"])
        swapped = call("evaluate.py", f"samples={single}", f"reference={whole}", "measures=[frechet]", cwd=tmp_path)
        assert swapped.status == 0 and "7" in swapped.out
    assert figures[0] == figures[1]
    (whole / "samples-000001.tar").unlink()
    told = call("evaluate.py", f"samples={whole}", f"reference={single}", cwd=tmp_path)
    assert told.status == 2 and "samples-000001.tar: No such file" in told.err
