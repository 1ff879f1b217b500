"""Members of tar files, compared with those that Python's tarfile finds; damaged and hostile archives."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest

from dpm_scales.shards.tar import DamagedTarError, Member, TarWriter, members
from support.shards import tar

RNG = np.random.default_rng(0)


def found(content: bytes) -> list[Member]:
    return list(members(lambda number, offset: content[offset : offset + number], len(content)))


def theirs(content: bytes) -> list[Member]:
    with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as archive:
        return [Member(i.name, i.offset_data, i.size) for i in archive if i.isreg()]


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_those_of_tarfile(kind: int, tmp_path: Path) -> None:
    long = "" if kind == tarfile.USTAR_FORMAT else "é" * 300
    names = ["a.png", "cat/b.cls", f"{'d' * 90}/{'e' * 90}.jpg", "x.y/c.json", "empty.cls", f"f{long}.png"]
    files = {name: RNG.bytes(int(RNG.integers(0, 40_000))) for name in names} | {"empty.cls": b""}
    content = tar(tmp_path / "a.tar", files, kind).read_bytes()
    assert found(content) == theirs(content)
    assert {m.name: content[m.offset : m.offset + m.size] for m in found(content)} == files


def test_links_folders_and_devices_are_no_members(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE):
            info = tarfile.TarInfo(f"{kind.decode()}.png")
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
        info = tarfile.TarInfo("../../out.png")
        info.size, info.pax_headers = 3, {"comment": "x", "mtime": "1.5"}
        archive.addfile(info, io.BytesIO(b"abc"))
    content = path.read_bytes()
    assert found(content) == theirs(content)
    assert [m.name for m in found(content)] == ["../../out.png"]


def test_sparse_members_are_passed_over(tmp_path: Path) -> None:
    """GNU tar's own, in both formats, if it is at hand."""
    (tmp_path / "hole.png").write_bytes(b"a" + bytes(2**20) + b"b")
    os.truncate(tmp_path / "hole.png", 3 * 2**20)
    (tmp_path / "b.png").write_bytes(b"whole")
    if os.system("tar --version >/dev/null 2>&1"):
        pytest.skip("no tar")
    with (tmp_path / "holes.png").open("wb") as file:
        for number in range(60):  # more than GNU's header has room for
            file.seek(number * 2**17)
            file.write(b"x")
    for kind in ("gnu", "pax"):
        path = tmp_path / f"{kind}.tar"
        assert os.system(f"cd {tmp_path} && tar --sparse --format={kind} -cf {path.name} hole.png holes.png b.png") == 0
        assert [m.name for m in found(path.read_bytes())] == ["b.png"]


def test_the_writer_writes_what_tarfile_reads_and_the_same_each_time() -> None:
    files = [(f"{n:08d}.png", RNG.bytes(1000 * n)) for n in range(4)]
    written = []
    for _ in range(2):
        file = io.BytesIO()
        writer = TarWriter(file)
        for name, content in files:
            writer.add(name, content)
        digest = writer.close()
        written.append((file.getvalue(), digest, writer.bytes))
    assert written[0] == written[1] and len(written[0][0]) == written[0][2]
    content = written[0][0]
    assert (
        [(m.name, content[m.offset : m.offset + m.size]) for m in theirs(content)]
        == files
        == [(m.name, content[m.offset : m.offset + m.size]) for m in found(content)]
    )


def cut(content: bytes) -> dict[str, tuple[bytes, str]]:
    """Damaged archives, with what is said of them."""
    broken = bytearray(content)
    broken[1024 + 20] ^= 1  # in the name of the second member
    large = bytearray(content)
    large[124:136] = b"\x80" + (2**62).to_bytes(11, "big")
    large[148:156] = b"%06o\0 " % (sum(large[:148]) + sum(large[156:512]) + 8 * 32)
    return {
        "empty": (b"", "it is empty"),
        "in a member": (content[:600], "it ends within 'a.png', and was cut off"),
        "between members": (content[:1024], "it ends without the mark of its end"),
        "in a header": (content[:1100], "it ends without the mark of its end"),
        "a wrong sum": (bytes(broken), "no header at byte 1024"),
        "a size beyond the file": (bytes(large), "it ends within 'a.png'"),
        "joined to another": (content + content, "it holds more after the mark of its end"),
        "gzip": (b"\x1f\x8b" + bytes(2000), "it is packed by gzip"),
        "no tar": (b"<html>" + bytes(2000), "it is not a tar file"),
    }


@pytest.mark.parametrize("kind", cut(bytes(2048)))
def test_damage_is_told_after_the_members_before_it(kind: str, tmp_path: Path) -> None:
    whole = tar(tmp_path / "a.tar", {"a.png": b"x" * 300, "b.png": b"y" * 300}).read_bytes()
    content, message = cut(whole)[kind]
    seen = []
    with pytest.raises(DamagedTarError, match=message) as caught:
        for member in members(lambda number, offset: content[offset : offset + number], len(content)):
            seen.append(member.name)
    assert "\n" not in str(caught.value)
    before = {"joined to another": ["a.png", "b.png"]} | dict.fromkeys(("between members", "in a header"), ["a.png"])
    assert seen == (before | {"a wrong sum": ["a.png"]}).get(kind, [])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"99 path=short\n", "not one of pax"),
        (b"0 path=x\n", "not one of pax"),
        (b"x", "not one of pax"),
        (b"17 size=-1000000\n", "a size that is no number"),
    ],
)
def test_extended_headers_of_strangers(text: bytes, message: str) -> None:
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.XHDTYPE, len(text)
    content = info.tobuf() + text.ljust(512, b"\0") + tarfile.TarInfo("a.png").tobuf() + bytes(1024)
    with pytest.raises(DamagedTarError, match=message):
        found(content)


def test_names_of_all_kinds_are_those_of_tarfile(tmp_path: Path) -> None:
    """Absolute, leading out, with other letters, line ends, bytes that are no UTF-8, and dots; none is ever a path."""
    names = ["/etc/a.png", "../../b.png", "./c.png", "d/../e.png", "ü/日本.png", "f\ng.png", "h.1.2.png", "i\udcff.png"]
    names += ["x" * 99 + ".png", "y" * 150 + ".png", f"{'z/' * 120}a.png", " .png", "C:\\a.png"]
    for kind in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        content = tar(tmp_path / "a.tar", {name: name.encode(errors="replace") for name in names}, kind).read_bytes()
        assert found(content) == theirs(content) and [m.name for m in found(content)] == names


def test_a_long_name_has_a_limit() -> None:
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 2**30
    with pytest.raises(DamagedTarError, match="a header of 1073741824 bytes"):
        found(info.tobuf() + bytes(2048))
