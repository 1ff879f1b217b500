"""Grids of the samplers, what they refuse, and the choice made for a process."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dpm_scales.denoisers import Denoiser
from dpm_scales.priors import GaussianPrior, auto_prior
from dpm_scales.processes import (
    VE,
    VP,
    Blurring,
    BlurringChain,
    Homogeneous,
    InverseHeat,
    OsmosisDiffusion,
    Process,
    Spectral,
    Warm,
)
from dpm_scales.rng import CounterRNG
from dpm_scales.samplers import (
    DDIM,
    Ancestral,
    Churn,
    Dissipation,
    DPMSolver,
    Heun,
    Sampler,
    auto_sampler,
    karras_grid,
    logsnr_grid,
    quadratic_grid,
    uniform_grid,
)
from dpm_scales.schedules import (
    ConstantBeta,
    ConstantNoise,
    LinearTimeBlur,
    ListedNoise,
    LogBlur,
    LowPass,
    PowerLaw,
    SpectralClock,
)
from dpm_scales.targets import Clean, NextScale, Noise, Target
from support.oracles import (
    NOISY,
    NOISY_MEMBERS,
    Answer,
    H,
    OracleDenoiser,
    ScriptedNoise,
    W,
    close,
    float64,
    gaussian_data,
    images,
    named,
    over,
    refused,
)
from support.reference import TWINS, Twin


class Smooth(nn.Module):
    """Pixel by pixel: no sum whose rounding depends on the batch."""

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        shift = t if labels is None else t + labels
        return torch.sin(2 * x + shift[:, None, None, None])


def of(process: Process, target: Target | None = None, network: nn.Module | None = None) -> Denoiser:
    return Denoiser(network or Smooth(), process, target or Clean())


# --- grids ------------------------------------------------------------------------------------------------------------


@given(num_scales=st.integers(1, 3000), data=st.data())
@settings(deadline=None, max_examples=200)
def test_uniform_grid_falls_from_1_to_0_in_multiples_of_a_scale(num_scales: int, data: st.DataObject) -> None:
    steps = data.draw(st.integers(1, num_scales))
    process = nn.Module()
    process.num_scales = num_scales  # type: ignore[assignment]
    grid = uniform_grid(process, steps)  # type: ignore[arg-type]
    assert grid.dtype == torch.float64 and grid.shape == (steps + 1,)
    assert grid[0] == 1 and grid[-1] == 0
    k = grid * num_scales
    close(k.numpy(), k.round().numpy(), 1e-9)
    gaps = k.diff().numpy()
    assert (gaps < -0.5).all() and gaps.max() - gaps.min() <= 2 + 1e-9


def test_uniform_grid_of_all_steps_is_the_chain() -> None:
    assert torch.equal(Ancestral().scales(VP(8)), torch.arange(8, -1, -1, dtype=torch.float64) / 8)
    assert Ancestral(3).scales(VP(9)).tolist() == [1, 6 / 9, 3 / 9, 0]
    assert Ancestral(1).scales(VP(9)).tolist() == [1, 0]


@pytest.mark.parametrize("steps", [2, 7, 18, 100])
@pytest.mark.parametrize("rho", [1.0, 7.0])
def test_karras_grid_of_an_exploding_process_has_edms_noise_levels(steps: int, rho: float) -> None:
    """Eq. (5): sigma_i = (max^(1/rho) + i / (N - 1) (min^(1/rho) - max^(1/rho)))^rho, sigma_N = 0, whatever the rho of
    the process's own scales."""
    process = VE(100)
    grid = karras_grid(process, steps, rho)
    assert grid.shape == (steps + 1,) and grid[0] == 1 and grid[-1] == 0 and (grid.diff() < 0).all()
    high, low = 80 ** (1 / rho), 0.002 ** (1 / rho)
    expected = [(high + i / (steps - 1) * (low - high)) ** rho for i in range(steps)]
    close(process.noise_scale(grid[:-1], torch.zeros(1, 1).double()).flatten().numpy(), expected, 0, 1e-9)
    if rho == 7.0 and steps == 100:  # EDM's levels are this process's scales
        close(grid.numpy(), np.arange(100, -1, -1) / 100, 1e-9)


@over([twin for twin in TWINS if twin.name.startswith(("vp", "ve", "blurring", "chain"))])
def test_karras_grid_is_equally_spaced_in_a_power_of_noise_over_signal(twin: Twin) -> None:
    """At the mean (mu = 0), between the first and the last scale."""
    grid = karras_grid(twin.build(), 6, 3.0).tolist()
    # the second beta of vp-listed is 0, so its first two scales are one level
    last = 2 / 8 if twin.name == "vp-listed" else 1 / 8
    assert grid[0] == 1 and grid[-1] == 0 and grid[-2] == pytest.approx(last, abs=1e-9)
    mu = np.zeros((1, 1))
    levels = [math.sqrt(twin.variance(t, mu)[0, 0]) / twin.signal(t, mu)[0, 0] for t in grid[:-1]]
    gaps = np.diff(np.array(levels) ** (1 / 3.0))
    close(gaps, gaps[0], 1e-7, 1e-7)


@pytest.mark.parametrize(
    "twin", [t for t in TWINS if t.name in ("vp-cosine", "ve-edm", "blurring")], ids=lambda t: t.name
)
def test_logsnr_grid_is_equally_spaced_in_logsnr(twin: Twin) -> None:
    """From the curves of the twin, at mu = 0."""
    grid = logsnr_grid(twin.build(), 6).tolist()
    assert grid[0] == 1 and grid[-2] == pytest.approx(1 / twin.num_scales) and grid[-1] == 0
    mu = np.zeros((1, 1))
    log_snr = [float(np.log(twin.signal(t, mu) ** 2 / twin.variance(t, mu)).item()) for t in grid[:-1]]
    assert np.diff(log_snr) == pytest.approx(np.diff(log_snr).mean(), rel=1e-6)
    with refused("logsnr grid", "grid=uniform"):
        logsnr_grid(InverseHeat(8), 4)


def test_quadratic_grid_is_ddims() -> None:
    """Song et al. 2021, App. D.2: tau_i = c i^2 for scales numbered from 0, here up to the last; then the image."""
    for num_scales, steps in ((1000, 21), (50, 50), (8, 3)):
        grid = quadratic_grid(VP(num_scales), steps)
        tau = [(num_scales - 1) * (i / (steps - 1)) ** 2 for i in range(steps)]
        close(grid.numpy(), [*((v + 1) / num_scales for v in reversed(tau)), 0.0], 1e-12)
        assert (grid.diff() < 0).all() and torch.equal(DDIM(0.0, steps, "quadratic").scales(VP(num_scales)), grid)
    assert quadratic_grid(VP(8), 1).tolist() == [1.0, 0.0]
    with refused("finer-scale", "grid=uniform"):
        Ancestral(8, "quadratic").check(of(VP(8), NextScale()))


def test_karras_grid_of_one_step_is_from_noise_to_image() -> None:
    assert karras_grid(VE(100), 1).tolist() == [1, 0]


def test_karras_grid_finds_a_level_on_a_plateau() -> None:
    grid = karras_grid(VE(5, ListedNoise([0.1, 1.0, 1.0, 1.0, 2.0])), 4)
    assert grid.isfinite().all() and (grid.diff() < 0).all()


@pytest.mark.parametrize(
    "process",
    [InverseHeat(8), InverseHeat(8, ConstantNoise(0.1)), Homogeneous(8), VE(1), VE(4, ListedNoise([1.0] * 4))],
)
def test_karras_grid_needs_noise_that_grows(process: Process) -> None:
    with refused("karras grid", "noise that grows", type(process).__name__, "grid=uniform"):
        karras_grid(process, 1)


# --- noise levels -----------------------------------------------------------------------------------------------------


@over(NOISY)
def test_the_noise_level_is_noise_over_signal_of_the_mean(twin: Twin) -> None:
    """From the curves of the twin, at mu = 0, in the shape of t."""
    scales, mu = [0.13, 0.4, 0.5, 0.77, 1.0], np.zeros((1, 1))
    expected = [math.sqrt(twin.variance(t, mu).item()) / twin.signal(t, mu).item() for t in scales]
    close(twin.build().noise_level(float64(scales)).numpy(), expected, 0, 1e-9)
    assert twin.build().noise_level(float64(0.4)).shape == ()


@pytest.mark.parametrize(
    ("make", "plain"),
    [
        (lambda: VP(50, color=PowerLaw(0.7)), lambda: VP(50)),
        (lambda: VE(50, color=PowerLaw(-0.2, energy="published")), lambda: VE(50)),
        (lambda: VP(50, clock=SpectralClock(2.0)), lambda: VP(50)),
        (lambda: Spectral(50, color=LowPass(0.3)), lambda: Spectral(50)),
        (lambda: OsmosisDiffusion(50, color=LowPass(0.3)), lambda: OsmosisDiffusion(50)),
        (lambda: InverseHeat(50, color=PowerLaw(0.7), clock=SpectralClock(1.0)), lambda: InverseHeat(50)),
    ],
)
def test_a_color_or_a_clock_leaves_the_noise_level_of_the_schedule(
    make: Callable[[], Process], plain: Callable[[], Process]
) -> None:
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    assert torch.equal(make().noise_level(t), plain().noise_level(t))
    # which at mu = 0 is not that of the process itself
    own = torch.exp(-0.5 * make().log_snr(t, float64([0.0]))).flatten()
    low_pass = isinstance(make().color, LowPass)  # white at mu = 0
    assert low_pass or not torch.allclose(own[1:], plain().noise_level(t)[1:], rtol=1e-3)


def test_grids_and_churn_ask_the_process_for_its_noise_level() -> None:
    class Louder(VE):
        """Its level is another than that of its curves."""

        def noise_level(self, t: Tensor) -> Tensor:
            return 2.0 * torch.exp(3 * t)

    process, t = Louder(100), float64([1.0, 0.6, 0.0])
    close(logsnr_grid(process, 4).numpy(), [1.0, 0.67, 0.34, 0.01, 0.0], 1e-12)
    levels = (math.exp(3 / 2), math.exp(0.03 / 2))
    expected = [2 * math.log(levels[0] + i / 3 * (levels[1] - levels[0])) / 3 for i in range(4)]
    close(karras_grid(process, 4, 2.0).numpy(), [*expected, 0.0], 1e-12)
    close(Churn(0.5).scales(process, t), [1.0, 0.6 + math.log(1.25) / 3], 1e-12)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [Ancestral, Dissipation, Heun, DDIM])
@pytest.mark.parametrize("steps", [0, -1, 2.5, "8", True])
def test_steps_must_be_a_whole_number(make: Callable[..., Sampler], steps: Any) -> None:
    with refused("steps", "whole number >= 1", repr(steps)):
        make(steps=steps)


@pytest.mark.parametrize("make", [Ancestral, Dissipation, Heun, DDIM])
def test_unknown_grids_are_refused(make: Callable[..., Sampler]) -> None:
    with refused("unknown grid 'caras'", "karras", "uniform"):
        make(grid="caras")


@pytest.mark.parametrize(
    ("make", "argument", "value"),
    [
        (Ancestral, "rho", 0.0),
        (Heun, "rho", math.nan),
        (DDIM, "rho", "7"),
        (DDIM, "eta", -0.1),
        (DDIM, "eta", 1.1),
        (DDIM, "eta", math.nan),
        (DDIM, "eta", "1"),
        (Dissipation, "noise_ratio", -1.0),
        (Dissipation, "noise_ratio", math.inf),
        (Heun, "variable", "sigma"),
    ],
)
def test_arguments_out_of_range_are_refused(make: Callable[..., Sampler], argument: str, value: Any) -> None:
    with refused(argument, repr(value)):
        make(**{argument: value})


@pytest.mark.parametrize("grid", ["uniform", "karras"])
def test_more_steps_than_scales_are_refused(grid: str) -> None:
    for sampler in (Ancestral(9, grid), DDIM(0.0, 9, grid), Heun(9, grid), Dissipation(1.0, 9, grid)):
        with refused("steps=9", "num_scales=8", "lower steps"):
            sampler.check(of(VP(8)))
        with refused("steps=9", "num_scales=8"):
            sampler.sample(of(VP(8)), GaussianPrior(), CounterRNG(0, 1), (1, H, W))


@pytest.mark.parametrize("make", [lambda: Ancestral(grid="karras"), lambda: Heun(4), lambda: DDIM(0.0, 4, "karras")])
def test_karras_grid_for_constant_noise_is_refused_before_any_work(make: Callable[[], Sampler]) -> None:
    network = Answer(torch.zeros(1, 1, H, W))
    denoiser = of(InverseHeat(8), network=network)
    for call in (
        lambda: make().check(denoiser),
        lambda: make().sample(denoiser, GaussianPrior(), CounterRNG(0, 1), (1, H, W)),
    ):
        with refused("karras grid", "InverseHeat", "grid=uniform"):
            call()
    assert not network.seen


def test_finer_scale_goes_one_scale_at_a_time() -> None:
    denoiser = of(InverseHeat(8), NextScale())
    for fine in (Ancestral(), Dissipation(), DDIM(0.0, None), DDIM(1.0, 8)):
        fine.check(denoiser)
    with refused("Heun", "other scales than the next", "finer-scale", "sampler=dissipation"):
        Heun(8, "uniform").check(denoiser)
    with refused("finer-scale", "steps of 1/8 only", "steps=4"):
        Dissipation(1.0, 4).check(denoiser)
    with refused("finer-scale", "grid=uniform"):
        Ancestral(8, "karras").check(of(VP(8), NextScale()))
    with refused("finer-scale", "steps=4"):
        Dissipation(1.0, 4).sample(denoiser, auto_prior(denoiser.process), CounterRNG(0, 1), (1, H, W))


def test_noise_target_is_refused_where_its_division_would_overflow() -> None:
    denoiser = of(InverseHeat(200, blur=LogBlur(0.5, 24)), Noise())
    for sampler in (Ancestral(), Dissipation(), DDIM(0.0, None), Heun(10, "uniform")):
        with refused("noise target divides", "target=clean"):
            sampler.check(denoiser)
    mild = of(InverseHeat(100, blur=LinearTimeBlur(10.0)), Noise())
    Ancestral().check(mild)
    with refused("noise target divides", "more steps"):
        Ancestral(5).check(mild)
    for process in (VP(1000), VE(1000), Blurring(1000)):
        for steps in (1, 10, 1000):
            Ancestral(steps).check(of(process, Noise()))


def test_heun_in_the_noise_level_is_refused_where_blur_would_be_amplified() -> None:
    heavy = of(InverseHeat(200, blur=LogBlur(0.5, 24)))
    with refused("Heun", "amplifies", "InverseHeat", "variable=logsnr"):
        Heun(10, "uniform", variable="noise").check(heavy)
    for sampler in (Heun(10, "uniform", variable="logsnr"), Heun(10, "uniform")):
        sampler.check(heavy)
    for process in (VP(1000), VE(1000), Blurring(1000)):
        for steps in (2, 18, 1000):
            Heun(steps, variable="noise").check(of(process))


@over(named(*NOISY_MEMBERS))
def test_heuns_variable_is_the_noise_level_unless_the_process_blurs(twin: Twin) -> None:
    start, data = images(2, 1, H, W), gaussian_data()
    scales = float64([1.0, 0.98, 0.96, 0.0])
    variable = "noise" if twin.spectrum is None else "logsnr"
    ends = [
        Heun(None, "uniform", variable=v).reverse(OracleDenoiser(twin, data), start, ScriptedNoise([]), scales=scales)
        for v in (None, variable)
    ]
    assert torch.equal(*ends)


# --- the choice -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("process", "kind", "steps"),
    [
        (VP(), Heun, 18),
        (VP(10), Heun, 10),
        (VP(100, ConstantBeta(0.1)), Heun, 18),
        (VE(), Heun, 18),
        (InverseHeat(), DPMSolver, 50),
        (InverseHeat(noise=ConstantNoise(0.1)), DPMSolver, 50),
        (Homogeneous(), Dissipation, 1),
        (Blurring(), DPMSolver, 50),
        (Blurring(20), DPMSolver, 20),
        (BlurringChain(), DPMSolver, 50),
    ],
)
def test_auto_sampler_suits_the_process(process: Process, kind: type[Sampler], steps: int | None) -> None:
    sampler = auto_sampler(of(process))
    assert type(sampler) is kind and sampler.steps == steps
    assert not isinstance(sampler, DPMSolver) or sampler.eta == 1
    sampler.check(of(process))
    few = auto_sampler(of(process), 5)
    assert type(few) is kind and len(few.scales(process)) == 6


def test_auto_sampler_of_warm_diffusion_adds_no_noise_unless_told_which() -> None:
    denoiser = of(Warm())
    plain, colored = auto_sampler(denoiser), auto_sampler(denoiser, noise_color=PowerLaw(0.1))
    assert isinstance(plain, DPMSolver) and (plain.eta, plain.steps, plain.grid) == (0, 50, "uniform")
    assert isinstance(colored, DPMSolver) and colored.eta == 1 and colored.noise_color is not None
    for sampler in (plain, colored):
        sampler.check(denoiser)


@pytest.mark.parametrize("process", [VP(), InverseHeat(), Blurring()])
def test_auto_sampler_goes_from_scale_to_scale_where_the_network_knows_no_more(process: Process) -> None:
    denoiser = of(process, NextScale())
    sampler = auto_sampler(denoiser)
    assert type(sampler) is Ancestral and len(sampler.scales(process)) == process.num_scales + 1
    sampler.check(denoiser)


def test_a_grid_is_found_once_for_each_process_and_handed_out_as_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    process, other = VP(50), VP(50)
    first = karras_grid(process, 8)
    kept = first.clone()
    first.fill_(2.0)
    monkeypatch.setattr("dpm_scales.samplers.grids.scales_at", lambda *_: pytest.fail("found anew"))
    assert torch.equal(karras_grid(process, 8), kept)
    for again in (
        lambda: karras_grid(process, 9),
        lambda: karras_grid(process, 8, rho=3.0),
        lambda: karras_grid(other, 8),
    ):
        with pytest.raises(pytest.fail.Exception, match="found anew"):
            again()
