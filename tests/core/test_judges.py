"""The judges of generated images: good marks for real images only, and tables of folders and of recipes."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional

from benchmarks import judges, quality
from benchmarks.judged_images import read_samples
from benchmarks.judges import DigitsJudge, PhotosJudge, nearest_distances
from dpm_scales.metrics import FeatureNetwork, frechet_distance, kernel_distance

Array = NDArray[Any]


@pytest.fixture(scope="module")
def judge() -> DigitsJudge:
    return DigitsJudge()


def test_the_split_is_the_one_that_is_trained_on(judge: DigitsJudge) -> None:
    assert len(judge.train_images) + len(judge.val_images) == 1797
    together = np.concatenate([judge.train_images, judge.val_images]).reshape(1797, -1)
    assert len(np.unique(together, axis=0)) == 1797
    assert np.bincount(judge.val_labels).min() >= 34


def test_held_out_digits_are_good(judge: DigitsJudge) -> None:
    assert judge.accuracy() > 0.94
    report = judge.report(judge.val_images, reference=judge.train_images)
    assert report["number"] == 359
    assert report["confidence_ratio"] == pytest.approx(1.0)
    assert 0.08 < report["share_min"] <= report["share_max"] < 0.12
    assert report["fd_ratio"] < 1.5
    assert report["nearest"] == pytest.approx(report["nearest_real"])


@pytest.mark.parametrize("kind", ["noise", "grey", "shuffled pixels"])
def test_other_images_are_bad(judge: DigitsJudge, kind: str) -> None:
    rng = np.random.default_rng(0)
    images = {
        "noise": rng.integers(0, 256, (200, 8, 8)).astype(np.uint8),
        "grey": np.full((200, 8, 8), 128, np.uint8),
        "shuffled pixels": rng.permuted(judge.val_images.reshape(-1, 64), axis=1).reshape(-1, 8, 8),
    }[kind]
    report = judge.report(images)
    assert report["confidence_ratio"] < 0.85
    assert report["fd_ratio"] > 20
    assert report["share_max"] > 0.25
    assert report["nearest"] > 2 * report["nearest_real"]


def test_copies_are_noticed(judge: DigitsJudge) -> None:
    assert judge.report(judge.train_images[:100])["nearest"] == 0.0


def test_a_missing_digit_is_noticed(judge: DigitsJudge) -> None:
    shares = judge.class_shares(judge.train_images[judge.train_labels != 3])
    assert shares.shape == (10,) and shares.sum() == pytest.approx(1.0)
    assert shares[3] < 0.01 < 0.09 < np.delete(shares, 3).min()


def test_features_are_those_of_the_classifier(judge: DigitsJudge) -> None:
    weight, bias = judge.classifier.coefs_[-1], judge.classifier.intercepts_[-1]
    logits = judge.features(judge.val_images) @ weight + bias
    probabilities = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    assert judge.confidence(judge.val_images) == pytest.approx(probabilities.max(axis=1).mean())


def test_fewer_images_are_further_apart(judge: DigitsJudge) -> None:
    assert judge.halves(50) > 2 * judge.halves() > 0
    assert judge.halves() == judge.halves()


def test_image_layouts(judge: DigitsJudge) -> None:
    images = judge.val_images[:5]
    assert np.array_equal(judge.features(images), judge.features(images[:, None]))
    wrong = [images[:, :4], images[:0], images.astype(np.float32), np.repeat(images[:, None], 3, axis=1)]
    for batch in wrong:
        with pytest.raises(ValueError, match="expected uint8 images"):
            judge.features(batch)


def test_table_of_a_folder(judge: DigitsJudge, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for index, image in enumerate(judge.val_images[:20]):
        Image.fromarray(image).save(tmp_path / f"{index:06d}.png")
    Image.fromarray(np.zeros((40, 40), np.uint8)).save(tmp_path / "grid.png")
    assert np.array_equal(read_samples(tmp_path), judge.val_images[:20])

    judges.main(["--set", "digits", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert f"| {tmp_path} | 20 |" in lines[-2] and "| held-out real | 359 |" in lines[-1]
    assert len({line.count("|") for line in lines[2:]}) == 1


def test_folder_without_samples(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        judges.main([str(tmp_path)])
    assert stop.value.code == 2
    assert "no images named" in capsys.readouterr().err


def test_folder_of_different_sizes(tmp_path: Path) -> None:
    for index, side in enumerate((8, 9)):
        Image.fromarray(np.zeros((side, side), np.uint8)).save(tmp_path / f"{index:06d}.png")
    with pytest.raises(ValueError, match="different sizes"):
        read_samples(tmp_path)


# --- photos -----------------------------------------------------------------------------------------------------------


class Colours(FeatureNetwork):
    """Mean and deviation of the colours in each quarter: 24 features."""

    name, distance_name, kernel_name, dim, input_side = "colours", "FD-colours", "KD-colours", 24, 32

    def __init__(self) -> None:
        super().__init__("0123456789abcdef" * 4, 64)

    def embed(self, pixels: Tensor) -> Tensor:
        parts = functional.unfold(pixels / 255, 16, stride=16).reshape(len(pixels), 3, 256, 4)
        return torch.cat([parts.mean(2), parts.std(2)], 1).flatten(1)


class SmallPhotosJudge(PhotosJudge):
    def __init__(self) -> None:
        super().__init__(network=Colours(), stride=40)


@pytest.fixture(scope="module")
def photos() -> PhotosJudge:
    return SmallPhotosJudge()


def test_nearest_distances_equal_those_of_all_pairs() -> None:
    rng = np.random.default_rng(0)
    images, others = rng.normal(size=(503, 6)), rng.normal(size=(70, 6))
    expected = np.sqrt(((images[:, None] - others) ** 2).sum(-1)).min(axis=1)
    np.testing.assert_allclose(nearest_distances(images, others), expected, rtol=1e-12)


def test_photos_report_holds_the_distances_of_their_features(photos: PhotosJudge) -> None:
    images = photos.train_images[::7]
    report = photos.report(images)
    assert report["number"] == len(images) and "confidence" not in report
    for name, real in (("held_out", photos.val_images), ("training", photos.train_images)):
        a, b = (photos.network(torch.from_numpy(x)) for x in (images, real))
        assert report[f"fd_{name}"] == pytest.approx(frechet_distance(a, b))
        assert (report[f"kd_{name}"], report[f"kd_{name}_error"]) == pytest.approx(tuple(kernel_distance(a, b)))
    assert report["fd_training"] < report["fd_held_out"]


def test_photos_copies_and_mirrored_copies_are_noticed(photos: PhotosJudge) -> None:
    assert photos.nearest(photos.train_images[:9]) == photos.nearest(photos.train_images[:9, :, :, ::-1]) == 0.0
    assert photos.nearest(photos.train_images[:9, :, ::-1]) > 1
    assert photos.report(photos.val_images)["nearest"] == photos.nearest_real > 1


@pytest.mark.parametrize("kind", ["noise", "grey", "shuffled pixels"])
def test_other_images_are_bad_photos(photos: PhotosJudge, kind: str) -> None:
    rng = np.random.default_rng(0)
    images = {
        "noise": rng.integers(0, 256, (90, 3, 32, 32)).astype(np.uint8),
        "grey": np.full((90, 3, 32, 32), 128, np.uint8),
        "shuffled pixels": rng.permuted(photos.train_images[:90].reshape(90, -1), axis=1).reshape(-1, 3, 32, 32),
    }[kind]
    bad, real = photos.report(images), photos.real_reports(90)["training real"]
    for name in ("fd_training", "kd_training"):
        assert bad[name] > 5 * real[name]
    assert bad["kd_training"] > 5 * bad["kd_training_error"]


def test_real_photos_are_judged_by_others(photos: PhotosJudge, monkeypatch: pytest.MonkeyPatch) -> None:
    """No patch is in the set that it is compared with, and none is left out; the number is what was asked for."""
    pairs: list[tuple[int, int]] = []
    monkeypatch.setattr(judges, "frechet_distance", lambda a, b: pairs.append((len(a), len(b))) or 1.0)
    held_out, training = len(photos.val_images), len(photos.train_images)
    photos.real_reports(30)
    half = held_out // 2
    assert pairs == [(half, held_out - half), (half, training), (30, held_out), (30, training - 30)]
    monkeypatch.undo()
    reports = photos.real_reports(30)
    assert [report["number"] for report in reports.values()] == [len(photos.val_images) // 2, 30]
    assert reports["training real"]["nearest"] > 0 and reports["half of the held-out real"]["fd_held_out"] > 0
    assert photos.real_reports(10**6)["training real"]["number"] == len(photos.train_images) // 2
    assert photos.real_reports(30) == reports


def save_all(images: Array, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for index, image in enumerate(images):
        Image.fromarray(image.transpose(1, 2, 0)).save(folder / f"{index:06d}.png")


def check_photos_table(lines: list[str], names: list[str]) -> None:
    head = "| samples | number | FD-colours to held-out | KD-colours to held-out | FD-colours to training"
    assert lines[0].startswith(head) and "FID" not in lines[0] and "confidence" not in lines[0]
    assert [line.split("|")[1].strip() for line in lines[2:]] == names
    assert len({line.count("|") for line in lines}) == 1


def test_table_of_a_folder_of_photos(
    photos: PhotosJudge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_all(photos.val_images[:20], tmp_path)
    assert np.array_equal(read_samples(tmp_path, 3), photos.val_images[:20])
    monkeypatch.setitem(judges.JUDGES, "photos32", SmallPhotosJudge)
    judges.main(["--set", "photos32", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("features colours, SHA-256 of its weights 0123456789ab…; ")
    check_photos_table(lines[2:], [str(tmp_path), "half of the held-out real", "training real"])


def finished_runs(photos: PhotosJudge, calls: list[tuple[str, ...]]) -> Callable[..., float]:
    """In place of training and sampling: the files that both leave."""

    def call(script: str, *overrides: str) -> float:
        calls.append((script, *overrides))
        values = dict(override.split("=", 1) for override in overrides)
        if script == "train.py":
            run = Path(values["run_dir"])
            (run / "model").mkdir(parents=True)
            (run / "model/model.safetensors").touch()
            (run / "result.json").write_text(json.dumps({"steps": 20, "seconds": 1.5}))
        else:
            save_all(photos.train_images[: int(values["num_samples"])], Path(values["out"]))
        return 2.0

    return call


def test_quality_of_photos(photos: PhotosJudge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, ...]] = []
    monkeypatch.setattr(quality, "_call", finished_runs(photos, calls))
    monkeypatch.setitem(quality.JUDGES, "photos32", SmallPhotosJudge)
    wanted = ["--set", "photos32", "--out", str(tmp_path), "--number", "25"]
    quality.main([*wanted, "--recipes", "vp", "osmosis_diffusion", "--override", "trainer.max_steps=20"])
    assert [call[:2] for call in calls[::2]] == [
        ("train.py", "experiment=photos32_vp"),
        ("train.py", "experiment=photos32_osmosis_diffusion"),
    ]
    assert calls[0][-1] == "trainer.max_steps=20"
    names = ["vp", "osmosis_diffusion", "half of the held-out real", "training real"]
    check_photos_table((tmp_path / "photos32.md").read_text().splitlines(), names)
    with (tmp_path / "photos32.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["recipe"], row["number"], row["steps"], row["sampling"]) for row in rows] == [
        ("vp", "25", "20", "2.0"),
        ("osmosis_diffusion", "25", "20", "2.0"),
    ]
    assert float(rows[0]["nearest"]) == 0.0
    quality.main([*wanted, "--recipes", "vp"])
    assert len(calls) == 4, "what is finished is not made again"


def test_every_photos_recipe_is_known_to_quality() -> None:
    assert quality.recipes("photos32") == ["blurring", "heat", "osmosis_diffusion", "ve", "vp"]


@pytest.mark.slow
def test_photos_with_the_true_network() -> None:
    """A few patches: real ones of either kind are nearer to their own kind than to noise and to the other kind."""
    judge = PhotosJudge(stride=110)
    held_out, training = judge.real_reports(30).values()
    noise = judge.report(np.random.default_rng(0).integers(0, 256, (30, 3, 32, 32)).astype(np.uint8))
    header = judge.table({}).splitlines()[0]
    assert header.startswith(
        "| samples | number | FD-efflite0 to held-out | KD-efflite0 to held-out | FD-efflite0 to t"
    )
    assert training["kd_training"] + 4 * training["kd_training_error"] < noise["kd_training"] / 2
    assert held_out["kd_held_out"] + 4 * held_out["kd_held_out_error"] < noise["kd_held_out"] / 2
    assert training["fd_training"] < training["fd_held_out"] < noise["fd_held_out"]


@pytest.mark.slow
def test_mnist() -> None:
    judge = judges.MnistJudge()
    assert judge.accuracy() > 0.93
    assert judge.report(judge.val_images, reference=judge.train_images)["fd_ratio"] < 1.5
    noise = np.random.default_rng(0).integers(0, 256, (200, 32, 32)).astype(np.uint8)
    assert judge.report(noise)["fd_ratio"] > 100
