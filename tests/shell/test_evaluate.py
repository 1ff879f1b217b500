"""`evaluate.py` as a shell calls it: what it measures, what it writes down, and what it refuses."""

from __future__ import annotations

import json
import re
import shutil
import warnings
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from dpm_scales.data import Digits
from dpm_scales.evaluation.choices import choose_metrics
from dpm_scales.evaluation.generated import ModelSamples, sample_features
from dpm_scales.evaluation.references import run_data
from dpm_scales.images import load_image
from dpm_scales.metrics import frechet_distance, kernel_distance, manifolds
from dpm_scales.metrics.figures import memory_needed
from dpm_scales.models.model import build_model
from dpm_scales.progress import Report
from support.evaluate_helpers import DIM, Means, noise_images, on_ranks, small_features
from support.shell import Outcome, call, photos, sample, small_model, train

pytestmark = pytest.mark.filterwarnings("ignore:.*(covariance is singular|px are enlarged)")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, samples of it, sets of images."""
    root = tmp_path_factory.mktemp("place")
    train(root / "run")
    sample(root / "run", root / "drawn", "num_samples=30", "seed=4", "trajectory=true")
    noise_images(root / "real", 40, 0)
    noise_images(root / "fake", 30, 1, level=100)
    return root


@pytest.fixture(autouse=True)
def network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Means]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    network = Means()
    with small_features(network):
        yield network


def evaluate(place: Path, *overrides: str) -> Outcome:
    return call("evaluate.py", *overrides, cwd=place)


def result(place: Path, out: Path, *overrides: str) -> dict[str, Any]:
    """evaluation.json of a call that succeeds."""
    outcome = evaluate(place, *overrides, f"out={out}")
    assert outcome.status == 0, outcome.err
    values: dict[str, Any] = json.loads((out / "evaluation.json").read_text())
    return values


def features(folder: Path) -> np.ndarray:
    paths = sorted(path for path in folder.glob("*.png") if path.stem.isdigit())
    return Means()(torch.stack([load_image(path, 3) for path in paths])).numpy()


def figures(real: np.ndarray, fake: np.ndarray) -> dict[str, float]:
    overlap = manifolds(real, fake)._asdict()
    return {"FD-means": frechet_distance(real, fake), "KD-means": kernel_distance(fake, real).value, **overlap}


def assert_figures(values: dict[str, Any], expected: dict[str, float]) -> None:
    assert values.keys() == expected.keys()
    for name, value in expected.items():
        assert values[name]["value"] == pytest.approx(value, rel=1e-6, abs=1e-9), name


# --- what is measured -------------------------------------------------------------------------------------------------


def test_figures_of_two_folders(place: Path, tmp_path: Path) -> None:
    values = result(place, tmp_path, "samples=fake", "reference=real", "batch_size=7")
    assert_figures(values["figures"], figures(features(place / "real"), features(place / "fake")))
    assert values["figures"]["KD-means"]["std_error"] > 0
    assert values["figures"]["precision"] == {"value": 0.0, "better": "higher", "neighbours": 3}


def test_an_archive_is_as_good_as_its_folder(place: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "real.zip", "w") as archive:
        for path in sorted((place / "real").iterdir()):
            archive.write(path, path.name)
    first = result(place, tmp_path / "a", "samples=fake", "reference=real")
    second = result(place, tmp_path / "b", "samples=fake", f"reference={tmp_path / 'real.zip'}")
    assert first["figures"] == second["figures"]
    assert first["real"]["sha256"] == second["real"]["sha256"]


def test_arrays_and_data_sets(place: Path, tmp_path: Path) -> None:
    """The digits from a file of both their parts, the training part first."""
    digits = Digits()
    images = torch.cat([digits.train().images, digits.val().images])[:, 0].numpy()
    np.save(tmp_path / "digits.npy", images)
    first = result(place, tmp_path / "a", "samples=drawn", "reference=digits", "split=all")
    second = result(place, tmp_path / "b", "samples=drawn", f"reference={tmp_path / 'digits.npy'}")
    assert first["figures"] == second["figures"] and first["real"]["number"] == 1797
    held_out = result(place, tmp_path / "c", "samples=drawn", "reference=digits", "split=val")
    assert held_out["real"]["number"] == len(digits.val())


def test_a_model_is_sampled_as_by_sample_py(place: Path, tmp_path: Path) -> None:
    """The same seed gives the same images, hence the same figures as the folder that sample.py wrote."""
    common = ("reference=real", "batch_size=11")
    on_the_fly = result(place, tmp_path / "a", "model=run", "num_samples=30", "seed=4", *common)
    from_files = result(place, tmp_path / "b", "samples=drawn", *common)
    assert_figures(on_the_fly["figures"], {k: v["value"] for k, v in from_files["figures"].items()})
    other_seed = result(place, tmp_path / "c", "model=run", "num_samples=30", "seed=5", *common)
    assert other_seed["figures"] != on_the_fly["figures"]


def test_processes_share_the_samples(network: Means) -> None:
    """Each takes its part, with the labels of its part; the features come together in order. The group is a mock."""
    model = build_model(replace(small_model().recipe, num_classes=3))
    generator = torch.Generator().manual_seed(0)
    for weights in model.denoiser.parameters():
        weights.data = 0.2 * torch.randn(weights.shape, generator=generator)
    labels = torch.tensor([0, 2, 1, 1, 0, 2, 2])
    fake = ModelSamples(model, "run", "averaged", None, 7, 3, labels, torch.device("cpu"))
    whole = network(torch.cat(list(fake.batches(4))))
    # more ranks than there are samples
    for (judged,) in on_ranks(9, lambda world: sample_features(fake, [network], 2, True, world, None)):
        torch.testing.assert_close(torch.from_numpy(judged.rows), whole, rtol=0, atol=1e-6)
        assert judged.number == 7


def test_own_extras_of_sample_py_are_no_samples(place: Path, tmp_path: Path) -> None:
    assert (place / "drawn" / "grid.png").is_file() and (place / "drawn" / "trajectory.gif").is_file()
    values = result(place, tmp_path, "samples=drawn", "reference=real")
    assert values["fake"]["number"] == 30 and values["fake"]["sizes"] == [[8, 8]]


@pytest.mark.parametrize("where", ["run", "run/model", "run/checkpoints/last.ckpt"])
def test_the_data_of_a_run(place: Path, tmp_path: Path, where: str) -> None:
    values = result(place, tmp_path, f"model={where}", "reference=data", "num_samples=8", "yardstick=data")
    digits = Digits()
    train_features, val_features = (Means()(part.images).numpy() for part in (digits.train(), digits.val()))
    assert values["real"]["number"] == len(train_features)
    # as many as samples, spread evenly
    chosen = [i * len(val_features) // 8 for i in range(8)]
    assert values["yardstick"]["number"] == 8
    assert_figures(values["yardstick"]["figures"], figures(train_features, val_features[chosen]))


def test_as_many_samples_as_the_reference_has(place: Path, tmp_path: Path) -> None:
    values = result(place, tmp_path, "model=run", "reference=real", "num_reference=9")
    assert (values["fake"]["number"], values["real"]["number"]) == (9, 9)


def test_the_frechet_distance_alone(place: Path, tmp_path: Path) -> None:
    values = result(place, tmp_path, "samples=fake", "reference=real", "measures=[frechet]")
    expected = {"FD-means": frechet_distance(features(place / "real"), features(place / "fake"))}
    assert_figures(values["figures"], expected)


# --- what is written down ---------------------------------------------------------------------------------------------


def test_the_result_names_all_that_it_hangs_on(place: Path, tmp_path: Path) -> None:
    options = ("sampler=ddim", "sampler.eta=0.5", "steps=2", "weights=raw", "seed=7", "num_samples=10")
    values = result(place, tmp_path, "model=run", "reference=real", *options)
    assert values["features"] == {
        "network": "means",
        "weights_sha256": "0" * 64,
        "dim": DIM,
        "resizing": "bicubic with antialiasing to 6 x 6, floating point",
        "class": "support.evaluate_helpers.Means",  # as it is none of the package
        "options": {},
    }
    real, fake = values["real"], values["fake"]
    assert real["source"] == "real" and real["number"] == 40 and re.fullmatch("[0-9a-f]{64}", real["sha256"])
    assert (fake["model"], fake["weights"], fake["process"]) == ("run", "raw", "VP")
    assert (fake["sampler"], fake["steps"], fake["seed"], fake["number"]) == ("DDIM", 2, 7, 10)
    assert fake["sampler_settings"]["eta"] == 0.5 and fake["guidance"] is None
    assert values["versions"].keys() >= {"python", "torch", "dpm-scales", "numpy"}
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", values["date"])
    assert values["likelihood"] is None and values["yardstick"] is None and values["device"] == "cpu"
    averaged = result(place, tmp_path, "model=run", "reference=real", "num_samples=10")
    assert averaged["fake"]["weights"] == "averaged"
    assert averaged["fake"]["weights_sha256"] != fake["weights_sha256"]


def test_the_table_and_the_doubts(place: Path, tmp_path: Path) -> None:
    with pytest.warns(UserWarning) as said:
        outcome = evaluate(place, "samples=fake", "reference=real", "num_samples=12", f"out={tmp_path}")
    lines = outcome.out.splitlines()
    assert any("12 samples by 40 real images, features means" in line for line in lines)
    for name in ("FD-means", "KD-means", "precision, k = 3", "coverage, k = 5"):
        assert any(name in line for line in lines), outcome.out
    assert lines[-1] == f"result in {tmp_path / 'evaluation.json'}"
    doubts = [str(warning.message) for warning in said]
    assert len(doubts) == 2
    assert doubts[0].startswith("12 samples for 12 features: their covariance is singular and FD-means too high")
    assert doubts[1].startswith("images below 32 px are enlarged to 6 px")
    assert json.loads((tmp_path / "evaluation.json").read_text())["warnings"] == doubts


def test_no_doubts_where_there_are_none(place: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 1)):
        noise_images(tmp_path / name, 13, seed, (32, 40))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        values = result(tmp_path, tmp_path / "out", "samples=a", "reference=b")
    assert values["warnings"] == []
    outcome = evaluate(tmp_path, "samples=a", "reference=b")
    assert "13 samples by 13 real images" in outcome.out and "result in" not in outcome.out


# --- what is refused --------------------------------------------------------------------------------------------------

MISTAKES = {
    "reference=real": "give model=RUN, an export or a checkpoint, to sample from it, or samples=DIR, and not both",
    "samples=fake model=run reference=real": "give model=RUN, .*, and not both",
    "samples=fake": "reference has no value yet; give it on the command line",
    "samples=fake reference=nowhere": "reference=nowhere: no such folder or file; allowed are .*digits",
    "samples=nowhere reference=real": "samples=nowhere: no such folder",
    "samples=fake reference=real yardstick=nowhere": "yardstick=nowhere: no such folder",
    "model=nowhere reference=real": "no model at nowhere",
    "samples=empty reference=real": "empty: no images in it",
    "samples=one reference=real": "samples=one: needs 2 images or more, found 1",
    "samples=fake reference=one": "reference=one: needs 2 images or more, found 1",
    "samples=five reference=real": "manifolds needs 6 images or more in each set, got 40 and 5",
    "samples=mixed reference=real": "mixed: images of 2 sizes, from 8x8 to 12x20; bring them to one, or set any_size",
    "samples=wide reference=real": "wide: images of 12x20, and of 8x8 in the reference; bring them to one size",
    "model=run reference=wide": "run: images of 8x8, and of 12x20 in the reference",
    "samples=cut reference=real": "1 of 8 images can't be read, the first is cut/000003.png",
    "samples=fake reference=file.txt": "file.txt: allowed are a folder and a .zip file",
    "samples=fake reference=broken.zip": "broken.zip: not a readable zip archive",
    "samples=fake reference=floats.npy": "floats.npy: images are float64; save them as uint8",
    "samples=fake reference=data": "reference=data is the data of the model's run, and no model= was given",
    "model=alone reference=data": "alone lies in no run folder",
    "model=foreign reference=data": "asks for 'os.system'; data may only use .*, or be given by reference=DIR$",
    "samples=fake reference=folder": "reference=folder would need data.root; give its folder or file: reference=PATH",
    "samples=fake reference=real split=test": "unknown split 'test'.*allowed: all, train, val",
    "samples=fake reference=real features=missing": "no feature network: install one",
    "samples=fake reference=real measures=[fid]": "unknown measure 'fid'.*allowed: frechet, kernel, manifolds",
    "samples=fake reference=real measures=fid": "measures must be a list",
    "samples=fake reference=real num_samples=1": "num_samples must be a whole number >= 2, got 1",
    "samples=fake reference=real num_reference=all": "num_reference must be a whole number >= 2, got 'all'",
    "samples=fake reference=real batch_size=0": "batch_size must be a whole number >= 1, got 0",
    "samples=fake reference=real seed=-1": "seed must be a whole number >= 0, got -1",
    "samples=fake reference=real cache=maybe": "cache must be true or false, got 'maybe'",
    "samples=fake reference=real steps=5": "steps is for sampling a model, and samples=fake are there already",
    "samples=fake reference=real labels=3": "labels is for sampling a model",
    "samples=fake reference=real guidance=2": "guidance is for sampling a model",
    "model=run reference=real guidance=2": "guidance=2 needs labels, and this model was trained without",
    "samples=fake reference=real sampler=ddim": "sampler is for sampling a model",
    "samples=fake reference=real weights=raw": "weights is for sampling a model",
    "samples=fake reference=real precision=bf16-mixed": "precision is for sampling a model",
    "samples=fake reference=real compile=true": "compile is for sampling a model",
    "samples=fake reference=real precision=16": "precision=16 overflows; use bf16-mixed or 32-true",
    "samples=fake reference=real compile=null": "compile must be true or false, got None",
    "samples=fake reference=real device=cuda:99": "device=cuda:99 is not available here",
    "samples=fake reference=real out=file.txt": "can't write to file.txt",
    "samples=fake reference=real likelihood=exact": "likelihood='exact'",
    "samples=fake reference=real refernce=real": "unknown option 'refernce': did you mean 'reference'",
    "model=run reference=real labels=3": "labels were given, but this model was trained without; drop labels=",
    "model=run reference=real weights=mean": "unknown weights 'mean'",
    "model=run reference=real steps=0": "steps must be a whole number >= 1",
    "model=run reference=real sampler=hen": "unknown sampler 'hen': did you mean 'heun'",
}


@pytest.fixture(scope="module")
def mistakes(place: Path) -> Path:
    (place / "empty").mkdir()
    noise_images(place / "one", 1, 0)
    noise_images(place / "five", 5, 0)
    noise_images(place / "mixed", 4, 0)
    photos(place / "mixed", 4, first=900)
    photos(place / "wide", 8)
    noise_images(place / "cut", 8, 0)
    (place / "cut" / "000003.png").write_bytes((place / "cut" / "000003.png").read_bytes()[:60])
    (place / "file.txt").write_text("no folder")
    (place / "broken.zip").write_text("no archive")
    np.save(place / "floats.npy", np.zeros((4, 8, 8)))
    shutil.copytree(place / "run" / "model", place / "alone")
    shutil.copytree(place / "run", place / "foreign")
    settings = yaml.safe_load((place / "run" / "config.yaml").read_text())
    settings["data"] = {"_target_": "os.system", "command": "true"}
    (place / "foreign" / "config.yaml").write_text(yaml.safe_dump(settings))
    return place


@pytest.mark.parametrize("options", MISTAKES)
def test_a_mistake_is_one_line(mistakes: Path, options: str) -> None:
    outcome = evaluate(mistakes, *options.split())
    assert outcome.status == 2, outcome.out + outcome.err
    lines = [line for line in outcome.err.splitlines() if not line.startswith("warning: ")]
    assert len(lines) == 1 and lines[0].startswith("error: "), outcome.err
    assert re.search(MISTAKES[options], lines[0]), lines[0]


def test_sizes_may_differ_where_that_is_meant(mistakes: Path, tmp_path: Path) -> None:
    values = result(mistakes, tmp_path, "samples=mixed", "reference=wide", "any_size=true", "num_samples=8")
    assert values["fake"]["sizes"] == [[8, 8], [12, 20]] and values["real"]["sizes"] == [[12, 20]]


def test_data_with_objects_in_it_is_not_built(place: Path, tmp_path: Path) -> None:
    from dpm_scales.errors import UserError

    settings = {"_target_": "dpm_scales.data.array_data", "path": {"_target_": "os.getcwd"}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"data": settings}))
    with pytest.raises(
        UserError,
        match="asks for 'os.getcwd'; data may only use the classes of dpm_scales.data, or be given by reference=DIR$",
    ):
        run_data(tmp_path)


def test_nothing_is_fetched_unasked(place: Path, tmp_path: Path) -> None:
    """The real choice of the network: Inception by name, and its file is not there."""
    from unittest import mock

    from dpm_scales.metrics import pick_features

    with (
        mock.patch("dpm_scales.evaluation.choices.pick_features", pick_features),
        mock.patch("torch.hub.download_url_to_file", side_effect=AssertionError("fetched")),
    ):
        options = ("features=inception", f"inception={tmp_path / 'inception.pt'}")
        outcome = evaluate(place, "samples=fake", "reference=real", *options)
    assert outcome.status == 2
    assert re.fullmatch(r"error: .*inception.pt: no such file; get https.*, or choose .*efflite0\n", outcome.err)


# --- many images ------------------------------------------------------------------------------------------------------


def test_every_part_reports_how_far_it_is(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, list[float]] = {}

    def part(self: Report, name: str, total: int) -> Any:
        steps = seen.setdefault(name, [total])
        return steps.append

    monkeypatch.setattr(Report, "part", part)
    options = ("model=run", "reference=data", "num_samples=20", "num_reference=30", "yardstick=data", "batch_size=8")
    assert evaluate(place, *options, "likelihood=vlb", "likelihood_draws=2").status == 0
    compared = ["Fréchet distance", "kernel distance", "nearest neighbours"]
    names = ["reference features", "yardstick features", "sampling", "sample features", *compared]
    assert list(seen) == [*names, *(f"{name} of the yardstick" for name in compared), "likelihood (vlb)"]
    for name, (total, *steps) in seen.items():
        assert sum(steps) == pytest.approx(total), name
    assert len(seen["sampling"]) - 1 == 3 * 3 and seen["sampling"][1] == pytest.approx(8 / 3)  # batches, steps of each


def test_neighbours_among_a_part_of_the_images_are_told(place: Path, tmp_path: Path) -> None:
    options = ("samples=fake", "reference=real")
    with pytest.warns(UserWarning, match="density and coverage are those of 12 of 40 real images and 12 of 30 samples"):
        found = result(place, tmp_path / "part", *options, "manifold_images=12")
    real, fake = features(place / "real"), features(place / "fake")
    expected = figures(real[np.arange(12) * 40 // 12], fake[np.arange(12) * 30 // 12])
    expected |= {name: value for name, value in figures(real, fake).items() if "means" in name}
    assert_figures(found["figures"], expected)
    assert found["figures"]["recall"]["images"] == [12, 12] and "images" not in found["figures"]["FD-means"]
    whole = result(place, tmp_path / "whole", *options, "manifold_images=40")
    assert_figures(whole["figures"], figures(real, fake))
    assert not any("manifold_images" in line for line in whole["warnings"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("num_samples=100000000000",), "labels of num_samples=100000000000 would take"),
        (("num_samples=2000000",), "features of 40 real images and num_samples=2000000 samples would take 275 MiB"),
        (("num_samples=2000000", "measures=[kernel]"), "would take 91.6 MiB of memory"),
    ],
)
def test_more_memory_than_there_is_ends_with_one_line_before_any_work(
    place: Path, monkeypatch: pytest.MonkeyPatch, network: Means, overrides: tuple[str, ...], message: str
) -> None:
    monkeypatch.setattr("dpm_scales.memory.available_memory", lambda device=None: 90 * 2**20)
    outcome = evaluate(place, "model=run", "reference=real", "any_size=true", *overrides)
    assert outcome.status == 1 and message in outcome.err and outcome.err.count("\n") == 1
    assert network.calls == 0


def test_statistics_alone_need_no_memory_for_more_samples() -> None:
    def needed(names: list[str], numbers: tuple[int, int], manifold_images: int | None = None) -> float:
        return memory_needed(choose_metrics(names, manifold_images), numbers, Means())

    assert needed(["frechet"], (10**11, 10**11)) == 0
    assert needed(["kernel"], (10, 20)) == 4 * DIM * 30
    assert needed(["kernel", "manifolds"], (10, 20)) == 12 * DIM * 30
    assert needed(["manifolds"], (10, 20), 12) == 4 * DIM * 30 + 8 * DIM * 22
