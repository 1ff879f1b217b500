"""The commands of README.md run, in short form; each one that does not says what it needs, or where else it is run."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from PIL import Image

import dpm_scales as ds
from benchmarks import front_page
from dpm_scales.entry.start import console
from dpm_scales.errors import UserError
from support.shell import ROOT, SMALL, call, photos

README = (ROOT / "README.md").read_text()

#: first words of commands that other tests run, and the file that does
ELSEWHERE = {
    "make": ".github/workflows/ci.yml",
    "pip": ".github/workflows/ci.yml",
    "python train.py -m process=vp,ve hydra/launcher=joblib": "tests/shell/test_sweeps.py",
    "python evolve.py task=audit": "tests/shell/test_audit_command.py",
    "python evolve.py task=match": "tests/shell/test_matching.py",
}
#: options that make a command short, or replace those of the same name
SHORT = {
    "train.py": (*SMALL, "trainer.max_steps=2", "trainer.val_check_interval=1", "samples.num_images=1"),
    "sample.py": ("num_samples=2", "steps=2", "device=cpu"),
    "evaluate.py": (
        *("num_samples=4", "num_reference=8", "'measures=[frechet]'", "cache=false", "device=cpu", "steps=2"),
        *("likelihood_draws=1", "yardstick_split=val"),
    ),
    "evolve.py": ("device=cpu",),
}
MARK = re.compile(r"#.*\bneeds\b")


def readme_commands() -> list[str]:
    """Return the lines of the blocks of shell commands."""
    blocks = re.findall(r"^```sh\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.strip()]


def words_of(command: str) -> list[str]:
    return shlex.split(command, comments=True)


def shortened(words: list[str], options: tuple[str, ...]) -> list[str]:
    """Return the words of a command with its options replaced by `options` of the same name, which are added."""
    plain = [shlex.split(option)[0] for option in options]
    names = {option.partition("=")[0] for option in plain}
    return [*(word for word in words if word.partition("=")[0] not in names), *plain]


def draw_inputs(words: list[str], folder: Path) -> None:
    """Write photo.png and mask.png of the size that the command takes."""
    model = "task=inpaint" in words
    size = (8, 8) if model else (16, 12)
    Image.new("L" if model else "RGB", size, 90 if model else (90, 120, 60)).save(folder / "photo.png")
    mask = np.zeros(size[::-1], dtype=np.uint8)
    mask[2:5, 2:5] = 255
    Image.fromarray(mask).save(folder / "mask.png")


def short_arguments(words: list[str], folder: Path) -> list[str]:
    """Return the arguments of a command ``python SCRIPT ...`` in short form."""
    if "run_dir=runs/default" in words:  # resumes: one step more, and nothing else that differs
        return ["run_dir=runs/default", "trainer.max_steps=3"]
    left_out = {"evaluate.py": "yardstick_" if "likelihood=vlb" in words else "likelihood_"}.get(words[1], "-")
    options = tuple(option for option in SHORT[words[1]] if not option.startswith(left_out))
    replaced = {
        "process=vp,heat,blurring": "process=vp,heat",
        "seed=0,1": "seed=0",
        "data=photos": f"data={folder / 'photos'}",
    }
    arguments = [replaced.get(word, word) for word in shortened(words[2:], options)]
    return [*arguments, "run_dir=runs/default"] if words[1:] == ["train.py"] else arguments


@pytest.mark.slow
def test_commands_run_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    photos(tmp_path / "photos", 3, (12, 20))
    ran = 0
    for command in readme_commands():
        known = next((start for start in ELSEWHERE if command.startswith(start)), None)
        if known is not None:
            assert (ROOT / ELSEWHERE[known]).is_file()
        if known is not None or MARK.search(command):
            continue
        words = words_of(command)
        ran += 1
        if words[0] == "dpm-scales":
            with mock.patch.object(sys, "argv", words):
                console()
            continue
        assert words[0] == "python" and words[1] in SHORT, command
        draw_inputs(words, tmp_path)
        done = call(words[1], *short_arguments(words, tmp_path), cwd=tmp_path)
        assert done.status == 0, f"{command}\n{done.err}"
    assert ran == 13
    made = ("runs/default/model/model.safetensors", "samples/default/000001.png", "samples/trajectory/trajectory.png")
    assert all((tmp_path / name).is_file() for name in made)
    assert {path.name for path in (tmp_path / "edited").iterdir()} >= {"result.png", "comparison.png"}


def test_unmarked_commands_are_not_passed_over() -> None:
    """Every command is run by the test above, by one that it names, or says what it needs."""
    marked = [command for command in readme_commands() if MARK.search(command)]
    assert [words_of(command)[:2] for command in marked] == [
        ["python", "-m"],
        ["python", "train.py"],
        ["python", "train.py"],
        ["python", "train.py"],
    ]
    kinds = {words_of(command)[0] for command in readme_commands()}
    assert kinds == {"make", "pip", "python", "dpm-scales"}


def test_the_lines_of_python_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    assert block.count("\n") <= 9 and "steps=1000" in block
    space: dict[str, object] = {}
    exec(block.replace("steps=1000", "steps=1").replace("sample(16, seed=0)", "sample(2, seed=0, steps=2)"), space)
    assert (tmp_path / "digits.png").is_file() and isinstance(space["model"], ds.Model)


def test_it_fits_and_keeps_its_promises() -> None:
    assert len(README.splitlines()) < 250
    assert README.count("![") <= 2 and "**none**" in README  # what is missing here is said


def test_first_rows_of_the_leaderboard(tmp_path: Path) -> None:
    table = (
        "FD, lower is better.\n\n| process | seeds | input | 5 | commit, date, machine |\n|---|---|---|---|---|\n"
        "| vp paired | 1 | scalar | 2 | abc, 2026-01-02 |\n"
        "| warm b=1 | 1 | wiener | 3 | abc, 2026-01-01 |\n| warm b=2 | 1 | wiener | 4 | abc, 2026-01-01 |\n"
        "| vp | 1 | scalar | 5 | abc, 2026-01-02 |\n| heat | 1 | wiener | 9 | abc, 2026-01-01 |\n"
        "| real images, n = 8 | | | 1 | |\n"
    )
    (tmp_path / "mnist_9_images.md").write_text(table)
    (tmp_path / "rows.csv").write_text(
        "row,set,budget,machine,date\nvp paired,mnist,9 images,unseen,2026-01-05\n"
        "warm b=1,mnist,9 images,one core,2026-01-01\nvp,mnist,9 images,one core,2026-01-02\n"
    )
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- leaderboard -->\nold\n<!-- end of leaderboard -->\nafter\n")
    options = ["--rows", "2", "--page", str(page), "--folder", str(tmp_path), "--table"]
    front_page.main([*options, "mnist_9_images"])
    lines = page.read_text().splitlines()
    assert lines[0] == "before" and lines[-1] == "after" and "old" not in lines
    about = "MNIST, 9 images for each row (one core; 2026-01-01 to 2026-01-02)."  # of the rows that are shown
    assert f"{about} FD, lower is better; columns are evaluations." in lines
    assert [line for line in lines if line.startswith("|")] == [
        "| process | input | 5 |",
        "|---|---|---|",
        "| warm b=1 | wiener | 3 |",
        "| vp | scalar | 5 |",
        "| real images, n = 8 |  | 1 |",
    ]
    with pytest.raises(UserError, match="no table none in .*; there are mnist_9_images"):
        front_page.main([*options, "none"])
    page.write_text("no marks")
    with pytest.raises(UserError, match="page.md needs a line <!-- leaderboard -->"):
        front_page.main([*options, "mnist_9_images"])


def test_the_readme_has_rows_with_machine_and_date() -> None:
    shown = README.partition("<!-- leaderboard -->")[2].partition("<!-- end of leaderboard -->")[0]
    day = r"20\d\d-\d\d-\d\d"
    assert re.search(rf"\(.+; {day}( to {day})?\)", shown) and shown.count("\n| ") >= 6
