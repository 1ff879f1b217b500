"""Jobs of a scheduler, one run in a folder, searches."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import shlex
import signal
import subprocess
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

from dpm_scales.distributed.signals import requeue
from dpm_scales.errors import UserError
from dpm_scales.sweeps.search import as_experiment
from dpm_scales.training.module import DiffusionModule
from dpm_scales.training.run_folder import only_run
from support.shell import FAST, SMALL, attempt, broken_off, call, checkpoint, settings, train


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_job_of_a_batch_script_is_queued_again_by_its_number(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint, then `scontrol requeue`; after SIGTERM it is for the scheduler to decide."""
    asked = tmp_path / "asked"
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {asked}\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{scontrol.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "70")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "7")
    step = DiffusionModule.training_step

    def signalled(self: DiffusionModule, *args: Any) -> Any:
        if self.trainer.global_step == 4:
            os.kill(os.getpid(), number)
        return step(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(DiffusionModule, "training_step", signalled)
        outcome = attempt(tmp_path / "run", *FAST)
    assert outcome.status == 128 + number and "stopped at step 5" in outcome.err
    assert checkpoint(tmp_path / "run")["global_step"] == 5
    assert not list((tmp_path / "run").rglob("hpc*"))  # Lightning's own way to requeue
    assert (asked.read_text() if asked.exists() else "") == ("requeue 70_7\n" if number == signal.SIGUSR1 else "")
    train(tmp_path / "run")  # and it goes on
    assert checkpoint(tmp_path / "run")["global_step"] == 6


def test_signal_amid_accumulated_gradients_waits_for_the_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = DiffusionModule.training_step
    calls = iter(range(100))

    def signalled(self: DiffusionModule, *args: Any) -> Any:
        if next(calls) == 3:  # the first of three batches of the second step
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *args)

    monkeypatch.setattr(DiffusionModule, "training_step", signalled)
    outcome = attempt(tmp_path / "run", "trainer.accumulate_grad_batches=3", "trainer.val_check_interval=100")
    assert outcome.status == 143 and "batch 16 x 1 x 3 = 48" in outcome.out
    assert checkpoint(tmp_path / "run")["global_step"] == 2 and next(calls) == 6


def test_nothing_is_queued_again_outside_of_a_job(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_JOB_ID", "SUBMITIT_EXECUTOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("scontrol was called"))
    requeue(signal.SIGUSR1)
    requeue(signal.SIGTERM)


# --- one run in a folder ----------------------------------------------------------------------------------------------


def hold(run_dir: Path, held: Any) -> None:
    with only_run(run_dir):
        held.set()
        time.sleep(100)


def test_folder_is_trained_in_by_one_process(tmp_path: Path) -> None:
    """A second one is told who does; when that one is killed, nothing of the lock is left."""
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    processes = multiprocessing.get_context("fork")  # a fresh interpreter would import for seconds
    held = processes.Event()
    holder = processes.Process(target=hold, args=(run_dir, held), daemon=True)
    holder.start()
    assert held.wait(60)
    outcome = attempt(run_dir)
    assert outcome.status == 2 and [path.name for path in run_dir.iterdir()] == [".lock"]
    assert re.search(rf"run is being trained by process {holder.pid} on \S+; wait for it", outcome.err), outcome.err
    holder.kill()
    holder.join(60)
    train(run_dir)
    with only_run(run_dir), pytest.raises(UserError, match="no other"):
        raise UserError("no other")


# --- searches ---------------------------------------------------------------------------------------------------------

SEARCH = (
    *("-m", *SMALL, "trainer.max_steps=3", "checkpoint.every_n_steps=1", "trainer.val_check_interval=9"),
    *("hydra/sweeper=optuna", "process=vp,blurring", "process.num_scales=range(50,201,50)"),
    "optimizer.learning_rate=tag(log,interval(0.001,0.1))",
)
needs_optuna = pytest.mark.skipif(find_spec("optuna") is None, reason="the sweep extra is not installed")


def trials(root: Path) -> list[tuple[str, dict[str, Any], float | None]]:
    import optuna

    study = optuna.load_study(study_name="study", storage=f"sqlite:///{root}/study.db")
    return [(trial.state.name, trial.params, trial.value) for trial in study.trials]


@needs_optuna
@pytest.mark.slow
def test_search_that_was_broken_off_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    """In the middle of its second trial, which resumes; then with more trials than it was asked for at first."""
    whole = call("train.py", *SEARCH, "hydra.sweeper.n_trials=4", "run_dir=whole", cwd=tmp_path)
    assert whole.status == 0, whole.err
    with broken_off(after=5):
        call("train.py", *SEARCH, "hydra.sweeper.n_trials=3", "run_dir=parts", cwd=tmp_path)
    assert [state for state, _, _ in trials(tmp_path / "parts")] == ["COMPLETE", "RUNNING"]
    second = call("train.py", *SEARCH, "hydra.sweeper.n_trials=3", "run_dir=parts", cwd=tmp_path)
    assert second.status == 0 and second.out.count("resuming") == 1 and "has 1 of 3 trials" in second.out, second.err
    third = call("train.py", *SEARCH, "hydra.sweeper.n_trials=4", "run_dir=parts", cwd=tmp_path)
    assert third.out.count(" M parameters") == 1 and "has 3 of 4 trials" in third.out, third.err
    assert trials(tmp_path / "parts") == trials(tmp_path / "whole")
    names = [sorted(path.parent.name for path in (tmp_path / r).glob("*/result.json")) for r in ("whole", "parts")]
    assert names[0] == names[1] and len(names[0]) == 4
    best = yaml.safe_load((tmp_path / "parts" / "best.yaml").read_text())
    assert best["val/loss"] == min(value for _, _, value in trials(tmp_path / "parts") if value is not None)
    assert json.loads((tmp_path / best["run"] / "result.json").read_text())["val/loss"] == best["val/loss"]
    other = call("train.py", *SEARCH, "seed=1", "run_dir=parts", cwd=tmp_path)
    assert other.status == 2 and "holds a study with another options" in other.err


@needs_optuna
def test_best_of_a_search_is_a_config_that_train_takes(tmp_path: Path) -> None:
    """With what the command line chose and set, also of one's own configs; the run is that trial's."""
    (tmp_path / "own" / "process").mkdir(parents=True)
    (tmp_path / "own" / "process" / "mine.yaml").write_text("defaults: [vp, _self_]\nnum_scales: 50\n")
    fixed = ("process=mine", "experiment=digits_vp", "target=velocity", "+trainer.benchmark=false", "seed=3")
    searched = ("process/noise=cosine,sigmoid", "optimizer.learning_rate=interval(0.001,0.1)")
    search = ("--config-dir", "own", "-m", *SMALL, "hydra/sweeper=optuna", "hydra.sweeper.n_trials=2")
    outcome = call("train.py", *search, *fixed, *searched, "trainer.max_steps=1", "run_dir=search", cwd=tmp_path)
    assert outcome.status == 0, outcome.err
    best = yaml.safe_load((tmp_path / "search" / "best.yaml").read_text())
    assert {*SMALL, *fixed, "trainer.max_steps=1"} < set(best["overrides"]) and len(best["overrides"]) == len(SMALL) + 8
    assert re.match(r"search/optimizer.learning_rate=0.\d{4,6},process-noise=(cosine|sigmoid)-", best["run"])
    command = shlex.split(outcome.out.partition("; train with it: python ")[2].splitlines()[0])
    assert command[:3] == ["train.py", "--config-dir", "search"] and command[-1] == "run_dir=runs/search-best"
    again = call(*command, cwd=tmp_path)
    assert again.status == 0, again.err
    of_trial, of_best = settings(tmp_path / best["run"]), settings(tmp_path / "runs" / "search-best")
    assert of_trial.pop("run_dir") != of_best.pop("run_dir") and of_trial == of_best
    assert of_best["process"]["num_scales"] == 50 and of_best["target"]["_target_"].endswith("Velocity")


def test_experiment_says_which_options_it_can_not_hold() -> None:
    options = ["process=vp", "~network", "+network={_target_:a.B}", "~sampler.steps", "logger@extra=csv"]
    options += ["+new/group=x", "experiment=a", "data.root='x=1, y'", "network.widths=[8,'a']", "seed=null"]
    options += ["+ema.new=1"]
    config, rest = as_experiment(options, lambda key: key in ("process", "network", "logger", "new/group"))
    assert rest == ["~network", "+network={_target_:a.B}", "~sampler.steps"]
    choices = [{"override /process": "vp"}, {"override /logger@extra": "csv"}, {"/new/group": "x"}]
    assert config.pop("defaults") == ["a", *choices]
    values = {"data": {"root": "x=1, y"}, "network": {"widths": [8, "a"]}, "seed": None, "ema": {"new": 1}}
    assert config == values and type(config["data"]["root"]) is str


@needs_optuna
def test_trial_that_is_a_mistake_counts_as_failed(tmp_path: Path) -> None:
    options = (*SEARCH[: SEARCH.index("process=vp,blurring")], "process.num_scales=0,5", "hydra.sweeper.n_trials=3")
    outcome = call("train.py", *options, "run_dir=sweep", "trainer.max_steps=1", cwd=tmp_path)
    found = [(state, params["process.num_scales"]) for state, params, _ in trials(tmp_path / "sweep")]
    assert len(found) == 3 and {("COMPLETE", 5), ("FAIL", 0)} == set(found)
    assert outcome.status == 0 and "best of" in outcome.out and "num_scales must be" in outcome.err


@needs_optuna
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("process.num_scales=5",), "nothing to search"),
        (("seed=interval(3,1)",), "seed=interval"),
        (("seed=1,2", "hydra.sweeper.n_trials=0"), "hydra.sweeper.n_trials"),
        (("seed=1,2", "hydra.sweeper.direction=up"), "hydra.sweeper.direction"),
        (("seed=1,2", "objective=eval/fid", "hydra.sweeper.n_trials=1"), "objective=eval/fid is no figure"),
    ],
)
def test_search_says_what_it_can_not_do(options: tuple[str, ...], message: str, tmp_path: Path) -> None:
    small = ("-m", *SMALL, "hydra/sweeper=optuna", "run_dir=sweep")
    outcome = call("train.py", *small, *options, cwd=tmp_path)
    assert outcome.status == 2 and message in outcome.err.splitlines()[-1], outcome.err


@needs_optuna
def test_search_has_one_leader(tmp_path: Path) -> None:
    ranks = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}
    outcome = call("train.py", *SEARCH, "run_dir=sweep", cwd=tmp_path, environment=ranks)
    assert outcome.status == 2 and "a search is led by one process" in outcome.err
