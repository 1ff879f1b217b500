"""One tar shard in webdataset's format: its images and labels, found by name and read by offset.

The members of one image have a common key, the name up to the first dot after the last slash: `cat/0001.png` and
`cat/0001.cls` are the image and the label of `cat/0001`. Only these two kinds of members are ever read, images by an
image decoder and labels as digits or JSON; pickles and other members are never opened.
"""

from __future__ import annotations

import io
import json
import os
import re
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dpm_scales import images
from dpm_scales.data.files import EXTENSIONS, MAX_MEMBER_BYTES
from dpm_scales.errors import UserError, printable, require
from dpm_scales.shards.tar import DamagedTarError, members
from dpm_scales.storage import open_regular

IMAGE_ENDINGS = tuple(ending[1:] for ending in EXTENSIONS)
MAX_LABEL_BYTES = 2**16
_CHUNK = 2**13  # bytes of an image read at a time for its header
MAX_CLASSES = 2**31
_SPLIT = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)", re.DOTALL)  # as webdataset splits names
_PNM = re.compile(rb"P([56])\s(\d{1,5})\s(\d{1,5})\s255\s")
_HIDDEN = re.compile(r"(?:^|/)(?:__[^/]*__(?:$|/)|__MACOSX/)")


class Keys:
    """Endings that identify the image and the label of a sample.

    Args:
        image: ending of the images' names, such as `jpg` or `input.png`; None for any of `IMAGE_ENDINGS`.
        label: ending of the labels' names, such as `cls`; or `json.FIELD`, an integer field of the member `json`; None
            for no labels.

    Raises: UserError for endings that begin with a dot or contain a slash.
    """

    def __init__(self, image: str | None = None, label: str | None = None) -> None:
        for key, ending in (("image", image), ("labels", label)):
            ok = ending is None or bool(re.fullmatch(r"[^./\s][^/\s]*", ending))
            require(ok, f"{key}={ending}: allowed is the ending of members' names, without the first dot, as in cls")
        self.image, self.label = image, label
        member, _, field = (label or "").partition(".")
        self.field = field if member == "json" and field else None
        self.label_ending = "json" if self.field else label and label.lower()
        self._image_ending = image and image.lower()  # members are compared in lower case

    def is_image(self, ending: str) -> bool:
        """Return whether members with this ending, in lower case, are images."""
        return ending == self._image_ending if self.image is not None else ending in IMAGE_ENDINGS


class Shard:
    """A tar file whose images are read by number, 0 … N - 1, in the order of the archive.

    Attributes:
        names: names of the images' members.
        defects: names of keys by kind of defect: those without an image, and those that occur twice.
        damage: reason why the file can't be read to its end; None if it can.

    Args:
        path: path of the tar file.
        name: name for messages.
        keys: which members to read.
        partial: whether to use the images that precede damage in the file; otherwise it is an error.

    Raises: UserError for a damaged file, and OSError for one that can't be opened.
    """

    def __init__(self, path: Path, name: str, keys: Keys, partial: bool = False) -> None:
        self.name, self.keys = name, keys
        self._file: BinaryIO = open_regular(path)
        self.bytes = os.fstat(self._file.fileno()).st_size
        self.damage: str | None = None
        self.names: list[str] = []
        self.defects: dict[str, list[str]] = {"without an image": [], "twice": []}
        places: list[tuple[int, int, int, int]] = []
        image_of: dict[str, int] = {}
        label_of: dict[str, tuple[int, int]] = {}
        others: dict[str, None] = {}
        try:
            for member in members(self.read, self.bytes):
                parts = _SPLIT.fullmatch(member.name)
                if parts is None or _HIDDEN.search(member.name):
                    continue
                key, ending = parts[1], parts[2].lower()
                if keys.is_image(ending):
                    if key in image_of:
                        self.defects["twice"].append(printable(member.name))
                        continue
                    image_of[key] = len(places)
                    self.names.append(printable(member.name))
                    places.append((member.offset, member.size, -1, 0))
                elif ending == keys.label_ending:
                    label_of.setdefault(key, (member.offset, member.size))
                else:
                    others[key] = None
        except DamagedTarError as error:
            if not partial:
                self.close()
                raise UserError(f"{name}: {error}") from error
            self.damage = str(error)
        self._places = np.array(places, dtype=np.int64).reshape(-1, 4)
        for key, place in label_of.items():
            if key in image_of:
                self._places[image_of[key], 2:] = place
        alone = [key for key in {**label_of, **others} if key not in image_of]
        self.defects["without an image"] = [printable(key) for key in alone]

    def __len__(self) -> int:
        return len(self.names)

    def read(self, number: int, offset: int) -> bytes:
        """Return at most `number` bytes from `offset`."""
        if hasattr(os, "pread"):
            return os.pread(self._file.fileno(), number, offset)
        self._file.seek(offset)
        return self._file.read(number)

    def content(self, index: int) -> bytes:
        """Return the content of an image's file. Raises OSError if it is too large, or the archive was truncated."""
        offset, size = self._places[index, :2].tolist()
        if size > MAX_MEMBER_BYTES:
            raise OSError(f"{size} bytes; allowed are {MAX_MEMBER_BYTES}")
        data = self.read(size, offset)
        if len(data) != size:
            raise OSError("the shard became shorter while it was read")
        return data

    def open(self, index: int) -> BinaryIO:
        """Return an image's file, read on demand."""
        offset, size = self._places[index, :2].tolist()
        return io.BufferedReader(_Slice(self, offset, size), _CHUNK)

    def label(self, index: int) -> int:
        """Return the label of an image, >= 0. Raises UserError if it has none, or an invalid one."""
        offset, size = self._places[index, 2:].tolist()
        require(offset >= 0, f"no label: its key has no member .{self.keys.label_ending}")
        require(size <= MAX_LABEL_BYTES, f"a label of {size} bytes; allowed are {MAX_LABEL_BYTES}")
        return parse_label(self.read(size, offset), self.keys.field)

    def close(self) -> None:
        self._file.close()


class _Slice(io.RawIOBase):
    """The bytes of a member as a separate file."""

    def __init__(self, shard: Shard, offset: int, size: int) -> None:
        self._shard, self._offset, self._size, self._position = shard, offset, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = max(0, start + offset)
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        number = max(0, min(len(buffer), self._size - self._position))
        data = self._shard.read(number, self._offset + self._position)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


def parse_label(content: bytes, field: str | None) -> int:
    """Return the class in a member: digits, or an integer field of a JSON mapping. Raises UserError for others."""
    if field is None:
        text = content.strip()
        ok = text.isdigit() and len(text) < 11 and int(text) < MAX_CLASSES
        require(ok, f"the label {content[:20]!r} is not a class number")
        return int(text)
    try:
        held = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError("its label is not JSON") from error
    value = held.get(field) if isinstance(held, dict) else None
    ok = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < MAX_CLASSES
    require(ok, f"the field {field!r} of its label is {value!r:.40}, which is not a class number")
    assert isinstance(value, int)
    return value


def decode(content: bytes, channels: int | None, name: str, decoder: str = "pillow") -> Tensor:
    """Return an image file as uint8 ``(C, H, W)``, with the pixels of `images.load_image` but faster where possible.

    Plain PPM and PGM files are copied. The decoder "simplejpeg" decodes complete JPEG files without EXIF data that
    already have the wanted channels.

    Raises: UserError if the file can't be decoded.
    """
    if content[:1] == b"P" and (plain := _PNM.match(content)) is not None:
        depth, width, height = (3 if plain[1] == b"6" else 1), int(plain[2]), int(plain[3])
        rest = len(content) - plain.end()
        if channels in (None, depth) and rest == depth * width * height > 0:
            pixels = np.frombuffer(content, np.uint8, offset=plain.end()).reshape(height, width, depth)
            return torch.from_numpy(pixels.transpose(2, 0, 1).copy())
    if decoder == "simplejpeg" and content[:3] == b"\xff\xd8\xff":
        image = _decode_jpeg(content, channels)
        if image is not None:
            return image
    return images.load_image(content, channels, name)


def _decode_jpeg(content: bytes, channels: int | None) -> Tensor | None:
    """Return a JPEG file as uint8 ``(C, H, W)``; None for one that Pillow must convert, rotate or refuse."""
    import simplejpeg

    if content[-2:] != b"\xff\xd9" or b"Exif\0" in content:
        return None
    try:
        height, width, space, _ = simplejpeg.decode_jpeg_header(content)
        depth = {"Gray": 1, "YCbCr": 3, "RGB": 3}.get(space)
        if depth is None or channels not in (None, depth) or height * width > (Image.MAX_IMAGE_PIXELS or 0):
            return None
        pixels = simplejpeg.decode_jpeg(content, "GRAY" if depth == 1 else "RGB")
    except ValueError:
        return None
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
