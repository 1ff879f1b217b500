"""Images in rows of the library `datasets`: some rows of a mapped set, or consecutive rows of a stream."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from torch import Tensor

from dpm_scales import images
from dpm_scales.data.base import NO_LABEL
from dpm_scales.data.folder import View
from dpm_scales.data.order import EpochOrder, Windowed
from dpm_scales.data.replaced import LoadingError, ReplacedImages
from dpm_scales.errors import UserError, is_whole, printable, require
from dpm_scales.storage import open_regular


class StreamError(LoadingError):
    """A stream that can't be read any further."""


def image_of(value: Any, channels: int, name: str) -> Tensor:
    """Return the image in an undecoded row, ``{"bytes": …, "path": …}``, uint8 ``(C, H, W)``.

    Raises: UserError for a row without an image, or one that would have to be fetched.
    """
    held = value if isinstance(value, dict) else {}
    content, path = held.get("bytes"), held.get("path")
    if content is not None:
        return images.load_image(bytes(content), channels, name)
    require(isinstance(path, str) and bool(path), f"{name}: a row without an image")
    require("://" not in str(path), f"{name}: its image is at {printable(str(path))[:100]}, which is not fetched")
    try:
        with open_regular(str(path)) as file:
            return images.load_image(file, channels, name)
    except OSError as error:
        raise UserError(f"{name}: {error.strerror or error}") from error


class RowImages(ReplacedImages):
    """Some rows of a mapped set.

    Args:
        rows: a data set with a length and undecoded rows by index.
        indices: indices of the rows.
        columns: names of the columns of images and of labels, or None for no labels.
        classes: number of labels, which are 0 to classes - 1; None for no labels.
        view: transform of an image.
        place: name of the set, for messages.
        on_error: as in `ReplacedImages`.
    """

    def __init__(
        self,
        rows: Any,
        indices: Sequence[int],
        columns: tuple[str, str | None],
        classes: int | None,
        view: View,
        place: str,
        on_error: str,
    ) -> None:
        super().__init__(len(indices), place, on_error)
        self.augmented, self.mirrored = view.is_random, view.only_mirrors
        self.rows, self.indices, self.columns, self.classes, self.view = rows, indices, columns, classes, view
        self._rows: dict[int, dict[str, Any]] = {}  # rows of the next batch

    def identity(self) -> list[Any]:
        chosen = hashlib.sha256(np.asarray(self.indices, dtype=np.int64).tobytes()).hexdigest()
        return ["rows", self.rows._fingerprint, chosen, list(self.columns), self.classes, self.view.identity()]

    def describe(self, index: int) -> str:
        return f"{self.place}, row {int(self.indices[index])}"

    def expect(self, indices: Sequence[int]) -> None:
        if indices:
            columns = self.rows[[int(self.indices[index]) for index in indices]]
            rows = zip(*columns.values(), strict=True)
            self._rows = {index: dict(zip(columns, row, strict=True)) for index, row in zip(indices, rows, strict=True)}

    def load(self, index: int, rng: np.random.Generator | None) -> tuple[Tensor, int]:
        row = self._rows.pop(index) if index in self._rows else self.rows[int(self.indices[index])]
        return item_of(row, self, index, rng)


class StreamImages(ReplacedImages):
    """Consecutive images of a stream, read forward in windows; going back restarts the stream.

    Args:
        stream: an `IterableDataset` with undecoded rows, of format "arrow".
        first, number: position of the first image in the stream, and number of images.
        window: number of images that are held and permuted together.
        columns, classes, view, place, on_error: as in `RowImages`.
    """

    def __init__(
        self,
        stream: Any,
        first: int,
        number: int,
        window: int,
        columns: tuple[str, str | None],
        classes: int | None,
        view: View,
        place: str,
        on_error: str,
    ) -> None:
        super().__init__(number, place, on_error)
        self.augmented, self.mirrored = view.is_random, view.only_mirrors
        self.stream, self.first, self.window, self.columns = stream, first, window, columns
        self.classes, self.view = classes, view
        self._rows: Iterator[Any] = iter(())
        self._next, self._at = 0, -1
        self._held: list[dict[str, Any]] = []

    def describe(self, index: int) -> str:
        return f"{self.place}, image {self.first + index} of the stream"

    def order(self, seed: int) -> EpochOrder:
        counts = np.full(-(-self.number // self.window), self.window)
        counts[-1] -= len(counts) * self.window - self.number
        return Windowed(counts, 1, seed, shuffled=False)

    def pool(self, count: int) -> Sequence[int]:
        return range(min(count, self.number))

    def substitutes(self, index: int) -> Iterator[int]:
        """Yield the images of the same window, since others would restart the stream."""
        start = index // self.window * self.window
        count = min(self.window, self.number - start)
        for offset in range(count):
            yield start + (index - start + offset) % count

    def load(self, index: int, rng: np.random.Generator | None) -> tuple[Tensor, int]:
        window = index // self.window
        if window != self._at:
            self._go_to(window)
        return item_of(self._held[index - window * self.window], self, index, rng)

    def _go_to(self, window: int) -> None:
        """Read the images of a window. Raises StreamError if the stream fails, or ends before them."""
        begun, self._at = self._at >= 0, -1
        with hub_errors(self.place, StreamError):
            if not begun or window < self._next:
                # `iter` over batches, unlike that over rows, gives all of them to each worker
                self._rows = self.stream.skip(self.first + window * self.window).iter(batch_size=self.window)
                self._next = window
            table = None
            while self._next <= window:
                table = next(self._rows, None)
                self._next += 1
        count = min(self.window, self.number - window * self.window)
        have = 0 if table is None else table.num_rows
        if table is None or have < count:
            ended = self.first + window * self.window + have
            raise StreamError(f"{self.place}: the stream ended after {ended} images; give data.num_images={ended}")
        self._held, self._at = table.slice(0, count).to_pylist(), window

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_rows": iter(()), "_next": 0, "_at": -1, "_held": []}


def item_of(
    row: dict[str, Any], part: RowImages | StreamImages, index: int, rng: np.random.Generator | None
) -> tuple[Tensor, int]:
    """Return the image and label of a row. Raises UserError if either is missing or invalid."""
    column, labels = part.columns
    image = part.view(image_of(row[column], part.view.channels, part.describe(index)), rng)
    if part.classes is None or labels is None:
        return image, NO_LABEL
    label = row[labels]
    known = is_whole(label, 0) and label < part.classes
    require(known, f"its label is {label!r:.40}, and there are {part.classes} classes")
    return image, label


@contextmanager
def hub_errors(place: str, kind: type[UserError] = UserError) -> Iterator[None]:
    """Convert errors of `datasets`, its many libraries and the network to a `kind` of UserError of one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        reason = printable(lines[0].strip()) if lines else type(error).__name__
        raise kind(f"{place}: {reason[:300]}") from error
