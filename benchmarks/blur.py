"""Time `heat_blur` against two public implementations of the heat equation with mirrored boundaries.

All three compute exp(-t omega^2) per DCT-II coefficient, omega = (pi k / H, pi l / W), with one time t per image:

    heat_blur   dpm_scales
    torch-dct   DCT by FFT, multiply, inverse DCT: the route of the published inverse heat dissipation code
    dctorch     DCT by matrix products, multiply, inverse DCT

The routes alternate, so that load on the machine affects all of them; times are medians, ratios are medians of the
ratios within a turn. The error is the maximum over pixels, relative to the largest pixel, against dense matrix
exponentials in float64.

    pip install torch-dct && pip install --no-deps dctorch
    python -m benchmarks.blur --out blur.json
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import seconds

Route = Callable[[Tensor, Tensor], Tensor]
"""Images (B, C, H, W) and dissipation times (B,) in px² to blurred images."""

SHAPES = ((128, 3, 32, 32), (64, 3, 64, 64), (16, 3, 128, 128), (8, 3, 256, 256), (2, 3, 512, 512))

TARGETS = {32: 12.0, 64: 5.0, 128: 3.0, 256: 2.5}
"""Side in px: target speed-up of `heat_blur` over the torch-dct route, on two CPU threads."""

BLUR_SIGMAS = (0.5, 20.0)
"""Range of the blur in px; an image's time is blur_sigma**2 / 2."""

TURN_SECONDS = 0.02
"""A turn repeats a route until it takes about this long: single calls are too short for the clock."""


def squared_frequencies(height: int, width: int, device: torch.device) -> Tensor:
    """Return omega^2 in 1/px² for each DCT coefficient: (H, W)."""
    rows = math.pi * torch.arange(height, device=device) / height
    columns = math.pi * torch.arange(width, device=device) / width
    return rows[:, None] ** 2 + columns**2


def make_routes(height: int, width: int, device: torch.device) -> dict[str, Route]:
    """Return the installed routes for images of one size, with everything precomputed that depends on the size only."""
    from dpm_scales.operators import heat_blur

    routes: dict[str, Route] = {"heat_blur": heat_blur}
    frequencies = squared_frequencies(height, width, device)

    def decay(times: Tensor) -> Tensor:
        return torch.exp(-frequencies * times[:, None, None, None])

    try:
        import torch_dct

        def by_fft(x: Tensor, times: Tensor) -> Tensor:
            return torch_dct.idct_2d(torch_dct.dct_2d(x, norm="ortho") * decay(times), norm="ortho")

        routes["torch-dct"] = by_fft
    except ImportError:
        pass
    try:
        from dctorch import functional as dctorch

        def by_matrices(x: Tensor, times: Tensor) -> Tensor:
            return dctorch.idct2(dctorch.dct2(x) * decay(times))

        routes["dctorch"] = by_matrices
    except ImportError:
        pass
    return routes


def dense_blur(x: Tensor, times: Tensor) -> Tensor:
    """Return exp(-t L) x in float64, with L the dense matrix of -Laplace on each axis."""

    def laplacian(size: int) -> Tensor:
        positions = torch.arange(size, dtype=torch.float64) + 0.5
        omega = math.pi * torch.arange(size, dtype=torch.float64) / size
        waves = torch.cos(omega[:, None] * positions) * math.sqrt(2 / size)
        waves[0] /= math.sqrt(2)
        return (waves.T * omega**2) @ waves

    rows, columns = laplacian(x.shape[-2]), laplacian(x.shape[-1])
    blurred = []
    for image, t in zip(x.double().cpu(), times.double().cpu(), strict=True):  # one at a time: 512 px is 2 MB a matrix
        blurred.append(torch.matrix_exp(-t * rows) @ image @ torch.matrix_exp(-t * columns))
    return torch.stack(blurred)


def random_times(number: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """Draw times (B,) of blurs that are log-uniform in `BLUR_SIGMAS`."""
    low, high = (math.log(sigma) for sigma in BLUR_SIGMAS)
    sigmas = torch.exp(low + (high - low) * torch.rand(number, generator=generator))
    return (sigmas**2 / 2).to(device)


@torch.no_grad()
def measure(shape: tuple[int, int, int, int], repeats: int, device: torch.device) -> dict[str, Any]:
    """Return medians in ms, ratios to `heat_blur` and errors of all routes for images of `shape` (B, C, H, W)."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(shape, generator=generator).to(device)
    routes = make_routes(shape[-2], shape[-1], device)

    times = random_times(shape[0], generator, device)
    exact = dense_blur(x, times)
    errors = {name: float((route(x, times).double().cpu() - exact).abs().max()) for name, route in routes.items()}
    errors = {name: error / float(x.abs().max()) for name, error in errors.items()}

    calls = {}
    for name, route in routes.items():
        call = partial(route, x, times)
        seconds(call, device, 2)
        calls[name] = max(1, round(TURN_SECONDS / seconds(call, device, 3)))

    passed: dict[str, list[float]] = {name: [] for name in routes}
    names = list(routes)
    for turn in range(repeats):
        times = random_times(shape[0], generator, device)  # new ones, to defeat caching
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            passed[name].append(seconds(partial(routes[name], x, times), device, calls[name]))

    ours = passed["heat_blur"]
    return {
        "shape": list(shape),
        "milliseconds": {name: 1e3 * statistics.median(values) for name, values in passed.items()},
        "ratios": {
            name: statistics.median(theirs / own for theirs, own in zip(values, ours, strict=True))
            for name, values in passed.items()
            if name != "heat_blur"
        },
        "errors": errors,
    }


def markdown_table(results: Sequence[dict[str, Any]]) -> str:
    """Return a table with one row per shape: times in ms, ratios with the target, errors."""
    names = list(results[0]["milliseconds"])
    peers = names[1:]
    header = ["(B, C, H, W)", *(f"{name} ms" for name in names)]
    header += [f"{name} / heat_blur" for name in peers] + ["target"] + [f"error {name}" for name in names]
    rows = [header, ["---"] * len(header)]
    for result in results:
        target = TARGETS.get(result["shape"][-1])
        rows.append(
            [
                str(tuple(result["shape"])),
                *(f"{result['milliseconds'][name]:.2f}" for name in names),
                *(f"{result['ratios'][name]:.1f}" for name in peers),
                "" if target is None else f"{target:g}",
                *(f"{result['errors'][name]:.1e}" for name in names),
            ]
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print a table, and optionally save the results."""
    parser = argparse.ArgumentParser(description="Time heat_blur beside torch-dct and dctorch.")
    parser.add_argument("--repeats", type=int, default=31, help="turns of each route")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of torch")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="also write the results there")
    options = parser.parse_args(arguments)
    if options.repeats < 1 or options.threads < 1:
        parser.error("--repeats and --threads are numbers >= 1")

    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    results = [measure(shape, options.repeats, device) for shape in SHAPES]
    print(f"torch {torch.__version__}, {device}, {options.threads} threads, {options.repeats} turns\n")
    print(markdown_table(results))
    if options.out is not None:
        figures = {"torch": torch.__version__, "device": str(device), "threads": options.threads, "results": results}
        options.out.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
