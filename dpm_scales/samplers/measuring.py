"""Measure the error variance of a network's estimates by scale and frequency, see `dpm_scales.covariance`."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from dpm_scales.covariance import ErrorVariance
from dpm_scales.denoisers import BaseDenoiser
from dpm_scales.errors import require
from dpm_scales.operators import HeatOperator, spectral_of
from dpm_scales.processes import Process
from dpm_scales.rng import CounterRNG
from dpm_scales.samplers.grids import logsnr_grid, tables_of, uniform_grid
from dpm_scales.targets import NextScale

NUM_SCALES = 32
"""Number of scales of a table: at most 0.7 nats of logSNR apart for the cosine schedule."""


def require_measurable(denoiser: BaseDenoiser) -> None:
    """Raise UserError for a denoiser whose error has no variance per frequency that a reverse step could use."""
    process, target = denoiser.process, denoiser.target
    name = type(process).__name__
    require(
        process.operator().is_diagonal and not process.has_context,
        f"the optimal covariance is measured in the DCT, and the operator of {name} has eigenvectors of its own, which "
        "differ between images; leave covariance out",
    )
    require(process.has_noise(), f"{name} has no noise, so its steps have no covariance; leave covariance out")
    require(
        not isinstance(target, NextScale),
        "the optimal covariance needs estimates of the clean image, and target=finer gives those of the next scale; "
        "leave covariance out",
    )


def measured_scales(process: Process) -> Tensor:
    """Return the scales of a table, ``(S,)`` float64, ascending: evenly spaced in logSNR, or in t if it is constant."""
    grid = uniform_grid if process.has_constant_noise() else logsnr_grid
    return grid(process, min(NUM_SCALES, process.num_scales), device=tables_of(process))[:-1].flip(0)


@torch.no_grad()
def measure_error_variance(
    denoiser: BaseDenoiser,
    batches: Iterable[tuple[Tensor, Tensor | None]],
    seed: int = 0,
    on_evaluation: Callable[[int], None] | None = None,
) -> ErrorVariance:
    """Return the variance of a denoiser's error on images, each noised once at every scale of the table.

    Image i gets the noise of (seed, i), independently of the batches.

    Args:
        batches: clean images ``(B, C, H, W)`` in the process's value range, all of one size, on the denoiser's device,
            and their labels ``(B,)`` or None.
        on_evaluation: called after each evaluation of the network with its number of images.

    Raises: UserError for a denoiser without such an error, see `require_measurable`, if there are no images, and if an
    estimate is not finite.
    """
    require_measurable(denoiser)
    process = denoiser.process
    operator, scales = process.operator(), measured_scales(process)
    total, number, mu = torch.zeros(()), 0, torch.zeros(())
    for x_0, labels in batches:
        noise = CounterRNG(seed, len(x_0), number, x_0.device)
        if number == 0:
            mu = spectral_of(operator).eigenvalues(x_0.shape[-2], x_0.shape[-1], x_0.device)
            scales = scales.to(x_0.device)
            zero, total = torch.zeros_like(scales[0]), scales.new_zeros(len(scales), *mu.shape)
        for k, t in enumerate(scales):
            y_t = process.perturb(x_0, t, noise.normal(tuple(x_0.shape[1:]), x_0.dtype), operator)
            error = x_0 - denoiser.predict_mean(y_t, t, zero, labels=labels)
            total[k] += HeatOperator().analysis(error.to(torch.float64)).square().mean(1).sum(0)
            if on_evaluation is not None:
                on_evaluation(len(x_0))
        number += len(x_0)
    require(number > 0, "no images to measure the covariance from")
    require(bool(total.isfinite().all()), "the network's estimates are not finite; choose another model")
    return ErrorVariance.fit(denoiser, process, denoiser.spectrum, mu, scales, total / number, number, seed)
