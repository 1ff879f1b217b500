"""The measurements on a GPU, here at toy size on a CPU: each part runs, is kept, and has a limit; the tables."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import peers, speed_gpu, speed_tables
from benchmarks.image_sets import IMAGE_SETS
from benchmarks.peer_models import PEERS
from dpm_scales.training.module import DiffusionModule
from support.few_images import Few

TOY = ("--toy", "--device", "cpu")


def measured(out: Path, *names: str) -> dict[str, Any]:
    """Measure parts in this process."""
    for name in names:
        speed_gpu.main(["--out", str(out), *TOY, "--part", name])
    return {name: json.loads((out / f"{name}.json").read_text()) for name in names}


def test_parts_at_toy_size(tmp_path: Path) -> None:
    """All but the rates, which train networks."""
    found = measured(tmp_path, "ceilings", "share", "sampling", "blur", "osmosis")
    assert found["ceilings"].keys() >= {"float32", "bf16", "machine", "commit", "date"}
    assert all(value > 0 for way in ("float32", "bf16") for value in found["ceilings"][way].values())
    assert [row["process"] for row in found["share"]["rows"]] == list(speed_gpu.PROCESSES)
    assert len(found["sampling"]["rows"]) == 6
    assert all(50 < row["kernels"] < 500 for row in found["sampling"]["rows"])
    for row in found["blur"]["rows"]:
        seconds, (count, channels, height, width) = row["milliseconds"]["heat_blur"] / 1e3, row["shape"]
        pixels, ceilings = count * channels * height * width, found["ceilings"]["float32"]
        assert row["of_copy"] == pytest.approx(8 * pixels / seconds / 1e9 / ceilings["copy"])
        products = sum(2 * pixels * side for side in (height, width))
        assert row["of_matrix"] == pytest.approx(products / seconds / 1e9 / ceilings["matrix"])
    assert found["osmosis"]["images"] == 1
    text = speed_tables.page(found, {}, [])
    assert "| tiny | vp | DPM-Solver++(2M) | float32 | 1 |" in text
    assert text.count("| vp | 2 |") == 1 and "| (1, 1, 16, 8) |" in text and "of 1 images" in text


@pytest.mark.parametrize("way", ["float32", "bf16+compile+muon"])
def test_our_rate_is_that_of_the_last_steps_of_a_run(way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With AdamW, as the peers have Adam, or in one row with Muon."""
    if "compile" in way:  # which takes minutes on a CPU
        options = [option for option in speed_gpu.WAYS[way] if option != "compile=true"]
        monkeypatch.setitem(speed_gpu.WAYS, way, options)
    used: list[str] = []
    monkeypatch.setattr(
        DiffusionModule, "on_fit_end", lambda module: used.append(type(module.optimizers().optimizer).__name__)
    )
    (row,) = measured(tmp_path, f"rate dpm_scales {way}").values()
    assert row["images_per_second"] > 0 and row["batch"] == speed_gpu.TOY.batch and row["parameters"] > 1000
    assert row["way"] == way and used == ["Muon" if "muon" in way else "AdamW"]


@pytest.mark.slow
def test_quality_is_a_part_for_each_library_and_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each fits into one call; which the fastest peer is follows from the rates."""

    def start(command: list[str], environment: dict[str, str]) -> int:
        peers.main(command[3:])
        return 0

    monkeypatch.setattr(peers, "_start", start)
    monkeypatch.setitem(IMAGE_SETS, "digits", Few)
    monkeypatch.setattr(Few, "report", lambda _, images: {"fd": float(len(images))})
    monkeypatch.setattr(peers, "ceilings", lambda *_: {"matrix": 1.0, "convolution": 1.0, "copy": 1.0, "share": 0.5})
    (row,) = measured(tmp_path, "quality dpm_scales 180").values()
    assert (row["peer"], row["set"], row["number"]) == ("dpm_scales", "few", 8)
    assert {drawn["fd"] for drawn in row["samples"]} == {8}
    text = speed_tables.page({"quality dpm_scales 180": row}, {}, [])
    assert "few, 8 samples:" in text and "| dpm_scales | 0.001 |" in text and "| auto |" in text

    known, ours = speed_gpu.parts(), [f"quality dpm_scales {budget}" for budget in (60, 180, 480)]
    found = {name: part for name, part in known.items() if name.startswith("quality ")}
    assert set(ours) <= set(found) and all(part.least < part.limit <= 720 for part in found.values())
    assert speed_gpu.chosen_parts(["share", "quality"], tmp_path) == ["share", *ours]
    for peer, rate in {"azula": 5.0, "diffusers": 9.0, "dpm_scales": 11.0}.items():
        (tmp_path / f"rate {peer} bf16.json").write_text(json.dumps({"peer": peer, "images_per_second": rate}))
    both = [f"quality {peer} {budget}" for budget in (60, 180, 480) for peer in ("dpm_scales", "diffusers")]
    assert speed_gpu.chosen_parts(["quality"], tmp_path) == both


def test_the_rate_of_a_peer(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    (row,) = measured(tmp_path, "rate diffusers bf16").values()
    assert row["images_per_second"] > 0 and row["version"] and row["way"] == "bf16"


def test_parts_are_kept_and_have_a_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started: list[tuple[str, float]] = []

    def start(name: str, given: Any, seconds: float) -> str | None:
        started.append((name, seconds))
        if name == "share":
            return "not finished in 60 s"
        (tmp_path / f"{name}.json").write_text(json.dumps({"images": 3, "seconds": 2.0, "evolve_seconds": 1.0,
            "times": [1], "machine": "m", "commit": "c", "date": "d"}))  # fmt: skip
        return None

    monkeypatch.setattr(speed_gpu, "start_part", start)
    command = ["--out", str(tmp_path), *TOY, "--parts", "share", "osmosis"]
    speed_gpu.main([*command, "--minutes", "1.5"])
    assert [name for name, _ in started] == ["share", "osmosis"]
    assert started[0][1] == 60 and started[1][1] == pytest.approx(90, abs=10)
    page = (tmp_path / "speed.md").read_text()
    assert "- share: not finished in 60 s" in page and "of 3 images" in page
    assert json.loads((tmp_path / "speed.json").read_text())["missing"] == {"share": "not finished in 60 s"}
    speed_gpu.main(command)
    assert [name for name, _ in started] == ["share", "osmosis", "share"], "what is measured is kept"
    speed_gpu.main([*command, "--minutes", "0.01"])
    assert len(started) == 3 and "share: no time was left" in (tmp_path / "speed.md").read_text()


def test_a_part_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as end:
        measured(tmp_path, "blur")
    assert end.value.code == 2
    assert speed_gpu.start_part("ceilings", ["--out", str(tmp_path), *TOY], 0.001) == "not finished in 0 s"


def test_a_part_ends_at_its_limit_with_what_it_has_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive = tmp_path / "alive"
    script = tmp_path / "python"
    script.write_text(f"#!/bin/sh\n(while true; do echo x >> '{alive}'; sleep 0.05; done) &\nwait\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    assert speed_gpu.start_part("ceilings", ["--out", str(tmp_path)], 2) == "not finished in 2 s"
    size = alive.stat().st_size
    time.sleep(0.5)
    assert alive.stat().st_size == size > 0


def test_a_part_is_not_started_without_the_time_that_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[str] = []
    monkeypatch.setattr(speed_gpu, "start_part", lambda name, given, seconds: started.append(name))
    names = ["quality dpm_scales 480", "quality dpm_scales 60"]
    speed_gpu.main(["--out", str(tmp_path), "--device", "cpu", "--minutes", "8", "--parts", *names])
    assert started == names[1:] and "- quality dpm_scales 480: no time was left" in (tmp_path / "speed.md").read_text()


def test_rates_are_compared_with_the_best_peer() -> None:
    head = {"version": "1", "parameters": 35e6, "memory": 5, "batch": 512, "machine": "m", "commit": "c", "date": "d"}
    rates = {"dpm_scales": 5000.0, "lucidrains": 900.0, "diffusers": 2000.0}
    rows = {f"rate {name}": {"peer": name, "way": "bf16", "images_per_second": n, **head} for name, n in rates.items()}
    assert speed_gpu.fastest_peer(list(rows.values())) == "diffusers" and speed_gpu.fastest_peer([]) is None
    text = speed_tables.page(rows, {}, ["azula"])
    assert "| dpm_scales 1 | bf16 | 35.0 | 5000 | 2.50 | 5 |" in text and "Aim: 2 x the best peer, met." in text
    assert "not installed: azula" in text
    rates = {name: {**row, "images_per_second": 100.0} for name, row in rows.items()}
    assert "Aim: 2 x the best peer, missed." in speed_tables.page(rates, {}, [])
    assert set(PEERS) >= {"dpm_scales", "lucidrains", "diffusers", "torchcfm", "azula"}
