r"""The law of y_1 under a prior, and what the context adds: every prior of the package is a mixture of Gaussians.

    p(y_1 | v) = sum_i w_i(v) N(c_i, r^2 gamma_1^2(L))

| prior | c_i | w_i |
|---|---|---|
| GaussianPrior | 0 | 1 |
| DataPrior | lambda_1(L) x_i, x_i a training image | 1 / M |
| GuidancePrior | lambda_1(0) m_i sqrt(v), m_i its mean grey value, v of mean one | q(v; m_i) / sum_j q(v; m_j) |

With D_i the squared distance of y from c_i in units of r gamma_1(L), the log density of z = gamma_1^{-1}(L) y is

    log p(z) = logsumexp_i(log w_i - D_i(y) / 2) - n log r - n/2 log 2 pi,

and the divergence of q(y_1 | x_0) = N(lambda_1(L) y_0, gamma_1^2(L)) from a mixture is bounded by that from its members
(Rissanen et al. 2023, appendix: their prior term),

    KL <= -logsumexp_i(log w_i - KL_i),     KL_i = D_i(lambda_1(L) y_0) / 2 + n/2 (1 / r^2 - 1 + log r^2),

with equality for a single one. The context v is a variable of the model too: it is drawn around a training image's mean
grey value, while inference draws it around the image's own, so that it tells something of the image, which costs

    log q(v; m_0) - log 1/M sum_i q(v; m_i)    nats; its expectation is >= 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dpm_scales.errors import UserError, require
from dpm_scales.noise import NoiseSource
from dpm_scales.operators import HeatOperator, Operator
from dpm_scales.priors import DataPrior, GaussianPrior, GuidancePrior, Prior
from dpm_scales.processes import Context, Osmosis, Process


@dataclass(frozen=True)
class Start:
    """The mixture that a prior is, for one batch of images and their context."""

    process: Process
    prior: Prior
    operator: Operator
    #: log w_i, float64, ``(B | 1, M)``
    log_weights: Tensor
    #: r, the prior's noise over the process's own
    ratio: float
    #: what the context costs, float64 ``(B,)`` nats
    context_cost: Tensor

    def negative_log_density(self, y: Tensor) -> Tensor:
        """-log p of z = gamma_1^{-1}(L) y, float64 ``(B,)``, for y ``(B, C, H, W)`` in white coordinates."""
        constant = y[0].numel() * (math.log(self.ratio) + 0.5 * math.log(2 * math.pi))
        return constant - torch.logsumexp(self.log_weights - self._distances(y) / 2, 1)

    def divergence(self, mean: Tensor) -> Tensor:
        """The bound on KL(N(mean, gamma_1^2) || p), float64 ``(B,)`` nats, for means ``(B, C, H, W)``, white."""
        constant = 0.5 * mean[0].numel() * (1 / self.ratio**2 - 1 + 2 * math.log(self.ratio))
        return constant - torch.logsumexp(self.log_weights - self._distances(mean) / 2, 1)

    def _distances(self, y: Tensor) -> Tensor:
        """D_i(y), ``(B, M)``."""
        one = torch.ones((), dtype=torch.float64, device=y.device)
        y = y.to(torch.float64)
        if isinstance(self.prior, DataPrior):
            distances = _to_blurred_images(self.prior, self.process, self.operator, y, one)
        elif isinstance(self.prior, GuidancePrior):
            distances = _to_steady_states(self.prior, self.process, self.operator, y, one)
        else:
            white = self.operator.apply(lambda mu: 1 / self.process.noise_scale(one, mu), y)
            distances = white.square().flatten(1).sum(1, keepdim=True)
        return distances / self.ratio**2


def start_law(prior: Prior, process: Process, x_0: Tensor, noise: NoiseSource) -> tuple[Start, Context]:
    """The law of y_1, and a context for each image, drawn as inference draws it.

    Args:
        x_0: images ``(B, C, H, W)`` in the process's value range.
        noise: drawn from where the process has a context.

    Raises: UserError for a prior that has no density (`noise_ratio` 0), that was not fitted, or that fits other images;
        and for guidance images whose density is not known.
    """
    channels, size = x_0.shape[1], (x_0.shape[-2], x_0.shape[-1])
    prior.check_size(size)
    zero = torch.zeros(x_0.shape[0], dtype=torch.float64, device=x_0.device)
    if isinstance(prior, GaussianPrior):
        return Start(process, prior, process.operator(), zero[:1, None], 1.0, zero), None
    if not isinstance(prior, DataPrior | GuidancePrior):
        raise UserError(f"the density of the prior {type(prior).__name__} is not known, so there is no likelihood")
    stored = prior.coefficients if isinstance(prior, DataPrior) else prior.grey
    name, count = type(prior).__name__, len(stored)
    require(count > 0, f"{name}: no training images stored yet; train the model first")
    require(
        prior.noise_ratio > 0,
        f"{name}: noise_ratio=0 leaves no density at scale 1, so there is no likelihood; raise it",
    )
    require(stored.shape[1] == channels, f"{name} has images of {stored.shape[1]} channel(s), not of {channels}")
    equal = torch.full((1, count), -math.log(count), dtype=torch.float64, device=x_0.device)
    if isinstance(prior, DataPrior):
        return Start(process, prior, process.operator(), equal, prior.noise_ratio, zero), None
    osmosis = _with_known_guidance(process)
    own = x_0.mean((-2, -1))
    context = osmosis.guidance(own, noise.normal(tuple(x_0.shape[1:]), x_0.dtype))
    operator = osmosis.operator(context)
    if osmosis.guidance_noise == 0:  # v of mean one is 1, and tells nothing
        return Start(process, prior, operator, equal, prior.noise_ratio, zero), context
    log_densities = _log_guidance_densities(osmosis, context, prior.grey)
    log_density = _log_guidance_densities(osmosis, context, own, paired=True)
    log_total = torch.logsumexp(log_densities, 1)
    cost = log_density - log_total + math.log(count)
    return Start(process, prior, operator, log_densities - log_total[:, None], prior.noise_ratio, cost), context


def _with_known_guidance(process: Process) -> Osmosis:
    assert isinstance(process, Osmosis)
    known = process.guidance_image == "none" and (process.guidance_pattern == "white" or process.guidance_noise == 0)
    require(
        known,
        f"the likelihood of {type(process).__name__} needs the density of its guidance images, known for "
        f"guidance_pattern=white and guidance_image=none alone, got {process.guidance_pattern} and "
        f"{process.guidance_image}",
    )
    return process


def _log_guidance_densities(process: Osmosis, v: Tensor, mean: Tensor, paired: bool = False) -> Tensor:
    """log q(v; m) up to a number that does not depend on m.

    v = clip(g + s eps, low, 1) has a density between the bounds, and probabilities at them. Between them all that
    matters are the number of pixels, their sum and the sum of their squares.

    Args:
        v: guidance images ``(B, C, H, W)``.
        mean: mean grey values m ``(M, C)`` in the value range, or with `paired` ``(B, C)``, one for each image.

    Returns: float64 ``(B, M)``, with `paired` ``(B,)``.
    """
    low, high = process.value_range
    std, least = process.guidance_noise, process.guidance_min
    grey = (mean.to(v.dtype) - low) / (high - low)  # rounded as `Osmosis.guidance` rounds it
    g = grey.to(torch.float64) if paired else grey.to(torch.float64)[None]
    dark, bright = v <= least, v >= 1
    inside = ~(dark | bright)
    values = torch.where(inside, v, 0).to(torch.float64)
    number, first, second, darks, brights = (
        x.to(torch.float64).sum((-2, -1)) for x in (inside, values, values**2, dark, bright)
    )
    if not paired:
        number, first, second, darks, brights = (x[:, None] for x in (number, first, second, darks, brights))
    log_density = -(second - 2 * g * first + number * g**2) / (2 * std**2)
    log_density = log_density + darks * torch.special.log_ndtr((least - g) / std)
    return (log_density + brights * torch.special.log_ndtr((g - 1) / std)).sum(-1)


def _to_blurred_images(prior: DataPrior, process: Process, operator: Operator, y: Tensor, one: Tensor) -> Tensor:
    """Squared distances to lambda_1(L) x_i in units of gamma_1, of whose coefficients only the kept ones are not 0."""
    assert isinstance(operator, HeatOperator)
    mu = operator.eigenvalues(y.shape[-2], y.shape[-1], y.device)
    noise = process.noise_scale(one, mu).expand(mu.shape)
    rows, columns = prior.coefficients.shape[-2:]
    kept = (slice(None), slice(None), slice(rows), slice(columns))
    scale = (process.signal_scale(one, mu) / noise)[:rows, :columns]
    centres = scale * prior.coefficients.to(torch.float64)
    u = operator.analysis(y) / noise
    rest = u.square().flatten(1).sum(1) - u[kept].square().flatten(1).sum(1)
    return rest[:, None] + _squared_distances(u[kept].flatten(1), centres.flatten(1))


def _to_steady_states(prior: GuidancePrior, process: Process, operator: Operator, y: Tensor, one: Tensor) -> Tensor:
    """Squared distances to lambda_1(0) m_i sqrt(v) in units of gamma_1: along sqrt(v), and across it."""
    zero = torch.zeros((), dtype=torch.float64, device=y.device)
    noise = process.noise_scale(one, zero)
    mode = operator.to_pixels(torch.ones_like(y)) / math.sqrt(y.shape[-2] * y.shape[-1])
    along = (y * mode).sum((-2, -1))
    across = (y - along[..., None, None] * mode).square().flatten(1).sum(1)
    scale = process.signal_scale(one, zero) * math.sqrt(y.shape[-2] * y.shape[-1])
    centres = scale * prior.grey.to(torch.float64)
    return (across[:, None] + _squared_distances(along, centres)) / noise**2


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """``(B, M)`` from ``(B, n)`` and ``(M, n)``, without the cancellation of a matrix product."""
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist").square()
