"""Flow matching: the straight path, its velocity, and the same images as the variance-preserving path."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from benchmarks.half_blur import HalfBlurFlowLoss
from dpm_scales.denoisers import Denoiser
from dpm_scales.operators import HeatOperator, PixelOperator
from dpm_scales.priors import GaussianPrior
from dpm_scales.processes import VE, VP, Blurring, BlurringChain, InverseHeat, Process, Spectral, Warm
from dpm_scales.rng import CounterRNG
from dpm_scales.samplers import (
    DDIM,
    DPMSolver,
    Heun,
    Sampler,
    UniPC,
    auto_sampler,
    karras_grid,
    logsnr_grid,
)
from dpm_scales.samplers.grids import scales_at
from dpm_scales.schedules import (
    CosineLogSNR,
    CutOff,
    EDMNoise,
    FlowBlur,
    LinearTimeBlur,
    LowPass,
    PowerLaw,
    Rectified,
    SinSquaredBlur,
    SpectralClock,
)
from dpm_scales.spectrum import DataSpectrum
from dpm_scales.targets import Clean, Flow, Noise, Velocity
from dpm_scales.weights import FlowLoss
from support.oracles import (
    Estimating,
    TinyNetwork,
    close,
    coefficients,
    float64,
    gaussian_data,
    images,
    pixels,
    refused,
)
from support.reference import eigenvalues

SIZE = (5, 8)
MU = torch.from_numpy(eigenvalues(*SIZE))
PROCESSES: dict[str, Callable[[], Process]] = {
    "vp": lambda: VP(20),
    "ve": lambda: VE(20, EDMNoise(0.02, 5.0)),
    "rectified": lambda: Spectral(20),
    "hdfm": lambda: Spectral(20, Rectified(1e-4), FlowBlur(1e-4)),
    "warm": lambda: Warm(20, EDMNoise(0.02, 3.0), 0.5),
    "blurring": lambda: Blurring(20, blur=SinSquaredBlur(1.5), min_decay=0.05),
    "chain": lambda: BlurringChain(20, 0.3, LinearTimeBlur(1.0)),
    "colored": lambda: VP(20, color=PowerLaw(0.5)),
    "low-pass": lambda: Spectral(20, color=LowPass(0.25)),
    "clocked": lambda: VP(20, clock=SpectralClock(0.0)),
}


def test_the_straight_path() -> None:
    process, t = Spectral(10), float64([0.1, 0.35, 1.0])
    close(process.signal_scale(t, MU).flatten(), 1 - t, 1e-11)
    close(process.noise_scale(t, MU).flatten(), t, 0)
    assert float(process.signal_scale(1.0, MU).max()) == pytest.approx(1e-12, rel=1e-3)


def test_hdfm_in_closed_form() -> None:
    process = Spectral(10, Rectified(1e-4), FlowBlur(1e-4))
    for t in (0.1, 0.5, 1.0):
        u = (1 - 1e-4) * t
        close(process.signal_scale(t, MU), (1 - u) ** (1 + MU / 2), 1e-12)
    blur = process.blur
    assert blur is not None
    assert math.sqrt(2 * float(blur(float64(1.0)))) == pytest.approx(3.03, abs=0.005)


def test_warm_blur_is_proportional_to_the_noise() -> None:
    process = Warm(20, EDMNoise(0.02, 3.0), 0.7)
    for t in (0.2, 0.6, 1.0):
        sigma = float(process.noise_scale(t, float64([0.0])))
        close(process.signal_scale(t, MU), np.exp(-MU.numpy() * (0.7 * sigma) ** 2 / 2), 1e-12)
    ratio_zero = Warm(20, EDMNoise(0.02, 3.0), 0.0)
    close(ratio_zero.signal_scale(0.7, MU).expand(SIZE), torch.ones(SIZE), 0, 0)


def test_a_cut_off_removes_frequencies_from_the_top() -> None:
    process = Spectral(8, CosineLogSNR(), CutOff(2.0), min_decay=0.01)
    for t in (0.25, 0.5, 1.0):
        kept = MU <= 2 * math.pi**2 * 4 ** (-2 * t)
        a = float(process.noise(float64(t))[0].exp())
        close(process.signal_scale(t, MU), a * np.where(kept, 1.0, 0.01), 1e-12)
    with refused("CutOff", "min_decay"):
        Spectral(8, CosineLogSNR(), CutOff(2.0))


@pytest.mark.parametrize("name", PROCESSES)
def test_rates_are_derivatives(name: str) -> None:
    process, step = PROCESSES[name](), 1e-6
    t = float64([0.13, 0.52, 0.91])  # between the knots of lists
    for curve, rate in zip((process.signal_scale, process.noise_scale), process.rates(t, MU), strict=True):
        difference = (curve(t + step, MU) - curve(t - step, MU)) / (2 * step)
        close(rate, difference, 1e-7, 1e-6)


@pytest.mark.parametrize("name", PROCESSES)
def test_the_flow_s_target_is_the_velocity_of_the_path(name: str) -> None:
    process, target, step = PROCESSES[name](), Flow(), 1e-6
    target.check(process)
    x, noise, t = images(3, 2, *SIZE), images(3, 2, *SIZE, seed=1), float64([0.13, 0.52, 0.91])
    operator = process.operator()
    velocity = target.regression_target(process, operator, x, x, noise, t)
    ahead, behind = (process.perturb(x, t + sign * step, noise, operator) for sign in (1, -1))
    close(velocity, (ahead - behind) / (2 * step), 1e-7, 1e-6)
    # and the image follows from it
    y_t = process.perturb(x, t, noise, operator)
    for s in (float64([0.0, 0.0, 0.0]), float64([0.05, 0.5, 0.6])):
        mean = target.predict_mean(process, operator, velocity, y_t, t, s)
        close(mean, operator.apply(process.signal(s), x), 1e-8)


def test_the_velocity_of_the_straight_path_is_noise_minus_image() -> None:
    process, x, noise = Spectral(10), images(2, 1, *SIZE), images(2, 1, *SIZE, seed=1)
    velocity = Flow().regression_target(process, process.operator(), x, x, noise, float64([0.3, 1.0]))
    close(velocity, noise - x, 1e-11)


class GaussianDenoiser(Estimating):
    """The ideal denoiser of data with independent Gaussian DCT coefficients, mode by mode in numpy."""

    def __init__(self, process: Process) -> None:
        super().__init__(process)
        self.data = gaussian_data(*SIZE)

    def predict_mean(
        self, y_t: Tensor, t: Tensor, s: Tensor, context: Tensor | None = None, labels: Tensor | None = None
    ) -> Tensor:
        signal, noise = (
            curve(t, MU).expand(SIZE).numpy() for curve in (self.process.signal_scale, self.process.noise_scale)
        )
        estimate = self.data.estimate(coefficients(y_t.numpy()), signal, noise)
        return torch.from_numpy(pixels(self.process.signal_scale(s, MU).expand(SIZE).numpy() * estimate))


SOLVERS: dict[str, Callable[[], Sampler]] = {
    "ddim": lambda: DDIM(0.0, None),
    "dpmpp": lambda: DPMSolver(0.0, None),
    "unipc": lambda: UniPC(2, None),
    "heun-logsnr": lambda: Heun(None, variable="logsnr"),
    "heun-noise": lambda: Heun(None, variable="noise"),
}


@pytest.mark.parametrize("name", SOLVERS)
def test_rectified_and_variance_preserving_draw_the_same_images(name: str) -> None:
    """y_rectified = c y_vp with c = sqrt((1 - t)^2 + t^2) at equal logSNR, so exponential integrators agree."""
    vp, rectified = VP(1000), Spectral(1000)
    levels = torch.logspace(1.2, -1.5, 14, dtype=torch.float64)

    def grid(process: Process) -> Tensor:
        level: Callable[[Tensor], Tensor] = lambda t: torch.exp(torch.sub(*reversed(process.noise(t))))  # noqa: E731
        return torch.cat([scales_at(level, levels, 1e-3), torch.zeros(1, dtype=torch.float64)])

    ts, start = grid(rectified), images(3, 1, *SIZE)
    c = torch.sqrt((1 - ts[0]) ** 2 + ts[0] ** 2)
    ends = [
        SOLVERS[name]().reverse(GaussianDenoiser(process), y, CounterRNG(0, 3), scales=scales)
        for process, y, scales in ((vp, start, grid(vp)), (rectified, c * start, ts))
    ]
    close(ends[1], ends[0], 1e-8, 1e-8)


@pytest.mark.parametrize("law", ["rectified", "hdfm", "low-pass", "colored", "warm"])
@pytest.mark.parametrize("solver, order", [("ddim", 1.0), ("dpmpp", 2.0), ("heun-logsnr", 2.0), ("unipc", 3.0)])
def test_the_orders_of_convergence(law: str, solver: str, order: float) -> None:
    """Against the exact flow, which keeps (u - mean) / std of every coefficient; UniPC's corrector adds an order."""
    process, start = PROCESSES[law](), images(2, 1, *SIZE)
    process.num_scales = 10**6  # grids of any fineness
    denoiser = GaussianDenoiser(process)
    data, ends = denoiser.data, (0.9, 0.15)
    (signal, noise), (signal_s, noise_s) = (
        [f(t, MU).expand(SIZE).numpy() for f in (process.signal_scale, process.noise_scale)] for t in ends
    )
    ratio = np.sqrt((signal_s**2 * data.variance + noise_s**2) / (signal**2 * data.variance + noise**2))
    exact = signal_s * data.mean + ratio * (coefficients(start.numpy()) - signal * data.mean)

    def error(steps: int) -> float:
        path: list[Tensor] = []
        scales = torch.cat([torch.linspace(*ends, steps + 1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)])
        SOLVERS[solver]().reverse(denoiser, start, CounterRNG(0, 2), scales=scales, on_step=lambda i, x: path.append(x))
        return float(np.abs(coefficients(path[-2].numpy()) - exact).max())

    errors = [error(steps) for steps in (16, 32)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.45), errors


def test_grids_and_the_default_sampler_reach_pure_noise() -> None:
    process = Spectral(100)
    for grid in (karras_grid(process, 10), logsnr_grid(process, 10)):
        assert grid[0] == 1 and grid[-1] == 0 and bool((grid.diff() < 0).all())
        assert float(grid[1]) < 0.995 and torch.isfinite(grid).all()
    denoiser = GaussianDenoiser(process)
    for sampler in (*(make() for make in SOLVERS.values()), auto_sampler(denoiser)):
        sampler.steps = 20
        x = sampler.sample(denoiser, GaussianPrior(), CounterRNG(0, 64), (1, *SIZE), dtype=torch.float64)
        assert torch.isfinite(x).all()
        # the data's own means and variances, to the error of 20 steps and 64 samples
        u, data = coefficients(x.numpy()), denoiser.data
        error = (u.mean((0, 1)) - data.mean) / np.sqrt(data.variance / 64)
        assert np.abs(error).mean() < 1.5


@pytest.mark.parametrize("spread", [0.0, 1.0, 100.0])
@pytest.mark.parametrize("name", [*SOLVERS, "ancestral", "sde", "auto"])
def test_clocks_give_numbers_for_any_spread(name: str, spread: float) -> None:
    process = VP(16, clock=SpectralClock(spread))
    denoiser = GaussianDenoiser(process)
    others: dict[str, Callable[[], Sampler]] = {
        "ancestral": lambda: DDIM(1.0, None),
        "sde": lambda: DPMSolver(1.0, None),
        "auto": lambda: auto_sampler(denoiser),
    }
    sampler = (SOLVERS | others)[name]()
    sampler.grid = "uniform"
    if name == "heun-noise" and spread > 0:
        sampler = Heun(None, "uniform")
    x = sampler.sample(denoiser, GaussianPrior(), CounterRNG(0, 16), (1, *SIZE), dtype=torch.float64)
    assert torch.isfinite(x).all() and x.abs().max() < 20
    assert torch.isfinite(Denoiser(TinyNetwork().double(), process, Clean()).loss(x, torch.ones(16) * 0.4)).all()


def test_a_clock_of_no_spread_is_no_clock_and_of_large_spread_one_frequency_after_another() -> None:
    t = float64([0.2, 0.5, 1.0])
    for curve in ("signal_scale", "noise_scale"):
        with_clock, without = (getattr(VP(50, clock=clock), curve)(t, MU) for clock in (SpectralClock(0.0), None))
        close(with_clock, without.expand(with_clock.shape), 1e-14)
    log_snr = VP(50, clock=SpectralClock(1e4)).log_snr(0.5, MU)
    ends = torch.isposinf(log_snr) | (log_snr < -9.99)
    assert ends.all()
    # coarse detail is still the image, fine detail already noise
    assert bool(torch.isposinf(log_snr[0, 0])) and bool(log_snr[-1, -1] < -9.99)


def test_a_frequency_whose_clock_has_not_started_stays_what_it_is() -> None:
    process = VP(50, clock=SpectralClock(5.0))
    y, wrong = images(2, 1, *SIZE), images(2, 1, *SIZE, seed=1)
    step = process.step(0.3, 0.5)
    operator = process.operator()
    frozen = torch.isneginf(process.log_noise_scale(0.5, MU)).numpy()
    assert 0 < frozen.sum() < frozen.size
    y_s = operator.combine((step.posterior_coef_xt, y), (step.posterior_coef_x0, wrong))
    close(coefficients(y_s.numpy())[..., frozen], coefficients(y.numpy())[..., frozen], 1e-12)


def test_the_speed_with_half_of_hdfm_s_blur() -> None:
    """From v = -(1 - s)(1 + mu / 4) u^(mu / 2) y_0 + epsilon with u = 1 - (1 - s) t, written out."""
    process, t = Spectral(10, Rectified(1e-4), FlowBlur(1e-4)), 0.37
    u = 1 - (1 - 1e-4) * t
    speed = u ** (1 + MU / 2) + t * (1 - 1e-4) * (1 + MU / 4) * u ** (MU / 2)
    close(HalfBlurFlowLoss().speed(process, float64([t]), MU).squeeze(), speed, 1e-9)
    rectified = Spectral(10)
    close(HalfBlurFlowLoss().speed(rectified, float64([t]), MU), FlowLoss().speed(rectified, float64([t]), MU), 1e-9)


def test_the_flow_s_loss_on_an_image_prediction_is_its_loss_on_the_velocity() -> None:
    """For the straight path the squared error of v is 1 / t^2 of that of x_0."""
    process, t = Spectral(100), float64([0.05, 0.5, 1.0])
    weight = FlowLoss(max_weight=1e9)(process, process.operator(), Clean(), t, DataSpectrum(), SIZE)
    close(weight.flatten(), 1 / t**2, 1e-9)
    clipped = FlowLoss(max_weight=100.0)(process, process.operator(), Clean(), t, DataSpectrum(), SIZE)
    close(clipped.flatten(), (1 / t**2).clamp(max=100), 1e-9)
    for target, own in ((Flow(), 1.0), (Noise(), None), (Velocity(), None)):
        weight = FlowLoss(max_weight=1e9)(process, process.operator(), target, t, DataSpectrum(), SIZE)
        if own is not None:
            close(weight.flatten(), torch.ones(3), 1e-9)
        assert torch.isfinite(weight).all()


def test_spectral_preconditioning_of_a_process_without_blur_is_the_wiener_estimate() -> None:
    process, t = VP(50), float64([0.3, 0.7])
    denoiser = Denoiser(TinyNetwork().double(), process, Clean("spectral", clip=False))
    denoiser.spectrum.log_factor.copy_(torch.linspace(3, -3, len(denoiser.spectrum.log_factor)))
    for parameter in denoiser.network.parameters():
        parameter.data.zero_()  # the network answers 0: what is left is the skip
    y = images(2, 1, *SIZE)
    estimate = denoiser.predict_mean(y, t, float64([0.0, 0.0])).detach()
    signal, noise = process.signal_scale(t, MU), process.noise_scale(t, MU)
    power = denoiser.spectrum(MU)
    expected = pixels((signal * power / (signal**2 * power + noise**2)).numpy() * coefficients(y.numpy()))
    close(estimate, expected, 1e-10)
    # of white data it is the scalar estimate
    plain, white = (
        Denoiser(TinyNetwork().double(), VP(50), Clean(kind, clip=False)).predict_mean(y, t, 0 * t).detach()
        for kind in ("scalar", "spectral")
    )
    close(white, plain, 1e-10)
    assert isinstance(process.operator(), PixelOperator) and not isinstance(process.operator(), HeatOperator)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Rectified(0.0), ("signal_min", "(0, 1)")),
        (lambda: FlowBlur(1.0), ("signal_min", "(0, 1)")),
        (lambda: SpectralClock(-1.0), ("spread", ">= 0")),
        (lambda: SpectralClock(math.nan), ("spread", "number")),
        (lambda: Warm(blur_ratio=-0.5), ("ratio", ">= 0")),
        (lambda: CutOff(0.0), ("levels", "positive")),
        (lambda: VP(10, clock=3.0), ("clock=3.0", "no clock schedule")),  # type: ignore[arg-type]
        (lambda: Denoiser(nn.Conv2d(1, 1, 1), VP(10, clock=SpectralClock(2.0)), Flow()), ("flow", "do not change")),
        (lambda: Flow().check(InverseHeat(20)), ("flow", "do not change", "use target=clean")),
        (lambda: FlowLoss(0.0), ("max_weight", "positive")),
    ],
)
def test_bad_curves_are_refused_in_one_line(make: Callable[[], object], words: tuple[str, ...]) -> None:
    with refused(*words):
        make()
