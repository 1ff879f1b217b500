"""Runs that their time ends: the learning rate follows the clock, also when resumed, on any number of ranks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Timer
from torch import distributed, multiprocessing

from dpm_scales.training.module import DiffusionModule
from dpm_scales.training.time_budget import TimeBudget, share_passed
from support.shell import attempt, column, settings, small_model

TIMED = (
    *("trainer.max_steps=-1", "trainer.val_check_interval=50"),
    *("optimizer.warmup_steps=0", "optimizer.learning_rate=0.01"),
)


@pytest.fixture
def seconds(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let a step take a second."""
    step, started = DiffusionModule.training_step, {"now": 0.0}

    def training_step(self: DiffusionModule, *arguments: Any) -> Any:
        started["now"] += 1.0
        return step(self, *arguments)

    monkeypatch.setattr(DiffusionModule, "training_step", training_step)
    monkeypatch.setattr("lightning.pytorch.callbacks.timer.time", SimpleNamespace(monotonic=lambda: started["now"]))
    yield


def cosine(share: float) -> float:
    return 0.01 * 0.5 * (1 + math.cos(math.pi * share))


@pytest.mark.usefixtures("seconds")
def test_cosine_decay_ends_with_the_time(tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = attempt(run, *TIMED, "trainer.max_time=00:00:00:10")
    assert done.status == 0, done.err
    assert column(run, "lr-AdamW") == pytest.approx([cosine(step / 10) for step in range(10)], rel=1e-6)
    assert "is finished (10 steps)" in attempt(run, *TIMED, "trainer.max_time=00:00:00:10").out
    # more time stretches it, and the time before counts
    more = attempt(run, *TIMED, "trainer.max_time=00:00:00:14")
    assert "the learning rate rises from 0 to 0.001883, since cosine decay now ends after 00:00:00:14" in more.out
    expected = [*(cosine(step / 10) for step in range(10)), *(cosine(step / 14) for step in range(10, 14))]
    assert column(run, "lr-AdamW") == pytest.approx(expected, rel=1e-6)
    assert settings(run)["trainer"]["max_steps"] == -1


@pytest.mark.usefixtures("seconds")
def test_a_resumed_run_says_nothing_of_a_rate_that_only_time_has_changed(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert attempt(run, *TIMED, "trainer.max_time=00:00:00:06", "optimizer.max_bad_steps=7").status == 0
    (run / "result.json").unlink()
    again = attempt(run, *TIMED, "trainer.max_time=00:00:00:06", "optimizer.max_bad_steps=7")
    assert again.status == 0 and "from step" not in again.out


@pytest.mark.usefixtures("seconds")
def test_constant_rates_and_runs_with_a_number_of_steps_know_no_clock(tmp_path: Path) -> None:
    assert attempt(tmp_path / "a", *TIMED, "trainer.max_time=00:00:00:05", "optimizer.decay=constant").status == 0
    assert column(tmp_path / "a", "lr-AdamW") == [0.01] * 5
    assert attempt(tmp_path / "b", *TIMED, "trainer.max_steps=8", "trainer.max_time=00:00:00:05").status == 0
    assert column(tmp_path / "b", "lr-AdamW") == pytest.approx([cosine(step / 8) for step in range(5)], rel=1e-6)


def test_automatic_warm_up_takes_a_tenth_of_the_time_at_most_100_steps() -> None:
    module = DiffusionModule(small_model(), warmup_steps="auto", decay="constant")
    assert module.rate(0, -1) == 1 / 101 and module.rate(49, -1) == 50 / 101 and module.rate(100, -1) == 1
    assert module.rate(3, -1, passed=0.05) == 0.5 and module.rate(3, -1, passed=0.1) == 1


@pytest.mark.parametrize("duration", ["01:02:03:04", {"days": 1, "hours": 2, "minutes": 3, "seconds": 4}])
def test_shares_of_a_duration(duration: Any) -> None:
    trainer: Any = SimpleNamespace(callbacks=[Timer(duration)])
    shares = [
        share_passed(trainer, {"callbacks": {"Timer": {"time_elapsed": {"train": seconds}}}})
        for seconds in (-1.0, 0.0, 93784 / 4, 93784.0, 1e9)
    ]
    assert shares == [0, 0, 0.25, 1, 1]
    assert share_passed(trainer) == share_passed(trainer, {}) == share_passed(SimpleNamespace(callbacks=[]), {}) == 0  # type: ignore[arg-type]


def test_no_time_at_all_is_a_run_of_no_steps(tmp_path: Path) -> None:
    done = attempt(tmp_path / "run", *TIMED, "trainer.max_time=00:00:00:00")
    assert (done.status, "Traceback" in done.err) == (0, False), done.err


def _rank(rank: int, folder: str, found: Any) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    timer = Timer("00:00:00:10")
    timer.load_state_dict({"time_elapsed": {"train": 2.0 + 5 * rank}})
    trainer: Any = SimpleNamespace(world_size=2, callbacks=[timer])
    module = DiffusionModule(small_model())
    budget = TimeBudget()
    budget.on_fit_start(trainer, module)
    budget.on_train_start(trainer, module)
    found[rank] = module.passed
    budget.teardown(trainer, module, "fit")


@pytest.mark.skipif(not distributed.is_gloo_available(), reason="needs gloo")
def test_all_ranks_have_the_clock_of_the_first(tmp_path: Path) -> None:
    found = torch.full((2,), math.nan, dtype=torch.float64).share_memory_()
    multiprocessing.start_processes(_rank, (str(tmp_path), found), nprocs=2, start_method="fork")
    assert found.tolist() == pytest.approx([0.2, 0.2], abs=1e-12)
