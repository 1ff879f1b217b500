"""`dpm-scales COMMAND`: the list of commands, the scripts, the commands that messages advise, new processes."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dpm_scales import __version__
from dpm_scales.cli import program
from dpm_scales.cli.output import reported
from dpm_scales.cli.program import child_environment, command_line, module_arguments, remember_form
from dpm_scales.entry.commands import COMMANDS
from dpm_scales.entry.start import console, dispatch
from dpm_scales.errors import UserError
from dpm_scales.training.resuming import resume_command
from support.shell import ROOT, call


@pytest.fixture(autouse=True)
def no_form(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Start each test without a recorded form, and leave none behind."""
    monkeypatch.setenv(program.FORM, "")
    monkeypatch.delenv(program.FORM)
    yield


def typed(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Run `dpm-scales arguments` in this process, and return its status."""
    monkeypatch.setattr(sys, "argv", ["dpm-scales", *arguments])
    try:
        console()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


@pytest.mark.parametrize("arguments", [(), ("--help",), ("-h",)])
def test_the_list_of_commands(
    arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert typed(monkeypatch, *arguments) == 0
    out = capsys.readouterr().out
    assert out.startswith("usage: dpm-scales COMMAND")
    for name, command in COMMANDS.items():
        assert f"  {name} " in out and command.about in out
        assert callable(importlib.import_module(command.module).main)


def test_the_page_lists_all_commands() -> None:
    page = (ROOT / "docs" / "install.md").read_text()
    assert [name for name in COMMANDS if f"\n| `dpm-scales {name}" not in page] == []


def test_the_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert typed(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"dpm-scales {__version__}\n"


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("trian", "unknown command 'trian': did you mean 'train'? allowed: "),
        ("\x1b[31m", "unknown command '\\x1b[31m': allowed: "),
        ("process=vp", "'process=vp' where a command belongs: dpm-scales COMMAND process=vp; commands: train, "),
        ("-m", "'-m' where a command belongs: "),
    ],
)
def test_no_command(
    word: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert typed(monkeypatch, word, "seed=1") == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith(f"error: {message}") and said.err.count("\n") == 1


def test_a_command_gets_its_arguments(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert typed(monkeypatch, "sample", "--help") == 0
    out = capsys.readouterr().out
    assert out.startswith("usage: dpm-scales sample [GROUP") and "  dpm-scales sample model=RUN num_samples=64" in out
    assert "sample.py" not in out


def test_a_command_without_hydra_ends_with_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end, reported():
        raise UserError("no\nsuch \x1b run")
    assert end.value.code == 2 and capsys.readouterr().err == "error: no such \\x1b run\n"
    with pytest.raises(SystemExit) as end, reported():
        raise KeyboardInterrupt
    assert end.value.code == 130
    with pytest.raises(ZeroDivisionError), reported():
        raise ZeroDivisionError


def test_neither_torch_nor_hydra_is_imported_for_the_list() -> None:
    code = (
        "import sys\nfrom dpm_scales.entry.start import console\nsys.argv[1:] = sys.argv[1:]\n"
        "try:\n    console()\nexcept SystemExit:\n    pass\n"
        "print(*[m for m in ('torch', 'hydra', 'omegaconf', 'numpy', 'yaml') if m in sys.modules], file=sys.stderr)"
    )
    for arguments in ([], ["--help"], ["--version"]):
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=ROOT, check=True
        )
        assert done.stdout and done.stderr.strip() == ""


# --- the commands that messages advise --------------------------------------------------------------------------------


def test_advice_has_the_form_that_was_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert program.CHECKOUT == ROOT
    assert command_line("train", "run_dir=a b") == "python train.py 'run_dir=a b'"
    assert program.program("runs") == "python -m dpm_scales runs"  # no script
    monkeypatch.setattr(program, "CHECKOUT", None)
    assert command_line("train", "run_dir=a") == "dpm-scales train run_dir=a"
    monkeypatch.setenv(program.FORM, "something else")
    assert program.program("runs") == "dpm-scales runs"
    monkeypatch.setattr(program, "CHECKOUT", ROOT)
    for form, expected in (("console", "dpm-scales train"), ("module", "python -m dpm_scales train")):
        monkeypatch.delenv(program.FORM)
        remember_form(form)
        remember_form("script")  # a child process inherits the form
        assert resume_command(Path("runs/a")) == f"{expected} run_dir=runs/a"


def test_a_script_is_advised_after_a_script(tmp_path: Path) -> None:
    assert call("evaluate.py", "--help", cwd=tmp_path).out.startswith("usage: python evaluate.py ")


def test_python_m_is_advised_after_python_m(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["__main__.py", "evolve", "--help"])
    dispatch("module")
    assert capsys.readouterr().out.startswith("usage: python -m dpm_scales evolve ")


# --- a command in a new process ---------------------------------------------------------------------------------------


def child(cwd: Path, environment: dict[str, str], *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout


def test_a_new_process_finds_the_package_and_nothing_in_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`python -m` would import yaml.py of the current folder, which the parent does not."""
    (tmp_path / "yaml.py").write_text("raise SystemExit('the file in the current folder was executed')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["/elsewhere", str(ROOT)]))
    monkeypatch.setattr(sys, "path", [folder for folder in sys.path if folder not in ("", str(tmp_path))])
    environment = child_environment()
    assert environment["PYTHONPATH"] == os.pathsep.join([str(ROOT), "/elsewhere"])
    assert child(tmp_path, environment, *module_arguments("train", "--help")).startswith("usage: python train.py")
    code = "import json, sys; import dpm_scales; print(json.dumps([dpm_scales.__file__, sys.path]))"
    found, path = json.loads(child(tmp_path, environment, "-c", code))
    assert Path(found).is_relative_to(ROOT) and "" not in path and str(tmp_path) not in path


def test_a_new_process_imports_from_the_current_folder_if_this_one_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mynet.py").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    code = "import importlib.util; print(importlib.util.find_spec('mynet') is not None)"
    assert child(tmp_path, child_environment(), "-c", code) == "True\n"
    monkeypatch.setattr(sys, "path", sys.path[1:])
    assert child(tmp_path, child_environment(), "-c", code) == "False\n"


def test_an_installed_package_is_not_put_into_pythonpath(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "CHECKOUT", None)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    assert "PYTHONPATH" not in child_environment()
