"""Read and write checkpoints and tensors with a SHA-256 over every byte, so that damage is detected.

A checkpoint is torch's zip file, followed by one line of fixed length with the format's version, the step and the
SHA-256 of all preceding bytes. torch stores a CRC of every tensor but never checks it, so that it detects only one in
ten flipped bits. In `model.safetensors` the SHA-256 is in the header, computed with zeros in its place. Either way
there is only one file, which appears with its checksum or not at all.
"""

from __future__ import annotations

import hashlib
import json
import re
import warnings
import zipfile
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import safetensors
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from dpm_scales.errors import UserError
from dpm_scales.models.seals import VERSION, read_seal
from dpm_scales.storage import atomic_write, open_regular, write_bytes

FORMAT = "dpm_scales model"
ZEROS = "0" * 64
_HEADER = re.compile(rf"{FORMAT} (\d+)(?: sha256 ([0-9a-f]{{64}}))?")
_MAX_HEADER_BYTES = 16 * 2**20
_CHUNK = 2**20
_FOREIGN = "is not a checkpoint of dpm_scales"
_DAMAGED = "is damaged: its bytes do not have the SHA-256 that they were written with"


class DamagedFileError(UserError):
    """A file whose content is not what was written; another checkpoint of the same run may be intact."""


class _HashingFile:
    """A file for `torch.save` that hashes what is written and keeps errors, which torch would replace with its own."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.hash = file, hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        self.hash.update(data)
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


def write_checkpoint(path: str | Path, values: dict[str, Any]) -> None:
    """Write plain containers and tensors with their checksum and `values["global_step"]`, atomically.

    Raises: UserError if the disk is full or the place is not writable; a file at `path` is then unchanged.
    """
    with atomic_write(path) as file:
        out = _HashingFile(file)
        try:
            torch.save(values, cast(IO[bytes], out))  # has all methods that torch uses
        except RuntimeError as error:
            if out.error is not None:
                raise out.error from error
            raise
        seal = f"\ndpm_scales checkpoint {VERSION:04d} step {int(values.get('global_step', 0)):012d} sha256 "
        out.write(seal.encode())
        file.write(f"{out.hash.hexdigest()}\n".encode())


def read_checkpoint(path: Path, map_location: Any = None) -> dict[str, Any]:
    """Return the plain containers and tensors of a checkpoint; anything else in it is refused, never executed.

    Args:
        map_location: device of the tensors, as in `torch.load`; the CPU by default.

    Raises:
        DamagedFileError: a byte differs from what was written, or the file is not a checkpoint of dpm_scales.
        UserError: the checkpoint has another format version.
    """
    try:
        with open_regular(path) as file:
            seal, size = read_seal(file)
            if seal and _digest(file, size + seal.start(3)) != seal[3].decode():
                raise DamagedFileError(f"{path} {_DAMAGED}")
            if seal and int(seal[1]) != VERSION:
                raise UserError(f"{path} has model format {int(seal[1])}; this version reads {VERSION}")
            _check_records(file)
            with warnings.catch_warnings(action="ignore"):  # torch's warnings about foreign pickles
                values = torch.load(file, map_location=map_location or "cpu", weights_only=True)
    except UserError:
        raise
    except Exception as error:  # torch and pickle raise almost any error for a foreign file
        raise DamagedFileError(f"{path} {_FOREIGN} (it is damaged or holds foreign objects)") from error
    recipe = values.get("recipe") if isinstance(values, dict) else None
    version = recipe.get("version") if isinstance(recipe, dict) else None
    if isinstance(version, int) and version != VERSION:
        raise UserError(f"{path} has model format {version}; this version reads {VERSION}")
    if recipe is None or not _plain_states(values, size, on_meta=str(map_location) == "meta"):
        raise DamagedFileError(f"{path} {_FOREIGN}")
    if not seal:
        raise DamagedFileError(f"{path} is damaged: its end, which holds the checksum, is missing")
    return dict(values)


def _check_records(file: BinaryIO) -> None:
    """Raise ValueError unless the records of a zip file are uncompressed and take no more than the file's size."""
    with zipfile.ZipFile(file) as archive:
        records = archive.infolist()
        size = file.seek(0, 2)
    packed = any(record.compress_type != zipfile.ZIP_STORED for record in records)
    if packed or sum(record.file_size for record in records) > size:
        raise ValueError("packed records")
    file.seek(0)


def _plain_states(values: Any, size: int, on_meta: bool) -> bool:
    """Return whether the weights are plain tensors by name, of at most `size` bytes: views may claim any shape."""
    if not isinstance(values, dict) or "state_dict" not in values:
        return False
    for key in ("state_dict", "current_model_state"):
        state = values.get(key, {})
        if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
            return False
        if not all(is_plain_tensor(value) and value.is_meta == on_meta for value in state.values()):
            return False
        if sum(value.numel() * value.element_size() for value in state.values()) > size:
            return False
    return True


def is_plain_tensor(value: Any) -> bool:
    """Return whether a value is a dense tensor: not sparse, nested or quantised."""
    dense = isinstance(value, Tensor) and value.layout == torch.strided
    return dense and not (value.is_nested or value.is_quantized)


def _digest(file: BinaryIO, size: int, start: bytes = b"") -> str:
    """Return the SHA-256 of the first `size` bytes of a file, with `start` in place of its first bytes."""
    file.seek(len(start))
    digest, left = hashlib.sha256(start), size - len(start)
    while left > 0 and (chunk := file.read(min(_CHUNK, left))):
        digest.update(chunk)
        left -= len(chunk)
    return digest.hexdigest()


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors to `path` (.safetensors) atomically; equal tensors give equal bytes."""
    # a single entry of metadata, since the order of several is not fixed
    data = save(tensors, metadata={"format": f"{FORMAT} {VERSION} sha256 {ZEROS}"})
    head = data[: 8 + int.from_bytes(data[:8], "little")]
    digest = hashlib.sha256(data).hexdigest()
    write_bytes(path, head.replace(ZEROS.encode(), digest.encode(), 1) + data[len(head) :])


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors that `write_tensors` wrote, on the CPU.

    Raises:
        DamagedFileError: a byte differs from what was written, or the file is of another kind.
        UserError: the file has another format version.
    """
    try:
        with open_regular(path) as file:
            size = file.seek(0, 2)
            file.seek(0)
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length <= min(size - 8, _MAX_HEADER_BYTES):
                raise ValueError(f"header of {length} bytes in a file of {size}")
            file.seek(0)
            head = file.read(8 + length)
            text = json.loads(head[8:]).get("__metadata__", {}).get("format", "")
            found = _HEADER.fullmatch(text)
            if not found:
                raise UserError(f"{path} was not written by dpm_scales, or is damaged: its header has no checksum")
            if int(found[1]) != VERSION:
                raise UserError(f"{path} has model format {found[1]}; this version reads {VERSION}")
            digest = found[2] or ZEROS
            if _digest(file, size, head.replace(digest.encode(), ZEROS.encode(), 1)) != digest:
                raise DamagedFileError(f"{path} {_DAMAGED}")
        return load_file(path)
    except (safetensors.SafetensorError, OSError, ValueError, AttributeError, TypeError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise DamagedFileError(f"{path} is not a safetensors file: {error}") from error
