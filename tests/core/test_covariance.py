"""The optimal covariance of a reverse step: exact laws of Gaussian data in a few steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dpm_scales.editing import Resampling
from dpm_scales.processes import VP, Blurring, Process, Spectral
from dpm_scales.samplers import DDIM, Ancestral, DPMSolver, Sampler, uniform_grid
from dpm_scales.schedules import Color, PowerLaw, SinSquaredBlur
from support.colors import ColoredTwin
from support.oracles import (
    BY_NAME,
    GaussianData,
    H,
    OracleDenoiser,
    ScriptedNoise,
    W,
    close,
    coefficients,
    curves,
    float64,
    gaussian_data,
    named,
    over,
    pixels,
)
from support.reference import Array, NoiseTwin, Twin, cosine_twin

OPTIMAL = "optimal"
KINDS = ["vp-cosine", "ve-edm", "blurring", "inverse-heat-0.1", "chain"]
STRAIGHT = NoiseTwin(lambda t: (1 - (1 - 1e-12) * t, t * t), lambda k: (math.nan, math.nan))


def colored(name: str, make: Callable[[Color], Process], noise: NoiseTwin, **more: Any) -> ColoredTwin:
    """Return a process of eight scales with noise of a power law, for the images of these tests."""

    def build() -> Process:
        process = make(PowerLaw(0.6, 0.1))
        process.bind_size((H, W))
        return process

    def weight(mu: Array) -> Array:
        return np.asarray((np.sqrt(mu) / (2 * np.pi) + 0.1) ** 0.6)

    return ColoredTwin(name, build, 8, noise, spectrum="continuous", weight=weight, size=(H, W), **more)


SPECTRAL = [
    Twin("rectified", lambda: Spectral(8), 8, STRAIGHT, spectrum="continuous"),
    colored("rectified-colored", lambda color: Spectral(8, color=color), STRAIGHT),
    colored("vp-colored", lambda color: VP(8, color=color), BY_NAME["vp-cosine"].noise),
    colored(
        "blurring-colored",
        lambda color: Blurring(8, blur=SinSquaredBlur(4.0), color=color),
        BY_NAME["blurring"].noise,
        time=BY_NAME["blurring"].time,
        floor=0.001,
    ),
]


class Exact(nn.Module):
    """Var(u_0 | u_t) of Gaussian data in closed form, in place of a table."""

    def __init__(self, twin: Twin, data: GaussianData) -> None:
        super().__init__()
        self.twin, self.data = twin, data

    def forward(self, process: Process, spectrum: nn.Module, t: Tensor, mu: Tensor) -> Tensor:
        assert mu.shape == (H, W), "v is a function of the image's frequencies, also where the process has only one"
        return torch.from_numpy(self.data.uncertainty(*curves(self.twin, float(t))))


def laws(sampler: Sampler, twin: Twin, data: GaussianData, scales: Sequence[float]) -> list[tuple[Array, Array]]:
    """Mean and variance of each coefficient after each step, from the marginal at ``scales[0]``.

    A sampler that is affine and diagonal is known by its answers to nothing, to a start of ones, to each draw of ones.
    """
    denoiser = OracleDenoiser(twin, data)
    denoiser.error_variance = Exact(twin, data)  # type: ignore[assignment]
    steps = len(scales) - 2
    ones = torch.from_numpy(pixels(np.ones((H, W))))
    start = torch.zeros(2 + steps, 1, H, W, dtype=torch.float64)
    start[1] = ones
    whites = [torch.zeros_like(start) for _ in range(steps)]
    for i, white in enumerate(whites):
        white[2 + i] = ones
    path: list[Array] = []
    sampler.reverse(
        denoiser,
        start,
        ScriptedNoise(whites),
        scales=float64(scales),
        on_step=lambda i, x: path.append(coefficients(x.numpy())[:, 0]),
    )
    signal, noise = curves(twin, scales[0])
    mean, variance = signal * data.mean, signal**2 * data.variance + noise**2
    found = []
    for u in path:
        slope, gains = u[1] - u[0], u[2:] - u[0]
        found.append((u[0] + slope * mean, slope**2 * variance + (gains**2).sum(0)))
    return found


def coarse(twin: Twin, steps: int) -> list[float]:
    return uniform_grid(twin.build(), steps).tolist()


# --- exact laws -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@over([*named(*KINDS), *SPECTRAL])
def test_a_few_steps_end_in_the_exact_law_of_gaussian_data(twin: Twin, eta: float) -> None:
    """At every scale of a grid of three steps; with the published covariance some of the variance is lost."""
    data, scales = gaussian_data(), coarse(twin, 3)
    optimal, published = (
        laws(Ancestral(covariance=c) if eta == 1 else DDIM(eta, None, covariance=c), twin, data, scales)
        for c in (OPTIMAL, None)
    )
    for s, (mean, variance), (_, lost) in zip(scales[1:-1], optimal, published, strict=False):
        signal, noise = curves(twin, s)
        truth = signal**2 * data.variance + noise**2
        close(mean, signal * data.mean, 1e-8)
        close(variance, truth, 1e-8, 1e-8)
        assert ((truth - lost) / truth).max() > 1e-3 and (lost < truth * (1 + 1e-9)).all()


def test_the_second_order_already_has_most_of_what_the_first_order_lacks() -> None:
    """SDE-DPM-Solver++(2M) with an ideal network: the variance is right to a sixth in 20 steps without."""
    twin, data = cosine_twin(1000), gaussian_data()
    scales = coarse(twin, 20)
    signal, noise = curves(twin, scales[-2])
    truth = signal**2 * data.variance + noise**2

    def share(sampler: Sampler) -> Array:
        return np.asarray(laws(sampler, twin, data, scales)[-2][1] / truth)

    first = share(DPMSolver(1.0, None, "uniform", order=1))
    second, both = (share(DPMSolver(1.0, None, "uniform", covariance=c)) for c in (None, OPTIMAL))
    assert first.max() < 0.95 and np.abs(second - 1).max() < 1 / 6 and 1.1 < both.min() < both.max() < 1.7


@pytest.mark.parametrize(
    ("eta", "make"),
    [
        (1.0, lambda c: Ancestral(covariance=c)),
        (0.3, lambda c: DDIM(0.3, None, covariance=c)),
        (1.0, lambda c: DPMSolver(1.0, None, "uniform", covariance=c)),
        (0.6, lambda c: DPMSolver(0.6, None, "uniform", order=1, covariance=c)),
        (0.3, lambda c: Resampling(DDIM(0.3, None, covariance=c), 0)),
    ],
    ids=["ancestral", "ddim", "sde-dpmpp", "order-1", "resampled"],
)
@over([*named("vp-cosine", "blurring"), *SPECTRAL])
def test_a_step_adds_the_published_variance_and_that_of_the_error(
    twin: Twin, eta: float, make: Callable[[str | None], Sampler]
) -> None:
    """b^2 + (lambda_s - a lambda_t)^2 v, by numpy from the curves of the twins, for the last of three steps."""
    data, (first, t, s, _) = gaussian_data(), coarse(twin, 3)
    (signal_t, noise_t), (signal_s, noise_s) = curves(twin, t), curves(twin, s)
    kept = signal_t / signal_s * noise_s / noise_t
    published = eta**2 * noise_s**2 * (1 - kept**2)
    weight = signal_s - noise_s / noise_t * np.sqrt(1 - eta**2 + eta**2 * kept**2) * signal_t
    for covariance, expected in {
        None: published,
        OPTIMAL: published + weight**2 * data.uncertainty(signal_t, noise_t),
    }.items():
        denoiser = OracleDenoiser(twin, data)
        denoiser.error_variance = Exact(twin, data)  # type: ignore[assignment]
        nothing = torch.zeros(2, 1, H, W, dtype=torch.float64)
        ones = nothing.clone()
        ones[1] = torch.from_numpy(pixels(np.ones((H, W))))
        path: list[Array] = []
        make(covariance).reverse(
            denoiser,
            nothing,
            ScriptedNoise([nothing, ones]),
            scales=float64([first, t, s, 0.0]),
            on_step=lambda i, x, path=path: path.append(coefficients(x.numpy())[:, 0]),
        )
        close((path[1][1] - path[1][0]) ** 2, expected, 1e-10)
    assert (weight**2 * data.uncertainty(signal_t, noise_t)).max() > 1e-2
