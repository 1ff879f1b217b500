"""A process that others of its run wait for is gone: one line says what to do, and torchrun's report has it too."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from torch import distributed
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from dpm_scales.errors import UserError
from dpm_scales.training.peers import AGAIN, LostProcessError, is_lost, told_if_one_is_lost
from dpm_scales.training.run_folder import only_run
from support.cluster_shell import Forked, job_step, wait_for
from support.shell import SMALL, checkpoint

GLOO = "[/gloo/transport/tcp/pair.cc:545] Read error [127.0.0.1]:1415: Connection reset by peer"


@pytest.fixture
def report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """As one of two processes of torchrun; the file that it reads."""
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "get_world_size", lambda: 2)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    return tmp_path / "error.json"


def shown(file: Path, exitcode: int) -> str:
    """What torchrun prints of a process that has failed."""
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=exitcode, error_file=str(file))
    return ChildFailedError("train.py", {0: failure}).format_msg()


@pytest.mark.parametrize(
    "error", [RuntimeError(GLOO), distributed.DistBackendError("NCCL error"), RuntimeError("gloo")]
)
def test_a_lost_process_is_told_in_one_line(error: RuntimeError, report: Path, tmp_path: Path) -> None:
    with pytest.raises(LostProcessError, match=f"another process of this run is gone.*{AGAIN}$") as caught:
        with told_if_one_is_lost(tmp_path, main=True):
            assert f"it was killed, or used up the machine's memory; {AGAIN}" in shown(report, -9)
            raise error
    assert caught.value.status == 1 and f"another process was gone; {AGAIN}" in shown(report, 1)


def test_one_process_says_it(report: Path, tmp_path: Path) -> None:
    """A further one is silent as long as the first, which holds the folder, is there."""
    child = os.fork()
    if child == 0:
        with only_run(tmp_path):
            signal.pause()
    try:
        while not (tmp_path / ".lock").exists() or not (tmp_path / ".lock").read_text():
            pass
        with pytest.raises(SystemExit) as end, told_if_one_is_lost(tmp_path, main=False):
            raise RuntimeError(GLOO)
        assert end.value.code == 1
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    with pytest.raises(LostProcessError), told_if_one_is_lost(tmp_path, main=False):
        raise RuntimeError(GLOO)


def test_other_ends_are_told_as_they_are(report: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a mistake"), told_if_one_is_lost(tmp_path, main=True):
        raise UserError("a mistake")
    assert "a mistake" in shown(report, 2)
    with pytest.raises(SystemExit), told_if_one_is_lost(tmp_path, main=True):
        raise SystemExit(143)
    assert f"it was stopped; {AGAIN}" in shown(report, 143)
    with pytest.raises(RuntimeError, match="a defect"), told_if_one_is_lost(tmp_path, main=True):
        raise RuntimeError("a defect")
    assert not report.exists()
    with told_if_one_is_lost(tmp_path, main=True):
        assert report.exists()
    assert not report.exists()


def test_alone_nothing_is_lost() -> None:
    assert not is_lost(RuntimeError(GLOO))


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_run_with_one_line(victim: int, tmp_path: Path) -> None:
    options = (*SMALL, "trainer.max_steps=9999", "trainer.val_check_interval=5000", "checkpoint.every_n_steps=5")
    step = Forked(job_step(2), *options, "run_dir=run", cwd=tmp_path)
    wait_for((tmp_path / "run/checkpoints/last.ckpt").exists, step)
    os.kill(step.children[victim], signal.SIGKILL)
    ends = step.finish()
    assert ends[victim].status == -9 and ends[1 - victim].status == 1
    err = ends[1 - victim].err
    assert err == f"error: another process of this run is gone, and this one ends too; {AGAIN}\n"
    assert checkpoint(tmp_path / "run")["global_step"] >= 5
