"""Fréchet and kernel distances against SciPy, clean-fid, closed forms, sums written out, and repeated draws."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from cleanfid.fid import kernel_distance as cleanfid_kernel_distance
from numpy.typing import NDArray

from dpm_scales.errors import UserError
from dpm_scales.metrics import FeatureStatistics, frechet_distance, kernel_distance

Array = NDArray[Any]


def two_sets(n_a: int, n_b: int, dim: int, seed: int = 0) -> tuple[Array, Array]:
    """Features with correlations, of two laws."""
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(dim, dim)) / np.sqrt(dim)
    return rng.normal(size=(n_a, dim)) @ mixing, 0.3 + 1.5 * rng.normal(size=(n_b, dim))


# --- Fréchet ----------------------------------------------------------------------------------------------------------


def root(matrix: Array) -> Array:
    """The principal root, real part; SciPy 1.18 has no `disp` any more."""
    return np.asarray(scipy.linalg.sqrtm(matrix)).real


def by_matrix_root(a: Array, b: Array) -> float:
    """The textbook formula."""
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a + cov_b - 2 * root(cov_a @ cov_b)))


@pytest.mark.parametrize(("n_a", "n_b"), [(300, 200), (60, 500), (2500, 40)])
def test_frechet_distance_equals_the_matrix_root(n_a: int, n_b: int) -> None:
    a, b = two_sets(n_a, n_b, 12)
    assert frechet_distance(a, b) == pytest.approx(by_matrix_root(a, b), rel=1e-9)
    assert frechet_distance(b, a) == pytest.approx(frechet_distance(a, b), rel=1e-12)


def test_frechet_distance_equals_that_of_clean_fid(monkeypatch: pytest.MonkeyPatch) -> None:
    """clean-fid's own function; it calls sqrtm with an option that newer versions of SciPy lack."""
    from cleanfid import fid

    sqrtm = SimpleNamespace(sqrtm=lambda matrix, disp=True: root(matrix) if disp else (root(matrix), 0.0))
    monkeypatch.setattr(fid, "linalg", sqrtm)
    for n_a, n_b, dim in ((400, 300, 64), (700, 900, 128)):
        a, b = two_sets(n_a, n_b, dim)
        theirs = fid.frechet_distance(*(m for x in (a, b) for m in (x.mean(0), np.cov(x, rowvar=False))))
        assert frechet_distance(a, b) == pytest.approx(theirs, rel=1e-8)
        assert frechet_distance(a.astype(np.float32), torch.from_numpy(b).float()) == pytest.approx(theirs, rel=1e-4)


def test_frechet_distance_of_gaussians_in_closed_form() -> None:
    """Whitened samples have exactly the mean and covariance that they are given: diagonal ones, and rotated ones."""
    rng = np.random.default_rng(3)
    std_a, std_b = rng.uniform(0.1, 3, 7), rng.uniform(0.1, 3, 7)
    shift = rng.normal(size=7)
    rotation = np.linalg.qr(rng.normal(size=(7, 7)))[0]
    white = [np.linalg.qr(x - x.mean(0))[0] * np.sqrt(len(x) - 1) for x in rng.normal(size=(2, 90, 7))]
    a, b = white[0] * std_a, white[1] * std_b + shift
    expected = (shift**2).sum() + ((std_a - std_b) ** 2).sum()
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-10)
    assert frechet_distance(a @ rotation, b @ rotation) == pytest.approx(expected, rel=1e-10)
    assert frechet_distance(a, a + shift) == pytest.approx((shift**2).sum(), rel=1e-10)
    assert frechet_distance(a, 4 * a) == pytest.approx(9 * (std_a**2).sum(), rel=1e-10)


def test_frechet_distance_with_singular_covariances() -> None:
    """Fewer images than features: features in one plane are at the distance that they have in the plane."""
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(20, 2)), 3 + rng.normal(size=(30, 2))
    plane = np.linalg.qr(rng.normal(size=(50, 2)))[0].T
    assert frechet_distance(a @ plane, b @ plane) == pytest.approx(by_matrix_root(a, b), rel=1e-9)

    # Two images have a covariance of rank one, u u', and (u u' C)^(1/2) has the trace (u' C u)^(1/2).
    two, u, cov = a[:2], (a[0] - a[1]) / np.sqrt(2), np.cov(b, rowvar=False)
    expected = ((two.mean(0) - b.mean(0)) ** 2).sum() + u @ u + np.trace(cov) - 2 * np.sqrt(u @ cov @ u)
    assert frechet_distance(two @ plane, b @ plane) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_of_equal_sets_is_zero() -> None:
    a = np.random.default_rng(2).normal(size=(100, 8))
    assert 0.0 <= frechet_distance(a, a) < 1e-12
    assert 0.0 <= frechet_distance(a, a[::-1]) < 1e-12


@pytest.mark.parametrize("offset", [0.0, 1e6])
@pytest.mark.parametrize("batch", [1, 7, 1000, 5000])
def test_statistics_of_batches_are_those_of_the_whole(batch: int, offset: float) -> None:
    """Also far from zero, where sums of squares would lose all digits: 1e12 beside variances of 1."""
    a, b = (x + offset for x in two_sets(2300, 300, 5))
    statistics = FeatureStatistics().update(np.zeros((0, 5)))
    for start in range(0, len(a), batch):
        statistics.update(torch.from_numpy(a[start : start + batch]))
    assert (statistics.number, statistics.dim) == (2300, 5)
    np.testing.assert_allclose(statistics.mean, a.mean(0), rtol=1e-13)
    tolerance = 1e-12 if offset == 0 else 1e-8
    np.testing.assert_allclose(statistics.covariance, np.cov(a, rowvar=False), rtol=tolerance, atol=tolerance)
    assert statistics.root.shape == (5, 5)
    assert frechet_distance(statistics, b) == pytest.approx(frechet_distance(a, b), rel=1e-7)


def test_statistics_may_be_read_between_batches() -> None:
    a, _ = two_sets(1000, 2, 6)
    statistics = FeatureStatistics()
    for stop in range(100, 1001, 100):
        statistics.update(a[stop - 100 : stop])
        np.testing.assert_allclose(statistics.covariance, np.cov(a[:stop], rowvar=False), atol=1e-12)


def test_statistics_keep_no_hold_of_the_callers_array() -> None:
    a, _ = two_sets(50, 2, 3)
    buffer, statistics = a.copy(), FeatureStatistics()
    statistics.update(buffer)
    buffer[:] = 0
    np.testing.assert_allclose(statistics.mean, a.mean(0), atol=1e-13)


@pytest.mark.parametrize("number", [4, 30])
def test_statistics_come_back_from_their_values(number: int) -> None:
    """Fewer and more images than features; and they go on from there."""
    a, b = two_sets(number, 50, 8)
    before = FeatureStatistics().update(a)
    after = FeatureStatistics.of(before.number, before.mean, torch.from_numpy(before.root))
    assert (after.number, after.dim) == (number, 8)
    assert frechet_distance(after, b) == pytest.approx(frechet_distance(a, b), rel=1e-10)
    after.update(b)
    np.testing.assert_allclose(after.covariance, np.cov(np.vstack([a, b]), rowvar=False), atol=1e-12)
    for values in ((1, before.mean, before.root), (number, before.mean[1:], before.root)):
        with pytest.raises(ValueError, match="no statistics"):
            FeatureStatistics.of(*values)
    with pytest.raises(ValueError, match="finite"):
        FeatureStatistics.of(number, np.full(8, np.nan), before.root)


def test_statistics_need_memory_of_the_dimension_alone() -> None:
    statistics = FeatureStatistics()
    for seed in range(30):
        statistics.update(np.random.default_rng(seed).normal(size=(500, 4)))
        held = statistics._factor.size + sum(x.size for x in statistics._waiting)
        assert held <= 4 * (1024 + 500)
    assert statistics.number == 15000


# --- kernel -----------------------------------------------------------------------------------------------------------


def by_loops(a: Array, b: Array) -> float:
    """The unbiased MMD^2 of Bińkowski et al., one pair after the other."""

    def kernel(x: Array, y: Array) -> float:
        return float(x @ y / len(x) + 1) ** 3

    def within(x: Array) -> float:
        return float(np.mean([kernel(x[i], x[j]) for i, j in itertools.permutations(range(len(x)), 2)]))

    return within(a) + within(b) - 2 * float(np.mean([kernel(x, y) for x in a for y in b]))


def test_kernel_distance_equals_the_sums_written_out() -> None:
    a, b = two_sets(23, 23, 7)
    assert kernel_distance(a, b).value == pytest.approx(by_loops(a, b), rel=1e-10)
    assert kernel_distance(b, a).value == pytest.approx(by_loops(a, b), rel=1e-10)


@pytest.mark.parametrize("dim", [16, 300])
def test_kernel_distance_equals_that_of_clean_fid(dim: int) -> None:
    """Sets of one size below 1000 leave nothing to chance in either."""
    a, b = two_sets(220, 220, dim)
    theirs = cleanfid_kernel_distance(a, b, num_subsets=3)
    assert kernel_distance(a, b).value == pytest.approx(theirs, rel=1e-9)
    single = kernel_distance(a.astype(np.float32), torch.from_numpy(b).float()).value
    assert single == pytest.approx(theirs, rel=1e-4)


def test_subsets_average_to_the_distance_of_the_whole() -> None:
    """Of sets of two sizes: the mean over all subsets is the complete statistic, here within four deviations."""
    a, b = two_sets(90, 140, 9)
    estimates = [kernel_distance(a, b, subsets=40, subset_size=30, seed=seed).value for seed in range(12)]
    np.random.seed(0)  # noqa: NPY002 - clean-fid draws from the global generator
    theirs = cleanfid_kernel_distance(a, b, num_subsets=400, max_subset_size=30)
    assert abs(np.mean(estimates) - by_loops(a, b)) < 4 * np.std(estimates) / np.sqrt(12)
    assert abs(np.mean(estimates) - theirs) < 4 * np.std(estimates) * np.sqrt(1 / 12 + 1 / 10)
    assert np.std(estimates) < 0.1 * by_loops(a, b)


def test_kernel_distance_is_drawn_from_its_seed() -> None:
    a, b = two_sets(60, 80, 5)
    first = kernel_distance(a, b, 5, 20)
    assert first == kernel_distance(a, b, 5, 20)
    assert first != kernel_distance(a, b, 5, 20, seed=1)


def test_kernel_distance_in_closed_form() -> None:
    """Points of one feature at u and at v, all alike: (u^2 + 1)^3 + (v^2 + 1)^3 - 2 (u v + 1)^3, and no error."""
    u, v = 0.7, -1.3
    distance = kernel_distance(np.full((5, 1), u), np.full((9, 1), v))
    assert distance.value == pytest.approx((u**2 + 1) ** 3 + (v**2 + 1) ** 3 - 2 * (u * v + 1) ** 3, rel=1e-12)
    assert distance.std_error == pytest.approx(0, abs=1e-12)


def test_kernel_distance_has_no_bias() -> None:
    """Sets of one law are at distance 0 in the mean, and as often below it as above."""
    rng = np.random.default_rng(5)
    values = [kernel_distance(*rng.normal(size=(2, 20, 4))).value for _ in range(400)]
    assert abs(np.mean(values)) < 4 * np.std(values) / np.sqrt(400)
    assert 0.3 < np.mean(np.array(values) < 0) < 0.8


@pytest.mark.parametrize(("n_a", "n_b", "subset_size"), [(100, 100, 1000), (80, 160, 1000), (200, 120, 60)])
@pytest.mark.parametrize("wide", [0, 1])
def test_standard_error_is_the_spread_over_other_images(n_a: int, n_b: int, subset_size: int, wide: int) -> None:
    """Other images of the same two laws, 300 times: the errors that are stated are those that occur."""
    rng = np.random.default_rng(6)
    draws = []
    for _ in range(300):
        sets = [rng.normal(size=(n, 6)) for n in (n_a, n_b)]
        sets[wide] = 0.5 + 1.2 * sets[wide]
        draws.append(kernel_distance(*sets, subsets=20, subset_size=subset_size))
    values, errors = np.array(draws).T
    assert np.sqrt((errors**2).mean()) == pytest.approx(values.std(), rel=0.2)


def test_standard_error_of_one_law_is_on_the_safe_side() -> None:
    rng = np.random.default_rng(7)
    draws = np.array([kernel_distance(*rng.normal(size=(2, 60, 6))) for _ in range(300)])
    assert 1 < np.sqrt((draws[:, 1] ** 2).mean()) / draws[:, 0].std() < 3


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("distance", [frechet_distance, kernel_distance])
@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (np.zeros((5, 3)), np.zeros((5, 4)), "one dimension, got 3 and 4"),
        (np.zeros(5), np.zeros(5), r"features \(n, d\), got \(5,\)"),
        (np.zeros((5, 0)), np.zeros((5, 0)), r"features \(n, d\), got \(5, 0\)"),
        (np.full((5, 3), np.nan), np.zeros((5, 3)), "finite"),
        (np.zeros((5, 3)), np.full((5, 3), np.inf), "finite"),
    ],
)
def test_other_features_are_refused(distance: Any, a: Array, b: Array, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        distance(a, b)


@pytest.mark.parametrize("distance", [frechet_distance, kernel_distance])
@pytest.mark.parametrize("number", [0, 1])
def test_too_few_images_are_the_users(distance: Any, number: int) -> None:
    for a, b in ((number, 5), (5, number)):
        with pytest.raises(UserError, match=f"2 images or more.*{number}"):
            distance(np.zeros((a, 3)), np.zeros((b, 3)))


def test_statistics_of_nothing() -> None:
    with pytest.raises(UserError, match="2 images or more, got 0"):
        _ = FeatureStatistics().root
    with pytest.raises(ValueError, match="one dimension, got 4 and 3"):
        FeatureStatistics().update(np.zeros((2, 3))).update(np.zeros((2, 4)))


def test_numbers_of_subsets_that_are_none() -> None:
    a, b = two_sets(5, 5, 3)
    with pytest.raises(UserError, match="subsets must be a whole number >= 1, got 0"):
        kernel_distance(a, b, subsets=0)
    with pytest.raises(UserError, match="subset_size must be a whole number >= 2, got 1"):
        kernel_distance(a, b, subset_size=1)
