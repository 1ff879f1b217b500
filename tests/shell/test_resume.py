"""A run that is stopped and goes on ends with the same bits as one that was not."""

from __future__ import annotations

import json
import re
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from dpm_scales.data import ImageDataModule
from dpm_scales.models.checksums import write_checkpoint
from dpm_scales.training.module import DiffusionModule
from dpm_scales.training.pictures import SampleGrid
from dpm_scales.training.reporting import LoggedSteps
from support.cluster_shell import Forked, wait_for
from support.shell import FAST, SMALL, assert_equal, attempt, call, checkpoint, files, settings, table, train

#: nine steps; a checkpoint after four and eight of them, validations after three, six and nine
RUN = (
    *(*FAST, "trainer.max_steps=9", "checkpoint.every_n_steps=4", "optimizer.decay=cosine", "ema.decay=0.9"),
    *("ema.power_lengths=[0.05,0.1]", "ema.snapshot_every=3"),
)
#: an epoch of 1438 images in 89 batches, or one of 180 in two and a bit
BATCHES = {
    "mid-epoch": ("data.batch_size=16",),
    "epochs": ("data.batch_size=64", "data.val_fraction=0.9", "trainer.limit_val_batches=1"),
}


#: a checkpoint and a validation after the same steps
EVERY_SECOND = ("trainer.val_check_interval=2", "checkpoint.every_n_steps=2")


class PowerCutError(Exception):
    """Not a user's mistake: it keeps its traceback, and nothing handles it."""


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("undisturbed")
    return {name: train(folder / name, *RUN, *batch) for name, batch in BATCHES.items()}


@pytest.fixture(scope="module")
def every_second(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("every_second")
    return {name: train(folder / name, *RUN, *EVERY_SECOND, *batch) for name, batch in BATCHES.items()}


def cut(monkeypatch: pytest.MonkeyPatch, owner: type, hook: str, number: int, after: bool = False) -> None:
    """Let call `number` of a hook (counted from 0) fail, before or after it has done its work."""
    original = getattr(owner, hook)
    calls = iter(range(10**6))

    def cutting(self: Any, *args: Any, **kwargs: Any) -> Any:
        now = next(calls) == number
        if now and not after:
            raise PowerCutError
        result = original(self, *args, **kwargs)
        if now:
            raise PowerCutError
        return result

    monkeypatch.setattr(owner, hook, cutting)


def broken_off(run_dir: Path, monkeypatch: pytest.MonkeyPatch, *overrides: str, **where: Any) -> None:
    with monkeypatch.context() as patch:
        cut(patch, **where)
        with pytest.raises(PowerCutError):
            attempt(run_dir, *RUN, *overrides)


def assert_same_run(a: Path, b: Path) -> None:
    """Weights, averages, snapshots, optimiser, schedule, counters, place in the data, metrics, grids, export."""
    first, second = checkpoint(a), checkpoint(b)
    assert first.keys() == second.keys()
    for name in first.keys() - {"callbacks", "loops", "epoch"}:  # callbacks know their folder; see below for the loops
        assert_equal(first[name], second[name], name)
    for run_dir in (a, b):
        assert checkpoint(run_dir)["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["completed"] == 9
    assert (a / "metrics.csv").read_text() == (b / "metrics.csv").read_text()
    assert files(a / "samples") == files(b / "samples")
    for folder in ("model", "ema"):
        assert files(a / folder) == files(b / folder) != {}
    ours, theirs = (json.loads((run_dir / "result.json").read_text()) for run_dir in (a, b))
    for result in (ours, theirs):
        del result["seconds"], result["overrides"]
    assert ours == theirs


POINTS = {
    "before the fifth step": {"owner": DiffusionModule, "hook": "training_step", "number": 4},
    "in the middle of the eighth step": {"owner": DiffusionModule, "hook": "configure_gradient_clipping", "number": 7},
    "in the second validation": {"owner": DiffusionModule, "hook": "validation_step", "number": 3},
    "after the second grid": {"owner": SampleGrid, "hook": "on_validation_epoch_end", "number": 1, "after": True},
}


@pytest.mark.parametrize("point", POINTS)
def test_same_bits_after_a_power_cut(
    point: str, tmp_path: Path, undisturbed: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / "run"
    broken_off(run_dir, monkeypatch, **POINTS[point])
    assert checkpoint(run_dir)["global_step"] == 4 and not (run_dir / "result.json").exists()
    outcome = call("train.py", f"run_dir={run_dir}", cwd=tmp_path)
    assert outcome.status == 0, outcome.err
    assert "resuming" in outcome.out
    assert_same_run(run_dir, undisturbed["mid-epoch"])


def test_same_bits_over_several_epochs(
    tmp_path: Path, undisturbed: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / "run"
    where = {"owner": DiffusionModule, "hook": "training_step", "number": 6}
    broken_off(run_dir, monkeypatch, *BATCHES["epochs"], **where)
    assert call("train.py", f"resume={run_dir}", cwd=tmp_path).status == 0
    assert_same_run(run_dir, undisturbed["epochs"])


def test_same_bits_after_three_cuts(
    tmp_path: Path, undisturbed: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of them before the first checkpoint, which leaves nothing to go on from but the options."""
    run_dir = tmp_path / "run"
    broken_off(run_dir, monkeypatch, owner=DiffusionModule, hook="training_step", number=2)
    assert not (run_dir / "checkpoints").exists()
    broken_off(run_dir, monkeypatch, owner=DiffusionModule, hook="training_step", number=5)
    broken_off(run_dir, monkeypatch, owner=DiffusionModule, hook="training_step", number=4)
    assert call("train.py", f"run_dir={run_dir}", cwd=tmp_path).status == 0
    assert_same_run(run_dir, undisturbed["mid-epoch"])


@pytest.mark.parametrize(
    ("batch", "hook", "number", "steps"),
    [
        ("mid-epoch", "validation_step", 3, 2),  # two batches of validation
        ("epochs", "validation_step", 1, 2),  # one
        ("mid-epoch", "training_step", 4, 4),
        ("epochs", "training_step", 4, 4),
    ],
)
def test_checkpoint_and_validation_after_the_same_step(
    batch: str,
    hook: str,
    number: int,
    steps: int,
    every_second: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The validation comes first, so that a run that is cut in it makes up for it. Steps 2, 4, ... end epochs too."""
    run_dir = tmp_path / "run"
    broken_off(run_dir, monkeypatch, *EVERY_SECOND, *BATCHES[batch], owner=DiffusionModule, hook=hook, number=number)
    assert checkpoint(run_dir)["global_step"] == steps
    assert call("train.py", f"run_dir={run_dir}", cwd=tmp_path).status == 0
    assert_same_run(run_dir, every_second[batch])


def test_cut_between_the_last_checkpoint_and_the_export(
    tmp_path: Path, undisturbed: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr("dpm_scales.training.run.save_model", lambda *_: (_ for _ in ()).throw(PowerCutError()))
        with pytest.raises(PowerCutError):
            attempt(run_dir, *RUN)
    assert checkpoint(run_dir)["global_step"] == 9 and not (run_dir / "model").exists()
    assert call("train.py", f"run_dir={run_dir}", cwd=tmp_path).status == 0
    assert_same_run(run_dir, undisturbed["mid-epoch"])


def test_accumulated_gradients_are_not_cut_in_two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint holds none, so none is written between two batches of one step, also not right after resuming."""
    options = ("trainer.accumulate_grad_batches=3", "trainer.max_steps=3", "checkpoint.every_n_steps=1")
    run_dir = tmp_path / "run"
    broken_off(run_dir, monkeypatch, *options, owner=DiffusionModule, hook="training_step", number=5)
    broken_off(run_dir, monkeypatch, *options, owner=DiffusionModule, hook="training_step", number=2)
    assert checkpoint(run_dir)["global_step"] == 1
    assert call("train.py", f"run_dir={run_dir}", cwd=tmp_path).status == 0
    assert_same_run(run_dir, train(tmp_path / "whole", *RUN, *options))


def test_bad_counters_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken_off(tmp_path / "run", monkeypatch, owner=DiffusionModule, hook="training_step", number=5)
    path = tmp_path / "run" / "checkpoints" / "last.ckpt"
    values = checkpoint(tmp_path / "run")
    values["bad_steps"] = [3.0, 2.0, 3.0]
    write_checkpoint(path, values)
    assert call("train.py", f"run_dir={tmp_path / 'run'}", cwd=tmp_path).status == 0
    assert [row["train/bad_steps"] for row in table(tmp_path / "run")[4:]] == ["3"] * 5


# --- runs that are finished, or other runs ----------------------------------------------------------------------------


@pytest.fixture
def finished(undisturbed: dict[str, Path], tmp_path: Path) -> Path:
    """A copy to work on."""
    return Path(shutil.copytree(undisturbed["mid-epoch"], tmp_path / "run"))


def test_finished_runs_are_not_repeated(finished: Path, tmp_path: Path) -> None:
    before = files(finished)
    outcome = call("train.py", f"run_dir={finished}", cwd=tmp_path)
    assert outcome.status == 0 and "is finished (9 steps); raise trainer.max_steps" in outcome.out
    assert files(finished) == before


def test_fewer_steps_than_were_taken_are_refused(finished: Path, tmp_path: Path) -> None:
    """Before anything is written; the number that the line names exports the run as it is."""
    (finished / "result.json").unlink()
    before = files(finished)
    outcome = call("train.py", f"run_dir={finished}", "trainer.max_steps=4", cwd=tmp_path)
    words = "has taken 9 steps, more than trainer.max_steps=4; max_steps=9 ends it there"
    assert outcome.status == 2 and words in outcome.err and outcome.err.count("\n") == 1, outcome.err
    assert files(finished) == before
    assert call("train.py", f"run_dir={finished}", "trainer.max_steps=9", cwd=tmp_path).status == 0
    assert json.loads((finished / "result.json").read_text())["steps"] == 9


def test_finished_run_goes_on_with_more_steps(tmp_path: Path) -> None:
    """Where the learning rate does not depend on their number, as if it had been asked for them at once."""
    options = (*RUN, "optimizer.decay=constant")
    run_dir = train(tmp_path / "run", *options, "trainer.max_steps=6")
    outcome = call("train.py", f"run_dir={run_dir}", "trainer.max_steps=9", cwd=tmp_path)
    assert outcome.status == 0, outcome.err
    whole = train(tmp_path / "whole", *options)
    for folder in (run_dir, whole):  # an end of training is the end of an epoch for Lightning, not for the data
        (folder / "metrics.csv").write_text(repr([{**row, "epoch": ""} for row in table(folder)]))
    assert_same_run(run_dir, whole)
    assert settings(run_dir)["trainer"]["max_steps"] == 9


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("process=heat", "was trained with process=VP, and now process is InverseHeat"),
        ("process.num_scales=7", "was trained with process.num_scales=1000, and now process.num_scales is 7"),
        ("network.widths=[8,16]", r"was trained with network.widths=\[8, 8\]"),
        ("target=noise", "was trained with target=Clean, and now target is Noise"),
        ("conditional=true", "was trained with labels.num_classes=None, and now labels.num_classes is 10"),
    ],
)
def test_another_model_does_not_go_on_in_the_same_folder(
    override: str, message: str, finished: Path, tmp_path: Path
) -> None:
    before = files(finished)
    outcome = call("train.py", f"run_dir={finished}", override, "trainer.max_steps=20", cwd=tmp_path)
    assert outcome.status == 2 and outcome.err.count("\n") == 1
    assert re.search(message, outcome.err), outcome.err
    assert "choose another run_dir, or leave" in outcome.err
    assert files(finished) == before


def test_another_sampler_and_learning_rate_may_go_on(finished: Path, tmp_path: Path) -> None:
    options = ("sampler=ddim", "sampler.steps=2", "optimizer.learning_rate=0.001", "trainer.max_steps=10")
    outcome = call("train.py", f"run_dir={finished}", *options, cwd=tmp_path)
    assert outcome.status == 0, outcome.err
    assert checkpoint(finished)["global_step"] == 10
    assert settings(finished)["sampler"]["steps"] == 2


def test_resume_needs_a_run(tmp_path: Path) -> None:
    outcome = call("train.py", f"resume={tmp_path / 'nowhere'}", cwd=tmp_path)
    assert outcome.status == 2 and "nowhere: no run there" in outcome.err
    assert list(tmp_path.iterdir()) == []


def test_export_alone_is_no_run_to_go_on_from(finished: Path, tmp_path: Path) -> None:
    """A checkpoint without an optimiser would fail deep inside."""
    values = checkpoint(finished)
    del values["optimizer_states"]
    write_checkpoint(finished / "checkpoints" / "last.ckpt", values)
    outcome = call("train.py", f"run_dir={finished}", "trainer.max_steps=20", cwd=tmp_path)
    assert outcome.status == 2 and "holds weights alone" in outcome.err


def test_leftovers_of_a_killed_writer_are_removed(
    tmp_path: Path, undisturbed: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / "run"
    broken_off(run_dir, monkeypatch, owner=DiffusionModule, hook="training_step", number=4)
    leftover = run_dir / "checkpoints" / ".last.ckpt.0123456789ab.tmp"
    leftover.write_bytes(b"half a checkpoint")
    assert call("train.py", f"run_dir={run_dir}", cwd=tmp_path).status == 0
    assert not leftover.exists()


def test_other_data_is_told(finished: Path, tmp_path: Path) -> None:
    """The order of the images can't be the old one's; the run goes on all the same."""
    with pytest.warns(UserWarning, match="the order of the training images differs"):
        outcome = call("train.py", f"run_dir={finished}", "data.batch_size=8", "trainer.max_steps=10", cwd=tmp_path)
    assert outcome.status == 0, outcome.err
    assert isinstance(checkpoint(finished)["ImageDataModule"], dict) and ImageDataModule.__name__ == "ImageDataModule"


@pytest.mark.parametrize(("owner", "step"), [(LoggedSteps, 5), (DiffusionModule, 5), (DiffusionModule, 3)])
def test_sigterm_loses_no_step(
    owner: type, step: int, tmp_path: Path, undisturbed: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether it comes before the hook that writes checkpoints or after it; after step 3 there is a validation."""

    def terminate(self: Any, *_: Any) -> None:
        trainer = self.trainer if owner is DiffusionModule else _[0]
        if trainer.global_step == step:
            trainer._signal_connector.received_sigterm = True

    run_dir = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(owner, "on_train_batch_end", terminate)
        outcome = attempt(run_dir, *RUN)
    assert outcome.status == 143 and f"stopped at step {step}; resume with" in outcome.err
    assert not step == 5 or checkpoint(run_dir)["global_step"] == 5
    outcome = call("train.py", f"run_dir={run_dir}", cwd=tmp_path)
    assert outcome.status == 0, outcome.err
    assert_same_run(run_dir, undisturbed["mid-epoch"])


def test_sigterm_amid_accumulated_gradients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No checkpoint is better than one that lacks them; here that is the beginning."""
    options = (*RUN, "trainer.accumulate_grad_batches=3", "trainer.max_steps=3", "checkpoint.every_n_steps=2")
    batches = iter(range(1, 100))

    def terminate(self: DiffusionModule, *_: Any) -> None:
        self.trainer._signal_connector.received_sigterm = next(batches) == 5

    run_dir = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(DiffusionModule, "on_train_batch_end", terminate)
        outcome = attempt(run_dir, *options)
    assert outcome.status == 143 and outcome.err.endswith(f"python train.py run_dir={run_dir}\n")
    assert not (run_dir / "checkpoints" / "last.ckpt").exists()
    assert call("train.py", f"run_dir={run_dir}", cwd=tmp_path).status == 0
    assert_same_run(run_dir, train(tmp_path / "whole", *options))


# --- signals, in processes of their own -------------------------------------------------------------------------------


LONG = (*SMALL, *FAST, "trainer.max_steps=60", "checkpoint.every_n_steps=7", "trainer.val_check_interval=25")


@pytest.fixture(scope="module")
def long_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Undisturbed."""
    return train(tmp_path_factory.mktemp("long") / "whole", *LONG)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGKILL, -9), (signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=lambda n: str(n)
)
def test_killed_runs_go_on(number: signal.Signals, status: int, long_run: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    last = run_dir / "checkpoints" / "last.ckpt"
    process = Forked([{}], *LONG, f"run_dir={run_dir}", cwd=tmp_path)
    wait_for(last.exists, process)
    time.sleep(0.1)  # somewhere in the steps after it
    process.signal(number)
    (end,) = process.finish()
    assert end.status == status, end.out + end.err
    err, steps = end.err, checkpoint(run_dir)["global_step"]
    assert 7 <= steps < 60 and "Traceback" not in err
    if number != signal.SIGKILL:
        assert f"resume with: python train.py run_dir={run_dir}" in err
    if number == signal.SIGTERM:
        assert f"stopped at step {steps};" in err  # a checkpoint of its own: nothing is lost
    assert call("train.py", f"run_dir={run_dir}", cwd=tmp_path).status == 0
    for name in ("state_dict", "current_model_state", "averaging_state", "optimizer_states", "lr_schedulers"):
        assert_equal(checkpoint(run_dir)[name], checkpoint(long_run)[name], name)
    assert (run_dir / "metrics.csv").read_text() == (long_run / "metrics.csv").read_text()
    assert not list(run_dir.rglob("*.tmp"))
