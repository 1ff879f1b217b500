"""Find the shards that `root` names (a folder, a file, a pattern, or addresses) and their index.

| root | shards |
|---|---|
| `DIR` with `index.json` | those of the index |
| `DIR` without | `*.tar` in it, and in its folders, one level deep |
| `DIR/index.json`, `FILE.tar` | those of the index; this file |
| `DIR/*.tar`, `DIR/a-{000..099}.tar` | all that match, in order of name |
| `https://…/` | those of `https://…/index.json` |
| `https://…/a-{000..099}.tar` | these, with `index=` |
"""

from __future__ import annotations

import glob
import os
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from dpm_scales.data.files import EXTENSIONS
from dpm_scales.errors import UserError, require
from dpm_scales.shards.fetch import check_url, is_url, shown
from dpm_scales.shards.index import INDEX, MAX_INDEX_BYTES, ShardEntry, ShardIndex, parse_index
from dpm_scales.storage import open_regular

PACKING = ".pack.json"
"""Name of a file that marks a folder whose shards are not complete yet."""

MOST_SHARDS = 10**6
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d{1,9})\.\.(\d{1,9})")


@dataclass(frozen=True)
class Located:
    """The shards that `root` names.

    Attributes:
        source: `root`, for messages.
        index: path or address of the index; None without an index.
        tars: paths or addresses of the shards if `root` names them individually; empty if the index names them.
        folder: folder to which the names of local shards in an index are relative.
    """

    source: str
    index: str | None
    tars: tuple[str, ...]
    folder: Path = Path()

    @property
    def names(self) -> list[str]:
        """Return the names of `tars` in an index, with slashes; for addresses, their last component."""
        if self.is_remote:
            return [PurePosixPath(unquote(urlsplit(tar).path)).name for tar in self.tars]
        return [Path(tar).relative_to(self.folder).as_posix() for tar in self.tars]

    @property
    def is_remote(self) -> bool:
        return is_url(self.tars[0] if self.tars else str(self.index))


def locate(root: str | Path, index: str | Path | None = None, without: bool = False) -> Located:
    """Return the locations of the shards and their index; no file is read, and nothing is fetched.

    Args:
        root: see the table above.
        index: path or address of the index, if it is not beside the shards.
        without: ignore any index, since one will be made.

    Raises: UserError if there are no shards, and for addresses of shards without an index.
    """
    text = str(root)
    given = None if index is None else str(index)
    if given is not None and is_url(given):
        check_url(given)
    if is_url(text):
        return _locate_urls(text, given, without)
    path = Path(text).expanduser()
    if path.is_dir():
        beside = path / INDEX
        require(
            without or given is not None or beside.is_file() or not (path / PACKING).is_file(),
            f"{path}: its shards are not complete; repeat the command that makes them, which then resumes",
        )
        if given is None and beside.is_file() and not without:
            return Located(text, str(beside), ())
        found = sorted([*path.glob("*.tar"), *path.glob("*/*.tar")])
        require(bool(found), f"{path}: no .tar files in it; give the folder, file, pattern or address of shards")
        return Located(text, given, tuple(map(str, found)), path)
    if path.is_file() and path.suffix == ".json":
        return Located(text, str(path), ())
    tars = []
    for one in expand(str(path)):
        tars += sorted(glob.glob(one)) if glob.has_magic(one) and not Path(one).exists() else [one]
    missing = [one for one in tars if not Path(one).is_file()]
    advice = "give the folder, file, pattern or address of shards"
    require(bool(tars) and not missing, f"{missing[0] if missing else text}: no such file; {advice}")
    other = next((one for one in tars if not one.endswith(".tar")), None)
    require(other is None, f"{other}: no .tar file; {advice}")
    folder = Path(os.path.commonpath([Path(one).parent for one in tars]))
    if given is None and not without and (folder / INDEX).is_file():
        given = str(folder / INDEX)
    return Located(text, given, tuple(tars), folder)


def _locate_urls(text: str, index: str | None, without: bool) -> Located:
    urls = [check_url(one) for one in expand(text)]
    paths = [urlsplit(one).path for one in urls]
    if all(path.endswith(".tar") for path in paths):
        require(
            index is not None or without,
            f"{shown(urls[0])}: the shards of an address need an index; make one with dpm-scales data index "
            "'ADDRESS' out=FILE, and give it as data.index=FILE",
        )
        return Located(shown(text), index, tuple(urls))
    require(not without, f"{shown(text)}: name its .tar files, as in 'https://…/shard-{{000..099}}.tar'")
    require(len(urls) == 1, f"{shown(text)}: several addresses are those of .tar files")
    parts = urlsplit(urls[0])
    path = parts.path if parts.path.endswith(".json") else f"{parts.path.rstrip('/')}/{INDEX}"
    return Located(shown(text), index or urlunsplit(parts._replace(path=path)), ())


def expand(pattern: str) -> list[str]:
    """Return the expansions of the braces `{00..12}` and `{a,b}`, in order. Raises UserError if there are too many."""
    found = [pattern]
    while any(_BRACES.search(one) for one in found):
        expanded: list[str] = []
        for one in found:
            match = _BRACES.search(one)
            if match is None:
                expanded.append(one)
                continue
            numbers = _RANGE.fullmatch(match[1])
            if numbers is None:
                choices = match[1].split(",")
            else:
                first, last, width = int(numbers[1]), int(numbers[2]), len(numbers[1])
                require(last - first < MOST_SHARDS, f"{pattern}: more than {MOST_SHARDS} shards")
                choices = [f"{number:0{width}d}" for number in range(first, last + 1)]
                require(bool(choices), f"{pattern}: {{{match[1]}}} counts down; write the smaller number first")
            expanded += [one[: match.start()] + choice + one[match.end() :] for choice in choices]
            require(len(expanded) <= MOST_SHARDS, f"{pattern}: more than {MOST_SHARDS} shards")
        found = expanded
    return found


def read_index(place: str | Path) -> ShardIndex:
    """Return the index at a path. Raises UserError for a missing, damaged or foreign one."""
    try:
        with open_regular(place) as file:
            text = file.read(MAX_INDEX_BYTES + 1)
    except OSError as error:
        raise UserError(f"{place}: {error.strerror or error}; make the index with dpm-scales data index") from error
    require(len(text) <= MAX_INDEX_BYTES, f"{place}: larger than {MAX_INDEX_BYTES} bytes, as no index is")
    return parse_index(text, str(place))


def match_index(located: Located, index: ShardIndex) -> list[tuple[str, ShardEntry]]:
    """Return the path or address of each shard with its entry, for all shards of the index or those that `root` names.

    Raises: UserError for a shard that is not in the index.
    """
    assert located.index is not None
    if not located.tars:
        return [(beside(located.index, entry.name), entry) for entry in index.shards]
    entries = {entry.name: entry for entry in index.shards}
    by_base: dict[str, list[ShardEntry]] = {}
    for one in index.shards:
        by_base.setdefault(PurePosixPath(one.name).name, []).append(one)
    found = []
    for tar in located.tars:
        path = unquote(urlsplit(tar).path) if is_url(tar) else Path(tar).as_posix()
        parts = PurePosixPath(path).parts
        same = by_base.get(parts[-1], [])
        whole = entries.get("/".join(parts[-2:]))
        entry = same[0] if whole is None and len(same) == 1 else whole
        if entry is None:
            raise UserError(
                f"{shown(tar)} is not in the index {shown(located.index)}; make that again with dpm-scales data index"
            )
        found.append((tar, entry))
    return found


def beside(index: str, name: str) -> str:
    """Return the path or address of a shard, whose name is relative to its index."""
    if is_url(index):
        parts = urlsplit(index)
        return urlunsplit(parts._replace(path=f"{parts.path.rpartition('/')[0]}/{quote(name)}"))
    return str(Path(index).parent / name)


def is_shards(place: str) -> bool:
    """Return whether a place names shards rather than images in a folder or archive, by its name or its content."""
    if is_url(place) or place.endswith(".tar"):
        return True
    path = Path(place).expanduser()
    if not path.is_dir():
        return path.suffix == ".json" and path.is_file()
    names = [entry.name.lower() for entry in os.scandir(path)]
    tars, pictures = any(name.endswith(".tar") for name in names), any(name.endswith(EXTENSIONS) for name in names)
    return INDEX in names or PACKING in names or (tars and not pictures)
