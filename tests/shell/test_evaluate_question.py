"""An evaluation in Python: the question is checked before anything is measured, and its answer holds the figures."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from dpm_scales.commands.evaluate import plan
from dpm_scales.commands.question import Answer, measure
from dpm_scales.errors import UserError
from support.evaluate_helpers import Means, noise_images, small_features
from support.shell import CONFIGS

pytestmark = pytest.mark.filterwarnings("ignore:.*(covariance is singular|px are enlarged)")


def config(folder: Path, *overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose(
            "evaluate", [f"samples={folder / 'fake'}", f"reference={folder / 'real'}", "cache=false", *overrides]
        )


def test_the_answer_is_what_is_saved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    real, fake = (
        noise_images(tmp_path / name, number, seed)
        for seed, (name, number) in enumerate({"real": 30, "fake": 20}.items())
    )
    network = Means()
    with small_features(network):
        question = plan(config(tmp_path, f"yardstick={real}", f"out={tmp_path / 'out'}"))
    assert network.calls == 0 and not any((tmp_path / "out").iterdir())  # nothing is measured or written yet
    assert (len(question.real), len(question.fake)) == (30, 20) and question.yardstick is not None
    answer = measure(question)
    assert isinstance(answer, Answer) and answer.bits is None
    assert answer.bounds is not None and answer.bounds["precision"].value == pytest.approx(
        1
    )  # of the reference by itself
    assert capsys.readouterr().out == "" and not any((tmp_path / "out").iterdir())
    saved = json.loads(answer.save(tmp_path / "out").read_text())
    assert {name: value["value"] for name, value in saved["figures"].items()} == {
        name: figure.value for name, figure in answer.figures.items()
    }
    answer.show()
    shown = capsys.readouterr().out
    assert f"20 samples by 30 real images, features {network.name}" in shown and "FD-means" in shown
    # an independent value: the mean grey of the quarters, from the files, has the same distance of means
    statistics = [pictures.batches(50) for pictures in (question.real, question.fake)]
    means = [np.stack([network(batch).numpy() for batch in batches])[0].mean(0) for batches in statistics]
    assert answer.figures["FD-means"].value >= float(((means[0] - means[1]) ** 2).sum()) > 0
    assert fake.is_dir()


def test_a_wrong_question_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    noise_images(tmp_path / "real", 3, 0)
    noise_images(tmp_path / "fake", 3, 1)
    network = Means()
    with small_features(network), pytest.raises(UserError, match="manifolds needs 6 images or more"):
        plan(config(tmp_path))
    assert network.calls == 0
