"""Grids: the scales that a sampler visits, from 1 down to 0."""

from __future__ import annotations

from collections.abc import Callable
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from dpm_scales.errors import UserError
from dpm_scales.processes import Process

NO_SIGNAL = 1e6
"""gamma / lambda above which a scale shows nothing of the image: grids by noise level leave it out."""

GRIDS = ("uniform", "quadratic", "karras", "logsnr")

_found: WeakKeyDictionary[Process, dict[tuple[object, ...], Tensor]] = WeakKeyDictionary()
"""Cache of the scales of noise levels, by process: 60 bisection steps, which each sampling would repeat three times."""


def tables_of(process: Process) -> torch.device | None:
    """Return the device of a process's curves, on which grids are computed before they move to that of the images."""
    return next((buffer.device for buffer in process.buffers()), None)


def uniform_grid(process: Process, steps: int, device: torch.device | str | None = None) -> Tensor:
    """Return ``(steps + 1,)`` scales from 1 to 0, equally spaced, each a multiple of 1 / num_scales; float64."""
    k = torch.linspace(process.num_scales, 0, steps + 1, dtype=torch.float64, device=device)
    return k.round() / process.num_scales


def quadratic_grid(process: Process, steps: int, device: torch.device | str | None = None) -> Tensor:
    """Return scales with sqrt(k - 1) equally spaced from t = 1 to k = 1, then 0: finer steps near the image.

    (Song et al. 2021, DDIM, App. D.2, who count scales from 0 and use tau_i = c i^2.)
    """
    full = torch.linspace(1, 0, steps, dtype=torch.float64, device=device)
    ts = (1 + (process.num_scales - 1) * full**2) / process.num_scales
    return torch.cat([ts, torch.zeros_like(ts[:1])])


def karras_grid(process: Process, steps: int, rho: float = 7.0, device: torch.device | str | None = None) -> Tensor:
    """Return EDM's grid: (gamma / lambda)^(1/rho) equally spaced from t = 1 to k = 1, then 0 (Karras et al. 2022, (5)).

    Raises: UserError if gamma / lambda does not grow strictly, since t is then not a function of the noise level.
    """
    first, last = _ends(process, "karras")
    progress = _progress(first, steps)
    return _at_levels(process, (last ** (1 / rho) + progress * (first ** (1 / rho) - last ** (1 / rho))) ** rho, device)


def logsnr_grid(process: Process, steps: int, device: torch.device | str | None = None) -> Tensor:
    """Return scales with log(gamma / lambda) equally spaced from t = 1 to k = 1, then 0 (Lu et al. 2022).

    Raises: UserError as `karras_grid` does.
    """
    first, last = _ends(process, "logsnr")
    return _at_levels(process, torch.exp(torch.lerp(last.log(), first.log(), _progress(first, steps))), device)


def _progress(like: Tensor, steps: int) -> Tensor:
    """Return `steps` numbers from 0 to 1, equally spaced."""
    full = torch.linspace(0, 1, steps, dtype=torch.float64, device=like.device)
    return full if steps > 1 else torch.zeros_like(full)


def _ends(process: Process, name: str) -> tuple[Tensor, Tensor]:
    """Return gamma / lambda at k = 1 and at t = 1, or at the scale before it if no signal is left at t = 1."""
    ends = torch.tensor([1 / process.num_scales, 1.0], dtype=torch.float64, device=tables_of(process))
    smallest, largest = process.noise_level(ends)
    if bool(largest > NO_SIGNAL):
        largest = process.noise_level(ends[1:] - ends[0])[0]
    if not bool(largest > smallest * (1 + 1e-6)) or not bool(torch.isfinite(largest)):
        raise UserError(
            f"the {name} grid needs noise that grows with t, and that of {type(process).__name__} does not; "
            "set sampler.grid=uniform"
        )
    return smallest, largest


def _at_levels(process: Process, wanted: Tensor, device: torch.device | str | None) -> Tensor:
    """Return the scales at the noise levels `wanted`, the first replaced by 1, followed by 0."""
    found, key = _found.setdefault(process, {}), (wanted.device, *wanted.tolist())
    if key not in found:
        found[key] = scales_at(process.noise_level, wanted, 1 / process.num_scales)
    ts = found[key].clone()
    ts[0] = 1.0
    return torch.cat([ts, torch.zeros_like(ts[:1])]).to(device)


def scales_at(level: Callable[[Tensor], Tensor], wanted: Tensor, smallest: float) -> Tensor:
    """Return the t in [smallest, 1] at which an increasing `level` reaches the values `wanted`, clipped to the ends."""
    low, high = torch.full_like(wanted, smallest), torch.ones_like(wanted)
    for _ in range(60):  # bisection: to the last bit of a float64
        middle = (low + high) / 2
        above = level(middle) > wanted
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    return (low + high) / 2
