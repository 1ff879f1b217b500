"""Coloured noise: a colour that does not change with t is white noise on filtered data, exactly."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dpm_scales.denoisers import Denoiser
from dpm_scales.operators import HeatOperator, degrees
from dpm_scales.processes import VE, VP, OsmosisDiffusion, Spectral
from dpm_scales.samplers import DPMSolver
from dpm_scales.schedules import (
    Color,
    CosineLogSNR,
    DataPower,
    KernelColor,
    LinearTimeBlur,
    ListedColor,
    LowPass,
    PowerLaw,
    WhiteColor,
)
from dpm_scales.schedules.color import dct_products
from dpm_scales.targets import Clean
from support.colors import COLORS, LAWS, SIZE, K, pair
from support.oracles import TinyNetwork, close, float64, images, pretended_gpu, refused
from support.reference import Array, dct_basis, eigenvalues

BATCH = 3
T = float64([0.25, 0.6, 1.0])
S = float64([0.1, 0.5, 0.75])


def over_colors(test: Callable[..., None]) -> Callable[..., None]:
    return pytest.mark.parametrize("name", COLORS)(pytest.mark.parametrize("law", LAWS)(test))


@over_colors
def test_the_law_is_that_of_white_noise_on_filtered_data(law: str, name: str) -> None:
    case, x = pair(law, name), images(BATCH, 2, *SIZE)
    x_t = images(BATCH, 2, *SIZE, seed=1)
    operator = HeatOperator()
    for colored, white in (
        (case.colored.marginal(x, T), case.white.marginal(case.tint(x, -1), T)),
        (case.colored.transition(x, S, T), case.white.transition(case.tint(x, -1), S, T)),
        (
            case.colored.posterior(x_t, x, S, T),
            case.white.posterior(case.tint(x_t, -1), case.tint(x, -1), S, T),
        ),
    ):
        close(colored.mean, case.tint(white.mean), 1e-10, 0)
        noise = images(BATCH, 2, *SIZE, seed=2)
        close(operator.apply(colored.std, noise), case.tint(operator.apply(white.std, noise)), 1e-10, 0)


def listed(values: Array, knots: Array, x: Array) -> Array:
    """Return a curve that is log-linear between its values at the knots."""
    return np.asarray(np.exp(np.interp(x, knots, np.log(values))))


def kernel_matrix(size: tuple[int, int], decay: float) -> np.ndarray:
    """The covariance of all pixels of an image."""
    y, x = np.divmod(np.arange(size[0] * size[1]), size[1])
    return np.asarray((np.hypot(y[:, None] - y, x[:, None] - x) + 1) ** -decay)


def covariance_weight(mu: Array) -> Array:
    """From variances under the dense covariance: means near multiples of the lowest frequency, linear between."""
    basis = np.kron(dct_basis(SIZE[0]), dct_basis(SIZE[1]))
    variances = np.diag(basis @ kernel_matrix(SIZE, 0.4) @ basis.T)
    place = np.sqrt(mu.ravel()) * max(SIZE) / np.pi
    knots = np.arange(int(place.max()) + 2)
    hats = np.clip(1 - np.abs(place - knots[:, None]), 0, None)
    series = (hats @ variances) / hats.sum(1)
    return np.sqrt(np.interp(place, knots, series)).reshape(mu.shape)


def kernel_weight(mu: Array) -> Array:
    d = np.arange(9)
    kernel = (np.hypot(d[:, None], d[None, :]) + 1) ** -0.4
    twice = np.where((d > 0) & (d < 8), 2.0, 1.0)
    series = [(twice[:, None] * twice * kernel * np.cos(np.pi * k * d / 8)[:, None]).sum() for k in d]
    return np.asarray(np.sqrt(np.interp(np.sqrt(mu), np.pi * d / 8, series)))


def data_weight(mu: Array) -> Array:
    knots = np.linspace(math.log(1e-5), math.log(20.0), 48)
    inner = listed((np.exp(knots) + 0.1) ** -0.5, knots, np.log(mu.clip(1e-30)))
    return np.where(mu > 0, inner, 0.1**-0.5)


FORMULAS: dict[str, Callable[[Array], Array]] = {
    "power-law": lambda mu: (np.sqrt(mu) / (2 * np.pi) + 0.05) ** 0.5,
    "power-law-published": lambda mu: (np.sqrt(mu) / (2 * np.pi) + 0.02) ** -0.3,
    "data": data_weight,
    "kernel": covariance_weight,
    "kernel-periodic": kernel_weight,
    "listed": lambda mu: listed(np.array([1.0, 0.2, 3.0]), np.array([0.0, 0.2, 0.6]), np.sqrt(mu) / (2 * np.pi)),
}


@pytest.mark.parametrize("name", COLORS)
def test_weights_in_closed_form(name: str) -> None:
    """By numpy, divided by the root mean square over the image's spectrum unless published."""
    weight = FORMULAS[name](eigenvalues(*SIZE))
    if not name.endswith("published"):
        weight = weight / np.sqrt((weight**2).mean())
    close(pair("vp", name).log_weight.exp(), weight, 1e-10, 0)


@over_colors
def test_the_entropy_grows_by_the_sum_of_the_logarithms(law: str, name: str) -> None:
    case = pair(law, name)
    difference = case.colored.conditional_entropy(T, SIZE) - case.white.conditional_entropy(T, SIZE)
    close(difference, case.log_weight.sum().expand(3), 1e-10, 0)


@pytest.mark.parametrize("name", COLORS)
def test_a_pixel_has_the_energy_of_white_noise(name: str) -> None:
    process = pair("vp", name).colored
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


@pytest.mark.parametrize("size", [(7, 12), (16, 5), (9, 9), (1, 13), (2, 2)])
@pytest.mark.parametrize("decay", [0.2, 0.7])
def test_the_kernels_spectrum_is_that_of_an_explicit_covariance_matrix(size: tuple[int, int], decay: float) -> None:
    """The variances of the DCT's coefficients; those of one radial frequency alone are kept apart to 1e-10."""
    basis = np.kron(dct_basis(size[0]), dct_basis(size[1]))
    variances = np.diag(basis @ kernel_matrix(size, decay) @ basis.T).reshape(size)
    kernel = torch.from_numpy((np.hypot(np.arange(size[0])[:, None], np.arange(size[1])) + 1) ** -decay)
    close(dct_products(size[0]) @ kernel @ dct_products(size[1]).mT, variances, 1e-10)
    color = KernelColor(decay, energy="published")
    mu = HeatOperator().eigenvalues(*size)
    color.bind_spectrum(mu)
    found = torch.exp(2 * color.log_shape(torch.ones(1), mu))
    assert float(found[0, 0]) == pytest.approx(variances[0, 0], rel=1e-10)
    assert float((found.log() - np.log(variances)).abs().max()) < 0.6
    assert float(found.mean()) == pytest.approx(1, abs=0.02)  # C(0)


@pytest.mark.parametrize(("decay", "error"), [(0.2, 0.02), (0.5, 0.05), (1.0, 0.06)])
@pytest.mark.parametrize("size", [(32, 32), (24, 40)])
def test_noise_of_a_kernel_is_correlated_like_it(decay: float, error: float, size: tuple[int, int]) -> None:
    """Of all pixels up to a distance of 8 px from one in the middle, in every direction; as shipped, with 0.2."""
    process = Spectral(4, CosineLogSNR(), color=KernelColor(decay))
    process.bind_size(size)
    mu = torch.from_numpy(eigenvalues(*size))
    basis = np.kron(dct_basis(size[0]), dct_basis(size[1]))
    covariance = (basis.T * (process.noise_scale(1.0, mu) ** 2).numpy().ravel()) @ basis
    deviation = np.sqrt(np.diag(covariance))
    correlation = covariance / deviation[:, None] / deviation
    here, wanted = (size[0] // 2) * size[1] + size[1] // 2, kernel_matrix(size, decay)
    near = wanted[here] > 9**-decay - 1e-12
    assert near.sum() > 180
    assert np.abs(correlation - wanted)[here][near].max() < error


def test_the_former_series_is_that_of_a_periodic_kernel() -> None:
    decay, extent = 0.3, 12
    color = KernelColor(decay, extent, "published")
    # the covariance on the torus to which reflections extend an image, its eigenvalues by a plain FFT
    lags = np.minimum(np.arange(2 * extent), 2 * extent - np.arange(2 * extent))
    covariance = (np.hypot(lags[:, None], lags[None, :]) + 1) ** -decay
    along_an_axis = np.fft.fft2(covariance).real[0, : extent + 1]
    omega = np.pi * np.arange(extent + 1) / extent
    close(color.log_shape(torch.ones(1), torch.from_numpy(omega**2)), np.log(along_an_axis) / 2, 1e-10)
    assert along_an_axis.min() > 0 and along_an_axis.max() / along_an_axis.min() > 100


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


def test_low_pass_noise_is_white_at_the_end_and_smooth_before() -> None:
    process, mu = Spectral(K, color=LowPass(0.25)), HeatOperator().eigenvalues(*SIZE)
    close(process.noise_scale(1.0, mu), torch.ones(SIZE), 1e-12)
    close(process.noise_scale(0.5, mu), 0.5 * torch.exp(-mu * 0.125), 1e-12)
    assert not process.is_scalar


def fit_power(exponent: float, smallest: float = 1e-3) -> None:
    """Fit the colour of a process to steep power, as training does before its first step."""
    VP(K, color=DataPower(exponent)).fit_color(lambda mu: smallest + (1 - mu).clamp(min=0))


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
        (lambda: fit_power(9.0), ("DataPower", "1e", "at most 1e6", "lower its exponent")),
        (lambda: fit_power(1e308), ("DataPower", "zero or infinite", "lower its exponent")),
        (lambda: fit_power(0.5, smallest=0.0), ("DataPower", "zero or infinite")),
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


class _Recorder(HeatOperator):
    """Keeps the function that it is given."""

    applied: Callable[[Tensor], Tensor]

    def apply(self, f: Callable[[Tensor], Tensor], y: Tensor) -> Tensor:
        self.applied = f
        return y


@pytest.mark.parametrize("make", [lambda: LowPass(0.3), DataPower], ids=["low-pass", "data"])
def test_a_device_expands_the_noise_of_the_color_that_was_fitted_last(
    make: Callable[[], Color], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Degrees found before training, when a colour of the data is still white, would end in NaN."""
    process = OsmosisDiffusion(8, blur=LinearTimeBlur(2.0), color=make(), guidance_noise=0.3)
    DPMSolver(1.0, 4, "uniform").check(Denoiser(TinyNetwork(), process, Clean()))
    process.fit_color(lambda mu: 1 / (mu + 0.1))
    operator = _Recorder()
    process.noise_at(T, images(BATCH, 1, *SIZE), operator)
    nodes = degrees._nodes  # a device's own, as far as a host can tell
    monkeypatch.setattr(degrees, "_nodes", lambda number, device: nodes(number, None))
    device: Any = SimpleNamespace(type="cuda")
    (series,) = process.degrees.series(operator.applied, 1, device)
    assert series.coefficients is not None
    angle = torch.linspace(0, math.pi, 50, dtype=torch.float64)
    cosines = torch.cos(torch.arange(series.coefficients.shape[-1])[:, None] * angle)
    expected = operator.applied(4 * (1 + torch.cos(angle))[None])
    close(series.coefficients @ cosines, expected, 1e-2 * float(expected.max()), 0)


@pytest.mark.parametrize("make", [lambda: LowPass(0.3), PowerLaw], ids=["low-pass", "power-law"])
def test_losses_of_colored_osmosis_never_wait_for_the_device(make: Callable[[], Color]) -> None:
    process = OsmosisDiffusion(8, blur=LinearTimeBlur(2.0), color=make(), guidance_input=False)
    denoiser = Denoiser(TinyNetwork(), process, Clean())
    with pretended_gpu(denoiser):
        x = torch.rand(BATCH, 1, *SIZE, device="cuda")
        assert denoiser.loss(x, torch.rand(BATCH, device="cuda", dtype=torch.float64)).device.type == "cuda"
