"""Measures of a scale-space: against numpy, dense covariance matrices and their determinants."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from dpm_scales.metrics import (
    average_grey,
    entropy_increments,
    image_variance,
    relative_entropy,
    reverse_entropy_bounds,
    step_entropy,
)
from dpm_scales.processes import VP, Homogeneous
from support.oracles import NOISY, close, curves, float64, images, over, refused
from support.reference import Array, Twin, dense_function

SIZE = (3, 4)
SCALES = [0.125, 0.3, 0.625, 1.0]


def covariance(twin: Twin, t: float) -> Array:
    """Of U_t given U_0, a dense matrix."""
    return dense_function(twin.matrix(*SIZE), lambda mu: twin.variance(t, mu).clip(0) * np.ones_like(mu))


def joint(twin: Twin, s: float, t: float, data: Array) -> Array:
    """Covariance of (U_s, U_t) for Gaussian data of covariance `data`, by the transition's dense matrices."""
    signal_s = dense_function(twin.matrix(*SIZE), lambda mu: twin.signal(s, mu) * np.ones_like(mu))
    rho = dense_function(twin.matrix(*SIZE), lambda mu: twin.signal(t, mu) / twin.signal(s, mu) * np.ones_like(mu))
    at_s = signal_s @ data @ signal_s.T + covariance(twin, s)
    added = covariance(twin, t) - rho @ covariance(twin, s) @ rho.T
    at_t = rho @ at_s @ rho.T + added
    return np.block([[at_s, at_s @ rho.T], [rho @ at_s, at_t]])


def entropy(matrix: Array) -> float:
    sign, log_det = np.linalg.slogdet(2 * math.pi * math.e * matrix)
    assert sign > 0
    return float(log_det) / 2


def solvable(twin: Twin) -> bool:
    """Blur that leaves enough for a determinant in float64."""
    return all(float(curves(twin, 1.0, *SIZE)[0].min()) > 1e-4 * float(curves(twin, s, *SIZE)[0].max()) for s in SCALES)


MILD = [twin for twin in NOISY if solvable(twin)]


@over(NOISY)
def test_increments_are_those_of_the_determinants(twin: Twin) -> None:
    entropies = [entropy(covariance(twin, t)) for t in SCALES]
    found = entropy_increments(twin.build(), float64(SCALES), SIZE)
    close(found.numpy(), np.diff(entropies), 1e-8)


def test_enough_processes_are_mild() -> None:
    assert len(MILD) >= 5


@over(MILD)
def test_reverse_entropy_lies_between_its_bounds_for_gaussian_data(twin: Twin) -> None:
    """H(U_s | U_t) = H(U_s, U_t) - H(U_t) of the joint covariance; the lower bound is H(U_s | U_t, U_0)."""
    process = twin.build()
    lower, upper = reverse_entropy_bounds(process, float64(SCALES), SIZE)
    white = images(40, 1, *SIZE).flatten(1).numpy()
    for data in (np.eye(12), white.T @ white / 40):
        for k, (s, t) in enumerate(zip(SCALES, SCALES[1:], strict=False)):
            both = joint(twin, s, t, data)
            reverse = entropy(both) - entropy(both[12:, 12:])
            assert float(lower[k]) <= reverse + 1e-9
            if entropy(both[12:, 12:]) >= entropy(both[:12, :12]):
                assert reverse <= float(upper[k]) + 1e-9
    known = joint(twin, SCALES[0], SCALES[1], np.zeros((12, 12)))  # U_0 given
    assert float(lower[0]) == pytest.approx(entropy(known) - entropy(known[12:, 12:]), abs=1e-8)


@over(MILD)
def test_step_entropy_is_that_of_the_added_noise(twin: Twin) -> None:
    for s, t in zip(SCALES, SCALES[1:], strict=False):
        rho = dense_function(twin.matrix(*SIZE), lambda mu, s=s, t=t: twin.signal(t, mu) / twin.signal(s, mu))
        added = covariance(twin, t) - rho @ covariance(twin, s) @ rho.T
        found = step_entropy(twin.build(), float64(s), float64(t), SIZE)
        assert float(found) == pytest.approx(entropy(added), abs=1e-6)


def test_no_noise_has_no_entropy() -> None:
    lower, upper = reverse_entropy_bounds(Homogeneous(8), float64([0.5, 1.0]), SIZE)
    assert torch.isneginf(upper).all() and torch.isnan(lower).all()
    assert entropy_increments(VP(8), float64([0.5]), SIZE).shape == (0,)
    assert all(b.shape == (0,) for b in reverse_entropy_bounds(VP(8), float64([0.5]), SIZE))
    with refused("scales must be (T,)"):
        entropy_increments(VP(8), float64(0.5), SIZE)


def test_variance_and_grey_are_numpys() -> None:
    x = images(3, 2, 5, 7).float()
    channels = np.var(x.double().numpy(), axis=(-2, -1))
    close(image_variance(x).numpy(), channels.mean(-1))
    close(average_grey(x).numpy(), x.double().numpy().mean((1, 2, 3)))
    assert image_variance(x.expand(4, 3, 2, 5, 7)).shape == (4, 3)


def test_relative_entropy_is_the_sum_and_zero_only_at_the_steady_state() -> None:
    u, w = torch.rand(2, 3, 4, 5, dtype=torch.float64), torch.rand(2, 3, 4, 5, dtype=torch.float64) + 0.1
    w = w * u.sum((-2, -1), keepdim=True) / w.sum((-2, -1), keepdim=True)  # one mass
    expected = -(u * torch.log(u / w)).sum((-2, -1))
    close(relative_entropy(u, w).numpy(), expected.numpy())
    assert (relative_entropy(u, w) < 0).all()
    close(relative_entropy(w, w).numpy(), 0.0, 1e-12)
    u[0, 0, 0, 0] = 0
    assert torch.isfinite(relative_entropy(u, w)).all()
    with refused("images >= 0"):
        relative_entropy(u - 1, w)
    with refused("steady state > 0"):
        relative_entropy(u, w * 0)
