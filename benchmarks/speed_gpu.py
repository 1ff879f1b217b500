"""Measure what `docs/speed.md` reports for a GPU, in at most 12 minutes on one card.

    python -m benchmarks.speed_gpu --out runs/speed --bsds BSDS500/images
    python -m benchmarks.speed_gpu --out runs/speed --parts quality --cifar DIR          # as often as needed
    python -m benchmarks.speed_gpu --out runs/toy --toy --device cpu                     # tries the command, in minutes

| part | |
|---|---|
| `ceilings` | rates of the card itself: products, convolutions of a training step, copies, in float32 and bfloat16 |
| `rate PEER WAY` | images/s of training a network of about 35 M parameters on 32 px, in batches of 512 |
| `share` | the forward process in a training step |
| `sampling` | steps of samplers, with and without the network |
| `blur` | `heat_blur`, beside other libraries, as a share of the card's copies and products |
| `osmosis` | the osmosis filter on all images of BSDS500 |
| `quality PEER SECONDS` | CIFAR-10 after 60, 180 and 480 s from a cold start; only on request |

`--parts quality` stands for ours and the fastest peer at all budgets. Each part runs in its own process with its own
time limit, at which its whole process group ends, and its result is kept in OUT/PART.json. The same command resumes
with the parts that are left. OUT/speed.json has all results, OUT/speed.md the tables.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image

from benchmarks import blur, osmosis, peers, step
from benchmarks import sampling as steps
from benchmarks.image_sets import unpacked
from benchmarks.peer_base import Peer
from benchmarks.peer_models import PEERS
from benchmarks.peer_ours import Ours
from benchmarks.spectral import provenance
from benchmarks.speed_tables import page
from dpm_scales.errors import UserError, require
from dpm_scales.storage import write_text

ROOT = Path(__file__).resolve().parents[1]
WAYS: dict[str, tuple[str, ...]] = {
    "bf16+compile": ("trainer.precision=bf16-mixed", "compile=true", "optimizer.method=adamw"),
    "bf16": ("trainer.precision=bf16-mixed", "compile=false", "optimizer.method=adamw"),
    "float32": ("trainer.precision=32-true", "compile=false", "optimizer.method=adamw"),
    "bf16+compile+muon": ("trainer.precision=bf16-mixed", "compile=true", "optimizer.method=muon"),
}
"""Ways to train, with the options of ours; the peers' examples compile nothing and use Adam or AdamW."""
BUDGETS = (60, 180, 480)
"""Seconds from a cold start, for quality."""
PROCESSES = ("vp", "blurring", "osmosis_diffusion")
LARGE_BLURS = ((512, 3, 32, 32), (64, 3, 256, 256))
LEAST = 5
"""Smallest number of seconds for which a part is started."""
LONGEST = 720
"""Largest number of seconds of a part."""
Row = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """Sizes of the measurements."""

    batch: int = 512
    size: int = 32
    warm: int = 20
    steps: int = 60
    turns: int = 15
    side: int = 8192
    images: int = 500
    shares: tuple[int, ...] = (64, 512)
    blurs: tuple[tuple[int, int, int, int], ...] = (*blur.SHAPES, *LARGE_BLURS)


TOY = Sizes(
    batch=2, size=8, warm=1, steps=2, turns=1, side=64, images=1, shares=(2,), blurs=((2, 3, 8, 8), (1, 1, 16, 8))
)


@dataclass(frozen=True)
class Part:
    """A measurement, its limit in seconds, and the smallest number of seconds for which it is started."""

    limit: float
    run: Callable[[argparse.Namespace, Sizes, torch.device], Row]
    least: float = LEAST


# --- parts ------------------------------------------------------------------------------------------------------------


def card(options: argparse.Namespace, sizes: Sizes, device: torch.device) -> Row:
    """Return the card's own rates in float32 and bfloat16."""
    network = "tiny" if options.toy else "ddpm"
    shape = (sizes.batch // 2, device, sizes.size, min(7, sizes.turns), sizes.side, network)
    return {way: peers.ceilings(*shape, half=way == "bf16") for way in ("float32", "bf16")}


def rate(name: str, way: str) -> Callable[[argparse.Namespace, Sizes, torch.device], Row]:
    """Return the part that measures one library in one of `WAYS`."""

    def run(options: argparse.Namespace, sizes: Sizes, device: torch.device) -> Row:
        torch.manual_seed(0)
        shape = (4 * sizes.batch, 3, sizes.size, sizes.size)
        images = torch.randint(256, shape, dtype=torch.uint8).to(device)
        with tempfile.TemporaryDirectory() as folder:
            peer = PEERS[name](images, sizes.batch, 0, Path(folder), options.toy, large=True)
            seconds = _ours(peer, way, sizes, device) if isinstance(peer, Ours) else _theirs(peer, way, sizes, device)
            parameters = sum(p.numel() for p in peer.network.parameters())
            return {
                "peer": name,
                "version": peer.version,
                "way": way,
                "parameters": parameters,
                "batch": sizes.batch,
                "images_per_second": sizes.steps * sizes.batch / seconds,
                "memory": round(peers.peak_memory(device)),
            }

    return run


class _Clock:
    """Records the time after the first steps, and after the last."""

    def __init__(self, sizes: Sizes, device: torch.device) -> None:
        self.ends, self.device, self.marks = (sizes.warm, sizes.warm + sizes.steps), device, []

    marks: list[float]

    def note(self, done: int) -> None:
        if done in self.ends:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            self.marks.append(time.perf_counter())

    @property
    def seconds(self) -> float:
        first, last = self.marks
        return last - first


def _ours(peer: Ours, way: str, sizes: Sizes, device: torch.device) -> float:
    """Return the seconds of the steps of a whole run of train.py, with EMA, clipping and logging."""
    from dpm_scales.training.module import DiffusionModule

    clock = _Clock(sizes, device)

    def note(module: Any, *_: Any) -> None:
        clock.note(module.trainer.global_step)

    peer.options += [*WAYS[way], "samples.num_images=0", "samples.curves=false"]
    with mock.patch.object(DiffusionModule, "on_train_batch_end", note):
        peer.run("run", sizes.warm + sizes.steps)
    return clock.seconds


def _theirs(peer: Peer, way: str, sizes: Sizes, device: torch.device) -> float:
    """Return the seconds of the steps of the peer's own loop."""
    clock = _Clock(sizes, device)

    def left() -> float:
        clock.note(peer.steps)
        return float(clock.ends[1] - peer.steps)

    with torch.autocast(device.type, torch.bfloat16, enabled=way == "bf16"):
        peer.train(left)
    return clock.seconds


def share(options: argparse.Namespace, sizes: Sizes, device: torch.device) -> Row:
    """Return the share of the forward process in training steps of the `small` network."""
    network = "tiny" if options.toy else "small"
    return {
        "rows": [
            step.measure(name, network, (batch, 3, sizes.size, sizes.size), sizes.turns, device) | {"batch": batch}
            for batch in sizes.shares
            for name in PROCESSES
        ]
    }


def sampling(options: argparse.Namespace, sizes: Sizes, device: torch.device) -> Row:
    """Return times of the steps of samplers, with the `small` network and that of the rates."""
    names = ("tiny",) if options.toy else ("small", "ddpm")
    ways = ("float32",) if options.toy else tuple(steps.WAYS)
    shape = (3, sizes.size, sizes.batch // 2, min(5, sizes.turns))
    rows = [
        {"network": network} | row
        for network in names
        for name in steps.PROCESSES
        for row in steps.measure(name, network, *shape, ways, device)
    ]
    return {"rows": rows}


def blurs(options: argparse.Namespace, sizes: Sizes, device: torch.device) -> Row:
    """Return times of `heat_blur`, and its rates as shares of the card's copies and products in float32.

    A blur reads and writes each pixel once, and multiplies by one matrix on each axis.

    Raises: UserError unless the ceilings were measured.
    """
    ceilings = _stored(options.out, "ceilings")
    require(ceilings is not None, "blur needs the card's own rates; run the part ceilings first")
    assert ceilings is not None
    rows = []
    for shape in sizes.blurs:
        row = blur.measure(shape, sizes.turns, device)
        seconds, pixels = row["milliseconds"]["heat_blur"] / 1e3, float(np.prod(shape))
        row["of_copy"] = 2 * 4 * pixels / seconds / 1e9 / ceilings["float32"]["copy"]
        row["of_matrix"] = 2 * pixels * (shape[2] + shape[3]) / seconds / 1e9 / ceilings["float32"]["matrix"]
        rows.append(row)
    return {"rows": rows}


def filters(options: argparse.Namespace, sizes: Sizes, device: torch.device) -> Row:
    """Return the seconds of the osmosis filter for the images of a folder. Raises UserError without one."""
    folder = options.bsds
    if options.toy:
        folder = options.out / "toy_images"
        folder.mkdir(exist_ok=True)
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 16, 3), np.uint8)).save(folder / "one.png")
    require(folder is not None and folder.is_dir(), f"osmosis needs a folder of images: --bsds DIR, got {folder}")
    given = argparse.Namespace(folder=folder, images=sizes.images, dark=False)
    return osmosis.whole_set(given, device)


def quality(name: str, seconds: float) -> Callable[[argparse.Namespace, Sizes, torch.device], Row]:
    """Return the part that runs one row of `benchmarks.peers` on CIFAR-10."""

    def run(options: argparse.Namespace, sizes: Sizes, device: torch.device) -> Row:
        out, budget = options.out / "quality", 0.001 if options.toy else seconds
        given = ["--out", str(out), "--device", options.device, "--peers", name, "--seconds", f"{budget:g}"]
        if options.toy:
            given += ["--set", "digits", "--number", "8", "--batch-size", "4", "--small"]
        else:
            require(
                options.cifar is not None, "quality needs CIFAR-10: --cifar DIR, or the .tar.xz file of such a folder"
            )
            given += ["--set", "cifar10", "--source", str(unpacked(options.cifar, options.out)), "--large"]
            given += ["--number", "2000", "--batch-size", str(sizes.batch)]
        peers.main(given)
        row = _read(out / name / f"{budget:g}" / "seed0.json")
        require(row is not None, f"{name}, {seconds:g} s: another process runs this row")
        assert row is not None
        return row

    return run


def fastest_peer(rows: Sequence[Row]) -> str | None:
    """Return the library other than ours with the most images/s; None without any."""
    others = [row for row in rows if row["peer"] != "dpm_scales"]
    return max(others, key=lambda row: row["images_per_second"])["peer"] if others else None


def installed(name: str) -> bool:
    """Return whether a library can be imported."""
    return name == "dpm_scales" or find_spec(PEERS[name].package.replace("-", "_")) is not None


def parts() -> dict[str, Part]:
    """Return all parts, the most important ones first."""
    ways = [("dpm_scales", way) for way in WAYS] + [(name, way) for way in ("bf16", "float32") for name in PEERS]
    chosen = [(name, way) for name, way in dict.fromkeys(ways) if installed(name)]
    rates = {f"rate {name} {way}": Part(150 if "compile" in way else 60, rate(name, way)) for name, way in chosen}
    others = {
        "share": Part(60, share),
        "sampling": Part(150, sampling),
        "blur": Part(60, blurs),
        "osmosis": Part(90, filters),
    }
    rows = {
        f"quality {name} {seconds}": Part(min(LONGEST, seconds + 240), quality(name, seconds), seconds + 60)
        for seconds in BUDGETS
        for name in PEERS
        if installed(name)
    }
    return {"ceilings": Part(60, card), **others, **rates, "sampling": Part(150, sampling), **rows}


def chosen_parts(names: Sequence[str], out: Path) -> list[str]:
    """Return names of parts, with those of ours and the fastest peer so far in place of "quality"."""
    fastest = fastest_peer([row for row in map(_read, sorted(out.glob("rate *.json"))) if row])
    rows = [f"quality {name} {seconds}" for seconds in BUDGETS for name in ("dpm_scales", fastest) if name is not None]
    return [one for name in names for one in (rows if name == "quality" else [name])]


# --- the command ------------------------------------------------------------------------------------------------------


def _read(path: Path) -> Row | None:
    found: Row | None = json.loads(path.read_text()) if path.is_file() else None
    return found


def _stored(out: Path, name: str) -> Row | None:
    return _read(out / f"{name}.json")


def run_part(name: str, options: argparse.Namespace) -> None:
    """Measure one part in this process and keep its result."""
    device = torch.device(options.device)
    found = parts()[name].run(options, TOY if options.toy else Sizes(), device)
    write_text(options.out / f"{name}.json", json.dumps(found | provenance(device), indent=1) + "\n")


def start_part(name: str, given: Sequence[str], seconds: float) -> str | None:
    """Measure one part in its own process group; return why it has no result, None if it has one."""
    command = [sys.executable, "-m", "benchmarks.speed_gpu", *given, "--part", name]
    found = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": found}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True, process_group=0) as process:
        try:
            _, errors = process.communicate(timeout=seconds)
        except BaseException as error:  # Ctrl-C does not reach a group of its own
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with the processes that the part has started
            if isinstance(error, subprocess.TimeoutExpired):
                return f"not finished in {seconds:.0f} s"
            raise
    lines = [line for line in errors.splitlines() if line.strip()]
    return None if process.returncode == 0 else (lines[-1] if lines else f"status {process.returncode}")


def run(options: argparse.Namespace, given: Sequence[str]) -> dict[str, str]:
    """Measure the chosen parts that have no result yet, until the time is up; return why others have none."""
    deadline = time.monotonic() + 60 * options.minutes
    missing: dict[str, str] = {}
    known = parts()
    for name in chosen_parts(options.parts, options.out):
        if _stored(options.out, name) is not None:
            continue
        left, part = deadline - time.monotonic(), known[name]
        if left < (LEAST if options.toy else part.least):
            missing[name] = "no time was left"
            continue
        why = start_part(name, given, min(left, part.limit))
        if why is not None:
            missing[name] = why
        print(f"{name}: {'measured' if why is None else why}", flush=True)
    return missing


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and write the tables."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    known = parts()
    usual = [name for name in known if not name.startswith("quality ")]
    parser = argparse.ArgumentParser(description="Measure speeds on a GPU.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--parts", nargs="+", choices=[*known, "quality"], default=usual, metavar="PART")
    parser.add_argument("--minutes", type=float, default=12, help="the time of this call")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--bsds", type=Path, metavar="DIR", help="folder with the images of BSDS500")
    parser.add_argument("--cifar", type=Path, metavar="DIR", help="folder of CIFAR-10, or its .tar.xz")
    parser.add_argument("--toy", action="store_true", help="the smallest sizes, to try the command")
    parser.add_argument("--part", choices=list(known), help=argparse.SUPPRESS)
    options = parser.parse_args(given)
    options.out = options.out.resolve()
    try:
        if options.part is not None:
            run_part(options.part, options)
            return
        require(options.device != "cuda" or torch.cuda.is_available(), "there is no GPU; --toy --device cpu tries this")
        options.out.mkdir(parents=True, exist_ok=True)
        missing = run(options, given)
        found = {name: row for name in known if (row := _stored(options.out, name)) is not None}
        absent = [name for name in PEERS if not installed(name)]
        write_text(options.out / "speed.json", json.dumps({"results": found, "missing": missing}, indent=1) + "\n")
        text = page(found, missing, absent)
        write_text(options.out / "speed.md", text)
        print(text)
    except UserError as error:
        parser.error(str(error))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the part's processes end too
    main()
