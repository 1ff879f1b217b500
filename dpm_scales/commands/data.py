"""`dpm-scales data`: pack images into tar shards, check shards, index them. Only the work itself loads torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dpm_scales.cli.program import program
from dpm_scales.cli.words import Words, split_words
from dpm_scales.errors import UserError, printable, require, suggest

HELP = """\
usage: {0} pack FOLDER|ZIP|ARRAY out=DIR [per_shard=1000] [labels=folder] [KEY=VALUE ...]
       {0} check DIR|TARS|ADDRESS [labels=cls] [index=FILE]
       {0} index DIR|TARS|ADDRESS [out=FILE] [labels=cls]

Pack images into tar shards, for training with data=webdataset; read whole shards and report their faults;
write the index of shards that have none.

pack: the same images and options give the same bytes; repeat the command to resume after a kill
  out=DIR              a new folder, for the shards and index.json
  per_shard=1000       images of each shard but the last
  labels=folder        number the folders, or take the labels of an .npz file; by default none
  image_size=64        or HEIGHT,WIDTH: bring images to this size; by default they keep theirs
  resize_mode=resize_crop  none, resize, crop or resize_crop, as for data=folder
  channels=3           1 grey, 3 RGB; by default as they are
  format=keep          copies files; png: pixels without loss; ppm: uncompressed, the fastest to read
  shuffle=true         permute the images of each part with seed=0
  split=auto           the folders train/ and val/ are the parts, if both are there; none: one part
  on_error=skip        leave out unreadable images, or raise
  verify=headers       or full: how much of each image is read at the start

check, index
  labels=cls           ending of the labels' members, or json.FIELD; by default none
  image=jpg            ending of the images' members; by default that of any image
  index=FILE           for shards that have none beside them
  out=FILE             by default index.json beside the shards
  tries=8, timeout=30  for addresses: tries per file, and seconds without data after which one fails

Patterns are quoted: 'DIR/train-*.tar', 'https://example.org/train-{{000..099}}.tar'."""
HELP_FLAGS = ("-h", "--help")
ACTIONS = ("pack", "check", "index")
SWITCH = {"true": True, "false": False}
_NUMBERS = ("per_shard", "seed", "channels")
_WORDS = ("labels", "resize_mode", "format", "split", "on_error", "verify")


def run(argv: Sequence[str]) -> None:
    """Pack, check or index, as `HELP` says.

    Args:
        argv: arguments after `dpm-scales data`.

    Raises: UserError for arguments that can't be used, and for faults in shards.
    """
    command = program("data")
    if not argv or not set(HELP_FLAGS).isdisjoint(argv):
        print(HELP.format(command))
        return
    action, *rest = argv
    require(action in ACTIONS, f"unknown action {printable(action)!r}: {suggest(action, ACTIONS)}")
    {"pack": _pack, "check": _check, "index": _index}[action](rest, f"{command} {action}")


def _pack(argv: Sequence[str], command: str) -> None:
    usage = f"{command} FOLDER out=DIR"
    options = ("out", "image_size", "shuffle", *_NUMBERS, *_WORDS)
    asked = split_words(argv, 1, options, (), usage)
    require(len(asked.words) == 1 and "out" in asked.options, f"name images and a folder for the shards: {usage}")
    given = asked.options
    shuffle = given.get("shuffle", "true")
    require(shuffle in SWITCH, f"shuffle={shuffle}: allowed are true and false")
    numbers = {key: _number(given[key], key) for key in _NUMBERS if key in given}
    words = {key: given[key] for key in _WORDS if key in given}

    from dpm_scales.progress import Report
    from dpm_scales.shards.pack import Packing, pack  # these load torch

    size = _size(given["image_size"]) if "image_size" in given else None
    usual = {} if size is None and "channels" not in given else {"format": "png"}
    settings = {**usual, **numbers, **words, "image_size": size, "shuffle": SWITCH[shuffle]}
    packing = Packing(**settings)  # type: ignore[arg-type]
    with Report() as report:
        index = pack(asked.words[0], given["out"], packing, report.part)
    classes = "" if index.num_classes is None else f", {index.num_classes} classes"
    parts = sorted({shard.part for shard in index.shards if shard.part}, reverse=True)
    print(printable(f"{len(index)} images in {len(index.shards)} shards in {given['out']}{classes}{_and(parts)}"))
    print(printable(f"train with data=webdataset data.root={given['out']}"))


def _and(parts: Sequence[str]) -> str:
    return f", parts {' and '.join(parts)}" if parts else ""


def _check(argv: Sequence[str], command: str) -> None:
    asked, place = _shards(argv, command, ("index",))

    from dpm_scales.progress import Report
    from dpm_scales.shards.check import check_shards
    from dpm_scales.shards.fetch import shown
    from dpm_scales.shards.shard import Keys

    keys = Keys(asked.options.get("image"), asked.options.get("labels"))
    with Report() as report:
        found = check_shards(place, keys, _cache(asked), report.part, asked.options.get("index"))
    size, place = f"{found.bytes / 2**20:.1f} MiB", shown(place)
    print(printable(f"{place}: {found.images} images in {found.shards} shards, {size}"))
    for line in found.faults.lines():
        print(printable(f"  {line}"))
    kinds = len(found.faults.counts)
    if kinds:
        raise UserError(f"{place}: {kinds} kind{'s' if kinds > 1 else ''} of faults")
    print("no faults")


def _index(argv: Sequence[str], command: str) -> None:
    asked, place = _shards(argv, command, ("out",))

    from dpm_scales.progress import Report
    from dpm_scales.shards.check import index_shards
    from dpm_scales.shards.fetch import is_url, shown
    from dpm_scales.shards.index import INDEX
    from dpm_scales.shards.places import locate
    from dpm_scales.shards.shard import Keys
    from dpm_scales.storage import write_text

    out, located = asked.options.get("out"), locate(place, without=True)
    require(out is not None or not is_url(place), f"{shown(place)}: name the file of the index, out=FILE")
    keys = Keys(asked.options.get("image"), asked.options.get("labels"))
    with Report() as report:
        index, faults = index_shards(located, keys, _cache(asked), report.part)
    target = located.folder / INDEX if out is None else Path(out)
    write_text(target, index.to_json())
    print(printable(f"{target}: {len(index)} images in {len(index.shards)} shards"))
    for line in faults.lines():
        print(printable(f"  {line}"))


def _shards(argv: Sequence[str], command: str, more: tuple[str, ...]) -> tuple[Words, str]:
    usage = f"{command} DIR"
    asked = split_words(argv, 1, ("labels", "image", "tries", "timeout", *more), (), usage)
    require(len(asked.words) == 1, f"name shards: {usage}")
    return asked, asked.words[0]


def _cache(asked: Words):  # type: ignore[no-untyped-def]
    from dpm_scales.shards.cache import DEFAULT_GIGABYTES, ShardCache
    from dpm_scales.shards.fetch import Patience
    from dpm_scales.storage import data_cache

    patience = Patience(asked.number("tries", 8), asked.number("timeout", 30))
    return ShardCache(data_cache(), DEFAULT_GIGABYTES, patience)


def _number(text: str, key: str) -> int:
    ok = text.isascii() and text.isdecimal() and len(text) < 19
    require(ok, f"{key} must be a whole number, got {text!r:.40}")
    return int(text)


def _size(text: str) -> tuple[int, int]:
    sides = [_number(side, "image_size") for side in text.strip("[]").split(",")]
    ok = len(sides) in (1, 2) and all(0 < side < 2**16 for side in sides)
    require(ok, f"image_size={text}: allowed is a number of pixels, or HEIGHT,WIDTH")
    return sides[0], sides[-1]
