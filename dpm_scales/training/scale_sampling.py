r"""Draw the scales of a training step: uniformly, by a published density, or more often where the loss varies more.

| `scale_sampling` | density | source |
|---|---|---|
| uniform | uniform in t, spread evenly over the batch | VDM |
| logit_normal | logit(t) normal, by default with mean 0 and std 1 | Esser et al. 2024 (SD 3) |
| log_normal | ln(gamma / lambda) normal, by default with mean -1.2 and std 1.2 | Karras et al. 2022 (EDM) |
| logsnr | uniform in logSNR | Kingma et al. 2021 |
| importance | by the measured second moments of the losses | Nichol & Dhariwal 2021 |

The published densities change the expected loss, as their authors intend: scales drawn more often weigh more.

Importance: the expected loss is the mean of L_k over the scales k = 1..K. Scales drawn with probabilities p_k, each
loss weighted by 1 / (K p_k), have the same mean and, for p_k ~ sqrt(E[L_k^2]), the least variance (Nichol & Dhariwal
2021, Eq. (18)). E[L_k^2] is measured while training, over the last observations of a bin of neighbouring scales.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dpm_scales.errors import require, require_number
from dpm_scales.processes import Process
from dpm_scales.samplers.grids import NO_SIGNAL, tables_of

NORMALS = {"logit_normal": (0.0, 1.0), "log_normal": (-1.2, 1.2)}
"""Densities with parameters, and their published mean and standard deviation."""
SCALE_SAMPLINGS = ("uniform", *NORMALS, "logsnr", "importance")
BINS = 64
MEMORY = 200  # observations in the running mean of a bin
WARMUP = 10  # observations of every bin before the density is used, as published
FLOOR = 0.05  # share of the density that stays uniform: no loss is weighted by more than its inverse


class DensityScales:
    """Draws scales k / num_scales by a published density, on the device of `edges`, the table of its quantiles.

    Args:
        kind: "logit_normal", "log_normal" or "logsnr".
        process: gives gamma / lambda at mu = 0 for the last two; under a colour or a clock, that of the noise schedule.
        mean, std: parameters of the normal densities; None for the published ones.

    Raises: UserError for parameters that the density does not have or that are out of range, and for a process whose
    noise does not grow with t.
    """

    def __init__(self, kind: str, process: Process, mean: float | None = None, std: float | None = None) -> None:
        check_density(kind, mean, std)
        published = NORMALS.get(kind, (0.0, 1.0))
        self.mean, self.std = (p if own is None else float(own) for own, p in zip((mean, std), published, strict=True))
        self.kind, self.num_scales = kind, process.num_scales
        t = torch.arange(1, self.num_scales + 1, dtype=torch.float64, device=tables_of(process)) / self.num_scales
        if kind == "logit_normal":
            self.edges = torch.logit(t)
            return
        level = process.noise_level(t).log()
        require(
            self.num_scales > 1 and bool((level.diff() > 0).all()),
            f"scale_sampling={kind} needs noise that grows with t, and that of {type(process).__name__} does not; use "
            "uniform, logit_normal or importance",
        )
        if float(level[-1]) > math.log(NO_SIGNAL):  # as in grids by noise level
            level[-1] = 2 * level[-2] - level[-3] if self.num_scales > 2 else level[-2] + 1
        # uniform draws stand for the nearest scale, so that they change half-way between two
        self.edges = torch.cat([level[:1], (level[:-1] + level[1:]) / 2, level[-1:]]) if kind == "logsnr" else level

    def draw(self, even: Tensor) -> Tensor:
        """Return scales ``(B,)`` float64 from uniform numbers in [0, 1)."""
        edges = self.edges
        if self.kind == "logsnr":
            wanted, edges = torch.lerp(edges[0], edges[-1], even), edges[1:-1]
        else:
            wanted = self.mean + self.std * torch.special.ndtri(even.clamp(1e-12, 1 - 1e-12))
        k = torch.searchsorted(edges, wanted).clamp(max=self.num_scales - 1) + 1
        return k.to(torch.float64) / self.num_scales


def check_density(kind: str, mean: float | None, std: float | None) -> None:
    """Raise UserError unless `kind` has these parameters."""
    for name, value in (("scale_mean", mean), ("scale_std", std)):
        if value is not None:
            has = kind in NORMALS
            require(
                has, f"{name} is a parameter of scale_sampling={' and '.join(NORMALS)}, not of {kind}; leave it out"
            )
            require_number(name, value, -100 if name == "scale_mean" else 0, 100)
    require(std is None or std > 0, f"scale_std must be > 0, got {std}")


class ImportanceScales:
    """Draws scales by the second moments of their losses, on the device of `state`.

    `state` ``(2, bins)``, float64, is stored in checkpoints: mean squared losses, and the number averaged in each.
    """

    def __init__(self, num_scales: int) -> None:
        self.num_scales = num_scales
        self.state = torch.zeros(2, min(BINS, num_scales), dtype=torch.float64)

    def load(self, state: list[list[float]]) -> None:
        """Restore a stored state. Raises UserError if its number of bins differs."""
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
        """Return the sums ``(2, bins)`` of losses ``(B,)`` at t ``(B,)`` for `update`, to be added up over ranks."""
        squares = loss.detach().to(torch.float64) ** 2
        finite = torch.isfinite(squares)
        seen = torch.stack([torch.where(finite, squares, 0.0), finite.to(torch.float64)])
        # a masked sum is deterministic; an indexed one on a GPU would not be
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
    """Return the cumulative sum, deterministic also on a GPU, where `torch.cumsum` is not."""
    return (values * torch.ones(len(values), len(values), dtype=values.dtype, device=values.device).tril()).sum(1)
