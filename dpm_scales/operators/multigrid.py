r"""Multigrid for one implicit step of osmosis, (I - tau P) x = r: a preconditioner whose cost is linear in the pixels.

With x = s w, where s > 0 resembles the solution, the system becomes a balance of flows,

    s_i w_i + sum over the neighbours j of (a_ji w_i - a_ij w_j) = r_i,        a_ij = tau into_i s_j,

and w is smooth: constant, in fact, where s is a steady state of P. So a coarse pixel is a block of four with a single
w. Its mass s and its residual r are the sums over its pixels, and so are its flows, halved, since a difference of w
over two pixels is twice that over one (cell-centred multigrid: P. Wesseling, An Introduction to Multigrid Methods,
1992). The coarsest grid, of a few pixels, is solved directly; w is interpolated linearly from each grid to the next
finer one, between sweeps of damped Jacobi. All operations are local products and sums over whole arrays, independent
for every sample and channel.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from dpm_scales.operators.stencil import Stencil

SWEEPS, DAMPING = 2, 0.8
COARSEST = 64
"""Largest number of pixels of a grid that is solved directly."""

HELD = 1e12
"""Mass of a fixed pixel, relative to its own mass and the flows through it."""


def multigrid(p: Stencil, step: float, like: Tensor, fixed: Tensor | None = None) -> Callable[[Tensor, Tensor], None]:
    """Return a preconditioner for (I - step P) x = r that writes one V-cycle's solution into its second argument.

    Args:
        p: P, which conserves intensity: its columns sum to 0.
        step: tau > 0 in px^2.
        like: an image that resembles the solution, ``(B, C, N)``; only its absolute values matter.
        fixed: bool ``(B | 1, C | 1, N)``, pixels held at their values.
    """
    size = like.abs()
    mean = size.mean(-1, keepdim=True)
    s = torch.where(mean > 0, size.maximum(1e-3 * mean), 1.0)
    mass = s if fixed is None else torch.where(fixed, HELD * (1 + step) * s, s)
    grid = (p.height, p.width)
    right, below = s.roll(-1, -1), s.roll(-p.width, -1)
    flows = ((p.from_right, right), (p.from_left, s), (p.from_below, below), (p.from_above, s))
    levels = _Level(mass.unflatten(-1, grid), *((step * into * of).unflatten(-1, grid) for into, of in flows))

    def precondition(r: Tensor, out: Tensor) -> None:
        torch.mul(s, levels.solve(r), out=out)
        if fixed is not None:
            out.copy_(torch.where(fixed, r, out))

    return precondition


class _Level:
    """A grid and all coarser ones.

    Masses and flows are ``(B, C, H, W)``. A flow belongs to the edge from its pixel to the right or lower neighbour,
    and is 0 where there is none: `from_right` into the pixel, `from_left` into the right one; likewise below.
    """

    def __init__(
        self,
        mass: Tensor,
        from_right: Tensor,
        from_left: Tensor,
        from_below: Tensor,
        from_above: Tensor,
    ) -> None:
        self.grid = height, width = mass.shape[-2], mass.shape[-1]
        out_left, out_up = F.pad(from_right[..., :-1], (1, 0)), F.pad(from_below[..., :-1, :], (0, 0, 1, 0))
        diagonal = (mass + from_left + out_left + from_above + out_up).flatten(-2)
        right, left, below, above = (-flow.flatten(-2) for flow in (from_right, from_left, from_below, from_above))
        self.matrix = Stencil(diagonal, right, left, below, above, height, width)
        self.inverse = DAMPING / diagonal
        self.coarser: _Level | None = None
        if height * width <= COARSEST:
            self.factors = torch.linalg.lu_factor(self.matrix.dense())
            return
        #: pixels of a block, down and across; elongated images are first coarsened along their longer side
        self.block = (1 if 2 * height <= width else 2, 1 if 2 * width <= height else 2)
        down, across = self.block
        sideways = [self._sum(self._border(flow, -1, across)) / across for flow in (from_right, from_left)]
        upright = [self._sum(self._border(flow, -2, down)) / down for flow in (from_below, from_above)]
        self.coarser = _Level(self._sum(mass), *sideways, *upright)

    def solve(self, r: Tensor) -> Tensor:
        """Return w, ``(B, C, N)``."""
        if self.coarser is None:
            return torch.linalg.lu_solve(*self.factors, r[..., None])[..., 0]
        w = self.inverse * r
        for _ in range(SWEEPS - 1):
            w = self._sweep(w, r)
        rest = (r - self.matrix.flat_product(w)).unflatten(-1, self.grid)
        coarse = self.coarser.solve(self._sum(rest).flatten(-2)).unflatten(-1, self.coarser.grid)
        scale = (float(self.block[0]), float(self.block[1]))
        fine = F.interpolate(coarse, scale_factor=scale, mode="bilinear")
        w = w + fine[..., : self.grid[0], : self.grid[1]].flatten(-2)
        for _ in range(SWEEPS):
            w = self._sweep(w, r)
        return w

    def _sweep(self, w: Tensor, r: Tensor) -> Tensor:
        return torch.addcmul(w, self.inverse, r - self.matrix.flat_product(w))

    def _sum(self, x: Tensor) -> Tensor:
        """Return sums over blocks; the last ones may have fewer pixels."""
        down, across = self.block
        x = F.pad(x, (0, -x.shape[-1] % across, 0, -x.shape[-2] % down))
        return x.unflatten(-1, (-1, across)).sum(-1).unflatten(-2, (-1, down)).sum(-2)

    def _border(self, flow: Tensor, axis: int, block: int) -> Tensor:
        """Return flows across the borders of blocks, 0 within them."""
        inner = torch.arange(flow.shape[axis], device=flow.device) % block < block - 1
        return flow.masked_fill(inner if axis == -1 else inner[:, None], 0.0)
