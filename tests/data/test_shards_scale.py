"""Shards at scale: memory and open files that stay flat, more ranks than shards, and other libraries as readers."""

from __future__ import annotations

import gc
import os
import tracemalloc
import warnings
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from dpm_scales import data
from dpm_scales.data.sampler import EpochImages, collate
from dpm_scales.errors import UserError
from dpm_scales.shards import ShardSource
from dpm_scales.shards.scan import index_of
from dpm_scales.shards.shard import Keys
from dpm_scales.shards.shard_set import ShardError
from support.shards import number_of, packed, samples, served, tar

pytestmark = pytest.mark.usefixtures("cache")

COUNT = 40


def epochs(module: data.ImageDataModule) -> Callable[[int], None]:
    """Return a function that reads so many epochs, with one loader, as training does."""
    loader, done = module.train_dataloader(), 0

    def read(number: int) -> None:
        nonlocal done
        for _ in range(number):
            module.set_start_batch(done)
            for _ in loader:
                done += 1

    return read


def traced() -> int:
    """Return the bytes that Python and NumPy hold."""
    gc.collect()
    return tracemalloc.get_traced_memory()[0]


def test_memory_and_open_files_stay_flat(tmp_path: Path) -> None:
    """Over epochs of thirty shards, of which four stay open: less than an object for each image that was read."""
    packed(tmp_path / "s", 240)
    options: dict[str, Any] = {"split": "images", "val_fraction": 0.25, "random_flip": True}
    source = ShardSource(tmp_path / "s", channels=1, window=2, **options)
    files = len(os.listdir("/proc/self/fd"))
    tracemalloc.start()
    try:
        read = epochs(data.ImageDataModule(source, 12))
        held = []
        for number in (10, 4, 4, 4):
            read(number)
            held.append(traced())
        # the least of some growths: libraries' lists of free memory fill up at any time, and a leak grows always
        assert min(after - before for before, after in pairwise(held)) < 16 * 4 * 180
    finally:
        tracemalloc.stop()
    assert len(os.listdir("/proc/self/fd")) <= files + 4 == files + source.train().shards.keep


@pytest.mark.parametrize("remote", [False, True])
def test_more_ranks_than_shards_share_the_batches_of_one(tmp_path: Path, remote: bool) -> None:
    packed(tmp_path / "s", 40, per_shard=20)
    with served(tmp_path / "s") as (url, _):
        source = ShardSource(url if remote else tmp_path / "s", channels=1, val_fraction=0, window=1)
        whole = [sorted(map(number_of, images)) for images, _ in data.ImageDataModule(source, 10).train_dataloader()]
        parts: list[list[list[int]]] = []
        for rank in range(5):
            sampler = data.ShuffledBatches(40, 2, 0, lambda: 0, True, rank, 5, order=source.train().order(0))
            loader = DataLoader(EpochImages(source.train(), 0), 2, sampler=sampler, collate_fn=collate)
            parts.append([[number_of(image) for image in images] for images, _ in loader])
    assert [sorted(sum(batch, [])) for batch in zip(*parts, strict=True)] == whole
    assert sorted(sum(whole, [])) == list(range(40))


def test_empty_sets_end_with_one_line(tmp_path: Path) -> None:
    """Shards of nothing, of labels alone, and an index of none; an empty shard among others is no fault."""
    tar(tmp_path / "none" / "a.tar", {})
    tar(tmp_path / "labels" / "a.tar", {"0.cls": b"1"})
    tar(tmp_path / "other" / "a.tar", {"0.txt": b"1"})
    for name in ("none", "labels", "other"):
        with (
            warnings.catch_warnings(),
            pytest.raises(UserError, match="the shards hold no image that can be read") as caught,
        ):
            warnings.simplefilter("ignore")
            ShardSource(tmp_path / name)
        assert "\n" not in str(caught.value)
    (tmp_path / "none" / "index.json").write_text(index_of([], Keys()).to_json())
    with pytest.raises(UserError, match="the shards hold no image that can be read"):
        ShardSource(tmp_path / "none")
    tar(tmp_path / "some" / "a.tar", {})
    tar(tmp_path / "some" / "b.tar", samples(range(4)))
    tar(tmp_path / "some" / "c.tar", {})
    part = ShardSource(tmp_path / "some", channels=1, val_fraction=0, window=1).train()
    assert sorted(part.order(0)(0, np.arange(4)).tolist()) == [0, 1, 2, 3]
    assert [number_of(part[i][0]) for i in range(4)] == [0, 1, 2, 3]


def test_a_shard_that_changes_during_a_run_ends_it(tmp_path: Path) -> None:
    """Of as many images as before, which would otherwise be trained on in their place; and an index that changes."""
    packed(tmp_path / "s", 24)
    part = ShardSource(tmp_path / "s", channels=1, val_fraction=0, window=1).train()
    assert number_of(part[0][0]) >= 0 and len(part.shards.entries) == 3
    (tmp_path / "s" / "index.json").write_text("{")
    path = tmp_path / "s" / "shard-000001.tar"
    path.write_bytes(path.read_bytes() + bytes(512))
    with pytest.raises(ShardError, match=r"shard-000001\.tar: has \d+ bytes, and the index says \d+; it was changed"):
        part[8]
    assert number_of(part[16][0]) >= 0


def test_without_an_index_damaged_shards_are_read_up_to_the_damage(tmp_path: Path) -> None:
    """Cut off, joined to another, and overwritten in the middle; in training too, and by all processes."""
    whole = tar(tmp_path / "x" / "x.tar", samples(range(6))).read_bytes()
    other = tar(tmp_path / "x" / "y.tar", samples(range(6, 9))).read_bytes()
    (tmp_path / "s").mkdir()
    spoilt = bytearray(whole)
    spoilt[6144:6656] = b"?" * 512  # the header of the third image
    for name, content in (("a", whole[:2600]), ("b", whole + other), ("c", bytes(spoilt)), ("d", other)):
        (tmp_path / "s" / f"{name}.tar").write_bytes(content)
    with pytest.warns(UserWarning, match=r"3 of 4 shards have faults, and are read as far as they can be; the first"):
        source = ShardSource(tmp_path / "s", channels=1, val_fraction=0, window=2)
    counts = [entry.images for entry in source.train().shards.entries]
    assert counts[1] == 6 and counts[3] == 3 and 0 < counts[0] < 6 and 0 < counts[2] < 6
    expected = [n for first, count in zip((0, 0, 0, 6), counts, strict=True) for n in range(first, first + count)]
    loader = data.ImageDataModule(source, 2, 1, drop_last=False).train_dataloader()
    assert {number_of(image) for images, _ in loader for image in images} == set(expected)
    assert [number_of(source.train()[i][0]) for i in range(len(expected))] == expected


def test_endings_of_any_case(tmp_path: Path) -> None:
    members = {name.replace("png", "PNG").replace("cls", "Cls"): text for name, text in samples(range(4)).items()}
    tar(tmp_path / "a.tar", members)
    for image, labels in ((None, "cls"), ("png", "CLS"), ("PNG", "Cls")):
        part = ShardSource(tmp_path, image=image, labels=labels, channels=1, val_fraction=0).train()
        assert [(number_of(image), label) for image, label in (part[i] for i in range(4))] == [
            (0, 0), (1, 1), (2, 2), (3, 0)]  # fmt: skip


def test_datasets_reads_what_is_packed(tmp_path: Path) -> None:
    """The library's own reader of webdataset's format."""
    packed(tmp_path / "s", 24)
    files = sorted(map(str, (tmp_path / "s").glob("*.tar")))
    cached = str(tmp_path / "hf")
    rows: Any = datasets.load_dataset("webdataset", data_files=files, split="train", cache_dir=cached)
    part = ShardSource(tmp_path / "s", channels=1, labels="cls", val_fraction=0).train()
    assert len(rows) == len(part) == 24
    for row, (image, label) in zip(rows, (part[i] for i in range(24)), strict=True):
        assert torch.equal(torch.from_numpy(np.array(row["png"].convert("L"))), image[0]) and row["cls"] == label
