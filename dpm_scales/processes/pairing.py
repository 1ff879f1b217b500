r"""Pair each image with the nearest of K noise draws (Li et al. 2025, arXiv 2505.18521).

The distance is taken in the coordinates in which the noise is white, so that colour reduces to white noise:

    | w_t(L)^-1 lambda_t(L) y_0 - eps_k |^2,    gamma_t(mu) = gamma_t w_t(mu)

Image and noise are then no longer independent, and y_t no longer has the law of scale t given y_0. Along the image's
direction eps is the largest of K normal numbers if |w^-1 lambda y_0| is large; in other directions it is nearly normal.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dpm_scales.operators import Operator
from dpm_scales.processes.law import Process
from dpm_scales.processes.steps import Scale, as_scale
from dpm_scales.rng import Randomness, white_noise


def nearest_noise(
    process: Process, operator: Operator, y_0: Tensor, t: Scale, randomness: Randomness, candidates: int
) -> Tensor:
    """Draw `candidates` white noise images for each image and return the nearest: eps ``(B, C, H, W)``.

    The first candidate is that of `white_noise`, so one candidate gives the usual noise. Two are held in memory at a
    time.

    Args:
        operator: L, as `Process.operator` returns it for the images' context.
        y_0: images ``(B, C, H, W)`` in whitened coordinates.
        t: ``()`` or ``(B,)``.
        candidates: K >= 1.
    """
    nearest = white_noise(y_0, randomness)
    if candidates == 1:
        return nearest
    mean = operator.apply(process.white_signal(as_scale(t, y_0)), y_0)
    least = _distance(nearest, mean)
    for _ in range(candidates - 1):
        noise = white_noise(y_0, randomness)
        distance = _distance(noise, mean)
        nearest = torch.where((distance < least)[:, None, None, None], noise, nearest)
        least = torch.minimum(distance, least)
    return nearest


def _distance(noise: Tensor, mean: Tensor) -> Tensor:
    """Return |noise - mean|^2 - |mean|^2 of each image, ``(B,)``: the part that depends on the noise."""
    return (noise * (noise - 2 * mean)).flatten(1).sum(1)
