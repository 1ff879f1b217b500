r"""Distances between two sets of images, taken in the features of a network.

With features a of n_a images and b of n_b images, means m and covariances C (divisor n - 1)

    Fréchet   ||m_a - m_b||^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2))                        (Heusel et al. 2017, Eq. (6))
    kernel    mean k(a_i, a_j) + mean k(b_i, b_j) - 2 mean k(a_i, b_j),  k(x, y) = (x'y / d + 1)^3,
              i != j in the first two: the unbiased MMD^2 of Bińkowski et al. 2018

They are called FID and KID for Inception's features only: see `features`. All sums are float64. The Fréchet distance of
n images has a bias of about 1/n: compare only sets of equal size. The kernel distance is unbiased, so it can be
negative.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from dpm_scales.errors import UserError, require, require_number

Array = NDArray[Any]

FOLD_ROWS = 1024
"""Number of feature rows, or d if that is larger, collected before they are factorised."""

KERNEL_SUBSETS = 100
KERNEL_SUBSET_SIZE = 1000
"""Number and size of the random subsets, as in clean-fid; a set with fewer images than that determines the size."""


class FeatureStatistics:
    """Number, mean and covariance of features that come in batches, in O(d^2) memory whatever their number.

    The covariance is stored as a factor R, R'R = sum_i (f_i - m)(f_i - m)'. Two sets of n_1 and n_2 features with means
    m_1 and m_2 merge into the triangular factor of the rows R_1, R_2 and (n_1 n_2 / (n_1 + n_2))^(1/2) (m_1 - m_2)
    (Chan et al. 1983, in factored form): nothing is squared, so no digits are lost.
    """

    def __init__(self) -> None:
        self._number = 0
        self._mean: Array = np.zeros(0)
        self._factor: Array = np.zeros((0, 0))
        self._waiting: list[Array] = []

    @staticmethod
    def of(number: int, mean: Array | Tensor, root: Array | Tensor) -> FeatureStatistics:
        """Return statistics from the values of their attributes: number >= 2, mean (d,) and root (r, d).

        Raises: ValueError for inconsistent shapes, or values that are not finite.
        """
        middle, factor = feature_rows(mean[None])[0], feature_rows(root)
        if number < 2 or middle.shape != factor.shape[1:]:
            raise ValueError(f"no statistics: number {number}, mean {middle.shape}, root {factor.shape}")
        statistics = FeatureStatistics()
        statistics._number, statistics._mean = number, middle
        statistics._factor = factor * np.sqrt(number - 1)
        return statistics

    @staticmethod
    def of_rows(features: Array | Tensor) -> FeatureStatistics:
        """Return the statistics of features (n, d), added in parts, without a second copy of all features.

        Raises: ValueError as `update` does.
        """
        statistics = FeatureStatistics()
        step = max(FOLD_ROWS, features.shape[-1])
        for start in range(0, max(len(features), 1), step):
            statistics.update(features[start : start + step])
        return statistics

    def update(self, features: Array | Tensor) -> FeatureStatistics:
        """Add features (n, d), n >= 0, of any float dtype; return the statistics themselves.

        Raises: ValueError for another shape, another d than before, or values that are not finite.
        """
        rows = feature_rows(features)
        if self.number == 0 and not self._waiting:
            self._mean, self._factor = np.zeros(rows.shape[1]), np.zeros((0, rows.shape[1]))
        check_same_dimension(rows.shape[1], self.dim)
        self._waiting.append(rows)
        if sum(map(len, self._waiting)) >= max(FOLD_ROWS, self.dim):
            self._fold()
        return self

    @property
    def number(self) -> int:
        """Return the number of images added."""
        return self._number + sum(map(len, self._waiting))

    @property
    def dim(self) -> int:
        """Return d, or 0 before the first batch."""
        return len(self._mean)

    @property
    def mean(self) -> Array:
        """Return the mean m, float64 (d,)."""
        self._fold()
        return self._mean

    @property
    def root(self) -> Array:
        """Return X with X'X = C, of at most d rows, float64 (min(n + 1, d), d).

        Raises: UserError for fewer than two images.
        """
        self._fold()
        require(self.number >= 2, f"a covariance needs 2 images or more, got {self.number}")
        return self._factor / np.sqrt(self._number - 1)

    @property
    def covariance(self) -> Array:
        """Return the covariance C, float64 (d, d)."""
        root = self.root
        return np.asarray(root.T @ root)

    def _fold(self) -> None:
        if not self._waiting:
            return
        rows = np.concatenate(self._waiting)
        self._waiting = []
        if len(rows) == 0:
            return
        total = self._number + len(rows)
        mean = rows.mean(axis=0)
        shift = mean - self._mean
        between = np.sqrt(self._number * len(rows) / total) * shift
        self._factor = np.asarray(np.linalg.qr(np.vstack([self._factor, rows - mean, between]), mode="r"))
        self._mean = self._mean + shift * (len(rows) / total)
        self._number = total


def frechet_distance(a: Array | Tensor | FeatureStatistics, b: Array | Tensor | FeatureStatistics) -> float:
    """Return the Fréchet distance of the Gaussians fitted to two sets, >= 0.

    With C = X'X the trace of (C_a C_b)^(1/2) is the nuclear norm of X_a X_b', a matrix of at most d x d, so no root is
    taken of a matrix that is singular whenever there are fewer images than features.

    Args:
        a, b: features (n, d), n >= 2, or their statistics.

    Raises:
        UserError: fewer than two images.
        ValueError: features of another shape or of different dimensions, or not finite.
    """
    first, second = (x if isinstance(x, FeatureStatistics) else FeatureStatistics.of_rows(x) for x in (a, b))
    check_same_dimension(first.dim, second.dim)
    roots = first.root, second.root
    cross = np.linalg.svd(roots[0] @ roots[1].T, compute_uv=False).sum()
    traces = sum(float((root**2).sum()) for root in roots)
    return max(0.0, float(((first.mean - second.mean) ** 2).sum() + traces - 2 * cross))


class KernelDistance(NamedTuple):
    """A kernel distance and its standard error."""

    value: float
    std_error: float


def kernel_distance(
    a: Array | Tensor,
    b: Array | Tensor,
    subsets: int = KERNEL_SUBSETS,
    subset_size: int = KERNEL_SUBSET_SIZE,
    seed: int = 0,
    on_subset: Callable[[int], None] | None = None,
) -> KernelDistance:
    """Return the kernel distance of features (n_a, d) and (n_b, d), n >= 2: a mean over random subsets.

    `on_subset` is called with 1 after each of `kernel_subsets(n_a, n_b)`. Time and memory, beyond the features
    themselves, do not grow with their number once it is above `subset_size`.

    As in clean-fid each of `subsets` draws takes min(n_a, n_b, `subset_size`) images of both sets, without repetition;
    a single draw is made if that is all of both. The subsets overlap, so their spread understates the error. The
    standard error is that of the estimate as a function of the images: to first order the distance is a mean over them
    of

        2 g(a_i),  g(x) = mean_j k(x, a_j) - mean_j k(x, b_j)     and     -2 g(b_j),

    so its variance is 4 var g(a) / n_a + 4 var g(b) / n_b, with the variances averaged over the subsets. It is
    conservative where the two sets have the same law, since the first order vanishes there.

    Raises:
        UserError: fewer than two images, or `subsets` < 1, or `subset_size` < 2.
        ValueError: features of another shape or of different dimensions, or not finite.
    """
    require_number("subsets", subsets, 1, whole=True)
    require_number("subset_size", subset_size, 2, whole=True)
    for features in (a, b):
        check_features(features)
    check_same_dimension(a.shape[1], b.shape[1])
    number_a, number_b = len(a), len(b)
    size = min(number_a, number_b, subset_size)
    if size < 2:
        raise UserError(f"a kernel distance needs 2 images or more in each set, got {number_a} and {number_b}")
    rng = np.random.default_rng(seed)
    draws = []
    for _ in range(kernel_subsets(number_a, number_b, subsets, subset_size)):
        parts = (feature_rows(features[rng.permutation(len(features))[:size]]) for features in (a, b))
        draws.append(_kernel_distance_of_equals(*parts))
        if on_subset is not None:
            on_subset(1)
    value, variance_a, variance_b = np.mean(draws, axis=0)
    return KernelDistance(float(value), float(np.sqrt(variance_a / number_a + variance_b / number_b)))


def kernel_subsets(
    number_a: int, number_b: int, subsets: int = KERNEL_SUBSETS, subset_size: int = KERNEL_SUBSET_SIZE
) -> int:
    """Return the number of subsets over which the kernel distance is averaged: one if it would hold all features."""
    return 1 if number_a == number_b <= subset_size else subsets


def _kernel_distance_of_equals(a: Array, b: Array) -> tuple[float, float, float]:
    """Return the distance of two sets of features (m, d), and the variances of 2 g over the images of each set."""
    size = len(a)
    cross = _kernel(a, b)
    within_a, within_b = ((k.sum(axis=1) - k.diagonal()) / (size - 1) for k in (_kernel(a, a), _kernel(b, b)))
    value = within_a.mean() + within_b.mean() - 2 * cross.mean()
    return (
        float(value),
        float(4 * (within_a - cross.mean(axis=1)).var(ddof=1)),
        float(4 * (within_b - cross.mean(axis=0)).var(ddof=1)),
    )


def _kernel(x: Array, y: Array) -> Array:
    """Return k of all pairs, (n_x, n_y)."""
    base = x @ y.T / x.shape[1] + 1
    return np.asarray(base * base * base)


def feature_rows(features: Array | Tensor) -> Array:
    """Return a copy of features as float64 (n, d) in host memory.

    Raises: ValueError for another shape, or values that are not finite.
    """
    values = features.detach().cpu().double().numpy() if isinstance(features, Tensor) else features
    rows = np.array(values, dtype=np.float64)
    check_features(rows)
    return rows


def check_features(features: Array | Tensor) -> None:
    """Raise ValueError unless features are (n, d), d > 0, and finite."""
    if features.ndim != 2 or features.shape[1] == 0:
        raise ValueError(f"expected features (n, d), got {tuple(features.shape)}")
    for start in range(0, len(features), FOLD_ROWS):
        part = features[start : start + FOLD_ROWS]
        if not bool((part.isfinite() if isinstance(part, Tensor) else np.isfinite(part)).all()):
            raise ValueError("features must be finite")


def check_same_dimension(first: int, second: int) -> None:
    """Raise ValueError unless two sets have features of the same dimension."""
    if first != second:
        raise ValueError(f"expected features of one dimension, got {first} and {second}")
