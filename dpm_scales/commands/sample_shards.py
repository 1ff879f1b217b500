"""Write the samples of `sample.py … shards=true` as tar shards: `samples-000000.tar`, … and `index.json`.

Shard k holds the samples 1000 k … 1000 k + 999, each as `000123.png`, the file that is written without shards, and for
a conditional model also `000123.cls`. Shards are written atomically, and the index last: a command that was killed
resumes with the missing shards. Each device writes a part of the shards.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from dpm_scales.distributed.ranks import World
from dpm_scales.errors import UserError
from dpm_scales.shards.index import INDEX, ShardIndex
from dpm_scales.shards.pack import kept_entry, write_shard
from dpm_scales.shards.places import PACKING
from dpm_scales.shards.shard import Keys, Shard, decode
from dpm_scales.storage import remove_leftovers, write_text

PER_SHARD = 1000


def shard_name(number: int) -> str:
    """Return the file name of a shard."""
    return f"samples-{number:06d}.tar"


def numbered_shards(folder: Path) -> list[Path]:
    """Return the shards of samples in a folder, with their index and the mark of `begin`."""
    return [*sorted(folder.glob("samples-[0-9]*.tar")), *(p for n in (INDEX, PACKING) if (p := folder / n).exists())]


def begin(folder: Path) -> None:
    """Mark the shards in a folder as not complete."""
    remove_leftovers(folder)
    write_text(folder / PACKING, "")
    (folder / INDEX).unlink(missing_ok=True)


def unfinished(folder: Path, total: int, world: World) -> list[range]:
    """Return, for each shard that this process still has to draw, the numbers of its samples."""
    jobs = []
    for number in world.part(-(-total // PER_SHARD)):
        job = range(number * PER_SHARD, min((number + 1) * PER_SHARD, total))
        if _count(folder / shard_name(number)) != len(job):
            jobs.append(job)
    return jobs


def _count(path: Path) -> int | None:
    """Return the number of images in a shard, None if there is none that can be read."""
    with suppress(UserError, OSError):
        shard = Shard(path, str(path), Keys())
        shard.close()
        return len(shard)
    return None


def write(folder: Path, job: range, images: Iterator[tuple[str, bytes, int | None]]) -> None:
    """Write the shard of the samples `job` from (name, content, label) of their files."""

    def members() -> Iterator[tuple[str, bytes]]:
        for name, content, label in images:
            yield name, content
            if label is not None:
                yield f"{name.removesuffix('.png')}.cls", str(label).encode()

    write_shard(folder / shard_name(job.start // PER_SHARD), members())


def finish(folder: Path, record: Mapping[str, Any], classes: int | None, names: tuple[str, ...] | None) -> None:
    """Write the index of a command's shards, once all are there.

    Args:
        record: the command's record, with `number` and `size`.
        classes, names: number and names of the labels, None without.
    """
    count = -(-int(record["number"]) // PER_SHARD)
    entries = tuple(kept_entry(folder / shard_name(number)) for number in range(count))
    height, width = record["size"]
    made = {"seed": record["seed"], "weights_sha256": record["weights_sha256"]}
    write_text(folder / INDEX, ShardIndex(entries, (height, width), classes, names, made).to_json())
    (folder / PACKING).unlink()


def first_images(folder: Path, count: int) -> list[Tensor]:
    """Return the first samples, uint8 ``(C, H, W)``, at most those of the first shard."""
    path = folder / shard_name(0)
    shard = Shard(path, str(path), Keys())
    try:
        return [decode(shard.content(i), None, shard.names[i]) for i in range(min(count, len(shard)))]
    finally:
        shard.close()
