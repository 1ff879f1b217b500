"""Metrics and feature networks from a package outside of the repository: evaluated, cached, shared, monitored."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dpm_scales.errors import UserError
from dpm_scales.evaluation.choices import choose_features, choose_metrics
from dpm_scales.evaluation.generated import ModelSamples, sample_features
from dpm_scales.evaluation.reference_cache import reference_key
from dpm_scales.metrics import compare, frechet_distance
from dpm_scales.metrics.figures import gather_all
from support.evaluate_helpers import noise_images, on_ranks
from support.own_package import command, forget, imported, installed
from support.shell import FAST, SMALL, Outcome, call, column, small_model

pytestmark = pytest.mark.filterwarnings("ignore:.*(covariance is singular|px are enlarged)")

COLOURS = "features={_target_: mynet.features.Colours, cells: 2}"
OWN = "measures=[frechet,{_target_: mynet.metrics.MeanShift},{_target_: mynet.metrics.Sharpness}]"
EVALUATION = ("evaluation.every_n_steps=2", "evaluation.num_samples=9", "evaluation.num_reference=20")


@pytest.fixture(scope="module", autouse=True)
def package(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with installed(tmp_path_factory.mktemp("elsewhere")) as folder:
        yield folder


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "dpm_scales" / "references"


@pytest.fixture
def place(tmp_path: Path) -> Path:
    noise_images(tmp_path / "real", 30, 0, (16, 24))
    noise_images(tmp_path / "fake", 20, 1, (16, 24), level=20)
    return tmp_path


def evaluate(place: Path, *options: str) -> Outcome:
    return call("evaluate.py", "samples=fake", "reference=real", "out=out", *options, cwd=place)


def result(place: Path, *options: str) -> dict[str, Any]:
    outcome = evaluate(place, *options)
    assert outcome.status == 0, outcome.err
    values: dict[str, Any] = json.loads((place / "out" / "evaluation.json").read_text())
    return values


def grey(folder: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))]).astype(float)


def sharpness(images: np.ndarray) -> float:
    across, down = (np.diff(images / 255, axis=axis) for axis in (2, 1))
    return float(((across**2).mean((1, 2)) + (down**2).mean((1, 2))).mean())


# --- values -----------------------------------------------------------------------------------------------------------


def test_values_are_those_of_the_definitions(place: Path) -> None:
    """Computed again from the files: greys in numpy, colours by the feature network alone."""
    values = result(place, COLOURS, OWN)
    figures = {name: figure["value"] for name, figure in values["figures"].items()}
    assert list(figures) == ["FD-colours", "mean_shift", "sharpness"]
    real, fake = grey(place / "real"), grey(place / "fake")
    assert figures["sharpness"] == pytest.approx(abs(np.log(sharpness(fake) / sharpness(real))), rel=1e-5)
    network = choose_features({"_target_": "mynet.features.Colours", "cells": 2})
    rows = [network(torch.from_numpy(images.astype(np.uint8))[:, None]).numpy() for images in (real, fake)]
    assert rows[0].shape == (30, 12)
    shift = np.linalg.norm(rows[0].mean(0, dtype=float) - rows[1].mean(0, dtype=float))
    assert figures["mean_shift"] == pytest.approx(float(shift), rel=1e-5)
    assert figures["FD-colours"] == pytest.approx(frechet_distance(*rows), rel=1e-6)
    kind = {"class": "mynet.features.Colours", "options": {"cells": 2}}
    assert values["features"].items() >= kind.items() and values["features"]["network"] == "colours"
    assert values["own_metrics"]["sharpness"] == {"class": "mynet.metrics.Sharpness", "options": {}}


def test_metrics_of_images_need_no_feature_network(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dpm_scales.evaluation.choices.pick_features", None)
    values = result(place, "measures=[{_target_: mynet.metrics.Sharpness}]", "yardstick=real")
    assert list(values["figures"]) == ["sharpness"] and values["features"] is None and values["warnings"] == []
    assert values["figures"]["sharpness"]["value"] > values["yardstick"]["figures"]["sharpness"]["value"]


def test_the_page_in_a_shell(place: Path, tmp_path: Path) -> None:
    outcome = call("train.py", *SMALL, "trainer.max_steps=1", "run_dir=runs/mine", cwd=tmp_path)
    assert outcome.status == 0, outcome.err
    given = command("own_metric", "evaluate.py")
    outcome = call("evaluate.py", *given, "num_samples=6", "num_reference=9", cwd=tmp_path)
    assert outcome.status == 0, outcome.err
    figures = json.loads((tmp_path / "judged" / "mine" / "evaluation.json").read_text())["figures"]
    assert list(figures) == ["FD-colours", "mean_shift", "sharpness"]


def test_processes_share_the_samples() -> None:
    """Each rank describes its part by both; together they are those of one process. The group is a mock."""
    sources = [
        choose_features({"_target_": "mynet.features.Colours"}),
        *choose_metrics([{"_target_": "mynet.metrics.Sharpness"}]),
    ]
    fake = ModelSamples(small_model(), "run", "averaged", None, 7, 3, None, torch.device("cpu"))
    whole = gather_all(sources, fake.batches(4))
    for shared in on_ranks(3, lambda world: sample_features(fake, sources, 2, True, world, None)):
        for one, other in zip(shared, whole, strict=True):
            np.testing.assert_allclose(one.rows, other.rows, rtol=0, atol=1e-6)
            assert one.number == 7


# --- the cache --------------------------------------------------------------------------------------------------------


def test_the_reference_is_described_once(place: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = result(place, COLOURS, OWN)
    assert len(list(cache.glob("*"))) == 2  # one of the network, one of the metric of images
    seen: list[int] = []
    metrics = import_module("mynet.metrics")
    describe = metrics.Sharpness.describe
    monkeypatch.setattr(metrics.Sharpness, "describe", lambda self, x: seen.append(len(x)) or describe(self, x))
    second = result(place, COLOURS, OWN)
    assert sum(seen) == 20 + 4  # the samples, and the images that it is tried on
    assert first["figures"] == second["figures"] == result(place, COLOURS, OWN, "cache=false")["figures"]


def test_the_key_has_class_options_weights_and_source(package: Path) -> None:
    def key(**options: int) -> str:
        return reference_key("images", choose_features({"_target_": "mynet.features.Colours", **options}))

    keys = [key(cells=2), key(cells=3), key()]
    assert len(set(keys)) == 3 and keys == [key(cells=2), key(cells=3), key()]
    network = choose_features({"_target_": "mynet.features.Colours"})
    network.weight = torch.nn.Parameter(torch.ones(2))
    assert reference_key("images", network) not in keys
    module = package / "mynet" / "features.py"
    text = module.read_text()
    try:
        module.write_text(text.replace("pixels / 255", "pixels / 128"))
        forget(package)
        assert key() not in keys
    finally:
        module.write_text(text)
        forget(package)
    shipped = choose_features("efflite0")  # whose key is as before there were others
    made_of = [1, "images", "efflite0", shipped.hash, "bicubic with antialiasing to 224 x 224, floating point"]
    assert reference_key("images", shipped) == hashlib.sha256(json.dumps(made_of).encode()).hexdigest()


# --- in training and in evolve.py -------------------------------------------------------------------------------------


def test_a_run_is_monitored_and_resumed(package: Path, tmp_path: Path) -> None:
    given = (f"evaluation.{COLOURS}", f"evaluation.{OWN}", *EVALUATION, "objective=eval/sharpness")
    options = (*SMALL, *FAST, "checkpoint.every_n_steps=2", *given)
    outcome = call("train.py", *options, "trainer.max_steps=4", "run_dir=whole", cwd=tmp_path)
    assert outcome.status == 0, outcome.err
    assert "whoever resumes it gives allow=mynet" in outcome.out
    names = ("eval/fd_colours", "eval/mean_shift", "eval/sharpness")
    assert all(len(column(tmp_path / "whole", name)) == 2 for name in names)
    outcome = call("train.py", *options, "trainer.max_steps=2", "run_dir=part", cwd=tmp_path)
    assert outcome.status == 0, outcome.err
    forget(package)
    outcome = call("train.py", "run_dir=part", "trainer.max_steps=4", cwd=tmp_path)
    assert outcome.status == 2 and outcome.err.strip().endswith("if you trust it: allow=mynet"), outcome.err
    assert not imported(package)
    outcome = call("train.py", "run_dir=part", "trainer.max_steps=4", "allow=[mynet]", cwd=tmp_path)
    assert outcome.status == 0, outcome.err
    assert [column(tmp_path / "part", name) for name in names] == [column(tmp_path / "whole", name) for name in names]
    assert call("sample.py", "model=part", "num_samples=2", "out=out", cwd=tmp_path).status == 0  # needs no trust
    plain = (*SMALL, *FAST, "checkpoint.every_n_steps=2", "trainer.max_steps=4", "run_dir=plain")
    assert call("train.py", *plain, cwd=tmp_path).status == 0
    assert column(tmp_path / "plain", "train/loss") == column(tmp_path / "whole", "train/loss")


def test_processes_are_compared_in_own_features(place: Path) -> None:
    options = ("data=real", "times=[1,20]", "scales=null", "second_draw=false")
    outcome = call("evolve.py", *options, COLOURS, "out=compared", cwd=place)
    assert outcome.status == 0, outcome.err
    settings = json.loads((place / "compared" / "comparison.json").read_text())["features"]
    assert settings["name"] == "colours" and settings["options"] == {"cells": 2}
    assert "FD-colours" in (place / "compared" / "distance.csv").read_text()
    again = call("evolve.py", *options, COLOURS.replace("2", "3"), "out=compared", cwd=place)
    assert again.status == 2 and "holds figures of other processes, images or settings" in again.err
    shutil.rmtree(place / "compared")


# --- bad input --------------------------------------------------------------------------------------------------------

BAD = """
import torch
from dpm_scales.metrics import FeatureNetwork, ImageMetric, Measure, Metric

class Bare(FeatureNetwork):
    def embed(self, pixels): return pixels.mean((2, 3))

class Short(FeatureNetwork):
    name, dim, input_side = "short", 4, 8
    def embed(self, pixels): return pixels.mean((2, 3))

class Inception(Short):
    name = "inception"

class Numbers(Metric):
    name = "numbers"
    def compare(self, real, fake, track): return [1.0]

class Many(Numbers):
    fewest = 99

class Spaced(Numbers):
    name = "two words"

class Whole(ImageMetric):
    name = "whole"
    def describe(self, images): return images.flatten(1)[:, :1]
    def compare(self, real, fake, track): return [Measure(0.0, "lower")]

class Nans(Whole):
    def describe(self, images): return torch.full((len(images), 1), torch.nan)

class Idle(Metric):
    name = "idle"

class Typo(Numbers):
    def compare(self, real, fake, track): return [Measure(real.mean, "lower")]

class Divides(Numbers):
    def compare(self, real, fake, track): return [Measure(1 / (real.number // 9), "lower")]
"""
LINES = {
    "features={_target_: mynet.bad.Bare}": "mynet.bad.Bare: name must be a word of letters, digits, '_', '-' and '.'",
    "features={_target_: mynet.bad.Short}": "mynet.bad.Short.embed returned torch.float32 (16, 3) for 16 images; it "
    "must return floats (B, dim), here (16, 4)",
    "features={_target_: mynet.bad.Inception}": "features: mynet.bad.Inception has the name 'inception' of another",
    "features={_target_: mynet.bad.Numbers}": "features._target_=mynet.bad.Numbers makes no FeatureNetwork; name "
    "a class derived from dpm_scales.metrics.FeatureNetwork",
    "features={_target_: mynet.bad.Missing}": "features._target_=mynet.bad.Missing: there is no such class",
    "features={_target_: mynet.features.Colours, cell: 2}": "unknown option 'features.cell': did you mean "
    "'features.cells'?",
    f"{COLOURS} inception=x.pt": "inception=x.pt is for features=inception, and features is mynet.features.Colours",
    "measures=[{_target_: mynet.bad.Numbers}]": "mynet.bad.Numbers.compare must return a Measure for each of numbers, "
    "got [1.0]",
    "measures=[{_target_: mynet.bad.Many}]": "numbers needs 99 images or more in each set, got 30 and 20; give more, "
    "or leave numbers out of measures",
    "measures=[{_target_: mynet.bad.Spaced}]": "mynet.bad.Spaced: name must be a word",
    "measures=[{_target_: mynet.bad.Whole}]": "mynet.bad.Whole.describe returned torch.uint8 (2, 1) for 2 images; it "
    "must return floats",
    "measures=[{_target_: mynet.bad.Nans}]": "whole describes an image by numbers that are not finite",
    "measures=[{_target_: mynet.bad.Idle}]": "measures[0]._target_=mynet.bad.Idle is an abstract class",
    "measures=[{_target_: mynet.features.Colours}]": "measures[0]._target_=mynet.features.Colours makes no Metric",
    "measures=[{_target_: mynet.metrics.Sharpness, radius: 1}]": "unknown option 'measures[0].radius': allowed: none",
    "measures=[{_target_: mynet.metrics.Sharpness},{_target_: mynet.metrics.Sharpness}]": "measures: two of them are "
    "called sharpness; leave one out, or give it another name",
    "measures=[{_target_: mynet.bad.Typo}]": "measures: a metric fails on the first images of the reference (bad.py, "
    "line 37): AttributeError(\"'FeatureSet' object has no attribute 'mean'\")",
    "measures=[3]": "unknown measure 3",
}


def test_a_metric_is_tried_before_training(package: Path, place: Path) -> None:
    """A mistake in its code ends the command before there is a run; numbers of a few images alone do not."""
    (package / "mynet" / "bad.py").write_text(BAD)
    given = (*SMALL, *EVALUATION, "evaluation.features={_target_: mynet.features.Colours}", "run_dir=run")
    outcome = call("train.py", *given, "evaluation.measures=[{_target_: mynet.bad.Typo}]", cwd=place)
    assert outcome.status == 2 and "evaluation.measures: a metric fails on the first images" in outcome.err
    assert not (place / "run").exists()
    assert result(place, COLOURS, "measures=[{_target_: mynet.bad.Divides}]")["figures"]["numbers"]["value"] == 1 / 3


@pytest.mark.parametrize("options", LINES)
def test_a_wrong_class_ends_in_one_line(options: str, package: Path, place: Path) -> None:
    (package / "mynet" / "bad.py").write_text(BAD)
    features = () if options.startswith("features") else (COLOURS,)
    given = [options] if " inception" not in options else options.rsplit(" ", 1)
    outcome = evaluate(place, *given, *(features if "features" not in options else ()))
    assert outcome.status == 2 and LINES[options] in outcome.err and outcome.err.count("\n") == 1, outcome.err
    assert not any((place / "out").glob("*"))


def test_a_metric_without_its_features_is_an_error() -> None:
    (metric,) = choose_metrics([{"_target_": "mynet.metrics.MeanShift"}])
    with pytest.raises(ValueError, match="mean_shift needs a feature network"):
        compare([], [], None, [metric])
    with pytest.raises(UserError, match="measures must be a list of"):
        choose_metrics("sharpness")
