"""Coloured noise: a colour that does not change with t is white noise on filtered data, exactly."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from dpm_scales.denoisers import BaseDenoiser, Denoiser
from dpm_scales.likelihood import FlowLikelihood, VariationalBound
from dpm_scales.operators import HeatOperator
from dpm_scales.priors import GaussianPrior
from dpm_scales.processes import VE, VP, Blurring, InverseHeat, Process, Spectral
from dpm_scales.rng import CounterRNG
from dpm_scales.samplers import DDIM, Ancestral, Dissipation, DPMSolver, Heun, Sampler, UniPC
from dpm_scales.schedules import (
    Color,
    CosineLogSNR,
    DataPower,
    EDMNoise,
    KernelColor,
    LinearTimeBlur,
    ListedColor,
    LowPass,
    PowerLaw,
    Rectified,
    SinSquaredBlur,
    WhiteColor,
)
from dpm_scales.spectrum import DataSpectrum
from dpm_scales.targets import Clean
from support.oracles import TinyNetwork, close, float64, images, refused
from support.reference import dct_basis, eigenvalues

SIZE = (6, 10)
K = 12
BATCH = 3


def data_power() -> Color:
    color = DataPower(0.5)
    color.fit(lambda mu: 1 / (mu + 0.1))
    return color


COLORS: dict[str, Callable[[], Color]] = {
    "power-law": lambda: PowerLaw(0.5),
    "power-law-published": lambda: PowerLaw(-0.3, 0.02, "published"),
    "data": data_power,
    "kernel": lambda: KernelColor(0.4, 8),
    "listed": lambda: ListedColor([1.0, 0.2, 3.0], [0.0, 0.2, 0.6]),
}
LAWS: dict[str, Callable[[Color | None], Process]] = {
    "vp": lambda color: Spectral(K, CosineLogSNR(), color=color),
    "ve": lambda color: Spectral(K, EDMNoise(0.02, 20.0), color=color),
    "rectified": lambda color: Spectral(K, Rectified(), color=color),
    "blurring": lambda color: Blurring(K, blur=SinSquaredBlur(3.0), color=color),
    "heat": lambda color: InverseHeat(K, blur=LinearTimeBlur(3.0), color=color),
}
T = float64([0.25, 0.6, 1.0])
S = float64([0.1, 0.5, 0.75])


def over_colors(test: Callable[..., None]) -> Callable[..., None]:
    return pytest.mark.parametrize("name", COLORS)(pytest.mark.parametrize("law", LAWS)(test))


class Pair:
    """A coloured process, the white one, and the filter w(L) between them."""

    def __init__(self, law: str, name: str) -> None:
        self.colored, self.white = LAWS[law](COLORS[name]()), LAWS[law](None)
        self.colored.bind_size(SIZE)
        color = self.colored.color
        assert color is not None
        self.log_weight = color.log(torch.ones(1, 1, dtype=torch.float64), HeatOperator().eigenvalues(*SIZE))

    def tint(self, x: Tensor, power: int = 1) -> Tensor:
        """Return w(L)^power x, by scipy's DCT."""
        rows, columns = (torch.from_numpy(dct_basis(n)) for n in SIZE)
        return rows.T @ (torch.exp(power * self.log_weight) * (rows @ x @ columns.T)) @ columns


@over_colors
def test_the_law_is_that_of_white_noise_on_filtered_data(law: str, name: str) -> None:
    pair, x = Pair(law, name), images(BATCH, 2, *SIZE)
    x_t = images(BATCH, 2, *SIZE, seed=1)
    operator = HeatOperator()
    for colored, white in (
        (pair.colored.marginal(x, T), pair.white.marginal(pair.tint(x, -1), T)),
        (pair.colored.transition(x, S, T), pair.white.transition(pair.tint(x, -1), S, T)),
        (
            pair.colored.posterior(x_t, x, S, T),
            pair.white.posterior(pair.tint(x_t, -1), pair.tint(x, -1), S, T),
        ),
    ):
        close(colored.mean, pair.tint(white.mean))
        noise = images(BATCH, 2, *SIZE, seed=2)
        close(operator.apply(colored.std, noise), pair.tint(operator.apply(white.std, noise)), 1e-9)


@over_colors
def test_the_entropy_grows_by_the_sum_of_the_logarithms(law: str, name: str) -> None:
    pair = Pair(law, name)
    difference = pair.colored.conditional_entropy(T, SIZE) - pair.white.conditional_entropy(T, SIZE)
    close(difference, pair.log_weight.sum().expand(3), 1e-9)


class Estimate(BaseDenoiser):
    """An estimate of y_0 that is neither linear nor symmetric, between coordinates given by `there` and `back`."""

    def __init__(self, process: Process, there: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.process, self.target, self.spectrum = process, Clean("none", clip=False), DataSpectrum()
        self.there, self.back = there, back

    def predict_mean(
        self, y_t: Tensor, t: Tensor, s: Tensor, context: Tensor | None = None, labels: Tensor | None = None
    ) -> Tensor:
        z = self.there(y_t)
        estimate = torch.tanh(0.5 * z + 0.3 * z.roll(1, -1) - 0.2 * z.roll(2, -2)) * torch.cos(t)
        return self.process.operator().apply(self.process.signal(s), self.back(estimate))


SAMPLERS: dict[str, Callable[[], Sampler]] = {
    "ancestral": Ancestral,
    "ddim": lambda: DDIM(0.3, None),
    "heun": lambda: Heun(None, "uniform"),
    "heun-churned": lambda: Heun(None, "uniform", s_churn=3.0),
    "dpmpp": lambda: DPMSolver(0.0, None, "uniform"),
    "sde-dpmpp": lambda: DPMSolver(1.0, None, "uniform"),
    "unipc": lambda: UniPC(3, None, "uniform"),
    "dissipation": Dissipation,
}


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("law", LAWS)
def test_every_sampler_draws_the_filtered_samples_of_the_white_process(law: str, sampler: str) -> None:
    pair, start = Pair(law, "power-law"), images(BATCH, 1, *SIZE)
    same: Callable[[Tensor], Tensor] = lambda x: x  # noqa: E731
    white = Estimate(pair.white, same, same)
    colored = Estimate(pair.colored, lambda y: pair.tint(y, -1), pair.tint)
    expected = SAMPLERS[sampler]().reverse(white, start, CounterRNG(0, BATCH))
    actual = SAMPLERS[sampler]().reverse(colored, pair.tint(start), CounterRNG(0, BATCH))
    close(actual, pair.tint(expected), 1e-8)


@pytest.mark.parametrize("law", ["vp", "ve", "blurring"])
def test_the_likelihood_is_that_of_the_filtered_data(law: str) -> None:
    pair, x = Pair(law, "power-law"), images(2, 1, *SIZE)
    same: Callable[[Tensor], Tensor] = lambda x: x  # noqa: E731
    white = Estimate(pair.white, same, same)
    colored = Estimate(pair.colored, lambda y: pair.tint(y, -1), pair.tint)
    for make in (
        lambda denoiser: VariationalBound(denoiser, GaussianPrior()),
        lambda denoiser: FlowLikelihood(denoiser, GaussianPrior(), steps=6),
    ):
        expected = make(white)(pair.tint(x, -1), CounterRNG(0, 2))
        actual = make(colored)(x, CounterRNG(0, 2))
        close(actual.prior, expected.prior, 1e-7)
        if isinstance(make(white), VariationalBound):  # the flow's random signs are drawn in other coordinates
            close(actual.steps, expected.steps, 1e-7)


@pytest.mark.parametrize("name", COLORS)
def test_a_pixel_has_the_energy_of_white_noise(name: str) -> None:
    process = Pair("vp", name).colored
    color = process.color
    assert color is not None
    mu = HeatOperator().eigenvalues(*SIZE)
    energy = float((process.noise_scale(1.0, mu) ** 2).mean() / (1 - process.signal_scale(1.0, mu) ** 2).mean())
    number = 4000
    white = torch.randn(number, 1, *SIZE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    drawn = process.noise_at(1.0, white, process.operator())
    # a pixel's square has a variance of about 2; the pixels of an image are correlated, so images count as the sample
    per_image = drawn.square().mean((-3, -2, -1))
    error = 5 * float(per_image.std()) / math.sqrt(number)
    assert abs(float(per_image.mean()) - energy * float(1 - process.signal_scale(1.0, mu).square().mean())) < error
    if color.energy == "unit":
        assert energy == pytest.approx(1, abs=1e-12)
    else:
        assert energy == pytest.approx(
            float(np.mean((np.sqrt(eigenvalues(*SIZE)) / 2 / np.pi + 0.02) ** -0.6)), rel=1e-12
        )


def test_the_kernels_spectrum_is_that_of_an_explicit_covariance_matrix() -> None:
    decay, extent = 0.3, 12
    color = KernelColor(decay, extent, "published")
    # the covariance on the torus to which reflections extend an image, its eigenvalues by a plain FFT
    lags = np.minimum(np.arange(2 * extent), 2 * extent - np.arange(2 * extent))
    covariance = (np.hypot(lags[:, None], lags[None, :]) + 1) ** -decay
    along_an_axis = np.fft.fft2(covariance).real[0, : extent + 1]
    omega = np.pi * np.arange(extent + 1) / extent
    close(color.log_shape(torch.ones(1), torch.from_numpy(omega**2)), np.log(along_an_axis) / 2, 1e-10)
    assert along_an_axis.min() > 0 and along_an_axis.max() / along_an_axis.min() > 100


def test_noise_of_a_kernel_is_correlated_like_it() -> None:
    side, process = 32, Spectral(4, CosineLogSNR(), color=KernelColor(0.5, 16))
    process.bind_size((side, side))
    mu = torch.from_numpy(eigenvalues(side, side))
    basis = np.kron(dct_basis(side), dct_basis(side))
    power = (process.noise_scale(1.0, mu) ** 2).numpy().ravel()
    covariance = (basis.T * power) @ basis
    here = (side // 2) * side + side // 2
    for distance in (1, 2, 4, 8):
        there = here + distance
        correlation = covariance[here, there] / math.sqrt(covariance[here, here] * covariance[there, there])
        assert correlation == pytest.approx((distance + 1) ** -0.5, abs=0.03)


def test_white_is_no_color() -> None:
    colored, plain = VP(K, color=WhiteColor()), VP(K)
    mu = HeatOperator().eigenvalues(*SIZE)
    close(colored.noise_scale(T, mu), plain.noise_scale(T, mu).expand(3, 1, 1, 1), 0, 0)


def test_a_color_follows_the_size_of_the_images() -> None:
    process = VP(K, color=PowerLaw(1.0))
    for size in ((8, 8), (5, 31)):
        process.bind_size(size)
        energy = (process.noise_scale(1.0, HeatOperator().eigenvalues(*size)) ** 2).mean()
        assert float(energy) == pytest.approx(1 - float(process.signal_scale(1.0, float64([0.0])) ** 2), abs=1e-12)


def test_the_data_s_color_is_that_of_its_power_and_is_stored_with_the_model() -> None:
    process, mu = VP(K, color=DataPower(0.5, "published")), HeatOperator().eigenvalues(*SIZE)
    white = process.noise_scale(1.0, mu)
    power: Callable[[Tensor], Tensor] = lambda mu: (mu + 0.3) ** -1.5  # noqa: E731
    process.fit_color(power)
    ratio = process.noise_scale(1.0, mu) / white / power(mu).sqrt()
    assert float(ratio[mu > 0].max() / ratio[mu > 0].min()) < 1.01  # 48 knots of a smooth curve
    again = VP(K, color=DataPower(0.5, "published"))
    again.load_state_dict(process.state_dict())
    close(again.noise_scale(T, mu), process.noise_scale(T, mu), 0, 0)
    assert list(process.state_dict()) == ["color.log_power"]
    # every frequency has the same SNR
    snr = process.log_snr(0.5, mu) + torch.log(power(mu))
    assert float(snr[mu > 0].max() - snr[mu > 0].min()) < 0.02


def test_the_data_s_color_needs_no_device_of_its_own() -> None:
    process = VP(K, color=DataPower()).float()
    assert process.noise_scale(1.0, float64([1.0])).dtype == torch.float64


class _Whistle(Color):
    """Noise that falls towards t = 1 at high frequencies."""

    is_fixed = False

    def log_shape(self, t: Tensor, mu: Tensor) -> Tensor:
        return mu * (1 - t) * 0.5


def test_a_color_for_which_no_chain_exists_is_refused_with_scale_and_eigenvalue() -> None:
    with refused("at scale k=", "eigenvalue mu=", "transition would need the variance"):
        VP(50, color=_Whistle("published"))


def test_low_pass_noise_is_white_at_the_end_and_smooth_before() -> None:
    process, mu = Spectral(K, color=LowPass(0.25)), HeatOperator().eigenvalues(*SIZE)
    close(process.noise_scale(1.0, mu), torch.ones(SIZE), 1e-12)
    close(process.noise_scale(0.5, mu), 0.5 * torch.exp(-mu * 0.125), 1e-12)
    assert not process.is_scalar


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: PowerLaw(60.0), ("PowerLaw", "lower")),
        (lambda: VP(K, color=PowerLaw(9.0, 1e-3)), ("PowerLaw", "1e", "lower its exponent")),
        (lambda: VP(K, color=PowerLaw(1e308)), ("PowerLaw", "zero or infinite")),
        (lambda: PowerLaw(math.nan), ("PowerLaw", "exponent", "number")),
        (lambda: PowerLaw(0.5, 0.0), ("PowerLaw", "offset", "positive")),
        (lambda: PowerLaw(energy="half"), ("PowerLaw", "energy", "half", "unit")),
        (lambda: ListedColor([1.0]), ("weights", "two or more")),
        (lambda: ListedColor([1.0, 0.0]), ("entry 2", "w > 0")),
        (lambda: ListedColor([1.0, 2.0], [0.1]), ("2 weights", "1 frequencies")),
        (lambda: ListedColor([1.0, 2.0], [0.3, 0.1]), ("ascend",)),
        (lambda: ListedColor("white"), ("weights", "list of numbers")),  # type: ignore[arg-type]
        (lambda: KernelColor(-1.0), ("KernelColor", "decay", "positive")),
        (lambda: KernelColor(0.2, 0), ("KernelColor", "extent", "whole number")),
        (lambda: LowPass(0.0), ("LowPass", "time", "positive")),
        (lambda: Spectral(K, color=LowPass(9.0)), ("LowPass", "1e", "lower its time")),
        (lambda: Spectral(K, color=ListedColor([1.0, 1e9])), ("ListedColor", "1e9", "bring its weights closer")),
        (lambda: VE(K, color="pink"), ("color='pink'", "no color schedule")),  # type: ignore[arg-type]
    ],
)
def test_bad_colors_are_refused_in_one_line(make: Callable[[], object], words: tuple[str, ...]) -> None:
    with refused(*words):
        value = make()
        if isinstance(value, PowerLaw):
            VP(K, color=value)


def test_a_pretended_network_trains_under_color() -> None:
    process = VE(K, color=PowerLaw(0.4))
    denoiser = Denoiser(TinyNetwork().double(), process, Clean())
    loss = denoiser.loss(images(BATCH, 1, *SIZE), T)
    loss.sum().backward()
    assert torch.isfinite(loss).all()
