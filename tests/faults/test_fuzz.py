"""Readers of files from elsewhere, fed with damaged and crafted ones: they return or raise UserError, nothing else.

``DPM_SCALES_FUZZ_MINUTES=10 pytest tests/faults/test_fuzz.py tests/faults/test_fuzz_models.py`` takes ten minutes, in
equal parts; by default each reader gets a few seconds' worth of examples.
"""

from __future__ import annotations

import io
import json
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from PIL import Image

from dpm_scales import data, images
from dpm_scales.data.files import ZipStore, inspect_images, open_store
from dpm_scales.shards import ShardSource
from support.fuzzing import damaged, fuzz, put, returns_or_tells
from support.shards import packed, tar


def _sample(mode: str, kind: str, **options: Any) -> bytes:
    array = np.random.default_rng(0).integers(0, 256, (9, 12, 4), dtype=np.uint8)
    picture = Image.fromarray(array, "RGBA").convert("RGB").convert(mode) if mode != "RGBA" else Image.fromarray(array)
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def image_files() -> list[bytes]:
    exif = Image.Exif()
    exif[274] = 6
    exif[270] = "words"
    kinds = {"JPEG": "RGB L CMYK", "PNG": "RGB P RGBA 1", "GIF": "P", "BMP": "RGB P", "TIFF": "RGB CMYK", "WEBP": "RGB"}
    kinds["PPM"] = "RGB L"
    files = [_sample(mode, kind) for kind, modes in kinds.items() for mode in modes.split()]
    files += [_sample("RGB", kind, exif=exif) for kind in ("JPEG", "PNG", "TIFF", "WEBP")]
    files += [_sample("RGB", "TIFF", compression=name) for name in ("tiff_lzw", "tiff_deflate", "jpeg")]
    buffer = io.BytesIO()
    Image.fromarray(np.arange(60, dtype=np.uint16).reshape(6, 10) * 999).save(buffer, "PNG")
    return [*files, buffer.getvalue()]


@pytest.mark.slow
def test_images() -> None:
    @st.composite
    def repaired(draw: st.DrawFn) -> bytes:
        """PNG files whose checksums fit, so that their chunks are looked into."""
        content = draw(damaged(image_files()))
        if content[:8] != b"\x89PNG\r\n\x1a\n" or draw(st.booleans()):
            return content
        parts, place = [content[:8]], 8
        while place + 8 <= len(content):
            size = struct.unpack(">I", content[place : place + 4])[0]
            body = content[place + 4 : place + 8 + min(size, len(content))]
            parts += [content[place : place + 4], body, struct.pack(">I", zlib.crc32(body))]
            place += 12 + size
        return b"".join(parts)

    def check(content: bytes) -> None:
        for channels in (None, 1, 3):
            image = returns_or_tells(lambda channels=channels: images.load_image(content, channels, "x"))
            assert image is None or (image.dtype == torch.uint8 and image.ndim == 3 and image.shape[0] in (1, 3))

    fuzz(repaired(), check)


@pytest.mark.slow
def test_headers(tmp_path: Path) -> None:
    """The size that a header tells is the decoded one, or the image is bad."""
    suffixes = st.sampled_from([".png", ".jpg", ".tif"])

    def check(given_: tuple[bytes, str]) -> None:
        content, suffix = given_
        path = tmp_path / f"a{suffix}"
        path.write_bytes(content)
        try:
            sizes, bad = inspect_images(store := open_store(tmp_path), store.names, full=True)
            assert len(sizes) + len(bad) == 1
            for name, size in sizes.items():
                with store.open(name) as file:
                    assert tuple(images.load_image(file).shape[1:]) == size
            returns_or_tells(lambda: data.ImageFolder(tmp_path, image_size=4, val_fraction=0.0).train()[0])
        finally:
            path.unlink()

    fuzz(st.tuples(damaged(image_files()), suffixes), check)


@pytest.mark.slow
def test_archives(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    whole = []
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", method) as archive:
            archive.writestr("cat/a.png", _sample("RGB", "PNG"))
            archive.writestr("dog/b.jpg", _sample("L", "JPEG"))
        whole.append(buffer.getvalue())

    def check(content: bytes) -> None:
        path.write_bytes(content)
        store = returns_or_tells(lambda: ZipStore(path))
        for name in store.names if store else []:
            try:
                store.open(name)
            except OSError:
                continue
        returns_or_tells(lambda: data.ImageFolder(path, image_size=4, labels="folder", val_fraction=0.0).train()[0])

    fuzz(damaged(whole), check)


@pytest.mark.slow
def test_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what is read of a damaged archive does not depend on chance: twice the same."""
    monkeypatch.setenv("DPM_SCALES_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "a.tar"
    members = {"cat/a.png": _sample("RGB", "PNG"), f"{'d' * 200}é/b.jpg": _sample("L", "JPEG"), "cat/a.cls": b"1"}
    whole = []
    for kind in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        names = {name if kind != tarfile.USTAR_FORMAT else name[-40:]: content for name, content in members.items()}
        whole.append(tar(path, names, kind).read_bytes())

    def read() -> list[bytes]:
        part = ShardSource(path, image_size=4, labels="cls", split="images", val_fraction=0.0).train()
        return [image.numpy().tobytes() for image, _ in (part[i] for i in range(len(part)))]

    def check(content: bytes) -> None:
        path.write_bytes(content)
        assert returns_or_tells(read) == returns_or_tells(read)

    fuzz(damaged(whole), check)


@pytest.mark.slow
def test_indices_of_shards(tmp_path: Path) -> None:
    packed(tmp_path / "s", 6, 3)
    path = tmp_path / "s" / "index.json"
    whole = json.loads(path.read_text())

    @st.composite
    def indices(draw: st.DrawFn) -> bytes:
        return json.dumps(put(draw, whole)).encode(errors="surrogatepass")

    def check(content: bytes) -> None:
        path.write_bytes(content)
        returns_or_tells(lambda: ShardSource(tmp_path / "s", channels=1, labels="cls").train()[0])

    fuzz(st.one_of(indices(), damaged([json.dumps(whole).encode()])), check)


@pytest.mark.slow
def test_arrays(tmp_path: Path) -> None:
    plain, packed, squeezed = io.BytesIO(), io.BytesIO(), io.BytesIO()
    array = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)
    np.save(plain, array)
    np.savez(packed, images=array, labels=np.array([0, 1]))
    np.savez_compressed(squeezed, images=array, labels=np.array([0, 1]))
    path = tmp_path / "a.npz"

    def check(content: bytes) -> None:
        path.write_bytes(content)
        returns_or_tells(lambda: data.ArraySource(path))

    fuzz(damaged([plain.getvalue(), packed.getvalue(), squeezed.getvalue()]), check)
