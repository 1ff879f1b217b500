r"""Measures of a scale-space evolution: variance, entropies, bounds of the reverse process.

Entropies are in nats per image channel, for pixels in the process's value range; all are float64. Functions of a
process are closed forms; functions of images are measurements.

    H(U_t | U_0)                          conditional entropy, Eq. (42), Peter 2024
    H(U_t | U_s) + H(U_s | U_0) - H(U_t | U_0)  <=  H(U_s | U_t)  <=  H(U_t | U_s)       Sohl-Dickstein et al. 2015

The lower bound on the reverse step's entropy always holds: it is H(U_s | U_t, U_0). The upper one requires
H(U_t) >= H(U_s), which fails under blur with little noise.

Closed forms are sums over the operator's eigenvalues. For osmosis those of the constant guidance image replace those
of the actual one. That is exact where the noise does not depend on the eigenvalue, as for gamma_t of white noise; the
noise added by one step depends on it, so results for steps are approximations (8 x 8 pixels, guidance noise 0.1:
-234.19 nats instead of -234.36, and -201.32 instead of -201.34).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dpm_scales.errors import UserError, require

if TYPE_CHECKING:
    from dpm_scales.processes import Process

Size = tuple[int, int]
_GAUSSIAN = 0.5 * math.log(2 * math.pi * math.e)


def image_variance(x: Tensor) -> Tensor:
    """Return the variance of pixels over the image, mean of channels: ``(..., C, H, W)`` to ``(...)``, float64."""
    return x.to(torch.float64).var((-2, -1), unbiased=False).mean(-1)


def average_grey(x: Tensor) -> Tensor:
    """Return the mean of all pixels and channels: ``(..., C, H, W)`` to ``(...)``, float64."""
    return x.to(torch.float64).mean((-3, -2, -1))


def relative_entropy(u: Tensor, steady_state: Tensor) -> Tensor:
    """Return -sum u ln(u / w), Eq. (50), of images u >= 0, steady state w > 0: ``(..., C, H, W)`` to ``(..., C)``.

    It increases along osmosis, up to 0 when u reaches w. A pixel of value 0 contributes 0.

    Raises: UserError for negative values.
    """
    u, w = u.to(torch.float64), steady_state.to(torch.float64)
    if u.device.type == "cpu" and (bool((u < 0).any()) or bool((w <= 0).any())):
        raise UserError("relative entropy needs images >= 0 and a steady state > 0; clip or shift the values")
    return -torch.special.xlogy(u, u / w).sum((-2, -1))


def entropy_increments(process: Process, scales: Tensor, size: Size) -> Tensor:
    """Return H(U_t | U_0) - H(U_s | U_0) of successive scales, ``(T - 1,)``; >= 0: Lyapunov property (Prop. 3, 7).

    Differences are taken before the sum over eigenvalues, so that large equal parts cancel first. NaN where neither
    scale has noise; inf where only the first has none.
    """
    _check(scales)
    mu = process.operator().eigenvalues(size[0], size[1], scales.device)
    logs = torch.stack([process.log_noise_scale(t, mu).expand(size) for t in scales])
    return logs.diff(dim=0).sum((-2, -1))


def step_entropy(process: Process, s: Tensor, t: Tensor, size: Size) -> Tensor:
    """Return H(U_t | U_s), the entropy of the forward step between scales s < t: ``()``; -inf if it adds no noise.

    For osmosis with a guidance image that is not constant this is an approximation, see above.
    """
    mu = process.operator().eigenvalues(size[0], size[1], t.device)
    std = process.step(s, t).transition_std(mu).expand(size)
    return (_GAUSSIAN + std.log()).sum()


def reverse_entropy_bounds(process: Process, scales: Tensor, size: Size) -> tuple[Tensor, Tensor]:
    """Return the lower and upper bound on H(U_s | U_t) for successive scales s < t, ``(T - 1,)``, whitened.

    -inf where a step adds no noise; NaN where it is undefined (no noise at all). For osmosis with a guidance image that
    is not constant this is an approximation, see above.
    """
    _check(scales)
    steps = [step_entropy(process, s, t, size) for s, t in zip(scales, scales[1:], strict=False)]
    upper = torch.stack(steps) if steps else scales.new_zeros(0)
    return upper - entropy_increments(process, scales, size), upper


def _check(scales: Tensor) -> None:
    require(scales.ndim == 1 and len(scales) >= 1, f"scales must be (T,), got shape {tuple(scales.shape)}")
