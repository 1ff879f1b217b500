"""Images that are decoded once, kept in a file or on the device: the same batches, whatever happens to the file."""

from __future__ import annotations

import errno
import os
import pickle
import warnings
import zipfile
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from torch import Tensor

from dpm_scales import data
from dpm_scales.data.decoded import DecodedImages, DeviceImages, Draws
from dpm_scales.data.replaced import ReplacedImages
from dpm_scales.data.sampler import EpochImages, collate
from dpm_scales.errors import UserError
from dpm_scales.shards import ShardSource
from support.shards import encoded, number_of, numbered, packed, samples, tar

COUNT = 24
KINDS = ("folder", "zip", "shards", "hf")


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("DPM_SCALES_CACHE", str(folder))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(folder / "hf"))
    datasets.disable_progress_bars()
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same numbered images in each kind of set."""
    place = tmp_path_factory.mktemp("sets")
    packed(place / "shards", COUNT)
    (place / "folder").mkdir()
    contents = [encoded(numbered(n)) for n in range(COUNT)]
    with zipfile.ZipFile(place / "images.zip", "w") as archive:
        for n, content in enumerate(contents):
            (place / "folder" / f"{n:03d}.png").write_bytes(content)
            archive.writestr(f"{n:03d}.png", content)
    rows = {"image": [{"bytes": content, "path": None} for content in contents]}
    made = datasets.Dataset.from_dict(rows, features=datasets.Features({"image": datasets.Image()}))
    made.save_to_disk(place / "hf")
    return place


def source(place: Path, kind: str, **options: Any) -> data.ImageSource:
    options = {"channels": 1, "random_flip": True, "val_fraction": 0.2, **options}
    if kind == "shards":
        return ShardSource(place / "shards", labels="cls", window=2, **options)
    if kind == "hf":
        return data.HubSource(str(place / "hf"), **options)
    return data.ImageFolder(place / ("images.zip" if kind == "zip" else "folder"), **options)


def batches(module: data.ImageDataModule, count: int = 8) -> list[tuple[Tensor, Tensor]]:
    found: list[tuple[Tensor, Tensor]] = []
    while len(found) < count:
        module.set_start_batch(len(found))
        found += [tuple(batch) for batch in module.train_dataloader()]  # type: ignore[misc]
    return found[:count]


def same(a: Any, b: Any) -> bool:
    return all(x.equal(y) and lx.equal(ly) for (x, lx), (y, ly) in zip(a, b, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_batches_are_those_of_files_and_nothing_is_decoded_twice(
    kind: str, place: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over several epochs with flips; the second run, which has workers, decodes none."""
    plain = data.ImageDataModule(source(place, kind), 6, seed=1)
    expected = batches(plain)
    module = data.ImageDataModule(source(place, kind), 6, seed=1, decoded=True)
    assert same(batches(module), expected) and same(batches(module), expected)
    assert any(not a.equal(b) for (a, _), (b, _) in zip(expected[:3], expected[3:6], strict=True))
    held = [tuple(batch) for batch in module.val_dataloader()]
    assert same(held, [tuple(batch) for batch in plain.val_dataloader()])
    kept = sorted((cache / "decoded").iterdir())
    assert len(kept) == 2

    def refuse(*_: Any) -> None:
        raise AssertionError("decoded again")

    monkeypatch.setattr(ReplacedImages, "get", refuse)
    again = data.ImageDataModule(source(place, kind), 6, 2, seed=1, decoded=True)
    assert same(batches(again), expected)
    assert sorted((cache / "decoded").iterdir()) == kept


def decoded(place: Path, cache: Path, **options: Any) -> DecodedImages:
    return DecodedImages(source(place, "folder", **options).train(), (1, 2, 3), cache / "decoded")


def test_records_that_are_torn_are_decoded_again(place: Path, cache: Path) -> None:
    """Pixels, labels or checksums that a machine without power left wrong, one at a time."""
    part = decoded(place, cache, val_fraction=0)
    numbers = [number_of(part[i][0]) for i in range(COUNT)]
    assert numbers == list(range(COUNT))
    sound = part.path.read_bytes()
    assert len(sound) == COUNT * (8 + 6)
    for at in (0, 5, 8 * COUNT, len(sound) - 1):
        spoilt = bytearray(sound)
        spoilt[at] ^= 255
        part.path.write_bytes(spoilt)
        assert [number_of(decoded(place, cache, val_fraction=0)[i][0]) for i in range(COUNT)] == numbers
        assert part.path.read_bytes() == sound


def test_processes_fill_one_file(place: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    part = decoded(place, cache, val_fraction=0)
    children = []
    for rank in range(3):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                own = pickle.loads(pickle.dumps(part)) if rank == 2 else part  # as in a worker that was spawned
                status = int([number_of(own[i][0]) for i in range(rank, COUNT, 3)] != list(range(rank, COUNT, 3)))
            finally:
                os._exit(status)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * 3
    monkeypatch.setattr(ReplacedImages, "get", None)
    assert [number_of(part[i][0]) for i in range(COUNT)] == list(range(COUNT))


def test_other_images_and_views_have_files_of_their_own(place: Path, cache: Path, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for n in range(4):
        (tmp_path / "folder" / f"{n}.png").write_bytes(encoded(numbered(n)))
    first = decoded(tmp_path, cache, val_fraction=0)
    assert number_of(first[3][0]) == 3
    (tmp_path / "folder" / "3.png").write_bytes(encoded(numbered(9)))
    os.utime(tmp_path / "folder" / "3.png", ns=(1, 1))  # of the same size
    second = decoded(tmp_path, cache, val_fraction=0)
    assert number_of(second[3][0]) == 9 and second.path != first.path
    coloured = source(tmp_path, "folder", channels=3, val_fraction=0).train()
    assert DecodedImages(coloured, (3, 2, 3), cache).path.name != second.path.name
    tar(tmp_path / "shards" / "a.tar", samples(range(4)))
    paths = set()
    for options in ({"val_fraction": 0}, {"split": "images"}, {"split": "images", "split_seed": 1}):
        paths.add(DecodedImages(source(tmp_path, "shards", **options).train(), (1, 2, 3), cache).path)
    assert len(paths) == 3


def test_unreadable_images_are_counted_in_each_run(cache: Path, tmp_path: Path) -> None:
    members = samples(range(6), labels=False)
    members["0003.png"] = members["0003.png"][:40] + b"\0\0\0\0" + members["0003.png"][44:]  # its header is sound
    tar(tmp_path / "shards" / "a.tar", members)
    for _ in range(2):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            own = ShardSource(tmp_path / "shards", channels=1, val_fraction=0)
            part = data.ImageDataModule(own, 2, decoded=True).train_set
            assert [number_of(part[i][0]) for i in range(6)] == [0, 1, 2, 4, 4, 5]
        assert len(own.train().unreadable) == 1
    with pytest.raises(UserError, match=r"0003\.png"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        own = ShardSource(tmp_path / "shards", channels=1, val_fraction=0, verify="none")
        own.train().on_error = "raise"
        _ = DecodedImages(own.train(), (1, 2, 3), cache / "decoded")[3]


@pytest.mark.parametrize("option", ["decoded", "on_device"])
def test_what_can_not_be_kept(option: str, place: Path, cache: Path) -> None:
    cropped = source(place, "folder", random_crop=True, image_size=2)
    with pytest.raises(UserError, match=f"data.{option}=true keeps one view .*set data.random_crop=false") as caught:
        _ = data.ImageDataModule(cropped, 2, **{option: True}).train_set  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    if option == "decoded":
        for other in (data.Digits(), data.HubSource(str(place / "hf"), streaming=True, num_images=9)):
            with pytest.raises(UserError, match="is for images of files that are read by number"):
                _ = data.ImageDataModule(other, 2, decoded=True).train_set
    assert not cache.joinpath("decoded").exists()


def test_a_full_disk_and_a_link(place: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched, pytest.raises(UserError, match="No space left on device; free some space"):
        patched.setattr(os, "posix_fallocate", full)
        decoded(place, cache)
    assert not list((cache / "decoded").iterdir())
    path = decoded(place, cache).path
    path.unlink()
    (tmp_path / "mine").write_bytes(b"mine")
    path.symlink_to(tmp_path / "mine")
    with pytest.raises(UserError, match="cannot write"):
        decoded(place, cache)
    assert (tmp_path / "mine").read_bytes() == b"mine"


@pytest.mark.parametrize("kind", ["memory", *KINDS])
@pytest.mark.parametrize("flip", [False, True])
def test_batches_of_the_device_are_those_of_the_loader(kind: str, flip: bool, place: Path) -> None:
    if kind == "memory":
        images, labels = torch.arange(24 * 6, dtype=torch.uint8).reshape(24, 1, 2, 3), torch.arange(24) % 3
        part: data.ImageDataset = data.TensorImages(images, labels, random_flip=flip)
    else:
        part = source(place, kind, random_flip=flip, val_fraction=0).train()
    held = DeviceImages(part, (1, 2, 3), torch.device("cpu"), 0, False)
    keys = [(int(i), int(e)) for i, e in np.random.default_rng(0).integers(0, (24, 3), (40, 2))]
    theirs = collate([EpochImages(part, 5)[key] for key in keys])
    ours = held.gather(Draws(part, 5).__getitems__(keys))
    assert all(a.equal(b) and a.dtype == b.dtype for a, b in zip(ours, theirs, strict=True))
    plain = torch.stack([part[i][0] for i, _ in keys])
    assert plain.equal(ours[0]) is not flip
