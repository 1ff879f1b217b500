"""Time the Fréchet distance against clean-fid's on the same features, and all measures as a function of their number.

    python -m benchmarks.distances                          # d = 2048, 200 and 5000 images; minutes
    python -m benchmarks.distances --dim 256 --numbers 100
    python -m benchmarks.distances --growth --dim 256 --numbers 2000 5000 10000 20000    # time and memory of each

Both start from features (n, d). clean-fid takes the root of the product of two covariances (d, d); with fewer images
than features that product is singular, and its root is slow and inaccurate.
"""

from __future__ import annotations

import argparse
import time
import tracemalloc
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

from dpm_scales.metrics import frechet_distance, kernel_distance, manifolds

Array = NDArray[Any]


def by_cleanfid(a: Array, b: Array) -> float:
    """Return clean-fid's `frechet_distance`, whose call of sqrtm has an option that newer versions of SciPy lack."""
    from cleanfid import fid

    def sqrtm(matrix: Array, disp: bool = True) -> Any:
        root = scipy.linalg.sqrtm(matrix)
        return root if disp else (root, 0.0)

    fid.linalg = SimpleNamespace(sqrtm=sqrtm)
    moments = [m for x in (a, b) for m in (x.mean(axis=0), np.cov(x, rowvar=False))]
    return float(fid.frechet_distance(*moments))


def features(number: int, dim: int, seed: int) -> Array:
    """Draw features that resemble a network's: non-negative, correlated, with a decaying spectrum; float32."""
    rng = np.random.default_rng(0)  # one mixture for all sets
    mixing = np.linalg.qr(rng.normal(size=(dim, dim)))[0] * np.arange(1, dim + 1) ** -0.5
    draws = np.random.default_rng(seed)
    return np.maximum(draws.normal(0.02 * seed, 1, (number, dim)) @ mixing.T, 0).astype(np.float32)


def timed(function: Callable[[Array, Array], Any], a: Array, b: Array) -> tuple[Any, float]:
    start = time.perf_counter()
    value = function(a, b)
    return value, time.perf_counter() - start


def growth(dim: int, numbers: Sequence[int]) -> None:
    """Print the CPU time and the peak memory, without the features, of each measure by number of images."""
    print("| n | Fréchet | kernel | nearest neighbours |")
    print("|---|---|---|---|", flush=True)
    for number in numbers:
        a, b = (features(number, dim, seed) for seed in (1, 2))
        cells = []
        for function in (frechet_distance, kernel_distance, manifolds):
            tracemalloc.start()
            start = time.process_time()
            function(a, b)
            seconds = time.process_time() - start
            peak = tracemalloc.get_traced_memory()[1] / 2**20
            tracemalloc.stop()
            cells.append(f"{seconds:.1f} s, {peak:.0f} MiB")
        print(f"| {number} | {' | '.join(cells)} |", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Time the distances between sets of features.")
    parser.add_argument("--dim", type=int, default=2048)
    parser.add_argument("--numbers", type=int, nargs="+", default=[200, 5000], help="images in each set")
    parser.add_argument("--growth", action="store_true", help="time and memory of each measure, without clean-fid")
    options = parser.parse_args(arguments)
    if options.growth:
        growth(options.dim, options.numbers)
        return
    print("| d | n | ours | clean-fid | ratio | relative difference | kernel | manifolds |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for number in options.numbers:
        a, b = (features(number, options.dim, seed) for seed in (1, 2))
        ours, seconds = timed(frechet_distance, a, b)
        theirs, their_seconds = timed(by_cleanfid, a.astype(np.float64), b.astype(np.float64))
        others = [timed(function, a, b)[1] for function in (kernel_distance, manifolds)]
        print(
            f"| {options.dim} | {number} | {seconds:.2f} s | {their_seconds:.1f} s | {their_seconds / seconds:.0f} | "
            f"{abs(ours / theirs - 1):.1e} | {others[0]:.1f} s | {others[1]:.1f} s |",
            flush=True,
        )


if __name__ == "__main__":
    main()
