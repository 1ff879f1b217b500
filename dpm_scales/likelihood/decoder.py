r"""The last term, -log P(x_0 | y) for y at the finest scale: a Gaussian, integrated over the bin of each value.

    P(x_0 | y) = prod_i  Phi((x_i + delta/2 - m_i) / std_i) - Phi((x_i - delta/2 - m_i) / std_i)

(Ho et al. 2020, Eq. (13)). x_i is one of `levels` equally spaced values, delta their spacing; the bins of the lowest
and of the highest value extend to infinity. So the probabilities of all images sum to 1 for any m and std that are
functions of y (and of the context) and not of x_0: any such choice gives a bound, and a worse choice only a looser one.
Under blur the noise at that scale, mapped back to the image, is correlated between pixels; this decoder treats it as
independent.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dpm_scales.denoisers import BaseDenoiser
from dpm_scales.errors import require_number
from dpm_scales.moments import Moments
from dpm_scales.operators import Operator
from dpm_scales.processes import Context


def negative_log_likelihood(
    x_0: Tensor, mean: Tensor, std: Tensor, value_range: tuple[float, float], levels: int | None = 256
) -> Tensor:
    """Return -log P(x_0) in nats for each image.

    Args:
        x_0: ``(B, C, H, W)``, values low + k (high - low) / (levels - 1), up to rounding.
        mean, std: ``(B | 1, C | 1, H | 1, W | 1)`` in units of the value range, std > 0.
        levels: number of values, or None for continuous data, which gives minus the log density of N(mean, std^2).

    Returns: float64 ``(B,)``.
    """
    x, mean, std = (v.to(torch.float64) for v in (x_0, mean, std))
    z = (x - mean) / std
    if levels is None:
        return (0.5 * z**2 + std.log() + 0.5 * math.log(2 * math.pi)).flatten(1).sum(1)
    low, high = value_range
    half = 0.5 * (high - low) / (levels - 1) / std
    bin_number = ((x - low) / (high - low) * (levels - 1)).round()
    # mirrored, so that both ends lie where log_ndtr is accurate
    upper, lower = torch.special.log_ndtr(half - z.abs()), torch.special.log_ndtr(-half - z.abs())
    inner = upper + torch.log1p(-torch.exp(lower - upper))
    log_p = torch.where(bin_number <= 0, torch.special.log_ndtr(z + half), inner)
    log_p = torch.where(bin_number >= levels - 1, torch.special.log_ndtr(half - z), log_p)
    return -log_p.flatten(1).sum(1)


def wiener_std(denoiser: BaseDenoiser, operator: Operator, t: Tensor, like: Tensor) -> Tensor:
    """Return the decoder's default standard deviation, in pixels: ``(B, C, H, W)``, the shape of `like`.

    It is the root mean square error of the linear (Wiener) estimate of x_0 from y_t for data of the denoiser's
    spectrum, in whitened coordinates; in pixels this is multiplied by sqrt(v) under osmosis.

    Args:
        t: ``()``, the finest scale.
        like: images ``(B, C, H, W)``.
    """
    size = (like.shape[-2], like.shape[-1])
    m = Moments(denoiser.process, operator, t.reshape(1), denoiser.spectrum, size)
    return operator.to_pixels(m.wiener_residual.sqrt().to(like.dtype) * torch.ones_like(like))


def check_decoder(std: float | None, levels: int | None) -> None:
    """Raise UserError for invalid options of the decoder."""
    if std is not None:
        require_number("likelihood: decoder_std", std, 1e-12)
    if levels is not None:
        require_number("likelihood: levels", levels, 2, whole=True)


def decode(
    denoiser: BaseDenoiser,
    operator: Operator,
    y: Tensor,
    t: Tensor,
    x_0: Tensor,
    context: Context = None,
    labels: Tensor | None = None,
    std: float | None = None,
    levels: int | None = 256,
) -> Tensor:
    """Return -log P(x_0 | y) in nats for y at the finest scale t, float64 ``(B,)``.

    The mean is the result of a sampler's last step, the estimate of the image at scale 0: x_0-hat, with full contrast.

    Args:
        std: standard deviation in whitened coordinates and units of the value range; None for `wiener_std`.
    """
    mean = operator.to_pixels(denoiser.predict_mean(y, t, torch.zeros_like(t), context, labels))
    if std is None:
        spread = wiener_std(denoiser, operator, t, x_0)
    else:
        spread = operator.to_pixels(torch.full_like(x_0, std))
    return negative_log_likelihood(x_0, mean, spread, denoiser.process.value_range, levels)
