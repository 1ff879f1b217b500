"""Pack images into tar shards with an index: the same images and settings give the same bytes, even after a kill.

Shard k of a part holds the images k·n … k·n + n - 1 of the part's order, a permutation drawn from the seed. Shards are
written atomically, the index last; a repeated command keeps the shards that exist.
"""

from __future__ import annotations

import hashlib
import io
import json
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from torch import Tensor

from dpm_scales import images
from dpm_scales.data.files import FolderStore, ImageStore, inspect_images, listed, open_store
from dpm_scales.data.folder import RESIZE_MODES, View, class_of_names, require_one_of, split_names
from dpm_scales.data.image_sets import ARRAYS, READERS
from dpm_scales.data.sources import read_arrays
from dpm_scales.errors import UserError, is_whole, require
from dpm_scales.locks import lock
from dpm_scales.shards.fetch import is_url
from dpm_scales.shards.index import INDEX, ShardEntry, ShardIndex
from dpm_scales.shards.places import PACKING, read_index
from dpm_scales.shards.scan import digest_of
from dpm_scales.shards.shard import MAX_CLASSES
from dpm_scales.shards.tar import TarWriter, members
from dpm_scales.storage import (
    atomic_write,
    check_writable,
    guarded,
    open_regular,
    read_text,
    remove_leftovers,
    write_text,
)

FORMATS = ("keep", "png", "ppm")
MAX_RECORD_BYTES = 2**20
CHUNK = 64
"""Number of images encoded at a time."""


@dataclass(frozen=True)
class Packing:
    """Settings of shards.

    Args:
        per_shard: number of images in each shard but the last.
        labels: "folder" numbers the folders as `ImageFolder` does, or uses the labels of an .npz file; "none" packs no
            labels.
        image_size: (H, W) in pixels to which images are brought; None keeps their sizes.
        resize_mode: as in `ImageFolder`.
        channels: 1 or 3, to which images are converted; None keeps them.
        format: "keep" copies files unchanged, "png" compresses pixels without loss, "ppm" stores them uncompressed.
        shuffle: permute the images of each part, so that each shard is a sample of it.
        seed: seed of the permutation.
        split: "auto" packs the folders train and val as parts if both exist, "none" packs all images as one part.
        on_error: "skip" leaves out unreadable images with a warning, "raise" stops at the first.
        verify: how much of each file is read at the start: "headers" or "full".

    Raises: UserError for invalid or contradictory values.
    """

    per_shard: int = 1000
    labels: str = "none"
    image_size: tuple[int, int] | None = None
    resize_mode: str = "resize_crop"
    channels: int | None = None
    format: str = "keep"
    shuffle: bool = True
    seed: int = 0
    split: str = "auto"
    on_error: str = "skip"
    verify: str = "headers"

    def __post_init__(self) -> None:
        require(is_whole(self.per_shard, 1), f"per_shard={self.per_shard}: allowed is a number of images >= 1")
        require(is_whole(self.seed, 0), f"seed={self.seed}: allowed is a whole number >= 0")
        require_one_of("labels", self.labels, ("folder", "none"))
        require_one_of("resize_mode", self.resize_mode, RESIZE_MODES)
        require_one_of("format", self.format, FORMATS)
        require_one_of("split", self.split, ("auto", "none"))
        require_one_of("on_error", self.on_error, ("skip", "raise"))
        require_one_of("verify", self.verify, ("headers", "full"))
        require(self.channels in (None, 1, 3), f"channels={self.channels}: allowed are 1 (grey) and 3 (RGB)")
        changed = self.image_size is not None or self.channels is not None
        advice = "image_size and channels change pixels, which format=keep copies; give format=png or format=ppm"
        require(not (changed and self.format == "keep"), advice)


class PackSource(ABC):
    """Images to pack, 0 … N - 1.

    Attributes:
        parts: names of the parts, with their images.
        labels: labels of all images, or None.
        class_names: names of the labels, or None.
        image_size: (H, W) of all images, or None.
        digest: SHA-256 of names and sizes, and of an array's labels, which identifies the images.
    """

    parts: dict[str, Sequence[int]]
    labels: Sequence[int] | None = None
    class_names: tuple[str, ...] | None = None
    image_size: tuple[int, int] | None = None
    digest: str

    @abstractmethod
    def name(self, index: int) -> str:
        """Return the name of an image for messages."""

    @abstractmethod
    def file(self, index: int) -> tuple[str, bytes]:
        """Return the ending and content of an image's file. Raises UserError or OSError if it can't be read."""

    @abstractmethod
    def pixels(self, index: int, channels: int | None) -> Tensor:
        """Return an image, uint8 ``(C, H, W)``. Raises UserError or OSError if it can't be read."""


class FileSource(PackSource):
    """The images of a folder or .zip file. Raises UserError if none can be read, or one with on_error="raise"."""

    def __init__(self, store: ImageStore, packing: Packing) -> None:
        self.store = store
        sizes, bad = inspect_images(store, store.names, full=packing.verify == "full")
        if bad:
            first, reason = next(iter(bad.items()))
            require(packing.on_error == "skip", f"{store.describe(first)}: {reason}; mend it, or set on_error=skip")
            warnings.warn(f"{store.root}: {len(bad)} unreadable images are left out: {listed(bad)}", stacklevel=3)
        require(bool(sizes), f"{store.root}: none of its {len(store.names)} images can be read")
        number = {name: index for index, name in enumerate(store.names)}
        train, val, note = split_names(store, "auto" if packing.split == "auto" else "fraction", 0.0, 0)
        named = {"train": train, "val": val} if note else {"": [*train, *val]}
        self.parts = {part: [number[name] for name in names if name in sizes] for part, names in named.items()}
        if packing.labels == "folder":
            classes = class_of_names([name for names in named.values() for name in names if name in sizes], store)
            self.class_names = tuple(sorted(set(classes.values())))
            label = {name: index for index, name in enumerate(self.class_names)}
            self.labels = [label[classes[name]] if name in classes else 0 for name in store.names]
        different = set(sizes.values())
        self.image_size = different.pop() if len(different) == 1 else None
        lengths = {name: (store.root / name).stat().st_size for name in sizes} if isinstance(store, FolderStore) else {}
        listing = [[name, lengths.get(name)] for name in store.names]
        whole = None if lengths else store.root.stat().st_size
        self.digest = hashlib.sha256(json.dumps([whole, listing]).encode()).hexdigest()

    def name(self, index: int) -> str:
        return self.store.describe(self.store.names[index])

    def file(self, index: int) -> tuple[str, bytes]:
        name = self.store.names[index]
        with self.store.open(name) as file:
            return PurePosixPath(name).suffix[1:].lower(), file.read()

    def pixels(self, index: int, channels: int | None) -> Tensor:
        return self.store.load(self.store.names[index], channels)


class ArrayImages(PackSource):
    """The images of a .npy or .npz file, uint8 (N, H, W) or (N, H, W, C). Raises UserError for other arrays."""

    def __init__(self, path: Path, packing: Packing) -> None:
        array, labels = read_arrays(path, mapped=True)
        pixels = array[..., None] if array.ndim == 3 else array
        kind = f"{path}: images are {array.dtype} {array.shape}"
        fits = array.dtype == np.uint8 and pixels.ndim == 4 and pixels.shape[-1] in (1, 3) and pixels.size > 0
        require(fits, f"{kind}; allowed is uint8 of shape (N, H, W), (N, H, W, 1) or (N, H, W, 3)")
        self.path, self.array, self.parts = path, pixels, {"": range(len(pixels))}
        self.image_size = (pixels.shape[1], pixels.shape[2])
        total = hashlib.sha256(f"{array.shape} {path.stat().st_size}".encode())
        if packing.labels == "folder":
            if labels is None:
                raise UserError(f"{path}: holds no 'labels'; add them, or leave out labels=folder")
            fits = labels.shape == (len(pixels),) and labels.dtype.kind in "iu" and labels.min() >= 0
            require(
                fits and labels.max() < MAX_CLASSES, f"{path}: labels are {labels.dtype} {labels.shape}; need numbers"
            )
            self.labels = labels.astype(np.int64).tolist()
            total.update(labels.tobytes())
        self.digest = total.hexdigest()

    def name(self, index: int) -> str:
        return f"{self.path}, image {index}"

    def file(self, index: int) -> tuple[str, bytes]:
        return "png", encoded(self.pixels(index, None), "png")

    def pixels(self, index: int, channels: int | None) -> Tensor:
        image = torch.from_numpy(self.array[index].transpose(2, 0, 1).copy())
        if channels in (None, len(image)):
            return image
        return images.load_image(encoded(image, "ppm"), channels)


def encoded(image: Tensor, kind: str) -> bytes:
    """Return an image, uint8 ``(C, H, W)``, as a file: "png", or "ppm", which is PGM for grey images."""
    if kind == "png":
        return images.png_bytes(image)
    depth, height, width = image.shape
    return f"P{5 if depth == 1 else 6}\n{width} {height}\n255\n".encode() + image.permute(1, 2, 0).numpy().tobytes()


def pack(
    place: str | Path, out: str | Path, packing: Packing, on_images: Callable[[str, int], Callable[[float], None]]
) -> ShardIndex:
    """Write the images at `place` as shards into the folder `out`, and return their index.

    Args:
        place: a folder, a .zip file, or a .npy or .npz file.
        out: a new or empty folder, or one in which the same command was interrupted or completed before.
        packing: the settings.
        on_images: called with "images" and their number; returns a callback for the number of images packed.

    Raises: UserError for images that can't be read, a folder that holds other files, or one that is not writable.
    """
    require(not is_url(str(place)), f"{place}: allowed are a folder, a .zip, .npy or .npz file of this machine")
    path, folder = Path(place).expanduser(), Path(out)
    is_array = path.suffix.lower() in ARRAYS
    if not is_array:
        inside = folder.resolve().is_relative_to(path.resolve())
        require(not inside, f"out={folder} lies in {path}, whose images are packed; choose another out")
    source: PackSource = ArrayImages(path, packing) if is_array else FileSource(open_store(path), packing)
    settings = {**asdict(packing), "source": path.name, "source_sha256": source.digest}
    text = json.dumps({**settings, "image_size": _listed(packing.image_size)}, indent=1) + "\n"
    check_writable(folder)
    with guarded(folder), lock(folder / ".lock", "is being packed into by", "wait for it, or choose another out"):
        done = _begun(folder, text)
        if done is not None:
            return done
        remove_leftovers(folder)
        write_text(folder / PACKING, text)
        index = _write(source, folder, packing, json.loads(text), on_images)
        write_text(folder / INDEX, index.to_json())
        (folder / PACKING).unlink()
    return index


def _listed(size: tuple[int, int] | None) -> list[int] | None:
    return None if size is None else list(size)


def _begun(folder: Path, text: str) -> ShardIndex | None:
    """Return the index of a folder that this command completed, None for one to fill. Raises UserError for others."""
    advice = "choose another out, or remove it"
    if (folder / INDEX).is_file():
        index = read_index(folder / INDEX)
        require(index.made == json.loads(text), f"{folder} holds shards of another command or source; {advice}")
        return index
    if (folder / PACKING).is_file():
        same = read_text(folder / PACKING, MAX_RECORD_BYTES) == text
        require(same, f"{folder} holds a part of the shards of another command or source; {advice}")
        return None
    others = sorted(entry.name for entry in folder.iterdir() if entry.name != ".lock")
    require(not others, f"{folder} is not empty ({listed(others)}); {advice}")
    return None


def _write(
    source: PackSource,
    folder: Path,
    packing: Packing,
    made: dict[str, object],
    on_images: Callable[[str, int], Callable[[float], None]],
) -> ShardIndex:
    view = None
    if packing.image_size is not None:
        view = View(packing.channels or 3, packing.image_size, packing.resize_mode)
    width = max(8, len(str(sum(map(len, source.parts.values())))))
    advance = on_images("images", sum(map(len, source.parts.values())))
    entries, lost = [], Lost(packing.on_error)
    with ThreadPoolExecutor(READERS) as pool:
        for number, (part, indices) in enumerate(source.parts.items()):
            order = np.asarray(indices, dtype=np.int64)
            if packing.shuffle:
                order = np.random.default_rng((packing.seed, number)).permutation(order)
            for first in range(0, len(order), packing.per_shard):
                name = f"{part or 'shard'}-{first // packing.per_shard:06d}.tar"
                chosen = order[first : first + packing.per_shard].tolist()
                path = folder / name
                if path.is_file():
                    entry = kept_entry(path, part)
                else:
                    files = _files(source, chosen, packing, view, pool, lost)
                    entry = write_shard(path, _named(files, source.labels, width), part)
                entries.append(entry)
                advance(len(chosen))
    lost.warn()
    size = source.image_size if view is None else view.size
    classes = None if source.labels is None else max(source.labels) + 1
    return ShardIndex(tuple(entries), size, classes, source.class_names, made)


class Lost:
    """Images found to be unreadable during packing."""

    def __init__(self, on_error: str) -> None:
        self.on_error = on_error
        self.names: list[str] = []

    def add(self, name: str, error: Exception) -> None:
        reason = str(error) if name in str(error) else f"{name}: {error}"
        require(self.on_error == "skip", f"{reason}; mend it, or set on_error=skip")
        self.names.append(name)

    def warn(self) -> None:
        if self.names:
            warnings.warn(
                f"{len(self.names)} images can't be read and are left out: {listed(self.names)}", stacklevel=2
            )


def _files(
    source: PackSource,
    chosen: Sequence[int],
    packing: Packing,
    view: View | None,
    pool: ThreadPoolExecutor,
    lost: Lost,
) -> Iterator[tuple[int, str, bytes]]:
    """Yield (number, ending, content) of the images that can be read."""

    def made(index: int) -> tuple[str, bytes] | Exception:
        try:
            if packing.format == "keep":
                return source.file(index)
            image = source.pixels(index, packing.channels)
            if view is not None:
                image = view(image, None)
            ending = "pgm" if packing.format == "ppm" and len(image) == 1 else packing.format
            return ending, encoded(image, packing.format)
        except images.DECODING_ERRORS as error:
            return error

    for first in range(0, len(chosen), CHUNK):
        some = chosen[first : first + CHUNK]
        for index, file in zip(some, pool.map(made, some), strict=True):
            if isinstance(file, Exception):
                lost.add(source.name(index), file)
            else:
                yield index, *file


def _named(
    files: Iterator[tuple[int, str, bytes]], labels: Sequence[int] | None, width: int
) -> Iterator[tuple[str, bytes]]:
    """Yield the members of images: each file, and its label if there are labels."""
    for index, ending, content in files:
        key = f"{index:0{width}d}"
        yield f"{key}.{ending}", content
        if labels is not None:
            yield f"{key}.cls", str(labels[index]).encode()


def write_shard(path: Path, files: Iterator[tuple[str, bytes]], part: str = "") -> ShardEntry:
    """Write members, (name, content), as a tar file, atomically, and return its entry for an index."""
    count = 0
    with atomic_write(path) as file:
        writer = TarWriter(file)
        for name, content in files:
            writer.add(name, content)
            count += not name.endswith(".cls")
        sha256 = writer.close()
    return ShardEntry(path.name, count, writer.bytes, sha256, part)


def kept_entry(path: Path, part: str = "") -> ShardEntry:
    """Return the entry of an existing shard written by `write_shard`. Raises UserError for a damaged one."""
    with open_regular(path) as file:
        length = file.seek(0, io.SEEK_END)

        def read(number: int, offset: int) -> bytes:
            file.seek(offset)
            return file.read(number)

        count = sum(not member.name.endswith(".cls") for member in members(read, length))
        file.seek(0)
        return ShardEntry(path.name, count, length, digest_of(file), part)
