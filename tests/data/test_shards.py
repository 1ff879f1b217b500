"""Images from local tar shards: what is packed is read, in the order of one number, whole or with faults."""

from __future__ import annotations

import io
import pickle
import shutil
import tarfile
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image
from torch import Tensor

from dpm_scales import data, images
from dpm_scales.data.image_sets import FileImageSet
from dpm_scales.errors import UserError
from dpm_scales.shards import ShardSource, scan
from dpm_scales.shards.pack import Packing, pack, write_shard
from dpm_scales.shards.shard import Keys, decode, parse_label
from dpm_scales.shards.shard_set import ShardStore, open_shards
from support.shards import encoded, number_of, numbered, numbers_of, packed, samples, silent, source, tar
from support.shell import files, photos

pytestmark = pytest.mark.usefixtures("cache")

COUNT = 40


def batches(root: Any, start: int = 0, count: int = 3, workers: int = 0, **options: Any) -> list[list[int]]:
    """Numbers in the next batches of five from batch `start` on; three shards are trained on."""
    module = data.ImageDataModule(source(root, window=2, **options), 5, workers, seed=1)
    module.set_start_batch(start)
    loaded = [batch for batch, _ in zip(module.train_dataloader(), range(count), strict=False)]
    return [[number_of(image) for image in batch] for batch, _ in loaded]


# --- the contract of sources ------------------------------------------------------------------------------------------


def test_what_is_packed_is_read(shards: Path) -> None:
    found = source(shards, val_fraction=0)
    assert (found.channels, found.image_size, found.num_classes) == (1, (2, 3), 3)
    assert sorted(numbers_of(found.train())) == list(range(COUNT)) and len(found.val()) == 0
    coloured = ShardSource(shards, image_size=4, val_fraction=0).train()
    image, label = coloured[0]
    assert image.shape == (3, 4, 4) and image.dtype == torch.uint8 and label == -1


@pytest.mark.parametrize(("split", "share", "held"), [("shards", 0.2, 8), ("images", 0.25, 10), ("auto", 0.4, 16)])
def test_parts_are_disjoint_and_whole(shards: Path, split: str, share: float, held: int) -> None:
    found = source(shards, split=split, val_fraction=share, split_seed=2)
    train, val = numbers_of(found.train()), numbers_of(found.val())
    assert len(val) == held and sorted([*train, *val]) == list(range(COUNT))
    others = [numbers_of(source(shards, split=split, val_fraction=share, split_seed=s).val()) for s in range(4)]
    assert any(other != val for other in others)


def test_one_shard_gives_images_of_its_own_to_validation(tmp_path: Path) -> None:
    packed(tmp_path / "s", 10, per_shard=20)
    found = source(tmp_path / "s", val_fraction=0.01)
    assert len(found.val()) == 1 and sorted(numbers_of(found.train()) + numbers_of(found.val())) == list(range(10))
    with pytest.raises(UserError, match=r"split=shards needs two shards at least, and there are 1; set split=images"):
        source(tmp_path / "s", split="shards")


def test_parts_of_folders_stay_parts(tmp_path: Path) -> None:
    photos(tmp_path / "f" / "train" / "cat", 5)
    photos(tmp_path / "f" / "train" / "dog", 4, first=5)
    photos(tmp_path / "f" / "val" / "dog", 3, first=9)
    index = pack(tmp_path / "f", tmp_path / "s", Packing(4, labels="folder"), lambda *_: lambda _: None)
    assert [(s.name, s.part, s.images) for s in index.shards] == [
        ("train-000000.tar", "train", 4), ("train-000001.tar", "train", 4), ("train-000002.tar", "train", 1),
        ("val-000000.tar", "val", 3)]  # fmt: skip
    folder = data.ImageFolder(tmp_path / "f", labels="folder")
    found = ShardSource(tmp_path / "s", labels="cls")
    assert found.class_names == folder.class_names == ("cat", "dog")
    for ours, theirs in ((found.train(), folder.train()), (found.val(), folder.val())):
        pairs = [
            sorted((image.numpy().tobytes(), label) for image, label in (p[i] for i in range(len(p))))
            for p in (ours, theirs)
        ]
        assert pairs[0] == pairs[1]
    halves = ShardSource(f"{tmp_path}/s/train-*.tar", val_root=f"{tmp_path}/s/val-000000.tar", labels="cls")
    assert (len(halves.train()), len(halves.val())) == (9, 3)


@pytest.mark.parametrize("workers", [0, 2])
def test_any_batch_is_reached_by_its_number(shards: Path, workers: int) -> None:
    """In mid-shard, across epochs, with any number of workers."""
    whole = batches(shards, 0, 6) + batches(shards, 6, 6)
    assert sorted(sum(whole[:6], [])) != sum(whole[:6], []) and len(set(sum(whole[:6], []))) == 30
    assert batches(shards, 4, 6, workers) == whole[4:10]


def test_augmentation_follows_seed_epoch_and_index(shards: Path) -> None:
    part = source(shards, random_flip=True, image_size=[2, 3]).train()
    flips = {
        tuple(int(part.get(i, np.random.default_rng((0, epoch, i)))[0][0, 0, 0] == 7) for i in range(len(part)))
        for epoch in (0, 0, 1)
    }
    assert len(flips) == 2


def test_statistics_are_those_of_a_few_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed(tmp_path / "s", 60, per_shard=2)
    found = source(tmp_path / "s", val_fraction=0)
    opened: set[int] = set()
    original = type(found.train().shards).open
    monkeypatch.setattr(type(found.train().shards), "open", lambda s, n: (opened.add(n), original(s, n))[1])
    module = data.ImageDataModule(found, 4)
    statistics = module.statistics(max_images=10)
    assert 5 <= len(opened) <= 8
    pool = found.train().pool(10)
    shown = torch.stack([found.train()[pool[i]][0] for i in np.linspace(0, len(pool) - 1, 10).round().astype(int)])
    values = images.to_range(shown, (0.0, 1.0)).double()
    assert statistics["mean"] == pytest.approx(float(values.mean()), abs=1e-12)
    assert statistics["std"] == pytest.approx(float(values.std(correction=0)), abs=1e-9)
    assert module.statistics()["mean"] != statistics["mean"]  # of all


def test_the_state_tells_of_another_window_and_other_shards(shards: Path, tmp_path: Path) -> None:
    state = data.ImageDataModule(source(shards, window=2), 5).state_dict()
    packed(tmp_path / "s", COUNT, per_shard=9)
    with pytest.warns(UserWarning, match=r"order of the training images differs .*window 2 -> 3, shards \d+ -> \d+"):
        data.ImageDataModule(source(tmp_path / "s", window=3), 5).load_state_dict(state)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data.ImageDataModule(source(shards, window=2), 5, num_workers=1).load_state_dict(state)


# --- the format of webdataset -----------------------------------------------------------------------------------------


def test_webdataset_reads_what_is_packed(shards: Path) -> None:
    paths = sorted(map(str, shards.glob("*.tar")))
    theirs = webdataset.WebDataset(paths, shardshuffle=False).decode("pil").to_tuple("png", "cls")
    seen = [(number_of(np.asarray(image.convert("L"))[None]), label) for image, label in theirs]
    assert [n for n, _ in seen] == numbers_of(source(shards, val_fraction=0).train())
    assert all(label == n % 3 for n, label in seen)


def test_what_webdataset_writes_is_read(tmp_path: Path) -> None:
    """Without an index, which is made once; keys with folders and members of other kinds."""
    with webdataset.ShardWriter(f"{tmp_path}/set-%04d.tar", maxcount=7, verbose=0) as writer:
        for n in range(20):
            image = Image.fromarray(numbered(n))
            writer.write({"__key__": f"cat.s/{n:03d}", "png": image, "cls": n % 3, "seg.png": image, "json": {"l": n}})
    found = source(f"{tmp_path}/set-{{0000..0002}}.tar", val_fraction=0)
    assert numbers_of(found.train()) == list(range(20)) and found.num_classes == 3
    assert ShardSource(tmp_path, labels="json.l", val_fraction=0).num_classes == 20
    masks = ShardSource(tmp_path, image="seg.png", channels=1, val_fraction=0).train()
    assert number_of(masks[3][0]) == 3
    assert not (tmp_path / "index.json").exists()


def test_more_classes_than_images_are_refused(tmp_path: Path) -> None:
    """One label out of range would make a network of thousands of classes; names say that they are meant."""
    with webdataset.ShardWriter(f"{tmp_path}/set-%04d.tar", maxcount=7, verbose=0) as writer:
        for n in range(5):
            writer.write({"__key__": f"{n}", "png": Image.fromarray(numbered(n)), "cls": 19000 if n == 3 else 0})
    words = "labels go up to 19000, which makes 19001 classes of 5 images; number the classes from 0 without gaps"
    with pytest.raises(UserError, match=words):
        source(tmp_path, val_fraction=0)


def test_a_scan_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    tar(tmp_path / "a.tar", samples(range(6)))
    source(tmp_path)
    assert len(list(cache.rglob("*.json"))) == 1
    with monkeypatch.context() as patched:
        patched.setattr(scan, "scan", None)
        assert source(tmp_path, val_fraction=0).num_classes == 3
    tar(tmp_path / "a.tar", samples(range(8)))
    assert len(source(tmp_path, val_fraction=0).train()) == 8


def test_pickles_are_never_opened(tmp_path: Path) -> None:
    """webdataset would execute the member .pyd."""

    class Boom:
        def __reduce__(self) -> Any:
            return (Path(tmp_path / "boom").touch, ())

    bad = pickle.dumps(Boom())
    files_ = samples(range(4)) | {"0001.pyd": bad, "0002.pth": bad, "0003.npy": bad, "0009.pyd": bad}
    tar(tmp_path / "a.tar", files_)
    with pytest.warns(UserWarning, match="1 keys without an image: a.tar/0009"):
        assert numbers_of(source(tmp_path, val_fraction=0).train()) == [0, 1, 2, 3]
    assert not (tmp_path / "boom").exists()
    pickle.loads(bad)
    assert (tmp_path / "boom").exists()


@pytest.mark.parametrize("label", [b"1 2", b"-1", b"1.0", b"", b"\xff", b"9" * 30])
def test_labels_are_numbers(label: bytes) -> None:
    assert parse_label(b" 12\n", None) == 12 and parse_label(b'{"a": 3}', "a") == 3
    with pytest.raises(UserError, match="is not a class number"):
        parse_label(label, None)
    for text in (b'{"a": true}', b"[1]", b'{"b": 1}', b"{", b"[" * 10**5):
        with pytest.raises(UserError, match="not a class number|not JSON"):
            parse_label(text, "a")


def test_short_cuts_of_decoding_give_pillows_pixels() -> None:
    rng = np.random.default_rng(0)
    smooth = np.asarray(Image.fromarray(rng.integers(0, 256, (9, 11, 3), dtype=np.uint8)).resize((37, 23)))
    grey = smooth[..., 0].copy()
    exif = Image.Exif()
    exif[274] = 6
    turned = io.BytesIO()
    Image.fromarray(smooth).save(turned, "JPEG", exif=exif)
    jpeg = encoded(smooth, "JPEG")
    cases = [
        encoded(smooth, "PPM"),
        encoded(grey, "PPM"),
        encoded(smooth),
        jpeg,
        encoded(grey, "JPEG"),
        turned.getvalue(),
    ]
    for content in cases:
        for channels in (1, 3, None):
            for decoder in ("pillow", "simplejpeg"):
                assert torch.equal(decode(content, channels, "", decoder), images.load_image(content, channels))
    for spoilt in (jpeg[:-40], cases[0][:-1], b"P6\n99999 99999\n255\n", jpeg[:10]):
        for decoder in ("pillow", "simplejpeg"):
            with pytest.raises(UserError):
                decode(spoilt, 3, "", decoder)
    huge = bytearray(jpeg)
    place = huge.index(b"\xff\xc0")
    huge[place + 5 : place + 9] = b"\xff\xff\xff\xff"
    with pytest.raises(UserError, match="pixels"):
        decode(bytes(huge), 3, "", "simplejpeg")


# --- packing ----------------------------------------------------------------------------------------------------------


def test_the_same_images_give_the_same_bytes_after_a_kill_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed(tmp_path / "a")
    whole = {name: text for name, text in files(tmp_path / "a").items() if name != ".lock"}
    assert len(whole) == 6
    (tmp_path / "b.npz").write_bytes((tmp_path / "a.npz").read_bytes())
    settings = Packing(8, labels="folder")
    calls = iter(range(100))
    original = write_shard

    def write(*arguments: Any) -> Any:
        if next(calls) == 2:
            raise KeyboardInterrupt
        return original(*arguments)

    (tmp_path / "copy").mkdir()
    copy = Path(shutil.copy(tmp_path / "a.npz", tmp_path / "copy" / "a.npz"))
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("dpm_scales.shards.pack.write_shard", write)
        pack(copy, tmp_path / "b", settings, silent)
    with pytest.raises(UserError, match="its shards are not complete; repeat the command that makes them"):
        source(tmp_path / "b")
    times = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "b").glob("*.tar")}
    assert len(times) == 2
    pack(copy, tmp_path / "b", settings, silent)
    assert {name: text for name, text in files(tmp_path / "b").items() if name != ".lock"} == whole
    assert all((tmp_path / "b" / name).stat().st_mtime_ns == time for name, time in times.items())
    assert pack(copy, tmp_path / "b", settings, silent).to_json().encode() == whole["index.json"]
    for other in (Packing(7, labels="folder"), Packing(8, labels="folder", seed=1)):
        with pytest.raises(UserError, match="holds shards of another command or source; choose another out"):
            pack(copy, tmp_path / "b", other, silent)


@pytest.mark.parametrize("kind", ["keep", "png", "ppm"])
@pytest.mark.parametrize("place", ["folder", "zip"])
def test_formats_keep_pixels(kind: str, place: str, tmp_path: Path) -> None:
    root = photos(tmp_path / "f", 6, (5, 7))
    encoded_jpeg = encoded(np.random.default_rng(0).integers(0, 256, (5, 7), dtype=np.uint8), "JPEG")
    (root / "grey.JPG").write_bytes(encoded_jpeg)
    if place == "zip":
        with zipfile.ZipFile(tmp_path / "f.zip", "w") as archive:
            for path in sorted(root.iterdir()):
                archive.write(path, path.name)
        root = tmp_path / "f.zip"
    index = pack(root, tmp_path / "s", Packing(3, format=kind, shuffle=False), silent)
    assert index.image_size == (5, 7) and [s.images for s in index.shards] == [3, 3, 1]
    ours, theirs = ShardSource(tmp_path / "s", val_fraction=0), data.ImageFolder(root, val_fraction=0)
    assert all(torch.equal(ours.train()[i][0], theirs.train()[i][0]) for i in range(7))
    names = [name for shard in sorted((tmp_path / "s").glob("*.tar")) for name in tarfile.open(shard).getnames()]
    endings = {"keep": ["png"] * 6 + ["jpg"], "png": ["png"] * 7, "ppm": ["ppm"] * 6 + ["pgm"]}[kind]
    assert names == [f"{n:08d}.{ending}" for n, ending in enumerate(endings)]


def test_sizes_and_channels(tmp_path: Path) -> None:
    photos(tmp_path / "f", 3, (9, 12))
    photos(tmp_path / "f", 3, (12, 9), first=3)
    assert pack(tmp_path / "f", tmp_path / "a", Packing(), silent).image_size is None
    with pytest.raises(UserError, match="mixed sizes; set image_size"):
        ShardSource(tmp_path / "a")
    settings = Packing(format="png", image_size=(4, 6), channels=1)
    assert pack(tmp_path / "f", tmp_path / "b", settings, silent).image_size == (4, 6)
    folder = data.ImageFolder(tmp_path / "f", 1, [4, 6], val_fraction=0).train()
    for root, options in ((tmp_path / "a", {"image_size": [4, 6]}), (tmp_path / "b", {})):
        part = ShardSource(root, channels=1, val_fraction=0, **options).train()
        pixels = [sorted(one[i][0].numpy().tobytes() for i in range(6)) for one in (part, folder)]
        assert pixels[0] == pixels[1]
    with pytest.raises(UserError, match="change pixels, which format=keep copies; give format=png"):
        Packing(image_size=(4, 4))


def test_rotten_images_are_left_out_of_shards_and_counted(tmp_path: Path) -> None:
    root = photos(tmp_path / "f", 5)
    (root / "002.png").write_text("rotten")
    with pytest.warns(UserWarning, match=r"1 unreadable images are left out: 002\.png"):
        assert len(pack(root, tmp_path / "a", Packing(), silent)) == 4
    with pytest.raises(UserError, match=r"002\.png: .*; mend it, or set on_error=skip"):
        pack(root, tmp_path / "b", Packing(on_error="raise"), silent)
    good = (root / "001.png").read_bytes()
    (root / "001.png").write_bytes(good[:50] + b"\0\0\0\0" + good[54:])  # its header and end are sound
    with pytest.warns(UserWarning, match=r"1 images can't be read and are left out: .*001\.png"):
        assert [s.images for s in pack(root, tmp_path / "c", Packing(2, format="ppm"), silent).shards] in (
            [2, 1],
            [1, 2],
        )


def test_what_can_not_be_packed(tmp_path: Path) -> None:
    photos(tmp_path / "f", 2)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").touch()
    np.save(tmp_path / "wide.npy", np.zeros((3, 4, 4), dtype=np.uint16))
    cases = [
        (tmp_path / "f", tmp_path / "f" / "s", Packing(), "whose images are packed; choose another out"),
        (tmp_path / "f", tmp_path / "full", Packing(), r"full is not empty \(mine.txt\)"),
        (tmp_path / "f", tmp_path / "s", Packing(labels="folder"), "lies in no class folder"),
        (tmp_path / "wide.npy", tmp_path / "s", Packing(), r"images are uint16 \(3, 4, 4\); allowed is uint8"),
        ("https://a.b/c.zip", tmp_path / "s", Packing(), "allowed are a folder, a .zip"),
        (tmp_path / "none", tmp_path / "s", Packing(), "no such folder"),
    ]
    for place, out, settings, message in cases:
        with pytest.raises(UserError, match=message):
            pack(place, out, settings, silent)
    assert not (tmp_path / "s").exists()


# --- as sets to compare ----------------------------------------------------------------------------------------------


def test_shards_as_a_set_of_images(copied: Path) -> None:
    store = ShardStore(open_shards(copied, Keys()).shards)
    pictures = FileImageSet(store, limit=8)
    batch = next(iter(pictures.batches(8)))
    assert [number_of(image) for image in batch] == numbers_of(source(copied, val_fraction=0).train())[::5]
    assert pictures.sizes == ((2, 3),) and pictures.digest() == FileImageSet(store, 8).digest()


def test_tensors_are_writable(shards: Path) -> None:
    image: Tensor = source(shards).train()[0][0]
    image += 1
