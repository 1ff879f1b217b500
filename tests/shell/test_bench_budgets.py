"""The trial of short trainings: batches, shifts and rates are those that rows name; the table has means of seeds."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import budget_tables, budgets, spectral_tables
from benchmarks.image_sets import IMAGE_SETS
from dpm_scales.training.module import DiffusionModule
from support.few_images import Few
from support.shell import small_model


def test_batches_hold_each_image_once_a_pass() -> None:
    images = torch.arange(10)[:, None]
    source = budgets.Batches(images, 3)
    numbers = torch.cat([source.take(size)[:, 0] for size in (3, 3, 8, 1, 5)])
    for start in (0, 10):
        assert sorted(numbers[start : start + 10].tolist()) == list(range(10))
    assert numbers[:10].tolist() != numbers[10:].tolist()


def test_labels_say_how_images_are_shifted() -> None:
    images = torch.zeros(200, 1, 7, 9, dtype=torch.uint8)
    images[:, :, 3, 4] = 200
    images[:, :, 0, 0] = 7
    moved, kinds = budgets.shifted(images)
    for image, kind in zip(moved[:, 0], kinds.tolist(), strict=True):
        dy, dx = budgets.SHIFTS[kind]
        assert image[3 - dy, 4 - dx] == 200
        corner_inside = dy <= 0 and dx <= 0
        assert int(image.sum()) == 200 + 7 * corner_inside
    assert budgets.SHIFTS[0] == (0, 0)
    assert len(set(kinds.tolist())) == len(budgets.SHIFTS)


def test_rate_rises_over_a_tenth_and_falls_to_zero() -> None:
    module = DiffusionModule(small_model(), warmup_steps="auto")

    def factor(step: int, passed: float) -> float:
        return module.rate(step, max_steps=-1, passed=passed)

    assert [factor(200, passed) for passed in (0.0, 0.5, 1.0)] == pytest.approx([1.0, 0.5, 0.0], abs=1e-12)
    assert factor(0, 0.0) == pytest.approx(1 / 101)
    assert factor(3, 0.05) == pytest.approx(0.5 * 0.5 * (1 + math.cos(0.05 * math.pi)))


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(IMAGE_SETS, "few", Few)
    monkeypatch.setattr(budgets, "SETS", ["few"])


TOY = ("--set", "few", "--seconds", "0.001", "--number", "3")


@pytest.mark.usefixtures("few")
def test_rows_run_once_and_give_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, page, kept = tmp_path / "out", tmp_path / "page.md", tmp_path / "kept" / "rows.csv"
    page.write_text(f"Before\n{budget_tables.START}\nold\n{budget_tables.END}\nAfter\n")
    names = ("adamw 64", "muon 16 to 128", "muon 32, shifts", "muon 32, logit_normal")
    budgets.main([*TOY, "--out", str(out), "--seeds", "0", "1", "--tricks", *names])
    rows = sorted(out.glob("*/*/seed*.json"))
    assert len(rows) == 2 * len(names)
    before = [row.stat().st_mtime_ns for row in rows]
    first = json.loads(rows[0].read_text())
    assert [entry["average"] for entry in first["samples"]] == list(budgets.ALL_AVERAGES)
    assert first["steps"] >= 1 and first["images"] == 64 * first["steps"]

    budgets.main([*TOY, "--out", str(out), "--seeds", "0", "1", "--tricks", *names])
    assert [row.stat().st_mtime_ns for row in rows] == before
    budgets.main([*TOY, "--out", str(out), "--tables", "--csv", str(kept), "--page", str(page)])
    text = page.read_text()
    assert text.startswith("Before\n") and text.endswith("After\n") and "old" not in text
    assert "adamw 64, last weights" in text and "| real images | 70 |" in text and "seeds 0, 1" in text
    with kept.open(newline="") as file:
        found = list(csv.DictReader(file))
    assert len(found) == 2 * (len(names) + len(budgets.ALL_AVERAGES) - 1)
    own = [float(row["fd"]) for row in found if row["trick"] == "muon 32, shifts"]
    assert f"| muon 32, shifts | {spectral_tables.spread(own)} (1) |" in text

    # rows of another machine are kept beside those of this one
    shown = budget_tables.table([{**row, "machine": "other"} for row in found[:1]] + found)
    assert shown.count("| | 0.001 s |") == 2


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--tricks", "more"), "unknown trick 'more'; allowed are adamw 64"),
        (("--seconds", "0"), "a budget of 0 seconds trains nothing"),
        (("--tables",), "--tables needs --csv FILE"),
        (("--page", "page.md"), "--page needs --csv FILE"),
        (("--tables", "--csv", "rows.csv"), "no finished rows"),
    ],
)
def test_mistakes_are_one_line(
    options: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        budgets.main([*TOY, "--out", str(tmp_path / "out"), *options])
    assert end.value.code == 2 and message in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.json"))
