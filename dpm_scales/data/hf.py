"""Images from the library `datasets`: a data set of the Hugging Face Hub, or local parquet, arrow or image files.

Mapped sets (`streaming=false`) have a length and rows by index, and behave like a folder. A stream has neither. It is
read in windows of consecutive images, permuted by (seed, epoch, window): the batches are still a function of their
number, on any number of ranks and workers, but each rank and worker reads the whole stream, and on resuming reads it
again up to the window of the next batch.

Rows are read undecoded, and images are decoded like those of folders. No pickles are read, and no code of a set is run.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from dpm_scales import images
from dpm_scales.data.base import NO_LABEL, ImageDataset, ImageSource, split_indices
from dpm_scales.data.files import EXTENSIONS
from dpm_scales.data.folder import RESIZE_MODES, View, require_one_of
from dpm_scales.data.hf_rows import RowImages, StreamImages, hub_errors, image_of
from dpm_scales.errors import UserError, is_whole, require, suggest

_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", re.ASCII)
_BUILDERS = {"parquet": (".parquet",), "arrow": (".arrow",), "imagefolder": EXTENSIONS}


class HubSource(ImageSource):
    """Images from the library `datasets`.

    Args:
        root: a folder written by `save_to_disk`, or one with parquet, arrow or image files, or one of these files;
            otherwise the name of a set on the Hub.
        name: configuration of a set that has several.
        revision: version of a set on the Hub.
        split: part used for training.
        val_split: part of the validation images; null holds out `val_fraction` of `split`.
        val_fraction: fraction held out: drawn from each label with `split_seed`; for a stream, its first images.
        split_seed: seed of the split.
        image: column of the images.
        labels: column of the labels; "none" for no labels.
        streaming: read the set as a stream, without a copy on this machine.
        num_images: number of images, for a stream that does not report it.
        window: number of images of a stream that are permuted together.
        channels: 1 grey or 3 RGB; images are converted.
        image_size: side, or [height, width], in pixels; null for that of the first image, which all others must have.
        resize_mode, random_crop, random_flip, rotate_portrait: as in `ImageFolder`.
        on_error: "skip" replaces unreadable images by others, with a warning; "raise" stops at the first.
        download: whether to fetch a set from the Hub.

    Raises:
        UserError: a set, part or column that does not exist, a stream of unknown length, unsuitable sizes.
    """

    def __init__(
        self,
        root: str | Path,
        name: str | None = None,
        revision: str | None = None,
        split: str = "train",
        val_split: str | None = None,
        val_fraction: float = 0.1,
        split_seed: int = 0,
        image: str = "image",
        labels: str = "none",
        streaming: bool = False,
        num_images: int | None = None,
        window: int = 1000,
        channels: int = 3,
        image_size: int | Sequence[int] | None = None,
        resize_mode: str = "resize_crop",
        random_crop: bool = False,
        random_flip: bool = False,
        rotate_portrait: bool = False,
        on_error: str = "skip",
        download: bool = True,
    ) -> None:
        require(channels in (1, 3), f"channels={channels}: allowed are 1 (grey) and 3 (RGB)")
        require_one_of("resize_mode", resize_mode, RESIZE_MODES)
        require_one_of("on_error", on_error, ("skip", "raise"))
        require(is_whole(window, 1), f"window={window}: allowed is a number of images >= 1")
        require(0 <= val_fraction < 1, f"val_fraction={val_fraction}: allowed is 0 <= val_fraction < 1")
        require(num_images is None or is_whole(num_images, 1), f"num_images={num_images}: allowed is a number >= 1")
        known = num_images is None or streaming
        require(known, "num_images is for streaming=true; a mapped set knows its length")
        there = find_spec("datasets") is not None
        require(there, "data=hf needs the package datasets: pip install 'dpm-scales[hf]'")
        place = str(root)
        self.channels = channels
        size = None if image_size is None else images.size_pair(image_size, "image_size")
        mode = "none" if size is None else resize_mode
        require(
            not random_crop or mode in ("crop", "resize_crop"),
            "random_crop=true needs image_size and resize_mode=crop or resize_crop",
        )
        wanted = None if labels == "none" else labels
        asked = (name, revision, streaming, download)
        rows = _columns(_opened(place, split, *asked), place, image, wanted)
        val_rows = None if val_split is None else _columns(_opened(place, val_split, *asked), place, image, wanted)
        if wanted is not None:
            self.num_classes, self.class_names = _classes(rows, wanted, streaming)
        if size is None:
            with hub_errors(place):
                first = next(iter(rows.iter(batch_size=1)))
            first = first.to_pylist()[0] if streaming else {key: value[0] for key, value in first.items()}
            shape = image_of(first[image], channels, f"{place}, the first image").shape
            size = (min(shape[1:]), max(shape[1:])) if rotate_portrait else (shape[1], shape[2])
        self.image_size = size
        train_view = View(channels, size, mode, random_crop, random_flip, rotate_portrait)
        val_view = View(channels, size, mode, rotate_portrait=rotate_portrait)
        columns = (image, wanted)
        parts: list[ImageDataset] = []
        if streaming:
            number = _length(rows, split, num_images, place)
            held = 0 if val_rows is not None else round(val_fraction * number)
            require(held < number, f"{place}: {number} images are too few to hold out {val_fraction}")
            rest = (window, columns, self.num_classes)
            parts.append(StreamImages(rows, held, number - held, *rest, train_view, place, on_error))
            source, count = (rows, held) if val_rows is None else (val_rows, _length(val_rows, val_split, None, place))
            parts.append(StreamImages(source, 0, count, *rest, val_view, place, on_error))
            self.split_note = "a stream" if held == 0 else f"a stream, whose first {held} images are held out"
        else:
            by_label = None if wanted is None else _numbers(rows[wanted])
            share = 0.0 if val_rows is not None else val_fraction
            train, val = split_indices(len(rows), share, split_seed, by_label)
            mapped = (columns, self.num_classes)
            parts.append(RowImages(rows, train.tolist(), *mapped, train_view, f"{place}, {split}", on_error))
            other, numbers = (rows, val.tolist()) if val_rows is None else (val_rows, range(len(val_rows)))
            parts.append(RowImages(other, numbers, *mapped, val_view, f"{place}, {val_split or split}", on_error))
            self.split_note = "" if val_rows is None else f"{split} + {val_split}"
        self._train, self._val = parts
        require(len(self._train) > 0, f"{place}: no training images")

    def train(self) -> ImageDataset:
        return self._train

    def val(self) -> ImageDataset:
        return self._val


def _opened(place: str, split: str, name: str | None, revision: str | None, streaming: bool, download: bool) -> Any:
    """Return a part of a set: rows, or a stream. Raises UserError if it does not exist."""
    import datasets

    path = Path(place).expanduser()
    with hub_errors(place):
        if path.exists():
            if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
                held = datasets.load_from_disk(str(path))
                if isinstance(held, datasets.DatasetDict):
                    require(split in held, f"{place}: unknown split={split!r}: {suggest(split, held)}")
                    held = held[split]
                return held.to_iterable_dataset() if streaming else held
            files = {"data_files": str(path)} if path.is_file() else {"data_dir": str(path)}
            return datasets.load_dataset(_builder(path), split=split, streaming=streaming, **files)
        require(
            bool(_NAME.fullmatch(place)),
            f"{place}: no such folder or file, and no name of a set on the Hub (OWNER/NAME)",
        )
        require(
            download,
            f"{place} is not a folder here, and data.download=false fetches nothing, the default for names from a "
            "run's folder; give data.download=true",
        )
        return datasets.load_dataset(place, name, split=split, revision=revision, streaming=streaming)


def _builder(path: Path) -> str:
    """Return the name of the builder of `datasets` for the files at a path. Raises UserError if there is none."""
    files = [path] if path.is_file() else (file for file in sorted(path.rglob("*")) if file.is_file())
    found = ""
    for file in files:
        for builder, endings in _BUILDERS.items():
            if file.name.lower().endswith(endings):
                return builder
        found = found or file.name
    hint = "; tar shards are for data=webdataset" if found.endswith(".tar") else ""
    raise UserError(f"{path}: holds {found or 'no files'}; allowed are parquet, arrow and image files{hint}")


def _columns(rows: Any, place: str, image: str, labels: str | None) -> Any:
    """Return the rows with the columns of images, undecoded, and of labels. Raises UserError if they don't exist."""
    import datasets

    features = rows.features
    require(features is not None, f"{place}: tells no columns; give streaming=false")
    for option, column in (("image", image), ("labels", labels)):
        known = column is None or column in features
        require(known, f"{place}: unknown column {option}={column}: {suggest(str(column), features)}")
    kind = isinstance(features[image], datasets.Image) and image != labels
    require(
        kind, f"{place}: the column {image!r} holds no images, or is that of labels; choose another, data.image=COLUMN"
    )
    rows = rows.select_columns([image] if labels is None else [image, labels])
    rows = rows.cast_column(image, datasets.Image(decode=False))
    return rows.with_format("arrow") if isinstance(rows, datasets.IterableDataset) else rows.with_format(None)


def _classes(rows: Any, labels: str, streaming: bool) -> tuple[int, tuple[str, ...] | None]:
    """Return the number of classes, and their names or None. Raises UserError for labels that are not class numbers."""
    feature = rows.features[labels]
    names = getattr(feature, "names", None)
    if names:
        return len(names), tuple(map(str, names))
    advice = "cast the column to ClassLabel"
    require(
        not streaming, f"the column {labels!r} of a stream does not state its classes; {advice}, or streaming=false"
    )
    whole = str(getattr(feature, "dtype", "")).startswith(("int", "uint"))
    require(whole, f"the column {labels!r} holds no integers; {advice}")
    values = _numbers(rows[labels])
    ok = len(values) > 0 and values.min() >= 0 and values.max() < len(values)
    require(ok, f"the column {labels!r} must number its classes from 0 without gaps")
    return int(values.max()) + 1, None


def _numbers(values: Iterable[int | None]) -> np.ndarray:
    """Return a column of labels, (N,), with -1 for rows without one."""
    return np.array([NO_LABEL if value is None else value for value in values], dtype=np.int64)


def _length(rows: Any, split: str | None, given: int | None, place: str) -> int:
    """Return the number of images of a stream. Raises UserError if neither the stream nor `given` says it."""
    stated = getattr((rows.info.splits or {}).get(split), "num_examples", None)
    number = given if given is not None else stated
    if not is_whole(number, 1):
        raise UserError(
            f"{place}: the stream {split!r} does not state its number of images; give data.num_images=N (of "
            "validation: val_fraction in place of val_split), or streaming=false"
        )
    assert isinstance(number, int)
    return number
