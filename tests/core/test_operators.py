"""Operators against dense matrices: the DCT, the blur and the functional calculus, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.fft
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dpm_scales.errors import UserError
from dpm_scales.operators import Decay, HeatOperator, Operator, PixelOperator, dct_matrix, heat_blur
from support.reference import dct_basis, dense_function, dense_heat, eigenvalues, minus_laplacian, neumann_laplacian

SIZES = [(8, 8), (7, 7), (5, 8), (8, 5), (1, 6), (6, 1), (1, 1), (2, 3)]
SPECTRA = ["continuous", "discrete"]
TOLERANCE = 1e-12


def images(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Uniform values in [0, 1]."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def multiply(matrix: np.ndarray[Any, Any], x: Tensor) -> Tensor:
    """A dense matrix times every image of a batch."""
    return torch.from_numpy(x.double().flatten(-2).numpy() @ matrix.T).reshape(x.shape)


def float64(value: float | list[float]) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


# --- the transform ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), SIZES + [(33, 64)])
def test_analysis_is_scipys_orthonormal_dct(height: int, width: int) -> None:
    x = images(3, 2, height, width)
    expected = scipy.fft.dctn(x.numpy(), type=2, norm="ortho", axes=(-2, -1))
    np.testing.assert_allclose(HeatOperator().analysis(x).numpy(), expected, atol=TOLERANCE)


@pytest.mark.parametrize(("height", "width"), SIZES + [(33, 64)])
def test_synthesis_is_scipys_inverse_and_undoes_analysis(height: int, width: int) -> None:
    op, u = HeatOperator(), images(3, 2, height, width)
    expected = scipy.fft.idctn(u.numpy(), type=2, norm="ortho", axes=(-2, -1))
    np.testing.assert_allclose(op.synthesis(u).numpy(), expected, atol=TOLERANCE)
    torch.testing.assert_close(op.synthesis(op.analysis(u)), u, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("n", [1, 2, 3, 8, 31, 64])
def test_dct_matrix_is_orthonormal_and_scipys(n: int) -> None:
    basis = dct_matrix(n)
    assert basis.dtype == torch.float64
    torch.testing.assert_close(basis @ basis.T, torch.eye(n, dtype=torch.float64), atol=TOLERANCE, rtol=0)
    np.testing.assert_allclose(basis.numpy(), dct_basis(n), atol=TOLERANCE)


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_eigenvalues_in_the_order_of_the_coefficients(height: int, width: int, spectrum: str) -> None:
    mu = HeatOperator(spectrum).eigenvalues(height, width)
    assert mu.dtype == torch.float64
    np.testing.assert_allclose(mu.numpy(), eigenvalues(height, width, spectrum), atol=TOLERANCE)


@pytest.mark.parametrize(("height", "width"), [(5, 8), (1, 6), (4, 4)])
def test_discrete_eigenvalues_are_those_of_the_stencil_built_edge_by_edge(height: int, width: int) -> None:
    dense = np.linalg.eigvalsh(-neumann_laplacian(height, width))
    mu = HeatOperator("discrete").eigenvalues(height, width).flatten().sort().values
    np.testing.assert_allclose(mu.numpy(), dense, atol=1e-12)
    assert mu[-1] < 8


def test_spectra_agree_for_low_frequencies_only() -> None:
    continuous, discrete = (HeatOperator(s).eigenvalues(64, 64) for s in SPECTRA)
    assert abs(continuous[1, 1] / discrete[1, 1] - 1) < 1e-3
    assert continuous[-1, -1] > 2 * discrete[-1, -1]


# --- the blur ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("time", [0.0, 0.125, 2.0, 40.0])
def test_blur_is_the_dense_matrix_exponential(height: int, width: int, spectrum: str, time: float) -> None:
    x = images(2, 3, height, width)
    expected = multiply(dense_heat(height, width, time, spectrum), x)
    for argument in (time, float64(time)):
        torch.testing.assert_close(heat_blur(x, argument, spectrum), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize(("height", "width"), [(5, 8), (6, 6), (1, 4)])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_blur_takes_one_time_per_sample(height: int, width: int, spectrum: str) -> None:
    x, times = images(4, 3, height, width), [0.0, 0.3, 2.0, 700.0]
    blurred = heat_blur(x, float64(times), spectrum)
    for b, time in enumerate(times):
        expected = multiply(dense_heat(height, width, time, spectrum), x[b])
        torch.testing.assert_close(blurred[b], expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize(("height", "width", "tolerance"), [(32, 32, 1e-6), (48, 64, 1e-6), (321, 481, 2e-6)])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_blur_in_float32_is_close_to_float64(height: int, width: int, tolerance: float, spectrum: str) -> None:
    x = images(4, 1, height, width)
    times = float64([0.125, 2.0, 50.0, 5000.0])
    exact = heat_blur(x, times, spectrum)
    single = heat_blur(x.float(), times, spectrum)
    assert single.dtype == torch.float32
    assert (single.double() - exact).abs().max() <= tolerance
    assert (heat_blur(x.float(), 2.0, spectrum).double()[1] - exact[1]).abs().max() <= tolerance


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_blur_keeps_the_number_format(dtype: torch.dtype) -> None:
    x = images(2, 1, 6, 9, dtype=dtype)
    blurred = heat_blur(x, float64([0.5, 3.0]))
    assert blurred.dtype == dtype and blurred.shape == x.shape
    exact = heat_blur(x.double(), float64([0.5, 3.0]))
    assert (blurred.double() - exact).abs().max() <= 8 * torch.finfo(dtype).eps


def test_blur_is_a_gaussian_away_from_the_boundary() -> None:
    """T = sigma^2 / 2: the response to a point is the Gaussian of that standard deviation, and has its variance."""
    sigma, x = 2.5, torch.zeros(1, 1, 41, 61, dtype=torch.float64)
    x[..., 20, 30] = 1
    rows, columns = torch.meshgrid(torch.arange(41.0) - 20, torch.arange(61.0) - 30, indexing="ij")
    expected = torch.exp(-(rows**2 + columns**2) / (2 * sigma**2)).double() / (2 * math.pi * sigma**2)
    blurred = heat_blur(x, sigma**2 / 2)[0, 0]
    assert (blurred - expected).abs().max() < 1e-7
    assert abs((blurred * rows**2).sum() - sigma**2) < 1e-6


@settings(deadline=None, max_examples=30)
@given(
    height=st.integers(1, 12),
    width=st.integers(1, 12),
    first=st.floats(0, 50),
    second=st.floats(0, 50),
    spectrum=st.sampled_from(SPECTRA),
)
def test_semigroup_mean_and_extremum_principle(
    height: int, width: int, first: float, second: float, spectrum: str
) -> None:
    """exp(-S L) exp(-T L) = exp(-(S+T) L); the mean grey value stays; the stencil creates no new extrema."""
    x = images(2, 1, height, width)
    together = heat_blur(x, first + second, spectrum)
    torch.testing.assert_close(heat_blur(heat_blur(x, first, spectrum), second, spectrum), together, atol=1e-12, rtol=0)
    torch.testing.assert_close(together.mean((-2, -1)), x.mean((-2, -1)), atol=1e-13, rtol=0)
    if spectrum == "discrete":
        assert together.max() <= x.max() + 1e-12 and together.min() >= x.min() - 1e-12


def test_blur_of_no_time_is_the_image_and_of_long_time_its_mean() -> None:
    x = images(2, 3, 5, 7)
    torch.testing.assert_close(heat_blur(x, 0), x, atol=1e-13, rtol=0)
    torch.testing.assert_close(
        heat_blur(x, 1e6), x.mean((-2, -1), keepdim=True).expand_as(x).contiguous(), atol=1e-13, rtol=0
    )


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_blur_commutes_with_transposition_and_flips(spectrum: str) -> None:
    x = images(2, 1, 5, 8)
    blurred = heat_blur(x, 1.3, spectrum)
    torch.testing.assert_close(heat_blur(x.mT, 1.3, spectrum), blurred.mT, atol=1e-13, rtol=0)
    torch.testing.assert_close(heat_blur(x.flip(-1), 1.3, spectrum), blurred.flip(-1), atol=1e-13, rtol=0)


def test_blur_takes_views_and_empty_batches() -> None:
    x = images(3, 2, 8, 6)
    view = x.mT[:, :, ::2]
    torch.testing.assert_close(
        heat_blur(view, float64([0.1, 1, 9])), heat_blur(view.contiguous(), float64([0.1, 1, 9]))
    )
    assert heat_blur(x[:0], 1.0).shape == (0, 2, 8, 6)
    assert heat_blur(x[:0], torch.zeros(0)).shape == (0, 2, 8, 6)


@pytest.mark.parametrize("per_sample", [False, True])
def test_gradients_flow_to_images_and_times(per_sample: bool) -> None:
    x = images(2, 1, 3, 4).requires_grad_()
    time = float64([0.4, 1.2] if per_sample else 0.4).requires_grad_()
    assert torch.autograd.gradcheck(heat_blur, (x, time))


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_times_may_have_another_number_format(dtype: torch.dtype) -> None:
    x = images(2, 1, 4, 5)
    torch.testing.assert_close(heat_blur(x, torch.tensor([1, 3], dtype=dtype)), heat_blur(x, float64([1.0, 3.0])))
    torch.testing.assert_close(heat_blur(x, 3), heat_blur(x, 3.0))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"x": torch.zeros(3, 4, 5)}, ["(B, C, H, W)", "(3, 4, 5)"]),
        ({"dissipation_time": -1.0}, [">= 0", "-1.0"]),
        ({"dissipation_time": math.nan}, [">= 0", "nan"]),
        ({"dissipation_time": torch.ones(3)}, ["one per image", "(2,)", "(3,)"]),
        ({"dissipation_time": torch.ones(2, 1)}, ["one per image", "(2, 1)"]),
        ({"spectrum": "contnuous"}, ["'contnuous'", "did you mean 'continuous'", "discrete"]),
        ({"spectrum": 5}, ["5", "continuous", "discrete"]),
    ],
)
def test_bad_arguments_of_the_blur_say_what_is_allowed(arguments: dict[str, Any], words: list[str]) -> None:
    call = {"x": torch.zeros(2, 1, 4, 5), "dissipation_time": 1.0, "spectrum": "continuous"} | arguments
    with pytest.raises(UserError) as caught:
        heat_blur(**call)
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert "\n" not in message


@pytest.mark.parametrize("time", [1.0, torch.tensor([1.0, 2.0])])
def test_images_of_whole_numbers_are_refused_rather_than_rounded_to_nothing(time: Tensor | float) -> None:
    with pytest.raises(UserError, match="float"):
        heat_blur(torch.full((2, 1, 4, 5), 200, dtype=torch.uint8), time)


def test_infinite_time_gives_the_mean_or_is_refused() -> None:
    x = images(1, 1, 4, 5)
    try:
        blurred = heat_blur(x, math.inf)
    except UserError:
        return
    torch.testing.assert_close(blurred, x.mean().expand_as(x).contiguous(), atol=1e-12, rtol=0)


def test_bad_spectrum_of_the_operator_says_what_is_allowed() -> None:
    with pytest.raises(UserError, match=r"did you mean 'discrete'\? allowed: continuous, discrete"):
        HeatOperator("discret")


# --- functional calculus ----------------------------------------------------------------------------------------------

FUNCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[np.ndarray[Any, Any]], Any]]] = {
    "rational": (lambda mu: 1 / (1 + mu), lambda mu: 1 / (1 + mu)),
    "growing": (lambda mu: mu**2 - 0.3, lambda mu: mu**2 - 0.3),
    "cosine": (lambda mu: torch.cos(mu), np.cos),
    "constant": (lambda mu: torch.full((1, 1), 0.7, dtype=torch.float64), lambda mu: np.full_like(mu, 0.7)),
    "heat": (lambda mu: torch.exp(-0.8 * mu), lambda mu: np.exp(-0.8 * mu)),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("spectrum", [*SPECTRA, None])
def test_apply_is_the_dense_function_of_the_dense_operator(
    name: str, height: int, width: int, spectrum: str | None
) -> None:
    op: Operator = PixelOperator() if spectrum is None else HeatOperator(spectrum)
    f, dense = FUNCTIONS[name]
    y = images(2, 3, height, width) - 0.5
    expected = multiply(dense_function(minus_laplacian(height, width, spectrum), dense), y)
    torch.testing.assert_close(op.apply(f, y), expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize("spectrum", [*SPECTRA, None])
@pytest.mark.parametrize("constant", [False, True])
def test_apply_takes_one_function_per_sample(spectrum: str | None, constant: bool) -> None:
    op: Operator = PixelOperator() if spectrum is None else HeatOperator(spectrum)
    y, c = images(3, 2, 5, 4), float64([0.0, 0.5, 2.0])

    def f(mu: Tensor) -> Tensor:
        return 1 + c.reshape(-1, 1, 1, 1) if constant else torch.exp(-c.reshape(-1, 1, 1, 1) * torch.sqrt(mu))

    result = op.apply(f, y)
    for b, value in enumerate(c.tolist()):
        dense = dense_function(
            minus_laplacian(5, 4, spectrum),
            lambda mu, v=value: np.full_like(mu, 1 + v) if constant else np.exp(-v * np.sqrt(mu)),
        )
        # the square root turns the dense eigenvalue 1e-16 of the mean into 1e-8
        torch.testing.assert_close(result[b], multiply(dense, y[b]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("names", [["heat"], ["constant"], ["heat", "constant"], ["rational", "cosine", "constant"]])
@pytest.mark.parametrize(("height", "width"), [(5, 4), (1, 6), (1, 1)])
@pytest.mark.parametrize("spectrum", [*SPECTRA, None])
def test_combine_is_the_sum_of_the_dense_functions(
    names: list[str], height: int, width: int, spectrum: str | None
) -> None:
    op: Operator = PixelOperator() if spectrum is None else HeatOperator(spectrum)
    ys = [images(2, 3, height, width, seed=i) for i in range(len(names))]
    matrix, expected = minus_laplacian(height, width, spectrum), torch.zeros(2, 3, height, width).double()
    for name, y in zip(names, ys, strict=True):
        expected += multiply(dense_function(matrix, FUNCTIONS[name][1]), y)
    combined = op.combine(*((FUNCTIONS[name][0], y) for name, y in zip(names, ys, strict=True)))
    torch.testing.assert_close(combined, expected, atol=1e-10, rtol=0)
    single = op.combine(*((FUNCTIONS[name][0], y.float()) for name, y in zip(names, ys, strict=True)))
    assert single.dtype == torch.float32


@pytest.mark.parametrize("spectrum", [*SPECTRA, None])
@pytest.mark.parametrize("floor", [0.0, 0.001, 0.3])
@pytest.mark.parametrize("timed", [False, True])
@pytest.mark.parametrize("per_sample", [False, True])
def test_the_fast_route_of_decay_is_the_generic_one(
    spectrum: str | None, floor: float, timed: bool, per_sample: bool
) -> None:
    op: Operator = PixelOperator() if spectrum is None else HeatOperator(spectrum)
    y = images(3, 2, 7, 4)
    log_scale = float64([-0.1, 0.0, -2.0] if per_sample else -0.7)
    time = float64([0.0, 0.6, 9.0] if per_sample else 0.6) if timed else None
    decay = Decay(log_scale, time, floor)
    fast = op.apply(decay, y)
    torch.testing.assert_close(fast, op.apply(lambda mu: decay(mu), y), atol=1e-12, rtol=0)
    for b in range(3):
        scale = math.exp(log_scale[b] if per_sample else log_scale)
        T = 0.0 if time is None else float(time[b] if per_sample else time)
        dense = scale * ((1 - floor) * dense_function(minus_laplacian(7, 4, spectrum), lambda mu, T=T: np.exp(-mu * T)))
        expected = multiply(dense + scale * floor * np.eye(28), y[b])
        torch.testing.assert_close(fast[b], expected, atol=1e-12, rtol=0)


def test_logarithm_of_decay_is_finite_where_decay_underflows() -> None:
    mu = float64([0.0, 1.0, 20.0])
    decay = Decay(float64(-1.0), float64(8192.0))
    assert decay(mu)[-1] == 0
    torch.testing.assert_close(decay.log(mu), -1 - 8192 * mu)
    floored = Decay(float64(-1.0), float64(8192.0), 0.001)
    torch.testing.assert_close(floored.log(mu), float64([-1.0, -1 + math.log(0.001), -1 + math.log(0.001)]))


def test_apply_is_linear_and_composes() -> None:
    op, y = HeatOperator(), images(2, 1, 6, 5)

    def f(mu: Tensor) -> Tensor:
        return 1 / (1 + mu)

    def g(mu: Tensor) -> Tensor:
        return torch.exp(-mu)

    torch.testing.assert_close(op.apply(f, op.apply(g, y)), op.apply(lambda mu: f(mu) * g(mu), y), atol=1e-12, rtol=0)
    torch.testing.assert_close(
        op.apply(f, 2 * y - y.flip(0)), 2 * op.apply(f, y) - op.apply(f, y.flip(0)), atol=1e-12, rtol=0
    )


@pytest.mark.parametrize("op", [PixelOperator(), HeatOperator()])
def test_apply_keeps_float32_and_white_coordinates_are_pixels(op: Operator) -> None:
    y = images(2, 1, 4, 6, dtype=torch.float32)
    for f in (lambda mu: torch.exp(-mu), Decay(float64(-0.5), float64(1.0), 0.1)):
        assert op.apply(f, y).dtype == torch.float32
    assert torch.equal(op.to_white(y), y) and torch.equal(op.to_pixels(y), y)
    assert op.log_volume() == 0


def test_white_noise_stays_white_under_the_transform() -> None:
    noise = torch.randn(20000, 1, 2, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    covariance = torch.cov(HeatOperator().analysis(noise).flatten(1).T)
    assert (covariance - torch.eye(6)).abs().max() < 5 * math.sqrt(2 / 20000)
