"""Models and runs that the first release wrote are loaded, sampled and resumed as it did.

`first_release/` holds two runs of its code on digits, one with a prior and one with a target that have other names
now; what it drew from them (`drawn/`), and how the first continued for three more steps (`metrics_9.csv`).
"""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dpm_scales.models import load_model
from dpm_scales.priors import OsmosisPrior
from dpm_scales.targets import NextScale
from support.shell import call, drawn, sample, settings, table

FIRST = Path(__file__).parent / "first_release"


@pytest.mark.parametrize("name", ["run", "finer"])
def test_models_draw_what_they_drew(name: str, tmp_path: Path) -> None:
    out = sample(FIRST / name, tmp_path / "out", "num_samples=4")
    assert sorted(drawn(out)) == sorted(path.name for path in (FIRST / name / "drawn").iterdir())
    for path in (FIRST / name / "drawn").iterdir():
        now, then = (np.asarray(Image.open(file)).astype(int) for file in (out / path.name, path))
        assert np.abs(now - then).max() <= 1


def test_classes_have_their_present_names() -> None:
    run, finer = load_model(FIRST / "run"), load_model(FIRST / "finer")
    assert isinstance(run.prior, OsmosisPrior) and run.recipe.parts["prior"]["_target_"].endswith(".OsmosisPrior")
    assert isinstance(finer.denoiser.target, NextScale)
    assert finer.recipe.parts["target"]["_target_"].endswith(".NextScale")


def test_a_run_resumes(tmp_path: Path) -> None:
    """The losses and the learning rate of three more steps are those of the first release."""
    run_dir = Path(shutil.copytree(FIRST / "run", tmp_path / "run"))
    outcome = call("train.py", f"run_dir={run_dir}", "trainer.max_steps=9", cwd=tmp_path)
    assert outcome.status == 0, outcome.err
    assert "OsmosisPrior" not in outcome.out  # a new name is no other option
    with (FIRST / "run" / "metrics_9.csv").open(newline="") as file:
        then = list(csv.DictReader(file))
    now = table(run_dir)
    assert [row["step"] for row in now] == [row["step"] for row in then]
    for name in ("lr-AdamW", "train/loss", "train/grad_norm", "val/loss"):
        values = [[float(row[name]) for row in rows if row[name]] for rows in (now, then)]
        assert values[0] == pytest.approx(values[1], rel=2e-5)
    assert settings(run_dir)["prior"]["_target_"].endswith(".OsmosisPrior")
