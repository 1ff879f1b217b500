"""Measure the steps of samplers: their time with and without the network, and the kernels that they launch beside it.

    python -m benchmarks.sampling --out sampling.json                            # network=small, 32 px, one thread
    python -m benchmarks.sampling --device cuda --network ddpm --batch 256 --ways float32 bf16 bf16+compile

A step is the difference of two runs of unlike length over the difference of their steps, so that the start and the end
of a run do not count; both take turns, and times are medians. Without the network means with one that returns its
input. Kernels are counted as calls of torch that compute, in place of views; on a GPU each is a kernel at least.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import dpm_scales as ds
from benchmarks.step import build
from benchmarks.timing import seconds
from dpm_scales.models.generate import computed, draw
from dpm_scales.models.model import Model
from dpm_scales.samplers import DPMSolver
from dpm_scales.storage import write_text

PROCESSES = ("vp", "power_law", "blurring")
WAYS: dict[str, tuple[str, bool]] = {
    "float32": ("32-true", False),
    "bf16": ("bf16-mixed", False),
    "bf16+compile": ("bf16-mixed", True),
}
"""Precision of the network, and whether it is compiled, on CUDA as a graph."""
SOLVERS = {"DPM-Solver++(2M)": 0.0, "its SDE": 1.0}
LENGTHS = (4, 14)
"""Steps of the two runs."""


class Through(nn.Module):
    """A network that returns the image that it is given."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.weight = nn.Parameter(torch.zeros(()))  # models need some

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        return x[:, : self.channels]


class Kernels(TorchDispatchMode):
    """Count calls that compute."""

    number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += not func.is_view
        return func(*args, **(kwargs or {}))


def sample(model: Model, eta: float, steps: int, batch: int, device: torch.device) -> None:
    """Draw a batch in a number of steps."""
    grid = "logsnr" if model.denoiser.process.is_scalar else "uniform"
    chosen = model.replaced(sampler=DPMSolver(eta, steps, grid))
    for _ in draw(chosen, batch, 0, batch, device=device):
        pass


def step_seconds(model: Model, eta: float, batch: int, turns: int, device: torch.device) -> float:
    """Return the median seconds of a step."""
    few, many = LENGTHS
    times = []
    for turn in range(turns + 1):
        both = [seconds(lambda steps=steps: sample(model, eta, steps, batch, device), device) for steps in LENGTHS]
        if turn:  # the first one allocates, and compiles
            times.append((both[1] - both[0]) / (many - few))
    return statistics.median(times)


def kernels(model: Model, eta: float, device: torch.device) -> float:
    """Return the kernels that a step launches; constants are kept, as without the mode that counts."""
    found = []
    with mock.patch("dpm_scales.operators.constants._get_current_dispatch_mode", lambda: None):
        for steps in LENGTHS:
            sample(model, eta, steps, 2, device)
            with Kernels() as counted:
                sample(model, eta, steps, 2, device)
            found.append(counted.number)
    return (found[1] - found[0]) / (LENGTHS[1] - LENGTHS[0])


def measure(
    name: str, network: str, channels: int, size: int, batch: int, turns: int, ways: Sequence[str], device: torch.device
) -> list[dict[str, Any]]:
    """Return a row for each solver and way: ms of a step, ms without the network, and kernels beside it."""
    built = build(name, network, channels)
    whole, bare = (
        ds.Model(net, built.process, image_size=size, channels=channels) for net in (built.network, Through(channels))
    )
    whole.denoiser.network.to(memory_format=torch.channels_last)
    rows = []
    for solver, eta in SOLVERS.items():
        beside = step_seconds(bare.to(device), eta, batch, turns, device)
        launched = kernels(bare, eta, device)
        for way in ways:
            precision, compiled = WAYS[way]
            with computed(whole.to(device), precision, compiled):
                full = step_seconds(whole, eta, batch, turns, device)
            row = {"process": name, "sampler": solver, "way": way, "batch": batch, "kernels": launched}
            rows.append(row | {"step_ms": 1e3 * full, "beside_ms": 1e3 * beside, "share": beside / full})
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print a table, and optionally save the rows."""
    parser = argparse.ArgumentParser(description="Steps of samplers, with and without the network.")
    parser.add_argument("--processes", nargs="+", default=PROCESSES)
    parser.add_argument("--network", default="small")
    parser.add_argument("--size", type=int, default=32, help="side of the images in px")
    parser.add_argument("--channels", type=int, default=3)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=["float32"])
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="also write the rows there")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    print("| process | sampler | network | step ms | without the network ms | share | kernels |")
    print("|---|---|---|---|---|---|---|")
    rows = []
    shape = (options.channels, options.size, options.batch)
    for name in options.processes:
        for row in measure(name, options.network, *shape, options.turns, options.ways, torch.device(options.device)):
            rows.append(row)
            print(
                f"| {row['process']} | {row['sampler']} | {row['way']} | {row['step_ms']:.2f} "
                f"| {row['beside_ms']:.2f} | {row['share']:.1%} | {row['kernels']:.0f} |",
                flush=True,
            )
    if options.out is not None:
        write_text(options.out, json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
