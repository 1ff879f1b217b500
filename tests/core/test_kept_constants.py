"""Constants of the law are computed once for each size, and only those second moments that a target reads."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from dpm_scales.moments import Moments
from dpm_scales.operators import HeatOperator, heat_blur
from dpm_scales.processes import VP, Blurring, InverseHeat, Process, Spectral
from dpm_scales.schedules import Rectified
from dpm_scales.spectrum import DataSpectrum
from dpm_scales.targets import Clean, Flow, NextScale, Target
from support.reference import dense_heat

H, W = 5, 7


def test_eigenvalues_are_computed_once_for_each_size_spectrum_and_device() -> None:
    k, m = np.arange(H)[:, None] * math.pi / H, np.arange(W)[None] * math.pi / W
    expected = {"continuous": k**2 + m**2, "discrete": 4 * np.sin(k / 2) ** 2 + 4 * np.sin(m / 2) ** 2}
    for spectrum, values in expected.items():
        first = HeatOperator(spectrum).eigenvalues(H, W, "cpu")
        assert HeatOperator(spectrum).eigenvalues(H, W, torch.device("cpu")) is first
        np.testing.assert_allclose(first.numpy(), values, atol=1e-13)
        assert HeatOperator(spectrum).eigenvalues(W, H, "cpu").shape == (W, H)
    # the default device may change between two calls
    assert HeatOperator().eigenvalues(H, W) is not HeatOperator().eigenvalues(H, W)


def test_fake_tensors_leave_nothing_behind() -> None:
    size = (9, 6)
    for _ in range(2):  # fake first, then after a real call
        with FakeTensorMode():
            blurred = heat_blur(torch.ones(1, 1, *size), 0.5)
            assert isinstance(blurred, FakeTensor) and blurred.shape == (1, 1, *size)
        x = torch.rand(1, 1, *size, dtype=torch.float64)
        found, op = heat_blur(x, 0.5), HeatOperator()
        assert type(op.eigenvalues(*size, "cpu")) is torch.Tensor
        torch.testing.assert_close(op.synthesis(op.analysis(x) * torch.exp(-0.5 * op.eigenvalues(*size))), found)


def test_constants_of_inference_mode_serve_training() -> None:
    size = (4, 11)
    x = torch.rand(1, 1, *size, dtype=torch.float64)
    with torch.inference_mode():
        heat_blur(x, 0.3)
    x.requires_grad_(True)
    heat_blur(x, 0.3).square().sum().backward()
    blur = dense_heat(*size, 0.3)
    assert x.grad is not None
    expected = 2 * blur @ blur @ x.detach().numpy().reshape(-1)
    np.testing.assert_allclose(x.grad.numpy().reshape(-1), expected, atol=1e-12)


@pytest.mark.parametrize(
    ("target", "process", "unread"),
    [
        (Clean("spectral"), VP(), {"cross", "residual", "step", "flow"}),
        (Clean("wiener"), Blurring(), {"cross", "residual", "step", "flow"}),
        (Clean("scalar"), VP(), {"estimate", "wiener_residual", "step", "flow"}),
        (Flow(), Spectral(noise=Rectified()), {"cross", "residual", "step", "estimate", "wiener_residual"}),
        (NextScale(), InverseHeat(), {"flow"}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_only_moments_that_are_read_are_computed(target: Target, process: Process, unread: set[str]) -> None:
    t = torch.tensor([0.2, 0.7], dtype=torch.float64)
    m = Moments(process, target.basis(process.operator()), t, DataSpectrum(), (H, W))
    scalings = target.scalings(m)
    assert scalings.out.shape[0] in (1, 2)
    assert not unread & set(vars(m))


@pytest.mark.parametrize("process", [VP(), Blurring(), InverseHeat()])
def test_the_filter_is_the_same_to_the_bit_at_its_own_eigenvalues(process: Process) -> None:
    t, operator = torch.tensor([0.2, 0.7], dtype=torch.float64), HeatOperator()
    m = Moments(process, operator, t, DataSpectrum(), (H, W))
    mu = operator.eigenvalues(H, W, "cpu")
    assert torch.equal(m.wiener(mu), m.wiener(mu.clone()))
