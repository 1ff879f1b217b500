"""The comparison with other libraries: each trains and draws, rows run once, and the page has the table of the CSV."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import peer_tables, peers
from benchmarks.image_sets import IMAGE_SETS
from benchmarks.peer_models import PEERS
from benchmarks.peer_ours import Ours
from dpm_scales.errors import UserError
from dpm_scales.models.io import load_model
from dpm_scales.networks import UNet
from dpm_scales.schedules import Rectified
from dpm_scales.tables import csv_text
from dpm_scales.targets import Flow
from dpm_scales.training.module import DiffusionModule
from support.few_images import Few


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Run rows in this process; return a folder for them, whose ceilings are known."""

    def start(command: list[str], environment: dict[str, str]) -> int:
        peers.main(command[3:])
        return 0

    monkeypatch.setattr(peers, "_start", start)
    monkeypatch.setitem(IMAGE_SETS, "few", Few)
    out = tmp_path / "out"
    out.mkdir()
    rates = {"matrix": 100.0, "convolution": 50.0, "copy": 9.0, "share": 0.5}
    (out / "ceilings.json").write_text(json.dumps(rates))
    return out


TOY = ("--set", "few", "--small", "--seconds", "0.001", "--number", "3", "--batch-size", "4", "--out")


@pytest.mark.parametrize("peer", list(PEERS))
def test_each_library_trains_and_draws(peer: str, here: Path) -> None:
    if peer != "dpm_scales":
        pytest.importorskip(PEERS[peer].package.replace("-", "_"), reason="comes with the bench extra")
    peers.main([*TOY, str(here), "--peers", peer])
    row = json.loads((here / peer / "0.001/seed0.json").read_text())
    assert row["steps"] == 1 and row["images"] == 4 and row["batch"] == 4
    assert row["parameters"] > 1000 and row["multiply_adds"] > 0.01 and row["memory"] > 50
    assert 0 < row["start"] < row["spent"]
    assert all(0 <= entry["fd"] <= 255 and entry["seconds"] >= 0 for entry in row["samples"])
    assert row["samples"][-1]["sampler"] == ("auto" if peer == "dpm_scales" else PEERS[peer].sampler)
    assert row["commit"] and row["date"] and row["machine"] and row["version"][0].isdigit()
    assert {path.suffix for path in (here / peer / "0.001").iterdir()} == {".json", ".lock"}


def test_ours_trains_colour_images_by_the_recipe_for_photos(tmp_path: Path) -> None:
    ours = Ours(torch.randint(256, (8, 3, 8, 8), dtype=torch.uint8), 4, 0, tmp_path)
    ours.run("run", 1)
    model = load_model(tmp_path / "run")
    assert isinstance(model.denoiser.target, Flow) and isinstance(model.denoiser.process.noise, Rectified)
    network = ours.network
    assert isinstance(network, UNet) and network.patch_size == 1 and network.conv_in.out_channels == 16
    samplers = ours.samplers()
    assert list(samplers) == ["DPM-Solver++(2M), 10", "DPM-Solver++(2M), 20"]
    assert all(draw(2).shape == (2, 3, 8, 8) for draw in samplers.values())


@pytest.mark.parametrize(("budget", "steps"), [(12.25, 10), (3.0, 1), (-2.0, 1)])
def test_ours_is_one_run_that_ends_by_the_clock_of_its_budget(
    budget: float, steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here 2.5 s pass before the first step, and each step takes a second; 0.5 s are left for what comes after."""
    clock, rates = [0.0], list[float]()
    fit_start, step = DiffusionModule.on_fit_start, DiffusionModule.training_step

    def prepared(module: DiffusionModule) -> None:
        fit_start(module)
        clock[0] += 2.5

    def timed(module: DiffusionModule, *given: Any) -> Any:
        clock[0] += 1.0
        rates.append(module.optimizers().param_groups[0]["lr"])  # type: ignore[union-attr]
        return step(module, *given)

    monkeypatch.setattr(DiffusionModule, "on_fit_start", prepared)
    monkeypatch.setattr(DiffusionModule, "training_step", timed)
    ours = Ours(torch.randint(256, (12, 1, 8, 8), dtype=torch.uint8), 4, 0, tmp_path, small=True)
    ours.train(lambda: budget - clock[0])
    assert ours.steps == steps and clock[0] == 2.5 + steps
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["run"]
    if steps > 1:  # of 13 s, 2.5 have passed, 0.75 are more than the budget, and 0.5 are kept
        assert rates[-1] == pytest.approx(3e-3 * 0.5 * (1 + math.cos(math.pi * (2.5 + 0.75 + 0.5 + steps - 1) / 13)))


def test_rows_run_once_and_the_page_has_the_table(here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def train_row(peer: Any, settings: dict[str, Any], out: Path) -> dict[str, Any]:
        name = next(name for name, kind in PEERS.items() if kind is peer)
        made.append(f"{name} {settings['seed']}")
        torch.save(torch.full((3, 1, 8, 8), 90 if name == "azula" else 20, dtype=torch.uint8), out.with_name("x.pt"))
        head = {"version": "1.2", "parameters": 1_400_000, "multiply_adds": 12.3, "steps": 5, "images": 20}
        sampled = {"sampler": "some", "seconds": 1.5, "file": "x.pt"}
        return head | {"start": 2.0, "spent": 4.0, "memory": 300, "samples": [sampled]}

    monkeypatch.setattr(peers, "train_row", train_row)
    page, table = tmp_path / "page.md", tmp_path / "peers.csv"
    page.write_text(f"# Speed\n\n{peer_tables.START}\n{peer_tables.END}\n\nAfter.\n")
    arguments = [*TOY, str(here), "--peers", "azula", "torchcfm", "--csv", str(table), "--page", str(page)]
    peers.main([*arguments, "--seeds", "0"])
    assert made == ["azula 0", "torchcfm 0"]
    peers.main([*arguments, "--seeds", "0", "1"])
    assert made == ["azula 0", "torchcfm 0", "azula 1", "torchcfm 1"]

    lines = list(csv.DictReader(io.StringIO(table.read_text())))
    assert len(lines) == 4 and {line["ceiling_matrix"] for line in lines} == {"100.0"}
    text = page.read_text()
    rows = [line for line in text.splitlines() if line.startswith("| 0.001 ")]
    assert [row.split(" | ")[1] for row in rows] == ["torchcfm 1.2", "azula 1.2"]  # the best first
    assert "| 1.40 | 12 | 2.0 | 10 | 300 | some | 500 | 20.0 ± 0.0 |" in rows[0]
    assert "| | real images | | | | | | | | 70 | |" in text and "100 GFLOP/s" in text
    assert text.startswith("# Speed\n") and text.endswith("\nAfter.\n")

    # rows of another machine stay beside the new ones, and those of this one are replaced
    other = [{**line, "machine": "another"} for line in lines[:1]]
    table.write_text(csv_text(list(lines[0]), [*lines, *other]))
    peers.main([*arguments, "--tables"])
    assert len(list(csv.DictReader(io.StringIO(table.read_text())))) == 5
    assert page.read_text().count("| budget s |") == 2


def test_ceilings_are_rates_of_this_machine() -> None:
    found = peers.ceilings(1, torch.device("cpu"), size=8, turns=1)
    assert set(found) == {"matrix", "convolution", "copy", "share"}
    assert all(value > 0 for value in found.values())


def test_mistakes_are_one_line(here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, words in (
        ([*TOY, str(here), "--seconds", "0"], "--seconds: give budgets above 0"),
        (["--out", str(tmp_path / "empty"), "--tables"], "no finished rows"),
    ):
        with pytest.raises(SystemExit) as end:
            peers.main(arguments)
        assert end.value.code == 2 and words in capsys.readouterr().err
    (tmp_path / "page.md").write_text("no place\n")
    row = {"set": "few", "peer": "azula", "budget": 1, "seed": 0, "number": 3, "samples": []}
    file = here / "azula/1/seed0.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(row))
    with pytest.raises(UserError, match="no finished rows"):
        peer_tables.write_page(here, tmp_path / "peers.csv", tmp_path / "page.md")
