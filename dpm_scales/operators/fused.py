"""The stencil's product as one Triton kernel, which reads five weights and a vector once, where five separate products
read and write the result each time.

Imported by `stencil` on CUDA only, where torch ships Triton. `TRITON_INTERPRET=1` runs the same kernel on the CPU.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def _product(  # type: ignore[no-untyped-def]  # Triton reads the arguments' kinds at the call
    out,
    u,
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
    scale,
    ADD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # samples times pixels can exceed 2^31
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = i < number
    u += row * number
    out += row * number
    weights = (row // channels) * sample_stride + (row % channels) * channel_stride
    total = tl.load(diagonal + weights + i, here) * tl.load(u + i, here)
    right, below = i + 1 < number, i + width < number
    total += tl.load(from_right + weights + i, right, 0.0) * tl.load(u + i + 1, right, 0.0)
    total += tl.load(from_below + weights + i, below, 0.0) * tl.load(u + i + width, below, 0.0)
    left, above = here & (i >= 1), here & (i >= width)
    total += tl.load(from_left + weights + i - 1, left, 0.0) * tl.load(u + i - 1, left, 0.0)
    total += tl.load(from_above + weights + i - width, above, 0.0) * tl.load(u + i - width, above, 0.0)
    if ADD:
        total = tl.load(out + i, here) + scale * total
    tl.store(out + i, total, here)


def product(out: Tensor, u: Tensor, weights: tuple[Tensor, ...], width: int, scale: float | None) -> None:
    """Compute ``out = A u``, or ``out += scale * A u``.

    Args:
        out, u: contiguous ``(B, C, N)`` of the same dtype.
        weights: the stencil's five, ``(B | 1, C | 1, N)`` with equal strides, contiguous in N.
        scale: None to overwrite `out`; otherwise a number that float32 represents exactly, since Triton takes no other.
    """
    batch, channels, number = u.shape
    sample, channel = (weights[0].stride(k) if weights[0].shape[k] > 1 else 0 for k in (0, 1))
    grid = (batch * channels, triton.cdiv(number, BLOCK))
    numbers = (channels, sample, channel, number, width)
    add = scale is not None
    _product[grid](out, u, *weights, *numbers, 1.0 if scale is None else scale, ADD=add, BLOCK=BLOCK)
