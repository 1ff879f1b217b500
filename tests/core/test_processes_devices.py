"""Processes stay on the device of their images."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from dpm_scales.processes import (
    VE,
    VP,
    Blurring,
    BlurringChain,
    Homogeneous,
    InverseHeat,
    Process,
)
from dpm_scales.schedules import (
    GeometricNoise,
    ListedBeta,
)
from support.laws import twins
from support.oracles import MEMBERS, H, W, float64, images, named, over, pretended_gpu
from support.reference import TWINS, Twin

# --- devices ----------------------------------------------------------------------------------------------------------


def check_on_gpu(process: Process, s: Tensor | float, t: Tensor | float) -> None:
    x = torch.rand(4, 3, 6, 9, device="cuda")
    for drawn in (
        process.sample(x, t),
        process.transition(x, s, t).sample(),
        process.posterior(x, x, s, t).sample(),
    ):
        assert drawn.device.type == "cuda" and drawn.shape == x.shape


@twins
def test_laws_stay_on_the_device_with_one_t_per_sample(twin: Twin) -> None:
    process = twin.build()
    with pretended_gpu(process):
        s, t = torch.rand(4, device="cuda"), torch.rand(4, device="cuda")
        check_on_gpu(process, s, t)
        assert process.conditional_entropy(t, (6, 9)).device.type == "cuda"


#: every member, and tables of the noise and of the blur
few = over(named(*MEMBERS, "vp-listed", "blurring-listed-discrete", "chain-listed"))


@few
def test_laws_stay_on_the_device_with_one_t_for_all(twin: Twin) -> None:
    process = twin.build()
    with pretended_gpu(process):
        check_on_gpu(process, torch.rand((), device="cuda"), torch.rand((), device="cuda"))


@few
def test_laws_and_trajectories_stay_on_the_device_with_numbers(twin: Twin) -> None:
    process = twin.build()
    with pretended_gpu(process):
        check_on_gpu(process, 0.25, 0.7)
        assert process.trajectory(torch.rand(2, 1, 6, 9, device="cuda"), [0.0, 0.3, 1.0]).device.type == "cuda"


@pytest.mark.parametrize(
    "make",
    [VP, VE, Homogeneous, InverseHeat, Blurring, BlurringChain, lambda: VE(8, GeometricNoise())],
)
def test_processes_made_of_formulas_need_no_move(make: Callable[[], Process]) -> None:
    process = make()
    with FakeTensorMode(allow_non_fake_inputs=True):
        check_on_gpu(process, torch.rand(4, device="cuda"), torch.rand(4, device="cuda"))


def test_the_pretended_gpu_notices_mixed_devices() -> None:
    process = VP(4, ListedBeta([0.1] * 4))
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(Exception, match="device"):
        check_on_gpu(process, torch.rand(4, device="cuda"), torch.rand(4, device="cuda"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_laws_on_a_gpu_are_those_on_the_cpu() -> None:
    x, x_0 = images(2, 1, H, W), images(2, 1, H, W, seed=1)
    s, t = float64([0.1, 0.5]), float64([0.7, 0.9])
    for twin in TWINS:
        process = twin.build()
        expected = process.posterior(x, x_0, s, t).mean
        actual = process.to("cuda").posterior(x.cuda(), x_0.cuda(), s.cuda(), t.cuda()).mean
        torch.testing.assert_close(actual.cpu(), expected, atol=1e-10, rtol=1e-9)
