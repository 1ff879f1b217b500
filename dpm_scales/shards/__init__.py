"""Tar shards of images: packed, indexed, checked, fetched, cached, and read in an order determined by one number.

`ShardSource` is a source of images like those of `dpm_scales.data`; the other modules support it: `tar` and `shard`
read one file, `index`, `places` and `scan` find the files, `fetch` and `cache` copy them to this machine.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dpm_scales.shards.source import ShardImages, ShardSource

if TYPE_CHECKING:
    from dpm_scales.shards.builder import shards_data

__all__ = ["ShardImages", "ShardSource", "shards_data"]


def __getattr__(name: str) -> Any:
    # the data module needs Lightning, which takes seconds to import
    if name != "shards_data":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from dpm_scales.shards import builder

    return builder.shards_data
