r"""The law of y_1 under a prior, which is a mixture of Gaussians for all priors of the package.

    p(y_1 | v) = sum_i w_i(v) N(c_i, r^2 gamma_1^2(L))

| prior | c_i | w_i |
|---|---|---|
| GaussianPrior | 0 | 1 |
| DataPrior | lambda_1(L) x_i, x_i a training image | 1 / M |
| OsmosisPrior | lambda_1(0) m_i sqrt(v), m_i the mean intensity of x_i, v of mean one | q(v; m_i) / sum_j q(v; m_j) |

With D_i the squared distance of y from c_i in units of r gamma_1(L), the log density of z = gamma_1^{-1}(L) y is

    log p(z) = logsumexp_i(log w_i - D_i(y) / 2) - n log r - n/2 log 2 pi,

and the divergence of q(y_1 | x_0) = N(lambda_1(L) y_0, gamma_1^2(L)) from a mixture is bounded by those from its
components (Rissanen et al. 2023, appendix: their prior term),

    KL <= -logsumexp_i(log w_i - KL_i),     KL_i = D_i(lambda_1(L) y_0) / 2 + n/2 (1 / r^2 - 1 + log r^2),

with equality for a single component.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dpm_scales.operators import Operator


@dataclass(frozen=True)
class Start(ABC):
    """The law of y_1 for one batch of images and their context."""

    operator: Operator
    #: cost of the context, float64 ``(B,)`` nats
    context_cost: Tensor

    @abstractmethod
    def negative_log_density(self, y: Tensor) -> Tensor:
        """Return -log p of z = gamma_1^{-1}(L) y, float64 ``(B,)``, for y ``(B, C, H, W)`` in whitened coordinates."""

    @abstractmethod
    def divergence(self, mean: Tensor) -> Tensor:
        """Return a bound on KL(N(mean, gamma_1^2) || p), float64 ``(B,)`` nats, for mean ``(B, C, H, W)``, whitened."""


@dataclass(frozen=True)
class Mixture(Start):
    """A mixture of Gaussians."""

    #: log w_i, float64, ``(B | 1, M)``
    log_weights: Tensor
    #: squared distances from c_i in units of gamma_1(L), float64 ``(B, M)``, for an operator and float64 images
    distances: Callable[[Operator, Tensor], Tensor]
    #: r, the prior's noise relative to the process's
    ratio: float = 1.0

    def negative_log_density(self, y: Tensor) -> Tensor:
        constant = y[0].numel() * (math.log(self.ratio) + 0.5 * math.log(2 * math.pi))
        return constant - self._log_sum(y)

    def divergence(self, mean: Tensor) -> Tensor:
        constant = 0.5 * mean[0].numel() * (1 / self.ratio**2 - 1 + 2 * math.log(self.ratio))
        return constant - self._log_sum(mean)

    def _log_sum(self, y: Tensor) -> Tensor:
        """Return logsumexp_i(log w_i - D_i(y) / 2), ``(B,)``."""
        distances = self.distances(self.operator, y.to(torch.float64)) / self.ratio**2
        return torch.logsumexp(self.log_weights - distances / 2, 1)


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """Return ``(..., B, M)`` from ``(..., B, n)`` and ``(..., M, n)``, without the cancellation of a matrix product."""
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist").square()


def one_like(y: Tensor) -> Tensor:
    """Return the scale 1 on the images' device, float64."""
    return torch.ones((), dtype=torch.float64, device=y.device)
