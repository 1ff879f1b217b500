"""Images that rot, vanish, or lie: left out and counted, or refused, and never a crash; and pixel values by hand."""

from __future__ import annotations

import io
import os
import pickle
import struct
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dpm_scales import data, images
from dpm_scales.data.files import LISTED, inspect_images, open_store
from dpm_scales.errors import UserError
from support.shell import FAST, SMALL, attempt, call, photos, train

RNG = np.random.default_rng(0)


def encoded(picture: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(*shape: int, high: int = 256, dtype: type = np.uint8) -> np.ndarray:
    return RNG.integers(0, high, shape).astype(dtype)


def png(array: np.ndarray, colour: int, extra: bytes = b"") -> bytes:
    """A 16-bit PNG file (H, W, C), written by hand: Pillow can't."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    height, width = array.shape[:2]
    rows = array.astype(">u2").reshape(height, -1)
    pixels = b"".join(b"\0" + row.tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0)
    parts = [chunk(b"IHDR", header), extra, chunk(b"IDAT", zlib.compress(pixels)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def loaded(content: bytes, channels: int | None = None) -> np.ndarray:
    """(H, W, C) as wide integers."""
    return images.load_image(content, channels).permute(1, 2, 0).numpy().astype(int)


# --- pixel values, by hand --------------------------------------------------------------------------------------------


def test_sixteen_bits_become_eight_to_the_nearest() -> None:
    """Grey exactly; colour, which Pillow cuts to its high byte, to one level."""
    grey = noise(7, 5, 1, high=65536, dtype=np.uint16)
    assert np.array_equal(loaded(png(grey, 0)), np.round(grey / 257).astype(int))
    colour = noise(7, 5, 3, high=65536, dtype=np.uint16)
    assert np.abs(loaded(png(colour, 2)) - colour / 257).max() <= 1
    alpha = noise(7, 5, 4, high=65536, dtype=np.uint16)
    share = alpha[..., 3:] / 65535
    assert np.abs(loaded(png(alpha, 6)) - (share * alpha[..., :3] / 257 + 255 * (1 - share))).max() <= 2
    grey_alpha = noise(7, 5, 2, high=65536, dtype=np.uint16)
    share = grey_alpha[..., 1:] / 65535
    result = loaded(png(grey_alpha, 4), 1)
    assert np.abs(result - (share * grey_alpha[..., :1] / 257 + 255 * (1 - share))).max() <= 2


def test_palettes_are_looked_up() -> None:
    colours, index = noise(16, 3), noise(6, 9, high=16)
    picture = Image.fromarray(index, "P")
    picture.putpalette(colours.tobytes())
    assert np.array_equal(loaded(encoded(picture)), colours[index])
    assert np.array_equal(loaded(encoded(picture, "GIF")), colours[index])
    share = noise(16)
    clear = encoded(picture, transparency=share.tobytes())
    over = share[index][..., None] / 255
    assert np.abs(loaded(clear) - (over * colours[index] + 255 * (1 - over))).max() <= 1


def test_transparency_lies_on_white() -> None:
    array = noise(6, 9, 4)
    over = array[..., 3:] / 255
    expected = over * array[..., :3] + 255 * (1 - over)
    assert np.abs(loaded(encoded(Image.fromarray(array, "RGBA"))) - expected).max() <= 1
    assert np.abs(loaded(encoded(Image.fromarray(array, "RGBA"), "TIFF")) - expected).max() <= 1
    luma = expected @ [0.299, 0.587, 0.114]
    assert np.abs(loaded(encoded(Image.fromarray(array, "RGBA")), 1)[..., 0] - luma).max() <= 2


def test_inks_become_light() -> None:
    """R = (255 - C)(255 - K) / 255, and so on; JPEG stores them inverted, and smooth ones within a few levels."""
    inks = noise(6, 9, 4)
    light = (255 - inks[..., :3].astype(float)) * (255 - inks[..., 3:].astype(float)) / 255
    assert np.abs(loaded(encoded(Image.fromarray(inks, "CMYK"), "TIFF")) - light).max() <= 1
    ramp = np.linspace(0, 200, 16).round().astype(np.uint8)
    smooth = np.stack([np.tile(ramp, (16, 1)), np.tile(ramp[:, None], (1, 16)), np.full((16, 16), 90), ramp[None] // 4
                       + np.zeros((16, 1), np.uint8)], -1).astype(np.uint8)  # fmt: skip
    light = (255 - smooth[..., :3].astype(float)) * (255 - smooth[..., 3:].astype(float)) / 255
    assert np.abs(loaded(encoded(Image.fromarray(smooth, "CMYK"), "JPEG", quality=100)) - light).mean() < 3


TURNS = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_exif_turns(orientation: int, kind: str, tmp_path: Path) -> None:
    """And the header tells the same size as the decoded image has."""
    array = noise(5, 8, 3)
    exif = Image.Exif()
    exif[274] = orientation
    content = encoded(Image.fromarray(array), kind, exif=exif)
    assert np.array_equal(loaded(content), TURNS[orientation](array))
    (tmp_path / f"a.{kind.lower()}").write_bytes(content)
    sizes, bad = inspect_images(store := open_store(tmp_path), store.names, full=False)
    assert not bad and list(sizes.values()) == [TURNS[orientation](array).shape[:2]]


# --- places -----------------------------------------------------------------------------------------------------------


def make(folder: Path, number: int = 6) -> Path:
    return photos(folder, number, (8, 8))


def test_links_in_circles_and_things_that_are_no_files(tmp_path: Path) -> None:
    """A pipe would be waited for."""
    make(tmp_path / "f")
    (tmp_path / "f" / "up").symlink_to("..", target_is_directory=True)
    (tmp_path / "f" / "self.png").symlink_to("self.png")
    (tmp_path / "f" / "gone.png").symlink_to("nowhere.png")
    os.mkfifo(tmp_path / "f" / "pipe.png")
    (tmp_path / "f" / "folder.png").mkdir()
    with pytest.warns(UserWarning, match=r"3 unreadable images are left out: (gone|pipe|self)\.png, "):
        source = data.ImageFolder(tmp_path / "f", val_fraction=0.0)
    assert len(source.train()) == 6 and set(source.left_out) == {"self.png", "gone.png", "pipe.png"}
    assert source.left_out["pipe.png"] == "not a regular file"
    for name in ("pipe", "self"):
        with pytest.raises(UserError, match=rf"f/{name}|f/(gone|pipe|self)\.png: .*set on_error=skip"):
            data.ImageFolder(tmp_path / "f", on_error="raise")


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("parts", ["", "train/"])
def test_class_folders_without_images(parts: str, packed: bool, tmp_path: Path) -> None:
    for label in ("cat", "dog"):
        make(tmp_path / "f" / parts / label, 2)
    (tmp_path / "f" / parts / "eel").mkdir()
    (tmp_path / "f" / parts / "fox").mkdir()
    (tmp_path / "f" / parts / "fox" / "a.png").write_text("rotten")
    if parts:
        make(tmp_path / "f" / "val" / "dog", 1)
        (tmp_path / "f" / "notes").mkdir()
    root = tmp_path / "f"
    if packed:
        root = tmp_path / "f.zip"
        with zipfile.ZipFile(root, "w") as archive:
            for path in sorted((tmp_path / "f").rglob("*")):
                archive.write(path, path.relative_to(tmp_path / "f"))
    with pytest.warns(UserWarning) as caught:
        source = data.ImageFolder(root, labels="folder", val_fraction=0.0)
    told = [str(warning.message) for warning in caught]
    assert any(
        "2 class folders hold no readable image: eel, fox; they do not count as classes" in line for line in told
    ), told
    assert source.class_names == ("cat", "dog")
    (tmp_path / "f" / parts / "fox" / "a.png").unlink()
    if not packed:
        with pytest.raises(UserError, match="2 class folders hold no readable image: eel, fox; fill or remove them"):
            data.ImageFolder(root, labels="folder", on_error="raise")


def test_folders_that_the_split_does_not_use_are_no_empty_classes(tmp_path: Path) -> None:
    for folder in ("train/cat", "train/dog", "val/cat", "extra/cat"):
        make(tmp_path / folder, 2)
    source = data.ImageFolder(tmp_path, labels="folder", on_error="raise")
    assert source.class_names == ("cat", "dog") and source.split_note == "train/ + val/; not used: extra/"


# --- archives ---------------------------------------------------------------------------------------------------------


def archive_of(path: Path, content: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data_ in content.items():
            archive.writestr(name, data_)
    return path


def test_zip_bombs_are_refused(tmp_path: Path) -> None:
    """A thousand times as large as packed; flat images up to a megabyte are none."""
    flat = encoded(Image.new("RGB", (500, 500)), "BMP")
    small = encoded(Image.new("RGB", (100, 100)), "PNG")
    path = archive_of(tmp_path / "a.zip", {"flat.bmp": flat, "small.png": small})
    assert len(data.ImageFolder(path, image_size=8, val_fraction=0.0).train()) == 2
    bomb = encoded(Image.new("RGB", (4000, 4000)), "BMP")
    with pytest.raises(UserError, match=r"bomb\.bmp unpacks to \d+ bytes from \d+, as no image does; allowed are 200"):
        data.ImageFolder(archive_of(tmp_path / "b.zip", {"a.png": small, "bomb.bmp": bomb}))


def test_a_member_that_lies_about_its_size(tmp_path: Path) -> None:
    """Unpacks no further than it says, and is then unreadable."""
    small = encoded(Image.fromarray(noise(8, 8, 3)))
    bomb = bytes(50 * 2**20)
    path = archive_of(tmp_path / "a.zip", {"a.png": small, "b.png": bomb})
    content = path.read_bytes().replace(struct.pack("<I", len(bomb)), struct.pack("<I", 9))
    path.write_bytes(content)
    with pytest.warns(UserWarning, match=r"1 unreadable images are left out: b\.png"):
        assert len(data.ImageFolder(path, val_fraction=0.0).train()) == 1


def test_decompression_bombs_are_left_out(tmp_path: Path) -> None:
    """A header of 30000 x 30000 pixels in a hundred bytes."""
    good = encoded(Image.fromarray(noise(8, 8, 3)))
    bomb = bytearray(good)
    bomb[16:24] = struct.pack(">II", 30000, 30000)
    bomb[29:33] = struct.pack(">I", zlib.crc32(bytes(bomb[12:29])))
    (tmp_path / "a.png").write_bytes(good)
    (tmp_path / "b.png").write_bytes(bytes(bomb))
    with pytest.warns(UserWarning, match=r"1 unreadable images are left out: b\.png"):
        source = data.ImageFolder(tmp_path, val_fraction=0.0)
    assert "900000000 pixels" in source.left_out["b.png"]
    with pytest.raises(UserError, match=r"b\.png: .*900000000 pixels.*replace or remove it"):
        images.load_image(tmp_path / "b.png")


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_rot_in_an_archive_while_reading(method: int, tmp_path: Path) -> None:
    """Every kind of packing has its own error."""
    content = {f"{n}.png": encoded(Image.fromarray(noise(16, 16, 3))) for n in range(3)}
    path = archive_of(tmp_path / "a.zip", content, method)
    source = data.ImageFolder(path, image_size=16, verify="none", val_fraction=0.0)
    with zipfile.ZipFile(path) as archive:
        start = archive.getinfo("1.png").header_offset
        stop = archive.getinfo("2.png").header_offset
    whole = path.read_bytes()
    for spoil in (bytes(stop - start - 40), bytes(range(255, 0, -1)) * 9, b"\xff" * (stop - start)):
        rotten = whole[: start + 40] + spoil[: stop - start - 40] + whole[stop:]
        path.write_bytes(rotten)
        train = data.ImageFolder(path, image_size=16, verify="none", val_fraction=0.0).train()
        with pytest.warns(UserWarning, match=r"replaces an unreadable one \(.*1\.png"):
            assert torch.equal(train[1][0], images.load_image(content["2.png"]))
        assert train.unreadable == {"1.png"}
    path.unlink()
    store = pickle.loads(pickle.dumps(source.store))  # as in a worker, which opens the archive for itself
    with pytest.raises(UserError, match=r"a\.zip: not a readable zip archive"):
        store.open("0.png")


# --- while training ---------------------------------------------------------------------------------------------------

FOLDER = (
    *("data=folder", "data.image_size=8", "data.channels=1", "data.batch_size=4", "data.val_fraction=0.2"),
    "data.random_flip=true",
)


@pytest.mark.parametrize("workers", [0, 2])
def test_files_that_vanish_and_rot_while_training(workers: int, tmp_path: Path) -> None:
    """Others stand in; they are counted also where a worker found them, told, and listed in the run folder."""
    root = make(tmp_path / "f", 20)
    source = data.ImageFolder(root, image_size=8, val_fraction=0.0)
    module = data.ImageDataModule(source, batch_size=4, num_workers=workers)
    (root / "003.png").unlink()
    (root / "007.png").write_bytes((root / "007.png").read_bytes()[:60])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        batches = list(module.train_dataloader())
    assert sum(len(images_) for images_, _ in batches) == 20
    assert source.train().unreadable == {"003.png", "007.png"}


def test_the_counts_appear(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the start, at a validation, at the end; and in the run folder."""
    root = make(tmp_path / "f", 40)
    (root / "000.png").write_text("rotten from the start")
    original = data.FileImages.get
    lost = {"005.png", "006.png"}

    def get(self: data.FileImages, index: int, rng: Any) -> Any:
        if rng is not None:  # training has begun
            for name in lost:
                (root / name).unlink(missing_ok=True)
        return original(self, index, rng)

    monkeypatch.setattr(data.FileImages, "get", get)
    with pytest.warns(UserWarning) as caught:
        run_dir = train(tmp_path / "run", *FAST, *FOLDER, f"data.root={root}", "trainer.max_steps=12")
    told = [str(warning.message) for warning in caught]
    assert any("1 unreadable images are left out: 000.png" in line for line in told)
    assert any(line.startswith("3 unreadable images so far: 000.png, ") and "unreadable.txt" in line for line in told)
    text = (run_dir / "unreadable.txt").read_text().splitlines()
    assert text[0] == "3 unreadable images" and sorted(text[1:]) == [repr(f"{n:03d}.png") for n in (0, 5, 6)]


def test_whole_data_sets_leave_no_list(tmp_path: Path) -> None:
    run_dir = train(tmp_path / "run", *FOLDER, f"data.root={make(tmp_path / 'f', 20)}", "trainer.max_steps=1")
    assert not (run_dir / "unreadable.txt").exists()


def test_a_disk_that_goes_away_ends_with_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few of a thousand losses are told, then there is nothing left to stand in."""
    root = make(tmp_path / "f", 30)
    original = data.FileImages.get

    def get(self: data.FileImages, index: int, rng: Any) -> Any:
        if rng is not None and root.exists():
            root.rename(tmp_path / "away")
        return original(self, index, rng)

    monkeypatch.setattr(data.FileImages, "get", get)
    with pytest.warns(UserWarning) as caught:
        outcome = attempt(tmp_path / "run", *FOLDER, f"data.root={root}")
    assert outcome.status == 2 and "Traceback" not in outcome.err
    assert f"{root}: none of its 24 images can be read" in outcome.err
    told = [str(warning.message) for warning in caught]
    assert sum("replaces an unreadable one" in line for line in told) == LISTED and "only counted" in "".join(told)


def test_refused_if_so_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With workers too, whose error comes wrapped."""
    root = make(tmp_path / "f", 20)
    original = data.FileImages.get

    def get(self: data.FileImages, index: int, rng: Any) -> Any:
        if rng is not None:
            (root / "003.png").unlink(missing_ok=True)
        return original(self, index, rng)

    monkeypatch.setattr(data.FileImages, "get", get)
    options = (*FOLDER, f"data.root={root}", "data.on_error=raise", "data.num_workers=1", "data.val_fraction=0.0")
    outcome = call("train.py", *SMALL, *options, f"run_dir={tmp_path / 'run'}", cwd=tmp_path)
    assert outcome.status == 2 and "Traceback" not in outcome.err, outcome.err
    assert "f/003.png" in outcome.err and "No such file" in outcome.err


# --- arrays -----------------------------------------------------------------------------------------------------------


def npy(header: str, body: bytes = b"") -> bytes:
    text = header.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + body


HEADERS = {
    "huge": "{'descr': '|u1', 'fortran_order': False, 'shape': (99999999, 99999, 999), }",
    "negative": "{'descr': '|u1', 'fortran_order': False, 'shape': (-1, 8, 8), }",
    "objects": "{'descr': '|O', 'fortran_order': False, 'shape': (3,), }",
    "code": "__import__('os').mkdir('boom')",
    "nonsense": "{'descr': [('a', '<x9')], 'fortran_order': 3, 'shape': 7}",
}


@pytest.mark.parametrize("kind", HEADERS)
@pytest.mark.parametrize("packed", [False, True])
def test_arrays_of_strangers(kind: str, packed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    content = npy(HEADERS[kind], bytes(64))
    path = tmp_path / ("a.npz" if packed else "a.npy")
    if packed:
        archive_of(path, {"images.npy": content})
    else:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"a\.np[yz]: ") as caught:
        data.ArraySource(path)
    assert "\n" not in str(caught.value) and not (tmp_path / "boom").exists()
