"""Runs with configs of the user's own: a resumed run asks for the flags that lead to them, and follows no file."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path

import pytest
import yaml

from dpm_scales.cli.arguments import config_flags, with_stored_overrides
from dpm_scales.cli.stored import stored_config_dir, stored_config_flags
from dpm_scales.errors import UserError
from support.shell import CONFIGS, SMALL, call, settings, train


def error(*arguments: str, cwd: Path) -> str:
    """Return the one line of a refused `train.py`."""
    outcome = call("train.py", *arguments, cwd=cwd)
    assert outcome.status == 2 and outcome.out == "", outcome
    assert outcome.err.startswith("error: ") and outcome.err.count("\n") == 1, outcome.err
    return outcome.err.removeprefix("error: ").rstrip("\n")


@pytest.fixture(scope="module")
def own_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with own/experiment/mine.yaml and the run of it."""
    root = tmp_path_factory.mktemp("own configs")
    (root / "own" / "experiment").mkdir(parents=True)
    text = "# @package _global_\ndefaults:\n  - override /process: heat\nprocess: {num_scales: 5}\n"
    (root / "own" / "experiment" / "mine.yaml").write_text(text)
    options = ("--config-dir", str(root / "own"), "experiment=mine", "sampler.steps=null", "trainer.max_steps=1")
    train(root / "run", *options)
    return root


def test_flags_may_stand_before_options_of_a_run(own_run: Path) -> None:
    """A run's own options are put between them."""
    line = ("--config-dir", "own", "run_dir=run", "trainer.max_steps=2")
    outcome = call("train.py", *line, cwd=own_run)
    assert outcome.status == 0, outcome.err
    assert settings(own_run / "run")["process"]["num_scales"] == 5
    assert settings(own_run / "run")["trainer"]["max_steps"] == 2
    assert "experiment=mine" in yaml.safe_load((own_run / "run" / "overrides.yaml").read_text())


def test_a_run_names_the_config_folder_that_it_needs(own_run: Path, tmp_path: Path) -> None:
    own = shlex.quote(str(own_run / "own"))
    said = "run was trained with experiment=mine"
    line = error("run_dir=run", "trainer.max_steps=9", cwd=own_run)
    assert line == f"{said}, a config of your own; give --config-dir {own} as it was"
    (tmp_path / "experiment").mkdir()
    line = error(f"--config-dir={tmp_path}", "resume=run", cwd=own_run)
    seen = f"--config-dir {tmp_path} holds no experiment/mine.yaml"
    assert line == f"{said}, and {seen}; give --config-dir {own} as it was"


def test_the_recorded_config_folder_is_for_messages_alone(own_run: Path, tmp_path: Path) -> None:
    """A folder of files leads nowhere: neither is the record opened as a config, nor a link in its place followed."""
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "overrides.yaml").write_text("[experiment=mine]")
    with pytest.raises(UserError, match="give the --config-dir that holds it"):
        with_stored_overrides([f"run_dir={run_dir}"])
    (run_dir / "config_dir").write_text(f"{own_run}/own\n")
    with pytest.raises(UserError, match="give --config-dir .*own.* as it was"):
        with_stored_overrides([f"run_dir={run_dir}"])
    assert with_stored_overrides([f"--config-dir={own_run}/own", f"run_dir={run_dir}"])[1] == "experiment=mine"
    (run_dir / "config_dir").unlink()
    (run_dir / "config_dir").symlink_to(own_run / "own" / "experiment" / "mine.yaml")
    assert stored_config_dir(run_dir) is None
    (run_dir / "config_dir").unlink()
    (run_dir / "config_dir").mkdir()
    assert stored_config_dir(run_dir) is None


def test_a_run_names_the_folder_of_a_group_of_the_users_own(tmp_path: Path) -> None:
    """`+GROUP=NAME` with a group that the package does not have."""
    (tmp_path / "own" / "recipe").mkdir(parents=True)
    (tmp_path / "own" / "recipe" / "mine.yaml").write_text("# @package _global_\nseed: 7\n")
    outcome = call(
        "train.py", "--config-dir=own", *SMALL, "+recipe=mine", "trainer.max_steps=1", "run_dir=run", cwd=tmp_path
    )
    assert outcome.status == 0 and settings(tmp_path / "run")["seed"] == 7
    line = error("run_dir=run", "trainer.max_steps=2", cwd=tmp_path)
    asked = f"give --config-dir {tmp_path / 'own'} as it was"
    assert line == f"run was trained with +recipe=mine, a config of your own; {asked}"
    outcome = call("train.py", "--config-dir=own", "run_dir=run", "trainer.max_steps=2", cwd=tmp_path)
    assert outcome.status == 0 and settings(tmp_path / "run")["seed"] == 7


def test_a_run_names_the_config_that_replaced_the_package_s(tmp_path: Path) -> None:
    """Without `--config-name`, all options would have the values of train.yaml."""
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "mine.yaml").write_text("defaults: [train, _self_]\nseed: 5\n")
    flags = ("--config-dir=own", "--config-name=mine")
    small = (*SMALL, "trainer.max_steps=1")
    assert call("train.py", *flags, *small, "run_dir=run", cwd=tmp_path).status == 0
    assert settings(tmp_path / "run")["seed"] == 5
    assert stored_config_flags(tmp_path / "run") == ["--config-name=mine"]
    expected = "run was trained with --config-name mine; give it again, with --config-dir as it was"
    assert error("run_dir=run", "trainer.max_steps=2", cwd=tmp_path) == expected
    outcome = call("train.py", *flags, "run_dir=run", "trainer.max_steps=2", cwd=tmp_path)
    assert outcome.status == 0 and settings(tmp_path / "run")["seed"] == 5 and "seed" not in outcome.out
    outcome = call("train.py", "--config-name=train", "run_dir=run", "trainer.max_steps=3", cwd=tmp_path)
    assert outcome.status == 0 and "seed 5 -> 0" in outcome.out
    assert stored_config_flags(tmp_path / "run") == []


def test_a_run_names_the_folder_that_replaced_the_configs(tmp_path: Path) -> None:
    """A relative one is below the current folder, wherever the package is."""
    shutil.copytree(CONFIGS, tmp_path / "all")
    text = (tmp_path / "all" / "train.yaml").read_text().replace("\nseed: 0", "\nseed: 6")
    (tmp_path / "all" / "train.yaml").write_text(text)
    shutil.copy(CONFIGS / "process" / "vp.yaml", tmp_path / "all" / "process" / "mine.yaml")
    options = (*SMALL, "process=mine", "trainer.max_steps=1")
    assert call("train.py", "-cp", "all", *options, "run_dir=run", cwd=tmp_path).status == 0
    assert settings(tmp_path / "run")["seed"] == 6
    again = f"--config-path {tmp_path / 'all'}"
    assert error("run_dir=run", cwd=tmp_path).startswith(f"run was trained with {again}; give it again")
    outcome = call("train.py", *again.split(), "run_dir=run", "trainer.max_steps=2", cwd=tmp_path)
    assert outcome.status == 0 and settings(tmp_path / "run")["seed"] == 6, outcome.err


def test_a_record_may_only_name_flags_of_configs(tmp_path: Path) -> None:
    text = "--config-name=x\x1b[31m\n--multirun\nseed=1\n--config-path=/p\n"
    (tmp_path / "config_flags").write_text(text)
    assert stored_config_flags(tmp_path) == ["--config-name=x\x1b[31m", "--config-path=/p"]
    (tmp_path / "overrides.yaml").write_text("[]")
    line = error(f"run_dir={tmp_path}", cwd=tmp_path)
    assert "was trained with --config-name 'x\\x1b[31m'; give it again" in line
    (tmp_path / "config_flags").unlink()
    (tmp_path / "config_flags").symlink_to(tmp_path / "overrides.yaml")
    assert stored_config_flags(tmp_path) == []


def test_a_repeated_command_finds_the_same_configs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the further processes of a run, and `check_resume=true`, repeat it."""
    (tmp_path / "own" / "process").mkdir(parents=True)
    shutil.copy(CONFIGS / "process" / "vp.yaml", tmp_path / "own" / "process" / "mine.yaml")
    seen: list[list[str]] = []
    monkeypatch.setattr("dpm_scales.training.run.train", lambda *_: seen.append(config_flags()) or {"val/loss": 1.0})
    for flags in (
        ("--config-dir=own",),
        ("hydra.searchpath=[own]",),
        ("--config-dir=own", "--config-name=train"),
        (f"--config-path={CONFIGS}", "--config-dir=own"),
    ):
        assert call("train.py", *flags, "process=mine", "run_dir=run", cwd=tmp_path).status == 0
    own = f"--config-dir={tmp_path / 'own'}"
    assert seen == [[own], ["hydra.searchpath=[own]"], [own], [own]]
