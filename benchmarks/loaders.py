"""Measure loaders of images: shards beside a folder, a zip and an array, and beside webdataset's and datasets' own.

    python -m benchmarks.loaders                                   # 32, 64 and 256 px; 0, 1 and 2 workers
    python -m benchmarks.loaders --sizes 64 --workers 0 --seconds 5 --out loaders.json
    python -m benchmarks.loaders --memory --images 100000          # memory of ten epochs
    python -m benchmarks.loaders --decoders                        # Pillow, simplejpeg and torchvision.io
    python -m benchmarks.loaders --writing --images 50000          # samples of 32 px written as shards

All give shuffled batches of 64 uint8 images (64, 3, H, W) of the same crops of scikit-image's photos. Two figures are
printed: images per second of wall-clock time, and images per second of CPU time, of the training process and its
workers together, which other load on the machine affects less. Both come from the difference of a long and a short run,
so that starting workers does not count. The loaders alternate, so that load affects all of them; figures are medians
over the rounds.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import re
import resource
import statistics
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from dpm_scales import data
from dpm_scales.commands import sample_shards
from dpm_scales.data import ImageDataModule
from dpm_scales.data.decoded import DeviceImages, Drawn, Draws, as_it_is
from dpm_scales.data.sampler import ShuffledBatches
from dpm_scales.images import png_bytes
from dpm_scales.shards import ShardSource
from dpm_scales.shards.pack import Packing, pack
from dpm_scales.shards.shard import decode

BATCH = 64
SIZES, WORKERS = (32, 64, 256), (0, 1, 2)
SETS = {32: 4096, 64: 4096, 256: 1024}
"""Number of images of each size."""

HANDED = 2e-3
"""Lower bound on the CPU seconds of a batch that a worker sends to the training process."""

DECODED = "shards, png, decoded"

Loader = Callable[[int, int], Iterator[Any]]
"""Function that returns endless batches, given the number of workers and the number of batches that will be taken."""


def crops(size: int, number: int) -> np.ndarray:
    """Return crops of photos at several scales, uint8 (number, size, size, 3)."""
    from skimage import data as photos

    rng = np.random.default_rng(0)
    sources = [Image.fromarray(getattr(photos, name)()) for name in ("astronaut", "coffee", "chelsea", "rocket")]
    found = np.empty((number, size, size, 3), dtype=np.uint8)
    for index in range(number):
        photo = sources[rng.integers(4)]
        side = int(rng.integers(min(size, 200), 300))
        left, top = (int(rng.integers(0, limit - side + 1)) for limit in photo.size)
        found[index] = photo.resize((size, size), Image.Resampling.BICUBIC, (left, top, left + side, top + side))
    return found


def write_sets(place: Path, size: int, number: int) -> None:
    """Write the same images as an array, a folder, a zip, and shards of PNG, PPM and JPEG files."""
    pixels = crops(size, number)
    np.save(place / "array.npy", pixels)
    for kind in ("png", "jpg"):
        (place / kind).mkdir()
        for index, image in enumerate(pixels):
            Image.fromarray(image).save(place / kind / f"{index:05d}.{kind}", quality=90)
    with zipfile.ZipFile(place / "images.zip", "w") as archive:
        for path in sorted((place / "png").iterdir()):
            archive.write(path, path.name)
    per_shard = number // 16
    for name, source, kind in (("png", "png", "keep"), ("ppm", "png", "ppm"), ("jpg", "jpg", "keep")):
        pack(place / source, place / f"shards-{name}", Packing(per_shard, format=kind), lambda *_: lambda _: None)


def batches_of(source: data.ImageSource, workers: int, count: int, decoded: bool = False) -> Iterator[Any]:
    """Return endless batches of the data module, with one loader for all epochs, as in training."""
    module = ImageDataModule(source, BATCH, workers, decoded=decoded)
    loader = module.train_dataloader()
    done = 0
    while True:
        module.set_start_batch(done)
        for batch in loader:
            yield batch
            done += 1


def gathered(source: data.ImageSource, device: torch.device, workers: int, count: int) -> Iterator[Any]:
    """Return endless batches of images that are kept on a device, as by data.on_device=true."""
    part, done = source.train(), 0
    held = DeviceImages(part, (source.channels, *source.image_size), device, 0, False)
    batches = ShuffledBatches(len(part), BATCH, 0, lambda: done)
    loader = DataLoader(
        Draws(part, 0), BATCH, sampler=batches, num_workers=workers, collate_fn=as_it_is, persistent_workers=workers > 0
    )
    while True:
        for drawn in loader:
            batch = held.gather(Drawn(*(values.to(device) for values in drawn)))
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            yield batch
            done += 1


def as_tensor(image: Any) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def stacked(rows: Sequence[Any]) -> Tensor:
    return torch.stack([as_tensor(row["image"]) for row in rows])


def of_webdataset(pattern: str, ending: str, workers: int, count: int) -> Iterator[Any]:
    """Return webdataset's batches, with shuffled shards and a buffer of 1000 images, as in its documentation."""
    import webdataset

    stream = webdataset.WebDataset(pattern, shardshuffle=100, resampled=True).shuffle(1000).decode("pil")
    stream = stream.to_tuple(ending).map_tuple(as_tensor).batched(BATCH)
    return iter(webdataset.WebLoader(stream, batch_size=None, num_workers=workers))


def of_datasets(place: Path, streaming: bool, workers: int, count: int) -> Iterator[Any]:
    """Return batches of datasets' own rows, shuffled by torch, or by its buffer of 1000 images."""
    import datasets

    files = {"data_files": str(place / "images.parquet"), "split": "train", "cache_dir": str(place / "cache")}
    rows = datasets.load_dataset("parquet", streaming=streaming, **files)
    if streaming:
        rows = rows.shuffle(seed=0, buffer_size=1000).repeat(None)
        return iter(DataLoader(rows, BATCH, num_workers=min(workers, rows.num_shards), collate_fn=stacked))
    sampler = torch.utils.data.RandomSampler(rows, replacement=True, num_samples=BATCH * count)
    return iter(DataLoader(rows, BATCH, sampler=sampler, num_workers=workers, collate_fn=stacked))


def write_parquet(place: Path) -> None:
    import datasets

    datasets.disable_progress_bars()
    files = [{"bytes": path.read_bytes(), "path": None} for path in sorted((place / "png").iterdir())]
    rows = datasets.Dataset.from_dict({"image": files}, features=datasets.Features({"image": datasets.Image()}))
    rows.to_parquet(str(place / "images.parquet"))


def loaders(place: Path, device: torch.device) -> dict[str, Loader]:
    """Return all loaders of the sets in a folder, by name."""
    shards = partial(ShardSource, split="images", val_fraction=0, window=4)
    write_parquet(place)
    sources: dict[str, Callable[[], data.ImageSource]] = {
        "array": lambda: data.ArraySource(place / "array.npy", val_fraction=0),
        "folder, png": lambda: data.ImageFolder(place / "png", val_fraction=0),
        "zip, png": lambda: data.ImageFolder(place / "images.zip", val_fraction=0),
        "shards, png": lambda: shards(place / "shards-png"),
        "shards, ppm": lambda: shards(place / "shards-ppm"),
        "shards, jpg": lambda: shards(place / "shards-jpg"),
        "shards, jpg, simplejpeg": lambda: shards(place / "shards-jpg", decoder="simplejpeg"),
        "hf, png": lambda: data.HubSource(str(place / "images.parquet"), val_fraction=0),
    }
    found: dict[str, Loader] = {name: partial(batches_of, make()) for name, make in sources.items()}
    found[DECODED] = partial(batches_of, shards(place / "shards-png"), decoded=True)
    found["shards, png, on the device"] = partial(gathered, shards(place / "shards-png"), device)
    number = len(list((place / "shards-png").glob("*.tar"))) - 1
    for kind in ("png", "jpg"):
        pattern = f"{place}/shards-{kind}/shard-{{000000..{number:06d}}}.tar"
        found[f"webdataset, {kind}"] = partial(of_webdataset, pattern, kind)
    found["datasets, png"] = partial(of_datasets, place, False)
    found["datasets, png, streaming"] = partial(of_datasets, place, True)
    return found


def cpu_seconds() -> float:
    """Return the CPU time of this process and of its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def spent(loader: Loader, workers: int, count: int) -> tuple[float, float]:
    """Return wall-clock and CPU seconds of `count` batches, including the start and end of workers."""
    wall, cpu = time.perf_counter(), cpu_seconds()
    batches = loader(workers, count)
    for _ in range(count):
        next(batches)
    del batches
    return time.perf_counter() - wall, cpu_seconds() - cpu


@dataclass
class Timing:
    """Wall-clock and CPU seconds of some short runs, and of some long ones."""

    batches: int
    short: list[tuple[float, float]] = field(default_factory=list)
    long: list[tuple[float, float]] = field(default_factory=list)

    def add(self, loader: Loader, workers: int) -> None:
        """Run both once more."""
        self.short.append(spent(loader, workers, few(workers)))
        self.long.append(spent(loader, workers, few(workers) + self.batches))

    def figures(self) -> dict[str, float]:
        """Return images per second of wall-clock and of CPU time."""
        middle = [[statistics.median(times) for times in zip(*runs, strict=True)] for runs in (self.long, self.short)]
        return {
            name: BATCH * self.batches / (long - short) if long > short else math.nan
            for name, long, short in zip(("wall", "cpu"), *middle, strict=True)
        }


def few(workers: int) -> int:
    """Return the number of batches after which all workers are running."""
    return 4 + 4 * workers


def seconds_of(loader: Loader) -> float:
    """Return the CPU seconds of a batch without workers; caches are filled first."""
    first, count = spent(loader, 0, few(0))[1], 32
    return max((spent(loader, 0, few(0) + count)[1] - first) / count, 1e-4)


def table(rows: dict[str, dict[str, float]], sizes: Sequence[int], workers: Sequence[int], figure: str) -> str:
    """Return a Markdown table of images per second, by loader, size and number of workers."""
    keys = [(size, number) for size in sizes for number in workers]
    head = [f"| loader | {' | '.join(f'{s} px, {n}' for s, n in keys)} |", f"|---|{'---|' * len(keys)}"]
    body = []
    for name, row in rows.items():
        cells = [f"{row[f'{size},{number},{figure}']:,.0f}".replace(",", " ") for size, number in keys]
        body.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join([*head, *body])


def throughput(
    sizes: Sequence[int], workers: Sequence[int], seconds: float, rounds: int, only: str, device: torch.device
) -> dict[str, dict[str, float]]:
    """Return the figures of all loaders whose names contain `only`, measured in turn, medians of some rounds."""
    rows: dict[str, dict[str, float]] = {}
    for size in sizes:
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder)
            os.environ["DPM_SCALES_CACHE"] = str(place / "cache")
            write_sets(place, size, SETS[size])
            chosen = {name: loader for name, loader in loaders(place, device).items() if only in name}
            for name in set(chosen).intersection([DECODED]):
                spent(chosen[name], 0, SETS[size] // BATCH)  # fills the file
            each = {name: seconds_of(loader) for name, loader in chosen.items()}
            for number in workers:
                costs = {name: max(cost, HANDED * bool(number)) for name, cost in each.items()}
                timings = {name: Timing(max(16, round(seconds / cost))) for name, cost in costs.items()}
                for _ in range(rounds):
                    for name, loader in chosen.items():
                        timings[name].add(loader, number)
                for name, timing in timings.items():
                    found = timing.figures()
                    print(f"{size} px, {number} workers, {name}: {found}", flush=True)
                    rows.setdefault(name, {}).update({f"{size},{number},{key}": v for key, v in found.items()})
    return rows


def memory(images: int, epochs: int, workers: int, per_shard: int = 1000) -> list[list[tuple[float, int]]]:
    """Return unshared memory in MiB and open files of the process and its workers, after each epoch of 8 px images."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        rng = np.random.default_rng(0)
        np.save(place / "a.npy", rng.integers(0, 256, (images, 8, 8, 3), dtype=np.uint8))
        pack(place / "a.npy", place / "s", Packing(per_shard, format="ppm"), lambda *_: lambda _: None)
        module = ImageDataModule(ShardSource(place / "s", val_fraction=0), 256, workers)
        loader, found, done = module.train_dataloader(), [], 0
        for epoch in range(epochs):
            module.set_start_batch(done)
            for _ in loader:
                done += 1
            found.append([held(pid) for pid in (os.getpid(), *children())])
            told = ", ".join(f"{size:.1f} MiB and {files} files" for size, files in found[-1])
            print(f"epoch {epoch}: {told}", flush=True)
    return found


def decoders(sizes: Sequence[int], seconds: float, rounds: int) -> list[list[Any]]:
    """Return files decoded per CPU second, and the largest difference from Pillow's pixels, by size, kind, decoder."""
    from torchvision import io as vision

    ways: dict[str, Callable[[bytes], Tensor]] = {
        "pillow": lambda content: decode(content, 3, ""),
        "simplejpeg": lambda content: decode(content, 3, "", "simplejpeg"),
        "torchvision.io": lambda content: vision.decode_image(
            torch.frombuffer(bytearray(content), dtype=torch.uint8), vision.ImageReadMode.RGB
        ),
    }
    found: list[list[Any]] = []
    for size in sizes:
        pixels = crops(size, 64)
        for kind in ("JPEG", "PNG"):
            files = [io.BytesIO() for _ in pixels]
            for file, image in zip(files, pixels, strict=True):
                Image.fromarray(image).save(file, kind, quality=90)
            contents = [file.getvalue() for file in files]
            chosen = {name: way for name, way in ways.items() if kind == "JPEG" or name != "simplejpeg"}
            rates: dict[str, list[float]] = {name: [] for name in chosen}
            for _ in range(rounds):
                for name, way in chosen.items():
                    began, done = time.process_time(), 0
                    while time.process_time() - began < seconds:
                        for content in contents:
                            way(content)
                        done += len(contents)
                    rates[name].append(done / (time.process_time() - began))
            theirs = [ways["pillow"](content).int() for content in contents]
            for name, way in chosen.items():
                pairs = zip(contents, theirs, strict=True)
                worst = max(int((way(content).int() - other).abs().max()) for content, other in pairs)
                found.append([size, kind, name, round(statistics.median(rates[name])), worst])
                print("| {} px | {} | {} | {} | {} |".format(*found[-1]), flush=True)
    return found


def writing(images: int) -> dict[str, float]:
    """Return images per second, wall-clock and CPU, with which samples of 32 px are written as shards of PNG files."""
    pixels = torch.from_numpy(crops(32, 1000)).permute(0, 3, 1, 2).contiguous()
    with tempfile.TemporaryDirectory() as folder:
        wall, cpu = time.perf_counter(), cpu_seconds()
        for first in range(0, images, sample_shards.PER_SHARD):
            job = range(first, min(first + sample_shards.PER_SHARD, images))
            files = ((f"{n:06d}.png", png_bytes(pixels[n % len(pixels)]), None) for n in job)
            sample_shards.write(Path(folder), job, files)
        record = {"number": images, "size": (32, 32), "seed": 0, "weights_sha256": ""}
        sample_shards.begin(Path(folder))
        sample_shards.finish(Path(folder), record, None, None)
        found = {"wall": images / (time.perf_counter() - wall), "cpu": images / (cpu_seconds() - cpu)}
    print(f"{images} samples: {found['wall']:.0f} images per second, {found['cpu']:.0f} of CPU time", flush=True)
    return found


def held(pid: int) -> tuple[float, int]:
    """Return the anonymous resident memory of a process, in MiB, and its number of open files."""
    match = re.search(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return int(match[1]) / 1024 if match else 0.0, len(os.listdir(f"/proc/{pid}/fd"))


def children() -> list[int]:
    text = Path(f"/proc/self/task/{os.getpid()}/children").read_text()
    return [int(pid) for pid in text.split()]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, choices=SIZES)
    parser.add_argument("--workers", type=int, nargs="+", default=WORKERS)
    parser.add_argument("--seconds", type=float, default=0.7, help="CPU seconds of each measurement")
    parser.add_argument("--rounds", type=int, default=3, help="turns of all loaders, of which the median counts")
    parser.add_argument("--only", default="", help="loaders whose names contain this")
    parser.add_argument("--device", default="cpu", help="of the images that are kept on one")
    parser.add_argument("--out", type=Path, help="file for the figures, JSON")
    parser.add_argument("--memory", action="store_true", help="measure memory in place of speed")
    parser.add_argument("--decoders", action="store_true", help="compare decoders in place of loaders")
    parser.add_argument("--writing", action="store_true", help="write samples as shards in place of reading")
    parser.add_argument("--images", type=int, default=20000, help="images of an epoch, or written")
    parser.add_argument("--epochs", type=int, default=10, help="with --memory")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    found: Any
    if args.memory:
        found = memory(args.images, args.epochs, args.workers[-1])
    elif args.decoders:
        found = decoders(args.sizes, args.seconds, args.rounds)
    elif args.writing:
        found = writing(args.images)
    else:
        found = throughput(args.sizes, args.workers, args.seconds, args.rounds, args.only, torch.device(args.device))
        for figure, about in (("cpu", "images per second of CPU time"), ("wall", "images per second")):
            print(f"\n{about}, by pixels and workers\n\n{table(found, args.sizes, args.workers, figure)}")
    if args.out:
        args.out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
