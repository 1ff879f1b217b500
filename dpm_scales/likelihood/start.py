r"""The law of y_1 under a prior, and the cost of the context: every prior of the package is a mixture of Gaussians.

    p(y_1 | v) = sum_i w_i(v) N(c_i, r^2 gamma_1^2(L))

| prior | c_i | w_i |
|---|---|---|
| GaussianPrior | 0 | 1 |
| DataPrior | lambda_1(L) x_i, x_i a training image | 1 / M |
| OsmosisPrior | lambda_1(0) m_i sqrt(v), m_i its mean intensity, v of mean one | q(v; m_i) / sum_j q(v; m_j) |

With D_i the squared distance of y from c_i in units of r gamma_1(L), the log density of z = gamma_1^{-1}(L) y is

    log p(z) = logsumexp_i(log w_i - D_i(y) / 2) - n log r - n/2 log 2 pi,

and the divergence of q(y_1 | x_0) = N(lambda_1(L) y_0, gamma_1^2(L)) from a mixture is bounded by those from its
components (Rissanen et al. 2023, appendix: their prior term),

    KL <= -logsumexp_i(log w_i - KL_i),     KL_i = D_i(lambda_1(L) y_0) / 2 + n/2 (1 / r^2 - 1 + log r^2),

with equality for a single one.

The context is a variable z of the model too, p(x_0) = sum over z of p(z) p(x_0 | z), and inference may draw it by any
law q(z | x_0) at the cost KL(q || p). White noise, and patterns of other images, have the same law in both and cost
nothing; inference uses the mean intensity m_0 of the image, while the model draws one of the stored m_i. With s
the noise of the guidance, M values stored, N pixels, and w the guidance before it is clipped:

| guidance | z | q(z given x_0) | costs, in nats |
|---|---|---|---|
| white noise | v | around m_0 | log q(v; m_0) - log 1/M sum_i q(v; m_i), clipped pixels with their probabilities |
| smooth noise; noise on other images | w | around m_0 | the same of the mean of w alone, N(m, s^2 b^2 / N) |
| edges; other images without noise | i | softmax_i(-N snr (m_i - m_0)^2 / 2) | log M + sum_i q_i log q_i |
| nothing (s = 0) | - | - | 0: of mean one, v is 1 |
| the image itself | - | - | 0: the likelihood is one given v and m_0, see `Process.condition` |

A linear pattern multiplies constant noise by a factor b, and the rest of w does not depend on m: so no density of the
pattern is needed. Edges and images without noise determine m exactly, so that m_0 itself, which is none of the m_i,
would have infinite cost; inference draws an m_i close to it, to the resolution that the noise of the finest scale
allows (snr = lambda^2 / gamma^2 there). Then w_i = 1 for that i.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dpm_scales.errors import UserError, require
from dpm_scales.operators import Operator
from dpm_scales.priors import DCT, DataPrior, GaussianPrior, OsmosisPrior, Prior, as_osmosis
from dpm_scales.processes import Context, Osmosis, Process
from dpm_scales.rng import CounterRNG


@dataclass(frozen=True)
class Start:
    """The mixture of Gaussians of a prior, for one batch of images and their context."""

    process: Process
    prior: Prior
    operator: Operator
    #: log w_i, float64, ``(B | 1, M)``
    log_weights: Tensor
    #: r, the prior's noise over the process's own
    ratio: float
    #: cost of the context, float64 ``(B,)`` nats
    context_cost: Tensor
    #: m_i of a `OsmosisPrior`, ``(B | 1, M, C)``
    grey: Tensor | None = None

    def negative_log_density(self, y: Tensor) -> Tensor:
        """Return -log p of z = gamma_1^{-1}(L) y, float64 ``(B,)``, for y ``(B, C, H, W)`` in whitened coordinates."""
        constant = y[0].numel() * (math.log(self.ratio) + 0.5 * math.log(2 * math.pi))
        return constant - torch.logsumexp(self.log_weights - self._distances(y) / 2, 1)

    def divergence(self, mean: Tensor) -> Tensor:
        """Return the bound on KL(N(mean, gamma_1^2) || p), float64 ``(B,)`` nats; mean ``(B, C, H, W)``, whitened."""
        constant = 0.5 * mean[0].numel() * (1 / self.ratio**2 - 1 + 2 * math.log(self.ratio))
        return constant - torch.logsumexp(self.log_weights - self._distances(mean) / 2, 1)

    def _distances(self, y: Tensor) -> Tensor:
        """Return D_i(y), ``(B, M)``."""
        one = torch.ones((), dtype=torch.float64, device=y.device)
        y = y.to(torch.float64)
        if isinstance(self.prior, DataPrior):
            distances = _to_blurred_images(self.prior, self.process, self.operator, y, one)
        elif self.grey is not None:
            distances = _to_steady_states(self.grey, self.process, self.operator, y, one)
        else:
            white = self.operator.apply(lambda mu: 1 / self.process.noise_scale(one, mu), y)
            distances = white.square().flatten(1).sum(1, keepdim=True)
        return distances / self.ratio**2


def start_law(prior: Prior, process: Process, x_0: Tensor, noise: CounterRNG) -> tuple[Start, Context]:
    """Return the law of y_1, and a context for each image, drawn from the inference law q(z | x_0).

    Args:
        x_0: images ``(B, C, H, W)`` in the process's value range.
        noise: used where the process has a context.

    Raises: UserError for a prior that has no density (`noise_ratio` 0), was not fitted, or was fitted to other sizes.
    """
    channels, size = x_0.shape[1], (x_0.shape[-2], x_0.shape[-1])
    prior.check_kind(process)
    prior.check_size(size)
    zero = torch.zeros(x_0.shape[0], dtype=torch.float64, device=x_0.device)
    if isinstance(prior, GaussianPrior):
        return Start(process, prior, process.operator(), zero[:1, None], 1.0, zero), None
    if not isinstance(prior, DataPrior | OsmosisPrior):
        raise UserError(f"the density of the prior {type(prior).__name__} is not known, so there is no likelihood")
    stored = prior.coefficients if isinstance(prior, DataPrior) else prior.grey
    name, count = type(prior).__name__, len(stored)
    require(count > 0, f"{name}: no training images stored yet; train the model first")
    require(
        prior.ratio(process) > 0,
        f"{name}: noise_ratio=0 leaves no density at scale 1, so there is no likelihood; raise it",
    )
    require(stored.shape[1] == channels, f"{name} has images of {stored.shape[1]} channel(s), not of {channels}")
    equal = torch.full((1, count), -math.log(count), dtype=torch.float64, device=x_0.device)
    if isinstance(prior, DataPrior):
        return Start(process, prior, process.operator(), equal, prior.ratio(process), zero), None
    log_weights, cost, grey, context = _guidance(as_osmosis(process), prior, x_0, noise)
    return Start(process, prior, process.operator(context), log_weights, prior.ratio(process), cost, grey), context


def _guidance(
    process: Osmosis, prior: OsmosisPrior, x_0: Tensor, noise: CounterRNG
) -> tuple[Tensor, Tensor, Tensor, Context]:
    """Return log w_i, the cost of the context, the m_i, and the context, by the table above."""
    own, known, shape = x_0.mean((-2, -1)), prior.grey.to(torch.float64), tuple(x_0.shape[1:])
    count, std = len(known), process.guidance.noise
    zero = torch.zeros(len(x_0), dtype=torch.float64, device=x_0.device)
    equal = (zero[:1, None] - math.log(count)).expand(1, count)
    if process.guidance.image == "own":
        context = process.draw_guidance(own, noise.normal(shape, x_0.dtype), process.guidance_detail(x_0))
        return zero[:1, None], zero, own[:, None], context
    relief = None
    if process.guidance.image == "other":
        relief = prior.relief[(noise.uniform() * len(prior.relief)).long()].to(x_0.dtype)
    if std == 0 and relief is None:
        return equal, zero, known[None], process.draw_guidance(own, noise.normal(shape, x_0.dtype))
    if std == 0 or process.guidance.pattern == "edges":
        index, cost = _grey_near(process, own, known, math.prod(shape[1:]), noise)
        context = process.draw_guidance(prior.grey[index].to(x_0.dtype), noise.normal(shape, x_0.dtype), relief)
        return zero[:1, None], cost, known[index][:, None], context
    white = noise.normal(shape, x_0.dtype)
    context = process.draw_guidance(own, white, relief)
    if process.guidance.pattern == "white" and relief is None:
        log_densities = _log_guidance_densities(process, context, prior.grey)
        log_density = _log_guidance_densities(process, context, own, paired=True)
    else:
        log_densities, log_density = _log_mean_densities(process, own, known, white)
    log_total = torch.logsumexp(log_densities, 1)
    return log_densities - log_total[:, None], log_density - log_total + math.log(count), known[None], context


def _grey_near(process: Osmosis, own: Tensor, known: Tensor, pixels: int, noise: CounterRNG) -> tuple[Tensor, Tensor]:
    """Draw indices ``(B,)`` of intensities `known` ``(M, C)`` near `own` ``(B, C)``; return them, and the cost."""
    finest = torch.ones((), dtype=torch.float64, device=own.device) / process.num_scales
    snr = torch.exp(process.log_snr(finest, torch.zeros_like(finest)))
    log_q = torch.log_softmax(-0.5 * pixels * snr * _squared_distances(own.to(torch.float64), known), 1)
    q = log_q.exp()
    cost = (q * log_q).sum(1) + math.log(len(known))
    index = torch.searchsorted(q.cumsum(1), noise.uniform()[:, None])[:, 0]
    return index.clamp(max=len(known) - 1), cost


def _log_mean_densities(process: Osmosis, own: Tensor, known: Tensor, white: Tensor) -> tuple[Tensor, Tensor]:
    """Return log densities of the mean of the unclipped guidance, drawn around `own` ``(B, C)``, under the values
    `known` ``(M, C)`` and under its own, ``(B, M)`` and ``(B,)``, up to one common constant."""
    low, high = process.value_range
    drawn = process.guidance.noise * white.to(torch.float64).mean((-2, -1))  # times b, as the standard deviation
    gain = process.guidance.patterned(torch.ones_like(white[:1], dtype=torch.float64)).mean()
    variance = (process.guidance.noise * gain) ** 2 / white[0, 0].numel()
    place = (own.to(torch.float64) - low) / (high - low) + gain * drawn
    squares = _squared_distances(place, (known - low) / (high - low))
    return -squares / (2 * variance), -(gain * drawn).square().sum(1) / (2 * variance)


def _log_guidance_densities(process: Osmosis, v: Tensor, mean: Tensor, paired: bool = False) -> Tensor:
    """Return log q(v; m) up to a constant that does not depend on m.

    v = clip(g + s eps, low, 1) has a density between the bounds, and point masses at them. Between the bounds the
    number of pixels, their sum and the sum of their squares are sufficient.

    Args:
        v: guidance images ``(B, C, H, W)``.
        mean: mean intensities m ``(M, C)`` in the value range, or with `paired` ``(B, C)``, one for each image.

    Returns: float64 ``(B, M)``, with `paired` ``(B,)``.
    """
    low, high = process.value_range
    std, least = process.guidance.noise, process.guidance.minimum
    grey = (mean.to(v.dtype) - low) / (high - low)  # rounded as `Osmosis.draw_guidance` rounds it
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
    """Return squared distances to lambda_1(L) x_i in units of gamma_1; coefficients of x_i not stored are 0."""
    mu = operator.eigenvalues(y.shape[-2], y.shape[-1], y.device)
    noise = process.noise_scale(one, mu).expand(mu.shape)
    rows, columns = prior.coefficients.shape[-2:]
    kept = (slice(None), slice(None), slice(rows), slice(columns))
    scale = (process.signal_scale(one, mu) / noise)[:rows, :columns]
    centres = scale * prior.coefficients.to(torch.float64)
    u = DCT.analysis(y) / noise
    rest = u.square().flatten(1).sum(1) - u[kept].square().flatten(1).sum(1)
    return rest[:, None] + _squared_distances(u[kept].flatten(1), centres.flatten(1))


def _to_steady_states(grey: Tensor, process: Process, operator: Operator, y: Tensor, one: Tensor) -> Tensor:
    """Return squared distances to lambda_1(0) m_i sqrt(v) in units of gamma_1: along sqrt(v), plus orthogonal to it."""
    zero = torch.zeros((), dtype=torch.float64, device=y.device)
    noise = process.noise_scale(one, zero)
    mode = operator.to_pixels(torch.ones_like(y)) / math.sqrt(y.shape[-2] * y.shape[-1])
    along = (y * mode).sum((-2, -1))
    across = (y - along[..., None, None] * mode).square().flatten(1).sum(1)
    scale = process.signal_scale(one, zero) * math.sqrt(y.shape[-2] * y.shape[-1])
    distances = _squared_distances(along[:, None], scale * grey.to(torch.float64))[:, 0]
    return (across[:, None] + distances) / noise**2


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """Return ``(..., B, M)`` from ``(..., B, n)`` and ``(..., M, n)``, without the cancellation of a matrix product."""
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist").square()
