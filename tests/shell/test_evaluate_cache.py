"""The cache of reference features: the same figures with and without, another file for other images, damage noticed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import torch
from PIL import Image

from dpm_scales.data import Digits
from dpm_scales.data.image_sets import ImageSet
from dpm_scales.evaluation import reference_cache
from dpm_scales.evaluation.reference_cache import REFERENCES, reference_features, reference_key
from dpm_scales.evaluation.references import data_images, open_images
from dpm_scales.metrics import FeatureSet
from dpm_scales.storage import user_cache
from support.evaluate_helpers import DIM, Means, noise_images, small_features
from support.shell import call, files

pytestmark = pytest.mark.filterwarnings("ignore:.*(covariance is singular|px are enlarged)")


@pytest.fixture
def real(tmp_path: Path) -> Path:
    return noise_images(tmp_path / "real", 30, 0)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "dpm_scales" / "references"


@pytest.fixture
def network() -> Iterator[Means]:
    network = Means()
    with small_features(network):
        yield network


def opened(place: Path) -> ImageSet:
    return open_images(str(place), "reference")


def assert_same(a: FeatureSet, b: FeatureSet) -> None:
    assert a.number == b.number
    np.testing.assert_array_equal(a.statistics.mean, b.statistics.mean)
    np.testing.assert_allclose(a.statistics.root, b.statistics.root, rtol=0, atol=1e-15)
    assert (a.rows is None) == (b.rows is None)
    if a.rows is not None and b.rows is not None:
        np.testing.assert_array_equal(a.rows, b.rows)


def stored(cache: Path) -> list[Path]:
    return sorted(cache.glob("*"))


# --- through the command ----------------------------------------------------------------------------------------------


def figures(tmp_path: Path, *overrides: str) -> dict[str, Any]:
    outcome = call("evaluate.py", "samples=fake", "reference=real", "out=out", *overrides, cwd=tmp_path)
    assert outcome.status == 0, outcome.err
    values: dict[str, Any] = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    del values["date"]
    return values


def test_same_result_with_and_without(tmp_path: Path, real: Path, cache: Path, network: Means) -> None:
    noise_images(tmp_path / "fake", 20, 1)
    without = figures(tmp_path, "cache=false")
    assert not cache.exists()
    calls = network.calls
    first = figures(tmp_path)
    assert len(stored(cache)) == 1 and network.calls == 2 * calls
    before = files(cache)
    second = figures(tmp_path)
    assert network.calls == 2 * calls + 2  # those of the samples alone: 20 images, 16 at a time
    assert files(cache) == before
    assert without == first == second


# --- keys -------------------------------------------------------------------------------------------------------------


def test_the_folder_is_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert user_cache(REFERENCES) == tmp_path / "cache" / "dpm_scales" / "references"
    for value in ("", "relative/path"):  # which the XDG rules tell to ignore
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        assert user_cache(REFERENCES) == tmp_path / "home" / ".cache" / "dpm_scales" / "references"


def test_a_changed_image_is_another_key(real: Path) -> None:
    before = opened(real).digest()
    assert opened(real).digest() == before
    path = real / "000017.png"
    pixels = np.array(Image.open(path))
    pixels[3, 5] ^= 1
    Image.fromarray(pixels).save(path)
    changed = opened(real).digest()
    (real / "000029.png").unlink()
    fewer = opened(real).digest()
    (real / "000000.png").rename(real / "000099.png")
    moved = opened(real).digest()
    assert len({before, changed, fewer, moved}) == 4
    (real / "000001.png").rename(real / "000000.png")  # another name in the same order is nothing
    assert opened(real).digest() == moved


def test_other_pixels_of_a_data_set_are_another_key() -> None:
    source = Digits()
    before = data_images(source, "val", "digits").digest()
    assert data_images(source, "train", "digits").digest() != before
    assert data_images(source, "val", "digits", limit=50).digest() != before
    assert data_images(Digits(split_seed=1), "val", "digits").digest() != before
    assert data_images(Digits(), "val", "by another name").digest() == before
    source.val().images[7, 0, 1, 1] ^= 1
    assert data_images(source, "val", "digits").digest() != before


def test_other_networks_and_resizings_are_other_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    network, other = Means(), Means(hash="1" * 64)
    keys = {reference_key("content", network), reference_key("content", other), reference_key("others", network)}
    monkeypatch.setattr(network, "input_side", 7)
    keys.add(reference_key("content", network))
    monkeypatch.setattr(network, "name", "renamed")
    keys.add(reference_key("content", network))
    assert len(keys) == 5


# --- files ------------------------------------------------------------------------------------------------------------


def test_what_a_file_holds(real: Path, cache: Path) -> None:
    """Anyone can read it, and nothing in it is executed."""
    network = Means()
    features = reference_features(opened(real), network, 8, folder=cache)
    (path,) = stored(cache)
    assert path.name == f"{reference_key(opened(real).digest(), network)}.safetensors"
    with safetensors.safe_open(path, framework="pt") as file:
        rows, mean, root = (file.get_tensor(name) for name in ("rows", "mean", "root"))
        metadata = json.loads(file.metadata()["dpm_scales"])
    assert (metadata["number"], metadata["network"], metadata["weights"]) == ("30", "means", "0" * 64)
    np.testing.assert_array_equal(rows.numpy(), features.rows)
    np.testing.assert_allclose(mean.numpy(), features.rows.mean(0, dtype=np.float64), atol=1e-12)  # type: ignore[union-attr]
    covariance = np.cov(rows.double().numpy(), rowvar=False)
    np.testing.assert_allclose((root.T @ root).numpy(), covariance, atol=1e-12)


@pytest.mark.parametrize("place", ["header", "tensors", "end", "nothing", "foreign", "number"])
def test_a_damaged_file_is_made_again(place: str, real: Path, cache: Path) -> None:
    """One bit among the numbers too, which the format itself would not notice."""
    expected = reference_features(opened(real), Means(), 8)
    reference_features(opened(real), Means(), 8, folder=cache)
    (path,) = stored(cache)
    content = bytearray(path.read_bytes())
    sound = bytes(content)
    if place == "header":
        content[12] ^= 255
    elif place == "tensors":
        content[-100] ^= 1
    elif place == "number":
        at = content.index(rb"\"number\": \"30\"")
        content[at : at + 17] = content[at : at + 17].replace(b"30", b"31")
    path.write_bytes({"end": sound[:-50], "nothing": b"", "foreign": b"import os"}.get(place, bytes(content)))
    network = Means()
    with pytest.warns(UserWarning, match="is damaged .*; the reference's features are computed again"):
        assert_same(reference_features(opened(real), network, 8, folder=cache), expected)
    assert network.calls == 4 and path.read_bytes() == sound
    assert_same(reference_features(opened(real), network, 8, folder=cache), expected)
    assert network.calls == 4


def test_large_tables_are_not_kept(real: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their statistics are, which is all that the Fréchet distance needs."""
    monkeypatch.setattr(reference_cache, "KEPT_BYTES", 30 * DIM * 4 - 1)
    network = Means()
    whole = reference_features(opened(real), network, 8, folder=cache)
    assert whole.rows is not None and whole.rows.shape == (30, DIM)
    (path,) = stored(cache)
    with safetensors.safe_open(path, framework="pt") as file:
        assert set(file.keys()) == {"mean", "root"}
    calls = network.calls
    moments = reference_features(opened(real), network, 8, keep_rows=False, folder=cache)
    assert network.calls == calls and moments.rows is None
    np.testing.assert_allclose(moments.statistics.covariance, whole.statistics.covariance, atol=1e-14)
    again = reference_features(opened(real), network, 8, folder=cache)
    assert network.calls == 2 * calls
    assert_same(again, whole)


def test_features_are_kept_for_later_where_they_fit(real: Path, cache: Path) -> None:
    network = Means()
    reference_features(opened(real), network, 8, keep_rows=False, folder=cache)
    calls = network.calls
    assert reference_features(opened(real), network, 8, keep_rows=True, folder=cache).rows is not None
    assert network.calls == calls


def test_a_cache_that_cannot_be_written_costs_nothing_but_time(real: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in its place")
    with pytest.warns(UserWarning, match="the reference's features are not kept: cannot write"):
        features = reference_features(opened(real), Means(), 8, folder=tmp_path / "file" / "cache")
    assert_same(features, reference_features(opened(real), Means(), 8))


def test_images_come_whole_and_in_order(real: Path, tmp_path: Path) -> None:
    """Batches of one size each, however they are cut; `limit` spreads evenly."""
    for i, size in enumerate([(8, 8), (8, 8), (5, 9), (8, 8)]):
        Image.fromarray(np.full((*size, 3), i, dtype=np.uint8)).save(tmp_path / f"m{i}.png")
    (tmp_path / "mixed").mkdir()
    for path in tmp_path.glob("m?.png"):
        path.rename(tmp_path / "mixed" / path.name)
    shapes = [tuple(batch.shape) for batch in opened(tmp_path / "mixed").batches(2)]
    assert shapes == [(2, 3, 8, 8), (1, 3, 5, 9), (1, 3, 8, 8)]
    whole = torch.cat(list(opened(real).batches(7)))
    assert whole.shape == (30, 3, 8, 8)
    for i in (0, 13, 29):
        assert torch.equal(whole[i, 0], torch.from_numpy(np.array(Image.open(real / f"{i:06d}.png"))))
    few = torch.cat(list(open_images(str(real), "reference", limit=4).batches(3)))
    assert torch.equal(few, whole[[0, 7, 15, 22]])
