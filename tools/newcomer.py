"""Do what the first page and the tutorial say, in a fresh clone, and time each step.

    python -m tools.newcomer                       # README's two commands, then the tutorial: half an hour
    python -m tools.newcomer --pages tutorial      # the tutorial alone
    python -m tools.newcomer --source https://…    # another repository than this one

A page's steps are its blocks of shell commands and of Python, in order; README's are the commands of its first block.
Where the text in front of a block says to press Ctrl-C, the block is interrupted after a few seconds and then repeated.
The steps run in one environment, made by the page's own commands. A table of seconds beside what the headings promise
is printed and written to newcomer.md; the first command that fails ends its page, and the status is 1.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = {"readme": "README.md", "tutorial": "docs/tutorial.md"}
PATIENCE_S = 8.0
"""Seconds until Ctrl-C is pressed."""
INTERRUPTED = 130


@dataclass(frozen=True)
class Step:
    """A block of commands.

    Attributes:
        title: the heading above.
        language: sh or python.
        text: content of the block.
        interrupted: whether the page says to press Ctrl-C.
    """

    title: str
    language: str
    text: str
    interrupted: bool = False


def steps_of(page: str) -> list[Step]:
    """Return the blocks of a page in Markdown that a reader is to run."""
    steps, title, before = [], "", ""
    for part in re.split(r"^(#+ [^\n]*\n|```\w+\n.*?^```\n)", page, flags=re.MULTILINE | re.DOTALL):
        block = re.fullmatch(r"```(sh|python)\n(.*?)```\n", part, re.DOTALL)
        if part.startswith("#"):
            title = part.strip("# \n")
        elif block:
            steps.append(Step(title, block[1], block[2], "Ctrl-C" in before))
        before = part
    return steps


def run(step: Step, folder: Path) -> tuple[float, int]:
    """Run a step in `folder`, in its environment once there is one; return seconds and status."""
    activate = ". .venv/bin/activate\n" if (folder / ".venv/bin/activate").is_file() else ""
    python = "python" if activate else shlex.quote(sys.executable)  # machines may have python3 alone
    command = step.text if step.language == "sh" else f"{python} - <<'EOF'\n{step.text}EOF\n"
    lines = ["bash", "-ec", activate + command]
    start = time.monotonic()
    if step.interrupted:
        # works also if this tool was started in the background, where Ctrl-C is ignored
        with subprocess.Popen(lines, cwd=folder, start_new_session=True, preexec_fn=_heed_ctrl_c) as started:
            try:
                started.wait(PATIENCE_S)
            except subprocess.TimeoutExpired:
                os.killpg(started.pid, signal.SIGINT)
            status = started.wait()
        if status not in (INTERRUPTED, -signal.SIGINT):
            return time.monotonic() - start, status or 1
    status = subprocess.run(lines, cwd=folder, check=False).returncode
    return time.monotonic() - start, status


def _heed_ctrl_c() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def table(rows: Sequence[tuple[str, Step, float, int]]) -> str:
    """Return the seconds of each step as a table in Markdown."""
    lines = ["| page | step | commands | seconds | status |", "|---|---|---|---|---|"]
    for page, step, seconds, status in rows:
        first = next(line for line in step.text.splitlines() if line.strip()).split("  #")[0].strip()
        more = step.text.count("\n") - 1
        shown = f"`{first[:60]}{'…' if len(first) > 60 or more > 0 else ''}`"
        lines.append(f"| {page} | {step.title} | {shown} | {seconds:.0f} | {status} |")
    lines.append(f"| | | all | {sum(seconds for *_, seconds, _ in rows):.0f} | |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Do what the first pages say in a fresh clone, and time it.")
    parser.add_argument("--source", default=str(ROOT), help="repository to clone; this one unless given")
    parser.add_argument("--pages", nargs="+", choices=PAGES, default=list(PAGES))
    parser.add_argument("--out", type=Path, default=Path("newcomer.md"), help="where the table is written")
    options = parser.parse_args(arguments)
    rows: list[tuple[str, Step, float, int]] = []
    with tempfile.TemporaryDirectory(prefix="newcomer-") as name:
        folder = Path(name) / "dpm_scales"
        subprocess.run(["git", "clone", "--quiet", options.source, folder], check=True)
        for page in options.pages:
            steps = steps_of((folder / PAGES[page]).read_text())
            for step in one_command_each(steps[0]) if page == "readme" else steps:
                print(f"--- {page}, {step.title}\n{step.text}", flush=True)
                seconds, status = run(step, folder)
                rows.append((page, step, seconds, status))
                if status:
                    break
    text = table(rows)
    options.out.write_text(text)
    print(text)
    return int(any(status for *_, status in rows))


def one_command_each(step: Step) -> list[Step]:
    """Return a step for each line of a block."""
    return [Step(step.title, step.language, line + "\n") for line in step.text.splitlines() if line.strip()]


if __name__ == "__main__":
    sys.exit(main())
