"""Configs of tasks, sweepers and launchers are composed, and each task has its keys and its function."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from dpm_scales.commands import edit
from dpm_scales.commands import sample as sample_run
from dpm_scales.commands.evolve import TASKS
from dpm_scales.processes import Process
from support.configs import choices, raw
from support.shell import CONFIGS, call, composed


def test_tasks_are_those_of_the_table() -> None:
    assert choices("task") == sorted(TASKS)


@pytest.mark.parametrize("name", choices("task"))
def test_tasks(name: str) -> None:
    """Each says its name, holds its own keys beside those of every task, and has its function."""
    config, own = composed(f"task={name}", name="evolve"), raw(CONFIGS / "task" / f"{name}.yaml")
    assert config.task == name
    known = raw(CONFIGS / "evolve.yaml").keys() | own.keys()
    for base in own.get("defaults", []):  # another task, whose keys it shares
        known |= raw(CONFIGS / "task" / f"{base}.yaml").keys() if isinstance(base, str) and base != "_self_" else set()
    assert set(config) == known - {"defaults", "hydra"}
    assert callable(TASKS[name])


@pytest.mark.parametrize("name", choices("edit"))
def test_tasks_of_sampling(name: str) -> None:
    """As for `evolve`; each holds its own keys beside those of every task, and has its function."""
    config, own = composed(f"edit={name}", name="sample"), raw(CONFIGS / "edit" / f"{name}.yaml")
    assert choices("edit") == sorted(sample_run.TASKS) and config.task == name
    assert set(config) == (raw(CONFIGS / "sample.yaml").keys() | own.keys() | {"sampler"}) - {"defaults", "hydra"}
    assert callable(sample_run.TASKS[name]) and (name == "draw" or callable(getattr(edit, name)))


@pytest.mark.parametrize("name", choices("process"))
def test_every_process_evolves(name: str) -> None:
    assert isinstance(instantiate(composed(f"process={name}", name="evolve").process), Process)


@pytest.mark.parametrize("name", ["train", "sample", "evaluate", "evolve"])
def test_only_the_command_line_makes_a_sweep(name: str) -> None:
    """As `shell.call` takes for granted."""
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        assert compose(name, return_hydra_config=True).hydra.mode is None


def test_no_process_is_chosen_by_default() -> None:
    config = composed(name="evolve")
    assert config.task == "compare" and config.process is None


def test_search_is_composed_without_optuna() -> None:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = compose("train", overrides=["hydra/sweeper=optuna"], return_hydra_config=True)
    sweeper = instantiate(config.hydra.sweeper)
    assert (sweeper.n_trials, sweeper.n_jobs, sweeper.direction, sweeper.seed) == (20, 1, "minimize", 0)


@pytest.mark.skipif(find_spec("submitit") is None, reason="the slurm extra is not installed")
def test_slurm_launcher() -> None:
    """Tasks and GPUs follow the trainer."""
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        overrides = ["hydra/launcher=slurm", "trainer=ddp", "trainer.devices=4", "trainer.num_nodes=2"]
        launcher = compose("train", overrides=overrides, return_hydra_config=True).hydra.launcher
    params = instantiate(launcher).params
    assert launcher._target_.endswith("SlurmLauncher") and params["max_num_timeout"] > 0
    assert (params["nodes"], params["tasks_per_node"], params["gpus_per_node"]) == (2, 4, 4)
    assert params["setup"] == ["export SLURM_KILL_BAD_EXIT=1"]


@pytest.mark.skipif(find_spec("submitit") is not None, reason="the slurm extra is installed")
def test_slurm_launcher_says_what_it_needs(tmp_path: Path) -> None:
    outcome = call("train.py", "-m", "seed=1,2", "hydra/launcher=slurm", cwd=tmp_path)
    assert outcome.status == 2 and outcome.err == (
        "error: this launcher needs the submitit plugin: pip install '.[slurm]'\n"
    )
