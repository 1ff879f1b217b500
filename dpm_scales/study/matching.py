r"""Fit schedules that make one process correspond to another: "blurring diffusion as an approximation of osmosis".

The fit compares the energy of the images in octaves of frequency, E_o(t): the squared DCT coefficients, summed over
an octave and averaged over images and channels. For the process to be matched, this energy is measured on its images.
The fitted process blurs and adds white noise of one level,

    E_o(t) = sum_{mu in o} exp(-2 mu T) P(mu) + gamma^2 n_o,      P the energy of the images at frequency mu,

so that two numbers are fitted at each time, T and gamma. They minimise the sum over octaves of the squared logarithm
of the ratio of both energies ("octaves"), or equate the total energies at a given blur T ("variance"). A Markov chain
needs gamma and T that never decrease: a smaller value is raised to the previous one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dpm_scales.errors import UserError, require, suggest
from dpm_scales.operators import HeatOperator

CRITERIA = ("octaves", "variance", "snr")
_GRID = 400
_NOISE_FLOOR = 1e-4
"""Smallest fitted noise level, where white is 1; far below the resolution of 8 bits."""


def octave_index(height: int, width: int, device: torch.device | str | None = None) -> Tensor:
    """Return the octave of each DCT coefficient, int64 ``(H, W)``: 0 for the mean, 1 for the coarsest octave.

    Octave k >= 1 contains sqrt(mu) in [w / 2, w), w = 2^k w_1 / 2, with w_1 the lowest frequency of the longer side;
    frequencies above pi belong to the last octave that reaches pi.
    """
    mu = HeatOperator().eigenvalues(height, width, device)
    lowest = math.pi / max(height, width)
    last = max(1, math.ceil(math.log2(math.pi / lowest)))
    octave = torch.floor(0.5 * torch.log2(mu.clamp(min=1e-30) / lowest**2) + 1e-9).clamp(min=0, max=last - 1) + 1
    return torch.where(mu > 0, octave, 0).long()


def octave_sums(power: Tensor, index: Tensor) -> Tensor:
    """Return the sums ``(..., octaves)`` of ``(..., H, W)`` over each octave."""
    sums = power.new_zeros(*power.shape[:-2], int(index.max()) + 1)
    return sums.index_add_(-1, index.flatten(), power.flatten(-2))


@dataclass(frozen=True)
class Match:
    """Fitted schedule, with one entry for each time.

    Attributes:
        dissipation_times: T in px^2.
        noise_stds: gamma, where white is 1.
        fitted, wanted: energies per octave ``(T, octaves)``, without the mean.
        error: root mean square, over the octaves, of the natural logarithm of their ratio.
    """

    dissipation_times: list[float]
    noise_stds: list[float]
    fitted: Tensor
    wanted: Tensor
    error: list[float]


def fit_blur_and_noise(
    wanted: Tensor, power: Tensor, times: Sequence[float], criterion: str = "octaves", largest_time: float = 1e5
) -> Match:
    """Fit T and gamma at each time; return the fitted schedule.

    Args:
        wanted: energies per octave of the process to be matched, ``(T, octaves)``, where octave 0 is the mean and
            white is 1.
        power: energy of the clean images at each frequency, ``(H, W)``, same units.
        times: T at each time, for the criterion "variance".
        criterion: "octaves" or "variance".
        largest_time: largest T tried.

    Raises: UserError for another criterion.
    """
    if criterion not in ("octaves", "variance"):
        raise UserError(f"unknown criterion {criterion!r}: {suggest(criterion, ('octaves', 'variance'))}")
    blurred, number = _model(power)
    goal = wanted.to(torch.float64)[:, 1:]
    floor, grid = _NOISE_FLOOR, torch.logspace(-2, math.log10(largest_time), _GRID, dtype=torch.float64)
    candidates = torch.cat([torch.zeros(1, dtype=torch.float64), grid]).to(power.device)
    table = torch.stack([blurred(t) for t in candidates])
    levels = torch.logspace(math.log10(floor), 1, _GRID, dtype=torch.float64, device=power.device)
    chosen_times, chosen_noise, fitted = [], [], []
    least_time = least_noise = 0.0
    for k, energies in enumerate(goal):
        if criterion == "variance":
            time = torch.tensor(max(float(times[k]), least_time), dtype=torch.float64, device=power.device)
            missing = (energies.sum() - blurred(time).sum()) / number.sum()
            noise = max(float(missing.clamp(min=floor**2).sqrt()), least_noise)
        else:
            grid_time, noise = _best(table, candidates, levels, number, energies, least_time, least_noise)
            time = torch.tensor(grid_time, dtype=torch.float64, device=power.device)
        least_time, least_noise = float(time), noise
        chosen_times.append(float(time))
        chosen_noise.append(noise)
        fitted.append(blurred(time) + noise**2 * number)
    result = torch.stack(fitted)
    return Match(chosen_times, chosen_noise, result, goal, _error(result, goal))


def fit_error(power: Tensor, wanted: Tensor, times: Sequence[float], noise: float) -> list[float]:
    """Return the error, as in `Match`, of blur with the given times T and one noise level."""
    blurred, number = _model(power)
    at = torch.tensor(list(times), dtype=torch.float64, device=power.device)
    return _error(torch.stack([blurred(t) for t in at]) + noise**2 * number, wanted.to(torch.float64)[:, 1:])


def _model(power: Tensor) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """Return a function from T ``()`` to energies ``(octaves - 1,)`` after blurring, and the sizes of the octaves."""
    power = power.to(torch.float64)
    index = octave_index(power.shape[-2], power.shape[-1], power.device)
    mu = HeatOperator().eigenvalues(power.shape[-2], power.shape[-1], power.device)

    def blurred(time: Tensor) -> Tensor:
        return octave_sums(power * torch.exp(-2 * mu * time), index)[1:]

    return blurred, octave_sums(torch.ones_like(power), index)[1:]


def _error(found: Tensor, wanted: Tensor) -> list[float]:
    return (found / wanted.clamp(min=1e-300)).log().square().mean(-1).sqrt().tolist()


def _best(
    table: Tensor,
    times: Tensor,
    levels: Tensor,
    number: Tensor,
    wanted: Tensor,
    least_time: float,
    least_noise: float,
) -> tuple[float, float]:
    """Return the (T, gamma) whose log energies are nearest, by a grid search that is refined around its best point."""
    allowed = levels.clamp(min=max(least_noise, _NOISE_FLOOR)).unique()
    rows = table[times >= least_time]
    kept = times[times >= least_time]
    if len(kept) == 0:
        rows, kept = table[-1:], times[-1:]
    for _ in range(3):
        energies = rows[:, None] + allowed[:, None] ** 2 * number
        loss = (energies / wanted.clamp(min=1e-300)).log().square().sum(-1)
        place = int(loss.argmin())
        i, j = divmod(place, len(allowed))
        best = float(kept[i]), float(allowed[j])
        low, high = float(allowed[max(j - 1, 0)]), float(allowed[min(j + 1, len(allowed) - 1)])
        allowed = torch.linspace(low, high, 41, dtype=torch.float64, device=wanted.device)
        before, after = max(i - 1, 0), min(i + 1, len(kept) - 1)
        weights = torch.linspace(0, 1, 21, dtype=torch.float64, device=wanted.device)
        # between neighbours on the grid, the logarithms of the energies are nearly linear
        left = torch.exp(torch.lerp(_log(rows[before]), _log(rows[i]), weights[:, None]))
        right = torch.exp(torch.lerp(_log(rows[i]), _log(rows[after]), weights[:, None]))
        spots = [torch.lerp(kept[a], kept[b], weights) for a, b in ((before, i), (i, after))]
        rows, kept = torch.cat([left, right]), torch.cat(spots)
    return best


def fit_log_snr(log_snr: Tensor) -> list[float]:
    """Return the betas of a variance-preserving chain whose logSNR at each scale is `log_snr`, ``(T,)`` descending.

    a^2 = sigmoid(logSNR), and beta_k^2 = 1 - a_k^2 / a_{k-1}^2 (Eq. (16), Peter 2024).

    Raises: UserError for a logSNR that is not finite or that increases.
    """
    require(bool(torch.isfinite(log_snr).all()), "the process to be matched has no noise, so no SNR: match=octaves")
    squares = torch.cat([torch.ones(1, dtype=torch.float64), torch.sigmoid(log_snr.to(torch.float64)).cpu()])
    beta_squares = 1 - squares[1:] / squares[:-1]
    require(bool((beta_squares >= -1e-12).all()), "the SNR to be matched rises with t; a chain can only lose signal")
    return beta_squares.clamp(min=0).sqrt().tolist()


def _log(energies: Tensor) -> Tensor:
    return energies.clamp(min=1e-300).log()
