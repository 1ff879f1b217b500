"""The first pages as a newcomer runs them: which blocks, Ctrl-C, the first failure. Their commands: test_readme."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path

import pytest

from support.shell import ROOT
from tools import newcomer
from tools.newcomer import Step, steps_of

PAGE = """# Page

Text.

```sh
echo one > made.txt
```

    output

## Stop (1 minute)

Stop it with Ctrl-C:

```sh
test -f stopped || { touch stopped; sleep 60; }
echo two >> made.txt
```

```python
from pathlib import Path
Path("made.txt").write_text(Path("made.txt").read_text() + "three\\n")
```
"""


def repository(folder: Path, page: str) -> Path:
    (folder / "docs").mkdir(parents=True)
    (folder / "README.md").write_text("# Name\n\n```sh\ntrue  # first\ntrue\n```\n\n```sh\nfalse\n```\n")
    (folder / "docs/tutorial.md").write_text(page)
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c", "-C", str(folder)]
    for words in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "-m", "a"]):
        subprocess.run([*git, *words], check=True)
    return folder


def test_blocks_of_a_page() -> None:
    steps = steps_of(PAGE)
    assert [(step.title, step.language, step.interrupted) for step in steps] == [
        ("Page", "sh", False),
        ("Stop (1 minute)", "sh", True),
        ("Stop (1 minute)", "python", False),
    ]
    assert steps[0].text == "echo one > made.txt\n"


def test_steps_run_in_order_and_the_first_failure_ends_a_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(newcomer, "PATIENCE_S", 0.3)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as for a process in the background
    test = 'test "$(cat made.txt)" = "$(printf \'one\\ntwo\\nthree\')"'
    check = "".join(f"\n```sh\n{command}\n```\n" for command in (test, "exit 3", "true"))
    source = repository(tmp_path / "source", PAGE + check)
    try:
        assert newcomer.main(["--source", str(source), "--out", str(tmp_path / "table.md")]) == 1
    finally:
        signal.signal(signal.SIGINT, before)
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert [line.split("|")[-2].strip() for line in lines[2:]] == ["0", "0", "0", "0", "0", "0", "3", ""]
    assert lines[2].startswith("| readme | Name | `true` |")
    assert lines[5].startswith("| tutorial | Stop (1 minute) | `test -f stopped || { touch stopped; sleep 60; }…` |")


def test_a_block_that_ctrl_c_does_not_end_fails(tmp_path: Path) -> None:
    assert newcomer.run(Step("", "sh", "exit 0\n", interrupted=True), tmp_path)[1] == 1


def test_the_tutorial_has_what_the_tool_looks_for() -> None:
    steps = steps_of((ROOT / "docs/tutorial.md").read_text())
    assert [step.interrupted for step in steps].count(True) == 1
    assert all(" minute" in step.title or "seconds" in step.title for step in steps) and steps[-1].language == "python"
    assert [
        step.text.split()[:2] for step in newcomer.one_command_each(steps_of((ROOT / "README.md").read_text())[0])
    ] == [
        ["make", "demo"],
        ["make", "test"],
    ]
