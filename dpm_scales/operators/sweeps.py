"""Whole Chebyshev sweeps of small images as one Triton kernel each, where a loop launches two kernels for every degree.

One program holds all pixels of an image channel. Each thread keeps its own values from step to step; those of
neighbours pass through a buffer, written before a barrier and read after it. Two such buffers alternate, so that one
barrier per step is enough: the next write never touches what other threads may still be reading.

Imported by `chebyshev` on CUDA only, where torch ships Triton. `TRITON_INTERPRET=1` runs the same kernels on the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

WARPS = 8


@triton.jit
def _times(  # type: ignore[no-untyped-def]  # Triton reads the arguments' kinds at the call
    buffer, here, i, number, width, diagonal, right, left, below, above
):
    """Return A here; all threads of a program call it together."""
    tl.store(buffer + i, here, i < number)
    tl.debug_barrier()
    total = diagonal * here
    total += right * tl.load(buffer + i + 1, i + 1 < number, 0.0)
    total += below * tl.load(buffer + i + width, i + width < number, 0.0)
    total += left * tl.load(buffer + i - 1, (i < number) & (i >= 1), 0.0)
    total += above * tl.load(buffer + i - width, (i < number) & (i >= width), 0.0)
    return total


@triton.jit
def _sweep(  # type: ignore[no-untyped-def]
    images,
    sums,
    coefficients,
    buffers,
    diagonal,
    from_right,
    from_left,
    from_below,
    from_above,
    channels,
    sample_stride,
    channel_stride,
    number,
    width,
    terms,
    plane,
    table,
    COUNT: tl.constexpr,
    EXPANDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Expand one image, or collect `COUNT` of them, with signed coefficients ``(COUNT, rows, terms)``.

    `plane` and `table` are the sizes of the images and the coefficients of one function.
    """
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    inside = i < number
    weights = (row // channels) * sample_stride + (row % channels) * channel_stride
    centre = tl.load(diagonal + weights + i, inside, 0.0)
    right = tl.load(from_right + weights + i, i + 1 < number, 0.0)
    below = tl.load(from_below + weights + i, i + width < number, 0.0)
    left = tl.load(from_left + weights + i - 1, inside & (i >= 1), 0.0)
    above = tl.load(from_above + weights + i - width, inside & (i >= width), 0.0)
    buffers += row * 2 * number
    images += row * number
    sums += row * number
    coefficients += row * terms
    first = tl.load(images + i, inside, 0.0)
    other = tl.full([BLOCK], 0.0, first.dtype)
    if EXPANDS:
        here = first
        for j in tl.static_range(COUNT):
            tl.store(sums + j * plane + i, tl.load(coefficients + j * table) * here, inside)
        for k in range(1, terms):
            sign = 1.0 - 2.0 * ((k - 1) % 2)
            factor = tl.where(k == 1, 0.5, sign).to(first.dtype)
            product = _times(buffers + (k % 2) * number, here, i, number, width, centre, right, left, below, above)
            after = other + factor * product
            other = here
            here = after
            for j in tl.static_range(COUNT):
                c = tl.load(coefficients + j * table + k)
                place = sums + j * plane + i
                tl.store(place, tl.load(place, inside, 0.0) + c * here, inside)
    else:
        here = tl.full([BLOCK], 0.0, first.dtype)
        for j in tl.static_range(COUNT):
            c = tl.load(coefficients + j * table + terms - 1)
            here += c * tl.load(images + j * plane + i, inside, 0.0)
        for step in range(1, terms):
            k = terms - 1 - step
            factor = tl.where(k == 0, 0.5, 1.0 - 2.0 * (k % 2)).to(first.dtype)
            product = _times(buffers + (step % 2) * number, here, i, number, width, centre, right, left, below, above)
            after = other + factor * product
            for j in tl.static_range(COUNT):
                c = tl.load(coefficients + j * table + k)
                after += c * tl.load(images + j * plane + i, inside, 0.0)
            other = here
            here = after
        tl.store(sums + i, here, inside)


def sweep(
    weights: tuple[Tensor, ...], width: int, coefficients: Tensor, ys: Sequence[Tensor], expands: bool
) -> tuple[Tensor, ...]:
    """Return f_1(L) y, f_2(L) y, ... of one y, or only the sum of f_1(L) y_1, f_2(L) y_2, ...

    Args:
        weights: the five of the stencil 2X = L/2 - 2, ``(B | 1, C | 1, N)`` with equal strides, contiguous in N.
        coefficients: s_k c_k of each function, contiguous ``(functions, B, C, K + 1)``, in the dtype of the ys.
        ys: ``(B, C, N)``, one if `expands`, else one for each function.
    """
    images = torch.stack([*ys])
    _, batch, channels, number = images.shape
    count, terms = coefficients.shape[0], coefficients.shape[-1]
    sums = images.new_empty((count if expands else 1, batch, channels, number))
    buffers = images.new_empty((batch, channels, 2, number))
    sample, channel = (weights[0].stride(k) if weights[0].shape[k] > 1 else 0 for k in (0, 1))
    rows = batch * channels
    numbers = (channels, sample, channel, number, width, terms, rows * number, rows * terms)
    kind = {"COUNT": count, "EXPANDS": expands, "BLOCK": triton.next_power_of_2(number)}
    _sweep[(rows,)](images, sums, coefficients, buffers, *weights, *numbers, **kind, num_warps=WARPS)
    return sums.unbind()
