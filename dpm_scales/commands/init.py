"""`dpm-scales init`: write a small project with a network and a process of its own. Imports neither torch nor Hydra."""

from __future__ import annotations

import importlib.util
import keyword
import re
import shlex
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from dpm_scales.cli.program import program
from dpm_scales.cli.words import split_words
from dpm_scales.errors import printable, require
from dpm_scales.storage import new_folder, write_text

HELP = """\
usage: {0} DIR [name=PACKAGE]

Write a project into a new folder: a Python package with a network and a process, their configs, an experiment,
tests, a Makefile (train, sample, evaluate, resume, runs, test) and a batch script for SLURM.

  name=PACKAGE  name of the package; by default the folder's, in lower case"""
HELP_FLAGS = ("-h", "--help")
SUFFIX, MARK = ".template", "@package@"
TEMPLATES = Path(str(files("dpm_scales") / "templates" / "project"))
#: template names of files and folders that have other names in a project
NAMED = {"package": MARK, "test_package.py": f"test_{MARK}.py", "dot-gitignore": ".gitignore"}
#: folders of a project
TAKEN = ("configs", "evaluation", "runs", "samples", "sweeps", "tests")
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")


def run(argv: Sequence[str]) -> None:
    """Write a project, and print how to begin with it.

    Args:
        argv: arguments after `dpm-scales init`.

    Raises: UserError if the folder exists and is not empty, or if the package can't have its name.
    """
    command = program("init")
    if not set(HELP_FLAGS).isdisjoint(argv):
        print(HELP.format(command))
        return
    asked = split_words(argv, 1, ("name",), (), f"{command} DIR")
    require(len(asked.words) == 1, f"name a new folder: {command} DIR")
    folder = Path(asked.words[0])
    name = asked.options.get("name") or re.sub(r"[-. ]", "_", folder.absolute().name.lower())
    check_name(name)
    write_project(folder, name)
    print(printable(f"{folder}: a project with the package {name}"))
    print(printable(f"  cd {shlex.quote(str(folder))} && make train && make sample"))


def check_name(name: str) -> None:
    """Raise UserError unless a package of a project can have this name."""
    hint = "give another, name=PACKAGE"
    require(bool(_NAME.fullmatch(name)), f"{name!r} is no name of a Python package (letters, digits, _); {hint}")
    require(not keyword.iskeyword(name), f"{name!r} is a keyword of Python; {hint}")
    require(name not in TAKEN, f"{name!r} is another folder of the project; {hint}")
    found = importlib.util.find_spec(name)
    exists = found is not None and found.origin is not None  # a folder without __init__.py does not count
    require(not exists, f"there is a module {name!r} already, which the project would hide; {hint}")


def write_project(folder: Path, name: str) -> None:
    """Write the templates into a new folder, which appears with all files or not at all.

    Args:
        folder: new, or empty.
        name: name of the package; see `check_name`.

    Raises: UserError if the folder is neither, or can't be written.
    """
    with new_folder(folder) as made:
        for template in sorted(TEMPLATES.rglob(f"*{SUFFIX}")):
            parts = template.relative_to(TEMPLATES).with_suffix("").parts
            path = made.joinpath(*(NAMED.get(part, part).replace(MARK, name) for part in parts))
            write_text(path, template.read_text(encoding="utf-8").replace(MARK, name))
