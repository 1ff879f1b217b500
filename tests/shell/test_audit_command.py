"""The audit as a command: `audit.md` and `audit.json` of the paper's processes and of a chosen one, and mistakes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dpm_scales.audit import audit
from dpm_scales.audit.findings import Verdict
from dpm_scales.audit.report import write_audit
from dpm_scales.images import load_image
from dpm_scales.processes import VE, VP, Homogeneous
from dpm_scales.schedules import ConstantBeta
from support.shell import ROOT, Outcome, call, photos


def evolve(out: Path, *options: str) -> Outcome:
    return call("evolve.py", f"out={out}", *options, cwd=out.parent)


def tables(page: str) -> dict[str, list[list[str]]]:
    """Cells of each table, below the title it stands under."""
    found: dict[str, list[list[str]]] = {}
    title = ""
    for line in page.splitlines():
        if line.startswith("#"):
            title = line.lstrip("# ")
        elif line.startswith("|") and "---" not in line:
            found.setdefault(title, []).append([cell.strip() for cell in line.strip("|").split(" | ")])
    return found


def read(out: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((out / "audit.json").read_text(), parse_constant=pytest.fail)
    return values


def test_two_processes(tmp_path: Path) -> None:
    without = [f"processes.{name}=null" for name in ("heat", "homogeneous", "osmosis")]
    outcome = evolve(tmp_path / "out", "task=audit", *without)
    assert outcome.status == 0, outcome.err
    values = read(tmp_path / "out")
    assert list(values["processes"]) == ["vp", "blurring"] and values["seed"] == 0
    assert "blurring: " in outcome.out and "audit of 2 processes" in outcome.out
    page = tables((tmp_path / "out" / "audit.md").read_text())
    assert page["Forward"][0] == page["Reverse"][0] == ["property", "vp", "blurring"]
    for process, column in (("vp", 1), ("blurring", 2)):
        for direction in ("forward", "reverse"):
            rows = [row for row in values["processes"][process] if row["direction"] == direction]
            details = page[f"{process}, {direction}"][1:]
            assert [row["name"] for row in rows] == [cells[0] for cells in details]
            assert [row["verdict"] for row in rows] == [cells[2] for cells in details]
            overview = [cells[column].strip("*") for cells in page[direction.capitalize()][1:]]
            assert overview == ["–" if row["verdict"] == "not applicable" else row["verdict"] for row in rows]
    found = {(r["direction"], r["name"]): r for r in values["processes"]["blurring"]}
    grey = found["forward", "average grey value"]
    assert grey["verdict"] == "in expectation" and grey["std_error"] == pytest.approx(
        0.1 / 54**0.5 / 1000**0.5, rel=0.1
    )
    assert len(page["Corrections"]) == 1 + len(values["corrections"]) == 10
    assert page["Corrections"][1][-3:-1] == ["7.88", "0.7962"]
    (first, *_) = values["corrections"]
    assert abs(first["measured"] - first["true"]) < 5 * first["std_error"]


@pytest.mark.slow
def test_a_chosen_process_with_a_schedule_of_the_users(tmp_path: Path) -> None:
    outcome = evolve(tmp_path / "out", "audit=true", "process=blurring", "process.noise.logsnr_max=8")
    assert outcome.status == 0, outcome.err
    values = read(tmp_path / "out")
    assert list(values["processes"]) == ["blurring"]
    start = next(row for row in values["processes"]["blurring"] if row["name"] == "initial state")
    assert start["verdict"] == "exactly" and start["measured"] < 1e-12  # however early the schedule ends
    before = (tmp_path / "out" / "audit.json").read_bytes()
    assert evolve(tmp_path / "out", "task=audit", "process=blurring", "process.noise.logsnr_max=8").status == 0
    assert (tmp_path / "out" / "audit.json").read_bytes() == before


def test_images_of_a_folder(tmp_path: Path) -> None:
    folder = photos(tmp_path / "photos", 2)
    outcome = evolve(tmp_path / "out", "task=audit", "process=vp", f"data={folder}", "seed=4")
    assert outcome.status == 0, outcome.err
    values = read(tmp_path / "out")
    process, image = VP(), load_image(folder / "000.png")[None]
    assert values["seed"] == 4
    wanted = {(row.direction, row.name): row.measured for row in audit(process, image, seed=4)}
    for row in values["processes"]["vp"]:
        assert row["measured"] == pytest.approx(wanted[row["direction"], row["name"]]) or row["measured"] is None
    other = {(row.direction, row.name): row.measured for row in audit(process, 255 - image // 2, seed=4)}
    assert other["reverse", "initial state"] != pytest.approx(wanted["reverse", "initial state"])


def test_infinite_and_missing_figures_are_valid_json(tmp_path: Path) -> None:
    write_audit({"plain": Homogeneous(4)}, torch.full((1, 3, 8, 8), 77, dtype=torch.uint8), tmp_path)
    rows = {row["name"]: row for row in read(tmp_path)["processes"]["plain"] if row["direction"] == "reverse"}
    assert rows["steady state"]["measured"] is None
    assert rows["entropy of the images"]["verdict"] == "violated"


def test_the_page_agrees_with_the_library(tmp_path: Path) -> None:
    images = torch.randint(0, 256, (2, 3, 10, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    processes = {"a": VP(6, ConstantBeta(0.3)), "b": VE(5)}
    write_audit(processes, images, tmp_path, seed=2)
    for name, process in processes.items():
        own = audit(process, images, seed=2)
        assert [row["verdict"] for row in read(tmp_path)["processes"][name]] == [row.verdict for row in own]
        assert any(row.verdict is Verdict.CORRECTED for row in own)


@pytest.mark.slow
def test_the_documented_tables_are_those_of_the_command(tmp_path: Path) -> None:
    outcome = evolve(tmp_path / "out", "task=audit")
    assert outcome.status == 0, outcome.err
    page, documented = (tables(p.read_text()) for p in (tmp_path / "out" / "audit.md", ROOT / "docs" / "audit.md"))
    for title in ("Forward", "Reverse"):
        assert documented[title] == page[title]
    assert [cells[:6] for cells in documented["Corrections"]] == [cells[:6] for cells in page["Corrections"]]


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["task=audit", "process=bluring"], "did you mean 'blurring'"),
        (["task=audit", "process=vp", "process.noise.logsnr_max=-12"], "logsnr_min=-10 must be below logsnr_max=-12"),
        (["task=audit", "seed=-1"], "seed must be a whole number >= 0"),
        (["process=vp"], "data=DIR"),
    ],
)
def test_mistakes_end_with_one_line(tmp_path: Path, options: list[str], line: str) -> None:
    outcome = evolve(tmp_path / "out", *options)
    assert outcome.status == 2 and line in outcome.err
    assert len(outcome.err.strip().splitlines()) == 1 and not (tmp_path / "out" / "audit.md").exists()
