"""Orders of training images: functions of (seed, epoch) and the set alone, so that one number suffices to resume.

    order = Windowed(counts, window=8, seed=0)
    order(epoch, places)      # the images at these positions in the epoch's order

Positions are 0 … N - 1 within an epoch. The only state of an order is the last permutation drawn.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import numpy as np

Places = np.ndarray
"""Integers, (n,)."""


class EpochOrder(ABC):
    """Order of the images 0 … N - 1 in each epoch."""

    @abstractmethod
    def __call__(self, epoch: int, places: Places) -> np.ndarray:
        """Return the images, (n,), at the positions `places`, (n,), 0 … N - 1, in the order of `epoch` >= 0."""

    def keys(self) -> dict[str, int]:
        """Return the values on which the order depends besides seed and number of images, for checkpoints."""
        return {}


class Permuted(EpochOrder):
    """One permutation of all images for each epoch, drawn from (seed, epoch). It takes 8 bytes per image.

    Args:
        number: N.
        seed: >= 0.
    """

    def __init__(self, number: int, seed: int) -> None:
        self.number, self.seed = number, seed
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def __call__(self, epoch: int, places: Places) -> np.ndarray:
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = np.random.default_rng((self.seed, epoch)).permutation(self.number)
        return self._order[places]


class Windowed(EpochOrder):
    """Shards permuted by epoch, and images permuted within windows of consecutive shards of that permutation.

    The permutation of the shards is drawn from (seed, epoch), that of window w from (seed, epoch, w, 1), since a
    trailing zero would not change NumPy's seed. Memory grows with the window, not with the set.

    Args:
        counts: number of images in each shard, (S,). Images are numbered shard by shard.
        window: number of shards in a window, >= 1; the last window of an epoch may have fewer.
        seed: >= 0.
        shuffled: False keeps the shards in their order, and permutes only within windows.
        on_window: called at the start of a window with its shards and those of the next window, which may belong to
            the next epoch.
    """

    def __init__(
        self,
        counts: Sequence[int] | np.ndarray,
        window: int,
        seed: int,
        shuffled: bool = True,
        on_window: Callable[[list[int], list[int]], None] | None = None,
    ) -> None:
        self.counts = np.asarray(counts, dtype=np.int64)
        self.window, self.seed, self.shuffled, self.on_window = window, seed, shuffled, on_window
        self._starts = np.concatenate([[0], np.cumsum(self.counts)])
        self._epoch, self._shards, self._ends = -1, np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
        self._drawn: tuple[int, int] = (-1, -1)
        self._order = np.empty(0, dtype=np.int64)

    def __call__(self, epoch: int, places: Places) -> np.ndarray:
        if epoch != self._epoch:
            self._epoch, self._shards = epoch, self._shards_of(epoch)
            through = np.cumsum(self.counts[self._shards])
            self._ends = through[np.append(np.arange(self.window - 1, len(through) - 1, self.window), -1)]
        places = np.asarray(places)
        windows = np.searchsorted(self._ends, places, side="right")
        found = np.empty(len(places), dtype=np.int64)
        for number in dict.fromkeys(windows.tolist()):
            here = windows == number
            first = int(self._ends[number - 1]) if number else 0
            found[here] = self._images(epoch, number)[places[here] - first]
        return found

    def keys(self) -> dict[str, int]:
        digest = hashlib.sha256(self.counts.tobytes()).digest()
        return {"window": self.window, "shards": int.from_bytes(digest[:6], "big")}

    def _shards_of(self, epoch: int) -> np.ndarray:
        number = len(self.counts)
        return np.random.default_rng((self.seed, epoch)).permutation(number) if self.shuffled else np.arange(number)

    def _images(self, epoch: int, window: int) -> np.ndarray:
        """Return the images of a window in permuted order."""
        if (epoch, window) != self._drawn:
            shards = self._shards[window * self.window : (window + 1) * self.window].tolist()
            images = np.concatenate([np.arange(self._starts[s], self._starts[s + 1]) for s in shards])
            self._order = np.random.default_rng((self.seed, epoch, window, 1)).permutation(images)
            self._drawn = (epoch, window)
            if self.on_window is not None:
                following = self._shards[(window + 1) * self.window : (window + 2) * self.window]
                if not len(following):
                    following = self._shards_of(epoch + 1)[: self.window]
                self.on_window(shards, following.tolist())
        return self._order
