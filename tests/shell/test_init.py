"""`dpm-scales init`: the project that it writes works as it stands."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from dpm_scales.cli.program import FORM
from dpm_scales.commands.init import SUFFIX, TAKEN, TEMPLATES, run
from dpm_scales.entry.start import console
from dpm_scales.errors import UserError
from support.shell import ROOT, files
from support.warm import warm_python

#: options that make a training of the project short
TINY = (
    *("trainer.max_steps=2", "network.width=16", "network.depth=1", "data.batch_size=16", "trainer.accelerator=cpu"),
    *("samples.num_images=4", "sampler.steps=2", "trainer.limit_val_batches=1"),
)


@pytest.fixture(autouse=True)
def no_form(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let no other test have recorded how commands are typed, and record nothing for others."""
    monkeypatch.setenv(FORM, "")
    yield


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("projects") / "My-Net.1"
    run([str(folder)])
    return folder


def in_shell(folder: Path, *words: str, **environment: str) -> str:
    """Run a command in the project's folder, and return its output."""
    inherited = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(
        words, cwd=folder, env=inherited, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def make(folder: Path, target: str, *arguments: str, python: str | None = None) -> str:
    """Make a target in the project's folder with an interpreter, by default a fork of this one."""
    return in_shell(folder, "make", f"PYTHON={python or warm_python()}", target, f"ARGS={' '.join(arguments)}")


# --- what is written --------------------------------------------------------------------------------------------------


def test_the_files_of_a_project(project: Path) -> None:
    assert set(files(project)) == {
        *("Makefile", "README.md", ".gitignore", "pyproject.toml", "slurm.sh"),
        *("configs/experiment/mine.yaml", "configs/network/mine.yaml", "configs/process/mine.yaml"),
        *("my_net_1/__init__.py", "my_net_1/networks.py", "my_net_1/processes.py", "tests/test_my_net_1.py"),
    }
    assert not any(b"@package@" in content for content in files(project).values())
    assert yaml.safe_load((project / "configs/network/mine.yaml").read_text())["_target_"].startswith("my_net_1.")


def test_all_templates_are_in_the_wheel() -> None:
    """By their suffix; without it setuptools, linters and git would take them for files of this package."""
    package_data = re.search(r"^dpm_scales = \[(.*)\]$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert package_data is not None and f'"templates/**/*{SUFFIX}"' in package_data[1]
    found = [path for path in TEMPLATES.rglob("*") if path.is_file()]
    assert len(found) == 12 and all(path.suffix == SUFFIX for path in found)


def test_the_project_is_clean(project: Path) -> None:
    in_shell(project, "bash", "-n", "slurm.sh")
    for command in (("check",), ("format", "--check")):
        in_shell(project, sys.executable, "-m", "ruff", *command, ".")
    for path in project.rglob("*.py"):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                arguments = [*node.args.args, *node.args.kwonlyargs]
                assert node.returns is not None and all(a.annotation for a in arguments if a.arg != "self"), node.name
            if isinstance(node, ast.ClassDef | ast.Module):
                assert ast.get_docstring(node), path


def test_what_the_project_makes_is_ignored(project: Path) -> None:
    ignored = (project / ".gitignore").read_text().split()
    assert {f"/{name}/" for name in TAKEN if name not in ("configs", "tests")} <= set(ignored)


def test_the_commands_of_its_page_are_its_targets(project: Path) -> None:
    page, makefile = (project / "README.md").read_text(), (project / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z]+):$", makefile, re.MULTILINE))
    described = {*re.findall(r"^# make ([a-z]+)", makefile, re.MULTILINE)}
    assert targets == described == set(re.findall(r"make ([a-z]+)", page))
    for name in re.findall(r"`([a-z0-9_/]+\.(?:py|yaml))`", page):
        assert (project / name).is_file(), name


# --- that it works ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_project_trains_resumes_samples_and_is_judged(project: Path) -> None:
    out = make(project, "train", *TINY)
    assert "runs/mine: SlightBlur" in out and "allow=my_net_1" in out
    config = yaml.safe_load((project / "runs/mine/config.yaml").read_text())
    assert config["network"]["_target_"] == "my_net_1.networks.ResidualNet" and "allow" not in config["process"]
    assert "is finished (2 steps)" in make(project, "train", *TINY)
    assert "resuming runs/mine/checkpoints/last.ckpt" in make(project, "resume", "trainer.max_steps=3")
    make(project, "sample", "num_samples=4")
    assert (project / "samples/mine/grid.png").is_file() and (project / "samples/mine/000003.png").is_file()
    judge = ("features=efflite0", "measures=[frechet]", "num_samples=4", "num_reference=4")
    make(project, "evaluate", *judge)
    assert (project / "evaluation/mine/evaluation.json").is_file()
    listed = make(project, "runs")
    assert "1 finished" in listed and "3/3" in listed and "evaluate/fd_efflite0" in listed


@pytest.mark.slow
def test_its_own_tests_pass(project: Path) -> None:
    assert "4 passed" in make(project, "test", "-p", "no:cacheprovider", python=sys.executable)


@pytest.mark.slow
def test_its_batch_script_trains_and_is_requeued_to_resume(project: Path, tmp_path: Path) -> None:
    """With an `srun` that starts one task, as SLURM's does, in the folder from which the job was submitted."""
    srun = tmp_path / "srun"
    srun.write_text('#!/bin/bash\nexec "$@"\n')
    srun.chmod(0o755)
    place = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": str(project), "PYTHON": warm_python()}
    script, other = str(project / "slurm.sh"), [*TINY, "run_dir=runs/job"]
    in_shell(tmp_path, "bash", script, *other, **place)
    again = in_shell(tmp_path, "bash", script, *other, "trainer.max_steps=3", **place)
    assert "resuming runs/job/checkpoints/last.ckpt" in again
    header = re.findall(r"^#SBATCH (.*)", Path(script).read_text(), re.MULTILINE)
    assert any("--signal=USR1@120 --requeue --open-mode=append" in line for line in header)


# --- names ------------------------------------------------------------------------------------------------------------

HINT = "give another, name=PACKAGE"
WRONG = {
    ("3d",): f"'3d' is no name of a Python package (letters, digits, _); {HINT}",
    ("müll",): f"'müll' is no name of a Python package (letters, digits, _); {HINT}",
    ("a", "name=my-net"): f"'my-net' is no name of a Python package (letters, digits, _); {HINT}",
    ("a", "name=../up"): f"'../up' is no name of a Python package (letters, digits, _); {HINT}",
    ("class",): f"'class' is a keyword of Python; {HINT}",
    ("dpm_scales",): f"there is a module 'dpm_scales' already, which the project would hide; {HINT}",
    ("dpm-scales",): f"there is a module 'dpm_scales' already, which the project would hide; {HINT}",
    ("torch",): f"there is a module 'torch' already, which the project would hide; {HINT}",
    ("sys",): f"there is a module 'sys' already, which the project would hide; {HINT}",
    ("a", "name=configs"): f"'configs' is another folder of the project; {HINT}",
    ("file",): "file is a file; choose a new folder",
    ("full",): "full is not empty; choose a new folder",
    ("dangling",): "dangling is a link; choose a new folder",
    ("file/below",): "cannot make file/below: Not a directory; choose a new folder",
    (): "name a new folder: python -m dpm_scales init DIR",
    ("a", "b"): "'a b' are too many arguments: python -m dpm_scales init DIR",
    ("a", "nam=b"): "unknown option 'nam': did you mean 'name'? allowed: name",
}


@pytest.mark.parametrize("arguments", WRONG)
def test_mistakes_in_one_line(arguments: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("kept")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("kept")
    (tmp_path / "dangling").symlink_to("nowhere")
    with pytest.raises(UserError) as caught:
        run(arguments)
    assert str(caught.value) == WRONG[arguments]
    assert files(tmp_path) == {"file": b"kept", "full/file": b"kept"} and len(list(tmp_path.iterdir())) == 3


def test_an_empty_folder_becomes_a_project(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a b").mkdir()
    monkeypatch.setattr(sys, "argv", ["dpm-scales", "init", "a b", "name=mine"])
    console()
    assert capsys.readouterr().out == (
        "a b: a project with the package mine\n  cd 'a b' && make train && make sample\n"
    )
    assert (tmp_path / "a b" / "mine" / "networks.py").is_file() and len(list(tmp_path.iterdir())) == 1
    run(["--help"])
    assert capsys.readouterr().out.startswith("usage: ")


def test_a_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, text: str) -> None:
        raise UserError(f"cannot write {path}: No space left on device")

    monkeypatch.setattr("dpm_scales.commands.init.write_text", full)
    with pytest.raises(UserError, match="No space left"):
        run([str(tmp_path / "new")])
    assert not list(tmp_path.iterdir())
