"""Samplers stay on the device of the noise and never wait for it."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from dpm_scales.denoisers import Denoiser
from dpm_scales.priors import GaussianPrior, auto_prior
from dpm_scales.processes import VP
from dpm_scales.rng import CounterRNG
from dpm_scales.samplers import Ancestral, Heun
from dpm_scales.samplers.measuring import measure_error_variance
from dpm_scales.schedules import LinearBeta
from dpm_scales.targets import Clean
from support.oracles import BY_NAME, MEMBERS, H, TinyNetwork, W, images, named, over, pretended_gpu, with_target
from support.reference import Twin
from support.samplers import SAMPLERS
from support.targets import TARGETS

#: tables and DCTs with every sampler; processes that add curves of their own with those that use them differently
ON_DEVICE = [(twin, name) for twin in named("vp-listed", "blurring-listed-discrete") for name in SAMPLERS]
ON_DEVICE += [(BY_NAME["chain"], "ancestral"), (BY_NAME["chain"], "heun")]
ON_DEVICE += [(BY_NAME["homogeneous-log"], name) for name in ("heun", "dissipation", "cold")]


@pytest.mark.parametrize(("twin", "name"), ON_DEVICE, ids=lambda value: getattr(value, "name", value))
def test_sampling_stays_on_the_device_and_never_waits_for_it(twin: Twin, name: str) -> None:
    """Fake tensors refuse mixed devices, and any value read back by the host; the grid is made before."""
    denoiser, sampler = Denoiser(TinyNetwork(2), twin.build(), Clean()), SAMPLERS[name]()
    prior = auto_prior(denoiser.process)
    prior.fit(images(3, 2, 6, 9), denoiser.process)
    scales = sampler.scales(denoiser.process)[-3:]
    with pretended_gpu(denoiser, prior):
        noise, labels = CounterRNG(0, 4, device="cuda"), torch.zeros(4, dtype=torch.int64, device="cuda")
        reports: list[Tensor] = []
        x = sampler.sample(denoiser, prior, noise, (2, 6, 9), labels, scales.to("cuda"), lambda i, x: reports.append(x))
        assert x.device.type == "cuda" and x.shape == (4, 2, 6, 9)
        assert len(reports) == 2 and all(report.device.type == "cuda" for report in reports)


@pytest.mark.parametrize("target", ["noise", "velocity", "finer"])
@over(named("vp-cosine", "blurring"))
def test_sampling_by_other_targets_stays_on_the_device(twin: Twin, target: str) -> None:
    denoiser = Denoiser(TinyNetwork(2), twin.build(), TARGETS[target]())
    scales = Ancestral().scales(denoiser.process)[-3:]
    with pretended_gpu(denoiser):
        noise = CounterRNG(0, 4, device="cuda")
        x = Ancestral().sample(denoiser, GaussianPrior(), noise, (2, 6, 9), scales=scales.to("cuda"))
        assert x.device.type == "cuda"


@over(named("vp-cosine", "blurring"))
def test_the_optimal_covariance_stays_on_the_device(twin: Twin) -> None:
    denoiser = Denoiser(TinyNetwork(2), twin.build(), Clean())
    denoiser.error_variance = measure_error_variance(denoiser, [(images(2, 2, 6, 9).float(), None)])
    sampler = Ancestral(covariance="optimal")
    scales = sampler.scales(denoiser.process)[-3:]
    with pretended_gpu(denoiser):
        noise = CounterRNG(0, 4, device="cuda")
        x = sampler.sample(denoiser, GaussianPrior(), noise, (2, 6, 9), scales=scales.to("cuda"))
        assert x.device.type == "cuda"


def test_uniform_grid_is_made_on_the_device() -> None:
    process = VP(8)
    with pretended_gpu():
        assert Ancestral(4).scales(process, "cuda").device.type == "cuda"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_samples_on_a_gpu_are_those_on_the_cpu() -> None:
    for twin, make in itertools.product(named(*MEMBERS, "vp-listed"), SAMPLERS.values()):
        denoiser = with_target(twin, Clean(), TinyNetwork())
        prior = auto_prior(denoiser.process)
        prior.fit(images(3, 1, H, W), denoiser.process)
        ends = []
        for device in ("cpu", "cuda"):
            denoiser.to(device)
            prior.to(device)
            noise = CounterRNG(0, 4, device=device)
            ends.append(make().sample(denoiser, prior, noise, (1, H, W), dtype=torch.float64).cpu())
        torch.testing.assert_close(ends[1], ends[0], atol=1e-8, rtol=1e-8)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_karras_grid_is_made_wherever_the_processs_tables_are() -> None:
    expected = Heun(5).scales(VP(8, LinearBeta()))
    for device in ("cpu", "cuda"):
        assert torch.equal(Heun(5).scales(VP(8, LinearBeta()).to("cuda"), device).cpu(), expected)
