"""Nothing is lost: damage is found, older checkpoints stand in."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from dpm_scales.errors import UserError
from dpm_scales.models.checksums import (
    DamagedFileError,
    read_checkpoint,
    read_tensors,
    write_checkpoint,
    write_tensors,
)
from dpm_scales.models.seals import checkpoint_step
from dpm_scales.storage import link
from dpm_scales.training import load_model
from dpm_scales.training.checkpoints import AtomicCheckpointIO, CheckpointFolder, find_checkpoint
from support.shell import FAST, assert_equal, call, checkpoint, column, files, plain_checkpoint, train

RUN = (*FAST, "trainer.max_steps=9", "checkpoint.every_n_steps=2", "ema.decay=0.9")


def names(run_dir: Path) -> set[str]:
    return {path.name for path in (run_dir / "checkpoints").iterdir()}


def flip(path: Path, place: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1 << bit
    path.write_bytes(bytes(data))


# --- damage -----------------------------------------------------------------------------------------------------------


def test_a_flipped_bit_anywhere_in_a_checkpoint_is_told(tmp_path: Path) -> None:
    """In every byte of the seal, every fifth before it; torch by itself loads most of them, or it would be needless."""
    path = tmp_path / "a.ckpt"
    write_checkpoint(path, plain_checkpoint())
    whole = path.read_bytes()
    assert_equal(read_checkpoint(path), plain_checkpoint())
    places = [*range(0, len(whole) - 120, 5), *range(len(whole) - 120, len(whole))]
    tried = quiet = 0
    for place in places:
        flip(path, place, place % 8)
        with pytest.raises(DamagedFileError, match=r"a\.ckpt is (damaged|not a checkpoint)") as caught:
            read_checkpoint(path)
        assert "\n" not in str(caught.value)
        if place % 20 == 0:
            tried += 1
            with contextlib.suppress(Exception):
                torch.load(path, weights_only=True)
                quiet += 1
        path.write_bytes(whole)
    assert quiet > tried / 2 > 20


def test_a_flipped_bit_anywhere_in_an_export_is_told(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_tensors(path, plain_checkpoint()["state_dict"])
    whole = path.read_bytes()
    assert_equal(read_tensors(path), plain_checkpoint()["state_dict"])
    for place in range(len(whole)):
        flip(path, place, place % 8)
        with pytest.raises(
            UserError, match=r"a\.safetensors (is damaged|is not a|was not written by|has model format)"
        ):
            read_tensors(path)
        path.write_bytes(whole)


@pytest.mark.parametrize("end", ["cut", "grown", "empty"])
def test_other_lengths_are_told(end: str, tmp_path: Path) -> None:
    for path, write, read in (
        (tmp_path / "a.ckpt", lambda path: write_checkpoint(path, plain_checkpoint()), read_checkpoint),
        (tmp_path / "a.safetensors", lambda path: write_tensors(path, plain_checkpoint()["state_dict"]), read_tensors),
    ):
        write(path)
        whole = path.read_bytes()
        for count in (1, 50, 113, 114, 115, len(whole) // 2):
            path.write_bytes({"cut": whole[:-count], "grown": whole + bytes(count), "empty": b""}[end])
            with pytest.raises(UserError):
                read(path)


def test_older_and_newer_formats_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    torch.save(plain_checkpoint(recipe={"version": 2}), path)
    with pytest.raises(UserError, match="a.ckpt has model format 2; this version reads 3"):
        read_checkpoint(path)
    write_checkpoint(path, plain_checkpoint(recipe={"version": 4}))
    with pytest.raises(UserError, match="a.ckpt has model format 4; this version reads 3"):
        read_checkpoint(path)
    torch.save(plain_checkpoint(), path)
    with pytest.raises(DamagedFileError, match="its end, which holds the checksum, is missing"):
        read_checkpoint(path)
    from safetensors.torch import save_file

    for text, message in {
        "dpm_scales model 2": "has model format 2; this version reads 3",
        "dpm_scales model 4 sha256 " + "0" * 64: "has model format 4; this version reads 3",
        "dpm_scales model 3": "is damaged",
        "pt": "was not written by dpm_scales",
    }.items():
        save_file(plain_checkpoint()["state_dict"], tmp_path / "a.safetensors", {"format": text})
        with pytest.raises(UserError, match=f"a.safetensors {message}"):
            read_tensors(tmp_path / "a.safetensors")


def test_the_step_is_told_without_reading(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "a.ckpt", plain_checkpoint(12345))
    assert checkpoint_step(tmp_path / "a.ckpt") == 12345
    assert checkpoint_step(tmp_path / "none.ckpt") is None
    (tmp_path / "b.ckpt").write_bytes(b"x")
    assert checkpoint_step(tmp_path / "b.ckpt") is None


def test_tensors_of_a_gpu_are_read_without_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file says cuda:1, as one written there does; where it goes is the reader's choice, meta for one."""
    path = tmp_path / "a.ckpt"
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda _: "cuda:1")
        write_checkpoint(path, plain_checkpoint())
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="CUDA"):
            torch.load(path, weights_only=True)
    assert_equal(read_checkpoint(path), plain_checkpoint())
    assert_equal(AtomicCheckpointIO().load_checkpoint(path), plain_checkpoint())
    moved = AtomicCheckpointIO().load_checkpoint(path, map_location="meta")["state_dict"]
    assert {value.device.type for value in moved.values()} == {"meta"} and moved["model.w"].shape == (3, 5)
    moved = read_checkpoint(path, {"cuda:1": "cpu"})["state_dict"]
    assert {value.device.type for value in moved.values()} == {"cpu"}


# --- what is kept -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints after 2, 4, 6, 8, 9; validations after 2, 4, 6, 8, 9."""
    options = (*RUN, "checkpoint.keep_last=3", "checkpoint.keep_best=2", "trainer.val_check_interval=2")
    return train(tmp_path_factory.mktemp("kept") / "run", *options)


def test_the_last_and_the_best_are_kept(kept: Path) -> None:
    folder = kept / "checkpoints"
    losses = dict(zip((2, 4, 6, 8, 9), column(kept, "val/loss"), strict=True))
    first, second = sorted(losses, key=losses.__getitem__)[:2]
    assert names(kept) == {
        *("last.ckpt", "step-000006.ckpt", "step-000008.ckpt", "best.ckpt", f"best-step-{second:06d}.ckpt")
    }
    for path in folder.iterdir():
        assert read_checkpoint(path)["global_step"] == checkpoint_step(path)
        assert path.stem in ("last", "best") or int(path.stem[-6:]) == checkpoint_step(path)
    assert checkpoint(kept)["global_step"] == 9 and checkpoint(kept, "best")["global_step"] == first
    assert checkpoint(kept)["callbacks"]["BestCheckpoint"]["ranked"][0][1] == first


def test_few_are_kept_if_so_asked(tmp_path: Path) -> None:
    run_dir = train(tmp_path / "run", *RUN, "checkpoint.keep_last=1", "checkpoint.keep_best=0")
    assert names(run_dir) == {"last.ckpt"}


def test_ranking_goes_on_after_a_resume(kept: Path, tmp_path: Path) -> None:
    run_dir = Path(shutil.copytree(kept, tmp_path / "run"))
    outcome = call("train.py", f"run_dir={run_dir}", "trainer.max_steps=12", cwd=tmp_path)
    assert outcome.status == 0, outcome.err
    losses = dict(zip((2, 4, 6, 8, 9, 10, 12), column(run_dir, "val/loss"), strict=True))
    best, second = sorted(losses, key=losses.__getitem__)[:2]
    assert checkpoint(run_dir, "best")["global_step"] == best
    assert names(run_dir) >= {"last.ckpt", f"best-step-{second:06d}.ckpt", "step-000010.ckpt"}
    assert checkpoint_step(run_dir / "checkpoints" / "last.ckpt") == 12


@pytest.mark.parametrize("number", [1, 2, 3, 5])
@pytest.mark.parametrize("copies", [False, True], ids=["links", "copies"])
def test_rotation(number: int, copies: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the file system has no links."""

    class Trainer:
        is_global_zero = True
        global_step = 0

        def save_checkpoint(self, path: Path) -> None:
            if path.exists() and number > 1 and checkpoint_step(path) != self.global_step:
                assert (tmp_path / f"step-{checkpoint_step(path):06d}.ckpt").is_file()
            write_checkpoint(path, plain_checkpoint(self.global_step))

    if copies:
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError("no links here")))
    folder, trainer = CheckpointFolder(tmp_path, number, 1), Trainer()
    for step in (5, 10, 15, 20, 20):
        trainer.global_step = step
        folder.save_last(trainer)  # type: ignore[arg-type]
    steps = [5, 10, 15][max(0, 4 - number) :]
    assert {path.name for path in tmp_path.iterdir()} == {"last.ckpt", *(f"step-{step:06d}.ckpt" for step in steps)}
    for path in tmp_path.iterdir():
        assert_equal(read_checkpoint(path), plain_checkpoint(20 if path.name == "last.ckpt" else int(path.stem[5:])))


def test_linking_twice_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("a")
    for _ in range(2):
        link(tmp_path / "a", tmp_path / "b")
    assert files(tmp_path) == {"a": b"a", "b": b"a"}


# --- falling back -----------------------------------------------------------------------------------------------------


def resumable(step: int) -> dict[str, Any]:
    more = ("optimizer_states", "lr_schedulers", "loops", "callbacks", "averaging_state", "bad_steps")
    return plain_checkpoint(step, **dict.fromkeys(more))


def test_the_newest_whole_one_is_found(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    assert find_checkpoint(tmp_path) is None
    for name, step in {"last": 30, "step-000020": 20, "step-000010": 10, "best": 15}.items():
        write_checkpoint(tmp_path / f"{name}.ckpt", resumable(step))

    def found() -> tuple[str, int]:
        result = find_checkpoint(tmp_path)
        assert result is not None
        return result[0].name, result[1]["global_step"]

    assert found() == ("last.ckpt", 30)
    assert not [w for w in recwarn.list if w.category is not ResourceWarning]  # those are of files of other tests
    flip(tmp_path / "last.ckpt", 700)
    for name, step in (("step-000020.ckpt", 20), ("best.ckpt", 15), ("step-000010.ckpt", 10)):
        with pytest.warns(UserWarning, match=rf"last\.ckpt is damaged: .*; resuming from .*{name}, step {step}$"):
            assert found() == (name, step)
        flip(tmp_path / name, 700)
    with pytest.raises(
        UserError, match=r"last\.ckpt is damaged: .* \(nor can the 3 others there\); remove .* to start"
    ):
        find_checkpoint(tmp_path)
    write_checkpoint(tmp_path / "best.ckpt", resumable(15))
    (tmp_path / "last.ckpt").unlink()
    with pytest.warns(UserWarning, match=r"last\.ckpt is missing; resuming from .*best\.ckpt, step 15"):
        assert found() == ("best.ckpt", 15)


def test_another_version_is_no_reason_to_fall_back(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "step-000002.ckpt", resumable(2))
    write_checkpoint(tmp_path / "last.ckpt", {**resumable(4), "recipe": {"version": 2}})
    with pytest.raises(UserError, match="has model format 2"):
        find_checkpoint(tmp_path)


def test_a_damaged_run_goes_on_from_the_checkpoint_before(kept: Path, tmp_path: Path) -> None:
    """With the same bits at the end; the damaged file is put aside."""
    run_dir = Path(shutil.copytree(kept, tmp_path / "run"))
    for path in (run_dir / "result.json", run_dir / "model/model.safetensors", *run_dir.glob("checkpoints/best*")):
        path.unlink()
    last = run_dir / "checkpoints" / "last.ckpt"
    flip(last, last.stat().st_size // 2)
    broken = last.read_bytes()
    before = files(run_dir)
    outcome = call("sample.py", f"model={run_dir}", f"out={tmp_path / 'out'}", cwd=tmp_path)
    assert outcome.status == 2 and outcome.err.count("\n") == 1 and not (tmp_path / "out").exists()
    assert "last.ckpt is damaged" in outcome.err and "step-000008.ckpt (step 8) is whole" in outcome.err
    assert files(run_dir) == before
    with pytest.warns(UserWarning, match=r"last\.ckpt is damaged.* resuming from .*step-000008\.ckpt, step 8"):
        outcome = call("train.py", f"run_dir={run_dir}", cwd=tmp_path)
    assert outcome.status == 0, outcome.err
    for name in ("state_dict", "current_model_state", "averaging_state", "optimizer_states", "lr_schedulers"):
        assert_equal(checkpoint(run_dir)[name], checkpoint(kept)[name], name)
    assert files(run_dir / "model") == files(kept / "model")
    assert (run_dir / "metrics.csv").read_text() == (kept / "metrics.csv").read_text()
    assert (run_dir / "checkpoints" / "last.damaged").read_bytes() == broken
    assert {"last.ckpt", "last.damaged", "step-000006.ckpt", "step-000008.ckpt"} < names(run_dir)


def test_no_whole_checkpoint_ends_before_anything_is_touched(kept: Path, tmp_path: Path) -> None:
    run_dir = Path(shutil.copytree(kept, tmp_path / "run"))
    for path in (run_dir / "checkpoints").iterdir():
        path.write_bytes(path.read_bytes()[:-1])
    before = files(run_dir)
    outcome = call("train.py", f"run_dir={run_dir}", "trainer.max_steps=12", cwd=tmp_path)
    assert outcome.status == 2 and outcome.err.count("\n") == 1, outcome.err
    assert "nor can the 4 others there" in outcome.err and "or choose another run_dir" in outcome.err
    assert files(run_dir) == before


def test_a_damaged_export_offers_a_checkpoint(kept: Path, tmp_path: Path) -> None:
    run_dir = Path(shutil.copytree(kept, tmp_path / "run"))
    flip(run_dir / "model" / "model.safetensors", 5000)
    with pytest.raises(UserError, match=r"model\.safetensors is damaged: .*; .*last\.ckpt \(step 9\) is whole"):
        load_model(run_dir)
    assert_equal(
        dict(load_model(run_dir / "checkpoints" / "last.ckpt").state_dict()),
        dict(load_model(kept).state_dict()),
    )
