"""Time the osmosis filter at the published times, for Chebyshev expansion and implicit Euler.

    u(t) for t = 1, 5, 10, 100, 1000, 10000 px², a colour image of 481 x 321, v = mean + 0.1 N(0, 1) in [1e-6, 1]

    chebyshev   dpm_scales, all times in one sweep
    bicgstab    dpm_scales, implicit Euler with BiCGSTAB, the published scheme, from u(0) to each time separately
    ... on      the same from each time to the next
    cg ... on   the same systems by conjugate gradients in whitened coordinates
    LU ... on   the same systems by scipy.sparse.linalg.splu
    expm        scipy.sparse.linalg.expm_multiply, up to the time that --expm-limit allows

The number of implicit Euler steps is doubled until the root mean square error at each time is at most --rms (values in
[0, 1]); only the final steps are timed, not the search. Errors are relative to the expansion in float64 with tol =
1e-12. The methods alternate, so that load on the machine affects all of them; times are medians. `--dark` sets a tenth
of the guidance image to 1e-6.

    python -m benchmarks.osmosis --out osmosis.json
    python -m benchmarks.osmosis --dark --out osmosis_dark.json
    python -m benchmarks.osmosis --scaling osmosis.png --out scaling.json       cost against t and against pixels
    python -m benchmarks.osmosis --folder DIR --out set.json                    a whole folder, one image at a time
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.timing import timed
from dpm_scales import plots
from dpm_scales.errors import UserError
from dpm_scales.operators import OsmosisOperator, evolve, implicit_euler

TIMES = (1.0, 5.0, 10.0, 100.0, 1000.0, 10000.0)
"""The published evolution times in px²."""

SIZE = (321, 481)

TARGET = 20.0
"""Target speed-up of the expansion over bicgstab, for all times together."""

SCALING_TIMES = tuple(10.0**k for k in range(6))
SCALING_SIDES = (64, 128, 256, 512, 1024)

Method = Callable[[], Tensor]
"""Function that runs a method once and returns the images at all times, ``(T, 1, C, H, W)``."""


def bundled_image(height: int = SIZE[0], width: int = SIZE[1]) -> Tensor:
    """Return a colour photograph of scikit-image, mirrored to size: float32 in [0, 1], ``(1, 3, height, width)``."""
    import skimage.data

    image = torch.from_numpy(skimage.data.coffee().copy()).permute(2, 0, 1)[None].float() / 255
    rows, columns = (-(-size // side) for size, side in ((height, image.shape[2]), (width, image.shape[3])))
    tiled = torch.cat([image.flip(2) if k % 2 else image for k in range(rows)], 2)
    return torch.cat([tiled.flip(3) if k % 2 else tiled for k in range(columns)], 3)[..., :height, :width].contiguous()


def guidance_image(image: Tensor, generator: torch.Generator, dark: bool = False) -> Tensor:
    """Draw noise around the mean grey values, clipped to [1e-6, 1] (Sect. 6.2, Peter 2024)."""
    noise = torch.randn(image.shape, generator=generator).to(image.device)
    v = (image.mean((-2, -1), keepdim=True) + 0.1 * noise).clamp(1e-6, 1)
    if dark:
        v[(torch.rand(image.shape, generator=generator) < 0.1).to(image.device)] = 1e-6
    return v


def rms(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).square().mean().sqrt())


# --- the methods ------------------------------------------------------------------------------------------------------


def find_steps(u: Tensor, v: Tensor, exact: Tensor, wanted: float, tol: float, onwards: bool) -> list[int]:
    """Return the steps that bicgstab needs for the required error at each time, from 0 or from the previous time."""
    stencil, x, before, found = OsmosisOperator(v).stencil(u.dtype), u, 0.0, []
    for t, truth in zip(TIMES, exact, strict=True):
        steps, end = 1, None
        while end is None or rms(end, truth) > wanted:
            try:
                end = implicit_euler(stencil, x, [t - before], steps, tol=tol).images[0]
            except UserError:  # the solver fails for such a large step
                end = None
            steps *= 2
        found.append(steps // 2)
        if onwards:
            x, before = end, t
    return found


def sparse_matrix(v: Tensor) -> Any:
    """Return P of one guidance image ``(H, W)`` as a scipy matrix in float64."""
    import scipy.sparse

    grey = v.double().cpu().numpy()
    index, flat = np.arange(grey.size).reshape(grey.shape), grey.ravel()
    i = np.concatenate([index[:, :-1].ravel(), index[:-1].ravel()])
    j = np.concatenate([index[:, 1:].ravel(), index[1:].ravel()])
    into_i, into_j = 2 * flat[i] / (flat[i] + flat[j]), 2 * flat[j] / (flat[i] + flat[j])
    entries = np.concatenate([into_i, -into_i, into_j, -into_j])
    place = (np.concatenate([i, j, j, i]), np.concatenate([j, j, i, i]))
    return scipy.sparse.csc_matrix((entries, place), shape=(grey.size, grey.size))


def sparse_lu(u: Tensor, v: Tensor, steps: Sequence[int]) -> Tensor:
    """Run implicit Euler with one factorisation per interval and channel."""
    import scipy.sparse
    import scipy.sparse.linalg

    images = np.empty((len(TIMES), *u.shape))
    for c in range(u.shape[1]):
        matrix, x, before = sparse_matrix(v[0, c]), u[0, c].double().cpu().numpy().ravel(), 0.0
        for k, (t, number) in enumerate(zip(TIMES, steps, strict=True)):
            system = scipy.sparse.identity(x.size, format="csc") - (t - before) / number * matrix
            factors = scipy.sparse.linalg.splu(system)
            for _ in range(number):
                x = factors.solve(x)
            images[k, 0, c], before = x.reshape(u.shape[2:]), t
    return torch.from_numpy(images)


def expm(u: Tensor, v: Tensor, times: Sequence[float]) -> Tensor:
    """Apply the matrix exponential (Al-Mohy & Higham 2011) from each time to the next."""
    from scipy.sparse.linalg import expm_multiply

    images = np.empty((len(times), *u.shape))
    for c in range(u.shape[1]):
        matrix, x, before = sparse_matrix(v[0, c]), u[0, c].double().cpu().numpy().ravel(), 0.0
        for k, t in enumerate(times):
            x = expm_multiply((t - before) * matrix, x, traceA=(t - before) * matrix.diagonal().sum())
            images[k, 0, c], before = x.reshape(u.shape[2:]), t
    return torch.from_numpy(images)


# --- the table --------------------------------------------------------------------------------------------------------


def compare(u: Tensor, v: Tensor, options: argparse.Namespace) -> dict[str, Any]:
    """Return seconds and errors of every method for all times together."""
    exact, tol = evolve(u.double(), v.double(), TIMES, tol=1e-12), options.solver_tol
    alone = find_steps(u, v, exact, options.rms, tol, onwards=False)
    onwards = find_steps(u, v, exact, options.rms, tol, onwards=True)

    def one_by_one() -> Tensor:
        return torch.cat([evolve(u, v, [t], "bicgstab", tol, n) for t, n in zip(TIMES, alone, strict=True)])

    methods: dict[str, Method] = {
        "chebyshev": lambda: evolve(u, v, TIMES),
        "bicgstab": one_by_one,
        "bicgstab, on": lambda: evolve(u, v, TIMES, "bicgstab", tol, onwards),
        "cg, on": lambda: evolve(u, v, TIMES, "cg", tol, onwards),
        "chebyshev, float64": lambda: evolve(u.double(), v.double(), TIMES),
    }
    once: dict[str, Method] = {}
    if not options.skip_scipy:
        once["LU, on"] = lambda: sparse_lu(u, v, onwards)
        short = [t for t in TIMES if t <= options.expm_limit]
        once[f"expm, t <= {options.expm_limit:g}"] = lambda: expm(u, v, short)

    seconds: dict[str, list[float]] = {name: [] for name in (*methods, *once)}
    errors: dict[str, dict[str, list[float]]] = {}
    for turn in range(options.repeats):
        for name, run in (methods if turn else methods | once).items():
            passed, result = timed(run, u.device)
            seconds[name].append(passed)
            pairs = list(zip(result, exact, strict=False))
            errors[name] = {
                "rms": [rms(a, b) for a, b in pairs],
                "max": [float((a.to(b) - b).abs().max()) for a, b in pairs],
            }

    def ratio(name: str) -> float:
        turns = zip(seconds["chebyshev"], seconds[name], strict=True)
        return statistics.median(theirs / own for own, theirs in turns)

    return {
        "size": list(u.shape),
        "times": list(TIMES),
        "steps": {"bicgstab": alone, "on": onwards},
        "solver_tol": tol,
        "seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "all_seconds": seconds,
        "ratios": {name: ratio(name) for name in ("bicgstab", "bicgstab, on")},
        "target": TARGET,
        "errors": errors,
    }


def comparison_table(result: dict[str, Any]) -> str:
    """Return a table row per method: seconds, ratio to the expansion, rms error at each time, maximum error."""
    header = ["method", "s", "/ chebyshev", *(f"rms t={t:g}" for t in result["times"]), "max"]
    rows = [header, ["---"] * len(header)]
    for name, seconds in result["seconds"].items():
        errors = result["errors"][name]
        values = [f"{error:.1e}" for error in errors["rms"]]
        values += [""] * (len(result["times"]) - len(values))
        ratio = seconds / result["seconds"]["chebyshev"]
        rows.append([name, f"{seconds:.2f}", f"{ratio:.1f}", *values, f"{max(errors['max']):.1e}"])
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    steps = "; ".join(f"{name}: {numbers}" for name, numbers in result["steps"].items())
    ratios = ", ".join(f"{name} {value:.1f}" for name, value in result["ratios"].items())
    return (
        f"{table}\n\nsteps of implicit Euler, {steps}; relative residual {result['solver_tol']:g}\n"
        f"median within a turn, over chebyshev: {ratios} (meant to be {result['target']:g})"
    )


# --- cost against time and size ---------------------------------------------------------------------------------------


def scaling(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Return seconds of the expansion against the largest time and the number of pixels, with log-log slopes."""

    def seconds(height: int, width: int, t: float) -> float:
        u = bundled_image(height, width).to(device)
        v = guidance_image(u, torch.Generator().manual_seed(0), options.dark)
        evolve(u, v, [0.1])
        return min(timed(lambda: evolve(u, v, [t]), device)[0] for _ in range(options.repeats))

    against_time = [seconds(*SIZE, t) for t in SCALING_TIMES]
    against_pixels = [seconds(side, side, 100.0) for side in SCALING_SIDES]
    pixels = [side**2 for side in SCALING_SIDES]
    return {
        "time": {
            "t": list(SCALING_TIMES),
            "seconds": against_time,
            "slope": slope(SCALING_TIMES[2:], against_time[2:]),
        },
        "pixels": {"pixels": pixels, "seconds": against_pixels, "slope": slope(pixels[1:], against_pixels[1:])},
    }


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Return the slope of the line through the logarithms; the caller omits the shortest runs, which are all setup."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def plot(result: dict[str, Any], path: Path) -> None:
    """Plot two panels with logarithmic axes."""
    with plots.figure(path, 8, 3.2, ncols=2) as (_, axes):
        for axis, name, x, label in (
            (axes[0], "time", "t", "t in px², 481 x 321 colour image"),
            (axes[1], "pixels", "pixels", "pixels, 3 channels, t = 100 px²"),
        ):
            part = result[name]
            axis.loglog(part[x], part["seconds"], "o-", color=plots.COLOURS[0], label=f"slope {part['slope']:.2f}")
            axis.set(xlabel=label, ylabel="seconds")
            axis.legend()


# --- a whole folder ---------------------------------------------------------------------------------------------------


def whole_set(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Filter every image of a folder at all times, one by one; return the variance at each time."""
    from PIL import Image

    names = sorted(p for p in options.folder.rglob("*") if p.suffix.lower() in {".jpg", ".jpeg", ".png"})
    names = names[: options.images]
    if not names:
        raise SystemExit(f"no .jpg or .png in {options.folder}")
    generator, variances, evolving = torch.Generator().manual_seed(0), torch.zeros(len(TIMES)).double(), 0.0
    start = time.perf_counter()
    for name in names:
        with Image.open(name) as file:
            pixels = np.asarray(file.convert("RGB"))
        u = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].to(device).float() / 255
        v = guidance_image(u, generator, options.dark)
        passed, path = timed(lambda u=u, v=v: evolve(u, v, TIMES), device)  # type: ignore[misc]
        evolving += passed
        variances += path.double().var((-2, -1)).mean((-2, -1)).cpu()
    total = time.perf_counter() - start
    return {
        "images": len(names),
        "seconds": total,
        "evolve_seconds": evolving,
        "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "times": list(TIMES),
        "mean_variance": (variances / len(names)).tolist(),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and optionally save the results."""
    parser = argparse.ArgumentParser(description="Time the osmosis filter: Chebyshev expansion and implicit Euler.")
    parser.add_argument("--repeats", type=int, default=3, help="turns of each method")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of torch")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dark", action="store_true", help="set a tenth of the guidance image to 1e-6")
    parser.add_argument("--rms", type=float, default=2e-3, help="error that implicit Euler is allowed at each time")
    parser.add_argument("--solver-tol", type=float, default=1e-6, help="relative residual of bicgstab and cg")
    parser.add_argument("--expm-limit", type=float, default=100.0, help="largest time for expm_multiply")
    parser.add_argument("--skip-scipy", action="store_true", help="leave out the methods of scipy")
    parser.add_argument("--scaling", type=Path, metavar="FILE.png", help="cost against t and pixels instead, plotted")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="all images below a folder instead")
    parser.add_argument("--images", type=int, metavar="N", help="at most N images of the folder")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="also write the results there")
    options = parser.parse_args(arguments)
    if options.repeats < 1 or options.threads < 1:
        parser.error("--repeats and --threads are numbers >= 1")

    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    head = {"torch": torch.__version__, "device": str(device), "threads": options.threads, "dark": options.dark}
    print(", ".join(f"{name} {value}" for name, value in head.items()) + "\n")
    if options.folder is not None:
        result = whole_set(options, device)
        print(
            f"{result['images']} images x 3 channels x {len(TIMES)} times: {result['seconds']:.1f} s "
            f"({result['evolve_seconds']:.1f} s without files), peak memory {result['peak_memory_mb']:.0f} MB"
        )
    elif options.scaling is not None:
        result = scaling(options, device)
        plot(result, options.scaling)
        for name, x in (("time", "t"), ("pixels", "pixels")):
            pairs = zip(result[name][x], result[name]["seconds"], strict=True)
            print(f"{name}: slope {result[name]['slope']:.2f};", ", ".join(f"{a:g}: {b:.3f} s" for a, b in pairs))
    else:
        u = bundled_image().to(device)
        result = compare(u, guidance_image(u, torch.Generator().manual_seed(0), options.dark), options)
        print(comparison_table(result))
    if options.out is not None:
        options.out.write_text(json.dumps(head | result, indent=2) + "\n")


if __name__ == "__main__":
    main()
