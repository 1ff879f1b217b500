"""The osmosis filter by Chebyshev expansion against matrix exponentials, and what the theory says of it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse.linalg import expm_multiply
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from dpm_scales.errors import UserError
from dpm_scales.operators import OsmosisOperator, evolve, heat_blur
from dpm_scales.operators.chebyshev import heat_coefficients
from support.osmosis_twins import (
    SIZES,
    guidance_images,
    images,
    means,
    osmosis_matrix,
    per_image,
    sparse_osmosis_matrix,
)

TIMES = [0.0, 0.3, 1.0, 5.0, 10.0, 100.0, 1000.0]
PAPER_TIMES = [1, 5, 10, 100, 1000, 10000]
METHODS = ["chebyshev", "bicgstab", "cg"]


def exponentials(v: Tensor, u: Tensor, times: list[float]) -> Tensor:
    """exp(tP) u by scipy's dense matrix exponential."""
    return torch.stack([per_image(lambda grey, t=t: scipy.linalg.expm(t * osmosis_matrix(grey)), v, u) for t in times])


# --- against matrix exponentials --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("dark", [0.0, 0.1, 0.5])
@pytest.mark.parametrize(("tol", "tolerance"), [(1e-6, 1e-6), (1e-12, 1e-10)])
def test_all_times_are_the_dense_matrix_exponentials(
    height: int, width: int, dark: float, tol: float, tolerance: float
) -> None:
    v, u = guidance_images(2, 3, height, width, dark=dark), images(2, 3, height, width)
    result = evolve(u, v, TIMES, tol=tol)
    assert result.shape == (len(TIMES), 2, 3, height, width) and result.dtype == torch.float64
    torch.testing.assert_close(result, exponentials(v, u, TIMES), atol=tolerance, rtol=0)


@pytest.mark.parametrize("dark", [0.0, 0.1])
def test_larger_images_are_scipys_action_of_the_matrix_exponential(dark: float) -> None:
    v, u = guidance_images(1, 2, 30, 41, dark=dark), images(1, 2, 30, 41)
    result = evolve(u, v, [1, 10, 100])
    single = evolve(u.float(), v.float(), [1, 10, 100])
    assert single.dtype == torch.float32
    for c in range(2):
        matrix = sparse_osmosis_matrix(v[0, c].numpy())
        for k, time in enumerate((1, 10, 100)):
            expected = expm_multiply(time * matrix, u[0, c].numpy().ravel()).reshape(30, 41)
            np.testing.assert_allclose(result[k, 0, c], expected, atol=1e-6)
            np.testing.assert_allclose(single[k, 0, c], expected, atol=5e-5 if dark else 2e-6)


@settings(deadline=None, max_examples=25)
@given(
    height=st.integers(1, 8),
    width=st.integers(1, 8),
    seed=st.integers(0, 999),
    dark=st.sampled_from([0.0, 0.1, 0.5, 0.9]),
    time=st.floats(0, 300),
)
def test_any_size_guidance_and_time(height: int, width: int, seed: int, dark: float, time: float) -> None:
    v, u = guidance_images(1, 1, height, width, seed=seed, dark=dark), images(1, 1, height, width, seed=seed + 1)
    expected = exponentials(v, u, [time])
    tolerance = 1e-6 * max(1.0, float(expected.max()))  # dark guidance gathers grey values in few pixels
    torch.testing.assert_close(evolve(u, v, [time]), expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize("batch", [(2, 3), (1, 3), (2, 1), (1, 1)])
def test_one_guidance_image_may_serve_samples_and_channels(batch: tuple[int, int]) -> None:
    v, u = guidance_images(*batch, 4, 5), images(2, 3, 4, 5)
    torch.testing.assert_close(evolve(u, v, [3.0]), exponentials(v, u, [3.0]), atol=1e-6, rtol=0)
    torch.testing.assert_close(evolve(255 * u, 99 * v, [3.0]), 255 * evolve(u, v, [3.0]), atol=1e-9, rtol=0)


@pytest.mark.parametrize("form", ["lists", "tensor", "float32", "numpy"])
def test_each_sample_may_have_its_own_times(form: str) -> None:
    v, u = guidance_images(3, 2, 5, 4), images(3, 2, 5, 4)
    rows = [[0.0, 1.0, 5.0], [2.0, 1.0, 50.0]]
    times: Any = rows
    if form != "lists":
        times = torch.tensor(rows, dtype=torch.float32 if form == "float32" else torch.float64)
        times = times.numpy() if form == "numpy" else times
    result = evolve(u, v, times)
    for b in range(3):
        column = [row[b] for row in rows]
        expected = exponentials(v[b : b + 1], u[b : b + 1], column)
        torch.testing.assert_close(result[:, b : b + 1], expected, atol=1e-6, rtol=0)


def test_times_may_be_whole_numbers_tensors_or_arrays() -> None:
    v, u = guidance_images(1, 1, 4, 5), images(1, 1, 4, 5)
    expected = evolve(u, v, [1.0, 7.0])
    for times in ([1, 7], (1.0, 7), torch.tensor([1, 7]), np.array([1, 7]), list(np.array([1, 7], dtype=np.float32))):
        assert torch.equal(evolve(u, v, times), expected)


def test_all_times_together_are_those_one_by_one() -> None:
    v, u = guidance_images(1, 2, 9, 8), images(1, 2, 9, 8)
    together = evolve(u, v, PAPER_TIMES)
    for k, time in enumerate(PAPER_TIMES):
        assert torch.equal(together[k], evolve(u, v, [time])[0])


def test_degree_of_the_papers_times() -> None:
    """About sqrt(8 t ln(4 / tol)) products: few of them is the point."""
    assert len(heat_coefficients(10000.0, 1e-6)) < 1000
    assert len(heat_coefficients(1.0, 1e-6)) < 15


# --- theory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dark", [0.0, 0.1])
def test_mean_grey_value_is_kept_and_no_value_is_negative(method: str, dtype: torch.dtype, dark: float) -> None:
    v = guidance_images(2, 3, 12, 9, dark=dark)
    for u in (images(2, 3, 12, 9), (images(2, 3, 12, 9) > 0.95).double()):
        result = evolve(u.to(dtype), v.to(dtype), [0.1, 1, 10, 100], method)
        torch.testing.assert_close(means(result.double()), means(u).expand(4, 2, 3, 1, 1), atol=0, rtol=1e-6)
        assert result.min() >= 0


def test_a_point_spreads_without_undershoot_beyond_the_tolerance() -> None:
    """Far from the point exp(tP) u is tiny and positive; the expansion misses it by less than the tolerance."""
    u = torch.zeros(1, 1, 25, 31, dtype=torch.float64)
    u[..., 12, 15] = 1
    v = guidance_images(1, 1, 25, 31)
    for tol in (1e-4, 1e-6, 1e-9):
        result = evolve(u, v, [0.5, 2.0], tol=tol)
        exact = evolve(u, v, [0.5, 2.0], tol=1e-12)
        assert result.min() >= 0 and (result - exact).abs().max() <= tol


@pytest.mark.parametrize("method", METHODS)
def test_the_steady_state_is_the_guidance_image_with_the_mean_of_the_image(method: str) -> None:
    v, u = guidance_images(2, 2, 6, 7, dark=0), images(2, 2, 6, 7)
    steady = v * means(u) / means(v)
    options = {} if method == "chebyshev" else {"num_steps": 8}
    torch.testing.assert_close(evolve(u, v, [1e5], method, **options)[0], steady, atol=1e-5, rtol=0)
    torch.testing.assert_close(evolve(steady, v, [0.7, 30.0], method)[1], steady, atol=1e-9, rtol=0)


@pytest.mark.parametrize("dark", [0.0, 0.1])
def test_relative_entropy_increases(dark: float) -> None:
    """-sum u ln(u / w), w the steady state: Eq. (50), Peter 2024."""
    v, u = guidance_images(2, 3, 8, 9, dark=dark), images(2, 3, 8, 9)
    path = evolve(u, v, [0.0, 0.1, 0.5, 1, 2, 5, 10, 20, 50], tol=1e-10)
    entropy = -torch.special.xlogy(path, path / (v * means(u) / means(v))).sum((-2, -1))
    assert (entropy.diff(dim=0) > 0).all()


@settings(deadline=None, max_examples=20)
@given(first=st.floats(0, 30), second=st.floats(0, 30), seed=st.integers(0, 99))
def test_semigroup(first: float, second: float, seed: int) -> None:
    v, u = guidance_images(1, 1, 6, 7, seed=seed), images(1, 1, 6, 7, seed=seed)
    twice = evolve(evolve(u, v, [first], tol=1e-9)[0], v, [second], tol=1e-9)
    torch.testing.assert_close(twice, evolve(u, v, [first + second], tol=1e-9), atol=1e-8, rtol=0)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_constant_guidance_is_homogeneous_diffusion(height: int, width: int) -> None:
    v, u = torch.full((1, 1, height, width), 0.4, dtype=torch.float64), images(2, 3, height, width)
    result = evolve(u, v, TIMES, tol=1e-10)
    for k, time in enumerate(TIMES):
        torch.testing.assert_close(result[k], heat_blur(u, time, "discrete"), atol=1e-9, rtol=0)


def test_black_images_stay_black_and_no_time_changes_nothing() -> None:
    v, u = guidance_images(1, 2, 5, 4), images(1, 2, 5, 4)
    u[:, 0] = 0
    for method in METHODS:
        result = evolve(u, v, [0.0, 3.0], method)
        assert (result[:, :, 0] == 0).all() and (result[1, :, 1] > 0).all()
        torch.testing.assert_close(result[0], u, atol=1e-13, rtol=0)


def test_gradients_flow_to_the_images() -> None:
    v, u = guidance_images(2, 1, 3, 4), (images(2, 1, 3, 4) + 0.1).requires_grad_()
    assert torch.autograd.gradcheck(lambda u: evolve(u, v, [0.3, 2.0], tol=1e-10), (u,))


ROUNDING = {1e-2: (2e-7, 5e-7, 7e-7, 6e-7, 4e-7), 1e-6: (3e-7, 2e-6, 1e-5, 5e-5, 3e-4)}


@pytest.mark.parametrize("least", ROUNDING)
def test_single_precision_is_as_near_as_the_docstring_says(least: float) -> None:
    """Its table, over the largest pixel, within a factor of 4 either way; float64 stays below the tolerance."""
    rows = [line.split()[2:] for line in str(evolve.__doc__).splitlines() if line.strip().startswith("v >= ")]
    assert [least, *ROUNDING[least]] in [[float(number) for number in row] for row in rows]
    rng, times = torch.Generator().manual_seed(0), [1.0, 10.0, 100.0, 1000.0, 10000.0]
    u = torch.rand(2, 3, 24, 31, dtype=torch.float64, generator=rng)
    noise = torch.randn(u.shape, dtype=torch.float64, generator=rng)
    v = (0.2 * u.mean((-2, -1), keepdim=True) + 0.2 * noise).clamp(least, 1)
    exact = evolve(u, v, times, tol=1e-12)
    largest = exact.amax((1, 2, 3, 4))

    def off(found: Tensor) -> Tensor:
        return (found - exact).abs().amax((1, 2, 3, 4)) / largest

    said = torch.tensor(ROUNDING[least], dtype=torch.float64)
    single = off(evolve(u.float(), v.float(), times, tol=1e-6).double())
    assert bool((single < 4 * said).all()) and bool((single > said / 4).all()), single
    assert bool((off(evolve(u, v, times, tol=1e-6)) < 1e-6).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_single(dtype: torch.dtype) -> None:
    v, u = guidance_images(1, 1, 6, 7), images(1, 1, 6, 7, dtype=dtype)
    result = evolve(u, v, [0.5, 50.0])
    assert result.dtype == dtype
    assert torch.equal(result, evolve(u.float(), v, [0.5, 50.0]).to(dtype))


# --- devices and mistakes ---------------------------------------------------------------------------------------------


def test_the_expansion_stays_on_the_device_and_nothing_waits_for_it() -> None:
    with FakeTensorMode():
        u, v = torch.rand(2, 3, 6, 9, device="cuda"), torch.rand(2, 3, 6, 9, device="cuda")
        for times in ([0.0, 0.5], [[0.0, 0.1], [0.2, 0.1]]):
            result = evolve(u, v, times)
            assert result.device.type == "cuda" and result.shape == (len(times), 2, 3, 6, 9)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("method", METHODS)
def test_evolution_on_a_gpu_is_that_on_the_cpu(method: str) -> None:
    v, u = guidance_images(2, 3, 9, 8), images(2, 3, 9, 8)
    actual = evolve(u.cuda(), v.cuda(), [1, 10], method, tol=1e-10)
    torch.testing.assert_close(actual.cpu(), evolve(u, v, [1, 10], method, tol=1e-10), atol=1e-8, rtol=0)


ONES = torch.ones(2, 3, 4, 5)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"u": torch.ones(3, 4, 5)}, ["(B, C, H, W)", "(3, 4, 5)"]),
        ({"u": [[1.0]]}, ["(B, C, H, W)", "list"]),
        ({"u": ONES.to(torch.uint8)}, ["float dtype", "torch.uint8"]),
        ({"u": -ONES}, [">= 0", "from -1 to -1"]),
        ({"u": ONES * math.nan}, ["finite", "nan"]),
        ({"u": ONES * math.inf}, ["finite", "inf"]),
        ({"u": torch.ones(2, 3, 5, 4)}, ["do not fit", "(2, 3, 5, 4)", "(2, 3, 4, 5)"]),
        ({"guidance_image": torch.ones(3, 3, 4, 5)}, ["do not fit", "(3, 3, 4, 5)"]),
        ({"guidance_image": 0 * ONES}, ["guidance", "positive", "clip"]),
        ({"guidance_image": -ONES}, ["guidance", "positive"]),
        ({"guidance_image": ONES * math.nan}, ["guidance", "finite"]),
        ({"guidance_image": torch.ones(4, 5)}, ["guidance", "(4, 5)"]),
        ({"times": []}, ["times", "not empty"]),
        ({"times": 3.0}, ["times", "sequence", "3.0"]),
        ({"times": torch.tensor(3.0)}, ["times", "sequence"]),
        ({"times": "12"}, ["times", "'12'"]),
        ({"times": [1.0, -2.0]}, ["times", ">= 0", "-2.0"]),
        ({"times": [5.0, 1.0]}, ["times", "ascending", "[5.0, 1.0]"]),
        ({"times": [1.0, math.nan]}, ["times", "finite", "nan"]),
        ({"times": [math.inf]}, ["times", "finite", "inf"]),
        ({"times": [True]}, ["times", "True"]),
        ({"times": ["1"]}, ["times", "'1'"]),
        ({"times": [[1.0, 2.0, 3.0]]}, ["times", "(T, 2)"]),
        ({"times": [[1.0, 2.0], 3.0]}, ["times", "(T, 2)"]),
        ({"times": [[1.0, 2.0], [3.0, 1.0]]}, ["times", "ascending", "[2.0, 1.0]"]),
        ({"times": torch.ones(2, 2, 2)}, ["times", "numbers"]),
        ({"method": "chebishev"}, ["did you mean 'chebyshev'", "bicgstab", "cg"]),
        ({"method": None}, ["None", "chebyshev"]),
        ({"tol": 0.0}, ["tol", "[1e-12, 1)", "0.0"]),
        ({"tol": math.nan}, ["tol", "nan"]),
        ({"tol": "small"}, ["tol", "'small'"]),
        ({"num_steps": 5}, ["chebyshev takes none"]),
        ({"step_size": 5.0}, ["chebyshev takes none"]),
        ({"method": "cg", "num_steps": 0}, ["num_steps", ">= 1", "0"]),
        ({"method": "cg", "num_steps": [1, 2]}, ["num_steps", "1 times", "[1, 2]"]),
        ({"method": "cg", "step_size": 0.0}, ["step_size", "positive", "0.0"]),
        ({"method": "bicgstab", "step_size": math.nan}, ["step_size", "positive", "nan"]),
        ({"method": "bicgstab", "times": [[1.0, 2.0]]}, ["bicgstab", "same times"]),
    ],
)
def test_bad_arguments_say_what_is_allowed(arguments: dict[str, Any], words: list[str]) -> None:
    call = {"u": ONES, "guidance_image": ONES, "times": [1.0]} | arguments
    with pytest.raises(UserError) as caught:
        evolve(**call)
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert "\n" not in message


def test_values_are_not_looked_at_where_that_is_not_wanted() -> None:
    assert evolve(-ONES, ONES, [1.0], validate=False).shape == (1, 2, 3, 4, 5)
    assert OsmosisOperator(0 * ONES, validate=False).guidance.isnan().all()
