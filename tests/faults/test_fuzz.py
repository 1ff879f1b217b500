"""Readers of files from elsewhere, fed with damaged and crafted ones: they return or raise UserError, nothing else.

``DPM_SCALES_FUZZ_MINUTES=10 pytest tests/faults/test_fuzz.py`` goes on for so long, in equal parts; by default each
reader gets a few seconds' worth of examples.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import struct
import tarfile
import time
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save

from dpm_scales import data, images
from dpm_scales.cli.arguments import with_stored_overrides
from dpm_scales.commands.runs import run as list_runs
from dpm_scales.data.files import ZipStore, inspect_images, open_store
from dpm_scales.errors import UserError
from dpm_scales.models.checksums import read_checkpoint, read_tensors, write_checkpoint
from dpm_scales.run_folders.files import stored_result
from dpm_scales.training import load_model, save_model
from support.shards import packed, tar
from support.shell import small_model

MINUTES = float(os.environ.get("DPM_SCALES_FUZZ_MINUTES", "0"))
TARGETS = 12
EXAMPLES = 40
"""Of one round; a round is all there is unless minutes are given."""


def fuzz(strategy: st.SearchStrategy[Any], check: Callable[[Any], None]) -> None:
    until = time.monotonic() + 60 * MINUTES / TARGETS
    number = 0
    while True:
        run = settings(
            max_examples=EXAMPLES if MINUTES == 0 else 2000,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate, Phase.shrink] if MINUTES else [Phase.generate],
        )(given(strategy)(check))
        seed(number)(run)()
        number += 1
        if time.monotonic() >= until:
            return


@st.composite
def damaged(draw: st.DrawFn, whole: list[bytes]) -> bytes:
    """One of some files with bytes replaced, cut out, put in or repeated; or any bytes at all."""
    content = bytearray(draw(st.sampled_from([*whole, b""])))
    for _ in range(draw(st.integers(0, 6))):
        place = draw(st.integers(0, len(content)))
        kind = draw(st.integers(0, 4))
        size = draw(st.sampled_from([1, 1, 2, 4, 8, 40]))
        if kind == 0:
            content[place : place + size] = draw(st.binary(min_size=size, max_size=size))
        elif kind == 1:
            del content[place : place + size * draw(st.sampled_from([1, 100]))]
        elif kind == 2:
            content[place:place] = draw(st.binary(max_size=40))
        elif kind == 3:
            content[place : place + 4] = draw(
                st.sampled_from([b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", bytes(4), b"\0\0\0\x80", b"\1\0\0\0"])
            )
        else:
            content[place:place] = content[place : place + size]
    return bytes(content)


def returns_or_tells(function: Callable[[], Any]) -> Any:
    try:
        return function()
    except UserError as error:
        assert "\n" not in str(error) and str(error)
        return None


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
        part = data.ShardSource(path, image_size=4, labels="cls", split="images", val_fraction=0.0).train()
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
        returns_or_tells(lambda: data.ShardSource(tmp_path / "s", channels=1, labels="cls").train()[0])

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


# --- models -----------------------------------------------------------------------------------------------------------

WORDS = st.sampled_from(
    [*"_target_ dpm_scales.processes.VP os.getcwd process num_scales ${x} ${oc.env:HOME} image ???".split()]
)
NUMBERS = st.integers(-2, 5) | st.sampled_from([-(2**63), 10**9, 10**12, 2**70]) | st.floats(allow_nan=True)
SCALARS = st.none() | st.booleans() | NUMBERS | WORDS | st.text(max_size=5)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS | st.text(max_size=3), inner, max_size=3)
)


def put(draw: st.DrawFn, tree: Any) -> Any:
    """The tree with something else in a place or two."""
    tree = json.loads(json.dumps(tree))
    for _ in range(draw(st.integers(1, 3))):
        node = tree
        while True:
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            if isinstance(node[key], dict | list) and draw(st.booleans()):
                node = node[key]
                continue
            if isinstance(node, dict) and draw(st.integers(0, 3)) == 0:
                del node[key]
            else:
                node[key] = draw(VALUES)
            break
    return tree


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("model")
    save_model(place, small_model("process.num_scales=9"))
    return place


@pytest.mark.slow
def test_configs_of_models(folder: Path) -> None:
    config = folder / "config.yaml"
    whole = config.read_bytes()
    tree = yaml.safe_load(whole)

    @st.composite
    def changed(draw: st.DrawFn) -> bytes:
        if draw(st.booleans()):
            return draw(damaged([whole]))
        return yaml.safe_dump(put(draw, tree)).encode()

    def check(content: bytes) -> None:
        config.write_bytes(content)
        returns_or_tells(lambda: load_model(folder))

    try:
        fuzz(changed(), check)
    finally:
        config.write_bytes(whole)


@pytest.mark.slow
def test_checkpoints(tmp_path: Path) -> None:
    """As they are found, and with a checksum that fits, which everybody can write."""
    model = small_model("process.num_scales=9")
    state = {f"model.{name}": value for name, value in model.state_dict().items()}
    tree = {"recipe": model.recipe.to_dict(), "global_step": 3, "epoch": 0}
    path = tmp_path / "a.ckpt"
    write_checkpoint(path, {"state_dict": {"w": torch.zeros(3)}, **tree})
    small = path.read_bytes()

    @st.composite
    def changed(draw: st.DrawFn) -> Any:
        kind = draw(st.integers(0, 2))
        if kind == 0:
            return draw(damaged([small]))
        if kind == 1:
            return reseal(draw(damaged([small])))
        values = put(draw, tree)
        return {"state_dict": draw(st.sampled_from([state, {"model.x": 3}, {}, {"model.a": None}])), **values}

    def check(content: Any) -> None:
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            content["global_step"] = 1
            write_checkpoint(path, content)
        returns_or_tells(lambda: read_checkpoint(path))
        returns_or_tells(lambda: load_model(path))

    fuzz(changed(), check)


def reseal(content: bytes) -> bytes:
    body = content[:-65] if len(content) > 65 else content
    return body + hashlib.sha256(body).hexdigest().encode() + b"\n"


@pytest.mark.slow
def test_tensors(tmp_path: Path, folder: Path) -> None:
    """The same for exports: damage in the header or the numbers, with a checksum that fits in half of the cases."""
    meta = {"format": "dpm_scales model 3 sha256 " + "0" * 64}
    whole = save({"a": torch.zeros(3), "b": torch.ones(2, 2)}, meta)
    path = tmp_path / "a.safetensors"

    @st.composite
    def changed(draw: st.DrawFn) -> bytes:
        content = draw(damaged([whole]))
        if draw(st.booleans()):
            content = content.replace(b"0" * 64, hashlib.sha256(content).hexdigest().encode(), 1)
        return content

    def check(content: bytes) -> None:
        path.write_bytes(content)
        returns_or_tells(lambda: read_tensors(path))

    fuzz(changed(), check)


@pytest.mark.slow
def test_results_of_runs(tmp_path: Path) -> None:
    """The figures of a run, of which a sweep reads many."""
    path = tmp_path / "result.json"
    tree = {"overrides": ["process=vp", "seed=1"], "steps": 6, "seconds": 1.5, "val/loss": 0.25}

    @st.composite
    def changed(draw: st.DrawFn) -> bytes:
        if draw(st.booleans()):
            return draw(damaged([json.dumps(tree).encode()]))
        return json.dumps(put(draw, tree)).encode(errors="surrogatepass")

    def check(content: bytes) -> None:
        path.write_bytes(content)
        result = returns_or_tells(lambda: stored_result(path))
        assert result is None or (
            isinstance(result["steps"], int) and all(isinstance(o, str) for o in result["overrides"])
        )

    fuzz(changed(), check)


@pytest.mark.slow
def test_options_of_runs(tmp_path: Path) -> None:
    """What is let through holds no class but ours, no flag, no interpolation but of a place."""
    stored = tmp_path / "overrides.yaml"
    keys = "seed data process data._target_ hydra.searchpath data.root x.y _args_ run_dir --x".split()
    texts = "1 vp os.mkdir ${oc.env:HOME} {_target_:os.mkdir} [{a:{_target_:os.mkdir}}] a/../b /a '".split()
    overrides = st.builds(
        lambda sign, key, value: f"{sign}{key}={value}",
        st.sampled_from(["", "+", "++", "~", "-"]),
        st.sampled_from(keys),
        st.sampled_from(texts) | st.text(max_size=6),
    )

    def check(content: Any) -> None:
        stored.write_bytes(content if isinstance(content, bytes) else yaml.safe_dump(content).encode())
        argv = [f"run_dir={tmp_path}"]
        result = returns_or_tells(lambda: with_stored_overrides(argv))
        for override in (result or argv)[:-1]:
            assert not override.startswith("-") and "hydra" not in override.split("=")[0]
            assert "os.mkdir" not in override or "_target_" not in override
            assert "${" not in override or override.lstrip("+~").startswith("data.root=${oc.env:")
            assert "run_dir" not in override.split("=")[0]

    sample = yaml.safe_dump(["data=folder", "process.blur={_target_:dpm_scales.schedules.LogBlur}"]).encode()
    fuzz(st.lists(overrides | VALUES, max_size=4) | VALUES | damaged([sample]), check)


@pytest.mark.slow
def test_lists_of_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run with one file damaged, in a table, as CSV and as JSON."""
    texts = {
        "result.json": '{"overrides": ["seed=1"], "steps": 6, "seconds": 1.5, "val/loss": 0.25}',
        "metrics.csv": "step,epoch,train/loss,val/loss,eval/fid\n0,0,1.5,,\n5,0,1.25,0.25,30\n",
        "config.yaml": "trainer: {max_steps: 6}\nprocess: {_target_: dpm_scales.processes.VP}\nseed: 1\n",
        "overrides.yaml": "- seed=1\n- process=vp\n",
        "failure.txt": "an error\n",
        "evaluation.json": '{"format": "dpm_scales evaluation", "figures": {"FID": {"value": 3}}, "fake": {}}',
    }
    (tmp_path / "a").mkdir()
    for name, text in texts.items():
        (tmp_path / "a" / name).write_text(text)
    names = st.sampled_from(sorted(texts))

    def check(case: tuple[str, bytes]) -> None:
        name, content = case
        (tmp_path / "a" / name).write_bytes(content)
        try:
            for arguments in ([], ["--csv"], ["--json"]):
                list_runs([str(tmp_path), *arguments])
            returns_or_tells(lambda: list_runs(["best", str(tmp_path)]))
        finally:
            (tmp_path / "a" / name).write_text(texts[name])
        out, err = capsys.readouterr()
        assert "\x1b" not in out + err and "\u202e" not in out + err

    fuzz(names.flatmap(lambda name: st.tuples(st.just(name), damaged([texts[name].encode()]))), check)
