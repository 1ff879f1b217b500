"""Compare processes on the same images, as in Sect. 6.3, Peter 2024, for any processes and any folder.

Every process starts from the same images and takes one Markov path through its scales. Measured at each scale:

    variance          over the pixels of an image, averaged over channels; black is 0 and white is 1
    average grey      over the pixels of an image, in the same units
    relative entropy  -sum u ln(u / w), Eq. (50), with w the steady state; only for osmosis
    features          of a network, for distances between the images of the processes at the same time

Images are measured in batches. The results of each batch are one file in `parts`, so that a comparison resumes where it
stopped and memory does not grow with the set. The noise depends only on (seed, process, first image of the batch).
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dpm_scales.data.image_sets import NumberedImages
from dpm_scales.errors import UserError, require
from dpm_scales.images import to_range, to_uint8
from dpm_scales.metrics import FeatureNetwork, average_grey, image_variance, relative_entropy
from dpm_scales.metrics.base import identity_of
from dpm_scales.processes import Process
from dpm_scales.storage import guarded, make_folder, open_regular, read_text, write_bytes, write_text
from dpm_scales.study.fingerprint import describe, describe_images, fingerprint

Array = NDArray[Any]

FORMER_NAMES = {"dpm": "vp"}
"""Processes by former name: options still accept these, and the noise seed of a process derives from its first name."""

PARTS_VERSION = 2
"""Version of the measurements; increase it when the same processes and images give different results."""


@dataclass(frozen=True)
class Entry:
    """A process in a comparison.

    Attributes:
        name: name in files and figures.
        process: the process.
        scales: one scale for each time of the comparison, ascending in [0, 1].
        keeps_grey: whether the average grey value is preserved, at least in expectation.
    """

    name: str
    process: Process
    scales: tuple[float, ...]
    keeps_grey: bool = field(init=False)

    def __post_init__(self) -> None:
        # checked once, as a check in each batch would wait for the device
        tables = next(self.process.buffers(), None)
        zero = torch.zeros((), dtype=torch.float64, device=None if tables is None else tables.device)
        object.__setattr__(self, "keeps_grey", bool(self.process.signal_scale(1.0, zero) > 1 - 1e-6))

    def path(self, images: Tensor, seed: int) -> tuple[Tensor, Tensor | None]:
        """Return one Markov path and the steady state, if each image has one, from uint8 images ``(B, C, H, W)``.

        The path is ``(T, B, C, H, W)`` in the value range of the process. Its noise depends on the kind of device.
        """
        x_0 = to_range(images, self.process.value_range)
        generator = torch.Generator(images.device).manual_seed(seed)
        context = self.process.context(x_0, generator)
        path = self.process.trajectory(x_0, self.scales, generator, context)
        steady = self.process.steady_state(x_0.mean((-2, -1)), context)
        return path, steady if steady.shape == x_0.shape else None

    def shown(self, x: Tensor) -> Tensor:
        """Return uint8 images to view and to extract features from.

        Images of a process that keeps the average grey value are clipped to the value range. Those of any other process
        are mapped to it affinely, each from its smallest to its largest value, as the paper does with DPM.
        """
        low, high = self.process.value_range
        if not self.keeps_grey:
            smallest, largest = x.amin((-3, -2, -1), keepdim=True), x.amax((-3, -2, -1), keepdim=True)
            x = low + (high - low) * (x - smallest) / (largest - smallest).clamp(min=1e-12)
        return to_uint8(x, (low, high))


def measure(
    entries: Sequence[Entry],
    images: NumberedImages,
    out: Path,
    seed: int = 0,
    features: FeatureNetwork | None = None,
    batch_size: int = 1,
    device: torch.device | str = "cpu",
    on_batch: Callable[[int], None] | None = None,
) -> Parts:
    """Measure every process on every image not measured before; return the results.

    Args:
        out: folder; the results go to ``out/parts``.
        features: network for the features of the images at each scale; None for no distances.
        batch_size: maximum number of images per batch, all of one size.
        on_batch: called with the number of images of each batch, whether measured now or before.

    Raises: UserError if `out` contains the results of another comparison.
    """
    require(len({entry.name for entry in entries}) == len(entries), "processes of a comparison need different names")
    require(len({len(entry.scales) for entry in entries}) == 1, "processes of a comparison need equally many scales")
    parts = Parts(out / "parts", [entry.name for entry in entries], len(entries[0].scales))
    parts.claim(_fingerprint(entries, images, seed, features, batch_size))
    for batch in images.batches(batch_size):
        if not parts.has(batch[0]):
            x = torch.stack([images.load(index) for index in batch]).to(device)
            values: dict[str, Array] = {}
            for entry in entries:
                for key, value in _measured(entry, x, noise_seed(seed, entry.name, batch[0]), features).items():
                    values[f"{entry.name}/{key}"] = value
            parts.add(batch[0], values)
        parts.known.append(batch[0])
        if on_batch is not None:
            on_batch(len(batch))
    return parts


@torch.no_grad()
def _measured(entry: Entry, images: Tensor, seed: int, features: FeatureNetwork | None) -> dict[str, Array]:
    """Return arrays ``(T, B)`` by name, and ``features/k`` ``(B, d)`` for each time k."""
    path, steady = entry.path(images, seed)
    low, high = entry.process.value_range
    grey = (average_grey(path) - low) / (high - low)
    values: dict[str, Tensor] = {"variance": image_variance(path) / (high - low) ** 2, "grey": grey}
    if steady is not None and low == 0:
        values["relative_entropy"] = relative_entropy(path.clamp(min=0), steady).mean(-1)
    if features is not None:
        for k, x in enumerate(path):
            values[f"features/{k}"] = features(entry.shown(x))
    return {key: value.cpu().numpy() for key, value in values.items()}


class Parts:
    """Measured results: one .npz file for each batch, read back one quantity at a time."""

    def __init__(self, folder: Path, names: list[str], number: int) -> None:
        self.folder, self.names, self.number = folder, names, number
        self.known: list[int] = []

    def claim(self, fingerprint: str) -> None:
        """Reserve the folder for this comparison. Raises UserError if it holds another one, or is not a real folder."""
        make_folder(self.folder.parent)
        with guarded(self.folder.parent):
            make_folder(self.folder)
        mark = self.folder / "comparison.txt"
        if mark.exists() and read_text(mark).strip() != fingerprint:
            raise UserError(
                f"{self.folder} holds figures of other processes, images or settings; choose another out or remove it"
            )
        write_text(mark, fingerprint + "\n")

    def has(self, first: int) -> bool:
        return self._file(first).is_file()

    def add(self, first: int, values: dict[str, Array]) -> None:
        buffer = io.BytesIO()
        np.savez(buffer, **values)  # type: ignore[arg-type]
        write_bytes(self._file(first), buffer.getvalue())

    def series(self, name: str, key: str) -> Array | None:
        """Return a quantity of a process for all images, ``(T, N)``; None if it was not measured."""
        found = list(self._read(f"{name}/{key}"))
        return np.concatenate(found, axis=1) if found else None

    def features(self, name: str, index: int) -> Array:
        """Return the features of the images of a process at time number `index`, ``(N, d)``."""
        return np.concatenate(list(self._read(f"{name}/features/{index}")))

    def _read(self, key: str) -> Iterator[Array]:
        for first in self.known:
            with open_regular(self._file(first)) as file, np.load(file, allow_pickle=False) as part:
                if key in part:
                    yield part[key]

    def _file(self, first: int) -> Path:
        return self.folder / f"{first:06d}.npz"


def noise_seed(seed: int, name: str, first: int) -> int:
    """Return a 63-bit seed from the seed of the study, the name of the process and the index of the first image."""
    own, *ending = name.split(",")
    name = ",".join([{new: old for old, new in FORMER_NAMES.items()}.get(own, own), *ending])
    digest = hashlib.sha256(f"{seed}/{name}/{first}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def _fingerprint(
    entries: Sequence[Entry], images: NumberedImages, seed: int, features: FeatureNetwork | None, batch_size: int
) -> str:
    """Return a digest of everything that determines the results: processes and images in full, settings, features."""
    laws = [[entry.name, describe(entry.scales), describe(entry.process, entry.name)] for entry in entries]
    network = None if features is None else identity_of(features)
    return fingerprint(PARTS_VERSION, laws, describe_images(images), seed, network, batch_size)
