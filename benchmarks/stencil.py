"""Time the osmosis stencil's product: five passes, the same compiled by Inductor, and one pass by Triton.

Times a step of the Chebyshev recursion, `out += A u` with A = 2X, and the whole expansion at t = 10 px² for images of
the same size. The CPU has no Triton, only Inductor. Methods alternate; times are medians. GB/s counts the minimum
traffic of one pass: five weights (three tensors), `u` and `out` read, `out` written.

    python -m benchmarks.stencil                         # CPU
    python -m benchmarks.stencil --device cuda --out stencil.json
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.timing import seconds
from dpm_scales.operators import evolve, stencil
from dpm_scales.operators.stencil import FiveProducts, FusedProduct, white_stencil

SHAPES = ((250, 1, 8, 8), (64, 3, 32, 32), (32, 3, 64, 64), (1, 3, 321, 481), (16, 3, 256, 256), (8, 3, 1024, 1024))
"""Batches of digits, photo patches and whole photos, ``(B, C, H, W)``."""


def of_many(call: Callable[[], object], device: torch.device, least: float = 0.02) -> float:
    """Return the seconds of one call, averaged over at least `least` seconds of calls in a row."""
    calls = 1
    while (passed := seconds(call, device, calls)) * calls < least:
        calls *= 2
    return passed


def products(
    weights: tuple[Tensor, ...], u: Tensor, out: Tensor, width: int, compiled: bool
) -> dict[str, Callable[[], None]]:
    """Return the implementations of ``out += A u``."""
    five = FiveProducts(weights, u, out, width)
    ways: dict[str, Callable[[], None]] = {"five passes": five.add}
    if u.device.type == "cuda":
        ways["Triton"] = FusedProduct(weights, u, out, width).add
    if compiled:
        add = torch.compile(lambda weights, u, out: FiveProducts(weights, u, out, width).add(), fullgraph=True)
        ways["Inductor"] = lambda: add(weights, u, out)
    return ways


def measure(shape: tuple[int, int, int, int], dtype: torch.dtype, options: argparse.Namespace) -> dict[str, Any]:
    """Return the seconds of a step and of an expansion for each implementation."""
    device, (batch, channels, height, width) = torch.device(options.device), shape
    generator = torch.Generator().manual_seed(0)
    v = (torch.rand(shape, generator=generator) + 0.1).to(device, dtype)
    image = torch.rand(shape, generator=generator).to(device, dtype)
    a = white_stencil(v).affine(0.5, -2.0)
    weights = (a.diagonal, a.from_right, a.from_left, a.from_below, a.from_above)
    u, out = image.flatten(-2).contiguous(), torch.zeros(batch, channels, height * width, device=device, dtype=dtype)
    ways = products(weights, u, out, width, options.compiled)
    ends = {}
    for name, add in ways.items():
        out.zero_()
        add()
        ends[name] = out.clone()
    for name, end in ends.items():
        torch.testing.assert_close(end, ends["five passes"], msg=lambda m, n=name: f"{n}: {m}")  # type: ignore[misc]

    def expansion(fused: bool) -> Callable[[], object]:
        def run() -> object:
            with mock.patch.object(stencil, "_may_fuse", lambda u: fused):
                return evolve(image, v, [10.0])

        return run

    whole = {"five passes": expansion(False)} | ({"Triton": expansion(True)} if device.type == "cuda" else {})
    found: dict[str, dict[str, list[float]]] = {"step": {n: [] for n in ways}, "expansion": {n: [] for n in whole}}
    for _ in range(options.repeats):
        for part, calls in (("step", ways), ("expansion", whole)):
            for name, call in calls.items():
                found[part][name].append(of_many(call, device))
    result = {part: {n: statistics.median(s) for n, s in times.items()} for part, times in found.items()}
    moved = 6 * u.numel() * u.element_size()
    return {"shape": list(shape), "dtype": str(dtype).removeprefix("torch."), "bytes": moved, **result}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Time the osmosis stencil's product.")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of torch")
    parser.add_argument("--repeats", type=int, default=5, help="repetitions of each method")
    parser.add_argument("--no-compiled", dest="compiled", action="store_false", help="leave out Inductor")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="also write the results there")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    card = torch.cuda.get_device_name() if options.device.startswith("cuda") else "CPU"
    print(f"torch {torch.__version__}, {card}\n")
    rows = []
    print("| images | format | way | step, µs | GB/s | of five passes | expansion, ms | of five passes |")
    print("|---|---|---|---|---|---|---|---|")
    for dtype in (torch.float32, torch.float64):
        for shape in SHAPES:
            rows.append(row := measure(shape, dtype, options))
            for name, step in row["step"].items():
                whole = row["expansion"].get(name)
                by_five = (row["step"]["five passes"] / step, row["expansion"]["five passes"] / (whole or 1))
                cells = [" x ".join(map(str, shape)), row["dtype"], name, f"{1e6 * step:.1f}"]
                cells += [f"{row['bytes'] / step / 1e9:.0f}", f"{by_five[0]:.2f}"]
                cells += [f"{1e3 * whole:.2f}", f"{by_five[1]:.2f}"] if whole else ["", ""]
                print(f"| {' | '.join(cells)} |", flush=True)
    if options.out is not None:
        head = {"torch": torch.__version__, "card": card, "threads": options.threads}
        options.out.write_text(json.dumps(head | {"rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
