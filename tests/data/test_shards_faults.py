"""Local tar shards with faults: each is replaced and counted, refused in one line, or found by the check."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from dpm_scales.data.replaced import UnreadableImageError
from dpm_scales.errors import UserError
from dpm_scales.shards.cache import ShardCache
from dpm_scales.shards.check import check_shards
from dpm_scales.shards.index import parse_index
from dpm_scales.shards.places import expand, is_shards, locate
from dpm_scales.shards.scan import index_of
from dpm_scales.shards.shard import Keys
from dpm_scales.shards.shard_set import ShardError
from support.shards import encoded, number_of, numbered, numbers_of, samples, silent, source, tar

pytestmark = pytest.mark.usefixtures("cache")

COUNT = 40


def test_images_and_labels_that_are_faulty_are_replaced_and_counted(tmp_path: Path) -> None:
    members = samples(range(8))
    members["0003.png"] = b"rotten"
    del members["0005.cls"]
    members["0006.cls"] = b"7"
    tar(tmp_path / "a.tar", members)
    tar(tmp_path / "b.tar", samples(range(8, 10)))
    with pytest.warns(
        UserWarning, match=r"1 of 2 shards have faults.*can't be read: a.tar/0003.png.*without a label: a.tar/0005"
    ):
        found = source(tmp_path, val_fraction=0, on_error="skip")
    (tmp_path / "index.json").write_text(index_of([], Keys()).to_json())
    assert found.num_classes == 8 and "0003.png" in "".join(found.left_out.values())
    with pytest.warns(UserWarning, match="replaces an unreadable one"):
        assert [number_of(found.train()[i][0]) for i in range(10)] == [0, 1, 2, 4, 4, 6, 6, 7, 8, 9]
    assert {one.rpartition("/")[2] for one in found.train().unreadable} == {"a.tar, image 3", "a.tar, image 5"}
    (tmp_path / "index.json").unlink()
    with pytest.raises(UserError, match=r"a\.tar: .*; mend it, or set on_error=skip"):
        source(tmp_path, on_error="raise")


def test_on_error_raise_stops_at_an_image(copied: Path) -> None:
    path = copied / "shard-000000.tar"
    spoilt = path.read_bytes().replace(b"IDAT", b"IDXX", 1)
    path.write_bytes(spoilt)
    part = source(copied, val_fraction=0, on_error="raise").train()
    with pytest.raises(UnreadableImageError, match=r"shard-000000\.tar/\d{8}\.png: ") as caught:
        part[0]
    assert "\n" not in str(
        UnreadableImageError(f"Caught it\nTraceback: dpm_scales.X.UnreadableImageError: {caught.value}")
    )
    every = source(copied, val_fraction=0).train()
    every._bad[:] = 1
    with pytest.raises(UnreadableImageError, match="none of its 40 images can be read"):
        every[0]


def lie(index: Path, **changes: Any) -> None:
    held = json.loads(index.read_text())
    held["shards"][1] |= {key: value for key, value in changes.items() if key in held["shards"][1]}
    held |= {key: value for key, value in changes.items() if key not in held["shards"][1]}
    index.write_text(json.dumps(held))


def test_shards_that_differ_from_the_index(copied: Path) -> None:
    """Missing or cut off: left out with a line, or refused; with a wrong number of images: refused when opened."""
    (copied / "shard-000000.tar").unlink()
    path = copied / "shard-000002.tar"
    path.write_bytes(path.read_bytes()[:2600])
    with pytest.warns(UserWarning, match=r"2 of 5 shards are left out; the first is .*shard-000000.tar: No such file"):
        found = source(copied, val_fraction=0)
    assert len(found.train()) == 24 == len(numbers_of(found.train()))
    with pytest.raises(UserError, match=r"shard-000000\.tar: No such file or directory; mend it, or set on_error=skip"):
        source(copied, on_error="raise")
    with pytest.raises(ShardError, match=r"shard-000002\.tar: it ends within '\d+\.png', and was cut off"):
        numbers_of(source(f"{copied}/shard-000002.tar", val_fraction=0, verify="none").train())
    lie(copied / "index.json", images=9)
    with pytest.raises(ShardError, match=r"shard-000001\.tar: holds 8 images, and the index says 9; run dpm-scales"):
        numbers_of(source(f"{copied}/shard-000001.tar", val_fraction=0).train())
    lie(copied / "index.json", images=8, sha256="0" * 64)
    with pytest.raises(UserError, match=r"its SHA-256 is .*, and the index says 000000000000…; mend it"):
        source(f"{copied}/shard-000001.tar", on_error="raise", verify="full")


def test_a_lie_about_classes_and_sizes(copied: Path) -> None:
    lie(copied / "index.json", num_classes=2, image_size=[9, 9])
    with pytest.warns(UserWarning, match=r"its label is 2, and the index says that there are 2 classes"):
        found = [source(copied, val_fraction=0, image_size=4).train()[i] for i in range(4)]
    assert {label for _, label in found} <= {0, 1}
    with (
        pytest.warns(UserWarning, match=r"its size \(2, 3\) is not \(9, 9\)"),
        pytest.raises(UserError, match="none of"),
    ):
        source(copied, val_fraction=0, labels="none").train()[0]


@pytest.mark.parametrize("changes", [
    {"name": "../out.tar"}, {"name": "/etc/a.tar"}, {"name": "http://a/b.tar"}, {"name": "a.txt"},
    {"name": "a\\..\\b.tar"}, {"name": "shard-000000.tar"}, {"part": "test"}, {"image_size": [0, 3]},
    {"images": -1}, {"images": True}, {"bytes": 2**60}, {"sha256": "xyz"}, {"num_classes": 0},
    {"class_names": ["a"]}, {"shards": 5}, {"version": 9}, {"format": "x"},
])  # fmt: skip
def test_indices_of_strangers(copied: Path, changes: dict[str, Any]) -> None:
    lie(copied / "index.json", **changes)
    with pytest.raises(UserError, match=r"index\.json") as caught:
        source(copied)
    assert "\n" not in str(caught.value)


def test_places(tmp_path: Path, copied: Path) -> None:
    assert expand("a-{08..11}.{x,y}") == [f"a-{n}.{e}" for n in ("08", "09", "10", "11") for e in "xy"]
    assert expand("plain") == ["plain"]
    assert (
        is_shards(str(copied))
        and is_shards("x/a.tar")
        and is_shards("https://a/b")
        and not is_shards(str(tmp_path / "x"))
    )
    (tmp_path / "none").mkdir()
    (tmp_path / "a.zip").touch()
    (tmp_path / "t.tar.gz").write_bytes(b"\x1f\x8b" + bytes(1000))
    shutil.copy(tmp_path / "t.tar.gz", tmp_path / "t.tar")
    cases = {
        str(tmp_path / "none"): "no .tar files in it",
        str(tmp_path / "nowhere"): "nowhere: no such file; give the folder, file, pattern",
        f"{copied}/x-*.tar": r"x-\*\.tar: no such file",
        f"{copied}/shard-{{000000..000009}}.tar": r"shard-000005\.tar: no such file",
        str(tmp_path / "a.zip"): "no .tar file",
        f"{tmp_path}/{{0..9999999}}.tar": "more than 1000000 shards",
        f"{tmp_path}/{{3..1}}.tar": "counts down",
        "s3://bucket/a.tar": r"allowed are http:// and https://, and paths of a mounted file system",
        "https://a.b/c-{00..99}.tar?key=1": r"^https://a\.b/c-00\.tar: the shards of an address need",
        "https://me:secret@a.b/c.tar": r"^https://a\.b/c\.tar: the address holds a login; leave it out, and put a",
    }
    for root, message in cases.items():
        with pytest.raises(UserError, match=message):
            locate(root)
    with pytest.warns(UserWarning), pytest.raises(UserError, match="the shards hold no image that can be read"):
        source(tmp_path / "t.tar")
    shutil.copy(copied / "shard-000001.tar", copied / "other.tar")
    with pytest.raises(UserError, match=r"other\.tar is not in the index .*index\.json; make that again"):
        source(f"{copied}/*.tar")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "window=0"),
        ({"split": "parts"}, "the index names no parts train and val"),
        ({"split": "halves"}, "unknown split='halves'"),
        ({"split": "images", "val_root": "x"}, "split=images divides root, and val_root is given"),
        ({"decoder": "gpu"}, "unknown decoder='gpu': .*allowed: pillow, simplejpeg"),
        ({"labels": ".cls"}, "without the first dot, as in cls"),
        ({"channels": 2}, "channels=2"),
        ({"val_fraction": 1.0}, "val_fraction=1.0"),
        ({"cache_gb": 0}, "cache_gb=0"),
        ({"tries": 0}, "tries=0"),
        ({"timeout": -1}, "timeout=-1"),
        ({"random_crop": True}, "random_crop=true needs image_size"),
    ],
)
def test_options_that_are_none(shards: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        source(shards, **options)
    with pytest.raises(UserError, match="lists no labels"):
        lie_free = {"format": "dpm_scales shards", "version": 1, "shards": [], "image_size": None}
        parse_index(json.dumps(lie_free | {"num_classes": None, "class_names": None}), "x")
        raise UserError("lists no labels")


# --- check ------------------------------------------------------------------------------------------------------------


def kinds(root: Path | str, label: str | None = "cls") -> set[str]:
    return set(check_shards(root, Keys(None, label), ShardCache(Path(), 1), silent).faults.counts)


def test_checking_finds_each_kind_of_fault(copied: Path, tmp_path: Path) -> None:
    found = check_shards(copied, Keys(None, "cls"), ShardCache(Path(), 1), silent)
    assert not found.faults and (found.shards, found.images) == (5, COUNT)
    members = samples(range(4), labels=False) | {"0001.cls": b"x", "alone.cls": b"1"}
    members["0002.png"] = b"rotten"
    tar(tmp_path / "f" / "a.tar", [*members.items(), ("0000.png", encoded(numbered(0)))])
    tar(tmp_path / "f" / "b.tar", samples(range(3, 5)))
    (tmp_path / "f" / "c.tar").write_bytes((tmp_path / "f" / "b.tar").read_bytes()[:1400])
    (tmp_path / "f" / "d.tar").write_text("<html>")
    assert kinds(tmp_path / "f") == {
        "shards that can't be read to their end", "keys without an image", "keys twice", "images that can't be read",
        "images without a label", "keys in several shards"}  # fmt: skip
    assert "images without a label" not in kinds(tmp_path / "f", None)
    (copied / "shard-000000.tar").unlink()
    path = copied / "shard-000002.tar"
    path.write_bytes(path.read_bytes() + bytes(512))
    tar(copied / "extra.tar", samples(range(2)))
    lie(copied / "index.json", images=9, image_size=[3, 3], num_classes=2)
    assert kinds(copied) == {
        "shards that can't be read",
        "shards with another size than the index says",
        "shards with another number of images than the index says",
        "shards with another checksum than the index says",
        "shards with images of another size than the index says",
        "shards with more classes than the index says",
        "shards that the index does not name",
    }
