"""The benchmark of the optimal covariance: three kinds of samples a row, one value for all frequencies, a table."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import covariance
from benchmarks.image_sets import IMAGE_SETS
from dpm_scales.data import GivenImages, ImageDataModule
from dpm_scales.training.fit import fit_to_data
from support.few_images import Few
from support.shell import small_model


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(IMAGE_SETS, "few", Few)


TOY = ("--set", "few", "--number", "3", "--steps", "2", "3", "--seeds", "0")


@pytest.mark.parametrize("process", ["vp", "heat", "blurring"])
def test_mean_has_one_value_for_all_frequencies(process: str, tmp_path: Path) -> None:
    model = covariance.measure(small_model(f"process={process}"), Few(tmp_path), torch.device("cpu"))
    denoiser = model.denoiser
    table = denoiser.error_variance
    assert table is not None and table.num_images == 12
    t = torch.tensor([0.1, 0.45, 1.0], dtype=torch.float64)
    mu = torch.rand(5, 7, dtype=torch.float64)
    by_frequency = table(denoiser.process, denoiser.spectrum, t, mu)
    one = covariance.mean_of(table)(denoiser.process, denoiser.spectrum, t, mu)
    assert float(by_frequency.std((-2, -1)).min()) > 0
    for found, values in zip(one, by_frequency.numpy(), strict=True):
        torch.testing.assert_close(found, torch.full((1, 5, 7), values.mean(), dtype=torch.float64))


@pytest.mark.usefixtures("few")
def test_rows_run_once_and_give_a_table(tmp_path: Path) -> None:
    out, page, kept = tmp_path / "out", tmp_path / "page.md", tmp_path / "kept" / "rows.csv"
    page.write_text(f"Before\n{covariance.START}\nold\n{covariance.END}\nAfter\n")
    images = ImageDataModule(GivenImages(torch.from_numpy(Few(tmp_path).training_images())), batch_size=4)
    for name in ("vp", "heat"):
        fit_to_data(small_model(f"process={name}"), images).save(tmp_path / name)
    command = [*TOY, "--out", str(out), "--models", f"vp={tmp_path / 'vp'}", f"heat={tmp_path / 'heat'}"]
    covariance.main(command)
    rows = sorted(out.glob("few/*/seed0.json"))
    # ddim has no flow to follow where noise is constant
    assert len(rows) == 2 * 3 + 2 * 2
    assert not list(tmp_path.glob("*/covariance.safetensors"))
    before = [row.stat().st_mtime_ns for row in rows]
    covariance.main([*command, "--csv", str(kept), "--page", str(page)])
    assert [row.stat().st_mtime_ns for row in rows] == before
    text = page.read_text()
    assert text.startswith("Before\n") and text.endswith("After\n") and "old" not in text
    assert "| vp | ddim | by frequency | " in text and "that no model has seen: 70." in text
    with kept.open(newline="") as file:
        found = list(csv.DictReader(file))
    assert len(found) == 3 * len(rows)
    by_kind = {
        row["covariance"]: row["fd"]
        for row in found
        if (row["model"], row["sampler"], row["steps"]) == ("heat", "ancestral", "3")
    }
    assert len(set(by_kind.values())) == 3


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "--models: give trained models as NAME=RUN"),
        (("--models", "runs/vp"), "--models runs/vp: expected NAME=RUN"),
        (("--models", "vp=nowhere"), "nowhere"),
        (("--tables",), "no finished rows"),
    ],
)
def test_mistakes_are_one_line(options: tuple[str, ...], message: str, tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(SystemExit) as end:
        covariance.main([*TOY, "--out", str(tmp_path / "out"), *options])
    assert end.value.code == 2 and message in capsys.readouterr().err
