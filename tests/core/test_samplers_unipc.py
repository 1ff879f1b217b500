"""UniPC against diffusers and its published system of equations; its order on exact flows; where it falls back."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dpm_scales.denoisers import Denoiser
from dpm_scales.processes import VP, Blurring, InverseHeat, OsmosisDiffusion
from dpm_scales.rng import CounterRNG
from dpm_scales.samplers import DDIM, DPMSolver, StepContext, UniPC
from dpm_scales.samplers.multistep import _Interpolation, _moments
from dpm_scales.schedules import LinearBeta, SinSquaredBlur
from dpm_scales.targets import Clean, NextScale, Noise, Target, Velocity
from support.flows import SMOOTH, flow, run
from support.oracles import (
    H,
    OracleDenoiser,
    ScriptedNoise,
    TinyNetwork,
    W,
    close,
    coefficients,
    float64,
    gaussian_data,
    images,
    named,
    over,
    pretended_gpu,
    refused,
)
from support.reference import TWINS, Array, Twin

TARGETS: dict[str, Target] = {"sample": Clean("none", clip=False), "epsilon": Noise(), "v_prediction": Velocity()}


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("prediction", list(TARGETS))
def test_whole_run_is_that_of_diffusers(prediction: str, order: int) -> None:
    """20 steps of a network on their grid, bh2, predict_x0; their tables replaced by float64 ones."""
    diffusers = pytest.importorskip("diffusers")
    scheduler: Any = diffusers.UniPCMultistepScheduler(
        1000,
        beta_start=1e-4,
        beta_end=0.02,
        solver_order=order,
        solver_type="bh2",
        prediction_type=prediction,
        final_sigmas_type="zero",
    )
    scheduler.set_timesteps(20)
    alpha_bar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    steps = scheduler.timesteps.tolist()
    scheduler.sigmas = torch.cat([((1 - alpha_bar) / alpha_bar).sqrt()[steps], torch.zeros(1).double()])
    network = TinyNetwork().double()
    x = start = images(2, 1, 4, 6)
    seen = []
    with torch.no_grad():
        for i in steps:
            t = torch.full((2,), (i + 1) / 1000, dtype=torch.float64)
            output = network(x / torch.sqrt(alpha_bar[i] * 0.25 + 1 - alpha_bar[i]), t)
            x = scheduler.step(output, i, x).prev_sample
            seen.append(x)
    denoiser = Denoiser(network, VP(1000, LinearBeta()), TARGETS[prediction], 0.5).double()
    scales, path = float64([(i + 1) / 1000 for i in steps] + [0.0]), []
    UniPC(order, 20).reverse(denoiser, start, ScriptedNoise([]), scales=scales, on_step=lambda i, x: path.append(x))
    assert len(path) == 20
    for actual, expected in zip(path, seen, strict=True):
        close(actual.numpy(), expected.numpy(), 1e-9 * float(expected.abs().max()))


def plain_coefficients(places: list[float], h: float) -> Array:
    """Zhao et al. 2023, Eq. (8): R a = g for x_0-prediction, phi by its integral, solved densely."""
    nodes, weights = np.polynomial.legendre.leggauss(60)
    x = (nodes + 1) / 2

    def phi(k: int) -> float:  # int_0^1 exp((1 - x)(-h)) x^(k - 1) / (k - 1)! dx
        return float((weights / 2 * np.exp(-(1 - x) * h) * x ** (k - 1)).sum() / math.factorial(k - 1))

    number = len(places)
    matrix = np.array([[r**j for r in places] for j in range(1, number + 1)])
    moments = [math.factorial(j) * phi(j + 1) / phi(1) for j in range(1, number + 1)]
    return np.linalg.solve(matrix, [0.5] if number == 1 else moments)


@pytest.mark.parametrize("end", [False, True])
@pytest.mark.parametrize("count", [1, 2])
@over(named("vp-cosine", "ve-edm", "blurring", "inverse-heat-0.1"))
def test_weights_solve_the_published_system_for_each_frequency(twin: Twin, count: int, end: bool) -> None:
    """Uneven steps, each mu with its own h and r; where nothing is faint."""
    process, mu = twin.build(), torch.linspace(0.01, 0.4, 5, dtype=torch.float64)
    knots = float64([0.52, 0.5, 0.47, 0.45])[3 - count - 1 :]
    s, t, before = knots[-1], knots[-2], list(knots[:-2].flip(0))
    weights = _Interpolation(process, t, s, before, [t, *before[:-1]], end).weights
    half = process.log_snr(knots, mu[:, None])[:, 0].squeeze(-1) / 2
    half = half.expand(len(knots), len(mu)) if half.ndim == 2 else half[:, None].expand(-1, len(mu))
    signal = process.signal_scale(knots, mu[None]).reshape(len(knots), -1).expand(-1, len(mu))
    for j in range(len(mu)):
        h = float(half[-1, j] - half[-2, j])
        places = [float(half[-3 - k, j] - half[-2, j]) / h for k in range(count)] + [1.0] * end
        expected = plain_coefficients(places, h)
        kept = [t, *before[:-1]]
        shrink = [float(process.signal_scale(v, mu[j : j + 1]).flatten()[0] / signal[-1, j]) for v in kept]
        own, *actual = (float(w.flatten()[0]) for w in weights(mu[j : j + 1]))
        close(actual[:count], expected[:count] / np.array(shrink), 1e-8, 2e-5)
        close(actual[count:], expected[count:], 1e-8, 2e-5)
        close(own, 1 - expected.sum(), 1e-8, 2e-5)


def test_moments_are_integrals_at_any_step_length() -> None:
    """j! phi_{j+1}(-h) / phi_1(-h), by the series and by the closed form, by quadrature in pieces."""
    h = np.array([0.0, 1e-9, 1e-4, 0.1, 0.299, 0.301, 1.0, 5.0, 40.0, 300.0])
    nodes, weights = np.polynomial.legendre.leggauss(40)
    edges = np.concatenate([[0.0], 1 - np.geomspace(1, 1e-4, 30)[1:], [1.0]])
    middle, half = (edges[1:] + edges[:-1]) / 2, np.diff(edges) / 2
    x = (middle[:, None] + half[:, None] * nodes).ravel()
    w = (half[:, None] * weights).ravel()
    kernel = np.exp(-(1 - x) * h[:, None]) * w
    for j, actual in enumerate(_moments(float64(h), 3), start=1):
        close(actual.numpy(), (kernel * x**j).sum(1) * 1.0 / kernel.sum(1), 0, 1e-9)


@pytest.mark.parametrize(
    ("twin", "order", "slope"),
    [(SMOOTH[0], 1, 2), (SMOOTH[0], 2, 3), (SMOOTH[0], 3, 3), (SMOOTH[2], 2, 3), (SMOOTH[4], 3, 3)],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_order_of_convergence_to_the_probability_flow(twin: Twin, order: int, slope: int) -> None:
    """The corrector raises the order by one, as far as the first two steps allow, which know less: slope of log(error)
    over log(steps) from 40 to 80 steps, t = 0.95 to 0.25."""
    data, start = gaussian_data(), images(4, 1, H, W)
    exact, errors = flow(twin, data, coefficients(start.numpy()), 0.95, 0.25), []
    for count in (40, 80):
        scales = [*np.linspace(0.95, 0.25, count + 1).tolist(), 0.0]
        errors.append(np.abs(run(UniPC(order, None, "uniform"), twin, data, scales, start, [])[-2] - exact).max())
    assert math.log2(errors[0] / errors[1]) == pytest.approx(slope, abs=0.35), errors
    assert errors[-1] < (1e-2, 1e-3, 1e-4)[order - 1]


@over(named("vp-cosine", "blurring", "inverse-heat"))
def test_order_one_of_dpm_solver_is_ddim(twin: Twin) -> None:
    """DPM-Solver++(1) is DDIM in the data prediction, to the bit."""
    start, scales = images(2, 1, H, W), float64([1.0, 0.7, 0.5, 0.2, 0.0])
    denoiser = OracleDenoiser(twin, gaussian_data())
    ends = [
        sampler.reverse(denoiser, start, ScriptedNoise([]), scales=scales) for sampler in (DPMSolver(order=1), DDIM())
    ]
    assert torch.equal(*ends)
    whites = [images(2, 1, H, W, seed=k) for k in range(3)]
    stochastic = [
        sampler.reverse(denoiser, start, ScriptedNoise(whites), scales=scales)
        for sampler in (DPMSolver(1.0, order=1), DDIM(1.0))
    ]
    assert torch.equal(*stochastic) and not torch.equal(stochastic[0], ends[0])


@over(named("vp-cosine", "blurring", "inverse-heat-0.1"))
def test_predictor_of_order_two_is_dpm_solver(twin: Twin) -> None:
    """With the corrector taken away."""

    class Uncorrected(UniPC):
        def correct(self, move: StepContext, y: Tensor, m: Tensor) -> Tensor:
            return y

    start, scales = images(2, 1, H, W), float64([0.9, 0.8, 0.6, 0.5, 0.3, 0.0])
    denoiser = OracleDenoiser(twin, gaussian_data())
    ends = [
        s.reverse(denoiser, start, ScriptedNoise([]), scales=scales) for s in (Uncorrected(2), DPMSolver(), UniPC(2))
    ]
    assert torch.equal(ends[0], ends[1]) and not torch.equal(ends[0], ends[2])


@over(TWINS)
def test_every_process_is_walked_and_ends_near_ddim(twin: Twin) -> None:
    """In float32: frequencies that a step does not notice, or of which it leaves nothing; processes without noise."""
    denoiser, y = Denoiser(TinyNetwork(), twin.build(), Clean(clip=False)), images(2, 1, H, W).float()
    first, sampler = DDIM(0.0, None).reverse(denoiser, y, ScriptedNoise([])), UniPC(2, None, "uniform")
    sampler.check(denoiser)
    second = sampler.reverse(denoiser, y, ScriptedNoise([]))
    assert float((second - first).abs().max()) < 0.5 * (1 + float(first.abs().max()))


def test_a_frequency_that_is_blurred_away_takes_the_new_estimate_alone() -> None:
    """exp(-mu T) underflows within a step: what the steps before said of it is not divided by that."""
    process, mu = InverseHeat(8), float64([[0.0, 19.0]])
    t = [float64(v) for v in (1.0, 0.875, 0.75, 0.625)]
    weights = _Interpolation(process, t[2], t[3], [t[1], t[0]], [t[2], t[1]]).weights(mu)
    close(torch.stack(weights).flatten(1).numpy(), [[1, 1], [0, 0], [0, 0]], 1e-12)
    own, ending = _Interpolation(process, t[2], t[3], [], [], end=True).weights(mu)
    close(own.flatten().numpy(), [1.0, 0.5], 1e-12)
    close(ending.flatten().numpy(), [0.0, 0.5], 1e-12)


def test_unipc_stays_on_the_device_and_never_waits_for_it() -> None:
    for process in (VP(8), Blurring(8), OsmosisDiffusion(8, blur=SinSquaredBlur(2.0), guidance_input=False)):
        denoiser, sampler = Denoiser(TinyNetwork(2), process, Clean()), UniPC(2, None, "uniform")
        scales = sampler.scales(process)[-5:]
        sampler.check(denoiser)
        context = process.context(torch.zeros(4, 2, 6, 9))
        with pretended_gpu(denoiser):
            noise = CounterRNG(0, 4, device="cuda")
            y = torch.randn(4, 2, 6, 9, device="cuda")
            v = None if context is None else context.to("cuda")
            assert sampler.reverse(denoiser, y, noise, v, scales=scales.to("cuda")).device.type == "cuda"


def test_what_is_refused() -> None:
    for order in (0, 4, 2.0, True):
        with refused("order", "1 to 3", repr(order)):
            UniPC(order)  # type: ignore[arg-type]
    with refused("order", "1 to 2", "3"):
        DPMSolver(order=3)
    with refused("UniPC", "other scales than the next"):
        UniPC(2, 8, "uniform").check(Denoiser(TinyNetwork(), InverseHeat(8), NextScale()))
