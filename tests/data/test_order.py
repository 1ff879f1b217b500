"""Orders of shards: every image once an epoch, shards together, one number resumes, whatever the ranks."""

from __future__ import annotations

import numpy as np
import pytest

from dpm_scales.data.order import Permuted, Windowed
from dpm_scales.data.sampler import ShuffledBatches


def twin(counts: list[int], window: int, seed: int, epoch: int) -> list[int]:
    """The whole order of an epoch, from the text of the docstring."""
    starts = np.concatenate([[0], np.cumsum(counts)])
    shards = np.random.default_rng((seed, epoch)).permutation(len(counts))
    order: list[int] = []
    for number in range(-(-len(counts) // window)):
        images = [i for s in shards[number * window : (number + 1) * window] for i in range(starts[s], starts[s + 1])]
        order += np.random.default_rng((seed, epoch, number, 1)).permutation(images).astype(int).tolist()
    return order


@pytest.mark.parametrize(("counts", "window"), [([5, 3, 8, 1, 4], 2), ([7], 3), ([2, 0, 6], 1), ([3, 3, 3, 3], 4)])
def test_the_order_is_that_of_its_definition(counts: list[int], window: int) -> None:
    order = Windowed(counts, window, seed=3)
    total = sum(counts)
    for epoch in (0, 1, 0):
        whole = order(epoch, np.arange(total)).tolist()
        assert whole == twin(counts, window, 3, epoch) and sorted(whole) == list(range(total))
        # by places in any order, across windows
        places = np.random.default_rng(epoch).permutation(total)
        assert order(epoch, places).tolist() == [whole[place] for place in places]
    assert twin(counts, window, 3, 0) != twin(counts, window, 3, 1)


def test_unshuffled_windows_stay_in_place() -> None:
    order = Windowed([4] * 5, 1, seed=0, shuffled=False)(7, np.arange(20))
    assert np.array_equal(np.sort(order.reshape(5, 4), 1), np.arange(20).reshape(5, 4))
    assert not np.array_equal(order, np.arange(20))


def test_windows_are_announced_with_the_next() -> None:
    told: list[tuple[list[int], list[int]]] = []
    order = Windowed([2] * 5, 2, seed=1, on_window=lambda now, after: told.append((now, after)))
    order(0, np.arange(10))
    first, second = (np.random.default_rng((1, epoch)).permutation(5).tolist() for epoch in (0, 1))
    assert told == [(first[:2], first[2:4]), (first[2:4], first[4:]), (first[4:], second[:2])]


def test_a_window_holds_no_more_than_its_shards() -> None:
    """10^9 images: a permutation of all would take 8 GB."""
    order = Windowed([10_000] * 100_000, 2, seed=0)
    found = order(5, np.arange(500_000_000, 500_000_100))
    assert len(set(found.tolist())) == 100 and len(order._order) == 20_000


@pytest.mark.parametrize(("ranks", "size"), [(1, 6), (2, 3), (3, 2), (6, 1)])
def test_ranks_share_the_batches_of_one(ranks: int, size: int) -> None:
    """From any batch on, and with more ranks than shards."""
    counts = [5, 9, 3, 6]
    alone = list(ShuffledBatches(23, 6, 0, lambda: 0, order=Windowed(counts, 2, 0)))
    alone += list(ShuffledBatches(23, 6, 0, lambda: 3, order=Windowed(counts, 2, 0)))  # the next epoch
    for start in (0, 2):
        parts = [
            list(ShuffledBatches(23, size, 0, lambda: start, True, r, ranks, order=Windowed(counts, 2, 0)))  # noqa: B023
            for r in range(ranks)
        ]
        for batch in range(3):
            joined = {key for part in parts for key in part[batch * size : (batch + 1) * size]}
            assert joined == set(alone[(start + batch) * 6 : (start + batch + 1) * 6])


def test_the_default_order_is_that_of_earlier_versions() -> None:
    keys = list(ShuffledBatches(10, 3, 4, lambda: 4))
    epoch = [np.random.default_rng((4, e)).permutation(10).tolist() for e in (1, 2)]
    assert keys == [(i, 1) for i in epoch[0][3:9]] + [(i, 2) for i in epoch[1][:3]]
    filled = list(ShuffledBatches(4, 3, 0, lambda: 0, drop_last=False))
    first = np.random.default_rng((0, 0)).permutation(4).tolist()
    assert [i for i, _ in filled] == [*first, *first[:2]]
    assert Permuted(3, 0).keys() == {}
