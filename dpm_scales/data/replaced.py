"""Images whose unreadable ones are replaced by the next readable one, counted over all loader processes."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from dpm_scales.data.base import ImageDataset
from dpm_scales.data.files import LISTED
from dpm_scales.errors import UserError


class LoadingError(UserError):
    """A loading error whose message stays one line even if a worker wraps it in a traceback."""

    def __init__(self, message: str) -> None:
        super().__init__(message.strip().rpartition(f"{type(self).__name__}: ")[2])


class UnreadableImageError(LoadingError):
    """An image that cannot be decoded."""


class ReplacedImages(ImageDataset):
    """Images that are read from files; depending on `on_error`, an unreadable one raises or is replaced by another.

    Args:
        number: number of images.
        place: their origin, for messages.
        on_error: "skip" replaces unreadable images, "raise" raises.
    """

    def __init__(self, number: int, place: str, on_error: str) -> None:
        self.number, self.place, self.on_error = number, place, on_error
        # in shared memory, so that all workers and the training process see the failures of each worker
        self._bad = torch.zeros(number, dtype=torch.uint8).share_memory_()

    def __len__(self) -> int:
        return self.number

    @abstractmethod
    def load(self, index: int, rng: np.random.Generator | None) -> tuple[Tensor, int]:
        """Return item `index`.

        Raises: OSError or UserError if it is unreadable; LoadingError if it must not be replaced.
        """

    @abstractmethod
    def describe(self, index: int) -> str:
        """Return the name of an image for messages."""

    def name(self, index: int) -> str:
        """Return the name of an image for lists."""
        return self.describe(index)

    def substitutes(self, index: int) -> Iterator[int]:
        """Yield an index and its possible substitutes, in order: by default all that follow, cyclically."""
        for offset in range(self.number):
            yield (index + offset) % self.number

    def is_replaced(self, index: int) -> bool:
        """Return whether item `index` was found unreadable, so that another replaces it."""
        return bool(self._bad[index])

    @property
    def unreadable(self) -> set[str]:
        """Return the names found unreadable so far, by this process and the workers of its loaders."""
        return {self.name(index) for index in self._bad.nonzero()[:, 0].tolist()}

    def get(self, index: int, rng: np.random.Generator | None) -> tuple[Tensor, int]:
        for at in self.substitutes(index):
            if self._bad[at]:
                continue
            try:
                return self.load(at, rng)
            except LoadingError:
                raise
            except (OSError, UserError) as error:
                name = self.describe(at)
                reason = str(error) if name in str(error) else f"{name}: {error}"
                if self.on_error == "raise":
                    raise UnreadableImageError(reason) from error
                self._bad[at] = 1
                if (found := int(self._bad.count_nonzero())) <= LISTED:
                    more = "; more are only counted" if found == LISTED else ""
                    warnings.warn(f"another image replaces an unreadable one ({reason}){more}", stacklevel=2)
        raise UnreadableImageError(f"{self.place}: none of its {self.number} images can be read")
