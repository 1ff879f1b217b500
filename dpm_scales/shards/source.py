"""Images from tar shards, local or fetched into a cache, in an order that one number resumes on any number of ranks.

The order of an epoch is a function of (seed, epoch) and of the numbers of images in the shards: shards are permuted,
and images within windows of consecutive shards of that permutation (`order.Windowed`). There is no other shuffling, and
no process keeps a position: an image is read by its number, at its offset in its shard.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from dpm_scales import images
from dpm_scales.data.base import NO_LABEL, ImageSource
from dpm_scales.data.folder import RESIZE_MODES, View, require_one_of
from dpm_scales.data.order import Windowed
from dpm_scales.data.replaced import ReplacedImages
from dpm_scales.errors import UserError, is_whole, require
from dpm_scales.shards.cache import DEFAULT_GIGABYTES, ShardCache
from dpm_scales.shards.fetch import Patience
from dpm_scales.shards.index import ShardIndex
from dpm_scales.shards.shard import Keys, decode
from dpm_scales.shards.shard_set import ShardSet, open_shards
from dpm_scales.storage import data_cache

SPLITS = ("auto", "parts", "shards", "images")
POOL_SHARDS = 8
"""Number of shards on which statistics are measured, so that not all shards are fetched for them."""


@dataclass(frozen=True)
class Held:
    """Images held out of each shard: a fraction `share` of all images, drawn within each shard with `seed`."""

    counts: np.ndarray
    share: float
    seed: int

    def numbers(self) -> np.ndarray:
        """Return the number of images held out of each shard, (S,); in total at least one if there are two or more."""
        through = np.rint(self.share * np.cumsum(self.counts)).astype(np.int64)
        numbers = np.diff(through, prepend=0)
        if numbers.sum() == 0 and self.counts.sum() > 1:
            numbers[np.argmax(self.counts)] = 1
        return numbers

    def images(self, shard: int, number: int) -> np.ndarray:
        """Return the sorted indices of the `number` images held out of a shard."""
        order = np.random.default_rng((self.seed, shard, 2)).permutation(int(self.counts[shard]))
        return np.sort(order[:number])


class ShardImages(ReplacedImages):
    """A part of the images of a set of shards, numbered shard by shard.

    Args:
        shards: the set.
        numbers: the shards of this part.
        view: transform of an image.
        classes: number of labels, which are 0 to classes - 1; None for no labels.
        on_error: "skip" replaces an image that is unreadable or lacks a label by the next readable one; "raise" stops.
        window: number of shards whose images are permuted together.
        decoder: "pillow" or "simplejpeg", see `shard.decode`.
        held: which images of each shard are held out; None for none.
        validation: use the held-out images instead of the others.
    """

    def __init__(
        self,
        shards: ShardSet,
        numbers: Sequence[int],
        view: View,
        classes: int | None,
        on_error: str,
        window: int,
        decoder: str = "pillow",
        held: Held | None = None,
        validation: bool = False,
    ) -> None:
        self.shards, self.numbers, self.view, self.classes = shards, list(numbers), view, classes
        self.window, self.decoder, self.held, self.validation = window, decoder, held, validation
        counts = np.array([shards.entries[n].images for n in self.numbers], dtype=np.int64)
        if held is not None:
            out = held.numbers()[self.numbers]
            counts = out if validation else counts - out
        self.counts = counts
        self._starts: list[int] = np.concatenate([[0], np.cumsum(counts)]).tolist()
        self._members: OrderedDict[int, np.ndarray] = OrderedDict()
        super().__init__(self._starts[-1], shards.source, on_error)
        self.augmented, self.mirrored = view.is_random, view.only_mirrors

    def order(self, seed: int) -> Windowed:
        return Windowed(self.counts, self.window, seed, on_window=self._expect)

    def pool(self, count: int) -> list[int]:
        """Return the images of a few shards, evenly spaced in the set; of more shards if these have too few."""
        for number in range(min(POOL_SHARDS, len(self.counts)), len(self.counts) + 1):
            chosen = np.unique(np.linspace(0, len(self.counts) - 1, number).round().astype(int))
            if self.counts[chosen].sum() >= min(count, len(self)):
                break
        return [i for shard in chosen.tolist() for i in range(self._starts[shard], self._starts[shard + 1])]

    def identity(self) -> list[Any]:
        shards, keys = [self.shards.state(number) for number in self.numbers], self.shards.keys
        held = None if self.held is None else [self.held.share, self.held.seed, self.validation]
        labels = [keys.label, self.classes]
        return ["shards", shards, self.counts.tolist(), held, keys.image, labels, self.view.identity()]

    def file_bytes(self) -> float:
        return sum(self.shards.file_bytes(number) for number in self.numbers)

    def name(self, index: int) -> str:
        shard, member = self._place(index)
        return f"{self.shards.name(shard)}, image {member}"  # its name is not known before its shard is opened

    def describe(self, index: int) -> str:
        number, member = self._place(index)
        shard = self.shards.open(number)
        return f"{shard.name}/{shard.names[member]}"

    def load(self, index: int, rng: np.random.Generator | None) -> tuple[Tensor, int]:
        number, member = self._place(index)
        shard = self.shards.open(number)
        image = decode(shard.content(member), self.view.channels, f"{shard.name}/{shard.names[member]}", self.decoder)
        if self.classes is None:
            return self.view(image, rng), NO_LABEL
        label = shard.label(member)
        if label >= self.classes:
            raise UserError(f"its label is {label}, and the index says that there are {self.classes} classes")
        return self.view(image, rng), label

    def _place(self, index: int) -> tuple[int, int]:
        """Return the shard of an image, and the image's index in it."""
        place = bisect_right(self._starts, index) - 1
        number, member = self.numbers[place], index - self._starts[place]
        return (number, member) if self.held is None else (number, int(self._members_of(place)[member]))

    def _members_of(self, place: int) -> np.ndarray:
        """Return the indices, within its shard, of the images that belong to this part."""
        if place not in self._members:
            while len(self._members) >= self.shards.keep:
                self._members.popitem(last=False)
            assert self.held is not None
            number, count = self.numbers[place], int(self.counts[place])
            total = self.shards.entries[number].images
            out = self.held.images(number, count if self.validation else total - count)
            self._members[place] = out if self.validation else np.setdiff1d(np.arange(total), out, assume_unique=True)
        return self._members[place]

    def _expect(self, now: list[int], following: list[int]) -> None:
        self.shards.expect([self.numbers[place] for place in (*now, *following)])


class ShardSource(ImageSource):
    """Images in tar shards in webdataset's format.

    Args:
        root: a folder, a file, a pattern or an address, see `places`.
        val_root: the same for the validation images; null if `split` divides those of `root`.
        index: path or address of the index, if it is not beside the shards; also that of a `val_root` that names
            individual files.
        channels: 1 grey or 3 RGB; images are converted.
        image_size: side, or [height, width], in pixels; null if the index says that all images have one size.
        resize_mode, random_crop, random_flip, rotate_portrait: as in `ImageFolder`.
        split: "parts" uses the parts that the index names; "shards" holds out whole shards, drawn with `split_seed`;
            "images" holds out images of each shard; "auto" uses parts if the index has them, otherwise shards if
            `val_fraction` of them is at least one, otherwise images.
        val_fraction: fraction held out.
        split_seed: seed of the split.
        labels: ending of the labels' members, such as "cls", or "json.FIELD"; "none" for no labels.
        image: ending of the images' members, such as "jpg"; null for any.
        on_error: "skip" leaves out unreadable images and shards with a warning; "raise" stops at the first.
        verify: "headers" compares the sizes of local shards with the index, "full" their checksums, "none" neither.
        decoder: "pillow", or "simplejpeg" for JPEG files, which is faster and gives the same pixels.
        window: number of shards whose images are permuted together.
        cache_gb: largest size in GiB of the cache of fetched shards, see `cache`.
        tries, timeout: number of tries to fetch a file, and seconds without a byte that end a try.
        download: whether to fetch shards; false uses only those in the cache.

    Attributes:
        left_out: faults of shards found at the start, by shard.

    Raises:
        UserError: nothing to read, unsuitable sizes, a faulty shard with on_error="raise", an address without an index,
            or a cache smaller than two windows.
    """

    def __init__(
        self,
        root: str | Path,
        val_root: str | Path | None = None,
        index: str | Path | None = None,
        channels: int = 3,
        image_size: int | Sequence[int] | None = None,
        resize_mode: str = "resize_crop",
        random_crop: bool = False,
        random_flip: bool = False,
        rotate_portrait: bool = False,
        split: str = "auto",
        val_fraction: float = 0.1,
        split_seed: int = 0,
        labels: str = "none",
        image: str | None = None,
        on_error: str = "skip",
        verify: str = "headers",
        decoder: str = "pillow",
        window: int = 8,
        cache_gb: float = DEFAULT_GIGABYTES,
        tries: int = 8,
        timeout: float = 30,
        download: bool = True,
    ) -> None:
        require(channels in (1, 3), f"channels={channels}: allowed are 1 (grey) and 3 (RGB)")
        require_one_of("resize_mode", resize_mode, RESIZE_MODES)
        require_one_of("split", split, SPLITS)
        require_one_of("on_error", on_error, ("skip", "raise"))
        require_one_of("verify", verify, ("headers", "full", "none"))
        require_one_of("decoder", decoder, ("pillow", "simplejpeg"))
        there = decoder == "pillow" or find_spec("simplejpeg") is not None
        require(there, "decoder=simplejpeg needs that package: pip install 'dpm-scales[shards]'")
        require(is_whole(window, 1), f"window={window}: allowed is a number of shards >= 1")
        require(is_whole(split_seed, 0), f"split_seed={split_seed}: allowed is a whole number >= 0")
        require(0 <= val_fraction < 1, f"val_fraction={val_fraction}: allowed is 0 <= val_fraction < 1")
        both = f"split={split} divides root, and val_root is given; leave one out"
        require(val_root is None or split == "auto", both)
        keys = Keys(image, None if labels == "none" else labels)
        cache = ShardCache(data_cache(), cache_gb, Patience(tries, timeout), download)
        shared = (cache, on_error, verify, 2 * window)
        opened = open_shards(root, keys, index, *shared)
        self.left_out = opened.left_out
        found, shards = opened.index, opened.shards
        size, mode = _size(found, image_size, resize_mode, shards.source)
        require(
            not random_crop or mode in ("crop", "resize_crop"),
            "random_crop=true needs image_size and resize_mode=crop or resize_crop",
        )
        self.channels, self.image_size = channels, size
        if labels != "none":
            none = f"{shards.source}: the index lists no labels; pack them with labels=folder, or set labels=none"
            require(found.num_classes is not None, none)
            classes = int(found.num_classes or 0)
            self.num_classes, self.class_names = classes, found.class_names
            require(
                self.class_names is not None or classes <= len(found),
                f"{shards.source}: labels go up to {classes - 1}, which makes {classes} classes of "
                f"{len(found)} images; number the classes from 0 without gaps",
            )
        train = View(channels, size, mode, random_crop, random_flip, rotate_portrait)
        val = View(channels, size, mode, rotate_portrait=rotate_portrait)
        rest = (self.num_classes, on_error, window, decoder)
        if val_root is not None:
            other = open_shards(val_root, keys, index if str(val_root).endswith(".tar") else None, *shared)
            self.left_out = {**self.left_out, **other.left_out}
            own: Sequence[int] = range(len(shards))
            beside: Sequence[int] = range(len(other.shards))
            held, val_shards = None, other.shards
            self.split_note = f"{shards.source} + {other.shards.source}"
        else:
            own, beside, held, self.split_note = _divide(found, split, val_fraction, split_seed)
            val_shards = shards
        self._train = ShardImages(shards, own, train, *rest, held)
        self._val = ShardImages(val_shards, beside, val, *rest, held, validation=True)
        require(len(self._train) > 0, f"{shards.source}: no training images; lower val_fraction={val_fraction}")
        cache.require_room([entry.bytes for entry in shards.remote], 2 * window)

    def train(self) -> ShardImages:
        return self._train

    def val(self) -> ShardImages:
        return self._val


def _size(
    index: ShardIndex, image_size: int | Sequence[int] | None, resize_mode: str, source: str
) -> tuple[tuple[int, int], str]:
    """Return the size of all images, and the resize mode that brings them to it."""
    if image_size is not None:
        return images.size_pair(image_size, "image_size"), resize_mode
    if index.image_size is None:
        raise UserError(f"{source}: mixed sizes; set image_size, for example image_size=64")
    return index.image_size, "none"


def _divide(
    index: ShardIndex, split: str, share: float, seed: int
) -> tuple[Sequence[int], Sequence[int], Held | None, str]:
    """Return the shards of both parts, the images held out of them, and a note on the parts."""
    total = len(index.shards)
    parts = {part: [i for i, shard in enumerate(index.shards) if shard.part == part] for part in ("train", "val")}
    named = bool(parts["train"] and parts["val"])
    if split == "parts" or (split == "auto" and named):
        require(named, "the index names no parts train and val; set split=shards or split=images, or val_root")
        return parts["train"], parts["val"], None, "parts of the index"
    out = round(share * total)
    if split == "shards" or (split == "auto" and out >= 1):
        out = max(out, 1) if share > 0 else 0
        require(out < total, f"split=shards needs two shards at least, and there are {total}; set split=images")
        order = np.random.default_rng(seed).permutation(total)
        note = f"{total - out} + {out} shards"
        return sorted(order[out:].tolist()), sorted(order[:out].tolist()), None, note
    counts = np.array([shard.images for shard in index.shards], dtype=np.int64)
    held = Held(counts, share, seed) if share > 0 else None
    return range(total), range(total) if held else (), held, f"of {total} shards"
