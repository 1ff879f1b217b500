"""Every step of every sampler under every fixed colour is that of white noise on filtered data, to 1e-10."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dpm_scales.covariance import ErrorVariance
from dpm_scales.denoisers import BaseDenoiser
from dpm_scales.samplers import DDIM, Ancestral, Cold, Dissipation, DPMSolver, Heun, Sampler, UniPC
from dpm_scales.spectrum import DataSpectrum
from support.colors import COLORS, LAWS, Pair, pair
from support.oracles import ScriptedNoise, close, float64, generator, images

SAMPLERS: dict[str, Callable[[], Sampler]] = {
    "ancestral": Ancestral,
    "ancestral-transition": lambda: Ancestral(variance="transition"),
    "ancestral-optimal": lambda: Ancestral(covariance="optimal"),
    "ddim-0": lambda: DDIM(0.0, None),
    "ddim-0.5": lambda: DDIM(0.5, None),
    "ddim-1": lambda: DDIM(1.0, None),
    "ddim-0-optimal": lambda: DDIM(0.0, None, covariance="optimal"),
    "dpmpp-1": lambda: DPMSolver(0.0, None, "uniform", order=1),
    "dpmpp-2": lambda: DPMSolver(0.0, None, "uniform"),
    "sde-dpmpp-1": lambda: DPMSolver(1.0, None, "uniform", order=1),
    "sde-dpmpp-2": lambda: DPMSolver(1.0, None, "uniform"),
    "sde-dpmpp-optimal": lambda: DPMSolver(1.0, None, "uniform", covariance="optimal"),
    "unipc-1": lambda: UniPC(1, None, "uniform"),
    "unipc-2": lambda: UniPC(2, None, "uniform"),
    "unipc-3": lambda: UniPC(3, None, "uniform"),
    "heun": lambda: Heun(None, "uniform"),
    "heun-logsnr": lambda: Heun(None, "uniform", variable="logsnr"),
    "heun-churned": lambda: Heun(None, "uniform", s_churn=3.0, s_noise=1.003),
    "dissipation": Dissipation,
    "cold": Cold,
}
LADDER = [0.8, 0.6, 0.45, 0.3, 0.2, 0.0]
BATCH = 2


class Power(DataSpectrum):
    """The data's power P(mu), exact at every eigenvalue."""

    def __init__(self, filtered: Callable[[Tensor], Tensor] = torch.zeros_like) -> None:
        super().__init__()
        self.filtered = filtered

    def forward(self, mu: Tensor) -> Tensor:
        return torch.exp(2 * self.filtered(mu)) / (0.3 + mu)


def measured(denoiser: BaseDenoiser, spectrum: DataSpectrum) -> BaseDenoiser:
    """Let the denoiser have a table of errors at two scales, relative to those of the Wiener estimate."""
    ratio = 0.5 + torch.rand(2, 3, 4, generator=generator(), dtype=torch.float64)
    axes = float64([0.3, 0.9]), float64([0.0, 0.3, 0.6]), float64([0.0, 0.2, 0.5, 0.8])
    denoiser.spectrum, denoiser.error_variance = spectrum, ErrorVariance(*axes, ratio, "00" * 32, 1, 0)
    return denoiser


def twins(case: Pair) -> tuple[BaseDenoiser, BaseDenoiser]:
    colored, white = case.denoisers()
    color = case.colored.color
    assert color is not None
    log = color.log
    return (
        measured(colored, Power(lambda mu: log(torch.ones((1,) * mu.ndim, dtype=torch.float64), mu))),
        measured(white, Power()),
    )


#: every sampler under every law and with every colour, but not all triples
CASES = [
    (law, list(COLORS)[(i + j) % len(COLORS)], sampler)
    for i, sampler in enumerate(SAMPLERS)
    for j, law in enumerate(LAWS)
]


@pytest.mark.parametrize(("law", "name", "sampler"), CASES)
def test_each_step_is_the_filtered_step_of_the_white_process(law: str, name: str, sampler: str) -> None:
    """The first steps, which have no past, and later ones, which have as much as the order asks for."""
    case = pair(law, name)
    start, whites = images(BATCH, 1, 6, 10), [images(BATCH, 1, 6, 10, seed=k) for k in range(1, 6)]
    ends: list[list[Tensor]] = []
    for denoiser, y in zip(twins(case), (case.tint(start), start), strict=True):
        path: list[Tensor] = []
        SAMPLERS[sampler]().reverse(
            denoiser, y, ScriptedNoise(whites), scales=float64(LADDER), on_step=lambda i, x, path=path: path.append(x)
        )
        ends.append(path)
    for colored, white in zip(*ends, strict=True):
        close(colored, case.tint(white), 1e-10, 0)
