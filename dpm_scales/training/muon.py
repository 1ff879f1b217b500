r"""Muon (Jordan et al. 2024): steps of the same size in all directions of a weight matrix, with AdamW for all else.

A weight W of n outputs is the matrix n x m of its further dimensions; so is its momentum M, whose singular values the
quintic Newton-Schulz iteration

    X <- a X + b (X X^T) X + c (X X^T)^2 X,    X_0 = M / |M|_F

brings near 1 in five rounds; n is the smaller side. Each round multiplies by a polynomial of X X^T, so that for the
long rows of convolutions all of them run on Gram matrices, with one product of the size of W in the end:

    P = a + b A + c A^2,    Q <- P Q,    A <- P A P,    A_0 = X_0 X_0^T,    X = Q X_0

A step is X times the learning rate times 0.2 sqrt(max(n, m)), which gives it the root mean square of AdamW's (Liu et
al. 2025, "Muon is scalable for LLM training"), times `MATRIX_RATE`. Embeddings and their layers act on one vector per
image, not on all its pixels, and are left to AdamW: as matrices they would take more than half of the iteration's time
in the `small` network.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from dpm_scales.networks.blocks import ScaleEmbedding

ROUNDS = 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""a, b, c of the published iteration, which maps singular values above about 0.01 to between 0.7 and 1.2."""

LONG_ROWS = 2
"""Ratio m / n from which on Gram matrices need fewer operations."""

NARROWEST = 16
"""Smallest number of channels, in and out, of weights that are stepped as matrices: first, last and depthwise layers
are left to AdamW."""

MATRIX_RATE = 2.0
"""Ratio of a matrix's step to AdamW's, in root mean square."""


def is_matrix(parameter: Tensor) -> bool:
    """Return whether a parameter of a network is stepped as a matrix, by its shape."""
    return parameter.ndim >= 2 and min(parameter.shape[:2]) >= NARROWEST


def embedding_weights(network: nn.Module) -> Iterator[Tensor]:
    """Yield the weights of embeddings, and of the linear layers named `modulation...` that map them."""
    for name, module in network.named_modules():
        if isinstance(module, nn.Embedding | ScaleEmbedding):
            yield from module.parameters()
        elif isinstance(module, nn.Linear) and name.rpartition(".")[2].startswith("modulation"):
            yield module.weight


def orthogonalized(matrices: Tensor) -> Tensor:
    """Return matrices ``(K, n, m)`` with the same singular vectors, and singular values near 1.

    Args:
        matrices: ``(K, n, m)``; zeros stay zeros.
    """
    wide = matrices if matrices.shape[1] <= matrices.shape[2] else matrices.mT
    x = wide / wide.norm(dim=(1, 2), keepdim=True).clamp(min=torch.finfo(wide.dtype).tiny)
    found = _by_gram(x) if x.shape[2] >= LONG_ROWS * x.shape[1] else _by_rows(x)
    return found if wide is matrices else found.mT


def _by_rows(x: Tensor) -> Tensor:
    a, b, c = COEFFICIENTS
    for _ in range(ROUNDS):
        gram = x @ x.mT
        x = torch.baddbmm(x, b * gram + c * (gram @ gram), x, beta=a)
    return x


def _by_gram(x: Tensor) -> Tensor:
    a, b, c = COEFFICIENTS
    gram = x @ x.mT
    factor = eye = torch.eye(gram.shape[1], dtype=x.dtype, device=x.device).expand_as(gram)
    for number in range(ROUNDS):
        polynomial = torch.baddbmm(a * eye + b * gram, gram, gram, alpha=c)
        factor = polynomial if number == 0 else polynomial @ factor
        if number + 1 < ROUNDS:
            gram = polynomial @ gram @ polynomial
    return factor @ x


class Muon(torch.optim.AdamW):
    """Muon for the weights that are matrices, fused AdamW for all else.

    It keeps the state of AdamW for all parameters, with the first moment as Muon's momentum, so that a run may change
    from one to the other. Weight decay is AdamW's.

    Args:
        parameters: parameters of one network, not sharded.
        lr, betas, weight_decay: as for AdamW; betas[0] is also the momentum.
        excluded: parameters left to AdamW whatever their shape.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        lr: float,
        betas: tuple[float, float],
        weight_decay: float,
        excluded: Iterable[Tensor] = (),
    ) -> None:
        super().__init__(parameters, lr=lr, betas=betas, weight_decay=weight_decay, fused=True)
        others = {id(p) for p in excluded}
        (group,) = self.param_groups
        self._matrices = [p for p in group["params"] if is_matrix(p) and id(p) not in others]
        chosen = {id(p) for p in self._matrices}
        self._others = [p for p in group["params"] if id(p) not in chosen]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take a step; all of it is skipped if `found_inf` is 1, without waiting for the device."""
        (group,) = self.param_groups
        loss = None
        if closure is not None:  # before the group is split: Lightning's zeroes the gradients of the whole group
            with torch.enable_grad():
                loss = closure()
        everything = group["params"]
        group["params"] = self._others
        try:
            super().step()
        finally:
            group["params"] = everything
        self._step_matrices(group)
        return loss

    def _step_matrices(self, group: dict[str, Any]) -> None:
        """Step all matrices, those of one shape together."""
        shapes: dict[tuple[int, int], list[Tensor]] = {}
        for p in self._matrices:
            if p.grad is not None:
                shapes.setdefault((p.shape[0], p[0].numel()), []).append(p)
        bad: Tensor | None = getattr(self, "found_inf", None)
        for (rows, columns), weights in shapes.items():
            good = 1.0 if bad is None else (1 - bad).to(weights[0])  # a tensor, so that nothing waits for the device
            steps = torch.stack([self._direction(p, group["betas"], good).reshape(rows, columns) for p in weights])
            size = group["lr"] * MATRIX_RATE * 0.2 * math.sqrt(max(rows, columns))
            for p, direction in zip(weights, orthogonalized(steps) * (size * good), strict=True):
                if group["weight_decay"] != 0:
                    p.mul_(1 - group["lr"] * group["weight_decay"] * good)
                p.sub_(direction.reshape(p.shape))

    def _direction(self, p: Tensor, betas: tuple[float, float], good: Tensor | float) -> Tensor:
        """Update the moments of a matrix, and return Nesterov's momentum."""
        state = self.state[p]
        if not state:
            state["step"] = torch.zeros((), device=p.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
        assert p.grad is not None
        grad = torch.where(torch.as_tensor(good, device=p.device) > 0, p.grad, 0.0)  # NaN times zero is NaN
        state["step"] += good
        state["exp_avg"].lerp_(grad, (1 - betas[0]) * torch.as_tensor(good, dtype=p.dtype, device=p.device))
        state["exp_avg_sq"].lerp_(grad**2, (1 - betas[1]) * torch.as_tensor(good, dtype=p.dtype, device=p.device))
        return torch.lerp(grad, state["exp_avg"], betas[0])
