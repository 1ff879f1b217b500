"""Runs that are killed, interrupted, or out of memory; processes are forked from this one, which has imported all."""

from __future__ import annotations

import csv
import errno
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from dpm_scales.errors import UserError
from dpm_scales.models.checksums import read_checkpoint, read_tensors, write_checkpoint, write_tensors
from dpm_scales.training import check_resume
from dpm_scales.training.module import DiffusionModule
from support.shell import FAST, SMALL, Outcome, assert_equal, attempt, call, checkpoint, files, train

KILLS = int(os.environ.get("DPM_SCALES_KILLS", "4"))
"""SIGKILLs of one run."""

RUN = (
    *(*SMALL, *FAST, "trainer.max_steps=24", "checkpoint.every_n_steps=3", "trainer.val_check_interval=7"),
    *("ema.power_lengths=[0.05,0.1]", "ema.snapshot_every=4"),
)

READERS: dict[str, Callable[[Path], Any]] = {
    ".ckpt": read_checkpoint,
    ".safetensors": load_file,
    ".png": lambda path: Image.open(path).load(),
    ".json": lambda path: json.loads(path.read_text()),
    ".yaml": lambda path: yaml.safe_load(path.read_text()),
    ".csv": lambda path: [int(row["step"]) for row in csv.DictReader(path.open(newline=""), strict=True)],
}


def fork(*arguments: str, cwd: Path, log: Path, prepare: Callable[[], Any] = lambda: None) -> int:
    """``python train.py arguments`` in a child of this process; its id. `log` gets standard error at the end."""
    child = os.fork()
    if child == 0:
        status = 99
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            prepare()
            outcome = call("train.py", *arguments, cwd=cwd)
            log.write_text(outcome.out + outcome.err)
            status = outcome.status
        finally:
            os._exit(status)
    return child


def ended(child: int) -> int | None:
    """Status of a child that has ended, None for one that runs; a signal is negative."""
    pid, status = os.waitpid(child, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if pid else None


def poll(folder: Path) -> int:
    """Parse every file in a run folder, as a reader beside the run would; how many were seen."""
    seen = 0
    for path in folder.rglob("*"):
        if path.name.startswith(".") or path.suffix not in READERS:
            continue
        try:
            READERS[path.suffix](path)
        except FileNotFoundError:
            continue  # of those that are kept for a time only
        except Exception as error:
            if isinstance(error.__cause__, FileNotFoundError):
                continue
            raise
        seen += 1
    return seen


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path: Path) -> None:
    """And read all the while; at the end it is as if nothing had been."""
    whole, run_dir = tmp_path / "whole", tmp_path / "run"
    start = time.monotonic()
    assert call("train.py", *RUN, f"run_dir={whole}", cwd=tmp_path).status == 0
    seconds = time.monotonic() - start
    rng = random.Random(os.environ.get("DPM_SCALES_KILLS", "seed"))
    killed = seen = 0
    log = tmp_path / "log"
    for _ in range(50 * KILLS):
        child = fork(*RUN, f"run_dir={run_dir}", cwd=tmp_path, log=log)
        until = time.monotonic() + rng.uniform(0.1, 0.8) * seconds if killed < KILLS else float("inf")
        status = None
        while status is None and time.monotonic() < until:
            seen += poll(run_dir)
            time.sleep(0.02)
            status = ended(child)
        if status is None:
            os.kill(child, signal.SIGKILL)
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            killed += status == -signal.SIGKILL
        seen += poll(run_dir)
        if status != -signal.SIGKILL:
            assert status == 0, log.read_text()
            if killed >= KILLS:
                break
            # done before its time: from the beginning, unless it went on from a kill
            assert_same(run_dir, whole)
            run_dir = run_dir.with_name(f"{run_dir.name}+")
    assert killed == KILLS and seen > 20 * KILLS
    assert_same(run_dir, whole)


def assert_same(run_dir: Path, whole: Path) -> None:
    ours, theirs = checkpoint(run_dir), checkpoint(whole)
    for name in ours.keys() - {"loops", "epoch"}:
        assert_equal(ours[name], theirs[name], name)
    assert (run_dir / "metrics.csv").read_text() == (whole / "metrics.csv").read_text()
    for folder in ("model", "samples", "ema"):
        assert files(run_dir / folder) == files(whole / folder) != {}
    assert not list(run_dir.rglob("*.tmp"))


# --- Ctrl-C -----------------------------------------------------------------------------------------------------------


def interrupted(tmp_path: Path, *, times: int, slow: str) -> tuple[int, str, Path]:
    """Status, output and folder of a run that gets SIGINT, again if so asked, while `slow` takes its time."""
    run_dir, log, mark = tmp_path / "run", tmp_path / "log", tmp_path / "mark"

    def prepare() -> None:
        original = getattr(DiffusionModule, slow)

        def slowly(self: DiffusionModule, *rest: Any) -> Any:
            if self.global_step == 5 and not mark.exists():
                mark.touch()
                for _ in range(100):  # the signal comes in here, and what it calls returns, or not
                    time.sleep(0.02)
                    if (tmp_path / "go").exists():
                        break
            return original(self, *rest)

        setattr(DiffusionModule, slow, slowly)

    options = (*RUN, "checkpoint.every_n_steps=4", "trainer.max_steps=9", "trainer.val_check_interval=5")
    child = fork(*options, f"run_dir={run_dir}", cwd=tmp_path, log=log, prepare=prepare)
    until = time.monotonic() + 60
    while not mark.exists() and time.monotonic() < until:
        time.sleep(0.01)
    for _ in range(times):
        os.kill(child, signal.SIGINT)
        time.sleep(0.1)
    (tmp_path / "go").touch()
    status = None
    while status is None and time.monotonic() < until:
        time.sleep(0.01)
        status = ended(child)
    assert status is not None
    return status, log.read_text(), run_dir


@pytest.mark.parametrize(("slow", "steps"), [("training_step", 6), ("validation_step", 5)])
def test_ctrl_c_once_ends_with_a_checkpoint(slow: str, steps: int, tmp_path: Path) -> None:
    status, text, run_dir = interrupted(tmp_path, times=1, slow=slow)
    assert status == 130 and "Traceback" not in text, text
    assert "Ctrl-C once more stops at once" in text
    assert f"stopped at step {steps}; resume with: python train.py run_dir={run_dir}" in text
    assert checkpoint(run_dir)["global_step"] == steps
    assert call("train.py", f"run_dir={run_dir}", cwd=tmp_path).status == 0
    options = ("checkpoint.every_n_steps=4", "trainer.max_steps=9", "trainer.val_check_interval=5")
    whole = tmp_path / "whole"
    assert call("train.py", *RUN, *options, f"run_dir={whole}", cwd=tmp_path).status == 0
    assert_same(run_dir, whole)


def test_ctrl_c_twice_ends_at_once(tmp_path: Path) -> None:
    status, text, run_dir = interrupted(tmp_path, times=2, slow="training_step")
    assert status == 130 and "Traceback" not in text, text
    assert "stopped at step 5; resume with" in text
    assert checkpoint(run_dir)["global_step"] == 4


def test_ctrl_c_is_given_back(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    train(tmp_path / "run", "trainer.max_steps=1")
    assert signal.getsignal(signal.SIGINT) == before


# --- memory -----------------------------------------------------------------------------------------------------------

ERRORS = {
    "gpu": (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nGPU 0 has ..."), "the device is"),
    "cpu": (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), "the machine is"),
    "python": (MemoryError(), "the machine is"),
}


@pytest.mark.parametrize("kind", ERRORS)
def test_out_of_memory_is_told_in_one_line(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    error, place = ERRORS[kind]
    outcome = failing(error, tmp_path / "run", monkeypatch)
    assert outcome.status == 1, outcome.err
    line = only_line(outcome)
    assert line.startswith(
        f"error: {place} out of memory with batches of 16 images of 8x8; the last checkpoint is kept"
    )
    for name in ("data.batch_size", "trainer.accumulate_grad_batches", "data.image_size", "network"):
        assert name in line
    assert read_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")["global_step"] == 3
    monkeypatch.undo()
    assert call("train.py", f"run_dir={tmp_path / 'run'}", "data.batch_size=8", cwd=tmp_path).status == 0


def test_the_death_of_a_loading_process_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    death = RuntimeError("DataLoader worker (pid(s) 77) exited unexpectedly")
    outcome = failing(death, tmp_path / "run", monkeypatch)
    line = only_line(outcome)
    assert outcome.status == 1 and "pid(s) 77" in line and "lower data.num_workers=0" in line
    assert read_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")["global_step"] == 3


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Too many open files. Communication with the workers is no longer possible."),
        RuntimeError("received 0 items of ancdata"),
        OSError(errno.EMFILE, "Too many open files"),
    ],
)
def test_too_many_open_files_are_told(error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = failing(error, tmp_path / "run", monkeypatch)
    line = only_line(outcome)
    assert outcome.status == 1 and "ulimit -n, or lower data.num_workers=0, then resume" in line


def test_other_errors_keep_their_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match="a defect"):
        failing(RuntimeError("a defect"), tmp_path / "run", monkeypatch)


def failing(error: Exception, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Outcome:
    """A run whose fifth step raises."""
    original = DiffusionModule.training_step

    def step(self: DiffusionModule, *rest: Any) -> Any:
        if self.global_step == 4:
            raise error
        return original(self, *rest)

    monkeypatch.setattr(DiffusionModule, "training_step", step)
    return attempt(run_dir, "checkpoint.every_n_steps=3")


def only_line(outcome: Outcome) -> str:
    lines = [line for line in outcome.err.splitlines() if line.strip()]
    assert len(lines) == 1 and "Traceback" not in outcome.err, outcome.err
    return lines[0]


# --- the check that users run -----------------------------------------------------------------------------------------

NETWORK = tuple(o for o in SMALL if o.startswith(("data", "network", "sampler", "trainer.accelerator")))


@pytest.mark.slow
def test_check_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a real kill of a process of its own; the runs that end by themselves are quicker in this one."""
    original = check_resume._train

    def run(options: list[str], kill_at: int | None, cwd: Path) -> None:
        if kill_at is not None:
            original(options, kill_at, cwd)
        else:
            outcome = call("train.py", *options, cwd=tmp_path)
            assert outcome.status == 0, outcome.err

    monkeypatch.setattr(check_resume, "_train", run)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    outcome = call("train.py", *NETWORK, "check_resume=true", cwd=tmp_path)
    assert outcome.status == 0, outcome.out + outcome.err
    assert "killed with SIGKILL in step 8, resumed from the checkpoint after step 5" in outcome.out
    assert outcome.out.count("the same") == 10 and "to the last bit" in outcome.out
    assert list(tmp_path.iterdir()) == []


def test_a_run_of_the_check_that_fails_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its last line, whatever the command."""
    script = tmp_path / "command.py"
    script.write_text("import sys\nsys.exit('no luck: ' + ' '.join(sys.argv[1:]))\n")
    monkeypatch.setattr(check_resume, "module_arguments", lambda *words: [str(script), *words])
    with pytest.raises(UserError, match=r"a run of the check ended with status 1 \(no luck: train seed=1\)"):
        check_resume._train(["seed=1"], None, tmp_path)
    script.write_text("")
    check_resume._train(["seed=1"], None, tmp_path)


def nudge(path: Path, *keys: Any) -> None:
    """Change one number in a checkpoint in its last bits."""
    values = read_checkpoint(path)
    place: Any = values
    for key in keys[:-1]:
        place = place[key if key in place or isinstance(place, list) else next(iter(place))]
    key = keys[-1] if keys[-1] in place or isinstance(place, list) else next(iter(place))
    if isinstance(place[key], torch.Tensor):
        place[key].view(-1)[0] += 1e-6
    else:
        place[key] += 1
    write_checkpoint(path, values)


def write(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


LAST = "checkpoints/last.ckpt"
NUDGES: dict[str, Callable[[Path], Any]] = {
    "weights": lambda run_dir: nudge(run_dir / LAST, "current_model_state", ""),
    "average of the weights": lambda run_dir: nudge(run_dir / LAST, "state_dict", ""),
    "optimiser": lambda run_dir: nudge(run_dir / LAST, "optimizer_states", 0, "state", 0, "exp_avg"),
    "learning rate": lambda run_dir: nudge(run_dir / LAST, "lr_schedulers", 0, "last_epoch"),
    "place in the data": lambda run_dir: nudge(run_dir / LAST, "ImageDataModule", "next_batch"),
    "skipped steps": lambda run_dir: nudge(run_dir / LAST, "bad_steps", 0),
    "density of the scales": lambda run_dir: nudge(run_dir / LAST, "importance", 0, 0),
    "exported model": lambda run_dir: write_tensors(
        run_dir / "model/model.safetensors",
        {k: v + (v.ndim == 4) for k, v in read_tensors(run_dir / "model/model.safetensors").items()},
    ),
    "metrics": lambda run_dir: write(run_dir / "metrics.csv", "\n", "\n\n"),
    "sample grids": lambda run_dir: (run_dir / "samples/step-000006.png").unlink(),
    "result": lambda run_dir: write(run_dir / "result.json", '"val/loss": ', '"val/loss": 1'),
}


def test_every_difference_is_told(tmp_path: Path) -> None:
    """And no other; a part that one of the two lacks is a difference too."""
    whole = train(tmp_path / "whole", "scale_sampling=importance")
    run_dir = Path(shutil.copytree(whole, tmp_path / "run"))
    assert {name for name, _, worst in check_resume._compare(whole, run_dir)} == NUDGES.keys()
    assert {worst for _, _, worst in check_resume._compare(whole, run_dir)} == {None}
    for part, change in NUDGES.items():
        shutil.rmtree(run_dir)
        shutil.copytree(whole, run_dir)
        change(run_dir)
        assert [name for name, _, worst in check_resume._compare(whole, run_dir) if worst is not None] == [part]
    values = read_checkpoint(whole / LAST)
    del values["importance"]
    write_checkpoint(run_dir / LAST, values)
    found = {name: worst for name, _, worst in check_resume._compare(whole, run_dir)}
    assert found["density of the scales"] is not None
    write_checkpoint(whole / LAST, values)
    assert "density of the scales" not in {name for name, *_ in check_resume._compare(whole, run_dir)}


@pytest.mark.parametrize("same", [True, False])
def test_check_resume_says_so(same: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a run that is copied instead of trained."""
    whole = train(tmp_path / "whole")
    place = tmp_path / "place"
    place.mkdir()

    def run(options: list[str], kill_at: int | None, cwd: Path) -> None:
        assert "run_dir" not in "".join(options[:-1]) and "trainer.max_steps=12" in options
        run_dir = Path(options[-1].removeprefix("run_dir="))
        if kill_at is None:
            shutil.copytree(whole, run_dir)
            if run_dir.name == "killed" and not same:
                NUDGES["weights"](run_dir)

    monkeypatch.setattr(check_resume, "_train", run)
    monkeypatch.setenv("TMPDIR", str(place))
    monkeypatch.setattr("tempfile.tempdir", None)
    outcome = call("train.py", "check_resume=true", f"run_dir={tmp_path / 'mine'}", cwd=tmp_path)
    assert outcome.status == int(not same) and outcome.err == "", outcome.out + outcome.err
    assert ("DIFFERS" in outcome.out) != same and ("to the last bit" in outcome.out) == same
    assert bool(list(place.iterdir())) != same and not (tmp_path / "mine").exists()
