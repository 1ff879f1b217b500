"""What README, docs and the configs' comments tell people to type."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from support.shell import ROOT

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
TOLD = [path for path in PAGES if path.name != "CHANGELOG.md"]

#: a folder that a command makes: out=judged/RUN, --out DIR; names in capitals stand for any
MADE = re.compile(r"(?:(?<![\w.])out=|run_dir=|--out )([a-z][\w.-]*)(/[\w.-]*)*")
#: an option with what a shell would take for its own: zsh refuses brackets that match no file
SPECIAL = re.compile(r"(?<![\w.])([a-z_][\w./]*=[^\s`'\"]*[\[({][^\s`]*)")


def text_of(path: Path) -> str:
    """All of a page; of a config its comments."""
    text = path.read_text()
    return text if path.suffix == ".md" else "\n".join(re.findall(r"#(.*)", text))


def commands(text: str) -> list[str]:
    """What a shell would get: indented or fenced lines, continued ones in one, without their comments; inline code."""
    joined = text.replace("\\\n", " ")
    lines = re.findall(r"^\s*(?:srun |torchrun .*)?(?:python .*|.*train\.py .*|.*sample\.py .*)$", joined, re.MULTILINE)
    return [line for line in lines if "|" not in line] + re.findall(r"`([^`\n]*=[^`\n]*)`", joined)


def test_folders_that_documents_make_are_ignored() -> None:
    ignored = (ROOT / ".gitignore").read_text().splitlines()
    made = {match[1] for path in (*TOLD, *CONFIGS) for match in MADE.finditer(text_of(path))} - {"docs"}
    assert {"runs", "sweep", "search", "judged", "evaluation", "evolution", "matched", "edited"} <= made
    assert [folder for folder in sorted({*made, "sweeps", "samples"}) if f"/{folder}/" not in ignored] == []


@pytest.mark.parametrize("path", [*TOLD, *CONFIGS], ids=lambda path: path.relative_to(ROOT).as_posix())
def test_options_with_brackets_are_quoted(path: Path) -> None:
    """As zsh wants them, which would look for files of such names."""
    for command in commands(text_of(path)):
        bare = re.sub(r"'[^']*'|\"[^\"]*\"", "", command.partition(" #")[0])
        assert not SPECIAL.search(bare), command


def test_unquoted_brackets_are_found() -> None:
    page = "\n    python evolve.py \\\n  show=[0,2] out=x\n\n`measures=[frechet]` `'a=[1]'` `x(t)` `b = [1]`\n"
    bare = [re.sub(r"'[^']*'", "", command) for command in commands(page)]
    assert [match[1] for match in map(SPECIAL.search, bare) if match] == ["show=[0,2]", "measures=[frechet]"]
    assert shlex.split("python 'show=[0,2]'") == ["python", "show=[0,2]"]
