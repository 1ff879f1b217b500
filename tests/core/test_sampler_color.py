"""Noise of a colour, added by a sampler: b(L) eps' becomes b(L) beta(-Laplacian) eps', as matrices."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from dpm_scales.denoisers import BaseDenoiser, Denoiser
from dpm_scales.describe import describe
from dpm_scales.editing.consistent import Resampling
from dpm_scales.models.instantiate import build
from dpm_scales.operators import HeatOperator
from dpm_scales.processes import VP, Blurring, Homogeneous, OsmosisDiffusion, Process, Spectral
from dpm_scales.rng import CounterRNG
from dpm_scales.samplers import (
    DDIM,
    Ancestral,
    Cold,
    Dissipation,
    DPMSolver,
    Heun,
    Sampler,
    StepContext,
    UniPC,
    auto_sampler,
)
from dpm_scales.samplers.color import StepColor
from dpm_scales.schedules import (
    Color,
    CosineLogSNR,
    DataPower,
    KernelColor,
    LinearTimeBlur,
    ListedColor,
    LowPass,
    PowerLaw,
    SinSquaredBlur,
    WhiteColor,
)
from dpm_scales.targets import Clean
from support.oracles import Estimating, ScriptedNoise, TinyNetwork, close, float64, images, refused
from support.reference import Array, dct_basis, eigenvalues

H, W = 3, 5
N = H * W
UNIT = torch.eye(N, dtype=torch.float64).reshape(N, 1, H, W)
BASIS = np.kron(dct_basis(H), dct_basis(W))
R = np.sqrt(eigenvalues(H, W)) / (2 * math.pi)
EXPONENT, OFFSET = 0.7, 0.1
K = 10

PROCESSES: dict[str, Callable[[], Process]] = {
    "pixels": lambda: VP(K),
    "blur": lambda: Blurring(K, blur=SinSquaredBlur(3.0)),
    "colour": lambda: Spectral(K, CosineLogSNR(), color=PowerLaw(-0.4)),
    "osmosis": lambda: OsmosisDiffusion(K, blur=LinearTimeBlur(2.0), guidance_noise=0.3),
}
SAMPLERS: dict[str, Callable[[Color | None], Sampler]] = {
    "ancestral": lambda color: Ancestral(noise_color=color),
    "larger": lambda color: Ancestral(variance="transition", noise_color=color),
    "ddim": lambda color: DDIM(0.3, None, noise_color=color),
    "sde-dpmpp": lambda color: DPMSolver(1.0, None, "uniform", noise_color=color),
    "churned": lambda color: Heun(None, "uniform", s_churn=3.0, s_noise=1.1, noise_color=color),
    "dissipation": lambda color: Dissipation(noise_color=color),
    "resampled": lambda color: Resampling(Ancestral(noise_color=color), 0),
}


class Nothing(Estimating):
    """Every estimate is 0: what remains of a step is y and the noise."""

    def predict_mean(
        self, y_t: Tensor, t: Tensor, s: Tensor, context: Tensor | None = None, labels: Tensor | None = None
    ) -> Tensor:
        return torch.zeros_like(y_t)


def added(sampler: Sampler, denoiser: BaseDenoiser, t: float, s: float) -> Array:
    """The matrix of the noise that a step from t to s adds, in whitened coordinates: its columns are those of eps'."""
    process = denoiser.process
    x = images(1, 1, H, W, seed=4)
    context = process.context(x, torch.Generator().manual_seed(1))
    context = None if context is None else context.expand(N, *context.shape[1:])
    path: list[Tensor] = []
    noise = ScriptedNoise([UNIT, 0 * UNIT])
    scales = float64([t, s, 0.0])
    sampler.reverse(denoiser, 0 * UNIT, noise, context, scales=scales, on_step=lambda i, x: path.append(x))
    return process.operator(context).to_white(path[0]).reshape(N, N).T.numpy()


def beta() -> Array:
    """beta of the power law, by numpy: a matrix of mean square 1."""
    w = (R.ravel() + OFFSET) ** EXPONENT
    return np.asarray(BASIS.T @ np.diag(w / np.sqrt((w**2).mean())) @ BASIS)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("process", PROCESSES)
def test_a_step_adds_b_beta_eps(process: str, sampler: str) -> None:
    """The coloured matrix is the white one times beta of the DCT, for any operator, whatever the process's colour."""
    denoiser = Nothing(PROCESSES[process]())
    denoiser.process.bind_size((H, W))
    white = added(SAMPLERS[sampler](None), denoiser, 0.7, 0.4)
    colored = added(SAMPLERS[sampler](PowerLaw(EXPONENT, OFFSET)), denoiser, 0.7, 0.4)
    assert np.abs(white).max() > 1e-3
    close(colored, white @ beta(), 1e-9)
    assert np.abs(colored - white).max() > 1e-2 * np.abs(white).max()


def test_the_covariance_of_an_ancestral_step_is_b_squared_beta_squared() -> None:
    """By formulas alone: b^2 = gamma_s^2 (1 - (gamma_s lambda_t / lambda_s gamma_t)^2), by numpy at each frequency."""
    process, t, s = Blurring(K, blur=SinSquaredBlur(3.0), min_decay=0.001), 0.7, 0.4
    matrix = added(Ancestral(noise_color=PowerLaw(EXPONENT, OFFSET)), Nothing(process), t, s)
    mu = eigenvalues(H, W).ravel()

    def curves(t: float) -> tuple[Array, Array]:
        low, high = math.atan(math.exp(-5.0)), math.atan(math.exp(5.0))
        log_snr = -2 * math.log(math.tan(low + t * (high - low)))
        time = (3.0 * math.sin(math.pi * t / 2) ** 2) ** 2 / 2
        signal = 1 / math.sqrt(1 + math.exp(-log_snr))
        return signal * (0.999 * np.exp(-mu * time) + 0.001), np.full_like(mu, 1 / math.sqrt(1 + math.exp(log_snr)))

    (signal_t, noise_t), (signal_s, noise_s) = curves(t), curves(s)
    b = noise_s * np.sqrt(1 - (signal_t * noise_s / (signal_s * noise_t)) ** 2)
    w = (R.ravel() + OFFSET) ** EXPONENT
    expected = BASIS.T @ np.diag(b**2 * w**2 / (w**2).mean()) @ BASIS
    close(matrix @ matrix.T, expected, 1e-10)


def fitted(denoiser: BaseDenoiser) -> BaseDenoiser:
    """Let the denoiser know of smooth images."""
    y = HeatOperator().apply(lambda mu: 1 / (1 + 4 * mu), images(40, 1, 8, 8))
    denoiser.spectrum.fit([(y, y.mean((-2, -1)))])
    return denoiser


COLORS: dict[str, Color] = {
    "power-law": PowerLaw(-0.8),
    "kernel": KernelColor(0.5, 8),
    "listed": ListedColor([1.0, 3.0, 0.2]),
    "low-pass": LowPass(0.5, "unit"),
    "data": DataPower(0.5),
}


@pytest.mark.parametrize("name", COLORS)
@pytest.mark.parametrize("size", [(H, W), (6, 4)])
def test_the_mean_square_of_beta_is_one_at_every_scale_and_size(name: str, size: tuple[int, int]) -> None:
    color = StepColor(COLORS[name], fitted(Nothing(VP(K))), size)
    number = size[0] * size[1]
    unit = torch.eye(number, dtype=torch.float64).reshape(number, 1, *size)
    for t in (0.05, 0.6, 1.0):
        matrix = color.tint(float64(t), unit).reshape(number, number)
        assert float(matrix.square().sum()) / number == pytest.approx(1, abs=1e-12)
        if not (name == "low-pass" and t == 1.0):  # which is white there
            assert float((matrix - torch.eye(number)).abs().max()) > 1e-2


def test_the_noise_drawn_has_the_energy_of_white_noise() -> None:
    """A Monte-Carlo check of the same, with the sampler's own random numbers."""
    number = 4000
    color = StepColor(PowerLaw(1.0), Nothing(VP(K)), (H, W))
    move = StepContext(Nothing(VP(K)), float64(0.5), float64(0.4), CounterRNG(0, number), color=color)
    drawn = move.added(torch.zeros(number, 1, H, W, dtype=torch.float64))
    per_image = drawn.square().mean((-3, -2, -1))
    assert abs(float(per_image.mean()) - 1) < 5 * float(per_image.std()) / math.sqrt(number)
    low = drawn.mean((-2, -1)).var() * N
    assert float(low) == pytest.approx(float(color.color.log(torch.ones(1), torch.zeros(1)).exp() ** 2), rel=0.15)


def test_a_color_that_learns_is_that_of_the_model_s_training_images() -> None:
    denoiser = fitted(Nothing(VP(K)))
    matrix = StepColor(DataPower(0.5), denoiser, (H, W)).tint(float64(0.5), UNIT).reshape(N, N).numpy()
    power = np.diag(BASIS @ matrix @ matrix.T @ BASIS.T)
    expected = denoiser.spectrum(torch.from_numpy(eigenvalues(H, W))).detach().numpy().ravel()
    close(power[1:] / power[1], expected[1:] / expected[1], 0.01)  # 48 knots of a curve of 25
    assert expected.max() / expected.min() > 10
    assert not DataPower(0.5).log_power.any()


def test_a_color_that_changes_with_t_is_that_of_the_scale_where_the_noise_is_added() -> None:
    """Of t for a step from t to s, of t_hat for churn."""
    color, denoiser = LowPass(0.7, "unit"), Nothing(VP(K))
    churned = Heun(None, "uniform", s_churn=3.0, noise_color=color)
    assert churned.churn is not None
    higher = float(churned.churn.scales(denoiser.process, float64([0.7, 0.4, 0.0]))[0])
    assert 0.7 < higher < 1
    for sampler, plain, t in (
        (Ancestral(noise_color=color), Ancestral(), 0.7),
        (churned, Heun(None, "uniform", s_churn=3.0), higher),
    ):
        w = np.exp(-eigenvalues(H, W).ravel() * 0.7 * (1 - t))
        tint = BASIS.T @ np.diag(w / np.sqrt((w**2).mean())) @ BASIS
        close(added(sampler, denoiser, 0.7, 0.4), added(plain, denoiser, 0.7, 0.4) @ tint, 1e-9)


@pytest.mark.parametrize("color", [WhiteColor(), PowerLaw(0.0), ListedColor([2.0, 2.0])], ids=["white", "0", "flat"])
def test_white_noise_by_any_name_gives_the_same_bits(color: Color) -> None:
    for dtype, make in ((torch.float32, SAMPLERS["ancestral"]), (torch.float64, SAMPLERS["churned"])):
        denoiser, y = Denoiser(TinyNetwork(), Blurring(4), Clean()).to(dtype), images(2, 1, H, W).to(dtype)
        plain, same, other = (
            make(chosen).reverse(denoiser, y, CounterRNG(3, 2)) for chosen in (None, color, PowerLaw(0.5))
        )
        assert torch.equal(plain, same) and not torch.equal(plain, other)


def test_steps_back_up_between_repeated_steps_are_those_of_the_process() -> None:
    """RePaint's: only the sampler's own noise is coloured."""
    denoiser, color = Nothing(VP(K)), PowerLaw(EXPONENT, OFFSET)
    # the draws of a step: the sampler's, the way back's, the sampler's again; the second is looked at
    matrices = []
    for chosen in (None, color):
        path: list[Tensor] = []
        sampler = Resampling(Ancestral(noise_color=chosen), 1)
        noise, scales = ScriptedNoise([0 * UNIT, UNIT, 0 * UNIT]), float64([0.7, 0.4, 0.0])
        sampler.reverse(denoiser, 0 * UNIT, noise, scales=scales, on_step=lambda i, x: path.append(x))  # noqa: B023
        matrices.append(path[0])
    assert float(matrices[0].abs().max()) > 0.1 and torch.equal(*matrices)


def test_a_color_is_left_as_it_was_and_describes_itself() -> None:
    color = DataPower(0.25)
    before = {name: value.clone() for name, value in color.named_buffers()}
    sampler = DPMSolver(1.0, 4, "uniform", noise_color=color)
    denoiser = fitted(Denoiser(TinyNetwork(), VP(K), Clean()))
    sampler.check(denoiser)
    drawn = sampler.reverse(denoiser, images(2, 1, H, W).float(), CounterRNG(0, 2))
    assert all(torch.equal(value, before[name]) for name, value in color.named_buffers())
    settings = describe(sampler)
    assert settings["noise_color"] == {
        "_target_": "dpm_scales.schedules.DataPower",
        "exponent": 0.25,
        "energy": "unit",
    }
    again = build(settings, Sampler, "sampler")
    assert describe(again) == settings
    assert torch.equal(again.reverse(denoiser, images(2, 1, H, W).float(), CounterRNG(0, 2)), drawn)


@pytest.mark.parametrize(
    "sampler",
    [
        DDIM(0.0, noise_color=PowerLaw()),
        DPMSolver(0.0, noise_color=PowerLaw()),
        UniPC(noise_color=PowerLaw()),
        Heun(noise_color=PowerLaw()),
        Dissipation(0.0, noise_color=PowerLaw()),
        Cold(noise_color=PowerLaw()),
    ],
    ids=lambda sampler: type(sampler).__name__,
)
def test_samplers_that_add_no_noise_refuse(sampler: Sampler) -> None:
    with refused("noise_color", type(sampler).__name__, "adds none", "noise_color=null", "sampler=ancestral"):
        sampler.check(Denoiser(TinyNetwork(), VP(100), Clean()))


def test_the_default_sampler_takes_a_color_where_it_adds_noise() -> None:
    color = PowerLaw(0.2)
    denoiser = Denoiser(TinyNetwork(), Blurring(K), Clean())
    sampler = auto_sampler(denoiser, noise_color=color)
    assert sampler.noise_color is color
    sampler.check(denoiser)
    denoiser = Denoiser(TinyNetwork(), VP(K), Clean())
    with refused("Heun adds none"):
        auto_sampler(denoiser, noise_color=color).check(denoiser)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Ancestral(noise_color="pink"), ("noise_color='pink'", "no colour")),  # type: ignore[arg-type]
        (lambda: Ancestral(noise_color=PowerLaw(energy="published")), ("PowerLaw", "published", "energy=unit")),
        (lambda: Ancestral(noise_color=LowPass()), ("LowPass", "published", "energy=unit")),
        (lambda: Ancestral(noise_color=PowerLaw(9.0, 1e-3)), ("PowerLaw", "1e", "lower its exponent")),
        (lambda: Ancestral(noise_color=PowerLaw(1e308)), ("PowerLaw", "zero or infinite")),
    ],
)
def test_bad_colors_are_refused_in_one_line(make: Callable[[], Sampler], words: tuple[str, ...]) -> None:
    with refused(*words):
        make().check(Denoiser(TinyNetwork(), Blurring(K), Clean()))


def test_a_process_without_noise_refuses() -> None:
    with refused("noise_color needs noise", "Homogeneous", "noise_color=null"):
        Dissipation(noise_color=PowerLaw()).check(Denoiser(TinyNetwork(), Homogeneous(K), Clean()))
