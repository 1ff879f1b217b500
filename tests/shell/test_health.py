"""A run whose loss is not finite keeps nothing of that, and says a command that works."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dpm_scales.denoisers import Denoiser
from dpm_scales.errors import UserError
from dpm_scales.models.checksums import read_checkpoint, write_checkpoint
from dpm_scales.models.seals import checkpoint_step
from dpm_scales.samplers import Sampler
from dpm_scales.training import load_model
from dpm_scales.training.health import Health, set_aside
from dpm_scales.training.module import DiffusionModule
from support.shell import attempt, call, checkpoint, column, files, train

#: diverges: the first two steps are finite, and leave weights of 1e8
RUN = (
    *("optimizer.learning_rate=1e8", "optimizer.warmup_steps=0"),
    *("samples.num_images=0", "trainer.val_check_interval=5"),
)


def poison(monkeypatch: pytest.MonkeyPatch, bad: Callable[[int], bool]) -> None:
    """Training losses of the steps (counted from 1) for which `bad` holds become NaN."""
    loss, count = Denoiser.loss, iter(range(1, 10**6))

    def poisoned(self: Denoiser, *args: Any, **kwargs: Any) -> Tensor:
        value = loss(self, *args, **kwargs)
        return value * math.nan if torch.is_grad_enabled() and bad(next(count)) else value

    monkeypatch.setattr(Denoiser, "loss", poisoned)


def advised(line: str) -> list[str]:
    """Arguments of the command that a message ends with."""
    words = shlex.split(line.rpartition("python ")[2].strip())
    assert words[0] == "train.py"
    return words[1:]


def assert_finite(run_dir: Path) -> None:
    """Every checkpoint, and the export."""
    for path in (run_dir / "checkpoints").glob("*.ckpt"):
        values = read_checkpoint(path)
        for name in ("state_dict", "current_model_state"):
            assert all(torch.isfinite(value).all() for value in values[name].values()), path
        assert values["bad_steps"][1] == 0, path
    assert all(torch.isfinite(p).all() for p in load_model(run_dir).denoiser.parameters())


def test_a_run_that_diverges_before_any_checkpoint_starts_again(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    options = ("trainer.max_steps=40", "checkpoint.every_n_steps=10", "optimizer.max_bad_steps=5")
    outcome = attempt(run_dir, *RUN, *options)
    assert outcome.status == 2 and outcome.err.count("\n") == 1, outcome.err
    assert "not finite for 8 steps in a row until step 10" in outcome.err
    assert "There is no checkpoint yet: start again with python train.py" in outcome.err
    assert not (run_dir / "checkpoints").exists() and not (run_dir / "model").exists()
    outcome = call("train.py", *advised(outcome.err), cwd=tmp_path)
    assert outcome.status == 0 and math.isfinite(column(run_dir, "train/loss")[-1]), outcome.err
    assert_finite(run_dir)


def test_a_run_that_diverges_goes_back_to_a_good_checkpoint(tmp_path: Path) -> None:
    """The rate rises when the run is resumed; the step after which no loss is finite is a checkpoint, and set aside."""
    run_dir = tmp_path / "run"
    good = ("optimizer.learning_rate=1e-3", "optimizer.decay=constant", "trainer.max_steps=4")
    every = ("checkpoint.every_n_steps=1", "checkpoint.keep_last=3")
    assert attempt(run_dir, *RUN, *good, *every).status == 0
    model = files(run_dir / "model")
    more = ("trainer.max_steps=30", "optimizer.learning_rate=1e8", "optimizer.max_bad_steps=7")
    outcome = call("train.py", f"run_dir={run_dir}", *more, cwd=tmp_path)
    assert outcome.status == 2 and outcome.err.count("\n") == 1, outcome.err
    assert "not finite for 7 steps in a row until step 12" in outcome.err
    assert "The last good checkpoint is of step 4: resume with python train.py" in outcome.err
    folder = run_dir / "checkpoints"
    steps = {path.name: checkpoint_step(path) for path in folder.iterdir()}
    assert steps["last.ckpt"] == 4 and steps["step-000005.diverged"] == 5 and max(steps.values()) == 5
    assert sorted(step for name, step in steps.items() if name.endswith("ckpt")) == [3, 4, 4, 4]
    assert files(run_dir / "model") == model
    outcome = call("train.py", *advised(outcome.err), cwd=tmp_path)
    assert outcome.status == 0, outcome.err
    assert checkpoint(run_dir)["global_step"] == 30 and math.isfinite(column(run_dir, "train/loss")[-1])
    assert_finite(run_dir)


def test_the_only_checkpoint_is_not_taken_away(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    options = ("trainer.max_steps=40", "checkpoint.every_n_steps=1", "optimizer.max_bad_steps=5")
    outcome = attempt(run_dir, *RUN, *options, "checkpoint.keep_last=1", "checkpoint.keep_best=0")
    assert outcome.status == 2 and outcome.err.count("\n") == 1, outcome.err
    assert f"The only checkpoint, of step 2, holds the weights that failed: remove {run_dir}/checkpoints" in outcome.err
    assert checkpoint(run_dir)["global_step"] == 2


def test_nothing_is_kept_of_steps_that_are_not_finite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the last, nor the best; older ones are not rotated out for it."""
    poison(monkeypatch, lambda step: step in (3, 4, 6, 7))
    run_dir = tmp_path / "run"
    options = ("trainer.max_steps=8", "checkpoint.every_n_steps=1", "checkpoint.keep_last=9", "checkpoint.keep_best=9")
    outcome = attempt(run_dir, "trainer.val_check_interval=3", "samples.num_images=0", *options)
    assert outcome.status == 0, outcome.err
    names = {path.name for path in (run_dir / "checkpoints").iterdir()}
    assert names == {"last.ckpt", "best.ckpt", *(f"step-{step:06d}.ckpt" for step in (1, 2, 5))}
    assert checkpoint(run_dir)["bad_steps"] == [4, 0, 2] and checkpoint(run_dir, "best")["global_step"] == 8
    assert_finite(run_dir)


def test_a_stop_amid_steps_that_are_not_finite_keeps_the_checkpoint_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def terminate(self: DiffusionModule, *_: Any) -> None:
        self.trainer._signal_connector.received_sigterm = self.trainer.global_step == 5

    monkeypatch.setattr(DiffusionModule, "on_train_batch_end", terminate)
    poison(monkeypatch, lambda step: step > 3)
    run_dir = tmp_path / "run"
    outcome = attempt(run_dir, "trainer.max_steps=9", "checkpoint.every_n_steps=2", "samples.num_images=0")
    assert outcome.status == 143, outcome.err
    assert outcome.err == f"stopped at step 5; resume with: python train.py run_dir={run_dir}, from step 2\n"
    assert checkpoint(run_dir)["global_step"] == 2 and checkpoint(run_dir, "best")["global_step"] == 3


@pytest.mark.parametrize(("bad", "which"), [(1, "the last step"), (3, "the last 3 steps")])
def test_a_run_that_ends_without_a_finite_loss_exports_nothing(
    bad: int, which: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        poison(patch, lambda step: step > 8 - bad and (bad > 1 or step == 8))
        run_dir = tmp_path / "run"
        options = ("trainer.max_steps=8", "checkpoint.every_n_steps=2", "samples.num_images=0")
        outcome = attempt(run_dir, *options)
        assert outcome.status == 2 and outcome.err.count("\n") == 1, outcome.err
        good = 6 if bad == 1 else 4
        assert f"the loss was not finite in {which} before the end at step 8; none of it is saved." in outcome.err
        assert f"The last good checkpoint is of step {good}: resume with" in outcome.err
        assert not (run_dir / "model").exists() and not (run_dir / "result.json").exists()
        assert checkpoint(run_dir)["global_step"] == good
    arguments = advised(outcome.err)
    assert arguments[-1] == ("trainer.max_steps=9" if bad == 1 else "optimizer.learning_rate=0.0001")
    if bad == 1:
        poison(monkeypatch, lambda step: step == 2)  # the same step once more
    outcome = call("train.py", *arguments, cwd=tmp_path)
    assert outcome.status == 0, outcome.err
    assert checkpoint(run_dir)["bad_steps"][0] == (1 if bad == 1 else 0)
    assert_finite(run_dir)


def test_a_bad_last_step_without_a_checkpoint_asks_for_a_lower_rate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same steps would fail again."""
    poison(monkeypatch, lambda step: step == 2)
    outcome = attempt(tmp_path / "run", "trainer.max_steps=2", "samples.num_images=0")
    assert outcome.status == 2 and "There is no checkpoint yet: start again with" in outcome.err, outcome.err
    assert advised(outcome.err)[-1] == "optimizer.learning_rate=0.0001"


def test_a_model_whose_samples_and_validation_are_not_finite_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its weights are finite, so that it is kept."""
    loss, sample = Denoiser.loss, Sampler.sample

    def lost(self: Denoiser, *args: Any, **kwargs: Any) -> Tensor:
        return loss(self, *args, **kwargs) * (1 if torch.is_grad_enabled() else math.inf)

    monkeypatch.setattr(Denoiser, "loss", lost)
    monkeypatch.setattr(Sampler, "sample", lambda *args, **kwargs: sample(*args, **kwargs) * math.nan)
    with pytest.warns(UserWarning) as found:
        run_dir = train(tmp_path / "run", "trainer.max_steps=1", "samples.num_images=2")
    told = [str(one.message) for one in found]
    assert any(line.startswith("samples at step 1 are not finite: black in the grid") for line in told), told
    advice = "at the end; train again with a lower rate, such as optimizer.learning_rate=0.0001"
    assert any(line.startswith("val/loss is ") and line.endswith(advice) for line in told), told
    assert_finite(run_dir)


def test_weights_that_are_not_finite_are_never_kept(tmp_path: Path) -> None:
    """They come from a finite gradient, so that no loss has told yet."""
    run_dir = tmp_path / "run"
    options = ("trainer.max_steps=1", "trainer.val_check_interval=1", "optimizer.weight_decay=1e30")
    outcome = attempt(run_dir, *RUN, *options, "optimizer.learning_rate=1e30")
    assert outcome.status == 2 and outcome.err.count("\n") == 1, outcome.err
    assert "weights are not finite after step 1; none of it is saved. There is no checkpoint yet" in outcome.err
    assert not (run_dir / "checkpoints").exists() and not (run_dir / "model").exists()


def test_checkpoints_are_set_aside(tmp_path: Path) -> None:
    state: dict[str, Any] = {"state_dict": {}, "recipe": {}}
    for name, step in {"last": 9, "best": 9, "step-000006": 6}.items():
        write_checkpoint(tmp_path / f"{name}.ckpt", {**state, "global_step": step})
    set_aside([tmp_path / "last.ckpt", tmp_path / "best.ckpt"], tmp_path / "step-000006.ckpt")
    assert {path.name: checkpoint_step(path) for path in tmp_path.iterdir()} == {
        "last.ckpt": 6,
        "step-000006.ckpt": 6,
        "step-000009.diverged": 9,
    }


@pytest.mark.parametrize("value", [0, 1.5, "many", 10**30])
def test_max_bad_steps_is_checked(value: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"optimizer\.max_bad_steps must be a whole number >= 1 and <= 1e\+09"):
        Health(tmp_path, value)
