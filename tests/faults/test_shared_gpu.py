"""Runs of a sweep that share GPUs: which one each gets, that others wait, and what ends one or all."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dpm_scales.errors import UserError
from dpm_scales.sweeps.shared_gpu import THREADS, VISIBLE, places
from dpm_scales.sweeps.side_by_side import run_side_by_side
from support.shell import SMALL, call, run
from support.warm import warm_python

FORK = multiprocessing.get_context("fork")


# --- places -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("runs", "gpus", "variable", "found", "expected"),
    [
        (2, None, None, 2, ["0", "1", "0", "1"]),
        (1, None, None, 3, ["0", "1", "2"]),
        (2, [1], None, 2, ["1", "1"]),
        (1, None, "3, 5", 2, ["3", "5"]),
        (2, ["MIG-b"], "MIG-a,MIG-b", 2, ["MIG-b", "MIG-b"]),
        (1, None, "0,7", 1, ["0"]),  # CUDA ends the list at a number that does not exist
        (3, None, None, 0, [None, None, None]),
        (2, None, "", 0, [None, None]),
    ],
)
def test_each_run_has_a_gpu(
    runs: int, gpus: list[int | str] | None, variable: str | None, found: int, expected: list[str | None]
) -> None:
    environment = {} if variable is None else {VISIBLE: variable}
    made = places(runs, gpus, environment, found)
    assert [place.get(VISIBLE) for place in made] == expected
    assert {int(place[THREADS]) for place in made} == {max(1, (os.cpu_count() or 1) // len(expected))}
    own = places(runs, gpus, {**environment, THREADS: "5"}, found)
    assert not any(THREADS in place for place in own), "the user's own number holds"


@pytest.mark.parametrize(
    ("runs", "gpus", "found", "message"),
    [
        (0, None, 1, "hydra.launcher.runs_per_gpu must be a whole number >= 1, got 0"),
        (1, [2], 2, "hydra.launcher.gpus: there is no GPU 2; visible are 0, 1"),
        (1, [0], 0, "hydra.launcher.gpus: there is no GPU 0; none is visible"),
        (1, [], 2, "hydra.launcher.gpus is empty; name some, or null for all"),
        (1, [1, 1], 2, "hydra.launcher.gpus names one twice; runs_per_gpu says how many share it"),
    ],
)
def test_places_that_there_are_not(runs: int, gpus: list[int | str] | None, found: int, message: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        places(runs, gpus, {}, found)


# --- processes --------------------------------------------------------------------------------------------------------


def work(job: bytes) -> bytes:
    """Note the place while others run, for some time; or fail as the job says."""
    task = json.loads(job)
    folder, place = Path(task["folder"]), os.environ["PLACE"]
    running = folder / f"{place}-{task['name']}.running"
    running.touch()
    if task.get("kill"):
        os.kill(os.getpid(), signal.SIGKILL)
    if task.get("exit"):
        raise SystemExit(task["exit"])
    try:
        time.sleep(task["seconds"])
        beside = len(list(folder.glob(f"{place}-*.running")))
    except KeyboardInterrupt:
        (folder / f"{task['name']}.stopped").touch()
        raise SystemExit(130) from None
    running.unlink()
    return json.dumps({"name": task["name"], "place": place, "beside": beside}).encode()


def jobs(folder: Path, *tasks: dict[str, object]) -> list[bytes]:
    return [json.dumps({"folder": str(folder), "name": i, **task}).encode() for i, task in enumerate(tasks)]


def test_jobs_wait_for_a_place_and_one_that_dies_ends_alone(tmp_path: Path) -> None:
    tasks = [{"seconds": 0.1}, {"kill": True}, {"seconds": 0}, {"exit": 3}, {"seconds": 0.05}, {"seconds": 0.05}]
    ends = run_side_by_side(jobs(tmp_path, *tasks), [{"PLACE": name} for name in "aab"], work, FORK)
    assert [end.status for end in ends] == [0, -signal.SIGKILL, 0, 3, 0, 0]
    results = [None if end.result is None else json.loads(end.result) for end in ends]
    assert [None if one is None else one["name"] for one in results] == [0, None, 2, None, 4, 5]
    assert results[0]["place"] == "a" and results[2]["place"] == "b"
    assert all(one["beside"] <= 3 for one in results if one is not None)
    assert "PLACE" not in os.environ


def test_no_more_than_the_places_go_at_a_time(tmp_path: Path) -> None:
    ends = run_side_by_side(jobs(tmp_path, *[{"seconds": 0.02}] * 6), [{"PLACE": "a"}, {"PLACE": "a"}], work, FORK)
    beside = [json.loads(end.result or b"{}")["beside"] for end in ends]
    assert set(beside) <= {1, 2} and len(beside) == 6


@pytest.fixture
def interruptible() -> Iterator[None]:
    """As in a terminal: jobs of a shell in the background ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_stops_all_runs_and_starts_no_other(tmp_path: Path) -> None:
    def press() -> None:
        while len(list(tmp_path.glob("*.running"))) < 2:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=press).start()
    with pytest.raises(KeyboardInterrupt):
        run_side_by_side(jobs(tmp_path, *[{"seconds": 60}] * 3), [{"PLACE": "a"}] * 2, work, FORK)
    assert sorted(path.name for path in tmp_path.glob("*.stopped")) == ["0.stopped", "1.stopped"]


# --- the launcher -----------------------------------------------------------------------------------------------------

SWEEP = ("-m", *SMALL, "trainer.max_steps=2", "hydra/launcher=shared_gpu", "run_dir=sweep")


@pytest.mark.slow
def test_a_sweep_on_a_cpu(tmp_path: Path) -> None:
    """The same folders, table and line of a failed run as one by one."""
    end = run("train.py", *SWEEP, "process.num_scales=6,0,4", cwd=tmp_path, python=warm_python())
    assert end.status == 2, end.err
    failed = [line for line in end.err.splitlines() if line.startswith("failed: ")]
    assert len(failed) == 1 and " process.num_scales=0: " in failed[0] and failed[0].endswith("got 0")
    assert "Traceback" not in end.err
    one = call("train.py", *SWEEP, "hydra/launcher=basic", "process.num_scales=6,4", "run_dir=one", cwd=tmp_path)
    assert one.status == 0
    tables = [(tmp_path / name / "sweep.csv").read_text().splitlines() for name in ("sweep", "one")]
    assert [len(table) for table in tables] == [3, 3]
    names = "*/model/model.safetensors"
    weights = [sorted(path.read_bytes() for path in (tmp_path / name).glob(names)) for name in ("sweep", "one")]
    assert weights[0] == weights[1] and len(weights[0]) == 2


def test_options_of_the_launcher_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    for option, message in {
        "hydra.launcher.runs_per_gpu=0": "hydra.launcher.runs_per_gpu must be a whole number >= 1, got 0",
        "hydra.launcher.gpus=[5]": "hydra.launcher.gpus: there is no GPU 5; visible are 0, 1",
        "trainer.devices=2": "hydra/launcher=shared_gpu gives a run one GPU, and trainer.devices=2 needs more",
    }.items():
        end = call("train.py", *SWEEP, "seed=1,2", option, cwd=tmp_path)
        assert end.status == 2 and end.err.startswith(f"error: {message}") and end.err.count("\n") == 1, end.err
