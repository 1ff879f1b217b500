"""Check the commands, links, paths and names in README, docs and the configs' comments."""

from __future__ import annotations

import ast
import pkgutil
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from dpm_scales.cli.plugins import GROUPS
from support.shell import ROOT

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
TOLD = [path for path in PAGES if path.name != "CHANGELOG.md"]

#: a folder that a command makes: out=judged/RUN, --out DIR; names in capitals are placeholders
MADE = re.compile(r"(?:(?<![\w.])out=|run_dir=|--out )([a-z][\w.-]*)(/[\w.-]*)*")
#: an option with characters that a shell expands: zsh refuses brackets that match no file
SPECIAL = re.compile(r"(?<![\w.])([a-z_][\w./]*=[^\s`'\"]*[\[({][^\s`]*)")
LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)")
#: a file of this repository; `processes/law.py` is one below dpm_scales
FILE = re.compile(r"(?<![\w./~-])((?:[a-z]\w*/)+[a-z]\w*\.py|configs/[a-z_0-9/]+\.yaml)\b")
NAME = re.compile(r"(?<![\w./])((?:dpm_scales|benchmarks)(?:\.[A-Za-z]\w*)+)(?!\w|/)")
#: packages that a reader makes or installs, whose names a page may import
ELSEWHERE = ("mynet", "datasets")


def text_of(path: Path) -> str:
    """Return the text of a page, or the comments of a config."""
    text = path.read_text()
    return text if path.suffix == ".md" else "\n".join(re.findall(r"#(.*)", text))


def commands(text: str) -> list[str]:
    """Return all commands: indented or fenced lines, with continuations joined, and inline code."""
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
    """zsh would otherwise look for files with matching names."""
    for command in commands(text_of(path)):
        bare = re.sub(r"'[^']*'|\"[^\"]*\"", "", command.partition(" #")[0])
        assert not SPECIAL.search(bare), command


def test_unquoted_brackets_are_found() -> None:
    page = "\n    python evolve.py \\\n  show=[0,2] out=x\n\n`measures=[frechet]` `'a=[1]'` `x(t)` `b = [1]`\n"
    bare = [re.sub(r"'[^']*'", "", command) for command in commands(page)]
    assert [match[1] for match in map(SPECIAL.search, bare) if match] == ["show=[0,2]", "measures=[frechet]"]
    assert shlex.split("python 'show=[0,2]'") == ["python", "show=[0,2]"]


def anchors(page: str) -> set[str]:
    """Return the anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", page, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def dead_links(path: Path, text: str) -> Iterator[str]:
    """Yield the relative links of a page that lead to no file or to no heading."""
    for target, anchor in LINK.findall(text):
        place = path.parent / target if target else path
        if not place.exists() or (anchor and anchor not in anchors(text if place == path else place.read_text())):
            yield f"{target}#{anchor}"


def unknown_names(text: str) -> Iterator[str]:
    """Yield the files and Python names in a page, also those that its Python blocks import, that do not exist."""
    for name in FILE.findall(text):
        if not any((root / name).exists() for root in (ROOT, ROOT / "dpm_scales")):
            yield name
    names = set(NAME.findall(text))
    for block in re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and str(node.module).partition(".")[0] not in ELSEWHERE:
                names |= {f"{node.module}.{alias.name}" for alias in node.names}
    for name in sorted(names - set(GROUPS)):  # of entry points
        try:
            pkgutil.resolve_name(name)
        except (ImportError, AttributeError):
            yield name


@pytest.mark.parametrize("path", TOLD, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_and_names_exist(path: Path) -> None:
    text = path.read_text()
    assert [*dead_links(path, text), *unknown_names(text)] == []


def test_dead_links_and_unknown_names_are_found() -> None:
    page = (
        "# A title: of 2\n[a](#a-title-of-2) [b](#b) [c](docs/none.md) [d](docs/results.md#results) "
        "[e](SECURITY.md#e)\n`processes/law.py`, `dpm_scales/none.py`, `dpm_scales.rng.CounterRNG` dpm_scales.rng.RNG\n"
        "```python\n# no heading\nfrom dpm_scales.models import load_model, none\n```\n"
    )
    assert list(dead_links(ROOT / "README.md", page)) == ["#b", "docs/none.md#", "SECURITY.md#e"]
    assert list(unknown_names(page)) == ["dpm_scales/none.py", "dpm_scales.models.none", "dpm_scales.rng.RNG"]
