"""The decoder of the likelihood: probabilities of pixel values against scipy, and its standard deviation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from torch import Tensor, nn

from dpm_scales.denoisers import Denoiser
from dpm_scales.likelihood import negative_log_likelihood, wiener_std
from dpm_scales.targets import Clean
from support.oracles import GaussianData, H, W, close, curves, images, named, over
from support.reference import Twin


@pytest.mark.parametrize("value_range", [(0.0, 1.0), (-1.0, 1.0)])
@pytest.mark.parametrize("std", [1e-4, 0.02, 3.0])
def test_probabilities_of_all_levels_sum_to_one(std: float, value_range: tuple[float, float]) -> None:
    """256 levels and means in and out of the range, to 1e-12, and each against scipy's distribution function."""
    low, high = value_range
    x = (low + (high - low) * torch.arange(256, dtype=torch.float64) / 255).reshape(256, 1, 1, 1)
    for mean in (low - 0.3, low + 0.37 * (high - low), high + 0.01):
        nats = negative_log_likelihood(x, float64_like(x, mean), float64_like(x, std), value_range)
        assert torch.isfinite(nats).all() and float(torch.exp(-nats).sum()) == pytest.approx(1, abs=1e-12)
        edges = x.ravel().numpy()[:-1] + (high - low) / 510
        cut = np.concatenate([[0.0], scipy.stats.norm.cdf(edges, mean, std), [1.0]])
        close(torch.exp(-nats), np.diff(cut), 1e-12, 0)


def float64_like(x: Tensor, value: float) -> Tensor:
    return torch.full_like(x, value)


def test_far_tails_keep_their_digits_and_densities_are_the_normal_one() -> None:
    x = torch.tensor([0.2, 0.4], dtype=torch.float64).reshape(1, 1, 1, 2)
    mean, std = float64_like(x, 0.8), float64_like(x, 0.01)
    found = float(negative_log_likelihood(x, mean, std, (0.0, 1.0)))
    # -log of the integral over a bin, by quadrature around its upper end, which is all that counts
    nodes, weights = np.polynomial.legendre.leggauss(200)
    expected = 0.0
    for value in (0.2, 0.4):
        points = value + nodes / 510
        logs = scipy.stats.norm.logpdf(points, 0.8, 0.01) + np.log(weights / 510)
        expected -= scipy.special.logsumexp(logs)
    assert found == pytest.approx(expected, rel=1e-9)
    density = negative_log_likelihood(x, mean, std, (0.0, 1.0), None)
    assert float(density) == pytest.approx(-scipy.stats.norm.logpdf([0.2, 0.4], 0.8, 0.01).sum(), rel=1e-12)


@over(named("vp-cosine", "inverse-heat-0.1", "blurring"))
def test_decoder_takes_the_spread_of_the_linear_estimate(twin: Twin) -> None:
    denoiser = Denoiser(nn.Identity(), twin.build(), Clean(), 0.7).double()
    t, x = torch.tensor(0.25, dtype=torch.float64), images(1, 1, H, W)
    data = GaussianData(np.zeros((H, W)), np.full((H, W), float(denoiser.spectrum.std) ** 2))
    expected = math.sqrt(data.uncertainty(*curves(twin, 0.25)).mean())
    close(wiener_std(denoiser, denoiser.process.operator(), t, x), np.full((1, 1, H, W), expected), 1e-7, 1e-6)
