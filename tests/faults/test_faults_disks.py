"""Full disks and places that can't be written: one line, and what was there stays."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dpm_scales.errors import UserError
from dpm_scales.models.checksums import read_checkpoint, write_checkpoint
from dpm_scales.training.checkpoints import CheckpointFolder
from support.shell import FAST, SMALL, assert_equal, attempt, call, checkpoint, files, plain_checkpoint, train

RUN = (*FAST, "trainer.max_steps=9", "checkpoint.every_n_steps=2", "ema.decay=0.9")


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """2 MiB of their own, for those who may mount."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("may not mount")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_full_disk_ends_with_one_line(tiny_disk: Path, tmp_path: Path) -> None:
    """At a later checkpoint; what was there goes on elsewhere to the same end."""
    run_dir = tiny_disk / "run"
    size = sum(map(len, files(train(tmp_path / "whole", *RUN)).values()))
    filler = tiny_disk / "filler"
    options = (*RUN, "checkpoint.keep_last=9", "samples.num_images=0")
    filler.write_bytes(bytes(max(0, 2 * 2**20 - size * 2 // 3)))
    outcome = attempt(run_dir, *options)
    assert outcome.status == 2, outcome.out + outcome.err
    lines = [line for line in outcome.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in outcome.err and "No space left on device; free some" in lines[0]
    last = run_dir / "checkpoints" / "last.ckpt"
    assert 0 < read_checkpoint(last)["global_step"] < 9
    assert not list(run_dir.rglob("*.tmp"))
    filler.unlink()
    moved = Path(shutil.copytree(run_dir, tmp_path / "moved"))
    assert call("train.py", f"run_dir={moved}", "checkpoint.keep_last=1", cwd=tmp_path).status == 0
    assert_equal(checkpoint(moved)["state_dict"], checkpoint(tmp_path / "whole")["state_dict"])


@pytest.mark.parametrize("after", [0, 1000, 30000])
def test_no_space_left_leaves_the_old_checkpoint(after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever it runs out in the file: torch hides the reason behind an error of its own."""
    path = tmp_path / "last.ckpt"
    write_checkpoint(path, plain_checkpoint(1))
    before = files(tmp_path)
    big = plain_checkpoint(2, more=torch.zeros(20000))

    class Full:
        def __init__(self, file: Any) -> None:
            self.file, self.left = file, after

        def write(self, data: bytes) -> int:
            self.left -= len(data)
            if self.left < 0:
                raise OSError(28, "No space left on device")
            return int(self.file.write(data))

        def __enter__(self) -> Full:
            return self

        def __exit__(self, *_: object) -> None:
            self.file.close()

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

    with monkeypatch.context() as patch:
        patch.setattr("dpm_scales.storage.open", lambda *rest: Full(open(*rest)), raising=False)
        with pytest.raises(UserError, match=r"cannot write .*last\.ckpt: No space left on device; free some space"):
            write_checkpoint(path, big)
    assert files(tmp_path) == before
    write_checkpoint(path, big)
    assert_equal(read_checkpoint(path), big)


def test_a_folder_that_is_taken_away_ends_with_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file in the place of the folder refuses everybody, root too."""
    run_dir = tmp_path / "run"
    original = CheckpointFolder.save_last

    def blocked(self: CheckpointFolder, trainer: Any) -> None:
        if trainer.global_step == 4:
            self.folder.rename(tmp_path / "kept")
            self.folder.write_text("in the way")
        original(self, trainer)

    monkeypatch.setattr(CheckpointFolder, "save_last", blocked)
    outcome = call("train.py", *SMALL, *RUN, f"run_dir={run_dir}", cwd=tmp_path)
    lines = [line for line in outcome.err.splitlines() if line.startswith("error: ")]
    assert outcome.status == 2 and len(lines) == 1 and "Traceback" not in outcome.err
    assert "checkpoints/last.ckpt: Not a directory; choose a writable place" in lines[0] or "File exists" in lines[0]
    assert read_checkpoint(tmp_path / "kept" / "last.ckpt")["global_step"] == 2
