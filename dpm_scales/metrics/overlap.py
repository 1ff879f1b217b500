r"""Overlap of two sets of images, measured by balls around each image's features.

With r_k(x) the distance of x to its k-th nearest neighbour in its own set (excluding itself), features x_i of N real
images and y_j of M fake ones:

    precision   share of the y_j with |y_j - x_i| <= r_k(x_i) for some i       (Kynkäänniemi et al. 2019, Eq. (1), (2))
    recall      share of the x_i with |x_i - y_j| <= r_k(y_j) for some j
    density     number of pairs with |y_j - x_i| < r_k(x_i), over k M          (Naeem et al. 2020, Eq. (3))
    coverage    share of the x_i with |y_j - x_i| < r_k(x_i) for some j        (Eq. (4))

The strict signs are those of the authors' code: a set against itself has density 1. All but density lie in [0, 1].

Squared distances are float64 products of centred features; those that differ by less than `TIE` relative to their size
count as equal, so that a copy is at distance 0 and results do not depend on the order of summation. Tables are computed
in parts: besides float64 copies of the features, memory is of order `TABLE_CELLS`, whatever the number of images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from dpm_scales.errors import UserError, require_number
from dpm_scales.metrics.distances import check_same_dimension, feature_rows

Array = NDArray[Any]

PRECISION_NEIGHBOURS = 3
"""k of precision and recall in Kynkäänniemi et al. 2019."""

DENSITY_NEIGHBOURS = 5
"""k of density and coverage in Naeem et al. 2020."""

TABLE_CELLS = 2**22
"""Number of squared distances held in memory at once: 32 MiB."""

TIE = 1e-11
"""Relative difference below which squared distances count as equal."""


class Manifolds(NamedTuple):
    """Overlap of two sets, by the definitions of this module."""

    precision: float
    recall: float
    density: float
    coverage: float


def manifolds(
    real: Array | Tensor,
    fake: Array | Tensor,
    precision_neighbours: int = PRECISION_NEIGHBOURS,
    density_neighbours: int = DENSITY_NEIGHBOURS,
    on_rows: Callable[[int], None] | None = None,
) -> Manifolds:
    """Return the overlap of features (N, d) of real images and (M, d) of fake ones.

    All pairs of images are compared: the time grows with N^2 + M^2 + M N, the memory with N + M.

    Args:
        precision_neighbours: k of precision and recall, >= 1.
        density_neighbours: k of density and coverage, >= 1.
        on_rows: called with the number of rows done since the last call; N + 2 M in all.

    Raises:
        UserError: a set with no more images than neighbours, or k < 1.
        ValueError: features of another shape or of different dimensions, or not finite.
    """
    require_number("precision_neighbours", precision_neighbours, 1, whole=True)
    require_number("density_neighbours", density_neighbours, 1, whole=True)
    x, y = feature_rows(real), feature_rows(fake)
    check_same_dimension(x.shape[1], y.shape[1])
    needed = 1 + max(precision_neighbours, density_neighbours)
    if min(len(x), len(y)) < needed:
        raise UserError(f"nearest neighbours need {needed} images or more in each set, got {len(x)} and {len(y)}")
    middle = x.mean(axis=0)
    x -= middle
    y -= middle
    real_wide, real_narrow = _radii(x, (precision_neighbours, density_neighbours), on_rows)
    (fake_wide,) = _radii(y, (precision_neighbours,), on_rows)
    real_wide, fake_wide, real_narrow = real_wide * (1 + TIE), fake_wide * (1 + TIE), real_narrow * (1 - TIE)

    fakes_inside = pairs = 0
    held = np.zeros(len(x), dtype=bool)  # inside a ball around a fake image
    covered = np.zeros(len(x), dtype=bool)
    for rows, table in _tables(y, x):
        fakes_inside += int((table <= real_wide).any(axis=1).sum())
        held |= (table <= fake_wide[rows, None]).any(axis=0)
        near = table < real_narrow
        covered |= near.any(axis=0)
        pairs += int(near.sum())
        if on_rows is not None:
            on_rows(len(table))
    return Manifolds(
        precision=fakes_inside / len(y),
        recall=float(held.mean()),
        density=pairs / (density_neighbours * len(y)),
        coverage=float(covered.mean()),
    )


def _radii(
    points: Array, neighbours: tuple[int, ...], on_rows: Callable[[int], None] | None = None
) -> tuple[Array, ...]:
    """Return the squared distance (n,) of each point to its k-th nearest neighbour, for each k."""
    parts = []
    for rows, table in _tables(points, points):
        table[np.arange(len(table)), np.arange(rows.start, rows.stop)] = np.inf
        places = [k - 1 for k in neighbours]
        parts.append(np.partition(table, places, axis=1)[:, places])
        if on_rows is not None:
            on_rows(len(table))
    return tuple(np.concatenate(parts).T)


def _tables(a: Array, b: Array) -> Iterator[tuple[slice, Array]]:
    """Yield row slices of a (n, d), and their squared distances to all of b (m, d)."""
    squares_a, squares_b = (a**2).sum(axis=1), (b**2).sum(axis=1)
    step = max(1, TABLE_CELLS // len(b))
    for start in range(0, len(a), step):
        rows = slice(start, min(start + step, len(a)))
        sizes = squares_a[rows, None] + squares_b
        table = sizes - 2 * a[rows] @ b.T
        table[table <= TIE * sizes] = 0
        yield rows, table
