"""Chebyshev coefficients and degrees against numpy's and scipy's."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy.polynomial import chebyshev as numpy_chebyshev
from scipy.special import ive
from torch import Tensor

from dpm_scales.errors import UserError
from dpm_scales.operators import Decay, OsmosisOperator, chebyshev_degree
from dpm_scales.operators.chebyshev import chebyshev_coefficients, chebyshev_nodes, heat_coefficients
from support.osmosis_twins import guidance_images, images, white_function

TIMES = [1e-9, 1e-7, 1e-5, 0.01, 0.3, 1.0, 5.0, 10.0, 100.0, 1000.0, 10000.0, 1e6]


def float64(value: Any) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


@pytest.mark.parametrize("degree", [1, 2, 7, 40])
def test_coefficients_are_numpys(degree: int) -> None:
    def f(mu: Any) -> Any:
        return 1 / (0.5 + mu) - mu

    nodes = chebyshev_nodes(degree + 1)
    np.testing.assert_allclose(nodes.flip(0), 4 * (1 + numpy_chebyshev.chebpts1(degree + 1)), atol=1e-14)
    expected = numpy_chebyshev.chebinterpolate(lambda x: f(4 * (1 + x)), degree)
    np.testing.assert_allclose(chebyshev_coefficients(f(nodes), degree), expected, atol=1e-13)
    batch = chebyshev_coefficients(torch.stack([f(nodes), 2 * f(nodes)])[:, None], degree)
    np.testing.assert_allclose(batch[1, 0], 2 * expected, atol=2e-13)


def test_coefficients_of_a_smooth_function_are_its_series() -> None:
    nodes = chebyshev_nodes(130)
    coefficients = chebyshev_coefficients(torch.exp(-5 * nodes), 64)
    k = np.arange(65)
    np.testing.assert_allclose(coefficients, (2 - (k == 0)) * (-1.0) ** k * ive(k, 20.0), atol=1e-15)


@pytest.mark.parametrize("time", TIMES)
@pytest.mark.parametrize("tol", [1e-3, 1e-7, 1e-13])
def test_heat_coefficients_are_scaled_bessel_functions_and_leave_out_no_more_than_the_tolerance(
    time: float, tol: float
) -> None:
    coefficients = np.array(heat_coefficients(time, tol))
    length = len(coefficients)
    k = np.arange(2 * length + 2000)
    exact = (2 - (k == 0)) * (-1.0) ** k * ive(k, 4 * time)
    rest = np.abs(exact[length:]).sum()
    assert rest <= tol * (1 + 1e-6) + 1e-15
    if length > 1:
        np.testing.assert_allclose(coefficients, exact[:length], atol=2e-15, rtol=1e-10)
        assert rest + abs(exact[length - 1]) > tol * (1 - 1e-6), "one term fewer would do"
    assert length <= math.sqrt(8 * time * math.log(4 / tol)) + 2 * math.log(4 / tol)


@pytest.mark.parametrize("tol", [1e-2, 1e-6, 1e-10])
@pytest.mark.parametrize(
    "f",
    [
        lambda mu: torch.exp(-8 * mu),
        lambda mu: 1 / (0.999 * torch.exp(-8 * mu) + 0.001),
        lambda mu: 1 / (0.01 + mu),
        lambda mu: torch.sqrt(1 + mu),
        Decay(float64([-3.0, 0.0, -0.5]), float64([200.0, 0.5, 8.0]), 0.001),
    ],
)
def test_the_degree_is_enough_for_every_eigenvalue_and_no_larger_than_it_must_be(f: Any, tol: float) -> None:
    degree = chebyshev_degree(f, tol)
    mu = torch.linspace(0, 8, 4001, dtype=torch.float64)[None]

    def error(degree: int) -> float:
        """Of the worst sample, relative to its own largest f."""
        coefficients = chebyshev_coefficients(f(chebyshev_nodes(2048)[None]), degree).numpy()
        exact = f(mu).numpy().reshape(-1, mu.numel())
        series = numpy_chebyshev.chebval(mu.numpy()[0] / 4 - 1, coefficients.reshape(-1, degree + 1).T)
        return float((np.abs(series - exact).max(1) / np.abs(exact).max(1)).max())

    assert error(degree) <= tol
    assert error(degree * 3 // 4) > tol


def test_the_degree_of_several_functions_is_the_largest_and_constants_need_none() -> None:
    short, long = (lambda mu: torch.exp(-mu)), (lambda mu: torch.exp(-50 * mu))
    assert chebyshev_degree([short, long], 1e-8) == chebyshev_degree(long, 1e-8) > chebyshev_degree(short, 1e-8)
    assert chebyshev_degree(lambda mu: torch.full((1, 1), 3.0, dtype=torch.float64)) == 1
    assert chebyshev_degree(lambda mu: 0 * mu) == 1
    assert chebyshev_degree(lambda mu: mu**3) == 3


def test_an_operator_of_that_degree_keeps_the_tolerance() -> None:
    v, y = guidance_images(2, 1, 6, 7), images(2, 1, 6, 7)
    f = Decay(float64(0.0), float64(30.0), 0.001)
    for tol in (1e-3, 1e-6, 1e-9):
        degree = chebyshev_degree(f, tol)
        error = OsmosisOperator(v, degree).apply(f, y) - white_function(
            lambda mu: 0.999 * np.exp(-30 * mu) + 0.001, v, y
        )
        sizes = error.flatten(-2).norm(dim=-1) / y.flatten(-2).norm(dim=-1)
        assert sizes.max() <= tol


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"functions": lambda mu: 1 / (mu - mu)}, ["not finite"]),
        ({"functions": lambda mu: torch.sqrt(mu), "max_degree": 200}, ["above 200", "1e-06"]),
        ({"functions": lambda mu: torch.exp(-1e4 * mu), "max_degree": 100}, ["above 100"]),
        ({"tol": 0.0}, ["tol", "[1e-13, 1)"]),
        ({"tol": 2.0}, ["tol", "2.0"]),
    ],
)
def test_functions_without_a_degree_are_refused(arguments: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        chebyshev_degree(**({"functions": torch.cos} | arguments))
    assert all(word in str(caught.value) for word in words), caught.value
