r"""f(L) y for a symmetric five-point stencil L with spectrum in [0, 8], by Chebyshev expansion.

    f(L) y = sum_k c_k T_k(X) y,    X = L/4 - 1,    T_{k+1} = 2 X T_k - T_{k-1}
    c_k = (2 - [k = 0]) / M  sum_j f(4 (1 + cos theta_j)) cos(k theta_j),    theta_j = pi (j + 1/2) / M

A degree-K expansion costs K products with L: no inner products, no solves, no synchronisation with the host.

- one y, several functions: the three-term recursion, shared by all (`expand`);
- several (f_i, y_i), one sum: Clenshaw's recursion, with one product per step for any number of terms (`collect`).

Since L is symmetric, each is the adjoint of the other and computes its gradient, so no T_k is stored for it.

Both recursions subtract the term of two steps before. With the signs s_k = 1, 1, -1, -1, 1, ... absorbed in
S_k = s_k T_k they only add, S_{k+1} = s_k s_{k+1} 2X S_k + S_{k-1}, and run in place in two buffers.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dpm_scales.errors import UserError, require
from dpm_scales.operators.base import SpectralFunction
from dpm_scales.operators.stencil import CACHE_BYTES, Stencil, agrees, blocks, cut, may_fuse, white_stencil

SPECTRAL_BOUND = 8.0
"""Largest eigenvalue of L, for every guidance image."""

Coefficients = tuple[float, ...] | Tensor
"""c_0, c_1, ...: numbers, or a tensor ``(..., K + 1)`` whose c_k each broadcast against ``(B, C, N)``."""


# --- coefficients -----------------------------------------------------------------------------------------------------


def chebyshev_nodes(number: int, device: torch.device | str | None = None) -> Tensor:
    """Return the eigenvalues 4 (1 + cos theta_j) at which f is evaluated, ``(number,)`` float64 in (0, 8)."""
    theta = (torch.arange(number, dtype=torch.float64, device=device) + 0.5) * (math.pi / number)
    return SPECTRAL_BOUND * torch.cos(theta / 2) ** 2


def chebyshev_coefficients(values: Tensor, degree: int) -> Tensor:
    """Return c_0 .. c_degree from the values of f at M > degree nodes, ``(..., M)``; float64, differentiable.

    The cosine transform is computed by FFT: at the degrees of long evolutions its matrix would not fit into memory.
    """
    number = values.shape[-1]
    spectrum = torch.fft.rfft(torch.cat([values, values.flip(-1)], -1))[..., : degree + 1]
    angle = torch.arange(degree + 1, dtype=torch.float64, device=values.device) * (math.pi / (2 * number))
    coefficients = (spectrum.real * torch.cos(angle) + spectrum.imag * torch.sin(angle)) / number
    return torch.cat([coefficients[..., :1] / 2, coefficients[..., 1:]], -1)


def chebyshev_degree(
    functions: SpectralFunction | Sequence[SpectralFunction], tol: float = 1e-6, max_degree: int = 4096
) -> int:
    """Return the smallest degree whose expansion of each function is within ``tol * max|f|`` on [0, 8] for all samples.

    The bound is the sum of the neglected |c_k|, so it holds at every eigenvalue and for every guidance image. Runs on
    the host: call it when a process is built, not in a step.

    Raises: UserError if a function is not finite on [0, 8], or needs a degree above `max_degree`.
    """
    require(1e-13 <= tol < 1, f"chebyshev_degree: tol must lie in [1e-13, 1), got {tol}")
    degree = 1
    for f in [functions] if callable(functions) else functions:
        degree = max(degree, _degree(f, tol, max_degree))
    return degree


def _degree(f: SpectralFunction, tol: float, max_degree: int) -> int:
    number = 64
    while True:
        values = f(chebyshev_nodes(number)[None])
        if not bool(torch.isfinite(values).all()):
            raise UserError("chebyshev_degree: the function is not finite on the spectrum [0, 8]")
        if values.shape[-1] == 1:
            return 0
        size = chebyshev_coefficients(values, number - 1).abs()
        tails = size.flip(-1).cumsum(-1).flip(-1)  # tails[k] = |c_k| + |c_{k+1}| + ...
        needed = int((tails > tol * values.abs().amax(-1, keepdim=True)).sum(-1).max()) - 1
        if needed <= number // 2:  # else the tail itself is not resolved
            if needed > max_degree:
                break
            return max(needed, 0)
        if number > 2 * max_degree:
            break
        number *= 2
    raise UserError(
        f"chebyshev_degree: the function needs a degree above {max_degree} for tol={tol:g}; less blur or a larger tol"
    )


def heat_coefficients(time: float, tol: float) -> tuple[float, ...]:
    """Return c_k of exp(-t mu) on [0, 8], truncated where the omitted |c_k| sum to no more than `tol`.

    c_k = (2 - [k = 0]) (-1)^k exp(-4t) I_k(4t). The scaled Bessel functions come from Miller's backward recurrence,
    I_{k-1} = I_{k+1} + (2k / 4t) I_k, normalised by sum |c_k| = 1, in Python numbers, so that no device is waited for.
    """
    if SPECTRAL_BOUND * time <= tol:
        return (1.0,)
    start = math.ceil(math.sqrt(8 * time * 90) + 60)  # where I_k(4t) / I_0(4t) is below 1e-39
    above, here, sizes = 0.0, 1e-280, [0.0] * (start + 1)
    for k in range(start, 0, -1):
        sizes[k] = 2 * here
        above, here = here, above + k / (2 * time) * here
        if here > 1e280:
            above, here = above * 1e-280, here * 1e-280
            sizes[k:] = [size * 1e-280 for size in sizes[k:]]
    sizes[0] = here
    total = math.fsum(sizes)
    tail, last = 0.0, start
    while last > 0 and tail + sizes[last] / total <= tol:
        tail += sizes[last] / total
        last -= 1
    return tuple((-1) ** k * size / total for k, size in enumerate(sizes[: last + 1]))


# --- sweeps -----------------------------------------------------------------------------------------------------------


def expand(stencil: Stencil, y: Tensor, coefficients: Sequence[Coefficients]) -> tuple[Tensor, ...]:
    """Return f_1(L) y, f_2(L) y, ... in one sweep.

    Args:
        stencil: L, in the dtype of y.
        y: ``(B, C, N)``.
        coefficients: coefficients of each function; tensors may require gradients.
    """
    return _Expand.apply(stencil, y, *coefficients)


def collect(stencil: Stencil, coefficients: Sequence[Coefficients], ys: Sequence[Tensor]) -> Tensor:
    """Return f_1(L) y_1 + f_2(L) y_2 + ... in one sweep; see `expand`."""
    return _Collect.apply(stencil, len(ys), *coefficients, *ys)


class _Expand(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, stencil: Stencil, y: Tensor, *coefficients: Coefficients) -> tuple[Tensor, ...]:
        _remember(ctx, stencil, coefficients, (y,))
        outs = [torch.empty_like(y, memory_format=torch.contiguous_format) for _ in coefficients]
        for part, chosen, place in _parts(stencil, coefficients, y):
            _expand_into([out[place] for out in outs], part, y[place], chosen)
        return tuple(outs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        coefficients, (y,) = _recall(ctx)
        grad_y = collect(ctx.stencil, coefficients, grads) if ctx.needs_input_grad[1] else None
        wanted = ctx.needs_input_grad[2:]
        pairs = zip(coefficients, grads, wanted, strict=True)
        return None, grad_y, *(_moments(ctx.stencil, y, g, c) if needed else None for c, g, needed in pairs)


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, stencil: Stencil, number: int, *arguments: Any) -> Tensor:
        coefficients, ys = arguments[:number], arguments[number:]
        _remember(ctx, stencil, coefficients, ys)
        out = torch.empty_like(ys[0], memory_format=torch.contiguous_format)
        for part, chosen, place in _parts(stencil, coefficients, ys[0]):
            out[place] = _clenshaw(part, chosen, [y[place] for y in ys])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        coefficients, ys = _recall(ctx)
        number = len(ys)
        wanted = ctx.needs_input_grad[2:]
        grads: list[Any] = [None] * (2 * number)
        pairs = zip(coefficients, ys, wanted[:number], strict=True)
        grads[:number] = [_moments(ctx.stencil, grad, y, c) if needed else None for c, y, needed in pairs]
        if any(wanted[number:]):
            grads[number:] = expand(ctx.stencil, grad, coefficients)
        return None, None, *grads


def _remember(ctx: Any, stencil: Stencil, coefficients: Sequence[Coefficients], ys: Sequence[Tensor]) -> None:
    ctx.stencil = stencil
    ctx.numbers = [None if isinstance(c, Tensor) else c for c in coefficients]
    ctx.save_for_backward(*ys, *(c for c in coefficients if isinstance(c, Tensor)))


def _recall(ctx: Any) -> tuple[list[Coefficients], tuple[Tensor, ...]]:
    tensors = sum(numbers is None for numbers in ctx.numbers)
    saved = ctx.saved_tensors
    ys, rest = saved[: len(saved) - tensors], iter(saved[len(saved) - tensors :])
    return [next(rest) if numbers is None else numbers for numbers in ctx.numbers], ys


def _parts(
    stencil: Stencil, coefficients: Sequence[Coefficients], y: Tensor
) -> Iterator[tuple[Stencil, list[Coefficients], tuple[slice, slice]]]:
    """Yield the stencil, coefficients and slices of each block of samples and channels."""
    for place in blocks(y, CACHE_BYTES):
        chosen = [cut(c, *place) if isinstance(c, Tensor) and c.ndim == 4 else c for c in coefficients]
        yield stencil.part(*place), chosen, place


def _sign(k: int) -> float:
    return 1.0 if k % 4 < 2 else -1.0


def _signed(coefficients: Coefficients) -> Sequence[Any]:
    """Return s_k c_k for each k."""
    if not isinstance(coefficients, Tensor):
        return [_sign(k) * c for k, c in enumerate(coefficients)]
    index = torch.arange(coefficients.shape[-1], device=coefficients.device)
    return (coefficients * (1 - 2 * (index % 4 >= 2).to(coefficients.dtype))).unbind(-1)


def _add(out: Tensor, c: float | Tensor, y: Tensor) -> None:
    if isinstance(c, Tensor):
        out.addcmul_(c, y)
    else:
        out.add_(y, alpha=c)


def _twice(stencil: Stencil) -> Stencil:
    """Return 2X = L/2 - 2."""
    return stencil.affine(4 / SPECTRAL_BOUND, -2.0)


def _basis(stencil: Stencil, y: Tensor, degree: int) -> Iterator[Tensor]:
    """Yield S_0 y, S_1 y, ..., each valid until the next is requested."""
    twice = _twice(stencil)
    here = y.clone(memory_format=torch.contiguous_format)
    other = torch.zeros_like(here)
    onwards, back = twice.bind(here, other), twice.bind(other, here)
    for k in range(degree + 1):
        yield here
        if k < degree:
            onwards.add(_sign(k) * _sign(k + 1) * (0.5 if k == 0 else 1.0))
            here, other, onwards, back = other, here, back, onwards


def _expand_into(outs: list[Tensor], stencil: Stencil, y: Tensor, coefficients: Sequence[Coefficients]) -> None:
    table = _one_kernel_table(stencil, y, coefficients)
    if table is None:
        expand_by_steps(outs, stencil, y, coefficients)
        return
    for out, found in zip(outs, one_kernel(stencil, table, [y], True), strict=True):
        out.copy_(found)


def expand_by_steps(outs: list[Tensor], stencil: Stencil, y: Tensor, coefficients: Sequence[Coefficients]) -> None:
    """Compute f_1(L) y, f_2(L) y, ... into `outs`, with one product per step; see `expand`."""
    signed = [_signed(c) for c in coefficients]
    for k, s in enumerate(_basis(stencil, y, max(map(len, signed)) - 1)):
        for out, c in zip(outs, signed, strict=True):
            if k == 0:
                torch.mul(s, c[0], out=out)
            elif k < len(c):
                _add(out, c[k], s)


def _clenshaw(stencil: Stencil, coefficients: Sequence[Coefficients], ys: Sequence[Tensor]) -> Tensor:
    table = _one_kernel_table(stencil, ys[0], coefficients)
    if table is None:
        return collect_by_steps(stencil, coefficients, ys)
    return one_kernel(stencil, table, ys, False)[0]


def collect_by_steps(stencil: Stencil, coefficients: Sequence[Coefficients], ys: Sequence[Tensor]) -> Tensor:
    """Return f_1(L) y_1 + f_2(L) y_2 + ..., with one product per step; see `collect`."""
    twice = _twice(stencil)
    signed = [_signed(c) for c in coefficients]
    here, other = (torch.zeros_like(ys[0], memory_format=torch.contiguous_format) for _ in range(2))
    onwards, back = twice.bind(here, other), twice.bind(other, here)
    last = max(map(len, signed)) - 1
    for k in range(last, -1, -1):
        if k < last:
            onwards.add(_sign(k) * _sign(k + 1) * (0.5 if k == 0 else 1.0))
        for c, y in zip(signed, ys, strict=True):
            if k < len(c):
                _add(other, c[k], y)
        here, other, onwards, back = other, here, back, onwards
    return here


def _moments(stencil: Stencil, y: Tensor, grad: Tensor, like: Coefficients) -> Tensor:
    """Return <grad, T_k y> for each c_k, summed to the shape of the coefficients."""
    assert isinstance(like, Tensor)
    degree = like.shape[-1] - 1
    products = [_sign(k) * (s * grad).sum(-1, keepdim=True) for k, s in enumerate(_basis(stencil, y, degree))]
    return torch.stack(products, -1).sum_to_size(like.shape)


# --- small images on a GPU: a sweep in one kernel ---------------------------------------------------------------------

MOST_PIXELS, MOST_FUNCTIONS = 4096, 8
"""Limits of a sweep in one kernel: a program holds all pixels of an image channel, and the kernel is compiled for each
number of functions."""


def _one_kernel_table(stencil: Stencil, y: Tensor, coefficients: Sequence[Coefficients]) -> Tensor | None:
    """Return the table of coefficients if `one_kernel` can compute the sweep, otherwise None."""
    small = y.shape[-1] <= MOST_PIXELS and len(coefficients) <= MOST_FUNCTIONS
    if not (small and stencil.is_uniform and may_fuse(y) and _one_kernel_right(y.device)):
        return None
    return signed_table(coefficients, y)


def signed_table(coefficients: Sequence[Coefficients], y: Tensor) -> Tensor | None:
    """Return s_k c_k of each function, ``(functions, B, C, K + 1)``; None if any are numbers or vary by pixel."""
    table: list[Tensor] = []
    terms = max(c.shape[-1] if isinstance(c, Tensor) else 0 for c in coefficients)
    index = torch.arange(terms, device=y.device)
    signs = (1 - 2 * (index % 4 >= 2).to(torch.int64)).to(y.dtype)
    for c in coefficients:
        if not isinstance(c, Tensor) or c.ndim not in (1, 4) or (c.ndim == 4 and c.shape[2] != 1):
            return None
        own = torch.zeros((*y.shape[:2], terms), dtype=y.dtype, device=y.device)
        own[..., : c.shape[-1]] = c if c.ndim == 1 else c[:, :, 0]
        table.append(own * signs)
    return torch.stack(table)


def one_kernel(stencil: Stencil, table: Tensor, ys: Sequence[Tensor], expands: bool) -> tuple[Tensor, ...]:
    """Return the results of `expand`, or of `collect`, from one Triton kernel; see `sweeps`."""
    from dpm_scales.operators.sweeps import sweep

    twice = _twice(stencil)
    return sweep(twice.weights, twice.width, table, ys, expands)


@functools.cache
def _one_kernel_right(device: torch.device) -> bool:
    """Return whether sweeps in one kernel agree on this device with those by steps; tested once per device."""
    return agrees(_try_sweeps, device, "sweeps in one kernel are", "osmosis starts two for each degree instead")


def _try_sweeps(device: torch.device) -> None:
    """Raise AssertionError unless sweeps in one kernel agree with those by steps."""
    generator = torch.Generator(device).manual_seed(0)  # does not advance the user's
    draw = functools.partial(torch.rand, device=device, generator=generator)
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.float64, 1e-12)):
        for height, width in ((5, 7), (64, 64)):
            stencil = white_stencil(draw(2, 1, height, width, dtype=dtype) + 0.5)
            ys = [*draw(2, 2, 1, height * width, dtype=dtype)]
            numbers = [draw(2, 1, 1, terms, dtype=dtype) / terms for terms in (33, 20)]
            table = signed_table(numbers, ys[0])
            assert table is not None
            outs = [torch.empty_like(ys[0]) for _ in numbers]
            expand_by_steps(outs, stencil, ys[0], numbers)
            near = functools.partial(torch.testing.assert_close, atol=tolerance, rtol=tolerance)
            near(one_kernel(stencil, table, ys[:1], True), tuple(outs))
            together = collect_by_steps(stencil, numbers, ys)
            near(one_kernel(stencil, table, ys, False)[0], together)
