r"""Draw the scales of a training step: uniformly, or more often where the loss varies more.

The expected loss is the mean of L_k over the scales k = 1..K. Scales drawn with probabilities p_k, each loss weighted
by 1 / (K p_k), have the same mean and, for p_k ~ sqrt(E[L_k^2]), the least variance (Nichol & Dhariwal 2021, Eq. (18)).
E[L_k^2] is measured while training, over the last observations of a bin of neighbouring scales.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dpm_scales.errors import require

SCALE_SAMPLINGS = ("uniform", "importance")
BINS = 64
MEMORY = 200  # observations in the running mean of a bin
WARMUP = 10  # observations of every bin before the density is used, as published
FLOOR = 0.05  # share of the density that stays uniform: no loss is weighted by more than its inverse


class ImportanceScales:
    """Draws scales by the second moments of their losses, on the device of `state`.

    `state` ``(2, bins)``, float64, is stored in checkpoints: mean squared losses, and how many went into each.
    """

    def __init__(self, num_scales: int) -> None:
        self.num_scales = num_scales
        self.state = torch.zeros(2, min(BINS, num_scales), dtype=torch.float64)

    def load(self, state: list[list[float]]) -> None:
        """Restore a stored state. Raises UserError for one of another number of bins."""
        tensor = torch.tensor(state, dtype=torch.float64)
        ok = tensor.shape == self.state.shape
        require(ok, f"the stored density of scales has shape {tuple(tensor.shape)}, not {tuple(self.state.shape)}")
        self.state = tensor.to(self.state.device)

    def density(self) -> Tensor:
        """Return p_1..p_K, float64 ``(num_scales,)``."""
        k = torch.arange(1, self.num_scales + 1, device=self.state.device)
        index, (_, sizes) = self._bins(k / self.num_scales), self._members()
        return (self._shares() / sizes)[index]

    def draw(self, even: Tensor) -> tuple[Tensor, Tensor]:
        """Return scales from uniform numbers in [0, 1), and the weights of their losses: ``(B,)`` each, float64."""
        shares, (first, sizes) = self._shares(), self._members()
        edges = _sums(shares)
        index = torch.searchsorted(edges / edges[-1], even, right=True).clamp(max=len(edges) - 1)
        inside = ((even * edges[-1] - edges[index]) / shares[index] + 1).clamp(0, 1) * sizes[index]
        k = first[index] + torch.minimum(inside.floor(), sizes[index] - 1) + 1
        return k / self.num_scales, sizes[index] / (self.num_scales * shares[index])

    def observe(self, t: Tensor, loss: Tensor) -> Tensor:
        """Return what `update` needs of losses ``(B,)`` at t ``(B,)``, to be summed over ranks: ``(2, bins)``."""
        squares = loss.detach().to(torch.float64) ** 2
        finite = torch.isfinite(squares)
        seen = torch.stack([torch.where(finite, squares, 0.0), finite.to(torch.float64)])
        # by a sum, whose order does not change from run to run, as that of an indexed one on a GPU would
        member = self._bins(t)[:, None] == torch.arange(self.state.shape[1], device=t.device)
        return (seen[:, :, None] * member).sum(1)

    def update(self, observed: Tensor) -> None:
        """Update the moments with the sums of all ranks."""
        squares, counts = self.state
        new, number = observed
        counts = (counts + number).clamp(max=MEMORY)
        step = (new - number * squares) / counts.clamp(min=1)
        # more than MEMORY at once would overshoot
        step = torch.where(number > MEMORY, new / number.clamp(min=1) - squares, step)
        self.state = torch.stack([squares + step, counts])

    def _shares(self) -> Tensor:
        """Return the probabilities of the bins."""
        (squares, counts), (_, sizes) = self.state, self._members()
        flat = sizes / self.num_scales
        rough = sizes * squares.sqrt()
        total = rough.sum()
        wanted = torch.lerp(rough / torch.where(total > 0, total, 1.0), flat, FLOOR)
        return torch.where((counts.min() >= WARMUP) & (total > 0), wanted, flat)

    def _bins(self, t: Tensor) -> Tensor:
        """Return the bins that scales lie in."""
        k = (t * self.num_scales).round().long() - 1
        return k * self.state.shape[1] // self.num_scales

    def _members(self) -> tuple[Tensor, Tensor]:
        """Return each bin's first k - 1 and its number of scales."""
        bins = self.state.shape[1]
        edges = -(-torch.arange(bins + 1, device=self.state.device) * self.num_scales // bins)
        return edges[:-1].double(), edges.diff().double()


def _sums(values: Tensor) -> Tensor:
    """Return the `cumsum`, in an order that does not change from run to run on a GPU."""
    return (values * torch.ones(len(values), len(values), dtype=values.dtype, device=values.device).tril()).sum(1)
