"""Compare training and sampling with other libraries: quality after a budget of seconds from a cold start.

    python -m benchmarks.peers --out runs/peers --seconds 60 180                      # all libraries, MNIST, one thread
    python -m benchmarks.peers --out runs/peers --seconds 600 --peers dpm_scales lucidrains
    python -m benchmarks.peers --out runs/peers --seconds 60 --device cuda
    python -m benchmarks.peers --out runs/peers --tables --csv docs/results/peers.csv --page docs/speed.md

Each row is one process with one thread: imports, building and compiling count, as does all that a library does in
training. On the CPU, seconds are CPU time (`time.process_time`), which load on the machine does not change much; on a
GPU, wall-clock time since the process began. After the budget, the process draws `--number` samples by the library's
own sampler; their Fréchet distance to the training images is measured in a digit classifier. All train on the same
images, in batches of the same size, with networks of about equal size; `benchmarks.peer_models` has their settings.

Whatever is finished is kept: OUT/PEER/SECONDS/seedN.json. The same command resumes, and several at once share the rows.
The machine's own ceilings are measured once, OUT/ceilings.json: the rate of a matrix product, that of the convolutions
of our network in a training step, and the rate of a copy.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.image_sets import IMAGE_SETS, ImageSet
from benchmarks.peer_base import Peer
from benchmarks.peer_models import PEERS
from benchmarks.peer_tables import write_page
from benchmarks.rows import claimed, run_process
from benchmarks.spectral import measured, provenance
from dpm_scales.errors import UserError, require
from dpm_scales.storage import atomic_write, write_text

STARTED = "DPM_SCALES_BENCHMARK_STARTED"
"""Environment variable with the time at which a row's process was started."""


def since_start(device: torch.device) -> float:
    """Return the seconds since this process began: CPU time for one thread on a CPU, else wall-clock time."""
    if device.type == "cpu" and torch.get_num_threads() == 1:
        return time.process_time()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.time() - float(os.environ.get(STARTED, time.time()))


def peak_memory(device: torch.device) -> float:
    """Return the peak memory of this process so far, in MiB: on the GPU, or its resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def multiply_adds(network: nn.Module, inputs: tuple[Any, ...]) -> float:
    """Return the millions of multiply-adds of one evaluation for one image."""
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        network(*inputs)
    return counter.get_total_flops() / 2e6


def train_row(peer_class: type[Peer], settings: dict[str, Any], out: Path) -> dict[str, Any]:
    """Train and sample in this process, from whose start the budget counts; write OUT_0.pt, …, and return the row.

    Args:
        peer_class: the library.
        settings: `images`, a file of uint8 (N, C, H, W); `seconds`, `batch_size`, `seed`, `number`, `device`, `small`,
            `large`.
        out: file of the samples, without suffix.
    """
    device = torch.device(settings["device"])
    images = torch.from_numpy(np.load(settings["images"])).to(device)
    with tempfile.TemporaryDirectory() as folder:
        sizes = {"small": settings["small"], "large": settings["large"]}
        peer = peer_class(images, settings["batch_size"], settings["seed"], Path(folder), **sizes)
        built = since_start(device)
        peer.train(lambda: float(settings["seconds"] - since_start(device)))
        trained = since_start(device)
        memory = peak_memory(device)
        samples: list[dict[str, Any]] = []
        for name, draw in peer.samplers().items():
            with measured(device) as spent:
                drawn = draw(settings["number"])
            path = out.with_name(f"{out.name}_{len(samples)}.pt")
            torch.save(drawn, path)
            samples.append({"sampler": name, "seconds": round(spent(), 2), "file": path.name})
        network = peer.network.eval()
        return {
            "version": peer.version,
            "parameters": sum(p.numel() for p in network.parameters()),
            "multiply_adds": round(multiply_adds(network, peer.inputs()), 2),
            "steps": peer.steps,
            "images": peer.steps * settings["batch_size"],
            "start": round(built, 2),
            "spent": round(trained, 2),
            "memory": round(memory),
            "samples": samples,
        }


def run_row(
    images: ImageSet, peer: str, seconds: float, seed: int, options: argparse.Namespace, device: torch.device
) -> None:
    """Run one row in a process of its own, judge its samples, and write its file.

    Raises: UserError if the process fails.
    """
    folder = options.out / peer / f"{seconds:g}"
    path = folder / f"seed{seed}.json"
    settings = {
        "images": str(training_images(images, options.out)),
        "seconds": seconds,
        "batch_size": options.batch_size,
        "seed": seed,
        "number": options.number,
        "device": options.device,
        "small": options.small,
        "large": options.large,
    }
    work = folder / f"seed{seed}"
    command = [sys.executable, "-m", "benchmarks.peers", "--row", peer, json.dumps(settings), str(work)]
    threads = {} if options.threads is None else dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), options.threads)
    environment = {**os.environ, **threads, STARTED: str(time.time())}
    status = _start(command, environment)
    require(status == 0, f"{peer}, {seconds:g} s, seed {seed}: its process ended with status {status}")
    result_file = work.with_suffix(".row")
    result = json.loads(result_file.read_text())
    head = {"peer": peer, "budget": seconds, "seed": seed, "set": images.name, "figure": images.quality}
    head |= {"batch": options.batch_size, "number": options.number, **provenance(device), "torch": torch.__version__}
    for entry in result["samples"]:
        file = folder / entry.pop("file")
        entry |= {name: round(v, 4) for name, v in images.report(torch.load(file).numpy()).items()}
        file.unlink()
    write_text(path, json.dumps(head | result, indent=2) + "\n")
    result_file.unlink()
    print(f"{peer}, {seconds:g} s, seed {seed}: {result['steps']} steps, {result['samples']}", flush=True)


def _start(command: Sequence[str], environment: dict[str, str]) -> int:
    """Run a row's process; return its exit status."""
    root = Path(__file__).resolve().parents[1]
    return run_process(command, cwd=root, env=environment)


def training_images(images: ImageSet, out: Path) -> Path:
    """Return the file of the set's training images, uint8 (N, C, H, W); made if missing."""
    path = out / f"{images.name}_train.npy"
    if not path.is_file():
        with atomic_write(path) as file:
            np.save(file, images.training_images())
    return path


# --- ceilings ---------------------------------------------------------------------------------------------------------


def ceilings(
    batch_size: int,
    device: torch.device,
    size: int = 32,
    turns: int = 7,
    side: int = 1024,
    network_name: str = "small",
    half: bool = False,
) -> dict[str, float]:
    """Return the rates that this machine reaches by itself: GFLOP/s of products and convolutions, GB/s of copies.

    `convolution` is that of all convolutions of the network in forward and backward passes of a training step, each
    alone, in channels_last; `share` is their part of the seconds of a whole step.

    Args:
        size: side of the images in px.
        side: side of the matrices.
        half: whether products and convolutions are in bfloat16, as autocast computes them.
    """
    with torch.autocast(device.type, torch.bfloat16, enabled=half):
        return _ceilings(batch_size, device, size, turns, side, network_name)


def _ceilings(
    batch_size: int, device: torch.device, size: int, turns: int, side: int, network_name: str
) -> dict[str, float]:
    from benchmarks.step import build

    a, b = torch.randn(2, side, side, device=device)
    if torch.is_autocast_enabled(device.type):
        a, b = a.bfloat16(), b.bfloat16()
    big = torch.empty(2**25, device=device)
    other = torch.empty_like(big)
    denoiser = build("vp", network_name, 1).to(device)
    network = denoiser.network.to(memory_format=torch.channels_last)
    calls: list[tuple[nn.Conv2d, Tensor]] = []

    def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(module, nn.Conv2d)
        calls.append((module, inputs[0].detach().clone()))

    hooks = [m.register_forward_pre_hook(note) for m in network.modules() if isinstance(m, nn.Conv2d)]
    x = torch.randn(batch_size, 1, size, size, device=device).contiguous(memory_format=torch.channels_last)
    t = torch.rand(batch_size, device=device)
    network(x, t)
    for hook in hooks:
        hook.remove()
    counter = FlopCounterMode(display=False)
    with counter:
        _convolve(calls)

    def step() -> None:
        network(x, t).square().mean().backward()

    times: dict[str, list[float]] = {}
    work = {
        "matrix": lambda: a @ b,
        "copy": lambda: other.copy_(big),
        "convolution": lambda: _convolve(calls),
        "step": step,
    }
    for turn in range(turns + 1):
        for name, run in work.items():
            with measured(device) as spent:
                run()
            if turn:
                times.setdefault(name, []).append(spent())
    seconds = {name: statistics.median(values) for name, values in times.items()}
    return {
        "matrix": 2 * side**3 / seconds["matrix"] / 1e9,
        "convolution": counter.get_total_flops() / seconds["convolution"] / 1e9,
        "copy": 2 * big.numel() * 4 / seconds["copy"] / 1e9,
        "share": seconds["convolution"] / seconds["step"],
    }


def _convolve(calls: Sequence[tuple[nn.Conv2d, Tensor]]) -> None:
    """Run each convolution forward and backward."""
    for module, x in calls:
        out = module(x.requires_grad_(True))
        out.backward(torch.ones_like(out))


# --- all rows ---------------------------------------------------------------------------------------------------------


def run(options: argparse.Namespace) -> list[str]:
    """Run the rows that are neither finished nor held by another process; return a line for each that failed."""
    device = torch.device(options.device)
    options.out.mkdir(parents=True, exist_ok=True)
    images = IMAGE_SETS[options.set](options.out, options.source)
    machine = options.out / "ceilings.json"
    if not machine.is_file():
        found = {key: round(value, 3) for key, value in ceilings(options.batch_size, device).items()}
        write_text(machine, json.dumps(found | {"batch": options.batch_size} | provenance(device), indent=2) + "\n")
    failures = []
    for seconds in options.seconds:
        for seed in options.seeds:
            for peer in options.peers:
                path = options.out / peer / f"{seconds:g}" / f"seed{seed}.json"
                with claimed(path.with_suffix(".lock")) as is_held:
                    try:
                        if is_held and not path.is_file():
                            run_row(images, peer, seconds, seed, options, device)
                    except UserError as error:
                        failures.append(str(error))
                        print(error, file=sys.stderr, flush=True)
    real = {"set": images.name, "number": options.number, **images.real(options.number)}
    write_text(options.out / "real.json", json.dumps(real) + "\n")
    return failures


def main(arguments: Sequence[str] | None = None) -> None:
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["--row"]:
        _, peer, settings, out = given
        row = train_row(PEERS[peer], json.loads(settings), Path(out))
        write_text(Path(out).with_suffix(".row"), json.dumps(row))
        return
    parser = argparse.ArgumentParser(description="Compare with other libraries.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--set", choices=sorted(IMAGE_SETS), default="mnist")
    parser.add_argument("--source", type=Path, metavar="DIR", help="folder of the images, where the set can be given")
    parser.add_argument("--peers", nargs="+", choices=list(PEERS), default=list(PEERS))
    parser.add_argument("--seconds", nargs="+", type=float, default=[60, 180], help="budgets from a cold start")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--number", type=int, default=200, help="samples of each row")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", default="1", help="of the processes on the CPU")
    parser.add_argument("--small", action="store_true", help="smallest networks and few steps, to try the command")
    parser.add_argument("--large", action="store_true", help="networks of about 35 M parameters, for a GPU")
    parser.add_argument("--tables", action="store_true", help="only write the table")
    parser.add_argument("--csv", type=Path, help="file of all rows, which grows; OUT/peers.csv unless given")
    parser.add_argument("--page", type=Path, metavar="FILE.md", help="page whose table is rewritten")
    options = parser.parse_args(given)
    options.out = options.out.resolve()
    torch.set_num_threads(int(options.threads))
    try:
        require(all(seconds > 0 for seconds in options.seconds), "--seconds: give budgets above 0")
        failures = [] if options.tables else run(options)
        failed = f"{len(failures)} rows failed: {'; '.join(failures)}"
        require(any(options.out.glob("*/*/seed*.json")), failed if failures else f"{options.out}: no finished rows")
        write_page(options.out, options.csv or options.out / "peers.csv", options.page)
        require(not failures, failed)
    except UserError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
