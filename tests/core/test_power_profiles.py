"""Power-function averages: lengths, exact weights, inner products, and fits, against quadrature and explicit sums."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.integrate import quad
from scipy.optimize import brentq

from dpm_scales.models.power_profiles import (
    LONGEST,
    SHORTEST,
    check_length,
    exponent_of,
    fit,
    inner_products,
    length_of,
    newest_weight,
)
from support.oracles import refused

LENGTHS = (SHORTEST, 0.01, 0.05, 0.1, 0.17, 0.25, LONGEST)
Array = NDArray[np.float64]


def profile(time: float, step: float, exponent: float) -> float:
    """EDM2, Sect. 3.1."""
    return 0.0 if time > step else (exponent + 1) / step * (time / step) ** exponent


def integral(function: object, end: float) -> float:
    """Over (0, end], in pieces, since profiles of large exponents are narrow."""
    edges = end * (1 - np.geomspace(1, 1e-6, 25))
    return math.fsum(quad(function, a, b, epsabs=0, epsrel=1e-12)[0] for a, b in pairwise([*edges, end]))


def exact_weights(step: int, length: float) -> Array:
    """Of the steps 1, 2, …: the profile's integrals over each of them, as differences of logarithms."""
    power = exponent_of(length) + 1
    ends = np.arange(step + 1) / step
    return np.diff(np.exp(power * np.log(np.maximum(ends, 1e-300))))


@pytest.mark.parametrize("length", LENGTHS)
def test_a_length_is_the_standard_deviation_of_its_profile(length: float) -> None:
    exponent, end = exponent_of(length), 7.0
    moments = [integral(lambda t, k=k: t**k * profile(t, end, exponent), end) for k in range(3)]
    assert moments[0] == pytest.approx(1, rel=1e-9)
    assert math.sqrt(moments[2] - moments[1] ** 2) / end == pytest.approx(length, rel=2e-6)
    assert length_of(exponent) == pytest.approx(length, rel=1e-12)
    if length < LONGEST:
        assert exponent == pytest.approx(brentq(lambda g: length_of(g) - length, 0, 1e5, xtol=1e-13), abs=1e-9)


def test_lengths_out_of_range_are_refused() -> None:
    assert exponent_of(LONGEST) == pytest.approx(0, abs=1e-12)
    for value in (0, 0.0009, 0.29, 1, -0.1, math.nan, math.inf, "0.1", None, True):
        with refused("ema.length must be a number >= 0.001 and <= 0.288675, got"):
            check_length("ema.length", value)


@pytest.mark.parametrize("length", LENGTHS)
def test_the_recursion_gives_the_explicit_weighted_sum(length: float) -> None:
    """Of a walk of parameters, in float64, after each of 300 steps."""
    rng = np.random.default_rng(3)
    walk = np.cumsum(rng.standard_normal((300, 5)), 0) + rng.standard_normal(5)
    average = rng.standard_normal(5)  # whatever it was before
    for step in range(1, 301):
        average += newest_weight(step, exponent_of(length)) * (walk[step - 1] - average)
        if step in (1, 2, 17, 300):
            wanted = sum(w * row for w, row in zip(exact_weights(step, length), walk[:step], strict=True))
            np.testing.assert_allclose(average, wanted, rtol=1e-10, atol=1e-12)


def test_inner_products_are_integrals() -> None:
    rng = np.random.default_rng(0)
    for _ in range(12):
        (a, b), (one, other) = rng.uniform(1, 50, 2), rng.uniform(0, 30, 2)
        end = min(a, b)
        found = inner_products(
            *((torch.tensor([t]).double(), torch.tensor([g]).double()) for t, g in ((a, one), (b, other)))
        )
        wanted = integral(lambda t: profile(t, a, one) * profile(t, b, other), end)  # noqa: B023
        assert float(found) == pytest.approx(wanted, rel=1e-9)
        assert found.dtype == torch.float64


def stored(number: int, last: int, lengths: tuple[float, ...] = (0.05, 0.1)) -> tuple[list[int], list[float]]:
    steps = [round(last * (k + 1) / number) for k in range(number)]
    return [step for step in steps for _ in lengths], [length for _ in steps for length in lengths]


def test_a_stored_average_is_itself() -> None:
    steps, lengths = stored(12, 600)
    for place in (1, 8, 23):
        coefficients, error = fit(steps, lengths, steps[place], lengths[place])
        np.testing.assert_allclose(coefficients, np.eye(24)[place], atol=1e-9)
        assert error < 1e-6


def published(steps: list[int], lengths: list[float], step: int, length: float) -> Array:
    """The listing of EDM2, Appendix C, with exponents found numerically: without the sum of 1."""

    def dot(t_a: Array, g_a: Array, t_b: Array, g_b: Array) -> Array:
        exponent = np.where(t_a < t_b, g_b, -g_a)
        return (g_a + 1) * (g_b + 1) * (t_a / t_b) ** exponent / ((g_a + g_b + 1) * np.maximum(t_a, t_b))

    def gamma(length: float) -> float:
        return float(np.roots([1, 7, 16 - length**-2, 12 - length**-2]).real.max())

    t, g = np.array(steps, float), np.array([*map(gamma, lengths)])
    gram = dot(t[:, None], g[:, None], t[None], g[None])
    return np.linalg.solve(gram, dot(t, g, np.array(float(step)), np.array(gamma(length))))


@pytest.mark.parametrize("length", [0.03, 0.07, 0.15, 0.22])
def test_fits_of_a_walk_are_near_the_tracked_average_and_nearer_with_more_snapshots(length: float) -> None:
    """With the published coefficients, those of 16 snapshots or more agree."""
    rng = np.random.default_rng(1)
    last = 960
    walk = np.cumsum(rng.standard_normal((last, 400)), 0) + 30
    tracked, spread = exact_weights(last, length) @ walk, np.std(walk)
    errors = []
    for number in (4, 8, 16, 32):
        steps, lengths = stored(number, last)
        kept = np.stack([exact_weights(step, own) @ walk[:step] for step, own in zip(steps, lengths, strict=True)])
        coefficients, predicted = fit(steps, lengths, last, length)
        assert sum(coefficients) == pytest.approx(1, abs=1e-9)
        errors.append(np.sqrt(np.mean((np.array(coefficients) @ kept - tracked) ** 2)) / spread)
        constant = np.array(coefficients) @ np.full(len(steps), 5.0)
        assert constant == pytest.approx(5, abs=1e-8)  # a weight that never changes is reconstructed exactly

        def missed(t: float, terms: object = tuple(zip(coefficients, steps, lengths, strict=True))) -> float:
            combined = sum(c * profile(t, s, exponent_of(own)) for c, s, own in terms)  # type: ignore[attr-defined]
            return float((combined - profile(t, last, exponent_of(length))) ** 2)

        if number == 4:  # between its kinks
            edges = [0, *sorted({*steps})]
            distance = math.fsum(quad(missed, a, b, epsrel=1e-8)[0] for a, b in pairwise(edges))
            norm = integral(lambda t: profile(t, last, exponent_of(length)) ** 2, last)
            assert predicted == pytest.approx(math.sqrt(distance / norm), rel=1e-4)
        if number == 32:
            difference = np.array(coefficients) @ kept - published(steps, lengths, last, length) @ kept
            assert np.abs(difference).max() < 1e-2 * spread
    assert all(later < 0.75 * earlier for earlier, later in pairwise(errors)), errors
    assert errors[-1] < 2e-3 and errors[0] < 0.2
