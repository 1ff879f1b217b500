"""Sets of the library `datasets`, mapped and streamed: the pixels of files, batches by number, and what is refused."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch.utils.data import DataLoader

from dpm_scales import data
from dpm_scales.data.hf_rows import StreamError
from dpm_scales.data.replaced import UnreadableImageError
from dpm_scales.errors import UserError
from support.fake_hub import FakeHub, serving
from support.shards import encoded, number_of, numbered
from support.shell import photos

COUNT = 50
FEATURES = datasets.Features(
    {"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog", "eel"]), "n": datasets.Value("int64")}
)


@pytest.fixture(autouse=True)
def _alone(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No network, no bars, and a cache of its own."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("hf")))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()


def rows(count: int, **changes: Any) -> datasets.Dataset:
    held = {
        "image": [{"bytes": encoded(numbered(n)), "path": None} for n in range(count)],
        "label": [n % 3 for n in range(count)],
        "n": [n % 3 for n in range(count)],
    }
    return datasets.Dataset.from_dict(held | changes, features=FEATURES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Parquet files of 50 numbered images, in two files, and ten of validation."""
    place = tmp_path_factory.mktemp("set")
    rows(COUNT).select(range(20)).to_parquet(place / "train-00000.parquet")
    rows(COUNT).select(range(20, COUNT)).to_parquet(place / "train-00001.parquet")
    rows(10).to_parquet(place / "validation-00000.parquet")
    return place


def source(root: Any, **options: Any) -> data.HubSource:
    return data.HubSource(str(root), **{"channels": 1, "labels": "label", **options})


def stream(root: Any, **options: Any) -> data.HubSource:
    return source(root, **{"streaming": True, "num_images": COUNT, "val_fraction": 0, "window": 8, **options})


def numbers(part: Any) -> list[int]:
    items = [part[i] for i in range(len(part))]
    assert all(label == number_of(image) % 3 for image, label in items)
    return [number_of(image) for image, _ in items]


def batches(found: data.HubSource, start: int, count: int, workers: int = 0) -> list[list[int]]:
    module = data.ImageDataModule(found, 6, workers, seed=1)
    module.set_start_batch(start)
    loaded = [batch for batch, _ in zip(module.train_dataloader(), range(count), strict=False)]
    return [[number_of(image) for image in batch] for batch, _ in loaded]


# --- mapped -----------------------------------------------------------------------------------------------------------


def test_rows_are_images_with_labels(folder: Path) -> None:
    found = source(folder, val_split="validation")
    assert (found.channels, found.image_size, found.num_classes) == (1, (2, 3), 3)
    assert found.class_names == ("cat", "dog", "eel") and found.split_note == "train + validation"
    assert numbers(found.train()) == list(range(COUNT)) and numbers(found.val()) == list(range(10))
    held = source(folder, val_fraction=0.2)
    train, val = numbers(held.train()), numbers(held.val())
    assert sorted([*train, *val]) == list(range(COUNT))
    assert np.bincount([n % 3 for n in val]).tolist() == [3, 3, 3]
    coloured = data.HubSource(str(folder), image_size=4).train()
    assert coloured[0][0].shape == (3, 4, 4) and coloured[0][1] == -1


@pytest.mark.parametrize("kind", ["save_to_disk", "splits on disk", "file", "images", "arrow"])
def test_places_of_this_machine(kind: str, folder: Path, tmp_path: Path) -> None:
    place = tmp_path / "place"
    options: dict[str, Any] = {"val_fraction": 0}
    if kind == "save_to_disk":
        rows(4).save_to_disk(place)
    elif kind == "splits on disk":
        datasets.DatasetDict({"train": rows(4), "test": rows(2)}).save_to_disk(place)
        options["val_split"] = "test"
    elif kind == "file":
        place = folder / "train-00000.parquet"
    elif kind == "arrow":
        rows(4).save_to_disk(tmp_path / "disk")
        place = next((tmp_path / "disk").glob("*.arrow"))
    else:
        photos(place / "cat", 3, (4, 5))
        photos(place / "dog", 2, (4, 5), first=3)
    found = source(place, **options)
    if kind == "images":
        theirs = data.ImageFolder(place, 1, labels="folder", val_fraction=0)
        assert found.class_names == theirs.class_names == ("cat", "dog")
        pairs = [{(image.numpy().tobytes(), label) for image, label in one.train()} for one in (found, theirs)]  # type: ignore[attr-defined]
        assert pairs[0] == pairs[1] and len(pairs[0]) == 5
    else:
        assert numbers(found.train()) == list(range(20 if kind == "file" else 4))
    if kind == "splits on disk":
        with pytest.raises(UserError, match="unknown split='val': .*allowed: test, train"):
            source(place, split="val")


@pytest.mark.parametrize("streaming", [False, True])
def test_sets_of_the_hub(streaming: bool, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a revision; only the files of the set are asked for, and a failing Hub ends with one line."""
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    hub = FakeHub()
    hub.branches["owner/name"] = {"v1": hub.upload("owner/name", folder)}
    hub.add("owner/name", {"train-0.parquet": b"other"})
    options = {"streaming": True, "num_images": COUNT, "val_fraction": 0} if streaming else {"val_split": "validation"}
    with serving(hub, tmp_path / "hub"):
        found = data.HubSource("owner/name", channels=1, labels="label", revision="v1", **options)
        assert numbers(found.train()) == list(range(COUNT)) and found.class_names == ("cat", "dog", "eel")
        parquet = {name for name in hub.downloads() if name.endswith(".parquet")}
        assert parquet <= {path.name for path in folder.iterdir()} and "train-00001.parquet" in parquet
        with pytest.raises(UserError, match="owner/other: ") as caught:
            data.HubSource("owner/other")
        assert "\n" not in str(caught.value)


def test_integer_columns_are_classes(folder: Path) -> None:
    found = source(folder, labels="n", val_fraction=0)
    assert found.num_classes == 3 and found.class_names is None
    with pytest.raises(UserError, match="'n' of a stream does not state its classes"):
        stream(folder, labels="n")


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("streaming", [False, True])
def test_any_batch_is_reached_by_its_number(folder: Path, streaming: bool, workers: int) -> None:
    """Of a stream too, which begins again; 50 images make eight batches an epoch, and windows of eight images seven."""
    make = stream if streaming else source
    options = {"val_fraction": 0}
    whole = batches(make(folder, **options), 0, 8) + batches(make(folder, **options), 8, 8)
    assert len({n for batch in whole[:8] for n in batch}) == 48 and whole[:8] != whole[8:]
    assert batches(make(folder, **options), 5, 8, workers) == whole[5:13]


# --- streams ----------------------------------------------------------------------------------------------------------


def test_a_stream_is_permuted_in_windows(folder: Path) -> None:
    found = stream(folder)
    assert numbers(found.train()) == list(range(COUNT))
    order = sum(batches(found, 0, 8), [])
    for window in range(6):
        mine = order[8 * window : 8 * window + 8]
        assert sorted(mine) == list(range(8 * window, 8 * window + 8)) and mine != sorted(mine)


def test_a_stream_is_read_forward_once_an_epoch(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    part = stream(folder).train()
    begun: list[int] = []
    original = type(part.stream).skip
    monkeypatch.setattr(type(part.stream), "skip", lambda self, n: (begun.append(n), original(self, n))[1])
    found = stream(folder)
    assert len(batches(found, 0, 8)) == 8 and begun == [0]
    assert len(batches(found, 6, 8)) == 8 and begun == [0, 32, 0]  # batch 6 begins in window 4


def test_the_first_images_of_a_stream_are_held_out(folder: Path) -> None:
    found = stream(folder, val_fraction=0.2)
    assert numbers(found.val()) == list(range(10)) and numbers(found.train()) == list(range(10, COUNT))
    assert found.split_note == "a stream, whose first 10 images are held out"
    assert list(found.train().pool(7)) == list(range(7))


def test_ranks_of_a_stream_share_its_batches(folder: Path) -> None:
    whole = batches(stream(folder), 0, 4)
    parts = []
    for rank in (0, 1):
        module = data.ImageDataModule(stream(folder), 3, seed=1)
        sampler = data.ShuffledBatches(COUNT, 3, 1, lambda: 0, True, rank, 2, order=module.train_set.order(1))
        loader = DataLoader(data.sampler.EpochImages(module.train_set, 1), 3, sampler=sampler)
        parts.append([[number_of(image) for image in batch] for batch, _ in loader][:4])
    assert [sorted(a + b) for a, b in zip(*parts, strict=True)] == [sorted(batch) for batch in whole]


def test_a_stream_that_ends_early(folder: Path) -> None:
    with pytest.raises(StreamError, match="the stream ended after 50 images; give data.num_images=50"):
        numbers(stream(folder, num_images=60).train())
    assert len(stream(folder, num_images=30).train()) == 30
    with pytest.raises(UserError, match="does not state its number of images; give data.num_images=N"):
        stream(folder, num_images=None)
    with pytest.raises(UserError, match="num_images is for streaming=true"):
        source(folder, num_images=9)


# --- faults -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streaming", [False, True])
def test_faulty_rows_are_replaced_and_counted(streaming: bool, tmp_path: Path) -> None:
    content: list[Any] = [{"bytes": encoded(numbered(n)), "path": None} for n in range(12)]
    content[3] = {"bytes": b"rotten", "path": None}
    content[5] = None
    content[7] = {"bytes": None, "path": "https://a.b/c.png"}
    content[11] = {"bytes": None, "path": "/dev/zero"}
    labels = [n % 3 if n != 9 else None for n in range(12)]
    table = pa.table({"image": content, "label": labels, "n": labels}, schema=FEATURES.arrow_schema)
    pq.write_table(table, tmp_path / "a.parquet")  # `datasets` itself would fetch the image to write it
    make = stream if streaming else source
    options: dict[str, Any] = {"val_fraction": 0} | ({"num_images": 12, "window": 4} if streaming else {})
    found = make(tmp_path, **options)
    with pytest.warns(UserWarning) as caught:
        seen = [number_of(found.train()[i][0]) for i in range(12)]
    told = "".join(str(warning.message) for warning in caught)
    assert "a row without an image" in told and "its image is at https://a.b/c.png, which is not fetched" in told
    assert "its label is None, and there are 3 classes" in told and "/dev/zero is a device" in told
    # within the window of a stream, otherwise the next, in a circle
    assert seen == ([0, 1, 2, 0, 4, 6, 6, 4, 8, 10, 10, 8] if streaming else [0, 1, 2, 4, 4, 6, 6, 8, 8, 10, 10, 0])
    assert len(found.train().unreadable) == 5
    with pytest.raises(UnreadableImageError, match=r"(row|image) 3"):
        make(tmp_path, on_error="raise", **options).train()[3]


def test_images_of_another_size_are_faulty_or_brought_to_one(tmp_path: Path) -> None:
    content = [{"bytes": encoded(numbered(n, (2, 3 + n % 2))), "path": None} for n in range(4)]
    rows(4, image=content).to_parquet(tmp_path / "a.parquet")
    with pytest.warns(UserWarning, match=r"its size \(2, 4\) is not \(2, 3\)"):
        assert number_of(source(tmp_path, val_fraction=0).train()[1][0]) == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert source(tmp_path, val_fraction=0, image_size=[2, 3], resize_mode="crop").train()[1][0].shape == (1, 2, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "test"}, r"Unknown split \"test\""),
        ({"image": "picture"}, "unknown column image=picture: .*allowed: image, label, n"),
        ({"image": "label"}, "the column 'label' holds no images"),
        ({"labels": "class"}, "unknown column labels=class"),
        ({"labels": "image"}, "the column 'image' holds no images, or is that of labels"),
        ({"window": 0}, "window=0"),
        ({"val_fraction": 1}, "val_fraction=1"),
        ({"channels": 2}, "channels=2"),
        ({"num_images": 0, "streaming": True}, "num_images=0"),
        ({"root": "/nowhere/at/all"}, "no such folder or file, and no name of a set on the Hub"),
        ({"root": "https://a.b/c"}, "no name of a set on the Hub"),
        ({"root": "owner/name", "download": False}, "data.download=false fetches nothing.*give data.download=true"),
        ({"root": "owner/name"}, "^owner/name: "),
    ],
)
def test_what_is_not_there(folder: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        source(options.pop("root", folder), **options)
    assert "\n" not in str(caught.value)


def test_other_files_and_scripts_are_not_read(tmp_path: Path) -> None:
    """Nor is a folder's README, which could name addresses."""
    (tmp_path / "tars").mkdir()
    (tmp_path / "tars" / "a.tar").touch()
    with pytest.raises(UserError, match="holds a.tar; allowed are parquet, arrow and image files; tar shards are for"):
        source(tmp_path / "tars")
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "code.py").write_text("raise SystemExit")
    with pytest.raises(UserError, match=r"holds code\.py"):
        source(tmp_path / "code")
    named = tmp_path / "named"
    named.mkdir()
    rows(6).to_parquet(named / "a.parquet")
    (named / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files: https://a.b/c.parquet\n---\n"
    )
    assert len(source(named, val_fraction=0).train()) == 6


def test_statistics_of_a_stream_are_those_of_its_beginning(folder: Path) -> None:
    module = data.ImageDataModule(stream(folder), 6)
    first = torch.stack([module.train_set[i][0] for i in range(10)]).double() / 255
    assert module.statistics(10)["mean"] == pytest.approx(first.mean().item(), rel=1e-6)
