r"""Osmosis as a five-point stencil: drift, diffusion and reflecting boundaries on a grid of pixels of size 1.

    d_t u = Laplacian u - div(d u)                                                          Eq. (46), Peter 2024
    (P u)_i = sum over the neighbours j of  into_i u_j - into_j u_i

For an edge from pixel i right or down to pixel j, with the drift d at its midpoint (Vogel et al. 2013),

    into_i = 1 - d/2,    into_j = 1 + d/2,        |d| <= 2 keeps both >= 0.

The canonical drift of a guidance image v > 0 is d = 2 (v_j - v_i) / (v_j + v_i), so into_i = 2 v_i / (v_i + v_j). Then
P v = 0 and P is similar to a symmetric matrix: L = -V^{-1/2} P V^{1/2} has the off-diagonals -sqrt(into_i into_j). Each
edge adds to L a rank-one matrix of norm 2, and the edges of a grid split into four matchings, so that the spectrum of L
lies in [0, 8] for every v.

Images are stored flat: a row's end and the next row's start are neighbours in memory whose edge has weight 0, so each
of the five products runs over contiguous memory, whatever the size (1 x N too).
"""

from __future__ import annotations

import functools
import struct
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dpm_scales.errors import require

CACHE_BYTES = 2**20
"""Bytes of images processed at a time on the CPU: products are bound by memory, and most of the dozen arrays then stay
in the second-level caches. Twice as many took 1.8 times as long, half as many were no faster."""


@dataclass(frozen=True)
class Stencil:
    """A matrix on images with five entries per row, different for every sample and channel.

    Weights are ``(B | 1, C | 1, N)``, N = `height` * `width`. `from_right[i]` and `from_left[i]` belong to the edge
    between pixels i and i + 1: the weight of the right one in the row of the left one, and the reverse. `from_below[i]`
    and `from_above[i]` belong to the edge between i and i + `width`. A symmetric matrix may hold the same tensor twice.
    """

    diagonal: Tensor
    from_right: Tensor
    from_left: Tensor
    from_below: Tensor
    from_above: Tensor
    height: int
    width: int

    @property
    def weights(self) -> tuple[Tensor, ...]:
        """Return the five weights: diagonal, from right, left, below, above."""
        return (self.diagonal, self.from_right, self.from_left, self.from_below, self.from_above)

    @property
    def is_uniform(self) -> bool:
        """Return whether all weights have the same memory layout, as the kernels need them."""
        return len({(w.shape, _steps(w)) for w in self.weights}) == 1 and self.diagonal.stride(-1) == 1

    def bind(self, u: Tensor, out: Tensor) -> Product:
        """Return the product A u into `out`, both contiguous ``(B, C, N)``, for repeated use."""
        if self.is_uniform and u.is_contiguous() and out.is_contiguous() and may_fuse(u):
            return FusedProduct(self.weights, u, out, self.width)
        return FiveProducts(self.weights, u, out, self.width)

    def flat_product(self, u: Tensor) -> Tensor:
        """Return A u for u of shape ``(B, C, N)``."""
        out = torch.empty_like(u)
        self.bind(u, out).set()
        return out

    def product(self, u: Tensor) -> Tensor:
        """Return A u for images ``(B, C, H, W)`` in the weights' dtype."""
        return self.flat_product(u.flatten(-2)).view(u.shape)

    def affine(self, scale: float, shift: float) -> Stencil:
        """Return the matrix ``scale * A + shift * I``."""
        return self._map(lambda weight: scale * weight, self.diagonal * scale + shift)

    def to(self, dtype: torch.dtype) -> Stencil:
        """Return the same matrix in another dtype."""
        return self._map(lambda weight: weight.to(dtype), self.diagonal.to(dtype))

    def part(self, samples: slice, channels: slice) -> Stencil:
        """Return the matrices of some samples and channels; one shared by all is kept."""
        return self._map(lambda weight: cut(weight, samples, channels), cut(self.diagonal, samples, channels))

    def dense(self) -> Tensor:
        """Return the dense matrix ``(B | 1, C | 1, N, N)``, for tests and small images."""
        matrix = torch.diag_embed(self.diagonal)
        for weight, offset in (
            (self.from_right[..., :-1], 1),
            (self.from_left[..., :-1], -1),
            (self.from_below[..., : -self.width], self.width),
            (self.from_above[..., : -self.width], -self.width),
        ):
            matrix = matrix + torch.diag_embed(weight, offset)
        return matrix

    def _map(self, f: Callable[[Tensor], Tensor], diagonal: Tensor) -> Stencil:
        right, below = f(self.from_right), f(self.from_below)
        left = right if self.from_left is self.from_right else f(self.from_left)
        above = below if self.from_above is self.from_below else f(self.from_above)
        return Stencil(diagonal, right, left, below, above, self.height, self.width)


def cut(x: Tensor, samples: slice, channels: slice) -> Tensor:
    """Return some samples and channels of ``(B | 1, C | 1, ...)``; axes of size one are kept."""
    whole = slice(None)
    return x[samples if x.shape[0] > 1 else whole, channels if x.shape[1] > 1 else whole]


def blocks(x: Tensor, size: int) -> Iterator[tuple[slice, slice]]:
    """Yield slices of samples and channels of ``(B, C, N)``: blocks of at most `size` bytes, or one image channel.

    Devices other than the CPU gain nothing from blocks and get a single one.
    """
    batch, channels, number = x.shape
    if x.device.type != "cpu" or x.numel() * x.element_size() <= size:
        yield slice(0, batch), slice(0, channels)
        return
    block = max(1, size // (number * x.element_size()))
    wide, high = min(block, channels), max(1, block // channels)
    for i in range(0, batch, high):
        for j in range(0, channels, wide):
            yield slice(i, i + high), slice(j, j + wide)


class Product(ABC):
    """The product A u, computed into a buffer `out`."""

    @abstractmethod
    def set(self) -> None:
        """Compute ``out = A u``."""

    @abstractmethod
    def add(self, scale: float = 1.0) -> None:
        """Compute ``out += scale * A u``."""


class FiveProducts(Product):
    """The product in five passes over the memory, one for each entry of a row."""

    def __init__(self, weights: tuple[Tensor, ...], u: Tensor, out: Tensor, width: int) -> None:
        diagonal, right, left, below, above = weights
        w = width
        self._terms = [
            (out, diagonal, u),
            (out[..., :-1], right[..., :-1], u[..., 1:]),
            (out[..., 1:], left[..., :-1], u[..., :-1]),
            (out[..., :-w], below[..., :-w], u[..., w:]),
            (out[..., w:], above[..., :-w], u[..., :-w]),
        ]

    def set(self) -> None:
        out, weight, u = self._terms[0]
        torch.mul(weight, u, out=out)
        for out, weight, u in self._terms[1:]:
            out.addcmul_(weight, u)

    def add(self, scale: float = 1.0) -> None:
        for out, weight, u in self._terms:
            out.addcmul_(weight, u, value=scale)


class FusedProduct(Product):
    """The product in one pass, by Triton; see `fused`."""

    def __init__(self, weights: tuple[Tensor, ...], u: Tensor, out: Tensor, width: int) -> None:
        self._weights, self._u, self._out, self._width = weights, u, out, width

    def set(self) -> None:
        self._run(None)

    def add(self, scale: float = 1.0) -> None:
        if struct.unpack("f", struct.pack("f", scale))[0] != scale:  # Triton would round it to float32
            FiveProducts(self._weights, self._u, self._out, self._width).add(scale)
        else:
            self._run(scale)

    def _run(self, scale: float | None) -> None:
        from dpm_scales.operators.fused import product

        product(self._out, self._u, self._weights, self._width, scale)


def _steps(weight: Tensor) -> tuple[int, ...]:
    """Return the strides of the axes of size greater than one."""
    return tuple(step for step, size in zip(weight.stride(), weight.shape, strict=True) if size > 1)


def may_fuse(u: Tensor) -> bool:
    """Return whether Triton can compute products of `u`; not for subclasses, such as fake tensors without memory.

    Inductor fuses by itself.
    """
    ours = u.device.type == "cuda" and u.dtype in (torch.float32, torch.float64)
    return ours and type(u) is Tensor and not torch.compiler.is_compiling() and _fuses_right(u.device)


@functools.cache
def _fuses_right(device: torch.device) -> bool:
    """Return whether Triton compiles on this device and agrees with five products; tested once per device."""
    return agrees(_try_product, device, "Triton is", "osmosis takes five passes instead of one")


def agrees(trial: Callable[[torch.device], None], device: torch.device, subject: str, instead: str) -> bool:
    """Return whether a trial of kernels passes on a device; if it raises, warn in one line what is done instead."""
    try:
        trial(device)
    except Exception as error:  # a missing compiler, an unknown card: whatever Triton may raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        warnings.warn(f"{subject} unusable here ({reason}); {instead}", stacklevel=3)
        return False
    return True


def _try_product(device: torch.device) -> None:
    """Raise AssertionError unless a product in one kernel agrees with that in five passes."""
    generator = torch.Generator(device).manual_seed(0)  # does not advance the user's
    for dtype in (torch.float32, torch.float64):
        guidance = torch.rand(2, 1, 5, 7, device=device, dtype=dtype, generator=generator) + 0.5
        stencil = white_stencil(guidance)
        weights = (stencil.diagonal, *(w for w in (stencil.from_right, stencil.from_below) for _ in range(2)))
        u, start = torch.randn(2, 2, 3, 35, device=device, dtype=dtype, generator=generator).unbind()
        fused, plain = start.clone(), start.clone()
        FusedProduct(weights, u, fused, 7).add(-0.5)
        FiveProducts(weights, u, plain, 7).add(-0.5)
        torch.testing.assert_close(fused, plain)


def canonical_drift(guidance_image: Tensor) -> tuple[Tensor, Tensor]:
    """Return the drift whose steady state is the guidance image v > 0, at edge midpoints (Vogel et al. 2013).

    Args:
        guidance_image: ``(..., H, W)``.

    Returns: d to the right ``(..., H, W - 1)`` and down ``(..., H - 1, W)``, in 1/px, in [-2, 2].
    """
    v = guidance_image
    right, down = v.diff(dim=-1), v.diff(dim=-2)
    return 2 * right / (v[..., 1:] + v[..., :-1]), 2 * down / (v[..., 1:, :] + v[..., :-1, :])


def drift_stencil(right: Tensor, down: Tensor) -> Stencil:
    """Return P for a drift given on the edges.

    Args:
        right: d from each pixel to its right neighbour, ``(B | 1, C | 1, H, W - 1)``, in 1/px.
        down: likewise to the lower neighbour, ``(B | 1, C | 1, H - 1, W)``.

    Raises: UserError for shapes that belong to no common grid. Only |d| <= 2 keeps images positive, which is not
    checked.
    """
    ok = right.ndim == down.ndim == 4 and right.shape[2] == down.shape[2] + 1 and right.shape[3] + 1 == down.shape[3]
    require(
        ok and right.shape[:2] == down.shape[:2],
        "drift must be (B, C, H, W - 1) to the right and (B, C, H - 1, W) down, got "
        f"{tuple(right.shape)} and {tuple(down.shape)}",
    )
    return _stencil(1 - right / 2, 1 + right / 2, 1 - down / 2, 1 + down / 2)


def edge_stencil(right: Tensor, down: Tensor) -> Stencil:
    """Return L with (L y)_i = sum_j w_ij (y_i - y_j), symmetric, in the dtype of the weights.

    Args:
        right, down: weights of the edges to the right and to the lower neighbour, as for `drift_stencil`.
    """
    p = _stencil(right, right, down, down)
    across, downwards = -p.from_right, -p.from_below
    return Stencil(-p.diagonal, across, across, downwards, downwards, p.height, p.width)


def osmosis_stencil(guidance_image: Tensor) -> Stencil:
    """Return P for the canonical drift of v > 0, ``(B | 1, C | 1, H, W)``, in the dtype of v.

    The weights are computed as quotients, not from the drift: 1 - d/2 has no correct digit where v is very dark.
    """
    return _stencil(*_shares(guidance_image))


def white_stencil(guidance_image: Tensor) -> Stencil:
    """Return L = -V^{-1/2} P V^{1/2}, symmetric, with spectrum in [0, 8]."""
    left, right, top, bottom = _shares(guidance_image)
    p = _stencil(left, right, top, bottom)
    across, downwards = (_flat(-(a * b).sqrt(), *pad) for a, b, pad in ((left, right, (1, 0)), (top, bottom, (0, 1))))
    return Stencil(-p.diagonal, across, across, downwards, downwards, p.height, p.width)


def _shares(v: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return 2 v_i / (v_i + v_j) for both ends of the horizontal edges, then of the vertical ones."""
    a, b, c, d = v[..., :-1], v[..., 1:], v[..., :-1, :], v[..., 1:, :]
    return 2 * a / (a + b), 2 * b / (a + b), 2 * c / (c + d), 2 * d / (c + d)


def _stencil(left: Tensor, right: Tensor, top: Tensor, bottom: Tensor) -> Stencil:
    """Return P from the weights with which each end of an edge takes from the other, which loses as much."""
    lost = F.pad(right, (0, 1)) + F.pad(left, (1, 0)) + F.pad(bottom, (0, 0, 0, 1)) + F.pad(top, (0, 0, 1, 0))
    height, width = lost.shape[-2:]
    weights = (_flat(left, 1, 0), _flat(right, 1, 0), _flat(top, 0, 1), _flat(bottom, 0, 1))
    return Stencil(-lost.flatten(-2), *weights, height, width)


def _flat(edges: Tensor, columns: int, rows: int) -> Tensor:
    """Return edge weights as a flat image, with weight 0 where the grid ends."""
    return F.pad(edges, (0, columns, 0, rows)).flatten(-2)
