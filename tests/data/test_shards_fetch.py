"""Shards of a server that stalls, cuts, errs and changes; the cache that processes share; only what was named."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from dpm_scales.errors import UserError
from dpm_scales.shards import ShardSource
from dpm_scales.shards import fetch as fetching
from dpm_scales.shards.cache import ShardCache
from dpm_scales.shards.check import check_shards, index_shards
from dpm_scales.shards.fetch import FetchError, Patience, fetch, fetch_text, shown
from dpm_scales.shards.places import locate
from dpm_scales.shards.shard import Keys
from dpm_scales.shards.shard_set import ShardError
from support.shards import Faults, entry_of, fetched_numbers, number_of, packed, served

pytestmark = pytest.mark.usefixtures("cache")

COUNT = 40
SHARD = "shard-000001.tar"


def test_an_address_gives_what_the_folder_gives(server: tuple[str, Faults, Path], shards: Path) -> None:
    """Each shard is fetched once, and nothing else than the index and the shards."""
    url, faults, _ = server
    assert fetched_numbers(url) == fetched_numbers(shards)
    names = sorted(path.name for path in shards.glob("*.tar"))
    assert sorted(name for name, _ in faults.asked) == ["index.json", *names]
    assert fetched_numbers(f"{url}index.json") == fetched_numbers(shards)
    assert [name for name, _ in faults.asked[6:]] == ["index.json"]


@pytest.mark.parametrize(
    ("kinds", "ranges"),
    [
        (["500", "503", "ok"], ["", "", ""]),
        (["stall", "429", "ok"], ["", "", ""]),
        (["cut", "cut", "ok"], ["", "bytes=8704-", "bytes=13056-"]),
        (["cut", "no ranges", "ok"], ["", "bytes=8704-"]),
        (["cut", "416", "ok"], ["", "bytes=8704-", ""]),
    ],
)
def test_tries_that_fail_are_followed_by_others(
    server: tuple[str, Faults, Path], kinds: list[str], ranges: list[str], cache: Path
) -> None:
    url, faults, folder = server
    faults.of[SHARD] = kinds
    entry = entry_of(folder)
    patience = Patience(4, 0.15)
    path = ShardCache(cache, 1, patience).path(f"{url}{SHARD}", entry)
    assert path.read_bytes() == (folder / SHARD).read_bytes()
    assert [asked for name, asked in faults.asked if name == SHARD] == ranges
    assert not list(cache.glob("*.tmp"))


@pytest.mark.parametrize(
    ("kind", "message", "tries"),
    [
        ("500", "could not be fetched in 4 tries; the last: HTTP 500", 4),
        ("stall", r"could not be fetched in 4 tries; the last: no byte came for 0\.15 seconds", 4),
        ("cut early", r"could not be fetched in 4 tries; the last: cut off after \d+ bytes", 4),
        ("404", "HTTP 404; there is no such file", 1),
        ("403", "HTTP 403; access is refused", 1),
        ("to file:///etc/passwd", "HTTP 302; it leads to an address that is not followed", 1),
        ("to ftp://127.0.0.1/a", "it leads to ftp://, which is not followed", 1),
    ],
)
def test_what_does_not_come_ends_with_one_line(
    server: tuple[str, Faults, Path], kind: str, message: str, tries: int, cache: Path
) -> None:
    url, faults, _ = server
    faults.of[SHARD] = [kind]
    with pytest.raises(ShardError, match=rf"^{url}{SHARD}: {message}") as caught:
        fetched_numbers(url)
    assert "\n" not in str(caught.value)
    assert sum(name == SHARD for name, _ in faults.asked) == tries
    assert len(list(cache.glob("*.tar"))) == 1 and not list(cache.glob("*.tmp"))  # the shard before it
    faults.of.clear()
    assert len(fetched_numbers(url)) == COUNT


@pytest.mark.parametrize("longer", [0, 512])
def test_a_changed_shard_is_refused(server: tuple[str, Faults, Path], longer: int) -> None:
    url, faults, folder = server
    content = (folder / SHARD).read_bytes()
    (folder / SHARD).write_bytes(content[:100] + b"\1" + content[101:] + bytes(longer))
    reason = r"it has \d+ bytes, and the index says \d+" if longer else r"its SHA-256 is .*…, and the index says .*…"
    with pytest.raises(ShardError, match=rf"{SHARD}: {reason}; it was changed, or the index is an older one"):
        fetched_numbers(url)
    assert sum(name == SHARD for name, _ in faults.asked) == 2


def test_a_shard_that_changes_while_it_is_fetched(server: tuple[str, Faults, Path]) -> None:
    """What came before the cut is thrown away, since the entity tag is another one."""
    url, faults, folder = server
    good = (folder / SHARD).read_bytes()
    (folder / SHARD).write_bytes(b"old" * 10 + good[30:])
    faults.of[SHARD] = ["cut", "ok"]
    original = faults.next

    def change(name: str) -> str:
        if len(faults.asked) > 1 and name == SHARD and faults.of[SHARD] == ["ok"]:
            (folder / SHARD).write_bytes(good)
        return original(name)

    faults.next = change  # type: ignore[method-assign]
    assert len(fetched_numbers(url)) == COUNT


def test_a_trickle_ends_a_try(server: tuple[str, Faults, Path], cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A byte now and then, which no time limit of the connection ends."""
    url, faults, folder = server
    monkeypatch.setattr(fetching, "LEAST_RATE", 10**5)
    faults.of[SHARD] = ["trickle", "ok"]
    path = ShardCache(cache, 1, Patience(2, 0.2)).path(f"{url}{SHARD}", entry_of(folder))
    assert path.read_bytes() == (folder / SHARD).read_bytes()
    faults.of[SHARD] = ["trickle"]
    with pytest.raises(FetchError, match=r"the last: only \d+ bytes came in 0\.\d+ seconds"):
        fetch_text(f"{url}{SHARD}", 10**6, Patience(1, 0.2))


def test_an_endless_answer_has_an_end(server: tuple[str, Faults, Path]) -> None:
    url, _, folder = server
    (folder / "index.json").write_bytes(b" " * 2000)
    with pytest.raises(FetchError, match="it has more than 1000 bytes"):
        fetch_text(f"{url}index.json", 1000, Patience(3, 1))


def test_secrets_in_addresses_are_not_shown() -> None:
    assert shown("https://me:word@a.b:8/c/d.tar?sig=x#y") == "https://a.b:8/c/d.tar"
    assert shown("/plain/a?b#c.tar") == "/plain/a?b#c.tar" and "secret" not in shown("http://[secret")
    for url in ("file:///etc/passwd", "http://", "http://[::1", "http://a:x/b", "http://a/b c"):
        with pytest.raises(UserError, match="allowed are http:// and https://"):
            fetch(url, None)  # type: ignore[arg-type]


def test_logins_and_signatures_are_sent_to_their_host_alone(
    server: tuple[str, Faults, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From .netrc and the environment, also after a redirection, which takes neither along."""
    url, faults, folder = server
    host = url.split("/")[2]
    with served(folder) as (other, others):
        monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
        (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password wörd\n")
        monkeypatch.setenv("DPM_SCALES_QUERIES", f"elsewhere?x=1 {host}?sig=a%2Fb")
        assert len(fetched_numbers(url)) == COUNT
        basic = "Basic bWU6d8O2cmQ="
        assert set(faults.secrets) == {("sig=a%2Fb", basic)}
        faults.of["index.json"] = [f"to {other}index.json".replace("127.0.0.1", "localhost")]
        assert fetch_text(f"{url}index.json", 10**6, Patience(1, 1)).startswith(b"{")
        assert others.secrets == [("", "")]
        (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password word")
        os.truncate(tmp_path / "netrc", 35)
        (tmp_path / "netrc").write_text("machine 127.0.0.1 loginn wörd\n")
        with pytest.raises(FetchError, match="netrc, line 1: expected machine HOST login NAME password WORD") as caught:
            fetch_text(f"{url}index.json", 10**6, Patience(1, 1))
        assert "wörd" not in str(caught.value)


def test_names_with_other_letters_are_escaped(tmp_path: Path) -> None:
    packed(tmp_path / "s", 16)
    index = tmp_path / "s" / "index.json"
    for name, new in (("shard-000000.tar", "é 0.tar"), ("shard-000001.tar", "ß&+1.tar")):
        (tmp_path / "s" / name).rename(tmp_path / "s" / new)
        index.write_text(index.read_text().replace(name, new))
    with served(tmp_path / "s") as (url, faults):
        assert fetched_numbers(url) == list(fetched_numbers(tmp_path / "s"))
        assert {name for name, _ in faults.asked} == {"index.json", "é 0.tar", "ß&+1.tar"}
        one = f"{url}%C3%A9%200.tar"
        made, _ = index_shards(locate(one, without=True), Keys(), ShardCache(tmp_path, 1), _silent)
        assert made.shards[0].name == "é 0.tar"
        assert (
            fetched_numbers(one, index=index)
            == fetched_numbers(tmp_path / "s")[:8]
            == fetched_numbers(f"{url}é%200.tar", index=index)
        )


def test_a_server_that_is_not_there(tmp_path: Path) -> None:
    with served(tmp_path) as (url, _):
        pass
    with pytest.raises(FetchError, match="could not be fetched in 2 tries; the last: .*refused"):
        fetch_text(f"{url}a", 10, Patience(2, 1))


def test_single_files_of_an_address_need_an_index(server: tuple[str, Faults, Path], tmp_path: Path) -> None:
    url, faults, folder = server
    pattern = f"{url}shard-{{000000..000003}}.tar?key=secret"
    with pytest.raises(UserError, match="its 'key' may be a secret"):
        fetched_numbers(pattern)
    with pytest.raises(UserError, match="an index; make one with dpm-scales data index 'ADDRESS' out=FILE"):
        fetched_numbers(pattern.partition("?")[0])
    assert faults.asked == []
    index, found = index_shards(locate(pattern, without=True), Keys(None, "cls"), ShardCache(tmp_path, 1), _silent)
    assert not found and index.num_classes == 3 and index.image_size == (2, 3)
    assert list(index.shards) == [entry_of(folder, f"shard-00000{n}.tar") for n in range(4)]
    (tmp_path / "mine.json").write_text(index.to_json())
    with pytest.raises(UserError, match="its 'key' may be a secret, and runs store .* DPM_SCALES_QUERIES=") as caught:
        fetched_numbers(pattern, index=tmp_path / "mine.json")
    assert "=secret" not in str(caught.value)
    pattern = pattern.replace("key=secret", "download=true")
    assert fetched_numbers(pattern, index=tmp_path / "mine.json", labels="cls") == fetched_numbers(folder)[:32]
    faults.of[SHARD] = ["404"]
    with pytest.raises(FetchError, match=f"{SHARD}: HTTP 404"):
        index_shards(locate(pattern, without=True), Keys(), ShardCache(tmp_path, 1, Patience(1, 1)), _silent)
    assert check_shards(url, Keys(), ShardCache(tmp_path / "new", 1, Patience(1, 1)), _silent).faults.counts == {
        "shards that can't be read": 1
    }


def _silent(name: str, total: int) -> Any:
    return lambda count: None


def test_without_checksums_nothing_is_fetched(server: tuple[str, Faults, Path]) -> None:
    url, faults, folder = server
    held = json.loads((folder / "index.json").read_text())
    held["shards"][2]["sha256"] = None
    (folder / "index.json").write_text(json.dumps(held))
    with pytest.raises(UserError, match="no checksum of shard-000002.tar; make it again: dpm-scales data index"):
        fetched_numbers(url)
    assert [name for name, _ in faults.asked] == ["index.json"]


def test_what_only_a_folder_names_is_not_fetched(server: tuple[str, Faults, Path]) -> None:
    url, faults, _ = server
    with pytest.raises(
        UserError, match=r"index\.json is not in .*data.download=false fetches nothing.*data.download=true"
    ):
        fetched_numbers(url, download=False)
    assert faults.asked == []
    part = ShardSource(url, channels=1, val_fraction=0).train()
    number_of(part[0][0])
    with pytest.raises(ShardError, match=r"shard-000001\.tar is not in .*data.download=false"):
        fetched_numbers(url, download=False)
    fetched_numbers(url)
    faults.asked.clear()
    assert len(fetched_numbers(url, download=False)) == COUNT and faults.asked == []
