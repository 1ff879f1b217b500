"""Runs whose further processes the command starts itself: `trainer.devices=2`."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest

from dpm_scales.distributed import launch
from dpm_scales.distributed.launch import AGAIN, VARIABLES, LocalRanks, LostProcessError
from dpm_scales.errors import UserError
from support.cluster_shell import Forked, job_step, wait_for
from support.rank_work import fail, note, note_and_wait
from support.shell import SMALL, assert_equal, call, checkpoint, column, files, run, settings, spawn
from support.warm import warm_python

OPTIONS = (*SMALL, "trainer.max_steps=20", "trainer.val_check_interval=10", "checkpoint.every_n_steps=2")
TWO = ("trainer=ddp", "trainer.devices=2")
ENDLESS = (*SMALL, *TWO, "trainer.max_steps=9999", "trainer.val_check_interval=5000", "checkpoint.every_n_steps=5")


def until(condition: Callable[[], bool], seconds: float = 100) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def runs(process: int) -> bool:
    """Whether a process exists and has not ended."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def children(process: int) -> list[int]:
    """Return the ranks that a process has started, without Python's own helper."""
    found = map(int, Path(f"/proc/{process}/task/{process}/children").read_text().split())
    return [child for child in found if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]


def assert_in_a_fork(body: Callable[[], object], status: int = 0, python: str | None = None) -> None:
    """Run assertions in a child: what starts processes has threads, and other tests fork this process.

    Further ranks are forks too, or start with `python`.
    """
    python = python or warm_python()
    child = os.fork()
    if child == 0:
        try:
            multiprocessing.set_executable(python)
            body()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(99)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == status


# --- the launcher -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_ranks_have_the_variables_of_torchrun(tmp_path: Path) -> None:
    def start_three() -> None:
        before = dict(os.environ)
        with LocalRanks(3) as ranks:
            with ranks.others(note, str(tmp_path)):
                note(str(tmp_path))
            assert os.environ["RANK"] == "0"
        assert dict(os.environ) == before

    assert_in_a_fork(start_three)
    words = [(tmp_path / str(rank)).read_text().split() for rank in range(3)]
    assert len({process for process, *_ in words}) == 3
    assert [(size, local, local_size) for _, size, local, local_size, *_ in words] == [
        ("3", str(rank), "3") for rank in range(3)
    ]
    assert len({(address, port) for *_, address, port in words}) == 1


def test_one_rank_starts_and_sets_nothing(tmp_path: Path) -> None:
    before = dict(os.environ)
    with LocalRanks(1) as ranks, ranks.others(note, str(tmp_path)):
        assert dict(os.environ) == before
        os.environ["WORLD_SIZE"] = "1"  # as Lightning does for one process of FSDP
    assert dict(os.environ) == before and list(tmp_path.iterdir()) == []
    assert set(VARIABLES) >= {"RANK", "WORLD_SIZE"}


@pytest.mark.slow
def test_an_error_ends_the_other_ranks_at_once(tmp_path: Path) -> None:
    def start_two() -> None:
        with pytest.raises(UserError, match="a mistake"), LocalRanks(2) as ranks:
            with ranks.others(note_and_wait, str(tmp_path)):
                until((tmp_path / "1").exists)
                start = time.monotonic()
                raise UserError("a mistake")
        assert time.monotonic() - start < launch.GRACE / 2
        assert not runs(int((tmp_path / "1").read_text().split()[0]))

    assert_in_a_fork(start_two, python=sys.executable)


@pytest.mark.slow
def test_rank_that_fails_alone_does_not_leave_the_first_waiting(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def start_two() -> None:
        with LocalRanks(2) as ranks, ranks.others(fail, 3):
            time.sleep(600)

    monkeypatch.setattr(launch, "GRACE", 0.2)
    assert_in_a_fork(start_two, LostProcessError.status)
    assert capfd.readouterr().err == f"error: another process of this run is gone, and this one ends too; {AGAIN}\n"


# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_run_that_is_stopped_with_ctrl_c_resumes_with_the_bits_of_a_job_step(tmp_path: Path) -> None:
    """As a terminal sends it, to the group of the process that was started; that of srun is not disturbed."""
    started = Forked([{}], *OPTIONS, *TWO, "run_dir=run", cwd=tmp_path)
    wait_for((tmp_path / "run/checkpoints/last.ckpt").exists, started)
    (other,) = children(started.children[0])
    started.signal(signal.SIGINT)
    (end,) = started.finish()
    steps = checkpoint(tmp_path / "run")["global_step"]
    assert end.status == 130 and 2 <= steps < 20 and not runs(other), end.err
    assert end.err.count("Ctrl-C once more stops at once") == 1 and "Traceback" not in end.err, end.err
    assert f"stopped at step {steps}; resume with: python train.py run_dir=run" in end.err
    (end,) = Forked([{}], "run_dir=run", cwd=tmp_path).finish()
    assert end.status == 0 and "16 x 2 = 32" in end.out and "resuming" in end.out, end.err
    pair = Forked(job_step(2), *OPTIONS, "run_dir=pair", cwd=tmp_path).finish()
    assert [end.status for end in pair] == [0, 0], pair[0].err
    run_dir, undisturbed = tmp_path / "run", tmp_path / "pair"
    assert files(run_dir / "model") == files(undisturbed / "model")
    assert column(run_dir, "train/loss") == column(undisturbed, "train/loss")
    for name in ("state_dict", "current_model_state", "optimizer_states", "lr_schedulers"):
        assert_equal(checkpoint(run_dir)[name], checkpoint(undisturbed)[name], name)
    ours, theirs = (settings(folder)["trainer"] for folder in (run_dir, undisturbed))
    assert ours == theirs and ours["devices"] == 2


@pytest.mark.slow
def test_sigterm_to_the_started_process_alone_stops_all(tmp_path: Path) -> None:
    started = Forked([{}], *ENDLESS, "run_dir=run", cwd=tmp_path)
    wait_for((tmp_path / "run/checkpoints/last.ckpt").exists, started)
    (other,) = children(started.children[0])
    os.kill(started.children[0], signal.SIGTERM)
    (end,) = started.finish()
    assert end.status == 143 and not runs(other), end.err
    assert f"stopped at step {checkpoint(tmp_path / 'run')['global_step']}; resume with:" in end.err


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_no_process_outlives_one_that_is_killed(victim: int, tmp_path: Path) -> None:
    """The first case with interpreters that share nothing with this process."""
    python = (sys.executable, warm_python())[victim]
    with spawn("train.py", *ENDLESS, "run_dir=run", cwd=tmp_path, python=python) as process:
        wait_for((tmp_path / "run/checkpoints/last.ckpt").exists, process)
        first = int((tmp_path / "run/.lock").read_text().split()[1])
        (other,) = children(first)
        os.kill((first, other)[victim], signal.SIGKILL)
        _, err = process.communicate(timeout=200)  # also of the other rank, which holds the same pipe
    assert process.returncode == (-9, 1)[victim]
    until(lambda: not runs(other))
    assert err.splitlines()[-1] == f"error: another process of this run is gone, and this one ends too; {AGAIN}"
    assert err.count("error:") == 1 and "Traceback" not in err, err
    assert checkpoint(tmp_path / "run")["global_step"] >= 5


@pytest.mark.slow
def test_mistakes_are_told_once_before_a_process_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LocalRanks, "others", lambda *_: pytest.fail("a process is started"))
    for options, message in {
        ("process.num_scales=0",): "num_scales must be a whole number >= 1, got 0",
        ("ema.decay=2",): "ema.decay must be a number >= 0 and <= 1, got 2",
        ("trainer.num_nodes=2",): "trainer.num_nodes=2: start the command on every machine, with torchrun or srun",
    }.items():
        end = call("train.py", *SMALL, *TWO, *options, "run_dir=run", cwd=tmp_path)
        assert end.status == 2 and end.err.count("\n") == 1 and message in end.err, end.err
        assert list(tmp_path.iterdir()) == [] and not set(VARIABLES) & set(os.environ)


@pytest.mark.slow
def test_joblib_runs_of_two_processes_each(tmp_path: Path) -> None:
    """And a run of one process that holds the only shard, after which the next begins anew."""
    sweep = ("seed=1,2", "trainer.max_steps=2", "run_dir=sweep", "hydra/launcher=joblib", "hydra.launcher.n_jobs=1")
    two = ("trainer=ddp", "trainer.devices=2")
    end = run("train.py", "-m", *SMALL, *sweep, *two, cwd=tmp_path, python=warm_python())
    assert end.status == 0 and end.out.count("batch 16 x 2 = 32") == 2, end.err
    assert len(list((tmp_path / "sweep").glob("*/result.json"))) == 2
    alone = ("seed=1,2", "trainer.max_steps=1", "trainer=fsdp", "trainer.devices=1", "run_dir=alone")
    (one,) = Forked([{}], "-m", *SMALL, *alone, cwd=tmp_path).finish()
    assert one.status == 0 and len(list((tmp_path / "alone").glob("*/result.json"))) == 2, one.err
