r"""Inference of the guidance images of osmosis, for the likelihood.

The context is also a latent variable z of the model, p(x_0) = sum over z of p(z) p(x_0 | z), and inference may draw it
from any law q(z | x_0) at the cost KL(q || p). White noise, and patterns of other images, have the same law in both and
cost nothing; inference uses the mean intensity m_0 of the image, while the model draws one of the stored m_i. With s
the noise of the guidance, M stored values, N pixels, and w the guidance before clipping:

| guidance | z | q(z given x_0) | cost, in nats |
|---|---|---|---|
| white noise | v | around m_0 | log q(v; m_0) - log 1/M sum_i q(v; m_i), clipped pixels with their probabilities |
| smooth noise; noise on other images | w | around m_0 | the same for the mean of w alone, N(m, s^2 b^2 / N) |
| edges; other images without noise | i | softmax_i(-N snr (m_i - m_0)^2 / 2) | log M + sum_i q_i log q_i |
| nothing (s = 0) | - | - | 0: with mean one, v is 1 |
| the image itself | - | - | 0: the likelihood is conditional on v and m_0, see `Process.condition` |

A linear pattern multiplies constant noise by a factor b, and the rest of w does not depend on m, so no density of the
pattern is needed. Edges and images without noise determine m exactly, so m_0 itself, which is not one of the m_i, would
have infinite cost; inference draws an m_i close to it, to the resolution that the noise of the finest scale allows
(snr = lambda^2 / gamma^2 there). Then w_i = 1 for that i.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dpm_scales.priors.start import squared_distances
from dpm_scales.processes import Context, Osmosis
from dpm_scales.rng import CounterRNG


@dataclass(frozen=True)
class Known:
    """Summary of a prior's M training images: m_i ``(M, C)``, guidance detail ``(M, C, H, W)`` or ``(0, ...)``, and
    log 1/M ``(1, M)``."""

    grey: Tensor
    relief: Tensor
    equal: Tensor


def infer_guidance(
    process: Osmosis, stored: Known, x_0: Tensor, noise: CounterRNG
) -> tuple[Tensor, Tensor, Tensor, Context]:
    """Return log w_i ``(B | 1, M)``, the context's cost ``(B,)``, the m_i ``(B | 1, M, C)``, and the context.

    They follow the table above, for images ``(B, C, H, W)``. M is 1 where inference fixes m.
    """
    own, known, shape = x_0.mean((-2, -1)), stored.grey.to(torch.float64), tuple(x_0.shape[1:])
    count, std = len(known), process.guidance.noise
    zero = torch.zeros(len(x_0), dtype=torch.float64, device=x_0.device)
    if process.guidance.image == "own":
        context = process.draw_guidance(own, noise.normal(shape, x_0.dtype), process.guidance_detail(x_0))
        return zero[:1, None], zero, own[:, None], context
    relief = None
    if process.guidance.image == "other":
        relief = stored.relief[(noise.uniform() * len(stored.relief)).long()].to(x_0.dtype)
    if std == 0 and relief is None:
        return stored.equal, zero, known[None], process.draw_guidance(own, noise.normal(shape, x_0.dtype))
    if std == 0 or process.guidance.pattern == "edges":
        index, cost = _grey_near(process, own, known, math.prod(shape[1:]), noise)
        context = process.draw_guidance(stored.grey[index].to(x_0.dtype), noise.normal(shape, x_0.dtype), relief)
        return zero[:1, None], cost, known[index][:, None], context
    white = noise.normal(shape, x_0.dtype)
    context = process.draw_guidance(own, white, relief)
    if process.guidance.pattern == "white" and relief is None:
        log_densities = _log_guidance_densities(process, context, stored.grey)
        log_density = _log_guidance_densities(process, context, own, paired=True)
    else:
        log_densities, log_density = _log_mean_densities(process, own, known, white)
    log_total = torch.logsumexp(log_densities, 1)
    return log_densities - log_total[:, None], log_density - log_total + math.log(count), known[None], context


def _grey_near(process: Osmosis, own: Tensor, known: Tensor, pixels: int, noise: CounterRNG) -> tuple[Tensor, Tensor]:
    """Draw indices of intensities `known` ``(M, C)`` near `own` ``(B, C)``; return them and the cost, both ``(B,)``."""
    finest = torch.ones((), dtype=torch.float64, device=own.device) / process.num_scales
    snr = torch.exp(process.log_snr(finest, torch.zeros_like(finest)))
    log_q = torch.log_softmax(-0.5 * pixels * snr * squared_distances(own.to(torch.float64), known), 1)
    q = log_q.exp()
    cost = (q * log_q).sum(1) + math.log(len(known))
    index = torch.searchsorted(q.cumsum(1), noise.uniform()[:, None])[:, 0]
    return index.clamp(max=len(known) - 1), cost


def _log_mean_densities(process: Osmosis, own: Tensor, known: Tensor, white: Tensor) -> tuple[Tensor, Tensor]:
    """Return log densities of the mean of the unclipped guidance, drawn around `own` ``(B, C)``, given each of `known`
    ``(M, C)`` and given `own`: ``(B, M)`` and ``(B,)``, up to a common constant."""
    low, high = process.value_range
    drawn = process.guidance.noise * white.to(torch.float64).mean((-2, -1))  # times b, as the standard deviation
    gain = process.guidance.patterned(torch.ones_like(white[:1], dtype=torch.float64)).mean()
    variance = (process.guidance.noise * gain) ** 2 / white[0, 0].numel()
    place = (own.to(torch.float64) - low) / (high - low) + gain * drawn
    squares = squared_distances(place, (known - low) / (high - low))
    return -squares / (2 * variance), -(gain * drawn).square().sum(1) / (2 * variance)


def _log_guidance_densities(process: Osmosis, v: Tensor, mean: Tensor, paired: bool = False) -> Tensor:
    """Return log q(v; m) up to a constant that does not depend on m.

    v = clip(g + s eps, low, 1) has a density between the bounds, and point masses at them. Between the bounds the
    number of pixels, their sum and the sum of their squares are sufficient statistics.

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
