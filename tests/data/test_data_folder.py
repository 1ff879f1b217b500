"""Images from folders and archives."""

from __future__ import annotations

import gzip
import pickle
import shutil
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dpm_scales import data
from dpm_scales.errors import UserError
from support.shell import SMALL, call


def put(path: Path, level: int = 0, size: tuple[int, int] = (8, 8), mode: str = "RGB") -> Path:
    """A file of one colour, or of noise if level < 0; size = (H, W)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (*size, 3) if mode == "RGB" else size
    rng = np.random.default_rng(abs(level))
    array = rng.integers(0, 256, shape) if level < 0 else np.full(shape, level)
    Image.fromarray(array.astype(np.uint8)).save(path)
    return path


def levels(dataset: data.ImageDataset) -> list[int]:
    return [int(dataset[index][0][0, 0, 0]) for index in range(len(dataset))]


def make_zip(folder: Path, target: Path) -> Path:
    with zipfile.ZipFile(target, "w") as archive:
        for path in sorted(folder.rglob("*.*")):
            archive.write(path, path.relative_to(folder))
    return target


def test_folder_split_and_labels(tmp_path: Path) -> None:
    for number, name in enumerate(["train/cat/a.png", "train/dog/b.png", "train/dog/sub/c.JPG", "val/dog/d.png"]):
        put(tmp_path / "pictures" / name, 10 * number)
    put(tmp_path / "pictures" / "train" / ".hidden.png")
    for root in (tmp_path, tmp_path / "pictures", make_zip(tmp_path / "pictures", tmp_path / "all.zip")):
        source = data.ImageFolder(root if root.suffix else tmp_path / "pictures", labels="folder")
        assert (levels(source.train()), levels(source.val())) == ([0, 10, 20], [30])
        assert [source.train()[i][1] for i in range(3)] == [0, 1, 1]
        assert source.val()[0][1] == 1
        assert (source.num_classes, source.class_names) == (2, ("cat", "dog"))
    assert data.ImageFolder(tmp_path).train()[0][1] == -1


def test_header_says_which_images_train_and_which_classes_there_are(tmp_path: Path) -> None:
    """How many train and validate, from which folders, and what became of the others."""
    for name in ("train/cat/a", "train/dog/b", "train/dog/c", "test/dog/d", "val/dog/e", "val/dog/f"):
        put(tmp_path / "pictures" / f"{name}.png", -ord(name[-1]))
    options = (*SMALL, "data=folder", "data.root=pictures", "data.labels=folder", "data.batch_size=2")

    def header(*more: str) -> str:
        outcome = call("train.py", *options, *more, "trainer.max_steps=1", f"run_dir={len(more)}", cwd=tmp_path)
        assert outcome.status == 0, outcome.err
        return outcome.out.splitlines()[0]

    line = " 3 + 2 images (train/ + val/; not used: test/) of 8x8x3, 2 classes: cat, dog, batch 2 "
    assert line in header("conditional=true")
    shutil.rmtree(tmp_path / "pictures" / "val")
    line = " 3 + 1 images (train/ + test/) of 8x8x3, 2 classes, not shown without conditional=true, batch 2 "
    assert line in header()
    assert data.ImageFolder(tmp_path / "pictures", split="fraction").split_note == ""
    put(tmp_path / "pictures" / "g.png")
    note = data.ImageFolder(tmp_path / "pictures").split_note
    assert note == "train/ + test/; not used: files beside them"


def test_random_split_is_seeded_and_complete(tmp_path: Path) -> None:
    for number in range(20):
        put(tmp_path / f"{number:02}.png", number)
    source = data.ImageFolder(tmp_path, val_fraction=0.25)
    assert sorted(levels(source.train()) + levels(source.val())) == list(range(20))
    assert len(source.val()) == 5
    assert levels(data.ImageFolder(tmp_path, val_fraction=0.25).val()) == levels(source.val())
    assert levels(data.ImageFolder(tmp_path, val_fraction=0.25, split_seed=1).val()) != levels(source.val())
    with pytest.raises(UserError, match="needs train/"):
        data.ImageFolder(tmp_path, split="folder")
    with pytest.raises(UserError, match="no class folder"):
        data.ImageFolder(tmp_path, labels="folder")


def test_repairing_a_file_moves_no_other(tmp_path: Path) -> None:
    for number in range(20):
        put(tmp_path / f"{number:02}.png", number)
    before = levels(data.ImageFolder(tmp_path).val())
    (tmp_path / "07.png").write_text("broken")
    with pytest.warns(UserWarning, match=r"1 unreadable images are left out: 07\.png"):
        after = levels(data.ImageFolder(tmp_path).val())
    assert [level for level in before if level != 7] == after


def test_missing_and_empty_places(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.zip").write_text("hello")
    (tmp_path / "a.tar").write_text("hello")
    for name, words in {
        "none": "no such folder",
        "empty": "no images in it",
        "text.zip": "not a readable zip",
        "a.tar": "allowed are a folder and a .zip",
    }.items():
        with pytest.raises(UserError, match=words):
            data.ImageFolder(tmp_path / name)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", ["truncated.jpg", "text.png"])
def test_bad_files_at_the_start(tmp_path: Path, kind: str, packed: bool) -> None:
    folder = tmp_path / "f"
    for number in range(4):
        put(folder / f"{number}.jpg", -1 - number, size=(64, 64))
    whole = (folder / "0.jpg").read_bytes()
    (folder / kind).write_bytes(whole[: len(whole) // 2] if kind == "truncated.jpg" else b"hello")
    root = make_zip(folder, tmp_path / "f.zip") if packed else folder
    with pytest.warns(UserWarning, match=f"1 unreadable images are left out: {kind}") as caught:
        source = data.ImageFolder(root, val_fraction=0.0)
    assert len(caught) == 1
    assert len(source.train()) == 4
    with pytest.raises(UserError, match=kind) as error:
        data.ImageFolder(root, on_error="raise")
    assert "\n" not in str(error.value)


def test_whole_files_with_a_tail_are_kept(tmp_path: Path) -> None:
    path = put(tmp_path / "a.jpg", 100)
    path.write_bytes(path.read_bytes() + bytes(1000))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(data.ImageFolder(tmp_path).train()) == 1


def test_damage_inside_needs_full_verification(tmp_path: Path) -> None:
    put(tmp_path / "a.png")
    path = put(tmp_path / "b.png", -1, size=(64, 64))
    content = bytearray(path.read_bytes())
    content[3000:3100] = bytes(100)
    path.write_bytes(bytes(content))
    assert len(data.ImageFolder(tmp_path, image_size=8, val_fraction=0.0).train()) == 2
    with pytest.warns(UserWarning, match="1 unreadable"):
        assert len(data.ImageFolder(tmp_path, image_size=8, val_fraction=0.0, verify="full").train()) == 1


def test_bad_files_while_reading(tmp_path: Path) -> None:
    for number in range(3):
        put(tmp_path / f"{number}.png", number)
    lazy: dict[str, Any] = {"image_size": 8, "val_fraction": 0.0, "verify": "none"}
    (tmp_path / "1.png").write_text("hello")
    train = data.ImageFolder(tmp_path, **lazy).train()
    with pytest.warns(UserWarning, match=r"1\.png") as caught:
        assert levels(train) == [0, 2, 2]
        assert levels(train) == [0, 2, 2]
    assert len(caught) == 1
    assert train.unreadable == {"1.png"}
    strict = data.ImageFolder(tmp_path, on_error="raise", **lazy)
    with pytest.raises(UserError, match=r"1\.png: not a readable"):
        strict.train()[1]
    loader = data.ImageDataModule(strict, batch_size=3, num_workers=1).train_dataloader()
    with pytest.raises(UserError, match=r"1\.png: not a readable") as error:
        list(loader)
    assert str(error.value).startswith(str(tmp_path))
    for path in tmp_path.iterdir():
        path.write_text("hello")
    with pytest.raises(UserError, match="none of its 3 images"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data.ImageFolder(tmp_path, **lazy).train()[0]
    with pytest.raises(UserError, match="none of its 3 images"):
        data.ImageFolder(tmp_path)


def test_mixed_sizes_need_a_size(tmp_path: Path) -> None:
    put(tmp_path / "a.png", size=(8, 12))
    put(tmp_path / "b.png", size=(16, 12))
    with pytest.raises(UserError, match=r"a\.png is \(8, 12\), b\.png \(16, 12\).* set image_size"):
        data.ImageFolder(tmp_path)
    with pytest.raises(UserError, match="resize_mode"):
        data.ImageFolder(tmp_path, image_size=[8, 12], resize_mode="none")
    with pytest.raises(UserError, match="below the crop"):
        data.ImageFolder(tmp_path, image_size=10, resize_mode="crop")
    for mode in ("resize", "resize_crop", "crop"):
        source = data.ImageFolder(tmp_path, image_size=[8, 10], resize_mode=mode, val_fraction=0.5)
        assert source.train()[0][0].shape == source.val()[0][0].shape == (3, 8, 10)


def test_resize_crop_keeps_the_shape_of_things(tmp_path: Path) -> None:
    array = np.zeros((20, 60, 3), np.uint8)
    array[:, 20:40] = 255
    Image.fromarray(array).save(tmp_path / "a.png")
    cut = data.ImageFolder(tmp_path, image_size=10).train()[0][0]
    assert (cut > 200).all()
    squeezed = data.ImageFolder(tmp_path, image_size=10, resize_mode="resize").train()[0][0]
    assert (squeezed[:, :, 0] < 50).all()
    assert data.ImageFolder(tmp_path, image_size=[7, 9], channels=1).train()[0][0].shape == (1, 7, 9)


def test_wrong_options_are_named(tmp_path: Path) -> None:
    put(tmp_path / "a.png")
    for options, words in [
        ({"resize_mode": "crops"}, "did you mean 'crop'"),
        ({"channels": 2}, "channels=2"),
        ({"image_size": 0}, "image_size=0"),
        ({"image_size": [8]}, "image_size"),
        ({"labels": "file"}, "labels='file'"),
        ({"random_crop": True}, "random_crop"),
        ({"verify": "none"}, "verify=none needs image_size"),
        ({"val_fraction": 1.0}, "val_fraction=1.0"),
    ]:
        with pytest.raises(UserError, match=words):
            data.ImageFolder(tmp_path, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["/etc/a.png", "../a.png", "b/../../a.png", "C:\\a.png", "..\\a.png"])
def test_unsafe_archive_members_are_refused(tmp_path: Path, name: str) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr(name, b"x")
    with pytest.raises(UserError, match="unsafe member path"):
        data.ImageFolder(tmp_path / "a.zip")


def test_absurd_archive_members_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dpm_scales.data.files.MAX_MEMBER_BYTES", 10**6)
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", bytes(2 * 10**6))
    with pytest.raises(UserError, match="unpacks to 2000000 bytes"):
        data.ImageFolder(tmp_path / "a.zip")


def test_archives_travel_to_workers(tmp_path: Path) -> None:
    for number in range(8):
        put(tmp_path / "f" / f"{number}.png", number)
    source = data.ImageFolder(make_zip(tmp_path / "f", tmp_path / "f.zip"), val_fraction=0.0)
    assert levels(pickle.loads(pickle.dumps(source)).train()) == list(range(8))
    batches = list(data.ImageDataModule(source, batch_size=2, num_workers=2).train_dataloader())
    assert sorted(int(image[0, 0, 0]) for batch, _ in batches for image in batch) == list(range(8))


def test_bsds_patches_and_whole_photos(tmp_path: Path) -> None:
    for number, part in enumerate(["train", "train", "val", "test"]):
        put(tmp_path / "images" / part / f"{number}.jpg", -1 - number, (321, 481) if number % 2 else (481, 321))
    patches = data.BSDS500(tmp_path, patch_size=48)
    assert (len(patches.train()), len(patches.val())) == (2, 1)
    views = [patches.train().get(0, np.random.default_rng(seed))[0] for seed in (0, 0, 1)]
    assert views[0].shape == (3, 48, 48)
    assert torch.equal(views[0], views[1])
    assert not torch.equal(views[0], views[2])
    whole = data.BSDS500(tmp_path, patch_size=None, rotate_portrait=True)
    assert whole.image_size == (321, 481)
    assert {whole.train()[i][0].shape for i in range(2)} == {(3, 321, 481)}
    with pytest.raises(UserError, match="rotate_portrait"):
        data.BSDS500(tmp_path, patch_size=None)


def test_other_files_are_left_out(tmp_path: Path) -> None:
    put(tmp_path / "a.png", 5)
    (tmp_path / "b.png.gz").write_bytes(gzip.compress(b"x"))
    assert levels(data.ImageFolder(tmp_path, val_fraction=0.0).train()) == [5]


def test_headers_know_the_upright_size(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 6
    for suffix in ("png", "jpg"):
        Image.new("RGB", (16, 8)).save(tmp_path / f"a.{suffix}", exif=exif)
    source = data.ImageFolder(tmp_path, val_fraction=0.0)
    assert source.image_size == (16, 8)
    assert source.train()[0][0].shape == source.train()[1][0].shape == (3, 16, 8)
