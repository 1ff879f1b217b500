"""Find the members of a tar file without unpacking any, and write tar files whose bytes depend on their content alone.

Archives may come from anybody. Nothing is written to disk, links are not followed, and names serve only as keys and in
messages. Formats: POSIX ustar and pax, GNU long names; sparse members, which images never are, are skipped.
"""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Callable, Iterator
from typing import BinaryIO, NamedTuple

from dpm_scales.errors import UserError, printable

BLOCK = 512
END = bytes(BLOCK)
MAX_HEADER_BYTES = 2**16
"""Maximum size of an extended header, which holds a long name."""

_CHUNK = 2**14  # read at a time: small members and their headers come together
_AFTER_END = 2**16  # more than writers append to fill a block
_REGULAR, _DIRECTORY, _NO_DATA = b"0\0" + b"7", b"5", b"123456"
_PACKED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"PK\x03\x04": "zip"}

Read = Callable[[int, int], bytes]
"""Maps (number, offset) to that many bytes of the archive, or fewer at its end."""


class DamagedTarError(UserError):
    """A tar file whose members can't all be found; the message leaves the file name to the caller."""


class Member(NamedTuple):
    """A regular file in an archive: its name, and the offset and size of its content in bytes."""

    name: str
    offset: int
    size: int


def members(read: Read, length: int) -> Iterator[Member]:
    """Yield the regular files of an archive of `length` bytes, in order, including those before any damage.

    Raises: DamagedTarError for anything but a complete, uncompressed tar file.
    """
    start, chunk = 0, b""
    position = 0
    long_name: str | None = None
    long_size: int | None = None
    sparse = False
    while True:
        if position + BLOCK > length:
            what = "it ends without the mark of its end" if position else "it is empty"
            raise DamagedTarError(f"{what}, and was cut off; fetch or make it again")
        if not start <= position <= start + len(chunk) - BLOCK:
            start, chunk = position, read(_CHUNK, position)
            if len(chunk) < BLOCK:
                raise DamagedTarError("it became shorter while it was read")
        header = chunk[position - start : position - start + BLOCK]
        if header == END:
            if read(_AFTER_END, position + BLOCK).strip(b"\0"):
                raise DamagedTarError(
                    "it holds more after the mark of its end, as if archives were joined; pack it again"
                )
            return
        kind = header[156:157]
        size = _number(header[124:136])
        if size is None or not _sum_fits(header):
            raise DamagedTarError(_no_header(header, position))
        content = position + BLOCK
        if kind in b"xgLK" and kind:
            if size > MAX_HEADER_BYTES:
                raise DamagedTarError(f"a header of {size} bytes at byte {position}; allowed are {MAX_HEADER_BYTES}")
            text = read(size, content)
            if kind == b"L":
                long_name = _text(text.rstrip(b"\0"))
            elif kind == b"x":
                fields = _pax(text)
                long_name = fields.get("path", long_name)
                long_size = _decimal(fields.get("size")) if "size" in fields else long_size
                sparse = any(key.startswith("GNU.sparse") for key in fields)
            position = content + _padded(size)
            continue
        name = _name(header) if long_name is None else long_name
        size = size if long_size is None else long_size
        regular = kind in _REGULAR and not name.endswith("/")
        length_here = 0 if kind in _NO_DATA and kind else size
        if content + length_here > length:
            raise DamagedTarError(f"it ends within {printable(name)[:200]!r}, and was cut off; fetch or make it again")
        if regular and not sparse:
            yield Member(name, content, size)
        if kind == b"S":  # GNU's sparse files have a map, which may continue in additional blocks
            more = header[482:483]
            while more == b"\1":
                more, content = read(BLOCK, content)[504:505], content + BLOCK
        position = content + _padded(length_here)
        long_name, long_size, sparse = None, None, False


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _sum_fits(header: bytes) -> bool:
    stored = _number(header[148:156])
    return stored == sum(header) - sum(header[148:156]) + 8 * ord(" ")


def _number(field: bytes) -> int | None:
    """Return a number in octal digits or GNU's base 256; None if it is neither, or negative."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.split(b"\0", 1)[0].strip()
    try:
        number = int(digits or b"0", 8)
    except ValueError:
        return None
    return number if number >= 0 else None


def _decimal(text: str | None) -> int:
    if text is None or not (text.isascii() and text.isdecimal() and len(text) < 19):
        raise DamagedTarError("a header holds a size that is no number")
    return int(text)


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")


def _name(header: bytes) -> str:
    name = _text(header[:100].split(b"\0", 1)[0])
    prefix = _text(header[345:500].split(b"\0", 1)[0]) if header[257:263] == b"ustar\0" else ""
    return f"{prefix}/{name}" if prefix else name


def _pax(text: bytes) -> dict[str, str]:
    """Return the fields of a pax header, lines ``"LENGTH KEY=VALUE\\n"``."""
    fields = {}
    while text.strip(b"\0"):
        digits, _, _ = text.partition(b" ")
        count = int(digits) if digits.isdigit() and len(digits) < 7 else 0
        line = text[len(digits) + 1 : count]
        key, equals, value = line.partition(b"=")
        if not equals or not line.endswith(b"\n") or count > len(text):
            raise DamagedTarError("a header that is not one of pax")
        fields[_text(key)] = _text(value[:-1])
        text = text[count:]
    return fields


def _no_header(header: bytes, position: int) -> str:
    packed = next((name for start, name in _PACKED.items() if header.startswith(start)), None)
    if position == 0 and packed is not None:
        return f"it is packed by {packed}, so that its images can't be found by place; unpack it to a plain .tar file"
    return "it is not a tar file" if position == 0 else f"no header at byte {position}, where a member should begin"


class TarWriter:
    """Writer of a tar file into a binary file, whose bytes depend on its members alone, not on user or time.

    Attributes:
        bytes: number of bytes written.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._digest, self.bytes = file, hashlib.sha256(), 0

    def add(self, name: str, content: bytes) -> None:
        """Append a member; `name` is ASCII, at most 100 characters."""
        info = tarfile.TarInfo(name)
        info.size, info.mode = len(content), 0o644
        self._write(info.tobuf(tarfile.USTAR_FORMAT, "ascii", "strict") + content + bytes(-len(content) % BLOCK))

    def close(self) -> str:
        """Write the end-of-archive mark, and return the SHA-256 of the file as hexadecimal digits."""
        self._write(2 * END)
        return self._digest.hexdigest()

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)
        self.bytes += len(data)
