"""Precision, recall, density and coverage against the definitions written out, and sets whose figures are known."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from dpm_scales.errors import UserError
from dpm_scales.metrics import (
    FeatureSet,
    FeatureStatistics,
    compare,
    frechet_distance,
    gather,
    kernel_distance,
    manifolds,
)
from dpm_scales.metrics import overlap as overlap_module
from support.evaluate_helpers import DIM, Means

Array = NDArray[Any]


def written_out(real: Array, fake: Array, k: int, k_density: int) -> tuple[float, float, float, float]:
    """One pair after the other: Kynkäänniemi et al. 2019, Eq. (1); Naeem et al. 2020, Eq. (3), (4)."""

    def radius(points: Array, index: int, neighbours: int) -> float:
        others = [float(np.linalg.norm(points[index] - p)) for i, p in enumerate(points) if i != index]
        return sorted(others)[neighbours - 1]

    def inside(point: Array, points: Array) -> bool:
        return any(np.linalg.norm(point - p) <= radius(points, i, k) for i, p in enumerate(points))

    near = [[bool(np.linalg.norm(y - x) < radius(real, i, k_density)) for y in fake] for i, x in enumerate(real)]
    return (
        float(np.mean([inside(y, real) for y in fake])),
        float(np.mean([inside(x, fake) for x in real])),
        float(np.sum(near) / (k_density * len(fake))),
        float(np.mean(np.any(near, axis=1))),
    )


@pytest.mark.parametrize(("n", "m"), [(25, 31), (40, 12)])
@pytest.mark.parametrize(("k", "k_density"), [(1, 1), (3, 5), (4, 2)])
@pytest.mark.parametrize("cells", [7, 60, 2**22])
def test_figures_are_the_definitions_written_out(
    n: int, m: int, k: int, k_density: int, cells: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one table, and in tables of one row."""
    monkeypatch.setattr("dpm_scales.metrics.overlap.TABLE_CELLS", cells)
    rng = np.random.default_rng(n + k)
    real, fake = rng.normal(size=(n, 3)), 0.4 + 1.2 * rng.normal(size=(m, 3))
    expected = written_out(real, fake, k, k_density)
    assert 0 < min(expected) and min(expected) < 1
    assert manifolds(real, fake, k, k_density) == pytest.approx(expected, abs=1e-12)
    single = manifolds(real.astype(np.float32), torch.from_numpy(fake).float(), k, k_density)
    assert single == pytest.approx(expected, abs=1e-12)


def test_a_set_against_itself_overlaps_wholly() -> None:
    """In any order, in single precision, far from zero: no tie is left to rounding."""
    rng = np.random.default_rng(0)
    for points in (rng.normal(size=(50, 4)), rng.normal(size=(300, 64)), 1e4 + rng.normal(size=(80, 6))):
        for dtype in (np.float32, np.float64):
            assert manifolds(points.astype(dtype), rng.permutation(points.astype(dtype))) == (1, 1, 1, 1)


def test_sets_apart_do_not_overlap() -> None:
    rng = np.random.default_rng(1)
    real, fake = rng.normal(size=(2, 40, 5))
    assert manifolds(real, fake + 100) == (0, 0, 0, 0)


def test_a_case_by_hand() -> None:
    """On a line, k = 1. Real balls have the radius 1, fake ones 1/4, 1/4 and 37/4.

    The real 1 lies on the rim of the ball around 3/4, which counts; the reals 2 and 3 lie in the one around 10.
    """
    real, fake = np.array([[0.0], [1.0], [2.0], [3.0]]), np.array([[0.5], [0.75], [10.0]])
    assert manifolds(real, fake, 1, 1) == pytest.approx((2 / 3, 3 / 4, 4 / 3, 2 / 4))
    # 4 lies on the rim of the ball around 3, which counts for precision alone
    rim = manifolds(real, np.array([[4.0], [50.0]]), 1, 1)
    assert (rim.precision, rim.density, rim.coverage) == (0.5, 0, 0)


def test_samples_of_few_real_images_have_precision_and_no_recall() -> None:
    """Copies with a little noise of five images of two hundred: precise, and they cover next to nothing."""
    rng = np.random.default_rng(2)
    real = rng.normal(size=(200, 8))
    fake = np.repeat(real[:5], 40, axis=0) + 1e-3 * rng.normal(size=(200, 8))
    overlap = manifolds(real, fake)
    assert overlap.precision == 1 and overlap.recall < 0.05 and overlap.coverage < 0.4
    wide = manifolds(fake, real)  # the other way round: what was recall is precision now
    assert (wide.precision, wide.recall) == (overlap.recall, overlap.precision)


def test_copies_of_copies() -> None:
    """Balls of radius 0 hold what is at their centre, where rims count."""
    rng = np.random.default_rng(3)
    points = rng.normal(size=(40, 65))
    copies = np.concatenate([table for _, table in overlap_module._tables(points, points.copy())])
    assert (copies.diagonal() == 0).all() and (copies >= 0).all()  # to the last bit, though made of large squares
    real = np.repeat(rng.normal(size=(4, 3)), 6, axis=0)
    overlap = manifolds(real, real[::6].repeat(6, axis=0) + 0.0)
    assert (overlap.precision, overlap.recall) == (1, 1)


def test_one_law_has_density_one() -> None:
    """Naeem et al. 2020, Sect. 3.2: the expectation of density is 1, that of coverage 1 - prod (1 - k / (2 N - j))."""
    rng = np.random.default_rng(4)
    draws = np.array([manifolds(*rng.normal(size=(2, 60, 4)), 5, 5) for _ in range(60)])
    spread = draws.std(axis=0) / np.sqrt(60)
    n, k = 60, 5
    coverage = 1 - np.prod([(n - i) / (2 * n - 1 - i) for i in range(k)])
    assert abs(draws[:, 2].mean() - 1) < 4 * spread[2]
    assert abs(draws[:, 3].mean() - coverage) < 4 * spread[3]


def test_memory_is_that_of_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, tables = [], overlap_module._tables

    def spy(a: Array, b: Array) -> Any:
        for rows, table in tables(a, b):
            sizes.append(table.size)
            yield rows, table

    monkeypatch.setattr(overlap_module, "_tables", spy)
    monkeypatch.setattr(overlap_module, "TABLE_CELLS", 1000)
    rng = np.random.default_rng(5)
    manifolds(rng.normal(size=(150, 3)), rng.normal(size=(90, 3)))
    assert max(sizes) <= 1000 and sum(sizes) == 150 * 150 + 90 * 90 + 90 * 150


@pytest.mark.parametrize(
    ("n", "m", "k", "message"),
    [
        (6, 5, 5, "nearest neighbours need 6 images or more in each set, got 6 and 5"),
        (1, 9, 1, "need 4 images or more in each set, got 1 and 9"),
        (9, 9, 0, "density_neighbours must be a whole number >= 1, got 0"),
    ],
)
def test_too_few_images_are_the_users(n: int, m: int, k: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        manifolds(np.zeros((n, 2)), np.zeros((m, 2)), 3, k)


def test_other_features_are_refused() -> None:
    with pytest.raises(ValueError, match="one dimension, got 3 and 4"):
        manifolds(np.zeros((9, 3)), np.zeros((9, 4)))
    with pytest.raises(ValueError, match="finite"):
        manifolds(np.full((9, 3), np.inf), np.zeros((9, 3)))


# --- all figures of two sets ------------------------------------------------------------------------------------------


def grey(number: int, seed: int) -> Tensor:
    return torch.randint(0, 256, (number, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def test_figures_are_those_of_each_function() -> None:
    network = Means()
    images = grey(40, 0), grey(30, 1) // 2
    features = [network(x).numpy() for x in images]
    assert features[0].shape == (40, DIM)
    seen: list[int] = []
    sets = [gather(network, x.split(7), on_images=seen.append) for x in images]
    assert seen == [7, 7, 7, 7, 7, 5, 7, 7, 7, 7, 2]
    for own, rows in zip(sets, features, strict=True):
        assert own.rows is not None and own.number == len(rows)
        np.testing.assert_array_equal(own.rows, rows)
    figures = compare(*sets, network)
    assert list(figures) == ["FD-means", "KD-means", "precision", "recall", "density", "coverage"]
    kernel = kernel_distance(features[1], features[0])
    assert figures["FD-means"].value == pytest.approx(frechet_distance(*features), rel=1e-9)
    assert (figures["KD-means"].value, figures["KD-means"].std_error) == kernel
    overlap = manifolds(*features)
    assert tuple(figures[name].value for name in overlap._fields) == overlap
    assert [figures[name].neighbours for name in overlap._fields] == [3, 3, 5, 5]
    assert [figures[name].better for name in figures] == ["lower"] * 2 + ["higher"] * 4


def test_the_frechet_distance_alone_keeps_no_features() -> None:
    network = Means()
    sets = [gather(network, grey(40, seed).split(9), keep_rows=False) for seed in (0, 1)]
    assert sets[0].rows is None
    assert list(compare(*sets, network, ["frechet"])) == ["FD-means"]
    with pytest.raises(ValueError, match="features of all images"):
        compare(*sets, network, ["kernel"])


@pytest.mark.parametrize(
    ("measures", "message"),
    [([], "measures must be a list"), ("fid", "measures must be a list"), (["frechte"], "did you mean 'frechet'")],
)
def test_measures_that_are_none(measures: Any, message: str) -> None:
    features = FeatureSet(FeatureStatistics().update(np.eye(3)), np.eye(3))
    with pytest.raises(UserError, match=message):
        compare(features, features, Means(), measures)
