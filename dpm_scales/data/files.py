"""List, read and check image files in a folder tree or a zip archive."""

from __future__ import annotations

import io
import lzma
import os
import stat
import struct
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from PIL import Image
from torch import Tensor

from dpm_scales import images
from dpm_scales.errors import UserError, require

EXTENSIONS = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
"""Endings of the names of image files, in lower case."""

MAX_MEMBER_BYTES = 256 * 2**20
"""Maximum unpacked size of an image file in a zip archive, in bytes."""

HARMLESS_BYTES, MAX_RATIO = 2**20, 200
"""Size in bytes above which the compression ratio is limited, and that limit; zip bombs have ratios near 1000."""

ARCHIVE_ERRORS = (OSError, EOFError, ValueError, LookupError, RuntimeError, NotImplementedError, MemoryError) + (
    *(TypeError, OverflowError, struct.error, zlib.error, lzma.LZMAError, zipfile.BadZipFile, zipfile.LargeZipFile),
)
"""Exceptions of zipfile for damaged archives and members: checksums, passwords, compression, and its own bugs."""

LISTED = 10
"""Maximum number of bad files that a message names."""

_EXIF_ORIENTATION = 274
_END_MARKS = {"JPEG": b"\xff\xd9", "PNG": b"IEND"}


class ImageStore(ABC):
    """Image files under one root, by relative names with slashes. Workers receive a pickled copy.

    Attributes:
        names: sorted names of the files.
        folders: names of the folders, including those without images.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.names: list[str] = []
        self.folders: list[str] = []

    @abstractmethod
    def open(self, name: str) -> BinaryIO:
        """Open the file `name` and return it, seekable."""

    def load(self, name: str, channels: int | None = None) -> Tensor:
        """Return the image `name`, uint8 ``(C, H, W)``. Raises UserError if it cannot be read."""
        with self.open(name) as file:
            return images.load_image(file, channels, name=self.describe(name))

    def describe(self, name: str) -> str:
        """Return the name of the file for messages."""
        return str(self.root / name)

    def state(self, names: Sequence[str]) -> list[Any]:
        """Return plain values that change whenever the content of one of these files does."""
        return [file_state(self.root), list(names)]

    def file_bytes(self, names: Sequence[str]) -> float:
        """Return the bytes of the files that these are read from."""
        return file_size(self.root)


class FolderStore(ImageStore):
    """All images in a folder tree, except hidden files and those in hidden folders."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        seen: set[str] = set()
        for folder, subfolders, files in os.walk(root, followlinks=True):
            real = os.path.realpath(folder)
            if real in seen:  # a link that leads back up
                subfolders.clear()
                continue
            seen.add(real)
            self.folders += [Path(folder, name).relative_to(root).as_posix() for name in sorted(subfolders)]
            names = [Path(folder, name).relative_to(root).as_posix() for name in files]
            self.names += [name for name in names if _is_image_name(name)]
        self.names.sort()

    def state(self, names: Sequence[str]) -> list[Any]:
        return [[name, *file_state(self.root / name)] for name in names]

    def file_bytes(self, names: Sequence[str]) -> float:
        return sum(file_size(self.root / name) for name in names)

    def open(self, name: str) -> BinaryIO:
        path = self.root / name
        if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for a writer
            raise OSError("not a regular file")
        return path.open("rb")


class ZipStore(ImageStore):
    """All images in a zip archive, read in place; each process opens the archive at its first read.

    Raises:
        UserError: not a zip archive, or members with absolute or parent paths or of implausible size.
    """

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self._archive: zipfile.ZipFile | None = None
        self._pid = -1
        for member in self._open_archive().infolist():
            path = PurePosixPath(member.filename.replace("\\", "/"))
            unsafe = path.is_absolute() or ".." in path.parts or ":" in path.parts[0] if path.parts else True
            require(not unsafe, f"{root}: unsafe member path {member.filename!r}; make the archive anew")
            self.folders += [str(folder) for folder in path.parents if folder.parts]
            if member.is_dir():
                self.folders.append(path.as_posix())
            if member.is_dir() or not _is_image_name(member.filename):
                continue
            require(
                member.file_size <= MAX_MEMBER_BYTES,
                f"{root}: {member.filename} unpacks to {member.file_size} bytes; allowed are {MAX_MEMBER_BYTES}",
            )
            require(
                member.file_size <= max(HARMLESS_BYTES, MAX_RATIO * member.compress_size),
                f"{root}: {member.filename} unpacks to {member.file_size} bytes from {member.compress_size}, as no "
                f"image does; allowed are {MAX_RATIO} times",
            )
            self.names.append(member.filename)
        self.names.sort()
        self.folders = sorted(set(self.folders))

    def open(self, name: str) -> BinaryIO:
        try:
            return io.BytesIO(self._open_archive().read(name))
        except UserError:
            raise
        except ARCHIVE_ERRORS as error:
            raise OSError(str(error) or type(error).__name__) from error

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_archive": None, "_pid": -1}

    def _open_archive(self) -> zipfile.ZipFile:
        if self._archive is None or self._pid != os.getpid():  # a forked handle shares its file position
            try:
                self._archive = zipfile.ZipFile(self.root)
            except ARCHIVE_ERRORS as error:
                raise UserError(f"{self.root}: not a readable zip archive ({error})") from error
            self._pid = os.getpid()
        return self._archive


def require_readable(store: ImageStore, names: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Return the upright sizes (H, W) of images by name.

    Raises: UserError if one cannot be read, since a result on part of a set does not describe the set.
    """
    sizes, bad = inspect_images(store, names, full=False)
    if bad:
        name, reason = next(iter(bad.items()))
        raise UserError(
            f"{len(bad)} of {len(names)} images can't be read, the first is {store.describe(name)} ({reason}); "
            "replace or remove them"
        )
    return sizes


def batches_of_one_size(sizes: Sequence[tuple[int, int]], batch_size: int) -> Iterator[list[int]]:
    """Yield the indices of consecutive images of one size, at most `batch_size` at a time."""
    batch: list[int] = []
    for index, size in enumerate(sizes):
        if batch and (len(batch) == batch_size or size != sizes[batch[0]]):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def open_store(root: str | Path) -> ImageStore:
    """Return the images under `root`, a folder or a .zip file.

    Raises:
        UserError: no such folder or file, or no images in it.
    """
    root = Path(root).expanduser()
    require(root.exists(), f"{root}: no such folder or zip archive; give the folder that holds the images")
    require(root.is_dir() or root.suffix.lower() == ".zip", f"{root}: allowed are a folder and a .zip file")
    store = FolderStore(root) if root.is_dir() else ZipStore(root)
    kinds = " ".join(EXTENSIONS)
    require(bool(store.names), f"{root}: no images in it; allowed are files that end in {kinds}")
    return store


def inspect_images(
    store: ImageStore, names: Sequence[str], full: bool
) -> tuple[dict[str, tuple[int, int]], dict[str, str]]:
    """Return the upright sizes (H, W) of the readable images, and the reasons why the others are unreadable.

    Only headers and the last bytes are read, and a file that looks truncated is decoded; `full` decodes all files.
    """

    def inspect(name: str) -> tuple[int, int] | str:
        try:
            with store.open(name) as file:
                size, whole = read_header(file)
                if full or not whole:
                    file.seek(0)
                    images.load_image(file, name=name)
                return size
        except images.DECODING_ERRORS as error:
            return str(error) or type(error).__name__

    sizes: dict[str, tuple[int, int]] = {}
    bad: dict[str, str] = {}
    with ThreadPoolExecutor(max_workers=min(8, 2 * (os.cpu_count() or 1))) as pool:
        for name, result in zip(names, pool.map(inspect, names), strict=True):
            if isinstance(result, str):
                bad[name] = result
            else:
                sizes[name] = result
    return sizes, bad


def read_header(file: BinaryIO) -> tuple[tuple[int, int], bool]:
    """Return the upright size (H, W), and whether the file ends as its format requires."""
    with Image.open(file) as picture:
        width, height = picture.size
        # to return EXIF data that it has not yet read, Pillow would decode a whole PNG file
        skip = picture.format == "PNG" and "exif" not in picture.info
        # for a TIFF file its size is already upright
        skip |= picture.format == "TIFF"
        turned = not skip and picture.getexif().get(_EXIF_ORIENTATION) in (5, 6, 7, 8)
        mark = _END_MARKS.get(picture.format or "", b"")
        file.seek(-min(16, file.seek(0, io.SEEK_END)), io.SEEK_END)
        return (width, height) if turned else (height, width), mark in file.read()


def file_state(path: Path) -> list[Any]:
    """Return the absolute path, size and modification time of a file; only the path if it does not exist."""
    try:
        status = path.stat()
    except OSError:
        return [str(path.absolute())]
    return [str(path.absolute()), status.st_size, status.st_mtime_ns]


def file_size(path: Path) -> float:
    """Return the bytes of a file, 0 if it does not exist."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def listed(names: Collection[str]) -> str:
    """Return at most `LISTED` names, separated by commas, for a message."""
    first = ", ".join(name for name, _ in zip(names, range(LISTED), strict=False))
    return first + (", ..." if len(names) > LISTED else "")


def _is_image_name(name: str) -> bool:
    parts = PurePosixPath(name).parts
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in parts)
    return not hidden and name.lower().endswith(EXTENSIONS)
