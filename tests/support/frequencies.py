"""A frequency of a process is a scalar process of its own: samplers of both, with an estimate that mixes none."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from dpm_scales.processes import Process
from dpm_scales.samplers import DDIM, Ancestral, Cold, Dissipation, DPMSolver, Heun, Sampler, UniPC
from support.oracles import Estimating, ScriptedNoise, coefficients, float64, pixels
from support.reference import Array

#: one of each kind, without a choice that depends on the process
SAMPLERS: dict[str, Callable[[], Sampler]] = {
    "ancestral": Ancestral,
    "ancestral-transition": lambda: Ancestral(variance="transition"),
    "ddim-0": lambda: DDIM(0.0, None),
    "ddim-0.5": lambda: DDIM(0.5, None),
    "ddim-1": lambda: DDIM(1.0, None),
    "dpmpp-1": lambda: DPMSolver(0.0, None, "uniform", order=1),
    "dpmpp-2": lambda: DPMSolver(0.0, None, "uniform"),
    "sde-dpmpp-2": lambda: DPMSolver(1.0, None, "uniform"),
    "unipc-1": lambda: UniPC(1, None, "uniform"),
    "unipc-2": lambda: UniPC(2, None, "uniform"),
    "unipc-3": lambda: UniPC(3, None, "uniform"),
    "heun-noise": lambda: Heun(None, "uniform", variable="noise"),
    "heun-logsnr": lambda: Heun(None, "uniform", variable="logsnr"),
    "heun-churned": lambda: Heun(None, "uniform", variable="logsnr", s_churn=3.0),
    "dissipation": Dissipation,
    "cold": Cold,
}
LADDER = [0.8, 0.6, 0.45, 0.3, 0.2, 0.0]


class PerFrequency(Estimating):
    """An estimate that is a nonlinear function of each coefficient alone."""

    def predict_mean(
        self, y_t: Tensor, t: Tensor, s: Tensor, context: Tensor | None = None, labels: Tensor | None = None
    ) -> Tensor:
        estimate = np.tanh(1.5 * coefficients(y_t.numpy())) * math.cos(float(t))
        return self.process.operator().apply(self.process.signal(s), torch.from_numpy(pixels(estimate)))


def path(sampler: Sampler, process: Process, start: Array, whites: Sequence[Array]) -> Array:
    """Return the DCT coefficients after each step along `LADDER`, from those of the start and of the noise."""
    found: list[Array] = []
    sampler.reverse(
        PerFrequency(process),
        torch.from_numpy(pixels(start)),
        ScriptedNoise([torch.from_numpy(pixels(white)) for white in whites]),
        scales=float64(LADDER),
        on_step=lambda i, x: found.append(coefficients(x.numpy())),
    )
    return np.stack(found)


def visited(sampler: Sampler, process: Process) -> Tensor:
    """Return the scales from which the steps along `LADDER` start: for churn those to which it leads."""
    ladder = float64(LADDER)
    return ladder[:-1] if sampler.churn is None else sampler.churn.scales(process, ladder)


def at_scales(sampler: Sampler, scales: Tensor) -> Sampler:
    """Return the sampler, whose churn leads to the given scales whatever the process."""
    if sampler.churn is not None:
        sampler.churn.scales = lambda process, ladder: scales  # type: ignore[method-assign]
    return sampler
